"""nn.Dropout whose masks come from each trial's own generator, stacked or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchbank.probing.probes.base import Dropout


@dataclass
class Draws:
    """Where the masks of one module come from during one call."""

    randoms: Dropout = ()
    """One generator a trial; one where a trial is computed alone."""
    trial: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Any number of each trial: it is what tells a stack from a trial alone."""


class TrialDropout(nn.Dropout):
    """Inverted dropout in training; under `torch.func.vmap` each trial has a mask of its own.

    torch's own one draws from the global generator, and its masks depend on the number of trials.
    """

    def __init__(self, rate: float, draws: Draws) -> None:
        super().__init__(rate)
        self._draws = draws

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        kept: Tensor = _Kept.apply(  # type: ignore[no-untyped-call]
            self._draws.trial, input.shape, self.p, input.device, self._draws.randoms
        )
        return input * kept.to(input.dtype) / max(1 - self.p, 1e-12)


class _Kept(torch.autograd.Function):
    """Which values stay; a function of its own because only that sees the axis of trials."""

    @staticmethod
    def forward(
        trial: Tensor, shape: Sequence[int], rate: float, device: torch.device, randoms: Dropout
    ) -> Tensor:
        return torch.rand(tuple(shape), generator=randoms[0], device=device) >= rate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        trial: Tensor,
        shape: Sequence[int],
        rate: float,
        device: torch.device,
        randoms: Dropout,
    ) -> tuple[Tensor, int]:
        masks = [_Kept.forward(trial, shape, rate, device, [random]) for random in randoms]
        return torch.stack(masks), 0


def replace_dropout(module: nn.Module, draws: Draws) -> None:
    """Puts a `TrialDropout` in the place of every nn.Dropout inside `module`."""
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if type(child) is nn.Dropout:
                parent._modules[name] = TrialDropout(child.p, draws)
