"""Metrics worked out by hand, decoding against exhaustive search, controls. Official scores: test_golden_metrics.py."""

import itertools
import math
import random

import pytest
import torch

import decoding
import eval as scoring
from common import UserError
from tools import judge

LN2 = math.log(2)


def words(**texts):
    """Captions as token lists: words(i="a b") or, with several, words(i=["a b", "c"])."""
    return {i: t.split() if isinstance(t, str) else [ref.split() for ref in t] for i, t in texts.items()}


def random_captions(rng, n, vocabulary="abcdef"):
    return [" ".join(rng.choices(vocabulary, k=rng.randint(1, 8))) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


@pytest.mark.parametrize(
    ("raw", "tokens"),  # the right-hand sides are what Stanford's PTBTokenizer gives, without its punctuation
    [
        ("A large red circle, is left of: a blue square.", "a large red circle is left of a blue square"),
        ("The dog's toy doesn't fit; they'll cannot.", "the dog 's toy does n't fit they 'll can not"),
        ("dogs' toys, o'clock 'quoted' ``x'' \"y\"", "dogs toys o'clock quoted x y"),
        ("rock 'n' roll n 'slide in the '90s", "rock 'n' roll n slide in the '90s"),
        ("close-up - black/white -- x- mid-air.", "close-up black/white x mid-air"),
        ("1,000 at 10:30 a.m. cost $5.00 (50%).", "1,000 at 10:30 a.m. cost $ 5.00 -lrb- 50 % -rrb-"),
        ("a 1 1/2 inch, No. 5. No.", "a 1\xa01/2 inch no. 5 no"),
        ("Mr. Smith on Main St. in the U.S. Army hat.", "mr. smith on main st. in the u.s. army hat"),
        ("line one\nline two... cat.... what?!", "line one line two cat what ?!"),
        ("caf\u00e9 \u2018it\u2019s\u2019 \u201cq\u201d b&w", "caf\u00e9 it 's q b & w"),
        ("man,woman;child end.Next", "man woman child end.next"),
        (" .", ""),
    ],
)
def test_tokenizer(raw, tokens):
    assert scoring.tokenize_caption(raw) == tokens.split(" " if tokens else None)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics by hand


def test_bleu_by_hand():
    hyps = words(x="a a b", y="c d e")
    refs = words(x=["a b c d", "a w w w"], y=["c d e f", "c d"])
    # x: 'a' is clipped to 1, the most of it in one reference: 2 of 3 words, 1 of 2 pairs (a b), 0 of 1 triples; 3 words
    # against 4: brevity e^(1 - 4/3)
    alone = scoring.bleu_per_image(hyps, refs)["x"]
    assert alone["BLEU_1"] == pytest.approx(math.exp(-1 / 3) * 2 / 3, abs=1e-8)
    assert alone["BLEU_2"] == pytest.approx(math.exp(-1 / 3) * math.sqrt(2 / 3 * 1 / 2), abs=1e-8)
    # y: references of 4 and 2 words are equally far from 3: the shorter counts; the corpus has 6 words against 4 + 2.
    # Words 5 of 6, pairs 3 of 4, triples 1 of 2, fours 0 of 0: (0 + 1e-15) / (0 + 1e-9) = 1e-6
    corpus = scoring.bleu(hyps, refs)
    assert list(corpus) == ["BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4"]
    products = [5 / 6, 5 / 6 * 3 / 4, 5 / 6 * 3 / 4 / 2, 5 / 6 * 3 / 4 / 2 * 1e-6]
    assert list(corpus.values()) == pytest.approx([p ** (1 / n) for n, p in enumerate(products, 1)], abs=1e-8)


def test_rouge_by_hand():
    # Common subsequences: b d (2 of 2 words of the first reference), a c d (3 of 6 of the second). Precision
    # max(2, 3)/4, recall max(2/2, 3/6), each its own maximum: F = (1 + 1.44) 3/4 1 / (1 + 1.44 3/4) = 1.83 / 2.08
    mean, values = scoring.rouge_l(words(i="a b c d", j="x"), words(i=["b d", "a c d e f g"], j=["y"]))
    assert values == {"i": pytest.approx(1.83 / 2.08), "j": 0.0}
    assert mean == pytest.approx(1.83 / 4.16)


def test_longest_common_subsequence_against_the_table():
    rng = random.Random(0)
    for _ in range(200):
        a, b = rng.choices("abc", k=rng.randint(0, 9)), rng.choices("abc", k=rng.randint(0, 9))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, j in itertools.product(range(len(a)), range(len(b))):
            table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
        assert scoring._lcs(a, b) == table[-1][-1]


def test_cider_by_hand():
    scorer = scoring.CiderD(words(x=["a b"], y=["c d"]))  # every n-gram in one of two images: idf = ln 2 throughout
    # x: the words and the pair agree: (1 + 1 + 0 + 0) / 4 * 10
    # y: words c, d d d against c, d: min 1 1 + min(3, 1) 1 = 2 over sqrt(10) sqrt(2); pairs c d, d d twice (not
    #    known, df 1) against c d: 1 over sqrt(1 + 4) 1; lengths 4 and 2: e^(-(4 - 2)^2 / (2 6^2)) = e^(-1/18)
    mean, values = scorer.score(words(x="a b", y="c d d d"))
    expected = 10 / 4 * (2 / math.sqrt(20) + 1 / math.sqrt(5)) * math.exp(-1 / 18)
    assert values == {"x": pytest.approx(5.0), "y": pytest.approx(expected)}
    assert mean == pytest.approx((5.0 + expected) / 2)
    # "d c" has both words and no pair of y: 10/4. An empty caption has nothing.
    assert scorer.score_many("y", [["d", "c"], [], ["c", "d"]]).tolist() == pytest.approx([2.5, 0.0, 5.0])
    assert len(scorer.score_many("y", [])) == 0


def test_cider_averages_references_and_counts_images_not_captions():
    # 'a' is in both references of x and nowhere else: df 1 of 2 images, idf ln 2 (per caption it would be 2 of 3 texts)
    # 'b' is in both images: idf 0. x against "a b": words a: 1, pair a b: 1 -> 5; against "a": word 1 -> 10/4 e^(-1/72)
    scorer = scoring.CiderD(words(x=["a b", "a"], y=["b"]))
    assert scorer.score_many("x", [["a", "b"]])[0] == pytest.approx((5.0 + 2.5 * math.exp(-1 / 72)) / 2)


def test_cider_of_given_frequencies_by_hand():
    # 4 images: idf of a = ln 4/4 = 0, of b = ln 4, of the pair = ln 4, of z, unknown, ln 4
    frequency = {("a",): 4, ("b",): 1, ("a", "b"): 1, ("q", "b"): 4}
    scorer = scoring.CiderD(words(x=["a b"], y=["q"]), document_frequency=frequency, num_images=4)
    values = scorer.score_many("x", [["a", "b"], ["a"], ["b"], ["b", "z"], ["q", "b"], ["b", "y", "z"]]).tolist()
    # q: not listed itself, only as the start of a listed pair, so ln 4; the pair q b has idf 0
    off_by_one = math.exp(-1 / 72)  # in length
    assert values == pytest.approx([
        5.0, 0.0, 2.5 * off_by_one, 2.5 / math.sqrt(2), 2.5 / math.sqrt(2), 2.5 / math.sqrt(3) * off_by_one
    ])  # fmt: skip
    assert scorer.score_many("y", [["q"]])[0] == pytest.approx(2.5)
    # frequencies of which none is known: every idf is ln 2, although both images have every n-gram
    scorer = scoring.CiderD(words(x=["a b"], y=["a b"]), document_frequency={}, num_images=2)
    assert scorer.score_many("x", [["a", "b"]])[0] == pytest.approx(5.0)


def test_cider_of_one_image_is_zero():
    assert scoring.CiderD(words(x=["a b c d e"])).score(words(x="a b c d e")) == (0.0, {"x": 0.0})


def test_cider_of_ids_equals_cider_of_words():
    rng = random.Random(1)
    refs = {i: [t.split() for t in random_captions(rng, rng.randint(1, 5))] for i in range(20)}
    hyps = {i: random_captions(rng, 1, "abcdefgh")[0].split() for i in refs}  # g and h are in no reference
    ids = {letter: 50256 - 7 * k for k, letter in enumerate("hgfedcba")}
    as_ids = scoring.CiderD({i: [[ids[w] for w in t] for t in group] for i, group in refs.items()})
    expected = scoring.CiderD(refs).score(hyps)[1]
    assert as_ids.score({i: [ids[w] for w in t] for i, t in hyps.items()})[1] == pytest.approx(expected, abs=1e-12)
    # and neither company nor order matters
    for i in (7, 3):
        assert as_ids.score_many(i, [[ids["h"]] * 9, [ids[w] for w in hyps[i]]])[1] == pytest.approx(expected[i])


def test_caption_metrics_read_raw_text():
    refs = {1: ["A red disc.", "a disc"], 2: ["Two blue squares!"], 3: ["There isn't a star."]}
    hyps = {3: "there isn't a star", 1: "A DISC", 2: "Two, blue; squares"}
    metrics = scoring.caption_metrics(hyps, refs)
    assert list(metrics) == ["BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr_D"]
    assert metrics["BLEU_2"] == pytest.approx(1) and metrics["ROUGE_L"] == pytest.approx(1)
    tokens = words(a=["a red disc", "a disc"], b=["two blue squares"], c=["there is n't a star"])
    expected, _ = scoring.CiderD(tokens).score(words(a="a disc", b="two blue squares", c="there is n't a star"))
    assert metrics["CIDEr_D"] == pytest.approx(expected)


def test_caption_metrics_ignore_the_order_of_delivery():
    rng = random.Random(3)  # to the last bit: two processes deliver in another order than one
    refs = {i: random_captions(rng, 3) for i in range(300)}
    hyps = {i: random_captions(rng, 1)[0] for i in refs}
    backwards = dict(sorted(hyps.items(), reverse=True))
    assert scoring.caption_metrics(hyps, refs) == scoring.caption_metrics(backwards, refs)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"1 of 2 images lack a caption \(first \['y'\]\)"):
        scoring.bleu(words(x="a"), words(x=["a"], y=["b"]))
    with pytest.raises(UserError, match=r"1 captions are of other images \(first \['y'\]\)"):
        scoring.rouge_l(words(x="a", y="b"), words(x=["a"]))
    with pytest.raises(UserError, match="empty"):
        scoring.caption_metrics({}, {})
    with pytest.raises(UserError, match=r"without: \['y'\]"):
        scoring.caption_metrics({"x": "a", "y": "b"}, {"x": ["a"], "y": []})
    with pytest.raises(UserError, match="num_images"):
        scoring.CiderD(words(x=["a"]), document_frequency={("a",): 1})
    with pytest.raises(UserError, match="'z'"):
        scoring.CiderD(words(x=["a"])).score(words(z="a"))


# ---------------------------------------------------------------------------------------------------------------------
# Truth and controls


def test_truth_metrics_by_hand():
    import scenes

    world = scenes.get_world("full")

    def scene(index, *kinds, panel=None):
        things = [scenes.Obj(shape, color, "solid", "large", 0.25 + 0.5 * k, 0.25, 0.1)
                  for k, (color, shape) in enumerate(kinds)]  # fmt: skip
        return scenes.Scene(world, 0, "test", index, tuple(things), (), panel, 0)

    panel = scenes.Panel(0.1, 0.6, 0.9, 0.9, ((0.3, 0.75), (0.7, 0.75)))
    worlds = {
        10: scene(0, ("red", "circle"), ("blue", "square")),
        11: scene(1, ("red", "circle")),
        12: scene(2, ("blue", "square")),
        13: scene(3, ("blue", "star"), panel=panel),
    }
    hyps = {
        10: "there is a red circle",  # true; of 10 and 11, unknown of 13: 2 of 4
        11: "there is a blue square",  # false; of 10 and 12: 2 of 4
        12: "blah blah",  # unparsable: of none
        13: "there is a red circle",  # unknown, not true; 2 of 4 again
    }
    assert judge.truth_metrics(hyps, worlds) == {
        "caption_true": 1 / 4, "caption_unparsable": 1 / 4, "caption_generality": (2 + 2 + 0 + 2) / 16,
    }  # fmt: skip
    verdicts = [judge.verdict(hyps[i], worlds[i]) for i in worlds]
    assert verdicts == ["true", "false", "unparsable", "unknown"]


def test_truth_metrics_judge_a_repeated_caption_once(monkeypatch):
    import scenes

    judged = []

    def is_true(caption, scene):
        judged.append(caption)
        return scenes.Truth.TRUE

    monkeypatch.setattr(scenes, "is_true", is_true)
    metrics = judge.truth_metrics(dict.fromkeys(range(50), "a thing"), dict.fromkeys(range(50)))
    assert metrics == {"caption_true": 1.0, "caption_unparsable": 0.0, "caption_generality": 1.0}
    assert len(judged) <= 51  # not 50 x 50


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_shuffled_moves_every_image(n):
    ids = [f"image {k}" for k in range(n)]
    for seed in range(20):
        permuted = scoring.shuffled(ids, seed)
        assert sorted(permuted) == sorted(ids)
        assert all(a != b for a, b in zip(ids, permuted, strict=True))
    assert scoring.shuffled(ids) == scoring.shuffled(ids, seed=0)
    assert n < 10 or scoring.shuffled(ids) != scoring.shuffled(ids, seed=1)
    assert scoring.shuffled(["alone"]) == ["alone"] and scoring.shuffled([]) == []


def test_best_constant_caption_equals_brute_force():
    rng = random.Random(2)
    for _ in range(5):
        refs = {i: random_captions(rng, rng.randint(1, 4)) for i in range(12)}
        train = random_captions(rng, 40, "abcdefgh")
        scorer = scoring.CiderD({i: [t.split() for t in group] for i, group in refs.items()})
        brute = {t: scorer.score(dict.fromkeys(refs, t.split()))[0] for t in train}
        assert scorer.score_everywhere([t.split() for t in brute]).tolist() == pytest.approx(list(brute.values()))
        assert scoring.best_constant_caption(train, refs) == max(brute, key=brute.get)
        few = list(dict.fromkeys(train))[:7]
        assert scoring.best_constant_caption([train[0], *train], refs, limit=7) == max(few, key=brute.get)
    with pytest.raises(UserError, match="no training captions"):
        scoring.best_constant_caption([], refs)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

BOS, EOS = 7, 0  # bos is no token of the toy's vocabulary, so reading it as one would fail


class Tree:
    """A decoder with free logits for every image and prefix: table[t][image, number of the prefix] of shape [V]."""

    def __init__(self, table, beam=1):
        self.table, self.beam, self.calls = table, beam, 0
        self.V = table[0].size(-1)

    def step(self, ids):
        assert (ids[:, 0] == BOS).all()
        self.calls += 1
        number = torch.zeros(len(ids), dtype=torch.long)
        for column in ids[:, 1:].T:
            number = number * self.V + column
        return self.table[ids.size(1) - 1][torch.arange(len(ids)) // self.beam, number]

    def reorder(self, rows):
        assert (rows // self.beam == torch.arange(len(rows)) // self.beam).all(), "a row left the block of its image"


class CachedTree(Tree):
    """The same, but it reads the last token only and keeps the rest itself."""

    def __init__(self, table, beam=1):
        super().__init__(table, beam)
        self.cache = torch.zeros(table[0].size(0) * beam, dtype=torch.long)

    def step(self, ids):
        if ids.size(1) > 1:
            self.cache = self.cache * self.V + ids[:, -1]
        return self.table[ids.size(1) - 1][torch.arange(len(ids)) // self.beam, self.cache]

    def reorder(self, rows):
        super().reorder(rows)
        self.cache = self.cache[rows]


def tree(seed, B=1, V=3, steps=3, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(B, V**t, V, generator=generator) for t in range(steps)]


def log_p(table, image, tokens):
    """Sum of log p along a path, stepping down the tree."""
    V, number, total = table[0].size(-1), 0, 0.0
    for t, token in enumerate(tokens):
        total += table[t][image, number].log_softmax(-1)[token].item()
        number = number * V + token
    return total


def by_probability(*rows):
    """A one-image tree from probabilities per step, a row per prefix."""
    return [torch.tensor(step).log()[None] for step in rows]


@pytest.mark.parametrize(("V", "steps", "beam"), [(4, 2, 4), (3, 3, 9)])
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0, 3.0])
def test_a_beam_wide_enough_is_exhaustive_search(V, steps, beam, alpha):
    def paths(prefix=()):
        if len(prefix) == steps or prefix[-1:] == (EOS,):
            yield prefix
        else:
            for token in range(V):
                yield from paths((*prefix, token))

    for seed in range(10):
        table = tree(seed, V=V, steps=steps)
        best = max(paths(), key=lambda path: log_p(table, 0, path) / len(path) ** alpha)
        ids, scores = decoding.beam_search(Tree(table, beam), 1, beam, BOS, EOS, steps, alpha)
        assert ids.tolist() == [[*best, *[EOS] * (steps - len(best))]]
        assert scores[0].item() == pytest.approx(log_p(table, 0, best) / len(best) ** alpha, abs=1e-5)


def test_beam_search_against_plain_lists():
    """The stated rule for one image, in lists: narrow beams, where search errors are part of the definition."""

    def plain(table, image, beam, steps, alpha):
        live, finished = [((), 0.0)], []
        for t in range(1, steps + 1):
            grown = [((*path, token), log_p(table, image, (*path, token))) for path, _ in live for token in range(4)]
            kept = sorted(grown, key=lambda pair: -pair[1])[: beam - len(finished)]
            ends = [pair for pair in kept if pair[0][-1] == EOS or t == steps]
            finished += [(total / t**alpha, path) for path, total in ends]
            live = [pair for pair in kept if pair not in ends]
        return max(finished)

    for seed, beam, alpha in itertools.product(range(8), (1, 2, 3), (0.0, 1.0)):
        table = tree(seed, B=2, V=4, steps=5)
        ids, scores = decoding.beam_search(Tree(table, beam), 2, beam, BOS, EOS, 5, alpha)
        for image in range(2):
            score, path = plain(table, image, beam, 5, alpha)
            assert ids[image].tolist() == [*path, *[EOS] * (5 - len(path))]
            assert scores[image].item() == pytest.approx(score, abs=1e-5)


def test_greedy_takes_the_best_token_each_time_and_equals_beam_1():
    for seed in range(10):
        table = tree(seed, B=3, V=4, steps=4)
        ids, sums = decoding.greedy(Tree(table), 3, BOS, EOS, 4)
        for image in range(3):
            path, number = [], 0
            while len(path) < 4 and EOS not in path:
                path.append(table[len(path)][image, number].argmax().item())
                number = number * 4 + path[-1]
            assert ids[image].tolist() == path + [EOS] * (4 - len(path))
            assert sums[image].item() == pytest.approx(log_p(table, image, path), abs=1e-5)
        assert torch.equal(decoding.beam_search(Tree(table), 3, 1, BOS, EOS, 4)[0], ids)


def test_a_cached_decoder_gives_the_same_when_its_cache_follows():
    for seed in range(5):
        table = tree(seed, B=3, V=5, steps=4)
        plain, cached = (decoding.beam_search(kind(table, 4), 3, 4, BOS, EOS, 4) for kind in (Tree, CachedTree))
        assert torch.equal(plain[0], cached[0]) and torch.equal(plain[1], cached[1])
        plain, cached = (decoding.greedy(kind(table), 3, BOS, EOS, 4) for kind in (Tree, CachedTree))
        assert torch.equal(plain[0], cached[0])


def test_an_image_is_decoded_alike_in_any_company():
    for seed in range(5):
        table = tree(seed, B=3, V=4, steps=5)
        table[0][1, :, EOS] += 5  # this image stops long before the others
        ids, scores = decoding.beam_search(Tree(table, 3), 3, 3, BOS, EOS, 5)
        for image in range(3):
            alone = decoding.beam_search(Tree([t[image : image + 1] for t in table], 3), 1, 3, BOS, EOS, 5)
            assert torch.equal(alone[0][0], ids[image]) and torch.equal(alone[1][0], scores[image])


def test_a_finished_beam_gives_its_slot_up():
    table = by_probability(
        [[0.5, 0.3, 0.2]],  # beam 2 keeps eos, finished, and "1" (.3)
        [[1.0, 0.0, 0.0], [0.0, 0.6, 0.4], [1.0, 0.0, 0.0]],  # one slot is left: "1 1" (.18); "1 2" (.12) must go,
        [[1, 0, 0]] * 4 + [[0.0, 0.6, 0.4]] + [[1, 0, 0]] * 4,  # or it would win: ln .12 / 9 > ln .108 / 9 ("1 1 1")
    )
    ids, scores = decoding.beam_search(Tree(table, 2), 1, 2, BOS, EOS, 3, alpha=2.0)
    assert ids.tolist() == [[1, 1, 1]]
    assert scores[0].item() == pytest.approx(math.log(0.108) / 9)


def test_alpha_weighs_length():
    # eos at once: ln .5; "1 eos": ln .45. By sum the short one, per token the long one: ln .45 / 2 > ln .5
    table = by_probability([[0.5, 0.5]], [[1.0, 0.0], [0.9, 0.1]])
    short, long = (decoding.beam_search(Tree(table, 2), 1, 2, BOS, EOS, 2, alpha) for alpha in (0.0, 1.0))
    assert short[0].tolist() == [[0, 0]] and short[1][0].item() == pytest.approx(-LN2)
    assert long[0].tolist() == [[1, 0]] and long[1][0].item() == pytest.approx(math.log(0.45) / 2)


def test_what_never_ends_is_cut_at_max_new():
    table = by_probability(*([[0.0, 0.25, 0.75]] * 3**t for t in range(4)))
    ids, scores = decoding.beam_search(Tree(table, 2), 1, 2, BOS, EOS, 4)
    assert ids.tolist() == [[2, 2, 2, 2]] and scores[0].item() == pytest.approx(math.log(0.75))
    ids, sums = decoding.greedy(Tree(table), 1, BOS, EOS, 4)
    assert ids.tolist() == [[2, 2, 2, 2]] and sums[0].item() == pytest.approx(4 * math.log(0.75))


def test_search_ends_when_nothing_can_overtake():
    table = by_probability(*([[0.9, 0.1]] * 2**t for t in range(4)))  # eos .9: done; the rest has at most ln .1 / 4
    decoder = Tree(table, 2)
    assert decoding.beam_search(decoder, 1, 2, BOS, EOS, 4)[0].tolist() == [[0, 0, 0, 0]]
    assert decoder.calls == 1


def test_impossible_settings_are_refused():
    for setting in ({"alpha": -1.0}, {"beam": 0}, {"max_new": 0}):
        with pytest.raises(UserError, match="alpha >= 0"):
            decoding.beam_search(Tree(tree(0)), **{"B": 1, "beam": 1, "bos": BOS, "eos": EOS, "max_new": 2, **setting})


def test_samples_follow_the_model():
    B = 4000
    table = [t.expand(B, -1, -1) for t in tree(3, V=3, steps=3)]
    ids, sums = decoding.sample(Tree(table), B, BOS, EOS, 3, torch.Generator().manual_seed(0))
    assert ids.shape == (B, 3)
    for row, total in list(zip(ids.tolist(), sums.tolist(), strict=True))[:200]:
        path = row[: row.index(EOS) + 1] if EOS in row else row
        assert row == path + [EOS] * (3 - len(path))
        assert total == pytest.approx(log_p(table, 0, path), abs=1e-5)
    for path in itertools.product((1, 2), range(3)):  # 4000 draws: three standard deviations are at most 0.024
        share = (ids[:, :2] == torch.tensor(path)).all(1).float().mean().item()
        assert share == pytest.approx(math.exp(log_p(table, 0, path)), abs=0.025)
    cold, _ = decoding.sample(Tree(table), B, BOS, EOS, 3, torch.Generator().manual_seed(0), temperature=1e-3)
    assert torch.equal(cold, decoding.greedy(Tree(table), B, BOS, EOS, 3)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Evaluators


def decode_mean(batch):
    return [f"caption {p.float().mean().item():.0f}" for p in batch["pixels"]]


def batches(*groups):
    pixels = [torch.tensor(ids, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) for ids in groups]
    return [{"image_id": list(ids), "pixels": p} for ids, p in zip(groups, pixels, strict=True)]


def test_caption_split_of_one_process():
    captions = scoring.caption_split(decode_mean, batches([4, 2], [9]))
    assert captions == {4: "caption 4", 2: "caption 2", 9: "caption 9"}
    with pytest.raises(ValueError):  # a decoder that loses a caption must not shift the others
        scoring.caption_split(lambda pixels: ["one"], batches([4, 2]))


def _process(rank, address, shares, out):
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    captions = scoring.caption_split(decode_mean, shares[rank])
    torch.save(captions, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_caption_split_of_two_processes(tmp_path):
    shares = batches([0, 2, 4]), batches([1], [3, 0])  # picture 0 is padding of the second
    torch.multiprocessing.spawn(_process, args=(f"file://{tmp_path}/rendezvous", shares, tmp_path), nprocs=2)
    expected = {i: f"caption {i}" for i in range(5)}
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == expected
