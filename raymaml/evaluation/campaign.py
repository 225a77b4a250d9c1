"""A campaign: arms judged on the test episodes in chunks, in any order and any process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig
from raymaml.evaluation.arm import Arm
from raymaml.evaluation.identity import code_changes, of_any_code, without_code
from raymaml.evaluation.progress import Progress
from raymaml.evaluation.results import ArmResult
from raymaml.models.source import source_files
from raymaml.statistics.confidence_sequence import any_look_interval
from raymaml.statistics.intervals import bounded_interval
from raymaml.storage.files import make_folder
from raymaml.storage.lease import hold
from raymaml.storage.place import Place
from raymaml.training.metrics import Show
from raymaml.training.settings import local_device, prepare_process, workers_line

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
            earlier = of_any_code(arm.folder, without_code(arm.identity))
            if earlier and arm.identity not in earlier:
                changed = ", ".join(code_changes(earlier[0], arm.identity))
                yield f"{self.folder}: {arm.name}: judged again, since records are of {changed}"
            if arm.was_edited:
                files = ", ".join(map(str, source_files(arm.model).values()))
                yield (
                    f"{self.folder}: {arm.name}: model.encoder {arm.model.encoder} was edited after"
                    f" training ({files}); it is judged as it is now"
                )
        how = workers_line([arm.cluster for arm in self.arms], device, num_workers)
        yield f"{self.folder}: {how}; chunks of up to {self.chunk_size} episodes"

    def progress(self, echo: Echo, show: Show = lambda _row: None) -> Progress:
        """Return the display of progress, which counts the records that are there already."""
        arms = self._judged_arms()
        needed = {arm.name: arm.needed() for arm in arms}
        recorded = {arm.name: arm.recorded() for arm in arms}
        stops_early = any(arm.stopping for arm in arms)
        interval = any_look_interval if stops_early else bounded_interval
        return Progress(needed, recorded, echo, show, interval=interval)

    def verify_images(self) -> None:
        """Read every image of every arm once; opening a bank compares only sizes.

        Raises:
            UserError: a bank was altered.
        """
        for bank in {arm.bank.folder: arm.bank for arm in self.arms}.values():
            bank.verify()

    @contextlib.contextmanager
    def sole_judge(self) -> Iterator[Callable[[], None]]:
        """Hold the right to write records; yield a check of it.

        Raises:
            UserError: another process holds it.
        """
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
        campaign.verify_images()
        with campaign.sole_judge() as require_held:
            for line in campaign.announcement(1, device):
                echo(line)
            with campaign.progress(echo) as progress:
                for chunk in campaign.missing():
                    accuracies = campaign.judge(chunk)
                    require_held()
                    progress.add(chunk.arm, chunk.count, accuracies)
    return campaign.require_finished()
