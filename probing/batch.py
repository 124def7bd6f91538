"""What a loader hands out: the tokens of some rows, of one layer or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from patchbank.pipeline.errors import BankError
from patchbank.probing.plan import BatchRows

Rows = Int[np.ndarray, " clip"]
Grid = tuple[int, int]
"""Times and frequencies; patch = t * F + f."""
NO_LAYER = 0
"""The layer of tokens that come from no bank; a bank's layers count from 1."""


@dataclass(frozen=True, eq=False)
class CodeFactors:
    """Token = code x scale x channel_scale + channel_shift, with one code a channel."""

    scale: Float[Tensor, "clip patch"]
    channel_scale: Float[Tensor, " dim"]
    channel_shift: Float[Tensor, " dim"]


@runtime_checkable
class Quantised(Protocol):
    """Makes floats of the codes of one batch."""

    @property
    def dim(self) -> int: ...

    @property
    def factors(self) -> CodeFactors | None:
        """What the floats are made with; None where codes are packed or rotated too."""
        ...

    def all(self, raw: Shaped[Tensor, "clip patch width"]) -> Float[Tensor, "clip patch dim"]:
        """Float32, in memory that the next batch overwrites."""
        ...

    def write(
        self,
        raw: Shaped[Tensor, "clip patch width"],
        clips: slice,
        out: Float[Tensor, "clip patch dim"],
    ) -> None:
        """The floats of `clips`, whose codes `raw` holds, into `out` in its type."""
        ...


@dataclass(frozen=True)
class LayerShape:
    """What a row of one layer is."""

    n_patches: int
    dim: int
    n_prefix: int = 0
    grid: Grid | None = None
    """None where nobody knows."""


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """The tokens of one layer in a batch, on the loader's device."""

    raw: Shaped[Tensor, "clip patch width"] | None = None
    """Patches as the bank stores them: floats, int8 codes, or two int4 codes a byte."""
    prefix: Float[Tensor, "clip prefix dim"] | None = None
    n_patches: Int[Tensor, " clip"] | None = None
    """Patches that count, the first of each clip; None where all do."""
    pooled: Mapping[str, Float[Tensor, "clip dim"]] = field(default_factory=dict)
    """The stored mean, max or min over patches, where the loader was asked for them."""
    quantised: Quantised | None = None
    """What makes floats of quantised codes, with the scale of each token."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(clip, patch, dim) of the floats; `BankError` where the batch holds no patches."""
        n_clips, n_patches, width = self._codes.shape
        return n_clips, n_patches, width if self.quantised is None else self.quantised.dim

    @property
    def floats(self) -> Float[Tensor, "clip patch dim"] | None:
        """The patches where they are stored as floats."""
        return self.raw if self.quantised is None else None

    @cached_property
    def patches(self) -> Float[Tensor, "clip patch dim"]:
        """Floats in the bank's stored type, float32 where it is quantised.

        Quantised tokens are dequantised when this is first asked for, where they lie.
        """
        return self._codes if self.quantised is None else self.quantised.all(self._codes)

    def write(self, out: Float[Tensor, "clip patch dim"], clips: slice) -> None:
        """The floats of some clips, into `out` in its type."""
        if self.quantised is None:
            out.copy_(self._codes[clips], non_blocking=True)
        else:
            self.quantised.write(self._codes[clips], clips, out)

    @property
    def _codes(self) -> Shaped[Tensor, "clip patch width"]:
        if self.raw is None:
            raise BankError('the batch holds no patches; ask the loader for arrays=("patches",)')
        return self.raw


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens of some rows; valid until the next batch, and not to be written into.

    The tensors may be views of mapped files or of a slot that the next batch overwrites. What
    belongs to a layer is `batch[layer]`; where there is one layer, the batch itself says it too.
    """

    rows: Rows
    layers: Mapping[int, LayerTokens]
    epoch: int = 0
    index: int = 0
    """Place in the epoch, from 0."""

    @classmethod
    def of(
        cls,
        rows: Rows,
        patches: Float[Tensor, "clip patch dim"],
        prefix: Float[Tensor, "clip prefix dim"] | None = None,
        n_patches: Int[Tensor, " clip"] | None = None,
    ) -> Batch:
        """Tokens of one layer that are floats already."""
        return cls(rows, {NO_LAYER: LayerTokens(patches, prefix, n_patches)})

    def __getitem__(self, layer: int) -> LayerTokens:
        if layer not in self.layers:
            raise BankError(f"the batch has no layer {layer}; it has {list(self.layers)}")
        return self.layers[layer]

    @property
    def only(self) -> LayerTokens:
        """The tokens of the only layer; `BankError` where there are several."""
        if len(self.layers) != 1:
            last = list(self.layers)[-1]
            raise BankError(
                f"the batch holds layers {list(self.layers)}; say which, as in "
                f"batch[{last}].patches"
            )
        return next(iter(self.layers.values()))

    @property
    def patches(self) -> Float[Tensor, "clip patch dim"]:
        """`LayerTokens.patches` of the only layer; `BankError` where there are several."""
        return self.only.patches

    @property
    def raw(self) -> Shaped[Tensor, "clip patch width"] | None:
        """`LayerTokens.raw` of the only layer."""
        return self.only.raw

    @property
    def prefix(self) -> Float[Tensor, "clip prefix dim"] | None:
        """`LayerTokens.prefix` of the only layer."""
        return self.only.prefix

    @property
    def n_patches(self) -> Int[Tensor, " clip"] | None:
        """`LayerTokens.n_patches` of the only layer."""
        return self.only.n_patches

    @property
    def pooled(self) -> Mapping[str, Float[Tensor, "clip dim"]]:
        """`LayerTokens.pooled` of the only layer."""
        return self.only.pooled


@runtime_checkable
class TokenSource(Protocol):
    """Something that hands out the tokens of rows, in the order it is asked."""

    n_rows: int
    shapes: Mapping[int, LayerShape]
    """What a row of each layer is; the last one stands for all where one is asked for."""

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        """One `Batch` for each array of rows, in order."""
        ...


class ArraySource:
    """Tokens that already lie in memory: of one layer that has no name, or of several."""

    def __init__(
        self,
        patches: Float[Tensor, "clip patch dim"] | Mapping[int, LayerTokens],
        prefix: Float[Tensor, "clip prefix dim"] | None = None,
        n_patches: Int[Tensor, " clip"] | None = None,
        *,
        grid: Grid | None = None,
    ) -> None:
        if isinstance(patches, Tensor):
            patches = {NO_LAYER: LayerTokens(patches, prefix, n_patches)}
        self._layers = patches
        self.shapes: Mapping[int, LayerShape] = {
            layer: LayerShape(
                *one.shape[1:], 0 if one.prefix is None else one.prefix.shape[1], grid
            )
            for layer, one in patches.items()
        }
        self.n_rows = next(iter(patches.values())).shape[0]

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        for rows in batches:
            index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
            yield Batch(rows, {layer: _taken(one, index) for layer, one in self._layers.items()})


def _taken(layer: LayerTokens, index: Int[Tensor, " _"]) -> LayerTokens:
    return LayerTokens(
        layer.patches[index],
        None if layer.prefix is None else layer.prefix[index],
        None if layer.n_patches is None else layer.n_patches[index],
    )
