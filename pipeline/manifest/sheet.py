"""A table file as it stands: every cell, and the line on which each row starts."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.errors import ManifestError, Problem

SHEET_SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Sheet:
    """The rows of a CSV or Parquet file; the cells of a CSV are strings."""

    file: str
    """The file's name, for messages."""
    cells: pa.Table
    lines: list[int]
    """Where each row starts: the physical line of a CSV, the row number of a Parquet file."""
    header_line: int | None
    """None for Parquet, whose header is on no line."""

    @property
    def line_word(self) -> str:
        """What the numbers in `lines` count."""
        return "row" if self.header_line is None else "line"


def read_sheet(path: Path) -> Sheet:
    """The table in `path`; `ManifestError` where it is not a well-formed one with rows."""
    suffix = path.suffix.lower()
    if suffix not in SHEET_SUFFIXES:
        raise _error(path, f"found type {suffix!r}, expected {' or '.join(SHEET_SUFFIXES)}")
    return read_list(path)


def read_list(path: Path) -> Sheet:
    """`read_sheet` of a file of any name: all that is not called .parquet is CSV."""
    sheet = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    if not sheet.lines:
        raise _error(path, "the table has no rows; expected one row a recording or segment")
    return sheet


def _error(path: Path, message: str, *, line: int | None = None) -> ManifestError:
    return ManifestError([Problem(str(path), line, None, message)])


def _read_parquet(path: Path) -> Sheet:
    # ParquetFile, because read_table would add columns from folder names like "fold=1".
    try:
        with pq.ParquetFile(path) as file:
            cells = file.read().replace_schema_metadata(None)
    except (pa.ArrowException, OSError) as error:
        raise _error(path, f"cannot be read as Parquet: {_first_line(error)}") from error
    if trouble := _header_trouble(cells.column_names):
        raise _error(path, trouble)
    return Sheet(str(path), cells, list(range(1, cells.num_rows + 1)), None)


def _read_csv(path: Path) -> Sheet:
    records, lines = _csv_records(path)
    if not records:
        raise _error(path, "the file is empty; expected a header line with a column 'path'")
    header = [name.strip() for name in records[0]]
    if trouble := _header_trouble(header):
        raise _error(path, trouble, line=lines[0])
    header_line, rows, lines = lines[0], records[1:], lines[1:]
    _refuse_ragged(path, rows, lines, n_columns=len(header))
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    arrays = [pa.array(column, pa.string()) for column in columns]
    return Sheet(str(path), pa.table(arrays, names=header), lines, header_line)


def _csv_records(path: Path) -> tuple[list[list[str]], list[int]]:
    """The records that hold any text, and the physical line on which each starts."""
    # Strict, because a quote that is never closed would swallow the rest of the file as one cell.
    reader = csv.reader(io.StringIO(_utf8_text(path), newline=""), strict=True)
    records: list[list[str]] = []
    lines: list[int] = []
    line = 1
    try:
        for record in reader:
            if any(record):
                records.append(record)
                lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise _error(path, f"cannot be read as CSV: {error}", line=line) from error
    return records, lines


def _utf8_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _error(path, "is not UTF-8 text; save the table as UTF-8", line=line) from error


def _header_trouble(names: Sequence[str]) -> str | None:
    if "" in names:
        return (
            f"column {list(names).index('') + 1} has no name; name it or remove it "
            "(pandas: to_csv(..., index=False))"
        )
    twice = [repr(name) for name, n_columns in Counter(names).items() if n_columns > 1]
    return f"column {', '.join(twice)} stands twice in the header" if twice else None


def _refuse_ragged(
    path: Path, rows: Sequence[Sequence[str]], lines: Sequence[int], *, n_columns: int
) -> None:
    problems = [
        Problem(str(path), line, None, f"found {len(row)} cells, expected {n_columns}")
        for row, line in zip(rows, lines, strict=True)
        if len(row) != n_columns
    ]
    if problems:
        raise ManifestError(problems)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
