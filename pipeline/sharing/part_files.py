"""What of a bank has to travel for a part of it: whole files, and rows of shard files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from patchbank.pipeline.bank.assembly import CLIPS
from patchbank.pipeline.bank.commit import shard_name
from patchbank.pipeline.bank.join import golden_files
from patchbank.pipeline.bank.quantised import constant_files
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import (
    POOLED,
    SMALL_CHUNK_ROWS,
    BankSchema,
    SmallArray,
    TokenArray,
)
from patchbank.pipeline.bank.sealed_sizes import chunk_path
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.plan import bank_bytes
from patchbank.pipeline.selection import Selection

CARD = "zarr.json"


@dataclass(frozen=True)
class PartFiles:
    """The files of a bank that a part of it needs."""

    schema: BankSchema
    """Of the part."""
    small: tuple[FileRecord, ...]
    """Tokens aside, fetched whole."""
    whole: tuple[FileRecord, ...]
    """Shard files of which every byte is taken over."""
    row_bytes: int
    """Of other shard files, what is read by range: rows and indices; of archives an estimate."""
    seal_bytes: int
    """Of what is read before anything is chosen: about three times the seal, and the card."""

    @property
    def travel_bytes(self) -> int:
        """Bytes that come over the network."""
        files = (*self.small, *self.whole)
        return self.seal_bytes + sum(file.size for file in files) + self.row_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes that the part takes, about; until the seal its small arrays lie there twice."""
        others = sum(file.size for file in self.small if not file.path.startswith("layers/"))
        return bank_bytes(self.schema, range(self.schema.n_shards)) + others


def part_files(bank: Bank, chosen: Selection) -> PartFiles:
    """The files and rows of `bank` that `selection.make_selection` reads."""
    schema, copies = chosen.schema(bank), chosen.copies_rows(bank)
    rows = bank.schema.clip_rows() if chosen.rows is None else chosen.rows
    arrays = [
        array
        for array in bank.schema.arrays()
        if array.layer in chosen.layers and schema.holds_tokens
    ]
    shards = range(bank.schema.n_shards)
    whole = [] if copies else [a.shard_path(shard) for a in arrays for shard in shards]
    read = [_read_bytes(bank, array, rows) for array in arrays] if copies else []
    return PartFiles(
        schema,
        tuple(bank.seal.files[name] for name in _small_files(bank, chosen, schema, rows)),
        tuple(bank.seal.files[name] for name in whole),
        row_bytes=sum(read),
        seal_bytes=bank.seal.files[CARD].size + 3 * _seal_size(bank),
    )


def _seal_size(bank: Bank) -> int:
    """About the bytes of seal.json: paths, digits and digests, and what JSON puts around them."""
    return sum(len(name) + 150 for name in bank.seal.files)


def _small_files(
    bank: Bank, chosen: Selection, schema: BankSchema, rows: Int64[np.ndarray, " row"]
) -> Iterator[str]:
    yield CLIPS
    yield from golden_files(bank, schema)
    shards = np.unique(rows // bank.schema.rows_per_shard).tolist()
    yield from (f"commits/{shard_name(shard)}.json" for shard in shards)
    if bank.schema.stored.is_quantised and schema.holds_tokens:
        for layer in chosen.layers:
            yield from constant_files(layer, bank.schema.stored_dtype)
    # Whole files of rows keep the holes between them.
    places = rows if chosen.copies_rows(bank) else np.arange(bank.n_rows)
    chunks = np.unique(places // SMALL_CHUNK_ROWS).tolist()
    for array in bank.schema.small_arrays():
        if _is_needed(array, bank, chosen):
            yield from (chunk_path(array, chunk) for chunk in chunks)


def _is_needed(array: SmallArray, bank: Bank, chosen: Selection) -> bool:
    if array.layer not in chosen.layers:
        return False
    if chosen.storage == "pooled":
        return array.name != "scale"
    # What is pooled is pooled anew of tokens that are cast.
    return chosen.dtype == bank.schema.stored_dtype or array.name not in POOLED


def _read_bytes(bank: Bank, array: TokenArray, rows: Int64[np.ndarray, " row"]) -> int:
    """Bytes of some rows of an array and of the indices of all its shards."""
    layout = array.layout(bank.schema.rows_per_shard)
    indices = bank.schema.n_shards * layout.index_bytes
    if not bank.schema.is_archive:
        # Neighbours come in one request, with the padding between them.
        per_shard = bank.schema.rows_per_shard
        is_next = (np.diff(rows) == 1) & (rows[1:] // per_shard == rows[:-1] // per_shard)
        padding = int(is_next.sum()) * (layout.row_stride_bytes - array.row_bytes)
        return indices + len(rows) * array.row_bytes + padding
    sizes = [bank.seal.files[array.shard_path(s)].size for s in range(bank.schema.n_shards)]
    return indices + (sum(sizes) - indices) * len(rows) // bank.n_clips
