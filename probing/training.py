"""Passes over a bank: one read of the tokens feeds every trial of every probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import Batch, TokenSource
from patchbank.probing.checkpoint import Checkpoint, State
from patchbank.probing.interruption import stopping_between_batches
from patchbank.probing.memory import MemoryStack
from patchbank.probing.optimiser import cosine_factor
from patchbank.probing.passes import BatchTokens, Course, Part, last_layer, union
from patchbank.probing.plan import BatchRows, batches
from patchbank.probing.probes.tokens import Buffers
from patchbank.probing.settings import TrainSettings
from patchbank.probing.trials import Trial, TrialStack


@dataclass(frozen=True)
class Progress:
    """An epoch has ended."""

    stage: str
    """What the pass is for: "search", "search 2/6" or "final", after the fold where there are
    folds."""
    epoch: int
    """1-based."""
    n_epochs: int
    losses: dict[str, tuple[TrialValue, ...]]
    """The mean training loss of each probe's trials; infinite where one diverged."""


@dataclass(frozen=True)
class Validated:
    """Trials were judged on validation data."""

    stage: str
    epoch: int
    """Complete epochs."""
    metric: str
    values: dict[str, tuple[TrialValue, ...]]


@dataclass(frozen=True)
class Step:
    """A stage has begun or gone on, or a batch of it is done."""

    stage: str
    n_steps_done: int
    n_steps: int
    n_epochs: int


class TrialValue(NamedTuple):
    """A number that belongs to a trial."""

    trial: Trial
    value: float
    number: int
    """Of the trial among those that began together."""


Event = Step | Progress | Validated
OnProgress = Callable[[Event], None]


def trial_values(
    stack: TrialStack | MemoryStack, values: Iterable[float]
) -> tuple[TrialValue, ...]:
    """One number for each trial of a stack."""
    return tuple(map(TrialValue, stack.trials, values, stack.kept))


def fit(
    courses: Sequence[Course],
    source: TokenSource,
    *,
    settings: TrainSettings,
    stage: str = "train",
    progress: OnProgress | None = None,
) -> None:
    """Trains all stacks, reading the rows of all courses once an epoch, in an order they share.

    A course whose rows are fewer than the others' learns from its part of each batch, so that its
    batches are smaller than alone. Stacks that only remember see the first epoch.
    """
    Training(courses, source, settings=settings, stage=stage, progress=progress).run()


class Training:
    """`fit` under way: it can halt after an epoch, leave trials behind, and go on.

    With a `checkpoint` it also goes on where another process was stopped, from the state that was
    written last, to the same result.
    """

    def __init__(
        self,
        courses: Sequence[Course],
        source: TokenSource,
        *,
        settings: TrainSettings,
        stage: str = "train",
        progress: OnProgress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.courses, self._source, self._settings = list(courses), source, settings
        self.stage, self._progress, self._checkpoint = stage, progress, checkpoint
        self.notes: dict[str, Any] = {}
        """Plain JSON that the caller finds again where training goes on."""
        self._rows = union([course.rows for course in courses])
        self._pupils = _pupils(self.courses, source, self._rows, settings)
        self._buffers = Buffers()
        self._n_batches = -(-len(self._rows) // settings.batch_size)
        self.n_epochs, self.n_steps, self._n_updates = self._length()
        self.n_steps_done = 0
        self._restore()

    def _length(self) -> tuple[int, int, int]:
        """Epochs, the last of which may end early, batches, and those that are learned from."""
        settings = self._settings
        if not any(pupil.learns for pupil in self._pupils):
            return 1, self._n_batches, 0
        n_updates = settings.n_steps or settings.n_epochs * self._n_batches
        if settings.n_warmup_steps >= n_updates:
            raise TrialError(
                f"found warmup_steps={settings.n_warmup_steps} of {n_updates} steps in all, "
                "expected fewer; set it in a file, --config FILE.toml, or train longer"
            )
        remembers = not all(pupil.learns for pupil in self._pupils)
        # What remembers is to have seen every clip, also where others learn from some only.
        n_steps = max(n_updates, self._n_batches) if remembers else n_updates
        return -(-n_steps // self._n_batches), n_steps, n_updates

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return (
            self.n_epochs
            if self.n_steps_done >= self.n_steps
            else self.n_steps_done // self._n_batches
        )

    def run(self, until: int | None = None) -> None:
        """Trains up to and with epoch `until` (1-based), or to the end."""
        last = self.n_epochs if until is None else min(until, self.n_epochs)
        self._tell_step()
        with stopping_between_batches() as wants_to_stop:
            while self.epoch < last:
                self._run_epoch(self.epoch, wants_to_stop)

    def _run_epoch(self, epoch: int, wants_to_stop: Callable[[], bool]) -> None:
        settings = self._settings
        plan = batches(
            self._rows, batch_size=settings.batch_size, seed=settings.order_seed, epoch=epoch
        )
        first = self.n_steps_done - epoch * self._n_batches
        for batch in self._source.read(plan[first : self.n_steps - epoch * self._n_batches]):
            factor = cosine_factor(
                self.n_steps_done,
                n_steps=self._n_updates,
                n_warmup_steps=settings.n_warmup_steps,
                lowest=settings.lowest_rate,
            )
            tokens = BatchTokens(batch, settings, self._buffers)
            for pupil in self._pupils:
                if self.n_steps_done < self._n_updates if pupil.learns else epoch == 0:
                    pupil.step(batch, tokens, factor=factor)
            self.n_steps_done += 1
            self._tell_step()
            if wants_to_stop():
                self.save()
                raise KeyboardInterrupt
            self.save(always=False)
        losses = {one.name: one.mean_losses() for one in self._pupils if one.learns}
        if self._progress is not None:
            self._progress(Progress(self.stage, epoch + 1, self.n_epochs, losses))

    def _tell_step(self) -> None:
        if self._progress is not None:
            self._progress(Step(self.stage, self.n_steps_done, self.n_steps, self.n_epochs))

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Leaves all trials of each course behind but those at these places."""
        for course, pupil, trials in zip(self.courses, self._pupils, kept, strict=True):
            if len(trials) < len(course.stack.trials):
                assert isinstance(course.stack, TrialStack)  # what remembers is not searched
                course.stack.keep(trials)
                pupil.begin_epoch()

    def save(self, *, always: bool = True) -> None:
        """Writes a checkpoint, where there is one to write."""
        if self._checkpoint is not None:
            self._checkpoint.save(self._state, always=always)

    def _state(self) -> State:
        arrays = {
            f"{index}/{key}": value
            for index, course in enumerate(self.courses)
            for key, value in course.stack.state.items()
        }
        device = self._settings.torch_device.type
        return State(arrays, {"step": self.n_steps_done, "notes": self.notes, "device": device})

    def _restore(self) -> None:
        if self._checkpoint is None or (state := self._checkpoint.load()) is None:
            return
        found, expected = self._settings.torch_device.type, state.facts["device"]
        if found != expected:
            raise TrialError(
                f"{self.stage} was begun on {expected}, found {found}; go on with --device "
                f"{expected}, or begin this stage again: remove {self._checkpoint.path}"
            )
        self.n_steps_done, self.notes = int(state.facts["step"]), dict(state.facts["notes"])
        for index, (course, pupil) in enumerate(zip(self.courses, self._pupils, strict=True)):
            prefix = f"{index}/"
            course.stack.restore(
                {
                    key.removeprefix(prefix): value
                    for key, value in state.arrays.items()
                    if key.startswith(prefix)
                }
            )
            pupil.begin_epoch()


def _pupils(
    courses: Sequence[Course], source: TokenSource, rows: BatchRows, settings: TrainSettings
) -> list[_Pupil]:
    parts = {
        id(course.rows): Part(course.rows, n_rows=source.n_rows)
        for course in courses
        if len(course.rows) < len(rows)
    }
    # Courses of one label set share their targets, in the memory of the device too.
    targets = {
        id(course.targets): torch.from_numpy(course.targets).to(
            settings.torch_device, settings.torch_dtype
        )
        for course in courses
    }
    return [
        _Pupil(
            course,
            parts.get(id(course.rows)),
            targets[id(course.targets)],
            layers=course.layers or last_layer(source),
        )
        for course in courses
    ]


class _Pupil:
    """A course under way."""

    def __init__(
        self,
        course: Course,
        part: Part | None,
        targets: Float[Tensor, "clip class"],
        *,
        layers: tuple[int, ...],
    ) -> None:
        self._course, self._part, self._targets, self._layers = course, part, targets, layers
        self.name = course.name or course.stack.name
        self.learns = course.stack.probe.learns
        self.begin_epoch()

    def step(self, batch: Batch, tokens: BatchTokens, *, factor: float) -> None:
        """Learns from the rows of a batch that are of its course."""
        rows = np.asarray(batch.rows, dtype=np.int64)
        if self._part is not None:
            rows = rows[self._part.places(batch)]
        if not len(rows):
            return
        wanted, seen = self._targets[torch.from_numpy(rows)], tokens.of(self._layers, self._part)
        self._total += self._course.stack.step(seen, wanted, self._course.loss, factor=factor)
        self._n_steps += 1

    def mean_losses(self) -> tuple[TrialValue, ...]:
        """The mean loss of each trial since it was asked last."""
        means = self._total.nan_to_num(nan=math.inf, posinf=math.inf) / max(1, self._n_steps)
        self.begin_epoch()
        return trial_values(self._course.stack, means.tolist())

    def begin_epoch(self) -> None:
        """Forgets the losses, of all trials that are left."""
        n_trials = len(self._course.stack.trials)
        self._total, self._n_steps = torch.zeros(n_trials, device=self._targets.device), 0
