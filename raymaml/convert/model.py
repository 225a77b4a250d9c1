"""The reference's settings of model and inner loop, in our words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from raymaml.common.errors import UserError
from raymaml.common.patterns import matches
from raymaml.common.untrusted import shortened
from raymaml.config.base import Section

ENCODERS: dict[str, dict[str, Any]] = {
    "convnet4": {"encoder": "convnet4", "width": 32},
    "wide-convnet4": {"encoder": "convnet4", "width": 64},
    "resnet12": {"encoder": "resnet12", "width": (64, 128, 256, 512)},
    "wide-resnet12": {"encoder": "resnet12", "width": (64, 160, 320, 640)},
    "resnet18": {"encoder": "resnet10", "width": (64, 128, 256, 512)},
    "wide-resnet18": {"encoder": "resnet10", "width": (64, 160, 320, 640)},
}
_CONV = {f"conv{i}": f"encoder.conv{i}" for i in range(1, 5)}
_LAYER = {f"layer{i}": f"encoder.layer{i}" for i in range(1, 5)}
BLOCKS = {"convnet4": _CONV, "resnet12": _LAYER, "resnet10": {"layer0": "encoder.stem"} | _LAYER}
"""The blocks whose norms the reference can make episodic, by our encoder."""
NORM_KEYS = {
    "track_running_stats",
    "episodic",
    "n_episode",
    "alpha",
    "momentum",
    "eps",
    "affine",
}
INNER_KEYS = {
    "reset_classifier",
    "n_step",
    "encoder_lr",
    "classifier_lr",
    "momentum",
    "weight_decay",
    "first_order",
    "frozen",
}


def merged(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Let a checkpoint say the model; the reference builds it from there, whatever a config says.

    Raises:
        UserError: neither says the encoder.
    """
    keys = ("encoder", "encoder_args", "classifier", "classifier_args")
    result = dict(config) | {key: saved[key] for key in keys if key in saved}
    if "encoder" not in result:
        raise UserError(
            "the reference's configuration names no encoder (a test configuration does not): give"
            " its checkpoint, or the training configuration, as well"
        )
    return result


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return our ``model`` section.

    Raises:
        UserError: naming everything that has no counterpart.
    """
    problems: list[str] = []
    name = config["encoder"]
    if name not in ENCODERS:
        problems.append(f"encoder: {name!r} is none of the reference's, {', '.join(ENCODERS)}")
    if config.get("classifier", "logistic") != "logistic":
        problems.append(f"classifier: {config['classifier']!r} has no counterpart, logistic has")
    encoder_args = config.get("encoder_args") or {}
    problems += unknown("encoder_args", encoder_args, {"bn_args"})
    head = config.get("classifier_args") or {}
    problems += unknown("classifier_args", head, {"n_way", "in_dim", "temp", "learn_temp"})
    bn = encoder_args.get("bn_args") or {}
    problems += _norm_problems(bn)
    if not problems:
        norm = _norm(bn, BLOCKS[ENCODERS[name]["encoder"]], problems)
    if problems:
        raise UserError(*problems)
    reset = (config.get("inner_args") or {}).get("reset_classifier")
    return {
        **ENCODERS[name],
        "norm": norm,
        "norm_momentum": bn.get("momentum", 0.1),
        "norm_eps": bn.get("eps", 1e-5),
        "head": "zero" if reset else "learned",
        "temperature": head.get("temp", 1.0),
        "learn_temperature": bool(head.get("learn_temp", False)),
    }


def _norm_problems(bn: Mapping[str, Any]) -> list[str]:
    problems = unknown("encoder_args.bn_args", bn, NORM_KEYS)
    if bn.get("affine") is False:
        problems.append("encoder_args.bn_args.affine: false has no counterpart; norms have weights")
    if bn.get("momentum", 0.1) is None:
        problems.append(
            "encoder_args.bn_args.momentum: null (a plain average) has no counterpart; give a"
            " number"
        )
    return problems


def _norm(
    bn: Mapping[str, Any], blocks: Mapping[str, str], problems: list[str]
) -> str | dict[str, str]:
    """Name the policy, or those by block; the reference tracks statistics unless told not to."""
    if not bn.get("track_running_stats", True):
        return "transductive"
    chosen = [str(block) for block in bn.get("episodic") or ()]
    if strange := [block for block in chosen if block not in blocks]:
        problems.append(
            f"encoder_args.bn_args.episodic: the encoder has no {', '.join(strange)}; it has"
            f" {', '.join(blocks)}"
        )
        return {}
    everywhere = set(chosen) == set(blocks)
    if bn.get("alpha") and not everywhere:
        problems.append(
            "encoder_args.bn_args.alpha: has no counterpart without episodic statistics in every"
            " block"
        )
    policy = "tasknorm_reference" if bn.get("alpha") else "episodic_biased"
    if everywhere:
        return policy
    return {blocks[block]: policy for block in chosen} | {"*": "running"} if chosen else "running"


def inner_settings(
    config: Mapping[str, Any], theirs: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return our ``inner`` section, and notes on what the reference did with some settings.

    Args:
        config: with ``inner_args``.
        theirs: the reference's name of each of our parameters.

    Raises:
        UserError: naming everything that has no counterpart.
    """
    inner = config.get("inner_args") or {}
    if problems := unknown("inner_args", inner, INNER_KEYS):
        raise UserError(*problems)
    notes = [
        f"inner_args.{key}: 0 stands for {default} in the reference, and is converted so"
        for key, default in (("n_step", 5), ("encoder_lr", 0.01), ("classifier_lr", 0.01))
        if key in inner and not inner[key]
    ]
    frozen = list(inner.get("frozen") or ())
    notes += [
        f"inner_args.frozen: {text!r} is in no name and froze nothing; left out"
        for text in frozen
        if not any(text in name for name in theirs.values())
    ]
    settings = {
        "num_steps": int(number(inner, "n_step", 5)),
        "lr": number(inner, "encoder_lr", 0.01),
        "head_lr": number(inner, "classifier_lr", 0.01),
        "momentum": number(inner, "momentum", 0.0),
        "weight_decay": number(inner, "weight_decay", 0.0),
        "frozen": tuple(frozen_patterns(frozen, theirs)),
        "gradient": "first_order" if inner.get("first_order") else "unrolled",
    }
    return settings, notes


def frozen_patterns(texts: list[str], theirs: Mapping[str, str]) -> list[str]:
    """Turn parts of the reference's names into patterns that select the same parameters of ours."""
    left = {ours for ours, name in theirs.items() if any(text in name for text in texts)}
    patterns: list[str] = []
    for pattern in _candidates(list(theirs)):
        inside = {ours for ours in theirs if matches(pattern, ours)}
        if inside & left and inside <= left | _covered(patterns, theirs):
            patterns.append(pattern)
            left -= inside
    return patterns


def _covered(patterns: list[str], names: Iterable[str]) -> set[str]:
    """Return the names that any of the patterns matches."""
    return {name for name in names if any(matches(pattern, name) for pattern in patterns)}


def _candidates(names: list[str]) -> list[str]:
    """Return patterns from the widest to the narrowest: parts, all norms, modules, parameters."""
    depths = range(1, 1 + max(name.count(".") + 1 for name in names))
    prefixes = [".".join(name.split(".")[:depth]) for depth in depths for name in names]
    parts = [prefix for prefix in prefixes if "." not in prefix]
    return list(dict.fromkeys([*parts, "*.norm", *prefixes]))


Checked = TypeVar("Checked", bound=Section)


def checked(section: type[Checked], settings: Mapping[str, Any]) -> Checked:
    """Make a section of ours.

    Raises:
        UserError: naming each value that it cannot have.
    """
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        raise UserError(
            *(
                f"{'.'.join(map(str, each['loc']))}: {shortened(each['input'])} has no counterpart:"
                f" {each['msg']}"
                for each in error.errors()
            )
        ) from None


def number(section: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number of the reference's; 0 and nothing stand for the default there.

    Raises:
        UserError: it is none.
    """
    value = section.get(key) or default
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{key}: {shortened(value)} is not a number")
    return found


def unknown(place: str, section: Mapping[str, Any], known: set[str]) -> list[str]:
    """Return a problem for each key that the reference does not know."""
    return [
        f"{place}.{key!s:.100} is no setting of the reference"
        for key in section
        if key not in known
    ]
