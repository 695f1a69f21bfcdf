"""VC-GPT: captioning by letting a vision network and a language model vote (Luo, Xi, Zhang, Ma, arXiv 2201.12723).

GPT-2 has no place where a picture could enter. The obvious repair opens every block and inserts cross-attention
(`--variant vanilla`), which disturbs what GPT-2 knows about language. The paper leaves both pre-trained networks whole
and puts a new fusion module on top of them: its visual stream refines the picture's tokens, its text stream reads
GPT-2's hidden states and looks at the visual stream. Then two heads speak about the next word, GPT-2's own and the
fusion module's, and their logits are simply added: the "self-ensemble". As we read it, the language head keeps the
sentence fluent, so the fusion module only has to learn what the picture adds.

    picture ──> CLIP-ViT ── V0 ──> [self-attention, FFN] x N ────────────────┐ keys and values, layer by layer
                                                                             v
    caption ──> GPT-2 ───── h^G ─> [causal self-attention, cross-attention, FFN] x N ──> h^fuse
                             │                                                             │
                             └──── W^G h^G ───────────── + ───────────── W^fuse h^fuse ────┘ = next-word logits

    python vcgpt.py                                   the small world: 77 to 90 % true captions in 2.3 minutes, 2 cores
    python vcgpt.py --data my_photos.jsonl            own photographs, trained from scratch
    python vcgpt.py --caption a.jpg --init RUN        a caption for a picture
    python vcgpt.py --task scst --init RUN            go on with CIDEr-D itself as the reward
    python vcgpt.py --eval-only RUN RUN2              finished runs side by side
    torchrun --nproc_per_node=8 vcgpt.py --data coco --task caption      from CLIP's and GPT-2's weights

Pre-training reads any .jsonl (`--preset base --task pretrain`); the paper's corpus, Visual Genome, has no loader yet.

Reading map: config, presets, recipes | blocks | model: CLIP-ViT and GPT-2 | model: fusion and self-ensemble | losses |
decoding | official weights | training: optimizer, self-critical samples, the loop | evaluation | main. Marks: `# PAPER`
what the paper says, `# HERE[id]` what we do and why (the id is a row of docs/divergences.md). The authors have
published no code; every setting that the paper leaves open is our choice and says so.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
import corpora
import data
import decoding
import eval as scoring
import language
import mixture
import weights
from common import UserError
from tools import compare, finish

# ---------------------------------------------------------------------------------------------------------------------
# Config, presets, recipes. Every field is a flag; its comment is the flag's help.


@dataclass
class Config(common.RunConfig):
    # --- method
    variant: str = "vcgpt"  # vcgpt | vcgpt_wo_se (fusion head alone) | vanilla (cross-attention inside GPT-2)
    fusion_layers: int = 6  # N. HERE[vcgpt-1] (not in the paper): the depth of METER's fusion
    memory: str = "A"  # HERE[vcgpt-2] (not in the paper): text layer i reads visual layer i (A) or the last one (B)
    clip_post_norm: bool = False  # HERE[vcgpt-3] (not in the paper): apply CLIP's final LayerNorm to all visual tokens
    # --- vision tower. HERE[vcgpt-4] (not in the paper): ViT-B/16 at 224 px, as wide as GPT-2, so nothing is projected
    clip: str = "none"  # weights of the tower: a hub id, a directory, or none
    image_size: int = 224  # pixels; pictures are padded to a square of this side
    patch: int = 16  # pixels per visual token
    stem: str = "patch"  # patch (CLIP) | conv: HERE[vcgpt-5] (not in the paper): stride-2 convolutions, few pictures do
    vision_width: int = 768  # width of the tower
    vision_layers: int = 12  # depth of the tower
    vision_heads: int = 12  # heads of the tower
    vision_mlp: int = 0  # width inside its MLPs; 0: 4 x vision_width
    vision_act: str = "quick_gelu"  # quick_gelu (CLIP) | gelu | gelu_new
    # --- language model (HERE[vcgpt-6] (not in the paper): GPT-2 small)
    gpt2: str = "none"  # weights of GPT-2: a hub id, a directory, or none
    # HERE[vcgpt-18] (not in the paper): captions in lower case without a final stop, one token begins, ends and pads
    tokenizer: str = "none"  # hub id or directory; none: that of --gpt2, or one trained on the captions
    vocab_size: int = 50257  # upper bound where the tokenizer is trained here
    width: int = 768  # width of GPT-2 and of the fusion module
    layers: int = 12  # depth of GPT-2
    heads: int = 12  # heads of GPT-2 and of the fusion module
    mlp: int = 0  # width inside the MLPs of both; 0: 4 x width
    positions: int = 1024  # longest text that GPT-2 has positions for
    dropout: float = 0.1  # HERE[vcgpt-7] (not in the paper): on embeddings and residual branches of GPT-2 and fusion
    init_std: float = 0.02  # standard deviation of new weights, GPT-2's
    # --- recipe (HERE[vcgpt-8] (not in the paper): all of it)
    batch: int = 512  # picture-caption pairs per step, over all processes, rounded down to whole pictures
    captions_per_image: int = 5  # captions per picture and step; the picture is encoded once for all of them
    epochs: float = 10.0  # passes over the pictures, where --steps is 0
    steps: int = 0  # optimizer steps; 0: from --epochs
    lr: float = 1e-4  # peak learning rate of new parameters
    lr_backbone: float = 2e-5  # peak learning rate of pre-trained parameters: they start from more than noise
    warmup: float = 0.05  # share of the steps in which the rate rises linearly; then it falls linearly to 0
    weight_decay: float = 0.01  # on matrices; not on norms, biases, embeddings
    beta2: float = 0.98  # AdamW's second moment; the first is 0.9
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    label_smoothing: float = 0.0  # share of the target's probability that is spread over all words
    lm_steps: int = 0  # HERE[vcgpt-9] (not in the paper): text-only steps of GPT-2 first, where it has no weights yet
    augment: str = "none"  # none | crop | crop+flip (never where a caption says left or right) | rand
    max_len: int = 40  # tokens per caption
    baseline: str = "leave-one-out"  # of scst: leave-one-out (mean of the picture's other samples) | greedy
    # --- decoding (HERE[vcgpt-10] (not in the paper): usual on COCO)
    beam: int = 5  # width of the beam search of the final evaluation and of --caption; validation is greedy
    max_new: int = 20  # longest generated caption, in tokens, end token included
    length_penalty: float = 1.0  # alpha: score = sum of log p / length^alpha
    temperature: float = 0.0  # above 0: sample in the final evaluation and in --caption instead of searching
    top_k: int = 0  # sample among the k most probable tokens; 0: all
    top_p: float = 1.0  # sample among the fewest tokens that hold this share of the probability


PRESETS = {
    # HERE[vcgpt-11] (not in the paper): tiny learns the small world from nothing in three minutes on 2 cores. Its tower
    # is the convolutional stem alone; the fusion module's visual stream is the only self-attention over the picture.
    "tiny": dict(
        image_size=64, stem="conv", patch=8, vision_width=128, vision_layers=0, vision_heads=4, width=128, layers=1,
        heads=4, mlp=256, fusion_layers=2, positions=64, vocab_size=2000, dropout=0.0, init_std=0.08, lm_steps=150,
        batch=160, steps=950, lr=1e-3, max_len=30, max_new=30, beam=1,
    ),
    # HERE[vcgpt-12] (not in the paper): small learns from a few thousand photographs, from nothing.
    "small": dict(
        image_size=128, stem="conv", patch=16, vision_width=192, vision_layers=1, vision_heads=6, width=192, layers=1,
        heads=6, fusion_layers=2, positions=64, vocab_size=3000, dropout=0.1, init_std=0.06, lm_steps=150,
        batch=160, epochs=12.0, lr=1e-3, weight_decay=0.05, augment="crop+flip", max_len=40, beam=3,
    ),
    "base": dict(clip="openai/clip-vit-base-patch16", gpt2="gpt2"),
}  # fmt: skip

# HERE[vcgpt-8]: base pre-trains with the fields above, written for Visual Genome; this is its fine-tuning. tiny and
# small keep their own numbers in every task. Keys: (task, preset) or (task, preset, data).
RECIPES = {
    ("caption", "base"): dict(batch=256, epochs=10.0, lr=5e-5, lr_backbone=1e-5, label_smoothing=0.1, max_len=30),
    ("caption", "base", "flickr30k"): dict(epochs=15.0),
    # HERE[vcgpt-17] (not in the paper): self-critical training after cross-entropy, 5 samples for each of 10 pictures
    ("scst", "base"): dict(batch=50, epochs=5.0, lr=5e-6, lr_backbone=5e-6, warmup=0.0),
    ("scst", "small"): dict(epochs=2.0, lr=1e-4, warmup=0.0, augment="none"),
    ("scst", "tiny"): dict(steps=200, lr=1e-4, warmup=0.0),
}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's own training pictures, 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# ---------------------------------------------------------------------------------------------------------------------
# Blocks. One alphabet: B pictures, R text rows (k captions for each picture: R = B * k), T text tokens, N visual
# tokens, D width, H heads, V vocabulary.


# TWIN: vcgpt.py, vilta.py
def quick_gelu(x):
    return x * (1.702 * x).sigmoid_()  # in place: no third tensor of this size


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_new": gelu_tanh}


class SelfAttention(nn.Module):
    """Multi-head self-attention. `cache`, a dict, keeps keys and values of earlier tokens between calls."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, causal=False, cache=None):
        R, T, D = x.size()  # rows, tokens, width
        q, k, v = self.qkv(x).view(R, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each [R, H, T, D/H]
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = k, v
        # Captions are padded on the right, so a causal mask already hides every padded key from every real token:
        # no second mask, and the fast attention kernels stay in reach. One new token sees all that is cached.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal and T > 1)
        return self.out(x.transpose(1, 2).reshape(R, T, D))


class CrossAttention(nn.Module):
    """Attention from text to visual tokens. Keys and values are made once per picture (`project`)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def project(self, memory):
        B, N, D = memory.size()  # pictures, visual tokens, width
        return self.kv(memory).view(B, N, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # [2, B, H, N, D/H]

    def forward(self, x, kv):
        R, T, D = x.size()  # text rows, tokens, width; R = k * B: the k rows of a picture follow one another,
        B = kv.size(1)  # so they can stand side by side as queries of one picture, and nothing is repeated.
        q = self.q(x).view(B, R // B * T, self.heads, D // self.heads).transpose(1, 2)  # [B, H, kT, D/H]
        x = F.scaled_dot_product_attention(q, kv[0], kv[1])
        return self.out(x.transpose(1, 2).reshape(R, T, D))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, act: str):
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, cross-attention if asked for, MLP. The block of all three networks.

    norm_memory: a LayerNorm on the visual tokens before they serve as keys and values (fusion: yes; vanilla: no, as in
    transformers' GPT-2 with `add_cross_attention`).
    """

    def __init__(self, width, heads, mlp, act, dropout=0.0, causal=False, cross=False, norm_memory=False):
        super().__init__()
        self.causal = causal
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp or 4 * width, act)
        if cross:
            self.norm_cross = nn.LayerNorm(width)
            self.cross = CrossAttention(width, heads)
            self.norm_memory = nn.LayerNorm(width) if norm_memory else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, memory):
        return self.cross.project(self.norm_memory(memory))

    def forward(self, x, kv=None, cache=None):
        x = x + self.dropout(self.attn(self.norm1(x), self.causal, cache))
        if kv is not None:
            x = x + self.dropout(self.cross(self.norm_cross(x), kv))
        return x + self.dropout(self.mlp(self.norm2(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Model: CLIP-ViT and GPT-2


class ConvStem(nn.Sequential):
    """Pixels to a grid of visual tokens by 3x3 convolutions: one that halves for each factor 2 in `patch`, one more."""

    def __init__(self, patch: int, width: int):
        halvings = int(math.log2(patch))
        widths = [3] + [min(width, 32 << i) for i in range(halvings - 1)] + [width]
        layers = []
        for i in range(halvings):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride=2, padding=1), nn.GELU()]
        super().__init__(*layers, nn.Conv2d(width, width, 3, padding=1))


class CLIPVision(nn.Module):
    """CLIP's vision tower: patches and a class token to one vector each.

    forward: pixels [B, 3, S, S], normalised -> [B, 1 + (S/patch)^2, D], the raw output of the last block, before CLIP's
    final LayerNorm (`post_norm` is loaded always and applied only where `clip_post_norm` says so).
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.patch, self.apply_post_norm = cfg.patch, cfg.clip_post_norm
        D, grid = cfg.vision_width, cfg.image_size // cfg.patch
        self.class_embedding = nn.Parameter(torch.zeros(D))
        if cfg.stem == "conv":
            self.patches = ConvStem(cfg.patch, D)
        else:
            self.patches = nn.Conv2d(3, D, cfg.patch, stride=cfg.patch, bias=False)
        self.positions = nn.Parameter(torch.zeros(1 + grid * grid, D))
        self.pre_norm = nn.LayerNorm(D)
        self.blocks = nn.ModuleList(
            Block(D, cfg.vision_heads, cfg.vision_mlp, cfg.vision_act) for _ in range(cfg.vision_layers)
        )
        self.post_norm = nn.LayerNorm(D).requires_grad_(cfg.clip_post_norm)

    def forward(self, pixels):
        x = self.patches(pixels)  # [B, D, grid, grid]
        B, D, grid, _ = x.size()  # pictures, width, patches per side
        x = torch.cat([self.class_embedding.expand(B, 1, D), x.flatten(2).transpose(1, 2)], dim=1)  # [B, 1+grid^2, D]
        x = self.pre_norm(x + weights.resize_positions(self.positions, grid))
        for block in self.blocks:
            x = block(x)
        return self.post_norm(x) if self.apply_post_norm else x


class GPT2(nn.Module):
    """GPT-2; with `cross`, the paper's Vanilla baseline: cross-attention inside every block.

    forward: ids [R, T], right-padded -> hidden states [R, T, D] after ln_f. Logits are `hidden @ wte.weight.T`.
    """

    def __init__(self, cfg: Config, cross=False):
        super().__init__()
        self.wte = nn.Embedding(cfg.vocab_size, cfg.width)
        self.wpe = nn.Embedding(cfg.positions, cfg.width)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(
            Block(cfg.width, cfg.heads, cfg.mlp, "gelu_new", cfg.dropout, causal=True, cross=cross)
            for _ in range(cfg.layers)
        )
        self.ln_f = nn.LayerNorm(cfg.width)

    def forward(self, ids, kvs=None, caches=None, start=0):
        """kvs: keys and values per block (vanilla); caches: a dict per block; start: position of the first id."""
        if start + ids.size(1) > len(self.wpe.weight):
            raise UserError(f"a text of {start + ids.size(1)} tokens: GPT-2 has {len(self.wpe.weight)} positions here")
        x = self.dropout(self.wte(ids) + self.wpe.weight[start : start + ids.size(1)])
        for i, block in enumerate(self.blocks):
            x = block(x, kvs and kvs[i], caches and caches[i])
        return self.ln_f(x)


# ---------------------------------------------------------------------------------------------------------------------
# Model: fusion and self-ensemble


class VCGPT(nn.Module):
    """VC-GPT, its ablation and its baseline. `tokenizer` is a language.Tokenizer; pixels are uint8 [B, 3, S, S]."""

    def __init__(self, cfg: Config, tokenizer: language.Tokenizer | None = None):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        D, depth = cfg.width, cfg.fusion_layers
        self.clip = CLIPVision(cfg)
        self.gpt2 = GPT2(cfg, cross=cfg.variant == "vanilla")
        # The fusion layers and GPT-2 work at the same width; a projection stands between only where CLIP's differs.
        self.project = nn.Linear(cfg.vision_width, D) if cfg.vision_width != D else nn.Identity()
        if cfg.variant != "vanilla":
            # HERE[vcgpt-13] (not in the paper): pre-norm layers of GPT-2's make, without new positions.
            self.visual = nn.ModuleList(Block(D, cfg.heads, cfg.mlp, "gelu_new", cfg.dropout) for _ in range(depth))
            self.text = nn.ModuleList(
                Block(D, cfg.heads, cfg.mlp, "gelu_new", cfg.dropout, causal=True, cross=True, norm_memory=True)
                for _ in range(depth)
            )
            self.norm_fuse = nn.LayerNorm(D)
            self.w_fuse = nn.Linear(D, cfg.vocab_size, bias=False)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1) * 255, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, init_std) for linear layers and embeddings, residual outputs scaled by 1 / sqrt(2 * depth), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Conv2d) and self.cfg.stem == "conv":
                nn.init.kaiming_normal_(module.weight)  # PyTorch's default would shrink the picture to a whisper
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for stack in [self.clip.blocks, self.gpt2.blocks, getattr(self, "visual", []), getattr(self, "text", [])]:
            for block in stack:
                branches = [block.attn.out, block.mlp.down] + ([block.cross.out] if hasattr(block, "cross") else [])
                for linear in branches:
                    linear.weight.mul_((2 * len(stack)) ** -0.5)
        nn.init.normal_(self.clip.class_embedding, std=self.cfg.init_std)
        nn.init.normal_(self.clip.positions, std=self.cfg.init_std)
        if self.cfg.stem == "conv":
            grid = math.isqrt(len(self.clip.positions) - 1)
            self.clip.positions[1:] = weights.sine_table(grid, self.cfg.vision_width)

    # --- the two halves

    def encode_image(self, pixels):
        """uint8 [B, 3, S, S] -> keys and values for the text side, one [2, B, H, N, D/H] for each of its layers."""
        v = self.clip((pixels.float() - self.mean) / self.std)
        v = self.project(v)  # V0, [B, N, D]
        if self.cfg.variant == "vanilla":
            return [block.keys_values(v) for block in self.gpt2.blocks]
        memories = []
        for block in self.visual:  # PAPER (fusion, visual stream): [self-attention, FFN] x N
            v = block(v)
            memories.append(v)
        if self.cfg.memory == "B":
            memories = [v] * len(self.text)
        return [block.keys_values(v) for block, v in zip(self.text, memories, strict=True)]

    def hidden(self, ids, kvs, caches=None, start=0):
        """ids [R, T] and the picture's keys and values -> h^G, h^fuse, each [R, T, D] (h^fuse is None in vanilla)."""
        if self.cfg.variant == "vanilla":
            return self.gpt2(ids, kvs, caches, start), None
        h_gpt2 = self.gpt2(ids, None, caches, start)  # never sees the picture
        t = h_gpt2
        for i, block in enumerate(self.text):  # PAPER (fusion, text stream): [self-att, cross-att, FFN] x N
            t = block(t, kvs[i], caches and caches[len(self.gpt2.blocks) + i])
        return h_gpt2, self.norm_fuse(t)

    def logits(self, h_gpt2, h_fuse):
        """Hidden states [..., D] -> next-word logits [..., V]."""
        if self.cfg.variant == "vanilla":
            return F.linear(h_gpt2, self.gpt2.wte.weight)
        if self.cfg.variant == "vcgpt_wo_se":  # HERE[vcgpt-14]: the paper names this ablation; the exact head is ours
            return self.w_fuse(h_fuse)
        # PAPER (self-ensemble): logits = W^G h^G + W^fuse h^fuse
        # HERE[vcgpt-16]: W^G, initialised from GPT-2's word embedding, stays tied to it; W^fuse has no bias
        return F.linear(h_gpt2, self.gpt2.wte.weight) + self.w_fuse(h_fuse)

    def forward(self, pixels, ids, targets=None):
        """pixels uint8 [B, 3, S, S], ids [R, T] with R a multiple of B, image-major.

        -> logits [R, T, V]; with targets [R, T] (-100 = nothing to predict), logits [M, V] at the M real targets alone:
        nobody reads those of padding, and the vocabulary is wide.
        """
        h_gpt2, h_fuse = self.hidden(ids, self.encode_image(pixels))
        if targets is not None:
            is_real = targets != -100
            h_gpt2, h_fuse = h_gpt2[is_real], None if h_fuse is None else h_fuse[is_real]
        return self.logits(h_gpt2, h_fuse)

    # --- for users

    @classmethod
    def from_run(cls, source: str, device="cpu") -> VCGPT:
        """The model of a run directory (its `best`) or of one of its step_N, ready to caption."""
        checkpoint, values = common.find_checkpoint(source, "vcgpt")
        return build(common.config_from(Config, values), None, checkpoint).to(device).eval()

    def caption(self, picture, beam: int = 0) -> str:
        """A caption for one picture, a path or a PIL image. beam 0: the run's own; `cfg.temperature` > 0 samples."""
        if not hasattr(picture, "convert"):
            try:
                picture = data.load_image(Path(picture), self.cfg.image_size)
            except data.BadImage as bad:
                raise UserError(f"{bad}; give another file, or save this one anew as JPEG or PNG") from bad
        pixels = data.to_pixels(picture.convert("RGB"), self.cfg.image_size)[None]
        return generate(self, pixels, beam or self.cfg.beam, self.cfg.temperature)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def loss_lm(logits, targets, label_smoothing=0.0):
    """Mean next-token cross-entropy. logits [M, V], targets [M] -> scalar, in nats.

    HERE[vcgpt-15]: the paper says generative pre-training; next-token cross-entropy is how we read it.
    L = - 1/M sum_m log p(w_m | w_<m, picture), over all real targets of the batch, EOS included.
    """
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def loss_scst(logits, targets, advantages):
    """Self-critical loss (Rennie et al. 2017, arXiv 1612.00563): logits [M, V], sampled tokens [M], advantages [M].

    The advantage of a token is that of its caption, reward r minus baseline b.
    L = - 1/M sum_m (r_m - b_m) log p(w_m | w_<m, picture), over the tokens of all samples, EOS included.
    """
    return (advantages * F.cross_entropy(logits.float(), targets, reduction="none")).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """What decoding.py drives: R captions grow by one token a step, as many for each picture.

    Keys and values of earlier tokens are cached, those of the picture are made once and shared by its beams.
    `cached=False` recomputes the whole prefix at every step: slower, and there to prove that nothing changes.
    """

    def __init__(self, model: VCGPT, pixels, cached=True):
        self.model, self.kvs = model, model.encode_image(pixels)
        layers = len(model.gpt2.blocks) + len(getattr(model, "text", []))
        self.caches = [{} for _ in range(layers)] if cached else None

    def step(self, ids):
        """ids [R, t], everything so far -> logits [R, V] of the next token."""
        if self.caches is None:
            h_gpt2, h_fuse = self.model.hidden(ids, self.kvs)
        else:
            start = ids.size(1) - 1
            h_gpt2, h_fuse = self.model.hidden(ids[:, start:], self.kvs, self.caches, start)
        return self.model.logits(h_gpt2[:, -1], None if h_fuse is None else h_fuse[:, -1])

    def reorder(self, rows):
        for cache in self.caches or []:
            for name in cache:
                cache[name] = cache[name].index_select(0, rows)


@torch.no_grad()
def generate(model: VCGPT, pixels, beam=1, temperature=0.0, luck: torch.Generator | None = None) -> list[str]:
    """uint8 [B, 3, S, S] -> B captions: greedy (beam 1), beam search (sum log p / length^alpha), or sampled.

    luck: where samples come from; None: a generator that torch's global one seeds anew at each call.
    """
    cfg, tok, device = model.cfg, model.tokenizer, next(model.parameters()).device
    decoder, B = Decoder(model, pixels.to(device)), len(pixels)
    if temperature:
        luck = luck or torch.Generator(device).manual_seed(int(torch.randint(2**31, ())))
        ids, _ = decoding.sample(decoder, B, tok.bos, tok.eos, cfg.max_new, luck, temperature, cfg.top_k, cfg.top_p)
    elif beam == 1:
        ids, _ = decoding.greedy(decoder, B, tok.bos, tok.eos, cfg.max_new, device)
    else:
        ids, _ = decoding.beam_search(decoder, B, beam, tok.bos, tok.eos, cfg.max_new, cfg.length_penalty, device)
    return [" ".join(tok.decode(row).split()) for row in ids.tolist()]  # an untrained model may write line breaks


# ---------------------------------------------------------------------------------------------------------------------
# Official weights. Names are transformers', of CLIP and GPT-2; each key is used once or is on the list of known others.


def load_clip(tower: CLIPVision, state: dict) -> None:
    """CLIP's vision weights into `tower`, from a full CLIP checkpoint or a vision-only one, old or new spelling.

    Positions are resized where the tower was built for larger or smaller pictures than the checkpoint.
    Spellings: with or without the prefix `vision_model.`; `position_ids` of old files, the text tower and both
    projections are known and not used. A missing, unknown or wrongly shaped key raises UserError with the list.
    """
    state = {name.removeprefix("vision_model."): value for name, value in state.items()}
    if (table := state.get("embeddings.position_embedding.weight")) is not None:
        grid = math.isqrt(len(tower.positions) - 1)
        state["embeddings.position_embedding.weight"] = weights.resize_positions(table, grid)
    not_used = ("text_model.", "visual_projection.", "text_projection.", "logit_scale", "embeddings.position_ids")
    names = {
        "class_embedding": "embeddings.class_embedding",
        "patches.weight": "embeddings.patch_embedding.weight",
        "positions": "embeddings.position_embedding.weight",
    }
    for part in ("weight", "bias"):
        names |= {f"pre_norm.{part}": f"pre_layrnorm.{part}", f"post_norm.{part}": f"post_layernorm.{part}"}
        for i in range(len(tower.blocks)):
            theirs = f"encoder.layers.{i}"
            names |= {
                f"blocks.{i}.norm1.{part}": f"{theirs}.layer_norm1.{part}",
                f"blocks.{i}.norm2.{part}": f"{theirs}.layer_norm2.{part}",
                f"blocks.{i}.attn.qkv.{part}": [f"{theirs}.self_attn.{x}_proj.{part}" for x in "qkv"],
                f"blocks.{i}.attn.out.{part}": f"{theirs}.self_attn.out_proj.{part}",
                f"blocks.{i}.mlp.up.{part}": f"{theirs}.mlp.fc1.{part}",
                f"blocks.{i}.mlp.down.{part}": f"{theirs}.mlp.fc2.{part}",
            }
    weights.load_renamed(tower, state, names, not_used, what="CLIP")


def load_gpt2(gpt2: GPT2, state: dict) -> None:
    """GPT-2's weights, with or without the prefix `transformer.`; cross-attention (Vanilla) where the file has it.

    transformers stores these matrices as Conv1D, [in, out]: all are transposed, the square c_proj too, where no shape
    error would tell. `attn.bias` and `attn.masked_bias` of old files are masks, `lm_head.weight` is tied to wte.
    """
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight", "q_attn.weight")
    state = {name: value.t() if name.endswith(conv1d) else value for name, value in state.items()}
    not_used = ("lm_head.weight", *(f"h.{i}.attn.{x}bias" for i in range(len(gpt2.blocks)) for x in ("", "masked_")))
    not_used += tuple(f"h.{i}.crossattention.{x}bias" for i in range(len(gpt2.blocks)) for x in ("", "masked_"))
    names = {"wte.weight": "wte.weight", "wpe.weight": "wpe.weight"}
    for part in ("weight", "bias"):
        names[f"ln_f.{part}"] = f"ln_f.{part}"
        for i, block in enumerate(gpt2.blocks):
            ours, theirs = f"blocks.{i}", f"h.{i}"
            names |= {
                f"{ours}.norm1.{part}": f"{theirs}.ln_1.{part}",
                f"{ours}.norm2.{part}": f"{theirs}.ln_2.{part}",
                f"{ours}.attn.qkv.{part}": f"{theirs}.attn.c_attn.{part}",
                f"{ours}.attn.out.{part}": f"{theirs}.attn.c_proj.{part}",
                f"{ours}.mlp.up.{part}": f"{theirs}.mlp.c_fc.{part}",
                f"{ours}.mlp.down.{part}": f"{theirs}.mlp.c_proj.{part}",
            }
            if hasattr(block, "cross") and f"{theirs}.crossattention.q_attn.weight" in state:
                names |= {
                    f"{ours}.norm_cross.{part}": f"{theirs}.ln_cross_attn.{part}",
                    f"{ours}.cross.q.{part}": f"{theirs}.crossattention.q_attn.{part}",
                    f"{ours}.cross.kv.{part}": f"{theirs}.crossattention.c_attn.{part}",
                    f"{ours}.cross.out.{part}": f"{theirs}.crossattention.c_proj.{part}",
                }
    weights.load_renamed(gpt2, state, names, not_used, what="GPT-2", may_lack=("cross",))


def clip_sizes(config: dict) -> dict:
    """Config fields from a CLIP config.json, full or vision-only; missing entries mean transformers' defaults, B/32."""
    vision = config.get("vision_config", config)
    width, patch = vision.get("hidden_size", 768), vision.get("patch_size", 32)
    return dict(
        stem="patch", patch=patch, vision_width=width, vision_layers=vision.get("num_hidden_layers", 12),
        vision_heads=vision.get("num_attention_heads", 12), vision_mlp=vision.get("intermediate_size", 3072),
        vision_act=vision.get("hidden_act", "quick_gelu"), image_size=vision.get("image_size", 224),
    )  # fmt: skip


def gpt2_sizes(config: dict) -> dict:
    """Config fields from a GPT-2 config.json."""
    if config.get("activation_function", "gelu_new") != "gelu_new":
        raise UserError(f"GPT-2 with activation {config['activation_function']}: only gelu_new is built here")
    return dict(
        width=config.get("n_embd", 768), layers=config.get("n_layer", 12), heads=config.get("n_head", 12),
        mlp=config.get("n_inner") or 0, vocab_size=config.get("vocab_size", 50257),
        positions=config.get("n_positions", 1024),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Training: optimizer, self-critical samples, the loop


def build(cfg: Config, corpus, checkpoint: Path | None = None) -> VCGPT:
    """The model with its tokenizer and first weights: a checkpoint's, official ones, or random ones.

    Official weights bring their sizes along, so cfg is changed here to what was really built.
    """
    clip = weights.read_weights(cfg.clip) if cfg.clip != "none" and checkpoint is None else None
    gpt2 = weights.read_weights(cfg.gpt2) if cfg.gpt2 != "none" and checkpoint is None else None
    sizes = (clip_sizes(clip[0]) if clip else {}) | (gpt2_sizes(gpt2[0]) if gpt2 else {})
    for name, value in sizes.items():
        if name != "image_size" or not cfg.image_size:  # another size than CLIP's is a choice: positions are resized
            setattr(cfg, name, value)
    check(cfg)
    if checkpoint:
        tokenizer = language.Tokenizer.load(checkpoint)
    elif cfg.tokenizer != "none" or gpt2:
        tokenizer = language.Tokenizer.from_pretrained(cfg.tokenizer if cfg.tokenizer != "none" else cfg.gpt2)
    else:
        items = corpora.first_of(corpus.splits["train"], 20000)
        texts = [language.clean_caption(text) for item in items for text in item.captions]
        tokenizer = language.Tokenizer.train(texts, cfg.vocab_size)
    if gpt2 is None and checkpoint is None:
        cfg.vocab_size = tokenizer.vocab_size
    elif tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the word embedding {cfg.vocab_size}")
    model = VCGPT(cfg, tokenizer)
    if checkpoint:
        common.load_model_weights(model, checkpoint)
    if clip:
        load_clip(model.clip, clip[1])
    if gpt2:
        load_gpt2(model.gpt2, gpt2[1])
    return model


def make_optimizer(cfg: Config, model: VCGPT):
    """Loaded backbones move slowly, all that is new fast. HERE[vcgpt-19] (not in the paper): nothing is frozen."""
    loaded = tuple(name for name, source in (("clip.", cfg.clip), ("gpt2.", cfg.gpt2)) if source != "none")

    def lr_of(name: str) -> float:
        return cfg.lr_backbone if name.startswith(loaded) and "cross" not in name else cfg.lr

    return common.adamw(model, lr_of, cfg.weight_decay, betas=(0.9, cfg.beta2))


def train_language_model(cfg: Config, model: VCGPT, train_items, machine) -> None:
    """HERE[vcgpt-9] (not in the paper): GPT-2 alone on captions, `lm_steps` steps, where it starts without weights.

    The method presupposes a language model that can already speak; this is its stand-in on the small world.
    """
    optimizer = common.adamw(model.gpt2, lambda name: cfg.lr, cfg.weight_decay, betas=(0.9, cfg.beta2))
    texts = (language.clean_caption(text) for item in train_items for text in item.captions)
    texts = list(itertools.islice(texts, cfg.lm_steps * cfg.batch))
    tok = model.tokenizer
    for step in range(cfg.lm_steps):
        rows = [tok.encode(texts[(step * cfg.batch + i) % len(texts)], cfg.max_len) for i in range(cfg.batch)]
        batch = data.pad_captions(rows, tok.bos, tok.eos, tok.pad)
        targets = batch["targets"].to(machine.device)
        is_real = targets != -100
        hidden = model.gpt2(batch["ids"].to(machine.device))[is_real]
        loss = loss_lm(F.linear(hidden, model.gpt2.wte.weight), targets[is_real])
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / 20)
        loss.backward()
        nn.utils.clip_grad_norm_(model.gpt2.parameters(), cfg.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if cfg.lm_steps and machine.is_main:
        print(f"GPT-2 alone, {cfg.lm_steps} text-only steps: loss {loss.item():.3f}")


def sample_captions(cfg: Config, model: VCGPT, batch: dict, cider: scoring.CiderReward, machine, seed: int):
    """Self-critical training, first half, see decoding.rewarded_samples: k captions for each picture, and what they are
    worth. HERE[vcgpt-17]: no dropout, here and in the step, so that log p is the sampler's own."""
    pixels, luck = batch["pixels"].to(machine.device), torch.Generator(machine.device).manual_seed(seed)
    with torch.no_grad(), machine.autocast():
        return decoding.rewarded_samples(lambda: Decoder(model, pixels), batch["image_id"], cfg.captions_per_image,
                                         model.tokenizer, cider, cfg.max_new, luck, cfg.baseline)  # fmt: skip


def train(cfg: Config, model: VCGPT, corpus, machine, run, checkpoint: Path | None = None) -> None:
    """The loop. `checkpoint`: go on from its step with its optimizer; all that is random follows from seed and step."""
    k, train_items = cfg.captions_per_image, corpus.splits["train"]
    images = cfg.batch // k  # pictures per step, over all processes
    model.to(machine.device)
    optimizer = make_optimizer(cfg, model)
    start, best, is_due = run.go_on(checkpoint, optimizer)
    if not checkpoint:
        train_language_model(cfg, model, train_items, machine)
    cider = None
    if cfg.task == "scst":
        cider = scoring.CiderReward({item.image_id: item.captions for item in train_items})
    pictures = data.Pictures(train_items, model.tokenizer, cfg.image_size, captions=k, max_len=cfg.max_len, train=True,
                             augment=cfg.augment, seed=cfg.seed)  # fmt: skip
    loader = data.train_loader(pictures, images, machine.workers, machine.rank, machine.processes, cfg.seed, start,
                               cfg.steps, pin=machine.device.type == "cuda")  # fmt: skip
    batches = iter(loader)
    log = common.Logger(run, machine, cfg.steps, cfg.log_every, start)
    log.flops_per_item = flops_per_pair(cfg, model)
    ddp = common.spread(model, cfg, machine, Block)
    if is_due:  # saved, but stopped before its evaluation was over
        best = validate(cfg, model, corpus, machine, run, log, start, best)
    with common.StopRequest() as stop, contextlib.closing(batches):
        for step in range(start, cfg.steps):
            model.train(cider is None)
            seed = (cfg.seed * machine.processes + machine.rank) * 1_000_003 + step
            torch.manual_seed(seed)  # of dropout
            with log.waiting():
                batch = next(batches)
            sums = {}
            if cider:  # the loader's captions make way for the model's own
                samples, sums = sample_captions(cfg, model, batch, cider, machine, seed)
                batch |= samples
            share = common.linear_schedule(step, cfg.steps, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share

            # The mean runs over every real target of the global batch, however many processes and micro-batches it is
            # cut into; DistributedDataParallel averages gradients over processes, hence the factor `processes`.
            here = [(batch["targets"] != -100).sum(), len(batch["targets"]), len(batch["bad"]), stop.signum > 0]
            targets_in_all, rows_in_all, bad_in_all, to_stop = common.sum_over_processes(here, machine.device)
            if bad_in_all:
                loader.judge(common.gather_lists(batch["bad"]))
            loss_sum = 0.0
            pieces = micro_batches(batch, cfg)
            for i, piece in enumerate(pieces):
                pixels, ids, targets, *advantages = (x.to(machine.device, non_blocking=True) for x in piece)
                with common.synchronised(ddp, i + 1 == len(pieces)):  # processes exchange gradients once a step
                    with machine.autocast():
                        logits = ddp(pixels, ids, targets)
                    is_real = targets != -100
                    if cider:
                        loss = loss_scst(logits, targets[is_real], advantages[0][:, None].expand_as(targets)[is_real])
                    else:
                        loss = loss_lm(logits, targets[is_real], cfg.label_smoothing)
                    loss = loss * len(logits) / targets_in_all
                    (loss * machine.processes).backward()
                loss_sum += loss.detach()
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            common.stop_if_not_finite(norm, loss_sum, batch["image_id"], step + 1, run)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            losses = {"loss": loss_sum} | {name: float(x) / rows_in_all for name, x in sums.items()}
            log.step(step + 1, losses, cfg.lr * share, norm, images * k)
            is_due = (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps
            with log.pause():
                if (is_due or to_stop) and machine.is_main:
                    run.save(step + 1, model, model.tokenizer, optimizer, {"val": {}, "best": best, "is_due": is_due})
                if is_due:
                    best = validate(cfg, model, corpus, machine, run, log, step + 1, best)
            if to_stop:
                raise common.stopped(run, machine, stop.signum or signal.SIGTERM)
        if any(common.sum_over_processes([stop.signum > 0], machine.device)):  # heard in the last step
            raise common.stopped(run, machine, stop.signum or signal.SIGTERM)
    log.close()
    data.tell_of_bad([loader])


def flops_per_pair(cfg: Config, model: VCGPT) -> float:
    """Floating-point operations of a training step per picture-caption pair, for the MFU: 6 x parameters x tokens,
    a caption counted at 12 tokens, attention itself left out."""
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    visual_tokens = 1 + (cfg.image_size // cfg.patch) ** 2
    per_picture = (size["clip"] + size.get("visual", 0)) * visual_tokens
    return 6 * (per_picture / cfg.captions_per_image + (sum(size.values()) - size["clip"] - size.get("visual", 0)) * 12)


def micro_batches(batch: dict, cfg: Config):
    """A batch as a list of (pixels, ids, targets[, advantages]): --micro-batch pairs, but never less than a picture."""
    k = cfg.captions_per_image
    images = max(1, cfg.micro_batch // k) if cfg.micro_batch else len(batch["pixels"])
    sizes = {"pixels": images, "ids": images * k, "targets": images * k, "advantages": images * k}
    return list(zip(*(batch[name].split(size) for name, size in sizes.items() if name in batch), strict=True))


def validate(cfg, model, corpus, machine, run, log, step: int, best: float) -> float:
    """Greedy captions of the first val pictures; moves `best` if they are; returns the best CIDEr-D so far.

    step_N is saved already: what fails here costs nothing, and --resume begins with it.
    """
    val, items = {}, corpus.splits.get("val", [])[: max(1, cfg.val_items)]
    if items:
        val = scoring.score_captions(items, caption_all(cfg, model, items, machine, beam=1))
    is_best = val["CIDEr_D"] >= best if val else True  # without a val split the last is the best
    best = max(best, val.get("CIDEr_D", best))
    if machine.is_main:
        if val:
            shown = "  ".join(f"{k} {val[k]:.3f}" for k in ("CIDEr_D", "BLEU_4", "caption_true") if k in val)
            log.say(f"val at step {step}: {shown}" + ("  (best so far)" if is_best else ""))
            run.log({"step": step, **{f"val_{k}": v for k, v in val.items()}})
        run.evaluated(step, {"val": val, "best": best, "is_due": False}, is_best)
    common.wait_for_all()
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def caption_all(cfg: Config, model: VCGPT, items, machine, beam: int, temperature=0.0) -> dict:
    """Captions for every item, {image_id: caption}, the same on every process."""
    model.eval()
    pictures = data.Pictures(items, model.tokenizer, cfg.image_size, captions=0, max_len=cfg.max_len, train=False)
    loader = data.eval_loader(pictures, 100, machine.workers, machine.rank, machine.processes)
    luck = torch.Generator(machine.device).manual_seed(cfg.seed * machine.processes + machine.rank)

    def decode(batch):
        with machine.autocast():
            return generate(model, batch["pixels"], beam, temperature, luck)

    return scoring.caption_split(decode, loader)


def final_evaluation(cfg: Config, model: VCGPT, checkpoint: Path, corpus, machine, folder, started: float) -> dict:
    """Every test split with its controls: metrics.json, samples.png, result files in `folder`; columns of a table."""

    def decode(items):
        return caption_all(cfg, model, items, machine, cfg.beam, cfg.temperature)

    splits, columns = scoring.evaluate_captions(corpus, decode, folder, machine.is_main, cfg.official)
    protocol = {
        "variant": cfg.variant, "beam": cfg.beam, "max_new": cfg.max_new, "length_penalty": cfg.length_penalty,
        "temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p, "notes": corpus.notes,
        "checkpoint": common.how_chosen(checkpoint), "best_by": "greedy CIDEr_D",
        **scoring.CAPTION_PROTOCOL,
    }  # fmt: skip
    if machine.is_main:
        seconds = time.perf_counter() - started
        common.write_metrics(folder, "vcgpt", cfg, machine, model, seconds, protocol, splits)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Main

SIZES = (
    "variant fusion_layers memory clip_post_norm image_size patch stem vision_width vision_layers vision_heads "
    "vision_act vision_mlp clip gpt2 vocab_size width layers heads mlp positions"
).split()  # what --init takes over from the run's config
DECODING = "beam max_new length_penalty temperature top_k top_p".split()


def check(cfg: Config) -> None:
    """Settings that contradict one another or are not among the choices."""
    common.check_numbers(cfg, "batch captions_per_image max_len max_new beam patch width heads positions layers "
                         "vision_width vision_heads fusion_layers")  # fmt: skip
    common.choose("task", cfg.task, ["pretrain", "caption", "scst"])
    common.choose("variant", cfg.variant, ["vcgpt", "vcgpt_wo_se", "vanilla"])
    common.choose("memory", cfg.memory, ["A", "B"])
    common.choose("stem", cfg.stem, ["patch", "conv"])
    common.choose("vision-act", cfg.vision_act, list(ACTIVATIONS))
    common.choose("augment", cfg.augment, list(data.AUGMENTATIONS))
    common.choose("baseline", cfg.baseline, ["leave-one-out", "greedy"])
    for whole, part in (("image_size", "patch"), ("width", "heads"), ("vision_width", "vision_heads")):
        if getattr(cfg, whole) % getattr(cfg, part):
            names = f"--{whole} {getattr(cfg, whole)} --{part} {getattr(cfg, part)}".replace("_", "-")
            raise UserError(f"{names}: the first must be a multiple of the second")
    if cfg.stem == "conv" and (cfg.patch < 2 or cfg.patch & (cfg.patch - 1)):
        raise UserError(f"--patch {cfg.patch}: the convolutional stem halves the picture, so it needs 2, 4, 8, 16 ...")
    if not cfg.image_size and cfg.clip == "none":
        raise UserError("--image-size 0 is that of --clip, and there is none: give the side in pixels")
    if cfg.stem == "conv" and cfg.vision_width % 4:
        raise UserError(f"--vision-width {cfg.vision_width}: sines of row and column need a multiple of 4")
    corpora.check_task(cfg.task, cfg.data)
    if not cfg.temperature and (cfg.top_k or cfg.top_p != 1.0):
        raise UserError("--top-k and --top-p belong to sampling: add --temperature, e.g. --temperature 1.0")
    if not cfg.top_p:
        raise UserError("--top-p 0.0: give 1 or less, and more than 0")
    common.check_most(cfg, {"top_p": 1, "dropout": 0.99, "warmup": 1, "label_smoothing": 1, "beta2": 0.99999,
                            "max_new": cfg.positions, "max_len": cfg.positions - 1})  # fmt: skip
    if cfg.task == "scst" and cfg.baseline == "leave-one-out" and cfg.captions_per_image < 2:
        raise UserError("--baseline leave-one-out needs --captions-per-image 2 or more; --baseline greedy does not")


def load_data(cfg: Config):
    return mixture.of_run(cfg)


def caption_files(paths: list[str], given: dict) -> None:
    """--caption: a line for each picture."""
    common.allow(given, ["init", "device", "seed", *DECODING], "--caption")
    if given.get("init", "none") == "none":
        raise UserError("--caption needs a trained model: add --init RUN, e.g. --init runs/vcgpt-scenes")
    model = VCGPT.from_run(given["init"], common.choose_device(given.get("device", "auto"))[0])
    model.cfg = replace(model.cfg, **given)
    check(model.cfg)
    torch.manual_seed(model.cfg.seed)
    for path in paths:
        print(f"{path}: {model.caption(path)}")


def evaluate_run(cfg: Config, checkpoint: Path, machine, folder: Path) -> dict:
    """--eval-only, for one of its runs."""
    started = time.perf_counter()
    model = build(cfg, None, checkpoint).to(machine.device)
    return final_evaluation(cfg, model, checkpoint, load_data(cfg), machine, folder, started)


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    given, command = common.parse_flags(Config, sys.argv[1:] if argv is None else argv, "vcgpt.py", {
        "caption": dict(nargs="+", metavar="PICTURE", help="print a caption for each picture (with --init RUN)"),
        "eval-only": dict(nargs="*", metavar="RUN", help="evaluate finished runs, or the one of --init, side by side"),
    })  # fmt: skip
    if command.caption:
        return caption_files(command.caption, given)
    if command.eval_only is not None:
        return compare.evaluate_runs(command.eval_only, given, "vcgpt", Config, DECODING, check, evaluate_run)
    cfg, checkpoint = common.configure(Config, given, "vcgpt", PRESETS, RECIPES, SIZES)
    if cfg.clip != "none" and checkpoint is None and "image_size" not in given:
        cfg.image_size = 0  # that of the checkpoint
    check(cfg)
    if checkpoint and {"clip", "gpt2", "tokenizer"} & set(given):
        raise UserError("--init brings its own weights and tokenizer: leave out --clip, --gpt2 and --tokenizer")
    if cfg.task == "scst" and not checkpoint:
        raise UserError("--task scst refines a trained model: add --init RUN, e.g. --init runs/vcgpt-scenes")
    if checkpoint or cfg.gpt2 != "none":
        cfg.lm_steps = 0  # GPT-2 can speak already
    machine = common.start_machine(cfg)
    corpus = load_data(cfg)
    if "train" not in corpus.splits:
        raise UserError(f"{corpus.name} has no training split, only {', '.join(corpus.splits) or 'all empty'}")
    if isinstance(corpus.splits["train"], list) and cfg.data not in corpora.NAMES and cfg.task != "scst":
        most = max(len(item.captions) for item in corpus.splits["train"])  # own data often has one a picture: enough
        cfg.captions_per_image = min(cfg.captions_per_image, most)
    images = cfg.batch // cfg.captions_per_image
    if images < machine.processes:
        least = machine.processes * cfg.captions_per_image
        raise UserError(f"--batch {cfg.batch} is less than a picture for each process: give {least} or more")
    model = build(cfg, corpus, checkpoint)
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(corpus.splits["train"]) / images)
    cfg.eval_every = cfg.eval_every or math.ceil(cfg.steps / 5)
    finish.carry_out("vcgpt", f"VC-GPT ({cfg.variant}, {cfg.task})", cfg, checkpoint, model, corpus, machine,
                     started, train, final_evaluation, cfg.task)  # fmt: skip


if __name__ == "__main__":
    common.run_main(main)
