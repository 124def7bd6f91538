"""What an extraction runs on: tokens agree to the last bit only where this is the same."""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from importlib.metadata import version

import torch

from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import ComputeDType, Json

BFLOAT16_CAPABILITY = (8, 0)
"""NVIDIA's compute capability from which on bfloat16 is no emulation."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
KEPT_BYTES = 2**30
PACKAGES = ("patchbank", "torch", "torchaudio", "zarr", "numpy")


def choose_device(device: str) -> str:
    """`device`, with "auto" resolved; `EncoderError` where it is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise EncoderError(f"no device {device!r} here ({reason}); use --device cpu") from error
    return device


def is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def default_compute_dtype(device: str) -> ComputeDType:
    """What an encoder computes in where nobody says: bfloat16 on a GPU that has it."""
    # A GPU that is named has been looked for, and is not touched before its worker does.
    kind = torch.device(choose_device(device) if device == "auto" else device)
    if kind.type == "cuda" and torch.cuda.get_device_capability(kind) >= BFLOAT16_CAPABILITY:
        return "bfloat16"
    return "float32"


def compute_alone() -> None:
    """Has the calling thread do its sums alone.

    Threads that each compute a batch of their own never wait for each other; two that share every
    product wait at each for the slower one, which on busy cores takes ten times as long.
    """
    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Has malloc keep what tensors gave back, for the next ones: for processes of our own.

    It would return large tensors to the system, which hands out every page anew: up to a tenth of
    an encoder's time on a CPU. Only glibc can be told.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def environment(device: str) -> Json:
    """Device without index, its name, versions, and on a CPU the threads that share a sum: one."""
    kind = device.split(":")[0]
    more: Json = {"threads": 1} if kind == "cpu" else {}
    if kind == "cuda":
        more = {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda)}
    return {
        "device": kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        **more,
    }
