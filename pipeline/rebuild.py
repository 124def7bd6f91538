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
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32, Shaped

from patchbank.pipeline.bank.archive import ArchiveFileWriter
from patchbank.pipeline.bank.begin import begin_bank, environment_of
from patchbank.pipeline.bank.commit import (
    commit,
    open_attempt,
    read_record,
    shard_name,
    unless_committed,
)
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.join import check_joinable, copy_golden, environments_of
from patchbank.pipeline.bank.parts import RowFacts, part_table
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.schema import HOLE, SmallArray, Storage, TokenArray
from patchbank.pipeline.bank.seal import seal_bank
from patchbank.pipeline.bank.view_columns import MIX_GAINS, has_gains
from patchbank.pipeline.bank.writer import RowDigest, ShardFileWriter, writer_threads
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.plan import bank_bytes, check_space
from patchbank.pipeline.rebuild_plan import Readers, RebuildPlan, Rows, plan_rebuild, read_together
from patchbank.pipeline.shard_rows import small_values_of, write_part
from patchbank.pipeline.specs import Json, StoredDType
from patchbank.pipeline.tokens import StoredTokens, store_tokens

BATCH_ROWS = 16
SHARDS_AT_ONCE = 8


def rebuild_bank(
    banks: Sequence[Bank],
    out: Path,
    *,
    dtype: StoredDType | None = None,
    layers: Sequence[int] | None = None,
    rows: Sequence[Rows] | None = None,
    storage: Storage = "aligned",
    splits: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Bank:
    """The clips of `banks`, or `rows` of each, in a new bank of one generation.

    `dtype` and `layers` are those of the first bank where None. `storage="blosc"` makes an archive,
    "aligned" a bank to train from, of either; "pooled" leaves the tokens out. `splits` are those
    that `rows` were chosen by, for the card. The same call finishes what an
    earlier one began. Raises `BankMismatch` where the recipes differ or another bank lies at `out`,
    `BankCorrupt` where a row does not match its checksum.
    """
    check_joinable(banks)
    if storage != "pooled":
        banks[0].require_tokens()
    elif dtype not in (None, banks[0].schema.stored_dtype):
        raise BankError(
            f"pooled vectors are floats, whatever tokens are stored as: leave {dtype} out"
        )
    plan = plan_rebuild(
        banks, out, dtype=dtype, layers=layers, rows=rows, storage=storage, splits=splits
    )
    first = banks[0]
    constants = {layer: value.arrays() for layer, value in plan.constants.items()}
    if not (out / "zarr.json").is_file():
        check_space(out, bank_bytes(plan.schema, range(plan.schema.n_shards)))
    if begin_bank(out, plan.schema, plan.attributes, constants):
        copy_golden(first, out, plan.schema)
        n_done, shards = 0, range(plan.schema.n_shards)
        _ = plan.sources if plan.is_copy else plan.floats
        pool = ThreadPoolExecutor(_n_shards_at_once(banks), thread_name_prefix="rebuild")
        # Others than the pool's, whose shards wait for their rows.
        with writer_threads() as threads:
            try:
                futures = [pool.submit(_rebuild_shard, plan, shard, threads) for shard in shards]
                for future in as_completed(futures):
                    future.result()
                    n_done += 1
                    if progress is not None:
                        progress(n_done, len(shards))
            finally:
                pool.shutdown(cancel_futures=True)
    seal_bank(out, plan.schema, recipe_id=plan.attributes["recipe_id"])
    return open_bank(out)


def _n_shards_at_once(banks: Sequence[Bank]) -> int:
    """As many as there are cores; more where most of the time they wait for rows from afar."""
    if any(bank.is_remote for bank in banks):
        return SHARDS_AT_ONCE
    return min(SHARDS_AT_ONCE, os.cpu_count() or 1)


def _rebuild_shard(plan: RebuildPlan, shard: int, threads: ThreadPoolExecutor) -> None:
    name = shard_name(shard)
    if read_record(plan.out, name) is not None:
        return
    place = plan.schema.clips_of(shard)
    clips = plan.clips.slice(place.start, len(place))
    facts: list[RowFacts] = []
    with unless_committed(plan.out, name), open_attempt(plan.out, name) as attempt:
        with ExitStack() as stack:
            writers = {
                array.column_suffix: _open_writer(stack, plan, attempt, array, shard, threads)
                for array in plan.schema.arrays()
            }
            for start in range(place.start, place.stop, BATCH_ROWS):
                batch = range(start, min(start + BATCH_ROWS, place.stop))
                write = _copied if plan.is_copy else _converted
                facts.extend(write(plan, batch, writers))
            files = {suffix: writer.finish() for suffix, writer in writers.items()}
        digests = (
            {suffix: file.digests for suffix, file in files.items()}
            if plan.schema.holds_tokens
            else _old_digests(plan, place)
        )
        part = write_part(attempt, shard, part_table(clips, facts, digests, plan.schema))
        n_failed = sum(fact.failure is not None for fact in facts)
        record: Json = {
            "n_done": len(facts) - n_failed,
            "n_failed": n_failed,
            "rows_sha256": rows_digest(clips),
        }
        if others := _other_environments(plan, place):
            record["extraction"] = others
        commit(plan.out, attempt, name, [*(f.record for f in files.values()), part], record)


def _old_digests(plan: RebuildPlan, clips: range) -> dict[str, list[RowDigest]]:
    """The digests of tokens that are left out, by `TokenArray.column_suffix`."""
    digests: dict[str, list[RowDigest]] = {}
    for suffix in (array.column_suffix for array in plan.schema.described_arrays()):
        columns = [
            [bank.clips[f"{kind}_{suffix}"] for kind in ("sha256", "crc32c")] for bank in plan.banks
        ]
        digests[suffix] = [
            RowDigest(
                *(column[int(plan.row[clip])].as_py() for column in columns[plan.owner[clip]])
            )
            for clip in clips
        ]
    return digests


def _open_writer(
    stack: ExitStack,
    plan: RebuildPlan,
    attempt: Path,
    array: TokenArray,
    shard: int,
    threads: ThreadPoolExecutor,
) -> ShardFileWriter | ArchiveFileWriter:
    name, n_rows = array.shard_path(shard), len(plan.schema.rows_of(shard))
    layout = array.layout(plan.schema.rows_per_shard)
    if plan.schema.is_archive:
        archive = ArchiveFileWriter(attempt / name, layout, n_rows=n_rows, name=name)
        return stack.enter_context(archive)
    writer = ShardFileWriter(attempt / name, layout, n_rows=n_rows, name=name, threads=threads)
    return stack.enter_context(writer)


def _other_environments(plan: RebuildPlan, clips: range) -> list[Json]:
    """What tokens of a shard were computed with, where that is not what the card says."""
    some = slice(clips.start, clips.stop)
    pairs = zip(plan.owner[some].tolist(), plan.row[some].tolist(), strict=True)
    found: list[Json] = []
    for owner, shard in sorted({(o, r // plan.banks[o].schema.rows_per_shard) for o, r in pairs}):
        for environment in environments_of(plan.banks[owner], shard):
            if environment not in (environment_of(plan.banks[0].card), *found):
                found.append(environment)
    return found


def _small(plan: RebuildPlan, array: SmallArray, clips: range) -> Shaped[np.ndarray, "row ..."]:
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
    plan: RebuildPlan, clips: range, writers: Mapping[str, ShardFileWriter | ArchiveFileWriter]
) -> Iterator[RowFacts]:
    values = {array.path: _small(plan, array, clips) for array in plan.schema.small_arrays()}
    suffixes = [array.column_suffix for array in plan.schema.arrays()]
    tokens = {suffix: _tokens(plan, plan.sources, suffix, clips) for suffix in suffixes}
    for index, clip in enumerate(clips):
        for suffix in suffixes:
            writers[suffix].write_row(tokens[suffix][index])
        small = {path: value[index] for path, value in values.items()}
        yield _facts(plan, clip, small)


def _tokens(
    plan: RebuildPlan, readers: Readers, suffix: str, clips: range
) -> list[Shaped[np.ndarray, "token dim"]]:
    some = slice(clips.start, clips.stop)
    chosen = {number: reader for (number, name), reader in readers.items() if name == suffix}
    return read_together(chosen, plan.owner[some], plan.row[some])


def _facts(
    plan: RebuildPlan,
    clip: int,
    small: dict[str, Shaped[np.ndarray, ...]],
    failure: str | None = None,
) -> RowFacts:
    clips, row = plan.banks[int(plan.owner[clip])].clips, int(plan.row[clip])
    assert clips["status"][row].as_py() != HOLE
    return RowFacts(
        small=small,
        audio_sha256=clips["audio_sha256"][row].as_py(),
        failure=failure or clips["reason"][row].as_py(),
        mix_gains=_mix_gains(plan.banks[int(plan.owner[clip])], row),
    )


def _mix_gains(bank: Bank, row: int) -> tuple[float, ...] | None:
    if not has_gains(bank.card):
        return None
    return tuple(bank.clips[MIX_GAINS][row].as_py())


def _converted(
    plan: RebuildPlan, clips: range, writers: Mapping[str, ShardFileWriter | ArchiveFileWriter]
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
        small: dict[str, Shaped[np.ndarray, ...]] = {}
        for array in plan.schema.arrays():
            tokens = stored[array.column_suffix].tokens[index]
            tokens = np.full_like(tokens, array.stored.fill) if failure else tokens
            writers[array.column_suffix].write_row(tokens)
        for spec in plan.schema.layers:
            n_patches = 0 if failure else int(counts[spec.layer][index])
            tokens_of_layer = stored[f"{spec.layer}"]
            small |= small_values_of(
                spec.layer, n_patches, tokens_of_layer, index, failed=failure is not None
            )
        yield _facts(plan, clip, small, failure)


def _old_failure(plan: RebuildPlan, clip: int) -> str | None:
    reason: str | None = (
        plan.banks[int(plan.owner[clip])].clips["reason"][int(plan.row[clip])].as_py()
    )
    return reason


def _convert(
    plan: RebuildPlan, array: TokenArray, clips: range, n_patches: Int32[np.ndarray, " clip"]
) -> StoredTokens:
    suffix = array.column_suffix
    tokens = np.stack(_tokens(plan, plan.floats, suffix, clips))
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
