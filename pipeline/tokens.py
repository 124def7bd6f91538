"""From an encoder's output to what a bank stores: checks, cast or codes, pooled vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int8, Shaped
from torch import Tensor

from patchbank.pipeline.bank.dtypes import StoredType
from patchbank.pipeline.bank.quantised import CODE_MAX, ChannelConstants
from patchbank.pipeline.specs import Grid

FLOAT_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of a batch in the stored type, on the CPU."""

    tokens: Shaped[np.ndarray, "batch token dim"]
    pooled: Float32[np.ndarray, "batch pool dim"]
    """Mean, maximum, minimum over the tokens that count, of the stored values, in float32."""
    failures: tuple[str | None, ...]
    """Why a clip's tokens cannot be stored; its values are then the type's fill."""
    scale: Float[np.ndarray, "batch token"] | None = None
    """float16, of quantised tokens; NaN where a clip failed."""


def store_tokens(
    tokens: Float[Tensor, "batch token dim"],
    *,
    stored: StoredType,
    n_counted: Int[Tensor, " batch"],
    constants: ChannelConstants | None = None,
) -> StoredTokens:
    """Checks a batch of tokens, brings it into `stored` and pools the first `n_counted` of each.

    NaN, infinities, values beyond the type's range and all-zero clips are failures. `constants` are
    those of a quantised type.
    """
    if stored.is_quantised:
        assert constants is not None
        return _store_codes(tokens.float(), stored, n_counted, constants)
    cast = tokens.to(FLOAT_DTYPES[stored.name])
    # A clip that vanishes in the stored type is as lost as one that was silent in the encoder.
    failures = _failures(tokens, ~torch.isfinite(cast), cast == 0, dtype=stored.name)
    bad = _flags(failures, tokens.device)
    cast[bad] = torch.nan
    pooled = _pool(cast.float(), n_counted.to(tokens.device))
    if stored.name == "bfloat16":
        # NumPy has no bfloat16: its bits.
        codes = cast.view(torch.int16).cpu().numpy().view("<u2")
        return StoredTokens(codes, pooled.cpu().numpy(), failures)
    return StoredTokens(cast.cpu().numpy(), pooled.cpu().numpy(), failures)


def _store_codes(
    tokens: Float32[Tensor, "batch token dim"],
    stored: StoredType,
    n_counted: Int[Tensor, " batch"],
    constants: ChannelConstants,
) -> StoredTokens:
    shift = torch.from_numpy(constants.shift).to(tokens.device)
    channel_scale = torch.from_numpy(constants.scale).to(tokens.device)
    codes, scale = quantise((tokens - shift) / channel_scale)
    lost = ~torch.isfinite(scale)[:, :, None]
    failures = _failures(tokens, lost, tokens == 0, dtype=stored.name)
    bad = _flags(failures, tokens.device)
    codes[bad] = int(stored.fill)
    scale[bad] = torch.nan
    values = codes.float() * scale.float()[:, :, None] * channel_scale + shift
    pooled = _pool(values, n_counted.to(tokens.device))
    return StoredTokens(codes.cpu().numpy(), pooled.cpu().numpy(), failures, scale.cpu().numpy())


def quantise(
    tokens: Float32[Tensor, "batch token dim"],
) -> tuple[Int8[Tensor, "batch token dim"], Float[Tensor, "batch token"]]:
    """Codes in [-127, 127] of tokens whose channels have one size, and each token's scale."""
    # Rounded first: the codes have to fit the scale that is stored.
    scale = (tokens.abs().amax(2) / CODE_MAX).half()
    step = scale.float()[:, :, None]
    codes = torch.where(step > 0, tokens / step, 0.0).round()
    return codes.clamp(-CODE_MAX, CODE_MAX).to(torch.int8), scale


def _flags(failures: tuple[str | None, ...], device: torch.device) -> Bool[Tensor, " batch"]:
    return torch.tensor([failure is not None for failure in failures], device=device)


def _failures(
    tokens: Float[Tensor, "batch token dim"],
    lost: Bool[Tensor, "batch token #dim"],
    zero: Bool[Tensor, "batch token dim"],
    *,
    dtype: str,
) -> tuple[str | None, ...]:
    """Why clips cannot be stored; `lost` marks values that the stored type cannot hold."""
    finite = torch.isfinite(tokens)
    not_finite = _count(~finite)
    overflow = _count(finite & lost)
    all_zero = zero.flatten(1).all(1).tolist()
    return tuple(
        _reason(not_finite[i], overflow[i], all_zero[i], dtype=dtype) for i in range(len(tokens))
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
