"""Rows of Parquet files that strangers made, in batches, and one picture of them again when it is opened.

    rows(path, columns)     ("a.parquet:group.row", {column: value}) or Broken, a few rows in memory at once
    read_cell(...)          the bytes of one picture: a worker keeps its place in the row group, so that the pictures
                            of neighbouring documents cost one pass over it

A row group that cannot be read is one `Broken`, and the next one follows. Memory holds a page (at most 2 GiB by the
format) and a few rows of each column. The door of `pyarrow.parquet`, whose errors are of many kinds: all of them mean a
damaged file.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moma.data.sources.files import BLOCK, arrow, broken_file, printable
from moma.data.sources.raw import MAX_PICTURE_BYTES, Broken

MAX_FOOTER = 64 * 2**20  # bytes of a string or entries of a list in the file's footer
_ROWS = 16  # read at once: with pictures some MB


def rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[str, Any] | Broken]:
    """(place, {column: value}) of every row; `optional` columns that the file lacks are left out of it."""
    try:
        file = _open(path)
        names, groups, promised = set(file.schema_arrow.names), file.num_row_groups, file.metadata.num_rows
    except Exception as error:
        yield broken_file(path, error)
        return
    with file:
        missing = [column for column in columns if column not in names]
        if missing:
            reason = f"got columns {sorted(names)!s:.80}, need {', '.join(missing)}: set the names of the columns"
            yield Broken("wrong_type", printable(str(path)), reason)
            return
        wanted = [*columns, *(column for column in optional if column in names)]
        found = broken = 0
        for group in range(groups):
            for row in _group(path, file, group, wanted):
                found, broken = found + isinstance(row, tuple), broken + isinstance(row, Broken)
                yield row
        if not broken and found != promised:
            yield broken_file(path, ValueError(f"{promised} rows promised"), f" after {found} rows")


def read_cell(path: Path, group: int, row: int, column: str, index: int) -> bytes:
    """The bytes of picture `index` in the list of a row, plain or the field `bytes` of a struct."""
    try:
        batch, at = _batch(path, group, row, column)
        value = batch.column(column)[at][index]
        value = (value["bytes"] if _is_struct(value) else value).as_py()
    except Exception as error:
        place = f"{printable(str(path))}:{group}.{row}"
        raise ValueError(f"got {place} unreadable ({error!s:.80}), need it whole: copy the file again") from error
    if not isinstance(value, bytes) or len(value) > MAX_PICTURE_BYTES:
        place = f"{printable(str(path))}:{group}.{row}"
        raise ValueError(f"got {place} changed, need the picture listed there: prepare it again")
    return value


def _open(path: Path) -> Any:
    arrow()
    from pyarrow import parquet

    return parquet.ParquetFile(
        path,
        pre_buffer=False,
        buffer_size=BLOCK,
        thrift_string_size_limit=MAX_FOOTER,
        thrift_container_size_limit=MAX_FOOTER,
        page_checksum_verification=True,
    )


def _group(path: Path, file: Any, group: int, columns: list[str]) -> Iterator[tuple[str, Any] | Broken]:
    # Of the metadata nothing is asked by row group or column: on a damaged footer pyarrow 26 aborts the process there.
    row = 0
    try:
        for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns, use_threads=False):
            for at in range(batch.num_rows):
                yield _row(f"{printable(str(path))}:{group}.{row}", batch, at, columns)
                row += 1
    except Exception as error:
        yield broken_file(path, error, f" after row {group}.{row - 1}" if row else f" in row group {group}")


def _row(place: str, batch: Any, at: int, columns: list[str]) -> tuple[str, Any] | Broken:
    try:
        return place, {column: batch.column(column)[at].as_py() for column in columns}
    except Exception as error:
        return Broken("unreadable", place, f"got a broken row ({error!s:.80}), need it whole: write it again")


class _Reading(threading.local):
    """Where this thread stands in the row group that it read last."""

    of: tuple[Path, int, str] | None = None
    batches: Iterator[Any] = iter(())
    batch: Any = None
    start = 0


_READING = _Reading()


def _batch(path: Path, group: int, row: int, column: str) -> tuple[Any, int]:
    """The batch that holds a row, and the row's place in it; reading goes on from the last batch where it can."""
    now = _READING
    if now.of != (path, group, column) or row < now.start:
        now.of = None
        batches = _open(path).iter_batches(_ROWS, row_groups=[group], columns=[column], use_threads=False)
        now.batches, now.batch, now.start = batches, next(batches), 0
        now.of = (path, group, column)
    while row >= now.start + now.batch.num_rows:
        start = now.start + now.batch.num_rows
        now.batch, now.start = next(now.batches), start
    return now.batch, row - now.start


def _is_struct(value: Any) -> bool:
    return arrow().types.is_struct(value.type)
