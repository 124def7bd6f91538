"""The encoders that patchbank knows by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.pipeline.errors import EncoderError

if TYPE_CHECKING:
    import torch

    from patchbank.pipeline.encoders.base import Encoder

ENCODER_MODULES = {
    "efficientat": "patchbank.pipeline.encoders.efficientat",
    "fake": "patchbank.pipeline.encoders.fake",
    "logmel": "patchbank.pipeline.encoders.logmel",
    "tiny": "patchbank.pipeline.encoders.tiny",
    "tiny-random": "patchbank.pipeline.encoders.tiny_random",
}
"""Name -> module with `load(weights, device)`, `LICENCE` and a docstring that describes it."""


def encoder_names() -> list[str]:
    """Names that `load_encoder` takes."""
    return sorted(ENCODER_MODULES)


def load_encoder(
    name: str, *, weights: Path | str | None = None, device: torch.device | str = "cpu"
) -> Encoder:
    """The encoder `name` with its weights, in evaluation mode on `device`.

    `weights` is the publisher's own file; encoders with bundled weights or none take None.
    Raises `EncoderError` for an unknown name, a missing file or weights that do not fit.
    """
    if name not in ENCODER_MODULES:
        raise EncoderError(f"unknown encoder {name!r}; there are: {', '.join(encoder_names())}")
    path = None if weights is None else Path(weights)
    if path is not None and not path.exists():
        raise EncoderError(f"no weights at {path}; give the path of the checkpoint file")
    encoder: Encoder = import_module(ENCODER_MODULES[name]).load(path, device)
    return encoder
