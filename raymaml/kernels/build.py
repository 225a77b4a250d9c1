"""Builds the kernels at first use, by the C++ compiler that is there."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from filelock import FileLock

from raymaml.storage.temporary import own_folder, temporary_folder

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
    "-Wno-psabi",
)
FOR_THIS_CPU = ("-march=native",), ("-mcpu=native",), ()
"""Options to try in turn: Clang knows the first by the second on some processors."""
SECONDS = 300
"""Limit of one build, which takes 2 to 6 s."""


class NoKernelsError(Exception):
    """The kernels cannot be built or loaded here; the text says why."""


def built(real: str, folder: Path) -> Path:
    """Return the library of kernels for numbers of type ``real``, built unless it is there.

    Any number of processes may ask at once: one builds, the others wait. Where ``folder`` cannot be
    written, each process builds for itself.

    Args:
        real: ``float`` or ``double``.
        folder: holds the libraries, by a hash of source, compiler, options and processor.

    Raises:
        NoKernelsError: there is no compiler, or it fails.
    """
    compiler = _compiler()
    content = b"\0".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")))
    parts = (compiler, _version(compiler), real, *FLAGS, _processor())
    name = hashlib.sha256(content + "\0".join(parts).encode()).hexdigest()[:32]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            path = folder / f"{name}.so"
            if not path.exists():
                _build(compiler, real, path)
            return path
    except (OSError, NotImplementedError):  # a read-only home, a full disk, one without locks
        own = _own_folder() / f"{name}.so"
        if not own.exists():
            _build(compiler, real, own)
        return own


def _build(compiler: str, real: str, path: Path) -> None:
    """Build a library; it is under its name only once it is whole."""
    source, said = str(SOURCES / "kernels.cpp"), ""
    with own_folder(path.parent, "build") as folder:
        part = folder / path.name
        for processor in FOR_THIS_CPU:
            command = [compiler, *FLAGS, *processor, f"-DREAL={real}", "-o", str(part), source]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=SECONDS, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise NoKernelsError(f"{compiler} took more than {SECONDS} s") from error
            if done.returncode == 0:
                part.replace(path)
                return
            said = said or done.stderr.strip()
    first = next((line for line in said.splitlines() if "error" in line), said[:200])
    raise NoKernelsError(f"{compiler} fails: {first}")


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise NoKernelsError("no C++ compiler")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _processor() -> str:
    """Return the processor's instructions, by which its libraries differ from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


@cache
def _own_folder() -> Path:
    """Return a folder of this process, which goes with it."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temporary_folder())
