"""Where the official data sets come from: pages, what to take from them, terms as far as a source says them, layouts.

    python data.py where            a line for each
    python data.py where coco

Reading map: what is known of a data set | the data sets | where.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# What is known of a data set


class Source(NamedTuple):
    title: str
    files: tuple[tuple[str, str], ...]  # (page, what to take from it)
    terms: str  # as far as a source says them
    tree: str


# ---------------------------------------------------------------------------------------------------------------------
# The data sets

COCO_PAGE = "https://cocodataset.org/#download"
KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
FLICKR30K_FORM = "https://forms.illinois.edu/sec/229675"  # dandelin/ViLT:DATA.md
FLICKR_TERMS = "images: Flickr's terms of use, non-commercial research and education only"
IMG2DATASET = "https://github.com/rom1504/img2dataset"
COCO_TERMS = "annotations CC BY 4.0; images: Flickr's terms of use"

SOURCES = {
    "scenes": Source("the small world of coloured shapes, drawn when needed", (), "MIT, like this repository", ""),
    "coco": Source(
        "COCO captions, Karpathy's splits",
        ((COCO_PAGE, "2014 Train images (13 GB), 2014 Val images (6 GB)"), (KARPATHY, "dataset_coco.json in it")),
        COCO_TERMS,
        """
├── dataset_coco.json
├── train2014/
│   └── COCO_train2014_000000000009.jpg ...     82,783 files
└── val2014/
    └── COCO_val2014_000000000042.jpg ...       40,504 files
The images of 2017, in train2017/ and val2017/, are the same under other names and do as well.""",
    ),
    "flickr30k": Source(
        "Flickr30k captions, Karpathy's splits",
        ((FLICKR30K_FORM, "the images, on request, from the University of Illinois"),
         (KARPATHY, "dataset_flickr30k.json in it")),
        FLICKR_TERMS,
        """
├── dataset_flickr30k.json
└── flickr30k-images/
    └── 1000092795.jpg ...                      31,783 files""",
    ),
    "flickr8k": Source(
        "Flickr8k captions, Karpathy's splits",
        (("https://forms.illinois.edu/sec/1713398", "Flickr8k_Dataset.zip (1 GB), on request, University of Illinois"),
         (KARPATHY, "dataset_flickr8k.json in it")),
        FLICKR_TERMS,
        """
├── dataset_flickr8k.json
└── Flicker8k_Dataset/
    └── 1000268201_693b08cb0e.jpg ...""",
    ),
    "nocaps": Source(
        "NoCaps: captions of things that COCO does not have, for evaluation",
        (("https://nocaps.org/download", "the two .json files; their `coco_url` names each image, of Open Images"),
         ("https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json", "the captions of the validation set")),
        "",
        """
├── nocaps_val_4500_captions.json
├── nocaps_test_image_info.json                 only for the server
├── val/
│   └── 0013ea2087020901.jpg ...                4,500 files
└── test/                                       10,600 files, only for the server""",
    ),
    "vqa": Source(
        "VQA v2: questions about COCO's images",
        (("https://visualqa.org/download.html", "Balanced Real Images: questions and annotations, v2.0"),
         (COCO_PAGE, "2014 Train images (13 GB), 2014 Val images (6 GB); 2015 Test images, only for the server"),
         ("https://visualgenome.org/api/v0/api_home.html", "only for --train-on train+val+vg: images, image_data.json, "
          "question_answers.json into data/vg")),
        COCO_TERMS,
        """
├── v2_OpenEnded_mscoco_train2014_questions.json        and val2014
├── v2_mscoco_train2014_annotations.json                and val2014
├── v2_OpenEnded_mscoco_test2015_questions.json         and test-dev2015, only for the server
├── train2014/   COCO_train2014_000000000009.jpg ...    82,783 files
├── val2014/     COCO_val2014_000000000042.jpg ...      40,504 files
└── test2015/                                           only for the server
The three folders may lie in data/coco instead.""",
    ),
    "nlvr2": Source(
        "NLVR2: statements about pairs of photographs",
        (("https://github.com/lil-lab/nlvr", "nlvr2/data/*.json"),
         ("https://lil.nlp.cornell.edu/nlvr/", "the images: a form, for research; or nlvr2/util/download_images.py")),
        "sentences and labels CC BY 4.0; the images are not the authors' to license",
        """
├── data/
│   └── train.json  dev.json  test1.json  test2.json
└── images/
    ├── train/
    │   └── 12/  train-10108-0-img0.png ...     `directory` of the record
    ├── dev/     dev-0-0-img0.png ...
    ├── test1/   test1-0-0-img0.png ...
    └── test2/""",
    ),
    "nlvr1": Source(
        "NLVR, the first version: statements about drawn boxes, written in this form",
        (("https://github.com/lil-lab/nlvr", "nlvr/: train, dev and test, .json and images"),),
        "CC BY 4.0",
        """
├── train.jsonl  val.jsonl  test.jsonl          a line: {"identifier": "dev-1234-0", "sentence": "There is a box ...",
│                                               "label": "true", "images": ["images/dev-1234-0-0.png"]}
└── images/
    └── dev-1234-0-0.png ...                    several in `images`: the same content in other orders""",
    ),
    "snli_ve": Source(
        "SNLI-VE: hypotheses about Flickr30k's images",
        (("https://github.com/necla-ml/SNLI-VE", "snli_ve_{train,dev,test}.jsonl, linked in its README"),
         (FLICKR30K_FORM, "the images, on request, from the University of Illinois")),
        FLICKR_TERMS,
        """
├── snli_ve_train.jsonl  snli_ve_dev.jsonl  snli_ve_test.jsonl
└── flickr30k-images/
    └── 1000092795.jpg ...                      31,783 files
The folder may lie in data/flickr30k instead.""",
    ),
    "vcr": Source(
        "VCR: questions about films, with answers and reasons",
        (("https://visualcommonsense.com/download/", "vcr1annots.zip, vcr1images.zip"),),
        "an agreement on that page comes before the download",
        """
├── train.jsonl  val.jsonl  test.jsonl
└── vcr1images/
    └── lsmdc_3015_CHARLIE_ST_CLOUD/            a folder a film: each image .jpg, its boxes .json beside it""",
    ),
    "vg": Source(
        "Visual Genome: phrases about regions of its pictures, and questions",
        (("https://homes.cs.washington.edu/~ranjay/visualgenome/api.html", "images (two parts), image_data.json, "
          "region_descriptions.json; question_answers.json only for --task vqa"),
         (KARPATHY, "dataset_coco.json in it, which tells the pictures that COCO tests on; dataset_flickr30k.json "
          "tells Flickr30k's")),
        "annotations CC BY 4.0; half of the images are COCO's",
        """
├── region_descriptions.json  image_data.json    here or in annotations/
├── question_answers.json                       only for --task vqa
└── images/
    ├── VG_100K/    2.jpg ...                   108,077 files in both
    └── VG_100K_2/  1.jpg ...
data/coco/dataset_coco.json                     without it, only with --keep-test
data/flickr30k/dataset_flickr30k.json           if that is a target, too
`python tools/shards.py resize data/vg data/small/vg --short 384` makes the pictures small, once for all epochs.""",
    ),
    "cc3m": Source(
        "Conceptual Captions 3M: captions and addresses of pictures on the web",
        (("https://ai.google.com/research/ConceptualCaptions/download", "Train_GCC-training.tsv (3,318,333 rows), "
          "Validation_GCC-1.1.0-Validation.tsv (15,840 rows): caption<TAB>address"),
         (IMG2DATASET, "fetches the pictures; a tenth to a quarter of the addresses are dead:\n"
          "    sed -i '1s/^/caption\\turl\\n/' cc3m.tsv          of a copy of the training file\n"
          "    img2dataset --url_list cc3m.tsv --input_format \"tsv\" --url_col \"url\" --caption_col \"caption\" \\\n"
          "        --output_format webdataset --output_folder data/cc3m --processes_count 16 --thread_count 64 \\\n"
          "        --image_size 256")),
        '"may be freely used for any purpose, although acknowledgement of Google LLC as the data source would be '
        'appreciated"',
        """
├── 00000.tar  00001.tar ...                    img2dataset's shards, read as they are, if no .tsv lies beside them
or
├── Train_GCC-training.tsv                      and Validation_GCC-1.1.0-Validation.tsv
├── images_train/   1.jpg ...                   by the number of the row, from 1; folders below do as well
└── images_val/     1.jpg ...
or
├── train_annot.json  val_annot.json            [["images_train/0000/0000123", "a caption"], ...]
└── images_train/  images_val/
Of files, `python tools/shards.py pack cc3m shards/cc3m --short 384` makes shards: a disk reads them faster than
millions of files. `resize` makes files, or shards, of smaller pictures.""",
    ),
    "sbu": Source(
        "SBU: photographs of Flickr with their owners' captions, a million addresses",
        (("https://www.cs.rice.edu/~vo9/sbucaptions/", "sbu-captions-all.tar.gz: sbu-captions-all.json in it"),
         (IMG2DATASET, "fetches the pictures, of which not all are there any more:\n"
          "    img2dataset --url_list sbu-captions-all.json --input_format \"json\" --url_col \"image_urls\" \\\n"
          "        --caption_col \"captions\" --output_format webdataset --output_folder data/sbu \\\n"
          "        --processes_count 16 --thread_count 64 --image_size 256"),
         (KARPATHY, "dataset_flickr30k.json in it tells the photographs that Flickr30k tests on")),
        "",
        """
├── 00000.tar  00001.tar ...                    img2dataset's shards, read as they are, if no .json lies beside them
or
├── sbu-captions-all.json                       or SBU_captioned_photo_dataset_urls.txt and ..._captions.txt
└── images/   1.jpg ...                         by the number in the file, from 1; folders below do as well
or
├── annot.json                                  [["images_train/0000/0000000", "a caption"], ...]
└── images_train/
data/flickr30k/dataset_flickr30k.json           to leave those photographs out, which shards and annot.json cannot tell
`python tools/shards.py pack sbu shards/sbu --short 384` makes shards of files; `resize` makes smaller pictures.""",
    ),
    "shards": Source(
        "any pictures with captions in tar shards, as webdataset has them",
        ((IMG2DATASET, "writes them from a list of addresses and captions; read as they are"),
         ("tools/shards.py", "`python tools/shards.py pack DATA shards/NAME` writes them of any set with captions;\n"
          "    `python tools/shards.py resize shards/NAME shards/small --short 384` makes their pictures smaller")),
        "",
        """
├── 00000.tar                                   one behind the other, of each picture:
│     000000000.jpg                             or .jpeg, .png, .webp
│     000000000.txt                             its caption; or `caption`, `captions` in .json
│     000000000.json                            if any
├── 00001.tar ...
└── index/                                      made at the first start, where each picture begins
It needs webdataset: pip install webdataset""",
    ),
}  # fmt: skip
REGIONS = Source(
    "region features of COCO's images, as bottom-up attention made them; of others: python tools/regions.py",
    (("https://github.com/peteanderson80/bottom-up-attention", "2014 Train/Val, 10 to 100 regions an image (23 GB) or "
      "36 (25 GB); 2015 Testing (15 GB, 17 GB): .tsv, without class probabilities"),
     ("https://github.com/YehLi/xmodaler", "tools/create_feats.py makes one .npz an image of them")),
    "",
    """
└── 42.npz ...                                  <image id>.npz""",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Where

PLACES = {"regions": ("data/coco/regions", "coco"), "shards": ("shards/NAME", "shards/NAME")}  # folder, what to check


def where(name: str | None) -> None:
    if name is None:
        width = max(map(len, SOURCES))
        for known, source in (*SOURCES.items(), ("regions", REGIONS)):
            print(f"{known:<{width}}  {source.title}")
        print("\n`python data.py where NAME` names the pages, the terms and the layout.")
        return
    known = {**SOURCES, "regions": REGIONS}
    if name not in known:
        nearest = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"{name!r} is not known: it is one of {', '.join(known)}{hint}")
    source = known[name]
    print(f"{source.title}\n")
    for page, what in source.files:
        print(f"{page}\n    {what}")
    if source.terms:
        print(f"terms: {source.terms}")
    if source.tree:
        folder, data = PLACES.get(name, (f"data/{name}", name))
        print(f"\n{folder}/{source.tree}\n")
        print(f"then `python data.py check {data}`")
