"""Stored tokens become floats: codes are widened, quantised tokens get their scales back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from patchbank.pipeline.bank.reader import Bank

Decode = Callable[
    [Shaped[np.ndarray, "clip token dim"], Int[np.ndarray, " clip"]],
    Float[Tensor, "clip token dim"],
]


def decoder(bank: Bank, layer: int) -> Decode:
    """What turns stored patches of some rows into floats; the result may share their memory."""
    if not bank.schema.stored.is_quantised:
        return lambda tokens, rows: float_tensor(tokens)
    return Dequantiser(bank, layer)


def float_tensor(tokens: Shaped[np.ndarray, "clip token dim"]) -> Float[Tensor, "clip token dim"]:
    """Stored floats as a tensor over the same memory; 16-bit integers are bits of bfloat16."""
    tensor = torch.from_numpy(tokens)
    return tensor.view(torch.bfloat16) if tokens.dtype == np.uint16 else tensor


class Dequantiser:
    """`ChannelConstants.dequantise`, into memory that the next call overwrites.

    The scales of all rows are held in memory: two bytes a token.
    """

    def __init__(self, bank: Bank, layer: int) -> None:
        constants, self._stored = bank.constants(layer), bank.schema.stored
        self._rotation = (
            None if constants.rotation is None else torch.from_numpy(constants.rotation)
        )
        self._shift = torch.from_numpy(constants.shift)
        self._channel_scale = torch.from_numpy(constants.scale)
        self._scale = torch.from_numpy(bank.scale(layer))
        self._slot: Tensor | None = None

    def __call__(
        self, stored: Shaped[np.ndarray, "clip token width"], rows: Int[np.ndarray, " clip"]
    ) -> Float[Tensor, "clip token dim"]:
        codes = self._stored.to_codes(stored)
        out = self._slot_for(codes.shape)
        scale = self._scale[torch.from_numpy(rows.astype(np.int64))].float()
        torch.mul(torch.from_numpy(codes), scale[:, :, None], out=out)
        if self._rotation is not None:
            blocks = out.unflatten(2, (-1, len(self._rotation)))
            out.copy_((blocks @ self._rotation).flatten(2))
        torch.addcmul(self._shift, out, self._channel_scale, out=out)
        return out

    def _slot_for(self, shape: tuple[int, ...]) -> Tensor:
        if self._slot is None or len(self._slot) < shape[0]:
            self._slot = torch.empty(shape)
        return self._slot[: shape[0]]
