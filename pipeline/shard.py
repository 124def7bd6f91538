"""One worker's pipeline: the clips of a shard in, a committed shard out."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32

from patchbank.pipeline.audio import DecodedClip, decode_clip
from patchbank.pipeline.bank.commit import commit, open_attempt, read_record, shard_name
from patchbank.pipeline.bank.parts import RowFacts, part_path, part_table
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.bank.writer import (
    FileRecord,
    RowDigest,
    ShardFileWriter,
    hash_file,
    write_durably,
)
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import AudioError, BankMismatch, EncoderError
from patchbank.pipeline.golden import golden_waveform, write_golden
from patchbank.pipeline.plan import rows_digest
from patchbank.pipeline.specs import Recipe, differing_fields
from patchbank.pipeline.tokens import StoredTokens, counted_patches, store_tokens

READ_AHEAD_BATCHES = 2


@dataclass(frozen=True)
class ExtractionJob:
    """All that a worker needs besides the rows; it travels to the workers."""

    bank: Path
    audio_root: Path
    recipe: Recipe
    schema: BankSchema
    weights: Path | None
    device: str
    batch_size: int
    n_decode_threads: int


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard's clips."""

    shard: int
    n_done: int
    n_failed: int


Decoded = DecodedClip | AudioError


class ShardExtractor:
    """Owns the encoder and the decode threads; `extract` may run in two threads at once.

    While one shard is in the encoder, the other decodes and writes, so neither device nor disk
    waits at a shard's end. Memory: per running shard, three batches of waveforms and one of tokens.
    """

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        self._encoder = load_encoder(
            job.recipe.encoder.name, weights=job.weights, device=job.device
        )
        found, expected = self._encoder.spec.identity(), job.recipe.encoder.identity()
        if found != expected:
            raise BankMismatch(
                f"the encoder that this worker loads from {job.weights} is another one",
                differing_fields(found, expected),
            )
        self._grids = self._encoder.grids(self._n_samples)
        self._decoders = ThreadPoolExecutor(job.n_decode_threads, thread_name_prefix="decode")
        self._encoding = threading.Lock()

    @property
    def _n_samples(self) -> int:
        return self._job.recipe.window.n_samples(self._job.recipe.encoder.sample_rate_hz)

    def close(self) -> None:
        self._decoders.shutdown(cancel_futures=True)

    def golden(self) -> None:
        """Commits the golden clip's tokens, where no other process has."""
        if read_record(self._job.bank, "golden") is not None:
            return
        waveform = golden_waveform(self._n_samples)
        stored = self._encode(waveform[None], [None])
        for suffix, tokens in stored.items():
            if tokens.failures[0]:
                raise EncoderError(
                    f"golden clip, layer {suffix.replace('_', ' ')}: {tokens.failures[0]}; "
                    "check the weights, or store another --dtype"
                )
        with open_attempt(self._job.bank, "golden") as attempt:
            write_golden(attempt, waveform, {key: value.tokens for key, value in stored.items()})
            paths = sorted(path for path in (attempt / "golden").rglob("*") if path.is_file())
            files = [hash_file(path, relative_to=attempt) for path in paths]
            commit(self._job.bank, attempt, "golden", files, {})

    def extract(self, shard: int, clips: pa.Table) -> ShardReport:
        """Decodes, encodes, writes and commits the rows of one shard."""
        with open_attempt(self._job.bank, shard_name(shard)) as attempt:
            return self._extract(attempt, shard, clips)

    def _extract(self, attempt: Path, shard: int, clips: pa.Table) -> ShardReport:
        facts: list[RowFacts] = []
        with ExitStack() as stack:
            writers = self._open_writers(stack, attempt, shard)
            for decoded in self._decoded_batches(clips):
                facts.extend(self._write_batch(decoded, writers))
            files = [writer.finish() for writer in writers.values()]
        self._refuse_hopeless(facts)
        table = part_table(clips, facts, self._job.schema)
        files.append(_write_part(attempt, shard, table))
        n_failed = sum(fact.failure is not None for fact in facts)
        n_done = len(facts) - n_failed
        counts = {"n_done": n_done, "n_failed": n_failed, "rows_sha256": rows_digest(clips)}
        commit(self._job.bank, attempt, shard_name(shard), files, counts)
        return ShardReport(shard, n_done, n_failed)

    def _open_writers(
        self, stack: ExitStack, attempt: Path, shard: int
    ) -> dict[str, ShardFileWriter]:
        schema = self._job.schema
        n_rows = len(schema.rows_of(shard))
        writers = {}
        for array in schema.arrays():
            name = array.shard_path(shard)
            layout = array.layout(schema.rows_per_shard)
            writer = ShardFileWriter(attempt / name, layout, n_rows=n_rows, name=name)
            writers[array.column_suffix] = stack.enter_context(writer)
        return writers

    def _decoded_batches(self, clips: pa.Table) -> Iterator[list[Decoded]]:
        """Decoded clips, a batch at a time, with `READ_AHEAD_BATCHES` batches under way."""
        rows = clips.select(["path", "start_s", "duration_s"]).to_pylist()
        size = self._job.batch_size
        waiting: deque[list[Future[Decoded]]] = deque()
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            waiting.append([self._decoders.submit(self._decode, **row) for row in batch])
            if len(waiting) > READ_AHEAD_BATCHES:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]

    def _decode(self, *, path: str, start_s: float, duration_s: float) -> Decoded:
        recipe = self._job.recipe
        try:
            return decode_clip(
                self._job.audio_root / path,
                start_s=start_s,
                duration_s=duration_s,
                window=recipe.window,
                sample_rate_hz=recipe.encoder.sample_rate_hz,
            )
        except AudioError as error:
            return error

    def _write_batch(
        self, decoded: list[Decoded], writers: Mapping[str, ShardFileWriter]
    ) -> list[RowFacts]:
        # A failed clip is silence in its batch, so that its mates' tokens stay the same.
        silence = np.zeros(self._n_samples, np.float32)
        waveforms = [silence if isinstance(clip, AudioError) else clip.waveform for clip in decoded]
        n_audio = [
            None if isinstance(clip, AudioError) else clip.n_audio_samples for clip in decoded
        ]
        stored = self._encode(np.stack(waveforms), n_audio)
        return [self._write_row(i, clip, stored, writers) for i, clip in enumerate(decoded)]

    def _encode(
        self, waveforms: Float32[np.ndarray, "batch sample"], n_audio: list[int | None]
    ) -> dict[str, StoredTokens]:
        recipe = self._job.recipe
        with self._encoding, torch.no_grad():
            features = self._encoder.frontend(torch.from_numpy(waveforms).to(self._job.device))
            maps = self._encoder.encode(features, recipe.layers)
            stored = {}
            for layer, tokens in maps.items():
                if tokens.grid != self._grids[layer]:
                    raise EncoderError(
                        f"layer {layer}: found grid {tokens.grid}, expected {self._grids[layer]}"
                    )
                counted = torch.tensor([self._counted(layer, n) for n in n_audio])
                stored[f"{layer}"] = store_tokens(
                    tokens.patches, dtype=recipe.stored_dtype, n_counted=counted
                )
                if tokens.prefix is not None:
                    every = torch.full((len(n_audio),), tokens.prefix.shape[1])
                    stored[f"{layer}_prefix"] = store_tokens(
                        tokens.prefix, dtype=recipe.stored_dtype, n_counted=every
                    )
        return stored

    def _counted(self, layer: int, n_audio_samples: int | None) -> int:
        return counted_patches(
            self._grids[layer],
            n_audio_samples=self._n_samples if n_audio_samples is None else n_audio_samples,
            n_samples=self._n_samples,
            mask_padding=self._job.recipe.mask_padding,
        )

    def _write_row(
        self,
        index: int,
        clip: Decoded,
        stored: Mapping[str, StoredTokens],
        writers: Mapping[str, ShardFileWriter],
    ) -> RowFacts:
        failure = _failure(index, clip, stored)
        digests: dict[str, RowDigest] = {}
        for suffix, writer in writers.items():
            row = stored[suffix].tokens[index]
            digests[suffix] = writer.write_row(np.full_like(row, np.nan) if failure else row)
        n_audio = 0 if isinstance(clip, AudioError) else clip.n_audio_samples
        layers = self._job.recipe.layers
        return RowFacts(
            digests=digests,
            n_patches={layer: 0 if failure else self._counted(layer, n_audio) for layer in layers},
            pooled={layer: _pooled(index, stored[f"{layer}"], failure) for layer in layers},
            audio_sha256=None if isinstance(clip, AudioError) else clip.audio_sha256,
            failure=failure,
        )

    def _refuse_hopeless(self, facts: list[RowFacts]) -> None:
        """Stops the run where the encoder, not the audio, fails on every clip of a shard."""
        if all(fact.failure and fact.audio_sha256 for fact in facts) and len(facts) > 1:
            raise EncoderError(
                f"no clip of a whole shard gave usable tokens (first: {facts[0].failure}); "
                "check the weights, or store another --dtype"
            )


def _failure(index: int, clip: Decoded, stored: Mapping[str, StoredTokens]) -> str | None:
    if isinstance(clip, AudioError):
        return str(clip)
    for suffix, tokens in stored.items():
        reason = tokens.failures[index]
        if reason is not None:
            return f"layer {suffix.replace('_', ' ')}: {reason}"
    return None


def _pooled(
    index: int, stored: StoredTokens, failure: str | None
) -> Float32[np.ndarray, "pool dim"]:
    pooled = stored.pooled[index]
    return np.full_like(pooled, np.nan) if failure else pooled


def _write_part(attempt: Path, shard: int, table: pa.Table) -> FileRecord:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    write_durably(attempt / part_path(shard), sink.getvalue())
    return hash_file(attempt / part_path(shard), relative_to=attempt)
