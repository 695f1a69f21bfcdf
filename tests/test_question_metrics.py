"""Answers, statements, retrieval: metrics worked out by hand, and the result files that servers take."""

import csv
import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
import eval as scoring
import language
from common import UserError
from language import normalise_answer
from tools import official

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# Normalised answers

MARKS = ';/[]"{}()=+\\_-><@`,?!'


def test_the_table_of_contractions_is_the_published_one():
    """By the digest of the 120 pairs that GT-Vision-Lab/VQA publishes, which are not repeated here."""
    table = language._CONTRACTIONS
    assert len(table) == 120
    pairs = "\n".join(f"{wrong} {right}" for wrong, right in sorted(table.items()))
    published = "b847028bf993545e795d0f95864b82668b85d531cc6ee3525ae719909a2d1e54"
    assert hashlib.sha256(pairs.encode()).hexdigest() == published


@pytest.mark.parametrize("mark", MARKS)
def test_every_mark_goes_or_becomes_a_blank(mark):
    assert normalise_answer(f"x{mark}y") == "x y"
    assert normalise_answer(f"x{mark}y{mark} z") == "xy z", "loose once, it is deleted everywhere"
    assert normalise_answer(f"x{mark}y {mark}z") == "xy z"
    assert normalise_answer(f"x{mark}y{mark}\tz") == "xy z", "a tab is a blank"
    assert normalise_answer(f"x{mark}y\n{mark}z") == "xy z", "and so is a line end"
    assert normalise_answer(f"x{mark}y{mark}\n") == "x y", "but not at the ends, which are stripped first"
    assert normalise_answer(f"1,0x{mark}y") == "10xy", "a number with a comma deletes all marks"


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("", ""),
        ("The", ""),
        ("An a the", ""),
        ("theatre a10", "theatre a10"),
        ("None", "0"),
        ("zero one two three four five six seven eight nine ten eleven", "0 1 2 3 4 5 6 7 8 9 10 eleven"),
        ("someone", "someone"),
        ("3.5", "3.5"),
        ("5.", "5"),
        ("st. louis", "st louis"),
        ("three.five", "threefive"),
        ("a.5", "a.5"),
        ("x" + 32 * "." + "y", "xy"),
        ("x" + 34 * "." + "y", "x..y"),  # the published pattern stops after 32
        ("10:30 50% r&b $5 #1 * man's", "10:30 50% r&b $5 #1 * man's"),
        ("DONT", "don't"),
        ("somebody'd", "somebodyd"),
        ("ow's'at 'ows'at 'ow'sat", "'ow's'at 'ow's'at 'ow's'at"),
        ("its lets Im", "its lets im"),
        ("dont-cant", "don't can't"),
        ("A-b  one.", "b 1"),
    ],
)
def test_normalised_by_hand(raw, normal):
    assert normalise_answer(raw) == normal


@given(st.text(alphabet=MARKS + " ab.1,\n\t'", max_size=14))
def test_marks_are_judged_one_letter_at_a_time(text):
    """The same rule told another way: what becomes of a letter depends on its kind and the whole original text."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    digits = "0123456789"
    comma = any(a in digits and b == "," and c in digits for a, b, c in zip(text, text[1:], text[2:], strict=False))
    padded = list(itertools.pairwise(text))
    kept = ""
    for c in text:
        if c in MARKS:
            kept += "" if comma or (c, " ") in padded or (" ", c) in padded else " "
        else:
            kept += c
    stops = [i for i, c in enumerate(kept) if c == "." and not kept[i + 1 : i + 2].isdigit()][:32]
    kept = "".join(c for i, c in enumerate(kept) if i not in stops)
    assert normalise_answer(text) == " ".join(word for word in kept.split() if word != "a")


# ---------------------------------------------------------------------------------------------------------------------
# VQA


def accuracy_of(prediction, ten):
    return scoring.vqa_accuracy({7: prediction}, {7: ten})[1][7]


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)])
def test_agreeing_people(matches, accuracy):
    ten = ["red"] * matches + ["blue", "green"] * 5
    assert accuracy_of("red", ten[:10]) == pytest.approx(accuracy, abs=1e-12)


def test_unanimous_answers_are_compared_by_the_letter():
    assert accuracy_of("2", ["Two"] * 10) == 0
    assert accuracy_of("Two", ["Two"] * 10) == 1
    assert accuracy_of(" Two\n", ["Two\t"] * 5 + ["\nTwo"] * 5) == 1, "blanks around are no difference"
    assert accuracy_of("2", ["Two\t"] * 5 + ["\nTwo"] * 5) == 0
    assert accuracy_of("2", ["Two"] * 9 + ["two"]) == 1
    assert accuracy_of("Two.", ["2"] * 3 + ["3"] * 7) == pytest.approx(0.9)
    assert scoring.vqa_forms("The A", ["a"] * 9 + ["b"]) == ("", [""] * 9 + ["b"])


def test_means_over_types():
    answers = {1: ["red"] * 10, 2: ["yes"] * 10, 3: ["red"] * 2 + ["blue"] * 8}
    metrics, values = scoring.vqa_accuracy(
        {3: "red", 2: "no", 1: "red"}, answers, {1: "other", 2: "yes/no", 3: "other"}, {1: "what", 2: "is", 3: "is"}
    )
    assert list(values) == [1, 2, 3] and values == pytest.approx({1: 1, 2: 0, 3: 0.6})
    assert metrics == pytest.approx({
        "vqa_accuracy": 1.6 / 3, "vqa_accuracy_other": 0.8, "vqa_accuracy_yes/no": 0, "vqa_accuracy: what": 1,
        "vqa_accuracy: is": 0.3,
    })  # fmt: skip
    assert list(scoring.vqa_accuracy({1: "red"}, {1: ["red"] * 10})[0]) == ["vqa_accuracy"]


@given(st.lists(st.sampled_from(["1", "one", "Two", "2.", "a"]), min_size=10, max_size=10), st.randoms())
def test_the_order_of_people_does_not_matter(ten, rng):
    for said in ("one", "2", ""):
        matches = sum(normalise_answer(text) == normalise_answer(said) for text in ten)
        if len(set(ten)) == 1:
            matches = ten.count(said)
        shuffled = rng.sample(ten, 10)
        assert (
            accuracy_of(said, ten) == pytest.approx(accuracy_of(said, shuffled)) == pytest.approx(min(1, 0.3 * matches))
        )


TEN = ["red"] * 10


@pytest.mark.parametrize(
    ("predictions", "answers", "message"),
    [
        ({1: "red"}, {1: TEN, 2: TEN}, r"1 of 2 questions lack a prediction \(first \[2\]\)"),
        ({1: "red", "1": "red"}, {1: TEN}, r"1 predictions are of other questions \(first \['1'\]\)"),
        ({}, {}, "no predictions to score"),
        ({1: "red"}, {1: TEN[:9]}, r"ten people's; not so of \[1\]"),
        ({1: "red"}, {1: TEN + TEN}, "ten people's"),
        ({1: "red"}, {1: "redredredr"}, "ten people's"),
        ({1: "red"}, {1: [*TEN[:9], 2]}, "ten people's"),
        ({1: 2, 2: None, 3: "red"}, {1: TEN, 2: TEN, 3: TEN}, r"not so of \[1, 2\], 2 in all"),
    ],
)
def test_answers_that_cannot_be_scored(predictions, answers, message):
    with pytest.raises(UserError, match=message):
        scoring.vqa_accuracy(predictions, answers)


def test_types_of_all_questions_or_none():
    for types in ({}, {1: "other", 2: "other"}):
        with pytest.raises(UserError, match="types and predictions must be of the same questions"):
            scoring.vqa_accuracy({1: "red"}, {1: TEN}, types)
        with pytest.raises(UserError, match="types and predictions must be of the same questions"):
            scoring.vqa_accuracy({1: "red"}, {1: TEN}, None, types)


# ---------------------------------------------------------------------------------------------------------------------
# Statements: SNLI-VE, NLVR2, VCR


def test_class_accuracy_by_hand():
    assert scoring.class_accuracy({"b": "neutral", "a": "entailment"}, {"a": "entailment", "b": "entailment"}) == 0.5
    assert scoring.class_accuracy({1: np.int64(2), 2: torch.tensor(1), 3: 0}, {1: 2, 2: 1, 3: 2}) == pytest.approx(
        2 / 3
    )
    with pytest.raises(UserError, match=r"are indices; not so of \[2\]"):
        scoring.class_accuracy({1: 0, 2: 1}, {1: 0, 2: "neutral"})
    with pytest.raises(UserError, match=r"1 of 2 examples lack a prediction \(first \['b'\]\)"):
        scoring.class_accuracy({"a": 1}, {"a": 1, "b": 1})


LABELS = {"dev-1-0-1": "True", "dev-1-1-1": "False", "dev-1-0-0": "False", "dev-2-0-1": "True"}
GROUPS = {"dev-1-0-1": "dev-1-1", "dev-1-1-1": "dev-1-1", "dev-1-0-0": "dev-1-0", "dev-2-0-1": "dev-2-1"}


def test_consistency_by_hand():
    said = {"dev-1-0-1": True, "dev-1-1-1": np.bool_(True), "dev-1-0-0": "false", "dev-2-0-1": "TRUE"}
    assert scoring.nlvr2_metrics(said, LABELS, GROUPS) == {"nlvr2_accuracy": 0.75, "nlvr2_consistency": 2 / 3}
    right = scoring.nlvr2_metrics({**said, "dev-1-1-1": False}, LABELS, GROUPS, name="pairs")
    assert right == {"pairs_accuracy": 1, "pairs_consistency": 1}
    for bad in (0, 1, "yes", None, ""):
        with pytest.raises(UserError, match=r"nlvr2 knows True and False alone; not so of \['dev-1-0-1'\]"):
            scoring.nlvr2_metrics({**said, "dev-1-0-1": bad}, LABELS, GROUPS)
        with pytest.raises(UserError, match="True and False alone"):
            scoring.nlvr2_metrics(said, {**LABELS, "dev-1-0-1": bad}, GROUPS)
    with pytest.raises(UserError, match="1 of 4 examples lack a group"):
        scoring.nlvr2_metrics(said, LABELS, dict(list(GROUPS.items())[:3]))
    with pytest.raises(UserError, match="1 predictions are of other examples"):
        scoring.nlvr2_metrics({**said, "x": True}, LABELS, GROUPS)


ANSWERS = {
    "val-0": [0, 3, 1, 2],
    "val-1": np.array([5.0, 5, 1, 1]),
    "val-2": torch.tensor([0.0, 0, 0, 1]),
    "val-3": [1, 0, 0, 0],
}
RATIONALES = {"val-3": [0, 0, 1, 0], "val-0": [0, 0, 0, 9], "val-1": [0, 1, 1, 0], "val-2": [0, 1, 0, 0]}
ANSWER_LABELS = {"val-0": 1, "val-1": 0, "val-2": 3, "val-3": 2}
RATIONALE_LABELS = {"val-0": 3, "val-1": 2, "val-2": 1, "val-3": 2}


def test_vcr_by_hand():
    """Answers: right, right (first of two), right, wrong. Rationales: right, wrong (first of two), right, right."""
    found = scoring.vcr_metrics(ANSWERS, RATIONALES, ANSWER_LABELS, RATIONALE_LABELS)
    assert found == {"vcr_qa": 0.75, "vcr_qar": 0.75, "vcr_q2ar": 0.5}


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, {"val-1": [1, 2, 3]}, r"needs 4 finite scores; not so of \['val-1'\]"),
        (0, {"val-1": [1, 2, 3, math.nan]}, "finite"),
        (1, {"val-1": [1, 2, 3, -math.inf]}, "finite"),
        (1, {"val-1": None}, "finite"),
        (1, {"val-1": [1, 2, [3], 4]}, "finite"),
        (0, {"val-1": ["a", 2, 3, 4]}, "finite"),
        (1, {"val-9": [1, 2, 3, 4]}, "1 scores are of other questions"),
        (2, {"val-1": 4}, r"labels of VCR are 0, 1, 2 or 3; not so of \['val-1'\]"),
        (3, {"val-1": "2"}, "labels of VCR"),
        (3, {"val-9": 2}, "1 rationale labels are of other questions"),
        (2, {"val-9": 2}, "1 of 5 questions lack a rationale label"),
    ],
)
def test_vcr_refuses(place, change, message):
    given_ones = [ANSWERS, RATIONALES, ANSWER_LABELS, RATIONALE_LABELS]
    given_ones[place] = {**given_ones[place], **change}
    with pytest.raises(UserError, match=message):
        scoring.vcr_metrics(*given_ones)


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


def test_recalls_by_hand():
    """Three images; image 0 has texts 0 and 2, image 1 has 1, image 2 has 3."""
    scores = [[9.0, 8, 1, 7], [2, 3, 4, 8], [5, 4, 0, 6]]
    # text -> image: text 0 finds 0 first (9 of 9 2 5), 1 finds 1 third (3 of 8 3 4), 2 finds 0 second (1 of 1 4 0), 3
    # finds 2 third. image -> text: 0 is first by its text 0; 1's text is third (8 4 3); 2's is first.
    found = scoring.recalls(np.array(scores), np.array([0, 1, 0, 2]))
    assert found == pytest.approx({"R@1": 0.25, "R@5": 1, "R@10": 1, "TR@1": 2 / 3, "TR@5": 1, "TR@10": 1})


def naive(scores, owner):
    """Places counted one comparison at a time."""
    N, M = scores.shape
    sizes = [scores[i, j] for i in range(N) for j in range(M)]
    assert not any(map(math.isnan, sizes))
    places = {"R": [], "TR": []}
    for j in range(M):
        others = [scores[i, j] for i in range(N) if i != owner[j]]
        mine = scores[owner[j], j]
        places["R"].append(1 + sum(x > mine for x in others) + 0.5 * sum(x == mine for x in others))
    for i in range(N):
        mine = max(scores[i, j] for j in range(M) if owner[j] == i)
        others = [scores[i, j] for j in range(M) if owner[j] != i]
        places["TR"].append(1 + sum(x > mine for x in others) + 0.5 * sum(x == mine for x in others))
    return {f"{way}@{k}": np.mean([p <= k for p in places[way]]) for way in places for k in (1, 5, 10)}


@given(st.integers(1, 13), st.integers(0, 20), st.integers(1, 30), st.integers(0, 10**6))
def test_recalls_with_ties_are_counted_one_by_one(N, more, levels, seed):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.concatenate([np.arange(N), rng.integers(0, N, more)]))
    scores = rng.integers(-levels, levels, (N, len(owner))).astype(np.float32)
    expected = pytest.approx(naive(scores, owner), abs=1e-12)
    assert scoring.recalls(scores, owner) == expected
    assert scoring.recalls(torch.tensor(scores).bfloat16(), torch.tensor(owner)) == expected
    assert scoring.recalls(scores.astype(int), owner.tolist()) == expected
    order = rng.permutation(len(owner))
    assert scoring.recalls(scores[:, order], owner[order]) == expected


def test_blocks_of_images_leave_no_seam():
    """More images than one block of the count has, and not a multiple of it."""
    rng = np.random.default_rng(0)
    scores, owner = rng.integers(0, 300, (259, 300)).astype(np.float32), np.arange(300) % 259
    scores[owner, np.arange(300)] += 285
    found = scoring.recalls(scores, owner)
    assert found == pytest.approx(naive(scores, owner)) and 0 < found["R@1"] < found["R@5"] < found["R@10"] < 1


def test_a_constant_scorer_has_found_nothing():
    found = scoring.recalls(torch.zeros(100, 500), torch.arange(500) % 100)
    assert set(found.values()) == {0}
    two = scoring.recalls(torch.zeros(2, 2), torch.arange(2))
    assert (two["R@1"], two["TR@1"], two["R@5"]) == (0, 0, 1), "one and a half is not one"
    three = scoring.recalls(torch.zeros(3, 3), torch.arange(3))
    assert three["R@1"] == 0, "the middle of three"
    sisters = scoring.recalls(torch.tensor([[5.0, 5, 5, 1], [1, 1, 1, 5]]), [0, 0, 0, 1])
    assert sisters["TR@1"] == 1, "an image's own texts do not stand in each other's way"
    filled = scoring.recalls(torch.tensor([[3.0, -math.inf], [-math.inf, -math.inf]]), [0, 1])
    assert filled["R@1"] == 0.5, "-inf is a score: it is tied with -inf"


def test_folds_are_galleries_of_their_own():
    rng = np.random.default_rng(1)
    scores, owner = rng.normal(size=(30, 90)), rng.permutation(np.arange(90) % 30)
    scores[owner, np.arange(90)] += 1
    parts = []
    for first in (0, 10, 20):
        here = (owner >= first) & (owner < first + 10)
        parts.append(naive(scores[first : first + 10, here], owner[here] - first))
    expected = {key: np.mean([part[key] for part in parts]) for key in parts[0]}
    assert scoring.recalls(scores, owner, folds=10) == pytest.approx(expected)
    assert scoring.recalls(scores, owner, folds=30) == scoring.recalls(scores, owner)
    assert expected["R@1"] > scoring.recalls(scores, owner)["R@1"]


def test_two_matrices_one_for_each_direction():
    rng = np.random.default_rng(2)
    by_image, by_text, owner = rng.normal(size=(20, 40)), rng.normal(size=(20, 40)), np.arange(40) // 2
    by_text[owner, np.arange(40)] += 1
    for folds in (None, 10):
        both = scoring.recalls(by_image, owner, folds, text_scores=by_text)
        image, text = scoring.recalls(by_image, owner, folds), scoring.recalls(by_text, owner, folds)
        assert both == {key: (text if key.startswith("R") else image)[key] for key in image}
        assert list(both) == list(image) and image["R@5"] != text["R@5"] and image["TR@5"] != text["TR@5"]


@pytest.mark.parametrize(
    ("scores", "owner", "folds", "more"),
    [
        (torch.tensor([[1.0, math.nan], [0, 1]]), [0, 1], None, {}),
        (torch.eye(2), [0, 1], None, {"text_scores": torch.tensor([[1.0, 0], [math.nan, 1]])}),
        (torch.eye(2), [0, 1], None, {"text_scores": torch.eye(3)}),
        (torch.eye(2), [0, 2], None, {}),
        (torch.eye(2), [0, 0], None, {}),
        (torch.eye(2), [0, -1], None, {}),
        (torch.eye(2), [0, 1, 1], None, {}),
        (torch.eye(4), range(4), 3, {}),
        (torch.eye(4), range(4), 8, {}),
        (torch.eye(4), range(4), -2, {}),
        (torch.zeros(4), range(4), None, {}),
        (torch.zeros(2, 2, 2), [[0, 1], [1, 0]], None, {}),
        (torch.zeros(0, 0), torch.zeros(0, dtype=torch.long), None, {}),
    ],
)
def test_scores_that_cannot_be_ranked(scores, owner, folds, more):
    with pytest.raises(UserError, match="retrieval takes scores"):
        scoring.recalls(scores, list(owner), folds, **more)


# ---------------------------------------------------------------------------------------------------------------------
# Result files


def test_vqa_results(tmp_path):
    official.write_vqa_results(tmp_path / "a.json", {np.int64(42000): "crème brûlée", 1: ""})
    text = (tmp_path / "a.json").read_text("utf-8")
    assert "crème" in text
    assert json.loads(text) == [{"question_id": 42000, "answer": "crème brûlée"}, {"question_id": 1, "answer": ""}]


def test_nlvr2_results(tmp_path):
    official.write_nlvr2_results(tmp_path / "a.csv", {"dev-1-0-1": True, "dev-1-1-1": np.bool_(False), "b-0": "false"})
    assert (tmp_path / "a.csv").read_text() == "dev-1-0-1,True\ndev-1-1-1,False\nb-0,False\n"


def test_ve_results(tmp_path):
    official.write_ve_results(tmp_path / "a.jsonl", {"1.jpg#2r1c": "neutral", "2.jpg#0r1e": "entailment"})
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{"pairID": "1.jpg#2r1c", "label": "neutral"}, {"pairID": "2.jpg#0r1e", "label": "entailment"}]


def test_vcr_results(tmp_path):
    answers = {"test-1": [0, math.log(2), 0, 0], "test-0": [1000, 0, 0, -1000]}
    given_each = np.log([[1, 1, 1, 2], [1, 1, 3, 1], [1, 4, 1, 1], [5, 1, 1, 1]])
    official.write_vcr_results(tmp_path / "a.csv", answers, {"test-0": torch.zeros(4, 4), "test-1": given_each})
    with open(tmp_path / "a.csv", newline="") as file:
        one, two = rows = list(csv.DictReader(file))
    assert list(one) == [
        "annot_id", "answer_0", "answer_1", "answer_2", "answer_3",
        "rationale_conditioned_on_a0_0", "rationale_conditioned_on_a0_1", "rationale_conditioned_on_a0_2",
        "rationale_conditioned_on_a0_3", "rationale_conditioned_on_a1_0", "rationale_conditioned_on_a1_1",
        "rationale_conditioned_on_a1_2", "rationale_conditioned_on_a1_3", "rationale_conditioned_on_a2_0",
        "rationale_conditioned_on_a2_1", "rationale_conditioned_on_a2_2", "rationale_conditioned_on_a2_3",
        "rationale_conditioned_on_a3_0", "rationale_conditioned_on_a3_1", "rationale_conditioned_on_a3_2",
        "rationale_conditioned_on_a3_3",
    ]  # fmt: skip
    assert [row.pop("annot_id") for row in rows] == ["test-1", "test-0"]
    fifths = [[1, 2, 1, 1], [1, 1, 1, 2], [1, 1, 3, 1], [1, 4, 1, 1], [5, 1, 1, 1]]
    assert [float(p) for p in one.values()] == pytest.approx([x / sum(row) for row in fifths for x in row])
    assert [float(p) for p in two.values()] == pytest.approx([1, 0, 0, 0] + [0.25] * 16)


GIVEN = np.zeros((4, 4))


@pytest.mark.parametrize(
    ("write", "results", "message"),
    [
        (official.write_vqa_results, [{}], "no answers to write"),
        (official.write_vqa_results, [{1: "a", "2": "b"}], r"answers of \['2'\] are not text, under whole numbers"),
        (official.write_vqa_results, [{1.5: "a"}], "whole numbers"),
        (official.write_vqa_results, [{True: "a"}], "whole numbers"),
        (official.write_vqa_results, [{1: "a", 2: None}], r"answers of \[2\]"),
        (official.write_vqa_results, [{1: "\ud800"}], "cannot be written"),
        (official.write_nlvr2_results, [{}], "no predictions to write"),
        (official.write_nlvr2_results, [{"dev-1-0-1": 1}], r"predictions of \['dev-1-0-1'\] are not True or False"),
        (official.write_nlvr2_results, [{"dev,1": True}], "identifiers such as"),
        (official.write_nlvr2_results, [{"dev-1\n": True}], "identifiers such as"),
        (official.write_nlvr2_results, [{1: True}], "identifiers such as"),
        (official.write_ve_results, [{}], "no labels to write"),
        (official.write_ve_results, [{"1.jpg#2r1c": "maybe"}], "are not contradiction, neutral or entailment"),
        (official.write_ve_results, [{"1.jpg#2r1c": 0}], "are not contradiction"),
        (official.write_ve_results, [{1: "neutral"}], "pairID"),
        (official.write_vcr_results, [{}, {}], "no scores to write"),
        (official.write_vcr_results, [{"a,b": [0] * 4}, {"a,b": GIVEN}], "identifiers such as"),
        (official.write_vcr_results, [{1: [0] * 4}, {1: GIVEN}], "identifiers such as"),
        (official.write_vcr_results, [{"val-7": [0] * 3}, {"val-7": GIVEN}], "4 finite scores"),
        (official.write_vcr_results, [{"val-7": [0, 0, 0, math.nan]}, {"val-7": GIVEN}], "4 finite scores"),
        (official.write_vcr_results, [{"val-7": [0] * 4}, {"val-7": GIVEN[0]}], "4 x 4 finite scores"),
        (official.write_vcr_results, [{"val-7": [0] * 4}, {}], "lack a rationale score"),
        (official.write_vcr_results, [{"val-7": [0] * 4}, {"val-7": GIVEN, "val-8": GIVEN}], "of other questions"),
    ],
)
def test_results_that_a_server_would_refuse(tmp_path, write, results, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "results", *results)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("write", [official.write_vqa_results, official.write_nlvr2_results])
def test_results_are_whole_or_absent(tmp_path, write):
    results = {1: "2"} if write is official.write_vqa_results else {"dev-0-0-0": True}
    write(tmp_path / "results", results)
    assert [file.name for file in tmp_path.iterdir()] == ["results"]
    with pytest.raises(UserError, match="a folder that exists"):
        write(tmp_path / "nowhere" / "results", results)


# ---------------------------------------------------------------------------------------------------------------------
# The official programs, behind eval.py


def test_photographs_are_scored_by_the_official_programs_too(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "a.jpg")
    items = [data.Item(i, tmp_path / "a.jpg", ("a dog", "a blue dog")) for i in (1, 2)]
    corpus = data.Corpus("photographs", {"test": items})
    asked = []

    def programs(hyps, refs):
        asked.append((hyps, refs))
        return {"METEOR": 0.25}, ["no SPICE: today"]

    monkeypatch.setattr(official, "official_caption_metrics", programs)
    for is_asked in (True, False):
        splits, columns = scoring.evaluate_captions(
            corpus, lambda items: {item.image_id: "a dog" for item in items}, tmp_path, official=is_asked
        )
        assert ("official" in splits["test"], "test, official" in columns) == (is_asked, is_asked)
    assert asked == [({1: "a dog", 2: "a dog"}, {item.image_id: item.captions for item in items})]
    assert capsys.readouterr().out == "note: no SPICE: today\n"


def test_the_command_runs_from_any_folder(tmp_path):
    """As does the import that evaluation makes, of a folder that is no package."""
    command = [sys.executable, str(ROOT / "tools" / "score.py"), "captions", "none.json", "none.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: none.json cannot be read"), done.stderr
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; import eval; from tools import official; print(eval.same_ids is "
    done = subprocess.run(
        [sys.executable, "-c", code + "official.same_ids)"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "True\n", done.stderr
