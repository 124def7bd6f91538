"""Finds the damage inside one shard file: which rows, or only the index or the padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from patchbank.pipeline.bank.layout import ShardLayout, crc32c, encode_index, parse_index
from patchbank.pipeline.bank.schema import HOLE, BankSchema
from patchbank.pipeline.errors import BankCorrupt


@dataclass(frozen=True)
class ShardFile:
    """One shard file and what should be in it."""

    path: Path
    name: str
    column_suffix: str
    rows: range
    """Rows of the bank."""
    layout: ShardLayout


def shard_files(bank: Path, schema: BankSchema) -> Iterator[ShardFile]:
    """Every shard file that the schema promises."""
    for array in schema.arrays():
        layout = array.layout(schema.rows_per_shard)
        for shard in range(schema.n_shards):
            name, rows = array.shard_path(shard), schema.rows_of(shard)
            yield ShardFile(bank / name, name, array.column_suffix, rows, layout)


def shard_problems(
    file: ShardFile, clips: pa.Table | None, *, difference: str | None
) -> Iterator[str]:
    """What is wrong with a shard file of the sealed size, a sentence a run of rows.

    Only the index is read unless `difference` says how the file's digest differs from the seal.
    Without trusted `clips` the rows cannot be told apart.
    """
    try:
        clips = None if clips is None else clips.slice(file.rows.start, len(file.rows))
        try:
            offsets, index_problem = _offsets(file), None
        except BankCorrupt as error:
            offsets, index_problem = _usual_offsets(file), str(error)
        if clips is not None and index_problem is None:
            yield from _promise_problems(file, offsets, clips)
        if difference is not None:
            yield from _damage(file, offsets, clips, difference, index_problem)
        elif index_problem is not None:
            yield index_problem
    except OSError as error:
        yield f"shard {file.name}: cannot be read: {error.strerror}"


def _offsets(file: ShardFile) -> Int64[np.ndarray, " row"]:
    with file.path.open("rb") as content:
        size = content.seek(0, 2)
        content.seek(max(0, size - file.layout.index_bytes))
        tail = content.read()
    return parse_index(tail, file.layout, file_bytes=size, name=file.name)[: len(file.rows)]


def _usual_offsets(file: ShardFile) -> Int64[np.ndarray, " row"]:
    return np.arange(len(file.rows), dtype=np.int64) * file.layout.row_stride_bytes


def _promise_problems(
    file: ShardFile, offsets: Int64[np.ndarray, " row"], clips: pa.Table
) -> Iterator[str]:
    """Rows whose status promises tokens that the index lacks, and the reverse."""
    hole = np.asarray(clips["status"]) == HOLE
    missing, surplus = np.flatnonzero(~hole & (offsets < 0)), np.flatnonzero(hole & (offsets >= 0))
    for place in _places(file, missing.tolist(), clips):
        yield f"{place}: is missing, though clips.parquet promises it"
    for place in _places(file, surplus.tolist(), clips):
        yield f"{place}: is there, though clips.parquet calls it a hole"


def _damage(
    file: ShardFile,
    offsets: Int64[np.ndarray, " row"],
    clips: pa.Table | None,
    difference: str,
    index_problem: str | None,
) -> Iterator[str]:
    if clips is None:
        yield f"shard {file.name}: {difference}; without a sound clips.parquet no row can be named"
        return
    if difference.startswith("holds"):
        yield f"shard {file.name}, rows {file.rows.start}-{file.rows[-1]}: {difference}"
        return
    with file.path.open("rb") as content:
        wrong = _wrong_rows(file, content, offsets, clips)
        padding_is_zero = _padding_is_zero(file, content, offsets)
    if index_problem is not None and len(wrong) == len(file.rows):
        yield f"{index_problem}; no row is at its usual place"
        return
    columns = f"crc32c_{file.column_suffix} and sha256_{file.column_suffix}"
    for place in _places(file, wrong, clips):
        yield f"{place}: the bytes do not match {columns} of clips.parquet"
    rows = "the other rows are" if wrong else "every row is"
    if index_problem is not None:
        yield f"{index_problem}; {rows} whole at the usual places"
    elif not padding_is_zero:
        yield f"shard {file.name}: padding between rows is not zero; {rows} whole"
    elif not wrong and (offsets >= 0).all():
        yield f"shard {file.name}: {_harmless_part(file)}; every row is whole"


def _harmless_part(file: ShardFile) -> str:
    with file.path.open("rb") as content:
        content.seek(-file.layout.index_bytes, 2)
        usual = content.read() == encode_index(file.layout, len(file.rows))
    return "SHA-256 is not the sealed one" if usual else "the index is another one than sealed"


def _wrong_rows(
    file: ShardFile, content: BinaryIO, offsets: Int64[np.ndarray, " row"], clips: pa.Table
) -> list[int]:
    """Slots whose bytes are not those of their checksums; missing rows are left out."""
    crcs = clips[f"crc32c_{file.column_suffix}"].to_pylist()
    sha256s = clips[f"sha256_{file.column_suffix}"].to_pylist()
    wrong = []
    for slot in np.flatnonzero(offsets >= 0).tolist():
        content.seek(int(offsets[slot]))
        row = content.read(file.layout.row_bytes)
        if crc32c(row) != crcs[slot] or hashlib.sha256(row).hexdigest() != sha256s[slot]:
            wrong.append(slot)
    return wrong


def _padding_is_zero(
    file: ShardFile, content: BinaryIO, offsets: Int64[np.ndarray, " row"]
) -> bool:
    """Whether all bytes that belong to no row and not to the index are zero."""
    index_start = content.seek(-file.layout.index_bytes, 2)
    position = 0
    # Bytes of a row that the index lacks are counted as padding, but they are another problem.
    if (offsets < 0).any():
        return True
    for offset in [*sorted(offsets.tolist()), index_start]:
        content.seek(position)
        if any(content.read(offset - position)):
            return False
        position = offset + file.layout.row_bytes
    return True


def _places(file: ShardFile, slots: Sequence[int], clips: pa.Table) -> Iterator[str]:
    """Where a person finds these slots: one text a run of neighbours."""
    runs: list[list[int]] = []
    for slot in slots:
        if runs and slot == runs[-1][-1] + 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    for run in runs:
        first, last = file.rows[run[0]], file.rows[run[-1]]
        named = f"row {first} ({clips['clip_id'][run[0]].as_py()})"
        yield f"shard {file.name}, {named if first == last else f'rows {first}-{last}'}"
