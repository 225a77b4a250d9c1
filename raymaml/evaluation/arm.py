"""An arm of a campaign: its episodes, its model, its records, and the identity of these."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch

from raymaml.common.errors import UserError
from raymaml.config.inner import InnerConfig
from raymaml.config.model import ModelConfig
from raymaml.config.schema import AllEpisodes, Config, DataConfig
from raymaml.data.bank import ImageBank
from raymaml.data.sampling import spec_in
from raymaml.data.shard_format import SCHEMA_VERSION as ORDER
from raymaml.evaluation.examination import (
    EPISODES,
    examine,
    read_examination,
    write_examination,
)
from raymaml.evaluation.judge import judge
from raymaml.evaluation.model import MODELS, JudgedModel, by_graphs, ensemble
from raymaml.evaluation.record_files import (
    chunk_path,
    leading_accuracies,
    missing_chunks,
    read_chunk,
    read_circumstances,
    read_records,
    recorded,
    write_chunk,
)
from raymaml.evaluation.records import identity_of, record_arrays
from raymaml.evaluation.results import ArmResult, OtherBank, Protocol, leak_remarks, other_bank
from raymaml.meta.learner import MetaLearner
from raymaml.models.source import encoder_source, rule_source
from raymaml.seeding import fold_in
from raymaml.statistics.confidence_sequence import Stopping
from raymaml.storage.files import reaching
from raymaml.storage.place import Place
from raymaml.training.at_once import AtOnce, judging_at_once
from raymaml.training.checkpoint import CheckpointCard, load_weights, read_card, versions
from raymaml.training.data import EpisodeSet, open_bank, open_episode_sets
from raymaml.training.explain import explained
from raymaml.training.state import build_learner
from raymaml.training.weights import start_from_weights, weights_hash

CODE = ("versions", "encoder_source", "rule_source")
"""The keys of an identity that name the code; a report of finished records does not depend on
them."""


class Shared:
    """The parts that the arms of a campaign have in common, each opened once, for one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._opened: dict[str, tuple[ImageBank, EpisodeSet]] = {}
        self._codes: dict[str, dict[str, str]] = {}
        self._last: tuple[Arm, JudgedModel] | None = None

    def data(self, data: DataConfig, episodes: AllEpisodes) -> tuple[ImageBank, EpisodeSet]:
        """Return the bank and the test episodes."""
        shape = episodes.test.model_dump(exclude={"num_episodes"})
        key = json.dumps([episodes.seed, data.model_dump(mode="json"), shape])
        if key not in self._opened:
            bank = open_bank(data)
            sets = open_episode_sets(data, episodes, bank, ("test",), self.device)
            self._opened[key] = bank, sets["test"]
        return self._opened[key]

    def model_of(self, arm: Arm) -> JudgedModel:
        """Return the model of an arm, which is built once while no other arm is judged."""
        if self._last is None or self._last[0] is not arm:
            self._last = arm, arm.build()
        return self._last[1]

    def code(self, model: ModelConfig, inner: InnerConfig) -> dict[str, str]:
        """Return the identity of the code: versions, and the files of one's own encoder and rule.

        It is found once a process: a later edit does not change the code that this process runs.
        """
        key = model.model_dump_json() + inner.rule
        if key not in self._codes:
            sources = {"encoder_source": encoder_source(model), "rule_source": rule_source(inner)}
            own = {name: source for name, source in sources.items() if source is not None}
            self._codes[key] = {"versions": json.dumps(versions(model), sort_keys=True), **own}
        return self._codes[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Arm:
    """One setting of a campaign. To make one opens its data, and reads its checkpoints.

    Raises:
        UserError: bank, episodes or checkpoints are missing, damaged, or do not fit, or the bank is
            not the one of training, and the config does not ask for another.
    """

    name: str
    description: str
    config: Config
    """As it is judged: model, head and inner loop at test, test episodes, precision."""
    checkpoints: tuple[Place, ...]
    """Weights to judge, of several the ensemble; none: the initial ones."""
    num_episodes: int
    target_half_width: float | None
    """Judging ends once the accuracy is known to this, 0..1; None: at the last episode."""
    folder: Place
    """Holds the records: those of one identity in ``<folder>/<digest of the identity>``."""
    shared: Shared = field(repr=False)
    code: Mapping[str, str] | None = None
    """The part of the identity that names the code; None: the code of this process, for which an
    encoder of one's own is imported."""

    def __post_init__(self) -> None:
        _ = self.episodes, self.identity, self.other_bank  # what does not fit is found here

    @property
    def bank(self) -> ImageBank:
        """The bank of the test episodes."""
        return self.shared.data(self.config.data, self.config.episodes)[0]

    @property
    def episodes(self) -> EpisodeSet:
        """The test episodes."""
        return self.shared.data(self.config.data, self.config.episodes)[1]

    @cached_property
    def cards(self) -> tuple[CheckpointCard, ...]:
        """The cards of the checkpoints."""
        return tuple(map(read_card, self.checkpoints))

    @cached_property
    def other_bank(self) -> OtherBank | None:
        """The bank, where it is not the one of training."""
        asked = self.config.evaluation.other_bank
        found = [other_bank(each, self.bank, asked=asked) for each in self.checkpoints]
        return found[0] if found else None

    @cached_property
    def identity(self) -> dict[str, str]:
        """The values that decide a record: the settings, and the code."""
        config, head = self.config, self.config.evaluation.head
        weights = [card.files[card.weights] for card in self.cards]
        spec = config.episodes.test.model_dump(exclude={"num_episodes"})
        return {
            "weights": " ".join(weights) or self._initial_weights(),
            "model": config.model.model_dump_json(exclude={"weights"}),
            "inner": config.test_inner.of_records(),
            **({} if head == "model" else {"head": head}),
            "precision": config.cluster.precision,
            "memory_format": config.cluster.memory_format,
            "normalize": json.dumps(config.data.model_dump(mode="json")["normalize"]),
            "augment": config.data.augment.test.model_dump_json(),
            "bank": self.bank.hash,
            "order": str(ORDER),
            "episodes": json.dumps({"seed": config.episodes.seed, "split": "test", **spec}),
            **(self.shared.code(config.model, config.inner) if self.code is None else self.code),
        }

    @cached_property
    def at_once(self) -> AtOnce:
        """The number of episodes at once, on which no record depends but by rounding."""
        return judging_at_once(self.config.cluster, self.config.test_inner, self.shared.device)

    @property
    def records(self) -> Place:
        """Folder of the records."""
        digest = fold_in(0, json.dumps(self.identity, sort_keys=True))
        return self.folder / f"{digest:016x}"

    @property
    def stopping(self) -> Stopping | None:
        """The rule that ends judging early; None: there is none."""
        target = self.target_half_width
        if target is None:
            return None
        return Stopping(target_half_width=target, most_episodes=self.num_episodes)

    @property
    def was_edited(self) -> bool:
        """Whether the code of the user's encoder changed after training."""
        trained = {card.encoder_source for card in self.cards} - {None}
        return bool(trained - {self.identity.get("encoder_source")})

    def build(self) -> JudgedModel:
        """Build the model to judge.

        Raises:
            UserError: as ``learners``.
        """
        first, *others = map(self._judged, self.learners())
        return ensemble([first, *others]) if others else first

    def _judged(self, learner: MetaLearner) -> JudgedModel:
        head = self.config.evaluation.head
        model = MODELS[head](learner)
        return by_graphs(model, learner, self.config.cluster) if head == "model" else model

    def learners(self) -> list[MetaLearner]:
        """Build a learner with the weights of each checkpoint, or one with the initial ones.

        Raises:
            UserError: the model cannot be built, name patterns do not fit it, or the weights of a
                checkpoint do not.
        """
        return [self._learner(each) for each in self.checkpoints or (None,)]

    def _learner(self, checkpoint: Place | None) -> MetaLearner:
        config, device = self.config, self.shared.device
        num_ways = config.episodes.test.num_ways
        learner = build_learner(config, self.bank.image_shape, num_ways, device)
        if checkpoint is not None:
            load_weights(learner, checkpoint, device)
        else:
            start_from_weights(config, learner.model, self.bank.image_shape)
        return learner

    def _initial_weights(self) -> str:
        start = weights_hash(self.config, self.bank.image_shape)
        return f"initial, seed {self.config.seed}" + (f", from {start}" if start else "")

    def of_any_code(self) -> list[dict[str, str]]:
        """Return the identities of records of these settings, by any code, the newest first."""
        with reaching(self.folder):
            paths: list[Place] = sorted(self.folder.glob("*/*.parquet"), key=str)
            files = {path.parent: path for path in paths}
            newest = sorted(files.values(), key=lambda path: path.stat().st_mtime, reverse=True)
        settings, found = without_code(self.identity), []
        for path in newest:
            with suppress(UserError):  # what is torn is no record
                identity = identity_of(read_chunk(path))
                if without_code(identity) == settings:
                    found.append(identity)
        return found

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
        episodes, accuracies = recorded(self.records, self.identity)
        return list(accuracies[episodes < self.needed()])

    def judge(self, indices: range) -> list[float]:
        """Judge these episodes, write their records, and return their accuracies.

        The chunk that holds the first episode also examines the model.
        """
        cluster, require_unaltered = self.config.cluster, self.episodes.watch.require
        with explained(self.config.run_folder, cluster, require=require_unaltered):
            model = self.shared.model_of(self)
            if indices.start == 0:
                some = self.episodes.load(range(min(EPISODES, self.num_episodes)))
                examination = examine(model.by_step, model.company, some, cluster.precision)
                write_examination(self.records, examination)
            records = list(judge(model.by_step, self.episodes, indices, self.at_once))
            require_unaltered()
            path = chunk_path(self.records, indices.start, len(indices))
            write_chunk(path, records, self.identity, self._circumstances())
        return [record["accuracy"] for record in records]

    def _circumstances(self) -> dict[str, str]:
        return {
            "config": f"{fold_in(0, self.config.model_dump_json()):016x}",
            "manifest": self.episodes.shards.manifest_hash,
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {self.shared.device.type},"
            f" {self.config.cluster.threads_per_worker} thread(s)",
        }

    def result(self) -> ArmResult:
        """Return the records of a finished arm, as a report shows them.

        Raises:
            UserError: records are missing or damaged, or name images that the bank does not hold.
        """
        other, bank = self.other_bank, self.bank
        records = read_records(self.records, self.needed(), self.identity)
        if not record_arrays(records).are_of_bank(len(bank.classes), bank.num_images):
            raise UserError(
                f"{self.records}: its records name images that the bank {bank.folder} does not"
                " hold",
                remedy="move it away and run `raymaml test` again",
            )
        return ArmResult(
            name=self.name,
            description=self.description,
            protocol=Protocol(
                spec=spec_in(bank, self.config.episodes, "test"),
                model=self.config.model,
                head=self.config.evaluation.head,
                num_steps=self.config.test_inner.num_steps,
                members=max(1, len(self.checkpoints)),
                examination=read_examination(self.records),
                remarks=[
                    *([other.text] if other else []),
                    *(["encoder edited after training"] if self.was_edited else []),
                    *leak_remarks(bank),
                ],
            ),
            records=records,
            stopping=self.stopping,
            circumstances=read_circumstances(self.records),
            identity={
                "checkpoint": ", ".join(sorted(each.name for each in self.checkpoints)) or "none",
                **self.identity,
                "source": bank.source,
                "licence": bank.licence,
                **({"test_classes_trained_on": other.trained_on} if other else {}),
            },
        )


def without_code(identity: Mapping[str, str]) -> dict[str, str]:
    """Return the part of an identity that the settings decide."""
    return {key: value for key, value in identity.items() if key not in CODE}


def code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """Yield how the code of records, ``before``, differs from that of ``now``."""
    had, has = (json.loads(each.get("versions", "{}")) for each in (before, now))
    for name, version in has.items():
        if had.get(name) != version:
            yield f"{name} {had.get(name)} (now {version})"
    if before.get("encoder_source") != now.get("encoder_source"):
        yield f"another source of model.encoder {json.loads(now['model'])['encoder']}"
    if before.get("rule_source") != now.get("rule_source"):
        yield f"another source of inner.rule {json.loads(now['inner'])['rule']}"
