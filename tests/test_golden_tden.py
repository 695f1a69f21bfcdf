"""TDEN against the authors' own code (tests/golden/tden_pretrain.npz, written by YehLi/xmodaler).

In order: the first pass and its losses, the two wirings of the decoder, the retrieval model, the two-pass step with its
gradients, the same with a real update between the passes, the captioner and its decoding, the self-critical loss, the
answer head. Weights always go in through `tden.load_official`, sizes come from `tden.official_sizes`; -1 is their label
of nothing to predict, tden.NOTHING ours.
"""

import re
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ledger import Ledger

import common
import decoding
import regions
import tden

TOLERANCE = 1e-4  # of the reference, float32: states, logits, losses
AFTER_ADAMW = 1e-3
NORM_RELATIVE, NORM_ABSOLUTE = 1e-3, 1e-5  # of norms of gradients; what is truly 0 is noise in the file


def ledger(path, exempt=()):
    """What the second pass reads is a result of the first."""
    return Ledger(path, exempt, TOLERANCE, results=("pass2/*",))


def labels(gold, key):
    return gold.tensor(key).where(gold.tensor(key) >= 0, tden.NOTHING)


def build(gold, task, state=None, **settings):
    """The model of a task with the file's weights. Heads are not 64 wide here, and nothing is dropped."""
    state = gold.weights() if state is None else state
    given = {ours: gold.config[theirs] for ours, theirs in
             (("heads", "num_heads"), ("margin", "margin"), ("hardest", "max_violation"))}  # fmt: skip
    cfg = tden.Config(task=task, dropout=0.0, **tden.official_sizes(state) | given | settings)
    answers = len(state.get("predictor.u_logits.1.bias", ()))
    model = tden.TDEN(cfg, answers=tuple(map(str, range(answers))))
    tden.load_official(model, state)
    check_epsilons(gold, model)
    return model.eval()


def check_epsilons(gold, model):
    """A wrong one in the prediction heads or the answer head moves the numbers by less than the tolerance."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            is_embed = name in ("tokens.norm", "region_embedding.norm") or name.startswith("answer_head.")
            assert module.eps == gold.config[f"layer_norm_eps_{'embed' if is_embed else 'bert'}"], name
        if isinstance(module, torch.nn.BatchNorm1d):
            assert module.eps == gold.config["batch_norm_eps"], name


def regions_of(gold):
    return {"features": gold.tensor("inputs/region_feats"), "locations": gold.tensor("inputs/region_boxes"),
            "region_keep_mask": gold.tensor("inputs/region_mask").bool()}  # fmt: skip


def corrupted_rows(gold):
    """The batch that the file was made from, as `tden.corrupt` gives it."""
    keep = gold.tensor("inputs/token_mask").bool()
    assert not gold.tensor("inputs/u_type_ids").any() and gold.tensor("inputs/g_type_ids").all()  # as in TDEN.pretrain
    return regions_of(gold) | {
        "u_ids": gold.tensor("inputs/u_token_ids"), "g_ids": gold.tensor("inputs/g_token_ids"), "keep_mask": keep,
        "mlm_labels": labels(gold, "inputs/mlm_labels"), "msg_labels": labels(gold, "inputs/msg_labels"),
        "region_is_masked": gold.tensor("inputs/moc_labels") >= 0,
        "moc_targets": gold.tensor("inputs/moc_target_probs"), "image_ids": gold.tensor("inputs/image_ids"),
    }  # fmt: skip


def run(model, batch):
    """What the model returns, and {part: output of each of its blocks}."""
    seen, hooks = defaultdict(list), []
    for name, module in model.named_modules():
        if part := re.fullmatch(r"(tokens|region_embedding|\w+coder)(\.\d+)?", name):
            hooks.append(module.register_forward_hook(lambda _, __, out, part=part[1]: seen[part].append(out)))
    out = model(batch)
    for hook in hooks:
        hook.remove()
    return out, seen


def check_logits(gold, prefix, model, seen, rows):
    """The heads on all real rows; the model itself applies them only where there is a target."""
    v, t = seen["cross_encoder"][-1]
    gold.check(f"{prefix}mlm_logits", model.lm_head(t), rows["keep_mask"])
    gold.check(f"{prefix}msg_logits", model.lm_head(seen["cross_decoder"][-1]), rows["keep_mask"])
    gold.check(f"{prefix}moc_logits", model.moc_head(v), rows["region_keep_mask"])


def check_losses(gold, prefix, model, out, rows, tolerance=TOLERANCE):
    """Each loss and, where the file has it, their sum, which is returned."""
    found = tden.losses(model.cfg, out, rows)
    total = sum(found.values())
    for name in gold.names(prefix):
        if "undivided" not in name:
            gold.check(prefix + name, total if name == "total" else found[name], tolerance=tolerance)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The first pass, in evaluation mode


@torch.no_grad()
def check_first_pass(gold):
    model, rows = build(gold, "pretrain"), corrupted_rows(gold)
    words, objects = rows["keep_mask"], rows["region_keep_mask"]
    out, seen = run(model, rows)
    gold.check("outputs/region_embed", seen["region_embedding"][0], objects)
    for copy, state in zip("ug", seen["tokens"][0].chunk(2), strict=True):
        gold.check(f"outputs/{copy}_token_embed", state, words)
    for i, state in enumerate(seen["object_encoder"]):
        gold.check(f"outputs/object_encoder_{i}", state, objects)
    for i, states in enumerate(seen["sentence_encoder"]):
        for copy, state in zip("ug", states.chunk(2), strict=True):
            gold.check(f"outputs/sentence_encoder_{copy}_{i}", state, words)
    for i, (v, t) in enumerate(seen["cross_encoder"]):
        gold.check(f"outputs/cross_encoder_v_{i}", v, objects)
        gold.check(f"outputs/cross_encoder_t_{i}", t, words)
    for i, state in enumerate(seen["cross_decoder"]):
        gold.check(f"outputs/cross_decoder_{i}", state, words)
    check_logits(gold, "outputs/", model, seen, rows)
    gold.check("outputs/ism_image_embed", out["image"])
    gold.check("outputs/ism_text_embed", out["text"])
    gold.check("outputs/ism_similarity", out["text"] @ out["image"].T)
    check_losses(gold, "losses/", model, out, rows)
    args = out["text"], out["image"], rows["image_ids"], model.cfg.margin
    if gold.has("losses/ism_undivided_hard"):
        gold.check("losses/ism_undivided_hard", tden.loss_ism(*args) * len(words))
    if gold.has("losses/ism_undivided_all"):
        gold.check("losses/ism_undivided_all", tden.loss_ism(*args, hardest=False))


@torch.no_grad()
def check_wirings(gold):
    """What the decoder sees: in the official model the understanding copy, through the regions; of "object" nothing."""
    rows = corrupted_rows(gold)
    plain = rows | {"u_ids": gold.tensor("inputs/plain_token_ids")}
    if gold.has("probe/"):
        model = build(gold, "pretrain", decoder_memory="understanding")
        told = model.lm_head(run(model, plain)[1]["cross_decoder"][-1])
        gold.check("probe/msg_logits_with_plain_u", told, rows["keep_mask"])
    if gold.has("object_memory/"):
        model = build(gold, "pretrain", decoder_memory="object")
        out, seen = run(model, rows)
        gold.check("object_memory/msg_logits", model.lm_head(seen["cross_decoder"][-1]), rows["keep_mask"])
        check_losses(gold, "object_memory/losses/", model, out, rows)
        assert (model(plain)["msg"] - out["msg"]).abs().max() < 1e-6  # whatever the understanding copy says


@torch.no_grad()
def check_retrieval(gold):
    """The same embeddings from the model without a cross-modal part, whose loss is a sum over the pairs."""
    rows = corrupted_rows(gold)
    model = build(gold, "retrieval", batch=len(rows["u_ids"]))
    out = model(rows | {"ids": rows["u_ids"]})
    gold.check("outputs/ism_image_embed", out["image"])
    gold.check("outputs/ism_text_embed", out["text"])
    if gold.has("losses/ism_undivided_hard") and model.cfg.hardest:
        gold.check("losses/ism_undivided_hard", tden.losses(model.cfg, out, rows)["ism"])


# ---------------------------------------------------------------------------------------------------------------------
# The two-pass step, in training mode: batch statistics in the poolers' norms


def second_rows(rows, out):
    """The batch of the second pass, in which there is no ISM."""
    kept = {name: x for name, x in rows.items() if name != "image_ids"}
    return kept | tden.second_inputs(rows, out["mlm"], out["msg"])


def check_gradients(gold, prefix, model):
    """The norm of each of their tensors; our key and value projections are one tensor, their LM bias has two names."""
    theirs, norms = tden.official_names(model), {}
    for ours, p in model.named_parameters():
        names = theirs[ours]
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        norms |= {name: part.norm() for name, part in zip(names, grad.chunk(len(names)), strict=True)}
    norms["predictor.bias"] = norms["predictor.decoder.bias"]
    for name in gold.names(prefix):
        gold.check(prefix + name, norms[name], tolerance=NORM_ABSOLUTE, relative=NORM_RELATIVE)


def check_pass(gold, prefix, model, rows):
    out, seen = run(model, rows)
    check_logits(gold, prefix, model, seen, rows)
    check_losses(gold, f"{prefix}losses/", model, out, rows).backward()
    check_gradients(gold, f"{prefix}grad_norm/", model)
    return out


def check_two_passes(gold):
    """Both passes with unchanged weights."""
    model, rows = build(gold, "pretrain").train(), corrupted_rows(gold)
    out = check_pass(gold, "train/pass1/", model, rows)
    gold.check("train/pass1/ism_similarity", out["text"] @ out["image"].T)
    if gold.has("pass2/", "train/pass2/"):
        rows = second_rows(rows, out)
        gold.check("pass2/inputs/u_token_ids", rows["u_ids"])
        gold.check("pass2/inputs/g_token_ids", rows["g_ids"])
        model.zero_grad()
        check_pass(gold, "train/pass2/", model, rows)


def check_update_between(gold):
    """The same with a step of the optimizer that trains between them."""
    model, rows = build(gold, "pretrain").train(), corrupted_rows(gold)
    optimizer = common.adamw(model, lambda name: 1e-3, 0.01, (0.9, 0.999), all_matrices=True)
    for group in optimizer.param_groups:  # a single small step tells neither betas nor decay
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
        assert all(group["weight_decay"] == (0.01 if p.ndim > 1 else 0.0) for p in group["params"])
    out = model(rows)
    sum(tden.losses(model.cfg, out, rows).values()).backward()
    optimizer.step()
    rows = second_rows(rows, out)
    check_losses(gold, "train/adamw_lr1e-3/pass2/losses/", model, model(rows), rows, AFTER_ADAMW)


# ---------------------------------------------------------------------------------------------------------------------
# The captioner


@torch.no_grad()
def check_captioner(gold):
    model = build(gold, "caption")
    rows = regions_of(gold) | {"ids": gold.tensor("captioner/inputs/token_ids")}
    targets = labels(gold, "captioner/inputs/targets")
    is_real = targets != tden.NOTHING
    out, seen = run(model, rows)
    for i, state in enumerate(seen["cross_decoder"]):
        gold.check(f"captioner/outputs/cross_decoder_{i}", state, is_real)
    gold.check("captioner/outputs/logits", out["logits"], is_real)
    rows |= {"targets": targets}
    out = model(rows)
    for name in gold.names("captioner/losses/"):
        model.cfg.label_smoothing = float(name.removeprefix("label_smoothing_")) if "smoothing" in name else 0.0
        gold.check(f"captioner/losses/{name}", tden.losses(model.cfg, out, rows)["caption"])


@torch.no_grad()
def check_decoding(gold):
    """Greedy decoding and beam search, each with cached keys and values and without."""
    model, rows = build(gold, "caption"), regions_of(gold)
    bos, eos = gold.config["cls_id"], gold.config["sep_id"]
    for name in gold.names("captioner/outputs/"):
        if not (kind := re.fullmatch(r"(greedy|beam(\d+))_ids", name)):
            continue
        theirs = gold.tensor(f"captioner/outputs/{name}")
        B, T = theirs.shape
        for cached in (True, False):
            decoder = tden.Decoder(model, rows, cached)
            ids, log_p = decoding.competing_beams(decoder, B, int(kind[2] or 1), bos, eos, T)
            # After the end of a caption ours are 0, like theirs of beams; greedy decoding of theirs goes on.
            is_real = decoding.up_to_end(theirs, eos) if kind[1] == "greedy" else None
            gold.check(f"captioner/outputs/{name}", ids, is_real)
            gold.check(f"captioner/outputs/{kind[1]}_logprobs", log_p, is_real)


def check_self_critical(gold):
    ids, log_p = gold.tensor("self_critical/inputs/sample_ids"), gold.tensor("self_critical/inputs/log_probs")
    advantages = gold.tensor("self_critical/inputs/advantage")[:, None].expand_as(log_p)
    is_real = decoding.up_to_end(ids, gold.config["sep_id"])
    gold.check("self_critical/losses/reward", tden.loss_scst(log_p[is_real], advantages[is_real]))


# ---------------------------------------------------------------------------------------------------------------------
# The answer head


@torch.no_grad()
def check_vqa(gold, monkeypatch):
    shared = {name: x for name, x in gold.weights().items() if not name.startswith("predictor.")}
    model = build(gold, "vqa", shared | gold.weights("vqa/weights/"))
    ids, keep = gold.tensor("inputs/plain_token_ids"), gold.tensor("inputs/token_mask").bool()
    rows = regions_of(gold) | {"ids": ids, "segments": torch.zeros_like(ids), "keep_mask": keep}
    out, seen = run(model, rows)
    for i, (_, t) in enumerate(seen["cross_encoder"]):
        gold.check(f"vqa/outputs/cross_encoder_t_{i}", t, keep)
    for i, state in enumerate(seen["cross_decoder"]):
        gold.check(f"vqa/outputs/cross_decoder_{i}", state, keep)
    found = tden.losses(model.cfg, out, {"targets": gold.tensor("vqa/inputs/targets")})
    for name in "ug":
        gold.check(f"vqa/outputs/{name}_logits", out[name])
        gold.check(f"vqa/losses/bce_{name}", found[name])
    monkeypatch.setattr(regions, "of_batch", lambda *_: regions_of(gold))  # the file's have their global region
    gold.check("vqa/outputs/answers", model.answer_scores(rows).argmax(1))


# ---------------------------------------------------------------------------------------------------------------------


def check_everything(gold, monkeypatch):
    """All groups that the file has."""
    if gold.has("outputs/"):
        check_first_pass(gold)
        check_retrieval(gold)
    check_wirings(gold)
    if gold.has("train/pass1/"):
        check_two_passes(gold)
    if gold.has("train/adamw_lr1e-3/"):
        check_update_between(gold)
    if gold.has("captioner/"):
        check_captioner(gold)
        check_decoding(gold)
    if gold.has("self_critical/"):
        check_self_critical(gold)
    if gold.has("vqa/"):
        check_vqa(gold, monkeypatch)
    gold.close()


def test_official_numbers(golden_path, exempt, monkeypatch):
    path = golden_path("tden_pretrain.npz")
    check_everything(ledger(path, exempt(path.name)), monkeypatch)


def test_no_key_is_overlooked(golden_path, tmp_path, monkeypatch, capsys):
    """A result that nothing is compared with fails the test above, even with a name much like the others'."""
    arrays = dict(np.load(golden_path("tden_pretrain.npz"), allow_pickle=False))
    arrays |= {"outputs/inputs_of_vqa": np.zeros(1), "vqa/outputs/weights": np.zeros(1), "pass2/inputs/x": np.zeros(1)}
    np.savez(tmp_path / "more.npz", **arrays, **{"vqa/inputs/x": np.zeros(1)})
    with pytest.raises(AssertionError) as told:
        check_everything(ledger(tmp_path / "more.npz"), monkeypatch)
    capsys.readouterr()  # its line is not that of the reference
    assert "['outputs/inputs_of_vqa', 'pass2/inputs/x', 'vqa/outputs/weights']" in str(told.value)
    gold = ledger(tmp_path / "more.npz", [("outputs/*", "a reason")])
    assert "outputs/region_embed" in gold.exempt and not gold.exempt & gold.to_cover


def test_corruption_makes_what_the_file_holds(golden_path):
    """What is no luck in `corrupt`: masks, labels, the global region, which pairs are of the same picture."""
    gold = ledger(golden_path("tden_pretrain.npz"))
    rows, ids, config = corrupted_rows(gold), gold.tensor("inputs/plain_token_ids"), gold.config
    keep, real_regions = rows["keep_mask"], rows["region_keep_mask"][:, 1:]
    B, N = real_regions.shape
    left = 20.0 * torch.arange(N)[:, None]  # of boxes that stand apart
    batch = {
        "ids": ids[:, :-1], "targets": ids[:, 1:].masked_fill(~keep[:, 1:], tden.NOTHING),
        "regions": real_regions[:, :, None].expand(-1, -1, config["visual_in_dim"]).float(),
        "regions_boxes": torch.cat([left, 0 * left, left + 9, 0 * left + 9], dim=1).expand(B, -1, -1),
        "regions_locations": rows["locations"][:, 1:], "regions_keep_mask": real_regions,
        "regions_classes": rows["moc_targets"], "image_id": rows["image_ids"].tolist(),
    }  # fmt: skip
    tok = SimpleNamespace(pad=config["pad_id"], bos=config["cls_id"], eos=config["sep_id"], mask=config["mask_id"])
    cfg = build(gold, "pretrain", word_mask=1.0, region_mask=0.5).cfg  # every word: labels are still the true ones
    ours = tden.corrupt(batch, tok, cfg, torch.Generator().manual_seed(1))
    for name in ("msg_labels", "keep_mask", "locations", "region_keep_mask", "moc_targets"):
        assert torch.equal(ours[name], rows[name]), name
    is_word = keep & (ids != tok.bos) & (ids != tok.eos)
    assert torch.equal(ours["mlm_labels"], ids.masked_fill(~is_word, tden.NOTHING))
    assert torch.equal(ours["u_ids"], ours["g_ids"]) and not torch.equal(ours["u_ids"], ids)
    assert torch.equal(ours["image_ids"][:, None] == ours["image_ids"], rows["image_ids"][:, None] == rows["image_ids"])
    # The global region is the mean of those that are not zeroed: here of ones, in the file of its features.
    shown = real_regions & ~ours["region_is_masked"]
    assert (ours["region_is_masked"] & real_regions).any() and shown.any()
    assert torch.equal(ours["features"][..., 0], torch.cat([shown.any(1, keepdim=True), shown], dim=1).float())
    n = rows["features"][:, 1:].ne(0).any(2).sum(1)
    theirs = regions.with_global(rows["features"][:, 1:], rows["locations"][:, 1:], real_regions, n)["features"]
    assert (theirs - rows["features"]).abs().max() <= 1e-6
