"""Archives: read in place, and refused when they would leave their folder."""

from __future__ import annotations

import tarfile
from functools import partial
from pathlib import Path

import pytest
from helpers_imports import member, tar_of

from raymaml.common.errors import UserError
from raymaml.data.formats.archives import find_tree, read_folder, read_tar

file = partial(member, size=5)
link = partial(member, type=tarfile.SYMTYPE)


def write(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> Path:
    path.write_bytes(tar_of([(info, info.name[-5:].encode()) for info in members], mode))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_are_read_in_place(tmp_path: Path, mode: str) -> None:
    inside = link("data/link", linkname="../data/first")
    path = write(tmp_path / "a.tar", file("./data/first"), file("data/other"), inside, mode=mode)
    tree = read_tar(path, tmp_path / "bank")
    assert sorted(tree.files) == ["data/first", "data/other"]
    assert tree.blob("data/other").read() == b"other"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]
    with pytest.raises(UserError, match=r"a\.tar: holds no data/third"):
        tree.blob("data/third")


@pytest.mark.parametrize(
    "unsafe",
    [
        file("../evil1"),
        file("/etc/evil"),
        link("data/link", linkname="../../evil"),
        link("data/link", linkname="../evil", type=tarfile.LNKTYPE),
        member("device", type=tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name} {info.linkname}",
)
def test_members_and_links_that_leave_the_folder_are_refused(
    tmp_path: Path, unsafe: tarfile.TarInfo
) -> None:
    path = write(tmp_path / "a.tar", file("first"), unsafe, mode="w:gz")
    with pytest.raises(UserError, match=r"a\.tar: holds the unsafe path .*official archive"):
        read_tar(path, tmp_path / "bank")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_torn_archives_are_named(tmp_path: Path, mode: str) -> None:
    names = [f"file{number:05d}" for number in range(100)]
    whole = write(tmp_path / "a.tar", *map(file, names), mode=mode).read_bytes()
    # a member is a header and a block of content, 512 bytes each: these are cuts through headers
    for length in (100, 1024 + 100, 50 * 1024 + 100) if mode == "w" else (len(whole) // 2,):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar: is not a whole tar archive"):
            read_tar(tmp_path / "a.tar", tmp_path / "bank")


def test_trees_are_found_by_the_files_they_hold(tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    with pytest.raises(UserError, match=f"path: {tmp_path} holds no x"):
        find_tree(tmp_path, ("meta", "train"), bank, "no x")
    write(tmp_path / "b.tgz", file("deep/meta/"), file("deep/meta"), file("deep/train"))
    found = find_tree(tmp_path, ("meta", "train"), bank, "no x")
    assert found.name == f"{tmp_path / 'b.tgz'}/deep"
    (tmp_path / "own").mkdir()
    for name in ("meta", "train", ".hidden"):
        (tmp_path / "own" / name).write_text(name)
    found = find_tree(tmp_path, ("meta", "train"), bank, "no x")  # unpacked goes before packed
    assert found.name == f"{tmp_path}/own"
    assert sorted(found.files) == ["meta", "train"]
    assert read_folder(tmp_path / "own").blob("meta").read() == b"meta"


def test_no_room_to_unpack_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tgz", file("first"), mode="w:gz")
    with pytest.raises(UserError, match=r"cannot hold what is unpacked .*set data\.bank to"):
        read_tar(path, Path("/proc/bank"))
