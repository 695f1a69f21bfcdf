"""What the loader sees of a data set; where the official ones come from is in where.py.

    python data.py check my_photos.jsonl            reads every picture
    python data.py check coco --root data/coco      --no-decode: only whether the files are there, in seconds
    python data.py check vqa --train-on train+val   train and val as a run with this flag has them
    python data.py check coco,vg:0.5,cc3m --root data       each of them, then how much of an epoch is whose
    python data.py check "shards/cc3m-{00000..00331}.tar"   reads them from end to end; --no-decode: only the index
    python data.py where                            the official sets;  `where coco`: files, pages, terms, layout

Reading map: the published sizes | what is said about a split | files | the check | millions of pictures | region files
| mixtures | command line.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import os
import re
import sys
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

import common
import corpora
import mixture
import regions
from common import UserError
from data import BadImage, Choice, Corpus, Item, Packed, files_of, ids_of, load_image
from shards import Shards
from table import Table, read_meta
from tools.where import SOURCES, where

# ---------------------------------------------------------------------------------------------------------------------
# The published sizes

PUBLISHED = {
    "coco": {"train": 113_287, "val": 5_000, "test": 5_000},  # Karpathy's, restval in train: zdou0830/METER
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},  # Karpathy's: dandelin/ViLT:DATA.md
    "nocaps": {"test": 4_500, "test_in_domain": 648, "test_near_domain": 2_938, "test_out_domain": 914,
               "server_test": 10_600},  # nocaps.org/download
    "vqa": {"train": 443_757, "val": 214_354, "server_test": 447_793},  # visualqa.org/download.html
    "nlvr2": {"train": 86_373, "val": 6_982, "test": 6_967, "test_unreleased": 6_970},  # the files of lil-lab/nlvr
    "snli_ve": {"train": 529_527, "val": 17_858, "test": 17_901},  # necla-ml/SNLI-VE:README.md
    "vcr": {"train": 212_923, "val": 26_534, "server_test": 25_263},  # widely reported, see ABOUT
    "cc3m": {"train": 3_318_333, "val": 15_840},  # rows of the two files; ai.google.com/research/ConceptualCaptions
}  # fmt: skip
ABOUT = {"vcr"}  # read in many papers, not found with the authors
IN_ALL = {  # what has no official splits, or, as cc3m's shards, not those of the rows
    "vg": 108_077,  # pictures, dandelin/ViLT:DATA.md
    "cc3m": 3_318_333,  # rows of train
    "sbu": 1_000_000,  # rows of the official files
}  # fmt: skip
ROWS = {"cc3m", "sbu"}  # links, of which a part is dead: fewer pictures are normal
VG_REGIONS = 5_400_000  # widely reported, not found with the authors
VQA_ANSWERS = 3_129  # hengyuan-hu/bottom-up-attention-vqa:tools/compute_softscore.py
NOUNS = {"vqa": "question", "vcr": "question", "nlvr2": "statement", "nlvr1": "statement", "snli_ve": "hypothesis"}


def published_sizes(corpus: Corpus, train_on: str = "train") -> dict[str, int]:
    """Split -> how many there should be, as far as it applies to this choice of files and splits."""
    sizes = PUBLISHED.get(corpus.name, {})
    if corpus.name == "vqa" and train_on != "train":  # other splits of train2014 and val2014
        sizes = {split: n for split, n in sizes.items() if split.startswith("server")}
    official_splits = corpus.name == "coco" and any("no Karpathy file" in note for note in corpus.notes)
    return {} if official_splits else sizes


def beside(n: int, noun: str, published: int | None, about: bool = False, of: str = "") -> str:
    """4 images (published: 5,000). of: what was counted there, where it is something else."""
    said = f"{n:,} {noun}"
    if published is None:
        return said
    if n == published:
        return f"{said} ({'about ' if about else ''}as published)"
    return f"{said} (published: {'about ' if about else ''}{published:,}{of})"


def in_all(corpus: Corpus) -> str:
    """Of what is published without splits: how much there is before anything is held back for tests."""
    items, published = next(iter(corpus.splits.values())), IN_ALL.get(corpus.name)
    if isinstance(items, Shards):
        n = sum(map(len, corpus.splits.values()))
        return beside(n, "images", published, of=" rows") if corpus.name in ROWS else ""
    if published is None or corpus.name in PUBLISHED or not isinstance(items, Table):
        return ""
    said = beside(len(items.names), "images", published, of=" rows" if corpus.name in ROWS else "")
    captions = beside(len(items.captions), "captions", VG_REGIONS if corpus.name == "vg" else None, about=True)
    return f"{said}, {captions}"


# ---------------------------------------------------------------------------------------------------------------------
# What is said about a split


def line(what: str, said: str) -> None:
    print(f"  {what:<22}{said}".rstrip())


def spread(numbers: Sequence[int] | Counter) -> str:
    """Of numbers, or of how often each comes."""
    counts = Counter(numbers)
    mean = sum(number * n for number, n in counts.items()) / max(1, counts.total())
    return f"min {min(counts)}, mean {mean:.1f}, max {max(counts)}" if counts else "none"


def shares(counts: dict[str, int]) -> str:
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {n:,} ({n / total:.1%})" for name, n in counts.items())


def histogram(words: list[int] | Counter) -> None:
    words, counts = Counter(words), Counter()
    for number, n in words.items():
        counts[min((number - 1) // 5, 6)] += n
    for bucket in range(max(counts, default=-1) + 1):
        share = counts[bucket] / words.total()
        label = f"{5 * bucket + 1}-{5 * bucket + 5}" if bucket < 6 else "over 30"
        print(f"    {label:>7}  {share:6.1%}  {'#' * math.ceil(40 * share)}".rstrip())


def describe(corpus: Corpus, split: str, items: list, n_pictures: int, published: int | None) -> None:
    first, about = items[0], corpus.name in ABOUT
    hidden = split.startswith("server")
    if isinstance(first, Item):
        words = [len(text.split()) for item in items for text in item.captions]
        print(f"\n{split}: {beside(len(items), 'images', published, about)}, {len(words):,} captions")
        if hidden:
            line("captions", "none here: only a server has them")
            return
        line("captions per image", spread([len(item.captions) for item in items]))
        line("words per caption", spread(words))
        histogram(words)
        return
    noun = NOUNS.get(corpus.name, "sample")
    many = "hypotheses" if noun == "hypothesis" else f"{noun}s"
    print(f"\n{split}: {beside(len(items), many, published, about)} about {n_pictures:,} pictures")
    if isinstance(first, Choice):
        describe_choices(items)
    else:
        words = [len(item.text.split()) for item in items]
        line(f"words per {noun}", spread(words))
        histogram(words)
    if hidden:
        line("labels", "none here: only a server has them")
    elif isinstance(first, Choice):
        for what, labels in (("right answer", [item.label for item in items]),
                             ("right rationale", [item.rationale_label for item in items])):  # fmt: skip
            line(what, shares({("first", "second", "third", "fourth")[i]: labels.count(i) for i in range(4)}))
    elif any(item.answers for item in items):
        describe_answers(items, corpus.answers)
    else:
        counts = Counter(item.label for item in items)
        three = corpus.name == "snli_ve" or 2 in counts
        names = corpora.ENTAILMENT if three else ("false", "true")
        line("labels", shares({name: counts[number] for number, name in enumerate(names)}))


def describe_answers(items: list, vocabulary: Sequence[str]) -> None:
    """Answers count as in training: as the annotators wrote them, beside a vocabulary of normalised ones."""
    line("answer types", shares(dict(Counter(item.kinds[0] for item in items if item.kinds).most_common())))
    known = set(vocabulary)
    without = sum(known.isdisjoint(item.answers) for item in items)
    line("outside vocabulary", f"{without:,} questions ({without / len(items):.1%}) without an answer that is a class")
    most = Counter(Counter(item.answers).most_common(1)[0][0] for item in items if item.answers).most_common(10)
    line("most frequent answers", ", ".join(f"{answer} {n / len(items):.1%}" for answer, n in most))


def describe_choices(items: list) -> None:
    texts = {"question": [item.question for item in items],
             "answer": [text for item in items for text in item.answers],
             "rationale": [text for item in items for text in item.rationales]}  # fmt: skip
    for what, tagged in texts.items():
        line(f"words per {what}", spread([len(text.words) for text in tagged]))
    tags = [tag >= 0 for text in chain(*texts.values()) for tag in text.tags]
    line("words that are tags", f"{sum(tags) / len(tags):.1%}")
    objects = {item.image_ids: len(item.objects) for item in items}
    line("objects per picture", spread(list(objects.values())))


# ---------------------------------------------------------------------------------------------------------------------
# Files


class Shelf:
    """Whether files are there, by one listing of each folder, of which a hash of each name is kept: 8 bytes, so that
    three million names are nothing. That two names share one has a chance of one in a million then."""

    def __init__(self):
        self.hashes: dict[str, np.ndarray] = {}  # folder -> sorted, of its files' paths

    def listed(self, folder: str) -> np.ndarray:
        if folder not in self.hashes:
            found = array("q")
            try:
                with os.scandir(folder or ".") as entries:
                    found.extend(hash(os.path.join(folder, entry.name)) for entry in entries if entry.is_file())
            except OSError:
                del found[:]
            self.hashes[folder] = np.sort(np.frombuffer(found, np.int64))
        return self.hashes[folder]

    def has(self, file: Path) -> bool:
        name = str(file)
        listed = self.listed(os.path.dirname(name))
        # some file systems find a name in other capitals; a listing does not
        return bool(is_among(np.array([hash(name)]), listed)[0]) or bool(len(listed)) and file.is_file()


def is_among(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool, of each number: is it one of `known`, which are sorted?"""
    if not len(known):
        return np.zeros(len(numbers), dtype=bool)
    return known[np.minimum(known.searchsorted(numbers), len(known) - 1)] == numbers


def watched(what: str, do, things: Sequence, at_once: int = 1000) -> Iterator:
    """do(thing) of each, in threads, with a bar on a terminal."""
    with ThreadPoolExecutor() as pool, bar_of(what, len(things)) as bar:
        for start in range(0, len(things), at_once):  # else Ctrl-C would wait for all of them
            for result in pool.map(do, things[start : start + at_once]):
                bar.update()
                yield result


def bar_of(what: str, n: int):
    from tqdm import tqdm

    return tqdm(total=n, desc=what, leave=False, disable=None)


def look_into(file: Path | Packed) -> tuple[bytes | None, tuple[int, int] | None, str | None]:
    """(digest of the bytes, width and height, what is wrong): each None where it does not apply."""
    try:
        size = load_image(file, 0).size
        content = file.content if isinstance(file, Packed) else file.read_bytes()
        return hashlib.sha256(content).digest(), size, None
    except BadImage as bad:
        return None, None, str(bad)


def say_missing(what: str, files: Sequence[Path], missing: list[Path], noun: str) -> None:
    if not missing:
        line(what, f"{len(files):,} files, all there")
        return
    line(what, f"{len(missing):,} of {len(files):,} {noun} missing, first: {missing[0]}")
    lack, of = (Counter(str(file.parent) for file in some) for some in (missing, files))
    if len(of) > 1:
        said = [f"{folder} {n:,} of {of[folder]:,}" for folder, n in lack.most_common(3)]
        line("", "most in " + ", ".join(said) + (f", and {len(lack) - 3:,} more folders" if len(lack) > 3 else ""))


# ---------------------------------------------------------------------------------------------------------------------
# The check


class Found(NamedTuple):
    """What was seen of all splits."""

    n_missing: int
    n_unreadable: int
    unreadable: list[str]  # why, of the first ones
    shared: list[tuple[str, str, int]]  # split, another one, pictures in both
    n_groups: int  # of identical files
    n_across: int  # of them across splits
    across: list[str]  # the first ones


def check(corpus: Corpus, root: Path | None = None, train_on: str = "train", decode: bool = True) -> bool:
    """Prints what the loader sees of every split; True where every file is there and, with `decode`, can be read."""
    print(f"{corpus.name}: {', '.join(f'{len(items):,} {split}' for split, items in corpus.splits.items())}")
    for note in corpus.notes:
        print(f"  note: {note}")
    if corpus.answers:
        of = VQA_ANSWERS if corpus.name == "vqa" else None
        print(f"  answer vocabulary: {beside(len(corpus.answers), 'answers', of)}")
    if said := in_all(corpus):
        print(f"  in all: {said}")
    shelf, published = Shelf(), published_sizes(corpus, train_on)
    left_out = any("missing and left out" in note for note in corpus.notes)  # own data without some of its pictures
    are_many = any(isinstance(items, Table | Shards) for items in corpus.splits.values())
    found = (look_at_millions if are_many else look_at_all)(corpus, published, shelf, decode)
    print()
    for one, other, n in found.shared:
        if not (one.startswith(other) or other.startswith(one)):  # a domain of test is a part of it
            print(f"shared: {one} and {other} have {n:,} pictures in common")
    if decode:
        print(f"duplicates: {found.n_groups:,} groups of identical files, {found.n_across:,} of them across splits")
        for group in found.across[:10]:
            print(f"  {group}")
    besides = ", besides what a note says is left out" if left_out else without_picture(corpus)
    print(f"missing: {found.n_missing:,}{besides}")
    print(f"unreadable: {found.n_unreadable:,}" if decode else "unreadable: not looked for; leave out --no-decode")
    for message in found.unreadable[:10]:
        print(f"  {message}")
    fine = not found.n_missing and not found.n_unreadable and not left_out
    for folder in ("regions", "regions_boxes", "regions_mirrored", "regions_boxes_mirrored"):
        if root and (root / folder).is_dir():
            fine &= check_regions(corpus, root / folder, shelf, decode)
    return fine


def look_at_all(corpus: Corpus, published: dict[str, int], shelf: Shelf, decode: bool) -> Found:
    sizes: dict[Path, tuple[int, int] | None] = {}
    pictures: dict[str, set] = {}
    unreadable: list[str] = []
    same: dict[bytes, list] = defaultdict(list)  # digest of the bytes -> (split, file)
    n_missing = 0
    for split, items in corpus.splits.items():
        items = list(items)  # scenes make an Item at each access
        drawn = not isinstance(files_of(items[0])[0], Path)
        used = [files_of(item) + tuple(chain(*getattr(item, "others", ()))) for item in items]
        files = [] if drawn else list(dict.fromkeys(chain(*used)))
        pictures[split] = set(files)
        n = len(set(chain(*map(ids_of, items)))) if drawn else len(files)
        describe(corpus, split, items, n, published.get(split))
        if drawn:
            line("pictures", "drawn when needed, not checked here")
            continue
        missing = [file for file in files if not shelf.has(file)]
        say_missing("pictures", files, missing, "images" if isinstance(items[0], Item) else "pictures")
        n_missing += len(missing)
        if decode:
            lost = set(missing)
            new = [file for file in files if file not in lost and file not in sizes]
            for file, (digest, size, bad) in zip(new, watched(split, look_into, new), strict=True):
                sizes[file] = size
                unreadable += [bad] if bad else []
                if digest:
                    same[digest].append((split, str(file)))
            known = sorted(filter(None, (sizes.get(file) for file in files)), key=math.prod)
            if known:
                say_sizes(known[0], known[len(known) // 2], known[-1])
        lack, wrong = check_metadata(items, shelf, sizes, decode)
        n_missing += lack
        unreadable += wrong
    shared = [(one, other, n) for one, other in combinations(pictures, 2)
              if (n := len(pictures[one] & pictures[other]))]  # fmt: skip
    groups = [group for group in same.values() if len(group) > 1]
    across = [group for group in groups if len({split for split, _ in group}) > 1]
    told = [" = ".join(f"{file} ({split})" for split, file in group) for group in across[:10]]
    return Found(n_missing, len(unreadable), unreadable, shared, len(groups), len(across), told)


def say_sizes(*sizes: Sequence[int]) -> None:
    low, middle, high = (f"{width}x{height}" for width, height in sizes)
    line("picture sizes", f"smallest {low}, median {middle}, largest {high}")


def check_metadata(items: list, shelf: Shelf, sizes: dict, decode: bool) -> tuple[int, list[str]]:
    """Of the files with the boxes of VCR's objects: how many are missing, and what is wrong with others."""
    of = {(item.metadata, len(item.objects)): item for item in items if getattr(item, "metadata", None)}
    if not of:
        return 0, []
    files = list(dict.fromkeys(file for file, _ in of))
    missing = [file for file in files if not shelf.has(file)]
    say_missing("metadata", files, missing, "files")

    def wrong_with(item: Choice) -> str | None:
        try:
            regions.object_boxes(item, sizes.get(item.images[0]) or (1e9, 1e9))  # a picture that cannot be read
        except BadImage as bad:
            return str(bad)

    lost = set(missing)
    there = [item for (file, _), item in of.items() if file not in lost] if decode else []
    wrong = [bad for bad in watched("metadata", wrong_with, there) if bad]
    if wrong:
        line("", f"{len(wrong):,} wrong, first: {wrong[0]}")
    return len(missing), wrong


# ---------------------------------------------------------------------------------------------------------------------
# Millions of pictures
#
# A few bytes of each are kept: hashes of its name and of its content, its size. Texts and files come one after another.


def without_picture(corpus: Corpus) -> str:
    """What is said besides of rows that an index leaves out since their picture is not there. They are not missing."""
    folders = {items.folder for items in corpus.splits.values() if isinstance(items, Table) and items.folder}
    n = sum(read_meta(folder).get("without", 0) for folder in folders)
    if not n:
        return ""
    if corpus.name in ROWS:
        return f", besides {n:,} rows without a picture, which do not count: dead links are normal there"
    return f", besides {n:,} pictures that are left out, as a note says"


class Captions:
    """Of any number of captions, counted: how many a picture has, how many words they have."""

    def __init__(self):
        self.per_picture, self.words = Counter(), Counter()

    def add(self, captions: Sequence[str]) -> None:
        self.per_picture[len(captions)] += 1
        for text in captions:
            self.words[len(text.split())] += 1

    def say(self) -> None:
        line("captions per image", spread(self.per_picture))
        line("words per caption", spread(self.words))
        histogram(self.words)


class Files(Sequence):
    """The files of these rows of a Table, made on access."""

    def __init__(self, items: Table, rows: np.ndarray):
        self.items, self.rows = items, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.items[int(row)].image for row in self.rows[index]]
        return self.items[int(self.rows[index])].image


class Opened(Sequence):
    """The pictures of Shards slice by slice, which reads each shard forwards; a BadImage where a caption cannot be
    read. Counts the captions on the way."""

    def __init__(self, items: Shards):
        self.items, self.captions, self.n_bad = items, Captions(), 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, places: slice) -> list[Packed | BadImage]:
        return [self._one(place) for place in range(*places.indices(len(self)))]

    def _one(self, place: int) -> Packed | BadImage:
        try:
            item = self.items[place]
        except BadImage as bad:
            self.n_bad += 1
            return bad
        self.captions.add(item.captions)
        return item.image


class Seen:
    """Of every picture that was read its size, a hash of its content, and where it is."""

    def __init__(self):
        self.splits: list[tuple[str, Sequence]] = []
        self.rows, self.digests, self.sizes = array("q"), array("q"), array("i")
        self.ends: list[int] = []  # of each split in them
        self.n_bad, self.bad = 0, []

    def read(self, split: str, items: Sequence, things: Sequence, rows: Sequence[int], at_once: int) -> None:
        """things: files, or what stands for them; rows: their places in `items`."""

        def look(thing):
            return (None, None, str(thing)) if isinstance(thing, BadImage) else look_into(thing)

        for row, (digest, size, bad) in zip(rows, watched(split, look, things, at_once), strict=True):
            if bad:
                self.n_bad += 1
                self.bad += [bad] if len(self.bad) < 10 else []
            else:
                self.rows.append(int(row))
                self.digests.append(int.from_bytes(digest[:8], "little", signed=True))
                self.sizes.extend(size)
        self.splits.append((split, items))
        self.ends.append(len(self.rows))

    def say_sizes(self) -> None:
        """Of the last split."""
        start = self.ends[-2] if len(self.ends) > 1 else 0
        sizes = np.array(self.sizes[2 * start :], dtype=np.int64).reshape(-1, 2)
        if len(sizes):
            order = np.argsort(sizes.prod(axis=1), kind="stable")
            say_sizes(*(sizes[order[i]] for i in (0, len(order) // 2, -1)))

    def groups(self) -> tuple[int, int, list[str]]:
        """Of identical pictures: groups, those across splits, and of the ten largest of these what to print."""
        if not self.digests:
            return 0, 0, []
        digests = np.array(self.digests, dtype=np.int64)
        of_split = np.repeat(np.arange(len(self.ends)), np.diff([0, *self.ends]))
        order = np.argsort(digests, kind="stable")
        digests = digests[order]
        starts = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1]]))
        counts = np.diff([*starts, len(order)])
        ordered = of_split[order]
        across = np.flatnonzero(np.minimum.reduceat(ordered, starts) < np.maximum.reduceat(ordered, starts))
        largest = across[np.argsort(-counts[across], kind="stable")][:10]
        told = [self._group(order[starts[i] : starts[i] + counts[i]], of_split) for i in largest]
        return int((counts > 1).sum()), len(across), told

    def _group(self, places: np.ndarray, of_split: np.ndarray) -> str:
        """One of each split: a site's "no longer available" may come ten thousand times."""
        firsts = np.unique(of_split[places], return_index=True)[1]
        named = []
        for place in places[firsts]:
            split, items = self.splits[of_split[place]]
            named.append(f"{items[self.rows[place]].image} ({split})")
        more = len(places) - len(named)
        return " = ".join(named) + (f" and {more:,} more" if more else "")


def look_at_millions(corpus: Corpus, published: dict[str, int], shelf: Shelf, decode: bool) -> Found:
    seen, n_missing = Seen(), 0
    pictures: dict[str, np.ndarray] = {}  # of each split the hashes of its files' names, each once, sorted
    for split, items in corpus.splits.items():
        if isinstance(items, Shards):
            look_at_shards(split, items, seen, decode)
        else:
            earlier = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *pictures.values()]))
            of = " rows" if corpus.name in ROWS else ""
            pictures[split], n = look_at_table(split, items, published.get(split), of, shelf, earlier, seen, decode)
            n_missing += n
    shared = [(one, other, n) for one, other in combinations(pictures, 2)
              if (n := int(is_among(pictures[one], pictures[other]).sum()))]  # fmt: skip
    return Found(n_missing, seen.n_bad, seen.bad, shared, *seen.groups())


def look_at_table(split: str, items: Table, published: int | None, of: str, shelf: Shelf, earlier: np.ndarray,
                  seen: Seen, decode: bool) -> tuple[np.ndarray, int]:
    """-> hashes of the names of its files, and how many are missing. earlier: hashes of what was read before."""
    captions, folders, names = Captions(), {}, array("q")
    with bar_of(split, len(items)) as bar:
        for item in items:
            captions.add(item.captions)
            name = str(item.image)
            folders[os.path.dirname(name)] = None
            names.append(hash(name))
            bar.update()
    print(f"\n{split}: {beside(len(items), 'images', published, of=of)}, {captions.words.total():,} captions")
    captions.say()
    names, rows = np.unique(np.array(names, dtype=np.int64), return_index=True)  # rows: the first of each file
    is_there = is_among(names, np.sort(np.concatenate([shelf.listed(folder) for folder in folders])))
    for place in np.flatnonzero(~is_there):
        is_there[place] = shelf.has(items[int(rows[place])].image)
    missing = Files(items, np.sort(rows[~is_there]))
    say_missing("pictures", Files(items, rows), missing, "images")
    if decode:
        new = np.sort(rows[is_there & ~is_among(names, earlier)])
        seen.read(split, items, Files(items, new), new, 1000)
        seen.say_sizes()
    return names, len(missing)


def look_at_shards(split: str, items: Shards, seen: Seen, decode: bool) -> None:
    """From end to end, each shard forwards, or only how many the index knows."""
    opened, said = Opened(items), f"{len(items):,} images in {int(np.count_nonzero(items.counts)):,} shards"
    if not decode:
        print(f"\n{split}: {said}")
        line("captions", "not read; leave out --no-decode")
        return
    seen.read(split, items, opened, range(len(items)), 100)  # so many pictures are in memory
    print(f"\n{split}: {said}, {opened.captions.words.total():,} captions")
    opened.captions.say()
    if opened.n_bad:
        line("", f"{opened.n_bad:,} images have captions that cannot be read")
    seen.say_sizes()


# ---------------------------------------------------------------------------------------------------------------------
# Region files

MOST_REGIONS = 2_000  # region files that are read; 120,000 of them are 25 GB


def check_regions(corpus: Corpus, folder: Path, shelf: Shelf, decode: bool) -> bool:
    """Region files of the pictures, or, where the name says _boxes, of VCR's objects; of either, mirrored."""
    name = folder.name.removesuffix("_mirrored")
    is_boxes, is_mirrored = name.endswith("_boxes"), name != folder.name
    plain = folder.with_name(name.removesuffix("_boxes"))
    source = regions.NpzRegions(plain) if is_boxes or is_mirrored else regions.source_in(folder)
    if any(isinstance(items, Shards) for items in corpus.splits.values()):
        print(f"\n{folder}: not looked at; what pictures in shards are called is only known where they are read")
        return True
    of = with_a_sample(corpus)

    def is_there(image_id, image, _) -> bool:
        if isinstance(source, regions.TsvRegions):
            return any(name in source.places for name in regions.region_names(image_id, image))
        return any(shelf.has(folder / f"{name}.npz") for name in regions.region_names(image_id, image))

    def read(picture):
        image_id, image, item = picture
        try:
            found = source.of_objects(item, is_mirrored) if is_boxes else source(image_id, image, is_mirrored)
        except BadImage as bad:
            return str(bad)
        if is_boxes and len(found.boxes) != len(item.objects):
            return f"{folder}, image {image_id}: {len(found.boxes)} regions for {len(item.objects)} objects"
        return found.features.shape[1], len(found.boxes), 0 if found.classes is None else found.classes.shape[1]

    there = np.fromiter((is_there(*picture) for picture in of), bool, len(of))
    first = of[int(there.argmin())][0]  # the first that is not there, if any
    there = np.flatnonzero(there)
    print(f"\n{folder}: region files of {len(there):,} of {len(of):,} pictures")
    if len(there) < len(of):
        line("missing", f"{len(of) - len(there):,}, first: image {first}")
    if not decode:
        return len(there) == len(of)
    step = max(1.0, len(there) / MOST_REGIONS)
    chosen = [of[int(there[int(i * step)])] for i in range(min(len(there), MOST_REGIONS))]
    if len(chosen) < len(there):
        line("read", f"{len(chosen):,} of them, evenly spread")
    results = list(watched(folder.name, read, chosen))
    broken = [result for result in results if isinstance(result, str)]
    good = [result for result in results if not isinstance(result, str)]
    widths, numbers, classes = ([*column] for column in zip(*good, strict=True)) if good else ([], [], [])
    if good:
        line("regions a picture", spread(numbers))
        line("numbers a region", per_file(widths, "features must be of one detector"))
        line("class probabilities", per_file(classes, "some have none or others") if any(classes) else "none")
    if broken:
        line("broken", f"{len(broken):,}, first: {broken[0]}")
    return len(there) == len(of) and not broken and len(set(widths)) <= 1


class Joined(Sequence):
    """(image id, picture, item) of each picture of several Tables, made on access."""

    def __init__(self, tables: Sequence[Table]):
        self.tables, self.ends = tables, np.cumsum([len(table) for table in tables]).tolist()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> tuple:
        number = bisect_right(self.ends, range(len(self))[index])
        item = self.tables[number][index - (self.ends[number - 1] if number else 0)]
        return item.image_id, item.image, item


def with_a_sample(corpus: Corpus) -> Sequence[tuple]:
    """(image id, the picture, a sample about it) of each picture."""
    if all(isinstance(items, Table) for items in corpus.splits.values()):
        return Joined(list(corpus.splits.values()))
    of: dict = {}
    for item in chain(*corpus.splits.values()):
        for image_id, image in zip(ids_of(item), files_of(item), strict=True):
            of.setdefault(image_id, (image_id, image, item))
    return list(of.values())


def per_file(numbers: list[int], remark: str) -> str:
    counts = Counter(numbers).most_common()
    if len(counts) == 1:
        return f"{counts[0][0]:,}"
    return ", ".join(f"{n:,} ({times:,} files)" for n, times in counts) + f": {remark}"


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


def check_mixture(spec: str, root: str | None, decode: bool, **options) -> bool:
    """Each part by itself, then what an epoch of a run with this --data takes of it. root: the folder above theirs."""
    corpora.check_task("pretrain", spec)
    parts, below = corpora.parts_of(spec), Path(root or "data")
    places = {name: below / name if name in corpora.NAMES else None for name, _ in parts}
    loaded = [(corpora.load(name, places[name], **options), weight) for name, weight in parts]
    phrases = common.RunConfig.phrases
    mixed = mixture.mixed(loaded, phrases)
    fine = True
    for (name, place), (corpus, _) in zip(places.items(), loaded, strict=True):
        print(f"{'=' * 20} {name}")
        fine &= check(corpus, corpora.folder_of(name, place), decode=decode)
        print()
    train = mixed.splits["train"]
    print(f"{'=' * 20} together: {len(train):,} items an epoch")
    for part, (_, weight) in zip(train.parts, loaded, strict=True):
        captions = "" if part.in_archives else f"{part.items.n_captions().sum():,} captions, "
        times = f", weight {weight:g}" if weight != 1 else ""
        line(part.name, f"{len(part.items):,} pictures, {captions}{part.n:,} items ({part.n / len(train):.1%}){times}")
    of_vg = f" and {phrases} phrases of a picture of vg" if "vg" in places else ""
    print(f"  with one caption an item{of_vg}; val and test are {loaded[0][0].name}'s")
    return fine


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    own = ('x.jsonl with lines {"image": "a.jpg", "caption": "..."}, x.csv with the header image,caption[,split], or a '
           "folder with captions.txt (file<TAB>caption)")  # fmt: skip
    parser = common.Parser(prog="data.py", description="Looks at a data set as the loader sees it.", allow_abbrev=False,
                           epilog=f"Own data: {own}.")  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|where")
    looking = actions.add_parser(
        "check", allow_abbrev=False, help="counts, lengths, labels, and every file that is missing or broken",
        epilog="Exit status 1: a file is missing, cannot be read or is wrong.")  # fmt: skip
    looking.add_argument("data", help=f"{', '.join(corpora.NAMES)}; or own data: {own}; or tar shards, such as "
                         "shards/cc3m-{00000..00331}.tar; or several, with weights: coco,vg:0.5")  # fmt: skip
    looking.add_argument("--root", help="the folder of a named data set (default: data/NAME); of several the one above "
                         "theirs (default: data)")  # fmt: skip
    looking.add_argument("--train-on", default="train", help="vqa: train, train+val or train+val+vg [train]")
    looking.add_argument("--keep-test", action=argparse.BooleanOptionalAction, default=False,
                         help="vg, sbu: with the pictures that COCO or Flickr30k keep for val and test")  # fmt: skip
    looking.add_argument("--quotes", default="csv", help="cc3m's TSV files: csv or none [csv]")
    looking.add_argument("--decode", action=argparse.BooleanOptionalAction, default=True,
                         help="read every picture; --no-decode only looks whether the files are there")  # fmt: skip
    finding = actions.add_parser("where", help="where the official data sets come from, and how to lay them out")
    finding.add_argument("name", nargs="?", help=f"{', '.join(SOURCES)} or regions; without it: one line each")
    argv = sys.argv[1:] if argv is None else argv
    known, unknown = parser.parse_known_args([re.sub(r"^--[\w-]+", lambda m: m[0].replace("_", "-"), w) for w in argv])
    if unknown:
        flags = [flag for action in actions.choices[known.action]._actions for flag in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]}?" if nearest else " (--help lists every flag)"
        raise UserError(f"unknown argument {unknown[0]}{hint}")
    return known


def main(argv: Sequence[str] | None = None) -> int:
    """-> the exit status."""
    try:
        flags = parse(argv)
        if flags.action == "where":
            where(flags.name)
            return 0
        if flags.data != "vqa" and flags.train_on != "train":
            raise UserError(f"--train-on chooses among VQA's questions; {flags.data} has none: leave it out")
        names = [name for name, _ in corpora.parts_of(flags.data)]
        if flags.keep_test and not {"vg", "sbu"} & set(names):
            raise UserError(f"--keep-test is about pictures of vg and sbu that others test on; {flags.data} has none: "
                            "leave it out")  # fmt: skip
        if flags.quotes != "csv" and "cc3m" not in names:
            raise UserError(f"--quotes says how cc3m's TSV files are read; {flags.data} has none: leave it out")
        options = dict(keep_test=flags.keep_test, quotes=flags.quotes)
        if len(names) > 1:
            return 0 if check_mixture(flags.data, flags.root, flags.decode, **options) else 1
        corpus = corpora.load(names[0], flags.root, train_on=flags.train_on, **options)
        folder = None if names[0] == "scenes" else corpora.folder_of(names[0], flags.root)
        fine = check(corpus, folder, flags.train_on, flags.decode)
        return 0 if fine else 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
