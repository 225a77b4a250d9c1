"""Hostile files for every reader, and the one judge of what a reader may do with them.

A reader may return, or raise a ``UserError`` that names a file. It may not raise anything else,
warn, print, hang, fill the memory, leave a file anywhere but in its own folder, or run, import or
start what the file asks for.
"""

from __future__ import annotations

import codecs
import contextlib
import faulthandler
import importlib
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase

from raymaml.common.errors import UserError
from raymaml.storage.place import to_place

SECONDS = 60
"""Of one input; honest ones take milliseconds, and longer on a machine that does other things."""
MEBIBYTES = 400
"""Of memory that one input may add."""
FORBIDDEN = {
    *("exec", "import", "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen"),
    *("socket.connect", "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen"),
    *("code.__new__", "marshal.loads", "os.putenv", "shutil.rmtree"),
}
"""Audit events (PEP 578) that no reader causes once its libraries are loaded."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Watch:
    """What a reader did, as Python's audit events tell it."""

    active: bool = False
    found: list[str] = field(default_factory=list)
    place: str = ""
    """The one folder in which files may be opened for writing."""

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN:
            self.found.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, _mode, flags = arguments
            is_written = isinstance(flags, int) and flags & _WRITES and path != os.devnull
            if is_written and self._is_outside(os.fsdecode(path)):
                self.found.append(f"open for writing {path!r:.200}")

    def _is_outside(self, path: str) -> bool:
        return not Path(path).resolve().is_relative_to(self.place)


@dataclass
class _Case:
    """An input that shows itself by its beginning."""

    value: Any

    def __repr__(self) -> str:
        return f"{self.value!r:.3000}"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))


for codec in ("cp437", "latin-1", "ascii", "utf-16", "utf-32", "utf-8-sig"):
    codecs.lookup(codec)  # loaded now, for an import is what is watched for
for codec in ("unicode-escape", "raw-unicode-escape"):
    codecs.lookup(codec)
for uri in ("http://x/y", "s3://x/y"):
    with contextlib.suppress(ValueError):  # its package is not there
        to_place(uri)
importlib.import_module("torch.nested._internal.ops")  # for weights that are nested tensors
WATCH = Watch()
sys.addaudithook(WATCH.hook)


class TooLongError(BaseException):
    """Not an ``Exception``: no reader may catch it."""


def inputs_of(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return where the inputs of a test come from, as settings of Hypothesis.

    The same ones wherever and whenever it runs; with ``--nightly`` random ones, and those first
    that failed before, by the test's own database.
    """
    if not request.config.getoption("--nightly"):
        return {"derandomize": True, "database": None}
    folder = request.config.rootpath / ".hypothesis" / "nightly" / request.node.originalname
    return {"derandomize": False, "database": DirectoryBasedExampleDatabase(folder)}


@dataclass
class Fuzz:
    """Feeds a reader with hostile inputs, each judged; ``inputs`` is how many."""

    root: Path
    """Holds the sentinels, the readers' folder ``place`` and the current folder of the process."""
    inputs: int
    derandomize: bool
    database: ExampleDatabase | None
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def place(self) -> Path:
        """The folder that readers may use."""
        return self.root / "place"

    def __call__(
        self,
        cases: st.SearchStrategy[Any],
        write: Callable[[Any], object],
        read: Callable[[Any], object],
        names: str = "",
    ) -> None:
        """Let ``write`` prepare each case, unwatched, and ``read`` have it.

        A message must hold ``names``, by default the folder.
        """
        names = names or str(self.place)
        profile = settings(
            max_examples=self.inputs,
            derandomize=self.derandomize,
            database=self.database,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            # To explain a failure every line is traced, which takes longer than the judge allows.
            phases=[phase for phase in Phase if phase is not Phase.explain],
        )

        @profile
        @given(cases.map(_Case))
        def run(case: _Case) -> None:
            write(case.value)
            self.judge(lambda: read(case.value), names)

        with _silence(self.root) as self._output:
            run()
        assert sum(self.outcomes.values()) >= min(self.inputs, 10)

    def judge(self, call: Callable[[], object], names: str) -> None:
        """Let a reader run, and judge it."""
        before, memory = self._outside(), _memory()
        with _limits(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            WATCH.found, WATCH.place, WATCH.active = [], str(self.place), True
            message = _message_of(call)
        self.outcomes["read" if message is None else "refused"] += 1
        assert message is None or names in message, f"names no file: {message}"
        assert message is None or len(message) < 20_000
        assert not warned, f"warned: {warned[0].message}"
        assert not WATCH.found, WATCH.found
        assert _memory() - memory < MEBIBYTES << 20, "filled the memory"
        assert self._outside() == before, "changed files outside its folder"
        assert os.fstat(self._output).st_size == 0, "printed"

    def _outside(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, names, files in os.walk(self.root):
            if folder == str(self.root):
                names.remove("place")
            for name in (*names, *files):
                path = f"{folder}/{name}"
                status = os.lstat(path)
                found[path] = status.st_mtime_ns, status.st_size
        found.pop(str(self.root / "output"), None)
        return found


def _message_of(call: Callable[[], object]) -> str | None:
    """Return what a ``UserError`` says; None where there is none."""
    try:
        call()
    except UserError as error:
        return str(error)
    finally:
        WATCH.active = False
    return None


def make_root(root: Path) -> Path:
    """Make the folder of the sentinels; who opens the pipe in it waits for ever."""
    (root / "place").mkdir()
    (root / "outside").mkdir()
    (root / "outside" / "secret").write_text("irreplaceable")
    (root / "output").touch()
    os.mkfifo(root / "outside" / "pipe")
    return root


@contextlib.contextmanager
def _silence(root: Path) -> Iterator[int]:
    """Send what the process prints, libraries in C included, into a file; yield that."""
    kept = [os.dup(number) for number in (1, 2)]
    with (root / "output").open("w+b") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        try:
            yield output.fileno()
        finally:
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Bound the time of what happens inside, and keep a bomb from taking the machine along."""

    def late(*_: object) -> None:
        raise TooLongError(f"hangs: longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    address_space = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (3 << 30)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, address_space[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, address_space)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def _memory() -> int:
    """Return the most memory that the process has held until now, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


# Inputs: valid ones, changed


NUMBERS = [
    *(0, 1, -1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, -(2**31)),
    *(2**63 - 1, 2**63, -(2**63), 2**64),
]


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with one to four changes: bits, numbers, parts left out, repeated or put in."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["bit", "number", "cut", "drop", "repeat", "insert", "byte"])):
            case "bit" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if content:
                content[at] = draw(st.integers(0, 255))
            case "number":
                width = draw(st.sampled_from([2, 4, 8]))
                number = draw(st.sampled_from(NUMBERS)) % 2 ** (8 * width)
                content[at : at + width] = number.to_bytes(width, "little")
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + draw(st.integers(1, 64))]
            case "repeat":
                content[at:at] = content[at : at + draw(st.integers(1, 200))]
            case _:
                content[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(content)


def hostile_values(root: Path) -> st.SearchStrategy[Any]:
    """Values that nobody writes by accident, names of files outside ``root/place`` among them."""
    names = [
        *("../outside/secret", "../outside/pipe", "../../x", f"{root}/outside/secret"),
        *(f"{root}/outside/pipe", f"{root}/outside/new"),
        *("/dev/zero", "/dev/stdin", "/proc/self/mem"),
        *("", ".", "..", "~", "a\0b", "a\nb", "x" * 5000, "\x1b[2J", "C:\\x", "é", "\U0001f600"),
        *("nan", "1e999", "true", "null", "os:system", "raymaml.nowhere:X", "s3://x", "http://x/y"),
        *("!!python/object/apply:os.system [x]", "{{7*7}}", "%s%n", "%(x)s", "2021-13-45"),
    ]
    deep: Any = 0
    for _ in range(150):
        deep = [deep]
    scalars = [
        *(None, True, False, 0, -1, 1, 2, 1.5, -0.5, 1e308, 5e-324, *NUMBERS, 10**40, -(10**400)),
        *(float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None], {"": None}, deep),
        [0] * 2000,
    ]
    return (
        st.sampled_from(names)
        | st.sampled_from(scalars)
        | st.text(max_size=20)
        | st.lists(st.integers(-3, 300), max_size=5)
        | st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3)
    )


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any]) -> Any:
    """A tree of dicts and lists with one to three parts replaced, left out or added."""
    for _ in range(draw(st.integers(1, 3))):
        tree = _changed_at(draw, tree, draw(st.sampled_from(list(_paths(tree)))), values)
    return tree


def _paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield prefix
    items = tree.items() if isinstance(tree, dict) else ()
    items = enumerate(tree[:6]) if isinstance(tree, list) and len(prefix) < 20 else items
    for key, value in items:
        yield from _paths(value, (*prefix, key))


def _changed_at(
    draw: st.DrawFn, tree: Any, path: tuple[Any, ...], values: st.SearchStrategy[Any]
) -> Any:
    if path and isinstance(tree, dict | list):
        copy = tree.copy()
        copy[path[0]] = _changed_at(draw, tree[path[0]], path[1:], values)
        return copy
    match draw(st.sampled_from(["replace", "replace", "drop", "add", "nudge"])):
        case "drop" if isinstance(tree, dict | list) and tree:
            copy = tree.copy()
            copy.pop(draw(st.sampled_from(list(tree) if isinstance(tree, dict) else [0, -1])))
            return copy
        case "add" if isinstance(tree, dict):
            return {**tree, draw(st.text(max_size=8)): draw(values)}
        case "add" if isinstance(tree, list):
            return [*tree, draw(st.sampled_from(tree) if tree else values)]
        case "nudge" if isinstance(tree, int | float):
            return tree + draw(st.sampled_from([-1, 1, 2]))
    return draw(values)
