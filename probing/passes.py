"""Passes over a bank: one read of the tokens feeds every trial of every probe."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchbank.probing.batch import Batch, TokenSource
from patchbank.probing.losses import LOSSES, Loss, asymmetric
from patchbank.probing.memory import MemoryStack
from patchbank.probing.optimiser import cosine_factor
from patchbank.probing.plan import BatchRows, Rows, batches, sequential
from patchbank.probing.probes.tokens import Buffers, Tokens, convert
from patchbank.probing.settings import TrainSettings
from patchbank.probing.trials import TrialStack


@dataclass(frozen=True)
class Progress:
    """An epoch has ended."""

    stage: str
    """What the pass is for: "search" or "final", after the fold where there are folds."""
    epoch: int
    """1-based."""
    n_epochs: int
    losses: dict[str, float]
    """The lowest mean training loss of each probe's trials; infinite where all diverged."""


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class Course:
    """What one stack is to learn: from which layers, which targets, on which rows."""

    stack: TrialStack | MemoryStack
    targets: Float[np.ndarray, "clip class"]
    """Of all rows of the source."""
    rows: Rows
    """Those that train it."""
    loss: Loss
    layers: tuple[int, ...] = ()
    """The source's last where none is named."""
    name: str = ""
    """In the progress, the stack's where it is empty."""


def choose_loss(settings: TrainSettings, *, multi_label: bool) -> Loss:
    """The loss that the settings name, with its constants."""
    name = settings.loss
    if name == "auto":
        name = "asymmetric" if multi_label else "cross-entropy"
    if name != "asymmetric":
        return LOSSES[name]
    return functools.partial(
        asymmetric,
        gamma_negative=settings.gamma_negative,
        gamma_positive=settings.gamma_positive,
        clip=settings.clip,
    )


def fit(
    courses: Sequence[Course],
    source: TokenSource,
    *,
    settings: TrainSettings,
    stage: str = "train",
    progress: OnProgress | None = None,
) -> None:
    """Trains all stacks, reading the rows of all courses once an epoch, in an order they share.

    A course whose rows are fewer than the others' learns from its part of each batch, so that its
    batches are smaller than alone. Stacks that only remember see the first epoch.
    """
    rows = union([course.rows for course in courses])
    parts = {
        id(course.rows): Part(course.rows, n_rows=source.n_rows)
        for course in courses
        if len(course.rows) < len(rows)
    }
    # Courses of one label set share their targets, in the memory of the device too.
    targets = {
        id(course.targets): torch.from_numpy(course.targets).to(
            settings.torch_device, settings.torch_dtype
        )
        for course in courses
    }
    pupils = [
        _Pupil(
            course,
            parts.get(id(course.rows)),
            targets[id(course.targets)],
            layers=course.layers or last_layer(source),
        )
        for course in courses
    ]
    n_epochs = settings.n_epochs if any(one.learns for one in pupils) else 1
    n_batches = -(-len(rows) // settings.batch_size)
    step, buffers = 0, Buffers()
    for epoch in range(n_epochs):
        plan = batches(rows, batch_size=settings.batch_size, seed=settings.order_seed, epoch=epoch)
        for batch in source.read(plan):
            factor = cosine_factor(
                step, n_steps=n_batches * n_epochs, n_warmup_steps=settings.n_warmup_steps
            )
            tokens = BatchTokens(batch, settings, buffers)
            for pupil in pupils:
                if pupil.learns or epoch == 0:
                    pupil.step(batch, tokens, factor=factor)
            step += 1
        losses = {one.name: one.lowest_loss() for one in pupils if one.learns}
        if progress is not None:
            progress(Progress(stage, epoch + 1, n_epochs, losses))


@dataclass
class BatchTokens:
    """The tokens of one batch in the training type, each choice of layers made once."""

    batch: Batch
    settings: TrainSettings
    buffers: Buffers
    _made: dict[tuple[tuple[int, ...], int], Tokens] = field(default_factory=dict)

    def of(self, layers: tuple[int, ...], part: Part | None = None) -> Tokens:
        """Those of one layer, or of several for a probe that mixes them; of all clips or some."""
        key = (layers, 0 if part is None else id(part))
        if key not in self._made:
            if len(layers) > 1:
                *others, last = (self.of((layer,), part) for layer in layers)
                self._made[key] = last.after(others)
            elif part is not None:
                places = torch.from_numpy(part.places(self.batch))
                self._made[key] = self.of(layers).take(places.to(self.settings.torch_device))
            else:
                self._made[key] = self._converted(layers[0])
        return self._made[key]

    def _converted(self, layer: int) -> Tokens:
        return convert(
            self.batch,
            dtype=self.settings.torch_dtype,
            device=self.settings.torch_device,
            buffers=self.buffers,
            layer=layer,
        )


class Part:
    """Rows that take part in a course, where not all of a batch do."""

    def __init__(self, rows: Rows, *, n_rows: int) -> None:
        self._takes_part: Bool[np.ndarray, " clip"] = np.zeros(n_rows, dtype=bool)
        self._takes_part[rows] = True

    def places(self, batch: Batch) -> Int[np.ndarray, " _"]:
        """Places of such rows in a batch."""
        return np.flatnonzero(self._takes_part[np.asarray(batch.rows, dtype=np.int64)])


class _Pupil:
    """A course under way."""

    def __init__(
        self,
        course: Course,
        part: Part | None,
        targets: Float[Tensor, "clip class"],
        *,
        layers: tuple[int, ...],
    ) -> None:
        self._course, self._part, self._targets, self._layers = course, part, targets, layers
        self.name = course.name or course.stack.name
        self.learns = course.stack.probe.learns
        self._total, self._n_steps = torch.zeros(len(course.stack.trials), device=targets.device), 0

    def step(self, batch: Batch, tokens: BatchTokens, *, factor: float) -> None:
        """Learns from the rows of a batch that are of its course."""
        rows = np.asarray(batch.rows, dtype=np.int64)
        if self._part is not None:
            rows = rows[self._part.places(batch)]
        if not len(rows):
            return
        wanted, seen = self._targets[torch.from_numpy(rows)], tokens.of(self._layers, self._part)
        self._total += self._course.stack.step(seen, wanted, self._course.loss, factor=factor)
        self._n_steps += 1

    def lowest_loss(self) -> float:
        """The lowest mean loss of a trial since it was asked last."""
        totals = self._total.nan_to_num(nan=math.inf, posinf=math.inf)
        found = float(totals.min()) / max(1, self._n_steps)
        self._total.zero_()
        self._n_steps = 0
        return found


def last_layer(source: TokenSource) -> tuple[int, ...]:
    """The last layer that a source has, as a choice of layers."""
    return (max(source.shapes),)


def union(parts: Sequence[BatchRows]) -> BatchRows:
    """All rows of `parts`; in their order where all are the same, else ascending."""
    if all(len(part) == len(parts[0]) and (part == parts[0]).all() for part in parts):
        return parts[0]
    return np.unique(np.concatenate(list(parts)))


def predict_logits(
    courses: Sequence[Course],
    source: TokenSource,
    rows: Sequence[BatchRows],
    *,
    settings: TrainSettings,
) -> list[Float[np.ndarray, "trial _ _"]]:
    """Logits of every course's stack for its `rows`, in their order, from one read of all."""
    together, buffers = union(rows), Buffers()
    layers = [course.layers or last_layer(source) for course in courses]
    parts: list[list[np.ndarray]] = [[] for _ in courses]
    for batch in source.read(sequential(together, batch_size=settings.batch_size)):
        tokens = BatchTokens(batch, settings, buffers)
        for course, chosen, part in zip(courses, layers, parts, strict=True):
            logits = course.stack.logits(tokens.of(chosen))
            part.append(logits.to("cpu", torch.float32).numpy())
    joined = [np.concatenate(part, axis=1) for part in parts]
    return [
        logits if wanted is together else logits[:, np.searchsorted(together, wanted)]
        for logits, wanted in zip(joined, _same_object(rows, together), strict=True)
    ]


def _same_object(rows: Sequence[BatchRows], together: BatchRows) -> list[BatchRows]:
    """`together` in place of rows that equal it."""
    return [together if np.array_equal(one, together) else one for one in rows]
