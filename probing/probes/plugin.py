"""All that a probe in a file of one's own needs, under one name; docs/probes.md."""

from __future__ import annotations

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
    apply_dropout,
    apply_linear,
    uniform_linear,
)
from patchbank.probing.probes.best_match import best_match
from patchbank.probing.probes.options import check_options, choice, number, switch, whole
from patchbank.probing.probes.tokens import Tokens

__all__ = [
    "Dropout",
    "Logits",
    "Options",
    "Probe",
    "ProbeShape",
    "Tokens",
    "TrialError",
    "Weights",
    "apply_dropout",
    "apply_linear",
    "best_match",
    "check_options",
    "choice",
    "number",
    "switch",
    "uniform_linear",
    "whole",
]
