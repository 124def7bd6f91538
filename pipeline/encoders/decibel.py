"""The log-mel front end of Dasheng and BAT: centred power frames, HTK mel bands, decibels.

What is computed is torchaudio's `MelSpectrogram` and `AmplitudeToDB`, each clip by itself: given a
batch, the latter clamps at so many decibels under the loudest cell of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.encoders.frontend import FrontEnd, check_constants
from patchbank.pipeline.errors import EncoderError

RAW = "decibels"
PER_CLIP_RANGE = "each clip's range to 0 to 1"
NORMALISATIONS = (RAW, PER_CLIP_RANGE)


@dataclass(frozen=True)
class DecibelSettings:
    """Every constant of the front end; stored in the encoder's spec."""

    encoder: str
    sample_rate_hz: int = 16_000
    n_fft: int = 512
    """Also the length of the periodic Hann window."""
    hop_samples: int = 160
    n_mels: int = 64
    low_hz: float = 0.0
    high_hz: float = 8_000.0
    least_power: float = 1e-10
    """0 dB is a power of 1; this is -100 dB."""
    top_db: float = 120.0
    """How far under a clip's loudest cell decibels may go."""
    normalises: str = RAW
    range_offset: float = 1e-8
    """Added to the range that is divided by."""
    length: int = 0
    """Frames that clips are padded or cut to, unless they are a patch longer; 0: none."""
    patch_frames: int = 1
    """Other clips are padded to a multiple of it. All padding is zeros, after normalising."""

    def __post_init__(self) -> None:
        if self.normalises not in NORMALISATIONS:
            raise EncoderError(
                f"{self.encoder}: normalises {self.normalises!r}; there are: "
                f"{', '.join(NORMALISATIONS)}"
            )
        check_constants(
            self.encoder,
            positive={
                "sample_rate_hz": self.sample_rate_hz,
                "n_fft": self.n_fft,
                "hop_samples": self.hop_samples,
                "n_mels": self.n_mels,
                "least_power": self.least_power,
                "top_db": self.top_db,
                "length": self.length + 1,
                "patch_frames": self.patch_frames,
            },
            low_hz=self.low_hz,
            high_hz=self.high_hz,
            sample_rate_hz=self.sample_rate_hz,
        )

    @property
    def least_samples(self) -> int:
        """Of the shortest waveform that can be reflected at its edges."""
        return self.n_fft // 2 + 1

    def n_raw_frames(self, n_samples: int) -> int:
        """Frames of a waveform; `EncoderError` where it is too short to be reflected."""
        if n_samples < self.least_samples:
            raise EncoderError(
                f"{self.encoder} needs at least {self.least_samples} samples "
                f"({1000 * self.least_samples / self.sample_rate_hz:.1f} ms at "
                f"{self.sample_rate_hz} Hz), found {n_samples}; choose a longer window"
            )
        return 1 + n_samples // self.hop_samples

    def n_frames(self, n_samples: int) -> int:
        """Frames that the encoder sees of a waveform of `n_samples`."""
        found = self.n_raw_frames(n_samples)
        if found < self.length + self.patch_frames:
            return max(self.length, self.patch_frames)
        return -(-found // self.patch_frames) * self.patch_frames


class DecibelFrontEnd(FrontEnd):
    """Waveforms in, decibels in mel bands out, padded to whole patches."""

    window: Tensor
    bank: Tensor

    def __init__(
        self,
        settings: DecibelSettings,
        window: Float[Tensor, " sample"] | None = None,
        bank: Float[Tensor, "bin freq"] | None = None,
    ) -> None:
        """`window` and `bank` are a checkpoint's own, where it has them."""
        super().__init__()
        self.settings = settings
        computed = torch.hann_window(settings.n_fft) if window is None else window
        self.register_buffer("window", computed, persistent=False)
        filters = _mel_bank(settings) if bank is None else bank
        self.register_buffer("bank", filters, persistent=False)

    @property
    def looks_at_lengths(self) -> bool:
        return False

    def features(
        self, waveform: Float[Tensor, "batch sample"], n_audio_samples: int
    ) -> Float[Tensor, "batch time freq"]:
        settings = self.settings
        n_frames = self.n_frames(waveform.shape[1])
        decibels = self.decibels(waveform)
        if settings.normalises == PER_CLIP_RANGE:
            lowest = decibels.amin((1, 2), keepdim=True)
            spread = decibels.amax((1, 2), keepdim=True) - lowest
            decibels = (decibels - lowest) / (spread + settings.range_offset)
        return F.pad(decibels.transpose(1, 2), (0, 0, 0, n_frames - decibels.shape[2]))

    def decibels(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch freq time"]:
        """Decibels in each band, clamped under the clip's own loudest cell."""
        settings = self.settings
        spectrum = torch.stft(
            waveform,
            settings.n_fft,
            settings.hop_samples,
            window=self.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = spectrum.abs().pow(2.0)
        mel = torch.matmul(power.transpose(1, 2), self.bank).transpose(1, 2)
        decibels = 10.0 * mel.clamp_min(settings.least_power).log10()
        floor = decibels.amax((1, 2), keepdim=True) - settings.top_db
        return torch.maximum(decibels, floor)


def _mel_bank(settings: DecibelSettings) -> Float[Tensor, "bin freq"]:
    from torchaudio.functional import melscale_fbanks

    bank: Tensor = melscale_fbanks(
        n_freqs=settings.n_fft // 2 + 1,
        f_min=settings.low_hz,
        f_max=settings.high_hz,
        n_mels=settings.n_mels,
        sample_rate=settings.sample_rate_hz,
    )
    return bank
