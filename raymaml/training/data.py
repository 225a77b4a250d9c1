"""Where data meets learning: the bank and shards of a config, opened and checked."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch

from raymaml.common.errors import UserError, gathered
from raymaml.config.pretrain import PretrainConfig
from raymaml.config.schema import (
    SPLITS,
    AllEpisodes,
    AugmentPair,
    Config,
    DataConfig,
    Split,
)
from raymaml.data.augment import Augmenter
from raymaml.data.bank import ImageBank
from raymaml.data.loader import EpisodeLoader, Normalize
from raymaml.data.prefetch import prefetch
from raymaml.data.preprocessing import preprocessing_of
from raymaml.data.sampling import check_spec, spec_in
from raymaml.data.shards import EpisodeShards, Sampling
from raymaml.data.watch import Watch
from raymaml.models import check_image_size
from raymaml.seeding import fold_in
from raymaml.training.images import LabelledImages
from raymaml.training.reduction import share
from raymaml.types import EpisodeBatch

_FEW = 8
MetaBatches = Generator[EpisodeBatch, None, None]
"""A worker's shares of the meta-batches, read ahead by a thread that ends when this is closed."""


@dataclass(frozen=True, kw_only=True)
class EpisodeSet:
    """The pre-sampled episodes of one split, and what turns their rows into tensors."""

    shards: EpisodeShards
    loader: EpisodeLoader
    watch: Watch
    """Watches shards and bank from the moment they were opened."""

    def seed_of(self, index: int) -> int:
        """Return the seed of the random numbers (dropout at test) that judging an episode draws."""
        manifest = self.shards.manifest
        return fold_in(manifest.seed, "judge", manifest.split, index)

    @property
    def manifest_hash(self) -> str:
        """Hash of the manifest of the shards."""
        return self.shards.manifest_hash

    def names(self, indices: range) -> list[str]:
        """Return how messages name episodes."""
        split = {"train": "training", "val": "validation"}.get(self.shards.manifest.split, "test")
        return [f"{split} episode {index % self.shards.count}" for index in indices]

    def loaded(
        self, indices: range, size: int, most_bytes: float
    ) -> Iterator[tuple[range, EpisodeBatch]]:
        """Yield runs of up to ``size`` episodes, with their indices; images of at most
        ``most_bytes`` are in memory together, but for eight episodes."""
        manifest = self.shards.manifest
        images = manifest.spec.num_ways * manifest.spec.images_per_class
        bytes_of_one = 4 * images * math.prod(manifest.image_shape)
        size = int(min(size, max(_FEW, most_bytes // bytes_of_one)))
        for first in range(indices.start, indices.stop, size):
            some = range(first, min(first + size, indices.stop))
            yield some, self.load(some)

    def load(self, indices: range) -> EpisodeBatch:
        """Read episodes by index, going round again past the last one."""
        wrapped = [index % self.shards.count for index in indices]
        pixels = self.shards.pixels(wrapped) if self.shards.materialized else None
        return self.loader.load(self.shards.rows(wrapped), indices, pixels)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training and validation episodes of one run; images to learn from in a pretraining."""

    image_shape: tuple[int, int, int]  # C, H, W
    train: EpisodeSet | LabelledImages
    val: EpisodeSet
    first_episode: int
    meta_batch_size: int
    episodes_together: int
    """Episodes that always stay together on one worker."""

    def meta_batches(self, first_step: int, rank: int, world_size: int) -> MetaBatches:
        """Yield a worker's share of every meta-batch from ``first_step`` on, read ahead."""

        def load() -> Iterator[EpisodeBatch]:
            step = first_step
            while True:
                yield self.train.load(self.indices(step, rank, world_size))
                step += 1

        return prefetch(load())

    def require_unaltered(self) -> None:
        """Check that images and episodes are as they were opened.

        Raises:
            UserError: they were altered meanwhile.
        """
        self.train.watch.require()
        self.val.watch.require()

    def indices(self, step: int, rank: int, world_size: int) -> range:
        """Return the training episodes that a worker learns from in one outer step."""
        mine = share(self.meta_batch_size, rank, world_size, self.episodes_together)
        first = self.first_episode + step * self.meta_batch_size
        return range(first + mine.start, first + mine.stop)

    def names(self, step: int) -> list[str]:
        """Return how messages name the training episodes, or slices, of one outer step."""
        return self.train.names(self.indices(step, 0, 1))


def open_training_data(config: Config, device: torch.device) -> TrainingData:
    """Open bank and shards.

    Raises:
        UserError: something is missing, damaged, was made for another config, or is too small for
            the model; or the bank cannot give the test episodes, which come after training.
    """
    bank = open_bank(config.data)
    check_image_size(config.model, bank.image_shape)
    check_spec(bank, spec_in(bank, config.episodes, "test"), "test")
    splits: tuple[Split, ...] = ("val",) if config.stage == "pretrain" else ("train", "val")
    sets = open_episode_sets(
        config.data, config.episodes, bank, splits, device, train_seed=config.seed
    )
    if config.stage == "pretrain" and config.pretrain is not None:
        return _images_of(config, config.pretrain, sets["val"])
    order = fold_in(config.seed, "order")  # replicas see the episodes in other orders
    return TrainingData(
        image_shape=bank.image_shape,
        train=sets["train"],
        val=sets["val"],
        first_episode=order % config.episodes.train.num_episodes,
        meta_batch_size=config.outer.meta_batch_size,
        episodes_together=config.cluster.episodes_together,
    )


def _images_of(config: Config, pretrain: PretrainConfig, val: EpisodeSet) -> TrainingData:
    """Return the training images of the bank that ``val`` comes from, for a pretraining."""
    pair = AugmentPair(query=pretrain.augment)
    augment = Augmenter(pair=pair, seed=config.seed, split="pretrain")
    return TrainingData(
        image_shape=val.loader.bank.image_shape,
        train=LabelledImages(
            loader=replace(val.loader, augment=augment),
            watch=val.watch,
            seed=config.seed,
            slice_size=pretrain.slice_size,
        ),
        val=val,
        first_episode=0,
        meta_batch_size=pretrain.meta_batch_size,
        episodes_together=1,
    )


def verify_images(data: TrainingData) -> None:
    """Read every image once: opening a bank compares no more than the size of its file.

    Raises:
        UserError: the bank was altered.
    """
    data.train.loader.bank.verify()


def open_bank(data: DataConfig) -> ImageBank:
    """Open the image bank, checking that it is of the config's image size."""
    bank = ImageBank.open(data.bank, data.cache)
    if bank.image_shape[1] != data.image_size:
        raise UserError(
            f"data.image_size is {data.image_size} but the bank {data.bank} holds images of"
            f" {bank.image_shape[1]} pixels",
            remedy="give that size, or another data.bank to import into",
        )
    return bank


def open_episode_sets(
    data: DataConfig,
    episodes: AllEpisodes,
    bank: ImageBank,
    splits: tuple[Split, ...],
    device: torch.device,
    *,
    train_seed: int = 0,
) -> dict[Split, EpisodeSet]:
    """Open the shards of several splits; all that is wrong with any of them is one error.

    ``train_seed`` decides how the images of the train split are augmented; ``episodes.seed`` does
    so for the others.
    """
    sets: dict[Split, EpisodeSet] = {}
    with gathered() as mistakes:
        for split in splits:
            with mistakes.kept():
                shards = EpisodeShards.open(data.shards / split, data.cache)
                _sampling(data, episodes, bank, split).require(shards)
                seed = train_seed if split == "train" else episodes.seed
                loader = EpisodeLoader(
                    bank=bank,
                    normalize=_normalize(data, bank),
                    augment=Augmenter(pair=data.augment.of(split), seed=seed, split=split),
                    device=device,
                )
                sets[split] = EpisodeSet(shards=shards, loader=loader, watch=Watch(bank, shards))
    return sets


def sample_shards(
    data: DataConfig, episodes: AllEpisodes, bank: ImageBank
) -> Iterator[EpisodeShards]:
    """Sample the episodes of all splits into shards, and yield them split by split.

    Raises:
        UserError: naming all that keeps any split from being sampled; nothing is written then.
    """
    jobs = [_sampling(data, episodes, bank, split) for split in SPLITS]
    with gathered() as mistakes:
        for job in jobs:
            with mistakes.kept():
                job.check()
    for job in jobs:
        yield job.write()


def _sampling(data: DataConfig, episodes: AllEpisodes, bank: ImageBank, split: Split) -> Sampling:
    return Sampling(
        bank,
        spec_in(bank, episodes, split),
        seed=episodes.seed,
        split=split,
        folder=data.shards / split,
        materialize=data.materialize and split == "train",
        cache=data.cache,
    )


def _normalize(data: DataConfig, bank: ImageBank) -> Normalize:
    found = preprocessing_of(data, bank.image_shape, bank)
    assert found is not None  # with a bank its moments are known
    return Normalize(found.mean, found.std)
