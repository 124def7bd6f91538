"""How probes are trained: all defaults in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from patchbank.pipeline.errors import TrialError


@dataclass(frozen=True)
class TrainSettings:
    """Everything but the data that decides a result."""

    n_epochs: int = 30
    batch_size: int = 64
    n_seeds: int = 5
    n_learning_rates: int = 5
    """Candidates, log-spaced over the range of the probe family."""
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Candidates by probe name, in place of the log-spaced ones."""
    weight_decay: float = 1e-4
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
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Hyper-parameters by probe name."""

    def __post_init__(self) -> None:
        for name in ("n_epochs", "batch_size", "n_seeds", "n_learning_rates", "n_resamples"):
            if getattr(self, name) < 1:
                raise TrialError(f"found {name}={getattr(self, name)}, expected at least 1")
        for name, rates in self.learning_rates.items():
            if not rates or min(rates) <= 0:
                raise TrialError(f"found learning rates {rates} for {name}, expected some above 0")

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

    def candidates(self, name: str, lowest_highest: tuple[float, float]) -> tuple[float, ...]:
        """The learning rates to try for one probe family."""
        if name in self.learning_rates:
            return tuple(self.learning_rates[name])
        if self.n_learning_rates == 1:
            return (float(np.sqrt(lowest_highest[0] * lowest_highest[1])),)
        rates = np.geomspace(*lowest_highest, self.n_learning_rates)
        return tuple(float(f"{rate:.6g}") for rate in rates)
