"""Omniglot (Lake, Salakhutdinov and Tenenbaum 2015): 1,623 characters drawn by 20 people each.

Read as it is distributed, ``images_background`` and ``images_evaluation`` as zip files or
unpacked: ``<set>/<Alphabet>/characterNN/NNNN_MM.png``, 105x105, ink 0 on paper 255. Strokes
become 255 on 0 and images are resized with Lanczos' filter, as in Finn et al. 2017.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from raymaml.common.errors import UserError, reason_of
from raymaml.common.untrusted import stays_inside
from raymaml.config.sources import OmniglotSource
from raymaml.data.importers.images import (
    MOST_IMAGE_BYTES,
    decode,
    read_whole,
    require_length,
)
from raymaml.data.importers.plan import ImportPlan, PlannedClass
from raymaml.data.importers.stored import require_unpacked

SETS = ("images_background", "images_evaluation")
NUM_VAL_ALPHABETS = 5
"""Alphabets that split background_evaluation takes from the background set for validation."""
LICENCE = "MIT (Lake, Salakhutdinov, Tenenbaum 2015, github.com/brendenlake/omniglot)"
_MEMBER = re.compile(r"(images_background|images_evaluation)/[^/]+/character\d+/[^/.][^/]*\.png")

Images = NDArray[np.uint8]
Read = Callable[[], bytes]
Drawings = dict[str, dict[str, Read]]
"""The drawings of each character: "<set>/<Alphabet>/characterNN" -> file name -> its bytes."""


def plan_omniglot(source: OmniglotSource, image_size: int) -> ImportPlan:
    """List the characters of the two sets in ``source.path`` by split and name.

    Raises:
        UserError: a set is missing, or an archive is damaged or holds unsafe paths.
    """
    drawings = _find_drawings(source.path)
    splits = _vinyals_splits() if source.split == "vinyals" else _original_splits(drawings)
    problems = [
        f"{source.path}: {character} of split {split} is missing; get the complete archives"
        for split, characters in splits.items()
        for character in characters
        if character not in drawings
    ]
    # a character and its rotations follow each other, so one decoded character is enough to keep
    upright = lru_cache(maxsize=1)(partial(_decode, source.path, drawings, image_size))
    classes = tuple(
        _planned(character, split, turns, len(drawings[character]), upright)
        for split, characters in splits.items()
        for character in characters
        if character in drawings
        for turns in range(4 if source.rotations else 1)
    )
    rotations = ", each also turned by 90, 180 and 270 degrees" if source.rotations else ""
    return ImportPlan(
        source=f"Omniglot (Lake et al. 2015), split {source.split}{rotations}",
        licence=LICENCE,
        num_channels=1,
        classes=classes,
        problems=tuple(problems),
    )


def _planned(
    character: str, split: str, turns: int, count: int, upright: Callable[[str], Images]
) -> PlannedClass:
    """Plan the class of a character turned counter-clockwise by ``turns`` right angles."""
    name = character.partition("/")[2]  # alphabets of the two sets have different names
    return PlannedClass(
        name=f"{name}/rot{90 * turns:03d}" if turns else name,
        split=split,
        count=count,
        read=lambda part: np.rot90(upright(character), turns, axes=(1, 2))[part],
    )


def _decode(folder: Path, drawings: Drawings, size: int, character: str) -> Images:
    return decode(
        (
            (f"{folder}: {character}/{file}", read)
            for file, read in sorted(drawings[character].items())
        ),
        lambda image: _strokes(image, size),
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
    background = sorted(c for c in drawings if c.startswith(f"{SETS[0]}/"))
    alphabets = sorted({str(PurePosixPath(character).parent) for character in background})
    val = set(alphabets[-NUM_VAL_ALPHABETS:])
    in_val = [str(PurePosixPath(character).parent) in val for character in background]
    return {
        "train": [c for c, is_val in zip(background, in_val, strict=True) if not is_val],
        "val": [c for c, is_val in zip(background, in_val, strict=True) if is_val],
        "test": sorted(c for c in drawings if c.startswith(f"{SETS[1]}/")),
    }


def _find_drawings(folder: Path) -> Drawings:
    """Find both sets in ``folder`` or one level below; unpacked sets go before archives."""
    if not folder.is_dir():
        raise UserError(
            f"data.source.path: {folder} is not a folder; it must hold {SETS[0]}.zip and"
            f" {SETS[1]}.zip (or the folders of these names)"
        )
    found: dict[str, Drawings] = {}
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    archives = sorted(folder.glob("*.zip"))
    for members in (*map(_in_folder, folders), *map(_in_archive, archives)):
        for set_name, drawings in members.items():
            found.setdefault(set_name, drawings)
    missing = [
        f"data.source.path: {folder} holds no {name}.zip and no folder {name}; the archives are"
        " at https://github.com/brendenlake/omniglot/tree/master/python"
        for name in SETS
        if name not in found
    ]
    if missing:
        raise UserError(*missing)
    return found[SETS[0]] | found[SETS[1]]


def _in_folder(folder: Path) -> dict[str, Drawings]:
    paths = {
        path.relative_to(folder).as_posix(): path
        for name in SETS
        for path in folder.glob(f"{name}/*/*/*.png")
    }
    return _by_set(
        (name, partial(read_whole, path, MOST_IMAGE_BYTES)) for name, path in paths.items()
    )


def _in_archive(path: Path) -> dict[str, Drawings]:
    try:
        archive = zipfile.ZipFile(path)
        members = {member.filename: member for member in archive.infolist()}
        # members may share bytes, so that each is small and all together are not
        require_unpacked(sum(each.file_size for each in members.values()), path.stat().st_size)
    except Exception as error:  # zipfile has no list of what it raises on damage
        raise UserError(
            f"{path}: is not a complete zip archive ({reason_of(error)[:200]}); get it again"
        ) from None
    if unsafe := [name for name in members if not stays_inside(name)]:
        raise UserError(
            f"{path}: holds the unsafe path {unsafe[0]!r:.200}; get the official archive"
        )
    return _by_set((name, partial(_read, archive, each)) for name, each in members.items())


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    require_length(member.file_size, MOST_IMAGE_BYTES)
    return archive.read(member)


def _by_set(files: Iterable[tuple[str, Read]]) -> dict[str, Drawings]:
    found: dict[str, Drawings] = defaultdict(lambda: defaultdict(dict))
    for name, read in files:
        if _MEMBER.fullmatch(name):
            character, _, file = name.rpartition("/")
            found[character.partition("/")[0]][character][file] = read
    return found
