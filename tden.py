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

    python tden.py                                    the small world: 82 to 98 % true captions, 2.6 minutes, 2 cores
    python tden.py --task vqa --init runs/tden-scenes      or retrieval, vcr, caption; then scst
    python tden.py --caption test:3 test:4 --init RUN      a caption; --score PICTURE TEXT, --ask PICTURE QUESTION
    torchrun --nproc_per_node=8 tden.py --data coco        region files below data/coco/regions

Reading map: config, presets, recipes | blocks | model | corruption: from a loader's batch to what pre-training reads |
losses | step: the two passes | heads of the downstream tasks | decoding | official weights | training | evaluation |
main. Marks: `# PAPER` what the paper says, `# OFFICIAL` what the authors' code does (YehLi/xmodaler), `# HERE[id]` what
we do and why, a row of docs/divergences.md.
"""

from __future__ import annotations

import contextlib
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
import decoding
import eval as scoring
import language
import mixture
import regions
import weights
from common import UserError
from tools import ask, compare, exam, finish

# ---------------------------------------------------------------------------------------------------------------------
# Config, presets, recipes. Every field is a flag; its comment is the flag's help.


@dataclass
class Config(common.RunConfig):
    # --- method
    passes: int = 2  # PAPER: the second one reads the words of the first; 1: the ablation (double --steps for it)
    ss_mode: str = "argmax"  # HERE[tden-2]: the first pass's word, argmax | sample (drawn)
    ss_prob: float = 1.0  # HERE[tden-2]: probability that a masked word is replaced by it
    two_updates: bool = True  # HERE[tden-3]: an update after each pass; off: one, of both passes' losses
    decoder_memory: str = "auto"  # HERE[tden-1]: region states for the decoder, object | understanding; auto: object
    decoupled: bool = True  # off: one network for both, in pre-training of about as many parameters (an ablation)
    margin: float = 0.2  # of ISM's hinge
    hardest: bool = True  # of ISM: the batch's hardest negatives; HERE[tden-14]: off in tiny and small, see loss_ism
    word_mask: float = 0.15  # share of words to predict (MLM)
    region_mask: float = 0.15  # share of regions to predict (MOC)
    # --- regions
    regions: str = "files"  # files: a detector's, below ROOT/regions (of scenes: their own) | grid: crops, no detector
    max_regions: int = 50  # regions of a picture that are taken from its file; a global one comes on top
    feature_dim: int = 0  # numbers that describe a region; 0: as many as the data has
    region_classes: int = 0  # detector's classes, background included; 0: as many as the data has
    mirror: float = 0.0  # share of training pictures of vqa and vcr seen mirrored, where such regions are there
    # --- network
    bert: str = "none"  # weights of the sentence encoder: a hub id, a directory, or none
    tokenizer: str = "none"  # hub id or directory; none: of --bert or official weights, else trained on the texts
    vocab_size: int = 30522  # upper bound where the tokenizer is trained here
    width: int = 768  # of all states
    heads: int = 12  # attention heads
    mlp: int = 0  # width inside the feed-forward parts; 0: 4 x width
    object_layers: int = 6  # depth of the object encoder
    sentence_layers: int = 12  # depth of the sentence encoder
    cross_layers: int = 6  # depth of the cross-modal encoder
    decoder_layers: int = 0  # depth of the cross-modal decoder; 0: that of the encoder
    positions: int = 512  # longest text
    pooled: int = 1024  # numbers of a picture's or a text's embedding (ISM), and of VCR's
    answer_pooled: int = 0  # the same, in the answer head; 0: OFFICIAL's, of vqa width, of vcr pooled
    dropout: float = 0.1  # attention weights, sub-layer outputs, inside the feed-forward parts, embeddings, poolers
    drop_sentence: float = 0.0  # layer-drop: probability that a block is skipped in a training step
    drop_object: float = 0.0  # the same, of the object encoder
    drop_cross: float = 0.0  # the same, of the cross-modal encoder (OFFICIAL: the decoder skips none)
    init_std: float = 0.02  # HERE[tden-6]: standard deviation of new weights (first release)
    # --- recipe of pre-training. OFFICIAL: configs/pretrain/tden/tden.yaml, 64 pairs on each of 4 GPUs
    batch: int = 256  # pairs per step over all processes; of vqa and vcr questions
    captions_per_image: int = 1  # captions per picture and step
    epochs: float = 10.0  # passes over the pictures, where --steps is 0
    steps: int = 0  # training iterations; 0: from --epochs
    lr: float = 1e-4  # peak learning rate
    warmup: float = 0.1  # share of the steps in which the rate rises linearly
    drops: str = ""  # shares of the steps, like 0.5,0.6, where drop_factor multiplies the rate; none: linearly to 0
    drop_factor: float = 0.1  # see drops
    weight_decay: float = 0.01  # on matrices and embeddings, not on norms and biases
    beta2: float = 0.999  # AdamW's second moment; the first is 0.9
    grad_clip: float = 0.0  # largest gradient norm; 0: no clipping
    grad_clip_value: float = 0.0  # largest entry of a gradient; 0: no clipping
    label_smoothing: float = 0.0  # captions: share of the target's probability that the other words get
    max_len: int = 34  # word pieces of a text, special ones (HERE[tden-12]: never cut) apart; of vcr question + answer
    max_len_rationale: int = 63  # the same, of vcr with its rationale
    train_on: str = "train"  # of vqa: train | train+val (but for 3,000 questions) | train+val+vg (Visual Genome)
    # --- decoding. OFFICIAL: beam 2, at most 20 tokens, sum of log p
    beam: int = 2  # width of the beam search of the final evaluation and of --caption; validation is greedy
    max_new: int = 20  # longest generated caption, in tokens, end token included


PRESETS = {
    # HERE[tden-9] (not in the paper): tiny learns the small world from nothing in three minutes on 2 cores
    "tiny": dict(
        width=128, heads=4, mlp=256, object_layers=1, sentence_layers=1, cross_layers=1, positions=64, pooled=128,
        vocab_size=1000, dropout=0.0, init_std=0.08, hardest=False, batch=96, steps=600, lr=2e-3, grad_clip=1.0,
        max_len=30, max_new=30),
    # HERE[tden-9] (not in the paper): small learns from a few thousand photographs, from nothing
    "small": dict(
        width=192, heads=6, mlp=768, object_layers=2, sentence_layers=2, cross_layers=2, positions=128, pooled=256,
        vocab_size=3000, init_std=0.05, hardest=False, batch=96, epochs=20.0, lr=7e-4, grad_clip=1.0, beam=3),
    "base": dict(bert="bert-base-uncased"),
}  # fmt: skip

# OFFICIAL: configs/image_caption/tden and configs/mm_understanding/{vqa,flickr30k_retrieval,vcr}/tden; batches are for
# 4 GPUs. HERE[tden-8]: AdamW without decay for Adam; VCR's BertAdam is AdamW with one norm for all gradients.
RECIPES = {
    ("vqa", "base"): dict(
        batch=96, epochs=20.0, lr=5e-5, beta2=0.98, weight_decay=0.0, warmup=0.2, drops="0.5,0.6", drop_factor=0.2,
        drop_sentence=0.3, drop_object=0.3, drop_cross=0.1, max_len=21, max_regions=100, mirror=0.5,
        train_on="train+val+vg"),
    ("retrieval", "base"): dict(
        batch=512, epochs=100.0, lr=2e-5, weight_decay=0.0, warmup=0.1, drops="0.3,0.6", dropout=0.2, drop_sentence=0.1,
        drop_object=0.1, max_len=28, grad_clip=2.0),  # HERE[tden-13]: a caption a picture. HERE[tden-15]: dropout
    ("vcr", "base"): dict(  # HERE[tden-16]: without the second pre-training, on VCR itself
        batch=64, epochs=20.0, lr=2e-5, warmup=0.05, drops="0.2,0.4", grad_clip=1.0, max_len=35, mirror=0.5),
    ("caption", "base"): dict(
        batch=80, captions_per_image=5, epochs=10.0, lr=3e-5, weight_decay=0.0, warmup=0.2, grad_clip_value=0.1,
        label_smoothing=0.1, max_len=19),
    ("scst", "base"): dict(
        batch=480, captions_per_image=5, epochs=50.0, lr=5e-6, weight_decay=0.0, warmup=0.0, drops="0.36,0.72",
        drop_factor=0.8, grad_clip_value=0.1, max_len=19),
    # HERE[tden-9] (not in the paper): a minute each after tiny's pre-training
    ("vqa", "tiny"): dict(steps=300, lr=5e-4), ("retrieval", "tiny"): dict(steps=300, lr=5e-4),
    ("vcr", "tiny"): dict(steps=300, lr=5e-4, batch=32, max_len=40, max_len_rationale=60),
    ("caption", "tiny"): dict(steps=300, lr=5e-4, captions_per_image=3, label_smoothing=0.1),
    ("scst", "tiny"): dict(steps=100, lr=1e-4, batch=50, captions_per_image=5, warmup=0.0),
    ("caption", "small"): dict(captions_per_image=3, label_smoothing=0.1), ("retrieval", "small"): dict(lr=2e-4),
    ("scst", "small"): dict(epochs=2.0, lr=1e-4, batch=50, captions_per_image=5, warmup=0.0),
}  # fmt: skip

TASKS, QUESTION_TASKS = ("pretrain", "retrieval", "vqa", "vcr", "caption", "scst"), ("vqa", "vcr")
PARTS = ("cross_encoder.", "cross_decoder.", "lm_head.", "moc_head.", "ism.", "answer_head.")  # that some tasks lack
TEXT = ("ids", "segments", "keep_mask", "targets", "labels")  # what a question's rows take from a loader's batch
DECODING, NOTHING = ["beam", "max_new"], -100  # flags of decoding; the label of what is not to be predicted
LM_EPS, EMBED_EPS = 1e-12, 1e-5  # OFFICIAL: LayerNorm's epsilon in blocks and heads, and in embeddings and answer heads

# ---------------------------------------------------------------------------------------------------------------------
# Blocks. BERT's, with the norm after the residual. One alphabet: B pictures, R text rows (k for each picture), N
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


class TDEN(nn.Module, ask.Verbs):
    """Two encoders, a cross-modal encoder, a cross-modal decoder, and the heads of `cfg.task`.

    tokenizer: with a mask token. answers: the classes of vqa. For users: `from_run`, and the verbs of tools/ask.py:
    caption(picture), score(picture, text), answer(picture, question).
    """

    def __init__(self, cfg: Config, tokenizer: language.Tokenizer | None = None, answers: tuple[str, ...] = ()):
        super().__init__()
        self.cfg, self.tokenizer, self.answers = cfg, tokenizer, answers
        sizes = (cfg.width, cfg.heads, cfg.mlp or 4 * cfg.width, cfg.dropout)
        self.tokens, self.region_embedding = TokenEmbedding(cfg), RegionEmbedding(cfg)
        self.object_encoder = nn.ModuleList(EncoderBlock(*sizes) for _ in range(cfg.object_layers))
        self.sentence_encoder = nn.ModuleList(EncoderBlock(*sizes) for _ in range(cfg.sentence_layers))
        if cfg.task in ("pretrain", "vqa", "vcr") or (cfg.task != "retrieval" and not cfg.decoupled):
            self.cross_encoder = nn.ModuleList(UnderstandingBlock(*sizes) for _ in range(cross_depth(cfg)))
        if cfg.task not in ("retrieval", "vcr") and cfg.decoupled:
            depth = range(cfg.decoder_layers or cfg.cross_layers)
            self.cross_decoder = nn.ModuleList(GenerationBlock(*sizes) for _ in depth)
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

    def understand(self, v, t, keep_mask) -> tuple[list, torch.Tensor]:
        """Regions [R, N, D], words [R, T, D] -> regions after each layer, words after the last."""
        states = []
        for block in self.cross_encoder:
            if not self.is_skipped(self.cfg.drop_cross):
                v, t = block(v, t, keep_mask)
            states.append(v)
        return states, t

    def memory(self, v) -> list:
        """Region states -> keys and values for each layer of the decoder; the shared network reads the states."""
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
        """The ablation: the cross-modal encoder, where regions see regions, words all regions and the words before."""
        (R, T), N, k = g.shape[:2], v.size(1), len(g) // len(v)
        v, seen = v.repeat_interleave(k, 0), region_keep_mask.repeat_interleave(k, 0)[:, None, None]  # [R, 1, 1, N]
        keep = torch.zeros(R, 1, N + T, N + T, dtype=torch.bool, device=g.device)
        keep[..., :N] = seen
        keep[..., N:, N:] = True if keep_mask is None else keep_mask  # None: a single word
        for block in self.cross_encoder:
            v, g = block(v, g, keep)
        return g

    def forward(self, batch: dict) -> dict:
        """What the losses of the task need; called so, because DistributedDataParallel sees nothing else."""
        if self.cfg.task == "pretrain":
            return self.pretrain(batch)
        if self.cfg.task == "retrieval":
            v, keep_mask = self.see(batch), batch["keep_mask"]
            t = self.read(batch["ids"], torch.zeros_like(batch["ids"]), keep_mask[:, None, None])
            image = self.ism.of_image(v, batch["region_keep_mask"]).repeat_interleave(len(t) // len(v[0]), 0)
            return {"image": image, "text": self.ism.of_text(t, keep_mask)}
        return self.judge(batch) if self.cfg.task in QUESTION_TASKS else {"logits": self.tell(batch)}

    def pretrain(self, batch: dict) -> dict:
        """A batch of `corrupt` -> logits of MLM and MSG [words to predict, V] and of MOC [masked regions, C]; in the
        first pass, which knows image_ids, also ISM's embeddings of pictures and texts [R, P]."""
        v_states = self.see(batch)
        keep, seen = batch["keep_mask"], batch["region_keep_mask"]
        # One set of weights reads both copies: u may look at every word, g at those before it.
        ids = torch.cat([batch["u_ids"], batch["g_ids"]])
        types = torch.cat([torch.zeros_like(batch["u_ids"]), torch.ones_like(batch["g_ids"])])
        whole = keep[:, None, None].expand(-1, 1, keep.size(1), -1)  # [R, 1, T, T]
        causal = whole.tril()
        u, g = self.read(ids, types, torch.cat([whole, causal])).chunk(2)
        v_last, t = self.understand(v_states[-1], u, torch.cat([seen, keep], dim=1)[:, None, None])
        # PAPER: messages pass from regions to words alone. OFFICIAL: the memory is what the cross-modal encoder made of
        # the regions, which has read the whole sentence. HERE[tden-1]: the paper's, unless asked for.
        memory = v_last[-1] if self.cfg.decoder_memory == "understanding" else v_states[-1]
        g = self.generate(g, self.memory(memory), causal, seen)
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
        T, n = ids.size(1), len(self.sentence_encoder)
        keep = torch.ones(T, T, dtype=torch.bool, device=ids.device).tril() if T > 1 else None  # one word sees all
        g = self.read(ids, torch.ones_like(ids), keep, caches and caches[:n], start)
        return self.generate(g, kvs, keep, region_keep_mask, caches and caches[n:])

    def judge(self, batch: dict) -> dict:
        """ids, segments, keep_mask [R, T], regions of B pictures -> {"u": [R, answers], and in vqa "g"}, logits."""
        keep, k = batch["keep_mask"], len(batch["ids"]) // len(batch["features"])
        seen = batch["region_keep_mask"].repeat_interleave(k, 0)
        v = self.see(batch)[-1]
        t = self.read(batch["ids"], batch["segments"], keep[:, None, None])
        both = torch.cat([seen, keep], dim=1)[:, None, None]
        v_states, u = self.understand(v.repeat_interleave(k, 0), t, both)
        g = None
        if hasattr(self, "cross_decoder"):  # OFFICIAL: it reads the whole question and cross-modal regions;
            memory = v_states[-1] if self.cfg.decoder_memory == "understanding" else v  # HERE[tden-1]: as pre-trained
            g = self.generate(t, self.memory(memory), keep[:, None, None], batch["region_keep_mask"])
        return self.answer_head(v_states, u, g, seen, keep)

    @torch.no_grad()
    def caption_batch(self, batch: dict, beam=1) -> list[str]:
        """A loader's batch of B pictures -> B captions: greedy (beam 1) or beam search."""
        tok, batch = self.tokenizer, data.to_device(self, regions.of_batch(batch, self.cfg.max_regions))
        ids, _ = decoding.competing_beams(Decoder(self, batch), len(batch["features"]), beam, tok.bos, tok.eos,
                                          self.cfg.max_new, batch["features"].device)  # fmt: skip
        return [" ".join(tok.decode(row).split()) for row in ids.tolist()]

    def encode_images(self, batch: dict):
        """B pictures -> [B, P] of length 1."""
        batch = data.to_device(self, regions.of_batch(batch, self.cfg.max_regions))
        return self.ism.of_image(self.see(batch), batch["region_keep_mask"])

    def encode_texts(self, texts: list[str]):
        """Texts as written -> [R, P] of length 1."""
        tok = self.tokenizer
        rows = [[tok.encode(language.clean_caption(text), self.cfg.max_len)] for text in texts]
        batch = data.to_device(self, data.pad_texts(rows, tok.bos, tok.eos, tok.pad))
        t = self.read(batch["ids"], torch.zeros_like(batch["ids"]), batch["keep_mask"][:, None, None])
        return self.ism.of_text(t, batch["keep_mask"])

    @torch.no_grad()
    def answer_scores(self, batch: dict):
        """Questions -> [B, answers], of VCR [B, 4]. OFFICIAL: the sum of softmax(u) and softmax(g)."""
        rows = regions.of_batch(batch, self.cfg.max_regions) | {name: batch[name] for name in TEXT if name in batch}
        out = {branch: logits.float() for branch, logits in self.judge(data.to_device(self, rows)).items()}
        return out["u"].view(-1, 4) if self.cfg.task == "vcr" else sum(logits.softmax(-1) for logits in out.values())

    @classmethod
    def from_run(cls, source: str, device="cpu") -> TDEN:
        """The model of a run directory (its `best`) or of one of its step_N, ready to caption, score or answer."""
        checkpoint, values = common.find_checkpoint(source, "tden")
        return build(common.config_from(Config, values), None, checkpoint).to(device).eval()


def cross_depth(cfg: Config) -> int:
    """Layers of the cross-modal encoder. Where it does the decoder's work too, it gets the decoder's parameters: with
    inner width F an understanding block has 4 DD + 4 DF of them, a generation block 8 DD + 2 DF."""
    D, inner = cfg.width, cfg.mlp or 4 * cfg.width
    share = 0 if cfg.decoupled else (8 * D + 2 * inner) / (4 * D + 4 * inner)
    return cfg.cross_layers + round(share * (cfg.decoder_layers or cfg.cross_layers))


# ---------------------------------------------------------------------------------------------------------------------
# Corruption: from a loader's batch to what pre-training reads. All luck comes from one generator.


def corrupt_regions(features, boxes, is_masked):
    """Features [R, N, D] with zeros where a region is masked or overlaps a masked one, and bool [R, N] where that is.

    boxes [R, N, 4] in pixels. OFFICIAL: overlap is an IoU above 0.4, edges counted as pixels. Nine masked regions of
    ten are to be zeroed, but each overlaps itself wholly, so in effect all are: HERE[tden-4], we zero them all.
    """
    is_zero = is_masked | ((regions.iou(boxes) > 0.4) & is_masked[:, None]).any(2)  # [R, N, N] -> [R, N]
    return features.masked_fill(is_zero[:, :, None], 0.0), is_zero


def corrupt(batch: dict, tok: language.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's captions with regions -> what `TDEN.pretrain` reads and its labels, for R pairs:

    u_ids, g_ids, keep_mask [R, T]; mlm_labels, msg_labels [R, T]; features, locations, region_keep_mask of 1 + N
    regions; region_is_masked [R, N] and moc_targets [R, N, C], where the regions have classes; image_ids [R].
    """
    ids, keep = data.whole_captions(batch, tok.pad)
    k = len(ids) // len(batch["regions"])  # captions of each picture; each pair has a corruption of its own
    may_mask = keep & (ids != tok.bos) & (ids != tok.eos)
    shown, mlm_labels = data.mask_words(ids, may_mask, tok.mask, cfg.vocab_size, cfg.word_mask, luck)
    seen_by = {name: x.repeat_interleave(k, 0) for name, x in batch.items() if name.startswith("regions")}
    seen, classes = seen_by["regions_keep_mask"], seen_by.get("regions_classes")
    is_masked = (torch.rand(seen.shape, generator=luck) < cfg.region_mask) & seen
    features, is_zero = corrupt_regions(seen_by["regions"], seen_by["regions_boxes"], is_masked)
    rows = regions.with_global(features, seen_by["regions_locations"], seen, (seen & ~is_zero).sum(1))
    if cfg.region_classes:  # where this batch has none, there is nothing to predict
        targets = features.new_zeros(*seen.shape, cfg.region_classes) if classes is None else classes
        rows |= {"moc_targets": targets, "region_is_masked": is_masked & (classes is not None)}
    # OFFICIAL (MSG): at every position the next word of the true sentence, after a corrupted prefix: the same corrupted
    # sentence is the input of both copies.
    msg_labels = F.pad(ids[:, 1:].masked_fill(~keep[:, 1:], NOTHING), (0, 1), value=NOTHING)
    return rows | {"u_ids": shown, "g_ids": shown, "keep_mask": keep, "mlm_labels": mlm_labels,
                   "msg_labels": msg_labels, "image_ids": data.picture_numbers(batch, k)}  # fmt: skip


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
    return F.kl_div(logits.float().log_softmax(-1), target_probs, reduction="sum") / max(1, len(logits))


def loss_ism(text, image, image_ids, margin=0.2, hardest=True):
    """Image-sentence matching. text, image [B, P] of length 1, image_ids [B] -> scalar.

    S_ij = t_i . v_j; L = 1/B [sum_i max_j max(0, margin + S_ij - S_ii) + sum_j max_i max(0, margin + S_ij - S_jj)],
    over pairs of different pictures. OFFICIAL: the negatives are those of one GPU. hardest=False, the first release:
    not over B, but the mean over the texts' negatives that violate the margin, and that over the pictures'.
    """
    S = text.float() @ image.float().T
    is_same = image_ids[:, None] == image_ids[None]
    by_text = (margin + S - S.diagonal()[:, None]).clamp(min=0).masked_fill(is_same, 0.0)
    by_image = (margin + S - S.diagonal()[None]).clamp(min=0).masked_fill(is_same, 0.0)
    if hardest:
        return (by_text.amax(1).sum() + by_image.amax(0).sum()) / len(S)
    return sum(cost.sum() / (cost > 0).sum().clamp(min=1) for cost in (by_text, by_image))


# TWIN: soho.py, tden.py, vilta.py
def loss_answers(logits, targets):
    """VQA. logits, soft targets [B, answers] -> binary cross-entropy, summed over answers, mean over questions."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / len(logits)


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
        logits, draws = logits.detach().float(), mode == "sample" and len(logits) > 0
        chosen = torch.multinomial(logits.softmax(-1), 1)[:, 0] if draws else logits.argmax(-1)
        return torch.zeros_like(batch["u_ids"]).masked_scatter(is_place, chosen.long())

    in_u, next_words = words(mlm_logits, is_masked), words(msg_logits, batch["msg_labels"] != NOTHING)
    in_g = F.pad(next_words[:, :-1], (1, 0))  # what was said at t - 1 stands at t; the first place is never masked
    if probability < 1:
        is_masked = is_masked & (torch.rand(is_masked.shape, device=is_masked.device) < probability)
    u, g = (torch.where(is_masked, said, batch[name]) for name, said in (("u_ids", in_u), ("g_ids", in_g)))
    return {"u_ids": u, "g_ids": g}


def rows_of(batch: dict, task: str, tok: language.Tokenizer, cfg: Config, luck: torch.Generator) -> dict:
    """A loader's batch -> the tensors of a training step, inputs and labels, for any task."""
    if task == "pretrain":
        return corrupt(batch, tok, cfg, luck)
    rows = regions.of_batch(batch, cfg.max_regions)
    if task in QUESTION_TASKS:
        return rows | {name: batch[name] for name in TEXT if name in batch}
    if task == "retrieval":
        ids, keep = data.whole_captions(batch, tok.pad)
        numbers = data.picture_numbers(batch, len(ids) // len(batch["regions"]))
        return rows | {"ids": ids, "keep_mask": keep, "image_ids": numbers}
    return rows | {"ids": batch["ids"], "targets": batch["targets"]}


def counts(task: str, rows: dict) -> dict:
    """{loss: over how many targets it is the mean}."""
    if task == "pretrain":
        return {"mlm": (rows["mlm_labels"] != NOTHING).sum(), "msg": (rows["msg_labels"] != NOTHING).sum(),
                "moc": rows["region_is_masked"].sum() if "moc_targets" in rows else 0, "ism": len(rows["u_ids"])}
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
    if cfg.task == "retrieval":  # OFFICIAL: here a sum, over a GPU's 128 pairs: it matters to the clipping of gradients
        hinge = loss_ism(out["text"], out["image"], rows["image_ids"], cfg.margin, cfg.hardest)  # HERE[tden-11]
        return {"ism": hinge * min(cfg.batch, 128) if cfg.hardest else hinge}
    if cfg.task == "vqa":
        return {name: loss_answers(out[name], rows["targets"]) for name in ("u", "g") if name in out}
    if cfg.task == "vcr":
        return {"choice": F.cross_entropy(out["u"].float().view(-1, 4), rows["labels"])}
    targets = rows["targets"][rows["targets"] != NOTHING]
    if cfg.task == "caption":
        return {"caption": loss_caption(out["logits"], targets, cfg.label_smoothing)}
    log_p = out["logits"].float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    of_token = rows["advantages"][:, None].expand_as(rows["targets"])[rows["targets"] != NOTHING]
    return {"scst": loss_scst(log_p, of_token)}


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
        """Regions after each layer of the object encoder -> [B, P]: the sum over layers / sqrt(L), of length 1."""
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
        pooled = cfg.answer_pooled or (cfg.width if cfg.task == "vqa" else cfg.pooled)
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


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


class Decoder:
    """What decoding.py drives: R = B * beam captions grow by one token a step.

    Keys and values of earlier tokens are cached, those of the regions are made once and shared by a picture's beams.
    `cached=False` recomputes the whole prefix at every step: slower, and there to prove that nothing changes.
    """

    def __init__(self, model: TDEN, batch: dict, cached=True):
        self.model, self.keep_mask = model, batch["region_keep_mask"]
        self.kvs = model.memory(model.see(batch)[-1])
        parts = (*model.sentence_encoder, *model.cross_decoder) if cached and model.cfg.decoupled else ()
        self.caches = [{} for _ in parts] or None

    def step(self, ids):
        """ids [R, t], everything so far -> logits [R, V] of the next token."""
        start = ids.size(1) - 1 if self.caches else 0
        g = self.model.next_words(ids[:, start:], self.kvs, self.keep_mask, self.caches, start)
        return self.model.lm_head(g[:, -1])

    def reorder(self, rows):
        for cache in self.caches or []:
            cache["kv"] = cache["kv"].index_select(1, rows)


# ---------------------------------------------------------------------------------------------------------------------
# Official weights. xmodaler's checkpoints, and BERT. A part (a child of TDEN) is filled whole, or starts fresh where
# the file has nothing of it; every key is used, or belongs to a part that this task does without.

ATTENTION = {"q": "self.query", "kv": ("self.key", "self.value"), "out": "output.dense", "norm": "output.LayerNorm"}
FEED_FORWARD = {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}
HEAD = {"dense": "transform.dense", "norm": "transform.LayerNorm", "out": "decoder"}
POOLER = {"weigh.0": "att.0", "weigh.3": "att.3", "embed": "embed", "norm": "bn"}
NAMES = (  # ours, xmodaler's, what both are followed by; {} is the number of a layer
    ("tokens.", "token_embed.embeddings", {"word": "", "position": "_pos.position_embeddings", "segment": "_token_type",
                                           "norm": "_norm"}),
    ("region_embedding.", "visual_embed.embeddings", {"feature": "", "location": "_pos", "norm": "_norm"}),
    ("object_encoder.{}.att.", "encoder.v_layers.{}.attention.", ATTENTION),
    ("object_encoder.{}.ffn.", "encoder.v_layers.{}.", FEED_FORWARD),
    ("sentence_encoder.{}.att.", "encoder.layers.{}.attention.", ATTENTION),
    ("sentence_encoder.{}.ffn.", "encoder.layers.{}.", FEED_FORWARD),
    ("cross_encoder.{}.att.", "decoder.u_layers.{}.biattention.", ATTENTION),
    ("cross_encoder.{}.ffn_regions.", "decoder.u_layers.{}.v_", FEED_FORWARD),
    ("cross_encoder.{}.ffn_words.", "decoder.u_layers.{}.t_", FEED_FORWARD),
    ("cross_decoder.{}.self_att.", "decoder.g_layers.{}.self_attn.", ATTENTION),
    ("cross_decoder.{}.cross_att.", "decoder.g_layers.{}.x_att.", ATTENTION),
    ("cross_decoder.{}.ffn.", "decoder.g_layers.{}.", FEED_FORWARD),
    ("lm_head.", "predictor.", HEAD),
    ("moc_head.", "v_predictor.", HEAD),
    ("ism.words.", "similarity_predictor.t_pooler.", POOLER),
    ("ism.regions.{}.", "similarity_predictor.v_pooler.{}.", POOLER),
    ("answer_head.words.", "predictor.u_pooler.", POOLER),
    ("answer_head.told.", "predictor.g_pooler.", POOLER),
    ("answer_head.regions.{}.", "predictor.v_pooler.{}.", POOLER),
    ("answer_head.u.", "predictor.u_logits.", {"0": "0", "1": "1"}),
    ("answer_head.g.", "predictor.g_logits.", {"0": "0", "1": "1"}),
)  # fmt: skip


def official_modules(cfg: Config) -> dict:
    """Our module -> the list of xmodaler's that it holds, for the parts of all tasks."""
    depth = {"object_encoder": cfg.object_layers, "sentence_encoder": cfg.sentence_layers, "ism": cfg.object_layers,
             "cross_decoder": cfg.decoder_layers or cfg.cross_layers}  # fmt: skip
    return weights.module_names(NAMES, lambda ours: depth.get(ours.split(".")[0], cfg.cross_layers))


def official_names(model: TDEN) -> dict:
    """Our name of each tensor -> the list of xmodaler's, to be concatenated."""
    return weights.tensor_names(model, official_modules(model.cfg))


SHAPES = {  # config field: a tensor whose shape tells it, and the dimension
    "vocab_size": ("token_embed.embeddings", 0), "width": ("token_embed.embeddings", 1),
    "positions": ("token_embed.embeddings_pos.position_embeddings", 0), "feature_dim": ("visual_embed.embeddings", 1),
    "mlp": ("encoder.layers.0.intermediate.dense", 0), "region_classes": ("v_predictor.decoder", 0),
    "pooled": ("similarity_predictor.t_pooler.embed", 0), "answer_pooled": ("predictor.u_pooler.embed", 0),
}  # fmt: skip


def official_sizes(state: dict) -> dict:
    """Config fields from the shapes in a state dict of xmodaler's; heads are 64 wide."""
    def depth(prefix: str) -> int:
        return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)), default=-1)
    if not state.keys() >= {"token_embed.embeddings.weight", "visual_embed.embeddings.weight"}:
        raise UserError(f"no checkpoint of xmodaler's TDEN; its first keys are {', '.join(map(str, list(state)[:3]))}")
    sizes = {name: state[f"{key}.weight"].size(dim) for name, (key, dim) in SHAPES.items() if f"{key}.weight" in state}
    sizes |= {"sentence_layers": depth("encoder.layers."), "object_layers": depth("encoder.v_layers.")}
    u, g = depth("decoder.u_layers."), depth("decoder.g_layers.")  # no u in a captioner, no g in VCR's model
    sizes |= {name: n for name, n in (("cross_layers", u or g), ("decoder_layers", g)) if n}
    return sizes | {"heads": max(1, sizes["width"] // 64), "decoder_memory": "understanding"}


def load_official(model: TDEN, state: dict) -> str:
    """A state dict of any of xmodaler's five models, into that of another task too; see `weights.load_parts`."""
    known = [f"{name}." for names in official_modules(model.cfg).values() for name in names]
    not_used = (*known, "predictor.bias")  # that of predictor.decoder once more, under a second name
    return weights.load_parts(model, state, official_names(model), not_used, "xmodaler's TDEN")


BERT_SIZES = dict(vocab_size="vocab_size", width="hidden_size", heads="num_attention_heads", mlp="intermediate_size",
                  sentence_layers="num_hidden_layers", positions="max_position_embeddings")  # fmt: skip
BERT_NAMES = {  # what xmodaler's names begin with -> what BERT's do
    "encoder.layers.": "encoder.layer.", "token_embed.embeddings_pos.": "embeddings.", "predictor.": "cls.predictions.",
    "token_embed.embeddings_norm": "embeddings.LayerNorm", "token_embed.embeddings_token": "embeddings.token",
    "token_embed.embeddings": "embeddings.word_embeddings",
}  # fmt: skip


def load_bert(model: TDEN, state: dict) -> str:
    """BERT's weights, with its masked-language head or without, old and new names of LayerNorm's parameters.

    HERE[tden-7] (not in the paper): the conversion that xmodaler starts from is not published; this one is by meaning.
    The third type starts as the first (first release), the untied LM matrix as the word embeddings.
    """
    for old, new in (("bert.", ""), ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        state = {key.replace(old, new): value for key, value in state.items()}
    types, words = (state.get(f"embeddings.{x}_embeddings.weight") for x in ("token_type", "word"))
    if types is not None:
        state["embeddings.token_type_embeddings.weight"] = torch.cat([types, types[:1]])[:3]
    if (bias := state.get("cls.predictions.bias")) is not None:
        state |= {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": bias}
    modules = {}
    for ours, theirs in official_modules(model.cfg).items():
        old = next((old for old in BERT_NAMES if theirs[0].startswith(old)), None)
        if old and not ours.startswith("answer_head"):
            modules[ours] = [name.replace(old, BERT_NAMES[old], 1).replace("token_type", "token_type_embeddings")
                             for name in theirs]  # fmt: skip
    not_used = ("pooler.", "cls.", "embeddings.position_ids")
    return weights.load_parts(model, state, weights.tensor_names(model, modules), not_used, "BERT")


# ---------------------------------------------------------------------------------------------------------------------
# Training


def build(cfg: Config, corpus, checkpoint: Path | None = None) -> TDEN:
    """The model with tokenizer and first weights: a run's, official ones, or random ones. Official weights bring their
    sizes along, so cfg is changed here to what was really built."""
    official, bert, sizes, told = None, None, {}, ""
    if not checkpoint and cfg.init != "none":
        official = common.read_tensors(Path(cfg.init))
        official = official.get("model", official) if isinstance(official, dict) else {}
        chosen = {} if cfg.decoder_memory == "auto" else {"decoder_memory": cfg.decoder_memory}
        sizes = official_sizes(official) | chosen
        for name in ("feature_dim", "region_classes")[: 1 + (cfg.task == "pretrain" and cfg.region_classes > 0)]:
            if sizes.get(name, getattr(cfg, name)) != getattr(cfg, name):
                raise UserError(f"{cfg.init} reads regions with --{name.replace('_', '-')} {sizes[name]}, the data has "
                                f"{getattr(cfg, name)}: extract bottom-up attention's, or train without --init")
    elif not checkpoint and cfg.bert != "none":
        bert = weights.read_weights(cfg.bert)
        sizes = {ours: bert[0][theirs] for ours, theirs in BERT_SIZES.items() if theirs in bert[0]}
    for name, value in ({"decoder_memory": cfg.decoder_memory.replace("auto", "object")} | sizes).items():
        setattr(cfg, name, value)
    check(cfg)
    theirs = "bert-base-uncased" if official and cfg.bert == "none" else cfg.bert  # xmodaler's words are BERT's
    tokenizer = weights.choose_tokenizer(cfg, theirs, checkpoint, corpus, "wordpiece", bool(sizes))
    if tokenizer.mask is None:
        raise UserError("this tokenizer has no mask token, which pre-training shows: take BERT's")
    has_answers = "predictor.u_logits.1.bias" in (official or ())
    answers = weights.known_answers(corpus, checkpoint, cfg.init, has_answers) if cfg.task == "vqa" else ()
    model = TDEN(cfg, tokenizer, answers)
    if checkpoint and common.read_json(checkpoint.parent / "config.json")["task"] == cfg.task:
        common.load_model_weights(model, checkpoint)
    elif checkpoint:  # pre-trained, or trained for another task
        state, same = common.read_tensors(checkpoint / "model.safetensors"), {name: name for name in model.state_dict()}
        state = {name: x for name, x in state.items() if not name.startswith("answer_head.")}  # of another task
        told = weights.load_parts(model, state, same, PARTS, str(checkpoint))
    elif official is not None:
        told = load_official(model, official)
    elif bert:
        told = load_bert(model, bert[1])
    if corpus:
        corpus.answers, corpus.notes = answers, corpus.notes + [told] * bool(told)
    return model


def samples_of(cfg: Config, model: TDEN, corpus, items, task="qa", answer=None, train=False):
    """The samples of the run's task; task and answer: of vcr, see data.Choices."""
    more = dict(tokenizer=model.tokenizer, size=0, regions=corpus.regions, train=train, seed=cfg.seed + (task == "qar"))
    if cfg.task == "vcr":
        most = cfg.max_len if task == "qa" else cfg.max_len_rationale
        return data.Choices(items, task=task, answer=answer, max_len=most, mirror=cfg.mirror, **more)
    if cfg.task == "vqa":
        return data.Examples(items, answers=model.answers, max_len=cfg.max_len, mirror=cfg.mirror, **more)
    return data.Pictures(items, captions=cfg.captions_per_image, max_len=cfg.max_len, **more)


def train(cfg: Config, model: TDEN, corpus, machine, run, checkpoint: Path | None = None) -> None:
    """The loop. `checkpoint`: go on from its step with its optimizer. Luck follows from seed, step and process."""
    model.to(machine.device)
    optimizer = common.adamw(model, lambda name: cfg.lr, cfg.weight_decay, (0.9, cfg.beta2), all_matrices=True)
    start, best, is_due = run.go_on(checkpoint, optimizer)
    is_scst, train_items = cfg.task == "scst", corpus.splits["train"]
    cider = scoring.CiderReward({item.image_id: item.captions for item in train_items}) if is_scst else None
    sets = [samples_of(cfg, model, corpus, train_items, task, train=True)
            for task in (("qa", "qar") if cfg.task == "vcr" else ("",))]  # fmt: skip
    loaders = [data.train_loader(one, cfg.batch // cfg.captions_per_image, machine.workers, machine.rank,
                                 machine.processes, one.seed, start, cfg.steps, pin=machine.device.type == "cuda")
               for one in sets]  # fmt: skip
    # An iteration takes turns: pre-training's two passes over one batch, VCR's two batches, or one. Endings in the log:
    turns = {"pretrain": ["", "_2"][: cfg.passes], "vcr": ["_qa", "_qar"]}.get(cfg.task, [""])
    log = common.Logger(run, machine, cfg.steps, cfg.log_every, start)
    asked = exam.Exam(cfg.task, model, corpus, machine, partial(samples_of, cfg, model, corpus))
    # 6 x parameters x 20 tokens x passes: a lower bound, neither more regions nor the second copy being counted
    log.flops_per_item = 6 * 20 * len(turns) * sum(p.numel() for p in model.parameters())
    ddp = common.spread(model, cfg, machine, (EncoderBlock, UnderstandingBlock, GenerationBlock), find_unused=True)
    if is_due:  # saved, but stopped before its evaluation was over
        best = asked.validate(cfg, run, log, start, best)
    with common.StopRequest() as stop, contextlib.ExitStack() as ending:
        batches = [ending.enter_context(contextlib.closing(iter(loader))) for loader in loaders]
        for step in range(start, cfg.steps):
            model.train(not is_scst)  # HERE[tden-10]: no dropout in scst, so that log p is the sampler's own
            seed = (cfg.seed * machine.processes + machine.rank) * 1_000_003 + step
            torch.manual_seed(seed + 2**31)  # of dropout and of what the second pass draws; luck has other numbers
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * common.schedule(cfg, step)
            logged, to_stop = {}, False
            for turn, suffix in enumerate(turns):
                if turn < len(loaders):  # pre-training's second pass reads the batch of the first once more
                    with log.waiting():
                        batch = next(batches[turn])
                    luck = torch.Generator().manual_seed(seed)  # 32 bits of a seed count
                    rows = data.to_device(model, rows_of(batch, cfg.task, model.tokenizer, cfg, luck))
                    if is_scst:  # the loader's captions make way for the model's own
                        luck, decoder = torch.Generator(machine.device).manual_seed(seed), partial(Decoder, model, rows)
                        with torch.no_grad(), machine.autocast():
                            drawn, told = decoding.rewarded_samples(decoder, batch["image_id"], cfg.captions_per_image,
                                                                    model.tokenizer, cider, cfg.max_new, luck, "greedy")
                        rows, logged["reward"] = rows | drawn, float(told["reward"]) / cfg.batch
                    here = counts(cfg.task, rows)
                    told = [*here.values(), len(batch["bad"]), stop.signum > 0]
                    *sums, bad_in_all, stops = common.sum_over_processes(told, machine.device)
                    in_all, to_stop = dict(zip(here, sums, strict=True)), to_stop or stops > 0
                    if bad_in_all:
                        loaders[turn].judge(common.gather_lists(batch["bad"]))
                    pieces = data.pieces_of(rows, cfg.micro_batch)
                is_update = cfg.two_updates or cfg.task != "pretrain" or turn + 1 == len(turns)
                for i, piece in enumerate(pieces):
                    # HERE[tden-11]: each loss is the mean over all its targets of the global batch, however it is cut;
                    # DDP averages over processes, hence the factor. ISM's negatives are those of the piece.
                    with common.synchronised(ddp, is_update and i + 1 == len(pieces)):
                        with machine.autocast():
                            out = ddp(piece)
                        n, found = counts(cfg.task, piece), losses(cfg, out, piece)
                        parts = {name: loss * (float(n[name]) / max(1.0, in_all[name])) for name, loss in found.items()}
                        (sum(parts.values()) * machine.processes).backward()
                    for name, part in parts.items():
                        logged[name + suffix] = logged.get(name + suffix, 0.0) + part.detach()
                    if cfg.task == "pretrain" and turn + 1 < len(turns):
                        piece |= second_inputs(piece, out["mlm"], out["msg"], cfg.ss_mode, cfg.ss_prob)
                        del piece["image_ids"]  # OFFICIAL: there is no ISM in the second pass
                if is_update:
                    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
                    common.stop_if_not_finite(norm, float(sum(logged.values())), batch["image_id"], step + 1, run)
                    if cfg.grad_clip_value:
                        nn.utils.clip_grad_value_(model.parameters(), cfg.grad_clip_value)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            log.step(step + 1, logged, cfg.lr * common.schedule(cfg, step), norm, cfg.batch)
            is_due = (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps
            with log.pause():
                if is_due or to_stop:
                    common.share_buffers(model)
                    meta = {"val": {}, "best": best, "is_due": is_due}
                    if machine.is_main:
                        run.save(step + 1, model, model.tokenizer, optimizer, meta)
                if is_due:
                    best = asked.validate(cfg, run, log, step + 1, best)
            if to_stop:
                raise common.stopped(run, machine, stop.signum or signal.SIGTERM)
        if any(common.sum_over_processes([stop.signum > 0], machine.device)):  # heard in the last step
            raise common.stopped(run, machine, stop.signum or signal.SIGTERM)
    log.close()
    data.tell_of_bad(loaders)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def final_evaluation(cfg: Config, model: TDEN, checkpoint: Path, corpus, machine, folder, started: float) -> dict:
    """Every test split with its controls: metrics.json, pictures, result files in `folder`; columns of a table."""
    n_texts = 1 if cfg.data == "scenes" else 5
    asked = exam.Exam(cfg.task, model, corpus, machine, partial(samples_of, cfg, model, corpus))
    splits, columns = asked.final(folder, cfg.beam, cfg.official, n_texts)
    more = scoring.CAPTION_PROTOCOL if cfg.task in exam.TELLS else {}
    finish.record("tden", cfg, asked, checkpoint, folder, started, splits, texts_per_picture=n_texts, **more)
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Main

# what --init takes over from the run's config
SIZES = ("width heads mlp object_layers sentence_layers cross_layers decoder_layers positions vocab_size pooled "
         "answer_pooled feature_dim region_classes decoder_memory decoupled regions bert").split()  # fmt: skip


def check(cfg: Config) -> None:
    """Settings that contradict one another or are not among the choices."""
    common.check_numbers(cfg, "batch captions_per_image max_len max_new beam width heads object_layers sentence_layers "
                         "cross_layers positions pooled max_regions max_len_rationale passes")  # fmt: skip
    for name, choices in (("task", TASKS), ("ss-mode", ("argmax", "sample")), ("regions", ("files", "grid")),
                          ("decoder-memory", ("auto", "object", "understanding")), ("passes", (1, 2)),
                          ("train-on", corpora.TRAIN_ON)):  # fmt: skip
        common.choose(name, getattr(cfg, name.replace("-", "_")), choices)
    if cfg.width % cfg.heads:
        raise UserError(f"--width {cfg.width} --heads {cfg.heads}: the first must be a multiple of the second")
    corpora.check_task(cfg.task, cfg.data), common.check_drops(cfg)
    shares = "warmup label_smoothing word_mask region_mask ss_prob mirror drop_sentence drop_object drop_cross".split()
    common.check_most(cfg, {**dict.fromkeys(shares, 1), "dropout": 0.99, "beta2": 0.99999, "max_new": cfg.positions,
                            "max_len": cfg.positions - 4,
                            "max_len_rationale": cfg.positions - 4 if cfg.task == "vcr" else math.inf})  # fmt: skip


def load_data(cfg: Config):
    """The corpus of the task with its source of regions; cfg learns how many numbers and classes a region has."""
    task = cfg.task if cfg.task in QUESTION_TASKS else "caption"
    corpus = mixture.of_run(cfg, task)
    regions.attach(corpus, cfg)
    return corpus


def evaluate_run(cfg: Config, checkpoint: Path, machine, folder: Path) -> dict:
    started, corpus = time.perf_counter(), load_data(cfg)
    model = build(cfg, corpus, checkpoint).to(machine.device)
    return final_evaluation(cfg, model, checkpoint, corpus, machine, folder, started)


def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    given, command = common.parse_flags(Config, sys.argv[1:] if argv is None else argv, "tden.py", ask.COMMANDS)
    if command.caption or command.score or command.ask:
        return ask.answer_commands(command, given, TDEN, "tden", DECODING, check)
    if command.eval_only is not None:
        return compare.evaluate_runs(command.eval_only, given, "tden", Config, DECODING, check, evaluate_run)
    cfg, checkpoint = common.configure(Config, given, "tden", PRESETS, RECIPES, SIZES, takes_files=True)
    cfg.captions_per_image = 1 if cfg.task in QUESTION_TASKS else cfg.captions_per_image
    check(cfg)
    if cfg.task == "scst" and cfg.init == "none" and not cfg.resume:
        raise UserError("--task scst refines a trained model: add --init RUN, e.g. --init runs/tden-scenes-caption")
    machine = common.start_machine(cfg)
    corpus = load_data(cfg)
    if "train" not in corpus.splits:
        raise UserError(f"{corpus.name} has no training split, only {', '.join(corpus.splits) or 'all empty'}")
    k, pictures = cfg.captions_per_image, cfg.batch // cfg.captions_per_image
    least = 2 if cfg.task in ("pretrain", "retrieval") else 1
    if pictures < machine.processes * least or 0 < cfg.micro_batch < (least - 1) * 2 * k:
        raise UserError(f"--batch {cfg.batch} --micro-batch {cfg.micro_batch}: too small for {k} captions a picture on "
                        f"{machine.processes} processes; ISM needs two pictures in each piece, other tasks one")
    model = build(cfg, corpus, checkpoint)
    cfg.steps = cfg.steps or math.ceil(cfg.epochs * len(corpus.splits["train"]) / pictures)
    cfg.eval_every = cfg.eval_every or math.ceil(cfg.steps / 5)
    finish.carry_out("tden", f"TDEN ({cfg.task})", cfg, checkpoint, model, corpus, machine, started, train,
                     final_evaluation, cfg.task)  # fmt: skip


if __name__ == "__main__":
    common.run_main(main)
