"""The files of launch/, and the commands that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
_COMMAND = re.compile(
    r"(?:#  )?\s*(?:bash |sbatch .*)?(?:raymaml|launch/submit\.sh \S+|launch/slurm\.sh) ([a-z]+ .*)"
)


def read(name: str) -> Any:
    """Return what a YAML file of launch/ holds."""
    return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """Return the raymaml commands, without ``raymaml``, of a script, its header included."""
    lines = re.sub(r"\\\n(?:# )?\s*", "", text).splitlines()
    found = (_COMMAND.match(line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]
