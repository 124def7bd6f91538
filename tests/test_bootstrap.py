from __future__ import annotations

import numpy as np
import pytest

from patchbank.probing.bootstrap import (
    affordable_resamples,
    draw_clips,
    interval,
    resampled_metrics,
    resampled_scores,
)
from patchbank.probing.groups import group_numbers
from patchbank.probing.metrics import Metric, metric_names, score

ALL: tuple[Metric, ...] = (*metric_names(multi_label=False), "lwlrap")


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


@pytest.mark.parametrize("metric", ALL)
def test_a_resample_that_draws_each_clip_once_is_the_score_itself(metric: Metric) -> None:
    targets, scores = example(multi_label="accuracy" not in metric)
    draws = np.ones((1, len(targets)), dtype=np.uint16)
    [found] = resampled_scores(metric, targets, scores, draws)
    expected = np.mean([score(metric, targets, one) for one in scores])
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("groups", [np.arange(40), np.arange(40) // 3], ids=["clips", "groups"])
@pytest.mark.parametrize("metric", ALL)
def test_a_resample_is_the_score_of_the_clips_it_drew(metric: Metric, groups: np.ndarray) -> None:
    targets, scores = example(multi_label="accuracy" not in metric)
    draws = draw_clips(groups, n_resamples=5, seed=1)
    found = resampled_scores(metric, targets, scores, draws)
    for one_draw, value in zip(draws, found, strict=True):
        rows = np.repeat(np.arange(len(targets)), one_draw)
        expected = np.mean([score(metric, targets[rows], one[rows]) for one in scores])
        assert value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("multi_label", [True, False])
def test_metrics_together_and_in_blocks_are_those_of_each_alone(
    multi_label: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets, scores = example(multi_label=multi_label)
    metrics = metric_names(multi_label=multi_label)
    draws = draw_clips(np.arange(40), n_resamples=9, seed=1)
    alone = {metric: resampled_scores(metric, targets, scores, draws) for metric in metrics}
    monkeypatch.setattr("patchbank.probing.bootstrap.BLOCK_ELEMENTS", 80)
    together = resampled_metrics(metrics, targets, scores, draws)
    assert list(together) == list(metrics)
    for metric in metrics:
        np.testing.assert_allclose(together[metric], alone[metric], rtol=1e-12)


def test_so_many_draws_that_small_integers_overflow_are_counted_right() -> None:
    targets, scores = example()
    draws = np.full((2, 40), 900, dtype=np.uint16)  # 36,000 in sum
    found = resampled_metrics(metric_names(multi_label=True), targets, scores, draws)
    once = resampled_metrics(list(found), targets, scores, np.ones_like(draws))
    for metric, samples in found.items():
        np.testing.assert_allclose(samples, once[metric], rtol=1e-12)


def test_a_class_that_a_resample_misses_is_left_out_of_that_resample() -> None:
    targets = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    scores = np.array([[[0, 3], [1, 2], [2, 1]]], dtype=np.float32)
    draws = np.array([[0, 2, 1]], dtype=np.uint16)
    for metric in ("map_macro", "balanced_accuracy"):
        [found] = resampled_scores(metric, targets, scores, draws)
        assert found == score(metric, targets[[1, 1, 2]], scores[0][[1, 1, 2]])


def test_a_resample_without_any_positive_is_nan_and_no_part_of_the_interval() -> None:
    targets = np.array([[1], [0]], dtype=np.float32)
    scores = np.array([[[1], [0]]], dtype=np.float32)
    draws = np.array([[0, 2], [1, 1]], dtype=np.uint16)
    for metric in ("map_macro", "map_micro", "lwlrap"):
        samples = resampled_scores(metric, targets, scores, draws)
        assert np.isnan(samples[0])
        assert interval(samples) == (1.0, 1.0)


@pytest.mark.parametrize("metric", [one for one in ALL if "accuracy" not in one])
def test_targets_without_any_positive_give_no_sample(metric: Metric) -> None:
    nothing = np.zeros((2, 3), dtype=np.float32)
    draws = np.ones((4, 2), dtype=np.uint16)
    assert np.isnan(resampled_scores(metric, nothing, nothing[None], draws)).all()


def test_draws_hold_as_many_clips_as_the_set_and_repeat_with_the_seed() -> None:
    clips = np.arange(30)
    first, second, other = (draw_clips(clips, n_resamples=7, seed=seed) for seed in (0, 0, 1))
    assert (first.sum(axis=1) == 30).all()
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert np.array_equal(draw_clips(clips, n_resamples=3, seed=0), first[:3])


def test_clips_of_one_group_are_drawn_together() -> None:
    groups = np.array([1, 0, 1, 2, 0])
    draws = draw_clips(groups, n_resamples=20, seed=0)
    assert np.array_equal(draws[:, 0], draws[:, 2])
    assert np.array_equal(draws[:, 1], draws[:, 4])
    assert (draws[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_draws_of_a_clip_depend_on_no_order_and_no_name_of_groups() -> None:
    ids, groups = ["b/0", "a/1", "c", "a/0"], ["y", "x", "z", "x"]
    draws = draw_clips(group_numbers(ids, groups), n_resamples=9, seed=0)
    order, renamed = [3, 0, 2, 1], {"x": "q", "y": "p", "z": "r"}
    other = group_numbers([ids[row] for row in order], [renamed[groups[row]] for row in order])
    assert np.array_equal(draw_clips(other, n_resamples=9, seed=0), draws[:, order])


def test_the_interval_holds_the_middle_95_percent() -> None:
    low, high = interval(np.arange(1001) / 1000)
    assert (low, high) == pytest.approx((0.025, 0.975))
    low, high = interval(np.array([0.0] * 50 + [np.inf] * 50))
    assert low == 0
    assert not np.isfinite(high)


def test_large_sets_get_fewer_resamples_but_never_less_than_a_hundred() -> None:
    assert affordable_resamples(1000, n_seeds=5, n_clips=600, n_classes=10) == 1000
    assert affordable_resamples(1000, n_seeds=5, n_clips=20_000, n_classes=527) == 162
    assert affordable_resamples(1000, n_seeds=5, n_clips=200_000, n_classes=527) == 100
    assert affordable_resamples(20, n_seeds=5, n_clips=20_000, n_classes=527) == 20
