"""Study files: read as far as they can be understood, so that all mistakes come at once."""

from __future__ import annotations

from collections.abc import Collection, Set
from typing import Any

from pydantic import ValidationError

from raymaml.common.errors import UserError
from raymaml.config.explain import explain, mistakes
from raymaml.config.kinds import require_kind
from raymaml.config.study import StudyConfig
from raymaml.config.yaml_text import read_yaml
from raymaml.storage.place import Place

RawPath = tuple[int | str, ...]
_STAND_INS = {"name": "unknown", "title": "", "config": ""}
"""For keys that a study must have, where they are missing or wrong; "" names no config."""


def load_study(path: Place) -> tuple[StudyConfig, list[str]]:
    """Read a study file as far as it can be understood; its config is not read yet.

    Returns:
        The study, without the parts that are wrong by themselves, and every problem of the file.

    Raises:
        UserError: the file is no YAML mapping, or nothing of it is a study's.
    """
    tree, places = read_yaml(path)
    require_kind(tree, path, "study", StudyConfig)
    try:
        study = StudyConfig.model_validate(tree)
    except ValidationError as error:
        problems = [*explain(error, places, str(path), StudyConfig)]
        try:
            study, dropped = _understood(tree, error)
        except ValidationError:  # nothing is left that could be understood
            raise UserError(*problems) from None
        # an arm or a model that could not be read would seem to be unknown to the others
        if any(at[0] in ("arms", "models", "cross") and len(at) <= 2 for at in dropped):
            return study, problems
    else:
        problems = []
    return study, problems + [f"{path}: {problem}" for problem in study.disagreements()]


def _understood(tree: Any, error: ValidationError) -> tuple[StudyConfig, set[RawPath]]:
    """Return the study without what is wrong, and what that was."""
    locs = [detail["loc"] for detail in mistakes(error)]
    wrong = {_reached(tree, loc) for loc in locs} - {()}
    missing = {str(loc[0]) for loc in locs if loc} & _STAND_INS.keys()
    rest = _without(tree, wrong) | {key: _STAND_INS[key] for key in missing}
    if rest == tree:
        raise error
    try:
        return StudyConfig.model_validate(rest), wrong
    except ValidationError as other:  # since something was dropped: no mistake of the user's
        study, more = _understood(rest, other)
        return study, wrong | more


def _reached(tree: Any, loc: RawPath) -> RawPath:
    """Return the part of pydantic's path that leads to something in ``tree``."""
    reached: list[int | str] = []
    for part in loc:
        if part not in _keys(tree):
            continue  # pydantic's own, such as the branch of a union
        tree = tree[part]
        reached.append(part)
    return tuple(reached)


def _keys(tree: Any) -> Collection[int | str]:
    if isinstance(tree, dict):
        return tree.keys()
    return range(len(tree)) if isinstance(tree, list) else ()


def _without(tree: Any, dropped: Set[RawPath], at: RawPath = ()) -> Any:
    """Return ``tree`` without what stands at these paths."""
    if isinstance(tree, dict):
        return {
            key: _without(value, dropped, (*at, key))
            for key, value in tree.items()
            if (*at, key) not in dropped
        }
    if isinstance(tree, list):
        return [
            _without(value, dropped, (*at, place))
            for place, value in enumerate(tree)
            if (*at, place) not in dropped
        ]
    return tree
