"""Which clips belong together: those of one recording, site or speaker, that are no two witnesses.

A bootstrap draws such groups, not clips, and no group may lie in two parts of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from patchbank.pipeline.errors import TrialError

KNOWN_COLUMNS = ("group", "recording", "path")
"""Columns of a bank's clips that name groups, the most telling first."""


@dataclass(frozen=True)
class Groups:
    """The group of every row of a bank."""

    column: str
    """Of the bank's clips."""
    names: tuple[str, ...]
    """A row without a name in that column has that of its recording, `path=...`."""


def read_groups(clips: pa.Table, column: str | None = None) -> Groups:
    """Groups by `column`, else by the first of `group`, `recording` and `path` that there is."""
    if column is None:
        column = next(name for name in KNOWN_COLUMNS if name in clips.column_names)
    elif column not in clips.column_names:
        found = ", ".join(clips.column_names)
        raise TrialError(f"found no column {column!r} in the bank for --group; it has {found}")
    paths = clips.column("path").to_pylist()
    cells = clips.column(column).to_pylist()
    return Groups(
        column,
        tuple(
            f"path={path}" if is_empty(cell) else str(cell)
            for cell, path in zip(cells, paths, strict=True)
        ),
    )


def is_empty(cell: object) -> bool:
    """Whether a cell names no group."""
    return cell is None or cell == ""


def group_numbers(clip_ids: Sequence[str], groups: Sequence[str]) -> Int[np.ndarray, " clip"]:
    """Numbers 0, 1, ... of the groups in the order in which sorted clip ids first have them.

    Neither the order of clips nor the groups' names decide them, so that two runs on the same test
    clips resample alike.
    """
    numbers: dict[str, int] = {}
    for _, group in sorted(zip(clip_ids, groups, strict=True)):
        numbers.setdefault(group, len(numbers))
    return np.array([numbers[group] for group in groups], dtype=np.int64)
