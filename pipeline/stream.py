"""Tokens of recordings without a bank: for a probe that labels new audio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from patchbank.pipeline.audio import DecodedClip, decode_clip, fit_to_encoder, probe_duration_s
from patchbank.pipeline.bank.dtypes import STORED_TYPES, prefix_type
from patchbank.pipeline.containers import locate
from patchbank.pipeline.encoders.base import Encoder, TokenMap, features_of
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.specs import Grid, StoredDType, WindowSpec
from patchbank.pipeline.tokens import counted_patches, store_tokens


@dataclass(frozen=True)
class Window:
    """One window of a recording."""

    path: Path
    start_s: float
    duration_s: float
    """Seconds of audio in it."""


@dataclass(frozen=True)
class EncodedLayer:
    """The tokens of one layer."""

    patches: Float[np.ndarray, "clip patch dim"]
    prefix: Float[np.ndarray, "clip prefix dim"] | None
    n_patches: Int64[np.ndarray, " clip"]
    grid: Grid


@dataclass(frozen=True)
class EncodedWindows:
    """The tokens of some windows of one recording, as a bank would hold them."""

    windows: tuple[Window, ...]
    layers: Mapping[int, EncodedLayer]


@dataclass(frozen=True)
class TokenStream:
    """How recordings become tokens: the encoder and the settings of a bank's card."""

    encoder: Encoder
    layers: tuple[int, ...]
    window: WindowSpec
    stored_dtype: StoredDType = "float16"
    mask_padding: bool = False
    device: str = "cpu"
    batch_size: int = 16

    def encode(self, path: Path) -> Iterator[EncodedWindows]:
        """The tokens of a recording, some windows at a time; `AudioError` where it cannot be read.

        Memory holds one batch of windows, however long the recording is.
        """
        with ThreadPoolExecutor(2, thread_name_prefix="decode") as decoders:
            for chosen in self._batches(windows_of(path, self.window)):
                yield self._encode(chosen, list(decoders.map(self._decode, chosen)))

    def encode_samples(
        self, samples: Float32[np.ndarray, " sample"], sample_rate_hz: int, *, name: str
    ) -> Iterator[EncodedWindows]:
        """The tokens of one channel of samples, cut, resampled and padded as a recording's are."""
        windows = _windows(Path(name), len(samples) / sample_rate_hz, self.window)
        for chosen in self._batches(windows):
            yield self._encode(chosen, [self._cut(one, samples, sample_rate_hz) for one in chosen])

    def _batches(self, windows: list[Window]) -> Iterator[list[Window]]:
        for start in range(0, len(windows), self.batch_size):
            yield windows[start : start + self.batch_size]

    def _cut(
        self, window: Window, samples: Float32[np.ndarray, " sample"], rate_hz: int
    ) -> DecodedClip:
        first, n = round(window.start_s * rate_hz), round(window.duration_s * rate_hz)
        waveform, n_audio_samples = fit_to_encoder(
            samples[first : first + n, None],
            rate_hz,
            window=self.window,
            sample_rate_hz=self.encoder.spec.sample_rate_hz,
        )
        return DecodedClip(waveform, "", n_audio_samples)

    def _decode(self, window: Window) -> DecodedClip:
        return decode_clip(
            window.path,
            start_s=window.start_s,
            duration_s=window.duration_s,
            window=self.window,
            sample_rate_hz=self.encoder.spec.sample_rate_hz,
        )

    @torch.no_grad()
    def _encode(self, windows: Sequence[Window], clips: Sequence[DecodedClip]) -> EncodedWindows:
        waveforms = torch.from_numpy(np.stack([clip.waveform for clip in clips]))
        features = features_of(
            self.encoder,
            waveforms.to(self.device),
            [clip.n_audio_samples for clip in clips] if self.window.pad == "zero" else None,
        )
        found = self.encoder.encode(features, self.layers)
        n_samples = waveforms.shape[1]
        return EncodedWindows(
            tuple(windows),
            {layer: self._layer(found[layer], clips, n_samples) for layer in self.layers},
        )

    def _layer(
        self, tokens: TokenMap, clips: Sequence[DecodedClip], n_samples: int
    ) -> EncodedLayer:
        counts = [
            counted_patches(
                self.encoder,
                tokens.grid,
                n_audio_samples=clip.n_audio_samples,
                n_samples=n_samples,
                mask_padding=self.mask_padding,
            )
            for clip in clips
        ]
        return EncodedLayer(
            self._stored(tokens.patches),
            None if tokens.prefix is None else self._stored(tokens.prefix),
            np.array(counts, dtype=np.int64),
            tokens.grid,
        )

    def _stored(
        self, tokens: Float[Tensor, "batch token dim"]
    ) -> Float[np.ndarray, "clip token dim"]:
        """Tokens rounded as the bank's are; those of a quantised bank stand for float16 ones."""
        type_ = prefix_type(STORED_TYPES[self.stored_dtype])
        every = torch.full((len(tokens),), tokens.shape[1])
        stored = store_tokens(tokens, stored=type_, n_counted=every)
        for failure in stored.failures:
            if failure is not None:
                raise AudioError(failure)
        return type_.to_float(stored.tokens)


def windows_of(path: Path, window: WindowSpec) -> list[Window]:
    """The windows that a recording gives; `AudioError` where its length cannot be read."""
    if locate(path) is None and not path.is_file():
        raise AudioError("there is no such file")
    length_s = probe_duration_s(path)
    if not length_s:
        raise AudioError("no audio that can be decoded")
    return _windows(path, length_s, window)


def _windows(path: Path, length_s: float, window: WindowSpec) -> list[Window]:
    return [
        Window(path, start_s, min(window.window_s, length_s - start_s))
        for start_s in window.starts_s(length_s)
    ]
