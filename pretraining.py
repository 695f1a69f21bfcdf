"""What models of pictures and texts are pre-trained on besides COCO: Visual Genome, Conceptual Captions 3M, SBU.

    vg/    annotations/region_descriptions.json, image_data.json (or here)   images/VG_100K/, images/VG_100K_2/
           question_answers.json, for --task vqa
    cc3m/  Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv       images_train/ROW.jpg, images_val/ROW.jpg
           or train_annot.json, val_annot.json: [[file, caption], ...]       the files that they name
    sbu/   sbu-captions-all.json, or SBU_captioned_photo_dataset_urls.txt    images/NUMBER.jpg
           and _captions.txt, or annot.json: [[file, caption], ...]          the files that it names
           or, of the last two, .tar files, see shards.py

A row whose picture is not there is left out: these sets are links, and a tenth to a quarter of them are dead. Rows are
counted from 1 (YehLi/xmodaler:xmodaler/datasets/images/conceptual_captions.py). Everything is read once, into a Table.

Half of Visual Genome's pictures are COCO's, and some are Flickr30k's; SBU's come from Flickr, too. Those that COCO or
Flickr30k keep for val and test are left out, or what is tested there would have been trained on. Which they are,
dataset_coco.json and dataset_flickr30k.json say, in the folders coco/ and flickr30k/ beside that of the data set.

Reading map: what others test on | which pictures are there | Visual Genome | questions about it | Conceptual Captions,
SBU.
"""

from __future__ import annotations

import csv
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

import corpora
import data
import language
import shards
from common import UserError, choose
from data import Corpus, Example
from table import Table, Writer, json_list, made_once, read_meta

# ---------------------------------------------------------------------------------------------------------------------
# What others test on


def split_files(root: Path) -> dict[str, Path]:
    """Karpathy's files of COCO and Flickr30k, which lie beside the folder of a data set: those that are there. By their
    names, for caption_datasets.zip has all of them in one folder."""
    return {name: file for name in ("coco", "flickr30k") for file in corpora.karpathy_files(root.parent / name)
            if file.name == f"dataset_{name}.json"}  # fmt: skip


def held_out(files: dict[str, Path]) -> tuple[set[int], set[int]]:
    """COCO's ids of its pictures of val and test; Flickr's numbers of Flickr30k's photographs of val and test."""
    rows = {name: [row for row in corpora.read_karpathy(file) if row.split != "train"] for name, file in files.items()}
    photos = (re.match(r"\d{1,18}", str(row.filename)) for row in rows.get("flickr30k", ()))
    return {row.image_id for row in rows.get("coco", ())}, {int(photo[0]) for photo in photos if photo}


def without_tests(table: Table, name: str, files: dict[str, Path], keep_test: bool, notes: list[str]) -> Table:
    """Without the pictures whose column `test` is set, and a note that says how many they are."""
    n = int(table.column("test").sum())
    if files:
        left = "are kept (--keep-test)" if keep_test else "are left out"
        notes.append(f"{name}: {n:,} of {len(table):,} pictures are in val or test of {' or '.join(files)} and {left}.")
    elif keep_test:
        notes.append(f"{name}: pictures that others test on are kept (--keep-test), and nobody knows how many.")
    if "flickr30k" not in files and not keep_test:
        notes.append(f"{name}: without dataset_flickr30k.json in {table.root.parent / 'flickr30k'} nobody knows which "
                     "pictures flickr30k tests on: if they matter, put it there.")  # fmt: skip
    return table if keep_test else table.chosen(table.column("test") == 0)


def parted(name: str, table, notes: list[str]) -> dict:
    """train, val and test of what has no official ones, HERE[data-16]: a thousand pictures each for val and test, at
    most a twentieth; of shards the last ones, else by lot, the same each time."""
    n = len(table)
    held = min(1000, n // 20)
    notes.append(f"{name}: no official splits, so val and test are {held:,} pictures each, "
                 + ("the last of the shards." if isinstance(table, shards.Shards) else "drawn by lot."))  # fmt: skip
    if isinstance(table, shards.Shards):
        return {"train": table.part(0, n - 2 * held), "val": table.part(n - 2 * held, n - held),
                "test": table.part(n - held, n)} if held else {"train": table}  # fmt: skip
    is_held = np.zeros(n, dtype=np.int8)
    is_held[np.random.default_rng(0).permutation(n)[: 2 * held]] = [1, 2] * held
    return {split: table.chosen(is_held == number) for number, split in enumerate(("train", "val", "test"))}


# ---------------------------------------------------------------------------------------------------------------------
# Which pictures are there


class NumberedPictures:
    """The pictures in these folders and theirs that are named by a number, as number -> name relative to `root`, in a
    few bytes each. What lies beside them, such as 12.json, is none."""

    ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
    MOST = 1 << 26  # higher numbers are of no row, and an array up to them would be large

    def __init__(self, folders: Sequence[Path], root: Path):
        numbers, kinds, forms = array("q"), array("i"), {}
        for folder in folders:
            for place, inside, files in os.walk(folder, followlinks=True):
                inside.sort()
                below = os.path.relpath(place, root)
                for file in sorted(files):
                    stem, dot, ending = file.partition(".")
                    is_number = stem.isdecimal() and stem.isascii() and int(stem) < self.MOST
                    if is_number and (dot + ending).lower() in self.ENDINGS:
                        numbers.append(int(stem))
                        kinds.append(forms.setdefault((below, len(stem), dot + ending), len(forms)))
        kind_of = np.full(max(numbers, default=-1) + 1, -1, dtype=np.int32)
        kind_of[np.frombuffer(numbers, np.int64)] = np.frombuffer(kinds, np.int32)
        self.kind_of = memoryview(kind_of)  # three times as fast, number by number
        self.forms = list(forms)  # (folder, digits, ending)

    def get(self, number: int) -> str | None:
        kind = self.kind_of[number] if 0 <= number < len(self.kind_of) else -1
        if kind < 0:
            return None
        below, width, ending = self.forms[kind]
        return f"{below}/{number:0{width}d}{ending}"


@lru_cache(maxsize=64)
def listing(folder: str) -> frozenset[str]:
    """The names in a folder; web data lie in thousands of folders, which annotation files go through in order."""
    try:
        return frozenset(os.listdir(folder))
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return frozenset()


def is_there(file: str) -> bool:
    folder, name = os.path.split(file)
    return name in listing(folder)


def made(root: Path, name: str, sources: Sequence[Path], fill, columns: Sequence[str] = (), **settings) -> Table:
    """The Table that `fill(writer)` writes, the first time. UserError where it is empty."""

    def write(folder: Path) -> str:
        listing.cache_clear()
        with Writer(folder, columns) as writer:
            fill(writer)
        return f"{name}: {writer.n:,} pictures, {writer.n_captions:,} captions"

    table = Table.open(made_once(root, name, sources, write, **settings), root)
    if not len(table):
        lost = {what: n for what, n in read_meta(table.folder).items() if n}
        raise UserError(f"{name}: {sources[0]} has no caption whose picture is there ({lost or 'it is empty'}); put "
                        f"the pictures below {root}, by the names that the head of pretraining.py says")  # fmt: skip
    return table


def tell_of_lost(table: Table, name: str, notes: list[str], **words: str) -> None:
    """A note for each count in the table's meta that is not 0; words: what was left out."""
    meta = read_meta(table.folder)
    notes += [f"{name}: {meta[count]:,} {words[count]} are left out." for count in words if meta.get(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Visual Genome


def load_vg(root: Path, keep_test: bool = False) -> Corpus:
    """train, val and test, each picture with its different phrases about regions; see `parted`. Image ids are its own.

    HERE[data-14]: phrases are used as they are, without their boxes. `keep_test`: with the pictures that COCO and
    Flickr30k test on; without it, COCO's split file must be there.
    """
    regions, images = (vg_file(root, name) for name in ("region_descriptions.json", "image_data.json"))
    tests = vg_tests(root, keep_test)
    table = made(root, "vg", [regions, images, *tests.values(), *vg_folders(root)],
                 partial(_fill_vg, root, regions, images, tests), ("test",))  # fmt: skip
    notes: list[str] = []
    tell_of_lost(table, "vg", notes, empty="empty phrases", unknown="phrases about pictures that image_data.json lacks",
                 without="pictures that are not there", bare="pictures without a phrase")  # fmt: skip
    return Corpus("vg", parted("vg", without_tests(table, "vg", tests, keep_test, notes), notes), notes)


def vg_tests(root: Path, keep_test: bool) -> dict[str, Path]:
    files = split_files(root)
    if "coco" not in files and not keep_test:
        raise UserError(f"vg: half of its pictures are COCO's, and dataset_coco.json says which of them are for tests: "
                        f"put it into {root.parent / 'coco'}, or take the risk with --keep-test")  # fmt: skip
    return files


def vg_folders(root: Path) -> list[Path]:
    return [root / name for name in ("images", "VG_100K", "VG_100K_2") if (root / name).is_dir()]


def vg_pictures(root: Path) -> NumberedPictures:
    present = NumberedPictures(vg_folders(root), root)
    if not present.forms:
        raise UserError(f"vg: no picture of Visual Genome in images/VG_100K or images/VG_100K_2 of {root}; put them "
                        "there")  # fmt: skip
    return present


def vg_file(root: Path, name: str) -> Path:
    file = next((f for f in (root / name, root / "annotations" / name) if f.is_file()), None)
    if not file:
        raise UserError(f"vg: no {name} in {root} or its annotations/; put it there")
    return file


def vg_images(file: Path) -> Iterator[tuple[int, int | None, int | None]]:
    """image_data.json: (image id, its id in COCO, its number at Flickr) of each picture."""
    for where, record in json_list(file):
        (image_id,) = corpora.fields(record, where, image_id=int)
        if "coco_id" not in record:
            raise UserError(f"{where}: no `coco_id`, which tells COCO's tests; put the official file there")
        for name in ("coco_id", "flickr_id"):  # where it is a text, it would never be found
            if record.get(name) is not None:
                corpora.fields(record, where, **{name: int})
        yield image_id, record.get("coco_id"), record.get("flickr_id")


def _fill_vg(root: Path, regions: Path, images: Path, tests: dict[str, Path], writer: Writer) -> None:
    coco, photos = held_out(tests)
    known = {image_id: of_coco in coco or photo in photos for image_id, of_coco, photo in vg_images(images)}
    present = vg_pictures(root)
    lost = dict.fromkeys(("empty", "unknown", "without", "bare"), 0)
    for where, record in json_list(regions):
        image_id, described = corpora.fields(record, where, id=int, regions=list)
        phrases = [" ".join(corpora.fields(region, where, phrase=str)[0].split()) for region in described]
        different = list(dict.fromkeys(filter(None, phrases)))
        if image_id not in known:
            lost["unknown"] += len(phrases)
        elif not (file := present.get(image_id)):
            lost["without"] += 1
        else:
            lost["empty"] += phrases.count("")
            lost["bare"] += not different
            if different:
                writer.add(image_id, file, different, test=known[image_id])
    writer.meta.update(lost)


# ---------------------------------------------------------------------------------------------------------------------
# Questions about it


def load_vg_questions(root: Path, keep_test: bool = False) -> Corpus:
    """train, val and test of Visual Genome's questions, split by pictures; Corpus.answers as VQA's."""
    coco, photos = held_out({} if keep_test else vg_tests(root, keep_test))
    present = vg_pictures(root)
    about = vg_images(vg_file(root, "image_data.json"))
    in_test = {image_id: of_coco in coco or photo in photos for image_id, of_coco, photo in about}
    found, lost = [], Counter()
    for where, number, image_id, question, answer in vg_questions(vg_file(root, "question_answers.json")):
        file = present.get(image_id)
        if image_id not in in_test:
            lost["that image_data.json lacks"] += 1
        elif in_test[image_id]:
            lost["of val or test of coco or flickr30k"] += 1
        elif not file:
            lost["that are not there"] += 1
        else:
            found.append(Example(number, (image_id,), (root / file,), data.caption_text(question, where),
                                 answers=(language.normalise_answer(answer),) * 10, kinds=("other", "vg")))  # fmt: skip
    notes = [f"vg: {n:,} questions about pictures {which} are left out." for which, n in lost.items()]
    if not found:
        raise UserError(f"vg: no question about a picture that is in {root}; put its pictures there")
    pictures = list(dict.fromkeys(example.image_ids[0] for example in found))
    held = min(1000, len(pictures) // 20)
    by_lot = np.random.default_rng(0).permutation(len(pictures))
    split_of = dict.fromkeys(pictures, "train")
    split_of |= {pictures[i]: ("val", "test")[n % 2] for n, i in enumerate(by_lot[: 2 * held])}
    splits: dict[str, list] = {"train": [], "val": [], "test": []}
    for example in found:
        splits[split_of[example.image_ids[0]]].append(example)
    return Corpus("vg", splits, notes, answers=corpora.answer_vocabulary(found))


def vqa_questions(root: Path, vocabulary: Sequence[str], tested_on: set, notes: list[str]) -> list[Example]:
    """For VQA's training, HERE[data-12]: those whose answer is a class, without those about COCO's `tested_on`.
    vg/ lies below VQA's root or beside it."""
    place = next((p for p in (root / "vg", root.parent / "vg") if p.is_dir()), root.parent / "vg")
    coco = {image_id: of_coco for image_id, of_coco, _ in vg_images(vg_file(place, "image_data.json"))}
    present = vg_pictures(place)
    known, found, left_out, without = set(vocabulary), [], 0, 0
    for _, number, image_id, question, answer in vg_questions(vg_file(place, "question_answers.json")):
        text, file = language.normalise_answer(answer), present.get(image_id)
        if coco.get(image_id) in tested_on:
            left_out += 1
        elif not file:
            without += 1
        elif text in known:
            found.append(Example(f"vg-{number}", (f"vg-{image_id}",), (place / file,), question, answers=(text,) * 10,
                                 kinds=("other", "vg")))  # fmt: skip
    notes.append(f"vqa: {len(found):,} questions of Visual Genome are in train; {left_out:,} about pictures of val and "
                 f"test and {without:,} whose picture is not there are not.")  # fmt: skip
    return found


def vg_questions(file: Path) -> Iterator[tuple[str, int, int, str, str]]:
    """question_answers.json: (where, question id, image id, question, answer)."""
    for where, record in json_list(file):
        for row in corpora.fields(record, where, qas=list)[0]:
            yield where, *corpora.fields(row, f"{where}, qas", qa_id=int, image_id=int, question=str, answer=str)


# ---------------------------------------------------------------------------------------------------------------------
# Conceptual Captions, SBU

TSV = {"train": ("Train_GCC-training.tsv", "train.tsv"),
       "val": ("Validation_GCC-1.1.0-Validation.tsv", "validation.tsv", "val.tsv")}  # fmt: skip
QUOTES = ("csv", "none")
LOST = {"without": "rows whose picture is not there", "empty": "empty captions"}


def load_cc3m(root: Path, quotes: str = "csv") -> Corpus:
    """train and val, from TSV files, from lists in JSON, or from tar shards. Image ids are row numbers, from 1, of val
    val-1 and so on, for both files count from 1.

    quotes: "csv" reads TSV files as xmodaler does, where a double quote opens a cell that may hold line breaks, so that
    some rows merge and all later ones get lower numbers; "none" takes every line for a row.
    """
    choose("quotes", quotes, QUOTES)
    splits, notes = {}, []
    places = {"train": ("images_train", "training", "train", "images"), "val": ("images_val", "validation", "val")}
    if any(root.glob("*.tar")) and not any((root / place).is_dir() for place in places["train"]):
        return load_shards(str(root), "cc3m")  # img2dataset leaves them beside the TSV file that it was given
    for split, folders in places.items():
        file = next((root / name for name in TSV[split] if (root / name).is_file()), None)
        listed = root / f"{split}_annot.json"
        if file:
            splits[split] = from_rows("cc3m", root, partial(tsv_rows, file, quotes), [file], split, folders, notes, {},
                                      quotes=quotes)  # fmt: skip
        elif listed.is_file():
            splits[split] = from_list("cc3m", root, listed, split, notes)
    if "val" in splits:
        splits["val"].prefix = "val-"
    if "train" not in splits:
        raise UserError(f"cc3m: neither {TSV['train'][0]} nor train_annot.json nor a .tar is in {root}; put it there")
    return Corpus("cc3m", splits, notes)


def load_sbu(root: Path, keep_test: bool = False) -> Corpus:
    """train, val and test (see `parted`), from JSON, from the two aligned text files, or from tar shards. Photographs
    that Flickr30k keeps for val and test are known by their address, which only the first two of these forms have.

    HERE[data-15]: pictures are named, and image ids are, by numbers in the file, from 1, as Conceptual Captions' are.
    """
    whole, listed = root / "sbu-captions-all.json", root / "annot.json"
    aligned = [root / f"SBU_captioned_photo_dataset_{what}.txt" for what in ("urls", "captions")]
    notes: list[str] = []
    sources, places = [whole] if whole.is_file() else aligned, ("images", "images_train", "train")
    are_shards = any(root.glob("*.tar")) and not any((root / place).is_dir() for place in places)
    if all(map(Path.is_file, sources)) and not are_shards:
        tests = {name: file for name, file in split_files(root).items() if name == "flickr30k"}
        table = from_rows("sbu", root, partial(sbu_rows, sources), sources, "all", places, notes, tests)
        return Corpus("sbu", parted("sbu", without_tests(table, "sbu", tests, keep_test, notes), notes), notes)
    if are_shards:
        corpus = load_shards(str(root), "sbu")
    elif listed.is_file():
        table = from_list("sbu", root, listed, "all", notes)
        corpus = Corpus("sbu", parted("sbu", table, notes), notes)
    else:
        raise UserError(f"sbu: none of {whole.name}, {aligned[0].name} with {aligned[1].name}, {listed.name} or a .tar "
                        f"is in {root}; put one there")  # fmt: skip
    corpus.notes.append(f"sbu: pictures that flickr30k tests on cannot be told without their addresses, which "
                        f"{whole.name} has, so they are kept.")  # fmt: skip
    return corpus


def tsv_rows(file: Path, quotes: str) -> Iterator[tuple[str, str]]:
    """(caption, address) of each row."""
    csv.field_size_limit(1 << 24)  # a quote left open swallows what follows
    how = csv.QUOTE_MINIMAL if quotes == "csv" else csv.QUOTE_NONE
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter="\t", quoting=how)
            for row in rows:
                if len(row) < 2:
                    raise UserError(f"{file}:{rows.line_num}: not caption<TAB>address: {str(row)[:80]}; is it cut off? "
                                    "Fetch it anew, or mend the line")  # fmt: skip
                yield row[0], row[1]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a TSV file ({error}); put the official one there") from None


def sbu_rows(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """(caption, address) of each; files: the one in JSON, or those of addresses and of captions."""
    if len(files) == 1:
        captions, urls = corpora.read_json(files[0], "captions", "image_urls")
    else:
        try:  # as bytes, since reading text would take a lone carriage return for the end of a line
            urls, captions = (file.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n") for file in files)
        except (OSError, ValueError) as error:
            raise UserError(f"{files[0].parent}: {error}; put the official files there") from None
    if len(captions) != len(urls):
        raise UserError(f"{files[-1]}: {len(captions):,} captions for {len(urls):,} addresses in {files[0].name}, so "
                        "none of them can be trusted; fetch it anew")  # fmt: skip
    for number, (caption, url) in enumerate(zip(captions, urls, strict=True), 1):
        if not isinstance(caption, str) or not isinstance(url, str):
            raise UserError(f"{files[0]}: number {number} is no text: {str(caption)[:60]}, {str(url)[:60]}; put the "
                            "official one there")  # fmt: skip
        yield caption, url


def from_rows(name: str, root: Path, rows: Callable[[], Iterator[tuple[str, str]]], sources: list[Path], split: str,
              folders: Sequence[str], notes: list[str], tests: dict[str, Path], **settings) -> Table:
    """A Table of rows (caption, address) whose picture is a file named by the row's number, from 1, in the first of
    `folders` that is there. `settings`: on which the rows depend besides their sources."""
    folder = next((root / place for place in folders if (root / place).is_dir()), None)
    if not folder:
        raise UserError(f"{name}: none of the folders {', '.join(folders)} is in {root}; put the pictures of "
                        f"{sources[0].name} there, or take that file away")  # fmt: skip

    def fill(writer: Writer) -> None:
        photos, present = held_out(tests)[1], NumberedPictures([folder], root)
        without = empty = 0
        for number, (caption, url) in enumerate(rows(), 1):
            file, text = present.get(number), " ".join(caption.split())
            if file is None:
                without += 1
            elif not text or (not text.isascii() and data.HALVES.search(text)):
                empty += 1
            else:
                photo = re.search(r"/(\d{1,18})_[0-9a-f]+", url) if photos else None
                writer.add(number, file, (text,), test=bool(photo and int(photo[1]) in photos))
        writer.meta.update(without=without, empty=empty)

    table = made(root, f"{name}-{split}", [*sources, *tests.values(), folder], fill, ("test",), **settings)
    tell_of_lost(table, f"{name} {split}", notes, **LOST)
    return table


def from_list(name: str, root: Path, file: Path, split: str, notes: list[str]) -> Table:
    """A Table of [[file, caption], ...] (dandelin/ViLT:DATA.md)."""

    def fill(writer: Writer) -> None:
        without = empty = 0
        for number, (where, row) in enumerate(json_list(file), 1):
            if not isinstance(row, list) or len(row) != 2 or not all(isinstance(cell, str) for cell in row):
                raise UserError(f"{where}: [file, caption] is expected, not {str(row)[:80]}")
            image, caption = data.below(root, row[0], where), " ".join(row[1].split())
            if not is_there(os.path.join(root, image)):
                without += 1
            elif not caption or data.HALVES.search(caption):
                empty += 1
            else:
                writer.add(number, image, (caption,))
        writer.meta.update(without=without, empty=empty)

    # where the pictures lie, whose coming and going is to be noticed
    folders = sorted(place for place in root.iterdir() if place.is_dir() and place.name != "index")
    table = made(root, f"{name}-{split}", [file, *folders], fill)
    tell_of_lost(table, f"{name} {split}", notes, **LOST)
    return table


def load_shards(spec: str, name: str = "") -> Corpus:
    """train, val and test (see `parted`) of tar shards. Image ids are webdataset's keys."""
    found, notes = shards.Shards(shards.files_of(spec)), []
    name = name or name_of_shards(spec)
    for what, said in (("without_caption", "a caption"), ("without_picture", "a picture")):
        n = sum(meta[what]["n"] for meta in found.metas)
        first = next((f"{file.name}: {meta[what]['first'][0]}"
                      for file, meta in zip(found.files, found.metas, strict=True) if meta[what]["n"]), "")  # fmt: skip
        notes += [f"{name}: {n:,} samples without {said} are left out, the first: {first}."] if n else []
    return Corpus(name, parted(name, found, notes), notes)


def name_of_shards(spec: str) -> str:
    """shards/cc3m-{00000..00331}.tar -> cc3m; a folder's own name."""
    path = Path(spec)
    stem = path.name if path.is_dir() else re.sub(r"\{[^}]*\}|\*|\.tar$", "", path.name).strip("-_. ")
    return re.sub(r"[^\w-]+", "-", stem) or path.resolve().parent.name
