"""Pictures and captions as tar shards for streaming, and a data set's pictures made small once for all epochs.

    python tools/shards.py pack coco shards/coco --short 384          a split as shards/coco/00000.tar, 00001.tar, ...
    python tools/shards.py pack my_photos.jsonl shards/mine           own data; pictures keep their bytes
    python tools/shards.py resize data/coco data/small/coco --short 384        then --root data/small/coco

pack writes the form of img2dataset: of each picture KEY.jpg (or png, webp), KEY.json and KEY.txt in a row, KEY being
five digits of the shard and those of the place in it; a place whose picture cannot be read stays empty. Beside each
tar NNNNN_stats.json counts. The .txt is the first caption; the .json has all of them, the image id, and the size in
pixels as the picture is seen, upright. The order is drawn from --seed over the whole split, since a stream is read as
it lies. The same command on the same files gives the same bytes. The folder has another name until it is whole.

resize mirrors a folder. Pictures are found by content, since many have a wrong extension or none; where the shorter
side is above --short they become JPEG under the same name, upright, else they keep their bytes. Everything else is
copied, shards (.tar) member by member; the width and height in their .json files stay those of before. Regions are
left out. A stopped one goes on where it was. What a loader looks for beside its folder (vqa's pictures in ../coco,
snli_ve's in ../flickr30k) is resized by a command of its own, to the same place beside TO.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image, UnidentifiedImageError  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402
import corpora  # noqa: E402
import data  # noqa: E402
from common import UserError  # noqa: E402
from data import BadImage  # noqa: E402

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # what a shard takes; MPO: JPEG of some phones
PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic"}
OTHERS = {".json", ".jsonl", ".tsv", ".csv", ".txt", ".md", ".html", ".xml", ".yaml", ".py", ".npz", ".npy", ".pkl",
          ".pt", ".pth", ".safetensors", ".h5", ".parquet", ".arrow", ".zip", ".gz", ".tgz"}  # fmt: skip
LONGEST = 65_500  # pixels a side that libjpeg writes
MARK = "resized.json"  # how a folder was made

# ---------------------------------------------------------------------------------------------------------------------
# One picture


class Fitted(NamedTuple):
    """`content` None: the bytes of the file as they are. Sizes are width, height of the upright picture."""

    content: bytes | None
    ending: str
    size: tuple[int, int]
    original: tuple[int, int]


def fit(source: Path | BinaryIO, where: Path | str, short: int, quality: int, any_format: bool = False) -> Fitted:
    """A picture file with its shorter side at most `short` (0: any). It is decoded in any case: BadImage names `where`.

    A picture that fits keeps its bytes, unless shards do not take its format and `any_format` is False.
    """
    try:
        with Image.open(source) as opened:
            original = size = opened.size
            if 0 < short < min(size) and max(size) * short / min(size) <= LONGEST:
                size = tuple(int(short * side / min(original)) for side in original)  # as torchvision's Resize rounds
            # libjpeg skips the frequencies that a smaller picture has not: on one core 640 x 480 to 224 is 1.8 times
            # faster, 1024 x 768 to 384 3.9 times, 4032 x 3024 5 times; a look at what keeps its bytes 1.5 times. It
            # differs by 1 of 255 on average, a quarter of what JPEG loses after it. 640 x 480 to 384 gains nothing.
            opened.draft(None, size if size != original else tuple(max(1, side // 8) for side in size))
            image = data.load_image(opened, 0)
            if opened.getexif().get(data.ORIENTATION) in (5, 6, 7, 8):
                original, size = original[::-1], size[::-1]
            if size == original and (any_format or opened.format in ENDINGS):
                return Fitted(None, ENDINGS.get(opened.format, ""), original, original)
        if size != original:
            image = image.resize(size, Image.Resampling.BICUBIC)  # Lanczos: four fifths of the speed
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        return Fitted(content.getvalue(), "jpg", size, original)
    except FileNotFoundError:
        raise BadImage(where, "no such file") from None
    except UnidentifiedImageError:
        raise BadImage(where, "not a picture in a format that Pillow knows") from None
    except Exception as error:  # on damaged files the decoders raise nearly everything
        raise BadImage(where, f"{type(error).__name__}: {error}") from error


def in_order(work: Callable, tasks: Iterable, workers: int) -> Iterator[tuple]:
    """(task, work(task)) of each, by processes, of which each has a few waiting: results must not fill the memory."""
    if workers == 1:
        yield from ((task, work(task)) for task in tasks)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        waiting = deque()
        try:
            for task in tasks:
                waiting.append((task, pool.submit(work, task)))
                if len(waiting) > 8 * workers:
                    task, future = waiting.popleft()
                    yield task, future.result()
            for task, future in waiting:
                yield task, future.result()
        except BrokenProcessPool:
            raise UserError("a process was ended, perhaps by want of memory; take fewer --workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C reaches the processes too, but the main one decides; SIGTERM ends them as it does by default."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check(quality: int, **from_one: int) -> None:
    for flag, number in from_one.items():
        if number < 1:
            raise UserError(f"--{flag.replace('_', '-')} {number}: it must be 1 or more")
    if not 1 <= quality <= 95:  # beyond, says Pillow, files grow and hardly a picture gains
        raise UserError(f"--quality {quality}: it must be 1 to 95")


# ---------------------------------------------------------------------------------------------------------------------
# pack


def pack_one(item: data.Item, short: int, quality: int) -> Fitted | BadImage:
    try:
        picture = fit(item.image, item.image, short, quality)
        return picture if picture.content else picture._replace(content=Path(item.image).read_bytes())
    except BadImage as bad:
        return bad


def captioned(name: str, root: str | None, split: str):
    """The Items of a split, whose pictures are files. UserError where there are none."""
    if name == "scenes":
        raise UserError("scenes are drawn, not read: `python tools/export.py coco DIR` writes them as files; then pack "
                        "coco with --root DIR")  # fmt: skip
    corpus = corpora.load(name, root)
    for note in corpus.notes:
        print(note)
    if split not in corpus.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(corpus.splits)}")
    items = corpus.splits[split]
    if not isinstance(items[0], data.Item) or not isinstance(items[0].image, (str, os.PathLike)):
        raise UserError(f"{name}: picture files with captions are packed; its samples are of another kind")
    return items


def sample_of(item: data.Item, picture: Fitted, key: str) -> dict:
    """What webdataset writes as KEY.jpg, KEY.json, KEY.txt."""
    if not item.captions:
        raise UserError(f"image {item.image_id} has no caption; pack another split")
    (width, height), (original_width, original_height) = picture.size, picture.original
    about = {"caption": item.captions[0], "captions": item.captions, "key": key, "status": "success",
             "image_id": item.image_id, "width": width, "height": height, "original_width": original_width,
             "original_height": original_height}  # fmt: skip
    return {"__key__": key, picture.ending: picture.content, "json": json.dumps(about).encode(),
            "txt": item.captions[0].encode()}  # fmt: skip


def pack(name: str, out: Path | str, root: str | None = None, split: str = "train", per_shard: int = 10_000,
         short: int = 0, quality: int = 90, seed: int = 0, workers: int = 1) -> tuple[list[Path], int]:
    """Writes a split as shards into a new folder -> (the shards, number of pictures). UserError where that cannot be,
    and beyond ten broken pictures and 1 % of those seen, as in training."""
    check(quality, per_shard=per_shard, short=short or 1, workers=workers)
    try:
        from webdataset import TarWriter
    except ImportError:
        raise UserError("webdataset, which writes the shards, is not installed: pip install webdataset") from None
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir()) or out == Path.cwd()):
        raise UserError(f"{out} is there already, with files in it or as the folder you are in; give another name, or "
                        "remove it first")  # fmt: skip
    items = captioned(name, root, split)
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    places, names, bad, seen = len(str(per_shard - 1)), [], [], 0
    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    work = partial(pack_one, short=short, quality=quality)
    try:
        with (closing(in_order(work, (items[index] for index in order), workers)) as done,
              tqdm(total=len(order), unit=" pictures", disable=None) as bar):  # fmt: skip
            while seen < len(order):
                shard, before, start = f"{len(names):05d}", len(bad), seen
                # user and time are fixed, so that the same pictures are the same bytes
                with (open(unfinished / f"{shard}.tar", "wb") as file,
                      TarWriter(file, user="", group="", mtime=0, encoder=False) as tar):  # fmt: skip
                    for number, (item, picture) in enumerate(islice(done, per_shard)):
                        seen += 1
                        bar.update()
                        if isinstance(picture, BadImage):
                            bad.append(picture)
                            judge(bad, seen)
                        else:
                            tar.write(sample_of(item, picture, f"{shard}{number:0{places}d}"))
                names.append(f"{shard}.tar")
                count, failed = seen - start, len(bad) - before
                stats = {"count": count, "successes": count - failed, "failed_to_download": 0,
                         "failed_to_resize": failed, "status_dict": {"success": count - failed}}  # fmt: skip
                stats["status_dict"] |= {"failed_to_resize": failed} if failed else {}
                common.write_json(unfinished / f"{shard}_stats.json", stats)
                if bar.disable:
                    print(f"{shard}.tar: {count - failed:,} pictures; {seen:,} of {len(order):,} seen", flush=True)
        unfinished.rename(out)  # an empty one may stand there
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    if bad:
        print(f"{len(bad)} pictures could not be read and were left out", file=sys.stderr)
    return [out / name for name in names], seen - len(bad)


def judge(bad: list[BadImage], seen: int) -> None:
    """The rule of data.Loader.judge."""
    if len(bad) <= 3:
        tqdm.write(f"left out a picture that cannot be read: {bad[-1]}", sys.stderr)
    if len(bad) > 10 and len(bad) > 0.01 * seen:
        raise UserError(f"{len(bad)} of the first {seen} pictures cannot be read, the last one: {bad[-1]}\n"
                        "`python data.py check` lists them; mend or remove them.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# resize


def small(source: Path | BinaryIO, where: str, short: int, quality: int, bad: list[str]) -> Fitted | None:
    """None for what is no picture. What bears a picture's name and cannot be read is added to `bad`."""
    ending = os.path.splitext(where)[1].lower()
    try:
        return None if ending in OTHERS else fit(source, where, short, quality, any_format=True)
    except BadImage as error:
        bad += [str(error)] if ending in PICTURES or os.path.basename(where).isdigit() else []
        return None


def resize_tar(source: Path, target: Path, *how) -> list[Fitted]:
    if source.stat().st_size % tarfile.BLOCKSIZE:  # which tarfile passes over in silence where it cuts a header
        raise tarfile.ReadError("it is cut off")
    found = []
    with tarfile.open(source, "r:") as old, tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as new:
        for member in old:
            content = old.extractfile(member).read() if member.isfile() else b""
            if member.isfile() and (picture := small(io.BytesIO(content), f"{source}/{member.name}", *how)):
                found.append(picture)
                content = picture.content or content
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return found


def resize_one(files: tuple[Path, Path], short: int, quality: int) -> tuple[int, int, list[str]]:
    """One file, or shard, of the mirror -> (pictures in it, those that became smaller, what cannot be read)."""
    (source, target), bad = files, []
    if not source.is_file():  # a link to nothing
        return 0, 0, [f"{source}: no such file"]
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        if source.suffix.lower() == ".tar":
            found = resize_tar(source, part, short, quality, bad)
        else:
            found = [picture for picture in [small(source, str(source), short, quality, bad)] if picture]
            part.write_bytes(found[0].content) if found and found[0].content else shutil.copyfile(source, part)
    except (tarfile.TarError, EOFError) as error:
        found, bad = [], [f"{source}: {error}"]
        shutil.copyfile(source, part)
    part.replace(target)  # so what bears its name is whole
    return len(found) + len(bad), sum(picture.content is not None for picture in found), bad


def files_below(root: Path) -> tuple[list[Path], list[str]]:
    """(files, folders left out), relative to root. Links are followed: data sets are often put together of them."""
    files, left_out = [], []
    for folder, below, names in os.walk(root, followlinks=True):
        here = Path(folder)
        if here.name == "vcr1images":
            raise UserError(f"{here}: VCR's boxes, in the .json beside each picture, are in pixels of the pictures as "
                            "they are, and would no longer fit; leave them")  # fmt: skip
        aside = {name for name in below if name == "index" or name.startswith("regions")}
        left_out += [str((here / name).relative_to(root)) for name in sorted(aside)]
        above = {here.resolve(), *here.resolve().parents}  # where a link back would lead in a circle
        below[:] = sorted(name for name in below if name not in aside and (here / name).resolve() not in above)
        files += [(here / name).relative_to(root) for name in sorted(names)]
    return files, left_out


def resize(source: Path | str, target: Path | str, short: int, quality: int = 90, workers: int = 1) -> list[Path]:
    """Mirrors `source` in `target` with small pictures, or goes on with that -> its shards. UserError where one lies in
    the other, and where `target` was made otherwise."""
    check(quality, short=short, workers=workers)
    source, target = Path(source).resolve(), Path(target).resolve()
    if not source.is_dir():
        raise UserError(f"{source} is no folder; resize takes that of a data set, or of .tar shards")
    if source == target or source in target.parents or target in source.parents:
        raise UserError(f"{source} and {target} are one, or one lies in the other; give a folder beside it")
    files, left_out = files_below(source)
    settings, mark = {"from": str(source), "short": short, "quality": quality}, target / MARK
    if target.exists() and not mark.is_file() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already, and not by this command; give another name")
    if mark.is_file() and (made := json.loads(mark.read_text("utf-8"))) != settings:
        raise UserError(f"{target} was made with {made}, not with {settings}; give another name, or remove it first")
    target.mkdir(parents=True, exist_ok=True)
    common.write_json(mark, settings)
    if left_out:
        print(f"left out, as their boxes are in pixels of the pictures as they were: {', '.join(left_out)}")
    todo = [(source / file, target / file) for file in files if not (target / file).is_file()]
    pictures, smaller, bad = 0, 0, []
    with (closing(in_order(partial(resize_one, short=short, quality=quality), todo, workers)) as done,
          tqdm(total=len(todo), unit=" files", disable=None) as bar):  # fmt: skip
        for number, ((file, _), (found, fewer, broken)) in enumerate(done, 1):
            bar.update()
            for text in broken[: max(0, 3 - len(bad))]:
                tqdm.write(f"copied as it is, since it cannot be read: {text}", sys.stderr)
            pictures, smaller, bad = pictures + found, smaller + fewer, bad + broken
            if bar.disable and (file.suffix == ".tar" or number % 10_000 == 0):
                print(f"{number:,} of {len(todo):,} files, the last one {file}", flush=True)
    before, after = (sum((root / file).stat().st_size for file in files if (source / file).is_file()) / 2**20
                     for root in (source, target))  # fmt: skip
    there = len(files) - len(todo)
    print(f"{pictures:,} pictures, {smaller:,} made smaller, {len(bad):,} that cannot be read; {there:,} files were "
          f"there already. {before:,.1f} MiB became {after:,.1f} MiB")  # fmt: skip
    return [target / file for file in files if file.suffix.lower() == ".tar"]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv=None) -> None:
    parser = common.Parser(prog="shards.py", description="Pictures as tar shards, and smaller pictures.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    packing = commands.add_parser("pack", help="a split as tar shards in the form of img2dataset")
    packing.add_argument("name", metavar="DATA", help="a data set with captions, or own data")
    packing.add_argument("out", metavar="OUT", help="a new folder")
    packing.add_argument("--root", help="folder of the data set (default: data/NAME)")
    packing.add_argument("--split", default="train", help="(default: train)")
    packing.add_argument("--per-shard", type=int, default=10_000, help="pictures a shard (default: 10000)")
    packing.add_argument("--short", type=int, default=0, help="shorter side at most, in pixels; 0: as it is (default)")
    packing.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    resizing = commands.add_parser("resize", help="a data set's folder with smaller pictures")
    resizing.add_argument("source", metavar="FROM", help="folder of a data set, or of shards")
    resizing.add_argument("target", metavar="TO", help="a new folder, or one that was begun with the same flags")
    resizing.add_argument("--short", type=int, required=True, help="shorter side at most, in pixels")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for command in (packing, resizing):
        command.add_argument("--quality", type=int, default=90, help="of JPEG (default: 90)")
        command.add_argument("--workers", type=int, default=cores, help="processes (default: all cores)")
    options = vars(parser.parse_args(argv))
    if options.pop("command") == "pack":
        tars, n = pack(**options)
        size = sum(file.stat().st_size for file in tars)
        name = tars[0].name if len(tars) == 1 else f"{{{tars[0].stem}..{tars[-1].stem}}}.tar"  # webdataset's notation
        shards = os.path.join(options["out"], name)
        print(f"{n:,} pictures in {len(tars):,} shards, {size / 2**20:,.1f} MiB. What reads them:")
        print(f'  python data.py check "{shards}"\n  python tden.py --data "{shards}"')
    elif tars := resize(**options):
        print(f"What reads the shards: --data {tars[0].parent}")
    else:
        print(f"What reads it: --root {options['target']}, or of own data --data and its file in there")


if __name__ == "__main__":
    common.run_main(main)
