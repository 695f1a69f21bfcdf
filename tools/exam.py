"""From a model's functions of a batch to the evaluators of eval.py: what every paper asks on val and at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import common
import data
import eval as scoring

MATCHES, TELLS = ("pretrain", "retrieval", "itm"), ("pretrain", "caption", "scst")
ANSWERS = ("vqa", "nlvr2", "ve", "vcr")
BEST_BY = {"pretrain": "R@1", "retrieval": "R@1", "itm": "itm_accuracy", "caption": "CIDEr_D", "scst": "CIDEr_D",
           "vqa": "vqa_accuracy", "nlvr2": "nlvr2_accuracy", "ve": "ve_accuracy", "vcr": "vcr_q2ar"}  # fmt: skip
SHOWN = ("BLEU_4", "caption_true")  # on val, beside the metric that `best` is chosen by


@dataclass
class Exam:
    """A model that retrieves and captions (pretrain), tells matching pairs from others and retrieves (itm), retrieves,
    captions, or answers, as its task says.

    samples(items, **more) -> data.Samples of an evaluation. The model has, as far as its task asks, these functions of
    a batch of them: caption_batch(batch, beam) -> B captions; encode_images(batch) and encode_texts(texts) -> vectors
    whose dot product is the score, or whatever match(images, texts) -> [B, texts] takes; answer_scores(batch) -> scores
    of the answers, of itm [B, 2], the second for a match. gallery_of: pictures of a gallery; 0: the whole split.
    galleries: how many of them. more(self, items) -> further metrics of a split, the same on every process.
    """

    task: str
    model: torch.nn.Module
    corpus: data.Corpus
    machine: common.Machine
    samples: Callable
    gallery_of: int = 0
    galleries: int = 1
    more: Callable | None = None

    @property
    def best_by(self) -> str:
        """The metric on val that `best` is chosen by."""
        return "nlvr1_accuracy" if self.corpus.name == "nlvr1" else BEST_BY[self.task]  # other metrics than NLVR2's

    def batches(self, items, **more):
        """A loader of this process' share."""
        self.model.eval()
        return data.eval_loader(self.samples(items, **more), 100, self.machine.workers, self.machine.rank,
                                self.machine.processes)  # fmt: skip

    @torch.no_grad()
    def captions(self, items, beam: int) -> dict:
        """{image_id: caption}, the same on every process, as are the next two."""
        with self.machine.autocast():
            return scoring.caption_split(lambda batch: self.model.caption_batch(batch, beam), self.batches(items))

    @torch.no_grad()
    def gallery(self, items, texts) -> dict:
        """{image_id: score of each text}, in float32: of products in bf16, which has 8 bits, many would be equal."""
        def within(function, *what):
            with self.machine.autocast():
                found = function(*what)
                return found.float() if isinstance(found, torch.Tensor) else found

        encoders = [partial(within, encode) for encode in (self.model.encode_images, self.model.encode_texts)]
        match = partial(within, self.model.match) if hasattr(self.model, "match") else lambda v, t: v @ t.T
        return scoring.score_gallery(*encoders, match, self.batches(items), texts)

    @torch.no_grad()
    def scores(self, items, *which) -> dict:
        """{example_id: scores of the answers}; which: of Choices the task and the answer that rationales are given."""
        more = dict(zip(("task", "answer"), which, strict=False))
        with self.machine.autocast():
            return scoring.predict_split(self.model.answer_scores, self.batches(items, **more))

    @torch.no_grad()
    def collect(self, found_in: Callable, items) -> set:
        """All that found_in(batch), a set, finds in the batches of some items."""
        found = set()
        for batch in self.batches(items):
            with self.machine.autocast():
                found |= found_in(batch)
        return set(common.gather_lists(list(found)))

    def on_val(self, items) -> dict[str, Any]:
        """Metrics of the task on some items: captions are greedy, galleries have one text a picture."""
        if self.task == "itm":
            pairs, is_scene = scoring.pairs_of(items), hasattr(items[0].image, "objects")
            if not pairs:  # a single picture has no other's text
                return {}
            metrics = scoring.score_pairs(pairs, self.scores, scoring.pairs_of(items, True) if is_scene else [])
            return metrics | (self.more(self, items) if self.more else {})
        if self.task in MATCHES:
            items = items[: self.gallery_of or None]
            rows = self.gallery(items, [item.captions[0] for item in items])
            scores = torch.stack([torch.as_tensor(rows[item.image_id]) for item in items])
            return scoring.recalls(scores, list(range(len(items))))
        if self.task in TELLS:
            return scoring.score_captions(items, self.captions(items, 1))
        ways = (("qa",), ("qar",)) if self.task == "vcr" else ((),)
        return scoring.score_examples(self.corpus, items, *(self.scores(items, *way) for way in ways))[0]

    def validate(self, cfg, run, log, step: int, best: float) -> float:
        """On the first val samples; moves `best` where they are no worse than before; returns the best value so far.

        step_N is saved already: what fails here costs nothing, and --resume begins with it.
        """
        items, name = list(self.corpus.splits.get("val", [])[: max(1, cfg.val_items)]), self.best_by
        val = common.share_from_main(self.on_val(items) if items else {})
        is_best = val[name] >= best if val else True  # without a val split the last is the best
        best = max(best, val.get(name, best))
        if self.machine.is_main:
            if val:
                shown = "  ".join(f"{k} {v:.3f}" for k, v in val.items() if k in (name, *SHOWN))
                log.say(f"val at step {step}: {shown}" + ("  (best so far)" if is_best else ""))
                run.log({"step": step, **{f"val_{k}": v for k, v in val.items()}})
            run.evaluated(step, {"val": val, "best": best, "is_due": False}, is_best)
        common.wait_for_all()
        return best

    def final(self, folder: Path, beam: int, official: bool, n_texts: int) -> tuple[dict, dict]:
        """Every test split with its controls, pictures and result files in `folder`: (splits of metrics.json, columns
        of a table), both empty but on the first process. n_texts: captions of each picture in a gallery."""
        is_main = self.machine.is_main
        if self.task in ANSWERS:
            return scoring.evaluate_examples(self.corpus, self.scores, folder, is_main)
        splits, columns = {}, {}
        if self.task in MATCHES:
            sheet = "ranking.png" if self.task in TELLS else "samples.png"
            splits, columns = scoring.evaluate_retrieval(self.corpus, self.gallery, folder, is_main, n_texts,
                                                         sheet=sheet, most=self.gallery_of,
                                                         galleries=self.galleries)  # fmt: skip
        if self.task == "itm":
            for table, more in zip((splits, columns), scoring.evaluate_pairs(self.corpus, self.scores, is_main),
                                   strict=True):  # fmt: skip
                _join(table, more)
        for split in self.corpus.finally_evaluated() if self.more else ():
            found = self.more(self, list(self.corpus.splits[split]))
            if is_main:
                columns[split] |= found  # the same dictionary as in `splits`
        if self.task in TELLS:
            found = scoring.evaluate_captions(self.corpus, lambda items: self.captions(items, beam), folder, is_main,
                                              official)  # fmt: skip
            for table, more in zip((splits, columns), found, strict=True):
                _join(table, more)
        return splits, columns


def _join(table: dict, more: dict) -> None:
    """Nested dictionaries: what is in both is joined."""
    for name, value in more.items():
        if isinstance(value, dict) and name in table:
            _join(table[name], value)
        else:
            table[name] = value
