"""Small audio sets that tests write for themselves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

SAMPLE_RATE_HZ = 16_000


def write_tone(path: Path, *, hertz: float, duration_s: float = 1.0, seed: int = 0) -> None:
    """A sine over a little seeded noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    noise = np.random.default_rng(seed).standard_normal(len(time))
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * time) + 0.01 * noise, SAMPLE_RATE_HZ)


def write_clip_set(folder: Path, *, n_clips: int, duration_s: float = 1.0) -> Path:
    """`n_clips` tones, their clips.csv with splits (returned), and a labels.csv of two classes."""
    splits: Sequence[str] = ("train", "train", "valid", "test")
    with (
        (_made(folder) / "clips.csv").open("w", newline="") as clips,
        (folder / "labels.csv").open("w", newline="") as labels,
    ):
        clip_rows, label_rows = csv.writer(clips), csv.writer(labels)
        clip_rows.writerow(["path", "split"])
        label_rows.writerow(["clip_id", "labels"])
        for index in range(n_clips):
            name = f"audio/{index:04d}.wav"
            low = (index // 4) % 2 == 0
            hertz = 200.0 + index if low else 2_000.0 + index
            write_tone(folder / name, hertz=hertz, duration_s=duration_s, seed=index)
            clip_rows.writerow([name, splits[index % 4]])
            label_rows.writerow([name, "low" if low else "high"])
    return folder / "clips.csv"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
