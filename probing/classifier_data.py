"""What a classifier is handed: tokens as an array, a tensor or a view of a bank, and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator
from sklearn.utils import assert_all_finite, column_or_1d
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import validate_data

from patchbank.pipeline.bank.rows_view import RowsView
from patchbank.pipeline.errors import TrialDataError
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import NO_LAYER, Batch, LayerShape, TokenSource
from patchbank.probing.plan import BatchRows
from patchbank.probing.tiers import Tier

CHECKED_VALUES = 2**22
"""Values that are looked at together for NaN, so that a memory map stays on the disk."""
FLOATS = (np.float16, np.float32, np.float64)


@dataclass(frozen=True, eq=False)
class Labels:
    """y, as probes learn it."""

    classes: np.ndarray
    """In the order of the targets; numbers from 0 for an indicator."""
    targets: Float[np.ndarray, "clip class"]
    """0 and 1."""
    multi_label: bool


def labels_of(y: Any) -> Labels:
    """One class a clip, or a (clip, class) indicator; raises `ValueError` for anything else."""
    if y is None:
        raise TrialDataError("ProbeClassifier requires y to be passed, but the target y is None")
    labels = np.asarray(y)
    if labels.ndim not in (1, 2):
        found = tuple(labels.shape)
        raise TrialDataError(
            f"found y of shape {found}, expected (clip) labels or (clip, class) 0/1"
        )
    if labels.ndim == 2 and labels.shape[1] > 1:
        if type_of_target(labels, input_name="y") != "multilabel-indicator":
            raise TrialDataError("found y with other values than 0 and 1, expected an indicator")
        return Labels(np.arange(labels.shape[1]), labels.astype(np.float32), True)
    labels = column_or_1d(labels, warn=True)
    check_classification_targets(labels)
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise TrialDataError(f"found {len(classes)} class in y, expected at least 2")
    return Labels(classes, np.eye(len(classes), dtype=np.float32)[numbers], False)


def tokens_of(
    estimator: BaseEstimator,
    x: Any,
    *,
    reset: bool,
    tier: Tier,
    device: torch.device,
    reads_once: bool = False,
) -> TokenSource:
    """x as something to read batches from, after scikit-learn's checks.

    A view is read through the bank's own reader, from `tier`; of anything else only the rows of a
    batch are ever copied. `reset` notes the number of features and their names, else they have to
    be those that were noted. Raises `ValueError`, or `TypeError` for sparse data.
    """
    if isinstance(x, RowsView):
        shape: tuple[int, ...] = x.shape
    else:
        x = x if isinstance(x, torch.Tensor) else _checked_array(estimator, x, reset=reset)
        shape = tuple(x.shape)
    _check_shape(estimator, shape, reset=reset)
    if isinstance(x, RowsView):
        return ViewRows(x, tier=tier, device=device, reads_once=reads_once)
    _check_finite(estimator, x)
    return ArrayRows(x)


def _checked_array(estimator: BaseEstimator, x: Any, *, reset: bool) -> np.ndarray:
    """x as scikit-learn has it, whose count of features fits only two axes."""
    x = x if hasattr(x, "shape") else np.asarray(x)
    found: np.ndarray = validate_data(
        estimator,
        x,
        reset=reset,
        ensure_2d=len(x.shape) < 3,
        allow_nd=True,
        ensure_all_finite=False,
    )
    return found


def _check_shape(estimator: BaseEstimator, shape: tuple[int, ...], *, reset: bool) -> None:
    if len(shape) not in (2, 3) or not all(shape):
        raise TrialDataError(
            f"found x of shape {shape}, expected (clip, patch, dim) or (clip, dim), none of them 0"
        )
    if reset:
        estimator.n_features_in_ = shape[-1]
    elif shape[-1] != estimator.n_features_in_:
        raise TrialDataError(
            f"X has {shape[-1]} features, but ProbeClassifier is expecting "
            f"{estimator.n_features_in_} features as input: the last axis is not that of training"
        )


def _check_finite(estimator: BaseEstimator, x: np.ndarray | torch.Tensor) -> None:
    size = max(1, CHECKED_VALUES * len(x) // max(1, int(np.prod(x.shape, dtype=np.int64))))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        if isinstance(part, torch.Tensor):
            if not torch.isfinite(part).all():
                raise TrialDataError("Input X contains NaN or infinity.")
        else:
            assert_all_finite(part, estimator_name=type(estimator).__name__, input_name="X")


class ArrayRows:
    """A `TokenSource` over an array (clip, patch, dim), or (clip, dim) as one patch a clip."""

    def __init__(self, x: np.ndarray | torch.Tensor) -> None:
        n_patches = 1 if len(x.shape) == 2 else x.shape[1]
        self._x, self.n_rows, self._row = x, x.shape[0], (n_patches, x.shape[-1])
        self.shapes: Mapping[int, LayerShape] = {NO_LAYER: LayerShape(*self._row)}
        self.is_double = x.dtype in (np.float64, torch.float64)

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        for rows in batches:
            patches = _floats(self._x[rows])
            yield Batch.of(rows, patches.reshape(len(rows), *self._row))


def _floats(taken: Shaped[np.ndarray, ...] | torch.Tensor) -> Float[torch.Tensor, ...]:
    """Floats that torch knows, in this machine's byte order."""
    if isinstance(taken, torch.Tensor):
        return taken.detach() if taken.is_floating_point() else taken.float()
    known = taken if taken.dtype in FLOATS else taken.astype(np.float32)
    return torch.from_numpy(np.asarray(known))


class ViewRows:
    """A `TokenSource` over the positions of a view, which may be in any order and come twice."""

    def __init__(
        self, view: RowsView, *, tier: Tier, device: torch.device, reads_once: bool
    ) -> None:
        self._rows, self.n_rows = view.rows, len(view)
        self._source = BankSource(
            view.bank,
            view.layer,
            tier=tier,
            device=device,
            rows=np.unique(view.rows),
            reads_once=reads_once,
        )
        self.shapes: Mapping[int, LayerShape] = self._source.shapes

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        plan = list(batches)
        with closing(self._source.read(self._rows[positions] for positions in plan)) as read:
            for positions, batch in zip(plan, read, strict=True):
                yield replace(batch, rows=positions)
