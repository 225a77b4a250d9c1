"""Where the rows of a prediction go: a CSV, a Parquet file, or a folder of Parquet files.

A file is written whole or not at all. A folder holds a file a chunk, each whole, and a record of
the model and the list: the same command writes those that are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from raymaml.common.errors import UserError
from raymaml.common.untrusted import json_text, parse_json
from raymaml.storage.files import exists, reaching, read_bytes, replacing, write_text
from raymaml.storage.place import Place, is_remote

RECORD = "_predictions.json"
"""What a folder was begun with; readers of Parquet folders pass over names like this."""
SUFFIXES = (".csv", ".parquet")


def is_folder(out: Place) -> bool:
    """Return whether rows are written into a folder of this name, a file a chunk."""
    return not out.suffix


def check_output(out: Place, option: str, suffixes: tuple[str, ...]) -> None:
    """Check that a file can be written.

    Raises:
        UserError: it exists, its suffix is unknown, or its folder is missing.
    """
    if out.suffix.lower() not in ("", *suffixes) or (not out.suffix and option != "--out"):
        raise UserError(
            f"{option}: {out} ends in {out.suffix or 'no suffix'}",
            remedy=f"give a name that ends in {' or '.join(suffixes)}",
        )
    if is_remote(out) and out.protocol == "memory":
        raise UserError(
            f"{option}: {out} is lost when the command ends", remedy="give a file on disk"
        )
    if out.suffix and exists(out):
        raise UserError(f"{option}: {out} exists", remedy="move it away, or give another name")
    if not is_remote(out) and not out.parent.is_dir():
        raise UserError(f"{option}: {out.parent} is no folder", remedy="make it, or give another")


def write_file(out: Place, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write all rows into one file, CSV or Parquet by its suffix."""
    # in a CSV Arrow writes the fewest digits that give a float32 back
    kind = csv.CSVWriter if out.suffix.lower() == ".csv" else pq.ParquetWriter
    with replacing(out) as file, kind(file, schema) as writer:
        for table in tables:
            writer.write_table(table)


def shard(folder: Place, number: int) -> Place:
    """Name the file of a chunk."""
    return folder / f"part-{number:06d}.parquet"


def write_shard(folder: Place, number: int, table: pa.Table) -> None:
    """Write the rows of a chunk as a whole file."""
    with replacing(shard(folder, number)) as file:
        pq.write_table(table, file, write_page_checksum=True)


def read_shard(folder: Place, number: int) -> pa.Table:
    """Return the rows of a chunk."""
    return pq.read_table(pa.BufferReader(read_bytes(shard(folder, number))))


def missing_shards(folder: Place, count: int) -> list[int]:
    """Return the numbers of the chunks, of ``count``, that have no file yet."""
    with reaching(folder, FileNotFoundError), suppress(FileNotFoundError):
        there = {path.name for path in folder.iterdir()}
        return [number for number in range(count) if shard(folder, number).name not in there]
    return list(range(count))


def check_folder(folder: Place, record: Mapping[str, Any]) -> None:
    """Check that a folder is new, or was begun with the same model and pictures.

    Raises:
        UserError: naming what differs.
    """
    if not exists(folder):
        return
    try:
        before = parse_json(read_bytes(folder / RECORD))
    except (OSError, ValueError):
        if not is_remote(folder) and folder.is_dir() and not any(folder.iterdir()):
            return
        raise UserError(
            f"--out: {folder} exists and holds no predictions",
            remedy="give another folder, or a name that ends in .csv or .parquet",
        ) from None
    before = before if isinstance(before, dict) else {}
    if differ := [key for key, value in record.items() if before.get(key) != value]:
        raise UserError(
            f"--out: {folder} was begun with another {' and another '.join(differ)}",
            remedy="give another folder, or the same command as before",
        )


def begin_folder(folder: Place, record: Mapping[str, Any]) -> None:
    """Record what a folder is for."""
    if not exists(folder / RECORD):
        write_text(folder / RECORD, json_text(record, indent=2) + "\n")
