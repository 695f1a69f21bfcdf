"""bench/: the step that is timed is the step of training, and the driver of the tables stops, goes on and reports."""

import importlib.util
import json
import math
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from papers import ROOT, run, toy
from test_stop import kill_after

import common
import tden
from tools import finish


def load(name):
    """bench/`name`.py under a name that hides no model file."""
    if str(ROOT / "bench") not in sys.path:
        sys.path.append(str(ROOT / "bench"))  # for timing.py; last, so that it hides nothing
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses ask for it there
    spec.loader.exec_module(module)
    return module


bench, tables = load("tden"), load("tables")
CPU = common.Machine(torch.device("cpu"), torch.float32, 0, 1, 0, "")

# ---------------------------------------------------------------------------------------------------------------------
# bench/tden.py


def spy(monkeypatch, owner, name):
    """[(arguments, result)] of each call, arguments and results copied."""
    calls, original = [], getattr(owner, name)

    def spied(*args, **named):
        before = deepcopy(args[1:])  # the first may be an object with open files
        result = original(*args, **named)
        calls.append(((args[0], *before), deepcopy(result)))
        return result

    monkeypatch.setattr(owner, name, spied)
    return calls


@pytest.mark.parametrize("flags", ["--ss-mode sample", "--passes 1", "--no-two-updates --grad-clip 0"])
def test_the_step_that_is_timed_is_that_of_training(flags, tmp_path, monkeypatch):
    """From the same weights, batch and luck: the same losses, and the same weights after it, to the last bit."""
    built, made, logged = (spy(monkeypatch, owner, name) for owner, name in
                           ((tden, "build"), (tden, "rows_of"), (common.Logger, "step")))  # fmt: skip
    monkeypatch.setattr(tden, "final_evaluation", lambda *_: {})
    monkeypatch.setattr(finish, "tell", lambda *_: None)
    more = "--steps 1 --log-every 1 --dropout 0.1 --val-items 4 --test-scenes 4 --task pretrain".split()
    run("tden", *toy("tden", *more, *flags.split(), "--out", tmp_path / "run"))
    (model, cfg), ((batch, *_), rows), losses = (built[0][1], built[0][0][0]), made[0], logged[0][0][2]
    optimizer = common.adamw(model, lambda name: cfg.lr, cfg.weight_decay, (0.9, cfg.beta2), all_matrices=True)
    torch.manual_seed(cfg.seed + 2**31)  # as the loop does for dropout
    found = bench.train_step(cfg, model.train(), optimizer, rows, CPU)
    assert found.keys() == losses.keys() and all(torch.equal(found[name], losses[name]) for name in found)
    after = common.read_tensors(tmp_path / "run" / "step_1" / "model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in model.state_dict().items())
    # and made-up batches are like the loader's
    pairs = bench.random_pairs(cfg, 3, 5, 7, torch.Generator().manual_seed(0))
    kinds = [{k: (x.dtype, x.ndim) for k, x in b.items() if isinstance(x, torch.Tensor)} for b in (batch, pairs)]
    assert kinds[1].items() <= kinds[0].items() and {"ids", "targets", "regions_classes"} <= kinds[1].keys()
    keep = tden.corrupt(pairs, bench.SPECIAL, cfg, torch.Generator().manual_seed(0))["keep_mask"]
    assert keep.all() and keep.shape == (3, 8), "seven tokens and what begins them"


# ---------------------------------------------------------------------------------------------------------------------
# bench/tables.py


def test_the_plan_of_tden_holds_together(tmp_path):
    """Flags are those of tden.py (`planned` looks), and runs start from a run of the same seed."""
    runs = tables.planned("tden", tmp_path, 1.0)
    assert len(runs) == 44 and not any(tmp_path.iterdir())
    starts = {run.name: run.start for run in runs.values() if run.start}
    assert len(starts) == 20 and all(start in runs and start[-1] == name[-1] for name, start in starts.items())
    one, two = (runs[f"pretrain-{name}-0"].words for name in ("one-pass", "two-passes"))
    assert one == ("--task", "pretrain", "--steps", "1200", "--seed", "0", "--passes", "1") and two[3] == "600"


@pytest.fixture
def toy_plan(monkeypatch):
    """Two pre-trainings and two runs of captioning, in this process; the list of commands that were started."""
    size = " ".join(toy("tden", "--val-items", 4, "--test-scenes", 4)).replace("--steps 4 ", "")
    rows = (tables.Row("two passes", size), tables.Row("one pass", f"{size} --passes 1", steps=2))
    later = (tables.Row("from scratch", size), tables.Row("after two passes", size, start="two passes"))
    plan = (tables.Table("pretrain", 4, "R@1 CIDEr_D", rows), tables.Table("caption", 2, "BLEU_1", later))
    monkeypatch.setattr(tables, "PLANS", {"tden": plan})
    monkeypatch.setattr(tables, "SEEDS", (0,))
    monkeypatch.setattr(finish, "curves", lambda *_: "no curves here")
    started = []

    def start(paper, words, log, jobs):
        started.append(words)
        try:
            run(paper, *words)
        except common.Stopped:
            pass
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(tables, "start", start)
    return started


def test_tables_skip_resume_start_anew_and_report(toy_plan, tmp_path, monkeypatch, capsys):
    out, scratch = tmp_path / "out", "caption-from-scratch-0"
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(common.UserError, match="4 of 4 .*caption-after-two-passes-0 .waits"):
            tables.main(["tden", "--out", str(out)])
    assert [words[-1] for words in toy_plan] == [str(out / name) for name in
                                                 ("pretrain-two-passes-0", "pretrain-one-pass-0", scratch)]  # fmt: skip
    for file in (out / scratch).glob("step_*/model.safetensors"):  # as if it had not come so far
        file.unlink()
    (out / scratch / "left-over").touch()
    capsys.readouterr()
    tables.main(["tden", "--out", str(out), "--list"])
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == ["stopped", "stopped", "broken", "left", "0"], said

    toy_plan.clear()
    tables.main(["tden", "--out", str(out)])
    assert [words[0] for words in toy_plan] == ["--resume", "--resume", "--task", "--task"]
    assert toy_plan[0][1] == str(out / "pretrain-two-passes-0") == toy_plan[3][toy_plan[3].index("--init") + 1]
    assert not (out / scratch / "left-over").exists()
    said = capsys.readouterr().out
    for title, name, key in (("one pass", "pretrain-one-pass-0", "CIDEr_D"), ("from scratch", scratch, "BLEU_1")):
        test = common.read_json(out / name / "metrics.json")["splits"]["test"]
        row = next(line for line in said.splitlines() if line.startswith(f"| {title} |"))
        numbers = f"| {test['metrics'][key]:.3f} | {test['controls']['shuffled_images'][key]:.3f} |"
        assert numbers in row, (numbers, row)
    assert "- one pass: `python tden.py --task pretrain --steps 8 --seed S" in said

    toy_plan.clear()
    tables.main(["tden", "--out", str(out)])
    assert not toy_plan, "what is finished is skipped"
    assert capsys.readouterr().out in said, "and reported as before"
    with pytest.raises(common.UserError, match="steps 4 instead of 2"):
        tables.main(["tden", "--out", str(out), "--steps-scale", "0.5"])


def test_ctrl_c_ends_the_programs_and_waits_for_them(toy_plan, tmp_path, monkeypatch):
    heard = []

    def poll():
        raise KeyboardInterrupt

    program = SimpleNamespace(poll=poll, terminate=lambda: heard.append("end"), wait=lambda: heard.append("wait"))
    monkeypatch.setattr(tables, "start", lambda *_: program)
    with pytest.raises(common.Stopped, match="the same command goes on"):
        tables.main(["tden", "--out", str(tmp_path / "out"), "--jobs", "2"])
    assert heard == ["end", "end", "wait", "wait"]


def test_the_step_of_soho_is_the_one_that_trains(tmp_path, monkeypatch):
    """What bench/soho.py times gives the losses of a step, and the ResNet is frozen where it says so."""
    import soho

    timed = load("soho")
    cfg = timed.config("tiny", cnn_width=4, width=16, heads=2, mlp=32, vocab_size=50, codes=8)
    model, luck = soho.SOHO(cfg), torch.Generator().manual_seed(0)
    rows = soho.corrupt(timed.random_batch(cfg, 4, luck), timed.SPECIAL, cfg, luck)
    assert rows["pixels"].shape == (4, 3, 64, 64) and rows["ids"].shape == (4, timed.TOKENS) and rows["keep_mask"].all()
    twin = deepcopy(model).train()
    expected = {name: loss.item() for name, loss in soho.losses(cfg, twin(rows), rows).items()}
    found = timed.train_step(cfg, model, model, soho.Optimizers(cfg, model), rows, CPU)
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected)
    timed.train_step(timed.config("tiny", freeze_cnn=1.0), model, model, soho.Optimizers(cfg, model), rows, CPU)
    assert model.cnn.is_frozen and not model.cnn.bn1.training


# ---------------------------------------------------------------------------------------------------------------------
# bench/vilta.py and the first look at its runs


@pytest.mark.parametrize("arm", ["baseline", "cd+hn"])
def test_the_step_of_vilta_is_that_of_training(arm, tmp_path, monkeypatch):
    """From the same weights, batch and luck: the same losses, and the same weights after it, to the last bit."""
    import vilta

    timed = load("vilta")
    built, made, logged = (spy(monkeypatch, owner, name) for owner, name in
                           ((vilta, "build"), (vilta, "rows_of"), (common.Logger, "step")))  # fmt: skip
    monkeypatch.setattr(vilta, "final_evaluation", lambda *_: {})
    monkeypatch.setattr(finish, "tell", lambda *_: None)
    more = f"--arm {arm} --start-steps 0 --steps 1 --log-every 1 --dropout 0.1 --val-items 4 --test-scenes 4".split()
    run("vilta", *toy("vilta", *more, "--out", tmp_path / "run"))
    (model, cfg), ((batch, *_), rows), losses = (built[0][1], built[0][0][0]), made[0], logged[0][0][2]
    optimizer = vilta.make_optimizer(cfg, model)
    torch.manual_seed(cfg.seed + 2**31)  # as the loop does for dropout
    model.cfg = None  # the step brings its own: the arms take turns with one model
    found = timed.train_step(cfg, model, optimizer, rows, CPU)
    assert found.keys() == {"mlm", "itm", *(("gen",) if arm == "cd+hn" else ())} <= losses.keys()
    assert all(torch.equal(x, losses[name]) for name, x in found.items())
    after = common.read_tensors(tmp_path / "run" / "step_1" / "model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in model.state_dict().items())
    # and made-up batches are like the loader's, and something is written
    tok = timed.tokenizer()
    cfg = timed.config("tiny", arm=arm, vocab_size=tok.vocab_size + 100, width=32, vision_width=32, text_width=32)
    pairs = timed.random_batch(cfg, tok, 4, torch.Generator().manual_seed(0))
    kinds = [{k: (x.dtype, x.ndim) for k, x in b.items() if isinstance(x, torch.Tensor)} for b in (batch, pairs)]
    assert kinds[0] == kinds[1] and batch.keys() == pairs.keys()
    small = vilta.ViLTA(cfg, tok)
    rows = vilta.rows_of(pairs, tok, cfg, torch.Generator().manual_seed(2))
    assert rows["ids"].shape == (4, 32) and rows["keep_mask"].all(), "of 50 tokens as many as the preset takes"
    written = vilta.write_negatives(small.eval(), rows)
    assert (written["kinds"] == vilta.WRITTEN).sum() == (arm == "cd+hn")


def test_two_pairs_would_not_be_the_whole_method():
    with pytest.raises(common.UserError, match="none of the pairs is a written negative.*give 2 or more"):
        load("vilta").main("--sizes tiny --batch 1 --device cpu".split())


@pytest.mark.parametrize("points, level, value", [
    ([(0.2, 0.1), (0.4, 0.3)], 0.25, 0.15),  # a quarter of the way
    ([(0.2, 0.1), (0.4, 0.3)], 0.4, 0.3),  # at its end
    ([(0.2, 0.1), (0.6, 0.3), (0.3, 0.5), (0.7, 0.9)], 0.5, 0.7),  # the last time: half of the way from 0.3 to 0.7
    ([(0.2, 0.1), (0.6, 0.3), (0.5, 0.7)], 0.55, 0.5),  # downwards too
    ([(0.2, 0.1), (0.2, 0.4)], 0.2, 0.4),  # equal: the later
    ([(0.2, 0.1), (0.49, 0.3)], 0.5, 0.3),  # never there, a point away
    ([(0.2, 0.1), (0.48, 0.3)], 0.5, None),  # two points away
    ([(0.51, 0.1), (0.6, 0.3)], 0.5, 0.1),  # above from the start, a point away
    ([(0.52, 0.1), (0.6, 0.3)], 0.5, None),
    ([(0.49, 0.1), (0.49, 0.2)], 0.5, 0.2),  # equally near: the later
    ([(0.5, 0.1)], 0.5, 0.1), ([], 0.5, None),
])  # fmt: skip
def test_a_value_at_equal_accuracy(points, level, value):
    found = tables.at_level(points, level, 0.01)
    assert found is None if value is None else math.isclose(found, value)


def test_the_share_of_steps_that_is_needed():
    points = [(10, 0.4), (20, 0.6), (30, 0.5), (40, 0.7)]
    assert [tables.share_needed(points, goal, 40) for goal in (0.4, 0.5, 0.6, 0.65)] == [0.25, 0.5, 0.5, 1.0]
    assert tables.share_needed(points, 0.71, 40) is None and tables.share_needed(points, 0.7, 20) == 2.0


def evaluations(*rows):
    """log.jsonl of a run: among its training records (mlm_accuracy, mlm_synonyms, itm, edited) of every tenth step."""
    names = ("mlm_accuracy", "mlm_synonyms", "itm_accuracy", "itm_accuracy_edited")
    return [record for i, row in enumerate(rows, 1) for record in
            ({"step": 10 * i, "mlm": 1.0, "lr": 0.1},
             {"step": 10 * i, **{f"val_{name}": x for name, x in zip(names, row, strict=True)}})]  # fmt: skip


BASELINE = evaluations((0.2, 0.1, 0.5, 0.5), (0.3, 0.2, 0.8, 0.5), (0.6, 0.2, 0.7, 0.5), (0.5, 0.3, 0.75, 0.55))
FASTER = evaluations((0.4, 0.4, 0.75, 0.5), (0.6, 0.5, 0.8, 0.54), (0.7, 0.3, 0.9, 0.5), (0.8, 0.3, 0.9, 0.5))


def test_an_arm_beside_the_baseline():
    assert tables.curve(BASELINE, "itm_accuracy")[1:3] == [(20, 0.8), (30, 0.7)]
    assert tables.compare_runs(FASTER, BASELINE) == ["0.450", "0.300", "0.25", "> 1.00"]
    assert tables.compare_runs(BASELINE, BASELINE) == ["0.300", "0.300", "0.50", "1.00"]
    assert tables.compare_runs(evaluations((0.1, 0.1, 0.1, 0.6)), BASELINE) == ["-", "0.300", "> 1.00", "0.25"]


def test_the_plan_of_vilta_and_its_first_look(tmp_path, monkeypatch):
    """Below the first table alone, seed by seed; a dash where the run or the baseline of its seed is not finished."""
    runs = tables.planned("vilta", tmp_path, 1.0)
    assert len(runs) == 8 and not any(run.start for run in runs.values())
    words = "--task pretrain --steps 640 --seed 1 --arm cd+hn --start-steps 400 --eval-every 40 --val-items 250"
    assert runs["pretrain-cd+hn-1"].words == tuple(words.split())
    for name, log in (("baseline-0", BASELINE), ("cd-0", FASTER), ("cd-1", FASTER), ("hn-0", FASTER)):
        (tmp_path / f"pretrain-{name}").mkdir()
        (tmp_path / f"pretrain-{name}" / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"step"')
    done = ("pretrain-baseline-0", "pretrain-cd-0", "pretrain-cd-1")
    monkeypatch.setattr(tables.Planned, "state", lambda run: "done" if run.name in done else "stopped")
    (table,) = tables.PLANS["vilta"]
    lines = tables.first_look(table, runs)
    assert lines[0].startswith("A first look, no test") and lines[2].count("|") == lines[3].count("|") == 6
    assert lines[4:] == [
        "| baseline | 0.300 / - | 0.300 / - | 0.50 / - | 1.00 / - |",
        "| cd | 0.450 / - | 0.300 / - | 0.25 / - | > 1.00 / - |",
        "| hn | - / - | - / - | - / - | - / - |", "| cd+hn | - / - | - / - | - / - | - / - |", ""]  # fmt: skip
    metrics = {"splits": {"test": {"metrics": {"itm_accuracy": 0.5}, "controls": {}}}, "params": 3, "seconds": 60,
               "device": "cpu", "versions": {"torch": "2"}, "protocol": {"dtype": "float32", "best_by": "itm_accuracy"}}
    monkeypatch.setattr(tables.Planned, "metrics", lambda run: metrics if run.name in done else None)
    said = tables.report("vilta", runs, tmp_path, 1.0).split("\n")
    assert said[-len(lines) :] == lines and said[0] == "### vilta, pretrain"
    assert "| cd | 0.500 / 0.500 | - / - | - / - |" in "\n".join(said)
    monkeypatch.setattr(tables, "LOOKS", {})
    assert tables.report("vilta", runs, tmp_path, 1.0).split("\n") == said[: -len(lines)]
