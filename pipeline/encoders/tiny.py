"""The bundled encoder: a small patch transformer that this project trained on synthetic scenes.

Log-mel frames of 16 kHz audio are cut into patches of 16 frames x 16 bands (160 ms, F = 4); a CLS
token goes first. Positions are fixed sines, so any length works that holds one patch. The weights
travel with the package (recipe: `patchbank.pipeline.pretrain` and data/tiny/README.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from patchbank.pipeline.encoders.base import RESAMPLER, TokenMap
from patchbank.pipeline.encoders.logmel import LogMelSettings, log_mel, mel_power
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, LayerSpec

LICENCE = "Apache-2.0"
SOURCE = "this project: data/tiny/README.md"


@dataclass(frozen=True)
class TinyConfig:
    """The architecture; `dim` is a multiple of 4 and of `heads`."""

    dim: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    patch_frames: int = 16
    patch_bands: int = 16
    norm_eps: float = 1e-6


def sine_positions(grid: Grid, dim: int) -> Float[Tensor, "patch dim"]:
    """Fixed positions of a grid's patches: half of `dim` for time, half for frequency.

    Each half holds sines, then cosines, of wavelengths from 2 pi to 2 pi 10,000 patches
    (Vaswani et al. 2017, section 3.5, in the 2-D form of the MAE code).
    """
    rates = 10_000.0 ** (-torch.arange(dim // 4) / (dim // 4))
    time = torch.arange(grid.time).repeat_interleave(grid.freq)
    freq = torch.arange(grid.freq).repeat(grid.time)
    angles = [place[:, None] * rates for place in (time, freq)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], -1)


class Block(nn.Module):
    """Pre-norm self-attention and GELU perceptron, each with a residual."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.mlp_ratio * config.dim
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        n_clips, n_tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n_clips, n_tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return mixed


class TinyModel(nn.Module):
    """The network from log-mel patches to tokens, apart from its loading."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.patch_frames * config.patch_bands, config.dim)
        self.cls = nn.Parameter(torch.zeros(config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def grid(self, n_frames: int, n_mels: int) -> Grid:
        """Whole patches in a spectrogram; frames past the last one are dropped."""
        return Grid(n_frames // self.config.patch_frames, n_mels // self.config.patch_bands)

    def patchify(
        self, features: Float[Tensor, "batch time freq"]
    ) -> Float[Tensor, "batch patch pixel"]:
        """The spectrogram as patches, time-major, each flattened frame by frame."""
        grid = self.grid(features.shape[1], features.shape[2])
        rows, bands = self.config.patch_frames, self.config.patch_bands
        whole = features[:, : grid.time * rows, : grid.freq * bands]
        split = whole.reshape(-1, grid.time, rows, grid.freq, bands)
        return split.transpose(2, 3).reshape(-1, grid.n_patches, rows * bands)

    def forward(
        self, features: Float[Tensor, "batch time freq"]
    ) -> list[Float[Tensor, "batch token dim"]]:
        """Each block's output, CLS first, the last one after the final norm."""
        grid = self.grid(features.shape[1], features.shape[2])
        positions = _positions_on(features.device, grid, self.config.dim)
        patches = self.embed(self.patchify(features)) + positions
        x = torch.cat([self.cls.expand(patches.shape[0], 1, -1), patches], 1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        outputs[-1] = self.norm(x)
        return outputs


@lru_cache(maxsize=8)
def _positions_on(device: torch.device, grid: Grid, dim: int) -> Float[Tensor, "patch dim"]:
    """`sine_positions`, copied once: a GPU would be waited for in every batch."""
    return sine_positions(grid, dim).to(device)


def empty_tiny(config: TinyConfig) -> TinyModel:
    """A model whose weights are yet to be filled in; torch's global generator stays untouched."""
    # Building on the meta device would do the same, but imports sympy: seconds on a cold machine.
    with torch.random.fork_rng(devices=[]):
        return TinyModel(config)


def initialise(model: nn.Module, *, seed: int) -> None:
    """First weights, from `seed` alone: Xavier-uniform matrices, zero biases, unit norms."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, TinyModel):
            nn.init.normal_(module.cls, std=0.02, generator=generator)


class TinyEncoder:
    """`tiny` and `tiny-random`: log-mel front end, patch transformer, every block a layer."""

    def __init__(self, model: TinyModel, spec: EncoderSpec) -> None:
        self.spec = spec
        self._settings = LogMelSettings(**spec.frontend)
        self._model = model.eval().requires_grad_(False)

    def grids(self, n_samples: int) -> dict[int, Grid]:
        grid = self._model.grid(self._settings.n_frames(n_samples), self._settings.n_mels)
        if grid.time < 1:
            needed = self._settings.n_fft + (self._model.config.patch_frames - 1) * (
                self._settings.hop
            )
            raise EncoderError(
                f"{self.spec.name} needs at least {needed} samples, found {n_samples}; "
                "choose a longer window"
            )
        return {spec.layer: grid for spec in self.spec.layers}

    def frontend(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch time freq"]:
        self.grids(waveform.shape[1])
        return log_mel(mel_power(waveform, self._settings), self._settings)

    def encode(
        self, features: Float[Tensor, "batch time freq"], layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        grid = self._model.grid(features.shape[1], features.shape[2])
        outputs = self._model(features)
        wanted = [spec.layer for spec in self.spec.layers] if layers is None else layers
        return {
            layer: TokenMap(outputs[layer - 1][:, 1:], outputs[layer - 1][:, :1], grid)
            for layer in wanted
        }

    def to(self, device: torch.device | str) -> TinyEncoder:
        self._model.to(device)
        return self


def tiny_spec(name: str, config: TinyConfig, *, weights_sha256: str, source: str) -> EncoderSpec:
    """The spec of a `TinyEncoder`: one layer a block, the last one after the final norm."""
    meanings = ["block output"] * (config.depth - 1) + ["after the final norm"]
    return EncoderSpec(
        name=name,
        weights_sha256=weights_sha256,
        sample_rate_hz=LogMelSettings().sample_rate_hz,
        config=asdict(config),
        frontend=asdict(LogMelSettings()),
        resampler=RESAMPLER,
        layers=tuple(
            LayerSpec(layer, meaning, config.dim, n_prefix=1)
            for layer, meaning in enumerate(meanings, start=1)
        ),
        licence=LICENCE,
        source=source,
    )


def load(weights: Path | None, device: torch.device | str) -> TinyEncoder:
    """The bundled encoder, or the same architecture with the weights of a safetensors file.

    Raises `EncoderError` where the file is no safetensors or holds other tensors.
    """
    bundled = resources.files("patchbank.data").joinpath("tiny/encoder.safetensors")
    content = bundled.read_bytes() if weights is None else weights.read_bytes()
    config = TinyConfig()
    model = empty_tiny(config)
    try:
        model.load_state_dict(load_safetensors(content))
    except (SafetensorError, RuntimeError) as error:
        raise EncoderError(
            f"{weights or bundled} does not hold the weights of tiny: {error}; expected the file "
            "that `python -m patchbank.pipeline.pretrain --out FOLDER` writes"
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    spec = tiny_spec("tiny", config, weights_sha256=sha256, source=SOURCE)
    return TinyEncoder(model, spec).to(device)
