"""A probe with scikit-learn's manners, for tokens in an array or in a bank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted

from patchbank.pipeline.bank.rows_view import RowsView
from patchbank.pipeline.errors import TrialDataError
from patchbank.probing.artefact import ProbeArtefact, save_probe
from patchbank.probing.batch import TokenSource
from patchbank.probing.classifier_data import ArrayRows, labels_of, tokens_of
from patchbank.probing.classifier_fit import Fitting
from patchbank.probing.entries import Entry
from patchbank.probing.losses import LossName
from patchbank.probing.passes import BatchTokens, last_layer
from patchbank.probing.plan import sequential
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import Probe
from patchbank.probing.probes.tokens import Buffers
from patchbank.probing.settings import SearchSettings, TrainSettings
from patchbank.probing.study import probe_shape
from patchbank.probing.tiers import Tier


class ProbeClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A probe on patch tokens, of any family that `train-probe` knows.

    x is an array, a memory map or a torch tensor: (clip, patch, dim), or (clip, dim) as one patch a
    clip; or a view, `bank.rows_view()`, whose tokens are read batch by batch. y holds one class a
    clip (any labels), or is a (clip, class) indicator of 0 and 1 for multi-label tasks.

    Without a `learning_rate`, `n_candidates` over the family's range are tried on a seeded
    `valid_fraction` of the clips, and the best then trains on all of them. The result is decided
    by the parameters, x, y and `random_state`. `tier` is where tokens of a view come from.

    The loss is cross-entropy, or for multi-label tasks binary cross-entropy, whose probabilities
    can be cut at one half. loss="asymmetric" is the one of `train`: it ranks clips as well, but
    its probabilities lie far above the frequencies.

    Fitted: `classes_`, `n_features_in_` (dim), `learning_rate_`, and `artefact_`. Once it is saved,
    `patchbank predict` and `export` can apply it where it was fitted on a view: of an array nobody
    knows the encoder.
    """

    def __init__(
        self,
        probe: str = "protobin",
        *,
        learning_rate: float | None = None,
        weight_decay: float = 1e-4,
        n_epochs: int = 30,
        batch_size: int = 64,
        n_candidates: int = 5,
        valid_fraction: float = 0.2,
        loss: LossName | None = None,
        options: Mapping[str, Any] | None = None,
        tier: Tier = "auto",
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.probe = probe
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.n_candidates = n_candidates
        self.valid_fraction = valid_fraction
        self.loss = loss
        self.options = options
        self.tier = tier
        self.device = device
        self.random_state = random_state

    def fit(self, x: Any, y: Any) -> ProbeClassifier:
        """Trains on all clips; raises `TrialError`, or `ValueError` where x or y are wrong."""
        labels = labels_of(y)
        settings = self._settings(multi_label=labels.multi_label)
        source = self._tokens(x, settings, reset=True)
        if len(labels.targets) != source.n_rows:
            raise TrialDataError(f"found {source.n_rows} clips in x, {len(labels.targets)} in y")
        shape = probe_shape(source.shapes, n_classes=len(labels.classes))
        family = build_probe(self.probe, shape, self.options)
        fitting = Fitting(self._entry, family, source, labels, settings)
        point = fitting.search(self.valid_fraction)
        self.classes_, self.learning_rate_ = labels.classes, point.learning_rate
        self.artefact_ = fitting.artefact(point, x if isinstance(x, RowsView) else None)
        return self

    def decision_function(self, x: Any) -> Float64[np.ndarray, ...]:
        """Logits (clip, class), above 0 where a label is likelier than not; (clip) of two classes,
        above 0 for the second."""
        logits = self._logits(x)
        if len(self.classes_) == 2 and not self.artefact_.multi_label:
            return np.asarray(logits[:, 1] - logits[:, 0])
        return logits

    def predict_proba(self, x: Any) -> Float64[np.ndarray, "clip class"]:
        """Probabilities in the order of `classes_`; only multi-class ones sum to one."""
        logits = torch.from_numpy(self._logits(x))
        multi_label = self.artefact_.multi_label
        probabilities = logits.sigmoid() if multi_label else logits.softmax(dim=1)
        return np.asarray(probabilities.numpy())

    def predict(self, x: Any) -> np.ndarray:
        """The likeliest class of each clip, or an indicator of the classes beyond one half."""
        logits = self._logits(x)
        if self.artefact_.multi_label:
            return (logits > 0).astype(np.int64)
        return np.asarray(self.classes_[logits.argmax(axis=1)])

    def save(self, folder: Path | str) -> None:
        """Leaves the probe in `folder` as `train-probe` does; fitted on a view, for `predict`."""
        check_is_fitted(self)
        save_probe(Path(folder), self.artefact_)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.classifier_tags.multi_label = True
        return tags

    @property
    def _entry(self) -> Entry:
        return Entry.of(self.probe)

    def _settings(self, *, multi_label: bool) -> TrainSettings:
        rate, name = self.learning_rate, self._entry.family_name
        return TrainSettings(
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            search=SearchSettings(n_candidates=self.n_candidates),
            learning_rates={} if rate is None else {name: (rate,)},
            weight_decays={name: (self.weight_decay,)},
            loss=self.loss or ("bce" if multi_label else "cross-entropy"),
            order_seed=int(check_random_state(self.random_state).randint(2**31)),
            device=self.device,
        )

    def _tokens(
        self, x: Any, settings: TrainSettings, *, reset: bool, reads_once: bool = False
    ) -> TokenSource:
        return tokens_of(
            self,
            x,
            reset=reset,
            tier=self.tier,
            device=settings.torch_device,
            reads_once=reads_once,
        )

    @torch.no_grad()
    def _logits(self, x: Any) -> Float64[np.ndarray, "clip class"]:
        """Of one pass over x, on the device of training, in float64 where x is.

        In float32 a clip's logits depend on the batch that it is in, by rounding.
        """
        check_is_fitted(self)
        settings = TrainSettings(device=self.device)
        source = self._tokens(x, settings, reset=False, reads_once=True)
        if isinstance(source, ArrayRows) and source.is_double:
            settings = replace(settings, dtype="float64")
        family = _family(self.artefact_)
        _check_tokens(self.artefact_, family, x, source)
        device, dtype = settings.torch_device, settings.torch_dtype
        weights = {k: value[None].to(device, dtype) for k, value in self.artefact_.weights.items()}
        layers, buffers = last_layer(source), Buffers()
        plan = sequential(np.arange(source.n_rows), batch_size=self.batch_size)
        parts = [
            family.logits(weights, BatchTokens(batch, settings, buffers).of(layers))[0].cpu()
            for batch in source.read(plan)
        ]
        return np.asarray(torch.cat(parts).double().numpy())


def _family(artefact: ProbeArtefact) -> Probe:
    return build_probe(artefact.plugin or artefact.probe, artefact.shape, artefact.options)


def _check_tokens(artefact: ProbeArtefact, family: Probe, x: Any, source: TokenSource) -> None:
    """`BankMismatch` for a view of another encoder; `TrialDataError` for one of another layer, and
    for tokens without CLS where the probe needs it."""
    if isinstance(x, RowsView) and artefact.layers:
        artefact.check_encoder(x.bank.card["encoder"], x.bank.encoder_id)
        if (x.layer,) != artefact.layers:
            [layer] = artefact.layers
            raise TrialDataError(
                f"found a view of layer {x.layer}, expected layer {layer}, which this probe is "
                f"trained on: bank.rows_view(layer={layer})"
            )
    [shape] = source.shapes.values()
    if family.uses_prefix and shape.n_prefix < artefact.shape.n_prefix:
        raise TrialDataError(
            f"found {shape.n_prefix} prefix tokens in x, expected {artefact.shape.n_prefix}, which "
            "this probe is trained on; hand it a view of a bank: bank.rows_view()"
        )
