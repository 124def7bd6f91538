"""Seconds of a training benchmark by round, ratios within rounds, and the tables that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Measure:
    """Something that runs once a round and says its seconds."""

    section: str
    name: str
    run: Callable[[], float]
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.section}: {self.name}"


@dataclass(frozen=True)
class Target:
    """A ratio of the seconds of two measures, and what it is to be."""

    section: str
    name: str
    above: str
    below: str
    limit: float | None = None
    is_most: bool = False
    """The limit is the highest that is good, not the lowest."""

    def is_met(self, ratio: float) -> bool | None:
        if self.limit is None:
            return None
        return ratio <= self.limit if self.is_most else ratio >= self.limit


@dataclass(frozen=True)
class Spread:
    """Median and range over rounds."""

    median: float
    lowest: float
    highest: float
    n_rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(float(np.median(values)), min(values), max(values), len(values))

    def text(self, form: str = ".2f") -> str:
        if self.n_rounds == 1:
            return f"{self.median:{form}} (one round)"
        return f"{self.median:{form}} ({self.lowest:{form}}-{self.highest:{form}})"


@dataclass
class Figures:
    """Seconds by measure and round; what was not measured is not there."""

    seconds: dict[str, dict[int, float]] = field(default_factory=dict)

    def add(self, key: str, number: int, seconds: float) -> None:
        self.seconds.setdefault(key, {})[number] = seconds

    def spread(self, key: str) -> Spread | None:
        found = self.seconds.get(key)
        return Spread.of(list(found.values())) if found else None

    def ratio(self, above: str, below: str) -> Spread | None:
        """Paired: both of a round had the same neighbours on the machine."""
        over, under = self.seconds.get(above, {}), self.seconds.get(below, {})
        found = [over[number] / under[number] for number in over.keys() & under.keys()]
        return Spread.of(found) if found else None


def seconds_table(measures: Sequence[Measure], figures: Figures) -> Iterator[str]:
    """Markdown: what each measure took."""
    yield "| measure | seconds (range) | |"
    yield "|---|---|---|"
    for measure in measures:
        spread = figures.spread(measure.key)
        if spread is not None:
            yield f"| {measure.key} | {spread.text('.3g')} | {measure.note} |"


def ratio_table(targets: Sequence[Target], figures: Figures) -> Iterator[str]:
    """Markdown: ratios within rounds against their targets."""
    yield "| ratio | median (range) | target | |"
    yield "|---|---|---|---|"
    for target in targets:
        ratio = figures.ratio(*keys_of(target))
        if ratio is None:
            continue
        sign = "at most" if target.is_most else "at least"
        asked = "" if target.limit is None else f"{sign} {target.limit:g}"
        met = {True: "met", False: "missed", None: ""}[target.is_met(ratio.median)]
        yield f"| {target.name} | {ratio.text()} | {asked} | {met} |"


def keys_of(target: Target) -> tuple[str, str]:
    return f"{target.section}: {target.above}", f"{target.section}: {target.below}"


def ratios_as_json(targets: Sequence[Target], figures: Figures) -> dict[str, dict[str, object]]:
    found = {}
    for target in targets:
        ratio = figures.ratio(*keys_of(target))
        if ratio is not None:
            found[target.name] = {
                "median": ratio.median,
                "lowest": ratio.lowest,
                "highest": ratio.highest,
                "n_rounds": ratio.n_rounds,
                "target": target.limit,
                "is_met": target.is_met(ratio.median),
            }
    return found
