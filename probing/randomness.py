"""Seeds that are derived from a purpose, so that no two uses share a stream by accident."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that `purpose` and `numbers` alone decide, the same on every machine."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded by `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(purpose, *numbers))


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """torch's global generators (of the CPU, and of `device`) seeded; afterwards as before."""
    # Not torch.manual_seed, which seeds every GPU too.
    gpus: Sequence[int] = ()
    if device is not None and device.type == "cuda":
        gpus = [device.index if device.index is not None else torch.cuda.current_device()]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for index in gpus:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield
