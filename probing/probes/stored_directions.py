"""Directions of tokens that stay as they are stored: what to multiply a product with codes by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from patchbank.probing.batch import CodeFactors, LayerTokens

NORM_CLIPS = 8
"""Clips that are floats at one time, while the lengths of quantised tokens are measured."""


@dataclass(frozen=True, eq=False)
class StoredDirections:
    """Direction n = factor_n x raw_n x channel_scale + offset_factor_n x channel_shift.

    So its product with a prototype w is factor_n (raw_n . (w x channel_scale)) +
    offset_factor_n (w . channel_shift), and the tokens need not become floats first. The last two
    and `channel_scale` are None for tokens that are stored as floats.
    """

    raw: Shaped[Tensor, "clip patch dim"]
    """Float16, bfloat16, float32, or int8 codes."""
    factor: Float[Tensor, "clip patch"]
    counts: Int[Tensor, " clip"]
    """Patches that count, the first of each clip."""
    channel_scale: Float[Tensor, " dim"] | None = None
    """At most 1, so that prototypes times it fit into float16."""
    channel_shift: Float[Tensor, " dim"] | None = None
    offset_factor: Float[Tensor, "clip patch"] | None = None


def directions_of_floats(
    patches: Float[Tensor, "clip patch dim"], n_patches: Int[Tensor, " clip"] | None
) -> StoredDirections:
    """Of tokens in any float type."""
    lengths = torch.linalg.vector_norm(patches, dim=-1, dtype=torch.float32)
    factor = lengths.clamp(min=1e-12).reciprocal()
    return StoredDirections(patches.contiguous(), factor, _counts(patches, n_patches))


def directions_of_codes(
    stored: LayerTokens, factors: CodeFactors, n_patches: Int[Tensor, " clip"] | None
) -> StoredDirections:
    """Of int8 codes; floats of a few clips at a time give the lengths."""
    assert stored.raw is not None
    n_clips = len(stored.raw)
    lengths = []
    for first in range(0, n_clips, NORM_CLIPS):
        clips = slice(first, min(first + NORM_CLIPS, n_clips))
        floats = torch.empty(stored.raw[clips].shape, device=stored.raw.device)
        stored.write(floats, clips)
        lengths.append(torch.linalg.vector_norm(floats, dim=-1))
    inverse = torch.cat(lengths).clamp(min=1e-12).reciprocal()
    largest = factors.channel_scale.max()
    return StoredDirections(
        stored.raw.contiguous(),
        factors.scale.float() * inverse * largest,
        _counts(stored.raw, n_patches),
        factors.channel_scale / largest,
        factors.channel_shift,
        inverse,
    )


@cache
def why_no_kernel() -> str | None:
    """Why prototypes meet a GPU's tokens in plain torch; None where their own kernel works.

    Found out once, by compiling and launching a small one: triton may be missing or broken, or
    lack a C compiler.
    """
    try:
        from patchbank.probing.probes.best_match_triton import try_kernel

        try_kernel()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _counts(
    raw: Shaped[Tensor, "clip patch dim"], n_patches: Int[Tensor, " clip"] | None
) -> Int[Tensor, " clip"]:
    if n_patches is not None:
        return n_patches.to(raw.device, torch.int32)
    return torch.full((len(raw),), raw.shape[1], dtype=torch.int32, device=raw.device)
