"""VC-GPT's backbones and its Vanilla baseline against transformers' own numbers (tests/golden/vcgpt_backbones.npz)."""

import pytest
import torch
import torch.nn.functional as F
from ledger import Ledger

import decoding
import vcgpt

TOLERANCE = 2e-4  # of the reference, float32


def record_blocks(blocks, first=()):
    """Forward hooks that collect [first..., output of each block]."""
    states = list(first)
    return states, [block.register_forward_hook(lambda _, __, out: states.append(out)) for block in blocks]


def build(sizes, variant="vcgpt"):
    """The network of the reference's sizes. Fusion layers have no reference; one is enough."""
    torch.manual_seed(0)
    return vcgpt.VCGPT(vcgpt.Config(**sizes, variant=variant, fusion_layers=1, dropout=0.0)).eval()


@torch.no_grad()
def check_clip(gold, sizes):
    tower, pixels = build(sizes).clip, gold.tensor("inputs/pixel_values")
    vcgpt.load_clip(tower, gold.weights("weights/clip/"))
    states, hooks = record_blocks(tower.blocks)
    hooks.append(tower.pre_norm.register_forward_hook(lambda _, __, out: states.append(out)))
    last = tower(pixels)
    for hook in hooks:
        hook.remove()
    gold.check("outputs/clip/hidden_states", torch.stack(states))
    gold.check("outputs/clip/last_hidden_state", last)
    tower.apply_post_norm = True
    gold.check("outputs/clip/tokens_post_ln", tower(pixels))
    gold.check("outputs/clip/pooler_output", tower(pixels)[:, 0])
    tower.apply_post_norm = False
    if gold.has("inputs/pixel_values_hi"):
        pixels = gold.tensor("inputs/pixel_values_hi")
        gold.check("outputs/clip/hi_last_hidden_state", tower(pixels))
        larger = build(sizes | dict(image_size=pixels.size(-1))).clip  # the same, resized once at loading
        vcgpt.load_clip(larger, gold.weights("weights/clip/"))
        gold.check("outputs/clip/hi_last_hidden_state", larger(pixels))


@torch.no_grad()
def check_gpt2(gold, gpt2, prefix, kvs=None):
    ids, keep_mask = gold.tensor("inputs/input_ids"), gold.tensor("inputs/attention_mask").bool()
    states, hooks = record_blocks(gpt2.blocks[:-1], [gpt2.wte(ids) + gpt2.wpe.weight[: ids.size(1)]])
    hidden = gpt2(ids, kvs)
    for hook in hooks:
        hook.remove()
    gold.check(f"{prefix}/hidden_states", torch.stack([*states, hidden]), keep_mask.expand(len(states) + 1, -1, -1))
    logits = F.linear(hidden, gpt2.wte.weight)
    gold.check(f"{prefix}/logits", logits, keep_mask)
    is_target = keep_mask[:, 1:]
    gold.check(f"{prefix}/loss", vcgpt.loss_lm(logits[:, :-1][is_target], ids[:, 1:][is_target]))


class LanguageModelAlone:
    """GPT-2 without a picture behind the interface of eval's decoders: cached, its prompt fed token by token."""

    def __init__(self, gpt2, prompt):
        self.gpt2, self.prompt, self.caches = gpt2, prompt, [{} for _ in gpt2.blocks]
        self.gpt2(prompt[:, :-1], None, self.caches)

    def step(self, ids):
        start = self.prompt.size(1) - 1 + ids.size(1) - 1
        token = self.prompt[:, -1:] if ids.size(1) == 1 else ids[:, -1:]
        return F.linear(self.gpt2(token, None, self.caches, start)[:, -1], self.gpt2.wte.weight)

    def reorder(self, rows):
        raise AssertionError("greedy decoding never reorders")


@torch.no_grad()
def check_greedy(gold, gpt2):
    prompt, wanted = gold.tensor("inputs/prompt_ids"), gold.tensor("outputs/gpt2/greedy_ids")
    new = wanted.size(1) - prompt.size(1)
    decoder = LanguageModelAlone(gpt2, prompt)
    no_stop_token = -1
    ids, _ = decoding.greedy(decoder, len(prompt), 0, no_stop_token, new, prompt.device)
    gold.check("outputs/gpt2/greedy_ids", torch.cat([prompt, ids], dim=1))


def test_backbones_and_vanilla(golden_path, exempt):
    path = golden_path("vcgpt_backbones.npz")
    gold = Ledger(path, exempt(path.name), TOLERANCE)
    sizes = vcgpt.clip_sizes(gold.config["vision"]) | vcgpt.gpt2_sizes(gold.config["gpt2"])
    if gold.has("weights/clip/", "outputs/clip/"):
        check_clip(gold, sizes)
    if gold.has("weights/gpt2/", "outputs/gpt2/"):
        gpt2 = build(sizes).gpt2
        vcgpt.load_gpt2(gpt2, gold.weights("weights/gpt2/"))
        check_gpt2(gold, gpt2, "outputs/gpt2")
        if gold.has("outputs/gpt2/greedy_ids"):
            check_greedy(gold, gpt2)
    if gold.has("weights/gpt2x/", "outputs/gpt2x/"):
        model = build(sizes, variant="vanilla")
        vcgpt.load_gpt2(model.gpt2, gold.weights("weights/gpt2/") | gold.weights("weights/gpt2x/"))
        memory = gold.tensor("inputs/encoder_hidden_states")
        check_gpt2(gold, model.gpt2, "outputs/gpt2x", [block.keys_values(memory) for block in model.gpt2.blocks])
    assert not exempt(path.name), "this reference has no exemptions"
    gold.close()


def test_square_matrix_is_transposed(golden_path):
    """No shape error tells when the square c_proj is loaded untransposed; the numbers must."""
    gold = Ledger(golden_path("vcgpt_backbones.npz"), tolerance=TOLERANCE)
    sizes = vcgpt.gpt2_sizes(gold.config["gpt2"])
    gpt2 = build(sizes | dict(image_size=32, patch=8, vision_width=16, vision_layers=1, vision_heads=2)).gpt2
    weights = gold.weights("weights/gpt2/")
    name = next(k for k in weights if k.endswith("h.0.attn.c_proj.weight"))
    vcgpt.load_gpt2(gpt2, weights | {name: weights[name].t()})
    with pytest.raises(AssertionError, match="hidden_states"), torch.no_grad():
        check_gpt2(gold, gpt2, "outputs/gpt2")
