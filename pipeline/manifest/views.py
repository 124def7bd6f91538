"""The variants of a clip: what a table may say of views and of what is mixed into them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from patchbank.pipeline.errors import Problem
from patchbank.pipeline.manifest.sheet import Sheet

PARTS = ("split", "fold")


def view_problems(sheet: Sheet, clips: pa.Table, lines: Sequence[int]) -> list[Problem]:
    """Views and mixes that would carry a clip into another split or fold, or that do not exist.

    A view, and every clip that is mixed into it, share split and fold with its clean clip: else
    what a probe learns from the view is what it is tested on.
    """
    columns: dict[str, list[Any]] = {
        name: clips[name].to_pylist()
        for name in ("clip_id", "view", *PARTS, "mix_sources")
        if name in clips.column_names
    }
    clean = {
        clip_id: row
        for row, (clip_id, view) in enumerate(zip(columns["clip_id"], columns["view"], strict=True))
        if view == 0
    }
    found = (_problems_of(columns, row, clean) for row in range(len(lines)))
    return [
        Problem(sheet.file, lines[row], column, message)
        for row, problems in enumerate(found)
        for column, message in problems
    ]


def _problems_of(
    columns: dict[str, list[Any]], row: int, clean: dict[str, int]
) -> Iterator[tuple[str, str]]:
    clip_id = columns["clip_id"][row]
    if columns["view"][row] and clip_id not in clean:
        yield "view", f"view {columns['view'][row]} of {clip_id!r}, which has no view 0"
    sources = columns["mix_sources"][row] if "mix_sources" in columns else []
    if sources and not columns["view"][row]:
        yield "mix_sources", f"{clip_id!r} is a mix, expected a view above 0"
    for name in [clip_id, *(sources or [])]:
        if name not in clean:
            if name != clip_id:
                yield "mix_sources", f"no clip {name!r} with view 0 in this table"
            continue
        for part in PARTS:
            if part in columns and columns[part][clean[name]] != columns[part][row]:
                yield (
                    part,
                    f"{clip_id!r} has {part} {columns[part][row]!r}, {name!r}, whose sound it "
                    f"holds, has {columns[part][clean[name]]!r}",
                )
