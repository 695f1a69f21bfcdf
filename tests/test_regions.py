"""Region features: official .npz and .tsv files, grids, scenes; what is wrong with a file is said, never used."""

import base64

import numpy as np
import pytest
import torch
from PIL import Image

import corpora
import data
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
    found = corpora.NpzRegions(write(tmp_path / "regions"))(7, "anywhere.jpg")
    whole = arrays()
    assert found.size == (40, 30) and np.array_equal(found.features, whole["features"])
    assert np.array_equal(found.boxes, whole["boxes"]) and np.array_equal(found.classes, whole["cls_prob"])
    locations = found.locations()
    assert locations.shape == (N, 5)
    assert locations[0] == pytest.approx([1 / 40, 2 / 30, 30 / 40, 20 / 30, 29 * 18 / 1200])
    assert locations[1].tolist() == [0, 0, 1, 1, 1] and locations.dtype == np.float32
    first = corpora.NpzRegions(tmp_path / "regions", most=2)(7, "anywhere.jpg")
    assert np.array_equal(first.features, whole["features"][:2]) and len(first.boxes) == len(first.classes) == 2


def test_a_file_goes_by_the_image_id_or_by_the_picture(tmp_path):
    folder = write(tmp_path / "regions", "1000092795")
    assert len(corpora.NpzRegions(folder)(3, "flickr30k-images/1000092795.jpg").boxes) == N
    (folder / "sub").mkdir()
    with pytest.raises(BadImage, match="sub/1000092795.jpg.npz: no such"):  # another picture of that name
        corpora.NpzRegions(folder)("sub/1000092795.jpg", "sub/1000092795.jpg")
    write(folder / "sub", "a.jpg")
    assert len(corpora.NpzRegions(folder)("sub/a.jpg", "x/sub/a.jpg").boxes) == N
    with pytest.raises(BadImage, match="8.npz: no such region file; `python tools/regions.py`"):
        corpora.NpzRegions(folder)(8, "other.jpg")


def test_ids_that_are_text_are_no_other_pictures_names(tmp_path):
    """Visual Genome's vg-9 lies in 9.jpg, which is not COCO's picture 9; films of VCR have folders of their own."""
    folder = write(tmp_path / "regions", "9")
    with pytest.raises(BadImage, match="vg-9.npz: no such"):
        corpora.NpzRegions(folder)("vg-9", "VG_100K/9.jpg")
    write(folder / "film", "a@0")
    assert len(corpora.NpzRegions(folder)("val-3", "vcr1images/film/a@0.jpg").boxes) == N
    with pytest.raises(UserError, match="not below"):
        corpora.NpzRegions(folder)("../out", "x.jpg")


def test_other_keys_are_not_read(tmp_path):
    """Detectors leave more beside: objects that only pickle could read, or a lot of it."""
    folder = write(tmp_path / "regions", objects=np.array([{"name": "dog"}], dtype=object))
    assert len(corpora.NpzRegions(folder)(7, "x.jpg").boxes) == N


def test_without_class_probabilities(tmp_path):
    assert corpora.NpzRegions(write(tmp_path / "regions", cls_prob=None))(7, "x.jpg").classes is None


def test_a_folder_that_is_not_there_names_the_two_ways_on(tmp_path):
    with pytest.raises(UserError, match="tools/regions.py.*--regions grid"):
        corpora.NpzRegions(tmp_path / "regions")


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
    source = corpora.NpzRegions(write(tmp_path / "regions", **changed), n_classes=C)
    with pytest.raises(BadImage, match=message) as caught:
        source(7, "x.jpg")
    assert "7.npz" in str(caught.value)


def test_a_truncated_file_is_bad(tmp_path):
    folder = write(tmp_path / "regions")
    (folder / "7.npz").write_bytes((folder / "7.npz").read_bytes()[:200])
    with pytest.raises(BadImage, match="7.npz: cannot be read"):
        corpora.NpzRegions(folder)(7, "x.jpg")


def test_rounding_at_the_edge_is_clipped(tmp_path):
    folder = write(tmp_path / "regions", boxes=np.array([[-0.4, -0.9, 40.6, 30.2]] * N))
    assert corpora.NpzRegions(folder)(7, "x.jpg").boxes.tolist() == [[0, 0, 40, 30]] * N


def tsv_line(image_id, boxes, features, width=40, height=30, n=None):
    cells = [image_id, width, height, len(boxes) if n is None else n]
    cells += [base64.b64encode(np.array(array, "<f4").tobytes()).decode() for array in (boxes, features)]
    return "\t".join(map(str, cells)) + "\n"


def test_tsv(tmp_path):
    """Width comes before height; the index finds a line in any of the files."""
    features = np.random.default_rng(1).random((N, D), dtype=np.float32)
    (tmp_path / "a.tsv").write_text(tsv_line(5, BOXES, features + 1) + tsv_line(7, BOXES, features))
    (tmp_path / "b.tsv").write_text(tsv_line(9, BOXES[:1], features[:1]))
    source = corpora.TsvRegions([tmp_path / "a.tsv", tmp_path / "b.tsv"])
    found = source(7, "x.jpg")
    assert np.array_equal(found.features, features) and np.array_equal(found.boxes, np.array(BOXES, np.float32))
    assert found.size == (40, 30) and found.classes is None and "no class probabilities" in source.note
    assert len(source(1, "somewhere/9.jpg").boxes) == 1 and source(5, "x").features[0, 0] == features[0, 0] + 1
    assert len(corpora.TsvRegions([tmp_path / "a.tsv"], most=2)(7, "x").boxes) == 2
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
        corpora.TsvRegions([tmp_path / "a.tsv"])(7, "x.jpg")


def test_a_grid_of_crops(tmp_path):
    """Row-major cells of the whole picture, each a 16 x 16 crop in 0..1."""
    quarters = np.zeros((60, 80, 3), np.uint8)
    quarters[:30, 40:] = 255
    quarters[30:, :40, 0] = 255
    Image.fromarray(quarters).save(tmp_path / "a.png")
    found = data.GridRegions(rows=2)("a.png", tmp_path / "a.png")
    assert found.features.shape == (4, 768) and found.classes is None and found.features.dtype == np.float32
    crops = found.features.reshape(4, 16, 16, 3)[:, 8, 8]
    assert crops.tolist() == [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert found.locations().tolist() == [[0, 0, 0.5, 0.5, 0.25], [0.5, 0, 1, 0.5, 0.25], [0, 0.5, 0.5, 1, 0.25],
                                          [0.5, 0.5, 1, 1, 0.25]]  # fmt: skip
    assert data.GridRegions()("a.png", tmp_path / "a.png").features.shape == (16, 768)


def test_where_regions_come_from(tmp_path, monkeypatch):
    """Files below the folder of the data set, .npz or .tsv; a grid where asked for; those of scenes."""
    write(tmp_path / "regions")
    source = corpora.region_source("files", "coco", tmp_path, most=2)
    assert len(source(7, "x.jpg").boxes) == 2 and source.note == ""
    own = corpora.region_source("files", str(tmp_path / "photos.jsonl"))
    assert isinstance(own, corpora.NpzRegions) and len(own(7, "x.jpg").boxes) == N
    assert corpora.region_source("files", str(tmp_path)).folder == tmp_path / "regions"
    (tmp_path / "vqa").mkdir()
    (tmp_path / "coco").mkdir()
    write(tmp_path / "coco" / "regions")
    assert len(corpora.region_source("files", "vqa", tmp_path / "vqa")(7, "x.jpg").boxes) == N  # COCO's serve VQA
    one = {name: arrays()[name][:1] for name in ("features", "boxes", "cls_prob")}
    write(tmp_path / "vqa" / "regions", num_boxes=None, **one)
    assert len(corpora.region_source("files", "vqa", tmp_path / "vqa")(7, "x.jpg").boxes) == 1
    (tmp_path / "regions" / "train.tsv.0").write_text(tsv_line(7, BOXES, np.zeros((N, D))))
    tables = corpora.region_source("files", "coco", tmp_path, most=1)
    assert isinstance(tables, corpora.TsvRegions) and len(tables(7, "x.jpg").boxes) == 1
    assert "grid of crops" in corpora.region_source("grid", "coco", tmp_path).note
    assert isinstance(corpora.region_source("files", "scenes"), corpora.SceneRegions)
    with pytest.raises(UserError, match="did you mean grid"):
        corpora.region_source("gird", "coco", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/vqa/regions is not there"):
        corpora.region_source("files", "vqa")


def test_regions_of_scenes():
    corpus = corpora.load("scenes", n_train=3, n_val=1, n_test=1)
    item = corpus.splits["train"][1]
    found, whole = corpora.SceneRegions()(item.image_id, item.image), scenes.regions(item.image)
    assert np.array_equal(found.features, whole["features"]) and np.array_equal(found.classes, whole["cls_prob"])
    assert found.checked("scene", n_classes=25) is found and found.size == (64, 64)


def test_regions_of_objects(tmp_path):
    """Of scenes the objects without the panel; of a grid crops at the boxes; of files a second folder."""
    items = corpora.load("scenes", task="vcr", world="full", n_train=40, n_val=1, n_test=1).splits["train"]
    item = next(item for item in items if item.images[0].panel)
    source = corpora.SceneRegions()
    objects = source.of_objects(item)
    assert len(objects.boxes) == len(item.objects) == len(source(0, item.images[0]).boxes) - 1
    crops = data.GridRegions().of_objects(item)
    assert crops.features.shape == (len(item.objects), 768)
    assert np.allclose(crops.locations(), objects.locations(), atol=1e-5)
    assert np.abs(crops.features - objects.features).mean() < 0.1  # the same crops, at another size, without noise
    folder = write(tmp_path / "regions", str(item.image_ids[0]))
    with pytest.raises(BadImage, match="regions_boxes"):
        corpora.NpzRegions(folder).of_objects(item)
    write(tmp_path / "regions_boxes", str(item.image_ids[0]), features=np.ones((N, D)))
    assert corpora.NpzRegions(folder).of_objects(item).features.min() == 1


def test_batches_of_regions(tmp_path):
    folder = write(write(tmp_path / "regions", "a"), "b", **{
        name: arrays()[name][:2] for name in ("features", "boxes", "cls_prob")}, num_boxes=np.array([2]))  # fmt: skip
    items = [data.Item(name, tmp_path / f"{name}.jpg", ("a caption",)) for name in ("a", "b", "c")]
    pictures = data.Pictures(items[:2], None, 32, regions=corpora.NpzRegions(folder))
    (batch,) = data.eval_loader(pictures, 2)
    assert batch["regions"].shape == (2, N, D) and batch["regions_classes"].shape == (2, N, C) and "pixels" not in batch
    assert batch["regions_locations"].shape == (2, N, 5) and batch["regions_boxes"].shape == (2, N, 4)
    assert batch["regions_keep_mask"].tolist() == [[True] * 3, [True, True, False]]
    assert torch.equal(batch["regions"][1, :2], torch.from_numpy(arrays()["features"][:2])) and batch["captions"]
    assert not batch["regions"][1, 2].any() and not batch["regions_locations"][1, 2].any()
    train = data.Pictures(items, data.Tokenizer.train(["a caption"], 300), 32, captions=1, train=True,
                          regions=corpora.NpzRegions(folder))  # fmt: skip
    (batch,) = data.train_loader(train, 3, steps=1)
    assert len(batch["regions"]) == 2 and "c.npz: no such region file" in batch["bad"][0] and len(batch["ids"]) == 2
    with pytest.raises(UserError, match="c.npz"):  # evaluation leaves none out
        list(data.eval_loader(data.Pictures(items, None, 32, regions=corpora.NpzRegions(folder)), 3))


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
    tokenizer = data.Tokenizer.train(["object is in what are alike"] * 3, 300)
    choices = data.Choices(items, tokenizer, 32, train=True, augment="crop+flip", regions=corpora.SceneRegions())
    (batch,) = data.train_loader(choices, 2, steps=1)
    assert batch["objects"].shape[0] == 2 and batch["regions"].shape[2] == 768 and batch["objects_keep_mask"].any()
    assert batch["tags"].max() < batch["objects"].shape[1] and batch["tags"].shape == batch["ids"].shape


def test_choices_are_not_augmented():
    """Cropped or mirrored, the picture would leave its boxes."""
    items = corpora.load("scenes", task="vcr", n_train=2, n_val=1, n_test=1).splits["train"]
    tokenizer = data.Tokenizer.train(["object"] * 3, 300)
    still = data.Choices(items, tokenizer, 32)[0]["pixels"]
    drawn = data.Choices(items, tokenizer, 32, train=True, augment="crop+flip")
    assert all(torch.equal(drawn[epoch, 0]["pixels"], still) for epoch in range(5))


def test_pairs_have_no_regions():
    items = corpora.load("scenes", task="nlvr2", n_train=4, n_val=4, n_test=4).splits["train"]
    tokenizer = data.Tokenizer.train(["one picture shows"], 300)
    with pytest.raises(UserError, match="leave out --regions"):
        list(data.eval_loader(data.Examples(items, tokenizer, 32, regions=corpora.SceneRegions()), 2))
