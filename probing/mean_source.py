"""Means of patches in place of the patches: all that a bank of pooled vectors has to train from."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.errors import TrialError
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import Batch, LayerShape, LayerTokens
from patchbank.probing.plan import BatchRows
from patchbank.probing.probes.base import Probe

Rows = Int[np.ndarray, " clip"]


class MeanSource:
    """A `TokenSource` whose clips have one patch each, the stored mean of all that count."""

    def __init__(
        self,
        bank: Bank,
        layers: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        rows: Rows | None = None,
    ) -> None:
        self._where = bank.where
        self._source = BankSource(bank, list(layers), arrays=("mean",), device=device, rows=rows)
        self.n_rows = self._source.n_rows
        n_prefix = {spec.layer: spec.n_prefix for spec in bank.schema.layers}
        # Those of the tokens: a probe is described as one that was trained from them.
        self.shapes: Mapping[int, LayerShape] = {
            layer: replace(shape, n_prefix=n_prefix[layer])
            for layer, shape in self._source.shapes.items()
        }

    def check(self, probes: Mapping[str, Probe]) -> None:
        """Raises `TrialError` that names the probes which read more than means."""
        others = sorted(name for name, probe in probes.items() if not probe.reads_means_only)
        if others:
            raise TrialError(
                f"{self._where} holds pooled vectors only, and {', '.join(others)} "
                f"read{'s' * (len(others) == 1)} tokens; train linear, mlp, knn or "
                "linpre:pooling=mean from it, or `patchbank bank pull` the bank that it was made "
                "from without --pooled-only"
            )

    def read(self, batches: Iterable[BatchRows]) -> Generator[Batch, None, None]:
        """One `Batch` for each array of rows, in order."""
        with closing(self._source.read(batches)) as read:
            for batch in read:
                means = {layer: one.pooled["mean"] for layer, one in batch.layers.items()}
                yield replace(
                    batch, layers={key: LayerTokens(mean[:, None]) for key, mean in means.items()}
                )
