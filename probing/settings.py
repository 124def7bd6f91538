"""How probes are trained: all defaults in one place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from patchbank.pipeline.errors import TrialError
from patchbank.probing.randomness import derived_seed

DEFAULT_WEIGHT_DECAY = 1e-4
Range = tuple[float, float]
"""Lowest and highest."""


class Point(NamedTuple):
    """One setting of the search."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True)
class SearchSettings:
    """How a probe's learning rate and weight decay are looked for."""

    n_candidates: int = 5
    """Settings of the first round, trained together."""
    first: Literal["spread", "sobol"] = "spread"
    """How they lie: evenly, or by Sobol's sequence."""
    n_rounds: int = 0
    """Further rounds, of settings that what is known suggests (TPE)."""
    n_a_round: int = 5
    halving_epochs: tuple[int, ...] = ()
    """Epochs after which only the best trials of a round go on."""
    keep: float = 1 / 3
    """Share of the trials that goes on, rounded up."""
    learning_rates: Mapping[str, Range] = field(default_factory=dict)
    """Ranges by probe or family, in place of those that the families name."""
    weight_decays: Range = (1e-5, 5e-4)
    """The paper's, for every family."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("n_candidates", 1), ("n_rounds", 0), ("n_a_round", 1)):
            _check_at_least(name, getattr(self, name), least)
        if list(self.halving_epochs) != sorted({max(1, epoch) for epoch in self.halving_epochs}):
            raise TrialError(
                f"found halving_epochs={list(self.halving_epochs)}, expected ascending epochs from "
                "1 on"
            )
        if not 0 < self.keep <= 1:
            raise TrialError(f"found keep={self.keep:g}, expected a share above 0 and at most 1")
        named = [(f"learning_rates of {name}", one) for name, one in self.learning_rates.items()]
        for name, (lowest, highest) in [*named, ("weight_decays", self.weight_decays)]:
            if not 0 < lowest <= highest < math.inf:
                raise TrialError(
                    f"found {name} from {lowest:g} to {highest:g}, expected a range above 0"
                )


@dataclass(frozen=True)
class TrainSettings:
    """Everything but the data that decides a result."""

    n_epochs: int = 30
    n_steps: int | None = None
    """In place of `n_epochs`, of which the last then ends early."""
    batch_size: int = 64
    n_seeds: int = 5
    search: SearchSettings = field(default_factory=SearchSettings)
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Candidates by probe name, in place of a search."""
    weight_decays: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Likewise; each is tried with each learning rate."""
    n_warmup_steps: int = 0
    lowest_rate: float = 0.0
    """Share of the learning rate at which the cosine ends."""
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
        for name in ("n_epochs", "batch_size", "n_seeds", "n_resamples"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("n_steps", 1 if self.n_steps is None else self.n_steps, 1)
        _check_at_least("n_warmup_steps", self.n_warmup_steps, 0)
        if not 0 <= self.lowest_rate <= 1:
            raise TrialError(
                f"found lowest_rate={self.lowest_rate:g}, expected a share from 0 to 1"
            )
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

    def candidates(self, name: str, lowest_highest: Range) -> tuple[Point, ...]:
        """The first settings to try for one probe, by ascending learning rate if they are spread.

        Where neither is given: learning rates evenly spaced in logarithm, with weight decays spread
        over their range by van der Corput's sequence; or both by Sobol's. One that is given is
        tried with each of the other, which are then the spread learning rates, or the default
        weight decay alone.
        """
        rates, decays = self.learning_rates.get(name), self.weight_decays.get(name)
        if rates is not None or decays is not None:
            tried = rates or _spread(lowest_highest, self.search.n_candidates)
            return tuple(map(Point._make, product(tried, decays or (DEFAULT_WEIGHT_DECAY,))))
        if self.search.first == "sobol":
            return self._sobol(name, lowest_highest)
        n = self.search.n_candidates
        places = np.array([_van_der_corput(index + 1) for index in range(n)])
        return tuple(map(Point, _spread(lowest_highest, n), _at(self.search.weight_decays, places)))

    def _sobol(self, name: str, lowest_highest: Range) -> tuple[Point, ...]:
        from scipy.stats.qmc import Sobol  # takes a second to load

        n, seed = self.search.n_candidates, self.search.seed
        sequence = Sobol(d=2, rng=np.random.default_rng(derived_seed(f"sobol/{name}", seed)))
        # Its own draw warns of numbers that are no power of two.
        places = sequence.random_base2((n - 1).bit_length())[:n]
        rates = _at(lowest_highest, places[:, 0])
        return tuple(map(Point, rates, _at(self.search.weight_decays, places[:, 1])))


def _spread(lowest_highest: Range, n: int) -> list[float]:
    return _at(lowest_highest, np.linspace(0, 1, n) if n > 1 else np.array([0.5]))


def _at(lowest_highest: Range, places: Float[np.ndarray, " place"]) -> list[float]:
    """Values at `places` from 0 (lowest) to 1 (highest) in logarithm, to six digits."""
    lowest, highest = lowest_highest
    values = lowest * (highest / lowest) ** places
    return [min(max(float(f"{value:.6g}"), lowest), highest) for value in values]


def _van_der_corput(index: int) -> float:
    """The binary digits of `index` mirrored at the point: 1/2, 1/4, 3/4, 1/8, 5/8 ..."""
    return sum((index >> bit & 1) / (2 << bit) for bit in range(index.bit_length()))


def _check_at_least(name: str, found: int, least: int) -> None:
    if found < least:
        raise TrialError(f"found {name}={found}, expected at least {least}")
