"""What must hold for ViLTA beyond its reference tensors: losses by hand, the arms' equality where they must be equal,
what is written, corruption, information flow, gradients, rates, whole runs.
"""

import copy
import json
import os
import re
import signal

import numpy as np
import papers
import pytest
import torch
from PIL import Image

import common
import data
import language
import vilta
from common import UserError
from tools import finish
from vilta import MATCHING, NOTHING, OTHER, WRITTEN

D, S = 16, 16  # width of the fusion, side of the pictures
SCENES = vilta.load_data(vilta.Config(train_scenes=40, val_items=1, test_scenes=1)).splits["train"]
SAYS = [[language.clean_caption(text) for text in item.captions] for item in SCENES]  # five captions a picture
TOK = language.Tokenizer.train([text for texts in SAYS for text in texts] * 3, 600, kind="roberta")
V = TOK.vocab_size
ARMS = ("baseline", "cd", "hn", "cd+hn")
TASKS = {"retrieval": ["rank", "itm"], "vqa": ["vqa"], "nlvr2": ["nlvr2"], "ve": ["ve"]}


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(task="pretrain", **changes):
    settings = dict(
        task=task, image_size=S, patch=8, vision_width=20, vision_layers=1, vision_heads=2, vision_mlp=24,
        text_width=24, text_layers=1, text_heads=2, text_mlp=32, positions=64, vocab_size=V, width=D, layers=2, heads=2,
        mlp=24, dropout=0.0, init_std=0.3, max_len=30, word_mask=0.3, gen_ban=2, gen_topk=10, negatives=3, lr=0.01,
        steps=10,
    )  # fmt: skip
    return vilta.Config(**{**settings, **changes})


def network(task="pretrain", seed=0, **changes):
    torch.manual_seed(seed)
    return vilta.ViLTA(tiny(task, **changes), TOK, answers=tuple("abcdefg") if task == "vqa" else ()).eval()


def luck(seed=0):
    return torch.Generator().manual_seed(seed)


def some(*shape, seed=0):
    return torch.randn(*shape, generator=luck(seed))


def loaded(task="pretrain", B=4, k=2, seed=1):
    """A loader's batch: B pictures, or pairs of them, with k captions each or a question, of several lengths."""
    rng, n = np.random.default_rng(seed), 2 if task == "nlvr2" else 1
    chosen = rng.choice(len(SAYS), B, replace=False)
    pixels = torch.from_numpy(rng.integers(0, 256, (B, n, 3, S, S), dtype=np.uint8))
    batch = {"image_id": [f"p{i}" for i in chosen], "bad": [], "pixels": pixels if n == 2 else pixels[:, 0]}
    if task in vilta.QUESTION_TASKS:
        batch |= data.pad_texts([[TOK.encode(SAYS[i][0])] for i in chosen], TOK.bos, TOK.eos, TOK.pad)
        soft = torch.zeros(B, 7).index_put((torch.arange(B), torch.arange(B) % 7), torch.tensor(0.9))
        return batch | ({"targets": soft} if task == "vqa" else {"labels": torch.arange(B) % 2})
    texts = [TOK.encode(text) for i in chosen for text in SAYS[i][: k if task == "pretrain" else 1]]
    return batch | data.pad_captions(texts, TOK.bos, TOK.eos, TOK.pad)


def rows_of(cfg, seed=1, B=4, k=2):
    """What a training step reads, its negatives not yet written."""
    return vilta.rows_of(loaded(cfg.task, B, k, seed), TOK, cfg, luck(seed))


def captions(*texts):
    """ids, keep_mask [R, T] of texts with <s> and </s>."""
    rows = data.pad_texts([[TOK.encode(text)] for text in texts], TOK.bos, TOK.eos, TOK.pad)
    return rows["ids"], rows["keep_mask"]


def log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def moved(model, before):
    """Names of what is not as it was."""
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


# ---------------------------------------------------------------------------------------------------------------------
# Losses by hand


def test_losses_by_hand():
    logits, labels = some(3, 4), torch.tensor([2, 0, 3])
    by_hand = -np.mean([log_softmax(logits)[i, k] for i, k in enumerate([2, 0, 3])])
    assert vilta.loss_mlm(logits, labels).item() == pytest.approx(by_hand, abs=1e-6)
    assert vilta.loss_itm(logits, labels).item() == pytest.approx(by_hand, abs=1e-6)
    assert vilta.loss_rank(logits).item() == pytest.approx(-log_softmax(logits)[:, 0].mean(), abs=1e-6)
    p, q = 1 / (1 + np.exp(-logits.double().numpy())), logits.sigmoid().round(decimals=1)
    by_hand = -(q.numpy() * np.log(p) + (1 - q.numpy()) * np.log(1 - p)).sum() / 3
    assert vilta.loss_answers(logits, q).item() == pytest.approx(by_hand, abs=1e-5)
    assert vilta.loss_answers(logits.bfloat16(), q).dtype == torch.float32
    for loss in (vilta.loss_mlm, vilta.loss_itm):
        assert loss(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_cross_distillation_by_hand(alpha):
    """(1 - alpha) CE with the caption's word + alpha CE with the teacher's distribution, mean over hidden words."""
    logits, labels, soft = some(5, 7), torch.tensor([2, 0, 3, 6, 6]), some(5, 7, seed=1).softmax(1)
    log_p, by_hand = log_softmax(logits), 0.0
    for i, k in enumerate(labels.tolist()):
        by_hand += (1 - alpha) * -log_p[i, k] - alpha * (soft[i].numpy() * log_p[i]).sum()
    assert vilta.loss_mlm(logits, labels, soft, alpha).item() == pytest.approx(by_hand / 5, abs=1e-5)
    plain = vilta.loss_mlm(logits, labels).item()
    one_hot = torch.zeros(5, 7).scatter(1, labels[:, None], 1.0)
    assert vilta.loss_mlm(logits, labels, one_hot, alpha).item() == pytest.approx(plain, abs=1e-6)
    if alpha == 0:
        assert vilta.loss_mlm(logits, labels, soft, 0.0).item() == plain
    else:
        assert abs(by_hand / 5 - plain) > 0.01


def test_soft_labels_by_hand():
    """Divided by tau first; the largest alone, renormalised; more than there are words: all. No gradient."""
    z = some(6, 9).requires_grad_()
    for tau, topk in ((1.0, 0), (2.0, 0), (0.5, 3), (1.0, 1), (1.0, 50)):
        by_hand = np.exp(z.detach().double().numpy() / tau)
        for row in by_hand:
            row[np.argsort(row)[: max(0, 9 - topk) if topk else 0]] = 0
        by_hand /= by_hand.sum(1, keepdims=True)
        found = vilta.soft_labels(z, tau, topk)
        np.testing.assert_allclose(found.numpy(), by_hand, atol=1e-6)
        assert not found.requires_grad
    assert vilta.soft_labels(z.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_losses_of_a_pretraining_step():
    """Which outputs meet which labels, with temperature and top-k as the flags say; ITM: written and others' are 0."""
    model = network(alpha=0.3, teacher_temperature=2.0, teacher_topk=4)
    rows = vilta.write_negatives(model, rows_of(model.cfg, B=8))
    out = model(rows)
    labels = rows["mlm_labels"][rows["mlm_labels"] >= 0]
    found, z = vilta.losses(model.cfg, out, rows), out["teacher"].double().numpy() / 2
    z[z < np.sort(z, axis=1)[:, -4:-3]] = -np.inf
    q, log_p, each = np.exp(log_softmax(z)), log_softmax(out["mlm"]), np.arange(len(labels))
    mlm = (-0.7 * log_p[each, labels] - 0.3 * (q * log_p).sum(1)).mean()
    gen = -log_softmax(out["gen"])[each, labels].mean()
    itm = -np.mean([log_softmax(out["itm"])[r, int(kind == 0)] for r, kind in enumerate(rows["kinds"].tolist())])
    wanted = {"mlm": mlm, "itm": itm, "gen": gen}
    assert {name: x.item() for name, x in found.items()} == pytest.approx(wanted, rel=1e-4)
    assert len(rows["kinds"].unique()) == 3 and len(labels) > 9


@pytest.mark.parametrize("task", TASKS)
@torch.no_grad()
def test_losses_of_other_tasks(task):
    model = network(task)
    rows = rows_of(model.cfg, B=6)
    out, found = model(rows), vilta.losses(model.cfg, model(rows), rows)
    assert list(found) == TASKS[task]
    if task == "retrieval":
        assert found["rank"] == vilta.loss_rank(out["ranks"]) and out["ranks"].shape == (6, 4)
        assert found["itm"] == vilta.loss_itm(out["itm"], (rows["kinds"] == MATCHING).long())
    elif task == "vqa":
        assert found["vqa"] == vilta.loss_answers(out["logits"], rows["targets"])
    else:
        assert found[task] == vilta.loss_itm(out["logits"], rows["labels"])


# ---------------------------------------------------------------------------------------------------------------------
# Arms: equal where the paper's two means are turned off, and otherwise different in nothing else


def trained(model, steps=3):
    """Steps of `train`, without processes and logs. Dropout's luck and the data's depend on the step alone."""
    cfg, optimizer = model.cfg, vilta.make_optimizer(model.cfg, model)
    heads = [p for name, p in model.named_parameters() if name.startswith("lm_head.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("lm_head.")]
    for step in range(steps):
        model.train()
        torch.manual_seed(step)
        rows = vilta.write_negatives(model, rows_of(cfg, seed=step))
        sum(vilta.losses(cfg, model(rows), rows).values()).backward()
        for parameters in (others, heads):
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize("off", [{"arm": "cd", "alpha": 0.0}, {"arm": "hn", "syn_ratio": 0.0},
                                 {"arm": "cd+hn", "alpha": 0.0, "syn_ratio": 0.0}])  # fmt: skip
@pytest.mark.parametrize("start_steps", [0, 1])
def test_an_arm_that_is_turned_off_is_the_baseline_bit_for_bit(off, start_steps):
    """With dropout and clipping. Catches a teacher or a writer that costs luck, or a loss that is scaled."""
    same = dict(dropout=0.2, start_steps=start_steps)
    baseline, other = trained(network(arm="baseline", **same)), trained(network(**off, **same))
    assert baseline.state_dict().keys() == other.state_dict().keys() and not moved(other, baseline.state_dict())
    assert moved(baseline, network(arm="baseline", **same).state_dict()), "it has learned"
    on = trained(network(**{**off, "alpha": 0.4, "syn_ratio": 0.5}, **same))
    assert len({name for name in moved(baseline, on.state_dict()) if not name.startswith("lm_head.")}) > 50


@torch.no_grad()
def test_the_arms_differ_in_the_written_pairs_alone():
    """Data, order, kinds up to WRITTEN, and dropout: the same luck gives the same logits where the input is equal."""
    found, weights = {}, network(arm="cd+hn").state_dict()
    for arm in ARMS:
        model = network(arm=arm, dropout=0.3).train()
        model.load_state_dict(weights, strict=False)
        rows = rows_of(model.cfg, B=8)
        torch.manual_seed(3)
        written = vilta.write_negatives(model, rows)
        found[arm] = rows, written, model(written)
    rows, _, out = found["baseline"]
    for arm in ARMS[1:]:
        mine, written, mine_out = found[arm]
        assert mine.keys() == rows.keys() and torch.equal(mine_out["mlm"], out["mlm"])
        for name in rows.keys() - {"kinds", "itm_ids", "itm_keep_mask"}:
            assert torch.equal(mine[name], rows[name]), name
        is_written = mine["kinds"] == WRITTEN
        assert is_written.sum() == (4 if "hn" in arm else 0)
        assert (rows["kinds"][is_written] == OTHER).all() and torch.equal(mine["kinds"] == 0, rows["kinds"] == 0)
        assert torch.equal(mine["itm_ids"][~is_written], rows["itm_ids"][~is_written])
        torch.testing.assert_close(mine_out["itm"][~is_written], out["itm"][~is_written])
        assert not torch.isclose(mine_out["itm"], out["itm"]).all(1)[is_written].any()


@pytest.mark.parametrize("start_steps", [2, 0])
@pytest.mark.parametrize("arm", ARMS[1:])
def test_the_arms_start_from_the_same_weights(arm, start_steps):
    """Paired by seed: what an arm has beside the others must not move the first weights of what all have."""
    first, mine = (network(arm=x, start_steps=start_steps).state_dict() for x in ("baseline", arm))
    assert all(torch.equal(x, mine[name]) for name, x in first.items())


def test_the_teacher_is_frozen():
    """No gradient, not in the optimizer, never in training mode, unmoved by training; a copy of the first encoder."""
    model = network(arm="cd+hn", dropout=0.2)
    before = copy.deepcopy(model.state_dict())
    for name, x in model.teacher.text.state_dict().items():
        assert torch.equal(x, model.text.state_dict()[name])
    model.train()
    assert model.text.training and not any(module.training for module in model.teacher.modules())
    trained(model)
    changed = moved(model, before)
    assert not {name for name in changed if name.startswith("teacher.")} and "text.word.weight" in changed
    assert not any(p.requires_grad or p.grad is not None for p in model.teacher.parameters())
    grouped = {id(p) for group in vilta.make_optimizer(model.cfg, model).param_groups for p in group["params"]}
    assert not grouped & {id(p) for p in model.teacher.parameters()}
    rows = rows_of(model.cfg)
    assert not model.train()(vilta.write_negatives(model, rows))["teacher"].requires_grad


@pytest.mark.parametrize("gen_head, learns", [("probe", {"lm_head"}), ("joint", {"lm_head", "text"}),
                                              ("static", set())])  # fmt: skip
def test_what_the_writers_loss_teaches(gen_head, learns):
    """probe: its head alone, neither the encoder nor the word vectors; joint: both; static: there is no such loss."""
    model = network(arm="hn", gen_head=gen_head).train()
    rows = vilta.write_negatives(model, rows_of(model.cfg))
    found = vilta.losses(model.cfg, model(rows), rows)
    assert ("gen" in found) == (gen_head != "static")
    if "gen" in found:
        found["gen"].backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == learns
    before = copy.deepcopy(model.state_dict())
    assert any(name.startswith("lm_head.") for name in moved(trained(model), before)) == (gen_head != "static")


@torch.no_grad()
def test_the_writer_reads_what_the_student_reads():
    """gen: the word head on the language encoder's states of the masked caption, before the fusion."""
    model = network(arm="hn")
    rows = rows_of(model.cfg)
    where = rows["mlm_labels"] != NOTHING
    states = model.text(rows["ids"], rows["keep_mask"])[where]
    torch.testing.assert_close(model(rows)["gen"], model.lm_head(states, model.text.word.weight))
    full = model.fill({"pixels": rows["pixels"].repeat_interleave(2, 0)}, rows["ids"], rows["keep_mask"], where)
    torch.testing.assert_close(full, model(rows)["mlm"])


@torch.no_grad()
def test_the_teacher_reads_its_own_text():
    """At the hidden words, from teacher_ids, with its own weights, though the student's have moved."""
    model = network(arm="cd", teacher_input="unmasked")
    trained_text = copy.deepcopy(model.text)
    model.text.word.weight.add_(1.0)
    rows = rows_of(model.cfg)
    states = trained_text(rows["teacher_ids"], rows["keep_mask"])[rows["mlm_labels"] != NOTHING]
    torch.testing.assert_close(model(rows)["teacher"], model.teacher.head(states, trained_text.word.weight))


# ---------------------------------------------------------------------------------------------------------------------
# Written captions


@torch.no_grad()
def by_hand(model, ids, keep, order, lots, text, head):
    """One caption [T] rewritten, from section 3.3 of the notes: (ids, number of places asked, mean probability)."""
    cfg, tables, length = model.cfg, model.tables(), int(keep.sum())
    named = {i: token for token, i in TOK.backend.get_vocab().items()}

    def is_word(token, place):
        return bool(tables["first" if place == 1 else "later"][token])

    places = []
    for t in range(1, length - 1):
        following = int(ids[t + 1])
        ends = following == TOK.eos or named[following].startswith("Ġ")
        if is_word(ids[t], t) and ends and named[int(ids[t])].removeprefix("Ġ") not in language.STOP_WORDS:
            places.append(t)
    n = max(1, round(cfg.rewrite * (length - 2)))
    places = sorted(places, key=lambda t: order[t])[:n]
    masked, found, p = ids[:length].clone(), ids.clone(), []
    masked[places] = TOK.mask
    real = torch.ones(1, length, dtype=torch.bool)
    hidden, plain = (head(text(x[None], real)[0], text.word.weight) for x in (masked, ids[:length]))
    for t in places:
        banned = set(plain[t].topk(cfg.gen_ban).indices.tolist())
        old = language.stem(named[int(ids[t])].removeprefix("Ġ"))
        left = [v for v in hidden[t].argsort(descending=True).tolist() if is_word(v, t) and v not in banned
                and named[v].removeprefix("Ġ") not in language.STOP_WORDS
                and language.stem(named[v].removeprefix("Ġ")) != old]  # fmt: skip
        left = left[: cfg.gen_topk]
        if left:
            share = np.exp(log_softmax(hidden[t][left])).cumsum()
            found[t] = left[int((share <= lots[t].item()).sum())]
            p.append(hidden[t].softmax(0)[found[t]].item())
    return found, places, np.mean(p) if p else 0.0


TEXTS = [text for texts in SAYS[:10] for text in texts[:2]]
TEXTS += ["left of a red circle there is a purple star", "two boxes", "left of it there is a", "one star is at the top"]


@pytest.mark.parametrize("changes", [{}, {"rewrite": 0.5, "gen_ban": 20, "gen_topk": 3},
                                     {"rewrite": 0.0, "gen_topk": 9999}, {"gen_ban": 0, "gen_topk": 1},
                                     {"gen_encoder": "frozen", "rewrite": 0.3},
                                     {"gen_ban": V - 20, "rewrite": 0.4}])  # fmt: skip
def test_written_captions_by_hand(changes):
    """Each caption alone, without padding, in plain loops: places, bans, the draw, the probability."""
    model = network(arm="hn", seed=2, **changes)
    if model.cfg.gen_encoder == "frozen":
        model.teacher = vilta.Teacher(network(seed=9).text, network(seed=9).lm_head)
    source = model.teacher if model.cfg.gen_encoder == "frozen" else model
    text, head = source.text, source.head if source is not model else model.lm_head
    ids, keep = captions(*TEXTS)
    order, lots = (torch.rand(ids.shape, generator=luck(seed)) for seed in (0, 1))
    found, changed_places = model.write(ids, keep, order, lots), []
    for r in range(len(ids)):
        expected, places, p = by_hand(model, ids[r], keep[r], order[r], lots[r], text, head)
        assert found["ids"][r].tolist() == expected.tolist(), TEXTS[r]
        changed = (found["ids"][r] != ids[r]).nonzero()[:, 0].tolist()
        assert set(changed) <= set(places) and found["is_written"][r] == bool(changed)
        assert found["p"][r].item() == pytest.approx(p, rel=1e-3)
        changed_places += changed
    assert len(changed_places) >= (5 if model.cfg.gen_ban > 20 else len(ids)) and 1 in changed_places


def test_what_is_written_keeps_the_rest():
    """Length, specials and padding stay; 1..n places differ; each new word is a whole one and no form of the old."""
    model, told = network(arm="hn", rewrite=0.3), set()
    ids, keep = captions(*TEXTS)
    named = {i: token for token, i in TOK.backend.get_vocab().items()}
    for seed in range(8):
        lots = (torch.rand(ids.shape, generator=luck(seed + i)) for i in (0, 99))
        found = model.write(ids, keep, *lots)
        changed = found["ids"] != ids
        n = (0.3 * (keep.sum(1) - 2)).round().clamp(min=1)
        assert found["is_written"].all() and (changed.sum(1) >= 1).all() and (changed.sum(1) <= n).all()
        assert not (changed & ~model.content_words(ids, keep)).any() and not changed[~keep].any()
        for r, t in changed.nonzero().tolist():
            old, new = named[int(ids[r, t])], named[int(found["ids"][r, t])]
            assert (new[0] == "Ġ") == (old[0] == "Ġ") == (t > 1), "the first word has no blank before it"
            assert language.is_word(new.removeprefix("Ġ")) and new.removeprefix("Ġ") not in language.STOP_WORDS
            assert language.stem(new.removeprefix("Ġ")) != language.stem(old.removeprefix("Ġ"))
        told |= {tuple(row) for row in found["ids"].tolist()}
    assert len(told) > 4 * len(ids), "other luck writes other words"


@pytest.mark.parametrize(
    "text, words",
    [
        ("left of a red circle there is a purple star", "left red circle purple star"),
        ("green star", "star"),  # "green" in two pieces where no blank is before it
        ("a starryx thing and a red-blue box", "thing box"),  # a piece or a hyphen follows the first two
        ("a zebra sees the circle!", ""),
        ("there is a the of it", ""),
        ("two boxes , 7 stars", "two"),
    ],
)
def test_which_words_can_be_rewritten(text, words):
    """Whole words of one token that mean something; at the beginning those that the tokenizer knows without a blank."""
    assert TOK.encode("green star")[0] != number_of("green")
    ids, keep = captions(text, "on the right there is a long text about circles and a purple star")
    found = network().content_words(ids, keep)[0]
    assert TOK.backend.decode(ids[0][found].tolist()).split() == words.split()


def number_of(token):
    return TOK.backend.token_to_id(token)


def test_words_are_drawn_in_proportion():
    """Over lots that are spread evenly, frequencies are the renormalised probabilities of the gen_topk left."""
    model, N = network(arm="hn", gen_topk=6, init_std=0.1), 4000
    ids, keep = captions("left of a red circle there is a purple star")
    order = torch.rand(ids.shape, generator=luck())
    lots = ((torch.arange(N) + 0.5) / N)[:, None].expand(-1, ids.size(1))
    found = model.write(ids.expand(N, -1), keep.expand(N, -1), order.expand(N, -1), lots)["ids"]
    places = (found != ids).any(0).nonzero()[:, 0].tolist()
    assert len(places) == 2  # 0.15 of 10
    with torch.no_grad():
        masked = ids.clone()
        masked[0, places] = TOK.mask
        states = model.text(masked, keep)[0]
        for t in places:
            p = model.lm_head(states[t], model.text.word.weight).softmax(0)
            words, counts = found[:, t].unique(return_counts=True)
            assert len(words) == 6
            np.testing.assert_allclose(counts / N, p[words] / p[words].sum(), atol=1.5 / N)


def test_writing_is_without_dropout_and_leaves_no_trace():
    """The same in training as in evaluation and each time anew; modes and gradients are as they were."""
    model = network(arm="hn", dropout=0.5)
    ids, keep = captions(*TEXTS)
    order, lots = (torch.rand(ids.shape, generator=luck(seed)) for seed in (0, 1))
    model.train()
    generator = torch.get_rng_state()
    found = model.write(ids, keep, order, lots)
    assert all(module.training for module in model.text.modules()) and not found["p"].requires_grad
    again = model.write(ids, keep, order, lots)
    assert torch.equal(torch.get_rng_state(), generator), "dropout's luck is that of the other arms"
    model.eval()
    plain = model.write(ids, keep, order, lots)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(found[name], other[name]) for other in (again, plain) for name in found)
    assert all(p.grad is None for p in model.parameters())


def test_the_writer_is_the_current_encoder_or_the_frozen_one():
    ids, keep = captions(*TEXTS)
    lots = [torch.rand(ids.shape, generator=luck(seed)) for seed in (0, 1)]
    for which in ("current", "frozen"):
        model = network(arm="cd+hn", gen_encoder=which)
        before = model.write(ids, keep, *lots)["ids"]
        trained(model)
        model.eval()
        assert torch.equal(before, model.write(ids, keep, *lots)["ids"]) == (which == "frozen")


def test_written_pairs_and_those_that_cannot_be():
    """WRITTEN rows become their captions rewritten; of one without content words the pair becomes OTHER, with the other
    caption and its padding; no other row changes, and what was handed in stays."""
    model = network(arm="hn")
    ids, keep = captions("a red circle", "there is a the of it", "there is a", "a purple star is on top", "the box")
    others, other_keep = captions(*TEXTS[:5])
    T = max(ids.size(1), others.size(1))

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, T - x.size(1)), value=value)

    ids, others, keep, other_keep = pad(ids, TOK.pad), pad(others, TOK.pad), pad(keep, False), pad(other_keep, False)
    rows = {"itm_ids": ids, "itm_keep_mask": keep, "other_ids": others, "other_keep_mask": other_keep,
            "kinds": torch.tensor([WRITTEN, WRITTEN, MATCHING, WRITTEN, OTHER]),
            "order": torch.rand(5, T, generator=luck()), "lots": torch.rand(5, T, generator=luck(1))}  # fmt: skip
    before = copy.deepcopy(rows)
    found = vilta.write_negatives(model, rows)
    assert all(torch.equal(x, rows[name]) for name, x in before.items())
    assert found["kinds"].tolist() == [WRITTEN, OTHER, MATCHING, WRITTEN, OTHER]
    alone = model.write(*(rows[name][[0, 3]] for name in ("itm_ids", "itm_keep_mask", "order", "lots")))
    for i, r in enumerate((0, 3)):
        assert torch.equal(found["itm_ids"][r], alone["ids"][i]) and not torch.equal(found["itm_ids"][r], ids[r])
        assert torch.equal(found["itm_keep_mask"][r], keep[r]) and found["p"][r] == alone["p"][i] > 0
    assert torch.equal(found["itm_ids"][1], others[1]) and torch.equal(found["itm_keep_mask"][1], other_keep[1])
    for r in (2, 4):
        assert torch.equal(found["itm_ids"][r], ids[r]) and torch.equal(found["itm_keep_mask"][r], keep[r])
    assert found["p"][[1, 2, 4]].tolist() == [0, 0, 0]
    none = vilta.write_negatives(model, {**rows, "kinds": torch.zeros(5).long()})
    assert torch.equal(none["itm_ids"], ids) and not none["kinds"].any(), "a piece of a step may ask for none"
    assert vilta.write_negatives(network(arm="cd"), rows) is rows
    everything = vilta.write_negatives(network(arm="hn", gen_ban=V), rows)
    assert everything["kinds"].tolist() == [OTHER, OTHER, MATCHING, OTHER, OTHER], "no word is left to draw"


# ---------------------------------------------------------------------------------------------------------------------
# Corruption


@pytest.mark.parametrize("arm, mismatched, ratio", [("hn", 0.5, 0.5), ("cd", 0.5, 0.5), ("cd+hn", 0.3, 0.25),
                                                    ("hn", 1.0, 1.0), ("hn", 0.0, 0.5)])  # fmt: skip
def test_exact_numbers_of_each_kind(arm, mismatched, ratio):
    cfg = tiny(arm=arm, mismatched=mismatched, syn_ratio=ratio)
    n = round(mismatched * 20)
    written = round(ratio * n) if "hn" in arm else 0
    for seed in range(5):
        kinds = rows_of(cfg, seed, B=10)["kinds"]
        assert torch.bincount(kinds, minlength=3).tolist() == [20 - n, written, n - written]


def test_captions_of_others():
    """OTHER rows have a whole caption of a picture with another id, whichever; the rest have their own."""
    cfg, sources = tiny(), set()
    for seed in range(30):
        batch = loaded(B=5)
        batch["image_id"] = ["a", "b", "a", "c", "b"]
        rows = vilta.corrupt(batch, TOK, cfg, luck(seed))
        ids, keep = data.whole_captions(batch, TOK.pad)
        numbers = data.picture_numbers(batch, 2)
        is_other = rows["kinds"] == OTHER
        assert torch.equal(rows["itm_ids"][~is_other], ids[~is_other])
        assert torch.equal(rows["itm_ids"][is_other], rows["other_ids"][is_other])
        assert torch.equal(rows["itm_keep_mask"][is_other], rows["other_keep_mask"][is_other])
        for r in range(10):
            found = [s for s in range(10) if torch.equal(rows["other_ids"][r], ids[s])
                     and torch.equal(rows["other_keep_mask"][r], keep[s])]  # fmt: skip
            assert found and all(numbers[s] != numbers[r] for s in found)
            sources |= {(r, found[0])}
    assert len({r for r, _ in sources}) == 10 and sum(r == 0 for r, _ in sources) == 6


def test_one_picture_has_no_mismatched_pairs():
    """Nor several of the same id: a pair labelled as no match would be one."""
    for B in (1, 3):
        batch = loaded(B=B)
        batch["image_id"] = ["a"] * B
        rows = vilta.corrupt(batch, TOK, tiny(mismatched=1.0), luck())
        ids, _ = data.whole_captions(batch, TOK.pad)
        assert (rows["kinds"] == MATCHING).all() and torch.equal(rows["itm_ids"], ids)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_hidden_words(share):
    """At least one of each caption, of all pairs, never <s>, </s> or padding; three ways for the teacher to read."""
    found = {}
    for way in ("all_mask", "same_as_student", "unmasked"):
        rows = found[way] = rows_of(tiny(word_mask=share, teacher_input=way), B=12, k=4)
    batch = loaded(B=12, k=4)
    ids, keep = data.whole_captions(batch, TOK.pad)
    hidden, may_be = rows["mlm_labels"] != NOTHING, keep & (ids != TOK.bos) & (ids != TOK.eos)
    assert torch.equal(rows["mlm_labels"][hidden], ids[hidden]) and torch.equal(rows["ids"][~hidden], ids[~hidden])
    assert not (hidden & ~may_be).any() and (hidden.sum(1) >= 1).all()
    counts = {0.0: torch.ones(48).long(), 1.0: may_be.sum(1)}
    assert share == 0.3 or torch.equal(hidden.sum(1), counts[share])
    shown = rows["ids"][hidden]
    if share == 1:
        assert (shown == TOK.mask).float().mean().item() == pytest.approx(0.8, abs=0.06)
        assert (shown == ids[hidden]).float().mean().item() == pytest.approx(0.1, abs=0.05)
    masked = ids.masked_fill(hidden, TOK.mask)
    for way, x in (("same_as_student", rows["ids"]), ("unmasked", ids), ("all_mask", masked)):
        assert torch.equal(found[way]["teacher_ids"], x) and torch.equal(found[way]["ids"], rows["ids"])
    assert torch.equal(rows["keep_mask"], keep) and torch.equal(rows["pixels"], batch["pixels"])


def test_noise_exchanges_whole_captions():
    """The same caption for MLM and for ITM, with its own padding; none is lost; pictures stay."""
    batch, cfg = loaded(B=20), tiny(caption_noise=0.4, mismatched=0.0, word_mask=0.0, teacher_input="unmasked")
    rows, ids = vilta.corrupt(batch, TOK, cfg, luck()), data.whole_captions(batch, TOK.pad)[0]
    assert torch.equal(rows["itm_ids"], rows["teacher_ids"]) and torch.equal(rows["itm_keep_mask"], rows["keep_mask"])
    assert torch.equal(rows["keep_mask"], rows["itm_ids"] != TOK.pad)
    assert sorted(rows["itm_ids"].tolist()) == sorted(ids.tolist()) and torch.equal(rows["pixels"], batch["pixels"])
    assert (rows["itm_ids"] != ids).any(1).float().mean().item() == pytest.approx(0.4, abs=0.2)
    assert (rows["kinds"] == MATCHING).all(), "that they are exchanged is what the model is not told"


def test_rows_of_the_start_phase():
    batch, cfg = loaded(B=6), tiny(start_steps=1, caption_noise=0.0)
    rows, (ids, keep) = vilta.start_of(batch, TOK, cfg, luck()), data.whole_captions(batch, TOK.pad)
    hidden = rows["mlm_labels"] != NOTHING
    assert set(rows) == {"pixels", "words", "ids", "keep_mask", "mlm_labels"} and (hidden.sum(1) > 0).all()
    assert torch.equal(rows["words"], data.words_said(batch, TOK, V)) and torch.equal(rows["keep_mask"], keep)
    assert torch.equal(rows["ids"].where(~hidden, rows["mlm_labels"]), ids)


def test_rows_of_retrieval():
    """Each picture beside its caption first, then others'; half of ITM's pairs are mismatched."""
    batch, cfg = loaded("retrieval", B=6), tiny("retrieval")
    batch["image_id"][2] = batch["image_id"][0]
    rows = vilta.rows_of(batch, TOK, cfg, luck())
    ids, keep = data.whole_captions(batch, TOK.pad)
    assert torch.equal(rows["ids"][::4], ids) and torch.equal(rows["keep_mask"][::4], keep) and len(rows["ids"]) == 24
    source = [next(s for s in range(6) if torch.equal(x, ids[s])) for x in rows["ids"]]
    assert torch.equal(rows["keep_mask"], keep[source])
    assert all(batch["image_id"][s] != batch["image_id"][r // 4] for r, s in enumerate(source) if r % 4)
    assert sorted(rows["kinds"].tolist()) == [MATCHING] * 3 + [OTHER] * 3
    for r, kind in enumerate(rows["kinds"].tolist()):
        (source,) = [s for s in range(6) if torch.equal(rows["itm_ids"][r], ids[s])]
        assert torch.equal(rows["itm_keep_mask"][r], keep[source])
        assert (batch["image_id"][source] == batch["image_id"][r]) == (kind == MATCHING)


# ---------------------------------------------------------------------------------------------------------------------
# Who sees what


@torch.no_grad()
def test_a_picture_encoded_once_is_a_picture_encoded_for_each_caption():
    for task, name in (("pretrain", "itm"), ("retrieval", "ranks")):
        model = network(task)
        rows = rows_of(model.cfg)
        k = len(rows["ids"]) // 4
        each = rows | {"pixels": rows["pixels"].repeat_interleave(k, 0)}
        if task == "retrieval":
            each |= {key: rows[key].repeat_interleave(k, 0) for key in ("itm_ids", "itm_keep_mask")}
        before, after, turned = model(rows), model(each), model(rows | {"pixels": rows["pixels"].roll(1, 0)})
        for key in before:
            x = before[key].repeat_interleave(k, 0) if task == "retrieval" and key == "itm" else before[key]
            torch.testing.assert_close(x.flatten(), after[key].flatten(), atol=1e-5, rtol=1e-5)
        assert (before[name] - turned[name]).abs().amax(1).min() > 1e-4


@torch.no_grad()
def test_two_passes_that_compute_only_what_is_asked():
    """MLM's and ITM's alone, of all states of all layers, both streams of a layer reading what came into it."""
    model = network()
    rows = rows_of(model.cfg)

    def whole(ids, keep):
        x = model.text_transform(model.text(ids, keep)) + model.types.weight[0]
        y = model.image_transform(model.vision(rows["pixels"])).repeat_interleave(2, 0) + model.types.weight[1]
        for text, image in zip(model.text_layers, model.image_layers, strict=True):
            x, y = text(x, keep, y), image(y, None, x, keep)
        return x, y

    out, (x, _) = model(rows), whole(rows["ids"], rows["keep_mask"])
    torch.testing.assert_close(out["mlm"], model.mlm_head(x)[rows["mlm_labels"] >= 0], atol=1e-5, rtol=1e-4)
    x, y = whole(rows["itm_ids"], rows["itm_keep_mask"])
    cls = torch.cat([model.text_pooler(x[:, 0]), model.image_pooler(y[:, 0])], dim=1).tanh()
    torch.testing.assert_close(out["itm"], model.itm_head(cls), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("task", ["pretrain", *TASKS])
@torch.no_grad()
def test_padding_and_other_rows_do_not_leak(task):
    """Longer padding with anything in it changes nothing; another picture and text change their own rows alone."""
    model = network(task)
    rows = rows_of(model.cfg)
    if task == "pretrain":
        rows = vilta.write_negatives(model, rows)
    before, longer = model(rows), dict(rows)
    for name in [name for name in rows if name.endswith("ids") or name == "mlm_labels"]:
        longer[name] = torch.nn.functional.pad(rows[name], (0, 3), value=NOTHING if name == "mlm_labels" else TOK.pad)
    for name in [name for name in rows if name.endswith("keep_mask")]:
        longer[name] = torch.nn.functional.pad(rows[name], (0, 3), value=False)
        ids = name.replace("keep_mask", "ids")
        longer[ids] = torch.where(longer[name], longer[ids], 77)
        if name == "keep_mask" and task == "pretrain":
            longer["teacher_ids"] = torch.where(longer[name], longer["teacher_ids"], 78)
    for name, x in model(longer).items():
        torch.testing.assert_close(x, before[name], atol=1e-5, rtol=1e-4, msg=name)
    name = {"pretrain": "itm", "retrieval": "ranks"}.get(task, "logits")
    of = rows["itm_keep_mask" if task == "pretrain" else "keep_mask"]
    k, changed = len(of) // 4, dict(rows)
    changed["pixels"] = rows["pixels"].clone()
    changed["pixels"][1] = 255 - changed["pixels"][1]
    ids = "itm_ids" if task == "pretrain" else "ids"
    word = torch.where(of & (rows[ids] > 4), (rows[ids] + 1) % V, rows[ids])
    texts = {ids: torch.where((torch.arange(len(of)) // k == 1)[:, None], word, rows[ids])}
    for changes in (changed, rows | texts):
        differs = (model(changes)[name] - before[name]).abs().view(4, -1)
        assert differs[[0, 2, 3]].max() < 1e-5 and differs[1].max() > 1e-4


@torch.no_grad()
def test_hidden_words_reach_nothing():
    """Another word behind <mask> changes no logit, neither the student's nor the teacher's."""
    model, ids = network(), torch.randint(9, V, (4, 8), generator=luck())

    def out(ids):
        batch = loaded(k=1) | data.pad_captions(ids.tolist(), TOK.bos, TOK.eos, TOK.pad)
        rows = vilta.corrupt(batch, TOK, model.cfg, luck(4))
        return rows, model(rows)

    rows, before = out(ids)
    is_masked = rows["ids"][:, 1:-1] == TOK.mask
    assert is_masked.any() and not is_masked.all()
    _, after = out(torch.where(is_masked, (ids + 1) % (V - 9) + 9, ids))
    assert all(torch.equal(before[name], after[name]) for name in ("mlm", "teacher", "gen"))
    _, after = out(torch.where(is_masked, ids, (ids + 1) % (V - 9) + 9))
    assert not any(torch.equal(before[name], after[name]) for name in ("mlm", "teacher", "gen"))


@torch.no_grad()
def test_a_pair_of_pictures_has_two_types():
    """NLVR2 by hand: row 1 of the types for the left, 2 for the right; their cls side by side."""
    model = network("nlvr2")
    rows = rows_of(model.cfg)
    x, cls = model.text_transform(model.text(rows["ids"], rows["keep_mask"])) + model.types.weight[0], []
    for i in (0, 1):
        y = model.image_transform(model.vision(rows["pixels"][:, i])) + model.types.weight[1 + i]
        cls.append(model.pool(*model.fuse(x, rows["keep_mask"], y)))
    torch.testing.assert_close(model(rows)["logits"], model.answer_head(torch.cat(cls, 1)), atol=1e-5, rtol=1e-4)
    assert network("vqa").types.num_embeddings == 2


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
@torch.no_grad()
def test_matching_with_what_was_made_once(task):
    """A gallery's log odds are the whole model's, pair by pair (of retrieval the ranks); texts are cleaned and cut."""
    model, batch = network(task), loaded(task)
    texts = ["Left of a  red circle there is a purple star.", SAYS[0][0], "two boxes"]
    found = model.match(model.encode_images(batch), model.encode_texts(texts))
    assert found.shape == (4, 3)
    for b in range(4):
        for m, text in enumerate(texts):
            ids, keep = captions(language.clean_caption(text))
            if task == "pretrain":
                wanted = model.answer_scores({"pixels": batch["pixels"][b : b + 1], "ids": ids, "keep_mask": keep})
                wanted = wanted[0, 1] - wanted[0, 0]
            else:
                wanted = model.rank_head(model.join(ids, keep, model.see(batch["pixels"][b : b + 1])))[0, 0]
            torch.testing.assert_close(found[b, m], wanted, atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # in bf16 many of a gallery's would be equal
        odds = model.match(model.encode_images(batch), model.encode_texts(texts))
    assert odds.dtype == torch.float32 and not torch.equal(odds, odds.bfloat16().float())
    long = model.encode_texts([" ".join(["red circle"] * 40)])[1]
    assert long.sum() == 32  # max_len words, <s> and </s>


@torch.no_grad()
def test_score_is_a_probability():
    for task in ("pretrain", "retrieval"):
        model, pixels = network(task), loaded()["pixels"][0]
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        for text in (SAYS[0][0], "a red circle"):
            ids, keep = captions(text)
            odds = model.itm_head(model.join(ids, keep, model.see(pixels[None])))[0].diff().item()
            assert model.score(picture, text) == pytest.approx(1 / (1 + np.exp(-odds)), rel=1e-4)
        assert model.score(picture, "a red circle") != model.score(picture, SAYS[0][0])
    with pytest.raises(UserError, match="gives no scores: take a run of --task pretrain or retrieval"):
        network("vqa").score(picture, "a red circle")


def test_a_text_longer_than_the_positions_says_so():
    with pytest.raises(UserError, match="63 tokens: there are 62 positions"):
        network().text(torch.zeros(1, 63).long(), torch.ones(1, 63).bool())
    network().text(torch.zeros(1, 62).long(), torch.ones(1, 62).bool())


@pytest.mark.parametrize("stem", ["patch", "conv"])
@torch.no_grad()
def test_the_stem_gives_the_grid(stem):
    for patch in (2, 4, 8):
        vision = network(stem=stem, patch=patch).vision
        assert vision(torch.zeros(2, 3, S, S).byte()).shape == (2, 1 + (S // patch) ** 2, 20)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and rates


@pytest.mark.parametrize("start_steps", [0, 2])
@pytest.mark.parametrize("gen_head", ["probe", "static"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_parameter_gets_a_gradient_in_pretraining(arm, gen_head, start_steps):
    """But for the head that the start phase alone has, and the words' head where nothing teaches it."""
    model = network(arm=arm, gen_head=gen_head, start_steps=start_steps, stem="conv").train()
    rows = vilta.write_negatives(model, rows_of(model.cfg, B=8))
    sum(vilta.losses(model.cfg, model(rows), rows).values()).backward()
    lost = lost_of(model)
    wanted = {"word_head"} if start_steps else set()
    if hasattr(model, "lm_head") and not (arm in ("hn", "cd+hn") and gen_head == "probe"):
        wanted |= {"lm_head"}
    assert {name.split(".")[0] for name in lost} == wanted
    assert hasattr(model, "lm_head") == (start_steps > 0 or arm != "baseline")
    assert hasattr(model, "teacher") == ("cd" in arm) and hasattr(model, "word_head") == (start_steps > 0)


def lost_of(model):
    return {name for name, p in model.named_parameters()
            if p.requires_grad and (p.grad is None or p.grad.abs().max() < 1e-9)}  # fmt: skip


def test_the_start_phase_teaches_both_encoders_apart():
    """Every parameter of both and of their two heads, and none else; by hand: the best of a picture's tokens speaks."""
    model = network(start_steps=2).train()
    rows = vilta.start_of(loaded(B=8), TOK, model.cfg, luck())
    out = model(rows)
    torch.testing.assert_close(out["words"], model.word_head(model.vision(rows["pixels"])).max(1).values)
    states = model.text(rows["ids"], rows["keep_mask"])[rows["mlm_labels"] != NOTHING]
    torch.testing.assert_close(out["lm"], model.lm_head(states, model.text.word.weight))
    found = vilta.losses(model.cfg, out, rows)
    assert list(found) == ["words", "lm"]
    assert found["lm"] == vilta.loss_mlm(out["lm"], rows["mlm_labels"][rows["mlm_labels"] != NOTHING])
    assert found["words"] == vilta.loss_answers(out["words"], rows["words"])
    sum(found.values()).backward()
    every = {name for name, p in model.named_parameters() if p.requires_grad}
    assert every - lost_of(model) == {x for x in every if x.startswith(("vision.", "text.", "word_head.", "lm_head."))}


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_gets_a_gradient_in_other_tasks(task):
    """OFFICIAL: the head of ITM stays as it is in retrieval, though its loss teaches the rest. A bias of all ranks
    alike moves nothing."""
    model = network(task).train()
    rows = rows_of(model.cfg, B=8)
    sum(vilta.losses(model.cfg, model(rows), rows).values()).backward()
    assert lost_of(model) <= {"rank_head.bias"}  # exactly 0, or what rounding leaves of it
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"itm_head.weight", "itm_head.bias"} if task == "retrieval" else set())
    assert not any(hasattr(model, name) for name in ("teacher", "lm_head", "mlm_head", "word_head"))


@pytest.mark.parametrize("task", ["pretrain", *TASKS])
def test_optimizer_groups(task):
    """Each parameter once. Encoders, types and the ranking head at lr, the fusion and the heads faster; only matrices
    and embeddings decay."""
    model = network(task, lr=0.1, fusion_mult=3.0, head_mult=7.0, weight_decay=0.02, start_steps=1, beta2=0.97)
    optimizer, groups = vilta.make_optimizer(model.cfg, model), {}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.97) and group["lr"] == group["peak"]
        for p in group["params"]:
            assert id(p) not in groups
            groups[id(p)] = (group["peak"], group["weight_decay"])
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        times = 1 if part in ("vision", "text", "types", "rank_head") else 7 if part.endswith("_head") else 3
        wanted = (pytest.approx(0.1 * times), 0.02 if p.ndim >= 2 else 0.0)
        assert groups.get(id(p)) == (wanted if p.requires_grad else None), name


def test_new_weights():
    model = network("vqa", text_width=64, width=64, init_std=0.05)
    for module in (model.text.word, model.text.position, model.text_layers[0].up, model.answer_head[0]):
        assert module.weight.std().item() == pytest.approx(0.05, rel=0.06)
    for name, p in model.named_parameters():
        if p.ndim == 1 and name != "vision.class_embedding":
            assert (p == float(name.endswith("weight"))).all(), name
    assert model.vision.class_embedding.any() and model.vision.positional_embedding[0].any()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

FOUR = "--start-steps 2 --steps 4 --eval-every 4 --log-every 1 --val-items 4 --test-scenes 6 --dropout 0.1".split()


def toy(*more):
    return papers.toy("vilta", *FOUR, *more)


def weights_of(run):
    return common.read_tensors(run / "last" / "model.safetensors")


def steps_of(run):
    return [record for record in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "lr" in record]


@pytest.fixture(scope="module", autouse=True)
def no_curves():
    """They take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "curves", lambda *_: "")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    papers.run("vilta", *toy("--out", folder))
    return folder


def kill_after(monkeypatch, step):
    """This process sends itself a signal when `step` is done; it stops one step later."""
    original = common.Logger.step

    def log(self, number, *args, **named):
        original(self, number, *args, **named)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(common.Logger, "step", log)


def test_the_teacher_is_the_encoder_at_the_end_of_the_start_phase(whole, tmp_path, monkeypatch):
    """A run stopped right there and resumed is the run that never stopped, teacher included."""
    folder = tmp_path / "run"
    kill_after(monkeypatch, 1)
    with pytest.raises(common.Stopped):
        papers.run("vilta", *toy("--out", folder))
    monkeypatch.undo()
    assert (folder / "last").resolve().name == "step_2"
    then = weights_of(folder)
    assert not torch.equal(then["teacher.text.word.weight"], then["text.word.weight"]), "not yet"
    papers.run("vilta", "--resume", folder, "--device", "cpu")
    now, never = weights_of(folder), weights_of(whole)
    assert now.keys() == never.keys() and all(torch.equal(x, never[name]) for name, x in now.items())
    taught = {name: x for name, x in now.items() if name.startswith("teacher.")}
    for name, x in taught.items():
        part = name.removeprefix("teacher.").replace("head.", "lm_head.", 1) if "head." in name else name[8:]
        assert torch.equal(x, then[part]), name
    assert len(taught) > 10 and not torch.equal(now["text.word.weight"], then["text.word.weight"])


def test_the_log_of_both_phases(whole):
    records = steps_of(whole)
    assert [list(record)[1:3] for record in records[:2]] == [["words", "lm"]] * 2
    for record in records[2:]:
        assert list(record)[1:4] == ["mlm", "itm", "gen"] and 0 < record["written"] <= 0.25
        assert {"acc_own", "acc_written", "acc_other", "gen_top1", "gen_p"} <= record.keys()
    test = json.loads((whole / "metrics.json").read_text())["splits"]["test"]["metrics"]
    assert {"itm_accuracy", "itm_accuracy_blind", "mlm_accuracy", "written"} <= test.keys()


def test_runs_of_arms_that_are_turned_off_are_runs_of_the_baseline(whole, tmp_path):
    """The loop itself, its start phase too: bit for bit."""
    found = []
    for i, flags in enumerate(("--arm baseline", "--arm cd --alpha 0", "--arm hn --syn-ratio 0")):
        papers.run("vilta", *toy("--out", tmp_path / str(i), *flags.split()))
        found.append(weights_of(tmp_path / str(i)))
    for other in (*found[1:], weights_of(whole)):
        is_equal = {name for name, x in found[0].items() if torch.equal(x, other[name])}
        assert (other is not found[1] and other is not found[2]) != (is_equal == found[0].keys() == other.keys())


def test_a_run_in_pieces_and_what_is_clipped(tmp_path, monkeypatch):
    """Pieces of a few pairs, some of which have nothing to write. The word head's gradient is clipped by itself: in the
    start phase, however large it is, it takes nothing from the others'."""
    told, seen, clip, build = [], [], torch.nn.utils.clip_grad_norm_, vilta.build

    def spy(parameters, most, *args, **named):
        told.append(({id(p) for p in parameters}, most))
        return clip(parameters, most, *args, **named)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    monkeypatch.setattr(vilta, "build", lambda *args: seen.append(build(*args)) or seen[-1])
    flags = ("--captions-per-image", 2, "--micro-batch", 4, "--syn-ratio", 0.2, "--grad-clip", 0.5)
    papers.run("vilta", *toy("--out", tmp_path / "run", *flags))
    records = steps_of(tmp_path / "run")
    assert [record["written"] for record in records[2:]] == [pytest.approx(0.1, abs=1e-3)] * 2  # 2 of 20
    assert records[0]["lm"] == pytest.approx(np.log(seen[0].cfg.vocab_size), rel=0.2), "a mean over pieces, not a sum"
    heads, learns = {id(p) for p in seen[0].lm_head.parameters()}, {p for p in seen[0].parameters() if p.requires_grad}
    assert len(told) == 8 and {most for _, most in told} == {0.5}
    for (ours, _), (theirs, _) in zip(told[::2], told[1::2], strict=True):
        assert theirs == heads and not ours & heads and {id(p) for p in learns} <= ours | theirs


def test_a_downstream_run_begins_with_pretraining(whole, tmp_path):
    """Encoders and fusion come along, teacher and word heads stay behind; there is no start phase."""
    folder = tmp_path / "run"
    flags = "--task retrieval --lr 1e-12 --fusion-mult 1 --head-mult 1 --negatives 3".split()
    papers.run("vilta", *toy(*flags, "--init", whole, "--out", folder))
    before, after = (common.read_tensors((run / "best" / "model.safetensors").resolve()) for run in (whole, folder))
    for name, x in after.items():
        if not name.startswith(("rank_head.", "vision.patches.")):  # norms of the stem count on
            torch.testing.assert_close(x, before[name], atol=1e-6, rtol=1e-5, msg=name)
    assert not {name.split(".")[0] for name in after} & {"teacher", "lm_head", "word_head", "mlm_head"}
    torch.testing.assert_close(after["rank_head.weight"], before["itm_head.weight"][1:], atol=1e-6, rtol=0)
    assert [list(record)[1:3] for record in steps_of(folder)] == [["rank", "itm"]] * 4


# ---------------------------------------------------------------------------------------------------------------------
# What is told


@pytest.mark.parametrize(
    "argv, told",
    [
        ("--steps 3 --start-steps 3", "--start-steps 3 --steps 3: nothing is left for pre-training"),
        ("--steps 3 --start-steps 4", "--start-steps 4 --steps 3: nothing is left"),
        ("--image-size 60", "--image-size 60 --patch 16: the first must be a multiple of the second"),
        ("--arm both", "--arm both: it is one of baseline, cd, hn, cd+hn"),
        ("--task vcr", "--task vcr: it is one of pretrain, retrieval, vqa, nlvr2, ve"),
        ("--teacher-input masked", "--teacher-input masked: it is one of all_mask, same_as_student, unmasked"),
        ("--gen-head probed", "--gen-head probed: it is one of probe, static, joint; did you mean probe?"),
        ("--gen-encoder teacher", "--gen-encoder teacher: it is one of current, frozen"),
        ("--stem resnet", "--stem resnet: it is one of patch, conv"),
        ("--stem conv --patch 12 --image-size 60", "give a power of two and a multiple of 4"),
        ("--width 30 --heads 4", "--width 30 --heads 4: the first must be a multiple of the second"),
        ("--text-width 30 --text-heads 4", "--text-width 30 --text-heads 4: the first must be"),
        ("--alpha 1.1", "--alpha 1.1: give 1 or less"),
        ("--alpha -0.1", "--alpha -0.1"),
        ("--syn-ratio 2", "--syn-ratio 2.0: give 1 or less"),
        ("--rewrite 1.5", "--rewrite 1.5: give 1 or less"),
        ("--caption-noise 1.5", "--caption-noise 1.5: give 1 or less"),
        ("--gen-topk 0", "--gen-topk 0: give 1 or more"),
        ("--gen-ban -1", "--gen-ban -1"),
        ("--max-len 61", "--max-len 61: give 60 or less"),
        ("--batch 1 --captions-per-image 1", "--batch 1: too small for 1 captions a picture on 1 processes"),
        ("--task vqa --data coco", "--task vqa needs questions about pictures"),
        ("--init nowhere", "nowhere is not a run directory"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(argv, told):
    with pytest.raises(UserError, match=re.escape(told)):
        vilta.main([*argv.split(), "--device", "cpu", "--train-scenes", "9"])


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    """BERT's has no blank before a word, GPT-2's nothing to hide words behind."""
    texts = [text for texts in SAYS for text in texts]
    for kind, told in (("wordpiece", "no token of this tokenizer begins a word"), ("bpe", "has no mask token")):
        language.Tokenizer.train(texts, 400, kind).save(tmp_path / kind)
        with pytest.raises(UserError, match=told):
            papers.run("vilta", *toy("--tokenizer", tmp_path / kind, "--out", tmp_path / "run"))


def test_settings_that_are_allowed():
    for changes in ({}, {"stem": "conv"}, {"alpha": 0.0, "syn_ratio": 0.0}, {"alpha": 1.0, "syn_ratio": 1.0},
                    {"gen_ban": 0, "rewrite": 0.0, "teacher_topk": 0}, {"start_steps": 9}, {"steps": 0}):  # fmt: skip
        vilta.check(tiny(**changes))
    of = {"vqa": "vqa", "nlvr2": "nlvr2", "ve": "snli_ve"}
    for preset in vilta.PRESETS:
        for task in vilta.TASKS:
            flags = {"preset": preset, "task": task, "data": of.get(task, "coco")}
            vilta.check(common.build_config(vilta.Config, flags, vilta.PRESETS, vilta.RECIPES))


@pytest.mark.slow
def test_the_main_job_matches(tmp_path):
    """`python vilta.py` as README gives it: it knows which texts match, also where one word is wrong, by looking."""
    vilta.main(["--out", str(tmp_path / "run"), "--device", "cpu"])
    test = common.read_json(tmp_path / "run" / "metrics.json")["splits"]["test"]
    found, shuffled = test["metrics"], test["controls"]["shuffled_images"]
    assert found["itm_accuracy"] >= 0.80 and shuffled["itm_accuracy"] <= 0.58
    assert found["itm_accuracy_edited"] >= 0.65 and found["itm_accuracy_blind"] <= 0.6
