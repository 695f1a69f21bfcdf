"""Self-critical training: what is sampled, what it is worth, and that the reward rises."""

import json

import numpy as np
import pytest
import torch
from test_cli import TOY, finished, run  # noqa: F401  (a finished toy run)
from test_vcgpt import Letters, inputs, network

import common
import vcgpt
from common import UserError

MACHINE = common.Machine(torch.device("cpu"), torch.float32, 0, 1, 0, "test")


class Word:
    """A reward that remembers what it was asked: the number of a's in a caption, minus `fine` if it was cut off."""

    def __init__(self, fine=1.0):
        self.fine = fine

    def reward(self, image_ids, texts, ended):
        self.asked = list(zip(image_ids, texts, ended, strict=True))
        return np.array([t.count("a") - self.fine * (not e) for t, e in zip(texts, ended, strict=True)])


def batch_of(B=3):
    return {"pixels": inputs(B=B)[0], "image_id": [f"p{b}" for b in range(B)]}


def sampled(step=0, **changes):
    model = network(init_std=0.3, captions_per_image=4, max_new=6, vocab_size=4, **changes)
    model.tokenizer, cider = Letters(), Word()
    samples, sums = vcgpt.sample_captions(model.cfg, model, batch_of(), cider, MACHINE, step)
    return model, cider, samples, sums


def test_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, 3.0]])
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    by_hand = -(2.0 * np.log(p[0, 1]) + -0.5 * np.log(p[1, 0])) / 2
    found = vcgpt.loss_scst(logits, torch.tensor([1, 0]), torch.tensor([2.0, -0.5]))
    assert found.item() == pytest.approx(by_hand, abs=1e-6)


def test_samples_are_in_the_loaders_form():
    """ids begin with bos, targets end with the first end token, and a caption that was cut off has none to predict."""
    _, cider, samples, sums = sampled()
    ids, targets = samples["ids"], samples["targets"]
    assert ids.shape == targets.shape and len(ids) == 12
    cut = 0
    for row_ids, row, (_, text, ended) in zip(ids.tolist(), targets.tolist(), cider.asked, strict=True):
        real = [t for t in row if t != -100]
        assert row_ids[: len(real)] == [0, *real[:-1]] and row[len(real) :] == [-100] * (len(row) - len(real))
        assert ended == (real[-1] == 0) and (0 not in real[:-1])
        assert text == Letters().decode(real) and (ended or len(real) == 6)
        cut += not ended
    assert 0 < cut < 12, "the test needs both kinds"
    assert sums["truncated"] == cut and sums["length"] == (targets != -100).sum()
    assert sums["reward"] == pytest.approx(sum(Word().reward(*zip(*cider.asked, strict=True))))


def test_four_samples_a_picture_and_each_against_the_other_three():
    _, cider, samples, _ = sampled()
    assert [i for i, *_ in cider.asked] == ["p0"] * 4 + ["p1"] * 4 + ["p2"] * 4
    r = Word().reward(*zip(*cider.asked, strict=True)).reshape(3, 4)
    by_hand = [[r[b, i] - np.mean(np.delete(r[b], i)) for i in range(4)] for b in range(3)]
    np.testing.assert_allclose(samples["advantages"].view(3, 4).numpy(), by_hand, atol=1e-6)


def test_the_greedy_baseline_is_the_greedy_captions_reward():
    model, cider, samples, _ = sampled(baseline="greedy")
    ids, texts, ended = zip(*cider.asked, strict=True)  # asked last: the greedy captions
    assert list(ids) == ["p0", "p1", "p2"] and list(texts) == vcgpt.generate(model, batch_of()["pixels"])
    b = Word().reward(ids, texts, ended)
    _, other, plain, sums = sampled()
    r = Word().reward(*zip(*other.asked, strict=True)).reshape(3, 4)
    np.testing.assert_allclose(samples["advantages"].view(3, 4).numpy(), r - b[:, None], atol=1e-6)


@torch.no_grad()
def test_the_step_scores_the_policy_that_sampled(monkeypatch):
    """log p of the samples in the teacher-forced step = log p that the sampler counted, dropout set and all."""
    drawn, original = [], vcgpt.decoding.sample
    monkeypatch.setattr(vcgpt.decoding, "sample", lambda *a: drawn.append(original(*a)) or drawn[-1])
    model, _, samples, _ = sampled(dropout=0.5)
    targets = samples["targets"]
    log_p = model(batch_of()["pixels"], samples["ids"]).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])
    again = log_p[..., 0].masked_fill(targets == -100, 0.0).sum(1)
    torch.testing.assert_close(again, drawn[0][1], atol=1e-4, rtol=1e-4)


def test_samples_follow_from_the_step():
    a, b, c = (sampled(step)[2]["targets"] for step in (0, 0, 1))
    assert torch.equal(a, b) and (a.shape != c.shape or not torch.equal(a, c))


@pytest.mark.parametrize("baseline", ["leave-one-out", "greedy"])
def test_the_reward_rises(baseline):
    model = network(captions_per_image=4, max_new=6, vocab_size=8, baseline=baseline)
    model.tokenizer, cider, means = Letters(), Word(fine=0.0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        samples, sums = vcgpt.sample_captions(model.cfg, model, batch_of(), cider, MACHINE, step)
        is_real = samples["targets"] != -100
        logits = model(batch_of()["pixels"], samples["ids"], samples["targets"])
        weights = samples["advantages"][:, None].expand_as(is_real)[is_real]
        vcgpt.loss_scst(logits, samples["targets"][is_real], weights).backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(sums["reward"]) / 12)
    assert np.mean(means[-5:]) > np.mean(means[:5]) + 2, means


def test_from_a_finished_run(finished, tmp_path):  # noqa: F811
    folder, _ = finished
    toy = TOY.replace("--lm-steps 2", "")
    run("--task", "scst", "--init", folder, "--out", tmp_path / "r", "--dropout", 0.3, toy=toy)
    records = [json.loads(line) for line in (tmp_path / "r" / "log.jsonl").read_text().splitlines()]
    trained = [r for r in records if "reward" in r]
    assert len(trained) == 2 and all(0 <= r["truncated"] <= 1 and 1 <= r["length"] <= 12 for r in trained)
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["task"] == "scst"
    old, new = (common.read_tensors(p / "model.safetensors") for p in (folder / "best", tmp_path / "r" / "last"))
    assert all(torch.allclose(old[k], new[k], atol=2e-3) for k in old), "it starts from the run's weights"


@pytest.mark.parametrize("flag, values, tolerance", [("--micro-batch", (0, 5), 2e-5), ("--dropout", (0.0, 0.5), 0)])
def test_neither_accumulation_nor_dropout_changes_a_step(finished, tmp_path, flag, values, tolerance):  # noqa: F811
    """A step may be cut into pieces; and dropout is off in it, not only while sampling."""
    weights = []
    for value in values:
        out = tmp_path / str(value)
        run("--task", "scst", "--init", finished[0], "--out", out, flag, value, "--steps", 2, toy=TOY)
        weights.append(common.read_tensors(out / "last" / "model.safetensors"))
    assert all(torch.allclose(weights[0][k], weights[1][k], atol=tolerance, rtol=0) for k in weights[0])


def test_it_needs_a_trained_model(tmp_path):
    with pytest.raises(UserError, match="--init RUN"):
        run("--task", "scst", "--out", tmp_path / "r")
