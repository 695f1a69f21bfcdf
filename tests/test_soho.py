"""What must hold for SOHO beyond its reference tensors: losses by hand, the dictionary, information flow, corruption,
what is frozen, gradients, several processes, learning, weights of others, whole runs.
"""

import copy
import json
import math
import os
import re
import socket
import time
from types import SimpleNamespace

import numpy as np
import papers
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import data
import language
import soho
import weights
from common import UserError

V, K, D, NOTHING = 37, 8, 16, soho.NOTHING
TOK = SimpleNamespace(pad=0, bos=1, eos=2, mask=3)
SIZES = ((32, 64), (64, 48), (64, 64), (48, 32))  # of pictures; a cell has 16 x 16 pixels here
LOSSES = {"pretrain": ["mlm", "mvm", "itm"], "retrieval": ["itm"], "vqa": ["vqa"], "nlvr2": ["nlvr2"], "ve": ["ve"]}
SAYS = ["a red dog runs", "two cats", "a man on a horse", "blue sea at night", "a girl eats a red apple", "the boat"]
N_ANSWERS = {"vqa": 7, "nlvr2": 2, "ve": 3, "retrieval": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(task="pretrain", **changes):
    settings = dict(
        task=task, codes=K, depth=10, cnn_width=4, strides="2,1,1,2,2,1", frozen_stages=0, width=D, heads=2, mlp=24,
        layers=2, positions=24, vocab_size=V, dropout=0.0, init_std=0.3, max_len=12, short_side=64, long_side=64,
        word_mask=0.5, mvm_prob=1.0,
    )  # fmt: skip
    return soho.Config(**{**settings, **changes})


def network(task="pretrain", seed=0, **changes):
    torch.manual_seed(seed)
    return soho.SOHO(tiny(task, **changes), TOK, answers=tuple("abcdefg") if task == "vqa" else ()).eval()


def loaded(task="pretrain", B=3, k=1, seed=1, sizes=SIZES):
    """A loader's batch: B pictures of several shapes, or pairs of them, and their texts, of several lengths."""
    rng = np.random.default_rng(seed)

    def text(n):
        return rng.integers(4, V, n).tolist()

    n = 2 if task == "nlvr2" else 1
    batch = {"image_id": [f"p{b}" for b in range(B)], "bad": []}
    shapes = [(3, *sizes[b % len(sizes)]) for b in range(B) for _ in range(n)]
    seen = data.pad_pixels([torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes], 32)
    batch |= {name: x.unflatten(0, (-1, 2)) if n == 2 else x for name, x in seen.items()}
    if task in soho.QUESTION_TASKS:
        batch |= data.pad_texts([[text(3 + b)] for b in range(B)], 1, 2, 0)
        soft = torch.zeros(B, 7).index_put((torch.arange(B), torch.arange(B)), torch.tensor(0.9))
        return batch | ({"targets": soft} if task == "vqa" else {"labels": torch.arange(B) % 2})
    return batch | data.pad_captions([text(3 + (r * 2) % 5) for r in range(B * k)], 1, 2, 0)


def rows_of(cfg, seed=1, B=3, k=1, **more):
    """What a training step reads."""
    return soho.rows_of(loaded(cfg.task, B, k, seed, **more), TOK, cfg, torch.Generator().manual_seed(seed))


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def some(*shape, seed=0):
    return torch.randn(*shape, generator=luck(seed))


class Patches(nn.Module):
    """Stands for the ResNet: each 8 x 8 pixels by themselves. The ResNet's convolutions look over a picture's edge."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv2d(3, 32, 8, 8)

    def forward(self, x):
        return self.line(x)


def patchwise(task="pretrain", **changes):
    model = network(task, **changes)
    torch.manual_seed(5)
    model.cnn = Patches().eval()
    assert model.project.in_channels == 32
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Losses by hand


def test_losses_by_hand():
    logits, labels = some(3, 4), torch.tensor([2, 0, 3])
    by_hand = -np.mean([log_softmax(logits.numpy())[i, k] for i, k in enumerate([2, 0, 3])])
    assert soho.loss_mlm(logits, labels).item() == pytest.approx(by_hand, abs=1e-5)
    assert soho.loss_itm(logits[:, :2], labels % 2).item() == pytest.approx(
        -np.mean([log_softmax(logits.numpy()[:, :2])[i, k] for i, k in enumerate([0, 0, 1])]), abs=1e-5)  # fmt: skip
    cosines = logits.tanh()
    for t in (1.0, 0.07):
        by_hand = -np.mean([log_softmax(cosines.numpy() / t)[i, k] for i, k in enumerate([2, 0, 3])])
        assert soho.loss_mvm(cosines, labels, t).item() == pytest.approx(by_hand, rel=1e-5)
    p, q = 1 / (1 + np.exp(-logits.numpy())), logits.sigmoid().round(decimals=1).numpy()
    by_hand = -(q * np.log(p) + (1 - q) * np.log(1 - p)).sum() / 3
    assert soho.loss_answers(logits, torch.tensor(q)).item() == pytest.approx(by_hand, abs=1e-5)
    for loss in (soho.loss_mlm, soho.loss_mvm, soho.loss_itm):
        assert loss(logits.bfloat16(), labels).dtype == torch.float32
    assert soho.loss_answers(logits.bfloat16(), torch.tensor(q)).dtype == torch.float32


def test_nothing_to_predict_is_nought_and_still_in_the_graph():
    for loss in (soho.loss_mlm, soho.loss_mvm):
        logits = torch.zeros(0, 3, requires_grad=True)
        found = loss(logits, torch.zeros(0).long())
        found.backward()
        assert found.item() == 0 and logits.grad is not None


@pytest.mark.parametrize("task", soho.TASKS)
@torch.no_grad()
def test_losses_of_a_step(task):
    """Which outputs meet which labels, in a batch of several lengths and shapes."""
    model = network(task, mvm_temperature=0.2)
    rows = rows_of(model.cfg, B=6)
    out, found = model(rows), soho.losses(model.cfg, model(rows), rows)
    assert list(found) == LOSSES[task]

    def mean(logits, labels):
        return pytest.approx(-np.mean(log_softmax(logits.numpy())[np.arange(len(labels)), labels.numpy()]), abs=1e-5)

    if task == "pretrain":
        labels = rows["mlm_labels"][rows["mlm_labels"] >= 0]
        assert found["mlm"].item() == mean(out["mlm"], labels) and len(labels) > 1
        assert found["mvm"].item() == mean(out["mvm"] / 0.2, out["mvm_codes"]) and len(out["mvm"]) > 1
        assert found["itm"].item() == mean(out["itm"], rows["itm_labels"])
    elif task == "vqa":
        assert found["vqa"] == soho.loss_answers(out["logits"], rows["targets"])
    else:
        labels = rows["itm_labels"] if task == "retrieval" else rows["labels"]
        assert found[task if task != "retrieval" else "itm"].item() == mean(out["logits"], labels)
        assert out["logits"].shape == (len(labels), N_ANSWERS[task]) and len(labels.unique()) == 2


def test_what_pretraining_asks_of_which_states():
    """In training, by hand from the last states: words by the word embeddings; hidden cells by the codes as they have
    just been moved, though named by those before; ITM by the first slot."""
    model = network(vd_decay=0.5).train()
    rows, states, old = rows_of(model.cfg, B=6), [], model.dictionary.embed.clone()
    model.encoder[-1].register_forward_hook(lambda _, __, out: states.append(out))
    chosen = []
    model.dictionary.register_forward_hook(lambda _, given, out: chosen.append((given[0], out[1])))
    out, (x,), new = model(rows), states, model.dictionary.embed
    T = rows["ids"].size(1)
    assert not torch.equal(old, new)
    ((v, indices),) = chosen
    assert torch.equal(indices, torch.cdist(v, old).argmin(1))
    codes = indices.view(6, -1)
    cells = soho.valid_cells(rows["sizes"], rows["pixels"].shape[2:], soho.grid(rows["pixels"].shape[2:], model.cfg))
    is_hidden = cells.flatten(1) & (codes == codes.gather(1, rows["anchors"][:, None]))
    is_hidden &= (rows["mvm_counts"] & cells.flatten(1).gather(1, rows["anchors"][:, None])[:, 0])[:, None]
    hidden = x[:, T:][is_hidden]
    cosines = (hidden @ new.T) / hidden.norm(dim=1, keepdim=True) / new.norm(dim=1).clamp(min=1e-12)
    assert len(hidden) > 0 and torch.equal(out["mvm_codes"], codes[is_hidden])
    torch.testing.assert_close(out["mvm"], cosines)
    torch.testing.assert_close(out["mlm"], x[:, :T][rows["mlm_labels"] >= 0] @ model.text.word.weight.T)
    torch.testing.assert_close(out["itm"], x[:, 0] @ model.itm_head.weight.T)


# ---------------------------------------------------------------------------------------------------------------------
# The dictionary


def dictionary(seed=0, **changes):
    torch.manual_seed(seed)
    return soho.Dictionary(tiny(**changes))


@pytest.mark.parametrize("training", [True, False])
def test_gradients_pass_the_dictionary_as_if_it_were_not_there(training):
    """f(v) is the code, d f / d v the identity, and the codes get nothing. (Finite differences would find 0.)"""
    codes = dictionary(width=3).train(training)
    x = some(5, 3, seed=1).requires_grad_()
    codes.embed.requires_grad_(not training)
    f, indices = codes(x)
    torch.testing.assert_close(f, codes.embed[indices])
    jacobian = torch.stack([torch.autograd.grad(f.flatten()[i], x, retain_graph=True)[0] for i in range(15)])
    assert torch.equal(jacobian.view(15, 15), torch.eye(15))
    f.sum().backward()
    assert codes.embed.grad is None


def test_the_nearest_code_by_hand():
    codes, x = dictionary(width=3), some(50, 3, seed=2)
    by_hand = ((x.numpy()[:, None] - codes.embed.numpy()) ** 2).sum(2).argmin(1)
    assert codes.nearest(x).tolist() == by_hand.tolist() and len(set(by_hand)) > 4
    codes.embed.fill_(1.0)
    assert codes.nearest(x).unique().tolist() == [0], "of equal ones the first"


@pytest.mark.parametrize("rule", ["official", "paper"])
@pytest.mark.parametrize("decay", [0.4, 0.9])
def test_updates_by_hand(rule, decay):
    """Plain numpy over 40 steps, of batches of several sizes whose features wander."""
    ours, rng = dictionary(width=4, vd_update=rule, vd_decay=decay).train(), np.random.default_rng(0)
    d = ours.embed.numpy().astype(np.float64)
    N, M, in_all = np.zeros(K), np.zeros((K, 4)), np.zeros(K)
    for step in range(40):
        x = (rng.normal(size=(rng.integers(3, 30), 4)) + np.sin(step / 5)).astype(np.float32)
        choice = ((x[:, None] - d) ** 2).sum(2).argmin(1)
        f, indices = ours(torch.from_numpy(x))
        assert indices.tolist() == choice.tolist()
        for j in range(K):
            mine = x[choice == j].astype(np.float64)
            N[j] = decay * N[j] + (1 - decay) * len(mine)
            M[j] = decay * M[j] + (1 - decay) * mine.sum(0)
            in_all[j] += len(mine)
            if rule == "paper" and len(mine):
                d[j] = decay * d[j] + (1 - decay) * mine.mean(0)
        if rule == "official":
            d = M / ((N + 1e-5) / (N.sum() + K * 1e-5) * N.sum())[:, None]
        for buffer, by_hand in ((ours.embed, d), (ours.cluster_size, N), (ours.cluster_sum, in_all),
                                (ours.embed_avg, M), (f, d[choice])):  # fmt: skip
            np.testing.assert_allclose(buffer.numpy(), by_hand, atol=1e-5, rtol=1e-4)
        d = ours.embed.numpy().astype(np.float64)  # a tie must not be broken otherwise after many steps
    assert (in_all > 0).sum() > 1


def test_codes_that_nothing_chooses():
    """Under the official rule they are zero after one update, or shrink to it; under the paper's they stay."""
    far = torch.full((6, 3), 9.0)
    for rule in ("official", "paper"):
        codes = dictionary(width=3, vd_update=rule).train()
        first = codes.embed.clone()
        codes(far)
        (lone,) = codes.counts.nonzero()[:, 0].tolist()
        rest = torch.arange(K) != lone
        assert torch.equal(codes.embed[rest], first[rest] if rule == "paper" else torch.zeros(K - 1, 3))
        assert not torch.equal(codes.embed[lone], first[lone])
    codes = dictionary(width=3).train()
    codes.embed[:2] = torch.tensor([[1.0, 0, 0], [9, 9, 9]])
    codes(torch.cat([far, torch.tensor([[1.0, 0, 0]])]))
    norms = []
    for _ in range(40):
        codes(far)
        norms.append(codes.embed[0].norm().item())
    assert norms[0] > 0.9 and norms[-1] < 1e-3


def test_dead_codes_are_revived_where_asked():
    """At cells of the batch, with a moving count of 1, so that they do not vanish at once; those in use stay."""
    x = some(200, 3, seed=3) + 5
    for rule in ("official", "paper"):
        plain, revived = (dictionary(width=3, vd_update=rule, vd_revive=share).train() for share in (0.0, 0.5))
        plain(x), revived(x)
        used = plain.cluster_size >= 0.5
        assert 0 < used.sum() < K and torch.equal(plain.embed[used], revived.embed[used])
        assert torch.equal(plain.cluster_size[used], revived.cluster_size[used])
        fresh = revived.embed[~used]
        assert (fresh[:, None] == x).all(2).any(1).all() and len(fresh.unique(dim=0)) > 1
        assert (revived.cluster_size[~used] == 1).all() and torch.equal(revived.embed_avg[~used], fresh)
        revived(x)
        assert (revived.counts > 0).sum() > (plain.counts > 0).sum()
    assert soho.Config().vd_revive == 0.0


def test_the_dictionary_computes_in_float32_under_autocast():
    """Codes that bfloat16 cannot tell apart."""
    codes = dictionary(width=3).train()
    codes.embed.copy_(torch.linspace(1, 1.01, K)[:, None].expand(K, 3))
    x = codes.embed.clone()
    with torch.autocast("cpu", torch.bfloat16):
        f, indices = codes(x)
        assert indices.tolist() == list(range(K)) and f.dtype == torch.float32
        torch.testing.assert_close(f, x, atol=1e-4, rtol=0)
        assert codes(x.bfloat16())[0].dtype == torch.float32
        model = network().train()
        out = model(rows_of(model.cfg))
    assert out["mvm"].dtype == torch.float32 and model.dictionary.embed.isfinite().all()


def test_what_the_log_says_of_the_dictionary():
    codes = dictionary(width=3).train()
    codes.counts, codes.embed[5:] = torch.tensor([6.0, 3, 3, 0, 0, 0, 0, 0]), 0.0
    codes.embed[4, 0] = 0.0  # one zero makes no zero code
    told = {name: x.item() for name, x in codes.state().items()}
    p = np.array([0.5, 0.25, 0.25])
    assert told == {"codes": 3, "perplexity": pytest.approx(np.exp(-(p * np.log(p)).sum())), "zero_codes": 3}
    codes(some(20, 3)), codes(some(20, 3))
    assert codes.counts.sum() == 20, "of the last update, not of all"


@pytest.mark.parametrize("task", soho.TASKS)
@torch.no_grad()
def test_evaluation_moves_no_buffer(task):
    model = network(task, vd_mode="gate")
    before, batch = copy.deepcopy(model.state_dict()), loaded(task)
    model(rows_of(model.cfg))
    if task in soho.QUESTION_TASKS:
        model.answer_scores(batch)
    else:
        model.encode_images(batch)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    model.train()(rows_of(model.cfg))
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert {"dictionary.embed", "dictionary.cluster_size", "dictionary.embed_avg", "dictionary.cluster_sum",
            "project_norm.running_mean", "cnn.bn1.running_var", "mixer.gate_norm.running_mean"} <= moved  # fmt: skip


@pytest.mark.parametrize("mode", ["gate", "replace", "residual", "none"])
@torch.no_grad()
def test_what_the_tokens_are(mode):
    model = network(vd_mode=mode)
    rows = rows_of(model.cfg)
    seen = model.see(soho.normalise(rows["pixels"], rows["sizes"]), rows["sizes"])
    v, tokens = (seen[name].movedim(1, -1) for name in ("v", "tokens"))  # [B, h, w, D]
    assert ("codes" in seen) == (mode != "none") == hasattr(model, "dictionary")
    assert list(soho.losses(model.cfg, model(rows), rows)) == ["mlm", *["mvm"] * (mode != "none"), "itm"]
    if mode == "none":
        assert torch.equal(tokens, v)
        return
    f = model.dictionary.embed[seen["codes"]]
    if mode == "replace":
        torch.testing.assert_close(tokens, f, atol=1e-6, rtol=1e-6)
        assert not list(model.mixer.parameters())
        return
    line = model.mixer.line
    z = f @ line.weight.T + line.bias
    if mode == "residual":
        torch.testing.assert_close(tokens, z + v)
        assert len(list(model.mixer.parameters())) == 2
        return
    g = torch.cat([z, v], -1) @ model.mixer.gate.weight[:, :, 0, 0].T
    g = (g / math.sqrt(1 + 1e-5)).softmax(-1)  # the norm's first statistics are 0 and 1
    torch.testing.assert_close(tokens, g[..., :1] * z + g[..., 1:] * v)


def test_the_feature_of_a_cell_learns_through_the_codes_alone():
    """PAPER's replace: what comes after the dictionary moves the ResNet, as if it had seen the feature."""
    model = network(vd_mode="replace").train()
    rows = rows_of(model.cfg)
    soho.losses(model.cfg, model(rows), rows)["itm"].backward()
    assert model.cnn.conv1.weight.grad.abs().max() > 0
    assert "mixer" not in {name.split(".")[0] for name, _ in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Cells and places


@pytest.mark.parametrize("strides", ["2,2,1,2,2,2", "2,1,1,2,2,1", "2,2,1,2,2,1", "3,1,2,1,3,1", "1,1,1,1,1,1"])
@torch.no_grad()
def test_the_grid_is_what_the_network_gives(strides):
    """Also for sides that are no multiples of anything: each stride rounds up, the pool down."""
    model, rng = network(strides=strides, cnn_width=1), np.random.default_rng(0)
    for H, W in [(64, 96), (65, 67), *rng.integers(40, 130, (6, 2)).tolist()]:
        if min(soho.grid((H, W), model.cfg)) > 0:
            v = model.see(torch.zeros(1, 3, H, W), torch.tensor([[H, W]]))["v"]
            assert soho.grid((H, W), model.cfg) == v.shape[2:], (H, W)
    assert soho.grid((608, 1024), soho.Config()) == (9, 16)


def test_valid_cells_by_hand():
    """A cell counts where pixel floor(i H / h) is the picture's. OFFICIAL: the square mask, high pictures lose columns
    and wide ones keep those of the padding."""
    sizes, shape, cells = torch.tensor([[40, 96], [64, 33], [17, 32], [64, 96]]), (64, 96), (4, 6)
    for square in (False, True):
        found = soho.valid_cells(sizes, shape, cells, square)
        for b, (high, wide) in enumerate(sizes.tolist()):
            H, W = shape[0], shape[0] if square else shape[1]
            by_hand = [[i * H // 4 < high and j * W // 6 < wide for j in range(6)] for i in range(4)]
            assert found[b].tolist() == by_hand
    portrait = torch.tensor([[96, 60]]), (96, 64), (6, 4)
    assert soho.valid_cells(*portrait).all() and not soho.valid_cells(*portrait, True)[..., 3].any()
    landscape = torch.tensor([[64, 70]]), (64, 128), (4, 8)
    assert not soho.valid_cells(*landscape)[..., 5:].any() and soho.valid_cells(*landscape, True).all()


def test_the_square_mask_is_asked_for():
    assert not soho.Config().square_mask and not any("square_mask" in preset for preset in soho.PRESETS.values())
    rows = rows_of(tiny(), B=2, sizes=((64, 32), (32, 32)))
    seen = {square: network(square_mask=square).see(rows["pixels"] / 255, rows["sizes"]) for square in (False, True)}
    assert seen[False]["keep_mask"].sum((1, 2)).tolist() == [8, 4]
    assert seen[True]["keep_mask"].sum((1, 2)).tolist() == [4, 2]


def test_places_by_hand():
    keep = torch.zeros(2, 3, 4, dtype=torch.bool)
    keep[0, :2, :3], keep[1] = True, True
    width = 8
    found = soho.sine_positions(keep, width).numpy()
    for b, (h, w) in enumerate(((2, 3), (3, 4))):
        for i in range(h):
            for j in range(w):
                by_hand = []
                for place in ((i + 1) / h * 2 * math.pi, (j + 1) / w * 2 * math.pi):
                    for c in range(width // 2):
                        angle = place / 10000 ** (2 * (c // 2) / (width // 2))
                        by_hand.append(math.cos(angle) if c % 2 else math.sin(angle))
                np.testing.assert_allclose(found[b, :, i, j], by_hand, atol=1e-5)


@torch.no_grad()
def test_pixels_are_nought_beyond_the_picture():
    pixels, sizes = torch.randint(0, 256, (2, 3, 32, 64), generator=luck()).byte(), torch.tensor([[32, 40], [20, 64]])
    found = soho.normalise(pixels, sizes)
    for b, (h, w) in enumerate(sizes.tolist()):
        for c in range(3):
            by_hand = np.zeros((32, 64))
            by_hand[:h, :w] = (pixels[b, c, :h, :w].numpy() - soho.MEAN[c]) / soho.STD[c]
            np.testing.assert_allclose(found[b, c].numpy(), by_hand, atol=1e-5)


@torch.no_grad()
def test_cells_pool_norm_and_place_in_their_order():
    """OFFICIAL: the pool before the convolution; the mask vector before the place, the norm last."""
    model = network()
    rows = rows_of(model.cfg)
    images = soho.normalise(rows["pixels"], rows["sizes"])
    features = F.max_pool2d(model.cnn(images), 2)
    v = torch.einsum("bchw,dc->bdhw", features, model.project.weight[:, :, 0, 0])
    seen = model.see(images, rows["sizes"])
    torch.testing.assert_close(seen["v"], v / math.sqrt(1 + 1e-5))
    is_masked = torch.rand(6, 16, generator=luck()) < 0.5
    found = model.place(seen["tokens"], seen["keep_mask"], is_masked, 2)
    places = soho.sine_positions(seen["keep_mask"], D)
    for r in range(6):
        for n in range(16):
            x = model.mask_vector.weight[0] if is_masked[r, n] else seen["tokens"][r // 2, :, n // 4, n % 4]
            by_hand = F.layer_norm(x + places[r // 2, :, n // 4, n % 4], (D,), eps=1e-5)
            torch.testing.assert_close(found[r, n], by_hand, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees what


def alone(rows, b, task, k):
    """Sample b without the others and without any padding."""
    n = 2 if task == "nlvr2" else 1
    sizes = rows["sizes"].flatten(0, -2)[b * n : b * n + n]
    one = {name: x[b * k : b * k + k] if name not in ("pixels", "sizes") else x[b : b + 1] for name, x in rows.items()}
    H, W = sizes.amax(0).tolist()
    one["pixels"] = one["pixels"][..., :H, :W]
    T = int(one["keep_mask"].sum(1).max())
    return one | {name: one[name][:, :T] for name in {"ids", "keep_mask", "mlm_labels"} & set(one)}


@pytest.mark.parametrize("task, mode", [("pretrain", "gate"), ("pretrain", "replace"), ("retrieval", "none"),
                                        ("retrieval", "gate"), ("vqa", "none"), ("nlvr2", "residual"),
                                        ("ve", "gate")])  # fmt: skip
@torch.no_grad()
def test_neither_padding_nor_other_samples_matter(task, mode):
    """Each sample alone gives what it gives beside larger pictures and longer texts, with anything in the padding."""
    model = patchwise(task, vd_mode=mode, word_mask=0.8, mlm_on_negatives=True, mvm_on_negatives=True)
    k = {"retrieval": 4, "pretrain": 2}.get(task, 1)
    batch = loaded(task, k=2 if task == "pretrain" else 1, seed=6)
    rows = soho.rows_of(batch, TOK, model.cfg, luck(3))
    if task == "pretrain":
        rows["anchors"] = torch.zeros_like(rows["anchors"])  # the same cell, however wide the grid
    full = copy.deepcopy(rows)
    H, W = rows["pixels"].shape[-2:]
    high, wide = rows["sizes"][..., :1, None], rows["sizes"][..., 1:, None]
    inside = (torch.arange(H)[:, None] < high) & (torch.arange(W) < wide)
    assert not inside.all() and not rows["keep_mask"].all()
    full["pixels"] = torch.where(inside.unsqueeze(-3), full["pixels"], 77)
    full["ids"][~rows["keep_mask"]] = 9
    out, place = model(full), dict.fromkeys(("mlm", "mvm"), 0)
    for b in range(3):
        one = alone(rows, b, task, k)
        for name, x in model(one).items():
            if name in ("mlm", "mvm", "mvm_codes"):
                first = place.setdefault(name, 0)
                place[name] = first + len(x)
                mine = out[name][first : first + len(x)]
                assert len(x) > 0
            else:
                mine = out[name][b * k : b * k + k]
            torch.testing.assert_close(x, mine, atol=2e-5, rtol=1e-4, msg=f"{name} of {b}")
    if task == "pretrain":
        assert place["mlm"] == len(out["mlm"]) and place["mvm"] == len(out["mvm"])


@pytest.mark.parametrize("task", soho.TASKS)
@torch.no_grad()
def test_the_resnet_keeps_samples_apart(task):
    """In evaluation, another picture, whatever it shows, changes nothing; one's own picture and text change all."""
    model = network(task, vd_mode="residual")  # a random gate can close the way of the features
    rows = rows_of(model.cfg, seed=2)
    name, k = ("itm" if task == "pretrain" else "logits"), len(rows["ids"]) // len(rows["pixels"])
    before = model(rows)[name]
    pixels = rows["pixels"].clone()
    pixels[1] = 255 - pixels[1]
    ids = torch.where(torch.arange(len(rows["ids"]))[:, None] // k == 1, (rows["ids"] + 1) % V, rows["ids"])
    for changed in ({"pixels": pixels}, {"ids": ids}):
        moved = (model(rows | changed)[name] - before).abs().amax(1).view(3, k)
        assert moved[[0, 2]].max() < 1e-5 and moved[1].min() > 1e-4, moved


@torch.no_grad()
def test_what_is_hidden_reaches_no_output():
    """The identity of a masked word, and the feature of a hidden cell; seen ones do."""
    model = network()
    cfg, T = model.cfg, 7
    ids = torch.randint(4, V, (2, T), generator=luck())
    batch = {"image_id": ["a", "b"], "bad": [], **data.pad_pixels([torch.zeros(3, 64, 64).byte()] * 2, 32)}

    def out(ids):
        rows = soho.corrupt({**batch, **data.pad_captions(ids.tolist(), 1, 2, 0)}, TOK, cfg, luck(4))
        return rows, model(rows)

    rows, before = out(ids)
    is_masked = rows["ids"][:, 1:-1] == TOK.mask
    assert is_masked.any() and not is_masked.all()
    _, after = out(torch.where(is_masked, (ids + 1) % (V - 4) + 4, ids))
    assert all(torch.equal(before[name], after[name]) for name in ("mlm", "itm", "mvm"))
    _, after = out(torch.where(is_masked, ids, (ids + 1) % (V - 4) + 4))
    assert not torch.equal(before["itm"], after["itm"])
    tokens, keep = some(2, D, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    hidden = torch.rand(2, 16, generator=luck(1)) < 0.5
    loud = tokens + 5 * hidden.view(2, 1, 4, 4)
    assert torch.equal(model.place(tokens, keep, hidden), model.place(loud, keep, hidden))
    assert not torch.equal(model.place(tokens, keep, ~hidden), model.place(loud, keep, ~hidden))


@torch.no_grad()
def test_texts_of_a_picture_are_texts_of_its_copies():
    """R = k B rows of text with B pictures, and with the pictures repeated; each row sees its picture."""
    for task, k in (("pretrain", 2), ("retrieval", 4)):
        model = network(task, vd_mode="gate")
        rows = rows_of(model.cfg, k=2 if task == "pretrain" else 1)
        twice = rows | {name: rows[name].repeat_interleave(k, 0) for name in ("pixels", "sizes")}
        turned = rows | {name: rows[name].roll(1, 0) for name in ("pixels", "sizes")}
        before, after, wrong = model(rows), model(twice), model(turned)
        for name in before:
            torch.testing.assert_close(before[name], after[name], atol=1e-5, rtol=1e-5)
        name = "itm" if task == "pretrain" else "logits"
        assert (before[name] - wrong[name]).abs().amax(1).min() > 1e-4


@torch.no_grad()
def test_the_first_slot_alone_is_the_first_of_all():
    model = network("retrieval")
    rows = rows_of(model.cfg, B=2)
    x, visual = model.text(rows["ids"]), some(8, 5, D)
    keep = torch.rand(8, 5, generator=luck()) < 0.7
    every, first = (model.encode(x, rows["keep_mask"], visual, keep, n) for n in (None, 1))
    assert every.shape == (8, x.size(1) + 5, D) and first.shape == (8, 1, D)
    torch.testing.assert_close(first, every[:, :1])


@torch.no_grad()
def test_a_block_is_transformers_block():
    """Norms after the residual, the scale of attention, the exact gelu; a key that is padding is not asked."""
    model = network()
    block, x = model.encoder[0], some(2, 5, D)
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    q, k, v = (part.view(2, 5, 2, 8).transpose(1, 2) for part in F.linear(x, block.qkv.weight).chunk(3, -1))
    weight = (q @ k.transpose(2, 3) / math.sqrt(8)).masked_fill(~keep[:, None, None], -1e9).softmax(-1)
    y = F.layer_norm(x + F.linear((weight @ v).transpose(1, 2).flatten(2), block.out.weight), (D,), eps=1e-12)
    inner = F.linear(y, block.up.weight)
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    by_hand = F.layer_norm(y + F.linear(inner, block.down.weight), (D,), eps=1e-12)
    torch.testing.assert_close(block(x, keep[:, None, None]), by_hand, atol=1e-5, rtol=1e-5)


def test_a_text_longer_than_the_positions_says_so():
    with pytest.raises(UserError, match="25 tokens: there are 24 positions"):
        network().text(torch.zeros(1, 25).long())


@torch.no_grad()
def test_matching_with_what_was_made_once():
    """A gallery's log odds are those of the whole model, pair by pair; the texts are cleaned and cut like captions."""
    tok = language.Tokenizer.train(SAYS * 3, 200, "wordpiece")
    for task, mode in (("pretrain", "gate"), ("retrieval", "none")):
        torch.manual_seed(0)
        model = soho.SOHO(tiny(task, vocab_size=tok.vocab_size, vd_mode=mode), tok).eval()
        batch = loaded(task, sizes=((64, 64),))
        found = model.match(model.encode_images(batch), model.encode_texts(["A Red  dog runs.", SAYS[1]]))
        assert found.shape == (3, 2)
        for b in range(3):
            for m, text in enumerate(("a red dog runs", SAYS[1])):
                rows = {"pixels": batch["pixels"][b : b + 1], "sizes": batch["sizes"][b : b + 1]}
                rows |= data.pad_texts([[tok.encode(text)]], tok.bos, tok.eos, tok.pad)
                logits = model.answer_scores(rows)
                torch.testing.assert_close(found[b, m], logits[0, 1] - logits[0, 0], atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):  # in bf16 many of a gallery's would be equal
            odds = model.match(model.encode_images(batch), model.encode_texts(SAYS))
        assert odds.dtype == torch.float32 and not torch.equal(odds, odds.bfloat16().float())
        long = " ".join(["red dog"] * 20)
        assert torch.equal(model.encode_texts([long])[0], model.encode_texts([" ".join(["red dog"] * 6)])[0])
        picture = Image.fromarray(batch["pixels"][2].permute(1, 2, 0).numpy())
        match = [model.match(model.encode_images(model._look(picture)), model.encode_texts([text])).item()
                 for text in SAYS]  # fmt: skip
        score = [model.score(picture, text) for text in SAYS]
        assert score == pytest.approx([1 / (1 + math.exp(-x)) for x in match]) and len(set(score)) == len(SAYS)
        torch.testing.assert_close(match[1], found[2, 1].item(), atol=1e-5, rtol=1e-4)



# ---------------------------------------------------------------------------------------------------------------------
# Corruption


def test_hidden_cells_are_all_of_one_code():
    """All that have the anchor's code and belong to the picture, and none else; none where the anchor does not."""
    codes = torch.tensor([[3, 1, 3, 2, 3], [1, 1, 2, 1, 2], [5, 5, 5, 5, 5], [3, 1, 3, 2, 3]])
    keep = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    found = soho.same_code(codes, keep, torch.tensor([2, 0, 4, 0]), torch.tensor([True, True, True, False]))
    assert found.int().tolist() == [[1, 0, 1, 0, 0], [0] * 5, [1] * 5, [0] * 5]
    assert soho.same_code(codes[1:2], keep[1:2], torch.tensor([1]), torch.tensor([True])).int().tolist() == [
        [0, 1, 0, 1, 0]]  # fmt: skip


@torch.no_grad()
def test_what_a_pretraining_batch_asks():
    """Words and cells are hidden on mismatched pairs too, or [MASK] would tell; only matching ones are asked about,
    unless the switches say so. The labels are of the text that is shown."""
    batch, told = loaded(B=40, k=2), {}
    for on in (False, True):
        cfg = tiny(mlm_on_negatives=on, mvm_on_negatives=on)
        told[on] = soho.corrupt(batch, TOK, cfg, luck())
    rows, every = told[False], told[True]
    for name in ("ids", "keep_mask", "itm_labels", "anchors", "has_mvm"):
        assert torch.equal(rows[name], every[name]), "the same luck"
    matches, R = rows["itm_labels"] > 0, 80
    assert 20 < matches.sum() < 60 and rows["has_mvm"].all()
    assert torch.equal(rows["mvm_counts"], matches) and every["mvm_counts"].all()
    asked, asked_everywhere = (x["mlm_labels"] != NOTHING for x in (rows, every))
    assert torch.equal(asked, asked_everywhere & matches[:, None])
    is_word = rows["keep_mask"] & (every["ids"] != TOK.bos) & (every["ids"] != TOK.eos)
    for which in (matches, ~matches):
        share = asked_everywhere[which].sum() / is_word[which].sum()
        assert share == pytest.approx(0.5, abs=0.08)
        assert ((rows["ids"] == TOK.mask).sum(1)[which] > 0).float().mean() > 0.8
    assert not asked_everywhere[~rows["keep_mask"]].any() and not asked_everywhere[:, 0].any()
    ids, keep = data.whole_captions(batch, TOK.pad)
    for r in range(R):
        shown = torch.where(asked_everywhere[r], every["mlm_labels"][r], rows["ids"][r])
        source = [s for s in range(R) if torch.equal(shown, ids[s]) and torch.equal(rows["keep_mask"][r], keep[s])]
        assert source and (r in source) == bool(matches[r])
        assert matches[r] or any(s % 2 == 0 and s // 2 != r // 2 for s in source), "a first text of another picture"
    fewer = soho.corrupt(batch, TOK, tiny(mlm_on_negatives=True), luck())
    assert torch.equal(fewer["mlm_labels"], every["mlm_labels"]) and torch.equal(fewer["mvm_counts"], matches)
    assert torch.equal(rows["pixels"], batch["pixels"]) and torch.equal(rows["sizes"], batch["sizes"])


def test_a_cell_for_the_batch_and_a_coin_for_each_text():
    """From the generator alone; every cell of the grid can be the anchor."""
    batch, cfg = loaded(B=4, k=250), tiny(mvm_prob=0.15, mismatched=0.3, word_mask=0.2)
    rows = [soho.corrupt(batch, TOK, cfg, luck(seed)) for seed in range(60)]
    assert all(x["anchors"].shape == (1000,) and len(x["anchors"].unique()) == 1 for x in rows)
    anchors = {x["anchors"][0].item() for x in rows}
    assert anchors <= set(range(16)) and {0, 15} <= anchors
    assert torch.stack([x["has_mvm"] for x in rows]).float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert 1 - torch.stack([x["itm_labels"] for x in rows]).float().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.manual_seed(99)
    again = soho.corrupt(batch, TOK, cfg, luck(7))
    assert all(torch.equal(again[name], rows[7][name]) for name in again)
    assert not torch.equal(rows[7]["has_mvm"], rows[8]["has_mvm"]) and not torch.equal(rows[7]["ids"], rows[8]["ids"])


def test_mismatched_texts_are_another_pictures():
    """Never the same picture's, also where it is twice in the batch; with one picture alone all pairs match."""
    ids, keep = torch.arange(40)[:, None].repeat(1, 3), torch.rand(40, 3, generator=luck()) < 0.5
    numbers = torch.tensor([0, 1, 2, 0, 1, 3, 3, 0, 4, 5]).repeat_interleave(4)
    is_replaced, sources = torch.arange(40) % 3 > 0, set()
    for seed in range(20):
        found, kept, labels = soho.mismatch(ids, keep, numbers, 4, is_replaced, luck(seed))
        assert torch.equal(labels, (~is_replaced).long())
        source = found[:, 0]
        assert torch.equal(source[~is_replaced], torch.arange(40)[~is_replaced]) and torch.equal(kept, keep[source])
        assert (numbers[source] != numbers)[is_replaced].all() and (source[is_replaced] % 4 == 0).all()
        sources |= set(source[is_replaced].tolist())
    assert len(sources) == 10
    found, _, labels = soho.mismatch(ids[:8], keep[:8], torch.zeros(8).long(), 4, torch.ones(8).bool(), luck())
    assert torch.equal(found, ids[:8]) and labels.all()


def test_rows_of_retrieval():
    """Each picture beside its text first, then beside texts of others; nothing is masked."""
    batch, cfg = loaded("retrieval", B=4), tiny("retrieval", negatives=3)
    batch["image_id"] = ["a", "b", "a", "c"]
    rows = soho.rows_of(batch, TOK, cfg, luck())
    ids, keep = data.whole_captions(batch, TOK.pad)
    assert rows["itm_labels"].view(4, 4).tolist() == [[1, 0, 0, 0]] * 4
    assert torch.equal(rows["ids"][::4], ids) and torch.equal(rows["keep_mask"][::4], keep)
    for r in range(16):
        (source,) = [s for s in range(4) if torch.equal(rows["ids"][r], ids[s])]
        assert torch.equal(rows["keep_mask"][r], keep[source])
        assert r % 4 == 0 or batch["image_id"][source] != batch["image_id"][r // 4]
    assert set(rows) == {"pixels", "sizes", "ids", "keep_mask", "itm_labels"}
    assert len(soho.rows_of(batch, TOK, tiny("retrieval", negatives=1), luck())["ids"]) == 8


@pytest.mark.parametrize("task, label", [("vqa", "targets"), ("nlvr2", "labels"), ("ve", "labels")])
def test_rows_of_questions(task, label):
    batch = loaded(task)
    rows = rows_of(tiny(task))
    assert set(rows) == {"pixels", "sizes", "ids", "keep_mask", label}
    assert all(torch.equal(rows[name], batch[name]) for name in rows)


# ---------------------------------------------------------------------------------------------------------------------
# What is frozen, gradients, optimizers


@pytest.mark.parametrize("stages", [0, 1, 2, 4])
def test_frozen_stages(stages):
    """No gradient, norms with the statistics that were loaded, in no optimizer; the rest learns."""
    model = network(frozen_stages=stages).train()
    frozen = ["conv1", "bn1", *(f"layer{s + 1}" for s in range(stages))] if stages else []
    before = copy.deepcopy(model.cnn.state_dict())
    rows = rows_of(model.cfg)
    optimizer = soho.Optimizers(model.cfg, model)
    sum(soho.losses(model.cfg, model(rows), rows).values()).backward()
    optimizer.step(1.0, 1)
    grouped = {id(p) for one in optimizer.both for group in one.param_groups for p in group["params"]}
    for name, p in model.cnn.named_parameters():
        is_frozen = name.split(".")[0] in frozen
        assert p.requires_grad != is_frozen and (id(p) in grouped) != is_frozen
    for name, module in model.cnn.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (name.split(".")[0] not in frozen), name
    for name, x in model.cnn.state_dict().items():
        assert torch.equal(x, before[name]) == (name.split(".")[0] in frozen), name
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("stages", [0, 1])
@pytest.mark.parametrize("cnn_optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("task", soho.TASKS)
def test_every_parameter_gets_a_gradient_and_one_optimizer_group(task, cnn_optimizer, stages):
    model = network(task, cnn_optimizer=cnn_optimizer, frozen_stages=stages, lr=0.3, cnn_lr=0.2).train()
    rows = rows_of(model.cfg, B=6)
    sum(soho.losses(model.cfg, model(rows), rows).values()).backward()
    lost = {name for name, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or p.grad.abs().max() < 1e-9)}  # fmt: skip
    assert not lost
    groups = {}
    for optimizer in soho.Optimizers(model.cfg, model).both:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in groups
                groups[id(p)] = (type(optimizer).__name__, group["lr"])
    for name, p in model.named_parameters():
        is_cnn = name.startswith("cnn.")
        wanted = ("SGD" if is_cnn and cnn_optimizer == "sgd" else "AdamW", 0.2 if is_cnn else 0.3)
        assert groups.get(id(p)) == (wanted if p.requires_grad else None), name


def test_an_optimizer_goes_on_where_it_stopped():
    """Its state, for both kinds; and one kind's state is not taken for the other's."""
    for kind in ("sgd", "adamw"):
        found = []
        for stops in (False, True):
            model = network(cnn_optimizer=kind, cnn_lr=0.01)
            optimizer = soho.Optimizers(model.cfg, model)
            for step in range(4):
                if stops and step == 2:
                    state = copy.deepcopy(optimizer.state_dict())
                    optimizer = soho.Optimizers(model.cfg, model)
                    optimizer.load_state_dict(state)
                rows = rows_of(model.cfg, seed=step)
                sum(soho.losses(model.cfg, model(rows), rows).values()).backward()
                optimizer.step(0.5, step + 1)
            found.append(model.state_dict())
        assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_new_weights():
    model = network("vqa", width=64, init_std=0.05, vocab_size=400, vd_mode="gate")
    assert model.text.word.weight.std().item() == pytest.approx(0.05, abs=0.002)
    assert model.encoder[0].qkv.weight.std().item() == pytest.approx(0.05, abs=0.003)
    assert model.mixer.line.weight.std().item() == pytest.approx(0.05, abs=0.003)
    assert model.cnn.layer2[0].conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (8 * 9)), rel=0.15)
    assert model.project.weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    assert model.answer_head[0].weight.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert model.dictionary.embed.std().item() == pytest.approx(1.0, abs=0.1)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            is_scale = name.endswith("weight")
            assert (p == float(is_scale)).all(), name


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def run(*argv):
    papers.run("soho", *papers.toy("soho", "--word-steps", 0, *argv))


def loop_config(folder, **changes):
    flags = dict(
        positions=64, max_len=30, vocab_size=400, short_side=32, long_side=32, batch=20, captions_per_image=2, lr=0.003,
        cnn_lr=0.01, train_scenes=40, val_items=1, test_scenes=2, steps=3, eval_every=3, log_every=1, dropout=0.1,
        warmup=0.4, drops="0.6", grad_clip=1.0, gallery=2, out=str(folder), workers=0, device="cpu", init_std=0.1,
    )  # fmt: skip
    return tiny(**{**flags, **changes})


def by_hand(cfg, model, batches):
    """The steps of pre-training, written once more without processes and logs."""
    parts = {is_cnn: [p for name, p in model.named_parameters() if name.startswith("cnn.") == is_cnn]
             for is_cnn in (True, False)}  # fmt: skip
    sgd = torch.optim.SGD(parts[True], lr=1.0, momentum=0.9, weight_decay=cfg.cnn_decay)
    adam = torch.optim.AdamW(parts[False], lr=1.0, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay)
    for step, batch in enumerate(batches):
        share = common.schedule(cfg, step)
        sgd.param_groups[0]["lr"], adam.param_groups[0]["lr"] = cfg.cnn_lr * share, cfg.lr * share
        adam.param_groups[0]["eps"] = 1e-6 / math.sqrt(1 - cfg.beta2 ** (step + 1))
        model.train()
        seed = cfg.seed * 1_000_003 + step
        torch.manual_seed(seed + 2**31)
        rows = soho.corrupt(batch, model.tokenizer, cfg, luck(seed))
        pieces = [rows]
        if cfg.micro_batch:
            n, k = len(rows["pixels"]), len(rows["ids"]) // len(rows["pixels"])
            per = cfg.micro_batch // k
            pieces = [{name: x[a * len(x) // n : (a + per) * len(x) // n] for name, x in rows.items()}
                      for a in range(0, n, per)]  # fmt: skip
        for piece in pieces:
            (sum(soho.losses(cfg, model(piece), piece).values()) / len(pieces)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in (sgd, adam):
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("changes", [{}, {"micro_batch": 4, "grad_clip": 1e9}])
def test_training_is_the_step_as_the_paper_tells_it(tmp_path, changes):
    """Updates, rates, pieces: the loop's weights and codes are those of a loop written down from the paper."""
    cfg = loop_config(tmp_path / "r", **changes)
    machine, corpus = common.start_machine(cfg), soho.load_data(cfg)
    model = soho.build(cfg, corpus)
    other = copy.deepcopy(model)
    made = common.Run.create("soho", cfg, machine)
    soho.train(cfg, model, corpus, machine, made)
    samples = soho.samples_of(cfg, other, corpus, corpus.splits["train"], train=True)
    by_hand(cfg, other, data.train_loader(samples, 10, steps=3, seed=cfg.seed))
    for (name, x), y in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-3, msg=name)
    records = [r for r in common.read_log(made.path / "log.jsonl") if "lr" in r]
    assert list(records[0])[1:8] == ["mlm", "mvm", "itm", "codes", "perplexity", "zero_codes", "lr"]
    assert [r["lr"] for r in records] == [pytest.approx(0.003 * common.schedule(cfg, step)) for step in range(3)]
    assert len({r["lr"] for r in records}) > 1


def test_the_resnet_is_frozen_for_a_share_of_the_steps(tmp_path, monkeypatch):
    """PAPER: while the dictionary is still random. Weights and statistics stay, then they move; the rest learns."""
    cfg, told = loop_config(tmp_path / "r", freeze_cnn=0.5, steps=4, eval_every=4, vd_mode="gate"), []
    machine, corpus = common.start_machine(cfg), soho.load_data(cfg)
    model, step = soho.build(cfg, corpus), soho.Optimizers.step

    def spy(self, share, number):
        step(self, share, number)
        told.append({name: x.clone() for name, x in model.state_dict().items()})

    monkeypatch.setattr(soho.Optimizers, "step", spy)
    told.append({name: x.clone() for name, x in model.state_dict().items()})
    soho.train(cfg, model, corpus, machine, common.Run.create("soho", cfg, machine))
    for number, (before, after) in enumerate(zip(told, told[1:], strict=False)):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        of_cnn = {name for name in after if name.startswith("cnn.")}
        assert (not moved & of_cnn) if number < 2 else of_cnn <= moved
        assert {"project.weight", "encoder.0.qkv.weight", "dictionary.embed"} <= moved


def rows_for_pieces(B, k):
    return {"pixels": torch.arange(B), "ids": torch.arange(B * k)}


def test_pieces_are_as_many_everywhere(monkeypatch):
    """Each process cuts its rows at pictures; one that has fewer of them cuts smaller pieces, or all cut fewer."""
    (whole,) = data.equal_pieces(rows_for_pieces(5, 2), 0)
    assert torch.equal(whole["ids"], torch.arange(10))
    for B, k, pairs, others, n in ((6, 2, 4, [], 3), (5, 2, 4, [], 3), (5, 2, 4, [(6, 3)], 3), (5, 1, 1, [(6, 6)], 5),
                                   (6, 1, 2, [(2, 1)], 2), (3, 4, 1, [], 3), (4, 2, 4, [(6, 3)], 3)):  # fmt: skip
        monkeypatch.setattr(data, "gather_lists", lambda own, others=others: own + others)
        pieces = data.equal_pieces(rows_for_pieces(B, k), pairs)
        assert len(pieces) == n, (B, k, pairs, others)
        assert torch.equal(torch.cat([piece["pixels"] for piece in pieces]), torch.arange(B))
        assert torch.equal(torch.cat([piece["ids"] for piece in pieces]), torch.arange(B * k))
        for piece in pieces:
            assert len(piece["pixels"]) > 0 and (piece["ids"] // k).unique().tolist() == piece["pixels"].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

FEATURES = [some(n, 4, seed=n) for n in (30, 20, 25)]  # of the dictionary's steps, over both processes


def own_pictures(folder):
    """Twelve small pictures with texts, one of which cannot be read."""
    rows = []
    for i in range(14):
        image = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        split = "train" if i < 12 else "val" if i == 12 else "test"
        rows.append({"image": f"{i}.png", "captions": [SAYS[i % 6], f"number {i}"], "split": split})
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))


def one_of_two(rank, folder, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    before = []
    share = common.share_buffers

    def spy(model):  # where the loop saves a checkpoint
        before.append({name: x.clone() for name, x in model.named_buffers()})
        share(model)
        before.append({name: x.clone() for name, x in model.named_buffers()})

    common.share_buffers = spy
    pieces, cut = [], data.equal_pieces
    data.equal_pieces = lambda rows, pairs: pieces.append((len(rows["pixels"]), len(got := cut(rows, pairs)))) or got
    flags = "--preset tiny --batch 12 --captions-per-image 1 --micro-batch 2 --steps 2 --no-official --word-steps 0"
    run("--data", folder / "own.jsonl", "--out", folder / "run", *flags.split())
    told = {"buffers": before, "pieces": pieces}
    for rule, revive in (("official", 0.0), ("paper", 0.0), ("official", 0.5)):
        codes = dictionary(width=4, vd_update=rule, vd_revive=revive).train()
        torch.manual_seed(rank)
        found = [codes(x[rank::2]) for x in FEATURES]
        told[rule, revive] = found, codes.state_dict(), codes.counts
    torch.save(told, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found: a run that meets an unreadable picture, and the dictionary alone."""
    folder = tmp_path_factory.mktemp("two")
    own_pictures(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, processes = time.monotonic(), mp.spawn(one_of_two, args=(folder, port), nprocs=2, join=False)
    while not processes.join(1):
        if time.monotonic() > started + 300:  # each waits for the other
            for process in processes.processes:
                process.kill()
            pytest.fail("two processes hang")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_the_dictionary_of_two_processes_is_that_of_one(two):
    for rule in ("official", "paper"):
        codes = dictionary(width=4, vd_update=rule).train()
        joined = [codes(torch.cat([x[0::2], x[1::2]])) for x in FEATURES]
        for rank, told in enumerate(two):
            found, state, counts = told[rule, 0.0]
            for x, y in zip(codes.state_dict().values(), state.values(), strict=True):
                torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)
            assert torch.equal(counts, codes.counts)
            for x, (f, indices), (one, by_one) in zip(FEATURES, found, joined, strict=True):
                mine = slice(0, len(x[0::2])) if rank == 0 else slice(len(x[0::2]), None)
                assert torch.equal(indices, by_one[mine])
                torch.testing.assert_close(f, one[mine], atol=1e-6, rtol=1e-5)


def test_revived_codes_are_the_same_on_every_process(two):
    """Though each draws from its own luck and cells."""
    first, second = (told["official", 0.5][1] for told in two)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed"], two[0]["official", 0.0][1]["embed"])


def test_statistics_are_each_processs_own_until_a_checkpoint(two):
    """OFFICIAL: BatchNorm's are per GPU; what is saved are those of the first. The codes agree all along."""
    (before, after), (before2, after2) = (told["buffers"][-2:] for told in two)
    for name in before:
        is_norms = "running" in name
        assert torch.equal(before[name], before2[name]) != is_norms, name
        assert torch.equal(after[name], before[name]) and torch.equal(after2[name], before[name]), name
    assert sum("running" in name for name in before) > 10


def test_an_unreadable_picture_on_one_process_stops_nobody(two):
    """That process has fewer pictures, and cuts them into as many pieces."""
    first, second = (told["pieces"] for told in two)
    assert [n for _, n in first] == [n for _, n in second] == [3, 3]
    assert [{B, other} for (B, _), (other, _) in zip(first, second, strict=True)] == [{5, 6}, {5, 6}]


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def test_one_batch_is_learned_by_heart():
    """Words and pairs are told, and the pictures are what tells them: every pair shows the same words."""
    tok = language.Tokenizer.train(SAYS * 3, 200, "wordpiece")
    torch.manual_seed(0)
    cfg = tiny(vocab_size=tok.vocab_size, cnn_width=8, width=32, mlp=64, init_std=0.1, mvm_prob=0.3, word_mask=0.4,
               cnn_optimizer="adamw", cnn_lr=3e-3, lr=3e-3, codes=16)  # fmt: skip
    model, batch = soho.SOHO(cfg, tok), loaded(B=6, k=2)
    batch |= data.pad_captions([tok.encode(text) for text in SAYS for _ in range(2)], tok.bos, tok.eos, tok.pad)
    rows = soho.corrupt(batch, tok, cfg, luck(2))
    assert 3 < rows["itm_labels"].sum() < 9
    rows["ids"][:] = rows["ids"][0]  # what is asked differs, what is read does not
    rows["keep_mask"][:] = rows["keep_mask"][0]
    rows["ids"][1::2] = rows["ids"][1::2].roll(1, 1)
    optimizer, told = soho.Optimizers(cfg, model), []
    for step in range(120):
        model.train()
        found = soho.losses(cfg, model(rows), rows)
        sum(found.values()).backward()
        optimizer.step(1.0 - step / 120, step + 1)
        told.append({name: loss.item() for name, loss in found.items()})
    assert told[0]["mlm"] > 2 and told[0]["itm"] > 0.3
    assert told[-1]["mlm"] < 0.15 and told[-1]["itm"] < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# Weights of others


def official(task="pretrain", **changes):
    """A model, and its weights as researchmm/soho's checkpoints hold them. Heads are 64 wide there."""
    model = network(task, **{"width": 64, "heads": 1, "square_mask": True, "seed": 3, **changes})
    names, state = soho.official_names(model), {}
    for ours, x in model.state_dict().items():
        if ours.endswith("num_batches_tracked"):
            state["backbone.bn1.num_batches_tracked"] = x
        else:
            state |= dict(zip(names[ours], x.chunk(len(names[ours])), strict=True))
    if task == "pretrain":
        state["mask_l_fc.weight"] = state["language.bert.embeddings.word_embeddings.weight"]
    return model, state


def wrapped(state):
    return {"state_dict": {f"module.{name}": x for name, x in state.items()}, "meta": {"epoch": 40}}


def equal_state(model, other, named=""):
    ours = {name: x for name, x in model.state_dict().items() if name.startswith(named) and "num_batches" not in name}
    return bool(ours) and all(torch.equal(x, other.state_dict()[name]) for name, x in ours.items())


@pytest.mark.parametrize("source, mode", [("pretrain", "gate"), ("pretrain", "residual"), ("vqa", "none")])
def test_official_checkpoints_go_into_every_task(source, mode):
    """What both have is the checkpoint's; what the task alone has stays as it was made; both are said."""
    model, state = official(source, vd_mode=mode)
    assert soho.official_sizes(state) == {
        "vocab_size": V, "positions": 24, "width": 64, "heads": 1, "mlp": 24, "layers": 2, "depth": 10, "cnn_width": 4,
        "vd_mode": mode, "square_mask": True, **({"codes": K} if source == "pretrain" else {})}  # fmt: skip
    for task in soho.TASKS:
        for their_mode in {mode, "none"}:
            other = network(task, 1, width=64, heads=1, vd_mode=their_mode)
            before = copy.deepcopy(other.state_dict())
            told = soho.load_official(other, wrapped(state))
            for name, x in other.state_dict().items():
                kept = name not in model.state_dict() or name.endswith("num_batches_tracked")
                kept |= name.startswith("answer_head.") and task != source  # its classes are others
                assert torch.equal(x, (before if kept else model.state_dict())[name]), name
            fresh = {name.split(".")[0] for name in before} - {name.split(".")[0] for name in model.state_dict()}
            fresh |= {"answer_head"} if task in ("nlvr2", "ve") else set()
            assert told.startswith("the authors' SOHO: has ") and ("new here" in told) == bool(fresh)
            assert all(name in told.partition("new here")[2] for name in fresh)


def test_official_weights_that_do_not_fit_are_refused():
    model, state = official()

    def changed(**more):
        return {name: x for name, x in {**state, **more}.items() if x is not None}

    for wrong, told in (
        (changed(mystery=torch.zeros(1)), "unknown in the file: mystery"),
        (changed(**{"neck.unknown.weight": torch.zeros(1)}), "unknown in the file: neck.unknown.weight"),
        (changed(**{"neck.gate_fc.bn.weight": None}), "missing in the file: neck.gate_fc.bn.weight"),
        (changed(**{"neck.ln.bias": torch.zeros(3)}), r"visual_norm.bias: \(3,\) in the file, \(64,\) here"),
        (changed(**{"language.bert.encoder.layer.2.output.dense.bias": torch.zeros(64)}), "unknown in the file: lang"),
    ):
        other = network("pretrain", 1, width=64, heads=1)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(UserError, match=told):
            soho.load_official(other, wrong)
        assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items()), "nothing was changed"
    with pytest.raises(UserError, match="no checkpoint of the authors' SOHO: it begins with a, b"):
        soho.official_sizes({"a": 1, "b": 2})
    with pytest.raises(UserError, match="a ResNet with stages of"):
        soho.official_sizes(changed(**{"backbone.layer1.1.conv1.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match="no ResNet of torchvision's; its first keys are x"):
        soho.cnn_sizes({"x": torch.zeros(1)})


@pytest.mark.parametrize("depth", [18, 50])
@torch.no_grad()
def test_resnets_of_torchvision(depth):
    """The same features from the same weights under the same names; the classifier is left out."""
    import torchvision

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5 * name.endswith("var"))
    state = theirs.state_dict()
    assert soho.cnn_sizes(state) == {"depth": depth, "cnn_width": 64}
    model = network(depth=depth, cnn_width=64, strides=soho.Config.strides, frozen_stages=1)
    before = copy.deepcopy(model.state_dict())
    told = soho.load_backbones(model, wrapped(state), None)
    assert "has cnn" in told and "text" in told.partition("new here")[2]
    assert equal_state(SimpleNamespace(state_dict=lambda: before), model, "encoder.")
    x = some(1, 3, 96, 64)
    by_theirs = nn.Sequential(*list(theirs.children())[:-2])(x)
    found = model.cnn(x)
    assert found.shape == (1, 512 if depth == 18 else 2048, 3, 2)
    torch.testing.assert_close(found, by_theirs, atol=1e-4, rtol=1e-4)
    assert not model.cnn.train().bn1.training and model.cnn.layer2[0].bn1.training


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A directory as transformers writes it, and the model."""
    from transformers import BertConfig, BertModel

    letters = sorted({char for text in SAYS for char in text if char != " "})
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{char}" for char in letters)]
    torch.manual_seed(0)
    theirs = BertModel(BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                                  intermediate_size=24, max_position_embeddings=40)).eval()  # fmt: skip
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    folder = tmp_path_factory.mktemp("bert")
    theirs.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words))
    return folder, theirs, len(words)


@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_from_bert(bert, layers):
    """The same states of a text alone; the first layers where it has more than ours; old names of its norms."""
    folder, theirs, n = bert
    corpus = data.Corpus("x", {"train": [1]})
    cfg = tiny(bert=str(folder), tokenizer="none", layers=layers, positions=24, heads=4)
    model = soho.build(cfg, corpus).eval()
    assert (cfg.width, cfg.heads, cfg.mlp, cfg.positions, cfg.vocab_size, cfg.layers) == (16, 2, 24, 40, n, layers)
    assert model.tokenizer.mask == 4 and "cnn" in corpus.notes[-1].partition("new here")[2]
    ids = torch.randint(5, n, (2, 7), generator=luck())
    keep = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    wanted = theirs(ids, attention_mask=keep.long(), output_hidden_states=True).hidden_states[layers]
    nothing = some(2, 3, 16), torch.zeros(2, 3, dtype=torch.bool)
    found = model.encode(model.text(ids), keep, *nothing)[:, :7]
    torch.testing.assert_close(found[keep], wanted[keep], atol=1e-4, rtol=1e-4)
    old = {"bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
           for name, x in weights.read_weights(str(folder))[1].items()}  # fmt: skip
    again = soho.SOHO(cfg, TOK)
    soho.load_backbones(again, None, old | {"bert.embeddings.position_ids": torch.arange(40),
                                            "cls.predictions.bias": torch.zeros(n)})  # fmt: skip
    assert equal_state(model, again, "encoder.") and equal_state(model, again, "text.")
    with pytest.raises(UserError, match="unknown in the file: language.bert.mystery"):
        soho.load_backbones(again, None, old | {"mystery": torch.zeros(1)})


@pytest.mark.parametrize("depth, layers, millions, entries", [(18, 3, 57.27, 196), (101, 3, 89.77, 700)])
def test_sizes_of_the_released_models(depth, layers, millions, entries):
    """Parameters, the tied word embedding counted once; entries with its second name and with the counts of norms."""
    with torch.device("meta"):
        model = soho.SOHO(soho.Config(depth=depth, layers=layers), TOK)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    names = [name for several in soho.official_names(model).values() for name in several]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(names) == len(set(names)) and len(names) + 1 + norms == entries


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

QUICK = ("--val-items", 4, "--test-scenes", 6, "--steps", 1)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    run("--out", folder, *QUICK)
    return folder


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
    """Task -> a run of it that began with the pre-trained one."""
    made = {}

    def of(task):
        if task not in made:
            made[task] = tmp_path_factory.mktemp("runs") / task
            run("--task", task, "--init", pretrained, "--out", made[task], *QUICK, "--lr", 1e-9, "--cnn-lr", 1e-9,
                "--train-scenes", 200 if task == "vqa" else 40)  # fmt: skip
        return made[task]

    return of


@pytest.mark.parametrize("task, metric", [("retrieval", "R@1"), ("vqa", "vqa_accuracy"), ("nlvr2", "nlvr2_accuracy")])
def test_a_downstream_run_begins_with_pretraining(tuned, pretrained, task, metric):
    folder = tuned(task)
    metrics, records = read(folder / "metrics.json"), common.read_log(folder / "log.jsonl")
    steps = [r for r in records if "lr" in r]
    assert len(steps) == 0 or list(steps[0])[1:3] == [LOSSES[task][0], "lr"]
    assert metrics["model"] == "soho" and metrics["task"] == task and metrics["protocol"]["best_by"] == metric
    assert metric in metrics["splits"]["test"]["metrics"] and read(folder / "config.json")["vd_mode"] == "none"
    (note,) = [note for note in metrics["protocol"]["notes"] if "has " in note]
    assert "encoder" in note and all(part in note.partition("not used")[2] for part in ("dictionary", "mixer"))
    assert ("answer_head" in note.partition("new here")[2]) == (task != "retrieval")
    mine, before = (soho.SOHO.from_run(str(path)) for path in (folder, pretrained))
    for part in ("encoder.", "project.", "text.", "cnn.conv1", "visual_norm."):
        for name, x in mine.state_dict().items():
            if name.startswith(part):
                torch.testing.assert_close(x, before.state_dict()[name], atol=1e-6, rtol=1e-4)


def test_pretraining_tells_of_its_dictionary(pretrained):
    test = read(pretrained / "metrics.json")["splits"]["test"]["metrics"]
    assert 0 < test["codes_used"] <= 1 and "R@1" in test
    model = soho.SOHO.from_run(str(pretrained))
    corpus, chosen = soho.load_data(model.cfg), set()
    for item in corpus.splits["test"]:
        batch = model._look(item.image)
        seen = model.see(soho.normalise(batch["pixels"], batch["sizes"]), batch["sizes"])
        chosen |= set(seen["codes"].flatten().tolist())
    assert test["codes_used"] == len(chosen) / model.cfg.codes


def test_entailment_needs_the_full_world(tmp_path):
    flags = ("--task", "ve", "--out", tmp_path / "r", *QUICK)
    with pytest.raises(UserError, match="no hypothesis is neutral: add --world full"):
        run(*flags)
    run(*flags, "--world", "full")
    assert "ve_accuracy" in read(tmp_path / "r" / "metrics.json")["splits"]["test"]["metrics"]


def test_verbs_of_users(tuned, pretrained, capsys, tmp_path):
    """--score and --ask and the same from Python."""
    def said(*argv):
        soho.main([*map(str, argv), "--device", "cpu"])
        return capsys.readouterr().out

    model, asked = (soho.SOHO.from_run(str(path)) for path in (pretrained, tuned("vqa")))
    assert not model.training
    score = model.score("test:3", "A red circle.")
    assert 0 < score < 1 and isinstance(score, float) and score != model.score("test:4", "A red circle.")
    assert said("--score", "test:3", "A red circle.", "a cat", "--init", pretrained).splitlines() == [
        f"{score:.3f}  A red circle.", f"{model.score('test:3', 'a cat'):.3f}  a cat"]  # fmt: skip
    Image.new("RGB", (50, 20), "red").save(tmp_path / "red.png")
    assert 0 < soho.SOHO.from_run(str(tuned("retrieval"))).score(tmp_path / "red.png", "a cat") < 1
    answers, question = read(tuned("vqa") / "answers.json"), "How many circles are there?"
    assert list(asked.answers) == answers and asked.answer("test:1", question) in answers
    assert said("--ask", "test:1", question, "--init", tuned("vqa")) == (
        f"{question}  {asked.answer('test:1', question)}\n")  # fmt: skip
    for argv, told in (
        (["--caption", "test:3", "--init", pretrained], "gives no captions"),
        (["--score", "test:3", "x", "--init", tuned("vqa")], "vqa and gives no scores: take a run of --task pretrain"),
        (["--ask", "test:3", "x", "--init", pretrained], "gives no answers: take a run of --task vqa"),
        (["--score", "nothing.jpg", "x", "--init", pretrained], "give another file, or of scenes SPLIT:NUMBER"),
        (["--score", "test:3", "x"], "add --init RUN, e.g. --init runs/soho-scenes"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            said(*argv)


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--task vcr", "--task vcr: it is one of pretrain, retrieval, vqa, nlvr2, ve"),
        ("--task vqa --data coco", "--task vqa needs questions about pictures"),
        ("--vd-mode x", "--vd-mode x: it is one of gate, replace, residual, none"),
        ("--vd-update ema", "--vd-update ema: it is one of official, paper"),
        ("--cnn-optimizer adam", "--cnn-optimizer adam: it is one of sgd, adamw; did you mean adamw?"),
        ("--depth 77", "--depth 77: it is one of 10, 18, 34, 50, 101"),
        ("--train-on val", "--train-on val: it is one of train, train+val, train+val+vg"),
        ("--strides 2,2,2", "--strides 2,2,2: give six numbers, like 2,2,1,2,2,2"),
        ("--strides 2,2,0,2,2,2", "--strides 2,2,0,2,2,2: give six numbers"),
        ("--strides 4,4,4,4,4,4", "no cell is left of such a picture"),
        ("--train-sides 400,800", "--train-sides 400,800: give three, like 400,800,1333"),
        ("--train-sides 400,300,900", "--train-sides 400,300,900: give three, like"),
        ("--train-sides 400,800,700", "--train-sides 400,800,700: give three, like"),
        ("--width 30 --heads 4", "--width 30 --heads 4: the first must be a multiple of the second and of 4"),
        ("--width 30 --heads 2", "--width 30 --heads 2: the first must be a multiple"),
        ("--frozen-stages 5", "--frozen-stages 5"),
        ("--short-side 65", "the longer side is not the shorter one"),
        ("--mvm-prob 2", "--mvm-prob 2.0: give 1 or less"),
        ("--mismatched 1.5", "--mismatched 1.5: give 1 or less"),
        ("--vd-decay 1.1", "--vd-decay 1.1: give 1 or less"),
        ("--freeze-cnn 1.1", "--freeze-cnn 1.1: give 1 or less"),
        ("--dropout 1", "--dropout 1.0: give 0.99 or less"),
        ("--max-len 63", "--max-len 63: give 62 or less"),
        ("--codes 0", "--codes 0: give 1 or more"),
        ("--negatives 0", "--negatives 0: give 1 or more"),
        ("--drops 0.5,1.5", "--drops 0.5,1.5: give shares of the run between 0 and 1"),
        ("--batch 1 --captions-per-image 2", "--batch 1: too small for 2 captions a picture on 1 processes"),
        ("--batch 3 --captions-per-image 2", "--batch 3: too small for 2 captions a picture"),
        ("--task retrieval --batch 1", "--batch 1: too small for 1 captions a picture"),
        ("--init nowhere", "nowhere is not a run directory"),
        ("--resnet nowhere/at/all", "Give a local directory"),
        ("--bert nowhere/at/all", "Give a local directory"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(argv, told, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=re.escape(told)):
        soho.main([*argv.split(), "--device", "cpu", "--train-scenes", "9"])


def test_settings_that_are_allowed():
    for changes in ({}, {"train_sides": "32,48,64"}, {"train_sides": "32,32,32"}, {"vd_mode": "none", "depth": 50},
                    {"short_side": 32}, {"frozen_stages": 4}, {"mvm_prob": 1.0}):  # fmt: skip
        soho.check(tiny(**changes))
    for preset in soho.PRESETS:
        for task in soho.TASKS:
            soho.check(common.build_config(soho.Config, {"preset": preset, "task": task,
                                                         "data": {"vqa": "vqa", "nlvr2": "nlvr2", "ve": "snli_ve"}.get(
                                                             task, "coco")}, soho.PRESETS, soho.RECIPES))  # fmt: skip


def test_init_from_an_official_file(tmp_path, monkeypatch):
    """--init FILE: sizes are the file's; downstream without the dictionary; an answer head needs its answers' names."""
    model, state = official(vocab_size=400, positions=64)
    torch.save(wrapped(state), tmp_path / "soho.pth")
    flags = ["--lr", 1e-12, "--cnn-lr", 1e-12, *QUICK]

    def asked(name):
        raise UserError(f"asked {name}")

    monkeypatch.setattr(language.Tokenizer, "from_pretrained", asked)
    with pytest.raises(UserError, match="asked bert-base-uncased"):  # its words are BERT's
        run("--init", tmp_path / "soho.pth", *flags, "--out", tmp_path / "none")
    monkeypatch.undo()
    language.Tokenizer.train(SAYS, 400, "wordpiece").save(tmp_path / "words")
    words = ("--tokenizer", tmp_path / "words")
    run("--task", "retrieval", "--init", tmp_path / "soho.pth", *flags, *words, "--out", tmp_path / "r")
    mine = soho.SOHO.from_run(str(tmp_path / "r"))
    assert (mine.cfg.width, mine.cfg.heads, mine.cfg.square_mask, mine.cfg.vd_mode) == (64, 1, True, "none")
    for name in ("itm_head.weight", "encoder.1.qkv.weight", "cnn.conv1.weight", "project.weight"):
        torch.testing.assert_close(mine.state_dict()[name], model.state_dict()[name], atol=1e-6, rtol=1e-5)
    assert any("the authors' SOHO: has" in note for note in read(tmp_path / "r" / "metrics.json")["protocol"]["notes"])
    theirs, state = official("vqa", vocab_size=400, positions=64, vd_mode="none")
    torch.save(wrapped(state), tmp_path / "vqa.pth")
    corpus = data.Corpus("x", {"train": [1]}, answers=("yes", "no"))
    cfg = tiny("vqa", init=str(tmp_path / "vqa.pth"), tokenizer=str(tmp_path / "words"))
    with pytest.raises(UserError, match="which answer is which in"):
        soho.build(copy.copy(cfg), corpus)
    (tmp_path / "answers.json").write_text(json.dumps(list("gfedcba")))
    built = soho.build(copy.copy(cfg), corpus)
    assert built.answers == tuple("gfedcba") and equal_state(theirs, built)
    gate = soho.build(tiny("ve", init=str(tmp_path / "soho.pth"), tokenizer=str(tmp_path / "words"), vd_mode="gate"),
                      corpus)  # fmt: skip
    assert equal_state(model, gate, "dictionary.") and equal_state(model, gate, "mixer.")


def test_words_of_a_picture():
    """The first `word_steps`: which words are said of a picture, of all its captions, asked of the ResNet alone."""
    cfg, batch = tiny(word_steps=1), loaded(B=3, k=2)
    rows = soho.words_of(batch, TOK, cfg)
    assert rows["words"].shape == (3, V)
    for b in range(3):
        said = set(batch["ids"][2 * b : 2 * b + 2].flatten().tolist()) - {TOK.bos, TOK.pad}
        assert set(rows["words"][b].nonzero()[:, 0].tolist()) == said
    model = network(word_steps=1).train()
    before = copy.deepcopy(model.dictionary.state_dict())
    out = model(rows)
    x, y = out["words"].detach().double().numpy(), rows["words"].double().numpy()
    by_hand = (np.log1p(np.exp(-x)) * y + np.log1p(np.exp(x)) * (1 - y)).sum() / 3
    found = soho.losses(cfg, out, rows)
    np.testing.assert_allclose(found["words"].item(), by_hand, rtol=1e-5)
    found["words"].backward()
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum()}
    assert learns == {"cnn", "word_head"} and list(found) == ["words"]
    assert all(torch.equal(x, before[name]) for name, x in model.dictionary.state_dict().items())


def test_words_come_first(tmp_path, monkeypatch):
    """Two word steps of four, even where the ResNet is frozen afterwards; other tasks have none."""
    frozen, forward = [], soho.ResNet.forward
    monkeypatch.setattr(soho.ResNet, "forward", lambda cnn, x: frozen.append(cnn.is_frozen) or forward(cnn, x))
    flags = papers.toy("soho", "--log-every", 1, "--out", tmp_path / "run", "--word-steps", 2, "--freeze-cnn", 1)
    soho.main([*map(str, flags), "--eval-every", "4"])
    assert frozen[:4] == [False, False, True, True]
    log = [record for record in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
           if "lr" in record]  # fmt: skip
    assert ["words" in record for record in log] == [True, True, False, False]
    assert ["mlm" in record for record in log] == [False, False, True, True] == ["codes" in record for record in log]
    soho.main(list(map(str, papers.toy("soho", "--task", "retrieval", "--batch", 10, "--word-steps", 2, "--steps", 2,
                                       "--out", tmp_path / "other"))))  # fmt: skip
    assert "words" not in (tmp_path / "other" / "log.jsonl").read_text()
    assert read(tmp_path / "other" / "config.json")["word_steps"] == 0


@pytest.mark.slow
def test_the_main_job_matches_and_ranks(tmp_path):
    """`python soho.py` as README gives it: it knows which texts match, ranks by what it sees, and uses its codes."""
    soho.main(["--out", str(tmp_path / "run"), "--device", "cpu"])
    test = read(tmp_path / "run" / "metrics.json")["splits"]["test"]
    found, shuffled = test["metrics"], test["controls"]["shuffled_images"]
    assert found["itm_accuracy"] >= 0.85 and shuffled["itm_accuracy"] <= 0.6
    assert found["gallery"] == 200 and found["true@1"] >= 0.40 and shuffled["true@1"] <= 0.2
    assert found["codes_used"] > 0.5
