"""Splits that are told by the names of files and folders."""

from __future__ import annotations

import re
from collections.abc import Sequence

from patchbank.pipeline.manifest.columns import MEANT_SPLITS, SPLITS

_PART = re.compile(r"(?:[-_.]?\d+(?:-of-\d+)?)?(?:\.\w+)*")
"""What follows the split in `train-00000-of-00003.parquet`, `test_07.tar` and `valid.parquet`."""


def meant_split(word: str) -> str | None:
    """`train`, `valid` or `test` for any of the words that stand for them."""
    plain = word.strip().lower()
    return plain if plain in SPLITS else MEANT_SPLITS.get(plain)


def splits_of_names(paths: Sequence[str]) -> list[str] | None:
    """The split of each container by its own name, or else by the nearest folder that is called
    like one; None unless all say one."""
    splits = [_split_of(path) for path in paths]
    known = [split for split in splits if split is not None]
    return known if len(known) == len(paths) else None


def _split_of(path: str) -> str | None:
    for name in reversed(path.split("/")):
        word = re.match(r"[A-Za-z]*", name)
        if word and _PART.fullmatch(name[word.end() :]) and (split := meant_split(word.group())):
            return split
    return None
