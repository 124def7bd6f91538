"""Names, shapes and metadata of a bank's arrays; the empty bank that extraction fills."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from patchbank.pipeline.bank.layout import ShardLayout
from patchbank.pipeline.bank.writer import fsync_tree
from patchbank.pipeline.specs import Grid, Json, LayerSpec

FORMAT_VERSION = 1
DONE, FAILED, HOLE = 1, 2, 3
"""Values of the `status` column."""
POOLED = ("mean", "max", "min")
SMALL_CHUNK_ROWS = 65_536
STALE_DRAFT_S = 3_600


@dataclass(frozen=True)
class TokenArray:
    """One sharded array of tokens: the patches or the prefix of a layer."""

    layer: int
    kind: str
    """"patches" or "prefix"; also the array's name and the name of its second axis."""
    n_tokens: int
    dim: int
    dtype: np.dtype[Any]

    @property
    def path(self) -> str:
        """Path inside the bank."""
        return f"layers/{self.layer}/{self.kind}"

    @property
    def column_suffix(self) -> str:
        """What the names of its checksum columns in clips.parquet end in."""
        return f"{self.layer}" if self.kind == "patches" else f"{self.layer}_prefix"

    @property
    def row_bytes(self) -> int:
        return self.n_tokens * self.dim * self.dtype.itemsize

    def shard_path(self, shard: int) -> str:
        """Path of a shard's file inside the bank."""
        return f"{self.path}/c.{shard}.0.0"

    def layout(self, n_slots: int) -> ShardLayout:
        return ShardLayout(n_slots, self.row_bytes)


@dataclass(frozen=True)
class BankSchema:
    """Shapes of everything in a bank."""

    n_rows: int
    rows_per_shard: int
    layers: tuple[LayerSpec, ...]
    grids: Mapping[int, Grid]
    dtype: np.dtype[Any]

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> range:
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.n_rows))

    def arrays(self) -> list[TokenArray]:
        """The sharded arrays, by layer, patches before prefix."""
        arrays = []
        for spec in self.layers:
            n_patches = self.grids[spec.layer].n_patches
            arrays.append(TokenArray(spec.layer, "patches", n_patches, spec.dim, self.dtype))
            if spec.n_prefix:
                arrays.append(TokenArray(spec.layer, "prefix", spec.n_prefix, spec.dim, self.dtype))
        return arrays

    def array_paths(self) -> list[str]:
        """Paths inside the bank of every array of the layers, the small ones included."""
        small = [f"layers/{spec.layer}/{n}" for spec in self.layers for n in ("n_patches", *POOLED)]
        return [array.path for array in self.arrays()] + small

    def token_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(
            array.layout(self.rows_per_shard).file_bytes(len(self.rows_of(shard)))
            for shard in range(self.n_shards)
            for array in self.arrays()
        )


def create_skeleton(bank: Path, schema: BankSchema, attributes: Json) -> None:
    """Writes groups, array metadata and attributes of an empty bank, at once or not at all.

    Returns quietly where another process was faster; the caller compares what it finds.
    """
    _sweep_drafts(bank)
    draft = bank.with_name(f".{bank.name}.{uuid.uuid4().hex}")
    try:
        _write_skeleton(draft, schema, attributes)
        fsync_tree(draft)
        # The commits folder makes a bank non-empty, so a rename never replaces an existing one.
        draft.rename(bank)
    except OSError:
        if not (bank / "zarr.json").is_file():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sweep_drafts(bank: Path) -> None:
    """Removes what killed runs left beside the bank; a live run's draft is younger than this."""
    for draft in bank.parent.glob(f".{bank.name}.{'[0-9a-f]' * 32}"):
        if time.time() - draft.stat().st_mtime > STALE_DRAFT_S:
            shutil.rmtree(draft, ignore_errors=True)


def _write_skeleton(draft: Path, schema: BankSchema, attributes: Json) -> None:
    root = zarr.create_group(draft, attributes=attributes)
    layers = root.create_group("layers")
    for spec in schema.layers:
        layers.create_group(str(spec.layer))
    for array in schema.arrays():
        create_token_array(draft, array, schema)
    (draft / "commits").mkdir()
    (draft / ".work").mkdir()
    (draft / "parts").mkdir()


def create_token_array(bank: Path, array: TokenArray, schema: BankSchema) -> None:
    """Writes one sharded array's metadata; its shards are written by `ShardFileWriter`."""
    row = (array.n_tokens, array.dim)
    zarr.create_array(
        bank,
        name=array.path,
        shape=(schema.n_rows, *row),
        chunks=(1, *row),
        shards=(schema.rows_per_shard, *row),
        dtype=array.dtype,
        compressors=None,
        filters=None,
        # A row that is not there reads as NaN through any Zarr reader, never as zeros.
        fill_value=float("nan"),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("clip", "patch" if array.kind == "patches" else "prefix", "dim"),
        config={"write_empty_chunks": True},
    )


def create_small_array(
    folder: Path, name: str, shape: tuple[int, ...], dtype: str
) -> zarr.Array[Any]:
    """An unsharded array (clip,) or (clip, dim) in chunks of 65,536 rows."""
    return zarr.create_array(
        folder,
        name=name,
        shape=shape,
        chunks=(min(shape[0], SMALL_CHUNK_ROWS), *shape[1:]),
        dtype=dtype,
        compressors=None,
        filters=None,
        fill_value=float("nan") if np.dtype(dtype).kind == "f" else -1,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("clip", "dim")[: len(shape)],
        config={"write_empty_chunks": True},
    )
