"""Metrics, decoding and evaluators: what a fifth paper would use unchanged. Nothing here knows a model.

    tokenizer          tokenize_caption: PTB-like rules, no Java
    BLEU               bleu, bleu_per_image: corpus BLEU-1..4, closest reference length
    ROUGE-L            rouge_l
    CIDEr-D            CiderD: corpus scores, pairs of image and caption, one caption against every image
    rewards            CiderReward, advantage: what self-critical training maximises
    captions           caption_metrics: the above from raw strings; official_caption_metrics: by the official programs
    result files       write_caption_results, in the form of COCO and NoCaps (tools/score.py reads them)
    truth on scenes    truth_metrics, verdict: which captions are true, and of how many scenes
    controls           shuffled, best_constant_caption
    decoding           beam_search, greedy, sample, over any object with `step` and `reorder`
    evaluators         caption_split: decode a split, exactly once per image, on any number of processes;
                       evaluate_captions: every test split with its controls; evaluate_runs: --eval-only

BLEU, ROUGE-L and CIDEr-D re-state the definitions of coco-caption (pycocoevalcap) and agree with it to 1e-6 on equal
tokens; the class `Cider` there is CIDEr-D. All values are fractions but CIDEr-D, where 1.0 is what papers print as 100.
Throughout, `hyps` holds one caption per image id and `refs` several; tokens may be any hashables (words, token ids).
"""

import dataclasses
import math
import os
import random
import re
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common
from common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

# A blank goes in front of a clitic (dog|'s, do|n't) and inside a few spoken forms that the Penn Treebank splits.
_SPLIT = re.compile(
    r"(?<=\w)(?=(?:n't|'(?:s|re|ve|ll|d|m))\b)|(?<=\bcan)(?=not\b)|(?<=\bgon|\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)"
)
_TOKEN = re.compile(
    r"(?<![\w.])(?:[a-z]\.)+(?!\w)"  # u.s.  a.m.  b.
    r"|\b(?:mr|mrs|ms|dr|jr|sr|st|ave|blvd|rd|mt|ft|vs|etc|inc|co|corp|ltd|bros|gen|col|capt|lt|sgt|rev|prof"
    r"|jan|feb|aug|sept|oct|nov|dec|e\.g|i\.e|ph\.d)\.(?!\w)|\bno\.(?=\ \d)"  # other full stops are dropped
    r"|'\d\ds?\b|'(?:s|re|ve|ll|d|m|em)\b|'n'?(?!\w)|n't\b"  # clitics, '90s
    r"|\d+\ \d+/\d+"  # 1 1/2 is one token
    r"|\w+(?:(?:[-'./@]|(?<=\d)[,:](?=\d))\w+)*"  # close-up, o'clock, black/white, 10:30, 1,000
    r"|[()\[\]{}]|[!?]{2,}|[^\w\s.?!,:;'`\"-]"  # brackets; symbols such as & % $ stand alone
)
# The official evaluation drops "-LRB-" from text that it has just lower-cased, so the bracket tokens stay.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": " ", "–": "-", "—": "-"})


def tokenize_caption(text):
    """Raw caption -> list of lower-case words, close to coco-caption's PTB tokenizer without its punctuation.

    Rules, not the Java program: equal on 2,062 of 2,063 COCO captions, good for training and development. Reported
    numbers should come from the official tokenizer, and say so.
    """
    text = _SPLIT.sub(" ", text.lower().replace("&amp;", "&").translate(_PLAIN))
    return [_BRACKETS.get(token, token).replace(" ", "\xa0") for token in _TOKEN.findall(text)]


# ---------------------------------------------------------------------------------------------------------------------
# BLEU


def _same_images(hyps, refs):
    """The ids, in the references' order: sums do not depend on the order in which processes delivered captions."""
    missing, extra = [i for i in refs if i not in hyps], [i for i in hyps if i not in refs]
    if missing or extra:
        raise UserError(
            f"captions and references must be of the same images: {len(missing)} of {len(refs)} images lack a caption "
            f"(first {missing[:3]}), {len(extra)} captions are of other images (first {extra[:3]})"
        )
    if not refs:
        raise UserError("there are no captions to score: the split is empty")
    return list(refs)


def _ngram_counts(tokens):
    return Counter(tuple(tokens[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(tokens) - n + 1))


def _bleu_counts(hyp, refs):
    """[10]: length, reference length, then clipped matches and guesses of the four orders."""
    most = Counter()
    for ref in refs:
        most |= _ngram_counts(ref)  # union of counters = maximum over references
    matches = [0] * 4
    for gram, count in _ngram_counts(hyp).items():
        matches[len(gram) - 1] += min(count, most[gram])
    closest = min((abs(len(ref) - len(hyp)), len(ref)) for ref in refs)[1]  # ties: the shorter reference
    return np.array([len(hyp), closest, *matches, *(max(0, len(hyp) - n) for n in range(4))], dtype=float)


def _bleu_values(counts):
    hyp_len, ref_len, matches, guesses = counts[0], counts[1], counts[2:6], counts[6:]
    # BLEU-n = BP (prod_{k<=n} matches_k / guesses_k)^(1/n); the tiny numbers are coco-caption's, against 0/0
    precisions = np.cumprod((matches + 1e-15) / (guesses + 1e-9)) ** (1 / np.arange(1, 5))
    ratio = (hyp_len + 1e-15) / (ref_len + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return {f"BLEU_{n + 1}": float(brevity * precisions[n]) for n in range(4)}


def bleu(hyps, refs):
    """Corpus BLEU_1..BLEU_4 of tokenized captions: counts are summed over images before anything is divided."""
    return _bleu_values(sum(_bleu_counts(hyps[i], refs[i]) for i in _same_images(hyps, refs)))


def bleu_per_image(hyps, refs):
    """id -> BLEU_1..BLEU_4 of that image alone. Their mean is not the corpus value."""
    return {i: _bleu_values(_bleu_counts(hyps[i], refs[i])) for i in _same_images(hyps, refs)}


# ---------------------------------------------------------------------------------------------------------------------
# ROUGE-L


def _lcs(a, b):
    """Length of the longest common subsequence, a row of the table at a time as the bits of an integer
    (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"): a zero bit is a step up in the row."""
    places = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for token in b:
        met = row & places.get(token, 0)
        row = ((row + met) | (row - met)) & full
    return len(a) - row.bit_count()


def rouge_l(hyps, refs, beta=1.2):
    """(mean over images, dict id -> ROUGE-L). Precision and recall take their maxima over references separately, as
    coco-caption does; beta 1.2 is its constant."""
    values = {}
    for i in _same_images(hyps, refs):
        hyp = hyps[i]
        shared = [(_lcs(hyp, ref), len(ref)) for ref in refs[i]]
        p = max(length for length, _ in shared) / max(1, len(hyp))
        r = max(length / max(1, ref_len) for length, ref_len in shared)
        values[i] = (1 + beta**2) * p * r / (r + beta**2 * p) if p and r else 0.0
    return sum(values.values()) / len(values), values


# ---------------------------------------------------------------------------------------------------------------------
# CIDEr-D

_KEY = 2**31  # an n-gram's key: id of its first n - 1 tokens * _KEY + id of its last token
_END = np.iinfo(np.int64).max  # closes every sorted table, so that a search always lands on an element


def _ranges(start, count):
    """Concatenated ranges start[k] .. start[k] + count[k]: (k of every element, the element)."""
    owner = np.repeat(np.arange(len(count)), count)
    return owner, np.arange(len(owner)) + np.repeat(start - np.cumsum(count) + count, count)


def _lengths(texts):
    return np.array([len(text) for text in texts], dtype=int)


def _find(table, keys):
    """Positions of `keys` in a sorted table that ends with _END, and whether each is there."""
    at = np.searchsorted(table, keys)
    return at, table[at] == keys


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) against references that are prepared once; 1.0 is what papers print as 100.

    refs: dict id -> list of token lists. The default document frequency of an n-gram is the number of these images that
    have it in any reference. `document_frequency` (dict n-gram tuple -> count) with `num_images` replaces it (the
    frequencies of a training set, for instance); n-grams unknown there count as df 1.

    Of one image alone every score is 0 (log 1 = 0): never build it from a mini-batch; build it from the whole split and
    ask `score_pairs` for the scores of one.

    All captions live in flat arrays and an n-gram is an integer; the tf-idf vectors of all references of one order are
    one sorted array of (reference, n-gram) pairs with their weights. Measured: bench/README.md.
    """

    SIGMA = 6.0  # words; of the length factor, as in coco-caption

    def __init__(self, refs, document_frequency=None, num_images=None):
        if not refs or not all(len(group) for group in refs.values()):
            empty = [i for i, group in refs.items() if not len(group)]
            raise UserError(f"CIDEr-D needs at least one reference per image; without: {empty[:3] or 'no images'}")
        if (document_frequency is None) != (num_images is None):
            raise UserError("document_frequency and num_images belong together: give both or neither")
        count = np.array([len(group) for group in refs.values()])
        self.first = dict(zip(refs, np.cumsum(count) - count, strict=True))  # id -> its first reference
        self.count = dict(zip(refs, count, strict=True))
        self.image = np.repeat(np.arange(len(refs)), count)  # [R] image of each reference
        texts = [ref for group in refs.values() for ref in group]
        R = len(texts)
        self.lengths = _lengths(texts)
        self.log_images = math.log(len(refs) if num_images is None else num_images)
        # Given frequencies enter as texts of their own behind the references, so that their n-grams get ids too.
        given = document_frequency or {}
        given_df = np.fromiter(given.values(), dtype=float, count=len(given))
        given_n = np.array([len(gram) for gram in given], dtype=int)
        self.vocab, self.orders = {}, []
        for n, (text, gram, keys) in enumerate(self._ngrams(texts + list(given), learn=True)):
            G = len(keys)
            if document_frequency is not None:
                df = np.zeros(G)
                whole = text >= R
                whole[whole] = given_n[text[whole] - R] == n + 1  # prefixes of a listed n-gram are not listed by it
                df[gram[whole]] = given_df[text[whole] - R]
                text, gram = text[text < R], gram[text < R]
            pairs, tf = np.unique(text * G + gram, return_counts=True)
            text, gram = np.divmod(pairs, G)
            if document_frequency is None:
                df = np.bincount(np.unique(self.image[text] * G + gram) % G, minlength=G)
            idf = self.log_images - np.log(np.maximum(1.0, df))
            weights = tf * idf[gram]
            norms = np.sqrt(np.bincount(text, weights**2, minlength=R))
            self.orders.append((keys, idf, np.append(pairs, _END), np.append(weights, 0.0), norms))

    def _ngrams(self, texts, learn=False):
        """Yields, per order 1..4, (text index, n-gram id) of every occurrence and the table of known keys. Ids from
        len(table) on are n-grams that no reference has."""
        lengths = _lengths(texts)
        vocab = self.vocab  # grows with the hypotheses: a new word's id simply is in no table
        tokens = np.fromiter((vocab.setdefault(w, len(vocab)) for t in texts for w in t), np.int64, int(lengths.sum()))
        text = np.repeat(np.arange(len(texts)), lengths)
        gram = np.zeros(len(tokens), dtype=np.int64)  # id of the n-gram that starts here; of order 0 there is one
        for n in range(4):
            starts = np.flatnonzero(text[n:] == text[: max(0, len(text) - n)])
            keys, inverse = np.unique(gram[starts] * _KEY + tokens[starts + n], return_inverse=True)
            if learn:
                table, ids = np.append(keys, _END), inverse
            else:
                table = self.orders[n][0]
                at, known = _find(table, keys)
                ids = np.where(known, at, len(table) + np.arange(len(keys)))[inverse]
            yield text[starts], ids, table
            gram[starts] = ids

    def _vectors(self, texts):
        """Yields, per order, the tf-idf vectors of new texts: (text, n-gram, tf, weight) of the n-grams that references
        have, and the norms [H] over all n-grams, unknown ones included."""
        for (text, gram, table), (_, idf, *_) in zip(self._ngrams(texts), self.orders, strict=True):
            G = len(table) + len(gram) + 1
            pairs, tf = np.unique(text * G + gram, return_counts=True)
            text, gram = np.divmod(pairs, G)
            known = gram < len(table)
            weights = tf * self.log_images
            weights[known] = tf[known] * idf[gram[known]]
            norms = np.sqrt(np.bincount(text, weights**2, minlength=len(texts)))
            yield text[known], gram[known], tf[known], weights[known], norms

    def _length_factor(self, texts, refs):
        return np.exp(-((texts - self.lengths[refs]) ** 2) / (2 * self.SIGMA**2))

    def score_pairs(self, ids, hyps):
        """[len(hyps)] CIDEr-D of each caption hyps[k], a token list, against the references of image ids[k].

        Ids may repeat. Raises UserError for an image without references."""
        unknown = [i for i in ids if i not in self.first]
        if unknown or len(ids) != len(hyps):
            what = f"no references for images {unknown[:3]}" if unknown else f"{len(ids)} ids, {len(hyps)} captions"
            raise UserError(f"CIDEr-D: {what}")
        start, count = np.array([(self.first[i], self.count[i]) for i in ids], dtype=int).reshape(-1, 2).T
        text_of, ref_of = _ranges(start, count)  # [P] all pairs of a text and a reference of its image
        first_pair = np.cumsum(count) - count
        similarity = np.zeros(len(text_of))
        for (text, gram, _, weight, norm), (keys, _, pairs, ref_weight, ref_norm) in zip(
            self._vectors(hyps), self.orders, strict=True
        ):
            element, pair = _ranges(first_pair[text], count[text])
            at, found = _find(pairs, ref_of[pair] * len(keys) + gram[element])
            element, pair, r = element[found], pair[found], ref_weight[at[found]]
            # sum_g min(h_g, r_g) r_g / (|h| |r|); a vector of norm 0 has no product to divide
            dot = np.bincount(pair, np.minimum(weight[element], r) * r, minlength=len(text_of))
            norms = norm[text_of] * ref_norm[ref_of]
            similarity += dot / np.where(norms > 0, norms, 1.0)
        similarity *= self._length_factor(_lengths(hyps)[text_of], ref_of)
        return 10 / 4 * np.bincount(text_of, similarity, minlength=len(hyps)) / count

    def score(self, hyps):
        """hyps: dict id -> token list, of any of the prepared images. Returns (mean, dict id -> CIDEr-D)."""
        if not hyps:
            raise UserError("CIDEr-D: no captions to score")
        values = self.score_pairs(list(hyps), list(hyps.values()))
        return float(values.mean()), dict(zip(hyps, values.tolist(), strict=True))

    def score_many(self, image_id, hyps):
        """[len(hyps)] CIDEr-D of several captions of one image."""
        return self.score_pairs([image_id] * len(hyps), hyps)

    def score_everywhere(self, texts):
        """[H] mean CIDEr-D over all images when every image gets the text.

        The part of one n-gram depends on nothing but the n-gram, its count and the text's length. Texts share those, so
        each such triple walks once through the references that have the n-gram (an inverted index).
        """
        share = 1 / np.bincount(self.image)[self.image] / (self.image[-1] + 1)  # [R] of a reference in the result
        lengths, total = _lengths(texts), np.zeros(len(texts))
        for (text, gram, tf, weight, norm), (keys, _, pairs, ref_weight, ref_norm) in zip(
            self._vectors(texts), self.orders, strict=True
        ):
            ref, ref_gram = np.divmod(pairs[:-1], len(keys))
            order = np.argsort(ref_gram, kind="stable")
            ref, ref_weight = ref[order], ref_weight[:-1][order]
            posted = np.bincount(ref_gram, minlength=len(keys))
            first = np.cumsum(posted) - posted
            # one element of each (n-gram, count, length), and which of them an element is like
            key = (gram * (tf.max(initial=0) + 1) + tf) * (lengths.max(initial=0) + 1) + lengths[text]
            _, one, which = np.unique(key, return_index=True, return_inverse=True)
            part = np.zeros(len(one))
            blocks = np.cumsum(posted[gram[one]]) >> 22  # about four million steps at a time bound the memory
            for these in np.split(np.arange(len(one)), np.flatnonzero(np.diff(blocks)) + 1):
                e = one[these]
                k, at = _ranges(first[gram[e]], posted[gram[e]])
                r, w = ref[at], ref_weight[at]
                value = np.minimum(weight[e][k], w) * w / np.where(ref_norm[r] > 0, ref_norm[r], 1.0)
                value *= self._length_factor(lengths[text[e]][k], r) * share[r]
                part[these] = np.bincount(k, value, minlength=len(these))
            total += np.bincount(text, part[which], minlength=len(texts)) / np.where(norm > 0, norm, 1.0)
        return 10 / 4 * total


# ---------------------------------------------------------------------------------------------------------------------
# Rewards of self-critical training (Rennie et al. 2017, arXiv 1612.00563)


class CiderReward:
    """CIDEr-D of sampled captions against the training references, prepared once.

    captions_by_id: dict id -> raw captions of the whole training split, from which the document frequencies come too
    (one document per image). References end with the word "<eos>", and so does a caption that the model has ended
    itself: otherwise models learn to break off on "in front of a" (ruotianluo/self-critical.pytorch does the same).
    Raises UserError for a split of one image, whose rewards would all be 0.
    """

    END = "<eos>"  # no caption contains it: the tokenizer takes "<" for a word of its own

    def __init__(self, captions_by_id):
        if len(captions_by_id) < 2:
            raise UserError(f"CIDEr-D rewards need 2 images or more to weigh words by, not {len(captions_by_id)}")
        refs = {i: [[*tokenize_caption(text), self.END] for text in texts] for i, texts in captions_by_id.items()}
        self.cider = CiderD(refs)

    def reward(self, image_ids, texts, ended):
        """float64 [len(texts)]: CIDEr-D (1.0 = "100") of each raw caption for its image; ids may repeat.

        ended: per caption, whether the model closed it itself, not the limit of length."""
        hyps = [tokenize_caption(text) + [self.END] * bool(end) for text, end in zip(texts, ended, strict=True)]
        return self.cider.score_pairs(image_ids, hyps)


def advantage(rewards, baseline="leave-one-out", greedy_rewards=None):
    """[B, k]: how much better each of the k samples of an image is than the baseline. Arrays or tensors, as given.

    leave-one-out: the mean reward of the other k - 1 samples (arXiv 2003.09971). greedy: greedy_rewards [B], those of
    the model's greedy captions (Rennie et al.). Neither depends on the sample itself, so neither adds bias.
    """
    B, k = rewards.shape  # images, samples of each
    if baseline == "leave-one-out":
        if k < 2:
            raise UserError("leave-one-out needs 2 samples an image or more: raise their number or take the greedy one")
        return rewards - (rewards.sum(1)[:, None] - rewards) / (k - 1)
    if baseline != "greedy":
        raise UserError(f"baseline {baseline!r} is not known: it is leave-one-out or greedy")
    if greedy_rewards is None or len(greedy_rewards) != B:
        raise UserError(f"the greedy baseline needs the rewards of the greedy captions, one for each of {B} images")
    return rewards - greedy_rewards[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def caption_metrics(hyps, refs):
    """BLEU_1..4, ROUGE_L, CIDEr_D from raw strings, by this file's tokenizer and with document frequencies from `refs`.

    hyps: dict id -> caption; refs: dict id -> captions of the same images. Returns fractions (CIDEr_D: 1.0 = "100")."""
    ids = _same_images(hyps, refs)
    hyps = {i: tokenize_caption(hyps[i]) for i in ids}
    refs = {i: [tokenize_caption(ref) for ref in refs[i]] for i in ids}
    cider = CiderD(refs).score(hyps)[0]  # first, because it names images without references
    return {**bleu(hyps, refs), "ROUGE_L": rouge_l(hyps, refs)[0], "CIDEr_D": cider}


@contextmanager
def _quiet():
    """Java writes past sys.stdout and sys.stderr, so the descriptors themselves are turned away."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for descriptor, old in enumerate(kept, start=1):
                os.dup2(old, descriptor), os.close(old)


def official_caption_metrics(hyps, refs):
    """(metrics, notes) of the official programs, through pycocoevalcap: Stanford's PTB tokenizer, then BLEU_1..4,
    ROUGE_L, CIDEr_D, METEOR and SPICE, on the scale of `caption_metrics`.

    hyps: dict id -> caption; refs: dict id -> captions of the same images. What this machine cannot compute is left
    out, and a note says why and what to do. METEOR takes 7 seconds to start; nothing is downloaded here.
    """
    ids = _same_images(hyps, refs)
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.spice import spice
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError as error:
        return {}, [f"no official metrics: {error}; `pip install pycocoevalcap`"]
    if not shutil.which("java"):
        return {}, ["no official metrics: their tokenizer needs Java, and `java` is not on PATH; install a JRE"]

    def line(text):
        """The tokenizer reads a caption a line: a line end inside (\\n is one of many) would shift all that follow."""
        return {"caption": " ".join(text.encode("utf-8", "replace").decode().split())}

    texts = [{k: [line(hyps[i])] for k, i in enumerate(ids)}]
    texts += [{k: [line(ref) for ref in refs[i]] for k, i in enumerate(ids)}]
    metrics, notes = {}, []
    with _quiet():
        try:
            hyps, refs = map(PTBTokenizer().tokenize, texts)
        except OSError as error:
            return {}, [f"no official metrics: their tokenizer failed ({error}); it writes to its own folder"]
        if [[len(of[k]) for k in of] for of in texts] != [[len(of[k]) for k in of] for of in (hyps, refs)]:
            return {}, ["no official metrics: their tokenizer lost captions; does `java -version` work?"]
        try:
            values = Bleu(4).compute_score(refs, hyps, verbose=0)[0]
            metrics |= {f"BLEU_{n}": float(value) for n, value in enumerate(values, start=1)}
            metrics["ROUGE_L"] = float(Rouge().compute_score(refs, hyps)[0])
            metrics["CIDEr_D"] = float(Cider().compute_score(refs, hyps)[0])
        except Exception as error:  # references without a single word, for instance
            return {}, [f"no official metrics: pycocoevalcap failed ({error!r})"]
        models = [Path(spice.__file__).parent / f"lib/stanford-corenlp-3.6.0{kind}.jar" for kind in ("", "-models")]
        programs = {"METEOR": (Meteor, "2 GB of memory"), "SPICE": (spice.Spice, "8 GB of memory and Java 8")}
        if not all(jar.is_file() for jar in models):  # SPICE would start to download them
            del programs["SPICE"]
            fetch = "from pycocoevalcap.spice.get_stanford_models import get_stanford_models as get; get()"
            notes.append(f'no SPICE: its CoreNLP models are missing; fetch them once: `python -c "{fetch}"`')
        for name, (program, needs) in programs.items():
            scorer = None
            try:
                scorer = program()
                metrics[name] = float(scorer.compute_score(refs, hyps)[0])
            except Exception as error:  # a Java program may die of anything, and the other numbers are worth having
                notes.append(f"no {name}: its Java program failed ({error!r}); it needs {needs}")
                if hasattr(scorer, "lock") and scorer.lock.locked():
                    scorer.lock.release()  # METEOR's destructor would wait for it forever
            del scorer
    return metrics, notes


# ---------------------------------------------------------------------------------------------------------------------
# Result files of COCO and NoCaps


def write_caption_results(path, captions):
    """captions, a dict image_id -> caption, as the flat list [{"image_id": 42, "caption": "a dog"}] that COCO's and
    NoCaps' servers take: one entry an image. Integer ids stay integers. Raises UserError where it cannot be written."""
    wrong = [i for i, caption in captions.items() if not isinstance(caption, str)]
    if wrong or not captions:
        raise UserError(f"{path}: {f'the captions of {wrong[:3]} are not text' if wrong else 'no captions to write'}")
    rows = [{"image_id": i if isinstance(i, str) else int(i), "caption": text} for i, text in captions.items()]
    try:
        common.write_json(Path(path), rows)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be written ({error}); make room, or take a folder that exists") from None


# ---------------------------------------------------------------------------------------------------------------------
# Truth on scenes


def truth_metrics(hyps, scenes_by_id):
    """Exact judgement of captions of scenes. hyps: dict id -> caption; scenes_by_id: dict id -> scenes.Scene.

    caption_true        share of captions that are true of their own scene (unknown and unparsable are not true)
    caption_unparsable  share of captions outside the grammar
    caption_generality  mean over captions of the share of all these scenes that the caption is true of: "there is an
                        object" is always true and says nothing
    """
    from scenes import Truth, is_true

    ids = _same_images(hyps, scenes_by_id)
    true_of = {}  # caption -> the scenes it is true of; None: not parsable. Once per caption: models repeat themselves.
    for caption in dict.fromkeys(hyps[i] for i in ids):
        if is_true(caption, scenes_by_id[ids[0]]) is Truth.UNPARSABLE:  # a matter of the sentence, not of the scene
            true_of[caption] = None
        else:
            true_of[caption] = {i for i in ids if is_true(caption, scenes_by_id[i]) is Truth.TRUE}
    of = {i: true_of[hyps[i]] for i in ids}
    return {
        "caption_true": sum(i in (of[i] or ()) for i in ids) / len(ids),
        "caption_unparsable": sum(of[i] is None for i in ids) / len(ids),
        "caption_generality": sum(len(of[i] or ()) for i in ids) / len(ids) ** 2,
    }


def verdict(caption, scene):
    """One caption's judgement as a word: true, false, unknown or unparsable."""
    from scenes import is_true

    return is_true(caption, scene).value


# ---------------------------------------------------------------------------------------------------------------------
# Controls


def shuffled(ids, seed=0):
    """A permutation of distinct ids without fixed points (one id alone stays where it is): one cycle in random order.

    For the shuffled-images control. A caption depends on its image alone, so the caption of image p(i) scored against
    the references of image i is what the model would have got from permuted images, and costs no decoding:
    `caption_metrics({i: hyps[p] for i, p in zip(ids, shuffled(ids))}, refs)`.
    """
    cycle = random.Random(seed).sample(range(len(ids)), len(ids))
    follower = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return [ids[follower[k]] for k in range(len(ids))]


def best_constant_caption(train_captions, val_refs, limit=None):
    """The training caption with the highest mean CIDEr-D over the val images when every image gets it.

    val_refs: dict id -> captions. All distinct captions are tried, or the first `limit`; the first of equals wins.
    """
    candidates = list(dict.fromkeys(train_captions))[:limit]
    if not candidates:
        raise UserError("best_constant_caption: no training captions")
    scorer = CiderD({i: [tokenize_caption(ref) for ref in refs] for i, refs in val_refs.items()})
    return candidates[int(np.argmax(scorer.score_everywhere([tokenize_caption(c) for c in candidates])))]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# A decoder is any object, made for R = B * beam rows (image-major), with
#   step(ids: LongTensor [R, t]) -> logits [R, V] of the next token; ids holds everything so far, bos first, so that a
#                                   decoder with a cache reads the last column only
#   reorder(rows: LongTensor [R]) -> None; the caches follow: row r now continues what row rows[r] was. Rows never leave
#                                   the block of their image, so memories that depend on the image alone may stay.


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
# Evaluators


def caption_split(decode, loader):
    """dict image_id -> caption of a whole split, the same on every process.

    decode: pixels uint8 [B, 3, S, S] -> B captions. loader: batches with "image_id" (list of B) and "pixels". Each
    process brings its share of the images; the set is exact: a picture that two processes saw has its id only once.
    """
    captions = {}
    for batch in loader:
        captions.update(zip(batch["image_id"], decode(batch["pixels"]), strict=True))
    return dict(common.gather_lists(list(captions.items())))


CAPTION_PROTOCOL = {
    "tokenizer_of_metrics": "rule; in the column `official`, where there is one, PTB (pycocoevalcap)",
    "constant_caption": "of the captions of the first 3,000 training pictures, the best by CIDEr-D on the first 500 of "
    "val (of train, where there is no val)",
}


def score_captions(items, hyps):
    """caption_metrics of {image_id: caption} against the items' own captions and, on scenes, truth_metrics."""
    metrics = caption_metrics(hyps, {item.image_id: item.captions for item in items})
    if hasattr(items[0].image, "objects"):
        metrics |= truth_metrics(hyps, {item.image_id: item.image for item in items})
    return metrics


def evaluate_captions(corpus, caption_items, folder, is_main=True, official=True):
    """Every test split of a corpus with its controls, for any model that captions.

    caption_items(items) -> {image_id: caption}, the same on every process. Returns the splits of metrics.json and the
    columns of a table, both empty but on the first process, which writes captions_SPLIT.json (a COCO result file) and
    samples.png into `folder`. official: on photographs also official_caption_metrics, which cost Java's time.
    """
    splits, columns = {}, {}
    tests = [name for name in corpus.splits if name.startswith("test")]
    tests = tests or [name for name in ("val", "train") if name in corpus.splits][:1]  # a handful of own pictures
    for split in tests:
        items = list(corpus.splits[split])
        hyps = caption_items(items)
        if not is_main:
            continue
        write_caption_results(folder / f"captions_{split}.json", hyps)
        # A caption depends on its picture alone, so captioning permuted pictures = permuting the captions: no cost.
        ids = list(hyps)
        permuted = {i: hyps[j] for i, j in zip(ids, shuffled(ids), strict=True)}
        controls = {"shuffled_images": score_captions(items, permuted)}
        splits[split] = {"metrics": score_captions(items, hyps), "controls": controls}
        columns |= {split: splits[split]["metrics"], f"{split}, shuffled": controls["shuffled_images"]}
        if split != tests[0]:
            continue
        train = corpus.splits.get("train", items)
        constant = best_constant_caption(
            [text for item in train[:3000] for text in item.captions],
            {item.image_id: item.captions for item in corpus.splits.get("val", train)[:500]},
        )
        columns["constant"] = score_captions(items, dict.fromkeys(ids, constant))
        controls["constant_caption"] = {**columns["constant"], "caption": constant}
        if official and not hasattr(items[0].image, "objects"):  # scenes have a judge of their own
            found, notes = official_caption_metrics(hyps, {item.image_id: item.captions for item in items})
            splits[split] |= {"official": found, "official_notes": notes}
            columns |= {f"{split}, official": found} if found else {}
            print("\n".join(f"note: {note}" for note in notes))
        draw_captions(folder / "samples.png", items[:16], hyps)
    return splits, columns


def draw_captions(path, items, hyps):
    """A contact sheet: pictures, what the model says, whether that is true (scenes), a reference."""
    from data import contact_sheet, load_image

    texts = []
    for item in items:
        judged = f" [{verdict(hyps[item.image_id], item.image)}]" if hasattr(item.image, "objects") else ""
        texts.append([hyps[item.image_id] + judged, f"reference: {item.captions[0]}"])
    contact_sheet(path, [load_image(item.image, 200) for item in items], texts)


def how_it_sees(metrics, shuffled_metrics):
    """One sentence on whether a captioner of scenes looks at its pictures."""
    true, blind = metrics["caption_true"], shuffled_metrics["caption_true"]
    told = "it sees" if true > 0.3 and true > 4 * blind else "it hardly looks; train longer (--steps)"
    return f"{true:.0%} of the captions are true of their scene, {blind:.0%} with shuffled pictures: {told}."


def evaluate_runs(sources: list[str], given: dict, model_name, config_class, flags: list[str], check, evaluate) -> None:
    """--eval-only: finished runs, each on its own data or on what the flags say, in one table for each split.

    check(cfg) raises UserError; evaluate(cfg, checkpoint, machine, folder) -> {split or control: metrics}.
    """
    common.allow(given, common.EVAL_FLAGS + flags, "--eval-only")
    sources = sources or [given["init"]] if given.get("init", "none") != "none" else sources
    if not sources:
        raise UserError(f"--eval-only needs a trained model: --eval-only RUN, e.g. runs/{model_name}-scenes")
    found = [(source, *common.find_checkpoint(source, model_name)) for source in sources]
    configs = [common.config_from(config_class, {**values, "out": "", **given}) for _, _, values in found]
    for cfg in configs:
        check(cfg)
    machine, tables = common.start_machine(configs[0]), {}
    is_mixed = len({cfg.data for cfg in configs}) > 1
    run = common.Run.create(model_name, dataclasses.replace(configs[0], task="eval"), machine)
    for i, (cfg, (source, checkpoint, _)) in enumerate(zip(configs, found, strict=True)):
        folder = run.path if len(found) == 1 else run.path / f"{i + 1}-{checkpoint.parent.name}-{checkpoint.name}"
        if machine.is_main:
            folder.mkdir(exist_ok=True)
            common.write_json(folder / "config.json", {"model": model_name, **dataclasses.asdict(cfg), "task": "eval"})
        for name, column in evaluate(cfg, checkpoint, machine, folder).items():
            title, heading = ("", name) if len(found) == 1 else (name, source + f" on {Path(cfg.data).stem}" * is_mixed)
            tables.setdefault(title, {})[heading] = column
    for title, columns in tables.items():  # empty on all processes but the first
        print(f"\n{title}\n{common.table(columns)}")
    if machine.is_main:
        print(f"\n{run.path}: metrics.json, samples.png and result files")
