"""Seeds that are derived from a purpose, so that no two uses share a stream by accident."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed that `purpose` and `numbers` alone decide, the same on every machine."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on `device`, seeded by `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(purpose, *numbers))
