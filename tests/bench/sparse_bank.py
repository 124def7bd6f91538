"""A sealed bank larger than any disk at hand: its shard files are sparse, their indices are real.

Its rows were never written and read as zeros. Its table of clips and its counts are as in a real
bank, its seal has the sizes that the files have, and digests that nobody could compare with them.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic_bank import clip_rows

from patchbank.pipeline.bank.assembly import CLIPS
from patchbank.pipeline.bank.commit import record_path, shard_name
from patchbank.pipeline.bank.identity import digest_columns, root_hash
from patchbank.pipeline.bank.layout import encode_index
from patchbank.pipeline.bank.schema import (
    DONE,
    FORMAT_VERSION,
    SMALL_CHUNK_ROWS,
    BankSchema,
    SmallArray,
    create_skeleton,
    create_small_array,
)
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.bank.writer import FileRecord, hash_file
from patchbank.pipeline.environment import environment
from patchbank.pipeline.plan import bank_attributes, schema_for
from patchbank.pipeline.specs import EncoderSpec, Grid, Json, LayerSpec, Recipe, WindowSpec

UNKNOWN = "0" * 64
"""Stands for a digest."""


def make_sparse_bank(path: Path, *, n_clips: int, n_patches: int = 512, dim: int = 768) -> None:
    """A bank of one layer in float16; it takes 10 bytes a row and 250 a clip of the disk."""
    spec = LayerSpec(1, "never written", dim)
    encoder = EncoderSpec("sparse", UNKNOWN, 16_000, {}, {}, {}, (spec,), "none", "none")
    recipe = Recipe(encoder, WindowSpec(), (spec.layer,))
    grids = {spec.layer: Grid(n_patches, 1)}
    schema = schema_for((spec,), grids, stored_dtype="float16", n_clips=n_clips)
    facts = {"batch_size": 1, **environment("cpu")}
    create_skeleton(path, schema, bank_attributes(recipe, schema, clip_rows(range(1)), facts))
    for folder in (".work", "parts"):
        shutil.rmtree(path / folder)
    for shard in range(schema.n_shards):
        _write_shard(path, schema, shard)
    for array in schema.small_arrays():
        create_small_array(path, array, schema.n_rows)
        _write_chunks(path, schema, array)
    _write_clips(path, schema)
    _write_seal(path, recipe.recipe_id)


def _write_shard(bank: Path, schema: BankSchema, shard: int) -> None:
    [array], n_rows = schema.arrays(), len(schema.rows_of(shard))
    layout = array.layout(schema.rows_per_shard)
    record = FileRecord(array.shard_path(shard), layout.file_bytes(n_rows), UNKNOWN)
    with (bank / record.path).open("wb") as file:
        file.seek(record.size - layout.index_bytes)
        file.write(encode_index(layout, n_rows))
    content = {"name": shard_name(shard), "files": [asdict(record)]}
    record_path(bank, shard_name(shard)).write_text(json.dumps(content))


def _write_chunks(bank: Path, schema: BankSchema, array: SmallArray) -> None:
    n_rows = array.chunk_rows(schema.n_rows)
    n_bytes = n_rows * math.prod(array.row_shape) * np.dtype(array.dtype).itemsize
    for chunk in range(-(-schema.n_rows // n_rows)):
        with (bank / f"{array.path}/c.{chunk}{'.0' * len(array.row_shape)}").open("wb") as file:
            file.truncate(n_bytes)
            if array.name == "n_patches":
                file.write(np.full(n_rows, schema.grids[array.layer].n_patches, "<i4").tobytes())


def _write_clips(bank: Path, schema: BankSchema) -> None:
    generator = np.random.default_rng(0)
    [sha256, crc32c] = digest_columns(schema.arrays())
    writer = None
    for start in range(0, schema.n_rows, SMALL_CHUNK_ROWS):
        rows = range(start, min(start + SMALL_CHUNK_ROWS, schema.n_rows))
        clips = clip_rows(rows)
        columns = {name: clips[name] for name in clips.column_names} | {
            "audio_sha256": _digests(generator, len(rows)),
            "status": pa.array(np.full(len(rows), DONE), pa.int8()),
            "reason": pa.nulls(len(rows), pa.string()),
            sha256: _digests(generator, len(rows)),
            crc32c: pa.array(generator.integers(2**32, size=len(rows), dtype=np.uint32)),
        }
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(bank / CLIPS, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _digests(generator: np.random.Generator, n_rows: int) -> pa.Array:
    ends = pa.py_buffer(np.arange(n_rows + 1, dtype=np.int32) * len(UNKNOWN))
    text = pa.py_buffer(generator.bytes(n_rows * len(UNKNOWN) // 2).hex().encode())
    return pa.StringArray.from_buffers(n_rows, ends, text)


def _write_seal(bank: Path, recipe_id: str) -> None:
    paths = sorted(path for path in bank.rglob("*") if path.is_file())
    names = sorted(path.relative_to(bank).as_posix() for path in paths)
    files = {name: FileRecord(name, (bank / name).stat().st_size, UNKNOWN) for name in names}
    # Whoever opens a bank compares this one.
    files["zarr.json"] = hash_file(bank / "zarr.json", relative_to=bank)
    seal: Json = {
        "format": FORMAT_VERSION,
        "recipe_id": recipe_id,
        "fingerprint": UNKNOWN,
        "files": [asdict(file) for file in files.values()],
    }
    seal["root_sha256"] = root_hash(seal)
    (bank / SEAL).write_text(json.dumps(seal, indent=1, sort_keys=True))
