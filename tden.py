"""TDEN: scheduled sampling with a decoupled encoder and decoder (Li, Pan, Yao, Chen, Mei, AAAI 2021, arXiv 2101.11562).

A network that is pre-trained to fill in masked words has two troubles. Understanding wants every word to see every
other; generation must not see what is still to be said. So the paper decouples them: one cross-modal encoder for the
first, one cross-modal decoder for the second, on top of the same two encoders of regions and words. And [MASK], which
pre-training shows all the time, never comes back in fine-tuning. So each batch is read twice: in the second pass the
words that the network itself gave for the masks stand where the masks were ("scheduled sampling").

    regions ──> object encoder ─────┬───────────────────────┐
                  │ ISM: same pair? │                       │ keys and values
    words u ──> sentence encoder ───┴─> cross-modal encoder │ ──> MLM (words), MOC (classes of masked regions)
    words g ──> sentence encoder, causal ──────────────────────> cross-modal decoder ──> MSG (the next word)
                    └ pass 2: masked words make way for what pass 1 said, MLM's in u, MSG's in g

    python tden.py                                    the small world: RESULT
    python tden.py --task vqa --init runs/tden-scenes      or retrieval, vcr, caption; then scst
    python tden.py --caption test:3 test:4 --init RUN      a caption; --score PICTURE TEXT, --ask PICTURE QUESTION
    torchrun --nproc_per_node=8 tden.py --data coco        region files below data/coco/regions

Reading map: Config, presets, recipes | blocks | model | corruption | losses | step: the two passes | heads of the
downstream tasks | decoding | official weights | training | evaluation | main. Marks: `# PAPER` what the paper says,
`# OFFICIAL` what the authors' code does (YehLi/xmodaler), `# HERE[id]` what we do and why: the id is a row of
docs/divergences.md.
"""

from __future__ import annotations

import contextlib
import math
import shlex
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
import eval as scoring
import regions
from common import UserError
from tools import compare, finish, judge

# ---------------------------------------------------------------------------------------------------------------------
# Config. Every field is a flag; its comment is the flag's help.


@dataclass
class Config(common.RunConfig):
    # --- method
    passes: int = 2  # PAPER: the second one reads the words of the first; 1: the ablation (double --steps for it)
    ss_mode: str = "argmax"  # HERE[tden-2]: the first pass's word, argmax | sample (drawn)
    ss_prob: float = 1.0  # HERE[tden-2]: probability that a masked word is replaced by it
    two_updates: bool = True  # HERE[tden-3]: an update after each pass; off: one, of both passes' losses
    decoder_memory: str = "object"  # HERE[tden-1]: the decoder sees object | understanding (leaks words) region states
    decoupled: bool = True  # off: one network for both, of as many parameters (the other ablation)
    margin: float = 0.2  # of ISM's hinge
    hardest: bool = True  # ISM: hardest negative of the batch; off: mean of all that violate the margin (first release)
    word_mask: float = 0.15  # share of words to predict (MLM)
    region_mask: float = 0.15  # share of regions to predict (MOC)
    # --- regions
    regions: str = "files"  # files: a detector's, below ROOT/regions (of scenes: their own) | grid: crops, no detector
    max_regions: int = 50  # regions of a picture, in the detector's order; the global one comes on top
    feature_dim: int = 0  # numbers that describe a region; 0: as many as the data has
    region_classes: int = 0  # detector's classes, background included; 0: as many as the data has
    mirror: float = 0.0  # share of training pictures of vqa and vcr seen mirrored, where such regions are there
    # --- network
    bert: str = "none"  # weights of the sentence encoder: a hub id, a directory, or none
    tokenizer: str = "none"  # hub id or directory; none: that of --bert, or one trained on the texts
    vocab_size: int = 30522  # upper bound where the tokenizer is trained here
    width: int = 768  # of all states
    heads: int = 12  # attention heads
    mlp: int = 0  # width inside the feed-forward parts; 0: 4 x width
    object_layers: int = 6  # depth of the object encoder
    sentence_layers: int = 12  # depth of the sentence encoder
    cross_layers: int = 6  # depth of the cross-modal encoder, and of the decoder
    positions: int = 512  # longest text
    pooled: int = 1024  # numbers of a picture's or a text's embedding (ISM), and of VCR's
    dropout: float = 0.1  # attention weights, sub-layer outputs, inside the feed-forward parts, embeddings, poolers
    drop_sentence: float = 0.0  # layer-drop: probability that a block is skipped in a training step
    drop_object: float = 0.0  # the same, of the object encoder
    drop_cross: float = 0.0  # the same, of the cross-modal encoder
    init_std: float = 0.02  # HERE[tden-6]: standard deviation of new weights (first release)
    # --- recipe of pre-training. OFFICIAL: configs/pretrain/tden/tden.yaml, 64 pairs on each of 4 GPUs
    batch: int = 256  # pairs per step over all processes; of vqa and vcr questions
    captions_per_image: int = 1  # captions per picture and step
    epochs: float = 10.0  # passes over the pictures, where --steps is 0
    steps: int = 0  # training iterations; 0: from --epochs
    lr: float = 1e-4  # peak learning rate
    warmup: float = 0.1  # share of the steps in which the rate rises linearly
    drops: str = ""  # shares of the steps after which the rate falls to drop_factor, like 0.5,0.6; none: linearly to 0
    drop_factor: float = 0.1  # see drops
    weight_decay: float = 0.01  # on matrices and embeddings, not on norms and biases
    beta2: float = 0.999  # AdamW's second moment; the first is 0.9
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    grad_clip_value: float = 0.0  # largest entry of a gradient; 0: no clipping
    label_smoothing: float = 0.0  # captions: share of the target's probability that the other words get
    max_len: int = 34  # word pieces of a text, special ones not counted; of vcr those of question and answer
    max_len_rationale: int = 63  # of vcr with its rationale
    train_on: str = "train"  # of vqa: train | train+val (but for 3,000 questions) | train+val+vg (Visual Genome)
    # --- decoding. OFFICIAL: beam 2, at most 20 tokens, sum of log p
    beam: int = 2  # width of the beam search of the final evaluation and of --caption; validation is greedy
    max_new: int = 20  # longest generated caption, in tokens, end token included


PRESETS = {
    # HERE[tden-9] (not in the paper): tiny learns the small world from nothing in three minutes on 2 cores
    "tiny": dict(
        width=128, heads=4, mlp=256, object_layers=1, sentence_layers=1, cross_layers=1, positions=64, pooled=128,
        vocab_size=1000, dropout=0.0, init_std=0.08, batch=96, steps=600, lr=1e-3, max_len=30, max_new=30, beam=2,
        grad_clip=1.0,
    ),
    # HERE[tden-9] (not in the paper): small learns from a few thousand photographs, from nothing
    "small": dict(
        width=192, heads=6, mlp=768, object_layers=2, sentence_layers=2, cross_layers=2, positions=128, pooled=256,
        vocab_size=3000, init_std=0.05, batch=96, epochs=20.0, lr=7e-4, beam=3, grad_clip=1.0,
    ),
    "base": dict(bert="bert-base-uncased"),
}  # fmt: skip

# OFFICIAL: configs/image_caption/tden and configs/mm_understanding/{vqa,flickr30k_retrieval,vcr}/tden; batches are for
# 4 GPUs. HERE[tden-8]: AdamW without decay for Adam; VCR's BertAdam is AdamW with one norm for all gradients.
RECIPES = {
    ("vqa", "base"): dict(
        batch=96, epochs=20.0, lr=5e-5, beta2=0.98, weight_decay=0.0, warmup=0.2, drops="0.5,0.6", drop_factor=0.2,
        drop_sentence=0.3, drop_object=0.3, drop_cross=0.1, max_len=21, max_regions=100, mirror=0.5,
        train_on="train+val+vg",
    ),
    ("retrieval", "base"): dict(
        batch=512, epochs=100.0, lr=2e-5, weight_decay=0.0, warmup=0.1, drops="0.3,0.6", drop_factor=0.1, dropout=0.2,
        drop_sentence=0.1, drop_object=0.1, max_len=28, grad_clip=2.0,
    ),
    ("vcr", "base"): dict(
        batch=64, epochs=20.0, lr=2e-5, warmup=0.05, drops="0.2,0.4", drop_factor=0.1, grad_clip=1.0, max_len=35,
        mirror=0.5,
    ),
    ("caption", "base"): dict(
        batch=80, captions_per_image=5, epochs=10.0, lr=3e-5, weight_decay=0.0, warmup=0.2, grad_clip_value=0.1,
        label_smoothing=0.1, max_len=19,
    ),
    ("scst", "base"): dict(
        batch=480, captions_per_image=5, epochs=50.0, lr=5e-6, weight_decay=0.0, warmup=0.0, drops="0.36,0.72",
        drop_factor=0.8, grad_clip_value=0.1, max_len=19,
    ),
    # HERE[tden-9] (not in the paper): a minute each after tiny's pre-training
    ("vqa", "tiny"): dict(steps=300, lr=5e-4),
    ("retrieval", "tiny"): dict(steps=300, lr=5e-4),
    ("vcr", "tiny"): dict(steps=300, lr=5e-4, batch=32, max_len=40, max_len_rationale=60),
    ("caption", "tiny"): dict(steps=300, lr=5e-4, captions_per_image=3, label_smoothing=0.1),
    ("scst", "tiny"): dict(steps=100, lr=1e-4, batch=50, captions_per_image=5, warmup=0.0),
    ("caption", "small"): dict(captions_per_image=3, label_smoothing=0.1),
    ("scst", "small"): dict(epochs=2.0, lr=1e-4, batch=50, captions_per_image=5, warmup=0.0),
}  # fmt: skip

TASKS = ("pretrain", "retrieval", "vqa", "vcr", "caption", "scst")
QUESTION_TASKS = ("vqa", "vcr")
NOTHING = -100  # the label of what is not to be predicted
LM_EPS, EMBED_EPS = 1e-12, 1e-5  # OFFICIAL: LayerNorm's epsilon in blocks and heads, and in embeddings and answer heads

# ---------------------------------------------------------------------------------------------------------------------
# Blocks: BERT's, with the norm after the residual. One alphabet: B pictures, R text rows (k for each picture), N
# regions, T text tokens, D width, H heads, V vocabulary, C classes of regions, P numbers of a pooled vector. Keep masks
# are boolean, True = attend, and stand in a form that broadcasts to [rows, H, queries, keys].


class Attention(nn.Module):
    """ATT(q, kv) = LN(W_o MHA(q, kv) + q). Keys and values are made once (`keys_values`), whoever asks them."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.p = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=LM_EPS)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, memory, cache: dict | None = None):
        """[B, N, D] -> [2, B, H, N, D/H]; `cache` keeps those of earlier tokens between calls."""
        B, N, D = memory.size()  # rows, tokens, width
        kv = self.kv(memory).view(B, N, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache["kv"] = kv = torch.cat([cache["kv"], kv], dim=3) if "kv" in cache else kv
        return kv

    def forward(self, x, kv, keep_mask=None):
        R, T, D = x.size()  # rows, tokens, width; R = k * B: the k rows of a picture follow one another,
        B = kv.size(1)  # so they can stand side by side as queries of one picture, and nothing is repeated.
        q = self.q(x).view(B, R // B * T, self.heads, D // self.heads).transpose(1, 2)  # [B, H, kT, D/H]
        mixed = F.scaled_dot_product_attention(q, kv[0], kv[1], keep_mask, self.p if self.training else 0.0)
        return self.norm(x + self.dropout(self.out(mixed.transpose(1, 2).reshape(R, T, D))))


class FeedForward(nn.Module):
    """FFN(x) = LN(W_2 dropout(gelu(W_1 x)) + x)."""

    def __init__(self, width: int, inner: int, dropout: float):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=LM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.norm(x + self.dropout(self.down(self.dropout(F.gelu(self.up(x))))))


class EncoderBlock(nn.Module):
    """Of the object and the sentence encoder: x = ATT(x, x); x = FFN(x)."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float):
        super().__init__()
        self.att, self.ffn = Attention(width, heads, dropout), FeedForward(width, inner, dropout)

    def forward(self, x, keep_mask=None, cache: dict | None = None):
        return self.ffn(self.att(x, self.att.keys_values(x, cache), keep_mask))


class UnderstandingBlock(nn.Module):
    """Of the cross-modal encoder: one attention over [regions ; words], then each kind its own FFN."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float):
        super().__init__()
        self.att = Attention(width, heads, dropout)
        self.ffn_regions, self.ffn_words = FeedForward(width, inner, dropout), FeedForward(width, inner, dropout)

    def forward(self, v, t, keep_mask):
        z = torch.cat([v, t], dim=1)  # [R, N + T, D]
        z = self.att(z, self.att.keys_values(z), keep_mask)
        return self.ffn_regions(z[:, : v.size(1)]), self.ffn_words(z[:, v.size(1) :])


class GenerationBlock(nn.Module):
    """Of the cross-modal decoder: g = ATT(g, g), causal; g = ATT(g, regions); g = FFN(g). Regions stay as they are."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float):
        super().__init__()
        self.self_att, self.cross_att = Attention(width, heads, dropout), Attention(width, heads, dropout)
        self.ffn = FeedForward(width, inner, dropout)

    def forward(self, g, kv, keep_mask, region_keep_mask, cache: dict | None = None):
        g = self.self_att(g, self.self_att.keys_values(g, cache), keep_mask)
        return self.ffn(self.cross_att(g, kv, region_keep_mask))


class Head(nn.Module):
    """States [..., D] -> logits [..., n]: a linear layer on LN(gelu(W x + b))."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(width, width), nn.LayerNorm(width, eps=LM_EPS), nn.Linear(width, n)

    def forward(self, x):
        return self.out(self.norm(F.gelu(self.dense(x))))


class AttentionPooler(nn.Module):
    """States [R, T, D] -> one vector [R, P]: a = softmax(w_2 relu(W_1 x + b_1) + b_2), y = E (sum a x) + e."""

    def __init__(self, width: int, pooled: int, dropout: float, batch_norm=False):
        super().__init__()
        self.weigh = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))
        self.embed = nn.Linear(width, pooled)
        self.norm = nn.BatchNorm1d(pooled) if batch_norm else nn.Identity()

    def forward(self, x, keep_mask):
        weights = self.weigh(x).masked_fill(~keep_mask[:, :, None], -math.inf).softmax(dim=1)  # [R, T, 1]
        self.norm.train(self.training and len(x) > 1)  # one vector alone has no batch statistics
        return self.norm(self.embed((weights * x).sum(1)))


class TokenEmbedding(nn.Module):
    """LN(word + position + type). Types: 0 the understanding copy, 1 the generation copy (of VCR: 1 the candidate)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.word = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position = nn.Embedding(cfg.positions, cfg.width)
        self.segment = nn.Embedding(3, cfg.width)
        self.norm, self.dropout = nn.LayerNorm(cfg.width, eps=EMBED_EPS), nn.Dropout(cfg.dropout)

    def forward(self, ids, types, start=0):
        end = start + ids.size(1)
        if end > len(self.position.weight):
            raise UserError(f"a text of {end} tokens: there are {len(self.position.weight)} positions (--positions)")
        return self.dropout(self.norm(self.word(ids) + self.position.weight[start:end] + self.segment(types)))


class RegionEmbedding(nn.Module):
    """LN(W_f feature + b_f + W_b box + b_b); a box is x1/W, y1/H, x2/W, y2/H and its share of the area."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.feature, self.location = nn.Linear(cfg.feature_dim, cfg.width), nn.Linear(5, cfg.width)
        self.norm, self.dropout = nn.LayerNorm(cfg.width, eps=EMBED_EPS), nn.Dropout(cfg.dropout)

    def forward(self, features, locations):
        return self.dropout(self.norm(self.feature(features) + self.location(locations)))


# ---------------------------------------------------------------------------------------------------------------------
# Model. `TDEN` holds the parts that its task needs; a batch is a dictionary of tensors, see `corrupt` and `rows_of`.


class TDEN(nn.Module):
    """Two encoders, a cross-modal encoder, a cross-modal decoder, and the heads of `cfg.task`.

    n_answers: classes of vqa. tokenizer: a data.Tokenizer with a mask token.
    """

    def __init__(self, cfg: Config, tokenizer: data.Tokenizer | None = None, answers: tuple[str, ...] = ()):
        super().__init__()
        self.cfg, self.tokenizer, self.answers = cfg, tokenizer, answers
        sizes = (cfg.width, cfg.heads, cfg.mlp or 4 * cfg.width, cfg.dropout)
        self.tokens, self.region_embedding = TokenEmbedding(cfg), RegionEmbedding(cfg)
        self.object_encoder = nn.ModuleList(EncoderBlock(*sizes) for _ in range(cfg.object_layers))
        self.sentence_encoder = nn.ModuleList(EncoderBlock(*sizes) for _ in range(cfg.sentence_layers))
        understands = cfg.task in ("pretrain", "vqa", "vcr") or not cfg.decoupled
        if cfg.task != "retrieval" and understands:
            self.cross_encoder = nn.ModuleList(UnderstandingBlock(*sizes) for _ in range(cross_depth(cfg)))
        if cfg.task not in ("retrieval", "vcr") and cfg.decoupled:
            self.cross_decoder = nn.ModuleList(GenerationBlock(*sizes) for _ in range(cfg.cross_layers))
        if cfg.task in ("pretrain", "caption", "scst"):
            self.lm_head = Head(cfg.width, cfg.vocab_size)  # OFFICIAL: MLM and MSG share it; HERE[tden-5]: untied
        if cfg.task == "pretrain" and cfg.region_classes:
            self.moc_head = Head(cfg.width, cfg.region_classes)
        if cfg.task in ("pretrain", "retrieval"):
            self.ism = Similarity(cfg)
        if cfg.task in QUESTION_TASKS:
            self.answer_head = AnswerHead(cfg, len(answers) or 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, init_std) for linear layers and embeddings, biases 0, norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.cfg.init_std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    # --- the two encoders

    def see(self, batch) -> list:
        """features [B, N, D_in], locations [B, N, 5], region_keep_mask [B, N] -> [B, N, D] after each object layer."""
        v, states = self.region_embedding(batch["features"], batch["locations"]), []
        for block in self.object_encoder:
            v = v if self.is_skipped(self.cfg.drop_object) else block(v, batch["region_keep_mask"][:, None, None])
            states.append(v)
        return states

    def read(self, ids, types, keep_mask, caches=None, start=0):
        """ids, types [R, T], keep_mask broadcasting to [R, H, T, T] -> [R, T, D] after the last sentence layer."""
        t = self.tokens(ids, types, start)
        for i, block in enumerate(self.sentence_encoder):
            t = t if self.is_skipped(self.cfg.drop_sentence) else block(t, keep_mask, caches and caches[i])
        return t

    def is_skipped(self, probability: float) -> bool:
        """OFFICIAL (layer-drop): in training a block is skipped, and its input stands for its output."""
        return self.training and probability > 0 and bool(torch.rand(()) < probability)

    # --- the cross-modal encoder and decoder

    def understand(self, v, t, keep_mask) -> tuple[list, torch.Tensor]:
        """Regions [R, N, D], words [R, T, D] -> regions after each layer, words after the last."""
        states = []
        for block in self.cross_encoder:
            if not self.is_skipped(self.cfg.drop_cross):
                v, t = block(v, t, keep_mask)
            states.append(v)
        return states, t

    def memory(self, v) -> list:
        """Region states -> keys and values for each layer of the decoder."""
        if not self.cfg.decoupled:
            return [v]
        return [block.cross_att.keys_values(v) for block in self.cross_decoder]

    def generate(self, g, kvs, keep_mask, region_keep_mask, caches=None):
        """Words [R, T, D] and `memory` of B pictures -> [R, T, D] after the last layer of the decoder."""
        if not self.cfg.decoupled:
            return self.generate_shared(g, kvs[0], keep_mask, region_keep_mask)
        for i, block in enumerate(self.cross_decoder):
            g = block(g, kvs[i], keep_mask, region_keep_mask[:, None, None], caches and caches[i])
        return g

    def generate_shared(self, g, v, keep_mask, region_keep_mask):
        """The ablation: the cross-modal encoder under a sequence-to-sequence mask. Regions see regions, words see all
        regions and the words before them."""
        (R, T), N, k = g.shape[:2], v.size(1), len(g) // len(v)
        v, seen = v.repeat_interleave(k, 0), region_keep_mask.repeat_interleave(k, 0)[:, None, None]  # [R, 1, 1, N]
        keep = torch.zeros(R, 1, N + T, N + T, dtype=torch.bool, device=g.device)
        keep[..., :N] = seen
        keep[..., N:, N:] = True if keep_mask is None else keep_mask  # None: a single word
        for block in self.cross_encoder:
            v, g = block(v, g, keep)
        return g

    # --- what each task asks; called through forward, so that DistributedDataParallel sees it

    def forward(self, batch: dict) -> dict:
        if self.cfg.task == "pretrain":
            return self.pretrain(batch)
        if self.cfg.task == "retrieval":
            v, keep_mask = self.see(batch), batch["keep_mask"]
            t = self.read(batch["ids"], torch.zeros_like(batch["ids"]), keep_mask[:, None, None])
            return {"image": self.ism.of_image(v, batch["region_keep_mask"]), "text": self.ism.of_text(t, keep_mask)}
        return self.answer(batch) if self.cfg.task in QUESTION_TASKS else {"logits": self.tell(batch)}

    def pretrain(self, batch: dict) -> dict:
        """A batch of `corrupt` -> logits of MLM, MSG and MOC, only where there is something to predict, [M, V] or
        [M, C]; in the first pass also ISM's embeddings of pictures and texts, [R, P]."""
        v_states = self.see(batch)
        keep, seen = batch["keep_mask"], batch["region_keep_mask"]
        # One set of weights reads both copies: u may look at every word, g at those before it.
        ids, causal = torch.cat([batch["u_ids"], batch["g_ids"]]), causal_mask(keep.size(1), keep.device)
        types = torch.cat([torch.zeros_like(batch["u_ids"]), torch.ones_like(batch["g_ids"])])
        whole = keep[:, None, None].expand(-1, 1, keep.size(1), -1)  # [R, 1, T, T]
        u, g = self.read(ids, types, torch.cat([whole, whole & causal])).chunk(2)

        v_last, t = self.understand(v_states[-1], u, torch.cat([seen, keep], dim=1)[:, None, None])
        # PAPER: messages pass from regions to words alone. OFFICIAL: the memory is what the cross-modal encoder made of
        # the regions, which has read the whole sentence. HERE[tden-1]: the paper's, unless asked for.
        memory = v_last[-1] if self.cfg.decoder_memory == "understanding" else v_states[-1]
        g = self.generate(g, self.memory(memory), whole & causal, seen)
        out = {"mlm": self.lm_head(t[batch["mlm_labels"] != NOTHING]),
               "msg": self.lm_head(g[batch["msg_labels"] != NOTHING])}  # fmt: skip
        if "moc_targets" in batch:
            out["moc"] = self.moc_head(v_last[-1][:, 1:][batch["region_is_masked"]])  # the global region has no class
        if "image_ids" in batch:
            out |= {"image": self.ism.of_image(v_states, seen), "text": self.ism.of_text(u, keep)}
        return out

    def tell(self, batch: dict):
        """Captioning, teacher-forced: ids [R, T] -> logits [M, V] at the real targets, or [R, T, V] without any."""
        kvs = self.memory(self.see(batch)[-1])
        g = self.next_words(batch["ids"], kvs, batch["region_keep_mask"])
        return self.lm_head(g if "targets" not in batch else g[batch["targets"] != NOTHING])

    def next_words(self, ids, kvs, region_keep_mask, caches=None, start=0):
        """ids [R, T], right-padded, so that a causal mask hides all padding -> states [R, T, D] of the next words."""
        keep = causal_mask(ids.size(1), ids.device) if ids.size(1) > 1 else None  # one new token sees all cached ones
        n = len(self.sentence_encoder)
        g = self.read(ids, torch.ones_like(ids), keep, caches and caches[:n], start)
        return self.generate(g, kvs, keep, region_keep_mask, caches and caches[n:])

    def answer(self, batch: dict) -> dict:
        """ids, types, keep_mask [R, T], regions of B pictures -> {"u": [R, answers], and in vqa "g"}, logits."""
        keep, k = batch["keep_mask"], len(batch["ids"]) // len(batch["features"])
        seen = batch["region_keep_mask"].repeat_interleave(k, 0)
        v = self.see(batch)[-1]
        t = self.read(batch["ids"], batch["types"], keep[:, None, None])
        both = torch.cat([seen, keep], dim=1)[:, None, None]
        v_states, u = self.understand(v.repeat_interleave(k, 0), t, both)
        g = None
        if hasattr(self, "cross_decoder"):  # OFFICIAL: here it reads the whole question, like the encoder
            memory = v_states[-1] if self.cfg.decoder_memory == "understanding" else v
            g = self.generate(t, self.memory(memory), keep[:, None, None], batch["region_keep_mask"])
        return self.answer_head(v_states, u, g, seen, keep)

    # --- for users

    @classmethod
    def from_run(cls, source: str, device="cpu") -> TDEN:
        """The model of a run directory (its `best`) or of one of its step_N, ready to caption, score or answer."""
        checkpoint, values = common.find_checkpoint(source, "tden")
        return build(common.config_from(Config, values), None, checkpoint).to(device).eval()

    def caption(self, picture, beam: int = 0) -> str:
        """A caption for one picture: a path, or of a run on scenes SPLIT:NUMBER. beam 0: the run's own."""
        self.need("lm_head", "--task pretrain or caption", "captions")
        return caption_batch(self, self.look(picture), beam or self.cfg.beam)[0]

    def score(self, picture, text: str) -> float:
        """Cosine of picture and text, -1 to 1; texts of one picture can be compared, and pictures for one text."""
        self.need("ism", "--task pretrain or retrieval", "similarities")
        with torch.no_grad():
            return (encode_texts(self, [text]) @ encode_images(self, self.look(picture)).T).item()

    def answer_to(self, picture, question: str) -> str:
        """The most probable answer of a run of --task vqa."""
        self.need("answers", "--task vqa", "answers")
        ids = [self.tokenizer.encode(data.clean_caption(question), self.cfg.max_len)]
        batch = self.look(picture) | data.pad_texts([ids], self.tokenizer.bos, self.tokenizer.eos, self.tokenizer.pad)
        return self.answers[answer_scores(self, batch).argmax().item()]

    def need(self, part: str, task: str, what: str) -> None:
        if not getattr(self, part, None):
            raise UserError(f"this run is of --task {self.cfg.task} and gives no {what}: take a run of {task}")

    def look(self, picture) -> dict:
        """The region tensors of one picture, as a loader's batch has them."""
        found = regions.of_picture(picture, self.cfg.regions, self.cfg.data, self.cfg.world, self.cfg.max_regions)
        return data.pad_regions([found])


def cross_depth(cfg: Config) -> int:
    """Layers of the cross-modal encoder. Where it must do the decoder's work too, it gets the decoder's parameters:
    with inner width F an understanding block has 4 DD + 4 DF of them, a generation block 8 DD + 2 DF."""
    D, inner = cfg.width, cfg.mlp or 4 * cfg.width
    extra = 0 if cfg.decoupled else cfg.cross_layers * (8 * D + 2 * inner) / (4 * D + 4 * inner)
    return cfg.cross_layers + round(extra)


def causal_mask(T: int, device):
    """bool [T, T]: a query sees itself and what comes before."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


# ---------------------------------------------------------------------------------------------------------------------
# Corruption: from a loader's batch to what pre-training reads. All luck comes from one generator.


def sentences(batch: dict, pad: int):
    """Of a loader's captions (ids [CLS] w, targets w [SEP]): ids [CLS] w [SEP] and their keep mask, each [R, T]."""
    is_real = batch["targets"] != NOTHING
    ids = torch.cat([batch["ids"][:, :1], batch["targets"].masked_fill(~is_real, pad)], dim=1)
    return ids, F.pad(is_real, (1, 0), value=True)


def corrupt_words(ids, may_mask, mask: int, vocab_size: int, share: float, luck: torch.Generator):
    """ids [R, T] -> corrupted ids and mlm_labels, the true ids where a word is selected, NOTHING elsewhere.

    may_mask bool [R, T]: no special tokens, no padding. BERT's rule: of the selected words 80 % become `mask`, 10 % any
    token of the vocabulary, 10 % stay.
    """
    is_masked = (torch.rand(ids.shape, generator=luck) < share) & may_mask
    lot = torch.rand(ids.shape, generator=luck)
    others = torch.randint(vocab_size, ids.shape, generator=luck)
    shown = torch.where(lot < 0.8, mask, torch.where(lot < 0.9, others, ids))
    return torch.where(is_masked, shown, ids), ids.masked_fill(~is_masked, NOTHING)


def corrupt_regions(features, boxes, is_masked):
    """Features [R, N, D] with zeros where a region is masked or overlaps a masked one, and how many are zeroed [R].

    boxes [R, N, 4] in pixels. OFFICIAL: overlap is an IoU above 0.4, edges counted as pixels. Nine masked regions of ten
    are to be zeroed, but each overlaps itself wholly, so in effect all are: HERE[tden-4], we zero them all.
    """
    is_zero = is_masked | ((iou(boxes) > 0.4) & is_masked[:, None]).any(2)  # [R, N, N] -> [R, N]
    return features.masked_fill(is_zero[:, :, None], 0.0), is_zero.sum(1)


def iou(boxes):
    """[R, N, 4] x1, y1, x2, y2 -> [R, N, N]; a box of one pixel has x1 = x2, hence the ones."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    shared = (high - low + 1).clamp(min=0).prod(3)
    area = (boxes[..., 2:] - boxes[..., :2] + 1).prod(2)
    return shared / (area[:, :, None] + area[:, None] - shared)


def with_global(features, locations, keep_mask, n) -> dict:
    """Regions of B pictures with the global one before them: the sum of their features over n [B], the whole picture's
    box. -> features [B, 1 + N, D], locations [B, 1 + N, 5], region_keep_mask [B, 1 + N]."""
    whole = features.sum(1, keepdim=True) / n.clamp(min=1)[:, None, None]
    box = torch.tensor([0.0, 0, 1, 1, 1], device=features.device).expand(len(features), 1, 5)
    return {"features": torch.cat([whole, features], dim=1), "locations": torch.cat([box, locations], dim=1),
            "region_keep_mask": F.pad(keep_mask, (1, 0), value=True)}  # fmt: skip


def corrupt(batch: dict, tok: data.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's captions with regions -> what `TDEN.pretrain` reads and its labels, for R pairs:

    u_ids, g_ids, keep_mask [R, T]; mlm_labels, msg_labels [R, T]; features, locations, region_keep_mask of 1 + N
    regions; region_is_masked [R, N] and moc_targets [R, N, C], where the regions have classes; image_ids [R].
    """
    ids, keep = sentences(batch, tok.pad)
    k = len(ids) // len(batch["regions"])  # captions of each picture; each pair has a corruption of its own
    may_mask = keep & (ids != tok.bos) & (ids != tok.eos)
    shown, mlm_labels = corrupt_words(ids, may_mask, tok.mask, cfg.vocab_size, cfg.word_mask, luck)
    regions_of = {name: batch[f"regions{name}"].repeat_interleave(k, 0) for name in ("", "_boxes", "_locations",
                  "_keep_mask", *(["_classes"] if "regions_classes" in batch else []))}  # fmt: skip
    seen = regions_of["_keep_mask"]
    is_masked = (torch.rand(seen.shape, generator=luck) < cfg.region_mask) & seen
    features, n_zeroed = corrupt_regions(regions_of[""], regions_of["_boxes"], is_masked)
    rows = with_global(features, regions_of["_locations"], seen, seen.sum(1) - n_zeroed)
    if "_classes" in regions_of and cfg.region_classes:
        rows |= {"moc_targets": regions_of["_classes"], "region_is_masked": is_masked}
    # PAPER (MSG): the next word of the true sentence, at every position. OFFICIAL: after a corrupted prefix, the same
    # corrupted sentence being the input of both copies.
    msg_labels = F.pad(ids[:, 1:].masked_fill(~keep[:, 1:], NOTHING), (0, 1), value=NOTHING)
    return rows | {"u_ids": shown, "g_ids": shown, "keep_mask": keep, "mlm_labels": mlm_labels,
                   "msg_labels": msg_labels, "image_ids": codes(batch["image_id"], k)}  # fmt: skip


def codes(image_ids: list, k: int):
    """int64 [k * B]: equal where the pictures are."""
    number = {image_id: n for n, image_id in enumerate(dict.fromkeys(image_ids))}
    return torch.tensor([number[image_id] for image_id in image_ids for _ in range(k)])


# ---------------------------------------------------------------------------------------------------------------------
# Losses. Where there is nothing to predict a loss is 0, and still part of the graph.


def loss_mlm(logits, labels):
    """Masked language modelling. logits [M, V] at the selected words, labels [M] -> mean cross-entropy, in nats.
    L = - 1/M sum_m log p(w_m | corrupted sentence, regions)."""
    return F.cross_entropy(logits.float(), labels) if len(labels) else logits.float().sum()


def loss_msg(logits, labels):
    """Masked sentence generation. logits [M, V] at all real positions but the last, labels [M] their next words.
    L = - 1/M sum_t log p(w_t+1 | corrupted w_1 .. w_t, regions)."""
    return F.cross_entropy(logits.float(), labels) if len(labels) else logits.float().sum()


def loss_moc(logits, target_probs):
    """Masked object classification. logits [M, C] at the masked regions, target_probs [M, C] the detector's.
    L = 1/M sum_m KL(target_m || softmax(logits_m)), summed over classes."""
    if not len(logits):
        return logits.float().sum()
    return F.kl_div(logits.float().log_softmax(-1), target_probs, reduction="batchmean")


def loss_ism(text, image, image_ids, margin=0.2, hardest=True):
    """Image-sentence matching. text, image [B, P] of length 1, image_ids [B] -> scalar.

    S_ij = t_i . v_j; L = 1/B [sum_i max_j max(0, margin + S_ij - S_ii) + sum_j max_i max(0, margin + S_ij - S_jj)],
    over pairs of different pictures. OFFICIAL: the negatives are those of one GPU. hardest=False, the first release:
    the mean over the texts' negatives that violate the margin, and that over the pictures'.
    """
    S = text.float() @ image.float().T
    is_same = image_ids[:, None] == image_ids[None]
    by_text = (margin + S - S.diagonal()[:, None]).clamp(min=0).masked_fill(is_same, 0.0)
    by_image = (margin + S - S.diagonal()[None]).clamp(min=0).masked_fill(is_same, 0.0)
    if hardest:
        return (by_text.amax(1).sum() + by_image.amax(0).sum()) / len(S)
    return sum(cost.sum() / (cost > 0).sum().clamp(min=1) for cost in (by_text, by_image))


def loss_answers(logits, targets):
    """VQA. logits, soft targets [B, answers] -> binary cross-entropy, summed over answers, mean over questions."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / len(logits)


def loss_choice(logits, labels):
    """VCR. logits [B, 4], labels [B] -> mean cross-entropy."""
    return F.cross_entropy(logits.float(), labels)


def loss_caption(logits, targets, smoothing=0.0):
    """Captioning. logits [M, V], targets [M] -> mean KL(q || p), where q gives the target 1 - smoothing and every other
    word smoothing / (V - 1). Without smoothing it is the cross-entropy."""
    log_p = logits.float().log_softmax(-1)
    q = torch.full_like(log_p, smoothing / (log_p.size(-1) - 1)).scatter(1, targets[:, None], 1 - smoothing)
    return F.kl_div(log_p, q, reduction="batchmean")


def loss_scst(log_probs, advantages):
    """Self-critical loss (Rennie et al. 2017, arXiv 1612.00563): log p of M sampled tokens, and the advantage of each,
    its caption's reward less that of the greedy caption. L = - 1/M sum_m (r_m - b_m) log p_m."""
    return -(advantages * log_probs).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Step: the two passes


def second_inputs(batch: dict, mlm_logits, msg_logits, mode="argmax", probability=1.0) -> dict:
    """What the second pass reads in place of u_ids and g_ids; logits [M, V] are those of the first pass.

    PAPER (scheduled sampling): the network's own words stand where the masks were. OFFICIAL: in u the word that MLM
    gives there; in g the word that MSG gave one step earlier; all selected places at once, also those that were not
    shown as [MASK], by argmax, from the first step on. HERE[tden-2]: so by default. No gradient flows back.
    """
    is_masked = batch["mlm_labels"] != NOTHING

    def words(logits, is_place):
        p = logits.detach().float().softmax(-1)
        chosen = p.argmax(-1) if mode == "argmax" else torch.multinomial(p, 1)[:, 0] if len(p) else p.new_zeros(0)
        return torch.zeros_like(batch["u_ids"]).masked_scatter(is_place, chosen.long())

    in_u, told = words(mlm_logits, is_masked), words(msg_logits, batch["msg_labels"] != NOTHING)
    in_g = F.pad(told[:, :-1], (1, 0))  # what was said at t - 1 stands at t
    if probability < 1:
        is_masked = is_masked & (torch.rand(is_masked.shape, device=is_masked.device) < probability)
    return {"u_ids": torch.where(is_masked, in_u, batch["u_ids"]), "g_ids": torch.where(is_masked, in_g, batch["g_ids"])}


def rows_of(batch: dict, task: str, tok: data.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's batch -> the tensors of a training step, inputs and labels, for any task."""
    if task == "pretrain":
        return corrupt(batch, tok, cfg, luck)
    rows = with_regions(batch, cfg)
    if task in QUESTION_TASKS:
        rows |= {"ids": batch["ids"], "types": batch["segments"], "keep_mask": batch["keep_mask"]}
        return rows | {name: batch[name] for name in ("targets", "labels") if name in batch}
    if task == "retrieval":
        ids, keep = sentences(batch, tok.pad)
        k = len(ids) // len(batch["regions"])
        return rows | {"ids": ids, "keep_mask": keep, "image_ids": codes(batch["image_id"], k)}
    return rows | {"ids": batch["ids"], "targets": batch["targets"]}


def counts(task: str, rows: dict) -> dict:
    """{loss: over how many targets it is the mean}."""
    if task == "pretrain":
        found = {"mlm": (rows["mlm_labels"] != NOTHING).sum(), "msg": (rows["msg_labels"] != NOTHING).sum()}
        found |= {"moc": rows["region_is_masked"].sum()} if "moc_targets" in rows else {}
        return found | ({"ism": len(rows["u_ids"])} if "image_ids" in rows else {})
    if task in ("caption", "scst"):
        return {task: (rows["targets"] != NOTHING).sum()}
    return dict.fromkeys({"retrieval": ["ism"], "vqa": ["u", "g"], "vcr": ["choice"]}[task], len(rows["features"]))


def losses(cfg: Config, out: dict, rows: dict) -> dict:
    """{loss: scalar}, in the order of `counts`; their sum, each with weight 1, is what is minimised."""
    if cfg.task == "pretrain":
        is_word, is_next = rows["mlm_labels"] != NOTHING, rows["msg_labels"] != NOTHING
        found = {"mlm": loss_mlm(out["mlm"], rows["mlm_labels"][is_word]),
                 "msg": loss_msg(out["msg"], rows["msg_labels"][is_next])}  # fmt: skip
        if "moc_targets" in rows:
            found["moc"] = loss_moc(out["moc"], rows["moc_targets"][rows["region_is_masked"]])
        if "image_ids" in rows:
            found["ism"] = loss_ism(out["text"], out["image"], rows["image_ids"], cfg.margin, cfg.hardest)
        return found
    if cfg.task == "retrieval":  # OFFICIAL: here a sum over the pairs, which matters to the clipping of its gradient
        hinge = loss_ism(out["text"], out["image"], rows["image_ids"], cfg.margin, cfg.hardest)
        return {"ism": hinge * cfg.batch if cfg.hardest else hinge}
    if cfg.task == "vqa":
        return {name: loss_answers(out[name], rows["targets"]) for name in ("u", "g") if name in out}
    if cfg.task == "vcr":
        return {"choice": loss_choice(out["u"].view(-1, 4), rows["labels"])}
    targets = rows["targets"][rows["targets"] != NOTHING]
    if cfg.task == "caption":
        return {"caption": loss_caption(out["logits"], targets, cfg.label_smoothing)}
    log_p = out["logits"].float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return {"scst": loss_scst(log_p, rows["advantages"][:, None].expand_as(rows["targets"])[rows["targets"] != NOTHING])}


# ---------------------------------------------------------------------------------------------------------------------
# Heads of the downstream tasks


class Similarity(nn.Module):
    """ISM and retrieval: two towers, no cross-modal layer. Pictures and texts become vectors of length 1."""

    def __init__(self, cfg: Config):
        super().__init__()
        sizes = (cfg.width, cfg.pooled, cfg.dropout)
        self.words = AttentionPooler(*sizes, batch_norm=True)
        self.regions = nn.ModuleList(AttentionPooler(*sizes, batch_norm=True) for _ in range(cfg.object_layers))

    def of_image(self, v_states, keep_mask):
        """Regions after each layer of the object encoder -> [B, P]: sum over the layers / sqrt(their number)."""
        pooled = [pool(v, keep_mask) for pool, v in zip(self.regions, v_states, strict=True)]
        return F.normalize(sum(pooled) / math.sqrt(len(pooled)), dim=-1)

    def of_text(self, t, keep_mask):
        """Words after the sentence encoder, the understanding copy -> [R, P]."""
        return F.normalize(self.words(t, keep_mask), dim=-1)


class AnswerHead(nn.Module):
    """VQA and VCR. u: (sum over the cross-modal encoder's layers of the pooled regions) x pooled words; g, of vqa
    alone: the decoder's words, pooled. Each: LayerNorm, linear -> logits."""

    def __init__(self, cfg: Config, n: int):
        super().__init__()
        pooled = cfg.width if cfg.task == "vqa" else cfg.pooled
        sizes = (cfg.width, pooled, cfg.dropout)
        self.words = AttentionPooler(*sizes)
        self.regions = nn.ModuleList(AttentionPooler(*sizes) for _ in range(cross_depth(cfg)))
        self.u = nn.Sequential(nn.LayerNorm(pooled, eps=EMBED_EPS), nn.Linear(pooled, n))
        if cfg.task == "vqa" and cfg.decoupled:
            self.told = AttentionPooler(*sizes)
            self.g = nn.Sequential(nn.LayerNorm(pooled, eps=EMBED_EPS), nn.Linear(pooled, n))

    def forward(self, v_states, u, g, region_keep_mask, keep_mask) -> dict:
        v = sum(pool(v, region_keep_mask) for pool, v in zip(self.regions, v_states, strict=True))
        out = {"u": self.u(v * self.words(u, keep_mask))}
        return out | ({"g": self.g(self.told(g, keep_mask))} if g is not None else {})


def join_objects(batch: dict, most: int) -> dict:
    """VCR: detected regions and those of the tagged objects in one list, as `with_global` gives it.

    OFFICIAL: objects have priority and come last, at most `most` of them; the global region and the first detected ones
    fill the list up to 1 + most. The global feature is the mean of both lists' own, weighted by their rows, of which
    the global one is one.
    """
    lists = {"features": [], "locations": []}
    for i in range(len(batch["regions"])):
        n, m = int(batch["regions_keep_mask"][i].sum()), int(batch["objects_keep_mask"][i].sum())
        kept = min(m, most)
        for name, end in (("features", ""), ("locations", "_locations")):
            detected, tagged = batch[f"regions{end}"][i, :n], batch[f"objects{end}"][i, :m]
            first = torch.tensor([[0.0, 0, 1, 1, 1]])
            if name == "features":
                first = (((n + 1) * detected.mean(0) + (m + 1) * tagged.mean(0)) / (n + m + 2))[None]
            lists[name].append(torch.cat([first, detected[: most - kept], tagged[:kept]]))
    lengths = torch.tensor([len(row) for row in lists["features"]])
    padded = {name: nn.utils.rnn.pad_sequence(rows, batch_first=True) for name, rows in lists.items()}
    return padded | {"region_keep_mask": torch.arange(int(lengths.max())) < lengths[:, None]}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """What `beam_search` drives: R = B * beam captions grow by one token a step.

    Keys and values of earlier tokens are cached, those of the regions are made once and shared by a picture's beams.
    `cached=False` recomputes the whole prefix at every step: slower, and there to prove that nothing changes.
    """

    def __init__(self, model: TDEN, batch: dict, cached=True):
        self.model, self.keep_mask = model, batch["region_keep_mask"]
        self.kvs = model.memory(model.see(batch)[-1])
        layers = len(model.sentence_encoder) + model.cfg.cross_layers
        self.caches = [{} for _ in range(layers)] if cached and model.cfg.decoupled else None

    def step(self, ids):
        """ids [R, t], everything so far -> logits [R, V] of the next token."""
        start = ids.size(1) - 1 if self.caches else 0
        g = self.model.next_words(ids[:, start:], self.kvs, self.keep_mask, self.caches, start)
        return self.model.lm_head(g[:, -1])

    def reorder(self, rows):
        for cache in self.caches or []:
            cache["kv"] = cache["kv"].index_select(1, rows)


@torch.no_grad()
def beam_search(decoder, B: int, beam: int, bos: int, eos: int, max_new: int, device="cpu"):
    """(ids, log_probs), each [B, max_new]: the caption with the highest sum of log p; after `eos` both are 0.

    OFFICIAL (decode_strategy/beam_searcher.py): a finished caption stays among the beams, with one continuation that
    costs nothing, and can be pushed out by better unfinished ones; no length penalty. That is why it is not the search
    of eval.py, which keeps what is finished. Beam 1 is greedy decoding.
    """
    ids = torch.full((B * beam, 1), bos, device=device)
    log_probs = torch.zeros(B * beam, 0, device=device)
    total = torch.full((B, beam), -math.inf, device=device)
    total[:, 0] = 0.0  # at first all beams are the same
    is_live = torch.ones(B, beam, dtype=torch.bool, device=device)
    blocks = torch.arange(B, device=device)[:, None] * beam
    for _ in range(max_new):
        log_p = decoder.step(ids).float().log_softmax(-1).view(B, beam, -1)
        stay = F.one_hot(torch.zeros((), dtype=torch.long, device=device), log_p.size(2)).float().log()  # [0, -inf ...]
        log_p = torch.where(is_live[:, :, None], log_p, stay)
        total, choice = (total[:, :, None] + log_p).flatten(1).topk(beam)  # best first
        parent, token = choice // log_p.size(2), choice % log_p.size(2)
        rows = (blocks + parent).flatten()
        if beam > 1:
            decoder.reorder(rows)
        ids = torch.cat([ids[rows], token.view(-1, 1)], dim=1)
        log_probs = torch.cat([log_probs[rows], log_p.flatten(1).gather(1, choice).view(-1, 1)], dim=1)
        is_live = is_live.gather(1, parent) & (token != eos)
        if not is_live.any():
            break
    best = blocks[:, 0] + total.argmax(1)
    missing = max_new + 1 - ids.size(1)
    return F.pad(ids[best, 1:], (0, missing)), F.pad(log_probs[best], (0, missing))


@torch.no_grad()
def caption_batch(model: TDEN, batch: dict, beam=1) -> list[str]:
    """A loader's regions of B pictures -> B captions: greedy (beam 1) or beam search."""
    tok, batch = model.tokenizer, on_device(with_regions(batch, model.cfg), model)
    ids, _ = beam_search(Decoder(model, batch), len(batch["features"]), beam, tok.bos, tok.eos, model.cfg.max_new,
                         batch["features"].device)  # fmt: skip
    return [" ".join(tok.decode(row).split()) for row in ids.tolist()]


def encode_images(model: TDEN, batch: dict):
    """A loader's regions of B pictures -> [B, P] of length 1."""
    batch = on_device(with_regions(batch, model.cfg), model)
    return model.ism.of_image(model.see(batch), batch["region_keep_mask"])


def encode_texts(model: TDEN, texts: list[str]):
    """Texts as written -> [R, P] of length 1."""
    tok = model.tokenizer
    rows = [[tok.encode(data.clean_caption(text), model.cfg.max_len)] for text in texts]
    batch = on_device(data.pad_texts(rows, tok.bos, tok.eos, tok.pad), model)
    t = model.read(batch["ids"], torch.zeros_like(batch["ids"]), batch["keep_mask"][:, None, None])
    return model.ism.of_text(t, batch["keep_mask"])


@torch.no_grad()
def answer_scores(model: TDEN, batch: dict):
    """A loader's questions -> [B, answers], of VCR [B, 4]. OFFICIAL: argmax of softmax(u) + softmax(g)."""
    rows = with_regions(batch, model.cfg) | {"ids": batch["ids"], "types": batch["segments"],
                                             "keep_mask": batch["keep_mask"]}  # fmt: skip
    out = model.answer(on_device(rows, model))
    if model.cfg.task == "vcr":
        return out["u"].float().view(-1, 4)
    return sum(logits.float().softmax(-1) for logits in out.values())


def with_regions(batch: dict, cfg: Config) -> dict:
    """The regions of a loader's batch as the model reads them, uncorrupted."""
    if "objects" in batch:
        return join_objects(batch, cfg.max_regions)
    keep = batch["regions_keep_mask"]
    return with_global(batch["regions"], batch["regions_locations"], keep, keep.sum(1))


def on_device(rows: dict, model: TDEN) -> dict:
    device = next(model.parameters()).device
    return {name: x.to(device, non_blocking=True) for name, x in rows.items() if isinstance(x, torch.Tensor)}


# ---------------------------------------------------------------------------------------------------------------------
# Official weights: YehLi/xmodaler's checkpoints, and BERT. A part (a child of TDEN) is filled whole, or starts fresh
# where the file has nothing of it; every key is used, or belongs to a part that this task does without.


def official_modules(cfg: Config) -> dict:
    """Our module -> xmodaler's, for the parts of all tasks; a list where two linear layers of theirs are one of ours."""
    names = {"tokens.word": "token_embed.embeddings", "tokens.position": "token_embed.embeddings_pos.position_embeddings",
             "tokens.segment": "token_embed.embeddings_token_type", "tokens.norm": "token_embed.embeddings_norm",
             "region_embedding.feature": "visual_embed.embeddings", "region_embedding.norm": "visual_embed.embeddings_norm",
             "region_embedding.location": "visual_embed.embeddings_pos"}  # fmt: skip

    def attention(ours: str, theirs: str):
        names.update({f"{ours}.q": f"{theirs}.self.query", f"{ours}.kv": [f"{theirs}.self.{x}" for x in ("key", "value")],
                      f"{ours}.out": f"{theirs}.output.dense", f"{ours}.norm": f"{theirs}.output.LayerNorm"})  # fmt: skip

    def feed_forward(ours: str, theirs: str):
        names.update({f"{ours}.up": f"{theirs}intermediate.dense", f"{ours}.down": f"{theirs}output.dense",
                      f"{ours}.norm": f"{theirs}output.LayerNorm"})  # fmt: skip

    def pooler(ours: str, theirs: str):
        names.update({f"{ours}.weigh.0": f"{theirs}.att.0", f"{ours}.weigh.3": f"{theirs}.att.3",
                      f"{ours}.embed": f"{theirs}.embed", f"{ours}.norm": f"{theirs}.bn"})  # fmt: skip

    for ours, theirs, depth in (("sentence_encoder", "encoder.layers", cfg.sentence_layers),
                                ("object_encoder", "encoder.v_layers", cfg.object_layers)):  # fmt: skip
        for i in range(depth):
            attention(f"{ours}.{i}.att", f"{theirs}.{i}.attention")
            feed_forward(f"{ours}.{i}.ffn", f"{theirs}.{i}.")
    for i in range(cfg.cross_layers):
        u, g = f"decoder.u_layers.{i}", f"decoder.g_layers.{i}"
        attention(f"cross_encoder.{i}.att", f"{u}.biattention")
        feed_forward(f"cross_encoder.{i}.ffn_regions", f"{u}.v_")
        feed_forward(f"cross_encoder.{i}.ffn_words", f"{u}.t_")
        attention(f"cross_decoder.{i}.self_att", f"{g}.self_attn")
        attention(f"cross_decoder.{i}.cross_att", f"{g}.x_att")
        feed_forward(f"cross_decoder.{i}.ffn", f"{g}.")
        pooler(f"answer_head.regions.{i}", f"predictor.v_pooler.{i}")
    for ours, theirs in (("lm_head", "predictor"), ("moc_head", "v_predictor")):
        names |= {f"{ours}.dense": f"{theirs}.transform.dense", f"{ours}.norm": f"{theirs}.transform.LayerNorm",
                  f"{ours}.out": f"{theirs}.decoder"}  # fmt: skip
    pooler("ism.words", "similarity_predictor.t_pooler")
    for i in range(cfg.object_layers):
        pooler(f"ism.regions.{i}", f"similarity_predictor.v_pooler.{i}")
    pooler("answer_head.words", "predictor.u_pooler"), pooler("answer_head.told", "predictor.g_pooler")
    return names | {f"answer_head.{x}.{i}": f"predictor.{x}_logits.{i}" for x in "ug" for i in (0, 1)}


def official_names(model: TDEN) -> dict:
    """Our name of each tensor -> xmodaler's, or a list to be concatenated."""
    modules, names = official_modules(model.cfg), {}
    for ours in model.state_dict():
        module, tensor = ours.rsplit(".", 1)
        theirs = modules[module]
        names[ours] = f"{theirs}.{tensor}" if isinstance(theirs, str) else [f"{one}.{tensor}" for one in theirs]
    return names


def official_sizes(state: dict) -> dict:
    """Config fields from the shapes in a state dict of xmodaler's; heads are 64 wide."""
    def depth(prefix: str) -> int:
        return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)), default=-1)

    if "token_embed.embeddings.weight" not in state:
        raise UserError(f"no checkpoint of xmodaler's TDEN: its first keys are {', '.join(list(state)[:3])}")
    vocab_size, width = state["token_embed.embeddings.weight"].shape
    sizes = dict(
        vocab_size=vocab_size, width=width, heads=max(1, width // 64), decoder_memory="understanding",
        positions=len(state["token_embed.embeddings_pos.position_embeddings.weight"]),
        mlp=len(state["encoder.layers.0.intermediate.dense.weight"]),
        feature_dim=state["visual_embed.embeddings.weight"].size(1), sentence_layers=depth("encoder.layers."),
        object_layers=depth("encoder.v_layers."),
    )  # fmt: skip
    if layers := max(depth("decoder.u_layers."), depth("decoder.g_layers.")):
        sizes["cross_layers"] = layers
    if "v_predictor.decoder.weight" in state:
        sizes["region_classes"] = len(state["v_predictor.decoder.weight"])
    if "similarity_predictor.t_pooler.embed.weight" in state:
        sizes["pooled"] = len(state["similarity_predictor.t_pooler.embed.weight"])
    return sizes


def load_parts(model: TDEN, state: dict, names: dict, not_used: tuple, what: str) -> str:
    """Fill the parts of which `state` has something; the others keep their first weights. Returns a sentence about it.

    names: ours -> theirs. A part that is there must be whole and every key known: otherwise UserError, with lists.
    """
    keys = {ours: theirs if isinstance(theirs, str) else theirs[0] for ours, theirs in names.items()}
    there = {ours.split(".")[0] for ours, theirs in keys.items() if theirs in state}
    fresh = [name for name, _ in model.named_children() if name not in there]
    if not there:
        raise UserError(f"{what} has nothing for this model; its first keys are {', '.join(list(state)[:3])}")
    kept = {ours: theirs for ours, theirs in names.items() if ours.split(".")[0] in there}
    common.load_renamed(model, state, kept, not_used, what, may_lack=tuple(f"{name}." for name in fresh))
    used = {key for theirs in kept.values() for key in ([theirs] if isinstance(theirs, str) else theirs)}
    left = sorted({key.split(".")[0] for key in state} - {key.split(".")[0] for key in used})
    told = [("has", sorted(there)), ("new here", fresh), ("not used", left)]
    return f"{what}: " + "; ".join(f"{title} {', '.join(parts)}" for title, parts in told if parts)


def load_official(model: TDEN, state: dict) -> str:
    """A state dict of xmodaler's, of any of its five models, into a model of any task; see `load_parts`."""
    theirs = official_modules(model.cfg).values()
    known = [f"{name}." for names in theirs for name in ([names] if isinstance(names, str) else names)]
    not_used = (*known, "predictor.bias")  # that of predictor.decoder once more, under a second name
    return load_parts(model, state, official_names(model), not_used, "xmodaler's TDEN")


def load_bert(model: TDEN, state: dict) -> str:
    """BERT's weights, with its masked-language head or without, old and new names of LayerNorm's parameters.

    HERE[tden-7] (not in the paper): the conversion that xmodaler starts from is not published; this one is by meaning.
    The third type starts as the first (first release), the untied LM matrix as the word embeddings.
    """
    state = {key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta",
             "LayerNorm.bias"): value for key, value in state.items()}  # fmt: skip
    types = "embeddings.token_type_embeddings.weight"
    if types in state:
        state[types] = torch.cat([state[types], state[types][:1]])[:3]
    head = {"lm_head.dense": "cls.predictions.transform.dense", "lm_head.norm": "cls.predictions.transform.LayerNorm"}
    modules = {"tokens.word": "embeddings.word_embeddings", "tokens.position": "embeddings.position_embeddings",
               "tokens.segment": "embeddings.token_type_embeddings", "tokens.norm": "embeddings.LayerNorm"}  # fmt: skip
    for ours, theirs in official_modules(model.cfg).items():
        if ours.startswith("sentence_encoder."):
            under = [theirs] if isinstance(theirs, str) else theirs
            new = [name.replace("encoder.layers.", "encoder.layer.") for name in under]
            modules[ours] = new[0] if isinstance(theirs, str) else new
    has_head = "cls.predictions.bias" in state and hasattr(model, "lm_head")
    modules |= head if has_head else {}
    names = {"lm_head.out.weight": "embeddings.word_embeddings.weight", "lm_head.out.bias": "cls.predictions.bias"}
    names = names if has_head else {}
    for ours in model.state_dict():
        module, tensor = ours.rsplit(".", 1)
        if module in modules:
            theirs = modules[module]
            names[ours] = f"{theirs}.{tensor}" if isinstance(theirs, str) else [f"{one}.{tensor}" for one in theirs]
    not_used = ("pooler.", "cls.", "embeddings.position_ids")
    return load_parts(model, state, names, not_used, "BERT")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build(cfg: Config, corpus, checkpoint: Path | None = None) -> TDEN:
    """The model with its tokenizer and first weights: a run's, official ones, or random ones.

    Official weights bring their sizes along, so cfg is changed here to what was really built.
    """
    official = common.read_tensors(Path(cfg.init)) if Path(cfg.init).is_file() and not checkpoint else None
    bert = common.read_weights(cfg.bert) if cfg.bert != "none" and not checkpoint and official is None else None
    if official is not None:
        official = official.get("model", official)
        sizes = official_sizes(official)
        if cfg.feature_dim not in (0, sizes["feature_dim"]):
            raise UserError(f"{cfg.init} reads region features of {sizes['feature_dim']} numbers, those of the data have "
                            f"{cfg.feature_dim}: extract bottom-up attention's, or train without --init")  # fmt: skip
    elif bert:
        names = dict(vocab_size="vocab_size", width="hidden_size", heads="num_attention_heads", mlp="intermediate_size",
                     sentence_layers="num_hidden_layers", positions="max_position_embeddings")  # fmt: skip
        sizes = {ours: bert[0][theirs] for ours, theirs in names.items() if theirs in bert[0]}
    else:
        sizes = {}
    for name, value in sizes.items():
        setattr(cfg, name, value)
    check(cfg)
    if checkpoint:
        tokenizer = data.Tokenizer.load(checkpoint)
    elif cfg.tokenizer != "none" or cfg.bert != "none":
        tokenizer = data.Tokenizer.from_pretrained(cfg.tokenizer if cfg.tokenizer != "none" else cfg.bert)
    else:
        tokenizer = data.Tokenizer.train(texts_of(cfg, corpus), cfg.vocab_size, "wordpiece")
    if not sizes and not checkpoint:
        cfg.vocab_size = tokenizer.vocab_size
    elif tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} entries, the word embedding {cfg.vocab_size}")
    if tokenizer.mask is None:
        raise UserError("this tokenizer has no mask token, which pre-training shows: take BERT's")
    answers = corpus.answers if corpus else ()
    if checkpoint and (file := checkpoint.parent / "answers.json").is_file() and cfg.task == "vqa":
        answers = tuple(common.read_json(file))
    model, told = TDEN(cfg, tokenizer, tuple(answers)), ""
    if checkpoint and common.read_json(checkpoint.parent / "config.json")["task"] == cfg.task:
        common.load_model_weights(model, checkpoint)
    elif checkpoint:
        state = common.read_tensors(checkpoint / "model.safetensors")
        parts = ("ism.", "lm_head.", "moc_head.", "answer_head.", "cross_encoder.", "cross_decoder.")
        told = load_parts(model, state, {name: name for name in model.state_dict()}, parts, str(checkpoint))
    elif official is not None:
        told = load_official(model, official)
    elif bert:
        told = load_bert(model, bert[1])
    if corpus and told:
        corpus.notes.append(told)
    return model


def texts_of(cfg: Config, corpus):
    """What a tokenizer is trained on: the training split's texts; of scenes those of all tasks, so that fine-tuning
    knows its words, as with BERT's vocabulary."""
    splits = [corpus.splits["train"][:20000]]
    if cfg.data == "scenes":
        splits += [corpora.load("scenes", task=task, world=cfg.world, n_train=2000).splits["train"]
                   for task in ("caption", "vqa", "vcr")]  # fmt: skip
    for items in splits:
        for item in items:
            if hasattr(item, "captions"):
                yield from map(data.clean_caption, item.captions)
            elif hasattr(item, "rationales"):
                yield from (str(text).lower() for text in (item.question, *item.answers, *item.rationales))
            else:
                yield data.clean_caption(item.text)


def train_loaders(cfg: Config, model: TDEN, corpus, machine, start: int) -> list:
    """One loader; of vcr two, as an iteration is a batch of question -> answer and one of -> rationale."""
    items, tok, pictures = corpus.splits["train"], model.tokenizer, cfg.batch // per_picture(cfg)
    more = dict(train=True, regions=corpus.regions)
    if cfg.task == "vcr":
        sets = [data.Choices(items, tok, 0, task=task, max_len=most, mirror=cfg.mirror, seed=cfg.seed + n, **more)
                for n, (task, most) in enumerate((("qa", cfg.max_len), ("qar", cfg.max_len_rationale)))]  # fmt: skip
    elif cfg.task == "vqa":
        sets = [data.Examples(items, tok, 0, answers=model.answers, max_len=cfg.max_len, mirror=cfg.mirror,
                              seed=cfg.seed, **more)]  # fmt: skip
    else:
        sets = [data.Pictures(items, tok, 0, captions=per_picture(cfg), max_len=cfg.max_len, seed=cfg.seed, **more)]
    return [data.train_loader(one, pictures, machine.workers, machine.rank, machine.processes, cfg.seed + n, start,
                              cfg.steps, pin=machine.device.type == "cuda") for n, one in enumerate(sets)]  # fmt: skip


def per_picture(cfg: Config) -> int:
    """Pairs that a picture makes in a step."""
    return 1 if cfg.task in QUESTION_TASKS else cfg.captions_per_image


def rate(cfg: Config, step: int) -> float:
    """Share of the peak learning rate at a step; both updates of an iteration have the same."""
    if cfg.drops:
        drops = [float(share) for share in cfg.drops.split(",")]
        return common.step_schedule(step, cfg.steps, cfg.warmup, drops, cfg.drop_factor)
    return common.linear_schedule(step, cfg.steps, cfg.warmup)


@torch.no_grad()
def sample_captions(cfg: Config, model: TDEN, batch: dict, cider: scoring.CiderReward, machine, seed: int) -> dict:
    """Self-critical training, first half: k captions for each of the B pictures that the model draws itself -> ids and
    targets [B * k, T] in the loader's form, and advantages [B * k]: CIDEr-D less that of the greedy caption.
    HERE[tden-10]: no dropout, here and in the step, so that log p is the sampler's own."""
    tok, k, B = model.tokenizer, cfg.captions_per_image, len(batch["features"])

    def rewards_of(ids, image_ids):
        # A caption that was cut off lacks the end token that all references have, so breaking off does not pay.
        return cider.reward(image_ids, [tok.decode(row) for row in ids.tolist()], (ids == tok.eos).any(1).tolist())

    luck = torch.Generator(machine.device).manual_seed(seed)
    with machine.autocast():
        words, _ = scoring.sample(Decoder(model, batch), B * k, tok.bos, tok.eos, cfg.max_new, luck)
        best, _ = beam_search(Decoder(model, batch), B, 1, tok.bos, tok.eos, cfg.max_new, machine.device)
    r = rewards_of(words, [i for i in batch["picture"] for _ in range(k)])
    b = rewards_of(best, batch["picture"])
    is_real = up_to_end(words, tok.eos)
    T = int(is_real.sum(1).max())
    return {"ids": F.pad(words[:, : T - 1], (1, 0), value=tok.bos),
            "targets": words.masked_fill(~is_real, NOTHING)[:, :T],
            "advantages": torch.from_numpy(r - b.repeat(k)).float().to(machine.device)}  # fmt: skip


def up_to_end(ids, eos: int):
    """bool like ids [R, T]: True up to the first end token, which counts."""
    is_end = ids == eos
    return is_end.cumsum(1) - is_end.long() == 0


def micro_batches(rows: dict, cfg: Config) -> list[dict]:
    """The tensors of a step in pieces of --micro-batch pairs, but never less than a picture."""
    B = len(rows["features"])
    pictures = max(1, cfg.micro_batch * B // max(map(len, rows.values()))) if cfg.micro_batch else B
    cut = {name: x.split(pictures * (len(x) // B)) for name, x in rows.items()}
    return [dict(zip(cut, piece, strict=True)) for piece in zip(*cut.values(), strict=True)]


def train(cfg: Config, model: TDEN, corpus, machine, run, checkpoint: Path | None = None) -> None:
    """The loop. `checkpoint`: go on from its step with its optimizer; all that is random follows from seed and step."""
    model.to(machine.device)
    optimizer = common.adamw(model, lambda name: cfg.lr, cfg.weight_decay, (0.9, cfg.beta2), all_matrices=True)
    start, best, train_items = 0, -1.0, corpus.splits["train"]
    if checkpoint:
        meta = common.load_training_state(checkpoint, optimizer)
        start, best = meta["step"], meta["best"]
        if machine.is_main:
            run.forget_after(start)
    is_scst = cfg.task == "scst"
    cider = scoring.CiderReward({item.image_id: item.captions for item in train_items}) if is_scst else None
    loaders = train_loaders(cfg, model, corpus, machine, start)
    batches = [iter(loader) for loader in loaders]
    turns = {"pretrain": ["", "_2"][: cfg.passes], "vcr": ["_qa", "_qar"]}.get(cfg.task, [""])
    log = common.Logger(run, machine, cfg.steps, cfg.log_every, start)
    log.flops_per_item = flops_per_pair(cfg, model)
    ddp = common.spread(model, cfg, machine, (EncoderBlock, UnderstandingBlock, GenerationBlock), find_unused=True)
    if checkpoint and meta.get("is_due"):  # saved, but stopped before its evaluation was over
        best = validate(cfg, model, corpus, machine, run, log, start, best)
    with common.StopRequest() as stop, contextlib.ExitStack() as closing:
        for stream in batches:
            closing.callback(stream.close)
        for step in range(start, cfg.steps):
            model.train(not is_scst)
            seed = (cfg.seed * machine.processes + machine.rank) * 1_000_003 + step
            torch.manual_seed(seed)  # of dropout, and of what the second pass draws
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(cfg, step)
            logged, to_stop, image_ids = {}, False, []
            for turn, ending in enumerate(turns):
                if turn < len(loaders):  # pre-training's second pass reads the batch of the first once more
                    with log.waiting():
                        batch = next(batches[turn])
                    image_ids = batch["image_id"]
                    rows = rows_of(batch, cfg.task, model.tokenizer, cfg, torch.Generator().manual_seed(seed))
                    rows = {name: x.to(machine.device, non_blocking=True) for name, x in rows.items()}
                    if is_scst:  # the loader's captions make way for the model's own
                        rows |= sample_captions(cfg, model, rows | {"picture": image_ids}, cider, machine, seed)
                    here = counts(cfg.task, rows)
                    told = [*here.values(), len(batch["bad"]), stop.signum > 0]
                    *sums, bad_in_all, stops = common.sum_over_processes(told, machine.device)
                    in_all, to_stop = dict(zip(here, sums, strict=True)), to_stop or stops > 0
                    if bad_in_all:
                        loaders[turn].judge(common.gather_lists(batch["bad"]))
                    pieces = micro_batches(rows, cfg)
                is_update = cfg.two_updates or cfg.task != "pretrain" or turn + 1 == len(turns)
                for i, piece in enumerate(pieces):
                    # Each loss is the mean over all its targets of the global batch, however it is cut; DDP averages
                    # gradients over processes, hence the factor. ISM's negatives are those of the piece.
                    with common.synchronised(ddp, is_update and i + 1 == len(pieces)):
                        with machine.autocast():
                            out = ddp(piece)
                        n, found = counts(cfg.task, piece), losses(cfg, out, piece)
                        parts = {name: loss * (float(n[name]) / max(1.0, in_all[name])) for name, loss in found.items()}
                        (sum(parts.values()) * machine.processes).backward()
                    for name, part in parts.items():
                        logged[name + ending] = logged.get(name + ending, 0.0) + part.detach()
                    if cfg.task == "pretrain" and turn + 1 < len(turns):
                        piece |= second_inputs(piece, out["mlm"], out["msg"], cfg.ss_mode, cfg.ss_prob)
                        del piece["image_ids"]  # OFFICIAL: there is no ISM in the second pass
                if is_update:
                    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
                    common.stop_if_not_finite(norm, sum(logged.values()), image_ids, step + 1, run)
                    if cfg.grad_clip_value:
                        nn.utils.clip_grad_value_(model.parameters(), cfg.grad_clip_value)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            log.step(step + 1, logged, cfg.lr * rate(cfg, step), norm, cfg.batch)
            is_due = (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps
            with log.pause():
                if is_due or to_stop:
                    common.share_buffers(model)
                if (is_due or to_stop) and machine.is_main:
                    run.save(step + 1, model, model.tokenizer, optimizer, {"val": {}, "best": best, "is_due": is_due})
                if is_due:
                    best = validate(cfg, model, corpus, machine, run, log, step + 1, best)
            if to_stop:
                raise common.stopped(run, machine, stop.signum or 15)
        if any(common.sum_over_processes([stop.signum > 0], machine.device)):  # heard in the last step
            raise common.stopped(run, machine, stop.signum or 15)
    log.close()
    if machine.is_main and (bad := sum(len(loader.bad) for loader in loaders)):
        print(f"{bad} training pictures could not be read and were skipped")


def flops_per_pair(cfg: Config, model: TDEN) -> float:
    """Floating-point operations of a training iteration per pair, for the MFU: 6 x parameters x tokens, a text counted
    at 12 tokens, a picture at 20 regions; attention itself left out, embeddings too."""
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    words = 12 * (size["sentence_encoder"] * (1 + (cfg.task == "pretrain")) + size.get("cross_decoder", 0)
                  + size.get("cross_encoder", 0) / 2 + size.get("lm_head", 0) * (1 + 0.15 * (cfg.task == "pretrain")))
    seen = 20 * (size["object_encoder"] + size.get("cross_encoder", 0) / 2)
    return 6 * (words + seen) * (cfg.passes if cfg.task == "pretrain" else 1)


def validate(cfg, model, corpus, machine, run, log, step: int, best: float) -> float:
    """The task's metric on the first val samples; moves `best` if it is; returns the best so far.

    step_N is saved already: what fails here costs nothing, and --resume begins with it.
    """
    val, items = {}, list(corpus.splits.get("val", [])[: max(1, cfg.val_items)])
    name = BEST_BY[cfg.task]
    if items:
        val = val_metrics(cfg, model, corpus, items, machine)
        value = common.share_from_main(val.get(name))
    is_best = value >= best if items else True  # without a val split the last is the best
    best = max(best, value) if items else best
    if machine.is_main:
        if val:
            shown = "  ".join(f"{k} {v:.3f}" for k, v in val.items() if k in (name, "BLEU_4", "caption_true", "true@1"))
            log.say(f"val at step {step}: {shown}" + ("  (best so far)" if is_best else ""))
            run.log({"step": step, **{f"val_{k}": v for k, v in val.items()}})
        run.evaluated(step, {"val": val, "best": best, "is_due": False}, is_best)
    common.wait_for_all()
    return best


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

BEST_BY = {"pretrain": "R@1", "retrieval": "R@1", "caption": "CIDEr_D", "scst": "CIDEr_D", "vqa": "vqa_accuracy",
           "vcr": "vcr_q2ar"}  # fmt: skip


def batches_of(samples, machine):
    return data.eval_loader(samples, 100, machine.workers, machine.rank, machine.processes)


@torch.no_grad()
def captions_of(cfg, model, corpus, machine, items, beam: int) -> dict:
    """{image_id: caption}, the same on every process."""
    model.eval()
    samples = data.Pictures(items, model.tokenizer, 0, captions=0, regions=corpus.regions)
    with machine.autocast():
        return scoring.caption_split(lambda batch: caption_batch(model, batch, beam), batches_of(samples, machine))


@torch.no_grad()
def gallery_of(cfg, model, corpus, machine, items, texts) -> dict:
    """{image_id: similarity to each text}."""
    model.eval()
    samples = data.Pictures(items, model.tokenizer, 0, captions=0, regions=corpus.regions)
    with machine.autocast():
        return scoring.score_gallery(lambda batch: encode_images(model, batch), lambda some: encode_texts(model, some),
                                     lambda v, t: v @ t.T, batches_of(samples, machine), texts)  # fmt: skip


@torch.no_grad()
def scores_of(cfg, model, corpus, machine, items, task="qa", answer=None) -> dict:
    """{example_id: scores of the answers}."""
    model.eval()
    if cfg.task == "vcr":
        most = cfg.max_len if task == "qa" else cfg.max_len_rationale
        samples = data.Choices(items, model.tokenizer, 0, task=task, answer=answer, max_len=most, regions=corpus.regions)
    else:
        samples = data.Examples(items, model.tokenizer, 0, max_len=cfg.max_len, regions=corpus.regions)
    with machine.autocast():
        return scoring.predict_split(lambda batch: answer_scores(model, batch), batches_of(samples, machine))


def val_metrics(cfg, model, corpus, items, machine) -> dict:
    """The task's metrics on some items; captions are greedy, galleries have one text a picture."""
    ask = (cfg, model, corpus, machine, items)
    if cfg.task in ("pretrain", "retrieval"):
        rows = gallery_of(*ask, [item.captions[0] for item in items])
        scores = torch.stack([torch.as_tensor(rows[item.image_id]) for item in items])
        return scoring.recalls(scores, list(range(len(items))))
    if cfg.task in ("caption", "scst"):
        return scoring.score_captions(items, captions_of(*ask, beam=1))
    tables = (scores_of(*ask, "qa"), scores_of(*ask, "qar")) if cfg.task == "vcr" else (scores_of(*ask),)
    return scoring.score_examples(corpus, items, *tables)[0]


def final_evaluation(cfg: Config, model: TDEN, checkpoint: Path, corpus, machine, folder, started: float) -> dict:
    """Every test split with its controls: metrics.json, pictures, result files in `folder`; columns of a table."""
    ask, splits, columns = (cfg, model, corpus, machine), {}, {}
    n_texts = 1 if cfg.data == "scenes" else 5
    if cfg.task in QUESTION_TASKS:
        splits, columns = scoring.evaluate_examples(corpus, lambda *asked: scores_of(*ask, *asked), folder,
                                                    machine.is_main)  # fmt: skip
    if cfg.task in ("pretrain", "retrieval"):
        sheet = "ranking.png" if cfg.task == "pretrain" else "samples.png"
        splits, columns = scoring.evaluate_retrieval(corpus, lambda *asked: gallery_of(*ask, *asked), folder,
                                                     machine.is_main, n_texts, sheet=sheet)  # fmt: skip
    if cfg.task in ("pretrain", "caption", "scst"):
        found, more = scoring.evaluate_captions(corpus, lambda items: captions_of(*ask, items, cfg.beam), folder,
                                                machine.is_main, cfg.official)  # fmt: skip
        for split, result in found.items():
            of = splits.setdefault(split, {"metrics": {}, "controls": {}})
            of |= {name: value for name, value in result.items() if name not in of}
            of["metrics"] |= result["metrics"]
            for control, metrics in result["controls"].items():
                of["controls"].setdefault(control, {}).update(metrics)
        for title, column in more.items():
            columns.setdefault(title, {}).update(column)
    protocol = {
        "passes": cfg.passes, "decoder_memory": cfg.decoder_memory, "decoupled": cfg.decoupled, "init": cfg.init,
        "regions": cfg.regions, "beam": cfg.beam, "max_new": cfg.max_new, "texts_per_picture": n_texts,
        "notes": corpus.notes, "checkpoint": common.how_chosen(checkpoint), "best_by": BEST_BY[cfg.task],
        **(scoring.CAPTION_PROTOCOL if cfg.task in ("pretrain", "caption", "scst") else {}),
    }  # fmt: skip
    if machine.is_main:
        seconds = time.perf_counter() - started
        common.write_metrics(folder, "tden", cfg, machine, model, seconds, protocol, splits)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Main

SIZES = (
    "width heads mlp object_layers sentence_layers cross_layers positions vocab_size pooled feature_dim region_classes "
    "decoder_memory decoupled regions bert"
).split()  # what --init takes over from the run's config
DECODING = ["beam", "max_new"]


def check(cfg: Config) -> None:
    """Settings that contradict one another or are not among the choices."""
    common.check_numbers(cfg, "batch captions_per_image max_len max_new beam width heads object_layers sentence_layers "
                         "cross_layers positions pooled max_regions max_len_rationale passes")  # fmt: skip
    common.choose("task", cfg.task, list(TASKS))
    common.choose("ss-mode", cfg.ss_mode, ["argmax", "sample"])
    common.choose("decoder-memory", cfg.decoder_memory, ["object", "understanding"])
    common.choose("regions", cfg.regions, ["files", "grid"])
    common.choose("train-on", cfg.train_on, ["train", "train+val", "train+val+vg"])
    common.choose("passes", cfg.passes, [1, 2])
    if cfg.width % cfg.heads:
        raise UserError(f"--width {cfg.width} --heads {cfg.heads}: the first must be a multiple of the second")
    asked = {"vqa": ("scenes", "vqa"), "vcr": ("scenes", "vcr")}.get(cfg.task)
    if asked and cfg.data not in asked:
        raise UserError(f"--task {cfg.task} needs questions: --data {' or '.join(asked)}, not {cfg.data}")
    if not asked and cfg.data in corpora.QUESTIONS:
        raise UserError(f"--data {cfg.data} has questions, no captions, which --task {cfg.task} trains on")
    for name, most in (("dropout", 0.99), ("warmup", 1), ("label_smoothing", 1), ("beta2", 0.99999), ("word_mask", 1),
                       ("region_mask", 1), ("ss_prob", 1), ("mirror", 1), ("drop_sentence", 1), ("drop_object", 1),
                       ("drop_cross", 1), ("max_len", cfg.positions - 2), ("max_new", cfg.positions)):  # fmt: skip
        if getattr(cfg, name) > most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: give {most} or less")


def load_data(cfg: Config):
    """The corpus of the task with its source of regions; cfg learns how many numbers and classes a region has."""
    task = cfg.task if cfg.task in QUESTION_TASKS else "caption"
    corpus = corpora.load(cfg.data, cfg.root or None, task, cfg.train_on, world=cfg.world, n_train=cfg.train_scenes,
                          n_val=cfg.val_items, n_test=cfg.test_scenes)  # fmt: skip
    corpus.regions = regions.region_source(cfg.regions, cfg.data, cfg.root or None, cfg.max_regions)
    corpus.notes += [corpus.regions.note] if corpus.regions.note else []
    found, bad = None, ""
    for item in next(iter(corpus.splits.values()))[:20]:
        try:
            found = corpus.regions(data.ids_of(item)[0], data.files_of(item)[0])
            break
        except data.BadImage as error:
            bad = error
    if found is None:
        raise UserError(f"none of the first pictures has regions: {bad}")
    numbers = found.features.shape[1]
    if cfg.feature_dim not in (0, numbers):
        raise UserError(f"regions of {numbers} numbers, where the model reads {cfg.feature_dim}: take the regions that it "
                        "was trained on, or train a new one")  # fmt: skip
    cfg.feature_dim = numbers
    if not cfg.region_classes and found.classes is not None:
        cfg.region_classes = found.classes.shape[1]
    return corpus


def answer_commands(command, given: dict) -> None:
    """--caption, --score, --ask: what a trained model says of pictures."""
    asked = next(f"--{name}" for name in ("caption", "score", "ask") if getattr(command, name))
    common.allow(given, ["init", "device", *DECODING], asked)
    if given.get("init", "none") == "none":
        raise UserError(f"{asked} needs a trained model: add --init RUN, e.g. --init runs/tden-scenes")
    model = TDEN.from_run(given["init"], common.choose_device(given.get("device", "auto"))[0])
    model.cfg = replace(model.cfg, **given)
    check(model.cfg)
    for picture in command.caption or []:
        print(f"{picture}: {model.caption(picture)}")
    if command.score:
        for text in command.score[1:]:
            print(f"{model.score(command.score[0], text):.3f}  {text}")
    if command.ask:
        for question in command.ask[1:]:
            print(f"{question}  {model.answer_to(command.ask[0], question)}")


def evaluate_run(cfg: Config, checkpoint: Path, machine, folder: Path) -> dict:
    """--eval-only, for one of its runs."""
    started, corpus = time.perf_counter(), load_data(cfg)
    model = build(cfg, corpus, checkpoint).to(machine.device)
    corpus.answers = model.answers
    return final_evaluation(cfg, model, checkpoint, corpus, machine, folder, started)


COMMANDS = {
    "caption": dict(nargs="+", metavar="PICTURE", help="print a caption for each picture (with --init RUN)"),
    "score": dict(nargs="+", metavar="PICTURE TEXT", help="print the cosine of a picture and each text"),
    "ask": dict(nargs="+", metavar="PICTURE QUESTION", help="print the answer to each question about a picture"),
    "eval-only": dict(nargs="*", metavar="RUN", help="evaluate finished runs, or the one of --init, side by side"),
}


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    given, command = common.parse_flags(Config, sys.argv[1:] if argv is None else argv, "tden.py", COMMANDS)
    if command.caption or command.score or command.ask:
        return answer_commands(command, given)
    if command.eval_only is not None:
        return compare.evaluate_runs(command.eval_only, given, "tden", Config, DECODING, check, evaluate_run)
    official = given.pop("init") if Path(given.get("init", "none")).is_file() else "none"
    cfg, checkpoint = common.configure(Config, given, "tden", PRESETS, RECIPES, SIZES)
    cfg.init = official if official != "none" else cfg.init
    check(cfg)
    if cfg.task == "scst" and not checkpoint and official == "none":
        raise UserError("--task scst refines a trained model: add --init RUN, e.g. --init runs/tden-scenes-caption")
    machine = common.start_machine(cfg)
    corpus = load_data(cfg)
    if "train" not in corpus.splits:
        raise UserError(f"{corpus.name} has no training split, only {', '.join(corpus.splits) or 'all empty'}")
    pictures = cfg.batch // per_picture(cfg)
    if pictures < machine.processes * (2 if cfg.task in ("pretrain", "retrieval") else 1):
        raise UserError(f"--batch {cfg.batch} is too small for {machine.processes} process(es): ISM needs two pictures in "
                        "each, the other tasks one")  # fmt: skip
    model = build(cfg, corpus, checkpoint)
    corpus.answers = model.answers
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(corpus.splits["train"]) / pictures)
    cfg.eval_every = cfg.eval_every or math.ceil(cfg.steps / 5)
    run = common.Run(checkpoint.parent) if cfg.resume else common.Run.create("tden", cfg, machine)
    if model.answers and machine.is_main:
        common.write_json(run.path / "answers.json", list(model.answers))
    shape = f"{cfg.steps} steps of {pictures} pictures" + (f" x {per_picture(cfg)} captions" if pictures < cfg.batch else "")
    common.announce(f"TDEN ({cfg.task}): {shape}", model, cfg, machine, corpus, run)
    try:
        train(cfg, model, corpus, machine, run, checkpoint if cfg.resume else None)
        best = (run.path / "best").resolve()  # chosen on val
        common.load_model_weights(model, best)
        columns = final_evaluation(cfg, model, best, corpus, machine, run.path, started)
    except (KeyboardInterrupt, UserError) as error:
        raise common.stopped(run, machine, why=error) from None
    if machine.is_main:
        remark = ""
        if cfg.data == "scenes" and "caption_true" in columns["test"]:
            remark = judge.how_it_sees(columns["test"], columns["test, shuffled"])
        verb = {"vqa": "--ask test:0 \"what color is the disc?\"", "retrieval": "--score test:0 \"a red disc\""}
        finish.tell(columns, run, started, remark, "test pictures with what the model says",
                    f"python tden.py {verb.get(cfg.task, '--caption test:0')} --init {shlex.quote(str(run.path))}")


if __name__ == "__main__":
    common.run_main(main)
