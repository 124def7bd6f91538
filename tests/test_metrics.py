from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    label_ranking_average_precision_score,
    roc_auc_score,
)

from patchbank.probing.metrics import (
    Metric,
    left_out,
    metric_names,
    primary_metric,
    score,
    score_trials,
)

ALL: tuple[Metric, ...] = (*metric_names(multi_label=False), "lwlrap")
Values = np.ndarray


def macro(judge: Callable[..., float], truth: Values, scores: Values, *, metric: Metric) -> float:
    judged = np.setdiff1d(np.arange(truth.shape[1]), left_out(metric, truth.astype(float)))
    values = [judge(truth[:, index], scores[:, index]) for index in judged]
    return float(np.mean(values)) if values else math.nan


def scikit_learns(metric: Metric, targets: Values, scores: Values) -> float:
    """The same number by scikit-learn, which takes no infinite score."""
    truth = targets > 0.5
    _, ranks = np.unique(scores.astype(np.float64), return_inverse=True)
    scores = ranks.reshape(scores.shape).astype(np.float64)
    if metric == "map_macro":
        return macro(average_precision_score, truth, scores, metric=metric)
    if metric == "auroc_macro":
        return macro(roc_auc_score, truth, scores, metric=metric)
    if not truth.any():
        return math.nan
    if metric == "map_micro":
        return float(average_precision_score(truth.ravel(), scores.ravel()))
    if metric == "lwlrap":
        n_labels = truth.sum(axis=1)
        return float(label_ranking_average_precision_score(truth, scores, sample_weight=n_labels))
    classes = truth.argmax(axis=1), scores.argmax(axis=1)
    if metric == "accuracy":
        return float(accuracy_score(*classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are chosen but never right
        return float(balanced_accuracy_score(*classes))


@st.composite
def judged(draw: st.DrawFn, *, multi_label: bool) -> tuple[Values, Values]:
    """Targets and scores with many ties, absent classes, infinities, in any precision."""
    n_clips, n_classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    if multi_label:
        targets = random.random((n_clips, n_classes)) < draw(st.sampled_from([0, 0.2, 0.8, 1]))
    else:
        targets = np.eye(n_classes)[random.integers(draw(st.integers(1, n_classes)), size=n_clips)]
    n_levels = draw(st.sampled_from([1, 3, 1000]))
    scores = random.integers(-n_levels, n_levels, (2, n_clips, n_classes)) / 8
    scores[random.random(scores.shape) < draw(st.sampled_from([0, 0.2]))] = -np.inf
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    return targets.astype(np.float32), scores.astype(dtype)


@pytest.mark.parametrize("metric", [one for one in ALL if one != "d_prime"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_metric_is_scikit_learns(metric: Metric, data: st.DataObject) -> None:
    targets, trials = data.draw(judged(multi_label="accuracy" not in metric))
    found = score_trials(metric, targets, trials)
    expected = [scikit_learns(metric, targets, scores) for scores in trials]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert score(metric, targets, trials[0]) == pytest.approx(found[0], rel=0, nan_ok=True)


def test_many_clips_are_judged_in_blocks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    targets = (random.random((60, 7)) < 0.3).astype(np.float32)
    trials = random.normal(size=(3, 60, 7)).astype(np.float32)
    whole = {metric: score_trials(metric, targets, trials) for metric in ALL}
    monkeypatch.setattr("patchbank.probing.ranking.BLOCK_ELEMENTS", 61)
    for metric in ALL:
        np.testing.assert_allclose(score_trials(metric, targets, trials), whole[metric], 1e-12)


def test_d_prime_is_the_distance_of_normals_with_that_area() -> None:
    random = np.random.default_rng(0)
    targets = (np.arange(40_000) < 20_000).astype(np.float32)[:, None]
    scores = random.normal(size=(40_000, 1)) + 1.5 * targets
    assert score("d_prime", targets, scores) == pytest.approx(1.5, abs=0.03)
    assert score("d_prime", targets, targets) == math.inf
    assert score("d_prime", targets, np.zeros_like(targets)) == 0


def test_accuracy_is_the_share_of_clips_whose_highest_score_is_their_class() -> None:
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    scores = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    assert score("accuracy", targets, scores) == 0.75
    assert score("balanced_accuracy", targets, scores) == pytest.approx(2.5 / 3)


def test_classes_without_positives_or_negatives_are_left_out_and_named() -> None:
    targets = np.array([[0, 1, 1], [0, 1, 0]], dtype=np.float32)
    scores = np.array([[0.9, 0.1, 0.8], [0.1, 0.2, 0.3]], dtype=np.float32)
    assert left_out("map_macro", targets).tolist() == [0]
    assert left_out("balanced_accuracy", targets).tolist() == [0]
    assert left_out("auroc_macro", targets).tolist() == [0, 1]
    assert left_out("d_prime", targets).tolist() == [0, 1]
    assert left_out("map_micro", targets).tolist() == []
    assert left_out("lwlrap", targets).tolist() == []
    assert score("map_macro", targets, scores) == 1.0
    assert score("auroc_macro", targets, scores) == 1.0


def test_clips_without_labels_are_no_part_of_lwlrap() -> None:
    targets = np.array([[1, 0], [0, 0]], dtype=np.float32)
    assert score("lwlrap", targets, np.array([[0.1, 0.2], [0.3, 0.4]])) == 0.5
    assert np.isnan(score("lwlrap", np.zeros_like(targets), targets))


def test_a_metric_that_can_judge_no_class_is_nan() -> None:
    targets = np.ones((2, 2), dtype=np.float32)
    assert np.isnan(score("auroc_macro", targets, targets))
    assert np.isnan(score("d_prime", targets, targets))


@pytest.mark.parametrize("metric", ALL)
def test_a_trial_with_a_score_that_is_no_number_is_worth_none(metric: Metric) -> None:
    targets = np.eye(3, dtype=np.float32)
    trials = np.stack([targets - 0.2 * targets[::-1]] * 2)
    trials[1, 2, 0] = np.nan
    assert np.isnan(score_trials(metric, targets, trials)).tolist() == [False, True]


def test_selection_is_by_map_or_by_accuracy() -> None:
    assert primary_metric(multi_label=True) == "map_macro"
    assert primary_metric(multi_label=False) == "accuracy"
    assert not {"accuracy", "balanced_accuracy"} & set(metric_names(multi_label=True))
    assert "lwlrap" not in metric_names(multi_label=False)
