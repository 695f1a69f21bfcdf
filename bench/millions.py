"""What millions of pairs cost: indexing them, starting a loader, memory of its workers; loose files, shards, a cache.

    python bench/millions.py index                  a generated TSV of 3 million rows, with a file for each
    python bench/millions.py index --objects        memory also of the same rows as Python objects
    python bench/millions.py read                   images/s: loose, in shards, resized once; beside bare decoding

index: csv.reader alone reads the same file in turn with indexing it, which besides lists the folders, joins rows and
files, and writes. Files are links to small JPEGs. The memory of a worker is what it has of its own: Private_Dirty of
/proc/PID/smaps_rollup in a forked process, when it starts and when it has asked for N random items.
read: made-up photographs of 640 x 480, squares of --size for a model. "cached" is what `tools/shards.py resize` writes.
The bare speed is Pillow's open, convert, resize and np.asarray of the loose files, in as many processes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import torch
from timing import describe_machine, medians

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import corpora
import data
import language
import mixture
import shards
import table
from bench.loader import bare, bare_jobs, photographs
from tools import shards as packing

ASKED = (0, 10_000, 300_000)  # items that a worker is asked for
WORDS = "a the dog person actor on of in beach field during with red blue wears holds sits near at night street".split()


def generate(root: Path, rows: int) -> None:
    """cc3m's files: the TSV, and a picture for each row."""
    from PIL import Image

    luck = random.Random(0)
    (root / "images_train").mkdir(parents=True)
    with open(root / "Train_GCC-training.tsv", "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, delimiter="\t", lineterminator="\n")
        for number in range(1, rows + 1):
            caption = " ".join(luck.choices(WORDS, k=luck.randint(5, 15)))
            lines.writerow((caption, f"http://images.example.org/{number % 1000:03d}/{number}.jpg"))
    source = None
    for number in range(1, rows + 1):
        folder = root / "images_train" / f"{number // 10_000:04d}"
        if number % 10_000 == 0 or number == 1:
            folder.mkdir(exist_ok=True)
            source = folder / f"{number}.jpg"  # a file has no more than some ten thousand links
            Image.new("RGB", (96, 64), (number % 251, 90, 40)).save(source)
            continue
        os.link(source, folder / f"{number}.jpg")


def own_memory(pid: int) -> float:
    """MiB of pages that this process has written and no other one has; pages of mapped files can be let go."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def first_batch(items, workers: int, batch: int) -> float:
    """Seconds from items to a batch."""
    tokenizer = language.Tokenizer.train(WORDS, 300)
    began = time.perf_counter()
    samples = data.Pictures(items, tokenizer, 32, captions=1, train=True)
    with contextlib.closing(iter(data.train_loader(samples, batch, workers, steps=4))) as batches:
        next(batches)
        return time.perf_counter() - began


def ask(items, numbers: Sequence[int], results) -> None:
    """In a forked process: its own memory after so many random items."""
    luck = random.Random(os.getpid())
    for before, number in zip((0, *numbers), numbers, strict=False):
        for _ in range(before, number):
            items[luck.randrange(len(items))]
        results.put(own_memory(os.getpid()))


def own_memories(items, workers: int, numbers: Sequence[int]) -> list[list[float]]:
    """MiB of each worker after each of the numbers of items."""
    os.sync()  # pages of the index that the disk has not got yet would count as the worker's
    context = get_context("fork")
    queues = [context.Queue() for _ in range(workers)]
    processes = [context.Process(target=ask, args=(items, numbers, queue)) for queue in queues]
    for process in processes:
        process.start()
    found = [[queue.get() for _ in numbers] for queue in queues]
    for process in processes:
        process.join()
    return found


def index(options) -> None:
    place = Path(options.folder or tempfile.mkdtemp())
    root = place / "cc3m"
    try:
        if not root.exists():
            began = time.perf_counter()
            generate(root, options.rows)
            print(f"generated in {time.perf_counter() - began:.0f} s")
        file = root / "Train_GCC-training.tsv"
        print(f"{describe_machine()}\n{options.rows:,} rows, {file.stat().st_size / 2**20:.0f} MiB of TSV")

        def alone():
            with open(file, encoding="utf-8", newline="") as lines:
                assert sum(1 for _ in csv.reader(lines, delimiter="\t")) == options.rows

        def listed():
            n = sum(len(files) for _, _, files in os.walk(root / "images_train"))
            assert n == options.rows

        def indexed():
            shutil.rmtree(root / "index", ignore_errors=True)
            assert len(corpora.load("cc3m", root).splits["train"]) == options.rows

        def opened():
            assert len(corpora.load("cc3m", root).splits["train"]) == options.rows

        seconds = medians({"csv": alone, "walk": listed, "index": indexed, "open": opened}, options.repeats)
        names = ("csv.reader alone", "os.walk alone", "index, first start", "open, later starts")
        for name, each in zip(names, seconds, strict=True):
            print(f"{name:<22} {each:8.2f} s {options.rows / each / 1e6:8.2f} million rows/s")
        size = sum(f.stat().st_size for f in (root / "index").rglob("*") if f.is_file())
        print(f"the index: {size / 2**20:.0f} MiB, {size / options.rows:.0f} bytes a row")
        corpus = corpora.load("cc3m", root)
        mixed = mixture.mixed([(corpus, 1.0)]).splits["train"]
        for workers in options.workers:
            first = first_batch(mixed, workers, options.batch)
            print(f"first batch of {options.batch}, {workers} workers: {first:.2f} s", flush=True)
        print("MiB of its own that each of 1, 2 and 4 workers has after N items")
        print(f"{'':<16} {'workers':>7}" + "".join(f" {f'N = {n:,}':>24}" for n in ASKED))
        for name in ("mapped", *["Python objects"] * options.objects):
            items = mixed if name == "mapped" else corpus.splits["train"][:]
            for workers in (1, 2, 4):
                columns = zip(*own_memories(items, workers, ASKED), strict=True)
                told = "".join(f" {', '.join(f'{each:.0f}' for each in column):>24}" for column in columns)
                print(f"{name:<16} {workers:>7}{told}", flush=True)
    finally:
        if not options.folder:
            shutil.rmtree(place)


def read(options) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "made").mkdir()
        few = photographs(place / "made", 64, 640, 480)
        (place / "loose" / "images").mkdir(parents=True)
        rows = []
        for number in range(options.images):
            shutil.copy(few[number % 64].image, place / "loose" / "images" / f"{number}.jpg")
            rows.append(f"images/{number}.jpg\t{few[number % 64].captions[0]}\n")
        (place / "loose" / "captions.txt").write_text("".join(rows))
        began = time.perf_counter()
        packing.main(["pack", str(place / "loose"), str(place / "shards"), "--per-shard", "500"])
        packed = time.perf_counter() - began
        packing.main(["resize", str(place / "loose"), str(place / "cached"), "--short", str(options.short)])
        resized = time.perf_counter() - began - packed
        packing.main(["resize", str(place / "shards"), str(place / "cached_shards"), "--short", str(options.short)])
        print(f"{describe_machine()}\n{options.images} pictures to {options.size} px; packed in {packed:.1f} s, "
              f"resized to {options.short} px in {resized:.1f} s")  # fmt: skip
        kinds = {}
        for name in ("loose", "cached"):
            items = corpora.load(str(place / name)).splits["train"]
            kinds[name] = mixture.Mixture([mixture.Part(name, table.Table.of(items))])
        for name, where in (("shards", "shards"), ("shards, cached", "cached_shards")):
            found = shards.Shards(shards.files_of(str(place / where)))
            kinds[name] = mixture.Mixture([mixture.Part(name, found)])
        tokenizer = language.Tokenizer.train(few[0].captions, 300)
        print(f"{'images/s':<18} {'workers':>7}" + "".join(f" {name:>15}" for name in (*kinds, "bare, loose")))
        for workers in options.workers:
            steps = options.images * 9 // 10 // options.batch
            runs = {}
            for name, items in kinds.items():
                samples = data.Pictures(items, tokenizer, options.size, captions=1, train=True)
                loader = data.train_loader(samples, options.batch, workers, steps=steps)
                runs[name] = lambda loader=loader: [len(batch["image_id"]) for batch in loader]
            loose = [data.Item(i, place / "loose" / "images" / f"{i}.jpg", ()) for i in range(steps * options.batch)]
            jobs = bare_jobs(loose, options.size, False, max(1, workers))
            with get_context("spawn").Pool(max(1, workers)) as pool:
                runs["bare"] = lambda pool=pool, jobs=jobs: pool.map(bare, jobs, chunksize=1)
                seconds = medians(runs, options.repeats)
            told = "".join(f" {steps * options.batch / each:>15.0f}" for each in seconds)
            print(f"{'':<18} {workers:>7}{told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("index", "read"))
    parser.add_argument("--rows", type=int, default=3_000_000, help="of the generated TSV")
    parser.add_argument("--objects", action="store_true", help="memory also of the same rows as Python objects")
    parser.add_argument("--folder", default="", help="of the generated files, which stay; default: a temporary one")
    parser.add_argument("--images", type=int, default=2000, help="pictures that are read")
    parser.add_argument("--size", type=int, default=224, help="side of the square that a model gets")
    parser.add_argument("--short", type=int, default=256, help="shorter side of the cached pictures")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    {"index": index, "read": read}[options.what](options)


if __name__ == "__main__":
    main()
