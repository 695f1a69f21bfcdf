"""tools/dictionary.py: what the codes of SOHO's visual dictionary stand for."""

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import papers
import pytest
import torch
from PIL import Image
from test_benchmarks import write

import common
import corpora
import data
import soho
from common import UserError
from tools import dictionary

SMALL = dict(width=64, heads=1, mlp=32, layers=1, cnn_width=4, codes=16, depth=10, vocab_size=50, positions=20)
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("dictionary") / "run"
    papers.run("soho", *papers.toy("soho"), "--out", path, "--steps", 2, "--val-items", 4, "--test-scenes", 9)
    return path


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    dictionary.main([str(run), "--out", str(out), "--codes", "5", "--pictures", "9"])
    return out


class Colours(torch.nn.Module):
    """A stand-in for SOHO: the code of a cell is the strongest colour in its middle, its distance the lack of it."""

    def __init__(self, strides="2,1,1,2,2,1"):
        super().__init__()
        self.cfg, self.tokenizer = soho.Config(strides=strides, short_side=64, long_side=160, codes=3, width=3), None
        self.dictionary = soho.Dictionary(self.cfg)
        self.dictionary.embed.copy_(torch.eye(3))
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def see(self, images, sizes):
        h, w = soho.grid(images.shape[2:], self.cfg)
        step = 2 * math.prod(map(int, self.cfg.strides.split(",")))
        std, mean = (torch.tensor(x).view(3, 1, 1) for x in (soho.STD, soho.MEAN))
        v = ((images * std + mean) / 255)[:, :, step // 2 :: step, step // 2 :: step][:, :, :h, :w]
        return {"v": v, "codes": v.argmax(1), "keep_mask": soho.valid_cells(sizes, images.shape[2:], (h, w))}


def picture_of(rows, side=16):
    """Colours of the cells, as a PIL picture with `side` pixels a cell."""
    return Image.fromarray(np.array(rows, dtype=np.uint8).repeat(side, 0).repeat(side, 1))


def seen(model, pictures, captions=None):
    """Pictures of PIL -> their samples and cells."""
    items = [data.Item(i, picture, captions[i] if captions else ()) for i, picture in enumerate(pictures)]
    samples = soho.samples_of(model.cfg, model, None, items)
    return samples, dictionary.look(model, data.eval_loader(samples, 1))


def cells_of(*rows):
    """(picture, code, distance) each."""
    picture, code, distance = zip(*rows, strict=True)
    nowhere = torch.zeros(len(rows), dtype=torch.long)
    return dictionary.Cells(torch.tensor(picture), nowhere, nowhere, torch.tensor(code), torch.tensor(distance))


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def test_the_files_are_written(made, run):
    assert {path.name for path in made.iterdir()} == {"dictionary.png", "dictionary.html", "codes.png"}
    assert Image.open(made / "dictionary.png").width > 500 and Image.open(made / "codes.png").width > 500
    page = (made / "dictionary.html").read_text("utf-8")
    pictures = re.findall(r'src="([^"]*)"', page)
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)  # nothing from a network
    assert not re.search("https?:", page)
    for source in pictures:
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).load()
    n_codes = int(re.search(r"(\d+) used", page)[1])
    assert page.count("<tr>") == 1 + n_codes and len(pictures) == 6 + n_codes


def test_without_out_the_files_go_to_the_run_directory(run, capsys):
    (run / "dictionary.png").unlink(missing_ok=True)
    dictionary.main([str(run / "best"), "--pictures", "3", "--split", "val", "--picture", "test:3"])
    printed = capsys.readouterr().out
    assert "of 3 pictures (scenes, val)" in printed and "16 codes, " in printed
    assert (run / "dictionary.png").is_file() and (run / "codes.png").is_file()


def test_shares_of_the_page_are_those_of_the_valid_cells(run):
    model = dictionary.load(str(run), "cpu")
    corpus = soho.load_data(model.cfg)
    samples = soho.samples_of(model.cfg, model, corpus, dictionary.distinct_pictures(corpus.splits["test"], 5))
    cells = dictionary.look(model, data.eval_loader(samples, 1))
    rows = dictionary.describe(model, samples, cells)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert [row.share for row in rows] == sorted((row.share for row in rows), reverse=True)
    batch = data.pad_pixels([sample["pixels"] for sample in samples], 32)  # of one shape: as one by one
    with torch.no_grad():
        found = model.see(soho.normalise(batch["pixels"], batch["sizes"]), batch["sizes"])
    counts = found["codes"][found["keep_mask"]].bincount(minlength=16)
    for row in rows:
        assert row.share == pytest.approx(counts[row.code].item() / counts.sum().item())
        assert row.pictures == (found["codes"] == row.code).flatten(1).any(1).sum()
    p = counts[counts > 0] / counts.sum()
    assert f"perplexity {torch.special.entr(p).sum().exp():.1f}" in dictionary.summary(rows, model.dictionary.embed)


def test_looking_does_not_move_the_dictionary(run):
    model = dictionary.load(str(run), "cpu").train()  # whatever mode it comes in
    before = {name: x.clone() for name, x in model.state_dict().items()}
    dictionary.look(model, [model._look("test:0"), model._look("test:1")])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_zero_codes_are_told(run):
    model = dictionary.load(str(run), "cpu")
    model.dictionary.embed[:3], model.dictionary.embed[3:] = 9, 0
    samples = soho.samples_of(model.cfg, model, None, [data.Item(0, Image.new("RGB", (40, 32)), ())])
    rows = dictionary.describe(model, samples, dictionary.look(model, data.eval_loader(samples, 1)))
    assert f"16 codes, {len(rows)} used, {16 - len(rows)} unused, 13 zero vectors" in dictionary.summary(
        rows, model.dictionary.embed)  # fmt: skip
    assert all(row.is_zero == (row.code >= 3) and row.words == [] for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# Where a cell lies


def test_patches_come_from_the_pixels_of_their_cells():
    model = Colours()
    model.cfg.short_side = 48
    samples, cells = seen(model, [picture_of([[RED, GREEN, RED], [BLUE, RED, RED], [RED] * 3, [RED, RED, GREEN]])])
    assert cells.step == 16 and len(cells.code) == 12
    patches = dictionary.cut_patches(samples, cells)
    assert {code: len(some) for code, some in patches.items()} == {0: 8, 1: 2, 2: 1}
    middle = dictionary.SIDE // 2
    for code, colour in enumerate((RED, GREEN, BLUE)):
        for cut in patches[code]:
            assert cut.size == (dictionary.SIDE,) * 2
            for x, y in ((0, 0), (-9, -9), (9, 9), (-9, 9)):  # inside the frame
                assert cut.getpixel((middle + x, middle + y)) == colour
    (blue,) = patches[2]  # at the left edge, below red and beside it
    assert blue.getpixel((4, middle)) == dictionary.PAPER
    assert blue.getpixel((middle, 4)) == RED and blue.getpixel((-4, middle)) == RED


def test_the_map_of_a_picture_that_is_not_square():
    rows = [[RED, GREEN, BLUE, RED, GREEN], [GREEN, GREEN, RED, BLUE, BLUE]]
    model = Colours()
    model.cfg.short_side = 32
    for colours in (rows, [list(column) for column in zip(*rows, strict=True)]):  # wide, then high
        samples, cells = seen(model, [picture_of(colours)])
        h, w = len(colours), len(colours[0])
        drawn = dictionary.draw_map(samples[0]["pixels"], cells, 100)
        scale = 100 / max(h, w)
        assert drawn.size == (2 * round(w * scale) + 8, round(h * scale))
        for r in range(h):
            for c in range(w):
                x, y = (c + 0.15) * scale, (r + 0.15) * scale  # beside the number
                code = (RED, GREEN, BLUE).index(colours[r][c])
                assert drawn.getpixel((round(w * scale + 8 + x), round(y))) == dictionary.colour_of(code)
                shown = np.array(drawn.getpixel((round(x), round(y))))
                assert np.abs(shown - np.array(colours[r][c])).max() < 40  # the picture itself stands on the left


def test_padded_cells_are_left_out():
    model = Colours()
    model.cfg.short_side, model.cfg.long_side = 40, 1000  # 40 x 80 pixels in a batch of 64 x 96: 3 x 5 of 4 x 6 cells
    samples, cells = seen(model, [Image.new("RGB", (80, 40), BLUE)])
    assert samples[0]["pixels"].shape == (3, 40, 80)
    assert sorted(zip(cells.row.tolist(), cells.column.tolist(), strict=True)) == [
        (row, column) for row in range(3) for column in range(5)]  # fmt: skip
    drawn = dictionary.draw_map(samples[0]["pixels"], cells, 80)
    assert drawn.size == (2 * 80 + 8, 40)
    assert dictionary.PAPER != drawn.getpixel((88 + 78, 38))  # a cell that the picture's end cuts is drawn, too


def test_a_cell_lies_where_the_network_looks():
    """Of 608 pixels 64 a cell give 9 rows, and 32 are left over: rows of 608 / 9 pixels would lie too low."""
    torch.manual_seed(0)
    model = soho.SOHO(soho.Config(**SMALL)).eval()
    pixels = torch.randn(1, 3, 608, 64, requires_grad=True)
    cells = dictionary.look(model, [{"pixels": torch.zeros(1, 3, 608, 64, dtype=torch.uint8),
                                     "sizes": torch.tensor([[608, 64]])}])  # fmt: skip
    assert cells.row.tolist() == list(range(9))
    for row in (4, 8):
        v = model.see(pixels, torch.tensor([[608, 64]]))["v"]
        (gradient,) = torch.autograd.grad((v[0, :, row] * torch.randn(64, 1)).sum(), pixels)
        share = gradient.square().sum((0, 1, 3)) / gradient.square().sum()
        _, top, _, bottom = dictionary.box_of(row, 0, cells.step)
        assert top < (share * torch.arange(608)).sum() < bottom


# ---------------------------------------------------------------------------------------------------------------------
# Choosing and counting


def test_the_nearest_cells_of_different_pictures_come_first():
    cells = cells_of((0, 7, 5.0), (0, 7, 1.0), (1, 7, 3.0), (2, 5, 0.0), (1, 7, 2.0), (2, 7, 9.0), (0, 7, 4.0))
    assert dictionary.best_cells(cells, 7, 2) == [1, 4]
    assert dictionary.best_cells(cells, 7, 5) == [1, 4, 5, 2, 6]  # then the others, nearest first
    assert dictionary.best_cells(cells, 5, 3) == [3]


def test_words_that_go_with_a_code():
    """Of 40 pictures 20 have code 1; `a` is everywhere, `red` goes with the code, `blue` with the others."""
    texts = [("A red dog.", "a dog") if i < 18 else ("a blue cat",) for i in range(40)]
    cells = cells_of(*((i, 0, 0.0) for i in range(40)), *((i, 1, 0.0) for i in range(20)), (39, 2, 0.0))
    words = dictionary.words_of_codes(cells, texts)
    assert words == {0: [], 1: ["dog", "red"], 2: []}
    # red: with the code 18, the code alone 2, the word alone 0, neither 20
    a, b, c, d = 18.5, 2.5, 0.5, 20.5
    z = math.log(a * d / (b * c)) / math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
    assert z > 3
    assert dictionary.words_of_codes(cells, texts, least=19)[1] == []
    assert dictionary.words_of_codes(cells, texts, most=1)[1] == ["dog"]


def test_the_surest_word_comes_first_and_pictures_without_texts_do_not_count():
    said = [("sun sky",)] * 15 + [("sky",)] * 5 + [("rain",)] * 20
    cells = cells_of(*((i, 4, 0.0) for i in range(20)), *((i, 4, 0.0) for i in range(40, 90)))
    assert dictionary.words_of_codes(cells, said + [()] * 50) == {4: ["sky", "sun"]}
    assert dictionary.words_of_codes(cells, [()] * 90) == {}


def test_a_picture_counts_once_however_many_questions_are_about_it(tmp_path):
    corpus = corpora.load("vqa", write(tmp_path, "vqa"))
    examples = list(corpus.splits["train"])
    found = dictionary.distinct_pictures(examples * 2, 100)
    ids = {example.image_ids[0] for example in examples}
    assert {item.image_id for item in found} == ids and len(found) == len(ids)
    for item in found:
        assert set(item.captions) == {e.text for e in examples if e.image_ids[0] == item.image_id}
    assert len(dictionary.distinct_pictures(examples, 1)) == 1


def test_both_pictures_of_a_pair_are_looked_at():
    pairs = corpora.load_scenes(n_train=4, n_val=4, n_test=8, task="nlvr2").splits["test"]
    found = dictionary.distinct_pictures(pairs, 5)
    assert len(found) == 5
    assert [item.image for item in found[:2]] == list(pairs[0].images)


# ---------------------------------------------------------------------------------------------------------------------
# Other models, errors


def official_file(path: Path, **more) -> soho.SOHO:
    """A random model's weights under the authors' names."""
    model = soho.SOHO(soho.Config(**{**SMALL, **more}))
    ours = model.state_dict()
    state = {name: part.clone() for mine, theirs in soho.official_names(model).items()
             for name, part in zip(theirs, ours[mine].chunk(len(theirs)), strict=True)}  # fmt: skip
    torch.save({"state_dict": {f"module.{name}": x for name, x in state.items()}}, path)
    return model


def test_the_authors_weights(tmp_path, capsys):
    model = official_file(tmp_path / "soho.pth")
    loaded = dictionary.load(str(tmp_path / "soho.pth"), "cpu", data="scenes")
    assert torch.equal(loaded.dictionary.embed, model.dictionary.embed) and loaded.cfg.square_mask
    pictures = []
    for i, size in enumerate([(90, 60), (60, 90)]):
        Image.new("RGB", size, RED).save(tmp_path / f"{i}.jpg")
        pictures.append({"image": f"{i}.jpg", "caption": "something red", "split": "test"})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, pictures)))
    dictionary.main([str(tmp_path / "soho.pth"), "--data", str(tmp_path / "own.jsonl"), "--device", "cpu",
                     "--picture", str(tmp_path / "1.jpg")])  # fmt: skip
    assert "of 2 pictures (own, test)" in capsys.readouterr().out
    assert (tmp_path / "codes.png").is_file()  # beside the file


def test_what_has_no_dictionary_is_refused(tmp_path, run):
    official_file(tmp_path / "vqa.pth", vd_mode="none", task="vqa")
    with pytest.raises(UserError, match="has no dictionary"):
        dictionary.main([str(tmp_path / "vqa.pth")])
    values = common.read_json(run / "config.json")
    model = soho.SOHO(common.config_from(soho.Config, {**values, "vd_mode": "none"}), soho.SOHO.from_run(run).tokenizer)
    other = common.Run(tmp_path / "none")
    (other.path / "step_1").mkdir(parents=True)
    common.write_json(other.path / "config.json", {**values, "vd_mode": "none", "init": "runs/first"})
    model.tokenizer.save(other.path / "step_1")
    from safetensors.torch import save_file

    save_file(model.state_dict(), other.path / "step_1" / "model.safetensors")
    with pytest.raises(UserError, match=r"vd-mode none\): take the pre-trained run that it began with \(runs/first\)"):
        dictionary.main([str(other.path)])


@pytest.mark.parametrize(("flags", "message"), [
    (["--split", "tst"], "did you mean test"), (["--pictures", "0"], "--pictures 0: give 1 or more"),
    (["--codes", "0"], "--codes 0: give 1 or more"), (["--picture", "nowhere.jpg"], "nowhere.jpg: no such file"),
    (["--data", "cocoo"], "did you mean coco")])  # fmt: skip
def test_what_cannot_be_is_said(run, tmp_path, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dictionary.main([str(run), "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        dictionary.main([str(tmp_path)])
