"""Gathers a bank's rows from where they lie: parts of an extraction, other banks, holes.

Extraction, growth and merge end alike: their rows stand one after another in some sources, and the
small arrays and clips.parquet are written from these, 65,536 rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from patchbank.pipeline.bank.parts import clip_columns, part_path, small_values
from patchbank.pipeline.bank.schema import (
    HOLE,
    SMALL_CHUNK_ROWS,
    BankSchema,
    SmallArray,
    create_small_array,
)

CLIPS = "clips.parquet"


@runtime_checkable
class RowSource(Protocol):
    """Rows that follow each other in a bank."""

    @property
    def n_rows(self) -> int: ...

    def small(self, array: SmallArray, rows: range) -> Shaped[np.ndarray, "row ..."]:
        """Values of a small array for some of the rows, counted from the source's first."""
        ...

    def clips(self, rows: range) -> pa.Table:
        """The same rows of clips.parquet."""
        ...


class PartRows:
    """The rows of one generation of `bank`, from its part files."""

    def __init__(self, bank: Path, schema: BankSchema, shards: range) -> None:
        self._bank, self._shards = bank, shards
        self._per_shard = schema.rows_per_shard
        self._first = schema.rows_of(shards[0]).start
        self.n_rows = schema.rows_of(shards[-1]).stop - self._first
        self._columns = clip_columns(bank / part_path(shards[0]))

    def small(self, array: SmallArray, rows: range) -> Shaped[np.ndarray, "row ..."]:
        return small_values(self._read(rows, [array.path])[array.path], array)

    def clips(self, rows: range) -> pa.Table:
        return self._read(rows, self._columns)

    def _read(self, rows: range, columns: list[str]) -> pa.Table:
        first, last = rows.start // self._per_shard, (rows.stop - 1) // self._per_shard
        tables = [
            pq.read_table(self._bank / part_path(shard), columns=columns)
            for shard in self._shards[first : last + 1]
        ]
        offset = rows.start - first * self._per_shard
        return pa.concat_tables(tables).slice(offset, len(rows)).combine_chunks()


@dataclass(frozen=True)
class HoleRows:
    """Slots between generations that hold no clip."""

    n_rows: int

    def small(self, array: SmallArray, rows: range) -> Shaped[np.ndarray, "row ..."]:
        return np.full((len(rows), *array.row_shape), array.fill, array.dtype)

    def clips(self, rows: range) -> pa.Table:
        return pa.table({"status": pa.array([HOLE] * len(rows), pa.int8())})


def with_holes(sources: Sequence[RowSource], rows_per_shard: int) -> list[RowSource]:
    """`sources`, each but the last filled up with holes to the end of its last shard."""
    filled: list[RowSource] = []
    for source in sources:
        if filled and (n_holes := -filled[-1].n_rows % rows_per_shard):
            filled.append(HoleRows(n_holes))
        filled.append(source)
    return filled


def assemble(folder: Path, schema: BankSchema, sources: Sequence[RowSource]) -> None:
    """Writes the small arrays and clips.parquet of a bank below `folder`."""
    n_rows = sum(source.n_rows for source in sources)
    if n_rows != schema.n_rows:
        raise ValueError(f"the sources have {n_rows} rows, the bank {schema.n_rows}")
    for array in schema.small_arrays():
        out = create_small_array(folder, array, n_rows)
        for rows in _chunks(n_rows):
            pieces = [source.small(array, part) for source, part in _cut(sources, rows)]
            out[rows.start : rows.stop] = np.concatenate(pieces)
    _assemble_clips(folder, sources, n_rows)


def _chunks(n_rows: int) -> Iterator[range]:
    for start in range(0, n_rows, SMALL_CHUNK_ROWS):
        yield range(start, min(start + SMALL_CHUNK_ROWS, n_rows))


def _cut(sources: Sequence[RowSource], rows: range) -> Iterator[tuple[RowSource, range]]:
    """The sources that `rows` lie in, with the rows that each of them gives."""
    first = 0
    for source in sources:
        part = range(max(rows.start, first) - first, min(rows.stop, first + source.n_rows) - first)
        if part:
            yield source, part
        first += source.n_rows


def _assemble_clips(folder: Path, sources: Sequence[RowSource], n_rows: int) -> None:
    schema = clips_schema(sources)
    with (folder / CLIPS).open("wb") as file:
        writer: Any = pq.ParquetWriter(file, schema)
        for rows in _chunks(n_rows):
            for source, part in _cut(sources, rows):
                writer.write_table(fit_columns(source.clips(part), schema))
        writer.close()


def clips_schema(sources: Sequence[RowSource]) -> pa.Schema:
    """The columns of all sources, in the order in which they first come."""
    fields: dict[str, pa.Field] = {}
    for source in sources:
        if isinstance(source, HoleRows):
            continue
        for found in source.clips(range(1)).schema:
            if found.name not in fields or pa.types.is_null(fields[found.name].type):
                fields[found.name] = found.with_nullable(True)
    return pa.schema(list(fields.values()))


def fit_columns(clips: pa.Table, schema: pa.Schema) -> pa.Table:
    """`clips` with exactly the columns of `schema`; those that it lacks are null."""
    columns = [
        clips[field.name].cast(field.type)
        if field.name in clips.column_names
        else pa.nulls(len(clips), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
