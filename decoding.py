"""From a network that gives the next word's logits to captions: beam search, greedy, samples, and samples with rewards.

Nothing here knows a model. A decoder is any object, made for R = B * beam rows (image-major), with
  step(ids: LongTensor [R, t]) -> logits [R, V] of the next token; ids holds everything so far, bos first, so that a
                                  decoder with a cache reads the last column only
  reorder(rows: LongTensor [R]) -> None; the caches follow: row r now continues what row rows[r] was. Rows never leave
                                  the block of their image, so memories that depend on the image alone may stay.

Reading map: beam search | sampling | self-critical samples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from common import UserError
from eval import CiderReward, advantage

# ---------------------------------------------------------------------------------------------------------------------
# Beam search


@torch.no_grad()
def beam_search(decoder, B, beam, bos, eos, max_new, alpha=1.0, device="cpu"):
    """(ids LongTensor [B, max_new] without bos, filled with eos after the end; scores [B] = sum log p / length^alpha).

    The length counts eos. At the first step one beam counts, the others being copies. At every step an image keeps its
    best `beam - finished` continuations by summed log p, eos among them; one that ends is finished and its slot is not
    filled again. An image stops when no beam lives, or when its best finished score is at least the bound of its best
    live beam: sum / max_new^alpha, since log p only falls and a longer caption only divides by more. What lives after
    max_new tokens counts as finished with that length. Beam 1 is greedy decoding. All images and beams move together.
    """
    if alpha < 0 or beam < 1 or max_new < 1:
        raise UserError(f"beam_search needs alpha >= 0, beam >= 1 and max_new >= 1, not {alpha}, {beam}, {max_new}")
    dead = -math.inf
    ids = torch.full((B * beam, 1), bos, dtype=torch.long, device=device)
    sums = torch.full((B, beam), dead, device=device)
    sums[:, 0] = 0
    room = torch.full((B, 1), beam, device=device)
    slots = torch.arange(beam, device=device)
    blocks = torch.arange(B, device=device)[:, None] * beam
    best, best_ids = torch.full((B,), dead, device=device), torch.full((B, max_new), eos, device=device)
    for t in range(1, max_new + 1):
        log_p = decoder.step(ids).float().log_softmax(-1)
        V = log_p.size(-1)
        sums, choice = (sums[:, :, None] + log_p.view(B, beam, V)).view(B, beam * V).topk(beam)  # best first
        sums = sums.masked_fill(slots >= room, dead)
        rows, token = (blocks + choice // V).view(-1), choice % V
        if beam > 1:
            decoder.reorder(rows)
        ids = torch.cat([ids[rows], token.view(-1, 1)], dim=1)
        ended = sums > dead
        if t < max_new:
            ended &= token == eos
        score, slot = (sums / t**alpha).masked_fill(~ended, dead).max(dim=1)
        better = score > best
        best = torch.where(better, score, best)
        best_ids[better, :t] = ids.view(B, beam, t + 1)[better, slot[better], 1:]
        room -= ended.sum(dim=1, keepdim=True)
        sums = sums.masked_fill(ended, dead)
        sums = sums.masked_fill((best >= sums.amax(dim=1) / max_new**alpha)[:, None], dead)
        if not (sums > dead).any():
            break
    return best_ids, best


def greedy(decoder, B, bos, eos, max_new, device="cpu"):
    """The most probable token at every step: (ids [B, max_new] filled with eos after the end, summed log p [B])."""
    return beam_search(decoder, B, 1, bos, eos, max_new, alpha=0.0, device=device)


@torch.no_grad()
def competing_beams(decoder, B: int, beam: int, bos: int, eos: int, max_new: int, device="cpu"):
    """(ids, log_probs), each [B, max_new]: the caption with the highest sum of log p; after `eos` both are 0.

    The search of YehLi/xmodaler (decode_strategy/beam_searcher.py): a finished caption stays among the beams, with one
    continuation that costs nothing, and better unfinished ones can push it out, where `beam_search` keeps it. There is
    no length penalty. Beam 1 is greedy decoding.
    """
    ids = torch.full((B * beam, 1), bos, device=device)
    log_probs = torch.zeros(B * beam, 0, device=device)
    total = torch.full((B, beam), -math.inf, device=device)
    total[:, 0] = 0.0  # at first all beams are the same
    is_live = torch.ones(B, beam, dtype=torch.bool, device=device)
    blocks = torch.arange(B, device=device)[:, None] * beam
    for _ in range(max_new):
        log_p = decoder.step(ids).float().log_softmax(-1).view(B, beam, -1)
        V = log_p.size(2)
        stay = torch.where(torch.arange(V, device=device) == 0, 0.0, -math.inf)
        log_p = torch.where(is_live[:, :, None], log_p, stay)
        total, choice = (total[:, :, None] + log_p).flatten(1).topk(beam)  # best first
        parent, token = choice // V, choice % V
        rows = (blocks + parent).flatten()
        if beam > 1:
            decoder.reorder(rows)
        ids = torch.cat([ids[rows], token.view(-1, 1)], dim=1)
        log_probs = torch.cat([log_probs[rows], log_p.flatten(1).gather(1, choice).view(-1, 1)], dim=1)
        is_live = is_live.gather(1, parent) & (token != eos)
        if not is_live.any():
            break
    best, missing = blocks[:, 0] + total.argmax(1), max_new + 1 - ids.size(1)
    return F.pad(ids[best, 1:], (0, missing)), F.pad(log_probs[best], (0, missing))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _truncated(logits, top_k, top_p):
    """logits [R, V] with -inf outside the kept tokens: the top_k most probable, of these the fewest that reach mass
    top_p. The most probable token always stays."""
    values, token = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        values[:, top_k:] = -math.inf
    if top_p < 1:
        p = values.softmax(-1)
        values[p.cumsum(-1) - p >= top_p] = -math.inf  # those before it reach top_p already
    return torch.empty_like(logits).scatter(1, token, values)


@torch.no_grad()
def sample(decoder, B, bos, eos, max_new, generator, temperature=1.0, top_k=0, top_p=1.0):
    """One multinomial sample per row, on the generator's device: (ids [B, max_new] filled with eos after the end,
    summed log p [B] under the distribution that was sampled from, eos included).

    logits / temperature, then the top_k most probable tokens (0: all), then of these the nucleus: the fewest whose
    mass reaches top_p (Holtzman et al. 2020). Of equally probable tokens the lower id is kept.
    """
    if temperature <= 0:
        raise UserError(f"sampling needs a temperature above 0, not {temperature}; greedy decoding is its limit at 0")
    if top_k < 0 or not 0 < top_p <= 1:
        raise UserError(f"sampling needs top_k >= 0 (0: off) and 0 < top_p <= 1 (1: off), not {top_k} and {top_p}")
    ids = torch.full((B, 1), bos, dtype=torch.long, device=generator.device)
    total = torch.zeros(B, device=generator.device)
    is_live = torch.ones(B, dtype=torch.bool, device=generator.device)
    for _ in range(max_new):
        logits = decoder.step(ids).float() / temperature
        if top_k or top_p < 1:
            logits = _truncated(logits, top_k, top_p)
        log_p = logits.log_softmax(-1)
        token = torch.multinomial(log_p.exp(), 1, generator=generator)
        total += log_p.gather(1, token)[:, 0].masked_fill(~is_live, 0.0)
        token = token.masked_fill(~is_live[:, None], eos)
        is_live &= token[:, 0] != eos
        ids = torch.cat([ids, token], dim=1)
        if not is_live.any():
            break
    return F.pad(ids[:, 1:], (0, max_new + 1 - ids.size(1)), value=eos), total


# ---------------------------------------------------------------------------------------------------------------------
# Self-critical samples


def up_to_end(ids, eos: int):
    """bool like ids [R, T]: True up to the first end token, which counts."""
    is_end = ids == eos
    return is_end.cumsum(1) - is_end.long() == 0


@torch.no_grad()
def rewarded_samples(make_decoder, image_ids: list, k: int, tok, cider: CiderReward, max_new: int, luck, baseline: str):
    """Self-critical training (Rennie et al. 2017, arXiv 1612.00563), first half: k captions that the model draws itself
    for each of B images, and what they are worth.

    make_decoder() -> a fresh decoder of the B images; luck: a generator on its device; baseline: see `advantage`.
    -> ids and targets [B * k, T] in a loader's form, advantages [B * k]; and sums over the samples for the log.
    """
    B, device = len(image_ids), luck.device

    def rewards_of(ids, image_ids):
        # A caption that was cut off lacks the end token that all references have, so breaking off does not pay.
        return cider.reward(image_ids, [tok.decode(row) for row in ids.tolist()], (ids == tok.eos).any(1).tolist())

    words, _ = sample(make_decoder(), B * k, tok.bos, tok.eos, max_new, luck)
    r, b = rewards_of(words, [i for i in image_ids for _ in range(k)]).reshape(B, k), None
    if baseline == "greedy":
        best, _ = greedy(make_decoder(), B, tok.bos, tok.eos, max_new, device)
        b = rewards_of(best, image_ids)
    is_real = up_to_end(words, tok.eos)
    T = int(is_real.sum(1).max())  # the longest sample
    samples = {
        "ids": F.pad(words[:, : T - 1], (1, 0), value=tok.bos),
        "targets": words.masked_fill(~is_real, -100)[:, :T],
        "advantages": torch.from_numpy(advantage(r, baseline, b)).float().flatten().to(device),
    }
    sums = {"reward": r.sum(), "length": is_real.sum(), "truncated": (~(words == tok.eos).any(1)).sum()}
    return samples, sums
