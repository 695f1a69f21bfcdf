"""A contact sheet of the small world: twelve scenes with what is said or asked about them, and the right answers.

    python scenes.py show                                         captions, tiny world: scenes.png
    python scenes.py show --world full --task pairs               also: questions, hypotheses, tagged
"""

from __future__ import annotations

import argparse

from PIL import Image, ImageDraw, ImageFont

import scenes
from tools.sheets import contact_sheet, side_by_side

SIDE = 224


def text_of(tokens: tuple) -> str:
    """Words and tags of a tagged text as one line: "in what are [0] [2] alike ?"."""
    return " ".join(t if isinstance(t, str) else " ".join(f"[{i}]" for i in t) for t in tokens)


def draw_tags(scene) -> Image.Image:
    """A scene with the tag of each object on it."""
    image = scenes.render(scene, SIDE)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    for i, o in enumerate(scene.objects):
        at = (o.x * SIDE, o.y * SIDE)
        draw.text(at, str(i), "white", font, anchor="mm", stroke_width=3, stroke_fill="black")
    return image


def examples(task: str, world: str, split: str, seed: int, n: int = 12):
    """-> n pictures and n lists of sentences."""
    make = {"pairs": scenes.Pairs, "hypotheses": scenes.Hypotheses, "tagged": scenes.Tagged}.get(task, scenes.Scenes)
    sample = list(make(world, split, n, seed))
    if task == "pairs":
        told = [[f"{item.text}: {('false', 'true')[item.label]}"] for item in sample]
        return [side_by_side([scenes.render(scene, SIDE) for scene in item.scenes]) for item in sample], told
    if task == "hypotheses":
        names = ("contradiction", "neutral", "entailment")
        told = [[f"{item.text}: {names[item.label]}"] for item in sample]
        return [scenes.render(item.scenes[0], SIDE) for item in sample], told
    if task == "tagged":
        right = [(q.question, q.answers[q.label], q.rationales[q.rationale_label]) for q in sample]
        return [draw_tags(q.scene) for q in sample], [list(map(text_of, texts)) for texts in right]
    told = [scenes.captions(scene) for scene in sample]
    if task == "questions":
        asked = [scenes.questions(scene) for scene in sample]
        told = [[f"{q.text} {q.answer} ({q.answers.count(q.answer)} of 10)" for q in some] for some in asked]
    return [scenes.render(scene, SIDE) for scene in sample], told


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="scenes.py", description="The small world: look at it.")
    show = parser.add_subparsers(required=True).add_parser("show", help="draw scenes with captions, or with a task")
    show.add_argument("--task", default="captions", choices=["captions", "questions", "pairs", "hypotheses", "tagged"])
    show.add_argument("--world", default="tiny", choices=list(scenes.WORLDS))
    show.add_argument("--split", default="train", choices=scenes.SPLITS)
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--out", default="scenes.png", help="file to write (default: scenes.png)")
    args = parser.parse_args(argv)
    pictures, told = examples(args.task, args.world, args.split, args.seed)
    title = f"The small world   ·   {args.task}   ·   {args.world}   ·   {args.split}   ·   seed {args.seed}"
    try:
        contact_sheet(args.out, pictures, told, title, side=SIDE)
    except (OSError, ValueError) as error:  # ValueError: PIL does not know the ending
        raise SystemExit(f"cannot write {args.out}: {error}; give --out a path that ends in .png") from error
    print(f"wrote {args.out}: {len(pictures)} of the {args.world} world, split {args.split}, seed {args.seed}")
