"""How fast are BLEU, ROUGE-L and CIDEr-D, beside pycocoevalcap on the same tokens? And self-critical rewards?

    python bench/metrics.py                                   made-up captions of 5,000 images with 5 references
    python bench/metrics.py --extra data/flickr8k             Flickr8k's captions too (folder of its dataset_*.json)

Both get captions that are tokenized already and give the same numbers, which is checked first; they take turns, medians
are printed. Goal: at least as fast. Rewards: `CiderReward.reward` from raw text, batches of 50 images x 5 samples,
against references prepared once; goal: 20,000 a second. Needs pycocoevalcap; Java is not used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from timing import compare, describe_machine, medians

import eval as scoring


def made_up(images: int, captions: int, seed: int = 0, vocabulary: int = 5000) -> dict:
    """id -> captions of 8 to 14 words, Zipf's law over the vocabulary. An image has phrases of three words of its own,
    of which each of its captions uses some, as people do who look at the same picture."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocabulary + 1)
    words = np.array([f"word{k}" for k in range(vocabulary)])
    drawn = iter(words[rng.choice(vocabulary, images * (12 + captions * 14), p=p / p.sum())])
    found = {}
    for image in range(images):
        phrases = [[next(drawn) for _ in range(3)] for _ in range(4)]
        found[image] = []
        for length in rng.integers(8, 15, captions):
            parts = [phrases[k] for k in rng.permutation(4)[: rng.integers(1, 4)]]
            parts += [[next(drawn)] for _ in range(max(0, length - 3 * len(parts)))]
            chosen = [word for k in rng.permutation(len(parts)) for word in parts[k]]
            found[image].append(" ".join(chosen))
    return found


def flickr(folder: Path) -> dict:
    """id -> raw captions of a folder with a Karpathy file."""
    file = next(folder.glob("dataset_*.json"))
    images = json.loads(file.read_text("utf-8"))["images"]
    return {image["imgid"]: [sentence["raw"] for sentence in image["sentences"]] for image in images}


def bench_metrics(captions: dict, repeats: int) -> None:
    """The first caption of an image plays the model, the others are its references."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    tokens = {i: [scoring.tokenize_caption(text) for text in texts] for i, texts in captions.items()}
    hyps, refs = {i: t[0] for i, t in tokens.items()}, {i: t[1:] for i, t in tokens.items()}
    res = {i: [" ".join(hyp)] for i, hyp in hyps.items()}
    gts = {i: [" ".join(ref) for ref in group] for i, group in refs.items()}
    parts = {
        "BLEU": (lambda: list(scoring.bleu(hyps, refs).values()), lambda: Bleu(4).compute_score(gts, res, verbose=0)),
        "ROUGE-L": (lambda: scoring.rouge_l(hyps, refs), lambda: Rouge().compute_score(gts, res)),
        "CIDEr-D": (lambda: scoring.CiderD(refs).score(hyps), lambda: Cider().compute_score(gts, res)),
    }
    totals = np.zeros(2)
    for name, (ours, theirs) in parts.items():
        a, b = ours(), theirs()[0]
        np.testing.assert_allclose(a if name == "BLEU" else a[0], b, atol=1e-6)
        totals += compare(f"  {name}", {"ours": ours, "pycocoevalcap": theirs}, repeats)
    ours, theirs = totals
    print(f"{'  all three':<28} ours {ours:9.4f} s   pycocoevalcap {theirs:9.4f} s   {theirs / ours:6.2f} x")


def bench_rewards(captions: dict, repeats: int) -> None:
    rng = np.random.default_rng(1)
    start = time.perf_counter()
    reward = scoring.CiderReward(captions)
    prepared = time.perf_counter() - start
    batches, names = [], list(captions)
    for _ in range(20):
        ids = [names[k] for k in rng.choice(len(names), 50, replace=False) for _ in range(5)]
        # a sample shares words with its image's references, and has others: half of one, half of anybody's
        halves = [(captions[i][rng.integers(len(captions[i]))].split(), captions[names[rng.integers(len(names))]][0])
                  for i in ids]  # fmt: skip
        texts = [" ".join(one[: len(one) // 2] + other.split()[len(one) // 2 :]) for one, other in halves]
        batches.append((ids, texts, [True] * len(ids)))

    def run():
        for batch in batches:
            reward.reward(*batch)

    (seconds,) = medians({"rewards": run}, repeats)
    print(f"  rewards: {20 * 250 / seconds:,.0f} a second, batches of 250; references prepared in {prepared:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000, help="images of the made-up captions")
    parser.add_argument("--references", type=int, default=5, help="references of each")
    parser.add_argument("--extra", type=Path, help="folder of a dataset_*.json with real captions")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, 5 or more")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{describe_machine()}; medians of {max(5, options.repeats)}")
    sets = {"made up": made_up(options.images, 1 + options.references)}
    if options.extra:
        sets[options.extra.name] = flickr(options.extra)
    for name, captions in sets.items():
        words = np.mean([len(text.split()) for texts in captions.values() for text in texts])
        references = len(next(iter(captions.values()))) - 1
        print(f"{name}: {len(captions):,} images, {references} references, {words:.1f} words a caption")
        bench_metrics(captions, options.repeats)
        bench_rewards(captions, options.repeats)


if __name__ == "__main__":
    main()
