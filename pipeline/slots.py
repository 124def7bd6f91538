"""Memory for waveforms on their way from the decoders to the encoder: a fixed ring of batches."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.pipeline.errors import PatchbankError

HOST_REGISTER_PORTABLE = 1
"""Of CUDA's driver_types.h: pinned for every context, not only for that of one GPU."""


class WaveformSlot:
    """Waveforms of one batch, used again when the encoder has them."""

    def __init__(
        self,
        index: int,
        waveforms: Float32[np.ndarray, "batch sample"],
        give_back: Callable[[WaveformSlot], None],
    ) -> None:
        self.index, self.waveforms = index, waveforms
        self._tensor = torch.from_numpy(waveforms)
        self._give_back = give_back

    def tensor(self, n_clips: int) -> Float32[Tensor, "batch sample"]:
        """The first `n_clips`, in the same memory."""
        return self._tensor[:n_clips]

    def release(self) -> None:
        """Lets another batch have the memory, which nobody may be reading or writing."""
        self._give_back(self)


class SlotRing:
    """As many slots as there are: whoever decodes waits until the encoder has let go of one.

    Pages are locked for the copy engine of a `device` that has one. `shares` makes them visible to
    other processes of this user, by `path`.
    """

    def __init__(
        self, n_slots: int, *, batch_size: int, n_samples: int, device: str, shares: bool
    ) -> None:
        self.shape = (n_slots, batch_size, n_samples)
        self.n_bytes = 4 * n_slots * batch_size * n_samples
        self._descriptor = _shared_memory(self.n_bytes) if shares else None
        if self._descriptor is None:
            waveforms = aligned_memory(self.n_bytes).view(np.float32).reshape(self.shape)
        else:
            waveforms = _mapped(self._descriptor, self.shape)
        self._unpin = _pinned(waveforms, device) if device.startswith("cuda") else None
        self._free = deque(WaveformSlot(i, waveforms[i], self._put) for i in range(n_slots))
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def path(self) -> str | None:
        """What another process can map; None where the memory is this process's own."""
        return None if self._descriptor is None else f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def n_free(self) -> int:
        return len(self._free)

    def take(self, *, waits: bool) -> WaveformSlot | None:
        """A free slot; None where there is none and nobody `waits`. `CancelledError` once the ring
        has been stopped."""
        with self._changed:
            if waits:
                self._changed.wait_for(lambda: self._free or self._is_closed)
            if self._is_closed:
                raise CancelledError
            return self._free.popleft() if self._free else None

    def _put(self, slot: WaveformSlot) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify()

    def stop(self) -> None:
        """Nobody gets a slot any more, and whoever waits for one learns it."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Frees the memory with the last slot that is held; no copy from it may be under way."""
        self.stop()
        if self._unpin is not None:
            self._unpin()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._free.clear()
        self._descriptor = self._unpin = None


def map_slots(path: str, shape: tuple[int, int, int]) -> Float32[np.ndarray, "slot batch sample"]:
    """The memory of another process's ring; raises `OSError` where that process is gone."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return _mapped(descriptor, shape)
    finally:
        os.close(descriptor)


def _mapped(
    descriptor: int, shape: tuple[int, int, int]
) -> Float32[np.ndarray, "slot batch sample"]:
    memory = mmap.mmap(descriptor, 4 * math.prod(shape))
    return np.frombuffer(memory, np.float32).reshape(shape)


def _shared_memory(n_bytes: int) -> int:
    """A descriptor of memory that has a path; not /dev/shm, of which containers get 64 MiB."""
    if not hasattr(os, "memfd_create"):
        raise PatchbankError(
            "decoding in processes needs Linux, found another system; use --decode-in threads"
        )
    descriptor = os.memfd_create("patchbank-waveforms")
    # Memory that is not there has to show here: at the first touch it would kill the process.
    os.posix_fallocate(descriptor, 0, n_bytes)
    return descriptor


def _pinned(
    waveforms: Float32[np.ndarray, "slot batch sample"], device: str
) -> Callable[[], None] | None:
    """Locks the pages for all GPUs, and says how to let go of them; None where that failed.

    A copy from other pages is slower, and no less right.
    """
    runtime, address = torch.cuda.cudart(), waveforms.ctypes.data
    with torch.cuda.device(device):
        failed = int(runtime.cudaHostRegister(address, waveforms.nbytes, HOST_REGISTER_PORTABLE))
    if failed:
        return None
    return lambda: runtime.cudaHostUnregister(address)
