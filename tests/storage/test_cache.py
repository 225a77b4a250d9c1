"""The folder of the copies of data at URIs, where it cannot be used."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.storage.cache import CACHE, local_copy
from raymaml.storage.place import Place, to_place

MARKER = "marker.json"


def copied(place: Place) -> Path:
    return local_copy(
        place, CACHE, marker=MARKER, others=lambda _folder: (), verify=lambda _folder: None
    )


def test_a_cache_that_cannot_be_written_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = to_place("memory://bank")
    place.mkdir(exist_ok=True)
    (place / MARKER).write_bytes(b"{}")
    (tmp_path / "file").touch()
    remedy = r"cannot be kept there .*; set data\.cache to a folder that this user can write"
    for home in (Path("/proc/none"), tmp_path / "file"):  # Ray's workers, containers, services
        monkeypatch.setenv("HOME", str(home))
        with pytest.raises(UserError, match=rf"^data\.cache: ~/\.cache/raymaml: .*{remedy}"):
            copied(place)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000_000)  # a user without an entry
    with pytest.raises(KeyError):
        pwd.getpwuid(os.getuid())
    with pytest.raises(UserError, match=f"{remedy[:20]}.*it begins with the home of a"):
        copied(place)

    monkeypatch.setenv("HOME", str(tmp_path))
    copy = copied(place)
    assert (copy / MARKER).read_bytes() == b"{}"
    monkeypatch.setattr(Path, "mkdir", None)  # nothing is written where the copy is there
    assert copied(place) == copy
