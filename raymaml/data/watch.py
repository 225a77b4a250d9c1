"""A watch over the bank and shards that a run has checked and mapped into memory.

A write into a mapped file changes the values that a run reads, without an error. So a run compares
the stamps of its files, which costs next to nothing, before it keeps a result.
"""

from __future__ import annotations

from pathlib import Path

from raymaml.common.errors import UserError, gathered
from raymaml.data.bank import ImageBank
from raymaml.data.shard_format import MANIFEST_FILE
from raymaml.data.shards import EpisodeShards

_REMEDY = (
    "put it back as it was, then run the same command: nothing that came from it since was kept"
)


class Watch:
    """Watches the size, time of change and inode of the files from now on.

    It does not see bits that change without the file system, as on a failing disk.
    """

    def __init__(self, bank: ImageBank, shards: EpisodeShards) -> None:
        self._bank, self._shards = bank, shards
        files = [shards.folder / MANIFEST_FILE, *(path for path, _, _ in shards.files)]
        self._stamps = {path: _stamp(path) for path in (bank.images_file, *files)}

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
                raise UserError(f"{path}: is {state} while it is in use", remedy=_REMEDY)
        bank, shards = ImageBank.open(self._bank.folder), EpisodeShards.open(self._shards.folder)
        bank.verify()
        same = {
            bank.folder: bank.hash == self._bank.hash,
            shards.folder: shards.manifest_hash == self._shards.manifest_hash,
        }
        with gathered() as mistakes:
            for folder in (folder for folder, is_same in same.items() if not is_same):
                mistakes.add(f"{folder}: holds other data than before while it is in use", _REMEDY)
        self._stamps = now


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino
