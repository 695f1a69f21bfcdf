"""tools/shards.py: what pack writes is read back with tarfile and webdataset; what resize writes, as the loaders do."""

import hashlib
import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

import corpora
import data
from common import UserError
from tools import export, shards


def drawn(width, height, seed=0):
    """A smooth picture, bright at the left and dark at the right, so that a turn shows. uint8 [height, width, 3]"""
    tint = np.random.default_rng(seed).uniform(0.6, 1, 3)
    fall = np.linspace(230, 40, width)[None, :, None] * np.linspace(1, 0.8, height)[:, None, None]
    return (fall * tint).astype(np.uint8)


def picture(width=60, height=40, seed=0):
    return Image.fromarray(drawn(width, height, seed))


def captions_of(i):
    return [f"picture number {i}", f"again {i}, schön"]


@pytest.fixture
def webdataset():
    return pytest.importorskip("webdataset", reason="pip install webdataset")


@pytest.fixture
def own(tmp_path, webdataset):
    """Own data: 23 JPEGs of 60 x 40, one of them also as PNG and one as WebP and BMP -> its .jsonl."""
    folder = tmp_path / "own"
    folder.mkdir()
    names = [f"p{i:02}.jpg" for i in range(20)] + ["a.png", "b.webp", "c.bmp"]
    lines = []
    for i, name in enumerate(names):
        picture(seed=i).save(folder / name, quality=80 + i % 10)
        lines.append(json.dumps({"image": name, "captions": captions_of(i), "split": "val" if i == 19 else "train"}))
    (folder / "own.jsonl").write_text("\n".join(lines))
    return folder / "own.jsonl"


def members(tar):
    with tarfile.open(tar) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}


def unpacked(folder):
    """image id -> (what its .json says, name of its picture, the picture's bytes, its .txt)"""
    found = {}
    for tar in sorted(folder.glob("*.tar")):
        content = members(tar)
        for name in [name for name in content if name.endswith(".json")]:
            about, key = json.loads(content[name]), name.split(".")[0]
            image = next(n for n in content if n.startswith(key) and n.split(".")[1] not in ("json", "txt"))
            found[about["image_id"]] = about, image, content[image], content[f"{key}.txt"].decode()
    return found


def looks(image):
    """Mean colour of the left and the right half of a picture, as the loaders see it."""
    pixels = np.asarray(data.load_image(image, 0), dtype=float)
    half = pixels.shape[1] // 2
    return np.stack([pixels[:, :half].mean((0, 1)), pixels[:, -half:].mean((0, 1))])


# ---------------------------------------------------------------------------------------------------------------------
# pack


def test_round_trip(own, tmp_path):
    tars, n = shards.pack(str(own), tmp_path / "out", per_shard=10)
    assert n == 22 and [tar.name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    items, found = corpora.load(str(own)).splits["train"], unpacked(tmp_path / "out")
    assert set(found) == {item.image_id for item in items}
    for item in items:
        about, name, content, text = found[item.image_id]
        assert about["captions"] == list(item.captions) and about["caption"] == text == item.captions[0]
        assert about["key"] == name.split(".")[0] and about["status"] == "success"
        assert [about[k] for k in ("width", "height", "original_width", "original_height")] == [60, 40, 60, 40]
        ending = {".bmp": "jpg"}.get(item.image.suffix, item.image.suffix[1:])
        assert name.endswith("." + ending)
        if item.image.suffix == ".bmp":  # shards do not take it
            np.testing.assert_allclose(looks_of(content), looks(item.image), atol=3)
        else:
            assert content == item.image.read_bytes()


def looks_of(content):
    return looks(Image.open(io.BytesIO(content)))


def test_webdataset_reads_them(own, tmp_path, webdataset):
    tars, _ = shards.pack(str(own), tmp_path / "out", per_shard=10)
    read = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))
    assert len(read) == 22 and all({"json", "txt"} < set(sample) for sample in read)


def test_the_form_of_img2dataset(own, tmp_path):
    shards.pack(str(own), tmp_path / "out", per_shard=10)
    for number, count in enumerate((10, 10, 2)):
        keys = [name.split(".")[0] for name in members(tmp_path / f"out/0000{number}.tar")]
        # three members in a row, keys of five digits of the shard and those of the place
        assert keys == [f"0000{number}{i}" for i in range(count) for _ in range(3)]
        stats = json.loads((tmp_path / f"out/0000{number}_stats.json").read_text())
        assert stats == {"count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0,
                         "status_dict": {"success": count}}  # fmt: skip
    shards.pack(str(own), tmp_path / "nine")
    assert min(members(tmp_path / "nine/00000.tar")).split(".")[0] == "000000000"


def test_the_order_is_drawn_and_the_bytes_are_not(own, tmp_path):
    def digests(out, **how):
        return [hashlib.sha256(tar.read_bytes()).hexdigest() for tar in shards.pack(str(own), tmp_path / out, **how)[0]]

    first = digests("a", per_shard=10, short=20)
    assert digests("b", per_shard=10, short=20, workers=2) == first
    assert digests("c", per_shard=10, short=20, seed=1) != first
    with tarfile.open(tmp_path / "a/00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}
    order = [about["image_id"] for about, *_ in unpacked(tmp_path / "a").values()]
    ids = [item.image_id for item in corpora.load(str(own)).splits["train"]]
    assert order != ids and sorted(order) == sorted(ids)
    assert not {order.index(a) - order.index(b) for a, b in zip(ids, ids[1:], strict=False)} <= {1, -1}


def test_pack_makes_smaller(own, tmp_path):
    Image.fromarray(drawn(41, 90)).save(own.parent / "p00.jpg")
    exif = Image.Exif()
    exif[data.ORIENTATION] = 6
    Image.fromarray(drawn(61, 43)).save(own.parent / "p01.jpg", exif=exif)
    picture(30, 18).save(own.parent / "a.png")
    shards.pack(str(own), tmp_path / "out", short=20)
    found = unpacked(tmp_path / "out")
    for name, size, original in (("p00.jpg", (20, 43), (41, 90)), ("p01.jpg", (20, 28), (43, 61)),
                                 ("p02.jpg", (30, 20), (60, 40)), ("a.png", (30, 18), (30, 18))):  # fmt: skip
        about, _, content, _ = found[name]
        assert Image.open(io.BytesIO(content)).size == size == (about["width"], about["height"])
        assert (about["original_width"], about["original_height"]) == original
        np.testing.assert_allclose(looks_of(content), looks(own.parent / name), atol=4)
    assert found["a.png"][2] == (own.parent / "a.png").read_bytes() and found["b.webp"][1].endswith(".jpg")


def test_broken_pictures_are_left_out_and_named(own, tmp_path, capsys):
    whole = (own.parent / "p03.jpg").read_bytes()
    (own.parent / "p03.jpg").write_bytes(whole[: len(whole) // 2])
    (own.parent / "p04.jpg").write_bytes(b"")
    for how in ({}, {"short": 20, "workers": 2}):
        _, n = shards.pack(str(own), tmp_path / f"out{len(how)}", per_shard=50, **how)
        said = capsys.readouterr().err
        assert n == 20 and "p03.jpg: OSError" in said and "p04.jpg: not a picture" in said
        assert not {"p03.jpg", "p04.jpg"} & set(unpacked(tmp_path / f"out{len(how)}"))
        stats = json.loads((tmp_path / f"out{len(how)}/00000_stats.json").read_text())
        assert (stats["count"], stats["successes"], stats["failed_to_resize"]) == (22, 20, 2)
        assert stats["status_dict"] == {"success": 20, "failed_to_resize": 2}
    for i in range(5, 14):  # eleven of 22
        (own.parent / f"p{i:02}.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="11 of the first .* cannot be read"):
        shards.pack(str(own), tmp_path / "many")
    assert capsys.readouterr().err.count("left out a picture") == 3
    assert sorted(os.listdir(tmp_path)) == ["out0", "out2", "own"]  # nothing unfinished lies about


def test_pack_refuses(own, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for match, flags in (
        ("tools/export.py", {"name": "scenes"}), ("is there already", {"out": tmp_path / "full"}),
        ("no split 'test'; it has train, val", {"split": "test"}), ("--per-shard 0", {"per_shard": 0}),
        ("--short -1", {"short": -1}), ("--quality 96", {"quality": 96}), ("--workers 0", {"workers": 0}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            shards.pack(**{"name": str(own), "out": tmp_path / "out", **flags})
    export.export("snli_ve", tmp_path / "ve", train=3, val=3, test=3, size=16, world="full")
    with pytest.raises(UserError, match="of another kind"):
        shards.pack("snli_ve", tmp_path / "out", root=str(tmp_path / "ve"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "webdataset", None)
        with pytest.raises(UserError, match="pip install webdataset"):
            shards.pack(str(own), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_items_are_asked_for_one_by_one(own, tmp_path, monkeypatch):
    items = corpora.load(str(own)).splits["train"]

    class Lazy:
        def __len__(self):
            return len(items)

        def __getitem__(self, index):
            assert isinstance(index, int) and index < len(items)
            return items[index]

        __iter__ = None  # list() of it would fail

    corpus = data.Corpus("lazy", {"train": Lazy(), "server_test": [data.Item("untold", items[0].image, ())]})
    monkeypatch.setattr(corpora, "load", lambda *_: corpus)
    assert shards.pack("lazy", tmp_path / "out")[1] == 22
    with pytest.raises(UserError, match="no split 'val'; it has train, server_test$"):
        shards.pack("lazy", tmp_path / "none", split="val")
    with pytest.raises(UserError, match="image untold has no caption"):
        shards.pack("lazy", tmp_path / "none", split="server_test")


def test_an_official_layout_and_the_command(tmp_path, capsys, webdataset):
    export.export("coco", tmp_path / "coco", train=8, val=2, test=2, size=16)
    shards.main(["pack", "coco", str(tmp_path / "out"), "--root", str(tmp_path / "coco"), "--per-shard", "4",
                 "--workers", "1"])  # fmt: skip
    said = capsys.readouterr().out
    assert "8 pictures in 2 shards" in said and "00001.tar: 4 pictures; 8 of 8 seen" in said
    for command in ("python data.py check", "python tden.py --data"):
        assert f'{command} "{tmp_path / "out"}/{{00000..00001}}.tar"' in said
    assert set(unpacked(tmp_path / "out")) == set(range(1, 9))  # COCO's ids stay numbers


# ---------------------------------------------------------------------------------------------------------------------
# resize


@pytest.fixture
def kinds(tmp_path):
    """A folder with pictures of every kind above 20 pixels, and what is no picture."""
    folder = tmp_path / "from"
    for below in ("deep/0000", "regions", "regions_boxes", "index"):
        (folder / below).mkdir(parents=True)
    exif = Image.Exif()
    exif[data.ORIENTATION] = 8
    rgb, grey = picture(), picture().convert("L")
    rgb.save(folder / "plain.jpg")
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    grey.save(folder / "grey.jpg")
    rgb.save(folder / "rgb.png")
    rgb.quantize(64).save(folder / "palette.png")
    Image.merge("RGBA", [*rgb.split(), grey.point(lambda v: 255 if v > 100 else 0)]).save(folder / "alpha.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "sixteen.png")
    rgb.save(folder / "deep/moving.gif")
    rgb.save(folder / "deep/0000/0000123", "JPEG")
    picture(900, 700).save(folder / "large.jpg", quality=95)  # draft() works on it
    picture(30, 20).save(folder / "small.png")
    picture(20, 30).save(folder / "small.gif")
    rgb.save(folder / "named.txt", "JPEG")  # by its name no picture
    (folder / "captions.jsonl").write_text('{"image": "plain.jpg", "caption": "a fall of light"}\n')
    (folder / "README").write_text("no picture")
    for aside in ("regions/1.npz", "regions_boxes/1.npz", "index/x.jpg"):
        (folder / aside).touch()
    return folder


def files_of(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_every_kind_of_picture(kinds, tmp_path, capsys):
    shards.resize(kinds, tmp_path / "to", 20)
    said = capsys.readouterr().out
    assert "13 pictures, 11 made smaller, 0 that cannot" in said and "left out" in said and "index, regions" in said
    assert files_of(tmp_path / "to") - {"resized.json"} == {
        name for name in files_of(kinds) if not name.startswith(("regions", "index"))}  # fmt: skip
    for name in sorted(files_of(tmp_path / "to") - {"resized.json"}):
        before, after = kinds / name, tmp_path / "to" / name
        if name in ("captions.jsonl", "README", "small.png", "small.gif", "named.txt"):
            assert after.read_bytes() == before.read_bytes(), name
            continue
        (width, height), small = data.load_image(before, 0).size, data.load_image(after, 0)
        assert small.size == (int(width * 20 / min(width, height)), int(height * 20 / min(width, height))), name
        np.testing.assert_allclose(looks(after), looks(before), atol=4, err_msg=name)
        assert Image.open(after).format == "JPEG", name
    assert data.load_image(tmp_path / "to/turned.jpg", 0).size == (20, 30)
    assert corpora.load(str(tmp_path / "to/captions.jsonl")).splits["train"][0].image_id == "plain.jpg"


def test_what_is_there_is_not_touched(kinds, tmp_path, capsys, monkeypatch):
    to = tmp_path / "to"
    shards.resize(kinds, to, 20)
    whole = {name: (to / name).read_bytes() for name in files_of(to)}
    (to / "plain.jpg").write_bytes(b"mine")  # stands for a file that was written before
    (to / "grey.jpg").unlink()
    (to / ".grey.jpg.part").write_bytes(b"half")  # and this for one that was being written
    shards.resize(kinds, to, 20)
    assert (to / "plain.jpg").read_bytes() == b"mine" and (to / "grey.jpg").read_bytes() == whole["grey.jpg"]
    assert files_of(to) == set(whole)
    assert "1 pictures, 1 made smaller" in (said := capsys.readouterr().out) and "15 files were there already" in said

    def killed(*_):
        raise KeyboardInterrupt

    (to / "cmyk.jpg").unlink()
    monkeypatch.setattr("pathlib.Path.replace", killed)
    monkeypatch.setattr("common.write_json", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        shards.resize(kinds, to, 20)
    assert not (to / "cmyk.jpg").exists()  # what has stopped is not taken for whole


def test_broken_pictures_are_copied_and_named(kinds, tmp_path, capsys):
    half = (kinds / "large.jpg").read_bytes()[:3000]
    for name in ("large.jpg", "deep/0000/0000124", "x.JPG"):
        (kinds / name).write_bytes(half)
    (kinds / "deep/0000/0000125").write_bytes(b"nothing")
    (kinds / "gone.jpg").symlink_to(kinds / "nowhere.jpg")
    shards.resize(kinds, tmp_path / "to", 20, workers=2)
    said = capsys.readouterr()
    assert "5 that cannot be read" in said.out and said.err.count("copied as it is") == 3
    assert (tmp_path / "to/large.jpg").read_bytes() == (tmp_path / "to/x.JPG").read_bytes() == half


def test_shards_are_rewritten(own, tmp_path, capsys):
    tars, _ = shards.pack(str(own), tmp_path / "tars", per_shard=10)
    cuts = [tmp_path / "tars/00008.tar", tmp_path / "tars/00009.tar"]
    for cut, size in zip(cuts, (2000, 1024), strict=True):  # within the second header, within the first picture
        cut.write_bytes(tars[0].read_bytes()[:size])
    shards.main(["resize", str(tmp_path / "tars"), str(tmp_path / "to"), "--short", "20", "--workers", "2"])
    said = capsys.readouterr()
    assert "00008.tar: it is cut" in said.err and "00009.tar: unexpected end" in said.err
    assert f"--data {tmp_path / 'to'}\n" in said.out and "22 made smaller" in said.out
    assert files_of(tmp_path / "to") - {"resized.json"} == files_of(tmp_path / "tars")
    assert all((tmp_path / "to" / cut.name).read_bytes() == cut.read_bytes() for cut in cuts)
    for tar in tars:
        before, after = members(tar), members(tmp_path / "to" / tar.name)
        assert list(before) == list(after)
        for name in before:
            if name.endswith((".json", ".txt")):
                assert before[name] == after[name]
            else:
                assert Image.open(io.BytesIO(after[name])).size == (30, 20)
                np.testing.assert_allclose(looks_of(after[name]), looks_of(before[name]), atol=4)


def test_links_are_followed_but_not_in_circles(kinds, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    picture().save(tmp_path / "elsewhere/far.jpg")
    (kinds / "train2014").symlink_to(tmp_path / "elsewhere")
    (kinds / "deep/back").symlink_to(kinds)
    shards.resize(kinds, tmp_path / "to", 20)
    assert Image.open(tmp_path / "to/train2014/far.jpg").size == (30, 20) and not (tmp_path / "to/deep/back").exists()


def test_quality_and_a_second_time(kinds, tmp_path):
    for quality in (60, 90):
        shards.resize(kinds, tmp_path / f"q{quality}", 20, quality)
    assert (tmp_path / "q60/large.jpg").stat().st_size < (tmp_path / "q90/large.jpg").stat().st_size
    shards.resize(tmp_path / "q90", tmp_path / "again", 10)  # whose own record is not copied over the new one
    assert json.loads((tmp_path / "again/resized.json").read_text())["short"] == 10


def test_stripes_become_grey(tmp_path):
    stripes = np.zeros((40, 60, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(file := tmp_path / "stripes.png")
    pixels = np.asarray(data.load_image(Image.open(io.BytesIO(shards.fit(file, file, 10, 90).content)), 0), dtype=float)
    assert abs(pixels[2:-2, 2:-2] - 127.5).max() < 15  # with antialiasing; without, black or white


def test_very_long_pictures_keep_their_bytes(tmp_path):
    file = tmp_path / "long.png"  # JPEG could not hold it
    Image.new("RGB", (100_000, 12)).save(file)
    assert shards.fit(file, file, 11, 90, any_format=True).content is None


def test_resize_refuses(kinds, tmp_path):
    to = tmp_path / "to"
    for match, source, target, more in (
        ("lies in the other", kinds, kinds, {}), ("lies in the other", kinds, kinds / "below", {}),
        ("lies in the other", kinds, tmp_path, {}), ("is no folder", kinds / "rgb.png", to, {}),
        ("--short 0", kinds, to, {"short": 0}), ("--quality 0", kinds, to, {"quality": 0}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            shards.resize(source, target, **{"short": 20, **more})
    assert not to.exists() and not (kinds / "below").exists()
    to.mkdir()
    shards.resize(kinds, to, 20)
    for more in ({"short": 21}, {"short": 20, "quality": 80}):
        with pytest.raises(UserError, match="was made with"):
            shards.resize(kinds, to, **more)
    (to / "resized.json").unlink()
    with pytest.raises(UserError, match="not by this command"):
        shards.resize(kinds, to, 20)
    (kinds / "vcr1images/movie").mkdir(parents=True)
    for source in (kinds, kinds / "vcr1images"):
        with pytest.raises(UserError, match="VCR's boxes"):
            shards.resize(source, tmp_path / "vcr", 20)
    assert not (tmp_path / "vcr").exists()
