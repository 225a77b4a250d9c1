"""An arm of a campaign, resolved: its episodes, its model and its records, each found once."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import pyarrow as pa
import torch

from raymaml.common.errors import UserError
from raymaml.config.model import InnerConfig, ModelConfig
from raymaml.config.schema import AllEpisodes, ClusterConfig, Config, DataConfig
from raymaml.data.bank import ImageBank
from raymaml.evaluation.examination import (
    EPISODES,
    examine_learner,
    read_examination,
    write_examination,
)
from raymaml.evaluation.identity import code_identity, settings_identity
from raymaml.evaluation.judge import judge
from raymaml.evaluation.other_bank import other_bank
from raymaml.evaluation.record_checks import are_of_bank
from raymaml.evaluation.record_files import (
    chunk_path,
    leading_accuracies,
    missing_chunks,
    read_circumstances,
    read_records,
    recorded_accuracies,
    write_chunk,
)
from raymaml.evaluation.records import record_arrays
from raymaml.evaluation.results import ArmResult, protocol_of
from raymaml.meta.learner import MetaLearner
from raymaml.seeding import fold_in
from raymaml.statistics.confidence_sequence import Stopping
from raymaml.storage.place import Place
from raymaml.training.checkpoint import CheckpointCard, load_tensors, read_card
from raymaml.training.data import EpisodeSet, open_bank, open_episode_sets
from raymaml.training.explain import explained
from raymaml.training.state import build_learner, load_params, require_fitting


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a campaign, as configs and run folders name it."""

    name: str
    description: str
    config: Config
    """As it is judged: model, inner loop at test, test episodes, precision."""
    checkpoint: Place | None
    """Weights to judge; None: the initial ones."""
    num_episodes: int
    target_half_width: float | None
    """Judging ends once the accuracy is known to this, 0..1; None: at the last episode."""
    folder: Place
    """Holds the records: those of one identity in ``<folder>/<digest of the identity>``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One setting of a campaign with everything that judging needs, opened and checked."""

    name: str
    description: str
    model: ModelConfig
    inner: InnerConfig
    """At test."""
    cluster: ClusterConfig
    num_episodes: int
    stopping: Stopping | None
    """The rule that ends judging early; None: there is none."""
    folder: Place
    run_folder: Place
    checkpoint: Place | None
    card: CheckpointCard | None
    """Of the checkpoint."""
    bank: ImageBank
    episodes: EpisodeSet
    """The test episodes."""
    identity: Mapping[str, str]
    """The values that decide a record."""
    circumstances: Mapping[str, str]
    """Notes beside the identity, which may differ between chunks."""
    build: Callable[[], MetaLearner] = field(repr=False)
    """Builds the learner with the weights to judge."""

    @property
    def records(self) -> Place:
        """Folder of the records."""
        digest = fold_in(0, json.dumps(self.identity, sort_keys=True))
        return self.folder / f"{digest:016x}"

    @property
    def was_edited(self) -> bool:
        """Whether the code of the user's encoder changed after training."""
        trained = None if self.card is None else self.card.encoder_source
        return trained not in (None, self.identity.get("encoder_source"))

    def needed(self) -> int:
        """Return the number of episodes to judge, given the records that are there."""
        if self.stopping is None:
            return self.num_episodes
        return self.stopping.needed(leading_accuracies(self.records, self.identity))

    def missing(self, chunk_size: int) -> list[range]:
        """Return the needed episodes without a complete record file, in chunks."""
        return missing_chunks(self.records, self.needed(), chunk_size, self.identity)

    def recorded(self) -> list[float]:
        """Return the accuracies of the needed episodes that have a record."""
        return list(recorded_accuracies(self.records, self.needed(), self.identity))

    def judge(self, indices: range) -> list[float]:
        """Judge these episodes, write their records, and return their accuracies.

        The chunk that holds the first episode also examines the model.
        """
        require_unaltered = self.episodes.watch.require
        with explained(self.run_folder, self.cluster, require=require_unaltered):
            learner = self.build()
            if indices.start == 0:
                some = self.episodes.load(range(min(EPISODES, self.num_episodes)))
                examination = examine_learner(learner, some, self.cluster.precision)
                write_examination(self.records, examination)
            records = list(judge(learner, self.episodes, indices))
            require_unaltered()
            path = chunk_path(self.records, indices.start, len(indices))
            write_chunk(path, records, self.identity, self.circumstances)
        return [record.accuracy for record in records]

    def result(self) -> ArmResult:
        """Return the records of a finished arm, as a report shows them.

        Raises:
            UserError: records are missing or damaged, or name images that the bank does not hold.
        """
        other = None if self.checkpoint is None else other_bank(self.checkpoint, self.bank)
        remarks = [other.text] if other else []
        if self.was_edited:
            remarks.append("encoder edited after training")
        examination = read_examination(self.records)
        spec, num_steps = self.episodes.loader.spec, self.inner.num_steps
        return ArmResult(
            name=self.name,
            description=self.description,
            protocol=protocol_of(spec, self.model, num_steps, examination, remarks),
            records=self._table(),
            stopping=self.stopping,
            circumstances=read_circumstances(self.records),
            identity={
                "checkpoint": self.checkpoint.name if self.checkpoint else "none",
                **self.identity,
                "source": self.bank.source,
                "licence": self.bank.licence,
                **({"test_classes_trained_on": other.trained_on} if other else {}),
            },
        )

    def _table(self) -> pa.Table:
        table = read_records(self.records, self.needed(), self.identity)
        bank = self.bank
        if not are_of_bank(vars(record_arrays(table)), len(bank.classes), bank.num_images):
            raise UserError(
                f"{self.records}: its records name images that the bank {bank.folder} does not"
                " hold",
                remedy="move it away and run `raymaml test` again",
            )
        return table


class Resolver:
    """Turns settings into arms for one device; arms share what they have in common."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._opened: dict[str, tuple[ImageBank, EpisodeSet]] = {}
        self._codes: dict[str, dict[str, str]] = {}

    def __call__(self, setting: Setting, *, with_code: bool = True) -> Arm:
        """Open and check the parts of a setting.

        Args:
            setting: to resolve.
            with_code: whether the identity names the code, which imports an encoder of one's own.

        Raises:
            UserError: bank, episodes or checkpoint are missing, damaged, or do not fit.
        """
        config = setting.config
        bank, episodes = self._open(config.data, config.episodes)
        card = None if setting.checkpoint is None else read_card(setting.checkpoint)
        threads = config.cluster.threads_per_worker
        return Arm(
            name=setting.name,
            description=setting.description,
            model=config.model,
            inner=config.test_inner,
            cluster=config.cluster,
            num_episodes=setting.num_episodes,
            stopping=Stopping(
                target_half_width=setting.target_half_width, most_episodes=setting.num_episodes
            )
            if setting.target_half_width is not None
            else None,
            folder=setting.folder,
            run_folder=config.run_folder,
            checkpoint=setting.checkpoint,
            card=card,
            bank=bank,
            episodes=episodes,
            identity={
                **settings_identity(config, card, bank.hash),
                **(self._code(config.model) if with_code else {}),
            },
            circumstances={
                "config": f"{fold_in(0, config.model_dump_json()):016x}",
                "manifest": episodes.shards.manifest_hash,
                "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {self.device.type},"
                f" {threads} thread(s)",
            },
            build=partial(
                load_learner, config, setting.checkpoint, card, bank.image_shape, self.device
            ),
        )

    def _open(self, data: DataConfig, episodes: AllEpisodes) -> tuple[ImageBank, EpisodeSet]:
        shape = episodes.test.model_dump(exclude={"num_episodes"})
        key = json.dumps([episodes.seed, data.model_dump(mode="json"), shape])
        if key not in self._opened:
            bank = open_bank(data)
            sets = open_episode_sets(data, episodes, bank, ("test",), self.device)
            self._opened[key] = bank, sets["test"]
        return self._opened[key]

    def _code(self, model: ModelConfig) -> dict[str, str]:
        """Identify the code once a process: a later edit does not change the code that this process
        runs."""
        key = model.model_dump_json()
        if key not in self._codes:
            self._codes[key] = code_identity(model)
        return self._codes[key]


def load_learner(
    config: Config,
    checkpoint: Place | None,
    card: CheckpointCard | None,
    image_shape: tuple[int, int, int],
    device: torch.device,
) -> MetaLearner:
    """Build the learner of ``config``, with the weights of ``checkpoint`` or the initial ones.

    Raises:
        UserError: the model cannot be built, name patterns do not fit it, or the weights of the
            checkpoint do not.
    """
    learner = build_learner(config, image_shape, config.episodes.test.num_ways, device)
    if checkpoint is not None and card is not None:
        params = load_tensors(checkpoint, card, "params.pt", device)
        require_fitting(checkpoint, params, learner.params | learner.moments)
        load_params(learner, params)
    return learner
