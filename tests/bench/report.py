"""Ratios within rounds, their medians, and the table that holds them against their targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from reading import Sample
from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 100
TITLES = {
    "cold": "Cold, against raw reads",
    "peers": "Cold, other formats",
    "warm": "Warm",
    "write": "Writing, to the last fsync",
}
OWN = "patchbank auto"
OWN_CODES = "int8 auto, codes"


@dataclass(frozen=True)
class Measure:
    """Something to be measured once a round."""

    section: str
    """cold, peers (cold too), warm or write."""
    family: str
    """limit, patchbank, int8 limit, int8, or a peer's package: of its variants the best counts."""
    name: str
    row_bytes: int
    run: Callable[..., Sample]
    setting: str = ""

    @property
    def key(self) -> str:
        return f"{self.section}: {self.name}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    clips_per_s: float | None = None
    lowest: float | None = None
    highest: float | None = None
    gib_per_s: float | None = None
    against: str = ""
    """What `ratio` is a ratio to."""
    ratio: float | None = None
    """Median over rounds of patchbank's clips a second by those of `against`."""
    target: float | None = None

    @property
    def is_met(self) -> bool | None:
        return None if self.target is None or self.ratio is None else self.ratio >= self.target


class Results:
    """Samples of every measure, one a round."""

    def __init__(self, measures: Sequence[Measure]) -> None:
        self._measures = {measure.key: measure for measure in measures}
        self.samples: dict[str, list[Sample]] = {measure.key: [] for measure in measures}

    def rates(self, key: str) -> np.ndarray:
        return np.array([sample.clips_per_s for sample in self.samples[key]])

    def median(self, key: str) -> float:
        return float(np.median(self.rates(key)))

    def ratio(self, above: str | None, below: str | None) -> float | None:
        """Paired: the two of a round had the same disk and the same neighbours."""
        if above is None or below is None:
            return None
        return float(np.median(self.rates(above) / self.rates(below)))

    def keys(self, section: str, *families: str) -> list[str]:
        return [
            key
            for key, measure in self._measures.items()
            if measure.section == section and (not families or measure.family in families)
        ]

    def best(self, keys: Sequence[str]) -> str | None:
        """The fastest in the median: thread count of a limit, or variant of a peer."""
        return max(keys, key=self.median, default=None)

    def first(self, section: str, name: str) -> str | None:
        key = f"{section}: {name}"
        return key if key in self._measures else None

    def row(
        self, key: str, against: str = "", ratio: float | None = None, target: float | None = None
    ) -> Row:
        measure, rates = self._measures[key], self.rates(key)
        median = float(np.median(rates))
        gib_per_s = median * measure.row_bytes / 2**30
        return Row(
            measure.section,
            measure.name + self._chosen_tier(key),
            median,
            rates.min(),
            rates.max(),
            gib_per_s,
            against if ratio is not None else "",
            ratio,
            target if ratio is not None else None,
        )

    def _chosen_tier(self, key: str) -> str:
        """What `auto` came to, where a reader says it."""
        tiers = {str(sample.facts.get("tier", "")).split(":")[0] for sample in self.samples[key]}
        return f" ({'/'.join(sorted(tiers))})" if "auto" in key and tiers != {""} else ""

    def family(self, key: str) -> str:
        return self._measures[key].family

    def as_json(self) -> dict[str, Any]:
        return {
            key: {
                "setting": measure.setting,
                "row_bytes": measure.row_bytes,
                "samples": [asdict(sample) for sample in self.samples[key]],
            }
            for key, measure in self._measures.items()
        }


def table_rows(results: Results) -> list[Row]:
    """The issue's comparisons, of what was measured."""
    return [*_cold(results), *_peers(results), *_warm(results), *_write(results)]


def _cold(results: Results) -> Iterator[Row]:
    for limit_family, family, headline in (
        ("limit", "patchbank", OWN),
        ("int8 limit", "int8", OWN_CODES),
    ):
        limit = results.best(results.keys("cold", limit_family))
        if limit:
            yield results.row(limit)
        for key in results.keys("cold", family):
            target = 0.9 if key == f"cold: {headline}" else None
            yield results.row(key, "of the limit", results.ratio(key, limit), target)


def _peers(results: Results) -> Iterator[Row]:
    keys = results.keys("peers")
    own = results.first("cold", OWN)
    best_of = _best_of_families(results, keys)
    for key in keys:
        goal = 1.3 if key.startswith("peers: zarrs") else 5.0
        target = goal if key in best_of else None
        yield results.row(key, "x it", results.ratio(own, key), target)
    codes, best = results.first("cold", OWN_CODES), results.best(keys)
    if codes and best:
        against = f"x {best.removeprefix('peers: ')}"
        ratio = results.ratio(codes, best)
        yield Row("peers", "int8 codes instead", against=against, ratio=ratio, target=2.5)


def _best_of_families(results: Results, keys: Sequence[str]) -> set[str | None]:
    families = {results.family(key) for key in keys}
    return {results.best(results.keys("peers", family)) for family in families}


def _warm(results: Results) -> Iterator[Row]:
    limit = results.best(results.keys("warm", "limit"))
    if limit:
        yield results.row(limit)
    own = results.first("warm", OWN)
    for key in results.keys("warm", "patchbank"):
        target = 0.9 if key == own else None
        yield results.row(key, "of preadv", results.ratio(key, limit), target)
    others = [
        k for k in results.keys("warm") if results._measures[k].family not in ("limit", "patchbank")
    ]
    for key in others:
        yield results.row(key, "x it", results.ratio(own, key))


def _write(results: Results) -> Iterator[Row]:
    own = results.first("write", "patchbank")
    if own:
        yield results.row(own)
    limit = results.best(results.keys("write", "limit"))
    if limit:
        yield results.row(limit, "x it", results.ratio(own, limit), 0.9)
    for name, target in (("zarr-python, whole shards", 5.0), ("SHA-256 twice, all cores", None)):
        key = results.first("write", name)
        if key:
            yield results.row(key, "x it", results.ratio(own, key), target)


def print_table(rows: Sequence[Row], foot: Sequence[str]) -> None:
    table = Table(
        box=box.SIMPLE_HEAD, width=WIDTH, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True, min_width=31)
    for name in ("clips/s", "range", "GiB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("patchbank is", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            table.add_row(f"[bold]{TITLES[section]}")
        table.add_row(*_cells(row))
    console = Console(width=WIDTH, highlight=False)
    console.print(table)
    for line in foot:
        console.print(line)


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.lowest is None else f"{row.lowest:,.0f}-{row.highest:,.0f}"
    target = "" if row.target is None else f"{row.target:g} {'met' if row.is_met else 'missed'}"
    return (
        f"  {row.name}",
        "" if row.clips_per_s is None else f"{row.clips_per_s:,.0f}",
        spread,
        "" if row.gib_per_s is None else f"{row.gib_per_s:.2f}",
        "" if row.ratio is None else f"{row.ratio:6.2f} {row.against}",
        target,
    )
