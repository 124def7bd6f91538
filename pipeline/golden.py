"""The golden clip: a fixed recording whose tokens lie in every bank.

Anyone who has the encoder can mix, resample, pad and encode it again, and so prove that their
preprocessing agrees with the preprocessing that wrote the bank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zarr
from jaxtyping import Float32

from patchbank.pipeline.bank.card import recipe_of_card
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import create_whole_array
from patchbank.pipeline.bank.seal_record import brief
from patchbank.pipeline.specs import WindowSpec, differing_fields

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.base import Encoder

GOLDEN_RATE_HZ = 44_100
LONGEST_GOLDEN_S = 30.0
TOLERANCE = 1e-3
"""Largest error, relative to the largest value, between two machines that compute in float32."""


def golden_frames(window_s: float) -> Float32[np.ndarray, "sample channel"]:
    """A rising sine over seeded noise, two channels at 44.1 kHz: nine tenths of a window, at most
    30 s, so that mixing, resampling and padding all show."""
    n_samples = max(1, round(min(0.9 * window_s, LONGEST_GOLDEN_S) * GOLDEN_RATE_HZ))
    noise = np.random.default_rng(20_250_924).standard_normal((n_samples, 2))
    position = np.arange(n_samples) / n_samples
    sweep = np.sin(2 * np.pi * n_samples * (0.002 * position + 0.05 * position**2))
    return (0.3 * sweep[:, None] + 0.02 * noise).astype(np.float32)


def write_golden(
    folder: Path,
    frames: Float32[np.ndarray, "sample channel"],
    waveform: Float32[np.ndarray, " window"],
    tokens: Mapping[str, Float32[np.ndarray, "_ _"]],
) -> None:
    """Writes `golden/`: the recording, what the encoder was fed, and the tokens, in float32."""
    zarr.create_group(folder / "golden", attributes={"sample_rate_hz": GOLDEN_RATE_HZ})
    create_whole_array(folder, "golden/frames", frames, ("sample", "channel"))
    create_whole_array(folder, "golden/waveform", waveform, ("sample",))
    for suffix, value in tokens.items():
        second = "prefix" if suffix.endswith("_prefix") else "patch"
        create_whole_array(folder, f"golden/tokens_{suffix}", value, (second, "dim"))


@dataclass(frozen=True)
class GoldenCheck:
    """How an encoder's preprocessing and tokens compare with a bank's golden clip."""

    differences: Mapping[str, tuple[object, object]]
    """Fields in which the encoder's description differs: the bank's value, the encoder's."""
    errors: Mapping[str, float]
    """By what is compared, "waveform" or "layer 12": largest error / largest value."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What does not agree, a sentence each."""
        return (*self._problems(),)

    def _problems(self) -> Iterator[str]:
        # What explains all other differences comes first.
        first = [name for name in ("name", "weights_sha256") if name in self.differences]
        for field in [*first, *(name for name in self.differences if name not in first)]:
            found, expected = (brief(value) for value in self.differences[field])
            yield f"{field}: the bank has {found}, this encoder {expected}"
        for name, error in self.errors.items():
            if error == float("inf"):
                yield f"golden clip, {name}: is not there, or has another shape"
            elif not error <= TOLERANCE:
                yield (
                    f"golden clip, {name}: differs by {error:.2g} of its largest value, "
                    f"more than {TOLERANCE:g}"
                )


def check_golden(bank: Bank, encoder: Encoder, *, device: str = "cpu") -> GoldenCheck:
    """Prepares and encodes the golden clip of `bank` with `encoder` and compares every step."""
    import torch

    from patchbank.pipeline.audio import fit_to_encoder

    spec = encoder.spec
    differences = differing_fields(recipe_of_card(bank.card)["encoder"], spec.identity())
    window = WindowSpec(**bank.card["window"])
    frames = golden_frames(window.window_s)
    waveform, _ = fit_to_encoder(
        frames, GOLDEN_RATE_HZ, window=window, sample_rate_hz=spec.sample_rate_hz
    )
    errors = {
        "recording": _error(_golden_array(bank, "frames", frames.shape), frames),
        "waveform": _error(_golden_array(bank, "waveform", waveform.shape), waveform),
    }
    known = {layer.layer for layer in spec.layers}
    with torch.no_grad():
        features = encoder.frontend(torch.from_numpy(waveform[None]).to(device))
        maps = encoder.encode(features, [layer for layer in bank.layers if layer in known])
    for array in bank.schema.arrays():
        tokens = maps.get(array.layer)
        found = None if tokens is None else getattr(tokens, array.kind)
        shape = (array.n_tokens, array.dim)
        stored = _golden_array(bank, f"tokens_{array.column_suffix}", shape)
        name = f"layer {array.column_suffix.replace('_', ' ')}"
        errors[name] = _error(stored, None if found is None else found[0].float().cpu().numpy())
    return GoldenCheck(differences, errors)


def _golden_array(bank: Bank, name: str, shape: tuple[int, ...]) -> Float32[np.ndarray, ...] | None:
    """A stored array, of one chunk; None where it is not there in that shape."""
    path = bank.path / "golden" / name / ".".join(["c", *("0" for _ in shape)])
    try:
        if path.stat().st_size != 4 * math.prod(shape):
            return None
        return np.fromfile(path, "<f4").reshape(shape)
    except OSError:
        return None


def _error(stored: np.ndarray | None, found: np.ndarray | None) -> float:
    """Largest error by largest value; infinite where the shapes differ or one is not there."""
    if stored is None or found is None or stored.shape != found.shape:
        return float("inf")
    return float(np.abs(found - stored).max() / max(np.abs(stored).max(), 1e-30))
