"""What there is to train: a probe for a label set, and the stack of its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import LayerShape, TokenSource
from patchbank.probing.entries import Entry
from patchbank.probing.memory import MemoryStack
from patchbank.probing.passes import Course, choose_loss, last_layer
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import Probe, ProbeShape
from patchbank.probing.probes.knn import KnnProbe
from patchbank.probing.settings import Point, TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.trials import Trial, TrialStack


@dataclass(frozen=True, eq=False)
class Task:
    """What probes are trained for: one label set and its split."""

    targets: Float[np.ndarray, "clip class"]
    split: Split
    multi_label: bool
    name: str = ""
    """Tells it from other label sets of the run."""


@dataclass(frozen=True)
class Study:
    """One probe for one task."""

    task: Task
    entry: Entry
    probe: Probe

    @property
    def name(self) -> str:
        return f"{self.task.name}/{self.entry.name}" if self.task.name else self.entry.name


def study_of(source: TokenSource, task: Task, entry: Entry) -> Study:
    """The study with its probe built; `TrialError` where there is no such probe."""
    layers = entry.layers or last_layer(source)
    shape = probe_shape(
        {layer: source.shapes[layer] for layer in layers}, n_classes=task.targets.shape[1]
    )
    return Study(task, entry, build_probe(entry.family, shape, entry.options))


def probe_shape(layers: Mapping[int, LayerShape], *, n_classes: int) -> ProbeShape:
    """The shape of a probe on some layers; `TrialError` where they cannot be mixed."""
    first, *others = layers.values()
    for layer, other in zip(list(layers)[1:], others, strict=True):
        if (other.n_patches, other.dim) != (first.n_patches, first.dim):
            raise TrialError(
                f"found layers {next(iter(layers))} and {layer} with {first.n_patches} x "
                f"{first.dim} and {other.n_patches} x {other.dim} (patch x dim), expected the "
                "same in layers that are mixed; name layers of one size: --layer 3+6"
            )
    n_prefix = min(shape.n_prefix for shape in layers.values())
    return ProbeShape(first.dim, n_classes, n_prefix, first.grid, len(layers))


def course_of(
    study: Study, settings: TrainSettings, *, points: Sequence[Point], seeds: Sequence[int]
) -> Course:
    """One trial for each pair of a setting and a seed."""
    task = study.task
    trials = [
        Trial(point.learning_rate, point.weight_decay, seed)
        for point, seed in zip(points, seeds, strict=True)
    ]
    return Course(
        stack_of(
            study.entry.family_name, study.probe, trials, settings, multi_label=task.multi_label
        ),
        task.targets,
        task.split.train,
        choose_loss(settings, multi_label=task.multi_label),
        study.entry.layers,
        study.name,
    )


def stack_of(
    name: str,
    probe: Probe,
    trials: Sequence[Trial],
    settings: TrainSettings,
    *,
    multi_label: bool,
) -> TrialStack | MemoryStack:
    """The stack that a probe of this kind is trained in."""
    dtype, device = settings.torch_dtype, settings.torch_device
    if isinstance(probe, KnnProbe):
        return MemoryStack(name, probe, trials, multi_label=multi_label, dtype=dtype, device=device)
    return TrialStack(name, probe, trials, dtype=dtype, device=device)
