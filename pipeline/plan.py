"""What an extraction will do, known before it does it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from patchbank.pipeline.bank.card import attributes_of_card, layers_of_schema
from patchbank.pipeline.bank.commit import committed_names, shard_name
from patchbank.pipeline.bank.dtypes import STORED_TYPES
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.layout import rows_per_shard
from patchbank.pipeline.bank.schema import BankSchema, Storage
from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.specs import Grid, Json, LayerSpec, Recipe, StoredDType, human_bytes

SPARE_BYTES = 64 * 2**20
"""Room for parts, records and the file system's own needs."""


@dataclass(frozen=True)
class ExtractionPlan:
    """The work that a table and a recipe amount to, and what of it is left."""

    folder: Path
    """Where shards are committed: the bank, or a growth's folder inside it."""
    recipe: Recipe
    schema: BankSchema
    first_shard: int
    """Shards before it lie in a sealed bank that grows."""
    missing_shards: tuple[int, ...]
    total_bytes: int
    missing_bytes: int
    free_bytes: int

    def check_space(self) -> None:
        """Refuses a disk that is too small for what is left to write."""
        if self.missing_shards:
            check_space(self.folder, self.missing_bytes, free_bytes=self.free_bytes)


def check_space(folder: Path, n_bytes: int, *, free_bytes: int | None = None) -> None:
    """Raises `PatchbankError` where `n_bytes` more do not fit onto the disk of `folder`."""
    free = free_bytes_at(folder) if free_bytes is None else free_bytes
    needed = n_bytes + SPARE_BYTES
    if needed > free:
        raise PatchbankError(
            f"{folder} needs {human_bytes(needed)} more, {human_bytes(free)} are "
            "free there; choose fewer --layers, a smaller --dtype or another disk for --out"
        )


def schema_for(
    specs: tuple[LayerSpec, ...],
    grids: Mapping[int, Grid],
    *,
    stored_dtype: StoredDType,
    n_clips: int,
    storage: Storage = "aligned",
) -> BankSchema:
    """Shapes and sharding of the bank of `n_clips` clips that is made at once."""
    n_packed = STORED_TYPES[stored_dtype].n_packed
    for spec in specs:
        if spec.dim % n_packed:
            raise PatchbankError(
                f"{stored_dtype} packs channels in pairs, layer {spec.layer} has {spec.dim}; "
                "choose another --dtype"
            )
    chosen = {spec.layer: grids[spec.layer] for spec in specs}
    arrays = BankSchema((n_clips,), 1, specs, chosen, stored_dtype).arrays()
    rows = rows_per_shard(
        n_rows=n_clips,
        largest_row_bytes=max(array.row_bytes for array in arrays),
        files_per_shard=len(arrays) + 1,
    )
    return BankSchema((n_clips,), rows, specs, chosen, stored_dtype, storage)


def plan_extraction(
    folder: Path, recipe: Recipe, schema: BankSchema, *, first_shard: int = 0
) -> ExtractionPlan:
    """Compares the work with what `folder` holds already; reads no audio."""
    done = committed_names(folder)
    shards = range(first_shard, schema.n_shards)
    missing = tuple(shard for shard in shards if shard_name(shard) not in done)
    # A growth writes the small arrays of the rows that were there, too.
    n_before = first_shard * schema.rows_per_shard
    again = n_before * _small_row_bytes(schema) if missing else 0
    return ExtractionPlan(
        folder=folder,
        recipe=recipe,
        schema=schema,
        first_shard=first_shard,
        missing_shards=missing,
        total_bytes=bank_bytes(schema, range(schema.n_shards)),
        missing_bytes=bank_bytes(schema, missing) + again,
        free_bytes=free_bytes_at(folder),
    )


def bank_bytes(schema: BankSchema, shards: range | tuple[int, ...]) -> int:
    """Bytes that some shards take: their files, and their rows in the small arrays.

    The latter twice, because parts and assembled arrays lie side by side at the seal.
    """
    n_rows = sum(len(schema.rows_of(shard)) for shard in shards)
    tokens = sum(schema.shard_bytes(shard) for shard in shards)
    return tokens + 2 * n_rows * _small_row_bytes(schema)


def _small_row_bytes(schema: BankSchema) -> int:
    return sum(
        np.dtype(array.dtype).itemsize * int(np.prod(array.row_shape, dtype=np.int64))
        for array in schema.small_arrays()
    )


def free_bytes_at(folder: Path) -> int:
    """Free bytes on the disk where `folder` is, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def bank_attributes(recipe: Recipe, schema: BankSchema, clips: pa.Table, extraction: Json) -> Json:
    """The attributes of a new bank's root group: format, identities and card."""
    card = recipe.identity() | {
        "layers": layers_of_schema(schema),
        "n_rows": schema.n_rows,
        "generations": list(schema.generations),
        "rows_per_shard": schema.rows_per_shard,
        "rows_sha256": rows_digest(clips),
        "licence": recipe.encoder.licence,
        "source": recipe.encoder.source,
        "extraction": extraction,
    }
    return attributes_of_card(card)
