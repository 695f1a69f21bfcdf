"""Pictures, tokenizers, samples, batches, the order of a run and own data."""

import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import common
import corpora
import data
import language
from common import UserError
from data import BadImage, Item, Pictures, TrainBatches, load_image, load_own, to_pixels
from language import Tokenizer
from tools import sheets

ROOT = Path(data.__file__).parent
WORDS = ["a dog runs", "two black cats sit on a red sofa", "a man on a horse", "the sea", "a small boat at night",
         "a girl eats an apple"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(WORDS * 3, 400)


def gradient(width, height):
    """An RGB picture whose pixels all differ a little: red grows to the right, green downwards."""
    red = np.tile(np.linspace(0, 255, width), (height, 1))
    green = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], -1).astype(np.uint8))


def make_items(folder, n, captions=tuple(WORDS)):
    items = []
    for i in range(n):
        gradient(20 + i, 16).save(folder / f"{i}.png")
        items.append(Item(i, folder / f"{i}.png", tuple(captions)))
    return items


# Pictures


def test_orientation_tag_is_applied(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))  # white left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for viewing: left becomes top
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    seen = np.asarray(load_image(tmp_path / "a.jpg", 0)).mean(-1)
    assert seen.shape == (40, 20)
    assert seen[:18].mean() > 240 and seen[22:].mean() < 15


def test_every_orientation_is_pillows(tmp_path):
    for value in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = value
        gradient(40, 24).save(tmp_path / "a.png", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
        assert np.array_equal(np.asarray(load_image(tmp_path / "a.png", 0)), expected), value


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    tags = turned + struct.pack(">HHI4s", 0x0115, 2, 4, b"bad\0")  # a text where a number belongs
    gradient(9, 5).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + bytes(4))
    assert load_image(tmp_path / "a.jpg", 0).size == (5, 9)


def test_sixteen_bit_grey_keeps_its_scale(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.asarray(load_image(tmp_path / name, 0))[0, :, 0].tolist() == [0, 1, 128, 255], name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_black(tmp_path, mode):
    picture = Image.new("RGBA", (6, 6), (255, 255, 255, 0))  # invisible white
    picture.paste((255, 255, 255, 255), (0, 0, 3, 6))
    if mode == "P":
        picture = picture.convert("P")
        picture.putpalette([255, 255, 255] * 256)
        picture.putdata([0 if i % 6 < 3 else 1 for i in range(36)])
        picture.save(tmp_path / "a.png", transparency=1)
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    seen = np.asarray(load_image(tmp_path / "a.png", 0))
    assert seen[:, :3].min() == 255 and seen[:, 3:].max() == 0


def test_cmyk_grey_bilevel_and_palette_become_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 20, 30))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    red.convert("L").save(tmp_path / "grey.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "bilevel.png")
    expected = {"cmyk.jpg": (200, 20, 30), "palette.png": (200, 20, 30), "grey.png": (75, 75, 75),
                "bilevel.png": (255, 255, 255)}
    for name, colour in expected.items():
        seen = np.asarray(load_image(tmp_path / name, 0)).astype(int)
        assert seen.shape == (8, 8, 3) and abs(seen - colour).max() <= 4, name


def test_content_decides_on_the_decoder(tmp_path):
    gradient(9, 7).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 0).size == (9, 7)


def test_unreadable_pictures_are_named_with_the_reason(tmp_path):
    gradient(64, 64).save(tmp_path / "whole.png")
    gradient(64, 64).save(tmp_path / "whole.jpg")
    for name in ("cut.png", "cut.jpg"):  # the header is whole, the last pixels are not there
        whole = (tmp_path / name.replace("cut", "whole")).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "folder.jpg").mkdir()
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    reasons = {"cut.jpg": "truncated", "cut.png": "truncated", "empty.jpg": "empty", "text.jpg": "not a picture",
               "gone.jpg": "no such file", "folder.jpg": "directory", "float.tif": "floating-point"}
    for name, reason in reasons.items():
        with pytest.raises(BadImage, match=reason) as caught:
            load_image(tmp_path / name, 32)
        assert name in str(caught.value) and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_longer_side_is_fitted_and_the_rest_is_black():
    white = Image.new("RGB", (100, 50), "white")
    wide, high = to_pixels(white, 32), to_pixels(white.rotate(90, expand=True), 32)
    assert wide.dtype == torch.uint8 and wide.shape == (3, 32, 32) and wide.is_contiguous()
    assert wide[:, :16].min() == 255 and wide[:, 16:].max() == 0
    assert high[:, :, :16].min() == 255 and high[:, :, 16:].max() == 0


def test_shrinking_is_antialiased_and_pixels_keep_their_place():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert abs(to_pixels(Image.fromarray(stripes), 32).float() - 127.5).max() < 15
    pixels = to_pixels(gradient(64, 64), 32).float()
    assert pixels[0, 16, 30] > 200 > pixels[0, 16, 2] and pixels[1, 30, 16] > 200 > pixels[1, 2, 16]


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (1, 1)])
@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
@pytest.mark.parametrize("frame", data.FRAMES)
def test_pictures_one_pixel_wide(shape, augment, frame):
    seen = [to_pixels(Image.new("RGB", shape, "white"), 32, augment, random.Random(seed), frame) for seed in range(20)]
    assert {pixels.shape for pixels in seen} == {(3, 32, 32)}
    bright = [pixels.max() == 255 for pixels in seen]  # "rand" may solarize, darken, or push all out of the picture
    assert any(bright) if augment == "rand" else all(bright)


def test_crops_keep_area_and_aspect_in_bounds():
    rng, boxes = random.Random(1), []
    for _ in range(300):
        left, top, right, bottom = data._random_box((90, 60), rng)
        assert 0 <= left < right <= 90 and 0 <= top < bottom <= 60
        boxes.append(((right - left) * (bottom - top) / 5400, (right - left) / (bottom - top)))
    areas, aspects = zip(*boxes, strict=True)
    assert 0.499 < min(areas) < 0.55 and max(areas) > 0.8
    assert 0.749 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.334


def test_crop_fills_the_square_and_flip_mirrors_half_of_the_time():
    picture = gradient(90, 60)
    flipped = 0
    for seed in range(60):
        pixels = to_pixels(picture, 32, "crop+flip", random.Random(seed)).float()
        assert pixels[2].min() > 50  # blue is 60 all over: nothing was padded
        flipped += bool(pixels[0, :, 0].mean() > pixels[0, :, -1].mean())
        plain = to_pixels(picture, 32, "crop", random.Random(seed)).float()
        assert plain[0, :, 0].mean() < plain[0, :, -1].mean()
    assert 15 < flipped < 45


def test_unknown_augmentation_is_an_error():
    with pytest.raises(UserError, match="crop\\+flip"):
        to_pixels(gradient(8, 8), 8, "flip", random.Random(0))


def test_contact_sheet(tmp_path):
    """Square, wide and high pictures: all fit into the cell, none is stretched."""
    path, paper = tmp_path / "sheet.png", (250, 249, 246)
    pictures = [Image.new("RGB", size, "red") for size in ((50, 50), (100, 50), (20, 80), (1, 3000), (3, 3))]
    sheets.contact_sheet(path, pictures, [["a", "b"]] * 5, columns=4, side=40)
    sheet = Image.open(path)
    assert sheet.width == 4 * 68 + 28
    for column, (width, height) in enumerate(((40, 40), (40, 20), (10, 40))):
        x, y = 28 + 68 * column, 28
        assert sheet.getpixel((x + width // 2, y + height - 2)) == (255, 0, 0)
        assert sheet.getpixel((x + width // 2, y + height + 2)) == paper
        assert sheet.getpixel((x + width + 2, y + height // 2)) == paper


def test_scene_is_drawn_at_the_size_asked_for():
    import scenes

    assert load_image(scenes.Scenes("tiny", "train", 1)[0], 48).size == (48, 48)


# Words


@pytest.mark.parametrize("raw, clean", [("A Dog\n runs .", "a dog runs"), ("  Two\tcats. ", "two cats"),
                                        ("At 3.5 miles", "at 3.5 miles"), ("What?", "what?"), (".", "")])  # fmt: skip
def test_clean_caption(raw, clean):
    assert language.clean_caption(raw) == clean


HARD_TEXTS = ["a dog 🐕‍🦺 runs", "كلب يجري على الشاطئ", "כלב רץ", "汉字", "naïve café", "tabs\tand\nlines",
              "<|endoftext|>", "a <|endoftext|> b", "\u200f\u202eabc"]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids)
    assert tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_any_text_survives_the_round_trip(text):
    tokenizer = test_any_text_survives_the_round_trip.tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text.strip()


test_any_text_survives_the_round_trip.tokenizer = Tokenizer.train(WORDS * 3, 300)


def test_trained_vocabulary_is_like_gpt2s(tokenizer):
    assert tokenizer.bos == tokenizer.eos == tokenizer.pad
    assert tokenizer.backend.id_to_token(tokenizer.eos) == "<|endoftext|>"
    assert 257 < tokenizer.vocab_size <= 400
    assert tokenizer.encode("a dog") != tokenizer.encode(" a dog")  # no blank is put before the first word
    assert len(tokenizer.encode("a black dog")) < len("a black dog")  # it did learn
    assert tokenizer.encode("two black cats sit", max_len=3) == tokenizer.encode("two black cats sit")[:3]
    assert Tokenizer.train(WORDS * 50, 10_000).vocab_size < 10_000
    with pytest.raises(UserError, match="257"):
        Tokenizer.train(WORDS, 200)
    with pytest.raises(UserError, match="'bpe', 'roberta' or 'wordpiece'"):
        Tokenizer.train(WORDS, 300, kind="words")


def test_trained_vocabulary_is_like_robertas(tokenizer, tmp_path):
    roberta = Tokenizer.train([*WORDS * 3, *["<mask> </s>"] * 9], 400, "roberta")
    assert [roberta.backend.id_to_token(i) for i in range(5)] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (roberta.bos, roberta.pad, roberta.eos, roberta.mask) == (0, 1, 2, 4)
    for text in (*HARD_TEXTS, "a <mask> dog</s>", "<s><pad><unk>"):  # however often captions say it, it stays text
        ids = roberta.encode(text)
        assert min(ids) > 4 and roberta.decode(ids) == text
    pieces, gpt2 = ([t.backend.id_to_token(i) for i in t.encode("two black cats")] for t in (
        Tokenizer.train(WORDS * 3, 404, "roberta"), tokenizer))  # fmt: skip
    assert pieces == gpt2 and len(pieces) < len("two black cats")  # its five special tokens are all that differs
    assert roberta.decode([0, *roberta.encode("a dog"), 4, 2, *roberta.encode("a cat")]) == "a dog"
    least = Tokenizer.train(WORDS * 3, 261, "roberta")
    assert least.vocab_size == 261 and least.decode(least.encode("汉字")) == "汉字"
    with pytest.raises(UserError, match="260 is too small.*<s>, <pad>, </s>, <unk>, <mask> need 261"):
        Tokenizer.train(WORDS, 260, "roberta")
    roberta.save(tmp_path)
    for copy in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(roberta))):
        assert (copy.bos, copy.pad, copy.eos, copy.mask) == (0, 1, 2, 4)
        assert copy.encode("a <mask> dog") == roberta.encode("a <mask> dog")


def test_roberta_folders(tmp_path):
    """transformers' own, its tokenizer.json alone, the two files alone and beside config.json. The special tokens lie
    where RoBERTa has them, and as in RoBERTa's, GPT-2's <|endoftext|> is one more piece."""
    from transformers import RobertaTokenizerFast

    trained = Tokenizer.train(WORDS * 3, 400, "roberta")
    model = json.loads(trained.backend.to_str())["model"]
    vocab = {token: i - (i > 4) for token, i in model["vocab"].items() if token != "<mask>"}
    vocab |= {"<|endoftext|>": len(vocab), "<mask>": len(vocab) + 1}
    theirs = RobertaTokenizerFast(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]])
    theirs.save_pretrained(tmp_path / "whole")
    for name in ("json", "bare", "configured"):
        (tmp_path / name).mkdir()
    (tmp_path / "json" / "tokenizer.json").write_bytes((tmp_path / "whole" / "tokenizer.json").read_bytes())
    for name in ("bare", "configured"):
        (tmp_path / name / "vocab.json").write_text(json.dumps(vocab))
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (tmp_path / name / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (tmp_path / "configured" / "config.json").write_text('{"model_type": "roberta"}')
    for name in ("whole", "json", "bare", "configured"):
        found = Tokenizer.from_pretrained(tmp_path / name)
        assert (found.bos, found.pad, found.eos, found.mask) == (0, 1, 2, len(vocab) - 1), name
        assert found.vocab_size == len(vocab), name
        for text in (*WORDS, "a 🐕‍🦺 runs", "naïve  café"):
            assert found.encode(text) == theirs.encode(text, add_special_tokens=False), (name, text)
        assert found.decode(found.encode("a <mask> dog</s> <|endoftext|>")) == "a <mask> dog</s> <|endoftext|>", name
        assert max(found.encode("a <mask> dog</s>")) < len(vocab) - 2, name


@pytest.mark.parametrize("kind", ["bpe", "roberta", "wordpiece"])
def test_training_is_the_same_in_every_process(kind):
    code = (f"import hashlib, language; t = language.Tokenizer.train({WORDS!r} * 20, 320, {kind!r});"
            "print(hashlib.sha256(t.backend.to_str().encode()).hexdigest())")  # fmt: skip
    run = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "RAYON_NUM_THREADS": n, "PYTHONHASHSEED": n}).stdout for n in ("1", "3")]
    assert run[0] == run[1]


def test_decode_stops_at_the_first_eos(tokenizer):
    dog, cat = tokenizer.encode("a dog"), tokenizer.encode("a cat")
    assert tokenizer.decode([*dog, tokenizer.eos, *cat]) == "a dog"
    assert tokenizer.decode(torch.tensor([*tokenizer.encode("  a dog "), tokenizer.eos])) == "a dog"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.eos, *dog]) == ""


def test_word_pieces(tmp_path):
    """BERT's form. Captions of scenes come back whole, others as captions are written, as far as that can be known."""
    texts = [language.clean_caption(text) for item in corpora.load("scenes", n_train=200).splits["train"]
             for text in item.captions]  # fmt: skip
    words = Tokenizer.train(texts, 1000, "wordpiece")
    assert [words.backend.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (words.pad, words.bos, words.eos, words.mask) == (0, 2, 3, 4)
    assert all(words.decode(words.encode(text)) == text for text in texts)
    assert len(words.encode(texts[0])) == len(texts[0].split())  # it did learn
    with pytest.raises(UserError, match="too small.* need 5[0-9]") as caught:
        Tokenizer.train(texts, 30, "wordpiece")
    least = int(str(caught.value).split()[-1])
    letters = Tokenizer.train(texts, least, "wordpiece")
    assert letters.vocab_size == least and letters.decode(letters.encode(texts[0])) == texts[0]
    spoken = "it's a dog, isn't it? they'll see 3.5 t-shirts at 10:30, 2 of a man's"
    written = Tokenizer.train([spoken, "[[SEP] <é> # mask"], 300, "wordpiece")
    assert written.decode(written.encode(spoken.title())) == spoken
    ids = written.encode("a [SEP] [MASK] é ∞")
    assert not {0, 2, 3, 4} & set(ids) and ids[-1] == 1 and written.decode(ids) == "a [ sep ] [ mask ] e"
    written.save(tmp_path)
    for copy in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(written))):
        assert (copy.bos, copy.eos, copy.pad, copy.mask) == (2, 3, 0, 4)
        assert copy.encode("a [SEP] [MASK] é ∞") == ids and copy.decode(copy.encode(spoken)) == spoken


def test_save_load_and_pickle_keep_everything(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    copies = [Tokenizer.load(tmp_path / "t"), Tokenizer.from_pretrained(tmp_path / "t"),
              pickle.loads(pickle.dumps(tokenizer))]
    for copy in copies:
        assert (copy.bos, copy.eos, copy.pad, copy.vocab_size) == (
            tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size)  # fmt: skip
        assert [copy.encode(text) for text in HARD_TEXTS] == [tokenizer.encode(text) for text in HARD_TEXTS]
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "t" / "tokenizer_meta.json").write_text('{"bos": 7, "eos": 8, "pad": 9}')  # of an older run
    old = Tokenizer.load(tmp_path / "t")
    assert (old.bos, old.eos, old.pad, old.mask) == (7, 8, 9, tokenizer.mask) == (7, 8, 9, None)


def test_gpt2_and_bert_folders(tokenizer, tmp_path):
    model = json.loads(tokenizer.backend.to_str())["model"]
    for name, extra in (("bare", {}), ("configured", {"config.json": '{"model_type": "gpt2"}'})):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
        for file, text in extra.items():
            (folder / file).write_text(text)
        found = Tokenizer.from_pretrained(folder)
        assert found.bos == found.eos == found.pad == tokenizer.eos and found.vocab_size == tokenizer.vocab_size, name
        assert all(found.encode(text) == tokenizer.encode(text) for text in HARD_TEXTS), name
        assert found.decode(found.encode("two black cats")) == "two black cats", name
    alone = tmp_path / "alone"  # nothing but tokenizer.json
    alone.mkdir()
    tokenizer.backend.save(str(alone / "tokenizer.json"))
    found = Tokenizer.from_pretrained(alone)
    assert found.bos == found.eos == found.pad == tokenizer.eos and found.encode(WORDS[1]) == tokenizer.encode(WORDS[1])
    other = tmp_path / "other"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps({"<s>": 0, "a": 1}))
    (other / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="config.json"):  # without it nobody knows which tokens are special
        Tokenizer.from_pretrained(other)
    bert = tmp_path / "bert"
    bert.mkdir()
    tokens = [*language.BERT_TOKENS, "a", "dog", "##s", "cat", "'", "s", "[", "]", "sep", ","]
    (bert / "vocab.txt").write_text("\n".join(tokens) + "\n")
    bare = Tokenizer.from_pretrained(bert)  # as Google handed it out
    (bert / "config.json").write_text('{"model_type": "bert"}')
    configured = Tokenizer.from_pretrained(bert)
    for file in bert.iterdir():
        file.unlink()
    configured.backend.save(str(bert / "tokenizer.json"))
    for found in (bare, configured, Tokenizer.from_pretrained(bert)):
        assert (found.bos, found.eos, found.pad, found.mask, found.vocab_size) == (2, 3, 0, 4, len(tokens))
        assert found.encode("Á dogs") == [5, 6, 7] and found.encode("[SEP]") == [11, 13, 12]
        assert found.decode([2, 5, 6, 7, 3, 8, 0]) == "a dogs"
        assert found.decode(found.encode("a dog's, a cat")) == "a dog's, a cat"
    (bert / "tokenizer.json").unlink()
    for wrong, message in ((tokens[:4], r"no \[MASK\]"), ([*tokens, "dog"], "a line twice")):
        (bert / "vocab.txt").write_text("\n".join(wrong))
        with pytest.raises(UserError, match=f"vocab.txt has {message}"):
            Tokenizer.from_pretrained(bert)


def test_tokenizer_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/has-this-model", tmp_path):
        with pytest.raises(UserError, match="(?s)directory.*`none`"):
            Tokenizer.from_pretrained(name)


# Samples and batches


def test_captions_are_drawn_without_replacement(tokenizer, tmp_path):
    items = make_items(tmp_path, 1) + [Item(1, tmp_path / "0.png", ("a dog", "the sea"))]
    pictures = Pictures(items, tokenizer, 16, captions=5, max_len=4, train=True)
    known = {tuple(tokenizer.encode(text, 4)) for text in WORDS}
    drawn = [[tuple(ids) for ids in pictures[epoch, 0]["ids"]] for epoch in range(20)]
    assert all(len(set(row)) == 5 and set(row) <= known for row in drawn)
    assert len(set(map(tuple, drawn))) > 10  # another choice in another epoch
    for epoch in range(10):  # fewer captions than asked for: each twice before one comes a third time
        assert sorted(Counter(map(tuple, pictures[epoch, 1]["ids"])).values()) == [2, 3]


def test_captions_are_cleaned_before_they_are_encoded(tokenizer, tmp_path):
    items = [Item(0, make_items(tmp_path, 1)[0].image, ("A DOG\n runs .",))]
    assert Pictures(items, tokenizer, 16, captions=1, train=True)[0, 0]["ids"] == [tokenizer.encode("a dog runs")]


def test_a_sample_follows_from_seed_epoch_and_index(tokenizer, tmp_path):
    items = make_items(tmp_path, 2)

    def sample(key, seed=0):
        torch.manual_seed(random.randrange(10**9))
        return Pictures(items, tokenizer, 16, captions=2, train=True, augment="crop+flip", seed=seed)[key]

    def same(a, b):
        return a["ids"] == b["ids"] and torch.equal(a["pixels"], b["pixels"])

    assert same(sample((3, 1)), sample((3, 1)))
    for other in (sample((4, 1)), sample((3, 1), seed=1)):
        assert not same(sample((3, 1)), other)


@pytest.mark.parametrize("caption, mirrors", [
    ("a dog on the LEFT", False), ("the rightmost cat", False), ("a left-hand glove", False), ("bright, upright", True),
])  # fmt: skip
def test_samples_that_say_left_or_right_are_never_mirrored(tokenizer, tmp_path, caption, mirrors):
    image = make_items(tmp_path, 1)[0].image
    pictures = Pictures([Item(0, image, ("a dog", caption))], tokenizer, 16, captions=1, train=True,
                        augment="crop+flip")  # fmt: skip
    red = [pictures[epoch, 0]["pixels"][0].float() for epoch in range(40)]
    assert any(row[:, 0].mean() > row[:, -1].mean() for row in red) == mirrors
    assert len({row.sum().item() for row in red}) > 10  # cropped all the same


@pytest.mark.parametrize("text, swapped", [
    ("the LEFT dog", "the RIGHT dog"), ("Rightmost, left-hand", "Leftmost, right-hand"),
    ("left of the right one", "right of the left one"), ("bright, upright, cleft", "bright, upright, cleft"),
])  # fmt: skip
def test_left_and_right_change_places(text, swapped):
    assert language.swap_sides(text) == swapped and language.swap_sides(swapped) == text


def test_evaluation_samples_are_as_written(tokenizer, tmp_path):
    items = [Item("x", make_items(tmp_path, 1)[0].image, ("A Dog.", "B"))]
    pictures = Pictures(items, tokenizer, 16, captions=0, augment="crop+flip")
    assert pictures[0]["captions"] == ("A Dog.", "B") and pictures[0]["image_id"] == "x"
    assert torch.equal(pictures[0]["pixels"], to_pixels(load_image(items[0].image, 16), 16))


@pytest.mark.parametrize("b, e, p", [(1, 2, 0), (9, 9, 9)])  # as BERT's and as GPT-2's
def test_collate_by_hand(b, e, p):
    def sample(i, *ids):
        return {"image_id": i, "pixels": torch.full((3, 2, 2), i, dtype=torch.uint8), "ids": [list(row) for row in ids]}

    samples = [sample(7, (11, 12), (13,)), {"image_id": 5, "bad": "5.jpg: gone"}, sample(9, (), (14, 15, 16))]
    batch = data.collate(samples, bos=b, eos=e, pad=p)
    assert batch["image_id"] == [7, 9] and batch["bad"] == ["5.jpg: gone"]
    assert batch["pixels"].dtype == torch.uint8 and batch["pixels"][:, 0, 0, 0].tolist() == [7, 9]
    assert batch["ids"].dtype == batch["targets"].dtype == torch.int64 and batch["keep_mask"].dtype == torch.bool
    assert batch["ids"].tolist() == [[b, 11, 12, p], [b, 13, p, p], [b, p, p, p], [b, 14, 15, 16]]
    assert batch["targets"].tolist() == [[11, 12, e, -100], [13, e, -100, -100], [e, -100, -100, -100], [14, 15, 16, e]]
    assert batch["keep_mask"].long().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


# Order and loaders


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), world=st.integers(1, 3), extra=st.integers(0, 20), seed=st.integers(-5, 5))
def test_every_item_once_per_epoch_at_any_number_of_processes(n, world, extra, seed):
    batch = world + extra
    steps = -(-3 * n // batch)
    shares = [list(TrainBatches(n, batch, rank, world, seed, steps=steps)) for rank in range(world)]
    whole = list(TrainBatches(n, batch, seed=seed, steps=steps))
    for step, keys in enumerate(whole):
        parts = [share[step] for share in shares]
        assert [keys[rank::world] for rank in range(world)] == parts
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    stream = [key for keys in whole for key in keys]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == [(epoch, i) for i in range(n)]
    start = steps // 2
    assert list(TrainBatches(n, batch, seed=seed, start_step=start, steps=steps)) == whole[start:]


def test_order_changes_with_epoch_and_seed_and_may_be_endless():
    def order(seed):
        return [[i for _, i in keys] for keys in islice(TrainBatches(50, 50, seed=seed), 2)]

    first, second = order(0)
    assert first != second and order(1)[0] != first and order(0)[0] == first
    assert len(TrainBatches(50, 8, start_step=3, steps=10)) == 7
    with pytest.raises(TypeError):
        len(TrainBatches(50, 8))
    with pytest.raises(UserError, match="--batch"):
        TrainBatches(50, 2, world=3)
    with pytest.raises(UserError, match="empty"):
        TrainBatches(0, 2)


def same_batches(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k] for k in x)
        for x, y in zip(a, b, strict=True)
    )


def test_workers_and_resuming_change_nothing(tokenizer, tmp_path):
    items = make_items(tmp_path, 7)

    def batches(workers=0, start=0, train=True):
        pictures = Pictures(items, tokenizer, 16, captions=2, train=train, augment="crop+flip", seed=3)
        if not train:
            return list(data.eval_loader(pictures, 3, workers))
        return list(data.train_loader(pictures, 4, workers, seed=3, start_step=start, steps=6))

    alone, state = batches(), torch.get_rng_state()
    assert [len(batch["image_id"]) for batch in alone] == [4] * 6 and alone[0]["ids"].shape[0] == 8
    assert alone[0]["ids"][0, 0] == tokenizer.bos
    assert same_batches(alone, batches(workers=2))
    assert same_batches(alone[4:], batches(start=4))
    assert same_batches(batches(train=False), batches(workers=2, train=False))
    assert torch.equal(state, torch.get_rng_state())  # loading leaves the training's own generator alone


def test_datasets_and_collate_can_be_sent_to_spawned_workers(tokenizer, tmp_path):
    loader = data.train_loader(Pictures(make_items(tmp_path, 2), tokenizer, 16, train=True), 2, workers=1).batches
    for part in (loader.dataset, loader.collate_fn, loader.worker_init_fn):
        pickle.loads(pickle.dumps(part))
    assert pickle.loads(pickle.dumps(loader.collate_fn)).keywords["eos"] == tokenizer.eos


def test_a_spawned_worker_gives_the_same_batches(tokenizer, tmp_path):
    """macOS and Windows start workers afresh: all that they need must be sent to them."""
    pictures = Pictures(make_items(tmp_path, 3), tokenizer, 16, captions=2, train=True, augment="crop+flip")
    loader = data.train_loader(pictures, 2, workers=1, steps=2)
    loader.batches.multiprocessing_context = "spawn"
    assert same_batches(list(data.train_loader(pictures, 2, steps=2)), list(loader))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send")
def test_workers_leave_signals_to_the_main_process(tokenizer, tmp_path):
    """Ctrl-C and one SIGTERM change nothing about the batches; a second SIGTERM ends a worker."""
    pictures = Pictures(make_items(tmp_path, 4), tokenizer, 16, captions=1, train=True)
    loader = data.train_loader(pictures, 2, workers=1, steps=30)
    batches = iter(loader)
    got = [next(batches)]
    (worker,) = loader.batches._iterator._workers
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
        got += [next(batches) for _ in range(8)]
    assert worker.is_alive() and same_batches(got, list(data.train_loader(pictures, 2, steps=17)))
    with pytest.raises((RuntimeError, OSError, EOFError)):  # torch's own message, or what is left of the connection
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(10)
        list(batches)
    worker.kill()  # or a failure here would also be a hang
    assert worker.exitcode == -signal.SIGTERM


def test_a_run_that_fails_does_not_wait_for_its_workers(tmp_path):
    """multiprocessing ends its children by one SIGTERM, and workers outlive one."""
    gradient(9, 9).save(tmp_path / "a.png")
    code = f"""if True:
        import common, data
        pictures = data.Pictures([data.Item(0, {str(tmp_path / "a.png")!r}, ("x",))] * 9, None, 16)
        batches = iter(data.eval_loader(pictures, 1, workers=1))
        def main():
            next(batches)
            raise common.UserError("over")
        common.run_main(main)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr == "error: over\n"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_is_exact(tokenizer, tmp_path, world):
    pictures = Pictures(make_items(tmp_path, 7), None, 16)
    seen = [[i for batch in data.eval_loader(pictures, 2, 0, rank, world) for i in batch["image_id"]]
            for rank in range(world)]  # fmt: skip
    assert seen == [list(range(rank, 7, world)) for rank in range(world)]
    assert [list(data.eval_indices(7, rank, world)) for rank in range(world)] == seen


def spoil(items, bad):
    for i in bad:
        Path(items[i].image).write_bytes(b"")


def judged(loader):
    """What a training loop on one process does."""
    for batch in loader:
        loader.judge(batch["bad"])
        yield batch


def test_training_skips_and_names_the_first_three(tokenizer, tmp_path, capsys):
    items = make_items(tmp_path, 12)
    spoil(items, range(5))
    loader = data.train_loader(Pictures(items, tokenizer, 16, captions=2, train=True), 6, steps=8)
    seen = Counter(i for batch in judged(loader) for i in batch["image_id"])
    assert seen == {i: 4 for i in range(5, 12)}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all("empty" in line for line in said)
    assert len(loader.bad) == 5  # in each of four epochs, and yet five files
    loader = data.train_loader(Pictures(items[3:], tokenizer, 16, captions=2, train=True), 9, steps=4)
    assert len(list(judged(loader))) == 4 and len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("n, n_bad, stops", [(60, 10, False), (60, 11, True), (1200, 12, False), (1200, 13, True)])
def test_training_stops_beyond_ten_files_and_one_percent(n, n_bad, stops):
    loader = data.Loader([{"image_id": list(range(n - n_bad)), "bad": [f"{i}.jpg: gone" for i in range(n_bad)]}] * 3,
                         n, train=True)  # fmt: skip
    if stops:
        with pytest.raises(UserError, match=f"11 of|{n_bad} of"):
            list(judged(loader))
    else:
        assert len(list(judged(loader))) == 3


def test_files_that_break_late_are_measured_against_all_files():
    good, late = {"image_id": [0] * 1000, "bad": []}, {"image_id": [0] * 989, "bad": [f"{i}: gone" for i in range(11)]}
    with pytest.raises(UserError, match="11 of the first 1000"):
        list(judged(data.Loader([good, good, good, late], 1000, train=True)))


def test_processes_judge_together(capsys):
    """Six bad files on each of two processes are twelve: both stop, the first alone speaks."""
    shares = [{"image_id": [0] * 100, "bad": [f"{rank}{i}: gone" for i in range(6)]} for rank in (0, 1)]
    for rank in (0, 1):
        loader = data.Loader([shares[rank]], 5000, train=True, rank=rank, world=2)
        next(iter(loader))
        with pytest.raises(UserError, match="11 of the first 212"):
            loader.judge(shares[0]["bad"] + shares[1]["bad"])
        assert len(capsys.readouterr().err.splitlines()) == (3 if rank == 0 else 0)


def test_a_process_always_has_a_picture(tokenizer, tmp_path):
    items = make_items(tmp_path, 6)
    spoil(items, [1, 2])
    pictures = Pictures(items, tokenizer, 16, captions=1, train=True)
    for workers in (0, 2):
        loader = data.train_loader(pictures, 1, workers, steps=12)
        seen = [batch["image_id"] for batch in judged(loader)]
        assert all(len(ids) == 1 for ids in seen)
        assert Counter(i for ids in seen for i in ids) == {0: 2, 3: 6, 4: 2, 5: 2}  # 3 steps in for 1 and for 2
        assert len(loader.bad) == 2
    spoil(items, range(6))
    with pytest.raises(UserError, match="none of these pictures"):
        list(data.train_loader(pictures, 3, steps=4))


def test_evaluation_stops_at_a_bad_picture_and_names_it(tokenizer, tmp_path):
    items = make_items(tmp_path, 6)
    spoil(items, [4])
    with pytest.raises(UserError, match=r"4\.png: the file is empty"):
        list(data.eval_loader(Pictures(items, tokenizer, 16), 2))


def test_training_needs_captions(tokenizer, tmp_path):
    with pytest.raises(UserError, match="image 3 has no caption"):
        Pictures([Item(3, make_items(tmp_path, 1)[0].image, ())], tokenizer, 16, train=True)[0, 0]


# Own data


def own_folder(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        gradient(12, 10).save(folder / name)
    return folder


def as_dict(corpus):
    return {item.image_id: (split, item.captions) for split, items in corpus.splits.items() for item in items}


def test_the_three_forms_say_the_same(tmp_path):
    own_folder(tmp_path, ["a.jpg", "sub/b c.jpg"])
    (tmp_path / "x.jsonl").write_text(
        '\ufeff{"image": "a.jpg", "caption": "A dog, wet."}\r\n'
        '{"image": "./sub/b c.jpg", "captions": ["\u2028Schön", "B"]}\r\n'
        '\r\n{"image": "a.jpg", "caption": " it says \\"hi\\" "}\r\n', "utf-8", newline="")  # fmt: skip
    (tmp_path / "x.csv").write_text(
        '\ufeffImage,Caption\r\na.jpg,"A dog, wet."\r\n'
        'sub/b c.jpg,Schön\r\nsub/b c.jpg,B\r\na.jpg,"it says ""hi"""\r\n',
        "utf-8", newline="")  # fmt: skip
    texts = ['image,caption\r\na.jpg,"A dog, wet."\r\nsub/b c.jpg,Schön\r\nsub/b c.jpg,B\r\na.jpg,it says "hi"\r\n',
             'a.jpg\tA dog, wet.\r\nsub/b c.jpg\tSchön\r\nsub/b c.jpg\tB\r\n\r\na.jpg\tit says "hi"',
             'a.jpg#0\tA dog, wet.\nsub/b c.jpg#0\tSchön\nsub/b c.jpg#12\tB\na.jpg#1\tit says "hi"\n']  # fmt: skip
    expected = {"a.jpg": ("train", ("A dog, wet.", 'it says "hi"')), "sub/b c.jpg": ("train", ("Schön", "B"))}
    for name in ("x.jsonl", "x.csv"):
        corpus = load_own(tmp_path / name)
        assert corpus.name == "x" and as_dict(corpus) == expected, name
        assert any("fewer than 20" in note for note in corpus.notes)
        assert any("`best` is `last`" in note for note in corpus.notes)
        assert all(load_image(item.image, 0).size == (12, 10) for item in corpus.splits["train"])
    for text in texts:
        (tmp_path / "captions.txt").write_text("\ufeff" + text, "utf-8", newline="")
        corpus = load_own(tmp_path)
        assert as_dict(corpus) == expected and corpus.name == tmp_path.name, text


def test_split_names(tmp_path):
    names = {"train": "train", "Valid": "val", "dev": "val", "val": "val", "TEST": "test", "validation": "val"}
    own_folder(tmp_path, [f"{i}.jpg" for i in range(len(names))])
    rows = [{"image": f"{i}.jpg", "caption": "x", "split": split} for i, split in enumerate(names)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "x.csv").write_text(
        "image,caption,split\n" + "\n".join(f"{row['image']},x, {row['split']}" for row in rows))  # fmt: skip
    for form in ("x.jsonl", "x.csv"):
        corpus = load_own(tmp_path / form)
        assert [as_dict(corpus)[f"{i}.jpg"][0] for i in range(len(names))] == list(names.values())
        assert not corpus.notes


def test_splits_by_hash_are_stable_and_about_90_5_5(tmp_path):
    for i in range(2000):
        (tmp_path / f"{i}.jpg").touch()

    def splits(names):
        lines = [json.dumps({"image": name, "caption": "x"}) for name in names]
        (tmp_path / "x.jsonl").write_text("\n".join(lines))
        return {name: split for name, (split, _) in as_dict(load_own(tmp_path / "x.jsonl")).items()}

    many = splits([f"{i}.jpg" for i in range(2000)])
    counts = Counter(many.values())
    assert 1740 < counts["train"] < 1860 and 60 < counts["val"] < 140 and 60 < counts["test"] < 140
    few = splits([f"{i}.jpg" for i in reversed(range(0, 2000, 9))])
    assert all(many[name] == split for name, split in few.items())
    assert [many[f"{i}.jpg"] for i in (0, 2, 5, 39)] == ["train", "test", "val", "test"]  # on every machine, for good
    assert set(splits([f"{i}.jpg" for i in range(19)]).values()) == {"train"}
    assert set(splits([f"{i}.jpg" for i in range(20)]).values()) != {"train"}


def test_missing_images_are_named(tmp_path):
    own_folder(tmp_path, ["a.jpg"])
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,x\n" + "".join(f"no{i}.jpg,x\n" for i in range(5)))
    notes = " ".join(load_own(tmp_path / "x.csv").notes)
    assert "5 of 6" in notes and "no0.jpg, no1.jpg, no2.jpg, ..." in notes and "no3" not in notes
    assert list(as_dict(load_own(tmp_path / "x.csv"))) == ["a.jpg"], "what is not there is left out"
    (tmp_path / "y.csv").write_text("image,caption,split\na.jpg,x,train\nno1.jpg,x,test\nno2.jpg,x,val\n")
    with pytest.raises(UserError, match=r"no1.jpg of split test is missing \(2 such\).*take its line out"):
        load_own(tmp_path / "y.csv")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match="none of its images"):
        load_own(tmp_path / "x.csv")


BAD_OWN = {
    "empty caption": ("x.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image": "a.jpg", "caption": " "}', ":2.*empty"),
    "number as caption": ("x.jsonl", '{"image": "a.jpg", "caption": 5}', ":1.*5"),
    "null caption": ("x.jsonl", '{"image": "a.jpg", "caption": null}', ":1"),
    "no captions": ("x.jsonl", '{"image": "a.jpg", "captions": []}', ":1.*captions"),
    "text as captions": ("x.jsonl", '{"image": "a.jpg", "captions": "x"}', ":1.*captions"),
    "empty among captions": ("x.jsonl", '{"image": "a.jpg", "captions": ["x", ""]}', ":1.*empty"),
    "half a character": ("x.jsonl", '{"image": "a.jpg", "caption": "\\ud83d"}', ":1.*Unicode"),
    "not json": ("x.jsonl", '{"image": "a.jpg", "caption": "x"}\n\n{"image": ', ":3.*JSON"),
    "a list": ("x.jsonl", "[1]", ":1"),
    "no image": ("x.jsonl", '{"caption": "x"}', ":1.*image"),
    "image is a number": ("x.jsonl", '{"image": 3, "caption": "x"}', ":1.*3"),
    "half a character in a name": ("x.jsonl", '{"image": "\\ud83d.jpg", "caption": "x"}', ":1"),
    "image name empty": ("x.jsonl", '{"image": "", "caption": "x"}', ":1"),
    "image is the folder": ("x.jsonl", '{"image": ".", "caption": "x"}', ":1"),
    "outside": ("x.jsonl", '{"image": "b/../../a.jpg", "caption": "x"}', ":1.*below"),
    "absolute": ("x.csv", "image,caption\n/etc/a.jpg,x", ":2.*below"),
    "unknown split": ("x.jsonl", '{"image": "a.jpg", "caption": "x", "split": "dve"}', ":1.*dve"),
    "split is a number": ("x.jsonl", '{"image": "a.jpg", "caption": "x", "split": 1}', ":1"),
    "two splits": ("x.csv", "image,caption,split\na.jpg,x,train\na.jpg,y,test", ":3.*train.*test"),
    "some splits": ("x.csv", "image,caption,split\na.jpg,x,train\nb.jpg,y,", "b.jpg has no split"),
    "no header": ("x.csv", "a.jpg,x\nb.jpg,y", ":1.*header"),
    "nothing in the csv": ("x.csv", "", ":1.*header"),
    "loose comma": ("x.csv", "image,caption\na.jpg,x, y", ":2.*quotes"),
    "csv without caption": ("x.csv", "image,caption\na.jpg,x\na.jpg", ":3"),
    "open quote": ("x.csv", 'image,caption\na.jpg,"x\nb.jpg,y\n', "quote"),
    "header alone": ("x.csv", "image,caption\n", "no image"),
    "empty file": ("x.jsonl", "\n", "no image"),
    "no separator": ("captions.txt", "a.jpg\tx\na.jpg x", ":2.*file,caption"),
    "empty in captions.txt": ("captions.txt", "a.jpg\t", ":1.*empty"),
}


@pytest.mark.parametrize("case", BAD_OWN)
def test_mistakes_in_own_data_are_named_with_their_line(tmp_path, case):
    name, text, pattern = BAD_OWN[case]
    own_folder(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}.*{pattern}"):
        load_own(tmp_path if name == "captions.txt" else tmp_path / name)


def test_own_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"image": "a.jpg", "caption": "schön"}'.encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        load_own(tmp_path / "latin.jsonl")
    with pytest.raises(UserError, match="No such file"):
        load_own(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="jsonl"):
        load_own(tmp_path / "x.parquet")


def test_importing_is_light():
    heavy = ("transformers", "torchvision", "tokenizers")
    code = f"import sys, data, corpora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What the steps of several papers take from a batch


def test_captions_are_whole_again():
    batch = data.pad_captions([[5, 6], [7]], 1, 2, 0)
    ids, keep = data.whole_captions(batch, 9)
    assert ids.tolist() == [[1, 5, 6, 2], [1, 7, 2, 9]] and keep.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_masked_words_by_share():
    """80 % are hidden, 10 % are any token, 10 % stay; nothing else changes, and one seed gives one corruption."""
    ids = torch.full((400, 100), 50)
    ids[:, 0] = 1
    found, labels = data.mask_words(ids, ids == 50, 3, 200, 0.2, torch.Generator().manual_seed(0))
    again, _ = data.mask_words(ids, ids == 50, 3, 200, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)
    is_selected = labels != -100
    assert is_selected[:, 1:].float().mean() == pytest.approx(0.2, abs=0.01) and not is_selected[:, 0].any()
    assert (labels[is_selected] == 50).all() and torch.equal(found[~is_selected], ids[~is_selected])
    shown = found[is_selected]
    assert (shown == 3).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == 50).float().mean() == pytest.approx(0.1, abs=0.02)
    others = shown[(shown != 3) & (shown != 50)]
    assert others.min() == 0 and others.max() == 199 and len(others.unique()) > 150


def test_pieces_of_a_step():
    """Never less than a picture with all its texts, and nothing twice."""
    rows = {"features": torch.arange(5), "ids": torch.arange(15), "targets": torch.arange(15)}
    for pairs, pictures in ((0, [5]), (1, [1] * 5), (3, [1] * 5), (6, [2, 2, 1]), (8, [2, 2, 1]), (99, [5])):
        pieces = data.pieces_of(rows, pairs)
        assert [len(piece["features"]) for piece in pieces] == pictures
        assert [len(piece["ids"]) for piece in pieces] == [3 * n for n in pictures]
        for name, x in rows.items():
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), x)


def test_the_same_picture_has_the_same_number():
    assert data.picture_numbers({"image_id": ["a", 7, "a", "b"]}, 2).tolist() == [0, 0, 1, 1, 0, 0, 2, 2]


def test_rows_go_where_the_model_is():
    rows = data.to_device(torch.nn.Linear(1, 1, device="meta"), {"x": torch.zeros(2)})
    assert rows["x"].device.type == "meta"


def test_skipped_pictures_are_told_at_the_end(capsys):
    loaders = [data.Loader(None, 9, True, rank) for rank in (0, 0)]
    data.tell_of_bad(loaders)
    assert not capsys.readouterr().out
    loaders[0].bad, loaders[1].bad = {"a", "b"}, {"c"}
    data.tell_of_bad(loaders)
    assert capsys.readouterr().out == "3 training pictures could not be read and were skipped\n"
    loaders[0].rank = 1
    data.tell_of_bad(loaders)
    assert not capsys.readouterr().out


def test_tasks_and_data_that_do_not_meet():
    for task, name in (("vqa", "scenes"), ("vqa", "vqa"), ("nlvr2", "nlvr1"), ("ve", "snli_ve"), ("vcr", "vcr"),
                       ("pretrain", "coco"), ("caption", "my.jsonl"), ("pretrain", "scenes")):  # fmt: skip
        corpora.check_task(task, name)
    with pytest.raises(UserError, match="--task vqa needs questions about .*: --data scenes or vqa or vg, not coco"):
        corpora.check_task("vqa", "coco")
    with pytest.raises(UserError, match="--data vcr has questions, no captions, which --task caption trains on"):
        corpora.check_task("caption", "vcr")


def test_rates_that_fall_in_steps():
    cfg = SimpleNamespace(drops="0.5,0.7", drop_factor=0.1, warmup=0.2, steps=10)
    found = [common.schedule(cfg, step) for step in range(10)]
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.01])
    cfg = SimpleNamespace(drops="", warmup=0.2, steps=10)
    assert [common.schedule(cfg, k) for k in range(10)] == [common.linear_schedule(k, 10, 0.2) for k in range(10)]
    assert common.schedule(SimpleNamespace(drops="0.9", drop_factor=0.1, warmup=0.0, steps=10), 0) == 1
    # from 1/3 on, in four steps: 1/3 + 2/3 * (1/4, 2/4, 3/4, 1), and the drop
    cfg = SimpleNamespace(drops="0.8", drop_factor=0.5, warmup=0.4, warmup_from=1 / 3, steps=10)
    found = [common.schedule(cfg, step) for step in range(10)]
    assert found == pytest.approx([1 / 2, 2 / 3, 5 / 6, 1, 1, 1, 1, 1, 0.5, 0.5])
    cfg.drops = "0.1"  # within the rise
    assert [common.schedule(cfg, step) for step in (0, 1)] == pytest.approx([1 / 2, 1 / 3])


def test_settings_above_their_limit():
    common.check_most(SimpleNamespace(max_len=5), {"max_len": 5})
    with pytest.raises(UserError, match="--max-len 6: give 5 or less"):
        common.check_most(SimpleNamespace(max_len=6), {"max_len": 5})


def test_going_on(tmp_path):
    """Of a checkpoint: its step, the best value, whether val is still to be looked at; later log lines are dropped."""
    net = torch.nn.Linear(1, 1)
    run, optimizer = common.Run(tmp_path), torch.optim.AdamW(net.parameters(), lr=0.5)
    assert run.go_on(None, optimizer) == (0, -1.0, False)
    saved = {**optimizer.state_dict(), "param_groups": [{**optimizer.state_dict()["param_groups"][0], "lr": 0.25}]}
    (tmp_path / "step_2").mkdir()
    torch.save({"optimizer": saved}, tmp_path / "step_2" / "state.pt")
    for step in (1, 2, 3):
        run.log({"step": step})
    for meta, wanted in (({"best": 0.7, "is_due": True}, (2, 0.7, True)), ({"best": 0.7}, (2, 0.7, False))):
        common.write_json(tmp_path / "step_2" / "meta.json", {"step": 2, **meta})
        assert run.go_on(tmp_path / "step_2", optimizer) == wanted
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert [record["step"] for record in common.read_log(tmp_path / "log.jsonl")] == [1, 2]


def test_files_of_weights_are_left_to_the_model(tmp_path):
    (tmp_path / "official.pth").write_bytes(b"x")
    given = {"init": str(tmp_path / "official.pth")}
    cfg, checkpoint = common.configure(common.RunConfig, given, "x", {"tiny": {}}, {}, [], takes_files=True)
    assert checkpoint is None and cfg.init == given["init"]
    with pytest.raises(UserError, match="is not a run directory"):
        common.configure(common.RunConfig, given, "x", {"tiny": {}}, {}, [])
    with pytest.raises(UserError, match="is not a run directory"):
        common.configure(common.RunConfig, {"init": str(tmp_path)}, "x", {"tiny": {}}, {}, [], takes_files=True)
