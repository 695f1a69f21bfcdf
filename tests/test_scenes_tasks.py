"""Tasks of the small world: looking always solves them, reading alone never does."""
import collections
import dataclasses
import itertools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_scenes import MINI, judge_all

import scenes
from common import UserError
from scenes import NP, Hypotheses, Obj, Pairs, Panel, Scene, Scenes, Tagged, Truth
from tools import text_only

EVERYWHERE = [(world, split) for world in ("tiny", "full") for split in scenes.SPLITS]


def obj(color, shape, size, x, y, fill="solid"):
    return Obj(shape, color, fill, size, x, y, 0.1)


# A red disc on the left above a green box, a blue star at the right; then the same with a panel at the top right.
OPEN = Scene(scenes.WORLDS["full"], 0, "test", 0, (obj("red", "circle", "small", 0.2, 0.2), obj(
    "green", "square", "large", 0.3, 0.8, "striped"), obj("blue", "star", "large", 0.8, 0.7)), (), None, 0)
SHUT = dataclasses.replace(OPEN, panel=Panel(0.6, 0.1, 0.9, 0.25, ((0.7, 0.2), (0.8, 0.2))))


def names_held_out(np, world):
    return (np.color, np.shape) in world.held_out


# ---- Questions ------------------------------------------------------------------------------------------------------

def vqa_accuracy(prediction, answers):
    """Leave one annotator out, ten times."""
    return sum(min(1, (answers[:i] + answers[i + 1:]).count(prediction) / 3) for i in range(10)) / 10


@pytest.mark.parametrize(("world", "split"), EVERYWHERE)
def test_looking_answers_every_question(world, split):
    kinds, votes, total = collections.Counter(), set(), 0
    for scene in Scenes(world, split, 120):
        asked = scenes.questions(scene)
        assert len({q.text for q in asked}) == len(asked) > 0
        assert asked == scenes.questions(scene)
        total += len(asked)
        for q in asked:
            seen = scenes.answer(q.text, scene)
            assert seen == q.answer and vqa_accuracy(seen, q.answers) == 1, (q, seen)
            ranked = collections.Counter(q.answers).most_common()
            assert len(q.answers) == 10 and ranked[0][1] >= 4 and (len(ranked) == 1 or ranked[1][1] < ranked[0][1])
            kinds[q.kind] += 1
            votes |= set(q.answers)
            if q.kind == "n":
                assert q.answer.isdigit()
    assert total > 3.9 * 120
    assert 0.45 < kinds["yes/no"] / total < 0.6
    assert set(kinds) == {"yes/no", "n", *scenes.WORLDS[world].aspects} and min(kinds.values()) > 20
    assert {"disc", "violet", "one", "two", "big", "yes", "no", "0", "none"} < votes


@pytest.mark.parametrize(("question", "open_answer", "panel_answer"), [
    ("Is there a red disc?", "yes", "yes"), ("is there a pink heart?", "no", None),
    ("does the picture show exactly two stars?", None, None),  # "the picture shows exactly ..." is no sentence
    ("does the picture show two stars?", "no", None), ("are there four stars?", "no", "no"),
    ("is it true that every disc is red?", "yes", None), ("do we see a box?", "yes", "yes"),
    ("is there a box in the top left corner?", "no", "no"),
    ("what colour is the disc?", "red", None), ("what colour is the disc on the left?", "red", "red"),
    ("What colour is the thing on the left?", None, None),  # two of them
    ("what shape is the large thing on the right side?", "star", None),
    ("what shape is the thing in the lower part", None, None), ("what shape is the striped thing?", "square", None),
    ("what size is the star at the lower right ?", "large", "large"), ("is the star large or small?", "large", None),
    ("what pattern has the box on the left?", "striped", "striped"), ("what colour is the cross?", None, None),
    ("how many things are there?", "3", None), ("how many things on the left can you see?", "2", "2"),
    ("what is the number of hearts?", "0", None), ("how many large things at the bottom are there?", "2", "2"),
    ("how many disc are there?", None, None), ("what colour is the discs?", None, None),
    ("what colour is the red blue disc?", None, None), ("who is there?", None, None), ("", None, None),
    ("?", None, None), ("what colour is the", None, None), ("is it true that what colour is the disc?", None, None),
])
def test_answers_by_hand(question, open_answer, panel_answer):
    assert scenes.answer(question, OPEN) == open_answer
    assert scenes.answer(question, SHUT) == panel_answer


def test_answers_agree_with_brute_force_over_all_fillings():
    """With a world so small that each thing behind the panel can be tried. "What" is asked by excluding all else."""
    rng, known = random.Random(3), collections.Counter()
    for scene in Scenes(MINI, "train", 60):
        for what in ("color", "shape", "size", "fill", "n"):
            values = {name: getattr(MINI, name + "s") for name in scenes.ASPECTS if name != what}
            np = NP(**{name: rng.choice(v) for name, v in values.items() if rng.random() < 0.4})
            place = rng.choice([None, "left", "top", "bottom right"])
            kinds = list(itertools.product(MINI.shapes, MINI.colors, MINI.fills, MINI.sizes))
            slots = [[[]] + [[Obj(*kind, x, y, 0.1)] for kind in kinds] for x, y in
                     (scene.panel.slots if scene.panel else ())]
            found = set()
            for filling in itertools.product(*slots):
                x0, y0, x1, y1 = scenes.PLACES.get(place, (0, 0, 1, 1))
                meant = [o for o in (*scene.objects, *sum(filling, [])) if x0 <= o.x <= x1 and y0 <= o.y <= y1
                         and all(value in (None, getattr(o, name)) for name, value in vars(np).items())]
                found.add(str(len(meant)) if what == "n" else getattr(meant[0], what) if len(meant) == 1 else None)
            phrase = scenes._words(np, None, "many" if what == "n" else "bare", rng)
            where = f" {scenes.WORDS['place'][place][0]}" if place else ""
            text = rng.choice(scenes.ASKED[what]).format(phrase + where)
            expected = found.pop() if len(found) == 1 else None
            assert scenes.answer(text + "?", scene) == expected, (text, scene)
            known[what, expected is not None] += 1
    assert min(known.values()) > 3 and len(known) == 10


# ---- Pairs and hypotheses -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("world", "split", "n"), [(w, s, 160 if w == "tiny" else 40) for w, s in EVERYWHERE])
def test_looking_judges_every_pair(world, split, n):
    pairs, swapped = list(Pairs(world, split, n)), 0
    for pair in pairs:
        assert scenes.pair_is_true(pair.text, *pair.scenes) is (Truth.FALSE, Truth.TRUE)[pair.label], pair
        swapped += scenes.pair_is_true(pair.text, *reversed(pair.scenes)) is (Truth.TRUE, Truth.FALSE)[pair.label]
    assert swapped > 0.05 * n  # the order matters
    for g in range(n // 4):
        group = pairs[4 * g:4 * g + 4]
        assert {p.group for p in group} == {g} and len({p.text for p in group}) == 1
        assert sum(p.label for p in group) == 2
        assert len({scene for p in group for scene in p.scenes}) == 8
    assert len({tuple(p.label for p in pairs[i:i + 4]) for i in range(0, n, 4)}) > 2  # the order tells no label


def test_every_form_of_pairs_occurs():
    forms = {re.sub("{.*?}", ".+", form) for form in scenes.PAIR_FORMS}
    texts = {pair.text for pair in Pairs("tiny", "train", 400)}
    assert all(any(re.fullmatch(form, text) for text in texts) for form in forms)


OTHER = dataclasses.replace(OPEN, objects=(obj("red", "star", "small", 0.5, 0.5),
                                           obj("red", "circle", "large", 0.8, 0.2)))


@pytest.mark.parametrize(("sentence", "open_verdict", "panel_verdict"), [  # of (OPEN, OTHER), then of (SHUT, OTHER)
    ("The left picture shows more boxes than the right one.", "true", "true"),
    ("the left picture shows more red things than the right one", "false", "unknown"),
    ("the right picture shows more red things than the left one", "true", "unknown"),
    ("both pictures show the same number of discs", "true", "unknown"),
    ("both pictures show the same number of red things", "false", "unknown"),
    ("one picture shows a small star and the other a blue star", "true", "true"),
    ("one picture shows a small star and the other a large disc", "false", "unknown"),
    ("together the pictures show two discs", "true", "unknown"),
    ("together the pictures show one disc", "false", "false"),
    ("together the pictures show more stars than boxes", "true", "unknown"),
    ("the left picture shows a box", "true", "true"), ("the right picture shows a box", "false", "false"),
    ("both pictures show a red disc", "true", "true"), ("both pictures show a green box", "false", "false"),
    ("exactly one picture shows a small star", "true", "unknown"),
    ("exactly one picture shows a disc", "false", "false"),
    ("exactly one picture shows two discs", "false", "unknown"),
    ("neither picture shows a heart", "true", "unknown"), ("neither picture shows a disc", "false", "false"),
    ("the left picture shows a disc above a box", "true", "true"),
    ("the left picture shows a star below a disc", "true", "true"),
    *((text, "unparsable", "unparsable") for text in (
        "", "a red disc", "both pictures show", "the middle picture shows a disc", "both pictures show discs of gold",
        "the left picture shows more boxes than the other one", "one picture shows a disc and the other and the other",
        "the left picture shows more box than the right one")),
])
def test_pairs_by_hand(sentence, open_verdict, panel_verdict):
    assert scenes.pair_is_true(sentence, OPEN, OTHER) == open_verdict
    assert scenes.pair_is_true(sentence, SHUT, OTHER) == panel_verdict


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_looking_judges_every_hypothesis(split):
    found = list(Hypotheses("full", split, 90))
    for h in found:
        assert h.scenes[0].panel and scenes.ENTAILMENT[scenes.is_true(h.text, h.scenes[0])] == h.label
    assert scenes.ENTAILMENT == {"false": 0, "unknown": 1, "true": 2}
    for group in (found[i:i + 3] for i in range(0, 90, 3)):
        assert sorted(h.label for h in group) == [0, 1, 2] and len({h.text for h in group}) == 1
    assert len({tuple(h.label for h in found[i:i + 3]) for i in range(0, 90, 3)}) > 3


def test_hypotheses_agree_with_brute_force():
    labels = [(h.label, judge_all(scenes.parse(h.text), h.scenes[0])) for h in Hypotheses(MINI, "train", 60)]
    assert all(scenes.ENTAILMENT[verdict] == label for label, verdict in labels)


def test_hypotheses_need_panels():
    with pytest.raises(UserError, match="full"):
        Hypotheses("tiny", "train", 3)[0]


# ---- Tagged questions -----------------------------------------------------------------------------------------------

def words(text):
    return tuple(tuple(map(int, re.findall(r"\d", w))) if w[0] == "[" else w for w in text.split())


@pytest.mark.parametrize(("world", "split", "n"), [(w, s, 120 if w == "tiny" else 30) for w, s in EVERYWHERE])
def test_looking_solves_every_tagged_question(world, split, n):
    places = collections.Counter()
    for q in Tagged(world, split, n):
        right = q.answers[q.label]
        assert len(set(q.answers)) == len(set(q.rationales)) == 4
        assert scenes.choose_answer(q.question, q.answers, q.scene) == q.label
        assert scenes.choose_rationale(q.question, right, q.rationales, q.scene) == q.rationale_label
        wrong = [r for i, r in enumerate(q.rationales) if i != q.rationale_label]
        assert scenes.choose_rationale(q.question, right, wrong, q.scene) is None
        assert not any(scenes.choose_rationale(q.question, a, q.rationales, q.scene) for a in q.answers if a != right)
        (tags,) = (t for t in q.question if not isinstance(t, str))
        assert len(set(tags)) == 2 and max(tags) < len(q.scene.objects)
        # A wrong rationale lies about the objects, yet says what would justify the answer: reading alone will not do.
        for rationale in q.rationales:
            said = [scenes.parse(phrase).np for phrase in
                    re.split(r" and \(\d,\) is |^\(\d,\) is ", " ".join(map(str, rationale)))[1:]]
            assert len(said) == 2
            alike = {scenes.ASPECTS[name] for name in q.scene.world.aspects
                     if getattr(said[0], name) == getattr(said[1], name)}
            named = set(right) - {"in", "and", "nothing"}
            differ = {scenes.ASPECTS[name] for name in q.scene.world.aspects} - alike
            assert named == (alike if "alike" in q.question else differ)
        places[q.label] += 1
        places["why", q.rationale_label] += 1
    assert len(places) == 8 and max(places.values()) < 0.55 * n


@pytest.mark.parametrize(("question", "answer", "rationale"), [
    ("in what are [0,1] alike ?", "in nothing",
     "[0] is a small plain red disc and [1] is a large striped green box"),
    ("in what do [1,2] differ ?", "in colour and shape and pattern",
     "[1] is a big stripy green square and [2] is a huge solid blue star"),
    ("in what are [2,1] alike ?", "in size", "[2] is a huge plain blue star and [1] is a big stripy green square"),
])
def test_tagged_by_hand(question, answer, rationale):
    question, answer, rationale = words(question), words(answer), words(rationale)
    assert scenes.choose_answer(question, [("in", "shape"), answer], OPEN) == 1
    assert scenes.choose_answer(question, [("in", "shape")], OPEN) is None
    assert scenes.choose_rationale(question, answer, [("so",), rationale], OPEN) == 1
    lie = tuple("pink" if word in ("green", "blue") else word for word in rationale)
    vague = tuple(word for word in rationale if word not in ("large", "big", "huge"))
    (tags,) = (t for t in question if not isinstance(t, str))
    other = tuple((0,) if t == (1,) else (1,) if t == (0,) else t for t in rationale)
    short = rationale[:rationale.index("and")]
    twice = ((0,), *"is a pink heart and".split(), *rationale)
    for wrong in (lie, vague, other, short, twice, (*"because of".split(), *rationale), (), tags):
        assert scenes.choose_rationale(question, answer, [wrong], OPEN) is None


@pytest.mark.parametrize("question", ["", "what", "in what are alike ?", "in what are [0] alike ?",
                                      "why do [0,1] differ ?", "in what are [0,9] alike ?",
                                      "in what do [0,1,2] differ ?"])
def test_tagged_refuses(question):
    assert scenes.choose_answer(words(question), list(scenes.ANSWERS.values()), OPEN) is None


# ---- What holds for all ---------------------------------------------------------------------------------------------

def said(text):
    """All noun phrases of a text of any task."""
    text = re.sub(r"\(\d,\)|\?", " ", text)
    return [NP(**dict(scenes._MEANING[w] for w in (m["adjectives"] or "").split()),
               shape=scenes._MEANING[scenes._PLURALS.get(m["many"], m["one"])][1])
            for m in scenes._PHRASE.finditer(text) if m["many"] or m["one"]]


def texts(world, split, n):
    yield from (q.text for scene in Scenes(world, split, n) for q in scenes.questions(scene))
    yield from (pair.text for pair in Pairs(world, split, n // 2))
    yield from (" ".join(map(str, r)) for q in Tagged(world, split, n // 4) for r in q.rationales)
    yield from (h.text for h in Hypotheses("full", split, n))


@pytest.mark.parametrize("world", ["tiny", "full"])
def test_what_is_held_out_is_never_named(world):
    for split in ("train", "val", "test"):
        assert not any(names_held_out(np, scenes.WORLDS["full"])
                       for text in texts(world, split, 80) for np in said(text))
        for scene in Scenes(world, split, 100):  # nor does a mistaken annotator name it
            for q in scenes.questions(scene):
                (np, *_), meant = said(q.text) or [NP()], scenes._MEANING
                if q.kind in ("color", "shape"):
                    assert not any(names_held_out(dataclasses.replace(np, **{q.kind: meant[a][1]}), scene.world)
                                   for a in q.answers)
    assert any(names_held_out(np, scenes.WORLDS[world]) for text in texts(world, "test_compositional", 40)
               for np in said(text))


DIGEST = """
import hashlib, scenes
h = hashlib.sha256()
for world in ("tiny", "full"):
    for scene in scenes.Scenes(world, "test_compositional", 10):
        h.update(repr(scenes.questions(scene)).encode())
    for task in (scenes.Pairs, scenes.Tagged, scenes.Hypotheses)[:2 + (world == "full")]:
        for item in task(world, "val", 4):
            h.update(repr([v for k, v in vars(item).items() if "scene" not in k]).encode())
print(h.hexdigest())
"""


def test_the_same_in_every_process(capsys):
    exec(DIGEST, {})
    other = subprocess.run([sys.executable, "-c", DIGEST], cwd=Path(scenes.__file__).parent, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True).stdout
    assert len(other) == 65 and other == capsys.readouterr().out


def test_the_same_in_any_order():
    for task in (Pairs, Hypotheses, Tagged):
        forward = list(task("full", "val", 12))
        scenes._group.cache_clear()
        random.seed(1)
        assert [task("full", "val", 50)[i] for i in reversed(range(12))] == forward[::-1]
        assert task("full", "val", 12)[-1] == forward[-1] != task("full", "val", 12, seed=1)[-1]
        with pytest.raises(IndexError):
            task("full", "val", 12)[12]


def test_hidden_objects_never_matter():
    for scene in [scene for scene in Scenes("full", "test", 60) if scene.panel]:
        hidden = tuple(Obj("heart", "green", "dotted", "large", x, y, 0.14) for x, y in scene.panel.slots)
        assert scenes.questions(dataclasses.replace(scene, hidden=hidden)) == scenes.questions(scene)


# ---- Reading alone --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("world", "bounds"), [
    ("tiny", {"yes/no": 0.55, "n": 0.5, "color": 0.3, "shape": 0.36, "size": 0.58}),
    ("full", {"yes/no": 0.55, "n": 0.45, "color": 0.24, "shape": 0.28, "size": 0.58, "fill": 0.42})])
def test_reading_alone_does_not_answer_questions(world, bounds):
    found = text_only.questions(world, 800, 300)
    assert found.keys() == bounds.keys()
    for kind, (reader, frequent) in found.items():
        assert reader < bounds[kind]
        assert frequent < {"yes/no": 0.56, "n": 0.45, "color": 0.27, "shape": 0.33, "size": 0.57, "fill": 0.4}[kind]


def test_reading_alone_does_not_judge_pairs_or_hypotheses():
    assert text_only.judged(Pairs, "tiny", 300, 148)[0] < 0.55
    assert text_only.judged(Hypotheses, "full", 300, 150)[0] < 0.38


@pytest.mark.parametrize(("world", "n"), [("tiny", 500), ("full", 100)])
def test_reading_alone_does_not_choose_an_answer_or_rationale(world, n):
    for reader, _ in text_only.tagged(world, n, n).values():
        assert reader < (0.31 if n > 300 else 0.4)


def test_the_reader_can_read():
    """Where the words do tell, it finds out: else its failures would prove nothing."""
    train = [(f"{a} {b} thing", a == "red") for a in ("red", "blue", "green") for b in ("big", "small", "huge")] * 4
    assert text_only.accuracy(train, [("red tiny thing", True), ("blue tiny box", False)] * 5) == (1.0, 0.5)
