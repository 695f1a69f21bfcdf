"""Score result files, whoever wrote them: our metrics, and beside them the official ones where they can run.

    python tools/score.py captions runs/vcgpt-coco-caption/captions_test.json data/coco/dataset_coco.json

References: a COCO annotation file, or a Karpathy file, of which the test split is taken.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import eval as scoring  # noqa: E402
from common import UserError  # noqa: E402
from tools import official as programs  # noqa: E402


def _read_json(path):
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None


def read_caption_results(path):
    """A result file -> dict image_id -> caption. Raises UserError for what is no such file."""
    rows, captions, seen = _read_json(path), {}, set()
    if not isinstance(rows, list):
        raise UserError(f'{path} is not a result file: it is no list [{{"image_id": 42, "caption": "a dog"}}, ...]')
    for number, row in enumerate(rows):
        image, text = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if not isinstance(image, int | str) or not isinstance(text, str):
            raise UserError(f'{path}, entry {number}: it needs "image_id" and "caption", a number or text and a text')
        if str(image) in seen:
            raise UserError(f"{path}, entry {number}: image {image} has a caption already; one entry an image")
        seen.add(str(image))  # some programs write ids as text
        captions[image] = text
    return captions


def read_caption_references(path):
    """A COCO annotation file, or the test split of a Karpathy file -> dict image_id -> captions. Raises UserError."""
    content, refs = _read_json(path), {}
    try:
        if "annotations" in content:
            for row in content["annotations"]:
                refs.setdefault(row["image_id"], []).append(row["caption"].strip())
        else:
            for row in content["images"]:
                if row["split"] == "test":  # COCO's images go by COCO's ids, those of the Flickrs by Karpathy's
                    refs[row.get("cocoid", row["imgid"])] = [one["raw"].strip() for one in row["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is neither of COCO's form nor of Karpathy's ({error!r})") from None
    if not refs:
        raise UserError(f"{path} has no references: no annotations, and no image of the split test")
    return refs


def main(argv=None):
    parser = common.Parser(prog="score.py", description="Scores result files, whoever wrote them.")
    captions = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "captions", help="a caption result file, by our metrics and, with pycocoevalcap and Java, the official ones"
    )
    captions.add_argument("results", help='JSON list [{"image_id": 42, "caption": "a dog"}, ...], one entry an image')
    captions.add_argument("references", help="of the same images: COCO's captions_*.json, or Karpathy's (its test)")
    args = parser.parse_args(argv)
    hyps = {str(i): text for i, text in read_caption_results(args.results).items()}  # some write ids as text
    refs = {str(i): texts for i, texts in read_caption_references(args.references).items()}
    ours = scoring.caption_metrics(hyps, refs)
    official, notes = programs.official_caption_metrics(hyps, refs)
    print(f"{len(refs)} images, {sum(map(len, refs.values()))} references")
    print(common.table({"rule tokenizer": ours, **({"official": official} if official else {})}))
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    common.run_main(main)
