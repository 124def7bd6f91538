"""Rows of a bank with an array's manners; their tokens are read when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.rows import TokenFloats
from patchbank.pipeline.bank.schema import DONE
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.specs import human_bytes

ROWS_AT_ONCE = 32
"""That are on their way together from a bank that lies elsewhere."""


@dataclass(frozen=True, eq=False, repr=False)
class RowsView:
    """Tokens (clip, patch, dim) of some rows of a bank, in any order; a row may come twice.

    Slices, whole numbers and masks along the clips give another view, as numpy would choose, and
    read nothing. One number gives the tokens of that clip (patch, dim); `np.asarray(view)` and
    `view[...]` read all, and check each row against its checksum. Any other index is an
    `IndexError`. What is pickled is the bank's place, never its tokens.
    """

    bank: Bank
    layer: int
    rows: Int64[np.ndarray, " clip"]
    """Row numbers in the bank, which all have tokens."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(clip, patch, dim)."""
        array = self.bank.array(self.layer)
        return len(self.rows), array.n_tokens, array.dim

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the floats: float16 where the bank stores that, float32 of all other types."""
        is_half = self.bank.array(self.layer).stored.name == "float16"
        return np.dtype(np.float16 if is_half else np.float32)

    @property
    def nbytes(self) -> int:
        """What `np.asarray` of it would take."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def clips(self) -> pa.Table:
        """The rows' part of the bank's clip table, in their order: what labels are made of."""
        return self.bank.clips.take(pa.array(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        key = _along_clips(key)
        if key is Ellipsis:
            return np.asarray(self)
        if (number := _as_number(key)) is not None:
            return self._tokens.read(int(self.rows[number])).astype(self.dtype)
        rows = self.rows[key]
        if rows.ndim != 1:
            raise _index_error(key)
        return replace(self, rows=rows)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Float[np.ndarray, ...]:
        if copy is False:
            raise ValueError("tokens of a bank have to be read: an array of them is a copy")
        tokens = np.empty(self.shape, self.dtype if dtype is None else dtype)
        rows = self.rows.tolist()
        for first in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[first : first + ROWS_AT_ONCE]
            for place, found in enumerate(self._tokens.read_all(some), first):
                tokens[place] = found
        return tokens

    def __repr__(self) -> str:
        n_clips, n_patches, dim = self.shape
        return (
            f"RowsView(clip={n_clips}, patch={n_patches}, dim={dim}, {self.dtype}, "
            f"{human_bytes(self.nbytes)}: layer {self.layer} of {self.bank.where})"
        )

    @cached_property
    def _tokens(self) -> TokenFloats:
        return TokenFloats(self.bank, self.bank.array(self.layer))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokens"}


def rows_view(bank: Bank, layer: int | None, rows: np.ndarray | Sequence[int] | None) -> RowsView:
    """See `Bank.rows_view`."""
    layer = bank.resolve_layer(layer)
    if rows is None:
        # As in `clip_table.status_of`: no other way leaves pandas alone. Only holes are null.
        number = np.from_dlpack(bank.clips["view"].drop_null().combine_chunks())
        clean = bank.schema.clip_rows()[number == 0]
        return RowsView(bank, layer, clean[bank.status[clean] == DONE])
    found = np.asarray(rows)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise BankError(
            f"found rows of shape {found.shape} and type {found.dtype}, expected row numbers; of "
            "a mask these are np.flatnonzero(mask)"
        )
    found = found.astype(np.int64)
    if len(found) and not 0 <= found.min() <= found.max() < bank.n_rows:
        raise BankError(
            f"found rows from {found.min()} to {found.max()}, expected 0 to {bank.n_rows - 1} in "
            f"{bank.where}"
        )
    if (without := found[bank.status[found] != DONE]).size:
        raise BankError(
            f"row {without[0]} has no tokens: its clip failed, or it is a hole; choose rows whose "
            "bank.status is 1"
        )
    return RowsView(bank, layer, found)


def _along_clips(key: Any) -> Any:
    """A key without what only says "all patches and dims"; `IndexError` where it says more."""
    if not isinstance(key, tuple):
        return key
    chosen = [one for one in key if one is not Ellipsis]
    if len(chosen) > 1 or len(key) > 2 or (chosen and key[0] is Ellipsis):
        raise _index_error(key)
    return chosen[0] if chosen else Ellipsis


def _as_number(key: Any) -> int | None:
    """The number that a key is, None for all others; True is a mask to numpy."""
    if isinstance(key, bool | np.bool_):
        return None
    try:
        return index(key)
    except TypeError:
        return None


def _index_error(key: Any) -> IndexError:
    found = " ".join(repr(key).split())[:60]
    return IndexError(
        f"found the index {found}, expected a number, a slice, row positions or a mask along the "
        "clips; for patches and dims read the tokens first: np.asarray(view)[...]"
    )
