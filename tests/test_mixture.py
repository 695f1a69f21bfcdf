"""Several data sets as one: what --data names, which items an epoch has and how often, a run on tars and files."""

import os
import pickle
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from papers import run, toy
from PIL import Image
from test_shards import Bytes, members, numbers, pack, sample, several

import common
import corpora
import data
import mixture
import regions
from common import UserError
from data import BadImage, Item
from mixture import Mixture, Part
from shards import Shards
from table import Table
from tools import export

N = dict(train=40, val=8, test=8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The small world as five data sets side by side, whose numbers say what is the same picture."""
    root = tmp_path_factory.mktemp("data")
    for name in ("coco", "vg", "flickr30k", "sbu", "cc3m"):
        export.export(name, root / name, **N, size=32, regions="npz" if name in ("coco", "vg", "cc3m") else "")
    return root


def config(spec, root="", **changed):
    settings = dict(data=str(spec), root=str(root), world="tiny", train_scenes=20, val_items=4, test_scenes=4, seed=0,
                    train_on="train", keep_test=False, quotes="csv", phrases=5, captions_per_image=1)  # fmt: skip
    return SimpleNamespace(**settings | changed)


def epoch(items, number):
    return [items.of_epoch(number, index) for index in range(len(items))]


def of_part(items, name):
    return [item for item in items if item.image_id.startswith(f"{name}/")]


def rows(folder, n, captions):
    """Items whose captions are their number and that of the caption."""
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    return Table.of([Item(i, folder / "a.png", tuple(f"{i} {c}" for c in range(captions))) for i in range(n)])


# What --data names


@pytest.mark.parametrize("spec, parts", [
    ("coco", [("coco", 1)]),
    ("coco,vg:0.5, cc3m:2", [("coco", 1), ("vg", 0.5), ("cc3m", 2)]),
    ("coco,a/{0,1}-{00..10}.tar:1e-1,b/*.tar", [("coco", 1), ("a/{0,1}-{00..10}.tar", 0.1), ("b/*.tar", 1)]),
    ("my,own:3", [("my", 1), ("own", 3)]),
])  # fmt: skip
def test_parts(spec, parts):
    assert corpora.parts_of(spec) == parts


def test_names_with_commas_and_colons_that_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c:2", "d:0.5.jsonl"):
        (tmp_path / name).touch()
    assert corpora.parts_of("a,b.jsonl") == [("a,b.jsonl", 1)]
    assert corpora.parts_of("c:2") == [("c:2", 1)] and corpora.parts_of("coco,c:2") == [("coco", 1), ("c:2", 1)]
    assert corpora.parts_of("c:2:3,d:0.5.jsonl") == [("c:2", 3), ("d:0.5.jsonl", 1)]


@pytest.mark.parametrize("spec", ["coco:0", "coco:-1,vg", "coco,vg:1e999", "coco:1.2.3", "coco:e", "coco,,vg", "", ","])
def test_wrong_parts(spec):
    with pytest.raises(UserError, match="a weight above 0 or without one, such as"):
        corpora.parts_of(spec)


def test_each_part_once():
    with pytest.raises(UserError, match="vg comes 3 times; name it once and give it a weight, vg:3"):
        corpora.parts_of("vg,coco,vg:2,vg")


@pytest.mark.parametrize("task, spec, told", [
    ("vqa", "vqa,vg", "--task vqa needs questions about pictures: --data scenes or vqa or vg, not vqa,vg"),
    ("nlvr2", "coco", "--data scenes or nlvr2 or nlvr1"),
    ("pretrain", "coco,vcr", "--data vcr has questions, no captions"),
    ("pretrain", "coco,scenes", "scenes is not for mixtures"),
    ("pretrain", "nocaps,coco", "nocaps is not for mixtures"),
    ("scst", "coco,vg", "--task scst needs several captions"),
    ("scst", "cc3m", "--task scst needs several captions"),
    ("scst", "x/{0..1}.tar", "--task scst needs several captions"),
])  # fmt: skip
def test_tasks_that_do_not_fit(task, spec, told):
    with pytest.raises(UserError, match=told):
        corpora.check_task(task, spec)


def test_tasks_that_fit():
    for task, spec in (("vqa", "vg"), ("pretrain", "coco,vg:0.5,x/{0..1}.tar"), ("scst", "coco"), ("vqa", "scenes")):
        corpora.check_task(task, spec)


def test_scenes_are_as_before():
    cfg = config("scenes", captions_per_image=5)
    corpus = mixture.of_run(cfg)
    expected = corpora.load("scenes", world="tiny", n_train=20, n_val=4, n_test=4)
    assert type(corpus.splits["train"]) is corpora.SceneItems and cfg.captions_per_image == 5
    assert {name: list(items) for name, items in corpus.splits.items()} == {
        name: list(items) for name, items in expected.splits.items()}  # fmt: skip
    assert mixture.of_run(config("scenes", train_scenes=80), "vqa").answers


def test_flags_reach_the_loaders(tmp_path, monkeypatch, root):
    asked, original = [], corpora.load
    monkeypatch.setattr(corpora, "load", lambda *args, **named: asked.append((args, named)) or original(*args, **named))
    tars = several(tmp_path / "tars", (2, 2))[0].parent / "{00000..00001}.tar"
    flags = dict(keep_test=True, quotes="none", train_on="train+val")
    mixture.of_run(config(f"cc3m,{tars}", root, **flags))
    flags |= dict(task="caption")
    assert asked == [(("cc3m", root / "cc3m"), flags), ((str(tars), None), flags)]
    asked.clear()
    mixture.of_run(config("vg", root / "vg", keep_test=True))
    assert asked[0][0] == ("vg", str(root / "vg")) and asked[0][1]["keep_test"]
    monkeypatch.chdir(root.parent)
    monkeypatch.setattr(corpora, "load", lambda name, place, **named: asked.append(place) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mixture.of_run(config("coco,vg"))
    assert str(asked[-1]) == "data/coco"


def test_what_cannot_be_mixed(tmp_path, root):
    with pytest.raises(UserError, match="--data cc3m:2: a weight is for one data set of several"):
        mixture.of_run(config("cc3m:2", root / "cc3m"))
    loaded = [(corpora.load(name, root / name), 1.0) for name in ("cc3m", "coco")]
    with pytest.raises(UserError, match="2 data sets are called cc3m; give one of the folders"):
        mixture.mixed([*loaded[:1], *loaded], seed=0)
    del loaded[1][0].splits["train"]
    with pytest.raises(UserError, match="coco has no train split to be mixed; leave it out"):
        mixture.mixed(loaded)


# Which items, how often


@pytest.mark.parametrize("weight", [0.3, 0.5, 1, 1.7, 2, 7])
def test_shares_are_exact(tmp_path, weight):
    """An epoch has weight x n items of a part; over several, no item comes more than once oftener than another, and
    within a pass none comes twice."""
    tars = Shards(several(tmp_path / "tars", (5, 9)))
    for n, part in ((17, Part("a", rows(tmp_path, 17, 1), weight)), (14, Part("b", tars, weight))):
        assert part.n == round(weight * n) and part.in_a_pass == n
        items = Mixture([part, Part("c", rows(tmp_path, 3, 1))])
        counts = Counter(item.image_id for e in range(10) for item in epoch(items, e))
        found = [counts[item.image_id] for item in of_part(epoch(items, 0), part.name)]
        assert len(items) == part.n + 3 and sum(counts.values()) == 10 * len(items)
        assert {k for name, k in counts.items() if name[0] == "c"} == {10}
        assert max(found) <= -(-10 * part.n // n) and len([k for k in counts if k[0] != "c"]) == n
        for number in range(3):
            assert len({part.item(number * n + place).image_id for place in range(n)}) == n


def test_half_comes_in_two_epochs(tmp_path):
    items = Mixture([Part("a", rows(tmp_path, 40, 1), 0.5), Part("b", rows(tmp_path, 6, 3), 0.5)])
    assert len(items) == 20 + 9
    for first in (0, 2, 10):
        both = epoch(items, first) + epoch(items, first + 1)
        assert max(Counter(both).values()) == 1 and len(both) == 40 + 18
    assert epoch(items, 0) != epoch(items, 2) and list(items) == epoch(items, 0)
    orders = [[item.image_id for item in epoch(items, e)] for e in (0, 2)]
    assert orders[0] != orders[1], "each pass begins elsewhere"


def test_every_caption_of_coco_once_and_some_phrases_of_vg(root):
    corpus = mixture.of_run(config("coco,vg", root, phrases=3))
    items = corpus.splits["train"]
    coco = corpora.load("coco", root / "coco").splits["train"]
    vg = {f"vg/{item.image_id}": item for item in corpora.load("vg", root / "vg").splits["train"]}
    said = {}
    for number in range(4):
        found = epoch(items, number)
        assert Counter((item.image_id, *item.captions) for item in of_part(found, "coco")) == Counter(
            (f"coco/{item.image_id}", text) for item in coco for text in item.captions)  # fmt: skip
        phrases = {}
        for item in of_part(found, "vg"):
            assert item.image == vg[item.image_id].image and len(item.captions) == 1
            phrases.setdefault(item.image_id, []).extend(item.captions)
        assert phrases.keys() == vg.keys()
        for name, texts in phrases.items():
            assert len(texts) == len(set(texts)) == min(3, len(vg[name].captions))
            assert set(texts) <= {*vg[name].captions}
            said.setdefault(name, []).append(frozenset(texts))
    assert sum(len(set(passes)) > 1 for passes in said.values()) > 0.9 * len(said), "others in the next pass"


@pytest.mark.parametrize("captions, most, groups", [(5, 0, [2, 2, 1]), (5, 3, [2, 1]), (2, 0, [2]), (1, 0, [1])])
def test_groups_of_captions(tmp_path, captions, most, groups):
    part = Part("a", rows(tmp_path, 7, captions), captions=2, most=most)
    assert part.n == 7 * len(groups)
    passes = []
    for number in range(2):
        found = {}
        for place in range(part.n):
            item = part.item(number * part.n + place)
            assert all(text.startswith(f"{item.image_id} ") for text in item.captions)
            found.setdefault(item.image_id, []).append(item.captions)
        assert all(sorted(map(len, said), reverse=True) == groups for said in found.values()) and len(found) == 7
        texts = [text for said in found.values() for one in said for text in one]
        assert len(set(texts)) == len(texts), "no caption twice in a pass"
        passes.append({name: sorted(said) for name, said in found.items()})
    assert captions < 3 or passes[0] != passes[1]


def test_captions_per_image_are_as_many_as_all_have(tmp_path, root):
    for spec, asked, given in (("coco,vg", 5, 5), ("coco,vg", 2, 2), ("coco,cc3m", 5, 1)):
        cfg = config(spec, root, phrases=5, captions_per_image=asked)
        corpus = mixture.of_run(cfg)
        assert cfg.captions_per_image == given
        assert any("captions per picture: 1, not 5" in note for note in corpus.notes) == (asked > given)
        assert max(len(item.captions) for item in corpus.splits["train"]) == given
    cfg = config("coco,vg", root, phrases=3, captions_per_image=5)
    mixture.of_run(cfg)
    assert cfg.captions_per_image == 3


def test_names_splits_and_notes(tmp_path, root):
    tars = several(tmp_path / "tars", (2, 2))[0].parent
    corpus = mixture.of_run(config(f"coco:2,cc3m,{tars}/{{00000..00001}}.tar", root))
    coco = corpora.load("coco", root / "coco")
    assert corpus.name == "coco+cc3m+tars" and list(corpus.splits) == ["train", "val", "test"]
    assert corpus.splits["val"] == coco.splits["val"] and corpus.splits["test"] == coco.splits["test"]
    train = corpus.splits["train"]
    n = [2 * sum(len(item.captions) for item in coco.splits["train"]), 36, 4]
    assert [part.n for part in train.parts] == n and train.in_lanes == [(sum(n[:2]), sum(n))]
    found = epoch(train, 1)
    assert [len(of_part(found, name)) for name in ("coco", "cc3m", "tars")] == n
    assert {item.image_id for item in of_part(found, "tars")} == {f"tars/{k:09d}" for k in (0, 1, 10000, 10001)}
    named = {f"coco/{item.image_id}" for item in coco.splits["train"]}
    assert {item.image_id for item in of_part(found, "coco")} == named
    assert any(note == f"cc3m: 36 pictures, 36 items an epoch ({36 / sum(n):.1%})." for note in corpus.notes)
    assert corpus.notes[-1] == "val and test are coco's." and not any("has no val" in note for note in corpus.notes)


def test_one_part_keeps_its_ids(root):
    corpus = mixture.of_run(config("cc3m", root / "cc3m"))
    train = corpora.load("cc3m", root / "cc3m").splits["train"]
    assert sorted(item.image_id for item in epoch(corpus.splits["train"], 3)) == [item.image_id for item in train]
    assert len(corpus.splits["val"]) == 8 and len(pickle.dumps(corpus.splits["train"])) < 3000


def test_texts_of_a_tokenizer_are_from_all_parts(root):
    items = mixture.of_run(config("coco,cc3m", root)).splits["train"]
    assert {item.image_id.split("/")[0] for item in corpora.first_of(items, 12)} == {"coco", "cc3m"}
    assert len(items.spread(12)) == 12 and items.spread(10**6) == items[:]


@pytest.mark.parametrize("keep_test", [False, True])
def test_nothing_is_trained_on_that_is_tested(root, keep_test):
    """The same numbers in all exports are the same pictures, byte for byte; Visual Genome says of some of its own which
    they are, by COCO's and by Flickr's numbers. With --keep-test they are there: so this can fail."""
    corpus = mixture.of_run(config("coco,vg,flickr30k,sbu", root, keep_test=keep_test))
    held, photos, shown = set(), set(), set()
    for name in ("coco", "flickr30k"):
        for split in ("val", "test"):
            for item in corpora.load(name, root / name).splits[split]:
                shown.add(item.image.read_bytes())
                held |= {item.image_id} if name == "coco" else set()
                photos |= {int(item.image.stem)} if name == "flickr30k" else set()
    assert len(held) == len(photos) == 16 == len(shown)
    leaks = set()
    for number in range(6):
        for item in epoch(corpus.splits["train"], number):
            name, own = item.image_id.split("/")
            by_number = int(own) in held and int(own) % 2 or int(own) - 1 + export.FIRST_FILE in photos and (
                int(own) % 3 == 1)  # fmt: skip
            if by_number if name == "vg" else item.image.read_bytes() in shown:
                leaks.add(item.image_id)
    assert {leak.split("/")[0] for leak in leaks} == ({"vg", "sbu"} if keep_test else set())


# Regions


def test_regions_of_each_picture(tmp_path, root):
    """Each part's own files, also where two parts have the same numbers; val and test are the first one's."""
    tars, name = tmp_path / "my.tars", "{0000..0001}.tar"
    tars.mkdir()
    (tars / "regions").mkdir()
    for shard in range(2):
        pack(tars / f"000{shard}.tar", members(*((f"{10 * shard + n}", sample(n)) for n in range(1, 8))))
        for n in range(1, 8):
            shutil.copy(root / "coco" / "regions" / f"{n + 30}.npz", tars / "regions" / f"{10 * shard + n}.npz")
    cfg = config(f"coco,vg,{tars / name}", root, regions="files", max_regions=0, mirror=0.0, feature_dim=0,
                 region_classes=0, task="pretrain")  # fmt: skip
    corpus = mixture.of_run(cfg)
    regions.attach(corpus, cfg)
    train = data.Pictures(corpus.splits["train"], Bytes(), 32, captions=1, train=True, regions=corpus.regions)
    folders = {"coco": root / "coco", "vg": root / "vg", "my.tars": tars}
    seen = set()
    for batch in data.train_loader(train, 20, workers=2, steps=len(train) // 20):
        assert not batch["bad"]
        for image_id, found, keep in zip(batch["image_id"], batch["regions"], batch["regions_keep_mask"], strict=True):
            part, own = image_id.split("/")
            expected = regions.read_npz(folders[part] / "regions" / f"{own}.npz")
            assert np.array_equal(found[keep].numpy(), expected.features), image_id
            seen.add(part)
    assert seen == set(folders) and cfg.region_classes and corpus.regions.note == ""
    val = corpus.splits["val"][0]
    found = corpus.regions(val.image_id, val.image)
    assert np.array_equal(found.boxes, regions.read_npz(root / "coco" / "regions" / f"{val.image_id}.npz").boxes)
    with pytest.raises(BadImage, match=r"coco/regions/other/1\.npz: no such region file"):
        corpus.regions("other/1", "x.jpg")  # of own data in folders, were it the first
    corpus.regions.n_classes = 3  # of a file with another number
    with pytest.raises(BadImage, match="3 are expected"):
        corpus.regions("vg/1", "x.jpg")


def test_regions_say_what_a_part_lacks(tmp_path):
    export.export("coco", tmp_path / "coco", **N, size=32, regions="tsv")
    export.export("cc3m", tmp_path / "cc3m", **N, size=32, regions="npz")
    cfg = config("cc3m,coco", tmp_path, regions="files", max_regions=0, mirror=0.0, feature_dim=0, region_classes=0,
                 task="pretrain")  # fmt: skip
    corpus = mixture.of_run(cfg)
    regions.attach(corpus, cfg)
    assert "no class probabilities" in corpus.notes[-1] and not corpus.regions.mirrors
    shutil.rmtree(tmp_path / "coco" / "regions")
    with pytest.raises(UserError, match="no region files: .*coco/regions is not there"):
        regions.attach(corpus, cfg)


def test_regions_of_shards_with_a_bad_caption(tmp_path):
    file = pack(tmp_path / "a.tar", members(("a", sample(0, txt=b"\xff")), ("b", sample(1))))
    cfg = config(file, regions="grid", max_regions=0, mirror=0.0, feature_dim=0, region_classes=0, task="pretrain")
    corpus = mixture.of_run(cfg)
    regions.attach(corpus, cfg)
    assert cfg.feature_dim == 768


# A run


def test_a_run_on_files_and_tars_goes_on_bit_for_bit(tmp_path, root, monkeypatch):
    """Stopped in its second step and resumed with workers, as if it had never been stopped."""
    several(tmp_path / "tars", (9, 4, 12))
    flags = ["--preset", "tiny", "--data", f"coco,{tmp_path}/tars/{{00000..00002}}.tar", "--root", root, "--steps", 4,
             "--eval-every", 4, "--log-every", 1, "--dropout", 0.1, "--augment", "crop", "--vocab-size", 400]
    run("vcgpt", *toy("vcgpt", *flags, "--out", tmp_path / "whole"))
    original = common.Logger.step

    def log(self, number, *args, **named):
        original(self, number, *args, **named)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(common.Logger, "step", log)
    with pytest.raises(common.Stopped):
        run("vcgpt", *toy("vcgpt", *flags, "--out", tmp_path / "run"))
    assert (tmp_path / "run" / "last").resolve().name == "step_3"
    monkeypatch.undo()
    run("vcgpt", "--resume", tmp_path / "run", "--workers", 2, "--device", "cpu")
    a, b = (common.read_tensors(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "run"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    logs = [[line.split('"samples_per_s"')[0] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "run")]  # fmt: skip
    assert logs[0] == logs[1] and numbers(Shards([tmp_path / "tars" / "00001.tar"])) == [9, 10, 11, 12]
