"""Front ends of the patch encoders: modules with constants that the caller may choose."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchbank.pipeline.errors import EncoderError

PUBLISHED = "published"
BAT = "bat"
"""The conventions of the code beside BAT (houtan-ghaffari/BAT_ICML2026): normalise, then pad with
zeros to whole patches; statistics of its own."""
Settings = TypeVar("Settings")
_CUDNN: Any = torch.backends.cudnn


class FrontEnd(nn.Module):
    """Waveforms in, normalised frames out; in float32 on any device."""

    settings: Any
    """A dataclass of every constant, with `encoder` and `sample_rate_hz`."""

    @property
    def looks_at_lengths(self) -> bool:
        """Whether it makes a difference how much of a clip is audio."""
        return True

    def n_frames(self, n_samples: int) -> int:
        """Frames that a waveform of `n_samples` gives; `EncoderError` where it is too short."""
        n_frames: int = self.settings.n_frames(n_samples)
        return n_frames

    def forward(
        self,
        waveform: Float[Tensor, "batch sample"],
        n_audio_samples: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch time freq"]:
        """Frames of float32 waveforms at `sample_rate_hz`, padded and normalised.

        `n_audio_samples` says how much of each clip is audio; None: all.
        """
        n_samples = waveform.shape[1]
        self.n_frames(n_samples)
        if torch.compiler.is_exporting() and n_audio_samples is None:
            # Any number of clips: an exported program knows no list of them.
            return self.features(waveform, n_samples)
        n_audio = [n_samples] * len(waveform) if n_audio_samples is None else n_audio_samples
        if not self.looks_at_lengths:
            n_audio = [n_samples] * len(waveform)
        lengths = [min(n, n_samples) for n in n_audio]
        with torch.no_grad(), full_precision(waveform.device):
            if waveform.device.type != "cpu":
                return self._by_length(waveform, lengths)
            # On a CPU a batch of spectra falls out of the caches.
            clips = zip(waveform.split(1), lengths, strict=True)
            return torch.cat([self.features(clip, n) for clip, n in clips])

    def _by_length(
        self, waveform: Float[Tensor, "batch sample"], lengths: Sequence[int]
    ) -> Float[Tensor, "batch time freq"]:
        """`forward` with one call for each number of audio samples: few calls keep a GPU busy."""
        if len(set(lengths)) == 1:
            return self.features(waveform, lengths[0])
        order = sorted(range(len(lengths)), key=lambda clip: lengths[clip])
        sizes = [(length, len([*group])) for length, group in groupby(sorted(lengths))]
        indices = torch.tensor([order, sorted(order, key=order.__getitem__)])
        if waveform.device.type == "cuda":
            # From other memory the copy would wait for all that the device was asked before.
            indices = indices.pin_memory()
        there, back = indices.to(waveform.device, non_blocking=True)
        parts = waveform[there].split([size for _, size in sizes])
        features = [
            self.features(part, length) for part, (length, _) in zip(parts, sizes, strict=True)
        ]
        return torch.cat(features)[back]

    def features(
        self, waveform: Float[Tensor, "batch sample"], n_audio_samples: int
    ) -> Float[Tensor, "batch time freq"]:
        """`forward` of clips with equally much audio; no clip's frames depend on its batch."""
        raise NotImplementedError


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast and TF32 off: a spectrogram's quiet cells do not survive ten bits."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        places: tuple[Any, ...] = (torch.backends.cuda.matmul, _CUDNN.conv)
        before = [place.fp32_precision for place in places]
        try:
            for place in places:
                place.fp32_precision = "ieee"
            yield
        finally:
            for place, precision in zip(places, before, strict=True):
                place.fp32_precision = precision


def choose_settings(
    encoder: str,
    presets: Mapping[str, Settings],
    preset: str | None,
    changes: Mapping[str, Any] | None,
    *,
    fixed: Collection[str] = (),
) -> Settings:
    """The settings of a preset (published where None) with some constants changed.

    Those in `fixed` say what is computed and have one value. Raises `EncoderError` for a preset or
    a constant that does not exist, or a value of another kind than the constant's.
    """
    name = preset or PUBLISHED
    if name not in presets:
        raise EncoderError(
            f"{encoder} has no front-end preset {name!r}; there are: {', '.join(presets)}"
        )
    settings = presets[name]
    known = {field.name: getattr(settings, field.name) for field in fields(settings)}  # type: ignore[arg-type]
    known.pop("encoder", None)
    values = {}
    for key, value in (changes or {}).items():
        if key not in known:
            raise EncoderError(
                f"the front end of {encoder} has no constant {key!r}; there are: {', '.join(known)}"
            )
        values[key] = _as(value, known[key], f"{key} of {encoder}")
        if key in fixed and value != known[key]:
            raise EncoderError(
                f"{key} of {encoder} is {known[key]!r} and cannot be chosen, found {value!r}"
            )
    return replace(settings, **values)  # type: ignore[type-var]


def check_constants(
    encoder: str,
    *,
    positive: Mapping[str, float],
    low_hz: float,
    high_hz: float,
    sample_rate_hz: int,
) -> None:
    """Raises `EncoderError` for sizes that are not positive and bands that the rate cannot have."""
    for name, value in positive.items():
        if value <= 0:
            raise EncoderError(f"{encoder}: {name} must be positive, found {value:g}")
    nyquist = sample_rate_hz / 2
    if not 0 <= low_hz < high_hz <= nyquist:
        raise EncoderError(
            f"{encoder}: mel bands from {low_hz:g} to {high_hz:g} Hz, expected them within 0 to "
            f"{nyquist:g} Hz"
        )


def _as(value: Any, like: Any, name: str) -> Any:
    """A value as the type of a default; JSON has lists for tuples, and whole numbers for floats."""
    if isinstance(like, bool) or isinstance(value, bool):
        is_right = isinstance(like, bool) and isinstance(value, bool)
    elif isinstance(like, float):
        is_right = isinstance(value, (int, float)) and math.isfinite(value)
        value = float(value) if is_right else value
    elif isinstance(like, tuple):
        is_right = isinstance(value, (list, tuple)) and all(isinstance(x, int) for x in value)
        value = tuple(value) if is_right else value
    else:
        is_right = isinstance(value, type(like))
    if not is_right:
        raise EncoderError(f"{name} is {like!r} by default, found {value!r}; give the same kind")
    return value
