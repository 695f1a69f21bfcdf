"""What every model file asks of its model (tools/exam.py), what users ask of one (tools/ask.py), what a run says when
it is over (tools/finish.py): with a model that knows everything, and one that knows nothing."""

import json
from types import SimpleNamespace

import pytest
import torch

import common
import corpora
import data
import language
import regions
from common import UserError
from tools import ask, exam, finish

MACHINE = common.Machine(torch.device("cpu"), torch.float32, 0, 1, 0, "test")


class Knows(torch.nn.Module):
    """Looks things up in the items that it is asked about: captions, pictures and texts as vectors, answers."""

    def __init__(self):
        super().__init__()
        self.items, self.beams = {}, []

    def caption_batch(self, batch, beam):
        assert not self.training and not torch.is_grad_enabled()
        self.beams.append(beam)
        return [self.items[i].captions[0] for i in batch["image_id"]]

    def encode_images(self, batch):
        return self.encode_texts([self.items[i].captions[0] for i in batch["image_id"]])

    def encode_texts(self, texts):
        assert not self.training and not torch.is_grad_enabled()
        known = sorted({item.captions[0] for item in self.items.values()})
        return torch.tensor([[float(text == word) for word in known] for text in texts])

    def answer_scores(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        if "targets" in batch:
            return batch["targets"] + 0.0
        return torch.nn.functional.one_hot(batch["labels"], 4).float()


def asked(task):
    corpus = corpora.load("scenes", task=task if task in ("vqa", "vcr") else "caption", n_train=200, n_val=6, n_test=6)
    model, calls = Knows(), []
    tok = language.Tokenizer.train(["a red circle is left of it"] * 3, 400, "wordpiece")

    def samples(items, **more):
        calls.append(more)
        if hasattr(items[0], "captions"):
            model.items = {item.image_id: item for item in items}
        if task == "vcr":
            return data.Choices(items, tok, 8, regions=regions.SceneRegions(), **more)
        kind = data.Examples if task == "vqa" else data.Pictures
        return kind(items, tok, 8, regions=regions.SceneRegions(),
                    **({"answers": corpus.answers} if task == "vqa" else {}))  # fmt: skip

    return exam.Exam(task, model.train(), corpus, MACHINE, samples), corpus, calls


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "caption", "scst", "vqa", "vcr"])
def test_on_val_asks_what_the_task_is_about(task):
    one, corpus, calls = asked(task)
    val = one.on_val(list(corpus.splits["val"]))
    assert exam.BEST_BY[task] in val
    if task in ("pretrain", "retrieval"):
        distinct = len({item.captions[0] for item in corpus.splits["val"]})
        assert val["R@1"] == pytest.approx(1.0) if distinct == 6 else val["R@1"] > 0.4
        assert not one.model.beams
    if task in ("caption", "scst"):
        assert val["caption_true"] == 1.0 and set(one.model.beams) == {1}, "val is greedy"
    if task == "vqa":
        known = [set(item.answers) <= set(corpus.answers) for item in corpus.splits["val"]]
        assert val["vqa_accuracy"] >= 0.99 * sum(known) / 6
    if task == "vcr":
        assert val["vcr_q2ar"] == 100 or val["vcr_q2ar"] == 1.0
        assert calls == [{"task": "qa"}, {"task": "qar"}]


class Says:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def a_run(tmp_path, *steps):
    for step in steps:
        (tmp_path / f"step_{step}").mkdir()
    return common.Run(tmp_path)


def test_validate_moves_best_only_to_what_is_better(tmp_path):
    """It looks at the first val items, of which `best` is chosen, and writes down that it has looked."""
    run, log, cfg = a_run(tmp_path, 1, 2, 3), Says(), SimpleNamespace(val_items=4)
    (tmp_path / "last").symlink_to("step_3")
    knows, corpus, _ = asked("caption")
    looked = []
    knows.on_val = lambda items: looked.append([item.image_id for item in items]) or {"CIDEr_D": 2.0, "BLEU_4": 0.5}
    assert knows.validate(cfg, run, log, 1, -1.0) == 2.0
    assert looked == [[item.image_id for item in corpus.splits["val"][:4]]]
    assert (tmp_path / "best").resolve().name == "step_1" and "best so far" in log.lines[0]
    assert log.lines[0].startswith("val at step 1: CIDEr_D 2.000  BLEU_4 0.500")
    assert common.read_json(tmp_path / "step_1" / "meta.json") == {
        "step": 1, "val": {"CIDEr_D": 2.0, "BLEU_4": 0.5}, "best": 2.0, "is_due": False}  # fmt: skip
    knows.on_val = lambda items: {"CIDEr_D": 1.0}
    (tmp_path / "step_2").mkdir(exist_ok=True)
    assert knows.validate(cfg, run, log, 2, 2.0) == 2.0
    assert (tmp_path / "best").resolve().name == "step_1" and "best so far" not in log.lines[1]
    knows.on_val = lambda items: {"CIDEr_D": 2.0}
    (tmp_path / "step_3").mkdir(exist_ok=True)
    assert knows.validate(cfg, run, log, 3, 2.0) == 2.0
    assert (tmp_path / "best").resolve().name == "step_3", "of equals the later"
    assert [r["step"] for r in common.read_log(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_without_val_the_last_is_the_best(tmp_path):
    run, log = a_run(tmp_path, 4), Says()
    (tmp_path / "last").symlink_to("step_4")
    knows, corpus, _ = asked("caption")
    del corpus.splits["val"]
    assert knows.validate(SimpleNamespace(val_items=4), run, log, 4, 7.0) == 7.0
    assert (tmp_path / "best").resolve().name == "step_4" and not log.lines


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "caption", "vqa", "vcr"])
def test_the_final_exam(tmp_path, task):
    """Every test split with its controls; the pictures that belong to it; captions by beam search."""
    one, corpus, _ = asked(task)
    splits, columns = one.final(tmp_path, 3, False, 1)
    assert set(splits) == {"test", "test_compositional"} and {"test", "test, shuffled"} <= set(columns)
    metrics, files = splits["test"]["metrics"], {path.name for path in tmp_path.iterdir()}
    assert exam.BEST_BY[task] in metrics and "shuffled_images" in splits["test"]["controls"]
    assert "samples.png" in files and ("ranking.png" in files) == (task == "pretrain")
    if task == "pretrain":
        assert {"R@1", "caption_true"} <= set(metrics) and set(one.model.beams) == {3}
        shuffled = splits["test"]["controls"]["shuffled_images"]
        assert {"R@1", "caption_true"} <= set(shuffled) and "constant_caption" in splits["test"]["controls"]
        assert {"R@1", "caption_true"} <= set(columns["test"])
    if task == "retrieval":
        assert not one.model.beams and "caption_true" not in metrics


def test_tables_are_joined_level_by_level():
    table = {"test": {"metrics": {"R@1": 1}, "controls": {"shuffled": {"R@1": 0}}}}
    exam._join(table, {"test": {"metrics": {"BLEU": 2}, "controls": {"shuffled": {"BLEU": 3}, "x": {"BLEU": 4}}},
                       "val": {"metrics": {}}})  # fmt: skip
    assert table == {"test": {"metrics": {"R@1": 1, "BLEU": 2}, "controls": {
        "shuffled": {"R@1": 0, "BLEU": 3}, "x": {"BLEU": 4}}}, "val": {"metrics": {}}}  # fmt: skip


class Matches(Knows):
    """It tells which texts belong to a picture: no vectors, but whatever `match` takes; it may forget all pictures."""

    tok, is_blind = None, False

    def encode_images(self, batch):
        return [self.items[i].captions[0] for i in batch["image_id"]]

    def encode_texts(self, texts):
        return list(texts)

    def match(self, images, texts):
        assert not self.training and not torch.is_grad_enabled()
        return torch.tensor([[float(a == b and not self.is_blind) for b in texts] for a in images])

    def answer_scores(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        said = {i: self.tok.encode(language.clean_caption(item.captions[0])) for i, item in self.items.items()}
        rows = [ids[keep][1:-1].tolist() for ids, keep in zip(batch["ids"], batch["keep_mask"], strict=True)]
        return torch.tensor([[0.5, float(said[i] == row and not self.is_blind)]
                             for i, row in zip(batch["image_id"], rows, strict=True)])  # fmt: skip


def matching(most=0):
    corpus = corpora.load("scenes", task="caption", n_train=200, n_val=9, n_test=9)
    model, asked = Matches(), []
    told = (text for item in corpus.splits["train"] for text in item.captions)
    model.tok = language.Tokenizer.train(map(language.clean_caption, told), 600, "wordpiece")
    del corpus.splits["test_compositional"]

    def samples(items, **more):
        asked.append(list(items))
        kind = data.Examples if isinstance(items[0], data.Example) else data.Pictures
        return kind(items, model.tok, 8, regions=regions.SceneRegions(), **more)

    return exam.Exam("itm", model.train(), corpus, MACHINE, samples, most), asked


def test_matching_is_chosen_by_its_pairs(tmp_path):
    """On val the pairs alone: right, and half right where the pictures are not looked at."""
    one, asked = matching()
    val = list(one.corpus.splits["val"])
    one.model.items = {item.image_id: item for item in val}
    assert one.on_val(val) == {"itm_accuracy": 1.0, "itm_accuracy_edited": 1.0}
    assert exam.BEST_BY["itm"] == "itm_accuracy"
    assert [example.example_id for example in asked[0]] == [f"{k}-{n}" for k in range(9) for n in (1, 0)]
    one.model.is_blind = True
    assert one.on_val(val) == {"itm_accuracy": 0.5, "itm_accuracy_edited": 0.5}
    one.more = lambda self, items: {"more": len(items)}
    assert one.on_val(val)["more"] == 9 and one.on_val(val[:1]) == {}, "one picture has no pairs"


def test_the_final_exam_of_matching(tmp_path):
    """Pairs, edited texts, and the ranking of as many pictures as a gallery has, in one table."""
    one, asked = matching(4)
    one.model.items = {item.image_id: item for item in one.corpus.splits["test"]}
    splits, columns = one.final(tmp_path, 3, False, 1)
    found, blind = splits["test"]["metrics"], splits["test"]["controls"]["shuffled_images"]
    assert found["itm_accuracy"] == found["itm_accuracy_edited"] == 1.0 and found["gallery"] == 4 and "R@1" in found
    assert {"itm_accuracy", "itm_accuracy_edited", "R@1", "gallery"} <= set(blind) and blind["itm_accuracy"] < 1
    assert columns == {"test": found, "test, shuffled": blind} and set(splits) == {"test"}
    assert len(asked[0]) == 4 and len(asked[1]) == 18
    assert (tmp_path / "samples.png").exists() and not (tmp_path / "ranking.png").exists()


def test_a_gallery_of_val_has_its_size_too():
    one, asked = matching(4)
    one.task = "retrieval"
    val = list(one.corpus.splits["val"])
    one.model.items = {item.image_id: item for item in val}
    assert one.on_val(val)["R@1"] > 0.4 and asked == [val[:4]]
    one.gallery_of = 0
    one.on_val(val)
    assert asked[1] == val


def test_what_matches_is_scored_by_the_model_itself():
    """`match`, in the autocast of the run, where there is one, and not the product of vectors."""
    one, _ = matching()
    items, seen = list(one.corpus.splits["test"])[:3], []
    one.model.items = {item.image_id: item for item in items}
    original = one.model.match
    one.model.match = lambda *two: seen.append(torch.is_autocast_enabled("cpu")) or original(*two).bfloat16()
    one.machine = common.Machine(torch.device("cpu"), torch.bfloat16, 0, 1, 0, "test")
    rows = one.gallery(items, [items[1].captions[0], "x"])
    assert seen == [True] and {str(row.dtype) for row in rows.values()} == {"float32"}
    assert [rows[item.image_id].tolist() for item in items] == [[0, 0], [1, 0], [0, 0]]


# What users ask


class Model(ask.Verbs):
    lm_head, ism, answers = True, True, ("yes", "no", "two")

    def __init__(self, **more):
        self.cfg = SimpleNamespace(task="vqa", regions="files", data="scenes", world="tiny", max_regions=2, beam=3,
                                   max_len=4, **more)  # fmt: skip
        self.tokenizer = language.Tokenizer.train(["is it a red circle"] * 3, 300, "wordpiece")
        self.seen = []

    def parameters(self):
        return iter([torch.zeros(1)])  # which tell the device

    def caption_batch(self, batch, beam):
        self.seen.append((len(batch["regions"]), beam))
        return ["said"]

    def encode_images(self, batch):
        return torch.tensor([[0.6, 0.8]])

    def encode_texts(self, texts):
        return torch.tensor([[1.0, 0.0]])

    def answer_scores(self, batch):
        self.seen.append((batch["ids"], len(batch["regions"]), batch["keep_mask"].all().item()))
        return torch.tensor([[0.1, 0.2, 0.7]])


def test_verbs():
    model = Model()
    assert model.caption("test:0") == "said" and model.caption("test:0", 1) == "said"
    assert model.seen == [(1, 3), (1, 1)]
    assert model.score("test:0", "x") == pytest.approx(0.6)
    model.seen.clear()
    assert model.answer("test:0", "Is it a RED circle.") == "two"
    tok, (ids, pictures, whole) = model.tokenizer, model.seen[0]
    wanted = [tok.bos, *tok.encode("is it a red circle")[:4], tok.eos]
    assert ids.tolist() == [wanted] and pictures == 1 and whole
    for lacking, verb, told in (
        ("lm_head", lambda m: m.caption("test:0"), "no captions: take a run of --task pretrain"),
        ("ism", lambda m: m.score("test:0", "x"), "no similarities: take a run"),
        ("answers", lambda m: m.answer("test:0", "x"), "no answers: take a run of --task vqa"),
    ):
        model = Model()
        setattr(model, lacking, ())
        with pytest.raises(UserError, match=told):
            verb(model)


# The end of a run


def test_what_a_run_says_at_its_end(tmp_path, capsys):
    for task, go_on in (("pretrain", "--caption PICTURE --init"), ("vqa", "--ask PICTURE QUESTION --init"),
                        ("vcr", "--eval-only"), ("retrieval", "--score PICTURE TEXT --init"),
                        ("itm", "--score PICTURE TEXT --init"), ("caption", "--caption PICTURE --init")):  # fmt: skip
        (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "lr": 0.1}) + "\n")
        columns = {"test": {"caption_true": 0.9, "true@1": 0.5}, "test, shuffled": {"caption_true": 0.1, "true@1": 0.2}
                   } if task == "pretrain" else {"test": {"x": 0.5}}  # fmt: skip
        finish.tell(columns, common.Run(tmp_path), task, 0.0, "my.py")
        told = capsys.readouterr().out
        assert f"go on: python my.py {go_on} {tmp_path}" in told and "metrics.json: this table" in told
        assert ("of the captions are true" in told) == (task == "pretrain") and "seconds in all" in told
        ranks = "50% of the scenes ranked first make the caption true, 20% with shuffled pictures: hardly a ranking"
        assert (ranks in told) == (task == "pretrain")
        shows = {"vqa": "answers", "vcr": "answers", "retrieval": "the texts they were ranked for",
                 "itm": "the texts they were ranked for"}.get(task, "captions")  # fmt: skip
        assert f"samples.png: test pictures with {shows}\n" in told
    assert (tmp_path / "curves.png").exists()


def test_scores_of_a_gallery_are_no_bf16_products():
    """Of two pictures that only float32 tells apart, the nearer one is first."""
    test, model, _ = asked("retrieval")
    near = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 2**-7]])  # as 1 + 2^-7 is, their products with the text are too fine

    class Two(Knows):
        def encode_images(self, batch):
            return near[: len(batch["image_id"])].bfloat16()

        def encode_texts(self, texts):
            return torch.tensor([[1.0, 2**-6]]).bfloat16()

    test.model, test.machine = Two(), common.Machine(torch.device("cpu"), torch.bfloat16, 0, 1, 0, "test")
    items = list(test.corpus.splits["test"])[:2]
    rows = test.gallery(items, ["x"])
    first, second = (float(rows[item.image_id][0]) for item in items)
    assert first > second and first == 1 + 2**-6


def test_one_question_at_a_time(capsys):
    for argv in (["--caption", "a", "--score", "b", "c"], ["--ask", "a", "b", "--eval-only"]):
        given, command = common.parse_flags(common.RunConfig, argv, "x.py", ask.COMMANDS)
        with pytest.raises(UserError, match="give one of them at a time"):
            ask.answer_commands(command, given, None, "tden", [], lambda cfg: None)


def test_a_model_without_a_decoder_gives_no_captions():
    with pytest.raises(UserError, match="no decoder"):
        type("Model", (ask.Verbs,), {"lm_head": 1})().caption("a.jpg")


def test_what_best_is_chosen_by():
    """NLVR's first version has metrics of its own name."""
    asked = exam.Exam("nlvr2", None, data.Corpus("nlvr1", {}), None, None)
    assert (asked.best_by, exam.Exam("nlvr2", None, data.Corpus("nlvr2", {}), None, None).best_by) == (
        "nlvr1_accuracy", "nlvr2_accuracy")  # fmt: skip


def test_what_is_found_in_all_batches(monkeypatch):
    machine = common.Machine(torch.device("cpu"), torch.float32, 0, 1, 0, "")
    asked = exam.Exam("itm", None, data.Corpus("x", {}), machine, None)
    monkeypatch.setattr(exam.Exam, "batches", lambda self, items: iter(items))
    assert asked.collect(lambda batch: {batch, batch + 1}, [3, 8, 3]) == {3, 4, 8, 9}
