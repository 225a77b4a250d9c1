"""A campaign: arms judged on the test episodes in chunks, in any order and any process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raymaml.common.errors import UserError, gathered
from raymaml.config.schema import ClusterConfig
from raymaml.evaluation.arm import Arm, code_changes
from raymaml.evaluation.judge import judge
from raymaml.evaluation.progress import Progress
from raymaml.evaluation.records import COLUMNS, Record, record_arrays
from raymaml.evaluation.results import ArmResult
from raymaml.models.source import source_files
from raymaml.statistics.confidence_sequence import any_look_interval
from raymaml.statistics.intervals import bounded_interval
from raymaml.storage.files import make_folder
from raymaml.storage.lease import hold
from raymaml.storage.place import Place
from raymaml.training.metrics import Show
from raymaml.training.settings import (
    kernels_line,
    local_device,
    prepare_process,
    workers_line,
)

Echo = Callable[[str], None]
Plan = Callable[[torch.device], "Campaign"]
"""Plans the campaign for the device that judges; any process gets the same one."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A range of episodes of one arm: the work of one trial."""

    arm: str
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """Arms to judge, planned from configs and run folders alone.

    The identity of records names their folder: other weights, episodes or inner loops have another
    folder, so that nothing is overwritten or mixed.
    """

    name: str
    """Its name where its numbers are shown."""
    folder: Place
    """Holds the report."""
    records: Place
    """Holds the records, which other campaigns may share; one process at a time writes there."""
    arms: tuple[Arm, ...]
    chunk_size: int

    def arm(self, name: str) -> Arm:
        """Return an arm by name."""
        return next(arm for arm in self.arms if arm.name == name)

    def missing(self) -> list[Chunk]:
        """Return the chunks without a complete record file, sorted by first episode: all arms
        advance together."""
        chunks = [
            Chunk(arm=arm.name, first=episodes.start, count=len(episodes))
            for arm in self._judged_arms()
            for episodes in arm.missing(self.chunk_size)
        ]
        return sorted(chunks, key=lambda chunk: chunk.first)

    def _judged_arms(self) -> list[Arm]:
        """Return one arm for each folder of records: the one with the most episodes."""
        longest: dict[str, Arm] = {}
        for arm in sorted(self.arms, key=lambda arm: arm.needed(), reverse=True):
            longest.setdefault(str(arm.records), arm)
        return [arm for arm in self.arms if arm in longest.values()]

    def announcement(self, num_workers: int, device: torch.device) -> Iterator[str]:
        """Yield why records of other code do not count, and how the missing ones are judged."""
        for arm in self.arms:
            earlier = arm.of_any_code()
            if earlier and arm.identity not in earlier:
                changed = ", ".join(code_changes(earlier[0], arm.identity))
                yield f"{self.folder}: {arm.name}: judged again, since records are of {changed}"
            if arm.was_edited:
                model = arm.config.model
                files = ", ".join(map(str, source_files(model).values()))
                yield (
                    f"{self.folder}: {arm.name}: model.encoder {model.encoder} was edited after"
                    f" training ({files}); it is judged as it is now"
                )
        configs = [arm.config for arm in self.arms]
        how = workers_line([config.cluster for config in configs], device, num_workers)
        how += kernels_line([config.model for config in configs], configs[0].cluster, device)
        yield f"{self.folder}: {how}; chunks of up to {self.chunk_size} episodes"

    def progress(self, echo: Echo, show: Show = lambda _row: None) -> Progress:
        """Return the display of progress, which counts the records that are there already."""
        arms = self._judged_arms()
        needed = {arm.name: arm.needed() for arm in arms}
        recorded = {arm.name: arm.recorded() for arm in arms}
        stops_early = any(arm.stopping for arm in arms)
        interval = any_look_interval if stops_early else bounded_interval
        return Progress(needed, recorded, echo, show, interval=interval)

    @contextlib.contextmanager
    def sole_judge(self) -> Iterator[Callable[[], None]]:
        """Hold the right to write records; yield a check of it.

        Before, every image of every arm is read once: opening a bank compares only sizes.

        Raises:
            UserError: a bank was altered, or another process holds the right.
        """
        for bank in {arm.bank.folder: arm.bank for arm in self.arms}.values():
            bank.verify()
        make_folder(self.records, "run_dir")
        taken = UserError(
            f"{self.records}: another process is judging here", remedy="wait for it, or stop it"
        )
        with hold(self.records / ".lock", taken=taken) as require_held:
            yield require_held

    def judge(self, chunk: Chunk) -> list[float]:
        """Judge a chunk, write its records, and return its accuracies.

        The list is empty if the arm is known precisely enough and needs no more episodes.
        """
        arm = self.arm(chunk.arm)
        if chunk.first >= arm.needed():
            return []
        return arm.judge(range(chunk.first, chunk.first + chunk.count))

    def require_finished(self) -> Campaign:
        """Return this campaign, after a check that all its records are there.

        Raises:
            UserError: episodes are not judged yet.
        """
        if missing := self.missing():
            episodes = sum(chunk.count for chunk in missing)
            raise UserError(
                f"{self.folder}: {episodes} episodes in {len(missing)} chunks are not judged yet",
                remedy="run the command that judges them (`raymaml test`, `raymaml study`) again",
            )
        return self

    def results(self) -> list[ArmResult]:
        """Return the results of a finished campaign."""
        return [arm.result() for arm in self.arms]


def judge_locally(plan: Plan, cluster: ClusterConfig, echo: Echo) -> Campaign:
    """Judge the missing chunks in this process, without Ray, and return the finished campaign.

    Raises:
        UserError: the run cannot be judged, or another process judges it.
    """
    device = local_device(cluster)
    prepare_process(cluster, device)
    campaign = plan(device)
    if campaign.missing():
        with campaign.sole_judge() as require_held:
            for line in campaign.announcement(1, device):
                echo(line)
            with campaign.progress(echo) as progress:
                for chunk in campaign.missing():
                    accuracies = campaign.judge(chunk)
                    require_held()
                    progress.add(chunk.arm, chunk.count, accuracies)
    return campaign.require_finished()


def replay_locally(plan: Plan, cluster: ClusterConfig, echo: Echo) -> int:
    """Do as ``replay`` in this process, set up as one that judges."""
    device = local_device(cluster)
    prepare_process(cluster, device)
    return replay(plan(device), echo)


def replay(campaign: Campaign, echo: Echo) -> int:
    """Judge every recorded episode of a finished campaign again, and compare bit for bit.

    All columns are compared but the seconds. Nothing is written. On other hardware, or with other
    numbers of threads, rounding may differ. A record that does not repeat is no evidence.

    Returns:
        The number of records that were repeated: all.

    Raises:
        UserError: the campaign is not finished, or a value differs; the first of each arm is named.
    """
    campaign.require_finished()
    count = 0
    with gathered() as mistakes:
        for result in campaign.results():
            arm = campaign.arm(result.name)
            columns = vars(record_arrays(result.records))
            indices = range(len(result.records))
            again = judge(arm.build().by_step, arm.episodes, indices, arm.at_once)
            found = next(filter(None, (_difference(columns, each) for each in again)), None)
            if found is not None:
                mistakes.add(f"{arm.name}: {found}", "the record, or its model, was altered")
                continue
            count += len(result.records)
            echo(f"{arm.name}: {len(result.records)} records repeated bit for bit")
    return count


def _difference(columns: dict[str, Any], again: Record) -> str | None:
    """Return the first value that differs from the record of the same episode, in words."""
    for name in [each for each in COLUMNS if each != "seconds"]:
        recorded, replayed = columns[name][again["episode"]], np.asarray(again[name])
        if name == "query_predictions" and (recorded < 0).all():  # an earlier raymaml kept none
            continue
        if not np.array_equal(recorded, replayed, equal_nan=replayed.dtype.kind == "f"):
            return (
                f"episode {again['episode']} was recorded with {name}"
                f" {np.asarray(recorded).tolist()}, and comes out as {replayed.tolist()}"
            )
    return None
