"""Tables that people write (CSV or Parquet), as text cells that know their line."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.errors import ManifestError, Problem


@dataclass(frozen=True)
class TextTable:
    """Trimmed text cells by column, and the line in the file of each row."""

    file: str
    columns: dict[str, list[str]]
    lines: list[int]
    """1-based; of a Parquet file the row's number."""

    def problem(self, row: int, column: str, message: str) -> Problem:
        return Problem(self.file, self.lines[row], column, message)


def read_table(path: Path) -> TextTable:
    """The table at `path`, by its suffix; raises `ManifestError` where it is no table."""
    if not path.is_file():
        raise ManifestError([Problem(str(path), None, None, "there is no such file")])
    table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    if not table.lines:
        raise ManifestError([Problem(str(path), None, None, "found no rows, expected some")])
    return table


def require_columns(table: TextTable, names: Iterable[str], *, why: str) -> None:
    """Raises `ManifestError` for every one of `names` that is missing, with the nearest found."""
    problems = []
    for name in names:
        if name in table.columns:
            continue
        near = difflib.get_close_matches(name.lower(), table.columns, n=1, cutoff=0.6)
        hint = f"; rename {near[0]!r}?" if near else ""
        found = ", ".join(table.columns)
        message = f"no such column ({why}); found columns {found}{hint}"
        problems.append(Problem(table.file, 1, name, message))
    if problems:
        raise ManifestError(problems)


def _read_csv(path: Path) -> TextTable:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        message = f"expected CSV in UTF-8, found: {error}"
        raise ManifestError([Problem(str(path), None, None, message)]) from error
    _check_shape(path, header, rows)
    cells = zip(*(row for _, row in rows), strict=True) if rows else [()] * len(header)
    columns = {
        name: [cell.strip() for cell in column] for name, column in zip(header, cells, strict=True)
    }
    return TextTable(str(path), columns, [line for line, _ in rows])


def _check_shape(path: Path, header: list[str], rows: list[tuple[int, list[str]]]) -> None:
    problems = [
        Problem(str(path), 1, name, "found this column twice, expected it once")
        for name in sorted({name for name in header if header.count(name) > 1})
    ]
    problems += [
        Problem(str(path), line, None, f"found {len(row)} cells, expected {len(header)}")
        for line, row in rows
        if len(row) != len(header)
    ]
    if problems:
        raise ManifestError(problems)


def _read_parquet(path: Path) -> TextTable:
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        message = f"expected Parquet, found: {error}"
        raise ManifestError([Problem(str(path), None, None, message)]) from error
    columns = {name: list(_texts(table.column(name))) for name in table.column_names}
    return TextTable(str(path), columns, list(range(1, table.num_rows + 1)))


def _texts(column: pa.ChunkedArray) -> Iterator[str]:
    for value in column.to_pylist():
        if value is None:
            yield ""
        elif isinstance(value, list):
            yield ";".join(str(item) for item in value)
        else:
            yield str(value).strip()
