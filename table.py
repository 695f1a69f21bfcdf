"""Millions of captioned pictures that lie in files, not in memory: a Sequence of Items over mapped arrays.

Three million Items as Python objects are gigabytes, and every loader process that touches them gets a copy of its own.
Here texts are bytes one behind the other, with an array of where each ends. Both are files that numpy maps: all
processes of a machine share the same pages, and a start opens them without reading.

    INDEX/names.bin     names_ends.int64     of each picture its file, relative to the data set's folder
    INDEX/captions.bin  captions_ends.int64  first.int64: of each picture its first caption, and one more at the end
    INDEX/ids.int64     and one more such file for each further number of a picture
    INDEX/meta.json     how many, and what was left out

`made_once` writes such a folder at the first start and finds it at the next ones, until a source has changed; INDEX is
then NAME-KEY in root/index.

Reading map: texts | the table | writing one | made once | lists in JSON, piece by piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from common import UserError
from data import Item

# ---------------------------------------------------------------------------------------------------------------------
# Texts

UTF8 = ("utf-8", "surrogatepass")


class Texts(Sequence):
    """Strings as UTF-8 bytes: blob uint8 [bytes], ends int64 [n]. File names that are no UTF-8 survive, too."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """In memory."""
        blob, ends = bytearray(), array("q")
        for text in texts:
            blob += text.encode(*UTF8)
            ends.append(len(blob))
        return cls(np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes().decode(*UTF8)


# ---------------------------------------------------------------------------------------------------------------------
# The table


class Table(Sequence):
    """Items, made on access. `rows`: which of the written ones, default all, in their order. `prefix`: before each id,
    which is text then.

    Pickled, as for a worker that is spawned, it is the name of its folder, and four bytes for each of `rows`: the
    worker maps the files itself.
    """

    def __init__(self, root: Path, names: Texts, captions: Texts, numbers: dict[str, np.ndarray],
                 rows: np.ndarray | None = None, folder: Path | None = None, ids: Sequence | None = None,
                 prefix: str = ""):
        self.root, self.names, self.captions, self.numbers = root, names, captions, numbers
        self.rows, self.folder, self.ids = rows, folder, numbers["ids"] if ids is None else ids
        self.prefix = prefix

    @classmethod
    def open(cls, folder: Path, root: Path, rows: np.ndarray | None = None, prefix: str = "") -> Table:
        """What a Writer has written into `folder`; names are relative to `root`."""
        numbers = {file.stem: mapped(file) for file in folder.glob("*.int64")}
        texts = [Texts(mapped(folder / f"{name}.bin", np.uint8), numbers.pop(f"{name}_ends"))
                 for name in ("names", "captions")]  # fmt: skip
        return cls(root, *texts, numbers, rows, folder, prefix=prefix)

    @classmethod
    def of(cls, items: Sequence[Item]) -> Table:
        """In memory, of Items whose images are files: still one copy for all workers that are forked."""
        counts = [len(item.captions) for item in items]
        first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        names = Texts.of(os.fspath(item.image) for item in items)
        captions = Texts.of(text for item in items for text in item.captions)
        ids = [item.image_id for item in items]
        if all(isinstance(i, int) for i in ids):
            return cls(Path(), names, captions, {"first": first, "ids": np.array(ids, dtype=np.int64)})
        return cls(Path(), names, captions, {"first": first}, ids=Texts.of(map(str, ids)))

    def __reduce__(self):
        if self.folder is not None:
            return Table.open, (self.folder, self.root, self.rows, self.prefix)
        return Table, (self.root, self.names, self.captions, self.numbers, self.rows, None, self.ids, self.prefix)

    def chosen(self, rows: np.ndarray) -> Table:
        """Those at these places of this one: an array of numbers, or of truth values, one a picture."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        rows = (rows if self.rows is None else self.rows[rows]).astype(np.int32)
        return Table(self.root, self.names, self.captions, self.numbers, rows, self.folder, self.ids, self.prefix)

    def column(self, name: str) -> np.ndarray:
        """int64 [len]: a number of each picture, by the name under which it was written."""
        return self.numbers[name] if self.rows is None else self.numbers[name][self.rows]

    def n_captions(self) -> np.ndarray:
        """int64 [len]."""
        first = self.numbers["first"]
        return np.diff(first) if self.rows is None else first[self.rows + 1] - first[self.rows]

    def __len__(self) -> int:
        return len(self.names) if self.rows is None else len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        row = row if self.rows is None else int(self.rows[row])
        first = self.numbers["first"]
        captions = tuple(self.captions[i] for i in range(int(first[row]), int(first[row + 1])))
        image_id = self.ids[row] if isinstance(self.ids, Texts) else int(self.ids[row])
        return Item(f"{self.prefix}{image_id}" if self.prefix else image_id, self.root / self.names[row], captions)


def mapped(file: Path, kind=np.int64) -> np.ndarray:
    """A file of numbers as a read-only array; an empty one cannot be mapped."""
    return np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Writing one


class Writer:
    """Writes a table picture by picture, at constant memory. Within `with`; `meta`: what else is to be remembered."""

    BUFFERED = 1 << 12  # captions that wait for the disk, to be encoded many at once

    def __init__(self, folder: Path, columns: Sequence[str] = ()):
        self.files = {name: open(folder / f"{name}.bin", "wb") for name in ("names", "captions")}
        self.texts: dict[str, list[str]] = {"names": [], "captions": []}
        self.columns = {name: array("q") for name in ("names_ends", "captions_ends", "first", "ids", *columns)}
        self.folder, self.meta = folder, {}
        self.n, self.n_captions, self.sizes = 0, 0, {"names": 0, "captions": 0}

    def add(self, image_id: int, name: str, captions: Sequence[str], **numbers: int) -> None:
        self.columns["first"].append(self.n_captions)
        self.columns["ids"].append(image_id)
        for column, number in numbers.items():
            self.columns[column].append(number)
        self.texts["names"].append(name)
        self.texts["captions"] += captions
        self.n += 1
        self.n_captions += len(captions)
        if len(self.texts["captions"]) >= self.BUFFERED:
            self._flush()

    def _flush(self) -> None:
        for kind, texts in self.texts.items():
            encoded = [text.encode(*UTF8) for text in texts]
            self.files[kind].write(b"".join(encoded))
            self.columns[f"{kind}_ends"].extend(itertools.accumulate(map(len, encoded), initial=self.sizes[kind]))
            del self.columns[f"{kind}_ends"][0], texts[:]  # the first is where the texts before these end
            self.sizes[kind] += sum(map(len, encoded))
        for name, numbers in self.columns.items():
            with open(self.folder / f"{name}.int64", "ab") as file:
                numbers.tofile(file)
            del numbers[:]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.columns["first"].append(self.n_captions)
            self._flush()
        for file in self.files.values():
            file.close()
        if kind is None:
            meta = {"pictures": self.n, "captions": self.n_captions, **self.meta}
            (self.folder / "meta.json").write_text(json.dumps(meta), "utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Made once

FORM = 1  # of the files; another number, and every index is made anew


def made_once(root: Path, name: str, sources: Sequence[Path], fill: Callable[[Path], str], **settings) -> Path:
    """The folder of what `fill(folder)` has written, meta.json among it. `fill` is called only where no call before it
    has seen the same sources (by size and time; a folder, by its own time and its folders') and settings. It returns
    what to print, "" for nothing.

    It lies in root/index, or, where nothing can be written there, below ~/.cache/minvlp. Of several processes one
    writes while the others wait; what has stopped half-way is never taken for whole. Older ones of this name go.
    """
    stamps = [FORM, settings, *([os.path.relpath(path, root), *_stamp(path)] for path in sources)]
    made = f"{name}-{hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()[:16]}"
    places = _places_for(root)
    for final in (place / made for place in places):
        if _is_whole(final):  # also where this user could not have written it
            return final
    place = _first_writable(places)
    final, unfinished = place / made, place / f"{made}.unfinished-{os.getpid()}"
    with _one_at_a_time(place / f"{name}.lock") as alone:
        if _is_whole(final):
            return final
        started = time.perf_counter()
        try:
            for broken in (final, unfinished):
                shutil.rmtree(broken, ignore_errors=True)
            unfinished.mkdir()
            told = fill(unfinished)
            if not _is_whole(final):  # which without a lock another process may have made meanwhile
                unfinished.rename(final)
        except OSError as error:
            raise UserError(f"{place}: the index of {name} cannot be written ({error}); make room there") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for older in place.iterdir() if alone else ():
            if older != final and re.fullmatch(re.escape(name) + r"-[0-9a-f]{16}(\.unfinished-\d+)?", older.name):
                with contextlib.suppress(OSError):
                    (older / "meta.json").unlink(missing_ok=True)  # first, so that half of it is not taken for whole
                shutil.rmtree(older, ignore_errors=True)
    if told:
        print(f"{told}: indexed once, in {time.perf_counter() - started:.1f} s, in {final}", file=sys.stderr)
    return final


def _is_whole(folder: Path) -> bool:
    return (folder / "meta.json").is_file()


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text("utf-8"))


def _stamp(path: Path) -> list[int]:
    try:
        about = path.stat()
        if not path.is_dir():
            return [about.st_size, about.st_mtime_ns]
        with os.scandir(path) as entries:
            inside = sorted(entry.stat().st_mtime_ns for entry in entries if entry.is_dir())
        return [about.st_mtime_ns, *inside]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _places_for(root: Path) -> tuple[Path, Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minvlp")
    return root / "index", home / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def _first_writable(places: Sequence[Path]) -> Path:
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise UserError(f"an index has to be written once, but neither {places[0]} nor {places[1]} can be written to: set "
                    "XDG_CACHE_HOME to a folder that can")  # fmt: skip


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[bool]:
    """Whether this process is alone. Where locks are not to be had (Windows, some network folders) several may write,
    each for itself; the first one stays."""
    with contextlib.ExitStack() as held:
        alone = False
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(held.enter_context(open(file, "a")), fcntl.LOCK_EX)
            alone = True
        yield alone


# ---------------------------------------------------------------------------------------------------------------------
# Lists in JSON, piece by piece

PIECE = 1 << 22  # characters read at once
LONGEST = 1 << 26  # characters of one element; Visual Genome's longest are some ten thousand


def json_list(file: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of each element of a list that is a whole JSON file, at the memory of one piece. Visual Genome's
    regions are 5 million objects: at once, they would fill many gigabytes. UserError where it is no such list."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*").match
    text, at, number = "", 0, 0  # at: how far `text`, which is what was read last, is done with

    def read_on() -> bool:
        nonlocal text, at
        piece = source.read(PIECE)
        text, at = text[at:] + piece, 0
        return bool(piece)

    def mark() -> str:
        """The next character that is not blank, "" at the end."""
        nonlocal at
        while (at := blank(text, at).end()) == len(text) and read_on():
            pass
        return text[at : at + 1]

    try:
        with open(file, encoding="utf-8-sig") as source:
            if mark() != "[":
                raise ValueError("it does not begin with a list")
            at += 1
            goes_on = mark() != "]"
            at += not goes_on
            while goes_on:
                mark()
                try:
                    value, end = decode(text, at)
                    end = blank(text, end).end()
                    if text[end : end + 1] not in (",", "]"):  # a number may have been cut: 1 of 1.5
                        raise json.JSONDecodeError("neither a comma nor the end of the list follows", text, end)
                except json.JSONDecodeError as error:
                    if len(text) - at < LONGEST and read_on():
                        continue
                    raise ValueError(f"element {number}: {error.msg}; is it cut off?") from None
                goes_on, at = text[end] == ",", end + 1
                yield f"{file}[{number}]", value
                number += 1
            if mark():
                raise ValueError("something follows the list")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); put the official one there") from None
