"""The files that a card states, and what the seal says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from patchbank.pipeline.bank.archive import archive_bytes
from patchbank.pipeline.bank.assembly import CLIPS
from patchbank.pipeline.bank.schema import SMALL_CHUNK_ROWS, BankSchema, SmallArray
from patchbank.pipeline.bank.seal_record import Seal


def chunk_path(array: SmallArray, chunk: int) -> str:
    """Where a chunk of an unsharded array lies inside the bank."""
    return f"{array.path}/c.{chunk}{'.0' * len(array.row_shape)}"


def shape_problems(schema: BankSchema, seal: Seal) -> Iterator[str]:
    """Sealed files that cannot hold what the card states; no more than the seal has files.

    None means that rows, shards, layers and row sizes are all accounted for by bytes on the disk,
    so that loops over them, and arrays of their size, cost no more than the files do.
    """
    n_shard_files = schema.n_shards * len(schema.arrays())
    n_chunks = -(-schema.n_rows // SMALL_CHUNK_ROWS)
    n_chunk_files = n_chunks * len(schema.small_arrays())
    if n_shard_files + n_chunk_files > len(seal.files):
        yield (
            f"the card states {n_shard_files} shard files and {n_chunk_files} of small arrays, "
            f"which are not sealed: there are {len(seal.files)} files"
        )
        return
    for name, sizes in _expected_sizes(schema):
        file = seal.files.get(name)
        if file is None or not sizes.start <= file.size < sizes.stop:
            found = "is not sealed" if file is None else f"is sealed with {file.size} bytes"
            yield f"{name} {found}, the card states {sizes.stop - 1}"
    if CLIPS not in seal.files:
        yield f"{CLIPS} is not sealed"


def _expected_sizes(schema: BankSchema) -> Iterator[tuple[str, range]]:
    """Files that a card states, and the sizes that they may have: one, but for archives."""
    for array in schema.arrays():
        layout = array.layout(schema.rows_per_shard)
        for shard in range(schema.n_shards):
            n_rows = len(schema.rows_of(shard))
            most = layout.file_bytes(n_rows)
            least = archive_bytes(layout, n_rows) if schema.is_archive else most
            yield array.shard_path(shard), range(least, most + 1)
    for small in schema.small_arrays():
        n_values = small.chunk_rows(schema.n_rows) * math.prod(small.row_shape)
        for chunk in range(-(-schema.n_rows // SMALL_CHUNK_ROWS)):
            n_bytes = n_values * np.dtype(small.dtype).itemsize
            yield chunk_path(small, chunk), range(n_bytes, n_bytes + 1)
