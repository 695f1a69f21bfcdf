"""What tools/export.py writes, the loaders of corpora.py read back: sample for sample what the small world is.

Where the small world's own form goes through the same code as the loader (tagged words, labels), the scenes themselves
are asked besides.
"""

import csv
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from papers import ROOT, run, toy
from PIL import Image

import corpora
import data
import language
import regions
import scenes
from common import UserError
from data import BadImage
from tools import export, score

SIZE = 32
MANY = {"vqa": dict(train=160, val=24, test=6),  # an answer must be given nine times to be a class
        "nlvr1": dict(train=120, val=8, test=8)}  # each form of a sentence must occur  # fmt: skip
FEW = dict(train=12, val=8, test=8)
FULL = ("snli_ve", "vcr")  # of the whole world: with panels, which are regions and no objects
LABELLED = {"train": "train", "val": "val", "test": "test"}


def numbers_of(layout):
    return MANY.get(layout, FEW)


def drawn_like(layout):
    """The corpus of scenes that an export of this layout is made of."""
    n = numbers_of(layout)
    return corpora.load("scenes", task=export.LAYOUTS[layout][2], world="full" if layout in FULL else "tiny",
                        n_train=n["train"], n_val=n["val"], n_test=n["test"], seed=3)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """layout, regions -> the folder of its export, made once."""
    done = {}

    def make(layout, regions=""):
        if (layout, regions) not in done:
            world = "full" if layout in FULL else "tiny"
            folder = tmp_path_factory.mktemp("made") / layout
            done[layout, regions] = export.export(layout, folder, world, **numbers_of(layout), size=SIZE, seed=3,
                                                  regions=regions)  # fmt: skip
        return done[layout, regions]

    return make


@pytest.fixture(scope="module")
def both(made):
    """layout -> (what its loader reads, the scenes)."""
    return lambda layout: (corpora.load(export.LAYOUTS[layout][1], made(layout)), drawn_like(layout))


def pixels(image, size=SIZE):
    return np.asarray(data.load_image(image, size)).astype(int)


def same_picture(file, scene):
    """Exact for PNG, nearly so for JPEG. True, so that it can be asserted with all()."""
    difference = np.abs(pixels(file) - pixels(scene))
    return difference.shape == (SIZE, SIZE, 3) and difference.mean() < (4 if file.suffix == ".jpg" else 1e-9)


def content(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


# Captions

CAPTION_SETS = {  # layout -> split as it is read: split of the scenes; id of number 0; where the pictures of each lie
    "coco": (LABELLED, 1, {"train": {"train2014", "val2014"}, "val": {"val2014"}, "test": {"val2014"}}),
    "coco2017": ({"train": "train", "test": "test"}, 1, {"train": {"train2017"}, "test": {"val2017"}}),
    "flickr30k": (LABELLED, 0, dict.fromkeys(LABELLED, {"flickr30k-images"})),
    "flickr8k": (LABELLED, 0, dict.fromkeys(LABELLED, {"Flicker8k_Dataset"})),
}


@pytest.mark.parametrize("layout", CAPTION_SETS)
def test_captions(both, layout):
    read, drawn = both(layout)
    names, number, folders = CAPTION_SETS[layout]
    assert list(read.splits) == list(names)
    for split, of_scenes in names.items():
        items, said = read.splits[split], drawn.splits[of_scenes]
        assert [item.image_id for item in items] == list(range(number, number + len(said)))
        assert [item.captions for item in items] == [tuple(scenes.captions(item.image)) for item in said]
        assert all(same_picture(item.image, one.image) for item, one in zip(items, said, strict=True))
        assert {item.image.parent.name for item in items} == folders[split]
        number += len(said)


def test_names_of_pictures(made):
    assert (made("coco") / "val2014" / "COCO_val2014_000000000004.jpg").is_file()  # the first of restval
    assert (made("coco2017") / "val2017" / "000000000013.jpg").is_file()
    assert (made("flickr30k") / "flickr30k-images" / "1000000000.jpg").is_file()
    assert (made("flickr8k") / "Flicker8k_Dataset" / "1000000011_000000000b.jpg").is_file()
    assert (made("nocaps") / "val" / "000000000000000a.jpg").is_file()
    with Image.open(made("coco") / "train2014" / "COCO_train2014_000000000001.jpg") as picture:
        assert picture.format == "JPEG" and [part[1:3] for part in picture.layer] == [(1, 1)] * 3  # no subsampling


def test_restval_is_a_quarter_of_train(made):
    found = Counter(record["split"] for record in content(made("coco"), "karpathy/dataset_coco.json")["images"])
    assert found == {"train": 9, "restval": 3, "val": 8, "test": 8}


def test_karpathy_files_have_every_field(made):
    for name in ("coco", "flickr30k", "flickr8k"):
        found = content(made(name), f"karpathy/dataset_{name}.json")
        assert found["dataset"] == name
        of_coco = {"filepath", "cocoid"} if name == "coco" else set()
        assert {frozenset(r) for r in found["images"]} == {
            frozenset({"filename", "imgid", "sentids", "split", "sentences"} | of_coco)}  # fmt: skip
        sentences = [sentence for record in found["images"] for sentence in record["sentences"]]
        assert [s["sentid"] for s in sentences] == list(range(len(sentences)))
        for record in found["images"]:
            assert record["sentids"] == [sentence["sentid"] for sentence in record["sentences"]]
            assert {sentence["imgid"] for sentence in record["sentences"]} == {record["imgid"]}
        assert all(s["tokens"] == s["raw"].split() for s in sentences)


def test_official_caption_files(made, tmp_path):
    """They have the fields of COCO's schema, and what scores captions reads from them what Karpathy's file says."""
    images = {"license", "file_name", "coco_url", "height", "width", "date_captured", "id"}
    for layout, name, more in (
            ("coco", "annotations/captions_train2014.json", {"flickr_url"}),
            ("coco", "annotations/captions_val2014.json", {"flickr_url"}),
            ("coco2017", "annotations/captions_val2017.json", {"flickr_url"}),
            ("nocaps", "nocaps_val_4500_captions.json", {"open_images_id", "domain"})):  # fmt: skip
        found = content(made(layout), name)
        assert set(found) == {"info", "images", "licenses", "annotations"} and found["licenses"][0]["id"] == 1
        assert all(set(record) >= images | more and record["height"] == SIZE for record in found["images"])
        assert all(set(record) == {"id", "image_id", "caption"} for record in found["annotations"])
        assert len({record["id"] for record in found["annotations"]}) == len(found["annotations"])
    val = score.read_caption_references(made("coco") / "annotations/captions_val2014.json")
    test = score.read_caption_references(made("coco") / "karpathy/dataset_coco.json")
    assert len(test) == 8 and len(val) == 8 + 8 + 3 and all(val[i] == texts for i, texts in test.items())


def test_coco_is_read_without_its_karpathy_file(made, tmp_path):
    for name in ("annotations", "train2014", "val2014"):
        (tmp_path / name).symlink_to(made("coco") / name)
    read, drawn = corpora.load("coco", tmp_path), drawn_like("coco")
    assert [item.image_id for item in read.splits["test"]] == [4, 8, 12, *range(13, 29)]
    assert [item.captions for item in read.splits["train"]] == [
        item.captions for i, item in enumerate(drawn.splits["train"]) if i % 4 != 3]  # fmt: skip


def test_nocaps(both, made):
    read, drawn = both("nocaps")
    new = drawn.splits["test"].made[0].world.held_out
    said = [*drawn.splits["test"], *drawn.splits["test_compositional"]]
    assert [item.image_id for item in read.splits["test"]] == list(range(16))
    assert all(item.captions == tuple(scenes.captions(one.image, 10)) and item.captions[:5] == one.captions
               and len(item.captions) == 10 and same_picture(item.image, one.image) and item.image.parent.name == "val"
               for item, one in zip(read.splits["test"], said, strict=True))  # fmt: skip
    kinds = [{(o.color, o.shape) in new for o in one.image.objects} for one in said]
    for split, kind in (("in", {False}), ("near", {True, False}), ("out", {True})):
        found = [item.image_id for item in read.splits[f"test_{split}_domain"]]
        assert found == [i for i, one in enumerate(kinds) if one == kind] != []
    hidden = read.splits["server_test"]
    assert [item.image_id for item in hidden] == list(range(16, 24)) and not any(item.captions for item in hidden)
    assert all(same_picture(item.image, one.image) and item.image.parent.name == "test"
               for item, one in zip(hidden, drawn.splits["val"], strict=True))  # fmt: skip
    assert set(content(made("nocaps"), "nocaps_test_image_info.json")) == {"info", "images", "licenses"}
    assert not any("domain" in record for record in content(made("nocaps"), "nocaps_test_image_info.json")["images"])


# VQA


def test_vqa(both):
    read, drawn = both("vqa")
    assert list(read.splits) == ["train", "val", "server_test", "server_test_dev"]
    asked = {**drawn.splits, "server_test": [*drawn.splits["test"], *drawn.splits["test_compositional"]]}
    number = 1
    for split, folder in (("train", "train2014"), ("val", "val2014"), ("server_test", "test2015")):
        for i, (found, one) in enumerate(zip(read.splits[split], asked[split], strict=True)):
            assert (found.example_id, found.image_ids) == (1000 * number, (number,)), split
            assert found.text == one.text and same_picture(found.images[0], one.images[0])
            assert str(found.images[0]).endswith(f"{folder}/COCO_{folder}_{number:012d}.jpg")
            if split == "server_test":
                assert found.answers == found.kinds == () and found.label is None
            else:
                question = [q for q in scenes.questions(one.images[0]) if q.text == found.text][0]
                assert found.answers == question.answers, i  # of the ten, in their order
                kind = {"yes/no": "yes/no", "n": "number"}.get(question.kind, "other")
                assert found.kinds == (kind, " ".join(found.text.split()[:2]))
            number += 1
    assert read.splits["server_test_dev"] == read.splits["server_test"][:6]


def test_vqa_classes_and_targets(both, made, monkeypatch):
    read, drawn = both("vqa")
    answers = [scenes.answer(item.text, item.images[0]) for split in ("train", "val") for item in drawn.splits[split]]
    counts = Counter(answers)
    assert read.answers == tuple(answer for answer, n in counts.items() if n >= 9) and {"yes", "no"} < {*read.answers}
    assert corpora.SEEN_AT_LEAST == 9
    for least in (min(counts.values()), min(counts.values()) + 1, max(counts.values())):
        monkeypatch.setattr(corpora, "SEEN_AT_LEAST", least)
        classes = corpora.load("vqa", made("vqa")).answers
        assert classes == tuple(answer for answer, n in counts.items() if n >= least)
    told = content(made("vqa"), "v2_mscoco_train2014_annotations.json")["annotations"]
    assert [record["multiple_choice_answer"] for record in told] == answers[:160]
    words = language.Tokenizer.train([item.text for item in read.splits["train"]], 300)
    targets = []
    for corpus in (read, drawn):
        samples = data.Examples(corpus.splits["val"], words, SIZE, answers=read.answers)
        batches = list(data.eval_loader(samples, 10))
        assert [tuple(batch["pixels"].shape) for batch in batches] == [(10, 3, SIZE, SIZE)] * 2 + [(4, 3, SIZE, SIZE)]
        assert all((batch["labels"] == -100).all() for batch in batches)
        targets.append(torch.cat([batch["targets"] for batch in batches]))
    assert targets[0].shape == (24, len(read.answers)) and torch.equal(*targets)
    by_hand = torch.tensor([[(0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1)[item.answers.count(answer)]
                             for answer in read.answers] for item in drawn.splits["val"]])  # fmt: skip
    assert torch.equal(targets[0], by_hand) and len(by_hand.unique()) > 2


def test_vqa_train_and_val(made, monkeypatch):
    monkeypatch.setattr(corpora, "MINI_VAL", 5)
    read, whole = corpora.load("vqa", made("vqa"), train_on="train+val"), corpora.load("vqa", made("vqa"))
    assert read.splits["train"] == whole.splits["train"] + whole.splits["val"][:-5]
    assert read.splits["val"] == whole.splits["val"][-5:] and read.answers == whole.answers
    assert len(read.splits["server_test"]) == 12 and "mini-val, the last 5 " in " ".join(read.notes)


def test_vqa_files_have_every_field(made):
    top = {"info", "data_type", "data_subtype", "license"}
    for part in ("train2014", "val2014", "test2015", "test-dev2015"):
        found = content(made("vqa"), f"v2_OpenEnded_mscoco_{part}_questions.json")
        assert set(found) == top | {"task_type", "questions"} and found["data_subtype"] == part
        assert found["task_type"] == "Open-Ended" and found["data_type"] == "mscoco"
        assert {frozenset(record) for record in found["questions"]} == {
            frozenset({"image_id", "question", "question_id"})}  # fmt: skip
    for part in ("train2014", "val2014"):
        found = content(made("vqa"), f"v2_mscoco_{part}_annotations.json")
        assert set(found) == top | {"annotations"} and found["data_subtype"] == part
        assert {frozenset(record) for record in found["annotations"]} == {
            frozenset({"question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id"})}
        for record in found["annotations"]:
            assert [answer["answer_id"] for answer in record["answers"]] == list(range(1, 11))
            assert {frozenset(answer) for answer in record["answers"]} == {
                frozenset({"answer", "answer_confidence", "answer_id"})}  # fmt: skip
    assert not list(made("vqa").glob("*test*annotations.json"))


# NLVR


def test_nlvr2(both):
    read, drawn = both("nlvr2")
    names = {"train": "train", "val": "val", "test": "test", "test_unreleased": "test_compositional"}
    folders = {"train": "train", "val": "dev", "test": "test1", "test_unreleased": "test2"}
    assert list(read.splits) == list(names)
    for split, of_scenes in names.items():
        for i, (found, one) in enumerate(zip(read.splits[split], drawn.splits[of_scenes], strict=True)):
            pair = f"{folders[split]}-{i // 4}-{i % 4}"
            assert found.example_id == f"{pair}-{i // 4 % 2}" and found.others == ()
            assert found.image_ids == (f"{pair}-img0", f"{pair}-img1")
            assert found.group == f"{folders[split]}-{i // 4}-{i // 4 % 2}"
            assert found.text == one.text and found.label == one.label
            truth = scenes.pair_is_true(found.text, *one.images)
            assert truth == ("false", "true")[found.label]
            assert all(map(same_picture, found.images, one.images)) and found.images[0].suffix == ".png"
            directory = [str(i // 4)] if split == "train" else []
            assert found.images[0].parts[-2 - len(directory) : -1] == (folders[split], *directory)
    labels = Counter((item.group, item.label) for item in read.splits["test"])
    assert set(labels.values()) == {2}  # two of each group are true


def test_nlvr2_files_have_every_field(made):
    known = {"identifier", "sentence", "label", "left_url", "right_url", "writer", "synset", "query", "validation",
             "extra_validations"}  # fmt: skip
    for name in ("train", "dev", "test1", "test2"):
        records = lines(made("nlvr2"), f"data/{name}.json")
        assert {frozenset(record) for record in records} == {
            frozenset(known | ({"directory"} if name == "train" else set()))}  # fmt: skip
        assert {record["label"] for record in records} == {"True", "False"}


def test_nlvr1(both, made):
    read, drawn = both("nlvr1")
    assert list(read.splits) == ["train", "val", "test"]
    orders = Counter()
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        for i, (found, one) in enumerate(zip(read.splits[split], drawn.splits[split], strict=True)):
            assert found.example_id == f"{name}-{i // 4}-{i % 4}" and found.group == f"{name}-{i // 4}"
            assert found.image_ids == (f"{found.example_id}-0",) * 2 and found.images[0] == found.images[1]
            assert (found.text, found.label) == (one.text, one.label)
            orders[split, len(found.others)] += 1
            for pictures, shown in zip((found.images, *found.others), (one.images, one.images[::-1]), strict=False):
                whole = pixels(pictures[0])
                assert np.array_equal(whole[:, :SIZE], pixels(shown[0]))
                assert np.array_equal(whole[:, -SIZE:], pixels(shown[1])) and whole.shape == (SIZE, 2 * SIZE + 4, 3)
                assert scenes.pair_is_true(found.text, *shown) == ("false", "true")[found.label]
    assert set(orders) == {("train", 0), ("train", 1), ("val", 0), ("test", 0)}
    sides = {tuple(side for side in ("left", "right") if f"the {side} picture" in item.text or f"the {side} one" in
                   item.text) for item in read.splits["train"]}  # fmt: skip
    assert sides == {(), ("left",), ("right",), ("left", "right")}
    assert {frozenset(record) for record in lines(made("nlvr1"), "train.jsonl")} == {
        frozenset({"identifier", "sentence", "label", "images", "directory"})}  # fmt: skip


# SNLI-VE


def test_snli_ve(both, made):
    read, drawn = both("snli_ve")
    assert list(read.splits) == ["train", "val", "test"]
    number = 10**9
    for split in read.splits:
        for found, one in zip(read.splits[split], drawn.splits[split], strict=True):
            truth = scenes.is_true(found.text, one.images[0])
            label = {"false": "contradiction", "unknown": "neutral", "true": "entailment"}[truth.value]
            assert found.text == one.text and found.label == one.label == corpora.ENTAILMENT.index(label)
            assert found.image_ids == (str(number),) and found.example_id == f"{number}.jpg#0r1{label[0]}"
            assert same_picture(found.images[0], one.images[0]) and found.images[0].parent.name == "flickr30k-images"
            number += 1
    assert corpora.ENTAILMENT == ("contradiction", "neutral", "entailment")
    for record, one in zip(lines(made("snli_ve"), "snli_ve_dev.jsonl"), drawn.splits["val"], strict=True):
        assert set(record) == {"Flickr30K_ID", "pairID", "captionID", "gold_label", "annotator_labels", "sentence1",
                               "sentence2", "sentence1_parse", "sentence2_parse"}  # fmt: skip
        assert scenes.is_true(record["sentence1"], one.images[0]).value == "true"  # the premise is a caption
        assert record["captionID"] == record["pairID"][: -len("r1n")]


# VCR


def flat(tokens):
    """(words, tags) of the small world's tokens, worked out anew."""
    pairs = [(word, -1) if isinstance(word, str) else ("object", tag)
             for word in tokens for tag in ([0] if isinstance(word, str) else word)]  # fmt: skip
    return tuple(zip(*pairs, strict=True))


def test_vcr(both):
    read, drawn = both("vcr")
    assert list(read.splits) == ["train", "val", "server_test"]
    for split, of_scenes in (("train", "train"), ("val", "val"), ("server_test", "test")):
        asked = drawn.splits[of_scenes].made
        for i, (found, one) in enumerate(zip(read.splits[split], drawn.splits[of_scenes], strict=True)):
            assert found.example_id == found.image_ids[0] == f"{of_scenes}-{i}" and one.example_id == str(i)
            said = [(text.words, text.tags) for text in (found.question, *found.answers, *found.rationales)]
            assert said == [flat(text) for text in (asked[i].question, *asked[i].answers, *asked[i].rationales)]
            assert (found.question, found.answers, found.rationales) == (one.question, one.answers, one.rationales)
            labels = (asked[i].label, asked[i].rationale_label)
            assert (one.label, one.rationale_label) == labels
            assert (found.label, found.rationale_label) == ((None, None) if split == "server_test" else labels)
            assert scenes.choose_answer(asked[i].question, asked[i].answers, one.images[0]) == labels[0]
            assert found.objects == one.objects == ("object",) * len(one.images[0].objects)
            assert same_picture(found.images[0], one.images[0])
            boxes, drawn_boxes = (regions.object_boxes(choice, (SIZE, SIZE)) for choice in (found, one))
            assert np.abs(boxes - drawn_boxes).max() < 1e-3
            assert found.metadata == found.images[0].with_suffix(".json")
    boxes = [regions.object_boxes(item, (SIZE, SIZE)) for item in read.splits["train"]]
    wide = [np.ptp(rows.reshape(-1, 2, 2), axis=1) for rows in boxes]
    assert 4 < np.concatenate(wide).mean() < SIZE / 2  # in pixels


def test_vcr_files_have_every_field(made):
    known = {"annot_id", "img_id", "img_fn", "metadata_fn", "movie", "question_number", "objects", "question",
             "answer_choices", "rationale_choices", "answer_likelihood", "match_fold", "match_index"}  # fmt: skip
    for name in ("train", "val", "test"):
        labels = set() if name == "test" else {"answer_label", "rationale_label"}
        for record in lines(made("vcr"), f"{name}.jsonl"):
            assert set(record) == known | labels and record["img_fn"].startswith(f"lsmdc_{record['movie']}/")
            metadata = content(made("vcr") / "vcr1images", record["metadata_fn"])
            assert set(metadata) == {"boxes", "segms", "names", "width", "height"}
            assert metadata["names"] == record["objects"] and len(metadata["segms"]) == len(metadata["boxes"])
            assert {len(box) for box in metadata["boxes"]} == {5} and metadata["boxes"][0][4] == 1
            assert any(isinstance(token, list) and len(token) == 2 for token in record["question"])
    metadata = export.vcr_metadata([[1, 2, 30, 10]], ("object",), (40, 20))
    assert (metadata["width"], metadata["height"]) == (40, 20)


# Regions


@pytest.mark.parametrize("layout", ["coco", "flickr8k", "nocaps", "vqa", "snli_ve", "vcr"])
def test_npz_regions(made, layout):
    root = made(layout, "npz")
    read, drawn = corpora.load(export.LAYOUTS[layout][1], root), drawn_like(layout)
    source, scene_source = regions.NpzRegions(root / "regions", n_classes=0), regions.SceneRegions(SIZE)
    of_scenes = {"nocaps": {"server_test": "val"}, "vqa": {"train": "train", "val": "val"},
                 "vcr": {"train": "train", "server_test": "test"}}.get(layout, LABELLED)  # fmt: skip
    for split, name in of_scenes.items():
        for item, one in zip(read.splits[split], drawn.splits[name], strict=True):
            found = source(data.ids_of(item)[0], data.files_of(item)[0])
            assert same_regions(found, scene_source(0, data.files_of(one)[0]))
            if layout == "vcr":
                objects = source.of_objects(item)
                assert same_regions(objects, found.first(len(item.objects)))
                assert np.abs(objects.boxes - regions.object_boxes(item, (SIZE, SIZE))).max() < 1e-3
    file = next((root / "regions").iterdir())
    with np.load(file) as arrays:
        assert set(arrays) == {"features", "cls_prob", "boxes", "image_h", "image_w", "num_boxes", "image_id"}
        assert {arrays[name].shape for name in ("image_h", "image_w", "num_boxes")} == {(1,)}
        assert arrays["image_id"].shape == () and str(arrays["image_id"]) == file.stem
    assert len(list((root / "regions").iterdir())) == len(list(root.rglob("*.jpg")))


def same_regions(found, other, classes=True):
    arrays = [(found.features, other.features), (found.boxes, other.boxes)]
    arrays += [(found.classes, other.classes)] if classes else []
    same = [a.dtype == b.dtype == np.float32 and np.array_equal(a, b) for a, b in arrays]
    return found.size == other.size and all(same)


@pytest.mark.parametrize("layout", ["coco", "vqa"])
def test_tsv_regions(made, layout):
    root, drawn = made(layout, "tsv"), drawn_like(layout)
    read = corpora.load(layout, root)
    source = regions.TsvRegions(sorted((root / "regions").glob("*.tsv")))
    assert len(source.files) == {"coco": 2, "vqa": 3}[layout]
    number = 0
    for split in ("train", "val"):
        for item, one in zip(read.splits[split], drawn.splits[split], strict=True):
            found = source(data.ids_of(item)[0], data.files_of(item)[0])
            assert found.classes is None
            assert same_regions(found, regions.SceneRegions(SIZE)(0, data.files_of(one)[0]), classes=False)
            number += 1
    csv.field_size_limit(sys.maxsize)
    with open(source.files[1 if layout == "vqa" else 0]) as table:  # sorted: test2015 comes first
        rows = list(csv.reader(table, delimiter="\t"))
    assert {len(row) for row in rows} == {6} and [row[0] for row in rows[:3]] == ["1", "2", "3"]
    assert {tuple(row[1:3]) for row in rows} == {(str(SIZE), str(SIZE))}
    assert number == len(drawn.splits["train"]) + len(drawn.splits["val"])


def test_region_files_of_pictures_that_are_not_square(tmp_path):
    rng = np.random.default_rng(0)
    boxes = np.array([[0, 1, 39, 9], [8, 3, 20, 20]], np.float32)
    found = data.Regions(rng.random((2, 6), np.float32), boxes, (40, 20), np.full((2, 4), 0.25, np.float32))
    export.write_npz(tmp_path / "7.npz", 7, found)
    (tmp_path / "x.tsv").write_bytes(export.tsv_line(6, found.first(1)) + export.tsv_line(7, found))
    assert same_regions(regions.NpzRegions(tmp_path)(7, "x.jpg"), found)
    assert same_regions(regions.TsvRegions([tmp_path / "x.tsv"])(7, "x.jpg"), found, classes=False)
    assert (tmp_path / "x.tsv").read_bytes().split(b"\n")[1].split(b"\t")[:4] == [b"7", b"40", b"20", b"2"]
    assert found.locations() == pytest.approx(np.array([[0, 0.05, 0.975, 0.45, 0.39], [0.2, 0.15, 0.5, 1, 0.255]]))
    with pytest.raises(BadImage, match="image 8"):
        regions.TsvRegions([tmp_path / "x.tsv"])(8, "x.jpg")


# Batches


def tokenizer_of(corpus):
    texts = [text for item in corpus.splits["train"] for text in getattr(item, "captions", None) or [str(item)]]
    return language.Tokenizer.train(texts, 300)


@pytest.mark.parametrize("layout", ["coco", "flickr30k"])
def test_batches_of_captions(both, layout):
    read, _ = both(layout)
    words = tokenizer_of(read)
    batches = list(data.eval_loader(data.Pictures(read.splits["test"], words, 16), 3))
    assert [batch["pixels"].shape for batch in batches] == [(3, 3, 16, 16), (3, 3, 16, 16), (2, 3, 16, 16)]
    assert [text for batch in batches for text in batch["captions"]] == [i.captions for i in read.splits["test"]]
    training = data.Pictures(read.splits["train"], words, 16, captions=5, train=True, augment="crop")
    batch = next(iter(data.train_loader(training, 4, steps=1)))
    assert batch["ids"].shape[0] == 20 and batch["ids"].shape == batch["targets"].shape


@pytest.mark.parametrize("layout", ["nlvr2", "nlvr1"])
def test_batches_of_pairs(both, layout):
    read, drawn = both(layout)
    samples = data.Examples(read.splits["test"], tokenizer_of(read), SIZE)
    batches = list(data.eval_loader(samples, 4))
    assert [batch["pixels"].shape for batch in batches] == [(4, 2, 3, SIZE, SIZE)] * 2
    assert [i for batch in batches for i in batch["example_id"]] == [item.example_id for item in read.splits["test"]]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [i.label for i in drawn.splits["test"]]
    if layout == "nlvr1":  # training takes any order of the pictures, evaluation the first
        index, item = next((i, item) for i, item in enumerate(read.splits["train"]) if item.others)
        orders = [torch.from_numpy(pixels(pair[0], 2 * SIZE + 4)) for pair in (item.images, *item.others)]
        whole = [data.Examples(read.splits["train"], samples.tokenizer, 2 * SIZE + 4, train=train)
                 for train in (False, True)]  # fmt: skip
        seen = [one["pixels"][0][:, :SIZE].permute(1, 2, 0) for one in (whole[1][n, index] for n in range(12))]
        assert {next(k for k, order in enumerate(orders) if torch.equal(order, one)) for one in seen} == {0, 1}
        assert torch.equal(whole[0][index]["pixels"][1][:, :SIZE].permute(1, 2, 0), orders[0])
    if layout == "nlvr2":
        shown = np.stack([pixels(scene).transpose(2, 0, 1) for scene in drawn.splits["test"][1].images])
        assert np.array_equal(batches[0]["pixels"][1].numpy(), shown)
    assert batches[0]["ids"].shape[0] == 4 and "targets" not in batches[0]
    source = regions.SceneRegions(SIZE)
    with pytest.raises(UserError, match="--regions"):
        next(iter(data.eval_loader(data.Examples(drawn.splits["test"], samples.tokenizer, 8, regions=source), 2)))


def test_batches_of_hypotheses_and_hidden_labels(both):
    read, drawn = both("snli_ve")
    batch = next(iter(data.eval_loader(data.Examples(read.splits["test"], tokenizer_of(read), 16, max_len=5), 6)))
    assert batch["pixels"].shape == (6, 3, 16, 16) and batch["ids"].shape == (6, 7)  # five tokens, bos and eos
    assert batch["labels"].tolist() == [item.label for item in drawn.splits["test"]][:6]
    read, _ = both("vqa")
    hidden = data.Examples(read.splits["server_test"], tokenizer_of(read), 16, answers=read.answers)
    batch = next(iter(data.eval_loader(hidden, 12)))
    assert batch["targets"].shape == (12, len(read.answers)) and not batch["targets"].any()


@pytest.mark.parametrize("task", ["qa", "qar"])
def test_batches_of_choices(made, task):
    root = made("vcr", "npz")
    read, drawn = corpora.load("vcr", root), drawn_like("vcr")
    words = tokenizer_of(read)
    source = regions.NpzRegions(root / "regions")
    loader = data.eval_loader(data.Choices(read.splits["val"], words, SIZE, task=task, regions=source), 4)
    batch, asked = next(iter(loader)), list(drawn.splits["val"].made)
    T = batch["ids"].shape[1]
    assert batch["ids"].shape == batch["tags"].shape == batch["segments"].shape == (16, T)
    assert batch["labels"].tolist() == [q.label if task == "qa" else q.rationale_label for q in asked[:4]]
    for row, (ids, tags) in enumerate(zip(batch["ids"], batch["tags"], strict=True)):
        q = asked[row // 4]
        texts = [q.question] if task == "qa" else [q.question, q.answers[q.label]]
        texts.append((q.answers if task == "qa" else q.rationales)[row % 4])
        named = [tag for text in texts for tag in flat(text)[1] if tag >= 0]
        assert words.decode(ids[tags >= 0]).replace(" ", "") == "object" * len(named)  # the very tokens that name one
        assert tags[tags >= 0].tolist() == [
            tag for text in texts for n, (word, tag) in enumerate(zip(*flat(text), strict=True))
            for _ in words.encode(" " * bool(n) + word) if tag >= 0]  # fmt: skip
        ends = (ids == words.eos).nonzero().flatten().tolist()  # the first is bos, the last are padding
        parts = [words.decode(ids[a + 1 : b]).split() for a, b in zip(ends, ends[1:], strict=False)][: len(texts)]
        assert parts == [list(flat(text)[0]) for text in texts]
        segments = batch["segments"][row]
        assert segments[ends[len(texts) - 1] + 1 : ends[len(texts)] + 1].all()
        assert int(segments.sum()) == ends[len(texts)] - ends[len(texts) - 1]
    n_objects = [len(q.scene.objects) for q in asked[:4]]
    n_regions = [n + (q.scene.panel is not None) for n, q in zip(n_objects, asked, strict=False)]
    n, N = max(n_objects), max(n_regions)
    assert batch["regions"].shape == (4, N, 768) and batch["objects"].shape == (4, n, 768)
    assert batch["regions_locations"].shape == (4, N, 5) and batch["objects_boxes"].shape == (4, n, 4)
    assert batch["regions_classes"].shape[:2] == batch["regions_keep_mask"].shape == (4, N)
    assert batch["objects_keep_mask"].sum(1).tolist() == n_objects != n_regions
    assert batch["regions_keep_mask"].sum(1).tolist() == n_regions
    expected = [(o.x - o.r, o.y - o.r, o.x + o.r, o.y + o.r, 4 * o.r**2) for o in asked[1].scene.objects]
    for name in ("regions", "objects"):
        assert batch[f"{name}_locations"][1, : len(expected)].numpy() == pytest.approx(np.array(expected), abs=1e-5)
    if task == "qar":  # what the server wants of hidden labels
        hidden = data.Choices(read.splits["server_test"], words, SIZE, task=task, answer=2)
        batch = next(iter(data.eval_loader(hidden, 3)))
        assert batch["pixels"].shape == (3, 3, SIZE, SIZE) and batch["labels"].tolist() == [-100] * 3
        with pytest.raises(UserError, match="hidden"):
            data.Choices(read.splits["server_test"], words, SIZE, task=task)[0]


def test_grid_regions_of_the_files(both):
    """The grid reads any file; its crops of VCR's objects are where the metadata says."""
    read, drawn = both("vcr")
    item, one = read.splits["train"][0], drawn.splits["train"][0]
    assert regions.GridRegions()(item.image_ids[0], item.images[0]).features.shape == (16, 768)
    crops = regions.GridRegions().of_objects(item)
    clean = regions.SceneRegions(SIZE).of_objects(one)
    assert crops.features.shape == clean.features.shape and np.abs(crops.features - clean.features).mean() < 0.05


# The command


def test_the_command(tmp_path):
    argv = f"tools/export.py coco {tmp_path / 'x'} --train 5 --val 2 --test 2 --size 16 --seed 3 --world full"
    done = subprocess.run([sys.executable, *argv.split(), "--regions", "tsv"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train: 5 of 5 samples written" in done.stdout and [path.name for path in tmp_path.iterdir()] == ["x"]
    assert f"python data.py check coco --root {tmp_path / 'x'}" in done.stdout
    assert f"python vcgpt.py --data coco --root {tmp_path / 'x'} --preset tiny --steps 3" in done.stdout
    drawn = corpora.load("scenes", world="full", n_train=5, seed=3).splits["train"]
    read = corpora.load("coco", tmp_path / "x").splits["train"]
    assert [item.captions for item in read] == [item.captions for item in drawn]
    assert data.load_image(read[0].image, 0).size == (16, 16) and (tmp_path / "x" / "regions" / "train.tsv").is_file()


REFUSED = {
    "unknown layout": (("flickr31k", "new"), "nlvr2.*did you mean flickr30k"),
    "nothing hidden in the tiny world": (("snli_ve", "new"), "--world full"),
    "a folder with files": (("coco", "full"), "full is there already.*another name"),
    "a file": (("coco", "full/file"), "file is there already"),
    "the folder one is in": (("coco", "."), "is there already"),
    "unknown world": (("coco", "new", "--world", "tinny"), "tinny"),
    "no scenes": (("coco", "new", "--val", 0), "--val 0"),
    "no pixels": (("coco", "new", "--size", 0), "--size 0"),
    "unknown regions": (("coco", "new", "--regions", "npy"), "npz"),
    "regions of pairs": (("nlvr2", "new", "--regions", "npz"), "leave out --regions"),
    "regions of VCR as tsv": (("vcr", "new", "--regions", "tsv"), "--regions npz"),
    "unknown flag": (("coco", "new", "--sise", 3), "--sise"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, monkeypatch, case):
    argv, said = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    if argv[1] == ".":
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=f"(?s){said}"):
        export.main([str(word) for word in argv])
    assert (tmp_path / "full" / "file").read_text() == "mine" and not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"full", "empty"}


def test_an_export_that_stops_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()  # an empty folder may be filled
    seen, render = [], scenes.render

    def stops(scene, size):
        seen.append([path.name for path in tmp_path.iterdir()])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return render(scene, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "render", stops)
        export.export("flickr8k", tmp_path / "empty", train=3, val=1, test=1, size=8)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"] and not any((tmp_path / "empty").iterdir())
    assert any("unfinished" in name for name in seen[-1])
    export.export("flickr8k", tmp_path / "empty", train=3, val=1, test=1, size=8)
    assert len(corpora.load("flickr8k", tmp_path / "empty").splits["train"]) == 3


def test_a_model_trains_on_an_export(made, tmp_path):
    run("vcgpt", *toy("vcgpt", "--data", "coco", "--root", made("coco"), "--preset", "tiny", "--steps", 2,
                      "--no-official", "--out", tmp_path / "run"))  # fmt: skip
    written = content(tmp_path / "run", "captions_test.json")
    read = corpora.load("coco", made("coco")).splits["test"]
    assert sorted(row["image_id"] for row in written) == [item.image_id for item in read]


def test_every_data_set_has_a_layout():
    assert {name for _, name, _ in export.LAYOUTS.values()} == set(corpora.NAMES) - {"scenes"}
