"""The values that describe a bank: what was computed, from which audio, by which encoder.

Nothing here touches a disk or imports torch. Each description turns into plain JSON, and each
identity is the SHA-256 of that JSON written canonically, so that two machines that describe the
same thing agree on its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from patchbank.pipeline.errors import PatchbankError

Json = dict[str, Any]
PadRule = Literal["zero", "repeat"]
StoredDType = Literal["float16", "bfloat16", "float32", "int8", "int4"]
LONGEST_WINDOW_S = 3_600.0


def canonical_json(value: object) -> bytes:
    """`value` as JSON with sorted keys and no spaces; NaN and infinities are refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def digest(value: object) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def differing_fields(
    found: Mapping[str, Any], expected: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, tuple[object, object]]:
    """The leaves in which two nested descriptions differ, as `a.b.c -> (found, expected)`."""
    differences: dict[str, tuple[object, object]] = {}
    for key in sorted(set(found) | set(expected)):
        left, right = found.get(key), expected.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            differences |= differing_fields(left, right, prefix=f"{prefix}{key}.")
        elif left != right:
            differences[f"{prefix}{key}"] = (left, right)
    return differences


@dataclass(frozen=True)
class Grid:
    """The token grid of one layer: `patch = t * freq + f`, time-major."""

    time: int
    freq: int

    @property
    def n_patches(self) -> int:
        return self.time * self.freq


@dataclass(frozen=True)
class LayerSpec:
    """What one layer of an encoder hands out."""

    layer: int
    """1-based index of the block or stage."""
    meaning: str
    """Which tensor it is, for example "block output" or "after the final norm"."""
    dim: int
    n_prefix: int = 0
    """Tokens that are no patch (CLS)."""


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides an encoder's tokens for given audio; its digest is the `encoder_id`."""

    name: str
    weights_sha256: str
    """SHA-256 of the weight file's bytes; of nothing ("") where there are no weights."""
    sample_rate_hz: int
    config: Json
    """Architecture: depth, width, heads, norm constants ..."""
    frontend: Json
    """The front end with every constant."""
    resampler: Json
    """The resampler that brings audio to `sample_rate_hz`, with every constant."""
    layers: tuple[LayerSpec, ...]
    licence: str = ""
    """Licence of the weights; no part of the identity."""
    source: str = ""
    """Where the weights and the architecture come from; no part of the identity."""

    def identity(self) -> Json:
        """The fields that the `encoder_id` is made of."""
        fields = asdict(self)
        del fields["licence"], fields["source"]
        fields["layers"] = {
            str(layer.pop("layer")): layer for layer in (asdict(spec) for spec in self.layers)
        }
        return fields

    @property
    def encoder_id(self) -> str:
        return digest(self.identity())

    def layer(self, layer: int) -> LayerSpec:
        """The spec of one layer; `KeyError` where the encoder has no such layer."""
        for spec in self.layers:
            if spec.layer == layer:
                return spec
        raise KeyError(layer)


@dataclass(frozen=True)
class WindowSpec:
    """How recordings become clips of one length.

    Windows start at 0, `hop_s`, 2 `hop_s`, ... of a row's segment. The first is always kept and
    padded if it is short; a later one is kept when at least `min_new_fraction` of a hop (or of a
    window, where that is shorter) in it is audio that no earlier window holds.
    """

    window_s: float = 10.0
    hop_s: float = 10.0
    pad: PadRule = "zero"
    """What fills a window beyond its audio, at the end: zeros, or the audio again."""
    min_new_fraction: float = 0.5

    def __post_init__(self) -> None:
        for name, value in (("window_s", self.window_s), ("hop_s", self.hop_s)):
            if not 0 < value <= LONGEST_WINDOW_S:
                raise PatchbankError(
                    f"{name} must be above 0 and at most {LONGEST_WINDOW_S:g} seconds, "
                    f"found {value:g}"
                )
            # 10 and 10.0 are the same window, but not the same JSON.
            object.__setattr__(self, name, float(value))

    def n_samples(self, sample_rate_hz: int) -> int:
        """Samples in a window at `sample_rate_hz`."""
        return round(self.window_s * sample_rate_hz)

    def starts_s(self, segment_s: float) -> list[float]:
        """Starts of the windows of a segment, in seconds from its beginning."""
        starts = [0.0]
        least_new_s = self.min_new_fraction * min(self.hop_s, self.window_s)
        while True:
            start_s = len(starts) * self.hop_s
            new_audio_s = segment_s - max(start_s, starts[-1] + self.window_s)
            if new_audio_s <= 0 or new_audio_s < least_new_s:
                return starts
            starts.append(start_s)


@dataclass(frozen=True)
class Recipe:
    """Everything about a bank that is known before its first clip; its digest is `recipe_id`."""

    encoder: EncoderSpec
    window: WindowSpec
    layers: tuple[int, ...]
    stored_dtype: StoredDType = "float16"
    compute_dtype: str = "float32"
    mask_padding: bool = False
    """Whether `n_patches` counts only patches that hold audio."""
    quantisation: Json = field(default_factory=dict)

    def identity(self) -> Json:
        return {
            "encoder": self.encoder.identity(),
            "window": asdict(self.window),
            "layers": sorted(self.layers),
            "stored_dtype": self.stored_dtype,
            "compute_dtype": self.compute_dtype,
            "mask_padding": self.mask_padding,
            "quantisation": self.quantisation,
        }

    @property
    def recipe_id(self) -> str:
        return digest(self.identity())


def human_bytes(n_bytes: float) -> str:
    """`n_bytes` in binary units with three digits, for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if n_bytes < 1024 or unit == "TiB":
            break
        n_bytes /= 1024
    return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.3g} {unit}"
