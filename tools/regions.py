"""Region features of the pictures of any data set, from a torchvision detector, one file a picture.

    python tools/regions.py coco --root data/coco --weights hub                 data/coco/regions/<image_id>.npz
    python tools/regions.py my_photos.jsonl --weights fasterrcnn.pth            regions/ beside my_photos.jsonl
    python tools/regions.py coco --root data/coco --weights hub --share 2/8     the second of eight processes
    python tools/regions.py vqa --root data/vqa --weights hub --mirrored        of the pictures seen in a mirror

    picture ── resized ── backbone ── RPN ──> proposals ── RoIAlign, box head ──> features ──> class distribution
                                                 └────────── NMS within each class, best 10 to 100 ──────┘

As bottom-up attention does it, regions are the proposals, not the boxes that the classes would move them to, because
the features were pooled at the proposals. One command goes on where it was stopped: what is there is skipped, and
extraction.json in the folder says how it was made, so that two ways are never mixed.

Each file has the keys of YehLi/xmodaler: features [n, D], cls_prob [n, C] (softmax, column 0 = background), boxes
[n, 4] (x1, y1, x2, y2 in pixels of the upright picture), all float32; image_h [1], image_w [1], num_boxes [1];
image_id. D is 1024 with each of torchvision's three detectors, C whatever the file of weights was trained for. That
does to train a model, but official weights, of TDEN for instance, want bottom-up attention's D = 2048 and C = 1601.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402

import common  # noqa: E402
import corpora  # noqa: E402
import data  # noqa: E402
import regions  # noqa: E402  (the file above: the root comes first in sys.path)
from common import UserError  # noqa: E402

DETECTORS = ("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn")
CLASS_HEAD = "roi_heads.box_predictor.cls_score.weight"
NMS_IOU = 0.3  # generate_tsv.py's. HERE[data-6]: --threshold 0.2, 10 to 100 regions; its own defaults are 0.4 and 36

# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def samples_of(corpus):
    """(image_id, file, sample) of every picture of every sample, of Items and of questions alike."""
    for items in corpus.splits.values():
        for item in items:
            for image_id, image in zip(data.ids_of(item), data.files_of(item), strict=True):
                if not isinstance(image, (str, os.PathLike)):
                    raise UserError(f"{corpus.name} is drawn, not photographed; scenes.regions gives its regions")
                yield image_id, Path(image), item


def pictures_of(corpus) -> dict:
    """image_id -> file, each picture once. UserError where one id stands for two files."""
    pictures: dict = {}
    for image_id, file, _ in samples_of(corpus):
        if pictures.setdefault(image_id, file) != file:
            raise UserError(f"{corpus.name}: image {image_id} is {pictures[image_id]} and {file}; rename one of them")
    return pictures


class Photos(Dataset):
    """(index, uint8 [3, H, W]) of a picture, or (index, why it cannot be used)."""

    def __init__(self, files: list[Path], longest: int, mirrored: bool = False):
        self.files, self.longest, self.mirrored = files, longest, mirrored  # longest: the longer side, once resized

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        try:
            image = data.load_image(self.files[index], 0)
        except data.BadImage as bad:
            return index, str(bad)
        if self.mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if min(image.size) * self.longest < max(image.size):
            return index, f"{self.files[index]}: {image.size[0]}x{image.size[1]} pixels, too long and thin to resize"
        return index, torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batches(samples, key, size: int):
    """Lists of up to `size` samples of one key, all samples once. Not more than 8 * size wait for others of theirs."""
    waiting: dict = defaultdict(list)
    for sample in samples:
        group = waiting[key(sample)]
        group.append(sample)
        full = len(group) == size or sum(map(len, waiting.values())) == 8 * size
        if full:
            yield waiting.pop(max(waiting, key=lambda k: len(waiting[k])))
    yield from waiting.values()


# ---------------------------------------------------------------------------------------------------------------------
# Detector


def find_weights(detector: str, given: str) -> tuple[Path, str]:
    """--weights -> (the file, its sha256); `hub` is downloaded once to where torchvision keeps its files."""
    from torchvision.models import get_model_weights

    url = get_model_weights(detector).DEFAULT.url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name) if given == "hub" else Path(given)
    if given == "hub" and not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fingerprint = re.search(r"-([0-9a-f]{8,})\.pth$", name)[1]
            torch.hub.download_url_to_file(url, str(path), fingerprint, progress=sys.stderr.isatty())
        except Exception as error:  # of the network, of the disk, or a file of another fingerprint
            raise UserError(f"{url} could not be downloaded ({type(error).__name__}: {error})\nFetch it where there is "
                            f"a network, bring it here and pass --weights {name}") from None  # fmt: skip
    if not path.is_file():
        raise UserError(f"--weights {given}: no such file; fetch {url} and pass its path, or pass --weights hub")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def load_detector(name: str, path: Path, sha256: str, size: int):
    """The network with as many classes as the class head in the file has. `size`: shorter side of its pictures."""
    from torchvision.models import get_model, get_model_weights

    wanted = f"pass the state dict of a {name} as .pth or .safetensors, or --weights hub"
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # flags, from torchvision's training script
            state = common.read_tensors(path)
    except UserError as error:
        raise UserError(f"{str(error).splitlines()[0][:200]}\n{wanted}") from None
    state = state.get("model", state) if isinstance(state, dict) else {}
    if not isinstance(state, dict) or not isinstance(state.get(CLASS_HEAD), torch.Tensor):
        raise UserError(f"{path} holds no detector of torchvision's, {CLASS_HEAD} is not in it: {wanted}")
    # 1333 / 800 is torchvision's proportion; 0.0, so that --min can be met: MobileNet would throw proposals away
    model = get_model(name, weights=None, weights_backbone=None, num_classes=len(state[CLASS_HEAD]),
                      min_size=size, max_size=round(size * 1333 / 800), rpn_score_thresh=0.0)  # fmt: skip
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        told = "\n".join(line.strip()[:200] for line in str(error).splitlines()[1:3])
        raise UserError(f"{path} is not a {name}; --detector is one of {', '.join(DETECTORS)}\n{told}") from None
    official = re.search(r"-([0-9a-f]{8,})\.pth$", get_model_weights(name).DEFAULT.url)[1]
    if name == "fasterrcnn_resnet50_fpn" and sha256.startswith(official):
        for module in model.modules():  # this one file was trained without epsilon; torchvision sets its own to 0
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1e-30  # 0 is refused by some releases
    model.eval()
    # RoIAlign infers the strides from the first picture that it sees, and keeps them: a picture of few rows, which is
    # mostly padding, would spoil all that follow. A square one gives the true strides.
    with torch.inference_mode():
        model.roi_heads.box_roi_pool(model.backbone(torch.zeros(1, 3, 256, 256)), [torch.ones(1, 4)], [(256, 256)])
    return model


def resized(model, pixels: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 [3, H, W] -> float [3, h, w] as the detector takes it."""
    return model.transform.resize(model.transform.normalize(pixels.to(device).float() / 255))[0]


def padded_shape(model, image: torch.Tensor) -> tuple[int, ...]:
    """What [3, h, w] becomes in a batch of its own. Only pictures of one such shape may share a batch: more padding
    would change the features near the border, so that they would depend on the neighbours."""
    step = model.transform.size_divisible
    return tuple(-(-side // step) * step for side in image.shape[1:])


@torch.inference_mode()
def look(model, images: list[torch.Tensor], shapes: list[tuple[int, int]], given: list | None = None) -> list[tuple]:
    """Resized pictures, (height, width) of the originals -> of each: boxes in original pixels [n, 4], features [n, D],
    class distribution [n, C]. The boxes are the proposals, best first, or those `given` in original pixels."""
    from torchvision.models.detection.image_list import ImageList
    from torchvision.ops import clip_boxes_to_image

    sizes = [tuple(image.shape[1:]) for image in images]
    scales = [images[0].new_tensor([W / w, H / h] * 2) for (h, w), (H, W) in zip(sizes, shapes, strict=True)]
    batch = ImageList(model.transform.batch_images(images), sizes)
    maps = model.backbone(batch.tensors)
    if given is None:
        proposals = [p if len(p) else p.new_tensor([[0, 0, w, h]])  # none at all: the whole picture
                     for p, (h, w) in zip(model.rpn(batch, maps)[0], sizes, strict=True)]  # fmt: skip
    else:
        rows = [torch.as_tensor(boxes, device=batch.tensors.device) for boxes in given]
        proposals = [clip_boxes_to_image(r / s, size) for r, s, size in zip(rows, scales, sizes, strict=True)]
    heads = model.roi_heads
    features = heads.box_head(heads.box_roi_pool(maps, proposals, sizes))  # [n of all pictures, D]
    distribution = heads.box_predictor(features)[0].softmax(-1)
    boxes = [clip_boxes_to_image(p * s, shape) for p, s, shape in zip(proposals, scales, shapes, strict=True)]
    counts = [len(p) for p in proposals]
    return list(zip(boxes, features.split(counts), distribution.split(counts), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Choice


def confidence_of(boxes: torch.Tensor, scores: torch.Tensor, floor: float) -> torch.Tensor:
    """[n]: each region's best score of a class that survives NMS in this class; 0 where it is below `floor`.

    What is above `floor` is exact, because only higher scores can suppress a score.
    """
    from torchvision.ops import batched_nms

    rows, classes = (scores[:, 1:] >= floor).nonzero(as_tuple=True)  # column 0 is the background
    found = scores[:, 1:][rows, classes]
    # double: batched_nms moves each class by an offset, 2 million pixels for the last of 1,600 classes
    kept = batched_nms(boxes[rows].double(), found.double(), classes, NMS_IOU)
    return torch.zeros_like(scores[:, 0]).scatter_reduce(0, rows[kept], found[kept], "amax")


def choose_regions(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, least: int, most: int) -> torch.Tensor:
    """Indices of the regions that bottom-up attention keeps, most confident first: those that reach `threshold`, but
    at least `least` and at most `most`. boxes [n, 4], scores [n, C]; equal ones stay in their order."""
    for floor in (threshold, threshold / 10, threshold / 100, 0.0):  # 1,600 classes of 1,000 boxes would take seconds
        confidence = confidence_of(boxes, scores, floor)
        if (confidence > 0).sum() >= min(least, len(boxes)):
            break
    n = min(max(int((confidence >= threshold).sum()), least), most)
    return confidence.argsort(descending=True, stable=True)[:n]


# ---------------------------------------------------------------------------------------------------------------------
# Folder


def write_whole(path: Path, mark: str, write) -> None:
    """write(file) under another name, of this share alone, then the true one."""
    temporary = path.with_name(f"{path.name}.{mark}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def list_done(out: Path, mark: str) -> set[str]:
    """Names of the region files, with sub-folder, without ending. What a killed run of this share began is removed."""
    done, begun = set(), re.compile(rf"\.{r'[0-9]+of[0-9]+' if mark == '1of1' else mark}\.tmp$")
    for folder, _, names in os.walk(out):
        for name in names:
            if name.endswith(".npz"):
                done.add(os.path.relpath(os.path.join(folder, name[:-4]), out))
            elif begun.search(name):
                Path(folder, name).unlink(missing_ok=True)
    return done


def settle(out: Path, settings: dict, names: set[str], overwrite: bool, mark: str) -> set[str]:
    """Which of `names` are done. UserError where `out` holds what other settings made; with `overwrite` it is removed.
    Leaves extraction.json."""
    done, file = list_done(out, mark), out / "extraction.json"
    try:
        before = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        before = {}
    # the same bytes under another name are the same weights
    odd = [k for k in {**settings, **before} if settings.get(k) != before.get(k) and k != "weights"]
    if odd and (done or before):
        told = "; ".join(f"{k} {before.get(k)} there, {settings.get(k)} now" for k in odd) if before else "unknown ones"
        told = f"{out} holds regions of other settings ({told})"
        if not overwrite:
            raise UserError(f"{told}: give --out another folder, or --overwrite")
        if done - names:
            raise UserError(f"{told}, and of pictures that are not in this data set or share: remove it, or give --out")
    if overwrite and (old := done & names):
        for name in old:  # now, not one by one, so that a stopped run goes on without --overwrite
            (out / f"{name}.npz").unlink()
        print(f"removed {len(old):,} files in {out}")
        done -= old
    write_whole(file, mark, lambda opened: opened.write((json.dumps(settings, indent=1) + "\n").encode()))
    return done & names


class Progress:
    """A bar on a terminal; in a pipe a line every ten seconds and one at the end."""

    def __init__(self, total: int):
        self.n, self.total, self.start, self.told, self.bar = 0, total, time.monotonic(), time.monotonic(), None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=" pictures", dynamic_ncols=True)

    def add(self, n: int) -> None:
        self.n += n
        now = time.monotonic()
        if self.bar:
            self.bar.update(n)
        elif now - self.told >= 10 or self.n == self.total:
            rate = self.n / max(1e-9, now - self.start)
            eta = timedelta(seconds=round((self.total - self.n) / rate))
            print(f"{self.n:,}/{self.total:,}  {rate:.2f} pictures/s  eta {eta}", flush=True)
            self.told = now

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr) if self.bar else print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class Flags:
    root: str = ""  # folder of a named data set; default data/NAME
    train_on: str = "train"  # of vqa: train | train+val | train+val+vg, Visual Genome's pictures too
    out: str = ""  # folder to write to; default regions/ in the root, or beside own data
    weights: str = ""  # the detector's state dict, .pth or .safetensors, of any number of classes; or hub: COCO's
    detector: str = DETECTORS[0]  # or fasterrcnn_resnet50_fpn, or fasterrcnn_mobilenet_v3_large_fpn
    size: int = 800  # shorter side of the resized pictures; 800 is torchvision's
    threshold: float = 0.2  # confidence that a region must reach
    min: int = 10  # regions a picture at least, whatever their confidence
    max: int = 100  # regions a picture at most
    ground_truth: bool = False  # at the boxes that the data gives (VCR), into regions_boxes/, instead of proposals
    mirrored: bool = False  # of the pictures seen in a mirror, into regions_mirrored/, for training
    share: str = "1/1"  # 2/8: every eighth picture from the second on, as one of eight processes
    overwrite: bool = False  # remove what is there, and begin again
    device: str = "auto"  # auto | cpu | cuda | mps
    batch: int = 0  # pictures at once; 0: 8 on a GPU, 1 without
    workers: int = 4  # processes that read pictures; 0: none


def parse(argv: list[str]) -> tuple[str, Flags, tuple[int, int]]:
    """-> data set, flags, (part, parts) of --share."""
    if not argv or (argv[0].startswith("-") and not {"-h", "--help"} & set(argv)):
        raise UserError("give the data set first, by name or path: regions.py coco --root data/coco --weights hub")
    given, _ = common.parse_flags(Flags, argv if argv[0].startswith("-") else argv[1:], "regions.py DATA")
    flags = Flags(**given)
    common.choose("detector", flags.detector, DETECTORS)
    if not flags.weights:
        raise UserError("--weights is missing: give a file, or hub for torchvision's, which know COCO's objects")
    if not (0 <= flags.threshold <= 1 <= flags.min <= flags.max):
        raise UserError("--threshold is from 0 to 1, --min from 1 to --max")
    if flags.size < 1 or flags.batch < 0 or flags.workers < 0:
        raise UserError("--size is 1 or more, --batch and --workers are 0 or more")
    part, _, parts = flags.share.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--share {flags.share}: the second of eight is 2/8")
    return argv[0], flags, (int(part), int(parts))


def default_folder(name: str, flags: Flags) -> Path:
    folder = "regions" + "_boxes" * flags.ground_truth + "_mirrored" * flags.mirrored
    return corpora.folder_of(name, flags.root) / folder


def extract(model, device: str, flags: Flags, files: list[Path], given: list | None, save, progress, bad: list) -> None:
    """The regions of each file to save(index, shape, boxes, features, distribution), the unreadable ones to `bad`."""
    photos = Photos(files, model.transform.max_size, flags.mirrored)
    loader = DataLoader(photos, batch_size=None, num_workers=flags.workers,
                        persistent_workers=flags.workers > 0, worker_init_fn=data._start_worker)  # fmt: skip

    def readable():
        for index, pixels in loader:
            if isinstance(pixels, str):
                bad.append(pixels)
                if len(bad) <= 3:
                    progress.say(f"cannot be read: {pixels}")
                progress.add(1)
                continue
            try:
                boxes = given and regions.object_boxes(given[index], (pixels.shape[2], pixels.shape[1]))
                boxes = regions.mirrored_boxes(boxes, pixels.shape[2]) if given and flags.mirrored else boxes
            except data.BadImage as wrong:
                bad.append(str(wrong))
                progress.say(f"cannot be used: {wrong}")
                progress.add(1)
                continue
            yield index, tuple(pixels.shape[1:]), resized(model, pixels, device), boxes

    size = flags.batch or (8 if device.startswith("cuda") else 1)
    try:
        for batch in batches(readable(), lambda sample: padded_shape(model, sample[2]), size):
            indices, shapes, images, boxes = map(list, zip(*batch, strict=True))
            found = look(model, images, shapes, given and boxes)
            for index, shape, (boxes, features, distribution) in zip(indices, shapes, found, strict=True):
                boxes, distribution = boxes.cpu(), distribution.cpu()
                if given is None:
                    kept = choose_regions(boxes, distribution, flags.threshold, flags.min, flags.max)
                    boxes, features, distribution = boxes[kept], features[kept.to(features.device)], distribution[kept]
                save(index, shape, boxes.numpy(), features.cpu().numpy(), distribution.numpy())
                progress.add(1)
    except torch.OutOfMemoryError:
        raise UserError("the GPU has too little memory for this: give a smaller --batch or --size") from None
    finally:
        data._end_workers(loader)
        progress.close()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    name, flags, (part, parts) = parse(argv)
    device, why = common.choose_device(flags.device)
    corpus = corpora.load(name, flags.root or None, train_on=flags.train_on)
    pictures = pictures_of(corpus)
    given = {i: item for i, _, item in samples_of(corpus)} if flags.ground_truth else None
    if given and not all(isinstance(item, data.Choice) for item in given.values()):
        raise UserError(f"{corpus.name} gives no boxes: --ground-truth is for data like VCR; leave it out")
    path, sha256 = find_weights(flags.detector, flags.weights)
    model = load_detector(flags.detector, path, sha256, flags.size)
    classes, width = model.roi_heads.box_predictor.cls_score.weight.shape

    import torchvision

    chosen = {} if given else {"threshold": flags.threshold, "min": flags.min, "max": flags.max}
    chosen |= {"mirrored": True} if flags.mirrored else {}
    settings = {"detector": flags.detector, "weights": path.name, "sha256": sha256[:16], "classes": classes,
                "size": flags.size, "boxes": "given" if given else "proposals", **chosen,
                "torchvision": torchvision.__version__.partition("+")[0]}  # fmt: skip
    out, mark = Path(flags.out) if flags.out else default_folder(name, flags), f"{part}of{parts}"
    ids = list(pictures)[part - 1 :: parts]
    name_of = {i: data.below(out, str(i), f"{corpus.name}, image {i}") for i in ids}
    done = settle(out, settings, set(name_of.values()), flags.overwrite, mark)
    todo = [i for i in ids if name_of[i] not in done]
    print(f"{flags.detector}, {path.name}, {classes} classes, on {device} ({why}) -> {out}\n{corpus.name}, share "
          f"{part}/{parts}: {len(done):,} of {len(ids):,} pictures there already", flush=True)  # fmt: skip
    counts: list[int] = []
    bad: list[str] = []

    def save(index, shape, boxes, features, distribution):
        arrays = {"features": features, "cls_prob": distribution, "boxes": boxes, "num_boxes": np.array([len(boxes)]),
                  "image_h": np.array(shape[:1]), "image_w": np.array(shape[1:]),
                  "image_id": np.array(todo[index])}  # fmt: skip
        write_whole(out / f"{name_of[todo[index]]}.npz", mark, lambda opened: np.savez(opened, **arrays))
        counts.append(len(boxes))

    listed = out / ("unreadable.txt" if parts == 1 else f"unreadable.{mark}.txt")
    try:
        extract(model.to(device), device, flags, [pictures[i] for i in todo], given and [given[i] for i in todo],
                save, Progress(len(todo)), bad)  # fmt: skip
    except KeyboardInterrupt as stop:
        again = shlex.join(["python", sys.argv[0], *(word for word in argv if word != "--overwrite")])
        told = f"stopped: {len(done) + len(counts):,} of {len(ids):,} pictures are there; go on with\n  {again}"
        raise common.Stopped(told, *(stop.args or (signal.SIGINT,))) from None
    finally:
        listed.unlink(missing_ok=True)
        if bad:
            write_whole(listed, mark, lambda opened: opened.write(("\n".join(bad) + "\n").encode()))

    size = sum(Path(folder, file).stat().st_size for folder, _, files in os.walk(out) for file in files)
    print(f"{len(done) + len(counts):,} of {len(ids):,} pictures are there; {width} features and {classes} classes a "
          f"region; {out} holds {size / 1e6:,.1f} MB")  # fmt: skip
    if counts:
        print(f"regions a picture: min {min(counts)}, mean {np.mean(counts):.1f}, max {max(counts)} "
              f"(of the {len(counts):,} written now)")  # fmt: skip
    if bad:
        print(f"{len(bad):,} pictures cannot be read, see {listed}: mend or remove them, then run this again",
              file=sys.stderr)  # fmt: skip
        sys.exit(1)


if __name__ == "__main__":
    common.run_main(main)
