"""Makes a bank from rows of others: fewer clips, no holes, another stored type, other shards.

Where the type stays, a row's bytes are copied and keep their checksums, which are compared on the
way. Where it changes, tokens are read as float32, cast or quantised as extraction would, and pooled
anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int32, Int64, Shaped

from patchbank.pipeline.bank.archive import ArchiveFileWriter
from patchbank.pipeline.bank.begin import begin_bank, derivation, environment_of
from patchbank.pipeline.bank.card import attributes_of_card, layers_of_schema
from patchbank.pipeline.bank.commit import commit, open_attempt, read_record, shard_name
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.join import (
    check_joinable,
    copy_golden,
    environments_of,
    joined_table,
    quantisation_of_layers,
)
from patchbank.pipeline.bank.parts import RowFacts, part_table
from patchbank.pipeline.bank.quantised import (
    CALIBRATION_CLIPS,
    CALIBRATION_SEED,
    ChannelConstants,
    ChannelStatistics,
    quantisation_recipe,
)
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.rows import RowBytes
from patchbank.pipeline.bank.schema import DONE, HOLE, BankSchema, SmallArray, Storage, TokenArray
from patchbank.pipeline.bank.seal import seal_bank
from patchbank.pipeline.bank.writer import RowDigest, ShardFileWriter
from patchbank.pipeline.plan import bank_bytes, check_space, schema_for
from patchbank.pipeline.shard import small_values_of, write_part
from patchbank.pipeline.specs import Json, StoredDType
from patchbank.pipeline.tokens import StoredTokens, store_tokens

BATCH_ROWS = 16
Rows = Int64[np.ndarray, " row"]


def rebuild_bank(
    banks: Sequence[Bank],
    out: Path,
    *,
    dtype: StoredDType | None = None,
    layers: Sequence[int] | None = None,
    rows: Sequence[Rows] | None = None,
    storage: Storage = "aligned",
    progress: Callable[[int, int], None] | None = None,
) -> Bank:
    """The clips of `banks`, or `rows` of each, in a new bank of one generation.

    `dtype` and `layers` are those of the first bank where None. `storage="blosc"` makes an archive,
    "aligned" a bank to train from, of either. The same call finishes what an
    earlier one began. Raises `BankMismatch` where the recipes differ or another bank lies at `out`,
    `BankCorrupt` where a row does not match its checksum.
    """
    check_joinable(banks)
    plan = _plan(banks, out, dtype=dtype, layers=layers, rows=rows, storage=storage)
    first = banks[0]
    constants = {layer: value.arrays() for layer, value in plan.constants.items()}
    if not (out / "zarr.json").is_file():
        check_space(out, bank_bytes(plan.schema, range(plan.schema.n_shards)))
    if begin_bank(out, plan.schema, plan.attributes, constants):
        copy_golden(first, out, plan.schema)
        n_done, shards = 0, range(plan.schema.n_shards)
        _ = plan.sources if plan.is_copy else plan.floats
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="rebuild")
        try:
            for future in as_completed([pool.submit(_rebuild_shard, plan, s) for s in shards]):
                future.result()
                n_done += 1
                if progress is not None:
                    progress(n_done, len(shards))
        finally:
            pool.shutdown(cancel_futures=True)
    seal_bank(out, plan.schema, recipe_id=plan.attributes["recipe_id"])
    return open_bank(out)


@dataclass(frozen=True)
class _Plan:
    """A bank to be made, and where each of its clips comes from."""

    banks: Sequence[Bank]
    out: Path
    schema: BankSchema
    attributes: Json
    constants: dict[int, ChannelConstants]
    """Of a quantised target."""
    clips: pa.Table
    """The clip table, in the order of the new bank."""
    owner: Int64[np.ndarray, " clip"]
    """Which bank each clip comes from."""
    row: Int64[np.ndarray, " clip"]
    """And which of its rows it is."""

    @cached_property
    def sources(self) -> dict[tuple[int, str], RowBytes]:
        """By bank and by array, named by `TokenArray.column_suffix`."""
        return {
            (number, array.column_suffix): RowBytes(bank, bank.array(array.layer, array.kind))
            for number, bank in enumerate(self.banks)
            for array in self.schema.arrays()
        }

    @cached_property
    def floats(self) -> dict[tuple[int, str], TokenFloats]:
        """The same, decoded."""
        return {
            (number, array.column_suffix): TokenFloats(bank, bank.array(array.layer, array.kind))
            for number, bank in enumerate(self.banks)
            for array in self.schema.arrays()
        }

    @property
    def is_copy(self) -> bool:
        """Whether stored tokens stay what they are."""
        return self.schema.stored_dtype == self.banks[0].schema.stored_dtype


def _plan(
    banks: Sequence[Bank],
    out: Path,
    *,
    dtype: StoredDType | None,
    layers: Sequence[int] | None,
    rows: Sequence[Rows] | None,
    storage: Storage,
) -> _Plan:
    first = banks[0]
    chosen = rows or [bank.schema.clip_rows() for bank in banks]
    everything = joined_table(banks)
    places, n_before = [], 0
    for bank, some in zip(banks, chosen, strict=True):
        # The table has no holes; rows are counted with them.
        place_of = np.full(bank.n_rows, -1)
        place_of[bank.schema.clip_rows()] = np.arange(bank.n_clips) + n_before
        places.append(place_of[some])
        n_before += bank.n_clips
    clips = everything.take(np.concatenate(places))
    schema = schema_for(
        tuple(spec for spec in first.schema.layers if layers is None or spec.layer in layers),
        first.schema.grids,
        stored_dtype=dtype or first.schema.stored_dtype,
        n_clips=len(clips),
        storage=storage,
    )
    owner = np.concatenate([np.full(len(some), n) for n, some in enumerate(chosen)])
    constants = _constants(banks, schema, owner, np.concatenate(chosen))
    return _Plan(
        banks,
        out,
        schema,
        _attributes(banks, schema, clips, constants),
        constants,
        clips,
        owner,
        np.concatenate(chosen),
    )


def _attributes(
    banks: Sequence[Bank],
    schema: BankSchema,
    clips: pa.Table,
    constants: dict[int, ChannelConstants],
) -> Json:
    card = banks[0].card | {
        "layers": layers_of_schema(schema),
        "n_rows": schema.n_rows,
        "generations": list(schema.generations),
        "rows_per_shard": schema.rows_per_shard,
        "rows_sha256": rows_digest(clips),
        "derived_from": [derivation(bank) for bank in banks],
        "stored_dtype": schema.stored_dtype,
    }
    card.pop("storage", None)
    if schema.is_archive:
        card["storage"] = schema.storage
    was = banks[0].schema.stored_dtype
    if schema.stored_dtype == was:
        return attributes_of_card(card | quantisation_of_layers(banks[0], schema))
    quantisation = quantisation_recipe(schema.stored_dtype, constants)
    if was != "float32":
        # Tokens that were rounded before are not those that an extraction would give.
        history = banks[0].card["quantisation"].get("rounded_before", [])
        quantisation["rounded_before"] = [*history, was]
    return attributes_of_card(card | {"quantisation": quantisation})


def _constants(
    banks: Sequence[Bank], schema: BankSchema, owner: Rows, row: Rows
) -> dict[int, ChannelConstants]:
    """The constants of a quantised target: those of the source, or measured on its tokens."""
    if not schema.stored.is_quantised:
        return {}
    layers = [spec.layer for spec in schema.layers]
    if banks[0].schema.stored_dtype == schema.stored_dtype:
        return {layer: banks[0].constants(layer) for layer in layers}
    status = [bank.status for bank in banks]
    done = np.array([status[o][r] == DONE for o, r in zip(owner, row, strict=True)])
    candidates = np.flatnonzero(done)
    order = np.random.default_rng(CALIBRATION_SEED).permutation(len(candidates))
    drawn = candidates[np.sort(order[:CALIBRATION_CLIPS])]
    constants = {}
    for layer in layers:
        array = banks[0].array(layer)
        readers = [TokenFloats(bank, array) for bank in banks]
        statistics = ChannelStatistics(array.dim)
        for clip in drawn.tolist():
            statistics.add(readers[int(owner[clip])].read(int(row[clip])))
        constants[layer] = statistics.constants().for_type(schema.stored)
    return constants


class TokenFloats:
    """The tokens of one array as float32, whatever they are stored as."""

    def __init__(self, bank: Bank, array: TokenArray) -> None:
        self._bytes, self._stored = RowBytes(bank, array), array.stored
        self._scale = self._constants = None
        if array.stored.is_quantised:
            self._scale, self._constants = bank.scale(array.layer), bank.constants(array.layer)

    def read(self, row: int) -> Float32[np.ndarray, "token dim"]:
        tokens = self._bytes.read(row)
        if self._constants is None or self._scale is None:
            return self._stored.to_float(tokens).astype(np.float32)
        return self._constants.dequantise(self._stored.to_codes(tokens), self._scale[row])


def _rebuild_shard(plan: _Plan, shard: int) -> None:
    name = shard_name(shard)
    if read_record(plan.out, name) is not None:
        return
    place = plan.schema.clips_of(shard)
    clips = plan.clips.slice(place.start, len(place))
    facts: list[RowFacts] = []
    with open_attempt(plan.out, name) as attempt:
        with ExitStack() as stack:
            writers = {
                array.column_suffix: _open_writer(stack, plan, attempt, array, shard)
                for array in plan.schema.arrays()
            }
            for start in range(place.start, place.stop, BATCH_ROWS):
                batch = range(start, min(start + BATCH_ROWS, place.stop))
                write = _copied if plan.is_copy else _converted
                facts.extend(write(plan, batch, writers))
            files = [writer.finish() for writer in writers.values()]
        files.append(write_part(attempt, shard, part_table(clips, facts, plan.schema)))
        n_failed = sum(fact.failure is not None for fact in facts)
        record: Json = {
            "n_done": len(facts) - n_failed,
            "n_failed": n_failed,
            "rows_sha256": rows_digest(clips),
        }
        if others := _other_environments(plan, place):
            record["extraction"] = others
        commit(plan.out, attempt, name, files, record)


def _open_writer(
    stack: ExitStack, plan: _Plan, attempt: Path, array: TokenArray, shard: int
) -> ShardFileWriter | ArchiveFileWriter:
    name, n_rows = array.shard_path(shard), len(plan.schema.rows_of(shard))
    layout = array.layout(plan.schema.rows_per_shard)
    if plan.schema.is_archive:
        archive = ArchiveFileWriter(attempt / name, layout, n_rows=n_rows, name=name)
        return stack.enter_context(archive)
    return stack.enter_context(ShardFileWriter(attempt / name, layout, n_rows=n_rows, name=name))


def _other_environments(plan: _Plan, clips: range) -> list[Json]:
    """What tokens of a shard were computed with, where that is not what the card says."""
    some = slice(clips.start, clips.stop)
    pairs = zip(plan.owner[some].tolist(), plan.row[some].tolist(), strict=True)
    found: list[Json] = []
    for owner, shard in sorted({(o, r // plan.banks[o].schema.rows_per_shard) for o, r in pairs}):
        for environment in environments_of(plan.banks[owner], shard):
            if environment not in (environment_of(plan.banks[0].card), *found):
                found.append(environment)
    return found


def _small(plan: _Plan, array: SmallArray, clips: range) -> Shaped[np.ndarray, "row ..."]:
    """The values of a small array for some clips, a read for each run of neighbours."""
    out = np.empty((len(clips), *array.row_shape), array.dtype)
    start = clips.start
    while start < clips.stop:
        owner, stop = plan.owner[start], start + 1
        while (
            stop < clips.stop
            and plan.owner[stop] == owner
            and plan.row[stop] == plan.row[stop - 1] + 1
        ):
            stop += 1
        rows = range(int(plan.row[start]), int(plan.row[stop - 1]) + 1)
        values = plan.banks[int(owner)].small(array, rows)
        out[start - clips.start : stop - clips.start] = values
        start = stop
    return out


def _copied(
    plan: _Plan, clips: range, writers: Mapping[str, ShardFileWriter | ArchiveFileWriter]
) -> Iterator[RowFacts]:
    values = {array.path: _small(plan, array, clips) for array in plan.schema.small_arrays()}
    for index, clip in enumerate(clips):
        owner, row = int(plan.owner[clip]), int(plan.row[clip])
        digests = {}
        for array in plan.schema.arrays():
            tokens = plan.sources[owner, array.column_suffix].read(row)
            digests[array.column_suffix] = writers[array.column_suffix].write_row(tokens)
        small = {path: value[index] for path, value in values.items()}
        yield _facts(plan, clip, digests, small)


def _facts(
    plan: _Plan,
    clip: int,
    digests: dict[str, RowDigest],
    small: dict[str, Shaped[np.ndarray, ...]],
    failure: str | None = None,
) -> RowFacts:
    clips, row = plan.banks[int(plan.owner[clip])].clips, int(plan.row[clip])
    assert clips["status"][row].as_py() != HOLE
    return RowFacts(
        digests=digests,
        small=small,
        audio_sha256=clips["audio_sha256"][row].as_py(),
        failure=failure or clips["reason"][row].as_py(),
    )


def _converted(
    plan: _Plan, clips: range, writers: Mapping[str, ShardFileWriter | ArchiveFileWriter]
) -> Iterator[RowFacts]:
    counts = {
        spec.layer: _small(plan, SmallArray(spec.layer, "n_patches", (), "int32", ("clip",)), clips)
        for spec in plan.schema.layers
    }
    stored = {
        array.column_suffix: _convert(plan, array, clips, counts[array.layer])
        for array in plan.schema.arrays()
    }
    for index, clip in enumerate(clips):
        failure = _old_failure(plan, clip) or next(
            (
                f"layer {suffix.replace('_', ' ')}: {tokens.failures[index]}"
                for suffix, tokens in stored.items()
                if tokens.failures[index]
            ),
            None,
        )
        digests: dict[str, RowDigest] = {}
        small: dict[str, Shaped[np.ndarray, ...]] = {}
        for array in plan.schema.arrays():
            tokens = stored[array.column_suffix].tokens[index]
            tokens = np.full_like(tokens, array.stored.fill) if failure else tokens
            digests[array.column_suffix] = writers[array.column_suffix].write_row(tokens)
        for spec in plan.schema.layers:
            n_patches = 0 if failure else int(counts[spec.layer][index])
            tokens_of_layer = stored[f"{spec.layer}"]
            small |= small_values_of(
                spec.layer, n_patches, tokens_of_layer, index, failed=failure is not None
            )
        yield _facts(plan, clip, digests, small, failure)


def _old_failure(plan: _Plan, clip: int) -> str | None:
    reason: str | None = (
        plan.banks[int(plan.owner[clip])].clips["reason"][int(plan.row[clip])].as_py()
    )
    return reason


def _convert(
    plan: _Plan, array: TokenArray, clips: range, n_patches: Int32[np.ndarray, " clip"]
) -> StoredTokens:
    suffix = array.column_suffix
    tokens = np.stack(
        [plan.floats[int(plan.owner[clip]), suffix].read(int(plan.row[clip])) for clip in clips]
    )
    failed = [_old_failure(plan, clip) is not None for clip in clips]
    # A failed clip has no tokens; ones that can be stored keep its mates' batch simple.
    tokens[failed] = 1.0
    counts = [
        array.n_tokens if array.kind == "prefix" or failed[index] else int(n_patches[index])
        for index in range(len(clips))
    ]
    return store_tokens(
        torch.from_numpy(tokens),
        stored=array.stored,
        n_counted=torch.tensor(counts),
        constants=plan.constants.get(array.layer),
    )
