"""Reads clips.parquet without trusting it further than its size."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from patchbank.pipeline.bank.schema import DONE, FAILED, HOLE, BankSchema
from patchbank.pipeline.errors import BankCorrupt

MOST_EXPANSION = 256
"""How many times its file's size a table may take in memory. Dictionaries and run lengths let a
hostile file claim gigabytes in a few bytes; honest tables, mostly digests, stay below 20."""
SPARE_BYTES = 64 * 2**20
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


def read_clips(path: Path, schema: BankSchema) -> pa.Table:
    """clips.parquet of a bank of that schema, one row a bank row, in order.

    Raises `BankCorrupt` where it cannot be read, lacks a row or a column, or would take more memory
    than its size justifies.
    """
    try:
        with pq.ParquetFile(path) as file:
            _check_metadata(path, file, schema)
            clips = file.read()
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BankCorrupt(f"{path}: cannot be read: {reason}; pull the bank again") from error
    status = clips["status"]
    known = pc.is_in(status, value_set=pa.array([DONE, FAILED, HOLE], pa.int8()))
    if not pc.all(known, min_count=0).as_py():
        wrong = status.filter(pc.invert(known))[0].as_py()
        raise BankCorrupt(f"{path}: status {wrong}, expected 1 done, 2 failed or 3 hole")
    return clips


def _check_metadata(path: Path, file: pq.ParquetFile, schema: BankSchema) -> None:
    n_rows = file.metadata.num_rows
    if n_rows != schema.n_rows:
        raise BankCorrupt(f"{path}: {n_rows} rows, the card names {schema.n_rows}")
    expected = dict(TYPES)
    for array in schema.arrays():
        expected[f"sha256_{array.column_suffix}"] = pa.string()
        expected[f"crc32c_{array.column_suffix}"] = pa.uint32()
    found = file.schema_arrow
    for name, type_ in expected.items():
        if name not in found.names:
            raise BankCorrupt(f"{path}: no column {name}")
        if found.field(name).type != type_:
            raise BankCorrupt(f"{path}: {name} is {found.field(name).type}, expected {type_}")
    _check_expansion(path, file)


def _check_expansion(path: Path, file: pq.ParquetFile) -> None:
    """Counts what the strings take once they are spelled out, from their dictionaries."""
    limit = MOST_EXPANSION * path.stat().st_size + SPARE_BYTES
    names = [field.name for field in file.schema_arrow if _is_variable(field.type)]
    with pq.ParquetFile(path, read_dictionary=names) as dictionaries:
        for group in range(dictionaries.num_row_groups):
            declared = dictionaries.metadata.row_group(group).total_byte_size
            if declared > limit:
                raise BankCorrupt(f"{path}: row group {group} claims {declared} bytes")
            for name in names:
                for chunk in dictionaries.read_row_group(group, [name])[name].chunks:
                    limit -= _spelled_out_bytes(chunk)
                    if limit < 0:
                        raise BankCorrupt(f"{path}: {name} would take more memory than it may")


def _is_variable(type_: pa.DataType) -> bool:
    return bool(
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
    )


def _spelled_out_bytes(chunk: pa.Array) -> int:
    if not pa.types.is_dictionary(chunk.type):
        return int(chunk.nbytes)
    lengths = pc.binary_length(chunk.dictionary)
    return int(pc.sum(lengths.take(chunk.indices)).as_py() or 0)
