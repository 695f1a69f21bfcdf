"""What the loader sees of a data set, and where the official ones come from.

    python data.py check my_photos.jsonl            reads every picture
    python data.py check coco --root data/coco      --no-decode: only whether the files are there, in seconds
    python data.py check vqa --train-on train+val   train and val as a run with this flag has them
    python data.py where                            the official sets;  `where coco`: files, pages, terms, layout

Reading map: the published sizes | what is said about a split | files | the check | where | command line.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, combinations
from pathlib import Path
from typing import NamedTuple

import common
import corpora
import regions
from common import UserError
from data import BadImage, Choice, Corpus, Item, files_of, ids_of, load_image

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
}  # fmt: skip
ABOUT = {"vcr"}  # read in many papers, not found with the authors
VQA_ANSWERS = 3_129  # hengyuan-hu/bottom-up-attention-vqa:tools/compute_softscore.py
NOUNS = {"vqa": "question", "vcr": "question", "nlvr2": "statement", "nlvr1": "statement", "snli_ve": "hypothesis"}


def published_sizes(corpus: Corpus, train_on: str = "train") -> dict[str, int]:
    """Split -> how many there should be, as far as it applies to this choice of files and splits."""
    sizes = PUBLISHED.get(corpus.name, {})
    if corpus.name == "vqa" and train_on != "train":  # other splits of train2014 and val2014
        sizes = {split: n for split, n in sizes.items() if split.startswith("server")}
    official_splits = corpus.name == "coco" and any("no Karpathy file" in note for note in corpus.notes)
    return {} if official_splits else sizes


def beside(n: int, noun: str, published: int | None, about: bool = False) -> str:
    """4 images (published: 5,000)."""
    said = f"{n:,} {noun}"
    if published is None:
        return said
    if n == published:
        return f"{said} ({'about ' if about else ''}as published)"
    return f"{said} (published: {'about ' if about else ''}{published:,})"


# ---------------------------------------------------------------------------------------------------------------------
# What is said about a split


def line(what: str, said: str) -> None:
    print(f"  {what:<22}{said}".rstrip())


def spread(numbers: Sequence[int]) -> str:
    return f"min {min(numbers)}, mean {statistics.fmean(numbers):.1f}, max {max(numbers)}" if numbers else "none"


def shares(counts: dict[str, int]) -> str:
    total = max(1, sum(counts.values()))
    return ", ".join(f"{name} {n:,} ({n / total:.1%})" for name, n in counts.items())


def histogram(words: list[int]) -> None:
    counts = Counter(min((n - 1) // 5, 6) for n in words)
    for bucket in range(max(counts, default=-1) + 1):
        share = counts[bucket] / len(words)
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
    """Whether files are there, by one listing of each folder."""

    def __init__(self):
        self.names: dict[str, set[str]] = {}

    def has(self, file: Path) -> bool:
        folder = str(file.parent)
        if folder not in self.names:
            try:
                with os.scandir(folder) as entries:
                    self.names[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                self.names[folder] = set()
        # some file systems find a name in other capitals; a listing does not
        return file.name in self.names[folder] or bool(self.names[folder]) and file.is_file()


def watched(what: str, do, things: Sequence) -> Iterator:
    """do(thing) of each, in threads, with a bar on a terminal."""
    from tqdm import tqdm

    with ThreadPoolExecutor() as pool, tqdm(total=len(things), desc=what, leave=False, disable=None) as bar:
        for start in range(0, len(things), 1000):  # else Ctrl-C would wait for all of them
            for result in pool.map(do, things[start : start + 1000]):
                bar.update()
                yield result


def look_into(file: Path) -> tuple[bytes | None, tuple[int, int] | None, str | None]:
    """(digest of the bytes, width and height, what is wrong): each None where it does not apply."""
    try:
        size = load_image(file, 0).size
        return hashlib.sha256(file.read_bytes()).digest(), size, None
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


def check(corpus: Corpus, root: Path | None = None, train_on: str = "train", decode: bool = True) -> bool:
    """Prints what the loader sees of every split; True where every file is there and, with `decode`, can be read."""
    print(f"{corpus.name}: {', '.join(f'{len(items):,} {split}' for split, items in corpus.splits.items())}")
    for note in corpus.notes:
        print(f"  note: {note}")
    if corpus.answers:
        of = VQA_ANSWERS if corpus.name == "vqa" else None
        print(f"  answer vocabulary: {beside(len(corpus.answers), 'answers', of)}")
    shelf, published = Shelf(), published_sizes(corpus, train_on)
    left_out = any("missing and left out" in note for note in corpus.notes)  # own data without some of its pictures
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
                low, middle, high = (f"{w}x{h}" for w, h in (known[0], known[len(known) // 2], known[-1]))
                line("picture sizes", f"smallest {low}, median {middle}, largest {high}")
        lack, wrong = check_metadata(items, shelf, sizes, decode)
        n_missing += lack
        unreadable += wrong
    print()
    for one, other in combinations(pictures, 2):
        common_ones = pictures[one] & pictures[other]
        if common_ones and not (one.startswith(other) or other.startswith(one)):  # a domain of test is a part of it
            print(f"shared: {one} and {other} have {len(common_ones):,} pictures in common")
    if decode:
        groups = [group for group in same.values() if len(group) > 1]
        across = [group for group in groups if len({split for split, _ in group}) > 1]
        print(f"duplicates: {len(groups):,} groups of identical files, {len(across):,} of them across splits")
        for group in across[:10]:
            print("  " + " = ".join(f"{file} ({split})" for split, file in group))
    print(f"missing: {n_missing:,}" + (", besides what a note says is left out" if left_out else ""))
    print(f"unreadable: {len(unreadable):,}" if decode else "unreadable: not looked for; leave out --no-decode")
    for message in unreadable[:10]:
        print(f"  {message}")
    fine = not n_missing and not unreadable and not left_out
    for folder in ("regions", "regions_boxes", "regions_mirrored", "regions_boxes_mirrored"):
        if root and (root / folder).is_dir():
            fine &= check_regions(corpus, root / folder, shelf, decode)
    return fine


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


MOST_REGIONS = 2_000  # region files that are read; 120,000 of them are 25 GB


def check_regions(corpus: Corpus, folder: Path, shelf: Shelf, decode: bool) -> bool:
    """Region files of the pictures, or, where the name says _boxes, of VCR's objects; of either, mirrored."""
    name = folder.name.removesuffix("_mirrored")
    is_boxes, is_mirrored = name.endswith("_boxes"), name != folder.name
    plain = folder.with_name(name.removesuffix("_boxes"))
    source = regions.NpzRegions(plain) if is_boxes or is_mirrored else regions.source_in(folder)
    of: dict = {}  # image id -> (its picture, a sample about it)
    for item in chain(*corpus.splits.values()):
        for image_id, image in zip(ids_of(item), files_of(item), strict=True):
            of.setdefault(image_id, (image, item))

    def is_there(image_id) -> bool:
        if isinstance(source, regions.TsvRegions):
            return any(name in source.places for name in regions.region_names(image_id, of[image_id][0]))
        return any(shelf.has(folder / f"{name}.npz") for name in regions.region_names(image_id, of[image_id][0]))

    def read(image_id):
        image, item = of[image_id]
        try:
            found = source.of_objects(item, is_mirrored) if is_boxes else source(image_id, image, is_mirrored)
        except BadImage as bad:
            return str(bad)
        if is_boxes and len(found.boxes) != len(item.objects):
            return f"{folder}, image {image_id}: {len(found.boxes)} regions for {len(item.objects)} objects"
        return found.features.shape[1], len(found.boxes), 0 if found.classes is None else found.classes.shape[1]

    there = [image_id for image_id in of if is_there(image_id)]
    print(f"\n{folder}: region files of {len(there):,} of {len(of):,} pictures")
    if len(there) < len(of):
        line("missing", f"{len(of) - len(there):,}, first: image {next(i for i in of if i not in set(there))}")
    if not decode:
        return len(there) == len(of)
    step = max(1.0, len(there) / MOST_REGIONS)
    chosen = [there[int(i * step)] for i in range(min(len(there), MOST_REGIONS))]
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


def per_file(numbers: list[int], remark: str) -> str:
    counts = Counter(numbers).most_common()
    if len(counts) == 1:
        return f"{counts[0][0]:,}"
    return ", ".join(f"{n:,} ({times:,} files)" for n, times in counts) + f": {remark}"


# ---------------------------------------------------------------------------------------------------------------------
# Where


class Source(NamedTuple):
    title: str
    files: tuple[tuple[str, str], ...]  # (page, what to take from it)
    terms: str  # as far as a source says them
    tree: str


COCO_PAGE = "https://cocodataset.org/#download"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
FLICKR30K_FORM = "https://forms.illinois.edu/sec/229675"  # dandelin/ViLT:DATA.md
FLICKR_TERMS = "images: Flickr's terms of use, non-commercial research and education only"
COCO_TERMS = "annotations CC BY 4.0; images: Flickr's terms of use"

SOURCES = {
    "scenes": Source("the small world of coloured shapes, drawn when needed", (), "MIT, like this repository", ""),
    "coco": Source(
        "COCO captions, Karpathy's splits",
        ((COCO_PAGE, "2014 Train images (13 GB), 2014 Val images (6 GB)"), (KARPATHY, "dataset_coco.json in it")),
        COCO_TERMS,
        """
├── dataset_coco.json
├── train2014/
│   └── COCO_train2014_000000000009.jpg ...     82,783 files
└── val2014/
    └── COCO_val2014_000000000042.jpg ...       40,504 files
The images of 2017, in train2017/ and val2017/, are the same under other names and do as well.""",
    ),
    "flickr30k": Source(
        "Flickr30k captions, Karpathy's splits",
        ((FLICKR30K_FORM, "the images, on request, from the University of Illinois"),
         (KARPATHY, "dataset_flickr30k.json in it")),
        FLICKR_TERMS,
        """
├── dataset_flickr30k.json
└── flickr30k-images/
    └── 1000092795.jpg ...                      31,783 files""",
    ),
    "flickr8k": Source(
        "Flickr8k captions, Karpathy's splits",
        (("https://forms.illinois.edu/sec/1713398", "Flickr8k_Dataset.zip (1 GB), on request, University of Illinois"),
         (KARPATHY, "dataset_flickr8k.json in it")),
        FLICKR_TERMS,
        """
├── dataset_flickr8k.json
└── Flicker8k_Dataset/
    └── 1000268201_693b08cb0e.jpg ...""",
    ),
    "nocaps": Source(
        "NoCaps: captions of things that COCO does not have, for evaluation",
        (("https://nocaps.org/download", "the two .json files; their `coco_url` names each image, of Open Images"),
         ("https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json", "the captions of the validation set")),
        "",
        """
├── nocaps_val_4500_captions.json
├── nocaps_test_image_info.json                 only for the server
├── val/
│   └── 0013ea2087020901.jpg ...                4,500 files
└── test/                                       10,600 files, only for the server""",
    ),
    "vqa": Source(
        "VQA v2: questions about COCO's images",
        (("https://visualqa.org/download.html", "Balanced Real Images: questions and annotations, v2.0"),
         (COCO_PAGE, "2014 Train images (13 GB), 2014 Val images (6 GB); 2015 Test images, only for the server"),
         ("https://visualgenome.org/api/v0/api_home.html", "only for --train-on train+val+vg: images, image_data.json, "
          "question_answers.json into data/vg")),
        COCO_TERMS,
        """
├── v2_OpenEnded_mscoco_train2014_questions.json        and val2014
├── v2_mscoco_train2014_annotations.json                and val2014
├── v2_OpenEnded_mscoco_test2015_questions.json         and test-dev2015, only for the server
├── train2014/   COCO_train2014_000000000009.jpg ...    82,783 files
├── val2014/     COCO_val2014_000000000042.jpg ...      40,504 files
└── test2015/                                           only for the server
The three folders may lie in data/coco instead.""",
    ),
    "nlvr2": Source(
        "NLVR2: statements about pairs of photographs",
        (("https://github.com/lil-lab/nlvr", "nlvr2/data/*.json"),
         ("https://lil.nlp.cornell.edu/nlvr/", "the images: a form, for research; or nlvr2/util/download_images.py")),
        "sentences and labels CC BY 4.0; the images are not the authors' to license",
        """
├── data/
│   └── train.json  dev.json  test1.json  test2.json
└── images/
    ├── train/
    │   └── 12/  train-10108-0-img0.png ...     `directory` of the record
    ├── dev/     dev-0-0-img0.png ...
    ├── test1/   test1-0-0-img0.png ...
    └── test2/""",
    ),
    "nlvr1": Source(
        "NLVR, the first version: statements about drawn boxes, written in this form",
        (("https://github.com/lil-lab/nlvr", "nlvr/: train, dev and test, .json and images"),),
        "CC BY 4.0",
        """
├── train.jsonl  val.jsonl  test.jsonl          a line: {"identifier": "dev-1234-0", "sentence": "There is a box ...",
│                                               "label": "true", "images": ["images/dev-1234-0-0.png"]}
└── images/
    └── dev-1234-0-0.png ...                    several in `images`: the same content in other orders""",
    ),
    "snli_ve": Source(
        "SNLI-VE: hypotheses about Flickr30k's images",
        (("https://github.com/necla-ml/SNLI-VE", "snli_ve_{train,dev,test}.jsonl, linked in its README"),
         (FLICKR30K_FORM, "the images, on request, from the University of Illinois")),
        FLICKR_TERMS,
        """
├── snli_ve_train.jsonl  snli_ve_dev.jsonl  snli_ve_test.jsonl
└── flickr30k-images/
    └── 1000092795.jpg ...                      31,783 files
The folder may lie in data/flickr30k instead.""",
    ),
    "vcr": Source(
        "VCR: questions about films, with answers and reasons",
        (("https://visualcommonsense.com/download/", "vcr1annots.zip, vcr1images.zip"),),
        "an agreement on that page comes before the download",
        """
├── train.jsonl  val.jsonl  test.jsonl
└── vcr1images/
    └── lsmdc_3015_CHARLIE_ST_CLOUD/            a folder a film: each image .jpg, its boxes .json beside it""",
    ),
}  # fmt: skip
REGIONS = Source(
    "region features of COCO's images, as bottom-up attention made them; of others: python tools/regions.py",
    (("https://github.com/peteanderson80/bottom-up-attention", "2014 Train/Val, 10 to 100 regions an image (23 GB) or "
      "36 (25 GB); 2015 Testing (15 GB, 17 GB): .tsv, without class probabilities"),
     ("https://github.com/YehLi/xmodaler", "tools/create_feats.py makes one .npz an image of them")),
    "",
    """
└── 42.npz ...                                  <image id>.npz""",
)  # fmt: skip


def where(name: str | None) -> None:
    if name is None:
        width = max(map(len, SOURCES))
        for known, source in (*SOURCES.items(), ("regions", REGIONS)):
            print(f"{known:<{width}}  {source.title}")
        print("\n`python data.py where NAME` names the pages, the terms and the layout.")
        return
    known = {**SOURCES, "regions": REGIONS}
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{name!r} is not known: it is one of {', '.join(known)}{hint}")
    source = known[name]
    print(f"{source.title}\n")
    for page, what in source.files:
        print(f"{page}\n    {what}")
    if source.terms:
        print(f"terms: {source.terms}")
    if source.tree:
        print(f"\n{'data/coco/regions' if name == 'regions' else f'data/{name}'}/{source.tree}\n")
        print("then `python data.py check " + ("coco`" if name == "regions" else f"{name}`"))


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
    looking.add_argument("data", help=f"{', '.join(corpora.NAMES)}; or own data: {own}")
    looking.add_argument("--root", help="the folder of a named data set (default: data/NAME)")
    looking.add_argument("--train-on", default="train", help="vqa: train, train+val or train+val+vg [train]")
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
        corpus = corpora.load(flags.data, flags.root, train_on=flags.train_on)
        folder = None if flags.data == "scenes" else corpora.folder_of(flags.data, flags.root)
        fine = check(corpus, folder, flags.train_on, flags.decode)
        return 0 if fine else 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
