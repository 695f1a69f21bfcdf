"""What must hold for TDEN beyond its reference tensors: losses by hand, information flow, corruption, the two passes,
gradients, decoding, loading, whole runs.
"""

import copy
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import papers
import pytest
import torch
import torch.nn.functional as F
from papers import ROOT
from PIL import Image

import common
import data
import decoding
import language
import regions
import tden
import weights
from common import UserError
from tools import export

V, C, D_IN, NOTHING = 37, 5, 6, tden.NOTHING
TOK = SimpleNamespace(pad=0, bos=1, eos=2, mask=3)


pytestmark = pytest.mark.usefixtures("one_thread")


LOSSES = {"pretrain": ["mlm", "msg", "moc", "ism"], "retrieval": ["ism"], "vqa": ["u", "g"], "vcr": ["choice"],
          "caption": ["caption"], "scst": ["scst"]}  # fmt: skip
DECOUPLED = [(task, True) for task in tden.TASKS] + [(task, False) for task in ("pretrain", "vqa", "vcr", "caption")]


def tiny(task="pretrain", **changes):
    settings = dict(
        task=task, width=16, heads=2, mlp=24, object_layers=2, sentence_layers=2, cross_layers=2, positions=24,
        pooled=12, vocab_size=V, feature_dim=D_IN, region_classes=C, dropout=0.0, init_std=0.3, max_len=12,
        max_regions=6,
    )  # fmt: skip
    return tden.Config(**{**settings, **changes})


def network(task="pretrain", seed=0, **changes):
    torch.manual_seed(seed)
    return tden.TDEN(tiny(task, **changes), answers=tuple("abcdefg") if task == "vqa" else ()).eval()


def loaded(task="pretrain", B=3, k=1, seed=1, numbers=(5, 3, 4, 5, 2)):
    """A loader's batch: regions of B pictures, of several numbers, and their texts, of several lengths."""
    rng = np.random.default_rng(seed)

    def seen(n):
        low = rng.uniform(0, 60, (n, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 40, (n, 2))], 1).astype(np.float32)
        classes = rng.dirichlet(np.ones(C), n).astype(np.float32)
        return data.Regions(rng.normal(size=(n, D_IN)).astype(np.float32), boxes, (100, 100), classes)

    def text(n):
        return rng.integers(4, V, n).tolist()

    batch = {"image_id": [f"p{b}" for b in range(B)], "bad": []}
    batch |= data.pad_regions([seen(numbers[b]) for b in range(B)])
    if task == "vqa":
        soft = torch.zeros(B, 7).index_put((torch.arange(B), torch.arange(B)), torch.tensor(0.9))
        return batch | data.pad_texts([[text(3 + b)] for b in range(B)], 1, 2, 0) | {"targets": soft}
    if task == "vcr":
        batch |= data.pad_regions([seen(1 + b % 2) for b in range(B)], "objects")
        rows = [[text(2 + b), text(1 + j)] for b in range(B) for j in range(4)]
        return batch | data.pad_texts(rows, 1, 2, 0) | {"labels": torch.arange(B) % 4}
    return batch | data.pad_captions([text(3 + (r * 2) % 5) for r in range(B * k)], 1, 2, 0)


def rows_of(cfg, seed=1, B=3, k=1, **more):
    """What a training step reads; of scst with advantages, as decoding.rewarded_samples gives them."""
    batch = loaded(cfg.task, B, k, seed, **more)
    rows = tden.rows_of(batch, cfg.task, TOK, cfg, torch.Generator().manual_seed(seed))
    if cfg.task == "scst":
        rows["advantages"] = torch.linspace(-1, 2, B * k)
    return rows


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Losses by hand


@pytest.mark.parametrize("loss", [tden.loss_mlm, tden.loss_msg])
def test_word_losses_by_hand(loss):
    logits, labels = some(3, 4), torch.tensor([2, 0, 3])
    by_hand = -np.mean([log_softmax(logits.numpy())[i, k] for i, k in enumerate([2, 0, 3])])
    assert loss(logits, labels).item() == pytest.approx(by_hand, abs=1e-6)
    assert loss(logits.bfloat16(), labels).dtype == torch.float32


def test_class_loss_by_hand():
    logits, targets = some(2, 3), torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]])
    log_p, q = log_softmax(logits.numpy()), targets.numpy()
    by_hand = sum(q[i, c] * (np.log(q[i, c]) - log_p[i, c]) for i in range(2) for c in range(3) if q[i, c] > 0) / 2
    assert tden.loss_moc(logits, targets).item() == pytest.approx(by_hand, abs=1e-6)


def test_nothing_to_predict_is_nought_and_still_in_the_graph():
    for loss, target in ((tden.loss_mlm, torch.zeros(0).long()), (tden.loss_msg, torch.zeros(0).long()),
                         (tden.loss_moc, torch.zeros(0, 3))):  # fmt: skip
        logits = torch.zeros(0, 3, requires_grad=True)
        found = loss(logits, target)
        found.backward()
        assert found.item() == 0 and logits.grad is not None


@pytest.mark.parametrize("hardest", [True, False])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [0, 1, 0, 3], [5, 5, 5, 5]])
def test_matching_loss_by_hand(hardest, ids):
    """Negatives of the same picture do not count; without any negative the loss is 0."""
    t, v = (F.normalize(some(4, 6, seed=seed), dim=-1) for seed in (1, 2))
    S = t.numpy() @ v.numpy().T
    costs = [[max(0, 0.7 + S[i, j] - S[i, i]) for j in range(4) if ids[i] != ids[j]] for i in range(4)]
    costs_v = [[max(0, 0.7 + S[i, j] - S[j, j]) for i in range(4) if ids[i] != ids[j]] for j in range(4)]
    if hardest:
        by_hand = sum(max(row, default=0) for row in costs + costs_v) / 4
    else:
        by_hand = 0
        for table in (costs, costs_v):
            violating = [cost for row in table for cost in row if cost > 0]
            by_hand += sum(violating) / max(1, len(violating))
    found = tden.loss_ism(t, v, torch.tensor(ids), 0.7, hardest)
    assert found.item() == pytest.approx(by_hand, abs=1e-5) and (found > 0) == (len(set(ids)) > 1)


def test_downstream_losses_by_hand():
    logits, soft = some(2, 3), torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.0, 0.6]])
    p, q = 1 / (1 + np.exp(-logits.numpy())), soft.numpy()
    by_hand = -(q * np.log(p) + (1 - q) * np.log(1 - p)).sum() / 2
    assert tden.loss_answers(logits, soft).item() == pytest.approx(by_hand, abs=1e-5)
    log_p, targets = log_softmax(logits.numpy()), [2, 0]
    plain = -np.mean([log_p[i, k] for i, k in enumerate(targets)])
    assert tden.loss_caption(logits, torch.tensor(targets)).item() == pytest.approx(plain, abs=1e-6)
    smooth = 0.0
    for i, k in enumerate(targets):
        for w in range(3):
            share = 0.9 if w == k else 0.05
            smooth += share * (np.log(share) - log_p[i, w]) / 2
    assert tden.loss_caption(logits, torch.tensor(targets), 0.1).item() == pytest.approx(smooth, abs=1e-6)
    found = tden.loss_scst(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0.5, -1.0, 0.0]))
    assert found.item() == pytest.approx(-(-0.5 + 2.0) / 3)


@pytest.mark.parametrize("task", tden.TASKS)
@torch.no_grad()
def test_losses_of_a_step(task):
    """Which outputs meet which labels, in a batch of several lengths; and over how many targets each loss is a mean."""
    model = network(task, label_smoothing=0.1, batch=3, margin=0.6)
    cfg, rows = model.cfg, rows_of(model.cfg, seed=3)
    out = {name: x.numpy() for name, x in model(rows).items()}
    found, n = tden.losses(cfg, model(rows), rows), tden.counts(task, rows)
    assert list(found) == LOSSES[task] == list(n)

    def word_loss(logits, labels):
        return -np.mean(log_softmax(logits)[np.arange(len(labels)), labels])

    if task == "pretrain":
        for name in ("mlm", "msg"):
            labels = rows[f"{name}_labels"].numpy()
            labels = labels[labels >= 0]
            assert n[name] == len(labels)
            assert found[name].item() == pytest.approx(word_loss(out[name], labels), abs=1e-5)
        targets = rows["moc_targets"][rows["region_is_masked"]]
        assert n["moc"] == len(targets) > 1
        assert found["moc"].item() == pytest.approx(tden.loss_moc(torch.tensor(out["moc"]), targets).item())
    if task in ("pretrain", "retrieval"):
        hinge = tden.loss_ism(*(torch.tensor(out[name]) for name in ("text", "image")), torch.arange(3), 0.6)
        assert n["ism"] == 3 and hinge > 0
        assert found["ism"].item() == pytest.approx(hinge.item() * (3 if task == "retrieval" else 1), abs=1e-5)
    if task == "vqa":
        for branch in "ug":
            wanted = tden.loss_answers(torch.tensor(out[branch]), rows["targets"])
            assert n[branch] == 3 and found[branch] == wanted
    if task == "vcr":
        four = log_softmax(out["u"].reshape(3, 4))
        assert n["choice"] == 3
        assert found["choice"].item() == pytest.approx(-np.mean([four[b, b] for b in range(3)]), abs=1e-5)
    if task in ("caption", "scst"):
        labels = rows["targets"][rows["targets"] >= 0]
        assert n[task] == len(labels) == len(out["logits"])
    if task == "caption":
        assert found[task] == tden.loss_caption(torch.tensor(out["logits"]), labels, 0.1)
    if task == "scst":
        worth = np.repeat([-1, 0.5, 2], (rows["targets"] >= 0).sum(1).numpy())
        by_hand = -np.mean(worth * log_softmax(out["logits"])[np.arange(len(labels)), labels.numpy()])
        assert found[task].item() == pytest.approx(by_hand, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees what


@pytest.mark.parametrize("decoupled", [True, False])
@torch.no_grad()
def test_no_later_word_reaches_the_decoder(decoupled):
    """Neither through its own copy nor through the other one; what the encoder has read tells it, if it is asked."""
    g = torch.Generator().manual_seed(0)
    for memory in ("object", "understanding"):
        model = network(decoder_memory=memory, decoupled=decoupled)
        rows = rows_of(model.cfg, B=2, numbers=(4, 4))
        R, T = rows["u_ids"].shape
        labels = torch.full((R, T), 5)
        rows |= {"keep_mask": labels > 0, "msg_labels": labels, "mlm_labels": labels}
        rows |= {name: torch.randint(4, V, (R, T), generator=g) for name in ("u_ids", "g_ids")}
        before = {name: model(rows)[name].view(R, T, V) for name in ("msg", "mlm")}
        for t in range(T - 1):
            later = torch.arange(T) > t
            for names in (["u_ids"], ["g_ids"], ["u_ids", "g_ids"]):
                out = model(rows | {name: torch.where(later, (rows[name] + 1) % V, rows[name]) for name in names})
                leak = (out["msg"].view(R, T, V) - before["msg"])[:, : t + 1].abs().amax((1, 2))
                heard = (out["mlm"].view(R, T, V) - before["mlm"])[:, : t + 1].abs().amax((1, 2))
                assert (leak > 1e-4).all() if memory == "understanding" and "u_ids" in names else leak.max() < 1e-5
                assert (heard > 1e-4).all() if "u_ids" in names else heard.max() == 0, "understanding sees both sides"
        out = model(rows | {"g_ids": torch.cat([rows["g_ids"][:, :1], (rows["g_ids"][:, 1:] + 1) % V], 1)})
        assert ((out["msg"].view(R, T, V) - before["msg"])[:, 1:].abs().amax(2) > 1e-4).all()


def real_only(rows, b, k=1):
    """Sample b alone, without any padding; k texts a picture."""
    texts = slice(b * k, b * k + k)
    one = {name: x[texts] if len(x) > len(rows["features"]) or name in ("targets",) else x[b : b + 1]
           for name, x in rows.items()}  # fmt: skip
    keep = one["keep_mask"] if "keep_mask" in one else one["targets"] >= 0
    T, N = int(keep.sum(1).max()), int(one["region_keep_mask"].sum())
    for name in {"ids", "u_ids", "g_ids", "segments", "keep_mask", "mlm_labels", "msg_labels"} & set(one):
        one[name] = one[name][:, :T]
    if "keep_mask" not in one:
        one["targets"] = one["targets"][:, :T]
    for name in ("features", "locations", "region_keep_mask"):
        one[name] = one[name][:, :N]
    for name in {"region_is_masked", "moc_targets"} & set(one):
        one[name] = one[name][:, : N - 1]
    return one


def shares(name, rows):
    """How many rows of an output belong to each sample."""
    B = len(rows["features"])
    of = {"mlm": "mlm_labels", "msg": "msg_labels", "logits": "targets"}
    if name in of:
        return (rows[of[name]] != NOTHING).view(B, -1).sum(1).tolist()
    return rows["region_is_masked"].sum(1).tolist() if name == "moc" else None


@pytest.mark.parametrize("task, decoupled", DECOUPLED)
@torch.no_grad()
def test_neither_padding_nor_other_samples_matter(task, decoupled):
    """Each sample alone and without padding gives what it gives among longer ones, with anything in the padding."""
    for memory in ("object", "understanding") if task in ("pretrain", "vqa") else ("object",):
        model, k = network(task, decoupled=decoupled, decoder_memory=memory), 4 if task == "vcr" else 1
        rows = rows_of(model.cfg, seed=5)
        B = len(rows["features"])
        assert not rows["region_keep_mask"].all()
        full = copy.deepcopy(rows)
        full["features"][~rows["region_keep_mask"]] = 9.0
        full["locations"][~rows["region_keep_mask"]] = 2.0
        pad = ~rows["keep_mask"] if "keep_mask" in rows else rows["targets"] < 0
        assert pad.any()
        for name in {"ids", "u_ids", "g_ids"} & set(rows):
            full[name][pad] = 7
        out = model(full)
        for b in range(B):
            alone = model(real_only(rows, b, k))
            for name, x in out.items():
                n = shares(name, rows)
                if n is None:
                    n = [len(x) // B] * B
                mine = x[sum(n[:b]) : sum(n[: b + 1])]
                if name == "u" and task == "vcr":
                    assert len(mine) == 4
                torch.testing.assert_close(alone[name], mine, atol=2e-5, rtol=1e-4, msg=f"{name} of {b}")


@pytest.mark.parametrize("task, decoupled", [("caption", True), ("caption", False), ("vcr", True)])
@torch.no_grad()
def test_texts_of_a_picture_are_texts_of_its_copies(task, decoupled):
    """R = k B rows of text with B pictures, and with the pictures repeated."""
    model, k = network(task, decoupled=decoupled), 4
    rows = rows_of(model.cfg, k=k)
    pictures = ("features", "locations", "region_keep_mask")
    twice = rows | {name: rows[name].repeat_interleave(k, 0) for name in pictures}
    (name,) = {"logits", "u"} & set(model(rows))
    torch.testing.assert_close(model(rows)[name], model(twice)[name], atol=1e-5, rtol=1e-5)
    shifted = rows | {name: rows[name].roll(1, 0) for name in pictures}
    assert (model(rows)[name] - model(shifted)[name]).abs().amax(1).min() > 1e-4, "every row must see its picture"


@torch.no_grad()
def test_each_row_of_text_has_its_own_corruption_and_its_picture():
    rows = rows_of(tiny(region_mask=0.5, word_mask=0.5), k=2)
    assert len(rows["features"]) == 6 and rows["image_ids"].tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(rows["locations"][::2], rows["locations"][1::2])
    assert not torch.equal(rows["region_is_masked"][::2], rows["region_is_masked"][1::2])
    assert not torch.equal(rows["features"][::2, 0], rows["features"][1::2, 0]), "the global region knows"


def test_layers_are_dropped_in_training_only():
    rows = rows_of(tiny("vqa"))
    keep, both = rows["keep_mask"][:, None, None], torch.cat([rows["region_keep_mask"], rows["keep_mask"]], 1)
    for name in ("object", "sentence", "cross"):
        plain, model = network("vqa"), network("vqa", **{f"drop_{name}": 1.0})
        for a, b in zip(plain(rows).values(), model(rows).values(), strict=True):
            assert torch.equal(a, b), "in evaluation nothing is dropped"
        plain.train(), model.train()
        v, t = model.region_embedding(rows["features"], rows["locations"]), model.tokens(rows["ids"], rows["segments"])
        seen, read = model.see(rows), model.read(rows["ids"], rows["segments"], keep)
        states, words = model.understand(v, t, both[:, None, None])
        assert len(seen) == len(states) == 2
        assert all(torch.equal(state, v) == (name == "object") for state in seen)
        assert torch.equal(read, t) == (name == "sentence")
        assert all(torch.equal(state, v) == (name == "cross") for state in states)
        assert torch.equal(words, t) == (name == "cross")
    model = network("vqa", drop_object=0.5, object_layers=40).train()
    seen = [model.region_embedding(rows["features"], rows["locations"]), *model.see(rows)]
    n_dropped = sum(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))
    assert 8 <= n_dropped <= 32


def test_a_text_longer_than_the_positions_says_so():
    with pytest.raises(UserError, match="25 tokens: there are 24 positions"):
        network().tokens(torch.zeros(1, 25).long(), torch.zeros(1, 25).long())


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


def test_regions_that_overlap_a_masked_one_are_zeroed_with_it():
    """IoU above 0.4, edges counted as pixels; the global region is the mean of what is left; MOC asks the masked."""
    boxes = torch.tensor([[0, 0, 9, 9], [0, 0, 9, 4.0], [0, 0, 9, 2.9], [50, 50, 59, 59], [50, 50, 60, 60]])[None]
    is_masked = torch.tensor([[True, False, False, False, True]])
    found, is_zero = tden.corrupt_regions(torch.ones(1, 5, D_IN), boxes, is_masked)
    assert is_zero.tolist() == [[True, True, False, True, True]]  # 50 / 100, 39 / 100, 100 / 121
    assert torch.equal(found, 1.0 - is_zero[..., None].expand(-1, -1, D_IN).float())
    batch = loaded(numbers=(5, 3, 4))
    rows = tden.corrupt(batch, TOK, tiny(region_mask=0.3), torch.Generator().manual_seed(0))
    zeroed = (rows["features"][:, 1:] == 0).all(2) & batch["regions_keep_mask"]
    assert torch.equal(rows["features"][:, 1:], batch["regions"].masked_fill(zeroed[..., None], 0))
    assert rows["region_is_masked"].any() and (zeroed >= rows["region_is_masked"]).all()
    left = batch["regions_keep_mask"] & ~zeroed
    for b in range(3):
        mean = batch["regions"][b][left[b]].sum(0) / max(1, int(left[b].sum()))
        torch.testing.assert_close(rows["features"][b, 0], mean)
    assert torch.equal(rows["moc_targets"], batch["regions_classes"])
    everything = tden.corrupt(batch, TOK, tiny(region_mask=1.0), torch.Generator())
    assert not everything["features"].any() and torch.equal(everything["region_is_masked"], batch["regions_keep_mask"])
    nothing = tden.corrupt(batch, TOK, tiny(region_mask=0.0, word_mask=0.0), torch.Generator())
    plain = regions.of_batch(batch, 50)
    assert all(torch.equal(nothing[name], plain[name]) for name in plain)
    assert (nothing["mlm_labels"] == NOTHING).all() and not nothing["region_is_masked"].any()


def test_labels_of_a_corrupted_sentence():
    """MSG asks for the next word of the true sentence at every position; MLM for what was selected."""
    batch = loaded()
    rows = tden.corrupt(batch, TOK, tiny(word_mask=0.6), torch.Generator().manual_seed(2))
    ids, keep = data.whole_captions(batch, TOK.pad)
    is_word = keep & (ids != TOK.bos) & (ids != TOK.eos)
    is_selected = rows["mlm_labels"] != NOTHING
    assert torch.equal(rows["u_ids"], rows["g_ids"]) and torch.equal(rows["keep_mask"], keep)
    assert is_selected.any() and (is_selected <= is_word).all() and not torch.equal(is_selected, is_word)
    assert torch.equal(rows["mlm_labels"][is_selected], ids[is_selected])
    assert torch.equal(rows["u_ids"][~is_selected], ids[~is_selected])
    assert (rows["u_ids"] != ids).any() and rows["u_ids"].max() < V
    for row, label, n in zip(ids.tolist(), rows["msg_labels"].tolist(), keep.sum(1).tolist(), strict=True):
        assert label[: n - 1] == row[1:n] and label[n - 2] == TOK.eos and set(label[n - 1 :]) == {NOTHING}


def test_shares_of_the_corruption():
    cfg, batch = tiny(region_mask=0.15, word_mask=0.15), loaded(B=2, k=1000, numbers=(5, 3))
    rows = tden.corrupt(batch, TOK, cfg, torch.Generator().manual_seed(0))
    ids, keep = data.whole_captions(batch, TOK.pad)
    is_word = keep & (ids != TOK.bos) & (ids != TOK.eos)
    is_selected, seen = rows["mlm_labels"] != NOTHING, rows["region_keep_mask"][:, 1:]
    assert is_selected[is_word].float().mean() == pytest.approx(0.15, abs=0.015)
    assert rows["region_is_masked"][seen].float().mean() == pytest.approx(0.15, abs=0.02)
    assert not rows["region_is_masked"][~seen].any()
    again, other = (tden.corrupt(batch, TOK, cfg, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert all(torch.equal(rows[name], again[name]) for name in rows)
    assert not torch.equal(rows["u_ids"], other["u_ids"]) and not torch.equal(rows["features"], other["features"])


def test_without_classes_there_is_nothing_for_moc_to_predict():
    """A batch of files without class probabilities names the same losses as one with them, on every process."""
    batch = {name: x for name, x in loaded().items() if name != "regions_classes"}
    corrupted = tden.corrupt(batch, TOK, tiny(region_mask=1.0), torch.Generator())
    assert tden.counts("pretrain", corrupted)["moc"] == 0
    found = tden.losses(tiny(), network()(corrupted), corrupted)
    assert list(found) == ["mlm", "msg", "moc", "ism"] and found["moc"] == 0


def test_a_detector_without_classes_has_no_moc():
    cfg = tiny(region_classes=0)
    corrupted = tden.corrupt(loaded(), TOK, cfg, torch.Generator())
    assert not {"moc_targets", "region_is_masked"} & set(corrupted)
    assert list(tden.losses(cfg, network(region_classes=0)(corrupted), corrupted)) == ["mlm", "msg", "ism"]
    assert tden.counts("pretrain", corrupted)["moc"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# The second pass


def one_hot(words):
    return F.one_hot(torch.tensor(words), V).float() * 50


def second(**more):
    """[CLS] a [MASK] c d [SEP], [CLS] [MASK] b [SEP]: what pass 1 said is 10, 11 ... in MLM, 20, 21 ... in MSG."""
    ids = torch.tensor([[1, 5, 3, 7, 8, 2], [1, 3, 6, 2, 0, 0]])
    mlm = torch.full((2, 6), NOTHING)
    mlm[0, 2], mlm[0, 4], mlm[1, 1] = 6, 8, 9  # the second is selected, but shown as it is
    msg = torch.tensor([[5, 6, 7, 8, 2, NOTHING], [9, 6, 2, NOTHING, NOTHING, NOTHING]])
    batch = {"u_ids": ids, "g_ids": ids, "mlm_labels": mlm, "msg_labels": msg}
    return batch, tden.second_inputs(batch, one_hot([10, 11, 12]), one_hot([20, 21, 22, 23, 24, 25, 26, 27]), **more)


@pytest.mark.parametrize("mode", ["argmax", "sample"])
def test_the_second_pass_reads_what_the_first_said(mode):
    """In u what MLM says there; in g what MSG said one position earlier; all selected places, nothing else."""
    batch, found = second(mode=mode)
    before = copy.deepcopy(batch)
    assert found["u_ids"].tolist() == [[1, 5, 10, 7, 11, 2], [1, 12, 6, 2, 0, 0]]
    assert found["g_ids"].tolist() == [[1, 5, 21, 7, 23, 2], [1, 25, 6, 2, 0, 0]]
    assert set(found) == {"u_ids", "g_ids"} and all(torch.equal(batch[name], before[name]) for name in batch)


def test_words_of_the_second_pass_are_drawn():
    """sample: from the softmax; probability: the share of selected places that are replaced, in both copies alike."""
    torch.manual_seed(0)
    R, T = 3000, 3
    ids = torch.tensor([[1, 3, 2]]).repeat(R, 1)
    mlm, msg = (torch.tensor([row]).repeat(R, 1) for row in ([NOTHING, 9, NOTHING], [9, 2, NOTHING]))
    batch = {"u_ids": ids, "g_ids": ids, "mlm_labels": mlm, "msg_labels": msg}
    p = torch.tensor([0.0, 0.2, 0.0, 0.0, 0.5, 0.3])
    found = tden.second_inputs(batch, p.log().repeat(R, 1), p.log().repeat(R * 2, 1), "sample")
    for copy_ in ("u_ids", "g_ids"):
        shares = torch.bincount(found[copy_][:, 1], minlength=6) / R
        assert shares.tolist() == pytest.approx(p.tolist(), abs=0.03)
        assert torch.equal(found[copy_][:, [0, 2]], ids[:, [0, 2]])
    assert (found["u_ids"] != found["g_ids"]).any()
    found = tden.second_inputs(batch, p.log().repeat(R, 1), p.log().repeat(R * 2, 1), "argmax", 0.25)
    is_new = found["u_ids"][:, 1] == 4
    assert is_new.float().mean() == pytest.approx(0.25, abs=0.03) and (found["u_ids"][~is_new, 1] == 3).all()
    assert torch.equal(found["u_ids"], found["g_ids"])
    assert torch.equal(tden.second_inputs(batch, p.repeat(R, 1), p.repeat(R * 2, 1), probability=0.0)["u_ids"], ids)
    batch["mlm_labels"] = torch.full((R, T), NOTHING)
    for mode in ("argmax", "sample"):
        assert torch.equal(tden.second_inputs(batch, torch.zeros(0, 6), p.repeat(R * 2, 1), mode)["g_ids"], ids)


def test_no_gradient_flows_back_to_the_first_pass():
    """The gradient of the second pass is that of a pass on ids which nobody computed."""
    model = network()
    rows = rows_of(model.cfg)
    first = {name: x for name, x in model(rows).items()}
    for x in first.values():
        x.retain_grad()
    new = tden.second_inputs(rows, first["mlm"], first["msg"])
    rows = {name: x for name, x in rows.items() if name != "image_ids"} | new
    sum(tden.losses(model.cfg, model(rows), rows).values()).backward()
    assert all(x.grad is None for x in first.values())
    assert not any(x.requires_grad for x in new.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("ism."))


def by_hand(cfg, model, batch, steps):
    """The steps of pre-training, written once more without pieces, processes and logs."""
    decays = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=ps, weight_decay=wd) for ps, wd in zip(decays, (0.01, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * common.linear_schedule(step, cfg.steps, cfg.warmup)
        model.train()
        seed = cfg.seed * 1_000_003 + step
        torch.manual_seed(seed + 2**31)
        rows = tden.corrupt(batch[step], model.tokenizer, cfg, torch.Generator().manual_seed(seed))
        total = 0.0
        for number in range(cfg.passes):
            out = model(rows)
            if number + 1 < cfg.passes:
                more = tden.second_inputs(rows, out["mlm"], out["msg"], cfg.ss_mode, cfg.ss_prob)
            total = total + sum(tden.losses(cfg, out, rows).values())
            if cfg.two_updates or number + 1 == cfg.passes:
                total.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
                optimizer.step()
                optimizer.zero_grad()
                total = 0.0
            if number + 1 < cfg.passes:
                rows = {name: x for name, x in rows.items() if name != "image_ids"} | more


def run(*argv):
    papers.run("tden", *papers.toy("tden", *argv))


@pytest.mark.parametrize("changes", [{}, {"two_updates": False}, {"passes": 1, "grad_clip": 0.0},
                                     {"ss_mode": "sample", "ss_prob": 0.5}])  # fmt: skip
def test_training_is_the_step_as_the_paper_tells_it(tmp_path, changes):
    """Updates, rates, decay, the second batch: the loop's weights are those of a loop written down from the paper."""
    shape = dict(positions=64, pooled=16, init_std=0.08, feature_dim=0, region_classes=0, max_len=30, dropout=0.1)
    cfg = tiny(**{**shape, "word_mask": 0.4, "lr": 0.01, "batch": 20, "train_scenes": 40, "val_items": 1, "max_new": 2,
                  "test_scenes": 2, "steps": 3, "eval_every": 3, "log_every": 1, "warmup": 0.4, "grad_clip": 1.0,
                  "vocab_size": 400, "out": str(tmp_path / "r"), "workers": 0, "device": "cpu", **changes})  # fmt: skip
    machine, corpus = common.start_machine(cfg), tden.load_data(cfg)
    model = tden.build(cfg, corpus)
    other = copy.deepcopy(model)
    run = common.Run.create("tden", cfg, machine)
    tden.train(cfg, model, corpus, machine, run)
    loader = data.train_loader(tden.samples_of(cfg, model, corpus, corpus.splits["train"], train=True), 20, steps=3)
    by_hand(cfg, other, list(loader), 3)
    for (name, x), y in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        n = len(x) // 2 if name.endswith("kv.bias") else 0  # keys' biases and the next change nothing: noise moves them
        if not re.search(r"weigh\.3\.bias|ism\..*embed\.bias|running_mean", name):
            torch.testing.assert_close(x[n:] if n else x, y[n:] if n else y, atol=3e-4, rtol=1e-3, msg=name)
    records = [r for r in common.read_log(run.path / "log.jsonl") if "lr" in r]
    losses = [k for k in records[0] if k.split("_")[0] in ("mlm", "msg", "moc", "ism")]
    assert losses == ["mlm", "msg", "moc", "ism"] + ["mlm_2", "msg_2", "moc_2"] * (cfg.passes == 2)


@pytest.mark.parametrize("task", tden.TASKS)
def test_micro_batches_give_the_gradient_of_the_whole(task):
    """However a step is cut, each loss is the mean over its targets; but for ISM, whose negatives are the piece's."""
    k = {"vcr": 4, "caption": 2, "scst": 2}.get(task, 1)
    grads = []
    for pairs in (0, k, 2 * k):
        model = network(task)
        rows = rows_of(model.cfg, B=4, k=k, seed=2)
        rows.pop("image_ids", None) if task == "pretrain" else None
        pieces, in_all = data.pieces_of(rows, pairs), tden.counts(task, rows)
        assert len(pieces) == {0: 1, k: 4, 2 * k: 2}[pairs]
        if task == "retrieval":
            continue
        for piece in pieces:
            n = tden.counts(task, piece)
            found = tden.losses(model.cfg, model(piece), piece)
            sum(loss * float(n[name]) / float(in_all[name]) for name, loss in found.items()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in grads[1:]:
        torch.testing.assert_close(grads[0], other, atol=1e-5, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, groups, sizes


@pytest.mark.parametrize("task, decoupled", DECOUPLED)
def test_every_parameter_gets_a_gradient_and_one_optimizer_group(task, decoupled):
    model = network(task, decoupled=decoupled).train()
    rows = rows_of(model.cfg, B=4, k=1, seed=4)
    sum(tden.losses(model.cfg, model(rows), rows).values()).backward()
    lost = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7}
    # A softmax does not feel a number that is added to all, be it of positions or of VCR's four, a BatchNorm neither;
    # the last layer of the shared network makes region states that a caption does not ask for.
    free = r".*\.weigh\.3\.bias|ism\..*\.embed\.bias"
    free += {"caption": r"|cross_encoder\.\d\.ffn_regions\..*", "vcr": r"|answer_head\.u\.\d\.bias"}.get(task, "")
    assert all(re.fullmatch(free, name) for name in lost), lost
    optimizer = common.adamw(model, lambda name: 1e-3, 0.01, all_matrices=True)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_matrices_and_embeddings_decay(tmp_path):
    """The optimizer of a run, from its checkpoint: two groups, norms and biases without decay."""
    run("--out", tmp_path / "r", "--steps", 1, "--val-items", 2, "--test-scenes", 2, "--weight-decay", 0.03)
    state = common.read_tensors(tmp_path / "r" / "last" / "state.pt")["optimizer"]
    model = tden.TDEN.from_run(str(tmp_path / "r"))
    groups = {group["weight_decay"]: group for group in state["param_groups"]}
    decaying = sum(p.ndim > 1 for p in model.parameters())
    counted = {decay: len(group["params"]) for decay, group in groups.items()}
    assert counted == {0.03: decaying, 0.0: len(list(model.parameters())) - decaying}
    assert all(group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 for group in groups.values())


def test_new_weights():
    model = network(width=64, init_std=0.05, vocab_size=400)
    assert model.tokens.word.weight.std().item() == pytest.approx(0.05, abs=0.002)
    assert model.object_encoder[0].att.kv.weight.std().item() == pytest.approx(0.05, abs=0.003)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == float("norm" in name and name.endswith("weight"))).all(), name


BASE = dict(vocab_size=30522, feature_dim=2048, region_classes=1601)
OFFICIAL = {"pretrain": (316.1, 677), "caption": (233.8, 462), "vqa": (294.9, 643), "vcr": (233.5, 477),
            "retrieval": (162.7, 376)}  # fmt: skip


@pytest.mark.parametrize("task", OFFICIAL)
def test_sizes_of_the_base_models(task):
    """Parameters and entries of the state dicts of YehLi/xmodaler's five models, which keep a bias under two names."""
    with torch.device("meta"):
        model = tden.TDEN(tden.Config(task=task, **BASE), answers=("a",) * (3129 if task == "vqa" else 0))
    millions, entries = OFFICIAL[task]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    names = tden.official_names(model)
    theirs = [name for several in names.values() for name in several]
    assert len(theirs) + hasattr(model, "lm_head") == entries == len(set(theirs)) + hasattr(model, "lm_head")
    assert set(names) == set(model.state_dict())


@pytest.mark.parametrize("sizes", [BASE, dict(width=128, mlp=256, cross_layers=1),
                                   dict(width=192, mlp=768, cross_layers=2)])  # fmt: skip
def test_one_network_for_both_has_as_many_parameters(sizes):
    counted = []
    for decoupled in (True, False):
        with torch.device("meta"):
            model = tden.TDEN(tden.Config(**{**BASE, "vocab_size": 1000, **sizes, "decoupled": decoupled}))
        counted.append(sum(p.numel() for name, p in model.named_parameters() if name.startswith("cross_")))
    assert counted[1] == pytest.approx(counted[0], rel=0.12)  # as near as whole layers come


# ---------------------------------------------------------------------------------------------------------------------
# Learning and decoding

SAYS = ["a red dog runs", "two cats", "a man on a horse", "blue sea at night", "a girl eats a red apple", "the boat"]


@pytest.fixture(scope="module")
def learned():
    """A model that knows six pairs by heart, after the two-pass step; its losses by name; a batch of the pictures."""
    tok = language.Tokenizer.train(SAYS * 3, 200, "wordpiece")
    torch.manual_seed(0)
    cfg = tiny(vocab_size=tok.vocab_size, width=32, mlp=64, init_std=0.1, hardest=False, max_new=8, word_mask=0.3,
               object_layers=1, cross_layers=1, sentence_layers=1, region_mask=0.3)  # fmt: skip
    model = tden.TDEN(cfg, tok)
    batch = loaded(B=6, numbers=(4, 3, 5, 4, 2, 3))
    batch |= data.pad_captions([tok.encode(text) for text in SAYS], tok.bos, tok.eos, tok.pad)
    optimizer, told = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True), []
    for step in range(160):
        model.train()
        rows = tden.corrupt(batch, tok, cfg, torch.Generator().manual_seed(step))
        told.append({})
        for suffix in ("", "_2"):
            out = model(rows)
            found = tden.losses(cfg, out, rows)
            sum(found.values()).backward()
            for group in optimizer.param_groups:
                group["lr"] = 5e-3 * (1 - step / 160)
            optimizer.step()
            optimizer.zero_grad()
            told[-1] |= {name + suffix: loss.item() for name, loss in found.items()}
            rows = rows | tden.second_inputs(rows, out["mlm"], out["msg"])
            rows.pop("image_ids", None)
    return model.eval(), told, batch


def test_all_losses_fall_and_the_captions_are_read_back(learned):
    model, told, batch = learned
    for name in ("mlm", "msg", "moc", "mlm_2", "msg_2", "ism"):
        first, last = (np.mean([losses[name] for losses in part]) for part in (told[:5], told[-20:]))
        assert last < 0.6 * first, (name, first, last)
    for beam in (1, 2, 4):
        assert model.caption_batch(batch, beam) == SAYS
    with torch.no_grad():
        found = model.encode_images(batch) @ model.encode_texts(SAYS).T
    assert found.argmax(0).tolist() == found.argmax(1).tolist() == list(range(6))
    turned = {name: x.roll(1, 0) if torch.is_tensor(x) else x for name, x in batch.items()}
    assert model.caption_batch(turned, 1) == SAYS[-1:] + SAYS[:-1], "captions follow the pictures"


def test_texts_are_read_as_they_were_learned(learned):
    """Cleaned and cut like the captions of training."""
    model, _, _ = learned
    with torch.no_grad():
        assert torch.equal(model.encode_texts(["Two  CATS."]), model.encode_texts(["two cats"]))
        long = " ".join(["red dog"] * 20)
        assert torch.equal(model.encode_texts([long]), model.encode_texts([" ".join(["red dog"] * 6)]))
        ones = torch.ones(2)
        torch.testing.assert_close(model.encode_texts(SAYS[:2]).norm(dim=1), ones)


@pytest.mark.parametrize("memory", ["object", "understanding"])
@torch.no_grad()
def test_cached_decoding_is_uncached_decoding(memory):
    model, batch = network("caption", seed=2, init_std=0.4, decoder_memory=memory), loaded("caption")
    for p in (model.tokens.position.weight, model.tokens.word.weight):
        p.mul_(5)  # else the type outweighs the words, and every caption repeats one
    for block in (*model.sentence_encoder, *model.cross_decoder):
        block.ffn.norm.weight.mul_(2)
    rows, found = regions.of_batch(batch, 6), []
    for cached in (True, False):
        decoders = [tden.Decoder(model, rows, cached) for _ in range(3)]
        found.append([*decoding.competing_beams(decoders[0], 3, 3, TOK.bos, TOK.eos, 9),
                      *decoding.competing_beams(decoders[1], 3, 1, TOK.bos, TOK.eos, 9),
                      *decoding.greedy(decoders[2], 3, TOK.bos, TOK.eos, 9)])  # fmt: skip
        assert bool(decoders[0].caches) == cached
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len({tuple(row) for row in found[0][0].tolist()}) > 1 and torch.unique(found[0][0]).numel() > 3, "too easy"
    teacher = model({**rows, "ids": F.pad(found[0][2][:, :-1], (1, 0), value=TOK.bos)})["logits"].log_softmax(-1)
    log_p = teacher.gather(2, found[0][2][..., None])[..., 0]
    is_real = decoding.up_to_end(found[0][2], TOK.eos)
    torch.testing.assert_close(log_p[is_real], found[0][3][is_real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_shared_network_decodes_what_it_was_taught():
    """The ablation has no cache: each step is the teacher-forced one."""
    model, batch = network("caption", decoupled=False, init_std=0.5), loaded("caption")
    rows = regions.of_batch(batch, 6)
    ids, log_p = decoding.competing_beams(tden.Decoder(model, rows), 3, 1, TOK.bos, TOK.eos, 9)
    logits = model({**rows, "ids": F.pad(ids[:, :-1], (1, 0), value=TOK.bos)})["logits"].log_softmax(-1)
    is_real = decoding.up_to_end(ids, TOK.eos)
    torch.testing.assert_close(logits.gather(2, ids[..., None])[..., 0][is_real], log_p[is_real], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_answers_are_the_sum_of_both_branches():
    model, batch = network("vqa"), loaded("vqa")
    out = model(tden.rows_of(batch, "vqa", TOK, model.cfg, None))
    torch.testing.assert_close(model.answer_scores(batch), out["u"].softmax(-1) + out["g"].softmax(-1))
    model, batch = network("vcr"), loaded("vcr")
    out = model(tden.rows_of(batch, "vcr", TOK, model.cfg, None))
    assert torch.equal(model.answer_scores(batch), out["u"].view(3, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Weights of others


def official(task, **changes):
    """A model, and its weights as YehLi/xmodaler's checkpoints hold them. Heads are 64 wide there."""
    sizes = dict(width=64, heads=1, vocab_size=400, feature_dim=768, region_classes=25, decoder_memory="understanding")
    model = network(task, **{**sizes, **changes})
    names, state = tden.official_names(model), {}
    for ours, x in model.state_dict().items():
        state |= dict(zip(names[ours], x.chunk(len(names[ours])) if x.ndim else [x], strict=True))
    if task in ("pretrain", "caption"):
        state["predictor.bias"] = state["predictor.decoder.bias"]
    return model, state


FIVE = ("pretrain", "retrieval", "vqa", "vcr", "caption")


@pytest.mark.parametrize("source", FIVE)
def test_official_checkpoints_go_into_every_task(source):
    """What both have is the checkpoint's; what the task alone has stays as it was made; both are said."""
    model, state = official(source)
    assert not any("num_batches_tracked" in name and not x.ndim == 0 for name, x in state.items())
    for task in tden.TASKS:
        if {source, task} == {"vqa", "vcr"}:
            continue  # their answer heads differ, see below
        sizes = tden.official_sizes(state)
        other = network(task, seed=1, **{**sizes, "pooled": 12, "feature_dim": 768, "region_classes": 25})
        before = {name: x.clone() for name, x in other.state_dict().items()}
        told = tden.load_official(other, state)
        for name, x in other.state_dict().items():
            wanted = model.state_dict() if name in model.state_dict() else before
            assert torch.equal(x, wanted[name]), name
        fresh = {name.split(".")[0] for name in before} - {name.split(".")[0] for name in model.state_dict()}
        assert told.startswith("xmodaler's TDEN: has ")
        assert all(name in told.partition("new here")[2] for name in fresh) and ("new here" in told) == bool(fresh)
        left = {name.split(".")[0] for name in model.state_dict()} - {name.split(".")[0] for name in before}
        assert ("not used" in told) == bool(left), told


def test_sizes_of_an_official_checkpoint():
    for task in FIVE:
        model, state = official(task, cross_layers=2, object_layers=1, sentence_layers=3, width=128, heads=2)
        found = tden.official_sizes(state)
        for name in "vocab_size width heads positions feature_dim mlp object_layers sentence_layers".split():
            assert found[name] == getattr(model.cfg, name), name
        assert found.get("cross_layers", 2) == 2 and found["decoder_memory"] == "understanding"
        assert ("region_classes" in found) == (task == "pretrain")


def changed(state, **more):
    return {name: x for name, x in {**state, **more}.items() if x is not None}


def test_official_weights_that_do_not_fit_are_refused():
    model, state = official("pretrain")
    missing, shape = "encoder.v_layers.1.output.dense.bias", "similarity_predictor.t_pooler.att.0.weight"
    for wrong, told in (
        (changed(state, mystery=torch.zeros(1)), "unknown in the file: mystery"),
        (changed(state, **{"decoder.g_layers.7.x_att.self.key.bias": torch.zeros(64)}), "unknown in the file: decoder"),
        (changed(state, **{missing: None}), f"missing in the file: {missing} "),
        (changed(state, **{shape: torch.zeros(3, 3)}), r"ism.words.weigh.0.weight: \(3, 3\) in the file, \(64, 64\) "),
    ):  # fmt: skip
        other = network("pretrain", seed=1, width=64, heads=1, vocab_size=400, feature_dim=768, region_classes=25)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(UserError, match=told):
            tden.load_official(other, wrong)
        assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items()), "nothing was changed"
    with pytest.raises(UserError, match="no checkpoint of xmodaler's TDEN; its first keys are a, b"):
        tden.official_sizes({"a": 1, "b": 2})
    with pytest.raises(UserError):
        tden.load_official(network("vcr", width=64, heads=1, vocab_size=400, feature_dim=768), official("vqa")[1])


@pytest.mark.parametrize("wrapped", [True, False])
def test_init_from_an_official_file(tmp_path, wrapped, capsys, monkeypatch):
    """--init FILE: sizes are the file's, whatever the preset; decoding and --resume need it no more."""
    model, state = official("pretrain", vocab_size=800, positions=64)
    torch.save({"model": state, "iteration": 3, "optimizer": {}} if wrapped else state, tmp_path / "tden.pth")
    flags = ["--task", "caption", "--steps", 1, "--lr", 1e-12, "--val-items", 2, "--test-scenes", 2, "--max-new", 3]
    with monkeypatch.context() as patch:  # its words are BERT's, not some trained here
        def asked(name):
            raise UserError(f"asked {name}")

        patch.setattr(language.Tokenizer, "from_pretrained", asked)
        with pytest.raises(UserError, match="asked bert-base-uncased"):
            run("--init", tmp_path / "tden.pth", *flags, "--out", tmp_path / "none")
    language.Tokenizer.train(map(language.clean_caption, SAYS), 800, "wordpiece").save(tmp_path / "words")
    run("--init", tmp_path / "tden.pth", *flags, "--tokenizer", tmp_path / "words", "--out", tmp_path / "r")
    told = capsys.readouterr().out
    assert "note: xmodaler's TDEN: has cross_decoder, lm_head, object_encoder, region_embedding" in told
    (tmp_path / "tden.pth").unlink()
    mine = tden.TDEN.from_run(str(tmp_path / "r"))
    assert (mine.cfg.width, mine.cfg.heads, mine.cfg.decoder_memory) == (64, 1, "understanding")
    for name, x in mine.state_dict().items():
        torch.testing.assert_close(x, model.state_dict()[name], atol=1e-5, rtol=1e-4)
    assert common.read_json(tmp_path / "r" / "metrics.json")["protocol"]["notes"]


def test_official_files_of_other_data_are_refused(tmp_path):
    _, state = official("pretrain", feature_dim=D_IN)
    torch.save(state, tmp_path / "tden.pth")
    with pytest.raises(UserError, match="reads regions with --feature-dim 6, the data has 768"):
        run("--init", tmp_path / "tden.pth", "--out", tmp_path / "r")
    torch.save(official("pretrain", region_classes=7)[1], tmp_path / "tden.pth")
    with pytest.raises(UserError, match="reads regions with --region-classes 7, the data has 25"):
        run("--init", tmp_path / "tden.pth", "--out", tmp_path / "r")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match="no checkpoint of xmodaler's TDEN"):
        run("--init", tmp_path / "tensor.pth", "--out", tmp_path / "r")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no checkpoint of xmodaler's TDEN; its first keys are a"):
        run("--init", tmp_path / "other.pth", "--out", tmp_path / "r")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Directories as transformers writes them: BERT with both heads, with the masked-language one, with none."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

    words = sorted({char for text in SAYS for char in text if char != " "})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{char}" for char in words)]
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=40, max_position_embeddings=50, layer_norm_eps=1e-5)  # fmt: skip
    found = {}
    for kind in (BertForPreTraining, BertForMaskedLM, BertModel):
        torch.manual_seed(0)
        theirs = kind(config).eval()
        for p in theirs.parameters():
            torch.nn.init.normal_(p, std=0.3)
        folder = tmp_path_factory.mktemp(kind.__name__)
        theirs.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(vocabulary))
        found[kind.__name__] = folder, theirs
    return found


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM", "BertModel"])
@torch.no_grad()
def test_from_bert(bert, kind, tmp_path):
    """The same words and states; the third type is the first; the LM head where there is one, untied."""
    folder, theirs = bert[kind]
    cfg = tiny(bert=str(folder), tokenizer="none", word_mask=0.1, max_len=20)
    corpus = data.Corpus("x", {"train": [1], "val": [1], "test": [1]})
    model = tden.build(cfg, corpus).eval()
    sizes = (cfg.width, cfg.heads, cfg.mlp, cfg.sentence_layers, cfg.positions, cfg.vocab_size)
    assert sizes == (24, 2, 40, 2, 50, theirs.config.vocab_size) and model.tokenizer.mask == 4
    trunk = theirs if kind == "BertModel" else theirs.bert
    ids, types = torch.randint(5, 40, (2, 7)), torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).repeat(2, 1)
    keep = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    wanted = trunk(ids, attention_mask=keep.long(), token_type_ids=types).last_hidden_state
    found = model.read(ids, types, keep[:, None, None])
    torch.testing.assert_close(found[keep], wanted[keep], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.tokens.segment.weight[2], model.tokens.segment.weight[0])
    if kind == "BertModel":
        assert "new here" in corpus.notes[-1] and "lm_head" in corpus.notes[-1].partition("new here")[2]
    else:
        torch.testing.assert_close(model.lm_head(wanted), theirs.cls.predictions(wanted), atol=1e-3, rtol=1e-3)
        assert model.lm_head.out.weight is not model.tokens.word.weight
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for name, x in weights.read_weights(str(folder))[1].items()}  # fmt: skip
    again = tden.TDEN(cfg)
    tden.load_bert(again, old | {"embeddings.position_ids": torch.arange(50)})
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items()
               if name.startswith(("tokens.", "sentence_encoder.")))  # fmt: skip
    with pytest.raises(UserError, match="unknown in the file: encoder.layer.9"):
        tden.load_bert(again, old | {"encoder.layer.9.x": torch.zeros(1)})


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

QUICK = ("--val-items", 4, "--test-scenes", 6, "--max-new", 4)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    run("--out", folder, "--steps", 2, *QUICK)
    return folder


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """Task -> a run of it that began with the pre-trained one."""
    made = {}

    def of(task):
        if task not in made:
            made[task] = tmp_path_factory.mktemp("runs") / task
            run("--task", task, "--init", pretrained, "--out", made[task], "--steps", 2, "--log-every", 1, *QUICK,
                "--max-len-rationale", 60, "--lr", 0.003, "--train-scenes", 200 if task == "vqa" else 40)  # fmt: skip
        return made[task]

    return of


METRICS = {"retrieval": "R@1", "vqa": "vqa_accuracy", "vcr": "vcr_q2ar", "caption": "CIDEr_D", "scst": "CIDEr_D"}


@pytest.mark.parametrize("task", METRICS)
def test_a_downstream_run_and_its_evaluation(tuned, tmp_path, task, capsys):
    """What it logs, measures and says; --eval-only finds the same; weights that both have come from pre-training."""
    folder = tuned(task)
    metrics, records = read(folder / "metrics.json"), common.read_log(folder / "log.jsonl")
    logged = {"retrieval": ["ism"], "vqa": ["u", "g"], "vcr": ["choice_qa", "choice_qar"],
              "scst": ["reward", "scst"]}.get(task, [task])  # fmt: skip
    steps = [r for r in records if "lr" in r]
    assert all(list(r)[1 : 1 + len(logged)] == logged and "lr" == list(r)[1 + len(logged)] for r in steps)
    assert metrics["model"] == "tden" and metrics["task"] == task and metrics["protocol"]["best_by"] == METRICS[task]
    assert METRICS[task] in metrics["splits"]["test"]["metrics"] and (folder / "samples.png").exists()
    assert any("has" in note and "object_encoder" in note for note in metrics["protocol"]["notes"])
    if task == "vcr":
        optimizer = common.read_tensors(folder / "last" / "state.pt")["optimizer"]
        assert {int(x["step"]) for x in optimizer["state"].values()} == {4}, "two updates in each of two steps"
    tden.main(["--eval-only", str(folder), "--out", str(tmp_path / "e"), "--device", "cpu", "--workers", "0"])
    assert read(tmp_path / "e" / "metrics.json")["splits"] == metrics["splits"]
    assert METRICS[task] in capsys.readouterr().out


def test_verbs_of_users(tuned, pretrained, tmp_path, capsys):
    """--caption, --score, --ask and the same from Python; of pictures that the world names, or of files of regions."""
    def said(*argv):
        tden.main([*map(str, argv), "--device", "cpu"])
        return capsys.readouterr().out

    model = tden.TDEN.from_run(str(pretrained))
    assert not model.training
    score = model.score("test:3", "A red circle.")
    assert -1 <= score <= 1 and isinstance(score, float) and score != model.score("test:4", "A red circle.")
    assert said("--score", "test:3", "A red circle.", "a cat", "--init", pretrained).splitlines() == [
        f"{score:.3f}  A red circle.", f"{model.score('test:3', 'a cat'):.3f}  a cat"]  # fmt: skip
    assert said("--caption", "test:3", "val:0", "--init", pretrained) == (
        f"test:3: {model.caption('test:3')}\nval:0: {model.caption('val:0')}\n")  # fmt: skip
    model.cfg.max_new = 2
    assert said("--caption", "test:3", "--max-new", 2, "--init", pretrained) == f"test:3: {model.caption('test:3')}\n"
    answers = read(tuned("vqa") / "answers.json")
    asked = tden.TDEN.from_run(str(tuned("vqa")))
    assert list(asked.answers) == answers and len(answers) > 2 and asked.answer("test:1", "How many?") in answers
    replies = said("--ask", "test:1", "How many circles are there?", "Is there a cross?", "--init", tuned("vqa"))
    question = "How many circles are there?"
    assert replies.splitlines()[0] == f"{question}  {asked.answer('test:1', question)}"
    for argv, told in (
        (["--caption", "test:3", "--init", tuned("vqa")], "vqa and gives no captions: take a run of --task pre"),
        (["--score", "test:3", "x", "--init", tuned("caption")], "gives no similarities"),
        (["--ask", "test:3", "x", "--init", pretrained], "gives no answers: take a run of --task vqa"),
        (["--ask", "test:3", "x", "--init", tuned("vcr")], "of --task vcr and gives no answers"),
        (["--score", "test:3", "--init", pretrained], "--score test:3: a picture and a text are needed"),
        (["--caption", "nothing.jpg", "--init", pretrained], "give SPLIT:NUMBER, like test:0"),
        (["--caption", "test:3"], "add --init RUN, e.g. --init runs/tden-scenes"),
        (["--caption", "test:3", "--init", pretrained, "--steps", 3], "--steps has no meaning with --caption"),
        (["--caption", "test:3", "--init", pretrained, "--beam", 0], "--beam 0: give 1 or more"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(told)):
            said(*argv)


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--task", "nlvr2"], "--task nlvr2: it is one of pretrain, retrieval, vqa, vcr, caption, scst"),
        (["--task", "vqa", "--data", "coco"], "--task vqa needs questions about pictures: --data scenes or vqa or vg"),
        (["--data", "vqa"], "vqa has questions, no captions, which --task pretrain trains on"),
        (["--task", "scst"], "--task scst refines a trained model: add --init RUN"),
        (["--batch", "1", "--train-scenes", "9"], "--batch 1 --micro-batch 0: too small for 1 captions a picture"),
        (["--micro-batch", "1"], "ISM needs two pictures in each piece"),
        (["--batch", "2", "--captions-per-image", "3"], "too small for 3 captions a picture"),
        (["--width", "30", "--heads", "4"], "--width 30 --heads 4: the first must be a multiple of the second"),
        (["--ss-mode", "drawn"], "--ss-mode drawn: it is one of argmax, sample"),
        (["--passes", "3"], "--passes 3: it is one of 1, 2"),
        (["--decoder-memory", "words"], "it is one of auto, object, understanding"),
        (["--regions", "boxes"], "it is one of files, grid"),
        (["--train-on", "val"], "it is one of train, train+val, train+val+vg"),
        (["--drops", "0.5,1.5"], "--drops 0.5,1.5: give shares of the run between 0 and 1"),
        (["--word-mask", "1.5"], "--word-mask 1.5: give 1 or less"),
        (["--ss-prob", "2"], "--ss-prob 2.0: give 1 or less"),
        (["--max-len", "64"], "--max-len 64: give "),
        (["--max-new", "65"], "--max-new 65: give 64 or less"),
        (["--cross-layers", "0"], "--cross-layers 0: give 1 or more"),
        (["--init", "nowhere"], "nowhere is not a run directory"),
        (["--resume", "nowhere", "--lr", "1"], "--lr has no meaning with --resume"),
        (["--bert", "nowhere/at/all"], "Give a local directory"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(argv, told, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=re.escape(told)):
        tden.main([*argv, "--device", "cpu", *([] if "--train-scenes" in argv or "--resume" in argv else
                                               ["--train-scenes", "9"])])  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """The small world as COCO's files, with region files, and without."""
    folder = tmp_path_factory.mktemp("data")
    for name, kind in (("with", "npz"), ("without", "")):
        export.export("coco", folder / name, train=20, val=4, test=4, regions=kind)
    return folder


def test_photographs_with_region_files_and_with_a_grid(coco, tmp_path, capsys):
    flags = ("--data", "coco", "--preset", "tiny", "--steps", 1, "--batch", 8, "--no-official", *QUICK)
    run("--root", coco / "with", "--out", tmp_path / "files", *flags)
    assert read(tmp_path / "files" / "config.json")["region_classes"] == 25
    with pytest.raises(UserError, match="no region files: .*without/regions is not there. Two ways on: .*--regions g"):
        run("--root", coco / "without", "--out", tmp_path / "none", *flags)
    assert not (tmp_path / "none").exists()
    capsys.readouterr()
    run("--root", coco / "without", "--out", tmp_path / "grid", "--regions", "grid", *flags)
    told = capsys.readouterr().out
    assert "note: regions are a grid of crops" in told and "moc" not in told
    cfg = read(tmp_path / "grid" / "config.json")
    assert (cfg["regions"], cfg["region_classes"], cfg["feature_dim"]) == ("grid", 0, 768)
    Image.new("RGB", (50, 20), "red").save(tmp_path / "red.png")
    by_grid, by_files = (tden.TDEN.from_run(str(tmp_path / name)) for name in ("grid", "files"))
    assert isinstance(by_grid.caption(tmp_path / "red.png"), str)
    assert by_grid.caption(Image.open(tmp_path / "red.png")) == by_grid.caption(tmp_path / "red.png")
    with pytest.raises(UserError, match="reads a detector's regions, and neither .*red.npz nor .*regions/red.npz"):
        by_files.caption(tmp_path / "red.png")
    file = next((coco / "with" / "regions").rglob("*.npz"))
    assert isinstance(by_files.caption(file), str)
    run("--root", coco / "with", "--out", tmp_path / "more", "--init", tmp_path / "grid", *flags)
    assert read(tmp_path / "more" / "config.json")["regions"] == "grid", "regions are the run's"


def test_regions_of_other_numbers_and_classes(coco, tmp_path, pretrained):
    cfg = tiny(data="coco", root=str(coco / "with"), feature_dim=99, region_classes=0)
    with pytest.raises(UserError, match="regions of 768 numbers, where the model reads 99"):
        tden.load_data(cfg)
    cfg = tiny(data="coco", root=str(coco / "with"), feature_dim=0, region_classes=7)
    with pytest.raises(UserError, match="regions of 25 classes, where the model knows 7"):
        tden.load_data(cfg)


def test_mirrored_pictures_are_seen_in_training_alone():
    for task in ("vqa", "vcr"):
        cfg = tiny(task, mirror=1.0, train_scenes=200, val_items=2, test_scenes=2, feature_dim=0, vocab_size=400,
                   positions=64, max_len=40, max_len_rationale=60)  # fmt: skip
        corpus = tden.load_data(cfg)
        model = tden.build(cfg, corpus)
        items = corpus.splits["train"]
        for train in (True, False):
            seen = tden.samples_of(cfg, model, corpus, items, train=train)[(0, 0) if train else 0]["regions"]
            plain = corpus.regions(0, data.files_of(items[0])[0], mirrored=train)
            assert np.array_equal(seen.features, plain.features)
    rationales = tden.samples_of(cfg, model, corpus, items, "qar", 2)
    assert (rationales.task, rationales.answer, rationales.max_len, rationales.seed) == ("qar", 2, 60, 1)
    assert tden.samples_of(cfg, model, corpus, items).max_len == 40


@pytest.mark.slow
def test_two_processes_on_files_of_coco(coco, tmp_path):
    """torchrun as README has it, then --resume of a checkpoint: every process ends its steps."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "tden.py"]
    flags = f"--data coco --root {coco / 'with'} --preset tiny --device cpu --workers 0 --batch 8".split()
    done = subprocess.run([*torchrun, *flags, "--steps", "3", "--out", str(tmp_path / "r"), "--no-official"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = common.read_tensors(tmp_path / "r" / "last" / "model.safetensors")
    metrics = read(tmp_path / "r" / "metrics.json")["splits"]
    source = sorted((tmp_path / "r").glob("step_*"))[0]
    done = subprocess.run([*torchrun, "--resume", str(source)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = common.read_tensors(tmp_path / "r" / "last" / "model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)
    assert set(metrics) == set(read(tmp_path / "r" / "metrics.json")["splits"])


def test_a_head_of_another_task_starts_anew(tuned, tmp_path, capsys):
    run("--task", "vcr", "--init", tuned("vqa"), "--out", tmp_path / "r", "--steps", 1, *QUICK,
        "--max-len-rationale", 60)  # fmt: skip
    assert "new here answer_head" in capsys.readouterr().out


def test_a_vector_alone_has_no_batch_statistics():
    """A piece of one picture is normalised by the running statistics, and the next pieces by their own again."""
    pool = tden.AttentionPooler(4, 3, 0.0, batch_norm=True).train()
    before, x, keep = pool.norm.running_mean.clone(), torch.randn(5, 2, 4), torch.ones(5, 2, dtype=torch.bool)
    alone = pool(x[:1], keep[:1])
    assert torch.equal(pool.norm.running_mean, before)
    torch.testing.assert_close(alone, copy.deepcopy(pool).eval()(x[:1], keep[:1]))
    assert pool(x, keep).mean(0).abs().max() < 1e-5 and not torch.equal(pool.norm.running_mean, before)


@pytest.mark.slow
def test_the_main_job_ranks_and_tells(tmp_path):
    """`python tden.py` as README gives it: scenes ranked first make the caption true, and captions are true."""
    tden.main(["--out", str(tmp_path / "run"), "--device", "cpu"])
    test = read(tmp_path / "run" / "metrics.json")["splits"]["test"]
    found, shuffled = test["metrics"], test["controls"]["shuffled_images"]
    assert found["true@1"] >= 0.40 and shuffled["true@1"] <= 0.15
    assert found["caption_true"] >= 0.60 and shuffled["caption_true"] <= 0.15
