"""From an encoder's output to what a bank stores: checks, cast or codes, pooled vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int8, Shaped
from torch import Tensor

from patchbank.pipeline.bank.dtypes import StoredType
from patchbank.pipeline.bank.quantised import ChannelConstants
from patchbank.pipeline.encoders.base import Encoder, PadsClips
from patchbank.pipeline.specs import Grid

FLOAT_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
COARSE_CODE_MAX = 7
CLIP_FACTORS = (0.9, 0.8, 0.7, 0.6)
"""Of the scale that holds a token's largest channel, for types with few codes."""


@dataclass(frozen=True)
class StoredTokens:
    """Tokens of a batch in the stored type, on the CPU."""

    tokens: Shaped[np.ndarray, "batch token width"]
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
    even = (tokens - shift) / channel_scale
    rotation = None
    if constants.rotation is not None:
        rotation = torch.from_numpy(constants.rotation).to(tokens.device)
        even = rotate(even, rotation.T)
    codes, scale = quantise(even, code_max=stored.code_max)
    lost = ~torch.isfinite(scale)[:, :, None]
    failures = _failures(tokens, lost, tokens == 0, dtype=stored.name)
    bad = _flags(failures, tokens.device)
    scale[bad] = torch.nan
    values = codes.float() * scale.float()[:, :, None]
    if rotation is not None:
        values = rotate(values, rotation)
    values = values * channel_scale + shift
    codes[bad] = -stored.code_max - 1
    pooled = _pool(values, n_counted.to(tokens.device))
    return StoredTokens(
        stored.from_codes(codes.cpu().numpy()),
        pooled.cpu().numpy(),
        failures,
        scale.cpu().numpy(),
    )


def rotate(
    tokens: Float32[Tensor, "batch token dim"], matrix: Float32[Tensor, "block block"]
) -> Float32[Tensor, "batch token dim"]:
    """Each block of channels times `matrix`."""
    blocks: Tensor = tokens.unflatten(2, (-1, len(matrix)))
    return torch.matmul(blocks, matrix).flatten(2)


def quantise(
    tokens: Float32[Tensor, "batch token dim"], *, code_max: int
) -> tuple[Int8[Tensor, "batch token dim"], Float[Tensor, "batch token"]]:
    """Codes up to `code_max` of tokens whose channels have one size, and each token's scale.

    With few codes, a smaller scale that cuts the largest channels may err less over all: of some,
    the best for each token is taken.
    """
    largest = tokens.abs().amax(2) / code_max
    best_codes, best_scale = _rounded(tokens, largest, code_max)
    if code_max > COARSE_CODE_MAX:
        return best_codes, best_scale
    best_error = _squared_error(tokens, best_codes, best_scale)
    for factor in CLIP_FACTORS:
        codes, scale = _rounded(tokens, factor * largest, code_max)
        error = _squared_error(tokens, codes, scale)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better[:, :, None], codes, best_codes)
    return best_codes, best_scale


def _rounded(
    tokens: Float32[Tensor, "batch token dim"],
    scale: Float32[Tensor, "batch token"],
    code_max: int,
) -> tuple[Int8[Tensor, "batch token dim"], Float[Tensor, "batch token"]]:
    # Rounded first: the codes have to fit the scale that is stored.
    stored = scale.half()
    step = stored.float()[:, :, None]
    codes = torch.where(step > 0, tokens / step, 0.0).round()
    return codes.clamp(-code_max, code_max).to(torch.int8), stored


def _squared_error(
    tokens: Float32[Tensor, "batch token dim"],
    codes: Int8[Tensor, "batch token dim"],
    scale: Float[Tensor, "batch token"],
) -> Float32[Tensor, "batch token"]:
    return (codes.float() * scale.float()[:, :, None] - tokens).square().sum(2)


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


def counted_patches(
    encoder: Encoder, grid: Grid, *, n_audio_samples: int, n_samples: int, mask_padding: bool
) -> int:
    """Patches of a clip that count: all, or with `mask_padding` those whose time holds audio.

    Tokens are time-major, so these are the first ones. An encoder that pads clips by itself says
    how many (`audio_times`); of others the grid spans the clip.
    """
    if not mask_padding:
        return grid.n_patches
    n_audio_samples = min(n_audio_samples, n_samples)
    if isinstance(encoder, PadsClips):
        time = encoder.audio_times(n_audio_samples)
    else:
        time = -(-grid.time * n_audio_samples // n_samples)
    return min(max(1, time), grid.time) * grid.freq
