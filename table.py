"""Millions of captioned pictures that lie in files, not in memory: a Sequence of Items over mapped arrays.

Three million Items as Python objects are gigabytes, and every loader process that touches them gets a copy of its own.
Here texts are bytes one behind the other, with an array of where each ends. Both are files that numpy maps: all
processes of a machine share the same pages, and a start opens them without reading.

    INDEX/names.bin     names_ends.int64     of each picture its file, relative to the data set's folder
    INDEX/captions.bin  captions_ends.int64  first.int64: of each picture its first caption, and one more at the end
    INDEX/ids.int64     and one more such file for each further number of a picture
    INDEX/meta.json     how many, and what was left out

`made_once` writes such a folder at the first start and finds it at the next ones, until a source has changed.

Reading map: texts | the table | writing one | made once | lists in JSON, piece by piece.
"""

from __future__ import annotations

import contextlib
import hashlib
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


class Texts(Sequence):
    """Strings as UTF-8 bytes: blob uint8 [bytes], ends int64 [n]."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """In memory."""
        blob, ends = bytearray(), array("q")
        for text in texts:
            blob += text.encode()
            ends.append(len(blob))
        return cls(np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes().decode()


# ---------------------------------------------------------------------------------------------------------------------
# The table


class Table(Sequence):
    """Items, made on access. `rows`: which of the written ones, default all, in their order. `prefix`: before each id,
    which is text then.

    Pickled, as for a worker that is spawned, it is the name of its folder: the worker maps the files itself.
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
        return Table, (self.root, self.names, self.captions, self.numbers, self.rows, None, self.ids)

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

    BUFFERED = 1 << 16  # numbers of each column that wait for the disk

    def __init__(self, folder: Path, columns: Sequence[str] = ()):
        self.files = {name: open(folder / f"{name}.bin", "wb") for name in ("names", "captions")}
        self.columns = {name: array("q") for name in ("names_ends", "captions_ends", "first", "ids", *columns)}
        self.folder, self.meta = folder, {}
        self.n, self.n_captions, self.sizes = 0, 0, {"names": 0, "captions": 0}

    def add(self, image_id: int, name: str, captions: Sequence[str], **numbers: int) -> None:
        self.columns["first"].append(self.n_captions)
        self.columns["ids"].append(image_id)
        for column, number in numbers.items():
            self.columns[column].append(number)
        self._text("names", name)
        for text in captions:
            self._text("captions", text)
        self.n += 1
        self.n_captions += len(captions)
        if self.n % self.BUFFERED == 0:
            self._flush()

    def _text(self, kind: str, text: str) -> None:
        written = self.files[kind].write(text.encode())
        self.sizes[kind] += written
        self.columns[f"{kind}_ends"].append(self.sizes[kind])

    def _flush(self) -> None:
        for name, numbers in self.columns.items():
            with open(self.folder / f"{name}.int64", "ab") as file:
                numbers.tofile(file)
            del numbers[:]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, *_) -> None:
        for file in self.files.values():
            file.close()
        if kind is None:
            self.columns["first"].append(self.n_captions)
            self._flush()
            meta = {"pictures": self.n, "captions": self.n_captions, **self.meta}
            (self.folder / "meta.json").write_text(json.dumps(meta), "utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Made once

FORM = 1  # of the files; another number, and every index is made anew


def made_once(root: Path, name: str, sources: Sequence[Path], fill: Callable[[Path], str], **settings) -> Path:
    """The folder of what `fill(folder)` has written, which is called only where no call before it has seen the same
    sources (by size and time; a folder, by its own and its folders' times) and settings. It returns what to print.

    It lies in root/index, or, where nothing can be written there, below ~/.cache/minvlp. Of several processes one
    writes while the others wait; what has stopped half-way is never taken for whole.
    """
    stamps = [FORM, settings, *([os.path.relpath(path, root), *_stamp(path)] for path in sources)]
    key = hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()[:16]
    place = _place_for(root)
    final = place / f"{name}-{key}"
    if (final / "meta.json").is_file():
        return final
    with _one_at_a_time(place / f"{name}.lock"):
        if (final / "meta.json").is_file():
            return final
        started, unfinished = time.perf_counter(), place / f"{name}-{key}.unfinished-{os.getpid()}"
        try:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.mkdir()
            told = fill(unfinished)
            unfinished.rename(final)
        except OSError as error:
            raise UserError(f"{place}: the index of {name} cannot be written ({error}); make room there") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        for older in place.glob(f"{name}-*"):
            if older != final and re.fullmatch(re.escape(name) + r"-[0-9a-f]{16}(\.unfinished-\d+)?", older.name):
                shutil.rmtree(older, ignore_errors=True)
        if told:
            print(f"{told}: indexed once, in {time.perf_counter() - started:.1f} s, in {final}", file=sys.stderr)
    return final


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


def _place_for(root: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minvlp"
    for place in (root / "index", home / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]):
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise UserError(f"neither {root / 'index'} nor {home} can be written to, where an index of it would lie")


@contextlib.contextmanager
def _one_at_a_time(file: Path):
    """Where a system has no such locks, several may write, each for itself; the last one stays."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Lists in JSON, piece by piece

PIECE = 1 << 22  # characters read at once
LONGEST = 1 << 26  # characters of one element; Visual Genome's longest are some ten thousand


def json_list(file: Path) -> Iterator[tuple[str, object]]:
    """(where, value) of each element of a list that is a whole JSON file, at the memory of one piece. Visual Genome's
    regions are 5 million objects: at once, they would fill many gigabytes. UserError where it is no such list."""
    decode, blank = json.JSONDecoder().raw_decode, re.compile(r"\s*")
    try:
        with open(file, encoding="utf-8-sig") as source:
            text, number = source.read(PIECE), 0
            at = blank.match(text).end()
            if text[at : at + 1] != "[":
                raise ValueError("it does not begin with a list")
            if text[at:].split() in (["[]"], ["[", "]"]):
                return
            while True:  # at: of the bracket or comma before the next element
                try:
                    value, end = decode(text, blank.match(text, at + 1).end())
                    end = blank.match(text, end).end()
                    mark = text[end]  # what follows it must be there, or a number might have been cut
                except (json.JSONDecodeError, IndexError) as error:
                    more = source.read(PIECE) if len(text) - at < LONGEST else ""
                    if not more:
                        why = "the file ends there" if isinstance(error, IndexError) else error
                        raise ValueError(f"element {number}: {why}") from None
                    text, at = text[at:] + more, 0
                    continue
                yield f"{file}[{number}]", value
                if mark != ",":
                    break
                at, number = end, number + 1
            if mark != "]" or text[end + 1 :].strip() or source.read(PIECE).strip():
                raise ValueError(f"the list does not end after element {number}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); put the official one there") from None
