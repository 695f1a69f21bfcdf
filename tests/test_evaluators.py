"""Evaluators: every test split once, whatever the number of processes, beside its controls and result files."""

import difflib
import json
import math
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import corpora
import data
import eval as scoring
import language
import scenes
from scenes import Truth
from tools import judge, official

N = 7  # odd, so that processes have unequal shares


@pytest.fixture(scope="module")
def tokenizer():
    return language.Tokenizer.train(["what is one picture shows object"] * 3, 300)


def one_hot(k, n):
    return [float(j == k) for j in range(n)]


def looks(corpus):
    """predict(items) of a program that reads the scenes of the pictures that it is given."""

    def scores(item):
        scene = item.images[0]
        if corpus.answers:
            said = language.normalise_answer(scenes.answer(item.text, scene) or "no")  # None: not to be seen there
            return [corpus.answers.index(said) if said in corpus.answers else 0]
        if len(item.images) == 2:
            return one_hot(scenes.pair_is_true(item.text, *item.images) is Truth.TRUE, 2)
        return one_hot(scenes.ENTAILMENT[scenes.is_true(item.text, scene)], 3)

    return lambda items: {item.example_id: scores(item) for item in items}


def load(task, n=60, **more):
    return corpora.load(
        "scenes", task=task, world="full" if task == "ve" else "tiny", n_train=600, n_val=n, n_test=n, **more
    )


@pytest.mark.parametrize(("task", "metric", "chance", "file"), [
    ("vqa", "vqa_accuracy", 0.6, "vqa_test.json"), ("nlvr2", "nlvr2_accuracy", 0.8, "nlvr2_test.csv"),
    ("ve", "ve_accuracy", 0.7, "ve_test.jsonl"),
])  # fmt: skip
def test_a_program_that_looks(tmp_path, task, metric, chance, file):
    """It is right, and no longer where the pictures are permuted; the majority is at chance."""
    corpus = load(task)
    splits, columns = scoring.evaluate_examples(corpus, looks(corpus), tmp_path)
    assert list(splits) == ["test", "test_compositional"]
    for split, name in (("test", "test"), ("test_compositional", "test_compositional")):
        metrics, controls = splits[split]["metrics"], splits[split]["controls"]
        assert metrics == columns[name] and set(controls) == {"shuffled_images", "majority"}
        assert metrics[metric] > (0.85 if task == "vqa" else 0.999), metrics  # annotators disagree now and then
        assert controls["shuffled_images"][metric] < chance
        assert controls["shuffled_images"] == columns[f"{name}, shuffled"]
        assert controls["majority"] == columns[f"{name}, majority"]
    if task == "ve":
        assert controls["majority"][metric] == pytest.approx(1 / 3)
    if task == "nlvr2":
        assert metrics["nlvr2_consistency"] == 1 and controls["majority"]["nlvr2_consistency"] == 0
        assert controls["majority"][metric] == 0.5
    assert (tmp_path / "samples.png").stat().st_size > 10_000
    assert (tmp_path / file).read_text().count("\n") >= 1 and (
        tmp_path / file.replace("test", "test_compositional")
    ).exists()


def test_the_result_file_of_questions_holds_the_answers(tmp_path):
    corpus = load("vqa", n=12)
    scoring.evaluate_examples(corpus, looks(corpus), tmp_path)
    rows = json.loads((tmp_path / "vqa_test.json").read_text())
    said = {row["question_id"]: row["answer"] for row in rows}
    ten = {item.example_id: item.answers for item in corpus.splits["test"]}
    assert scoring.vqa_accuracy(said, ten)[0]["vqa_accuracy"] > 0.8 and len(rows) == 12


def test_choices(tmp_path):
    corpus = load("vcr", n=20)
    right = {(item.question, item.answers, item.images): (item.label, item.rationale_label)
             for items in corpus.splits.values() for item in items}  # fmt: skip

    def predict(items, task, answer):
        """Of other pictures the first."""
        assert answer is None
        found = {item.example_id: right.get((item.question, item.answers, item.images), (0, 0)) for item in items}
        return {i: one_hot(labels[task == "qar"], 4) for i, labels in found.items()}

    splits, _ = scoring.evaluate_examples(corpus, predict, tmp_path)
    metrics, controls = splits["test"]["metrics"], splits["test"]["controls"]
    assert metrics == {"vcr_qa": 1, "vcr_qar": 1, "vcr_q2ar": 1}
    assert controls["shuffled_images"]["vcr_q2ar"] < 0.5 and controls["majority"]["vcr_qa"] < 0.6
    assert not (tmp_path / "vcr_test.csv").exists()  # rationales were asked for given the right answer alone


def test_hidden_splits_get_their_result_files_only(tmp_path):
    """Of choices all four conditionings are asked for, in the leaderboard's 20 columns."""
    full = load("vcr", n=6)
    items = [replace(item, label=None, rationale_label=None) for item in full.splits["test"]]
    corpus = data.Corpus("vcr", {"val": list(full.splits["val"]), "server_test": items})
    asked = []

    def predict(items, task, answer):
        asked.append((len(items), task, answer))
        return {item.example_id: [0.0, 1.0, 2.0, float(3 * (answer or 0))] for item in items}

    splits, columns = scoring.evaluate_examples(corpus, predict, tmp_path)
    assert list(splits) == ["val"] and not any("server" in name for name in columns)
    assert asked[-5:] == [(6, "qa", None), *((6, "qar", k) for k in range(4))]
    lines = (tmp_path / "vcr_server_test.csv").read_text().splitlines()
    assert len(lines) == 7 and lines[0].startswith("annot_id,answer_0") and lines[1].count(",") == 20
    row = np.array(lines[1].split(",")[1:], dtype=float).reshape(5, 4)
    assert row.sum(1) == pytest.approx(1) and row[4].argmax() == 3 and row[0].argmax() == row[1].argmax() == 2


def test_hidden_questions(tmp_path):
    corpus = load("vqa", n=12)
    hidden = [replace(item, answers=()) for item in corpus.splits["test"]]
    corpus = data.Corpus("vqa", {"val": corpus.splits["val"], "server_test": hidden}, answers=corpus.answers)
    splits, _ = scoring.evaluate_examples(corpus, lambda items: {i.example_id: [1] for i in items}, tmp_path)
    assert list(splits) == ["val"] and len(json.loads((tmp_path / "vqa_server_test.json").read_text())) == 12


def test_dev_is_reported_beside_test(tmp_path):
    items = list(load("nlvr2", n=8).splits["test"])
    corpus = data.Corpus("nlvr2", {"val": items[:4], "test": items[4:]})
    splits, columns = scoring.evaluate_examples(corpus, looks(corpus), tmp_path)
    assert list(splits) == ["test", "val"] and "test, majority" not in columns  # without train no majority


def test_result_files_do_not_tell_the_order_of_processes(tmp_path):
    corpus = load("nlvr2", n=8)
    corpus = data.Corpus("nlvr2", {"test": corpus.splits["test"]})
    predict = looks(corpus)
    scoring.evaluate_examples(corpus, predict, tmp_path)
    first = (tmp_path / "nlvr2_test.csv").read_text()
    scoring.evaluate_examples(corpus, lambda items: dict(reversed(predict(items).items())), tmp_path)
    assert (tmp_path / "nlvr2_test.csv").read_text() == first
    corpus, found = data.Corpus("scenes", {"test": load("caption", n=5).splits["test"]}), []
    for back in (False, True):
        hyps = {i: f"there is a {c} circle" for i, c in enumerate(("red", "blue", "green", "black", "yellow"))}
        hyps = dict(reversed(hyps.items())) if back else hyps
        found.append(scoring.evaluate_captions(corpus, lambda items, h=hyps: h, tmp_path)[0])
        found.append((tmp_path / "captions_test.json").read_text())
    assert found[0] == found[2] and found[1] == found[3]


@pytest.mark.parametrize("scores", [torch.zeros(2, 1), torch.tensor([[0.0, torch.nan]] * 2)])
def test_scores_that_say_nothing_are_refused(scores):
    from common import UserError

    with pytest.raises(UserError, match="scores must be finite, and of two classes or more"):
        scoring.predict_split(lambda batch: scores, [{"example_id": [0, 1]}])


def test_nlvr1_is_named_so(tmp_path):
    corpus = load("nlvr2", n=8)
    corpus = data.Corpus("nlvr1", {"test": corpus.splits["test"]})
    splits, _ = scoring.evaluate_examples(corpus, looks(corpus), tmp_path)
    assert splits["test"]["metrics"] == {"nlvr1_accuracy": 1, "nlvr1_consistency": 1}


def test_captions_of_hidden_and_overlapping_splits(tmp_path):
    """NoCaps: domains are scored apart; of the hidden test only the result file is written."""
    items = list(load("caption", n=6).splits["test"])
    hidden = [replace(item, captions=()) for item in items[:2]]
    corpus = data.Corpus("nocaps", {"test": items, "test_in_domain": items[:3], "server_test": hidden})
    asked = []

    def caption(items):
        asked.append(len(items))
        return {item.image_id: "a thing" for item in items}

    hidden = [replace(item, image=scenes.make_scene("tiny", "val", n)) for n, item in enumerate(hidden)]
    corpus.splits["server_test"] = hidden
    splits, columns = scoring.evaluate_captions(corpus, caption, tmp_path)
    assert "constant" not in columns and set(splits["test"]["controls"]) == {"shuffled_images"}  # no train
    assert asked == [6, 2]  # a domain is part of the whole: its captions are known
    assert list(splits) == ["test", "test_in_domain"]
    assert [row["image_id"] for row in json.loads((tmp_path / "captions_server_test.json").read_text())] == [0, 1]


def test_other_pictures():
    """Every text has another picture; a choice one with as many objects, so that its tags name something."""
    items = list(load("vcr", n=40).splits["test"])
    others = scoring.with_other_pictures(items)
    assert [item.example_id for item in others] == [item.example_id for item in items]
    assert {item.image_ids for item in others} == {item.image_ids for item in items}
    for item, other in zip(items, others, strict=True):
        assert len(other.images[0].objects) == len(item.images[0].objects) and other.question == item.question
    assert sum(item.images == other.images for item, other in zip(items, others, strict=True)) == 0
    pairs = [replace(item, others=((item.images),)) for item in load("nlvr2", n=8).splits["test"]]
    for pair, other in zip(pairs, scoring.with_other_pictures(pairs), strict=True):
        assert other.images != pair.images and other.others == (other.images,) and other.label == pair.label


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


def gallery_of(corpus, noise=0.0):
    """gallery(items, texts) by a program that knows which scenes a caption is true of."""

    def gallery(items, texts):
        table = judge.truth_table(items, texts)
        return {item.image_id: row + noise for item, row in zip(items, table.astype(np.float32), strict=True)}

    return gallery


def test_retrieval_on_scenes(tmp_path):
    corpus = load("caption", n=30)
    splits, columns = scoring.evaluate_retrieval(corpus, gallery_of(corpus), tmp_path, n_captions=1)
    metrics = splits["test"]["metrics"]
    assert metrics["true@1"] == 1 and metrics["R@1"] <= metrics["R@1_ceiling"] < 1 and metrics == columns["test"]
    texts = [item.captions[0] for item in corpus.splits["test"]]
    of = [sum(scenes.is_true(text, item.image) is Truth.TRUE for item in corpus.splits["test"]) for text in texts]
    assert metrics["R@1_ceiling"] == pytest.approx(np.mean([1 / n for n in of]))
    blind = splits["test"]["controls"]["shuffled_images"]
    assert blind["true@1"] < 0.5 and blind["R@1_ceiling"] == metrics["R@1_ceiling"]
    assert (tmp_path / "samples.png").exists() and list(splits) == ["test", "test_compositional"]


def test_folds_and_first_captions(tmp_path):
    """Two folds of four: named by their size, beside the whole gallery; only the first captions are texts."""
    items = [data.Item(i, scenes.make_scene("tiny", "test", i), tuple(f"{i} {k}" for k in range(7))) for i in range(8)]
    corpus, seen = data.Corpus("coco", {"test": items}), []

    def gallery(items, texts):
        seen.extend(texts)
        # right within the first and the second half, never across: the picture four further on scores more
        scores = np.array(
            [[2.0 * ((i + 4) % 8 == int(text[0])) + (i == int(text[0])) for text in texts] for i in range(8)]
        )
        return dict(zip(range(8), scores, strict=True))

    splits, _ = scoring.evaluate_retrieval(corpus, gallery, tmp_path, n_captions=5, fold=4)
    metrics = splits["test"]["metrics"]
    assert len(seen) == 40 and seen[:5] == [f"0 {k}" for k in range(5)]
    assert metrics["R@1"] == 0 and metrics["R@5"] == 1 and metrics["R@1 of 4"] == 1 and metrics["TR@1 of 4"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def process(rank, world, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo")
    tokenizer = language.Tokenizer.train(["what is one picture shows object"] * 3, 300)
    questions, corpus = load("vqa", n=N), load("caption", n=N)
    told = {}
    for n_classes in (3, 10):  # scores, or the best class only
        samples = data.Examples(questions.splits["test"], tokenizer, 16)
        loader = data.eval_loader(samples, 2, 0, rank, world)
        table = torch.arange(n_classes).repeat(N, 1) * torch.tensor([(-1) ** i for i in range(N)])[:, None]
        told[n_classes] = scoring.predict_split(lambda batch, t=table: t[batch["example_id"]], loader)
    pictures = data.Pictures(corpus.splits["test"], None, 16)
    loader = data.eval_loader(pictures, 2, 0, rank, world)
    told["gallery"] = scoring.score_gallery(
        lambda batch: torch.tensor(batch["image_id"]), lambda texts: torch.tensor([len(text) for text in texts]),
        lambda seen, some: seen[:, None] * 100 + some, loader, ["a", "bb", "ccc"], chunk=2)  # fmt: skip
    torch.save({k: {i: list(map(float, row)) for i, row in found.items()} for k, found in told.items()},
               folder / f"{world}-{rank}.pt")  # fmt: skip
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_knows_the_exact_split(tmp_path, world):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, args=(world, tmp_path, port), nprocs=world)
    for rank in range(world):
        told = torch.load(tmp_path / f"{world}-{rank}.pt")
        assert sorted(told[3]) == sorted(told[10]) == list(range(N))
        assert told[3][1] == [0, -1, -2] and told[3][2] == [0, 1, 2] and told[10][1] == [0] and told[10][2] == [9]
        assert {i: row for i, row in told["gallery"].items()} == {i: [100 * i + k for k in (1, 2, 3)] for i in range(N)}


def test_the_majority_is_that_of_train():
    """Not of the split that is scored: the most frequent answer in the vocabulary, label, and rationale."""
    items = [data.Example(i, (0,), ("a.jpg",), "is it ?", answers=("no",) * 3 + ("dog",) * 7) for i in range(4)]
    test = [replace(item, example_id=9 + i, answers=("yes",) * 10) for i, item in enumerate(items)]
    corpus = data.Corpus("vqa", {"train": items, "test": test}, answers=("yes", "no"))
    assert scoring.majority(corpus, test) == [dict.fromkeys(range(9, 13), [1])]
    items = [replace(item, answers=(), label=k) for item, k in zip(items, (1, 0, 1, 1), strict=True)]
    corpus = data.Corpus("ve", {"train": items, "test": test})
    assert scoring.majority(corpus, test) == [dict.fromkeys(range(9, 13), [0, 1, 0, 0])]
    choices = list(load("vcr", n=4).splits["test"])
    labelled = [replace(item, label=3, rationale_label=2) for item in choices]
    corpus = data.Corpus("vcr", {"train": labelled, "test": choices})
    assert [table["0"] for table in scoring.majority(corpus, choices, 2)] == [[0, 0, 0, 1], [0, 0, 1, 0]]


def test_class_of_scores():
    assert scoring.class_of([7]) == 7 and scoring.class_of([0.1, 0.9, 0.9]) == 1


def test_result_files_choose_the_form_of_the_task(tmp_path):
    corpus = load("ve", n=6)
    items = list(corpus.splits["test"])
    official.write_example_results(
        tmp_path, "test", corpus, items, {item.example_id: [1.0, 0.0, 0.5] for item in items}
    )
    rows = [json.loads(line) for line in (tmp_path / "ve_test.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0] == {"pairID": "0", "label": "contradiction"}


# ---------------------------------------------------------------------------------------------------------------------
# Image-text matching


def photographs(tmp_path, *captions):
    """Items of pictures that nobody opens: their names are their numbers."""
    return [data.Item(k, tmp_path / f"{k}.jpg", said) for k, said in enumerate(captions)]


def test_pairs_of_photographs(tmp_path):
    """Each picture once with its first caption and once with the first caption of another, the same every time."""
    items = photographs(tmp_path, *((f"first of {k}", f"second of {k}") for k in range(80)))
    pairs = scoring.pairs_of(items)
    assert [pair.label for pair in pairs] == [1, 0] * 80 and len({pair.example_id for pair in pairs}) == 160
    for k, (right, wrong) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        assert right.image_ids == wrong.image_ids == (k,) and right.images == wrong.images == (items[k].image,)
        assert right.text == f"first of {k}" != wrong.text and wrong.text.startswith("first of")
    assert scoring.pairs_of(items) == pairs
    drawn = [pair.text for pair in pairs[1::2]]
    assert len(set(drawn)) > 35, "any other picture, not always the same one"
    assert scoring.pairs_of(items[:1]) == [], "alone it has no other"
    two = scoring.pairs_of(items[:2])
    assert [pair.text for pair in two] == ["first of 0", "first of 1", "first of 1", "first of 0"]


def test_no_text_of_its_own_is_wrong_for_a_picture(tmp_path):
    """Not that of the same picture under another name, nor one that it shares, however it is written; pictures without
    captions take no part."""
    items = photographs(tmp_path, ("A dog.", "one animal"), (), ("a dog", "a cat"), ("One animal",))
    items.append(replace(items[0], image_id=4, captions=("its twin",)))
    may_be = {0: set(), 1: set(), 2: {"One animal", "its twin"}, 3: {"A dog.", "a dog", "its twin"},
              4: {"a dog", "One animal"}}  # fmt: skip
    found = {k: set() for k in may_be}
    for other in range(0, 400, 10):  # other names, other luck
        pairs = scoring.pairs_of([replace(item, image_id=item.image_id + other) for item in items])
        assert [pair.image_ids[0] - other for pair in pairs] == [2, 2, 3, 3, 4, 4]
        for pair in pairs[1::2]:
            found[pair.image_ids[0] - other].add(pair.text)
    assert found == may_be


@pytest.mark.parametrize("world", ["tiny", "full"])
def test_pairs_of_scenes_are_true_and_false(world):
    """Never unknown, which in the full world, whose panel hides things, many captions are of other scenes. Edited: the
    picture's own caption with a word changed, and its article."""
    items = list(corpora.load("scenes", task="caption", world=world, n_train=2, n_val=2, n_test=60).splits["test"])
    pairs, edited = scoring.pairs_of(items), scoring.pairs_of(items, edited=True)
    for some in (pairs, edited):
        assert len(some) > 80 and [pair.label for pair in some] == [1, 0] * (len(some) // 2)
        for pair in some:
            assert scenes.is_true(pair.text, pair.images[0]) is (Truth.TRUE if pair.label else Truth.FALSE)
    for pair in edited[1::2]:
        own = next(item.captions[0] for item in items if item.image_id == pair.image_ids[0])
        words = [[w for w in scenes.normalise(text).split() if w not in ("a", "an")] for text in (own, pair.text)]
        parts = difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes()
        assert sum(part != "equal" for part, *_ in parts) == 1
    firsts = {item.captions[0] for item in items}
    assert {pair.text for pair in pairs} <= firsts and not {pair.text for pair in edited[1::2]} <= firsts
    assert scoring.pairs_of(items) == pairs and scoring.pairs_of(items, True) == edited


def tells(pairs):
    """predict of a program that reads the scenes that it is given."""
    return {pair.example_id: one_hot(scenes.is_true(pair.text, pair.images[0]) is Truth.TRUE, 2) for pair in pairs}


def test_matching_is_scored_as_a_share_of_the_pairs():
    items = list(load("caption", n=8).splits["test"])
    pairs, edited = scoring.pairs_of(items), scoring.pairs_of(items, True)
    assert scoring.score_pairs(pairs, tells) == {"itm_accuracy": 1.0}
    always = lambda some: {pair.example_id: [0.0, 1.0] for pair in some}  # noqa: E731
    assert scoring.score_pairs(pairs, always, edited) == {"itm_accuracy": 0.5, "itm_accuracy_edited": 0.5}
    only_first = lambda some: tells(some) if some is pairs else always(some)  # noqa: E731
    assert scoring.score_pairs(pairs, only_first, edited) == {"itm_accuracy": 1.0, "itm_accuracy_edited": 0.5}
    assert scoring.score_pairs([], None) == {}


def test_matching_on_every_test_split(tmp_path):
    """A program that looks is right, and no longer where pictures are permuted. Photographs have no edited texts."""
    corpus = load("caption", n=40)
    splits, columns = scoring.evaluate_pairs(corpus, tells)
    assert list(splits) == ["test", "test_compositional"]
    for split, found in splits.items():
        blind = found["controls"]["shuffled_images"]
        assert found["metrics"] == columns[split] == {"itm_accuracy": 1.0, "itm_accuracy_edited": 1.0}
        assert blind == columns[f"{split}, shuffled"] and blind.keys() == found["metrics"].keys()
        assert all(0.4 < value < 0.75 for value in blind.values())
    asked = []
    assert scoring.evaluate_pairs(corpus, lambda some: asked.append(len(some)) or tells(some), False) == ({}, {})
    assert len(asked) == 8, "every process takes its part"
    photos = data.Corpus("coco", {"test": photographs(tmp_path, *((f"of {k}",) for k in range(6)))})
    right = lambda some: {p.example_id: one_hot(p.text == f"of {p.images[0].stem}", 2) for p in some}  # noqa: E731
    splits, _ = scoring.evaluate_pairs(photos, right)
    assert splits["test"]["metrics"] == {"itm_accuracy": 1.0}
    assert splits["test"]["controls"]["shuffled_images"]["itm_accuracy"] < 1


def test_a_gallery_of_the_first_pictures(tmp_path):
    corpus, asked = load("caption", n=30), []

    def gallery(items, texts):
        asked.append(([item.image_id for item in items], len(texts)))
        return gallery_of(corpus)(items, texts)

    splits, columns = scoring.evaluate_retrieval(corpus, gallery, tmp_path, n_captions=1, most=12)
    first = [item.image_id for item in corpus.splits["test"]][:12]
    assert asked[0] == (first, 12) and splits["test"]["metrics"]["gallery"] == 12
    assert columns["test, shuffled"]["gallery"] == 12
    assert splits["test"]["metrics"]["R@10"] > 10 / 12 - 1e-9
    splits, _ = scoring.evaluate_retrieval(corpus, gallery, tmp_path, n_captions=1, most=100)
    assert splits["test"]["metrics"]["gallery"] == 30 and asked[2][1] == 30
    splits, _ = scoring.evaluate_retrieval(corpus, gallery, tmp_path, n_captions=1)
    assert "gallery" not in splits["test"]["metrics"] and asked[4][1] == 30


def test_several_galleries_one_after_another(tmp_path):
    """Means over them, and half of the 95 % interval: t(4) s / sqrt(5) for five."""
    corpus, asked = load("caption", n=30), []

    def gallery(items, texts):  # of the k-th gallery the first k texts find their picture
        asked.append([item.image_id for item in items])
        scores = np.zeros((len(items), len(texts)))
        scores[np.arange(len(items)), np.arange(len(items))] = [1.0] * len(asked) + [-1.0] * (len(items) - len(asked))
        return dict(zip(asked[-1], scores, strict=True))

    corpus.splits = {"test": corpus.splits["test"]}
    splits, _ = scoring.evaluate_retrieval(corpus, gallery, tmp_path, n_captions=1, most=6, galleries=5)
    ids = [item.image_id for item in corpus.splits["test"]]
    assert asked == [ids[k : k + 6] for k in range(0, 30, 6)]
    found = splits["test"]["metrics"]
    shares = np.array([1, 2, 3, 4, 5]) / 6
    assert found["R@1"] == pytest.approx(shares.mean()) and found["gallery"] == 6
    assert found["R@1 +-"] == pytest.approx(2.776 * shares.std(ddof=1) / math.sqrt(5))
    asked.clear()
    splits, _ = scoring.evaluate_retrieval(corpus, gallery, tmp_path, n_captions=1, most=8, galleries=9)
    assert len(asked) == 3, "the last six fill no gallery"
    assert scoring.evaluate_retrieval(corpus, gallery, tmp_path, False, 1, most=6, galleries=2) == ({}, {})
