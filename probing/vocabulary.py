"""The names of the classes, in the order of a probe's outputs."""

from __future__ import annotations

from pathlib import Path

from patchbank.pipeline.errors import ManifestError, Problem
from patchbank.probing.tables import read_table

NAME_COLUMNS = ("name", "display_name")


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Class names from a CSV with a `name` or `display_name` column, or one a line of a text.

    Raises `ManifestError` for a name that is empty or stands twice.
    """
    lines = _csv_names(path) if path.suffix == ".csv" else _text_names(path)
    _check_names(path, lines)
    return tuple(name for _, name in lines)


def _csv_names(path: Path) -> list[tuple[int, str]]:
    table = read_table(path)
    for column in NAME_COLUMNS:
        if column in table.columns:
            return list(zip(table.lines, table.columns[column], strict=True))
    found = ", ".join(table.columns)
    message = f"found columns {found}, expected a column 'name' or 'display_name'"
    raise ManifestError([Problem(str(path), 1, None, message)])


def _text_names(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise ManifestError([Problem(str(path), None, None, "there is no such file")])
    texts = path.read_text(encoding="utf-8-sig").splitlines()
    return [(line, text.strip()) for line, text in enumerate(texts, start=1) if text.strip()]


def _check_names(path: Path, lines: list[tuple[int, str]]) -> None:
    first: dict[str, int] = {}
    problems = []
    for line, name in lines:
        if not name:
            problems.append(Problem(str(path), line, None, "found an empty class name"))
        elif name in first:
            message = f"found class {name!r} again, expected it once (line {first[name]})"
            problems.append(Problem(str(path), line, None, message))
        first.setdefault(name, line)
    if not lines:
        problems.append(Problem(str(path), None, None, "found no class names, expected some"))
    if problems:
        raise ManifestError(problems)
