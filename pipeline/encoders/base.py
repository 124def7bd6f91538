"""What an encoder is to the rest of patchbank: waveforms in, one token map a layer out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.specs import EncoderSpec, Grid


@dataclass(frozen=True)
class TokenMap:
    """The tokens of one layer for a batch of clips."""

    patches: Float[Tensor, "batch patch dim"]
    prefix: Float[Tensor, "batch prefix dim"] | None
    """CLS and the like; None where the encoder has none."""
    grid: Grid
    """`patches.shape[1] == grid.time * grid.freq`, time-major."""


@runtime_checkable
class Encoder(Protocol):
    """A frozen encoder: deterministic, in evaluation mode, each clip independent of its batch."""

    spec: EncoderSpec

    def frontend(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch ..."]:
        """Features of float32 mono waveforms at `spec.sample_rate_hz`, on their device."""
        ...

    def encode(
        self, features: Float[Tensor, "batch ..."], layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        """Tokens of the asked layers (all where None), keyed by 1-based layer."""
        ...

    def grids(self, n_samples: int) -> dict[int, Grid]:
        """Each layer's grid for waveforms of `n_samples`, without running the encoder.

        Raises `EncoderError` where the encoder cannot take that length.
        """
        ...

    def to(self, device: torch.device | str) -> Encoder:
        """Moves the weights and the front end's constants."""
        ...


@runtime_checkable
class PadsClips(Protocol):
    """An encoder that pads clips to a length of its own, so that its grid may outlast them."""

    def frontend(
        self,
        waveform: Float[Tensor, "batch sample"],
        n_audio_samples: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """As of every encoder; where it is said how many samples of each clip are audio, followed
        by zeros, a short clip is padded as the encoder pads a clip of that length."""
        ...

    def audio_times(self, n_samples: int) -> int:
        """Time patches, of every layer's grid, that hold some of the first `n_samples`."""
        ...


def features_of(
    encoder: Encoder,
    waveform: Float[Tensor, "batch sample"],
    n_audio_samples: Sequence[int] | None,
) -> Float[Tensor, "batch ..."]:
    """What an encoder's front end makes of clips whose audio may be shorter than they are.

    `n_audio_samples` is None where clips are filled with something else than zeros.
    """
    if n_audio_samples is not None and isinstance(encoder, PadsClips):
        return encoder.frontend(waveform, n_audio_samples)
    return encoder.frontend(waveform)


RESAMPLER: dict[str, Any] = {
    "name": "torchaudio.functional.resample",
    "method": "sinc_interp_hann",
    "lowpass_filter_width": 6,
    "rolloff": 0.99,
}
"""The one resampler (torchaudio's defaults, written out); part of every `encoder_id`."""
