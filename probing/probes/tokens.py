"""One batch of tokens, as all trials of all probes see it: what several need is made once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import Batch, LayerTokens
from patchbank.probing.probes.stored_directions import (
    StoredDirections,
    directions_of_codes,
    directions_of_floats,
    why_no_kernel,
)

Made = TypeVar("Made")
_CPU = torch.device("cpu")
BLOCK_VALUES = 2**19
"""Floats that stay in a processor's cache from one step to the next."""


class Buffers:
    """Memory that is used again from batch to batch, by name.

    A fresh allocation of a batch (200 MB) costs page faults that take longer than the conversion.
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Uninitialised memory of that shape; it is valid until the name is taken again."""
        n_elements = int(torch.Size(shape).numel())
        flat = self._flat.get(name)
        if flat is None or len(flat) < n_elements or flat.dtype != dtype or flat.device != device:
            self._flat[name] = flat = torch.empty(n_elements, dtype=dtype, device=device)
        return flat[:n_elements].view(shape)


@runtime_checkable
class Stored(Protocol):
    """Patches in some stored type, that become floats a few clips at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(clip, patch, dim)."""
        ...

    def write(self, out: Float[Tensor, "clip patch dim"], clips: slice) -> None:
        """The patches of `clips`, into `out`."""
        ...


class Tokens:
    """Tokens of a batch as the probes see them: one float type, on the training device.

    What several probes need (floats, mean, directions) is made when first asked for, once a batch,
    and no more than is asked for: a linear probe on the mean never has the batch as floats.
    Values of patches beyond `n_patches` never count, but must be finite.
    """

    def __init__(
        self,
        patches: Float[Tensor, "clip patch dim"] | Stored,
        prefix: Float[Tensor, "clip prefix dim"] | None = None,
        n_patches: Int[Tensor, " clip"] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = _CPU,
        buffers: Buffers | None = None,
        name: str = "",
        others: Sequence[Tokens] = (),
    ) -> None:
        """Floats as they are; or what is stored, which becomes `dtype` on `device`.

        `name` tells the memory of several such tokens of one batch apart; `others` are the layers
        before this one, for a probe that mixes layers.
        """
        self.shape = tuple(patches.shape)
        """(clip, patch, dim)."""
        self.prefix, self.n_patches = prefix, n_patches
        self.dtype, self.device = dtype, device
        self._others = tuple(others)
        self._last: Tokens | None = None
        self._stored, self._buffers, self._name = patches, buffers or Buffers(), name
        self._made: dict[str, Any] = {}
        if isinstance(patches, Tensor):
            self.dtype, self.device = patches.dtype, patches.device
            self.__dict__["patches"] = patches

    def __len__(self) -> int:
        """Clips."""
        return self.shape[0]

    @property
    def layers(self) -> tuple[Tokens, ...]:
        """The layers that a probe may mix, this one last."""
        # Not an attribute: tokens that hold themselves stay until Python looks for such cycles.
        # Nor `or`, which would ask how many clips there are: an exported program does not know.
        return (*self._others, self if self._last is None else self._last)

    @cached_property
    def patches(self) -> Float[Tensor, "clip patch dim"]:
        """All patches as floats."""
        out = self._take("patches")
        for clips in self._blocks():
            self._write(out[clips], clips)
        return out

    @property
    def cls(self) -> Float[Tensor, "clip dim"]:
        """The CLS token: the first of the prefix; `TrialError` where there is none."""
        if self.prefix is None or not self.prefix.shape[1]:
            raise TrialError("found no prefix tokens in the batch, expected a CLS token")
        return self.prefix[:, 0]

    @cached_property
    def counts(self) -> Bool[Tensor, "clip patch"] | None:
        """True for patches that count; None where all do."""
        if self.n_patches is None:
            return None
        positions = torch.arange(self.shape[1], device=self.device)
        return positions < self.n_patches[:, None]

    @cached_property
    def mean(self) -> Float[Tensor, "clip dim"]:
        """The mean of the patches that count."""
        if "patches" in self.__dict__ or self.device.type != "cpu":
            return self._mean_of(self.patches, slice(None))
        # Not the memory of `patches`: the same layer may be there already, seen as other `Tokens`.
        parts, blocks = [], list(self._blocks())
        shape = (blocks[0].stop, *self.shape[1:])
        scratch = self._buffers.take("block", shape, dtype=self.dtype, device=self.device)
        for clips in blocks:
            block = scratch[: clips.stop - clips.start]
            self._write(block, clips)
            parts.append(self._mean_of(block, clips))
        return torch.cat(parts)

    def _mean_of(
        self, patches: Float[Tensor, "clip patch dim"], clips: slice
    ) -> Float[Tensor, "clip dim"]:
        if self.counts is None or self.n_patches is None:
            return patches.mean(dim=1)
        weights = self.counts[clips] / self.n_patches[clips, None].to(patches.dtype)
        return torch.bmm(weights[:, None].to(patches.dtype), patches)[:, 0]

    @cached_property
    def directions(self) -> Float[Tensor, "clip patch dim"]:
        """Patches of length one; a patch of zeros stays zero."""
        ready: Tensor | None = self.__dict__.get("patches")
        if ready is not None and (ready.requires_grad or torch.compiler.is_exporting()):
            return ready / _length(ready)
        out = self._take("directions")
        for clips in self._blocks():
            block = out[clips]
            if ready is None:
                self._write(block, clips)
                block.div_(_length(block))
            else:
                torch.div(ready[clips], _length(ready[clips]), out=block)
        return out

    @cached_property
    def stored_directions(self) -> StoredDirections | None:
        """Directions without floats, for a GPU's own kernel; None where they are to be floats."""
        ready: Tensor | None = self.__dict__.get("patches")
        if (self.device.type, self.dtype) != ("cuda", torch.float32) or (
            (ready is not None and ready.requires_grad) or why_no_kernel() is not None
        ):
            return None
        return self._as_stored()

    def _as_stored(self) -> StoredDirections:
        """Int4 codes become floats first; other tokens stay as they are."""
        stored = self._stored
        if isinstance(stored, LayerTokens) and stored.raw is not None:
            quantised = stored.quantised
            if quantised is None:
                return directions_of_floats(stored.raw.to(self.device), self.n_patches)
            if quantised.factors is not None:
                return directions_of_codes(stored, quantised.factors, self.n_patches)
        return directions_of_floats(self.patches, self.n_patches)

    def after(self, others: Sequence[Tokens]) -> Tokens:
        """For a probe that mixes layers: `others`, and these, which are made once for all."""
        found = copy.copy(self)
        found._others, found._last = tuple(others), self
        return found

    def take(self, clips: Int[Tensor, " _"]) -> Tokens:
        """The tokens of some clips, by their places in the batch, as a copy."""
        return Tokens(
            self.patches[clips],
            None if self.prefix is None else self.prefix[clips],
            None if self.n_patches is None else self.n_patches[clips],
            others=[other.take(clips) for other in self.layers[:-1]],
        )

    def made(self, what: str, make: Callable[[Tokens], Made]) -> Made:
        """What `make` gives for these tokens, made once however many trials and probes ask."""
        if what not in self._made:
            self._made[what] = make(self)
        found: Made = self._made[what]
        return found

    def memory(self, what: str, *, dim: int) -> Float[Tensor, "clip patch dim"]:
        """Uninitialised memory of that width, valid until the next batch takes it again."""
        shape, name = (*self.shape[:2], dim), f"{what}/{self._name}"
        return self._buffers.take(name, shape, dtype=self.dtype, device=self.device)

    def _take(self, what: str) -> Float[Tensor, "clip patch dim"]:
        return self.memory(what, dim=self.shape[2])

    def _blocks(self) -> Iterator[slice]:
        """Clips whose floats fit a processor's cache; all of them on a GPU."""
        n_clips, n_patches, dim = self.shape
        size = max(1, BLOCK_VALUES // (n_patches * dim)) if self.device.type == "cpu" else n_clips
        for start in range(0, n_clips, size):
            yield slice(start, min(start + size, n_clips))

    def _write(self, out: Float[Tensor, "clip patch dim"], clips: slice) -> None:
        if isinstance(self._stored, Tensor):
            out.copy_(self._stored[clips])
        else:
            self._stored.write(out, clips)


def _length(z: Float[Tensor, "clip patch dim"]) -> Float[Tensor, "clip patch 1"]:
    norm: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return norm.clamp(min=1e-12)


def convert(
    batch: Batch,
    *,
    dtype: torch.dtype,
    device: torch.device,
    buffers: Buffers,
    layer: int | None = None,
) -> Tokens:
    """The tokens of one layer of `batch` (the only one by default) in `dtype` on `device`.

    Valid until the next batch, and patches become floats when they are first asked for.
    """
    stored = batch.only if layer is None else batch[layer]
    prefix = None if stored.prefix is None else stored.prefix.to(device, dtype)
    n_patches = stored.n_patches
    if n_patches is not None:
        _check_counts(n_patches, stored.shape[1])
        n_patches = n_patches.to(device, torch.int64)
    is_ready = stored.floats is not None and (
        (stored.floats.dtype, stored.floats.device) == (dtype, device)
    )
    return Tokens(
        stored.floats if is_ready and stored.floats is not None else stored,
        prefix,
        n_patches,
        dtype=dtype,
        device=device,
        buffers=buffers,
        name="" if layer is None else str(layer),
    )


def _check_counts(n_patches: Int[Tensor, " clip"], n_slots: int) -> None:
    low, high = int(n_patches.min()), int(n_patches.max())
    if low < 1 or high > n_slots:
        raise TrialError(
            f"found n_patches from {low} to {high}, expected 1 to {n_slots} in every clip; "
            "check the bank with: patchbank bank verify X.bank"
        )
