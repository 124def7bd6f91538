"""What the contract's checks share: the encoder, test signals, and tokens computed once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.pipeline.encoders.base import Encoder, TokenMap

Tokens = Mapping[int, TokenMap]
TOLERANCE = 1e-4
"""Largest error by largest token: rounding stays below 1e-5, what a mate does is far above."""
ACCELERATOR_TOLERANCE = 5e-3
"""Elsewhere than on a CPU: kernels change with the batch, and convolutions may use TF32."""


class Broken(Exception):
    """A promise is not kept."""

    def __init__(self, found: str, *, expected: str, hint: str = "") -> None:
        super().__init__(found)
        self.found, self.expected, self.hint = found, expected, hint


class Doubtful(Broken):
    """Nothing is broken, but somebody should look."""


class NotAsked(Exception):
    """The promise says nothing about such an encoder."""


class Bench:
    """An encoder under test, on `device`, with clips of `window_s`."""

    def __init__(
        self,
        load: Callable[[], Encoder],
        *,
        reference: str,
        window_s: float,
        device: torch.device,
    ) -> None:
        self.load, self.reference, self.window_s, self.device = load, reference, window_s, device
        self.encoder = load()

    @property
    def n_samples(self) -> int:
        return round(self.window_s * self.encoder.spec.sample_rate_hz)

    @property
    def tolerance(self) -> float:
        return TOLERANCE if self.device.type == "cpu" else ACCELERATOR_TOLERANCE

    def noise(self, level: float, *, seed: int, n_samples: int | None = None) -> Tensor:
        """(1, sample) seeded white noise of deviation `level`, cut at full scale."""
        random = np.random.default_rng(seed)
        values = level * random.standard_normal((1, n_samples or self.n_samples))
        return torch.from_numpy(values.astype(np.float32)).clamp(-1, 1)

    @cached_property
    def clip(self) -> Float[Tensor, "1 sample"]:
        """Moderate noise under a tone that comes and goes."""
        time_s = torch.arange(self.n_samples) / self.encoder.spec.sample_rate_hz
        beat = torch.sin(torch.pi * time_s).square()
        return self.noise(0.05, seed=1) + 0.2 * beat * torch.sin(2 * torch.pi * 440 * time_s)

    @cached_property
    def loud(self) -> Float[Tensor, "1 sample"]:
        return self.noise(1.0, seed=2)

    @cached_property
    def quiet(self) -> Float[Tensor, "1 sample"]:
        return self.noise(1e-4, seed=3)

    def encode(
        self,
        waveform: Float[Tensor, "batch sample"],
        layers: Collection[int] | None = None,
        *,
        encoder: Encoder | None = None,
    ) -> Tokens:
        """Tokens as an extraction asks for them; `waveform` itself is not handed out."""
        encoder = encoder or self.encoder
        return encoder.encode(encoder.frontend(waveform.to(self.device, copy=True)), layers)

    @cached_property
    def tokens(self) -> Tokens:
        """Of `clip` alone, in all layers."""
        return self.encode(self.clip)

    @cached_property
    def extremes(self) -> Mapping[str, Tokens]:
        """Of the clip, of silence and of noise at full scale."""
        silence = torch.zeros(1, self.n_samples)
        return {
            "a clip": self.tokens,
            "silence": self.encode(silence),
            "noise at full scale": self.encode(self.loud),
        }


def arrays(tokens: Tokens) -> dict[str, Tensor]:
    """Every tensor of some tokens, by a name for people."""
    found = {}
    for layer, token_map in tokens.items():
        found[f"layer {layer}"] = token_map.patches
        if token_map.prefix is not None:
            found[f"layer {layer} prefix"] = token_map.prefix
    return found


def largest_errors(found: Tokens, expected: Tokens) -> dict[str, float]:
    """Largest error by largest value of each tensor; infinite where shapes or layers differ.

    Values that are not finite are another check's business, and count as equal.
    """
    left, right = arrays(found), arrays(expected)
    errors = dict.fromkeys([*left, *right], float("inf"))
    for name in set(left) & set(right):
        one, other = (side[name].double().cpu().nan_to_num() for side in (left, right))
        if one.shape == other.shape:
            largest = max(float(other.abs().max()), 1e-30)
            errors[name] = float((one - other).abs().max()) / largest
    return errors


def clip_of(tokens: Tokens, index: int) -> Tokens:
    """The tokens of one clip of a batch, as a batch of one."""
    part = slice(index, index + 1)
    return {
        layer: TokenMap(
            token_map.patches[part],
            None if token_map.prefix is None else token_map.prefix[part],
            token_map.grid,
        )
        for layer, token_map in tokens.items()
    }
