"""The encoder alone, on batches that are ready: one way of running it, in a process of its own.

`extract.py` calls it with a `BareJob` as JSON and reads JSON. A process for each way, because
torch's number of threads is partly one of the whole process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from patchbank.pipeline import load_encoder

N_BATCHES = 2
"""Different ones of each stream, so that nothing of one can be kept for the next."""
LEAST_STEPS = 2
GPU_BATCHES = 8
"""Between two looks at the clock: a GPU is asked ahead."""
COPIES = 3


@dataclass(frozen=True)
class BareJob:
    """What is run, and how."""

    encoder: str
    weights: str | None
    device: str
    batch_size: int
    seconds: float
    paths: list[str] = field(default_factory=list)
    n_streams: int = 0
    """Threads with batches of their own and one core each; 0: one stream, torch's own threads."""
    copies_back: bool = False
    """Whether waveforms come from pinned memory and float16 tokens go back there."""

    @property
    def name(self) -> str:
        if not self.device.startswith("cuda"):
            how = f"{self.n_streams} streams of" if self.n_streams else "all threads, batches of"
            return f"{how} {self.batch_size}"
        return f"bf16, batches of {self.batch_size}" + ", copied" * self.copies_back


def main() -> None:
    job = BareJob(**json.loads(sys.argv[1]))
    bench = Bench(job)
    rates = {"encode": measure(bench.encode, job)} if not job.copies_back else {}
    rates["frontend + encode"] = measure(
        bench.copied if job.copies_back else bench.frontend_and_encode, job
    )
    is_cuda = job.device.startswith("cuda")
    facts = {"gpu": torch.cuda.get_device_name(job.device)} if is_cuda else {}
    if is_cuda:
        facts["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(job.device)
    print(json.dumps({"rates": rates} | facts))


Step = Callable[[int, int], int]
"""Does the i-th piece of a stream's work, and says how many clips that was."""


class Bench:
    """Batches on the device, and what is done with them."""

    def __init__(self, job: BareJob) -> None:
        self._job = job
        self._encoder = load_encoder(job.encoder, weights=job.weights, device=job.device)
        self._last = self._encoder.spec.layers[-1].layer
        n_streams = max(1, job.n_streams)
        n_clips = n_streams * N_BATCHES * job.batch_size
        clips = [soundfile.read(path, dtype="float32")[0] for path in job.paths[:n_clips]]
        rows = torch.from_numpy(np.stack(clips))[torch.arange(n_clips) % len(clips)]
        host = rows.unflatten(0, (n_streams, N_BATCHES, job.batch_size))
        self._host = host.pin_memory() if job.copies_back else host
        self._waveforms = host.to(job.device)
        if job.copies_back:
            self._back = torch.cuda.Stream()
            self._done = [torch.cuda.Event() for _ in range(COPIES)]
            self._buffers: list[Tensor] = []
        self._features = [
            [self._encoder.frontend(batch) for batch in stream] for stream in self._waveforms
        ]

    @property
    def _is_cuda(self) -> bool:
        return self._job.device.startswith("cuda")

    def encode(self, stream: int, index: int) -> int:
        return self._repeated(lambda i: self._tokens(self._features[stream][i % N_BATCHES]), index)

    def frontend_and_encode(self, stream: int, index: int) -> int:
        def one(i: int) -> Tensor:
            return self._tokens(self._encoder.frontend(self._waveforms[stream, i % N_BATCHES]))

        return self._repeated(one, index)

    def copied(self, stream: int, index: int) -> int:
        """On a GPU only; copies back run beside the next batch."""
        back, done, buffers = self._back, self._done, self._buffers

        def one(i: int) -> Tensor:
            waveforms = self._host[stream, i % N_BATCHES].to(self._job.device, non_blocking=True)
            tokens = self._tokens(self._encoder.frontend(waveforms)).half()
            while len(buffers) < COPIES:
                buffers.append(torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True))
            done[i % COPIES].synchronize()
            back.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(back):
                buffers[i % COPIES].copy_(tokens, non_blocking=True)
                done[i % COPIES].record()
            tokens.record_stream(back)
            return tokens

        return self._repeated(one, index)

    def _repeated(self, one: Callable[[int], Tensor], index: int) -> int:
        n_batches = GPU_BATCHES if self._is_cuda else 1
        for i in range(index * n_batches, (index + 1) * n_batches):
            one(i)
        if self._is_cuda:
            torch.cuda.synchronize()
        return n_batches * self._job.batch_size

    def _tokens(self, features: Tensor) -> Tensor:
        mixed = torch.autocast("cuda", torch.bfloat16) if self._is_cuda else nullcontext()
        with torch.no_grad(), mixed:
            return self._encoder.encode(features, [self._last])[self._last].patches


def measure(step: Step, job: BareJob) -> float:
    """Clips a second of all streams, after a step of each that does not count."""
    if job.n_streams == 0:
        return Stream(step, 0, None, 1).run(job.seconds)
    start = threading.Barrier(job.n_streams)
    left = Countdown(job.n_streams)
    streams = [Stream(step, i, start, 1, left) for i in range(job.n_streams)]
    rates: list[Any] = [None] * job.n_streams

    def run(index: int) -> None:
        torch.set_num_threads(1)
        try:
            rates[index] = streams[index].run(job.seconds)
        except BaseException as error:
            rates[index] = error
            start.abort()
            left.abandon()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(job.n_streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rate in rates:
        if isinstance(rate, BaseException) and not isinstance(rate, threading.BrokenBarrierError):
            raise rate
    return sum(rates)


class Countdown:
    """How many streams have not been measured yet."""

    def __init__(self, n: int) -> None:
        self._n, self._lock = n, threading.Lock()

    def one_less(self) -> None:
        with self._lock:
            self._n -= 1

    def abandon(self) -> None:
        with self._lock:
            self._n = 0

    @property
    def is_over(self) -> bool:
        return self._n <= 0


@dataclass(frozen=True)
class Stream:
    """Steps one after another."""

    step: Step
    number: int
    start: threading.Barrier | None
    n_warm: int
    left: Countdown = field(default_factory=lambda: Countdown(1))

    def run(self, seconds: float) -> float:
        """Clips a second; goes on until all streams are measured, so that none runs alone."""
        for index in range(self.n_warm):
            self.step(self.number, index)
        if self.start is not None:
            self.start.wait()
        n_clips, index, began = 0, self.n_warm, time.perf_counter()
        while True:
            n_clips += self.step(self.number, index)
            index += 1
            took = time.perf_counter() - began
            if took >= seconds and index >= self.n_warm + LEAST_STEPS:
                break
        self.left.one_less()
        while not self.left.is_over:
            self.step(self.number, index)
        return n_clips / took


def as_argument(job: BareJob) -> str:
    return json.dumps(asdict(job))


def cpu_ways(job: dict[str, Any], *, batch_size: int) -> list[BareJob]:
    """Torch's threads share each batch of 16, or each core has batches of the command's size."""
    n_cores = len(os.sched_getaffinity(0))
    return [
        BareJob(**job, batch_size=16),
        BareJob(**job, batch_size=batch_size, n_streams=n_cores),
    ]


def gpu_ways(job: dict[str, Any]) -> list[BareJob]:
    """Nothing but the encoder, and with copies to and fro."""
    return [
        BareJob(**job, batch_size=64),
        BareJob(**job, batch_size=64, copies_back=True),
    ]


if __name__ == "__main__":
    main()
