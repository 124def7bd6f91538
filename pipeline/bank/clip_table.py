"""Reads clips.parquet without trusting it further than its size.

What its columns take in memory is counted before Arrow reads one: the values by the headers of
their pages, and texts by the dictionaries that spell them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int8, Int32

from patchbank.pipeline.bank.parquet_pages import pages
from patchbank.pipeline.bank.schema import DONE, FAILED, HOLE, BankSchema
from patchbank.pipeline.bank.seal_record import brief
from patchbank.pipeline.errors import BankCorrupt

MOST_EXPANSION = 256
"""How many times its file's size a table may take in memory; honest tables, mostly digests, stay
below 20."""
SPARE_BYTES = 64 * 2**20
LONGEST_REASON = 65_536
TYPES = {
    "clip_id": pa.string(),
    "view": pa.int16(),
    "path": pa.string(),
    "start_s": pa.float64(),
    "duration_s": pa.float64(),
    "audio_sha256": pa.string(),
    "status": pa.int8(),
    "reason": pa.string(),
}
OF_EVERY_CLIP = ("clip_id", "view", "path", "start_s", "duration_s")
"""Columns that are null in holes only."""

VALUE_BYTES = {
    "BOOLEAN": 1,
    "INT32": 4,
    "INT64": 8,
    "INT96": 12,
    "FLOAT": 4,
    "DOUBLE": 8,
    "BYTE_ARRAY": 16,
}
"""What a value takes once decoded, by physical type: of texts an offset, and of the dictionary a
length and a pointer. Values of fixed length say it themselves."""
LEVEL_BYTES = 8
"""What a level of nesting, or of being null, adds to a value."""


def read_clips(path: Path, schema: BankSchema) -> pa.Table:
    """clips.parquet of a bank of that schema, one row a bank row, in order.

    Raises `BankCorrupt` where it cannot be read, lacks a row or a column, would take more memory
    than its size justifies, or has holes elsewhere than the schema.
    """
    clips = _read(path, schema, only=None)
    for problem in (*_status_problems(clips, schema), *_value_problems(clips, schema)):
        raise BankCorrupt(f"{path}: {problem}; pull the bank again")
    return clips


def read_status(path: Path, schema: BankSchema) -> Int32[np.ndarray, " row"]:
    """The status of each row, as `read_clips` would have it, without a look at other columns.

    Raises what `read_clips` does, but for the values of those.
    """
    clips = _read(path, schema, only="status")
    for problem in _status_problems(clips, schema):
        raise BankCorrupt(f"{path}: {problem}; pull the bank again")
    return status_of(clips).astype(np.int32)


def status_of(clips: pa.Table) -> Int8[np.ndarray, " row"]:
    """The column `status`, in which no row is null."""
    # Whatever else turns Arrow's values into NumPy's imports pandas first, where there is one.
    return np.from_dlpack(clips["status"].combine_chunks())


def _read(path: Path, schema: BankSchema, *, only: str | None) -> pa.Table:
    """All columns or one, of which nothing is known but their types and their memory."""
    try:
        with pq.ParquetFile(path, **_thrift_limits(path)) as file:
            _check_metadata(path, file, schema)
            _check_expansion(path, file, only=only)
            clips = file.read(None if only is None else [only])
        if len(clips) != schema.n_rows:
            raise ValueError(f"{len(clips)} rows can be read of {schema.n_rows}")
        # Texts that are no UTF-8 would stop whoever prints or hashes them.
        clips.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BankCorrupt(f"{path}: cannot be read: {reason}; pull the bank again") from error
    return clips


def _thrift_limits(path: Path) -> dict[str, int]:
    """No list in the footer has more entries than the file has bytes."""
    n_bytes = max(1, min(path.stat().st_size, 2**30))
    return {"thrift_string_size_limit": n_bytes, "thrift_container_size_limit": n_bytes}


def _check_metadata(path: Path, file: pq.ParquetFile, schema: BankSchema) -> None:
    metadata = file.metadata
    if metadata.num_rows != schema.n_rows:
        raise BankCorrupt(f"{path}: {metadata.num_rows} rows, the card names {schema.n_rows}")
    if "parquet-mr" in (metadata.created_by or ""):
        # Arrow reads on behind the columns of some of its versions.
        raise ValueError("another program wrote it")
    expected = dict(TYPES)
    for array in schema.described_arrays():
        expected[f"sha256_{array.column_suffix}"] = pa.string()
        expected[f"crc32c_{array.column_suffix}"] = pa.uint32()
    found = file.schema_arrow
    if len(set(found.names)) != len(found.names):
        raise BankCorrupt(f"{path}: a column is there twice")
    for name, type_ in expected.items():
        if name not in found.names:
            raise BankCorrupt(f"{path}: no column {name}")
        if found.field(name).type != type_:
            raise BankCorrupt(f"{path}: {name} is {found.field(name).type}, expected {type_}")


def _null_row_bytes(type_: pa.DataType, *, in_list: bool = False) -> int:
    """What a row takes in memory even where it is null; `ValueError` for types that no clip table
    needs and whose memory does not follow from the values in the file."""
    if isinstance(type_, pa.BaseExtensionType):
        return _null_row_bytes(type_.storage_type, in_list=in_list)
    children = [type_.field(index).type for index in range(type_.num_fields)]
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_map(type_):
        for child in children:
            _null_row_bytes(child, in_list=True)
        return LEVEL_BYTES
    if pa.types.is_fixed_size_list(type_) and not in_list:
        return int(type_.list_size) * _null_row_bytes(children[0])
    if pa.types.is_struct(type_):
        return sum(_null_row_bytes(child, in_list=in_list) for child in children)
    if pa.types.is_nested(type_):
        raise ValueError(f"a column has the type {brief(str(type_))}")
    return int(type_.byte_width) if pa.types.is_fixed_size_binary(type_) else LEVEL_BYTES


def _check_expansion(path: Path, file: pq.ParquetFile, *, only: str | None) -> None:
    """Counts what the columns, or one of them, take once they are decoded and spelled out."""
    n_bytes = path.stat().st_size
    left = _Allowance(MOST_EXPANSION * n_bytes + SPARE_BYTES)
    for field in file.schema_arrow:
        left.spend(file.metadata.num_rows * _null_row_bytes(field.type))
    leaves = [file.schema.column(index) for index in range(len(file.schema))]
    chosen = [i for i, leaf in enumerate(leaves) if only is None or _is_part(leaf.path, only)]
    n_rows = file.metadata.num_rows
    for page in pages(path, n_columns=len(leaves), n_rows=n_rows, chosen=chosen):
        left.spend(page.n_bytes + page.n_values * _value_bytes(leaves[page.column]))
    texts = [leaves[i].path for i in chosen if leaves[i].physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(path, read_dictionary=texts, **_thrift_limits(path)) as dictionaries:
        for group in range(dictionaries.num_row_groups):
            for name in texts:
                for column in dictionaries.read_row_group(group, [name]).columns:
                    for chunk in column.chunks:
                        left.spend(_spelled_out_bytes(chunk))


def _is_part(leaf: str, column: str) -> bool:
    """Whether Arrow reads a leaf with a column: a dot in a name looks like one between fields."""
    return leaf == column or leaf.startswith(f"{column}.")


@dataclass
class _Allowance:
    """Bytes that a table may still take."""

    n_bytes: int

    def spend(self, n_bytes: int) -> None:
        self.n_bytes -= n_bytes
        if self.n_bytes < 0:
            raise ValueError("it would take more memory than its size justifies")


def _spelled_out_bytes(array: pa.Array) -> int:
    """Bytes of all texts in a column that was read as dictionaries."""
    if isinstance(array, pa.ExtensionArray):
        return _spelled_out_bytes(array.storage)
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(array.type):
        return sum(_spelled_out_bytes(array.field(i)) for i in range(array.type.num_fields))
    if pa.types.is_map(array.type):
        return _spelled_out_bytes(array.keys) + _spelled_out_bytes(array.items)
    if pa.types.is_nested(array.type):
        return _spelled_out_bytes(array.values)
    return 0


def _value_bytes(leaf: pq.ColumnSchema) -> int:
    """What a value takes in memory, with the levels that say where it is null or a list ends."""
    n_levels = 1 + leaf.max_definition_level + leaf.max_repetition_level
    return int(VALUE_BYTES.get(leaf.physical_type, leaf.length) + n_levels * LEVEL_BYTES)


def _status_problems(clips: pa.Table, schema: BankSchema) -> Iterator[str]:
    if clips["status"].null_count:
        yield "status None, expected 1 done, 2 failed or 3 hole"
        return
    status = status_of(clips)
    known = np.isin(status, (DONE, FAILED, HOLE))
    if not known.all():
        yield f"status {status[~known][0]}, expected 1 done, 2 failed or 3 hole"
        return
    is_clip = np.zeros(schema.n_rows, bool)
    is_clip[schema.clip_rows()] = True
    claimed = status != HOLE
    if (claimed != is_clip).any():
        row = int(np.argmax(claimed != is_clip))
        yield f"row {row} is {'no ' * bool(is_clip[row])}clip, the card says otherwise"


def _value_problems(clips: pa.Table, schema: BankSchema) -> Iterator[str]:
    for name in OF_EVERY_CLIP:
        if clips[name].null_count != schema.n_rows - schema.n_clips:
            yield f"{name} is null in clips or given in holes"
    for name in ("start_s", "duration_s"):
        if not pc.all(pc.is_finite(clips[name]), min_count=0).as_py():
            yield f"{name} is not finite"
    if (pc.max(pc.binary_length(clips["reason"])).as_py() or 0) > LONGEST_REASON:
        yield f"a reason is longer than {LONGEST_REASON} bytes"
