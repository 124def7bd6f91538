"""How fast the trials of a search are judged, and how long a bootstrap of final scores takes.

    python tests/bench/metrics.py [--trials 50] [--clips 20000] [--classes 527]

Labels are like AudioSet's: 2.7 a clip in the mean, classes as frequent as 1 / rank. scikit-learn
judges `--peer-trials` trials class by class, its fastest way, and its seconds are multiplied up to
all of them; where both judge a trial they must agree. On a busy machine read the processor's
seconds (of all threads), not the clock's. Needs 4 bytes x trials x clips x classes of memory.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, machine_facts
from scipy.special import ndtri
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    label_ranking_average_precision_score,
    roc_auc_score,
)

from patchbank.probing.bootstrap import affordable_resamples, draw_clips, resampled_metrics
from patchbank.probing.metrics import Metric, left_out, metric_names, score_trials

LABELS_PER_CLIP = 2.7
Array = np.ndarray[Any, Any]


def labels(n_clips: int, n_classes: int, random: np.random.Generator) -> Array:
    """Long-tailed multi-label targets."""
    frequency = 1 / np.arange(1, n_classes + 1)
    frequency = np.minimum(0.5, frequency * LABELS_PER_CLIP / frequency.sum())
    return (random.random((n_clips, n_classes)) < frequency).astype(np.float32)


def trials_of(targets: Array, n_trials: int, random: np.random.Generator) -> Array:
    """Scores of trials that know something of the targets."""
    scores = np.empty((n_trials, *targets.shape), dtype=np.float32)
    for trial in scores:
        random.standard_normal(out=trial, dtype=np.float32)
        trial += 2 * targets
    return scores


def scikit_learns(metric: Metric, targets: Array, scores: Array) -> float:
    truth = targets > 0.5
    judged = np.setdiff1d(np.arange(truth.shape[1]), left_out(metric, targets))

    def macro(judge: Callable[[Array, Array], float]) -> float:
        return float(np.mean([judge(truth[:, index], scores[:, index]) for index in judged]))

    if metric == "map_macro":
        return macro(average_precision_score)
    if metric == "map_micro":
        return float(average_precision_score(truth.ravel(), scores.ravel()))
    if metric == "lwlrap":
        n_labels = truth.sum(axis=1)
        return float(label_ranking_average_precision_score(truth, scores, sample_weight=n_labels))
    if metric in ("accuracy", "balanced_accuracy"):
        judge = accuracy_score if metric == "accuracy" else balanced_accuracy_score
        return float(judge(truth.argmax(axis=1), scores.argmax(axis=1)))
    area = macro(roc_auc_score)
    return float(2**0.5 * ndtri(area)) if metric == "d_prime" else area


@dataclass(frozen=True)
class Took:
    """How long something took."""

    clock_s: float
    processor_s: float

    def __str__(self) -> str:
        return f"{self.clock_s:7.2f} {self.processor_s:7.2f}"


def timed(work: Callable[[], Any], *, times: float = 1) -> tuple[Took, Any]:
    clock_s, processor_s = time.perf_counter(), time.process_time()
    found = work()
    clock_s, processor_s = time.perf_counter() - clock_s, time.process_time() - processor_s
    return Took(clock_s * times, processor_s * times), found


def judge(metric: Metric, targets: Array, trials: Array, *, n_peer: int) -> None:
    own, values = timed(lambda: score_trials(metric, targets, trials))
    if not n_peer:
        print(f"{metric:18} {own}", flush=True)
        return
    peer, expected = timed(
        lambda: [scikit_learns(metric, targets, one) for one in trials[:n_peer]],
        times=len(trials) / n_peer,
    )
    np.testing.assert_allclose(values[:n_peer], expected, rtol=1e-9)
    ratios = peer.clock_s / own.clock_s, peer.processor_s / own.processor_s
    print(f"{metric:18} {own} {peer} {ratios[0]:7.1f} {ratios[1]:7.1f}", flush=True)


def resample(targets: Array, finals: Array, *, multi_label: bool) -> None:
    n_seeds, n_clips, n_classes = finals.shape
    n_draws = affordable_resamples(1000, n_seeds=n_seeds, n_clips=n_clips, n_classes=n_classes)
    draws = draw_clips(np.arange(n_clips), n_resamples=n_draws, seed=0)
    metrics = metric_names(multi_label=multi_label)
    took, _ = timed(lambda: resampled_metrics(metrics, targets, finals, draws))
    kind = "multi-label" if multi_label else "multi-class"
    print(f"bootstrap of {n_seeds} seeds, all {kind} metrics, {n_draws} resamples: {took}")


def measure(asked: argparse.Namespace, *, multi_label: bool) -> None:
    random = np.random.default_rng(0)
    targets = labels(asked.clips, asked.classes, random)
    if not multi_label:
        targets = np.eye(asked.classes, dtype=np.float32)[targets.argmax(axis=1)]
    trials, metrics = (
        trials_of(targets, asked.trials, random),
        metric_names(multi_label=multi_label),
    )
    print(
        f"\n{'multi-label' if multi_label else 'multi-class'}: {asked.trials} trials x "
        f"{asked.clips} clips x {asked.classes} classes, "
        f"{targets.sum() / len(targets):.2f} labels a clip"
    )
    print(f"scikit-learn on {asked.peer_trials} of them, multiplied up")
    print(f"{'clock, processor s':18} {'patchbank':>15} {'scikit-learn':>15} {'ratio':>15}")
    for metric in metrics:
        judge(metric, targets, trials, n_peer=min(asked.peer_trials, asked.trials))
    finals = trials[: asked.seeds]
    took, _ = timed(lambda: [score_trials(metric, targets, finals) for metric in metrics])
    print(f"all metrics of {len(finals)} seeds: {took}")
    resample(targets, finals, multi_label=multi_label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("trials", 50), ("clips", 20_000), ("classes", 527), ("peer-trials", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seeds", type=int, default=5, help="of the bootstrap")
    asked = parser.parse_args()
    print(describe(machine_facts(Path.cwd())))
    for multi_label in (True, False):
        measure(asked, multi_label=multi_label)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    n_bytes = 4 * asked.trials * asked.clips * asked.classes
    print(f"\npeak memory {peak / 2**30:.2f} GiB, of which {n_bytes / 2**30:.2f} GiB are scores")


if __name__ == "__main__":
    main()
