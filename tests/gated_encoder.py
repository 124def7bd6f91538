"""An encoder that waits for a file where the environment says so: a slow worker without a clock."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

import torch

from patchbank.pipeline.encoders.base import TokenMap
from patchbank.pipeline.encoders.fake import FakeEncoder

GATE, N_FREE = "PATCHBANK_TEST_GATE", "PATCHBANK_TEST_N_FREE"
"""The file, and how many batches pass without it."""
PATIENCE_S = 30.0


class GatedEncoder(FakeEncoder):
    """`fake`, which holds batches back; a single clip, such as the golden one, always passes."""

    _n_batches = 0

    def encode(
        self, features: torch.Tensor, layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        self._n_batches += len(features) > 1
        if GATE in os.environ and self._n_batches > int(os.environ.get(N_FREE, 0)):
            end = time.monotonic() + PATIENCE_S
            while not Path(os.environ[GATE]).exists() and time.monotonic() < end:
                time.sleep(0.01)
        return super().encode(features, layers)


def load(weights: Path | None, device: torch.device | str) -> GatedEncoder:
    return GatedEncoder(weights, device)
