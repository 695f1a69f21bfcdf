"""SOHO against the authors' own code (tests/golden/soho_pretrain.npz, written by researchmm/soho).

In order: the first pass with its losses and gradients, the neck in training, the dictionary alone and on several
processes, positions and valid cells, the VQA model, a deep ResNet, the optimizers, the way of a picture to its pixels.
Weights go in through `soho.load_official` and `load_backbones`, sizes come from `soho.official_sizes`. Their code runs
the ResNet and the neck once for each sentence, ours once for each picture.
"""

import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ledger import Ledger
from PIL import Image
from torch import nn

import data
import soho

TOLERANCE = 1e-5  # of the reference, float32: features, states, logits
MLM_TOLERANCE = 5e-5  # of logits up to 16
BUFFERS = dict(tolerance=2e-6, relative=2.4e-7)  # of the dictionary; the second is two roundings of a large sum
AFTER_STEP, PIXELS = 1e-6, 1e-6  # of parameters after an optimizer's step; of normalised pixels
LOSS_RELATIVE, GRADIENT_RELATIVE, GRADIENT_ZERO = 1e-5, 1e-4, 1e-5
RESIZED_SHARE = 0.08  # of the grey levels may be 1 off: OpenCV rounds about 5 % otherwise
INPUTS = ("vqa_weights/*", "resnet_extra_weights/*", "resnet_extra/crop", "posenc/mask", "pad_anchor/anchor",
          "neck_train/*/anchor", "neck_train/*/apply", "vd_*/decay", "vd_*/before/*", "vd_*/features*",
          "mask_quirk/*_shape", "optim/lr_*", "optim/before/*", "optim/*/grad_*", "preproc/*/input_*")  # fmt: skip


def ledger(path, exempt=()):
    return Ledger(path, exempt, TOLERANCE, INPUTS)


def build(gold, task="pretrain", state=None, **settings):
    """The model of a task with the file's weights. Heads are not 64 wide here, and nothing is dropped."""
    state = gold.weights() if state is None else state
    given = {"task": task, "heads": gold.config["num_attention_heads"], "dropout": 0.0}
    cfg = soho.Config(**soho.official_sizes(state) | given | settings)
    answers = len(state.get("head.vqa.3.bias", ()))
    model = soho.SOHO(cfg, answers=tuple(map(str, range(answers))))
    soho.load_official(model, state)
    check_epsilons(gold, model)
    return model.eval()


def check_epsilons(gold, model):
    """A wrong one in a norm of the encoder moves the numbers by less than the tolerance."""
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            part = "neck" if name == "visual_norm" else "bert"
            assert module.eps == gold.config[f"layer_norm_eps_{part}"], name
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == gold.config["bn_eps"], name


def corrupted_rows(gold):
    """The batch that the file was made from, as `soho.corrupt` gives it; but the pictures are already normalised."""
    n = gold.tensor("inputs/next_label").numel()
    return {
        "pixels": gold.tensor("inputs/img"), "sizes": gold.tensor("inputs/img_shape"),
        "ids": gold.tensor("inputs/language_tokens").flatten(0, 1),
        "keep_mask": gold.tensor("inputs/language_attention").flatten(0, 1).bool(),
        "mlm_labels": gold.tensor("inputs/mask_labels").flatten(0, 1),
        "itm_labels": gold.tensor("inputs/next_label").flatten(), "anchors": gold.tensor("inputs/mvm_anchor").expand(n),
        "has_mvm": gold.tensor("inputs/mvm_apply") > 0, "mvm_counts": torch.ones(n, dtype=torch.bool),
    }  # fmt: skip


def run(model, batch):
    """What the model returns, and {module: its last output}."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})))
    out = model(batch)
    for hook in hooks:
        hook.remove()
    return out, seen


def copies(gold, x):
    """The same for each sentence of a picture."""
    return x.repeat_interleave(gold.tensor("inputs/next_label").size(1), 0)


def masked_codes(seen, k, anchors, has_mvm):
    """What MVM hides [R, N], and its labels as the authors' code has them."""
    codes, keep = (seen[name].flatten(1).repeat_interleave(k, 0) for name in ("codes", "keep_mask"))
    is_masked = soho.same_code(codes, keep, anchors, has_mvm)
    return is_masked, codes.masked_fill(~is_masked, soho.NOTHING)


def our_places(model):
    """{their name of a tensor: (our tensor's name, which part of it, of how many)}."""
    names = soho.official_names(model)
    return {theirs: (ours, i, len(names[ours])) for ours in names for i, theirs in enumerate(names[ours])}


# ---------------------------------------------------------------------------------------------------------------------
# The first pass, in evaluation mode


@torch.no_grad()
def check_first_pass(gold, monkeypatch):
    model, rows = build(gold), corrupted_rows(gold)
    B, R = len(rows["pixels"]), len(rows["ids"])
    found = model.see(rows["pixels"], rows["sizes"])
    h, w = found["codes"].shape[1:]
    assert soho.grid(rows["pixels"].shape[2:], model.cfg) == (h, w)
    out, seen = run(model, rows)
    gold.check("outputs/backbone_feat", seen["cnn"])
    gold.check("outputs/neck_conv_feat", copies(gold, found["v"]))
    gold.check("outputs/vd_indices", copies(gold, found["codes"]))
    gold.check("outputs/vd_quantized", copies(gold, seen["dictionary"][0].view(B, h * w, -1)))
    gold.check("outputs/vd_projected", copies(gold, seen["mixer.line"].flatten(1, 2)))
    gold.check("outputs/gate_logits", copies(gold, seen["mixer.gate_norm"]))
    gold.check("outputs/visual_tokens", seen["visual_norm"])
    gold.check("outputs/visual_attention", copies(gold, found["keep_mask"].flatten(1).long()))
    is_masked, labels = masked_codes(found, R // B, rows["anchors"], rows["has_mvm"])
    gold.check("outputs/mask_v_labels", labels)
    gold.check("outputs/text_embeddings", seen["text"])
    for i in range(model.cfg.layers):
        gold.check(f"outputs/hidden_states_{i + 1}", seen[f"encoder.{i}"])
    gold.check("outputs/itm_logits", out["itm"])
    # The model asks only where there is a target: first there, then everywhere, with the same cells hidden.
    is_word = rows["mlm_labels"] != soho.NOTHING
    assert (out["mlm"] - gold.tensor("outputs/mlm_logits")[is_word]).abs().max() <= MLM_TOLERANCE
    assert (out["mvm"] - gold.tensor("outputs/mvm_logits")[is_masked]).abs().max() <= TOLERANCE
    assert torch.equal(out["mvm_codes"], labels[is_masked])
    counts = rows["itm_labels"] > 0  # what is hidden elsewhere stays hidden, but is not asked about
    fewer = model(rows | {"mvm_counts": counts})
    assert torch.equal(fewer["mvm_codes"], labels[is_masked & counts[:, None]])
    theirs = gold.tensor("outputs/mvm_logits")[is_masked & counts[:, None]]
    assert fewer["mvm"].shape == theirs.shape and ((fewer["mvm"] - theirs).abs() <= TOLERANCE).all()
    with monkeypatch.context() as patch:
        place = model.place
        patch.setattr(model, "place", lambda tokens, keep, _, k: place(tokens, keep, is_masked, k))
        patch.setattr(soho, "same_code", lambda codes, *_: torch.ones_like(codes, dtype=torch.bool))
        all_out = model(rows | {"mlm_labels": torch.zeros_like(rows["mlm_labels"])})
    gold.check("outputs/mlm_logits", all_out["mlm"].view(R, -1, model.cfg.vocab_size), tolerance=MLM_TOLERANCE)
    gold.check("outputs/mvm_logits", all_out["mvm"].view(R, h * w, -1))
    assert torch.equal(all_out["mvm_codes"], copies(gold, found["codes"]).flatten())


def check_losses(gold):
    """Each loss and their sum, then the gradients of the sum, and the norm of every gradient."""
    model, rows = build(gold), corrupted_rows(gold)
    out = model(rows)
    found = soho.losses(model.cfg, out, rows)
    each = zip(out["itm"].split(1), rows["itm_labels"].split(1), strict=True)
    loss = {"loss_mlm": found["mlm"], "loss_mvm": found["mvm"], "total": sum(found.values()),
            "loss_match": torch.stack([soho.loss_itm(*pair) for pair in each])}  # fmt: skip
    for name, ours in loss.items():
        gold.check(f"losses/{name}", ours, tolerance=0.0, relative=LOSS_RELATIVE)
    loss["total"].backward()
    grads, parameters = {}, dict(model.named_parameters())
    for name, (ours, i, n) in our_places(model).items():
        if ours in parameters:
            grad = parameters[ours].grad
            grads[name] = None if grad is None else grad.chunk(n)[i]
    for name in gold.names("grads/"):
        scale = gold.tensor(f"grads/{name}").abs().max().item()
        gold.check(f"grads/{name}", grads[name], tolerance=GRADIENT_RELATIVE * scale)
    norms = json.loads(str(gold.arrays["grad_norms_json"]))
    assert norms.keys() == grads.keys()
    for name, theirs in norms.items():
        if theirs is None:
            assert grads[name] is None, name
        else:
            error = abs(grads[name].norm().item() - theirs)
            assert error <= max(GRADIENT_ZERO if theirs <= GRADIENT_ZERO else 0.0, GRADIENT_RELATIVE * theirs), name
    gold.compared.add("grad_norms_json")


@torch.no_grad()
def check_pad_anchor(gold):
    """The anchor is no part of one of the pictures: nothing is hidden there."""
    model, rows = build(gold), corrupted_rows(gold)
    anchors = gold.tensor("pad_anchor/anchor").expand_as(rows["anchors"])
    rows |= {"anchors": anchors, "has_mvm": torch.ones_like(rows["has_mvm"])}
    _, seen = run(model, rows)
    gold.check("pad_anchor/visual_tokens", seen["visual_norm"])
    found, k = model.see(rows["pixels"], rows["sizes"]), len(anchors) // len(rows["pixels"])
    gold.check("pad_anchor/mask_v_labels", masked_codes(found, k, anchors, rows["has_mvm"])[1])


# ---------------------------------------------------------------------------------------------------------------------
# The neck in training


class Given(nn.Module):
    """Stands for the ResNet: features that are already there."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features


@torch.no_grad()
def check_neck(gold):
    """Batch statistics and the dictionary see each picture once a sentence, as in their code."""
    model, rows = build(gold, vd_decay=gold.config["vd_decay"]), corrupted_rows(gold)
    model.cnn = Given(copies(gold, gold.tensor("outputs/backbone_feat")))
    model.train()
    place = our_places(model)
    images, sizes = copies(gold, rows["pixels"]), copies(gold, rows["sizes"])
    for step in sorted({name.split("/")[0] for name in gold.names("neck_train/")}):
        prefix = f"neck_train/{step}/"
        found = model.see(images, sizes)
        anchors = gold.tensor(f"{prefix}anchor").expand(len(images))
        is_masked, labels = masked_codes(found, 1, anchors, gold.tensor(f"{prefix}apply") > 0)
        gold.check(f"{prefix}visual_tokens", model.place(found["tokens"], found["keep_mask"], is_masked))
        gold.check(f"{prefix}visual_attention", found["keep_mask"].flatten(1).long())
        gold.check(f"{prefix}mask_v_labels", labels)
        for name in gold.names(f"{prefix}after/"):
            ours = model.state_dict()[place[f"neck.{name}"][0]]
            gold.check(f"{prefix}after/{name}", ours, **BUFFERS)


# ---------------------------------------------------------------------------------------------------------------------
# The dictionary alone


def dictionary_of(gold, group):
    """As it was before the first step, in training."""
    codes, width = gold.tensor(f"{group}/before/embed").shape
    cfg = soho.Config(codes=codes, width=width, vd_decay=float(gold.tensor(f"{group}/decay")))
    dictionary = soho.Dictionary(cfg)
    dictionary.load_state_dict(gold.weights(f"{group}/before/"))
    return dictionary.train()


def steps_of(gold, group):
    return sorted({name.split("/")[0] for name in gold.names(f"{group}/step")}, key=int)


def check_update(gold, prefix, state, quantized, indices, rank=""):
    gold.check(f"{prefix}quantized{rank}", quantized, **BUFFERS)
    gold.check(f"{prefix}indices{rank}", indices)
    for name in gold.names(f"{prefix}after/"):
        gold.check(f"{prefix}after/{name}", state[name], **BUFFERS)


def check_dictionary(gold, group):
    dictionary = dictionary_of(gold, group)
    for step in steps_of(gold, group):
        prefix = f"{group}/step{step}/"
        features = gold.tensor(f"{prefix}features").requires_grad_()
        quantized, indices = dictionary(features)
        check_update(gold, prefix, dictionary.state_dict(), quantized, indices)
        weight = torch.arange(quantized.numel()).view_as(quantized).float()
        (quantized * weight).sum().backward()
        assert torch.equal(features.grad, weight)  # as if the dictionary were not there


def one_of_several(rank, world, path, folder, port):
    """A process with its own features; what it found goes to a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    gold, told = ledger(path), []
    dictionary = dictionary_of(gold, "vd_2rank")
    for step in steps_of(gold, "vd_2rank"):
        found = dictionary(gold.tensor(f"vd_2rank/step{step}/features_rank{rank}"))
        told.append((*found, {name: x.clone() for name, x in dictionary.state_dict().items()}))
    torch.save(told, folder / f"{rank}.pt")
    dist.destroy_process_group()


def check_processes(gold, tmp_path):
    """Each with its features, and one process with the features of all."""
    steps = steps_of(gold, "vd_2rank")
    world = len(gold.names(f"vd_2rank/step{steps[0]}/features_rank"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_of_several, args=(world, gold.path, tmp_path, port), nprocs=world)
    for rank in range(world):
        for step, (quantized, indices, state) in zip(steps, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            check_update(gold, f"vd_2rank/step{step}/", state, quantized, indices, f"_rank{rank}")
    dictionary = dictionary_of(gold, "vd_2rank")
    for step in steps:
        prefix = f"vd_2rank/step{step}/"
        parts = [gold.tensor(f"{prefix}features_rank{rank}") for rank in range(world)]
        split = [x.split([len(part) for part in parts]) for x in dictionary(torch.cat(parts))]
        for rank, (quantized, indices) in enumerate(zip(*split, strict=True)):
            check_update(gold, prefix, dictionary.state_dict(), quantized, indices, f"_rank{rank}")


# ---------------------------------------------------------------------------------------------------------------------
# Positions and valid cells


def check_positions(gold):
    theirs = gold.tensor("posenc/output")
    gold.check("posenc/output", soho.sine_positions(gold.tensor("posenc/mask"), theirs.size(1)))


@torch.no_grad()
def check_valid_cells(gold):
    """Their mask is square; ours need not be."""
    for case in sorted({name.split("/")[0] for name in gold.names("mask_quirk/")}):
        prefix = f"mask_quirk/{case}/"
        sizes, shape = (gold.tensor(f"{prefix}{name}_shape") for name in ("img", "pad"))
        for name, square in (("official", True), ("intended", False)):
            model = build(gold, square_mask=square)
            assert soho.grid(shape.tolist(), model.cfg) == gold.tensor(prefix + name).shape
            found = model.see(torch.zeros(1, 3, *shape.tolist()), sizes[None])
            gold.check(prefix + name, found["keep_mask"][0])


# ---------------------------------------------------------------------------------------------------------------------
# The VQA model, and a deep ResNet


@torch.no_grad()
def check_vqa(gold):
    """From a checkpoint of pre-training, whose dictionary is left out, and from one of VQA, which has none."""
    state = gold.weights() | gold.weights("vqa_weights/")
    lacks = ("neck.vq.", "neck.gate_fc.", "neck.pos_line.", "neck.mask_emb.", "head.match_class.", "mask_l_fc.")
    own = {name: x for name, x in state.items() if not name.startswith(lacks)}
    rows = {
        "pixels": gold.tensor("inputs/img"), "sizes": gold.tensor("inputs/img_shape"),
        "ids": gold.tensor("vqa/inputs/language_tokens"),
        "keep_mask": gold.tensor("vqa/inputs/language_attention").bool(),
        "targets": gold.tensor("vqa/inputs/vqa_labels"),
    }  # fmt: skip
    assert soho.official_sizes(own)["vd_mode"] == "none"
    for model in (build(gold, "vqa", state, vd_mode="none"), build(gold, "vqa", own)):
        out, seen = run(model, rows)
        gold.check("vqa/outputs/visual_tokens", seen["visual_norm"])
        cells = model.see(rows["pixels"], rows["sizes"])["keep_mask"].flatten(1)
        gold.check("vqa/outputs/visual_attention", cells.long())
        # All states; the model itself computes the first slot alone in its last block.
        states = model.encode(seen["text"], rows["keep_mask"], seen["visual_norm"], cells)
        gold.check("vqa/outputs/fusion_feature", states)
        gold.check("vqa/outputs/logits", out["logits"])
        loss = soho.losses(model.cfg, out, rows)["vqa"]
        gold.check("vqa/losses/loss_cls", loss, tolerance=0.0, relative=LOSS_RELATIVE)


@torch.no_grad()
def check_deep_resnet(gold):
    state, theirs = gold.weights("resnet_extra_weights/"), gold.tensor("resnet_extra/output")
    sizes = soho.official_sizes(gold.weights()) | soho.cnn_sizes(state) | {"heads": gold.config["num_attention_heads"]}
    assert sizes["depth"] == gold.config["extra_depth"]
    model, crop = soho.SOHO(soho.Config(**sizes)).eval(), int(gold.tensor("resnet_extra/crop"))
    soho.load_backbones(model, state, None)
    gold.check("resnet_extra/output", model.cnn(gold.tensor("inputs/img")[: len(theirs), :, :crop, :crop]))


# ---------------------------------------------------------------------------------------------------------------------
# The optimizers, and the way of a picture to its pixels


def check_optimizers(gold):
    """Their constants are our defaults. Half of twice the rate, so that the share counts."""
    model = nn.ModuleDict({"cnn": nn.ParameterList(), "rest": nn.ParameterList()})
    for part, name in (("cnn", "sgd"), ("rest", "adamw")):
        model[part].append(nn.Parameter(gold.tensor(f"optim/before/{name}").clone()))
    lr, cnn_lr = (2 * float(gold.tensor(f"optim/lr_{name}")) for name in ("adamw", "sgd"))
    optimizers = soho.Optimizers(soho.Config(lr=lr, cnn_lr=cnn_lr), model)
    for number in sorted({int(name.split("/")[0]) for name in gold.names("optim/step")}):
        prefix = f"optim/step{number}/"
        for part, name in (("cnn", "sgd"), ("rest", "adamw")):
            model[part][0].grad = gold.tensor(f"{prefix}grad_{name}").clone()
        optimizers.step(0.5, number)
        for part, name in (("cnn", "sgd"), ("rest", "adamw")):
            gold.check(prefix + name, model[part][0], tolerance=AFTER_STEP)
            assert model[part][0].grad is None  # so that the next gradient is not added to this one


def check_pixels(gold):
    long, short = gold.config["preproc_scale"]
    for case in sorted({name.split("/")[0] for name in gold.names("preproc/")}):
        prefix = f"preproc/{case}/"
        image, theirs = (gold.tensor(f"{prefix}{name}_bgr_uint8").flip(2) for name in ("input", "resized"))
        ours = data.within(Image.fromarray(image.numpy()), short, long).permute(1, 2, 0)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.uint8
        error = (ours.int() - theirs.int()).abs()
        assert error.max() <= 1 and error.float().mean() <= RESIZED_SHARE, f"{prefix}: {error.float().mean():.3f}"
        gold.compared.add(f"{prefix}resized_bgr_uint8")
        batch = data.pad_pixels([theirs.permute(2, 0, 1)], 32)
        gold.check(f"{prefix}img_shape", batch["sizes"][0])
        gold.check(f"{prefix}pad_shape", torch.tensor(batch["pixels"].shape[2:]))
        pixels = soho.normalise(batch["pixels"], batch["sizes"])[0]
        gold.check(f"{prefix}output_chw", pixels, tolerance=PIXELS)


# ---------------------------------------------------------------------------------------------------------------------


def check_everything(gold, monkeypatch, tmp_path):
    """All groups that the file has."""
    with monkeypatch.context() as patch:
        patch.setattr(soho, "normalise", lambda pixels, sizes: pixels)  # the file's pictures are normalised
        if gold.has("outputs/"):
            check_first_pass(gold, monkeypatch)
        if gold.has("losses/"):
            check_losses(gold)
        if gold.has("pad_anchor/"):
            check_pad_anchor(gold)
        if gold.has("vqa/"):
            check_vqa(gold)
    if gold.has("neck_train/"):
        check_neck(gold)
    for group in ("vd_fresh", "vd_warm"):
        if gold.has(f"{group}/"):
            check_dictionary(gold, group)
    if gold.has("vd_2rank/"):
        check_processes(gold, tmp_path)
    if gold.has("posenc/"):
        check_positions(gold)
    if gold.has("mask_quirk/"):
        check_valid_cells(gold)
    if gold.has("resnet_extra/"):
        check_deep_resnet(gold)
    if gold.has("optim/"):
        check_optimizers(gold)
    if gold.has("preproc/"):
        check_pixels(gold)
    gold.close()


def test_official_numbers(golden_path, exempt, monkeypatch, tmp_path):
    path = golden_path("soho_pretrain.npz")
    check_everything(ledger(path, exempt(path.name)), monkeypatch, tmp_path)


def test_no_key_is_overlooked(golden_path, tmp_path, monkeypatch, capsys):
    """A result that nothing is compared with fails the test above, even with a name much like an input's; a group that
    the file does not have is no failure."""
    arrays = np.load(golden_path("soho_pretrain.npz"), allow_pickle=False)
    few = {key: arrays[key] for key in arrays.files if key.startswith(("config", "posenc", "vd_warm"))}
    more = {"posenc/masks": np.zeros(1), "vd_warm/after/embed": np.zeros(1), "vqa_inputs": np.zeros(1)}
    np.savez(tmp_path / "few.npz", **few)
    check_everything(ledger(tmp_path / "few.npz"), monkeypatch, tmp_path)
    np.savez(tmp_path / "more.npz", **few, **more)
    with pytest.raises(AssertionError) as told:
        check_everything(ledger(tmp_path / "more.npz"), monkeypatch, tmp_path)
    capsys.readouterr()  # its lines are not those of the reference
    assert str(sorted(more)) in str(told.value)
