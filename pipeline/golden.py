"""The golden clip: a fixed waveform whose tokens lie in every bank.

Anyone who has the encoder can encode it again and so prove that their preprocessing agrees with
the preprocessing that wrote the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import zarr
from jaxtyping import Float, Float32


def golden_waveform(n_samples: int) -> Float32[np.ndarray, " sample"]:
    """A rising sine over seeded noise, the same for every bank of that length."""
    noise = np.random.default_rng(20_250_924).standard_normal(n_samples)
    position = np.arange(n_samples) / n_samples
    sweep = np.sin(2 * np.pi * n_samples * (0.002 * position + 0.05 * position**2))
    return (0.3 * sweep + 0.02 * noise).astype(np.float32)


def write_golden(
    folder: Path,
    waveform: Float32[np.ndarray, " sample"],
    tokens: Mapping[str, Float[np.ndarray, "1 token dim"]],
) -> None:
    """Writes `golden/`: the waveform, and one array of tokens a layer in the stored dtype."""
    group = zarr.create_group(folder / "golden")
    values = {"waveform": waveform} | {f"tokens_{key}": value[0] for key, value in tokens.items()}
    for name, value in values.items():
        second = "prefix" if name.endswith("_prefix") else "patch"
        group.create_array(
            name,
            data=value,
            chunks=value.shape,
            compressors=None,
            fill_value=float("nan"),
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("sample",) if name == "waveform" else (second, "dim"),
            config={"write_empty_chunks": True},
        )
