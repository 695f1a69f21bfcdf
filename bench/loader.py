"""How fast are pictures loaded? `data.train_loader` and `data.eval_loader` beside bare decoding and resizing.

    python bench/loader.py                                            made-up photographs, 640 x 480, 0, 1 and 2 workers
    python bench/loader.py --data flickr8k --root data/flickr8k      real ones

Bare: Pillow's open, convert("RGB"), resize (bicubic, to the same sizes, with crops of the same boxes) and np.asarray,
nothing else; in as many processes as the loader has workers, at the same time, so that both have the same cores.
Loader: everything that a run gets: upright pictures, padding, mirroring, captions drawn and encoded, batches, checks.
Both take turns; medians are printed. The goal is 90 % of the bare speed for each worker.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL import __version__ as pillow_version
from timing import describe_machine, medians

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import corpora
import data
import language


def photographs(folder: Path, n: int, width: int, height: int) -> list[data.Item]:
    """JPEGs about as large as COCO's: shapes over a smooth ground, and a camera's noise, which costs the bytes."""
    rng, draw_rng = np.random.default_rng(0), random.Random(0)
    captions = tuple(f"a {colour} shape beside a blue one in front of a wall" for colour in ("red", "green", "grey"))
    items = []
    for i in range(n):
        ground = np.linspace(60, 190, width)[None, :, None] * np.linspace(0.7, 1, height)[:, None, None] * [1, 0.9, 0.8]
        picture = Image.fromarray(ground.astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        for _ in range(30):
            x, y, side = draw_rng.randrange(width), draw_rng.randrange(height), draw_rng.randrange(10, 160)
            colour = tuple(draw_rng.randrange(256) for _ in range(3))
            draw.ellipse((x, y, x + side, y + side * 2 // 3), fill=colour)
        noise = rng.normal(0, 9, (height, width, 1))
        picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
        file = folder / f"{i}.jpg"
        picture.save(file, quality=90)
        items.append(data.Item(i, file, captions))
    return items


def bare(job: tuple[list[tuple[Path, tuple | None]], int]) -> None:
    """Decodes and resizes files: longer side to `size`, or a box of it to the square."""
    files, size = job
    for file, box in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        scale = size / max(image.size)
        shape = (size, size) if box else tuple(max(1, round(side * scale)) for side in image.size)
        np.asarray(image.resize(shape, Image.Resampling.BICUBIC, box=box))


def bare_jobs(items: list[data.Item], size: int, crop: bool, parts: int) -> list:
    """The work of `parts` processes. Crops are drawn by the loader's own rule."""
    rng, files = random.Random(0), []
    for item in items:
        with Image.open(item.image) as opened:
            files.append((item.image, data._random_box(opened.size, rng) if crop else None))
    return [(files[part::parts], size) for part in range(parts)]


def compare(name: str, loader, jobs: list, n: int, workers: int, repeats: int) -> None:
    """One line: images per second and worker of both, and the ratio."""
    processes = max(1, workers)
    with get_context("spawn").Pool(processes) as pool:

        def run_bare():
            if workers:
                pool.map(bare, jobs, chunksize=1)
            else:
                bare(jobs[0])

        def run_loader():
            assert sum(len(batch["image_id"]) for batch in loader) == n

        seconds = medians({"loader": run_loader, "bare": run_bare}, repeats)
    ours, theirs = (n / each / processes for each in seconds)
    print(f"{name:<22} {workers:>7} {ours:>10.1f} {theirs:>10.1f} {ours / theirs:>9.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="coco, flickr30k, flickr8k or own data; default: made up")
    parser.add_argument("--root", help="folder of a named data set (default: data/NAME)")
    parser.add_argument("--size", type=int, default=224, help="side of the square that a model gets")
    parser.add_argument("--picture", type=int, nargs=2, default=(640, 480), help="width and height of made-up ones")
    parser.add_argument("--images", type=int, default=512, help="pictures in a pass")
    parser.add_argument("--batch", type=int, default=32, help="pictures in a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each of the two")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.data:
            items = list(corpora.load(options.data, options.root).splits["train"][: options.images])
        else:
            items = photographs(Path(folder), min(options.images, 64), *options.picture)
        kilobytes = statistics.fmean(os.path.getsize(item.image) for item in items) / 1000
        items = (items * options.images)[: options.images]
        print(f"{describe_machine()}, Pillow {pillow_version}")
        print(f"{options.data or 'made up'}: {kilobytes:.0f} kB a file, to {options.size} px, {len(items)} in a pass")
        print(f"{'images/s per worker':<22} {'workers':>7} {'loader':>10} {'bare':>10} {'share':>9}")
        tokenizer = language.Tokenizer.train((text for item in items for text in item.captions), 1000)
        steps = -(-len(items) // options.batch)
        n_train = steps * options.batch  # the last batch of training goes on with the next epoch
        for workers in options.workers:
            for augment in ("none", "crop+flip"):
                pictures = data.Pictures(items, tokenizer, options.size, max_len=40, train=True, augment=augment)
                loader = data.train_loader(pictures, options.batch, workers, steps=steps)
                jobs = bare_jobs((items * 2)[:n_train], options.size, augment != "none", max(1, workers))
                compare(f"train, {augment}", loader, jobs, n_train, workers, options.repeats)
            loader = data.eval_loader(data.Pictures(items, None, options.size), options.batch, workers)
            jobs = bare_jobs(items, options.size, False, max(1, workers))
            compare("eval", loader, jobs, len(items), workers, options.repeats)


if __name__ == "__main__":
    main()
