"""Places: paths on disk, and URIs such as ``s3://bucket/runs``.

A path on disk, or on a mounted network disk, is a ``pathlib.Path``. A URI is a ``upath.UPath`` of
fsspec, which has the same methods. Code that has to treat the two differently is here and in
``raymaml/storage/files.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from typing_extensions import TypeIs
from upath import UPath

Place: TypeAlias = Path | UPath
_SEPARATOR = "://"
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def to_place(value: object) -> Place:
    """Return the place that a text names; a place is returned unchanged.

    Raises:
        ValueError: it is no text, or its kind of URI is unknown or lacks its package; the message
            continues a sentence that begins with "it".
    """
    if isinstance(value, Path | UPath):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("should be a path, or a URI such as s3://bucket/folder")
    if _SEPARATOR not in value:
        return at_home(Path(value))
    protocol = value.split(_SEPARATOR)[0]
    try:
        # Other processes write there too: a remembered listing may be out of date.
        place = UPath(value, use_listings_cache=False)
        if protocol in {"file", "local"}:
            return Path(place.path)
        _ = place.fs
    except ImportError:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install raymaml[{extra}]" if extra else "install fsspec's package for it"
        raise ValueError(f"needs a package that is not installed; {remedy}") from None
    except Exception as error:
        raise ValueError(f"should be a path, or a URI that fsspec knows ({error})") from None
    return place


def at_home(path: Path) -> Path:
    """Return a path with ``~`` at its beginning replaced by the home that it stands for.

    Raises:
        ValueError: there is no such home; the message continues a sentence that begins with "it".
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("begins with the home of a user that this machine does not know") from None


def beside(file: Place, name: Path) -> Place:
    """Return the place of ``name``, which a file gives relative to its own folder."""
    if is_remote(file) and not name.is_absolute():
        return (file.parent / name.as_posix()).resolve()  # at a URI `..` is a name like others
    return name if is_remote(file) else file.parent / name


def is_in(text: str, folder: Place) -> bool:
    """Return whether a text names a folder, or what lies directly in it."""
    try:
        place = to_place(text).resolve()
    except ValueError:  # which the one who opens the place says
        return False
    return folder.resolve() in (place, place.parent)


def is_remote(place: Place) -> TypeIs[UPath]:
    """Return whether ``place`` is a URI, and not a path of the operating system."""
    return not isinstance(place, Path)
