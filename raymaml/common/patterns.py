"""Name patterns, by which a config selects layers and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from raymaml.common.errors import UserError

T = TypeVar("T")


def matches(pattern: str, name: str) -> bool:
    """Return whether ``pattern`` matches a dotted ``name``, or the name of a module around it.

    Patterns are anchored at both ends: ``encoder.conv1`` matches ``encoder.conv1.norm.bias`` but
    not ``encoder.conv10.weight``. ``*`` matches any text, dots included, ``?`` one character, and
    ``[12]`` one of these.
    """
    parts = name.split(".")
    around = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(fnmatchcase(prefix, pattern) for prefix in around)


def require_matches(key: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Check that each pattern of the option ``key`` matches at least one of ``names``.

    Raises:
        UserError: with every pattern that matches nothing.
    """
    idle = [p for p in patterns if not any(matches(p, name) for name in names)]
    if idle:
        modules = sorted({name.rpartition(".")[0] or name for name in names})
        raise UserError(
            *(
                f"{key}: {pattern!r} matches nothing in the model; it has {', '.join(modules)}"
                for pattern in idle
            )
        )


def first_match(key: str, choices: Mapping[str, T], names: Sequence[str]) -> dict[str, T]:
    """Return for each of ``names`` the choice of the first pattern that matches it.

    Raises:
        UserError: a pattern matches nothing, or no pattern matches a name.
    """
    require_matches(key, choices, names)
    chosen = {
        name: choice
        for name in names
        for choice in [c for pattern, c in choices.items() if matches(pattern, name)][:1]
    }
    if missing := [name for name in names if name not in chosen]:
        raise UserError(
            f"{key}: {', '.join(missing)} match none of the patterns {', '.join(choices)}",
            remedy='add "*" as the last one',
        )
    return chosen
