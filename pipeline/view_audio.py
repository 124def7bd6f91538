"""The waveform of a view, from decoded clips and the view's draw."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from patchbank.pipeline.audio import DecodedClip
from patchbank.pipeline.draws import Draw
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.specs import digest

Waveform = Float32[np.ndarray, " sample"]


def made_view(clip: DecodedClip, sources: Sequence[DecodedClip], draw: Draw) -> DecodedClip:
    """A view of decoded clips.

    Its `audio_sha256` is the SHA-256 of the canonical JSON of `[digest of the clip, [digests of the
    sources], mix_snr_db, shift_samples, gain_db]`: all that it is made of, known on any machine.
    Its audio ends where that of the longest part does, turned with it; what turns over the edge
    fills the window. Raises `AudioError` where samples leave the range of float32.
    """
    waveforms = [source.waveform for source in sources]
    gains = mix_gains(clip.waveform, waveforms, draw.mix_snr_db)
    waveform = view_waveform(
        clip.waveform,
        waveforms,
        mix_gains=gains,
        shift_samples=draw.shift_samples,
        gain_db=draw.gain_db,
    )
    n_samples = len(waveform)
    n_audio = max(part.n_audio_samples for part in (clip, *sources))
    parts = [source.audio_sha256 for source in sources]
    made_of = [clip.audio_sha256, parts, list(draw.mix_snr_db), draw.shift_samples, draw.gain_db]
    return DecodedClip(
        waveform=waveform,
        audio_sha256=digest(made_of),
        n_audio_samples=min(n_samples, draw.shift_samples % n_samples + n_audio),
        mix_gains=gains,
    )


def mix_gains(
    clip: Waveform, sources: Sequence[Waveform], snr_db: Sequence[float]
) -> tuple[float, ...]:
    """What each source is multiplied with, so that the clip is `snr_db` above it.

    Powers are mean squares over the whole window, padding included. Silence has no level: a silent
    clip leaves its sources as they are, and a silent source adds nothing, at gain 0.
    """
    power = _power(clip)
    gains = []
    for source, level_db in zip(sources, snr_db, strict=True):
        source_power = _power(source)
        if not source_power:
            gains.append(0.0)
        elif not power:
            gains.append(1.0)
        else:
            gains.append(math.sqrt(power / source_power) * 10 ** (-level_db / 20))
    return tuple(gains)


def _power(waveform: Waveform) -> float:
    return float(np.mean(np.square(waveform, dtype=np.float64)))


def view_waveform(
    clip: Waveform,
    sources: Sequence[Waveform],
    *,
    mix_gains: Sequence[float],
    shift_samples: int,
    gain_db: float,
) -> Waveform:
    """`(clip + sum of gain * source)`, turned by `shift_samples`, times `10 ** (gain_db / 20)`.

    Computed in float64 and rounded once; nothing is clipped.
    """
    mix = clip.astype(np.float64)
    for gain, source in zip(mix_gains, sources, strict=True):
        mix += gain * source.astype(np.float64)
    mix = np.roll(mix, shift_samples) * 10 ** (gain_db / 20)
    with np.errstate(over="ignore"):
        waveform = mix.astype(np.float32)
    if not np.isfinite(waveform).all():
        raise AudioError("samples of this view are beyond the range of float32")
    return waveform
