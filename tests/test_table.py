"""The mapped table gives back the Items that were written, whole or not at all, at little memory; lists in JSON that
are read piece by piece are those that json reads."""

import json
import multiprocessing
import os
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import table
from common import UserError
from data import Item
from table import Table, Texts, Writer, json_list, made_once, read_meta

SAID = ["", "ein Männchen", "\u2028", "犬 and 🐕", "a\nb", ""]


def items_of(n, root=Path(), most=3):
    rng = random.Random(n)
    said = [tuple(rng.choice(SAID) + str(i) for _ in range(rng.randint(0, most))) for i in range(n)]
    return [Item(7 * i, root / f"folder/{i:04d}.jpg", captions) for i, captions in enumerate(said)]


def written(folder, items, root, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, tuple(columns)) as writer:
        for i, item in enumerate(items):
            numbers = {name: int(values[i]) for name, values in columns.items()}
            writer.add(item.image_id, str(item.image.relative_to(root)), item.captions, **numbers)
    return Table.open(folder, root)


# ---------------------------------------------------------------------------------------------------------------------
# Texts


@pytest.mark.parametrize("said", [SAID, [], [""], ["", "", "x"], ["not UTF-8: \udcff"]])
def test_texts(said):
    texts = Texts.of(said)
    assert list(texts) == said and len(texts) == len(said)
    assert [texts[-1 - i] for i in range(len(said))] == said[::-1]
    for beyond in (len(said), -1 - len(said)):
        with pytest.raises(IndexError):
            texts[beyond]


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_in_memory_and_mapped_are_the_items(tmp_path):
    items = items_of(23, tmp_path)
    for found in (Table.of(items), written(tmp_path / "index", items, tmp_path)):
        assert list(found) == items and len(found) == 23
        assert found[-1] == items[-1] and found[3:20:4] == items[3:20:4] and found[::-1] == items[::-1]
        assert found.n_captions().tolist() == [len(item.captions) for item in items]
        assert found.column("ids").tolist() == [item.image_id for item in items]
        assert type(found[1].image_id) is int
        for beyond in (23, -24):
            with pytest.raises(IndexError):
                found[beyond]


def test_ids_may_be_texts(tmp_path):
    items = [Item(f"ä/{i}.jpg", tmp_path / f"{i}", ("a",)) for i in range(4)]
    found = Table.of(items)
    assert list(found) == items and list(pickle.loads(pickle.dumps(found))) == items
    assert list(found.chosen(np.array([2, 0]))) == [items[2], items[0]]


def test_chosen(tmp_path):
    items = items_of(20, tmp_path)
    marks = np.arange(20) % 5
    found = written(tmp_path / "index", items, tmp_path, mark=marks)
    assert found.column("mark").tolist() == marks.tolist()
    odd = found.chosen(np.arange(20) % 2 == 1)
    assert list(odd) == items[1::2]
    assert odd.column("mark").tolist() == marks[1::2].tolist()
    assert odd.n_captions().tolist() == [len(item.captions) for item in items[1::2]]
    twice = odd.chosen(np.array([7, 2, 2]))  # places of `odd`, in this order
    assert list(twice) == [items[15], items[5], items[5]] and twice.column("mark").tolist() == [0, 0, 0]
    assert list(twice.chosen(np.array([False, True, False]))) == [items[5]]
    nothing = odd.chosen(np.zeros(10, dtype=bool))
    assert list(nothing) == [] and nothing.n_captions().tolist() == [] and len(nothing) == 0


def test_a_prefix_makes_texts_of_ids_and_stays(tmp_path):
    items = items_of(5, tmp_path)
    for found in (written(tmp_path / "index", items, tmp_path), Table.of(items)):
        found.prefix = "val-"
        for same in (found, found.chosen(np.arange(5)), pickle.loads(pickle.dumps(found))):
            assert [item.image_id for item in same] == ["val-0", "val-7", "val-14", "val-21", "val-28"]


def test_pickled_it_does_not_carry_the_data(tmp_path):
    items = items_of(3000, tmp_path)
    found = written(tmp_path / "index", items, tmp_path, mark=range(3000))
    text = pickle.dumps(found)
    assert len(text) < 1000 and list(pickle.loads(text)) == items
    chosen = found.chosen(np.arange(100, 200))
    text = pickle.dumps(chosen)
    assert len(text) < 1500 and list(pickle.loads(text)) == items[100:200]
    assert pickle.loads(text).column("mark").tolist() == list(range(100, 200))
    in_memory = Table.of(items[:50]).chosen(np.array([4, 2]))
    assert list(pickle.loads(pickle.dumps(in_memory))) == [items[4], items[2]]


def test_more_pictures_than_are_buffered(tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "BUFFERED", 4)
    for n in (3, 4, 5, 8, 23):
        items = items_of(n, tmp_path)
        found = written(tmp_path / f"index{n}", items, tmp_path, mark=range(n))
        assert list(found) == items and found.column("mark").tolist() == list(range(n))
        meta = read_meta(tmp_path / f"index{n}")
        assert meta == {"pictures": n, "captions": sum(len(item.captions) for item in items)}


def test_what_is_written_waits_for_little_and_ends_with_its_meta(tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "BUFFERED", 4)
    with pytest.raises(KeyError):
        with Writer(tmp_path) as writer:
            for i in range(11):
                writer.add(i, "a.jpg", ["a", "b"])
                assert len(writer.columns["ids"]) < 4 and len(writer.columns["captions_ends"]) < 8
            raise KeyError
    assert not (tmp_path / "meta.json").exists() and all(file.closed for file in writer.files.values())
    (tmp_path / "whole").mkdir()
    with Writer(tmp_path / "whole") as writer:
        writer.meta["lost"] = 5
    assert read_meta(tmp_path / "whole") == {"pictures": 0, "captions": 0, "lost": 5}


def test_empty_ones(tmp_path):
    for found in (Table.of([]), written(tmp_path / "index", [], tmp_path)):
        assert len(found) == 0 and list(found) == [] and found.n_captions().tolist() == []
        assert list(pickle.loads(pickle.dumps(found))) == []
    bare = [Item(1, tmp_path / "a", ()), Item(2, tmp_path / "b", ())]
    assert list(written(tmp_path / "bare", bare, tmp_path)) == bare == list(Table.of(bare))


def test_it_is_read_only(tmp_path):
    found = written(tmp_path / "index", items_of(3, tmp_path), tmp_path)
    with pytest.raises(ValueError):
        found.column("ids")[0] = 5


def test_captions_are_not_held_in_memory(tmp_path):
    """200,000 captions of 60 letters: 12 MB of text, and three times that as Python's objects."""
    words = "a caption of some length about things that are to be seen, {:7d}"
    tracemalloc.start()
    try:
        with Writer(tmp_path, ("test",)) as writer:
            for i in range(20_000):
                writer.add(i, f"images/{i}.jpg", [words.format(10 * i + k) for k in range(10)], test=0)
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        found = Table.open(tmp_path, tmp_path).chosen(np.arange(20_000) % 2 == 0)
        assert found[9_999].captions[9] == words.format(199_989) and found[0].captions[0] == words.format(0)
        assert tracemalloc.get_traced_memory()[1] - before < 1e6
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Made once


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "root"
    (root / "images" / "below").mkdir(parents=True)
    (root / "source.json").write_text("[]")
    return root


class Fill:
    def __init__(self):
        self.calls = 0

    def __call__(self, folder):
        self.calls += 1
        with Writer(folder) as writer:
            writer.add(self.calls, "a.jpg", ["a"])
        return f"call {self.calls}"


def later(path):
    """Another time of change, whatever the clock's steps are."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


def names_in(folder):
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_it_is_made_once_and_again_when_something_has_changed(root, capsys):
    fill, sources = Fill(), [root / "source.json", root / "images"]

    def make(**settings):
        return made_once(root, "x", sources, fill, **settings)

    folder = make()
    assert folder.parent == root / "index" and list(Table.open(folder, root)) == [Item(1, root / "a.jpg", ("a",))]
    assert "call 1: indexed once, in" in capsys.readouterr().err
    assert make() == folder and fill.calls == 1
    assert capsys.readouterr().err == ""
    changes = [lambda: later(root / "source.json"), lambda: later(root / "images"),
               lambda: later(root / "images" / "below"), lambda: (root / "images" / "new").mkdir()]  # fmt: skip
    for number, change in enumerate(changes, 2):
        change()
        make(), make()
        assert fill.calls == number and len(names_in(root / "index")) == 1
    about = (root / "source.json").stat()
    (root / "source.json").write_text("[1]")
    os.utime(root / "source.json", ns=(about.st_atime_ns, about.st_mtime_ns))  # only its size tells
    make()
    assert fill.calls == 6
    make(quotes="none"), make(quotes="none")
    assert fill.calls == 7
    made_once(root, "x", sources[:1], fill)
    assert fill.calls == 8
    table_form = table.FORM
    try:
        table.FORM += 1
        made_once(root, "x", sources[:1], fill)
        assert fill.calls == 9
    finally:
        table.FORM = table_form


def test_nothing_is_told_where_there_is_nothing_to_tell(root, capsys):
    made_once(root, "x", [], lambda folder: (folder / "meta.json").write_text("{}") and "")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, UserError("no"), RuntimeError])
def test_what_has_stopped_leaves_nothing(root, stop):
    def stopped(folder):
        with Writer(folder) as writer:
            writer.add(1, "a", ["a"])
            raise stop

    with pytest.raises(stop if isinstance(stop, type) else UserError):
        made_once(root, "x", [root / "source.json"], stopped)
    assert names_in(root / "index") == []
    fill = Fill()
    made_once(root, "x", [root / "source.json"], fill)
    assert fill.calls == 1


def test_what_was_killed_is_not_taken_for_whole(root, monkeypatch):
    """A folder of the same process number, and a finished name without meta.json: both are made anew."""
    fill = Fill()
    final = made_once(root, "x", [root / "source.json"], fill)
    (final / "meta.json").unlink()
    left = final.with_name(f"{final.name}.unfinished-{os.getpid()}")
    left.mkdir()
    (left / "names.bin").write_text("half")
    other = final.with_name(f"{final.name}.unfinished-1")
    other.mkdir()
    assert made_once(root, "x", [root / "source.json"], fill) == final and fill.calls == 2
    assert names_in(root / "index") == [final.name] and len(Table.open(final, root)) == 1


def test_what_was_removed_by_half_is_not_taken_for_whole(root, monkeypatch):
    fill, remove = Fill(), table.shutil.rmtree
    about = (root / "source.json").stat()
    older = made_once(root, "x", [root / "source.json"], fill)
    later(root / "source.json")
    with monkeypatch.context() as patch:
        patch.setattr(table.shutil, "rmtree", lambda folder, **how: folder == older or remove(folder, **how))
        made_once(root, "x", [root / "source.json"], fill)
    os.utime(root / "source.json", ns=(about.st_atime_ns, about.st_mtime_ns))  # as it was
    assert made_once(root, "x", [root / "source.json"], fill) == older and fill.calls == 3


def test_a_full_disk_is_said(root):
    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"index of x cannot be written \(.*No space left on device\); make room"):
        made_once(root, "x", [], full)


def test_only_older_ones_of_the_same_name_are_removed(root):
    fill, index = Fill(), root / "index"
    kept = [made_once(root, name, [], fill) for name in ("vg-x", "vg-0123456789abcdef", "v", "vg[1]")]
    (index / "vg-notes").mkdir()
    older = made_once(root, "vg", [], fill)
    newer = made_once(root, "vg", [root / "source.json"], fill)
    assert older != newer and not older.exists() and newer.is_dir()
    assert all(folder.is_dir() for folder in kept) and (index / "vg-notes").is_dir()
    again = made_once(root, "vg[1]", [root / "source.json"], fill)
    assert again.is_dir() and not kept[-1].exists()


def test_a_missing_source_is_said(root):
    with pytest.raises(UserError, match="gone.json cannot be read: No such file"):
        made_once(root, "x", [root / "gone.json"], Fill())


def _make_slowly(root, entered, done):
    def fill(folder):
        entered.put(os.getpid())
        import time

        time.sleep(0.3)
        return Fill()(folder)

    done.put(str(made_once(root, "x", [root / "source.json"], fill)))


def test_two_processes_at_once_fill_once(root):
    context = multiprocessing.get_context("fork")
    entered, done = context.Queue(), context.Queue()
    both = [context.Process(target=_make_slowly, args=(root, entered, done)) for _ in range(2)]
    for process in both:
        process.start()
    places = {done.get(timeout=30) for _ in both}
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert len(places) == 1 and entered.get(timeout=5) and entered.empty()
    assert len(Table.open(Path(places.pop()), root)) == 1


def test_without_locks_the_first_one_stays(root, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    inner, outer = Fill(), Fill()
    others = root / "index" / "x-0123456789abcdef.unfinished-1"

    def fill(folder):  # another one begins and ends meanwhile, a third one still writes
        others.mkdir()
        pid, os.getpid = os.getpid, lambda: 12345
        try:
            made_once(root, "x", [], inner)
        finally:
            os.getpid = pid
        return outer(folder)

    final = made_once(root, "x", [], fill)
    assert inner.calls == outer.calls == 1 and others.is_dir()
    assert Table.open(final, root)[0].image_id == 1 and names_in(root / "index") == sorted([final.name, others.name])


def test_where_the_root_is_read_only_it_lies_in_the_cache(root, tmp_path, monkeypatch):
    fill, sources = Fill(), [root / "source.json"]
    (root / "index").write_text("a file, so that nothing can be written there, not even by root")
    folder = made_once(root, "x", sources, fill)
    assert folder.parent.parent == tmp_path / "cache" / "minvlp" and len(Table.open(folder, root)) == 1
    assert made_once(root, "x", sources, fill) == folder and fill.calls == 1
    other = tmp_path / "other"  # of the same name and content, but another data set
    other.mkdir()
    (other / "index").write_text("")
    assert made_once(other, "x", [], fill).parent != folder.parent
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "source.json"))
    with pytest.raises(UserError, match="neither .*index nor .* can be written to: set XDG_CACHE_HOME"):
        made_once(root, "y", sources, fill)


def test_what_lies_in_a_root_that_cannot_be_written_any_more_is_used(root, monkeypatch):
    fill, sources = Fill(), [root / "source.json"]
    folder = made_once(root, "x", sources, fill)
    monkeypatch.setattr(os, "access", lambda place, mode: root not in Path(place).parents)
    assert made_once(root, "x", sources, fill) == folder and fill.calls == 1
    later(root / "source.json")
    assert "cache" in str(made_once(root, "x", sources, fill)) and fill.calls == 2


# ---------------------------------------------------------------------------------------------------------------------
# Lists in JSON, piece by piece

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=12,
)  # fmt: skip
BLANKS = st.text(" \n\t\r", max_size=12)


def read(file, text, piece=table.PIECE):
    file.write_text(text, "utf-8")
    before, table.PIECE = table.PIECE, piece
    try:
        return list(json_list(file))
    finally:
        table.PIECE = before


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "list.json"


@settings(max_examples=120, deadline=None)
@given(st.lists(VALUES, max_size=5), st.integers(1, 40), st.booleans(), st.none() | st.integers(0, 3), BLANKS, BLANKS)
def test_pieces_of_any_size_give_what_json_gives(file, values, piece, is_ascii, indent, before, behind):
    text = before + json.dumps(values, ensure_ascii=is_ascii, indent=indent) + behind
    found = read(file, text, piece)
    assert [value for _, value in found] == values == json.loads(text)
    assert [where for where, _ in found] == [f"{file}[{i}]" for i in range(len(values))]


@pytest.mark.parametrize("piece", [1, 3, 7, 1 << 22])
@pytest.mark.parametrize("text", ["[1.5e3,-2.25,10 ,1E2]", "[ ]", "  [\n]\n", '[{"a": "]["}, "\\"]"]', "[-1]",
                                  "\ufeff[true, null]", "[[], {}]", "[NaN, -Infinity]"])  # fmt: skip
def test_numbers_are_never_cut(file, text, piece):
    assert repr([value for _, value in read(file, text, piece)]) == repr(json.loads(text.lstrip("\ufeff")))


MALFORMED = {
    "": "does not begin with a list", "  ": "does not begin with a list", "{}": "does not begin with a list",
    '"[1]"': "does not begin with a list", "null": "does not begin with a list", "]": "does not begin with a list",
    "[": "element 0: Expecting value", "[1": "element 0: neither a comma", "[1,": "element 1: Expecting value",
    "[1,]": "element 1: Expecting value", "[,1]": "element 0: Expecting value", "[1 2]": "element 0: neither a comma",
    "[1}": "element 0: neither a comma", "[1]]": "something follows", "[1] x": "something follows",
    "[]]": "something follows", '["a]': "element 0: Unterminated string", '[{"a": 1]': "element 0: Expecting ','",
    "[01]": "element 0: neither a comma", "[1.]": "element 0: neither a comma", "['a']": "element 0: Expecting value",
    "\u00a0[1]": "does not begin with a list", "[1\u00a0]": "element 0: neither a comma", "[tru]": "Expecting value",
    '[{"a": 1}, {"a": ': "element 1: Expecting value; is it cut off", "[" + "9" * 5000 + "]": "Exceeds the limit",
    "[" * 100_000: "recursion",
}  # fmt: skip


@pytest.mark.parametrize("piece", [3, 1 << 22])
@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_lists(file, text, piece):
    if len(text) > 1000 and piece < 1000:
        piece = 1000
    try:  # for json, too, it is none, or no list
        assert not isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        pass
    with pytest.raises(UserError, match=MALFORMED[text]) as error:
        read(file, text, piece)
    assert str(file) in str(error.value)


def test_what_is_no_text(file, tmp_path):
    file.write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="cannot be read as JSON .*utf-8"):
        list(json_list(file))
    with pytest.raises(UserError, match="cannot be read as JSON .*No such file"):
        list(json_list(tmp_path / "none.json"))


def test_an_element_that_never_ends_is_given_up(file, monkeypatch):
    """An open quote at the begin of gigabytes must not bring them all into memory."""
    monkeypatch.setattr(table, "LONGEST", 1000)
    with pytest.raises(UserError, match="element 0: Unterminated string"):
        read(file, '["' + "x" * 100_000 + '"]', 100)
    assert len(read(file, '["' + "x" * 900 + '"]', 100)) == 1


def test_a_list_is_read_at_the_memory_of_a_piece(file, monkeypatch):
    monkeypatch.setattr(table, "PIECE", 1 << 14)
    file.write_text(json.dumps([{"id": i, "phrase": "a phrase " * 5} for i in range(20_000)]))  # 1.3 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_list(file)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 4e5
    finally:
        tracemalloc.stop()
