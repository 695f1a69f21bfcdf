"""Bad and odd input through the whole program: what can be read trains and is captioned, the rest is named in one line.

Mistakes in annotation files, line by line, are in test_data.py and test_corpora.py; here they go through vcgpt.main.
"""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import common
import corpora
import data
import language
import vcgpt
from common import UserError
from tools import official as programs

TOY = """--preset tiny --width 32 --heads 2 --mlp 64 --vision-width 32 --vision-heads 2 --fusion-layers 1 --lm-steps 2
    --batch 20 --steps 4 --log-every 2 --workers 0 --max-new 12 --device cpu""".split()
LONG = " ".join(f"word{i}" for i in range(500))
EMOJI, RIGHT_TO_LEFT = "a dog 🐕‍🦺 on a 🏖️", "كلب يركض على الشاطئ"


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def readable(folder):
    """One picture of each odd kind."""
    photo = noise(40, 30)
    photo.convert("L").save(folder / "grey.jpg")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.quantize(16).save(folder / "palette.png", transparency=3)
    Image.fromarray(np.linspace(0, 65535, 1200).reshape(30, 40).astype(np.uint16)).save(folder / "16bit.png")
    noise(1, 300).save(folder / "thin.png")
    noise(300, 1).save(folder / "flat.png")
    exif = Image.Exif()
    exif[data.ORIENTATION] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    return [folder / name for name in ("grey.jpg", "cmyk.jpg", "palette.png", "16bit.png", "thin.png", "flat.png",
                                       "turned.jpg")]  # fmt: skip


def broken(folder):
    """Pictures that cannot be read, of each kind."""
    noise(200, 200).save(folder / "truncated.jpg")
    (folder / "truncated.jpg").write_bytes((folder / "truncated.jpg").read_bytes()[:9000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>not found</html>")
    return [folder / name for name in ("truncated.jpg", "empty.jpg", "page.jpg", "absent.jpg")]


def write_jsonl(file, splits):
    """{split: paths}, four captions each."""
    rows = [{"image": path.name, "captions": ["a picture", LONG, EMOJI, RIGHT_TO_LEFT], "split": split}
            for split, paths in splits.items() for path in paths]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def said_by(argv):
    """Runs vcgpt.py as its command line does -> (exit status, stdout, stderr)."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.run_main(lambda: vcgpt.main([str(word) for word in argv]))
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def fails(argv, *told):
    """The program ends with status 2 and one error that says `told`."""
    status, _, err = said_by(argv)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err, err
    for part in told:
        assert part in err, f"{part!r} is not in {err!r}"
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on every kind of picture: the readable ones in all splits, the broken ones in train."""
    folder = tmp_path_factory.mktemp("odd")
    good, bad = readable(folder), broken(folder)
    mine = write_jsonl(folder / "mine.jsonl", {"train": bad})
    for split in ("train", "val", "test"):  # a picture is in one split, so each split has copies of its own
        copies = [path.with_name(f"{split}_{path.name}") for path in good]
        for path, copy in zip(good, copies, strict=True):
            copy.write_bytes(path.read_bytes())
        mine.write_text(mine.read_text() + "\n" + write_jsonl(folder / "part.jsonl", {split: copies}).read_text())
    with pytest.MonkeyPatch.context() as patch:  # METEOR's Java has no part in this and takes seconds to start
        patch.setattr(programs, "official_caption_metrics", lambda *_: ({}, []))
        return folder, mine, said_by([*TOY, "--data", mine, "--out", folder / "run"])


def test_odd_pictures_and_captions_train_and_are_evaluated(trained):
    folder, mine, (status, out, err) = trained
    assert status == 0, err
    assert "1 of 25 images are missing and left out: absent.jpg" in out
    skipped = [line for line in err.splitlines() if line.startswith("skipped a picture")]
    assert "3 training pictures could not be read and were skipped" in out
    assert len(skipped) == 3 and any(name in err for name in ("truncated.jpg", "empty.jpg", "page.jpg"))
    metrics = json.loads((folder / "run" / "metrics.json").read_text())["splits"]["test"]["metrics"]
    assert 0 <= metrics["BLEU_1"] <= 1 and (folder / "run" / "samples.png").stat().st_size > 1000

    corpus = corpora.load(str(mine))
    tokenizer = language.Tokenizer.load(folder / "run" / "last")
    pictures = data.Pictures(corpus.splits["train"], tokenizer, 32, captions=4, max_len=30, train=True)
    loader = data.train_loader(pictures, 10, steps=1)
    (batch,) = loader
    loader.judge(batch["bad"])
    assert sorted(batch["image_id"]) == sorted(f"train_{path.name}" for path in readable(folder))
    assert {message.split(": ")[0] for message in loader.bad} == set(map(str, broken(folder)[:3]))
    assert batch["ids"].shape == (28, 31)  # 500 words are cut to 30 tokens, and one begins each caption
    texts = {tokenizer.decode(row[row != -100]) for row in batch["targets"]}
    assert {"a picture", EMOJI, RIGHT_TO_LEFT} <= texts


def test_a_long_reference_is_evaluated_whole(trained):
    items = corpora.load(str(trained[1])).splits["test"]
    (batch,) = data.eval_loader(data.Pictures(items, None, 32, max_len=30), 10)
    assert all(captions == ("a picture", LONG, EMOJI, RIGHT_TO_LEFT) for captions in batch["captions"])


def test_every_readable_picture_is_captioned(trained, tmp_path):
    paths = readable(tmp_path)
    status, out, err = said_by(["--caption", *paths, "--init", trained[0] / "run"])
    assert status == 0 and all(out.count(f"{path}: ") == 1 for path in paths), err


@pytest.mark.parametrize("n", range(4))
def test_a_picture_that_cannot_be_captioned_is_named(trained, tmp_path, n):
    path = broken(tmp_path)[n]
    fails(["--caption", path, "--init", trained[0] / "run"], f"{path}: ", "give another file")


def test_a_test_picture_that_is_missing_is_named_before_training(tmp_path):
    mine = write_jsonl(tmp_path / "x.jsonl", {"train": readable(tmp_path), "test": [broken(tmp_path)[3]]})
    fails([*TOY, "--data", mine, "--out", tmp_path / "run"], "absent.jpg of split test is missing", "take its line out")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n", range(3))
def test_evaluation_stops_at_a_bad_picture(tmp_path, n):
    bad = broken(tmp_path)[n]
    mine = write_jsonl(tmp_path / "x.jsonl", {"train": readable(tmp_path), "test": [bad]})
    run = tmp_path / "run"
    fails([*TOY, "--steps", 1, "--data", mine, "--out", run], f"{bad}: ", "Mend or remove it", f"--resume {run}")


def test_training_stops_where_nothing_can_be_read(tmp_path):
    mine = write_jsonl(tmp_path / "x.jsonl", {"train": broken(tmp_path)})
    fails([*TOY, "--data", mine, "--out", tmp_path / "run"], "none of these pictures can be read", "empty.jpg")


def karpathy(root, **change):
    """A Flickr root of three pictures; `change` goes into the second record."""
    records = [{"filename": f"{i}.jpg", "imgid": i, "split": "train", "sentences": [{"raw": "a dog"}]}
               for i in range(3)]  # fmt: skip
    records[1].update(change)
    (root / "images").mkdir()
    for i in range(3):
        noise(20, 20).save(root / "images" / f"{i}.jpg")
    (root / "dataset_flickr8k.json").write_text(json.dumps({"images": records}))
    return root


OFFICIAL = {
    "unknown split": ({"split": "dev"}, ["images[1]", "'dev' is not known", "restval"]),
    "caption empty": ({"sentences": [{"raw": " "}]}, ["images[1]", "1.jpg", "not empty"]),
    "caption a number": ({"sentences": [{"raw": 7}]}, ["images[1]", "not 7"]),
    "path leaves the root": ({"filename": "../../1.jpg"}, ["image 1", "without `..`"]),
    "folder leaves the root": ({"filepath": "../.."}, ["image 1", "without `..`"]),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_mistakes_in_official_files(tmp_path, case):
    change, told = OFFICIAL[case]
    fails(["--data", "flickr8k", "--root", karpathy(tmp_path, **change)], *told)


def test_official_files_that_lack(tmp_path):
    fails(["--data", "flickr8k", "--root", tmp_path / "no"], f"{tmp_path / 'no'} does not exist", "pass --root")
    fails(["--data", "flickr8k", "--root", tmp_path], "no dataset_*.json", "caption_datasets.zip", "pass --root")
    root = karpathy(tmp_path)
    for path in (root / "images").iterdir():
        path.unlink()
    fails(["--data", "flickr8k", "--root", root], "0.jpg are in none of", "put them there or pass --root")
    (root / "dataset_flickr8k.json").write_text('{"annotations": []}')
    fails(["--data", "flickr8k", "--root", root], "no list `images`")


@pytest.mark.parametrize("row, told", [
    ({"image": "../a.jpg", "caption": "x"}, "without `..`"), ({"image": "a.jpg", "caption": ""}, "not empty"),
    ({"image": "a.jpg", "caption": ["x"]}, "a text that is not empty"),
    ({"image": "b.jpg", "caption": "x"}, "none of its image"),
])  # fmt: skip
def test_mistakes_in_own_data(tmp_path, row, told):
    noise(9, 9).save(tmp_path / "a.jpg")
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    fails(["--data", tmp_path / "x.jsonl"], str(tmp_path / "x.jsonl"), told)


@pytest.mark.parametrize("wrong, near", [("coc", "coco"), ("Flickr-30k", "flickr30k"), ("scene", "scenes")])
def test_a_misspelt_data_set_is_answered_with_the_nearest(wrong, near):
    fails(["--data", wrong], f"did you mean {near}?")


@pytest.mark.parametrize("name, text", [
    ("x.jsonl", '{"image": "a.jpg", "caption": "one two"}\n{"image": "b.jpg", "caption": "three"}\n'),
    ("x.csv", 'image,caption\na.jpg,"one two"\nb.jpg,three\n'),
    ("captions.txt", "a.jpg\tone two\nb.jpg\tthree\n"), ("captions.txt", "a.jpg,one two\nb.jpg,three\n"),
])  # fmt: skip
def test_files_of_windows(tmp_path, name, text):
    """A byte order mark at the beginning and CRLF at the ends of lines are no part of names and captions."""
    for image in ("a.jpg", "b.jpg"):
        noise(9, 9).save(tmp_path / image)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    items = corpora.load(str(tmp_path if name == "captions.txt" else tmp_path / name)).splits["train"]
    assert [(item.image_id, item.captions) for item in items] == [("a.jpg", ("one two",)), ("b.jpg", ("three",))]


def test_a_user_error_of_a_worker_arrives_as_it_was_raised(tmp_path):
    noise(9, 9).save(tmp_path / "a.png")
    pictures = data.Pictures([data.Item(3, tmp_path / "a.png", ())], None, 16, train=True)
    for workers in (0, 2):
        with pytest.raises(UserError) as caught:
            list(data.train_loader(pictures, 1, workers, steps=1))
        assert str(caught.value) == "image 3 has no caption to train on"


def test_a_turned_picture_is_trained_on_upright(tmp_path):
    (*_, turned) = readable(tmp_path)
    upright = Image.open(turned).transpose(Image.Transpose.ROTATE_270)
    pixels = data.Pictures([data.Item(0, turned, ("x",))], None, 40)[0]["pixels"]
    assert upright.size == (30, 40) and torch.equal(pixels, data.to_pixels(upright.convert("RGB"), 40))
