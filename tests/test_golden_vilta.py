"""ViLTA's network against METER's own code and transformers' RoBERTa (tests/golden/vilta_fusion.npz).

In order: the vision encoder, the language encoder with its word head, the fusion, the tasks (on states that the file
gives, then from pixels and words to the losses), the spellings of official weights, what a task makes of weights that
were for another. The file's three groups of weights make METER's state dict, which goes in through `vilta.tidy`,
`official_sizes` and `load_official`. What ViLTA adds, its losses and its writing, has no reference.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ledger import Ledger
from safetensors.torch import save_file
from torch import nn

import vilta
import weights

TOLERANCE = 1e-5  # of the reference, float32: states, logits, losses
# Inputs: a text, the same with words hidden, a picture, a second picture; as the fusion takes them, and as they are
STATES = ("text_feats", "text_feats", "image_feats", "image_feats_2")
WHOLE = ("input_ids", "input_ids_mlm", "pixel_values", "pixel_values_2")


def ledger(path, exempt=()):
    return Ledger(path, exempt, TOLERANCE)


@pytest.fixture
def golden(golden_path, exempt, monkeypatch):
    monkeypatch.setattr(vilta, "normalise", lambda pixels: pixels)  # the file's pictures are normalised
    path = golden_path("vilta_fusion.npz")
    return ledger(path, exempt(path.name))


def meter(gold):
    """The three groups of weights under METER's names."""
    clip = {f"vit_model.{name}": x for name, x in gold.weights("weights/clip/").items()}
    roberta = {re.sub(r"^roberta\.", "text_transformer.", name): x
               for name, x in gold.weights("weights/roberta/").items()}  # fmt: skip
    return gold.weights("weights/fusion/") | roberta | clip


def settings_of(gold):
    """What no shape tells: heads are not 64 wide here, and nothing is dropped."""
    ours = {"heads": "num_heads", "text_heads": "text_heads", "vision_heads": "clip_heads", "image_size": "image_size"}
    return {name: gold.config[theirs] for name, theirs in ours.items()} | {"dropout": 0.0}


def build(gold, task, state=None, **settings):
    """The model of a task with the file's weights, in evaluation mode."""
    state = vilta.tidy({"epoch": 9, "state_dict": meter(gold) if state is None else state})  # as Lightning writes it
    cfg = vilta.Config(**{"task": task} | vilta.official_sizes(state) | settings_of(gold) | settings)
    answers = len(state.get("vqa_classifier.3.bias", ()))
    model = vilta.ViLTA(cfg, answers=tuple(map(str, range(answers))))
    vilta.load_official(model, state)
    check_epsilons(gold, model)
    return model.eval()


def check_epsilons(gold, model):
    """A wrong one in a head moves the numbers by less than the tolerance."""
    parts = {"vision": "clip", "text": "text", "lm_head": "text", "teacher": "text", "text_layers": "fusion",
             "image_layers": "fusion", "mlm_head": "mlm_head", "answer_head": "classifier"}  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == gold.config[f"{parts[name.split('.')[0]]}_layer_norm_eps"], name


def watch(model, call):
    """What `call` returns, and {module: its last output}."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})))
    found = call()
    for hook in hooks:
        hook.remove()
    return found, seen


def real(gold):
    return gold.tensor("inputs/text_mask").bool()


def assert_close(ours, theirs, tolerance=TOLERANCE):
    assert ours.shape == theirs.shape and ours.numel()
    assert (ours - theirs).abs().max() <= tolerance


# ---------------------------------------------------------------------------------------------------------------------
# The two encoders


@torch.no_grad()
def check_vision(gold):
    model = build(gold, "ve")
    for name in gold.names("outputs/clip_tokens"):  # "" and "_2"
        gold.check(f"outputs/clip_tokens{name}", model.vision(gold.tensor(f"inputs/pixel_values{name}")))


@torch.no_grad()
def check_language(gold):
    model, keep = build(gold, "pretrain", arm="cd"), real(gold)
    ids, hidden_ids = gold.tensor("inputs/input_ids"), gold.tensor("inputs/input_ids_mlm")
    gold.check("outputs/roberta_position_ids", vilta.text_positions(keep))
    for text in (model.text, model.teacher.text):
        states, seen = watch(text, lambda text=text: text(hidden_ids, keep))
        for name in gold.names("outputs/roberta_hidden_"):
            state = seen["norm" if name == "0" else f"blocks.{int(name) - 1}"]
            gold.check(f"outputs/roberta_hidden_{name}", state, keep)
        assert torch.equal(states, seen[f"blocks.{model.cfg.text_layers - 1}"])
        gold.check("outputs/roberta_last_hidden_unmasked", text(ids, keep), keep)
    gold.check("outputs/roberta_mlm_logits", model.lm_head(model.text(hidden_ids, keep), model.text.word.weight), keep)
    logits = model.teacher(hidden_ids, keep, torch.ones_like(keep))
    gold.check("outputs/roberta_mlm_logits", logits.view(*ids.shape, -1), keep)


# ---------------------------------------------------------------------------------------------------------------------
# The fusion


class Given(nn.Module):
    """Stands for the language encoder: states that are already there."""

    def forward(self, states, keep_mask):
        return states


def without_encoders(model):
    model.vision, model.text = nn.Identity(), Given()
    return model


@torch.no_grad()
def check_fusion(gold):
    """All states of all layers; then what the model leaves out of the last where it needs less."""
    model, keep = without_encoders(build(gold, "pretrain", arm="baseline")), real(gold)
    x, y = model.read(gold.tensor("inputs/text_feats")), model.see(gold.tensor("inputs/image_feats"))
    gold.check("outputs/text_embeds", x, keep)
    gold.check("outputs/image_embeds", y)
    (x_end, y_end), seen = watch(model, lambda: model.fuse(x, keep, y))
    for i in range(model.cfg.layers):
        gold.check(f"outputs/text_layer_{i}", seen[f"text_layers.{i}"], keep)
        gold.check(f"outputs/image_layer_{i}", seen[f"image_layers.{i}"])
    assert torch.equal(x_end, seen[f"text_layers.{i}"]) and torch.equal(y_end, seen[f"image_layers.{i}"])
    text_only, nothing = model.fuse(x, keep, y, "text")
    gold.check(f"outputs/text_layer_{i}", text_only, keep)
    assert nothing is None
    first = model.fuse(x, keep, y, "first")
    for state, theirs in zip(first, ("text", "image"), strict=True):
        assert_close(state, gold.tensor(f"outputs/{theirs}_layer_{i}")[:, :1])
    for states in ((x_end, y_end), first):
        cls = model.pool(*states)
        gold.check("outputs/cls_feats", cls)
        for name, part in zip(("text", "image"), cls.chunk(2, 1), strict=True):
            gold.check(f"outputs/cls_{name}", part)
    if gold.has("outputs/cls_image_avgpool"):  # of METER with a Swin, whose tokens have no first one
        gold.check("outputs/cls_image_avgpool", model.image_pooler(y_end.mean(1)).tanh())
    if gold.has("outputs/cls_feats_2"):
        model = without_encoders(build(gold, "nlvr2"))
        y = model.see(gold.tensor("inputs/image_feats_2"), 2)
        gold.check("outputs/cls_feats_2", model.pool(*model.fuse(x, keep, y)))


# ---------------------------------------------------------------------------------------------------------------------
# The tasks, each as a training step and as an evaluation ask for them


def check_pretrain(gold, prefix, ready, text, hidden, picture):
    model, keep = ready(build(gold, "pretrain", arm="cd+hn" if ready is whole else "baseline")), real(gold)
    labels, matches = gold.tensor("inputs/labels_mlm"), gold.tensor("inputs/itm_labels")
    rows = {"pixels": picture, "ids": hidden, "keep_mask": keep, "mlm_labels": labels, "teacher_ids": hidden,
            "itm_ids": text, "itm_keep_mask": keep,
            "kinds": torch.where(matches == 1, vilta.MATCHING, vilta.OTHER)}  # fmt: skip
    where = labels != vilta.NOTHING
    out = model(rows)
    gold.check(f"{prefix}itm_logits", out["itm"])
    assert_close(out["mlm"], gold.tensor(f"{prefix}mlm_logits")[where])
    logits = model.fill({"pixels": picture}, hidden, keep, torch.ones_like(keep))
    gold.check(f"{prefix}mlm_logits", logits.view(*keep.shape, -1), keep)
    gold.check(f"{prefix}itm_logits", model.judge({"pixels": picture, "ids": text, "keep_mask": keep}))
    odds = model.match(model.encode_images(rows), (model.read(model.text(text, keep)), keep)).diagonal()
    assert_close(odds, gold.tensor(f"{prefix}itm_logits").diff(dim=1)[:, 0], 2 * TOLERANCE)
    if ready is whole:
        if gold.has("outputs/roberta_mlm_logits"):  # writer and teacher read the text alone
            for name in ("gen", "teacher"):
                assert_close(out[name], gold.tensor("outputs/roberta_mlm_logits")[where])
        del out["teacher"]  # the caption's own words alone
        found = vilta.losses(model.cfg, out, rows)
        gold.check(f"{prefix}mlm_loss", found["mlm"])
        gold.check(f"{prefix}itm_loss", found["itm"])


@torch.no_grad()
def check_tasks(gold, prefix, names, ready):
    """names: the inputs. ready: what to do with a model before it reads them."""
    text, hidden, picture, picture_2 = (gold.tensor(f"inputs/{name}") for name in names)
    rows = {"pixels": picture, "ids": text, "keep_mask": (keep := real(gold))}
    if gold.has(f"{prefix}mlm_logits", f"{prefix}itm_logits"):
        check_pretrain(gold, prefix, ready, text, hidden, picture)
    if gold.has(f"{prefix}vqa_logits"):
        model = ready(build(gold, "vqa"))
        out = model(rows)
        gold.check(f"{prefix}vqa_logits", out["logits"])
        gold.check(f"{prefix}vqa_logits", model.answer_scores(rows))
        if gold.has(f"{prefix}vqa_loss"):
            targets = gold.tensor("inputs/vqa_targets")
            gold.check(f"{prefix}vqa_loss", vilta.losses(model.cfg, out, {"targets": targets})["vqa"])
    if gold.has(f"{prefix}snli_logits"):
        gold.check(f"{prefix}snli_logits", ready(build(gold, "ve"))(rows)["logits"])
    if gold.has(f"{prefix}nlvr2_logits"):
        both = torch.stack([picture, picture_2], dim=1)
        gold.check(f"{prefix}nlvr2_logits", ready(build(gold, "nlvr2"))(rows | {"pixels": both})["logits"])
    if gold.has(f"{prefix}rank_score"):
        model = ready(build(gold, "retrieval"))
        ranks = model.match(model.encode_images(rows), (model.read(model.text(text, keep)), keep))  # of every pair
        gold.check(f"{prefix}rank_score", ranks.diagonal())
        # A step reads each picture's texts one after the other: here its own, then that of the next picture.
        several = torch.stack([torch.arange(len(text)), torch.arange(len(text)).roll(-1)], dim=1)
        texts = {"ids": text[several.flatten()], "keep_mask": keep[several.flatten()]}
        out = model(rows | texts | {"itm_ids": text, "itm_keep_mask": keep})
        gold.check(f"{prefix}rank_score", out["ranks"][:, 0])
        assert_close(out["ranks"], ranks.gather(1, several))
        gold.check(f"{prefix}itm_logits", out["itm"])


def whole(model):
    return model


@torch.no_grad()
def check_states_from_pixels(gold):
    model, keep = build(gold, "ve"), real(gold)
    x, y = model.read(model.text(gold.tensor("inputs/input_ids"), keep)), model.see(gold.tensor("inputs/pixel_values"))
    x_end, y_end = model.fuse(x, keep, y)
    gold.check("outputs/e2e_text_feats", x_end, keep)
    gold.check("outputs/e2e_image_feats", y_end)
    gold.check("outputs/e2e_cls_feats", model.pool(x_end, y_end))
    gold.check("outputs/e2e_cls_feats", model.join(gold.tensor("inputs/input_ids"), keep, y))


# ---------------------------------------------------------------------------------------------------------------------


def check_everything(gold):
    """All groups that the file has."""
    if gold.has("outputs/clip_tokens"):
        check_vision(gold)
    if gold.has("outputs/roberta_"):
        check_language(gold)
    if gold.has("outputs/text_layer_"):
        check_fusion(gold)
    check_tasks(gold, "outputs/", STATES, without_encoders)
    if gold.has("outputs/e2e_text_feats"):
        check_states_from_pixels(gold)
    check_tasks(gold, "outputs/e2e_", WHOLE, whole)
    gold.close()


def test_official_numbers(golden):
    check_everything(golden)


def test_no_key_is_overlooked(golden, tmp_path, capsys):
    """A result that nothing is compared with fails the test above, even with a name much like the others'."""
    arrays, names = dict(golden.arrays), ("outputs/cls_text_2", "outputs/e2e_inputs", "outputs/weights")
    np.savez(tmp_path / "more.npz", **arrays, **dict.fromkeys(names, np.zeros(1)), **{"more/inputs/x": np.zeros(1)})
    with pytest.raises(AssertionError) as told:
        check_everything(ledger(tmp_path / "more.npz"))
    capsys.readouterr()  # its line is not that of the reference
    assert str(list(names)) in str(told.value)
    gold = ledger(tmp_path / "more.npz", [("outputs/cls_*", "a reason")])
    assert "outputs/cls_text" in gold.exempt and not gold.exempt & gold.to_cover


# ---------------------------------------------------------------------------------------------------------------------
# Spellings of official weights: directories as transformers writes them

TRANSFORMERS = (("class_embedding", "embeddings.class_embedding"), ("conv1", "embeddings.patch_embedding"),
                ("positional_embedding", "embeddings.position_embedding.weight"), ("ln_pre", "pre_layrnorm"),
                ("ln_post", "post_layernorm"), ("transformer.resblocks", "encoder.layers"), ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"), ("attn", "self_attn"), ("c_fc", "fc1"), ("c_proj", "fc2"))  # fmt: skip


def whole_tower(gold):
    """CLIP's tower under OpenAI's names, with the last block, which METER leaves out and the file does not hold."""
    tower, last = gold.weights("weights/clip/"), gold.config["clip_blocks_used"]
    block = {name: x for name, x in tower.items() if ".resblocks.0." in name}
    return tower | {name.replace("resblocks.0.", f"resblocks.{last}."): x.clone() for name, x in block.items()}


def in_transformers_words(tower, prefix):
    state = {}
    for name, x in tower.items():
        name = name.removeprefix("visual.")
        for openais, theirs in TRANSFORMERS:
            name = re.sub(rf"(?<![a-z_]){re.escape(openais)}(?![a-z0-9_])", theirs, name)
        if part := re.fullmatch(r"(.*)in_proj_(weight|bias)", name):
            for q, y in zip("qkv", x.chunk(3), strict=True):
                state[f"{prefix}{part[1]}{q}_proj.{part[2]}"] = y
        else:
            state[prefix + name] = x
    return state


def require(gold, *keys):
    if not gold.has(*keys):
        pytest.skip(f"{gold.path.name} has no {' or '.join(keys)}")


def write_folder(folder, config, state):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("spelling", ["openai", "whole model", "vision_model.", ""])
@torch.no_grad()
def test_spellings_of_clip(golden, tmp_path, monkeypatch, spelling):
    """OpenAI's names and transformers': of a whole CLIP, of its tower, and of the tower as transformers 5 has it."""
    require(golden, "outputs/clip_tokens")
    tower, config = whole_tower(golden), golden.config
    size = {"hidden_size": config["clip_width"], "num_hidden_layers": config["clip_blocks_used"] + 1,
            "num_attention_heads": config["clip_heads"], "image_size": config["image_size"],
            "patch_size": config["patch_size"]}  # fmt: skip
    rest = {"logit_scale": torch.ones(1)}  # what only a whole model has
    if spelling == "openai":
        state = tower | rest | {"visual.proj": torch.ones(1), "transformer.resblocks.0.ln_1.weight": torch.ones(1)}
    elif spelling == "whole model":
        state = in_transformers_words(tower, "vision_model.") | rest | {
            "visual_projection.weight": torch.ones(1), "text_model.encoder.layers.0.layer_norm1.weight": torch.ones(1),
            "vision_model.embeddings.position_ids": torch.ones(1)}  # fmt: skip
        size = {"vision_config": size}
    else:
        state = in_transformers_words(tower, spelling)
        check_names(state, size, tower)
    folder = write_folder(tmp_path / "clip", size, state)
    model = build_from(golden, monkeypatch, clip=folder)
    golden.check("outputs/clip_tokens", model.vision(golden.tensor("inputs/pixel_values")))


def check_names(state, size, tower):
    """That these are transformers' names is transformers' word."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    inner = len(tower["visual.transformer.resblocks.0.mlp.c_fc.bias"])
    with torch.device("meta"):
        theirs = CLIPVisionModel(CLIPVisionConfig(**size, intermediate_size=inner)).state_dict()
    theirs.pop("embeddings.position_ids", None)
    ours, theirs = ({name.removeprefix("vision_model."): x.shape for name, x in some.items()}
                    for some in (state, theirs))  # fmt: skip
    assert ours == theirs


@pytest.mark.parametrize("spelling", ["file", "tied", "no head", "bare"])
@torch.no_grad()
def test_spellings_of_roberta(golden, tmp_path, monkeypatch, spelling):
    """RobertaForMaskedLM with and without the copies of what is tied, and RobertaModel, with `roberta.` and without."""
    require(golden, "outputs/roberta_last_hidden_unmasked", "outputs/roberta_mlm_logits")
    state = golden.weights("weights/roberta/")
    if spelling == "tied":
        state |= {"lm_head.decoder.weight": state["roberta.embeddings.word_embeddings.weight"].clone(),
                  "lm_head.decoder.bias": state["lm_head.bias"].clone(),
                  "roberta.embeddings.position_ids": torch.ones(1)}  # fmt: skip
    if spelling in ("no head", "bare"):
        state = {name: x for name, x in state.items() if not name.startswith("lm_head.")}
        state |= {f"roberta.pooler.dense.{name}": torch.ones(1) for name in ("weight", "bias")}
    if spelling == "bare":
        state = {name.removeprefix("roberta."): x for name, x in state.items()}
    size = {"num_attention_heads": golden.config["text_heads"]}
    folder = write_folder(tmp_path / "roberta", size, state)
    bare = {name.removeprefix("roberta.") for name in golden.names("weights/roberta/")}
    assert weights.roberta(state).keys() == {x for x in bare if x in state or f"roberta.{x}" in state}
    ids, keep = golden.tensor("inputs/input_ids"), real(golden)
    model = build_from(golden, monkeypatch, roberta=folder)
    golden.check("outputs/roberta_last_hidden_unmasked", model.text(ids, keep), keep)
    model = vilta.ViLTA(vilta.Config(**vars(model.cfg) | {"task": "pretrain", "arm": "cd"})).eval()
    fresh = model.lm_head.dense.weight.clone()
    state = {key if key.startswith("lm_head.") else f"text_transformer.{key}": x
             for key, x in weights.roberta(state).items()}  # fmt: skip
    told = vilta.load_official(model, state, "RoBERTa")
    has_head = spelling in ("file", "tied")
    assert has_head == ("new here" in told and "lm_head" in told.split("new here")[0])
    if has_head:
        ids = golden.tensor("inputs/input_ids_mlm")
        for logits in (model.lm_head(model.text(ids, keep), model.text.word.weight),
                       model.teacher(ids, keep, torch.ones_like(keep)).view(*ids.shape, -1)):  # fmt: skip
            golden.check("outputs/roberta_mlm_logits", logits, keep)
    else:
        assert torch.equal(model.lm_head.dense.weight, fresh)


def build_from(gold, monkeypatch, **sources):
    """`vilta.build` with weights of others, small beyond them."""
    tokenizer = SimpleNamespace(mask=gold.config["mask_token_id"])
    monkeypatch.setattr(weights, "choose_tokenizer", lambda *_: tokenizer)
    small = dict(vision_width=8, vision_heads=1, vision_layers=1, text_width=8, text_heads=1, text_layers=1, width=8,
                 heads=1, layers=1, vocab_size=9, patch=gold.config["patch_size"], max_len=1)  # fmt: skip
    cfg = vilta.Config(task="ve", **small, **sources, image_size=gold.config["image_size"])
    return vilta.build(cfg, None).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Weights that were for another task


@torch.no_grad()
def test_ranking_head_of_a_pretrained_file_is_that_of_a_match(golden):
    """Row 1 of ITM's, as METER does it; a file's own ranking head stays what it is."""
    state = {name: x for name, x in meter(golden).items() if not name.startswith("rank_output.")}
    model = build(golden, "retrieval", state)
    for part in ("weight", "bias"):
        assert torch.equal(getattr(model.rank_head, part), state[f"itm_score.fc.{part}"][1:])
    own = {"rank_output.weight": 2 * state["itm_score.fc.weight"][:1], "rank_output.bias": torch.ones(1)}
    model = build(golden, "retrieval", state | own)
    assert all(torch.equal(getattr(model.rank_head, part), own[f"rank_output.{part}"]) for part in ("weight", "bias"))


@torch.no_grad()
def test_second_picture_begins_with_the_type_of_the_first(golden):
    """Two types become three for NLVR2, and three become two for any other task."""
    state, name = meter(golden), "token_type_embeddings.weight"
    two = state[name][:2]
    assert torch.equal(build(golden, "nlvr2", state | {name: two}).types.weight, two[[0, 1, 1]])
    three = torch.cat([two, two.flip(0)[:1] + 1])
    assert torch.equal(build(golden, "nlvr2", state | {name: three}).types.weight, three)
    for task in ("pretrain", "ve"):
        for rows in (two, three):
            assert torch.equal(build(golden, task, state | {name: rows}).types.weight, two)
