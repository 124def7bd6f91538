"""Views that a bank makes of its training clips: which there are, and how each is made.

Drawing comes before any audio is read: it adds rows to the clip table, whose columns say which
clips are mixed in, at which SNR, and how far and how loud the mix is moved. `view_audio` makes the
waveform of such a row, wherever its shard is encoded, and draws nothing.

A draw is a function of the seed, `clip_id`, `view` and the clips that may be mixed in: those with
audio and of the same split and fold. So neither shards, workers nor restarts change a view. A bank
that grows keeps the draws that its rows were made with; new rows draw from the whole longer table.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import pyarrow as pa

from patchbank.pipeline.bank.identity import TABLE_COLUMNS
from patchbank.pipeline.bank.view_columns import DRAWN, FOUND, MIX_SOURCES, drawn_columns
from patchbank.pipeline.errors import ManifestError, Problem
from patchbank.pipeline.manifest import ClipTable
from patchbank.pipeline.specs import AugmentSpec, MixupSpec, ShiftSpec, canonical_json

PARTS = ("split", "fold")
MOST_VIEWS = 2**15 - 1


@dataclass(frozen=True)
class Draw:
    """How a view is made; without arguments that of a clean clip, which stays as it is."""

    mix_sources: tuple[str, ...] = ()
    """The `clip_id`s of what is mixed in."""
    mix_snr_db: tuple[float, ...] = ()
    """How far the clip is above each source, in dB of power over the window."""
    shift_samples: int = 0
    """How far the mix is turned towards its end, at the encoder's sample rate."""
    gain_db: float = 0.0


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
    the clip table of a bank that grows: its rows keep their draws. Raises `ManifestError` where no
    views can be made of the table.
    """
    _check(table, n_views)
    clips = table.clips
    parts = _parts(table)
    pools = _pools(clips, parts)
    shifts = _shifts(augment.shift, sample_rate_hz, window_samples)
    known_draws = {} if known is None else _draws_by_key(known)
    owners: list[int] = []
    views: list[int] = []
    draws: list[Draw] = []
    for row, clip_id in enumerate(clips["clip_id"].to_pylist()):
        part = parts[row]
        for view in range(1 if part is None else 1 + n_views):
            draw = known_draws.get((clip_id, view)) if view else Draw()
            if draw is None:
                if augment.mixup and set(pools[part][:2]) <= {clip_id}:
                    raise _nothing_to_mix(table, clip_id, part)
                draw = draw_view(augment, clip_id, view, pool=pools[part], shifts=shifts)
            owners.append(row)
            views.append(view)
            draws.append(draw)
    return _table(clips.take(pa.array(owners, pa.int64())), views, draws, augment)


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


Part = tuple[str | None, ...]


def _parts(table: ClipTable) -> list[Part | None]:
    """Split and fold of each clip, which its sources share; None where it gets no views."""
    clips = table.clips
    names = [name for name in PARTS if name in clips.column_names]
    if not names:
        message = (
            "found neither a split nor a fold column, expected one: views are made of training "
            "clips, and never of sound that tests"
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


def _pools(clips: pa.Table, parts: Sequence[Part | None]) -> dict[Part | None, list[str]]:
    """The clips with audio of each split and fold, sorted: a table's order changes no draw."""
    pools: defaultdict[Part | None, list[str]] = defaultdict(list)
    rows = zip(parts, clips["clip_id"].to_pylist(), clips["duration_s"].to_pylist(), strict=True)
    for part, clip_id, duration_s in rows:
        if part is not None and duration_s > 0:
            pools[part].append(clip_id)
    for pool in pools.values():
        pool.sort()
    return pools


def _nothing_to_mix(table: ClipTable, clip_id: str, part: Part | None) -> ManifestError:
    names = [name for name in PARTS if name in table.clips.column_names]
    where = " and ".join(f"{n} {v!r}" for n, v in zip(names, part or (), strict=True))
    return _error(
        table,
        names[-1],
        f"found no clip to mix into {clip_id!r}: it is the only one with audio in {where}; leave "
        "--augment mixup out, or take more clips",
    )


def _shifts(shift: ShiftSpec | None, sample_rate_hz: int, window_samples: int) -> range:
    if shift is None:
        return range(1)
    if shift.max_s is None:
        return range(window_samples)
    most = min(round(shift.max_s * sample_rate_hz), window_samples - 1)
    return range(-most, most + 1)


def draw_view(
    augment: AugmentSpec, clip_id: str, view: int, *, pool: Sequence[str], shifts: range
) -> Draw:
    """The draw of one view; `pool` is sorted and may hold the clip, which is never its own source.

    What one augmentation draws does not depend on which others there are.
    """

    def uniforms(purpose: str, n: int) -> list[float]:
        return _uniforms([augment.seed, purpose, clip_id, view], n)

    draw = Draw()
    if augment.mixup is not None:
        numbers = uniforms("mixup", 2 + 2 * augment.mixup.max_sources)
        draw = Draw(*_draw_mix(augment.mixup, numbers, pool, clip_id))
    if augment.shift is not None:
        [number] = uniforms("shift", 1)
        draw = replace(draw, shift_samples=shifts[int(number * len(shifts))])
    if augment.gain is not None:
        [number] = uniforms("gain", 1)
        range_db = augment.gain.max_db - augment.gain.min_db
        draw = replace(draw, gain_db=augment.gain.min_db + number * range_db)
    return draw


def _uniforms(key: Sequence[object], n: int) -> list[float]:
    """`n` numbers in [0, 1) that follow from `key` alone, whatever NumPy's version."""
    stream = hashlib.shake_256(canonical_json(list(key))).digest(8 * n)
    words = (stream[place : place + 8] for place in range(0, 8 * n, 8))
    return [(int.from_bytes(word, "little") >> 11) * 2.0**-53 for word in words]


def _draw_mix(
    mixup: MixupSpec, numbers: Sequence[float], pool: Sequence[str], clip_id: str
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """1 to `max_sources` different clips with probability `p`, and an SNR for each."""
    whether, how_many, *rest = numbers
    if whether >= mixup.p:
        return (), ()
    own = bisect_left(pool, clip_id)
    taken = [own] if own < len(pool) and pool[own] == clip_id else []
    n_sources = min(1 + int(how_many * mixup.max_sources), len(pool) - len(taken))
    sources = []
    for number in rest[:n_sources]:
        place = int(number * (len(pool) - len(taken)))
        for other in sorted(taken):
            place += place >= other
        taken.append(place)
        sources.append(pool[place])
    levels = rest[mixup.max_sources :][:n_sources]
    range_db = mixup.max_snr_db - mixup.min_snr_db
    return tuple(sources), tuple(mixup.min_snr_db + level * range_db for level in levels)


def _table(
    clips: pa.Table, views: Sequence[int], draws: Sequence[Draw], augment: AugmentSpec
) -> pa.Table:
    """`clips` with their views and draws; the user's own columns stay last."""
    columns = {name: clips[name] for name in (*TABLE_COLUMNS, *PARTS) if name in clips.column_names}
    columns["view"] = pa.array(views, pa.int16())
    for name, type_ in drawn_columns(augment).items():
        columns[name] = pa.array([getattr(draw, name) for draw in draws], type_)
    for name in clips.column_names:
        if name != MIX_SOURCES:
            columns.setdefault(name, clips[name])
    return pa.table(columns)


def draws_of(clips: pa.Table) -> list[Draw]:
    """The draws that the rows of a clip table, or of a bank's clips.parquet, tell."""
    names = [name for name in DRAWN if name in clips.column_names]
    if not names:
        return list(repeat(Draw(), len(clips)))
    return [Draw(**_values(row)) for row in clips.select(names).to_pylist()]


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}


def _draws_by_key(known: pa.Table) -> dict[tuple[str, int], Draw]:
    keys = zip(known["clip_id"].to_pylist(), known["view"].to_pylist(), strict=True)
    return dict(zip(keys, draws_of(known), strict=True))
