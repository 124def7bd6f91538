"""Views that a bank makes of its training clips: which there are, and how each is made.

Drawing comes before any audio is read: it adds rows to the clip table, whose columns say which
clips are mixed in, at which SNR, and how far and how loud the mix is moved. `view_audio` makes the
waveform of such a row, wherever its shard is encoded, and draws nothing.

A draw is a function of the seed, `clip_id`, `view` and the clips that may be mixed in: those with
audio, of the same split and fold, and of another recording (`path`). So neither shards, workers nor
restarts change a view. A bank that grows keeps the draws that its rows were made with; new rows
draw from the whole longer table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from patchbank.pipeline.bank.identity import TABLE_COLUMNS
from patchbank.pipeline.bank.view_columns import DRAWN, FOUND, MIX_SOURCES, drawn_columns
from patchbank.pipeline.draws import Draw, Pools, drawn_values
from patchbank.pipeline.errors import ManifestError, Problem
from patchbank.pipeline.manifest import ClipTable
from patchbank.pipeline.manifest.views import PARTS
from patchbank.pipeline.specs import MOST_VIEWS, AugmentSpec, ShiftSpec

Rows = Int64[np.ndarray, " row"]
Part = tuple[str | None, ...]
"""Split and fold of a clip, where there are such columns."""


def with_views(
    table: ClipTable,
    augment: AugmentSpec,
    *,
    n_views: int,
    sample_rate_hz: int,
    window_samples: int,
    known: pa.Table | None = None,
) -> pa.Table:
    """The clips of `table`, each training clip followed by its views 1 to `n_views`.

    Clips of split `train` get views; without a `split` column all that are in a fold. `known` is
    the clip table of a bank that grows: its rows keep their draws, and only others are drawn.
    Raises `ManifestError` where no views can be made of the table.
    """
    _check(table, n_views)
    parts = _parts(table)
    owners, views = _rows(parts, n_views)
    place_of = {} if known is None else _places(known)
    clip_ids = table.clips["clip_id"].to_pylist()
    keys = zip(owners.tolist(), views.tolist(), strict=True)
    places = np.array([place_of.get((clip_ids[row], view), -1) for row, view in keys], np.int64)
    fresh = np.flatnonzero((views > 0) & (places < 0))
    drawn = _drawn(
        table,
        augment,
        owners[fresh],
        views[fresh],
        parts=parts,
        shifts=_shifts(augment.shift, sample_rate_hz, window_samples),
    )
    # The draw of clean clips, then the new ones, then those of the rows that are there.
    draws = [pa.table(_clean_draw(augment)), pa.table(drawn)]
    draws += [] if known is None else [known.select(list(drawn))]
    schema = pa.schema(drawn_columns(augment))
    which = np.where(views == 0, 0, 1 + len(fresh) + places)
    which[fresh] = 1 + np.arange(len(fresh))
    chosen = pa.concat_tables([one.cast(schema) for one in draws]).combine_chunks()
    return _table(
        table.clips.take(pa.array(owners)), pa.array(views, pa.int16()), chosen.take(which)
    )


class TableRows:
    """The rows that a table comes to, with their views where there are any.

    Views are drawn when they are asked for, and once for the bank whose rows keep their draws.
    """

    def __init__(
        self,
        table: ClipTable,
        augment: AugmentSpec | None,
        *,
        n_views: int,
        sample_rate_hz: int,
        window_samples: int,
    ) -> None:
        """Raises `ManifestError` where no views can be made of the table."""
        self.n_views = n_views
        self._table, self._augment = table, augment
        self._sample_rate_hz, self._window_samples = sample_rate_hz, window_samples
        self._length = len(table.clips)
        self._drawn: tuple[str | None, pa.Table] | None = None
        if augment is not None:
            _check(table, n_views)
            self._length = len(_rows(_parts(table), n_views)[0])

    def __len__(self) -> int:
        return self._length

    def drawn(self, known: pa.Table | None = None, *, fingerprint: str | None = None) -> pa.Table:
        """The rows; those of `known`, the clip table of the bank with that fingerprint, keep their
        draws."""
        if self._augment is None:
            return self._table.clips
        if self._drawn is None or self._drawn[0] != fingerprint:
            rows = with_views(
                self._table,
                self._augment,
                n_views=self.n_views,
                sample_rate_hz=self._sample_rate_hz,
                window_samples=self._window_samples,
                known=known,
            )
            self._drawn = fingerprint, rows
        return self._drawn[1]


def _rows(parts: Sequence[Part | None], n_views: int) -> tuple[Rows, Rows]:
    """The clip (its row) and the view of each row that there will be."""
    counts = np.array([1 if part is None else 1 + n_views for part in parts], np.int64)
    owners = np.repeat(np.arange(len(parts)), counts)
    return owners, np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]


def _places(known: pa.Table) -> dict[tuple[str, int], int]:
    keys = zip(known["clip_id"].to_pylist(), known["view"].to_pylist(), strict=True)
    return {key: row for row, key in enumerate(keys)}


def _clean_draw(augment: AugmentSpec) -> dict[str, pa.Array]:
    return {
        name: pa.array([getattr(Draw(), name)], type_)
        for name, type_ in drawn_columns(augment).items()
    }


def _drawn(
    table: ClipTable,
    augment: AugmentSpec,
    owners: Rows,
    views: Rows,
    *,
    parts: Sequence[Part | None],
    shifts: range,
) -> dict[str, pa.Array]:
    clips = table.clips
    numbers = {part: number for number, part in enumerate(dict.fromkeys(filter(None, parts)))}
    pools = Pools(
        clips["clip_id"].to_pylist(),
        clips["path"].to_pylist(),
        [-1 if part is None else numbers[part] for part in parts],
        clips["duration_s"].to_numpy() > 0,
    )
    lonely = owners[pools.n_others[owners] < 1]
    if augment.mixup is not None and len(lonely):
        row = int(lonely[0])
        raise _nothing_to_mix(table, clips["clip_id"][row].as_py(), parts[row])
    clip_ids = clips["clip_id"].to_pylist()
    return drawn_values(augment, clip_ids, owners, views, pools=pools, shifts=shifts)


def _check(table: ClipTable, n_views: int) -> None:
    names = table.clips.column_names
    if not 1 <= n_views <= MOST_VIEWS:
        raise _error(table, None, f"found {n_views} views, expected 1 to {MOST_VIEWS:,} a clip")
    # A `mix_sources` of a table without views is empty.
    for name in (*DRAWN, *FOUND):
        if name in names and name != MIX_SOURCES:
            message = "a bank that makes views writes a column of that name itself; rename yours"
            raise _error(table, name, message)
    for row, view in enumerate(table.clips["view"].to_pylist()):
        if view:
            clip_id = table.clips["clip_id"][row].as_py()
            message = (
                f"found view {view} of {clip_id!r}, expected clean clips to make views of; leave "
                "--views out, or those rows"
            )
            raise _error(table, "view", message)


def _error(table: ClipTable, column: str | None, message: str) -> ManifestError:
    return ManifestError([Problem(table.source, None, column, message)])


def _parts(table: ClipTable) -> list[Part | None]:
    """Split and fold of each clip, which its sources share; None where it gets no views."""
    clips = table.clips
    names = [name for name in PARTS if name in clips.column_names]
    if not names:
        message = (
            "found neither a split nor a fold column, expected one: views are made of training "
            "clips, and never of sound that tests; put train/, valid/ and test/ above the class "
            "folders, or pass a CLIPS.csv with path and split"
        )
        raise _error(table, None, message)
    rows = zip(*(clips[name].to_pylist() for name in names), strict=True)
    # A clip without a fold never trains by folds, and one of another split never at all.
    wanted = "train" if names[0] == "split" else None
    parts = [row if (row[0] == wanted if wanted else row[0] is not None) else None for row in rows]
    if not any(parts):
        message = "found no clip of split 'train', expected some to make views of"
        raise _error(table, names[0], message if wanted else "every cell is empty: no clip trains")
    return parts


def _nothing_to_mix(table: ClipTable, clip_id: str, part: Part | None) -> ManifestError:
    names = [name for name in PARTS if name in table.clips.column_names]
    where = " and ".join(f"{n} {v!r}" for n, v in zip(names, part or (), strict=True))
    return _error(
        table,
        names[-1],
        f"found no clip to mix into {clip_id!r}: its recording is the only one with audio in "
        f"{where}; leave --augment mixup out, or take more recordings",
    )


def _shifts(shift: ShiftSpec | None, sample_rate_hz: int, window_samples: int) -> range:
    if shift is None:
        return range(1)
    if shift.max_s is None:
        return range(window_samples)
    most = min(round(shift.max_s * sample_rate_hz), window_samples - 1)
    return range(-most, most + 1)


def _table(clips: pa.Table, views: pa.Array, draws: pa.Table) -> pa.Table:
    """`clips` with their views and draws; the user's own columns stay last."""
    columns = {name: clips[name] for name in (*TABLE_COLUMNS, *PARTS) if name in clips.column_names}
    columns["view"] = views
    columns |= {name: draws[name] for name in draws.column_names}
    for name in clips.column_names:
        if name != MIX_SOURCES:
            columns.setdefault(name, clips[name])
    return pa.table(columns)
