"""The program as a user meets it: whole runs at toy size, what they leave behind, what they say about mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import common
import vcgpt
from common import UserError

ROOT = Path(__file__).resolve().parent.parent
TOY = """--width 32 --heads 2 --mlp 64 --vision-width 32 --vision-heads 2 --fusion-layers 1 --lm-steps 2 --batch 20
    --train-scenes 40 --val-items 10 --test-scenes 12 --steps 4 --log-every 2 --workers 0 --max-new 12 --device cpu"""


def run(*argv, toy=TOY):
    vcgpt.main([*toy.split(), *map(str, argv)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A toy run on scenes, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    command = [sys.executable, "vcgpt.py", *TOY.split(), "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_what_the_documents_promise(finished):
    folder, said = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "log.jsonl", "metrics.json", "samples.png", "last", "best"} <= names
    assert (folder / "last").resolve().name == "step_4"
    assert {p.name for p in (folder / "last").iterdir()} >= {"model.safetensors", "meta.json", "state.pt"}
    metrics = json.loads((folder / "metrics.json").read_text())
    keys = "model data task command seed steps seconds params device versions protocol splits".split()
    assert list(metrics) == keys and metrics["model"] == "vcgpt" and metrics["steps"] == 4
    assert set(metrics["splits"]) == {"test", "test_compositional"}
    test = metrics["splits"]["test"]
    wanted = {"caption_true", "caption_unparsable", "caption_generality", "CIDEr_D", "ROUGE_L", "BLEU_1", "BLEU_4"}
    assert wanted <= set(test["metrics"]) and set(test["controls"]) == {"shuffled_images", "constant_caption"}
    assert "caption_true" in said and "of the captions are true" in said and "--caption PICTURE --init" in said
    assert re.search(r"step +4/4  loss \d", said)
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "lr" in r] == [2, 4]


def test_shuffled_control_scores_the_caption_of_another_picture(tmp_path, monkeypatch):
    """A captioner that is always right: all true, and hardly ever true of another scene."""

    def perfect(cfg, model, items, machine, beam):
        return {item.image_id: item.captions[0] for item in items}

    monkeypatch.setattr(vcgpt, "caption_all", perfect)
    run("--out", tmp_path / "run", "--test-scenes", 40)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["test"]
    assert test["metrics"]["caption_true"] == 1.0
    assert test["controls"]["shuffled_images"]["caption_true"] < 0.5
    assert test["controls"]["constant_caption"]["caption_true"] < 0.5


def test_captions_a_picture_of_the_user(finished, tmp_path, capsys):
    folder, _ = finished
    Image.new("L", (50, 20), 128).save(tmp_path / "grey.png")
    run("--caption", tmp_path / "grey.png", tmp_path / "grey.png", "--init", folder, toy="")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith(f"{tmp_path / 'grey.png'}: ")
    model = vcgpt.VCGPT.from_run(str(folder))
    assert lines[0].endswith(model.caption(tmp_path / "grey.png"))


def test_init_starts_from_the_weights_and_sizes_of_a_run(finished, tmp_path):
    folder, _ = finished
    toy = re.sub("--(width|steps|vision-width|fusion-layers) [0-9]+", "", TOY)
    run("--init", folder, "--lr", "1e-12", "--steps", 1, "--out", tmp_path / "b", toy=toy)
    old = common.read_tensors(folder / "best" / "model.safetensors")
    new = common.read_tensors(tmp_path / "b" / "last" / "model.safetensors")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["lm_steps"] == 0, "this GPT-2 can speak already"
    assert set(old) == set(new), "sizes come from the run"
    assert all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)


def test_resume_goes_on_with_the_same_numbers(tmp_path):
    """Four steps at once, or two steps, a stop and two more: the same weights, bit for bit."""
    run("--out", tmp_path / "whole", "--eval-every", 2)
    stopped = tmp_path / "stopped"
    original = vcgpt.validate_and_save

    def stop_after_two(*args):
        best = original(*args)
        if args[7] == 2:
            raise KeyboardInterrupt
        return best

    vcgpt.validate_and_save = stop_after_two
    try:
        with pytest.raises(KeyboardInterrupt):
            run("--out", stopped, "--eval-every", 2)
    finally:
        vcgpt.validate_and_save = original
    assert (stopped / "last").resolve().name == "step_2"
    run("--resume", stopped, toy="")
    whole, resumed = (common.read_tensors(tmp_path / r / "step_4" / "model.safetensors") for r in ("whole", "stopped"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_accumulation_changes_nothing(tmp_path):
    """20 pairs at once, or cut into 5 and 5 and 5 and 5 (with different numbers of words): the same weights."""
    weights = []
    for micro in (0, 5):
        run("--out", tmp_path / str(micro), "--micro-batch", micro)
        weights.append(common.read_tensors(tmp_path / str(micro) / "last" / "model.safetensors"))
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=2e-4) for k in weights[0])


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--widht", "3"], "did you mean --width"),
        (["--task", "captoin"], "did you mean caption"),
        (["--variant", "vgpt"], "did you mean vcgpt"),
        (["--caption", "a.jpg"], "add --init RUN"),
        (["--init", "nowhere"], "nowhere is not a run directory"),
        (["--steps", "3", "--epochs", "2"], "contradict"),
        (["--data", "coco", "--root", "nowhere"], "nowhere"),
        (["--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv, told):
    done = subprocess.run([sys.executable, "vcgpt.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_existing_out_is_not_overwritten(finished):
    before = (finished[0] / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        run("--out", finished[0])
    assert (finished[0] / "metrics.json").read_bytes() == before


def own_photographs(folder, n=12):
    lines = []
    for i in range(n):
        Image.new("RGB", (40, 30), (20 * i, 255 - 20 * i, 90)).save(folder / f"{i}.jpg")
        split = "train" if i else "test"
        lines.append(json.dumps({"image": f"{i}.jpg", "caption": f"colour number {i}", "split": split}))
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder / "mine.jsonl"


def test_own_photographs_end_to_end(tmp_path, capsys):
    mine = own_photographs(tmp_path)
    run("--data", mine, "--preset", "tiny", "--out", tmp_path / "run")
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "CIDEr_D" in metrics["splits"]["test"]["metrics"] and "val" in said
    assert "caption_true" not in metrics["splits"]["test"]["metrics"]


def test_coco_mini_trains_and_evaluates_in_the_official_layout(extra, tmp_path, capsys):
    import data

    root = extra / "realdata" / "coco_mini"
    assert data.main(["check", "coco", "--root", str(root)]) == 0
    run("--data", "coco", "--root", root, "--preset", "tiny", "--out", tmp_path / "run", "--steps", 3)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["test"]
    assert test["metrics"]["BLEU_1"] > 0 and (tmp_path / "run" / "samples.png").exists()


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    """The same global batch on two gloo processes: the same loss to rounding, captions for the exact set."""
    outs = []
    for n in (1, 2):
        out = tmp_path / f"on{n}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", "vcgpt.py"]
        done = subprocess.run([*command, *TOY.split(), "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outs.append(out)
    weights = [common.read_tensors(out / "last" / "model.safetensors") for out in outs]
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=2e-4) for k in weights[0])
    losses = [[json.loads(line).get("loss") for line in (out / "log.jsonl").read_text().splitlines()] for out in outs]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    splits = [json.loads((out / "metrics.json").read_text())["splits"]["test"]["metrics"] for out in outs]
    assert splits[0] == pytest.approx(splits[1], abs=0.02)


@pytest.mark.slow
def test_the_main_job_sees(tmp_path):
    """`python vcgpt.py` as README gives it: most captions true, hardly any with shuffled pictures, CIDEr-D thrice."""
    vcgpt.main(["--out", str(tmp_path / "run"), "--device", "cpu"])
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["splits"]["test"]
    shuffled = test["controls"]["shuffled_images"]
    assert test["metrics"]["caption_true"] >= 0.60 and shuffled["caption_true"] <= 0.15
    assert test["metrics"]["CIDEr_D"] >= 3 * shuffled["CIDEr_D"]
