"""Where batches of tokens come from: a plan says which rows, a source reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from patchbank.pipeline.bank.reader import ADVICE, Bank, RowPlaces
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.probing.decoding import decoder, float_tensor
from patchbank.probing.plan import BatchRows, batches, sequential

Rows = Int[np.ndarray, " clip"]
Tokens = Shaped[np.ndarray, "clip token dim"]
"""In the stored form: floats, or the codes that stand for them."""
Mapped = UInt8[np.ndarray, " byte"]
Tier = Literal["auto", "ram", "map"]


@dataclass(frozen=True)
class Batch:
    """Tokens of some rows; valid until the next batch, and not to be written into.

    The tensors may be views of mapped files or of a slot that the next batch overwrites.
    """

    rows: Rows
    patches: Float[Tensor, "clip patch dim"]
    """Floats: in the bank's stored type, float32 where it is quantised."""
    prefix: Float[Tensor, "clip prefix dim"] | None = None
    n_patches: Int[Tensor, " clip"] | None = None
    """Patches that count, the first of each clip; None where all do."""


@runtime_checkable
class TokenSource(Protocol):
    """Something that hands out the tokens of rows, in the order it is asked."""

    n_rows: int
    n_patches: int
    """Patches in a row."""
    dim: int
    n_prefix: int

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        """One `Batch` for each array of rows, in order."""
        ...


class ArraySource:
    """Tokens that already lie in memory."""

    def __init__(
        self,
        patches: Float[Tensor, "clip patch dim"],
        prefix: Float[Tensor, "clip prefix dim"] | None = None,
        n_patches: Int[Tensor, " clip"] | None = None,
    ) -> None:
        self.n_rows, self.n_patches, self.dim = patches.shape
        self.n_prefix = 0 if prefix is None else prefix.shape[1]
        self._patches, self._prefix, self._counts = patches, prefix, n_patches

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        for rows in batches:
            index = torch.from_numpy(np.asarray(rows, dtype=np.int64))
            yield Batch(
                rows,
                self._patches[index],
                None if self._prefix is None else self._prefix[index],
                None if self._counts is None else self._counts[index],
            )


class TokenReader:
    """Rows of one token array, from memory (`ram`) or from mapped shard files (`map`).

    `ram` holds all rows once; `map` maps the files and leaves memory to the page cache. Consecutive
    rows of one shard come as a view of the mapped file, without a copy; other rows are gathered
    into a slot that the next call overwrites. A fresh allocation for each batch would cost five
    times the copy.
    """

    def __init__(self, places: RowPlaces, *, tier: Tier) -> None:
        self._places = places
        self._shards: dict[int, Mapped] = {}
        self._slot: Tokens | None = None
        is_there = places.offset >= 0
        # Holes take no memory: they may be any number of rows.
        self._order = np.cumsum(is_there) - 1
        self._all = self._gather_all(np.flatnonzero(is_there)) if tier == "ram" else None

    def read(self, rows: Rows) -> Tokens:
        """The tokens of `rows`, in that order; valid until the next call.

        Raises `BankError` for a hole and `BankCorrupt` where a shard file has lost rows since the
        bank was opened. A file that is cut while it is mapped ends the process (SIGBUS).
        """
        missing = self._places.offset[rows] < 0
        if missing.any():
            raise BankError(f"row {int(rows[np.argmax(missing)])} has no tokens: it is a hole")
        if self._all is not None:
            # Any other mode would make numpy copy the result once more.
            out = self._slot_for(len(rows))
            return np.take(self._all, self._order[rows], axis=0, out=out, mode="clip")
        view = self._consecutive(rows)
        return view if view is not None else self._gather(rows, self._slot_for(len(rows)))

    def _gather_all(self, rows: Rows) -> Tokens:
        every = self._empty(len(rows))
        self._gather(rows, every)
        self._shards.clear()
        return every

    def _empty(self, n_rows: int) -> Tokens:
        array = self._places.array
        return np.empty((n_rows, array.n_tokens, array.width), array.dtype)

    def _slot_for(self, n_rows: int) -> Tokens:
        if self._slot is None or len(self._slot) < n_rows:
            self._slot = self._empty(n_rows)
        return self._slot[:n_rows]

    def _gather(self, rows: Rows, out: Tokens) -> Tokens:
        for slot, row in enumerate(rows.tolist()):
            out[slot] = self._row(row)
        return out

    def _row(self, row: int) -> Shaped[np.ndarray, "token dim"]:
        array, offset = self._places.array, int(self._places.offset[row])
        mapped = self._shard(self._places.shard_of(row))
        flat = mapped[offset : offset + array.row_bytes].view(array.dtype)
        return flat.reshape(array.n_tokens, array.width)

    def _shard(self, shard: int) -> Mapped:
        if shard not in self._shards:
            self._shards[shard] = self._map(shard)
        return self._shards[shard]

    def _map(self, shard: int) -> Mapped:
        """The file of a shard; `BankCorrupt` where it ends before its last row."""
        places, path = self._places, self._places.files[shard]
        first = shard * places.rows_per_shard
        offsets = places.offset[first : first + places.rows_per_shard]
        n_bytes = int(offsets.max()) + places.array.row_bytes
        try:
            # Copy-on-write, so that torch may wrap it; nothing is ever written.
            mapped = np.memmap(path, np.uint8, mode="c")
        except (OSError, ValueError) as error:
            raise BankCorrupt(f"{path}: {error}; {ADVICE}") from error
        if len(mapped) < n_bytes:
            raise BankCorrupt(
                f"{path} has {len(mapped)} bytes, its rows end at {n_bytes}; it was cut after the "
                f"bank was opened; {ADVICE}"
            )
        return mapped

    def _consecutive(self, rows: Rows) -> Tokens | None:
        """A strided view of the mapped file, where the rows lie one after another in it."""
        first, last, count = int(rows[0]), int(rows[-1]), len(rows)
        if count == 1:
            return self._row(first)[None]
        if self._places.shard_of(first) != self._places.shard_of(last):
            return None
        offsets = self._places.offset[rows]
        steps = np.diff(offsets)
        if (np.diff(rows) != 1).any() or (steps != steps[0]).any() or steps[0] <= 0:
            return None
        row = self._row(first)
        strides = (int(steps[0]), *row.strides)
        return np.lib.stride_tricks.as_strided(row, (count, *row.shape), strides)


def choose_tier(n_bytes: int, tier: Tier = "auto") -> Tier:
    """`ram` where the tokens fit in half of the memory that is free now, else `map`."""
    if tier != "auto":
        return tier
    return "ram" if 2 * n_bytes <= free_memory_bytes() else "map"


def free_memory_bytes() -> int:
    """Memory that is free now, within the limit of this process's control group.

    0 where the system does not say.
    """
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free


def _checked(rows: Rows, bank: Bank) -> Rows:
    found = np.asarray(rows)
    if found.dtype.kind not in "iu" or (
        len(found) and not 0 <= found.min() <= found.max() < bank.n_rows
    ):
        raise BankError(
            f"rows are whole numbers from 0 to {bank.n_rows - 1} in {bank.path}, found {found!r}"
        )
    return found


class BankSource:
    """The tokens of one layer of a bank; see `TokenSource`."""

    def __init__(self, bank: Bank, layer: int | None = None, *, tier: Tier = "auto") -> None:
        self.layer = bank.resolve_layer(layer)
        array = bank.array(self.layer)
        self.n_rows, self.n_patches, self.dim = bank.n_rows, array.n_tokens, array.dim
        self.n_prefix = bank.schema.layers[bank.layers.index(self.layer)].n_prefix
        places = bank.places(self.layer)
        n_stored = int((places.offset >= 0).sum())
        self.tier = choose_tier(n_stored * array.row_bytes, tier)
        self._patches = TokenReader(places, tier=self.tier)
        self._prefix = (
            TokenReader(bank.places(self.layer, "prefix"), tier=self.tier)
            if self.n_prefix
            else None
        )
        self._decode = decoder(bank, self.layer)
        self._counts = torch.from_numpy(bank.n_patches(self.layer)).long()
        self._done = bank.status == 1
        counted = self._counts[torch.from_numpy(self._done)]
        self._all_count = bool((counted == self.n_patches).all())

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        """One `Batch` for each array of rows, in order; `BankError` for a row without tokens."""
        for rows in batches:
            if not self._done[rows].all():
                row = int(rows[~self._done[rows]][0])
                raise BankError(f"row {row} has no tokens: its clip failed, or it is a hole")
            index = torch.from_numpy(rows.astype(np.int64))
            yield Batch(
                rows,
                self._decode(self._patches.read(rows), rows),
                None if self._prefix is None else float_tensor(self._prefix.read(rows)),
                None if self._all_count else self._counts[index],
            )


class BatchLoader:
    """Shuffled batches of one layer's tokens; each iteration is one epoch.

    Every row with tokens comes once an epoch, in an order that depends on (seed, epoch) only. The
    tensors of a batch are valid until the next batch; clone what is to be kept.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        layer: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        tier: Tier = "auto",
        rows: Rows | None = None,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        self.source = BankSource(bank, layer, tier=tier)
        self.epoch = 0
        """The next epoch; set it to begin elsewhere."""
        self._rows = np.flatnonzero(bank.status == 1) if rows is None else _checked(rows, bank)
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if self._shuffle:
            plan = batches(
                self._rows, batch_size=self._batch_size, seed=self._seed, epoch=self.epoch
            )
        else:
            plan = sequential(self._rows, batch_size=self._batch_size)
        self.epoch += 1
        return self.source.read(plan)
