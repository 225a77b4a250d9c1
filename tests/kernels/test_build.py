"""Kernels are built where a compiler is, once, and are missing with a reason elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raymaml.kernels import build, library
from raymaml.kernels.build import NoKernelsError, built


@pytest.fixture
def _compiler_is_there() -> None:
    try:
        build._compiler()
    except NoKernelsError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_compiler_is_there")
def test_two_processes_at_once_build_one_library_and_a_third_finds_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from raymaml.kernels.build import built;"
        " print(built('float', Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate(timeout=300)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (path,) = map(Path, said)
    assert [each for each in tmp_path.iterdir() if each.suffix != ".lock"] == [path]
    before = path.stat()
    assert built("float", tmp_path) == path
    assert path.stat() == before


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(NoKernelsError, match=r"^no C\+\+ compiler$"):
        built("float", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "cxx"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] || { echo 'x.cpp:1: error: no such thing' >&2; exit 1; }\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NoKernelsError, match=rf"^{compiler} fails: x.cpp:1: error: no such thing$"):
        built("float", tmp_path / "cache")
    assert [each.suffix for each in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.usefixtures("_compiler_is_there")
def test_a_folder_that_cannot_be_written_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()  # no folder can be made below a file, by root either
    monkeypatch.setattr(build, "FLAGS", ("-shared", "-fPIC", "-Wno-psabi"))  # fast to build
    path = built("double", tmp_path / "file" / "cache")
    assert path.is_file()
    assert tmp_path not in path.parents
    assert built("double", tmp_path / "file" / "cache") == path


@pytest.mark.usefixtures("_compiler_is_there")
def test_a_disk_without_locks_is_passed_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lock:
        def __init__(self, _path: Path) -> None:
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(build, "FileLock", Lock)
    monkeypatch.setattr(build, "_build", lambda _compiler, _real, path: path.touch())
    assert built("float", tmp_path).parent == build._own_folder()


@pytest.mark.parametrize("kind", ["compiler", "library"])
def test_what_this_machine_cannot_run_is_a_reason(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF of another machine")
    broken.chmod(0o755)
    if kind == "compiler":
        monkeypatch.setenv("CXX", str(broken))
    else:
        monkeypatch.setattr(library, "built", lambda _real, _folder: broken)
    library.kernels.cache_clear()  # what other tests have built is found again on the disk
    with pytest.raises(NoKernelsError, match=r"cannot be built or loaded: .*broken"):
        library.kernels(torch.float32)


def test_another_source_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name holds source, compiler, options and numbers."""
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setattr(build, "_build", lambda _compiler, _real, path: path.touch())
    compilers = [tmp_path / name for name in ("one", "two")]
    for compiler in compilers:
        compiler.write_text(f"#!/bin/sh\necho {compiler.name}\n")
        compiler.chmod(0o755)
    names = set()
    for source in ("a", "b"):
        (tmp_path / "kernels.cpp").write_text(source)
        for compiler in compilers:
            monkeypatch.setenv("CXX", os.fspath(compiler))
            for real in ("float", "double"):
                names.add(built(real, tmp_path / "cache").name)
    assert len(names) == 2**3
