"""The digests that name a bank's content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from patchbank.pipeline.bank.schema import HOLE, TokenArray
from patchbank.pipeline.specs import Json, canonical_json, digest

FINGERPRINT_COLUMNS = ("clip_id", "view", "path", "start_s", "duration_s", "audio_sha256", "status")
TABLE_COLUMNS = ("clip_id", "view", "path", "start_s", "duration_s")
"""What every clip table has; the columns of its user follow."""


def root_hash(seal: Json) -> str:
    """SHA-256 over the seal's content but the root hash itself, as canonical JSON."""
    return digest({key: value for key, value in seal.items() if key != "root_sha256"})


def fingerprint(recipe_id: str, clips: pa.Table) -> str:
    """SHA-256 over the recipe and the ordered clips with their audio digests.

    Clips are hashed one a line, each a canonical JSON list of `FINGERPRINT_COLUMNS`. Holes are no
    clips: a bank that grew has the fingerprint of one that was extracted at once. Not so one that
    mixes views: the sources of those from before it grew were drawn from fewer clips.
    """
    hasher = hashlib.sha256(recipe_id.encode())
    status = FINGERPRINT_COLUMNS.index("status")
    for batch in clips.select(FINGERPRINT_COLUMNS).to_batches():
        columns = [batch.column(name).to_pylist() for name in FINGERPRINT_COLUMNS]
        for row in zip(*columns, strict=True):
            if row[status] != HOLE:
                hasher.update(b"\n" + canonical_json(row))
    return hasher.hexdigest()


def rows_digest(clips: pa.Table) -> str:
    """SHA-256 over the rows of a clip table, user columns included."""
    hasher = hashlib.sha256()
    for name in clips.column_names:
        # User columns may hold dates, bytes or NaN, which have no JSON of their own.
        column = [name, clips[name].to_pylist()]
        hasher.update(json.dumps(column, separators=(",", ":"), default=str).encode())
    return hasher.hexdigest()


def table_of(clips: pa.Table) -> pa.Table:
    """The clip table that a bank was made from, of its clips.parquet: no holes, no bank columns.

    What the bank found out stands before the table's own columns, up to the last checksum.
    """
    names = clips.column_names
    last = max(place for place, name in enumerate(names) if name.startswith("crc32c_"))
    order = [*TABLE_COLUMNS, *(name for name in names[last + 1 :] if name not in TABLE_COLUMNS)]
    return clips.filter(pc.not_equal(clips["status"], HOLE)).select(order)


def digest_columns(arrays: Iterable[TokenArray]) -> list[str]:
    """The columns of clips.parquet that hold the checksums of token arrays."""
    return [f"{kind}_{array.column_suffix}" for array in arrays for kind in ("sha256", "crc32c")]
