"""Polyphonic scenes made from a seed: a few short sounds, far apart, over pink noise.

An event fills a small share of a clip, and several classes share their mean spectrum (rising and
falling chirps, slow and fast clicks), so a single pooled vector has a hard time. Every clip has
its own random stream, named by (seed, split, index): it can be made alone and in any order. Equal
seeds give equal bytes under one numpy build; another build may round a few samples differently.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64

SAMPLE_RATE_HZ = 16_000

Split = Literal["train", "valid", "test", "pretrain"]
Samples = Float64[np.ndarray, " sample"]
PerPartial = Float64[np.ndarray, " partial"]
Sound = Callable[[np.random.Generator, int], Samples]

_STREAMS: dict[Split, int] = {"train": 0, "valid": 1, "test": 2, "pretrain": 3}
"""Which random stream a split draws from; "pretrain" is what the bundled encoder learned on."""


@dataclass(frozen=True)
class SceneSettings:
    """What a scene may hold; the defaults are the demo's."""

    clip_s: float = 5.0
    min_events: int = 1
    max_events: int = 4
    min_event_s: float = 0.2
    max_event_s: float = 1.0
    min_gain_db: float = -18.0
    max_gain_db: float = 0.0
    """Gains are those of an event's root mean square over `event_rms`."""
    event_rms: float = 0.15
    floor_rms: float = 0.01
    """Root mean square of the pink noise."""
    peak: float = 0.98
    """A louder scene is scaled down as a whole, so that the ratios stay."""


@dataclass(frozen=True)
class Event:
    """One sound in a scene."""

    label: str
    start_s: float
    duration_s: float
    gain_db: float


@dataclass(frozen=True)
class Scene:
    """A clip and what was put in it, in order of time."""

    waveform: Float32[np.ndarray, " sample"]
    events: tuple[Event, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the scene, sorted, each once."""
        return tuple(sorted({event.label for event in self.events}))


def scene_generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random stream of one clip; no two (seed, split, index) share one."""
    return np.random.default_rng([seed, _STREAMS[split], index])


def make_scene(rng: np.random.Generator, settings: SceneSettings | None = None) -> Scene:
    """A scene of distinct classes, one event each.

    Asked for more events than there are classes, classes repeat.
    """
    settings = settings or SceneSettings()
    n = round(settings.clip_s * SAMPLE_RATE_HZ)
    waveform = settings.floor_rms * _unit_rms(_pink_noise(rng, n))
    n_events = int(rng.integers(settings.min_events, settings.max_events + 1))
    chosen = rng.choice(len(CLASSES), n_events, replace=n_events > len(CLASSES))
    events = tuple(_add_event(waveform, CLASSES[i], rng, settings) for i in chosen)
    waveform *= min(1.0, settings.peak / np.abs(waveform).max())
    return Scene(waveform.astype(np.float32), tuple(sorted(events, key=lambda e: e.start_s)))


def make_clip(seed: int, split: Split, index: int) -> Scene:
    """One clip of the demo's set, as `write_scenes` writes it but for the rounding to PCM16."""
    return make_scene(scene_generator(seed, split, index))


def write_scenes(
    folder: Path,
    *,
    n_train: int = 600,
    n_valid: int = 200,
    n_test: int = 300,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `clips.csv` (clip_id,path,split), `labels.csv` (clip_id,labels) and their audio.

    The audio is `audio/<clip_id>.wav`, mono PCM16 at 16 kHz; several labels are joined by ";".
    """
    import soundfile

    (folder / "audio").mkdir(parents=True, exist_ok=True)
    clips: list[Sequence[str]] = [("clip_id", "path", "split")]
    labels: list[Sequence[str]] = [("clip_id", "labels")]
    counts: dict[Split, int] = {"train": n_train, "valid": n_valid, "test": n_test}
    for split, n_clips in counts.items():
        for index in range(n_clips):
            scene, clip_id = make_clip(seed, split, index), f"{split}_{index:04d}"
            path = f"audio/{clip_id}.wav"
            soundfile.write(folder / path, scene.waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
            clips.append((clip_id, path, split))
            labels.append((clip_id, ";".join(scene.labels)))
            if progress is not None:
                progress(len(clips) - 1, sum(counts.values()))
    _write_csv(folder / "clips.csv", clips)
    _write_csv(folder / "labels.csv", labels)


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _add_event(
    waveform: Samples, label: str, rng: np.random.Generator, settings: SceneSettings
) -> Event:
    """Adds one sound to `waveform` in place, at a random time and gain, with soft edges."""
    n = int(rng.uniform(settings.min_event_s, settings.max_event_s) * SAMPLE_RATE_HZ)
    gain_db = float(rng.uniform(settings.min_gain_db, settings.max_gain_db))
    sound = _unit_rms(_SOUNDS[label](rng, n) * _edges(rng, n))
    start = int(rng.integers(0, len(waveform) - n + 1))
    waveform[start : start + n] += settings.event_rms * 10 ** (gain_db / 20) * sound
    return Event(label, start / SAMPLE_RATE_HZ, n / SAMPLE_RATE_HZ, gain_db)


def _unit_rms(x: Samples) -> Samples:
    unit: Samples = x / np.sqrt(np.mean(x**2))
    return unit


def _edges(rng: np.random.Generator, n: int) -> Samples:
    """A linear attack of 3 to 40 ms and a release of 10 to 60 ms."""
    attack_s, release_s = rng.uniform(0.003, 0.04), rng.uniform(0.01, 0.06)
    time_s = _time_s(n)
    envelope = np.minimum(time_s / attack_s, (n / SAMPLE_RATE_HZ - time_s) / release_s)
    return np.minimum(envelope, 1.0)


def _time_s(n: int) -> Samples:
    return np.arange(n) / SAMPLE_RATE_HZ


def _pink_noise(rng: np.random.Generator, n: int) -> Samples:
    spectrum = np.fft.rfft(rng.standard_normal(n))
    return np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 1)), n)


def _pitch_hz(rng: np.random.Generator, low_hz: float = 200.0, high_hz: float = 3000.0) -> float:
    """Uniform in octaves."""
    return float(np.exp(rng.uniform(np.log(low_hz), np.log(high_hz))))


def _phase(frequency_hz: Samples) -> Samples:
    return 2 * np.pi * np.cumsum(frequency_hz) / SAMPLE_RATE_HZ


def _tone(frequency_hz: Samples) -> Samples:
    tone: Samples = np.sin(_phase(frequency_hz))
    return tone


def _glide_hz(rng: np.random.Generator, n: int) -> Samples:
    """A rise by one to two and a half octaves at a constant rate in octaves."""
    octaves = rng.uniform(1.0, 2.5)
    return _pitch_hz(rng, 200.0, 1100.0) * 2 ** (octaves * np.linspace(0.0, 1.0, n))


def _chirp_up(rng: np.random.Generator, n: int) -> Samples:
    return _tone(_glide_hz(rng, n))


def _chirp_down(rng: np.random.Generator, n: int) -> Samples:
    return _tone(_glide_hz(rng, n)[::-1])


def _steady_tone(rng: np.random.Generator, n: int) -> Samples:
    return _tone(np.full(n, _pitch_hz(rng)))


def _vibrato_tone(rng: np.random.Generator, n: int) -> Samples:
    """A tone that swings by 1 to 3 semitones, 5 to 10 times a second."""
    swing = np.sin(2 * np.pi * (rng.uniform(5.0, 10.0) * _time_s(n) + rng.uniform()))
    return _tone(_pitch_hz(rng) * 2 ** (rng.uniform(1.0, 3.0) / 12 * swing))


def _partials(
    rng: np.random.Generator, n: int, ratios: PerPartial, decay_per_s: PerPartial, tilt: float
) -> Samples:
    """Sines at multiples of one pitch, each with its own decay, none above 7.5 kHz."""
    pitch_hz = _pitch_hz(rng, 200.0, 900.0)
    time_s, x = _time_s(n), np.zeros(n)
    for ratio, decay in zip(ratios, decay_per_s, strict=True):
        if ratio * pitch_hz < 7500.0:
            wave = np.sin(2 * np.pi * (ratio * pitch_hz * time_s + rng.uniform()))
            x += ratio**-tilt * np.exp(-decay * time_s) * wave
    return x


def _harmonic_stack(rng: np.random.Generator, n: int) -> Samples:
    """Five to ten harmonics that last."""
    ratios = np.arange(1.0, 1.0 + rng.integers(5, 11))
    return _partials(rng, n, ratios, np.zeros(len(ratios)), rng.uniform(0.3, 1.0))


def _pluck(rng: np.random.Generator, n: int) -> Samples:
    """Harmonics that die away, the upper ones sooner."""
    ratios = np.arange(1.0, 1.0 + rng.integers(5, 11))
    return _partials(rng, n, ratios, rng.uniform(4.0, 9.0) * ratios**0.7, rng.uniform(0.3, 1.0))


def _bell(rng: np.random.Generator, n: int) -> Samples:
    """Partials of a struck bar (1, 2.76, 5.40, 8.93), detuned a little, that die away."""
    ratios = np.array([1.0, 2.76, 5.40, 8.93]) * rng.uniform(0.95, 1.05, 4)
    return _partials(rng, n, ratios, rng.uniform(4.0, 9.0) * ratios**0.5, rng.uniform(0.0, 0.5))


def _band_noise(rng: np.random.Generator, centre_hz: Samples) -> Samples:
    """Noise of 100 to 400 Hz bandwidth about a centre that may move."""
    n = len(centre_hz)
    knots = max(4, int(n / SAMPLE_RATE_HZ * rng.uniform(100.0, 400.0)))
    at = np.linspace(0, knots - 1, n)
    slow, phase = rng.standard_normal((2, knots)), _phase(centre_hz)
    i, q = (np.interp(at, np.arange(knots), part) for part in slow)
    noise: Samples = i * np.cos(phase) + q * np.sin(phase)
    return noise


def _narrow_noise(rng: np.random.Generator, n: int) -> Samples:
    return _band_noise(rng, np.full(n, _pitch_hz(rng, 400.0, 4000.0)))


def _sweeping_noise(rng: np.random.Generator, n: int) -> Samples:
    glide_hz = 1.5 * _glide_hz(rng, n)
    return _band_noise(rng, glide_hz if rng.uniform() < 0.5 else glide_hz[::-1])


def _pulsing_noise(rng: np.random.Generator, n: int) -> Samples:
    """Pink noise, fully modulated 8 to 18 times a second."""
    pulse = np.sin(np.pi * (rng.uniform(8.0, 18.0) * _time_s(n) + rng.uniform())) ** 2
    noise: Samples = _pink_noise(rng, n) * pulse
    return noise


def _clicks(rng: np.random.Generator, n: int, rate_hz: float) -> Samples:
    """Equal clicks at a steady rate, each a tone that is gone after some 5 ms."""
    step = SAMPLE_RATE_HZ / rate_hz
    since_click_s = np.mod(np.arange(n) + rng.uniform(0.0, step), step) / SAMPLE_RATE_HZ
    decay_per_s, pitch_hz = rng.uniform(300.0, 900.0), _pitch_hz(rng, 500.0, 4000.0)
    ring = np.sin(2 * np.pi * pitch_hz * since_click_s)
    clicks: Samples = ring * np.exp(-decay_per_s * since_click_s)
    return clicks


def _slow_clicks(rng: np.random.Generator, n: int) -> Samples:
    return _clicks(rng, n, rng.uniform(8.0, 14.0))


def _fast_clicks(rng: np.random.Generator, n: int) -> Samples:
    return _clicks(rng, n, rng.uniform(25.0, 50.0))


_SOUNDS: dict[str, Sound] = {
    "bell": _bell,
    "chirp_down": _chirp_down,
    "chirp_up": _chirp_up,
    "fast_clicks": _fast_clicks,
    "harmonic_stack": _harmonic_stack,
    "narrow_noise": _narrow_noise,
    "pluck": _pluck,
    "pulsing_noise": _pulsing_noise,
    "slow_clicks": _slow_clicks,
    "steady_tone": _steady_tone,
    "sweeping_noise": _sweeping_noise,
    "vibrato_tone": _vibrato_tone,
}

CLASSES: tuple[str, ...] = tuple(_SOUNDS)
"""The sound classes, sorted."""
