"""Audio for the benchmark of extraction: made from a seed, listed as often as clips are needed."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from cache import make_cold, make_warm

CLIP_S = 10.0
N_ONSETS = 12
N_HARMONICS = 8


@dataclass(frozen=True)
class AudioPool:
    """Distinct files of ten seconds in one folder."""

    folder: Path
    rate_hz: int
    suffix: str
    """`flac` or `wav`, both of 16 bits."""
    n_files: int

    @property
    def paths(self) -> list[Path]:
        return [self.folder / f"{index:05d}.{self.suffix}" for index in range(self.n_files)]

    @property
    def n_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def make(self) -> None:
        """Writes the files, unless an earlier run left them."""
        mark = self.folder / "done"
        if mark.is_file() and mark.read_text() == repr(self):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write = partial(_write, rate_hz=self.rate_hz)
        with ThreadPoolExecutor() as pool:
            list(pool.map(write, self.paths, range(self.n_files)))
        mark.write_text(repr(self))

    def into_cache(self, *, cold: bool) -> None:
        """Brings the files into the page cache, or drops them from it."""
        (make_cold if cold else make_warm)(self.folder)

    def table(self, n_clips: int) -> Path:
        """A clip table of so many clips; files come again, every row says how long it is."""
        path = self.folder.with_name(f"{self.folder.name}-{n_clips}.csv")
        names = [f"{self.folder.name}/{path.name}" for path in self.paths]
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["clip_id", "path", "start_s", "duration_s"])
            for clip in range(n_clips):
                rows.writerow([f"{clip:07d}", names[clip % self.n_files], 0.0, CLIP_S])
        return path


def _write(path: Path, seed: int, *, rate_hz: int) -> None:
    soundfile.write(path, recording(seed, rate_hz), rate_hz, subtype="PCM_16")


def recording(seed: int, rate_hz: int) -> np.ndarray:
    """Tones with harmonics that die away, over noise that falls with the frequency.

    A lossless codec finds something to predict, and something that it cannot.
    """
    rng = np.random.default_rng([seed, rate_hz])
    n_samples = round(CLIP_S * rate_hz)
    audio = 0.02 * _coloured_noise(rng, n_samples, exponent=rng.uniform(0.5, 1.0))
    for _ in range(N_ONSETS):
        start = int(rng.integers(n_samples - rate_hz // 2))
        audio[start:] += _tone(rng, n_samples - start, rate_hz)
    return np.asarray(0.7 * audio / np.abs(audio).max())


def _coloured_noise(rng: np.random.Generator, n_samples: int, *, exponent: float) -> np.ndarray:
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** exponent
    spectrum[0] = 0.0
    noise = np.fft.irfft(spectrum, n_samples)
    return np.asarray(noise / noise.std())


def _tone(rng: np.random.Generator, n_samples: int, rate_hz: int) -> np.ndarray:
    length = min(n_samples, 2 * rate_hz)
    time_s = np.arange(length) / rate_hz
    lowest_hz, decay = np.exp(rng.uniform(np.log(80.0), np.log(1_200.0))), rng.uniform(2.0, 8.0)
    tone = np.zeros(n_samples)
    for harmonic in range(1, N_HARMONICS + 1):
        hertz = harmonic * lowest_hz
        if hertz < 0.45 * rate_hz:
            envelope = np.exp(-decay * harmonic**0.5 * time_s) / harmonic
            tone[:length] += envelope * np.sin(2 * np.pi * hertz * time_s)
    return rng.uniform(0.1, 0.4) * tone
