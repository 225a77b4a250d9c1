"""The pictures that a command names: folders, files, lists and patterns, on disk and at URIs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from raymaml.common.errors import Mistakes, UserError
from raymaml.data.importers.folders import (
    LeftOut,
    folders_in,
    images_in,
    is_visible,
    notes_of,
    read_csv,
)
from raymaml.data.importers.images import is_file, suffixes
from raymaml.storage.files import reaching, sha256_of_file
from raymaml.storage.place import Place, at_home, beside, is_remote, to_place

_SHOWN = 10
"""Mistakes of one kind that a message names; the others are counted."""
_WILD = "*?["
Support = dict[str, list["Picture"]]
"""Class name -> its pictures."""


def writable(name: str) -> str:
    """Return a name as text that can be written: bytes that are no text are escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


class Picture(NamedTuple):
    """A picture that is listed and not yet read."""

    path: str
    """As the user gave it, or as it was found below the folder that the user gave."""
    place: Place

    @property
    def name(self) -> str:
        """The path as ``writable``."""
        return writable(self.path)


def list_images(texts: Sequence[str], echo: Callable[[str], None]) -> list[Picture]:
    """Return the pictures that ``--images`` names, in the order of the texts, each sorted by path.

    ``echo`` is given a line about the files that are left out.

    Raises:
        UserError: there is none, or a path or a list is wrong.
    """
    mistakes, found = Mistakes(), []
    for text in texts:
        with mistakes.kept():
            found += _listed(text, mistakes, echo)
    _raise(mistakes)
    return found


def _listed(text: str, mistakes: Mistakes, echo: Callable[[str], None]) -> list[Picture]:
    place = _place(text, "--images")
    if _is_list(place):
        rows = _rows(place, ["path"], "--images", mistakes)
        return [picture for picture, _ in rows]
    with reaching(place):
        if place.is_dir():
            pictures = _below(place, echo)
        elif place.exists():
            return [Picture(text, place)]
        elif any(char in text for char in _WILD):
            pictures = _matching(place, text)
        else:
            raise UserError(
                f"--images: {text} does not exist",
                remedy="give a folder, a picture, a CSV (path), or a pattern in quotes",
            )
    if not pictures:
        lacks = "has no pictures that Pillow reads" if place.is_dir() else "matches no file"
        raise UserError(f"--images: {text} {lacks}", remedy="give another place")
    return pictures


def list_support(text: str, echo: Callable[[str], None]) -> Support:
    """Return the classes of ``--support`` and their pictures, both sorted.

    Raises:
        UserError: there are not two classes, a class has no pictures, or a list is wrong.
    """
    place, mistakes = _place(text, "--support"), Mistakes()
    if _is_list(place):
        support: Support = {}
        for picture, (name,) in _rows(place, ["class"], "--support", mistakes):
            support.setdefault(name, []).append(picture)
    else:
        with reaching(place):
            if not place.is_dir():
                raise UserError(
                    f"--support: {text} is no folder",
                    remedy="give a folder that holds a folder a class, or a CSV (path,class)",
                )
            support = _class_folders(place, echo)
    for name, pictures in support.items():
        if not pictures:
            mistakes.add(
                f"--support: class {name} has no pictures that Pillow reads",
                remedy=f"add some, or remove the folder {name}",
            )
    if len(support) < 2 and not mistakes:
        found = f"one class, {next(iter(support))}" if support else "no class folders"
        mistakes.add(
            f"--support: {text} holds {found}",
            remedy="give a folder with the pictures of each class, at least two, or a CSV"
            " (path,class)",
        )
    _raise(mistakes)
    return dict(sorted(support.items()))


def refuse_shared(support: Support, images: Iterable[Picture]) -> None:
    """Check that no picture is in two classes, and that none to predict is in the support set.

    Pictures on disk are compared by their content; at a URI, by their address.

    Raises:
        UserError: naming those that are.
    """
    mistakes, known, sizes = Mistakes(), dict[str, tuple[str, Picture]](), set[int]()
    for name, pictures in support.items():
        for picture in pictures:
            before, other = known.setdefault(content_key(picture), (name, picture))
            sizes |= set() if is_remote(picture.place) else {picture.place.stat().st_size}
            if before != name:
                mistakes.add(
                    f"{picture.name}: is in the classes {before} ({other.name}) and {name}",
                    remedy="leave it in one",
                )
    for picture in images:
        alike = is_remote(picture.place) or picture.place.stat().st_size in sizes
        if alike and (found := known.get(content_key(picture))):
            mistakes.add(
                f"{picture.name}: is a support image of class {found[0]} ({found[1].name})",
                remedy="its class is given: take it out of --images",
            )
    _raise(mistakes)


def content_key(picture: Picture) -> str:
    """Return the SHA-256 of a picture on disk; of one at a URI, the address."""
    place = picture.place
    return str(place) if is_remote(place) else sha256_of_file(place)


def _place(text: str, option: str) -> Place:
    try:
        return to_place(text)
    except ValueError as error:
        raise UserError(f"{option}: {text}: it {error}") from None


def _is_list(place: Place) -> bool:
    return place.suffix.lower() == ".csv"


def _rows(
    table: Place, columns: Sequence[str], option: str, mistakes: Mistakes
) -> Iterator[tuple[Picture, list[str]]]:
    """Yield the picture of each row of a CSV, and its cells in ``columns``."""
    remedy = "give a CSV with the columns path and class" if option == "--support" else "give a CSV"
    header, *rows = read_csv(table, f"{option}: {table}", remedy) or [[]]
    names = [cell.strip().lower() for cell in header]
    wanted = list(dict.fromkeys(["path", *columns]))
    if missing := [name for name in wanted if name not in names]:
        raise UserError(
            f"{table}:1: lacks the column {' and '.join(missing)}; the header is"
            f" {','.join(header)!r:.200}",
            remedy=f"it must name {' and '.join(wanted)}",
        )
    if not any(rows):
        raise UserError(f"{table}: lists no pictures", remedy="add some")
    for number, row in enumerate(rows, 2):
        cells = [row[names.index(name)] if names.index(name) < len(row) else "" for name in wanted]
        if not row:
            continue
        if not all(cells):
            mistakes.add(f"{table}:{number}: lacks {' or '.join(wanted)}", remedy="write it")
            continue
        place = _beside(table, cells[0])
        if not is_remote(place) and not is_file(place):
            mistakes.add(f"{table}:{number}: {place!s:.300} does not exist", remedy="mend the path")
            continue
        yield Picture(cells[0], place), cells[1:]


def _beside(table: Place, cell: str) -> Place:
    try:
        return to_place(cell) if "://" in cell else beside(table, at_home(Path(cell)))
    except ValueError as error:
        raise UserError(f"{table}: {cell!r:.200}: it {error}", remedy="mend the path") from None


def _below(folder: Place, echo: Callable[[str], None]) -> list[Picture]:
    """Return all pictures below a folder."""
    if is_remote(folder):
        return [picture for _, picture in _remote(folder)]
    left_out = LeftOut(list)
    pictures = [Picture(str(path), path) for path in images_in(folder, left_out)]
    _tell(left_out, folder, echo)
    return pictures


def _class_folders(folder: Place, echo: Callable[[str], None]) -> Support:
    """Return the pictures of each folder in ``folder``."""
    support: Support = {}
    if is_remote(folder):
        for inside, picture in _remote(folder):
            if len(inside.parts) > 1:
                support.setdefault(inside.parts[0], []).append(picture)
        return support
    left_out = LeftOut(list)
    for each in folders_in(folder):
        support[writable(each.name)] = [
            Picture(str(path), path) for path in images_in(each, left_out)
        ]
    _tell(left_out, folder, echo)
    return support


def _tell(left_out: LeftOut, folder: Path, echo: Callable[[str], None]) -> None:
    for note in notes_of(left_out, folder):
        if note.startswith("left out"):
            echo(f"{folder}: {note}")


def _remote(folder: Place) -> Iterator[tuple[PurePosixPath, Picture]]:
    """Yield the pictures below a URI, each with its path there, sorted."""
    assert is_remote(folder)
    root = folder.path.rstrip("/")
    for name in sorted(folder.fs.find(root)):
        inside = PurePosixPath(name[len(root) :].lstrip("/"))
        if all(map(is_visible, inside.parts)) and inside.suffix.lower() in suffixes():
            place = folder / inside.as_posix()
            yield inside, Picture(str(place), place)


def _matching(place: Place, text: str) -> list[Picture]:
    """Return the files that a pattern matches; ``**`` stands for any number of folders."""
    if is_remote(place):
        found = sorted(place.fs.glob(place.path, detail=True).items())
        uris = [place.fs.unstrip_protocol(name) for name, each in found if each["type"] == "file"]
        return [Picture(uri, to_place(uri)) for uri in uris if is_visible(PurePosixPath(uri).name)]
    names = glob.iglob(str(place), recursive=True)  # noqa: PTH207  # of absolute patterns too
    return [Picture(name, Path(name)) for name in sorted(names) if is_file(Path(name))]


def _raise(mistakes: Mistakes) -> None:
    """Raise the mistakes; of many, the first ones and how many there are."""
    if len(mistakes) > _SHOWN:
        more = len(mistakes) - _SHOWN
        raise UserError(*mistakes[:_SHOWN], f"and {more:,} more mistakes of this kind")
    if mistakes:
        raise UserError(*mistakes)
