"""The official layouts, and the small world, as `data.Corpus`.

    load("scenes", task="vqa")        drawn, nothing to download          load("coco")  load("vqa")  load("nlvr2") ...
    load("photos.jsonl")              own data, see data.py               files below data/NAME, or below `root`

    coco/       dataset_coco.json (here, in karpathy/ or in annotations/)   train2014/ val2014/, or train2017/ val2017/
                without it annotations/captions_{train,val}{2014,2017}.json
    flickr30k/  dataset_flickr30k.json likewise                             flickr30k-images/ or images/
    flickr8k/   dataset_flickr8k.json likewise                              Flicker8k_Dataset/ or images/
    nocaps/     nocaps_val_4500_captions.json, nocaps_test_image_info.json  images/, or val/ and test/
    vqa/        v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
                v2_mscoco_{train2014,val2014}_annotations.json              train2014/ val2014/ test2015/, or ../coco
    nlvr2/      data/{train,dev,test1,test2}.json                           images/{train/NUMBER,dev,test1,test2}/
    nlvr1/      {train,val,test}.jsonl, statements about one picture        images/
    snli_ve/    snli_ve_{train,dev,test}.jsonl                              flickr30k-images/, or ../flickr30k
    vcr/        {train,val,test}.jsonl                                      vcr1images/MOVIE/, .jpg and .json
    vg/ cc3m/ sbu/                                                          see pretraining.py; tar shards: shards.py

`python data.py where NAME` says which official page hands them out. No load touches every picture: a few of each folder
are looked for, the rest is left to the loaders, which name what they miss, and to `data.py check`, which counts it.

Reading map: load | the small world | COCO and the Flickrs | NoCaps | VQA | NLVR | SNLI-VE | VCR.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import data
import language
import scenes
from common import UserError, choose
from data import Choice, Corpus, Example, Item, Tagged

# Names of the official picture folders below the root of each; COCO's follow from its file names.
FOLDERS = {
    "flickr30k": ("flickr30k-images",),
    "flickr8k": ("Flicker8k_Dataset", "Flickr8k_Dataset"),
    "snli_ve": ("flickr30k-images", "../flickr30k/flickr30k-images", "../flickr30k/images"),
}
QUESTIONS = ("vqa", "nlvr2", "nlvr1", "snli_ve", "vcr")  # what has no captions
LARGE = ("vg", "cc3m", "sbu")  # captions that lie in a Table
NAMES = ("scenes", "coco", "flickr30k", "flickr8k", "nocaps", *QUESTIONS, *LARGE)
TASKS = ("caption", "vqa", "nlvr2", "ve", "vcr")  # what scenes can be asked for


def load(name: str, root: str | Path | None = None, task: str = "caption", train_on: str = "train",
         keep_test: bool = False, quotes: str = "csv", **scenes_options):
    """A data set by name, own data by path, or tar shards, as a Corpus. `root`: its folder, default data/NAME.

    task: of scenes, which task (TASKS); of vg "vqa" for its questions; another data set has its own. train_on: of vqa,
    see load_vqa. keep_test: of vg and sbu, quotes: of cc3m, see pretraining.py. `scenes_options` (world, n_train,
    n_val, n_test, seed) are those of `load_scenes`.
    Image ids: COCO's own, Karpathy's imgid for the Flickrs, the index of a scene in its split, own file names, or what
    the data set calls its pictures. Raises UserError for whatever is missing or malformed, saying where it was looked
    for.
    """
    import pretraining
    import shards

    if name == "scenes":
        return load_scenes(task=task, **scenes_options)
    if name in NAMES:
        root = folder_of(name, root)
        readers = {"vqa": lambda root: load_vqa(root, train_on), "nlvr2": load_nlvr2, "nlvr1": load_nlvr1,
                   "snli_ve": load_snli_ve, "vcr": load_vcr, "nocaps": load_nocaps,
                   "vg": partial(pretraining.load_vg_questions if task == "vqa" else pretraining.load_vg,
                                 keep_test=keep_test),
                   "sbu": partial(pretraining.load_sbu, keep_test=keep_test),
                   "cc3m": partial(pretraining.load_cc3m, quotes=quotes)}  # fmt: skip
        try:
            if not root.is_dir():
                raise UserError(f"{name}: the folder {root} does not exist; put the data there or pass --root")
            return readers[name](root) if name in readers else _load_captions(name, root)
        except UserError as error:
            raise UserError(f"{error}\n`python data.py where {name}` shows the official files and layout") from None
    path = Path(name)
    if path.suffix.lower() in (".jsonl", ".csv") or (path / "captions.txt").is_file():
        return data.load_own(path)
    if shards.are_meant(name):
        return pretraining.load_shards(name)
    if path.exists():
        raise UserError(f"{name} is not own data: pass a .jsonl, a .csv, a folder with captions.txt, or tar shards")
    nearest = difflib.get_close_matches(name.lower(), NAMES, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"data set {name!r} is not known: it is {', '.join(NAMES)} or the path of own data{hint}")


def parts_of(spec: str) -> list[tuple[str, float]]:
    """The (data set, weight) of each part of --data: coco,vg:0.5,shards/cc3m-{000..331}.tar. Commas within braces, or
    in the name of a file that is there, part nothing."""
    names = [spec] if Path(spec).exists() else re.split(r",(?![^{]*\})", spec)
    parts = []
    for name in map(str.strip, names):
        found = re.fullmatch(r"(.+):([\d.eE+-]+)", name)
        name, weight = (found[1], found[2]) if found and not Path(name).exists() else (name, "1")
        try:
            parts.append((name, float(weight)))
        except ValueError:
            weight = "nan"
        if not name or not 0 < float(weight) < math.inf:
            raise UserError(f"--data {spec}: name data sets, each with a weight above 0 or without one, such as "
                            "coco,vg:0.5,cc3m")  # fmt: skip
    for name, n in Counter(name for name, _ in parts).items():
        if n > 1:
            raise UserError(f"--data {spec}: {name} comes {n} times; name it once and give it a weight, {name}:{n}")
    return parts


TRAIN_ON = ("train", "train+val", "train+val+vg")  # of vqa


def check_task(task: str, spec: str) -> None:
    """UserError where the data sets of --data have not what the task trains on."""
    import shards

    parts = parts_of(spec)
    of = {"vqa": ("vqa", "vg"), "nlvr2": ("nlvr2", "nlvr1"), "ve": ("snli_ve",), "vcr": ("vcr",)}.get(task)
    for name, _ in parts:
        if of and (name not in ("scenes", *of) or len(parts) > 1):
            raise UserError(f"--task {task} needs questions about pictures: --data scenes or {' or '.join(of)}, not "
                            f"{spec}")  # fmt: skip
        if not of and name in QUESTIONS:
            raise UserError(f"--data {name} has questions, no captions, which --task {task} trains on: choose "
                            "other data")  # fmt: skip
        if len(parts) > 1 and name in ("scenes", "nocaps"):
            raise UserError(f"--data {spec}: {name} is not for mixtures, which are of photographs to train on")
    if task == "scst" and (len(parts) > 1 or parts[0][0] in LARGE or shards.are_meant(parts[0][0])):
        raise UserError(f"--task scst needs several captions of each picture, as COCO has, which {spec} has not")


def folder_of(name: str, root: str | Path | None = None) -> Path:
    """Where a data set lies, and its regions/ below: `root`, or data/NAME, or the folder of own data."""
    return Path(root or (Path("data", name) if name in NAMES else name if Path(name).is_dir() else Path(name).parent))


# ---------------------------------------------------------------------------------------------------------------------
# The small world


class SceneItems(Sequence):
    """Scenes as the Items, Examples or Choices of a task, made on access from (seed, split, index) alone."""

    def __init__(self, made: Sequence, form):
        self.made, self.form = made, form

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.form(self.made[index], range(len(self))[index])


def _scene_captions(scene, index: int) -> Item:
    return Item(scene.index, scene, tuple(scenes.captions(scene)))


def _scene_question(scene, index: int) -> Example:
    """One question a scene. Which of its four: by the index, so that half of them are yes/no questions."""
    asked = scenes.questions(scene)
    asked = asked[index % len(asked)]
    return Example(index, (scene.index,), (scene,), asked.text, answers=asked.answers, kinds=(asked.kind,))


def _scene_statement(judged, index: int) -> Example:
    return Example(index, tuple(scene.index for scene in judged.scenes), judged.scenes, judged.text, judged.label,
                   group=str(judged.group))  # fmt: skip


def _scene_choice(asked, index: int) -> Choice:
    names = ("object",) * len(asked.scene.objects)  # a shape's name would give the answer away

    def text(tokens) -> Tagged:
        return tagged_text([t if isinstance(t, str) else list(t) for t in tokens], names)

    return Choice(str(index), (asked.scene.index,), (asked.scene,), text(asked.question),
                  tuple(map(text, asked.answers)), tuple(map(text, asked.rationales)), asked.label,
                  asked.rationale_label, names)  # fmt: skip


def load_scenes(world="tiny", n_train: int = 20_000, n_val: int = 500, n_test: int = 500, seed: int = 0,
                task: str = "caption") -> Corpus:
    """train, val, test and test_compositional (n_test scenes too), whose colour-shape pairs occur in no other split.

    Groups of pairs (4) and of hypotheses (3) stay whole: each split is cut to a multiple, with at least one group.
    """
    kinds = {"caption": (scenes.Scenes, _scene_captions, 1), "vqa": (scenes.Scenes, _scene_question, 1),
             "nlvr2": (scenes.Pairs, _scene_statement, 4), "ve": (scenes.Hypotheses, _scene_statement, 3),
             "vcr": (scenes.Tagged, _scene_choice, 1)}  # fmt: skip
    choose("task", task, TASKS)
    kind, form, group = kinds[task]
    sizes = {"train": n_train, "val": n_val, "test": n_test, "test_compositional": n_test}
    splits = {split: SceneItems(kind(world, split, max(n - n % group, min(n, 1) * group), seed), form)
              for split, n in sizes.items()}  # fmt: skip
    if task == "ve" and not scenes.get_world(world).panel:
        raise UserError(f"nothing is ever hidden in the {world} world, so no hypothesis is neutral: add --world full")
    answers = answer_vocabulary(splits["train"][:2000]) if task == "vqa" else ()
    return Corpus("scenes", splits, answers=answers)


def texts(corpus: Corpus, world: str = "tiny", most: int = 20_000):
    """What a tokenizer is trained on: the texts of the first `most` training samples, cleaned. Of scenes a tenth of
    that, but of all tasks, so that a fine-tuned model knows its words, as it would with BERT's vocabulary."""
    samples = [first_of(corpus.splits["train"], most if corpus.name != "scenes" else most // 10)]
    if corpus.name == "scenes":
        n = min(1000, len(corpus.splits["train"]))
        samples += [load_scenes(world, n, task=task).splits["train"] for task in ("caption", "vqa", "vcr")]
    for items in samples:
        for item in items:
            said = getattr(item, "captions", None) or (getattr(item, "text", ""),)
            if isinstance(item, Choice):
                said = map(str, (item.question, *item.answers, *item.rationales))
            yield from map(language.clean_caption, said)


def first_of(items: Sequence, n: int) -> Sequence:
    """The first n of training items, or, of a mixture, n from all of its parts."""
    return items.spread(n) if hasattr(items, "spread") else items[:n]


# ---------------------------------------------------------------------------------------------------------------------
# COCO and the Flickrs


class Row(NamedTuple):
    """One image of an annotation file. `filepath`: the folder that the file names, "" where it names none."""

    split: str
    image_id: int | str
    filepath: str
    filename: str
    captions: tuple[str, ...]


def _load_captions(name: str, root: Path) -> Corpus:
    files = karpathy_files(root)
    if len(files) > 1:
        raise UserError(f"{name}: two split files, {files[0]} and {files[1]}; leave one of them there")
    if files:
        rows, notes = read_karpathy(files[0]), []
    elif name == "coco" and (years := [year for year in (2014, 2017) if _captions_file(root, "val", year)]):
        # of two releases side by side, the one whose pictures are there
        year = next((year for year in years if (root / f"val{year}").is_dir()), years[0])
        rows, notes = _read_official_coco(root, year)
    else:
        also = ", nor annotations/captions_val2014.json or captions_val2017.json" if name == "coco" else ""
        raise UserError(
            f"{name}: no dataset_*.json in {root}, {root / 'karpathy'}, {root / 'annotations'}{also}; put "
            f"dataset_{name}.json of Karpathy's caption_datasets.zip into {root}, or pass --root"
        )
    images = Folders(name, root, notes).resolve(rows)
    splits: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    _distinct((row.image_id for row in rows), f"{name}: image")
    for row, image in zip(rows, images, strict=True):
        splits[row.split].append(Item(row.image_id, image, row.captions))
    return Corpus(name, splits, notes)


def karpathy_files(root: Path) -> list[Path]:
    return [file for place in (root, root / "karpathy", root / "annotations")
            for file in sorted(place.glob("dataset_*.json"))]  # fmt: skip


def _load_json(file: Path, parse=json.loads):
    try:
        return parse(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); put the official one there") from None


def _json_lines(file: Path):
    """(where, value) of each line."""
    return _load_json(file, lambda text: data.json_lines(text, file))


def read_json(file: Path, *lists: str) -> list[list]:
    """The lists of these names at the top of an official file."""
    content = _load_json(file)
    for name in lists:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{file} has no list `{name}`; a file of the official form has one at its top")
    return [content[name] for name in lists]


def fields(record, where: str, **types: type) -> list:
    """The values of these fields of a JSON object. UserError that names one which is missing or of another type."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: an object with {', '.join(types)} is expected, not {str(record)[:60]}")
    for name, kind in types.items():
        value = record.get(name)
        if name not in record or not isinstance(value, kind) or isinstance(value, bool):
            found = f"it is {str(value)[:60]!r}" if name in record else "it is missing"
            raise UserError(f"{where}: `{name}` must be {KINDS[kind]}, but {found}; is the file of the official form?")
        if kind is str and data.HALVES.search(value):
            raise UserError(f"{where}: `{name}` holds half a Unicode character: {value!r}; write it anew")
    return [record[name] for name in types]


KINDS = {str: "a text", int: "a whole number", list: "a list"}


def _distinct(ids, what: str) -> None:
    for twice, count in Counter(ids).items():
        if count > 1:
            raise UserError(f"{what} {twice} occurs {count} times; every one has an id of its own")


def read_karpathy(file: Path) -> list[Row]:
    # restval: the part of val2014 that is in neither val nor test. Every paper trains on it too; without it a quarter
    # of COCO's training images would be lost, and CIDEr's document frequencies would shift.
    names = {"train": "train", "restval": "train", "val": "val", "test": "test"}
    rows = []
    for number, record in enumerate(read_json(file, "images")[0]):
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
        captions = tuple(data.caption_text(text, f"{where} ({filename})") for text in raw)
        image_id = record.get("cocoid", record.get("imgid", number))
        if not isinstance(image_id, int | str) or isinstance(image_id, bool):
            raise UserError(f"{where}: the id of an image must be a number or a text, not {str(image_id)[:60]}")
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
        without = 0
        for record, texts in _read_coco_form(file):
            without += not texts
            if texts:
                rows.append(Row(split, record["id"], f"{name}{year}", record["file_name"], tuple(texts)))
        if without:
            notes.append(f"coco: {without} images of {file.name} have no caption and are left out.")
    return rows, notes


def _read_coco_form(file: Path, has_captions: bool = True):
    """(image record, its captions) for each of `images`, of COCO's caption files and NoCaps'."""
    images, *annotations = read_json(file, "images", *["annotations"] * has_captions)
    captions: dict = {}
    for number, record in enumerate(annotations[0] if annotations else []):
        where = f"{file}, annotations[{number}]"
        (image_id,) = fields(record, where, image_id=int)
        captions.setdefault(image_id, []).append(data.caption_text(record.get("caption"), where))
    for number, record in enumerate(images):
        fields(record, f"{file}, images[{number}]", id=int, file_name=str)
        yield record, captions.pop(record["id"], [])
    if captions:
        raise UserError(f"{file}: a caption is about image {next(iter(captions))}, which is not in `images`")


class Folders:
    """Finds where the pictures lie, by a few of each folder that the annotations name."""

    N_PROBES = 5

    def __init__(self, name: str, root: Path, notes: list[str]):
        self.name, self.root, self.notes = name, root, notes
        self.val2017: dict[str, set[str]] = {}

    def resolve(self, rows: list[Row], optional: bool = False) -> list[Path]:
        """The file of each row. A note where one folder has no picture; UserError where none has, or, of an `optional`
        split, a note and no file."""
        tried, groups = [], {}  # of each row the possible files; (filepath, how many) -> numbers of its rows
        for number, row in enumerate(rows):
            where = f"{self.name}, image {row.image_id}"
            data.below(self.root, row.filename, where)
            data.below(self.root, os.path.join(row.filepath, row.filename), where)
            tried.append(self._candidates(row.filepath, row.filename))
            groups.setdefault((row.filepath, len(tried[-1])), []).append(number)
        chosen, lost = {}, []
        for key, members in groups.items():
            probes = [tried[n] for n in members[:: max(1, len(members) // self.N_PROBES)][: self.N_PROBES]]
            for files in (probes, (tried[n] for n in members)):  # all of them only where none of a few is there
                hits = [sum((self.root / file).is_file() for file in column) for column in zip(*files, strict=True)]
                if max(hits):
                    break
            chosen[key] = hits.index(max(hits))
            if not max(hits):
                folders = ", ".join(str((self.root / file).parent) for file in dict.fromkeys(probes[0]))
                lost.append(f"pictures such as {rows[members[0]].filename} are in none of {folders}")
        if len(lost) == len(groups) and not optional:
            raise UserError(f"{self.name}: {'; '.join(lost) or 'no images'}; put them there or pass --root")
        self.notes += [f"{self.name}: {text}." for text in lost]
        if len(lost) == len(groups):
            return []
        return [self.root / files[chosen[row.filepath, len(files)]] for row, files in zip(rows, tried, strict=True)]

    def _candidates(self, filepath: str, filename: str) -> list[str]:
        """Relative paths in the order of preference."""
        folders = [filepath, "images", f"images/{filepath}"] if filepath else ["images"]
        folders += [f"../coco/{filepath}"] if self.name == "vqa" else []  # VQA's pictures are COCO's
        files = [f"{folder}/{filename}" for folder in (*folders, *FOLDERS.get(self.name, ()))]
        # the 2017 release holds the pictures of 2014 under shorter names, divided in another way
        if match := re.match(r"COCO_((?:train|val)2014)_(\d{12}\.\w+)$", filename):
            for coco in {"coco": ("",), "vqa": ("", "../coco/")}.get(self.name, ()):
                files += [f"{coco}{match[1]}/{filename}", f"{coco}{self._folder2017(coco, match[2])}/{match[2]}"]
        return files

    def _folder2017(self, coco: str, filename: str) -> str:
        if coco not in self.val2017:  # one listing of 5,000 names instead of a look at every file
            folder = self.root / coco / "val2017"
            self.val2017[coco] = set(os.listdir(folder)) if folder.is_dir() else set()
        return "val2017" if filename in self.val2017[coco] else "train2017"


def _with_pictures(name: str, root: Path, notes: list[str], file: Path, samples: list, optional: bool = False) -> list:
    """Samples whose `images` (and `others`) are Rows, with files in their place. UserError where an id occurs twice or
    no picture is there; of an `optional` split [] then."""
    if not samples:
        raise UserError(f"{file} holds no record; put the official file there")
    _distinct((sample.example_id for sample in samples), f"{file}: id")
    rows = dict.fromkeys(row for s in samples for order in (s.images, *getattr(s, "others", ())) for row in order)
    images = Folders(name, root, notes).resolve(list(rows), optional)
    files = dict(zip(rows, images, strict=bool(images)))  # several samples are about one picture

    def found(sample):
        others = {"others": tuple(tuple(map(files.get, order)) for order in sample.others)} if sample.others else {}
        return replace(sample, images=tuple(map(files.get, sample.images)), **others)

    return [found(sample) for sample in samples] if images else []


# ---------------------------------------------------------------------------------------------------------------------
# NoCaps

DOMAINS = ("in-domain", "near-domain", "out-domain")


def load_nocaps(root: Path) -> Corpus:
    """The validation set as `test`, and as test_in_domain, test_near_domain and test_out_domain where the file says so;
    `server_test`, whose captions are hidden. Nothing to train on. HERE[data-8]: each domain is a corpus of its own."""
    splits: dict[str, list[Item]] = {"test": []}
    notes = ["nocaps: its validation set, whose captions are public, serves as test; each domain is scored as a corpus "
             "of its own, document frequencies included, which the official server may do otherwise."]  # fmt: skip
    files = {kind: sorted(file for place in (root, root / "annotations") for file in place.glob(f"nocaps_{kind}*.json"))
             for kind in ("val", "test")}  # fmt: skip
    with_captions = [file for file in files["val"] if "caption" in file.name]
    if not with_captions:
        raise UserError(f"nocaps: no nocaps_val_4500_captions.json in {root} or its annotations/; put it there")
    for kind, file in (("val", with_captions[0]), *(("test", file) for file in files["test"][:1])):
        found = list(_read_coco_form(file, has_captions=kind == "val"))
        rows = [Row(kind, record["id"], kind, record["file_name"], tuple(texts)) for record, texts in found]
        _distinct((row.image_id for row in rows), f"{file}: image")
        if kind == "val" and (bare := next((row for row in rows if not row.captions), None)):
            raise UserError(f"{file}: image {bare.image_id} has no caption")
        images = Folders("nocaps", root, notes).resolve(rows, optional=kind == "test")
        for (record, _), row, image in zip(found if images else [], rows, images, strict=bool(images)):
            item = Item(row.image_id, image, row.captions)
            splits.setdefault("test" if kind == "val" else "server_test", []).append(item)
            if kind == "val" and "domain" in record:
                if record["domain"] not in DOMAINS:
                    raise UserError(f"{file}: domain of image {row.image_id} must be one of {', '.join(DOMAINS)}")
                splits.setdefault(f"test_{record['domain']}".replace("-", "_"), []).append(item)
    return Corpus("nocaps", splits, notes)


# ---------------------------------------------------------------------------------------------------------------------
# VQA v2

# Times as the most frequent of the ten, for an answer to be a class: 3,129 of them on train + val
# (hengyuan-hu/bottom-up-attention-vqa:tools/compute_softscore.py; dandelin/ViLT:vilt/utils/write_vqa.py).
SEEN_AT_LEAST = 9
MINI_VAL = 3_000  # TDEN's (YehLi/xmodaler:xmodaler/datasets/images/vqa.py)


def answer_vocabulary(examples: Sequence[Example], answers: Sequence[str] | None = None) -> tuple[str, ...]:
    """Normalised answers that are given SEEN_AT_LEAST times, in the order of their first appearance.

    answers: for each example the one that counts, default its most frequent one (VQA's `multiple_choice_answer`).
    """
    if answers is None:
        answers = [Counter(example.answers).most_common(1)[0][0] for example in examples]
    counts = Counter(map(language.normalise_answer, answers))
    found = tuple(answer for answer, count in counts.items() if count >= SEEN_AT_LEAST)
    if not found:
        raise UserError(f"no answer is given {SEEN_AT_LEAST} times in {len(answers)} questions: there are no classes")
    return found


def load_vqa(root: Path, train_on: str = "train") -> Corpus:
    """train, val, and server_test and server_test_dev, whose answers are hidden. Corpus.answers: by the rule above,
    from train2014 and val2014 whatever is trained on, so that one head fits all.

    HERE[data-2]: questions without an answer that is a class stay in train, with targets of zero.
    train_on: "train": val is val2014. "train+val": val is TDEN's mini-val, the last 3,000 of val2014 by question id,
    and the rest of val2014 is in train. "train+val+vg": Visual Genome's questions besides (vg/ beside or below the
    root).
    """
    choose("train-on", train_on, TRAIN_ON)
    notes, parts, frequent, held_out = [], {}, [], set()
    for name in ("train2014", "val2014", "test2015", "test-dev2015"):
        questions, hidden = root / f"v2_OpenEnded_mscoco_{name}_questions.json", name.startswith("test")
        if questions.is_file() or not hidden:
            annotations = None if hidden else root / f"v2_mscoco_{name}_annotations.json"
            found, most = _read_vqa(questions, annotations, "test2015" if hidden else name)
            parts[name] = _with_pictures("vqa", root, notes, questions, found, optional=hidden)
            frequent += most
            held_out |= {example.image_ids[0] for example in found} if hidden else set()
    train, val = parts["train2014"], parts["val2014"]
    vocabulary = answer_vocabulary(train + val, frequent)
    if train_on != "train":
        val.sort(key=lambda example: example.example_id)
        train, val = train + val[:-MINI_VAL], val[-MINI_VAL:]
        notes.append(f"vqa: val is TDEN's mini-val, the last {len(val):,} questions of val2014 by id; "
                     "train has the rest.")  # fmt: skip
    if train_on == "train+val+vg":
        held_out |= {example.image_ids[0] for example in val}
        from pretraining import vqa_questions

        train += vqa_questions(root, vocabulary, held_out, notes)
    hidden = {"server_test": parts.get("test2015", ()), "server_test_dev": parts.get("test-dev2015", ())}
    return Corpus("vqa", {"train": train, "val": val, **hidden}, notes, answers=vocabulary)


def _read_vqa(questions: Path, annotations: Path | None, folder: str) -> tuple[list[Example], list[str]]:
    """Questions with Rows for pictures, and the most frequent answers."""
    asked = []
    for number, record in enumerate(read_json(questions, "questions")[0]):
        where = f"{questions}, questions[{number}]"
        asked.append(fields(record, where, question_id=int, image_id=int, question=str))
        data.caption_text(asked[-1][2], where)
    _distinct((question_id for question_id, *_ in asked), f"{questions}: id")
    told, frequent = {}, []
    for number, record in enumerate(read_json(annotations, "annotations")[0] if annotations else []):
        where = f"{annotations}, annotations[{number}]"
        question_id, image_id, *kinds, most, answers = fields(
            record, where, question_id=int, image_id=int, answer_type=str, question_type=str,
            multiple_choice_answer=str, answers=list)  # fmt: skip
        if len(answers) != 10:
            raise UserError(f"{where}: question {question_id} has {len(answers)} answers, not ten")
        texts = tuple(fields(answer, f"{where}, answers", answer=str)[0] for answer in answers)
        if question_id in told:
            raise UserError(f"{where}: question {question_id} has answers already; every one has an id of its own")
        told[question_id] = image_id, texts, tuple(kinds)
        frequent.append(most)
    found = []
    for question_id, image_id, text in asked:
        about, answers, kinds = told.pop(question_id, (image_id, (), ()))
        if about != image_id or (annotations and not answers):
            what = "has no answers there" if not answers else f"is about image {image_id}, there about {about}"
            raise UserError(f"{questions} and {annotations} do not fit: question {question_id} {what}")
        row = Row("", image_id, folder, f"COCO_{folder}_{image_id:012d}.jpg", ())
        found.append(Example(question_id, (image_id,), (row,), text, answers=answers, kinds=kinds))
    if told:
        raise UserError(f"{annotations}: question {next(iter(told))} is not in {questions}")
    return found, frequent


# ---------------------------------------------------------------------------------------------------------------------
# NLVR2, and NLVR's first version


def load_nlvr2(root: Path) -> Corpus:
    """train, val (dev), test (test1, Test-P) and test_unreleased (test2, Test-U, public since 2022)."""
    names = {"train": "train", "val": "dev", "test": "test1", "test_unreleased": "test2"}
    places = {split: [root / place / f"{name}.json" for place in ("data", ".")] for split, name in names.items()}
    files = {split: next((f for f in found if f.is_file()), None) for split, found in places.items()}
    if not any(files.values()):
        raise UserError(f"nlvr2: none of data/{{{','.join(names.values())}}}.json is below {root}; pass --root")
    notes, splits = [], {}
    for split, file in files.items():
        if not file:
            notes.append(f"nlvr2: no data/{names[split]}.json, so there is no {split} split.")
            continue
        found = []
        for where, record in _json_lines(file):
            identifier, sentence, label = fields(record, where, identifier=str, sentence=str, label=str)
            parts = identifier.split("-")
            if len(parts) != 4:
                raise UserError(f"{where}: identifier {identifier!r} is not split-set-pair-sentence")
            folder = f"{fields(record, where, directory=int)[0]}/" if split == "train" else ""
            ids = tuple(f"{'-'.join(parts[:3])}-img{side}" for side in (0, 1))
            rows = tuple(Row(split, i, names[split], f"{folder}{i}.png", ()) for i in ids)
            found.append(Example(identifier, ids, rows, data.caption_text(sentence, where), _truth(label, where),
                                 group=f"{parts[0]}-{parts[1]}-{parts[3]}"))  # fmt: skip
        splits[split] = _with_pictures("nlvr2", root, notes, file, found, optional=split == "test_unreleased")
    return Corpus("nlvr2", splits, notes)


def _truth(label: str, where: str) -> int:
    if label.lower() not in ("true", "false"):
        raise UserError(f"{where}: label {label!r} is neither True nor False")
    return int(label.lower() == "true")


def load_nlvr1(root: Path) -> Corpus:
    """Statements about one picture of three boxes. HERE[data-3]: it stands in both places of NLVR2's pair, so that
    model and head are unchanged; training draws one of the orders of its boxes."""
    splits, notes = {}, ["nlvr1: one picture a statement; it stands in both places of the pair."]
    for split in ("train", "val", "test"):
        file, found = root / f"{split}.jsonl", []
        for where, record in _json_lines(file):
            identifier, sentence, label, images = fields(record, where, identifier=str, sentence=str, label=str,
                                                          images=list)  # fmt: skip
            if not images:
                raise UserError(f"{where}: `images` is empty")
            files = [Path(data.below(root, image, where)) for image in images]  # the orders of the boxes
            first, *others = [(Row(split, f.stem, str(f.parent), f.name, ()),) * 2 for f in files]
            found.append(Example(identifier, (files[0].stem,) * 2, first, data.caption_text(sentence, where),
                                 _truth(label, where), group=identifier.rpartition("-")[0], others=tuple(others)))
        splits[split] = _with_pictures("nlvr1", root, notes, file, found)
    return Corpus("nlvr1", splits, notes)


# ---------------------------------------------------------------------------------------------------------------------
# SNLI-VE

# Classes 0, 1, 2 everywhere (salesforce/ALBEF:dataset/ve_dataset.py; zdou0830/METER:meter/utils/write_snli.py).
ENTAILMENT = ("contradiction", "neutral", "entailment")


def load_snli_ve(root: Path) -> Corpus:
    """train, val (dev) and test: pictures of Flickr30k with hypotheses. The premise, a caption, is what the picture
    replaces: it is never read."""
    splits, notes, n_undecided = {}, [], 0
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        file = root / f"snli_ve_{name}.jsonl"
        found = []
        for where, record in _json_lines(file):
            image_id, pair_id, gold, text = fields(record, where, Flickr30K_ID=str, pairID=str, gold_label=str,
                                                    sentence2=str)  # fmt: skip
            if gold == "-":  # the annotators did not agree
                n_undecided += 1
                continue
            if gold not in ENTAILMENT:
                raise UserError(f"{where}: gold_label {gold!r} is not known; it is one of {', '.join(ENTAILMENT)}")
            row = Row(split, image_id, "", f"{image_id}.jpg", ())
            text = data.caption_text(text, where)
            found.append(Example(pair_id, (image_id,), (row,), text, ENTAILMENT.index(gold)))
        splits[split] = _with_pictures("snli_ve", root, notes, file, found)
    if n_undecided:
        notes.append(f"snli_ve: {n_undecided} hypotheses without a gold label are left out.")
    return Corpus("snli_ve", splits, notes)


# ---------------------------------------------------------------------------------------------------------------------
# VCR

# Persons are called by names that say nothing about them. The list is TDEN's (YehLi/TDEN:datasets/vcr_dataset.py);
# HERE[data-9]: object n has name n modulo 13, and several objects of one tag follow one another.
NEUTRAL_NAMES = "Casey Riley Jessie Jackie Avery Jaime Peyton Kerry Jody Kendall Frankie Pat Quinn".split()


def tagged_text(tokens: list, objects: Sequence[str], where: str = "") -> Tagged:
    """VCR's tokens, each a word or a list of object numbers, as words with tags: [[0, 2], "talk"] -> Casey car talk.
    HERE[data-7]: "everyone" is a word like any other."""
    words, tags = [], []
    for token in tokens:
        if isinstance(token, str):
            words.append(token), tags.append(-1)
            continue
        for i in token if isinstance(token, list) else [None]:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(objects):
                raise UserError(f"{where}: {str(token)[:60]} names no object; the picture has {len(objects)}")
            words.append(NEUTRAL_NAMES[i % len(NEUTRAL_NAMES)] if objects[i] == "person" else objects[i])
            tags.append(i)
    data.caption_text(" ".join(words), where)
    return Tagged(tuple(words), tuple(tags))


def load_vcr(root: Path) -> Corpus:
    """train, val, and server_test, whose labels are hidden. Boxes are read when a sample is made."""
    splits, notes = {}, []
    for split, name in (("train", "train"), ("val", "val"), ("server_test", "test")):
        file = root / f"{name}.jsonl"
        if name == "test" and not file.is_file():
            continue
        found = []
        for where, record in _json_lines(file):
            annot_id, img_id, img_fn, metadata_fn, objects, *texts = fields(
                record, where, annot_id=str, img_id=str, img_fn=str, metadata_fn=str, objects=list, question=list,
                answer_choices=list, rationale_choices=list)  # fmt: skip
            if not all(isinstance(kind, str) for kind in objects):
                raise UserError(f"{where}: `objects` must be class names, but it is {str(objects)[:60]}")
            metadata = Path(data.below(root, metadata_fn, where))
            question, *fours = tagged_text(texts[0], objects, f"{where}, question"), *texts[1:]
            for kind, four in zip(("answer_choices", "rationale_choices"), fours, strict=True):
                if len(four) != 4 or not all(isinstance(text, list) for text in four):
                    raise UserError(f"{where}: `{kind}` must be four lists of tokens")
            answers, rationales = (tuple(tagged_text(t, objects, where) for t in four) for four in fours)
            labels = (None, None) if name == "test" else fields(record, where, answer_label=int, rationale_label=int)
            if not {*labels} <= {None, 0, 1, 2, 3}:
                raise UserError(f"{where}: answer_label and rationale_label must be 0 to 3, not {labels}")
            row = Row(split, img_id, "vcr1images", data.below(root, img_fn, where), ())
            found.append(Choice(annot_id, (img_id,), (row,), question, answers, rationales, *labels, tuple(objects),
                                metadata))  # fmt: skip
        splits[split] = [  # the metadata lie where the pictures do
            replace(item, metadata=item.images[0].parents[len(item.metadata.parts) - 1] / item.metadata)
            for item in _with_pictures("vcr", root, notes, file, found, optional=name == "test")
        ]
    return Corpus("vcr", splits, notes)
