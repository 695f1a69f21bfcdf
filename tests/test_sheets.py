"""Contact sheets of choices and rankings: boxes with their numbers, and what is said to be right is right."""

import numpy as np
from PIL import Image

import data
from tools import sheets


def test_boxes_are_drawn_where_they_are():
    picture = sheets.with_boxes(Image.new("RGB", (200, 100)), np.array([[20.0, 30, 80, 90], [120, 10, 190, 50]]))
    pixels = np.asarray(picture).max(2) == 255
    assert pixels[30, 20:81].all() and pixels[90, 20:81].all() and pixels[30:91, 80].all()
    assert pixels[50, 120:191].all() and not pixels[60:85, 100:].any() and pixels[12:25, 122:135].any()  # the number 1


def test_pairs_stand_side_by_side():
    pair = sheets.side_by_side([Image.new("RGB", (10, 20), "red"), Image.new("RGB", (30, 10), "blue")])
    assert pair.size == (48, 20) and pair.getpixel((9, 19)) == (255, 0, 0) and pair.getpixel((18, 0)) == (0, 0, 255)
    assert pair.getpixel((14, 5)) == sheets.PAPER == pair.getpixel((30, 15))


def told(monkeypatch):
    caught = []
    monkeypatch.setattr(sheets, "contact_sheet", lambda path, pictures, texts: caught.append((pictures, texts)))
    return caught


def test_texts_of_examples(tmp_path, monkeypatch):
    caught, file = told(monkeypatch), tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(file)
    items = [data.Example(i, (0,), (file,), f"text {i}") for i in range(2)]
    sheets.draw_examples(tmp_path / "x.png", items, {0: "yes", 1: "no"}, {0: "yes", 1: "yes"})
    assert caught[0][1] == [["text 0", "yes [right]"], ["text 1", "no [it is: yes]"]]


def test_texts_of_rankings(tmp_path, monkeypatch):
    """Of each picture the first text; the picture is the one ranked first for it."""
    caught, items = told(monkeypatch), []
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
        items.append(data.Item(i, tmp_path / f"{colour}.png", ()))
    scores = np.array([[1.0, 0, 3, 0], [0, 0, 2, 9]])
    sheets.draw_ranking(tmp_path / "x.png", items, ["a", "a2", "b", "b2"], [0, 0, 1, 1], scores)
    pictures, texts = caught[0]
    assert texts == [["a", "ranked first [its own]"], ["b", "ranked first [another's]"]]
    assert [picture.getpixel((0, 0)) for picture in pictures] == [(255, 0, 0)] * 2


def test_tags_are_shown_with_their_words():
    assert sheets.with_tags(data.Tagged(("Casey", "met", "car"), (0, -1, 12))) == "Casey[0] met car[12]"
