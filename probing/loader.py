"""Shuffled batches of a bank: a plan says which rows, a source reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.errors import BankError
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import Batch
from patchbank.probing.plan import Plan, batches, sequential
from patchbank.probing.tiers import Tier, TierChoice

Rows = Int[np.ndarray, " clip"]


class BatchLoader:
    """Shuffled batches of a bank's tokens; each iteration is one epoch.

    Every row with tokens comes once an epoch, in an order that depends on (seed, epoch) only. The
    tensors of a batch are valid until the next batch; clone what is to be kept. Batches are read
    ahead by threads into a fixed ring, `ring_bytes`; leaving a loop early ends them.

    Several threads may iterate at once, each over an epoch of its own, and so may forked and
    spawned processes; an iteration itself stays where it was begun.
    """

    def __init__(
        self,
        bank: Bank,
        *,
        layer: int | Sequence[int] | None = None,
        arrays: Sequence[str] = ("patches", "prefix"),
        batch_size: int = 64,
        seed: int = 0,
        tier: Tier = "auto",
        device: torch.device | str = "cpu",
        rows: Rows | None = None,
        shuffle: bool = True,
        reads_once: bool = False,
    ) -> None:
        """`layer` is one or several, the last where None; `arrays` those that are read of each:
        patches, prefix (where there is one), mean, max, min.

        `tier` is where tokens come from, `auto` measures and chooses: see `choice`. `device` holds
        the batches. `reads_once` says that there will be one epoch, so that keeping tokens in
        memory would not pay. Raises `BankError` where the bank lacks what is asked for.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        self._rows = np.flatnonzero(bank.status == 1) if rows is None else _checked(rows, bank)
        self.source = BankSource(
            bank,
            layer,
            arrays=arrays,
            tier=tier,
            device=device,
            rows=self._rows,
            reads_once=reads_once,
        )
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._next = (0, 0)
        self._lock = threading.Lock()

    @property
    def choice(self) -> TierChoice:
        """The tier, and why."""
        return self.source.choice

    @property
    def ring_bytes(self) -> int:
        """Memory for batches, once there was one; see `BankSource.ring_bytes`."""
        return self.source.ring_bytes

    @property
    def epoch(self) -> int:
        """The next epoch; set it to begin elsewhere."""
        return self._next[0]

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self.resume(epoch)

    def resume(self, epoch: int, batch: int = 0) -> None:
        """The next iteration begins with that batch of that epoch; later ones are whole.

        After `seen = (batch.epoch, batch.index)`, `resume(seen[0], seen[1] + 1)` goes on.
        """
        if epoch < 0 or not 0 <= batch <= len(self):
            raise ValueError(
                f"found epoch {epoch}, batch {batch}; expected an epoch from 0 and a batch from 0 "
                f"to {len(self)}"
            )
        self._next = (epoch, batch)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        with self._lock:
            (epoch, first), self._next = self._next, (self._next[0] + 1, 0)
        return self._read(epoch, first)

    def _read(self, epoch: int, first: int) -> Iterator[Batch]:
        plan = self._plan(epoch)[first:]
        with closing(self.source.read(plan)) as read:
            for index, batch in enumerate(read, first):
                yield replace(batch, epoch=epoch, index=index)

    def _plan(self, epoch: int) -> Plan:
        if not self._shuffle:
            return sequential(self._rows, batch_size=self._batch_size)
        return batches(self._rows, batch_size=self._batch_size, seed=self._seed, epoch=epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def _checked(rows: Rows, bank: Bank) -> Rows:
    found = np.asarray(rows)
    if found.dtype.kind not in "iu" or (
        len(found) and not 0 <= found.min() <= found.max() < bank.n_rows
    ):
        raise BankError(
            f"rows are whole numbers from 0 to {bank.n_rows - 1} in {bank.where}, found {found!r}"
        )
    return found
