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


def layers_to_mix(tokens: Tokens, n_layers: int, *, uses_prefix: bool) -> tuple[Tokens, ...]:
    """The layers of a batch; `TrialError` where they are other ones than the probe's, or differ.

    Prefix tokens may differ where the probe does not use them.
    """
    layers = tokens.layers
    if len(layers) != n_layers:
        raise TrialError(
            f"found {len(layers)} layers in the batch, expected the {n_layers} that the probe "
            "mixes; read the same layers as in training"
        )
    for kind in ("patches", "prefix") if uses_prefix else ("patches",):
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
    shares: Float[Tensor, " layer"],
    arrays: Sequence[Float[Tensor, "clip ..."]],
    *,
    to_unit_length: bool = False,
) -> Float[Tensor, "clip ..."]:
    """sum_l share_l array_l, in one new array; the gradient goes to the shares alone.

    `to_unit_length` divides the vectors of the sum by their lengths.
    """
    mixed: Tensor = _Mix.apply(to_unit_length, shares, *arrays)  # type: ignore[no-untyped-call]
    return mixed


class _Mix(torch.autograd.Function):
    """Not written with sums and products: those would keep or make an array for each step."""

    @staticmethod
    def forward(ctx: Any, to_unit_length: bool, shares: Tensor, *arrays: Tensor) -> Tensor:
        mixed = arrays[0] * shares[0]
        for share, array in zip(shares[1:], arrays[1:], strict=True):
            mixed.addcmul_(array, share)
        unit = []
        if to_unit_length:
            length = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True).clamp_(min=1e-12)
            unit = [mixed.div_(length), length]
        ctx.n_layers = len(arrays)
        ctx.save_for_backward(*arrays, *unit)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        arrays, unit = ctx.saved_tensors[: ctx.n_layers], ctx.saved_tensors[ctx.n_layers :]
        if unit:
            # The part along a vector changes its length only.
            directions, length = unit
            along = _dots(gradient.flatten(0, -2), directions.flatten(0, -2)).view(length.shape)
            gradient = torch.addcmul(gradient, directions, along, value=-1).div_(length)
        # A dot product for each clip, then their sum: one over all would round more.
        dots = [_dots(gradient.flatten(1), array.flatten(1)).sum() for array in arrays]
        return None, torch.stack(dots), *[None] * len(arrays)


def _dots(one: Float[Tensor, "row dim"], other: Float[Tensor, "row dim"]) -> Float[Tensor, " row"]:
    """Dot products of rows, without an array of products."""
    return torch.bmm(one[:, None], other[..., None])[:, 0, 0]


class MixedTokens(Tokens):
    """What a probe of one layer sees: a mix of layers, made as far as the probe asks for it.

    Mixed patches are new memory of the size of a layer, and the floats of every layer are kept
    until the next batch.
    """

    def __init__(self, layers: Sequence[Tokens], shares: Float[Tensor, " layer"]) -> None:
        last = layers[-1]
        prefixes = [layer.prefix for layer in layers if layer.prefix is not None]
        # Where some layers have none, or another number, the probe does not use them.
        can_mix = (
            len(prefixes) == len(layers) and len({tuple(one.shape[1:]) for one in prefixes}) == 1
        )
        prefix = mix(shares, prefixes) if can_mix else None
        super().__init__(last._stored, prefix, last.n_patches, dtype=last.dtype, device=last.device)
        self.__dict__.pop("patches", None)  # the last layer's, where it is floats already
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
        """Mixed patches of length one, the only ones in memory where nobody asks for `patches`."""
        patches = [layer.patches for layer in self._sources]
        return mix(self._shares, patches, to_unit_length=True)

    @cached_property
    def stored_directions(self) -> None:
        """None: nothing of a mix is stored, and its gradient goes through floats."""
        return None
