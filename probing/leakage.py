"""Refuses splits whose parts share a recording, a group of clips, or the very same sound.

What a probe has heard in training it knows again in the test: such scores are too good. Only rows
that take part count, and what is mixed into views that train: by every column that names groups,
whichever of them the bootstrap draws by, and clean ones by the digest of their audio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from patchbank.pipeline.errors import TrialError
from patchbank.probing.groups import KNOWN_COLUMNS, Groups, is_empty
from patchbank.probing.splits import SPLIT_NAMES, Split, is_clean

DIGEST = "audio_sha256"
"""The column that tells whether two clips are the same sound."""
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
    """How many values of each column lie in two parts of a split; None where nothing is known.

    The columns are those of `KNOWN_COLUMNS` that `clips` has, that of `groups`, and `DIGEST`, which
    stands for sounds. Raises `TrialError` where there are some, unless `allow`.
    """
    keys = _keys(clips, groups)
    splits = [replace(split, train=_heard(split.train, clips)) for split in splits]
    leaks = {column: _leaks(keys[column], splits) for column in keys}
    if any(leaks.values()) and not allow:
        lines = [_line(column, keys[column], leaks[column], clips) for column in leaks]
        raise TrialError(
            "found the same in several of train, valid and test, expected each in one of them:\n"
            + "\n".join(filter(None, lines))
            + "\nwhat has trained would be tested; correct the splits, or insist with "
            "--allow-leakage, which results.json records"
        )
    return {DIGEST: None} | {column: len(found) for column, found in leaks.items()}


def _heard(train: Int[np.ndarray, " train"], clips: pa.Table) -> Int[np.ndarray, " heard"]:
    """The rows that train, and the clean rows of clips that are mixed into them."""
    if "mix_sources" not in clips.column_names:
        return train
    mixes = clips.column("mix_sources").take(pa.array(train)).to_pylist()
    mixed = {name for mix in mixes for name in mix or ()}
    ids = clips.column("clip_id").to_pylist()
    sources = [row for row in np.flatnonzero(is_clean(clips)).tolist() if ids[row] in mixed]
    return np.union1d(train, np.array(sources, dtype=np.int64))


def _keys(clips: pa.Table, groups: Groups) -> dict[str, _Keys]:
    """Of each column; a row without a cell there is like no other, but by its path."""
    columns = [name for name in KNOWN_COLUMNS if name in clips.column_names]
    found = {
        column: _numbered(
            ["" if is_empty(cell) else str(cell) for cell in clips.column(column).to_pylist()]
        )
        for column in dict.fromkeys([groups.column, *columns])
    }
    if DIGEST in clips.column_names:
        digests = clips.column(DIGEST).to_pylist()
        pairs = zip(digests, is_clean(clips), strict=True)
        found[DIGEST] = _numbered([digest if clean else "" for digest, clean in pairs])
    return found


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


def _line(column: str, keys: _Keys, leaks: Mapping[int, Split], clips: pa.Table) -> str:
    """What the error says of a column, "" where nothing of it leaks."""
    if not leaks:
        return ""
    examples = ", ".join(
        _example(column, keys, number, split, clips)
        for number, split in islice(sorted(leaks.items(), key=itemgetter(0)), N_EXAMPLES)
    )
    more = f", and {len(leaks) - N_EXAMPLES} more" if len(leaks) > N_EXAMPLES else ""
    return f"  {len(leaks)} by {column}: {examples}{more}"


def _example(column: str, keys: _Keys, number: int, split: Split, clips: pa.Table) -> str:
    own = np.flatnonzero(keys.numbers == number)
    rows = {name: np.intersect1d(getattr(split, name), own) for name in SPLIT_NAMES}
    parts = [name for name in SPLIT_NAMES if len(rows[name])]
    name = repr(keys.names[number])
    if column == DIGEST:
        # A digest tells nobody anything; a clip of each part does.
        name = " = ".join(repr(clips["clip_id"][int(rows[part][0])].as_py()) for part in parts)
    where = "" if split.name == "split" else f" of {split.name}"
    return f"{name} in {' and '.join([', '.join(parts[:-1]), parts[-1]])}{where}"
