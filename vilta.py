"""ViLTA: enhancing vision-language pre-training through textual augmentation (Wang, Yang, Xu, Li, Sun, ICCV 2023,
arXiv 2308.16689).

Two objectives teach most models of pictures and texts, and both are cruder than they need be. Masked language modelling
(MLM) counts every word but the caption's own as wrong, synonyms too. Image-text matching (ITM) shows mismatched pairs
drawn at random, which a glance tells apart. So the paper changes both. Cross-distillation: beside the one word of the
caption, MLM's target is what a frozen language encoder holds possible at the blank. Written hard negatives: the
language encoder that is being trained rewrites a word or two of the caption, and the picture with that is a mismatch.

    picture ──> CLIP's ViT ──> + type 1 ──> y ──┐  co-attention: each stream reads itself, then the other
                                                ├─> x ──> MLM head: the hidden words ─────────┐ mixed with what the
    caption, words hidden ──> RoBERTa + type 0 ─┘                                             │ frozen RoBERTa expects
    caption | rewritten | of another picture ──> RoBERTa, fusion ──> x_1, y_1 ──> ITM head: do they belong together?
                  └── by the current RoBERTa and a word head of its own, without gradient

No code of the authors is public, and the paper's method section was not at hand. So the network is METER's, which has
these three encoders and two objectives, and what we do not know is a flag, a HERE, and a reason in docs/vilta.md.

    python vilta.py                                   the small world: matching pairs told apart, 3 minutes, 2 cores
    python vilta.py --arm baseline                    or cd, hn, cd+hn: the same data in the same order
    python vilta.py --task vqa --init runs/vilta-scenes    or retrieval, nlvr2; ve with --world full
    python vilta.py --score test:3 "a red circle" --init RUN     --ask PICTURE QUESTION of a run of vqa
    python tools/negatives.py RUN                     what it writes, and what it makes of it
    torchrun --nproc_per_node=8 vilta.py --data coco  CLIP's and RoBERTa's weights, 6 + 6 layers

Reading map: config, presets, recipes | blocks | model | corruption: from a loader's batch to what pre-training reads |
corruption: written negatives | losses | step: a batch of any task | official weights | training | evaluation | main.
Marks: `# PAPER` what the paper says, `# OFFICIAL` what METER's code does (zdou0830/METER, arXiv 2111.02387),
`# HERE[id]` what we do and why, a row of docs/divergences.md.
"""

from __future__ import annotations

import contextlib
import copy
import math
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
from tools import ask, compare, exam, finish, negatives

# ---------------------------------------------------------------------------------------------------------------------
# Config, presets, recipes. Every field is a flag; its comment is the flag's help.


@dataclass
class Config(common.RunConfig):
    # --- method. HERE[vilta-1] (not in the paper): METER's network, no contrastive loss, no moving teacher
    arm: str = "cd+hn"  # cross-distillation and written hard negatives: baseline | cd | hn | cd+hn
    # --- method: cross-distillation
    alpha: float = 0.4  # HERE[vilta-2] (not in the paper): share of the soft labels in MLM's loss
    teacher_temperature: float = 1.0  # HERE[vilta-3] (not in the paper): tau, the teacher's logits are divided by it
    teacher_topk: int = 0  # HERE[vilta-3] (not in the paper): words that keep a soft label; 0: all
    teacher_input: str = "all_mask"  # HERE[vilta-4] (not in the paper): all_mask | same_as_student | unmasked
    # --- method: written hard negatives
    syn_ratio: float = 0.5  # HERE[vilta-5] (not in the paper): rho, share of the mismatched pairs that are written
    gen_head: str = "probe"  # HERE[vilta-6] (not in the paper): training of the writer's head, probe | static | joint
    gen_encoder: str = "current"  # current (PAPER: the language encoder being trained) | frozen (the teacher)
    rewrite: float = 0.15  # HERE[vilta-7] (not in the paper): share of the tokens to rewrite, at least one
    gen_ban: int = 5  # HERE[vilta-8] (not in the paper): words banned, those that fit the whole caption best
    gen_topk: int = 50  # HERE[vilta-8] (not in the paper): words to draw from, the most probable that are left
    # --- method: what METER has, too
    word_mask: float = 0.15  # share of words to predict (MLM); HERE[vilta-9]: at least one in each caption
    mismatched: float = 0.5  # share of the pairs that do not belong together (ITM)
    caption_noise: float = 0.0  # share of the captions that are exchanged within the batch, to see what noise does
    negatives: int = 15  # of retrieval, captions of others beside each picture's own
    # --- picture
    image_size: int = 288  # pixels of the square that is read
    frame: str = "centre"  # how a picture becomes a square: centre (OFFICIAL: its middle) | pad (all of it, the rest 0)
    augment: str = "none"  # none | crop | crop+flip | rand (RandAugment)
    # --- network
    clip: str = "none"  # weights of the vision encoder: a hub id, a directory, or none
    roberta: str = "none"  # weights of the language encoder and of the teacher: a hub id, a directory, or none
    tokenizer: str = "none"  # hub id or directory; none: of --roberta or official weights, else trained on the texts
    vocab_size: int = 50265  # upper bound where the tokenizer is trained here
    patch: int = 16  # pixels per visual token
    stem: str = "patch"  # patch (CLIP) | conv (HERE[vilta-12] (not in the paper): convolutions, few pictures do)
    vision_width: int = 768  # of the vision encoder
    vision_layers: int = 11  # OFFICIAL: CLIP's last block is left out
    vision_heads: int = 12  # its attention heads
    vision_mlp: int = 0  # width inside its feed-forward parts; 0: 4 x vision_width
    text_width: int = 768  # of the language encoder
    text_layers: int = 12  # its depth
    text_heads: int = 12  # its attention heads
    text_mlp: int = 0  # width inside its feed-forward parts; 0: 4 x text_width
    positions: int = 514  # rows of its position table; RoBERTa leaves two of them unused
    width: int = 768  # of the fusion
    layers: int = 6  # of the fusion, in each of the two streams
    heads: int = 12  # of the fusion
    mlp: int = 0  # width inside its feed-forward parts; 0: 4 x width
    dropout: float = 0.1  # attention weights, sub-layer outputs, text embeddings; none in the vision encoder
    init_std: float = 0.02  # standard deviation of new weights
    # --- recipe of pre-training. OFFICIAL: meter/config.py
    batch: int = 4096  # pairs per step over all processes; of questions, statements and hypotheses samples
    captions_per_image: int = 1  # captions per picture and step; the picture is encoded once for all of them
    epochs: float = 10.0  # passes over the pictures, where --steps is 0
    steps: int = 100_000  # training updates; 0: from --epochs
    start_steps: int = 0  # HERE[vilta-10]: first of them, in which the two encoders learn apart what others bring along
    lr: float = 1e-5  # peak learning rate of the two encoders
    fusion_mult: float = 5.0  # times lr: the fusion
    head_mult: float = 5.0  # times lr: the heads
    weight_decay: float = 0.01  # HERE[vilta-11]: on matrices and embeddings, not on norms and biases
    beta2: float = 0.98  # AdamW's second moment; the first is 0.9
    warmup: float = 0.1  # share of the steps in which the rates rise linearly; then they fall linearly to 0
    grad_clip: float = 1.0  # HERE[vilta-11]: largest gradient norm; OFFICIAL: none. 0: no clipping
    max_len: int = 48  # tokens of a text, <s> and </s> apart
    train_on: str = "train"  # of vqa: train | train+val (but for 3,000 questions) | train+val+vg (Visual Genome)
    gallery: int = 0  # pictures that retrieval ranks, the first of each split; 0: all
    galleries: int = 1  # how many such galleries of the test split are ranked, one after another


PRESETS = {
    # HERE[vilta-12] (not in the paper): tiny learns the small world from nothing in three minutes on 2 cores
    "tiny": dict(
        image_size=64, patch=16, stem="conv", vision_width=128, vision_layers=0, vision_heads=4, vision_mlp=256,
        text_width=128, text_layers=1, text_heads=4, text_mlp=256, positions=64, width=128, layers=2, heads=4, mlp=256,
        dropout=0.0, init_std=0.08, vocab_size=1000, word_mask=0.4, gen_ban=1, gen_topk=20, batch=160,
        captions_per_image=5, steps=560, start_steps=280, eval_every=280, lr=2e-3, fusion_mult=1.0, head_mult=1.0,
        max_len=30, gallery=100),
    # HERE[vilta-12] (not in the paper): small learns from a few thousand photographs, from nothing
    "small": dict(
        image_size=160, patch=16, stem="conv", vision_width=192, vision_layers=0, vision_heads=6, text_width=192,
        text_layers=3, text_heads=6, positions=64, width=192, layers=3, heads=6, init_std=0.06, vocab_size=3000,
        batch=128, captions_per_image=2, steps=0, epochs=20.0, start_steps=300, lr=5e-4, fusion_mult=1.0, head_mult=1.0,
        max_len=40, gallery=200),
    "base": dict(clip="openai/clip-vit-base-patch16", roberta="roberta-base"),
}  # fmt: skip

# OFFICIAL: meter/config.py and README; RandAugment before the resize
FINE = dict(steps=0, captions_per_image=1, augment="rand", epochs=10.0)
RECIPES = {
    ("vqa", "base"): {**FINE, "image_size": 576, "batch": 512, "lr": 5e-6, "head_mult": 50.0, "train_on": "train+val"},
    ("nlvr2", "base"): {**FINE, "batch": 256, "head_mult": 10.0},
    ("ve", "base"): {**FINE, "image_size": 384, "batch": 64, "epochs": 5.0, "lr": 2e-6, "head_mult": 10.0},
    ("retrieval", "base"): {**FINE, "image_size": 384, "batch": 512, "lr": 5e-6, "max_len": 38},
}  # fmt: skip
for _task in ("vqa", "retrieval", "nlvr2", "ve"):  # HERE[vilta-12] (not in the paper): a minute each after pre-training
    RECIPES[_task, "tiny"] = dict(steps=300, eval_every=0, lr=5e-4, batch=64, captions_per_image=1, negatives=3)
    RECIPES[_task, "small"] = dict(lr=2e-4, captions_per_image=1, negatives=3)

TASKS, QUESTION_TASKS = ("pretrain", "retrieval", "vqa", "nlvr2", "ve"), ("vqa", "nlvr2", "ve")
PARTS = ("teacher.", "lm_head.", "word_head.", "mlm_head.", "itm_head.", "rank_head.", "answer_head.")  # of some tasks
DECODING, NOTHING = ["gallery", "galleries"], -100  # flags of an evaluation; the label of what is not to be predicted
TEXT_EPS, FUSION_EPS, HEAD_EPS = 1e-5, 1e-12, 1e-5  # OFFICIAL: LayerNorm's epsilon; RoBERTa's is not the fusion's
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's own training pictures, 0..1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# ---------------------------------------------------------------------------------------------------------------------
# Blocks. One alphabet: B pictures, R text rows (k for each picture), N visual tokens, T text tokens, D width, H heads,
# V vocabulary. Keep masks are boolean, True = attend.


# TWIN: vcgpt.py, vilta.py
def quick_gelu(x):
    return x * (1.702 * x).sigmoid_()  # in place: no third tensor of this size


class Attention(nn.Module):
    """From x [R, L, D] to y [R, M, D] -> [R, L, D]. keep_mask bool [R, M], of y; None: all are real."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, y, keep_mask=None):
        (R, L, D), M = x.size(), y.size(1)  # rows, tokens, width; tokens that are attended to
        q = self.q(x).view(R, L, self.heads, D // self.heads).transpose(1, 2)  # [R, H, L, D/H]
        k, v = self.kv(y).view(R, M, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        keep = None if keep_mask is None else keep_mask[:, None, None]  # [R, 1, 1, M]
        x = F.scaled_dot_product_attention(q, k, v, keep, self.p if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    """CLIP's, norms before: x += attention(norm1 x); x += down(quick_gelu(up(norm2 x))). No dropout."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, mlp or 4 * width), nn.Linear(mlp or 4 * width, width)

    def forward(self, x):
        z = self.norm1(x)
        x = x + self.attention(z, z)
        return x + self.down(quick_gelu(self.up(self.norm2(x))))


class TextBlock(nn.Module):
    """BERT's, norms after: x = LN(x + attention(x)); x = LN(x + W_2 gelu(W_1 x)).

    With `cross` a layer of the fusion: between the two, x = LN(x + attention(x, the other stream)).
    """

    def __init__(self, width: int, heads: int, mlp: int, dropout: float, eps: float, cross=False):
        super().__init__()
        self.attention, self.att_norm = Attention(width, heads, dropout), nn.LayerNorm(width, eps=eps)
        if cross:
            self.cross, self.cross_norm = Attention(width, heads, dropout), nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, mlp or 4 * width), nn.Linear(mlp or 4 * width, width)
        self.ffn_norm, self.dropout = nn.LayerNorm(width, eps=eps), nn.Dropout(dropout)

    def forward(self, x, keep_mask=None, y=None, y_keep_mask=None, n=None):
        """New states of x [R, L, D], or of its first `n` tokens; y [R, M, D]: the other stream."""
        x = self.att_norm(x[:, :n] + self.dropout(self.attention(x[:, :n], x, keep_mask)))
        if y is not None:
            x = self.cross_norm(x + self.dropout(self.cross(x, y, y_keep_mask)))
        return self.ffn_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class ConvStem(nn.Sequential):
    """Pixels to a grid of visual tokens. HERE[vilta-12] (not in the paper): for each factor 2 of `patch` a convolution
    with batch norm that halves the picture, the first by its stride, the others by a pool; few pictures do."""

    def __init__(self, patch: int, width: int):
        widths, layers = [3] + [min(width, 16 << i) for i in range(int(math.log2(patch)))], []
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.Conv2d(a, b, 3, 1 if i else 2, 1, bias=False), nn.BatchNorm2d(b), nn.GELU()]
            layers += [nn.MaxPool2d(2)] * (i > 0)
        super().__init__(*layers, nn.Conv2d(widths[-1], width, 1))


class Vision(nn.Module):
    """CLIP's ViT without its last block: pixels uint8 [B, 3, S, S] -> [B, N, vision_width], the class token first.

    OFFICIAL: the final norm is applied to all tokens, and CLIP's projection is not used.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        D, self.grid = cfg.vision_width, cfg.image_size // cfg.patch
        places, is_conv = torch.randn(1 + self.grid**2, D) * cfg.init_std, cfg.stem == "conv"
        if is_conv:
            places[1:] = weights.sine_table(self.grid, D)
        self.positional_embedding = nn.Parameter(places)
        self.class_embedding = nn.Parameter(torch.randn(D) * cfg.init_std)
        self.patches = ConvStem(cfg.patch, D) if is_conv else nn.Conv2d(3, D, cfg.patch, cfg.patch, bias=False)
        self.pre_norm, self.post_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList(VisionBlock(D, cfg.vision_heads, cfg.vision_mlp) for _ in range(cfg.vision_layers))

    def forward(self, pixels):
        x = self.patches(normalise(pixels)).flatten(2).transpose(1, 2)  # [B, grid^2, D]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.pre_norm(x + self.positional_embedding)
        for block in self.blocks:
            x = block(x)
        return self.post_norm(x)


def normalise(pixels):
    """uint8 [B, 3, S, S] -> (x - mean) / std of CLIP's pictures, float32."""
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) * 255 for x in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


class Language(nn.Module):
    """RoBERTa: ids [R, T], right-padded, keep_mask bool [R, T] -> states of all tokens [R, T, text_width]."""

    def __init__(self, cfg: Config):
        super().__init__()
        D = cfg.text_width
        self.word, self.position = nn.Embedding(cfg.vocab_size, D), nn.Embedding(cfg.positions, D)
        self.segment = nn.Embedding(1, D)
        self.norm, self.dropout = nn.LayerNorm(D, eps=TEXT_EPS), nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(TextBlock(D, cfg.text_heads, cfg.text_mlp, cfg.dropout, TEXT_EPS)
                                    for _ in range(cfg.text_layers))  # fmt: skip

    def forward(self, ids, keep_mask):
        if ids.size(1) + 2 > len(self.position.weight):
            raise UserError(f"a text of {ids.size(1)} tokens: there are {len(self.position.weight) - 2} positions "
                            "(--positions, less two)")  # fmt: skip
        x = self.word(ids) + self.position(text_positions(keep_mask)) + self.segment.weight[0]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, keep_mask)
        return x


def text_positions(keep_mask):
    """bool [R, T] -> int64 [R, T]. OFFICIAL: real tokens are numbered from 2 on, padding has position 1."""
    return keep_mask.cumsum(1) * keep_mask + 1


class WordHead(nn.Module):
    """States [..., D] -> logits of words [..., V]: linear, gelu, norm, then word vectors and a bias. RoBERTa's vectors
    are the word embeddings, which come with each call; METER's are its own."""

    def __init__(self, width: int, vocab_size: int, eps: float, own_words: bool):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        if own_words:
            self.words = nn.Linear(width, vocab_size, bias=False)

    def forward(self, x, words=None):
        x = self.norm(F.gelu(self.dense(x)))
        return F.linear(x, self.words.weight if words is None else words, self.bias)


def answer_head(width: int, inner: int, n: int) -> nn.Sequential:
    """OFFICIAL: cls [R, width] -> logits [R, n], of VQA, SNLI-VE and NLVR2, which joins the cls of both pictures."""
    return nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner, eps=HEAD_EPS), nn.GELU(), nn.Linear(inner, n))


class Teacher(nn.Module):
    """PAPER: a frozen language encoder. A copy of RoBERTa with its word head; nothing moves it, and it never drops."""

    def __init__(self, text: Language, head: WordHead):
        super().__init__()
        self.text, self.head = copy.deepcopy(text), copy.deepcopy(head)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, ids, keep_mask, where):
        """Logits [P, V] at the P places that are true in bool `where` [R, T]."""
        return self.head(self.text(ids, keep_mask)[where], self.text.word.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Model. `ViLTA` holds the parts that its task needs; a batch is a dictionary of tensors, see `corrupt` and `rows_of`.


class ViLTA(nn.Module, ask.Verbs):
    """Vision and language encoder, fusion, and the heads of `cfg.task`.

    tokenizer: RoBERTa's kind. answers: the classes of vqa. For users: `from_run`, score(picture, text) and
    answer(picture, question).
    """

    def __init__(self, cfg: Config, tokenizer: language.Tokenizer | None = None, answers: tuple[str, ...] = ()):
        super().__init__()
        self.cfg, self.tokenizer, self.answers = cfg, tokenizer, answers
        D, n_types = cfg.width, 3 if cfg.task == "nlvr2" else 2
        self.vision, self.text = Vision(cfg), Language(cfg)
        self.image_transform, self.text_transform = nn.Linear(cfg.vision_width, D), nn.Linear(cfg.text_width, D)
        self.types = nn.Embedding(n_types, D)  # OFFICIAL: 0 text, 1 image, 2 the second image of NLVR2
        stream = partial(TextBlock, D, cfg.heads, cfg.mlp, cfg.dropout, FUSION_EPS, cross=True)
        self.text_layers = nn.ModuleList(stream() for _ in range(cfg.layers))
        self.image_layers = nn.ModuleList(stream() for _ in range(cfg.layers))
        self.text_pooler, self.image_pooler = nn.Linear(D, D), nn.Linear(D, D)
        if cfg.task in ("pretrain", "retrieval"):
            self.itm_head = nn.Linear(2 * D, 2)  # 1 = they belong together
        if cfg.task == "pretrain":
            self.mlm_head = WordHead(D, cfg.vocab_size, FUSION_EPS, own_words=True)
        if cfg.task == "retrieval":
            self.rank_head = nn.Linear(2 * D, 1)
            self.itm_head.requires_grad_(False)
        if cfg.task in QUESTION_TASKS:
            n = len(answers) if cfg.task == "vqa" else {"nlvr2": 2, "ve": 3}[cfg.task]
            self.answer_head = answer_head(2 * D * (2 if cfg.task == "nlvr2" else 1), 2 * D, n or 1)
        if cfg.task == "pretrain" and cfg.start_steps:
            self.word_head = nn.Linear(cfg.vision_width, cfg.vocab_size)
        self.init_weights(self)
        if cfg.task == "pretrain" and (cfg.start_steps or writes(cfg) or learns_softly(cfg)):
            self.lm_head = WordHead(cfg.text_width, cfg.vocab_size, TEXT_EPS, own_words=False)  # RoBERTa's
            self.init_weights(self.lm_head)  # last, so that the others start alike in all arms
        if cfg.task == "pretrain" and (learns_softly(cfg) or writes(cfg) and cfg.gen_encoder == "frozen"):
            self.teacher = Teacher(self.text, self.lm_head)
        if tokenizer is not None and cfg.task == "pretrain":
            for name, table in language.word_tables(tokenizer, cfg.vocab_size).items():
                self.register_buffer(f"words_{name}", table, persistent=False)

    @torch.no_grad()
    def init_weights(self, part):
        """OFFICIAL: N(0, init_std) for linear layers and embeddings, biases 0, norms 1 and 0."""
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # PyTorch's default would shrink the picture to a whisper
            if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    # The three encoders

    def see(self, pixels, kind=1):
        """Pixels uint8 [B, 3, S, S] -> the image stream as the fusion takes it [B, N, D]; kind: row of the types."""
        return self.image_transform(self.vision(pixels)) + self.types.weight[kind]

    def read(self, states):
        """States of the language encoder [R, T, text_width] -> the text stream as the fusion takes it [R, T, D]."""
        return self.text_transform(states) + self.types.weight[0]

    def fuse(self, x, keep_mask, y, need="all"):
        """Text x [R, T, D] and image y [R, N, D] -> both, fused. need: what of the last layer is computed: all states,
        the "text" alone (MLM), or the "first" state of each stream (ITM and answers)."""
        for i, (text, image) in enumerate(zip(self.text_layers, self.image_layers, strict=True), 1):
            n = 1 if need == "first" and i == len(self.text_layers) else None
            skips = need == "text" and i == len(self.text_layers)
            # OFFICIAL: x' = T_i(x, y), y' = V_i(y, x): both read what came into the layer. There is no image mask.
            x, y = text(x, keep_mask, y, None, n), None if skips else image(y, None, x, keep_mask, n)
        return x, y

    def pool(self, x, y):
        """The first state of each stream -> cls [R, 2 D]."""
        return torch.cat([self.text_pooler(x[:, 0]).tanh(), self.image_pooler(y[:, 0]).tanh()], dim=1)

    def join(self, ids, keep_mask, y):
        """Texts [R, T] and images [R, N, D] -> cls [R, 2 D]."""
        return self.pool(*self.fuse(self.read(self.text(ids, keep_mask)), keep_mask, y, "first"))

    # What a training step asks

    def forward(self, batch: dict) -> dict:
        """What the losses of the task need; called so, because DistributedDataParallel sees nothing else."""
        if "words" in batch:
            return self.start(batch)
        if self.cfg.task == "pretrain":
            return self.pretrain(batch)
        if self.cfg.task == "retrieval":
            return self.retrieve(batch)
        return {"logits": self.judge(batch)}

    def start(self, batch: dict) -> dict:
        """Each encoder by itself -> logits of the words said of a picture [B, V], and of P hidden words [P, V]."""
        where = batch["mlm_labels"] != NOTHING
        states = self.text(batch["ids"], batch["keep_mask"])[where]
        return {"words": self.word_head(self.vision(batch["pixels"])).amax(1),
                "lm": self.lm_head(states, self.text.word.weight)}  # fmt: skip

    def pretrain(self, batch: dict) -> dict:
        """A batch of `corrupt`, its negatives written -> mlm logits [P, V] at the P hidden words, and the teacher's;
        itm logits [R, 2]; gen, the writer's logits at the hidden words [P, V]."""
        keep, where = batch["keep_mask"], batch["mlm_labels"] != NOTHING
        y = self.see(batch["pixels"]).repeat_interleave(len(keep) // len(batch["pixels"]), 0)  # encoded once
        states = self.text(batch["ids"], keep)
        x, _ = self.fuse(self.read(states), keep, y, "text")
        out = {"mlm": self.mlm_head(x[where])}  # the vocabulary at hidden words alone
        if learns_softly(self.cfg):
            out["teacher"] = self.teacher(batch["teacher_ids"], keep, where)
        if writes(self.cfg) and self.cfg.gen_head != "static":
            states, words = states[where], self.text.word.weight
            if self.cfg.gen_head == "probe":  # what it learns changes nothing but itself
                states, words = states.detach(), words.detach()
            out["gen"] = self.lm_head(states, words)
        out["itm"] = self.itm_head(self.join(batch["itm_ids"], batch["itm_keep_mask"], y))
        return out

    def retrieve(self, batch: dict) -> dict:
        """Pictures [B, ...], each with k texts ids [B k, T] and one of itm_ids [B, T] -> ranks [B, k], itm [B, 2]."""
        y = self.see(batch["pixels"])
        k = len(batch["ids"]) // len(y)
        cls = self.join(batch["ids"], batch["keep_mask"], y.repeat_interleave(k, 0))
        return {"ranks": self.rank_head(cls).view(-1, k),
                "itm": self.itm_head(self.join(batch["itm_ids"], batch["itm_keep_mask"], y))}  # fmt: skip

    def judge(self, batch: dict):
        """ids [B, T], a text for each picture or pair -> logits of a match [B, 2], or of answers [B, answers]."""
        pixels, ids, keep = batch["pixels"], batch["ids"], batch["keep_mask"]
        if self.cfg.task == "nlvr2":  # two passes, one for each picture [B, 2, 3, S, S]
            x = self.read(self.text(ids, keep))
            passes = [self.pool(*self.fuse(x, keep, self.see(pixels[:, i], 1 + i), "first")) for i in (0, 1)]
            return self.answer_head(torch.cat(passes, dim=1))
        cls = self.join(ids, keep, self.see(pixels))
        return self.itm_head(cls) if self.cfg.task == "pretrain" else self.answer_head(cls)

    # What tools/exam.py, tools/ask.py and tools/negatives.py call

    @torch.no_grad()
    def encode_images(self, batch: dict):
        """Pictures of a loader's batch -> the image stream [B, N, D], made once."""
        return self.see(data.to_device(self, {"pixels": batch["pixels"]})["pixels"])

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> tuple:
        """Texts as written -> the text stream [M, T, D] and its keep mask [M, T], made once."""
        batch = self.tokenized(texts)
        return self.read(self.text(batch["ids"], batch["keep_mask"])), batch["keep_mask"]

    @torch.no_grad()
    def match(self, images, texts: tuple):
        """B pictures and M texts, encoded -> [B, M], log odds of belonging together (of retrieval, ranks): every pair
        passes the fusion."""
        rows, (x, keep) = [], texts
        if hasattr(self, "rank_head"):
            weight, bias = self.rank_head.weight[0], self.rank_head.bias[0]
        else:
            weight, bias = self.itm_head.weight.diff(dim=0)[0], self.itm_head.bias.diff()[0]
        for y in images:
            cls = self.pool(*self.fuse(x, keep, y.expand(len(x), -1, -1), "first"))
            rows.append((cls.float() * weight).sum(1) + bias)  # no product of matrices, which would round it to bf16
        return torch.stack(rows)

    @torch.no_grad()
    def answer_scores(self, batch: dict):
        """Samples of a loader -> [B, answers]; of a pre-trained model [B, 2], the second for a match."""
        return self.judge(data.to_device(self, {name: batch[name] for name in ("pixels", "ids", "keep_mask")}))

    @torch.no_grad()
    def score(self, picture, text: str) -> float:
        """The probability that a text belongs to a picture: 0 to 1."""
        self._need("itm_head", "--task pretrain or retrieval", "scores")
        x, keep = self.encode_texts([text])
        cls = self.pool(*self.fuse(x, keep, self.encode_images(self._look(picture)), "first"))
        return self.itm_head(cls).softmax(1)[0, 1].item()

    def write(self, *inputs) -> dict:
        return write(self, *inputs)

    def content_words(self, ids, keep_mask):
        return rewritable(ids, keep_mask, self.tables())

    def tables(self) -> dict:
        return {name: getattr(self, f"words_{name}") for name in ("first", "later", "starts", "stop", "stem")}

    @torch.no_grad()
    def fill(self, batch: dict, ids, keep_mask, where):
        """Texts [B, T] beside a loader's pictures -> logits [P, V] at the P places that are true in `where` [B, T]."""
        x = self.read(self.text(ids, keep_mask))
        return self.mlm_head(self.fuse(x, keep_mask, self.encode_images(batch), "text")[0][where])

    @classmethod
    def from_run(cls, source: str, device="cpu") -> ViLTA:
        """The model of a run directory (its `best`) or of one of its step_N, ready to score or answer."""
        checkpoint, values = common.find_checkpoint(source, "vilta")
        return build(common.config_from(Config, values), None, checkpoint).to(device).eval()


def learns_softly(cfg: Config) -> bool:
    return "cd" in cfg.arm.split("+") and cfg.alpha > 0


def writes(cfg: Config) -> bool:
    return "hn" in cfg.arm.split("+") and cfg.syn_ratio > 0


# ---------------------------------------------------------------------------------------------------------------------
# Corruption: from a loader's batch to what pre-training reads. All luck comes from one generator, drawn alike by all
# arms.

MATCHING, WRITTEN, OTHER = 0, 1, 2  # kinds of pairs: own caption, rewritten, another picture's


def corrupt(batch: dict, tok: language.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's captions with pictures -> what `ViLTA.pretrain` reads and its labels, for R = k * B pairs:

    pixels [B, 3, S, S]; ids, keep_mask, mlm_labels, teacher_ids [R, T]; itm_ids, itm_keep_mask [R, T] of pairs whose
    kind [R] is MATCHING, WRITTEN (yet to be rewritten, see `write_negatives`) or OTHER; other_ids, other_keep_mask
    for pairs that cannot be rewritten; order and lots [R, T], luck of the writing.
    """
    ids, keep = data.whole_captions(batch, tok.pad)
    B, R = len(batch["pixels"]), len(ids)  # pictures, pairs
    ids, keep = data.exchange(cfg.caption_noise, luck, ids, keep)
    may_mask = keep & (ids != tok.bos) & (ids != tok.eos)
    # HERE[vilta-9] (not in the paper): of a caption of which nothing was drawn one word, whichever
    shown, labels = data.mask_words(ids, may_mask, tok.mask, cfg.vocab_size, cfg.word_mask, luck, at_least_one=True)
    teacher_ids = {"all_mask": ids.masked_fill(labels != NOTHING, tok.mask), "same_as_student": shown,
                   "unmasked": ids}[cfg.teacher_input]  # fmt: skip
    # exactly so many of each kind. PAPER: rewritten captions; OFFICIAL: half of the pairs are mismatched at random
    n = round(cfg.mismatched * R)
    n_written = int(cfg.syn_ratio * n + 0.5) if writes(cfg) else 0
    rank = torch.randperm(R, generator=luck)
    kinds = torch.where(rank >= n, MATCHING, torch.where(rank < n_written, WRITTEN, OTHER))
    others, may_be = other_captions(data.picture_numbers(batch, R // B), luck)
    kinds = torch.where(may_be | (kinds == MATCHING), kinds, MATCHING)
    itm_ids, itm_keep = (torch.where((kinds == OTHER)[:, None], x[others], x) for x in (ids, keep))
    return {
        "pixels": batch["pixels"], "ids": shown, "keep_mask": keep, "mlm_labels": labels, "teacher_ids": teacher_ids,
        "itm_ids": itm_ids, "itm_keep_mask": itm_keep, "kinds": kinds, "other_ids": ids[others],
        "other_keep_mask": keep[others], "order": torch.rand(ids.shape, generator=luck),
        "lots": torch.rand(ids.shape, generator=luck),
    }  # fmt: skip


def other_captions(numbers, luck: torch.Generator):
    """numbers [R], equal for texts of one picture -> for each the index of another picture's text [R], and whether
    there is one, bool [R].

    HERE[vilta-13]: METER gives the caption another picture of the data set; here the picture gets a caption of another
    one of this process' batch, so that every picture is encoded once.
    """
    may_be = (numbers[:, None] != numbers[None]).float()  # [R, R]
    is_one = may_be.sum(1) > 0
    return torch.multinomial(may_be + ~is_one[:, None], 1, generator=luck)[:, 0], is_one


# ---------------------------------------------------------------------------------------------------------------------
# Corruption: written negatives. PAPER: the current language encoder rewrites the caption, seeing the text alone. All of
# how is HERE[vilta-7] and HERE[vilta-8].


def rewritable(ids, keep_mask, tables: dict):
    """bool [R, T]: words of one token that are no stop words."""
    begins = torch.zeros_like(keep_mask).index_fill_(1, torch.tensor([1], device=ids.device), True)
    is_whole = F.pad(tables["starts"][ids[:, 1:]], (0, 1), value=True)  # what follows is no piece of it
    may_be = torch.where(begins, tables["first"][ids], tables["later"][ids])
    return may_be & is_whole & ~tables["stop"][ids] & keep_mask


@torch.no_grad()
def write(model: ViLTA, ids, keep_mask, order, lots) -> dict:
    """Captions [R, T] rewritten: {"ids" [R, T], "is_written" bool [R], "p" [R], mean probability of the new words}.

    order, lots in [0, 1) [R, T]: which words, and which word each becomes. Drawn without dropout. A caption of which
    nothing can be rewritten stays as it is.
    """
    cfg, tables = model.cfg, model.tables()
    text, head = model.text, model.lm_head
    if cfg.gen_encoder == "frozen":
        text, head = model.teacher.text, model.teacher.head
    was_training = text.training
    text.eval()
    # n = max(1, round(0.15 L)) content words make way for <mask>, all at once
    n = (cfg.rewrite * (keep_mask.sum(1) - 2)).round().long().clamp(min=1)  # <s> and </s> are no words
    where = data.first_of(order, rewritable(ids, keep_mask, tables), n)  # bool [R, T]
    words, mask = text.word.weight, model.tokenizer.mask
    logits = head(text(ids.masked_fill(where, mask), keep_mask)[where], words).float()  # [P, V]
    plain = head(text(ids, keep_mask)[where], words).float()  # the same places with the caption in view
    text.train(was_training)
    old, place = ids[where], where.nonzero()  # [P], [P, 2]
    may_be = torch.where((place[:, 1] == 1)[:, None], tables["first"], tables["later"])  # [P, V], whole words
    may_be = may_be & ~tables["stop"] & (tables["stem"] != tables["stem"][old][:, None])
    if cfg.gen_ban:
        may_be = may_be.scatter(1, plain.topk(cfg.gen_ban).indices, False)
    best = logits.masked_fill(~may_be, -math.inf).topk(min(cfg.gen_topk, logits.size(1)))
    # one of the most probable that are left, in proportion: the first whose running sum passes the lot
    share = best.values.softmax(1).nan_to_num().cumsum(1)  # of nothing but -inf: 0
    drawn = (share <= lots[where][:, None] * share[:, -1:]).sum(1).clamp(max=share.size(1) - 1)
    fresh = best.indices.gather(1, drawn[:, None])[:, 0]
    is_new = may_be.gather(1, fresh[:, None])[:, 0]
    p = logits.softmax(1).gather(1, fresh[:, None])[:, 0] * is_new
    changed = torch.zeros_like(keep_mask).masked_scatter(where, is_new)
    p_in_row = torch.zeros(len(ids), device=ids.device).index_add_(0, place[:, 0], p)
    return {"ids": torch.where(changed, ids.masked_scatter(where, fresh), ids), "is_written": changed.any(1),
            "p": p_in_row / changed.sum(1).clamp(min=1)}  # fmt: skip


def write_negatives(model: ViLTA, rows: dict) -> dict:
    """Rows of `corrupt` on the device -> with the captions of WRITTEN pairs rewritten. Where that cannot be done, the
    pair gets another picture's caption. New: p [R], probability of the words that were written."""
    if "order" not in rows or not writes(model.cfg):
        return rows
    asked = rows["kinds"] == WRITTEN
    found = write(model, *(rows[name][asked] for name in ("itm_ids", "itm_keep_mask", "order", "lots")))
    fails = torch.zeros_like(asked).masked_scatter(asked, ~found["is_written"])
    ids, p = rows["itm_ids"].clone(), torch.zeros(len(asked), device=asked.device)
    ids[asked], p[asked] = found["ids"], found["p"]
    return {**rows, "itm_ids": torch.where(fails[:, None], rows["other_ids"], ids), "p": p,
            "itm_keep_mask": torch.where(fails[:, None], rows["other_keep_mask"], rows["itm_keep_mask"]),
            "kinds": rows["kinds"].masked_fill(fails, OTHER)}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def loss_mlm(logits, labels, soft=None, alpha=0.0):
    """Masked language modelling with cross-distillation. logits [P, V] at the hidden words, labels [P], soft [P, V] the
    teacher's distribution q -> mean over words, in nats.

    HERE[vilta-2] (not in the paper): ALBEF's mixture; a teacher without the picture cannot know its colours.
    """
    log_p = logits.float().log_softmax(1)
    hard = F.nll_loss(log_p, labels)
    # L = (1 - alpha) (-log p(w)) + alpha (-sum_k q_k log p_k)
    return hard if soft is None else (1 - alpha) * hard - alpha * (soft * log_p).sum(1).mean()


def soft_labels(logits, temperature=1.0, topk=0):
    """The teacher's logits [P, V] -> q [P, V] = softmax(z / tau); with `topk` of the so many largest alone."""
    z = logits.detach().float() / max(temperature, 1e-3)  # tau = 0: the best word alone
    if topk:
        z = torch.full_like(z, -math.inf).scatter(1, (best := z.topk(min(topk, z.size(1)))).indices, best.values)
    return z.softmax(1)


def loss_itm(logits, labels):
    """Image-text matching. logits [R, 2], labels [R], 1 = they belong together -> mean cross-entropy."""
    return F.cross_entropy(logits.float(), labels)


def loss_rank(scores):
    """Retrieval. scores [B, 1 + false captions], the picture's own first -> mean cross-entropy."""
    return F.cross_entropy(scores.float(), torch.zeros(len(scores), dtype=torch.long, device=scores.device))


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
    if cfg.task == "retrieval":  # OFFICIAL: each picture beside its caption and false ones; also pairs for ITM
        ids, keep = data.whole_captions(batch, tok.pad)
        B, k = len(ids), 1 + cfg.negatives  # pictures, texts a picture
        numbers = data.picture_numbers(batch, 1)
        false = torch.stack([other_captions(numbers, luck)[0] for _ in range(cfg.negatives)], dim=1)
        taken = torch.cat([torch.arange(B)[:, None], false], dim=1).flatten()  # [B * k]
        rows = {"pixels": batch["pixels"], "ids": ids[taken], "keep_mask": keep[taken]}
        is_other = torch.randperm(B, generator=luck) < B // 2
        mixed = torch.where(is_other, taken.view(B, k)[:, 1], torch.arange(B))
        return rows | {"itm_ids": ids[mixed], "itm_keep_mask": keep[mixed],
                       "kinds": torch.where(is_other, OTHER, MATCHING)}  # fmt: skip
    label = "targets" if cfg.task == "vqa" else "labels"
    return {name: batch[name] for name in ("pixels", "ids", "keep_mask", label)}


def start_of(batch: dict, tok: language.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's captions with pictures -> what the first `start_steps` read: pixels; words [B, V], 1 where a token is
    in one of the picture's captions; ids, keep_mask, mlm_labels [R, T], captions with words hidden.

    HERE[vilta-10] (not in the paper): a stand-in for the weights of CLIP and RoBERTa, where there are none; the teacher
    is the copy of the language encoder taken then.
    """
    ids, keep = data.whole_captions(batch, tok.pad)
    may_mask = keep & (ids != tok.bos) & (ids != tok.eos)
    shown, labels = data.mask_words(ids, may_mask, tok.mask, cfg.vocab_size, cfg.word_mask, luck, at_least_one=True)
    words = data.words_said(batch, tok, cfg.vocab_size)
    return {"pixels": batch["pixels"], "words": words, "ids": shown, "keep_mask": keep, "mlm_labels": labels}


def losses(cfg: Config, out: dict, rows: dict) -> dict:
    """{loss: scalar}; their sum is what is minimised. OFFICIAL: each with weight 1."""
    if cfg.task == "pretrain":
        labels = rows["mlm_labels"][rows["mlm_labels"] != NOTHING]
        if "words" in out:
            return {"words": loss_answers(out["words"], rows["words"]), "lm": loss_mlm(out["lm"], labels)}
        soft = None
        if "teacher" in out:
            soft = soft_labels(out["teacher"], cfg.teacher_temperature, cfg.teacher_topk)
        found = {"mlm": loss_mlm(out["mlm"], labels, soft, cfg.alpha),
                 "itm": loss_itm(out["itm"], (rows["kinds"] == MATCHING).long())}  # fmt: skip
        return found | ({"gen": loss_mlm(out["gen"], labels)} if "gen" in out else {})
    if cfg.task == "retrieval":
        return {"rank": loss_rank(out["ranks"]), "itm": loss_itm(out["itm"], (rows["kinds"] == MATCHING).long())}
    if cfg.task == "vqa":
        return {"vqa": loss_answers(out["logits"], rows["targets"])}
    return {cfg.task: F.cross_entropy(out["logits"].float(), rows["labels"])}


# ---------------------------------------------------------------------------------------------------------------------
# Official weights. METER's checkpoints, CLIP, RoBERTa. A part (a child of ViLTA) is filled whole, or starts fresh where
# the file has nothing of it; every key is used, or belongs to a part that this task lacks.

CLIP = {"norm1": "ln_1", "norm2": "ln_2", "attention.q": "attn.q_proj", "attention.kv": ("attn.k_proj", "attn.v_proj"),
        "attention.out": "attn.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}  # fmt: skip
ROBERTA = {"attention.q": "attention.self.query", "attention.kv": ("attention.self.key", "attention.self.value"),
           "attention.out": "attention.output.dense", "att_norm": "attention.output.LayerNorm",
           "up": "intermediate.dense", "down": "output.dense", "ffn_norm": "output.LayerNorm"}  # fmt: skip
FUSION = {**ROBERTA, "cross.q": "crossattention.self.query",
          "cross.kv": tuple(f"crossattention.self.{x}" for x in ("key", "value")),
          "cross.out": "crossattention.output.dense", "cross_norm": "crossattention.output.LayerNorm"}  # fmt: skip
NAMES = (  # ours, METER's, what both are followed by; {} is the number of a layer
    ("vision", "vit_model.visual", {"": "", ".patches": ".conv1", ".pre_norm": ".ln_pre", ".post_norm": ".ln_post"}),
    ("vision.blocks.{}.", "vit_model.visual.transformer.resblocks.{}.", CLIP),
    ("text.", "text_transformer.embeddings.", {"word": "word_embeddings", "position": "position_embeddings",
                                               "segment": "token_type_embeddings", "norm": "LayerNorm"}),
    ("text.blocks.{}.", "text_transformer.encoder.layer.{}.", ROBERTA),
    ("", "cross_modal_", {"image_transform": "image_transform", "text_transform": "text_transform",
                          "image_pooler": "image_pooler.dense", "text_pooler": "text_pooler.dense"}),
    ("types", "token_type_embeddings", {"": ""}),
    ("text_layers.{}.", "cross_modal_text_layers.{}.", FUSION),
    ("image_layers.{}.", "cross_modal_image_layers.{}.", FUSION),
    ("mlm_head", "mlm_score", {"": "", ".dense": ".transform.dense", ".norm": ".transform.LayerNorm",
                               ".words": ".decoder"}),
    ("itm_head", "itm_score.fc", {"": ""}),
    ("rank_head", "rank_output", {"": ""}),
    ("lm_head", "lm_head", {"": "", ".dense": ".dense", ".norm": ".layer_norm"}),  # RoBERTa's
)  # fmt: skip
ANSWERS = {"vqa": "vqa_classifier.", "nlvr2": "nlvr2_classifier.", "ve": "snli_classifier."}
OTHERS = ("mlm_score.", "itm_score.", "rank_output.", *ANSWERS.values(), "lm_head.", "text_transformer.pooler.",
          "text_transformer.embeddings.position_ids", "vit_model.positional_embedding", "vit_model.ln_final.",
          "vit_model.token_embedding.", "vit_model.text_projection", "vit_model.logit_scale", "vit_model.transformer.",
          "vit_model.visual.proj")  # fmt: skip


def official_names(model: ViLTA) -> dict:
    """Our name of each tensor -> METER's, or the list of those that it holds one after the other."""
    cfg, task = model.cfg, model.cfg.task
    depth = {"vision.blocks.{}.": cfg.vision_layers, "text.blocks.{}.": cfg.text_layers}
    table = NAMES + ((("answer_head.", ANSWERS[task], {i: i for i in "013"}),) if task in ANSWERS else ())
    return weights.tensor_names(model, weights.module_names(table, lambda ours: depth.get(ours, cfg.layers)))


def tidy(state: dict) -> dict:
    """METER's state dict, of a Lightning file or alone, with CLIP's queries, keys and values apart."""
    return weights.parted(state.get("state_dict", state))


SHAPES = {  # config field: METER's tensor whose shape tells it, and the dimension
    "vocab_size": ("text_transformer.embeddings.word_embeddings.weight", 0),
    "positions": ("text_transformer.embeddings.position_embeddings.weight", 0),
    "text_width": ("text_transformer.embeddings.word_embeddings.weight", 1),
    "text_mlp": ("text_transformer.encoder.layer.0.intermediate.dense.weight", 0),
    "vision_width": ("vit_model.visual.conv1.weight", 0), "patch": ("vit_model.visual.conv1.weight", 2),
    "vision_mlp": ("vit_model.visual.transformer.resblocks.0.mlp.c_fc.weight", 0),
    "width": ("cross_modal_text_transform.weight", 0),
    "mlp": ("cross_modal_text_layers.0.intermediate.dense.weight", 0),
}  # fmt: skip
DEPTHS = {"vision_layers": "vit_model.visual.transformer.resblocks.", "text_layers": "text_transformer.encoder.layer.",
          "layers": "cross_modal_text_layers."}  # fmt: skip
HEADS = {"vision_heads": "vision_width", "text_heads": "text_width", "heads": "width"}


def official_sizes(state: dict) -> dict:
    """Config fields from the shapes in a state dict under METER's names, whole or in part; heads are 64 wide."""
    if any(key.startswith("vit_model.layers.") for key in state):
        raise UserError("METER with a Swin Transformer is not read here: take a CLIP16 checkpoint (docs/vilta.md)")
    sizes = weights.sizes_of(state, SHAPES, DEPTHS)
    sizes |= {name: max(1, sizes[of] // 64) for name, of in HEADS.items() if of in sizes}
    return sizes | ({"stem": "patch"} if "patch" in sizes else {})


def fitted(model: ViLTA, state: dict, names: dict) -> dict:
    """`state` where its pictures, its task or its heads are others than the model's. names: ours -> theirs.

    OFFICIAL: positions are resized; the second picture of NLVR2 starts with the type of the first; the ranking head
    starts as the row of ITM's that says match.
    """
    state, size = dict(state), model.types.num_embeddings
    place, kind = names["vision.positional_embedding"], names["types.weight"]
    if place in state:
        state[place] = weights.resize_positions(state[place], model.vision.grid)
    if kind in state:
        rows = state[kind]
        state[kind] = torch.cat([rows, rows[1:2]])[:size] if len(rows) < size else rows[:size]
    if hasattr(model, "rank_head") and names["itm_head.weight"] in state and names["rank_head.weight"] not in state:
        for part in ("weight", "bias"):
            state[names[f"rank_head.{part}"]] = state[names[f"itm_head.{part}"]][1:]
    return state


def load_official(model: ViLTA, state: dict, what: str = "METER") -> str:
    """A state dict under METER's names, whole or of an encoder alone, into a model of any task; see
    `weights.load_parts`. The teacher becomes a copy of the language encoder, where the word head came along."""
    names = {name: theirs for name, theirs in official_names(model).items() if not name.startswith("teacher.")}
    single = {ours: theirs if isinstance(theirs, str) else theirs[0] for ours, theirs in names.items()}
    told = weights.load_parts(model, fitted(model, state, single), names, OTHERS, what)
    if hasattr(model, "teacher") and "lm_head.bias" in state:
        model.teacher = Teacher(model.text, model.lm_head)
    return told


# ---------------------------------------------------------------------------------------------------------------------
# Training


def make_optimizer(cfg: Config, model: ViLTA):
    """OFFICIAL: AdamW; the fusion and the heads move faster than the encoders; the type embeddings and the ranking head
    count among the latter. HERE[vilta-11]: matrices and embeddings decay, norms and biases do not."""
    def lr_of(name: str) -> float:
        if name.startswith(("vision.", "text.", "types.", "rank_head.")):
            return cfg.lr
        is_head = name.startswith(("mlm_head.", "itm_head.", "answer_head.", "lm_head.", "word_head."))
        return cfg.lr * (cfg.head_mult if is_head else cfg.fusion_mult)

    return common.adamw(model, lr_of, cfg.weight_decay, betas=(0.9, cfg.beta2), all_matrices=True)


def build(cfg: Config, corpus, checkpoint: Path | None = None) -> ViLTA:
    """The model with tokenizer and first weights: a run's, official ones, or random ones. Official weights bring their
    sizes along, so cfg is changed here to what was really built."""
    found, sizes, told = {}, {}, []  # found: state dicts under METER's names
    needs_head = cfg.task == "pretrain" and (writes(cfg) or learns_softly(cfg))
    if not checkpoint and cfg.init != "none":
        found["METER"] = tidy(common.read_tensors(Path(cfg.init)))
        if "cross_modal_text_transform.weight" not in found["METER"]:
            raise UserError(f"no checkpoint of METER's: it begins with {', '.join(list(found['METER'])[:3])}")
    elif not checkpoint and cfg.clip != "none":
        config, state = weights.read_weights(cfg.clip)
        config, state = config.get("vision_config", config), weights.clip_vision(state)
        if config.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise UserError(f"{cfg.clip} was trained with {config['hidden_act']}: take a CLIP of OpenAI's (quick_gelu)")
        last = f"resblocks.{config.get('num_hidden_layers', 12) - 1}."  # OFFICIAL: left out
        found["CLIP"] = {f"vit_model.visual.{key}": x for key, x in state.items() if last not in key}
        sizes["vision_heads"] = config.get("num_attention_heads", 12)
    if not checkpoint and cfg.roberta != "none" and (needs_head or "METER" not in found):
        config, state = weights.read_weights(cfg.roberta)
        found["RoBERTa"] = {key if key.startswith("lm_head.") else f"text_transformer.{key}": x
                            for key, x in weights.roberta(state).items()}  # fmt: skip
        sizes["text_heads"] = config.get("num_attention_heads", 12)
    for state in found.values():
        sizes = official_sizes(state) | sizes
    for name, value in sizes.items():
        setattr(cfg, name, value)
    check(cfg)
    if found:  # an encoder that knows something already
        cfg.start_steps = 0
    theirs = "roberta-base" if "METER" in found and cfg.roberta == "none" else cfg.roberta
    tokenizer = weights.choose_tokenizer(cfg, theirs, checkpoint, corpus, "roberta", "vocab_size" in sizes)
    if tokenizer.mask is None:
        raise UserError("this tokenizer has no mask token, which pre-training shows: take RoBERTa's")
    if found and needs_head and "lm_head.bias" not in found.get("RoBERTa", {}):
        raise UserError("teacher and writer need RoBERTa with its word head (RobertaForMaskedLM): add --roberta "
                        "roberta-base or a directory, or train without the two (--arm baseline)")  # fmt: skip
    has_answers = "vqa_classifier.3.bias" in found.get("METER", {}) and cfg.task == "vqa"
    answers = weights.known_answers(corpus, checkpoint, cfg.init, has_answers) if cfg.task == "vqa" else ()
    model = ViLTA(cfg, tokenizer, answers)
    state = common.read_tensors(checkpoint / "model.safetensors") if checkpoint else {}
    is_same = checkpoint and common.read_json(checkpoint.parent / "config.json")["task"] == cfg.task
    if is_same and state.keys() == model.state_dict().keys():
        common.load_model_weights(model, checkpoint)
    elif checkpoint:  # trained for another task, or in another arm
        state = {name: x for name, x in state.items() if is_same or not name.startswith("answer_head.")}
        same = {name: name for name in model.state_dict()}
        told.append(weights.load_parts(model, fitted(model, state, same), same, PARTS, str(checkpoint)))
        if hasattr(model, "lm_head") and "lm_head.bias" not in state:
            raise UserError(f"{checkpoint} has no word head for teacher and writer: go on with it by --arm baseline")
        if hasattr(model, "teacher") and "teacher.head.bias" not in state:
            model.teacher = Teacher(model.text, model.lm_head)
    for what in ("RoBERTa", "CLIP", "METER"):  # the last one last: the teacher is RoBERTa as it was
        if what in found:
            told.append(load_official(model, found[what], what))
    if corpus:
        corpus.answers, corpus.notes = answers, corpus.notes + told
    return model


def samples_of(cfg: Config, model: ViLTA, corpus, items, train=False):
    """The samples of the run's task; Examples too where a pre-trained model is asked which texts match."""
    more = dict(tokenizer=model.tokenizer, size=cfg.image_size, max_len=cfg.max_len, train=train, seed=cfg.seed,
                augment=cfg.augment, frame=cfg.frame)  # fmt: skip
    if isinstance(items[0], data.Example):
        return data.Examples(items, answers=model.answers, **more)
    return data.Pictures(items, captions=cfg.captions_per_image, **more)


def examination(cfg: Config, model: ViLTA, corpus, machine) -> exam.Exam:
    """A pre-trained model is also asked to fill in masked words and to judge the negatives that it writes."""
    task, more = ("itm", negatives.metrics) if cfg.task == "pretrain" else (cfg.task, None)
    return exam.Exam(task, model, corpus, machine, partial(samples_of, cfg, model, corpus), cfg.gallery,
                     cfg.galleries, more)  # fmt: skip


def train(cfg: Config, model: ViLTA, corpus, machine, run, checkpoint: Path | None = None) -> None:
    """The loop. `checkpoint`: go on from its step with its optimizer. Luck follows from seed, step and process."""
    model.to(machine.device)
    optimizer = make_optimizer(cfg, model)
    start, best, is_due = run.go_on(checkpoint, optimizer)
    samples = samples_of(cfg, model, corpus, corpus.splits["train"], train=True)
    loader = data.train_loader(samples, cfg.batch // cfg.captions_per_image, machine.workers, machine.rank,
                               machine.processes, cfg.seed, start, cfg.steps, pin=machine.device.type == "cuda")
    log = common.Logger(run, machine, cfg.steps, cfg.log_every, start)
    asked = examination(cfg, model, corpus, machine)
    # 6 x parameters of a stream x tokens of both, 30 of the text: a lower bound, encoders and second pass left out
    log.flops_per_item = 6 * sum(p.numel() for p in model.text_layers.parameters()) * (model.vision.grid**2 + 31)
    ddp = common.spread(model, cfg, machine, (VisionBlock, TextBlock), find_unused=True)
    heads = [p for name, p in model.named_parameters() if name.startswith("lm_head.")]  # clipped by themselves
    others = [p for name, p in model.named_parameters() if not name.startswith("lm_head.")]
    if is_due:  # saved, but stopped before its evaluation was over
        best = asked.validate(cfg, run, log, start, best)
    with common.StopRequest() as stop, contextlib.closing(iter(loader)) as batches:
        for step in range(start, cfg.steps):
            model.train()
            if step == cfg.start_steps and hasattr(model, "teacher") and cfg.start_steps:
                model.teacher = Teacher(model.text, model.lm_head)  # PAPER: frozen from here on
            seed = (cfg.seed * machine.processes + machine.rank) * 1_000_003 + step
            torch.manual_seed(seed + 2**31)  # of dropout: other numbers than luck's; torch keeps 32 bits of a seed
            with log.waiting():
                batch = next(batches)
            luck = torch.Generator().manual_seed(seed)
            prepare = start_of if step < cfg.start_steps else rows_of
            rows = data.to_device(model, prepare(batch, model.tokenizer, cfg, luck))
            bad_in_all, stops = common.sum_over_processes([len(batch["bad"]), stop.signum > 0], machine.device)
            if bad_in_all:
                loader.judge(common.gather_lists(batch["bad"]))
            pieces, logged = data.equal_pieces(rows, cfg.micro_batch), {}
            for i, piece in enumerate(pieces):
                # OFFICIAL: losses are means over a piece, and the step is their mean over pieces and processes
                with common.synchronised(ddp, i + 1 == len(pieces)):
                    with machine.autocast():
                        piece = write_negatives(model, piece)
                    with machine.autocast():  # anew: bf16 copies of weights that were made without gradient are gone
                        out = ddp(piece)
                    found = {name: loss / len(pieces) for name, loss in losses(cfg, out, piece).items()}
                    sum(found.values()).backward()
                found |= {name: x / len(pieces) for name, x in negatives.log_of(out, piece).items()}
                for name, part in found.items():
                    logged[name] = logged.get(name, 0.0) + part.detach() / machine.processes
            norm = nn.utils.clip_grad_norm_(others, cfg.grad_clip or math.inf)
            of_head = nn.utils.clip_grad_norm_(heads, cfg.grad_clip or math.inf)
            common.stop_if_not_finite(norm + of_head, float(sum(logged.values())), batch["image_id"], step + 1, run)
            share = common.linear_schedule(step, cfg.steps, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
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


def final_evaluation(cfg: Config, model: ViLTA, checkpoint: Path, corpus, machine, folder, started: float) -> dict:
    """Every test split with its controls: metrics.json, pictures, result files in `folder`; columns of a table."""
    n_texts = 1 if cfg.data == "scenes" or cfg.gallery else 5
    asked = examination(cfg, model, corpus, machine)
    splits, columns = asked.final(folder, 1, cfg.official, n_texts)
    finish.record("vilta", cfg, asked, checkpoint, folder, started, splits, texts_per_picture=n_texts)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Main

# what --init takes over from the run's config
SIZES = ("arm frame patch stem vision_width vision_layers vision_heads vision_mlp text_width "
         "text_layers text_heads text_mlp positions vocab_size width layers heads mlp clip roberta").split()


def check(cfg: Config) -> None:
    """Settings that contradict one another or are not among the choices."""
    common.check_numbers(cfg, "batch captions_per_image max_len image_size patch vision_width vision_heads text_width "
                         "text_layers text_heads positions width layers heads negatives galleries gen_topk")
    for name, choices in {
        "task": TASKS, "arm": ("baseline", "cd", "hn", "cd+hn"), "stem": ("patch", "conv"), "frame": data.FRAMES,
        "teacher-input": ("all_mask", "same_as_student", "unmasked"), "gen-head": ("probe", "static", "joint"),
        "gen-encoder": ("current", "frozen"), "augment": data.AUGMENTATIONS, "train-on": corpora.TRAIN_ON,
    }.items():  # fmt: skip
        common.choose(name, getattr(cfg, name.replace("-", "_")), choices)
    common.check_multiples(cfg, vision_width="vision_heads", text_width="text_heads", width="heads", image_size="patch")
    if cfg.stem == "conv" and (cfg.patch & (cfg.patch - 1) or cfg.patch < 2 or cfg.vision_width % 4):
        raise UserError(f"--stem conv --patch {cfg.patch} --vision-width {cfg.vision_width}: give a power of two and a "
                        "multiple of 4")  # fmt: skip
    if cfg.task == "pretrain" and cfg.steps and cfg.start_steps >= cfg.steps:
        raise UserError(f"--start-steps {cfg.start_steps} --steps {cfg.steps}: nothing is left for pre-training")
    corpora.check_task(cfg.task, cfg.data)
    shares = "warmup word_mask mismatched syn_ratio rewrite alpha caption_noise".split()
    common.check_most(cfg, {**dict.fromkeys(shares, 1), "dropout": 0.99, "beta2": 0.99999,
                            "max_len": cfg.positions - 4})  # fmt: skip


def load_data(cfg: Config):
    return mixture.of_run(cfg, cfg.task if cfg.task in QUESTION_TASKS else "caption")


def evaluate_run(cfg: Config, checkpoint: Path, machine, folder: Path) -> dict:
    started, corpus = time.perf_counter(), load_data(cfg)
    model = build(cfg, corpus, checkpoint).to(machine.device)
    return final_evaluation(cfg, model, checkpoint, corpus, machine, folder, started)


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    given, command = common.parse_flags(Config, sys.argv[1:] if argv is None else argv, "vilta.py", ask.COMMANDS)
    if command.caption or command.score or command.ask:
        return ask.answer_commands(command, given, ViLTA, "vilta", [], check)
    if command.eval_only is not None:
        return compare.evaluate_runs(command.eval_only, given, "vilta", Config, DECODING, check, evaluate_run)
    cfg, checkpoint = common.configure(Config, given, "vilta", PRESETS, RECIPES, SIZES, takes_files=True)
    cfg.captions_per_image = cfg.captions_per_image if cfg.task == "pretrain" else 1
    if cfg.task != "pretrain" or checkpoint and not cfg.resume:
        cfg.start_steps = 0
    check(cfg)
    machine = common.start_machine(cfg)
    corpus = load_data(cfg)
    pictures = finish.pictures_of(cfg, corpus, machine, 2 if cfg.task in ("pretrain", "retrieval") else 1)
    model = build(cfg, corpus, checkpoint)
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(corpus.splits["train"]) / pictures)
    cfg.eval_every = cfg.eval_every or math.ceil(cfg.steps / 5)
    arm = f", {cfg.arm}" if cfg.task == "pretrain" else ""
    finish.carry_out("vilta", f"ViLTA ({cfg.task}{arm})", cfg, checkpoint, model, corpus, machine, started,
                     train, final_evaluation, "itm" if cfg.task == "pretrain" else cfg.task)  # fmt: skip


if __name__ == "__main__":
    common.run_main(main)
