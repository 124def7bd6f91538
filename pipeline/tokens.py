"""From an encoder's output to what a bank stores: checks, cast, pooled vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from patchbank.pipeline.specs import Grid

TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of a batch in the stored dtype, on the CPU."""

    tokens: Float[np.ndarray, "batch token dim"]
    pooled: Float32[np.ndarray, "batch pool dim"]
    """Mean, maximum, minimum over the tokens that count, of the stored values, in float32."""
    failures: tuple[str | None, ...]
    """Why a clip's tokens cannot be stored; its values are then NaN."""


def store_tokens(
    tokens: Float[Tensor, "batch token dim"], *, dtype: str, n_counted: Int[Tensor, " batch"]
) -> StoredTokens:
    """Checks a batch of tokens, casts it to `dtype` and pools the first `n_counted` of each clip.

    NaN, infinities, values beyond the dtype's range and all-zero clips are failures.
    """
    stored = tokens.to(TORCH_DTYPES[dtype])
    failures = _failures(tokens, stored, dtype=dtype)
    bad = torch.tensor([failure is not None for failure in failures], device=tokens.device)
    stored[bad] = torch.nan
    pooled = _pool(stored.float(), n_counted.to(tokens.device))
    return StoredTokens(stored.cpu().numpy(), pooled.cpu().numpy(), failures)


def _failures(
    tokens: Float[Tensor, "batch token dim"],
    stored: Float[Tensor, "batch token dim"],
    *,
    dtype: str,
) -> tuple[str | None, ...]:
    not_finite = _count(~torch.isfinite(tokens))
    overflow = _count(torch.isfinite(tokens) & ~torch.isfinite(stored))
    zero = (stored == 0).flatten(1).all(1).tolist()
    return tuple(
        _reason(not_finite[i], overflow[i], zero[i], dtype=dtype) for i in range(len(tokens))
    )


def _count(flags: Bool[Tensor, "batch token dim"]) -> list[int]:
    counts: list[int] = flags.flatten(1).sum(1).tolist()
    return counts


def _reason(n_not_finite: int, n_overflow: int, all_zero: bool, *, dtype: str) -> str | None:
    if n_not_finite:
        return f"{n_not_finite} token values are NaN or infinite"
    if n_overflow:
        return f"{n_overflow} token values are beyond the range of {dtype}"
    return "all token values are zero" if all_zero else None


def _pool(
    tokens: Float32[Tensor, "batch token dim"], n_counted: Int[Tensor, " batch"]
) -> Float32[Tensor, "batch pool dim"]:
    beyond = torch.arange(tokens.shape[1], device=tokens.device) >= n_counted[:, None]
    beyond = beyond[:, :, None]
    mean = tokens.masked_fill(beyond, 0).sum(1) / n_counted[:, None]
    highest = tokens.masked_fill(beyond, -torch.inf).amax(1)
    lowest = tokens.masked_fill(beyond, torch.inf).amin(1)
    return torch.stack([mean, highest, lowest], 1)


def counted_patches(grid: Grid, *, n_audio_samples: int, n_samples: int, mask_padding: bool) -> int:
    """Patches of a clip that count: all, or with `mask_padding` those whose time holds audio.

    Tokens are time-major, so these are the first ones.
    """
    if not mask_padding:
        return grid.n_patches
    time = -(-grid.time * min(n_audio_samples, n_samples) // n_samples)
    return max(1, time) * grid.freq
