"""A watch over files that a run has checked and mapped into memory.

A write into a mapped file changes the values that a run reads, without an error. So a run compares
the stamps of its files, which costs next to nothing, before it keeps a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from raymaml.common.errors import UserError

Stamp = tuple[int, int, int]


class Watch:
    """Watches the size, time of change and inode of files.

    It does not see bits that change without the file system, as on a failing disk.
    """

    def __init__(self, paths: Iterable[Path], verify: Callable[[], None]) -> None:
        """Take the files as they are now; ``verify`` raises a ``UserError`` if they changed."""
        self._stamps = {path: _stamp(path) for path in paths}
        self._verify = verify

    def require(self) -> None:
        """Check that no file changed; files that were only touched are verified again, once.

        Raises:
            UserError: naming the file and the remedy.
        """
        now = {path: _stamp(path) for path in self._stamps}
        if now == self._stamps:
            return
        for path, stamp in now.items():
            if stamp is None or stamp[0] != (self._stamps[path] or stamp)[0]:
                state = "gone" if stamp is None else "of another size"
                raise UserError(
                    f"{path}: is {state} while it is in use",
                    remedy="put it back as it was, then run the same command: nothing that came"
                    " from it since was kept",
                )
        self._verify()
        self._stamps = now


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
