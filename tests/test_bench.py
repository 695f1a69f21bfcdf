"""bench/: the step that is timed is the step of training, and the driver of the tables stops, goes on and reports."""

import importlib.util
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
