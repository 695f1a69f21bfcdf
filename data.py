"""From files to batches: pictures, samples, the order of a run, own data. Knows no model.

    Corpus ── splits ──> Items ── Pictures ──> samples ── collate ──> batches (uint8 pixels, token ids, targets)
                                      ▲
              TrainBatches: which items, in which order, on which process; a resumed run goes on where it stopped

    python data.py check my_photos.jsonl        what the loader sees: counts, broken files, duplicates, caption lengths
    python data.py check coco --root data/coco  any name that corpora.load takes
    python data.py where                        the official data sets: pages, terms, layouts

Pixels stay uint8 until they are on the device (a quarter of the traffic); each model scales them its own way.
Everything random is drawn from (seed, epoch, index), never from a worker's own generator, so the number of workers and
the point at which a run was resumed change nothing.

Reading map: items | pictures | regions | samples | batches | order | loaders | own data.
"""

from __future__ import annotations

import atexit
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

import scenes
from common import UserError, gather_lists
from language import SIDES, Tokenizer, clean_caption, swap_sides

# ---------------------------------------------------------------------------------------------------------------------
# Items


@dataclass(frozen=True)
class Packed:
    """A picture out of an archive: its bytes, and what to call it in messages."""

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Item:
    """One image with its captions, as written. `image` is a file, or a scene that is drawn when it is needed."""

    image_id: int | str
    image: Path | Packed | scenes.Scene
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A picture, or a left and a right one, with a text that asks or says something about them.

    What a question (VQA), a statement (NLVR2) and a hypothesis (SNLI-VE) have in common. Hidden labels are None or ().
    """

    example_id: int | str  # what result files call it
    image_ids: tuple[int | str, ...]
    images: tuple[Path | scenes.Scene, ...]
    text: str
    label: int | None = None  # NLVR2: 0 false, 1 true; SNLI-VE: 0 contradiction, 1 neutral, 2 entailment
    answers: tuple[str, ...] = ()  # VQA: those of the ten annotators, as written
    kinds: tuple[str, ...] = ()  # VQA: answer type (yes/no, number, other) and question type
    group: str = ""  # NLVR2: the sentence of its set; consistent where all examples of it are answered right
    others: tuple[tuple[Path, ...], ...] = ()  # NLVR: the same content drawn in other ways; training takes any


@dataclass(frozen=True)
class Tagged:
    """A text with, for each word, the index of the object that it names, or -1."""

    words: tuple[str, ...]
    tags: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join(self.words)


@dataclass(frozen=True)
class Choice:
    """A question of VCR: four answers, then four rationales for the right answer. Labels are None where hidden."""

    example_id: str
    image_ids: tuple[int | str]
    images: tuple[Path | scenes.Scene]
    question: Tagged
    answers: tuple[Tagged, ...]
    rationales: tuple[Tagged, ...]
    label: int | None
    rationale_label: int | None
    objects: tuple[str, ...]  # class names; tags and boxes go by this order
    metadata: Path | None = None  # the JSON file with the boxes; None: the picture is a scene, which knows them
    others: tuple = ()  # as of Example

    def asked(self, task: str, answer: int | None = None) -> tuple[tuple[Tagged, ...], tuple[Tagged, ...], int | None]:
        """(parts of what is asked, the four that may follow, the right one's index) of task "qa" or "qar".

        Rationales are given the right answer, or answer number `answer`, as a server that knows the labels wants it.
        """
        if task == "qa":
            return (self.question,), self.answers, self.label
        given = self.label if answer is None else answer
        if given is None:
            raise UserError(f"{self.example_id}: its right answer is hidden, so say which one the rationales are given")
        return (self.question, self.answers[given]), self.rationales, self.rationale_label


@dataclass
class Corpus:
    """Named splits of Items, Examples or Choices: train, val, test..., and server..., whose labels only a server knows.

    notes: sentences that a run prints before it starts. answers: VQA's answer vocabulary, by class index.
    """

    name: str
    splits: dict[str, Sequence[Item | Example | Choice]]
    notes: list[str] = field(default_factory=list)
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.splits = {split: items for split, items in self.splits.items() if len(items)}
        if self.finally_evaluated()[:1] in (["val"], ["train"]):
            instead = "val, which also chooses `best`," if "val" in self.splits else "train"
            self.notes.append(f"{self.name} has no test split with labels: {instead} is evaluated instead.")
        if "val" not in self.splits and "train" in self.splits:
            self.notes.append(f"{self.name} has no val split: `best` is `last`, and choices are made on train.")

    def finally_evaluated(self) -> list[str]:
        """The splits that a final evaluation scores: the test ones, else val, else train (a handful of pictures)."""
        tests = [name for name in self.splits if name.startswith("test")]
        return tests or [name for name in ("val", "train") if name in self.splits][:1]

    def hidden(self) -> list[str]:
        """The splits of which only a result file can be written."""
        return [name for name in self.splits if name.startswith("server")]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class BadImage(Exception):
    """A picture that cannot be read. `path` is the file, `reason` says why; str() gives both."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(path, reason)  # both as args, so that the exception survives pickling between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load_image(image: Path | str | Packed | scenes.Scene, size: int) -> Image.Image:
    """A file, its bytes or an opened picture as an upright PIL RGB image of its own size; a scene drawn at size x size.

    The content decides on the decoder, not the extension (many of NLVR2's .png files are JPEG). Transparency is laid
    over black, the colour of the padding. Raises BadImage for whatever cannot be read.
    """
    if isinstance(image, Image.Image):
        return _to_rgb(image)
    if not isinstance(image, (str, os.PathLike, Packed)):
        return scenes.render(image, size)
    try:
        with Image.open(io.BytesIO(image.content) if isinstance(image, Packed) else image) as opened:
            return _to_rgb(opened)  # Image.open reads only the header; what is cut off shows here
    except FileNotFoundError:
        raise BadImage(image, "no such file") from None
    except UnidentifiedImageError:
        n_bytes = len(image.content) if isinstance(image, Packed) else os.path.getsize(image)
        reason = "not a picture in a format that Pillow knows" if n_bytes else "the file is empty"
        raise BadImage(image, reason) from None
    except Exception as error:  # on damaged files the decoders raise nearly everything, struct.error included
        raise BadImage(image, f"{type(error).__name__}: {error}") from error


# Phones store the sensor's view and this EXIF tag. ImageOps.exif_transpose would also write the EXIF anew, and fail on
# pictures whose other tags are damaged.
ORIENTATION = 0x0112
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # fmt: skip


def _to_rgb(image: Image.Image) -> Image.Image:
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it, leaving nearly everything white
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels, whose range is not known; save the picture with 8 or 16 bits")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known; save the picture with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an RGB image, too


AUGMENTATIONS = ("none", "crop", "crop+flip", "rand")
FRAMES = ("pad", "centre")


def to_pixels(image: Image.Image, size: int, augment: str = "none", rng: random.Random | None = None,
              frame: str = "pad") -> torch.Tensor:
    """PIL RGB image -> uint8 [3, size, size], resized by bicubic interpolation with antialiasing.

    frame "pad": longer side to `size`, bottom or right padded with raw 0. "centre": shorter side to `size`, then the
    square in the middle. augment "crop": instead of either, a random box with 0.5 to 1 of the area and an aspect of
    3/4 to 4/3, stretched to the square. "crop+flip": mirrored besides, half of the time. "rand": RandAugment before the
    resize; it shears and turns, but never mirrors. Every choice is drawn from `rng`. UserError for unknown names.
    """
    for name, value, known in (("augment", augment, AUGMENTATIONS), ("frame", frame, FRAMES)):
        if value not in known:
            raise UserError(f"{name} = {value!r} is not known; choose one of {', '.join(known)}")
    if augment == "rand":
        image = _rand_augment(image, rng)
    box = _random_box(image.size, rng) if augment.startswith("crop") else None
    width = height = size
    if frame == "centre" and not box:
        image = _centre_square(image, size)
    else:
        if not box:
            width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if augment == "crop+flip" and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = np.zeros((3, size, size), dtype=np.uint8)
    canvas[:, :height, :width] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(canvas)


def _centre_square(image: Image.Image, size: int) -> Image.Image:
    """torchvision's Resize(size, BICUBIC) and CenterCrop(size), pixel for pixel; where one side is more than 64 times
    the other, within a grey level, or a few in noise, whose overshoot Pillow clips between its passes."""
    (W, H), short = image.size, min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = int(round((width - size) / 2)), int(round((height - size) / 2))
    if max(width, height) <= 64 * size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + size, top + size))
    # Whole, a picture of 1 x 5000 would become gigabytes; so each pass computes only what the square shows.
    image = image.resize((size, H), Image.Resampling.BICUBIC, box=(left * W / width, 0, (left + size) * W / width, H))
    rows = top * H / height, (top + size) * H / height
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(0, rows[0], size, rows[1]))


def _rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """Two of torchvision's 14 operations at magnitude 9 of 0 to 30; what comes into view at the edges is black."""
    from torchvision.transforms import RandAugment

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.getrandbits(63))  # torch.manual_seed would seed the GPU's as well
        return RandAugment(num_ops=2, magnitude=9)(image)


def within(image: Image.Image, short: int, long: int) -> torch.Tensor:
    """PIL RGB image -> uint8 [3, h, w] in its own shape: the shorter side `short`, unless the longer would pass `long`.

    Smaller pictures grow. Bilinear without antialiasing, sides rounded half up, as OpenCV's cv2.resize in mmcv's
    imrescale does it (its fixed-point arithmetic differs by a grey level here and there).
    """
    scale = min(long / max(image.size), short / min(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if (width, height) == image.size:
        return pixels.contiguous()
    large = torch.nn.functional.interpolate(pixels[None].float(), (height, width), mode="bilinear")[0]
    return large.round().to(torch.uint8)


def are_wide(items: Sequence) -> np.ndarray | None:
    """bool [len(items)]: is the (first) picture wider than high? Scenes are square. Files are asked for their headers
    alone, by many threads; one that cannot be read counts as not wide, and is named when its turn comes. None for a
    mixture: what its items are changes with the epoch, and millions of headers would take hours."""
    def is_wide(path) -> bool:
        try:
            with Image.open(path) as image:
                width, height = image.size
                # where a PNG's header has no EXIF, Pillow would decode it all to look behind the pixels
                tags = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
                return (height > width) if tags.get(ORIENTATION) in (5, 6, 7, 8) else width > height
        except Exception:  # whatever the decoders raise
            return False

    if hasattr(items, "of_epoch"):
        return None
    if isinstance(files_of(items[0])[0], scenes.Scene):
        return np.zeros(len(items), dtype=bool)
    files = [files_of(item)[0] for item in items]
    distinct = list(dict.fromkeys(files))  # a picture has several questions
    with ThreadPoolExecutor(16) as pool:
        wide = dict(zip(distinct, pool.map(is_wide, distinct), strict=True))
    return np.array([wide[file] for file in files])


def _random_box(wide_high: tuple[int, int], rng: random.Random) -> tuple[float, float, float, float] | None:
    """left, top, right, bottom; None for a picture so long that no such box fits: it is left whole."""
    width, height = wide_high
    for _ in range(10):
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        limit = min(1.0, aspect * height / width, width / (height * aspect))  # share of the area that still fits
        if limit >= 0.5:
            area = rng.uniform(0.5, limit) * width * height
            w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
            left, top = rng.uniform(0, max(0.0, width - w)), rng.uniform(0, max(0.0, height - h))
            return left, top, min(left + w, width), min(top + h, height)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Regions


@dataclass
class Regions:
    """What a detector says about one picture, see regions.py. All float32. Checked where it is made: BadImage."""

    features: np.ndarray  # [n, D]
    boxes: np.ndarray  # [n, 4] x1, y1, x2, y2 in pixels
    size: tuple[float, float]  # width, height of the picture
    classes: np.ndarray | None = None  # [n, C] probabilities, column 0 the background; None: the source has none

    def locations(self) -> np.ndarray:
        """[n, 5] x1 / W, y1 / H, x2 / W, y2 / H, area / (W H)."""
        x1, y1, x2, y2 = (self.boxes / np.array([*self.size, *self.size], dtype=np.float32)).T
        return np.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)], axis=1)

    def first(self, n: int) -> Regions:
        """The first n in the order of the file."""
        return Regions(self.features[:n], self.boxes[:n], self.size, None if self.classes is None else self.classes[:n])

    def checked(self, where: Path | str, n_classes: int | None = None) -> Regions:
        """Itself with boxes clipped to the picture, or BadImage that says what is wrong."""
        n = len(self.boxes)
        if not n:
            raise BadImage(where, "it has no region; extract this picture again with a lower threshold")
        arrays = {"features": self.features, "boxes": self.boxes}
        arrays |= {"cls_prob": self.classes} if self.classes is not None else {}
        for name, array in arrays.items():
            if array.ndim != 2 or len(array) != n or not array.shape[1]:
                raise BadImage(where, f"`{name}` has the shape {list(array.shape)}, not [{n} regions, numbers of each]")
            if not np.isfinite(array).all():
                raise BadImage(where, f"`{name}` holds a number that is not finite; extract this picture again")
        if self.boxes.shape[1] != 4 or not all(0 < side < math.inf for side in self.size):
            raise BadImage(where, f"boxes of {self.boxes.shape[1]} numbers in a picture of {self.size}")
        if n_classes and self.classes is not None and self.classes.shape[1] != n_classes:
            raise BadImage(where, f"{self.classes.shape[1]} class probabilities a region; {n_classes} are expected")
        if self.classes is not None and ((self.classes < 0).any() or (self.classes.sum(1) > 1.01).any()):
            raise BadImage(where, "`cls_prob` are no probabilities: below 0, or more than 1 together")
        width, height = self.size
        limit = np.array([width, height] * 2, dtype=np.float32)
        if (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise BadImage(where, "a box whose right or lower edge comes before the other; boxes are x1, y1, x2, y2")
        if (self.boxes < -1).any() or (self.boxes > limit + 1).any():
            raise BadImage(where, f"a box reaches out of the picture of {width:g} x {height:g} by more than a pixel")
        self.boxes = np.clip(self.boxes, 0, limit)
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Samples

class Samples(Dataset):
    """What the samples of all tasks share: a picture or its regions, texts as token ids, one seed for all luck.

    Training, key (epoch, index): augmented; the same (seed, epoch, index) gives the same sample in every process.
    Evaluation, key index: as it is. Where `items` has a method of_epoch (mixture.py), it says what a key stands for.
    A picture that cannot be read gives {"image_id", "bad": message}, which the loaders judge. Pictures are uint8
    [3, S, S], framed as `frame` says; where `regions` is given (a source of them, see regions.py) they are Regions;
    where `sides` is given they keep their shape, see `within`: (short, long), or (least, most, long) where each
    training sample draws its short side; then `size` is that of drawn scenes.
    mirror: the probability that a training sample of Examples or Choices sees the regions of the mirrored picture,
    where the source has them; then left and right change places in its texts.
    """

    def __init__(self, items: Sequence, tokenizer: Tokenizer | None, size: int, max_len: int | None = None,
                 train: bool = False, augment: str = "none", seed: int = 0, regions=None, mirror: float = 0.0,
                 sides: tuple[int, ...] = (), frame: str = "pad"):
        self.items, self.tokenizer, self.size, self.train, self.seed = items, tokenizer, size, train, seed
        self.max_len, self.augment, self.regions, self.mirror = max_len, augment, regions, mirror
        self.sides, self.frame = sides, frame

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image_id = index  # of a packed picture no more is known, where its archive is damaged
        try:
            item = self.items.of_epoch(epoch, index) if hasattr(self.items, "of_epoch") else self.items[index]
            image_id = ids_of(item)[0]
            return self.sample(item, random.Random(f"{self.seed}/{epoch}/{index}"))  # the same on every machine
        except BadImage as bad:
            return {"image_id": image_id, "bad": str(bad)}

    def is_mirrored(self, rng: random.Random) -> bool:
        """Drawn for a training sample; where there is nothing to draw, `rng` stays as it is."""
        can_be = self.train and self.mirror > 0 and self.regions is not None and self.regions.mirrors
        return can_be and rng.random() < self.mirror

    def see(self, image_id: int | str, image, said: Iterable[str], rng: random.Random, mirrored: bool = False) -> dict:
        """{"regions": Regions} or {"pixels"}. Pixels whose texts speak of left or right are not mirrored."""
        if self.regions is not None:
            return {"regions": self.regions(image_id, image, mirrored)}
        if self.sides:
            *short, long = self.sides
            return {"pixels": within(load_image(image, self.size), rng.randint(short[0], short[-1]), long)}
        augment = self.augment if self.train else "none"
        if augment == "crop+flip" and any(SIDES.search(text) for text in said):
            augment = "crop"  # HERE[data-11]: mirrored, "left of" would be false
        return {"pixels": to_pixels(load_image(image, self.size), self.size, augment, rng, self.frame)}

    def __getitems__(self, keys: list) -> list[dict]:
        """One process' share of a batch. Where no picture of it can be read, one of the next in the file steps in.

        Without any picture this process could not take its part in the step while the others wait for it. Which one
        steps in follows from the keys, so it is the same after a resume.
        """
        try:
            samples = [self[key] for key in keys]
            if self.train and all("bad" in sample for sample in samples):
                epoch, index = keys[-1]
                for step in range(1, min(len(self), 20)):
                    samples.append(self[epoch, (index + step) % len(self)])
                    if "bad" not in samples[-1]:
                        break
        except UserError as error:  # from a worker it would arrive buried in torch's traceback; Loader raises it anew
            return [{"error": str(error)}]
        return samples


class Pictures(Samples):
    """Items as samples. Training: {"image_id", "pixels", "ids": `captions` lists of token ids without special tokens,
    cut to `max_len`}. The captions are drawn without replacement; where an item has fewer, each comes once before one
    comes twice. Evaluation: {"image_id", "pixels", "captions": tuple of strings as written}.
    """

    def __init__(self, items: Sequence[Item], tokenizer: Tokenizer | None, size: int, captions: int = 5, **more):
        super().__init__(items, tokenizer, size, **more)
        self.n_captions = captions

    def sample(self, item: Item, rng: random.Random) -> dict:
        if not self.train:
            seen = self.see(item.image_id, item.image, item.captions, rng)
            return {"image_id": item.image_id, **seen, "captions": item.captions}
        if not item.captions:
            raise UserError(f"image {item.image_id} has no caption to train on")
        drawn: list[str] = []
        while len(drawn) < self.n_captions:
            drawn += rng.sample(item.captions, len(item.captions))
        ids = [self.tokenizer.encode(clean_caption(text), self.max_len) for text in drawn[: self.n_captions]]
        return {"image_id": item.image_id, **self.see(item.image_id, item.image, item.captions, rng), "ids": ids}


class Examples(Samples):
    """Examples as samples: {"example_id", "image_id", "pixels" or "regions", "texts", "label", "soft"}.

    pixels: [3, S, S], of pairs a list of two. texts: one text, of one part: token ids cut to `max_len`. label: -100
    where hidden. soft: (class, score) of each answer in the vocabulary `answers`, for VQA.
    """

    def __init__(self, items: Sequence[Example], *rest, answers: Sequence[str] = (), **more):
        super().__init__(items, *rest, **more)
        self.classes = {answer: number for number, answer in enumerate(answers)}

    def sample(self, item: Example, rng: random.Random) -> dict:
        images = rng.choice((item.images, *item.others)) if self.train else item.images
        text, answers, mirrored = item.text, item.answers, self.is_mirrored(rng)
        if mirrored:  # OFFICIAL: TDEN swaps left and right in questions and in answers, which changes their classes
            text, answers = swap_sides(text), tuple(map(swap_sides, answers))
        seen = [self.see(image_id, image, (text, *answers), rng, mirrored)
                for image_id, image in zip(item.image_ids, images, strict=True)]  # fmt: skip
        if len(seen) > 1:
            if self.regions is not None:
                raise UserError("pairs of pictures are not read as regions; leave out --regions")
            seen[0] = {"pixels": [one["pixels"] for one in seen]}
        ids = self.tokenizer.encode(clean_caption(text), self.max_len)  # HERE[data-10]
        label = -100 if item.label is None else item.label
        return {"example_id": item.example_id, "image_id": item.image_ids[0], **seen[0], "texts": [[ids]],
                "label": label, "soft": soft_scores(answers, self.classes)}  # fmt: skip


class Choices(Samples):
    """Choices as samples of task "qa" or "qar": {"example_id", "image_id", "pixels" or "regions" and "objects",
    "texts", "tags", "label"}.

    texts: four, each the parts of what is asked and one that may follow, cut to `max_len` together. tags: of each token
    the object it names, or -1. objects: Regions of the objects, where `regions` is given; cropping would move the boxes
    away from the picture, so there is no augmentation. `answer`: which answer the rationales are given, None for the
    right one.
    """

    def __init__(self, items: Sequence[Choice], *rest, task: str = "qa", answer: int | None = None, **more):
        super().__init__(items, *rest, **more)
        self.task, self.answer, self.augment = task, answer, "none"

    def sample(self, item: Choice, rng: random.Random) -> dict:
        asked, choices, label = item.asked(self.task, self.answer)
        mirrored = self.is_mirrored(rng)
        rows = [_cut([self._encode(text, mirrored) for text in (*asked, choice)], self.max_len) for choice in choices]
        seen = self.see(item.image_ids[0], item.images[0], (), rng, mirrored)
        if self.regions is not None:
            seen["objects"] = self.regions.of_objects(item, mirrored)
        return {"example_id": item.example_id, "image_id": item.image_ids[0], **seen,
                "texts": [[[i for i, _ in part] for part in row] for row in rows],
                "tags": [[[tag for _, tag in part] for part in row] for row in rows],
                "label": -100 if label is None else label}  # fmt: skip

    def _encode(self, text: Tagged, mirrored: bool = False) -> list[tuple[int, int]]:
        """(token id, tag) of each token; word by word, which gives the tokens of the whole text."""
        said = map(swap_sides, text.words) if mirrored else text.words  # HERE[data-13]: else "left of" would be false
        words = enumerate(zip(said, text.tags, strict=True))
        return [(i, tag) for n, (word, tag) in words for i in self.tokenizer.encode(" " * bool(n) + word.lower())]


def _cut(parts: list[list], most: int | None) -> list[list]:
    """Shortened to `most` tokens together, from the ends (YehLi/xmodaler:xmodaler/datasets/images/vcr.py).

    Question and answer: the longer loses one, the question where they are equal. Before a rationale: the rationale
    while it is longer than both, then the question down to one token, then the answer.
    """
    *asked, last = parts
    while most and sum(map(len, parts)) > most:
        is_long = len(last) > sum(map(len, asked))
        rest = asked[0] if len(asked) == 1 or len(asked[0]) > 1 else asked[1]
        (last if is_long or not rest else rest).pop()
    return parts


def ids_of(item: Item | Example | Choice) -> tuple[int | str, ...]:
    """The ids of its pictures."""
    return (item.image_id,) if isinstance(item, Item) else item.image_ids


def files_of(item: Item | Example | Choice) -> tuple:
    """Its pictures."""
    return (item.image,) if isinstance(item, Item) else item.images


# Of 0, 1, 2, 3, 4 or more annotators who agree. It is what VQA's accuracy gives an answer, each annotator left out in
# turn (hengyuan-hu/bottom-up-attention-vqa:tools/compute_softscore.py).
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


def soft_scores(answers: Sequence[str], classes: dict[str, int]) -> list[tuple[int, float]]:
    """(class, score) of each distinct answer that is a class. HERE[data-1]: as written, so "Two" is no vote for "2"."""
    counts = Counter(answers)
    return [(classes[text], SOFT_SCORES[min(n, 4)]) for text, n in counts.items() if text in classes]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate(samples: list[dict], bos: int, eos: int, pad: int, n_classes: int = 0, multiple: int = 0) -> dict:
    """Samples -> one batch of the B readable ones. {"error": message} alone is handed on.

    Always: image_id, a list of B; bad: messages about the unreadable ones; pixels, uint8 [B, 3, S, S] or, of pairs,
    [B, 2, 3, S, S], or what pad_regions gives, or, where `multiple` is given, pad_pixels. Pictures in training: what
    pad_captions gives, k rows an image, image-major: row b*k + j is caption j of image b; in evaluation captions: a
    list of B tuples of strings.
    Examples and Choices: example_id, a list of B; labels int64 [B], -100 where hidden; what pad_texts gives, four rows
    a Choice, and their tags int64 [4 B, T]; for VQA the soft scores as targets float32 [B, n_classes].
    """
    if "error" in samples[0]:
        return samples[0]
    good = [sample for sample in samples if "bad" not in sample]
    batch = {"image_id": [sample["image_id"] for sample in good], "bad": [s["bad"] for s in samples if "bad" in s]}
    if not good:
        return batch
    first = good[0]
    if "pixels" in first:
        rows = [sample["pixels"] for sample in good]
        pairs = isinstance(rows[0], list)
        flat = [one for row in rows for one in row] if pairs else rows
        found = pad_pixels(flat, multiple) if multiple else {"pixels": torch.stack(flat)}
        batch |= {name: x.unflatten(0, (-1, 2)) if pairs else x for name, x in found.items()}
    for name in {"regions", "objects"} & first.keys():
        batch |= pad_regions([sample[name] for sample in good], name)
    if "captions" in first:
        return batch | {"captions": [sample["captions"] for sample in good]}
    if "ids" in first:
        return batch | pad_captions([row for sample in good for row in sample["ids"]], bos, eos, pad)
    batch |= {"example_id": [s["example_id"] for s in good], "labels": torch.tensor([s["label"] for s in good])}
    batch |= pad_texts([row for s in good for row in s["texts"]], bos, eos, pad)
    if "tags" in first:
        batch["tags"] = pad_texts([row for s in good for row in s["tags"]], -1, -1, -1)["ids"]
    if n_classes:
        batch["targets"] = torch.zeros(len(good), n_classes)
        for row, sample in zip(batch["targets"], good, strict=True):
            for number, score in sample["soft"]:
                row[number] = score
    return batch


def pad_pixels(pictures: list[torch.Tensor], multiple: int) -> dict[str, torch.Tensor]:
    """Pictures uint8 [3, h, w] of any shape -> pixels uint8 [B, 3, H, W], 0 on the right and below, H and W the next
    multiples; sizes int64 [B, 2], h and w of each."""
    sizes = torch.tensor([x.shape[1:] for x in pictures])
    H, W = ((side + multiple - 1) // multiple * multiple for side in sizes.amax(0).tolist())
    pixels = torch.zeros(len(pictures), 3, H, W, dtype=torch.uint8)
    for target, picture in zip(pixels, pictures, strict=True):
        target[:, : picture.size(1), : picture.size(2)] = picture
    return {"pixels": pixels, "sizes": sizes}


def pad_texts(rows: list[list[list[int]]], bos: int, eos: int, pad: int) -> dict[str, torch.Tensor]:
    """Texts of one or more parts as token ids without special tokens -> tensors [len(rows), T], T = the longest.

    ids int64: bos part eos [part eos ...], padded on the right; segments int64: 0, of the last of several parts and its
    eos 1; keep_mask bool: True = real.
    """
    flat = [[bos, *(i for part in row for i in (*part, eos))] for row in rows]
    ends = [(len(row[-1]) + 1) * (len(row) > 1) for row in rows]
    second = [[0] * (len(ids) - end) + [1] * end for ids, end in zip(flat, ends, strict=True)]
    length = max(map(len, flat))
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in flat])
    segments = torch.tensor([row + [0] * (length - len(row)) for row in second])
    keep_mask = torch.arange(length) < torch.tensor([len(row) for row in flat])[:, None]
    return {"ids": ids, "segments": segments, "keep_mask": keep_mask}


def pad_regions(rows: list[Regions], name: str = "regions") -> dict[str, torch.Tensor]:
    """Regions of B pictures -> tensors padded with 0 to the most regions N, each under `name` and its ending.

    regions float32 [B, N, D]; regions_locations [B, N, 5]; regions_boxes [B, N, 4] in pixels; regions_classes
    [B, N, C], where all of them have class probabilities; regions_keep_mask bool [B, N], True = real.
    """
    def pad(arrays):
        padded = np.zeros((len(arrays), max(map(len, arrays)), arrays[0].shape[1]), dtype=np.float32)
        for target, array in zip(padded, arrays, strict=True):
            target[: len(array)] = array
        return torch.from_numpy(padded)

    widths = {row.features.shape[1] for row in rows}
    if len(widths) > 1:
        raise UserError(f"region features of {' and '.join(map(str, sorted(widths)))} numbers: one detector for all")
    batch = {name: pad([row.features for row in rows]), f"{name}_boxes": pad([row.boxes for row in rows])}
    batch[f"{name}_locations"] = pad([row.locations() for row in rows])
    if all(row.classes is not None for row in rows):
        batch[f"{name}_classes"] = pad([row.classes for row in rows])
    lengths = torch.tensor([len(row.boxes) for row in rows])
    return batch | {f"{name}_keep_mask": torch.arange(int(lengths.max())) < lengths[:, None]}


def pad_captions(rows: list[list[int]], bos: int, eos: int, pad: int) -> dict[str, torch.Tensor]:
    """Captions as token ids without special tokens -> tensors [len(rows), T], T = longest + 1.

    ids       int64  bos w1 .. wn, padded with `pad` on the right
    targets   int64  w1 .. wn eos, padded with -100: what each position is to predict
    keep_mask bool   True = real. Ask it, not the id: GPT-2 pads with its bos.
    """
    length = 1 + max(len(row) for row in rows)
    ids = torch.tensor([[bos, *row] + [pad] * (length - 1 - len(row)) for row in rows])
    targets = torch.tensor([[*row, eos] + [-100] * (length - 1 - len(row)) for row in rows])
    return {"ids": ids, "targets": targets, "keep_mask": targets != -100}


def whole_captions(batch: dict, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch of captions (ids bos w, targets w eos): ids bos w eos [R, T + 1], and their keep mask."""
    is_real = batch["targets"] != -100
    ids = torch.cat([batch["ids"][:, :1], batch["targets"].masked_fill(~is_real, pad)], dim=1)
    return ids, torch.nn.functional.pad(is_real, (1, 0), value=True)


def mask_words(ids, may_mask, mask: int, vocab_size: int, share: float, luck: torch.Generator, at_least_one=False):
    """BERT's corruption (arXiv 1810.04805). -> corrupted ids, labels: the true ids where selected, -100 elsewhere.

    may_mask bool like ids [R, T]: no special tokens, no padding. Of `share` of these words 80 % become `mask`, 10 % any
    token of the vocabulary, 10 % stay. at_least_one: where a text would have none, one of them is selected.
    """
    order = torch.rand(ids.shape, generator=luck)
    is_selected = (order < share) & may_mask
    if at_least_one:
        is_selected |= first_of(order, may_mask, 1)
    lot = torch.rand(ids.shape, generator=luck)
    others = torch.randint(vocab_size, ids.shape, generator=luck)
    shown = torch.where(lot < 0.8, mask, torch.where(lot < 0.9, others, ids))
    return torch.where(is_selected, shown, ids), ids.masked_fill(~is_selected, -100)


def first_of(order, may_be, n):
    """bool [R, T]: in each row the n places (a number, or int64 [R]) of lowest `order`, of [0, 1), among may_be [R, T];
    all of them where there are fewer."""
    rank = order.masked_fill(~may_be, 2.0).argsort(1).argsort(1)
    return may_be & (rank < (n[:, None] if isinstance(n, torch.Tensor) else n))


def exchange(share: float, luck: torch.Generator, *rows):
    """Tensors [R, ...] where a random `share` of the rows have changed places among one another: noise in captions."""
    if not share:
        return rows
    places = (torch.rand(len(rows[0]), generator=luck) < share).nonzero()[:, 0]
    taken = torch.arange(len(rows[0])).index_put_((places,), places[torch.randperm(len(places), generator=luck)])
    return tuple(x[taken] for x in rows)


def words_said(batch: dict, tok: Tokenizer, vocab_size: int) -> torch.Tensor:
    """Of a batch of captions: float32 [B, V], 1 where a token is in one of the picture's captions; no special ones."""
    B = len(batch["pixels"])
    words = torch.zeros(B, vocab_size).scatter_(1, batch["ids"].view(B, -1), 1.0)
    words[:, [tok.bos, tok.eos, tok.pad]] = 0.0
    return words


def to_device(model: torch.nn.Module, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: x.to(device, non_blocking=True) for name, x in rows.items()}


def pieces_of(rows: dict[str, torch.Tensor], pairs: int) -> list[dict[str, torch.Tensor]]:
    """The tensors of a step in pieces of `pairs` (0: whole), but never less than a picture with all its texts.

    Every tensor has a row for each of B pictures, or k rows for each, image-major.
    """
    B, most = min(map(len, rows.values())), max(map(len, rows.values()))
    pictures = max(1, pairs * B // most) if pairs else B
    cut = {name: x.split(pictures * (len(x) // B)) for name, x in rows.items()}
    return [dict(zip(cut, piece, strict=True)) for piece in zip(*cut.values(), strict=True)]


def equal_pieces(rows: dict[str, torch.Tensor], pairs: int) -> list[dict[str, torch.Tensor]]:
    """As pieces_of, but as many on every process, where each piece exchanges something: also where one process has
    fewer pictures, unreadable ones being left out. Sizes of pieces differ by one picture."""
    if not pairs:
        return [rows]
    B, most = min(map(len, rows.values())), max(map(len, rows.values()))
    shares = gather_lists([(B, math.ceil(most / pairs))])
    n = min(min(B for B, _ in shares), max(wanted for _, wanted in shares))
    first = [round(i * B / n) for i in range(n + 1)]
    return [{name: x[a * (len(x) // B) : b * (len(x) // B)] for name, x in rows.items()}
            for a, b in zip(first, first[1:], strict=False)]  # fmt: skip


def picture_numbers(batch: dict, k: int) -> torch.Tensor:
    """int64 [B * k] for k texts of each picture: equal where the pictures are the same."""
    number = {image_id: n for n, image_id in enumerate(dict.fromkeys(batch["image_id"]))}
    return torch.tensor([number[image_id] for image_id in batch["image_id"] for _ in range(k)])


# ---------------------------------------------------------------------------------------------------------------------
# Order


class TrainBatches:
    """Which items each step takes: a batch sampler that yields lists of (epoch, index).

    The run reads one endless stream, a permutation of all items per epoch after another. Step s takes positions
    [s * batch, (s + 1) * batch) of it and process r every `world`-th of them from the r-th: `batch` is the global
    one, no item is dropped or repeated within an epoch at any number of processes, and a step is all it takes to
    resume. Steps run from `start_step` up to, not including, `steps` (None: for ever).
    Where `world` does not divide `batch`, the shares differ by one. `is_second` (bool [n_items]) parts the items into
    two kinds, and batches are of one kind, but for the ends of an epoch: wide pictures and high ones, see `are_wide`.
    `in_lanes`: ranges (start, stop) of items that lie in archives and are read fast only one behind the other. Each is
    cut into LANES pieces, and every LANES-th place of the stream takes, where its item is of the range, the next one of
    the same piece. So where `world` divides LANES and `batch`, a process opens archives that no other one reads, but
    for those at the edges of a piece. With `is_second` that order is lost.
    """

    LANES = 16

    def __init__(self, n_items: int, batch: int, rank: int = 0, world: int = 1, seed: int = 0, start_step: int = 0,
                 steps: int | None = None, is_second: np.ndarray | None = None,
                 in_lanes: Sequence[tuple[int, int]] = ()):
        if n_items < 1:
            raise UserError("there is no image to train on: the train split is empty")
        if batch < world:
            raise UserError(f"a batch of {batch} cannot be shared by {world} processes; raise --batch")
        self.n_items, self.batch, self.rank, self.world = n_items, batch, rank, world
        self.seed, self.start_step, self.steps = seed, start_step, steps
        self.is_second, self.in_lanes = is_second, in_lanes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        step = self.start_step
        while self.steps is None or step < self.steps:
            keys = []
            for position in range(step * self.batch + self.rank, (step + 1) * self.batch, self.world):
                if position // self.n_items != epoch:
                    epoch = position // self.n_items
                    order = self._order(epoch)
                keys.append((epoch, int(order[position % self.n_items])))
            yield keys
            step += 1

    def _order(self, epoch: int) -> np.ndarray:
        """A permutation of all items; with two kinds of them, of such batches. What fills no batch stands at the ends,
        and there batches are mixed: two an epoch, or three."""
        luck = np.random.default_rng([self.seed % 2**32, epoch])
        order = luck.permutation(np.arange(self.n_items, dtype=np.int32))
        for start, stop in self.in_lanes:
            places = np.flatnonzero((order >= start) & (order < stop))
            lanes = (epoch * self.n_items + places) % self.LANES
            order[places[np.argsort(lanes, kind="stable")]] = np.arange(start, stop)
        if self.is_second is None:
            return order
        kinds = [order[self.is_second[order] == kind] for kind in (False, True)]
        blocks = [block for kind in kinds for block in np.split(kind, range(self.batch, len(kind), self.batch))]
        rest = [block for block in blocks if len(block) < self.batch]
        blocks = [block for block in blocks if len(block) == self.batch]
        first = -epoch * self.n_items % self.batch  # items of this epoch that fill up the last batch of the one before
        while sum(map(len, rest)) < first and blocks:
            rest.append(blocks.pop())
        rest = np.concatenate([*rest, order[:0]])
        luck.shuffle(blocks)
        return np.concatenate([rest[:first], *blocks, rest[first:]])

    def __len__(self) -> int:
        if self.steps is None:
            raise TypeError("an endless stream has no length")
        return max(0, self.steps - self.start_step)


def eval_indices(n: int, rank: int = 0, world: int = 1) -> range:
    """The share of process `rank`; all shares together are every index once, with no padded duplicates."""
    return range(rank, n, world)


# ---------------------------------------------------------------------------------------------------------------------
# Loaders


class Loader:
    """Batches of a DataLoader. Unreadable pictures of an evaluation are refused at once; those of training come along
    as batch["bad"], and the loop, which knows of all processes', hands them to `judge`."""

    def __init__(self, batches: DataLoader, n_items: int, train: bool, rank: int = 0, world: int = 1):
        self.batches, self.n_items, self.train, self.rank, self.world = batches, n_items, train, rank, world
        self.n_seen, self.bad = 0, set()  # distinct messages: a file that comes back each epoch counts once

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict]:
        try:
            for batch in self.batches:
                if "error" in batch:
                    raise UserError(batch["error"])
                self.n_seen += len(batch["image_id"]) + len(batch["bad"])
                if batch["bad"] and not self.train:
                    raise UserError(
                        f"evaluation stops at a picture that cannot be read: {batch['bad'][0]}\nMend or remove it."
                    )
                if not batch["image_id"]:
                    raise UserError(f"none of these pictures can be read: {'; '.join(batch['bad'][:3])}")
                yield batch
        except BaseException:  # left early: end the workers now, not at some later collection of garbage
            _end_workers(self.batches)
            raise

    def judge(self, messages: list[str]) -> None:
        """Count and name unreadable pictures of training, those of all processes in the same order on each of them.

        UserError beyond ten files and 1 % of the pictures that all processes together have seen.
        """
        for message in messages:
            if message in self.bad:
                continue
            self.bad.add(message)
            if len(self.bad) <= 3 and self.rank == 0:
                print(f"skipped a picture that cannot be read: {message}", file=sys.stderr)
            n_seen = min(self.n_seen * self.world, self.n_items)
            if len(self.bad) > 10 and len(self.bad) > 0.01 * n_seen:
                raise UserError(
                    f"{len(self.bad)} of the first {n_seen} pictures cannot be read, the last one: {message}\n"
                    "`python data.py check` lists them; mend or remove them."
                )


def tell_of_bad(loaders: list[Loader]) -> None:
    """At the end of a training: how many pictures were skipped."""
    if loaders[0].rank == 0 and (bad := sum(len(loader.bad) for loader in loaders)):
        print(f"{bad} training pictures could not be read and were skipped")


def train_loader(dataset: Samples, batch_images: int, workers: int = 0, rank: int = 0, world: int = 1, seed: int = 0,
                 start_step: int = 0, steps: int | None = None, pin: bool = False, is_second=None) -> Loader:
    """Training batches of one process; `batch_images` counts the images of all processes. See TrainBatches."""
    in_lanes = getattr(dataset.items, "in_lanes", ())
    batches = TrainBatches(len(dataset), batch_images, rank, world, seed, start_step, steps, is_second, in_lanes)
    loader = _data_loader(dataset, workers, batch_sampler=batches, pin_memory=pin)
    return Loader(loader, len(dataset), train=True, rank=rank, world=world)


def eval_loader(dataset: Samples, batch_images: int, workers: int = 0, rank: int = 0, world: int = 1) -> Loader:
    """Every `world`-th sample in order, in batches of `batch_images` for this process, the last one shorter."""
    indices = eval_indices(len(dataset), rank, world)
    return Loader(_data_loader(dataset, workers, sampler=indices, batch_size=batch_images), len(dataset), train=False)


def _data_loader(dataset: Samples, workers: int, **how) -> DataLoader:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns in every forked worker
    ids = {k: getattr(dataset.tokenizer, k, 0) for k in ("bos", "eos", "pad")}  # pictures alone need no tokenizer
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=partial(collate, **ids, n_classes=len(getattr(dataset, "classes", ())),
                           multiple=32 if dataset.sides else 0),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each start would move the global generator, and a resumed run with it
        **how,
    )
    _with_workers.add(loader)
    return loader


def _start_worker(worker: int) -> None:
    """One thread each, and deaf to what is meant for the run: Ctrl-C and a scheduler's SIGTERM reach the workers too,
    but the main process decides, and may yet need batches for its step. A second SIGTERM ends a stuck worker."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _outlive_the_first)


def _outlive_the_first(number: int, frame) -> None:
    signal.signal(number, signal.SIG_DFL)


_with_workers: weakref.WeakSet[DataLoader] = weakref.WeakSet()


def _end_workers(loader: DataLoader) -> None:
    """The two private names are torch's; were they gone, only promptness would be lost."""
    iterator = getattr(loader, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        loader._iterator = None


@atexit.register
def _end_all_workers() -> None:
    """Runs before multiprocessing's own end, which sends each worker a single SIGTERM and waits for it: without this, a
    run that an error ended would hang."""
    for loader in list(_with_workers):
        _end_workers(loader)


# ---------------------------------------------------------------------------------------------------------------------
# Own data

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
HALVES = re.compile("[\ud800-\udfff]")  # of a Unicode character; JSON lets them pass, nothing can write them


def load_own(path: Path | str) -> Corpus:
    """Own pictures as a Corpus; image ids are file names relative to the folder of the file.

    x.jsonl: {"image": "a.jpg", "caption": "..."} a line ("captions": [...] too); x.csv: header image,caption; a folder:
    its captions.txt with `file<TAB>caption`, `file#0<TAB>caption` or `file,caption`. Lines about the same image make
    one Item. `split` is optional (jsonl, csv): train, val, test. Without it 90/5/5 by a hash of the file name, so that
    a picture stays in its split when others come; all train below 20 images. Raises UserError naming file and line.
    """
    path = Path(path)
    source = path / "captions.txt" if path.is_dir() else path
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".txt": _read_captions_txt}
    if source.suffix.lower() not in readers:
        raise UserError(f"{path} is not own data: pass a .jsonl, a .csv, or a folder with captions.txt")
    try:
        text = source.read_text("utf-8-sig")  # Windows programs begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None

    found: dict[str, list[str]] = {}  # normalised name -> captions
    split_of: dict[str, str | None] = {}
    for where, image, captions, split in readers[source.suffix.lower()](text, source):
        name = below(source.parent, image, where)
        if split is not None and (not isinstance(split, str) or split.strip().lower() not in SPLITS):
            raise UserError(f"{where}: split {split!r} is not known; use train, val or test")
        split = SPLITS[split.strip().lower()] if split else None
        if split_of.setdefault(name, split) != split:
            raise UserError(f"{where}: {name} is in split {split_of[name]} on an earlier line, here in {split}")
        found.setdefault(name, []).extend(caption_text(caption, where) for caption in captions)
    if not found:
        raise UserError(f"{source} holds no image; `python data.py --help` shows the forms of own data")

    notes = []
    without = [name for name, split in split_of.items() if split is None]
    if 0 < len(without) < len(found):
        raise UserError(f"{source}: {without[0]} has no split, though other images have; give all of them one, or none")
    if without and len(found) < 20:
        split_of = dict.fromkeys(found, "train")
        notes.append(f"{source}: fewer than 20 images, so all {len(found)} are in train.")
    elif without:
        split_of = {name: _split_by_hash(name) for name in found}
        notes.append(f"{source}: no splits given, so images go to train, val, test 90/5/5 by a hash of their names.")
    missing = [name for name in found if not (source.parent / name).is_file()]
    named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    if len(missing) == len(found):
        raise UserError(f"{source}: none of its images is there ({named}); names are relative to {source.parent}")
    needed = [name for name in missing if split_of[name] != "train"]
    if needed:  # better now than in the first evaluation
        raise UserError(f"{source}: {needed[0]} of split {split_of[needed[0]]} is missing ({len(needed)} such), and "
                        "evaluation leaves none out; put it there, or take its line out")  # fmt: skip
    if missing:
        notes.append(f"{source}: {len(missing)} of {len(found)} images are missing and left out: {named}.")
        for name in missing:
            del found[name]
    splits: dict[str, list[Item]] = {split: [] for split in ("train", "val", "test")}
    for name, captions in found.items():
        splits[split_of[name]].append(Item(Path(name).as_posix(), source.parent / name, tuple(captions)))
    return Corpus(path.resolve().name if path.is_dir() else path.stem, splits, notes)


def _split_by_hash(name: str) -> str:
    percent = int(hashlib.sha256(Path(name).as_posix().encode()).hexdigest(), 16) % 100
    return "train" if percent < 90 else "val" if percent < 95 else "test"


def below(root: Path, name: object, where: str) -> str:
    """The normalised form of a relative path, which must stay below `root`; a link in there may lead where it likes."""
    if not isinstance(name, str) or not name.strip() or HALVES.search(name):
        raise UserError(f"{where}: the image must be a file name, not {name!r}")
    path = os.path.normpath(name.strip())
    if os.path.isabs(path) or os.path.splitdrive(path)[0] or path.split(os.sep)[0] in ("..", "."):
        raise UserError(f"{where}: image {name!r} is not below {root}; name it relative to that folder, without `..`")
    return path


def caption_text(caption: object, where: str) -> str:
    """A caption as written, stripped, with line breaks turned to blanks (83 of COCO val2017's have one)."""
    text = " ".join(caption.splitlines()).strip() if isinstance(caption, str) else ""
    if not text:
        raise UserError(f"{where}: a text that is not empty is expected, not {caption!r}")
    if HALVES.search(text):
        raise UserError(f"{where}: the caption {caption!r} holds half a Unicode character; write it anew")
    return text


def json_lines(text: str, source: Path):
    """(where, value) of each line of a .jsonl file that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028 inside a caption
        if line.strip():
            where = f"{source}:{number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not JSON ({error}); every line is one object") from None


def _read_jsonl(text: str, source: Path):
    for where, row in json_lines(text, source):
        if not isinstance(row, dict) or "image" not in row or not ("caption" in row or "captions" in row):
            raise UserError(f'{where}: a line must be {{"image": "a.jpg", "caption": "..."}}, not {str(row)[:80]}')
        captions = row.get("captions", [])
        if not isinstance(captions, list) or not (captions or "caption" in row):
            raise UserError(f"{where}: `captions` must be a list of texts that is not empty, not {captions!r}")
        yield where, row["image"], captions + ([row["caption"]] if "caption" in row else []), row.get("split")


def _read_csv(text: str, source: Path):
    rows = csv.DictReader(io.StringIO(text), strict=True)  # strict: a quote left open would swallow the lines below
    try:
        header = [(name or "").strip().lower() for name in rows.fieldnames or []]
        if not {"image", "caption"} <= set(header):
            raise UserError(f"{source}:1: the header must be image,caption or image,caption,split, not {header}")
        rows.fieldnames = header
        for row in rows:
            where = f"{source}:{rows.line_num}"
            if None in row:
                raise UserError(f"{where}: more cells than the header; put a caption with commas in double quotes")
            yield where, row["image"], [row["caption"]], (row.get("split") or "").strip() or None
    except csv.Error as error:
        raise UserError(f"{source}:{rows.line_num}: not CSV ({error}); look for a double quote left open") from None


def _read_captions_txt(text: str, source: Path):
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{source}:{number}"
        if not line.strip() or (number == 1 and re.fullmatch(r"image\s*[,\t]\s*caption", line.strip(), re.IGNORECASE)):
            continue
        image, tab, caption = line.partition("\t")
        if tab:
            image = re.sub(r"#\d+$", "", image.strip())  # Flickr's token files number the captions of an image
        else:
            image, comma, caption = line.partition(",")
            if not comma:
                raise UserError(f"{where}: a line must be file<TAB>caption or file,caption, not {line.strip()[:80]!r}")
            quoted = re.fullmatch(r'\s*"(.*)"\s*', caption)
            caption = quoted[1].replace('""', '"') if quoted else caption
        yield where, image, [caption], None


if __name__ == "__main__":
    from tools.look_at_data import main

    sys.exit(main())
