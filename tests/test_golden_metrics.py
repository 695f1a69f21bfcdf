"""Our metrics against the scores that the official programs gave, stored in JSON files of golden references.

Every stored score is a value named by its path in the file (`images/3/scores/ROUGE_L`). It is compared with ours, or
exempt by a line of exempt.txt, or input; anything else counts as not covered and fails the test.
"""

import json
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import corpora
import eval as scoring
import language


def leaves(node, path=""):
    """(path, value) of every number and text in a JSON value."""
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(child, f"{path}/{key}" if path else str(key))
    else:
        yield path, node


def compare(name, data, ours, inputs, exempt, tolerance, shares=None):
    """Assert every stored value of `data` that is neither input nor exempt; print the line of this reference.

    ours: path -> number (within `tolerance` of the stored one) or text. Texts are equal, but for those of a pattern in
    `shares`, of which at least that share is.
    """
    n_exempt, worst, missing, wrong, texts = 0, 0.0, [], [], {pattern: [] for pattern in shares or {}}
    n_compared = 0
    for path, stored in leaves(data):
        if any(fnmatchcase(path, pattern) for pattern in inputs):
            continue
        if any(fnmatchcase(path, pattern) for pattern, _ in exempt):
            n_exempt += 1
        elif path not in ours:
            missing.append(path)
        else:
            n_compared += 1
            shared = next((pattern for pattern in texts if fnmatchcase(path, pattern)), None)
            if shared:
                texts[shared].append(stored == ours[path])
            elif isinstance(stored, str):
                wrong += [path] if stored != ours[path] else []
            else:
                error = abs(stored - ours[path])
                worst = max(worst, error)
                wrong += [path] if not error <= tolerance else []
    print(f"\ngolden {name}: {n_compared} values compared, {len(missing)} not covered, {n_exempt} exempt, "
          f"max abs err {worst:.1e}")  # fmt: skip
    for pattern, equal in texts.items():
        print(f"  {sum(equal)} of {len(equal)} texts {pattern} equal")
        assert sum(equal) >= shares[pattern] * len(equal), f"too few texts {pattern} are equal"
    assert not missing, f"{len(missing)} stored values are compared with nothing: {missing[:5]}"
    assert not wrong, f"{len(wrong)} values differ from the stored ones: {wrong[:5]}"
    assert n_compared, "the file holds nothing to compare"


# ---------------------------------------------------------------------------------------------------------------------
# Captions

CAPTION_INPUTS = ["format_version", "description", "sources/*", "metrics/*", "versions/*", "groups/*/n_images"]
CAPTION_INPUTS += [f"images/*/{key}" for key in ("image_id", "group", "system", "references/*", "hypothesis")]


def caption_scores(images):
    """(corpus scores, scores per image) of records with PTB text, as a corpus of their own, under the file's names."""
    hyps = {k: image["hypothesis_ptb"].split() for k, image in enumerate(images)}
    refs = {k: [ref.split() for ref in image["references_ptb"]] for k, image in enumerate(images)}
    # The official ROUGE-L splits at blanks alone, the others at the no-break space of "1 1/2" too.
    rouge_hyps = {k: image["hypothesis_ptb"].split(" ") for k, image in enumerate(images)}
    rouge_refs = {k: [ref.split(" ") for ref in image["references_ptb"]] for k, image in enumerate(images)}
    rouge, rouge_of = scoring.rouge_l(rouge_hyps, rouge_refs)
    cider, cider_of = scoring.CiderD(refs).score(hyps)
    bleu_of = scoring.bleu_per_image(hyps, refs)

    def named(bleu, rouge, cider):
        bleu = {key.replace("BLEU", "Bleu"): value for key, value in bleu.items()}
        return {**bleu, "ROUGE_L": rouge, "CIDEr": cider, "CIDEr_D": cider}

    corpus = named(scoring.bleu(hyps, refs), rouge, cider)
    return corpus, [named(bleu_of[k], rouge_of[k], cider_of[k]) for k in hyps]


def fixed_frequencies(images, group):
    """(mean, value per image) of CIDEr-D with the document frequencies of one group's references."""
    document_frequency, n = Counter(), 0
    for image in images:
        if image["group"] == group:
            refs = [ref.split() for ref in image["references_ptb"]]
            grams = {tuple(r[i : i + k]) for r in refs for k in range(1, 5) for i in range(len(r) - k + 1)}
            document_frequency.update(grams)  # one document per image
            n += 1
    refs = {k: [ref.split() for ref in image["references_ptb"]] for k, image in enumerate(images)}
    scorer = scoring.CiderD(refs, document_frequency=document_frequency, num_images=n)
    return scorer.score({k: image["hypothesis_ptb"].split() for k, image in enumerate(images)})


def check_captions(name, data, exempt):
    images = data["images"]
    corpus, per_image = caption_scores(images)
    ours = {f"corpus/{key}": value for key, value in corpus.items()}
    for k, image in enumerate(images):
        ours |= {f"images/{k}/scores/{key}": value for key, value in per_image[k].items()}
        ours[f"images/{k}/hypothesis_ptb"] = " ".join(scoring.tokenize_caption(image["hypothesis"]))
        for j, ref in enumerate(image["references"]):
            ours[f"images/{k}/references_ptb/{j}"] = " ".join(scoring.tokenize_caption(ref))
    for group in data.get("groups", {}):
        members = [image for image in images if image["group"] == group]
        corpus, per_image = caption_scores(members)
        ours |= {f"groups/{group}/corpus/{key}": value for key, value in corpus.items()}
        for image, scores in zip(members, per_image, strict=True):
            ours[f"groups/{group}/CIDEr_D_per_image/{image['image_id']}"] = scores["CIDEr_D"]
    for group in {image["group"] for image in images}:
        mean, values = fixed_frequencies(images, group)
        ours[f"corpus/CIDEr_D_df_{group}"] = mean
        ours |= {f"images/{k}/scores/CIDEr_D_df_{group}": value for k, value in values.items()}
    # Of hypotheses, hard on purpose, no share is asked: the scores from raw text, below, judge how they came out.
    shares = {"images/*/references_ptb/*": 0.97, "images/*/hypothesis_ptb": 0.0}
    compare(name, data, ours, CAPTION_INPUTS, exempt, 1e-6, shares)
    raw = scoring.caption_metrics(
        {image["image_id"]: image["hypothesis"] for image in images},
        {image["image_id"]: image["references"] for image in images},
    )
    assert raw["CIDEr_D"] == pytest.approx(data["corpus"]["CIDEr"], abs=0.006)
    assert raw["BLEU_4"] == pytest.approx(data["corpus"]["Bleu_4"], abs=0.003)
    assert raw["ROUGE_L"] == pytest.approx(data["corpus"]["ROUGE_L"], abs=0.003)


def test_captions(golden_path, exempt):
    data = json.loads(golden_path("caption_metrics.json").read_text(encoding="utf-8"))
    check_captions("caption_metrics.json", data, exempt("caption_metrics.json"))


def test_captions_of_scenes():
    """The project's own twin of caption_metrics.json: the scenes' language, which the tokenizer must get right."""
    file = Path(__file__).parent / "golden" / "scenes_captions.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    check_captions(file.name, data, [])
    for image in data["images"]:
        raw, ptb = [*image["references"], image["hypothesis"]], [*image["references_ptb"], image["hypothesis_ptb"]]
        assert [" ".join(scoring.tokenize_caption(text)) for text in raw] == ptb


# ---------------------------------------------------------------------------------------------------------------------
# Questions, retrieval, statements


def read(golden_path, name):
    return json.loads(golden_path(name).read_text(encoding="utf-8"))


def percent(fraction):
    return round(100 * fraction, 2)  # as the official evaluation rounds


def test_vqa(golden_path, exempt):
    name = "vqa_accuracy.json"
    data = read(golden_path, name)
    inputs = ["format_version", "description", "normalisation/*/0"]
    inputs += [f"cases/*/{key}" for key in ("question_id", "image_id", "rule", "question_type", "answer_type")]
    inputs += ["cases/*/prediction", "cases/*/answers/*"]
    ours = {f"normalisation/{k}/1": language.normalise_answer(raw) for k, (raw, _) in enumerate(data["normalisation"])}
    cases = {case["question_id"]: case for case in data["cases"]}
    answers = {i: [one["answer"] for one in case["answers"]] for i, case in cases.items()}
    predictions, *types = (
        {i: case[key] for i, case in cases.items()} for key in ("prediction", "answer_type", "question_type")
    )
    metrics, values = scoring.vqa_accuracy(predictions, answers, *types)
    ours["accuracy/overall"] = percent(metrics.pop("vqa_accuracy"))
    for key, value in metrics.items():
        place = "perQuestionType" if key.startswith("vqa_accuracy: ") else "perAnswerType"
        ours[f"accuracy/{place}/{key.removeprefix('vqa_accuracy: ').removeprefix('vqa_accuracy_')}"] = percent(value)
    for k, i in enumerate(cases):
        ours[f"cases/{k}/accuracy_percent"] = percent(values[i])
        after = scoring.vqa_forms(predictions[i], answers[i])[1]
        ours |= {f"cases/{k}/answers_after/{j}": text for j, text in enumerate(after)}
    compare(name, data, ours, inputs, exempt(name), 0)


def test_retrieval(golden_path, exempt):
    name = "retrieval_metrics.json"
    data = read(golden_path, name)
    scores, owner = np.array(data["scores"]), np.array(data["text_owner"])
    size = len(scores) // len(data["folds"])  # images a fold

    def named(place, metrics):
        return {f"{place}/{way}_r{k}": 100 * metrics[f"{ours}@{k}"] for way, ours in (("txt", "TR"), ("img", "R"))
                for k in (1, 5, 10)}  # fmt: skip

    ours = named("full", scoring.recalls(scores, owner)) | named("folds_mean", scoring.recalls(scores, owner, size))
    for fold in range(len(data["folds"])):
        here = owner // size == fold
        part = scores[fold * size : (fold + 1) * size, here]
        ours |= named(f"folds/{fold}", scoring.recalls(part, owner[here] - fold * size))
    compare(name, data, ours, ["format_version", "description", "text_owner/*", "scores/*"], exempt(name), 1e-9)


def nlvr2_examples(data, root):
    """(labels, groups) by identifier, as the loader reads the real annotations: JSON lines in data/dev.json."""
    (root / "data").mkdir()
    fields = [{k: v for k, v in row.items() if k != "prediction"} for row in data["examples"]]
    (root / "data" / "dev.json").write_text("".join(json.dumps(row) + "\n" for row in fields), "utf-8")
    (root / "images" / "dev").mkdir(parents=True)
    pair = data["examples"][0]["identifier"].rpartition("-")[0]
    Image.new("RGB", (4, 4)).save(root / "images" / "dev" / f"{pair}-img0.png")  # the loader looks for some of them
    examples = corpora.load("nlvr2", root).splits["val"]
    assert [example.text for example in examples] == [row["sentence"] for row in data["examples"]]
    assert all(example.images[1].name == f"{example.image_ids[1]}.png" for example in examples)
    return {e.example_id: bool(e.label) for e in examples}, {e.example_id: e.group for e in examples}


def test_nlvr2(golden_path, exempt, tmp_path):
    name = "nlvr2_metrics.json"
    data = read(golden_path, name)
    predictions = {row["identifier"]: row["prediction"] for row in data["examples"]}
    metrics = scoring.nlvr2_metrics(predictions, *nlvr2_examples(data, tmp_path))
    ours = {key.removeprefix("nlvr2_"): value for key, value in metrics.items()}
    compare(name, data, ours, ["format_version", "description", "examples/*"], exempt(name), 0)


def test_vcr(golden_path, exempt):
    name = "vcr_metrics.json"
    data = read(golden_path, name)
    keys = ("answer_scores", "rationale_scores", "answer_label", "rationale_label")
    metrics = scoring.vcr_metrics(*(dict(enumerate(data[key])) for key in keys))
    ours = {"Q_A": metrics["vcr_qa"], "QA_R": metrics["vcr_qar"], "Q_AR": metrics["vcr_q2ar"]}
    compare(name, data, ours, ["format_version", "description", *(f"{key}/*" for key in keys)], exempt(name), 0)
