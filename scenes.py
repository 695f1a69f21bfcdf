"""The small world: drawn scenes, a little language about them, and an exact judge of every sentence.

Nothing to download, no annotator to trust: a scene is a handful of shapes on a textured ground, a caption is a sentence
of a small grammar, and whether a sentence is true of a scene is computed, not guessed.

    (seed, split, i) ──> Scene ──┬─> render ──> picture             ┌─> captions   five true sentences, with synonyms
                                 ├─> regions ─> boxes, features     ├─> edited     one word changed, now false
                                 ├─> language <──> statements ──────┴─> is_true    true / false / unknown / unparsable
                                 ├─> questions  (as in VQA v2)  ────> answer            programs that solve
                                 ├─> Pairs      (as in NLVR2)   ────> pair_is_true      each task by looking
                                 ├─> Hypotheses (as in SNLI-VE) ────> is_true
                                 └─> Tagged     (as in VCR)     ────> choose_answer, choose_rationale

    python scenes.py show                                  a contact sheet of the tiny world: scenes.png
    python scenes.py show --world full --task questions    panels that hide things; captions, pairs, hypotheses, tagged

*Unknown* is the interesting answer: a grey panel hides up to two further objects, and a sentence is unknown when some
filling of the panel makes it true and another makes it false. What really lies there never matters.
"""
from __future__ import annotations

import collections.abc
import functools
import itertools
import math
import random
import re
from dataclasses import dataclass
from enum import Enum

import numpy  # by its full name: `np` is a noun phrase in this file
from PIL import Image, ImageChops, ImageDraw, ImageOps

from common import UserError, run_main

# ---- The world: what there is ---------------------------------------------------------------------------------------

SPLITS = ("train", "val", "test", "test_compositional")
SMALL_AND_LARGE = {"small": (0.09, 0.11), "large": (0.17, 0.20)}  # radii, unit square; the gap keeps the words exact
CROWDED = 0.7   # radii shrink by this in worlds of more than three objects or with panels, so that all of it fits
GAP = 0.015     # free space kept around everything
N_TEXTURES = 64  # few enough to cache, too many to tell scenes apart by


@dataclass(frozen=True)
class World:
    """A vocabulary and its limits. `held_out` (colour, shape) pairs appear in split test_compositional only."""
    name: str
    shapes: tuple
    colors: tuple
    fills: tuple
    sizes: tuple
    min_objects: int
    max_objects: int
    panel: float         # probability that a scene has a panel
    held_out: frozenset  # of (color, shape)

    @property
    def aspects(self):
        return [name for name in ("color", "shape", "size", "fill") if len(getattr(self, name + "s")) > 1]


@dataclass(frozen=True)
class Obj:
    """One object: centre (x, y), y down, and radius r in a unit square; its outline stays within that circle."""
    shape: str
    color: str
    fill: str
    size: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Panel:
    """An opaque grey rectangle. Hidden objects sit exactly on its two slots; each slot has room for any size."""
    x0: float
    y0: float
    x1: float
    y1: float
    slots: tuple  # ((x, y), (x, y))


@dataclass(frozen=True)
class Scene:
    """What is there. Pictures, captions and truth follow from everything but `hidden`, which nobody can see."""
    world: World
    seed: int
    split: str
    index: int
    objects: tuple        # the visible Obj
    hidden: tuple         # Obj behind the panel, at most one per slot
    panel: Panel | None
    texture: int


_SHAPES = ("circle", "square", "triangle", "star")
_COLORS = ("red", "green", "blue", "yellow", "purple", "black")
_HELD_OUT = {("green", "circle"), ("red", "square"), ("yellow", "triangle"), ("blue", "star")}
WORLDS = {
    "tiny": World("tiny", _SHAPES, _COLORS, fills=("solid",), sizes=("small", "large"),
                  min_objects=1, max_objects=3, panel=0.0, held_out=frozenset(_HELD_OUT)),
    "full": World("full", (*_SHAPES, "cross", "heart"), (*_COLORS, "orange", "pink"),
                  fills=("solid", "striped", "dotted"), sizes=("small", "large"), min_objects=1, max_objects=5,
                  panel=1 / 3, held_out=frozenset(_HELD_OUT | {("orange", "cross"), ("pink", "heart")})),
}


def get_world(world):
    """A World for its name (or itself). Raises UserError for an unknown name."""
    if isinstance(world, World):
        return world
    if world not in WORLDS:
        raise UserError(f"unknown world {world!r}: choose one of {', '.join(WORLDS)}")
    return WORLDS[world]


def radii(world, size):
    """(smallest, largest) radius of an object of that size word, in units of the picture's side."""
    return tuple((CROWDED if world.panel > 0 or world.max_objects > 3 else 1.0) * r for r in SMALL_AND_LARGE[size])


# ---- Scenes: where it is --------------------------------------------------------------------------------------------

def make_scene(world, split, index, seed=0):
    """Scene `index` of a split. It depends on (world, seed, split, index) alone: any order, any number of workers."""
    world = get_world(world)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of the small world: choose one of {', '.join(SPLITS)}")
    # random.Random seeded with a string: the same stream in every process, and made in 8 µs (a numpy Generator: 20).
    rng = random.Random(f"scene {world.name} {seed} {split} {index}")
    count = rng.randint(world.min_objects, world.max_objects)
    panel = _make_panel(world, rng) if rng.random() < world.panel else None
    objects = None
    while not objects:  # what does not fit is drawn anew: rarely more than once
        kinds = [_kind(world, rng)]  # (color, shape, fill, size)
        if split == "test_compositional":
            kinds = [rng.choice(sorted(world.held_out)) + kinds[0][2:]]  # sorted: a set's order varies with the process
        while len(kinds) < count:
            kind = _kind(world, rng)
            if rng.random() < 0.3:  # repeat a colour and shape now and then, so that there is something to count
                kind = rng.choice(kinds)[:2] + kind[2:]
            kinds.append(kind)
        objects = _place(world, kinds, panel, rng)
    slots = rng.sample(panel.slots, rng.randint(0, 2)) if panel else ()
    hidden = tuple(_make_obj(world, _kind(world, rng), rng, x, y) for x, y in slots)
    rng.shuffle(objects)  # _place put the large ones first
    return Scene(world, seed, split, index, tuple(objects), hidden, panel, rng.randrange(N_TEXTURES))


def _kind(world, rng):
    while (pair := (rng.choice(world.colors), rng.choice(world.shapes))) in world.held_out:
        pass
    return (*pair, rng.choice(world.fills), rng.choice(world.sizes))


def _make_obj(world, kind, rng, x, y):
    color, shape, fill, size = kind
    return Obj(shape, color, fill, size, x, y, rng.uniform(*radii(world, size)))


def _make_panel(world, rng):
    room = max(radii(world, size)[1] for size in world.sizes) + GAP / 2  # half the side of a slot
    wide, high = (4 * room, 2 * room) if rng.random() < 0.5 else (2 * room, 4 * room)
    x0, y0 = rng.uniform(GAP, 1 - GAP - wide), rng.uniform(GAP, 1 - GAP - high)
    slots = ((x0 + room, y0 + room), (x0 + wide - room, y0 + high - room))
    return Panel(x0, y0, x0 + wide, y0 + high, slots)


def _place(world, kinds, panel, rng):
    """Objects of these kinds without overlaps, or None. Large ones first: they find room least easily."""
    placed = []
    for kind in sorted(kinds, key=lambda kind: -radii(world, kind[3])[1]):
        for _ in range(40):
            o = _make_obj(world, kind, rng, rng.random(), rng.random())
            edge = o.r + GAP
            if not (edge < o.x < 1 - edge and edge < o.y < 1 - edge):
                continue
            if panel and math.hypot(max(panel.x0 - o.x, 0, o.x - panel.x1),  # to the nearest point of the panel
                                    max(panel.y0 - o.y, 0, o.y - panel.y1)) < edge:
                continue
            if all(math.hypot(o.x - p.x, o.y - p.y) >= edge + p.r for p in placed):
                placed.append(o)
                break
        else:
            return None
    return placed


class Scenes(collections.abc.Sequence):
    """Scenes(world, split, n)[i] -> Scene, made when asked for. `world` is a World or a name in WORLDS."""

    def __init__(self, world, split, n, seed=0):
        self.world, self.split, self.n, self.seed = get_world(world), split, n, seed

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if not -self.n <= i < self.n:
            raise IndexError(f"{i} of {self.n} {type(self).__name__.lower()}")
        return self._make(i % self.n)

    def _make(self, i):
        return make_scene(self.world, self.split, i, self.seed)


# ---- Pictures -------------------------------------------------------------------------------------------------------

RGB = {"red": (214, 40, 48), "green": (40, 155, 72), "blue": (36, 98, 214), "yellow": (252, 205, 24),
       "purple": (124, 58, 178), "black": (36, 36, 42), "orange": (244, 126, 28), "pink": (247, 138, 190)}
CHALK = (252, 250, 244)  # of stripes and dots
GREY = (126, 131, 140)   # of the panel
GROUNDS = ((222, 214, 200), (206, 217, 224), (211, 220, 205), (224, 212, 212), (214, 212, 224), (216, 216, 214))
SUPERSAMPLE = 4          # masks are drawn this much larger and reduced: smooth edges
CIRCLE_RADIUS = 0.9      # of the unit circle, so that areas are comparable
OUTLINES = {             # of the others, within the unit circle, y down
    "square": [(-0.707, -0.707), (0.707, -0.707), (0.707, 0.707), (-0.707, 0.707)],
    "triangle": [(0, -1), (0.866, 0.5), (-0.866, 0.5)],
    "star": [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate((1, 0.46) * 5)],
    "cross": [(-0.3, -0.94), (0.3, -0.94), (0.3, -0.3), (0.94, -0.3), (0.94, 0.3), (0.3, 0.3),
              (0.3, 0.94), (-0.3, 0.94), (-0.3, 0.3), (-0.94, 0.3), (-0.94, -0.3), (-0.3, -0.3)],
    "heart": [(16 * math.sin(t) ** 3 / 18.2,
               (5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t) - 2.5) / 18.2)
              for t in (i * math.pi / 20 for i in range(40))],
}


def render(scene, size):
    """The scene as an RGB PIL image of size × size pixels; the same bits every time."""
    image = _ground(scene.texture, size).copy()
    for o in scene.objects:
        _draw(image, o, size)
    if scene.panel:  # opaque: what lies behind it need not even be drawn
        box = [round(v * size) for v in (scene.panel.x0, scene.panel.y0, scene.panel.x1, scene.panel.y1)]
        ImageDraw.Draw(image).rectangle(box, fill=GREY, outline=_shade(GREY, 0.7), width=max(1, size // 64))
    return image


@functools.lru_cache(maxsize=2 * N_TEXTURES)
def _ground(texture, size):
    """A pale ground: soft noise (clouds, or grain one way or the other) under fine noise, both of low contrast."""
    rng = random.Random(f"ground {texture}")
    cells = rng.choice(((7, 7), (3, 24), (24, 3), (14, 14)))
    soft, fine = (Image.frombytes("L", (w, h), rng.randbytes(w * h)).resize((size, size), Image.Resampling.BICUBIC)
                  for w, h in (cells, (72, 72)))
    ground = rng.choice(GROUNDS)
    return ImageOps.colorize(Image.blend(soft, fine, 0.3), _shade(ground, 0.93), _shade(ground, 1.07))


def _shade(rgb, factor):
    return tuple(min(255, round(v * factor)) for v in rgb)


def _draw(image, o, size):
    scale = size * SUPERSAMPLE
    left, top = math.floor((o.x - o.r) * size), math.floor((o.y - o.r) * size)
    side = (math.ceil(2 * o.r * size) + 1) * SUPERSAMPLE
    x, y, r = o.x * scale - left * SUPERSAMPLE, o.y * scale - top * SUPERSAMPLE, o.r * scale
    image.paste(_shade(RGB[o.color], 0.72), (left, top), _stencil(o.shape, side, x, y, r).reduce(SUPERSAMPLE))
    inside = _stencil(o.shape, side, x, y, 0.88 * r)  # the darker rim that remains tells pale colours from the ground
    image.paste(RGB[o.color], (left, top), inside.reduce(SUPERSAMPLE))
    if o.fill != "solid":
        chalk = ImageChops.darker(inside, _pattern(o.fill, side, x, y, r))
        image.paste(CHALK, (left, top), chalk.reduce(SUPERSAMPLE))


def _stencil(shape, side, x, y, r):
    mask = Image.new("L", (side, side))
    if shape == "circle":
        r *= CIRCLE_RADIUS
        ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        ImageDraw.Draw(mask).polygon([(x + r * px, y + r * py) for px, py in OUTLINES[shape]], fill=255)
    return mask


def _pattern(fill, side, x, y, r):
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if fill == "striped":  # the middle keeps the object's colour
        for offset in (-1.2, -0.4, 0.4, 1.2):  # of the stripe's middle, along x
            draw.line((x + (offset - 1) * r, y + r, x + (offset + 1) * r, y - r), fill=255, width=round(0.28 * r))
    else:
        for dx, dy in itertools.product((-0.84, -0.28, 0.28, 0.84), repeat=2):
            draw.ellipse((x + (dx - .15) * r, y + (dy - .15) * r, x + (dx + .15) * r, y + (dy + .15) * r), fill=255)
    return mask


# ---- Regions, in the form of a detector's output --------------------------------------------------------------------

REGION_CROP = 16  # features are a 16×16 RGB crop: 768 numbers
REGION_NOISE = 0.02


def regions(scene, size=64, seed=0):
    """What a detector would say: one region per visible object, and one for the panel (a kind of background).

    boxes [n, 4] pixels x1, y1, x2, y2; features [n, 768] a 16×16 RGB crop in 0..1, flattened, plus a little noise;
    cls_prob [n, 1 + shapes*colours] smoothed classes: background, then 1 + shape index * colours + colour index.
    All float32, the noise seeded.
    """
    world, image = scene.world, render(scene, size)
    key = random.Random(f"regions {seed} {world.name} {scene.seed} {scene.split} {scene.index}")
    rng = numpy.random.default_rng(key.getrandbits(64))
    boxes = [(o.x - o.r, o.y - o.r, o.x + o.r, o.y + o.r) for o in scene.objects]
    if scene.panel:
        boxes.append((scene.panel.x0, scene.panel.y0, scene.panel.x1, scene.panel.y1))
    boxes = numpy.array(boxes, dtype=numpy.float32) * size
    crops = [numpy.asarray(image.resize((REGION_CROP, REGION_CROP), Image.Resampling.BILINEAR, box=tuple(box.tolist())))
             for box in boxes]
    features = numpy.stack(crops).reshape(len(boxes), -1) / 255 + rng.normal(0, REGION_NOISE, (len(boxes), 768))
    # A detector confuses what looks alike: its logits know colour and shape apart, and both together best.
    logits = rng.normal(0, 0.5, (len(boxes), 1 + len(world.shapes) * len(world.colors)))
    for row, o in zip(logits, scene.objects, strict=False):  # the panel's row, if any, comes last
        grid = row[1:].reshape(len(world.shapes), len(world.colors))  # a view
        shape, color = world.shapes.index(o.shape), world.colors.index(o.color)
        grid[shape] += 2
        grid[:, color] += 2
        grid[shape, color] += 4
    if scene.panel:
        logits[-1, 0] += 7
    cls_prob = numpy.exp(logits - logits.max(1, keepdims=True))
    cls_prob /= cls_prob.sum(1, keepdims=True)
    return {"boxes": boxes, "features": features.astype(numpy.float32), "cls_prob": cls_prob.astype(numpy.float32)}


# ---- The language: statements ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class NP:
    """A noun phrase: what an object must be; None says nothing about it ("a red thing" has no shape)."""
    shape: str | None = None
    color: str | None = None
    fill: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Exists:
    np: NP


@dataclass(frozen=True)
class Both:  # two different objects
    a: NP
    b: NP


@dataclass(frozen=True)
class Relation:  # some a is `rel` of some b, see DIRECTIONS
    a: NP
    rel: str
    b: NP


@dataclass(frozen=True)
class Count:  # exactly n, 1 to 7 (none at all is Nothing)
    n: int
    np: NP


@dataclass(frozen=True)
class Place:  # some np lies in that part of the picture, see PLACES
    np: NP
    place: str


@dataclass(frozen=True)
class Nothing:
    np: NP


@dataclass(frozen=True)
class Every:  # every np matches `attribute` as well, and there is at least one
    np: NP
    attribute: NP


@dataclass(frozen=True)
class More:  # more a than b
    a: NP
    b: NP


Statement = Exists | Both | Relation | Count | Place | Nothing | Every | More
MONOTONE = (Exists, Both, Relation, Place)  # once true, further objects cannot make them false

MARGIN = 0.1  # of the picture's side: relations need more than this between centres, places keep it from the middle
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}  # the other axis need not matter
_NEAR, _FAR = 0.5 - MARGIN, 0.5 + MARGIN
PLACES = {  # x0, y0, x1, y1 that the centre must lie in
    "left": (0, 0, _NEAR, 1), "right": (_FAR, 0, 1, 1), "top": (0, 0, 1, _NEAR), "bottom": (0, _FAR, 1, 1),
    "top left": (0, 0, _NEAR, _NEAR), "top right": (_FAR, 0, 1, _NEAR),
    "bottom left": (0, _FAR, _NEAR, 1), "bottom right": (_FAR, _FAR, 1, 1),
}

# ---- The language: words and sentences, as data ---------------------------------------------------------------------

WORDS = {
    "shape": {"circle": ("circle", "disc", "round thing"), "square": ("square", "box", "boxy thing"),
              "triangle": ("triangle", "wedge", "triangular thing"), "star": ("star", "starry thing"),
              "cross": ("cross", "plus"), "heart": ("heart", "valentine"),
              None: ("thing", "shape", "object")},
    "color": {"red": ("red",), "green": ("green",), "blue": ("blue",), "yellow": ("yellow",), "black": ("black",),
              "purple": ("purple", "violet"), "orange": ("orange",), "pink": ("pink",)},
    "fill": {"solid": ("solid", "plain"), "striped": ("striped", "stripy"), "dotted": ("dotted", "spotted")},
    "size": {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")},
    "rel": {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
            "above": ("above", "over", "higher than"), "below": ("below", "under", "lower than")},
    "place": {"left": ("on the left", "on the left side"), "right": ("on the right", "on the right side"),
              "top": ("at the top", "in the upper part"), "bottom": ("at the bottom", "in the lower part"),
              "top left": ("in the top left corner", "at the upper left"),
              "top right": ("in the top right corner", "at the upper right"),
              "bottom left": ("in the bottom left corner", "at the lower left"),
              "bottom right": ("in the bottom right corner", "at the lower right")},
    "n": {n: (word,) for n, word in enumerate(("one", "two", "three", "four", "five", "six", "seven"), start=1)},
}

# {field:form} is a field of the statement in one of its forms: a noun phrase as `one` ("a red disc"), `bare` ("red
# disc") or `many` ("red discs"), or `adj`, one adjective; a number as `single` or `several`; {rel} and {place} plain.
# A kind with several variants has one entry for each.
TEMPLATES = {
    (Exists, ""): ("{np:one}", "there is {np:one}", "{np:one} can be seen", "the picture shows {np:one}",
                   "we see {np:one}"),
    (Both, ""): ("{a:one} and {b:one}", "there is {a:one} and {b:one}", "{a:one} together with {b:one}",
                 "the picture shows {a:one} and {b:one}", "we see both {a:one} and {b:one}"),
    (Relation, ""): ("{a:one} {rel} {b:one}", "there is {a:one} {rel} {b:one}", "{a:one} is {rel} {b:one}",
                     "{rel} {b:one} there is {a:one}", "{b:one} with {a:one} {rel} it"),
    (Count, "single"): ("{n:single} {np:bare}", "there is {n:single} {np:bare}",
                        "the picture shows {n:single} {np:bare}", "exactly {n:single} {np:bare} can be seen"),
    (Count, "several"): ("{n:several} {np:many}", "there are {n:several} {np:many}",
                         "the picture shows {n:several} {np:many}", "exactly {n:several} {np:many} can be seen"),
    (Place, ""): ("{np:one} {place}", "there is {np:one} {place}", "{np:one} is {place}", "{place} there is {np:one}",
                  "{place} we see {np:one}"),
    (Nothing, ""): ("there is no {np:bare}", "no {np:bare} can be seen", "the picture shows no {np:bare}",
                    "there are no {np:many}"),
    (Every, "adj"): ("every {np:bare} is {attribute:adj}", "each {np:bare} is {attribute:adj}",
                     "all {np:many} are {attribute:adj}"),
    (Every, "noun"): ("every {np:bare} is {attribute:one}", "each {np:bare} is {attribute:one}",
                      "all {np:many} are {attribute:many}"),
    (More, ""): ("more {a:many} than {b:many}", "there are more {a:many} than {b:many}", "{a:many} outnumber {b:many}"),
}


def plural(noun):
    """"boxes" for "box"."""
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def article(phrase):
    """"an orange disc" for "orange disc"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _any_of(phrases):
    return "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))  # longest first: "boxy thing" before "box"


_MEANING = {word: (category, meaning) for category, table in WORDS.items()
            for meaning, words in table.items() for word in words}
_PLURALS = {plural(word): word for words in WORDS["shape"].values() for word in words}
_ADJECTIVES = [w for w, (category, _) in _MEANING.items() if category in ("color", "fill", "size")]
_PHRASE = re.compile(  # one constituent of a sentence; the rest are the literal words of a template
    rf"\b(?:(?:(?P<article>an?) )?(?P<adjectives>(?:(?:{_any_of(_ADJECTIVES)}) )*)"
    rf"(?:(?P<many>{_any_of(_PLURALS)})|(?P<one>{_any_of(w for w, (c, _) in _MEANING.items() if c == 'shape')}))"
    rf"|(?P<adj>{_any_of(_ADJECTIVES)})"
    rf"|(?P<other>{_any_of(w for w, (c, _) in _MEANING.items() if c in ('rel', 'place', 'n'))}))\b")


def _compile():
    """_PIECES: variant -> templates as lists of literals and (field, form). _RULES: skeleton -> (kind, field order).

    A skeleton is a sentence with its constituents replaced by their forms, "there is {one} {rel} {one}"; skeletons are
    the keys of a dict, so that no sentence can be read in two ways.
    """
    pieces, rules = {}, {}
    for variant, texts in TEMPLATES.items():
        for text in texts:
            parts = [tuple(part[1:-1].partition(":")[::2]) if part[0] == "{" else part
                     for part in re.split(r"(\{.*?\})", text) if part]
            slots = [part for part in parts if isinstance(part, tuple)]
            skeleton = "".join(part if isinstance(part, str) else "{%s}" % (part[1] or part[0]) for part in parts)
            assert skeleton not in rules, f"two templates read alike: {text}"
            rules[skeleton] = variant[0], [field for field, _ in slots]
            pieces.setdefault(variant, []).append(parts)
    return pieces, rules


_PIECES, _RULES = _compile()


def normalise(sentence):
    """Lower case, single blanks, no final stop."""
    return " ".join(sentence.lower().split()).rstrip(". ")


@functools.lru_cache(maxsize=1 << 16)
def parse(sentence):
    """The Statement that a sentence makes, or None where it is not one of the language's."""
    values = []

    def constituent(match):
        if match["other"]:
            category, meaning = _MEANING[match["other"]]
            values.append(meaning)
            return "{%s}" % (category if category != "n" else "single" if meaning == 1 else "several")
        noun = match["one"] or _PLURALS.get(match["many"])
        words = (match["adj"] or match["adjectives"]).split() + ([noun] if noun else [])
        attributes = [_MEANING[word] for word in words]
        if len(dict(attributes)) < len(attributes) or (match["article"] and match["many"]):
            return "{bad}"  # "a red blue disc", "a discs"
        values.append(NP(**dict(attributes)))
        return "{%s}" % ("adj" if match["adj"] else "many" if match["many"] else "one" if match["article"] else "bare")

    skeleton = _PHRASE.sub(constituent, normalise(sentence))
    kind, names = _RULES.get(skeleton, (None, ()))
    return kind(**dict(zip(names, values, strict=True))) if kind and len(names) == len(values) else None


def realise(statement, rng, phrase=False):
    """A sentence that makes this statement, words and template by `rng` (a random.Random); `phrase`: the first one."""
    variant = ""
    if isinstance(statement, Count):
        variant = "single" if statement.n == 1 else "several"
    elif isinstance(statement, Every):
        a = statement.attribute
        variant = "adj" if a.shape is None and sum(v is not None for v in (a.color, a.fill, a.size)) == 1 else "noun"
    return "".join([part if isinstance(part, str) else _words(getattr(statement, part[0]), *part, rng)
                    for part in (_PIECES[type(statement), variant][0] if phrase else
                                 rng.choice(_PIECES[type(statement), variant]))])


def _words(value, field, form, rng):
    if not isinstance(value, NP):
        return rng.choice(WORDS[field][value])
    adjectives = [rng.choice(WORDS[category][meaning]) for category, meaning in
                  (("size", value.size), ("fill", value.fill), ("color", value.color)) if meaning is not None]
    if form == "adj":
        return adjectives[0]
    noun = rng.choice(WORDS["shape"][value.shape])
    phrase = " ".join([*adjectives, plural(noun) if form == "many" else noun])
    return article(phrase) if form == "one" else phrase


# ---- Truth ----------------------------------------------------------------------------------------------------------

class Truth(str, Enum):
    TRUE = "true"
    FALSE = "false"
    UNKNOWN = "unknown"
    UNPARSABLE = "unparsable"


def matches(np, o):
    """Is this object what the noun phrase says?"""
    return ((np.color is None or np.color == o.color) and (np.shape is None or np.shape == o.shape)
            and (np.size is None or np.size == o.size) and (np.fill is None or np.fill == o.fill))


def _within(place, o):
    x0, y0, x1, y1 = PLACES[place]
    return x0 <= o.x <= x1 and y0 <= o.y <= y1


def holds(statement, objects):
    """Is the statement true of exactly these objects? A bool."""
    match statement:
        case Exists(np):
            return any(matches(np, o) for o in objects)
        case Relation(a, rel, b):
            dx, dy = DIRECTIONS[rel]
            others = [p for p in objects if matches(b, p)]
            return any(dx * (o.x - p.x) + dy * (o.y - p.y) > MARGIN
                       for o in objects if others and matches(a, o) for p in others)
        case Both(a, b):
            return any(o is not p and matches(b, p) for o in objects if matches(a, o) for p in objects)
        case Count(n, np):
            return sum(matches(np, o) for o in objects) == n
        case Place(np, place):
            return any(_within(place, o) and matches(np, o) for o in objects)
        case Nothing(np):
            return not any(matches(np, o) for o in objects)
        case Every(np, attribute):
            meant = [o for o in objects if matches(np, o)]
            return bool(meant) and all(matches(attribute, o) for o in meant)
        case More(a, b):
            return sum(matches(a, o) for o in objects) > sum(matches(b, o) for o in objects)
    raise TypeError(f"not a statement: {statement!r}")


def noun_phrases(statement):
    """The NPs of a statement, an attribute included."""
    return tuple(v for v in vars(statement).values() if isinstance(v, NP))


@functools.lru_cache(maxsize=1 << 14)
def _representatives(world, nps):
    """What could lie in a slot, one for each pattern of the noun phrases it matches: no statement sees more of it."""
    kinds = {(False,) * len(nps): None}  # what matches nothing is as good as an empty slot
    named = {value for np in nps for value in vars(np).values()}  # of all others in an aspect, one does: much faster
    choices = ([*(v for v in values if v in named), *[v for v in values if v not in named][:1]]
               for values in (world.shapes, world.colors, world.fills, world.sizes))
    for kind in itertools.product(*choices):
        o = Obj(*kind, 0, 0, 0)
        kinds.setdefault(tuple(matches(np, o) for np in nps), kind)
    return tuple(kinds.values())


def fillings(scene, nps):
    """The visible objects with each filling of the panel (none, one or both slots) that the noun phrases tell apart."""
    if scene.panel is None:
        return (scene.objects,)
    kinds = _representatives(scene.world, nps)
    slots = [[(Obj(*kind, x, y, 0),) if kind else () for kind in kinds] for x, y in scene.panel.slots]
    return (scene.objects + first + second for first, second in itertools.product(*slots))


def truth(statement, scene):
    """TRUE, FALSE, or UNKNOWN: some filling of the panel makes it true, another false."""
    visible = holds(statement, scene.objects)
    if not (visible and isinstance(statement, MONOTONE)):
        if any(holds(statement, objects) != visible for objects in fillings(scene, noun_phrases(statement))):
            return Truth.UNKNOWN
    return Truth.TRUE if visible else Truth.FALSE


def is_true(sentence, scene):
    """The Truth of a sentence, by the visible objects and the panel alone; what the panel hides never matters."""
    statement = parse(sentence)
    return Truth.UNPARSABLE if statement is None else truth(statement, scene)


# ---- Captions and their edits ---------------------------------------------------------------------------------------

ONE_OBJECT = (Place, Exists, Count, Place, Exists)
MORE_OBJECTS = (Relation, Both, Place, Count, Exists)  # one of each; Exists where one of these cannot be said


def captions(scene, k=5):
    """k different true captions of the visible objects in turn, the same every time; the first do not depend on k."""
    rng = random.Random(f"captions {scene.world.name} {scene.seed} {scene.split} {scene.index}")
    objects = list(scene.objects)
    kinds = list(ONE_OBJECT if len(objects) == 1 else MORE_OBJECTS)
    rng.shuffle(objects)
    rng.shuffle(kinds)
    objects.sort(key=lambda o: (o.color, o.shape) not in scene.world.held_out)  # test_compositional: the news first
    sentences, said = [], set()
    for attempt in range(100 * k):  # far more than five need
        if len(sentences) == k:
            break
        o = objects[len(sentences) % len(objects)]
        statement = _claim(kinds[attempt % len(kinds)], o, scene, rng) or Exists(describe(o, rng))
        if statement in said and attempt < 20:  # other words for the same claim only if there is little to say
            continue
        sentence = realise(statement, rng)
        if sentence not in sentences:
            said.add(statement)
            sentences.append(sentence)
    return sentences


def describe(o, rng):
    """A noun phrase for an object: nearly always colour and shape, half the time size, and a fill worth a word."""
    luck = rng.random()  # now and then "a large red thing" or "a large disc"
    return NP(shape=None if luck < 0.05 else o.shape, color=None if 0.05 <= luck < 0.1 else o.color,
              fill=o.fill if o.fill != "solid" and rng.random() < 0.5 else None,
              size=o.size if luck < 0.1 or rng.random() < 0.5 else None)


def _claim(kind, o, scene, rng, describe=describe):
    """A true statement of this kind about o, or None. True by construction, also for any filling of a panel."""
    if kind is Relation:
        pairs = [(rel, p) for p in scene.objects for rel, (dx, dy) in DIRECTIONS.items()
                 if dx * (o.x - p.x) + dy * (o.y - p.y) > MARGIN]
        if pairs:
            rel, other = rng.choice(pairs)
            return Relation(describe(o, rng), rel, describe(other, rng))
    elif kind is Both:
        return Both(describe(o, rng), describe(rng.choice([p for p in scene.objects if p is not o]), rng))
    elif kind is Place:
        places = [place for place in PLACES if _within(place, o)]
        if places:
            return Place(describe(o, rng), rng.choice(places))
    elif kind is Count and scene.panel is None:  # behind a panel there may always be one more
        counts = [(sum(matches(np, p) for p in scene.objects), np)
                  for np in (NP(o.shape, o.color), NP(o.shape), NP(color=o.color))]
        n, np = rng.choice([pair for pair in counts if pair[0] > 1] or counts[:1])
        return Count(n, np)
    return None


# Lexeme -> [(lexeme, category, meaning)] that differ in exactly one word, and in meaning. (A wrong plural won't parse.)
_LEXEMES = [(w, c, m) for w, (c, m) in _MEANING.items() if m and w != "one"] + [
    (many, *_MEANING[w]) for many, w in _PLURALS.items() if _MEANING[w][1]]
_NEIGHBOURS = {a: [(b, c, m) for b, c, m in _LEXEMES if c == category and m != meaning
                   and len(b.split()) == len(a.split())
                   and sum(x != y for x, y in zip(a.split(), b.split(), strict=True)) == 1]
               for a, category, meaning in _LEXEMES}
_LEXEME = re.compile(rf"\b(?:{_any_of([*_MEANING, *_PLURALS])})\b")


def edited(caption, scene, rng):
    """The caption with one word changed (its article follows) so that it is false of the scene, or None.

    Colour, shape, fill, size, relation, number or place, at random. Never unknown. Only words that true captions of
    this world use, and no colour-shape pair that is held out of the split, or the words alone would give it away.
    """
    caption, world = normalise(caption), scene.world
    spots = list(_LEXEME.finditer(caption))
    rng.shuffle(spots)
    allowed = {"color": world.colors, "shape": world.shapes, "n": range(1, world.max_objects + 1),
               "fill": [fill for fill in world.fills if fill != "solid"]}
    for spot in spots:
        near = [word for word, category, meaning in _NEIGHBOURS.get(spot[0], [])
                if category not in allowed or meaning in allowed[category]]
        for word in rng.sample(near, len(near)):
            sentence = caption[:spot.start()] + word + caption[spot.end():]
            sentence = re.sub(r"\ban? (.)", lambda m: article(m[1]), sentence)
            statement = parse(sentence)
            if statement is None or (scene.split != "test_compositional" and any(
                    (np.color, np.shape) in world.held_out for np in noun_phrases(statement))):
                continue
            if truth(statement, scene) is Truth.FALSE:
                return sentence
    return None


# ---- Tasks: what they share -----------------------------------------------------------------------------------------

# Words alone must not tell a label, so each text meets each label as often: a group of scenes shares it, or it is drawn
# alike from a scene and its foil, which answers otherwise. A noun phrase describes an object, so it is never held out.
ASPECTS = {"color": "colour", "shape": "shape", "size": "size", "fill": "pattern"}  # of an object, and their names


def _brief(o, rng, without=(), numbers=(1, 1, 2)):
    """A vague noun phrase for an object, true of many others: one attribute, seldom two."""
    names = [name for name in ASPECTS if name not in without and getattr(o, name) != "solid"]
    return NP(**{name: getattr(o, name) for name in rng.sample(names, rng.choice(numbers))})


def _proposal(kinds, scenes, rng):
    """A statement of one of these kinds about an object of any of these scenes, or None."""
    kind, scene, say = rng.choice(kinds), rng.choice(scenes), rng.choice((describe, _brief))
    o, p = rng.choice(scene.objects), rng.choice(rng.choice(scenes).objects)
    if kind is Nothing:
        return Nothing(say(o, rng))
    if kind is More:
        return More(_brief(o, rng), _brief(p, rng))
    if kind is Every:
        return Every(*rng.sample([NP(shape=o.shape), NP(color=o.color), NP(size=o.size)], 2))
    return None if kind is Both and len(scene.objects) == 1 else _claim(kind, o, scene, rng, say)


# ---- Questions with ten answers (the form of VQA v2) ----------------------------------------------------------------

ASKED = {  # what is asked -> questions; {} is a noun phrase, with a place or without
    "color": ("what colour is the {}", "what is the colour of the {}"),
    "shape": ("what shape is the {}", "what is the shape of the {}"),
    "size": ("what size is the {}", "is the {} large or small"),
    "fill": ("what pattern has the {}", "is the {} solid, striped or dotted"),
    "n": ("how many {} are there", "how many {} can you see", "what is the number of {}")}
INVERTED = {"there is ": "is there ", "there are ": "are there ", "the picture shows ": "does the picture show ",
            "we see ": "do we see ", "": "is it true that "}
_ASKED = [(re.compile(text.replace("{}", "(.+?)") + "$"), what) for what, texts in ASKED.items() for text in texts]
_PLACES = {f" {words}": place for place, phrases in WORDS["place"].items() for words in phrases}


@dataclass(frozen=True)
class Question:
    text: str
    answers: tuple  # of ten annotators: most give `answer`, some say it in another word, some are mistaken
    kind: str       # "yes/no" or a key of ASKED
    answer: str


def questions(scene, k=4):
    """Up to k different questions whose answer can be seen, half of them yes/no, the same every time."""
    rng = random.Random(f"questions {scene.world.name} {scene.seed} {scene.split} {scene.index}")
    # Foils are scenes -1, -2, ... of the split; with a panel where the scene has one, or a panel alone would say "yes".
    foils = (make_scene(scene.world, scene.split, ~(scene.index + j), scene.seed) for j in range(50))
    foil = next((s for s in foils if (s.panel is None) == (scene.panel is None)), scene)
    found = {}
    for attempt in range(40 * k):
        ask = (_ask_yes_no, _ask_open)[(len(found) if attempt < 20 * k else attempt) % 2]
        if len(found) < k and (asked := ask(scene, foil, rng)):
            text, kind, value, others = asked
            others = rng.choices(others, k=rng.choice((0, 0, 1, 2, 3, 4)))
            answers = rng.sample([value] * (10 - len(others)) + others, 10)
            found.setdefault(text, Question(text, tuple(answers), kind, value))
    return list(found.values())


def _ask_yes_no(scene, foil, rng):
    kinds = (Place, Relation) if scene.panel else (Exists, Both, Relation, Place, Count, Nothing, Every, More)
    statement = _proposal(kinds, (scene, foil), rng)
    if statement is None or {verdict := truth(statement, scene), truth(statement, foil)} != {Truth.TRUE, Truth.FALSE}:
        return None
    said = next(said for said in iter(lambda: realise(statement, rng), None)  # "is it true that a disc" would not do
                if re.search(r"\b(is|are|can|shows|see|outnumber)\b", said))
    text = next(asked + said[len(told):] for told, asked in INVERTED.items() if said.startswith(told))
    return text + "?", "yes/no", *(("yes", ["no"]) if verdict is Truth.TRUE else ("no", ["yes"]))


def _ask_open(scene, foil, rng):
    what = rng.choice(["n", *scene.world.aspects])
    o = rng.choice(rng.choice((scene, foil) if what == "n" else (scene,)).objects)
    np, place = _brief(o, rng, [what], (0, 1, 2)), rng.choice([None, *(p for p in PLACES if _within(p, o))])
    value = _reply(what, np, place, scene)
    if value is None or what == "n" and (  # none and one would be most of the numbers
            _reply(what, np, place, foil) in (None, value) or value in "01" and rng.random() < 0.5):
        return None
    same = WORDS["n"].get(int(value), ("none",)) if what == "n" else WORDS[what][value][1:]
    likes = [{**vars(o), what: v} for v in ("0123" if what == "n" else getattr(scene.world, what + "s")) if v != value]
    wrong = [like[what] for like in likes if scene.split == "test_compositional"
             or (like["color"], like["shape"]) not in scene.world.held_out]
    phrase = _words(np, None, "many" if what == "n" else "bare", rng)
    text = rng.choice(ASKED[what]).format(phrase + (f" {rng.choice(WORDS['place'][place])}" if place else "")) + "?"
    return text, what, value, [*same, *same, rng.choice(wrong)]


def _reply(what, np, place, scene):
    """What "the np" at the place is like, or how many there are, in a word; None if unknown or not exactly one."""
    replies = set()
    for objects in fillings(scene, (np,)):
        meant = [o for o in objects if matches(np, o) and (place is None or _within(place, o))]
        replies.add(str(len(meant)) if what == "n" else getattr(meant[0], what) if len(meant) == 1 else None)
    return replies.pop() if len(replies) == 1 else None


def answer(question, scene):
    """The answer to a question, by looking: "yes", "no", a number or a word; None if unknown or not of the language."""
    text = normalise(question.rstrip(" ?"))
    for told, asked in INVERTED.items():
        if text.startswith(asked):
            return {Truth.TRUE: "yes", Truth.FALSE: "no"}.get(is_true(told + text[len(asked):], scene))
    for pattern, what in _ASKED:
        if match := pattern.match(text):
            place = next((words for words in _PLACES if match[1].endswith(words)), "")
            nothing = parse(f"there {'are' if what == 'n' else 'is'} no {match[1].removesuffix(place)}")
            return nothing and _reply(what, nothing.np, _PLACES.get(place), scene)
    return None


# ---- Statements on pairs of pictures (the form of NLVR2), and hypotheses (the form of SNLI-VE) ----------------------

_SIMPLE, _MOST = (Exists, Place, Count), (Exists, Both, Relation, Place, Count, More)
PAIR_FORMS = {  # text -> kinds of statements to put in, test; x, y: the objects left and right; {many}: what to count
    "the left picture shows more {many} than the right one": ((), lambda s, x, y: _count(s, x) > _count(s, y)),
    "the right picture shows more {many} than the left one": ((), lambda s, x, y: _count(s, x) < _count(s, y)),
    "both pictures show the same number of {many}": ((), lambda s, x, y: _count(s, x) == _count(s, y)),
    "one picture shows {} and the other {}": (
        _SIMPLE, lambda s, t, x, y: holds(s, x) and holds(t, y) or holds(t, x) and holds(s, y)),
    "together the pictures show {}": ((Count, More), lambda s, x, y: holds(s, x + y)),
    "the left picture shows {}": (_MOST, lambda s, x, y: holds(s, x)),
    "the right picture shows {}": (_MOST, lambda s, x, y: holds(s, y)),
    "both pictures show {}": (_SIMPLE, lambda s, x, y: holds(s, x) and holds(s, y)),
    "exactly one picture shows {}": (_MOST, lambda s, x, y: holds(s, x) != holds(s, y)),
    "neither picture shows {}": (_SIMPLE, lambda s, x, y: not (holds(s, x) or holds(s, y)))}
ENTAILMENT = {Truth.FALSE: 0, Truth.UNKNOWN: 1, Truth.TRUE: 2}  # contradiction, neutral, entailment: SNLI-VE's order


def _count(nothing, objects):
    return sum(matches(nothing.np, o) for o in objects)


def pair_is_true(sentence, left, right):
    """The Truth of a sentence about two scenes, whose panels hide things independently."""
    for form, (_, test) in PAIR_FORMS.items():
        match = re.fullmatch(re.sub("{.*?}", "(.+)", form), normalise(sentence))
        said = [parse(f"there are no {p}" if "{many}" in form else p) for p in (match.groups() if match else [""])]
        if all(said):
            nps = sum(map(noun_phrases, said), ())
            shown = itertools.product(fillings(left, nps), fillings(right, nps))
            first, others = bool(test(*said, *next(shown))), (bool(test(*said, *both)) for both in shown)
            return Truth.UNKNOWN if (not first) in others else Truth.TRUE if first else Truth.FALSE
    return Truth.UNPARSABLE


@dataclass(frozen=True)
class Judged:
    scenes: tuple  # one, or (left, right)
    text: str
    label: int
    group: int     # its items share their text, and have each label equally often


class Pairs(Scenes):
    """Pairs(world, split, n)[i] -> Judged; 4g to 4g + 3 share a sentence: two are false (0), two true (1)."""
    size = 4

    def _make(self, i):
        return _group(type(self).__name__, self.world, self.split, self.seed, i // self.size)[i % self.size]


class Hypotheses(Pairs):
    """Hypotheses(world, split, n)[i] -> Judged; 3g to 3g + 2 share a sentence and have the labels of ENTAILMENT."""
    size = 3


@functools.lru_cache(maxsize=1 << 8)
def _group(task, world, split, seed, group):
    """The items of a group: a sentence and fresh scenes of which it has each label equally often."""
    rng = random.Random(f"{task} {world.name} {seed} {split} {group}")
    scenes = (make_scene(world, split, i, seed) for i in itertools.count(64 * group))  # seldom needs more than 64
    if task == "Pairs":
        form, labels, each, judge = rng.choice(list(PAIR_FORMS)), {Truth.FALSE: 0, Truth.TRUE: 1}, 2, pair_is_true
        kinds, shown = PAIR_FORMS[form][0], zip(scenes, scenes, strict=False)
    elif world.panel:  # all scenes have one, or its absence would exclude "neutral"; no other kind has all three labels
        form, kinds, labels, each, judge = "{}", (rng.choice((Place, Relation)),), ENTAILMENT, 1, is_true
        shown = ((scene,) for scene in scenes if scene.panel)
    else:
        raise UserError(f"nothing is ever hidden in the {world.name} world: hypotheses need the full one")
    while True:
        sample = list(itertools.islice(shown, each * len(labels)))
        for _ in range(60):
            like = rng.choice(sample)  # the sentence may well be true of these scenes
            said = [_proposal(kinds, like, rng) for _ in range(form.count("{}"))]
            many = _words(_brief(rng.choice(rng.choice(like).objects), rng), None, "many", rng)
            text = all(said) and form.format(*(realise(s, rng, phrase=form != "{}") for s in said), many=many)
            verdicts = list(itertools.takewhile(labels.__contains__, (judge(text, *item) for item in sample if text)))
            if all(verdicts.count(label) == each for label in labels):
                return [Judged(item, text, labels[v], group) for item, v in zip(sample, verdicts, strict=True)]


# ---- Questions about tagged objects (the form of VCR) ---------------------------------------------------------------

SHARED = {("in", "what", "are", "alike", "?"): True, ("in", "what", "do", "differ", "?"): False}  # tags stand fourth
ANSWERS = {names: ("in", *" and ".join(map(ASPECTS.get, names)).split()) if names else ("in", "nothing")
           for n in range(len(ASPECTS) + 1) for names in itertools.combinations(ASPECTS, n)}


@dataclass(frozen=True)
class TaggedQuestion:
    """Texts are tuples of tokens, each a word or a tag: a tuple of indices into the objects (and `regions`)."""
    scene: Scene
    question: tuple
    answers: tuple
    label: int
    rationales: tuple
    rationale_label: int


class Tagged(Scenes):
    """Tagged(world, split, n)[i] -> TaggedQuestion. Every answer is right equally often, and so is every rationale."""

    def _make(self, i):
        world, rng = self.world, random.Random(f"tagged {self.world.name} {self.seed} {self.split} {i}")
        tags, words = rng.sample(range(rng.randint(2, world.max_objects)), 2), rng.choice(list(SHARED))
        question, label, place = (*words[:3], tuple(tags), *words[3:]), rng.randrange(4), rng.randrange(4)
        answers = rng.sample([words for names, words in ANSWERS.items() if {*names} <= {*world.aspects}], 4)
        scenes = (make_scene(world, self.split, j, self.seed) for j in itertools.count(64 * i))
        scene = next(s for s in scenes if choose_answer(question, answers, s) == label)
        seen = [NP(**{name: getattr(scene.objects[tag], name) for name in world.aspects}) for tag in tags]
        wrong = []  # with colours exchanged for colours, shapes for shapes ...: they would justify the answer, if true
        while len(wrong) < 3:
            swaps = {name: dict(zip(values, rng.sample(values, len(values)), strict=True))
                     for name in world.aspects for values in [getattr(world, name + "s")]}
            nps = [NP(**{name: swap[getattr(np, name)] for name, swap in swaps.items()}) for np in seen]
            news = {sum((np.color, np.shape) in world.held_out for np in option) for option in (seen, nps)}
            wrong += [nps] * (len(news) == 1 and nps not in (seen, *wrong))
        rationales = [sum((((tag,), "is", *_words(np, None, "one", rng).split(), "and")
                           for tag, np in zip(tags, nps, strict=True)), ())[:-1]
                      for nps in (*wrong[:place], seen, *wrong[place:])]
        return TaggedQuestion(scene, question, tuple(answers), label, tuple(rationales), place)


def _compare(question, things, world):
    """The right answer if tag i is the object (or noun phrase) things[i]; None where that does not follow."""
    same = SHARED.get(tuple(t for t in question if isinstance(t, str)))
    pair = [things.get(tag) for t in question if not isinstance(t, str) for tag in t]
    values = {name: [getattr(o, name, None) for o in pair] for name in world.aspects}
    if same is None or len(pair) != 2 or any(None in two for two in values.values()):
        return None
    return ANSWERS[tuple(name for name, (a, b) in values.items() if (a == b) == same)]


def choose_answer(question, answers, scene):
    """The index of the right answer, by looking; None if it is not there or the question is not of the language."""
    right = _compare(question, dict(enumerate(scene.objects)), scene.world)
    return answers.index(right) if right in answers else None


def choose_rationale(question, answer, rationales, scene):
    """The index of the first rationale that is true of the scene and from which the answer follows, or None."""
    seen = dict(enumerate(scene.objects))
    for i, rationale in enumerate(rationales):
        start, *parts = re.split(r"(?:^| and )\((\d+),\) is ", " ".join(map(str, rationale)))
        said = [(int(tag), parse(f"we see {phrase}")) for tag, phrase in zip(parts[::2], parts[1::2], strict=True)]
        true = not start and all(isinstance(s, Exists) and tag in seen and matches(s.np, seen[tag]) for tag, s in said)
        if true and _compare(question, {tag: s.np for tag, s in said}, scene.world) == answer:
            return i
    return None


if __name__ == "__main__":
    from tools.show_scenes import main

    run_main(main)
