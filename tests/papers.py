"""The papers that the shared tests run: a new one adds a line here and inherits them."""

import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# file -> flags of a run on scenes that takes a second: its sizes and its own settings
PAPERS = {
    "vcgpt": "--width 32 --heads 2 --mlp 64 --vision-width 32 --vision-heads 2 --fusion-layers 1 --lm-steps 2 "
    "--max-new 12",
    "tden": "--width 32 --heads 2 --mlp 64 --pooled 16 --max-new 12",
    "soho": "--width 32 --heads 2 --mlp 64 --layers 1 --cnn-width 8 --codes 16 --short-side 32 "
    "--long-side 32 --gallery 6",
    "vilta": "--width 32 --heads 2 --mlp 64 --layers 1 --vision-width 32 --vision-heads 2 --vision-mlp 64 "
    "--text-width 32 --text-heads 2 --text-mlp 64 --text-layers 1 --image-size 32 --start-steps 1 --gallery 6",
}
# what makes its training random, beside --dropout: a resumed run repeats it
RANDOM = {"vcgpt": "--augment crop", "vilta": "--augment rand --caption-noise 0.2"}
UPDATES = {"tden": 2}  # optimizer updates in a training step, where they are not one
SHORT = "--batch 20 --train-scenes 40 --val-items 10 --test-scenes 12 --steps 4 --log-every 2 --workers 0 --device cpu"


def toy(paper: str, *more) -> list[str]:
    """Flags of a toy run; those in `more` come last and win."""
    return [*PAPERS[paper].split(), *SHORT.split(), *map(str, more)]


def run(paper: str, *argv) -> None:
    importlib.import_module(paper).main(list(map(str, argv)))
