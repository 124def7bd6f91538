"""Where batches of tokens come from: a plan says which rows, a source reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Rows = Int[np.ndarray, " clip"]


@dataclass(frozen=True)
class Batch:
    """Tokens of some rows; the tensors may be views that the next batch overwrites."""

    rows: Rows
    patches: Float[Tensor, "clip patch dim"]
    """In the bank's stored float type."""
    prefix: Float[Tensor, "clip prefix dim"] | None = None
    n_patches: Int[Tensor, " clip"] | None = None
    """Patches that count, the first of each clip; None where all do."""


class TokenSource(Protocol):
    """Something that hands out the tokens of rows, in the order it is asked."""

    n_rows: int
    n_patches: int
    """Patches in a row."""
    dim: int
    n_prefix: int

    def read(self, batches: Iterable[Rows]) -> Iterator[Batch]:
        """One `Batch` for each array of rows, in order."""
        ...


class ArraySource:
    """Tokens that already lie in memory."""

    def __init__(
        self,
        patches: Float[Tensor, "clip patch dim"],
        prefix: Float[Tensor, "clip prefix dim"] | None = None,
        n_patches: Int[Tensor, " clip"] | None = None,
    ) -> None:
        self.n_rows, self.n_patches, self.dim = patches.shape
        self.n_prefix = 0 if prefix is None else prefix.shape[1]
        self._patches, self._prefix, self._counts = patches, prefix, n_patches

    def read(self, batches: Iterable[Rows]) -> Iterator[Batch]:
        for rows in batches:
            index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
            yield Batch(
                rows,
                self._patches[index],
                None if self._prefix is None else self._prefix[index],
                None if self._counts is None else self._counts[index],
            )
