"""Labels of a bank's rows, joined from a table that people write.

The `labels` column holds class names with `;` between them; an empty cell says that a clip has
none of the classes. A row is keyed by `clip_id`, by `path` (all clips of that recording) or by
`path,start_s,end_s` (an event: every clip that overlaps it gets its labels). A view has the labels
of its clip, and of every clip that is mixed into it. What the task is, clean clips (view 0) say: a
mix of several classes is a soft target of a multi-class task.
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from patchbank.pipeline.errors import ManifestError, Problem
from patchbank.probing.splits import is_clean
from patchbank.probing.tables import TextTable, read_table, require_columns

TaskKind = Literal["auto", "multilabel", "multiclass"]
RESERVED = "clip_id"
"""No class may have this name: tables of predictions have a column a class beside it."""


@dataclass(frozen=True)
class LabelSet:
    """What is known of each row of a bank."""

    classes: tuple[str, ...]
    targets: Float[np.ndarray, "clip class"]
    """float32, 1 where the clip has the class; zero rows where nothing is known. Of a multi-class
    task each of the k classes of a view has 1 / k."""
    known: Bool[np.ndarray, " clip"]
    multi_label: bool
    n_unlabelled: int = 0
    """Rows with tokens but without labels, left out on request."""


@dataclass
class _Join:
    """The label table on its way onto the rows of a bank."""

    clips: pa.Table
    table: TextTable
    classes: tuple[str, ...]
    targets: Float[np.ndarray, "clip class"]
    line: Int[np.ndarray, " clip"]
    """Line that first said something about the row, 0 where none did."""
    problems: list[Problem] = field(default_factory=list)
    lacking: dict[int, str] = field(default_factory=dict)
    """Views that hold the sound of a clip that is not in the bank, and that clip."""


def read_labels(
    path: Path,
    clips: pa.Table,
    *,
    classes: Sequence[str] | None = None,
    task: TaskKind = "auto",
    allow_unlabelled: bool = False,
    only_clean: bool = False,
) -> LabelSet:
    """The labels of every row of `clips`; raises `ManifestError` with all mistakes at once.

    Classes come in the order of `classes`, or sorted where it is None. With `task="auto"` the task
    is multi-class where every labelled clean clip has exactly one label, else multi-label.
    `only_clean` leaves views out: nothing is known of them, and nothing is wrong with them.
    """
    table = read_table(path)
    key = _key_of(table)
    names = [_split_names(cell) for cell in table.columns["labels"]]
    vocabulary = _vocabulary(table, names) if classes is None else tuple(classes)
    if RESERVED in vocabulary:
        message = f"found a class named {RESERVED!r}, which names a column of the predictions"
        raise ManifestError([Problem(table.file, None, "labels", message)])
    join = _Join(
        clips,
        table,
        vocabulary,
        np.zeros((clips.num_rows, len(vocabulary)), dtype=np.float32),
        np.zeros(clips.num_rows, dtype=np.int64),
    )
    known_names = _checked_names(join, names)
    if key == "event":
        _join_events(join, known_names)
    else:
        _join_keyed(join, known_names, key)
    _add_mixes(join)
    taken = is_clean(clips) if only_clean else np.ones(clips.num_rows, dtype=bool)
    return _finish(join, taken, task=task, allow_unlabelled=allow_unlabelled)


def _key_of(table: TextTable) -> str:
    """`clip_id`, `path` or `event`, whichever the table's columns allow first."""
    require_columns(table, ["labels"], why="class names with ';' between them")
    if "clip_id" in table.columns:
        return "clip_id"
    if "start_s" in table.columns or "end_s" in table.columns:
        require_columns(table, ["path", "start_s", "end_s"], why="events are path,start_s,end_s")
        return "event"
    if "path" not in table.columns:
        require_columns(table, ["clip_id"], why="or path, or path,start_s,end_s: which clip")
    return "path"


def _split_names(cell: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in cell.split(";") if name.strip()))


def _vocabulary(table: TextTable, names: list[tuple[str, ...]]) -> tuple[str, ...]:
    found = tuple(sorted({name for row in names for name in row}))
    if not found:
        message = "every cell is empty, expected class names"
        raise ManifestError([Problem(table.file, None, "labels", message)])
    return found


def _checked_names(join: _Join, names: list[tuple[str, ...]]) -> list[list[int]]:
    """Class numbers of every table row; names outside the vocabulary become problems."""
    number = {name: index for index, name in enumerate(join.classes)}
    for row, row_names in enumerate(names):
        for name in row_names:
            if name not in number:
                near = difflib.get_close_matches(name, join.classes, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                message = f"found class {name!r}, expected one of the {len(number)} given{hint}"
                join.problems.append(join.table.problem(row, "labels", message))
    return [[number[name] for name in row_names if name in number] for row_names in names]


def _join_keyed(join: _Join, names: list[list[int]], key: str) -> None:
    rows_of = _rows_by(join.clips, key)
    first: dict[str, int] = {}
    for row, cell in enumerate(join.table.columns[key]):
        if cell not in rows_of:
            join.problems.append(join.table.problem(row, key, _unknown(cell, key, rows_of)))
        elif cell in first and set(names[row]) != set(names[first[cell]]):
            line = join.table.lines[first[cell]]
            message = f"{cell!r} has other labels on line {line}, expected one set a {key}"
            join.problems.append(join.table.problem(row, "labels", message))
        else:
            first.setdefault(cell, row)
            _mark(join, np.array(rows_of[cell]), names[row], row)


def _join_events(join: _Join, names: list[list[int]]) -> None:
    rows_of = _rows_by(join.clips, "path")
    start_s = join.clips.column("start_s").to_numpy()
    end_s = start_s + join.clips.column("duration_s").to_numpy()
    for row, path in enumerate(join.table.columns["path"]):
        if path not in rows_of:
            join.problems.append(join.table.problem(row, "path", _unknown(path, "path", rows_of)))
            continue
        rows = np.array(rows_of[path])
        # A row of the recording says that its events are known, so its other clips have none.
        _mark(join, rows, [], row)
        event = _event(join, row) if names[row] else None
        if event is not None:
            overlaps = (event[0] < end_s[rows]) & (
                (event[1] > start_s[rows]) | (event[0] >= start_s[rows])
            )
            _mark(join, rows[overlaps], names[row], row)


def _event(join: _Join, row: int) -> tuple[float, float] | None:
    """Start and end in seconds, or None and a problem."""
    bounds = []
    for column in ("start_s", "end_s"):
        cell = join.table.columns[column][row]
        try:
            bounds.append(float(cell))
        except ValueError:
            bounds.append(math.nan)
        if not math.isfinite(bounds[-1]):
            message = f"found {cell!r}, expected a number of seconds"
            join.problems.append(join.table.problem(row, column, message))
    if not all(map(math.isfinite, bounds)):
        return None
    if bounds[1] < bounds[0]:
        message = f"found {bounds[1]} s, expected no less than start_s={bounds[0]}"
        join.problems.append(join.table.problem(row, "end_s", message))
        return None
    return bounds[0], bounds[1]


def _add_mixes(join: _Join) -> None:
    """Gives views the labels of their clean clip and of all that is mixed into them."""
    clips = join.clips
    views = clips.column("view").to_pylist()
    if not any(views):
        return
    ids = clips.column("clip_id").to_pylist()
    clean = {ids[row]: row for row, view in enumerate(views) if view == 0}
    mixes = (
        clips.column("mix_sources").to_pylist()
        if "mix_sources" in clips.column_names
        else [None] * len(ids)
    )
    for row in (row for row, view in enumerate(views) if view):
        names = (ids[row], *(mixes[row] or ()))
        sources = [clean[name] for name in names if name in clean]
        if len(sources) < len(names):
            join.lacking[row] = next(name for name in names if name not in clean)
            join.line[row] = 0
            continue
        for source in sources:
            join.targets[row] = np.maximum(join.targets[row], join.targets[source])
        # What is known of a mix is known of all its parts, or of none.
        lines = join.line[sources]
        join.line[row] = lines[0] if len(lines) and lines.all() else 0


def _mark(join: _Join, rows: Int[np.ndarray, " row"], classes: list[int], row: int) -> None:
    if classes:
        join.targets[rows[:, None], np.array(classes)] = 1.0
    unseen = rows[join.line[rows] == 0]
    join.line[unseen] = join.table.lines[row]


def _rows_by(clips: pa.Table, key: str) -> Mapping[str, list[int]]:
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for row, value in enumerate(clips.column(key).to_pylist()):
        rows_of[value].append(row)
    return dict(rows_of)


def _unknown(cell: str, key: str, rows_of: Mapping[str, list[int]]) -> str:
    example = next(iter(rows_of), "none")
    return f"no clip of the bank has {key} {cell!r}, expected one like {example!r}"


def _finish(
    join: _Join, taken: Bool[np.ndarray, " clip"], *, task: TaskKind, allow_unlabelled: bool
) -> LabelSet:
    present = (join.clips.column("status").to_numpy() == 1) & taken
    known = (join.line > 0) & taken
    unlabelled = np.flatnonzero(present & ~known)
    if not allow_unlabelled:
        join.problems.extend(_unlabelled(join, unlabelled))
    clean = is_clean(join.clips)
    n_labels = join.targets.sum(axis=1)
    # A mix of clips of one class each is no sign that clips have several.
    is_one = (n_labels == 1) | (~clean & (n_labels > 0))
    labelled = present & known
    multi_label = task == "multilabel" or (
        task == "auto" and not bool(is_one[labelled & clean].all())
    )
    if not multi_label:
        join.problems.extend(_not_one(join, np.flatnonzero(labelled & ~is_one)))
    if join.problems:
        raise ManifestError(join.problems)
    targets = join.targets
    if not multi_label:
        targets[~clean] /= np.maximum(1, n_labels[~clean, None])
    return LabelSet(join.classes, targets, known, multi_label, len(unlabelled))


def _unlabelled(join: _Join, rows: Int[np.ndarray, " row"]) -> Iterator[Problem]:
    asked = set(rows.tolist())
    lacking = {row: name for row, name in join.lacking.items() if row in asked}
    for row, name in lacking.items():
        message = (
            f"{_named(join, row)} holds the sound of {name!r}, which is not in the bank: "
            "its labels are not known (pass --allow-unlabelled to leave it out, or --no-views)"
        )
        yield Problem(join.table.file, None, None, message)
    labelled_elsewhere = np.setdiff1d(rows, list(lacking))
    ids = dict.fromkeys(join.clips.column("clip_id").take(labelled_elsewhere).to_pylist())
    for clip_id in ids:
        message = f"clip {clip_id!r} has no labels, expected a row (or pass --allow-unlabelled)"
        yield Problem(join.table.file, None, None, message)


def _named(join: _Join, row: int) -> str:
    """How messages name a row: its clip, or which view of it."""
    clip_id, view = (join.clips.column(key)[row].as_py() for key in ("clip_id", "view"))
    return f"view {view} of {clip_id!r}" if view else f"clip {clip_id!r}"


def _not_one(join: _Join, wrong: Int[np.ndarray, " row"]) -> Iterator[Problem]:
    """Problems of rows that a multi-class task cannot have, one a clip."""
    if len(join.classes) < 2:
        message = f"found 1 class ({join.classes[0]}), expected at least 2 for a multi-class task"
        yield Problem(join.table.file, None, "labels", message)
    ids = join.clips.column("clip_id").take(wrong).to_pylist()
    first: dict[str, int] = {}
    for clip_id, row in zip(ids, wrong.tolist(), strict=True):
        first.setdefault(clip_id, row)
    for row in first.values():
        names = [name for name, on in zip(join.classes, join.targets[row], strict=True) if on]
        found = f"{len(names)} labels ({';'.join(names)})" if names else "no label"
        message = f"{_named(join, row)} has {found}, expected one (or pass --task multilabel)"
        yield Problem(join.table.file, int(join.line[row]), "labels", message)
