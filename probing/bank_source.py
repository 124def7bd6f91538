"""The tokens of a bank, read from the tier that suits it."""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from patchbank.pipeline.bank.places import RowPlaces
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.row_files import MOST_OPEN_FILES, RowReader, reads_directly
from patchbank.pipeline.bank.schema import POOLED
from patchbank.pipeline.errors import BankError
from patchbank.probing.batch import Batch, LayerShape, LayerTokens
from patchbank.probing.decoding import Dequantiser, QuantisedTokens
from patchbank.probing.device_ring import N_DEVICE_SLOTS, DeviceRows, copied_ahead
from patchbank.probing.plan import BatchRows
from patchbank.probing.ring import N_SLOTS, Column, Filled, FilledBatches, Slot, read_ahead
from patchbank.probing.row_readers import MappedRows, RamRows, SmallRows
from patchbank.probing.tiers import (
    FROM_AFAR,
    SMALL_ROW_BYTES,
    TIERS,
    Tier,
    TierChoice,
    choose_tier,
    look_at,
)

REMOTE_THREADS = 16
"""Of a bank that lies elsewhere: enough that two batches are under way."""
ARRAYS = ("patches", "prefix", *POOLED)
Rows = Int[np.ndarray, " clip"]


@dataclass
class _Ring:
    """What one iteration needs for itself."""

    slots: list[Slot]
    device_slots: list[Slot]
    dequantisers: Mapping[int, Dequantiser]

    @property
    def n_bytes(self) -> int:
        slots = (slot.memory.nbytes for slot in (*self.slots, *self.device_slots))
        return sum(slots) + sum(one.n_bytes for one in self.dequantisers.values())


class BankSource:
    """Tokens of one layer of a bank, or several; see `TokenSource`.

    May be read from by several threads, and in processes that were forked or spawned; each
    iteration has a ring of slots of its own, which the next one takes over.
    """

    def __init__(
        self,
        bank: Bank,
        layer: int | Sequence[int] | None = None,
        *,
        arrays: Sequence[str] = ("patches", "prefix"),
        tier: Tier = "auto",
        device: torch.device | str = "cpu",
        rows: Rows | None = None,
        reads_once: bool = False,
    ) -> None:
        """`rows` are those that will be read, all where None, and those without tokens never;
        `reads_once` that they are read in one pass only.

        Raises `BankError` for a layer, array or tier that there is not.
        """
        chosen = list(layer) if isinstance(layer, Sequence) else [bank.resolve_layer(layer)]
        if not chosen:
            raise BankError(f"found no layer to read, expected some of {list(bank.layers)}")
        self.layers = tuple(dict.fromkeys(bank.resolve_layer(one) for one in chosen))
        # With its number, so that it equals the device of tensors.
        self.device = torch.empty(0, device=device).device
        self._done = bank.status == 1
        self.n_rows = bank.n_rows
        self._is_remote = bank.is_remote
        self._check(bank, arrays, tier)
        wanted = np.flatnonzero(self._done) if rows is None else rows[self._done[rows]]
        tokens = [
            array
            for array in bank.schema.arrays()
            if array.layer in self.layers and array.kind in arrays
        ]
        self.shapes: Mapping[int, LayerShape] = {
            layer: _shape_of(bank, layer, arrays) for layer in self.layers
        }
        places = {(a.layer, a.kind): bank.places(a.layer, a.kind) for a in tokens}
        self._most_open = _most_open(len(tokens))
        self.choice = self._choose(list(places.values()), wanted, tier, reads_once=reads_once)
        self._is_all_counted = {layer: self._counts_all(bank, layer) for layer in self.layers}
        self._columns = [
            *(self._token_column(bank, places[a.layer, a.kind], wanted, tier) for a in tokens),
            *self._small_columns(bank, arrays),
        ]
        self._constants = {
            layer: bank.constants(layer)
            for layer in self.layers
            if bank.schema.stored.is_quantised and "patches" in arrays
        }
        self._stored = bank.schema.stored
        self._on_device = (
            DeviceRows(self._columns, wanted, n_rows=bank.n_rows, device=self.device)
            if self.tier == "device"
            else None
        )
        self._rings: list[_Ring] = []
        # Its methods are atomic: a lock could be held when the process forks.
        self._idle: deque[_Ring] = deque()

    @property
    def ring_bytes(self) -> int:
        """Memory for batches: three slots of the largest batch for each iteration at a time.

        On a GPU there are two more, and quantised tokens need one of floats. It is 0 before the
        first batch, grows to the largest one, and then stays.
        """
        return sum(ring.n_bytes for ring in self._rings)

    @property
    def layer(self) -> int:
        """The only layer, or the last of several."""
        return self.layers[-1]

    @property
    def tier(self) -> Tier:
        """Where tokens come from; `choice` says why."""
        return self.choice.tier

    def _check(self, bank: Bank, arrays: Sequence[str], tier: Tier) -> None:
        unknown = [name for name in arrays if name not in ARRAYS]
        if unknown or not arrays:
            raise BankError(f"found arrays={list(arrays)}, expected some of {list(ARRAYS)}")
        if {"patches", "prefix"} & set(arrays):
            bank.require_tokens()
        if tier not in TIERS:
            raise BankError(f"found tier={tier!r}, expected one of {list(TIERS)}")
        if bank.is_remote and tier in ("map", "direct"):
            raise BankError(
                f"the tier {tier!r} reads files of this machine, and {bank.where} is elsewhere; "
                f"choose ram or read, or pull it first: patchbank bank pull {bank.where}"
            )
        if self.device.type not in ("cpu", "cuda"):
            raise BankError(f"found device {self.device}, expected cpu or cuda")
        if tier == "device" and self.device.type == "cpu":
            raise BankError(
                'the tier "device" keeps tokens on a GPU, and the device is the CPU; choose '
                'the device "cuda", or the tier "ram"'
            )

    def _counts_all(self, bank: Bank, layer: int) -> bool:
        counted = bank.n_patches(layer)[self._done]
        return bool((counted == bank.schema.grids[layer].n_patches).all())

    def _choose(
        self, places: list[RowPlaces], rows: Rows, tier: Tier, *, reads_once: bool
    ) -> TierChoice:
        if tier != "auto" and self._is_remote:
            return TierChoice(tier, f"as asked, {FROM_AFAR}")
        if tier == "direct" and not all(map(reads_directly, places)):
            return TierChoice("read", "the file system has no O_DIRECT")
        if tier != "auto":
            return TierChoice(tier, "as asked")
        facts = look_at(
            places,
            rows,
            free_device_bytes=_free_bytes(self.device),
            reads_once=reads_once,
            is_remote=self._is_remote,
        )
        return choose_tier(facts)

    def _token_column(self, bank: Bank, places: RowPlaces, rows: Rows, asked: Tier) -> Column:
        array, reader = places.array, self._reader(bank, places, rows, asked)
        return Column(array.layer, array.kind, reader, (array.n_tokens, array.width), array.dtype)

    def _reader(self, bank: Bank, places: RowPlaces, rows: Rows, asked: Tier) -> RowReader:
        if self.tier == "map":
            return MappedRows(places)
        is_small = asked == "auto" and places.array.row_bytes < SMALL_ROW_BYTES
        wants_direct = self.tier != "read" and not is_small and not bank.is_remote
        direct = wants_direct and reads_directly(places)
        files = bank.row_reader(places, direct=direct, most_open=self._most_open)
        return RamRows(files, rows, n_rows=self.n_rows) if self.tier == "ram" else files

    def _small_columns(self, bank: Bank, arrays: Sequence[str]) -> Iterator[Column]:
        """Scales and counts where they are needed, and the pooled vectors that were asked for."""
        for small in bank.schema.small_arrays():
            is_needed = small.name in arrays or (
                (small.name == "scale" and "patches" in arrays)
                or (small.name == "n_patches" and not self._is_all_counted.get(small.layer, True))
            )
            if small.layer in self.layers and is_needed:
                reader, dtype = SmallRows(bank.small(small)), np.dtype(small.dtype)
                yield Column(small.layer, small.name, reader, small.row_shape, dtype)

    def read(self, batches: Iterable[BatchRows]) -> Generator[Batch, None, None]:
        """One `Batch` for each array of rows, in order; `BankError` for a row without tokens."""
        with self._ring() as ring, closing(self._filled(batches, ring)) as filled:
            for one in filled:
                yield self._batch(one, ring)

    def _checked(self, rows: BatchRows) -> BatchRows:
        if not self._done[rows].all():
            row = int(rows[~self._done[rows]][0])
            raise BankError(f"row {row} has no tokens: its clip failed, or it is a hole")
        return rows

    def _filled(self, batches: Iterable[BatchRows], ring: _Ring) -> FilledBatches:
        plan = map(self._checked, batches)
        n_threads = REMOTE_THREADS if self._is_remote else _n_threads(self.tier)
        if self._on_device is not None:
            return self._on_device.batches(plan, n_threads=n_threads)
        is_cuda = self.device.type == "cuda"
        filled = read_ahead(
            plan, self._columns, ring.slots, n_threads=n_threads, by_view=not is_cuda
        )
        return copied_ahead(filled, ring.device_slots, self.device) if is_cuda else filled

    def _batch(self, filled: Filled, ring: _Ring) -> Batch:
        n_rows, values = len(filled.rows), dict[int, dict[str, Tensor]]()
        for column, part in zip(self._columns, filled.parts, strict=True):
            values.setdefault(column.layer, {})[column.name] = column.tensor(part, n_rows)
        return Batch(
            filled.rows,
            {
                layer: _layer_tokens(values.get(layer, {}), ring.dequantisers.get(layer))
                for layer in self.layers
            },
        )

    @contextmanager
    def _ring(self) -> Iterator[_Ring]:
        """A ring that nobody else uses."""
        try:
            ring = self._idle.pop()
        except IndexError:
            ring = self._new_ring()
            self._rings.append(ring)
        try:
            yield ring
        except GeneratorExit:
            self._idle.append(ring)
            raise
        except BaseException:
            # Readers may still be at work in it.
            self._rings.remove(ring)
            raise
        self._idle.append(ring)

    def _new_ring(self) -> _Ring:
        is_cuda = self.device.type == "cuda"
        return _Ring(
            [Slot(self._columns, is_pinned=is_cuda) for _ in range(N_SLOTS)],
            [Slot(self._columns, device=self.device) for _ in range(N_DEVICE_SLOTS * is_cuda)],
            {
                layer: Dequantiser(constants, self._stored, self.device)
                for layer, constants in self._constants.items()
            },
        )

    def __getstate__(self) -> dict[str, Any]:
        # Another process begins with no memory for batches, and opens files for itself.
        return self.__dict__ | {"_rings": [], "_idle": deque()}


def _shape_of(bank: Bank, layer: int, arrays: Sequence[str]) -> LayerShape:
    grid = bank.schema.grids[layer]
    [spec] = [spec for spec in bank.schema.layers if spec.layer == layer]
    n_prefix = spec.n_prefix if "prefix" in arrays else 0
    return LayerShape(grid.n_patches, spec.dim, n_prefix, (grid.time, grid.freq))


def _layer_tokens(values: Mapping[str, Tensor], dequantise: Dequantiser | None) -> LayerTokens:
    raw, counts = values.get("patches"), values.get("n_patches")
    quantised = None
    if dequantise is not None and raw is not None:
        quantised = QuantisedTokens(dequantise, values["scale"])
    return LayerTokens(
        raw,
        values.get("prefix"),
        None if counts is None else counts.long(),
        {name: values[name] for name in POOLED if name in values},
        quantised,
    )


def _n_threads(tier: Tier) -> int:
    """Reads that wait for the disk: more than there are processors; copies: no more."""
    n_cpus = os.cpu_count() or 1
    return min(16, max(4, 2 * n_cpus)) if tier in ("direct", "ram") else min(4, max(2, n_cpus))


def _most_open(n_arrays: int) -> int:
    """Files of each array that may be open: together a quarter of what the process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 2**20 if soft == resource.RLIM_INFINITY else soft
    return max(16, min(MOST_OPEN_FILES, limit // 4 // max(1, n_arrays)))


def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; 0 for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
