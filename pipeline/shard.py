"""One worker's pipeline: the clips of a shard in, a committed shard out."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Shaped

from patchbank.pipeline.audio import DecodedClip, fit_to_encoder
from patchbank.pipeline.bank.card import read_attributes, recipe_of_card
from patchbank.pipeline.bank.commit import (
    commit,
    live_attempts,
    open_attempt,
    read_record,
    shard_name,
)
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.parts import RowFacts, part_path, part_table
from patchbank.pipeline.bank.quantised import (
    ChannelConstants,
    ChannelStatistics,
    load_constants,
)
from patchbank.pipeline.bank.schema import POOLED, BankSchema, TokenArray
from patchbank.pipeline.bank.writer import (
    FileRecord,
    ShardFileWriter,
    hash_file,
    write_durably,
    writer_threads,
)
from patchbank.pipeline.decoding import Decoded, Decoders, ShardClips
from patchbank.pipeline.encoders import reload_encoder
from patchbank.pipeline.encoders.base import TokenMap, features_of
from patchbank.pipeline.encoders.discovery import is_file
from patchbank.pipeline.encoders.hub import is_remote
from patchbank.pipeline.environment import choose_device, environment
from patchbank.pipeline.errors import (
    AudioError,
    BankError,
    BankMismatch,
    EncoderError,
    ManifestError,
    Problem,
)
from patchbank.pipeline.golden import GOLDEN_RATE_HZ, golden_frames, write_golden
from patchbank.pipeline.sound_file import FILE_IS_GONE
from patchbank.pipeline.specs import Json, Recipe, differing_fields
from patchbank.pipeline.tokens import StoredTokens, counted_patches, store_tokens


@dataclass(frozen=True)
class ExtractionJob:
    """All that a worker needs besides the rows; it travels to the workers."""

    bank: Path
    folder: Path
    """Where shards are committed: the bank, or a growth's folder inside it."""
    audio_root: Path
    encoder: str
    """What `load_encoder` takes: a name, or the absolute path of a file."""
    recipe: Recipe
    schema: BankSchema
    weights: str | None
    """`hf:org/repo@commit`, or an absolute path."""
    device: str
    n_decode_threads: int
    n_threads: int | None = None
    """Cores that a CPU computes with; None leaves it to torch."""


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard's clips."""

    shard: int
    n_done: int
    n_failed: int
    worker: str = ""
    """Who has done it."""


class ShardExtractor:
    """Owns the encoder and the threads that decode and write; `extract` may run twice at once.

    While one shard is in the encoder, the other decodes and writes, so neither device nor disk
    waits at a shard's end. Memory: per running shard, three batches of waveforms (five where views
    are made), one of tokens, and the ring of each file.
    """

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        if not job.audio_root.is_dir():
            raise ManifestError([_not_seen(job.audio_root, "--audio-root")])
        if job.weights and not is_remote(job.weights) and not Path(job.weights).exists():
            raise EncoderError(
                f"{socket.gethostname()} finds no weights at {job.weights}; every worker needs "
                "them under that path"
            )
        if is_file(job.encoder) and not Path(job.encoder).is_file():
            raise EncoderError(
                f"{socket.gethostname()} finds no encoder at {job.encoder}; every worker needs "
                "the file under that path"
            )
        if job.n_threads is not None:
            torch.set_num_threads(job.n_threads)
        self._device = choose_device(job.device)
        expected = job.recipe.encoder.identity()
        self._encoder = reload_encoder(
            expected, weights=job.weights, device=self._device, encoder=job.encoder
        )
        found = self._encoder.spec.identity()
        if found != expected:
            raise BankMismatch(
                f"{job.encoder} with {job.weights or 'no weights'} is another encoder here",
                differing_fields(found, expected),
            )
        self._grids = self._encoder.grids(self._n_samples)
        self._decoders = Decoders(job.audio_root, job.recipe, n_threads=job.n_decode_threads)
        self._writers = writer_threads()
        self._encoding = threading.Lock()

    @property
    def _n_samples(self) -> int:
        return self._job.recipe.window.n_samples(self._job.recipe.encoder.sample_rate_hz)

    @cached_property
    def _constants(self) -> dict[int, ChannelConstants]:
        """Of the layers of a quantised bank; they lie in it before its first shard."""
        if not self._job.schema.stored.is_quantised:
            return {}
        card = read_attributes(self._job.bank)["card"]
        layers = self._job.recipe.layers
        return {layer: load_constants(self._job.bank, card, layer) for layer in layers}

    def close(self) -> None:
        self._decoders.close()
        self._writers.shutdown(cancel_futures=True)

    def environment(self) -> Json:
        """What this worker computes with."""
        return environment(self._device)

    def calibrate(
        self, clips: ShardClips, layers: tuple[int, ...], batch_size: int
    ) -> dict[int, ChannelConstants]:
        """Channel constants of `layers` over all patches of `clips`; failed clips are left out."""
        statistics = {
            layer: ChannelStatistics(self._encoder.spec.layer(layer).dim) for layer in layers
        }
        for batch in self._decoders.batches(clips, batch_size):
            good = [clip for clip in batch if isinstance(clip, DecodedClip)]
            if not good:
                continue
            waveforms = np.stack([clip.waveform for clip in good])
            maps = self._encode(waveforms, [clip.n_audio_samples for clip in good])
            for layer, tokens in maps.items():
                flat = tokens.patches.float().flatten(0, 1).cpu().numpy()
                statistics[layer].add(flat[np.isfinite(flat).all(1)])
        try:
            stored = self._job.schema.stored
            return {
                layer: statistic.constants().for_type(stored)
                for layer, statistic in statistics.items()
            }
        except ValueError as error:
            raise EncoderError(
                f"none of {len(clips)} clips gave tokens to calibrate with; check the audio and "
                "--audio-root, or store another --dtype"
            ) from error

    def golden(self) -> None:
        """Commits the golden clip's tokens, where no other process has."""
        folder, recipe = self._job.folder, self._job.recipe
        self._check_visible()
        if read_record(folder, "golden") is not None:
            return
        frames = golden_frames(recipe.window.window_s)
        waveform, _ = fit_to_encoder(
            frames,
            GOLDEN_RATE_HZ,
            window=recipe.window,
            sample_rate_hz=recipe.encoder.sample_rate_hz,
        )
        maps = self._encode(waveform[None], [None])
        tokens = {
            array.column_suffix: _tokens(maps, array)[0].float().cpu().numpy()
            for array in self._job.schema.arrays()
        }
        for suffix, values in tokens.items():
            if not np.isfinite(values).all():
                raise EncoderError(
                    f"golden clip, layer {suffix.replace('_', ' ')}: token values are NaN or "
                    "infinite; check the weights"
                )
        try:
            with open_attempt(folder, "golden") as attempt:
                write_golden(attempt, frames, waveform, tokens)
                paths = sorted(path for path in (attempt / "golden").rglob("*") if path.is_file())
                files = [hash_file(path, relative_to=attempt) for path in paths]
                commit(folder, attempt, "golden", files, {})
        except FileNotFoundError:
            # A faster process that sealed the bank removes the attempts of the others.
            if read_record(folder, "golden") is None:
                raise

    def extract(
        self,
        shard: int,
        clips: ShardClips,
        extraction: Json,
        *,
        is_last_call: bool = True,
        on_progress: Callable[[int], None] | None = None,
    ) -> ShardReport | None:
        """Decodes, encodes, writes and commits the rows of one shard.

        A shard that another process has committed meanwhile is left alone. So is one that another
        process works on, unless `is_last_call`: the answer is None, so that two runs on one bank
        share the work; who holds it may be dead on another machine, so that somebody has to do it
        in the end. `extraction` is what the bank's card says of the run: its batch size, and what
        it was begun with. `on_progress` is told after each batch how many rows are written.
        """
        if (report := self._committed(shard, clips)) is not None:
            return report
        if not is_last_call and shard_name(shard) in live_attempts(self._job.folder):
            return None
        try:
            self._check_visible()
            with open_attempt(self._job.folder, shard_name(shard)) as attempt:
                # A worker that was stopped for long may come here when all is done.
                if (report := self._committed(shard, clips)) is not None:
                    return report
                return self._extract(attempt, shard, clips, extraction, on_progress)
        except (FileNotFoundError, FileExistsError, BankError):
            # A faster process that sealed the bank removes the attempts of the others.
            report = self._committed(shard, clips)
            if report is None:
                raise
            return report

    def _check_visible(self) -> None:
        if not (self._job.folder / "zarr.json").is_file():
            raise BankError(
                f"{socket.gethostname()} sees no bank at {self._job.folder}: --out must lie on a "
                "disk that all workers share, under the same path"
            )
        card = read_attributes(self._job.folder)["card"]
        found, expected = (
            _without_constants(recipe)
            for recipe in (recipe_of_card(card), self._job.recipe.identity())
        )
        if found != expected:
            raise BankMismatch(
                f"another bank lies at {self._job.folder} now; run the command again",
                differing_fields(found, expected),
            )

    def _committed(self, shard: int, clips: ShardClips) -> ShardReport | None:
        # A growth that another process has finished lies in the bank itself.
        for folder in {self._job.folder, self._job.bank}:
            record = read_record(folder, shard_name(shard))
            if record is not None and record["rows_sha256"] == rows_digest(clips.clips):
                return ShardReport(shard, record["n_done"], record["n_failed"])
        return None

    def _extract(
        self,
        attempt: Path,
        shard: int,
        clips: ShardClips,
        extraction: Json,
        on_progress: Callable[[int], None] | None,
    ) -> ShardReport:
        facts: list[RowFacts] = []
        with ExitStack() as stack:
            writers = self._open_writers(stack, attempt, shard)
            for decoded in self._decoders.batches(clips, int(extraction["batch_size"])):
                facts.extend(self._write_batch(decoded, writers))
                if on_progress is not None:
                    on_progress(len(facts))
            files = {suffix: writer.finish() for suffix, writer in writers.items()}
        self._refuse_hopeless(facts)
        digests = {suffix: file.digests for suffix, file in files.items()}
        part = write_part(attempt, shard, part_table(clips.clips, facts, digests, self._job.schema))
        n_failed = sum(fact.failure is not None for fact in facts)
        n_done = len(facts) - n_failed
        rows_sha256 = rows_digest(clips.clips)
        record: Json = {"n_done": n_done, "n_failed": n_failed, "rows_sha256": rows_sha256}
        here = self.environment()
        if here != {key: value for key, value in extraction.items() if key != "batch_size"}:
            record["extraction"] = [here]
        records = [*(file.record for file in files.values()), part]
        commit(self._job.folder, attempt, shard_name(shard), records, record)
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
            writer = ShardFileWriter(
                attempt / name, layout, n_rows=n_rows, name=name, threads=self._writers
            )
            writers[array.column_suffix] = stack.enter_context(writer)
        return writers

    def _write_batch(
        self, decoded: list[Decoded], writers: Mapping[str, ShardFileWriter]
    ) -> list[RowFacts]:
        # A failed clip is silence in its batch, so that its mates' tokens stay the same.
        silence = np.zeros(self._n_samples, np.float32)
        waveforms = [silence if isinstance(clip, AudioError) else clip.waveform for clip in decoded]
        n_audio = [
            None if isinstance(clip, AudioError) else clip.n_audio_samples for clip in decoded
        ]
        stored = self._store(self._encode(np.stack(waveforms), n_audio), n_audio)
        return [self._write_row(i, clip, stored, writers) for i, clip in enumerate(decoded)]

    def _encode(
        self, waveforms: Float32[np.ndarray, "batch sample"], n_audio: Sequence[int | None]
    ) -> dict[int, TokenMap]:
        """Tokens of clips, of which so many samples are audio; None: all."""
        lengths = [self._n_samples if n is None else n for n in n_audio]
        with self._encoding, torch.no_grad():
            features = features_of(
                self._encoder,
                torch.from_numpy(waveforms).to(self._device),
                lengths if self._job.recipe.window.pad == "zero" else None,
            )
            maps = self._encoder.encode(features, self._job.recipe.layers)
        for layer, tokens in maps.items():
            if tokens.grid != self._grids[layer]:
                raise EncoderError(
                    f"layer {layer}: found grid {tokens.grid}, expected {self._grids[layer]}"
                )
        return maps

    def _store(
        self, maps: Mapping[int, TokenMap], n_audio: list[int | None]
    ) -> dict[str, StoredTokens]:
        stored = {}
        for array in self._job.schema.arrays():
            counts = [
                array.n_tokens if array.kind == "prefix" else self._counted(array.layer, n)
                for n in n_audio
            ]
            stored[array.column_suffix] = store_tokens(
                _tokens(maps, array),
                stored=array.stored,
                n_counted=torch.tensor(counts),
                constants=self._constants.get(array.layer),
            )
        return stored

    def _counted(self, layer: int, n_audio_samples: int | None) -> int:
        return counted_patches(
            self._encoder,
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
        for array in self._job.schema.arrays():
            row = stored[array.column_suffix].tokens[index]
            row = np.full_like(row, array.stored.fill) if failure else row
            writers[array.column_suffix].write_row(row)
        n_audio = 0 if isinstance(clip, AudioError) else clip.n_audio_samples
        small: dict[str, Shaped[np.ndarray, ...]] = {}
        for layer in self._job.recipe.layers:
            tokens = stored[f"{layer}"]
            n_patches = 0 if failure else self._counted(layer, n_audio)
            small |= small_values_of(layer, n_patches, tokens, index, failed=failure is not None)
        return RowFacts(
            small=small,
            audio_sha256=None if isinstance(clip, AudioError) else clip.audio_sha256,
            failure=failure,
            mix_gains=self._mix_gains(clip),
        )

    def _mix_gains(self, clip: Decoded) -> tuple[float, ...] | None:
        augment = self._job.recipe.augment
        if augment is None or augment.mixup is None:
            return None
        return () if isinstance(clip, AudioError) else clip.mix_gains

    def _refuse_hopeless(self, facts: list[RowFacts]) -> None:
        """Stops the run where the encoder or the disk, not the audio, fails on a whole shard."""
        is_first = self._job.folder == self._job.bank  # a growth's encoder has proved itself
        lost = [fact.failure and fact.audio_sha256 for fact in facts]
        if is_first and len(facts) > 1 and all(lost):
            raise EncoderError(
                f"no clip of a whole shard gave usable tokens (first: {facts[0].failure}); "
                "check the weights, or store another --dtype"
            )
        if len(facts) > 1 and all(fact.failure == FILE_IS_GONE for fact in facts):
            raise ManifestError([_not_seen(self._job.audio_root, "audio")])


def _without_constants(recipe: Json) -> Json:
    """A recipe as it is before anything was measured, which is what a job knows."""
    quantisation = {k: v for k, v in recipe["quantisation"].items() if k != "constants_sha256"}
    return recipe | {"quantisation": quantisation}


def _not_seen(audio_root: Path, what: str) -> Problem:
    message = f"{socket.gethostname()} finds no audio there; every worker needs it under that path"
    return Problem(str(audio_root), None, None, f"{what}: {message}")


def _tokens(maps: Mapping[int, TokenMap], array: TokenArray) -> torch.Tensor:
    tokens = maps[array.layer].patches if array.kind == "patches" else maps[array.layer].prefix
    if tokens is None:
        raise EncoderError(f"layer {array.layer} has no prefix tokens, expected {array.n_tokens}")
    return tokens


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
    values: dict[str, Shaped[np.ndarray, ...]] = {"n_patches": np.array(n_patches, np.int32)}
    values |= dict(zip(POOLED, stored.pooled[index], strict=True))
    if stored.scale is not None:
        values["scale"] = stored.scale[index]
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
