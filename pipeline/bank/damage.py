"""Finds the damage inside one shard file: which rows, or only the index or the padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from patchbank.pipeline.bank.layout import ShardLayout, crc32c, encode_index, parse_index
from patchbank.pipeline.bank.schema import HOLE, BankSchema
from patchbank.pipeline.errors import BankCorrupt

NO_CLIPS = "without a sound clips.parquet no row can be named"


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


def lost_rows(file: ShardFile, n_bytes: int) -> str:
    """Which rows lie beyond the `n_bytes` that are left of a shard file, where they usually lie."""
    n_whole = min(len(file.rows), n_bytes // file.layout.row_stride_bytes)
    first, last = file.rows.start + n_whole, file.rows.stop - 1
    if first > last:
        return "; the index is lost, no row"
    return f"; row {first} is lost" if first == last else f"; rows {first}-{last} are lost"


def shard_problems(
    file: ShardFile, clips: pa.Table | None, *, difference: str | None
) -> Iterator[str]:
    """What is wrong with a shard file of the sealed size, a sentence a run of rows.

    Only the index is read unless `difference` says how the file's digest differs from the seal.
    Without trusted `clips` the rows cannot be told apart.
    """
    clips = None if clips is None else clips.slice(file.rows.start, len(file.rows))
    try:
        offsets, index_problem = _offsets(file), None
    except BankCorrupt as error:
        offsets, index_problem = _usual_offsets(file), str(error)
    except OSError as error:
        yield f"shard {file.name}: cannot be read: {error.strerror}"
        return
    if clips is None:
        yield from [index_problem] if index_problem else []
        if difference is not None:
            yield f"shard {file.name}: {difference}; {NO_CLIPS}"
        return
    broken_promises = [] if index_problem else list(_promise_problems(file, offsets, clips))
    yield from broken_promises
    if difference is None:
        yield from [index_problem] if index_problem else []
    elif difference.startswith("holds"):
        yield f"shard {file.name}, rows {file.rows.start}-{file.rows[-1]}: {difference}"
    elif index_problem is not None:
        yield from _damage_without_index(file, offsets, clips, index_problem)
    else:
        yield from _damage(file, offsets, clips, explained=bool(broken_promises))


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


def _damage_without_index(
    file: ShardFile, usual: Int64[np.ndarray, " row"], clips: pa.Table, index_problem: str
) -> Iterator[str]:
    wrong = _wrong_rows(file, usual, clips)
    if len(wrong) == len(file.rows) - clips["status"].to_pylist().count(HOLE):
        yield f"{index_problem}; no row is at its usual place"
        return
    yield from _row_problems(file, wrong, clips)
    rows = "the other rows are" if wrong else "every row is"
    yield f"{index_problem}; {rows} whole at the usual places"


def _damage(
    file: ShardFile, offsets: Int64[np.ndarray, " row"], clips: pa.Table, *, explained: bool
) -> Iterator[str]:
    """Never empty unless the difference is `explained` already."""
    wrong = _wrong_rows(file, offsets, clips)
    yield from _row_problems(file, wrong, clips)
    if explained:
        # The bytes of a row that the index lacks look like padding.
        return
    if not _padding_is_zero(file, offsets):
        rows = "the other rows are" if wrong else "every row is"
        yield f"shard {file.name}: padding between rows is not zero; {rows} whole"
    elif not wrong:
        yield f"shard {file.name}: {_harmless_part(file)}; every row is whole"


def _row_problems(file: ShardFile, wrong: Sequence[int], clips: pa.Table) -> Iterator[str]:
    columns = f"crc32c_{file.column_suffix} and sha256_{file.column_suffix}"
    for place in _places(file, wrong, clips):
        yield f"{place}: the bytes do not match {columns} of clips.parquet"


def _harmless_part(file: ShardFile) -> str:
    with file.path.open("rb") as content:
        content.seek(-file.layout.index_bytes, 2)
        usual = content.read() == encode_index(file.layout, len(file.rows))
    return "SHA-256 is not the sealed one" if usual else "the index is another one than sealed"


def _wrong_rows(file: ShardFile, offsets: Int64[np.ndarray, " row"], clips: pa.Table) -> list[int]:
    """Slots whose bytes are not those of their checksums; missing rows and holes are left out."""
    crcs = clips[f"crc32c_{file.column_suffix}"].to_pylist()
    sha256s = clips[f"sha256_{file.column_suffix}"].to_pylist()
    there = (offsets >= 0) & (np.asarray(clips["status"]) != HOLE)
    wrong = []
    with file.path.open("rb") as content:
        for slot in np.flatnonzero(there).tolist():
            content.seek(int(offsets[slot]))
            row = content.read(file.layout.row_bytes)
            if crc32c(row) != crcs[slot] or hashlib.sha256(row).hexdigest() != sha256s[slot]:
                wrong.append(slot)
    return wrong


def _padding_is_zero(file: ShardFile, offsets: Int64[np.ndarray, " row"]) -> bool:
    """Whether all bytes that belong to no row and not to the index are zero."""
    position = 0
    with file.path.open("rb") as content:
        index_start = content.seek(-file.layout.index_bytes, 2)
        for offset in [*sorted(offsets[offsets >= 0].tolist()), index_start]:
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
