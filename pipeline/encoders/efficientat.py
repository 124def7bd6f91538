"""EfficientAT mn: convolutional taggers trained on AudioSet, any width; a layer is a stage.

Schmid et al., "Efficient Large-Scale Audio Tagging via Transformer-to-CNN Knowledge Distillation"
(arXiv:2211.04772); fschmid56/EfficientAT. Takes the publisher's release files mn01 ... mn40.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.encoders.base import RESAMPLER, TokenMap
from patchbank.pipeline.encoders.efficientat_frontend import DESCRIPTIONS, LogMel, LogMelConstants
from patchbank.pipeline.encoders.efficientat_network import NORM_EPS, Stage
from patchbank.pipeline.encoders.efficientat_weights import LoadedNetwork, load_network
from patchbank.pipeline.encoders.frontend import PUBLISHED, choose_settings
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, LayerSpec

LICENCE = "MIT"
SOURCE = "fschmid56/EfficientAT"


class EfficientAT:
    """One mn model. Layers 1 to 17 are its stages; tokens are the cells of a stage's map.

    The map (batch, dim, freq, time) becomes patches (batch, time * freq, dim), `patch = t * F + f`
    with frequency 0 the lowest band; there is no prefix. At the last layer a token spans 320 ms
    by a quarter of the bands.
    """

    def __init__(
        self, loaded: LoadedNetwork, constants: LogMelConstants, device: torch.device | str
    ) -> None:
        self._stages = loaded.stages
        self.network = loaded.network
        self.log_mel = LogMel(constants)
        self.spec = EncoderSpec(
            name="efficientat",
            weights_sha256=loaded.weights_sha256,
            sample_rate_hz=self.log_mel.constants.sample_rate_hz,
            config={
                "family": "mn",
                "width": loaded.width,
                "norm_eps": NORM_EPS,
                "stages": [asdict(stage) for stage in loaded.stages],
            },
            frontend=asdict(self.log_mel.constants),
            resampler=RESAMPLER,
            layers=layer_specs(loaded.stages),
            licence=LICENCE,
            source=SOURCE,
        )
        self.to(device)

    def frontend(self, waveform: Float[Tensor, "batch sample"]) -> Float[Tensor, "batch freq time"]:
        """Normalised log-mel: 128 bands, a frame every 10 ms."""
        features: Tensor = self.log_mel(waveform)
        return features

    def encode(
        self,
        features: Float[Tensor, "batch freq time"],
        layers: Collection[int] | None = None,
    ) -> dict[int, TokenMap]:
        """Tokens of the asked stages; computes no deeper than the deepest of them."""
        asked = self._asked(layers)
        tokens: dict[int, TokenMap] = {}
        with torch.no_grad():
            maps = enumerate(self.network.maps(features), start=1)
            while len(tokens) < len(asked):
                layer, values = next(maps)
                if layer in asked:
                    tokens[layer] = token_map(values)
        return tokens

    def classify(self, features: Float[Tensor, "batch freq time"]) -> Float[Tensor, "batch class"]:
        """The checkpoint's own logits, before the sigmoid; AudioSet's 527 classes as published."""
        with torch.no_grad():
            logits: Tensor = self.network(features)
        return logits

    def grids(self, n_samples: int) -> dict[int, Grid]:
        constants = self.log_mel.constants
        time, freq = constants.n_frames(n_samples), constants.n_mels
        grids = {}
        for layer, stage in enumerate(self._stages, start=1):
            time, freq = stage.out_size(time), stage.out_size(freq)
            grids[layer] = Grid(time, freq)
        return grids

    def to(self, device: torch.device | str) -> EfficientAT:
        self.network.to(device)
        self.log_mel.to(device)
        return self

    def _asked(self, layers: Collection[int] | None) -> set[int]:
        n_layers = len(self._stages)
        asked = set(range(1, n_layers + 1) if layers is None else layers)
        if unknown := sorted(asked - set(range(1, n_layers + 1))):
            raise EncoderError(f"efficientat has layers 1 to {n_layers}, found {unknown}")
        return asked


def layer_specs(stages: tuple[Stage, ...]) -> tuple[LayerSpec, ...]:
    """What each stage hands out, counted from 1."""
    plain = {1: "first convolution", len(stages): "last 1x1 convolution"}
    specs = []
    for layer, stage in enumerate(stages, start=1):
        meaning = "output of the inverted residual block, after its shortcut where it has one"
        if layer in plain:
            meaning = f"output of the {plain[layer]}, after norm and hardswish"
        specs.append(LayerSpec(layer, meaning, stage.dim))
    return tuple(specs)


def token_map(values: Float[Tensor, "batch dim freq time"]) -> TokenMap:
    """A stage's map as time-major tokens."""
    n_freq, n_time = values.shape[2:]
    patches = values.permute(0, 3, 2, 1).flatten(1, 2).contiguous()
    return TokenMap(patches, None, Grid(n_time, n_freq))


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> EfficientAT:
    """The mn model in one of the publisher's release files.

    Width and head are read off the shapes. The number of mel bands, the hop and the strides leave
    no trace there: 128, 320 samples and the usual ones are used where `frontend` chooses no other
    `n_mels` or `hop_samples`, so files such as mn10_as_mels_40 load, with a warning.
    """
    constants = choose_settings(
        "efficientat", {PUBLISHED: LogMelConstants()}, preset, frontend, fixed=DESCRIPTIONS
    )
    return EfficientAT(load_network(weights), constants, device)
