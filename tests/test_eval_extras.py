"""Rewards of self-critical training, truncated sampling, result files, and the official programs beside our metrics."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import decoding
import eval as scoring
from common import UserError
from tools import official as programs
from tools import score

# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def test_scores_of_pairs_are_those_of_each_image_alone():
    refs = {"x": [["a", "b"], ["a"]], "y": [["b", "c"]], 3: [["d"]]}
    scorer = scoring.CiderD(refs)
    pairs = [("y", ["b", "c"]), ("x", ["a"]), ("y", ["c"]), (3, []), ("x", ["a", "b", "z"]), ("x", ["a"])]
    together = scorer.score_pairs([i for i, _ in pairs], [hyp for _, hyp in pairs])
    assert together.tolist() == pytest.approx([scorer.score({i: hyp})[0] for i, hyp in pairs], abs=1e-12)
    assert together[0] > together[2] > 0 and together[1] == together[5]
    with pytest.raises(UserError, match=r"no references for images \[4\]"):
        scorer.score_pairs(["x", 4], [["a"], ["a"]])
    with pytest.raises(UserError, match="2 ids, 1 captions"):
        scorer.score_pairs(["x", "y"], [["a"]])


def test_rewards_by_hand():
    rewards = scoring.CiderReward({7: ["A dog!"], 8: ["Cats"]})
    # <eos> is in both images: idf ln 1 = 0. All else is in one of two: idf ln 2. References of 7: a, dog; a dog,
    # dog <eos>; a dog <eos>. Ended, "a dog" agrees in orders 1 to 3 of 4; there are no fours: 10 * 3/4.
    # Not ended it has both words, one of two pairs and no triple, and is a word short: 10/4 (1 + 1/sqrt 2) e^(-1/72).
    short = math.exp(-1 / 72)
    expected = [7.5, 2.5 * (1 + 1 / math.sqrt(2)) * short, 5.0, 2.5 * short, 0.0]
    texts = ["a dog.", "A dog", "cats", "cats", "cats"]
    values = rewards.reward([7, 7, 8, 8, 7], texts, [True, False, True, False, True])
    assert isinstance(values, np.ndarray) and values.tolist() == pytest.approx(expected)
    with pytest.raises(UserError, match="2 images or more"):
        scoring.CiderReward({7: ["a dog"]})


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_advantages_by_hand(kind):
    rewards = kind([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]])
    others = scoring.advantage(rewards)  # 1 - (2 + 6)/2, 2 - (1 + 6)/2, 6 - (1 + 2)/2
    assert others.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]
    greedy = scoring.advantage(rewards, "greedy", kind([2.0, 4.0]))
    assert greedy.tolist() == [[-1.0, 0.0, 4.0], [-1.0, -1.0, -1.0]]


def test_impossible_baselines_are_refused():
    with pytest.raises(UserError, match="raise their number"):
        scoring.advantage(np.ones((4, 1)))
    for greedy in (None, np.ones(3)):
        with pytest.raises(UserError, match="one for each of 4 images"):
            scoring.advantage(np.ones((4, 2)), "greedy", greedy)
    with pytest.raises(UserError, match="it is leave-one-out or greedy"):
        scoring.advantage(np.ones((4, 2)), "mean")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class Forever:
    """A decoder with the same logits at every step."""

    def __init__(self, logits):
        self.logits = logits

    def step(self, ids):
        return self.logits.expand(len(ids), -1)


def one_token(p, n=4000, **settings):
    """(share of each token among n samples of one token, the summed log p of each token drawn)."""
    decoder, generator = Forever(torch.tensor(p).log()), torch.Generator().manual_seed(0)
    ids, sums = decoding.sample(decoder, n, 99, len(p), 1, generator, **settings)
    shares = torch.bincount(ids[:, 0], minlength=len(p)) / n
    return shares.tolist(), {token: sums[ids[:, 0] == token].unique().tolist() for token in set(ids[:, 0].tolist())}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),  # .4 does not reach .65, .4 + .3 does
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),  # of the three, the first two have mass 7/9
        # at 1/2 the weights are 1 16 4 9 in 30ths: 25/30 reaches .8; untempered .7 would not
        ({"temperature": 0.5, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_truncated_sampling_by_hand(settings, expected):
    shares, sums = one_token([0.1, 0.4, 0.2, 0.3], **settings)
    assert shares == pytest.approx(expected, abs=0.025)  # three standard deviations of 4000 draws
    for token, p in enumerate(expected):
        assert (token in sums) == (p > 0)
        assert not p or sums[token] == [pytest.approx(math.log(p), abs=1e-5)]


def test_equal_probabilities_keep_exactly_top_k():
    assert set(one_token([0.25] * 4, top_k=2)[1]) == {0, 1}


def test_kept_tokens_are_those_of_transformers():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = 2 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    for top_k, top_p in [(1, 1.0), (5, 1.0), (0, 0.3), (0, 0.9), (0, 0.999), (8, 0.7), (50, 0.5)]:
        theirs = warpers.TopKLogitsWarper(top_k)(None, logits) if top_k else logits
        theirs = warpers.TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
        assert torch.equal(decoding._truncated(logits, top_k, top_p), theirs), (top_k, top_p)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"temperature": 0.0}, "temperature above 0"), ({"temperature": -1.0}, "temperature above 0")]
    + [(setting, "top_k >= 0") for setting in ({"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1})],
)
def test_impossible_samplers_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        one_token([0.5, 0.5], **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Result files


def test_results_come_back(tmp_path):
    captions = {42: 'a "dog" –\nand a café', "a.jpg": "", np.int64(7): "a cat"}
    programs.write_caption_results(tmp_path / "results.json", captions)
    rows = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert rows == [{"image_id": i, "caption": text} for i, text in captions.items()]
    assert score.read_caption_results(tmp_path / "results.json") == captions
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_results_that_cannot_be_written(tmp_path):
    for captions, message in (({}, "no captions"), ({1: "a", 2: None}, r"captions of \[2\] are not text")):
        with pytest.raises(UserError, match=message):
            programs.write_caption_results(tmp_path / "results.json", captions)
    with pytest.raises(UserError, match="a folder that exists"):
        programs.write_caption_results(tmp_path / "nowhere" / "results.json", {1: "a"})
    with pytest.raises(UserError, match="surrogates not allowed"):  # half a character, as JSON may bring
        programs.write_caption_results(tmp_path / "results.json", {1: "\ud800"})
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ('[{"image_id": "1", "caption": "a"}, {"image_id": 1, "caption": "b"}]', "image 1 has a caption already"),
        ('{"annotations": []}', "is not a result file"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 2}]', 'entry 1: it needs "image_id" and "caption"'),
        ('[{"image_id": [1], "caption": "a"}]', "entry 0: it needs"),
        ('["a dog"]', "entry 0: it needs"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "entry 1: image 1 has a caption"),
    ],
)
def test_files_that_are_no_results(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        score.read_caption_results(tmp_path / "results.json")
    with pytest.raises(UserError, match="cannot be read"):
        score.read_caption_results(tmp_path / "nothing.json")


def sentences(*texts):
    return [{"raw": text} for text in texts]


def test_references_of_both_forms(tmp_path):
    file = tmp_path / "references.json"
    rows = [(5, " A dog. "), (6, "a cat"), (5, "dogs")]
    coco = {"images": [], "annotations": [{"id": k, "image_id": i, "caption": t} for k, (i, t) in enumerate(rows)]}
    file.write_text(json.dumps(coco))
    assert score.read_caption_references(file) == {5: ["A dog.", "dogs"], 6: ["a cat"]}
    karpathy = [
        {"split": "test", "imgid": 0, "cocoid": 42, "sentences": sentences("A dog.", "dogs")},
        {"split": "val", "imgid": 1, "cocoid": 43, "sentences": sentences("a cat")},
        {"split": "test", "imgid": 2, "sentences": sentences("a cow")},
    ]
    file.write_text(json.dumps({"images": karpathy}))
    assert score.read_caption_references(file) == {42: ["A dog.", "dogs"], 2: ["a cow"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "neither of COCO's form nor of Karpathy's"),
        ({}, "neither of COCO's form nor of Karpathy's"),
        ({"annotations": [{"image_id": 1}]}, "neither of COCO's form"),
        ({"annotations": [{"image_id": 1, "caption": 2}]}, "neither of COCO's form"),
        ({"annotations": []}, "has no references"),
        ({"images": [{"split": "train"}]}, "has no references"),
    ],
)
def test_files_that_are_no_references(tmp_path, content, message):
    (tmp_path / "references.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        score.read_caption_references(tmp_path / "references.json")


# ---------------------------------------------------------------------------------------------------------------------
# The official programs

HYPS = {1: "a red dog runs", "b": "two cats"}
REFS = {1: ["A red dog is running.", "a dog"], "b": ["Two cats!", "cats, two of them"]}


@pytest.fixture
def official():
    """pycocoevalcap and Java: optional, so what needs them is skipped where one is absent."""
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    if not shutil.which("java"):
        pytest.skip("java is not on PATH")


def replace(monkeypatch, module, name, value):
    monkeypatch.setattr(importlib.import_module(f"pycocoevalcap.{module}"), name, value)


class Absent:
    """Stands for METEOR and SPICE where a test is of other things: a second instead of seven."""

    def __init__(self):
        raise FileNotFoundError("left out")


def test_official_scores_are_the_stored_ones(official, capfd):
    """The whole file, METEOR included; the stored values come from another run of the same programs."""
    data = json.loads((Path(__file__).parent / "golden" / "scenes_captions.json").read_text("utf-8"))
    stored = {name.replace("Bleu", "BLEU").replace("CIDEr", "CIDEr_D"): v for name, v in data["corpus"].items()}
    hyps = {image["image_id"]: image["hypothesis"] for image in data["images"]}
    refs = {image["image_id"]: image["references"] for image in data["images"]}
    metrics, notes = programs.official_caption_metrics(dict(reversed(hyps.items())), refs)
    meteor = metrics.pop("METEOR")
    metrics.pop("SPICE", None)
    assert metrics == pytest.approx({name: stored[name] for name in metrics}, abs=1e-9)
    assert len(metrics) == 6 and metrics == pytest.approx(scoring.caption_metrics(hyps, refs), abs=1e-6)
    assert 0.2 < meteor < metrics["ROUGE_L"]
    assert all(note.startswith("no SPICE") for note in notes)
    assert capfd.readouterr() == ("", ""), "the programs' chatter must not reach the user"
    print("heard")
    assert capfd.readouterr().out == "heard\n", "and ours must, afterwards"


def test_line_ends_inside_captions_shift_nothing(official, monkeypatch):
    for module, name in (("meteor.meteor", "Meteor"), ("spice.spice", "Spice")):
        replace(monkeypatch, module, name, Absent)
    clean, _ = programs.official_caption_metrics({**HYPS, "c": ""}, {**REFS, "c": ["a b", "x"]})
    ends = ("\n", "\r", "\u2028", "\x0b", "\x0c", "\x85", "\r\n", " \ud800 ")  # the last: half a character
    for end in ends:
        hyps = {1: f"a red{end}dog runs", "b": f"two{end}cats{end}", "c": end}
        refs = {**REFS, 1: [f"A red dog{end}is running.", f"{end}a dog"], "c": ["a b", f"x{end}"]}
        assert programs.official_caption_metrics(hyps, refs)[0] == clean, repr(end)


def test_what_is_absent_is_announced(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
        metrics, notes = programs.official_caption_metrics(HYPS, REFS)
        assert metrics == {} and len(notes) == 1 and "`pip install pycocoevalcap`" in notes[0]
    pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    metrics, notes = programs.official_caption_metrics(HYPS, REFS)
    assert metrics == {} and len(notes) == 1 and "`java` is not on PATH" in notes[0]


def test_a_tokenizer_that_fails_is_announced(official, monkeypatch, tmp_path):
    java = tmp_path / "java"  # as the stub of macOS: there, but no Java
    java.write_text("#!/bin/sh\necho no Java runtime present >&2\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    metrics, notes = programs.official_caption_metrics(HYPS, REFS)
    assert metrics == {} and len(notes) == 1 and "lost captions" in notes[0]

    def read_only(*_, **__):
        raise PermissionError("read-only folder")

    replace(monkeypatch, "tokenizer.ptbtokenizer", "tempfile", type("", (), {"NamedTemporaryFile": read_only}))
    metrics, notes = programs.official_caption_metrics(HYPS, REFS)
    assert metrics == {} and len(notes) == 1 and "read-only folder" in notes[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # METEOR's destructor closes its pipe
def test_programs_that_die_cost_only_their_own_number(official, monkeypatch, tmp_path):
    """METEOR's process ends at once, as without memory; its class would then wait for its own lock forever. SPICE has
    its models and fails."""
    for kind in ("", "-models"):
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / f"stanford-corenlp-3.6.0{kind}.jar").touch()
    replace(monkeypatch, "spice.spice", "__file__", str(tmp_path / "spice.py"))
    replace(monkeypatch, "spice.spice", "get_stanford_models", lambda: None)

    def fail(command, **_):
        raise subprocess.CalledProcessError(1, command[0])

    real = subprocess.Popen

    def popen(command, **options):
        return real(["false"] if "meteor-1.5.jar" in command else command, **options)

    monkeypatch.setattr(subprocess, "check_call", fail)
    monkeypatch.setattr(subprocess, "Popen", popen)
    metrics, notes = programs.official_caption_metrics(HYPS, REFS)
    assert list(metrics) == ["BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr_D"]
    assert [note.split(":")[0] for note in notes] == ["no METEOR", "no SPICE"]


def test_missing_spice_models_are_announced_with_the_command(official, monkeypatch, tmp_path):
    replace(monkeypatch, "meteor.meteor", "Meteor", Absent)
    replace(monkeypatch, "spice.spice", "Spice", Absent)  # its constructor would download
    replace(monkeypatch, "spice.spice", "__file__", str(tmp_path / "spice.py"))
    metrics, notes = programs.official_caption_metrics(HYPS, REFS)
    (note,) = [note for note in notes if note.startswith("no SPICE")]
    assert "SPICE" not in metrics and "models are missing" in note
    typed = note.split("`")[1].removeprefix('python -c "').removesuffix('"')  # must be Python, of names that exist
    calls = []
    replace(monkeypatch, "spice.get_stanford_models", "get_stanford_models", lambda: calls.append("fetched"))
    exec(typed, {})
    assert calls == ["fetched"]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_command_scores_a_result_file(extra, tmp_path, monkeypatch, capsys):
    """Real COCO captions: the first reference of each image plays the model, the others are its references."""
    folder = extra / "realdata" / "coco_mini"
    whole = score.read_caption_references(folder / "annotations" / "captions_val2017.json")
    assert score.read_caption_references(folder / "dataset_coco_mini.json").keys() == whole.keys()
    hyps, refs = {i: texts[0] for i, texts in whole.items()}, {i: texts[1:] for i, texts in whole.items()}
    programs.write_caption_results(tmp_path / "results.json", {str(i): text for i, text in hyps.items()})
    rows = [{"image_id": i, "caption": text} for i, texts in refs.items() for text in texts]
    (tmp_path / "references.json").write_text(json.dumps({"annotations": rows}))
    monkeypatch.setattr(programs, "official_caption_metrics", lambda *_: ({"METEOR": 0.25}, ["no SPICE: today"]))
    score.main(["captions", str(tmp_path / "results.json"), str(tmp_path / "references.json")])
    printed = capsys.readouterr().out
    assert "51 images, 204 references" in printed and "note: no SPICE: today" in printed
    cells = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line}
    ours = scoring.caption_metrics(hyps, refs)
    assert cells["METEOR"] == ["-", "0.250"]
    assert all(cells[name] == [f"{value:.3f}", "-"] for name, value in ours.items())
    assert 0.5 < ours["BLEU_1"] < 0.9, "one human against four others"


def test_command_as_users_type_it(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        score.main(["captions", "--help"])
    assert "results references" in capsys.readouterr().out
    command = [sys.executable, "tools/score.py", "captions", *[str(tmp_path / "none.json")] * 2]
    wrong = subprocess.run(command, cwd=Path(scoring.__file__).parent, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


def test_references_without_a_word_cost_only_the_official_numbers(official):
    """pycocoevalcap fails on them; a finished run must not fail with it."""
    metrics, notes = programs.official_caption_metrics({1: "a dog", 2: "a cat"}, {1: ["..."], 2: ["!"]})
    assert metrics == {} and len(notes) == 1 and "pycocoevalcap failed" in notes[0]
