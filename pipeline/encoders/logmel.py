"""Log-mel statistics: the features that an encoder has to beat. No weights.

One token a clip: mean and deviation over time of each band of the log-mel spectrogram that
`tiny` reads too. An event's place in time is lost; its place in frequency is not.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.encoders.base import RESAMPLER, TokenMap
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, LayerSpec

LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class LogMelSettings:
    """Every constant of the front end: periodic Hann frames, power, Slaney mel bands, log."""

    sample_rate_hz: int = 16_000
    n_fft: int = 512
    hop: int = 160
    n_mels: int = 64
    low_hz: float = 50.0
    high_hz: float = 8_000.0
    log_offset: float = 1e-2
    """Added to the power before the logarithm: some 10 dB under the demo's quietest bands."""
    mean: float = -3.2
    deviation: float = 1.5
    """The result is (log-mel - mean) / deviation; both are rounded from the demo's scenes."""

    def n_frames(self, n_samples: int) -> int:
        """Whole frames in `n_samples`, nothing padded; zero or less where there is none."""
        return 1 + (n_samples - self.n_fft) // self.hop


def mel_power(
    waveform: Float[Tensor, "batch sample"], settings: LogMelSettings
) -> Float[Tensor, "batch time freq"]:
    """Power in each mel band of a waveform of at least `n_fft` samples."""
    frames = waveform.unfold(1, settings.n_fft, settings.hop)
    window, bands = _constants(settings, waveform.device)
    spectrum = torch.fft.rfft(frames * window)
    power: Tensor = (spectrum.real.square() + spectrum.imag.square()) @ bands
    return power


def log_mel(
    power: Float[Tensor, "batch time freq"], settings: LogMelSettings
) -> Float[Tensor, "batch time freq"]:
    """Mel power as normalised logarithms: what the encoders read."""
    return ((power + settings.log_offset).log() - settings.mean) / settings.deviation


@lru_cache(maxsize=16)
def _constants(
    settings: LogMelSettings, device: torch.device
) -> tuple[Float[Tensor, " sample"], Float[Tensor, "bin freq"]]:
    from torchaudio.functional import melscale_fbanks

    bands = melscale_fbanks(
        n_freqs=settings.n_fft // 2 + 1,
        f_min=settings.low_hz,
        f_max=settings.high_hz,
        n_mels=settings.n_mels,
        sample_rate=settings.sample_rate_hz,
        mel_scale="slaney",
    )
    return torch.hann_window(settings.n_fft).to(device), bands.to(device)


class LogMelEncoder:
    """Grid (1, 1): one token, the bands' means followed by their deviations."""

    def __init__(self, device: torch.device | str) -> None:
        self._settings = LogMelSettings()
        self.spec = EncoderSpec(
            name="logmel",
            weights_sha256="",
            sample_rate_hz=self._settings.sample_rate_hz,
            config={"statistics": ["mean", "population deviation"]},
            frontend=asdict(self._settings),
            resampler=RESAMPLER,
            layers=(LayerSpec(1, "log-mel statistics over time", 2 * self._settings.n_mels),),
            licence=LICENCE,
            source="this project",
        )
        self.to(device)

    def grids(self, n_samples: int) -> dict[int, Grid]:
        if self._settings.n_frames(n_samples) < 1:
            raise EncoderError(
                f"logmel needs at least {self._settings.n_fft} samples, found {n_samples}; "
                "choose a longer window"
            )
        return {1: Grid(1, 1)}

    def frontend(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch time freq"]:
        self.grids(waveform.shape[1])
        return log_mel(mel_power(waveform, self._settings), self._settings)

    def encode(
        self, features: Float[Tensor, "batch time freq"], layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        statistics = torch.cat([features.mean(1), features.std(1, correction=0)], -1)
        token_map = TokenMap(statistics[:, None], None, Grid(1, 1))
        return dict.fromkeys([1] if layers is None else layers, token_map)

    def to(self, device: torch.device | str) -> LogMelEncoder:
        """Nothing to move: the front end follows its waveform."""
        return self


def load(weights: Path | None, device: torch.device | str) -> LogMelEncoder:
    """A `LogMelEncoder`; it takes no weights."""
    if weights is not None:
        raise EncoderError(f"logmel has no weights, found {weights}; leave --weights out")
    return LogMelEncoder(device)
