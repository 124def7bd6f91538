"""The values that describe a bank: what was computed, from which audio, by which encoder.

Nothing here touches a disk or imports torch. Each description turns into plain JSON, and each
identity is the SHA-256 of that JSON written canonically, so that two machines that describe the
same thing agree on its name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from patchbank.pipeline.errors import PatchbankError

Json = dict[str, Any]
PadRule = Literal["zero", "repeat"]
StoredDType = Literal["float16", "bfloat16", "float32", "int8", "int4"]
ComputeDType = Literal["float32", "bfloat16", "float16"]
DecodeIn = Literal["threads", "processes"]
LONGEST_WINDOW_S = 3_600.0
MOST_VIEWS = 2**15 - 1
"""Of a clip; views are numbered in 16 bits."""
MOST_DB = 120.0
"""Levels further apart are a slip of the pen: 24-bit audio spans 144 dB."""


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
class MixupSpec:
    """Sound of other clips mixed in; the labels of a mix are the union of its parts'.

    The defaults are those of BirdSet's multi-label mixup (arXiv 2403.10380, `MultilabelMix` with
    p = 0.9, SNR 2 to 30 dB, up to 3 sources), where a mix has 1 to `max_sources` clips beside its
    own. Each source has an SNR of its own here, against the clip alone; BirdSet's code draws one
    for all of them, against the mix as it grows.
    """

    p: float = 0.9
    """How probable it is that a view has sources at all."""
    min_snr_db: float = 2.0
    max_snr_db: float = 30.0
    max_sources: int = 3

    def __post_init__(self) -> None:
        _make_floats(self, "p", "min_snr_db", "max_snr_db")
        _check_range("mixup", "p", 0.0, self.p, 1.0)
        _check_range("mixup", "max_snr_db", self.min_snr_db, self.max_snr_db, MOST_DB)
        _check_range("mixup", "min_snr_db", -MOST_DB, self.min_snr_db, self.max_snr_db)
        _check_count("mixup", "max_sources", 1, self.max_sources, 32)


@dataclass(frozen=True)
class ShiftSpec:
    """The window turned like a ring: what leaves it at its end comes in at its beginning."""

    max_s: float | None = None
    """Furthest shift to either side, in seconds; None is any shift that the window has."""

    def __post_init__(self) -> None:
        if self.max_s is not None:
            _make_floats(self, "max_s")
            _check_range("shift", "max_s", 0.0, self.max_s, LONGEST_WINDOW_S)


@dataclass(frozen=True)
class GainSpec:
    """Another level, in dB."""

    min_db: float = -6.0
    max_db: float = 6.0

    def __post_init__(self) -> None:
        _make_floats(self, "min_db", "max_db")
        _check_range("gain", "max_db", self.min_db, self.max_db, MOST_DB)
        _check_range("gain", "min_db", -MOST_DB, self.min_db, self.max_db)


@dataclass(frozen=True)
class AugmentSpec:
    """How views are made of clips: mixed, then shifted, then set to a level; None leaves one out.

    How many views a clip gets is no part of it: that is a matter of the rows.
    """

    mixup: MixupSpec | None = None
    shift: ShiftSpec | None = None
    gain: GainSpec | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.mixup or self.shift or self.gain):
            raise PatchbankError("found no augmentation, expected mixup, shift or gain")
        _check_count("augment", "seed", 0, self.seed, 2**63 - 1)

    def identity(self) -> Json:
        """The seed and the augmentations that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def options(self) -> str:
        """What `patchbank extract` takes for it, besides the number of views."""
        specs = {"mixup": self.mixup, "shift": self.shift, "gain": self.gain}
        texts = [f"--augment {name}{_parameters(spec)}" for name, spec in specs.items() if spec]
        return " ".join([*texts, *([f"--augment-seed {self.seed}"] if self.seed else [])])


def _parameters(spec: MixupSpec | ShiftSpec | GainSpec) -> str:
    """Those that are not the default, as they are typed."""
    chosen = [(field.name, getattr(spec, field.name), field.default) for field in fields(spec)]
    texts = [f"{name}={value!r}" for name, value, default in chosen if value != default]
    return f":{','.join(texts)}" if texts else ""


def _make_floats(spec: object, *names: str) -> None:
    """2 and 2.0 are the same, but not the same JSON."""
    for name in names:
        object.__setattr__(spec, name, float(getattr(spec, name)))


def _check_range(what: str, name: str, least: float, value: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise PatchbankError(
            f"{what}: {name} must be between {least:g} and {most:g}, found {value:g}"
        )


def _check_count(what: str, name: str, least: int, value: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise PatchbankError(
            f"{what}: {name} must be a whole number from {least} to {most}, found {value!r}"
        )


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
    augment: AugmentSpec | None = None
    """How the bank makes views; None where it makes none, and then no part of the identity."""

    def identity(self) -> Json:
        identity: Json = {
            "encoder": self.encoder.identity(),
            "window": asdict(self.window),
            "layers": sorted(self.layers),
            "stored_dtype": self.stored_dtype,
            "compute_dtype": self.compute_dtype,
            "mask_padding": self.mask_padding,
            "quantisation": self.quantisation,
        }
        if self.augment is not None:
            identity["augment"] = self.augment.identity()
        return identity

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
