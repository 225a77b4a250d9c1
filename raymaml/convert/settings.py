"""Whole configurations of the reference, in our words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymaml.convert.model import unknown

Settings = dict[str, Any]

SOURCES: dict[str, tuple[str, tuple[list[float], list[float]]]] = {
    "meta-mini-imagenet": ("mini-imagenet", ([0.471, 0.450, 0.403], [0.278, 0.268, 0.284])),
    "meta-tiered-imagenet": ("tiered-imagenet", ([0.478, 0.456, 0.410], [0.279, 0.274, 0.286])),
    "meta-cifar-fs": ("cifar-fs", ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])),
    "meta-fc100": ("fc100", ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])),
    "meta-cub200": ("cub", ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])),
    "meta-inatural": ("inaturalist-2017", ([0.4905, 0.4961, 0.4330], [0.1737, 0.1713, 0.1779])),
}
"""Our source, and the mean and standard deviation the reference normalises by, by its name."""
SPLIT_BY_NAME = {"cub": {"split": "cub_100_50_50"}}
"""What a source has to be told beside; the reference reads CUB's classes from CSVs of one's own."""
TRAIN_KEYS = {
    "dataset",
    "train",
    "val",
    "load",
    "encoder",
    "encoder_args",
    "classifier",
    "classifier_args",
    "inner_args",
    "optimizer",
    "optimizer_args",
    "epoch",
    "_parallel",
    "_gpu",
}
TEST_KEYS = {"dataset", "test", "load", "inner_args", "epoch", "_parallel", "_gpu"}
SECTION_KEYS = {
    "root_path",
    "split",
    "image_size",
    "normalization",
    "transform",
    "val_transform",
    "n_batch",
    "n_episode",
    "n_way",
    "n_shot",
    "n_query",
}
SHAPE_KEYS = ("image_size", "n_way", "n_shot", "n_query", "n_episode")
SPLITS = {"train": "meta-train", "val": "meta-val", "test": "meta-test"}
DEFAULTS = {"n_batch": 200, "n_episode": 4, "n_way": 5, "n_shot": 1, "n_query": 15}
CLIP_VALUE = 10.0
"""The reference clips each entry of the meta-gradient at this value, always."""


def completed(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fill in data and outer loop where a configuration describes a model and its inner loop alone.

    Returns:
        A training configuration, and what to know about it.
    """
    if "encoder" not in config or {"train", "dataset", "optimizer"} & config.keys():
        return dict(config), []
    shape = {key: config[key] for key in SHAPE_KEYS if key in config}
    rest = {key: value for key, value in config.items() if key not in SHAPE_KEYS}
    example = {
        "dataset": "meta-mini-imagenet",
        "train": shape | {"normalization": False},
        "optimizer": "adam",
        "optimizer_args": {"lr": 0.001},
        "epoch": 300,
    }
    note = "the configuration says a model and its inner loop alone; data and outer are examples"
    return example | rest, [note]


def is_test_config(config: Mapping[str, Any]) -> bool:
    """Tell a test configuration of the reference from one for training."""
    return "test" in config and "train" not in config


def find_problems(train: Mapping[str, Any], test: Mapping[str, Any] | None) -> list[str]:
    """Return everything about two configurations that has no counterpart here."""
    problems = unknown("training configuration", train, TRAIN_KEYS)
    problems += [
        f"training configuration: {key} is missing"
        for key in ("dataset", "train", "encoder", "optimizer", "epoch")
        if not train.get(key)
    ]
    if test is not None:
        problems += unknown("test configuration", test, TEST_KEYS)
        problems += [f"test configuration: {k} is missing" for k in ("epoch",) if not test.get(k)]
        if test.get("dataset") != train.get("dataset"):
            problems.append(
                f"dataset: training says {train.get('dataset')!r}, the test"
                f" {test.get('dataset')!r}; raymaml tests on the data set that it trains on"
            )
    if train.get("dataset") not in SOURCES:
        problems.append(
            f"dataset: {train.get('dataset')!r} has no counterpart; there are {', '.join(SOURCES)}"
        )
    for name, section in _sections(train, test).items():
        problems += unknown(name, section, SECTION_KEYS)
        if section.get("split", SPLITS[name]) != SPLITS[name]:
            problems.append(f"{name}.split: {section['split']!r} is not {SPLITS[name]!r}")
    for key, default in (("image_size", 84), ("normalization", True)):
        values = {str(s.get(key, default)) for s in _sections(train, test).values()}
        if len(values) > 1:
            problems.append(
                f"{key}: the sections say {', '.join(sorted(values))}; raymaml has one for all"
            )
    return [*problems, *_optimizer_problems(train)]


def _optimizer_problems(train: Mapping[str, Any]) -> list[str]:
    arguments = train.get("optimizer_args") or {}
    known = {"lr", "weight_decay", "schedule", "milestones", "gamma"}
    problems = unknown("optimizer_args", arguments, known)
    if train.get("optimizer") not in {None, "adam", "sgd", "rmsprop"}:
        problems.append(f"optimizer: {train['optimizer']!r} is not adam, sgd or rmsprop")
    if "lr" not in arguments:
        problems.append("optimizer_args.lr is missing")
    if arguments.get("schedule", "step") not in {None, "step", "cosine"}:
        problems.append(f"optimizer_args.schedule: {arguments['schedule']!r} is not step or cosine")
    milestones, epochs = arguments.get("milestones"), train.get("epoch")
    if milestones and arguments.get("schedule") == "cosine" and milestones[-1] != epochs:
        problems.append(
            f"optimizer_args.milestones: the reference's cosine ends after {milestones[-1]} epochs"
            f" of {epochs}; ours spans the run"
        )
    return problems


def _sections(
    train: Mapping[str, Any], test: Mapping[str, Any] | None
) -> dict[str, Mapping[str, Any]]:
    found = {"train": train.get("train"), "val": train.get("val")}
    found["test"] = test.get("test") if test is not None else None
    return {name: section for name, section in found.items() if section}


def whole_config(
    train: Mapping[str, Any],
    test: Mapping[str, Any] | None,
    *,
    name: str,
    model: Settings,
    inner: Settings,
    test_inner: Settings | None,
) -> Settings:
    """Return our configuration for a training configuration and, maybe, one for its test.

    Args:
        train, test: of the reference, without problems.
        name: of the run.
        model, inner, test_inner: our sections for them.
    """
    sections = _sections(train, test)
    config: Settings = {
        "name": name,
        "data": _data(train["dataset"], sections, name),
        "episodes": {split: _episodes(split, sections, train, test) for split in SPLITS},
        "model": model,
        "inner": inner,
        "outer": _outer(train),
    }
    if test_inner is not None:
        changed = {k: v for k, v in test_inner.items() if inner[k] != v and k != "gradient"}
        config["evaluation"] = {"inner": changed}
    return config


def _data(dataset: str, sections: Mapping[str, Mapping[str, Any]], name: str) -> Settings:
    train = sections["train"]
    kind, moments = SOURCES[dataset]
    root = train.get("root_path") or f"materials/{dataset.removeprefix('meta-')}"
    normalized = train.get("normalization", True)
    augment = {
        split: {
            "support": section.get("transform") or "none",
            "query": section.get("val_transform") or "none",
        }
        for split, section in sections.items()
    }
    return {
        "source": {"kind": kind, "path": root} | SPLIT_BY_NAME.get(kind, {}),
        "bank": f"data/{kind}/bank",
        "shards": f"data/{kind}/episodes-{name}",
        "image_size": train.get("image_size", 84),
        "normalize": {"mean": moments[0], "std": moments[1]} if normalized else "none",
        "augment": augment,
    }


def _episodes(
    split: str,
    sections: Mapping[str, Mapping[str, Any]],
    train: Mapping[str, Any],
    test: Mapping[str, Any] | None,
) -> Settings:
    """The reference draws new training and test episodes each epoch, for validation the same."""
    section = DEFAULTS | dict(sections.get(split) or sections.get("val") or sections["train"])
    epochs = {"train": train["epoch"], "val": 1, "test": test["epoch"] if test else None}[split]
    in_epoch = section["n_batch"] * section["n_episode"]
    return {
        "num_ways": section["n_way"],
        "num_shots": section["n_shot"],
        "num_queries": section["n_query"],
        "num_episodes": 6000 if epochs is None else epochs * in_epoch,
    }


def _outer(train: Mapping[str, Any]) -> Settings:
    section = DEFAULTS | dict(train["train"])
    arguments = train["optimizer_args"]
    steps = section["n_batch"]  # outer steps an epoch
    outer: Settings = {
        "num_steps": train["epoch"] * steps,
        "meta_batch_size": section["n_episode"],
        "optimizer": train["optimizer"],
        "lr": float(arguments["lr"]),
        "weight_decay": float(arguments.get("weight_decay", 0.0)),
        "clip_value": CLIP_VALUE,
        "validate_every": steps,
    }
    if train["optimizer"] == "sgd":
        outer["momentum"] = 0.9
    milestones = arguments.get("milestones")
    if milestones and arguments.get("schedule", "step") == "cosine":
        outer["schedule"] = "cosine"
    elif milestones:
        outer["schedule"] = "step"
        outer["milestones"] = [epoch * steps for epoch in milestones]
        outer["gamma"] = float(arguments.get("gamma", 0.1))
    return outer


def default_name(train: Mapping[str, Any]) -> str:
    """Name a run as the reference names its folder."""
    section = DEFAULTS | dict(train.get("train") or {})
    data = str(train.get("dataset")).removeprefix("meta-")
    return f"{train.get('encoder')}-{data}-{section['n_way']}way-{section['n_shot']}shot"
