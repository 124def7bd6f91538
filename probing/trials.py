"""Trials of one probe family, stacked along a leading axis and trained as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchbank.probing.losses import Loss
from patchbank.probing.optimiser import StackedAdamW
from patchbank.probing.probes.base import Probe, Weights, stacked_weights
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator


@dataclass(frozen=True)
class Trial:
    """One probe to train: what differs between the trials of a stack."""

    learning_rate: float
    weight_decay: float
    seed: int


class TrialStack:
    """The parameters and the optimiser of several trials of one family.

    First weights depend on (family, seed) only and dropout on (family, seed) too, each trial with
    its own generator, so adding or removing a trial changes no other beyond rounding.
    """

    def __init__(
        self,
        name: str,
        probe: Probe,
        trials: Sequence[Trial],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.probe, self.trials = name, probe, tuple(trials)
        first = stacked_weights(probe, name, [trial.seed for trial in trials])
        self.weights: Weights = {
            key: value.to(device, dtype).requires_grad_() for key, value in first.items()
        }
        self._dropout = [
            generator(f"dropout/{name}", trial.seed, device=device) for trial in trials
        ]
        self._optimiser = StackedAdamW(
            list(self.weights.values()),
            learning_rates=self._vector([trial.learning_rate for trial in trials], dtype, device),
            weight_decays=self._vector([trial.weight_decay for trial in trials], dtype, device),
        )
        self.is_finite: Bool[Tensor, " trial"] = torch.ones(
            len(trials), dtype=torch.bool, device=device
        )
        """False for trials whose loss was once NaN or infinite."""

    @staticmethod
    def _vector(
        values: list[float], dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, " trial"]:
        return torch.tensor(values, dtype=dtype, device=device)

    def step(
        self, tokens: Tokens, targets: Float[Tensor, "clip class"], loss: Loss, *, factor: float
    ) -> Float[Tensor, " trial"]:
        """One update of every trial on one batch; returns the losses before it."""
        losses = loss(self.probe.logits(self.weights, tokens, dropout=self._dropout), targets)
        # The sum keeps trials apart: no parameter of one has a gradient from another's loss.
        losses.sum().backward()
        self._optimiser.step(factor=factor)
        found = losses.detach()
        self.is_finite &= torch.isfinite(found)
        return found

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Float[Tensor, "trial clip class"]:
        """Logits without dropout."""
        return self.probe.logits(self.weights, tokens)

    def weights_of(self, index: int) -> Weights:
        """One trial's parameters on the CPU, without the trial axis."""
        return {
            key: value[index].detach().cpu().contiguous() for key, value in self.weights.items()
        }
