"""The Audio Spectrogram Transformer of `transformers` as an encoder.

`--weights FOLDER` takes a folder with `config.json` and `model.safetensors`, such as a copy of
MIT/ast-finetuned-audioset-10-10-0.4593. Without, it is a small one with random weights.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor
from torchaudio.compliance.kaldi import fbank
from transformers import ASTConfig, ASTModel

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

RATE_HZ = 16_000
FRAME, HOP = 400, 160
MEAN, DEVIATION = -4.2677393, 4.5689974
N_PREFIX = 2
SMALL = ASTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SEED = 0


class ASTEncoder:
    def __init__(self, model: ASTModel, weights_sha256: str) -> None:
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.config = config
        n_layers = config.num_hidden_layers
        meanings = ["block output"] * (n_layers - 1) + ["after the final norm"]
        self.spec = EncoderSpec(
            name="ast",
            weights_sha256=weights_sha256,
            sample_rate_hz=RATE_HZ,
            # All that decides tokens: two encoders that differ must not have one description.
            config={
                "depth": n_layers,
                "dim": config.hidden_size,
                "heads": config.num_attention_heads,
                "patch": config.patch_size,
                "strides": [config.time_stride, config.frequency_stride],
                "norm_eps": config.layer_norm_eps,
            },
            frontend={
                "name": "torchaudio.compliance.kaldi.fbank",
                "frame": FRAME,
                "hop": HOP,
                "window": "hanning",
                "n_mels": config.num_mel_bins,
                "frames": config.max_length,
                "mean": MEAN,
                "divisor": 2 * DEVIATION,
            },
            resampler=RESAMPLER,
            layers=tuple(
                LayerSpec(i, meaning, config.hidden_size, N_PREFIX)
                for i, meaning in enumerate(meanings, start=1)
            ),
            licence="BSD-3-Clause",
            source="MIT/ast-finetuned-audioset-10-10-0.4593",
        )
        self.grid = Grid(
            (config.max_length - config.patch_size) // config.time_stride + 1,
            (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1,
        )

    def grids(self, n_samples: int) -> dict[int, Grid]:
        n_frames = 1 + (n_samples - FRAME) // HOP
        if not 1 <= n_frames <= self.config.max_length:
            most = FRAME + (self.config.max_length - 1) * HOP
            raise EncoderError(f"ast takes {FRAME} to {most} samples, found {n_samples}")
        return {spec.layer: self.grid for spec in self.spec.layers}

    def frontend(self, waveform: Tensor) -> Tensor:
        """(batch, sample) to (batch, frame, mel), padded to the length that AST was trained on."""
        clips = [
            fbank(
                clip[None] - clip.mean(),
                htk_compat=True,
                sample_frequency=RATE_HZ,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=self.config.num_mel_bins,
                dither=0.0,
                frame_shift=10,
            )
            for clip in waveform
        ]
        features = torch.stack(clips)
        missing = self.config.max_length - features.shape[1]
        features = torch.nn.functional.pad(features, (0, 0, 0, missing))
        return (features - MEAN) / (2 * DEVIATION)

    def encode(
        self, features: Tensor, layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        output = self.model(features, output_hidden_states=True)
        # The first entry is the input of the first block; the last block's output lacks the norm.
        states = [*output.hidden_states[1:-1], output.last_hidden_state]
        wanted = [spec.layer for spec in self.spec.layers] if layers is None else layers
        return {layer: self.token_map(states[layer - 1]) for layer in wanted}

    def token_map(self, states: Tensor) -> TokenMap:
        """AST walks through frequency first, a bank through time first: (f, t) to (t, f)."""
        patches = states[:, N_PREFIX:].unflatten(1, (self.grid.freq, self.grid.time))
        return TokenMap(patches.transpose(1, 2).flatten(1, 2), states[:, :N_PREFIX], self.grid)

    def to(self, device: torch.device | str) -> ASTEncoder:
        self.model.to(device)
        return self


def load(weights: Path | None, device: torch.device | str) -> ASTEncoder:
    """AST from a folder of weights, or a small one whose weights are drawn from a seed."""
    if weights is not None:
        model = ASTModel.from_pretrained(weights, local_files_only=True)
        return ASTEncoder(model, file_sha256(weights / "model.safetensors")).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ASTModel(SMALL)
    return ASTEncoder(model, state_sha256(model)).to(device)
