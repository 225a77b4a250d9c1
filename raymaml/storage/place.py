"""Places: where files are kept, on disk or at a URI such as ``s3://bucket/runs``.

A folder on disk, or on a network disk that is mounted, is a ``pathlib.Path``; anything else is a
``upath.UPath`` of fsspec, which has the methods of one. Only what the two do differently is here
and in ``raymaml/storage/files.py``.
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
    """Return the place that a text names; a place stays what it is.

    Raises:
        ValueError: it is no text, or a URI of a kind that is unknown or lacks its package; the
            message goes on after "it".
    """
    if isinstance(value, Path | UPath):
        return value
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("should be a path, or a URI such as s3://bucket/folder")
    if _SEPARATOR not in value:
        return at_home(Path(value))
    protocol = value.split(_SEPARATOR)[0]
    try:
        # Other processes write there too: a listing that was remembered would be an old one.
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
    """Return what a path that begins with ``~`` means, as a shell would; others stay as they are.

    Raises:
        ValueError: there is no such home; the message goes on after "it".
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("begins with the home of a user that this machine does not know") from None


def beside(file: Place, name: Path) -> Place:
    """Return what ``name`` means in ``file``: relative to the folder that it is in."""
    if is_remote(file) and not name.is_absolute():
        return (file.parent / name.as_posix()).resolve()  # at a URI `..` is a name like others
    return name if is_remote(file) else file.parent / name


def is_remote(place: Place) -> TypeIs[UPath]:
    """Tell whether ``place`` is reached by a URI, not by the operating system."""
    return not isinstance(place, Path)
