"""Configs, studies and sweeps are YAML files alike: which of them a file is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from raymaml.common.errors import UserError
from raymaml.common.untrusted import cut
from raymaml.storage.place import Place

Kind = Literal["config", "study", "sweep"]
_TITLES = {"config": "a config", "study": "a study file", "sweep": "a sweep file"}
_USES = {
    "config": "`raymaml train {0}` or `raymaml test {0}`",
    "study": "`raymaml study {0}`",
    "sweep": "`raymaml sweep {0}`",
}


def require_kind(tree: Mapping[str, Any], path: Place, kind: Kind, model: type[BaseModel]) -> None:
    """Check that a file is of the kind that is needed, whatever mistakes it has.

    Args:
        tree: what the file holds.
        path: of the file.
        kind: what is needed...
        model: ...and its keys.

    Raises:
        UserError: it is of another kind, or of none.
    """
    found = _kind_of(tree)
    if found == kind:
        return
    if found is not None:
        raise UserError(
            f"{path}: is {_TITLES[found]}, and {_TITLES[kind]} is needed here; use"
            f" {_USES[found].format(path)}"
        )
    if "schema_version" in tree:
        raise UserError(
            f"{path}: is a file that raymaml writes, and {_TITLES[kind]} is needed here; the config"
            " of a run is config.yaml in the run's folder"
        )
    keys = [str(key) for key in tree if key != "name"]
    if keys and not any(difflib.get_close_matches(key, model.model_fields) for key in keys):
        required = ", ".join(key for key, f in model.model_fields.items() if f.is_required())
        raise UserError(
            f"{path}: is not {_TITLES[kind]}: its keys are {cut(', '.join(keys), 100)};"
            f" {_TITLES[kind]} has {required}"
        )


def _kind_of(tree: Mapping[str, Any]) -> Kind | None:
    """Return what a file is by the keys that only one kind has; None if that is not clear."""
    if len(tree.keys() & {"data", "episodes", "outer", "model", "inner"}) >= 2:
        return "config"
    if "config" in tree and tree.keys() & {"arms", "cross", "checks", "models"}:
        return "study"
    return "sweep" if "config" in tree and "space" in tree else None
