"""Which clips of a table a bank lacks: what growing it means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from patchbank.pipeline.bank.identity import TABLE_COLUMNS, rows_digest
from patchbank.pipeline.errors import BankMismatch

KEY = ("clip_id", "view")


def added_clips(known: pa.Table, table: pa.Table, *, bank: Path) -> pa.Table:
    """The clips of `table` that are not in `known`, in the table's order and `known`'s types.

    A column without any value in `known` has the table's type.

    `known` is the clip table that the bank was made from. Clips are told apart by `clip_id` and
    `view`, so new ones may stand anywhere. Raises `BankMismatch` where the table lacks a clip of
    the bank, or says something else of it.
    """
    if known.schema == table.schema and rows_digest(known) == rows_digest(table):
        return table.slice(0, 0)
    table = _in_types(known, table, bank=bank)
    place_of = {key: row for row, key in enumerate(_keys(table))}
    lacking = [key for key in _keys(known) if key not in place_of]
    if lacking:
        raise BankMismatch(
            f"{bank} holds clips that the table lacks: {len(lacking)}, first {lacking[0][0]}; a "
            "bank only grows: take a smaller one with `patchbank bank convert`, or choose another "
            "--out",
            {"n_clips": (len(known), len(table))}
            if len(known) != len(table)
            else {"clip_id": (lacking[0][0], None)},
        )
    _check_unchanged(known, table.take([place_of[key] for key in _keys(known)]), bank=bank)
    there = set(_keys(known))
    new = [row for key, row in place_of.items() if key not in there]
    return table.take(pa.array(new, pa.int64()))


def _keys(table: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in KEY), strict=True))


def _in_types(known: pa.Table, table: pa.Table, *, bank: Path) -> pa.Table:
    """`table` with the columns of `known`, in its order and types."""
    if set(table.column_names) != set(known.column_names):
        found, expected = _user_columns(known), _user_columns(table)
        raise BankMismatch(
            f"{bank} was made from a table with other columns; bring the same ones",
            {"columns": (found, expected)},
        )
    columns = {}
    for field in known.schema:
        if pa.types.is_null(field.type):
            columns[field.name] = table[field.name]
            continue
        try:
            columns[field.name] = table[field.name].cast(field.type)
        except pa.ArrowException as error:
            raise BankMismatch(
                f"{bank} holds another type of column {field.name}, which the table's values do "
                f"not fit ({str(error).splitlines()[0]})",
                {f"type of {field.name}": (str(field.type), str(table[field.name].type))},
            ) from error
    return pa.table(columns)


def _user_columns(table: pa.Table) -> list[str]:
    return sorted(name for name in table.column_names if name not in TABLE_COLUMNS)


def _check_unchanged(known: pa.Table, table: pa.Table, *, bank: Path) -> None:
    for name in known.column_names:
        for row, (found, expected) in enumerate(_pairs(known, table, name)):
            if _text(found) != _text(expected):
                clip_id = known["clip_id"][row].as_py()
                raise BankMismatch(
                    f"{bank} was made with another {name} of clip {clip_id}; leave the table as it "
                    "was, or choose another --out (train-probe takes other splits: --splits)",
                    {name: (found, expected)},
                )


def _text(value: object) -> str:
    """A value as digests see it: NaN equals NaN, in a list too."""
    return json.dumps(value, default=str)


def _pairs(known: pa.Table, table: pa.Table, name: str) -> Iterator[tuple[Any, Any]]:
    return zip(known[name].to_pylist(), table[name].to_pylist(), strict=True)
