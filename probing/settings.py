"""How probes are trained: all defaults in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from patchbank.pipeline.errors import TrialError

DEFAULT_WEIGHT_DECAY = 1e-4
WEIGHT_DECAYS = (1e-5, 5e-4)
"""Lowest and highest of a search: the paper's range, for every family."""


class Point(NamedTuple):
    """One setting of the search."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class TrainSettings:
    """Everything but the data that decides a result."""

    n_epochs: int = 30
    batch_size: int = 64
    n_seeds: int = 5
    n_candidates: int = 5
    """Settings that the search tries for each probe."""
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Candidates by probe name, in place of those spread over the family's range."""
    weight_decays: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Likewise; each is tried with each learning rate."""
    n_warmup_steps: int = 0
    loss: Literal["auto", "asymmetric", "bce", "cross-entropy"] = "auto"
    """auto: asymmetric for multi-label tasks, cross-entropy for multi-class ones."""
    gamma_negative: float = 4.0
    gamma_positive: float = 1.0
    clip: float = 0.05
    order_seed: int = 0
    """Decides the order of clips, which all trials share."""
    n_resamples: int = 1000
    """Bootstrap resamples for the intervals; fewer, down to 100, on large sets."""
    device: str = "auto"
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        for name in ("n_epochs", "batch_size", "n_seeds", "n_candidates", "n_resamples"):
            if getattr(self, name) < 1:
                raise TrialError(f"found {name}={getattr(self, name)}, expected at least 1")
        for name, rates in self.learning_rates.items():
            if not rates or min(rates) <= 0:
                raise TrialError(f"found learning rates {rates} for {name}, expected some above 0")
        for name, decays in self.weight_decays.items():
            if not decays or min(decays) < 0:
                raise TrialError(f"found weight decays {decays} for {name}, expected some from 0")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def torch_device(self) -> torch.device:
        """`device`, where "auto" is the GPU if there is one."""
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            tensor = torch.zeros(1, device=name)
            tensor.cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise TrialError(
                f"found no device {self.device!r} here ({reason}); use --device cpu"
            ) from error
        return tensor.device  # with its number, as tensors have it

    def candidates(self, name: str, lowest_highest: tuple[float, float]) -> tuple[Point, ...]:
        """The settings to try for one probe, by ascending learning rate.

        Where neither is given: learning rates evenly spaced in logarithm, with weight decays spread
        over their range by van der Corput's sequence. One that is given is tried with each of the
        other, which are then the spread learning rates, or the default weight decay alone.
        """
        rates, decays = self.learning_rates.get(name), self.weight_decays.get(name)
        n = self.n_candidates
        spread = _spread(*lowest_highest, np.linspace(0, 1, n) if n > 1 else np.array([0.5]))
        if rates is None and decays is None:
            places = np.array([_van_der_corput(index + 1) for index in range(n)])
            return tuple(map(Point, spread, _spread(*WEIGHT_DECAYS, places)))
        return tuple(map(Point._make, product(rates or spread, decays or (DEFAULT_WEIGHT_DECAY,))))


def _spread(lowest: float, highest: float, places: Float[np.ndarray, " place"]) -> list[float]:
    """Values at `places` from 0 (lowest) to 1 (highest) in logarithm, to six digits."""
    values = lowest * (highest / lowest) ** places
    return [float(f"{value:.6g}") for value in values]


def _van_der_corput(index: int) -> float:
    """The binary digits of `index` mirrored at the point: 1/2, 1/4, 3/4, 1/8, 5/8 ..."""
    return sum((index >> bit & 1) / (2 << bit) for bit in range(index.bit_length()))
