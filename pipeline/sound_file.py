"""Opens recordings, as files or in containers, so that every sample in them can be reached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import soundfile

from patchbank.pipeline.codec_sound import (
    MissingDecoder,
    Sound,
    codec_duration_s,
    is_codec_content,
    is_codec_name,
    open_codec_sound,
)
from patchbank.pipeline.containers import ByteStretch, locate, open_member
from patchbank.pipeline.containers.byte_stretch import file_stretch
from patchbank.pipeline.errors import AudioError

FILE_IS_GONE = "the file is gone; it was there when the clip table was read"
_BLOCK_FRAMES = 1 << 18
_MOST_FRAMES = 1 << 36  # 16 days at 48 kHz: more is no length but the end that `claims_more` gives
_COPIED_BYTES = 4 << 20  # of a longer member, only what a window needs is read
_ID3_HEADER_BYTES = 10
_FIRST_FRAME_BYTES = 2048  # longer than any MPEG audio frame


@contextmanager
def open_sound(path: Path) -> Iterator[Sound]:
    """The recording, open for reading inside the `with` block.

    `path` may lead into a container. Whatever fails on it there is an `AudioError` whose message
    does not hold the path. Where an MP3 does not say how long it is, `frames` is larger than what
    can be read.
    """
    with _reasons(path):
        if _is_codec(path):
            yield open_codec_sound(path)
        else:
            with _sound_file(path, is_whole=True) as sound:
                yield sound


@contextmanager
def _reasons(path: Path) -> Iterator[None]:
    """Turns what libsndfile and the system refuse into `AudioError`."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        raise AudioError(_reason(path, error)) from error
    except OSError as error:
        raise AudioError(_os_reason(error)) from error


@contextmanager
def _sound_file(path: Path, *, is_whole: bool) -> Iterator[soundfile.SoundFile]:
    """The recording; `is_whole` says that more of it than the header will be read."""
    is_plain = locate(path) is None
    if is_plain and path.suffix.lower() != ".mp3":
        with soundfile.SoundFile(path) as sound:
            yield sound
        return
    with _opened(path) as content:
        content.claims_more = _hides_its_length(content, path.suffix)
        if content.claims_more or not (is_plain or (is_whole and content.size <= _COPIED_BYTES)):
            with soundfile.SoundFile(content) as sound:
                yield sound
            return
        descriptor = os.open(path, os.O_RDONLY) if is_plain else _copied(content)
    try:
        with soundfile.SoundFile(descriptor, closefd=False) as sound:
            yield sound
    finally:
        os.close(descriptor)


def _copied(content: ByteStretch) -> int:
    """A file in memory with the same bytes, which libsndfile reads without the interpreter: a
    tenth less time a clip."""
    descriptor = os.memfd_create("sound", os.MFD_CLOEXEC)
    os.write(descriptor, content.read())
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _opened(path: Path) -> ByteStretch:
    place = locate(path)
    if place is not None:
        return open_member(*place)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return file_stretch(descriptor, 0, os.fstat(descriptor).st_size)


def _is_codec(path: Path) -> bool:
    """Whether torchcodec reads it: by its suffix, and a row of a table, which has none, by its
    content."""
    if path.suffix or locate(path) is None:
        return is_codec_name(path.name)
    with _opened(path) as content:
        return is_codec_content(_head(content))


def _reason(path: Path, error: soundfile.LibsndfileError) -> str:
    # libsndfile says "System error" for whatever the system refuses, so ask the system.
    try:
        with _opened(path) as content:
            is_empty = not content.read(1)
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

    An MP3 that does not say how long it is gets decoded. Raises `MissingDecoder` where what reads
    such recordings is not installed.
    """
    try:
        with _reasons(path):
            if _is_codec(path):
                return codec_duration_s(path)
            with _sound_file(path, is_whole=False) as sound:
                is_guess = sound.frames > _MOST_FRAMES
                n_frames = _count_frames(sound) if is_guess else sound.frames
                return float(n_frames / sound.samplerate)
    except MissingDecoder:
        raise
    except AudioError:
        return None


def _count_frames(sound: soundfile.SoundFile) -> int:
    n_frames = 0
    while n_read := len(sound.read(_BLOCK_FRAMES, dtype="float32")):
        n_frames += n_read
    return n_frames


def _hides_its_length(content: ByteStretch, suffix: str) -> bool:
    """Whether this is an MP3 whose first frame carries no frame count.

    libsndfile then guesses from the first frame's bit rate and hands out no sample beyond the
    guess, which for a variable bit rate can be a third of the recording.
    """
    head = _head(content)
    if suffix.lower() != ".mp3" and (suffix or not _looks_like_mp3(head)):
        return False
    content.seek(_id3_bytes(head))
    first_frame = content.read(_FIRST_FRAME_BYTES)
    content.seek(0)
    return not any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def _head(content: ByteStretch) -> bytes:
    head = content.read(_ID3_HEADER_BYTES)
    content.seek(0)
    return head


def _looks_like_mp3(head: bytes) -> bool:
    return head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")


def _id3_bytes(head: bytes) -> int:
    """The size of the ID3v2 tag that starts with `head`: seven bits a byte, plus its header."""
    if head[:3] != b"ID3" or len(head) < _ID3_HEADER_BYTES:
        return 0
    high, upper, lower, low = head[6:10]
    return _ID3_HEADER_BYTES + (high << 21 | upper << 14 | lower << 7 | low)
