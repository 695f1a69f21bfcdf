"""SOHO: seeing out of the box (Huang, Zeng, Huang, Liu, Fu, Fu, CVPR 2021, arXiv 2104.03135).

Region features know only the classes of their detector, see boxes instead of the whole picture, and are never trained
with the language. So the paper reads whole pictures, from the pixels on, end to end. A picture then gives many cells
that look alike, and nothing to name them by; so a visual dictionary collects similar cells under one code. It is
learned on the fly, by a moving average of the features that were nearest to each code, and it makes masked visual
modelling possible: all cells of one code are hidden, and the network says which code it was.

    picture ──> ResNet ──> 2x2 pool, 1x1 conv, norm ──> v ──┬──────────────────────────┐
                stride 32                     stride 64     └─> nearest code f(v) ──> gate ──> hide a code (MVM)
                                              dictionary, moved by the mean of its v           + place, norm
                                                                                                │
    words, some hidden (MLM) ──> BERT embeddings ─────────────────────────────> [words ; cells] ┴─> BERT encoder
                                        MLM: the hidden words | MVM: the hidden code | ITM: do they belong together?

    python soho.py                                    the small world: 93 % of pairs told apart, 3 minutes, 2 cores
    python soho.py --task vqa --init runs/soho-scenes     or retrieval, nlvr2; ve with --world full
    python soho.py --score test:3 "a red circle" --init RUN     --ask PICTURE QUESTION of a run of vqa
    python tools/dictionary.py RUN                    what the codes stand for
    torchrun --nproc_per_node=8 soho.py --data coco   ResNet-101, 12 layers

Reading map: config, presets, recipes | blocks | model | corruption: from a loader's batch to what pre-training reads |
losses | step: a batch of any task | heads of the downstream tasks | official weights | training | evaluation | main.
Marks: `# PAPER` what the paper says, `# OFFICIAL` what the authors' code does (researchmm/soho), `# HERE[id]` what we
do and why, a row of docs/divergences.md.
"""

from __future__ import annotations

import contextlib
import math
import re
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common
import corpora
import data
import language
import mixture
import weights
from common import UserError
from tools import ask, compare, exam, finish

# ---------------------------------------------------------------------------------------------------------------------
# Config, presets, recipes. Every field is a flag; its comment is the flag's help.


@dataclass
class Config(common.RunConfig):
    # --- method: dictionary
    codes: int = 2048  # size K of the dictionary
    vd_mode: str = "gate"  # what a visual token is: gate | replace (PAPER: the code) | residual | none; HERE[soho-1]
    vd_update: str = "official"  # HERE[soho-2]: how codes move, official | paper
    vd_decay: float = 0.4  # share of the old code that stays in each update
    vd_revive: float = 0.0  # HERE[soho-3]: codes of a moving count below this start anew at a random cell; 0: none
    # --- method: objectives
    word_mask: float = 0.15  # share of words to predict (MLM)
    mvm_prob: float = 0.015  # HERE[soho-4]: share of texts whose picture has a code hidden (MVM)
    mvm_temperature: float = 1.0  # HERE[soho-5]: MVM's logits are cosines divided by this
    mismatched: float = 0.5  # share of texts that make way for another picture's (ITM)
    mlm_on_negatives: bool = False  # HERE[soho-6]: MLM's loss on mismatched pairs too
    mvm_on_negatives: bool = False  # HERE[soho-6]: MVM's loss on mismatched pairs too
    negatives: int = 3  # HERE[soho-9]: of retrieval, mismatched texts for each picture
    # --- picture
    short_side: int = 600  # pixels of the shorter side, unless the longer would pass long_side
    long_side: int = 1000  # most pixels of the longer side
    train_sides: str = ""  # like 400,800,1333: short side drawn between the first two in training; none: as above
    square_mask: bool = False  # HERE[soho-7]: as in the authors' code the valid cells are told by the height alone
    # --- network
    resnet: str = "none"  # weights of the ResNet: torchvision's file, a hub id, a directory, or none
    bert: str = "none"  # weights of the encoder: a hub id, a directory, or none
    tokenizer: str = "none"  # hub id or directory; none: of --bert or official weights, else trained on the texts
    vocab_size: int = 30522  # upper bound where the tokenizer is trained here
    depth: int = 101  # of the ResNet: 10 | 18 | 34 | 50 | 101
    cnn_width: int = 64  # channels of its stem and of the first stage's inner convolutions
    strides: str = "2,2,1,2,2,2"  # of its stem's convolution and pool, and of the four stages
    frozen_stages: int = 1  # stem and this many stages stay as they were loaded; 0: all is trained
    freeze_cnn: float = 0.0  # share of the steps in which the whole ResNet stays as it is; PAPER: 0.25, HERE[soho-8]
    width: int = 768  # of all states
    heads: int = 12  # attention heads
    mlp: int = 0  # width inside the feed-forward parts; 0: 4 x width
    layers: int = 12  # of the encoder; OFFICIAL: 3, with ResNet-18
    positions: int = 512  # longest text
    dropout: float = 0.1  # attention weights, sub-layer outputs, text embeddings
    init_std: float = 0.02  # standard deviation of new weights
    # --- recipe of pre-training. OFFICIAL: configs/Pretrain/soho_res18_pre.py, two halves of 64 pairs on each of 8 GPUs
    batch: int = 1024  # pairs per step over all processes; of questions, statements and hypotheses samples
    captions_per_image: int = 4  # captions per picture and step
    epochs: float = 40.0  # passes over the pictures, where --steps is 0
    steps: int = 0  # training updates; 0: from --epochs
    word_steps: int = 0  # HERE[soho-12]: first of them, in which the ResNet alone learns the words said of a picture
    lr: float = 1e-4  # peak learning rate of all but the ResNet (AdamW)
    cnn_optimizer: str = "sgd"  # of the ResNet: sgd (with momentum 0.9) | adamw, HERE[soho-10]
    cnn_lr: float = 1e-2  # peak learning rate of the ResNet
    cnn_decay: float = 1e-4  # added to the ResNet's gradient, times its weights
    weight_decay: float = 0.01  # of all but the ResNet, biases and norms too
    beta2: float = 0.999  # AdamW's second moment; the first is 0.9
    warmup: float = 0.005  # share of the steps in which the rates rise linearly; OFFICIAL: 500 updates
    warmup_from: float = 1 / 3  # where they rise from, as a share of the peak
    drops: str = "0.625,0.875"  # shares of the steps where drop_factor multiplies the rates; none: linearly to 0
    drop_factor: float = 0.1  # see drops
    grad_clip: float = 10.0  # largest gradient norm; 0: no clipping
    max_len: int = 14  # word pieces of a text, special ones apart
    train_on: str = "train"  # of vqa: train | train+val (but for 3,000 questions) | train+val+vg (Visual Genome)
    gallery: int = 0  # pictures that retrieval ranks, the first of each split; 0: all
    galleries: int = 1  # how many such galleries of the test split are ranked, one after another


PRESETS = {
    # HERE[soho-10] (not in the paper): tiny learns the small world from nothing in three minutes on 2 cores
    "tiny": dict(
        codes=64, mvm_prob=0.15, word_mask=0.3, short_side=64, long_side=64, depth=10, cnn_width=16,
        strides="2,2,1,2,1,1", frozen_stages=0, width=128, heads=4, mlp=256, layers=2, positions=64, dropout=0.0,
        init_std=0.08, vocab_size=1000, batch=160, captions_per_image=5, steps=950, word_steps=250, lr=2e-3,
        cnn_optimizer="adamw", cnn_lr=2e-3, warmup=0.1, warmup_from=0.0, drops="", grad_clip=1.0, max_len=30,
        gallery=200),
    # HERE[soho-10] (not in the paper): small learns from a few thousand photographs, from nothing
    "small": dict(
        codes=256, short_side=192, long_side=320, depth=18, cnn_width=32, frozen_stages=0, strides="2,2,1,2,2,1",
        width=192, heads=6, mlp=768, layers=3, positions=128, vocab_size=3000, mvm_prob=0.15, batch=64,
        captions_per_image=2, epochs=20.0, lr=5e-4, cnn_lr=0.05, warmup=0.1, warmup_from=0.0, drops="", grad_clip=1.0,
        max_len=30, gallery=200),
    "base": dict(resnet="timm/resnet101.tv_in1k", bert="bert-base-uncased"),
}  # fmt: skip

FINE = dict(vd_mode="none", batch=512, captions_per_image=1, epochs=20.0, drops="0.6,0.8", grad_clip=4.0)
RECIPES = {
    # OFFICIAL: configs/VQA/soho_res18_vqa.py; batches are for 8 GPUs, in two halves
    ("vqa", "base"): {**FINE, "train_sides": "400,800,1333", "train_on": "train+val"},
    # HERE[soho-9] (not in the paper): nothing is published about these three; they start from VQA's
    ("retrieval", "base"): {**FINE, "batch": 128},
    ("nlvr2", "base"): {**FINE, "batch": 128, "max_len": 48},
    ("ve", "base"): {**FINE, "batch": 256, "epochs": 5.0, "max_len": 30},
}  # fmt: skip
for _task in ("vqa", "retrieval", "nlvr2", "ve"):  # HERE[soho-10] (not in the paper): a minute each after pre-training
    RECIPES[_task, "tiny"] = dict(vd_mode="none", steps=300, lr=5e-4, batch=64, captions_per_image=1)
    RECIPES[_task, "small"] = dict(vd_mode="none", lr=2e-4, captions_per_image=1)

TASKS, QUESTION_TASKS = ("pretrain", "retrieval", "vqa", "nlvr2", "ve"), ("vqa", "nlvr2", "ve")
PARTS = ("dictionary.", "mixer.", "mask_vector.", "itm_head.", "answer_head.", "word_head.")  # that some tasks lack
DECODING, NOTHING = ["gallery", "galleries"], -100  # flags of an evaluation; the label of what is not to be predicted
BERT_EPS, NECK_EPS = 1e-12, 1e-5  # OFFICIAL: LayerNorm's epsilon in BERT, and on the visual tokens
BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # 10: ours
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of red, green and blue in 0 to 255

# ---------------------------------------------------------------------------------------------------------------------
# Blocks. One alphabet: B pictures, R text rows (k for each picture), N cells of a picture (h rows of w), T text tokens,
# D width, H heads, V vocabulary, K codes. Keep masks are boolean, True = attend.


class ResidualBlock(nn.Module):
    """relu(convolutions(x) + x). Two of 3x3, or as a bottleneck 1x1, 3x3, 1x1 of four times the width."""

    def __init__(self, c_in: int, width: int, stride: int, is_bottleneck: bool):
        super().__init__()
        c_out = 4 * width if is_bottleneck else width
        # "pytorch" style: the stride stands in the 3x3 convolution of a bottleneck
        shapes = ((c_in, width, 1, 1), (width, width, 3, stride), (width, c_out, 1, 1))
        shapes = shapes if is_bottleneck else ((c_in, width, 3, stride), (width, width, 3, 1))
        self.depth = len(shapes)
        for i, (a, b, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        if stride > 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.depth else y
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ResNet(nn.Module):
    """[B, 3, H, W] -> [B, C, H/32, W/32], the last stage (arXiv 1512.03385), with torchvision's names of parameters."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, self.frozen_stages, self.is_frozen = cfg.cnn_width, cfg.frozen_stages, False
        first, pool, *strides = map(int, cfg.strides.split(","))
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, first, 3, bias=False), nn.BatchNorm2d(width)
        self.pool, c_in = nn.MaxPool2d(3, pool, 1), width
        for s, (n, stride) in enumerate(zip(BLOCKS[cfg.depth], strides, strict=True)):
            stage = []
            for b in range(n):
                stage.append(ResidualBlock(c_in, width * 2**s, stride if b == 0 else 1, cfg.depth >= 50))
                c_in = width * 2**s * (4 if cfg.depth >= 50 else 1)
            self.add_module(f"layer{s + 1}", nn.Sequential(*stage))
        self.channels = c_in
        for part in self.frozen():
            part.requires_grad_(False)

    def frozen(self) -> list[nn.Module]:
        """What stays as it was loaded: the parameters without gradient, the norms with the statistics of ImageNet."""
        if self.is_frozen:
            return [self]
        stages = [getattr(self, f"layer{s}") for s in range(1, self.frozen_stages + 1)]
        return [self.conv1, self.bn1, *stages] if self.frozen_stages else []

    def train(self, mode=True):
        super().train(mode)
        for part in self.frozen() if mode else ():
            nn.Module.train(part, False)
        return self

    def forward(self, x):
        with torch.no_grad() if self.is_frozen else contextlib.nullcontext():
            x = self.pool(self.bn1(self.conv1(x)).relu())
            for s in range(1, 5):
                x = getattr(self, f"layer{s}")(x)
        return x


class Dictionary(nn.Module):
    """The visual dictionary: K codes; each feature is replaced by the nearest one.

    PAPER: h = argmin_j |v - d_j|^2, f(v) = d_h, and gradients pass f as if it were not there. No loss moves the codes:
    in training each forward pass moves them towards the mean of the features that chose them.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.decay, self.rule, self.revive = cfg.vd_decay, cfg.vd_update, cfg.vd_revive
        self.register_buffer("embed", torch.randn(cfg.codes, cfg.width))  # d [K, D]; OFFICIAL: N(0, 1)
        self.register_buffer("cluster_size", torch.zeros(cfg.codes))  # N, the moving count of each code
        self.register_buffer("cluster_sum", torch.zeros(cfg.codes))  # how often each was chosen in all
        self.register_buffer("embed_avg", torch.zeros(cfg.codes, cfg.width))  # M, the moving sum of its features
        self.counts = None  # how often each was chosen in the last update

    def nearest(self, x):
        """Features [N, D] -> indices [N] of the nearest codes."""
        return ((self.embed**2).sum(1) - 2 * x @ self.embed.T).argmin(1)  # |x|^2 is the same for all

    def forward(self, x):
        """Features [N, D] -> the same with codes in their place, in float32, and indices [N]."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            indices = self.nearest(x.detach())  # OFFICIAL: chosen among the old codes; what stands in is the moved one
            if self.training:
                self.update(x.detach(), indices)
            return x + (self.embed[indices] - x).detach(), indices  # f(v) = v + stop_gradient(d_h - v)

    @torch.no_grad()
    def update(self, x, indices):
        n = torch.zeros_like(self.cluster_size).index_add_(0, indices, torch.ones_like(x[:, 0]))
        s = torch.zeros_like(self.embed_avg).index_add_(0, indices, x)
        common.sum_tensors(n, s)  # of all processes, which so keep the same codes
        self.counts = n
        self.cluster_sum += n
        # OFFICIAL: N <- decay N + (1 - decay) n;  M <- decay M + (1 - decay) s
        self.cluster_size.mul_(self.decay).add_(n, alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(s, alpha=1 - self.decay)
        if self.rule == "official":
            # T = sum_j N_j;  d <- M / ((N + eps) / (T + K eps) T): a code that nothing chooses shrinks to zero
            total, eps = self.cluster_size.sum(), 1e-5
            size = (self.cluster_size + eps) / (total + len(n) * eps) * total
            self.embed.copy_(self.embed_avg / size[:, None])
        else:  # PAPER: d <- decay d + (1 - decay) mean of its features, where there are any
            mean = s / n.clamp(min=1)[:, None]
            self.embed.copy_(torch.where((n > 0)[:, None], self.embed.lerp(mean, 1 - self.decay), self.embed))
        if self.revive:
            some = x[torch.randint(len(x), (len(n),), device=x.device)]
            common.share_tensor(some)
            is_dead = self.cluster_size < self.revive
            for buffer, fresh in ((self.embed, some), (self.embed_avg, some), (self.cluster_size, torch.ones_like(n))):
                buffer[is_dead] = fresh[is_dead]

    def state(self) -> dict:
        """What the log says of the last update: codes chosen, their perplexity exp(entropy), codes that are zero."""
        p = self.counts / self.counts.sum()
        return {"codes": (p > 0).sum(), "perplexity": torch.special.entr(p).sum().exp(),
                "zero_codes": (self.embed == 0).all(1).sum()}  # fmt: skip


class Mixer(nn.Module):
    """What of the dictionary reaches the encoder: codes f and features v [B, D, h, w] -> [B, D, h, w].

    PAPER: f itself. OFFICIAL: g_0 z + g_1 v with z = W f + b and g = softmax(norm(U [z ; v])): the feature always has a
    way around the dictionary. An older class of theirs has the sum z + v. HERE[soho-1]: the gate by default.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.mode = cfg.vd_mode
        if self.mode in ("gate", "residual"):
            self.line = nn.Linear(cfg.width, cfg.width)
        if self.mode == "gate":
            self.gate, self.gate_norm = nn.Conv2d(2 * cfg.width, 2, 1, bias=False), nn.BatchNorm2d(2)

    def forward(self, f, v):
        if self.mode == "replace":
            return f
        z = self.line(f.movedim(1, -1)).movedim(-1, 1)
        if self.mode == "residual":
            return z + v
        g = self.gate_norm(self.gate(torch.cat([z, v], dim=1))).softmax(1)  # [B, 2, h, w]
        return g[:, :1] * z + g[:, 1:] * v


class TextEmbedding(nn.Module):
    """BERT's: LN(word + position + type 0)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.word = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position = nn.Embedding(cfg.positions, cfg.width)
        self.segment = nn.Embedding(2, cfg.width)
        self.norm, self.dropout = nn.LayerNorm(cfg.width, eps=BERT_EPS), nn.Dropout(cfg.dropout)

    def forward(self, ids):
        T = ids.size(1)  # text tokens
        if T > len(self.position.weight):
            raise UserError(f"a text of {T} tokens: there are {len(self.position.weight)} positions (--positions)")
        return self.dropout(self.norm(self.word(ids) + self.position.weight[:T] + self.segment.weight[0]))


class EncoderBlock(nn.Module):
    """BERT's, norms after the residual: x = LN(x + attention(x)); x = LN(x + W_2 gelu(W_1 x))."""

    def __init__(self, cfg: Config):
        super().__init__()
        D, inner = cfg.width, cfg.mlp or 4 * cfg.width
        self.heads, self.p = cfg.heads, cfg.dropout
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, inner), nn.Linear(inner, D)
        self.att_norm, self.ffn_norm = nn.LayerNorm(D, eps=BERT_EPS), nn.LayerNorm(D, eps=BERT_EPS)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, keep_mask, n=None):
        """States [R, L, D] -> the new states of all L tokens, or of the first `n` alone: after the last block ITM and
        answers look at one, and a ranking is half the work."""
        R, L, D = x.size()  # rows, tokens of text and picture, width
        q, k, v = self.qkv(x).view(R, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # [R, H, L, D/H]
        x, q = x[:, :n], q[:, :, :n]
        mixed = F.scaled_dot_product_attention(q, k, v, keep_mask, self.p if self.training else 0.0)
        x = self.att_norm(x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2))))
        return self.ffn_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


# ---------------------------------------------------------------------------------------------------------------------
# Model. `SOHO` holds the parts that its task needs; a batch is a dictionary of tensors, see `corrupt` and `rows_of`.


class SOHO(nn.Module, ask.Verbs):
    """ResNet, dictionary, BERT encoder, and the heads of `cfg.task`.

    tokenizer: with a mask token. answers: the classes of vqa. For users: `from_run`, score(picture, text) and
    answer(picture, question).
    """

    def __init__(self, cfg: Config, tokenizer: language.Tokenizer | None = None, answers: tuple[str, ...] = ()):
        super().__init__()
        self.cfg, self.tokenizer, self.answers = cfg, tokenizer, answers
        self.cnn = ResNet(cfg)
        self.project = nn.Conv2d(self.cnn.channels, cfg.width, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(cfg.width)
        if cfg.vd_mode != "none":
            self.dictionary, self.mixer = Dictionary(cfg), Mixer(cfg)
        if cfg.task == "pretrain":
            self.mask_vector = nn.Embedding(1, cfg.width)  # what stands for a hidden cell; [MASK] is another
        self.visual_norm = nn.LayerNorm(cfg.width, eps=NECK_EPS)
        self.text = TextEmbedding(cfg)
        self.encoder = nn.ModuleList(EncoderBlock(cfg) for _ in range(cfg.layers))
        if cfg.task in ("pretrain", "retrieval"):
            self.itm_head = nn.Linear(cfg.width, 2, bias=False)  # OFFICIAL: no pooler; 1 = they belong together
        if cfg.task == "pretrain" and cfg.word_steps:
            self.word_head = nn.Linear(self.cnn.channels, cfg.vocab_size)
        if cfg.task in QUESTION_TASKS:
            n = len(answers) if cfg.task == "vqa" else {"nlvr2": 2, "ve": 3}[cfg.task]
            self.answer_head = answer_head(cfg.width * (2 if cfg.task == "nlvr2" else 1), 4 * cfg.width, n or 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, init_std) for linear layers and embeddings, Kaiming's normal for convolutions (OFFICIAL) and for the
        answer head, biases 0, norms 1 and 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear) and name.startswith("answer_head"):
                nn.init.kaiming_normal_(module.weight, mode="fan_in")
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @staticmethod
    def pictures(batch: dict) -> tuple:
        """Normalised pictures and their sizes, of pairs one after the other."""
        sizes = batch["sizes"].flatten(0, -2)
        return normalise(batch["pixels"].flatten(0, -4), sizes), sizes

    def see(self, images, sizes) -> dict:
        """Normalised pictures [B, 3, H, W] of heights and widths `sizes` [B, 2], the rest 0 -> what stands in each of
        h x w cells: features v [B, D, h, w], keep_mask bool [B, h, w], and with a dictionary tokens [B, D, h, w] and
        codes int64 [B, h, w]. In training this moves the dictionary."""
        features = F.max_pool2d(self.cnn(images), 2)  # OFFICIAL: first the pool, then the convolution; PAPER: turned
        v = self.project_norm(self.project(features))
        B, D, h, w = v.size()  # pictures, width, rows and columns of cells
        seen = {"v": v, "tokens": v, "keep_mask": valid_cells(sizes, images.shape[2:], (h, w), self.cfg.square_mask)}
        if self.cfg.vd_mode != "none":
            f, codes = self.dictionary(v.movedim(1, -1).reshape(-1, D))
            f = f.view(B, h, w, D).movedim(-1, 1).to(v.dtype)
            seen |= {"tokens": self.mixer(f, v), "codes": codes.view(B, h, w)}
        return seen

    def place(self, tokens, keep_mask, is_masked=None, k=1):
        """Cells [B, D, h, w] -> visual tokens [B * k, N, D], k copies of each picture: what is_masked [B * k, N] hides
        makes way for the mask vector, then comes the place, then the norm."""
        x = tokens.flatten(2).transpose(1, 2).repeat_interleave(k, 0)
        if is_masked is not None:
            x = torch.where(is_masked[:, :, None], self.mask_vector.weight.to(x.dtype), x)
        places = sine_positions(keep_mask, x.size(2)).flatten(2).transpose(1, 2)  # [B, N, D]
        return self.visual_norm(x + places.repeat_interleave(k, 0))

    def encode(self, text, keep_mask, visual, visual_keep_mask, n=None):
        """Embedded words [R, T, D] and visual tokens [R, N, D] -> [R, T + N, D], text first; or the first `n` alone."""
        x = torch.cat([text, visual.to(text.dtype)], dim=1)
        keep = torch.cat([keep_mask, visual_keep_mask], dim=1)[:, None, None]  # [R, 1, 1, T + N], True = attend
        for i, block in enumerate(self.encoder, 1):
            x = block(x, keep, n if i == len(self.encoder) else None)
        return x

    def forward(self, batch: dict) -> dict:
        """What the losses of the task need; called so, because DistributedDataParallel sees nothing else."""
        images, sizes = self.pictures(batch)
        if "words" in batch:
            return {"words": self.word_head(self.cnn(images).amax((2, 3)))}
        seen = self.see(images, sizes)
        if self.cfg.task == "pretrain":
            return self.pretrain(batch, seen)
        return {"logits": self.judge(batch, seen)}

    def pretrain(self, batch: dict, seen: dict) -> dict:
        """A batch of `corrupt` -> mlm logits [words to predict, V], mvm cosines [hidden cells, K] and mvm_codes [hidden
        cells], itm logits [R, 2]."""
        T, k = batch["ids"].size(1), len(batch["ids"]) // len(seen["v"])
        is_masked, cells = None, seen["keep_mask"].flatten(1).repeat_interleave(k, 0)  # [R, N]
        if "codes" in seen:
            codes = seen["codes"].flatten(1).repeat_interleave(k, 0)  # [R, N]
            is_masked = same_code(codes, cells, batch["anchors"], batch["has_mvm"])
        visual = self.place(seen["tokens"], seen["keep_mask"], is_masked, k)
        x = self.encode(self.text(batch["ids"]), batch["keep_mask"], visual, cells)
        # OFFICIAL: logits = h W_e^T, the word embeddings, without a layer before or a bias after
        out = {"mlm": x[:, :T][batch["mlm_labels"] != NOTHING] @ self.text.word.weight.T.to(x.dtype),
               "itm": self.itm_head(x[:, 0])}  # fmt: skip
        if is_masked is not None:  # OFFICIAL: no parameters; the cosine with every code, just moved, without gradient
            is_target = is_masked & batch["mvm_counts"][:, None]
            hidden, d = x[:, T:][is_target].float(), self.dictionary.embed
            with torch.autocast(x.device.type, enabled=False):
                out |= {"mvm": F.normalize(hidden, dim=-1) @ F.normalize(d, dim=-1).T, "mvm_codes": codes[is_target]}
        return out

    def judge(self, batch: dict, seen: dict):
        """ids, keep_mask [R, T] -> logits from the first slot: of a match [R, 2], or of answers [R, answers]."""
        ids, keep, n = batch["ids"], batch["keep_mask"], len(seen["v"])
        if self.cfg.task == "nlvr2":  # the statement is read beside each of the two pictures
            ids, keep = ids.repeat_interleave(2, 0), keep.repeat_interleave(2, 0)
        k = len(ids) // n
        visual = self.place(seen["tokens"], seen["keep_mask"], None, k)
        cells = seen["keep_mask"].flatten(1).repeat_interleave(k, 0)
        first = self.encode(self.text(ids), keep, visual, cells, n=1)[:, 0]
        if self.cfg.task == "nlvr2":
            first = first.view(n // 2, -1)  # [B, 2 D]
        return self.itm_head(first) if hasattr(self, "itm_head") else self.answer_head(first)

    # What tools/exam.py and tools/ask.py call

    @torch.no_grad()
    def encode_images(self, batch: dict) -> tuple:
        """Pictures of a loader's batch -> visual tokens [B, N, D] and their keep mask [B, N], made once."""
        seen = self.see(*self.pictures(data.to_device(self, {name: batch[name] for name in ("pixels", "sizes")})))
        return self.place(seen["tokens"], seen["keep_mask"]), seen["keep_mask"].flatten(1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> tuple:
        """Texts as written -> embedded words [M, T, D] and their keep mask [M, T], made once."""
        batch = self.tokenized(texts)
        return self.text(batch["ids"]), batch["keep_mask"]

    @torch.no_grad()
    def match(self, images: tuple, texts: tuple):
        """B pictures and M texts, encoded -> [B, M], log odds of belonging together: every pair passes the encoder."""
        rows, M, odds = [], len(texts[0]), self.itm_head.weight[1] - self.itm_head.weight[0]
        for visual, keep in zip(*images, strict=True):
            x = self.encode(*texts, visual.expand(M, -1, -1), keep.expand(M, -1), n=1)[:, 0]
            rows.append((x.float() * odds).sum(1))  # no product of matrices, which would round it to bf16
        return torch.stack(rows)

    @torch.no_grad()
    def answer_scores(self, batch: dict):
        """Samples of a loader -> [B, answers]; of a pre-trained model [B, 2], the second for a match."""
        rows = {name: batch[name] for name in ("pixels", "sizes", "ids", "keep_mask")}
        rows = data.to_device(self, rows)
        return self.judge(rows, self.see(*self.pictures(rows)))

    @torch.no_grad()
    def codes_in(self, batch: dict) -> set:
        """The codes that the cells of a loader's batch choose."""
        seen = self.see(*self.pictures(data.to_device(self, {name: batch[name] for name in ("pixels", "sizes")})))
        return set(seen["codes"][seen["keep_mask"]].tolist())

    def score(self, picture, text: str) -> float:
        """The probability that a text belongs to a picture: 0 to 1."""
        self._need("itm_head", "--task pretrain or retrieval", "scores")
        return self.match(self.encode_images(self._look(picture)), self.encode_texts([text])).sigmoid().item()

    @classmethod
    def from_run(cls, source: str, device="cpu") -> SOHO:
        """The model of a run directory (its `best`) or of one of its step_N, ready to score or answer."""
        checkpoint, values = common.find_checkpoint(source, "soho")
        return build(common.config_from(Config, values), None, checkpoint).to(device).eval()


def normalise(pixels, sizes):
    """Pixels uint8 [B, 3, H, W] -> (x - mean) / std in float32, and 0 beyond each picture's height and width."""
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (MEAN, STD))
    is_row, is_column = (torch.arange(n, device=pixels.device) < sizes[:, d, None]
                         for d, n in enumerate(pixels.shape[2:]))  # fmt: skip
    return (pixels - mean) / std * (is_row[:, None, :, None] & is_column[:, None, None])


def valid_cells(sizes, shape, cells, square=False):
    """sizes [B, 2] of the pictures in a batch of `shape` H, W -> bool [B, h, w]: a cell counts where the pixel that
    nearest-neighbour resizing takes for it is part of the picture.

    OFFICIAL: the mask is made H x H and squeezed into h x w: high pictures lose their right part, and of wide ones no
    column is ever invalid. HERE[soho-7]: with `square` alone; otherwise H x W.
    """
    kept = []
    for d, side in enumerate((shape[0], shape[0] if square else shape[1])):
        inside = torch.arange(side, device=sizes.device) < sizes[:, d, None]  # [B, H] or [B, W]
        kept.append(F.interpolate(inside[:, None].float(), cells[d])[:, 0] > 0)
    return kept[0][:, :, None] & kept[1][:, None]


def sine_positions(keep_mask, width: int):
    """bool [B, h, w] -> [B, D, h, w], DETR's two-dimensional sines (arXiv 2005.12872), normalised to 2 pi: the first
    half of D tells the row, the second the column. Rows and columns count from 1, over valid cells alone."""
    half, halves = width // 2, []
    scale = 10000 ** (2 * torch.arange(half, device=keep_mask.device).div(2, rounding_mode="floor") / half)
    for axis in (1, 2):
        place = keep_mask.cumsum(axis, dtype=torch.float32)
        place = place / (place.narrow(axis, place.size(axis) - 1, 1) + 1e-6) * 2 * math.pi
        angle = place[..., None] / scale  # [B, h, w, D/2]
        halves.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(3))
    return torch.cat(halves, dim=3).movedim(3, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Corruption: from a loader's batch to what pre-training reads. All luck comes from one generator.


def mismatch(ids, keep_mask, numbers, k: int, is_replaced, luck: torch.Generator):
    """Texts of R = k * B pairs, where those that is_replaced [R] names make way for the first text of another picture;
    numbers [R] tell pictures apart. -> ids, keep_mask, itm_labels [R], 1 = they belong together.

    OFFICIAL: of a random record of the data set. HERE[soho-11]: of a random other picture of this process' batch.
    """
    may_be = (numbers[:, None] != numbers[None, ::k]).float()  # [R, B]
    is_replaced = is_replaced & (may_be.sum(1) > 0)
    other = torch.multinomial(may_be + (may_be.sum(1, keepdim=True) == 0), 1, generator=luck)[:, 0] * k
    taken = torch.where(is_replaced, other, torch.arange(len(ids)))
    return ids[taken], keep_mask[taken], (~is_replaced).long()


def corrupt(batch: dict, tok: language.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's captions with pictures -> what `SOHO.pretrain` reads and its labels, for R pairs of B pictures:

    pixels [B, 3, H, W], sizes [B, 2]; ids, keep_mask, mlm_labels [R, T]; itm_labels [R]; has_mvm bool [R], anchors
    int64 [R], the cell whose code is hidden there, and mvm_counts bool [R], whether it is to be told.
    """
    ids, keep = data.whole_captions(batch, tok.pad)
    B, R = len(batch["pixels"]), len(ids)  # pictures, pairs
    is_replaced = torch.rand(R, generator=luck) < cfg.mismatched
    ids, keep, itm_labels = mismatch(ids, keep, data.picture_numbers(batch, R // B), R // B, is_replaced, luck)
    may_mask = keep & (ids != tok.bos) & (ids != tok.eos)
    shown, mlm_labels = data.mask_words(ids, may_mask, tok.mask, cfg.vocab_size, cfg.word_mask, luck)
    if not cfg.mlm_on_negatives:  # hidden there, too: otherwise a [MASK] would tell that the pair matches
        mlm_labels = mlm_labels.masked_fill((itm_labels == 0)[:, None], NOTHING)
    # OFFICIAL: one random cell for the whole batch, then a coin for each text
    h, w = grid(batch["pixels"].shape[2:], cfg)
    anchors = torch.randint(h * w, (1,), generator=luck).expand(R)
    has_mvm = torch.rand(R, generator=luck) < cfg.mvm_prob
    counts = (itm_labels > 0) | cfg.mvm_on_negatives
    return {"pixels": batch["pixels"], "sizes": batch["sizes"], "ids": shown, "keep_mask": keep,
            "mlm_labels": mlm_labels, "itm_labels": itm_labels, "anchors": anchors, "has_mvm": has_mvm,
            "mvm_counts": counts}  # fmt: skip


def grid(shape, cfg: Config) -> tuple[int, int]:
    """Rows and columns of cells in a picture of `shape` H, W: each stride rounds up, the last pool down."""
    cells = list(shape)
    for stride in map(int, cfg.strides.split(",")):
        cells = [(side + stride - 1) // stride for side in cells]
    return cells[0] // 2, cells[1] // 2


def same_code(codes, keep_mask, anchors, has_mvm):
    """Which cells MVM hides, bool [R, N]: where has_mvm [R], all of the picture that have the code of the cell anchors
    [R]; none where that cell is no part of the picture. codes, keep_mask [R, N].

    PAPER: neighbours often have the same code, so a single hidden cell would be given away by the next one.
    """
    has_mvm = has_mvm & keep_mask.gather(1, anchors[:, None])[:, 0]
    return (codes == codes.gather(1, anchors[:, None])) & keep_mask & has_mvm[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Losses. OFFICIAL: sums over targets / (their number + 1e-6), so 0 where there are none; each has weight 1.


def loss_mlm(logits, labels):
    """Masked language modelling. logits [M, V] at the selected words, labels [M] -> mean cross-entropy, in nats."""
    return F.cross_entropy(logits.float(), labels, reduction="sum") / (len(labels) + 1e-6)


def loss_mvm(cosines, codes, temperature=1.0):
    """Masked visual modelling. cosines [M, K] of hidden cells and codes, codes int64 [M] -> mean cross-entropy.

    OFFICIAL: the cosines are the logits, so with K = 2048 it is never below 5.6 nor above 9.7: -1 to 1 is a narrow
    range. HERE[soho-5]: a temperature can widen it.
    """
    return F.cross_entropy(cosines.float() / temperature, codes, reduction="sum") / (len(codes) + 1e-6)


def loss_words(logits, words):
    """Words of a picture. logits, words [B, V], 1 = said of it -> binary cross-entropy, summed over words, mean over
    pictures."""
    return F.binary_cross_entropy_with_logits(logits.float(), words, reduction="sum") / len(logits)


def loss_itm(logits, labels):
    """Image-text matching. logits [R, 2], labels [R], 1 = they belong together -> mean cross-entropy."""
    return F.cross_entropy(logits.float(), labels)


# TWIN: soho.py, tden.py, vilta.py
def loss_answers(logits, targets):
    """VQA. logits, soft targets [B, answers] -> binary cross-entropy, summed over answers, mean over questions."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / len(logits)


# ---------------------------------------------------------------------------------------------------------------------
# Step: a batch of any task. From the loader to its losses


def rows_of(batch: dict, tok: language.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's batch -> the tensors of a training step, inputs and labels."""
    if cfg.task == "pretrain":
        return corrupt(batch, tok, cfg, luck)
    rows = {name: batch[name] for name in ("pixels", "sizes")}
    if cfg.task == "retrieval":  # HERE[soho-9]: each picture beside its text and beside texts of others
        ids, keep = data.whole_captions(batch, tok.pad)
        k = 1 + cfg.negatives
        ids, keep, numbers = (x.repeat_interleave(k, 0) for x in (ids, keep, data.picture_numbers(batch, 1)))
        is_replaced = torch.arange(len(ids)) % k > 0
        ids, keep, labels = mismatch(ids, keep, numbers, k, is_replaced, luck)
        return rows | {"ids": ids, "keep_mask": keep, "itm_labels": labels}
    label = "targets" if cfg.task == "vqa" else "labels"
    return rows | {name: batch[name] for name in ("ids", "keep_mask", label)}


def words_of(batch: dict, tok: language.Tokenizer, cfg: Config) -> dict:
    """A loader's captions with pictures -> what the first `word_steps` read: pixels, sizes, and words [B, V], 1 where a
    token is in one of the picture's captions.

    HERE[soho-12] (not in the paper): SOHO starts from a ResNet that knows ImageNet's classes. One that starts from
    nothing learns colours from MLM and ITM within minutes, but no shapes; words as labels are a quick substitute
    (Joulin et al. 2016, arXiv 1511.02251).
    """
    return {"pixels": batch["pixels"], "sizes": batch["sizes"], "words": data.words_said(batch, tok, cfg.vocab_size)}


def losses(cfg: Config, out: dict, rows: dict) -> dict:
    """{loss: scalar}; their sum, each with weight 1, is what is minimised."""
    if "words" in out:
        return {"words": loss_words(out["words"], rows["words"])}
    if cfg.task == "pretrain":
        found = {"mlm": loss_mlm(out["mlm"], rows["mlm_labels"][rows["mlm_labels"] != NOTHING])}
        if "mvm" in out:
            found["mvm"] = loss_mvm(out["mvm"], out["mvm_codes"], cfg.mvm_temperature)
        return found | {"itm": loss_itm(out["itm"], rows["itm_labels"])}
    if cfg.task == "retrieval":
        return {"itm": loss_itm(out["logits"], rows["itm_labels"])}
    if cfg.task == "vqa":
        return {"vqa": loss_answers(out["logits"], rows["targets"])}
    return {cfg.task: F.cross_entropy(out["logits"].float(), rows["labels"])}


# ---------------------------------------------------------------------------------------------------------------------
# Heads of the downstream tasks


def answer_head(width: int, inner: int, n: int) -> nn.Sequential:
    """First slot [R, width] -> logits [R, n]. OFFICIAL for VQA; HERE[soho-9]: for NLVR2, which reads the first slots of
    both pictures, and for SNLI-VE likewise."""
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(0.5), nn.Linear(inner, n))


# ---------------------------------------------------------------------------------------------------------------------
# Official weights. researchmm/soho's checkpoints, torchvision's ResNets, BERT. A part (a child of SOHO) is filled
# whole, or starts fresh where the file has nothing of it; every key is used, or belongs to a part that this task lacks.

BERT = {"qkv": tuple(f"attention.self.{x}" for x in ("query", "key", "value")), "out": "attention.output.dense",
        "att_norm": "attention.output.LayerNorm", "up": "intermediate.dense", "down": "output.dense",
        "ffn_norm": "output.LayerNorm"}  # fmt: skip
NAMES = (  # ours, theirs, what both are followed by; {} is the number of a layer. `cnn.` is `backbone.`, see below
    ("project", "neck.conv.", {"": "conv", "_norm": "bn"}),
    ("dictionary", "neck.vq", {"": ""}),
    ("mixer.", "neck.", {"line": "pos_line", "gate": "gate_fc.conv", "gate_norm": "gate_fc.bn"}),
    ("mask_vector", "neck.mask_emb", {"": ""}),
    ("visual_norm", "neck.ln", {"": ""}),
    ("text.", "language.bert.embeddings.", {"word": "word_embeddings", "position": "position_embeddings",
                                            "segment": "token_type_embeddings", "norm": "LayerNorm"}),
    ("encoder.{}.", "language.bert.encoder.layer.{}.", BERT),
    ("itm_head", "head.match_class", {"": ""}),
    ("answer_head.", "head.vqa.", {"0": "0", "3": "3"}),
)  # fmt: skip
OTHERS = ("neck.begin_line.", "mask_l_fc.", "head.match_class.", "head.vqa.", "neck.vq.", "neck.pos_line.",
          "neck.gate_fc.", "neck.mask_emb.")  # fmt: skip


def official_names(model: SOHO) -> dict:
    """Our name of each tensor -> the list of theirs, to be concatenated; num_batches_tracked, which nothing reads, has
    none."""
    modules = weights.module_names(NAMES, lambda ours: model.cfg.layers)
    modules |= {name: [name.replace("cnn.", "backbone.", 1)] for name, _ in model.named_modules() if name[:4] == "cnn."}
    names = weights.tensor_names(model, modules)
    return {ours: theirs for ours, theirs in names.items() if not ours.endswith("num_batches_tracked")}


def tidy(state: dict) -> dict:
    """Without `module.`, and without num_batches_tracked."""
    state = state.get("state_dict", state)
    return {key.removeprefix("module."): x for key, x in state.items() if not key.endswith("num_batches_tracked")}


def cnn_sizes(state: dict) -> dict:
    """Config fields of a ResNet from torchvision's names of its parameters."""
    if "conv1.weight" not in state:
        raise UserError(f"no ResNet of torchvision's; its first keys are {', '.join(map(str, list(state)[:3]))}")
    numbers = [re.match(r"layer(\d)\.(\d+)\.conv1\.weight", key) for key in state]
    found = tuple(1 + max((int(m[2]) for m in numbers if m and int(m[1]) == s), default=-1) for s in (1, 2, 3, 4))
    is_bottleneck = "layer1.0.conv3.weight" in state
    depth = next((d for d, blocks in BLOCKS.items() if blocks == found and (d >= 50) == is_bottleneck), None)
    if depth is None:
        raise UserError(f"a ResNet with stages of {found} blocks: known are {', '.join(map(str, BLOCKS))} layers")
    return {"depth": depth, "cnn_width": state["conv1.weight"].size(0)}


SHAPES = {  # config field: a tensor whose shape tells it, and the dimension
    "vocab_size": ("language.bert.embeddings.word_embeddings", 0), "codes": ("neck.vq.embed", 0),
    "positions": ("language.bert.embeddings.position_embeddings", 0), "width": ("neck.conv.conv", 0),
    "mlp": ("language.bert.encoder.layer.0.intermediate.dense", 0),
}  # fmt: skip


def official_sizes(state: dict) -> dict:
    """Config fields from the shapes in a state dict of the authors'; heads are 64 wide. What their code does on which
    the weights depend comes along: the mask of valid cells, and what a visual token is."""
    if "neck.conv.conv.weight" not in state:
        raise UserError(f"no checkpoint of the authors' SOHO: it begins with {', '.join(map(str, list(state)[:3]))}")
    state = state | {"neck.vq.embed.weight": state["neck.vq.embed"]} if "neck.vq.embed" in state else state
    sizes = {name: state[f"{key}.weight"].size(dim) for name, (key, dim) in SHAPES.items() if f"{key}.weight" in state}
    layers = {key.split(".")[4] for key in state if key.startswith("language.bert.encoder.layer.")}
    mode = "gate" if "neck.gate_fc.conv.weight" in state else "residual" if "neck.vq.embed" in state else "none"
    backbone = {key.removeprefix("backbone."): x for key, x in state.items() if key.startswith("backbone.")}
    return {**sizes, **cnn_sizes(backbone), "layers": len(layers), "heads": max(1, sizes["width"] // 64),
            "vd_mode": mode, "square_mask": True}  # fmt: skip


def load_official(model: SOHO, state: dict) -> str:
    """A state dict of the authors' pre-training or VQA model, into that of any task; see `weights.load_parts`."""
    state = {key: x for key, x in tidy(state).items() if model.cfg.task == "vqa" or not key.startswith("head.vqa.")}
    return weights.load_parts(model, state, official_names(model), OTHERS, "the authors' SOHO")


BERT_SIZES = dict(vocab_size="vocab_size", width="hidden_size", heads="num_attention_heads", mlp="intermediate_size",
                  positions="max_position_embeddings")  # fmt: skip


def load_backbones(model: SOHO, resnet: dict | None, bert: dict | None) -> str:
    """torchvision's ResNet and BERT, or one of them; BERT's first layers where there are more than ours. OFFICIAL: so
    pre-training starts."""
    state = {}
    if resnet is not None:
        state |= {f"backbone.{key}": x for key, x in tidy(resnet).items()}
    if bert is not None:
        for key, x in bert.items():
            key = key.removeprefix("bert.").replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
            state[f"language.bert.{key}"] = x
    layer = "language.bert.encoder.layer."
    there = {int(key.removeprefix(layer).split(".")[0]) for key in state if key.startswith(layer)}
    not_used = [f"{layer}{i}." for i in there if i >= model.cfg.layers]
    not_used += ["backbone.fc.", "language.bert.pooler.", "language.bert.cls.", "language.bert.embeddings.position_ids"]
    return weights.load_parts(model, state, official_names(model), tuple(not_used), "torchvision's ResNet and BERT")


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Optimizers:
    """PAPER: SGD with momentum for the ResNet, AdamW for the rest. Two optimizers under the names of one."""

    def __init__(self, cfg: Config, model: SOHO):
        named = [(name.startswith("cnn."), p) for name, p in model.named_parameters() if p.requires_grad]
        cnn, rest = ([p for is_cnn, p in named if is_cnn == which] for which in (True, False))
        assert len(cnn) + len(rest) == len({id(p) for _, p in named})
        # OFFICIAL: decay on biases and norms too, and eps beside the root that is not corrected, see `step`
        rest = dict(params=rest, lr=cfg.lr, peak=cfg.lr)
        cnn = dict(params=cnn, lr=cfg.cnn_lr, peak=cfg.cnn_lr)
        by_adam = [rest, cnn] if cfg.cnn_optimizer == "adamw" else [rest]
        self.adamw = torch.optim.AdamW(by_adam, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
        self.both, self.beta2 = [self.adamw], cfg.beta2
        if cfg.cnn_optimizer == "sgd":
            self.both.append(torch.optim.SGD([cnn], momentum=0.9, weight_decay=cfg.cnn_decay))

    def step(self, share: float, number: int) -> None:
        """Update `number`, from 1 on, with this share of the peak rates.

        OFFICIAL: p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + 1e-6). torch adds its eps after dividing
        the root by sqrt(1 - beta2^t), so with eps divided likewise its rule is the same.
        """
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
                if optimizer is self.adamw:
                    group["eps"] = 1e-6 / math.sqrt(1 - self.beta2**number)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {str(k): optimizer.state_dict() for k, optimizer in enumerate(self.both)}

    def load_state_dict(self, state: dict) -> None:
        for k, optimizer in enumerate(self.both):
            optimizer.load_state_dict(state[str(k)])


def build(cfg: Config, corpus, checkpoint: Path | None = None) -> SOHO:
    """The model with tokenizer and first weights: a run's, official ones, or random ones. Official weights bring their
    sizes along, so cfg is changed here to what was really built."""
    official, resnet, bert, sizes, told = None, None, None, {}, ""
    if not checkpoint and cfg.init != "none":
        official = tidy(common.read_tensors(Path(cfg.init)))
        sizes = official_sizes(official)
        if cfg.task != "pretrain":  # OFFICIAL: for VQA the dictionary is left out
            sizes["vd_mode"] = cfg.vd_mode if "neck.vq.embed" in official else "none"
    elif not checkpoint:
        if cfg.resnet != "none":
            is_file = Path(cfg.resnet).is_file()
            resnet = tidy(common.read_tensors(Path(cfg.resnet)) if is_file else weights.read_weights(cfg.resnet)[1])
            sizes |= cnn_sizes(resnet)
        if cfg.bert != "none":
            config, bert = weights.read_weights(cfg.bert)
            sizes |= {ours: config[theirs] for ours, theirs in BERT_SIZES.items() if theirs in config}
    for name, value in sizes.items():
        setattr(cfg, name, value)
    check(cfg)
    theirs = "bert-base-uncased" if official and cfg.bert == "none" else cfg.bert
    tokenizer = weights.choose_tokenizer(cfg, theirs, checkpoint, corpus, "wordpiece", "vocab_size" in sizes)
    if tokenizer.mask is None:
        raise UserError("this tokenizer has no mask token, which pre-training shows: take BERT's")
    has_answers = "head.vqa.3.bias" in (official or ()) and cfg.task == "vqa"
    answers = weights.known_answers(corpus, checkpoint, cfg.init, has_answers) if cfg.task == "vqa" else ()
    model = SOHO(cfg, tokenizer, answers)
    if checkpoint and common.read_json(checkpoint.parent / "config.json")["task"] == cfg.task:
        common.load_model_weights(model, checkpoint)
    elif checkpoint:  # pre-trained, or trained for another task
        state, same = common.read_tensors(checkpoint / "model.safetensors"), {name: name for name in model.state_dict()}
        state = {name: x for name, x in state.items() if not name.startswith("answer_head.")}  # of another task
        told = weights.load_parts(model, state, same, PARTS, str(checkpoint))
    elif official is not None:
        told = load_official(model, official)
    elif resnet is not None or bert is not None:
        told = load_backbones(model, resnet, bert)
    if corpus:
        corpus.answers, corpus.notes = answers, corpus.notes + [told] * bool(told)
    return model


def samples_of(cfg: Config, model: SOHO, corpus, items, train=False):
    """The samples of the run's task; Examples too where a pre-trained model is asked which texts match."""
    drawn = train and cfg.train_sides
    sides = tuple(map(int, cfg.train_sides.split(","))) if drawn else (cfg.short_side, cfg.long_side)
    more = dict(tokenizer=model.tokenizer, size=cfg.short_side, max_len=cfg.max_len, train=train, seed=cfg.seed,
                sides=sides)  # fmt: skip
    if isinstance(items[0], data.Example):
        return data.Examples(items, answers=model.answers, **more)
    return data.Pictures(items, captions=cfg.captions_per_image, **more)


def examination(cfg: Config, model: SOHO, corpus, machine) -> exam.Exam:
    task = "itm" if cfg.task == "pretrain" else cfg.task
    return exam.Exam(task, model, corpus, machine, partial(samples_of, cfg, model, corpus), cfg.gallery,
                     cfg.galleries)


def train(cfg: Config, model: SOHO, corpus, machine, run, checkpoint: Path | None = None) -> None:
    """The loop. `checkpoint`: go on from its step with its optimizer. Luck follows from seed, step and process."""
    model.to(machine.device)
    optimizer = Optimizers(cfg, model)
    start, best, is_due = run.go_on(checkpoint, optimizer)
    samples = samples_of(cfg, model, corpus, corpus.splits["train"], train=True)
    pictures = cfg.batch // cfg.captions_per_image
    is_wide = data.are_wide(samples.items) if cfg.short_side != cfg.long_side else None  # OFFICIAL: batches of one kind
    is_wide = common.share_from_main(is_wide)  # a file that one process cannot read must not change its order
    loader = data.train_loader(samples, pictures, machine.workers, machine.rank, machine.processes, cfg.seed, start,
                               cfg.steps, pin=machine.device.type == "cuda", is_second=is_wide)  # fmt: skip
    log = common.Logger(run, machine, cfg.steps, cfg.log_every, start)
    asked = examination(cfg, model, corpus, machine)
    # 6 x parameters of the encoder x 30 tokens: a lower bound, the ResNet not being counted
    log.flops_per_item = 6 * 30 * sum(p.numel() for p in model.encoder.parameters())
    ddp = common.spread(model, cfg, machine, (ResidualBlock, EncoderBlock), find_unused=True)
    if is_due:  # saved, but stopped before its evaluation was over
        best = asked.validate(cfg, run, log, start, best)
    with common.StopRequest() as stop, contextlib.closing(iter(loader)) as batches:
        for step in range(start, cfg.steps):
            is_word_step = step < cfg.word_steps
            # PAPER: frozen while the dictionary is still random
            frozen_to = cfg.word_steps + cfg.freeze_cnn * (cfg.steps - cfg.word_steps)
            model.cnn.is_frozen = not is_word_step and step < frozen_to
            model.train()
            seed = (cfg.seed * machine.processes + machine.rank) * 1_000_003 + step
            torch.manual_seed(seed + 2**31)  # of dropout: other numbers than luck's; torch keeps 32 bits of a seed
            with log.waiting():
                batch = next(batches)
            luck = torch.Generator().manual_seed(seed)
            tok = model.tokenizer
            rows = words_of(batch, tok, cfg) if is_word_step else rows_of(batch, tok, cfg, luck)
            rows = data.to_device(model, rows)
            told = [len(batch["bad"]), stop.signum > 0]
            bad_in_all, stops = common.sum_over_processes(told, machine.device)
            if bad_in_all:
                loader.judge(common.gather_lists(batch["bad"]))
            pieces, logged = data.equal_pieces(rows, cfg.micro_batch), {}
            for i, piece in enumerate(pieces):
                # OFFICIAL: losses are means over a piece, and the step is their mean over pieces and processes
                with common.synchronised(ddp, i + 1 == len(pieces)):
                    with machine.autocast():
                        out = ddp(piece)
                    found = {name: loss / len(pieces) for name, loss in losses(cfg, out, piece).items()}
                    sum(found.values()).backward()
                for name, part in found.items():
                    logged[name] = logged.get(name, 0.0) + part.detach() / machine.processes
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            common.stop_if_not_finite(norm, float(sum(logged.values())), batch["image_id"], step + 1, run)
            share = common.schedule(cfg, step)
            optimizer.step(share, step + 1)
            if cfg.vd_mode != "none" and not is_word_step:
                logged |= {name: x / machine.processes for name, x in model.dictionary.state().items()}
            log.step(step + 1, logged, cfg.lr * share, norm, cfg.batch)
            is_due = (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps
            with log.pause():
                if is_due or stops:
                    common.share_buffers(model)
                    meta = {"val": {}, "best": best, "is_due": is_due}
                    if machine.is_main:
                        run.save(step + 1, model, model.tokenizer, optimizer, meta)
                if is_due:
                    best = asked.validate(cfg, run, log, step + 1, best)
            if stops:
                raise common.stopped(run, machine, stop.signum or signal.SIGTERM)
        if any(common.sum_over_processes([stop.signum > 0], machine.device)):  # heard in the last step
            raise common.stopped(run, machine, stop.signum or signal.SIGTERM)
    log.close()
    data.tell_of_bad([loader])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def final_evaluation(cfg: Config, model: SOHO, checkpoint: Path, corpus, machine, folder, started: float) -> dict:
    """Every test split with its controls: metrics.json, pictures, result files in `folder`; columns of a table."""
    n_texts = 1 if cfg.data == "scenes" or cfg.gallery else 5
    asked = examination(cfg, model, corpus, machine)
    splits, columns = asked.final(folder, 1, cfg.official, n_texts)
    for split in corpus.finally_evaluated() if cfg.task == "pretrain" and cfg.vd_mode != "none" else ():
        used = asked.collect(model.codes_in, corpus.splits[split])
        if machine.is_main:
            splits[split]["metrics"]["codes_used"] = columns[split]["codes_used"] = len(used) / cfg.codes
    finish.record("soho", cfg, asked, checkpoint, folder, started, splits, texts_per_picture=n_texts)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Main

# what --init takes over from the run's config
SIZES = ("codes square_mask depth cnn_width strides width heads mlp layers positions vocab_size short_side long_side "
         "resnet bert").split()  # fmt: skip


def check(cfg: Config) -> None:
    """Settings that contradict one another or are not among the choices."""
    common.check_numbers(cfg, "batch captions_per_image max_len width heads layers positions codes short_side "
                         "long_side cnn_width negatives galleries")  # fmt: skip
    for name, choices in (("task", TASKS), ("vd-mode", ("gate", "replace", "residual", "none")),
                          ("vd-update", ("official", "paper")), ("cnn-optimizer", ("sgd", "adamw")),
                          ("depth", tuple(BLOCKS)), ("train-on", corpora.TRAIN_ON)):  # fmt: skip
        common.choose(name, getattr(cfg, name.replace("-", "_")), choices)
    for name, form, n in (("strides", r"[1-9](,[1-9])*", (6,)), ("train_sides", r"([1-9]\d*(,[1-9]\d*)*)?", (1, 3))):
        value = getattr(cfg, name)
        if not re.fullmatch(form, value) or len(value.split(",")) not in n or name == "train_sides" and value and not (
                (lambda a, b, c: a <= b <= c)(*map(int, (value + ",0,0").split(",")[:3]))):
            example = "six numbers, like 2,2,1,2,2,2" if name == "strides" else "three, like 400,800,1333"
            raise UserError(f"--{name.replace('_', '-')} {value}: give {example}")
    if cfg.width % cfg.heads or cfg.width % 4:
        raise UserError(f"--width {cfg.width} --heads {cfg.heads}: the first must be a multiple of the second and of 4")
    if cfg.frozen_stages > 4 or cfg.long_side < cfg.short_side:
        raise UserError(f"--frozen-stages {cfg.frozen_stages} --short-side {cfg.short_side} --long-side "
                        f"{cfg.long_side}: there are four stages, and the longer side is not the shorter one")
    least = min(map(int, (cfg.train_sides or str(cfg.short_side)).split(",")))
    if min(grid((32 * math.ceil(least / 32),) * 2, cfg)) < 1:
        raise UserError(f"--short-side {cfg.short_side} --strides {cfg.strides}: no cell is left of such a picture")
    corpora.check_task(cfg.task, cfg.data), common.check_drops(cfg)
    shares = "warmup warmup_from word_mask mvm_prob mismatched freeze_cnn vd_decay".split()
    common.check_most(cfg, {**dict.fromkeys(shares, 1), "dropout": 0.99, "beta2": 0.99999,
                            "max_len": cfg.positions - 2})  # fmt: skip


def load_data(cfg: Config):
    return mixture.of_run(cfg, cfg.task if cfg.task in QUESTION_TASKS else "caption")


def evaluate_run(cfg: Config, checkpoint: Path, machine, folder: Path) -> dict:
    started, corpus = time.perf_counter(), load_data(cfg)
    model = build(cfg, corpus, checkpoint).to(machine.device)
    return final_evaluation(cfg, model, checkpoint, corpus, machine, folder, started)


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    given, command = common.parse_flags(Config, sys.argv[1:] if argv is None else argv, "soho.py", ask.COMMANDS)
    if command.caption or command.score or command.ask:
        return ask.answer_commands(command, given, SOHO, "soho", [], check)
    if command.eval_only is not None:
        return compare.evaluate_runs(command.eval_only, given, "soho", Config, DECODING, check, evaluate_run)
    cfg, checkpoint = common.configure(Config, given, "soho", PRESETS, RECIPES, SIZES, takes_files=True)
    if cfg.task != "pretrain":
        cfg.captions_per_image, cfg.word_steps = 1, 0
    check(cfg)
    machine = common.start_machine(cfg)
    corpus = load_data(cfg)
    pictures = finish.pictures_of(cfg, corpus, machine, 2 if cfg.task in ("pretrain", "retrieval") else 1)
    model = build(cfg, corpus, checkpoint)
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(corpus.splits["train"]) / pictures)
    cfg.eval_every = cfg.eval_every or math.ceil(cfg.steps / 5)
    finish.carry_out("soho", f"SOHO ({cfg.task})", cfg, checkpoint, model, corpus, machine, started, train,
                     final_evaluation, "itm" if cfg.task == "pretrain" else cfg.task)  # fmt: skip


if __name__ == "__main__":
    common.run_main(main)
