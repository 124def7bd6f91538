"""Paired tests between probes: what they count, and when they say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from patchbank.probing.bootstrap import draw_clips, resampled_scores
from patchbank.probing.comparison import Contestant, compare, holm, p_value


def contestant(
    name: str,
    mean: float | None,
    samples: list[float] | np.ndarray,
    *,
    std: float | None = 0.01,
    n_groups: int = 9,
) -> Contestant:
    return Contestant(name, mean, std, np.asarray(samples, dtype=np.float64), n_groups)


def test_p_counts_samples_that_lie_as_far_from_the_difference_as_it_from_zero() -> None:
    samples = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    assert p_value(0.2, samples) == (1 + 2) / 6
    assert p_value(-0.2, -samples) == (1 + 2) / 6
    assert p_value(0.0, samples) == 1
    assert p_value(0.2, np.array([np.nan, 0.2, np.inf])) == 1 / 2
    assert p_value(0.2, np.array([np.nan])) is None


def test_rounding_does_not_decide_what_is_as_far() -> None:
    assert p_value(0.3, np.array([0.1 + 0.2 - 0.3])) == 1


def test_holm_corrects_step_by_step_and_passes_over_what_has_no_p() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_better_probe_comes_first_and_wins_beyond_the_larger_deviation() -> None:
    linear = contestant("linear", 0.5, [0.4, 0.5, 0.6])
    mhca = contestant("mhca", 0.52, [0.43, 0.52, 0.61], std=0.03)
    proto = contestant("protobin", 0.6, [0.5, 0.6, 0.7], std=0.02)
    rows = compare([linear, mhca, proto], metric="map_macro")
    assert [(row["a"], row["b"], row["winner"]) for row in rows] == [
        ("protobin", "mhca", "protobin"),
        ("protobin", "linear", "protobin"),
        ("mhca", "linear", None),
    ]
    assert rows[1]["difference"] == pytest.approx(0.1)
    assert rows[1]["ci95"] == pytest.approx([0.1, 0.1])
    assert {row["p"] for row in rows} == {1 / 4}
    assert {row["p_holm"] for row in rows} == {3 / 4}


def test_one_group_of_clips_tests_nothing_and_one_seed_wins_nothing() -> None:
    [row] = compare(
        [
            contestant("a", 0.9, [0.9, 0.9], std=None, n_groups=1),
            contestant("b", 0.1, [0.1, 0.1], std=None, n_groups=1),
        ],
        metric="accuracy",
    )
    assert (row["p"], row["p_holm"], row["winner"]) == (None, None, None)
    assert row["difference"] == pytest.approx(0.8)


def test_what_has_no_number_is_compared_with_nothing() -> None:
    perfect = contestant("perfect", None, [np.inf, np.inf])
    rows = compare([perfect, contestant("b", 1.0, [np.inf, 1.0])], metric="d_prime")
    assert [(row["a"], row["b"]) for row in rows] == [("b", "perfect")]
    assert rows[0]["difference"] is None
    assert rows[0]["ci95"] == [None, None]
    assert compare([perfect], metric="d_prime") == []


def test_the_first_common_samples_are_compared() -> None:
    long = contestant("long", 0.5, [0.5, 0.6, 9.0, 9.0])
    [row] = compare([long, contestant("short", 0.4, [0.4, 0.4])], metric="map_macro")
    assert row["ci95"][1] < 0.21


def test_under_no_difference_small_p_values_are_as_rare_as_they_say() -> None:
    """400 pairs of equally good probes; the share below 0.1 is 0.1 within 3.3 deviations."""
    random = np.random.default_rng(0)
    draws = draw_clips(np.arange(80), n_resamples=199, seed=0)
    n_small = 0
    for _ in range(400):
        targets = np.eye(2, dtype=np.float32)[random.integers(2, size=80)]
        scores = (targets + random.normal(size=(2, 1, 80, 2))).astype(np.float32)
        samples = [resampled_scores("accuracy", targets, one, draws) for one in scores]
        means = [(one[0].argmax(1) == targets.argmax(1)).mean() for one in scores]
        p = p_value(float(means[0] - means[1]), samples[0] - samples[1])
        n_small += p is not None and p < 0.1
    assert 400 * 0.1 - 20 <= n_small <= 400 * 0.1 + 20
