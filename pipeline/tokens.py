"""From an encoder's output to what a bank stores: checks, cast or codes, pooled vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int8, Shaped
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


@dataclass(frozen=True)
class PackedTokens:
    """Tokens of a batch in the stored type, where they were computed; asking waits for nothing."""

    stored: StoredType
    tokens: Shaped[Tensor, "batch token width"]
    """Bit patterns where NumPy lacks the type: bfloat16 as int16."""
    pooled: Float32[Tensor, "batch pool dim"]
    n_bad: Int[Tensor, "batch reason"]
    """Values that are NaN or infinite, beyond the type's range, and 1 where all are zero."""
    scale: Float[Tensor, "batch token"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the fields, those that there are."""
        found = {"tokens": self.tokens, "pooled": self.pooled, "n_bad": self.n_bad}
        return found if self.scale is None else found | {"scale": self.scale}

    def on_cpu(self) -> StoredTokens:
        """The same on the CPU, which waits for the device where it has to."""
        return StoredTokens(
            self.tokens.cpu().numpy().view(self.stored.dtype),
            self.pooled.cpu().numpy(),
            tuple(_reason(*counts, dtype=self.stored.name) for counts in self.n_bad.tolist()),
            None if self.scale is None else self.scale.cpu().numpy(),
        )


class DeviceConstants:
    """The constants of a quantised layer on a device."""

    def __init__(self, constants: ChannelConstants, device: torch.device | str) -> None:
        self.shift = torch.from_numpy(constants.shift).to(device)
        self.scale = torch.from_numpy(constants.scale).to(device)
        rotation = constants.rotation
        self.rotation = None if rotation is None else torch.from_numpy(rotation).to(device)


def store_tokens(
    tokens: Float[Tensor, "batch token dim"],
    *,
    stored: StoredType,
    n_counted: Int[Tensor, " batch"],
    constants: ChannelConstants | None = None,
) -> StoredTokens:
    """`pack_tokens`, brought to the CPU."""
    there = None if constants is None else DeviceConstants(constants, tokens.device)
    return pack_tokens(tokens, stored=stored, n_counted=n_counted, constants=there).on_cpu()


def pack_tokens(
    tokens: Float[Tensor, "batch token dim"],
    *,
    stored: StoredType,
    n_counted: Int[Tensor, " batch"],
    constants: DeviceConstants | None = None,
) -> PackedTokens:
    """Checks a batch of tokens, brings it into `stored` and pools the first `n_counted` of each.

    NaN, infinities, values beyond the type's range and all-zero clips are failures. `constants` are
    those of a quantised type, on the tokens' device; `n_counted` is on the CPU.
    """
    if stored.is_quantised:
        assert constants is not None
        return _pack_codes(tokens.float(), stored, n_counted, constants)
    # How a sum is rounded depends on strides, which a mask would change.
    cast = tokens.to(FLOAT_DTYPES[stored.name]).contiguous()
    values = cast.float()
    # A clip that vanishes in the stored type is as lost as one that was silent in the encoder.
    n_bad = _count_bad(tokens, values, values)
    cast = _fill_bad(cast, n_bad, torch.nan)
    pooled = _fill_bad(_pool(values, n_counted), n_bad, torch.nan)
    bits = cast.view(torch.int16) if stored.name == "bfloat16" else cast
    return PackedTokens(stored, bits, pooled, n_bad)


def _pack_codes(
    tokens: Float32[Tensor, "batch token dim"],
    stored: StoredType,
    n_counted: Int[Tensor, " batch"],
    constants: DeviceConstants,
) -> PackedTokens:
    even = (tokens - constants.shift) / constants.scale
    if constants.rotation is not None:
        even = rotate(even, constants.rotation.T)
    codes, scale = quantise(even, code_max=stored.code_max)
    n_bad = _count_bad(tokens, scale[:, :, None], tokens)
    values = codes.float() * scale.float()[:, :, None]
    if constants.rotation is not None:
        values = rotate(values, constants.rotation)
    values = (values * constants.scale + constants.shift).contiguous()
    pooled = _fill_bad(_pool(values, n_counted), n_bad, torch.nan)
    codes = _fill_bad(codes, n_bad, -stored.code_max - 1)
    scale = _fill_bad(scale, n_bad, torch.nan)
    return PackedTokens(stored, _packed(codes, stored), pooled, n_bad, scale)


def _fill_bad(
    values: Shaped[Tensor, "batch ..."], n_bad: Int[Tensor, "batch reason"], fill: float
) -> Shaped[Tensor, "batch ..."]:
    """`fill` for all values of clips that have bad ones."""
    bad = n_bad.amax(1) > 0
    if values.device.type == "cpu" and not bool(bad.any()):
        return values
    return values.masked_fill(bad.reshape(-1, *(1 for _ in values.shape[1:])), fill)


def _packed(
    codes: Int8[Tensor, "batch token dim"], stored: StoredType
) -> Shaped[Tensor, "batch token width"]:
    """`StoredType.from_codes` on any device."""
    if stored.n_packed == 1:
        return codes
    shifted = (codes + stored.code_max + 1).to(torch.uint8)
    return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


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
    # A token without a scale is all zeros or lost; `where` over channels takes ten times as long.
    step = torch.where(stored > 0, stored.float(), torch.inf)[:, :, None]
    codes = (tokens / step).round()
    return codes.clamp(-code_max, code_max).to(torch.int8), stored


def _squared_error(
    tokens: Float32[Tensor, "batch token dim"],
    codes: Int8[Tensor, "batch token dim"],
    scale: Float[Tensor, "batch token"],
) -> Float32[Tensor, "batch token"]:
    return (codes.float() * scale.float()[:, :, None] - tokens).square().sum(2)


def _count_bad(
    tokens: Float[Tensor, "batch token dim"],
    cast: Float[Tensor, "batch token #dim"],
    zero: Float[Tensor, "batch token dim"],
) -> Int[Tensor, "batch reason"]:
    """Values that are not finite, that are finite but not in `cast`, and 1 where `zero` is.

    On a CPU the extremes are looked at first: they tell that all is well in one pass.
    """
    if tokens.device.type == "cpu" and _are_plain(cast) and bool(zero.flatten(1).any(1).all()):
        return torch.zeros(len(tokens), 3, dtype=torch.int64)
    finite = torch.isfinite(tokens)
    n_not_finite = (~finite).flatten(1).sum(1)
    n_overflow = (finite & ~torch.isfinite(cast)).flatten(1).sum(1)
    all_zero = (zero == 0).flatten(1).all(1)
    return torch.stack([n_not_finite, n_overflow, all_zero.long()], 1)


def _are_plain(cast: Float[Tensor, "batch token dim"]) -> bool:
    lowest, highest = torch.aminmax(cast)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _reason(n_not_finite: int, n_overflow: int, is_zero: int, *, dtype: str) -> str | None:
    if n_not_finite:
        return f"{n_not_finite} token values are NaN or infinite"
    if n_overflow:
        return f"{n_overflow} token values are beyond the range of {dtype}"
    return "all token values are zero" if is_zero else None


def _pool(
    tokens: Float32[Tensor, "batch token dim"], n_counted: Int[Tensor, " batch"]
) -> Float32[Tensor, "batch pool dim"]:
    if bool((n_counted >= tokens.shape[1]).all()):
        mean = tokens.sum(1) / tokens.shape[1]
        return torch.stack([mean, tokens.amax(1), tokens.amin(1)], 1)
    if tokens.is_cuda:
        n_counted = n_counted.pin_memory()
    n_counted = n_counted.to(tokens.device, non_blocking=True)
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
