"""Several data sets as one, each caption an item of its own; the corpus that a run's flags ask for.

    --data coco,vg,cc3m,sbu            folders of these names below --root, default data
    --data coco:2,vg:0.5,cc3m          an epoch goes twice over COCO's captions, and over half of Visual Genome's
    --data "coco,shards/cc3m-{00000..00331}.tar"

An item is a caption with its picture, or, where --captions-per-image is k, k captions of one picture. In a pass over a
data set each caption comes once, but of Visual Genome's 50 phrases a picture --phrases, drawn anew in each pass, and of
a picture in tar shards, which is one item, one. A data set of n items and weight w has w n of an epoch's items; passes
follow one another without regard to epochs, so with 0.5 each item comes once in two epochs.

val and test are those of the first data set.

Reading map: a part | the mixture | what a run asks for.
"""

from __future__ import annotations

import contextlib
import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import corpora
import pretraining
import shards
from common import UserError, choose
from data import BadImage, Corpus, Item
from table import Table

# ---------------------------------------------------------------------------------------------------------------------
# A part


class Part:
    """A data set within a mixture, HERE[data-17]: pass after pass over its items, of which an epoch takes the next `n`.

    items: a Table or Shards. captions: how many make an item; of each picture at most `most` are drawn in a pass (0:
    all). `seed` rules which and in what order. Of Shards an item is a picture with all that it has.
    """

    def __init__(self, name: str, items: Table | shards.Shards, weight: float = 1.0, captions: int = 1, most: int = 0,
                 seed: int = 0):
        self.name, self.items, self.captions, self.most, self.seed = name, items, captions, most, seed
        self.in_archives = isinstance(items, shards.Shards)  # whose captions are not known before they are read
        counts = np.ones(0, dtype=np.int64) if self.in_archives else items.n_captions()
        counts = np.minimum(counts, most) if most else counts
        # of each picture the last of its items, where there may be several
        self.ends = np.ceil(counts / captions).astype(np.int64).cumsum() if counts.max(initial=1) > captions else None
        self.in_a_pass = len(items) if self.ends is None else int(self.ends[-1])
        self.n = max(1, round(weight * self.in_a_pass))
        # One pass: place s holds item (step s + a start of the pass) modulo their number, which visits each once.
        self.step = next(k for k in range(round(0.618 * self.in_a_pass) or 1, 2 * self.in_a_pass + 1)
                         if math.gcd(k, self.in_a_pass) == 1)  # fmt: skip

    def item(self, place: int) -> Item:
        """Of the endless row of passes."""
        number, place = divmod(place, self.in_a_pass)
        if self.in_archives:
            return self.items.of_pass(self.seed, number, place)
        start = random.Random(f"{self.seed}/{self.name}/{number}").randrange(self.in_a_pass)
        place = (self.step * place + start) % self.in_a_pass
        if self.ends is None:
            row, group = place, 0
        else:
            row = int(self.ends.searchsorted(place, "right"))
            group = place - (int(self.ends[row - 1]) if row else 0)
        item = self.items[row]
        luck = random.Random(f"{self.seed}/{self.name}/{number}/{row}")
        drawn = luck.sample(item.captions, min(len(item.captions), self.most or len(item.captions)))
        return Item(item.image_id, item.image, tuple(drawn[group * self.captions : (group + 1) * self.captions]))


# ---------------------------------------------------------------------------------------------------------------------
# The mixture


class Mixture(Sequence):
    """The items of an epoch, those of each part behind one another. What an index stands for depends on the epoch, see
    of_epoch; `mixture[i]` is that of the first. With several parts an image id is NAME/ID."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.ends = np.cumsum([part.n for part in parts]).tolist()
        # for data.TrainBatches: ranges of items that are to be read one behind the other
        self.in_lanes = [(end - part.n, end) for part, end in zip(self.parts, self.ends, strict=True)
                         if part.in_archives]  # fmt: skip

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.of_epoch(0, range(len(self))[index])

    def of_epoch(self, epoch: int, index: int) -> Item:
        """BadImage where the item's archive is damaged there; UserError where it is gone."""
        number = bisect_right(self.ends, index)
        part = self.parts[number]
        item = part.item(epoch * part.n + index - (self.ends[number] - part.n))
        return item if len(self.parts) == 1 else Item(f"{part.name}/{item.image_id}", item.image, item.captions)

    def spread(self, n: int) -> list[Item]:
        """n items from everywhere in it, or all, without those that cannot be read: what a tokenizer is trained on."""
        found = []
        for i in range(n := min(n, len(self))):
            with contextlib.suppress(BadImage):
                found.append(self[i * len(self) // n])
        return found


# ---------------------------------------------------------------------------------------------------------------------
# What a run asks for


def of_run(cfg, task: str = "caption") -> Corpus:
    """The corpus that a run's config names, for `task`: caption, or one of questions, statements, hypotheses. Of what
    has captions by the million, and of several data sets, train is a Mixture; then cfg.captions_per_image becomes at
    most what each of them has of a picture."""
    parts = corpora.parts_of(cfg.data)
    choose("quotes", cfg.quotes, pretraining.QUOTES)
    options = dict(task=task, train_on=getattr(cfg, "train_on", "train"), keep_test=cfg.keep_test, quotes=cfg.quotes)
    if len(parts) == 1:
        if parts[0][1] != 1:
            raise UserError(f"--data {cfg.data}: a weight is for one data set of several; leave it out")
        corpus = corpora.load(parts[0][0], cfg.root or None, world=cfg.world, n_train=cfg.train_scenes,
                              n_val=cfg.val_items, n_test=cfg.test_scenes, **options)  # fmt: skip
        if not isinstance(corpus.splits.get("train"), Table | shards.Shards):
            return corpus
        loaded = [(corpus, 1.0)]
    else:
        below = Path(cfg.root or "data")
        loaded = [(corpora.load(name, below / name if name in corpora.NAMES else None, **options), weight)
                  for name, weight in parts]  # fmt: skip
    return mixed(loaded, cfg.phrases, cfg.seed, cfg)


def mixed(loaded: Sequence[tuple[Corpus, float]], phrases: int = 5, seed: int = 0, cfg=None) -> Corpus:
    """Corpora with their weights as one. phrases: of Visual Genome, drawn of each picture in each pass. cfg: whose
    captions_per_image make an item; None: one."""
    for corpus, _ in loaded:
        if "train" not in corpus.splits:
            raise UserError(f"{corpus.name} has no train split to be mixed; leave it out")
    name, n = Counter(corpus.name for corpus, _ in loaded).most_common(1)[0]
    if n > 1:  # image ids, and the files of their regions, go by these names
        raise UserError(f"{n} data sets are called {name}; give one of the folders or files another name")
    tables = [split if isinstance(split := corpus.splits["train"], Table | shards.Shards) else Table.of(split)
              for corpus, _ in loaded]  # fmt: skip
    most = [phrases if corpus.name == "vg" else 0 for corpus, _ in loaded]
    k = cfg.captions_per_image if cfg else 1
    least = min(1 if isinstance(table, shards.Shards) else int(table.n_captions().max()) for table in tables)
    least = min([least, *filter(None, most)])
    notes = [note for corpus, _ in loaded for note in corpus.notes]
    if k > least:
        notes.append(f"captions per picture: {least}, not {k}, for of some data there are no more to an item.")
        cfg.captions_per_image = k = least
    parts = [Part(corpus.name, table, weight, k, n, seed)
             for (corpus, weight), table, n in zip(loaded, tables, most, strict=True)]  # fmt: skip
    train = Mixture(parts)
    for part in parts if len(parts) > 1 else ():
        share = part.n / len(train)
        notes.append(f"{part.name}: {len(part.items):,} pictures, {part.n:,} items an epoch ({share:.1%}).")
    others = {name: items for name, items in loaded[0][0].splits.items() if name != "train"}
    notes += [f"val and test are {parts[0].name}'s."] if len(parts) > 1 and others else []
    return Corpus("+".join(part.name for part in parts), {"train": train, **others}, _without_splits(notes))


def _without_splits(notes: list[str]) -> list[str]:
    """Without what Corpus says of missing splits, which it says anew."""
    return [note for note in notes if "is evaluated instead" not in note and "has no val" not in note]
