"""What the validation clips of a trained probe decide about its use: temperature and thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from patchbank.probing.calibration import calibrate, probabilities_of
from patchbank.probing.thresholds import choose_thresholds


def fit_on_validation(
    scores: Float[np.ndarray, "clip class"],
    targets: Float[np.ndarray, "clip class"],
    *,
    classes: tuple[str, ...],
    multi_label: bool,
) -> dict[str, Any]:
    """Fields of a `ProbeArtefact`, from the saved seed's validation scores.

    scores are logits, or log-probabilities of a multi-class task, which needs no thresholds: the
    likeliest class is the decision.
    """
    fitted = calibrate(scores, targets, multi_label=multi_label)
    facts = {
        "n_clips": fitted.n_clips,
        "nll_before": fitted.nll_before,
        "nll_after": fitted.nll_after,
    }
    if not multi_label:
        return {"temperature": fitted.temperature, "validation": facts}
    probabilities = probabilities_of(
        torch.from_numpy(scores), multi_label=True, temperature=fitted.temperature
    )
    chosen = choose_thresholds(probabilities.numpy(), targets)
    unknown = [name for name, f1 in zip(classes, chosen.f1, strict=True) if f1 is None]
    return {
        "temperature": fitted.temperature,
        "thresholds": chosen.values,
        "default_thresholds": tuple(unknown),
        "validation": facts | {"f1": list(chosen.f1)},
    }
