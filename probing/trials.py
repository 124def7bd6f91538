"""Trials of one probe family, stacked along a leading axis and trained as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.losses import Loss
from patchbank.probing.optimiser import StackedAdamW
from patchbank.probing.probes.base import Probe, Weights, stacked_weights
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator

OUT_OF_MEMORY = ("can't allocate", "CUBLAS_STATUS_ALLOC_FAILED", "[CUDA]: out of memory")
"""Of torch's allocator on a CPU, of cuBLAS for its workspace, and of triton."""


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
        drawn = stacked_weights(probe, name, [trial.seed for trial in trials])
        self.weights: Weights = {key: value.to(device, dtype) for key, value in drawn.items()}
        self._trained = [key for key in self.weights if key not in probe.buffers]
        self._dropout = [
            generator(f"dropout/{name}", trial.seed, device=device) for trial in trials
        ]
        self._optimiser = StackedAdamW(
            [self.weights[key] for key in self._trained],
            learning_rates=self._vector([trial.learning_rate for trial in trials], dtype, device),
            weight_decays=self._vector([trial.weight_decay for trial in trials], dtype, device),
        )
        self._size = probe.trials_at_once or len(self.trials)
        self.parts = self._cut()
        """Trials that are computed together: all that may be, until memory does not suffice."""
        self.kept: tuple[int, ...] = tuple(range(len(self.trials)))
        """Places that the trials had before some were left behind."""
        self.is_finite: Bool[Tensor, " trial"] = torch.ones(
            len(trials), dtype=torch.bool, device=device
        )
        """False for trials whose loss was once NaN or infinite."""

    def _cut(self) -> list[slice]:
        return [
            slice(first, min(first + self._size, len(self.trials)))
            for first in range(0, len(self.trials), self._size)
        ]

    def keep(self, trials: Sequence[int]) -> None:
        """Leaves all trials behind but these, which go on as if nothing had been."""
        index = torch.tensor(trials, device=self.is_finite.device)
        self.weights = {key: value[index] for key, value in self.weights.items()}
        self._optimiser.keep(trials, [self.weights[key] for key in self._trained])
        self._dropout = [self._dropout[trial] for trial in trials]
        self.is_finite = self.is_finite[index]
        self.trials = tuple(self.trials[trial] for trial in trials)
        self.kept = tuple(self.kept[trial] for trial in trials)
        # Those that did not fit together do not now, unless there are fewer of them.
        self._size = max(part.stop - part.start for part in self.parts)
        self.parts = self._cut()

    @property
    def state(self) -> dict[str, Tensor]:
        """What `restore` takes to go on from here."""
        return {
            "kept": torch.tensor(self.kept),
            "parts": torch.tensor([[part.start, part.stop] for part in self.parts]),
            "is_finite": self.is_finite,
            **{f"dropout/{index}": one.get_state() for index, one in enumerate(self._dropout)},
            **{f"weights/{key}": value for key, value in self.weights.items()},
            **{f"optimiser/{key}": value for key, value in self._optimiser.state.items()},
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from the `state` of a stack of the same trials."""
        self.keep([self.kept.index(place) for place in state["kept"].tolist()])
        self.parts = [slice(*bounds) for bounds in state["parts"].tolist()]
        self.is_finite = state["is_finite"].to(self.is_finite.device)
        for index, random in enumerate(self._dropout):
            random.set_state(state[f"dropout/{index}"])
        for key, value in self.weights.items():
            value.copy_(state[f"weights/{key}"])
        self._optimiser.restore(
            {
                key.removeprefix("optimiser/"): value
                for key, value in state.items()
                if key.startswith("optimiser/")
            }
        )

    @staticmethod
    def _vector(
        values: list[float], dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, " trial"]:
        return torch.tensor(values, dtype=dtype, device=device)

    def step(
        self, tokens: Tokens, targets: Float[Tensor, "clip class"], loss: Loss, *, factor: float
    ) -> Float[Tensor, " trial"]:
        """One update of every trial on one batch; returns the losses before it."""
        self._optimiser.begin_step()

        def train(trials: slice) -> Tensor:
            losses, gradients = self._gradients(trials, tokens, targets, loss)
            self._optimiser.update(trials, gradients, factor=factor)
            return losses

        losses = torch.cat(self._in_parts(train))
        self.is_finite &= torch.isfinite(losses)
        return losses

    def _gradients(
        self, trials: slice, tokens: Tokens, targets: Float[Tensor, "clip class"], loss: Loss
    ) -> tuple[Float[Tensor, " trial"], list[Tensor | None]]:
        weights = {key: value[trials].detach() for key, value in self.weights.items()}
        leaves = [weights[key].requires_grad_() for key in self._trained]
        logits = self.probe.logits(weights, tokens, dropout=self._dropout[trials])
        losses = loss(logits, targets)
        # The sum keeps trials apart: no parameter of one has a gradient from another's loss.
        penalty = self.probe.penalty(weights)
        total = losses.sum() if penalty is None else (losses + penalty).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return losses.detach(), list(gradients)

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Float[Tensor, "trial clip class"]:
        """Logits without dropout."""

        def apply(trials: slice) -> Tensor:
            weights = {key: value[trials] for key, value in self.weights.items()}
            return self.probe.logits(weights, tokens)

        return torch.cat(self._in_parts(apply))

    def _in_parts(self, work: Callable[[slice], Tensor]) -> list[Tensor]:
        """`work` on all trials; where memory does not suffice, on halves from now on."""
        done: list[Tensor] = []
        while len(done) < len(self.parts):
            part = self.parts[len(done)]
            before = self._changing(part)
            try:
                done.append(work(part))
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if part.stop - part.start == 1:
                    raise TrialError(
                        f"memory does not suffice for a single trial of probe {self.name!r} "
                        f"({error}); pass a smaller --batch-size"
                    ) from error
                self._restore(part, before)
                middle = (part.start + part.stop) // 2
                halves = [slice(part.start, middle), slice(middle, part.stop)]
                self.parts[len(done) : len(done) + 1] = halves
        return done

    def _changing(self, trials: slice) -> tuple[list[Tensor], list[Tensor]]:
        """What a step changes before it can run out of memory: dropout, running statistics."""
        states = [random.get_state() for random in self._dropout[trials]]
        return states, [self.weights[key][trials].clone() for key in self.probe.buffers]

    def _restore(self, trials: slice, before: tuple[list[Tensor], list[Tensor]]) -> None:
        for random, state in zip(self._dropout[trials], before[0], strict=True):
            random.set_state(state)
        for key, value in zip(self.probe.buffers, before[1], strict=True):
            self.weights[key][trials] = value

    def weights_of(self, index: int) -> Weights:
        """One trial's parameters on the CPU, without the trial axis."""
        return {
            key: value[index].detach().cpu().contiguous() for key, value in self.weights.items()
        }


def _is_out_of_memory(error: BaseException) -> bool:
    # What a CPU, cuBLAS or a driver lacks is a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )
