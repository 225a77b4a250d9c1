"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015): 1,623 characters drawn by 20 people each.

Read as it is distributed, ``images_background`` and ``images_evaluation`` as zip files or
unpacked: ``<set>/<Alphabet>/characterNN/NNNN_MM.png``, 105x105, ink 0 on paper 255. Strokes
become 255 on 0 and images are resized with Lanczos' filter, as in Finn et al. 2017.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymaml.common.errors import UserError
from raymaml.common.untrusted import stays_inside
from raymaml.config.data_sources import OmniglotSource
from raymaml.data.formats.spool import require_unpacked, whole
from raymaml.data.importers.images import Images, Read, decode, read_whole, require_length
from raymaml.data.importers.plan import ImportPlan, PlannedClass

SETS = ("images_background", "images_evaluation")
NUM_VAL_ALPHABETS = 5
"""Alphabets that split background_evaluation takes from the background set for validation."""
LICENCE = "MIT (Lake, Salakhutdinov, Tenenbaum 2015, github.com/brendenlake/omniglot)"
_MEMBER = re.compile(r"(images_background|images_evaluation)/[^/]+/character\d+/[^/.][^/]*\.png")

Drawings = dict[str, dict[str, Read]]
"""The drawings of each character: "<set>/<Alphabet>/characterNN" -> file name -> its bytes."""


def plan_omniglot(source: OmniglotSource, image_size: int) -> ImportPlan:
    """List the characters of the two sets in ``source.path`` by split and name.

    Raises:
        UserError: a set is missing, or an archive is damaged or holds unsafe paths.
    """
    drawings = _find_drawings(source.path)
    splits = _vinyals_splits() if source.split == "vinyals" else _original_splits(drawings)
    characters = [(split, character) for split, own in splits.items() for character in own]
    # a character and its rotations follow each other, so one decoded character is enough to keep
    upright = lru_cache(maxsize=1)(partial(_decode, source.path, drawings, image_size))
    rotations = ", each also turned by 90, 180 and 270 degrees" if source.rotations else ""
    return ImportPlan(
        source=f"Omniglot (Lake et al. 2015), split {source.split}{rotations}",
        licence=LICENCE,
        num_channels=1,
        classes=tuple(
            PlannedClass(
                # alphabets of the two sets have different names
                name=character.partition("/")[2] + (f"/rot{90 * turns:03d}" if turns else ""),
                split=split,
                images=np.arange(len(drawings[character])),
                read=partial(_turned, upright, character, turns),
            )
            for split, character in characters
            if character in drawings
            for turns in range(4 if source.rotations else 1)
        ),
        problems=tuple(
            f"{source.path}: {character} of split {split} is missing; get the complete archives"
            for split, character in characters
            if character not in drawings
        ),
    )


def _turned(
    upright: Callable[[str], Images], character: str, turns: int, rows: NDArray[np.int64]
) -> Images:
    """Return drawings of a character, turned counter-clockwise by ``turns`` right angles."""
    return np.rot90(upright(character), turns, axes=(1, 2))[rows]


def _decode(folder: Path, drawings: Drawings, size: int, character: str) -> Images:
    return decode(
        (f"{folder}: {character}/{file}", read, partial(_strokes, size=size))
        for file, read in sorted(drawings[character].items())
    )


def _strokes(image: Image.Image, size: int) -> Images:
    # a 1-bit image must become grey first: Lanczos on mode "1" is nearest neighbour
    grey = image.convert("L").resize((size, size), Image.Resampling.LANCZOS)
    return (255 - np.asarray(grey))[:, :, None]


def _vinyals_splits() -> dict[str, list[str]]:
    """Return the 1028/172/423 characters of Vinyals et al. 2016.

    The file gives the first and last character of each alphabet. Gurmukhi is divided: characters
    1 to 41 train, 42 to 45 test.
    """
    file = resources.files(__package__).joinpath("omniglot_vinyals.json")
    ranges = json.loads(file.read_text(encoding="utf-8"))
    return {
        split: [
            f"{alphabet}/character{number:02d}"
            for alphabet, (first, last) in alphabets.items()
            for number in range(first, last + 1)
        ]
        for split, alphabets in ranges.items()
    }


def _original_splits(drawings: Iterable[str]) -> dict[str, list[str]]:
    """Background for train and val, evaluation for test (Lake et al. 2015).

    Val is the last five background alphabets by name: whole alphabets, so that validation, like
    the test, asks for characters of alphabets that training has not seen.
    """
    background, test = (sorted(c for c in drawings if c.startswith(f"{s}/")) for s in SETS)
    alphabet_of = {character: character.rpartition("/")[0] for character in background}
    val = sorted(set(alphabet_of.values()))[-NUM_VAL_ALPHABETS:]
    return {
        "train": [character for character in background if alphabet_of[character] not in val],
        "val": [character for character in background if alphabet_of[character] in val],
        "test": test,
    }


def _find_drawings(folder: Path) -> Drawings:
    """Find both sets in ``folder`` or one level below; unpacked sets go before archives."""
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found: Drawings = {}
    for files in (*map(_in_folder, folders), *map(_in_archive, sorted(folder.glob("*.zip")))):
        sets = set(map(_set_of, found))  # the first place that holds a set is taken for it
        for name, read in files.items():
            if _MEMBER.fullmatch(name) and _set_of(name) not in sets:
                character, _, file = name.rpartition("/")
                found.setdefault(character, {})[file] = read
    if missing := [name for name in SETS if name not in map(_set_of, found)]:
        remedy = "get it at https://github.com/brendenlake/omniglot/tree/master/python"
        problems = (
            f"data.source.path: {folder} holds no {m}.zip and no folder {m}" for m in missing
        )
        raise UserError(*problems, remedy=remedy)
    return found


def _set_of(name: str) -> str:
    return name.partition("/")[0]


def _in_folder(folder: Path) -> dict[str, Read]:
    return {
        path.relative_to(folder).as_posix(): partial(read_whole, path)
        for name in SETS
        for path in folder.glob(f"{name}/*/*/*.png")
    }


def _in_archive(path: Path) -> dict[str, Read]:
    with whole(path, "zip archive"):
        archive = zipfile.ZipFile(path)
        members = {member.filename: member for member in archive.infolist()}
        # members may share bytes, so that each is small and all together are not
        require_unpacked(sum(each.file_size for each in members.values()), path.stat().st_size)
    if unsafe := [name for name in members if not stays_inside(name)]:
        raise UserError(
            f"{path}: holds the unsafe path {unsafe[0]!r:.200}", remedy="get the official archive"
        )
    return {name: partial(_read, archive, each) for name, each in members.items()}


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    require_length(member.file_size)
    return archive.read(member)
