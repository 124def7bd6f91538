"""What every step of the protocol needs: tokens, settings, and where the run is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from patchbank.probing.batch import TokenSource
from patchbank.probing.metrics import primary_metric, score_trials
from patchbank.probing.passes import Course, predict_logits
from patchbank.probing.plan import BatchRows
from patchbank.probing.run_state import RunState
from patchbank.probing.settings import TrainSettings
from patchbank.probing.study import Study, Task
from patchbank.probing.training import OnProgress, Training, TrialValue, Validated, trial_values

Scores = Float[np.ndarray, "seed _ _"]
"""(seed, clip, class); clips and classes differ between label sets."""


@dataclass(frozen=True)
class Job:
    """One call of the protocol."""

    source: TokenSource
    settings: TrainSettings
    progress: OnProgress | None = None
    say: Callable[[str], None] = lambda line: None
    state: RunState = field(default_factory=RunState)

    def training(self, studies: Sequence[Study], courses: Sequence[Course], stage: str) -> Training:
        """The training of a stage, new or from where it was stopped."""
        stage = stage_name(studies, stage)
        training = Training(
            courses,
            self.source,
            settings=self.settings,
            stage=stage,
            progress=self.progress,
            checkpoint=self.state.checkpoint(stage),
        )
        if training.n_steps_done:
            done = f"{training.n_steps_done} of {training.n_steps} batches"
            self.say(f"{stage}: goes on after {done}")
        return training

    def run(self, studies: Sequence[Study], training: Training, until: int | None = None) -> None:
        """Trains up to an epoch, and says so where memory did not suffice for all at once."""
        n_parts = [len(course.stack.parts) for course in training.courses]
        try:
            training.run(until)
        except KeyboardInterrupt:
            done = f"{training.n_steps_done} of {training.n_steps} batches"
            self.say(f"{training.stage}: stopped after {done}")
            raise
        for study, course, n_before in zip(studies, training.courses, n_parts, strict=True):
            if len(course.stack.parts) > n_before:
                self.say(
                    f"{study.name}: memory did not suffice for all trials at once; they were "
                    f"trained in {len(course.stack.parts)} parts, from the same batches"
                )

    def validate(
        self, studies: Sequence[Study], training: Training
    ) -> tuple[list[Scores], list[tuple[float, ...]]]:
        """Validation scores of every course, and each trial's primary metric (-inf: diverged)."""
        courses = training.courses
        rows = [study.task.split.valid for study in studies]
        scores = self.scores(studies, courses, rows)
        values = [
            validation_values(study.task, course, scored)
            for study, course, scored in zip(studies, courses, scores, strict=True)
        ]
        self._report(studies, training, values)
        return scores, values

    def _report(
        self, studies: Sequence[Study], training: Training, values: Sequence[tuple[float, ...]]
    ) -> None:
        found: dict[str, dict[str, tuple[TrialValue, ...]]] = {}
        for study, course, judged in zip(studies, training.courses, values, strict=True):
            metric: str = primary_metric(multi_label=study.task.multi_label)
            pairs = trial_values(course.stack, judged)
            found.setdefault(metric, {})[study.name] = pairs
        for metric, named in found.items():
            if self.progress is not None:
                self.progress(Validated(training.stage, training.epoch, metric, named))

    def scores(
        self, studies: Sequence[Study], courses: Sequence[Course], rows: Sequence[BatchRows]
    ) -> list[Scores]:
        """Logits of multi-label tasks, log-probabilities of multi-class ones, for some rows."""
        logits = predict_logits(courses, self.source, rows, settings=self.settings)
        # Logits of different clips have no common zero; log-probabilities do, and never tie like
        # probabilities that round to one.
        return [
            one
            if study.task.multi_label
            else torch.log_softmax(torch.from_numpy(one), dim=-1).numpy()
            for one, study in zip(logits, studies, strict=True)
        ]


def stage_name(studies: Sequence[Study], stage: str) -> str:
    """A stage after its fold, where there are folds."""
    split = studies[0].task.split.name
    return stage if split == "split" else f"{split} {stage}"


def validation_values(task: Task, course: Course, scores: Scores) -> tuple[float, ...]:
    """Each trial's primary metric on validation clips, -inf where it diverged."""
    metric = primary_metric(multi_label=task.multi_label)
    finite = course.stack.is_finite.cpu().numpy() & np.isfinite(scores).all(axis=(1, 2))
    values = np.full(len(scores), -math.inf)
    values[finite] = score_trials(metric, task.targets[task.split.valid], scores[finite])
    return tuple(values.tolist())
