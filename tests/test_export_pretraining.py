"""What tools/export.py writes of Visual Genome, CC3M and SBU is what the small world says, file by file.

No loader is asked: annotations are read as JSON and CSV, and pictures are compared with drawings of their scenes. The
full world is exported, whose panels make some sentences neither true nor false, and whose test scenes must be told from
those of train by the ids that other exports give them.
"""

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from papers import ROOT
from PIL import Image

import corpora
import scenes
from tools import export

SIZE = 32
COUNTS = dict(train=23, val=12, test=11)  # several tenth rows of train; val has one too, whose picture is there
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """layout, regions -> the folder of its export, made once."""
    done = {}

    def make(layout, regions=""):
        if (layout, regions) not in done:
            folder = tmp_path_factory.mktemp("made") / layout
            done[layout, regions] = export.export(layout, folder, "full", **COUNTS, size=SIZE, seed=3, regions=regions)
        return done[layout, regions]

    return make


def drawn(*splits):
    """The scenes of these splits, one after another, made without the export."""
    return [scene for split in splits for scene in scenes.Scenes("full", split, COUNTS[split], seed=3)]


def content(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


def table(folder, name):
    with open(folder / name, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t", quotechar='"'))


def difference(file, scene):
    """Mean absolute difference of a JPEG file, whatever its name, from the drawing of a scene, in 0..255."""
    with Image.open(file) as picture:
        assert picture.format == "JPEG" and picture.size == (SIZE, SIZE)
        assert [part[1:3] for part in picture.layer] == [(1, 1)] * 3  # no subsampling
        found = np.asarray(picture.convert("RGB")).astype(int)
    return np.abs(found - np.asarray(scenes.render(scene, SIZE)).astype(int)).mean()


def check_pictures(root, expected):
    """The files of the folders are exactly the expected ones, {name: scene}, and each shows its scene."""
    folders = {name.split("/")[0] for name in expected}
    found = {str(file.relative_to(root)) for top in folders for file in (root / top).rglob("*") if file.is_file()}
    assert found == set(expected)
    assert max(difference(root / name, scene) for name, scene in expected.items()) < 4
    names = list(expected)  # that the bound tells scenes apart
    assert min(difference(root / a, expected[b]) for a, b in zip(names, names[1:], strict=False)) > 4


def assert_caption(caption, scene):
    """The first of the scene's, true, in the form of CC: lower case, one blank between tokens."""
    assert caption == scenes.captions(scene)[0] and scenes.is_true(caption, scene) is scenes.Truth.TRUE
    assert caption == " ".join(caption.lower().split()) and re.fullmatch("[a-z ]+", caption)


def is_integer(value):
    return type(value) is int  # no bool, no float


# Visual Genome


def test_vg_pictures(made):
    root, said = made("vg"), drawn(*SPLITS)
    assert {file.name for file in root.iterdir()} == {"images", "annotations"}
    check_pictures(root, {f"images/VG_100K{'_2' if i % 2 else ''}/{i}.jpg": scene for i, scene in enumerate(said, 1)})


def test_vg_image_data(made):
    """Of what is in coco and flickr30k the ids are those which their exports give the very same scene."""
    root, said = made("vg"), drawn(*SPLITS)
    images = content(root, "annotations/image_data.json")
    assert [record["image_id"] for record in images] == list(range(1, len(said) + 1))
    assert {tuple(record) for record in images} == {("image_id", "url", "width", "height", "coco_id", "flickr_id")}
    assert all(is_integer(value) or value is None or key == "url" for r in images for key, value in r.items())
    assert {(record["width"], record["height"]) for record in images} == {(SIZE, SIZE)}
    assert all((root / "images" / record["url"].removeprefix("https://example.org/")).is_file() for record in images)

    in_coco = content(made("coco"), "karpathy/dataset_coco.json")["images"]
    in_flickr = content(made("flickr30k"), "karpathy/dataset_flickr30k.json")["images"]
    for number, (record, scene, ours, theirs) in enumerate(zip(images, said, in_coco, in_flickr, strict=True)):
        assert record["coco_id"] == (None if number % 2 else ours["cocoid"])
        assert record["flickr_id"] == (None if number % 3 else int(theirs["filename"].removesuffix(".jpg")))
        told = [sentence["raw"] for sentence in ours["sentences"]]
        assert told == [sentence["raw"] for sentence in theirs["sentences"]] == scenes.captions(scene)
    for key, files in (("coco_id", in_coco), ("flickr_id", in_flickr)):  # a leak of either, from val and from test
        leaks = {file["split"] for file, record in zip(files, images, strict=True) if record[key] is not None}
        assert leaks >= set(SPLITS), key


def test_vg_region_descriptions(made):
    said, outside = drawn(*SPLITS), SIZE + 1
    described = content(made("vg"), "annotations/region_descriptions.json")
    assert [record["id"] for record in described] == list(range(1, len(said) + 1))
    rows = [row for record in described for row in record["regions"]]
    assert [row["region_id"] for row in rows] == list(range(1, len(rows) + 1))
    assert {tuple(row) for row in rows} == {("region_id", "image_id", "phrase", "x", "y", "width", "height")}
    assert all(is_integer(value) for row in rows for key, value in row.items() if key != "phrase")
    assert all(0 <= row[corner] < row[corner] + row[side] < outside
               for row in rows for corner, side in (("x", "width"), ("y", "height")))  # fmt: skip
    for record, scene in zip(described, said, strict=True):
        assert set(record) == {"id", "regions"}
        assert {row["image_id"] for row in record["regions"]} == {record["id"]}
        phrases = [row["phrase"] for row in record["regions"]]
        assert all(scenes.is_true(phrase, scene) is scenes.Truth.TRUE for phrase in phrases)
        whole, of_objects = phrases[: -len(scene.objects)], record["regions"][-len(scene.objects) :]
        assert whole == scenes.captions(scene, 8) and len(whole) >= 5
        assert all([row[key] for key in ("x", "y", "width", "height")] == [0, 0, SIZE, SIZE]
                   for row in record["regions"][: -len(scene.objects)])  # fmt: skip
        boxes = scenes.regions(scene, SIZE)["boxes"]  # the panel's, if any, comes last
        for row, o, box in zip(of_objects, scene.objects, boxes, strict=False):
            statement = scenes.parse(row["phrase"])
            assert isinstance(statement, scenes.Exists) and scenes.matches(statement.np, o)  # of it, not of another
            assert re.match("an? ", row["phrase"]) and len(row["phrase"].split()) <= 6  # no sentence
            x1, y1, x2, y2 = row["x"], row["y"], row["x"] + row["width"], row["y"] + row["height"]
            slack = np.array([box[0] - x1, box[1] - y1, x2 - box[2], y2 - box[3]])
            assert (slack > -1e-4).all() and (slack < 1 + 1e-4).all()  # around the object, to the next pixel
    first = [scenes.parse(record["regions"][-len(scene.objects)]["phrase"]).np
             for record, scene in zip(described, said, strict=True) if scene.objects[0].fill == "solid"]  # fmt: skip
    assert {phrase.size is None for phrase in first} == {True, False}  # words are drawn anew for each scene
    assert content(made("vg", "npz"), "annotations/region_descriptions.json") == described  # and are always the same


def test_vg_question_answers(made):
    said = drawn(*SPLITS)
    asked = content(made("vg"), "annotations/question_answers.json")
    assert [record["id"] for record in asked] == list(range(1, len(said) + 1))
    rows = [row for record in asked for row in record["qas"]]
    assert [row["qa_id"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > 3 * len(said)
    assert {tuple(row) for row in rows} == {("qa_id", "image_id", "question", "answer", "a_objects", "q_objects")}
    assert all(row["a_objects"] == row["q_objects"] == [] for row in rows)
    for record, scene in zip(asked, said, strict=True):
        assert set(record) == {"id", "qas"} and {row["image_id"] for row in record["qas"]} == {record["id"]}
        assert all(row["answer"] == scenes.answer(row["question"], scene) for row in record["qas"])
        assert [row["question"] for row in record["qas"]] == [question.text for question in scenes.questions(scene)]
    assert {"yes", "no"} < {row["answer"] for row in rows}


# Conceptual Captions

CC3M = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}


def alive(split):
    """(number from 0, scene) of a split of CC3M whose picture is there."""
    return [(i, scene) for i, scene in enumerate(drawn(split)) if split == "val" or i not in (9, 19)]


def test_cc3m(made):
    root = made("cc3m")
    assert {file.name for file in root.iterdir()} == {*CC3M.values(), "images_train", "images_val"}
    for split, name in CC3M.items():
        rows, said = table(root, name), drawn(split)
        assert len(rows) == len(said) and {len(row) for row in rows} == {2}
        for i, ((caption, url), scene) in enumerate(zip(rows, said, strict=True), 1):
            assert_caption(caption, scene)
            assert url == f"https://example.org/images_{split}/{i}.jpg"
        assert (root / name).read_bytes() == "".join(f"{caption}\t{url}\n" for caption, url in rows).encode()
        check_pictures(root, {f"images_{split}/{i + 1}.jpg": scene for i, scene in alive(split)})


def test_a_caption_with_quotation_marks_or_a_tab_comes_back(tmp_path, monkeypatch):
    odd = 'a "red"\tdisc'
    monkeypatch.setattr(scenes, "captions", lambda scene, k=5: [odd] * k)
    root = export.export("cc3m", tmp_path / "odd", train=2, val=1, test=1, size=8)
    assert [row[0] for row in table(root, CC3M["train"])] == [odd, odd]
    assert (root / CC3M["train"]).read_text().startswith('"a ""red""\tdisc"\t')


def test_cc3m_json(made):
    root = made("cc3m_json")
    assert {file.name for file in root.iterdir()} == {f"{split}_annot.json" for split in CC3M} | {
        "images_train", "images_val"}  # fmt: skip
    for split in CC3M:
        rows, said = content(root, f"{split}_annot.json"), drawn(split)
        assert [file for file, _ in rows] == [f"images_{split}/0000/00000{i:02d}" for i in range(len(said))]
        for (_, caption), scene in zip(rows, said, strict=True):
            assert_caption(caption, scene)
        check_pictures(root, {rows[i][0]: scene for i, scene in alive(split)})
    assert content(root, "train_annot.json")[9][0] == "images_train/0000/0000009"  # its picture is missing


def test_folders_of_cc3m_json_are_the_first_four_digits(tmp_path, monkeypatch):
    """As in the data set: 1,000 files a folder. Drawing nothing, so that so many rows take no time."""
    monkeypatch.setattr(export.Folder, "picture", lambda self, name, image: None)
    root = export.export("cc3m_json", tmp_path / "many", train=1012, val=1, test=1, size=8)
    rows = content(root, "train_annot.json")
    assert [rows[i][0] for i in (0, 123, 999, 1000, 1011)] == [
        "images_train/0000/0000000", "images_train/0000/0000123", "images_train/0000/0000999",
        "images_train/0001/0001000", "images_train/0001/0001011"]  # fmt: skip


# SBU


def test_sbu(made):
    root, said = made("sbu"), drawn(*SPLITS)
    assert {file.name for file in root.iterdir()} == {"sbu-captions-all.json", "images"}
    listed = content(root, "sbu-captions-all.json")
    assert list(listed) == ["image_urls", "user_ids", "captions"]
    assert {len(values) for values in listed.values()} == {len(said)}
    in_flickr = content(made("flickr30k"), "karpathy/dataset_flickr30k.json")["images"]
    for url, user, caption, scene, record in zip(*listed.values(), said, in_flickr, strict=True):
        assert_caption(caption, scene)
        photo = record["filename"].removesuffix(".jpg")
        assert url == f"http://static.flickr.com/2723/{photo}_b0f291553e.jpg" and re.fullmatch(r"\d{8}@N\d\d", user)
        assert record["sentences"][0]["raw"] == caption
    check_pictures(root, {f"images/{i}.jpg": scene for i, scene in enumerate(said, 1) if i not in (10, 20, 30, 40)})


# Regions, and the command

NAMED = {  # layout -> {name of a region file: the scene it is about}
    "vg": lambda: {f"{i}": scene for i, scene in enumerate(drawn(*SPLITS), 1)},
    "cc3m": lambda: {f"{prefix}{i + 1}": scene for split, prefix in (("train", ""), ("val", "val-"))
                     for i, scene in alive(split)},
    "sbu": lambda: {f"{i}": scene for i, scene in enumerate(drawn(*SPLITS), 1) if i % 10},
}  # fmt: skip
NAMED["cc3m_json"] = NAMED["cc3m"]


@pytest.mark.parametrize("layout", NAMED)
def test_region_files(made, layout):
    root, expected = made(layout, "npz"), NAMED[layout]()
    assert {file.stem for file in (root / "regions").iterdir()} == set(expected)
    for name, scene in expected.items():
        found = scenes.regions(scene, SIZE)
        with np.load(root / "regions" / f"{name}.npz") as arrays:
            assert str(arrays["image_id"]) == name
            assert np.array_equal(arrays["features"], found["features"])
            assert np.array_equal(arrays["boxes"], found["boxes"]) and np.array_equal(arrays["cls_prob"],
                                                                                      found["cls_prob"])  # fmt: skip


@pytest.mark.parametrize("layout", NAMED)
def test_region_tables(made, layout):
    """A file for each split, with the ids that the files of their own have."""
    root = made(layout, "tsv") / "regions"
    splits = ("train", "val") if layout.startswith("cc3m") else SPLITS
    assert {file.name for file in root.iterdir()} == {f"{split}.tsv" for split in splits}
    ids = [line.split("\t")[0] for split in splits for line in (root / f"{split}.tsv").read_text().splitlines()]
    assert ids == list(NAMED[layout]())


@pytest.mark.parametrize("layout, name", [("vg", "vg"), ("cc3m", "cc3m"), ("cc3m_json", "cc3m"), ("sbu", "sbu")])
def test_the_command(tmp_path, layout, name):
    """It names the loader, and no training on captions, which these have no test split for."""
    argv = f"tools/export.py {layout} {tmp_path / 'x'} --train 2 --val 1 --test 1 --size 16"
    done = subprocess.run([sys.executable, *argv.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python data.py check {name} --root {tmp_path / 'x'}" in done.stdout and "vcgpt" not in done.stdout


def test_scenes_are_those_that_are_asked_for():
    """drawn() above and the corpus of an export are the same scenes."""
    corpus = corpora.load_scenes("full", 23, 12, 11, 3, "caption")
    for split in SPLITS:
        assert [item.image for item in corpus.splits[split]] == drawn(split)
