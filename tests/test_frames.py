"""How pictures become squares: METER's transform beside torchvision's, RandAugment, and a user's picture."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import scenes
from common import UserError
from data import Item, Pictures, to_pixels
from tools import ask

SHAPES = [(90, 60), (60, 90), (50, 50), (32, 32), (101, 33), (33, 101), (31, 97), (32, 99), (7, 5), (2, 7), (1, 1),
          (640, 427), (427, 640), (20, 1279), (1279, 20)]  # fmt: skip


def noise(width, height, seed=0):
    """The hardest picture to agree on: wherever a pixel is taken from another place, it shows."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def meters(picture, size):
    """uint8 [3, size, size] as torchvision makes it."""
    from torchvision import transforms

    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    square = transforms.CenterCrop(size)(resize(picture))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 33])
def test_the_square_in_the_middle_is_torchvisions(shape, size):
    picture = noise(*shape)
    pixels = to_pixels(picture, size, frame="centre")
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size) and pixels.is_contiguous()
    assert torch.equal(pixels, meters(picture, size))


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (3, 700), (700, 3), (60, 4201), (4201, 60), (2, 129)])
def test_elongated_pictures_differ_by_rounding_alone(shape):
    waves = np.add.outer(np.sin(np.arange(shape[1]) / 5), np.cos(np.arange(shape[0]) / 7)) * 60 + 125
    smooth = Image.fromarray(np.stack([waves, waves / 2, 255 - waves], -1).astype(np.uint8))
    for picture, most in ((smooth, 1), (noise(*shape), 8)):
        far = (to_pixels(picture, 32, frame="centre").int() - meters(picture, 32).int()).abs()
        assert far.max() <= most and far.float().mean() < 0.5


def test_elongated_pictures_take_no_more_memory(monkeypatch):
    """Resized whole, each would become 384 x 2,304,000 pixels of 4 bytes: 3.5 GB."""
    resize = Image.Image.resize

    def frugal(image, size, *rest, **more):
        assert size[0] * size[1] <= 64 * 384 * 384, size
        return resize(image, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", frugal)
    for shape in ((1, 6000), (6000, 1), (2, 128), (128, 2)):
        assert to_pixels(Image.new("RGB", shape, "white"), 384, frame="centre").min() == 255


def test_a_crop_fills_the_square_in_either_frame():
    picture = noise(90, 60)
    for seed in range(5):
        padded, centred = (to_pixels(picture, 32, "crop", random.Random(seed), frame) for frame in data.FRAMES)
        assert torch.equal(padded, centred)


def test_unknown_frame_is_an_error():
    with pytest.raises(UserError, match="frame = 'center' is not known; choose one of pad, centre"):
        to_pixels(noise(8, 8), 8, frame="center")


@pytest.mark.parametrize("frame", data.FRAMES)
def test_rand_is_randaugment_before_the_resize(frame):
    """Torchvision's own, with the luck that `rng` gives: two operations, magnitude 9, no mirror, nothing after it."""
    from torchvision import transforms

    picture, changed = noise(90, 60), 0
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(seed).getrandbits(63))
            expected = transforms.RandAugment(2, 9)(picture)
        pixels = to_pixels(picture, 32, "rand", random.Random(seed), frame)
        assert torch.equal(pixels, to_pixels(expected, 32, frame=frame))
        changed += not torch.equal(pixels, to_pixels(picture, 32, frame=frame))
    assert changed > 12


def test_rand_leaves_all_other_luck_alone(monkeypatch):
    """The run's generators, those of the GPUs too, go on as if no picture had been augmented."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    to_pixels(noise(20, 20), 16, "rand", random.Random(0))
    assert torch.equal(torch.get_rng_state(), before) and not seeded


def make_items(folder, n, captions=("a dog", "a cat left of it")):
    for i in range(n):
        noise(20 + i, 16, seed=i).save(folder / f"{i}.png")
    return [Item(i, folder / f"{i}.png", captions) for i in range(n)]


class Words:
    bos = eos = pad = 0

    def encode(self, text, max_len=None):
        return [1]


def test_a_rand_sample_follows_from_seed_epoch_and_index(tmp_path):
    items = make_items(tmp_path, 6)

    def epoch(workers, seed=0):
        torch.manual_seed(random.randrange(10**9))
        pictures = Pictures(items, Words(), 16, captions=1, train=True, augment="rand", seed=seed, frame="centre")
        batches = data.train_loader(pictures, 3, workers=workers, steps=4, seed=seed)
        return torch.cat([batch["pixels"] for batch in batches])

    alone = epoch(0)
    assert torch.equal(alone, epoch(0)) and torch.equal(alone, epoch(2))
    other = Pictures(items, Words(), 16, captions=1, train=True, augment="rand", frame="centre")
    assert any(not torch.equal(other[0, i]["pixels"], other[1, i]["pixels"]) for i in range(6))


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
def test_evaluation_samples_are_framed_and_nothing_else(tmp_path, augment):
    items = make_items(tmp_path, 2)
    for frame in data.FRAMES:
        pictures = Pictures(items, None, 16, augment=augment, frame=frame)
        for item, sample in zip(items, (pictures[0], pictures[1]), strict=True):
            assert torch.equal(sample["pixels"], to_pixels(data.load_image(item.image, 16), 16, frame=frame))
    padded, centred = (Pictures(items, None, 16, frame=frame)[0]["pixels"] for frame in data.FRAMES)
    assert not torch.equal(padded, centred) and torch.equal(padded, Pictures(items, None, 16)[0]["pixels"])


# What users ask about


class Model(ask.Verbs):
    def __init__(self, **cfg):
        self.cfg = SimpleNamespace(world="tiny", **cfg)


def test_a_users_picture_is_seen_as_in_evaluation(tmp_path):
    """With image_size the square in the middle, with short_side its own shape; a scene by name is drawn to measure."""
    picture = noise(90, 60)
    picture.save(tmp_path / "a.png")
    square, whole = Model(image_size=32, frame="centre"), Model(short_side=32, long_side=40)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), picture):
        assert torch.equal(square._look(given)["pixels"], meters(picture, 32)[None])
        batch = whole._look(given)
        assert batch["pixels"].shape == (1, 3, 32, 64) and batch["sizes"].tolist() == [[27, 40]]
    drawn = scenes.make_scene(scenes.get_world("tiny"), "test", 3)
    assert torch.equal(square._look("test:3")["pixels"], to_pixels(scenes.render(drawn, 32), 32)[None])
    for model in (square, whole):
        with pytest.raises(UserError, match="b.png: no such file; give another file, or of scenes SPLIT:NUMBER"):
            model._look(tmp_path / "b.png")
    assert torch.equal(Model(image_size=32, frame="pad")._look(picture)["pixels"], to_pixels(picture, 32)[None])
