"""From files to batches: pictures, tokenizers, samples, the order of a run, own data. Knows no model.

    Corpus ── splits ──> Items ── Pictures ──> samples ── collate ──> batches (uint8 pixels, token ids, targets)
                                      ▲
              TrainBatches: which items, in which order, on which process; a resumed run goes on where it stopped

    python data.py check my_photos.jsonl        what the loader sees: counts, broken files, duplicates, caption lengths
    python data.py check coco --root data/coco  any name that corpora.load takes

Pixels stay uint8 until they are on the device (a quarter of the traffic); each model scales them its own way.
Everything random is drawn from (seed, epoch, index), never from a worker's own generator, so the number of workers and
the point at which a run was resumed change nothing.

Reading map: items | pictures | words | samples | batches | order | loaders | own data | the check.
"""

from __future__ import annotations

import argparse
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
import statistics
import sys
import textwrap
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from common import UserError

if TYPE_CHECKING:
    import scenes

# ---------------------------------------------------------------------------------------------------------------------
# Items


@dataclass(frozen=True)
class Item:
    """One image with its captions, as written. `image` is a file, or a scene that is drawn when it is needed."""

    image_id: int | str
    image: Path | scenes.Scene
    captions: tuple[str, ...]


@dataclass
class Corpus:
    """Named splits (train, val, test, ...) of Items. `notes` are sentences that a run prints before it starts."""

    name: str
    splits: dict[str, Sequence[Item]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.splits = {split: items for split, items in self.splits.items() if len(items)}
        if "test" not in self.splits and {"val", "train"} & set(self.splits):
            instead = "val, which also chooses `best`," if "val" in self.splits else "train"
            self.notes.append(f"{self.name} has no test split: {instead} is evaluated instead.")
        if "val" not in self.splits:
            self.notes.append(f"{self.name} has no val split: `best` is `last`, and choices are made on train.")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class BadImage(Exception):
    """A picture that cannot be read. `path` is the file, `reason` says why; str() gives both."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(path, reason)  # both as args, so that the exception survives pickling between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load_image(image: Path | str | scenes.Scene, size: int) -> Image.Image:
    """A file as an upright PIL RGB image at its own size, or a scene drawn at size x size.

    The content decides on the decoder, not the extension (many of NLVR2's .png files are JPEG). Transparency is laid
    over black, the colour of the padding. Raises BadImage for whatever cannot be read.
    """
    if not isinstance(image, (str, os.PathLike)):
        import scenes

        return scenes.render(image, size)
    try:
        with Image.open(image) as opened:
            return _to_rgb(opened)  # Image.open reads only the header; what is cut off shows here
    except FileNotFoundError:
        raise BadImage(image, "no such file") from None
    except UnidentifiedImageError:
        reason = "not a picture in a format that Pillow knows" if os.path.getsize(image) else "the file is empty"
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


AUGMENTATIONS = ("none", "crop", "crop+flip")


def to_pixels(image: Image.Image, size: int, augment: str = "none", rng: random.Random | None = None) -> torch.Tensor:
    """PIL RGB image -> uint8 [3, size, size].

    "none": longer side to `size` (bicubic, antialiased), bottom or right padded with raw 0. "crop": a random box with
    0.5 to 1 of the area and an aspect of 3/4 to 4/3, resized to the square. "crop+flip": mirrored besides, half of
    the time. Every choice is drawn from `rng`.
    """
    if augment not in AUGMENTATIONS:
        raise UserError(f"augment = {augment!r} is not known; choose one of {', '.join(AUGMENTATIONS)}")
    box = _random_box(image.size, rng) if augment != "none" else None
    width = height = size
    if not box:
        width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if augment == "crop+flip" and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = np.zeros((3, size, size), dtype=np.uint8)
    canvas[:, :height, :width] = np.asarray(image).transpose(2, 0, 1)
    return torch.from_numpy(canvas)


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


def contact_sheet(path: Path | str, pictures: list, texts: list[list[str]], title="", columns=4, side=200) -> None:
    """Write a grid of PIL pictures, at most `side` pixels wide and high, their sentences wrapped underneath."""
    from PIL import ImageDraw, ImageFont

    wrapped = [[textwrap.wrap(sentence, side // 7) or [""] for sentence in sentences] for sentences in texts]
    gap, line, paper, ink = 28, 18, (250, 249, 246), (52, 54, 60)
    fitted = [[max(1, round(length * side / max(p.size))) for length in p.size] for p in pictures]
    pictures = [p.convert("RGB").resize(s, Image.Resampling.LANCZOS) for p, s in zip(pictures, fitted, strict=True)]
    head, high = 72 if title else gap, max(picture.height for picture in pictures)
    tall = high + gap + 8 + max(sum(4 + line * len(lines) for lines in text) for text in wrapped)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, head + tall * -(-len(pictures) // columns)), paper)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((gap, 26), title, fill=ink, font=ImageFont.load_default(20))
    for i, (picture, sentences) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = gap + i % columns * (side + gap), head + i // columns * tall
        corners = Image.new("L", (4 * picture.width, 4 * picture.height))
        ImageDraw.Draw(corners).rounded_rectangle((0, 0, corners.width - 1, corners.height - 1), radius=40, fill=255)
        sheet.paste(picture, (x, y), corners.reduce(4))
        y += high + 12
        for lines in sentences:
            draw.ellipse((x + 2, y + 6, x + 6, y + 10), fill=(186, 180, 168))
            draw.multiline_text((x + 13, y), "\n".join(lines), fill=ink, font=font, spacing=line - 13)
            y += line * len(lines) + 4
    sheet.save(path)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def clean_caption(text: str) -> str:
    """What models read and write: lower case, single blanks, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the three ids that batches need. GPT-2 has one special token for all three."""

    def __init__(self, backend, bos: int, eos: int, pad: int):
        self.backend, self.bos, self.eos, self.pad = backend, bos, eos, pad
        backend.no_truncation()  # files from the hub may ask for either; lengths are ours to decide
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" or "[SEP]" inside a caption is text, not a command

    def __reduce__(self):  # the backend's own pickle forgets encode_special_tokens
        return _tokenizer_from_text, (self.backend.to_str(), self.bos, self.eos, self.pad)

    @property
    def vocab_size(self) -> int:
        """Rows of an embedding table: the special tokens are counted."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, max_len: int | None = None) -> list[int]:
        """Ids of the text without special tokens, cut to the first `max_len`. The text is taken as it is."""
        return self.backend.encode(text, add_special_tokens=False).ids[:max_len]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first eos, without special tokens. With GPT-2, where bos = eos, pass what follows bos."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.backend.decode([i for i in ids if i not in (self.bos, self.pad)], skip_special_tokens=True).strip()

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json, which other libraries read too, and tokenizer_meta.json with the three ids."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.backend.save(str(Path(folder, "tokenizer.json")))
        Path(folder, "tokenizer_meta.json").write_text(json.dumps({k: getattr(self, k) for k in ("bos", "eos", "pad")}))

    @staticmethod
    def load(folder: Path | str) -> Tokenizer:
        """Reads what `save` wrote."""
        files = [Path(folder, name) for name in ("tokenizer.json", "tokenizer_meta.json")]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing: pass a folder that a run of this project wrote")
        try:
            return _tokenizer_from_text(files[0].read_text("utf-8"), **json.loads(files[1].read_text()))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"{files[0]} cannot be read ({error}): is the run whole? Take another one") from None

    @staticmethod
    def from_pretrained(name_or_dir: str | Path) -> Tokenizer:
        """Of a hub id, or of a directory: one of ours, one that transformers reads, or vocab.json + merges.txt alone.

        bos, eos, pad are the model's own; BERT's [CLS], [SEP], [PAD]; one that is lacking is replaced by eos.
        """
        folder = Path(name_or_dir)
        if (folder / "tokenizer_meta.json").is_file():
            return Tokenizer.load(folder)
        present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if {"vocab.json", "merges.txt"} <= present and not present & {"tokenizer.json", "config.json"}:
            from tokenizers import models

            vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
            backend = _byte_level(models.BPE.from_file(vocab, merges))
            if backend.token_to_id(END) is None:
                raise UserError(f"{vocab} has no {END}, so it is not GPT-2's; put the model's config.json beside it")
            return _like_gpt2(backend)
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(str(name_or_dir))
            backend = found.backend_tokenizer.to_str()
        except Exception as error:  # no network, no such id, or a folder without a tokenizer: each its own class
            kind = "the folder" if folder.is_dir() else "the hub (there is no such folder here)"
            raise UserError(
                f"could not load the tokenizer {str(name_or_dir)!r} from {kind}: {' '.join(str(error).split())[:300]}\n"
                "Pass a directory that holds tokenizer.json, or vocab.json and merges.txt, or pass `none` to train "
                "without official files."
            ) from error
        eos = _first(found.eos_token_id, found.sep_token_id)
        bos, pad = _first(found.bos_token_id, found.cls_token_id, eos), _first(found.pad_token_id, eos)
        known = found.get_vocab()
        for names in ((END, END, END), ("<s>", "</s>", "<pad>"), ("[CLS]", "[SEP]", "[PAD]")):
            if eos is None and known.keys() >= set(names):  # tokenizer.json alone does not say what they are for
                bos, eos, pad = (known[name] for name in names)
        if eos is None:
            raise UserError(f"the tokenizer {name_or_dir} names no end token; set eos_token in tokenizer_config.json")
        return _tokenizer_from_text(backend, bos, eos, pad)

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int, kind: str = "bpe") -> Tokenizer:
        """Byte-level BPE like GPT-2's: every text can be written, so there is no unknown token.

        The same texts give the same tokenizer. `vocab_size` is an upper bound; 256 bytes and the end token are the
        least. Texts are taken as they are: clean them first if cleaned captions are what will be encoded.
        """
        if kind != "bpe":
            raise UserError(f"tokenizer kind {kind!r} is not known; the only one is 'bpe'")
        if vocab_size < 257:
            raise UserError(f"a vocabulary of {vocab_size} is too small: 256 bytes and the end token need 257")
        from tokenizers import models, pre_tokenizers, trainers

        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,  # a pair seen once teaches nothing about the next caption
            show_progress=False,
        )
        backend = _byte_level(models.BPE())
        backend.train_from_iterator(texts, trainer)
        return _like_gpt2(backend)


END = "<|endoftext|>"  # GPT-2's only special token: bos, eos and pad


def _tokenizer_from_text(text: str, bos: int, eos: int, pad: int) -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(text), bos, eos, pad)


def _byte_level(model):
    """GPT-2's pipeline around a BPE model; no blank is put before the first word."""
    import tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _like_gpt2(backend) -> Tokenizer:
    backend.add_special_tokens([END])  # keeps its id where the vocabulary has it
    end = backend.token_to_id(END)
    return Tokenizer(backend, bos=end, eos=end, pad=end)


def _first(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


# ---------------------------------------------------------------------------------------------------------------------
# Samples

SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)  # leftmost, right-hand too


class Pictures(Dataset):
    """Items as samples. A picture that cannot be read gives {"image_id", "bad": message}, which the loaders judge.

    Training, key (epoch, index): {"image_id", "pixels": uint8 [3, S, S], "ids": `captions` lists of token ids without
    special tokens, cut to `max_len`}. The captions are drawn without replacement; where an item has fewer, each comes
    once before one comes twice. The same (seed, epoch, index) gives the same sample in every process.
    Evaluation, key index: {"image_id", "pixels", "captions": tuple of strings as written}.
    """

    def __init__(self, items: Sequence[Item], tokenizer: Tokenizer | None, size: int, captions: int = 5,
                 max_len: int | None = None, train: bool = False, augment: str = "none", seed: int = 0):
        self.items, self.tokenizer, self.size, self.train, self.seed = items, tokenizer, size, train, seed
        self.n_captions, self.max_len, self.augment = captions, max_len, augment

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.items[index]
        try:
            image = load_image(item.image, self.size)
        except BadImage as bad:
            return {"image_id": item.image_id, "bad": str(bad)}
        if not self.train:
            return {"image_id": item.image_id, "pixels": to_pixels(image, self.size), "captions": item.captions}
        if not item.captions:
            raise UserError(f"image {item.image_id} has no caption to train on")
        rng = random.Random(f"{self.seed}/{epoch}/{index}")  # a string is hashed the same on every machine
        drawn: list[str] = []
        while len(drawn) < self.n_captions:
            drawn += rng.sample(item.captions, len(item.captions))
        ids = [self.tokenizer.encode(clean_caption(text), self.max_len) for text in drawn[: self.n_captions]]
        augment = self.augment
        if augment == "crop+flip" and any(SIDES.search(text) for text in item.captions):
            augment = "crop"  # mirrored, "left of" would be false
        return {"image_id": item.image_id, "pixels": to_pixels(image, self.size, augment, rng), "ids": ids}

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


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate(samples: list[dict], bos: int, eos: int, pad: int) -> dict:
    """Samples of `Pictures` -> one batch of the B readable ones.

    image_id: list of B; pixels: uint8 [B, 3, S, S]; bad: messages about the unreadable ones. In training what
    pad_captions gives, k rows an image, image-major: row b*k + j is caption j of image b. In evaluation captions:
    a list of B tuples of strings. {"error": message} alone is handed on.
    """
    if "error" in samples[0]:
        return samples[0]
    good = [sample for sample in samples if "bad" not in sample]
    batch = {"image_id": [sample["image_id"] for sample in good], "bad": [s["bad"] for s in samples if "bad" in s]}
    if not good:
        return batch
    batch["pixels"] = torch.stack([sample["pixels"] for sample in good])
    if "captions" in good[0]:
        return batch | {"captions": [sample["captions"] for sample in good]}
    return batch | pad_captions([row for sample in good for row in sample["ids"]], bos, eos, pad)


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


# ---------------------------------------------------------------------------------------------------------------------
# Order


class TrainBatches:
    """Which items each step takes: a batch sampler that yields lists of (epoch, index).

    The run reads one endless stream, a permutation of all items per epoch after another. Step s takes positions
    [s * batch, (s + 1) * batch) of it and process r every `world`-th of them from the r-th: `batch` is the global
    one, no item is dropped or repeated within an epoch at any number of processes, and a step is all it takes to
    resume. Steps run from `start_step` up to, not including, `steps` (None: for ever).
    Where `world` does not divide `batch`, the shares differ by one.
    """

    def __init__(self, n_items: int, batch: int, rank: int = 0, world: int = 1, seed: int = 0, start_step: int = 0,
                 steps: int | None = None):
        if n_items < 1:
            raise UserError("there is no image to train on: the train split is empty")
        if batch < world:
            raise UserError(f"a batch of {batch} cannot be shared by {world} processes; raise --batch")
        self.n_items, self.batch, self.rank, self.world = n_items, batch, rank, world
        self.seed, self.start_step, self.steps = seed, start_step, steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, None
        step = self.start_step
        while self.steps is None or step < self.steps:
            keys = []
            for position in range(step * self.batch + self.rank, (step + 1) * self.batch, self.world):
                if position // self.n_items != epoch:
                    epoch = position // self.n_items
                    order = np.random.default_rng([self.seed % 2**32, epoch]).permutation(self.n_items)
                keys.append((epoch, int(order[position % self.n_items])))
            yield keys
            step += 1

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


def train_loader(dataset: Pictures, batch_images: int, workers: int = 0, rank: int = 0, world: int = 1, seed: int = 0,
                 start_step: int = 0, steps: int | None = None, pin: bool = False) -> Loader:
    """Training batches of one process; `batch_images` counts the images of all processes. See TrainBatches."""
    batches = TrainBatches(len(dataset), batch_images, rank, world, seed, start_step, steps)
    loader = _data_loader(dataset, workers, batch_sampler=batches, pin_memory=pin)
    return Loader(loader, len(dataset), train=True, rank=rank, world=world)


def eval_loader(dataset: Pictures, batch_images: int, workers: int = 0, rank: int = 0, world: int = 1) -> Loader:
    """Every `world`-th sample in order, in batches of `batch_images` for this process, the last one shorter."""
    indices = eval_indices(len(dataset), rank, world)
    return Loader(_data_loader(dataset, workers, sampler=indices, batch_size=batch_images), len(dataset), train=False)


def _data_loader(dataset: Pictures, workers: int, **how) -> DataLoader:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns in every forked worker
    ids = {k: getattr(dataset.tokenizer, k, 0) for k in ("bos", "eos", "pad")}  # pictures alone need no tokenizer
    loader = DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=partial(collate, **ids),
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
        raise UserError(f"{where}: a caption must be a text that is not empty, not {caption!r}")
    if HALVES.search(text):
        raise UserError(f"{where}: the caption {caption!r} holds half a Unicode character; write it anew")
    return text


def _read_jsonl(text: str, source: Path):
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also cut at U+2028 inside a caption
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); every line is one object") from None
        if not isinstance(row, dict) or "image" not in row or not ("caption" in row or "captions" in row):
            raise UserError(f'{where}: a line must be {{"image": "a.jpg", "caption": "..."}}, not {line.strip()[:80]}')
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


# ---------------------------------------------------------------------------------------------------------------------
# The check


def check(corpus: Corpus) -> bool:
    """Prints what the loader sees of every split; True where every picture can be read. Reads all of them."""
    print(f"{corpus.name}: {', '.join(f'{len(items)} {split}' for split, items in corpus.splits.items())}")
    for note in corpus.notes:
        print(f"  note: {note}")
    unreadable, same = [], defaultdict(list)  # same: digest of the bytes -> (split, name)
    for split, items in corpus.splits.items():
        items = list(items)  # scenes make an Item at each access
        words = [len(text.split()) for item in items for text in item.captions]
        print(f"\n{split}: {len(items)} images, {len(words)} captions")
        print(f"  captions per image  {_spread([len(item.captions) for item in items])}")
        print(f"  words per caption   {_spread(words)}")
        counts = Counter(min((n - 1) // 5, 6) for n in words)
        for bucket in range(max(counts, default=-1) + 1):
            share = counts[bucket] / len(words)
            label = f"{5 * bucket + 1}-{5 * bucket + 5}" if bucket < 6 else "over 30"
            print(f"    {label:>7}  {share:6.1%}  {'#' * math.ceil(40 * share)}".rstrip())
        files = [item.image for item in items if isinstance(item.image, Path)]
        if len(files) < len(items):
            print("  pictures            drawn when needed, not checked here")
        sizes = []
        with ThreadPoolExecutor() as pool:  # Pillow lets other threads run while it decodes
            for file, (digest, size, bad) in zip(files, pool.map(_inspect, files), strict=True):
                sizes += [size] if size else []
                unreadable += [bad] if bad else []
                if digest:
                    same[digest].append((split, str(file)))
        if sizes:
            sizes.sort(key=math.prod)
            low, middle, high = (f"{w}x{h}" for w, h in (sizes[0], sizes[len(sizes) // 2], sizes[-1]))
            print(f"  picture sizes       smallest {low}, median {middle}, largest {high}")
    groups = [group for group in same.values() if len(group) > 1]
    across = [group for group in groups if len({split for split, _ in group}) > 1]
    print(f"\nduplicates: {len(groups)} groups of identical files, {len(across)} of them across splits")
    for group in across[:10]:
        print("  " + " = ".join(f"{file} ({split})" for split, file in group))
    print(f"unreadable: {len(unreadable)}")
    for message in unreadable[:10]:
        print(f"  {message}")
    return not unreadable


def _spread(numbers: list[int]) -> str:
    return f"min {min(numbers)}, mean {statistics.fmean(numbers):.1f}, max {max(numbers)}" if numbers else "none"


def _inspect(file: Path) -> tuple[bytes | None, tuple[int, int] | None, str | None]:
    """(digest of the bytes, width and height, what is wrong): each None where it does not apply."""
    try:
        size = load_image(file, 0).size
        return hashlib.sha256(file.read_bytes()).digest(), size, None
    except BadImage as bad:
        return None, None, str(bad)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data.py", description="Looks at a data set as the loader sees it.",
                                     epilog="Exit status 1: a picture cannot be read, or a file is missing or wrong.")
    parser.add_argument("action", choices=["check"])
    parser.add_argument("data", help='x.jsonl with lines {"image": "a.jpg", "caption": "..."}, x.csv with the header '
                        "image,caption[,split], a folder with captions.txt (file<TAB>caption), or the name of a data "
                        "set: scenes, coco, flickr30k, flickr8k")
    parser.add_argument("--root", help="the folder of a named data set (default: data/NAME)")
    options = parser.parse_args(argv)
    import corpora

    try:
        return 0 if check(corpora.load(options.data, options.root)) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
