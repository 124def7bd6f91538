"""Quantised tokens become floats, on the device where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from patchbank.pipeline.bank.dtypes import StoredType
from patchbank.pipeline.bank.quantised import ChannelConstants
from patchbank.probing.batch import CodeFactors

CACHED_VALUES = 2**19
"""Floats that stay in a processor's cache from one step to the next."""


class Dequantiser:
    """`ChannelConstants.dequantise`, for tokens on one device."""

    def __init__(
        self, constants: ChannelConstants, stored: StoredType, device: torch.device
    ) -> None:
        self._stored = stored
        self._shift = torch.from_numpy(constants.shift).to(device)
        self._channel_scale = torch.from_numpy(constants.scale).to(device)
        self._rotation = (
            None if constants.rotation is None else torch.from_numpy(constants.rotation).to(device)
        )
        self._out = torch.empty(0, device=device)

    @property
    def n_bytes(self) -> int:
        """Memory for floats, once they have been asked for."""
        return self._out.nbytes

    @property
    def dim(self) -> int:
        return len(self._shift)

    def factors(self, scale: Float[Tensor, "clip patch"]) -> CodeFactors | None:
        """See `batch.Quantised.factors`."""
        if self._rotation is not None or self._stored.n_packed > 1:
            return None
        return CodeFactors(scale, self._channel_scale, self._shift)

    def all(
        self, raw: Shaped[Tensor, "clip patch width"], scale: Float[Tensor, "clip patch"]
    ) -> Float[Tensor, "clip patch dim"]:
        """Into memory that the next call overwrites."""
        shape = (*raw.shape[:2], self.dim)
        if len(self._out) < len(raw) or self._out.shape[1:] != shape[1:]:
            with torch.inference_mode(False):  # it is written to again outside of that mode
                self._out = torch.empty(shape, device=raw.device)
        out = self._out[: len(raw)]
        size = len(raw) if raw.is_cuda else max(1, CACHED_VALUES // out[:1].numel())
        for parts in zip(raw.split(size), scale.split(size), out.split(size), strict=True):
            self._dequantise(*parts)
        return out

    def write(
        self,
        raw: Shaped[Tensor, "clip patch width"],
        scale: Float[Tensor, "clip patch"],
        out: Float[Tensor, "clip patch dim"],
    ) -> None:
        """Into `out`, in its type and on its device."""
        if (out.dtype, out.device) == (torch.float32, raw.device):
            self._dequantise(raw, scale, out)
            return
        floats = torch.empty(out.shape, device=raw.device)
        self._dequantise(raw, scale, floats)
        out.copy_(floats)

    def _dequantise(self, raw: Tensor, scale: Tensor, out: Tensor) -> None:
        # Widened first: a product of integers and floats takes five times as long on a CPU.
        out.copy_(_codes(raw, self._stored))
        out.mul_(scale.float()[:, :, None])
        if self._rotation is not None:
            blocks = out.unflatten(2, (-1, len(self._rotation)))
            out.copy_((blocks @ self._rotation).flatten(2))
        torch.addcmul(self._shift, out, self._channel_scale, out=out)


@dataclass(frozen=True)
class QuantisedTokens:
    """The scales of one batch, and what makes floats of its codes; see `batch.Quantised`."""

    dequantiser: Dequantiser
    scale: Float[Tensor, "clip patch"]

    @property
    def dim(self) -> int:
        return self.dequantiser.dim

    @property
    def factors(self) -> CodeFactors | None:
        return self.dequantiser.factors(self.scale)

    def all(self, raw: Shaped[Tensor, "clip patch width"]) -> Float[Tensor, "clip patch dim"]:
        return self.dequantiser.all(raw, self.scale)

    def write(
        self,
        raw: Shaped[Tensor, "clip patch width"],
        clips: slice,
        out: Float[Tensor, "clip patch dim"],
    ) -> None:
        self.dequantiser.write(raw, self.scale[clips], out)


def _codes(raw: Shaped[Tensor, "clip patch width"], stored: StoredType) -> Tensor:
    """`StoredType.to_codes` of a tensor."""
    if stored.n_packed == 1:
        return raw
    halves = torch.stack([raw & 15, raw >> 4], dim=-1)
    return halves.flatten(2).to(torch.int8) - 8
