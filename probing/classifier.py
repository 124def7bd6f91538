"""A probe with scikit-learn's manners, for tokens that lie in an array."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from patchbank.pipeline.errors import TrialError
from patchbank.probing.artefact import ProbeArtefact
from patchbank.probing.batch import NO_LAYER, Batch, LayerShape, TokenSource
from patchbank.probing.losses import LossName
from patchbank.probing.metrics import left_out, primary_metric, score
from patchbank.probing.passes import Course, choose_loss, predict_logits
from patchbank.probing.plan import BatchRows, Rows, sequential
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import Probe, ProbeShape
from patchbank.probing.search import Candidate, choose
from patchbank.probing.settings import TrainSettings
from patchbank.probing.study import stack_of
from patchbank.probing.training import fit
from patchbank.probing.trials import Trial

VECTOR_PROBES = ("knn", "linear", "mlp")
"""Those that need no more of a clip than one vector."""


class ProbeClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A probe on patch tokens: x (clip, patch, dim), or (clip, dim) as one patch a clip.

    y holds one class a clip (any labels), or is a (clip, class) indicator of 0 and 1 for
    multi-label tasks. Without a `learning_rate`, five over the family's range are tried on a
    seeded fifth of the clips, and the best then trains on all of them. The result is decided by
    the parameters, x, y and `random_state`.

    The loss is cross-entropy, or for multi-label tasks binary cross-entropy, whose probabilities
    can be cut at one half. loss="asymmetric" is the one of `train`: it ranks clips as well, but
    its probabilities lie far above the frequencies.
    """

    def __init__(
        self,
        probe: str = "protobin",
        *,
        learning_rate: float | None = None,
        weight_decay: float = 1e-4,
        n_epochs: int = 30,
        batch_size: int = 64,
        valid_fraction: float = 0.2,
        loss: LossName | None = None,
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.probe = probe
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.valid_fraction = valid_fraction
        self.loss = loss
        self.options = options
        self.device = device
        self.random_state = random_state

    def fit(self, x: Any, y: Any) -> ProbeClassifier:
        """Trains on all clips; raises `TrialError` where x or y have the wrong shape."""
        source = _ArrayRows(x, probe=self.probe)
        classes, targets = _encode(y)
        if len(targets) != source.n_rows:
            raise TrialError(f"found {source.n_rows} clips in x, {len(targets)} in y")
        seed = int(check_random_state(self.random_state).randint(2**31))
        [tokens] = source.shapes.values()
        shape = ProbeShape(tokens.dim, targets.shape[1])
        family = build_probe(self.probe, shape, self.options)
        is_multi_label = np.ndim(y) == 2
        settings = self._settings(seed, is_multi_label=is_multi_label)
        fit = _Fit(self.probe, family, source, targets, is_multi_label, settings)
        rate = self.learning_rate or fit.search(self.valid_fraction)
        weights = fit.course([rate], np.arange(source.n_rows)).stack.weights_of(0)
        self.classes_, self.learning_rate_, self.n_features_in_ = classes, rate, tokens.dim
        names = tuple(map(str, classes))
        self._artefact = ProbeArtefact(
            self.probe, family.options, names, is_multi_label, shape, weights
        )
        return self

    def predict_proba(self, x: Any) -> Float[np.ndarray, "clip class"]:
        """Probabilities in the order of `classes_`; only multi-class ones sum to one."""
        check_is_fitted(self)
        source = _ArrayRows(x, probe=self.probe)
        plan = sequential(np.arange(source.n_rows), batch_size=self.batch_size)
        parts = [self._artefact.predict_proba(batch.patches) for batch in source.read(plan)]
        empty = np.zeros((0, len(self.classes_)), dtype=np.float32)
        return np.concatenate([empty, *parts])

    def predict(self, x: Any) -> np.ndarray:
        """The likeliest class of each clip, or an indicator of the classes beyond one half."""
        probabilities = self.predict_proba(x)
        if self._artefact.multi_label:
            return (probabilities > 0.5).astype(np.int64)
        return np.asarray(self.classes_[probabilities.argmax(axis=1)])

    def _settings(self, seed: int, *, is_multi_label: bool) -> TrainSettings:
        return TrainSettings(
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            weight_decays={self.probe: (self.weight_decay,)},
            loss=self.loss or ("bce" if is_multi_label else "cross-entropy"),
            order_seed=seed,
            device=self.device,
        )


@dataclass(frozen=True)
class _Fit:
    """One call of `ProbeClassifier.fit`."""

    name: str
    family: Probe
    source: TokenSource
    targets: Float[np.ndarray, "clip class"]
    is_multi_label: bool
    settings: TrainSettings

    def course(self, rates: Sequence[float], rows: Rows) -> Course:
        """One trial a learning rate, trained on `rows`."""
        settings = self.settings
        [decay] = settings.weight_decays[self.name]
        trials = [Trial(rate, decay, settings.order_seed) for rate in rates]
        course = Course(
            stack_of(self.name, self.family, trials, settings, multi_label=self.is_multi_label),
            self.targets,
            rows,
            choose_loss(settings, multi_label=self.is_multi_label),
        )
        fit([course], self.source, settings=settings)
        return course

    def search(self, valid_fraction: float) -> float:
        """The learning rate that does best on held-out clips; the middle one without such."""
        points = self.settings.candidates(self.name, self.family.learning_rates)
        rates = [point.learning_rate for point in points]
        order = np.random.default_rng(self.settings.order_seed).permutation(self.source.n_rows)
        n_valid = int(len(order) * valid_fraction)
        valid, rows = order[:n_valid], order[n_valid:]
        metric = primary_metric(multi_label=self.is_multi_label)
        n_judged = self.targets.shape[1] - len(left_out(metric, self.targets[valid]))
        if not (self.family.learns and n_valid and n_judged):
            return rates[len(rates) // 2]
        course = self.course(rates, rows)
        [logits] = predict_logits([course], self.source, [valid], settings=self.settings)
        values = [
            score(metric, self.targets[valid], one) if np.isfinite(one).all() else -math.inf
            for one in logits
        ]
        tried = [Candidate(*point, value) for point, value in zip(points, values, strict=True)]
        return choose(self.name, tried).learning_rate


class _ArrayRows:
    """A `TokenSource` over anything with a shape that rows can be taken from by number.

    Only the rows of a batch are ever copied, so x may be a memory map.
    """

    def __init__(self, x: Any, *, probe: str) -> None:
        self._x = x if hasattr(x, "shape") else np.asarray(x)
        shape = tuple(self._x.shape)
        if len(shape) == 2 and probe in VECTOR_PROBES:
            shape = (shape[0], 1, shape[1])
        if len(shape) != 3:
            also = " or (clip, dim)" if probe in VECTOR_PROBES else ""
            raise TrialError(f"found x of shape {shape}, expected (clip, patch, dim){also}")
        self.n_rows, self._row = shape[0], shape[1:]
        self.shapes: Mapping[int, LayerShape] = {NO_LAYER: LayerShape(*self._row)}

    def read(self, batches: Iterable[BatchRows]) -> Iterator[Batch]:
        for rows in batches:
            taken = self._x[rows]
            patches = taken if isinstance(taken, torch.Tensor) else torch.from_numpy(taken)
            yield Batch.of(rows, patches.reshape(len(rows), *self._row))


def _encode(y: Any) -> tuple[np.ndarray, Float[np.ndarray, "clip class"]]:
    """Classes, and float32 targets of 0 and 1."""
    labels = np.asarray(y)
    if labels.ndim == 2:
        if not np.isin(labels, (0, 1)).all():
            raise TrialError("found y with other values than 0 and 1, expected an indicator")
        return np.arange(labels.shape[1]), labels.astype(np.float32)
    if labels.ndim != 1:
        found = tuple(labels.shape)
        raise TrialError(f"found y of shape {found}, expected (clip) labels or (clip, class) 0/1")
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise TrialError(f"found {len(classes)} class in y, expected at least 2")
    return classes, np.eye(len(classes), dtype=np.float32)[numbers]
