"""Cutting a stream of tables into pieces of wanted lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa


def cut(tables: Iterator[pa.Table], counts: Iterable[int]) -> Iterator[pa.Table | None]:
    """Yield consecutive pieces of ``counts`` rows, however the tables fall; None for no rows.

    Raises:
        RuntimeError: the tables end before the counts do.
    """
    ahead: list[pa.Table] = []
    rows = 0
    for count in counts:
        while rows < count:
            table = next(tables, None)
            if table is None:
                raise RuntimeError(f"the stream ended with {rows} of {count} rows wanted")
            ahead.append(table)
            rows += len(table)
        if count == 0:
            yield None
            continue
        joined = ahead[0] if len(ahead) == 1 else pa.concat_tables(ahead)
        yield joined.slice(0, count)
        ahead, rows = [joined.slice(count)], rows - count
