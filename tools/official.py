"""The forms of the official world: caption metrics by the official programs, and the result files that servers take.

    official_caption_metrics    BLEU to SPICE through pycocoevalcap and Java, beside which eval.py's own can be held
    write_vqa_results           and those of NLVR2, SNLI-VE and VCR; write_example_results chooses

`python tools/score.py captions RESULTS REFERENCES` prints the former; evaluation writes the latter.
"""

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import common
from common import UserError
from corpora import ENTAILMENT
from eval import class_of, same_ids, scores_table, truth_word

# ---------------------------------------------------------------------------------------------------------------------
# Programs


@contextmanager
def _quiet():
    """Java writes past sys.stdout and sys.stderr, so the descriptors themselves are turned away."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for descriptor, old in enumerate(kept, start=1):
                os.dup2(old, descriptor), os.close(old)


def official_caption_metrics(hyps, refs):
    """(metrics, notes) of the official programs, through pycocoevalcap: Stanford's PTB tokenizer, then BLEU_1..4,
    ROUGE_L, CIDEr_D, METEOR and SPICE, on the scale of `caption_metrics`.

    hyps: dict id -> caption; refs: dict id -> captions of the same images. What this machine cannot compute is left
    out, and a note says why and what to do. METEOR takes 7 seconds to start; nothing is downloaded here.
    """
    ids = same_ids(hyps, refs)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.spice import spice
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        return {}, [f"no official metrics: {error}; `pip install pycocoevalcap`"]
    if not shutil.which("java"):
        return {}, ["no official metrics: their tokenizer needs Java, and `java` is not on PATH; install a JRE"]

    def line(text):
        """The tokenizer reads a caption a line: a line end inside (\\n is one of many) would shift all that follow."""
        return {"caption": " ".join(text.encode("utf-8", "replace").decode().split())}

    texts = [{k: [line(hyps[i])] for k, i in enumerate(ids)}]
    texts += [{k: [line(ref) for ref in refs[i]] for k, i in enumerate(ids)}]
    metrics, notes = {}, []
    with _quiet():
        try:
            hyps, refs = map(PTBTokenizer().tokenize, texts)
        except OSError as error:
            return {}, [f"no official metrics: their tokenizer failed ({error}); it writes to its own folder"]
        if [[len(of[k]) for k in of] for of in texts] != [[len(of[k]) for k in of] for of in (hyps, refs)]:
            return {}, ["no official metrics: their tokenizer lost captions; does `java -version` work?"]
        try:
            values = Bleu(4).compute_score(refs, hyps, verbose=0)[0]
            metrics |= {f"BLEU_{n}": float(value) for n, value in enumerate(values, start=1)}
            metrics["ROUGE_L"] = float(Rouge().compute_score(refs, hyps)[0])
            metrics["CIDEr_D"] = float(Cider().compute_score(refs, hyps)[0])
        except Exception as error:  # references without a single word, for instance
            return {}, [f"no official metrics: pycocoevalcap failed ({error!r})"]
        models = [Path(spice.__file__).parent / f"lib/stanford-corenlp-3.6.0{kind}.jar" for kind in ("", "-models")]
        programs = {"METEOR": (Meteor, "2 GB of memory"), "SPICE": (spice.Spice, "8 GB of memory and Java 8")}
        if not all(jar.is_file() for jar in models):  # SPICE would start to download them
            del programs["SPICE"]
            fetch = "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()"
            notes.append(f'no SPICE: its CoreNLP models are missing; fetch them once: `python -c "{fetch}"`')
        for name, (program, needs) in programs.items():
            scorer = None
            try:
                scorer = program()
                metrics[name] = float(scorer.compute_score(refs, hyps)[0])
            except Exception as error:  # a Java program may die of anything, and the other numbers are worth having
                notes.append(f"no {name}: its Java program failed ({error!r}); it needs {needs}")
                if hasattr(scorer, "lock") and scorer.lock.locked():
                    scorer.lock.release()  # METEOR's destructor would wait for it forever
            del scorer
    return metrics, notes


# ---------------------------------------------------------------------------------------------------------------------
# Result files: dicts from the example's id; what a server would refuse raises UserError before anything is written

def write_results(path, rows):
    """Rows as JSON, or texts as lines, whole or not at all. Raises UserError where that cannot be written."""
    try:
        if isinstance(rows[0], dict):
            return common.write_json(Path(path), rows)
        Path(f"{path}.tmp").write_text("".join(f"{line}\n" for line in rows), "utf-8")
        Path(f"{path}.tmp").replace(path)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be written ({error}); make room, or take a folder that exists") from None


def write_caption_results(path, captions):
    """captions, a dict image_id -> caption, as the flat list [{"image_id": 42, "caption": "a dog"}] that COCO's and
    NoCaps' servers take: one entry an image. Integer ids stay integers. Raises UserError where it cannot be written."""
    wrong = [i for i, caption in captions.items() if not isinstance(caption, str)]
    if wrong or not captions:
        raise UserError(f"{path}: {f'the captions of {wrong[:3]} are not text' if wrong else 'no captions to write'}")
    rows = [{"image_id": i if isinstance(i, str) else int(i), "caption": text} for i, text in captions.items()]
    write_results(path, rows)


def _check(path, results, kind, need, is_right):
    wrong = [i for i, result in results.items() if not is_right(i, result)]
    if wrong or not results:
        raise UserError(f"{path}: {f'the {kind} of {wrong[:3]} are not {need}' if wrong else f'no {kind} to write'}")


def _is_identifier(i):
    """Text that a line of comma-separated values can begin with: dev-850-0-1, val-7."""
    return isinstance(i, str) and re.fullmatch(r"[\w.-]+", i)


def _is_number(i):
    return isinstance(i, int | np.integer) and not isinstance(i, bool)


def write_vqa_results(path, answers):
    """answers, dict question_id -> text, as [{"question_id": 42000, "answer": "2"}, ...]; the ids are integers."""
    need = "text, under whole numbers as question ids"
    _check(path, answers, "answers", need, lambda i, text: _is_number(i) and isinstance(text, str))
    write_results(path, [{"question_id": int(i), "answer": text} for i, text in answers.items()])


def write_nlvr2_results(path, predictions):
    """predictions, dict identifier -> True or False (or these words), as lines `dev-850-0-1,True`."""
    need = "True or False, under identifiers such as dev-850-0-1"
    _check(path, predictions, "predictions", need, lambda i, value: _is_identifier(i) and truth_word(value))
    write_results(path, [f"{i},{truth_word(value)}" for i, value in predictions.items()])


def write_ve_results(path, labels):
    """labels, dict pairID -> label, as JSON lines {"pairID": ..., "label": ...}: our form; there is no server."""
    need = f"{', '.join(ENTAILMENT[:2])} or {ENTAILMENT[2]}, under texts as pairID"
    _check(path, labels, "labels", need, lambda i, label: isinstance(i, str) and label in ENTAILMENT)
    write_results(path, [json.dumps({"pairID": i, "label": label}) for i, label in labels.items()])


VCR_COLUMNS = ["annot_id", *(f"{what}_{k}" for what in ("answer", *(f"rationale_conditioned_on_a{i}" for i in range(4)))
                             for k in range(4))]  # fmt: skip


def write_vcr_results(path, answer_scores, rationale_scores):
    """VCR's leaderboard: annot_id and 20 probabilities a line, with the column names of r2c's eval_for_leaderboard.py.

    Dicts annot_id -> scores, before any softmax: [4] of the answers; [4, 4] of the rationales, row i given answer i.
    """
    _check(path, answer_scores, "scores", "under identifiers such as val-7", lambda i, _: _is_identifier(i))
    ids = same_ids(rationale_scores, answer_scores, "rationale score", "answer score", "question")
    of_answers, of_rationales = scores_table(answer_scores, ids, 4), scores_table(rationale_scores, ids, 4, 4)
    scores = np.concatenate([of_answers[:, None], of_rationales], axis=1)  # [questions, 5, 4]
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).reshape(-1, 20).tolist()
    rows = [[i, *row] for i, row in zip(ids, p, strict=True)]
    write_results(path, [",".join(map(str, row)) for row in (VCR_COLUMNS, *rows)])


def write_example_results(folder, split, corpus, items, found, rationales=()):
    """The result file of a split, in the form that its kind of task has; the arguments are those of
    eval.score_examples. Choices: `rationales` are four dicts, dict k given answer k."""
    found = {item.example_id: found[item.example_id] for item in items}  # whatever the order of processes
    if hasattr(items[0], "rationales"):
        given = {i: [one[i] for one in rationales] for i in found}
        return write_vcr_results(folder / f"vcr_{split}.csv", found, given)
    classes = {i: class_of(scores) for i, scores in found.items()}
    if corpus.answers:
        return write_vqa_results(folder / f"vqa_{split}.json", {i: corpus.answers[k] for i, k in classes.items()})
    if len(items[0].images) == 2:
        return write_nlvr2_results(folder / f"nlvr2_{split}.csv", {str(i): bool(k) for i, k in classes.items()})
    write_ve_results(folder / f"ve_{split}.jsonl", {str(i): ENTAILMENT[k] for i, k in classes.items()})
