"""tools/negatives.py: what ViLTA writes and fills in, as a page and as numbers."""

import base64
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import papers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import data
import vilta
from common import UserError
from tools import judge, negatives

HOSTILE = 'red circle <script>alert(1)</script> & "x" <b onclick=\'y\'>'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("negatives") / "run"
    papers.run("vilta", *papers.toy("vilta"), "--out", path)
    return path


@pytest.fixture(scope="module")
def model(run):
    return negatives.load(str(run), "cpu")


@pytest.fixture(scope="module")
def items(model):
    return negatives.pictures_of(model.cfg, "test", 8)[1]


@pytest.fixture(scope="module")
def seen(model, items):
    return negatives.look(model, items)


@pytest.fixture(scope="module")
def made(run):
    negatives.main([str(run), "--pictures", "5"])
    return Page((run / "negatives.html").read_text("utf-8"))


def variant(run, path, drop=(), **values):
    """A copy of the run's best checkpoint with other settings, and without the tensors of some parts."""
    best, step = (run / "best").resolve(), path / "step_1"
    step.mkdir(parents=True)
    common.write_json(path / "config.json", {**common.read_json(run / "config.json"), **values})
    state = load_file(best / "model.safetensors")
    save_file({name: x for name, x in state.items() if not name.startswith(drop)}, step / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_meta.json"):
        shutil.copy(best / name, step)
    return path


def own_data(folder, captions, name="own.jsonl"):
    for i in range(len(captions)):
        Image.new("RGB", (50 + 10 * i, 40), (255, 60 * i, 0)).save(folder / f"{i}.png")
    rows = [{"image": f"{i}.png", "caption": caption, "split": "test"} for i, caption in enumerate(captions)]
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


class Page(HTMLParser):
    """Tags that close one another, the text, and what is marked; anything else is an error."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.source, self.open, self.tags, self.pictures, self.text, self.within = source, [], Counter(), [], "", {}
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag not in ("img", "meta"):
            self.open.append(tag)
            self.within.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        for tag in self.open:
            self.within[tag][-1] += data


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_holds_what_was_asked_for(made, items):
    assert len(made.pictures) == made.tags["article"] == 5 and made.tags["table"] == 5
    assert not re.search(r"https?:|<link|<script|url\(", made.source)  # nothing from a network
    assert [picture["alt"] for picture in made.pictures] == [item.captions[0] for item in items[:5]]
    for picture in made.pictures:
        kind, coded = picture["src"].split(",")
        image = Image.open(io.BytesIO(base64.b64decode(coded)))
        assert kind == "data:image/png;base64" and image.format == "PNG" and image.size == (160, 160)
    assert made.tags["tr"] == 5 * (1 + negatives.BEST) and made.tags["th"] == 2 * 5  # teacher and model
    assert "cd+hn: 5 of 5 captions rewritten" in made.text and "color-scheme: light dark" in made.source
    assert made.tags["mark"] == made.tags["del"] >= 5


def test_what_is_printed(run, tmp_path, capsys):
    negatives.main([str(run / "best"), "--out", str(tmp_path / "new" / "a.html"), "--split", "val", "--pictures", "2"])
    told, where = capsys.readouterr().out.splitlines()
    assert re.match(r"cd\+hn: 2 of 2 captions rewritten \(100%\), of these \d+% false, .*; ITM is right on ", told)
    assert where == f"-> {tmp_path / 'new' / 'a.html'}"
    assert told in Page((tmp_path / "new" / "a.html").read_text("utf-8")).text


def test_marks_stand_where_ids_differ_and_only_there(model):
    tok = model.tokenizer
    old, new = tok.encode("a red circle and a blue square"), tok.encode("a red square and a green star")
    assert len(old) == len(new) == 7  # whole words
    assert negatives.marked(tok, old, new) == ("a red <del>circle</del> <mark>square</mark> and a "
                                               "<del>blue square</del> <mark>green star</mark>")  # fmt: skip
    assert negatives.marked(tok, old, old) == "a red circle and a blue square"
    one, two = model.words_first.nonzero()[:2, 0].tolist()  # where a text begins no blank stands before a word
    first = negatives.marked(tok, [one, *old[1:3]], [two, *old[1:3]])
    assert first == f"<del>{tok.decode([one])}</del> <mark>{tok.decode([two])}</mark> red circle"


def test_marks_of_what_was_written(model, seen):
    tok = model.tokenizer
    for one in seen:
        page = Page(negatives.marked(tok, one.ids, one.written))
        changed = [new for old, new in zip(one.ids, one.written, strict=True) if old != new]
        assert changed and " ".join(page.within["mark"]).split() == tok.decode(changed).split()
        html = negatives.marked(tok, one.ids, one.written)
        assert re.sub("<del>.*?</del> |</?mark>", "", html) == tok.decode(one.written)
        assert re.sub(" <mark>.*?</mark>|</?del>", "", html) == tok.decode(one.ids) == one.caption


def test_everything_is_escaped(run, model, tmp_path):
    path = own_data(tmp_path, [HOSTILE, "a green square", "a blue & <i>small</i> star"], "<i>&amp;.jsonl")
    negatives.main([str(run), "--data", str(path), "--out", str(tmp_path / "page.html"), "--seed", "2"])
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    assert not {"script", "i"} & page.tags.keys() and "<script" not in page.source
    assert page.pictures[0]["alt"] == HOSTILE and page.within["p"][2].startswith(HOSTILE)
    assert page.within["h1"][0].endswith("(<i>&amp;, test)") and page.within["title"] == page.within["h1"]
    assert "judged" not in page.text and "false" not in page.text  # nobody can judge photographs
    assert len(page.pictures) == 3 and all(picture["width"] == "160" for picture in page.pictures)


def test_words_of_the_vocabulary_are_escaped(model):
    tok = model.tokenizer
    ids, sign = tok.encode("a <b> red & star"), tok.backend.token_to_id("<")
    other = [tok.backend.token_to_id("&") if i == tok.backend.token_to_id("Ġred") else i for i in ids]
    p = torch.zeros(model.cfg.vocab_size)
    p[sign], p[tok.mask] = 0.9, 0.1
    row = negatives.Seen(Image.new("RGB", (9, 9)), "<p>", 0.5, ids, other, 0.5, "<false>", ids.index(sign), p, p)
    page = Page(negatives.article(tok, row, True))
    assert not {"p>", "false"} & page.tags.keys() and page.within["mark"] == ["&"]
    assert "<b><" not in page.source and "<false" not in page.source  # which a lenient reader takes for text
    assert page.within["td"] == ["<", "0.900", "<", "0.900", "<mask>", "0.100", "<mask>", "0.100"]
    assert page.within["b"] == ["<", "<", "<"] and page.pictures[0]["alt"] == "<p>"


def test_pictures_are_large_enough_and_not_larger():
    for S, side in ((64, 160), (200, 200), (576, 288)):
        pixels = torch.zeros(3, S, S, dtype=torch.uint8)
        pixels[0, : S // 2] = 200  # red above
        shown = negatives.as_shown(pixels)
        assert shown.size == (side, side)
        assert shown.getpixel((5, 5)) == (200, 0, 0) and shown.getpixel((5, side - 5)) == (0, 0, 0)


def test_the_summary_by_hand():
    def one(p, written=None, p_written=0.0, verdict=""):
        return negatives.Seen(None, "", p, [1], written, p_written, verdict)

    rows = [one(0.9, [2], 0.8, "false"), one(0.4, [2], 0.1, "true"), one(0.7), one(0.9, [2], 0.3, "unparsable"),
            one(0.1, [2], 0.4, "false")]  # fmt: skip
    assert negatives.summary(rows, "hn", True) == (
        "hn: 4 of 5 captions rewritten (80%), of these 50% false, 25% true, 0% unknown, 25% unparsable; ITM is right "
        "on 3 of 5 captions and 3 of 4 negatives, accuracy on these pairs 0.625")
    assert negatives.summary(rows[2:3], "cd", False) == "cd: ITM is right on 1 of 1 captions"


# ---------------------------------------------------------------------------------------------------------------------
# What it shows


def test_probabilities_are_those_of_the_model(model, items, seen):
    for item, one in zip(items, seen, strict=True):
        assert one.p == pytest.approx(model.score(item.image, item.captions[0]), abs=1e-5)
        written = model.tokenizer.decode(one.written)
        assert one.p_written == pytest.approx(model.score(item.image, written), abs=1e-5)
        assert one.verdict == judge.verdict(written, item.image)
    assert not model.training and not any(p.grad is not None for p in model.parameters())


def test_a_picture_is_looked_at_alone_and_luck_follows_from_the_seed(model, items, seen):
    again = negatives.look(model, items[:2])
    for a, b in zip(again, seen, strict=False):
        assert (a.written, a.hidden, a.p, a.p_written) == (b.written, b.hidden, b.p, b.p_written)
    other = negatives.look(model, items, 1)
    assert any(a.written != b.written for a, b in zip(other, seen, strict=True))
    assert any(a.hidden != b.hidden for a, b in zip(other, seen, strict=True))


def test_the_hidden_word_and_its_candidates(model, items, seen):
    for item, one in zip(items, seen, strict=True):
        own, rows = one.ids[one.hidden], model.tokenized([item.captions[0]])
        words = rows["ids"][model.content_words(rows["ids"], rows["keep_mask"])].tolist()
        some = [word for word in words if negatives.synonyms_of(model.tokenizer, word)]
        assert own in (some or words)
        rows["ids"][0, one.hidden + 1] = model.tokenizer.mask
        where = rows["ids"] == model.tokenizer.mask
        q = model.teacher(rows["ids"], rows["keep_mask"], where)[0].softmax(0)
        with torch.no_grad():
            p = model.fill(model._look(item.image), rows["ids"], rows["keep_mask"], where)[0].softmax(0)
        torch.testing.assert_close(one.teacher, q)
        torch.testing.assert_close(one.student, p)
        best = negatives.candidates(one.student)
        assert len(best) == 5 and [x for _, x in best] == sorted((x for _, x in best), reverse=True)
        assert best[0] == (p.argmax().item(), pytest.approx(p.max().item()))
        assert sum(x for _, x in negatives.candidates(one.student, 10**6)) == pytest.approx(1, abs=1e-4)
        shown = Page(negatives.table_of(model.tokenizer, one)).within
        times = sum(i == own for p in (one.teacher, one.student) for i, _ in negatives.candidates(p))
        assert shown["b"] == [model.tokenizer.decode([own])] * (1 + times)


def test_candidates_by_hand():
    p = torch.tensor([0.125, 0.5, 0.0, 0.375])
    assert negatives.candidates(p) == [(1, 0.5), (3, 0.375), (0, 0.125)]  # what has none is no candidate
    assert negatives.candidates(p, 1) == [(1, 0.5)]


def test_the_teacher_is_shown_as_the_loss_has_it(model, items, seen):
    usual = model.cfg
    try:
        model.cfg = replace(usual, teacher_topk=2, teacher_temperature=3.0)
        one = negatives.look(model, items[:1])[0]
        best, two = negatives.candidates(one.teacher), negatives.candidates(seen[0].teacher, 2)
        assert [i for i, _ in best] == [i for i, _ in two] and best[0][1] < two[0][1] / (two[0][1] + two[1][1])
        table = Page(negatives.table_of(model.tokenizer, one)).within["td"]
        assert len(table) == 20 and table[8:10] == ["", ""] and table[10] and one.teacher.sum() == pytest.approx(1)
        model.cfg = replace(usual, teacher_input="unmasked")
        assert not torch.equal(negatives.look(model, items[:1])[0].teacher, seen[0].teacher)
    finally:
        model.cfg = usual


def test_the_teacher_sees_no_picture(model, items, seen):
    (one,) = negatives.look(model, [replace(items[0], image=items[1].image)])
    assert torch.equal(one.teacher, seen[0].teacher) and not torch.equal(one.student, seen[0].student)


def test_captions_of_which_nothing_can_be_done(model):
    (one,) = negatives.look(model, [data.Item(0, Image.new("RGB", (40, 30)), ("the of 12",))])
    assert one.written is None and one.hidden is None and one.student is None and one.verdict == ""
    page = Page(negatives.article(model.tokenizer, one, True))
    assert "No word of this caption could be rewritten" in page.text and "is hidden: none is" in page.text
    assert not {"mark", "table"} & page.tags.keys()


@pytest.mark.parametrize(("arm", "drop", "columns"), [
    ("cd", (), 2), ("hn", ("teacher.",), 1), ("baseline", ("teacher.",), 1)])  # fmt: skip
def test_other_arms(run, tmp_path, arm, drop, columns):
    path = variant(run, tmp_path / arm, drop, arm=arm)
    negatives.main([str(path), "--pictures", "2"])
    page = Page((path / "negatives.html").read_text("utf-8"))
    assert page.tags["table"] == 2 and page.tags["th"] == 2 * columns
    assert ("no teacher" in page.text) == (columns == 1) == ("teacher, text alone" not in page.text)
    assert ("mark" in page.tags) == ("rewritten" in page.text) == (arm == "hn")
    assert ("writes no negatives" in page.text) == (arm != "hn")
    assert "could be rewritten" not in page.text and f"{arm}: " in page.text


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(("flags", "message"), [
    (["--split", "tst"], "did you mean test"), (["--pictures", "0"], "--pictures 0: give 1 or more"),
    (["--seed", "-1"], "--seed -1: give 0 or more"), (["--data", "cocoo"], "did you mean coco"),
    (["--data", "vqa"], "has questions, no captions"), (["--data", "coco", "--root", "nowhere"], "or --root for")])
def test_what_cannot_be_is_said(run, tmp_path, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        negatives.main([str(run), "--out", str(tmp_path / "page.html"), *flags])
    assert not (tmp_path / "page.html").exists()


def test_runs_that_cannot_be_shown(run, tmp_path):
    with pytest.raises(UserError, match="not a run directory.*take a run of vilta.py --task pretrain"):
        negatives.main([str(tmp_path)])
    with pytest.raises(UserError, match="is a run of soho.py, not of vilta.py: take a run of vilta.py"):
        negatives.main([str(variant(run, tmp_path / "soho", model="soho"))])
    with pytest.raises(UserError, match=r"of --task vqa, which neither .*take a run .*began with \(runs/first\)"):
        negatives.main([str(variant(run, tmp_path / "vqa", task="vqa", init="runs/first"))])
    with pytest.raises(UserError, match="gone.jsonl cannot be read: .*\nOther pictures with captions: --data"):
        negatives.main([str(variant(run, tmp_path / "gone", data=str(tmp_path / "gone.jsonl")))])


def test_where_nothing_can_be_written(run, tmp_path):
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        negatives.main([str(run), "--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"a\.html cannot be written \(.*\): choose another place with --out FILE"):
        negatives.main([str(run), "--pictures", "1", "--out", str(tmp_path / "file" / "a.html")])


def test_a_split_without_captions(model, monkeypatch):
    splits = {"test": [data.Item(0, "a.jpg", ("a dog",))], "server": [data.Item(1, "b.jpg", ())]}
    monkeypatch.setattr(vilta, "load_data", lambda cfg: data.Corpus("own", splits))
    with pytest.raises(UserError, match=r"no captions in split server: choose another \(--split test\)"):
        negatives.pictures_of(model.cfg, "server", 3)
    assert negatives.pictures_of(model.cfg, "", 3) == ("test", splits["test"])


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_rewritten_follows_from_the_seed(model, items):
    texts = [item.captions[0] for item in items] + ["the of 12"]
    found = negatives.rewritten(model, texts, 3)
    assert found == negatives.rewritten(model, texts, 3) != negatives.rewritten(model, texts, 4)
    assert found[-1] is None and all(new and new != old for new, old in zip(found[:-1], texts, strict=False))


def test_written_pairs(model, monkeypatch):
    asked, told = [], ["a cat", None, "a bat"]
    monkeypatch.setattr(negatives, "rewritten", lambda _, texts, k: asked.append((texts, k)) or told)
    items = [data.Item(7, "7.jpg", ("a dog", "a hound")), data.Item(8, "8.jpg", ()), data.Item(9, "9.jpg", ("the",)),
             data.Item(5, "5.jpg", ("a bird",))]  # fmt: skip
    pairs = negatives.written_pairs(model, items)
    assert asked == [(["a dog", "the", "a bird"], 0)]
    assert [(p.example_id, p.image_ids, p.images, p.text, p.label) for p in pairs] == [
        ("0-1", (7,), ("7.jpg",), "a dog", 1), ("0-0", (7,), ("7.jpg",), "a cat", 0),
        ("2-1", (5,), ("5.jpg",), "a bird", 1), ("2-0", (5,), ("5.jpg",), "a bat", 0)]  # fmt: skip


def test_names_of_the_metrics(run, model, items, tmp_path):
    filled, written = {"mlm_accuracy", "mlm_synonyms"}, {"written", "itm_accuracy_blind"}
    truth = {f"written_{name}" for name in ("false", "true", "unparsable")}
    machine = common.start_machine(replace(model.cfg, device="cpu"))
    asked = vilta.examination(model.cfg, model, None, machine)
    found = negatives.metrics(asked, items)
    maybe = {"itm_accuracy_written"}  # where a caption became false
    assert found.keys() - maybe == filled | written | truth and all(0 <= x <= 1 for x in found.values())
    assert found["written"] == 1 and sum(found[name] for name in truth) <= 1
    told = common.read_json(run / "metrics.json")["splits"]["test"]["metrics"]
    assert found.keys() - maybe <= told.keys()
    grey = Image.new("RGB", (40, 30))
    photographs = [data.Item(i, grey, (text,)) for i, text in enumerate(("a red disc", "one star"))]
    assert negatives.metrics(asked, photographs).keys() == (filled | written | maybe) - {"mlm_synonyms"}
    usual = model.cfg
    try:
        for change in ({"arm": "cd"}, {"syn_ratio": 0.0}):
            model.cfg = replace(usual, **change)
            assert negatives.metrics(asked, items[:2]).keys() == filled
    finally:
        model.cfg = usual


def test_only_what_became_false_tests_the_matching(model, items, monkeypatch):
    """Of scenes; that of permuted pictures counts them all."""
    scene = items[0].image
    true, false = items[0].captions[0], "there are seven crosses"
    assert judge.verdict(true, scene) == "true" and judge.verdict(false, scene) == "false"
    told = [(0, 1, true), (0, 0, false), (1, 1, true), (1, 0, true), (2, 1, true), (2, 0, "a red a")]
    pairs = [data.Example(f"{k}-{label}", (0,), (scene,), text, label) for k, label, text in told]
    asked = []

    class Stub:
        machine = common.start_machine(replace(model.cfg, device="cpu"))

        def scores(self, pairs):
            asked.append([pair.example_id for pair in pairs])
            return {pair.example_id: [0.0, 1.0] for pair in pairs}  # all of them match

    Stub.model = model
    monkeypatch.setattr(negatives, "filled", lambda *_: {})
    monkeypatch.setattr(negatives, "written_pairs", lambda *_: pairs)
    found = negatives.metrics(Stub(), [items[0]] * 3)
    assert asked == [[pair.example_id for pair in pairs], ["0-1", "0-0"]]
    assert found == {"written": 1.0, "itm_accuracy_blind": 0.5, "itm_accuracy_written": 0.5,
                     **{f"written_{name}": 1 / 3 for name in ("false", "true", "unparsable")}}  # fmt: skip


def test_words_of_the_same_meaning(model):
    tok = model.tokenizer
    id_of = tok.backend.token_to_id
    assert {id_of("Ġcircle")} <= set(negatives.synonyms_of(tok, id_of("Ġdisc")))
    assert id_of("Ġdisc") in negatives.synonyms_of(tok, id_of("Ġcircle"))
    assert id_of("Ġthing") not in negatives.synonyms_of(tok, id_of("Ġdisc")) and id_of("Ġdisc") is not None
    assert negatives.synonyms_of(tok, id_of("Ġthing")) == []
    assert "circles" in judge.synonyms("discs") and "circle" not in judge.synonyms("discs")
    assert "disc" in judge.synonyms("circle") and "circle" not in judge.synonyms("circle")
    assert not {"thing", "things", "object", "objects"} & {*judge.synonyms("disc"), *judge.synonyms("discs")}
    assert judge.synonyms("thing") == judge.synonyms("things") == judge.synonyms("zebra") == ()
    assert all(" " not in word for word in (*judge.synonyms("purple"), *judge.synonyms("left")))


def test_the_log_by_hand():
    # logits of (no match, match); kinds: own, own, written, other, other, other
    itm = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [3.0, -1.0]])
    kinds = torch.tensor([0, 0, 1, 2, 2, 2])
    labels = torch.tensor([[-100, 1], [2, -100], [-100, -100]])
    rows = {"kinds": kinds, "order": None, "mlm_labels": labels, "p": torch.tensor([0, 0, 0.25, 0, 0, 0])}
    gen = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    found = negatives.log_of({"itm": itm, "gen": gen}, rows)
    assert {name: round(x.item(), 4) for name, x in found.items()} == {
        "acc_own": 0.5, "acc_written": 1.0, "acc_other": 0.6667, "gen_top1": 0.5, "gen_p": 0.25, "written": 0.1667}
    del rows["p"]
    assert negatives.log_of({"itm": itm}, rows).keys() == {"acc_own", "acc_other"}
    assert negatives.log_of({"words": itm}, rows) == {}
    del rows["order"]  # of a downstream task
    assert negatives.log_of({"itm": itm}, rows) == {}
