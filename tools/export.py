"""The small world in the exact on-disk form of an official data set: pictures, annotation files, region files.

    python tools/export.py coco my_coco                          then vcgpt.py --data coco --root my_coco
    python tools/export.py vqa my_vqa --regions npz --train 500  with region files in my_vqa/regions
    python tools/export.py snli_ve my_ve --world full            nothing is hidden in the tiny world

Two uses. The loaders of corpora.py are proven on it: what they read is what corpora.load("scenes", task) gives, sample
for sample. And whoever has an official data set on another machine can try a command here first.

Splits are those of the small world, train, val and test, under their official names. Of COCO every fourth picture of
train is restval. test_compositional, whose colour-shape pairs are new, goes where a data set has such a split or hides
its labels: NLVR2's test2, VQA's test2015 (test-dev2015 is its part without them), and NoCaps, where it is the domains:
in-domain is test, near-domain has a new pair among known ones, out-domain nothing else.

Of what is for pre-training, vg and sbu have no splits: scenes of val and test are among the rest, as test pictures of
COCO and Flickr30k are in the real ones, and the ids below tell which. cc3m and cc3m_json have train and val. Links die:
of their train, and of sbu, every tenth picture is missing, though its row is there.

Ids. A sample's number counts over all splits of the export, in the order train, val, test, test_compositional:
    coco, coco2017   cocoid = number + 1, Karpathy's imgid = number
    flickr30k, 8k    imgid = number; the file is named by 1000000000 + number
    nocaps           id = number, with the hidden test (scenes of val) last
    vqa              image_id = number + 1, question_id = 1000 * image_id: one question a picture
    nlvr2, nlvr1     {train,dev,test1,test2}-GROUP-PAIR-SENTENCE; {train,dev,test}-GROUP-PAIR, the pair in one picture
    snli_ve          Flickr30K_ID = 1000000000 + number; pairID = its file, then #0r1 and the label's first letter
    vcr              {train,val,test}-INDEX, the index being that of the split; server labels are left out
    vg               image_id = number + 1, which is coco_id too for every second picture, the others have none;
                     flickr_id = 1000000000 + number for every third: the ids of the coco and flickr30k layouts
    cc3m, cc3m_json  the row in the file of its split, from 1; names of cc3m_json are numbers of seven digits, from 0;
                     region files are ROW of train and val-ROW of val
    sbu              row = number + 1; the photo in the address is 1000000000 + number, as in flickr30k

Files are written into a folder of another name, which gets its own at the end: what has stopped is not taken for whole.
Reading map: the folder | captions | VQA | NLVR | SNLI-VE | VCR | Visual Genome | CC3M and SBU | the command.
"""

from __future__ import annotations

import base64
import csv
import difflib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

import common  # noqa: E402
import corpora  # noqa: E402
import scenes  # noqa: E402
from common import UserError  # noqa: E402
from data import Regions  # noqa: E402

INFO = {"description": "The small world of minVLP: drawn scenes in the form of an official data set", "url": "",
        "version": "1.0", "year": 2026, "contributor": "minVLP", "date_created": "2026-01-01 00:00:00"}  # fmt: skip
LICENSE = {"id": 1, "name": "Drawn by a program", "url": ""}
FIRST_FILE = 1_000_000_000  # Flickr's file names are numbers of ten digits

# ---------------------------------------------------------------------------------------------------------------------
# The folder that is filled


@dataclass
class Folder:
    """Where an export goes. regions: "npz" or "tsv", "" for none."""

    root: Path
    size: int  # of the pictures, in pixels
    regions: str = ""

    def place(self, name: str) -> Path:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def picture(self, name: str, image: scenes.Scene | Image.Image) -> None:
        image = scenes.render(image, self.size) if isinstance(image, scenes.Scene) else image
        # JPEG, also of no extension; without subsampling, which would mix the colours of thin stripes
        options = {} if name.endswith(".png") else {"format": "JPEG", "quality": 95, "subsampling": 0}
        image.save(self.place(name), **options)

    def detect(self, part: str, image_id: int | str, scene: scenes.Scene, objects: int = 0) -> None:
        """Writes what a detector would say of the scene: a file of its own, or a line in that of this part of the set.
        objects: how many of the first regions are VCR's objects, which have a folder of their own."""
        if not self.regions:
            return
        found = scenes.regions(scene, self.size)
        found = Regions(found["features"], found["boxes"], (self.size, self.size), found["cls_prob"])
        if self.regions == "npz":
            write_npz(self.place(f"regions/{image_id}.npz"), image_id, found)
        else:
            with open(self.place(f"regions/{part}.tsv"), "ab") as lines:
                lines.write(tsv_line(image_id, found))
        if objects:
            write_npz(self.place(f"regions_boxes/{image_id}.npz"), image_id, found.first(objects))

    def json(self, name: str, content) -> None:
        self.place(name).write_text(json.dumps(content), "utf-8")

    def jsonl(self, name: str, records: list[dict]) -> None:
        self.place(name).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def write_npz(file: Path, image_id: int | str, found: Regions) -> None:
    """Of YehLi/xmodaler:tools/generate_npz.py, every key."""
    width, height = found.size
    np.savez(file, features=found.features, cls_prob=found.classes, boxes=found.boxes, image_h=np.array([height]),
             image_w=np.array([width]), num_boxes=np.array([len(found.boxes)]), image_id=image_id)  # fmt: skip


def tsv_line(image_id: int | str, found: Regions) -> bytes:
    """Of peteanderson80/bottom-up-attention: width before height, little-endian float32 in base64, no classes."""
    arrays = [base64.b64encode(array.astype("<f4").tobytes()) for array in (found.boxes, found.features)]
    numbers = [str(cell).encode() for cell in (image_id, *found.size, len(found.boxes))]
    return b"\t".join([*numbers, *arrays]) + b"\n"


def numbered(corpus: corpora.Corpus, *splits: str):
    """(number over these splits, split, index in it, sample), saying how far it is."""
    number = 0
    for split in splits:
        n = len(corpus.splits[split])
        for index in range(n):
            yield number, split, index, corpus.splits[split][index]
            number += 1
            if (index + 1) % 1000 == 0 or index + 1 == n:
                print(f"{split}: {index + 1:,} of {n:,} samples written", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def coco_form(size: int, images: list[tuple]) -> dict:
    """(id, file name, captions, further fields) of images -> the content of a COCO caption file."""
    records = [{"license": 1, "file_name": name, "coco_url": "", "height": size, "width": size,
                "date_captured": "2026-01-01 00:00:00", "flickr_url": "", "id": image_id, **more}
               for image_id, name, _, more in images]  # fmt: skip
    said = [(image_id, text) for image_id, _, captions, _ in images for text in captions]
    annotations = [{"image_id": about, "id": number, "caption": text} for number, (about, text) in enumerate(said)]
    return {"info": INFO, "images": records, "licenses": [LICENSE], "annotations": annotations}


def karpathy_form(number: int, split: str, filename: str, captions: tuple[str, ...]) -> dict:
    """An image of dataset_*.json. Five captions a picture, so sentence ids count on from 5 * number."""
    sentences = [{"tokens": text.lower().rstrip(".").split(), "raw": text, "imgid": number, "sentid": 5 * number + i}
                 for i, text in enumerate(captions)]  # fmt: skip
    return {"filename": filename, "imgid": number, "split": split, "sentids": [s["sentid"] for s in sentences],
            "sentences": sentences}  # fmt: skip


def write_coco(out: Folder, corpus: corpora.Corpus) -> None:
    records, official = [], {"train": [], "val": []}
    for number, split, index, item in numbered(corpus, "train", "val", "test"):
        split = "restval" if split == "train" and index % 4 == 3 else split
        part, cocoid = "train" if split == "train" else "val", number + 1
        name = f"COCO_{part}2014_{cocoid:012d}.jpg"
        out.picture(f"{part}2014/{name}", item.image)
        out.detect(part, cocoid, item.image)
        record = karpathy_form(number, split, name, item.captions)
        records.append({"filepath": f"{part}2014", "cocoid": cocoid, **record})
        official[part].append((cocoid, name, item.captions, {}))
    for part, images in official.items():
        out.json(f"annotations/captions_{part}2014.json", coco_form(out.size, images))
    out.json("karpathy/dataset_coco.json", {"images": records, "dataset": "coco"})


def write_coco2017(out: Folder, corpus: corpora.Corpus) -> None:
    """Without a Karpathy file: val2017 is the small world's test, since it is what a loader evaluates in the end."""
    official = {"train": [], "test": []}
    for number, split, _, item in numbered(corpus, "train", "test"):
        part, name = {"train": "train", "test": "val"}[split], f"{number + 1:012d}.jpg"
        out.picture(f"{part}2017/{name}", item.image)
        out.detect(part, number + 1, item.image)
        official[split].append((number + 1, name, item.captions, {}))
    for split, part in (("train", "train"), ("test", "val")):
        out.json(f"annotations/captions_{part}2017.json", coco_form(out.size, official[split]))


def write_flickr(out: Folder, corpus: corpora.Corpus, name: str, folder: str, ending: str) -> None:
    records = []
    for number, split, _, item in numbered(corpus, "train", "val", "test"):
        file = f"{FIRST_FILE + number}{ending.format(number)}.jpg"
        out.picture(f"{folder}/{file}", item.image)
        out.detect(split, number, item.image)
        records.append(karpathy_form(number, split, file, item.captions))
    out.json(f"karpathy/dataset_{name}.json", {"images": records, "dataset": name})


def write_flickr30k(out: Folder, corpus: corpora.Corpus) -> None:
    write_flickr(out, corpus, "flickr30k", "flickr30k-images", "")


def write_flickr8k(out: Folder, corpus: corpora.Corpus) -> None:
    write_flickr(out, corpus, "flickr8k", "Flicker8k_Dataset", "_{:010x}")


def write_nocaps(out: Folder, corpus: corpora.Corpus) -> None:
    """Ten captions a picture: the five of the small world, and five more."""
    public, hidden = [], []
    for number, split, _, item in numbered(corpus, "test", "test_compositional", "val"):
        scene, open_id = item.image, f"{number:016x}"
        folder = "test" if split == "val" else "val"
        out.picture(f"{folder}/{open_id}.jpg", scene)
        out.detect(folder, number, scene)
        more = {"open_images_id": open_id}
        if folder == "test":
            hidden.append((number, f"{open_id}.jpg", (), more))
            continue
        news = sum((o.color, o.shape) in scene.world.held_out for o in scene.objects)
        more["domain"] = "in-domain" if not news else "out-domain" if news == len(scene.objects) else "near-domain"
        public.append((number, f"{open_id}.jpg", scenes.captions(scene, 10), more))
    info = coco_form(out.size, hidden)
    del info["annotations"]
    out.json("nocaps_test_image_info.json", info)
    out.json("nocaps_val_4500_captions.json", coco_form(out.size, public))


# ---------------------------------------------------------------------------------------------------------------------
# VQA

ANSWER_TYPES = {"yes/no": "yes/no", "n": "number"}  # of the small world's kinds; the others are "other"


def write_vqa(out: Folder, corpus: corpora.Corpus) -> None:
    questions = {"train2014": [], "val2014": [], "test2015": [], "test-dev2015": []}
    annotations = {"train2014": [], "val2014": []}
    for number, split, _, item in numbered(corpus, *corpus.splits):
        part, image_id = {"train": "train2014", "val": "val2014"}.get(split, "test2015"), number + 1
        out.picture(f"{part}/COCO_{part}_{image_id:012d}.jpg", item.images[0])
        out.detect(part, image_id, item.images[0])
        ids = {"image_id": image_id, "question_id": 1000 * image_id}
        questions[part].append({**ids, "question": item.text})
        if split == "test":  # the smaller of the two sets that the server scores
            questions["test-dev2015"].append(questions[part][-1])
        if part in annotations:
            answers = [{"answer": text, "answer_confidence": "yes", "answer_id": number}
                       for number, text in enumerate(item.answers, 1)]  # fmt: skip
            annotations[part].append({
                "question_type": " ".join(item.text.split()[:2]), "answers": answers,
                "multiple_choice_answer": Counter(item.answers).most_common(1)[0][0],
                "answer_type": ANSWER_TYPES.get(item.kinds[0], "other"), **ids})  # fmt: skip
    for part, asked in questions.items():
        about = {"info": INFO, "data_type": "mscoco", "data_subtype": part, "license": LICENSE}
        out.json(f"v2_OpenEnded_mscoco_{part}_questions.json", {**about, "task_type": "Open-Ended", "questions": asked})
        if part in annotations:
            out.json(f"v2_mscoco_{part}_annotations.json", {**about, "annotations": annotations[part]})


# ---------------------------------------------------------------------------------------------------------------------
# NLVR2, and NLVR's first version


def write_nlvr2(out: Folder, corpus: corpora.Corpus) -> None:
    names = {"train": "train", "val": "dev", "test": "test1", "test_compositional": "test2"}
    records = {name: [] for name in names.values()}
    for _, split, index, item in numbered(corpus, *names):
        name, group = names[split], int(item.group)
        pair = f"{name}-{group}-{index % 4}"  # of the four pairs that share a sentence
        record = {"identifier": f"{pair}-{group % 2}", "sentence": item.text, "label": str(bool(item.label)),
                  "left_url": "", "right_url": "", "writer": "0", "synset": "shape", "query": f"shapes{group}",
                  "validation": {"0": str(bool(item.label))}, "extra_validations": {}}  # fmt: skip
        folder = f"images/{name}"
        if name == "train":
            record["directory"] = group % 100
            folder += f"/{group % 100}"
        for side, scene in enumerate(item.images):
            out.picture(f"{folder}/{pair}-img{side}.png", scene)
        records[name].append(record)
    for name, rows in records.items():
        out.jsonl(f"data/{name}.json", rows)


def write_nlvr1(out: Folder, corpus: corpora.Corpus) -> None:
    """Both scenes of a pair in one picture, with a grey bar between. Training has the other order too, unless the
    sentence says which of them is meant."""
    names = {"train": "train", "val": "dev", "test": "test"}
    for split, name in names.items():
        records = []
        for _, _, index, item in numbered(corpus, split):
            identifier = f"{name}-{item.group}-{index % 4}"
            orders = [item.images]
            if split == "train" and not re.search(r"the (left|right) (picture|one)\b", item.text):
                orders.append(item.images[::-1])
            files = [f"images/{identifier}-{number}.png" for number in range(len(orders))]
            for file, order in zip(files, orders, strict=True):
                out.picture(file, side_by_side(*order, out.size))
            records.append({"identifier": identifier, "sentence": item.text, "label": str(bool(item.label)).lower(),
                            "images": files, "directory": str(int(item.group) % 8)})  # fmt: skip
        out.jsonl(f"{split}.jsonl", records)


def side_by_side(left: scenes.Scene, right: scenes.Scene, size: int) -> Image.Image:
    picture = Image.new("RGB", (2 * size + size // 8, size), scenes.GREY)
    picture.paste(scenes.render(left, size), (0, 0))
    picture.paste(scenes.render(right, size), (picture.width - size, 0))
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# SNLI-VE


def write_snli_ve(out: Folder, corpus: corpora.Corpus) -> None:
    names = {"train": "train", "val": "dev", "test": "test"}
    records = {name: [] for name in names.values()}
    for number, split, _, item in numbered(corpus, *names):
        image_id, label = str(FIRST_FILE + number), corpora.ENTAILMENT[item.label]
        out.picture(f"flickr30k-images/{image_id}.jpg", item.images[0])
        out.detect(split, image_id, item.images[0])
        premise = scenes.captions(item.images[0], 1)[0]
        records[names[split]].append({
            "Flickr30K_ID": image_id, "pairID": f"{image_id}.jpg#0r1{label[0]}", "captionID": f"{image_id}.jpg#0",
            "gold_label": label, "annotator_labels": [label], "sentence1": premise, "sentence2": item.text,
            "sentence1_parse": tree(premise), "sentence2_parse": tree(item.text)})  # fmt: skip
    for name, rows in records.items():
        out.jsonl(f"snli_ve_{name}.jsonl", rows)


def tree(text: str) -> str:
    """In the form of a parse tree; nothing is parsed."""
    return f"(ROOT {' '.join(f'(X {word})' for word in text.split())})"


# ---------------------------------------------------------------------------------------------------------------------
# VCR


def write_vcr(out: Folder, corpus: corpora.Corpus) -> None:
    """Objects are called "object": the name of a shape would give the answer away."""
    records = {"train": [], "val": [], "test": []}
    for _, split, index, item in numbered(corpus, *records):
        asked, image_id = corpus.splits[split].made[index], f"{split}-{index}"
        movie = f"{1001 + index // 40}_{split.upper()}"
        file = f"lsmdc_{movie}/{movie}_{index:05d}@0"
        out.picture(f"vcr1images/{file}.jpg", asked.scene)
        boxes = object_boxes(asked.scene, out.size)
        out.json(f"vcr1images/{file}.json", vcr_metadata(boxes, item.objects, (out.size, out.size)))
        out.detect(split, image_id, asked.scene, len(item.objects))
        record = {"movie": movie, "objects": list(item.objects), "answer_likelihood": "likely", "question_number": 0,
                  "img_fn": f"{file}.jpg", "metadata_fn": f"{file}.json", "annot_id": image_id, "img_id": image_id,
                  "match_fold": f"{split}-{index % 5}", "match_index": index,
                  "question": vcr_tokens(asked.question), "answer_choices": [*map(vcr_tokens, asked.answers)],
                  "rationale_choices": [*map(vcr_tokens, asked.rationales)]}  # fmt: skip
        if split != "test":
            record |= {"answer_label": asked.label, "rationale_label": asked.rationale_label}
        records[split].append(record)
    for split, rows in records.items():
        out.jsonl(f"{split}.jsonl", rows)


def object_boxes(scene: scenes.Scene, size: int) -> list[list[float]]:
    return [[v * size for v in (o.x - o.r, o.y - o.r, o.x + o.r, o.y + o.r)] for o in scene.objects]


def vcr_metadata(boxes: list[list[float]], names: tuple[str, ...], size: tuple[int, int]) -> dict:
    """The .json beside a picture: boxes with a confidence as fifth number, and outlines, here the box itself."""
    return {"boxes": [[*box, 1.0] for box in boxes], "names": list(names), "width": size[0], "height": size[1],
            "segms": [[[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]] for x1, y1, x2, y2 in boxes]}  # fmt: skip


def vcr_tokens(tokens: tuple) -> list:
    """Words as they are, tags as lists of object numbers."""
    return [token if isinstance(token, str) else list(token) for token in tokens]


# ---------------------------------------------------------------------------------------------------------------------
# Visual Genome


def write_vg(out: Folder, corpus: corpora.Corpus) -> None:
    images, described, asked = [], [], []
    region_ids, qa_ids = itertools.count(1), itertools.count(1)
    for number, split, _, item in numbered(corpus, "train", "val", "test"):
        scene, image_id = item.image, number + 1
        file = f"VG_100K_2/{image_id}.jpg" if image_id % 2 else f"VG_100K/{image_id}.jpg"
        out.picture(f"images/{file}", scene)
        out.detect(split, image_id, scene)
        images.append({"image_id": image_id, "url": f"https://example.org/{file}", "width": out.size,
                       "height": out.size, "coco_id": image_id if number % 2 == 0 else None,
                       "flickr_id": FIRST_FILE + number if number % 3 == 0 else None})  # fmt: skip
        regions = [{"region_id": next(region_ids), "image_id": image_id, "phrase": phrase, "x": x, "y": y,
                    "width": width, "height": height}
                   for phrase, (x, y, width, height) in phrases(scene, out.size)]  # fmt: skip
        described.append({"id": image_id, "regions": regions})
        qas = [{"qa_id": next(qa_ids), "image_id": image_id, "question": question.text,
                "answer": Counter(question.answers).most_common(1)[0][0], "a_objects": [], "q_objects": []}
               for question in scenes.questions(scene)]  # fmt: skip
        asked.append({"id": image_id, "qas": qas})
    out.json("annotations/image_data.json", images)
    out.json("annotations/region_descriptions.json", described)
    out.json("annotations/question_answers.json", asked)


def phrases(scene: scenes.Scene, size: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """(phrase, (x, y, width, height)) in whole pixels: captions, of all of the picture, and each object in its box."""
    rng = random.Random(f"phrases {scene.world.name} {scene.seed} {scene.split} {scene.index}")
    found = [(text, (0, 0, size, size)) for text in scenes.captions(scene, 8)]
    for o, (x1, y1, x2, y2) in zip(scene.objects, object_boxes(scene, size), strict=True):
        x, y = math.floor(x1), math.floor(y1)  # outwards: the object lies in it whole
        text = scenes.realise(scenes.Exists(scenes.describe(o, rng)), rng, phrase=True)  # "a small red disc"
        found.append((text, (x, y, math.ceil(x2) - x, math.ceil(y2) - y)))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# CC3M and SBU: addresses of pictures, one caption each

DEAD = 10  # one link in so many


def conceptual_pictures(out: Folder, corpus: corpora.Corpus, file_of) -> dict[str, list[tuple[str, str]]]:
    """Writes the pictures whose link lives. file_of: (split, row from 1) -> the name of its file. Returns (file,
    caption) of every row of train and val, dead links included."""
    rows = {"train": [], "val": []}
    for _, split, index, item in numbered(corpus, *rows):
        row = index + 1
        rows[split].append((file_of(split, row), item.captions[0]))
        if split == "val" or row % DEAD:
            out.picture(file_of(split, row), item.image)
            out.detect(split, row if split == "train" else f"val-{row}", item.image)
    return rows


def write_cc3m(out: Folder, corpus: corpora.Corpus) -> None:
    """The two tables that are handed out, and the pictures under the number of their row, as xmodaler has them."""
    rows = conceptual_pictures(out, corpus, lambda split, row: f"images_{split}/{row}.jpg")
    for split, name in (("train", "Train_GCC-training.tsv"), ("val", "Validation_GCC-1.1.0-Validation.tsv")):
        with open(out.place(name), "w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table, delimiter="\t", quotechar='"', lineterminator="\n")
            writer.writerows((caption, f"https://example.org/{file}") for file, caption in rows[split])


def write_cc3m_json(out: Folder, corpus: corpora.Corpus) -> None:
    """ViLT's form (dandelin/ViLT:DATA.md): files have no extension, a folder the first four of their seven digits."""

    def file_of(split: str, row: int) -> str:
        digits = f"{row - 1:07d}"
        return f"images_{split}/{digits[:4]}/{digits}"

    for split, rows in conceptual_pictures(out, corpus, file_of).items():
        out.json(f"{split}_annot.json", rows)


def write_sbu(out: Folder, corpus: corpora.Corpus) -> None:
    listed = {"image_urls": [], "user_ids": [], "captions": []}
    for number, split, _, item in numbered(corpus, "train", "val", "test"):
        listed["image_urls"].append(f"http://static.flickr.com/2723/{FIRST_FILE + number}_b0f291553e.jpg")
        listed["user_ids"].append(f"{10_000_000 + number}@N00")
        listed["captions"].append(item.captions[0])
        if (number + 1) % DEAD:
            out.picture(f"images/{number + 1}.jpg", item.image)
            out.detect(split, number + 1, item.image)
    out.json("sbu-captions-all.json", listed)


# ---------------------------------------------------------------------------------------------------------------------
# The command

LAYOUTS = {  # name -> what writes it, its name in corpora.py, the task of the scenes
    "coco": (write_coco, "coco", "caption"),
    "coco2017": (write_coco2017, "coco", "caption"),
    "flickr30k": (write_flickr30k, "flickr30k", "caption"),
    "flickr8k": (write_flickr8k, "flickr8k", "caption"),
    "nocaps": (write_nocaps, "nocaps", "caption"),
    "vqa": (write_vqa, "vqa", "vqa"),
    "nlvr2": (write_nlvr2, "nlvr2", "nlvr2"),
    "nlvr1": (write_nlvr1, "nlvr1", "nlvr2"),
    "snli_ve": (write_snli_ve, "snli_ve", "ve"),
    "vcr": (write_vcr, "vcr", "vcr"),
    "vg": (write_vg, "vg", "caption"),
    "cc3m": (write_cc3m, "cc3m", "caption"),
    "cc3m_json": (write_cc3m_json, "cc3m", "caption"),
    "sbu": (write_sbu, "sbu", "caption"),
}


def export(layout: str, directory: Path | str, world="tiny", train=2000, val=200, test=200, size=64, seed=0,
           regions: str = "") -> Path:
    """Writes scenes into a new folder in the form of LAYOUTS[layout]. UserError where that cannot be."""
    if layout not in LAYOUTS:
        nearest = difflib.get_close_matches(layout.lower(), LAYOUTS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"layout {layout!r} is not known: it is one of {', '.join(LAYOUTS)}{hint}")
    for flag, number in (("train", train), ("val", val), ("test", test), ("size", size)):
        if number < 1:
            raise UserError(f"--{flag} {number}: it must be 1 or more")
    if regions:
        common.choose("regions", regions, ["npz", "tsv"])
        if layout.startswith("nlvr"):
            raise UserError(f"{layout}: pairs of pictures are not read as regions; leave out --regions")
        if layout == "vcr" and regions == "tsv":
            raise UserError("vcr: regions of its objects do not come as .tsv; use --regions npz")
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir()) or directory == Path.cwd()):
        raise UserError(f"{directory} is there already, with files in it or as the folder you are in; give another "
                        "name, or remove it first")  # fmt: skip
    write, _, task = LAYOUTS[layout]
    corpus = corpora.load_scenes(world, train, val, test, seed, task)
    unfinished = directory.with_name(f"{directory.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        write(Folder(unfinished, size, regions), corpus)
        unfinished.rename(directory)  # an empty one may stand there
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def main(argv=None) -> None:
    parser = common.Parser(prog="export.py", description="Scenes in the exact form of an official data set.")
    parser.add_argument("layout", metavar="LAYOUT", help=", ".join(LAYOUTS))
    parser.add_argument("directory", metavar="DIR", help="a new folder")
    parser.add_argument("--world", default="tiny", help="tiny or full (default: tiny)")
    parser.add_argument("--train", type=int, default=2000, help="scenes of the train split (default: 2000)")
    parser.add_argument("--val", type=int, default=200, help="of val (default: 200)")
    parser.add_argument("--test", type=int, default=200, help="of test, and of test_compositional (default: 200)")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--regions", default="", help="region files too: npz, one a picture, or tsv, one a split")
    options = parser.parse_args(argv)
    directory = export(**vars(options))
    name = LAYOUTS[options.layout][1]
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"wrote {directory} in the form of {options.layout}: {size / 2**20:.1f} MiB. What reads it:")
    print(f"  python data.py check {name} --root {options.directory}")
    if LAYOUTS[options.layout][2] == "caption" and name not in ("nocaps", "vg", "cc3m", "sbu"):  # no train, or no test
        print(f"  python vcgpt.py --data {name} --root {options.directory} --preset tiny --steps 3")


if __name__ == "__main__":
    common.run_main(main)
