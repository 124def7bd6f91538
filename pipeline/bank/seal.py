"""Gathers the parts of a finished extraction and writes the seal.

The steps can be interrupted anywhere and run again: small arrays and clips.parquet are written
beside the bank's files and renamed in, clips.parquet last, so that its presence means that the
parts are no longer needed; seal.json is the very last file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.bank.commit import (
    WORK,
    committed_names,
    open_attempt,
    read_record,
    recover,
    shard_name,
)
from patchbank.pipeline.bank.parts import clip_columns, part_path, small_column
from patchbank.pipeline.bank.schema import (
    FORMAT_VERSION,
    POOLED,
    SMALL_CHUNK_ROWS,
    BankSchema,
    create_small_array,
)
from patchbank.pipeline.bank.writer import (
    FileRecord,
    fsync_folder,
    fsync_tree,
    hash_file,
    write_durably,
)
from patchbank.pipeline.errors import BankCorrupt, BankIncomplete
from patchbank.pipeline.specs import Json, canonical_json, digest

SEAL = "seal.json"
UNSEALED = {SEAL, "notes", "parts", WORK}
FINGERPRINT_COLUMNS = ("clip_id", "view", "path", "start_s", "duration_s", "audio_sha256", "status")


def seal_bank(bank: Path, schema: BankSchema, *, recipe_id: str) -> None:
    """Completes a bank whose shards are all committed.

    Raises `BankIncomplete` where a shard is not committed. Sealing a sealed bank only clears what
    an interrupted run left behind.
    """
    leftovers = [bank / "parts", bank / WORK]
    if (bank / SEAL).is_file() and not any(path.exists() for path in leftovers):
        return
    with _single_owner(bank):
        if not (bank / SEAL).is_file():
            recover(bank)
            _check_committed(bank, schema)
            if not (bank / "clips.parquet").is_file():
                _assemble(bank, schema)
            _check_arrays(bank, schema)
            shutil.rmtree(bank / "parts", ignore_errors=True)
            _write_seal(bank, recipe_id=recipe_id)
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)


def _check_arrays(bank: Path, schema: BankSchema) -> None:
    for path in schema.array_paths():
        if not (bank / path / "zarr.json").is_file():
            raise BankCorrupt(f"{bank}: {path} is not there; remove the bank and extract again")


@contextmanager
def _single_owner(bank: Path) -> Iterator[None]:
    """Holds a lock that dies with its process."""
    (bank / WORK).mkdir(exist_ok=True)
    descriptor = os.open(bank / WORK / "seal.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_committed(bank: Path, schema: BankSchema) -> None:
    wanted = {shard_name(shard) for shard in range(schema.n_shards)} | {"golden"}
    missing = sorted(wanted - committed_names(bank))
    if missing:
        raise BankIncomplete(
            f"{bank}: {len(missing)} of {len(wanted)} parts of the work are not committed "
            f"(first: {missing[0]}); run the same extract command again"
        )


def _assemble(bank: Path, schema: BankSchema) -> None:
    with open_attempt(bank, "assembly") as draft:
        for spec in schema.layers:
            for name in ("n_patches", *POOLED):
                _assemble_array(bank, draft, schema, layer=spec.layer, dim=spec.dim, name=name)
        _assemble_clips(bank, draft, schema)
        _move_in(bank, draft, schema)


def _move_in(bank: Path, draft: Path, schema: BankSchema) -> None:
    """Renames the assembled arrays and, last, clips.parquet into the bank."""
    fsync_tree(draft)
    for array in sorted(path.parent for path in draft.glob("layers/*/*/zarr.json")):
        target = bank / array.relative_to(draft)
        if not target.exists():
            array.rename(target)
    for spec in schema.layers:
        fsync_folder(bank / f"layers/{spec.layer}")
    # From here on the parts are not needed: everything they hold is durable elsewhere.
    (draft / "clips.parquet").rename(bank / "clips.parquet")
    fsync_folder(bank)


def _assemble_array(
    bank: Path, draft: Path, schema: BankSchema, *, layer: int, dim: int, name: str
) -> None:
    counts = name == "n_patches"
    shape = (schema.n_rows,) if counts else (schema.n_rows, dim)
    array = create_small_array(
        draft, f"layers/{layer}/{name}", shape, "int32" if counts else "float32"
    )
    column = small_column(layer, name)
    for start in range(0, schema.n_rows, SMALL_CHUNK_ROWS):
        rows = range(start, min(start + SMALL_CHUNK_ROWS, schema.n_rows))
        table = _read_rows(bank, schema, rows, [column])
        values = table[column].combine_chunks()
        flat = values if counts else values.flatten()
        array[rows.start : rows.stop] = np.asarray(flat).reshape(len(rows), *shape[1:])


def _assemble_clips(bank: Path, draft: Path, schema: BankSchema) -> None:
    columns = clip_columns(bank / part_path(0))
    with (draft / "clips.parquet").open("wb") as file:
        writer: Any = None
        for start in range(0, schema.n_rows, SMALL_CHUNK_ROWS):
            rows = range(start, min(start + SMALL_CHUNK_ROWS, schema.n_rows))
            table = _read_rows(bank, schema, rows, columns)
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        writer.close()


def _read_rows(bank: Path, schema: BankSchema, rows: range, columns: list[str]) -> pa.Table:
    first = rows.start // schema.rows_per_shard
    last = (rows.stop - 1) // schema.rows_per_shard
    tables = [
        pq.read_table(bank / part_path(shard), columns=columns) for shard in range(first, last + 1)
    ]
    offset = rows.start - first * schema.rows_per_shard
    return pa.concat_tables(tables).slice(offset, len(rows)).combine_chunks()


def _write_seal(bank: Path, *, recipe_id: str) -> None:
    files = sorted(_file_records(bank), key=lambda file: file.path)
    listing = [asdict(file) for file in files]
    content = {
        "format": FORMAT_VERSION,
        "recipe_id": recipe_id,
        "fingerprint": fingerprint(recipe_id, pq.read_table(bank / "clips.parquet")),
        "files": listing,
    }
    content["root_sha256"] = root_hash(content)
    draft = bank / WORK / SEAL
    write_durably(draft, json.dumps(content, indent=1, sort_keys=True).encode())
    draft.replace(bank / SEAL)
    fsync_folder(bank)


def root_hash(seal: Json) -> str:
    """SHA-256 over the seal's content but the root hash itself, as canonical JSON."""
    return digest({key: value for key, value in seal.items() if key != "root_sha256"})


def fingerprint(recipe_id: str, clips: pa.Table) -> str:
    """SHA-256 over the recipe and the ordered rows with their audio digests.

    Rows are hashed one a line, each a canonical JSON list of `FINGERPRINT_COLUMNS`.
    """
    hasher = hashlib.sha256(recipe_id.encode())
    for batch in clips.select(FINGERPRINT_COLUMNS).to_batches():
        columns = [batch.column(name).to_pylist() for name in FINGERPRINT_COLUMNS]
        for row in zip(*columns, strict=True):
            hasher.update(b"\n" + canonical_json(row))
    return hasher.hexdigest()


def _file_records(bank: Path) -> Iterator[FileRecord]:
    recorded = _recorded_files(bank)
    for path in sorted(bank.rglob("*")):
        name = path.relative_to(bank).as_posix()
        if name.split("/")[0] in UNSEALED or path.is_dir():
            continue
        record = recorded.pop(name, None)
        if record is None:
            yield hash_file(path, relative_to=bank)
        elif path.stat().st_size != record.size:
            raise BankCorrupt(f"{name}: {path.stat().st_size} bytes, recorded {record.size}")
        else:
            # Hashed while it was written; terabytes are not read again.
            yield record
    left = [name for name in recorded if not name.startswith("parts/")]
    if left:
        raise BankCorrupt(f"{left[0]} is recorded but not there; run the same extract again")


def _recorded_files(bank: Path) -> dict[str, FileRecord]:
    files = {}
    for name in committed_names(bank):
        record = read_record(bank, name)
        for file in record["files"] if record else []:
            files[file["path"]] = FileRecord(**file)
    return files
