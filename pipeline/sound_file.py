"""Opens recordings with libsndfile so that every sample in them can be reached."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import soundfile

from patchbank.pipeline.errors import AudioError

FILE_IS_GONE = "the file is gone; it was there when the clip table was read"
_BLOCK_FRAMES = 1 << 18
_ID3_HEADER_BYTES = 10
_FIRST_FRAME_BYTES = 2048  # longer than any MPEG audio frame


@contextmanager
def open_sound(path: Path) -> Iterator[soundfile.SoundFile]:
    """The recording, open for reading inside the `with` block.

    Whatever fails on it there is an `AudioError` whose message does not hold the path. Where an
    MP3 does not say how long it is, `frames` is larger than what can be read.
    """
    try:
        if hides_its_length(path):
            with _UnendingFile(path) as file, soundfile.SoundFile(file) as sound:
                yield sound
        else:
            with soundfile.SoundFile(path) as sound:
                yield sound
    except soundfile.LibsndfileError as error:
        raise AudioError(_reason(path, error)) from error
    except OSError as error:
        raise AudioError(_os_reason(error)) from error


def _reason(path: Path, error: soundfile.LibsndfileError) -> str:
    # libsndfile says "System error" for whatever the system refuses, so ask the system.
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as refusal:
        return _os_reason(refusal)
    if is_empty:
        return "the file is empty: it has 0 bytes"
    return f"cannot be decoded: {error.error_string.strip() or f'libsndfile error {error.code}'}"


def _os_reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return FILE_IS_GONE
    return f"cannot be read: {error.strerror}"


def probe_duration_s(path: Path) -> float | None:
    """Seconds in a recording by its header; None where it cannot be read.

    An MP3 that does not say how long it is gets decoded.
    """
    try:
        with open_sound(path) as sound:
            n_frames = _count_frames(sound) if hides_its_length(path) else sound.frames
            return float(n_frames / sound.samplerate)
    except AudioError:
        return None


def _count_frames(sound: soundfile.SoundFile) -> int:
    n_frames = 0
    while n_read := len(sound.read(_BLOCK_FRAMES, dtype="float32")):
        n_frames += n_read
    return n_frames


def hides_its_length(path: Path) -> bool:
    """Whether this is an MP3 whose first frame carries no frame count.

    libsndfile then guesses from the first frame's bit rate and hands out no sample beyond the
    guess, which for a variable bit rate can be a third of the recording.
    """
    if path.suffix.lower() != ".mp3":
        return False
    with path.open("rb") as file:
        head = file.read(_ID3_HEADER_BYTES)
        file.seek(_id3_bytes(head))
        first_frame = file.read(_FIRST_FRAME_BYTES)
    return not any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def _id3_bytes(head: bytes) -> int:
    """The size of the ID3v2 tag that starts with `head`: seven bits a byte, plus its header."""
    if head[:3] != b"ID3" or len(head) < _ID3_HEADER_BYTES:
        return 0
    high, upper, lower, low = head[6:10]
    return _ID3_HEADER_BYTES + (high << 21 | upper << 14 | lower << 7 | low)


class _UnendingFile(io.FileIO):
    """A file that claims a tebibyte more than it has, which lifts libsndfile's guess of its end."""

    _is_at_end = False

    def seek(self, position: int, whence: int = os.SEEK_SET, /) -> int:
        self._is_at_end = whence == os.SEEK_END
        return super().seek(position, whence)

    def tell(self) -> int:
        return super().tell() + ((1 << 40) if self._is_at_end else 0)
