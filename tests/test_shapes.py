"""Pictures of any shape: their sides, how they become one batch, which are wide, batches of one kind."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import language
import scenes
from data import Example, Item, TrainBatches, are_wide, collate, pad_pixels, within


@pytest.fixture(scope="module")
def tokenizer():
    return language.Tokenizer.train(["a dog runs", "two cats sit"] * 3, 300)


def grey_row(*values, height=1):
    """A picture whose rows all hold these grey values."""
    row = np.array(values, dtype=np.uint8)
    return Image.fromarray(np.tile(row, (height, 1))).convert("RGB")


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(path, width, height, orientation=None, **how):
    exif = Image.Exif()
    if orientation is not None:
        exif[data.ORIENTATION] = orientation
    noise(width, height).save(path, exif=exif, **how)
    return path


# Sides


@pytest.mark.parametrize("width, height, short, long, sides", [
    (640, 480, 600, 1000, (800, 600)),  # grows to the short side
    (480, 640, 600, 1000, (600, 800)),
    (2000, 1200, 600, 1000, (1000, 600)),  # shrinks to it
    (2000, 500, 600, 1000, (1000, 250)),  # the long side is the limit
    (500, 2000, 600, 1000, (250, 1000)),
    (4, 5, 2, 100, (2, 3)),  # 2.5 becomes 3
    (4, 9, 2, 100, (2, 5)),  # 4.5 becomes 5, to which Python's round prefers 4
    (12, 5, 4, 100, (10, 4)),  # 9.6 becomes 10
    (13, 10, 1, 100, (1, 1)),  # 1.3 becomes 1
    (1, 1, 60, 100, (60, 60)),
    (1, 3000, 60, 100, (1, 100)),  # a side is never 0
    (3000, 1, 60, 100, (100, 1)),
    (30, 30, 64, 64, (64, 64)),
])  # fmt: skip
def test_sides(width, height, short, long, sides):
    seen = within(noise(width, height), short, long)
    assert seen.dtype == torch.uint8 and tuple(seen.shape) == (3, sides[1], sides[0])


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), short=st.integers(1, 60), more=st.integers(0, 60))
def test_sides_have_limits_and_keep_the_shape(width, height, short, more):
    h, w = within(noise(width, height), short, short + more).shape[1:]
    assert max(h, w) <= short + more and 1 <= min(h, w) <= short
    assert min(h, w) == short or max(h, w) == short + more
    scale = min(short / min(width, height), (short + more) / max(width, height))
    assert all(abs(new - old * scale) <= 0.5 + 1e-6 or new == 1 for new, old in ((w, width), (h, height)))


def test_what_has_its_size_already_stays_as_it_is():
    picture = noise(8, 6)
    seen = within(picture, 6, 100)
    assert np.array_equal(seen.permute(1, 2, 0).numpy(), np.asarray(picture)) and seen.is_contiguous()
    seen += 1  # its own memory, of which torch need not warn


def test_growing_by_hand():
    """Twice as wide: centres lie at -1/4, 1/4, 3/4, 5/4 of the old ones; the outer two take the edge. 6.25 and 18.75
    are rounded to the nearest."""
    seen = within(grey_row(0, 25), 2, 4)
    assert seen.tolist() == [[[0, 6, 19, 25]] * 2] * 3


def test_shrinking_is_not_antialiased():
    """A quarter: centres lie at 1.5 and 5.5, so each is the mean of two neighbours and nothing else counts."""
    seen = within(grey_row(255, 100, 200, 255, 0, 50, 150, 0, height=4), 1, 2)
    assert seen.tolist() == [[[150, 100]]] * 3


def test_colours_and_directions():
    picture = Image.new("RGB", (30, 20), (200, 10, 30))
    picture.paste((10, 220, 90), (15, 0, 30, 20))
    picture.paste((0, 0, 0), (0, 10, 30, 20))
    seen = within(picture, 40, 60)
    assert seen.shape == (3, 40, 60)
    assert seen[:, 5, 5].tolist() == [200, 10, 30] and seen[:, 5, 55].tolist() == [10, 220, 90]
    assert not seen[:, 35].any()


# Samples


def test_samples_keep_the_shape_of_their_pictures(tokenizer, tmp_path):
    """Upright as the camera's tag says, with three channels, the same in training; scenes are drawn at `size`."""
    saved(tmp_path / "turned.jpg", 40, 20, 6)
    Image.new("L", (20, 30), 77).save(tmp_path / "grey.png")
    Image.fromarray(np.full((10, 30), 257 * 9, dtype=np.uint16)).save(tmp_path / "deep.png")
    items = [Item(k, tmp_path / name, ("a dog",)) for k, name in enumerate(("turned.jpg", "grey.png", "deep.png"))]
    for train in (False, True):
        samples = data.Pictures(items, tokenizer, 16, train=train, augment="crop+flip", sides=(16, 40))
        seen = [samples[k]["pixels"] for k in range(3)]
        assert [tuple(x.shape) for x in seen] == [(3, 32, 16), (3, 24, 16), (3, 13, 40)]
        assert (seen[1] == 77).all() and (seen[2] == 9).all()
    scene = scenes.make_scene("tiny", "test", 0)
    sample = data.Pictures([Item(0, scene, ("a dog",))], tokenizer, 32, sides=(32, 32))[0]
    assert np.array_equal(sample["pixels"].permute(1, 2, 0), np.asarray(scenes.render(scene, 32)))


def test_short_sides_are_drawn_between_two(tokenizer, tmp_path):
    """Every one of them, both ends too; the same for the same seed, epoch and index; the long side stays a limit."""
    items = [Item(k, saved(tmp_path / f"{k}.png", 40, 32), ("a dog", "a cat")) for k in range(8)]
    items.append(Item(8, saved(tmp_path / "long.png", 100, 20), ("a dog",)))
    samples = data.Pictures(items, tokenizer, 32, train=True, seed=3, sides=(20, 24, 60))
    shapes = {(epoch, k): tuple(samples[epoch, k]["pixels"].shape) for epoch in range(12) for k in range(9)}
    drawn = Counter(shape[1] for (_, k), shape in shapes.items() if k < 8)
    assert sorted(drawn) == [20, 21, 22, 23, 24] and min(drawn.values()) > 5
    assert {shape for (_, k), shape in shapes.items() if k == 8} == {(3, 12, 60)}
    again = data.Pictures(items, tokenizer, 32, train=True, seed=3, sides=(20, 24, 60))
    assert all(tuple(again[key]["pixels"].shape) == shape for key, shape in shapes.items())
    other = data.Pictures(items, tokenizer, 32, train=True, seed=4, sides=(20, 24, 60))
    assert any(tuple(other[key]["pixels"].shape) != shape for key, shape in shapes.items())


# Batches


def test_padding_by_hand():
    pictures = [torch.full((3, 3, 5), 9, dtype=torch.uint8), torch.full((3, 4, 1), 7, dtype=torch.uint8)]
    found = pad_pixels(pictures, 4)
    pixels, sizes = found["pixels"], found["sizes"]
    assert pixels.shape == (2, 3, 4, 8) and pixels.dtype == torch.uint8 and sizes.dtype == torch.int64
    assert sizes.tolist() == [[3, 5], [4, 1]]
    assert (pixels[0, :, :3, :5] == 9).all() and (pixels[1, :, :, :1] == 7).all()
    assert pixels.long().sum() == 3 * (15 * 9 + 4 * 7), "the rest is 0"
    assert pad_pixels(pictures[:1], 5)["pixels"].shape == (1, 3, 5, 5), "what is a multiple stays"
    assert pad_pixels([torch.ones(3, 1, 1, dtype=torch.uint8)], 32)["pixels"].shape == (1, 3, 32, 32)


def sample(k, *shapes, **more):
    pixels = [torch.full((3, *shape), k + n, dtype=torch.uint8) for n, shape in enumerate(shapes, 1)]
    return {"image_id": k, "pixels": pixels[0] if len(pixels) == 1 else pixels, **more}


def test_batches_of_pictures_and_of_pairs():
    """Pairs are padded together and stay beside each other; unreadable ones are left out of the sizes."""
    batch = collate([sample(10, (3, 5), captions=()), {"image_id": 1, "bad": "x"}, sample(20, (6, 2), captions=())],
                    1, 2, 0, multiple=4)  # fmt: skip
    assert batch["pixels"].shape == (2, 3, 8, 8) and batch["sizes"].tolist() == [[3, 5], [6, 2]]
    assert batch["image_id"] == [10, 20] and batch["bad"] == ["x"]
    told = dict(example_id=0, label=1, texts=[[[5]]])
    batch = collate([sample(10, (3, 5), (1, 9), **told), sample(20, (2, 2), (4, 1), **told)], 1, 2, 0, multiple=4)
    assert batch["pixels"].shape == (2, 2, 3, 4, 12) and batch["pixels"][:, :, 0, 0, 0].tolist() == [[11, 12], [21, 22]]
    assert batch["sizes"].tolist() == [[[3, 5], [1, 9]], [[2, 2], [4, 1]]]
    square = [sample(10, (4, 4), (4, 4), **told), sample(20, (4, 4), (4, 4), **told)]
    batch = collate(square, 1, 2, 0)
    assert batch["pixels"].shape == (2, 2, 3, 4, 4) and "sizes" not in batch
    assert batch["pixels"][:, :, 0, 0, 0].tolist() == [[11, 12], [21, 22]]


def test_pairs_of_different_shapes_come_from_the_loader(tokenizer, tmp_path):
    wide, high = saved(tmp_path / "a.png", 40, 20), saved(tmp_path / "b.jpg", 40, 20, 6)
    pairs = [Example(k, ("a", "b"), (wide, high), "two cats", 1, others=((high, wide),)) for k in range(3)]
    for workers in (0, 2):
        samples = data.Examples(pairs, tokenizer, 20, sides=(20, 64))
        batches = list(data.eval_loader(samples, 2, workers))
        assert [batch["pixels"].shape for batch in batches] == [(2, 2, 3, 64, 64), (1, 2, 3, 64, 64)]
        assert batches[0]["sizes"].tolist() == [[[20, 40], [40, 20]]] * 2
    one = next(iter(data.eval_loader(data.Examples(pairs[:1], tokenizer, 20, sides=(10, 20)), 2)))
    assert one["pixels"].shape == (1, 2, 3, 32, 32), "32 is what both the network and the padding halve"
    several = data.Examples(pairs, tokenizer, 20, train=True, sides=(20, 30, 64))[0, 0]["pixels"]
    assert len({min(x.shape[1:]) for x in several}) == 2, "each picture draws its own side"


# Wide and high


def test_wide_pictures_are_told_from_their_headers(tmp_path):
    """As they are seen, so a camera's tag counts. Square is not wide, nor is what cannot be read."""
    names = {saved(tmp_path / f"{n}.jpg", 40, 20, n): n < 5 for n in range(1, 9)}
    names |= {saved(tmp_path / f"high{n}.jpg", 20, 40, n): n > 4 for n in range(1, 9)}
    names |= {saved(tmp_path / "no_tag.png", 40, 20): True, saved(tmp_path / "square.png", 20, 20): False,
              saved(tmp_path / "tagged.png", 20, 40, 8): True, saved(tmp_path / "strange.jpg", 40, 20, 9): True,
              saved(tmp_path / "nearly.png", 21, 20): True, saved(tmp_path / "turned_square.jpg", 20, 20, 6): False,
              tmp_path / "nowhere.jpg": False}  # fmt: skip
    (tmp_path / "text.jpg").write_text("no picture")
    names[tmp_path / "text.jpg"] = False
    for name in ("cut.png", "cut.jpg"):  # their header says enough, and their pixels are nobody's business here
        whole = saved(tmp_path / f"whole_{name}", 200, 100).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        names[tmp_path / name] = True
    found = are_wide([Item(0, path, ()) for path in names])
    assert found.dtype == bool and dict(zip(names, found.tolist(), strict=True)) == names
    for path, is_wide in names.items():
        if is_wide and not path.name.startswith("cut"):
            assert data.load_image(path, 0).width > data.load_image(path, 0).height


def test_each_file_is_asked_once_and_scenes_never(tmp_path, monkeypatch):
    wide, high = saved(tmp_path / "a.png", 4, 2), saved(tmp_path / "b.png", 2, 4)
    questions = [Example(k, (0, 1), pair, "?") for k, pair in enumerate([(wide, high), (high, wide), (wide, wide)] * 3)]
    asked, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: asked.append(path) or original(path))
    assert are_wide(questions).tolist() == [True, False, True] * 3
    assert sorted(asked) == [wide, high]
    drawn = [Item(k, scenes.make_scene("tiny", "train", k), ()) for k in range(3)]
    assert are_wide(drawn).tolist() == [False] * 3 and len(asked) == 2


# Batches of one kind


def stream(n, batch, steps, **more):
    return [key for keys in TrainBatches(n, batch, steps=steps, **more) for key in keys]


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_without_kinds_the_order_is_a_plain_permutation(seed):
    """Runs of other papers resume in the order that they began with."""
    drawn = [np.random.default_rng([seed % 2**32, epoch]).permutation(13).tolist() for epoch in range(3)]
    assert stream(13, 3, 13, seed=seed) == [(epoch, i) for epoch, order in enumerate(drawn) for i in order]


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 60), batch=st.integers(1, 70), seed=st.integers(-2, 5), share=st.floats(0, 1))
@example(n=10, batch=4, seed=0, share=0.0)  # all of one kind
@example(n=10, batch=4, seed=0, share=1.0)
@example(n=16, batch=4, seed=0, share=0.5)
@example(n=3, batch=8, seed=0, share=0.5)  # several epochs in a batch
@example(n=1, batch=1, seed=0, share=1.0)
def test_each_item_once_an_epoch_and_few_mixed_batches(n, batch, seed, share):
    is_second = np.random.default_rng([n, batch]).random(n) < share
    epochs = 4
    steps = -(-epochs * n // batch)
    how = dict(seed=seed, is_second=is_second)
    whole = list(TrainBatches(n, batch, steps=steps, **how))
    assert [len(keys) for keys in whole] == [batch] * steps
    keys = [key for keys in whole for key in keys]
    for epoch in range(epochs):
        assert sorted(keys[epoch * n : (epoch + 1) * n]) == [(epoch, i) for i in range(n)]
    mixed = sum(len({bool(is_second[i]) for _, i in keys}) == 2 for keys in whole)
    assert mixed <= 2 * epochs + 1, "the borders of epochs, and within each of them one more"
    for start in range(steps):
        resumed = TrainBatches(n, batch, start_step=start, steps=steps, **how)
        assert next(iter(resumed)) == whole[start]
    for world in (2, 3):
        if batch >= world:
            shares = [list(TrainBatches(n, batch, r, world, steps=steps, **how)) for r in range(world)]
            assert all(whole[s][r::world] == shares[r][s] for s in range(steps) for r in range(world))


def test_batches_of_both_kinds_come_in_any_order():
    """Every epoch in another; the few left over are others each time."""
    is_second = np.arange(400) % 4 == 0
    how = dict(n_items=400, batch=16, is_second=is_second)
    whole = list(TrainBatches(steps=100, **how))  # four epochs of 25 steps
    kinds = ["".join({frozenset({False}): "a", frozenset({True}): "b"}.get(
        frozenset(bool(is_second[i]) for _, i in keys), "-") for keys in whole[e : e + 25]) for e in (0, 25, 50, 75)]
    assert all(text.count("a") >= 18 and text.count("b") >= 6 and text.count("-") <= 2 for text in kinds)
    assert len({text.replace("-", "") for text in kinds}) == 4 and all("ba" in text for text in kinds)
    last = [{i for _, i in whole[e + 24]} for e in (0, 25, 50, 75)]
    assert all(len(a & b) < 12 for a in last for b in last if a is not b)
    assert [i for _, i in whole[0]] != sorted(i for _, i in whole[0])
    other = list(TrainBatches(steps=100, seed=1, **how))
    assert other != whole and list(TrainBatches(steps=100, **how)) == whole


def test_the_rest_of_a_kind_fills_up_the_batch_before():
    """10 and 6 items in batches of 4: an epoch of 16 begins with a batch, so of its four only the last, of the rest, is
    mixed, 2 and 2. With 17 items the border of the epochs moves by one each time."""
    is_second = np.arange(16) >= 10
    for keys in [list(TrainBatches(16, 4, steps=4, seed=seed, is_second=is_second)) for seed in range(20)]:
        kinds = [sum(bool(is_second[i]) for _, i in some) for some in keys]
        assert sorted(kinds) == [0, 0, 2, 4] and kinds[3] == 2
    is_second = np.arange(17) >= 10
    for seed in range(20):
        keys = list(TrainBatches(17, 4, steps=17, seed=seed, is_second=is_second))
        kinds = [sum(bool(is_second[i]) for _, i in some) for some in keys]
        assert sum(kind in (0, 4) for kind in kinds) >= 9, "a border or two, else of one kind"
    is_second = np.arange(41) >= 20  # a rest of 1 cannot fill up the 3 that are missing: a whole batch is taken apart
    for seed in range(5):
        keys = list(TrainBatches(41, 4, steps=41, seed=seed, is_second=is_second))
        assert sum(sum(bool(is_second[i]) for _, i in some) in (0, 4) for some in keys) >= 41 - 9


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_groups_and_resumes(tokenizer, tmp_path, workers):
    shapes = [(40, 20), (20, 40)] * 8
    items = [Item(k, saved(tmp_path / f"{k}.png", *shape), ("a dog",)) for k, shape in enumerate(shapes)]
    samples = data.Pictures(items, tokenizer, 20, captions=1, train=True, sides=(20, 64))
    is_wide = are_wide(items)

    def batches(start=0, is_second=is_wide):
        return list(data.train_loader(samples, 4, workers, start_step=start, steps=8, is_second=is_second))

    whole = batches()
    assert [tuple(batch["pixels"].shape[2:]) for batch in whole].count((32, 64)) == 4
    assert [tuple(batch["pixels"].shape[2:]) for batch in whole].count((64, 32)) == 4
    for some in (whole[:4], whole[4:]):
        assert sorted(i for batch in some for i in batch["image_id"]) == list(range(16))
    for a, b in zip(whole[3:], batches(3), strict=True):
        assert a["image_id"] == b["image_id"] and torch.equal(a["pixels"], b["pixels"])
    shares = [list(data.train_loader(samples, 4, workers, rank, 2, steps=8, is_second=is_wide)) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [batch["image_id"][rank::2] for rank in (0, 1)] == [part["image_id"] for part in parts]
    assert (64, 64) in [tuple(batch["pixels"].shape[2:]) for batch in batches(is_second=None)]


def test_a_drawn_side_leaves_the_captions_as_they_are(tokenizer, tmp_path):
    """Captions are drawn before the picture is looked at, so that ablations of its size see the same texts."""
    items = [Item(0, saved(tmp_path / "a.png", 40, 20), tuple(f"a dog {k}" for k in range(9)))]
    ids = [[data.Pictures(items, tokenizer, 20, captions=3, train=True, sides=sides)[e, 0]["ids"] for e in range(5)]
           for sides in ((), (20, 40), (10, 30, 40))]  # fmt: skip
    assert ids[0] == ids[1] == ids[2]
