"""The official layouts of image-caption data, and the small world, as `data.Corpus`.

    load("scenes", world="tiny")      drawn, nothing to download          load("flickr8k")     load("flickr30k")
    load("coco")                      files below data/coco               load("photos.jsonl") own data, see data.py

    coco/       dataset_coco.json (here, in karpathy/ or in annotations/)   train2014/ val2014/, or train2017/ val2017/
                without it annotations/captions_{train,val}{2014,2017}.json
    flickr30k/  dataset_flickr30k.json likewise                             flickr30k-images/ or images/
    flickr8k/   dataset_flickr8k.json likewise                              Flicker8k_Dataset/ or images/

No load touches every picture: a few of each folder are looked for, the rest is left to the loaders, which name what
they miss. Sources of the layouts: the Karpathy split files, and dandelin/ViLT's DATA.md for where they usually lie.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import UserError
from data import Corpus, Item, below, caption_text, load_own

# Names of the official picture folders; COCO's follow from its file names.
FOLDERS = {"coco": (), "flickr30k": ("flickr30k-images",), "flickr8k": ("Flicker8k_Dataset", "Flickr8k_Dataset")}
NAMES = ("scenes", *FOLDERS)


def load(name: str, root: str | Path | None = None, **scenes_options) -> Corpus:
    """A data set by name, or own data by path. `root`: its folder, default data/NAME; own data and scenes need none.

    `scenes_options` (world, n_train, n_val, n_test, seed) are those of `load_scenes`; other data has no use for them.
    Image ids: COCO's own, Karpathy's imgid for the Flickrs, the index of a scene in its split, own file names.
    Raises UserError for whatever is missing or malformed, saying where it was looked for.
    """
    if name == "scenes":
        return load_scenes(**scenes_options)
    if name in FOLDERS:
        return _load_official(name, Path(root or Path("data", name)))
    path = Path(name)
    if path.suffix.lower() in (".jsonl", ".csv") or (path / "captions.txt").is_file():
        return load_own(path)
    if path.exists():
        raise UserError(f"{name} is not own data: pass a .jsonl, a .csv, or a folder with captions.txt")
    nearest = difflib.get_close_matches(name.lower(), NAMES, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"data set {name!r} is not known: it is {', '.join(NAMES)} or the path of own data{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# The small world


class SceneItems(Sequence):
    """Scenes as Items. Scene and captions are made on access; both depend on (seed, split, index) alone."""

    def __init__(self, scenes: Sequence):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        import scenes

        scene = self.scenes[index]
        return Item(scene.index, scene, tuple(scenes.captions(scene)))


def load_scenes(world="tiny", n_train: int = 20_000, n_val: int = 500, n_test: int = 500, seed: int = 0) -> Corpus:
    """train, val, test and test_compositional (n_test scenes too), whose colour-shape pairs occur in no other split."""
    import scenes

    sizes = {"train": n_train, "val": n_val, "test": n_test, "test_compositional": n_test}
    return Corpus("scenes", {split: SceneItems(scenes.Scenes(world, split, n, seed)) for split, n in sizes.items()})


# ---------------------------------------------------------------------------------------------------------------------
# COCO and the Flickrs


class Row(NamedTuple):
    """One image of an annotation file. `filepath`: the folder that the file names, "" where it names none."""

    split: str
    image_id: int | str
    filepath: str
    filename: str
    captions: tuple[str, ...]


def _load_official(name: str, root: Path) -> Corpus:
    if not root.is_dir():
        raise UserError(f"{name}: the folder {root} does not exist; put the data there or pass --root")
    places = (root, root / "karpathy", root / "annotations")
    files = [file for place in places for file in sorted(place.glob("dataset_*.json"))]
    if len(files) > 1:
        raise UserError(f"{name}: two split files, {files[0]} and {files[1]}; leave one of them there")
    if files:
        rows, notes = _read_karpathy(files[0]), []
    elif name == "coco" and (years := [year for year in (2014, 2017) if _captions_file(root, "val", year)]):
        # of two releases side by side, the one whose pictures are there
        year = next((year for year in years if (root / f"val{year}").is_dir()), years[0])
        rows, notes = _read_official_coco(root, year)
    else:
        also = ", nor annotations/captions_val2014.json or captions_val2017.json" if name == "coco" else ""
        raise UserError(
            f"{name}: no dataset_*.json in {', '.join(map(str, places))}{also}; put dataset_{name}.json of Karpathy's "
            f"caption_datasets.zip into {root}, or pass --root"
        )
    images = Folders(name, root, notes).resolve(rows)
    splits: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for row, image in zip(rows, images, strict=True):
        splits[row.split].append(Item(row.image_id, image, row.captions))
    return Corpus(name, splits, notes)


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); download it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise UserError(f"{file} has no list `images`; a file of the official form has one at its top")
    return content


def _read_karpathy(file: Path) -> list[Row]:
    # restval: the part of val2014 that is in neither val nor test. Every paper trains on it too; without it a quarter
    # of COCO's training images would be lost, and CIDEr's document frequencies would shift.
    names = {"train": "train", "restval": "train", "val": "val", "test": "test"}
    rows = []
    for number, record in enumerate(_read_json(file)["images"]):
        where = f"{file}, images[{number}]"
        try:
            split, filename = str(record["split"]), record["filename"]
            raw = [sentence["raw"] for sentence in record["sentences"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: not of Karpathy's form ({type(error).__name__}: {error})") from None
        if split not in names:
            raise UserError(f"{where}: split {split!r} is not known; Karpathy's are {', '.join(names)}")
        if not raw:
            raise UserError(f"{where}: {filename} has no caption")
        captions = tuple(caption_text(text, f"{where} ({filename})") for text in raw)
        image_id = record.get("cocoid", record.get("imgid", number))
        rows.append(Row(names[split], image_id, str(record.get("filepath") or ""), filename, captions))
    return rows


def _captions_file(root: Path, split: str, year: int) -> Path | None:
    files = [root / place / f"captions_{split}{year}.json" for place in ("annotations", ".")]
    return next((file for file in files if file.is_file()), None)


def _read_official_coco(root: Path, year: int) -> tuple[list[Row], list[str]]:
    rows, notes = [], [f"coco: no Karpathy file, so official splits: val{year} serves as test."]
    for split, name in (("train", "train"), ("test", "val")):
        file = _captions_file(root, name, year)
        if not file:
            notes.append(f"coco: no annotations/captions_{name}{year}.json, so there is no {split} split.")
            continue
        content = _read_json(file)
        captions: dict = {}
        for number, record in enumerate(content.get("annotations", [])):
            where = f"{file}, annotations[{number}]"
            if not isinstance(record, dict) or "image_id" not in record:
                raise UserError(f"{where}: no `image_id` in it")
            captions.setdefault(record["image_id"], []).append(caption_text(record.get("caption"), where))
        without = 0
        for number, record in enumerate(content["images"]):
            if not isinstance(record, dict) or not {"id", "file_name"} <= set(record):
                raise UserError(f"{file}, images[{number}]: no `id` or no `file_name` in it")
            texts = captions.pop(record["id"], None)
            without += texts is None
            if texts:
                rows.append(Row(split, record["id"], f"{name}{year}", record["file_name"], tuple(texts)))
        if captions:
            raise UserError(f"{file}: a caption is about image {next(iter(captions))}, which is not in `images`")
        if without:
            notes.append(f"coco: {without} images of {file.name} have no caption and are left out.")
    return rows, notes


class Folders:
    """Finds where the pictures lie, by a few of each folder that the annotations name."""

    N_PROBES = 5

    def __init__(self, name: str, root: Path, notes: list[str]):
        self.name, self.root, self.notes = name, root, notes
        self.val2017: set[str] | None = None

    def resolve(self, rows: list[Row]) -> list[Path]:
        """The file of each row. UserError where no picture of any folder is found; a note where one folder has none."""
        tried, groups = [], {}  # of each row the possible files; (filepath, how many) -> numbers of its rows
        for number, row in enumerate(rows):
            where = f"{self.name}, image {row.image_id}"
            below(self.root, row.filename, where)
            below(self.root, os.path.join(row.filepath, row.filename), where)
            tried.append(self._candidates(row.filepath, row.filename))
            groups.setdefault((row.filepath, len(tried[-1])), []).append(number)
        chosen, lost = {}, []
        for key, members in groups.items():
            probes = [tried[n] for n in members[:: max(1, len(members) // self.N_PROBES)][: self.N_PROBES]]
            hits = [sum((self.root / file).is_file() for file in column) for column in zip(*probes, strict=True)]
            chosen[key] = hits.index(max(hits))
            if not max(hits):
                folders = ", ".join(str((self.root / file).parent) for file in dict.fromkeys(probes[0]))
                lost.append(f"pictures such as {rows[members[0]].filename} are in none of {folders}")
        if len(lost) == len(groups):
            raise UserError(f"{self.name}: {'; '.join(lost) or 'no images'}; put them there or pass --root")
        self.notes += [f"{self.name}: {text}." for text in lost]
        return [self.root / files[chosen[row.filepath, len(files)]] for row, files in zip(rows, tried, strict=True)]

    def _candidates(self, filepath: str, filename: str) -> list[str]:
        """Relative paths in the order of preference."""
        folders = [filepath, "images", f"images/{filepath}"] if filepath else ["images"]
        files = [f"{folder}/{filename}" for folder in (*folders, *FOLDERS[self.name])]
        # the 2017 release holds the pictures of 2014 under shorter names, divided in another way
        if self.name == "coco" and (match := re.match(r"COCO_((?:train|val)2014)_(\d{12}\.\w+)$", filename)):
            files += [f"{match[1]}/{filename}", f"{self._folder2017(match[2])}/{match[2]}"]
        return files

    def _folder2017(self, filename: str) -> str:
        if self.val2017 is None:  # one listing of 5,000 names instead of a look at every file
            folder = self.root / "val2017"
            self.val2017 = set(os.listdir(folder)) if folder.is_dir() else set()
        return "val2017" if filename in self.val2017 else "train2017"
