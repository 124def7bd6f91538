"""One batch of tokens, converted once and shared by all trials of all probes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import Batch


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


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch as the probes see them: one float type, on the training device.

    What several probes need (mean, directions) is computed when first asked for, once a batch.
    Values of patches beyond `n_patches` never count, but must be finite.
    """

    patches: Float[Tensor, "clip patch dim"]
    prefix: Float[Tensor, "clip prefix dim"] | None = None
    n_patches: Int[Tensor, " clip"] | None = None
    buffers: Buffers = field(default_factory=Buffers, compare=False)

    @cached_property
    def counts(self) -> Bool[Tensor, "clip patch"] | None:
        """True for patches that count; None where all do."""
        if self.n_patches is None:
            return None
        positions = torch.arange(self.patches.shape[1], device=self.patches.device)
        return positions < self.n_patches[:, None]

    @cached_property
    def mean(self) -> Float[Tensor, "clip dim"]:
        """The mean of the patches that count."""
        if self.counts is None or self.n_patches is None:
            return self.patches.mean(dim=1)
        weights = self.counts / self.n_patches[:, None].to(self.patches.dtype)
        return torch.bmm(weights[:, None].to(self.patches.dtype), self.patches)[:, 0]

    @cached_property
    def directions(self) -> Float[Tensor, "clip patch dim"]:
        """Patches of length one; a patch of zeros stays zero."""
        z = self.patches
        norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp(min=1e-12)
        out = self.buffers.take("directions", tuple(z.shape), dtype=z.dtype, device=z.device)
        return torch.div(z, norm, out=out)


def convert(batch: Batch, *, dtype: torch.dtype, device: torch.device, buffers: Buffers) -> Tokens:
    """The tokens of `batch` in `dtype` on `device`, valid until the next batch."""
    patches = batch.patches
    if (patches.dtype, patches.device) != (dtype, device):
        converted = buffers.take("patches", tuple(patches.shape), dtype=dtype, device=device)
        patches = converted.copy_(patches, non_blocking=True)
    prefix = None if batch.prefix is None else batch.prefix.to(device, dtype)
    n_patches = batch.n_patches
    if n_patches is not None:
        _check_counts(n_patches, batch.patches.shape[1])
        n_patches = n_patches.to(device, torch.int64)
    return Tokens(patches, prefix, n_patches, buffers)


def _check_counts(n_patches: Int[Tensor, " clip"], n_slots: int) -> None:
    low, high = int(n_patches.min()), int(n_patches.max())
    if low < 1 or high > n_slots:
        raise TrialError(
            f"found n_patches from {low} to {high}, expected 1 to {n_slots} in every clip; "
            "check the bank with: patchbank bank verify X.bank"
        )
