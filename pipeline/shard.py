"""One worker's pipeline: the clips of a shard in, a committed shard out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float32

from patchbank.pipeline.audio import fit_to_encoder
from patchbank.pipeline.bank.card import read_attributes
from patchbank.pipeline.bank.commit import (
    commit,
    live_attempts,
    open_attempt,
    read_record,
    shard_name,
)
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.parts import RowFacts
from patchbank.pipeline.bank.quantised import (
    ChannelConstants,
    ChannelStatistics,
    constant_files,
    load_constants,
)
from patchbank.pipeline.bank.writer import hash_file, n_writer_threads, writer_threads
from patchbank.pipeline.decoding import ClipDecoder, Decoded, DecodedBatch, Decoders, ShardClips
from patchbank.pipeline.encoders.base import TokenMap
from patchbank.pipeline.encoding import ClockMarks, Encoding, tokens_of
from patchbank.pipeline.environment import choose_device, environment
from patchbank.pipeline.errors import AudioError, BankError, EncoderError
from patchbank.pipeline.golden import GOLDEN_RATE_HZ, golden_frames, write_golden
from patchbank.pipeline.job import ExtractionJob, ShardReport, not_seen
from patchbank.pipeline.lanes import EncodedBatch, Lanes
from patchbank.pipeline.shard_rows import ShardRows
from patchbank.pipeline.slots import SlotRing
from patchbank.pipeline.sound_file import FILE_IS_GONE
from patchbank.pipeline.specs import Json
from patchbank.pipeline.stages import COPIES, DECODERS, LANES, WRITERS, StageClock, StageTimes
from patchbank.pipeline.workplace import Machine, decode_threads

T = TypeVar("T")


class ShardExtractor:
    """Owns the encoder and the threads that decode, encode and write; may extract several shards
    at once.

    While one shard is committed another decodes, encodes and writes, so that nobody waits at a
    shard's end. Memory: the ring of waveforms; per running shard a few batches of tokens (see
    `Lanes.depth`) and the rings of its files.
    """

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        self._threads_before = torch.get_num_threads()
        self._device = choose_device(job.device)
        self._clock = StageClock()
        self._began_s: float | None = None
        encoding = Encoding(
            job.load_encoder(self._device),
            job.recipe,
            job.schema,
            device=self._device,
            constants=self._constants,
            compiles=job.compiles,
        )
        machine = Machine.here()
        self._lanes = Lanes(encoding, self._clock, n_threads=job.n_threads or machine.n_cores)
        self._n_decode_threads = job.n_decode_threads or decode_threads(machine, self._device, 1)
        self._writers = writer_threads()
        self._decoders: Decoders | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def _encoding(self) -> Encoding:
        return self._lanes.encoding

    def _constants(self) -> dict[int, ChannelConstants]:
        """Of the layers of a quantised bank; they lie in it before its first shard."""
        if not self._job.schema.stored.is_quantised:
            return {}
        bank, dtype = self._job.bank, self._job.schema.stored_dtype
        card = read_attributes(bank)["card"]
        return {
            layer: load_constants(
                [bank / name for name in constant_files(layer, dtype)], card, layer, where=str(bank)
            )
            for layer in self._job.recipe.layers
        }

    def close(self) -> None:
        """Ends everything, also what still runs."""
        with self._lock:
            self._is_closed = True
            if self._decoders is not None:
                self._decoders.stop()
        self._lanes.close()
        self._writers.shutdown(cancel_futures=True)
        if self._decoders is not None:
            self._decoders.close()
        # Threads that are begun after this one's take the number that was set last.
        torch.set_num_threads(self._threads_before)

    def environment(self) -> Json:
        """What this worker computes with."""
        compiled = {"compiled": True} if self._job.compiles else {}
        return environment(self._device) | compiled

    def batch_size(self) -> int:
        """Clips encoded together where nobody says how many."""
        return self._lanes.batch_size()

    def _batches(self, clips: ShardClips, batch_size: int) -> Generator[DecodedBatch]:
        with self._lock:
            if self._is_closed:
                raise CancelledError
            if self._decoders is not None and self._decoders.batch_size != batch_size:
                # Another process began the bank since this one calibrated: nothing runs here.
                self._decoders.close()
                self._decoders = None
            if self._decoders is None:
                self._decoders = self._new_decoders(batch_size)
            return self._decoders.batches(clips)

    def _new_decoders(self, batch_size: int) -> Decoders:
        in_processes = self._job.decode_in == "processes"
        ring = SlotRing(
            self._lanes.n_slots,
            batch_size=batch_size,
            n_samples=self._encoding.n_samples,
            device=self._device,
            shares=in_processes,
        )
        decoder = ClipDecoder(self._job.audio_root, self._job.recipe, self._clock)
        return Decoders(
            decoder, ring, n_threads=self._n_decode_threads, decode_in=self._job.decode_in
        )

    def calibrate(
        self, clips: ShardClips, layers: tuple[int, ...], batch_size: int
    ) -> dict[int, ChannelConstants]:
        """Channel constants of `layers` over all patches of `clips`; failed clips are left out."""
        statistics = {
            layer: ChannelStatistics(self._encoding.encoder.spec.layer(layer).dim)
            for layer in layers
        }
        lanes = self._lanes
        with closing(self._batches(clips, batch_size)) as batches:
            asked = (lanes.run_batch(self._finite_patches, batch) for batch in batches)
            for patches in _ahead(asked, lanes.depth):
                for layer, values in patches.items():
                    statistics[layer].add(values)
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

    def _finite_patches(self, batch: DecodedBatch) -> dict[int, Float32[np.ndarray, "patch dim"]]:
        good = [i for i, clip in enumerate(batch.clips) if not isinstance(clip, AudioError)]
        n_audio = [batch.n_audio[i] for i in good]
        try:
            waveforms = batch.slot.tensor(len(batch.clips))[good]
            maps = self._maps(waveforms, n_audio) if good else {}
        finally:
            batch.slot.release()
        flat = {
            layer: tokens.patches.float().flatten(0, 1).cpu().numpy()
            for layer, tokens in maps.items()
        }
        return {layer: values[np.isfinite(values).all(1)] for layer, values in flat.items()}

    def _maps(self, waveforms: torch.Tensor, n_audio: list[int | None]) -> dict[int, TokenMap]:
        return self._encoding.maps(waveforms.to(self._device), n_audio, ClockMarks(self._clock))

    def golden(self) -> None:
        """Commits the golden clip's tokens, where no other process has."""
        folder, recipe = self._job.folder, self._job.recipe
        self._job.check_visible()
        if read_record(folder, "golden") is not None:
            return
        frames = golden_frames(recipe.window.window_s)
        waveform, _ = fit_to_encoder(
            frames,
            GOLDEN_RATE_HZ,
            window=recipe.window,
            sample_rate_hz=recipe.encoder.sample_rate_hz,
        )
        maps = self._lanes.run(self._maps, torch.from_numpy(waveform[None]), [None]).result()
        tokens = {
            array.column_suffix: tokens_of(maps, array)[0].float().cpu().numpy()
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
        with self._lock:
            if self._began_s is None:
                # What came before belongs to no shard.
                self._began_s = time.time()
                self._clock.taken()
        if (report := self._committed(shard, clips)) is not None:
            return report
        if not is_last_call and shard_name(shard) in live_attempts(self._job.folder):
            return None
        try:
            self._job.check_visible()
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
        with (
            ShardRows(
                attempt, shard, self._encoding, threads=self._writers, clock=self._clock
            ) as rows,
            # An error's traceback would keep the loop, and the memory of its batches.
            closing(self._batches(clips, int(extraction["batch_size"]))) as batches,
        ):
            decoded: deque[Sequence[Decoded]] = deque()
            for encoded in _ahead(self._submitted(batches, decoded), self._lanes.depth):
                rows.write(decoded.popleft(), encoded.wait())
                encoded.release()
                if on_progress is not None:
                    on_progress(len(rows.facts))
            self._refuse_hopeless(rows.facts)
            records = rows.finish(clips.clips)
        n_failed = sum(fact.failure is not None for fact in rows.facts)
        n_done = len(rows.facts) - n_failed
        rows_sha256 = rows_digest(clips.clips)
        record: Json = {"n_done": n_done, "n_failed": n_failed, "rows_sha256": rows_sha256}
        here = self.environment()
        if here != {key: value for key, value in extraction.items() if key != "batch_size"}:
            record["extraction"] = [here]
        commit(self._job.folder, attempt, shard_name(shard), records, record)
        return ShardReport(shard, n_done, n_failed, times=self._times())

    def _submitted(
        self, batches: Iterator[DecodedBatch], decoded: deque[Sequence[Decoded]]
    ) -> Iterator[Future[EncodedBatch]]:
        """Batches in the lanes; what was decoded goes to `decoded`."""
        for batch in batches:
            decoded.append(batch.clips)
            yield self._lanes.submit(batch)

    def _times(self) -> StageTimes:
        peak_bytes = 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        threads = {
            DECODERS: self._n_decode_threads,
            LANES: self._lanes.n_lanes,
            COPIES: self._lanes.n_copies,
            WRITERS: n_writer_threads(),
        }
        with self._lock:
            began_s, self._began_s = self._began_s or time.time(), time.time()
            return StageTimes(self._clock.taken(), began_s, self._began_s, threads, peak_bytes)

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
            raise not_seen(self._job.audio_root, "audio")


def _ahead(futures: Iterator[Future[T]], depth: int) -> Iterator[T]:
    """Results in order, with up to `depth` of them asked for before the first is taken."""
    waiting: deque[Future[T]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
