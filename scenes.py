"""The small world: drawn scenes, a little language about them, and an exact judge of every sentence.

Nothing to download, no annotator to trust: a scene is a handful of shapes on a textured ground, a caption is a sentence
of a small grammar, and whether a sentence is true of a scene is computed, not guessed.

    (seed, split, i) ──> Scene ──┬─> render ──> picture             ┌─> captions   five true sentences, with synonyms
                                 ├─> regions ─> boxes, features     ├─> edited     one word changed, now false
                                 └─> language <──> statements ──────┴─> is_true    true / false / unknown / unparsable

    python scenes.py show                    a contact sheet of the tiny world: scenes.png
    python scenes.py show --world full       more shapes, colours and fills, and panels that hide things

*Unknown* is the interesting answer: a grey panel hides up to two further objects, and a sentence is unknown when some
filling of the panel makes it true and another makes it false. What really lies there never matters.

Reading map: the world (what there is) · scenes (where it is) · pictures · regions · the language (words, sentences,
parse and realise) · truth · captions and their edits · the contact sheet.
"""
from __future__ import annotations

import argparse
import collections.abc
import difflib
import functools
import itertools
import math
import random
import re
from dataclasses import dataclass, fields
from enum import Enum

import numpy  # by its full name: `np` is a noun phrase in this file
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

from common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The world: what there is
# ---------------------------------------------------------------------------------------------------------------------

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


WORLDS = {
    "tiny": World(
        "tiny", shapes=("circle", "square", "triangle", "star"),
        colors=("red", "green", "blue", "yellow", "purple", "black"), fills=("solid",), sizes=("small", "large"),
        min_objects=1, max_objects=3, panel=0.0,
        held_out=frozenset({("green", "circle"), ("red", "square"), ("yellow", "triangle"), ("blue", "star")})),
    "full": World(
        "full", shapes=("circle", "square", "triangle", "star", "cross", "heart"),
        colors=("red", "green", "blue", "yellow", "purple", "black", "orange", "pink"),
        fills=("solid", "striped", "dotted"), sizes=("small", "large"), min_objects=1, max_objects=5, panel=1 / 3,
        held_out=frozenset({("green", "circle"), ("red", "square"), ("yellow", "triangle"), ("blue", "star"),
                            ("orange", "cross"), ("pink", "heart")})),
}


def get_world(world):
    """A World for its name (or itself). Raises UserError for an unknown name."""
    if isinstance(world, World):
        return world
    if world not in WORLDS:
        near = difflib.get_close_matches(str(world), WORLDS, n=1)
        raise UserError(f"unknown world {world!r}: " + (f"did you mean {near[0]!r}?" if near else
                                                        f"choose one of {', '.join(WORLDS)}"))
    return WORLDS[world]


def radii(world, size):
    """(smallest, largest) radius of an object of that size word, in units of the picture's side."""
    low, high = SMALL_AND_LARGE[size]
    scale = CROWDED if world.panel > 0 or world.max_objects > 3 else 1.0
    return low * scale, high * scale


# ---------------------------------------------------------------------------------------------------------------------
# Scenes: where it is
# ---------------------------------------------------------------------------------------------------------------------

def make_scene(world, split, index, seed=0):
    """Scene `index` of a split. It depends on (world, seed, split, index) alone: any order, any number of workers."""
    world = get_world(world)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r} of the small world: choose one of {', '.join(SPLITS)}")
    if split == "test_compositional" and not world.held_out:
        raise UserError(f"world {world.name!r} holds no colour-shape pairs out, so it has no test_compositional split")
    # random.Random seeded with a string: the same stream in every process, and a fifth of a numpy Generator's cost.
    rng = random.Random(f"scene {world.name} {seed} {split} {index}")
    count = rng.randint(world.min_objects, world.max_objects)
    panel = _make_panel(world, rng) if rng.random() < world.panel else None
    while True:  # what does not fit is drawn anew: rarely more than once
        kinds = [_kind(world, rng)]
        if split == "test_compositional":
            kinds = [(*rng.choice(_held_out(world)), kinds[0][2], kinds[0][3])]
        while len(kinds) < count:
            color, shape, fill, size = _kind(world, rng)
            if rng.random() < 0.3:  # repeat a colour and shape now and then, so that there is something to count
                color, shape = rng.choice(kinds)[:2]
            kinds.append((color, shape, fill, size))
        objects = _place(world, kinds, panel, rng)
        if objects:
            break
        if panel and rng.random() < 0.5:  # a panel in the middle leaves the least room
            panel = _make_panel(world, rng)
    hidden = ()
    if panel:
        hidden = tuple(_make_obj(world, _kind(world, rng), rng, x, y)
                       for x, y in rng.sample(panel.slots, rng.randint(0, 2)))
    rng.shuffle(objects)  # _place put the large ones first
    return Scene(world, seed, split, index, tuple(objects), hidden, panel, rng.randrange(N_TEXTURES))


@functools.lru_cache
def _held_out(world):
    return sorted(world.held_out)  # sorted: the order of a set differs from process to process


@functools.lru_cache
def _training_pairs(world):
    return [(c, s) for s in world.shapes for c in world.colors if (c, s) not in world.held_out]


def _kind(world, rng):
    return (*rng.choice(_training_pairs(world)), rng.choice(world.fills), rng.choice(world.sizes))


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
            if panel:  # distance to the nearest point of the panel
                dx, dy = max(panel.x0 - o.x, 0, o.x - panel.x1), max(panel.y0 - o.y, 0, o.y - panel.y1)
                if math.hypot(dx, dy) < edge:
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
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self.n))]
        if not -self.n <= i < self.n:
            raise IndexError(f"scene {i} of {self.n}")
        return make_scene(self.world, self.split, i % self.n, self.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------

RGB = {"red": (214, 40, 48), "green": (40, 155, 72), "blue": (36, 98, 214), "yellow": (252, 205, 24),
       "purple": (124, 58, 178), "black": (36, 36, 42), "orange": (244, 126, 28), "pink": (247, 138, 190)}
CHALK = (252, 250, 244)  # of stripes and dots
GREY = (126, 131, 140)   # of the panel
GROUNDS = ((222, 214, 200), (206, 217, 224), (211, 220, 205), (224, 212, 212), (214, 212, 224), (216, 216, 214))
SUPERSAMPLE = 4          # masks are drawn this much larger and reduced: smooth edges


def _polar(*radius, n, turn=0.0):
    """n points around the centre, radii cycling, starting at the top."""
    angles = [2 * math.pi * (i + turn) / n - math.pi / 2 for i in range(n)]
    return [(radius[i % len(radius)] * math.cos(a), radius[i % len(radius)] * math.sin(a))
            for i, a in enumerate(angles)]


def _heart():
    points = [(16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
              for t in (2 * math.pi * i / 40 for i in range(40))]
    return [(x / 17.5, -(y + 2.5) / 17.5) for x, y in points]


# Outlines within the unit circle, y down; a circle is an ellipse of this radius (None), so that areas are comparable.
CIRCLE_RADIUS = 0.9
OUTLINES = {
    "circle": None, "square": _polar(1.0, n=4, turn=0.5), "triangle": _polar(1.0, n=3), "heart": _heart(),
    "star": _polar(1.0, 0.46, n=10),
    "cross": [(0.94 * x, 0.94 * y) for x, y in (
        (-.33, -1), (.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33),
        (.33, 1), (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33))],
}


def render(scene, size):
    """The scene as an RGB PIL image of size × size pixels; the same bits every time."""
    image = _ground(scene.texture, size).copy()
    for o in scene.objects:
        _draw(image, o, size)
    if scene.panel:  # opaque: what lies behind it need not even be drawn
        p, draw = scene.panel, ImageDraw.Draw(image)
        box = [round(v * size) for v in (p.x0, p.y0, p.x1, p.y1)]
        rim = max(1, size // 64)
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=GREY, outline=_shade(GREY, 0.7), width=rim)
        draw.line((box[0] + rim, box[1] + rim, box[2] - 1 - rim, box[1] + rim), fill=_shade(GREY, 1.25), width=rim)
    return image


@functools.lru_cache(maxsize=2 * N_TEXTURES)
def _ground(texture, size):
    """A pale ground: soft noise (clouds, or grain one way or the other) under fine noise, both of low contrast."""
    rng = random.Random(f"ground {texture}")
    cells = rng.choice(((7, 7), (3, 24), (24, 3), (14, 14)))
    soft = Image.frombytes("L", cells, rng.randbytes(cells[0] * cells[1])).resize((size, size), Image.Resampling.BICUBIC)
    fine = Image.frombytes("L", (72, 72), rng.randbytes(72 * 72)).resize((size, size), Image.Resampling.BILINEAR)
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
    outline = OUTLINES[shape]
    if outline is None:
        r *= CIRCLE_RADIUS
        ImageDraw.Draw(mask).ellipse((x - r, y - r, x + r, y + r), fill=255)
    else:
        ImageDraw.Draw(mask).polygon([(x + r * px, y + r * py) for px, py in outline], fill=255)
    return mask


def _pattern(fill, side, x, y, r):
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    if fill == "striped":  # level stripes; the middle keeps the object's colour
        for offset in (-0.93, -0.31, 0.31, 0.93):
            draw.rectangle((0, y + (offset - 0.14) * r, side, y + (offset + 0.14) * r), fill=255)
    else:
        for dx, dy in itertools.product((-0.84, -0.28, 0.28, 0.84), repeat=2):
            draw.ellipse((x + (dx - .15) * r, y + (dy - .15) * r, x + (dx + .15) * r, y + (dy + .15) * r), fill=255)
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Regions, in the form of a detector's output
# ---------------------------------------------------------------------------------------------------------------------

REGION_CROP = 16  # features are a 16×16 RGB crop: 768 numbers
REGION_NOISE = 0.02


def region_class(world, o):
    """The column of `cls_prob` for this object's colour and shape; column 0 is background."""
    return 1 + world.shapes.index(o.shape) * len(world.colors) + world.colors.index(o.color)


def regions(scene, size=64, seed=0):
    """What a detector would say: one region per visible object, and one for the panel (a kind of background).

    boxes [n, 4] pixels x1, y1, x2, y2; features [n, 768] a 16×16 RGB crop in 0..1, flattened, plus a little noise;
    cls_prob [n, 1 + shapes*colours] smoothed classes, see `region_class`. All float32, the noise seeded.
    """
    world, image = scene.world, render(scene, size)
    rng = numpy.random.default_rng(random.Random(f"regions {seed} {scene.seed} {scene.split} {scene.index}").getrandbits(64))
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
        grid[world.shapes.index(o.shape)] += 2
        grid[:, world.colors.index(o.color)] += 2
        row[region_class(world, o)] += 4
    if scene.panel:
        logits[-1, 0] += 7
    cls_prob = numpy.exp(logits - logits.max(1, keepdims=True))
    cls_prob /= cls_prob.sum(1, keepdims=True)
    return {"boxes": boxes, "features": features.astype(numpy.float32), "cls_prob": cls_prob.astype(numpy.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# The language: statements
# ---------------------------------------------------------------------------------------------------------------------

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
class Both:
    """Two different objects, the one a, the other b."""
    a: NP
    b: NP


@dataclass(frozen=True)
class Relation:
    """Some a is left / right / above / below some b: by more than MARGIN between the centres, on that axis alone."""
    a: NP
    rel: str
    b: NP


@dataclass(frozen=True)
class Count:
    """Exactly n; n from 1 to 7 has words. (None at all is Nothing.)"""
    n: int
    np: NP


@dataclass(frozen=True)
class Place:
    """Some np with its centre in that part of the picture, see PLACES."""
    np: NP
    place: str


@dataclass(frozen=True)
class Nothing:
    np: NP


@dataclass(frozen=True)
class Every:
    """Every np matches `attribute` as well, and there is at least one."""
    np: NP
    attribute: NP


@dataclass(frozen=True)
class More:
    """More a than b."""
    a: NP
    b: NP


Statement = Exists | Both | Relation | Count | Place | Nothing | Every | More
MONOTONE = (Exists, Both, Relation, Place)  # once true, further objects cannot make them false

MARGIN = 0.1  # of the picture's side: relations need it between centres, places keep it from the middle
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
_NEAR, _FAR = 0.5 - MARGIN, 0.5 + MARGIN
PLACES = {  # x0, y0, x1, y1 that the centre must lie in
    "left": (0, 0, _NEAR, 1), "right": (_FAR, 0, 1, 1), "top": (0, 0, 1, _NEAR), "bottom": (0, _FAR, 1, 1),
    "top left": (0, 0, _NEAR, _NEAR), "top right": (_FAR, 0, 1, _NEAR),
    "bottom left": (0, _FAR, _NEAR, 1), "bottom right": (_FAR, _FAR, 1, 1),
}

# ---------------------------------------------------------------------------------------------------------------------
# The language: words and sentences, as data
# ---------------------------------------------------------------------------------------------------------------------

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
    (Exists, ""): (
        "{np:one}", "there is {np:one}", "{np:one} can be seen", "the picture shows {np:one}", "we see {np:one}"),
    (Both, ""): (
        "{a:one} and {b:one}", "there is {a:one} and {b:one}", "{a:one} together with {b:one}",
        "the picture shows {a:one} and {b:one}", "we see both {a:one} and {b:one}"),
    (Relation, ""): (
        "{a:one} {rel} {b:one}", "there is {a:one} {rel} {b:one}", "{a:one} is {rel} {b:one}",
        "{rel} {b:one} there is {a:one}", "{b:one} with {a:one} {rel} it"),
    (Count, "single"): (
        "{n:single} {np:bare}", "there is {n:single} {np:bare}", "exactly {n:single} {np:bare} can be seen",
        "the picture shows {n:single} {np:bare}"),
    (Count, "several"): (
        "{n:several} {np:many}", "there are {n:several} {np:many}", "exactly {n:several} {np:many} can be seen",
        "the picture shows {n:several} {np:many}"),
    (Place, ""): (
        "{np:one} {place}", "there is {np:one} {place}", "{np:one} is {place}", "{place} there is {np:one}",
        "{place} we see {np:one}"),
    (Nothing, ""): (
        "there is no {np:bare}", "no {np:bare} can be seen", "there are no {np:many}", "the picture shows no {np:bare}"),
    (Every, "adj"): (
        "every {np:bare} is {attribute:adj}", "each {np:bare} is {attribute:adj}", "all {np:many} are {attribute:adj}"),
    (Every, "noun"): (
        "every {np:bare} is {attribute:one}", "each {np:bare} is {attribute:one}",
        "all {np:many} are {attribute:many}"),
    (More, ""): (
        "more {a:many} than {b:many}", "there are more {a:many} than {b:many}", "{a:many} outnumber {b:many}"),
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

    A skeleton is a sentence with its constituents replaced by their forms: "there is {one} {rel} {one}". Skeletons are
    the keys of a dict, so no sentence can be read in two ways.
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


def realise(statement, rng):
    """One of the sentences that make this statement, template and words chosen by `rng` (a random.Random)."""
    variant = ""
    if isinstance(statement, Count):
        variant = "single" if statement.n == 1 else "several"
    elif isinstance(statement, Every):
        a = statement.attribute
        variant = "adj" if a.shape is None and sum(v is not None for v in (a.color, a.fill, a.size)) == 1 else "noun"
    return "".join([part if isinstance(part, str) else _words(getattr(statement, part[0]), *part, rng)
                    for part in rng.choice(_PIECES[type(statement), variant])])


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


# ---------------------------------------------------------------------------------------------------------------------
# Truth
# ---------------------------------------------------------------------------------------------------------------------

class Truth(str, Enum):
    TRUE = "true"
    FALSE = "false"
    UNKNOWN = "unknown"
    UNPARSABLE = "unparsable"


def matches(np, o):
    """Is this object what the noun phrase says?"""
    return ((np.color is None or np.color == o.color) and (np.shape is None or np.shape == o.shape)
            and (np.size is None or np.size == o.size) and (np.fill is None or np.fill == o.fill))


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
            x0, y0, x1, y1 = PLACES[place]
            return any(x0 <= o.x <= x1 and y0 <= o.y <= y1 and matches(np, o) for o in objects)
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
    """Of all kinds of object that could lie hidden, one for each pattern of which noun phrases it matches.

    A statement sees an object only through its place and these matches, so trying one of each kind tries them all.
    """
    kinds = {}
    for shape, color, fill, size in itertools.product(world.shapes, world.colors, world.fills, world.sizes):
        o = Obj(shape, color, fill, size, 0, 0, 0)
        kinds.setdefault(tuple(matches(np, o) for np in nps), o)
    return tuple(kinds.values())


def truth(statement, scene):
    """TRUE, FALSE, or UNKNOWN: some filling of the panel (none, one or both slots) makes it true, another false."""
    visible = holds(statement, scene.objects)
    if scene.panel is None or (visible and isinstance(statement, MONOTONE)):
        return Truth.TRUE if visible else Truth.FALSE
    slots = [[()] + [(Obj(o.shape, o.color, o.fill, o.size, x, y, 0),) for o in
                     _representatives(scene.world, noun_phrases(statement))] for x, y in scene.panel.slots]
    for first, second in itertools.product(*slots):
        if holds(statement, scene.objects + first + second) != visible:
            return Truth.UNKNOWN
    return Truth.TRUE if visible else Truth.FALSE


def is_true(sentence, scene):
    """The Truth of a sentence, by the visible objects and the panel alone; what the panel hides never matters."""
    statement = parse(sentence)
    return Truth.UNPARSABLE if statement is None else truth(statement, scene)


# ---------------------------------------------------------------------------------------------------------------------
# Captions and their edits
# ---------------------------------------------------------------------------------------------------------------------

ONE_OBJECT = (Place, Exists, Count, Place, Exists)
MORE_OBJECTS = (Relation, Both, Place, Count, Relation)  # Exists where one of these cannot be said


def captions(scene, k=5):
    """k different true captions, the same every time; the first ones do not depend on k.

    They speak of the visible objects in turn, in different kinds of statement and in different words.
    """
    rng = random.Random(f"captions {scene.world.name} {scene.seed} {scene.split} {scene.index}")
    objects = list(scene.objects)
    kinds = list(ONE_OBJECT if len(objects) == 1 else MORE_OBJECTS)
    rng.shuffle(objects)
    rng.shuffle(kinds)
    sentences, said = [], set()
    for attempt in range(100 * k):  # far more than five need
        if len(sentences) == k:
            break
        o = objects[len(sentences) % len(objects)]
        statement = _claim(kinds[attempt % len(kinds)], o, scene, rng) or Exists(describe(o, rng))
        if statement in said and attempt < 4 * k:  # other words for the same claim only if there is little to say
            continue
        sentence = realise(statement, rng)
        if sentence not in sentences:
            said.add(statement)
            sentences.append(sentence)
    return sentences


def describe(o, rng):
    """A noun phrase for an object: nearly always colour and shape, half the time size, and a fill worth a word."""
    size = o.size if rng.random() < 0.5 else None
    fill = o.fill if o.fill != "solid" and rng.random() < 0.5 else None
    luck = rng.random()
    if luck < 0.05:
        return NP(None, o.color, fill, o.size)  # "a large red thing"
    if luck < 0.10:
        return NP(o.shape, None, fill, o.size)  # "a large disc"
    return NP(o.shape, o.color, fill, size)


def _claim(kind, o, scene, rng):
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
        places = [name for name, (x0, y0, x1, y1) in PLACES.items() if x0 <= o.x <= x1 and y0 <= o.y <= y1]
        if places:
            return Place(describe(o, rng), rng.choice(places))
    elif kind is Count and scene.panel is None:  # behind a panel there may always be one more
        counts = [(sum(matches(np, p) for p in scene.objects), np)
                  for np in (NP(o.shape, o.color), NP(o.shape), NP(color=o.color))]
        n, np = rng.choice([pair for pair in counts if pair[0] > 1] or counts[:1])
        return Count(n, np)
    return None


def _neighbours():
    """Lexeme -> [(lexeme, category, meaning)] that differ in exactly one word, and in meaning, but not in number."""
    table = {}
    entries = [(w, c, m) for w, (c, m) in _MEANING.items() if m is not None and w != "one"]
    entries += [(many, "shape", _MEANING[w][1]) for many, w in _PLURALS.items() if _MEANING[w][1] is not None]
    for word, category, meaning in entries:
        table[word] = [
            (w, c, m) for w, c, m in entries if c == category and m != meaning and (w in _PLURALS) == (word in _PLURALS)
            and len(w.split()) == len(word.split())
            and sum(a != b for a, b in zip(w.split(), word.split(), strict=True)) == 1]
    return table


_NEIGHBOURS = _neighbours()
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
        for word, category, meaning in rng.sample(near := _NEIGHBOURS.get(spot[0], []), len(near)):
            if category in allowed and meaning not in allowed[category]:
                continue
            sentence = caption[:spot.start()] + word + caption[spot.end():]
            sentence = re.sub(r"\ban? (.)", lambda m: article(m[1]), sentence)
            statement = parse(sentence)
            if statement is None or truth(statement, scene) is not Truth.FALSE:
                continue
            if scene.split == "test_compositional" or not any(
                    (np.color, np.shape) in world.held_out for np in noun_phrases(statement)):
                return sentence
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The contact sheet
# ---------------------------------------------------------------------------------------------------------------------

def contact_sheet(scenes, title, columns=4, size=224):
    """A PIL image of scenes with their captions underneath."""
    font, bold = ImageFont.load_default(13), ImageFont.load_default(20)
    gap, line, paper, ink = 28, 18, (250, 249, 246), (52, 54, 60)

    def wrapped(sentence):
        lines = [""]
        for word in sentence.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= size - 14:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines

    texts = [[wrapped(sentence) for sentence in captions(scene)] for scene in scenes]
    rows = [range(i, min(i + columns, len(scenes))) for i in range(0, len(scenes), columns)]
    heights = [size + 14 + max(sum(line * len(t) + 4 for t in texts[i]) for i in row) + gap for row in rows]
    sheet = Image.new("RGB", (columns * (size + gap) + gap, 72 + sum(heights)), paper)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 26), title, fill=ink, font=bold)
    corner = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(corner).rounded_rectangle((0, 0, 4 * size - 1, 4 * size - 1), radius=40, fill=255)
    corner, top = corner.reduce(4), 72
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (size + gap)
            sheet.paste(render(scenes[i], size), (left, top), corner)
            y = top + size + 12
            for lines in texts[i]:
                draw.ellipse((left + 2, y + 6, left + 6, y + 10), fill=(186, 180, 168))
                for text in lines:
                    draw.text((left + 13, y), text, fill=ink, font=font)
                    y += line
                y += 4
        top += height
    return sheet


def main(argv=None):
    parser = argparse.ArgumentParser(description="The small world: look at its scenes and their captions.")
    show = parser.add_subparsers(dest="command", required=True).add_parser(
        "show", help="draw a contact sheet of scenes with their captions")
    show.add_argument("--world", default="tiny", choices=list(WORLDS))
    show.add_argument("--split", default="train", choices=SPLITS)
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--out", default="scenes.png", help="file to write (default: scenes.png)")
    args = parser.parse_args(argv)
    title = f"The small world   ·   {args.world}   ·   {args.split}   ·   seed {args.seed}"
    try:
        contact_sheet(Scenes(args.world, args.split, 12, args.seed), title).save(args.out)
    except (OSError, ValueError) as error:  # ValueError: PIL does not know the ending
        raise SystemExit(f"cannot write {args.out}: {error}; give --out a path that ends in .png") from error
    print(f"wrote {args.out}: 12 scenes of the {args.world} world, split {args.split}, seed {args.seed}")


if __name__ == "__main__":
    main()
