"""Tokens made from a seed, to try a probe on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator

PATCHES = 12
"""Where no grid says how many."""


def made_tokens(
    shape: ProbeShape,
    *,
    n_clips: int = 3,
    seed: int = 0,
    n_patches: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    """Seeded normal tokens of `n_clips`, in as many layers and with the prefix that `shape` has."""
    random = generator("made tokens", seed)
    time, freq = shape.grid or (PATCHES, 1)

    def drawn(n_tokens: int) -> torch.Tensor:
        size = (n_clips, n_tokens, shape.dim)
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    counts = None if n_patches is None else torch.tensor(n_patches)
    layers: list[Tokens] = []
    for _ in range(shape.n_layers):
        patches = drawn(time * freq)
        prefix = drawn(shape.n_prefix) if shape.n_prefix else None
        layers.append(Tokens(patches, prefix, counts, others=tuple(layers)))
    return layers[-1]
