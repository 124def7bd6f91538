from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from patchbank.probing.bootstrap import (
    affordable_resamples,
    draw_clips,
    interval,
    resampled_scores,
)
from patchbank.probing.metrics import Metric, left_out, metric_names, primary_metric, score

ALL: tuple[Metric, ...] = ("accuracy", "map_macro", "map_micro", "auroc_macro")


def example(
    *, n_clips: int = 40, n_classes: int = 4, n_seeds: int = 2, multi_label: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Targets and scores with many ties."""
    random = np.random.default_rng(0)
    targets = (random.random((n_clips, n_classes)) < 0.3).astype(np.float32)
    if not multi_label:
        targets = np.eye(n_classes, dtype=np.float32)[random.integers(n_classes, size=n_clips)]
    scores = (targets + random.normal(size=(n_seeds, n_clips, n_classes))).round(1)
    return targets, scores.astype(np.float32)


def test_macro_means_are_scikit_learns() -> None:
    targets, [scores, _] = example()
    assert score("map_macro", targets, scores) == average_precision_score(targets, scores)
    assert score("auroc_macro", targets, scores) == roc_auc_score(targets, scores)
    micro = average_precision_score(targets, scores, average="micro")
    assert score("map_micro", targets, scores) == micro


def test_accuracy_is_the_share_of_clips_whose_highest_score_is_their_class() -> None:
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    scores = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    assert score("accuracy", targets, scores) == 0.75


def test_classes_without_positives_or_negatives_are_left_out_and_named() -> None:
    targets = np.array([[0, 1, 1], [0, 1, 0]], dtype=np.float32)
    scores = np.array([[0.9, 0.1, 0.8], [0.1, 0.2, 0.3]], dtype=np.float32)
    assert left_out("map_macro", targets).tolist() == [0]
    assert left_out("auroc_macro", targets).tolist() == [0, 1]
    assert left_out("map_micro", targets).tolist() == []
    assert score("map_macro", targets, scores) == 1.0
    assert score("auroc_macro", targets, scores) == 1.0


def test_a_metric_that_can_judge_no_class_is_nan() -> None:
    targets = np.ones((2, 2), dtype=np.float32)
    assert np.isnan(score("auroc_macro", targets, targets))


def test_selection_is_by_map_or_by_accuracy() -> None:
    assert primary_metric(multi_label=True) == "map_macro"
    assert primary_metric(multi_label=False) == "accuracy"
    assert "accuracy" not in metric_names(multi_label=True)


@pytest.mark.parametrize("metric", ALL)
def test_a_resample_that_draws_each_clip_once_is_the_score_itself(metric: Metric) -> None:
    targets, scores = example(multi_label=metric != "accuracy")
    draws = np.ones((1, len(targets)), dtype=np.uint16)
    [found] = resampled_scores(metric, targets, scores, draws)
    expected = np.mean([score(metric, targets, one) for one in scores])
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("metric", ALL)
def test_a_resample_is_the_score_of_the_clips_it_drew(metric: Metric) -> None:
    targets, scores = example(multi_label=metric != "accuracy")
    draws = draw_clips(len(targets), n_resamples=5, seed=1)
    found = resampled_scores(metric, targets, scores, draws)
    for one_draw, value in zip(draws, found, strict=True):
        rows = np.repeat(np.arange(len(targets)), one_draw)
        expected = np.mean([score(metric, targets[rows], one[rows]) for one in scores])
        assert value == pytest.approx(expected, rel=1e-9)


def test_a_class_that_a_resample_misses_is_left_out_of_that_resample() -> None:
    targets = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    scores = np.array([[[0, 3], [1, 2], [2, 1]]], dtype=np.float32)
    draws = np.array([[0, 2, 1]], dtype=np.uint16)
    [found] = resampled_scores("map_macro", targets, scores, draws)
    assert found == score("map_macro", targets[[1, 1, 2], 1:], scores[0][[1, 1, 2], 1:])


def test_a_resample_without_any_positive_is_nan_and_no_part_of_the_interval() -> None:
    targets = np.array([[1], [0]], dtype=np.float32)
    scores = np.array([[[1], [0]]], dtype=np.float32)
    draws = np.array([[0, 2], [1, 1]], dtype=np.uint16)
    samples = resampled_scores("map_macro", targets, scores, draws)
    assert np.isnan(samples[0])
    assert interval(samples) == (1.0, 1.0)


def test_draws_hold_as_many_clips_as_the_set_and_repeat_with_the_seed() -> None:
    first, second, other = (draw_clips(30, n_resamples=7, seed=seed) for seed in (0, 0, 1))
    assert (first.sum(axis=1) == 30).all()
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_the_interval_holds_the_middle_95_percent() -> None:
    low, high = interval(np.arange(1001) / 1000)
    assert (low, high) == pytest.approx((0.025, 0.975))


def test_large_sets_get_fewer_resamples_but_never_less_than_a_hundred() -> None:
    assert affordable_resamples(1000, n_seeds=5, n_clips=600, n_classes=10) == 1000
    assert affordable_resamples(1000, n_seeds=5, n_clips=20_000, n_classes=527) == 100
    assert affordable_resamples(20, n_seeds=5, n_clips=20_000, n_classes=527) == 20
