"""What a probe family is: how it starts, and how stacked trials of it turn tokens into logits.

A family is a frozen description; parameters live outside it, in a `Weights` dictionary with one
leading trial axis, so that any number of trials is one batched product and a trial's parameters
are a slice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator

Weights = dict[str, Tensor]
"""Arrays by name, of one trial or of several along a leading axis."""
Logits = Float[Tensor, "trial clip class"]
Dropout = Sequence[torch.Generator]
"""One generator a trial, on the device of the weights."""
Options = Mapping[str, Any]


@dataclass(frozen=True)
class ProbeShape:
    """What a probe is built for."""

    dim: int
    n_classes: int
    n_prefix: int = 0
    grid: tuple[int, int] | None = None
    """(time, freq) of the patches, patch = t * freq + f; None where nobody knows."""
    n_layers: int = 1
    """Layers that the probe mixes."""


@dataclass(frozen=True)
class Probe(ABC):
    """One probe family for one shape; its fields beside `shape` are its options."""

    shape: ProbeShape

    buffers: ClassVar[tuple[str, ...]] = ()
    """Names of arrays among the weights that no gradient changes, like running statistics."""
    learning_rates: ClassVar[tuple[float, float]] = (1e-4, 7e-3)
    """Lowest and highest worth trying; the paper's range for all but prototypes."""
    mixes_layers: ClassVar[bool] = False
    """Takes `Tokens.layers` itself; any other family is put behind a softmax mix of layers."""

    learns: ClassVar[bool] = True
    """Whether gradients train it. One that does not learn remembers the training clips."""

    @property
    def options(self) -> dict[str, Any]:
        """Every hyper-parameter, resolved, as plain JSON; building with them gives the same."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "shape"}

    @property
    def uses_prefix(self) -> bool:
        """Whether prefix tokens change its logits."""
        return False

    @property
    def reads_means_only(self) -> bool:
        """Whether the mean of a clip's patches is all that it reads, in `Tokens.mean`: then a bank
        of pooled vectors will do."""
        return False

    @property
    def trials_at_once(self) -> int | None:
        """Most trials in one product; None for any number.

        1 where a trial makes tokens of its own, so that memory holds those of one trial at a time.
        """
        return None

    @property
    def note(self) -> str | None:
        """What whoever trains it should know, in some words; None where there is nothing."""
        return None

    @abstractmethod
    def first_weights(self, random: torch.Generator) -> Weights:
        """One trial's parameters and buffers before training, float32 on the CPU."""

    @abstractmethod
    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        """Logits of stacked trials for one batch; `dropout` is None outside training.

        Nothing of one trial may reach another. In training, buffers are changed in place.
        """

    def penalty(self, weights: Weights) -> Float[Tensor, " trial"] | None:
        """What training adds to the loss of each trial; reported losses leave it out."""
        return None


Build = Callable[[ProbeShape, Options], Probe]
"""Makes a family for a shape, or raises `TrialError` for options that it does not have."""


def stacked_weights(probe: Probe, name: str, seeds: Sequence[int]) -> Weights:
    """First parameters of one trial a seed; (family, seed) alone decide them."""
    trials = [probe.first_weights(generator(f"weights/{name}", seed)) for seed in seeds]
    return {key: torch.stack([trial[key] for trial in trials]) for key in trials[0]}


def n_parameters(probe: Probe) -> int:
    """Trained numbers of one trial."""
    first = probe.first_weights(torch.Generator())
    return sum(value.numel() for key, value in first.items() if key not in probe.buffers)


def uniform_linear(
    n_out: int, n_in: int, random: torch.Generator, *, bias: bool = True
) -> list[Tensor]:
    """Weight (n_out, n_in) and bias (n_out), U(-1/sqrt(n_in), 1/sqrt(n_in)): torch.nn.Linear's."""
    bound = 1 / math.sqrt(n_in)
    shapes = [(n_out, n_in), (n_out,)] if bias else [(n_out, n_in)]
    return [torch.empty(shape).uniform_(-bound, bound, generator=random) for shape in shapes]


def apply_linear(
    features: Float[Tensor, "trial clip feature"],
    weight: Float[Tensor, "trial class feature"],
    bias: Float[Tensor, "trial class"],
) -> Logits:
    """Each trial's own linear layer."""
    return torch.baddbmm(bias[:, None], features, weight.transpose(1, 2))


def apply_shared_linear(
    vectors: Float[Tensor, "clip feature"],
    weight: Float[Tensor, "trial class feature"],
    bias: Float[Tensor, "trial class"],
) -> Logits:
    """Each trial's own linear layer on what all trials share: one plain matrix product."""
    n_trials, n_classes, _ = weight.shape
    joined = F.linear(vectors, weight.flatten(0, 1), bias.flatten())
    return joined.view(-1, n_trials, n_classes).transpose(0, 1)


def apply_dropout(
    features: Float[Tensor, "trial clip feature"], rate: float, dropout: Dropout | None
) -> Float[Tensor, "trial clip feature"]:
    """Inverted dropout with each trial's own generator."""
    if dropout is None or rate == 0:
        return features
    kept = [_kept(features[0], rate, random) for random in dropout]
    return features * torch.stack(kept) / (1 - rate)


def _kept(
    features: Float[Tensor, "clip feature"], rate: float, random: torch.Generator
) -> Bool[Tensor, "clip feature"]:
    return torch.rand(features.shape, generator=random, device=features.device) >= rate
