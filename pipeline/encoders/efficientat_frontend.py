"""The log-mel front end of the EfficientAT models, in evaluation mode.

Source of every step and constant: fschmid56/EfficientAT:models/preprocess.py. There the mel bank
is rebuilt on every call and a batch of one loses its axis; here the bank is built once and the
batch axis always stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchbank.pipeline.encoders.frontend import check_constants, full_precision
from patchbank.pipeline.encoders.kaldi import mel_bank
from patchbank.pipeline.errors import EncoderError


@dataclass(frozen=True)
class LogMelConstants:
    """Every number of the front end; stored in the encoder's spec."""

    sample_rate_hz: int = 32_000
    preemphasis: float = 0.97
    """`y[i] = x[i + 1] - preemphasis * x[i]`: one sample shorter than the waveform."""
    window: str = "hann, symmetric"
    window_samples: int = 800
    hop_samples: int = 320
    n_fft: int = 1024
    edges: str = "centred frames, reflected by n_fft / 2"
    n_mels: int = 128
    mel_scale: str = "kaldi, triangles on the power spectrum, no vtln"
    mel_min_hz: float = 0.0
    mel_max_hz: float = 15_000.0
    """Half the rate less half of the 2 kHz range that training draws this edge from."""
    log_offset: float = 1e-5
    shift: float = 4.5
    divisor: float = 5.0
    """`(log_mel + shift) / divisor`."""

    def __post_init__(self) -> None:
        check_constants(
            "efficientat",
            positive={
                "sample_rate_hz": self.sample_rate_hz,
                "window_samples": self.window_samples,
                "hop_samples": self.hop_samples,
                "n_fft": self.n_fft + 1 - self.window_samples,
                "n_mels": self.n_mels,
                "log_offset": self.log_offset,
                "divisor": self.divisor,
            },
            low_hz=self.mel_min_hz,
            high_hz=self.mel_max_hz,
            sample_rate_hz=self.sample_rate_hz,
        )

    @property
    def min_samples(self) -> int:
        """Shortest waveform: reflection needs one more sample than it adds on a side."""
        return self.n_fft // 2 + 2

    def n_frames(self, n_samples: int) -> int:
        """Frames of a waveform; raises `EncoderError` where it is too short."""
        if n_samples < self.min_samples:
            raise EncoderError(
                f"efficientat needs at least {self.min_samples} samples a clip "
                f"({1000 * self.min_samples / self.sample_rate_hz:.1f} ms at "
                f"{self.sample_rate_hz} Hz), found {n_samples}; choose a longer window"
            )
        return 1 + (n_samples - 1) // self.hop_samples


DESCRIPTIONS = ("window", "edges", "mel_scale")
"""Constants that say what is computed, and have one value."""


class LogMel(nn.Module):
    """Waveforms in, normalised log-mel out; in float32 also under autocast and TF32."""

    window: Tensor
    bank: Tensor

    def __init__(self, constants: LogMelConstants) -> None:
        super().__init__()
        self.constants = constants
        window = torch.hann_window(constants.window_samples, periodic=False)
        self.register_buffer("window", window, persistent=False)
        bank = mel_bank(
            constants.n_mels,
            constants.n_fft,
            constants.sample_rate_hz,
            constants.mel_min_hz,
            constants.mel_max_hz,
        )
        self.register_buffer("bank", bank, persistent=False)

    def forward(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch freq time"]:
        self.constants.n_frames(waveform.shape[1])
        with torch.no_grad(), full_precision(waveform.device):
            if waveform.device.type != "cpu" or torch.compiler.is_exporting():
                return self._log_mel(waveform)
            # The spectra of a batch fall out of the caches: a clip at a time takes 0.6 of the time.
            return torch.cat([self._log_mel(clip) for clip in waveform.split(1)])

    def _log_mel(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch freq time"]:
        mel = torch.matmul(self.bank, self._power(waveform))
        log_mel = torch.log(mel + self.constants.log_offset)
        return (log_mel + self.constants.shift) / self.constants.divisor

    def _power(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch bin time"]:
        emphasised = waveform[:, 1:] - self.constants.preemphasis * waveform[:, :-1]
        spectrum = torch.stft(
            emphasised,
            self.constants.n_fft,
            hop_length=self.constants.hop_samples,
            win_length=self.constants.window_samples,
            window=self.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        # Five times faster on a CPU than a sum over `view_as_real`, and the same bits.
        return spectrum.real.square() + spectrum.imag.square()
