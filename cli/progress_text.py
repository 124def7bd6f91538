"""How far some work is, as text, and when to say so."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

FIRST_LINE_S = 2.0
LINE_S, LINE_SHARE = 10.0, 0.1
LEAST_SHARE = 0.01
LONGEST_SILENCE_S = 60.0
SPEED_S = 300.0
"""A batch of a large encoder on a CPU may take a minute: speed is that of the last five."""


@dataclass(frozen=True)
class Unit:
    """What is counted."""

    name: str
    has_speed: bool = False
    tells_start: bool = False
    """Its first step says where the work begins, which need not be at zero."""
    is_bytes: bool = False

    def amount(self, completed: float, total: float) -> str:
        """How much of how much."""
        if self.is_bytes:
            return f"{self._number(completed)} of {self._number(total)}"
        return f"{self._number(completed)}/{self._number(total)} {self.name}"

    def speed(self, per_s: float) -> str:
        """How much a second."""
        if self.is_bytes:
            return f"{self._number(per_s)}/s"
        return f"{per_s:,.{0 if per_s > 9 else 1}f} {self.name}/s"

    def _number(self, value: float) -> str:
        from patchbank.pipeline.specs import human_bytes

        return human_bytes(int(value)) if self.is_bytes else f"{int(value):,}"


CLIPS = Unit("clips", has_speed=True)
EPOCHS = Unit("epochs", tells_start=True)
BYTES = Unit("bytes", has_speed=True, is_bytes=True)


@dataclass
class Pace:
    """When a plain line is due: after 2 s, then every 10 s or tenth of the work.

    A line every 10 s tells of at least 1 % more; one a minute comes in any case.
    """

    _last_s: float | None = None
    _last_share: float = 0.0

    def is_due(self, elapsed_s: float, share: float) -> bool:
        """Whether a line is to be written now; it then counts as written."""
        if self._last_s is None:
            due = elapsed_s >= FIRST_LINE_S
        else:
            since_s, more = elapsed_s - self._last_s, share - self._last_share
            due = (
                since_s >= LONGEST_SILENCE_S
                or (since_s >= LINE_S and more >= LEAST_SHARE)
                or (since_s >= FIRST_LINE_S and more >= LINE_SHARE)
            )
        if due:
            self._last_s, self._last_share = elapsed_s, share
        return due


@dataclass
class State:
    """How far some work is, as text."""

    title: str
    unit: Unit
    began_s: float
    completed: float = 0.0
    total: float | None = None
    note: str = ""
    _samples: deque[tuple[float, float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if not self.unit.has_speed and not self.unit.tells_start:
            # Of clips and bytes the first ones come late, and say nothing of the others.
            self._samples.append((self.began_s, 0.0))

    @property
    def share(self) -> float:
        """Of the work that is done; 0 where nobody knows how much there is."""
        return self.completed / self.total if self.total else 0.0

    def sample(self, now_s: float) -> None:
        """Notes how far it is, for the speed."""
        if self.total is None or (self._samples and self._samples[-1][1] == self.completed):
            return
        self._samples.append((now_s, self.completed))
        while now_s - self._samples[0][0] > SPEED_S:
            self._samples.popleft()

    @property
    def per_s(self) -> float | None:
        """The speed; None until two steps have been seen."""
        if len(self._samples) < 2:
            return None
        (first_s, first), (last_s, last) = self._samples[0], self._samples[-1]
        return (last - first) / (last_s - first_s) if last > first else None

    def text(self, now_s: float) -> str:
        """Amount, speed, the time left."""
        if self.total is None:
            return ", ".join(filter(None, [self.note, f"{clock(now_s - self.began_s)} so far"]))
        parts, per_s = [self.unit.amount(self.completed, self.total)], self.per_s
        if per_s and self.unit.has_speed:
            parts.append(self.unit.speed(per_s))
        if per_s and self.completed < self.total:
            parts.append(f"{clock((self.total - self.completed) / per_s)} left")
        return ", ".join(filter(None, [*parts, self.note]))

    def last_text(self, now_s: float, *, is_whole: bool) -> str:
        """What is said at the end, or where the work was broken off."""
        took = clock(now_s - self.began_s)
        end = f"in {took}" if is_whole else f"stopped after {took}"
        if self.total is None:
            return f"done {end}" if is_whole else end
        amount = self.unit.amount(self.completed, self.total)
        return f"{amount} {end}" if is_whole else f"{amount}, {end}"


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:45, 12:03, 1:02:03."""
    minutes, whole_s = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_s:02}" if hours else f"{minutes}:{whole_s:02}"
