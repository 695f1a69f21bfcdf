"""The search of YehLi/xmodaler, and samples with their rewards; test_eval.py has the other ways of decoding."""

import numpy as np
import pytest
import torch
from test_eval import BOS, EOS, CachedTree, Tree, by_probability, log_p, tree

import decoding


def by_lists(table, image, beam, steps):
    """One image with plain lists: finished captions stay among the beams and cost nothing more."""
    beams, V = [((), 0.0)], table[0].size(-1)
    for _ in range(steps):
        more = []
        for tokens, total in beams:
            if tokens and tokens[-1] == EOS:
                more.append((tokens, total))
            else:
                more += [((*tokens, k), log_p(table, image, (*tokens, k))) for k in range(V)]
        beams = sorted(more, key=lambda one: -one[1])[:beam]
        if all(tokens[-1] == EOS for tokens, _ in beams):
            break
    return beams[0]


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
def test_competing_beams_against_plain_lists(beam):
    for seed in range(12):
        table = tree(seed, B=3, V=4, steps=4)
        found = [decoding.competing_beams(kind(table, beam), 3, beam, BOS, EOS, 4) for kind in (Tree, CachedTree)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "the cache follows the beams"
        ids, log_probs = found[0]
        assert ids.shape == log_probs.shape == (3, 4)
        for image in range(3):
            tokens, total = by_lists(table, image, beam, 4)
            padded = [*tokens, *[0] * (4 - len(tokens))]
            assert ids[image].tolist() == padded and log_probs[image].sum().item() == pytest.approx(total, abs=1e-4)
            assert not log_probs[image, len(tokens) :].any()
            for t in range(len(tokens)):
                step = log_p(table, image, tokens[: t + 1]) - log_p(table, image, tokens[:t])
                assert log_probs[image, t].item() == pytest.approx(step, abs=1e-4)


def test_a_finished_caption_competes_and_can_be_pushed_out():
    """Its slot is not its own: here two longer captions together are better than the one that ended first."""
    table = by_probability([[0.4, 0.35, 0.25]], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    ids, log_probs = decoding.competing_beams(Tree(table, 2), 1, 2, BOS, EOS, 2)
    assert ids.tolist() == [[0, 0]] and log_probs[0].exp().tolist() == pytest.approx([0.4, 1.0])
    table = by_probability([[0.3, 0.7, 0.0]], [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    ids, _ = decoding.competing_beams(Tree(table, 2), 1, 2, BOS, EOS, 2)
    assert ids.tolist()[0][0] == 1, "0.35 is more than 0.3"


def test_competing_beams_of_one_are_greedy_and_end_early():
    for seed in range(5):
        table = tree(seed, B=4, V=4, steps=4)
        ids, log_probs = decoding.competing_beams(Tree(table), 4, 1, BOS, EOS, 4)
        best, total = decoding.greedy(Tree(table), 4, BOS, EOS, 4)
        assert torch.equal(ids, best)
        torch.testing.assert_close(log_probs.sum(1), total, atol=1e-4, rtol=1e-4)
    ends = by_probability([[1.0, 0.0]], [[0.5, 0.5]] * 2, [[0.5, 0.5]] * 4)
    decoder = Tree(ends)
    decoding.competing_beams(decoder, 1, 1, BOS, EOS, 3)
    assert decoder.calls == 1


def test_up_to_the_first_end():
    ids = torch.tensor([[3, 2, 5, 2], [2, 2, 2, 2], [3, 4, 5, 6]])
    assert decoding.up_to_end(ids, 2).tolist() == [[True, True, False, False], [True] + [False] * 3, [True] * 4]


class Words:
    """Texts of digits; the reward of a caption is the number of its ones, less a half where it was cut off."""

    bos, eos = BOS, EOS

    def decode(self, ids):
        return "".join(str(i) for i in ids[: ids.index(EOS) if EOS in ids else None])

    def reward(self, image_ids, texts, ended):
        self.asked = list(zip(image_ids, texts, ended, strict=True))
        return np.array([text.count("1") - 0.5 * (not end) for text, end in zip(texts, ended, strict=True)])


class Drawn(Tree):
    """A Tree that is asked for k rows of each image, and for one by greedy decoding."""

    def step(self, ids):
        self.beam = len(ids) // self.table[0].size(0)
        return super().step(ids)


@pytest.mark.parametrize("baseline", ["greedy", "leave-one-out"])
def test_rewarded_samples(baseline):
    table, words, made = tree(3, B=2, V=3, steps=4), Words(), []

    def make():
        made.append(Drawn(table))
        return made[-1]

    luck = torch.Generator().manual_seed(0)
    samples, sums = decoding.rewarded_samples(make, ["a", "b"], 5, words, words, 4, luck, baseline)
    assert len(made) == 1 + (baseline == "greedy"), "a fresh decoder each, whose cache is empty"
    ids, targets = samples["ids"], samples["targets"]
    asked = words.asked if baseline != "greedy" else None
    rows = [[k for k in row if k != -100] for row in targets.tolist()]
    assert max(map(len, rows)) == targets.size(1) == ids.size(1)
    for given, row in zip(ids.tolist(), rows, strict=True):
        assert given[: len(row)] == [BOS, *row[:-1]] and EOS not in row[:-1]
    r = np.array([row.count(1) - 0.5 * (EOS not in row) for row in rows]).reshape(2, 5)
    if baseline == "greedy":
        assert [i for i, *_ in words.asked] == ["a", "b"]
        best, _ = decoding.greedy(Drawn(table), 2, BOS, EOS, 4)
        kept = [row[: row.index(EOS) + 1] if EOS in row else row for row in best.tolist()]
        by_hand = r - np.array([[row.count(1) - 0.5 * (EOS not in row)] for row in kept])
    else:
        assert [i for i, *_ in asked] == ["a"] * 5 + ["b"] * 5
        by_hand = r - (r.sum(1, keepdims=True) - r) / 4
    np.testing.assert_allclose(samples["advantages"].view(2, 5).numpy(), by_hand, atol=1e-6)
    assert sums["reward"] == pytest.approx(r.sum()) and sums["length"] == sum(map(len, rows))
    assert sums["truncated"] == sum(EOS not in row for row in rows)
