"""Pictures in folders and lists: the class and split of each, and the files left out.

Folders have two layouts: ``<split>/<class>/<image>`` and ``<class>/<image>``. Splits go by several
names, in capitals or not (``SPLIT_NAMES``). The search passes through a folder that holds one other
folder alone. Pictures in folders below a class folder are of that class. An import leaves out and
counts the files that Pillow cannot read, links that lead nowhere, and links to folders. It passes
over hidden files and folders. Lists are CSVs, as spreadsheets and scripts write them.
"""

from __future__ import annotations

import codecs
import csv
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import StringIO
from pathlib import Path
from typing import TypeVar

from raymaml.common.errors import Mistakes, UserError
from raymaml.config.schema import SPLITS, Split
from raymaml.data.importers.images import is_file, read_whole, suffixes
from raymaml.storage.files import read_bytes
from raymaml.storage.place import Place, is_remote

SPLIT_NAMES: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The names of the splits in folders and lists, in small letters."""
_ALSO_CLASSES = ("valid", "dev")  # words that a class may be called by
_PASSED_OVER = "__MACOSX"  # of zip files made on a Mac
_MOST_BYTES = 512 << 20  # of a list, which is read whole
Key = TypeVar("Key")
Item = TypeVar("Item")

Files = dict[tuple[str, str], list[Path]]
"""(split, class name) -> its images; the split is "" where no folder names one."""
LeftOut = defaultdict[tuple[str, str], list[Path]]
"""("left out", reason) -> those files; and ("taken", "pictures in deeper folders") -> those."""


def split_named(name: str) -> Split | None:
    """Return the split of a name of a folder, or in a cell of a list."""
    return SPLIT_NAMES.get(name.strip().lower())


def find_classes(root: Path, mistakes: Mistakes, left_out: LeftOut) -> Files:
    """Find the class folders of either layout and their images, sorted by path."""
    folders = folders_in(root)
    while len(folders) == 1 and not split_named(folders[0].name) and folders_in(folders[0]):
        _leave_loose(root, left_out)
        root, folders = folders[0], folders_in(folders[0])
    splits = {path: split for path in folders if (split := split_named(path.name))}
    are_sure = any(path.name.lower() not in _ALSO_CLASSES for path in splits)
    parents: Mapping[Path, str] = {root: ""}
    _leave_loose(root, left_out)
    if splits and (are_sure or len(splits) == len(folders)):
        mistakes += _split_problems(root, splits, [p.name for p in folders if p not in splits])
        parents = splits
        for parent in splits:
            _leave_loose(parent, left_out)
    files: Files = {}
    for parent, name in parents.items():
        for folder in folders_in(parent):
            files.setdefault((name, folder.name), []).extend(images_in(folder, left_out))
    return files


def notes_of(left_out: LeftOut, root: Path) -> tuple[str, ...]:
    """Return a line for each reason: how many files, and the first of them."""
    return tuple(
        f"{what}: {len(own):,} {why}, first {min(own).relative_to(root)}"
        for (what, why), own in sorted(left_out.items())
    )


def _split_problems(root: Path, splits: Mapping[Path, Split], others: list[str]) -> list[str]:
    problems = []
    if others:
        are, them = ("are no splits", "them") if len(others) > 1 else ("is no split", "it")
        problems.append(
            f"{root}: {len(others):,} of {len(others) + len(splits):,} folders {are}, first"
            f" {others[0]}; move {them} elsewhere or, if"
            f" {' or '.join(path.name for path in splits)} is a class, rename its folder or list"
            " the images in data.source.csv"
        )
    for split in SPLITS:
        if len(same := [path.name for path in splits if splits[path] == split]) > 1:
            problems.append(f"{root}: {' and '.join(same)} are both split {split}; join them")
    return problems


def folders_in(folder: Path) -> list[Path]:
    """Return the visible folders in ``folder``, links to folders included."""
    return [path for path in sorted(folder.iterdir()) if is_visible(path.name) and path.is_dir()]


def images_in(folder: Path, left_out: LeftOut) -> list[Path]:
    """List the pictures of a class folder and of the folders below it, sorted by path."""
    images = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if is_visible(name)]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                left_out["left out", "links to folders"].append(path)
        for path in (Path(parent, name) for name in names if is_visible(name)):
            if reason := _why_not(path):
                left_out["left out", reason].append(path)
                continue
            images.append(path)
            if path.parent != folder:
                left_out["taken", "pictures in deeper folders"].append(path)
    return sorted(images)


def _leave_loose(folder: Path, left_out: LeftOut) -> None:
    """Count the files that lie in no class folder."""
    for path in folder.iterdir():
        if is_visible(path.name) and not path.is_dir():
            reason = _why_not(path) or "pictures outside of any class folder"
            left_out["left out", reason].append(path)


def _why_not(path: Path) -> str:
    """Return why a file is no picture that Pillow reads; "" for one that is."""
    if not is_file(path):
        return "links that lead nowhere" if path.is_symlink() else "pipes or devices"
    suffix = path.suffix.lower()
    if suffix in suffixes():
        return ""
    return f"{suffix} files, which Pillow does not read" if suffix else "files without a suffix"


def is_visible(name: str) -> bool:
    """Return whether a file or folder is taken notice of."""
    return not name.startswith(".") and name != _PASSED_OVER


def _raise(error: OSError) -> Iterator[None]:
    raise UserError(
        f"{error.filename}: cannot be read ({error.strerror})", remedy="mend its rights"
    )


def read_csv(table: Place, name: str, remedy: str) -> list[list[str]]:
    """Return the rows of a CSV on disk or at a URI.

    Raises:
        UserError: it cannot be read; ``name`` begins the message and ``remedy`` ends it.
    """
    try:
        data = read_bytes(table) if is_remote(table) else read_whole(table, _MOST_BYTES)
        text = _text(data)
        first = text.partition("\n")[0]
        comma = next((mark for mark in ",;\t" if mark in first), ",")
        return list(csv.reader(StringIO(text, newline=""), delimiter=comma))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{table}:{line}: is not UTF-8 (byte {error.object[error.start]:#04x})",
            remedy='save the list as UTF-8, which spreadsheets offer as "CSV UTF-8"',
        ) from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{name} cannot be read ({error})", remedy=remedy) from None


def _text(data: bytes) -> str:
    """Decode a list: UTF-8, or UTF-16 where the file begins with its mark."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    text = data.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds NUL characters; save it as UTF-8")
    return text


def by_class(
    table: Path,
    rows: Iterable[list[str]],
    parse: Callable[[list[str]], tuple[Key, Item]],
    mistakes: Mistakes,
    first_line: int = 2,
) -> dict[Key, list[Item]]:
    """Sort the images of a list by class.

    Args:
        table: the list, for messages.
        rows: its lines without a header; empty ones are skipped.
        parse: returns class and image of a line; raises ``ValueError`` where it is wrong.
        mistakes: takes those of all lines.
        first_line: number of the first row.
    """
    found: dict[Key, list[Item]] = {}
    seen: set[Item] = set()
    for number, row in enumerate(rows, first_line):
        try:
            if row:
                key, item = parse(row)
                if item in seen:
                    raise ValueError(f"{row[0]} is listed twice; an image may be in one class only")
                seen.add(item)
                found.setdefault(key, []).append(item)
        except ValueError as error:
            mistakes.append(f"{table}:{number}: {error}")
    return found
