"""Pictures in folders: the class and split of each, and the files that an import leaves out.

Two layouts: ``<split>/<class>/<image>`` and ``<class>/<image>``. Splits go by several names, in
capitals or not (``SPLIT_NAMES``). The search passes through a folder that holds one other folder
alone. Pictures in folders below a class folder are of that class. An import leaves out and counts
the files that Pillow cannot read, links that lead nowhere, and links to folders. It passes over
hidden files and folders.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from raymaml.common.errors import Mistakes, UserError
from raymaml.config.schema import SPLITS, Split
from raymaml.data.importers.images import is_file, suffixes

SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The names of the splits in folders and lists, in small letters."""
_ALSO_CLASSES = ("valid", "dev")  # words that a class may be called by
_PASSED_OVER = "__MACOSX"  # of zip files made on a Mac

Files = dict[tuple[str, str], list[Path]]
"""(split, class name) -> its images."""


def split_named(name: str) -> Split | None:
    """Return the split of a name of a folder, or in a cell of a list."""
    return SPLIT_NAMES.get(name.strip().lower())


@dataclass
class LeftOut:
    """The files that an import leaves out, by reason, and those of deeper folders."""

    root: Path
    files: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    deeper: list[Path] = field(default_factory=list)

    def add(self, reason: str, path: Path) -> None:
        """Count ``path``."""
        self.files[reason].append(path)

    def notes(self) -> tuple[str, ...]:
        """Return a line for each reason: how many files, and the first of them."""
        lines = [(f"left out: {len(own):,} {why}", own) for why, own in sorted(self.files.items())]
        if self.deeper:
            lines.append((f"taken: {len(self.deeper):,} pictures in deeper folders", self.deeper))
        return tuple(f"{text}, first {min(own).relative_to(self.root)}" for text, own in lines)


def images_in(folder: Path, left_out: LeftOut) -> list[Path]:
    """List the pictures of a class folder and of the folders below it, sorted by path."""
    images = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in folders:
            if _is_visible(name) and (path := Path(parent, name)).is_symlink():
                left_out.add("links to folders", path)
        folders[:] = [name for name in folders if _is_visible(name)]
        for path in (Path(parent, name) for name in names if _is_visible(name)):
            if reason := _why_not(path):
                left_out.add(reason, path)
            else:
                images.append(path)
    left_out.deeper += [path for path in images if path.parent != folder]
    return sorted(images)


def split_folders(root: Path, mistakes: Mistakes, left_out: LeftOut) -> Files | None:
    """Read the layout ``<split>/<class>/<image>``; None where it is another one."""
    folders = folders_in(root)
    splits = {path: split for path in folders if (split := split_named(path.name))}
    sure = [path for path in splits if path.name.lower() not in _ALSO_CLASSES]
    if not splits or not (sure or len(splits) == len(folders)):
        return None
    if others := [path.name for path in folders if path not in splits]:
        are, them = ("are no splits", "them") if len(others) > 1 else ("is no split", "it")
        mistakes.append(
            f"{root}: {len(others):,} of {len(folders):,} folders {are}, first {others[0]}; move"
            f" {them} elsewhere or, if {' or '.join(path.name for path in splits)} is a class,"
            " rename its folder or list the images in data.source.csv"
        )
    for split in SPLITS:
        if len(same := [path.name for path in splits if splits[path] == split]) > 1:
            mistakes.append(f"{root}: {' and '.join(same)} are both split {split}; join them")
    _leave_loose(root, left_out)
    files: Files = {}
    for folder in sorted(splits, key=lambda path: SPLITS.index(splits[path])):
        _leave_loose(folder, left_out)
        for path in folders_in(folder):
            files.setdefault((splits[folder], path.name), []).extend(images_in(path, left_out))
    return files


def class_folders(root: Path, left_out: LeftOut) -> dict[str, list[Path]]:
    """Read the layout ``<class>/<image>``."""
    _leave_loose(root, left_out)
    return {path.name: images_in(path, left_out) for path in folders_in(root)}


def inner(root: Path, left_out: LeftOut) -> Path:
    """Return ``root``, or the folder in it that holds all: one alone, with folders in it.

    Files beside that folder are left out.
    """
    folders = folders_in(root)
    while len(folders) == 1 and not split_named(folders[0].name) and folders_in(folders[0]):
        _leave_loose(root, left_out)
        root = folders[0]
        folders = folders_in(root)
    return root


def folders_in(folder: Path) -> list[Path]:
    """Return the visible folders in ``folder``, links to folders included."""
    return [path for path in sorted(folder.iterdir()) if _is_visible(path.name) and path.is_dir()]


def _leave_loose(folder: Path, left_out: LeftOut) -> None:
    """Count the files that lie in no class folder."""
    for path in folder.iterdir():
        if _is_visible(path.name) and not path.is_dir():
            left_out.add(_why_not(path) or "pictures outside of any class folder", path)


def _why_not(path: Path) -> str:
    """Return why a file is no picture that Pillow reads; "" for one that is."""
    if not is_file(path):
        return "links that lead nowhere" if path.is_symlink() else "pipes or devices"
    suffix = path.suffix.lower()
    if suffix in suffixes():
        return ""
    return f"{suffix} files, which Pillow does not read" if suffix else "files without a suffix"


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name != _PASSED_OVER


def _raise(error: OSError) -> Iterator[None]:
    raise UserError(
        f"{error.filename}: cannot be read ({error.strerror})", remedy="mend its rights"
    )
