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
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
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
            opened.load()  # Image.open reads only the header; a cut-off file shows here
            return _to_rgb(opened)
    except FileNotFoundError:
        raise BadImage(image, "no such file") from None
    except UnidentifiedImageError:
        reason = "not a picture in a format that Pillow knows" if os.path.getsize(image) else "the file is empty"
        raise BadImage(image, reason) from None
    except Exception as error:  # on damaged files the decoders raise nearly everything, struct.error included
        raise BadImage(image, f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)  # phones store the sensor's view and an orientation tag
    except Exception:  # web pictures often carry damaged EXIF over good pixels
        pass
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
    return image.convert("RGB")


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
    if augment == "crop+flip" and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)  # the box, blind to the content, may stay as it is
    canvas = np.zeros((size, size, 3), dtype=np.uint8)
    if box:
        canvas[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    else:
        width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
        canvas[:height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return torch.from_numpy(canvas).permute(2, 0, 1).contiguous()


def _random_box(wide_high: tuple[int, int], rng: random.Random) -> tuple[float, float, float, float] | None:
    """left, top, right, bottom; None where ten draws did not fit, as in a panorama: such a picture is left whole."""
    width, height = wide_high
    for _ in range(10):
        area = rng.uniform(0.5, 1.0) * width * height
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, min(left + w, width), min(top + h, height)
    return None


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
        return _tokenizer_from_text(files[0].read_text("utf-8"), **json.loads(files[1].read_text()))

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

            return _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(str(name_or_dir))
            backend = found.backend_tokenizer.to_str()
        except Exception as error:  # no network, no such id, or a folder without a tokenizer: each its own class
            where = f"the folder {folder} (it holds: {', '.join(sorted(present)) or 'nothing'})" if folder.is_dir() \
                else f"{str(name_or_dir)!r}, which is no folder here, from the hub"
            raise UserError(
                f"could not load a tokenizer from {where}: {str(error).strip().splitlines()[0]}\n"
                "Pass a directory that holds tokenizer.json, or vocab.json and merges.txt, or pass `none` to train "
                "without official files."
            ) from error
        first = partial(next, iter(()), None)  # of several ids the first that exists
        eos = first() or next((i for i in (found.eos_token_id, found.sep_token_id) if i is not None), None)
        if eos is None:
            raise UserError(f"the tokenizer of {name_or_dir} names no end token; set eos_token in tokenizer_config.json")
        bos = next((i for i in (found.bos_token_id, found.cls_token_id) if i is not None), eos)
        return _tokenizer_from_text(backend, bos, eos, eos if found.pad_token_id is None else found.pad_token_id)

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
        tokenizer = _byte_level(models.BPE())
        tokenizer.backend.train_from_iterator(texts, trainer)
        return _tokenizer_from_text(tokenizer.backend.to_str(), *[tokenizer.backend.token_to_id(END)] * 3)


END = "<|endoftext|>"  # GPT-2's only special token: bos, eos and pad


def _tokenizer_from_text(text: str, bos: int, eos: int, pad: int) -> Tokenizer:
    import tokenizers

    return Tokenizer(tokenizers.Tokenizer.from_str(text), bos, eos, pad)


def _byte_level(model) -> Tokenizer:
    """GPT-2's pipeline around a BPE model; no blank is put before the first word."""
    import tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END])
    return Tokenizer(backend, *[backend.token_to_id(END)] * 3)
