"""From stored pixels to episode batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_data import make_bank, spec_of

from raymaml.config.schema import AugmentPair
from raymaml.data.augment import Augmenter
from raymaml.data.bank import ImageBank
from raymaml.data.loader import EpisodeLoader, Normalize
from raymaml.data.sampling import sample_episode


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ImageBank:
    folder = tmp_path_factory.mktemp("transforms") / "bank"
    return make_bank(folder, {"train": [8] * 6}, size=5, channels=3)


@pytest.fixture(scope="module")
def loader(bank: ImageBank) -> EpisodeLoader:
    """Of 4 ways, 2 shots and 3 queries; it leaves the values of pixels / 255."""
    return EpisodeLoader(
        bank=bank,
        normalize=Normalize((0.0,) * 3, (1.0,) * 3),
        augment=Augmenter(pair=AugmentPair(), seed=0, split="train"),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0, 4)])
@pytest.mark.parametrize("planar", [True, False])
def test_normalisation_is_its_formula(lead: tuple[int, ...], planar: bool) -> None:
    generator = np.random.default_rng(0)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.0)
    pixels = generator.integers(0, 256, (*lead, 6, 5, 3), dtype=np.uint8)
    if planar:
        pixels = np.moveaxis(np.ascontiguousarray(np.moveaxis(pixels, -1, -3)), -3, -1)
    images = Normalize(mean, std)(torch.from_numpy(pixels))
    expected = np.moveaxis((pixels / 255.0 - np.array(mean)) / np.array(std), -1, -3)
    assert images.shape == (*lead, 3, 6, 5)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)


def test_normalisation_does_not_depend_on_how_much_is_converted_at_once() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(9 * 100 * 100 * 3 // 256 + 1)
    pixels = pixels[: 9 * 100 * 100 * 3].view(9, 100, 100, 3)  # 9 images are more than one piece
    normalize = Normalize((0.3, 0.4, 0.5), (0.2, 0.25, 0.3))
    one_by_one = torch.stack([normalize(image) for image in pixels])
    assert torch.equal(normalize(pixels), one_by_one)


def test_a_batch_holds_the_images_of_its_episodes(bank: ImageBank, loader: EpisodeLoader) -> None:
    rows = [sample_episode(bank, spec_of(4, 2, 3, 9), 0, "train", index) for index in (5, 2)]
    batch = loader.load(rows, range(len(rows)))
    assert batch.support_x.shape == (2, 8, 3, 5, 5)
    assert batch.query_x.shape == (2, 12, 3, 5, 5)
    assert batch.support_y.tolist() == [each.support_labels.tolist() for each in rows]
    assert batch.query_y.tolist() == [each.query_labels.tolist() for each in rows]
    assert sorted(batch.query_y[0].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.support_y.dtype == torch.int64
    for episode, expected in zip(batch, rows, strict=True):
        restored = (episode.query_x * 255).round().to(torch.uint8).movedim(1, -1)
        np.testing.assert_array_equal(restored.numpy(), bank.images(expected.query))


def test_a_share_may_be_empty(loader: EpisodeLoader) -> None:
    batch = loader.load([], [])
    assert len(batch) == 0
    assert batch.query_x.shape == (0, 0, 3, 5, 5)
    assert batch.query_y.shape == (0, 0)
