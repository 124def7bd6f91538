"""What tests over a bank of made views share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from fake_bank import N_CLIPS, SETTINGS

from patchbank.pipeline.specs import AugmentSpec, GainSpec, MixupSpec, ShiftSpec

EVERYTHING = AugmentSpec(MixupSpec(), ShiftSpec(), GainSpec())
MADE = replace(SETTINGS, n_views=2, augment=EVERYTHING, stored_dtype="float32")
N_ROWS = N_CLIPS + 2 * N_CLIPS // 2


def by_key(clips: pa.Table) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a clip table, or of a bank's clips without its holes."""
    return {(row["clip_id"], row["view"]): row for row in clips.to_pylist() if row["clip_id"]}


def waveform_of(row: dict[str, Any], rows: dict[tuple[str, int], Any], audio: Path) -> np.ndarray:
    """A row's waveform by the page on the format: from its columns and the audio alone."""

    def window(clip_id: str) -> np.ndarray:
        return soundfile.read(audio / rows[clip_id, 0]["path"], dtype="float32")[0]

    mix = window(row["clip_id"]).astype(np.float64)
    for gain, source in zip(row["mix_gains"], row["mix_sources"], strict=True):
        mix += gain * window(source).astype(np.float64)
    turned = np.concatenate([mix, mix])[len(mix) - row["shift_samples"] :][: len(mix)]
    return (turned * 10 ** (row["gain_db"] / 20)).astype(np.float32)
