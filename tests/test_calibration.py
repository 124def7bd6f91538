"""Temperature and thresholds from validation scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss

from patchbank.probing.calibration import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    calibrate,
    probabilities_of,
)
from patchbank.probing.thresholds import DEFAULT_THRESHOLD, choose_thresholds
from patchbank.probing.validation_fit import fit_on_validation

N_CLIPS, N_CLASSES = 3_000, 4


def drawn(*, multi_label: bool, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits, and labels drawn from what they say at a temperature."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (N_CLIPS, N_CLASSES)).astype(np.float32)
    found = probabilities_of(
        torch.from_numpy(logits), multi_label=multi_label, temperature=temperature
    ).numpy()
    if multi_label:
        return logits, (random.random(found.shape) < found).astype(np.float32)
    classes = [random.choice(N_CLASSES, p=row / row.sum()) for row in found.astype(np.float64)]
    return logits, np.eye(N_CLASSES, dtype=np.float32)[classes]


def nll(scores: np.ndarray, targets: np.ndarray, *, multi_label: bool, temperature: float) -> float:
    """Scikit-learn's loss of the probabilities."""
    found = probabilities_of(
        torch.from_numpy(scores).double(), multi_label=multi_label, temperature=temperature
    ).numpy()
    if multi_label:
        return float(log_loss(targets.ravel(), found.ravel()))
    return float(log_loss(targets.argmax(axis=1), found))


@pytest.mark.parametrize("multi_label", [True, False])
@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_the_temperature_that_drew_the_labels_is_found(
    temperature: float, multi_label: bool
) -> None:
    scores, targets = drawn(multi_label=multi_label, temperature=temperature)
    found = calibrate(scores, targets, multi_label=multi_label)
    assert found.temperature == pytest.approx(temperature, rel=0.1)
    assert found.n_clips == N_CLIPS
    before = nll(scores, targets, multi_label=multi_label, temperature=1.0)
    after = nll(scores, targets, multi_label=multi_label, temperature=found.temperature)
    assert (found.nll_before, found.nll_after) == pytest.approx((before, after), rel=1e-6)
    tried = [
        nll(scores, targets, multi_label=multi_label, temperature=one)
        for one in np.geomspace(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE, 60)
    ]
    assert found.nll_after <= min(tried) + 1e-9


def test_log_probabilities_give_the_temperature_of_their_logits() -> None:
    scores, targets = drawn(multi_label=False, temperature=2.0)
    logs = torch.log_softmax(torch.from_numpy(scores), dim=-1).numpy()
    of_logits = calibrate(scores, targets, multi_label=False)
    of_logs = calibrate(logs, targets, multi_label=False)
    assert of_logs.temperature == pytest.approx(of_logits.temperature, rel=1e-3)


@pytest.mark.parametrize("multi_label", [True, False])
def test_clips_that_are_told_apart_or_mistaken_end_at_a_bound(multi_label: bool) -> None:
    targets = np.eye(3, dtype=np.float32)[np.arange(30) % 3]
    perfect, contrary = 4 * targets - 2, 2 - 4 * targets
    assert calibrate(perfect, targets, multi_label=multi_label).temperature == LOWEST_TEMPERATURE
    assert calibrate(contrary, targets, multi_label=multi_label).temperature == HIGHEST_TEMPERATURE
    huge = calibrate(1e6 * perfect, targets, multi_label=multi_label)
    assert (huge.temperature, huge.nll_after) == (1.0, 0.0)


def test_thresholds_have_the_best_f1_that_any_cut_has() -> None:
    random = np.random.default_rng(1)
    targets = (random.random((80, 5)) < 0.3).astype(np.float32)
    probabilities = np.round(0.4 * targets + 0.6 * random.random((80, 5)), 1).astype(np.float32)
    chosen = choose_thresholds(probabilities, targets)
    for column in range(5):
        scores, truth = probabilities[:, column], targets[:, column]
        reached = f1_score(truth, scores >= chosen.values[column])
        cuts = [f1_score(truth, scores >= cut) for cut in np.unique(scores)]
        assert chosen.f1[column] == pytest.approx(reached)
        assert reached == pytest.approx(max(cuts))


def test_a_threshold_keeps_neighbours_of_float32_apart() -> None:
    above = np.float32(0.3)
    below = np.nextafter(above, np.float32(0))
    probabilities = np.array([[above], [below]])
    chosen = choose_thresholds(probabilities, np.array([[1.0], [0.0]], dtype=np.float32))
    assert (probabilities >= np.array(chosen.values)).ravel().tolist() == [True, False]
    assert below < chosen.values[0] <= above


def test_a_class_without_positives_has_the_default_and_is_named() -> None:
    scores = np.array([[2.0, 1.0], [-2.0, 1.5]], dtype=np.float32)
    targets = np.array([[1, 0], [0, 0]], dtype=np.float32)
    found = fit_on_validation(scores, targets, classes=("cat", "owl"), multi_label=True)
    assert found["thresholds"][1] == DEFAULT_THRESHOLD
    assert found["default_thresholds"] == ("owl",)
    assert found["validation"]["f1"] == [1.0, None]


def test_a_class_on_every_clip_is_found_on_every_clip() -> None:
    probabilities = np.array([[0.2], [0.9]], dtype=np.float32)
    chosen = choose_thresholds(probabilities, np.ones((2, 1), dtype=np.float32))
    assert chosen.f1 == (1.0,)
    assert 0 < chosen.values[0] < 0.2


def test_a_multi_class_task_has_no_thresholds() -> None:
    scores, targets = drawn(multi_label=False, temperature=1.0)
    found = fit_on_validation(scores, targets, classes=tuple("abcd"), multi_label=False)
    assert set(found) == {"temperature", "validation"}
    assert set(found["validation"]) == {"n_clips", "nll_before", "nll_after"}
