"""What a search has tried, in Optuna's storage: in memory, or in a journal that survives a kill.

A study of Optuna is one probe on one split. Its trials carry the number of their round, and are
asked for and told of in whole rounds; what happens between is the business of checkpoints.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.pipeline.errors import TrialError
from patchbank.probing.randomness import derived_seed
from patchbank.probing.settings import Point, Range

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

ROUND = "round"
DIVERGED = "diverged"


@dataclass(frozen=True)
class Ranges:
    """Where a search may look, evenly in logarithm where the lowest is above zero."""

    learning_rate: Range
    weight_decay: Range

    @classmethod
    def around(cls, points: Sequence[Point]) -> Ranges:
        """The smallest that hold some points."""
        rates, decays = zip(*points, strict=True)
        return cls((min(rates), max(rates)), (min(decays), max(decays)))


@dataclass(frozen=True)
class Tried:
    """One setting, and what came of it."""

    point: Point
    round: int
    values: Mapping[int, float]
    """Primary metric on validation data after some epochs; empty where nothing is known yet."""
    is_complete: bool
    """Whether it trained to the end; the others were left behind, or diverged."""
    diverged_after: int | None = None
    """The last epoch that it was judged after, where it diverged; 0 where it never was."""


def open_storage(journal: Path | None) -> BaseStorage:
    """The storage in a file, which only this process may use; in memory without one."""
    with _quiet():
        from optuna.storages import InMemoryStorage, JournalStorage
        from optuna.storages.journal import JournalFileBackend

        if journal is None:
            return InMemoryStorage()
        _mend(journal)
        try:
            return JournalStorage(JournalFileBackend(str(journal)))
        except (ValueError, KeyError, TypeError) as error:
            raise TrialError(
                f"cannot read {journal} ({error}), expected what the search has tried; remove that "
                "file to search again"
            ) from error


def _mend(journal: Path) -> None:
    """Takes away what a killed process left: half a line, and a lock on the file."""
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if journal.is_file():
        content = journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            journal.write_bytes(whole)


class TrialLog:
    """The settings of one probe on one split."""

    def __init__(self, name: str, ranges: Ranges, storage: BaseStorage, *, seed: int) -> None:
        self.name, self._ranges, self._storage, self._seed = name, ranges, storage, seed

    def ask(self, number: int, *, points: Sequence[Point] = (), n: int = 0) -> list[Point]:
        """The settings of round `number`: `points`, or `n` suggestions.

        Those that were asked for before are the same again, also where that was cut short.
        """
        self._give_up_halves()
        found = self._of_round(number)
        for index in range(len(found), len(points) or n):
            point = points[index] if points else None
            with _quiet():
                self._ask(number, index, point)
        return [_point(trial) for trial in self._of_round(number)]

    def _ask(self, number: int, index: int, point: Point | None) -> None:
        from optuna.trial import TrialState

        study = self._study(derived_seed(f"tpe/{self.name}", self._seed, number, index))
        if point is None:
            trial = study.ask(self._distributions())
            trial.set_user_attr(ROUND, number)
            return
        # One that waits was put there by a process that was killed before it asked for it.
        if not study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            study.enqueue_trial(point._asdict(), user_attrs={ROUND: number})
        study.ask(self._distributions())

    def tell(self, number: int, values: Sequence[Mapping[int, float]], *, n_epochs: int) -> None:
        """What each setting of a round was worth, by epoch; NaN or infinite where it diverged."""
        from optuna.trial import TrialState

        for trial, known in zip(self._of_round(number), values, strict=True):
            if trial.state.is_finished():
                continue
            finite = {epoch: value for epoch, value in known.items() if math.isfinite(value)}
            diverged, is_complete = len(finite) < len(known), n_epochs in finite
            with _quiet():
                if diverged:
                    # Without a value it is the worst of all to the sampler; what it was worth
                    # before would lead there again.
                    last = max(finite, default=0)
                    self._storage.set_trial_user_attr(trial._trial_id, DIVERGED, last)
                    finite = {}
                for epoch, value in finite.items():
                    self._storage.set_trial_intermediate_value(trial._trial_id, epoch, value)
                state = TrialState.COMPLETE if is_complete else TrialState.PRUNED
                told = [finite[n_epochs]] if is_complete else None
                self._storage.set_trial_state_values(trial._trial_id, state, told)

    def is_told(self, number: int) -> bool:
        """Whether all is known of a round."""
        trials = self._of_round(number)
        return bool(trials) and all(trial.state.is_finished() for trial in trials)

    @property
    def tried(self) -> tuple[Tried, ...]:
        """Everything so far, round by round."""
        return tuple(map(_tried, self._trials()))

    def _give_up_halves(self) -> None:
        """Settings that a process was killed over while it asked for them."""
        from optuna.trial import TrialState

        with _quiet():
            study = self._study(0)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if not _is_whole(trial):
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def _of_round(self, number: int) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if trial.user_attrs[ROUND] == number]

    def _trials(self) -> list[FrozenTrial]:
        with _quiet():
            return list(filter(_is_whole, self._study(0).get_trials(deepcopy=False)))

    def _study(self, seed: int) -> Study:
        import optuna

        # A sampler a suggestion: what it draws then depends on what is known, and on nothing that
        # a killed process would take with it.
        return optuna.create_study(
            study_name=self.name,
            storage=self._storage,
            load_if_exists=True,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(
                seed=seed % 2**32, constant_liar=True, n_startup_trials=1
            ),
        )

    def _distributions(self) -> dict[str, BaseDistribution]:
        from optuna.distributions import FloatDistribution

        return {
            name: FloatDistribution(lowest, highest, log=lowest > 0)
            for name, (lowest, highest) in vars(self._ranges).items()
        }


def _is_whole(trial: FrozenTrial) -> bool:
    """Whether all is there that asking for a setting writes."""
    return ROUND in trial.user_attrs and len(trial.params) == len(Point._fields)


def _point(trial: FrozenTrial) -> Point:
    return Point(float(trial.params["learning_rate"]), float(trial.params["weight_decay"]))


def _tried(trial: FrozenTrial) -> Tried:
    from optuna.trial import TrialState

    return Tried(
        _point(trial),
        int(trial.user_attrs[ROUND]),
        dict(sorted(trial.intermediate_values.items())),
        trial.state == TrialState.COMPLETE,
        trial.user_attrs.get(DIVERGED),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna says every step at length, and that a constant liar is new."""
    logger = logging.getLogger("optuna")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            warnings.filterwarnings("ignore", message=".*(experimental|constant_liar).*")
            yield
    finally:
        logger.setLevel(before)
