"""How predictions are written: text, a table, JSON lines, or a label track of Audacity."""

from __future__ import annotations

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from patchbank.cli.label_output import Format, Threshold
from patchbank.probing.plain_text import printable

if TYPE_CHECKING:
    from patchbank.cli.predictor import Prediction
    from patchbank.probing.artefact import ProbeArtefact

SUFFIX_OF: dict[Format, str] = {"csv": ".csv", "json": ".jsonl", "audacity": ".txt"}
"""Of a recording's file in a folder of labels."""
GAP_S = 1e-6
"""Seconds that two neighbours may be apart by rounding."""


@runtime_checkable
class TextSink(Protocol):
    """An open file, or stdout."""

    def write(self, text: str, /) -> object: ...


@dataclass(frozen=True)
class Shown:
    """Which classes of a row are written, the likeliest first."""

    artefact: ProbeArtefact
    top: int | None = None
    """None for all."""
    threshold: Threshold = None

    def of(self, probabilities: np.ndarray) -> list[int]:
        """Their indices."""
        order = np.argsort(-probabilities, kind="stable")
        if self.threshold is not None:
            is_there = (
                self.artefact.decide(probabilities[None])[0]
                if self.threshold == "chosen"
                else probabilities >= np.float64(self.threshold)
            )
            order = order[is_there[order]]
        return [int(index) for index in order[: self.top]]


class Writer(ABC):
    """Takes rows, in the order of time within a recording."""

    def __init__(self, file: TextSink, shown: Shown, *, frames: bool = False) -> None:
        self._file, self._shown, self._frames = file, shown, frames
        self._classes: Sequence[str] = shown.artefact.classes

    @abstractmethod
    def row(self, row: Prediction) -> None:
        """Writes a row, or keeps it until the end."""

    def end(self) -> None:  # noqa: B027
        """Writes what was kept."""


class TextWriter(Writer):
    """One line a row, for people, whatever is in names."""

    def row(self, row: Prediction) -> None:
        found = self._shown.of(row.probabilities)
        words = "  ".join(
            f"{printable(self._classes[one])} {row.probabilities[one]:.2f}" for one in found
        )
        digits = 2 if self._frames else 1
        span = f"{row.start_s:.{digits}f}-{row.end_s:.{digits}f} s"
        print(f"{printable(row.clip)}  {span}  {words or '-'}", file=self._file)


class JsonWriter(Writer):
    """One object a line."""

    def row(self, row: Prediction) -> None:
        labels = {
            self._classes[one]: round(float(row.probabilities[one]), 6)
            for one in self._shown.of(row.probabilities)
        }
        start_s, end_s = round(row.start_s, 6), round(row.end_s, 6)
        fact = {"clip": row.clip, "start_s": start_s, "end_s": end_s, "labels": labels}
        print(json.dumps(fact), file=self._file)


class CsvWriter(Writer):
    """The probability of every class, whatever is shown elsewhere."""

    def __init__(self, file: TextSink, shown: Shown, *, frames: bool = False) -> None:
        super().__init__(file, shown, frames=frames)
        self._table = csv.writer(file)
        self._table.writerow(["clip", "start_s", "end_s", *self._classes])

    def row(self, row: Prediction) -> None:
        span = (round(row.start_s, 6), round(row.end_s, 6))
        self._table.writerow([row.clip, *span, *(f"{p:.6f}" for p in row.probabilities)])


class AudacityWriter(Writer):
    """A label track of one recording: start, end and class, with tabs between.

    Neighbours that have a class become one region; nothing is written before the end.
    """

    def __init__(self, file: TextSink, shown: Shown, *, frames: bool = False) -> None:
        super().__init__(file, shown, frames=frames)
        self._regions: dict[int, list[list[float]]] = {}

    def row(self, row: Prediction) -> None:
        for one in self._shown.of(row.probabilities):
            regions = self._regions.setdefault(one, [])
            if regions and row.start_s <= regions[-1][1] + GAP_S:
                regions[-1][1] = max(regions[-1][1], row.end_s)
            else:
                regions.append([row.start_s, row.end_s])

    def end(self) -> None:
        found = sorted((*span, one) for one, spans in self._regions.items() for span in spans)
        for start_s, end_s, one in found:
            # A tab or a line break in a name would be another column, or another label.
            name = printable(" ".join(self._classes[int(one)].split()))
            print(f"{start_s:.6f}\t{end_s:.6f}\t{name}", file=self._file)


WRITERS: dict[Format, type[Writer]] = {
    "text": TextWriter,
    "csv": CsvWriter,
    "json": JsonWriter,
    "audacity": AudacityWriter,
}
