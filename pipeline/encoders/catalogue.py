"""The encoders that patchbank knows by name: what they are and where their weights are had.

Plain facts that need no torch. Sources: each module's docstring.
"""

from __future__ import annotations

from dataclasses import dataclass

PACKAGE = "patchbank.pipeline.encoders"


@dataclass(frozen=True)
class EncoderEntry:
    """One name that `load_encoder` takes; sizes are those of the published base model."""

    name: str
    module: str
    """With `load(weights, device)`."""
    summary: str
    licence: str
    """Of the weights."""
    sample_rate_hz: int
    grid: str
    """Time x frequency tokens, and of how much audio."""
    dim: int
    n_layers: int
    weights: str
    """Where the weights are had; empty where none are needed."""
    notes: str = ""


def _entry(
    name: str,
    module: str,
    summary: str,
    *,
    licence: str = "Apache-2.0",
    rate: int = 16_000,
    grid: str,
    dim: int,
    n_layers: int,
    weights: str = "",
    notes: str = "",
) -> EncoderEntry:
    path = f"{PACKAGE}.{module}"
    return EncoderEntry(name, path, summary, licence, rate, grid, dim, n_layers, weights, notes)


_ENTRIES = (
    _entry(
        "efficientat",
        "efficientat",
        "EfficientAT mn: convolutional taggers trained on AudioSet, any width; a layer is a stage.",
        licence="MIT",
        rate=32_000,
        grid="32 x 4 of 10 s",
        dim=384,
        n_layers=17,
        weights="https://github.com/fschmid56/EfficientAT/releases/tag/v0.0.1",
        notes="dim is that of mn04; it grows with the width",
    ),
    _entry(
        "fake",
        "fake",
        "A deterministic stand-in for an encoder, for tests.",
        grid="100 x 2 of 10 s",
        dim=12,
        n_layers=2,
    ),
    _entry(
        "logmel",
        "logmel",
        "Log-mel statistics: the features that an encoder has to beat. No weights.",
        grid="1 x 1 of any length",
        dim=128,
        n_layers=1,
    ),
    _entry(
        "tiny",
        "tiny",
        "The bundled encoder: a small patch transformer trained on synthetic scenes.",
        grid="62 x 4 of 10 s",
        dim=128,
        n_layers=4,
    ),
    _entry(
        "tiny-random",
        "tiny_random",
        "The bundled encoder's architecture with random weights: what training added.",
        grid="62 x 4 of 10 s",
        dim=128,
        n_layers=4,
    ),
)
ENCODERS = {entry.name: entry for entry in _ENTRIES}
"""Name -> entry, of the encoders that are shipped."""
