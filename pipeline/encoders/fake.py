"""A deterministic stand-in for an encoder: frame statistics under fixed random projections.

It has what the real ones have (two layers of different width and grid, a prefix token, weights
whose bytes matter) and costs nothing, so the bank, the loader and the crash tests run on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.encoders.base import RESAMPLER, TokenMap
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, LayerSpec

LICENCE = "Apache-2.0"
SAMPLE_RATE_HZ = 16_000
HOP = 1_600
BANDS = 2
DIMS = {1: 8, 2: 12}


class FakeEncoder:
    """Layer 1: (n // 1600, 2) tokens of width 8; layer 2: half the time steps, width 12, a CLS."""

    def __init__(self, weights: Path | None, device: torch.device | str) -> None:
        content = b"" if weights is None else weights.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest() if content else ""
        generator = torch.Generator().manual_seed(int(sha256[:8] or "0", 16))
        self._project = {
            layer: torch.randn(BANDS, 4, dim, generator=generator) for layer, dim in DIMS.items()
        }
        self._bias = {layer: torch.randn(dim, generator=generator) for layer, dim in DIMS.items()}
        self.spec = EncoderSpec(
            name="fake",
            weights_sha256=sha256,
            sample_rate_hz=SAMPLE_RATE_HZ,
            config={"bands": BANDS, "dims": {str(k): v for k, v in DIMS.items()}},
            frontend={"hop": HOP},
            resampler=RESAMPLER,
            layers=(
                LayerSpec(1, "projected frame statistics", DIMS[1]),
                LayerSpec(2, "projected frame statistics, pairs averaged", DIMS[2], n_prefix=1),
            ),
            licence=LICENCE,
        )
        self.to(device)

    def grids(self, n_samples: int) -> dict[int, Grid]:
        time = n_samples // HOP
        if time < 2:
            raise EncoderError(f"fake needs at least {2 * HOP} samples, found {n_samples}")
        return {1: Grid(time, BANDS), 2: Grid(time // 2, BANDS)}

    def frontend(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch time 4"]:
        time = waveform.shape[1] // HOP
        frames = waveform[:, : time * HOP].unflatten(1, (time, HOP))
        return torch.stack(
            [frames.mean(-1), frames.std(-1), frames.amax(-1), frames.diff(dim=-1).std(-1)], -1
        )

    def encode(
        self, features: Float[Tensor, "batch time 4"], layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        out = {}
        for layer in DIMS if layers is None else layers:
            x = features
            if layer == 2:
                x = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)
            patches = torch.tanh(torch.einsum("bts,fsd->btfd", x, self._project[layer]))
            patches = (patches + self._bias[layer]).flatten(1, 2)
            prefix = patches.mean(1, keepdim=True) if layer == 2 else None
            out[layer] = TokenMap(patches, prefix, Grid(x.shape[1], BANDS))
        return out

    def to(self, device: torch.device | str) -> FakeEncoder:
        self._project = {layer: value.to(device) for layer, value in self._project.items()}
        self._bias = {layer: value.to(device) for layer, value in self._bias.items()}
        return self


def load(weights: Path | None, device: torch.device | str) -> FakeEncoder:
    """A `FakeEncoder`; any file's bytes serve as weights."""
    return FakeEncoder(weights, device)
