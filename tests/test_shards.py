"""Tar shards: what is read of them, in which order, by how many; and what is said of damaged ones."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import corpora
import data
import shards
from common import UserError
from data import BadImage, Item, Pictures, TrainBatches
from mixture import Mixture, Part
from shards import Shards
from table import Table

pytest.importorskip("webdataset")
COUNTS = (5, 17, 1, 30, 8)


class Bytes:
    """A tokenizer whose ids are bytes, so that captions can be told from batches."""

    bos, eos, pad = 256, 257, 258

    def encode(self, text, max_len=None):
        return list(text.encode())


def picture(number, form="PNG"):
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, number // 256, 9)).save(content, form)
    return content.getvalue()


def sample(number, **changed):
    """{ending: content} as img2dataset has it; None leaves a member out."""
    about = {"caption": f"picture {number}", "status": "success", "key": f"{number:09d}"}
    whole = {"jpg": picture(number, "JPEG"), "txt": f"picture {number}".encode(), "json": json.dumps(about).encode()}
    return {ending: content for ending, content in (whole | changed).items() if content is not None}


def members(*samples):
    """[(name, content)] of (key, sample) one behind the other."""
    return [(f"{key}.{ending}", content) for key, one in samples for ending, content in one.items()]


def pack(file, content, form=tarfile.GNU_FORMAT):
    with tarfile.open(file, "w", format=form) as tar:
        for name, part in content:
            about = tarfile.TarInfo(name)
            about.size = len(part or b"")
            about.type = tarfile.DIRTYPE if part is None else tarfile.REGTYPE
            tar.addfile(about, io.BytesIO(part or b""))
    return file


def several(folder, counts=COUNTS):
    """Shards of that many pictures, numbered through."""
    folder.mkdir(exist_ok=True)
    files, number = [], 0
    for shard, n in enumerate(counts):
        files.append(pack(folder / f"{shard:05d}.tar", members(*((f"{shard:05d}{i:04d}", sample(number + i))
                                                                  for i in range(n)))))  # fmt: skip
        number += n
    return files


def numbers(items):
    return [int(item.captions[0].split()[1]) for item in items]


@pytest.fixture
def five(tmp_path):
    return Shards(several(tmp_path / "five"))


# What is read


def test_keys_captions_and_bytes(tmp_path, five):
    items = list(five)
    assert len(five) == 61 and numbers(items) == list(range(61))
    assert [item.image_id for item in items] == [f"{s:05d}{i:04d}" for s, n in enumerate(COUNTS) for i in range(n)]
    assert [item.image.content for item in items] == [picture(n, "JPEG") for n in range(61)]
    assert str(items[5].image) == f"{tmp_path}/five/00001.tar: 000010000.jpg"
    assert data.load_image(items[60].image, 0).size == (6, 4)


def test_any_can_be_asked_for(five):
    whole = list(five)
    for index in (60, 0, 22, 5, 4, 23, 23, 24, 22, -1, -61):
        assert five[index] == whole[index]
    assert five[3:40:7] == whole[3:40:7] and five[:0] == [] and five[-2:] == whole[-2:]
    for index in (61, -62):
        with pytest.raises(IndexError):
            five[index]


@pytest.mark.parametrize("start, stop", [(0, 61), (0, 5), (5, 22), (3, 24), (22, 23), (60, 61), (30, 50)])
def test_ranges(five, start, stop):
    part = five.part(start, stop)
    assert numbers(part) == list(range(start, stop)) and len(part) == stop - start
    for number in range(3):
        assert sorted(numbers(part.of_pass(7, number, i) for i in range(len(part)))) == list(range(start, stop))
    last = part.part(len(part) - 1, len(part))  # a range of a range
    assert numbers(last) == [stop - 1]
    again = pickle.loads(pickle.dumps(part))
    assert list(again) == list(part)


def test_a_pass_has_its_own_order_of_shards_and_reads_each_forwards(five):
    orders = [tuple(numbers(five.of_pass(seed, number, i) for i in range(61)))
              for seed, number in ((0, 0), (0, 1), (0, 2), (1, 0), (0, 0))]  # fmt: skip
    assert len(set(orders)) == 4 and orders[0] == orders[4]
    for order in orders:
        assert sum(b != a + 1 for a, b in zip(order, order[1:], strict=False)) <= 4


@pytest.mark.parametrize("said, captions", [
    (dict(txt=b" a dog\n runs \n"), ("a dog  runs",)),
    (dict(txt=b"\xef\xbb\xbfa dog"), ("a dog",)),
    (dict(txt=None), ("picture 3",)),
    (dict(json=None), ("picture 3",)),
    (dict(json=b'{"captions": ["one", "two"], "caption": "one"}'), ("one", "two")),
    (dict(json=b'{"captions": [], "caption": "one"}', txt=None), ("one",)),
    (dict(json=b'{"captions": "one text"}'), ("one text",)),
    (dict(json=b'{"caption": null, "status": "success"}'), ("picture 3",)),
])  # fmt: skip
def test_captions(tmp_path, said, captions):
    (item,) = Shards([pack(tmp_path / "a.tar", members(("a", sample(3, **said))))])
    assert item.captions == captions


BAD = {
    "not UTF-8": dict(txt=b"caf\xe9"),
    "empty": dict(txt=b" \n"),
    "broken JSON": dict(json=b'{"caption": "a'),
    "no object": dict(json=b'["a"]'),
    "no caption in it": dict(json=b"{}", txt=None),
    "no text": dict(json=b'{"caption": 7}', txt=None),
    "one of several": dict(json=b'{"captions": ["a", ""]}'),
    "not UTF-8 JSON": dict(json=b'{"caption": "caf\xe9"}'),
    "deep": dict(json=b"[" * 100_000),
}


@pytest.mark.parametrize("what", BAD)
def test_captions_that_cannot_be_read(tmp_path, what):
    """Among others; those are not touched."""
    content = members(("a", sample(1)), ("b", sample(2, **BAD[what])), ("c", sample(3)))
    found = Shards([pack(tmp_path / "x.tar", content)])
    with pytest.raises(BadImage, match=r"x\.tar: b\.jpg: its caption cannot be read"):
        found[1]
    assert numbers([found[0], found[2]]) == [1, 3]
    with pytest.raises(UserError, match=r"x\.tar: b\.jpg: its caption.*leave its shard out"):
        list(found)


def test_folders_kinds_and_letters(tmp_path):
    content = [("00", None), *members(("00/a", sample(0)), ("00/b.c", {}), ("./d", sample(1)))]
    content += [("e.JPG", picture(2)), ("e.Txt", b"picture 2"), ("f.png", picture(3)), ("f.txt", b"picture 3")]
    content += [("g.webp", picture(4, "WEBP")), ("g.json", b'{"caption": "picture 4"}'), ("h.jpeg", picture(5, "JPEG")),
                ("h.txt", b"picture 5")]  # fmt: skip
    found = list(Shards([pack(tmp_path / "a.tar", content)]))
    assert numbers(found) == [0, 1, 2, 3, 4, 5]
    assert [item.image_id for item in found] == ["00/a", "./d", "e", "f", "g", "h"]
    assert [data.load_image(item.image, 0).size for item in found] == [(6, 4)] * 6


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path, form):
    keys = [f"{'long' * 40}/{'folder' * 20}/{n:03d}é" for n in range(4)]
    found = Shards([pack(tmp_path / "a.tar", members(*((key, sample(n)) for n, key in enumerate(keys))), form)])
    assert [found[n].image_id for n in (2, 0, 3, 1)] == [keys[n] for n in (2, 0, 3, 1)]
    assert numbers(found) == [0, 1, 2, 3]


def test_what_lacks_is_left_out_and_counted(tmp_path):
    """Also where reading passes over it: what comes next is what the index says. So are webdataset's own members,
    folders and names without an ending, wherever they stand."""
    odd = [("__meta__", b"x"), ("__index__", b"{}"), ("README", b"x"), ("folder", None), ("__old__/b.jpg", b"x")]
    content = []
    for n in range(12):
        whole = members((f"{n:03d}", sample(n)))
        content += [odd[n % 5], whole[0], odd[(n + 1) % 5], *whole[1:]]
        content += members((f"{n:03d}p", sample(90, jpg=None)), (f"{n:03d}c", sample(91, txt=None, json=None)))
    content += [("z.parquet", b"x")]
    file = pack(tmp_path / "mine-0.tar", content)
    found = Shards([file])
    assert numbers(found) == list(range(12)) == [numbers([found[n]])[0] for n in range(12)]
    assert found.metas[0]["without_caption"] == {"n": 12, "first": ["000c", "001c", "002c"]}
    assert found.metas[0]["without_picture"] == {"n": 13, "first": ["000p", "001p", "002p"]}
    notes = corpora.load(str(file)).notes
    assert any("12 samples without a caption are left out, the first: mine-0.tar: 000c." in note for note in notes)
    assert any("13 samples without a picture are left out, the first: mine-0.tar: 000p." in note for note in notes)


# Which files


def test_files(tmp_path):
    files = several(tmp_path / "cc3m", (1, 1, 1, 1))
    root = tmp_path / "cc3m"
    for spec in (root, f"{root}/{{00000..00003}}.tar", f"{root}/*.tar", f"{root}/0000{{0,[1-3]}}.tar"):
        assert shards.files_of(str(spec)) == files and shards.are_meant(str(spec)), spec
    assert shards.files_of(f"{root}/{{00002,00000}}.tar") == [files[2], files[0]]
    odd = pack(root / "a[1]{b.tar", members(("a", sample(0))))
    assert shards.files_of(str(odd)) == [odd]
    for spec, told in ((f"{root}/{{00002..00006}}.tar", r"3 of its 5 shards.*00004.tar, .*00005.tar, .*00006.tar\)"),
                       (f"{root}/x*.tar", "nothing fits it; fetch them"),
                       (f"{root}/{{00000..1.tar", "a brace is left open")):  # fmt: skip
        with pytest.raises(UserError, match=told):
            shards.files_of(spec)
    (root / "captions.txt").write_text("a.jpg,a")
    assert not shards.are_meant(str(root)), "own data"
    assert not shards.are_meant(str(tmp_path)) and not shards.are_meant("coco")


def test_a_corpus_of_shards(tmp_path):
    several(tmp_path / "mine", (30, 12, 18))
    corpus = corpora.load(str(tmp_path / "mine" / "{00000..00002}.tar"))
    assert corpus.name == "mine"
    assert [numbers(corpus.splits[name]) for name in ("train", "val", "test")] == [
        list(range(54)), [54, 55, 56], [57, 58, 59]]  # fmt: skip


# Damage


def test_an_archive_that_was_cut_off(tmp_path):
    """Anywhere, also exactly between two members, is told at the start."""
    whole = pack(tmp_path / "whole.tar", members(*((f"{n}", sample(n)) for n in range(3)))).read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    assert len(Shards([tmp_path / "whole.tar"])) == 3
    cut = tmp_path / "cut.tar"
    for size in [*range(0, end + 1, 512), *range(1, end, 331)]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar is damaged or was cut off"):
            Shards([tmp_path / "whole.tar", cut])
    cut.write_bytes(whole[: end + 512])
    assert len(Shards([cut])) == 3, "one block of zeros is an end"


def test_a_damaged_header_is_no_end(tmp_path):
    file = pack(tmp_path / "a.tar", members(*((f"{n}", sample(n)) for n in range(3))))
    begins = Shards([file]).begins[0].tolist()
    content = bytearray(file.read_bytes())
    content[begins[1] + 3] ^= 255
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"damaged or was cut off .*at byte {begins[1]:,}"):
        Shards([file])


def test_other_bad_archives(tmp_path):
    (tmp_path / "none.tar").write_bytes(b"this is no tar" * 100)
    with pytest.raises(UserError, match=r"none\.tar is damaged"):
        Shards([tmp_path / "none.tar"])
    with tarfile.open(tmp_path / "zipped.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match=r"zipped\.tar is damaged"):
        Shards([tmp_path / "zipped.tar"])
    empty = pack(tmp_path / "empty.tar", [])
    with pytest.raises(UserError, match=r"no picture with a caption is in .*empty\.tar$"):
        Shards([empty])
    with pytest.raises(UserError, match=r"no picture with a caption is in .*empty\.tar and so on"):
        Shards([empty, pack(tmp_path / "bare.tar", members(("a", sample(0, txt=None, json=None))))])
    assert numbers(Shards([empty, *several(tmp_path / "more", (2,)), empty])) == [0, 1]
    twice = pack(tmp_path / "twice.tar", members(("a", sample(0))) + [("a.JPG", b"x")])
    with pytest.raises(UserError, match=r"twice\.tar holds a\.JPG twice"):
        Shards([twice])
    with pytest.raises(UserError, match=r"gone\.tar cannot be read"):
        Shards([tmp_path / "gone.tar"])


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "b/../../a.jpg"])
def test_names_that_lead_out(tmp_path, name):
    file = pack(tmp_path / "a.tar", members(("a", sample(0))) + [(name, picture(0)), (name[:-3] + "txt", b"x")])
    with pytest.raises(UserError, match=r"a\.tar: its member '.*a\.jpg' leads out of the archive; do not use it"):
        Shards([file])


def test_many_shards_are_indexed_by_several_processes(tmp_path):
    files = several(tmp_path / "many", (2,) * 9)
    assert numbers(Shards(files)) == list(range(18))
    files[4].write_bytes(files[4].read_bytes()[:600])
    with pytest.raises(UserError, match=r"00004\.tar is damaged"):
        Shards(files)


def test_the_index_is_made_once(tmp_path, monkeypatch):
    files = several(tmp_path / "a", (3, 2))
    Shards(files)
    opened, original = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **named: opened.append(args) or original(*args, **named))
    Shards(files)
    assert not opened
    os.utime(files[1], (1, 1))
    Shards(files)
    assert [args[0] for args in opened] == [files[1]]


# Batches


def pictures(items, k=1):
    return Pictures(items, Bytes(), 8, captions=k, train=True)


def mixed(folder, weights=(1, 1), table=0):
    """A mixture of shards, and of `table` files where that is not 0."""
    parts = [Part("tars", Shards(several(folder / "tars")), weights[0])]
    if table:
        Image.new("RGB", (6, 4)).save(folder / "a.png")
        rows = [Item(n, folder / "a.png", (f"file {n}",)) for n in range(table)]
        parts.append(Part("files", Table.of(rows), weights[1]))
    return Mixture(parts)


def stream(items, steps, batch=7, world=1, workers=0, start=0):
    """[(image id, caption)] in the order of the run, through the loaders of all processes."""
    shares = []
    for rank in range(world):
        loader = data.train_loader(pictures(items), batch, workers, rank, world, seed=5, start_step=start, steps=steps)
        share = [[(image_id, bytes(i for i in row.tolist() if i < 256).decode())
                  for image_id, row in zip(found["image_id"], found["ids"], strict=True)] for found in loader]
        data._end_workers(loader.batches)
        shares.append(share)
    assert {len(share) for share in shares} == {steps - start}
    return [shares[i % world][step][i // world] for step in range(steps - start) for i in range(batch)]


@pytest.mark.parametrize("table, weights", [(0, (1, 1)), (23, (0.5, 2)), (23, (2, 0.5))])
def test_epochs_are_complete_at_any_number_of_processes_and_workers(tmp_path, table, weights):
    """Shards of 5, 17, 1, 30 and 8 pictures, batches of 7. Also after a stop in the middle, and when a run goes on with
    another number of processes."""
    items = mixed(tmp_path, weights, table)
    n, steps = len(items), 3 * len(items) // 7 + 1
    assert n == (61 if not table else {0.5: 30, 2: 122}[weights[0]] + {0.5: 12, 2: 46}[weights[1]])
    whole = stream(items, steps)
    if not table:
        for epoch in range(3):
            part = whole[epoch * n : (epoch + 1) * n]
            assert sorted(int(text.split()[1]) for _, text in part) == list(range(61))
        assert whole[:n] != whole[n : 2 * n]
    else:
        count = Counter(image_id for image_id, _ in whole[: 2 * n])  # two epochs: one pass of 0.5, four of 2
        tars, files = ([k for name, k in count.items() if name.startswith(part)] for part in ("tars/", "files/"))
        expected = ([1] * 60, [4] * 23) if weights[0] == 0.5 else ([4] * 61, [1] * 22 + [2])  # 30 and 12 an epoch
        assert (sorted(tars), sorted(files)) == expected
    for world, workers in ((1, 2), (2, 0), (3, 0), (3, 2)) if not table else ((3, 0), (2, 2)):
        assert stream(items, steps, world=world, workers=workers) == whole, (world, workers)
    for world, workers, start in ((1, 0, 4), (1, 2, 11), (2, 0, steps - 2), (3, 2, 9)):
        assert stream(items, steps, world=world, workers=workers, start=start) == whole[start * 7 :]


def test_lanes():
    """Within a lane, positions of the stream modulo 16, the items of a range come one behind the other; all others by
    lot; each epoch is whole."""
    n, ranges = 250, [(0, 120), (150, 201)]
    for world, batch in ((1, 10), (4, 12)):
        shares = [list(TrainBatches(n, batch, rank, world, seed=3, steps=100, in_lanes=ranges))
                  for rank in range(world)]  # fmt: skip
        keys = [shares[i % world][step][i // world] for step in range(100) for i in range(batch)]
        for epoch in range(1, 3):
            row = [(place, index) for place, (e, index) in enumerate(keys) if e == epoch]
            assert sorted(index for _, index in row) == list(range(n))
            for start, stop in ranges:
                found = [[i for place, i in row if place % 16 == lane and start <= i < stop] for lane in range(16)]
                assert all(part == list(range(part[0], part[0] + len(part))) for part in found if part)
                assert sum(found, []) == list(range(start, stop))
            rest = [index for _, index in row if 201 <= index or 120 <= index < 150]
            assert sum(b == a + 1 for a, b in zip(rest, rest[1:], strict=False)) < 12
        assert [i for e, i in keys if e == 0] != [i for e, i in keys if e == 1]


@pytest.fixture
def opened(monkeypatch):
    """The (shard, number) of each place at which reading was begun."""
    places, original = [], Shards._open
    monkeypatch.setattr(Shards, "_open", lambda self, *at: places.append(at) or original(self, *at))
    return places


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_processes_open_shards_of_their_own(tmp_path, opened, world):
    files = several(tmp_path / "many", (4,) * 64)
    seen = []
    for rank in range(world):
        items = Mixture([Part("many", Shards(files))])
        opened.clear()
        batches = TrainBatches(len(items), 16, rank, world, seed=1, steps=16, in_lanes=items.in_lanes)
        read = [items.of_epoch(*key) for keys in batches for key in keys]
        assert len(read) == 256 // world
        seen.append({shard for shard, _ in opened})
        assert len(opened) <= 64 // world + 2 * 16 // world, "each once, or twice at an edge of a piece"
    assert set.union(*seen) == set(range(64))
    shared = [shard for shard, n in Counter(shard for part in seen for shard in part).items() if n > 1]
    assert len(shared) <= 15 * (world > 1)


def test_reading_goes_forwards(five, opened, monkeypatch):
    """Once into each shard, and no byte is looked for twice; in training once into each shard and lane."""
    list(five)
    assert opened == [(shard, 0) for shard in range(5)]
    assert not five.cursors, "a shard that has been read to its end is closed"
    opened.clear()
    items = Mixture([Part("five", five)])
    list(data.train_loader(pictures(items), 7, steps=8, seed=1))
    assert len(opened) <= 16 + 4, "several places of one shard do not disturb one another"
    for epoch in range(3):
        assert [items.of_epoch(epoch, i) for i in range(61)] == [five.of_pass(0, epoch, i) for i in range(61)]


def test_only_so_many_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "OPEN", 3)
    found = Shards(several(tmp_path / "many", (2,) * 6))
    files = []
    for index in range(0, 12, 2):
        found[index]
        files += [file for file, _ in found.cursors.values() if file not in files]
    assert len(files) == 6 and [file.closed for file in files] == [True] * 3 + [False] * 3


def read_some(found, indices, told):
    try:
        told.put([found[i].captions[0] for i in indices])
    except UserError as error:
        told.put(str(error))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_forked_processes_do_not_share_a_place(tmp_path):
    """The parent has read on; its children go on from there, and so does it."""
    found = Shards(several(tmp_path / "one", (400,)))
    assert numbers(found[:10]) == list(range(10))
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    children = [context.Process(target=read_some, args=(found, range(10, 200), told)) for _ in range(3)]
    for child in children:
        child.start()
    said = [told.get(timeout=60) for _ in children] + [[item.captions[0] for item in found[10:200]]]
    for child in children:
        child.join()
    assert said == [[f"picture {n}" for n in range(10, 200)]] * 4


def test_what_is_sent_to_a_worker_is_small(tmp_path):
    items = mixed(tmp_path)
    items[0], items[40]
    assert len(pickle.dumps(items)) < 3000
    assert [item.image_id for item in pickle.loads(pickle.dumps(items))] == [item.image_id for item in items]
    loader = data.train_loader(pictures(items), 7, workers=1, steps=3, seed=5)
    loader.batches.multiprocessing_context = "spawn"
    assert [found["image_id"] for found in loader] == [
        found["image_id"] for found in data.train_loader(pictures(items), 7, steps=3, seed=5)]  # fmt: skip


# What goes wrong on the way


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["gone", "other size", "cut"])
def test_a_shard_that_goes_while_it_is_read(tmp_path, workers, change):
    items = Mixture([Part("many", Shards(several(tmp_path / "many", (8,) * 30)))])
    loader = data.train_loader(pictures(items), 8, workers, steps=400)
    batches = iter(loader)
    next(batches)
    for file in Path(tmp_path / "many").glob("*.tar"):
        size = file.stat().st_size
        if change == "gone":
            file.unlink()
        else:
            with open(file, "r+b") as tar:
                tar.truncate(size + 512 if change == "other size" else size // 1024 * 512)
    what = {"gone": "No such file", "other size": "its size has changed", "cut": "size has changed|end|header"}[change]
    with pytest.raises(UserError, match=rf"many/000\d\d\.tar cannot be read any more at its picture \d+ \(.*({what}).*"
                                        r"\): put it back as it was, and go on with --resume"):  # fmt: skip
        list(batches)


def test_a_shard_that_ends_while_it_is_read(tmp_path):
    """Cut exactly between two pictures, which for a stream is as good an end as any."""
    (file,) = several(tmp_path / "one", (200,))
    found = Shards([file])
    found[0]
    with open(file, "r+b") as tar:
        tar.truncate(int(found.begins[0][100]))
    with pytest.raises(UserError, match=r"00000\.tar cannot be read any more at its picture 100 \(.+\): put it back"):
        [found[n] for n in range(1, 200)]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_ones_among_others_are_skipped_and_counted(tmp_path, workers, capsys):
    """An empty picture, one that is none, and captions that cannot be read; in a mixture with ten thousand files, of
    which one is empty. Nothing else is lost."""
    content = []
    for n in range(100):
        changed = {7: dict(jpg=b""), 8: dict(txt=b"\xff"), 50: dict(jpg=b"no picture")}.get(n, {})
        content += members((f"{n:04d}", sample(n, **changed)))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "empty.png").touch()
    rows = [Item(n, tmp_path / ("empty.png" if n == 4321 else "a.png"), (f"file {n}",)) for n in range(10_000)]
    tars = Part("tars", Shards([pack(tmp_path / "a.tar", content)]))
    items = Mixture([tars, Part("files", Table.of(rows))])
    loader = data.train_loader(pictures(items), 505, workers, steps=20)
    seen = []
    for batch in loader:
        seen += batch["image_id"]
        loader.judge(batch["bad"])
    assert len(seen) == len(set(seen)) == 10_100 - 4
    assert {f"tars/{n:04d}" for n in range(100)} - set(seen) == {"tars/0007", "tars/0008", "tars/0050"}
    told = sorted(loader.bad)
    assert len(told) == 4 and "empty.png: the file is empty" in told[3]
    assert "a.tar: 0007.jpg: the file is empty" in told[0] and "0050.jpg: not a picture" in told[2]
    assert "a.tar: 0008.jpg: its caption cannot be read ('utf-8' codec" in told[1]
    assert capsys.readouterr().err.count("skipped a picture that cannot be read") == 3
    data.tell_of_bad([loader])
    assert "4 training pictures could not be read" in capsys.readouterr().out


def test_evaluation_leaves_none_out(tmp_path):
    found = Shards([pack(tmp_path / "a.tar", members(("a", sample(0)), ("b", sample(1, txt=b"\xff"))))])
    with pytest.raises(UserError, match=r"evaluation stops at a picture that cannot be read: .*a\.tar: b\.jpg: its "):
        list(data.eval_loader(Pictures(found, Bytes(), 8), 2))


def test_texts_for_a_tokenizer_come_without_bad_ones(tmp_path):
    content = members(*((f"{n:02d}", sample(n, **({"txt": b""} if n % 10 == 3 else {}))) for n in range(50)))
    items = Mixture([Part("a", Shards([pack(tmp_path / "a.tar", content)]))])
    assert len(items.spread(100)) == 45 and numbers(items.spread(5)) == [0, 10, 20, 30, 40]
