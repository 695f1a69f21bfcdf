"""Our CLIP tower and GPT-2 beside transformers': the same weights, the same inputs, the same outputs; which is faster?

    python bench/backbones.py                      ViT-B/16, GPT-2 small, 4 pictures x 5 captions x 16 tokens, 2 threads
    python bench/backbones.py --device cuda --batch 64

Random weights are made by transformers, written with save_pretrained and read by vcgpt.load_clip and load_gpt2. Before
anything is timed, outputs must agree to 1e-3. Both run in float32 and use PyTorch's scaled dot product attention.

Forward: no gradients, no dropout, logits at every position. Training step: forward, next-token loss (plus the mean
square of the visual tokens, so that the tower learns too), backward, fused AdamW, with dropout 0.1 on GPT-2's
embeddings and residual branches. transformers' GPT-2 would also drop attention weights (attn_pdrop); ours does not, so
that is 0 here. The two take turns; medians are printed, and the share of the speed that a plain matrix product reaches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import describe_machine, medians
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import vcgpt

DROPOUT = 0.1


def their_models(clip_dir: Path, gpt2_dir: Path):
    """transformers' two networks with random weights, saved in the two folders."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

    dropout = dict(embd_pdrop=DROPOUT, resid_pdrop=DROPOUT, attn_pdrop=0.0)
    clip = CLIPVisionModel._from_config(CLIPVisionConfig(patch_size=16), attn_implementation="sdpa")
    gpt2 = GPT2LMHeadModel._from_config(GPT2Config(**dropout), attn_implementation="sdpa")
    clip.save_pretrained(clip_dir)
    gpt2.save_pretrained(gpt2_dir)
    return clip, gpt2


def our_models(clip_dir: Path, gpt2_dir: Path):
    """Ours, sized by the folders' config.json and filled from their weights."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (clip_dir, gpt2_dir)]
    cfg = vcgpt.Config(**vcgpt.clip_sizes(configs[0]), **vcgpt.gpt2_sizes(configs[1]), dropout=DROPOUT)
    clip, gpt2 = vcgpt.CLIPVision(cfg), vcgpt.GPT2(cfg)
    vcgpt.load_clip(clip, common.read_tensors(clip_dir / "model.safetensors"))
    vcgpt.load_gpt2(gpt2, common.read_tensors(gpt2_dir / "model.safetensors"))
    return clip, gpt2


class Ours:
    """What is timed, on fixed inputs: visual tokens [B, N, D], next-word logits [R, T, V], a training step."""

    def __init__(self, clip, gpt2, pixels, ids):
        self.clip, self.gpt2, self.pixels, self.ids = clip, gpt2, pixels, ids
        parameters = [p for model in (clip, gpt2) for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def visual(self):
        return self.clip(self.pixels)

    def logits(self):
        return F.linear(self.gpt2(self.ids), self.gpt2.wte.weight)

    def train_step(self):
        targets = self.ids[:, 1:].flatten()
        loss = F.cross_entropy(self.logits()[:, :-1].flatten(0, 1), targets) + self.visual().square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Theirs(Ours):
    def visual(self):
        return self.clip(pixel_values=self.pixels).last_hidden_state

    def logits(self):
        return self.gpt2(input_ids=self.ids, use_cache=False).logits


def finished(run, device: str):
    """`run`, waiting for the GPU where there is one."""

    def timed():
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return timed


def compare(name: str, ours, theirs, options, peak: float) -> None:
    """One line: medians of alternating runs, ratio, and how much of a matrix product's speed ours reaches."""
    with FlopCounterMode(display=False) as counter:
        ours()
    runs = {name: finished(run, options.device) for name, run in (("ours", ours), ("theirs", theirs))}
    a, b = medians(runs, options.repeats)
    rate = counter.get_total_flops() / a
    cells = f"{a * 1e3:>10.1f} {b * 1e3:>14.1f} {b / a:>8.2f} {rate / 1e9:>10.0f} {rate / peak:>8.0%}"
    print(f"{name:<22} {cells}", flush=True)


def matmul_rate(device: str) -> float:
    """FLOP/s of a large float32 matrix product: what this machine can do."""
    a = torch.rand(2048, 2048, device=device)
    (seconds,) = medians({"product": finished(lambda: a @ a, device)})
    return 2 * 2048**3 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="pictures")
    parser.add_argument("--captions", type=int, default=5, help="captions for each picture")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a caption")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each, alternating; 5 at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folders = Path(folder, "clip"), Path(folder, "gpt2")
        their_pair, our_pair = their_models(*folders), our_models(*folders)
    pixels = torch.randn(options.batch, 3, 224, 224, device=options.device)
    ids = torch.randint(50257, (options.batch * options.captions, options.tokens), device=options.device)
    ours = Ours(*(model.to(options.device).eval() for model in our_pair), pixels, ids)
    theirs = Theirs(*(model.to(options.device).eval() for model in their_pair), pixels, ids)

    peak = matmul_rate(options.device)
    print(f"{describe_machine()}, transformers {common.versions()['transformers']}, on {options.device}: "
          f"{peak / 1e9:.0f} GFLOP/s in a matrix product")  # fmt: skip
    with torch.no_grad():
        for name, a, b in (("CLIP", ours.visual(), theirs.visual()), ("GPT-2", ours.logits(), theirs.logits())):
            error = (a - b).abs().max().item()
            print(f"{name} {list(a.shape)}: largest difference {error:.1e}, largest value {b.abs().max():.1f}")
            if not error < 1e-3:
                sys.exit("error: the two do not compute the same, so their speeds cannot be compared")
        print(f"{'median of ' + str(options.repeats) + ', ms':<22} {'ours':>10} {'transformers':>14} {'speedup':>8} "
              f"{'GFLOP/s':>10} {'share':>8}")  # fmt: skip
        compare("CLIP, forward", ours.visual, theirs.visual, options, peak)
        compare("GPT-2, forward", ours.logits, theirs.logits, options, peak)
    for model in (*our_pair, *their_pair):
        model.train()
    compare("both, training step", ours.train_step, theirs.train_step, options, peak)


if __name__ == "__main__":
    main()
