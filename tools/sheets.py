"""Contact sheets: pictures with what is said of them, for people to look at."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import Choice, Tagged, load_image
from regions import object_boxes
from tools import judge

PAPER = (250, 249, 246)


def contact_sheet(path: Path | str, pictures: list, texts: list[list[str]], title="", columns=4, side=200) -> None:
    """Write a grid of PIL pictures, at most `side` pixels wide and high, their sentences wrapped underneath."""
    wrapped = [[textwrap.wrap(sentence, side // 7) or [""] for sentence in sentences] for sentences in texts]
    gap, line, ink = 28, 18, (52, 54, 60)
    fitted = [[max(1, round(length * side / max(p.size))) for length in p.size] for p in pictures]
    pictures = [p.convert("RGB").resize(s, Image.Resampling.LANCZOS) for p, s in zip(pictures, fitted, strict=True)]
    head, high = 72 if title else gap, max(picture.height for picture in pictures)
    tall = high + gap + 8 + max(sum(4 + line * len(lines) for lines in text) for text in wrapped)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, head + tall * -(-len(pictures) // columns)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((gap, 26), title, fill=ink, font=ImageFont.load_default(20))
    for i, (picture, sentences) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = gap + i % columns * (side + gap), head + i // columns * tall
        corners = Image.new("L", (4 * picture.width, 4 * picture.height))
        ImageDraw.Draw(corners).rounded_rectangle((0, 0, corners.width - 1, corners.height - 1), radius=40, fill=255)
        sheet.paste(picture, (x, y), corners.reduce(4))
        y += high + 12
        for lines in sentences:
            draw.ellipse((x + 2, y + 6, x + 6, y + 10), fill=(186, 180, 168))
            draw.multiline_text((x + 13, y), "\n".join(lines), fill=ink, font=font, spacing=line - 13)
            y += line * len(lines) + 4
    sheet.save(path)


def side_by_side(pictures: list) -> Image.Image:
    """PIL pictures in a row, 8 pixels apart."""
    width, height = sum(p.width for p in pictures) + 8 * (len(pictures) - 1), max(p.height for p in pictures)
    row, x = Image.new("RGB", (width, height), PAPER), 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + 8
    return row


def draw_captions(path: Path | str, items: list, hyps: dict) -> None:
    """Pictures, what the model says, whether that is true (scenes), a reference."""
    texts = []
    for item in items:
        judged = f" [{judge.verdict(hyps[item.image_id], item.image)}]" if hasattr(item.image, "objects") else ""
        references = [f"reference: {item.captions[0]}"] if item.captions else []
        texts.append([hyps[item.image_id] + judged, *references])
    contact_sheet(path, [load_image(item.image, 200) for item in items], texts)


def draw_examples(path: Path | str, items: list, said: dict, right: dict) -> None:
    """Pictures, or pairs, what was asked, what the model says and what is right; `said` and `right` by example id."""
    pictures, texts = [], []
    for item in items:
        i, is_choice = item.example_id, isinstance(item, Choice)
        picture = side_by_side([load_image(image, 200) for image in item.images])
        pictures.append(with_boxes(picture, object_boxes(item, picture.size)) if is_choice else picture)
        judged = f"{said[i]} [right]" if said[i] == right[i] else f"{said[i]} [it is: {right[i]}]"
        texts.append([with_tags(item.question) if is_choice else item.text, judged])
    contact_sheet(path, pictures, texts)


def with_tags(text: Tagged) -> str:
    """Casey[0] met car[2]."""
    return " ".join(word + f"[{tag}]" * (tag >= 0) for word, tag in zip(text.words, text.tags, strict=True))


def with_boxes(picture: Image.Image, boxes: np.ndarray) -> Image.Image:
    """The picture with its boxes [n, 4] and their numbers."""
    draw = ImageDraw.Draw(picture)
    width = max(1, max(picture.size) // 150)
    font = ImageFont.load_default(max(10, max(picture.size) // 14))
    for i, box in enumerate(boxes.tolist()):
        draw.rectangle(box, outline="white", width=width)
        draw.text((box[0] + 2 * width, box[1]), str(i), "white", font, stroke_width=width, stroke_fill="black")
    return picture


def draw_ranking(path: Path | str, items: list, texts: list[str], owner: list[int], scores: np.ndarray, n=16) -> None:
    """Texts of different pictures: the picture that is ranked first, and whether it is the text's own."""
    columns = [owner.index(k) for k in range(min(n, len(items)))]  # the first text of each
    firsts = [int(scores[:, j].argmax()) for j in columns]
    told = [[texts[j], "ranked first [its own]" if first == owner[j] else "ranked first [another's]"]
            for j, first in zip(columns, firsts, strict=True)]  # fmt: skip
    contact_sheet(path, [load_image(items[first].image, 200) for first in firsts], told)
