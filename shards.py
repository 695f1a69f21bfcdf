"""Pictures in tar shards, as img2dataset writes them, read through webdataset.

    --data "shards/cc3m-{00000..00331}.tar"        or a folder of .tar files, or a pattern with *

A shard holds pictures with their captions, the members of each one behind the other: 000010001.jpg, 000010001.txt and
000010001.json. What is to be seen say the `captions` of .json, else .txt, else the `caption` of .json.
`tools/shards.py` packs any data set in this form.

At the first start the headers of every shard are read once, for where each picture begins; so that a run knows how many
there are, can begin anywhere in a shard, and learns of a damaged one before it trains. From then on a shard is read
from where it is needed, forwards. Which picture is needed when follows from the step alone (data.TrainBatches), as it
does for files: any number of processes and workers sees each picture once in an epoch, and so does a resumed run.

Reading map: which files | the index of a shard | the shards as items.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

import data
from common import UserError
from data import BadImage, Item, Packed
from table import made_once, mapped, read_meta

PICTURES = ("jpg", "jpeg", "png", "webp")  # the endings of what img2dataset writes

# ---------------------------------------------------------------------------------------------------------------------
# Which files


def are_meant(spec: str) -> bool:
    """Does this name shards, and no data set? A .tar file or several, or a folder of them that is not own data."""
    path = Path(spec)
    return spec.endswith(".tar") or (
        path.is_dir() and not (path / "captions.txt").exists() and any(path.glob("*.tar"))
    )


def _webdataset():
    try:
        from webdataset import tariterators
    except ImportError:
        raise UserError("tar shards are read by webdataset, which is not installed: `pip install webdataset`") from None
    return tariterators


def files_of(spec: str) -> list[Path]:
    """The shards that are meant, in order. UserError that names those which are not there."""
    path = Path(spec)
    if path.exists():
        return sorted(path.glob("*.tar")) if path.is_dir() else [path]
    _webdataset()
    from braceexpand import UnbalancedBracesError, braceexpand  # comes with webdataset

    try:
        wanted = list(braceexpand(spec))
    except UnbalancedBracesError:
        raise UserError(f"{spec}: a brace is left open; shards are named like cc3m-{{00000..00331}}.tar") from None
    files = list(itertools.chain(*(sorted(glob.glob(name)) if glob.has_magic(name) else [name] for name in wanted)))
    missing = [name for name in files if not os.path.isfile(name)]
    if missing or not files:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        lost = f"{len(missing)} of its {len(files)} shards are not there ({named})" if files else "nothing fits it"
        raise UserError(f"{spec}: {lost}; fetch them, or name those that are")
    return list(map(Path, files))


# ---------------------------------------------------------------------------------------------------------------------
# The index of a shard


def index_of(shard: Path) -> Path:
    """The folder with starts.int64, where each picture's first member begins, and meta.json; made once."""
    return made_once(shard.parent, shard.stem, [shard], partial(_index, shard))


def _index(shard: Path, folder: Path) -> str:
    starts, found, sample = array("q"), {"without_picture": [], "without_caption": []}, {}
    try:
        with tarfile.open(shard, "r:") as tar:
            while True:
                member = tar.next()
                tar.members.clear()  # else it would keep them all
                key, ending = _name(member, shard) if member else (None, None)
                if member and key is None:
                    continue
                if sample and key != sample["key"]:
                    lacks = _lacks(sample["endings"])
                    found[lacks].append(sample["key"]) if lacks else starts.append(sample["start"])
                    sample = {}
                if not member:
                    break
                sample = sample or {"key": key, "start": member.offset, "endings": []}
                if ending in sample["endings"]:
                    raise UserError(f"{shard} holds {member.name} twice; pack it anew")
                sample["endings"].append(ending)
            tar.fileobj.seek(tar.offset)  # tarfile takes a damaged header for the end, which is a block of zeros
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end is at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard} is damaged or was cut off ({error}): fetch it anew, or leave it out") from None
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror}") from None
    with open(folder / "starts.int64", "wb") as file:
        starts.tofile(file)
    lost = {name: {"n": len(keys), "first": keys[:3]} for name, keys in found.items()}
    meta = {"pictures": len(starts), "bytes": os.path.getsize(shard), **lost}
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    return ""


def _name(member: tarfile.TarInfo, shard: Path) -> tuple[str | None, str | None]:
    """What webdataset takes for the key and the ending of a member, in small letters; (None, None) where it skips it.
    Nothing is ever written out by its name; but whoever made a name that leads out of a folder meant no good."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{shard}: its member {member.name!r} leads out of the archive; do not use it, fetch it anew "
                        "from those who made it")  # fmt: skip
    if not member.isreg() or re.match(r"__[^/]*__($|/)", member.name):
        return None, None
    key, ending = _webdataset().base_plus_ext(member.name)
    return key, ending and ending.lower()


def _lacks(endings) -> str:
    """Why a sample with these endings cannot be trained on; "" where it can."""
    if not set(PICTURES) & set(endings):
        return "without_picture"
    return "" if {"txt", "json"} & set(endings) else "without_caption"


# ---------------------------------------------------------------------------------------------------------------------
# The shards as items


class Shards(Sequence):
    """The pictures of all shards in order, or those from `start` to `stop`, as Items: image_id is the key.

    Any of them can be asked for; fast is one behind the other, from up to OPEN places at a time.
    """

    OPEN = 32

    def __init__(self, files: Sequence[Path], start: int = 0, stop: int | None = None):
        self.files = list(files)
        folders = _indexed(self.files)
        self.metas = [read_meta(folder) for folder in folders]
        self.begins = [mapped(folder / "starts.int64") for folder in folders]
        counts = np.array([len(begins) for begins in self.begins])
        ends = counts.cumsum()
        self.start, self.stop = start, int(ends[-1]) if stop is None else stop
        # of each shard the first picture that counts, and how many do
        self.first = np.clip(self.start - (ends - counts), 0, counts)
        self.counts = np.clip(self.stop - (ends - counts), 0, counts) - self.first
        self.ends = self.counts.cumsum().tolist()
        self.lines: OrderedDict[tuple, tuple] = OrderedDict()  # of the last passes: their shards, and their ends
        self.cursors: OrderedDict[tuple, tuple] = OrderedDict()  # (shard, next number) -> file, its samples from there
        self.pid = os.getpid()
        if not len(self):
            raise UserError(f"no picture with a caption is in {self.files[0]}" + " and so on" * (len(files) > 1))

    def __reduce__(self):
        return Shards, (self.files, self.start, self.stop)

    def part(self, start: int, stop: int) -> Shards:
        return Shards(self.files, self.start + start, self.start + stop)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        shard = bisect_right(self.ends, index)
        return self.read(shard, int(self.first[shard]) + index - (self.ends[shard - 1] if shard else 0))

    def __iter__(self):
        """For evaluations, which leave out no picture: UserError where a caption cannot be read."""
        for index in range(len(self)):
            try:
                yield self[index]
            except BadImage as bad:
                raise UserError(f"{bad}; mend it, or leave its shard out") from None

    def of_pass(self, seed: int, number: int, place: int) -> Item:
        """The item at this place of pass `number`: it has an order of shards of its own, and reads each forwards."""
        if (seed, number) not in self.lines:
            order = np.random.default_rng([seed % 2**32, number]).permutation(len(self.files))
            self.lines[seed, number] = order.tolist(), self.counts[order].cumsum().tolist()
            while len(self.lines) > 3:
                self.lines.popitem(last=False)
        order, ends = self.lines[seed, number]
        at = bisect_right(ends, place)
        return self.read(order[at], int(self.first[order[at]]) + place - (ends[at - 1] if at else 0))

    def read(self, shard: int, number: int) -> Item:
        """Picture `number` of a shard. BadImage where its caption is no good; UserError where the shard is gone, or is
        another one of another size."""
        if self.pid != os.getpid():  # a forked worker shares its parent's files, and so where they are read
            self.cursors, self.pid = OrderedDict(), os.getpid()
        try:
            file, samples = self.cursors.pop((shard, number), None) or self._open(shard, number)
            sample = next(samples)
        except (OSError, ValueError, tarfile.TarError, StopIteration) as error:
            why = getattr(error, "strerror", None) or (error.args[0] if error.args else "it ends too early")
            raise UserError(f"{self.files[shard]} cannot be read any more at its picture {number} ({why}): put it back "
                            "as it was, and go on with --resume") from None  # fmt: skip
        if number + 1 == len(self.begins[shard]):
            file.close()
        else:
            self.cursors[shard, number + 1] = file, samples
        while len(self.cursors) > self.OPEN:
            self.cursors.popitem(last=False)[1][0].close()
        return _item(sample, self.files[shard])

    def _open(self, shard: int, number: int):
        """A file, and the samples in it from this one on."""
        file = open(self.files[shard], "rb")
        if os.fstat(file.fileno()).st_size != self.metas[shard]["bytes"]:
            raise ValueError("its size has changed")
        file.seek(int(self.begins[shard][number]))
        return file, _samples(file, self.files[shard])


def _indexed(files: list[Path]) -> list[Path]:
    """The index of each, on all cores where there are many to make."""
    from tqdm import tqdm

    if len(files) < 8:
        return list(map(index_of, files))
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(tqdm(pool.map(index_of, files), "shards", len(files), leave=False, disable=None, delay=2))


def _samples(file, shard: Path) -> Iterator[dict]:
    """webdataset's samples from where the file stands, but for those that the index leaves out."""
    wds = _webdataset()
    for sample in wds.group_by_keys(wds.tar_file_expander([{"url": str(shard), "stream": file}])):
        if not _lacks(sample):
            yield sample


def _item(sample: dict, shard: Path) -> Item:
    ending = next(ending for ending in PICTURES if ending in sample)
    image = Packed(f"{shard}: {sample['__key__']}.{ending}", sample[ending])
    try:
        about = json.loads(sample["json"]) if "json" in sample else {}
        said = about.get("captions") or (sample["txt"].decode("utf-8-sig") if "txt" in sample else about.get("caption"))
        captions = tuple(data.caption_text(text, image.name) for text in (said if isinstance(said, list) else [said]))
    except (ValueError, AttributeError, RecursionError, UserError) as error:
        raise BadImage(image.name, f"its caption cannot be read ({error})") from None
    return Item(sample["__key__"], image, captions)
