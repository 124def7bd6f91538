"""A probe that somebody wrote as a torch.nn.Module: stacked where torch can, else one by one.

The module's forward takes `Tokens` and returns logits (clip, class). Its parameters and buffers
become the weights of a trial, so that one module serves any number of trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import Dropout, Logits, Options, Probe, ProbeShape, Weights
from patchbank.probing.probes.stacking import sees_prefix, values_kept, why_one_by_one
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.probes.trial_dropout import Draws, replace_dropout
from patchbank.probing.randomness import seeded

Outcome = tuple[Float[Tensor, "*trial clip class"], Weights]
"""Logits, and what the buffers have become."""

KEPT_AT_ONCE = 2**22
"""Numbers kept for gradients in one product, 16 MiB."""
FEW_TRIALS, MANY_TRIALS = 4, 64
"""Fewer together take longer than one by one (3 of the gated example, 1.1 to 1.6 times on a CPU);
above the second number no limit is stated."""


@dataclass(frozen=True)
class ModuleProbe(Probe):
    """Trials of a user's module: one product by torch.func, or a loop where that cannot be.

    Which of the two is found out once, when it is first asked for, by trying both on a few made
    tokens; `note` says which, and why. The module is in train mode where there is dropout. A
    batch of one leaves batch-norm to its running statistics.
    """

    name: str
    build: Callable[[ProbeShape, Options], nn.Module] = field(repr=False)
    given: Mapping[str, Any]
    """The options that `build` gets."""

    @property
    def options(self) -> dict[str, Any]:
        """What the module states as its `options`, and what it was given."""
        return {**getattr(self._module, "options", {}), **self.given}

    @cached_property
    def uses_prefix(self) -> bool:
        """Found out by trying other prefix tokens."""
        return sees_prefix(self)

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        """The module's buffers, and parameters that are not to be trained."""
        return tuple(self._buffer_types)

    @cached_property
    def _buffer_types(self) -> dict[str, torch.dtype]:
        values = [*self._module.named_parameters(), *self._module.named_buffers()]
        return {key: one.dtype for key, one in values if not one.requires_grad}

    @property
    def learning_rates(self) -> tuple[float, float]:  # type: ignore[override]
        """The module's `learning_rates` where it has some."""
        low, high = getattr(self._module, "learning_rates", Probe.learning_rates)
        return float(low), float(high)

    @property
    def mixes_layers(self) -> bool:  # type: ignore[override]
        """The module's `mixes_layers`, False where it has none."""
        return bool(getattr(self._module, "mixes_layers", False))

    @cached_property
    def trials_at_once(self) -> int | None:
        """As many as fit `KEPT_AT_ONCE`: beyond, a product is no faster and takes more memory."""
        if self._hindrance is not None:
            return 1
        most = KEPT_AT_ONCE // values_kept(self)
        if most < FEW_TRIALS:
            return 1
        return None if most >= MANY_TRIALS else most

    @property
    def note(self) -> str:
        """How its trials are trained."""
        return f"trials {self.stacking}"

    @property
    def stacking(self) -> str:
        """ "in one product", or "one by one: REASON", or how many fit into a product."""
        if self._hindrance is not None:
            return f"one by one: {self._hindrance}"
        if self.trials_at_once is None:
            return "in one product"
        most = "one" if self.trials_at_once == 1 else f"{self.trials_at_once}"
        return f"{most} at a time, for the memory that each takes"

    @cached_property
    def _hindrance(self) -> str | None:
        return why_one_by_one(self)

    @cached_property
    def _draws(self) -> Draws:
        return Draws()

    @cached_property
    def _module(self) -> nn.Module:
        """One instance, whose own values are never used."""
        module = self._built(0)
        replace_dropout(module, self._draws)
        return module

    def _built(self, seed: int) -> nn.Module:
        with seeded(seed):
            return self.build(self.shape, dict(self.given))

    @property
    def file(self) -> str:
        """Where its forward stands."""
        return type(self._module).forward.__code__.co_filename

    def first_weights(self, random: torch.Generator) -> Weights:
        module = self._built(_drawn_seed(random))
        values = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {key: one.detach().float().contiguous().clone() for key, one in values.items()}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        n_trials = len(next(iter(weights.values())))
        if n_trials > 1 and self._hindrance is None:
            return self.stacked(weights, tokens, dropout)
        # A trial alone needs no product, but in training it has to draw what it draws in one.
        is_seeded = dropout is None or self._hindrance is not None
        return self.looped(weights, tokens, dropout, is_seeded=is_seeded)

    def stacked(self, weights: Weights, tokens: Tokens, dropout: Dropout | None) -> Logits:
        """All trials at once."""

        def one(values: Weights, trial: Tensor) -> Outcome:
            self._draws.trial = trial
            return self._apply(values, tokens)

        self._begin(tokens, dropout)
        some = next(iter(weights.values()))
        marks = torch.zeros(len(some), device=some.device)
        logits, buffers = torch.func.vmap(one, randomness="error")(weights, marks)
        if dropout is not None:
            _keep(buffers, weights)
        found: Tensor = logits
        return found

    def looped(
        self, weights: Weights, tokens: Tokens, dropout: Dropout | None, *, is_seeded: bool = True
    ) -> Logits:
        """A trial after the other.

        `is_seeded`: whatever draws from torch's global generators gets numbers of the trial.
        """
        logits = []
        for index in range(len(next(iter(weights.values())))):
            random = None if dropout is None else dropout[index]
            self._begin(tokens, None if random is None else [random])
            values = {key: one[index] for key, one in weights.items()}
            with _own_randomness(random, values) if is_seeded else nullcontext():
                found, buffers = self._apply(values, tokens)
            if dropout is not None:
                _keep(buffers, values)
            logits.append(found)
        return torch.stack(logits)

    def _begin(self, tokens: Tokens, dropout: Dropout | None) -> None:
        self._module.train(dropout is not None)
        self._draws.randoms, self._draws.trial = dropout or (), torch.zeros(())
        if tokens.shape[0] == 1:
            for part in self._module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()

    def _apply(self, weights: Weights, tokens: Tokens) -> Outcome:
        """One trial, as the module has it; buffers are copies, in their own types."""
        values = dict(weights)
        for key, dtype in self._buffer_types.items():
            is_whole = not dtype.is_floating_point
            values[key] = values[key].to(dtype) if is_whole else values[key].clone()
        logits = torch.func.functional_call(self._module, values, (tokens,))
        if not isinstance(logits, Tensor) or logits.shape != (
            tokens.shape[0],
            self.shape.n_classes,
        ):
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            expected = f"(clip={tokens.shape[0]}, class={self.shape.n_classes})"
            raise TrialError(
                f"forward of probe {self.name!r} returns {found}, expected logits {expected}"
            )
        return logits, {key: values[key].detach() for key in self.buffers}


def _keep(buffers: Weights, weights: Weights) -> None:
    for key, value in buffers.items():
        weights[key].copy_(value)


def _drawn_seed(random: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=random, device=random.device))


def _own_randomness(
    random: torch.Generator | None, weights: Weights
) -> AbstractContextManager[None]:
    """A new seed of the trial in training, always the same one outside."""
    device = next(iter(weights.values())).device
    return seeded(0 if random is None else _drawn_seed(random), device)
