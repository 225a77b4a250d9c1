"""A campaign: arms judged on the test episodes in chunks, in any order and any process."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
import torch

from raymaml.common.errors import UserError
from raymaml.config.schema import ClusterConfig, Config
from raymaml.data.bank import ImageBank
from raymaml.evaluation.examination import (
    EPISODES,
    Examination,
    examine_learner,
    read_examination,
    write_examination,
)
from raymaml.evaluation.identity import code_identity, reasons, settings_identity, was_edited
from raymaml.evaluation.progress import Progress
from raymaml.evaluation.provenance import other_bank
from raymaml.evaluation.record_checks import are_of_bank
from raymaml.evaluation.records import (
    chunk_path,
    leading_accuracies,
    missing_chunks,
    read_circumstances,
    read_records,
    record_arrays,
    recorded_accuracies,
    write_chunk,
)
from raymaml.evaluation.results import ArmResult, protocol_of
from raymaml.evaluation.sequences import Stopping, any_look_interval
from raymaml.evaluation.statistics import bounded_interval
from raymaml.evaluation.trial import judge
from raymaml.meta.learner import MetaLearner
from raymaml.seeding import fold_in
from raymaml.storage.files import make_folder
from raymaml.storage.lease import hold
from raymaml.storage.place import Place
from raymaml.training.checkpoint import load_tensors, read_card, require_fitting
from raymaml.training.data import EpisodeSet, open_bank, open_episode_sets
from raymaml.training.explain import explained
from raymaml.training.metrics import Show
from raymaml.training.process import prepare_process
from raymaml.training.session import local_device
from raymaml.training.settings import judging_line
from raymaml.training.state import build_learner, load_params

Echo = Callable[[str], None]
Plan = Callable[[torch.device], "Campaign"]
"""What plans one and the same campaign, for the device that judges, in any process."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One setting of a campaign."""

    name: str
    description: str
    config: Config
    """As it is judged: model, inner loop at test, test episodes, precision."""
    checkpoint: Place | None
    """Weights to judge; None: the initial ones."""
    num_episodes: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A range of episodes of one arm: the work of one trial."""

    arm: str
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """All that judging needs, planned from configs and run folders alone.

    Records lie in a folder by their identity: other weights, episodes or inner loops are another
    folder, so that nothing is overwritten and nothing is mixed.
    """

    name: str
    """What it is called where its numbers are shown."""
    folder: Place
    """Where the report is written."""
    records: Place | None = None
    """Folder of records that other campaigns share: ``<records>/<identity>``; None keeps them for
    this one in ``<folder>/<arm>/<identity>``."""
    arms: tuple[Arm, ...]
    device: torch.device
    chunk_size: int
    target_half_width: float | None
    carried: dict[str, Mapping[str, str]] = field(default_factory=dict)
    """Identities of records of other code to report, by arm."""

    def arm(self, name: str) -> Arm:
        """Return an arm by name."""
        return next(arm for arm in self.arms if arm.name == name)

    def bank(self, arm: Arm) -> ImageBank:
        """Return the images that ``arm`` is judged on."""
        return self._open(arm)[0]

    def episodes(self, arm: Arm) -> EpisodeSet:
        """Return the test episodes of ``arm``."""
        return self._open(arm)[1]

    def _open(self, arm: Arm) -> tuple[ImageBank, EpisodeSet]:
        """Open images and episodes, once for all arms that share them."""
        config = arm.config
        key = json.dumps([config.episodes.seed, config.data.model_dump(mode="json"), _spec(arm)])
        if key not in self._opened:
            bank = open_bank(config.data)
            sets = open_episode_sets(config.data, config.episodes, bank, ("test",), self.device)
            self._opened[key] = bank, sets["test"]
        return self._opened[key]

    @cached_property
    def _opened(self) -> dict[str, tuple[ImageBank, EpisodeSet]]:
        return {}

    def needed(self, arm: Arm) -> int:
        """Return how many episodes of ``arm`` to judge, as far as the records show by now.

        With a target, judging stops at the first look at which a confidence sequence over the
        accuracies so far is narrow enough.
        """
        stopping = self.stopping(arm)
        if stopping is None:
            return arm.num_episodes
        return stopping.needed(leading_accuracies(self.records_of(arm), self.identity(arm)))

    def stopping(self, arm: Arm) -> Stopping | None:
        """Return the rule that ends judging ``arm`` early; None: there is none."""
        if self.target_half_width is None:
            return None
        return Stopping(target_half_width=self.target_half_width, most_episodes=arm.num_episodes)

    def missing(self) -> list[Chunk]:
        """Return the work that no complete record file shows as done, all arms side by side."""
        chunks = [chunk for arm in self._judged_arms() for chunk in self.missing_of(arm)]
        return sorted(chunks, key=lambda chunk: chunk.first)

    def missing_of(self, arm: Arm) -> list[Chunk]:
        """Return the missing work of one arm."""
        place, identity = self.records_of(arm), self.identity(arm)
        return [
            Chunk(arm=arm.name, first=episodes.start, count=len(episodes))
            for episodes in missing_chunks(place, self.needed(arm), self.chunk_size, identity)
        ]

    def settings_line(self, num_workers: int, device: torch.device) -> str:
        """Say in a line how what is missing is judged."""
        how = judging_line([arm.config for arm in self.arms], device, num_workers)
        return f"{self.folder}: {how}; chunks of up to {self.chunk_size} episodes"

    def progress(self, echo: Echo, show: Show = lambda _row: None) -> Progress:
        """Return what shows how far the arms are, the records that are there included."""
        needed = {arm.name: self.needed(arm) for arm in self._judged_arms()}
        recorded = {
            name: recorded_accuracies(
                self.records_of(self.arm(name)), count, self.identity(self.arm(name))
            ).tolist()
            for name, count in needed.items()
        }
        interval = bounded_interval if self.target_half_width is None else any_look_interval
        return Progress(needed, recorded, echo, show, interval=interval)

    def _judged_arms(self) -> list[Arm]:
        """Return the arms without those whose records are among those of another."""
        longest: dict[str, Arm] = {}
        for arm in sorted(self.arms, key=self.needed, reverse=True):
            longest.setdefault(str(self.records_of(arm)), arm)
        return [arm for arm in self.arms if arm in longest.values()]

    def verify_images(self) -> None:
        """Read every image of every arm once: opening a bank compares no more than sizes.

        Raises:
            UserError: a bank was altered.
        """
        banks = {bank.folder: bank for bank in map(self.bank, self.arms)}
        for bank in banks.values():
            bank.verify()

    @contextlib.contextmanager
    def sole_judge(self) -> Iterator[Callable[[], None]]:
        """Hold the right to write records, which other campaigns may share; yield a check of it.

        Raises:
            UserError: another process holds it.
        """
        place = self.folder if self.records is None else self.records
        make_folder(place, "run_dir")
        taken = UserError(
            f"{place}: another process is judging here", remedy="wait for it, or stop it"
        )
        with hold(place / ".lock", taken=taken) as require_held:
            yield require_held

    def judge(self, chunk: Chunk) -> list[float]:
        """Judge a chunk, write its records, and return its accuracies.

        A chunk behind the point where its arm was found precise enough is left out: no accuracies.
        """
        arm = self.arm(chunk.arm)
        if chunk.first >= self.needed(arm):
            return []
        indices = range(chunk.first, chunk.first + chunk.count)
        path = chunk_path(self.records_of(arm), chunk.first, chunk.count)
        episodes = self.episodes(arm)
        with explained(arm.config.run_folder, arm.config.cluster, require=episodes.watch.require):
            if chunk.first == 0:
                write_examination(self.records_of(arm), self._examined(arm))
            records = list(judge(self.learner(arm), episodes, indices))
            episodes.watch.require()
            write_chunk(path, records, self.identity(arm), self.circumstances(arm))
        return [record.accuracy for record in records]

    def _examined(self, arm: Arm) -> Examination:
        """Examine what ``arm`` judges on its first episodes."""
        some = self.episodes(arm).load(range(min(EPISODES, arm.num_episodes)))
        return examine_learner(self.learner(arm), some, arm.config.cluster.precision)

    def require_finished(self) -> Campaign:
        """Return this campaign, whose records a report may show.

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

    def records_of(self, arm: Arm) -> Place:
        """Return the folder of the records of ``arm``."""
        digest = fold_in(0, json.dumps(self.identity(arm), sort_keys=True))
        return self.place_of(arm) / f"{digest:016x}"

    def place_of(self, arm: Arm) -> Place:
        """Return the folder of all records of ``arm``, whatever their identity."""
        return self.folder / arm.name if self.records is None else self.records

    def identity(self, arm: Arm) -> dict[str, str]:
        """Return what decides a record of ``arm``."""
        if arm.name in self.carried:
            return dict(self.carried[arm.name])
        key = arm.config.model.model_dump_json()
        if key not in self._codes:
            self._codes[key] = code_identity(arm.config)
        return self.settings(arm) | self._codes[key]

    def settings(self, arm: Arm) -> dict[str, str]:
        """Return what decides a record of ``arm`` beside the code."""
        return settings_identity(arm.config, arm.checkpoint, self.episodes(arm).shards.bank_hash)

    @cached_property
    def _codes(self) -> dict[str, dict[str, str]]:
        """By model: files that are edited later are not the code that this process runs."""
        return {}

    def circumstances(self, arm: Arm) -> dict[str, str]:
        """Return what is told of records beside their identity, and may differ between chunks."""
        config = fold_in(0, arm.config.model_dump_json())
        threads = arm.config.cluster.threads_per_worker
        return {
            "config": f"{config:016x}",
            "manifest": self.episodes(arm).shards.manifest_hash,
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {self.device.type},"
            f" {threads} thread(s)",
        }

    def learner(self, arm: Arm) -> MetaLearner:
        """Build what ``arm`` judges.

        Raises:
            UserError: the model cannot be built, name patterns do not fit it, or the weights of the
                checkpoint do not.
        """
        image_shape = self.bank(arm).image_shape
        learner = build_learner(
            arm.config, image_shape, arm.config.episodes.test.num_ways, self.device
        )
        if arm.checkpoint is not None:
            card = read_card(arm.checkpoint)
            params = load_tensors(arm.checkpoint, card, "params.pt", self.device)
            require_fitting(arm.checkpoint, params, learner.params | learner.moments)
            load_params(learner, params)
        return learner

    def _records(self, arm: Arm) -> pa.Table:
        place, bank = self.records_of(arm), self.bank(arm)
        table = read_records(place, self.needed(arm), self.identity(arm))
        if not are_of_bank(vars(record_arrays(table)), len(bank.classes), bank.num_images):
            raise UserError(
                f"{place}: its records name images that the bank {bank.folder} does not hold",
                remedy="move it away and run `raymaml test` again",
            )
        return table

    def results(self) -> list[ArmResult]:
        """Return the results of a finished campaign."""
        return [self._result(arm) for arm in self.arms]

    def _result(self, arm: Arm) -> ArmResult:
        place, bank, identity = self.records_of(arm), self.bank(arm), self.identity(arm)
        other = None if arm.checkpoint is None else other_bank(arm.checkpoint, bank)
        remarks = [other.text] if other else []
        if was_edited(arm, identity):
            remarks.append("encoder edited after training")
        spec, num_steps = arm.config.episodes.test, arm.config.test_inner.num_steps
        examination = read_examination(place)
        return ArmResult(
            name=arm.name,
            description=arm.description,
            protocol=protocol_of(spec, arm.config.model, num_steps, examination, remarks),
            records=self._records(arm),
            stopping=self.stopping(arm),
            circumstances=read_circumstances(place),
            identity={
                "checkpoint": arm.checkpoint.name if arm.checkpoint else "none",
                **identity,
                "source": bank.source,
                "licence": bank.licence,
                **({"test_classes_trained_on": other.trained_on} if other else {}),
            },
        )


def _spec(arm: Arm) -> dict[str, int]:
    """Return the shape of the episodes, on which they depend; not their number."""
    return arm.config.episodes.test.model_dump(exclude={"num_episodes"})


def judge_locally(plan: Plan, cluster: ClusterConfig, echo: Echo) -> Campaign:
    """Judge all that is missing in this process, without Ray, and return the finished campaign.

    Raises:
        UserError: the run cannot be judged, or another process judges it.
    """
    device = local_device(cluster)
    prepare_process(cluster, device)
    campaign = plan(device)
    if campaign.missing():
        campaign.verify_images()
        with campaign.sole_judge() as require_held:
            for line in (*reasons(campaign), campaign.settings_line(1, device)):
                echo(line)
            with campaign.progress(echo) as progress:
                for chunk in campaign.missing():
                    accuracies = campaign.judge(chunk)
                    require_held()
                    progress.add(chunk.arm, chunk.count, accuracies)
    return campaign.require_finished()
