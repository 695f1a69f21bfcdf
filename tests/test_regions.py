"""Region features: official .npz and .tsv files, grids, scenes; what is wrong with a file is said, never used."""

import base64
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import corpora
import data
import language
import regions
import scenes
from common import UserError
from data import BadImage, Regions

N, D, C = 3, 8, 5
BOXES = [[1, 2, 30, 20], [0, 0, 40, 30], [5.5, 6.5, 12, 13]]


def arrays(**changed):
    """A whole .npz of the official form."""
    rng = np.random.default_rng(0)
    classes = rng.random((N, C), dtype=np.float32)
    whole = {"features": rng.random((N, D), dtype=np.float32), "boxes": np.array(BOXES, np.float32),
             "cls_prob": classes / classes.sum(1, keepdims=True), "image_h": np.array([30]), "image_w": np.array([40]),
             "num_boxes": np.array([N]), "image_id": np.array(7)}  # fmt: skip
    return {name: value for name, value in (whole | changed).items() if value is not None}


def write(folder, name="7", **changed):
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays(**changed))
    return folder


def test_npz(tmp_path):
    found = regions.NpzRegions(write(tmp_path / "regions"))(7, "anywhere.jpg")
    whole = arrays()
    assert found.size == (40, 30) and np.array_equal(found.features, whole["features"])
    assert np.array_equal(found.boxes, whole["boxes"]) and np.array_equal(found.classes, whole["cls_prob"])
    locations = found.locations()
    assert locations.shape == (N, 5)
    assert locations[0] == pytest.approx([1 / 40, 2 / 30, 30 / 40, 20 / 30, 29 * 18 / 1200])
    assert locations[1].tolist() == [0, 0, 1, 1, 1] and locations.dtype == np.float32
    first = regions.NpzRegions(tmp_path / "regions", most=2)(7, "anywhere.jpg")
    assert np.array_equal(first.features, whole["features"][:2]) and len(first.boxes) == len(first.classes) == 2


def test_a_file_goes_by_the_image_id_or_by_the_picture(tmp_path):
    folder = write(tmp_path / "regions", "1000092795")
    assert len(regions.NpzRegions(folder)(3, "flickr30k-images/1000092795.jpg").boxes) == N
    (folder / "sub").mkdir()
    with pytest.raises(BadImage, match="sub/1000092795.jpg.npz: no such"):  # another picture of that name
        regions.NpzRegions(folder)("sub/1000092795.jpg", "sub/1000092795.jpg")
    write(folder / "sub", "a.jpg")
    assert len(regions.NpzRegions(folder)("sub/a.jpg", "x/sub/a.jpg").boxes) == N
    with pytest.raises(BadImage, match="8.npz: no such region file; `python tools/regions.py`"):
        regions.NpzRegions(folder)(8, "other.jpg")


def test_ids_that_are_text_are_no_other_pictures_names(tmp_path):
    """Visual Genome's vg-9 lies in 9.jpg, which is not COCO's picture 9; films of VCR have folders of their own."""
    folder = write(tmp_path / "regions", "9")
    with pytest.raises(BadImage, match="vg-9.npz: no such"):
        regions.NpzRegions(folder)("vg-9", "VG_100K/9.jpg")
    write(folder / "film", "a@0")
    assert len(regions.NpzRegions(folder)("val-3", "vcr1images/film/a@0.jpg").boxes) == N
    with pytest.raises(UserError, match="not below"):
        regions.NpzRegions(folder)("../out", "x.jpg")


def test_other_keys_are_not_read(tmp_path):
    """Detectors leave more beside: objects that only pickle could read, or a lot of it."""
    folder = write(tmp_path / "regions", objects=np.array([{"name": "dog"}], dtype=object))
    assert len(regions.NpzRegions(folder)(7, "x.jpg").boxes) == N


def test_without_class_probabilities(tmp_path):
    assert regions.NpzRegions(write(tmp_path / "regions", cls_prob=None))(7, "x.jpg").classes is None


def test_a_folder_that_is_not_there_names_the_two_ways_on(tmp_path):
    with pytest.raises(UserError, match="tools/regions.py.*--regions grid"):
        regions.NpzRegions(tmp_path / "regions")


WRONG = {
    "no box": (dict(features=np.zeros((0, D)), boxes=np.zeros((0, 4)), cls_prob=np.zeros((0, C)),
                    num_boxes=np.array([0])), "no region"),
    "NaN feature": (dict(features=np.full((N, D), np.nan)), "`features` holds a number that is not finite"),
    "NaN box": (dict(boxes=np.full((N, 4), np.nan)), "`boxes` holds a number that is not finite"),
    "endless class": (dict(cls_prob=np.full((N, C), np.inf)), "`cls_prob` holds a number that is not finite"),
    "right of the picture": (dict(boxes=np.array([[0, 0, 42, 5]] * N)), "out of the picture of 40 x 30"),
    "below the picture": (dict(boxes=np.array([[0, 0, 5, 32]] * N)), "out of the picture of 40 x 30"),
    "left of the picture": (dict(boxes=np.array([[-3, 0, 5, 5]] * N)), "out of the picture"),
    "above the picture": (dict(boxes=np.array([[0, -3, 5, 5]] * N)), "out of the picture"),
    "x, y, width, height": (dict(boxes=np.array([[20, 5, 10, 25]] * N)), "boxes are x1, y1, x2, y2"),
    "upside down": (dict(boxes=np.array([[2, 25, 10, 5]] * N)), "boxes are x1, y1, x2, y2"),
    "fewer classes": (dict(cls_prob=np.full((N, C - 1), 0.1)), "4 class probabilities a region; 5 are expected"),
    "fewer rows of classes": (dict(cls_prob=np.full((N - 1, C), 0.1)), "`cls_prob` has the shape"),
    "fewer features": (dict(features=np.zeros((N - 1, D))), "`features` has the shape"),
    "no probabilities": (dict(cls_prob=np.full((N, C), 0.5)), "no probabilities"),
    "below zero": (dict(cls_prob=np.full((N, C), -0.1)), "no probabilities"),
    "another number": (dict(num_boxes=np.array([N + 1])), "`num_boxes` is 4, but there are 3"),
    "boxes of five": (dict(boxes=np.zeros((N, 5))), "boxes of 5 numbers"),
    "no size": (dict(image_w=np.array([0])), "in a picture of"),
    "a size that is no number": (dict(image_w=np.array([np.nan])), "in a picture of"),
    "endless boxes": (dict(num_boxes=np.array([np.inf])), "not of the documented form"),
    "an empty size": (dict(image_h=np.array([])), "not of the documented form"),
    "text": (dict(features=np.array([["a"] * D] * N)), "not of the documented form"),
    "objects": (dict(boxes=np.array([{"x": 1}], dtype=object)), "cannot be read"),
}  # fmt: skip
WRONG |= {f"no {name}": ({name: None}, f"no `{name}` in it") for name in ("features", "boxes", "image_h", "image_w")}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_file_is_bad(tmp_path, what):
    changed, message = WRONG[what]
    source = regions.NpzRegions(write(tmp_path / "regions", **changed), n_classes=C)
    with pytest.raises(BadImage, match=message) as caught:
        source(7, "x.jpg")
    assert "7.npz" in str(caught.value)


def test_a_truncated_file_is_bad(tmp_path):
    folder = write(tmp_path / "regions")
    (folder / "7.npz").write_bytes((folder / "7.npz").read_bytes()[:200])
    with pytest.raises(BadImage, match="7.npz: cannot be read"):
        regions.NpzRegions(folder)(7, "x.jpg")


def test_rounding_at_the_edge_is_clipped(tmp_path):
    folder = write(tmp_path / "regions", boxes=np.array([[-0.4, -0.9, 40.6, 30.2]] * N))
    assert regions.NpzRegions(folder)(7, "x.jpg").boxes.tolist() == [[0, 0, 40, 30]] * N


def tsv_line(image_id, boxes, features, width=40, height=30, n=None):
    cells = [image_id, width, height, len(boxes) if n is None else n]
    cells += [base64.b64encode(np.array(array, "<f4").tobytes()).decode() for array in (boxes, features)]
    return "\t".join(map(str, cells)) + "\n"


def test_tsv(tmp_path):
    """Width comes before height; the index finds a line in any of the files."""
    features = np.random.default_rng(1).random((N, D), dtype=np.float32)
    (tmp_path / "a.tsv").write_text(tsv_line(5, BOXES, features + 1) + tsv_line(7, BOXES, features))
    (tmp_path / "b.tsv").write_text(tsv_line(9, BOXES[:1], features[:1]))
    source = regions.TsvRegions([tmp_path / "a.tsv", tmp_path / "b.tsv"])
    found = source(7, "x.jpg")
    assert np.array_equal(found.features, features) and np.array_equal(found.boxes, np.array(BOXES, np.float32))
    assert found.size == (40, 30) and found.classes is None and "no class probabilities" in source.note
    assert len(source(1, "somewhere/9.jpg").boxes) == 1 and source(5, "x").features[0, 0] == features[0, 0] + 1
    assert len(regions.TsvRegions([tmp_path / "a.tsv"], most=2)(7, "x").boxes) == 2
    with pytest.raises(BadImage, match="a.tsv, image 8: not in this file"):
        source(8, "x.jpg")


@pytest.mark.parametrize(("line", "message"), [
    (tsv_line(7, BOXES, np.full((N, D), np.nan)), "not finite"), (tsv_line(7, [], []), "no region"),
    (tsv_line(7, BOXES, np.zeros((N, D)), width=20), "out of the picture of 20 x 30"),
    (tsv_line(7, BOXES, np.zeros((N, D)), n=4), "not of the form"), ("7\t40\t30\n", "not of the form"),
    ("7\tx\t30\t1\tAA==\tAA==\n", "not of the form"),
])  # fmt: skip
def test_a_wrong_line_is_bad(tmp_path, line, message):
    (tmp_path / "a.tsv").write_text(line)
    with pytest.raises(BadImage, match=message):
        regions.TsvRegions([tmp_path / "a.tsv"])(7, "x.jpg")


def test_a_grid_of_crops(tmp_path):
    """Row-major cells of the whole picture, each a 16 x 16 crop in 0..1."""
    quarters = np.zeros((60, 80, 3), np.uint8)
    quarters[:30, 40:] = 255
    quarters[30:, :40, 0] = 255
    Image.fromarray(quarters).save(tmp_path / "a.png")
    found = regions.GridRegions(rows=2)("a.png", tmp_path / "a.png")
    assert found.features.shape == (4, 768) and found.classes is None and found.features.dtype == np.float32
    crops = found.features.reshape(4, 16, 16, 3)[:, 8, 8]
    assert crops.tolist() == [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert found.locations().tolist() == [[0, 0, 0.5, 0.5, 0.25], [0.5, 0, 1, 0.5, 0.25], [0, 0.5, 0.5, 1, 0.25],
                                          [0.5, 0.5, 1, 1, 0.25]]  # fmt: skip
    assert regions.GridRegions()("a.png", tmp_path / "a.png").features.shape == (16, 768)


def test_where_regions_come_from(tmp_path, monkeypatch):
    """Files below the folder of the data set, .npz or .tsv; a grid where asked for; those of scenes."""
    write(tmp_path / "regions")
    source = regions.region_source("files", "coco", tmp_path, most=2)
    assert len(source(7, "x.jpg").boxes) == 2 and source.note == ""
    own = regions.region_source("files", str(tmp_path / "photos.jsonl"))
    assert isinstance(own, regions.NpzRegions) and len(own(7, "x.jpg").boxes) == N
    assert regions.region_source("files", str(tmp_path)).folder == tmp_path / "regions"
    (tmp_path / "vqa").mkdir()
    (tmp_path / "coco").mkdir()
    write(tmp_path / "coco" / "regions")
    assert len(regions.region_source("files", "vqa", tmp_path / "vqa")(7, "x.jpg").boxes) == N  # COCO's serve VQA
    one = {name: arrays()[name][:1] for name in ("features", "boxes", "cls_prob")}
    write(tmp_path / "vqa" / "regions", num_boxes=None, **one)
    assert len(regions.region_source("files", "vqa", tmp_path / "vqa")(7, "x.jpg").boxes) == 1
    (tmp_path / "regions" / "train.tsv.0").write_text(tsv_line(7, BOXES, np.zeros((N, D))))
    tables = regions.region_source("files", "coco", tmp_path, most=1)
    assert isinstance(tables, regions.TsvRegions) and len(tables(7, "x.jpg").boxes) == 1
    assert "grid of crops" in regions.region_source("grid", "coco", tmp_path).note
    assert isinstance(regions.region_source("files", "scenes"), regions.SceneRegions)
    with pytest.raises(UserError, match="did you mean grid"):
        regions.region_source("gird", "coco", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/vqa/regions is not there"):
        regions.region_source("files", "vqa")


def test_regions_of_scenes():
    corpus = corpora.load("scenes", n_train=3, n_val=1, n_test=1)
    item = corpus.splits["train"][1]
    found, whole = regions.SceneRegions()(item.image_id, item.image), scenes.regions(item.image)
    assert np.array_equal(found.features, whole["features"]) and np.array_equal(found.classes, whole["cls_prob"])
    assert found.checked("scene", n_classes=25) is found and found.size == (64, 64)


def test_regions_of_objects(tmp_path):
    """Of scenes the objects without the panel; of a grid crops at the boxes; of files a second folder."""
    items = corpora.load("scenes", task="vcr", world="full", n_train=40, n_val=1, n_test=1).splits["train"]
    item = next(item for item in items if item.images[0].panel)
    source = regions.SceneRegions()
    objects = source.of_objects(item)
    assert len(objects.boxes) == len(item.objects) == len(source(0, item.images[0]).boxes) - 1
    crops = regions.GridRegions().of_objects(item)
    assert crops.features.shape == (len(item.objects), 768)
    assert np.allclose(crops.locations(), objects.locations(), atol=1e-5)
    assert np.abs(crops.features - objects.features).mean() < 0.1  # the same crops, at another size, without noise
    folder = write(tmp_path / "regions", str(item.image_ids[0]))
    with pytest.raises(BadImage, match="regions_boxes"):
        regions.NpzRegions(folder).of_objects(item)
    write(tmp_path / "regions_boxes", str(item.image_ids[0]), features=np.ones((N, D)))
    assert regions.NpzRegions(folder).of_objects(item).features.min() == 1


def test_batches_of_regions(tmp_path):
    folder = write(write(tmp_path / "regions", "a"), "b", **{
        name: arrays()[name][:2] for name in ("features", "boxes", "cls_prob")}, num_boxes=np.array([2]))  # fmt: skip
    items = [data.Item(name, tmp_path / f"{name}.jpg", ("a caption",)) for name in ("a", "b", "c")]
    pictures = data.Pictures(items[:2], None, 32, regions=regions.NpzRegions(folder))
    (batch,) = data.eval_loader(pictures, 2)
    assert batch["regions"].shape == (2, N, D) and batch["regions_classes"].shape == (2, N, C) and "pixels" not in batch
    assert batch["regions_locations"].shape == (2, N, 5) and batch["regions_boxes"].shape == (2, N, 4)
    assert batch["regions_keep_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert torch.equal(batch["regions"][1, :2], torch.from_numpy(arrays()["features"][:2])) and batch["captions"]
    assert not batch["regions"][1, 2].any() and not batch["regions_locations"][1, 2].any()
    train = data.Pictures(items, language.Tokenizer.train(["a caption"], 300), 32, captions=1, train=True,
                          regions=regions.NpzRegions(folder))  # fmt: skip
    (batch,) = data.train_loader(train, 3, steps=1)
    assert len(batch["regions"]) == 2 and "c.npz: no such region file" in batch["bad"][0] and len(batch["ids"]) == 2
    with pytest.raises(UserError, match="c.npz"):  # evaluation leaves none out
        list(data.eval_loader(data.Pictures(items, None, 32, regions=regions.NpzRegions(folder)), 3))


# In a mirror


def test_mirrored_grids(tmp_path):
    """The grid begins at the top left of the mirrored picture, and its crops are mirrored, too."""
    quarters = np.zeros((60, 80, 3), np.uint8)
    quarters[:30, 60:] = 255  # white in the upper right corner
    Image.fromarray(quarters).save(tmp_path / "a.png")
    Image.fromarray(quarters[:, ::-1].copy()).save(tmp_path / "b.png")
    source = regions.GridRegions(rows=2)
    one, other = source("a", tmp_path / "a.png", mirrored=True), source("b", tmp_path / "b.png")
    assert source.mirrors and np.array_equal(one.features, other.features) and np.array_equal(one.boxes, other.boxes)
    crops = one.features.reshape(4, 16, 16, 3)[..., 0]
    assert crops[0, :14, :7].min() == 1 and crops[0, :, 9:].max() == crops[1, 2:].max() == crops[2:, 2:].max() == 0
    boxes = tmp_path / "a.json"
    boxes.write_text('{"boxes": [[60, 0, 80, 30, 0.9], [0, 0, 20, 60, 0.9]]}')
    asked = data.Choice("a", ("a",), (tmp_path / "a.png",), None, (), (), 0, 0, ("dog", "cat"), boxes)
    seen = source.of_objects(asked, mirrored=True)
    assert seen.boxes.tolist() == [[0, 0, 20, 30], [60, 0, 80, 60]]
    assert seen.features[0].mean() > 0.95 and seen.features[1].max() < 0.2


def mirror_image(scene):
    turned = [tuple(replace(o, x=1 - o.x) for o in some) for some in (scene.objects, scene.hidden)]
    panel = scene.panel and replace(scene.panel, x0=1 - scene.panel.x1, x1=1 - scene.panel.x0,
                                    slots=tuple((1 - x, y) for x, y in scene.panel.slots))  # fmt: skip
    return replace(scene, objects=turned[0], hidden=turned[1], panel=panel)


def test_mirrored_scenes():
    """Crops and boxes as of the flipped drawing; what was true of it is true of its mirror image, once swapped."""
    source, sides = regions.SceneRegions(), 0
    for item in corpora.load("scenes", world="full", n_train=60, n_val=1, n_test=1).splits["train"]:
        scene = item.image
        plain, seen = source(0, scene), source(0, scene, mirrored=True)
        picture = data.load_image(scene, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops = [np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR, box=tuple(box.tolist())))
                 for box in seen.boxes]  # fmt: skip
        noise = np.abs(seen.features.reshape(-1, 16, 16, 3) - np.stack(crops) / 255).mean((1, 2, 3))
        assert noise.max() < 2 * scenes.REGION_NOISE and np.array_equal(seen.classes, plain.classes)
        assert np.array_equal(source(0, scene, mirrored=False).features, plain.features)
        for text in item.captions:
            sides += "left" in text or "right" in text
            assert scenes.is_true(language.swap_sides(text), mirror_image(scene)) == scenes.is_true(text, scene), text
    assert sides > 20


def test_mirrored_files(tmp_path):
    """Folders of their own, looked for once; the objects' must be there as well."""
    asked = data.Choice("q", (7,), (tmp_path / "x.jpg",), None, (), (), 0, 0, ("dog",) * N)
    folder = write(write(tmp_path / "regions"), "8")
    assert not regions.NpzRegions(folder).mirrors
    write(tmp_path / "regions_mirrored", features=np.ones((N, D)))
    source = regions.NpzRegions(folder, most=2)
    assert source.mirrors and source(7, "x.jpg", mirrored=True).features.min() == 1 > source(7, "x.jpg").features.max()
    assert len(source(7, "x.jpg", mirrored=True).boxes) == 2
    with pytest.raises(BadImage, match="regions_mirrored/8.npz: no such region file; `python tools/regions.py --mirr"):
        source(8, "x.jpg", mirrored=True)
    write(tmp_path / "regions_boxes")
    with pytest.raises(BadImage, match="regions_boxes_mirrored/7.npz: no such"):
        source.of_objects(asked, mirrored=True)
    write(tmp_path / "regions_boxes_mirrored", features=np.full((N, D), 2))
    assert source.of_objects(asked, mirrored=True).features.min() == 2 > source.of_objects(asked).features.max()
    (tmp_path / "a.tsv").write_text(tsv_line(7, BOXES, np.zeros((N, D))))
    table = regions.TsvRegions([tmp_path / "a.tsv"])
    assert not table.mirrors
    with pytest.raises(UserError, match="mirrored pictures do not come as .tsv"):
        table(7, "x.jpg", mirrored=True)


class Mirrors:
    """A source whose features say whether they are mirrored."""

    mirrors = True

    def __call__(self, image_id, image, mirrored=False):
        return Regions(np.full((1, 1), mirrored, np.float32), np.ones((1, 4), np.float32), (9, 9))

    def of_objects(self, item, mirrored=False):
        return self(0, None, mirrored)


def test_mirrored_questions():
    """Half of them in training: regions, question and answers' classes together."""
    tokenizer = language.Tokenizer.train(["the left dog or the right dog"] * 3, 300)
    asked = data.Example("q", (1,), ("x.jpg",), "The left dog?", answers=("right",) * 4 + ("left",) + ("yes",) * 5)
    samples = data.Examples([asked], tokenizer, 8, answers=("left", "right", "yes"), train=True, regions=Mirrors(),
                            mirror=0.5)  # fmt: skip
    seen = [samples[epoch, 0] for epoch in range(60)]
    n_mirrored = 0
    for sample in seen:
        mirrored = bool(sample["regions"].features[0, 0])
        n_mirrored += mirrored
        assert tokenizer.decode(sample["texts"][0][0]) == ("the right dog?" if mirrored else "the left dog?")
        assert dict(sample["soft"]) == ({0: 1, 1: 0.3, 2: 1} if mirrored else {1: 1, 0: 0.3, 2: 1})
    assert 15 < n_mirrored < 45


def test_mirrored_choices():
    """Regions, objects, question, answers and rationales together; tags and label stay."""
    tokenizer = language.Tokenizer.train(["is left right of"] * 3, 300)
    words = [data.Tagged(tuple(text.split()), (-1, 0)) for text in ("left dog", "Right cat", "leftmost cat", "a cat")]
    asked = data.Choice("q", (1,), ("x.jpg",), words[0], (*words[1:], words[1]), (*words[1:], words[2]), 0, 1, ("dog",))
    for task in ("qa", "qar"):
        samples = data.Choices([asked], tokenizer, 8, task=task, train=True, regions=Mirrors(), mirror=0.5)
        seen = {bool(one["regions"].features[0, 0]): one for one in (samples[epoch, 0] for epoch in range(20))}
        assert all(one["objects"].features[0, 0] == mirrored for mirrored, one in seen.items())
        assert seen[True]["tags"][0][0][-1] == 0 and seen[True]["label"] == seen[False]["label"] == (task == "qar")
        said, mirrored = ([[tokenizer.decode(part) for part in row] for row in seen[m]["texts"]] for m in (False, True))
        assert [[language.swap_sides(part) for part in row] for row in said] == mirrored
        assert mirrored[0] == ["right dog", "left cat"] + ["left cat"] * (task == "qar")


def test_where_nothing_is_mirrored():
    """Then no number is drawn either, so that runs without mirrors stay as they were."""
    asked = data.Example("q", (1,), ("x.jpg",), "left?")
    tables = Mirrors()
    tables.mirrors = False
    for more in (dict(train=True, regions=Mirrors()), dict(regions=Mirrors(), mirror=1.0),
                 dict(train=True, mirror=1.0), dict(train=True, regions=tables, mirror=1.0)):  # fmt: skip
        luck = random.Random(0)
        assert not data.Examples([asked], None, 8, **more).is_mirrored(luck)
        assert luck.getstate() == random.Random(0).getstate()
    captions = data.Pictures([data.Item(1, "x.jpg", ("left",))], language.Tokenizer.train(["left"], 300), 8, captions=1,
                             train=True, regions=Mirrors(), mirror=1.0)  # fmt: skip
    sample = captions[0, 0]
    assert sample["regions"].features[0, 0] == 0 and sample["ids"] == [captions.tokenizer.encode("left")]


def test_classes_only_where_all_have_them():
    some, none = (
        Regions(np.ones((1, D)), np.ones((1, 4)), (9, 9), np.ones((1, C))),
        Regions(np.ones((2, D)), np.ones((2, 4)), (9, 9)),
    )
    assert "regions_classes" not in data.pad_regions([some, none]) and "x_classes" in data.pad_regions([some], "x")
    with pytest.raises(UserError, match="features of 3 and 8 numbers"):
        data.pad_regions([some, Regions(np.ones((1, 3)), np.ones((1, 4)), (9, 9))])


def test_choices_with_regions():
    items = corpora.load("scenes", task="vcr", n_train=4, n_val=1, n_test=1).splits["train"]
    tokenizer = language.Tokenizer.train(["object is in what are alike"] * 3, 300)
    choices = data.Choices(items, tokenizer, 32, train=True, augment="crop+flip", regions=regions.SceneRegions())
    (batch,) = data.train_loader(choices, 2, steps=1)
    assert batch["objects"].shape[0] == 2 and batch["regions"].shape[2] == 768 and batch["objects_keep_mask"].any()
    assert batch["tags"].max() < batch["objects"].shape[1] and batch["tags"].shape == batch["ids"].shape


def test_choices_are_not_augmented():
    """Cropped or mirrored, the picture would leave its boxes."""
    items = corpora.load("scenes", task="vcr", n_train=2, n_val=1, n_test=1).splits["train"]
    tokenizer = language.Tokenizer.train(["object"] * 3, 300)
    still = data.Choices(items, tokenizer, 32)[0]["pixels"]
    drawn = data.Choices(items, tokenizer, 32, train=True, augment="crop+flip")
    assert all(torch.equal(drawn[epoch, 0]["pixels"], still) for epoch in range(5))


def test_pairs_have_no_regions():
    items = corpora.load("scenes", task="nlvr2", n_train=4, n_val=4, n_test=4).splits["train"]
    tokenizer = language.Tokenizer.train(["one picture shows"], 300)
    with pytest.raises(UserError, match="leave out --regions"):
        list(data.eval_loader(data.Examples(items, tokenizer, 32, regions=regions.SceneRegions()), 2))


# Regions as models read them


def test_overlap_by_hand():
    """Edges are pixels: a box of one point has an area of one."""
    boxes = torch.tensor([[[0, 0, 9, 9], [0, 5, 9, 14], [30, 30, 30, 30], [10, 0, 19, 9.0]]])
    found = regions.iou(boxes)[0]
    assert torch.equal(found, found.T) and found.diagonal().tolist() == [1, 1, 1, 1]
    assert found[0].tolist() == pytest.approx([1, 50 / 150, 0, 0])
    assert regions.iou(boxes + 0.5)[0, 0, 3] == 0


def listed(lengths, D_in=2, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        low = rng.uniform(0, 5, (n, 2))
        boxes = np.concatenate([low, low + 2], 1).astype(np.float32)
        rows.append(Regions(rng.normal(size=(n, D_in)).astype(np.float32), boxes, (10, 10)))
    return rows


def test_a_global_region_comes_first():
    batch = data.pad_regions(listed([3, 1]))
    found = regions.of_batch(batch, 50)
    assert found["locations"][:, 0].tolist() == [[0, 0, 1, 1, 1]] * 2
    torch.testing.assert_close(found["features"][0, 0], batch["regions"][0].mean(0))
    torch.testing.assert_close(found["features"][1, 0], batch["regions"][1, 0])
    assert torch.equal(found["features"][:, 1:], batch["regions"])
    assert torch.equal(found["locations"][:, 1:], batch["regions_locations"])
    assert found["region_keep_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    none = regions.with_global(torch.ones(1, 2, 3), torch.zeros(1, 2, 5), torch.ones(1, 2) > 0, torch.tensor([0]))
    assert none["features"][0, 0].tolist() == [2, 2, 2], "divided by 1, where nothing is left"


@pytest.mark.parametrize("most", [50, 4, 2])
def test_objects_and_detected_regions_in_one_list(most):
    """Objects come last and have priority; the global feature is that of both lists, weighted by their rows."""
    detected, tagged = listed([3, 2]), listed([2, 4], seed=1)
    batch = data.pad_regions(detected) | data.pad_regions(tagged, "objects")
    found = regions.of_batch(batch, most)
    for i, (a, b) in enumerate(zip(detected, tagged, strict=True)):
        kept = min(len(b.boxes), most)
        n = int(found["region_keep_mask"][i].sum())
        assert n == 1 + min(most, len(a.boxes) + kept) and found["region_keep_mask"][i, :n].all()
        wanted = np.concatenate([a.features[: most - kept], b.features[:kept]])
        assert np.array_equal(found["features"][i, 1:n].numpy(), wanted)
        boxes = np.concatenate([a.locations()[: most - kept], b.locations()[:kept]])
        np.testing.assert_allclose(found["locations"][i, 1:n].numpy(), boxes, atol=1e-6)
        weights = np.array([len(a.boxes) + 1, len(b.boxes) + 1])
        mean = (weights[0] * a.features.mean(0) + weights[1] * b.features.mean(0)) / weights.sum()
        np.testing.assert_allclose(found["features"][i, 0].numpy(), mean, atol=1e-5)
        assert found["locations"][i, 0].tolist() == [0, 0, 1, 1, 1] and not found["features"][i, n:].any()


def test_what_a_corpus_learns_of_its_regions(tmp_path):
    """The first picture that can be read tells how many numbers and classes there are."""
    from types import SimpleNamespace

    folder = write(tmp_path / "regions", "b")
    items = [data.Item(name, tmp_path / f"{name}.jpg", ("x",)) for name in "ab"]

    def attached(items=items, **changed):
        cfg = SimpleNamespace(regions="files", data=str(tmp_path / "x.jsonl"), root="", max_regions=2, mirror=0.0,
                              feature_dim=0, region_classes=0, task="pretrain")  # fmt: skip
        cfg.__dict__.update(changed)
        corpus = data.Corpus("mine", {"train": items, "val": items, "test": items})
        regions.attach(corpus, cfg)
        return corpus, cfg

    corpus, cfg = attached()
    assert (cfg.feature_dim, cfg.region_classes) == (D, C) and corpus.notes == []
    assert len(corpus.regions("b", "b.jpg").boxes) == 2
    assert attached(region_classes=C)[1].region_classes == C
    assert attached(feature_dim=D)[1].feature_dim == D
    assert attached(mirror=0.5)[0].notes == ["there are no mirrored regions, so --mirror does nothing"]
    with pytest.raises(UserError, match="regions of 8 numbers, where the model reads 9"):
        attached(feature_dim=9)
    with pytest.raises(UserError, match="regions of 5 classes, where the model knows 7"):
        attached(region_classes=7)
    assert attached(region_classes=7, task="caption")[1].region_classes == 7, "which needs no classes"
    with pytest.raises(UserError, match="none of the first pictures of mine has regions: .*a.npz: no such region file"):
        attached(items[:1])
    corpus = attached()[0]
    few = np.full((len(corpus.regions("b", "b.jpg").boxes) + 1, C - 1), 0.1, dtype=np.float32)
    write(folder, "a", cls_prob=few)
    with pytest.raises(data.BadImage, match=f"{C - 1} class probabilities a region; {C} are expected"):
        corpus.regions("a", "a.jpg")
    (folder / "a.npz").unlink()
    write(folder, "b", cls_prob=None)
    assert attached()[1].region_classes == 0
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    corpus, cfg = attached(regions="grid")
    assert cfg.feature_dim == 768 and "grid of crops" in corpus.notes[0]


def test_regions_of_a_users_picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    for picture in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        assert regions.of_picture(picture, "grid", "coco").features.shape == (16, 768)
    scene = scenes.make_scene(scenes.get_world("tiny"), "test", 3)
    assert np.array_equal(regions.of_picture("test:3", "files", "scenes").features, scenes.regions(scene)["features"])
    assert regions.of_picture("test:3", "grid", "scenes").features.shape == (16, 768)
    full = scenes.regions(scenes.make_scene(scenes.get_world("full"), "test_compositional", 3))["features"]
    assert np.array_equal(regions.of_picture("test_compositional:3", "files", "scenes", "full").features, full)
    for told in ("a.png", "test:x", "nothing:3"):
        with pytest.raises(UserError, match="give SPLIT:NUMBER, like test:0"):
            regions.of_picture(told, "files", "scenes")
    with pytest.raises(UserError, match="give an .npz file of regions, or a path with one"):
        regions.of_picture(Image.new("RGB", (3, 3)), "files", "coco")
    with pytest.raises(UserError, match="neither .*a.npz nor .*regions/a.npz is there"):
        regions.of_picture(tmp_path / "a.png", "files", "coco")
    with pytest.raises(UserError, match="no.jpg: no such file; give another"):
        regions.of_picture(tmp_path / "no.jpg", "grid", "coco")
    write(tmp_path / "regions", "a")
    assert len(regions.of_picture(tmp_path / "a.png", "files", "coco").boxes) == N
    assert len(regions.of_picture(tmp_path / "a.png", "files", "coco", most=2).boxes) == 2
    write(tmp_path, "a", features=np.ones((N, D)))
    assert regions.of_picture(tmp_path / "a.png", "files", "coco").features.min() == 1, "beside it first"
    assert len(regions.of_picture(tmp_path / "regions" / "a.npz", "files", "coco").boxes) == N
    (tmp_path / "a.npz").write_bytes(b"half")
    with pytest.raises(UserError, match="a.npz: cannot be read"):
        regions.of_picture(tmp_path / "a.png", "files", "coco")
