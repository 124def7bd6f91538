"""The protocol behind every reported number.

(a) Search: settings of all probes at seed 0, trained in one pass an epoch; the best on validation
data is chosen. (b) Final: the chosen setting with several seeds, again in one pass. The test split
is scored once, after everything else. Several label sets share all of it.
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
from patchbank.probing.checkpoint import State
from patchbank.probing.entries import Entry
from patchbank.probing.job import Job, Scores, stage_name, validation_values
from patchbank.probing.mean_source import MeanSource
from patchbank.probing.metrics import left_out, primary_metric
from patchbank.probing.probes.base import Probe, Weights
from patchbank.probing.search import Candidate, choose, search
from patchbank.probing.settings import TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.study import Study, Task, course_of, study_of
from patchbank.probing.training import OnProgress, Training
from patchbank.probing.trials import Trial


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
    job = Job(source, settings or TrainSettings(), progress, say or (lambda line: None))
    return train_job(job, tasks, probes)


def train_job(
    job: Job, tasks: Sequence[Task], probes: Sequence[str | Entry]
) -> list[tuple[Outcome, ...]]:
    """`train_tasks`; where the job has a folder, what another process began goes on."""
    tasks = [replace(one, targets=np.ascontiguousarray(one.targets, np.float32)) for one in tasks]
    for task in tasks:
        _check(task)
    entries = _checked_entries(job, probes)
    studies = [study_of(job.source, task, entry) for task in tasks for entry in entries]
    if isinstance(job.source, MeanSource):
        job.source.check({study.name: study.probe for study in studies})
    for study in studies:
        if study.probe.note:
            job.say(f"{study.name}: {study.probe.note}")
    outcomes = iter(_final(job, studies, search(job, studies)))
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


def _checked_entries(job: Job, probes: Sequence[str | Entry]) -> list[Entry]:
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


def _final(
    job: Job, studies: Sequence[Study], candidates: Sequence[tuple[Candidate, ...]]
) -> list[Outcome]:
    seeds = list(range(job.settings.n_seeds))
    courses = [
        course_of(study, job.settings, points=[choose(study.name, tried)] * len(seeds), seeds=seeds)
        for study, tried in zip(studies, candidates, strict=True)
    ]
    training = job.training(studies, courses, "final")
    job.run(studies, training)
    training.save()
    judged = _judged(job, studies, training)
    return [
        Outcome(
            study.entry,
            study.probe,
            tried,
            course.stack.trials,
            tuple(course.stack.weights_of(index) for index in range(len(seeds))),
            valid_scores,
            test_scores,
            validation_values(study.task, course, valid_scores),
        )
        for study, course, tried, (valid_scores, test_scores) in zip(
            studies, courses, candidates, judged, strict=True
        )
    ]


def _judged(job: Job, studies: Sequence[Study], training: Training) -> list[tuple[Scores, Scores]]:
    """Validation and test scores of the final models, read from the bank once in a run's life."""
    kept = job.state.checkpoint(stage_name(studies, "scores"))
    found = None if kept is None else kept.load()
    if found is None:
        valid, values = job.validate(studies, training)
        for study, course, judged in zip(studies, training.courses, values, strict=True):
            _check_converged(study.name, course.stack.trials, judged)
        rows = [study.task.split.test for study in studies]
        job.state.record_test(studies[0].task.split.name, [study.name for study in studies])
        pairs = list(zip(valid, job.scores(studies, training.courses, rows), strict=True))
        if kept is not None:
            kept.save(lambda: _stored(pairs), always=True)
        return pairs
    arrays = {key: value.numpy() for key, value in found.arrays.items()}
    return [(arrays[f"{i}/valid"], arrays[f"{i}/test"]) for i in range(len(studies))]


def _stored(pairs: Sequence[tuple[Scores, Scores]]) -> State:
    arrays = {
        f"{index}/{part}": torch.from_numpy(scores)
        for index, pair in enumerate(pairs)
        for part, scores in zip(("valid", "test"), pair, strict=True)
    }
    return State(arrays, {})


def _check_converged(name: str, trials: Sequence[Trial], values: Sequence[float]) -> None:
    diverged = [trial for trial, value in zip(trials, values, strict=True) if value == -math.inf]
    if diverged:
        seeds = ", ".join(str(trial.seed) for trial in diverged)
        raise TrialError(
            f"probe {name!r} diverged at learning rate {diverged[0].learning_rate:g} with "
            f"seed {seeds}, expected finite losses; pass lower learning rates"
        )
