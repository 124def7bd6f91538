"""Figures of rounds, their medians and ratios within rounds, and the table that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from extract_cases import Case

WHOLE, NO_START = KINDS = "whole", "without start-up"
BARE = ("encode", "frontend + encode")
AUDIOSET_CLIPS = 2_040_000
COLUMNS = ("", "clips/s", "range", "ratio (range) of what, in the same round")


@dataclass(frozen=True)
class Ratio:
    """Median and range over the rounds that have both figures."""

    median: float
    lowest: float
    highest: float
    n_rounds: int


@dataclass
class Figures:
    """Clips a second by name and round; what was not measured is not there."""

    values: dict[str, dict[int, float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    """Largest of all rounds, bytes."""
    gpu_memory: dict[str, int] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the last round."""

    def add(self, name: str, number: int, value: float | None) -> None:
        if value is not None:
            self.values.setdefault(name, {})[number] = value

    def over_rounds(self, name: str) -> list[float]:
        return list(self.values.get(name, {}).values())

    def median(self, name: str) -> float | None:
        found = self.over_rounds(name)
        return float(np.median(found)) if found else None

    def best(self, prefix: str) -> str | None:
        """Of the names that begin so, the fastest in the median."""
        names = [name for name in self.values if name.startswith(prefix)]
        return max(names, key=lambda name: self.median(name) or 0.0, default=None)

    def ratio(self, above: str, below: str | None) -> Ratio | None:
        """Paired: both of a round had the same neighbours on the machine."""
        over, under = self.values.get(above, {}), self.values.get(below or "", {})
        found = [over[number] / under[number] for number in over.keys() & under.keys()]
        if not found:
            return None
        return Ratio(float(np.median(found)), min(found), max(found), len(found))


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    clips_per_s: float
    lowest: float
    highest: float
    ratios: Mapping[str, Ratio]
    """By what they are ratios of."""


def lines_of(figures: Figures, case: Case) -> Iterator[Line]:
    """The comparisons of one case, as far as it was measured."""
    bare = {what: figures.best(f"{case.name} bare {what}: ") for what in BARE}
    against = {f"bare {what}": name for what, name in bare.items()}
    for what in BARE:
        names = [name for name in figures.values if name.startswith(f"{case.name} bare {what}: ")]
        yield from _lines(figures, names, {})
    for dtype in case.dtypes:
        for kind in KINDS:
            loop = {"the usual loop": f"{case.name} usual loop, {kind}"}
            yield from _lines(figures, [f"{case.name} command {dtype}, {kind}"], against | loop)
    yield from _lines(figures, [f"{case.name} usual loop, {kind}" for kind in KINDS], {})
    for kind in KINDS:
        one = f"{case.name} 1 worker, {kind}"
        pinned = f"{case.name} 1 worker on one core, {kind}"
        yield from _lines(figures, [one, pinned], {})
        yield from _lines(
            figures, [f"{case.name} 2 workers, {kind}"], {"1 worker": one, "pinned": pinned}
        )


def _lines(
    figures: Figures, names: Sequence[str], against: Mapping[str, str | None]
) -> Iterator[Line]:
    for name in names:
        found = figures.over_rounds(name)
        if found:
            ratios = {
                what: ratio for what, of in against.items() if (ratio := figures.ratio(name, of))
            }
            yield Line(name, float(np.median(found)), min(found), max(found), ratios)


def print_lines(lines: Sequence[Line]) -> None:
    """Markdown."""
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|---|---|")
    for line in lines:
        ratios = "; ".join(f"{_text(ratio)} of {what}" for what, ratio in line.ratios.items())
        rates = f"{_rate(line.clips_per_s)} | {_rate(line.lowest)}-{_rate(line.highest)}"
        print(f"| {line.name} | {rates} | {ratios} |")


def _text(ratio: Ratio) -> str:
    if ratio.n_rounds == 1:
        return f"{ratio.median:.2f} (one round)"
    return f"{ratio.median:.2f} ({ratio.lowest:.2f}-{ratio.highest:.2f})"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def memory_notes(figures: Figures, case: Case) -> Iterator[str]:
    """Peaks of every measure."""
    for name, n_bytes in figures.memory.items():
        if name.startswith(f"{case.name} "):
            gpu = figures.gpu_memory.get(name)
            beside = "" if gpu is None else f", {gpu / 2**30:.2f} GiB of GPU memory"
            yield f"{name}: peak memory {n_bytes / 2**30:.2f} GiB{beside}"


def rate_notes(figures: Figures, case: Case, *, n_cores: int, is_gpu: bool) -> Iterator[str]:
    """What follows from the command's rates."""
    for dtype in case.dtypes:
        measured = [f"{case.name} command {dtype}, {kind}" for kind in KINDS]
        rates = {name: rate for name in measured if (rate := figures.median(name))}
        if is_gpu and case.is_encoder:
            for name, rate in rates.items():
                hours = AUDIOSET_CLIPS / rate / 3_600
                yield f"{name}: AudioSet-2M, {AUDIOSET_CLIPS:,} clips, takes {hours:.1f} h"
        if rates and not case.is_encoder:
            # Without start-up where it is known.
            name, rate = list(rates.items())[-1]
            yield (
                f"{name}: {rate / n_cores:,.3g} clips/s a core on {n_cores} cores, cast and "
                f"pooling of the tokens included; an encoder of 1,000 clips/s needs "
                f"{1_000 * n_cores / rate:.1f} such cores"
            )


def profile_table(name: str, profile: Mapping[str, Any]) -> Iterator[str]:
    """What the command said of its stages, as Markdown."""
    yield f"profile of {name}: {profile['n_clips']} clips in {profile['elapsed_s']:.1f} s"
    stages = [{"stage": stage, **facts} for stage, facts in profile["stages"].items()]
    columns = list(stages[0])
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in stages:
        yield f"| {' | '.join(_cell(row[column]) for column in columns)} |"
    yield ""
    yield f"fix next: {profile['advice']}"
    yield ""


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
