"""Encoder lanes: threads that each drive one batch after another through the encoder.

A CPU has a lane for each core, and a lane does its sums alone: lanes never wait for each other,
and tokens depend on no number of cores. A GPU has one lane, which only asks: the device works
behind it, and the copies to and from pinned memory run on streams of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor

from patchbank.pipeline.decoding import DecodedBatch
from patchbank.pipeline.encoding import ClockMarks, Encoding
from patchbank.pipeline.environment import compute_alone, is_cpu
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.slots import WaveformSlot
from patchbank.pipeline.stages import COPY, StageClock
from patchbank.pipeline.tokens import PackedTokens, StoredTokens

GPU_DEPTH = 3
"""Batches of a shard that are on a GPU or on their way from it: while one is copied back, one is
encoded and one waits."""
GPU_SLOTS = 8
COPY_ENGINES = 2
"""Of a GPU: one each way."""
CPU_BATCH = 4
"""What a core computes on its own stays in its caches."""
GPU_BATCH = 64
GPU_SHARE = 0.6
"""Of a GPU's memory, that a batch may take; the next one's waveforms and tokens are there too."""
T = TypeVar("T")


def n_slots(device: str, n_threads: int) -> int:
    """Batches of waveforms that keep the lanes busy: as many as are encoded, as many ahead, and
    what is being decoded."""
    return 2 * n_threads + 2 if is_cpu(device) else GPU_SLOTS


def batches_ahead(device: str, n_threads: int) -> int:
    """Batches that a shard may have in the lanes before it writes the oldest."""
    return n_threads + 1 if is_cpu(device) else GPU_DEPTH


@runtime_checkable
class EncodedBatch(Protocol):
    """Tokens on their way to the CPU."""

    def wait(self) -> Mapping[str, StoredTokens]:
        """The tokens by array, when they are there; valid until `release`."""
        ...

    def release(self) -> None:
        """Lets other tokens have the memory."""
        ...


@runtime_checkable
class Device(Protocol):
    """How a batch comes to the encoder and its tokens back."""

    def encode(self, slot: WaveformSlot, n_audio: Sequence[int | None]) -> EncodedBatch: ...


class Lanes:
    """The lanes of a worker."""

    def __init__(self, encoding: Encoding, clock: StageClock, *, n_threads: int) -> None:
        """`n_threads` is how many cores a CPU may use."""
        self.encoding = encoding
        kind = torch.device(encoding.device).type
        self.n_lanes = n_threads if is_cpu(encoding.device) else 1
        self.n_copies = self.n_lanes if is_cpu(encoding.device) else COPY_ENGINES
        self.depth = batches_ahead(encoding.device, n_threads)
        self.n_slots = n_slots(encoding.device, n_threads)
        self._device: Device = (CudaDevice if kind == "cuda" else PlainDevice)(encoding, clock)
        self._threads = ThreadPoolExecutor(
            self.n_lanes, thread_name_prefix="encode", initializer=self._begin
        )

    def _begin(self) -> None:
        compute_alone()
        device = torch.device(self.encoding.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    def batch_size(self) -> int:
        """Clips that are encoded together where nobody says how many.

        On a GPU what it can hold decides, and no timing, so that a second run chooses the same.
        """
        if is_cpu(self.encoding.device):
            return CPU_BATCH
        size = GPU_BATCH
        while size > 1 and not self.run(self._fits, size).result():
            size //= 2
        return size

    def _fits(self, size: int) -> bool:
        device = torch.device(self.encoding.device)
        if device.type != "cuda":
            return True
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                self.encoding.try_batch(size, CudaMarks(StageClock()))
            except torch.cuda.OutOfMemoryError:
                fits = False
            else:
                total = torch.cuda.get_device_properties(device).total_memory
                fits = torch.cuda.max_memory_reserved() < GPU_SHARE * total
            # Not within `except`, whose traceback holds the tensors. The stream that will compute
            # could not use what this one keeps.
            torch.cuda.empty_cache()
        return fits

    def submit(self, batch: DecodedBatch) -> Future[EncodedBatch]:
        """Encodes a batch and gives its slot back; batches go in the order of the calls."""
        return self.run_batch(self._encode, batch)

    def _encode(self, batch: DecodedBatch) -> EncodedBatch:
        try:
            return self._device.encode(batch.slot, batch.n_audio)
        except torch.cuda.OutOfMemoryError as error:
            raise EncoderError(
                f"no memory left on {self.encoding.device} for a batch of {len(batch.clips)} clips "
                f"({str(error).splitlines()[0]}); choose a smaller --batch-size and another --out"
            ) from error

    def run_batch(self, function: Callable[[DecodedBatch], T], batch: DecodedBatch) -> Future[T]:
        """Has a lane call `function`, which gives the batch's slot back."""
        try:
            return self._threads.submit(function, batch)
        except RuntimeError:  # the lanes are closed
            batch.slot.release()
            raise

    def run(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Has a lane call `function`."""
        return self._threads.submit(function, *arguments)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


class PlainDevice:
    """A CPU, and every device that has done its work when the call returns."""

    def __init__(self, encoding: Encoding, clock: StageClock) -> None:
        self._encoding, self._clock = encoding, clock

    def encode(self, slot: WaveformSlot, n_audio: Sequence[int | None]) -> EncodedBatch:
        marks = ClockMarks(self._clock)
        try:
            waveforms = slot.tensor(len(n_audio)).to(self._encoding.device)
            is_full = len(n_audio) == self._encoding.full_batch(len(slot.waveforms))
            maps = self._encoding.maps(waveforms, n_audio, marks, is_full=is_full)
            # Tokens may be views of the waveforms.
            packed = self._encoding.pack(maps, n_audio, marks)
        finally:
            slot.release()
        stored = {suffix: tokens.on_cpu() for suffix, tokens in packed.items()}
        marks.after(COPY)
        return PlainBatch(stored)


class PlainBatch:
    """Tokens that are there."""

    def __init__(self, stored: Mapping[str, StoredTokens]) -> None:
        self._stored = stored

    def wait(self) -> Mapping[str, StoredTokens]:
        return self._stored

    def release(self) -> None:
        self._stored = {}


class CudaMarks:
    """Events on a stream, read when the device has passed them."""

    def __init__(self, clock: StageClock) -> None:
        self._clock = clock
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self.after("")

    def after(self, stage: str) -> None:
        # A thread that spins on an event would take a core from the decoders.
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        self._events.append((stage, event))

    def wait(self) -> None:
        """Returns when the device has passed the last mark."""
        self._events[-1][1].synchronize()

    def settle(self) -> None:
        """Adds up the times; every event has to be over."""
        for (_, before), (stage, event) in zip(self._events, self._events[1:], strict=False):
            self._clock.add(stage, before.elapsed_time(event) / 1000)


class CudaDevice:
    """A GPU: asks for copy, front end, encoder, packing and copy, and waits for none of them."""

    def __init__(self, encoding: Encoding, clock: StageClock) -> None:
        self._encoding, self._clock = encoding, clock
        self._arriving, self._computing, self._leaving = (
            torch.cuda.Stream(encoding.device) for _ in range(3)
        )
        self._buffers: list[dict[str, dict[str, Tensor]]] = []
        self._lock = threading.Lock()

    def encode(self, slot: WaveformSlot, n_audio: Sequence[int | None]) -> EncodedBatch:
        try:
            return self._encode(slot, n_audio)
        except BaseException:
            # A copy may be reading the slot. After some errors a GPU says nothing but that error.
            with suppress(RuntimeError):
                torch.cuda.synchronize(self._encoding.device)
            slot.release()
            raise

    def _encode(self, slot: WaveformSlot, n_audio: Sequence[int | None]) -> EncodedBatch:
        with torch.cuda.device(self._encoding.device):
            with torch.cuda.stream(self._arriving):
                arrival = CudaMarks(self._clock)
                waveforms = slot.tensor(len(n_audio)).to(self._encoding.device, non_blocking=True)
                arrival.after(COPY)
            packed, work = self._compute(waveforms, n_audio, len(slot.waveforms))
            with torch.cuda.stream(self._leaving):
                self._leaving.wait_stream(self._computing)
                departure = CudaMarks(self._clock)
                buffer = self._buffer_for(packed, len(slot.waveforms))
                host = {suffix: self._leave(packed[suffix], buffer[suffix]) for suffix in packed}
                departure.after(COPY)
        # The waveforms are there long before their tokens: the decoders get the memory back now.
        arrival.wait()
        slot.release()
        return CudaBatch(self, host, buffer, (arrival, work, departure))

    def _compute(
        self, waveforms: Float32[Tensor, "batch sample"], n_audio: Sequence[int | None], n_full: int
    ) -> tuple[dict[str, PackedTokens], CudaMarks]:
        with torch.cuda.stream(self._computing):
            self._computing.wait_stream(self._arriving)
            # Memory of one stream that another uses may not be given away too early.
            waveforms.record_stream(self._computing)
            work = CudaMarks(self._clock)
            is_full = len(n_audio) == self._encoding.full_batch(n_full)
            maps = self._encoding.maps(waveforms, n_audio, work, is_full=is_full)
            return self._encoding.pack(maps, n_audio, work), work

    def _leave(self, packed: PackedTokens, buffer: Mapping[str, Tensor]) -> PackedTokens:
        host = {}
        for name, tensor in packed.tensors().items():
            tensor.record_stream(self._leaving)
            host[name] = buffer[name][: len(tensor)].copy_(tensor, non_blocking=True)
        return PackedTokens(packed.stored, **host)

    def _buffer_for(
        self, packed: Mapping[str, PackedTokens], batch_size: int
    ) -> dict[str, dict[str, Tensor]]:
        """Pinned memory for a full batch. There are as many as batches may be on their way."""
        with self._lock:
            if self._buffers:
                return self._buffers.pop()
        return {
            suffix: {
                name: torch.empty(
                    (batch_size, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True
                )
                for name, tensor in tokens.tensors().items()
            }
            for suffix, tokens in packed.items()
        }

    def give_back(self, buffer: dict[str, dict[str, Tensor]]) -> None:
        with self._lock:
            self._buffers.append(buffer)


class CudaBatch:
    """Tokens in pinned memory, or on their way to it."""

    def __init__(
        self,
        device: CudaDevice,
        host: Mapping[str, PackedTokens],
        buffer: dict[str, dict[str, Tensor]],
        marks: Sequence[CudaMarks],
    ) -> None:
        """`marks` in the order of the way; the last is passed when the tokens are here."""
        self._device, self._host, self._buffer, self._marks = device, host, buffer, marks

    def wait(self) -> Mapping[str, StoredTokens]:
        self._marks[-1].wait()
        for marks in self._marks:
            marks.settle()
        return {suffix: tokens.on_cpu() for suffix, tokens in self._host.items()}

    def release(self) -> None:
        self._device.give_back(self._buffer)
