"""What is drawn for views: which clips are mixed in, at which level, how far and how loud.

All views of a table are drawn together, a column at a time. What a view draws follows from the
seed, its `clip_id`, its number and the clips that may be mixed in, and from no library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int64

from patchbank.pipeline.bank.view_columns import (
    DRAWN,
    GAIN_DB,
    MIX_SNR_DB,
    MIX_SOURCES,
    SHIFT_SAMPLES,
)
from patchbank.pipeline.specs import AugmentSpec, MixupSpec, canonical_json

ViewRows = Int64[np.ndarray, " view"]
"""A number for each view that is drawn."""


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


def draws_of(clips: pa.Table) -> list[Draw]:
    """The draws that the rows of a clip table, or of a bank's clips.parquet, tell."""
    names = [name for name in DRAWN if name in clips.column_names]
    if not names:
        return list(repeat(Draw(), len(clips)))
    return [Draw(**_values(row)) for row in clips.select(names).to_pylist()]


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}


class Pools:
    """Which clips may be mixed into which: those of its part with audio, of other recordings.

    In a pool clips are sorted by `clip_id`, so that the order of a table changes no draw.
    """

    def __init__(
        self,
        clip_ids: Sequence[str],
        paths: Sequence[str],
        parts: Sequence[int],
        has_audio: Bool[np.ndarray, " clip"],
    ) -> None:
        """`parts` numbers what sources have to share, -1 of clips that take no part."""
        part = np.asarray(parts, np.int64)
        pooled = np.flatnonzero((part >= 0) & has_audio).tolist()
        pooled.sort(key=lambda row: (parts[row], clip_ids[row]))
        self._ids = pa.array([clip_ids[row] for row in pooled], pa.string())
        self._part = part
        sizes = np.bincount(part[pooled], minlength=max(parts, default=0) + 1)
        self._first = np.cumsum(sizes) - sizes
        numbers: dict[tuple[int, str], int] = {}
        pairs = zip(parts, paths, strict=True)
        self._recording = np.array([numbers.setdefault(p, len(numbers)) for p in pairs], np.int64)
        of_pooled = self._recording[pooled]
        n_own = np.bincount(of_pooled, minlength=len(numbers))
        self.n_others: Int64[np.ndarray, " clip"] = sizes[part] - n_own[self._recording]
        """How many clips may be mixed into each."""
        order = np.argsort(of_pooled, kind="stable")
        self._first_own = np.cumsum(n_own) - n_own
        rank = np.arange(len(pooled)) - self._first_own[of_pooled[order]]
        # So many others stand before each clip of a recording: a later place skips it.
        before = order - self._first[part[pooled]][order] - rank
        self._wide = len(pooled) + 1
        self._skips = of_pooled[order] * self._wide + before

    def clip_ids(
        self, clips: Int64[np.ndarray, " source"], places: Int64[np.ndarray, " source"]
    ) -> pa.Array:
        """The `clip_id` at a place among the others of each of `clips`."""
        recording = self._recording[clips]
        wanted = recording * self._wide + places
        skipped = np.searchsorted(self._skips, wanted, side="right") - self._first_own[recording]
        return self._ids.take(pa.array(self._first[self._part[clips]] + places + skipped))


def drawn_values(
    augment: AugmentSpec,
    clip_ids: Sequence[str],
    clips: ViewRows,
    views: ViewRows,
    *,
    pools: Pools,
    shifts: range,
) -> dict[str, pa.Array]:
    """The columns of `DRAWN` that the augmentations have, for `views` of `clips` (row numbers).

    What one augmentation draws does not depend on which others there are. Every clip needs one
    that may be mixed into it.
    """
    quoted = {row: canonical_json(clip_ids[row]) for row in dict.fromkeys(clips.tolist())}
    keys = [(quoted[row], view) for row, view in zip(clips.tolist(), views.tolist(), strict=True)]
    columns: dict[str, pa.Array] = {}
    if augment.mixup is not None:
        numbers = _uniforms(augment.seed, "mixup", keys, 2 + 2 * augment.mixup.max_sources)
        columns[MIX_SOURCES], columns[MIX_SNR_DB] = _mixes(augment.mixup, numbers, clips, pools)
    if augment.shift is not None:
        [number] = _uniforms(augment.seed, "shift", keys, 1).T
        moved = shifts.start + (number * len(shifts)).astype(np.int64)
        columns[SHIFT_SAMPLES] = pa.array(moved.astype(np.int32))
    if augment.gain is not None:
        [number] = _uniforms(augment.seed, "gain", keys, 1).T
        range_db = augment.gain.max_db - augment.gain.min_db
        columns[GAIN_DB] = pa.array(augment.gain.min_db + number * range_db)
    return columns


def _uniforms(
    seed: int, purpose: str, keys: Iterable[tuple[bytes, int]], n: int
) -> Float64[np.ndarray, "view number"]:
    """`n` numbers in [0, 1) for each key, from the SHAKE-256 of `[seed, purpose, clip_id, view]`.

    `keys` are a `clip_id` as canonical JSON, and a view.
    """
    head = canonical_json([seed, purpose])[:-1]
    digests = (
        hashlib.shake_256(b"%b,%b,%d]" % (head, clip_id, view)).digest(8 * n)
        for clip_id, view in keys
    )
    words = np.frombuffer(b"".join(digests), "<u8").reshape(-1, n)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixes(
    mixup: MixupSpec, numbers: Float64[np.ndarray, "view number"], clips: ViewRows, pools: Pools
) -> tuple[pa.Array, pa.Array]:
    """1 to `max_sources` different clips with probability `p`, and an SNR for each."""
    n_others, most = pools.n_others[clips], mixup.max_sources
    n_sources = np.minimum(1 + (numbers[:, 1] * most).astype(np.int64), n_others)
    n_sources[numbers[:, 0] >= mixup.p] = 0
    # Beyond `n_sources` places mean nothing, and nothing that counts comes after them.
    places = np.empty((len(clips), most), np.int64)
    for source in range(most):
        place = (numbers[:, 2 + source] * (n_others - source)).astype(np.int64)
        for taken in np.sort(places[:, :source], axis=1).T:
            place += place >= taken
        places[:, source] = place
    counts: Bool[np.ndarray, "view source"] = np.arange(most) < n_sources[:, None]
    sources = pools.clip_ids(np.repeat(clips, n_sources), places[counts])
    levels_db = mixup.min_snr_db + numbers[:, 2 + most :][counts] * (
        mixup.max_snr_db - mixup.min_snr_db
    )
    offsets = pa.array(np.concatenate([[0], np.cumsum(n_sources)]).astype(np.int32))
    return (
        pa.ListArray.from_arrays(offsets, sources),
        pa.ListArray.from_arrays(offsets, pa.array(levels_db)),
    )
