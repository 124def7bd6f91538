"""What an extraction will do, known before it does it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patchbank.pipeline.bank.commit import committed_names, shard_name
from patchbank.pipeline.bank.layout import rows_per_shard
from patchbank.pipeline.bank.schema import FORMAT_VERSION, POOLED, BankSchema
from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.specs import Grid, Json, Recipe, digest

SPARE_BYTES = 64 * 2**20
"""Room for parts, records and the file system's own needs."""


@dataclass(frozen=True)
class ExtractionPlan:
    """The work that a table and a recipe amount to, and what of it is left."""

    bank: Path
    recipe: Recipe
    schema: BankSchema
    missing_shards: tuple[int, ...]
    total_bytes: int
    missing_bytes: int
    free_bytes: int

    def check_space(self) -> None:
        """Refuses a disk that is too small for what is left to write."""
        needed = self.missing_bytes + SPARE_BYTES
        if self.missing_shards and needed > self.free_bytes:
            raise PatchbankError(
                f"{self.bank} needs {human_bytes(needed)} more, {human_bytes(self.free_bytes)} are "
                "free there; choose fewer --layers, a smaller --dtype or another disk for --out"
            )


def human_bytes(n_bytes: float) -> str:
    """`n_bytes` in binary units with three digits, for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.3g} {unit}"


def schema_for(recipe: Recipe, grids: Mapping[int, Grid], *, n_rows: int) -> BankSchema:
    """Shapes and sharding of the bank of `n_rows` clips under a recipe."""
    specs = tuple(recipe.encoder.layer(layer) for layer in recipe.layers)
    dtype: np.dtype[Any] = np.dtype(recipe.stored_dtype)
    chosen = {layer: grids[layer] for layer in recipe.layers}
    arrays = BankSchema(n_rows, 1, specs, chosen, dtype).arrays()
    rows = rows_per_shard(
        n_rows=n_rows,
        largest_row_bytes=max(array.row_bytes for array in arrays),
        files_per_shard=len(arrays) + 1,
    )
    return BankSchema(n_rows, rows, specs, chosen, dtype)


def plan_extraction(bank: Path, recipe: Recipe, schema: BankSchema) -> ExtractionPlan:
    """Compares the work with what the bank folder holds already; reads no audio."""
    done = committed_names(bank)
    missing = tuple(s for s in range(schema.n_shards) if shard_name(s) not in done)
    pooled = 4 * (len(POOLED) * sum(spec.dim for spec in schema.layers) + len(schema.layers))
    per_row = schema.token_bytes() / schema.n_rows + 2 * pooled
    n_missing = sum(len(schema.rows_of(shard)) for shard in missing)
    return ExtractionPlan(
        bank=bank,
        recipe=recipe,
        schema=schema,
        missing_shards=missing,
        total_bytes=int(per_row * schema.n_rows),
        missing_bytes=int(per_row * n_missing),
        free_bytes=shutil.disk_usage(_existing_parent(bank)).free,
    )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def rows_digest(clips: pa.Table) -> str:
    """SHA-256 over the planned rows, user columns included."""
    hasher = hashlib.sha256()
    for name in clips.column_names:
        # User columns may hold dates, bytes or NaN, which have no JSON of their own.
        column = [name, clips[name].to_pylist()]
        hasher.update(json.dumps(column, separators=(",", ":"), default=str).encode())
    return hasher.hexdigest()


def bank_attributes(recipe: Recipe, schema: BankSchema, clips: pa.Table, extraction: Json) -> Json:
    """The attributes of a bank's root group: format, identities and card."""
    identity = recipe.identity()
    layers = {
        str(spec.layer): {
            "meaning": spec.meaning,
            "dim": spec.dim,
            "n_prefix": spec.n_prefix,
            "grid": asdict(schema.grids[spec.layer]),
        }
        for spec in schema.layers
    }
    card = identity | {
        "layers": layers,
        "n_rows": schema.n_rows,
        "rows_per_shard": schema.rows_per_shard,
        "rows_sha256": rows_digest(clips),
        "licence": recipe.encoder.licence,
        "source": recipe.encoder.source,
        "extraction": extraction,
    }
    return {
        "patchbank_format": FORMAT_VERSION,
        "encoder_id": digest(identity["encoder"]),
        "recipe_id": recipe.recipe_id,
        "card": card,
    }


def recipe_of_card(card: Json) -> Json:
    """The recipe's identity as a bank's card tells it."""
    fields = (
        "encoder",
        "window",
        "stored_dtype",
        "compute_dtype",
        "mask_padding",
        "quantisation",
    )
    return {field: card[field] for field in fields} | {
        "layers": sorted(int(layer) for layer in card["layers"])
    }
