"""The rows of one shard on their way to its files: tokens to the writers, facts to the part."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from patchbank.pipeline.bank.parts import RowFacts, part_path, part_table
from patchbank.pipeline.bank.schema import POOLED
from patchbank.pipeline.bank.writer import (
    FileRecord,
    ShardFileWriter,
    hash_file,
    write_durably,
)
from patchbank.pipeline.decoding import Decoded
from patchbank.pipeline.encoding import Encoding
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.stages import StageClock
from patchbank.pipeline.tokens import StoredTokens


class ShardRows:
    """Writes the rows of a shard in order, below the folder of an attempt; a context manager.

    Memory is the writers' rings: `ring_bytes`.
    """

    def __init__(
        self,
        attempt: Path,
        shard: int,
        encoding: Encoding,
        *,
        threads: ThreadPoolExecutor,
        clock: StageClock,
    ) -> None:
        self._attempt, self._shard, self._encoding = attempt, shard, encoding
        self._schema = encoding.schema
        self.facts: list[RowFacts] = []
        self._stack = ExitStack()
        self._writers: dict[str, ShardFileWriter] = {}
        with self._stack:
            for array in self._schema.arrays():
                name = array.shard_path(shard)
                writer = ShardFileWriter(
                    attempt / name,
                    array.layout(self._schema.rows_per_shard),
                    n_rows=len(self._schema.rows_of(shard)),
                    name=name,
                    threads=threads,
                    count_seconds=clock.add,
                )
                self._writers[array.column_suffix] = self._stack.enter_context(writer)
            self._stack = self._stack.pop_all()

    def __enter__(self) -> ShardRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, clips: Sequence[Decoded], stored: Mapping[str, StoredTokens]) -> None:
        """Appends a batch; waits while as many rows as the rings hold are on their way."""
        for index, clip in enumerate(clips):
            failure = _failure(index, clip, stored)
            for array in self._schema.arrays():
                row = stored[array.column_suffix].tokens[index]
                row = np.full_like(row, array.stored.fill) if failure else row
                self._writers[array.column_suffix].write_row(row)
            self.facts.append(self._facts(index, clip, stored, failure))

    def _facts(
        self,
        index: int,
        clip: Decoded,
        stored: Mapping[str, StoredTokens],
        failure: str | None,
    ) -> RowFacts:
        n_audio = 0 if isinstance(clip, AudioError) else clip.n_audio_samples
        small: dict[str, Shaped[np.ndarray, ...]] = {}
        for layer in self._encoding.recipe.layers:
            tokens = stored[f"{layer}"]
            n_patches = 0 if failure else self._encoding.counted(layer, n_audio)
            small |= small_values_of(layer, n_patches, tokens, index, failed=failure is not None)
        return RowFacts(
            small=small,
            audio_sha256=None if isinstance(clip, AudioError) else clip.audio_sha256,
            failure=failure,
            mix_gains=self._mix_gains(clip),
        )

    def _mix_gains(self, clip: Decoded) -> tuple[float, ...] | None:
        augment = self._encoding.recipe.augment
        if augment is None or augment.mixup is None:
            return None
        return () if isinstance(clip, AudioError) else clip.mix_gains

    def finish(self, clips: pa.Table) -> list[FileRecord]:
        """Waits for the files, writes the part of these clips, and names them all."""
        files = {suffix: writer.finish() for suffix, writer in self._writers.items()}
        digests = {suffix: file.digests for suffix, file in files.items()}
        table = part_table(clips, self.facts, digests, self._schema)
        part = write_part(self._attempt, self._shard, table)
        return [*(file.record for file in files.values()), part]


def _failure(index: int, clip: Decoded, stored: Mapping[str, StoredTokens]) -> str | None:
    if isinstance(clip, AudioError):
        return str(clip)
    for suffix, tokens in stored.items():
        reason = tokens.failures[index]
        if reason is not None:
            return f"layer {suffix.replace('_', ' ')}: {reason}"
    return None


def small_values_of(
    layer: int, n_patches: int, stored: StoredTokens, index: int, *, failed: bool
) -> dict[str, Shaped[np.ndarray, ...]]:
    """One row of the small arrays of a layer, by their paths."""
    # Copies: the batch's memory is used again.
    values: dict[str, Shaped[np.ndarray, ...]] = {"n_patches": np.array(n_patches, np.int32)}
    values |= dict(zip(POOLED, stored.pooled[index].copy(), strict=True))
    if stored.scale is not None:
        values["scale"] = stored.scale[index].copy()
    if failed:
        values |= {k: np.full_like(v, np.nan) for k, v in values.items() if k != "n_patches"}
    return {f"layers/{layer}/{name}": value for name, value in values.items()}


def write_part(folder: Path, shard: int, table: pa.Table) -> FileRecord:
    """Writes a shard's part file below `folder`, which must be there."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    (folder / part_path(shard)).parent.mkdir(exist_ok=True)
    write_durably(folder / part_path(shard), sink.getvalue())
    return hash_file(folder / part_path(shard), relative_to=folder)
