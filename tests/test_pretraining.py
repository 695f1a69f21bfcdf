"""Visual Genome, Conceptual Captions and SBU as corpora.load reads them: what the small world says, sample for sample;
no picture that COCO or Flickr30k test on; whatever is damaged is counted, or said by a UserError."""

import csv
import io
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import corpora
import data
import pretraining
import scenes
from common import UserError
from tools import export

SIZE = 32
COUNTS = dict(train=24, val=12, test=12)
SPLITS = ("train", "val", "test")
LAYOUTS = ("coco", "flickr30k", "vg", "cc3m", "cc3m_json", "sbu")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Exports of the same scenes beside one another, never written to."""
    folder = tmp_path_factory.mktemp("official")
    for layout in LAYOUTS:
        export.export(layout, folder / layout, "tiny", **COUNTS, size=SIZE, seed=1)
    return folder


@pytest.fixture
def place(official, tmp_path):
    """A copy of them: place("vg", "coco") -> the folder that holds these."""

    def copy(*layouts):
        for layout in layouts:
            shutil.copytree(official / layout, tmp_path / layout)
        return tmp_path

    return copy


def drawn(*splits):
    return [scene for split in splits for scene in scenes.Scenes("tiny", split, COUNTS[split], seed=1)]


def items(corpus):
    """id -> Item, over all splits."""
    found = {item.image_id: item for split in corpus.splits.values() for item in split}
    assert len(found) == sum(map(len, corpus.splits.values()))
    return found


def assert_shows(item, scene):
    pixels = np.asarray(data.load_image(item.image, SIZE)).astype(int)
    assert np.abs(pixels - np.asarray(scenes.render(scene, SIZE)).astype(int)).mean() < 4


def note_with(corpus, *words):
    found = [note for note in corpus.notes if all(word in note for word in words)]
    assert len(found) == 1, corpus.notes
    return found[0]


def edited(file, change):
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(change(content) or content), "utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# What is read is what was written


def test_vg(place):
    root = place("vg", "coco", "flickr30k") / "vg"
    corpus = corpora.load("vg", root)
    n_train = COUNTS["train"]
    # numbers from 24 on are of val and test; every second has a coco_id, every third a flickr_id
    kept = [n for n in range(48) if n < n_train or (n % 2 and n % 3)]
    found = items(corpus)
    assert sorted(found) == [n + 1 for n in kept] and len(kept) == 32
    assert note_with(corpus, "are left out").startswith("vg: 16 of 48 pictures are in val or test of coco or flickr30k")
    everything = drawn(*SPLITS)
    for number in kept:
        said = [phrase for phrase, _ in export.phrases(everything[number], SIZE)]
        assert found[number + 1].captions == tuple(dict.fromkeys(said))
        assert_shows(found[number + 1], everything[number])
    folders = {Path(item.image).parent.name for item in found.values()}
    assert folders == {"VG_100K", "VG_100K_2"}
    assert {split: len(part) for split, part in corpus.splits.items()} == {"train": 30, "val": 1, "test": 1}
    assert all(map(str.strip, corpora.texts(corpus)))


def test_vg_with_test_pictures(place):
    root = place("vg", "coco", "flickr30k") / "vg"
    corpus = corpora.load("vg", root, keep_test=True)
    assert sorted(items(corpus)) == list(range(1, 49))
    assert note_with(corpus, "--keep-test") == ("vg: 16 of 48 pictures are in val or test of coco or flickr30k and are "
                                                "kept (--keep-test).")  # fmt: skip
    shutil.rmtree(root.parent / "coco")
    shutil.rmtree(root.parent / "flickr30k")
    corpus = corpora.load("vg", root, keep_test=True)
    assert len(items(corpus)) == 48 and "nobody knows how many" in note_with(corpus, "--keep-test")
    assert note_with(corpus, "nobody")


def test_vg_needs_to_know_what_is_tested(place):
    root = place("vg") / "vg"
    for task in ("caption", "vqa"):
        with pytest.raises(UserError, match=f"put it into {root.parent}/coco, or take the risk with --keep-test"):
            corpora.load("vg", root, task=task)
    place("coco")
    corpus = corpora.load("vg", root)
    ids = set(items(corpus))
    assert ids == {n + 1 for n in range(48) if n < 24 or n % 2}
    assert f"without dataset_flickr30k.json in {root.parent}/flickr30k nobody knows" in note_with(corpus, "nobody")
    assert note_with(corpus, "left out").startswith("vg: 12 of 48 pictures are in val or test of coco and")
    place("flickr30k")  # the index is made anew, without being asked to
    corpus = corpora.load("vg", root)
    assert len(items(corpus)) == 32 and not [note for note in corpus.notes if "nobody" in note]
    edited(root.parent / "flickr30k" / "karpathy" / "dataset_flickr30k.json",
           lambda content: {"images": [{**record, "filename": int(record["filename"][:10])}
                                       for record in content["images"]]})  # fmt: skip
    assert len(items(corpora.load("vg", root))) == 32  # a file name that is a number passes for one
    edited(root.parent / "coco" / "karpathy" / "dataset_coco.json",
           lambda content: {"images": [{**record, "split": "val"} for record in content["images"]]})  # fmt: skip
    assert set(items(corpora.load("vg", root))) == {n + 1 for n in range(48) if n % 2 and (n < 24 or n % 3)}


def test_split_files_are_known_by_their_names(place):
    """caption_datasets.zip, unpacked as it is in each folder: the first by name is not the right one."""
    root = place("vg", "coco", "flickr30k") / "vg"
    for folder in ("coco", "flickr30k"):
        for name in ("coco", "flickr30k"):
            (root.parent / folder / f"dataset_{name}.json").write_bytes(
                (root.parent / name / "karpathy" / f"dataset_{name}.json").read_bytes()
            )
        shutil.rmtree(root.parent / folder / "karpathy")
        (root.parent / folder / "dataset_aaa.json").write_text("")
        (root.parent / folder / "annotations").mkdir(exist_ok=True)
        (root.parent / folder / "annotations" / "dataset_zzz.json").write_text("")
        if folder == "coco":
            (root.parent / "coco" / "karpathy").mkdir()
            shutil.copy(root.parent / "coco" / "dataset_coco.json", root.parent / "coco" / "karpathy")
    assert len(items(corpora.load("vg", root))) == 32


def test_vg_questions(place):
    root = place("vg", "coco", "flickr30k") / "vg"
    edited(root / "annotations" / "image_data.json", lambda content: content[:23] + content[24:])
    (root / "images" / "VG_100K_2" / "3.jpg").unlink()
    corpus = corpora.load("vg", root, task="vqa")
    kept = [n for n in range(48) if (n < 24 or (n % 2 and n % 3)) and n not in (2, 23)]
    everything, found = drawn(*SPLITS), {}
    for split, examples in corpus.splits.items():
        for example in examples:
            (image_id,) = example.image_ids
            found.setdefault(image_id, []).append((split, example))
    assert sorted(found) == [n + 1 for n in kept]
    for number in kept:
        asked = scenes.questions(everything[number])
        examples = [example for _, example in found[number + 1]]
        assert [example.text for example in examples] == [question.text for question in asked]
        assert {len(set(example.answers)) for example in examples} == {1} and len(examples[0].answers) == 10
        assert len({split for split, _ in found[number + 1]}) == 1  # a picture is in one split
        assert_shows(data.Item(0, examples[0].images[0], ()), everything[number])
    n = len(scenes.questions(everything[0]))
    assert note_with(corpus, "of val or test of coco or flickr30k").startswith(f"vg: {16 * n} questions")
    assert note_with(corpus, "image_data.json lacks").startswith(f"vg: {n} questions")
    assert note_with(corpus, "not there").startswith(f"vg: {n} questions")
    assert corpus.answers
    pictures = {split: len({e.image_ids for e in examples}) for split, examples in corpus.splits.items()}
    assert pictures == {"train": 28, "val": 1, "test": 1}
    kept = corpora.load("vg", root, task="vqa", keep_test=True)
    assert len({example.image_ids for split in kept.splits.values() for example in split}) == 46
    assert not [note for note in kept.notes if "val or test of" in note]


def check_conceptual(corpus, named):
    train, val = drawn("train"), drawn("val")
    assert [item.image_id for item in corpus.splits["train"]] == [row for row in range(1, 25) if row % 10]
    assert [item.image_id for item in corpus.splits["val"]] == [f"val-{row}" for row in range(1, 13)]
    for item in corpus.splits["train"]:
        assert item.captions == (scenes.captions(train[item.image_id - 1])[0],)
        assert_shows(item, train[item.image_id - 1])
    for row, item in enumerate(corpus.splits["val"]):
        assert item.captions == (scenes.captions(val[row])[0],)
        assert_shows(item, val[row])
    assert corpus.splits["train"][0].image.name == named
    assert note_with(corpus, "rows whose") == "cc3m train: 2 rows whose picture is not there are left out."


def test_cc3m(place):
    check_conceptual(corpora.load("cc3m", place("cc3m") / "cc3m"), "1.jpg")
    check_conceptual(corpora.load("cc3m", place("cc3m_json") / "cc3m_json"), "0000000")


def test_sbu(place):
    root = place("sbu") / "sbu"
    corpus = corpora.load("sbu", root)
    there = [row for row in range(1, 49) if row % 10]
    assert sorted(items(corpus)) == there
    assert "without dataset_flickr30k.json" in note_with(corpus, "nobody knows")
    place("flickr30k", "coco")
    corpus, everything = corpora.load("sbu", root), drawn(*SPLITS)
    found = items(corpus)
    assert sorted(found) == [row for row in there if row <= 24]  # coco's file says nothing about it
    for row, item in found.items():
        assert item.captions == (scenes.captions(everything[row - 1])[0],)
        assert_shows(item, everything[row - 1])
    left = len(there) - len(found)
    assert note_with(corpus, "val or test of").startswith(f"sbu: {left} of {len(there)} pictures are in val or test of")
    kept = corpora.load("sbu", root, keep_test=True)
    assert sorted(items(kept)) == there and f"{left} of" in note_with(kept, "--keep-test")
    assert not [note for note in corpus.notes + kept.notes if "coco" in note]
    edited(root / "sbu-captions-all.json",
           lambda content: {**content, "captions": ["half a character \ud83d", *content["captions"][1:]]})  # fmt: skip
    corpus = corpora.load("sbu", root)
    assert set(found) - set(items(corpus)) == {1} and "1 empty captions" in note_with(corpus, "empty")


def test_sbu_in_two_text_files(place):
    root = place("sbu", "flickr30k") / "sbu"
    as_json = {i: item.captions for i, item in items(corpora.load("sbu", root)).items()}
    content = json.loads((root / "sbu-captions-all.json").read_text("utf-8"))
    (root / "sbu-captions-all.json").unlink()
    urls, captions = (root / f"SBU_captioned_photo_dataset_{what}.txt" for what in ("urls", "captions"))
    content["captions"][2] = "a\rcarriage return\u2028 and a line separator"  # no line ends there
    content["captions"][-1] = ""
    urls.write_bytes("".join(url + "\n" for url in content["image_urls"]).encode())
    captions.write_bytes("".join(text + "\n" for text in content["captions"]).encode())
    corpus = corpora.load("sbu", root)
    found = {i: item.captions for i, item in items(corpus).items()}
    assert found == {**as_json, 3: ("a carriage return and a line separator",)}
    assert note_with(corpus, "empty captions") == "sbu all: 1 empty captions are left out."
    captions.write_bytes("".join(text + "\n" for text in content["captions"][:-1]).encode())
    with pytest.raises(UserError, match="captions.txt: 47 captions for 48 addresses in SBU_.*urls.txt.*fetch it anew"):
        corpora.load("sbu", root)
    captions.write_bytes(b"\xff\n" * 48)
    with pytest.raises(UserError, match="utf-8.*put the official files there"):
        corpora.load("sbu", root)
    captions.unlink()
    with pytest.raises(UserError, match="none of sbu-captions-all.json, .*urls.txt with .*captions.txt, annot.json"):
        corpora.load("sbu", root)


def test_sbu_as_a_list_says_that_test_pictures_are_kept(place):
    root = place("sbu", "flickr30k") / "sbu"
    content = json.loads((root / "sbu-captions-all.json").read_text("utf-8"))
    (root / "sbu-captions-all.json").unlink()
    rows = [[f"images/{row}.jpg", text] for row, text in enumerate(content["captions"], 1)]
    (root / "annot.json").write_text(json.dumps(rows))
    corpus = corpora.load("sbu", root)
    assert sorted(items(corpus)) == [row for row in range(1, 49) if row % 10]
    assert "flickr30k tests on cannot be told" in note_with(corpus, "kept")


@pytest.mark.parametrize("change", [
    lambda content: {**content, "captions": content["captions"][:-1]}, lambda content: {"captions": []},
    lambda content: {**content, "captions": [7] * 48}, lambda content: {**content, "image_urls": [None] * 48},
    lambda content: [content], lambda content: {"captions": "a", "image_urls": "a"},
])  # fmt: skip
def test_sbu_of_another_form(place, change):
    root = place("sbu") / "sbu"
    edited(root / "sbu-captions-all.json", change)
    with pytest.raises(UserError, match="sbu-captions-all.json.*(fetch it anew|official)"):
        corpora.load("sbu", root)


def test_parts_by_lot_are_the_same_each_time(place):
    root = place("cc3m_json") / "cc3m_json"
    (root / "train_annot.json").rename(root / "annot.json")
    for number in (9, 19):  # now none is missing
        shutil.copy(root / "images_train/0000/0000000", root / f"images_train/0000/{number:07d}")
    loaded = [corpora.load("sbu", root).splits for _ in range(2)]
    first, second = ({split: [item.image_id for item in part] for split, part in splits.items()} for splits in loaded)
    assert first == second and {split: len(ids) for split, ids in first.items()} == {"train": 22, "val": 1, "test": 1}
    assert sorted(sum(first.values(), [])) == list(range(1, 25))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that lie elsewhere, come and go


def test_pictures_may_be_linked_and_lie_deeper(place):
    root = place("vg", "coco", "flickr30k") / "vg"
    (root / "images" / "VG_100K").rename(root.parent / "elsewhere")
    (root / "images" / "VG_100K").symlink_to(root.parent / "elsewhere")
    assert len(items(corpora.load("vg", root))) == 32
    shutil.rmtree(root / "images")
    (root.parent / "elsewhere").rename(root / "VG_100K")
    (root / "VG_100K" / "below").mkdir()
    (root / "VG_100K" / "2.jpg").rename(root / "VG_100K" / "below" / "00002.jpeg")
    found = items(corpora.load("vg", root))
    assert found and not any(i % 2 for i in found) and found[2].image == root / "VG_100K" / "below" / "00002.jpeg"
    assert found[2].image.is_file()


def test_what_lies_beside_pictures_is_none(tmp_path):
    """img2dataset writes 000000007.txt and .json beside 000000007.jpg; high numbers would make a huge array."""
    folder = tmp_path / "images" / "00000"
    folder.mkdir(parents=True)
    names = ["000000007.jpg", "000000007.json", "000000007.txt", "8.txt", "9.tar.gz", "10.PNG", "x11.jpg", "12",
             "-1.jpg", "999999999.jpg", "99999999999.jpg", "٣.jpg", ".jpg", "0.jpg", "13.webp"]  # fmt: skip
    for name in names:
        (folder / name).write_text("")
    found = pretraining.NumberedPictures([tmp_path / "images"], tmp_path)
    assert len(found.kind_of) == 14
    assert {n: found.get(n) for n in range(-2, 20) if found.get(n)} == {
        0: "images/00000/0.jpg", 7: "images/00000/000000007.jpg", 10: "images/00000/10.PNG", 12: "images/00000/12",
        13: "images/00000/13.webp"}  # fmt: skip
    assert found.get(10**30) is None and found.get(999_999_999) is None


def test_pictures_that_come_later_are_noticed(place):
    root = place("cc3m_json") / "cc3m_json"
    assert len(corpora.load("cc3m", root).splits["train"]) == 22
    shutil.copy(root / "images_train/0000/0000000", root / "images_train/0000/0000009")
    corpus = corpora.load("cc3m", root)
    assert [item.image_id for item in corpus.splits["train"]] == [row for row in range(1, 25) if row != 20]
    root = place("cc3m") / "cc3m"
    assert len(corpora.load("cc3m", root).splits["train"]) == 22
    shutil.copy(root / "images_train/1.jpg", root / "images_train/10.jpg")
    assert len(corpora.load("cc3m", root).splits["train"]) == 23


@pytest.mark.parametrize("layout", ["cc3m", "cc3m_json", "sbu", "vg"])
def test_the_second_start_reads_no_annotation(place, layout, monkeypatch, capsys):
    root = place(layout, "coco", "flickr30k") / layout
    first = items(corpora.load(layout.split("_")[0], root))
    assert "indexed once" in capsys.readouterr().err

    def no_reading(*_):
        raise AssertionError

    for name in ("json_list", "tsv_rows", "sbu_rows", "held_out", "NumberedPictures"):
        monkeypatch.setattr(pretraining, name, no_reading)
    assert items(corpora.load(layout.split("_")[0], root)) == first
    assert "indexed" not in capsys.readouterr().err


def test_a_list_whose_pictures_lie_in_its_own_folder_is_indexed_once(tmp_path, capsys):
    for number in range(4):
        (tmp_path / f"{number}").write_text("")
    (tmp_path / "annot.json").write_text(json.dumps([["gone", "a"], ["./1", "b"], ["2", "c"]]))
    for _ in range(2):
        assert sorted(items(corpora.load("sbu", tmp_path))) == [2, 3]
    assert capsys.readouterr().err.count("indexed once") == 1


# ---------------------------------------------------------------------------------------------------------------------
# TSV


def write_tsv(root, lines, pictures=range(1, 10)):
    (root / "images_train").mkdir(parents=True, exist_ok=True)
    (root / "Train_GCC-training.tsv").write_bytes("".join(lines).encode())
    for row in pictures:
        Image.new("RGB", (8, 8)).save(root / "images_train" / f"{row}.jpg")


def said(corpus):
    return {item.image_id: item.captions[0] for item in corpus.splits["train"]}


def test_quotes(tmp_path):
    lines = ["one\tu1\n", '"two opens\tu2\n', 'three\tu3\n', 'four" closes\tu4\n', 'a 5" disk\tu5\n', '"six"\tu6\n']
    write_tsv(tmp_path, lines)
    with open(tmp_path / "Train_GCC-training.tsv", encoding="utf-8", newline="") as file:
        official = [row[0] for row in csv.reader(file, delimiter="\t", quotechar='"')]
    assert len(official) == 4
    corpus = corpora.load("cc3m", tmp_path)
    assert said(corpus) == {row: " ".join(text.split()) for row, text in enumerate(official, 1)}
    assert said(corpus)[2] == "two opens u2 three u3 four closes" and said(corpus)[4] == "six"
    by_line = corpora.load("cc3m", tmp_path, quotes="none")
    assert said(by_line) == {row: line.split("\t")[0] for row, line in enumerate(lines, 1)}
    assert said(corpora.load("cc3m", tmp_path)) == said(corpus)
    with pytest.raises(UserError, match="--quotes both: it is one of csv, none"):
        corpora.load("cc3m", tmp_path, quotes="both")


def test_rows_without_picture_or_caption_are_counted(tmp_path):
    lines = ["one  \u2028 two\tu1\n", " \tu2\n", "\tu3\n", "four\tu4\textra\n", "five\tu5\r\n", "six\tu6"]
    write_tsv(tmp_path, lines, pictures=(1, 2, 3, 4, 6, 7))
    corpus = corpora.load("cc3m", tmp_path)
    assert said(corpus) == {1: "one two", 4: "four", 6: "six"}
    assert note_with(corpus, "not there") == "cc3m train: 1 rows whose picture is not there are left out."
    assert note_with(corpus, "empty") == "cc3m train: 2 empty captions are left out."


@pytest.mark.parametrize("quotes", ["csv", "none"])
def test_a_line_that_is_cut_off(tmp_path, quotes):
    for cut in ("three", "\n"):
        write_tsv(tmp_path, ["one\tu1\n", "two\tu2\n", cut])
        with pytest.raises(UserError, match="Train_GCC-training.tsv:3: not caption<TAB>address: .*mend the line"):
            corpora.load("cc3m", tmp_path, quotes=quotes)
        assert [file.name for file in (tmp_path / "index").iterdir()] == ["cc3m-train.lock"]
    write_tsv(tmp_path, ["one\tu1\n"])
    assert said(corpora.load("cc3m", tmp_path, quotes=quotes)) == {1: "one"}


def test_tsv_of_another_form(tmp_path):
    write_tsv(tmp_path, [])
    with pytest.raises(UserError, match="has no caption whose picture is there .it is empty.; put the pictures below"):
        corpora.load("cc3m", tmp_path)
    write_tsv(tmp_path, ["one\tu\n"] * 20, pictures=())
    for file in (tmp_path / "images_train").iterdir():
        file.rename(file.with_stem(f"x{file.stem}"))
    with pytest.raises(UserError, match="has no caption whose picture is there .*'without': 20"):
        corpora.load("cc3m", tmp_path)
    (tmp_path / "Train_GCC-training.tsv").write_bytes(b"\xff\xfe\tu\n")
    with pytest.raises(UserError, match="cannot be read as a TSV file .*utf-8"):
        corpora.load("cc3m", tmp_path)
    shutil.rmtree(tmp_path / "images_train")
    with pytest.raises(UserError, match="cc3m: none of the folders images_train, .* put the pictures of Train_GCC"):
        corpora.load("cc3m", tmp_path)
    (tmp_path / "Train_GCC-training.tsv").unlink()
    with pytest.raises(UserError, match="neither Train_GCC-training.tsv nor train_annot.json nor a .tar"):
        corpora.load("cc3m", tmp_path)


def test_a_quote_that_is_never_closed(tmp_path, monkeypatch):
    write_tsv(tmp_path, ['"one\tu1\n', "x" * 2000 + "\tu2\n"])
    limit = csv.field_size_limit
    monkeypatch.setattr(csv, "field_size_limit", lambda _: limit(1000))
    before = limit()
    try:
        with pytest.raises(UserError, match="cannot be read as a TSV file .field larger"):
            corpora.load("cc3m", tmp_path)
    finally:
        limit(before)


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def test_a_list_of_files(tmp_path):
    (tmp_path / "images_train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images_train" / "1.jpg")
    listed = tmp_path / "train_annot.json"

    def load(*rows):
        listed.write_text(json.dumps(rows))
        return corpora.load("cc3m", tmp_path)

    row = ["images_train/1.jpg", " a  caption\n"]
    corpus = load(["images_train/2.jpg", "b"], row, ["images_train/1.jpg", " "], ["a\0b/1.jpg", "c"], ["gone/1", "d"],
                  ["images_train/1.jpg", "half \ud83d"], ["./images_train//1.jpg", "again"])  # fmt: skip
    assert said(corpus) == {2: "a caption", 7: "again"}
    assert corpus.splits["train"][1].image == tmp_path / "images_train" / "1.jpg"
    assert note_with(corpus, "not there").startswith("cc3m train: 3 rows")
    assert note_with(corpus, "empty").startswith("cc3m train: 2 empty")
    for wrong in (["images_train/1.jpg"], [1, "a"], ["a", None], "text", None, {"a": 1}, ["a", "b", "c"], []):
        with pytest.raises(UserError, match=r"train_annot.json\[1\]: \[file, caption\] is expected, not"):
            load(row, wrong)
    for outside in ("../x.jpg", "/etc/x.jpg", "images_train/../../x", "", " ", "."):
        with pytest.raises(UserError, match=r"train_annot.json\[1\]: "):
            load(row, [outside, "a"])
    with pytest.raises(UserError, match="has no caption whose picture is there"):
        load(["images_train/7.jpg", "a"])
    listed.write_text('[["images_train/1.jpg", "a"], [')
    with pytest.raises(UserError, match="element 1"):
        corpora.load("cc3m", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Visual Genome, other than it should be


def write_vg(root, described, images, pictures=(1, 2, 3)):
    (root / "images" / "VG_100K").mkdir(parents=True)
    for i in pictures:
        Image.new("RGB", (8, 8)).save(root / "images" / "VG_100K" / f"{i}.jpg")
    (root / "region_descriptions.json").write_text(json.dumps(described))
    (root / "image_data.json").write_text(json.dumps(images))
    return root


def regions(image_id, *phrases):
    return {"id": image_id, "regions": [{"phrase": phrase} for phrase in phrases]}


def test_vg_counts_what_it_leaves_out(tmp_path):
    described = [regions(1, "a  dog\n", "", "a dog", " ", "a cat"), regions(2, "", " "), regions(3),
                 regions(4, "x", "y", ""), regions(5, "z"), regions(6, "y", "")]  # fmt: skip
    images = [{"image_id": i, "coco_id": None, "flickr_id": None} for i in (1, 2, 3, 5, 6)]
    corpus = corpora.load("vg", write_vg(tmp_path, described, images, (1, 2, 3, 4, 6)), keep_test=True)
    assert [(item.image_id, item.captions) for item in corpus.splits["train"]] == [(1, ("a dog", "a cat")), (6, ("y",))]
    assert "vg: 5 empty phrases are left out." in corpus.notes
    assert "vg: 3 phrases about pictures that image_data.json lacks are left out." in corpus.notes
    assert "vg: 1 pictures that are not there are left out." in corpus.notes
    assert "vg: 2 pictures without a phrase are left out." in corpus.notes


@pytest.mark.parametrize("described, images, said", [
    ([{"id": "1", "regions": []}], [], r"descriptions.json\[0\]: `id` must be a whole number, but it is '1'"),
    ([{"id": 1}], [], r"descriptions.json\[0\]: `regions` must be a list, but it is missing"),
    ([{"id": 1, "regions": [{}]}], [], r"`phrase` must be a text, but it is missing"),
    ([{"id": 1, "regions": [None]}], [], "an object with phrase is expected, not None"),
    ({}, [], "region_descriptions.json cannot be read as JSON .it does not begin with a list"),
    ([], [7], r"image_data.json\[0\]: an object with image_id is expected, not 7"),
    ([], [{"image_id": 1, "coco_id": "12"}], r"image_data.json\[0\]: `coco_id` must be a whole number, but it is '12'"),
    ([], [{"image_id": 1, "coco_id": None, "flickr_id": [1]}], "`flickr_id` must be a whole number"),
    ([], [{"image_id": 1}], r"image_data.json\[0\]: no `coco_id`, which tells"),
    ([], [{"image_id": 1, "coco_id": None}], r"has no caption whose picture is there .it is empty.; put the pictures"),
])  # fmt: skip
def test_vg_of_another_form(tmp_path, described, images, said):
    root = write_vg(tmp_path, described, images)
    with pytest.raises(UserError, match=said):
        corpora.load("vg", root, keep_test=True)


def test_vg_that_is_cut_off_leaves_no_index(place):
    root = place("vg", "coco") / "vg"
    file = root / "annotations" / "region_descriptions.json"
    text = file.read_bytes()
    file.write_bytes(text[: len(text) // 2])
    with pytest.raises(UserError, match="region_descriptions.json cannot be read as JSON .*is it cut off"):
        corpora.load("vg", root)
    assert [left.name for left in (root / "index").iterdir()] == ["vg.lock"]
    file.write_bytes(text)
    assert len(items(corpora.load("vg", root))) == 36


def test_vg_without_its_files(place):
    root = place("vg", "coco") / "vg"
    for task in ("caption", "vqa"):
        (root / "images").rename(root / "elsewhere")
        with pytest.raises(UserError, match="no picture of Visual Genome in images/VG_100K or images/VG_100K_2 of"):
            corpora.load("vg", root, task=task)
        (root / "elsewhere").rename(root / "images")
    for name in ("region_descriptions.json", "image_data.json"):
        (root / "annotations" / name).rename(root / "away")
        with pytest.raises(UserError, match=f"vg: no {name} in .* or its annotations/; put it there"):
            corpora.load("vg", root)
        (root / "away").rename(root / name)  # it may also lie here
    assert len(items(corpora.load("vg", root))) == 36
    (root / "annotations" / "question_answers.json").unlink()
    with pytest.raises(UserError, match="vg: no question_answers.json"):
        corpora.load("vg", root, task="vqa")
    with pytest.raises(UserError, match="the folder .* does not exist"):
        corpora.load("vg", root / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Damage at random

ODD = [b"\0", b"\xff", b'"', b"[", b"]", b"{", b"}", b",", b":", b"\t", b"\n", b"\r", b"1e999", b"-", b"null",
       b"\\ud83d", b"[[[", b"99999999999999999999", b"../", b"\xe2\x80\xa8", b"true", b"[]", b"\\u0000"]  # fmt: skip
ANNOTATIONS = {
    "vg": ["vg/annotations/region_descriptions.json", "vg/annotations/image_data.json",
           "coco/karpathy/dataset_coco.json", "flickr30k/karpathy/dataset_flickr30k.json"],
    "vg questions": ["vg/annotations/question_answers.json", "vg/annotations/image_data.json"],
    "cc3m": ["cc3m/Train_GCC-training.tsv", "cc3m/Validation_GCC-1.1.0-Validation.tsv"],
    "cc3m_json": ["cc3m_json/train_annot.json", "cc3m_json/val_annot.json"],
    "sbu": ["sbu/sbu-captions-all.json", "flickr30k/karpathy/dataset_flickr30k.json"],
}  # fmt: skip


def damaged(text, rng):
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        until = min(len(text), at + rng.choice([0, 0, 1, 5, 1000]))
        text = text[:at] + rng.choice([b"", *ODD]) + text[until:]
    return text if rng.random() < 0.8 else text[: rng.randrange(len(text) + 1)]


def replaced(text, rng):
    """Still JSON, with one value of another type."""
    found = json.loads(text)
    parents, stack = [], [found]
    while stack:
        value = stack.pop()
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        parents += [value] if inside else []
        stack += inside
    value = rng.choice(parents)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = rng.choice([None, True, -1, 10**25, 1.5, "", "\ud83d", "a\0b", [], [[]], {}, {"a": []}, "9" * 5000])
    return json.dumps(found).encode()


@pytest.mark.parametrize("what", ANNOTATIONS)
def test_damage_gives_a_corpus_or_a_user_error(place, what, capsys):
    name = what.split()[0]
    folder = place(*{file.split("/")[0] for file in sum(ANNOTATIONS.values(), []) if file.startswith(name + "/")},
                   *(["coco", "flickr30k"] if name in ("vg", "sbu") else []))  # fmt: skip
    rng, ends = random.Random(what), {"read": 0, "said": 0}
    for turn in range(60):
        file = folder / rng.choice(ANNOTATIONS[what])
        whole = file.read_bytes()
        as_json = file.suffix == ".json" and turn % 2
        file.write_bytes((replaced if as_json else damaged)(whole, rng))
        try:
            options = {"task": "vqa"} if "questions" in what else {"quotes": rng.choice(["csv", "none"])}
            corpus = corpora.load(name.split("_")[0], folder / name, **options)
            for split in corpus.splits.values():
                for item in split:
                    assert getattr(item, "captions", None) or item.text
            ends["read"] += 1
        except UserError as error:
            assert str(error)
            ends["said"] += 1
        finally:
            file.write_bytes(whole)
    assert min(ends.values()) > 5, ends


@pytest.mark.parametrize("name, file", [("cc3m", "Train_GCC-training.tsv"), ("sbu", "sbu-captions-all.json")])
def test_shards_beside_the_list_that_they_were_made_from(name, file, place, tmp_path):
    """img2dataset leaves its tars where the list lies: without a folder of pictures, they are the data set."""
    root = place(name) / name
    shutil.rmtree(next(root / folder for folder in ("images_train", "images") if (root / folder).is_dir()))
    with tarfile.open(root / "00000.tar", "w") as tar:
        for ending, content in (("jpg", b"bytes"), ("txt", b"a dog")):
            member = tarfile.TarInfo(f"000000000.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert (root / file).is_file()
    corpus = corpora.load(name, root)
    assert corpus.name == name and [item.captions for item in corpus.splits["train"]] == [("a dog",)]
    (root / "images_train").mkdir()  # and with one, the list counts again
    with pytest.raises(UserError, match="no caption whose picture is there"):
        corpora.load(name, root)
