"""Archives: read in place, and refused when they would leave their folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.data.formats.archives import find_tree, read_folder, read_tar


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = 5 if kind == tarfile.REGTYPE else 0
    return info


def write(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info in members:
            archive.addfile(info, io.BytesIO(info.name[-5:].encode().rjust(5)))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_are_read_in_place(tmp_path: Path, mode: str) -> None:
    inside = member("data/link", tarfile.SYMTYPE, "../data/first")
    path = write(
        tmp_path / "a.tar", member("./data/first"), member("data/other"), inside, mode=mode
    )
    tree = read_tar(path, tmp_path / "bank")
    assert sorted(tree.files) == ["data/first", "data/other"]
    assert tree.blob("data/other").read() == b"other"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]
    with pytest.raises(UserError, match=r"a\.tar: holds no data/third"):
        tree.blob("data/third")


@pytest.mark.parametrize(
    "unsafe",
    [
        member("../evil"),
        member("/etc/evil"),
        member("data/link", tarfile.SYMTYPE, "../../evil"),
        member("data/link", tarfile.LNKTYPE, "../evil"),
        member("device", tarfile.CHRTYPE),
    ],
    ids=lambda info: f"{info.name} {info.linkname}",
)
def test_members_and_links_that_leave_the_folder_are_refused(
    tmp_path: Path, unsafe: tarfile.TarInfo
) -> None:
    path = write(tmp_path / "a.tar", member("first"), unsafe, mode="w:gz")
    with pytest.raises(UserError, match=r"a\.tar: holds the unsafe path .*official archive"):
        read_tar(path, tmp_path / "bank")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_torn_archives_are_named(tmp_path: Path, mode: str) -> None:
    names = [f"file{number:05d}" for number in range(100)]
    whole = write(tmp_path / "a.tar", *map(member, names), mode=mode).read_bytes()
    # a member is a header and a block of content, 512 bytes each: these are cuts through headers
    for length in (100, 1024 + 100, 50 * 1024 + 100) if mode == "w" else (len(whole) // 2,):
        (tmp_path / "a.tar").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar: is not a whole tar archive"):
            read_tar(tmp_path / "a.tar", tmp_path / "bank")


def test_trees_are_found_by_the_files_they_hold(tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    with pytest.raises(UserError, match=f"path: {tmp_path} holds no x"):
        find_tree(tmp_path, ("meta", "train"), bank, "no x")
    write(tmp_path / "b.tgz", member("deep/meta/"), member("deep/meta"), member("deep/train"))
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
    path = write(tmp_path / "a.tgz", member("first"), mode="w:gz")
    with pytest.raises(UserError, match=r"cannot hold what is unpacked .*set data\.bank to"):
        read_tar(path, Path("/proc/bank"))
