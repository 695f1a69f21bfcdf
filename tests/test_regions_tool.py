"""tools/regions.py with a MobileNet detector of random weights on small pictures; nothing is downloaded."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
from common import Stopped, UserError
from data import Choice, Corpus, Example, Item
from tools import regions

TOOL = Path(regions.__file__)
MOBILE, C, D = "fasterrcnn_mobilenet_v3_large_fpn", 12, 1024
QUICK = ["--detector", MOBILE, "--size", "64", "--workers", "0", "--device", "cpu", "--min", "3", "--max", "20"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights, scaled so that classes stand out and some regions reach the threshold."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(MOBILE, weights=None, weights_backbone=None, num_classes=C)
    # random statistics instead of 0 and 1, so that a zero of the padding is not a zero of the maps
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    state = model.state_dict()
    state[regions.CLASS_HEAD] *= 10
    for key in state:
        if "fpn" in key and key.endswith("weight"):
            state[key] *= 2
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def load_once(weights):
    """One network for all runs with that file: building it takes longer than a few pictures."""
    load, kept = regions.load_detector, {}

    def load_or_take(name, path, sha256, size):
        if str(path) != weights:
            return load(name, path, sha256, size)
        if (name, size) not in kept:
            kept[name, size] = load(name, path, sha256, size)
        return kept[name, size]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for such small pictures, threads cost more than they give
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "load_detector", load_or_take)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(weights):
    return regions.load_detector(MOBILE, Path(weights), "", 64)


def photo(seed, width=96, height=64):
    """Coloured rectangles on noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    for _ in range(4):
        x, y = rng.integers(0, width - 6), rng.integers(0, height - 6)
        pixels[y : y + rng.integers(6, 30), x : x + rng.integers(6, 30)] = rng.integers(60, 255, 3)
    return Image.fromarray(pixels)


def own_data(folder, pictures):
    """{name: Image or bytes} -> the .jsonl."""
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(picture, bytes):
            (folder / name).write_bytes(picture)
        else:
            picture.save(folder / name)
    rows = [json.dumps({"image": name, "caption": "a picture", "split": "train"}) for name in pictures]
    (folder / "photos.jsonl").write_text("\n".join(rows))
    return str(folder / "photos.jsonl")


def read(file):
    with np.load(file) as arrays:  # allow_pickle is off: no objects in there
        return dict(arrays)


def files_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def npz(folder):
    return {name: read(folder / name) for name in files_below(folder) if name.endswith(".npz")}


SIX = {"a.png": (96, 64), "b.png": (64, 96), "c.png": (96, 64), "sub/d.png": (120, 64), "e.png": (96, 64),
       "f.png": (64, 64)}  # fmt: skip


@pytest.fixture
def six(tmp_path):
    return own_data(tmp_path, {name: photo(i, *size) for i, (name, size) in enumerate(SIX.items())})


def same(one, two, atol=1e-3):
    assert one.keys() == two.keys() and len(one)
    for name in one:
        for key in one[name]:
            if one[name][key].dtype.kind == "f":
                np.testing.assert_allclose(one[name][key], two[name][key], rtol=1e-4, atol=atol, err_msg=name + key)
            else:
                assert (one[name][key] == two[name][key]).all(), (name, key)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_keys_shapes_types_and_ranges(six, weights, tmp_path, capsys):
    regions.main([six, "--weights", weights, *QUICK])
    found = npz(tmp_path / "regions")
    assert set(found) == {name + ".npz" for name in SIX}
    for name, (width, height) in SIX.items():
        one = found[name + ".npz"]
        n = len(one["boxes"])
        assert 3 <= n <= 20
        assert {key: (value.shape, value.dtype.kind) for key, value in one.items()} == {
            "features": ((n, D), "f"), "cls_prob": ((n, C), "f"), "boxes": ((n, 4), "f"), "num_boxes": ((1,), "i"),
            "image_h": ((1,), "i"), "image_w": ((1,), "i"), "image_id": ((), "U")}  # fmt: skip
        assert all(one[key].dtype == np.float32 for key in ("features", "cls_prob", "boxes"))
        assert (one["image_h"][0], one["image_w"][0], one["num_boxes"][0]) == (height, width, n)
        assert one["image_id"] == name
        x1, y1, x2, y2 = one["boxes"].T
        assert (x1 >= 0).all() and (x1 < x2).all() and (x2 <= width).all()
        assert (y1 >= 0).all() and (y1 < y2).all() and (y2 <= height).all()
        np.testing.assert_allclose(one["cls_prob"].sum(1), 1, atol=1e-5)
    assert any(one["boxes"][:, 2].max() > 64 for one in found.values())  # so x is x
    said = capsys.readouterr().out
    counts = [len(one["boxes"]) for one in found.values()]
    assert f"min {min(counts)}, mean {np.mean(counts):.1f}, max {max(counts)} (of the 6 written now)" in said
    assert "6 of 6 pictures are there; 1024 features and 12 classes a region" in said
    settings = json.loads((tmp_path / "regions" / "extraction.json").read_text())
    assert settings["detector"] == MOBILE and settings["weights"] == "random.pth" and len(settings["sha256"]) == 16
    assert (settings["classes"], settings["threshold"], settings["min"], settings["max"]) == (C, 0.2, 3, 20)


def test_number_ids_stay_numbers(weights, tmp_path):
    folder = tmp_path / "coco" / "val2017"
    folder.mkdir(parents=True)
    photo(0).save(folder / "000000000042.jpg")
    images = [{"filepath": "val2017", "filename": "000000000042.jpg", "cocoid": 42, "split": "test",
               "sentences": [{"raw": "a dog"}]}]  # fmt: skip
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    regions.main(["coco", "--root", str(tmp_path / "coco"), "--weights", weights, *QUICK])
    assert read(tmp_path / "coco" / "regions" / "42.npz")["image_id"] == 42


def test_boxes_follow_the_picture(weights, tmp_path):
    """Its double, whose resized form is the same to the pixel, has twice the boxes; one that EXIF turns has its own."""
    small, exif = photo(1, 96, 64), Image.Exif()
    exif[data.ORIENTATION] = 6
    turned = small.transpose(Image.Transpose.ROTATE_90)  # the sensor's view of it
    own_data(tmp_path, {"small.png": small, "double.png": small.resize((192, 128), Image.Resampling.NEAREST)})
    turned.save(tmp_path / "turned.png", exif=exif)
    with (tmp_path / "photos.jsonl").open("a") as file:
        file.write('\n{"image": "turned.png", "caption": "turned", "split": "train"}')
    regions.main([str(tmp_path / "photos.jsonl"), "--weights", weights, *QUICK])
    found = npz(tmp_path / "regions")
    small, double, turned = (found[f"{name}.png.npz"] for name in ("small", "double", "turned"))
    np.testing.assert_allclose(double["boxes"], 2 * small["boxes"], atol=1e-3)
    np.testing.assert_allclose(double["features"], small["features"], atol=1e-4)
    assert (double["image_h"][0], double["image_w"][0]) == (128, 192)
    assert (turned["image_h"][0], turned["image_w"][0]) == (64, 96)
    for key in ("boxes", "features", "cls_prob"):
        np.testing.assert_allclose(turned[key], small[key], atol=1e-4)


def test_features_are_the_detectors_own(model):
    """What torchvision's forward computes at its proposals, caught by hooks, mapped to the picture."""
    pixels = torch.from_numpy(np.array(photo(2, 100, 70))).permute(2, 0, 1)
    caught = {}
    hooks = [
        model.rpn.register_forward_hook(lambda m, i, o: caught.update(proposals=o[0][0], sizes=i[0].image_sizes)),
        model.roi_heads.box_predictor.register_forward_hook(lambda m, i, o: caught.update(inside=i[0], logits=o[0])),
    ]
    with torch.no_grad():
        model([pixels.float() / 255])
    for hook in hooks:
        hook.remove()
    boxes, features, distribution = regions.look(model, [regions.resized(model, pixels, "cpu")], [(70, 100)])[0]
    assert caught["sizes"] == [(64, 91)]  # 64/70 of 100, cut off
    torch.testing.assert_close(boxes, caught["proposals"] * torch.tensor([100 / 91, 70 / 64] * 2))
    torch.testing.assert_close(features, caught["inside"])
    torch.testing.assert_close(distribution, caught["logits"].softmax(-1))


def test_strides_do_not_come_from_the_first_picture(weights, tmp_path):
    """torchvision would infer them from a picture of few rows wrongly and keep them for all that follow."""
    flat, square = photo(0, 1200, 13), photo(1, 64, 64)
    copy = shutil.copy(weights, tmp_path)  # so that each run loads its own network
    own_data(tmp_path, {"a.png": flat, "b.png": square})
    regions.main([str(tmp_path / "photos.jsonl"), "--weights", copy, *QUICK, "--out", str(tmp_path / "one")])
    own_data(tmp_path, {"b.png": square})
    regions.main([str(tmp_path / "photos.jsonl"), "--weights", copy, *QUICK, "--out", str(tmp_path / "two")])
    same({"": npz(tmp_path / "one")["b.png.npz"]}, {"": npz(tmp_path / "two")["b.png.npz"]})


@pytest.mark.parametrize("flags", [["--workers", "2"], ["--batch", "3"], ["--workers", "2", "--batch", "3"]])
def test_workers_and_batches_change_nothing(six, weights, tmp_path, flags):
    for out, more in (("one", ["--batch", "1"]), ("two", flags)):
        regions.main([six, "--weights", weights, *QUICK, *more, "--out", str(tmp_path / out)])
    same(npz(tmp_path / "one"), npz(tmp_path / "two"))


def test_batches_are_of_one_kind_and_whole(model):
    assert regions.padded_shape(model, torch.zeros(3, 33, 64)) == (64, 64)
    rng = random.Random(0)
    samples = [(rng.randrange(25), i) for i in range(203)]
    waiting = 0
    taken = []

    def counted():
        nonlocal waiting
        for sample in samples:
            waiting += 1
            yield sample

    for batch in regions.batches(counted(), lambda sample: sample[0], 4):
        assert len({kind for kind, _ in batch}) == 1 and 1 <= len(batch) <= 4
        assert waiting <= 32
        waiting -= len(batch)
        taken += batch
    assert sorted(taken) == sorted(samples)
    many_kinds = list(regions.batches(iter(range(100)), lambda sample: sample, 4))
    assert sorted(sum(many_kinds, [])) == list(range(100))


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def slow_confidence(boxes, scores, iou=0.3):
    """NMS of every class by itself, straight from its definition."""
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1) * (y2 - y1)
    best = np.zeros(len(boxes))
    for c in range(1, scores.shape[1]):
        left = list(np.argsort(-scores[:, c], kind="stable"))
        while left:
            i = left.pop(0)
            best[i] = max(best[i], scores[i, c])
            w = np.clip(np.minimum(x2[i], x2[left]) - np.maximum(x1[i], x1[left]), 0, None)
            h = np.clip(np.minimum(y2[i], y2[left]) - np.maximum(y1[i], y1[left]), 0, None)
            overlap = w * h / (area[i] + area[left] - w * h)
            left = [j for j, share in zip(left, overlap, strict=True) if share <= iou]
    return best


def test_choice_by_hand():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [0, 5, 10, 15.0]])
    #        background, cat, dog. 1 is within 0 (IoU 0.82), 3 overlaps 0 by 1/3 and 1 by 9*5/155 = 0.29
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.5, 0.4], [0.75, 0.05, 0.2], [0.99, 0.005, 0.005]])
    # cat: 0 is kept and suppresses 1 and 3, 2 is kept (0.05). dog: 1 is kept (0.4) and suppresses 0; 2 (0.2); 3 (0.005)
    want = torch.tensor([0.6, 0.4, 0.2, 0.005])
    torch.testing.assert_close(regions.confidence_of(boxes, scores, 0.0), want)
    torch.testing.assert_close(regions.confidence_of(boxes, scores, 0.2), torch.tensor([0.6, 0.4, 0.2, 0]))
    assert regions.choose_regions(boxes, scores, 0.2, 1, 100).tolist() == [0, 1, 2]  # 0.2 reaches 0.2
    assert regions.choose_regions(boxes, scores, 0.25, 1, 100).tolist() == [0, 1]
    assert regions.choose_regions(boxes, scores, 0.25, 1, 1).tolist() == [0]
    assert regions.choose_regions(boxes, scores, 0.9, 1, 100).tolist() == [0]
    assert regions.choose_regions(boxes, scores, 0.9, 4, 100).tolist() == [0, 1, 2, 3]
    assert regions.choose_regions(boxes, scores, 0.9, 10, 100).tolist() == [0, 1, 2, 3]  # there are no more


@pytest.mark.parametrize("seed, sharpness", [(0, 3), (1, 1), (2, 0.2), (3, 6)])
def test_choice_against_plain_nms(seed, sharpness):
    g = torch.Generator().manual_seed(seed)
    boxes = torch.rand(60, 4, generator=g) * 60
    boxes[:, 2:] += boxes[:, :2] + 5
    scores = (torch.randn(60, 9, generator=g) * sharpness).softmax(-1)
    slow = slow_confidence(boxes.double().numpy(), scores.double().numpy())
    np.testing.assert_allclose(regions.confidence_of(boxes, scores, 0.0).numpy(), slow, rtol=1e-6)
    for threshold, least, most in ((0.2, 10, 100), (0.2, 40, 50), (0.05, 1, 7), (0.999, 30, 60), (0.0, 1, 100)):
        n = min(max((slow >= threshold).sum(), least), most)
        found = regions.choose_regions(boxes, scores, threshold, least, most).numpy()
        np.testing.assert_allclose(slow[found], np.sort(slow)[::-1][:n], rtol=1e-6)
        assert len(set(found)) == len(found)


def test_choice_keeps_classes_apart_far_out():
    """1,600 classes of large boxes: an offset per class in single precision would blur pixels."""
    boxes = torch.tensor([[1330.3, 1330, 1331.3, 1331], [1330.84, 1330, 1331.84, 1331]])  # 0.46 of 1.54: 0.2987
    scores = torch.full((2, 1601), 1e-6)
    scores[0, 1600], scores[1, 1600] = 0.9, 0.8
    assert regions.choose_regions(boxes, scores, 0.2, 1, 9).tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Going on


def test_a_killed_run_goes_on(six, weights, tmp_path):
    out = tmp_path / "regions"
    command = [sys.executable, str(TOOL), six, "--weights", weights, *QUICK]
    # slower writing, so that the signal comes in the middle
    slow = ("import sys, time, runpy, numpy as np; save = np.savez\n"
            "def slowly(file, **a): file.write(b'PK'); file.flush(); time.sleep(0.4); file.seek(0); save(file, **a)\n"
            f"np.savez = slowly; sys.argv = {command[1:]!r}; runpy.run_path({str(TOOL)!r}, run_name='__main__')")
    run = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    for _ in range(400):
        time.sleep(0.05)
        if out.exists() and len(npz_names(out)) >= 2:
            break
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM, said
    there = npz(out)  # all whole
    assert 2 <= len(there) < 6
    assert f"stopped: {len(there)} of 6 pictures are there; go on with" in said
    assert said.strip().endswith(f"{six} --weights {weights} {' '.join(QUICK)}")
    assert files_below(out) == sorted([*there, "extraction.json"])  # nothing half done
    times = {name: (out / name).stat().st_mtime_ns for name in there}
    regions.main(command[2:])
    assert set(npz(out)) == {name + ".npz" for name in SIX}
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}


def npz_names(folder):
    return [name for name in files_below(folder) if name.endswith(".npz")]


def test_an_error_in_the_middle_leaves_whole_files(six, weights, tmp_path, monkeypatch, capsys):
    out, save, calls = tmp_path / "regions", np.savez, []

    def breaks(file, **arrays):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"PK half")
            raise KeyboardInterrupt(signal.SIGINT)
        save(file, **arrays)

    regions.main([six, "--weights", weights, *QUICK])
    monkeypatch.setattr(np, "savez", breaks)
    with pytest.raises(Stopped, match="stopped: 2 of 6 pictures are there") as stop:
        regions.main([six, "--weights", weights, *QUICK, "--overwrite"])
    assert stop.value.signum == signal.SIGINT and "--overwrite" not in str(stop.value)  # it would begin anew
    assert len(npz(out)) == 2 and not [name for name in files_below(out) if "tmp" in name]
    monkeypatch.setattr(np, "savez", save)
    capsys.readouterr()
    regions.main([six, "--weights", weights, *QUICK])
    said = capsys.readouterr().out
    assert "2 of 6 pictures there already" in said and "(of the 4 written now)" in said and len(npz(out)) == 6
    regions.main([six, "--weights", weights, *QUICK])  # nothing left to do
    assert "6 of 6 pictures there already" in capsys.readouterr().out


def test_mirrored_pictures_have_a_folder_of_their_own(six, weights, tmp_path, capsys, monkeypatch):
    """The detector is shown flipped pixels; a run is resumed, and never mixed with one of plain pictures."""
    shown, resized = [], regions.resized  # a detector of random weights says nearly the same of every picture
    monkeypatch.setattr(regions, "resized", lambda model, x, device: shown.append(x) or resized(model, x, device))
    regions.main([six, "--weights", weights, *QUICK, "--mirrored"])
    for name, pixels in zip(SIX, shown, strict=True):
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(picture)[:, ::-1]), name
    assert list(npz(tmp_path / "regions_mirrored")) == sorted(name + ".npz" for name in SIX)
    assert not (tmp_path / "regions").exists()
    capsys.readouterr()
    regions.main([six, "--weights", weights, *QUICK, "--mirrored"])
    assert "6 of 6 pictures there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="mirrored True there, None now"):
        regions.main([six, "--weights", weights, *QUICK, "--out", str(tmp_path / "regions_mirrored")])


def test_left_overs_of_a_killed_run_go(six, weights, tmp_path):
    out = tmp_path / "regions"
    for name in ("a.png.npz.1of1.tmp", "sub/d.png.npz.2of8.tmp", "mine.tmp"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")
    assert regions.list_done(out, "3of8") == set()
    assert len(files_below(out)) == 3  # another share may be writing them
    regions.main([six, "--weights", weights, *QUICK])
    assert [name for name in files_below(out) if "tmp" in name] == ["mine.tmp"] and len(npz(out)) == 6


def test_shares_cover_everything_once(six, weights, tmp_path, capsys):
    out, before = tmp_path / "regions", set()
    for part in (1, 2, 3, 4):
        regions.main([six, "--weights", weights, *QUICK, "--share", f"{part}/4"])
        after = set(npz(out))
        assert len(after - before) == (2 if part <= 2 else 1)
        assert f"share {part}/4: 0 of {len(after - before)} pictures there already" in capsys.readouterr().out
        before = after
    assert before == {name + ".npz" for name in SIX}


def test_other_settings_are_refused(six, weights, tmp_path, capsys):
    base = [six, "--weights", weights, *QUICK]
    regions.main([*base, "--share", "1/2"])
    kept = {name: (tmp_path / "regions" / name).read_bytes() for name in files_below(tmp_path / "regions")}
    with pytest.raises(UserError, match=r"threshold 0\.2 there, 0\.3 now\): give --out another folder, or --overwrite"):
        regions.main([*base, "--threshold", "0.3"])
    with pytest.raises(UserError, match=r"size 64 there, 72 now"):
        regions.main([*base, "--size", "72"])
    with pytest.raises(UserError, match="of pictures that are not in this data set or share"):
        regions.main([*base, "--threshold", "0.3", "--overwrite", "--share", "2/2"])
    assert kept == {name: (tmp_path / "regions" / name).read_bytes() for name in kept}
    capsys.readouterr()
    regions.main([*base, "--min", "2", "--max", "2", "--threshold", "1", "--overwrite"])
    assert "removed 3 files" in capsys.readouterr().out
    assert {len(one["boxes"]) for one in npz(tmp_path / "regions").values()} == {2}
    # the same bytes under another name are the same weights
    twin = tmp_path / "twin.pth"
    twin.write_bytes(Path(weights).read_bytes())
    regions.main([six, "--weights", str(twin), *QUICK, "--min", "2", "--max", "2", "--threshold", "1"])


def test_foreign_files_are_not_mixed_with(six, weights, tmp_path):
    (tmp_path / "regions").mkdir()
    (tmp_path / "regions" / "a.png.npz").write_bytes(b"from elsewhere")
    with pytest.raises(UserError, match="unknown ones"):
        regions.main([six, "--weights", weights, *QUICK])
    assert files_below(tmp_path / "regions") == ["a.png.npz"]


def test_unreadable_pictures_are_listed(weights, tmp_path, capsys):
    bad = {f"bad{i}.jpg": b"no picture" for i in range(4)}
    name = own_data(tmp_path, {"a.png": photo(0), **bad, "line.png": photo(0, 2000, 13).resize((2000, 1))})
    with pytest.raises(SystemExit) as stop:
        regions.main([name, "--weights", weights, *QUICK])
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert said.err.count("cannot be read: ") == 3 and "5 pictures cannot be read, see" in said.err
    listed = (tmp_path / "regions" / "unreadable.txt").read_text()
    assert all(f"bad{i}.jpg: not a picture" in listed for i in range(4)) and "2000x1 pixels, too long" in listed
    assert npz_names(tmp_path / "regions") == ["a.png.npz"]
    for file in [*bad, "line.png"]:
        photo(1).save(tmp_path / file)
    regions.main([name, "--weights", weights, *QUICK])
    assert not (tmp_path / "regions" / "unreadable.txt").exists() and len(npz_names(tmp_path / "regions")) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_forms_of_weights(weights, tmp_path):
    """safetensors, and what torchvision's training script saves, with its arguments; other numbers of classes."""
    state = torch.load(weights)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    torch.save({"model": state, "args": argparse.Namespace(lr=1), "epoch": 3}, tmp_path / "checkpoint.pth")
    want = regions.load_detector(MOBILE, Path(weights), "", 64).state_dict()
    for file in ("w.safetensors", "checkpoint.pth"):
        found = regions.load_detector(MOBILE, tmp_path / file, "", 64).state_dict()
        assert all(torch.equal(found[key], want[key]) for key in want)
    for key in state:
        if "box_predictor" in key:
            state[key] = torch.cat([state[key]] * 2)
    torch.save(state, tmp_path / "more.pth")
    more = regions.load_detector(MOBILE, tmp_path / "more.pth", "", 64)
    assert len(more.state_dict()[regions.CLASS_HEAD]) == 24 and more.rpn.score_thresh == 0


def test_wrong_weights(six, weights, tmp_path):
    def run(file, *more):
        regions.main([six, "--weights", str(file), *QUICK, *more])

    with pytest.raises(UserError, match=r"no such file; fetch https://\S+mobilenet\S+\.pth and pass its path, or"):
        run(tmp_path / "absent.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(UserError, match=r"page\.pth cannot be read as plain tensors[^\n]*\npass the state dict of a "):
        run(tmp_path / "page.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth holds no detector of torchvision's.*or --weights hub"):
        run(tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"list\.pth holds no detector"):
        run(tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"is not a fasterrcnn_resnet50_fpn; --detector is one of"):
        run(weights, "--detector", "fasterrcnn_resnet50_fpn")
    assert not (tmp_path / "regions").exists()


def test_hub(six, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    asked = []

    def unreachable(url, to, fingerprint, progress):
        asked.append((url, fingerprint))
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match=r"could not be downloaded \(OSError: Name or") as e:
        regions.main([six, "--weights", "hub", *QUICK])
    assert "pass --weights fasterrcnn_mobilenet_v3_large_fpn-" in str(e.value)
    assert "https://download.pytorch.org/models/" in str(e.value) and asked[0][1] in asked[0][0]

    def reachable(url, to, fingerprint, progress):
        Path(to).write_bytes(Path(weights).read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", reachable)
    path, _ = regions.find_weights(MOBILE, "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    assert regions.find_weights(MOBILE, "hub")[0] == path  # once


def test_official_resnet_has_no_epsilon(monkeypatch):
    """torchvision sets it to 0 for this one file; here it is known by its fingerprint."""
    from torchvision.models import get_model, get_model_weights
    from torchvision.ops import FrozenBatchNorm2d

    name = "fasterrcnn_resnet50_fpn"
    torch.manual_seed(0)
    state = get_model(name, weights=None, weights_backbone=None, num_classes=3).state_dict()
    monkeypatch.setattr(regions.common, "read_tensors", lambda path: dict(state))
    official = get_model_weights(name).DEFAULT.url.rpartition("-")[2].removesuffix(".pth")
    for sha256, eps in ((official + "00", 0), ("00", 1e-5)):
        model = regions.load_detector(name, Path("x.pth"), sha256, 64)
        norm = model.backbone.body.layer4[2].bn3
        assert norm.eps == pytest.approx(eps, abs=1e-20)
        norm.running_var.uniform_(1e-6, 1)
        frozen = FrozenBatchNorm2d(norm.num_features, eps=eps)
        frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
        x = torch.randn(1, norm.num_features, 4, 4)
        torch.testing.assert_close(norm(x), frozen(x))


# ---------------------------------------------------------------------------------------------------------------------
# Data and flags


def test_pictures_of_items_and_questions():
    a, b, c = Path("a.jpg"), Path("b.jpg"), Path("c.jpg")
    question = Example("q", (1,), (a,), "who ?")
    pair = Example("p", ("x", "y"), (b, c), "both.")
    corpus = Corpus("some", {"train": [Item(1, a, ("text",)), question, question], "val": [pair, pair]})
    assert regions.pictures_of(corpus) == {1: a, "x": b, "y": c}
    with pytest.raises(UserError, match=r"some: image 1 is a\.jpg and b\.jpg"):
        regions.pictures_of(Corpus("some", {"train": [Item(1, a, ()), Item(1, b, ())]}))
    with pytest.raises(UserError, match="scenes.regions gives"):
        regions.pictures_of(Corpus("some", {"train": [Item(1, object(), ())]}))


def test_no_proposal_means_the_whole_picture(model, monkeypatch):
    monkeypatch.setattr(model.rpn, "forward", lambda batch, maps: ([torch.zeros(0, 4)], {}))
    image = regions.resized(model, torch.zeros(3, 128, 192, dtype=torch.uint8), "cpu")
    boxes, features, _ = regions.look(model, [image], [(128, 192)])[0]
    assert boxes.tolist() == [[0, 0, 192, 128]] and features.shape == (1, D)


def test_given_boxes(six, weights, tmp_path, monkeypatch, model):
    """At the boxes in the metadata, in their order; a fifth number is the confidence of VCR's own detector."""
    given = {"a.png": [[50.0, 10, 90, 60, 0.9], [0, 0, 30, 30, 0.8], [-5, 20, 120, 80, 0.3]], "b.png": [[9, 9, 2, 2]],
             "c.png": [[1, 2, 90, 60]]}  # fmt: skip
    asked = []
    for name, boxes in given.items():
        file = (tmp_path / name).with_suffix(".json")
        file.write_text(json.dumps({"boxes": boxes}))
        asked.append(Choice(name, (name,), (tmp_path / name,), None, (), (), 0, 0, ("person",) * len(boxes), file))
    monkeypatch.setattr(regions.corpora, "load", lambda name, root, **more: Corpus("vcr", {"train": asked}))
    with pytest.raises(SystemExit):  # b.json is wrong
        regions.main(["vcr", "--root", str(tmp_path), "--weights", weights, *QUICK, "--ground-truth", "--batch", "2"])
    assert "b.json" in (tmp_path / "regions_boxes" / "unreadable.txt").read_text()
    found = npz(tmp_path / "regions_boxes")
    assert {name: one["features"].shape for name, one in found.items()} == {"a.png.npz": (3, D), "c.png.npz": (1, D)}
    want = [[50, 10, 90, 60], [0, 0, 30, 30], [0, 20, 96, 64]]
    np.testing.assert_allclose(found["a.png.npz"]["boxes"], want, atol=1e-4)
    # a proposal given as a box has the proposal's features
    pixels = torch.from_numpy(np.array(photo(0, 150, 100))).permute(2, 0, 1)
    image = regions.resized(model, pixels, "cpu")
    boxes, features, distribution = regions.look(model, [image], [(100, 150)])[0]
    again = regions.look(model, [image], [(100, 150)], [boxes[:7].numpy()])[0]
    torch.testing.assert_close(again[1], features[:7], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again[2], distribution[:7], atol=1e-5, rtol=1e-4)
    settings = json.loads((tmp_path / "regions_boxes" / "extraction.json").read_text())
    assert settings["boxes"] == "given" and "threshold" not in settings
    with pytest.raises(SystemExit):
        regions.main(["vcr", "--root", str(tmp_path), "--weights", weights, *QUICK, "--ground-truth", "--mirrored"])
    seen = npz(tmp_path / "regions_boxes_mirrored")["a.png.npz"]["boxes"]
    np.testing.assert_allclose(seen, [[6, 10, 46, 60], [66, 0, 96, 30], [0, 20, 96, 64]], atol=1e-4)


@pytest.mark.parametrize("flags, message", [
    (["cooc", "--weights", "x"], "did you mean coco"),
    (["scenes", "--weights", "x"], "scenes.regions"),
    (["{six}"], "--weights is missing"),
    ([], "give the data set first"),
    (["--weights", "x"], "give the data set first"),
    (["{six}", "--weights", "x", "--detector", "fasterrcnn_resnet50"], "did you mean fasterrcnn_resnet50_fpn"),
    (["{six}", "--weights", "x", "--treshold", "0.3"], "did you mean --threshold"),
    (["{six}", "--weights", "x", "--share", "9/8"], "the second of eight is 2/8"),
    (["{six}", "--weights", "x", "--share", "0/8"], "the second of eight is 2/8"),
    (["{six}", "--weights", "x", "--min", "20", "--max", "10"], "--min from 1 to --max"),
    (["{six}", "--weights", "x", "--threshold", "1.5"], "--threshold is from 0 to 1"),
    (["{six}", "--weights", "x", "--batch", "-1"], "--batch and --workers are 0 or more"),
    (["{six}", "--weights", "{weights}", "--ground-truth"], "gives no boxes"),
    (["{six}", "--weights", "x", "--device", "cuda"], "--device"),
])  # fmt: skip
def test_mistakes(six, weights, flags, message):
    if flags[-1:] == ["cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError) as error:
        regions.main([flag.format(six=six, weights=weights) for flag in flags])
    assert message in str(error.value)


def test_folders(tmp_path):
    def folder(name, **flags):
        return regions.default_folder(name, regions.Flags(**flags))

    assert folder("coco") == Path("data/coco/regions") and folder("coco", root="there") == Path("there/regions")
    assert folder("of/mine.jsonl") == Path("of/regions") and folder("mine.csv") == Path("regions")
    assert folder(str(tmp_path)) == tmp_path / "regions"  # with captions.txt in it
    assert folder("coco", ground_truth=True) == Path("data/coco/regions_boxes")
    assert folder("coco", ground_truth=True, mirrored=True) == Path("data/coco/regions_boxes_mirrored")


def test_help_imports_no_torchvision():
    code = "import sys, runpy; sys.argv = ['regions.py', '--help']\n" \
           f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n" \
           "except SystemExit as e: sys.exit(e.code or 3 * ('torchvision' in sys.modules))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--threshold" in done.stdout, done
