"""The commands as functions: ``raymaml.train(config)`` does what `raymaml train CONFIG` does.

``config`` is a ``Config``, or the path or URI of a YAML file. ``overrides`` are texts
``"key.path=value"``, as on the command line. ``local`` works in this process without Ray, with the
same bits. ``echo`` receives the lines that a command prints; by default they are log messages.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from raymaml.config.load import load_config
from raymaml.config.schema import Config, Split
from raymaml.data.prefetch import prefetch
from raymaml.evaluation.campaign import Campaign, judge_locally
from raymaml.evaluation.results import ArmResult
from raymaml.evaluation.run_test import plan_report, plan_test
from raymaml.storage.files import read_text
from raymaml.storage.place import Place
from raymaml.training.checkpoint import find_checkpoint, read_card
from raymaml.training.data import EpisodeSet, open_bank, open_episode_sets
from raymaml.training.settings import local_device
from raymaml.training.state import Validation
from raymaml.training.worker import Echo, train_locally
from raymaml.types import EpisodeBatch

Settings = Config | Place | str
_log = logging.getLogger(__name__).info


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The state of a run at its last checkpoint."""

    folder: Place
    """Folder of the run."""
    step: int
    """Outer steps that are done."""
    done: bool
    """False: training stopped on request, and the same call goes on."""
    validation: Validation | None
    """The last one; None: there was none."""
    best: Validation | None
    """The one with the best accuracy."""


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A finished test and its report."""

    campaign: Campaign
    path: Place
    """Of ``summary.json``; ``report.html`` and ``report.md`` lie beside it."""

    @property
    def page(self) -> Place:
        """Path of ``report.html``."""
        return self.path.parent / "report.html"

    @property
    def headline(self) -> str:
        """Accuracy, interval, protocol and page on one line."""
        from raymaml.reports.write import headline_of

        return headline_of(self.path)

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """Content of ``summary.json``: ``summary["accuracy"]["mean"]``, ..."""
        found: Mapping[str, Any] = json.loads(read_text(self.path))
        return found

    @cached_property
    def arms(self) -> list[ArmResult]:
        """The model, then its baselines, with their records."""
        return self.campaign.results()


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """The episodes of a split in batches, from number ``start`` to the end of its round.

    The episodes of a later round are the same ones with other random changes of their images:
    with 100 episodes, ``start=100`` begins the second round. An equal start gives equal batches.
    """

    found: EpisodeSet
    batch_size: int
    start: int = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil((self._stop - self.start) / self.batch_size)

    def __iter__(self) -> Iterator[EpisodeBatch]:
        """Yield the batches, the last of which may be smaller; a thread reads ahead."""
        firsts = range(self.start, self._stop, self.batch_size)
        ends = (min(first + self.batch_size, self._stop) for first in firsts)
        return prefetch(map(self.found.load, map(range, firsts, ends)))

    @property
    def _stop(self) -> int:
        count = self.found.shards.count
        return (self.start // count + 1) * count


def episodes(
    config: Settings,
    split: Split,
    *,
    overrides: Sequence[str] = (),
    batch_size: int = 1,
    start: int = 0,
) -> Episodes:
    """Return the sampled episodes of a split, on ``cluster.device``, as training sees them.

    Args:
        config: the data that it names are imported and sampled.
        split: of the episodes.
        overrides: changes to the config.
        batch_size: episodes in a batch.
        start: number of the first episode, 0, 1, ...; see ``Episodes``.

    Raises:
        UserError: bank or shards are missing or do not fit.
        ValueError: ``batch_size`` is below 1, or ``start`` below 0.
    """
    if batch_size < 1 or start < 0:
        raise ValueError(f"batch_size is {batch_size} and start {start}: at least 1 and 0")
    settings = load_config(config, overrides)
    data, device = settings.data, local_device(settings.cluster)
    found = open_episode_sets(
        data, settings.episodes, open_bank(data), (split,), device, train_seed=settings.seed
    )
    return Episodes(found=found[split], batch_size=batch_size, start=start)


def train(
    config: Settings, *, overrides: Sequence[str] = (), local: bool = False, echo: Echo = _log
) -> TrainResult:
    """Train a run, or resume it.

    Raises:
        UserError: data, run folder or cluster do not fit the config, or numbers are not finite.
    """
    settings = load_config(config, overrides)
    done = trainer(local=local)(settings, echo)
    card = read_card(find_checkpoint(settings.run_folder, "last"))
    return TrainResult(
        folder=settings.run_folder,
        step=card.step,
        done=done,
        validation=card.validation,
        best=card.best,
    )


def test(
    config: Settings, *, overrides: Sequence[str] = (), local: bool = False, echo: Echo = _log
) -> ReportResult:
    """Judge a run on its test episodes, and write the report.

    Raises:
        UserError: the run has no checkpoint, or test episodes are missing or do not fit.
    """
    settings = load_config(config, overrides)
    return _reported(judge_of(local=local)(partial(plan_test, settings), settings.cluster, echo))


def report(config: Settings, *, overrides: Sequence[str] = ()) -> ReportResult:
    """Write the report of a finished test again.

    Raises:
        UserError: episodes are not judged yet.
    """
    return _reported(plan_report(load_config(config, overrides)))


def trainer(*, local: bool) -> Callable[[Config, Echo], bool]:
    """Return the function that trains: in this process, or by Ray's workers."""
    if local:
        return train_locally
    from raymaml.cluster.train import train_on_cluster

    return train_on_cluster


def judge_of(*, local: bool) -> Callable[..., Campaign]:
    """Return the function that judges: in this process, or by Ray's workers."""
    if local:
        return judge_locally
    from raymaml.cluster.campaign import judge_on_cluster

    return judge_on_cluster


def _reported(campaign: Campaign) -> ReportResult:
    from raymaml.reports.write import write_test_report  # matplotlib takes a while

    return ReportResult(campaign=campaign, path=write_test_report(campaign))
