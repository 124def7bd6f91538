"""docs/statistics.md: its tables are whole, its constants those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from patchbank.probing.bootstrap import ELEMENT_BUDGET, MIN_RESAMPLES, affordable_resamples
from patchbank.probing.comparison import Contestant, compare
from patchbank.probing.metrics import metric_names

PAGE = (Path(__file__).parents[1] / "docs/statistics.md").read_text("utf-8")


def first_cells(heading: str) -> list[str]:
    """The words in backquotes in the first column of the table under a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [
        word
        for line in section.splitlines()
        if line.startswith("| `")
        for word in re.findall(r"`(\w+)`", line.split("|")[1])
    ]


def test_every_metric_is_told_with_its_tasks() -> None:
    assert set(first_cells("Metrics")) == {
        *metric_names(multi_label=True),
        *metric_names(multi_label=False),
    }
    for task, multi_label in (("multi-label", True), ("multi-class", False)):
        lines = re.findall(rf"^\| `(\w+)` \| (?:both|{task}) \|", PAGE, flags=re.MULTILINE)
        assert set(lines) == set(metric_names(multi_label=multi_label))


def test_every_field_of_a_comparison_is_told() -> None:
    pair = [Contestant(name, 0.5, 0.1, np.array([0.5]), 2) for name in "ab"]
    [row] = compare(pair, metric="map_macro")
    assert set(first_cells("Pairs of probes")) == set(row) - {"metric", "split"}


def test_the_number_of_draws_is_what_the_code_draws() -> None:
    words = " ".join(PAGE.split())
    assert "would pass 2^33, but 100 at least" in words
    assert (ELEMENT_BUDGET, MIN_RESAMPLES) == (2**33, 100)
    found = affordable_resamples(1000, n_seeds=5, n_clips=20_000, n_classes=527)
    assert f"AudioSet's 20,000 x 527 with five seeds has {found}." in words
