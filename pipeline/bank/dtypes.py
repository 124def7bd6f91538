"""The types that tokens are stored in: what their bytes are, and what a missing token looks like.

NumPy and the core of Zarr v3 have neither bfloat16 nor packed four-bit numbers. Such tokens are
stored as plain integers, and the arrays' attributes say what they mean, so that any Zarr reader
opens them and can tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from patchbank.pipeline.specs import Json, StoredDType


@dataclass(frozen=True)
class StoredType:
    """How tokens of one stored type lie in an array."""

    name: StoredDType
    dtype: np.dtype[Any]
    """What Zarr and NumPy read."""
    fill: float | int
    """What a missing or failed token holds: no token that was computed has it."""
    code_max: int = 0
    """Largest code of a quantised type, whose codes need scales to become floats; else 0."""
    n_packed: int = 1
    """Neighbouring channels that share a byte."""
    decoding: str = ""
    """How integers become floats, in words for people with another reader."""

    @property
    def is_quantised(self) -> bool:
        """Whether values need `scale`, `channel_scale` and `channel_shift` to become floats."""
        return self.code_max > 0

    @property
    def attributes(self) -> Json:
        """Attributes of arrays whose data type does not tell the whole story."""
        return {"stored_dtype": self.name, "decoding": self.decoding} if self.decoding else {}

    def to_float(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens of a type that is not quantised, as floats that NumPy knows."""
        if self.name == "bfloat16":
            return (tokens.astype("<u4") << 16).view("<f4")
        return tokens

    def to_codes(self, tokens: np.ndarray) -> np.ndarray:
        """Stored tokens of a quantised type as one int8 a channel; a missing one is the lowest."""
        if self.n_packed == 1:
            return tokens
        halves = np.stack([tokens & 15, tokens >> 4], axis=-1)
        return halves.reshape(*tokens.shape[:-1], -1).astype(np.int8) - 8

    def from_codes(self, codes: np.ndarray) -> np.ndarray:
        """The inverse of `to_codes`."""
        if self.n_packed == 1:
            return codes
        shifted = (codes + 8).astype(np.uint8)
        return shifted[..., 0::2] | (shifted[..., 1::2] << 4)


_INT8 = "float = patches * scale[..., None] * channel_scale + channel_shift; -128 is missing"
_INT4 = (
    "the low half of a byte is the code + 8 of an even channel, the high half that of the next "
    "one, 0 is missing; float = (codes * scale[..., None], each block of channels @ rotation) * "
    "channel_scale + channel_shift"
)
STORED_TYPES: Mapping[str, StoredType] = {
    "float16": StoredType("float16", np.dtype("<f2"), float("nan")),
    "bfloat16": StoredType(
        "bfloat16",
        np.dtype("<u2"),
        0x7FC0,
        decoding="the upper 16 bits of a float32: (uint32(x) << 16) viewed as float32",
    ),
    "float32": StoredType("float32", np.dtype("<f4"), float("nan")),
    "int8": StoredType("int8", np.dtype("i1"), -128, code_max=127, decoding=_INT8),
    "int4": StoredType("int4", np.dtype("u1"), 0, code_max=7, n_packed=2, decoding=_INT4),
}
assert set(STORED_TYPES) == set(get_args(StoredDType))


def prefix_type(stored: StoredType) -> StoredType:
    """What prefix tokens are stored in: a few vectors a clip, not worth quantising."""
    return STORED_TYPES["float16"] if stored.is_quantised else stored
