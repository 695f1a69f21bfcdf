"""What do ViLTA's two mechanisms cost? A training step of cd+hn beside one of the baseline.

    python bench/vilta.py                        --preset base: RoBERTa-base, CLIP-B/16, 6 + 6 layers, 288 pixels
    python bench/vilta.py --sizes tiny           a few seconds
    python bench/vilta.py --device cuda --dtype bf16 --batch 32

Random weights, made on the fly, and random pixels and words. Medians of alternating runs of one update of pre-training
as `vilta.train` does it, on a batch of `vilta.rows_of` made beforehand: `--batch` pairs, texts of 50 tokens or as many
as the preset takes; writing of the negatives, forward, losses, backward, gradient norms, AdamW. The ratio is the
method's extra cost: the frozen language encoder, two passes of the current one over the captions to rewrite, and the
writer's word head. Both steps are those of one model, so the memory of the baseline's counts what it would do without:
the frozen encoder, and the writer's head with its moments.

GFLOP, matmul, memory, MFU: as in bench/tden.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from timing import describe_machine, flops_of, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, where this file is vilta.py

import common
import corpora
import data
import language
import vilta

TOKENS = 50  # of a text, <s> and </s> included


def config(size: str, **more) -> vilta.Config:
    """A preset without a start phase, one caption a picture."""
    plain = dict(clip="none", roberta="none", start_steps=0, captions_per_image=1)
    return vilta.Config(**{**vilta.PRESETS[size], **plain, **more})


def tokenizer() -> language.Tokenizer:
    """A small one of RoBERTa's kind, which has whole words to write; its entries are the first of the embedding's."""
    texts = corpora.texts(corpora.load("scenes", n_train=100, n_val=1, n_test=1))
    return language.Tokenizer.train(texts, 1000, "roberta")


def random_batch(cfg: vilta.Config, tok: language.Tokenizer, pairs: int, luck: torch.Generator) -> dict:
    """What a loader gives for `pairs` pictures with a caption each, of random words."""
    words = language.word_tables(tok, cfg.vocab_size)["later"].nonzero()[:, 0]
    length = min(TOKENS, cfg.max_len + 2) - 2
    rows = words[torch.randint(len(words), (pairs, length), generator=luck)].tolist()
    size = (pairs, 3, cfg.image_size, cfg.image_size)
    return {"image_id": list(range(pairs)), "bad": [],
            "pixels": torch.randint(256, size, generator=luck, dtype=torch.uint8),
            **data.pad_captions(rows, tok.bos, tok.eos, tok.pad)}  # fmt: skip


def train_step(cfg: vilta.Config, model, optimizer, rows: dict, machine: common.Machine) -> dict:
    """One update of vilta.train, in one piece and one process -> its losses by name. The arm is that of cfg."""
    model.cfg = cfg
    model.train()
    with machine.autocast():
        rows = vilta.write_negatives(model, rows)
        out = model(rows)
    found = vilta.losses(cfg, out, rows)
    sum(found.values()).backward()
    heads = [p for name, p in model.named_parameters() if name.startswith("lm_head.")]
    others = [p for name, p in model.named_parameters() if not name.startswith("lm_head.")]
    norm = torch.nn.utils.clip_grad_norm_(others, cfg.grad_clip or math.inf)
    torch.nn.utils.clip_grad_norm_(heads, cfg.grad_clip or math.inf)
    assert math.isfinite(norm), "the gradient is not finite"  # waits for the GPU, as training does
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: loss.detach() for name, loss in found.items()}


def bench_step(size: str, options) -> None:
    cfgs = {f"step, {arm}": config(size, arm=arm, device=options.device, dtype=options.dtype)
            for arm in ("baseline", "cd+hn")}  # fmt: skip
    cfg, tok = cfgs["step, cd+hn"], tokenizer()
    machine = common.start_machine(cfg)
    model = vilta.ViLTA(cfg, tok).to(machine.device)
    optimizer = vilta.make_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the weights stay: thousands of updates towards random labels would not
    rows, luck = {}, torch.Generator().manual_seed(1)
    batch = random_batch(cfg, tok, options.batch, luck)
    for name, c in cfgs.items():
        rows[name] = data.to_device(model, vilta.rows_of(batch, tok, c, torch.Generator().manual_seed(2)))
    with machine.autocast():
        n_written = int((vilta.write_negatives(model.eval(), rows["step, cd+hn"])["kinds"] == vilta.WRITTEN).sum())
    if not n_written:
        raise common.UserError(f"--batch {options.batch}: none of the pairs is a written negative, so half of the "
                               "method would not be timed; give 2 or more")  # fmt: skip
    own = sum(p.numel() for name in ("teacher", "lm_head") for p in getattr(model, name).parameters())
    print(f"\n{size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {own / 1e6:.1f} M of them "
          f"the method's; {options.batch} pairs, {n_written} of them written, pictures of {cfg.image_size}, "
          f"{rows['step, cd+hn']['ids'].size(1)} tokens, on {machine.reason}")  # fmt: skip
    runs = {name: lambda name=name, c=c: train_step(c, model, optimizer, rows[name], machine)
            for name, c in cfgs.items()}  # fmt: skip
    measure(runs, {name: flops_of(run) for name, run in runs.items()}, options.batch, cfg, machine, options.repeats)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["base"], choices=vilta.PRESETS, help="presets of vilta.py")
    parser.add_argument("--batch", type=int, default=2, help="pairs of a step [2]")
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median counts [5]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(argv)
    print(describe_machine())
    for size in options.sizes:
        bench_step(size, options)


if __name__ == "__main__":
    common.run_main(main)
