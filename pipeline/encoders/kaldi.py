"""The Kaldi filter bank of the patch encoders, batched, in float32 on any device.

What is computed is `torchaudio.compliance.kaldi.fbank` without dither and with snipped edges,
which takes one waveform at a time and builds its mel filters anew at each call. On a CPU the same
steps in the same order give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.encoders.frontend import FrontEnd, check_constants
from patchbank.pipeline.errors import EncoderError

ZERO_BEFORE = "zeros before normalising"
ZERO_AFTER = "zeros after normalising"
MINIMUM_BEFORE = "the clip's minimum before normalising"
PADDINGS = (ZERO_BEFORE, ZERO_AFTER, MINIMUM_BEFORE)
SAMPLES, FRAMES = "samples of zero", "frames as in padding"
WINDOWS = ("hanning", "povey")
N_MELS, PATCH_FRAMES = 128, 16


@dataclass(frozen=True)
class KaldiSettings:
    """Every constant of the front end; stored in the encoder's spec."""

    encoder: str
    sample_rate_hz: int = 16_000
    scale: float = 1.0
    """Waveforms are multiplied by it."""
    removes_mean: bool = True
    """Whether a clip's mean is taken from its waveform first."""
    window: str = "hanning"
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    preemphasis: float = 0.97
    n_mels: int = N_MELS
    low_hz: float = 20.0
    high_hz: float = 0.0
    """Added to half the rate where it is not positive."""
    log_floor: float = 1.1920928955078125e-07
    """float32's epsilon: the least energy whose logarithm is taken."""
    mean: float = 0.0
    divisor: float = 1.0
    """`(log_mel - mean) / divisor`; published code divides by twice the deviation."""
    lengths: tuple[int, ...] = ()
    """Frames that clips are padded or cut to: the smallest that is less than a patch shorter."""
    patch_frames: int = PATCH_FRAMES
    pads_longer: bool = True
    """Whether clips beyond all `lengths` are padded to whole patches; else the rest is cut."""
    padding: str = ZERO_BEFORE
    short_clips: str = SAMPLES
    """What is added to a clip that ends before its window: samples of zero, or frames."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("window", self.window, WINDOWS),
            ("padding", self.padding, PADDINGS),
            ("short_clips", self.short_clips, (SAMPLES, FRAMES)),
        ):
            if value not in known:
                raise EncoderError(
                    f"{self.encoder}: {name} {value!r}; there are: {', '.join(known)}"
                )
        check_constants(
            self.encoder,
            positive={
                "sample_rate_hz": self.sample_rate_hz,
                "scale": self.scale,
                "divisor": self.divisor,
                "log_floor": self.log_floor,
                "lengths": min(self.lengths, default=1),
                "frame_ms": self.frame_samples,
                "hop_ms": self.hop_samples,
            },
            low_hz=self.low_hz,
            high_hz=self.high_hz + (self.high_hz <= 0) * self.sample_rate_hz / 2,
            sample_rate_hz=self.sample_rate_hz,
        )
        if self.n_mels != N_MELS or self.patch_frames != PATCH_FRAMES:
            raise EncoderError(
                f"{self.encoder}: n_mels and patch_frames are {N_MELS} and {PATCH_FRAMES}, the "
                f"network's; found {self.n_mels} and {self.patch_frames}"
            )
        # One set of lengths is one front end.
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))

    @property
    def frame_samples(self) -> int:
        return int(self.sample_rate_hz * self.frame_ms * 0.001)

    @property
    def hop_samples(self) -> int:
        return int(self.sample_rate_hz * self.hop_ms * 0.001)

    @property
    def least_samples(self) -> int:
        """Of the shortest waveform that has a frame."""
        return self.frame_samples

    @property
    def n_fft(self) -> int:
        """The next power of two."""
        return 1 << (self.frame_samples - 1).bit_length()

    def n_raw_frames(self, n_samples: int) -> int:
        """Whole frames in a waveform; `EncoderError` where there is none."""
        if n_samples < self.frame_samples:
            raise EncoderError(
                f"{self.encoder} needs at least {self.frame_samples} samples "
                f"({self.frame_ms:g} ms at {self.sample_rate_hz} Hz), found {n_samples}; choose a "
                "longer window"
            )
        return 1 + (n_samples - self.frame_samples) // self.hop_samples

    def n_frames(self, n_samples: int) -> int:
        """Frames that the encoder sees of a waveform of `n_samples`, padded or cut."""
        found = self.n_raw_frames(n_samples)
        for length in self.lengths:
            if found < length + self.patch_frames:
                return length
        rest = found % self.patch_frames
        if not self.pads_longer or not rest:
            return found
        return found + self.patch_frames - rest


class KaldiFrontEnd(FrontEnd):
    """Waveforms in, normalised log-mel frames of a fixed number out."""

    window: Tensor
    bank: Tensor

    def __init__(self, settings: KaldiSettings) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("window", _window(settings), persistent=False)
        bank = mel_bank(
            settings.n_mels,
            settings.n_fft,
            settings.sample_rate_hz,
            settings.low_hz,
            settings.high_hz,
        )
        self.register_buffer("bank", bank.T, persistent=False)

    @property
    def looks_at_lengths(self) -> bool:
        return bool(self.settings.short_clips == FRAMES)

    def features(
        self, waveform: Float[Tensor, "batch sample"], n_audio_samples: int
    ) -> Float[Tensor, "batch time freq"]:
        settings, n_samples = self.settings, waveform.shape[1]
        if settings.short_clips == FRAMES and n_audio_samples < n_samples:
            waveform = waveform[:, : max(n_audio_samples, settings.frame_samples)]
        if settings.removes_mean:
            waveform = waveform - clip_means(waveform)
        if settings.scale != 1.0:
            waveform = waveform * settings.scale
        return fit_length(self.log_mel(waveform), settings, n_samples)

    def log_mel(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch time freq"]:
        """Logarithms of the energies in the mel bands, nothing normalised."""
        settings = self.settings
        settings.n_raw_frames(waveform.shape[1])
        frames = waveform.unfold(1, settings.frame_samples, settings.hop_samples)
        frames = frames - frames.mean(2, keepdim=True)
        before = F.pad(frames, (1, 0), mode="replicate")[..., :-1]
        frames = (frames - settings.preemphasis * before) * self.window
        frames = F.pad(frames, (0, settings.n_fft - settings.frame_samples))
        power = torch.fft.rfft(frames).abs().pow(2.0)
        return torch.matmul(power, self.bank).clamp_min(self.settings.log_floor).log()


def clip_means(waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch 1"]:
    """Each clip's mean, added up in the same order for any number of threads.

    Published code takes it in loader processes with one thread. A single sum would be shared among
    threads, and the last bit shows in the quietest cells; of two rows each is a thread's own.
    """
    if torch.compiler.is_exporting():
        return waveform.mean(1, keepdim=True)
    rows = waveform if len(waveform) > 1 else waveform.expand(2, -1)
    return rows.mean(1, keepdim=True)[: len(waveform)]


def fit_length(
    log_mel: Float[Tensor, "batch raw freq"], settings: KaldiSettings, n_samples: int
) -> Float[Tensor, "batch time freq"]:
    """Frames cut or padded to the length that the encoder takes, and normalised."""
    missing = settings.n_frames(n_samples) - log_mel.shape[1]
    if missing < 0:
        log_mel = log_mel[:, :missing]
    if settings.padding == ZERO_AFTER:
        normal = (log_mel - settings.mean) / settings.divisor
        return F.pad(normal, (0, 0, 0, max(0, missing)))
    if missing > 0:
        shape = (log_mel.shape[0], missing, log_mel.shape[2])
        fill = log_mel.new_zeros(1, 1, 1)
        if settings.padding == MINIMUM_BEFORE:
            fill = log_mel.amin((1, 2), keepdim=True)
        log_mel = torch.cat([log_mel, fill.expand(shape)], 1)
    return (log_mel - settings.mean) / settings.divisor


def _window(settings: KaldiSettings) -> Float[Tensor, " sample"]:
    hann = torch.hann_window(settings.frame_samples, periodic=False)
    return hann.pow(0.85) if settings.window == "povey" else hann


def mel_bank(
    n_mels: int, n_fft: int, sample_rate_hz: int, low_hz: float, high_hz: float
) -> Float[Tensor, "freq bin"]:
    """Kaldi's triangles over the `n_fft / 2 + 1` bins; the Nyquist bin, unknown to it, is 0."""
    from torchaudio.compliance.kaldi import get_mel_banks

    filters, _ = get_mel_banks(
        n_mels,
        n_fft,
        float(sample_rate_hz),
        low_hz,
        high_hz,
        # The warp factor of 1 switches these two off; they must only be valid.
        vtln_low=100.0,
        vtln_high=-500.0,
        vtln_warp_factor=1.0,
    )
    return F.pad(filters, (0, 1))
