"""A small convolutional network as an encoder: `patchbank check conv_encoder.py`.

Two strided convolutions over a spectrogram; each is a layer, a token is a cell of its map.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from patchbank.pipeline.encoders.plugin import (
    RESAMPLER,
    EncoderError,
    EncoderSpec,
    Grid,
    LayerSpec,
    TokenMap,
    file_sha256,
    state_sha256,
)

N_FFT, HOP, LOG_OFFSET = 512, 160, 1e-4
DIMS = (16, 32)
STRIDE = 4
SEED = 0


class Network(nn.Module):
    """Each stage divides time and frequency by four."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(n_in, n_out, kernel_size=5, stride=STRIDE, padding=2), nn.GELU()
            )
            for n_in, n_out in zip((1, *DIMS), DIMS, strict=False)
        )


class ConvEncoder:
    def __init__(self, network: Network, weights_sha256: str) -> None:
        # Frozen: dropout and batch-norm must not move, and nobody asks for gradients.
        self.network = network.eval().requires_grad_(False)
        self.spec = EncoderSpec(
            name="conv",
            weights_sha256=weights_sha256,
            sample_rate_hz=16_000,
            config={"dims": list(DIMS), "stride": STRIDE},
            frontend={"n_fft": N_FFT, "hop": HOP, "log_offset": LOG_OFFSET, "window": "hann"},
            resampler=RESAMPLER,
            layers=tuple(LayerSpec(i, "stage output", dim) for i, dim in enumerate(DIMS, start=1)),
            licence="Apache-2.0",
            source="docs/examples of patchbank",
        )

    def grids(self, n_samples: int) -> dict[int, Grid]:
        if n_samples < N_FFT:
            raise EncoderError(f"conv needs at least {N_FFT} samples, found {n_samples}")
        time, freq = 1 + n_samples // HOP, N_FFT // 2
        grids = {}
        for spec in self.spec.layers:
            time, freq = -(-time // STRIDE), -(-freq // STRIDE)
            grids[spec.layer] = Grid(time, freq)
        return grids

    def frontend(self, waveform: Tensor) -> Tensor:
        """(batch, sample) to (batch, frame, bin): the logarithm of the power, without the mean."""
        window = torch.hann_window(N_FFT, device=waveform.device)
        spectrum = torch.stft(waveform, N_FFT, HOP, window=window, return_complex=True)
        power = spectrum[:, 1:].abs().square()
        return (power + LOG_OFFSET).log().transpose(1, 2)

    def encode(
        self, features: Tensor, layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        tokens = {}
        values = features[:, None]
        for spec, stage in zip(self.spec.layers, self.network.stages, strict=True):
            values = stage(values)
            if layers is None or spec.layer in layers:
                # (batch, dim, time, freq) to (batch, time * freq, dim): time-major.
                grid = Grid(values.shape[2], values.shape[3])
                tokens[spec.layer] = TokenMap(values.flatten(2).transpose(1, 2), None, grid)
        return tokens

    def to(self, device: torch.device | str) -> ConvEncoder:
        self.network.to(device)
        return self


def load(weights: Path | None, device: torch.device | str) -> ConvEncoder:
    """The network with the weights of a state dict, or with weights drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = Network()
    if weights is None:
        return ConvEncoder(network, state_sha256(network)).to(device)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return ConvEncoder(network, file_sha256(weights)).to(device)
