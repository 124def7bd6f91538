"""Layers of one batch, mixed with one trial's weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.tokens import Tokens


def layers_to_mix(tokens: Tokens, n_layers: int) -> tuple[Tokens, ...]:
    """The layers of a batch; `TrialError` where they are other ones than the probe's, or differ."""
    layers = tokens.layers
    if len(layers) != n_layers:
        raise TrialError(
            f"found {len(layers)} layers in the batch, expected the {n_layers} that the probe "
            "mixes; read the same layers as in training"
        )
    for kind in ("patches", "prefix"):
        shapes = [_shape(layer, kind) for layer in layers]
        for position, shape in enumerate(shapes, start=1):
            if shape != shapes[-1]:
                raise TrialError(
                    f"found {kind} {shape} in layer {position} of {n_layers} and {shapes[-1]} in "
                    "the last, expected layers of one shape, which a mix needs; pass layers that "
                    "agree: --layer"
                )
    return layers


def _shape(layer: Tokens, kind: str) -> tuple[int, ...] | None:
    """(patch, dim), or (prefix, dim) where there are prefix tokens."""
    if kind == "patches":
        return tuple(layer.shape[1:])
    return None if layer.prefix is None else tuple(layer.prefix.shape[1:])


def mix(
    shares: Float[Tensor, " layer"], arrays: Sequence[Float[Tensor, "clip ..."]]
) -> Float[Tensor, "clip ..."]:
    """sum_l share_l array_l, in one new array; the gradient goes to the shares alone."""
    mixed: Tensor = _Mix.apply(shares, *arrays)  # type: ignore[no-untyped-call]
    return mixed


class _Mix(torch.autograd.Function):
    """Not written with sums and products: those would keep or make an array for each layer."""

    @staticmethod
    def forward(ctx: Any, shares: Tensor, *arrays: Tensor) -> Tensor:
        ctx.save_for_backward(*arrays)
        mixed = arrays[0] * shares[0]
        for share, array in zip(shares[1:], arrays[1:], strict=True):
            mixed.addcmul_(array, share)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        arrays = ctx.saved_tensors
        row = gradient.reshape(len(gradient), 1, -1)
        # A dot product for each clip, then their sum: one over all would round more.
        dots = [torch.bmm(row, array.reshape(len(array), -1, 1)).sum() for array in arrays]
        return torch.stack(dots), *[None] * len(arrays)


class MixedTokens(Tokens):
    """What a probe of one layer sees: a mix of layers, made as far as the probe asks for it.

    Mixed patches are new memory of the size of a layer, and the floats of every layer are kept
    until the next batch.
    """

    def __init__(self, layers: Sequence[Tokens], shares: Float[Tensor, " layer"]) -> None:
        last = layers[-1]
        prefixes = [layer.prefix for layer in layers if layer.prefix is not None]
        prefix = mix(shares, prefixes) if prefixes else None
        super().__init__(last._stored, prefix, last.n_patches, dtype=last.dtype, device=last.device)
        self.__dict__.pop("patches", None)
        self._sources, self._shares = tuple(layers), shares

    @cached_property
    def patches(self) -> Float[Tensor, "clip patch dim"]:
        """The mixed patches."""
        return mix(self._shares, [layer.patches for layer in self._sources])

    @cached_property
    def mean(self) -> Float[Tensor, "clip dim"]:
        """The mix of the layers' means, which needs no mixed patch."""
        return mix(self._shares, [layer.mean for layer in self._sources])

    @cached_property
    def directions(self) -> Float[Tensor, "clip patch dim"]:
        """Mixed patches of length one."""
        norm: Tensor = torch.linalg.vector_norm(self.patches, dim=-1, keepdim=True)
        return self.patches / norm.clamp(min=1e-12)
