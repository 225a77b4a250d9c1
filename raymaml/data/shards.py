"""Shards: the sampled episodes of one split in a folder of Arrow files.

They store the result of ``sample_episode``, whatever their size and number.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raymaml.common.errors import UserError, gathered
from raymaml.config.schema import EpisodesConfig
from raymaml.data.arrow_file import ArrowFile, require_size
from raymaml.data.bank import ImageBank
from raymaml.data.sampling import EpisodeRows, check_spec, sample_episode
from raymaml.data.shard_format import (
    MANIFEST_FILE,
    REMEDY,
    Manifest,
    ShardFile,
    episodes_table,
    read_manifest,
    read_pixels,
    read_rows,
    row_problem,
    shard_schema,
)
from raymaml.storage.cache import CACHE, local_copy
from raymaml.storage.files import exists, new_folder, sha256_of_file
from raymaml.storage.place import Place, is_remote
from raymaml.storage.temporary import partial_name, remove_dead

# episodes a shard and a record batch
_ROWS_AT_ONCE = 20_000, 1_000
# 16 episodes of 80 images at 84x84x3 are 27 MB: a block that Ray's object store takes easily
_PIXELS_AT_ONCE = 256, 16


class EpisodeShards:
    """A folder of shards, opened for reading by episode index."""

    def __init__(
        self, folder: Path, manifest: Manifest, manifest_hash: str, place: Place, cache: Path
    ) -> None:
        self.place = place
        self.cache = cache
        self.folder = folder
        self.manifest = manifest
        self.manifest_hash = manifest_hash
        self.spec = manifest.spec
        self.count = manifest.count
        self.materialized = manifest.materialized
        self.files = [(folder / s.file, s.first, s.count) for s in manifest.shards]
        self._schema = shard_schema(
            self.spec, manifest.image_shape, materialized=manifest.materialized
        )
        self._opened: dict[int, ArrowFile] = {}
        self._batches: dict[tuple[int, int], pa.RecordBatch] = {}

    @classmethod
    def open(cls, place: Place, cache: Path = CACHE, *, verify: bool = True) -> EpisodeShards:
        """Open the shards of one split after checking size and SHA-256 of each file.

        ``verify=False`` checks sizes only, for processes that open verified files. Shards at a URI
        are copied into ``cache`` when this machine opens them for the first time.

        Raises:
            UserError: no or another manifest, or a shard that is missing, truncated or altered;
                every bad file is named.
        """
        folder = local_copy(
            place,
            cache,
            marker=MANIFEST_FILE,
            others=lambda partial: [shard.file for shard in read_manifest(partial)[0].shards],
            verify=cls.open,
        )
        manifest, manifest_hash = read_manifest(folder)
        with gathered() as mistakes:
            for shard in manifest.shards:
                path = folder / shard.file
                with mistakes.kept():
                    require_size(path, shard.bytes, REMEDY)
                    if verify and sha256_of_file(path) != shard.sha256:
                        problem = f"{path}: is altered (its SHA-256 is not the manifest's)"
                        raise UserError(problem, remedy=REMEDY)
        return cls(folder, manifest, manifest_hash, place, cache)

    def rows(self, indices: Sequence[int] | range) -> list[EpisodeRows]:
        """Return the episodes of these indices, in their order.

        Raises:
            IndexError: an index is outside 0..count-1.
        """
        return read_rows(self.table(indices))

    def pixels(self, indices: Sequence[int] | range) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return support [E, N*K, H, W, C] and query [E, N*Q, H, W, C] of materialised shards."""
        return read_pixels(self.table(indices))

    def table(self, indices: Sequence[int] | range) -> pa.Table:
        """Return one table row per index, in the order of ``indices``. Consecutive episodes of one
        record batch are a slice of the mapped file; several slices are copied into one table.
        """
        places = map(self._locate, indices)
        slices = []
        for (shard, batch, offset), run in groupby(
            enumerate(places), lambda item: (item[1][0], item[1][1], item[1][2] - item[0])
        ):
            own = list(run)
            slices.append(self._batch(shard, batch).slice(offset + own[0][0], len(own)))
        return pa.Table.from_batches(slices, self._schema).combine_chunks()

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Return the shard and the record batch that hold an episode, and its place there."""
        if not 0 <= index < self.count:
            raise IndexError(f"episode {index} is outside 0..{self.count - 1} of {self.folder}")
        shard = bisect_right(self.files, index, key=lambda file: file[1]) - 1
        batch, at = divmod(index - self.files[shard][1], self.manifest.episodes_per_batch)
        return shard, batch, at

    def _batch(self, shard: int, batch: int) -> pa.RecordBatch:
        path, _, count = self.files[shard]
        per_batch = self.manifest.episodes_per_batch
        if (shard, batch) not in self._batches:
            if shard not in self._opened:
                self._opened[shard] = ArrowFile(path, self._schema, REMEDY)
            rows = min(per_batch, count - batch * per_batch)
            self._batches[shard, batch] = self._opened[shard].batch(batch, rows)
        return self._batches[shard, batch]

    def check_rows(self, bank: ImageBank) -> None:
        """Check that each row number belongs to the class that the episode names, and this class to
        the right split.

        Raises:
            UserError: one is not, or a shard is damaged.
        """
        per_batch, split = self.manifest.episodes_per_batch, self.manifest.split
        for shard, (path, first, count) in enumerate(self.files):
            for number, start in enumerate(range(0, count, per_batch)):
                table = pa.Table.from_batches([self._batch(shard, number)])
                if problem := row_problem(table, first + start, bank, self.spec, split):
                    raise UserError(f"{path}: {problem} in the bank {bank.folder}", remedy=REMEDY)


@dataclass(frozen=True)
class Sampling:
    """The episodes of one split that a config asks for, and the folder that is to hold them.

    An episode is a function of the bank, the spec, the seed, the split and its index (contract 4).
    """

    bank: ImageBank
    spec: EpisodesConfig
    _: KW_ONLY
    seed: int
    split: str
    folder: Place
    materialize: bool = False
    """Whether the shards hold the pixels too."""
    cache: Path = CACHE
    """The folder of the copies of data at URIs."""

    def write(self, episodes_per_shard: int | None = None) -> EpisodeShards:
        """Sample the episodes into the folder and open them.

        The folder appears complete or not at all; one that holds these very episodes is reused.

        Raises:
            UserError: the bank cannot give such episodes, or the folder holds something else.
        """
        check_spec(self.bank, self.spec, self.split)
        folder = self.folder
        if not is_remote(folder):
            remove_dead(folder.parent, escape(partial_name(folder.name)))
        if not self._is_there():
            with contextlib.suppress(FileExistsError), new_folder(folder, MANIFEST_FILE) as partial:
                self._write(partial, episodes_per_shard)
        shards = EpisodeShards.open(folder, self.cache)
        self.require(shards, same_form=True)
        return shards

    def check(self) -> None:
        """Raise the ``UserError`` that ``write`` would raise."""
        check_spec(self.bank, self.spec, self.split)
        if self._is_there():
            shards = EpisodeShards.open(self.folder, self.cache, verify=False)
            self.require(shards, same_form=True)

    def require(self, shards: EpisodeShards, *, same_form: bool = False) -> None:
        """Check that ``shards`` are these episodes; with ``same_form``, with or without pixels too.

        There may be more test episodes than asked for: the first ones are judged.

        Raises:
            UserError: naming everything that differs; or row numbers are not of the bank.
        """
        found = shards.manifest
        pairs: dict[str, tuple[Any, Any]] = {
            "bank_hash": (found.bank_hash, self.bank.hash),
            "episodes.seed": (found.seed, self.seed),
            "split": (found.split, self.split),
            "image_shape": (found.image_shape, self.bank.image_shape),
        }
        pairs |= {f"spec.{key}": (getattr(found.spec, key), value) for key, value in self.spec}
        if self.split == "test" and shards.count > self.spec.num_episodes:
            del pairs["spec.num_episodes"]
        if same_form:
            pairs["materialized"] = (found.materialized, self.materialize)
        with gathered() as mistakes:
            for key, (has, wanted) in pairs.items():
                if has != wanted:
                    mistakes.add(
                        f"{shards.place / MANIFEST_FILE}: {key} is {has!r}, config and bank ask for"
                        f" {wanted!r}",
                        remedy=f"{REMEDY}, or set data.shards to another path",
                    )
        shards.check_rows(self.bank)

    def _is_there(self) -> bool:
        # A killed process may leave a folder without its manifest at a URI; that is overwritten.
        return exists(self.folder / MANIFEST_FILE if is_remote(self.folder) else self.folder)

    def _write(self, folder: Path, episodes_per_shard: int | None) -> None:
        """Write all shards, then the manifest."""
        schema = shard_schema(self.spec, self.bank.image_shape, materialized=self.materialize)
        per_shard, per_batch = _PIXELS_AT_ONCE if self.materialize else _ROWS_AT_ONCE
        per_shard = episodes_per_shard or per_shard
        per_batch = min(per_shard, per_batch)
        count, shards = self.spec.num_episodes, []
        for number, first in enumerate(range(0, count, per_shard)):
            stop = min(first + per_shard, count)
            path = folder / f"shard-{number:05d}.arrow"
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
                for at in range(first, stop, per_batch):
                    episodes = [
                        sample_episode(self.bank, self.spec, self.seed, self.split, index)
                        for index in range(at, min(at + per_batch, stop))
                    ]
                    writer.write_batch(episodes_table(episodes, schema, self.bank))
            shard = ShardFile(
                file=path.name,
                first=first,
                count=stop - first,
                bytes=path.stat().st_size,
                sha256=sha256_of_file(path),
            )
            shards.append(shard)
        manifest = Manifest(
            bank_hash=self.bank.hash,
            split=self.split,
            spec=self.spec,
            seed=self.seed,
            count=count,
            materialized=self.materialize,
            image_shape=self.bank.image_shape,
            episodes_per_batch=per_batch,
            shards=tuple(shards),
        )
        text = json.dumps(manifest.model_dump(), indent=2) + "\n"
        (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
