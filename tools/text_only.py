"""How far does reading alone get? A reader that never sees a picture, on each task of the small world.

    python tools/text_only.py                both worlds; about a minute

The reader takes the majority of a text that it has met three times or more in train, and else naive Bayes over words
and word pairs. A balanced task leaves it near chance; what looks gets everything right (`scenes.answer` and the like).
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import scenes  # noqa: E402
from common import table  # noqa: E402


def features(text: str) -> set:
    words = text.split()
    return {text, *words, *zip(words, words[1:], strict=False)}


def read(train: list[tuple[str, object]]):
    """(text, label) pairs -> a function: text -> {label: log odds}."""
    counts, labels = defaultdict(Counter), Counter(label for _, label in train)
    for text, label in train:
        for feature in features(text):
            counts[feature][label] += 1

    def scores(text: str) -> dict:
        known = [text] if counts.get(text, Counter()).total() > 2 else features(text) & counts.keys()
        return {label: math.log(n) + sum(math.log((counts[f][label] + 0.5) / (n + 1)) for f in known)
                for label, n in labels.items()}  # fmt: skip

    return scores


def accuracy(train: list, test: list) -> tuple[float, float]:
    """Of the reader, and of the answer that is most frequent in train."""
    scores, (most, _) = read(train), Counter(label for _, label in train).most_common(1)[0]
    right = sum(max((s := scores(text)), key=s.get) == label for text, label in test)
    return right / len(test), sum(label == most for _, label in test) / len(test)


def questions(world: str, n_train: int, n_test: int) -> dict:
    """kind -> (reader, most frequent answer)."""
    sides = [[q for scene in scenes.Scenes(world, split, n) for q in scenes.questions(scene)]
             for split, n in (("train", n_train), ("test", n_test))]  # fmt: skip
    kinds = sorted({q.kind for q in sides[0]})
    return {k: accuracy(*([(q.text, q.answer) for q in side if q.kind == k] for side in sides)) for k in kinds}


def judged(task, world: str, n_train: int, n_test: int) -> tuple[float, float]:
    """Pairs or hypotheses."""
    return accuracy(*([(item.text, item.label) for item in task(world, split, n)]
                      for split, n in (("train", n_train), ("test", n_test))))  # fmt: skip


def tagged(world: str, n_train: int, n_test: int) -> dict:
    """Each option is read with its question, and the likeliest is taken: (reader, chance)."""

    def spelt(*parts):
        return " ".join(map(str, itertools.chain(*parts)))

    train, test = list(scenes.Tagged(world, "train", n_train)), list(scenes.Tagged(world, "test", n_test))
    found = {}
    for name, parts in {"Q->A": lambda q: (q.question, q.answers, q.label),
                        "QA->R": lambda q: (q.question + q.answers[q.label], q.rationales, q.rationale_label)}.items():
        scores = read([(spelt(question, option), i == label) for question, options, label in map(parts, train)
                       for i, option in enumerate(options)])  # fmt: skip
        right = 0
        for question, options, label in map(parts, test):
            odds = [(s := scores(spelt(question, option)))[True] - s[False] for option in options]
            right += odds.index(max(odds)) == label
        found[name] = (right / len(test), 0.25)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=4000, help="scenes or items in train; tagged: a quarter")
    parser.add_argument("--test", type=int, default=1000, help="scenes or items in test")
    args = parser.parse_args()
    if min(args.train, args.test) < 100:
        parser.error("--train and --test need 100 or more: with fewer, some kind of question never comes")
    columns = {}
    for world in scenes.WORLDS:
        found = {f"question, {kind}": value for kind, value in questions(world, args.train, args.test).items()}
        found["pair"] = judged(scenes.Pairs, world, args.train, args.test)
        if scenes.WORLDS[world].panel:
            found["hypothesis"] = judged(scenes.Hypotheses, world, args.train // 3 * 3, args.test // 3 * 3)
        found |= {f"tagged, {name}": value for name, value in tagged(world, args.train // 4, args.test).items()}
        columns[f"{world}: reader"] = {name: reader for name, (reader, _) in found.items()}
        columns["frequent/chance" + " " * (world == "full")] = {name: chance for name, (_, chance) in found.items()}
    print(table(columns))


if __name__ == "__main__":
    main()
