"""Which rows train, select and test: from the bank, from a table, or by folds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Int, Shaped

from patchbank.pipeline.errors import ManifestError, Problem, TrialError
from patchbank.probing.tables import TextTable, read_table, require_columns

SPLIT_NAMES = ("train", "valid", "test")
Names = Shaped[np.ndarray, " clip"]
"""A name for every row, "" where it has none."""


@dataclass(frozen=True)
class Split:
    """Disjoint rows of a bank; `valid` and `test` hold clean views (view 0) only."""

    name: str
    """ "split", or "fold=K" with the value of the fold that tests."""
    train: Int[np.ndarray, " train"]
    valid: Int[np.ndarray, " valid"]
    test: Int[np.ndarray, " test"]
    n_views: int = 0
    """Usable views by the split's names, those that are left out included."""
    n_views_left_out: int = 0
    """Views that do not train: sound of a clip that is not known to be outside `valid` and `test`
    is in them."""


def read_splits(
    clips: pa.Table,
    *,
    usable: Bool[np.ndarray, " clip"],
    splits_path: Path | None = None,
    folds: str | None = None,
) -> tuple[Split, ...]:
    """One split from `splits_path` or the bank's `split` column, or one for each fold.

    Only rows with tokens (status 1) that are `usable` (labelled) take part. A view trains where its
    own clip and all that is mixed into it are in the bank, and none of them selects or tests; other
    views are left out and counted. Raises `ManifestError` for a wrong table and `TrialError` where
    there is no split or one of its parts is empty.
    """
    if splits_path is not None and folds is not None:
        raise TrialError("found both --splits and --folds, expected one of them")
    usable = usable & (clips.column("status").to_numpy() == 1)
    if folds is not None:
        splits = _by_folds(clips, folds, usable)
    else:
        names = _names(clips, splits_path)
        splits = (_split("split", names, clips, usable),)
    for split in splits:
        _check_filled(split, "SPLITS.csv" if splits_path else "the bank's split column")
    return splits


def _names(clips: pa.Table, splits_path: Path | None) -> Names:
    if splits_path is not None:
        return _from_table(clips, read_table(splits_path))
    if "split" not in clips.column_names:
        raise TrialError(
            "found no split column in the bank, expected to know which clips train and test; "
            "pass --splits SPLITS.csv (clip_id or path, and split) or --folds COLUMN"
        )
    return _column(clips, "split")


def _column(clips: pa.Table, name: str) -> Names:
    values = clips.column(name).to_pylist()
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _from_table(clips: pa.Table, table: TextTable) -> Names:
    """The split of each row of `clips`; rows that the table does not name have none."""
    require_columns(table, ["split"], why="train, valid or test")
    key = "clip_id" if "clip_id" in table.columns else "path"
    require_columns(table, [key], why="clip_id or path: which clip")
    first: dict[str, int] = {}
    keys = clips.column(key).to_pylist()
    known = dict.fromkeys(keys)
    problems = [
        problem
        for row in range(len(table.lines))
        for problem in _check_row(table, row, key, known=known, first=first)
    ]
    if problems:
        raise ManifestError(problems)
    split_of = dict(zip(table.columns[key], table.columns["split"], strict=True))
    return np.array([split_of.get(value, "") for value in keys], dtype=object)


def _check_row(
    table: TextTable, row: int, key: str, *, known: Collection[str], first: dict[str, int]
) -> list[Problem]:
    """What is wrong with one row; `first` remembers where each key stood first."""
    cell, name = table.columns[key][row], table.columns["split"][row]
    problems = []
    if name not in SPLIT_NAMES:
        near = difflib.get_close_matches(name, SPLIT_NAMES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"found {name!r}, expected train, valid or test{hint}"
        problems.append(table.problem(row, "split", message))
    if cell not in known:
        example = next(iter(known), "none")
        message = f"no clip of the bank has {key} {cell!r}, expected one like {example!r}"
        problems.append(table.problem(row, key, message))
    before = first.setdefault(cell, row)
    if table.columns["split"][before] != name:
        message = f"{cell!r} is in another split on line {table.lines[before]}"
        problems.append(table.problem(row, "split", message))
    return problems


def _by_folds(clips: pa.Table, column: str, usable: Bool[np.ndarray, " clip"]) -> tuple[Split, ...]:
    """Test on fold k, select on the next one (cyclically), train on the rest, for every k."""
    if column not in clips.column_names:
        found = ", ".join(clips.column_names)
        raise TrialError(f"found no column {column!r} in the bank for --folds; it has {found}")
    names = _column(clips, column)
    folds = sorted({name for name in names[usable] if name}, key=_natural)
    if len(folds) < 3:
        raise TrialError(
            f"found {len(folds)} folds in column {column!r}, expected at least 3 "
            "(one tests, one selects, the others train); pass --splits SPLITS.csv instead"
        )
    splits = []
    for index, test in enumerate(folds):
        valid = folds[(index + 1) % len(folds)]
        part_of = dict.fromkeys(folds, "train") | {valid: "valid", test: "test"}
        parts = np.array([part_of.get(name, "") for name in names], dtype=object)
        splits.append(_split(f"{column}={test}", parts, clips, usable))
    return tuple(splits)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts numbers inside names by value: fold2 before fold10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def _split(
    name: str,
    parts: Names,
    clips: pa.Table,
    usable: Bool[np.ndarray, " clip"],
) -> Split:
    unknown = sorted({part for part in parts if part and part not in SPLIT_NAMES})
    if unknown:
        raise TrialError(
            f"found split {', '.join(map(repr, unknown))} in the bank, expected train, valid or "
            "test; pass --splits SPLITS.csv"
        )
    clean = is_clean(clips)
    trains = (parts == "train") & usable
    views = np.flatnonzero(trains & ~clean)
    crossing = _crossing(views, parts, clips)
    return Split(
        name,
        np.setdiff1d(np.flatnonzero(trains), crossing),
        np.flatnonzero((parts == "valid") & usable & clean),
        np.flatnonzero((parts == "test") & usable & clean),
        n_views=len(views),
        n_views_left_out=len(crossing),
    )


def is_clean(clips: pa.Table) -> Bool[np.ndarray, " clip"]:
    """Which rows of a bank are view 0 of their clip; holes are not."""
    found: Bool[np.ndarray, " clip"] = pc.fill_null(pc.equal(clips["view"], 0), False).to_numpy()
    return found


def _crossing(
    views: Int[np.ndarray, " view"], parts: Names, clips: pa.Table
) -> Int[np.ndarray, " crossing"]:
    """Those of `views` that hold sound of a clip that selects or tests, or that is not there."""
    if not len(views):
        return views
    ids = clips.column("clip_id").to_pylist()
    part_of = {ids[row]: parts[row] for row in np.flatnonzero(is_clean(clips))}
    mixes: list[list[str] | None] = [None] * len(views)
    if "mix_sources" in clips.column_names:
        mixes = clips.column("mix_sources").take(pa.array(views)).to_pylist()
    # What is not in the bank may be anything: a test clip of the table that the bank is a part of.
    harmless = {clip_id for clip_id, part in part_of.items() if part not in ("valid", "test")}
    crosses = [
        not harmless.issuperset((ids[row], *(mixed or ())))
        for row, mixed in zip(views, mixes, strict=True)
    ]
    crossing: Int[np.ndarray, " crossing"] = views[np.array(crosses, dtype=bool)]
    return crossing


def _check_filled(split: Split, origin: str) -> None:
    counts = {name: len(getattr(split, name)) for name in SPLIT_NAMES}
    empty = [name for name, n_clips in counts.items() if not n_clips]
    if empty:
        found = ", ".join(f"{name} {n_clips}" for name, n_clips in counts.items())
        raise TrialError(
            f"found no usable clips in {' and '.join(empty)} ({found}) by {origin}, expected "
            "labelled clips with tokens in all three; pass --splits SPLITS.csv or --folds COLUMN"
        )
