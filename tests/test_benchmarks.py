"""The official files of questions, statements, hypotheses and tagged questions: read right, or refused in words."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import corpora
import data
import language
import regions
from common import UserError

ANSWERS = ["yes", "yes", "yes", "no", "yes", "yes", "Yes", "yes", "yes", "yes"]


def vqa_files():
    """{file: content} of a tiny VQA v2; the answer "yes" is given often enough to be a class, "two" is not."""
    files = {}
    for split, start, n in (("train2014", 0, 9), ("val2014", 100, 4), ("test2015", 200, 2)):
        questions = [
            {"question_id": start * 10 + i, "image_id": start + i // 2, "question": f"Is it {i} ?"} for i in range(n)
        ]
        files[f"v2_OpenEnded_mscoco_{split}_questions.json"] = {"questions": questions[::-1] if n == 4 else questions}
        if split != "test2015":
            files[f"v2_mscoco_{split}_annotations.json"] = {"annotations": [
                {"question_id": q["question_id"], "image_id": q["image_id"], "question_type": "is it",
                 "answer_type": "yes/no" if i < 9 else "number", "multiple_choice_answer": "yes" if i < 9 else "2",
                 "answers": [{"answer_id": j, "answer": a, "answer_confidence": "yes"}
                             for j, a in enumerate(ANSWERS, 1)]}
                for i, q in enumerate(questions)]}  # fmt: skip
    dev = {"questions": files["v2_OpenEnded_mscoco_test2015_questions.json"]["questions"][:1]}
    return files | {"v2_OpenEnded_mscoco_test-dev2015_questions.json": dev}


def nlvr2_files():
    def line(split, pair, sentence, label, **more):
        return {"identifier": f"{split}-7-{pair}-{sentence}", "sentence": f"Sentence {sentence}.", "label": label,
                "left_url": "", "right_url": "", "writer": "61", "synset": "dog", "query": "dogs",
                "validation": {}, **more}  # fmt: skip

    return {
        "data/train.json": [line("train", 0, 0, "True", directory=12), line("train", 1, 0, "False", directory=12)],
        "data/dev.json": [line("dev", 0, 1, "true"), line("dev", 1, 1, "False"), line("dev", 0, 0, "False")],
        "data/test1.json": [line("test1", 0, 0, "True")],
        "data/test2.json": [line("test2", 0, 0, "True")],
    }


def nlvr1_files():
    def line(n, m, orders, label):
        return {"identifier": f"dev-{n}-{m}", "sentence": "There is a box.", "label": label, "directory": "2",
                "images": [f"images/dev-{n}-{m}-{k}.png" for k in range(orders)]}  # fmt: skip

    return {
        "train.jsonl": [line(1, 0, 3, "true"), line(1, 1, 3, "false")],
        "val.jsonl": [line(2, 0, 1, "true")],
        "test.jsonl": [line(3, 0, 1, "false")],
    }


def snli_ve_files():
    def line(image, n, gold):
        return {"Flickr30K_ID": str(image), "pairID": f"{image}.jpg#2r1{n}", "captionID": f"{image}.jpg#2",
                "gold_label": gold, "sentence1": "THE PREMISE", "sentence2": f"Hypothesis {n}.",
                "annotator_labels": [gold]}  # fmt: skip

    return {
        "snli_ve_train.jsonl": [line(10, "c", "contradiction"), line(10, "n", "neutral"), line(11, "e", "entailment")],
        "snli_ve_dev.jsonl": [line(12, "e", "entailment"), line(12, "n", "-")],
        "snli_ve_test.jsonl": [line(13, "n", "neutral")],
    }


def vcr_files():
    def line(split, n, hidden=False):
        labels = {} if hidden else {"answer_label": 2, "rationale_label": 3}
        return {"annot_id": f"{split}-{n}", "img_id": f"{split}-{n // 2}", "img_fn": f"film_{split}/a@{n // 2}.jpg",
                "metadata_fn": f"film_{split}/a@{n // 2}.json", "movie": f"film_{split}", "question_number": n,
                "objects": ["person", "car", "person"], "question": ["Why", "is", [0, 2], "near", [1], "?"],
                "answer_choices": [[[i % 3], "answers", str(i)] for i in range(4)],
                "rationale_choices": [["because", str(i), [1]] for i in range(4)], **labels}  # fmt: skip

    return {"train.jsonl": [line("train", 0), line("train", 1)], "val.jsonl": [line("val", 0)],
            "test.jsonl": [line("test", 0, hidden=True)]}  # fmt: skip


def nocaps_files():
    images = [{"id": i, "open_images_id": f"00{i}", "file_name": f"00{i}.jpg", "width": 40, "height": 30, "license": 0,
               "coco_url": "", "domain": ["in-domain", "near-domain", "out-domain"][i % 3]}
              for i in range(4)]  # fmt: skip
    hidden = [{key: value for key, value in image.items() if key != "domain"} for image in images[:2]]
    captions = [
        {"id": 10 * i + k, "image_id": i, "caption": f"picture {i} in words {k}"} for i in range(4) for k in range(10)
    ]
    return {"nocaps_val_4500_captions.json": {"images": images, "annotations": captions},
            "nocaps_test_image_info.json": {"images": hidden}}  # fmt: skip


PICTURES = {
    "vqa": [f"{split}/COCO_{split}_{i:012d}.jpg" for split, ids in (
        ("train2014", range(5)), ("val2014", (100, 101)), ("test2015", (200,))) for i in ids],
    "nlvr2": [f"images/{folder}/{split}-7-{pair}-img{side}.png" for folder, split in (
        ("train/12", "train"), ("dev", "dev"), ("test1", "test1"), ("test2", "test2"))
              for pair in (0, 1) for side in (0, 1)],
    "nlvr1": [f"images/dev-{x}.png" for x in ("1-0-0", "1-0-1", "1-0-2", "1-1-0", "1-1-1", "1-1-2", "2-0-0", "3-0-0")],
    "snli_ve": [f"flickr30k-images/{i}.jpg" for i in (10, 11, 12, 13)],
    "vcr": ["vcr1images/film_train/a@0.jpg", "vcr1images/film_val/a@0.jpg", "vcr1images/film_test/a@0.jpg"],
    "nocaps": [f"val/00{i}.jpg" for i in range(4)] + [f"test/00{i}.jpg" for i in range(2)],
}  # fmt: skip
FILES = {"vqa": vqa_files, "nlvr2": nlvr2_files, "nlvr1": nlvr1_files, "snli_ve": snli_ve_files, "vcr": vcr_files,
         "nocaps": nocaps_files}  # fmt: skip
BOXES = {"boxes": [[2, 3, 20, 25, 0.9], [0, 0, 40, 30, 0.8], [5, 5, 12, 13, 0.7]], "segms": [], "names": [],
         "width": 40, "height": 30}  # fmt: skip


@pytest.fixture(autouse=True)
def small_rules(monkeypatch):
    monkeypatch.setattr(corpora, "MINI_VAL", 3)


def write(root, name, files=None, leave_out=()):
    """A data set of the official form below `root`; `leave_out`: pictures that are not there."""
    for file, content in (files or FILES[name]()).items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = isinstance(content, list)
        path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))
    for n, picture in enumerate(PICTURES[name]):
        if picture not in leave_out:
            (root / picture).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (n, 0, 0)).save(root / picture, "PNG")  # the content decides, not the extension
            if name == "vcr":
                (root / picture).with_suffix(".json").write_text(json.dumps(BOXES))
    return root


def ids(items):
    return [item.example_id for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# What is right


def test_vqa(tmp_path):
    corpus = corpora.load("vqa", write(tmp_path, "vqa"))
    assert {name: len(items) for name, items in corpus.splits.items()} == {
        "train": 9, "val": 4, "server_test": 2, "server_test_dev": 1}  # fmt: skip
    assert corpus.splits["server_test_dev"][0] == corpus.splits["server_test"][0]  # part of it, with its pictures
    assert corpus.answers == ("yes",) and corpus.finally_evaluated() == ["val"]
    first = corpus.splits["train"][0]
    assert (first.example_id, first.image_ids, first.text, first.answers) == (0, (0,), "Is it 0 ?", tuple(ANSWERS))
    assert first.images == (tmp_path / "train2014/COCO_train2014_000000000000.jpg",)
    assert first.kinds == ("yes/no", "is it") and first.label is None
    hidden = corpus.splits["server_test"][0]
    assert hidden.answers == () and hidden.images[0].name == "COCO_test2015_000000000200.jpg"


def test_vqa_train_and_val(tmp_path):
    """The mini-val: the last of val2014 by question id (the file has them in another order), and said."""
    corpus = corpora.load("vqa", write(tmp_path, "vqa"), train_on="train+val")
    assert ids(corpus.splits["val"]) == [1001, 1002, 1003] and 1000 in ids(corpus.splits["train"])
    assert any("mini-val" in note for note in corpus.notes) and corpus.answers == ("yes",)


def test_vqa_with_visual_genome(tmp_path):
    write(tmp_path / "vqa", "vqa")
    vg = tmp_path / "vg"
    (vg / "VG_100K").mkdir(parents=True)
    for i in (1, 2, 3):
        Image.new("RGB", (40, 30)).save(vg / "VG_100K" / f"{i}.jpg")
    (vg / "image_data.json").write_text(
        json.dumps(
            [
                {"image_id": 1, "coco_id": None},
                {"image_id": 2, "coco_id": 101},
                {"image_id": 3, "coco_id": 0},
                {"image_id": 4, "coco_id": 0},
            ]
        )
    )
    (vg / "question_answers.json").write_text(
        json.dumps(
            [
                {
                    "id": i,
                    "qas": [
                        {"qa_id": 10 * i, "image_id": i, "question": "Is it?", "answer": "Yes."},
                        {"qa_id": 10 * i + 1, "image_id": i, "question": "Who?", "answer": "Nobody we know."},
                    ],
                }
                for i in (1, 2, 3, 4)
            ]
        )
    )
    corpus = corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    added = [example for example in corpus.splits["train"] if str(example.example_id).startswith("vg")]
    assert [example.example_id for example in added] == ["vg-10", "vg-30"]  # 2 is a picture of val, 4 has no file
    assert data.soft_scores(added[0].answers, {"yes": 0}) == [(0, 1.0)]
    assert any("2 questions of Visual Genome" in note and "2 about pictures of val" in note for note in corpus.notes)
    assert any("and 2 whose picture is not there" in note for note in corpus.notes)
    (vg / "image_data.json").write_text(json.dumps([{"image_id": 1, "coco_id": 200}]))  # a picture of test2015
    corpus = corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    assert "vg-10" not in ids(corpus.splits["train"]) and "vg-20" in ids(corpus.splits["train"])
    (tmp_path / "vqa" / "test2015").rename(tmp_path / "later")  # its questions alone say which pictures are tested on
    corpus = corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    assert "vg-10" not in ids(corpus.splits["train"]) and "server_test" not in corpus.splits
    (vg / "VG_100K").rename(vg / "elsewhere")
    with pytest.raises(UserError, match="no picture of Visual Genome in .*VG_100K"):
        corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    (vg / "elsewhere").rename(vg / "VG_100K")
    (vg / "image_data.json").write_text("5")
    with pytest.raises(UserError, match="image_data.json cannot be read as JSON .it does not begin with a list"):
        corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    (vg / "image_data.json").write_text("[]")
    (vg / "question_answers.json").write_text("null")
    with pytest.raises(UserError, match="question_answers.json cannot be read as JSON .it does not begin with a list"):
        corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    (vg / "question_answers.json").write_text('[{"id": 1}]')
    with pytest.raises(UserError, match="`qas` must be a list, but it is missing"):
        corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    (vg / "question_answers.json").write_text("[")
    with pytest.raises(UserError, match="question_answers.json cannot be read as JSON"):
        corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")
    (vg / "image_data.json").unlink()
    with pytest.raises(UserError, match="no image_data.json in .*put it there"):
        corpora.load("vqa", tmp_path / "vqa", train_on="train+val+vg")


def test_pictures_of_vqa_may_lie_with_coco(tmp_path):
    write(tmp_path / "vqa", "vqa")
    (tmp_path / "coco").mkdir()
    for split in ("train2014", "val2014", "test2015"):
        (tmp_path / "vqa" / split).rename(tmp_path / "coco" / split)
    corpus = corpora.load("vqa", tmp_path / "vqa")
    assert all(item.images[0].is_file() for items in corpus.splits.values() for item in items)


def test_the_vocabulary_is_the_normalised_frequent_answers():
    """In the order of first appearance; 9 times is enough, 8 are not; the comma of 1,000 goes."""
    told = ["A dog.", "1,000"] + ["two"] * 9 + ["the dog"] * 8 + ["1000"] * 8 + ["cat"] * 8
    assert corpora.answer_vocabulary([], told) == ("dog", "1000", "2")
    with pytest.raises(UserError, match="no answer is given 9 times in 2 questions"):
        corpora.answer_vocabulary([], ["cat", "dog"])


def test_the_vocabulary_counts_the_official_choice(tmp_path):
    """`multiple_choice_answer`, not whatever is most frequent among the ten; of train2014 and val2014."""
    files = vqa_files()
    for row in files["v2_mscoco_train2014_annotations.json"]["annotations"]:
        row["multiple_choice_answer"] = "Perhaps."
    assert corpora.load("vqa", write(tmp_path, "vqa", files)).answers == ("perhaps",)


def test_soft_scores_count_the_answers_as_written():
    classes = {"yes": 0, "no": 1, "2": 2}
    assert data.soft_scores(("yes",) * 3 + ("no", "no", "Yes", "two", "maybe", "no", "no"), classes) == [
        (0, 0.9),
        (1, 1.0),
    ]
    assert (
        data.soft_scores(("yes", "no", "no"), classes) == [(0, 0.3), (1, 0.6)] and data.soft_scores((), classes) == []
    )


def test_nlvr2(tmp_path):
    corpus = corpora.load("nlvr2", write(tmp_path, "nlvr2"))
    sizes = {name: len(items) for name, items in corpus.splits.items()}
    assert sizes == {"train": 2, "val": 3, "test": 1, "test_unreleased": 1}
    train, val = corpus.splits["train"], corpus.splits["val"]
    assert [example.label for example in (*train, *val)] == [1, 0, 1, 0, 0]
    assert train[1].images == tuple(tmp_path / f"images/train/12/train-7-1-img{side}.png" for side in (0, 1))
    assert [example.group for example in val] == ["dev-7-1", "dev-7-1", "dev-7-0"] and val[0].text == "Sentence 1."
    assert corpus.finally_evaluated() == ["test", "test_unreleased"]


def test_nlvr1_has_its_picture_in_both_places(tmp_path):
    corpus = corpora.load("nlvr1", write(tmp_path, "nlvr1"))
    first = corpus.splits["train"][0]
    orders = [tmp_path / f"images/dev-1-0-{k}.png" for k in range(3)]
    assert first.images == (orders[0],) * 2 and first.others == ((orders[1],) * 2, (orders[2],) * 2)
    assert [example.label for example in corpus.splits["train"]] == [1, 0] and first.group == "dev-1"
    assert any("both places" in note for note in corpus.notes)


def test_snli_ve(tmp_path):
    corpus = corpora.load("snli_ve", write(tmp_path, "snli_ve"))
    train = corpus.splits["train"]
    assert [example.label for example in train] == [0, 1, 2] and train[1].text == "Hypothesis n."
    assert train[2].images == (tmp_path / "flickr30k-images/11.jpg",) and train[2].example_id == "11.jpg#2r1e"
    assert len(corpus.splits["val"]) == 1 and any("1 hypotheses without a gold label" in note for note in corpus.notes)
    assert "PREMISE" not in repr(corpus.splits)


def test_pictures_of_snli_ve_may_lie_with_flickr30k(tmp_path):
    write(tmp_path / "snli_ve", "snli_ve")
    (tmp_path / "flickr30k").mkdir()
    (tmp_path / "snli_ve/flickr30k-images").rename(tmp_path / "flickr30k/flickr30k-images")
    corpus = corpora.load("snli_ve", tmp_path / "snli_ve")
    assert all(item.images[0].is_file() for items in corpus.splits.values() for item in items)


def test_vcr(tmp_path):
    corpus = corpora.load("vcr", write(tmp_path, "vcr"))
    assert {name: len(items) for name, items in corpus.splits.items()} == {"train": 2, "val": 1, "server_test": 1}
    item = corpus.splits["train"][0]
    assert str(item.question) == "Why is Casey Jessie near car ?" and item.question.tags == (-1, -1, 0, 2, -1, 1, -1)
    assert str(item.answers[1]) == "car answers 1" and item.answers[2].tags == (2, -1, -1)
    assert (item.label, item.rationale_label, item.objects) == (2, 3, ("person", "car", "person"))
    asked, choices, label = item.asked("qar")
    assert [*map(str, asked)] == ["Why is Casey Jessie near car ?", "Jessie answers 2"] and label == 3
    assert choices == item.rationales and item.asked("qa") == ((item.question,), item.answers, 2)
    hidden = corpus.splits["server_test"][0]
    assert hidden.label is None and str(hidden.asked("qar", 3)[0][1]) == "Casey answers 3"
    with pytest.raises(UserError, match="test-0: its right answer is hidden"):
        hidden.asked("qar")


def test_neutral_names_go_by_the_number_of_the_object():
    names = corpora.NEUTRAL_NAMES
    text = corpora.tagged_text([[14], "met", [0, 13]], ["person"] * 15)
    assert text.words == (names[1], "met", names[0], names[0]) and text.tags == (14, -1, 0, 13) and len(names) == 13


def test_boxes_of_vcr_lose_their_confidence(tmp_path):
    item = corpora.load("vcr", write(tmp_path, "vcr")).splits["val"][0]
    assert regions.object_boxes(item, (40, 30)).tolist() == [row[:4] for row in BOXES["boxes"]]
    assert regions.object_boxes(item, (18, 24)).tolist() == [[2, 3, 18, 24], [0, 0, 18, 24], [5, 5, 12, 13]]  # clipped


@pytest.mark.parametrize("boxes", [None, [], [[1, 2, 3, 4, 1]] * 2, [[1, 2, 3, "x", 1]] * 3, [[9, 2, 3, 4, 1]] * 3])
def test_metadata_that_does_not_fit_is_bad(tmp_path, boxes):
    item = corpora.load("vcr", write(tmp_path, "vcr")).splits["val"][0]
    item.metadata.write_text(json.dumps({"boxes": boxes} if boxes is not None else {}))
    with pytest.raises(data.BadImage, match="a@0.json"):
        regions.object_boxes(item, (40, 30))


def test_nocaps(tmp_path):
    corpus = corpora.load("nocaps", write(tmp_path, "nocaps"))
    sizes = {name: len(items) for name, items in corpus.splits.items()}
    assert sizes == {"test": 4, "test_in_domain": 2, "test_near_domain": 1, "test_out_domain": 1, "server_test": 2}
    assert [item.image_id for item in corpus.splits["test_in_domain"]] == [0, 3]
    assert len(corpus.splits["test"][0].captions) == 10 and corpus.splits["server_test"][1].captions == ()
    assert corpus.splits["server_test"][1].image == tmp_path / "test/001.jpg"


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong

NEEDED = {
    ("vqa", "v2_OpenEnded_mscoco_train2014_questions.json", "questions"): "question_id image_id question",
    ("vqa", "v2_OpenEnded_mscoco_test2015_questions.json", "questions"): "question_id image_id question",
    ("vqa", "v2_mscoco_val2014_annotations.json", "annotations"):
        "question_id image_id question_type answer_type multiple_choice_answer answers",
    ("nlvr2", "data/train.json", None): "identifier sentence label directory",
    ("nlvr2", "data/dev.json", None): "identifier sentence label",
    ("nlvr1", "val.jsonl", None): "identifier sentence label images",
    ("snli_ve", "snli_ve_dev.jsonl", None): "Flickr30K_ID pairID gold_label sentence2",
    ("vcr", "val.jsonl", None): "annot_id img_id img_fn metadata_fn objects question answer_choices rationale_choices "
                                "answer_label rationale_label",
    ("nocaps", "nocaps_val_4500_captions.json", "images"): "id file_name",
    ("nocaps", "nocaps_test_image_info.json", "images"): "id file_name",
}  # fmt: skip
CASES = [(*place, field) for place, fields in NEEDED.items() for field in fields.split()]


@pytest.mark.parametrize("wrong", ["missing", 1.5, None, True])
@pytest.mark.parametrize(("name", "file", "rows", "field"), CASES)
def test_a_field_that_is_missing_or_of_another_type_is_named(tmp_path, name, file, rows, field, wrong):
    files = FILES[name]()
    record = (files[file][rows] if rows else files[file])[0]
    if wrong == "missing":
        del record[field]
    else:
        record[field] = wrong
    write(tmp_path, name, files)
    with pytest.raises(UserError) as caught:
        corpora.load(name, tmp_path)
    assert f"`{field}`" in str(caught.value) and file in str(caught.value)


def every(content, **fields):
    rows = next(iter(content.values())) if isinstance(content, dict) else content
    rows[0].update(fields)


Q, A = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
WRONG = {
    "nine answers": ("vqa", A, lambda f: f["annotations"][0]["answers"].pop(), "has 9 answers, not ten"),
    "an answer that is no text": (
        "vqa",
        A,
        lambda f: f["annotations"][1]["answers"][4].update(answer=3),
        "`answer` must be",
    ),
    "a question twice": ("vqa", Q, lambda f: f["questions"].append(f["questions"][0]), "id 1003 occurs 2"),
    "answers twice": ("vqa", A, lambda f: f["annotations"].append(f["annotations"][0]), "1000 has answers already"),
    "a question without answers": ("vqa", A, lambda f: f["annotations"].pop(), "question 1003 has no answers"),
    "answers without a question": ("vqa", Q, lambda f: f["questions"].pop(), "question 1000 is not in"),
    "answers about another picture": (
        "vqa",
        A,
        lambda f: every(f, image_id=7),
        "question 1000 is about image 100, there about 7",
    ),
    "an empty question of VQA": ("vqa", Q, lambda f: every(f, question=" "), "not empty"),
    "half a character": ("vqa", Q, lambda f: every(f, question="\ud800"), "half a Unicode character"),
    "half a character in an answer": (
        "vqa",
        A,
        lambda f: f["annotations"][0]["answers"][2].update(answer="a\ud800"),
        "`answer` holds half a Unicode character",
    ),
    "half a character in a token": ("vcr", "val.jsonl", lambda f: every(f, question=["a\ud800"]), "half a Unicode"),
    "a domain that is no text": (
        "nocaps",
        "nocaps_val_4500_captions.json",
        lambda f: every(f, domain=3),
        "domain of image 0 .*near-domain",
    ),
    "a caption about a list": (
        "nocaps",
        "nocaps_val_4500_captions.json",
        lambda f: f["annotations"][0].update(image_id=[1]),
        "`image_id` must be a whole number",
    ),
    "an empty statement": ("nlvr2", "data/dev.json", lambda f: every(f, sentence=""), "not empty"),
    "no list of questions": ("vqa", Q, lambda f: f.clear(), "has no list `questions`"),
    "an identifier of three parts": ("nlvr2", "data/dev.json", lambda f: every(f, identifier="dev-1-2"), "set-pair"),
    "a statement twice": ("nlvr2", "data/dev.json", lambda f: f.append(f[0]), "id dev-7-0-1 occurs 2"),
    "a label that is no truth": ("nlvr2", "data/dev.json", lambda f: every(f, label="maybe"), "neither True nor"),
    "no picture at all": ("nlvr1", "val.jsonl", lambda f: every(f, images=[]), "`images` is empty"),
    "a picture elsewhere": ("nlvr1", "val.jsonl", lambda f: every(f, images=["../a.png"]), "not below"),
    "a statement of NLVR1 twice": ("nlvr1", "val.jsonl", lambda f: f.append(f[0]), "dev-2-0 occurs 2 times"),
    "an unknown class": (
        "snli_ve",
        "snli_ve_test.jsonl",
        lambda f: every(f, gold_label="perhaps"),
        "gold_label 'perhaps' is not",
    ),
    "an empty hypothesis": ("snli_ve", "snli_ve_test.jsonl", lambda f: every(f, sentence2=" "), "not empty"),
    "a hypothesis twice": ("snli_ve", "snli_ve_test.jsonl", lambda f: f.append(f[0]), "id 13.jpg#2r1n occurs"),
    "a picture of VE elsewhere": (
        "snli_ve",
        "snli_ve_test.jsonl",
        lambda f: every(f, Flickr30K_ID="../../x"),
        "not below",
    ),
    "three answers": ("vcr", "val.jsonl", lambda f: f[0]["answer_choices"].pop(), "`answer_choices` must be four"),
    "a rationale that is text": (
        "vcr",
        "val.jsonl",
        lambda f: f[0]["rationale_choices"].__setitem__(1, "because"),
        "`rationale_choices` must",
    ),
    "an object that is not there": ("vcr", "val.jsonl", lambda f: every(f, question=["Who", [3]]), "names no object"),
    "a tag that is no number": ("vcr", "val.jsonl", lambda f: every(f, question=["Who", {}]), "names no object"),
    "an empty question": ("vcr", "val.jsonl", lambda f: every(f, question=[]), "question: .*not empty"),
    "a fifth answer is right": ("vcr", "val.jsonl", lambda f: every(f, answer_label=4), "must be 0 to 3"),
    "an object of no class": ("vcr", "val.jsonl", lambda f: every(f, objects=["person", 1, "x"]), "class names"),
    "metadata elsewhere": ("vcr", "val.jsonl", lambda f: every(f, metadata_fn="../../a.json"), "not below"),
    "a picture of VCR elsewhere": ("vcr", "val.jsonl", lambda f: every(f, img_fn="/etc/a.jpg"), "not below"),
    "a tagged question twice": ("vcr", "val.jsonl", lambda f: f.append(f[0]), "id val-0 occurs 2 times"),
    "a picture of NoCaps twice": (
        "nocaps",
        "nocaps_val_4500_captions.json",
        lambda f: f["images"].append(f["images"][0]),
        "image 0 occurs 2",
    ),
    "a picture without captions": (
        "nocaps",
        "nocaps_val_4500_captions.json",
        lambda f: f.update(annotations=[a for a in f["annotations"] if a["image_id"]]),
        "image 0 has no caption",
    ),
    "a caption about nothing": (
        "nocaps",
        "nocaps_val_4500_captions.json",
        lambda f: f["annotations"].append({"image_id": 99, "caption": "x"}),
        "image 99, which is not in",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_annotations_are_refused(tmp_path, what):
    name, file, change, message = WRONG[what]
    files = FILES[name]()
    change(files[file])
    write(tmp_path, name, files)
    with pytest.raises(UserError, match=message):
        corpora.load(name, tmp_path)


@pytest.mark.parametrize("name", [name for name in FILES if name != "nocaps"])
def test_a_line_that_is_no_object_is_named(tmp_path, name):
    files = FILES[name]()
    write(tmp_path, name, files)
    file = tmp_path / list(files)[1]
    file.write_text(
        "[1, 2]\n" if isinstance(files[file.relative_to(tmp_path).as_posix()], list) else '{"annotations": [3]}'
    )
    with pytest.raises(UserError, match=f"{file.name}.*an object with"):
        corpora.load(name, tmp_path)
    for broken in ("{", '{"a": ' + "9" * 5000 + "}", "[" * 10**5):  # what Python refuses to read in other ways, too
        file.write_text(broken)
        with pytest.raises(UserError, match=f"{file.name}.*JSON"):
            corpora.load(name, tmp_path)


@pytest.mark.parametrize("name", list(FILES))
def test_text_that_is_not_utf8_is_refused(tmp_path, name):
    write(tmp_path, name)
    for file in list(FILES[name]()):
        (tmp_path / file).write_bytes(b'{"a": "\xff"}')
        break
    with pytest.raises(UserError, match="cannot be read as"):
        corpora.load(name, tmp_path)
    write(tmp_path, name)
    path = tmp_path / file
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a mark that Windows programs write
    corpora.load(name, tmp_path)


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path, name)
    for file in FILES[name]():
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match=f"(missing|cannot be read|no nocaps|none of data)(.|\n)*data.py where {name}"):
        corpora.load(name, tmp_path)
    with pytest.raises(UserError, match=f"data.py where {name}"):
        corpora.load(name, tmp_path / "elsewhere")


@pytest.mark.parametrize(("name", "folder", "split"), [
    ("vqa", "test2015", "server_test"), ("nlvr2", "images/test2", "test_unreleased"), ("vcr", "vcr1images/film_test",
    "server_test"), ("nocaps", "test", "server_test")])  # fmt: skip
def test_a_split_for_the_server_may_lack_its_pictures(tmp_path, name, folder, split):
    """Whoever has only downloaded what has labels can use it: the split is left out, and it is said."""
    write(tmp_path, name)
    (tmp_path / folder).rename(tmp_path / "elsewhere")
    corpus = corpora.load(name, tmp_path)
    assert split not in corpus.splits and any("are in none of" in note for note in corpus.notes)


def test_nothing_to_choose_on_is_not_said_where_nothing_is_trained(tmp_path):
    assert not any("choices" in note for note in corpora.load("nocaps", write(tmp_path, "nocaps")).notes)


def test_a_file_without_records_is_refused(tmp_path):
    write(tmp_path, "snli_ve")
    (tmp_path / "snli_ve_test.jsonl").write_text("\n")
    with pytest.raises(UserError, match="snli_ve_test.jsonl holds no record"):
        corpora.load("snli_ve", tmp_path)


def test_one_picture_is_enough_to_find_the_folder(tmp_path):
    """However few of them are there: what is missing is counted by the check and named by the loaders."""
    files = nlvr2_files()
    files["data/dev.json"] = [files["data/dev.json"][0] | {"identifier": f"dev-{n}-0-0"} for n in range(50)]
    write(tmp_path, "nlvr2", files, leave_out=[p for p in PICTURES["nlvr2"] if "/dev/" in p])
    (tmp_path / "images/dev").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/dev/dev-37-0-img1.png")
    corpus = corpora.load("nlvr2", tmp_path)
    assert corpus.splits["val"][37].images[1].is_file() and not any("none of" in note for note in corpus.notes)


@pytest.mark.parametrize("name", list(FILES))
def test_a_folder_without_any_picture_is_refused(tmp_path, name):
    write(tmp_path, name, leave_out=PICTURES[name])
    with pytest.raises(UserError, match=f"{name}: pictures such as .* are in none of"):
        corpora.load(name, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Samples and batches


@pytest.fixture(scope="module")
def tokenizer():
    return language.Tokenizer.train(["is it a box or a dog ? sentence hypothesis answers because there is"] * 3, 300)


def batches(items, tokenizer, kind=data.Examples, train=False, workers=0, **more):
    samples = kind(items, tokenizer, 32, train=train, **more)
    return samples, list(data.eval_loader(samples, 3, workers))


def test_batches_of_questions(tmp_path, tokenizer):
    corpus = corpora.load("vqa", write(tmp_path, "vqa"))
    _, (first, *_) = batches(corpus.splits["train"], tokenizer, answers=(*corpus.answers, "no"))
    assert (
        first["pixels"].shape == (3, 3, 32, 32) and first["example_id"] == [0, 1, 2] and first["image_id"] == [0, 0, 1]
    )
    assert first["targets"].tolist() == [[1.0, pytest.approx(0.3)]] * 3 and first["labels"].tolist() == [-100] * 3
    text = tokenizer.decode(first["ids"][2][1:])
    assert text == "is it 2 ?" and first["keep_mask"].all() and not first["segments"].any()


def test_batches_of_pairs(tmp_path, tokenizer):
    corpus = corpora.load("nlvr2", write(tmp_path, "nlvr2"))
    _, (batch,) = batches(corpus.splits["val"], tokenizer)
    assert batch["pixels"].shape == (3, 2, 3, 32, 32) and batch["labels"].tolist() == [1, 0, 0]
    reds = [PICTURES["nlvr2"].index(f"images/dev/dev-7-{pair}-img{side}.png") for pair in (0, 1, 0) for side in (0, 1)]
    assert batch["pixels"][:, :, 0, 0, 0].flatten().tolist() == reds


def test_training_draws_an_order_of_the_boxes(tmp_path, tokenizer):
    items = corpora.load("nlvr1", write(tmp_path, "nlvr1")).splits["train"]
    drawn = data.Examples(items, tokenizer, 32, train=True)
    seen = {tuple(int(x[0, 0, 0]) for x in drawn[e, 0]["pixels"]) for e in range(30)}
    assert seen == {(0, 0), (1, 1), (2, 2)}
    still = data.Examples(items, tokenizer, 32)
    assert {int(still[e, 0]["pixels"][0][0, 0, 0]) for e in range(10)} == {0}


def test_a_statement_whose_second_picture_is_missing(tmp_path, tokenizer, capsys):
    """Training leaves it out and counts it; evaluation stops and names the file."""
    missing = "images/dev/dev-7-0-img1.png"
    corpus = corpora.load("nlvr2", write(tmp_path, "nlvr2", leave_out=[missing]))
    samples = data.Examples(corpus.splits["val"], tokenizer, 32, train=True)
    batch = next(iter(data.train_loader(samples, 3, steps=1)))
    assert len(batch["labels"]) == 1 and len(batch["bad"]) == 2 and missing in batch["bad"][0]
    with pytest.raises(UserError, match=missing):
        batches(corpus.splits["val"], tokenizer)


def test_a_question_whose_picture_is_missing(tmp_path, tokenizer):
    missing = "val2014/COCO_val2014_000000000101.jpg"
    corpus = corpora.load("vqa", write(tmp_path, "vqa", leave_out=[missing]))
    with pytest.raises(UserError, match=missing):
        batches(corpus.splits["val"], tokenizer)


def test_pictures_with_sides_in_their_text_are_not_mirrored(tmp_path, tokenizer):
    corpus = corpora.load("vqa", write(tmp_path, "vqa"))
    example = corpus.splits["train"][0]
    striped = np.zeros((30, 40, 3), np.uint8)
    striped[:, 20:] = 255
    Image.fromarray(striped).save(example.images[0], "PNG")

    def right_is_white(example):
        samples = data.Examples([example], tokenizer, 32, train=True, augment="crop+flip")
        return {
            bool(s["pixels"][:, 16, -1].sum() > s["pixels"][:, 16, 0].sum()) for e in range(20) for s in [samples[e, 0]]
        }

    assert right_is_white(example) == {True, False}
    assert right_is_white(replace(example, text="what is on the left ?")) == {True}
    assert right_is_white(replace(example, answers=("right",) * 10)) == {True}


def parts_of(tokenizer, ids):
    """Texts between the special tokens; the last token must be one."""
    parts = [[]]
    for i in ids.tolist():
        parts.append([]) if i == tokenizer.eos else parts[-1].append(i)
    assert parts.pop() == []
    return [tokenizer.backend.decode(part).strip() for part in parts if part]


def test_batches_of_choices(tmp_path, tokenizer):
    corpus = corpora.load("vcr", write(tmp_path, "vcr"))
    items = corpus.splits["train"]
    question = "why is casey jessie near car ?"
    for task, label, asked in (("qa", 2, [question]), ("qar", 3, [question, "jessie answers 2"])):
        _, (batch,) = batches(items, tokenizer, data.Choices, task=task)
        assert batch["ids"].shape[0] == 8 and batch["labels"].tolist() == [label] * 2
        choices = items[0].asked(task)[1]
        for row, choice in zip(range(4), choices, strict=True):
            ids, segments = batch["ids"][row], batch["segments"][row]
            real = batch["keep_mask"][row]
            assert parts_of(tokenizer, ids[real & (segments == 0)]) == asked  # an end token after each
            assert parts_of(tokenizer, ids[real & (segments == 1)]) == [str(choice).lower()]
            assert segments[real][-1] == 1 and not segments[~real].any()
        tags = batch["tags"][0]
        assert tags[0] == -1  # of bos
        named = {int(tag): tokenizer.decode([i for i, t in zip(batch["ids"][0], tags, strict=True) if t == tag])
                 for tag in set(tags.tolist()) - {-1}}  # fmt: skip
        words = {0: "casey", 1: "car", 2: "jessie"}
        assert {k: text.replace(words[k], "").strip() for k, text in named.items()} == dict.fromkeys(words, "")
        assert tags[~batch["keep_mask"][0]].tolist() == [-1] * int((~batch["keep_mask"][0]).sum())


def test_rationales_after_any_answer(tmp_path, tokenizer):
    """What a server that hides the labels wants: all four conditionings."""
    corpus = corpora.load("vcr", write(tmp_path, "vcr"))
    for answer in range(4):
        _, (batch,) = batches(corpus.splits["server_test"], tokenizer, data.Choices, task="qar", answer=answer)
        first = batch["ids"][0][batch["keep_mask"][0] & (batch["segments"][0] == 0)]
        assert parts_of(tokenizer, first)[1].endswith(f"answers {answer}") and batch["labels"].tolist() == [-100]


def test_what_is_cut_first():
    """Question and answer: the longer, on a tie the question. Rationale: it, while longer than both; then the question
    down to one token, then the answer."""

    def cut(*lengths):
        *lengths, most = lengths
        return [len(part) for part in data._cut([[n] * n for n in lengths], most)]

    assert cut(9, 3, 8) == [5, 3] and cut(2, 9, 8) == [2, 6] and cut(5, 5, 9) == [4, 5] and cut(9, 6, 7) == [3, 4]
    assert cut(1, 2, None) == [1, 2] and cut(1, 2, 3) == [1, 2] and cut(3, 0, 2) == [2, 0]
    assert cut(4, 3, 12, 15) == [4, 3, 8] and cut(4, 3, 12, 14) == [4, 3, 7]
    assert cut(4, 3, 12, 12) == [3, 3, 6] and cut(4, 3, 12, 6) == [1, 2, 3] and cut(1, 1, 0, 1) == [1, 0, 0]
    assert cut(1, 0, 1, 1) == [1, 0, 0]
    assert data._cut([[1, 2], [3, 4, 5]], 3) == [[1], [3, 4]]  # from the ends
