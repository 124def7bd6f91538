"""All that an encoder of your own needs of patchbank; docs/encoders.md shows two complete ones."""

from __future__ import annotations

from patchbank.pipeline.encoders.base import RESAMPLER, Encoder, TokenMap
from patchbank.pipeline.encoders.digests import file_sha256, state_sha256
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, LayerSpec

__all__ = [
    "RESAMPLER",
    "Encoder",
    "EncoderError",
    "EncoderSpec",
    "Grid",
    "LayerSpec",
    "TokenMap",
    "file_sha256",
    "state_sha256",
]
