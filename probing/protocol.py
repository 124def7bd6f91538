"""The protocol behind every reported number.

(a) Search: all settings of all probes at seed 0, trained in one pass an epoch; the best on
validation data is chosen. (b) Final: the chosen setting with several seeds, again in one pass. The
test split is read once, after everything else. Several label sets share all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import TokenSource
from patchbank.probing.entries import Entry
from patchbank.probing.metrics import left_out, primary_metric, score
from patchbank.probing.passes import Course, OnProgress, fit, predict_logits
from patchbank.probing.plan import BatchRows
from patchbank.probing.probes.base import Probe, Weights
from patchbank.probing.settings import Point, TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.study import Study, Task, course_of, study_of
from patchbank.probing.trials import Trial

Scores = Float[np.ndarray, "seed _ _"]
"""(seed, clip, class); clips and classes differ between label sets."""


@dataclass(frozen=True)
class Candidate:
    """One setting of the search."""

    learning_rate: float
    weight_decay: float
    score: float | None
    """Primary metric on validation data: -inf if it diverged, None if there was no choice."""


@dataclass(frozen=True)
class Outcome:
    """One probe, trained and applied to one split."""

    entry: Entry
    probe: Probe
    candidates: tuple[Candidate, ...]
    trials: tuple[Trial, ...]
    """The final ones, one a seed."""
    weights: tuple[Weights, ...]
    """One a seed, on the CPU."""
    valid_scores: Float[np.ndarray, "seed valid class"]
    """Logits of multi-label tasks, log-probabilities of multi-class ones."""
    test_scores: Float[np.ndarray, "seed test class"]
    valid_values: tuple[float, ...]
    """Primary metric on validation data, one a seed."""

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def best_seed(self) -> int:
        """Position of the seed that validation data prefer."""
        return int(np.argmax(self.valid_values))


@dataclass(frozen=True)
class _Job:
    """What every step of the protocol needs."""

    source: TokenSource
    settings: TrainSettings
    progress: OnProgress | None
    say: Callable[[str], None]


def train(
    source: TokenSource,
    targets: Float[np.ndarray, "clip class"],
    split: Split,
    *,
    probes: Sequence[str | Entry],
    multi_label: bool,
    settings: TrainSettings | None = None,
    progress: OnProgress | None = None,
) -> tuple[Outcome, ...]:
    """Searches, trains and applies `probes`, in their order; raises `TrialError`.

    Selection sees validation rows only. The result is decided by its arguments, device and
    number of threads; which other probes are trained beside one changes only rounding.
    """
    task = Task(targets, split, multi_label)
    [outcomes] = train_tasks(source, [task], probes=probes, settings=settings, progress=progress)
    return outcomes


def train_tasks(
    source: TokenSource,
    tasks: Sequence[Task],
    *,
    probes: Sequence[str | Entry],
    settings: TrainSettings | None = None,
    progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
) -> list[tuple[Outcome, ...]]:
    """`train` for several label sets from the same batches; their outcomes, in order.

    Where they do not train on the same rows, each learns from its part of every batch. `say` is
    told how trials are trained where that is not all at once.
    """
    job = _Job(source, settings or TrainSettings(), progress, say or (lambda line: None))
    tasks = [
        Task(
            np.ascontiguousarray(task.targets, np.float32), task.split, task.multi_label, task.name
        )
        for task in tasks
    ]
    tasks = [replace(one, targets=np.ascontiguousarray(one.targets, np.float32)) for one in tasks]
    for task in tasks:
        _check(task)
    entries = _checked_entries(job, probes)
    studies = [study_of(source, task, entry) for task in tasks for entry in entries]
    for study in studies:
        if study.probe.note:
            job.say(f"{study.name}: {study.probe.note}")
    outcomes = iter(_final(job, studies, _search(job, studies)))
    return [tuple(next(outcomes) for _ in entries) for _ in tasks]


def _check(task: Task) -> None:
    metric = primary_metric(multi_label=task.multi_label)
    for name, rows in (("valid", task.split.valid), ("test", task.split.test)):
        if len(left_out(metric, task.targets[rows])) == task.targets.shape[1]:
            raise TrialError(
                f"found no label {f'of {task.name} ' if task.name else ''}on any of the "
                f"{len(rows)} {name} clips of {task.split.name}, "
                f"expected positives to compute {metric}; pass another --splits or --labels"
            )


def _checked_entries(job: _Job, probes: Sequence[str | Entry]) -> list[Entry]:
    if not probes:
        raise TrialError("found no probe to train, expected at least one; pass --probe protobin")
    entries = [Entry.of(probe) for probe in probes]
    names = [entry.name for entry in entries]
    unused = sorted({*job.settings.learning_rates, *job.settings.weight_decays} - set(names))
    if unused:
        raise TrialError(
            f"found settings for {', '.join(unused)}, expected only probes that are trained: "
            f"{', '.join(names)}"
        )
    return entries


def _fit(job: _Job, studies: Sequence[Study], courses: Sequence[Course], stage: str) -> None:
    split = studies[0].task.split.name
    n_parts = [len(course.stack.parts) for course in courses]
    fit(
        courses,
        job.source,
        settings=job.settings,
        stage=stage if split == "split" else f"{split} {stage}",
        progress=job.progress,
    )
    for study, course, n_before in zip(studies, courses, n_parts, strict=True):
        if len(course.stack.parts) > n_before:
            job.say(
                f"{study.name}: memory did not suffice for all trials at once; they were trained "
                f"in {len(course.stack.parts)} parts, from the same batches"
            )


def _search(job: _Job, studies: Sequence[Study]) -> list[tuple[Candidate, ...]]:
    """Validation scores of every setting, from one run of all probes that have several."""
    points = [
        job.settings.candidates(study.entry.name, study.probe.learning_rates)
        if study.probe.learns
        else (Point(0.0, 0.0),)
        for study in studies
    ]
    candidates = [tuple(Candidate(*point, None) for point in one) for one in points]
    searched = [index for index, one in enumerate(points) if len(one) > 1]
    if not searched:
        return candidates
    chosen = [studies[index] for index in searched]
    courses = [
        course_of(
            studies[index], job.settings, points=points[index], seeds=[0] * len(points[index])
        )
        for index in searched
    ]
    _fit(job, chosen, courses, "search")
    for index, values in zip(searched, _validate(job, chosen, courses)[1], strict=True):
        candidates[index] = tuple(
            Candidate(*point, value) for point, value in zip(points[index], values, strict=True)
        )
    return candidates


def _validate(
    job: _Job, studies: Sequence[Study], courses: Sequence[Course]
) -> tuple[list[Scores], list[tuple[float, ...]]]:
    """Validation scores of every course, and each trial's primary metric (-inf if it diverged)."""
    scores = _scores(job, studies, courses, [study.task.split.valid for study in studies])
    return scores, [
        _values(study.task, course, scored)
        for study, course, scored in zip(studies, courses, scores, strict=True)
    ]


def _values(task: Task, course: Course, scores: Scores) -> tuple[float, ...]:
    metric = primary_metric(multi_label=task.multi_label)
    truth = task.targets[task.split.valid]
    return tuple(
        score(metric, truth, one) if finite and np.isfinite(one).all() else -math.inf
        for one, finite in zip(scores, course.stack.is_finite.tolist(), strict=True)
    )


def _scores(
    job: _Job, studies: Sequence[Study], courses: Sequence[Course], rows: Sequence[BatchRows]
) -> list[Scores]:
    logits = predict_logits(courses, job.source, rows, settings=job.settings)
    # Logits of different clips have no common zero; log-probabilities do, and never tie like
    # probabilities that round to one.
    return [
        one if study.task.multi_label else torch.log_softmax(torch.from_numpy(one), dim=-1).numpy()
        for one, study in zip(logits, studies, strict=True)
    ]


def choose(name: str, candidates: Sequence[Candidate]) -> Point:
    """The setting with the best validation score, the first of equals: the lowest rate."""
    best = candidates[0]
    if len(candidates) > 1:
        best = max(candidates, key=lambda candidate: candidate.score or 0.0)
    if best.score == -math.inf:
        tried = ", ".join(f"{candidate.learning_rate:g}" for candidate in candidates)
        raise TrialError(
            f"every learning rate of probe {name!r} diverged (tried {tried}), expected one to "
            "train; pass lower learning rates, or look for bad tokens: patchbank bank verify"
        )
    return Point(best.learning_rate, best.weight_decay)


def _final(
    job: _Job, studies: Sequence[Study], candidates: Sequence[tuple[Candidate, ...]]
) -> list[Outcome]:
    seeds = list(range(job.settings.n_seeds))
    courses = [
        course_of(study, job.settings, points=[choose(study.name, tried)] * len(seeds), seeds=seeds)
        for study, tried in zip(studies, candidates, strict=True)
    ]
    _fit(job, studies, courses, "final")
    valid, values = _validate(job, studies, courses)
    for study, course, judged in zip(studies, courses, values, strict=True):
        _check_converged(study.name, course.stack.trials, judged)
    test = _scores(job, studies, courses, [study.task.split.test for study in studies])
    return [
        Outcome(
            study.entry,
            study.probe,
            tried,
            course.stack.trials,
            tuple(course.stack.weights_of(index) for index in range(len(seeds))),
            valid_scores,
            test_scores,
            judged,
        )
        for study, course, tried, valid_scores, test_scores, judged in zip(
            studies, courses, candidates, valid, test, values, strict=True
        )
    ]


def _check_converged(name: str, trials: Sequence[Trial], values: Sequence[float]) -> None:
    diverged = [trial for trial, value in zip(trials, values, strict=True) if value == -math.inf]
    if diverged:
        seeds = ", ".join(str(trial.seed) for trial in diverged)
        raise TrialError(
            f"probe {name!r} diverged at learning rate {diverged[0].learning_rate:g} with "
            f"seed {seeds}, expected finite losses; pass lower learning rates"
        )
