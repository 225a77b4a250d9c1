"""Configurations of the reference, in our words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raymaml.common.errors import UserError
from raymaml.common.patterns import matches
from raymaml.config.model import ModelConfig
from raymaml.convert.reference import Data, InnerArguments, Model, Testing, Training, their_names
from raymaml.models import build_model
from raymaml.models.heads import Classifier

Settings = dict[str, Any]

ENCODERS: dict[str, Settings] = {
    "convnet4": {"encoder": "convnet4", "width": 32},
    "wide-convnet4": {"encoder": "convnet4", "width": 64},
    "resnet12": {"encoder": "resnet12", "width": [64, 128, 256, 512]},
    "wide-resnet12": {"encoder": "resnet12", "width": [64, 160, 320, 640]},
    "resnet18": {"encoder": "resnet10", "width": [64, 128, 256, 512]},
    "wide-resnet18": {"encoder": "resnet10", "width": [64, 160, 320, 640]},
}
SOURCES: dict[str, tuple[str, list[float], list[float]]] = {
    "meta-mini-imagenet": ("mini-imagenet", [0.471, 0.450, 0.403], [0.278, 0.268, 0.284]),
    "meta-tiered-imagenet": ("tiered-imagenet", [0.478, 0.456, 0.410], [0.279, 0.274, 0.286]),
    "meta-cifar-fs": ("cifar-fs", [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    "meta-fc100": ("fc100", [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    "meta-cub200": ("cub", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "meta-inatural": ("inaturalist-2017", [0.4905, 0.4961, 0.4330], [0.1737, 0.1713, 0.1779]),
}
"""Our kind of source, and the mean and standard deviation by which the reference normalises."""
ZERO_STANDS_FOR = {"n_step": 5, "encoder_lr": 0.01, "classifier_lr": 0.01}
CLIP_VALUE = 10.0
"""The reference clips each entry of the meta-gradient at this value, always."""


def whole_config(
    model: Model, train: Training, test: Testing | None, name: str | None
) -> tuple[Settings, list[str]]:
    """Return our configuration, and notes where the reference deviates from its own settings.

    Args:
        model: that of the checkpoint, or of the training configuration.
        train, test: configurations of the reference.
        name: of the run; the reference's name for it if None.

    Raises:
        UserError: naming everything in which the parts disagree.
    """
    parts = {"train": train.train, "val": train.val, "test": test.test if test else None}
    sections = {split: section for split, section in parts.items() if section is not None}
    if problems := _disagreements(train, test, sections):
        raise UserError(*problems)
    _, theirs = built_model(model, train.inner_args, train.train)
    inner, notes = inner_settings(train.inner_args, theirs)
    if name is None:
        data = train.dataset.removeprefix("meta-")
        name = f"{model.encoder}-{data}-{train.train.n_way}way-{train.train.n_shot}shot"
    config: Settings = {
        "name": name,
        "data": _data(train, sections, name),
        "episodes": {split: _episodes(split, train, test) for split in ("train", "val", "test")},
        "model": model_settings(model, train.inner_args),
        "inner": inner,
        "outer": _outer(train),
    }
    if test is not None:
        judged, of_test = inner_settings(test.inner_args, theirs)
        notes += [f"test: {note}" for note in of_test]
        changed = {k: v for k, v in judged.items() if inner[k] != v and k != "gradient"}
        config["evaluation"] = {"inner": changed}
    if ENCODERS[model.encoder]["encoder"] == "resnet10":
        notes.append(f"model.encoder: the reference's {model.encoder} has one block per stage")
    if train.dataset == "meta-cub200":
        notes.append("data.source.split: the reference reads its classes from CSVs; check the name")
    return config, notes


def model_settings(model: Model, inner: InnerArguments) -> Settings:
    """Return our ``model`` section."""
    norms, head = model.encoder_args.bn_args, model.classifier_args
    return {
        **ENCODERS[model.encoder],
        "norm": _norm(model),
        "norm_momentum": norms.momentum,
        "norm_eps": norms.eps,
        "head": "zero" if inner.reset_classifier else "learned",
        "temperature": head.temp,
        "learn_temperature": head.learn_temp,
    }


def _norm(model: Model) -> str | dict[str, str]:
    """Return the norm policy, or the policies by block."""
    norms, blocks = model.encoder_args.bn_args, model.blocks
    if not norms.track_running_stats:
        return "transductive"
    if set(norms.episodic) == set(blocks):
        return "tasknorm_reference" if norms.alpha else "episodic_biased"
    if not norms.episodic:
        return "running"
    return {blocks[block]: "episodic_biased" for block in norms.episodic} | {"*": "running"}


def built_model(
    model: Model, inner: InnerArguments, data: Data
) -> tuple[Classifier, dict[str, str]]:
    """Return the model with new weights, and the reference's name of each parameter."""
    built = build_model(
        ModelConfig.model_validate(model_settings(model, inner)),
        image_shape=(3, data.image_size, data.image_size),
        num_ways=model.classifier_args.n_way or data.n_way,
        seed=0,
    )
    return built, their_names(built, dict(built.named_parameters()))


def inner_settings(inner: InnerArguments, theirs: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """Return our ``inner`` section, and notes on settings that the reference reads in its own way.

    Args:
        inner: of the reference.
        theirs: the reference's name of each of our parameters.
    """
    notes = [
        f"inner_args.{key}: 0 stands for {default} in the reference, and is converted so"
        for key, default in ZERO_STANDS_FOR.items()
        if not getattr(inner, key)
    ]
    notes += [
        f"inner_args.frozen: {text[:100]!r} is in no name and froze nothing; left out"
        for text in inner.frozen
        if not any(text in name for name in theirs.values())
    ]
    settings = {
        "num_steps": inner.n_step or ZERO_STANDS_FOR["n_step"],
        "lr": inner.encoder_lr or ZERO_STANDS_FOR["encoder_lr"],
        "head_lr": inner.classifier_lr or ZERO_STANDS_FOR["classifier_lr"],
        "momentum": inner.momentum,
        "weight_decay": inner.weight_decay,
        "frozen": _frozen_patterns(inner.frozen, theirs),
        "gradient": "first_order" if inner.first_order else "unrolled",
    }
    return settings, notes


def _frozen_patterns(texts: Sequence[str], theirs: Mapping[str, str]) -> list[str]:
    """Return the widest patterns for the parameters whose name in the reference holds a text."""
    chosen = {ours for ours, name in theirs.items() if any(text in name for text in texts)}
    parts = [name.split(".") for name in theirs]
    prefixes = [".".join(part[:depth]) for depth in range(1, 10) for part in parts]
    candidates = dict.fromkeys(["encoder", "head", "*.norm", *prefixes])  # from the widest on
    patterns: list[str] = []
    left = set(chosen)
    for pattern in candidates:
        inside = {ours for ours in theirs if matches(pattern, ours)}
        if inside & left and inside <= chosen:
            patterns.append(pattern)
            left -= inside
    return patterns


def _disagreements(
    train: Training, test: Testing | None, sections: Mapping[str, Data]
) -> list[str]:
    """Return a problem for each setting that differs and that raymaml has once."""
    files = [each for each in (train, test) if each is not None]
    given: dict[str, list[Any]] = {
        "image_size": [section.image_size for section in sections.values()],
        "normalization": [section.normalization for section in sections.values()],
        "dataset": [each.dataset for each in files],
        "inner_args.reset_classifier": [each.inner_args.reset_classifier for each in files],
    }
    return [
        f"{split}.split: {section.split[:100]!r} is not 'meta-{split}'"
        for split, section in sections.items()
        if section.split not in (None, f"meta-{split}")
    ] + [
        f"{key}: the sections say {', '.join(sorted(set(map(str, values))))}; raymaml has one for"
        " all"
        for key, values in given.items()
        if len(set(values)) > 1
    ]


def _data(train: Training, sections: Mapping[str, Data], name: str) -> Settings:
    kind, mean, std = SOURCES[train.dataset]
    root = train.train.root_path or f"materials/{train.dataset.removeprefix('meta-')}"
    source = {"kind": kind, "path": root}
    if kind == "cub":  # the reference reads the classes from a user's own CSVs
        source["split"] = "cub_100_50_50"
    return {
        "source": source,
        "bank": f"data/{kind}/bank",
        "shards": f"data/{kind}/episodes-{name}",
        "image_size": train.train.image_size,
        "normalize": {"mean": mean, "std": std} if train.train.normalization else "none",
        "augment": {
            split: {"support": section.transform, "query": section.val_transform}
            for split, section in sections.items()
        },
    }


def _episodes(split: str, train: Training, test: Testing | None) -> Settings:
    """The reference draws new training and test episodes each epoch, for validation the same."""
    val = train.val or train.train
    section, epochs = {
        "train": (train.train, train.epoch),
        "val": (val, 1),
        "test": (test.test, test.epoch) if test else (val, None),
    }[split]
    return {
        "num_ways": section.n_way,
        "num_shots": section.n_shot,
        "num_queries": section.n_query,
        "num_episodes": 6000 if epochs is None else epochs * section.n_batch * section.n_episode,
    }


def _outer(train: Training) -> Settings:
    rule, steps = train.optimizer_args, train.train.n_batch  # outer steps per epoch
    outer: Settings = {
        "num_steps": train.epoch * steps,
        "meta_batch_size": train.train.n_episode,
        "optimizer": train.optimizer,
        "lr": rule.lr,
        "weight_decay": rule.weight_decay,
        "clip_value": CLIP_VALUE,
        "validate_every": steps,
    }
    if train.optimizer == "sgd":
        outer["momentum"] = 0.9
    if rule.milestones and rule.schedule == "cosine":
        outer["schedule"] = "cosine"
    elif rule.milestones:
        outer["schedule"] = "step"
        outer["milestones"] = [epoch * steps for epoch in rule.milestones]
        outer["gamma"] = rule.gamma
    return outer
