"""What turns quantised tokens back into floats: constants of a layer, and one scale a token.

A token is shifted and scaled channel by channel, with the mean and deviation of each over a few
hundred clips, measured once before the first shard, so that channels of very different size share
one range. `scale` (float16, rounded before it is used) then fits each token into whole numbers:
127 on either side for int8, 7 for int4. int4 is rotated before that, block by block of its
channels, so that a few large channels do not take the range from all others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, Int8

from patchbank.pipeline.bank.dtypes import StoredType
from patchbank.pipeline.errors import BankCorrupt
from patchbank.pipeline.specs import Json, StoredDType

CALIBRATION_CLIPS = 512
CALIBRATION_SEED = 0
ROTATION_SEED = 0
CONSTANTS = ("channel_shift", "channel_scale")
SCHEMES = {
    "int8": "channel shift and scale, token scale",
    "int4": "channel shift and scale, block rotation, token scale, clip search",
}


@dataclass(frozen=True)
class ChannelConstants:
    """Shift and scale of each channel of one layer, and the rotation of blocks of them."""

    shift: Float32[np.ndarray, " dim"]
    scale: Float32[np.ndarray, " dim"]
    rotation: Float32[np.ndarray, "block block"] | None = None
    """Orthogonal; tokens are stored as `block @ rotation.T`. None where they are not rotated."""

    def arrays(self) -> dict[str, Float32[np.ndarray, ...]]:
        """By the name of the array that holds them in a bank."""
        arrays = {"channel_shift": self.shift, "channel_scale": self.scale}
        return arrays if self.rotation is None else arrays | {"rotation": self.rotation}

    @property
    def sha256(self) -> str:
        """Digest of the bytes of shift, scale and rotation, one after another."""
        hasher = hashlib.sha256()
        for value in self.arrays().values():
            hasher.update(value.astype("<f4").tobytes())
        return hasher.hexdigest()

    def for_type(self, stored: StoredType) -> ChannelConstants:
        """The same constants with the rotation that `stored` asks for."""
        dim = len(self.shift)
        if dim % stored.n_packed:
            raise ValueError(f"{stored.name} packs channels in pairs, found {dim}")
        return replace(self, rotation=block_rotation(dim) if stored.name == "int4" else None)

    def dequantise(
        self,
        codes: Int8[np.ndarray, "*rows patch dim"],
        scale: Float[np.ndarray, "*rows patch"],
    ) -> Float32[np.ndarray, "*rows patch dim"]:
        """The tokens as floats; NaN where `scale` is."""
        tokens = codes.astype(np.float32) * scale.astype(np.float32)[..., None]
        if self.rotation is not None:
            blocks = tokens.reshape(*tokens.shape[:-1], -1, len(self.rotation))
            tokens = (blocks @ self.rotation).reshape(tokens.shape)
        return np.asarray(tokens * self.scale + self.shift)


def rotation_block(dim: int) -> int:
    """Channels that are rotated together: the largest power of two that divides `dim`."""
    return dim & -dim


def block_rotation(dim: int) -> Float32[np.ndarray, "block block"]:
    """A Hadamard matrix with seeded signs, orthogonal: it spreads each channel over its block."""
    block = rotation_block(dim)
    matrix: np.ndarray = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.random.default_rng(ROTATION_SEED).choice([-1.0, 1.0], size=block)
    return np.asarray(matrix * signs / np.sqrt(block), np.float32)


def constant_files(layer: int, dtype: StoredDType) -> list[str]:
    """Where the constants of a layer lie inside a bank."""
    chunks = [f"{name}/c.0" for name in CONSTANTS] + ["rotation/c.0.0"] * (dtype == "int4")
    return [f"layers/{layer}/{chunk}" for chunk in chunks]


def load_constants(
    files: Sequence[Path], card: Json, layer: int, *, where: str
) -> ChannelConstants:
    """The constants of a layer of a bank, sealed or not; `BankCorrupt` where they are not those
    that its card names.

    `files` are those of `constant_files`; `where` is the bank, for messages.
    """
    try:
        dim = int(card["layers"][str(layer)]["dim"])
        shift, scale = (_vector(path, dim) for path in files[:2])
        block = rotation_block(dim)
        rotation = _vector(files[2], block * block).reshape(block, block) if files[2:] else None
        constants = ChannelConstants(shift, scale, rotation)
        if constants.sha256 != card["quantisation"]["constants_sha256"][str(layer)]:
            raise ValueError("the card names others")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BankCorrupt(
            f"{where}: channel constants of layer {layer} are damaged ({error}); pull the bank "
            "again, or remove it and extract"
        ) from error
    return constants


def _vector(path: Path, n_values: int) -> Float32[np.ndarray, " value"]:
    if path.stat().st_size != 4 * n_values:
        raise ValueError("their size is another")
    return np.fromfile(path, "<f4", n_values)


def quantisation_recipe(
    dtype: StoredDType, constants: Mapping[int, ChannelConstants] | None = None
) -> Json:
    """What a recipe says of a stored type; of a quantised one its constants, once measured."""
    if dtype not in SCHEMES:
        return {}
    recipe: Json = {
        "scheme": SCHEMES[dtype],
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
