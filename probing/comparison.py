"""Is one probe better than another, on the same clips? Tests of pairs, corrected for their number.

Both probes are resampled with the same draws, so what is hard about a clip cancels out. `p` is
two-sided: how often a bootstrap that is shifted to no difference is as far from it as what was
measured (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 16; with
(1 + count) / (1 + resamples) of Davison and Hinkley, Bootstrap Methods and their Application, 1997,
chapter 4). `p_holm` holds for all pairs together (Holm, A simple sequentially rejective multiple
test procedure, 1979). `winner` is another rule, of the paper that this tool repeats: a win counts
only beyond one standard deviation over seeds. It does not say whose; the larger one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from patchbank.probing.bootstrap import Samples, interval

ROUNDING = 1e-12
"""Differences of means of the same clips that are equal may differ by so much."""


@dataclass(frozen=True)
class Contestant:
    """What one probe reached in one metric on the test split."""

    name: str
    mean: float | None
    """None where it is not defined, or infinite."""
    std: float | None
    samples: Samples
    n_groups: int
    """How many groups of clips were resampled."""


def compare(contestants: Sequence[Contestant], *, metric: str) -> list[dict[str, Any]]:
    """Rows of `comparisons`, each of a better probe `a` and another one `b`, all pairs.

    Those of the best come first. Draws are made in sequence, so where contestants have unequally
    many samples the common first ones are compared.
    """
    pairs = combinations(best_first(contestants), 2)
    rows = [{"metric": metric, "split": "test", **_difference(a, b)} for a, b in pairs]
    for row, p_holm in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p_holm
        row["winner"] = row.pop("winner")  # last, as it is read
    return rows


def best_first(contestants: Sequence[Contestant]) -> list[Contestant]:
    """By mean; equals stay in order, those without one come last."""
    return sorted(contestants, key=lambda one: math.inf if one.mean is None else -one.mean)


def _difference(a: Contestant, b: Contestant) -> dict[str, Any]:
    n_draws = min(len(a.samples), len(b.samples))
    with np.errstate(invalid="ignore"):
        samples = a.samples[:n_draws] - b.samples[:n_draws]
    row: dict[str, Any] = {"a": a.name, "b": b.name, "difference": None}
    row |= {"ci95": [None, None], "p": None, "winner": None}
    if a.mean is None or b.mean is None:
        return row
    difference = a.mean - b.mean
    row["difference"] = difference
    row["ci95"] = [finite(bound) for bound in interval(samples)]
    row["winner"] = _winner(a, b, difference)
    if min(a.n_groups, b.n_groups) > 1:
        row["p"] = p_value(difference, samples)
    return row


def p_value(difference: float, samples: Samples) -> float | None:
    """Two-sided, from bootstrap samples of a difference; None where no sample is defined."""
    defined = samples[np.isfinite(samples)]
    if not len(defined):
        return None
    # Rounding must not decide whether a sample that is just as far is counted.
    as_far = np.abs(defined - difference) >= abs(difference) - ROUNDING
    return float((1 + np.count_nonzero(as_far)) / (1 + len(defined)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Each p-value as it holds for all of them together; None stays, and counts for nothing."""
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for place, (p, index) in enumerate(known):
        least = max(least, min(1.0, p * (len(known) - place)))
        corrected[index] = least
    return corrected


def _winner(a: Contestant, b: Contestant, difference: float) -> str | None:
    if a.std is None or b.std is None or abs(difference) <= max(a.std, b.std):
        return None
    return a.name if difference > 0 else b.name


def finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
