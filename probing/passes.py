"""What a pass over a bank feeds: courses, and the tokens of a batch that they share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from patchbank.probing.batch import Batch, TokenSource
from patchbank.probing.losses import LOSSES, Loss, asymmetric
from patchbank.probing.memory import MemoryStack
from patchbank.probing.plan import BatchRows, Rows, sequential
from patchbank.probing.probes.tokens import Buffers, Tokens, convert
from patchbank.probing.settings import TrainSettings
from patchbank.probing.trials import TrialStack


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
