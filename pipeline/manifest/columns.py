"""The columns of a clip table: what they are called and what their cells may hold."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from patchbank.pipeline.errors import Problem
from patchbank.pipeline.manifest.sheet import Sheet

CLIP_COLUMNS = (
    "clip_id",
    "view",
    "path",
    "start_s",
    "duration_s",
    "split",
    "fold",
    "mix_sources",
)
SPLITS = ("train", "valid", "test")
MEANT_SPLITS = {
    "training": "train",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "eval": "test",
    "evaluation": "test",
}

_MEANT_COLUMNS = {
    **dict.fromkeys(("file", "file_name", "filename", "file_path", "filepath"), "path"),
    **dict.fromkeys(("audio", "audio_path", "audio_file", "wav", "relative_path"), "path"),
    **dict.fromkeys(("start", "start_time", "start_seconds", "onset", "offset"), "start_s"),
    **dict.fromkeys(("duration", "dur", "length", "length_s", "duration_seconds"), "duration_s"),
    **dict.fromkeys(("id", "clip", "clipid"), "clip_id"),
}
_RESERVED = re.compile(
    r"status|reason|audio_sha256|n_patches|(sha256|crc32c|n_patches)_.*|layers/.*"
)
"""What a bank writes beside the user's columns; a plain `sha256` of the file stays the user's."""


def is_reserved(name: str) -> bool:
    """Whether a bank writes a column of that name itself."""
    return _RESERVED.fullmatch(name) is not None


def header_problems(sheet: Sheet) -> list[Problem]:
    """A missing `path`, and user columns that a bank needs for itself."""
    names = sheet.cells.column_names
    problems = (
        [] if "path" in names else [Problem(sheet.file, sheet.header_line, None, _no_path(names))]
    )
    for name in names:
        if is_reserved(name):
            message = "a bank writes a column of that name itself; rename yours"
            problems.append(Problem(sheet.file, sheet.header_line, name, message))
    return problems


def _no_path(names: Sequence[str]) -> str:
    found = ", ".join(repr(name) for name in names)
    message = f"no column 'path'; found {found}"
    if len(names) == 1 and (separators := [mark for mark in ";\t|" if mark in names[0]]):
        return f"{message}; expected ',' between columns, not {separators[0]!r}"
    renames = [
        f"{name!r} to {meant!r}"
        for name in names
        if (meant := _meant_column(name)) is not None and meant not in names
    ]
    return f"{message}; rename {', '.join(renames)}" if renames else message


def _meant_column(name: str) -> str | None:
    plain = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    if plain in _MEANT_COLUMNS:
        return _MEANT_COLUMNS[plain]
    close = difflib.get_close_matches(plain, CLIP_COLUMNS, n=1, cutoff=0.8)
    return close[0] if close else None


def user_columns(sheet: Sheet) -> list[str]:
    """The columns that mean nothing to a bank and are kept for their owner."""
    return [name for name in sheet.cells.column_names if name not in CLIP_COLUMNS]


def text_cells(sheet: Sheet, column: str) -> list[str | None]:
    """The cells of a column as strings; None where empty or where there is no such column."""
    if column not in sheet.cells.column_names:
        return [None] * len(sheet.lines)
    cells: list[Any] = sheet.cells[column].to_pylist()
    return [None if cell is None or cell == "" else _text(cell) for cell in cells]


def _text(cell: object) -> str:
    """`cell` as a string; whole numbers without a point, which pandas gives to columns of ints."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


def second_cells(
    sheet: Sheet, column: str, *, zero_allowed: bool
) -> tuple[list[float | None], list[Problem]]:
    """The cells of a column as finite seconds; None where empty, or wrong and so a problem."""
    seconds: list[float | None] = []
    problems = []
    for line, cell in zip(sheet.lines, text_cells(sheet, column), strict=True):
        try:
            seconds.append(None if cell is None else _seconds(cell, zero_allowed=zero_allowed))
        except ValueError as error:
            seconds.append(None)
            problems.append(Problem(sheet.file, line, column, str(error)))
    return seconds, problems


def _seconds(cell: str, *, zero_allowed: bool) -> float:
    try:
        seconds = math.nan if "_" in cell else float(cell)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ValueError(f"found {cell!r}, expected a number of seconds")
    if seconds < 0 or (seconds == 0 and not zero_allowed):
        least = "0 or more" if zero_allowed else "more than 0"
        raise ValueError(f"found {cell}, expected {least} seconds")
    return seconds


def view_cells(sheet: Sheet) -> tuple[list[int], list[Problem]]:
    """The `view` of each row, 0 where empty; whole numbers from 0 to 32,767."""
    views, problems = [], []
    for line, cell in zip(sheet.lines, text_cells(sheet, "view"), strict=True):
        is_number = cell is None or (cell.isascii() and cell.isdigit() and int(cell) < 2**15)
        views.append(int(cell) if cell is not None and is_number else 0)
        if not is_number:
            message = f"found {cell!r}, expected 0 for the clean clip, or the number of a view"
            problems.append(Problem(sheet.file, line, "view", message))
    return views, problems


def mix_cells(sheet: Sheet) -> list[list[str]]:
    """The clips whose sound is mixed into each row: `clip_id`s with `;` between them."""
    cells = text_cells(sheet, "mix_sources")
    return [[name.strip() for name in (cell or "").split(";") if name.strip()] for cell in cells]


def split_problems(sheet: Sheet) -> list[Problem]:
    """Cells of `split` that name no split."""
    if "split" not in sheet.cells.column_names:
        return []
    return [
        Problem(sheet.file, line, "split", _no_split(cell))
        for line, cell in zip(sheet.lines, text_cells(sheet, "split"), strict=True)
        if cell not in SPLITS
    ]


def _no_split(cell: str | None) -> str:
    if cell is None:
        return f"found an empty cell, expected {_one_of(SPLITS)}"
    meant = MEANT_SPLITS.get(cell.strip().lower())
    if meant is None and cell.strip().lower() in SPLITS:
        meant = cell.strip().lower()
    hint = "" if meant is None else f"; write {meant!r}"
    return f"found {cell!r}, expected {_one_of(SPLITS)}{hint}"


def _one_of(words: Iterable[str]) -> str:
    *first, last = (repr(word) for word in words)
    return f"{', '.join(first)} or {last}"


def kept_columns(sheet: Sheet) -> dict[str, pa.ChunkedArray]:
    """`split`, `fold` and `mix_sources` where the table has them, then the user's columns as is."""
    columns: dict[str, pa.ChunkedArray] = {}
    for name in ("split", "fold"):
        if name in sheet.cells.column_names:
            columns[name] = pa.chunked_array([pa.array(text_cells(sheet, name), pa.string())])
    if "mix_sources" in sheet.cells.column_names:
        column = pa.array(mix_cells(sheet), pa.list_(pa.string()))
        columns["mix_sources"] = pa.chunked_array([column])
    return columns | {name: sheet.cells[name] for name in user_columns(sheet)}
