"""Starter configs: copies of shipped configs, which the package brings along."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from raymaml.common.errors import UserError

STARTERS = {
    "images": "own_images.yaml",
    "glyphs": "glyphs/quickstart.yaml",
    "omniglot": "omniglot/5way-1shot.yaml",
    "mini-imagenet": "mini-imagenet/convnet4-5way-1shot-template.yaml",
    "tiered-imagenet": "tiered-imagenet/convnet4-5way-1shot-template.yaml",
}
"""The shipped config of each name. ``raymaml/configs`` is a link to ``configs``, which an installed
package holds as a folder."""


def write_starter(name: str, folder: Path) -> Path:
    """Write the starter config ``name`` as ``<name>.yaml`` into ``folder``, and return its path.

    Raises:
        UserError: there is such a file.
    """
    source, path = STARTERS[name], folder / f"{name}.yaml"
    text = (files("raymaml") / "configs" / source).read_text("utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text.replace(f"configs/{source}", path.name))
    except FileExistsError:
        raise UserError(
            f"{path}: is there already", remedy="rename it, or work in another folder"
        ) from None
    return path
