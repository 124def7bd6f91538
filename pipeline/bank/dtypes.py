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
    is_quantised: bool = False
    """Whether values need `scale`, `channel_scale` and `channel_shift` to become floats."""
    decoding: str = ""
    """How integers become floats, in words for people with another reader."""

    @property
    def attributes(self) -> Json:
        """Attributes of arrays whose data type does not tell the whole story."""
        return {"stored_dtype": self.name, "decoding": self.decoding} if self.decoding else {}

    def to_float(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens of a type that is not quantised, as floats that NumPy knows."""
        if self.name == "bfloat16":
            return (tokens.astype("<u4") << 16).view("<f4")
        return tokens


_INT8 = "float = patches * scale[..., None] * channel_scale + channel_shift; -128 is missing"
STORED_TYPES: Mapping[str, StoredType] = {
    "float16": StoredType("float16", np.dtype("<f2"), float("nan")),
    "bfloat16": StoredType(
        "bfloat16",
        np.dtype("<u2"),
        0x7FC0,
        decoding="the upper 16 bits of a float32: (uint32(x) << 16) viewed as float32",
    ),
    "float32": StoredType("float32", np.dtype("<f4"), float("nan")),
    "int8": StoredType("int8", np.dtype("i1"), -128, is_quantised=True, decoding=_INT8),
}
assert set(STORED_TYPES) == set(get_args(StoredDType))


def prefix_type(stored: StoredType) -> StoredType:
    """What prefix tokens are stored in: a few vectors a clip, not worth quantising."""
    return STORED_TYPES["float16"] if stored.is_quantised else stored
