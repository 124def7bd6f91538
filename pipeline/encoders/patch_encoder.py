"""What the published patch transformers share: a front end, a network, every block a layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchbank.pipeline.encoders.base import RESAMPLER, TokenMap
from patchbank.pipeline.encoders.catalogue import ENCODERS
from patchbank.pipeline.encoders.checkpoint import Checkpoint
from patchbank.pipeline.encoders.frontend import FrontEnd
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, Json, LayerSpec

PATCH = 16
"""Frames, and mel bands, of a patch in every encoder that reads 128 bands."""
N_BANDS = 8
BLOCK_OUTPUT = "block output"
AFTER_NORM = "after the final norm"


class TokenNetwork(nn.Module):
    """From frames to tokens; what an architecture has to say of itself."""

    dim: int
    depth: int
    n_prefix: int
    patch_frames: int = PATCH
    last_meaning: str = BLOCK_OUTPUT
    """Which tensor the last layer is."""

    def grid(self, n_frames: int) -> Grid:
        """The token grid of so many frames; `EncoderError` where they are too few or too many."""
        raise NotImplementedError

    def hidden_states(
        self, features: Float[Tensor, "batch time freq"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        """The first `n_layers` layers, prefix tokens first, then patches in time-major order."""
        raise NotImplementedError


class PatchEncoder:
    """An `Encoder` made of a front end and a `TokenNetwork`."""

    def __init__(
        self,
        frontend: FrontEnd,
        network: TokenNetwork,
        checkpoint: Checkpoint,
        *,
        name: str,
        config: Json,
        fine_tuned: bool,
        device: torch.device | str,
    ) -> None:
        """`config` is the architecture beyond depth and width; `name` gets a + where fine-tuned."""
        self._frontend, self.network = frontend, network
        entry = ENCODERS[name]
        settings = asdict(frontend.settings)
        settings.pop("encoder")
        meanings = [BLOCK_OUTPUT] * (network.depth - 1) + [network.last_meaning]
        self.spec = EncoderSpec(
            name=f"{name}+" if fine_tuned else name,
            weights_sha256=checkpoint.sha256,
            sample_rate_hz=frontend.settings.sample_rate_hz,
            config={"depth": network.depth, "dim": network.dim, **config},
            frontend={key: _plain(value) for key, value in settings.items()},
            resampler=RESAMPLER,
            layers=tuple(
                LayerSpec(layer, meaning, network.dim, n_prefix=network.n_prefix)
                for layer, meaning in enumerate(meanings, start=1)
            ),
            licence=entry.licence,
            source=entry.weights,
        )
        self.to(device)

    def grids(self, n_samples: int) -> dict[int, Grid]:
        grid = self.network.grid(self._frontend.n_frames(n_samples))
        return {spec.layer: grid for spec in self.spec.layers}

    def audio_times(self, n_samples: int) -> int:
        """Time patches that hold some of the first `n_samples`; the grid may have more of padding,
        or fewer where a rest is cut."""
        settings = self._frontend.settings
        n_frames: int = settings.n_raw_frames(max(n_samples, settings.least_samples))
        return -(-n_frames // self.network.patch_frames)

    def frontend(
        self,
        waveform: Float[Tensor, "batch sample"],
        n_audio_samples: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch time freq"]:
        """Normalised frames of float32 waveforms at `spec.sample_rate_hz`.

        `n_audio_samples` says how much of each clip is audio, before zeros; None: all. Where
        published code pads a short clip's frames rather than its samples, so does this.
        """
        frames: Tensor = self._frontend(waveform, n_audio_samples)
        return frames

    def encode(
        self, features: Float[Tensor, "batch time freq"], layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        """Tokens of the asked layers; computes no deeper than the deepest of them."""
        known = range(1, self.network.depth + 1)
        asked = sorted(set(known if layers is None else layers))
        if unknown := [layer for layer in asked if layer not in known]:
            raise EncoderError(f"{self.spec.name} has layers 1 to {known[-1]}, found {unknown}")
        grid, n_prefix = self.network.grid(features.shape[1]), self.network.n_prefix
        with torch.no_grad():
            states = self.network.hidden_states(features, max(asked, default=0))
        return {
            layer: TokenMap(
                states[layer - 1][:, n_prefix:],
                states[layer - 1][:, :n_prefix] if n_prefix else None,
                grid,
            )
            for layer in asked
        }

    def to(self, device: torch.device | str) -> PatchEncoder:
        self.network.to(device)
        self._frontend.to(device)
        return self


def _plain(value: Any) -> Any:
    """A constant as JSON has it, so that a card read back is the same."""
    return list(value) if isinstance(value, tuple) else value


def whole_patches(n_frames: int, name: str) -> Grid:
    """The grid of as many 16 x 16 patches as fit; `EncoderError` where none does."""
    if n_frames < PATCH:
        raise EncoderError(
            f"{name} needs at least {PATCH} frames, found {n_frames}; choose a longer window"
        )
    return Grid(n_frames // PATCH, N_BANDS)
