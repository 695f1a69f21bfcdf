"""How fast does TDEN train and caption? The two-pass step beside one pass, beam search with its cache and without.

    python bench/tden.py                        sizes of --preset base: 4 pairs of 50 regions and 20 tokens, float32
    python bench/tden.py --sizes tiny           a few seconds
    python bench/tden.py --device cuda --dtype bf16 --batch 64 --compile

Random weights, made on the fly, and random pairs: 2,048 numbers and 1,601 class probabilities for each region. Medians
of alternating runs:

step    One iteration of `tden.train` on one batch of `tden.corrupt`, which is made beforehand: for each pass forward,
        losses, backward, gradient norm, AdamW. Samples are pairs of picture and text.
beam    What a caption costs, from the regions on: `decoding.competing_beams` over `tden.Decoder`, 20 tokens, no end
        token. Before anything is timed, with and without the cache the captions must be of equal probability.

GFLOP   Of matrix products and attention, forward and backward, a multiplication with its addition counted as two, by
        torch's FlopCounterMode over one run without --compile. Norms, activations, losses and AdamW are not counted.
matmul  Share of the rate of one large matrix product, the tokens of 2,048 rows (on a GPU 16,384) through the first
        matrix of a feed-forward part, in the same dtype and taking turns with what is timed.
memory  The largest resident size of the process during one run (on Linux; elsewhere since its start), weights and
        optimizer included; on a GPU max_memory_allocated.
MFU     On a GPU: share of the bf16 peak of its data sheet (common.PEAKS).
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import describe_machine, flops_of, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, where this file is tden.py

import common
import decoding
import tden

NO_END = -1  # an end token that no vocabulary has
SPECIAL = SimpleNamespace(pad=0, bos=1, eos=2, mask=3)  # all that `corrupt` asks of a tokenizer


def config(size: str, **more) -> tden.Config:
    of_data = dict(bert="none", feature_dim=2048, region_classes=1601)
    return tden.Config(**{**tden.PRESETS[size], **of_data, **more})


def random_pairs(cfg: tden.Config, pairs: int, n_regions: int, n_tokens: int, luck: torch.Generator) -> dict:
    """What a loader gives for that many pictures with one caption each; a caption's end counts among its tokens."""
    words = torch.randint(4, cfg.vocab_size, (pairs, n_tokens - 1), generator=luck)
    corners = torch.rand(pairs, n_regions, 2, 2, generator=luck).sort(dim=2).values  # [B, N, low and high, x and y]
    boxes = corners.flatten(2) * 400
    shares = (corners[:, :, 1] - corners[:, :, 0]).prod(-1, keepdim=True)
    ends = torch.tensor([[SPECIAL.bos], [SPECIAL.eos]]).repeat_interleave(pairs, 1)[:, :, None]
    return {
        "ids": torch.cat([ends[0], words], 1), "targets": torch.cat([words, ends[1]], 1),
        "image_id": list(range(pairs)), "regions": torch.rand(pairs, n_regions, cfg.feature_dim, generator=luck),
        "regions_boxes": boxes, "regions_locations": torch.cat([corners.flatten(2), shares], 2),
        "regions_keep_mask": torch.ones(pairs, n_regions, dtype=torch.bool),
        "regions_classes": torch.randn(pairs, n_regions, cfg.region_classes, generator=luck).softmax(-1),
    }  # fmt: skip


def train_step(cfg: tden.Config, model, optimizer, rows: dict, machine: common.Machine) -> dict:
    """One iteration of tden.train's pre-training, in one piece and one process -> its losses by the log's names."""
    piece, logged, suffixes = dict(rows), {}, ("", "_2")[: cfg.passes]
    for turn, suffix in enumerate(suffixes):
        is_last = turn + 1 == len(suffixes)
        with machine.autocast():
            out = model(piece)
        found = tden.losses(cfg, out, piece)
        sum(found.values()).backward()
        logged |= {name + suffix: loss.detach() for name, loss in found.items()}
        if not is_last:
            piece |= tden.second_inputs(piece, out["mlm"], out["msg"], cfg.ss_mode, cfg.ss_prob)
            del piece["image_ids"]
        if cfg.two_updates or is_last:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            assert math.isfinite(norm), "the gradient is not finite"  # waits for the GPU, as training does
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return logged


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def bench_step(size: str, options) -> None:
    cfgs = {f"step, {told}": config(size, passes=passes, device=options.device, dtype=options.dtype,
                                    compile=options.compile)
            for told, passes in (("one pass", 1), ("two passes", 2))}  # fmt: skip
    cfg = cfgs["step, two passes"]
    machine = common.start_machine(cfg)
    model = tden.TDEN(cfg).to(machine.device).train()
    optimizer = common.adamw(model, lambda name: 1e-6, cfg.weight_decay, (0.9, cfg.beta2), all_matrices=True)
    luck = torch.Generator().manual_seed(1)
    batch = random_pairs(cfg, options.batch, options.regions, options.tokens, luck)
    rows = {k: x.to(machine.device) for k, x in tden.corrupt(batch, SPECIAL, cfg, luck).items()}
    why_not = common.why_not_compiled(cfg, machine)
    print(f"\n{size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, batch {options.batch}, "
          f"{options.regions} + 1 regions, {options.tokens} tokens, on {machine.reason}, torch.compile "
          + (f"off ({why_not})" if why_not else "on"))  # fmt: skip
    flops = {name: flops_of(lambda cfg=c: train_step(cfg, model, optimizer, rows, machine)) for name, c in cfgs.items()}
    called = common.spread(model, cfg, machine)
    runs = {name: lambda cfg=c: train_step(cfg, called, optimizer, rows, machine) for name, c in cfgs.items()}
    for run in runs.values() if options.compile else ():
        run()  # compiles
    measure(runs, flops, options.batch, cfg, machine, options.repeats)


@torch.inference_mode()
def bench_beam(size: str, options) -> None:
    cfg = config(size, task="caption", device=options.device, dtype=options.dtype)
    machine = common.start_machine(cfg)
    model = tden.TDEN(cfg).to(machine.device).eval()
    luck = torch.Generator().manual_seed(1)
    batch = random_pairs(cfg, options.batch, options.regions, options.tokens, luck)
    batch = {k: x.to(machine.device) for k, x in tden.regions.of_batch(batch, cfg.max_regions).items()}

    def captions(cached):
        with machine.autocast():
            decoder = tden.Decoder(model, batch, cached)
            return decoding.competing_beams(decoder, options.batch, options.beam, SPECIAL.bos, NO_END, options.tokens,
                                            machine.device)  # fmt: skip

    (ids, log_p), (other_ids, other_log_p) = captions(True), captions(False)
    slack = 1e-3 if machine.dtype == torch.float32 else 0.3
    torch.testing.assert_close(log_p.sum(1), other_log_p.sum(1), atol=slack, rtol=slack)
    same = (ids == other_ids).all(1).sum()
    print(f"{size}: beam {options.beam}, {options.tokens} tokens; with the cache and without {same} of {len(ids)} "
          "captions are equal, all are equally probable")  # fmt: skip
    runs = {"beam, with the cache": lambda: captions(True), "beam, without": lambda: captions(False)}
    measure(runs, {k: flops_of(run) for k, run in runs.items()}, options.batch, cfg, machine, options.repeats)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["base"], choices=tden.PRESETS, help="presets of tden.py")
    parser.add_argument("--batch", type=int, default=4, help="pairs, or pictures to caption")
    parser.add_argument("--regions", type=int, default=50, help="regions of a picture, without the global one")
    parser.add_argument("--tokens", type=int, default=20, help="tokens of a text, end included")
    parser.add_argument("--beam", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32 or bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the training step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, 5 or more")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(f"{describe_machine()}; medians of {max(5, options.repeats)}")
    for size in options.sizes:
        bench_step(size, options)
        gc.collect()
        bench_beam(size, options)


if __name__ == "__main__":
    common.run_main(main)
