"""Files that must stay as they were checked, for as long as they are mapped into memory.

Whoever writes into a mapped file changes what is read from it, without any error. So a file's
stamp, which costs next to nothing, is compared before anything that came from it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from raymaml.common.errors import UserError

Stamp = tuple[int, int, int]


class Unaltered:
    """A promise about files, kept by their size, time of change and inode.

    What alters bits without going through the file system, as a failing disk may, is not seen.
    """

    def __init__(self, paths: Iterable[Path], verify: Callable[[], None]) -> None:
        """Take the files as they are now; ``verify`` raises a ``UserError`` if they are altered."""
        self._stamps = {path: _stamp(path) for path in paths}
        self._verify = verify

    def require(self) -> None:
        """Check that nothing was altered; files that were only touched are read again, once.

        Raises:
            UserError: naming the file and the remedy.
        """
        now = {path: _stamp(path) for path in self._stamps}
        if now == self._stamps:
            return
        for path, stamp in now.items():
            if stamp is None or stamp[0] != (self._stamps[path] or stamp)[0]:
                what = "gone" if stamp is None else "of another size"
                raise UserError(
                    f"{path}: is {what} while it is in use; put it back as it was, then run the"
                    " same command: nothing that came from it since was kept"
                )
        self._verify()
        self._stamps = now


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
