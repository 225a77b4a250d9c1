"""Augmentation: its effect on pixels, and that an episode alone decides it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_data import make_bank, spec_of
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from raymaml.config.base import Augmentation
from raymaml.config.schema import AugmentPair
from raymaml.data import augment
from raymaml.data.augment import Augmenter
from raymaml.data.loader import EpisodeLoader, Normalize
from raymaml.data.sampling import sample_episode
from raymaml.data.shards import Sampling

KINDS: list[Augmentation] = ["flip", "crop", "color", "resize", "enlarge"]
SIZE = 21


def images(count: int = 40, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, SIZE, SIZE)
    return torch.randint(1, 256, shape, generator=generator, dtype=torch.uint8)


def augmented(kind: Augmentation, index: int = 0, x: Tensor | None = None, seed: int = 5) -> Tensor:
    augmenter = Augmenter(pair=AugmentPair(support=kind), seed=seed, split="train")
    return augmenter(images() if x is None else x, "support", index)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_size_type_and_number_stay(kind: Augmentation, channels: int) -> None:
    changed = augmented(kind, x=images(channels=channels))
    assert changed.shape == (40, channels, SIZE, SIZE)
    assert changed.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["flip", "crop", "color", "resize"])
def test_seed_split_index_and_set_decide_and_nothing_else(kind: Augmentation) -> None:
    first = augmented(kind)
    torch.manual_seed(99)
    assert torch.equal(augmented(kind), first)
    assert not torch.equal(augmented(kind, index=1), first)
    assert not torch.equal(augmented(kind, seed=6), first)
    both = AugmentPair(support=kind, query=kind)
    assert not torch.equal(Augmenter(pair=both, seed=5, split="train")(images(), "query", 0), first)
    assert not torch.equal(Augmenter(pair=both, seed=5, split="val")(images(), "support", 0), first)
    # an image's draws do not depend on how many stand beside it
    assert torch.equal(augmented(kind, x=images()[:7]), first[:7])


def test_flip_mirrors_about_half_of_the_images() -> None:
    before, after = images(), augmented("flip")
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(after, before, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert 10 <= sum(mirrored) <= 30  # 40 fair coins: outside with probability 0.1%


def test_crop_shifts_by_up_to_eight_pixels_over_black() -> None:
    shifts = set()
    for before, after in zip(images(), augmented("crop"), strict=True):
        padded = TF.pad(before, [8])
        places = [
            (top - 8, left - 8)
            for top in range(17)
            for left in range(17)
            for window in [padded[:, top : top + SIZE, left : left + SIZE]]
            if torch.equal(after, window) or torch.equal(after, window.flip(-1))
        ]
        assert len(places) == 1
        shifts.add(places[0])
    assert len(shifts) > 30
    assert {min(s) < -4 for s in shifts} == {True, False}
    assert max(max(s) for s in shifts) > 4


def test_color_multiplies_brightness_contrast_and_saturation() -> None:
    gray = torch.full((200, 3, SIZE, SIZE), 100, dtype=torch.uint8)  # no contrast, no saturation
    centers = augmented("color", x=gray)[:, :, SIZE // 2, SIZE // 2].float()  # [200, 3]
    assert (centers - centers[:, :1]).abs().max() <= 1  # still grey
    # brightness 0.6 to 1.4; the black border of the crop lets the contrast move it further
    assert centers.min() < 75
    assert centers.max() > 125
    assert centers.min() >= 35
    assert centers.max() <= 200


def test_resize_shows_a_part_of_8_to_100_percent_of_the_area() -> None:
    draws = np.random.default_rng(0).random((4000, augment.NUM_DRAWS))
    boxes = np.array([augment._box(84, 84, d) for d in draws])
    top, left, height, width = boxes.T
    area, ratio = height * width / 84**2, width / height
    assert area.min() > 0.07
    assert area.max() <= 1
    # uniform areas up to about 0.75, above which wide and tall boxes do not fit: mean near 0.5
    assert 0.45 < area.mean() < 0.55
    assert ratio.min() > 0.72
    assert ratio.max() < 1.38
    assert (top + height <= 84).all()
    assert (left + width <= 84).all()
    assert top.min() == left.min() == 0


def test_resize_scales_the_part_to_the_whole() -> None:
    x = images(1)
    draws = np.full(augment.NUM_DRAWS, 0.5)
    draws[6:] = 0.999999  # too large an area every time, but for the last try
    draws[-2:] = 0.5  # 0.54 of the area, square: 15 of 21 pixels, from (21 - 15 + 1) // 2 = 3
    part = x[0, :, 3:18, 3:18]
    draws[6:-2:2] = 0.9999
    assert augment._box(SIZE, SIZE, draws) == (3, 3, 15, 15)
    wanted = TF.resize(part, [SIZE, SIZE], antialias=True)
    assert torch.equal(augment.resize(x[0], draws), wanted)


def test_enlarge_is_the_middle_of_a_larger_image_without_chance() -> None:
    x = images(3)
    wanted = TF.center_crop(TF.resize(x, [24, 24], antialias=True), [SIZE, SIZE])  # 21 * 256 / 224
    assert torch.equal(augmented("enlarge", x=x), wanted)
    assert torch.equal(augmented("enlarge", index=7, x=x), wanted)


def test_an_episode_is_the_same_from_the_bank_and_from_stored_pixels(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "bank", {"train": [8] * 6}, size=9, channels=3)
    spec = spec_of(4, 2, 3, 5)
    shards = Sampling(
        bank, spec=spec, seed=1, split="train", folder=tmp_path / "shards", materialize=True
    ).write()
    pair = AugmentPair(support="crop", query="flip")
    loader = EpisodeLoader(
        bank=bank,
        normalize=Normalize((0.5,) * 3, (0.25,) * 3),
        augment=Augmenter(pair=pair, seed=1, split="train"),
        device=torch.device("cpu"),
    )
    rows = [sample_episode(bank, spec, 1, "train", index) for index in (4, 1)]
    # 9 and 6: the second time round five episodes
    gathered = loader.load(rows, [9, 6])
    stored = loader.load(rows, [9, 6], shards.pixels([4, 1]))
    alone = loader.load(rows[1:], [6])
    first_round = loader.load(rows, [4, 1])
    assert torch.equal(gathered.support_x, stored.support_x)
    assert torch.equal(gathered.query_x, stored.query_x)
    assert torch.equal(gathered.query_y, stored.query_y)
    assert torch.equal(gathered.query_x[1:], alone.query_x)
    assert not torch.equal(gathered.support_x, first_round.support_x)
