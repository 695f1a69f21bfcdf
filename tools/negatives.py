"""What ViLTA writes, and what it makes of it."""

from __future__ import annotations

import random

import torch

import common
import data
from eval import score_pairs
from tools import judge


def rewritten(model, texts: list[str], seed: int = 0) -> list[str | None]:
    """Each text with a word or two rewritten by the model as a hard negative; None where nothing can be rewritten."""
    rows, luck = model.tokens(texts), torch.Generator().manual_seed(seed)
    lots = {name: torch.rand(rows["ids"].shape, generator=luck) for name in ("order", "lots")}
    found = model.write(rows["ids"], rows["keep_mask"], *data.to_device(model, lots).values())
    told = [model.tokenizer.decode(ids[1:].tolist()) for ids in found["ids"]]
    return [text if is_written else None for text, is_written in zip(told, found["is_written"].tolist(), strict=True)]


def written_pairs(model, items) -> list[data.Example]:
    """Two Examples a picture: its first caption, label 1, and the same rewritten, label 0."""
    items, pairs = [item for item in items if item.captions], []
    texts = [item.captions[0] for item in items]
    negatives = [text for k in range(0, len(texts), 256) for text in rewritten(model, texts[k : k + 256], k)]
    for k, (item, text) in enumerate(zip(items, negatives, strict=True)):
        for label, said in ((1, item.captions[0]), (0, text)) if text else ():
            pairs.append(data.Example(f"{k}-{label}", (item.image_id,), (item.image,), said, label))
    return pairs


KINDS = ("own", "written", "other")  # of pairs, by number


@torch.no_grad()
def log_of(out: dict, rows: dict) -> dict:
    """What the log of a training step says beside the losses: acc_, ITM's accuracy on each kind of pair; gen_top1, the
    writer's at hidden words; gen_p, the probability of what it wrote; written, its share of all pairs."""
    if "itm" not in out or "order" not in rows:
        return {}
    is_right = out["itm"].argmax(1) == (rows["kinds"] == 0)
    told = {f"acc_{name}": mean(is_right[rows["kinds"] == kind]) for kind, name in enumerate(KINDS)
            if name != "written" or "p" in rows}  # fmt: skip
    if "gen" in out:
        told["gen_top1"] = mean(out["gen"].argmax(1) == rows["mlm_labels"][rows["mlm_labels"] != -100])
    if "p" in rows:
        is_written = rows["kinds"] == 1
        told |= {"gen_p": mean(rows["p"][is_written]), "written": mean(is_written)}
    return told


def mean(x):
    return x.float().sum() / max(1, len(x))


def metrics(asked, items) -> dict:
    """Of a tools.exam.Exam of a pre-trained ViLTA and some items, see docs/vilta.md for the names."""
    from eval import with_other_pictures

    found = filled(asked, items)
    if "hn" not in asked.model.cfg.arm or not asked.model.cfg.syn_ratio:
        return found
    with asked.machine.autocast():
        pairs = written_pairs(asked.model, items)
    if not pairs:
        return found | {"written": 0.0}
    found["written"] = len(pairs) / 2 / len(items)
    found["itm_accuracy_written"] = score_pairs(pairs, asked.scores)["itm_accuracy"]
    found["itm_accuracy_blind"] = score_pairs(with_other_pictures(pairs), asked.scores)["itm_accuracy"]
    if hasattr(items[0].image, "objects"):
        verdicts = [judge.verdict(pair.text, pair.images[0]) for pair in pairs if pair.label == 0]
        for name in ("false", "true", "unparsable"):
            found[f"written_{name}"] = verdicts.count(name) / len(verdicts)
    return found


def filled(asked, items) -> dict:
    """{mlm_accuracy, and of scenes mlm_synonyms}: a content word of each picture's first caption is hidden. Accuracy:
    the share where that word is the most probable; synonyms: mean probability of other words of its meaning."""
    model, tok, rows = asked.model, asked.model.tokenizer, []
    is_scene = hasattr(items[0].image, "objects")
    for batch in asked.batches(items):
        told = model.tokens([captions[0] for captions in batch["captions"]])
        places = model.content_words(told["ids"], told["keep_mask"])
        where = torch.zeros_like(places)
        for row, ids, may_be in zip(where, told["ids"].tolist(), places, strict=True):
            spots = may_be.nonzero()[:, 0].tolist()
            if is_scene:
                spots = [spot for spot in spots if synonyms_of(tok, ids[spot])]
            if spots:
                row[random.Random(str(ids)).choice(spots)] = True
        gold = told["ids"][where]
        with torch.no_grad(), asked.machine.autocast():
            p = model.fill(batch, told["ids"].masked_fill(where, tok.mask), told["keep_mask"], where).float().softmax(1)
        for one, right in zip(p, gold.tolist(), strict=True):
            rows.append((int(one.argmax()) == right, float(one[synonyms_of(tok, right)].sum()) if is_scene else 0.0))
    rows = common.gather_lists(rows)
    names = ("mlm_accuracy", "mlm_synonyms")[: 1 + is_scene]
    return {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows, strict=True), strict=False)}


def synonyms_of(tok, token: int) -> list[int]:
    """Tokens of the other words of the same meaning in the small world."""
    written = tok.backend.id_to_token(token)
    space = "Ġ" * written.startswith("Ġ")
    ids = (tok.backend.token_to_id(space + word) for word in judge.synonyms(written.removeprefix("Ġ")))
    return [i for i in ids if i is not None]
