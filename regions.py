"""What a detector says of a picture: where its regions come from, their files, and those of the mirrored picture.

    a detector's files   regions/7.npz  or  regions/*.tsv    ┐
    crops on a grid      any picture, no detector            ├──> source(image_id, picture) ──> data.Regions ──> batches
    the small world      what a detector would say of it     ┘

    region_source("files", "coco", "data/coco")      below the folder of a data set, by the names that corpora.py gives
    region_source("grid", "my_photos.jsonl")         python tools/regions.py writes the files of pictures without them

A source is called with (image id, picture, mirrored=False) and gives `data.Regions` or raises BadImage.
`of_objects(choice, mirrored=False)` gives those of VCR's objects, `mirrors` says whether it has regions of pictures
seen in a mirror, and `note` is what a run says of it before it starts. A detector does not see in a mirror what it saw
before, so mirrored regions are files of their own; of crops and scenes they are made.

Reading map: sources | files (.npz, .tsv) | crops on a grid | the small world | what training and users ask.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import scenes
from common import UserError, choose
from corpora import NAMES, folder_of, parts_of
from data import BadImage, Choice, Regions

# ---------------------------------------------------------------------------------------------------------------------
# Sources


def region_source(kind: str, name: str, root: str | Path | None = None, most: int | None = None,
                  parts: Sequence[str] = ()):
    """Of a data set: "files", those in regions/ below its folder; "grid", crops; of scenes their own. `most`: how many
    of each picture are taken from a file; `parts`: what a mixture calls those of `name`. UserError where there are no
    files, with the ways on."""
    choose("regions", kind, ["files", "grid"])
    if kind == "grid" or name == "scenes":
        return GridRegions() if kind == "grid" else SceneRegions()
    if len(parts) > 1:  # then `root` is the folder above theirs
        folders = [Path(root or "data") / one if one in NAMES else folder_of(one) for one, _ in parts_of(name)]
        return MixedRegions(dict(zip(parts, [source_in(folder / "regions", most) for folder in folders], strict=True)))
    folder = folder_of(name, root) / "regions"
    if name == "vqa" and not folder.is_dir() and (coco := folder_of(name, root) / "../coco/regions").is_dir():
        folder = coco  # the same pictures under the same ids
    return source_in(folder, most)


def source_in(folder: Path, most: int | None = None):
    """The .tsv files of a folder, parts like x.tsv.0 among them, or else its .npz files."""
    tables = sorted(file for file in folder.glob("*.tsv*") if re.search(r"\.tsv(\.\d+)?$", file.name))
    return TsvRegions(tables, most) if tables else NpzRegions(folder, most)


def region_names(image_id: int | str, image) -> list[str]:
    """How files may call a picture's regions. An id that is text, like vg-9, could be mistaken for another's name."""
    if not isinstance(image, str | os.PathLike):
        return [str(image_id)]
    path = Path(image)
    return [str(image_id), str(Path(path.parent.name, path.stem)), *([path.stem] if isinstance(image_id, int) else [])]


def mirrored_boxes(boxes: np.ndarray, width: float) -> np.ndarray:
    """[n, 4] in a picture of this width -> in the picture seen in a mirror: x1, x2 become width - x2, width - x1."""
    return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1).astype(boxes.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Files


class NpzRegions:
    """One .npz a picture, see region_names (YehLi/xmodaler:tools/generate_npz.py).

    Keys: features [n, D], boxes [n, 4], image_h, image_w, num_boxes and, for the class probabilities, cls_prob [n, C].
    Objects lie in a second folder of the same name and "_boxes"; what a detector saw in the mirrored pictures in a
    third and a fourth, "_mirrored" and "_boxes_mirrored". `most`: only the first regions of each file.
    """

    note = ""

    def __init__(self, folder: Path | str, most: int | None = None, n_classes: int | None = None):
        self.folder, self.most, self.n_classes = Path(folder), most, n_classes
        if not self.folder.is_dir():
            raise UserError(f"no region files: {self.folder} is not there. Two ways on: `python tools/regions.py` "
                            "extracts them, and --regions grid does without a detector")  # fmt: skip
        self.mirrors = self._beside("", mirrored=True).is_dir()  # looked for once, so that a run stays as it began

    def __call__(self, image_id: int | str, image, mirrored: bool = False) -> Regions:
        return self._read(self._beside("", mirrored), image_id, image)

    def of_objects(self, item: Choice, mirrored: bool = False) -> Regions:
        return self._read(self._beside("_boxes", mirrored), item.image_ids[0], item.images[0])

    def _beside(self, ending: str, mirrored: bool) -> Path:
        return self.folder.with_name(self.folder.name + ending + "_mirrored" * mirrored)

    def _read(self, folder: Path, image_id, image) -> Regions:
        names = [data.below(folder, f"{name}.npz", f"image {image_id}") for name in region_names(image_id, image)]
        files = [folder / name for name in names]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            tool = "`python tools/regions.py" + " --mirrored" * folder.name.endswith("_mirrored") + "`"
            raise BadImage(files[0], f"no such region file; {tool} writes those that are missing")
        found = read_npz(file, self.n_classes)
        return found.first(self.most) if self.most else found


NPZ_KEYS = ("features", "boxes", "image_h", "image_w", "num_boxes", "cls_prob")


def read_npz(file: Path, n_classes: int | None = None) -> Regions:
    """A checked .npz of regions. n_classes: how many class probabilities a region must have, where it has any."""
    try:
        with np.load(file) as content:  # no pickles: that is its default
            arrays = {name: np.asarray(content[name]) for name in NPZ_KEYS if name in content.files}
    except Exception as error:  # a damaged archive raises nearly everything
        raise BadImage(file, f"cannot be read ({type(error).__name__}: {error}); extract this picture again") from None
    missing = [name for name in ("features", "boxes", "image_h", "image_w") if name not in arrays]
    if missing:
        raise BadImage(file, f"no `{'`, `'.join(missing)}` in it; a file of features alone is not enough")
    try:
        width, height = (float(arrays[name].reshape(-1)[0]) for name in ("image_w", "image_h"))
        features, boxes = (arrays[name].astype(np.float32) for name in ("features", "boxes"))
        classes = arrays["cls_prob"].astype(np.float32) if "cls_prob" in arrays else None
        said = int(arrays["num_boxes"].reshape(-1)[0]) if "num_boxes" in arrays else len(boxes)
    except (ValueError, IndexError, TypeError, OverflowError) as error:
        raise BadImage(file, f"not of the documented form ({error})") from None
    if said != len(boxes):
        raise BadImage(file, f"`num_boxes` is {said}, but there are {len(boxes)} boxes; extract this picture again")
    return Regions(features, boxes, (width, height), classes).checked(file, n_classes)


class TsvRegions:
    """The .tsv files of peteanderson80/bottom-up-attention, by an index of their lines, made anew at every start.

    They have no class probabilities, and nothing of mirrored pictures. Columns: image_id, image_w, image_h, num_boxes,
    boxes, features, the last two float32 in base64.
    """

    note = "these .tsv files hold no class probabilities: a loss that needs them is off"
    mirrors = False

    def __init__(self, files: Sequence[Path | str], most: int | None = None):
        self.files, self.most, self.places = [Path(file) for file in files], most, {}
        for file in self.files:
            with open(file, "rb") as lines:
                start = 0
                for line in lines:
                    self.places[line.split(b"\t", 1)[0].decode("utf-8", "replace")] = file, start
                    start += len(line)

    def __call__(self, image_id: int | str, image, mirrored: bool = False) -> Regions:
        if mirrored:
            raise UserError("regions of mirrored pictures do not come as .tsv; write .npz files with tools/regions.py")
        key = next((key for key in region_names(image_id, image) if key in self.places), None)
        if key is None:
            raise BadImage(f"{self.files[0]}, image {image_id}", "not in this file; download all parts of the set")
        file, start = self.places[key]
        with open(file, "rb") as lines:
            lines.seek(start)
            cells = lines.readline().rstrip(b"\r\n").split(b"\t")
        where = f"{file}, image {image_id}"
        try:
            width, height, n = map(int, cells[1:4])
            boxes, features = (np.frombuffer(base64.b64decode(cell), dtype="<f4") for cell in cells[4:])
            boxes, features = boxes.reshape(n, 4), features.reshape(n, len(features) // max(1, n))
        except (ValueError, OverflowError) as error:
            raise BadImage(where, f"not of the form image_id, w, h, num_boxes, boxes, features ({error})") from None
        found = Regions(features.copy(), boxes.copy(), (width, height)).checked(where)
        return found.first(self.most) if self.most else found

    def of_objects(self, item: Choice, mirrored: bool = False) -> Regions:
        raise UserError("regions of VCR's objects do not come as .tsv; write .npz files with tools/regions.py")


# ---------------------------------------------------------------------------------------------------------------------
# Crops on a grid


class GridRegions:
    """A grid of crops in place of a detector (HERE[data-5]): any picture has regions, but none has a class.

    Each crop is resized to 16 x 16 and flattened: features [rows * rows, 768] in 0..1, like those of scenes.
    """

    note = "regions are a grid of crops, not a detector's: without class probabilities, a loss that needs them is off"
    mirrors = True
    CROP = (16, 16)

    def __init__(self, rows: int = 4):
        self.rows = rows

    def __call__(self, image_id: int | str, image, mirrored: bool = False) -> Regions:
        picture = data.load_image(image, 256)
        cells = [(x, y, x + 1, y + 1) for y in range(self.rows) for x in range(self.rows)]
        return self._crops(picture, np.array(cells, dtype=np.float32) / self.rows * [*picture.size, *picture.size],
                           mirrored)  # fmt: skip

    def of_objects(self, item: Choice, mirrored: bool = False) -> Regions:
        """Crops of the objects of a Choice, in their order."""
        picture = data.load_image(item.images[0], 256)
        boxes = object_boxes(item, picture.size)
        return self._crops(picture, mirrored_boxes(boxes, picture.width) if mirrored else boxes, mirrored)

    def _crops(self, picture: Image.Image, boxes: np.ndarray, mirrored: bool) -> Regions:
        """At boxes of the picture, or of the mirrored one."""
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
        crops = [picture.resize(self.CROP, Image.Resampling.BILINEAR, box=tuple(map(float, box))) for box in boxes]
        features = np.stack([np.asarray(crop, dtype=np.float32).reshape(-1) / 255 for crop in crops])
        return Regions(features, boxes.astype(np.float32), picture.size)


def object_boxes(item: Choice, size: tuple[int, int]) -> np.ndarray:
    """float32 [objects, 4] of a Choice, from its metadata file, clipped to the picture of `size`. Raises BadImage."""
    if item.metadata is None:
        return scenes.regions(item.images[0], size[0])["boxes"][: len(item.objects)]
    try:
        rows = json.loads(item.metadata.read_text("utf-8"))["boxes"]
        boxes = np.array([row[:4] for row in rows], dtype=np.float32)  # the fifth is a confidence
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise BadImage(item.metadata, f"no boxes in it ({type(error).__name__}: {error})") from None
    if boxes.shape != (len(item.objects), 4):
        raise BadImage(item.metadata, f"boxes of the shape {list(boxes.shape)} for {len(item.objects)} objects")
    boxes = np.clip(boxes, 0, np.array([*size, *size], dtype=np.float32))  # people who stand half in the picture
    return Regions(boxes, boxes, size).checked(item.metadata).boxes


# ---------------------------------------------------------------------------------------------------------------------
# The small world


@dataclass
class SceneRegions:
    """What a detector would say of scenes drawn at size x size: see scenes.regions. In the mirrored picture it says the
    same of each object, from the mirrored crop."""

    size: int = 64
    note = ""
    mirrors = True

    def __call__(self, image_id: int | str, image, mirrored: bool = False) -> Regions:
        found = scenes.regions(image, self.size)
        features, boxes = found["features"], found["boxes"]
        if mirrored:
            crops = features.reshape(len(boxes), scenes.REGION_CROP, scenes.REGION_CROP, 3)  # rows, columns, colours
            features, boxes = crops[:, :, ::-1].reshape(features.shape), mirrored_boxes(boxes, self.size)
        return Regions(features, boxes, (self.size, self.size), found["cls_prob"])

    def of_objects(self, item: Choice, mirrored: bool = False) -> Regions:
        return self(item.image_ids[0], item.images[0], mirrored).first(len(item.objects))


class MixedRegions:
    """Of a mixture, whose image ids are NAME/ID, the source of each part; an id without a name is of the first
    part, which has val and test."""

    mirrors = False

    def __init__(self, sources: dict):
        self.sources, self.n_classes, self.note = sources, None, max(source.note for source in sources.values())

    def __call__(self, image_id: int | str, image, mirrored: bool = False) -> Regions:
        name, _, rest = str(image_id).partition("/")
        if name not in self.sources:
            name, rest = next(iter(self.sources)), image_id
        source = self.sources[name]
        source.n_classes = self.n_classes
        return source(int(rest) if str(rest).isdecimal() and str(int(rest)) == str(rest) else rest, image)


# ---------------------------------------------------------------------------------------------------------------------
# What training and users ask


def iou(boxes: torch.Tensor) -> torch.Tensor:
    """[R, N, 4] x1, y1, x2, y2 in pixels, both edges inside -> [R, N, N] intersection over union."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (high - low + 1).clamp(min=0).prod(3)
    area = (boxes[..., 2:] - boxes[..., :2] + 1).prod(2)
    return shared / (area[:, :, None] + area[:, None] - shared)


def attach(corpus, cfg) -> None:
    """The corpus gets the source of its regions, corpus.regions; cfg learns how many numbers describe a region and how
    many classes it may have (0: none are known), which the first picture tells that can be read.

    UserError where none of the first 20 can, or where the model of cfg reads regions of other numbers.
    """
    items, bad = next(iter(corpus.splits.values())), ""
    parts = [part.name for part in getattr(items, "parts", ())]  # of a mixture
    source = corpus.regions = region_source(cfg.regions, cfg.data, cfg.root or None, cfg.max_regions, parts)
    corpus.notes += [source.note] if source.note else []
    if cfg.mirror and not source.mirrors:
        corpus.notes.append("there are no mirrored regions, so --mirror does nothing")
    for index in range(min(20, len(items))):
        try:
            found = source(data.ids_of(item := items[index])[0], data.files_of(item)[0])
            break
        except BadImage as error:
            bad = bad or error
    else:
        raise UserError(f"none of the first pictures of {corpus.name} has regions: {bad}")
    numbers = found.features.shape[1]
    if cfg.feature_dim not in (0, numbers):
        raise UserError(f"regions of {numbers} numbers, where the model reads {cfg.feature_dim}: take the regions that "
                        "it was trained on, or train a new one")  # fmt: skip
    classes = 0 if found.classes is None else found.classes.shape[1]
    if cfg.task == "pretrain" and classes and cfg.region_classes not in (0, classes):
        raise UserError(f"regions of {classes} classes, where the model knows {cfg.region_classes}: take regions of "
                        "the same detector, or train a new model")  # fmt: skip
    if cfg.task == "pretrain" and classes and hasattr(source, "n_classes"):
        source.n_classes = classes  # a file of another number is a bad one
    cfg.feature_dim, cfg.region_classes = numbers, cfg.region_classes or classes


def with_global(features, locations, keep_mask, n) -> dict:
    """Regions of B pictures with a global one before them: the sum of their features over n [B], the whole picture's
    box. -> features [B, 1 + N, D], locations [B, 1 + N, 5], region_keep_mask [B, 1 + N]."""
    whole = features.sum(1, keepdim=True) / n.clamp(min=1)[:, None, None]
    box = torch.tensor([0.0, 0, 1, 1, 1], device=features.device).expand(len(features), 1, 5)
    return {"features": torch.cat([whole, features], dim=1), "locations": torch.cat([box, locations], dim=1),
            "region_keep_mask": torch.nn.functional.pad(keep_mask, (1, 0), value=True)}  # fmt: skip


def of_batch(batch: dict, most: int) -> dict:
    """A loader's regions as models with a global region read them: see with_global, and of VCR join_objects."""
    if "objects" in batch:
        return join_objects(batch, most)
    keep_mask = batch["regions_keep_mask"]
    return with_global(batch["regions"], batch["regions_locations"], keep_mask, keep_mask.sum(1))


def join_objects(batch: dict, most: int) -> dict:
    """VCR: detected regions and those of the tagged objects in one list, after a global one. A loader's batch ->
    features [B, N, D], locations [B, N, 5], region_keep_mask [B, N].

    As YehLi/xmodaler does it (datasets/images/vcr.py): objects have priority and come last, at most `most` of them; the
    global region and the first detected ones fill the list up to 1 + most. The global feature is the mean of both
    lists' own, weighted by their rows, of which the global one is one.
    """
    lists = {"features": [], "locations": []}
    for i in range(len(batch["regions"])):
        n, m = int(batch["regions_keep_mask"][i].sum()), int(batch["objects_keep_mask"][i].sum())
        kept = min(m, most)
        for name, end in (("features", ""), ("locations", "_locations")):
            detected, tagged = batch[f"regions{end}"][i, :n], batch[f"objects{end}"][i, :m]
            first = torch.tensor([[0.0, 0, 1, 1, 1]])
            if name == "features":
                parts = [(len(part) + 1, part.mean(0)) for part in (detected, tagged) if len(part)]
                first = (sum(rows * mean for rows, mean in parts) / sum(rows for rows, _ in parts))[None]
            lists[name].append(torch.cat([first, detected[: most - kept], tagged[:kept]]))
    lengths = torch.tensor([len(row) for row in lists["features"]])
    padded = {name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for name, rows in lists.items()}
    return padded | {"region_keep_mask": torch.arange(int(lengths.max())) < lengths[:, None]}


def of_picture(picture, kind: str, name: str, world: str = "tiny", most: int | None = None) -> Regions:
    """What a model trained on `kind` regions of data set `name` would be given of this picture.

    grid: a path, a PIL image, or of scenes SPLIT:NUMBER. files: an .npz file of regions, or a picture with one of its
    name beside it or in regions/ beside it; of scenes SPLIT:NUMBER, which no detector needs to see. Else UserError.
    """
    scene = scene_named(picture, world) if name == "scenes" else None
    try:
        if kind == "grid":
            return GridRegions()(None, scene or (picture if hasattr(picture, "convert") else Path(picture)))
        if scene:
            return SceneRegions()(None, scene)
        if name == "scenes" or hasattr(picture, "convert"):
            what = "SPLIT:NUMBER, like test:0" if name == "scenes" else "an .npz file of regions, or a path with one"
            raise UserError(f"{picture}: this model reads a detector's regions: give {what}; for any picture train "
                            "with --regions grid")  # fmt: skip
        path = Path(picture)
        places = [path.with_suffix(".npz"), path.parent / "regions" / f"{path.stem}.npz"]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise UserError(f"{path}: this model reads a detector's regions, and neither {places[0]} nor {places[1]} "
                            "is there: `python tools/regions.py` writes such files")  # fmt: skip
        found = read_npz(file)
        return found.first(most) if most else found
    except BadImage as bad:
        raise UserError(f"{bad}; give another file, or make this one anew") from bad


def scene_named(picture, world: str):
    """test:3 -> that scene; None for what is no such name."""
    named = re.fullmatch(r"(train|val|test|test_compositional):(\d+)", str(picture))
    return scenes.make_scene(scenes.get_world(world), named[1], int(named[2])) if named else None
