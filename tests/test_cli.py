"""The program as a user meets it: whole runs at toy size, what they leave behind, what they say about mistakes.

Tests that take `paper` or `left` run for every paper; the others are VC-GPT's.
"""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import papers
import pytest
import torch
from papers import ROOT
from PIL import Image

import common
import vcgpt
from common import UserError
from tools import look_at_data

TOY = " ".join(papers.toy("vcgpt"))


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


@pytest.fixture(params=papers.PAPERS, scope="module")
def paper(request):
    return request.param


@pytest.fixture(scope="module")
def left(paper, tmp_path_factory):
    """What a toy run of any paper has left."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    papers.run(paper, *papers.toy(paper, "--out", folder))
    return folder


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

    def perfect(cfg, model, items, machine, beam, temperature=0.0):
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
    run("--caption", tmp_path / "grey.png", "--init", folder, "--max-new", 2, toy="")
    model.cfg.max_new = 2
    assert capsys.readouterr().out == f"{tmp_path / 'grey.png'}: {model.caption(tmp_path / 'grey.png')}\n" != lines[0]


def test_init_starts_from_the_weights_and_sizes_of_a_run(finished, tmp_path):
    folder, _ = finished
    toy = re.sub("--(width|steps|vision-width|fusion-layers) [0-9]+", "", TOY)
    run("--init", folder, "--lr", "1e-12", "--steps", 1, "--out", tmp_path / "b", toy=toy)
    old = common.read_tensors(folder / "best" / "model.safetensors")
    new = common.read_tensors(tmp_path / "b" / "last" / "model.safetensors")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["lm_steps"] == 0, "this GPT-2 can speak already"
    assert set(old) == set(new), "sizes come from the run"
    assert all(torch.allclose(old[k], new[k], atol=1e-6) for k in old)


def test_no_clipping_at_zero(paper, tmp_path):
    weights = []
    for clip in (0, 1e9):
        papers.run(paper, *papers.toy(paper, "--out", tmp_path / str(clip), "--grad-clip", clip, "--steps", 2))
        weights.append(common.read_tensors(tmp_path / str(clip) / "last" / "model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_accumulation_changes_nothing(tmp_path):
    """20 pairs at once, or cut into 5 and 5 and 5 and 5 (with different numbers of words): the same weights."""
    weights = []
    for micro in (0, 5):
        run("--out", tmp_path / str(micro), "--micro-batch", micro)
        weights.append(common.read_tensors(tmp_path / str(micro) / "last" / "model.safetensors"))
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=2e-4) for k in weights[0])


def test_eval_only_gives_the_numbers_of_the_run(finished, tmp_path, capsys):
    folder, _ = finished
    run("--eval-only", "--init", folder, "--out", tmp_path / "e", toy="")
    theirs, ours = (json.loads((f / "metrics.json").read_text())["splits"] for f in (folder, tmp_path / "e"))
    assert ours == theirs
    assert "caption_true" in capsys.readouterr().out and not list((tmp_path / "e").glob("step_*"))
    assert (folder / "captions_test.json").read_text() == (tmp_path / "e" / "captions_test.json").read_text()


def test_checkpoints_side_by_side(finished, tmp_path, capsys):
    folder, _ = finished
    run("--eval-only", folder, folder / "step_4", "--out", tmp_path / "e", "--test-scenes", 8, "--max-new", 5, toy="")
    said = capsys.readouterr().out
    assert re.search(rf"^test\n +{folder} +{folder / 'step_4'}\nBLEU_1 ", said, re.M)
    for name in ("1-toy-" + (folder / "best").resolve().name, "2-toy-step_4"):
        metrics = json.loads((tmp_path / "e" / name / "metrics.json").read_text())
        assert metrics["protocol"]["max_new"] == 5 and metrics["task"] == "pretrain"
        chosen = "best on val" if name.endswith((folder / "best").resolve().name) else "last"
        assert metrics["protocol"]["checkpoint"] == f"{name.split('-')[-1]}: {chosen}"
        assert json.loads((tmp_path / "e" / name / "config.json").read_text())["task"] == "eval"
        results = json.loads((tmp_path / "e" / name / "captions_test.json").read_text())
        assert sorted(r["image_id"] for r in results) == list(range(8))
        assert set(results[0]) == {"image_id", "caption"}


def test_samples_follow_from_the_seed(finished, tmp_path, capsys):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    model = vcgpt.VCGPT.from_run(str(finished[0]))
    model.cfg.temperature = 3.0
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append([model.caption(tmp_path / "red.png") for _ in range(3)])
    assert found[0] == found[1] != found[2] and len(set(found[0])) == 3
    model.cfg.top_k = 1  # the most probable token alone: greedy
    sampled = model.caption(tmp_path / "red.png")
    model.cfg.temperature = 0.0
    assert sampled == model.caption(tmp_path / "red.png", beam=1)
    for seed in (1, 1, 2):
        run("--caption", tmp_path / "red.png", "--init", finished[0], "--seed", seed, "--temperature", 3.0, toy="")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1] != lines[2]


def test_sampled_evaluations_repeat_themselves(finished, tmp_path):
    said = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--temperature", 1.0, "--top-p", 0.9, "--seed", seed, "--out", tmp_path / name)
        run("--eval-only", finished[0], *flags, toy="")
        said.append((tmp_path / name / "captions_test.json").read_text())
    assert said[0] == said[1] != said[2] != (finished[0] / "captions_test.json").read_text()


def test_evaluation_runs_in_the_dtype_that_was_asked_for(finished, tmp_path, monkeypatch):
    original, seen = vcgpt.generate, []
    monkeypatch.setattr(
        vcgpt, "generate", lambda *a: seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu")
                                                  else torch.float32) or original(*a))  # fmt: skip
    for dtype, wanted in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        run("--eval-only", finished[0], "--dtype", dtype, "--out", tmp_path / dtype, toy="")
        assert set(seen) == {wanted}
        seen.clear()
        protocol = json.loads((tmp_path / dtype / "metrics.json").read_text())["protocol"]
        assert protocol["dtype"] == str(wanted).split(".")[1]


def test_gradient_checkpointing_changes_nothing_but_memory(paper, tmp_path):
    weights = []
    for flag in ("--no-gradient-checkpointing", "--gradient-checkpointing"):
        papers.run(paper, *papers.toy(paper, "--out", tmp_path / flag, flag, "--dropout", 0.2, "--steps", 2))
        weights.append(common.read_tensors(tmp_path / flag / "last" / "model.safetensors"))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


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
        (["--task", "scst"], "add --init RUN"),
        (["--eval-only"], "--eval-only RUN, e.g. runs/vcgpt-scenes"),
        (["--eval-only", "nowhere"], "nowhere is not a run directory"),
        (["--eval-only", "nowhere", "--lr", "3"], "--lr has no meaning with --eval-only, which takes --init, --data"),
        (["--resume", "nowhere"], "nowhere is not a run directory"),
        (["--grad-clip", "inf"], "--grad-clip inf: give 0 or more, and a finite number"),
        (["--seed", "99999999999"], "--seed 99999999999: give less than 2^31"),
        (["--image-size", "0"], "give the side in pixels"),
        (["--temperature", "1", "--top-p", "0"], "--top-p 0.0: give 1 or less, and more than 0"),
        (["--resume", "nowhere", "--seed", "3"], "--seed has no meaning with --resume, which takes"),
        (["--resume", "nowhere", "--init", "nowhere"], "--init has no meaning with --resume"),
        (["--caption", "a.jpg", "--init", "nowhere", "--steps", "3"], "--steps has no meaning with --caption"),
        (["--top-k", "3"], "add --temperature"),
        (["--patch", "7"], "--image-size 64 --patch 7: the first must be a multiple of the second"),
        (["--vision-heads", "0"], "--vision-heads 0: give 1 or more"),
        (["--fusion-layers", "0"], "--fusion-layers 0: give 1 or more"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p 1.5: give 1 or less"),
        (["--dropout", "2"], "--dropout 2.0: give 0.99 or less"),
        (["--max-len", "64"], "--max-len 64: give 63 or less"),
        (["--max-new", "65"], "--max-new 65: give 64 or less"),
        (["--task", "scst", "--captions-per-image", "1"], "--baseline leave-one-out needs --captions-per-image 2"),
        (["--vision-width", "126", "--vision-heads", "3"], "need a multiple of 4"),
        (["--batch", "four"], "invalid int value: 'four'"),
        (["--micro-batch", "-3"], "--micro-batch"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(argv, told):
    with pytest.raises(UserError, match=re.escape(told)):
        run(*argv, toy="")


def test_mistakes_are_one_line_and_exit_status_2(paper):
    done = subprocess.run([sys.executable, f"{paper}.py", "--widht", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: unknown flag --widht; did you mean --width?\n"


def test_existing_out_is_not_overwritten(paper, left):
    before = (left / "metrics.json").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        papers.run(paper, *papers.toy(paper, "--out", left))
    assert (left / "metrics.json").read_bytes() == before


class Evil:
    """A pickle that would write a file where it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def of_another_model(path):
    path.write_text(re.sub('"model": "[a-z]+"', '"model": "another"', path.read_text()))


def with_code(path):
    path.write_bytes(pickle.dumps(Evil(str(path.parent / "pwned"))))


DAMAGES = {  # what happens to which file of a run -> what the program says, going on with it
    "truncated weights": ("last/model.safetensors", half, "cannot be read as plain tensors"),
    "another model": ("config.json", of_another_model, "is a run of another.py, not of "),
    "half a config": ("config.json", half, "config.json cannot be read"),
    "another config": ("config.json", lambda path: path.write_text("[]"), "is not the config of a run"),
    "no config": ("config.json", Path.unlink, "has no config.json, so the sizes of step_4 are unknown"),
    "truncated state": ("last/state.pt", half, "cannot be read as plain tensors"),
    "a pickle with code": ("last/state.pt", with_code, "nothing in it was run"),
    "no meta.json": ("last/meta.json", Path.unlink, "meta.json cannot be read"),
    "half a tokenizer": ("last/tokenizer.json", half, "tokenizer.json cannot be read"),
    "no tokenizer": ("last/tokenizer_meta.json", Path.unlink, "tokenizer_meta.json is missing"),
}


def test_a_moved_run_of_moved_data_goes_on(tmp_path):
    for place in ("old", "new"):
        (tmp_path / place).mkdir()
        mine = own_photographs(tmp_path / place)
    old = tmp_path / "old" / mine.name
    run("--data", old, "--preset", "tiny", "--out", tmp_path / "run", "--no-official", "--steps", 2)
    shutil.rmtree(tmp_path / "old")
    (tmp_path / "run").rename(tmp_path / "moved run")
    with pytest.raises(UserError, match="mine.jsonl cannot be read"):
        run("--resume", tmp_path / "moved run", toy="")
    with pytest.raises(UserError, match="--init"):
        run("--resume", tmp_path / "moved run", "--data", "scenes", toy="")
    run("--resume", tmp_path / "moved run", "--data", mine, "--no-official", toy="--workers 0 --device cpu")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_runs_are_named_and_left_alone(paper, left, tmp_path, case):
    name, damage, told = DAMAGES[case]
    shutil.copytree(left, tmp_path / "run", symlinks=True)
    damage(tmp_path / "run" / name)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=told + f"{paper}.py" * told.endswith(" not of ")):
        papers.run(paper, "--resume", tmp_path / "run", "--device", "cpu", "--workers", 0)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert not list(tmp_path.rglob("pwned"))


def test_weights_of_other_sizes(finished, tmp_path):
    with pytest.raises(UserError, match="holds another network than the flags describe:\n.*size mismatch"):
        run("--init", finished[0], "--mlp", 96, "--out", tmp_path / "r", toy=TOY.replace("--mlp 64", ""))


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
    run("--data", mine, "--preset", "tiny", "--out", tmp_path / "run", "--no-official")
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "CIDEr_D" in metrics["splits"]["test"]["metrics"] and "val" in said
    assert "caption_true" not in metrics["splits"]["test"]["metrics"]


def test_coco_mini_trains_and_evaluates_in_the_official_layout(extra, tmp_path, capsys):
    root = extra / "realdata" / "coco_mini"
    assert look_at_data.main(["check", "coco", "--root", str(root)]) == 0
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


def test_questions_are_no_captions(tmp_path):
    from test_benchmarks import write

    with pytest.raises(UserError, match="vqa has questions, no captions, which --task pretrain trains on"):
        run("--data", "vqa", "--root", write(tmp_path, "vqa"), "--out", tmp_path / "run")
    with pytest.raises(UserError, match="nlvr2 has questions"):  # before anything is looked for
        run("--data", "nlvr2", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nocaps_is_evaluated(tmp_path, finished):
    """Its validation set with the domains apart; of the hidden test only a result file. Nothing to train on."""
    from test_benchmarks import write

    root = write(tmp_path / "nocaps", "nocaps")
    vcgpt.main(["--eval-only", str(finished[0]), "--data", "nocaps", "--root", str(root), "--out", str(tmp_path / "e"),
                "--no-official", "--device", "cpu", "--workers", "0"])  # fmt: skip
    splits = json.loads((tmp_path / "e" / "metrics.json").read_text())["splits"]
    assert list(splits) == ["test", "test_in_domain", "test_near_domain", "test_out_domain"]
    rows = json.loads((tmp_path / "e" / "captions_server_test.json").read_text())
    assert [row["image_id"] for row in rows] == [0, 1]
    with pytest.raises(UserError, match="nocaps has no training split"):
        run("--data", "nocaps", "--root", root, "--out", tmp_path / "run")
