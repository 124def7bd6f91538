"""patchbank's loader as one of the readers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from cache import resident_bytes
from clips import SyntheticClips
from reading import BATCH_SIZE, Opened, Order, Reader
from synthetic_bank import LAYER
from torch import Tensor

from patchbank.pipeline.bank import open_bank
from patchbank.probing import BatchLoader

INT8_ERROR = 0.03
"""Half a step of a token whose largest of 768 normal values is above 7."""


@dataclass(frozen=True)
class OwnReader:
    """One tier of the loader over one bank."""

    bank: Path
    tier: str
    is_raw: bool = False
    """Stored codes instead of floats."""
    reads_once: bool = False
    """Says that keeping tokens in memory will not pay, as for a bank larger than that."""
    is_filling: bool = False
    """Times the epoch that brings tokens into memory, not a later one."""

    def open(self, order: Order) -> Opened:
        """The loader as it is after a first epoch has begun: its ring has been touched, and where
        it keeps tokens in memory, all are there."""
        before, start = resident_bytes(), time.perf_counter()
        loader = BatchLoader(
            open_bank(self.bank),
            batch_size=BATCH_SIZE,
            seed=order.seed,
            rows=order.rows,
            tier=self.tier,  # type: ignore[arg-type]
            reads_once=self.reads_once,
        )
        facts: dict[str, Any] = {"construct_s": time.perf_counter() - start}
        facts["tier"], tier = str(loader.choice), loader.choice.tier
        # Pages that were read while they were mapped would stay.
        is_begun = tier != "map" and not self.is_filling
        if is_begun:
            self._begin(loader, is_kept=tier in ("ram", "device"))
            facts["begin_s"] = time.perf_counter() - start
        return Opened(self._tensors(loader, facts, before), facts, has_read=is_begun)

    def _begin(self, loader: BatchLoader, *, is_kept: bool) -> None:
        for _ in loader:
            if not is_kept:
                break
        loader.epoch = 0

    def _tensors(
        self, loader: BatchLoader, facts: dict[str, Any], bytes_before: int
    ) -> Iterator[Tensor]:
        most = 0
        for batch in loader:
            most = max(most, resident_bytes())
            yield batch.raw if self.is_raw else batch.patches
        facts |= {"rss_growth_bytes": most - bytes_before, "ring_bytes": loader.ring_bytes}


def float16_reader(bank: Path, clips: SyntheticClips, tier: str, *, reads_once: bool) -> Reader:
    """`ram` from a cold disk is timed while it fills."""
    is_filling = reads_once and tier == "ram"
    own = OwnReader(bank, tier, reads_once=reads_once, is_filling=is_filling)
    name = f"patchbank {tier}{', filling' * is_filling}"
    return Reader(name, bank, own.open, lambda: clips.marks)


def int8_reader(bank: Path, clips: SyntheticClips, tier: str, *, is_raw: bool) -> Reader:
    """`raw` codes, or what they stand for."""
    own = OwnReader(bank, tier, is_raw=is_raw, reads_once=True)
    if is_raw:
        name, dtype = f"int8 {tier}, codes", torch.int8
        return Reader(name, bank, own.open, lambda: stored_marks(bank, clips), dtype)
    name, dtype = f"int8 {tier}, floats", torch.float32
    return Reader(name, bank, own.open, lambda: clips.marks, dtype, tolerance=INT8_ERROR)


@cache
def stored_marks(bank: Path, clips: SyntheticClips) -> np.ndarray:
    """Codes at the mark places, as zarr-python reads them."""
    array = zarr.open_array(bank / f"layers/{LAYER}/patches", mode="r")
    rows = [np.asarray(array[row]).reshape(-1) for row in range(clips.n_clips)]
    return np.stack([row[clips.mark_places] for row in rows])
