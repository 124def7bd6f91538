"""Decodes one clip: the frames of its window, as one channel at one rate and of one length."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.sound_file import open_sound
from patchbank.pipeline.sound_file import probe_duration_s as probe_duration_s
from patchbank.pipeline.specs import PadRule, WindowSpec
from patchbank.pipeline.stages import DECODE, RESAMPLE, StageClock

if TYPE_CHECKING:
    from torchaudio.transforms import Resample

_MAX_KERNEL_ELEMENTS = 1 << 26
"""Of the resampler's table, which is new rate x old rate after their common divisor is taken out:
22,255 Hz to 16,000 Hz needs 14 million, 44,101 Hz (a damaged header) 700 million."""


@dataclass(frozen=True)
class DecodedClip:
    """The samples of a clip, ready for an encoder."""

    waveform: Float32[np.ndarray, " sample"]
    audio_sha256: str
    """Hexadecimal SHA-256 of the window's samples as decoded, before mixing, resampling and
    padding: little-endian float32, channels interleaved, nothing before or after them. Of a view
    that is made of clips, see `view_audio.made_view`."""
    n_audio_samples: int
    """How many samples of `waveform`, from its start, are audio and not padding."""
    mix_gains: tuple[float, ...] = ()
    """Of a view: what each source was multiplied with before it was added."""


def decode_clip(
    path: Path,
    *,
    start_s: float,
    window: WindowSpec,
    sample_rate_hz: int,
    duration_s: float | None = None,
    clock: StageClock | None = None,
) -> DecodedClip:
    """The clip that starts at `start_s` of a recording, mixed to one channel at `sample_rate_hz`.

    Reads no more of the file than the window, or `duration_s` of it where that is less. Raises
    `AudioError` with a reason of one line that does not hold the path. `clock` gets the time.
    """
    clock = clock or StageClock()
    wanted_s = window.window_s if duration_s is None else min(window.window_s, duration_s)
    with clock.measure(DECODE):
        frames, rate_hz = _read_frames(path, start_s, wanted_s, sample_rate_hz)
        audio_sha256 = hashlib.sha256(frames.astype("<f4", copy=False).data).hexdigest()
        _check_finite(frames)
    with clock.measure(RESAMPLE):
        waveform, n_audio_samples = fit_to_encoder(
            frames, rate_hz, window=window, sample_rate_hz=sample_rate_hz
        )
    return DecodedClip(waveform, audio_sha256, n_audio_samples)


def _check_finite(frames: Float32[np.ndarray, "sample channel"]) -> None:
    # Both extremes are NaN where any sample is; they take a third of the time of `isfinite`.
    if math.isfinite(frames.max()) and math.isfinite(frames.min()):
        return
    n_bad = frames.size - int(np.isfinite(frames).sum())
    raise AudioError(f"{n_bad} of {frames.size} samples are NaN or infinite")


def fit_to_encoder(
    frames: Float32[np.ndarray, "sample channel"],
    rate_hz: int,
    *,
    window: WindowSpec,
    sample_rate_hz: int,
) -> tuple[Float32[np.ndarray, " window"], int]:
    """Decoded frames mixed to one channel, resampled and padded; and how much of it is audio."""
    mono = frames[:, 0] if frames.shape[1] == 1 else frames.mean(axis=1, dtype=np.float32)
    audio = _resampled(mono, from_hz=rate_hz, to_hz=sample_rate_hz)
    n_samples = window.n_samples(sample_rate_hz)
    return _fitted(audio, n_samples, window.pad), min(len(audio), n_samples)


def _read_frames(
    path: Path, start_s: float, wanted_s: float, sample_rate_hz: int
) -> tuple[Float32[np.ndarray, "sample channel"], int]:
    """The window's frames as decoded, and their rate in Hz."""
    with open_sound(path) as sound:
        rate_hz = int(sound.samplerate)
        _check_rate(rate_hz, sample_rate_hz)
        first, n_frames = round(start_s * rate_hz), round(wanted_s * rate_hz)
        frames = np.empty((0, sound.channels), np.float32)
        if first < sound.frames:
            sound.seek(first)
            frames = sound.read(n_frames, dtype="float32", always_2d=True)
    if not wanted_s:
        raise AudioError("the recording has no samples, or its length could not be read")
    if not len(frames):
        raise AudioError(f"no samples between {start_s:g} s and {start_s + wanted_s:g} s")
    return frames, rate_hz


def _check_rate(rate_hz: int, sample_rate_hz: int) -> None:
    divisor = math.gcd(rate_hz, sample_rate_hz)
    if (rate_hz // divisor) * (sample_rate_hz // divisor) > _MAX_KERNEL_ELEMENTS:
        raise AudioError(
            f"found a sample rate of {rate_hz} Hz, no small ratio to {sample_rate_hz} Hz; "
            "convert the file to a usual rate"
        )


def _resampled(
    waveform: Float32[np.ndarray, " sample"], *, from_hz: int, to_hz: int
) -> Float32[np.ndarray, " resampled"]:
    if from_hz == to_hz:
        return waveform
    import torch

    with torch.no_grad():
        resampled = _resampler(from_hz, to_hz)(torch.from_numpy(waveform))
    return np.asarray(resampled.numpy())


@lru_cache(maxsize=8)
def _resampler(from_hz: int, to_hz: int) -> Resample:
    """With its kernel, which would take a fifth of the time if it were built for every clip."""
    import torch
    from torchaudio.transforms import Resample

    from patchbank.pipeline.encoders.base import RESAMPLER

    return Resample(
        from_hz,
        to_hz,
        resampling_method=RESAMPLER["method"],
        lowpass_filter_width=RESAMPLER["lowpass_filter_width"],
        rolloff=RESAMPLER["rolloff"],
        # Otherwise it is built in float64, and the last bit is another than `resample` gives.
        dtype=torch.float32,
    )


def _fitted(
    audio: Float32[np.ndarray, " sample"], n_samples: int, pad: PadRule
) -> Float32[np.ndarray, " window"]:
    """`audio` cut, or padded at its end, to `n_samples`."""
    if len(audio) >= n_samples:
        return np.ascontiguousarray(audio[:n_samples])
    if pad == "repeat":
        return np.resize(audio, n_samples)
    return np.pad(audio, (0, n_samples - len(audio)))
