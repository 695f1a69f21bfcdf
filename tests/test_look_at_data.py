"""`python data.py check` and `where`: what is said about every data set, and what the exit status says."""

import io
import json
import os
import runpy
import subprocess
import sys
import tarfile
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import corpora
import shards
from table import Table
from tools import export, look_at_data
from tools.look_at_data import IN_ALL, PUBLISHED, Shelf, check, main

ROOT = Path(__file__).resolve().parent.parent


def picture(path, colour="white", size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def shades():
    """Colours so far apart that no two pictures are the same file."""
    return ((n % 16 * 16, n // 16 * 16, 77) for n in range(256))


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def look(capsys):
    """look(*arguments) -> (exit status, stdout), or (exit status, stderr) of an error."""

    def run(*arguments):
        status = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out or err  # stderr also tells of an index that was made

    return run


def by_command(cwd, *arguments):
    command = [sys.executable, str(ROOT / "data.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def has(out, *parts):
    words = " ".join(out.split())
    for part in parts:
        assert part in words, f"{part!r} is not in\n{out}"
    return True


# The real samples


def test_coco_mini(extra, tmp_path):
    status, out = by_command(tmp_path, "check", "coco", "--root", extra / "realdata" / "coco_mini")
    assert status == 0 and has(
        out, "coco: 50 train, 51 test", "train: 50 images (published: 113,287), 250 captions",
        "test: 51 images (published: 5,000), 255 captions", "captions per image min 5, mean 5.0, max 5",
        "pictures 51 files, all there", "smallest 256x144, median 256x171, largest 256x256",
        "duplicates: 0 groups", "missing: 0 unreadable: 0")  # fmt: skip


def test_nlvr1_small(extra, tmp_path):
    status, out = by_command(tmp_path, "check", "nlvr1", "--root", extra / "realdata" / "nlvr1_small", "--no-decode")
    assert status == 0 and has(
        out, "train: 985 statements about 2,955 pictures", "labels false 439 (44.6%), true 546 (55.4%)",
        "val: 989 statements about 989 pictures", "test: 990 statements about 990 pictures",
        "false 434 (43.8%), true 556 (56.2%)", "pictures 2,955 files, all there")  # fmt: skip
    assert "published" not in out and "duplicates" not in out


# Captions


def coco(root, n=6):
    """train in both folders of 2014, half of it each, and a picture of test."""
    colours, records = shades(), []
    for i in range(n + 1):
        folder = "train2014" if i < n // 2 else "val2014"
        name = f"COCO_{folder}_{i:012d}.jpg"
        picture(root / folder / name, next(colours))
        sentences = [{"raw": "One two three four five."}, {"raw": "One two three four five six."}]
        records.append({"filepath": folder, "filename": name, "cocoid": i, "split": "train" if i < n else "test",
                        "sentences": sentences})  # fmt: skip
    write_json(root / "dataset_coco.json", {"images": records})
    return [root / record["filepath"] / record["filename"] for record in records]


def test_captions(tmp_path, look):
    coco(tmp_path)
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 0 and has(
        out, "train: 6 images (published: 113,287), 12 captions", "words per caption min 5, mean 5.5, max 6",
        "1-5 50.0%", "6-10 50.0%", "pictures 6 files, all there", "smallest 12x8, median 12x8, largest 12x8",
        "missing: 0 unreadable: 0")  # fmt: skip


def test_missing_pictures_are_counted(tmp_path, look):
    files = coco(tmp_path, n=8)
    for file in (files[1], files[5], files[6]):
        file.unlink()
    for flag in ("--decode", "--no-decode"):
        status, out = look("check", "coco", "--root", tmp_path, flag)
        assert status == 1 and has(
            out, f"3 of 8 images missing, first: {files[1]}",
            f"most in {tmp_path}/val2014 2 of 4, {tmp_path}/train2014 1 of 4", "pictures 1 files, all there",
            "missing: 3")  # fmt: skip
    (tmp_path / "val2014" / files[5].name).mkdir()  # a folder is no picture
    assert "3 of 8 images missing" in look("check", "coco", "--root", tmp_path)[1]


def test_broken_pictures_are_listed(tmp_path, look):
    files = coco(tmp_path, n=12)
    for file in files[:11]:
        file.write_bytes(b"no picture")
    files[11].write_bytes(b"")
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 1 and has(out, "missing: 0 unreadable: 12", f"{files[0]}: not a picture")
    assert out.count(": not a picture") == 10
    status, out = look("check", "coco", "--root", tmp_path, "--no-decode")
    assert status == 0 and has(out, "unreadable: not looked for") and "picture sizes" not in out


def test_official_splits_are_not_held_to_karpathys_sizes(tmp_path, look):
    caption = {"image_id": 1, "caption": "A dog."}
    write_json(tmp_path / "captions_val2017.json",
               {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [caption]})  # fmt: skip
    picture(tmp_path / "val2017" / "1.jpg")
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 0 and has(out, "val2017 serves as test", "test: 1 images, 1 captions")


def test_published_sizes(tmp_path, look, monkeypatch):
    coco(tmp_path)
    monkeypatch.setitem(PUBLISHED, "coco", {"train": 6, "test": 1_001})
    out = look("check", "coco", "--root", tmp_path)[1]
    assert has(out, "train: 6 images (as published), 12", "test: 1 images (published: 1,001), 2")
    monkeypatch.setattr(look_at_data, "ABOUT", {"coco"})
    out = look("check", "coco", "--root", tmp_path)[1]
    assert has(out, "train: 6 images (about as published), 12", "test: 1 images (published: about 1,001), 2")


def test_the_published_sizes_fit_what_else_is_published():
    total = {name: sum(sizes.values()) for name, sizes in PUBLISHED.items()}
    assert total["coco"] == 123_287 and total["flickr30k"] == 31_014
    assert total["nlvr2"] == 107_292  # examples, lil.nlp.cornell.edu/nlvr
    assert total["snli_ve"] == 565_286  # pairs, necla-ml/SNLI-VE:README.md
    assert 10 * PUBLISHED["vqa"]["train"] == 4_437_570 and 10 * PUBLISHED["vqa"]["val"] == 2_143_540  # answers
    nocaps = dict(PUBLISHED["nocaps"])
    assert nocaps.pop("server_test") + nocaps["test"] == 15_100
    assert nocaps.pop("test") == sum(nocaps.values()) == 4_500
    assert look_at_data.ABOUT == {"vcr"} and PUBLISHED.keys() | IN_ALL.keys() <= set(corpora.NAMES)
    assert IN_ALL["cc3m"] == PUBLISHED["cc3m"]["train"] and 5e6 < look_at_data.VG_REGIONS < 50 * 1.1 * IN_ALL["vg"]


def nocaps(root):
    colours = shades()
    domains = ["in-domain", "near-domain", "out-domain", "near-domain"]
    images = [{"id": i, "file_name": f"{i}.jpg", "domain": domain} for i, domain in enumerate(domains)]
    captions = [{"image_id": i, "caption": "A dog here."} for i in range(4) for _ in range(10)]
    write_json(root / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    write_json(root / "nocaps_test_image_info.json", {"images": [{"id": i, "file_name": f"t{i}.jpg"} for i in (7, 8)]})
    for name in ("val/0", "val/1", "val/2", "val/3", "test/t7", "test/t8"):
        picture(root / f"{name}.jpg", next(colours))


def test_nocaps(tmp_path, look):
    nocaps(tmp_path)
    status, out = look("check", "nocaps", "--root", tmp_path)
    assert status == 0 and has(
        out, "test: 4 images (published: 4,500), 40", "test_in_domain: 1 images (published: 648), 10",
        "test_near_domain: 2 images (published: 2,938)", "test_out_domain: 1 images (published: 914)",
        "server_test: 2 images (published: 10,600), 0", "captions none here: only a server has them",
        "duplicates: 0")  # fmt: skip
    assert "shared" not in out  # a domain is a part of test
    (tmp_path / "test" / "t8.jpg").write_bytes(b"")  # hidden captions, but the pictures are needed
    status, out = look("check", "nocaps", "--root", tmp_path)
    assert status == 1 and has(out, "unreadable: 1", "t8.jpg: the file is empty")


# Questions, statements, hypotheses


def vqa(root, n_train=12, n_val=4, n_test=2):
    """Of train, the first two questions have answers that nobody else gives."""
    colours, number = shades(), 0
    for name, n in (("train2014", n_train), ("val2014", n_val), ("test2015", n_test)):
        questions, annotations = [], []
        for i in range(n):
            number += 1
            asked = {"question_id": 10 * number, "image_id": number // 2 if name == "train2014" else number}
            picture(root / name / f"COCO_{name}_{asked['image_id']:012d}.jpg", next(colours))
            questions.append({**asked, "question": "Is it red?" if i % 2 else "How many dogs are there?"})
            most = f"odd {i}" if name == "train2014" and i < 2 else "yes"
            kind = "other" if most != "yes" else "yes/no"
            annotations.append({**asked, "answer_type": kind, "question_type": "is", "multiple_choice_answer": most,
                                "answers": [{"answer": most}] * 10})  # fmt: skip
        write_json(root / f"v2_OpenEnded_mscoco_{name}_questions.json", {"questions": questions})
        if name != "test2015":
            write_json(root / f"v2_mscoco_{name}_annotations.json", {"annotations": annotations})


def test_vqa(tmp_path, look):
    vqa(tmp_path)
    status, out = look("check", "vqa", "--root", tmp_path)
    assert status == 0 and has(
        out, "answer vocabulary: 1 answers (published: 3,129)",
        "train: 12 questions (published: 443,757) about 7 pictures", "words per question min 3, mean 4.0, max 5",
        "answer types yes/no 10 (83.3%), other 2 (16.7%)",
        "outside vocabulary 2 questions (16.7%) without an answer that is a class",
        "most frequent answers yes 83.3%, odd 0 8.3%, odd 1 8.3%", "pictures 7 files, all there",
        "val: 4 questions (published: 214,354) about 4 pictures", "outside vocabulary 0 questions (0.0%)",
        "server_test: 2 questions (published: 447,793) about 2 pictures",
        "labels none here: only a server has them")  # fmt: skip
    (tmp_path / "test2015" / f"COCO_test2015_{18:012d}.jpg").unlink()
    status, out = look("check", "vqa", "--root", tmp_path)
    assert status == 1 and has(out, "1 of 2 pictures missing, first:", "missing: 1")


def test_vqa_trained_on_val_too(tmp_path, look, monkeypatch):
    vqa(tmp_path)
    monkeypatch.setattr(corpora, "MINI_VAL", 3)
    out = look("check", "vqa", "--root", tmp_path, "--train_on", "train+val")[1]
    assert has(out, "train: 13 questions about", "val: 3 questions about", "server_test: 2 questions (published: 447")


def test_at_most_ten_frequent_answers(tmp_path, look, monkeypatch):
    vqa(tmp_path, n_train=40)
    file = tmp_path / "v2_mscoco_train2014_annotations.json"
    content = json.loads(file.read_text())
    for i, row in enumerate(content["annotations"][:24]):
        row["answers"] = [{"answer": f"rare {i // 2}"}] * 10
    write_json(file, content)
    out = look("check", "vqa", "--root", tmp_path)[1]
    (said,) = (row for row in out.split("\n\n")[1].splitlines() if "most frequent" in row)
    assert said.count("%") == 10 and "yes 40.0%, rare 0 5.0%" in said and "rare 8 5.0%" in said


def snli_ve(root):
    colours = shades()
    for name, golds in (("train", ["entailment"] * 3 + ["neutral"]), ("dev", ["contradiction"]), ("test", ["neutral"])):
        write_lines(root / f"snli_ve_{name}.jsonl",
                    [{"Flickr30K_ID": f"{name}{i // 2}", "pairID": f"{name}-{i}", "gold_label": gold,
                      "sentence2": "Two friends smile."} for i, gold in enumerate(golds)])  # fmt: skip
        for i in range(len(golds)):
            picture(root / "flickr30k-images" / f"{name}{i // 2}.jpg", next(colours))


def test_snli_ve(tmp_path, look):
    snli_ve(tmp_path)
    status, out = look("check", "snli_ve", "--root", tmp_path)
    assert status == 0 and has(
        out, "train: 4 hypotheses (published: 529,527) about 2 pictures", "words per hypothesis min 3, mean 3.0, max 3",
        "labels contradiction 0 (0.0%), neutral 1 (25.0%), entailment 3 (75.0%)",
        "val: 1 hypotheses (published: 17,858)", "labels contradiction 1 (100.0%), neutral 0 (0.0%)",
        "test: 1 hypotheses (published: 17,901)")  # fmt: skip
    assert "shared" not in out


def test_pictures_in_two_splits_are_said(tmp_path, look):
    snli_ve(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "snli_ve_dev.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "snli_ve_dev.jsonl", [{**rows[0], "Flickr30K_ID": "train1"}])
    status, out = look("check", "snli_ve", "--root", tmp_path)
    assert status == 0 and has(out, "shared: train and val have 1 pictures in common", "duplicates: 0 groups")


def test_nlvr2(tmp_path, look):
    colours = shades()
    for name in ("train", "test1"):
        rows = [{"identifier": f"{name}-{i}-0-0", "sentence": "One image shows two dogs.", "directory": 4,
                 "label": "True" if i else "False"} for i in range(4)]  # fmt: skip
        write_lines(tmp_path / "data" / f"{name}.json", rows)
        for i in range(4):
            for side in (0, 1):
                folder = "train/4" if name == "train" else name
                picture(tmp_path / "images" / folder / f"{name}-{i}-0-img{side}.png", next(colours))
    status, out = look("check", "nlvr2", "--root", tmp_path)
    assert status == 0 and has(
        out, "no data/dev.json", "train: 4 statements (published: 86,373) about 8 pictures",
        "labels false 1 (25.0%), true 3 (75.0%)", "test: 4 statements (published: 6,967) about 8 pictures",
        "pictures 8 files, all there")  # fmt: skip
    (tmp_path / "images" / "test1" / "test1-2-0-img1.png").unlink()  # of a pair, the right one
    assert look("check", "nlvr2", "--root", tmp_path)[0] == 1


def test_other_orders_of_nlvr1_are_looked_at_too(tmp_path, look):
    for n, split in enumerate(("train", "val", "test")):
        write_lines(tmp_path / f"{split}.jsonl", [{"identifier": f"{split}-0-0", "sentence": "A box.", "label": "true",
                                                   "images": [f"images/{split}-{i}.png" for i in (0, 1)]}])  # fmt: skip
        for i in (0, 1):
            picture(tmp_path / "images" / f"{split}-{i}.png", (n, i, 0))
    assert look("check", "nlvr1", "--root", tmp_path)[0] == 0
    (tmp_path / "images" / "train-1.png").unlink()
    status, out = look("check", "nlvr1", "--root", tmp_path)
    assert status == 1 and has(out, "train: 1 statements about 2 pictures", "1 of 2 pictures missing, first:")


# VCR


def vcr(root):
    colours = shades()
    for name in ("train", "val", "test"):
        rows = []
        for i in range(3):
            stem = f"film/{name}{i}"
            objects = ["person", "car", "dog"][: i + 1]
            picture(root / "vcr1images" / f"{stem}.jpg", next(colours))
            write_json(root / "vcr1images" / f"{stem}.json", {"boxes": [[0, 0, 5, 5, 0.9]] * (i + 1)})
            rows.append({"annot_id": f"{name}-{i}", "img_id": f"{name}-i{i}", "img_fn": f"{stem}.jpg",
                         "metadata_fn": f"{stem}.json", "objects": objects, "question": ["Is", [0], "here", "?"],
                         "answer_choices": [["Yes"], ["No"], ["He", "is"], ["It", "is"]],
                         "rationale_choices": [["One"], ["Two"], ["Three"], ["Four"]],
                         **({"answer_label": 1, "rationale_label": i} if name != "test" else {})})  # fmt: skip
        write_lines(root / f"{name}.jsonl", rows)


def test_vcr(tmp_path, look):
    vcr(tmp_path)
    status, out = look("check", "vcr", "--root", tmp_path)
    assert status == 0 and has(
        out, "train: 3 questions (published: about 212,923) about 3 pictures", "words per question min 4, mean 4.0",
        "words per answer min 1, mean 1.5, max 2", "words per rationale min 1, mean 1.0, max 1",
        "words that are tags 7.1%", "objects per picture min 1, mean 2.0, max 3",
        "right answer first 0 (0.0%), second 3 (100.0%), third 0 (0.0%), fourth 0 (0.0%)",
        "right rationale first 1 (33.3%), second 1 (33.3%), third 1 (33.3%), fourth 0 (0.0%)",
        "metadata 3 files, all there", "server_test: 3 questions (published: about 25,263)",
        "labels none here: only a server has them")  # fmt: skip


def test_metadata_that_is_missing_or_wrong(tmp_path, look):
    vcr(tmp_path)
    film = tmp_path / "vcr1images" / "film"
    (film / "train0.json").unlink()
    for name, boxes in (("val1", [[0, 0, 5, 5]]), ("test2", [[9, 0, 5, 5]] * 3)):  # too few; from right to left
        write_json(film / f"{name}.json", {"boxes": boxes})
    status, out = look("check", "vcr", "--root", tmp_path)
    assert status == 1 and has(
        out, f"metadata 1 of 3 files missing, first: {film}/train0.json", f"1 wrong, first: {film}/val1.json",
        "missing: 1 unreadable: 2", f"{film}/test2.json: a box whose right")  # fmt: skip
    status, out = look("check", "vcr", "--root", tmp_path, "--no-decode")
    assert status == 1 and has(out, "missing: 1") and "wrong" not in out
    vcr(tmp_path)
    write_json(film / "val1.json", {"boxes": [[0, 0, 5, 5]]})
    assert look("check", "vcr", "--root", tmp_path)[0] == 1


# Region files


def region_file(path, n=2, width=6, classes=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    more = {"cls_prob": np.full((n, classes), 0.01)} if classes else {}
    np.savez(path, features=np.ones((n, width)), boxes=np.tile([0.0, 0, 4, 4], (n, 1)), image_w=[12], image_h=[8],
             num_boxes=[n], **more)  # fmt: skip


def test_region_files_in_tables(tmp_path, look):
    """Bottom-up attention's .tsv, in parts: looked into by their lines."""
    import base64

    coco(tmp_path, n=4)
    (tmp_path / "regions").mkdir()
    cells = [base64.b64encode(np.ones((2, width), "<f4").tobytes()).decode() for width in (4, 6)]
    rows = ["\t".join(map(str, (i, 12, 8, 2, *cells))) + "\n" for i in range(5)]
    for part, lines in (("tsv.0", rows[:3]), ("tsv.1", rows[3:])):
        (tmp_path / "regions" / f"train.{part}").write_text("".join(lines))
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 0 and has(out, "region files of 5 of 5 pictures", "class probabilities none")
    (tmp_path / "regions" / "train.tsv.1").write_text(rows[3])
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 1 and has(out, "region files of 4 of 5 pictures", "missing 1, first: image 4")


def test_region_files(tmp_path, look, monkeypatch):
    tmp_path = tmp_path / "set"
    coco(tmp_path, n=4)
    for i in range(5):
        region_file(tmp_path / "regions" / f"{i}.npz", n=i + 1, classes=25)
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 0 and has(
        out, f"{tmp_path}/regions: region files of 5 of 5 pictures", "regions a picture min 1, mean 3.0, max 5",
        "numbers a region 6", "class probabilities 25")  # fmt: skip
    (tmp_path / "regions" / "3.npz").unlink()
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 1 and has(out, "region files of 4 of 5 pictures", "missing 1, first: image 3")
    assert look("check", "coco", "--root", tmp_path, "--no-decode")[0] == 1
    region_file(tmp_path / "regions" / f"COCO_val2014_{3:012d}.npz")  # or by the picture's name; without probabilities
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 0 and has(out, "files of 5 of 5", "class probabilities 25 (4 files), 0 (1 files): some have")
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path.parent / "data").mkdir(exist_ok=True)
    (tmp_path.parent / "data" / "coco").symlink_to(tmp_path)
    assert "data/coco/regions: region files of 5 of 5" in look("check", "coco")[1]  # the default root
    region_file(tmp_path / "regions" / "1.npz", width=7)
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 1 and has(out, "numbers a region 6 (4 files), 7 (1 files): features must be of one detector")


def test_broken_region_files(tmp_path, look):
    coco(tmp_path, n=4)
    for i in range(5):
        region_file(tmp_path / "regions" / f"{i}.npz")
    for i in (1, 2):
        (tmp_path / "regions" / f"{i}.npz").write_bytes(b"PK")
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 1 and has(out, f"broken 2, first: {tmp_path}/regions/1.npz: cannot be read", "probabilities none")
    status, out = look("check", "coco", "--root", tmp_path, "--no-decode")
    assert status == 0 and has(out, "region files of 5 of 5") and "broken 2" not in " ".join(out.split())


def test_of_many_region_files_a_sample_is_read(tmp_path, look, monkeypatch):
    monkeypatch.setattr(look_at_data, "MOST_REGIONS", 3)
    coco(tmp_path, n=6)
    for i in range(7):  # 0, 2 and 4 are read
        region_file(tmp_path / "regions" / f"{i}.npz", n=i + 1)
    status, out = look("check", "coco", "--root", tmp_path)
    assert status == 0 and has(out, "read 3 of them, evenly spread", "regions a picture min 1, mean 3.0, max 5")


def test_regions_of_objects(tmp_path, look):
    vcr(tmp_path)
    for name in ("train", "val", "test"):
        for i in range(3):
            region_file(tmp_path / "regions" / f"{name}-i{i}.npz")
            region_file(tmp_path / "regions_boxes" / f"{name}-i{i}.npz", n=i + 1)
    status, out = look("check", "vcr", "--root", tmp_path)
    assert status == 0 and has(out, "/regions: region files of 9 of 9", "/regions_boxes: region files of 9 of 9")
    region_file(tmp_path / "regions_boxes" / "val-i1.npz", n=3)
    status, out = look("check", "vcr", "--root", tmp_path)
    assert status == 1 and has(out, "broken 1, first:", "regions_boxes, image val-i1: 3 regions for 2 objects")
    region_file(tmp_path / "regions_boxes" / "val-i1.npz", n=2)
    for name in ("train", "val", "test"):
        for i in range(3):
            region_file(tmp_path / "regions_mirrored" / f"{name}-i{i}.npz", n=9)
            region_file(tmp_path / "regions_boxes_mirrored" / f"{name}-i{i}.npz", n=3)  # of the other folders' number
    status, out = look("check", "vcr", "--root", tmp_path)
    assert status == 1 and has(out, "/regions_mirrored: region files of 9 of 9", "mean 9.0", "broken 6, first:",
                               "regions_boxes_mirrored, image train-i0: 3 regions for 1 objects")  # fmt: skip


# Millions of pictures


@pytest.fixture
def listed(tmp_path):
    """cc3m as lists of files: 24 rows of train, of which one names a file again and two have no file, and 3 of val, one
    of which names a file of train."""
    root, colours = tmp_path / "cc3m", shades()

    def make(split, i):
        name = f"images_{split}/deep/{i % 2}/{i:07d}"
        image = Image.new("RGB", (12 + i, 8), next(colours))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name, "PNG")
        return name

    train = [[make("train", i), "a dog ' s toy ." if i else "six words are in this one"] for i in range(21)]
    train += [[train[3][0], "again"], ["images_train/gone", "x"], ["images_train/deep/gone", "x"]]
    val = [[make("val", i), "a cat"] for i in range(2)] + [[train[5][0], "a cat"]]
    write_json(root / "train_annot.json", train)
    write_json(root / "val_annot.json", val)
    return root


def test_conceptual_captions(listed, look):
    status, out = look("check", "cc3m", "--root", listed)
    assert status == 0 and has(
        out, "cc3m: 22 train, 3 val", "2 rows whose picture is not there",
        "train: 22 images (published: 3,318,333 rows), 22 captions", "captions per image min 1, mean 1.0, max 1",
        "words per caption min 1, mean 5.8, max 6", "1-5 4.5% ## 6-10 95.5%", "pictures 21 files, all there",
        "smallest 12x8, median 22x8, largest 32x8", "val: 3 images (published: 15,840 rows), 3 captions",
        "shared: train and val have 1 pictures in common", "duplicates: 0 groups",
        "missing: 0, besides 2 rows without a picture, which do not count: dead links are normal there",
        "unreadable: 0")  # fmt: skip
    assert "in all" not in out
    status, out = look("check", "cc3m", "--root", listed, "--no-decode")
    assert status == 0 and has(out, "1-5 4.5%", "pictures 21 files, all there", "unreadable: not looked for")
    assert "sizes" not in out and "duplicates" not in out
    status, out = look("check", "cc3m", "--root", export.export("cc3m", listed.parent / "tsv", train=10, val=2, test=1))
    assert status == 0 and has(out, "train: 9 images", "missing: 0, besides 1 rows", "smallest 64x64, median 64x64")


def test_files_that_went_after_they_were_indexed(listed, look):
    look("check", "cc3m", "--root", listed)
    for name in ("train/deep/1/0000003", "train/deep/1/0000011", "val/deep/0/0000000"):
        (listed / f"images_{name}").unlink()  # too deep for the index to learn of it
    for flag in ("--decode", "--no-decode"):
        status, out = look("check", "cc3m", "--root", listed, flag)
        assert status == 1 and has(
            out, f"2 of 21 images missing, first: {listed}/images_train/deep/1/0000003", "1 of 3 images missing",
            f"most in {listed}/images_train/deep/1 2 of 10", f"most in {listed}/images_val/deep/0 1 of 1",
            "missing: 3, besides 2 rows")  # fmt: skip
    status, out = look("check", "cc3m", "--root", listed)
    assert has(out, "unreadable: 0")


def test_broken_and_identical_pictures_of_many(listed, look):
    files = [listed / "images_train" / "deep" / f"{i % 2}" / f"{i:07d}" for i in range(21)]
    for file in files[:12]:
        file.write_bytes(b"no picture")
    for file in (files[15], files[16], listed / "images_val" / "deep" / "1" / "0000001"):
        file.write_bytes(files[14].read_bytes())
    files[20].write_bytes(files[19].read_bytes())
    (listed / "images_val" / "deep" / "0" / "0000000").write_bytes(files[17].read_bytes())
    status, out = look("check", "cc3m", "--root", listed)
    assert status == 1 and has(
        out, "unreadable: 12", f"{files[0]}: not a picture",
        "duplicates: 3 groups of identical files, 2 of them across splits "  # the largest first
        f"{files[14]} (train) = {listed}/images_val/deep/1/0000001 (val) and 2 more {files[17]} (train) =")  # fmt: skip
    assert out.count(": not a picture") == 10 and str(files[19]) not in out


def test_visual_genome(tmp_path, look):
    export.export("coco", tmp_path / "coco", train=60, val=20, test=20, size=32)
    export.export("vg", tmp_path / "vg", train=60, val=20, test=20, size=32)
    root = tmp_path / "vg"
    status, out = look("check", "vg", "--root", root)
    assert status == 0 and has(
        out, "20 of 100 pictures are in val or test of coco and are left out", "vg: 72 train, 4 val, 4 test",
        "in all: 100 images (published: 108,077),", "captions (published: about 5,400,000)", "train: 72 images,",
        "captions per image min 8, mean 10.", "missing: 0 unreadable: 0")  # fmt: skip
    assert "images (published: 108,077) about" not in out and "rows" not in out
    status, out = look("check", "vg", "--root", root, "--keep_test")
    assert status == 0 and has(out, "are kept (--keep-test)", "vg: 90 train, 5 val, 5 test", "train: 90 images,")
    (root / "images" / "VG_100K" / "2.jpg").unlink()
    status, out = look("check", "vg", "--root", root)
    assert status == 0 and has(out, "missing: 0, besides 1 pictures that are left out, as a note says")


def test_sbu(tmp_path, look):
    status, out = look("check", "sbu", "--root", export.export("sbu", tmp_path / "sbu", train=60, val=20, test=20))
    assert status == 0 and has(
        out, "sbu: 82 train, 4 val, 4 test",
        "in all: 90 images (published: 1,000,000 rows), 90 captions train: 82 images, 82",
        "besides 10 rows without a picture, which do not count: dead links are normal there")  # fmt: skip


def test_quotes_may_join_rows(tmp_path, look):
    root = tmp_path / "cc3m"
    for i in (1, 2, 3):
        picture(root / "images_train" / f"{i}.jpg")
    (root / "Train_GCC-training.tsv").write_text('a\tu\n"b\tu\nc"\tu\n')
    assert has(look("check", "cc3m", "--root", root)[1], "train: 2 images")
    assert has(look("check", "cc3m", "--root", root, "--quotes", "none")[1], "train: 3 images")
    assert "quotes" in look("check", "cc3m", "--root", root, "--quotes", "some")[1]


def test_many_pictures_need_little_memory(tmp_path, capsys):
    n, root = 8_000, tmp_path / "cc3m"
    first = picture(root / "images_train" / "1.jpg")
    for i in range(2, n + 1):
        os.link(first, root / "images_train" / f"{i}.jpg")
    (root / "Train_GCC-training.tsv").write_text("a dog on a beach\tu\n" * n)
    corpus = corpora.load("cc3m", root)
    check(corpus, root, decode=False)  # what is imported once
    tracemalloc.start()
    try:
        assert check(corpus, root, decode=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "8,000 files, all there" in capsys.readouterr().out
    assert peak < 150 * n, f"{peak / n:.0f} bytes a picture"  # the Items are 600


def test_many_pictures_are_read_in_pieces(tmp_path, look, monkeypatch):
    for i in range(1, 1_203):
        picture(tmp_path / "cc3m" / "images_train" / f"{i}.jpg", size=(1, 1))
    (tmp_path / "cc3m" / "train.tsv").write_text("a dog\tu\n" * 1_202)
    asked, pieces = Table.__getitem__, []
    monkeypatch.setattr(Table, "__getitem__", lambda items, i: pieces.append(i) or asked(items, i))
    status, out = look("check", "cc3m", "--root", tmp_path / "cc3m")
    assert status == 0 and has(out, "duplicates: 1 groups of identical files, 0 of them across")
    assert not any(isinstance(piece, slice) for piece in pieces)
    monkeypatch.setattr(Table, "__getitem__", asked)
    taken, file_of = [], look_at_data.Files.__getitem__
    monkeypatch.setattr(look_at_data.Files, "__getitem__", lambda files, i: taken.append(i) or file_of(files, i))
    assert look("check", "cc3m", "--root", tmp_path / "cc3m")[0] == 0
    assert [piece for piece in taken if isinstance(piece, slice)] == [slice(0, 1000), slice(1000, 2000)]


# Tar shards


def tar(path, samples):
    """samples: (key, {ending: bytes})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for key, members in samples:
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))


def png(colour, size=(12, 8)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def packed(tmp_path):
    """Three shards of 20 pictures: train has 54, val and test three each."""
    pytest.importorskip("webdataset", reason="pip install webdataset")
    colours = shades()
    samples = [(f"{i:09d}", {"png": png(next(colours), (10 + i, 8)), "txt": b"two words", "json": b"{}"})
               for i in range(60)]  # fmt: skip

    def write(folder="mine"):
        for n in range(3):
            tar(tmp_path / folder / f"{n:05d}.tar", samples[20 * n : 20 * n + 20])
        return tmp_path / folder

    return samples, write


def test_shards(packed, look, monkeypatch):
    folder = packed[1]()
    begun, samples_of = [], shards._samples
    monkeypatch.setattr(shards, "_samples", lambda file, shard: begun.append(shard.name) or samples_of(file, shard))
    for said in (folder, folder / "{00000..00002}.tar", folder / "*.tar"):
        del begun[:]
        status, out = look("check", said)
        assert status == 0 and has(
            out, "mine: 54 train, 3 val, 3 test", "train: 54 images in 3 shards, 54 captions",
            "captions per image min 1, mean 1.0, max 1", "words per caption min 2, mean 2.0, max 2", "1-5 100.0%",
            "smallest 10x8, median 37x8, largest 63x8", "val: 3 images in 1 shards, 3 captions",
            "smallest 64x8, median 65x8", "missing: 0 unreadable: 0", "duplicates: 0 groups")  # fmt: skip
        assert "published" not in out and "cannot be read" not in out
        assert begun == ["00000.tar", "00001.tar"] + ["00002.tar"] * 3  # forwards, once for each split


def test_shards_of_what_is_published(packed, look):
    assert "in all: 60 images (published: 3,318,333 rows)\n" in look("check", packed[1]("cc3m"))[1]
    assert "in all: 60 images (published: 1,000,000 rows)\n" in look("check", packed[1]("sbu"), "--no-decode")[1]
    assert "published" not in look("check", packed[1]("coco"), "--no-decode")[1]


def test_of_shards_only_the_index(packed, look, monkeypatch):
    monkeypatch.setattr(shards.Shards, "read", None)
    samples, write = packed
    samples[3] = samples[3][0], {"png": b"", "txt": b"x"}
    status, out = look("check", write(), "--no-decode")
    assert status == 0 and has(out, "train: 54 images in 3 shards captions not read; leave out --no-decode",
                               "missing: 0 unreadable: not looked for")  # fmt: skip
    assert "duplicates" not in out and "words" not in out


def test_shards_that_are_broken(packed, look, tmp_path):
    samples, write = packed
    for i, members in ((3, {"png": b"", "txt": b"x"}), (22, {"png": b"what", "txt": b"x"}),
                       (23, {"png": png("red"), "txt": b" "}), (24, {"png": png("red"), "json": b"["}),
                       (30, {"png": png("red")}), (31, {"txt": b"x"})):  # fmt: skip
        samples[i] = samples[i][0], members
    for i in (8, 9, 59):
        samples[i] = samples[i][0], {**samples[7][1], "txt": b"a b c d e f"}
    folder = write()
    status, out = look("check", folder)
    assert status == 1 and has(
        out, "1 samples without a caption are left out, the first: 00001.tar: 000000030",
        "1 samples without a picture are left out, the first: 00001.tar: 000000031",
        "train: 54 images in 3 shards, 52 captions", "2 images have captions that cannot be read", "unreadable: 4",
        f"{folder}/00000.tar: 000000003.png: the file is empty", "000000022.png: not a picture",
        f"{folder}/00001.tar: 000000023.png: its caption cannot be read", "000000024.png: its caption cannot be read",
        "duplicates: 1 groups of identical files, 1 of them across splits",
        f"{folder}/00000.tar: 000000007.png (train) = {folder}/00002.tar: 000000059.png (test) and 2 more")  # fmt: skip
    file = folder / "00001.tar"
    file.write_bytes(file.read_bytes()[:9_000])
    status, error = look("check", folder)
    assert status == 1 and f"{file} is damaged or was cut off" in error


def test_few_pictures_of_shards_are_in_memory(tmp_path, look, monkeypatch):
    pytest.importorskip("webdataset", reason="pip install webdataset")
    tar(tmp_path / "x" / "0.tar", [(f"{i:05d}", {"png": png("red", (1, 1)), "txt": b"x"}) for i in range(250)])
    most, one = [], look_at_data.Opened.__getitem__
    monkeypatch.setattr(look_at_data.Opened, "__getitem__", lambda opened, i: most.append(len(one(opened, i))) or [])
    with pytest.raises(ValueError):  # nothing is handed over
        main(["check", str(tmp_path / "x")])
    assert max(most) == 100


def test_regions_of_many(tmp_path, look, packed):
    root = tmp_path / "cc3m"
    for i in range(1, 5):
        picture(root / ("images_val" if i == 4 else "images_train") / f"{i if i < 4 else 1}.jpg", (i, 0, 0))
        region_file(root / "regions" / f"{i if i < 4 else 'val-1'}.npz", n=i)
    (root / "train.tsv").write_text("a\tu\n" * 3)
    (root / "val.tsv").write_text("a\tu\n")
    status, out = look("check", "cc3m", "--root", root)
    assert status == 0 and has(out, "region files of 4 of 4 pictures", "regions a picture min 1, mean 2.5, max 4")
    (root / "regions" / "val-1.npz").unlink()
    (root / "regions" / "2.npz").unlink()
    status, out = look("check", "cc3m", "--root", root, "--no-decode")
    assert status == 1 and has(out, "region files of 2 of 4 pictures", "missing 2, first: image 2")
    assert has(look("check", "cc3m", "--root", root)[1], "regions a picture min 1, mean 2.0, max 3")
    folder = packed[1]()
    (folder / "regions").mkdir()
    status, out = look("check", folder)
    assert status == 0 and has(out, f"{folder}/regions: not looked at")


# Mixtures


def test_a_mixture(tmp_path, look, packed, monkeypatch):
    below = tmp_path / "data"
    coco(below / "coco", n=7)  # number 7 is of test, and a picture of vg
    export.export("vg", below / "vg", train=60, val=20, test=20, size=32)
    export.export("cc3m", below / "cc3m", train=60, val=20, test=20, size=32)
    packed[1]("shards")
    tars = f"{tmp_path}/shards/{{00000..00002}}.tar"
    mixed = f"coco,vg:0.5,cc3m,{tars}"
    look("check", "cc3m", "--root", below / "cc3m")  # what making them has printed
    status, out = look("check", mixed, "--root", below, "--no-decode")
    assert status == 0
    heads = [row for row in out.splitlines() if row.startswith("=====")]
    assert [head.split(" ", 1)[1] for head in heads] == ["coco", "vg", "cc3m", tars, "together: 350 items an epoch"]
    assert has(
        out, "==== coco coco: 7 train, 1 test", "==== cc3m cc3m: 54 train", "besides 6 rows without a picture",
        "coco 7 pictures, 14 captions, 14 items (4.0%) vg 91 pictures,", "captions, 228 items (65.1%), weight 0.5 cc3m",
        "cc3m 54 pictures, 54 captions, 54 items (15.4%) shards 54 pictures, 54 items (15.4%) with one caption an item "
        "and 5 phrases of a picture of vg; val and test are coco's")  # fmt: skip
    (below / "coco" / "regions").mkdir()  # below its own folder
    said = look("check", "coco,cc3m", "--root", below, "--no-decode")[1]
    assert has(said, "data/coco/regions: region files of 0 of 8")
    (below / "coco" / "regions").rmdir()
    assert out.count("unreadable: not looked for") == 4
    monkeypatch.chdir(tmp_path)
    assert look("check", mixed, "--no-decode") == (0, out.replace(str(below), "data"))  # the default root
    assert has(look("check", "coco,vg", "--keep-test", "--no-decode")[1], "are kept", "vg 90 pictures")
    assert "phrases" not in look("check", "coco,cc3m", "--no-decode")[1]
    assert has(look("check", "vg:0.5", "--root", below / "vg", "--no-decode")[1], "vg: 91 train")
    (below / "coco" / "val2014" / f"COCO_val2014_{4:012d}.jpg").unlink()
    status, out = look("check", mixed, "--no-decode")  # the first of them
    assert status == 1 and has(out, "1 of 7 images missing", "together")
    assert look("check", "cc3m,coco", "--no-decode")[0] == 1


# Own data, scenes


def test_own_data(tmp_path, look):
    picture(tmp_path / "a.jpg"), picture(tmp_path / "b.jpg", "red", (50, 30))
    (tmp_path / "captions.txt").write_text("a.jpg\tone two\na.jpg\tone two three four five six\nb.jpg\tone\n")
    status, out = look("check", tmp_path)
    assert status == 0 and has(
        out, "2 train", "train: 2 images, 3 captions", "min 1, mean 1.5, max 2", "min 1, mean 3.0, max 6",
        "1-5 66.7%", "6-10 33.3%", "smallest 12x8", "largest 50x30", "unreadable: 0", "duplicates: 0")  # fmt: skip
    region_file(tmp_path / "regions" / "a.jpg.npz")  # beside captions.txt
    assert look("check", tmp_path)[0] == 1
    region_file(tmp_path / "regions" / "b.jpg.npz")
    assert look("check", tmp_path)[0] == 0


def test_own_data_that_is_broken(tmp_path, look):
    colours = shades()
    for i in range(2, 15):
        picture(tmp_path / f"{i}.jpg", next(colours))
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "2.jpg").read_bytes())
    rows = [{"image": f"{i}.jpg", "caption": "x y", "split": "train"} for i in range(3, 15)]
    rows += [{"image": "2.jpg", "caption": "x", "split": "train"},
             {"image": "copy.jpg", "caption": "x", "split": "test"}]  # fmt: skip
    write_lines(tmp_path / "x.jsonl", rows)
    assert look("check", tmp_path / "x.jsonl")[0] == 0  # a duplicate is said, but nothing is broken
    for i in range(3, 15):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    status, out = look("check", tmp_path / "x.jsonl")
    assert status == 1 and "unreadable: 12" in out and out.count("the file is empty") == 10
    assert "1 groups of identical files, 1 of them across splits" in out
    assert f"{tmp_path / '2.jpg'} (train) = {tmp_path / 'copy.jpg'} (test)" in out
    for i in range(3, 15):
        picture(tmp_path / f"{i}.jpg", next(colours))
    (tmp_path / "7.jpg").unlink()  # the loader leaves it out with a note; it is missing all the same
    status, out = look("check", tmp_path / "x.jsonl")
    assert status == 1 and has(out, "1 of 14 images are missing and left out", "missing: 0, besides what a note says")


def test_identical_files(tmp_path, look):
    splits = {"a": "train", "b": "train", "c": "train", "d": "test", "e": "val"}
    for name, colour in zip(splits, ("red", "red", "blue", "blue", "green"), strict=True):
        picture(tmp_path / f"{name}.jpg", colour)
    write_lines(tmp_path / "x.jsonl", [{"image": f"{name}.jpg", "caption": "x", "split": split}
                                       for name, split in splits.items()])  # fmt: skip
    status, out = look("check", tmp_path / "x.jsonl")
    assert status == 0 and has(out, "2 groups of identical files, 1 of them across splits", "c.jpg (train) =")
    assert "a.jpg" not in out


@pytest.mark.parametrize("task, said", [
    ("caption", "train: 6 images, 30 captions"), ("vqa", "train: 100 samples about 100 pictures"),
    ("nlvr2", "labels false"), ("ve", "labels contradiction 2 (33.3%)"), ("vcr", "objects per picture")])  # fmt: skip
def test_scenes_are_not_files(task, said, capsys):
    n = {"vqa": 100, "nlvr2": 4}.get(task, 6)
    world = "full" if task == "ve" else "tiny"
    assert check(corpora.load("scenes", task=task, world=world, n_train=n, n_val=4, n_test=4))
    assert has(capsys.readouterr().out, said, "pictures drawn when needed, not checked here", "missing: 0")


# Files


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    files = [picture(tmp_path / f"{i}.jpg") for i in range(5)]
    scandir, listed, is_file, asked = os.scandir, [], Path.is_file, []
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scandir(folder))
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or is_file(path))
    shelf = Shelf()
    assert all(map(shelf.has, files)) and listed == [str(tmp_path)] and not asked
    assert not shelf.has(tmp_path / "no" / "1.jpg") and not shelf.has(tmp_path / "no" / "2.jpg") and not asked
    late = picture(tmp_path / "late.jpg")  # like a name that only the file system takes for the same
    assert shelf.has(late) and not shelf.has(tmp_path / "gone.jpg") and len(listed) == 2


def test_a_terminal_sees_how_far_it_is(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    coco(tmp_path)
    for stream, wanted in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["check", "coco", "--root", str(tmp_path)]) == 0
        assert ("train:" in stream.getvalue()) is wanted


# Where, and the command line


def test_where(look):
    status, out = look("where")
    assert status == 0
    assert [row.split()[0] for row in out.splitlines()[:-2]] == [*corpora.NAMES, "shards", "regions"]
    pages = {"coco": "https://cocodataset.org/", "flickr30k": "forms.illinois.edu", "flickr8k": "forms.illinois.edu",
             "nocaps": "https://nocaps.org/download", "vqa": "https://visualqa.org/",
             "nlvr2": "lil.nlp.cornell.edu/nlvr", "nlvr1": "github.com/lil-lab/nlvr",
             "snli_ve": "github.com/necla-ml/SNLI-VE",
             "vcr": "visualcommonsense.com", "vg": "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
             "cc3m": "https://ai.google.com/research/ConceptualCaptions/download",
             "sbu": "https://www.cs.rice.edu/~vo9/sbucaptions/", "shards": "github.com/rom1504/img2dataset",
             "regions": "peteanderson80/bottom-up-attention"}  # fmt: skip
    for name, page in pages.items():
        status, out = look("where", name)
        assert status == 0 and page in out
        place = {"regions": "data/coco/regions", "shards": "shards/NAME"}.get(name, f"data/{name}")
        checked = {"regions": "coco", "shards": "shards/NAME"}.get(name, name)
        assert f"\n{place}/\n" in out and out.endswith(f"\nthen `python data.py check {checked}`\n")
    assert {*pages, "scenes"} == {*corpora.NAMES, "shards", "regions"} and look("where", "scenes")[0] == 0
    assert has(look("where", "coco")[1], "13 GB", "6 GB", "CC BY 4.0", "caption_datasets.zip", "82,783", "40,504")
    for name in ("cc3m", "sbu"):
        assert has(look("where", name)[1], "img2dataset's shards, read as they are", f"--output_folder data/{name}",
                   f"tools/shards.py pack {name} ", "`resize`")  # fmt: skip
    assert has(look("where", "cc3m")[1], r"sed -i '1s/^/caption\turl\n/' cc3m.tsv", "may be freely used for any")
    assert has(look("where", "vg")[1], "CC BY 4.0", "108,077", "dataset_coco.json", "--keep-test", "shards.py resize")
    status, error = look("where", "nlvr3")
    assert status == 1 and "did you mean nlvr2?" in error


def test_where_draws_layouts_that_load(tmp_path, look, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, make in (("coco", coco), ("nocaps", nocaps), ("vqa", vqa), ("snli_ve", snli_ve), ("vcr", vcr)):
        make(Path("data", name))
        tree = look("where", name)[1]
        for path in Path("data", name).iterdir():  # the default root
            stem = path.name.replace("val2014_", "train2014_")  # the tree names one of a pair
            assert stem in tree, f"{name}: {path}"
        assert look("check", name, "--no-decode")[0] == 0
    for layout, name in (("vg", "vg"), ("cc3m", "cc3m"), ("cc3m_json", "cc3m"), ("sbu", "sbu")):
        made = export.export(layout, Path(layout, name), train=20, val=3, test=3, size=32)
        tree = look("where", name)[1]
        assert all(path.name in tree for path in chain(made.iterdir(), made.glob("annotations/*"))
                   if path.name != "annotations") and "annotations/" in look("where", "vg")[1]  # fmt: skip
        assert look("check", name, "--root", made, "--keep-test" if name != "cc3m" else "--decode")[0] == 0


@pytest.mark.parametrize("arguments, said", [
    (["check", "coco", "--rot", "x"], "did you mean --root?"),
    (["check", "coco", "--no-decod"], "did you mean --no-decode?"),
    (["where", "coco", "--root", "x"], "unknown argument --root (--help"),
    (["chek", "coco"], "chek"),
    (["check", "coco", "--train-on", "train+val"], "leave it out"),
    (["check", "coco", "--root", "nowhere"], "does not exist"),
    (["check", "coco", "--keep-test"], "pictures of vg and sbu that others test on; coco has none: leave it out"),
    (["check", "coco,cc3m", "--keep-test"], "coco,cc3m has none: leave it out"),
    (["check", "vg,sbu", "--quotes", "none"], "how cc3m's TSV files are read; vg,sbu has none: leave it out"),
    (["check", "coco,vg", "--train-on", "train+val"], "coco,vg has none: leave it out"),
    (["check", "coco,scenes"], "scenes is not for mixtures"),
    (["check", "coco,vqa"], "has questions, no captions"),
    (["check", "coco,coco"], "coco comes 2 times"),
    (["check", "coco:x,vg"], "'coco:x' is not known"),
    (["check", "no/{0..3}.tar"], "of its 4 shards are not there"),
    (["check", "coc"], "did you mean coco?")])  # fmt: skip
def test_mistakes_on_the_command_line(arguments, said, look):
    status, error = look(*arguments)
    assert status == 1 and said in error and error.startswith("error: ")


def test_annotations_that_cannot_be_loaded(tmp_path, look):
    (tmp_path / "x.jsonl").write_text("[]")
    status, error = look("check", tmp_path / "x.jsonl")
    assert status == 1 and "x.jsonl:1" in error
    (tmp_path / "train.jsonl").mkdir()
    snli_ve(tmp_path)
    write_lines(tmp_path / "snli_ve_dev.jsonl", [{"gold_label": "maybe"}])
    status, error = look("check", "snli_ve", "--root", tmp_path)
    assert status == 1 and "snli_ve_dev.jsonl:1" in error


def test_data_py_hands_over_the_exit_status(tmp_path, monkeypatch, capsys):
    coco(tmp_path)[0].write_bytes(b"")
    for flag, status in (("--decode", 1), ("--no-decode", 0)):
        monkeypatch.setattr(sys, "argv", ["data.py", "check", "coco", "--root", str(tmp_path), flag])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
        assert left.value.code == status and "coco: 6 train" in capsys.readouterr().out


def test_an_interrupted_check_says_so(look, monkeypatch):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "load", load)
    assert look("check", "coco") == (130, "interrupted\n")
