"""How fast does SOHO train, and how fast does it read a picture, beside a detector's regions?

    python bench/soho.py                        sizes of --preset base: ResNet-101, 12 layers, pictures of 600 x 1000
    python bench/soho.py --sizes tiny           a few seconds
    python bench/soho.py --device cuda --dtype bf16 --batch 16

Random weights, made on the fly, and random pixels and words. Medians of alternating runs:

step     One update of `soho.train` on one batch of `soho.corrupt`, made beforehand: `--batch` pictures with a text of
         16 tokens each; forward, losses, backward, gradient norm, SGD and AdamW. Once as the preset has it (stem and
         first stage frozen), once with the whole ResNet frozen, as in the first epochs of the paper.
forward  A picture and a text through SOHO, from normalised pixels to the logits of ITM, beside the same encoder on the
         features of 100 boxes from torchvision's Faster R-CNN (a feature pyramid on a ResNet of the same depth), made
         of the same picture: proposals, box heads, suppression, and features of the boxes kept. The ratio is ours: the
         paper's detectors were others.

GFLOP, matmul, memory, MFU: as in bench/tden.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import describe_machine, flops_of, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, where this file is soho.py

import common
import soho

SPECIAL = SimpleNamespace(pad=0, bos=1, eos=2, mask=3)  # all that `corrupt` asks of a tokenizer
TOKENS = 16


def config(size: str, **more) -> soho.Config:
    return soho.Config(**{**soho.PRESETS[size], "bert": "none", "resnet": "none", "word_steps": 0, **more})


def random_batch(cfg: soho.Config, pictures: int, luck: torch.Generator) -> dict:
    """What a loader gives for wide pictures with one text each."""
    h, w = cfg.short_side, cfg.long_side
    H, W = (math.ceil(side / 32) * 32 for side in (h, w))
    pixels = torch.zeros(pictures, 3, H, W, dtype=torch.uint8)
    pixels[:, :, :h, :w] = torch.randint(256, (pictures, 3, h, w), generator=luck, dtype=torch.uint8)
    words = torch.randint(4, cfg.vocab_size, (pictures, TOKENS - 2), generator=luck)
    ends = torch.tensor([[SPECIAL.bos], [SPECIAL.eos]]).repeat_interleave(pictures, 1)[:, :, None]
    return {"pixels": pixels, "sizes": torch.tensor([[h, w]] * pictures), "image_id": list(range(pictures)),
            "ids": torch.cat([ends[0], words], 1), "targets": torch.cat([words, ends[1]], 1)}  # fmt: skip


def train_step(cfg: soho.Config, model, called, optimizer, rows: dict, machine: common.Machine) -> dict:
    """One update of soho.train, in one piece and one process -> its losses by name."""
    model.cnn.is_frozen = cfg.freeze_cnn > 0
    model.train()
    with machine.autocast():
        out = called(rows)
    found = soho.losses(cfg, out, rows)
    sum(found.values()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    assert math.isfinite(norm), "the gradient is not finite"  # waits for the GPU, as training does
    optimizer.step(0.0, 1)  # the weights stay: thousands of updates towards random labels would not
    return {name: loss.detach() for name, loss in found.items()}


def bench_step(size: str, options) -> None:
    cfgs = {f"step, {told}": config(size, freeze_cnn=share, device=options.device, dtype=options.dtype,
                                    compile=options.compile)
            for told, share in (("ResNet frozen", 1.0), ("as the preset", 0.0))}  # fmt: skip
    cfg = cfgs["step, as the preset"]
    machine = common.start_machine(cfg)
    model = soho.SOHO(cfg).to(machine.device)
    optimizer, luck = soho.Optimizers(cfg, model), torch.Generator().manual_seed(1)
    batch = random_batch(cfg, options.batch, luck)
    rows = {k: x.to(machine.device) for k, x in soho.corrupt(batch, SPECIAL, cfg, luck).items()}
    why_not = common.why_not_compiled(cfg, machine)
    print(f"\n{size}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {options.batch} pictures of "
          f"{cfg.short_side} x {cfg.long_side}, {TOKENS} tokens, on {machine.reason}, torch.compile "
          + (f"off ({why_not})" if why_not else "on"))  # fmt: skip
    called = common.spread(model, cfg, machine)
    runs = {name: lambda cfg=c: train_step(cfg, model, called, optimizer, rows, machine) for name, c in cfgs.items()}
    plain = {name: flops_of(lambda cfg=c: train_step(cfg, model, model, optimizer, rows, machine))
             for name, c in cfgs.items()}  # fmt: skip
    measure(runs, plain, options.batch, cfg, machine, options.repeats)


def detector_of(depth: int):
    """torchvision's Faster R-CNN, random weights, that keeps its 100 best boxes whatever their scores."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    name = f"resnet{max(18, depth)}"
    backbone = resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=0)
    for name, scale in backbone.named_buffers():  # random blocks on top of one another would overflow, and leave no box
        if name.endswith("bn3.weight" if depth >= 50 else "bn2.weight"):
            scale.fill_(0.1)
    return FasterRCNN(backbone, 91, box_score_thresh=0.0, box_detections_per_img=100).eval()


@torch.inference_mode()
def bench_forward(size: str, options) -> None:
    cfg = config(size, device=options.device, dtype=options.dtype)
    machine = common.start_machine(cfg)
    luck = torch.Generator().manual_seed(1)
    batch = {k: x.to(machine.device) for k, x in random_batch(cfg, 1, luck).items() if k != "image_id"}
    model, detector = soho.SOHO(cfg).to(machine.device).eval(), detector_of(cfg.depth).to(machine.device)
    line = torch.nn.Linear(1024, cfg.width).to(machine.device)
    image, sizes = model.pictures(batch)
    ids, keep = batch["ids"], torch.ones_like(batch["ids"], dtype=torch.bool)
    detector.transform.min_size, detector.transform.max_size = (cfg.short_side,), cfg.long_side
    kept = []

    def from_pixels():
        with machine.autocast():
            seen = model.see(image, sizes)
            cells = seen["keep_mask"].flatten(1)
            return model.itm_head(model.encode(model.text(ids), keep, model.place(seen["tokens"], seen["keep_mask"]),
                                               cells, n=1)[:, 0])  # fmt: skip

    def from_regions():
        with machine.autocast():
            images, _ = detector.transform([batch["pixels"][0, :, : cfg.short_side, : cfg.long_side] / 255.0])
            features = detector.backbone(images.tensors)
            proposals, _ = detector.rpn(images, features)
            found, _ = detector.roi_heads(features, proposals, images.image_sizes)
            boxes = found[0]["boxes"]
            kept.append(len(boxes))
            heads = detector.roi_heads
            regions = line(heads.box_head(heads.box_roi_pool(features, [boxes], images.image_sizes)))[None]
            seen = torch.ones(regions.shape[:2], dtype=torch.bool, device=machine.device)
            return model.itm_head(model.encode(model.text(ids), keep, regions, seen, n=1)[:, 0])

    runs = {"forward, SOHO": from_pixels, "forward, Faster R-CNN": from_regions}
    flops = {name: flops_of(run) for name, run in runs.items()}
    n = soho.grid(batch["pixels"].shape[2:], cfg)
    if kept[-1] != 100:
        raise common.UserError(f"the detector kept {kept[-1]} boxes, not 100: this comparison says nothing")
    print(f"{size}: {n[0]} x {n[1]} cells, or {kept[-1]} boxes kept; detector's network "
          f"{sum(p.numel() for p in detector.parameters()) / 1e6:.1f} M parameters")  # fmt: skip
    measure(runs, flops, 1, cfg, machine, options.repeats)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["base"], choices=soho.PRESETS, help="presets of soho.py")
    parser.add_argument("--batch", type=int, default=2, help="pictures of a training step [2]")
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median counts [5]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", choices=("step", "forward"), help="one of the two [both]")
    options = parser.parse_args(argv)
    print(describe_machine())
    for size in options.sizes:
        for name, bench in (("step", bench_step), ("forward", bench_forward)):
            if options.only in (None, name):
                bench(size, options)


if __name__ == "__main__":
    common.run_main(main)
