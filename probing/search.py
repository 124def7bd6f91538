"""The search for each probe's learning rate and weight decay, on validation data alone.

A round is a set of settings for every probe, trained together in one pass an epoch. After some
epochs only the best of each probe may go on. The first round is laid out beforehand; what the
others try, the rounds before suggest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from patchbank.pipeline.errors import TrialError
from patchbank.probing.job import Job, stage_name
from patchbank.probing.settings import Point, Range, SearchSettings, TrainSettings
from patchbank.probing.study import Study, course_of
from patchbank.probing.training import Training
from patchbank.probing.trial_log import Ranges, TrialLog, Tried, open_storage


@dataclass(frozen=True)
class Candidate:
    """One setting of the search."""

    learning_rate: float
    weight_decay: float
    score: float | None
    """Primary metric on validation data: -inf if it diverged, None if there was no choice."""
    epochs: int | None = None
    """After how many it was left behind; None where it trained to the end."""
    round: int = 0


@dataclass(frozen=True)
class _Hunt:
    """The search of one study."""

    study: Study
    points: tuple[Point, ...]
    """Of the first round."""
    n_rounds: int
    log: TrialLog | None
    """None where there is nothing to choose from."""

    def ask(self, number: int, search: SearchSettings) -> list[Point]:
        assert self.log is not None
        if number == 0:
            return self.log.ask(0, points=self.points)
        return self.log.ask(number, n=search.n_a_round)

    def takes_part(self, number: int) -> bool:
        return self.log is not None and number < self.n_rounds

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        if self.log is None:
            return (Candidate(*self.points[0], None),)
        return tuple(map(_candidate, self.log.tried))


def search(job: Job, studies: Sequence[Study]) -> list[tuple[Candidate, ...]]:
    """Validation scores of every setting that was tried, study by study."""
    hunts = _hunts(job, studies)
    n_rounds = max(hunt.n_rounds for hunt in hunts)
    _say_what_is_left(job, hunts, n_rounds)
    for number in range(n_rounds):
        taking = [hunt for hunt in hunts if hunt.takes_part(number)]
        stage = f"search {number + 1}/{n_rounds}" if n_rounds > 1 else "search"
        if not _is_told(hunts, number):
            _run_round(job, taking, number, stage)
        job.state.forget(stage_name(studies, stage))
    return [hunt.candidates for hunt in hunts]


def _say_what_is_left(job: Job, hunts: Sequence[_Hunt], n_rounds: int) -> None:
    n_done = 0
    while n_done < n_rounds and _is_told(hunts, n_done):
        n_done += 1
    if n_done:
        left = f"{n_rounds - n_done} of {n_rounds} rounds and the final runs"
        where = stage_name([hunt.study for hunt in hunts], "search")
        job.say(f"{where}: left are {left if n_done < n_rounds else 'the final runs'}")


def _is_told(hunts: Sequence[_Hunt], number: int) -> bool:
    """Whether all is known of a round."""
    return all(hunt.log.is_told(number) for hunt in hunts if hunt.log and hunt.takes_part(number))


def _hunts(job: Job, studies: Sequence[Study]) -> list[_Hunt]:
    settings = job.settings
    for line in filter(None, (_unused(settings, study) for study in studies)):
        job.say(line)
    firsts = [first_points(settings, study) for study in studies]
    rounds = [
        _n_rounds(settings, study, len(one)) for study, one in zip(studies, firsts, strict=True)
    ]
    if not any(rounds):
        return [_Hunt(study, one, 0, None) for study, one in zip(studies, firsts, strict=True)]
    storage = open_storage(job.state.journal)
    return [
        _Hunt(study, points, n_rounds, _log(settings, study, points, storage) if n_rounds else None)
        for study, points, n_rounds in zip(studies, firsts, rounds, strict=True)
    ]


def first_points(settings: TrainSettings, study: Study) -> tuple[Point, ...]:
    """The settings of the first round; one that means nothing for probes that do not learn."""
    if not study.probe.learns:
        return (Point(0.0, 0.0),)
    return settings.candidates(study.entry.name, learning_rate_range(settings.search, study))


def learning_rate_range(search: SearchSettings, study: Study) -> Range:
    """That of the entry, of its family, or else the one that the family names itself."""
    for name in (study.entry.name, study.entry.family_name):
        if name in search.learning_rates:
            return search.learning_rates[name]
    return study.probe.learning_rates


def _n_rounds(settings: TrainSettings, study: Study, n_first: int) -> int:
    """Rounds of one study: none without a choice, one where values are given."""
    name = study.entry.name
    is_given = name in settings.learning_rates or name in settings.weight_decays
    further = 0 if is_given or not study.probe.learns else settings.search.n_rounds
    return 1 + further if n_first > 1 or further else 0


def _unused(settings: TrainSettings, study: Study) -> str | None:
    """What of the settings means nothing for a study, where something does not."""
    name = study.entry.name
    is_given = name in settings.learning_rates or name in settings.weight_decays
    if is_given and not study.probe.learns:
        return f"{study.name}: learns nothing, so learning rate and weight decay are not used"
    if is_given and settings.search.n_rounds:
        return f"{study.name}: the values that are given are all that is tried, in one round"
    return None


def _log(
    settings: TrainSettings, study: Study, points: Sequence[Point], storage: object
) -> TrialLog:
    search = settings.search
    name = f"{study.task.split.name}/{study.name}"
    ranges = Ranges(learning_rate_range(search, study), search.weight_decays)
    if _n_rounds(settings, study, len(points)) == 1:
        ranges = Ranges.around(points)
    return TrialLog(name, ranges, storage, seed=search.seed)  # type: ignore[arg-type]


def _run_round(job: Job, hunts: Sequence[_Hunt], number: int, stage: str) -> None:
    search = job.settings.search
    studies = [hunt.study for hunt in hunts]
    asked = [hunt.ask(number, search) for hunt in hunts]
    courses = [
        course_of(study, job.settings, points=points, seeds=[0] * len(points))
        for study, points in zip(studies, asked, strict=True)
    ]
    training = job.training(studies, courses, stage)
    ladder = _Ladder(training, [len(points) for points in asked])
    halts = [epoch for epoch in search.halving_epochs if epoch < training.n_epochs]
    for halt in [*halts, training.n_epochs]:
        if halt <= ladder.last_halt:
            continue
        job.run(studies, training, halt)
        ladder.record(halt, job.validate(studies, training)[1])
        if halt < training.n_epochs:
            training.keep(ladder.best(search.keep))
            training.save(always=False)
    # Killed from here on, the round is told of again: nothing of it needs training.
    training.save()
    for hunt, values in zip(hunts, ladder.values, strict=True):
        assert hunt.log is not None
        hunt.log.tell(number, values, n_epochs=training.n_epochs)


class _Ladder:
    """What each trial of a round was worth after some epochs, kept with the training's state."""

    def __init__(self, training: Training, n_trials: Sequence[int]) -> None:
        self._training = training
        # Pairs, because keys of JSON are no numbers.
        empty: list[list[list[list[float]]]] = [[[] for _ in range(n)] for n in n_trials]
        self._pairs = training.notes.setdefault("values", empty)

    @property
    def last_halt(self) -> int:
        """The last epoch after which trials were judged."""
        epochs = [epoch for course in self._pairs for pairs in course for epoch, _ in pairs]
        return int(max(epochs, default=0))

    @property
    def values(self) -> list[list[dict[int, float]]]:
        """Value by epoch, for every trial of every course."""
        return [
            [{int(epoch): value for epoch, value in pairs} for pairs in course]
            for course in self._pairs
        ]

    def record(self, epoch: int, judged: Sequence[Sequence[float]]) -> None:
        for course, pairs, values in zip(self._training.courses, self._pairs, judged, strict=True):
            for place, value in zip(course.stack.kept, values, strict=True):
                pairs[place].append([epoch, value])

    def best(self, share: float) -> list[list[int]]:
        """Places, among those left, of the best `share` of each course's trials, in their order."""
        found = []
        for course, pairs in zip(self._training.courses, self._pairs, strict=True):
            values = np.array([pairs[place][-1][1] for place in course.stack.kept])
            n_kept = math.ceil(len(values) * share - 1e-9)
            found.append(sorted(np.argsort(-values, kind="stable")[:n_kept].tolist()))
        return found


def _candidate(tried: Tried) -> Candidate:
    if tried.diverged_after is not None:
        return Candidate(*tried.point, -math.inf, tried.diverged_after, tried.round)
    last = max(tried.values)
    epochs = None if tried.is_complete else last
    return Candidate(*tried.point, tried.values[last], epochs, tried.round)


def choose(name: str, candidates: Sequence[Candidate]) -> Point:
    """The setting with the best validation score of those that trained to the end.

    The first of equals, which is the lowest rate where rates ascend.
    """
    complete = [one for one in candidates if one.epochs is None]
    best = max(complete, key=lambda candidate: candidate.score or 0.0, default=None)
    if best is None or best.score == -math.inf:
        diverged = [one.learning_rate for one in candidates if one.score == -math.inf]
        tried = ", ".join(f"{rate:g}" for rate in diverged)
        raise TrialError(
            f"every learning rate of probe {name!r} that was trained to the end diverged (tried "
            f"{tried}), expected one to train; pass lower learning rates, or look for bad tokens: "
            "patchbank bank verify"
        )
    return Point(best.learning_rate, best.weight_decay)
