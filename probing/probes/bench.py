"""What the checks of the probe contract share: the probe, its weights, tokens to try it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from types import FunctionType

import torch
from torch import Tensor

from patchbank.probing.probes.base import Build, Options, Probe, ProbeShape, Weights
from patchbank.probing.probes.base import stacked_weights as stacked
from patchbank.probing.probes.made_tokens import made_tokens
from patchbank.probing.probes.module import ModuleProbe
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator

N_CLIPS = 4
N_TRIALS = 2
TOLERANCE = 1e-9
"""Largest error by largest value, in float64: rounding is far below, a mate far above."""


class Broken(Exception):
    """A promise is not kept."""

    def __init__(self, found: str, *, expected: str, hint: str = "") -> None:
        super().__init__(found)
        self.found, self.expected, self.hint = found, expected, hint


class NotAsked(Exception):
    """The promise says nothing about such a probe."""


class Bench:
    """A probe under test."""

    def __init__(self, build: Build, name: str, shape: ProbeShape) -> None:
        self.build, self.name, self.shape = build, name, shape

    def built(self, options: Options | None = None) -> Probe:
        return self.build(self.shape, options or {})

    @cached_property
    def probe(self) -> Probe:
        probe = self.built()
        if not probe.mixes_layers:
            return probe
        self.shape = replace(self.shape, n_layers=2)
        return self.built()

    @property
    def file(self) -> str | None:
        """Where the probe's own code stands."""
        probe = self.__dict__.get("probe")
        code: object = getattr(self.build, "function", self.build)
        if isinstance(probe, ModuleProbe):
            return probe.file
        if isinstance(probe, Probe):
            code = type(probe).logits
        return code.__code__.co_filename if isinstance(code, FunctionType) else None

    def weights(self, *, dtype: torch.dtype = torch.float64, n_trials: int = N_TRIALS) -> Weights:
        """First weights of some trials, each time new tensors."""
        first = stacked(self.probe, self.name, range(n_trials))
        return {key: value.to(dtype, copy=True) for key, value in first.items()}

    def tokens(
        self,
        *,
        n_clips: int = N_CLIPS,
        seed: int = 0,
        n_patches: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Tokens:
        return made_tokens(self.shape, n_clips=n_clips, seed=seed, n_patches=n_patches, dtype=dtype)

    @property
    def randoms(self) -> list[torch.Generator]:
        """One a trial, each time from the start."""
        return [generator("check", trial) for trial in range(N_TRIALS)]

    @property
    def trained(self) -> list[str]:
        """Names of what is trained; raises `NotAsked` where that is nothing."""
        names = [key for key in self.weights() if key not in self.probe.buffers]
        if not names:
            raise NotAsked("nothing of it is trained")
        return names

    @torch.no_grad()
    def logits(self, tokens: Tokens, *, weights: Weights | None = None) -> Tensor:
        """Outside training."""
        return self.probe.logits(self.weights() if weights is None else weights, tokens)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest error by largest value; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    largest = max(float(expected.abs().max()), 1e-30)
    return float((found - expected).abs().max()) / largest


def within(error: float, when: str, *, tolerance: float = TOLERANCE, hint: str = "") -> str:
    """What to say of an error that is small enough; raises `Broken` for others and NaN."""
    if not error <= tolerance:
        raise Broken(
            f"logits {when} differ by {error:.2g} of the largest",
            expected=f"at most {tolerance:g}, for rounding",
            hint=hint,
        )
    return f"within {error:.1g} of the largest value"
