"""The official layouts, on generated files of their form and on the real samples."""

import json
from pathlib import Path

import pytest
from PIL import Image

import scenes
from common import UserError
from corpora import load
from data import BadImage, load_image


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), "white").save(path)


def karpathy_record(i, split, filename, *raw, **more):
    return {"filename": filename, "imgid": i, "split": split, "sentids": [],
            "sentences": [{"tokens": text.lower().split(), "raw": text, "imgid": i, "sentid": j}
                          for j, text in enumerate(raw)], **more}  # fmt: skip


def coco_records():
    def record(i, cocoid, split, folder, *raw):
        return karpathy_record(i, split, f"COCO_{folder}_{cocoid:012d}.jpg", *raw, cocoid=cocoid, filepath=folder)

    return [record(0, 42, "test", "val2014", "Two dogs\non a sofa. ", "Dogs."),
            record(1, 9, "train", "train2014", "A cat."), record(2, 73, "restval", "val2014", "A boat."),
            record(3, 133, "val", "val2014", "A hat.")]  # fmt: skip


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_root(root, records=None, place=".", pictures=True):
    records = coco_records() if records is None else records
    write_json(root / place / "dataset_coco.json", {"dataset": "coco", "images": records})
    for record in records if pictures else ():
        picture(root / record["filepath"] / record["filename"])
    return root


def ids(corpus):
    return {split: [item.image_id for item in items] for split, items in corpus.splits.items()}


def all_open(corpus):
    return all(load_image(item.image, 8).size == (12, 8) for items in corpus.splits.values() for item in items)


# COCO


@pytest.mark.parametrize("place", [".", "karpathy", "annotations"])
def test_karpathy_coco(tmp_path, place):
    corpus = load("coco", coco_root(tmp_path, place=place))
    assert corpus.name == "coco" and corpus.notes == []
    assert ids(corpus) == {"train": [9, 73], "val": [133], "test": [42]}  # restval trains too
    assert corpus.splits["test"][0].captions == ("Two dogs on a sofa.", "Dogs.")
    assert corpus.splits["train"][1].image == tmp_path / "val2014" / "COCO_val2014_000000000073.jpg"
    assert all_open(corpus)


def test_two_split_files_are_named(tmp_path):
    coco_root(tmp_path)
    write_json(tmp_path / "karpathy" / "dataset_other.json", {"images": []})
    with pytest.raises(UserError, match="(?s)dataset_coco.json.*dataset_other.json"):
        load("coco", tmp_path)


def test_default_root(tmp_path, monkeypatch):
    coco_root(tmp_path / "data" / "coco")
    monkeypatch.chdir(tmp_path)
    assert load("coco").splits["val"][0].image == Path("data/coco/val2014/COCO_val2014_000000000133.jpg")


@pytest.mark.parametrize("folder", ["images", "images/val2014"])
def test_pictures_below_images(tmp_path, folder):
    coco_root(tmp_path, pictures=False)
    for record in coco_records():
        picture(tmp_path / folder.replace("val2014", record["filepath"]) / record["filename"])
    assert all_open(load("coco", tmp_path))


def test_names_of_2014_are_found_in_the_folders_of_2017(tmp_path):
    coco_root(tmp_path, pictures=False)
    for folder, cocoid in (("val2017", 42), ("train2017", 9), ("train2017", 73), ("val2017", 133)):
        picture(tmp_path / folder / f"{cocoid:012d}.jpg")
    corpus = load("coco", tmp_path)
    assert all_open(corpus) and corpus.splits["test"][0].image == tmp_path / "val2017" / "000000000042.jpg"


def test_files_without_filepath_lie_in_the_official_folders(tmp_path):
    records = [{k: v for k, v in record.items() if k != "filepath"} for record in coco_records()]
    write_json(tmp_path / "dataset_coco.json", {"images": records})
    for record in coco_records():
        picture(tmp_path / record["filepath"] / record["filename"])
    assert all_open(load("coco", tmp_path))


def official_coco(root, year):
    for split, image_ids in (("train", [9, 25]), ("val", [42])):
        names = {i: f"{i:012d}.jpg" if year == 2017 else f"COCO_{split}2014_{i:012d}.jpg" for i in image_ids}
        write_json(root / "annotations" / f"captions_{split}{year}.json", {
            "info": {}, "licenses": [], "images": [{"id": i, "file_name": names[i]} for i in image_ids],
            "annotations": [{"id": 10 * i + j, "image_id": i, "caption": f" A thing {i},\nnumber {j}. "}
                            for j in range(5) for i in image_ids]})  # fmt: skip
        for i in image_ids:
            picture(root / f"{split}{year}" / names[i])
    return root


@pytest.mark.parametrize("year", [2014, 2017])
def test_official_coco_without_karpathy(tmp_path, year):
    corpus = load("coco", official_coco(tmp_path, year))
    assert ids(corpus) == {"train": [9, 25], "test": [42]} and all_open(corpus)
    assert corpus.splits["train"][1].captions == tuple(f"A thing 25, number {j}." for j in range(5))
    notes = " ".join(corpus.notes)
    assert f"val{year} serves as test" in notes and "`best` is `last`" in notes


def test_of_two_releases_the_one_with_pictures_is_taken(tmp_path):
    official_coco(tmp_path, 2014)
    official_coco(tmp_path, 2017)
    for split in ("train", "val"):
        (tmp_path / f"{split}2014").rename(tmp_path / f"elsewhere{split}")
    corpus = load("coco", tmp_path)
    assert corpus.splits["test"][0].image.parent.name == "val2017" and "val2017 serves as test" in corpus.notes[0]
    coco_root(tmp_path)  # and a Karpathy file comes before both
    assert ids(load("coco", tmp_path))["val"] == [133]


def test_official_coco_with_parts_lacking(tmp_path):
    official_coco(tmp_path, 2017)
    (tmp_path / "annotations" / "captions_train2017.json").unlink()
    file = tmp_path / "annotations" / "captions_val2017.json"
    content = json.loads(file.read_text())
    content["images"].append({"id": 43, "file_name": "000000000043.jpg"})
    write_json(file, content)
    corpus = load("coco", tmp_path)
    assert ids(corpus) == {"test": [42]}
    assert "no train split" in " ".join(corpus.notes) and "1 images of captions_val2017.json" in " ".join(corpus.notes)


def change_official(root, change):
    file = official_coco(root, 2017) / "annotations" / "captions_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


OFFICIAL_MISTAKES = {
    "caption empty": (lambda c: c["annotations"][2].update(caption=" \n"), r"annotations\[2\].*empty"),
    "caption absent": (lambda c: c["annotations"][2].pop("caption"), r"annotations\[2\].*None"),
    "no image_id": (lambda c: c["annotations"][1].pop("image_id"), r"annotations\[1\].*image_id"),
    "unknown image": (lambda c: c["annotations"][1].update(image_id=5), "image 5"),
    "no file_name": (lambda c: c["images"][0].pop("file_name"), r"images\[0\].*file_name"),
    "outside": (lambda c: c["images"][0].update(file_name="../../x.jpg"), "image 42.*below"),
    "no images": (lambda c: c.pop("images"), "captions_val2017.json.*`images`"),
}


@pytest.mark.parametrize("case", OFFICIAL_MISTAKES)
def test_mistakes_in_official_files(tmp_path, case):
    change, pattern = OFFICIAL_MISTAKES[case]
    change_official(tmp_path, change)
    with pytest.raises(UserError, match=pattern):
        load("coco", tmp_path)


KARPATHY_MISTAKES = {
    "unknown split": ({"split": "dev"}, r"images\[1\].*dev"),
    "split a list": ({"split": []}, r"images\[1\]"),
    "caption empty": ({"sentences": [{"raw": "x"}, {"raw": "\n"}]}, r"images\[1\].*COCO_train.*empty"),
    "caption a number": ({"sentences": [{"raw": 4}]}, r"images\[1\].*4"),
    "no captions": ({"sentences": []}, r"images\[1\].*no caption"),
    "captions as text": ({"sentences": "A dog."}, r"images\[1\].*Karpathy"),
    "no raw": ({"sentences": [{"tokens": ["a"]}]}, r"images\[1\].*raw"),
    "filename a number": ({"filename": 3}, "3"),
    "filename outside": ({"filename": "../../../x.jpg"}, "image 9.*below"),
    "filepath outside": ({"filepath": "../.."}, "image 9.*below"),
    "filepath absolute": ({"filepath": "/etc"}, "image 9.*below"),
}


@pytest.mark.parametrize("case", KARPATHY_MISTAKES)
def test_mistakes_in_karpathy_files(tmp_path, case):
    change, pattern = KARPATHY_MISTAKES[case]
    coco_root(tmp_path)
    records = coco_records()
    records[1].update(change)
    with pytest.raises(UserError, match=pattern):
        load("coco", coco_root(tmp_path, records, pictures=False))


@pytest.mark.parametrize("text", ['{"annotations": []}', "[]", '{"images": {}}', "{", ""])
def test_files_that_are_not_of_the_form(tmp_path, text):
    (tmp_path / "dataset_coco.json").write_text(text)
    with pytest.raises(UserError, match="dataset_coco.json"):
        load("coco", tmp_path)


def test_missing_roots_and_files_say_where_was_looked(tmp_path):
    with pytest.raises(UserError, match="(?s)nowhere does not exist.*--root"):
        load("coco", tmp_path / "nowhere")
    with pytest.raises(UserError, match="(?s)karpathy.*annotations.*captions_val2014.json.*dataset_coco.json"):
        load("coco", tmp_path)
    with pytest.raises(UserError, match="(?s)karpathy.*dataset_flickr30k.json") as caught:
        load("flickr30k", tmp_path)
    assert "captions_val" not in str(caught.value)


def test_missing_pictures(tmp_path):
    coco_root(tmp_path, pictures=False)
    with pytest.raises(UserError, match="(?s)COCO_val2014_000000000042.jpg.*images.*val2014.*train2017.*--root"):
        load("coco", tmp_path)
    for record in coco_records():  # val2014 alone is enough to evaluate
        if record["filepath"] == "val2014":
            picture(tmp_path / "val2014" / record["filename"])
    corpus = load("coco", tmp_path)
    assert [note for note in corpus.notes if "COCO_train2014_000000000009.jpg" in note and "train2014" in note]
    (tmp_path / "val2014" / "COCO_val2014_000000000042.jpg").unlink()  # one that lacks is left to the loaders
    with pytest.raises(BadImage):
        load_image(load("coco", tmp_path).splits["test"][0].image, 8)


def test_loading_looks_at_few_files_only(tmp_path, monkeypatch):
    records = [karpathy_record(i, "train", f"COCO_train2014_{i:012d}.jpg", "x", cocoid=i, filepath="train2014")
               for i in range(500)]  # fmt: skip
    coco_root(tmp_path, records)
    looks, is_file = [], Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looks.append(path) or is_file(path))
    assert len(load("coco", tmp_path).splits["train"]) == 500
    assert len(looks) < 60


# The Flickrs


@pytest.mark.parametrize("name, folder", [("flickr30k", "flickr30k-images"), ("flickr30k", "images"),
                                          ("flickr8k", "Flicker8k_Dataset"), ("flickr8k", "Flickr8k_Dataset"),
                                          ("flickr8k", "images")])  # fmt: skip
def test_flickr(tmp_path, name, folder):
    records = [karpathy_record(i, split, f"{1000 + i}.jpg", "A man lays on a bench .", "B")
               for i, split in enumerate(["train", "val", "test", "train"])]  # fmt: skip
    write_json(tmp_path / "karpathy" / f"dataset_{name}.json", {"images": records})
    for record in records:
        picture(tmp_path / folder / record["filename"])
    corpus = load(name, tmp_path)
    assert ids(corpus) == {"train": [0, 3], "val": [1], "test": [2]} and corpus.notes == []
    assert corpus.splits["train"][0].captions == ("A man lays on a bench .", "B") and all_open(corpus)


# Scenes, own data, names


def test_scenes_are_made_on_access():
    corpus = load("scenes", world="tiny", n_train=10**7, n_val=3, n_test=4, seed=5)
    assert {split: len(items) for split, items in corpus.splits.items()} == {
        "train": 10**7, "val": 3, "test": 4, "test_compositional": 4}  # fmt: skip
    assert corpus.notes == []
    item = corpus.splits["train"][9_999_999]
    assert item.image_id == 9_999_999 and item.image == scenes.Scenes("tiny", "train", 10**7, 5)[9_999_999]
    assert item.captions == tuple(scenes.captions(item.image)) and len(item.captions) == 5
    assert item == corpus.splits["train"][-1] and [i.image_id for i in corpus.splits["test"]] == [0, 1, 2, 3]
    assert corpus.splits["test"][1:3] == [corpus.splits["test"][1], corpus.splits["test"][2]]
    assert load("scenes", seed=6).splits["val"][0].image != corpus.splits["val"][0].image
    with pytest.raises(UserError, match="tinny"):
        load("scenes", world="tinny")


def test_own_data_by_path(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "captions.txt").write_text("a.jpg\tx\n")
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,x\n")
    for path in (tmp_path, tmp_path / "x.csv"):
        assert ids(load(str(path), world="tiny")) == {"train": ["a.jpg"]}  # options of scenes are none of its business


def test_unknown_names(tmp_path):
    with pytest.raises(UserError, match="flickr9k.*scenes, coco, flickr30k, flickr8k"):
        load("flickr9k")
    with pytest.raises(UserError, match="captions.txt"):
        load(str(tmp_path))


# The real samples


def test_real_coco_through_its_karpathy_file(extra):
    corpus = load("coco", extra / "realdata" / "coco_mini")
    assert {split: len(items) for split, items in corpus.splits.items()} == {"train": 50, "test": 51}
    item = corpus.splits["train"][0]
    assert item.image_id == 535506 and item.captions[0] == "She just finished chopping vegetables with the knife."
    assert all(len(item.captions) == 5 and max(load_image(item.image, 0).size) == 256 for item in corpus.splits["test"])


def test_real_coco_through_the_official_files_says_the_same(extra, tmp_path):
    real = extra / "realdata" / "coco_mini"
    for name in ("annotations", "train2017", "val2017"):
        (tmp_path / name).symlink_to(real / name)
    official, karpathy = load("coco", tmp_path), load("coco", real)
    assert "val2017 serves as test" in official.notes[0]
    for split in ("train", "test"):
        def by_id(corpus, split=split):
            return {item.image_id: (item.image.name, sorted(item.captions)) for item in corpus.splits[split]}

        assert by_id(official) == by_id(karpathy)


def test_real_flickr8k(extra):
    corpus = load("flickr8k", extra / "realdata" / "flickr8k_224")
    assert {split: len(items) for split, items in corpus.splits.items()} == {"train": 3000, "val": 500, "test": 1000}
    assert corpus.notes == [] and all(len(item.captions) == 5 for item in corpus.splits["train"])
    assert load_image(corpus.splits["test"][-1].image, 0).size == (224, 224)
