"""Weights of any probe: drawn, or remembered where it learns nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchbank.probing.probes.base import Probe, Weights, stacked_weights
from patchbank.probing.probes.knn import KnnProbe


def weights_of(probe: Probe, name: str, seeds: Sequence[int] = (0, 1)) -> Weights:
    """Of one trial a seed, float32."""
    if not isinstance(probe, KnnProbe):
        return stacked_weights(probe, name, seeds)
    random = torch.Generator().manual_seed(seeds[0])
    vectors = torch.randn(20, probe.shape.dim, generator=random)
    targets = (torch.rand(20, probe.shape.n_classes, generator=random) < 0.4).float()
    remembered = probe.remember(torch.nn.functional.normalize(vectors, dim=1), targets)
    return {key: value.repeat_interleave(len(seeds), 0) for key, value in remembered.items()}
