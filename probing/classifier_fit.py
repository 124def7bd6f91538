"""One training of a classifier: the search for a learning rate, the final probe, what it leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from patchbank.pipeline.bank.rows_view import RowsView
from patchbank.pipeline.errors import TrialError
from patchbank.probing.artefact import ProbeArtefact
from patchbank.probing.batch import TokenSource
from patchbank.probing.classifier_data import Labels
from patchbank.probing.entries import Entry
from patchbank.probing.metrics import left_out, primary_metric, score
from patchbank.probing.passes import Course, choose_loss, predict_logits
from patchbank.probing.plan import Rows
from patchbank.probing.probes.base import Probe
from patchbank.probing.probes.probe_files import file_sha256
from patchbank.probing.search import Candidate, choose
from patchbank.probing.settings import Point, TrainSettings
from patchbank.probing.study import stack_of
from patchbank.probing.training import fit
from patchbank.probing.trials import Trial


@dataclass(frozen=True)
class Fitting:
    """One call of `ProbeClassifier.fit`."""

    entry: Entry
    family: Probe
    source: TokenSource
    labels: Labels
    settings: TrainSettings

    def search(self, valid_fraction: float) -> Point:
        """The setting that does best on held-out clips; the middle one without such."""
        if not 0 <= valid_fraction < 1:
            raise TrialError(f"found valid_fraction={valid_fraction}, expected 0 to below 1")
        points = self.settings.candidates(self.entry.family_name, self.family.learning_rates)
        order = np.random.default_rng(self.settings.order_seed).permutation(self.source.n_rows)
        n_valid = int(len(order) * valid_fraction)
        valid, rows = order[:n_valid], order[n_valid:]
        metric = primary_metric(multi_label=self.labels.multi_label)
        n_judged = len(self.labels.classes) - len(left_out(metric, self.labels.targets[valid]))
        if not (self.family.learns and len(points) > 1 and n_valid and n_judged):
            return points[len(points) // 2]
        course = self.course(points, rows)
        [logits] = predict_logits([course], self.source, [valid], settings=self.settings)
        values = [self._value(one, valid) for one in logits]
        tried = [Candidate(*point, value) for point, value in zip(points, values, strict=True)]
        return choose(self.entry.family_name, tried)

    def artefact(self, point: Point, view: RowsView | None) -> ProbeArtefact:
        """The probe of that setting, trained on all clips, with what is known of their bank."""
        course = self.course([point], np.arange(self.source.n_rows))
        plugin = self.entry.file
        return ProbeArtefact(
            self.entry.family_name,
            self.family.options,
            tuple(map(str, self.labels.classes)),
            self.labels.multi_label,
            self.family.shape,
            course.stack.weights_of(0),
            plugin=plugin,
            plugin_sha256=file_sha256(plugin) if plugin else "",
            training={**asdict(course.stack.trials[0]), "n_epochs": self.settings.n_epochs},
            **({} if view is None else _origin(view)),
        )

    def course(self, points: Sequence[Point], rows: Rows) -> Course:
        """One trial a setting, trained on `rows`."""
        settings, multi_label = self.settings, self.labels.multi_label
        trials = [Trial(*point, settings.order_seed) for point in points]
        name = self.entry.family_name
        course = Course(
            stack_of(name, self.family, trials, settings, multi_label=multi_label),
            self.labels.targets,
            rows,
            choose_loss(settings, multi_label=multi_label),
        )
        fit([course], self.source, settings=settings)
        return course

    def _value(self, logits: Float[np.ndarray, "clip class"], valid: Rows) -> float:
        metric = primary_metric(multi_label=self.labels.multi_label)
        is_finite = bool(np.isfinite(logits).all())
        return score(metric, self.labels.targets[valid], logits) if is_finite else -math.inf


def _origin(view: RowsView) -> dict[str, Any]:
    """What `patchbank predict` compares: the encoder, its layer, and how clips were cut."""
    card = view.bank.card
    return {
        "layers": (view.layer,),
        "encoder_id": view.bank.encoder_id,
        "encoder": dict(card["encoder"]),
        "window": dict(card["window"]),
        "tokens": {key: card[key] for key in ("stored_dtype", "mask_padding") if key in card},
    }
