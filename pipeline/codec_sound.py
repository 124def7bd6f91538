"""Recordings that libsndfile cannot read (M4A, WebM, WMA ...), decoded by torchcodec.

Such a decoder starts at a recording's first sample: in most of these containers times are rounded
to milliseconds, so that a seek would miss by some samples. A recording is therefore decoded once
and kept for its other windows.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32

from patchbank.pipeline.containers import locate, open_member
from patchbank.pipeline.containers.index_cache import IndexCache
from patchbank.pipeline.errors import AudioError

CODEC_SUFFIXES = (
    *(".m4a", ".aac", ".wma", ".mka", ".webm", ".mp4", ".mkv", ".mov", ".amr", ".ac3"),
)
MOST_DECODED_BYTES = 1 << 30
"""Of one recording: 93 minutes of one channel at 48 kHz."""
_KEPT_BYTES = 1 << 30
_LONG_FILE_BYTES = 1 << 20
_FLOAT_BYTES = 4
_INSTALL = "pip install 'patchbank[torchcodec]', and FFmpeg: apt-get install ffmpeg"


class Sound(Protocol):
    """What of `soundfile.SoundFile` a clip is read with."""

    samplerate: int
    channels: int
    frames: int

    def seek(self, frames: int, /) -> int: ...

    def read(
        self, frames: int, *, dtype: str, always_2d: bool
    ) -> Float32[np.ndarray, "sample channel"]: ...


class MissingDecoder(AudioError):
    """What decodes these files is not installed; no clip of them will do better."""


class CodecSound:
    """A decoded recording, read like `soundfile.SoundFile`."""

    def __init__(self, samples: Float32[np.ndarray, "channel sample"], rate_hz: int) -> None:
        self.samplerate = rate_hz
        self.channels, self.frames = samples.shape
        self._samples = samples
        self._position = 0

    def seek(self, frames: int, /) -> int:
        self._position = frames
        return frames

    def read(
        self, frames: int, *, dtype: str = "float32", always_2d: bool = True
    ) -> Float32[np.ndarray, "sample channel"]:
        """The next frames, fewer at the end; float32 with both axes, whatever is asked for."""
        first, self._position = self._position, min(self._position + frames, self.frames)
        return np.ascontiguousarray(self._samples[:, first : self._position].T)


class _Decoded:
    """All samples of a recording; `len` in bytes."""

    def __init__(self, samples: Float32[np.ndarray, "channel sample"], rate_hz: int) -> None:
        self.samples = samples
        self.rate_hz = rate_hz

    def __len__(self) -> int:
        return int(self.samples.nbytes)


@functools.cache
def codec_trouble() -> str | None:
    """Why torchcodec cannot be used here, with what to install; None where it can."""
    try:
        import torchcodec.decoders  # noqa: F401
    except ImportError:
        return f"torchcodec is not installed: {_INSTALL}"
    except (RuntimeError, OSError):
        return f"torchcodec finds no FFmpeg, or is not the release for this torch: {_INSTALL}"
    return None


def is_codec_name(name: str) -> bool:
    """Whether a file of that name is torchcodec's; what libsndfile reads never is."""
    return name.lower().endswith(CODEC_SUFFIXES)


def is_codec_content(head: bytes) -> bool:
    """Whether audio without a name is torchcodec's: MP4, Matroska, ASF or AAC in ADTS."""
    return (
        head[4:8] == b"ftyp"
        or head[:4] in (b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75")
        # The two layer bits are zero in AAC and never in MP3.
        or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xF6 == 0xF0)
    )


def open_codec_sound(path: Path) -> CodecSound:
    """The recording at `path`, which may lead into a container, decoded.

    Costs a decode of the whole recording where it is not kept from an earlier window. 1 GiB of
    samples are kept, or the two latest long recordings where they are more. Memory is twice a
    recording's samples while it is decoded; files from 1 MiB are decoded one at a time. Raises
    `AudioError`, for more than 1 GiB of samples too.
    """
    place = locate(path)
    status = os.stat(path if place is None else place[0])  # noqa: PTH116
    is_long = _n_bytes(path) >= _LONG_FILE_BYTES
    decoded = (_LONG if is_long else _SHORT).get(path, status)
    return CodecSound(decoded.samples, decoded.rate_hz)


def codec_duration_s(path: Path) -> float:
    """Seconds in a recording by its header; decodes it where the header does not say."""
    metadata = _decoder(path).metadata
    # Without a start the length is guessed from the bit rate.
    if metadata.duration_seconds and metadata.begin_stream_seconds_from_header is not None:
        return float(metadata.duration_seconds)
    sound = open_codec_sound(path)
    return float(sound.frames / sound.samplerate)


def _n_bytes(path: Path) -> int:
    place = locate(path)
    if place is None:
        return path.stat().st_size
    with open_member(*place) as member:
        return member.size


def _decoder(path: Path) -> Any:
    if trouble := codec_trouble():
        raise MissingDecoder(trouble)
    from torchcodec.decoders import AudioDecoder

    if not _n_bytes(path):
        raise AudioError("the file is empty: it has 0 bytes")
    place = locate(path)
    try:
        if place is None:
            return AudioDecoder(path)
        with open_member(*place) as member:
            return AudioDecoder(member.read())
    except (RuntimeError, ValueError) as error:
        raise _undecodable(error, path) from error


def _undecodable(error: Exception, path: Path) -> AudioError:
    if "best audio stream" in str(error):
        return AudioError("cannot be decoded: it holds no sound")
    line = str(error).partition("\n")[0].replace(f" {path}", "")
    return AudioError(f"cannot be decoded: {re.sub(r'^.*[.]cpp:[0-9]+, ', '', line)}")


def _decode(path: Path, _: int) -> _Decoded:
    decoder = _decoder(path)
    rate_hz, n_channels = decoder.metadata.sample_rate, decoder.metadata.num_channels
    if not rate_hz or not n_channels:
        raise AudioError("cannot be decoded: its header gives no sample rate or no channels")
    most_s = MOST_DECODED_BYTES / (_FLOAT_BYTES * rate_hz * n_channels)
    try:
        samples = decoder.get_samples_played_in_range(0.0, most_s).data.numpy()
    except (RuntimeError, ValueError) as error:
        raise _undecodable(error, path) from error
    if samples.nbytes >= MOST_DECODED_BYTES - _FLOAT_BYTES * rate_hz * n_channels:
        raise AudioError(
            f"is longer than {most_s / 60:.0f} minutes, the most of this type that fits into "
            "memory; convert it: ffmpeg -i FILE FILE.flac"
        )
    return _Decoded(samples, rate_hz)


_SHORT = IndexCache(_decode, most=_KEPT_BYTES // 4)
# Two shards are decoded at a time, each at another recording.
_LONG = IndexCache(_decode, most=_KEPT_BYTES // 4 * 3, least=2, one_at_a_time=True)
