"""Banks of the fake encoder with a failed clip, and what tests of the loader look at."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import zarr
from audio_sets import write_clip_set

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import StoredDType, WindowSpec
from patchbank.probing.tiers import Tier

N_CLIPS = 45
FAILED = 7
N_DONE = N_CLIPS - 1
HERE: list[Tier] = ["auto", "ram", "map", "read", "direct"]
"""Tiers that need no GPU."""


def make_bank(folder: Path, dtype: StoredDType = "float16") -> Bank:
    table = write_clip_set(folder / "set", n_clips=N_CLIPS)
    (folder / f"set/audio/{FAILED:04d}.wav").write_bytes(b"no audio")
    window = WindowSpec(1.0, 1.0)
    settings = ExtractionSettings(window=window, layers="all", stored_dtype=dtype)
    return extract(table, encoder="fake", out=folder / "x.bank", settings=settings)


def reference(bank: Bank, layer: int, kind: str) -> np.ndarray:
    """The whole array as zarr-python reads it."""
    return np.asarray(zarr.open_array(bank.path / f"layers/{layer}/{kind}", mode="r")[:])


def reader_threads() -> list[str]:
    """Reader threads that are still there."""
    return [one.name for one in threading.enumerate() if one.name.startswith("patchbank-read")]


def n_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))
