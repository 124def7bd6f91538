"""Names, shapes and metadata of a bank's arrays; the empty bank that extraction fills."""

from __future__ import annotations

import errno
import shutil
import time
import uuid
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int64

from patchbank.pipeline.bank.archive import CODEC, LEVEL
from patchbank.pipeline.bank.dtypes import STORED_TYPES, StoredType, prefix_type
from patchbank.pipeline.bank.layout import ShardLayout
from patchbank.pipeline.bank.writer import fsync_folder, fsync_tree
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.specs import Grid, Json, LayerSpec, StoredDType

if TYPE_CHECKING:
    import zarr
    from zarr.codecs import BloscCodec

FORMAT_VERSION = 1
DONE, FAILED, HOLE = 1, 2, 3
"""Values of the `status` column."""
POOLED = ("mean", "max", "min")
SMALL_CHUNK_ROWS = 65_536
STALE_DRAFT_S = 3_600
Storage = Literal["aligned", "blosc", "pooled"]


@dataclass(frozen=True)
class TokenArray:
    """One sharded array of tokens: the patches or the prefix of a layer."""

    layer: int
    kind: str
    """"patches" or "prefix"; also the array's name and the name of its second axis."""
    n_tokens: int
    dim: int
    stored: StoredType

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stored.dtype

    @property
    def path(self) -> str:
        """Path inside the bank."""
        return f"layers/{self.layer}/{self.kind}"

    @property
    def column_suffix(self) -> str:
        """What the names of its checksum columns in clips.parquet end in."""
        return f"{self.layer}" if self.kind == "patches" else f"{self.layer}_prefix"

    @property
    def width(self) -> int:
        """Items of a token: `dim`, or half of it where two channels share a byte."""
        return self.dim // self.stored.n_packed

    @property
    def row_bytes(self) -> int:
        return self.n_tokens * self.width * self.dtype.itemsize

    def shard_path(self, shard: int) -> str:
        """Path of a shard's file inside the bank."""
        return f"{self.path}/c.{shard}.0.0"

    def layout(self, n_slots: int) -> ShardLayout:
        return ShardLayout(n_slots, self.row_bytes)


@dataclass(frozen=True)
class SmallArray:
    """One unsharded array with a few values a row."""

    layer: int
    name: str
    row_shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]

    @property
    def path(self) -> str:
        """Path inside the bank; also its column in a part file."""
        return f"layers/{self.layer}/{self.name}"

    @property
    def fill(self) -> float | int:
        """What a row that is not there holds."""
        return float("nan") if np.dtype(self.dtype).kind == "f" else -1

    def chunk_rows(self, n_rows: int) -> int:
        return min(n_rows, SMALL_CHUNK_ROWS)


@dataclass(frozen=True)
class BankSchema:
    """Shapes of everything in a bank."""

    generations: tuple[int, ...]
    """Clips that came together: a first extraction, each growth, each bank of a merge. A generation
    begins with a shard of its own; the unused slots before it are holes, rows without a clip."""
    rows_per_shard: int
    layers: tuple[LayerSpec, ...]
    grids: Mapping[int, Grid]
    stored_dtype: StoredDType = "float16"
    storage: Storage = "aligned"
    """"aligned": rows as they are, at 4,096-byte boundaries; "blosc": compressed, an archive;
    "pooled": no tokens, only what was pooled of them."""

    @property
    def is_archive(self) -> bool:
        return self.storage == "blosc"

    @property
    def holds_tokens(self) -> bool:
        return self.storage != "pooled"

    @property
    def stored(self) -> StoredType:
        return STORED_TYPES[self.stored_dtype]

    @property
    def n_clips(self) -> int:
        return sum(self.generations)

    @cached_property
    def _first_shards(self) -> tuple[int, ...]:
        """The first shard of each generation, and the one after the last."""
        sizes = (-(-n_clips // self.rows_per_shard) for n_clips in self.generations)
        return (0, *accumulate(sizes))

    @property
    def n_rows(self) -> int:
        """Length of the clip axis: clips and the holes between generations."""
        return self._first_shards[-2] * self.rows_per_shard + self.generations[-1]

    @property
    def n_shards(self) -> int:
        return self._first_shards[-1]

    @property
    def n_files(self) -> int:
        """Shard files and commit records, which are most of a bank's files."""
        return self.n_shards * (len(self.arrays()) + 1)

    def rows_of(self, shard: int) -> range:
        """The rows of a shard that hold clips."""
        generation = bisect_right(self._first_shards, shard) - 1
        first = self._first_shards[generation] * self.rows_per_shard
        start = shard * self.rows_per_shard
        stop = min(start + self.rows_per_shard, first + self.generations[generation])
        return range(start, stop)

    def clip_rows(self) -> Int64[np.ndarray, " clip"]:
        """The row of each clip, in order."""
        firsts = [first * self.rows_per_shard for first in self._first_shards]
        pairs = zip(firsts, self.generations, strict=False)
        return np.concatenate([np.arange(first, first + n, dtype=np.int64) for first, n in pairs])

    def clips_of(self, shard: int) -> range:
        """Places among the clips, in order, of those that a shard holds."""
        generation = bisect_right(self._first_shards, shard) - 1
        before = sum(self.generations[:generation])
        first = self._first_shards[generation] * self.rows_per_shard
        rows = self.rows_of(shard)
        return range(before + rows.start - first, before + rows.stop - first)

    def arrays(self) -> list[TokenArray]:
        """The sharded arrays, by layer, patches before prefix; none of pooled vectors only."""
        return self.described_arrays() if self.holds_tokens else []

    def described_arrays(self) -> list[TokenArray]:
        """The token arrays whose rows clips.parquet has digests of, stored here or not."""
        arrays = []
        for spec in self.layers:
            n_patches, prefix = self.grids[spec.layer].n_patches, prefix_type(self.stored)
            arrays.append(TokenArray(spec.layer, "patches", n_patches, spec.dim, self.stored))
            if spec.n_prefix:
                arrays.append(TokenArray(spec.layer, "prefix", spec.n_prefix, spec.dim, prefix))
        return arrays

    def small_arrays(self) -> list[SmallArray]:
        """The unsharded arrays with a row a clip, by layer."""
        arrays = []
        for spec in self.layers:
            arrays.append(SmallArray(spec.layer, "n_patches", (), "int32", ("clip",)))
            if self.stored.is_quantised and self.holds_tokens:
                shape = (self.grids[spec.layer].n_patches,)
                arrays.append(SmallArray(spec.layer, "scale", shape, "float16", ("clip", "patch")))
            arrays += [
                SmallArray(spec.layer, pool, (spec.dim,), "float32", ("clip", "dim"))
                for pool in POOLED
            ]
        return arrays

    def shard_bytes(self, shard: int) -> int:
        """Bytes of one shard's files, in all token arrays."""
        n_rows = len(self.rows_of(shard))
        return sum(array.layout(self.rows_per_shard).file_bytes(n_rows) for array in self.arrays())


def create_skeleton(
    bank: Path,
    schema: BankSchema,
    attributes: Json,
    constants: Mapping[int, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Writes groups, array metadata, attributes and channel constants of an empty bank.

    All at once or not at all. Returns quietly where another process was faster; the caller compares
    what it finds.
    """
    _sweep_drafts(bank)
    draft = bank.with_name(f".{bank.name}.{uuid.uuid4().hex}")
    try:
        _write_skeleton(draft, schema, attributes, constants or {})
        fsync_tree(draft)
        # The commits folder makes a bank non-empty, so a rename never replaces an existing one.
        draft.rename(bank)
        fsync_folder(bank.parent)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise BankError(
                f"cannot write {bank}: {error.strerror}; choose another --out"
            ) from error
        if not (bank / "zarr.json").is_file():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sweep_drafts(bank: Path) -> None:
    """Removes what killed runs left beside the bank; a live run's draft is younger than this."""
    for draft in bank.parent.glob(f".{bank.name}.{'[0-9a-f]' * 32}"):
        with suppress(FileNotFoundError):  # another run's, just renamed into place
            if time.time() - draft.stat().st_mtime > STALE_DRAFT_S:
                shutil.rmtree(draft, ignore_errors=True)


def _write_skeleton(
    draft: Path,
    schema: BankSchema,
    attributes: Json,
    constants: Mapping[int, Mapping[str, np.ndarray]],
) -> None:
    import zarr

    root = zarr.create_group(draft, attributes=attributes)
    layers = root.create_group("layers")
    for spec in schema.layers:
        layers.create_group(str(spec.layer))
    for array in schema.arrays():
        create_token_array(draft, array, schema)
    for layer, values in constants.items():
        for name, value in values.items():
            axes = ("dim",) if value.ndim == 1 else ("block", "block")
            create_whole_array(draft, f"layers/{layer}/{name}", value, axes)
    (draft / "commits").mkdir()
    (draft / ".work").mkdir()
    (draft / "parts").mkdir()


def create_token_array(bank: Path, array: TokenArray, schema: BankSchema) -> None:
    """Writes one sharded array's metadata; its shards are written by `ShardFileWriter`."""
    row = (array.n_tokens, array.width)
    import zarr

    zarr.create_array(
        bank,
        name=array.path,
        shape=(schema.n_rows, *row),
        chunks=(1, *row),
        shards=(schema.rows_per_shard, *row),
        dtype=array.dtype,
        compressors=archive_codec(array.dtype) if schema.is_archive else None,
        filters=None,
        # A row that is not there reads as this through any Zarr reader, never as zeros.
        fill_value=array.stored.fill,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=(
            "clip",
            "patch" if array.kind == "patches" else "prefix",
            "dim" if array.stored.n_packed == 1 else "packed",
        ),
        attributes=array.stored.attributes,
        config={"write_empty_chunks": True},
    )


def archive_codec(dtype: np.dtype[Any]) -> BloscCodec:
    """What the rows of an archive are compressed with, as Zarr names it."""
    from zarr.codecs import BloscCodec

    return BloscCodec(typesize=dtype.itemsize, cname=CODEC, clevel=LEVEL, shuffle="bitshuffle")


def create_small_array(folder: Path, array: SmallArray, n_rows: int) -> zarr.Array[Any]:
    """The empty unsharded array of `n_rows` rows, in chunks of at most 65,536 rows."""
    import zarr

    return zarr.create_array(
        folder,
        name=array.path,
        shape=(n_rows, *array.row_shape),
        chunks=(array.chunk_rows(n_rows), *array.row_shape),
        dtype=array.dtype,
        compressors=None,
        filters=None,
        fill_value=array.fill,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=array.axes,
        config={"write_empty_chunks": True},
    )


def create_whole_array(folder: Path, name: str, value: np.ndarray, axes: tuple[str, ...]) -> None:
    """Writes an array that is one chunk."""
    import zarr

    zarr.create_array(
        folder,
        name=name,
        data=value,
        chunks=value.shape,
        compressors=None,
        filters=None,
        fill_value=float("nan"),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=axes,
        config={"write_empty_chunks": True},
    )
