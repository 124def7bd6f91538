"""Refuses splits whose parts share a recording, a group of clips, or the very same sound.

What a probe has heard in training it knows again in the test: such scores are too good. Only rows
that take part count, and what is mixed into views that train: by their group (where the bank's
clips have one), by their recording, and clean ones by the digest of their audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from typing import Literal, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from patchbank.pipeline.errors import TrialError
from patchbank.probing.groups import Groups
from patchbank.probing.splits import SPLIT_NAMES, Split, is_clean

Kind = Literal["groups", "recordings", "sounds"]
KINDS: tuple[Kind, ...] = ("groups", "recordings", "sounds")
N_EXAMPLES = 3


@dataclass(frozen=True)
class _Keys:
    """What tells whether two rows hold the same."""

    names: list[str]
    """Sorted; "" says that nothing is known."""
    numbers: Int[np.ndarray, " clip"]
    """Position in `names` for every row."""


def check_leakage(
    clips: pa.Table, splits: Sequence[Split], groups: Groups, *, allow: bool = False
) -> dict[str, int | None]:
    """How many groups, recordings and sounds lie in two parts of a split; None where unknown.

    Raises `TrialError` where there are some, unless `allow`.
    """
    keys = _keys(clips, groups)
    splits = [replace(split, train=_heard(split.train, clips)) for split in splits]
    leaks = {kind: _leaks(keys[kind], splits) for kind in KINDS if kind in keys}
    if any(leaks.values()) and not allow:
        lines = [_line(kind, keys[kind], leaks[kind], clips) for kind in leaks if leaks[kind]]
        raise TrialError(
            "found the same in several of train, valid and test, expected each in one of them:\n"
            + "\n".join(lines)
            + "\nwhat has trained would be tested; correct the splits, or insist with "
            "--allow-leakage, which results.json records"
        )
    return {kind: len(leaks[kind]) if kind in leaks else None for kind in KINDS}


def _heard(train: Int[np.ndarray, " train"], clips: pa.Table) -> Int[np.ndarray, " heard"]:
    """The rows that train, and the clean rows of clips that are mixed into them."""
    if "mix_sources" not in clips.column_names:
        return train
    mixes = clips.column("mix_sources").take(pa.array(train)).to_pylist()
    mixed = {name for mix in mixes for name in mix or ()}
    ids = clips.column("clip_id").to_pylist()
    sources = [row for row in np.flatnonzero(is_clean(clips)).tolist() if ids[row] in mixed]
    return np.union1d(train, np.array(sources, dtype=np.int64))


def _keys(clips: pa.Table, groups: Groups) -> dict[Kind, _Keys]:
    found = {"recordings": _numbered(clips.column("path").to_pylist())}
    if groups.column != "path":
        found["groups"] = _numbered(groups.names)
    if "audio_sha256" in clips.column_names:
        digests = clips.column("audio_sha256").to_pylist()
        pairs = zip(digests, is_clean(clips), strict=True)
        found["sounds"] = _numbered([digest if clean else "" for digest, clean in pairs])
    return cast(dict[Kind, _Keys], found)


def _numbered(keys: Sequence[str | None]) -> _Keys:
    filled = [key or "" for key in keys]
    names = sorted(set(filled))
    number = {name: index for index, name in enumerate(names)}
    return _Keys(names, np.array([number[key] for key in filled], dtype=np.int64))


def _leaks(keys: _Keys, splits: Sequence[Split]) -> dict[int, Split]:
    """Numbers of the keys that lie in several parts of a split, and the first such split."""
    leaks: dict[int, Split] = {}
    for split in splits:
        in_part = [np.unique(keys.numbers[getattr(split, name)]) for name in SPLIT_NAMES]
        numbers, n_parts = np.unique(np.concatenate(in_part), return_counts=True)
        for number in numbers[n_parts > 1].tolist():
            if keys.names[number]:
                leaks.setdefault(number, split)
    return leaks


def _line(kind: Kind, keys: _Keys, leaks: Mapping[int, Split], clips: pa.Table) -> str:
    examples = ", ".join(
        _example(kind, keys, number, split, clips)
        for number, split in islice(sorted(leaks.items(), key=itemgetter(0)), N_EXAMPLES)
    )
    more = f", and {len(leaks) - N_EXAMPLES} more" if len(leaks) > N_EXAMPLES else ""
    return f"  {len(leaks)} {kind if len(leaks) > 1 else kind.removesuffix('s')}: {examples}{more}"


def _example(kind: Kind, keys: _Keys, number: int, split: Split, clips: pa.Table) -> str:
    own = np.flatnonzero(keys.numbers == number)
    rows = {name: np.intersect1d(getattr(split, name), own) for name in SPLIT_NAMES}
    parts = [name for name in SPLIT_NAMES if len(rows[name])]
    name = repr(keys.names[number])
    if kind == "sounds":
        # A digest tells nobody anything; a clip of each part does.
        name = " = ".join(repr(clips["clip_id"][int(rows[part][0])].as_py()) for part in parts)
    where = "" if split.name == "split" else f" of {split.name}"
    return f"{name} in {' and '.join([', '.join(parts[:-1]), parts[-1]])}{where}"
