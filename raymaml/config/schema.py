"""Every option of raymaml: one frozen model per section, one line per field.

These models define the options; a YAML file sets their values. Unknown keys are errors, nothing is
inherited or interpolated, and values derived from others are properties, never stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from raymaml.common.errors import UserError
from raymaml.config.base import (
    Augmentation,
    Count,
    Number,
    PlaceField,
    PositiveInt,
    PositiveRate,
    Seconds,
    Section,
)
from raymaml.config.data_sources import Source
from raymaml.config.inner import RULE_ARGS, InnerConfig, InnerOverride
from raymaml.config.model import PRETRAIN, ModelConfig, OuterConfig
from raymaml.config.pretrain import PretrainConfig
from raymaml.storage.place import Place, is_in

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
OfSplit = TypeVar("OfSplit")


class BySplit(Section, Generic[OfSplit]):
    """The same section for each split."""

    train: OfSplit
    val: OfSplit
    test: OfSplit

    def of(self, split: Split) -> OfSplit:
        """Return the section of ``split``."""
        section: OfSplit = getattr(self, split)
        return section


class Moments(Section):
    """Mean and standard deviation of each channel, pixels in 0..1."""

    mean: Annotated[tuple[Number, ...], Field(min_length=1)]
    """Subtracted from the pixels."""
    std: Annotated[tuple[PositiveRate, ...], Field(min_length=1)]
    """The result is divided by it."""


class AugmentPair(Section):
    """flip: mirrored every second time; crop: shifted by up to 8 pixels, flip; color: crop, and
    brightness, contrast and saturation times 0.6 to 1.4; resize: a random part scaled to the whole,
    flip; enlarge: scaled up by 256/224 and cropped, without chance."""

    support: Augmentation = "none"
    """Change of the support images."""
    query: Augmentation = "none"
    """Change of the query images."""


class AugmentConfig(BySplit[AugmentPair]):
    """Random changes of images by split, seeded by episode."""

    train: AugmentPair = AugmentPair()
    val: AugmentPair = AugmentPair()
    test: AugmentPair = AugmentPair()


class DataConfig(Section):
    """The image bank and the episode shards."""

    source: Source
    """The data set that `raymaml data import` reads."""
    bank: PlaceField
    """Folder or URI of the image bank, which `raymaml data import` writes."""
    shards: PlaceField
    """Folder or URI of the episode shards that `raymaml data sample` writes."""
    cache: Path = Path("~/.cache/raymaml")
    """Folder on each machine for the one copy of a bank, or of shards, at a URI."""
    image_size: Annotated[int, Field(ge=8, le=1024, strict=True)] = 84
    """Height and width of the stored images, pixels."""
    materialize: bool = False
    """Write pixels instead of row numbers into the shards of the train split. They are large, and
    stream to nodes that do not mount the bank."""
    normalize: Annotated[
        Annotated[Literal["bank", "none"], Tag("by name")] | Annotated[Moments, Tag("given")],
        Discriminator(lambda value: "by name" if isinstance(value, str) else "given"),
    ] = "bank"
    """bank: subtract the mean and divide by the standard deviation of the bank's train split,
    channel by channel; none: pixels in 0..1; or {mean: [...], std: [...]}, for pixels in 0..1."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes of images."""


class EpisodesConfig(Section):
    """Shape and number of the episodes of one split."""

    num_ways: Annotated[int, Field(ge=2, strict=True)] = 5
    """Classes per episode (N)."""
    num_shots: PositiveInt = 1
    """Support images per class (K)."""
    num_queries: PositiveInt = 15
    """Query images per class (Q)."""
    num_episodes: Annotated[PositiveInt, Field(le=10_000_000)]
    """Number of episodes to sample, at most 10,000,000; 6,000 by default for test. Training repeats
    them when it needs more; judging takes the first where the shards hold more."""

    @property
    def images_per_class(self) -> int:
        """Distinct images that an episode takes from each of its classes."""
        return self.num_shots + self.num_queries


class AllEpisodes(BySplit[EpisodesConfig]):
    """The episodes of the three splits. The default number for test is 6,000."""

    seed: Count = 0
    """Decides which episodes are sampled, and how those of val and test are augmented. Runs that
    differ in the top-level `seed` alone share episodes, and are judged on the same ones."""
    fit_queries: bool = False
    """Take fewer queries in a split whose smallest class has fewer than num_shots + num_queries
    images: as many as that class leaves."""

    @model_validator(mode="before")
    @classmethod
    def _test_has_a_default_number(cls, sections: Any) -> Any:
        if not isinstance(sections, dict) or not isinstance(sections.get("test", {}), dict):
            return sections
        return {**sections, "test": {"num_episodes": 6_000, **sections.get("test", {})}}


class EvaluationConfig(Section):
    """The campaign over the test episodes."""

    inner: InnerOverride = InnerOverride()
    """Changes to `inner` at validation and test."""
    head: Literal["model", "cosine"] = "model"
    """The classifier of validation and test: the model, adapted; or NIL (Raghu et al. 2020), which
    takes no inner step: the logit of a class is the mean cosine of the query's features and those
    of its support images."""
    checkpoint: Literal["best", "last", "ensemble"] = "best"
    """Which checkpoint is tested: best validation accuracy; the newest; or all best ones that the
    run has kept (`outer.keep_best`), by the mean of their logits (MAML++)."""
    other_bank: bool = False
    """Judge on another bank than that of training. The report says so, and counts the test classes
    that training has seen."""
    chunk_size: PositiveInt = 500
    """Episodes per Tune trial. Records do not depend on it."""
    target_half_width: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Stop judging once the half-width of the accuracy's confidence sequence (95%, valid at every
    look) is at most this, 0..1; null: judge all test episodes."""
    baseline_episodes: Count = 600
    """Number of first test episodes that judge the two baselines: the untrained weights with
    adaptation, and the trained weights without it. The second is left out where the head is zero or
    shared (all logits are equal then) or no inner step is taken. 0 judges neither."""


class ClusterConfig(Section):
    """Processes and devices."""

    num_workers: PositiveInt | Literal["auto"] = "auto"
    """Number of training workers, and maximum number of chunks judged at once; auto: one per GPU,
    or one per CPU core where there is no GPU. On CPU the result does not depend on it."""
    min_workers: PositiveInt | None = None
    """Minimum number of workers: training takes as many as there is room for, up to `num_workers`
    (auto: one per chunk of a meta-batch), while nodes come and go; null: always `num_workers`."""
    wait_seconds: Seconds = 600
    """Seconds to wait for room for enough workers, at the start and after a loss. Then the run
    stops (the same command resumes it)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the cluster has GPUs."""
    threads_per_worker: Annotated[PositiveInt, Field(le=1024)] = 1
    """Intra-op threads of a CPU worker, at most 1,024. Results are bit-equal for equal values
    only."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """float32; tf32: convolutions and products of a GPU with 10 bits of mantissa; bf16: autocast,
    convolutions and products in bfloat16, weights, sums and losses in float32."""
    deterministic: bool = False
    """On a GPU, the same bits in each run, by deterministic kernels; what has none is refused. Runs
    on CPU always repeat to the bit."""
    reduction: Literal["exact", "fast"] = "exact"
    """exact: gradients added up in episode order. fast: by one all-reduce, equal to rounding."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Layout of images, where it makes a difference: auto is channels_last on CPU."""
    kernels: Annotated[
        Literal["auto", "off"],
        BeforeValidator(lambda value: "off" if value is False else value),  # as YAML reads off
    ] = "auto"
    """auto: ConvNet4 trains and is judged on CPU by raymaml's own kernels, in about a third of
    the time, where there is a C++ compiler for their one build (2 to 6 s). Results are bit-equal
    for equal values only."""
    keep_freed_memory: bool = True
    """Keep freed memory in a CPU process (glibc's mmap and trim thresholds at 1 GiB, one arena).
    Otherwise glibc returns it to the kernel, and every reuse costs page faults."""
    episodes_per_chunk: PositiveInt | Literal["auto"] = "auto"
    """Episodes that a worker computes at once, in training and evaluation; results are equal to
    rounding. auto: as many of its share as the memory of its GPU allows; on CPU 1, which is fastest
    there."""
    cuda_graphs: bool = True
    """On a GPU, record the computation of episodes at once, and replay it without Python. What
    cannot be recorded is computed as ever, and a line says why."""
    grace_seconds: Seconds = 20
    """Seconds after SIGTERM in which the current step may end. Then the process ends and keeps the
    last checkpoint. Stay below the 30 s after which Kubernetes and Slurm kill."""
    max_failures: Count = 3
    """Maximum number of replacements of lost workers without a checkpoint in between. Then the run
    stops (the same command resumes it). For judging: maximum number of retries per chunk."""
    timeout: Annotated[PositiveInt, Field(le=10_000_000)] = 600
    """Seconds after which a training worker that does not answer counts as lost. Choose more than
    a validation and the writing of a checkpoint take."""

    @property
    def episodes_together(self) -> int:
        """Number of training episodes that always stay together on one worker."""
        return 1 if self.episodes_per_chunk == "auto" else self.episodes_per_chunk

    @model_validator(mode="after")
    def _minimum_is_within(self) -> ClusterConfig:
        most = self.num_workers
        if self.min_workers is not None and most != "auto" and self.min_workers > most:
            raise ValueError(
                f"cluster.min_workers is {self.min_workers} but cluster.num_workers, the most, is"
                f" {most}; lower the one or raise the other"
            )
        return self


class Config(Section):
    """One experiment, from its images to its report."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run and of its folder."""
    seed: Count = 0
    """Decides the initial weights, dropout, the augmentation of the training episodes, and the
    first training episode. `episodes.seed` decides which episodes there are."""
    run_dir: PlaceField = Path("runs")
    """Folder or URI that holds the run folders."""
    data: DataConfig
    episodes: AllEpisodes
    model: ModelConfig = ModelConfig()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig
    pretrain: PretrainConfig | None = None
    """The step before: `raymaml pretrain`. null: there is none."""
    stage: Literal["train", "pretrain"] = "train"
    """pretrain: the run is the pretraining. `raymaml pretrain` sets it in the config of its run."""
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def run_folder(self) -> Place:
        """Folder of this run: checkpoints, metrics, records, report."""
        return self.run_dir / self.name

    @property
    def test_inner(self) -> InnerConfig:
        """The inner loop of validation and test."""
        inner = self.evaluation.inner.apply(self.inner)
        steps = 0 if self.evaluation.head == "cosine" else inner.num_steps
        return inner.model_copy(update={"num_steps": steps})

    @property
    def steps(self) -> OuterConfig | PretrainConfig:
        """The steps by which this run learns."""
        return self.pretrain if self.stage == "pretrain" and self.pretrain else self.outer

    @property
    def pretraining(self) -> Config:
        """The config of the pretraining: the run `<name>-pretrain`.

        `model.weights` of training may name this run; it starts from random weights then.

        Raises:
            UserError: the config has no section `pretrain`.
        """
        if self.pretrain is None:
            raise UserError(
                "pretrain is missing: the config does not say how to pretrain",
                remedy="add a section, such as pretrain: {num_steps: 5000}",
            )
        name = self.name if self.stage == "pretrain" else f"{self.name}-pretrain"
        weights = self.model.weights
        own = weights == PRETRAIN or (weights and is_in(weights, self.run_dir / name))
        model = self.model.model_copy(update={"weights": None}) if own else self.model
        return self.model_copy(update={"name": name, "stage": "pretrain", "model": model})

    @property
    def stages(self) -> tuple[Config, ...]:
        """The configs of the runs that this one consists of, in their order."""
        return (self.pretraining, self) if self.model.weights == PRETRAIN else (self,)

    @property
    def learning(self) -> dict[str, Any]:
        """The keys that decide the weights, which a resumed run may not change, in their sections.

        Everything else (workers, devices, rhythm of logging, evaluation) may change when a run
        resumes; so may the number of outer steps, unless a schedule depends on it.
        """
        free = {"log_every", "validate_every", "checkpoint_every", "keep_best"}
        if self.steps.schedule != "cosine":
            free.add("num_steps")
        data: dict[str, Any] = {"image_size": True, "normalize": True}
        cluster = {"threads_per_worker", "precision", "memory_format", "kernels"}
        include: dict[str, Any] = {
            **{"seed": True, "stage": True, "model": True, "data": data, "cluster": cluster},
            self.steps.section: set(type(self.steps).model_fields) - free,
        }
        if self.stage == "train":
            data["augment"] = {"train"}
            later = {"deterministic", "reduction"}  # older runs have neither
            cluster |= {"episodes_per_chunk", *(later & {*self.cluster.changed})}
            inner = set(InnerConfig.model_fields) - {"tape_memory"}
            include |= {"episodes": {"seed", "train"}, "inner": inner}
        found = self.model_dump(mode="json", include=include)
        if found["cluster"].get("episodes_per_chunk") == "auto":  # on CPU the same
            found["cluster"]["episodes_per_chunk"] = 1
        return found

    @property
    def validating(self) -> dict[str, Any]:
        """The keys that decide a validation beside weights, bank and seeds, in their sections."""
        include: Any = {"episodes": {"val"}, "data": {"augment": {"val"}}}
        if self.stage == "pretrain":  # by class means: nothing adapts
            return self.model_dump(mode="json", include=include)
        inner = self.evaluation.inner.apply(self.inner)
        settings = inner.model_dump(mode="json", exclude={"gradient", "tape_memory"})
        evaluation = {"inner": settings, "head": self.evaluation.head}
        return {**self.model_dump(mode="json", include=include), "evaluation": evaluation}

    @model_validator(mode="after")
    def _pretraining_has_its_section(self) -> Config:
        asks = {"stage": self.stage, "model.weights": self.model.weights}
        if self.pretrain is None and (keys := [key for key, it in asks.items() if it == PRETRAIN]):
            raise ValueError(
                f"{' and '.join(keys)}: pretrain, but there is no section pretrain; add it"
            )
        return self

    @model_validator(mode="after")
    def _inner_loops_fit(self) -> Config:
        test = self.evaluation.inner
        for split in SPLITS:
            key, inner = "inner", self.inner
            if split != "train":
                key, inner = "evaluation.inner", test.apply(self.inner)
            count = self.episodes.of(split).num_ways * self.episodes.of(split).num_shots
            size = inner.support_batch_size
            if size is not None and size > count:
                raise ValueError(
                    f"{key}.support_batch_size is {size}, but a support set of episodes.{split} has"
                    f" {count} images"
                )
        if test.momentum and self.inner.rule != "sgd":
            raise ValueError(
                f"evaluation.inner.momentum is {test.momentum} but inner.rule is"
                f" {self.inner.rule}: momentum belongs to sgd"
            )
        if self.inner.rates != "fixed" and not (test.lr is test.head_lr is None):
            raise ValueError(
                f"evaluation.inner.lr, evaluation.inner.head_lr: inner.rates is {self.inner.rates},"
                " and evaluation takes the learned rates; leave them out"
            )
        own_rule = self.inner.rule not in RULE_ARGS  # which may have tensors to learn
        if self.outer.rule_lr is not None and not (self.inner.learns or own_rule):
            raise ValueError(
                f"outer.rule_lr is {self.outer.rule_lr} but the rule learns nothing: set"
                " inner.rates or inner.learned, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _ensemble_has_members(self) -> Config:
        if self.evaluation.checkpoint == "ensemble" and self.outer.keep_best == 1:
            raise ValueError(
                "evaluation.checkpoint is ensemble but outer.keep_best is 1: the run keeps one best"
                " checkpoint; set outer.keep_best: 5"
            )
        return self

    @model_validator(mode="after")
    def _learned_head_keeps_its_ways(self) -> Config:
        ways = {split: self.episodes.of(split).num_ways for split in SPLITS}
        if self.model.head == "learned" and len(set(ways.values())) > 1:
            raise ValueError(
                f"episodes.*.num_ways are {ways} but model.head is learned: a learned head has"
                " one row a way, so the ways must be equal (or set model.head: zero)"
            )
        return self
