"""What the pages of a Parquet file claim, counted before Arrow believes them.

Dictionaries, run lengths and null counts let a few bytes stand for gigabytes, and Arrow allocates
what a page's header says. Its own view of a footer is no way out: pyarrow reads
`metadata.row_group(i).column(j)` without catching what C++ throws for a damaged one, which ends the
process. So footer and page headers are read here, as far as sizes and counts go.

Layout: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"PAR1"
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
PLAIN_OR_DICTIONARY = (0, 2, 3, 8)
"""Encodings whose values cannot outgrow their page, but through the dictionary: PLAIN,
PLAIN_DICTIONARY, RLE and RLE_DICTIONARY. In DELTA_BYTE_ARRAY a text may repeat the one before."""
LONGEST_HEADER = 65_536
DEEPEST_STRUCT = 16
BYTES_PER_STRUCT = 8
"""A file has at least so many bytes for each struct in its footer."""


@dataclass(frozen=True)
class Page:
    """What a page's header claims."""

    column: int
    """Which leaf of the schema."""
    n_bytes: int
    """Decompressed."""
    n_values: int
    """With nulls and the elements of lists; Arrow reads no more."""


def pages(path: Path, *, n_columns: int, n_rows: int, chosen: Collection[int]) -> Iterator[Page]:
    """Every page of the chosen leaves, of a file with so many leaves and rows.

    Raises `ValueError` where it is damaged.
    """
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        groups = _row_groups(file, n_bytes)
        if sum(_number(group, 3) for group in groups) != n_rows:
            raise ValueError(f"its row groups do not have {n_rows} rows")
        n_left = n_bytes
        for group in groups:
            columns = group.get(1)
            if not isinstance(columns, list) or len(columns) != n_columns:
                raise ValueError(f"a row group does not have {n_columns} columns")
            for index, column in enumerate(columns):
                start, stop = _extent(column)
                # Columns that share bytes would be walked over and over.
                n_left -= stop - start
                if stop > n_bytes or n_left < 0:
                    raise ValueError("a column lies outside the file")
                if index in chosen:
                    yield from _pages_between(file, start, stop, index)


def _row_groups(file: BinaryIO, n_bytes: int) -> list[dict[int, Any]]:
    file.seek(max(0, n_bytes - 8))
    tail = file.read(8)
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or footer_bytes + 8 > n_bytes:
        raise ValueError("its footer is damaged")
    file.seek(n_bytes - 8 - footer_bytes)
    reader = _CompactReader(file.read(footer_bytes), 1_000 + n_bytes // BYTES_PER_STRUCT)
    groups = reader.struct().get(4)
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("it has no row groups")
    return groups


def _extent(column: Any) -> tuple[int, int]:
    """Where the pages of a column chunk begin and end; as Arrow computes it."""
    facts = column.get(3) if isinstance(column, dict) else None
    if not isinstance(facts, dict) or not set(column) <= {2, 3, 4, 5, 6, 7}:
        raise ValueError("a column is encrypted, or in another file")
    start = _number(facts, 9)
    if dictionary := facts.get(11):
        start = min(start, dictionary)
    return _number({0: start}, 0), start + _number(facts, 7)


def _pages_between(file: BinaryIO, start: int, stop: int, column: int) -> Iterator[Page]:
    while start < stop:
        file.seek(start)
        reader = _CompactReader(file.read(min(LONGEST_HEADER, stop - start)), 100)
        header = reader.struct()
        place, encoding = {DATA: (5, 2), DICTIONARY: (7, 2), DATA_V2: (8, 4)}.get(
            _number(header, 1), (0, 0)
        )
        described = header.get(place)
        if not isinstance(described, dict):
            raise ValueError("a page is of no known kind")
        if _number(described, encoding) not in PLAIN_OR_DICTIONARY:
            raise ValueError("a page has an encoding that no bank has")
        start += reader.position + _number(header, 3)
        if start > stop:
            raise ValueError("a page reaches beyond its column")
        yield Page(column, _number(header, 2), _number(described, 1))


def _number(fields: dict[int, Any], field: int) -> int:
    value = fields.get(field)
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError("its footer or a page's header lacks a number")
    return value


class _CompactReader:
    """Reads Thrift's compact protocol into dicts by field, lists, and whole numbers.

    Texts and floats are passed over. Raises `ValueError` for what is damaged, has a field twice, or
    has more structs than it may.
    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """

    def __init__(self, data: bytes, most_structs: int) -> None:
        self._data, self._n_left = data, most_structs
        self.position = 0

    def struct(self, *, depth: int = 0) -> dict[int, Any]:
        self._n_left -= 1
        if depth > DEEPEST_STRUCT or self._n_left < 0:
            raise ValueError("its footer or a page's header holds too much")
        fields: dict[int, Any] = {}
        field = 0
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._signed()
            if field in fields:
                raise ValueError("its footer or a page's header has a field twice")
            # In a struct, truth is told by the kind.
            fields[field] = None if kind & 15 in (1, 2) else self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self.struct(depth=depth + 1)
        if kind in (9, 10):
            return self._list(depth)
        if kind in (1, 2, 3):
            self._skip(1)
        elif kind == 7:
            self._skip(8)
        elif kind == 8:
            self._skip(self._varint())
        else:
            raise ValueError("its footer or a page's header holds what it should not")
        return None

    def _list(self, depth: int) -> list[Any]:
        kind = self._byte()
        size = kind >> 4 if kind >> 4 < 15 else self._varint()
        if size > len(self._data) - self.position or depth > DEEPEST_STRUCT:
            raise ValueError("its footer or a page's header is cut off")
        return [self._value(kind & 15, depth + 1) for _ in range(size)]

    def _skip(self, n_bytes: int) -> None:
        self.position += n_bytes
        if self.position > len(self._data):
            raise ValueError("its footer or a page's header is cut off")

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.position - 1]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("its footer or a page's header holds a number that is too long")

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
