"""Metrics, rewards and evaluators: what a fifth paper would use unchanged. Nothing here knows a model.

    tokenizer          tokenize_caption: PTB-like rules, no Java
    BLEU               bleu, bleu_per_image: corpus BLEU-1..4, closest reference length
    ROUGE-L            rouge_l
    CIDEr-D            CiderD: corpus scores, pairs of image and caption, one caption against every image
    rewards            CiderReward, advantage: what self-critical training maximises
    captions           caption_metrics: the above from raw strings (by the official programs: tools/official.py)
    questions          vqa_accuracy, class_accuracy (SNLI-VE), nlvr2_metrics, vcr_metrics
    retrieval          recalls: both directions, one gallery or the mean over folds
    controls           shuffled, best_constant_caption
    evaluators         caption_split: decode a split, exactly once per image, on any number of processes;
                       predict_split: score one; score_gallery: pictures against texts; evaluate_captions, _examples,
                       _retrieval: every test split with its controls, result files and a contact sheet

BLEU, ROUGE-L and CIDEr-D re-state the definitions of coco-caption (pycocoevalcap) and agree with it to 1e-6 on equal
tokens; the class `Cider` there is CIDEr-D. All values are fractions but CIDEr-D, where 1.0 is what papers print as 100.
Throughout, `hyps` holds one caption per image id and `refs` several; tokens may be any hashables (words, token ids).
"""

import dataclasses
import math
import random
import re
from collections import Counter

import numpy as np
import torch

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


def same_ids(hyps, refs, hyp="caption", ref="reference", of="image"):
    """The ids, in the references' order: sums do not depend on the order in which processes delivered captions."""
    missing, extra = [i for i in refs if i not in hyps], [i for i in hyps if i not in refs]
    if missing or extra:
        raise UserError(
            f"{hyp}s and {ref}s must be of the same {of}s: {len(missing)} of {len(refs)} {of}s lack a {hyp} "
            f"(first {missing[:3]}), {len(extra)} {hyp}s are of other {of}s (first {extra[:3]})"
        )
    if not refs:
        raise UserError(f"there are no {hyp}s to score: the split is empty")
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
    return _bleu_values(sum(_bleu_counts(hyps[i], refs[i]) for i in same_ids(hyps, refs)))


def bleu_per_image(hyps, refs):
    """id -> BLEU_1..BLEU_4 of that image alone. Their mean is not the corpus value."""
    return {i: _bleu_values(_bleu_counts(hyps[i], refs[i])) for i in same_ids(hyps, refs)}


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
    for i in same_ids(hyps, refs):
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
    ids = same_ids(hyps, refs)
    hyps = {i: tokenize_caption(hyps[i]) for i in ids}
    refs = {i: [tokenize_caption(ref) for ref in refs[i]] for i in ids}
    cider = CiderD(refs).score(hyps)[0]  # first, because it names images without references
    return {**bleu(hyps, refs), "ROUGE_L": rouge_l(hyps, refs)[0], "CIDEr_D": cider}


# ---------------------------------------------------------------------------------------------------------------------
# Questions and statements (dicts from the example's id, of exactly the same examples), retrieval


def _demand(need, wrong):
    if wrong:
        raise UserError(f"{need}; not so of {wrong[:3]}, {len(wrong)} in all: mend the annotations or the answers")


def vqa_forms(prediction, answers):
    """(prediction, list of answers) as the official evaluation compares them: normalised, unless all answers agree."""
    from language import normalise_answer

    texts = [text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers)]
    if len(set(texts[1:])) > 1:  # OFFICIAL: unanimous answers are compared raw, capitals included
        texts = [normalise_answer(text) for text in texts]
    return texts[0], texts[1:]


def vqa_accuracy(predictions, answers, answer_types=None, question_types=None):
    """(metrics, dict question_id -> accuracy), fractions, as GT-Vision-Lab/VQA computes them.

    predictions: dict question_id -> text; answers: dict question_id -> ten people's texts. Types, dicts too, add means:
    "vqa_accuracy_yes/no" over an answer type, "vqa_accuracy: what color" over a question type."""
    ids, values = same_ids(predictions, answers, "prediction", "list of answer", "question"), {}
    is_text = {i: [isinstance(text, str) for text in (answers[i], predictions[i], *answers[i])] for i in ids}
    _demand("VQA compares one text with ten people's", [i for i in ids if is_text[i] != [False] + [True] * 11])
    for i in ids:
        said, ten = vqa_forms(predictions[i], answers[i])
        same = [text == said for text in ten]
        # mean over the ten, each left out in turn, of min(1, agreeing others / 3)
        values[i] = sum(min(1, (sum(same) - one) / 3) for one in same) / 10
    metrics = {"vqa_accuracy": sum(values.values()) / len(values)}
    for prefix, types in (("vqa_accuracy_", answer_types), ("vqa_accuracy: ", question_types)):
        of = {}
        for i in [] if types is None else same_ids(types, values, "type", "prediction", "question"):
            of.setdefault(types[i], []).append(values[i])
        metrics |= {f"{prefix}{name}": sum(some) / len(some) for name, some in of.items()}
    return metrics, values


def class_accuracy(predictions, labels):
    """Share of examples whose predicted class is the label (SNLI-VE). Classes are names, or indices, on both sides."""
    ids = same_ids(predictions, labels, "prediction", "label", "example")
    mixed = [i for i in ids if isinstance(predictions[i], str) != isinstance(labels[i], str)]
    _demand("predictions and labels are names, or are indices", mixed)
    return sum(bool(predictions[i] == labels[i]) for i in ids) / len(ids)


def truth_word(value):
    """'True' or 'False' of a bool or of these words in any case, None of anything else."""
    return word if (word := str(value).capitalize()) in ("True", "False") else None


def nlvr2_metrics(predictions, labels, groups, name="nlvr2"):
    """{name_accuracy, name_consistency}: shares of right examples, and of groups all of whose examples are right.

    Predictions and labels: True, False or these words. groups: dict id -> its sentence, whatever names it; NLVR2's name
    is the identifier without its third part (lil-lab/nlvr, nlvr2/eval/metrics.py)."""
    ids = same_ids(predictions, labels, "prediction", "label", "example")
    same_ids(groups, labels, "group", "label", "example")
    said, true = ({i: truth_word(side[i]) for i in ids} for side in (predictions, labels))
    _demand(f"{name} knows True and False alone", [i for i in ids if not said[i] or not true[i]])
    whole = set(groups.values()) - {groups[i] for i in ids if said[i] != true[i]}
    consistency = len(whole) / len(set(groups.values()))
    return {f"{name}_accuracy": class_accuracy(said, true), f"{name}_consistency": consistency}


def scores_table(scores, ids, *shape):
    """float64 [len(ids), *shape] of dict id -> scores. Raises UserError for other shapes and what is not finite."""
    table, wrong = {}, []
    for i in ids:
        try:
            table[i] = np.asarray(scores[i], dtype=float)
        except (TypeError, ValueError):  # rows of other lengths, or text
            wrong.append(i)
    wrong += [i for i, row in table.items() if row.shape != shape or not np.isfinite(row).all()]
    _demand(f"each question needs {' x '.join(map(str, shape))} finite scores", wrong)
    return np.stack(list(table.values()))


def vcr_metrics(answer_scores, rationale_scores, labels, rationale_labels):
    """{vcr_qa, vcr_qar, vcr_q2ar}: shares of questions with the right answer, rationale, both (r2c, eval_q2ar.py).

    Scores: dict id -> 4 numbers, the first of the highest counts; the rationales' are given the correct answer.
    Labels: dict id -> 0, 1, 2 or 3."""
    ids, right = same_ids(rationale_labels, labels, "rationale label", "label", "question"), {}
    wrong = [i for i in ids if labels[i] not in range(4) or rationale_labels[i] not in range(4)]
    _demand("labels of VCR are 0, 1, 2 or 3", wrong)
    for name, scores, truth in (("vcr_qa", answer_scores, labels), ("vcr_qar", rationale_scores, rationale_labels)):
        same_ids(scores, labels, "score", "label", "question")
        right[name] = scores_table(scores, ids, 4).argmax(1) == [truth[i] for i in ids]
    right["vcr_q2ar"] = right["vcr_qa"] & right["vcr_qar"]
    return {name: float(one.mean()) for name, one in right.items()}


def _places(scores, owner):
    """Places, 1 being the best: [M] of each text's image among the images, [N] of each image's best text."""
    N, M = scores.shape  # images, texts
    own = scores[owner, torch.arange(M, device=owner.device)]
    best = own.new_zeros(N).scatter_reduce(0, owner, own, "amax", include_self=False)
    of_text, of_image = own.new_full((M,), 0.5, dtype=torch.float64), []
    for part, top in zip(scores.split(256), best[:, None].split(256), strict=True):  # bounds the memory
        of_text += (part > own).sum(0) + (part == own).sum(0) / 2  # equal to itself too, hence from 0.5
        of_image.append(1 + (part > top).sum(1) + (part == top).sum(1) / 2)
    sisters = torch.zeros(N, device=owner.device).index_add(0, owner, (own == best[owner]).float())
    return of_text, torch.cat(of_image) - sisters / 2  # which are not before it


def recalls(scores, owner, folds=None, text_scores=None):
    """{"R@1", "R@5", "R@10": text -> image, "TR@1", ...: image -> text, by the best of the image's texts}, fractions.

    scores: [N images, M texts], array or tensor; owner: [M] index of each text's image. text_scores: another such
    matrix for text -> image, where re-ranking made two. folds: images a fold; each fold of consecutive images is a
    gallery of its own, and the result the mean over folds (COCO 1K: 1000). HERE[data-4]: equal scores all stand in the
    middle of their places, and a place between two numbers counts as the later: two at the top are no R@1."""
    scores = torch.as_tensor(scores)
    owner = torch.as_tensor(owner, device=scores.device)
    N, folds, found = len(scores), folds or len(scores), []
    is_whole = scores.dim() == 2 and owner.shape == scores.shape[1:] and set(owner.tolist()) == set(range(N))
    if not is_whole or not 0 < folds <= N or N % folds or scores.isnan().any():
        raise UserError(
            "retrieval takes scores [images, texts], none NaN, the index of its image for each text, no image without, "
            f"and whole folds: mend what is not so of scores {[*scores.shape]}, owner {[*owner.shape]}, {folds} a fold"
        )
    for first in range(0, N, folds):
        here = (owner >= first) & (owner < first + folds)
        part = scores[first : first + folds][:, here] if folds < N else scores
        places = zip(("R", "TR"), _places(part, owner[here] - first), strict=True)
        found.append({f"{way}@{k}": float((p <= k).double().mean()) for way, p in places for k in (1, 5, 10)})
    metrics = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    if text_scores is None:
        return metrics
    return {**metrics, **{k: v for k, v in recalls(text_scores, owner, folds).items() if k.startswith("R@")}}


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
# Evaluators


def caption_split(decode, loader):
    """dict image_id -> caption of a whole split, the same on every process.

    decode: batch of B pictures -> B captions. loader: batches with "image_id" (list of B). Each process brings its
    share of the images; the set is exact: a picture that two processes saw has its id only once.
    """
    captions = {}
    for batch in loader:
        captions.update(zip(batch["image_id"], decode(batch), strict=True))
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
        from tools.judge import truth_metrics

        metrics |= truth_metrics(hyps, {item.image_id: item.image for item in items})
    return metrics


def evaluate_captions(corpus, caption_items, folder, is_main=True, official=True):
    """Every test split of a corpus with its controls, for any model that captions.

    caption_items(items) -> {image_id: caption}, the same on every process. Returns the splits of metrics.json and the
    columns of a table, both empty but on the first process, which writes captions_SPLIT.json (a COCO result file) and
    samples.png into `folder`. official: on photographs also official_caption_metrics, which cost Java's time. Of a
    split whose captions are hidden only the result file is written.
    """
    from tools import official as programs
    from tools import sheets

    splits, columns, tests, known = {}, {}, corpus.finally_evaluated(), {}
    for split in tests + corpus.hidden():
        items = list(corpus.splits[split])
        hyps = {item.image_id: known.get(item.image) for item in items}
        if None in hyps.values():  # domains of NoCaps are parts of its test, which has been captioned
            hyps = caption_items(items)
            known |= {item.image: hyps[item.image_id] for item in items}
        hyps = {item.image_id: hyps[item.image_id] for item in items}  # whatever the order of processes
        if is_main:
            programs.write_caption_results(folder / f"captions_{split}.json", hyps)
        if not is_main or split not in tests:
            continue
        # A caption depends on its picture alone, so captioning permuted pictures = permuting the captions: no cost.
        ids = list(hyps)
        permuted = {i: hyps[j] for i, j in zip(ids, shuffled(ids), strict=True)}
        controls = {"shuffled_images": score_captions(items, permuted)}
        splits[split] = {"metrics": score_captions(items, hyps), "controls": controls}
        columns |= {split: splits[split]["metrics"], f"{split}, shuffled": controls["shuffled_images"]}
        if split != tests[0]:
            continue
        if train := corpus.splits.get("train"):  # chosen on the test's own references it would be no control
            constant = best_constant_caption(
                [text for item in train[:3000] for text in item.captions],
                {item.image_id: item.captions for item in corpus.splits.get("val", train)[:500]},
            )
            columns["constant"] = score_captions(items, dict.fromkeys(ids, constant))
            controls["constant_caption"] = {**columns["constant"], "caption": constant}
        if official and not hasattr(items[0].image, "objects"):  # scenes have a judge of their own
            found, notes = programs.official_caption_metrics(hyps, {item.image_id: item.captions for item in items})
            splits[split] |= {"official": found, "official_notes": notes}
            columns |= {f"{split}, official": found} if found else {}
            print("\n".join(f"note: {note}" for note in notes))
        sheets.draw_captions(folder / "samples.png", items[:16], hyps)
    return splits, columns


def predict_split(score, loader):
    """dict example_id -> list of scores of a whole split, the same on every process.

    score: batch -> [B, C] scores of the classes, of Choices [B, 4]. Of more than four classes only the best is kept, as
    a list of its index. Each process brings its share; the set is exact: an id that two processes saw counts once.
    """
    found = {}
    for batch in loader:
        scores = score(batch).float()
        if scores.shape[1] < 2 or not scores.isfinite().all():
            raise UserError(f"scores must be finite, and of two classes or more, not {[*scores.shape]}; is it trained?")
        kept = scores if scores.shape[1] <= 4 else scores.argmax(1, keepdim=True)
        found.update(zip(batch["example_id"], kept.tolist(), strict=True))
    return dict(common.gather_lists(list(found.items())))


def class_of(scores):
    """Of a list that predict_split gives: the first of the best classes."""
    return scores[0] if len(scores) == 1 else max(range(len(scores)), key=scores.__getitem__)


def score_examples(corpus, items, found, rationales=None):
    """(metrics, what was said, what is right) of one split: names of metrics by the kind of its samples, texts by id.

    found: what predict_split gives. rationales: of Choices the scores of the rationales, given the right answer.
    """
    of, said = {item.example_id: item for item in items}, {i: class_of(scores) for i, scores in found.items()}
    first = items[0]
    if hasattr(first, "rationales"):
        labels = [{i: getattr(item, name) for i, item in of.items()} for name in ("label", "rationale_label")]
        said = {i: str(of[i].answers[k]) for i, k in said.items()}
        return vcr_metrics(found, rationales, *labels), said, {i: str(x.answers[x.label]) for i, x in of.items()}
    if corpus.answers:
        said = {i: corpus.answers[k] for i, k in said.items()}
        answers, kinds = ({i: getattr(item, name) for i, item in of.items()} for name in ("answers", "kinds"))
        metrics, _ = vqa_accuracy(said, answers, {i: kind[0] for i, kind in kinds.items()})
        return metrics, said, {i: Counter(ten).most_common(1)[0][0] for i, ten in answers.items()}
    labels = {i: item.label for i, item in of.items()}
    if len(first.images) == 2:
        said, right = ({i: bool(k) for i, k in side.items()} for side in (said, labels))
        name = "nlvr1" if corpus.name == "nlvr1" else "nlvr2"  # NLVR's first version is another task
        return nlvr2_metrics(said, right, {i: item.group for i, item in of.items()}, name), said, right
    from corpora import ENTAILMENT

    said, right = ({i: ENTAILMENT[k] for i, k in side.items()} for side in (said, labels))
    return {"ve_accuracy": class_accuracy(said, right)}, said, right


def with_other_pictures(items):
    """The same texts about permuted pictures, for the shuffled-images control; Choices among pictures with as many
    objects, so that every tag still names one. A picture that is alone there keeps its texts."""
    groups, donors, result = {}, {}, []
    for item in items:
        groups.setdefault(len(getattr(item, "objects", ())), {})[item.image_ids] = item
    for group in groups.values():
        donors |= dict(zip(group, [group[ids] for ids in shuffled(list(group))], strict=True))
    for item in items:
        names = {"images", "image_ids", "metadata", "others"} & set(item.__dataclass_fields__)
        donor = donors[item.image_ids]
        result.append(dataclasses.replace(item, **{name: getattr(donor, name) for name in names}))
    return result


def evaluate_examples(corpus, predict, folder, is_main=True):
    """Every test split of questions, statements, hypotheses or choices with its controls, for any model that scores.

    predict(items) -> what predict_split gives; of Choices predict(items, task, answer), task "qa" or "qar", answer the
    one that the rationales are given, None for the right one. Returns and writes what evaluate_captions does: result
    files in the official forms (of Choices where labels are hidden, since only there all conditionings are asked for).
    """
    from tools import official as files
    from tools import sheets

    splits, columns, tests = {}, {}, corpus.finally_evaluated()
    if corpus.name in ("nlvr2", "snli_ve") and "val" in corpus.splits:
        tests.append("val")  # dev, which papers report beside test

    def ask(items):
        if not hasattr(items[0], "rationales"):
            return (predict(items),)
        return predict(items, "qa", None), predict(items, "qar", None)

    for split in tests + corpus.hidden():
        items = list(corpus.splits[split])
        if split not in tests:
            found = predict(items, "qa", None) if hasattr(items[0], "rationales") else predict(items)
            given = [predict(items, "qar", k) for k in range(4)] if hasattr(items[0], "rationales") else []
            if is_main:
                files.write_example_results(folder, split, corpus, items, found, given)
            continue
        tables = ask(items)
        shuffled_tables = ask(with_other_pictures(items))
        if not is_main:
            continue
        metrics, said, right = score_examples(corpus, items, *tables)
        controls = {"shuffled_images": score_examples(corpus, items, *shuffled_tables)[0]}
        if "train" in corpus.splits:
            controls["majority"] = score_examples(corpus, items, *majority(corpus, items, len(tables)))[0]
        splits[split] = {"metrics": metrics, "controls": controls}
        names = {"shuffled_images": "shuffled"}
        columns |= {split: metrics, **{f"{split}, {names.get(name, name)}": found for name, found in controls.items()}}
        if len(tables) == 1:
            files.write_example_results(folder, split, corpus, items, *tables)
        if split == tests[0]:
            sheets.draw_examples(folder / "samples.png", items[:16], said, right)
    return splits, columns


def majority(corpus, items, n_tables=1):
    """As many tables as `score_examples` takes, for a program that gives to all what is most frequent in the first
    5,000 of train."""
    train, known, tables = corpus.splits["train"][:5000], set(corpus.answers), []
    for name in ("label", "rationale_label")[:n_tables]:
        if corpus.answers:
            usual = Counter(answer for item in train for answer in item.answers if answer in known)
            scores = [corpus.answers.index(usual.most_common(1)[0][0])]
        else:
            best = Counter(getattr(item, name) for item in train).most_common(1)[0][0]
            scores = [float(k == best) for k in range(4)]
        tables.append({item.example_id: scores for item in items})
    return tables


def score_gallery(encode_image, encode_text, score, loader, texts, chunk=256):
    """dict image_id -> float32 [len(texts)] of a whole split, the same on every process; everything is encoded once.

    encode_text: list of texts -> anything; encode_image: batch of B pictures -> anything; score: both -> [B, texts].
    """
    told = [encode_text(texts[k : k + chunk]) for k in range(0, len(texts), chunk)]
    rows = {}
    for batch in loader:
        seen = encode_image(batch)
        scores = torch.cat([score(seen, some).float() for some in told], dim=1).cpu().numpy()
        rows.update(zip(batch["image_id"], scores, strict=True))
    return dict(common.gather_lists(list(rows.items())))


def pairs_of(items, edited=False):
    """Two Examples a picture: its first caption, label 1, and the first caption of another picture, label 0.

    Which other one is drawn, the same way every time. Of scenes it is one whose caption is false of this scene (unknown
    is not false), and with `edited` the second is instead the own caption with a word changed so that it is false.
    """
    from data import Example
    from language import clean_caption

    items, pairs = [item for item in items if item.captions], []
    for k, item in enumerate(items):
        luck = random.Random(f"pairs/{item.image_id}")
        some = [items[i] for i in luck.sample(range(len(items)), min(len(items), 50))]
        own = set(map(clean_caption, item.captions))  # pictures may share one
        texts = (other.captions[0] for other in some
                 if other.image != item.image and clean_caption(other.captions[0]) not in own)  # fmt: skip
        if hasattr(item.image, "objects"):
            from tools import judge

            texts = [judge.edited(item.captions[0], item.image, luck)] if edited else texts
            texts = (text for text in texts if text and judge.verdict(text, item.image) == "false")
        text = next(iter(texts), None)
        for label, said in ((1, item.captions[0]), (0, text)) if text else ():
            pairs.append(Example(f"{k}-{label}", (item.image_id,), (item.image,), said, label))
    return pairs


def score_pairs(pairs, predict, edited=()):
    """{"itm_accuracy", "itm_accuracy_edited"} of pairs_of(items), as far as there are such pairs."""
    metrics = {}
    for name, some in (("itm_accuracy", pairs), ("itm_accuracy_edited", edited)):
        if some:
            said = {i: class_of(scores) for i, scores in predict(some).items()}
            metrics[name] = class_accuracy(said, {pair.example_id: pair.label for pair in some})
    return metrics


def evaluate_pairs(corpus, predict, is_main=True):
    """Image-text matching on every test split, balanced pairs, beside the same texts about permuted pictures; what is
    returned is as of evaluate_captions. predict(Examples) -> {example_id: scores of (no match, match)}."""
    splits, columns = {}, {}
    for split in corpus.finally_evaluated():
        items = list(corpus.splits[split])
        pairs, edited = pairs_of(items), pairs_of(items, True) if hasattr(items[0].image, "objects") else []
        found = score_pairs(pairs, predict, edited)
        blind = score_pairs(with_other_pictures(pairs), predict, with_other_pictures(edited))
        if is_main:
            splits[split] = {"metrics": found, "controls": {"shuffled_images": blind}}
            columns |= {split: found, f"{split}, shuffled": blind}
    return splits, columns


def evaluate_retrieval(corpus, gallery, folder, is_main=True, n_captions=5, fold=1000, sheet="samples.png", most=0,
                       galleries=1):
    """Every test split as a gallery, with the first `n_captions` captions of each picture, for any model that scores.
    most: of larger splits the first so many pictures alone, which then stand under "gallery" in the metrics; with
    galleries=5 five such galleries one after another, as far as there are pictures: means over them, and under "R@1 +-"
    half of the 95 % interval of the mean (Student's t).

    gallery(items, texts) -> what score_gallery gives. Larger galleries of whole folds are also cut into them: the
    mean over folds of `fold` consecutive pictures is named "R@1 of 1,000". Returns what evaluate_captions does.
    """
    from tools import judge, sheets

    splits, columns, tests = {}, {}, corpus.finally_evaluated()
    for split in tests:
        whole, found = list(corpus.splits[split]), {split: [], f"{split}, shuffled": []}
        size = min(most, len(whole)) or len(whole)
        for k in range(min(galleries, len(whole) // size)):
            items = whole[k * size : (k + 1) * size]
            texts = [text for item in items for text in item.captions[:n_captions]]
            owner = [j for j, item in enumerate(items) for _ in item.captions[:n_captions]]
            rows = gallery(items, texts)
            if not is_main:
                continue
            scores = np.stack([rows[item.image_id] for item in items])  # [images, texts]
            truths = judge.truth_table(items, texts) if hasattr(items[0].image, "objects") else None
            permuted = scores[shuffled(list(range(len(items))))]  # costs no model, like permuted captions
            for name, matrix in ((split, scores), (f"{split}, shuffled", permuted)):
                metrics = recalls(matrix, owner)
                if len(items) > fold and len(items) % fold == 0:
                    of_folds = recalls(matrix, owner, fold)
                    metrics |= {f"{recall} of {fold:,}": value for recall, value in of_folds.items()}
                metrics |= judge.gallery_truth(matrix, truths) if truths is not None else {}
                found[name].append(metrics | ({"gallery": len(items)} if most else {}))
            if split == tests[0] and k == 0:
                sheets.draw_ranking(folder / sheet, items, texts, owner, scores)
        if is_main:
            columns |= {name: _mean_of(metrics) for name, metrics in found.items()}
            splits[split] = {"metrics": columns[split], "controls": {"shuffled_images": columns[f"{split}, shuffled"]}}
    return splits, columns


STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # 97.5 %


def _mean_of(rows):
    """[{name: value} of each gallery] -> their means, and for two to ten galleries half of the interval."""
    found, n = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}, len(rows)
    for name in [name for name in found if "R@" in name and n in STUDENT_T]:
        found[f"{name} +-"] = STUDENT_T[n] * float(np.std([row[name] for row in rows], ddof=1)) / math.sqrt(n)
    return found
