"""Score result files, whoever wrote them: our metrics, and beside them the official ones where they can run.

    python tools/score.py captions runs/vcgpt-coco-caption/captions_test.json data/coco/dataset_coco.json
    python tools/score.py answers vqa vqa_val.json --root data/vqa         also nlvr2, nlvr1, snli_ve, vcr
    python tools/score.py answers vqa vqa_server_test.json --split server_test     would the server take it?

References of captions: a COCO annotation file, or a Karpathy file, of which the test split is taken. Answers are held
against a split of the data set: every question once, in the official form. Where labels are hidden that is all there is
to say before a file goes to the server.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # noqa: E402
import corpora  # noqa: E402
import eval as scoring  # noqa: E402
from common import UserError  # noqa: E402
from tools import official as programs  # noqa: E402


def _read_json(path):
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
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


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def _lines(path):
    try:
        return [line for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _rows_of_vqa(path):
    rows = _read_json(path)
    if not isinstance(rows, list):
        raise UserError(f'{path} is not a result file: it is no list [{{"question_id": 42000, "answer": "2"}}, ...]')
    for number, row in enumerate(rows):
        i, text = (row.get("question_id"), row.get("answer")) if isinstance(row, dict) else (None, None)
        if not isinstance(i, int) or isinstance(i, bool) or not isinstance(text, str):
            raise UserError(f'{path}, entry {number}: it needs "question_id", a whole number, and "answer", a text')
        yield f"entry {number}", i, text


def _rows_of_nlvr2(path):
    for number, line in enumerate(_lines(path), 1):
        i, comma, word = line.strip().rpartition(",")
        if not comma or word not in ("True", "False"):
            raise UserError(f"{path}, line {number}: it must be like dev-850-0-1,True, not {line[:60]!r}")
        yield f"line {number}", i, word == "True"


def _rows_of_ve(path):
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            i, label = row["pairID"], row["label"]
            if not isinstance(i, str):
                raise TypeError("pairID is no text")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f'{path}, line {number}: it needs "pairID" and "label" ({error!r})') from None
        if label not in corpora.ENTAILMENT:
            raise UserError(f"{path}, line {number}: label {label!r} is none of {', '.join(corpora.ENTAILMENT)}")
        yield f"line {number}", i, label


def _rows_of_vcr(path):
    head, *lines = _lines(path) or [""]
    if head.split(",") != programs.VCR_COLUMNS:
        raise UserError(f"{path}: its first line must be {','.join(programs.VCR_COLUMNS)[:60]}...")
    for number, line in enumerate(lines, 2):
        i, *cells = line.split(",")
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            row = []
        if len(row) != 20 or not all(0 <= p <= 1 for p in row):
            raise UserError(f"{path}, line {number}: it needs an id and 20 probabilities")
        yield f"line {number}", i, [row[k : k + 4] for k in range(0, 20, 4)]


ROWS = {"vqa": _rows_of_vqa, "nlvr2": _rows_of_nlvr2, "nlvr1": _rows_of_nlvr2, "snli_ve": _rows_of_ve,
        "vcr": _rows_of_vcr}  # fmt: skip


def read_answers(path, name, items) -> dict:
    """A result file in the official form of a data set -> dict id -> answer, one for each of `items`. Raises UserError
    for what a server would refuse: another form, an id twice, one that is not in the split, one that is lacking."""
    found, known = {}, {item.example_id for item in items}
    for where, i, answer in ROWS[name](path):
        if i in found:
            raise UserError(f"{path}, {where}: {i} has an answer already; one for each question")
        if i not in known:
            raise UserError(f"{path}, {where}: {i} is not in this split; is it another one's? --split names it")
        found[i] = answer
    if lacking := [i for i in known if i not in found]:
        raise UserError(f"{path}: {len(lacking)} of {len(known)} questions have no answer, the first: {min(lacking)}")
    return found


def score_answers(name, items, found) -> dict:
    """Metrics of what read_answers gives."""
    if name == "vqa":
        types = {item.example_id: item.kinds[0] for item in items}
        return scoring.vqa_accuracy(found, {item.example_id: item.answers for item in items}, types)[0]
    labels = {item.example_id: item.label for item in items}
    if name == "snli_ve":
        right = {i: corpora.ENTAILMENT[k] for i, k in labels.items()}
        return {"ve_accuracy": scoring.class_accuracy(found, right)}
    if name == "vcr":
        given = {i: rows[1 + labels[i]] for i, rows in found.items()}  # the rationales, given the right answer
        rationale_labels = {item.example_id: item.rationale_label for item in items}
        return scoring.vcr_metrics({i: rows[0] for i, rows in found.items()}, given, labels, rationale_labels)
    groups = {item.example_id: item.group for item in items}
    return scoring.nlvr2_metrics(found, {i: bool(k) for i, k in labels.items()}, groups, name)


def main(argv=None):
    parser = common.Parser(prog="score.py", description="Scores result files, whoever wrote them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    captions = commands.add_parser(
        "captions", help="a caption result file, by our metrics and, with pycocoevalcap and Java, the official ones"
    )
    captions.add_argument("results", help='JSON list [{"image_id": 42, "caption": "a dog"}, ...], one entry an image')
    captions.add_argument("references", help="of the same images: COCO's captions_*.json, or Karpathy's (its test)")
    answers = commands.add_parser("answers", help="a result file of vqa, nlvr2, nlvr1, snli_ve or vcr")
    answers.add_argument("data", choices=list(ROWS), help="whose questions they answer")
    answers.add_argument("results", help="in the official form, as evaluation writes it")
    answers.add_argument("--root", help="folder of the data set; default data/NAME")
    answers.add_argument("--train-on", default="train", help="of vqa: train+val makes val the mini-val of 3,000")
    answers.add_argument("--split", default="", help="default test, or val where test is hidden; also server_test, ...")
    args = parser.parse_args(argv)
    if args.command == "answers":
        corpus = corpora.load(args.data, args.root, train_on=args.train_on)
        split = args.split or corpus.finally_evaluated()[0]
        common.choose("split", split, list(corpus.splits))
        items = list(corpus.splits[split])
        found = read_answers(args.results, args.data, items)
        if split in corpus.hidden():
            print(f"{len(found):,} answers, one for each of {split}, in the official form: ready for the server")
        else:
            print(common.table({split: score_answers(args.data, items, found)}))
        return
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
