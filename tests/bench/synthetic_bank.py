"""Sealed banks of made-up tokens, written as an extraction writes them but without an encoder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from clips import SyntheticClips

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.begin import begin_bank
from patchbank.pipeline.bank.commit import commit, open_attempt, shard_name
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.parts import RowFacts, part_table
from patchbank.pipeline.bank.quantised import ChannelConstants, quantisation_recipe
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.bank.seal import seal_bank
from patchbank.pipeline.bank.writer import ShardFileWriter, writer_threads
from patchbank.pipeline.environment import environment
from patchbank.pipeline.plan import bank_attributes, schema_for
from patchbank.pipeline.shard_rows import small_values_of, write_part
from patchbank.pipeline.specs import (
    EncoderSpec,
    Grid,
    Json,
    LayerSpec,
    Recipe,
    StoredDType,
    WindowSpec,
)
from patchbank.pipeline.tokens import StoredTokens, store_tokens

LAYER = 1
BATCH_ROWS = 4
Tokens = Callable[[range], np.ndarray]
"""Some rows (clip, patch, dim) in float16 or float32."""


@dataclass(frozen=True)
class _Job:
    path: Path
    schema: BankSchema
    tokens: Tokens
    constants: Mapping[int, ChannelConstants]


def make_bank(
    path: Path,
    *,
    n_clips: int,
    n_patches: int = 512,
    dim: int = 768,
    dtype: StoredDType = "float16",
    seed: int = 0,
    tokens: Tokens | None = None,
) -> Bank:
    """A bank of one layer, `n_patches` patches of `dim` channels a clip, `SyntheticClips` if no
    `tokens` are given.

    Quantised types get constants for values of mean 0 and deviation 1. The same call finishes what
    an earlier one began.
    """
    spec = LayerSpec(LAYER, "made up", dim)
    grids = {LAYER: Grid(n_patches, 1)}
    schema = schema_for((spec,), grids, stored_dtype=dtype, n_clips=n_clips)
    constants = _unit_constants(schema)
    job = _Job(
        path, schema, tokens or SyntheticClips(n_clips, n_patches, dim, seed).rows, constants
    )
    attributes = _attributes(schema, constants, seed)
    arrays = {layer: value.arrays() for layer, value in constants.items()}
    if begin_bank(path, schema, attributes, arrays):
        with open_attempt(path, "golden") as attempt:
            commit(path, attempt, "golden", [], {})
        with ThreadPoolExecutor(os.cpu_count()) as pool, writer_threads() as threads:
            list(pool.map(partial(_write_shard, job, threads=threads), range(schema.n_shards)))
    seal_bank(path, schema, recipe_id=attributes["recipe_id"])
    return open_bank(path)


def _unit_constants(schema: BankSchema) -> dict[int, ChannelConstants]:
    if not schema.stored.is_quantised:
        return {}
    [spec] = schema.layers
    constants = ChannelConstants(np.zeros(spec.dim, np.float32), np.ones(spec.dim, np.float32))
    return {spec.layer: constants.for_type(schema.stored)}


def _attributes(schema: BankSchema, constants: Mapping[int, ChannelConstants], seed: int) -> Json:
    no_weights = hashlib.sha256().hexdigest()
    encoder = EncoderSpec(
        "synthetic", no_weights, 16_000, {"seed": seed}, {}, {}, schema.layers, "none", "none"
    )
    recipe = Recipe(
        encoder,
        WindowSpec(),
        (LAYER,),
        stored_dtype=schema.stored_dtype,
        quantisation=quantisation_recipe(schema.stored_dtype, constants or None),
    )
    facts = {"batch_size": BATCH_ROWS, **environment("cpu")}
    return bank_attributes(recipe, schema, clip_rows(range(schema.n_clips)), facts)


def clip_rows(rows: range) -> pa.Table:
    """A clip table: recordings of ten seconds."""
    names = [f"{row:08d}.wav" for row in rows]
    return pa.table(
        {
            "clip_id": names,
            "view": pa.array(np.zeros(len(rows)), pa.int16()),
            "path": names,
            "start_s": np.zeros(len(rows)),
            "duration_s": np.full(len(rows), 10.0),
        }
    )


def _write_shard(job: _Job, shard: int, *, threads: ThreadPoolExecutor) -> None:
    [array], rows = job.schema.arrays(), job.schema.rows_of(shard)
    name, layout = array.shard_path(shard), array.layout(job.schema.rows_per_shard)
    facts: list[RowFacts] = []
    with open_attempt(job.path, shard_name(shard)) as attempt:
        with ShardFileWriter(
            attempt / name, layout, n_rows=len(rows), name=name, threads=threads
        ) as writer:
            for start in range(rows.start, rows.stop, BATCH_ROWS):
                stored = _stored(job, range(start, min(start + BATCH_ROWS, rows.stop)))
                for index, row in enumerate(stored.tokens):
                    writer.write_row(row)
                    facts.append(_facts(array.n_tokens, stored, index))
            file = writer.finish()
        clips, digests = clip_rows(rows), {array.column_suffix: file.digests}
        part = write_part(attempt, shard, part_table(clips, facts, digests, job.schema))
        record = {"n_done": len(rows), "n_failed": 0, "rows_sha256": rows_digest(clips)}
        commit(job.path, attempt, shard_name(shard), [file.record, part], record)


def _stored(job: _Job, rows: range) -> StoredTokens:
    tokens = torch.from_numpy(job.tokens(rows))
    return store_tokens(
        tokens,
        stored=job.schema.stored,
        n_counted=torch.full((len(rows),), tokens.shape[1]),
        constants=job.constants.get(LAYER),
    )


def _facts(n_patches: int, stored: StoredTokens, index: int) -> RowFacts:
    small = small_values_of(LAYER, n_patches, stored, index, failed=False)
    return RowFacts(small=small, audio_sha256=hashlib.sha256().hexdigest())
