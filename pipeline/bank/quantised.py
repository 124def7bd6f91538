"""What turns quantised tokens back into floats: two vectors a layer, and one scale a token.

A token `x` is stored as whole numbers `q` in [-127, 127] with
`x = q * scale * channel_scale + channel_shift`. Shift and scale of each channel are its mean and
deviation over a few hundred clips, measured once before the first shard, so that channels of very
different size share one range; `scale` (float16, rounded before it is used) fits each token into
it. -128 is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int8

from patchbank.pipeline.errors import BankCorrupt
from patchbank.pipeline.specs import Json

CALIBRATION_CLIPS = 512
CALIBRATION_SEED = 0
CODE_MAX = 127
CONSTANTS = ("channel_shift", "channel_scale")


@dataclass(frozen=True)
class ChannelConstants:
    """Shift and scale of each channel of one layer."""

    shift: Float32[np.ndarray, " dim"]
    scale: Float32[np.ndarray, " dim"]

    def arrays(self) -> dict[str, Float32[np.ndarray, " dim"]]:
        """By the name of the array that holds them in a bank."""
        return {"channel_shift": self.shift, "channel_scale": self.scale}

    @property
    def sha256(self) -> str:
        """Digest of the bytes of shift, then scale."""
        return hashlib.sha256(
            self.shift.astype("<f4").tobytes() + self.scale.astype("<f4").tobytes()
        ).hexdigest()

    def dequantise(
        self,
        codes: Int8[np.ndarray, "*rows patch dim"],
        scale: Float[np.ndarray, "*rows patch"],
    ) -> Float32[np.ndarray, "*rows patch dim"]:
        """The tokens as floats; NaN where `scale` is."""
        tokens = codes.astype(np.float32) * scale.astype(np.float32)[..., None]
        return np.asarray(tokens * self.scale + self.shift)


def load_constants(bank: Path, card: Json, layer: int) -> ChannelConstants:
    """The constants of a layer of a bank, sealed or not; `BankCorrupt` where they are not those
    that its card names."""
    folder = bank / f"layers/{layer}"
    try:
        dim = int(card["layers"][str(layer)]["dim"])
        paths = [folder / name / "c.0" for name in CONSTANTS]
        if any(path.stat().st_size != 4 * dim for path in paths):
            raise ValueError("their size is another")
        constants = ChannelConstants(*(np.fromfile(path, "<f4", dim) for path in paths))
        if constants.sha256 != card["quantisation"]["constants_sha256"][str(layer)]:
            raise ValueError("the card names others")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BankCorrupt(
            f"{bank}: channel constants of layer {layer} are damaged ({error}); pull the bank "
            "again, or remove it and extract"
        ) from error
    return constants


def quantisation_recipe(constants: Mapping[int, ChannelConstants] | None = None) -> Json:
    """What the recipe of a quantised bank says; constants are known once they are measured."""
    recipe: Json = {
        "scheme": "channel shift and scale, token scale",
        "calibration_clips": CALIBRATION_CLIPS,
        "calibration_seed": CALIBRATION_SEED,
    }
    if constants is not None:
        digests = {str(layer): value.sha256 for layer, value in sorted(constants.items())}
        recipe["constants_sha256"] = digests
    return recipe


class ChannelStatistics:
    """Mean and deviation of each channel over tokens that come in batches."""

    def __init__(self, dim: int) -> None:
        self._n = 0
        self._sum = np.zeros(dim)
        self._squares = np.zeros(dim)
        self._offset: Float[np.ndarray, " dim"] | None = None

    def add(self, tokens: Float32[np.ndarray, "token dim"]) -> None:
        values = tokens.astype(np.float64)
        if self._offset is None:
            # Squares of what is left after a first guess at the mean lose no digits.
            self._offset = values.mean(0)
        values -= self._offset
        self._n += len(values)
        self._sum += values.sum(0)
        self._squares += (values**2).sum(0)

    def constants(self) -> ChannelConstants:
        """Raises `ValueError` where no token was added."""
        if self._offset is None:
            raise ValueError("no tokens to measure")
        mean = self._sum / self._n
        deviation = np.sqrt(np.maximum(self._squares / self._n - mean**2, 0))
        # A channel that never moved keeps its values: dividing by one is as good as anything.
        scale = np.where(deviation > 0, deviation, 1.0).astype(np.float32)
        scale[scale == 0] = 1.0
        return ChannelConstants((mean + self._offset).astype(np.float32), scale)
