"""Times a reader over the rows of a round and checks that it read the right ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache import make_cold, make_warm
from clips import SyntheticClips
from torch import Tensor

from patchbank.probing.plan import batches

BATCH_SIZE = 64


@dataclass(frozen=True)
class Order:
    """The rows of one round; every reader that can keeps to their order."""

    seed: int
    rows: np.ndarray
    """Which rows, ascending; whole batches."""

    @property
    def batches(self) -> list[np.ndarray]:
        """As patchbank's plan has them; it is what all others are asked for."""
        return batches(self.rows, batch_size=BATCH_SIZE, seed=self.seed, epoch=0)

    @property
    def sequence(self) -> list[int]:
        return np.concatenate(self.batches).tolist()


def draw_order(n_clips: int, n_drawn: int, seed: int) -> Order:
    """Some of the clips, without replacement."""
    rng = np.random.default_rng([seed, 2])
    return Order(seed, np.sort(rng.choice(n_clips, n_drawn, replace=False)))


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    clips_per_s: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """A reader that is about to read."""

    tensors: Iterable[Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    """What it says of itself; it may add to them while it reads."""
    has_read: bool = False
    """Whether some rows were read to get here, so that the store is to be made cold again."""


@dataclass(frozen=True)
class Reader:
    """A way to get batches from a store."""

    name: str
    store: Path
    open: Callable[[Order], Opened]
    marks: Callable[[], np.ndarray]
    """What each clip should hold at the mark places (clip, mark)."""
    dtype: torch.dtype = torch.float16
    tolerance: float = 0.0
    """Of values that were quantised."""
    keeps_order: bool = True
    """False for readers that shuffle by themselves: each clip has to come once."""


class WrongData(AssertionError):
    """A reader gave other clips than it was asked for."""


def read_cold(reader: Reader, order: Order, clips: SyntheticClips, most_s: float) -> Sample:
    """Clips a second from the disk, for one epoch or `most_s`."""
    make_cold(reader.store)
    opened, open_s = _open(reader, order)
    if opened.has_read:
        make_cold(reader.store)
    return _read(reader, opened, order, clips, open_s=open_s, most_s=most_s)


def read_warm(reader: Reader, order: Order, clips: SyntheticClips, most_s: float) -> Sample:
    """The same from the page cache."""
    make_warm(reader.store)
    opened, open_s = _open(reader, order)
    return _read(reader, opened, order, clips, open_s=open_s, most_s=most_s)


def _open(reader: Reader, order: Order) -> tuple[Opened, float]:
    start = time.perf_counter()
    opened = reader.open(order)
    return opened, time.perf_counter() - start


def _read(
    reader: Reader,
    opened: Opened,
    order: Order,
    clips: SyntheticClips,
    *,
    open_s: float,
    most_s: float,
) -> Sample:
    shape, places = (clips.n_patches, clips.dim), torch.from_numpy(clips.mark_places)
    found: list[Tensor] = []
    tensors = iter(opened.tensors)
    start = time.perf_counter()
    for tensor in tensors:
        _check_form(reader, tensor, shape)
        found.append(tensor.view(len(tensor), -1)[:, places])
        if reader.keeps_order and time.perf_counter() - start > most_s:
            break
    seconds = time.perf_counter() - start
    if close := getattr(tensors, "close", None):
        close()
    marks = torch.cat(found).numpy()
    _check_marks(reader, order, marks)
    facts = {"open_s": open_s, "n_clips": len(marks), **opened.facts}
    return Sample(len(marks) / seconds, facts)


def _check_form(reader: Reader, tensor: Tensor, shape: tuple[int, int]) -> None:
    form = (tensor.shape[1:], tensor.dtype, tensor.device.type, tensor.is_contiguous())
    if form != (shape, reader.dtype, "cpu", True):
        raise WrongData(f"{reader.name}: batches are {form}")


def _check_marks(reader: Reader, order: Order, found: np.ndarray) -> None:
    marks = reader.marks()
    if reader.keeps_order:
        expected = marks[order.sequence[: len(found)]].astype(np.float32)
        is_right = np.allclose(found.astype(np.float32), expected, rtol=0, atol=reader.tolerance)
    else:
        is_right = len(found) == len(order.rows) and _are_different_clips(found, marks)
    if not is_right:
        raise WrongData(f"{reader.name}: {len(found)} clips, which are not those it was asked for")


def _are_different_clips(found: np.ndarray, marks: np.ndarray) -> bool:
    known = {row.tobytes(): number for number, row in enumerate(marks)}
    numbers = [known.get(row.tobytes(), -1) for row in found]
    return -1 not in numbers and len(set(numbers)) == len(numbers)
