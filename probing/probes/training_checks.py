"""The checks of the probe contract that train some steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchbank.probing.losses import asymmetric
from patchbank.probing.probes.bench import N_CLIPS, Bench, Broken, largest_error
from patchbank.probing.randomness import generator
from patchbank.probing.trials import Trial, TrialStack

TRIALS = (Trial(1e-3, 1e-4, 0), Trial(3e-2, 0.1, 0), Trial(1e-3, 1e-4, 1))
N_STEPS = 5
TOGETHER = 1e-6
"""Rounding grows with the steps."""


def check_trials(bench: Bench) -> str:
    """Whether a trial is trained to the same numbers among others and alone."""
    _ = bench.trained
    together = _trained(bench, TRIALS)
    for index, trial in enumerate(TRIALS):
        alone = _trained(bench, [trial]).weights_of(0)
        for key, value in together.weights_of(index).items():
            error = largest_error(value, alone[key])
            if not error <= TOGETHER:
                raise Broken(
                    f"after {N_STEPS} steps {key} of trial {index} differs by {error:.2g}",
                    expected=f"what it is alone, within {TOGETHER:g}",
                    hint="a product over the axis of trials, or a generator that trials share?",
                )
    return "together as alone"


def check_learning(bench: Bench) -> str:
    """Whether every parameter is moved by training, and every value stays finite."""
    names, trial = bench.trained, Trial(1e-2, 0.0, 0)
    found, first = _trained(bench, [trial]).weights, bench.weights(n_trials=1)
    if still := [key for key in names if torch.equal(found[key], first[key])]:
        raise Broken(
            f"{', '.join(still)} has no gradient",
            expected="parameters that training moves",
            hint="unused, detached, or behind a relu that is always 0? else it is a buffer",
        )
    if bad := [key for key, value in found.items() if not bool(torch.isfinite(value).all())]:
        raise Broken(f"{', '.join(bad)} has become NaN or infinite", expected="finite values")
    return f"all {len(names)} arrays"


def _trained(bench: Bench, trials: Sequence[Trial]) -> TrialStack:
    stack = TrialStack(bench.name, bench.probe, trials, dtype=torch.float64)
    for step in range(N_STEPS):
        drawn = torch.rand(N_CLIPS, bench.shape.n_classes, generator=generator("targets", step))
        stack.step(bench.tokens(seed=step), (drawn < 0.4).double(), asymmetric, factor=1.0)
    return stack
