"""Finds the damage inside one shard file: which rows, or only the index or the padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from patchbank.pipeline.bank.archive import archive_spans, decompress
from patchbank.pipeline.bank.layout import ShardLayout, crc32c, encode_index, parse_index
from patchbank.pipeline.bank.schema import HOLE, BankSchema
from patchbank.pipeline.errors import BankCorrupt

NO_CLIPS = "without a sound clips.parquet no row can be named"
READ_BYTES = 2**20
LONGEST_NAME = 200


@dataclass(frozen=True)
class ShardFile:
    """One shard file and what should be in it."""

    path: Path
    name: str
    column_suffix: str
    rows: range
    """Rows of the bank."""
    layout: ShardLayout
    is_archive: bool = False


def shown(name: str) -> str:
    """A name that a stranger chose, as a part of one line: what does not print is escaped."""
    if not name.isprintable():
        name = name.encode("unicode_escape", "backslashreplace").decode("ascii")
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}..."


def shard_files(bank: Path, schema: BankSchema) -> Iterator[ShardFile]:
    """Every shard file that the schema promises."""
    for array in schema.arrays():
        layout = array.layout(schema.rows_per_shard)
        for shard in range(schema.n_shards):
            name, rows = array.shard_path(shard), schema.rows_of(shard)
            yield ShardFile(bank / name, name, array.column_suffix, rows, layout, schema.is_archive)


def lost_rows(file: ShardFile, n_bytes: int) -> str:
    """Which rows lie beyond the `n_bytes` that are left of a shard file, where they usually lie."""
    if file.is_archive:
        return f"; rows {file.rows.start}-{file.rows.stop - 1} may be lost"
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
        spans, index_problem = _spans(file), None
    except BankCorrupt as error:
        spans, index_problem = _usual_spans(file), str(error)
    except OSError as error:
        yield f"shard {file.name}: cannot be read: {error.strerror}"
        return
    if clips is None:
        yield from [index_problem] if index_problem else []
        if difference is not None:
            yield f"shard {file.name}: {difference}; {NO_CLIPS}"
        return
    broken_promises = [] if index_problem else list(_promise_problems(file, spans[:, 0], clips))
    yield from broken_promises
    if difference is None:
        yield from [index_problem] if index_problem else []
    elif difference.startswith("holds"):
        yield f"shard {file.name}, rows {file.rows.start}-{file.rows[-1]}: {difference}"
    elif index_problem is not None:
        yield from _damage_without_index(file, spans, clips, index_problem)
    else:
        yield from _damage(file, spans, clips, explained=bool(broken_promises))


def _spans(file: ShardFile) -> Int64[np.ndarray, "row 2"]:
    """Offset and length of each row; -1 and 0 where it is not there."""
    with file.path.open("rb") as content:
        size = content.seek(0, 2)
        content.seek(max(0, size - file.layout.index_bytes))
        tail = content.read(min(size, file.layout.index_bytes))
    n_rows = len(file.rows)
    if file.is_archive:
        return archive_spans(tail, file.layout, file_bytes=size, name=file.name)[:n_rows]
    offsets = parse_index(tail, file.layout, file_bytes=size, name=file.name)[:n_rows]
    return np.stack([offsets, np.where(offsets < 0, 0, file.layout.row_bytes)], 1)


def _usual_spans(file: ShardFile) -> Int64[np.ndarray, "row 2"]:
    """Where rows lie in a file that nothing but its index was damaged in; not so in an archive."""
    offsets = np.arange(len(file.rows), dtype=np.int64) * file.layout.row_stride_bytes
    return np.stack([offsets, np.full_like(offsets, file.layout.row_bytes)], 1)


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
    file: ShardFile, usual: Int64[np.ndarray, "row 2"], clips: pa.Table, index_problem: str
) -> Iterator[str]:
    if file.is_archive:
        yield f"{index_problem}; without it no row of an archive can be found"
        return
    wrong = _wrong_rows(file, usual, clips)
    if len(wrong) == len(file.rows) - clips["status"].to_pylist().count(HOLE):
        yield f"{index_problem}; no row is at its usual place"
        return
    yield from _row_problems(file, wrong, clips)
    rows = "the other rows are" if wrong else "every row is"
    yield f"{index_problem}; {rows} whole at the usual places"


def _damage(
    file: ShardFile, spans: Int64[np.ndarray, "row 2"], clips: pa.Table, *, explained: bool
) -> Iterator[str]:
    """Never empty unless the difference is `explained` already."""
    wrong = _wrong_rows(file, spans, clips)
    yield from _row_problems(file, wrong, clips)
    if explained:
        # The bytes of a row that the index lacks look like padding.
        return
    if not file.is_archive and not _padding_is_zero(file, spans[:, 0]):
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


def _wrong_rows(file: ShardFile, spans: Int64[np.ndarray, "row 2"], clips: pa.Table) -> list[int]:
    """Slots whose bytes are not those of their checksums; missing rows and holes are left out."""
    crcs = clips[f"crc32c_{file.column_suffix}"].to_pylist()
    sha256s = clips[f"sha256_{file.column_suffix}"].to_pylist()
    there = (spans[:, 0] >= 0) & (np.asarray(clips["status"]) != HOLE)
    wrong = []
    with file.path.open("rb") as content:
        for slot in np.flatnonzero(there).tolist():
            content.seek(int(spans[slot, 0]))
            row = _row(file, content.read(int(spans[slot, 1])))
            if crc32c(row) != crcs[slot] or hashlib.sha256(row).hexdigest() != sha256s[slot]:
                wrong.append(slot)
    return wrong


def _row(file: ShardFile, stored: bytes) -> bytes:
    """The tokens of a row as checksums know them; nothing where they cannot be decompressed."""
    if not file.is_archive:
        return stored
    try:
        return decompress(stored, row_bytes=file.layout.row_bytes)
    except ValueError:
        return b""


def _padding_is_zero(file: ShardFile, offsets: Int64[np.ndarray, " row"]) -> bool:
    """Whether all bytes that belong to no row and not to the index are zero."""
    position = 0
    with file.path.open("rb") as content:
        index_start = content.seek(-file.layout.index_bytes, 2)
        for offset in [*sorted(offsets[offsets >= 0].tolist()), index_start]:
            content.seek(position)
            while position < offset:
                piece = content.read(min(offset - position, READ_BYTES))
                if not piece or piece.strip(b"\0"):
                    return False
                position += len(piece)
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
        named = f"row {first} ({shown(clips['clip_id'][run[0]].as_py())})"
        yield f"shard {file.name}, {named if first == last else f'rows {first}-{last}'}"
