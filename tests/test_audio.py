"""Decoding: one clip of a recording as samples an encoder can take."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from jaxtyping import Float32, Float64
from numpy.typing import NDArray

from patchbank.pipeline.audio import DecodedClip, decode_clip, probe_duration_s
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.specs import WindowSpec

RATE_HZ = 16_000
SECOND = WindowSpec(window_s=1.0, hop_s=1.0)


def sine(hz: float, *, seconds: float, rate_hz: int, n_channels: int = 1) -> NDArray[np.float64]:
    time_s = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.repeat(0.5 * np.sin(2 * np.pi * hz * time_s)[:, None], n_channels, axis=1)


def decode(path: Path, **changes: Any) -> DecodedClip:
    settings: dict[str, Any] = {"start_s": 0.0, "window": SECOND, "sample_rate_hz": RATE_HZ}
    return decode_clip(path, **(settings | changes))


def strongest_hz(waveform: Float32[np.ndarray, " sample"]) -> float:
    spectrum: Float64[np.ndarray, " freq"] = np.abs(np.fft.rfft(waveform)).astype(np.float64)
    return float(np.argmax(spectrum) * RATE_HZ / len(waveform))


SAMPLE_TYPES = [
    *[("wav", subtype) for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")],
    *[("flac", subtype) for subtype in ("PCM_S8", "PCM_16", "PCM_24")],
    *[("aiff", subtype) for subtype in ("PCM_16", "PCM_24", "FLOAT")],
    ("ogg", "VORBIS"),
    ("ogg", "OPUS"),
    ("mp3", "MPEG_LAYER_III"),
]


@pytest.mark.parametrize(("suffix", "subtype"), SAMPLE_TYPES, ids=lambda value: str(value))
@pytest.mark.parametrize("n_channels", [1, 2], ids=["mono", "stereo"])
@pytest.mark.parametrize("rate_hz", [16_000, 48_000])
def test_each_format_gives_the_same_sine_at_the_asked_rate(
    tmp_path: Path, suffix: str, subtype: str, n_channels: int, rate_hz: int
) -> None:
    path = tmp_path / f"sine.{suffix}"
    audio = sine(440.0, seconds=1.0, rate_hz=rate_hz, n_channels=n_channels)
    soundfile.write(path, audio, rate_hz, subtype=subtype)
    clip = decode(path)
    assert clip.waveform.dtype == np.float32
    assert clip.waveform.shape == (RATE_HZ,)
    assert strongest_hz(clip.waveform) == pytest.approx(440.0, abs=1.0)
    assert np.abs(clip.waveform[4000:12000]).max() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 22_255, 32_000, 44_100, 96_000])
def test_resampling_keeps_frequency_and_length(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", sine(1000.0, seconds=1.0, rate_hz=rate_hz), rate_hz)
    clip = decode(tmp_path / "a.wav")
    assert strongest_hz(clip.waveform) == pytest.approx(1000.0, abs=1.0)
    assert clip.n_audio_samples == RATE_HZ


def test_channels_are_mixed_by_their_mean(tmp_path: Path) -> None:
    channels = np.array([[0.5, 0.25, 0.0], [-0.5, 0.0, -0.25]] * 8000, np.float32)
    soundfile.write(tmp_path / "a.wav", channels, RATE_HZ, subtype="FLOAT")
    np.testing.assert_allclose(decode(tmp_path / "a.wav").waveform[:2], [0.25, -0.25])


def test_audio_at_the_asked_rate_is_passed_through_bit_for_bit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(RATE_HZ).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, RATE_HZ, subtype="FLOAT")
    np.testing.assert_array_equal(decode(tmp_path / "a.wav").waveform, noise)


def test_the_digest_covers_the_windows_samples_before_mixing_and_resampling(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, (3 * 8000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 8000, subtype="FLOAT")
    expected = hashlib.sha256(noise[8000:16000].astype("<f4").tobytes()).hexdigest()
    assert decode(tmp_path / "a.wav", start_s=1.0).audio_sha256 == expected


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_window_in_a_long_recording_equals_that_stretch_of_the_whole(
    tmp_path: Path, suffix: str
) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * RATE_HZ)
    soundfile.write(tmp_path / f"a.{suffix}", noise, RATE_HZ)
    whole, _ = soundfile.read(tmp_path / f"a.{suffix}", dtype="float32")
    clip = decode(tmp_path / f"a.{suffix}", start_s=12.345)
    # An MP3 decoder that starts in the middle rounds differently in the last bit.
    tolerance = 1e-6 if suffix == "mp3" else 0.0
    expected = whole[197_520 : 197_520 + RATE_HZ]
    np.testing.assert_allclose(clip.waveform, expected, rtol=0, atol=tolerance)


def test_short_audio_is_padded_with_zeros_at_the_end(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(4000, 0.5), RATE_HZ, subtype="FLOAT")
    clip = decode(tmp_path / "a.wav")
    assert clip.n_audio_samples == 4000
    assert (clip.waveform[:4000] == 0.5).all()
    assert (clip.waveform[4000:] == 0.0).all()


def test_short_audio_is_repeated_from_its_start(tmp_path: Path) -> None:
    ramp = np.linspace(0.1, 0.9, 6000, dtype=np.float32)
    soundfile.write(tmp_path / "a.wav", ramp, RATE_HZ, subtype="FLOAT")
    clip = decode(tmp_path / "a.wav", window=WindowSpec(1.0, 1.0, pad="repeat"))
    assert clip.n_audio_samples == 6000
    np.testing.assert_array_equal(clip.waveform, np.concatenate([ramp, ramp, ramp[:4000]]))


def test_a_duration_shorter_than_the_window_ends_the_audio_there(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(RATE_HZ, 0.5), RATE_HZ)
    clip = decode(tmp_path / "a.wav", duration_s=0.25)
    assert clip.n_audio_samples == 4000
    assert (clip.waveform[4000:] == 0.0).all()


def test_a_duration_longer_than_the_window_is_cut_to_the_window(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(3 * RATE_HZ, 0.5), RATE_HZ)
    assert decode(tmp_path / "a.wav", duration_s=3.0).n_audio_samples == RATE_HZ


def written(path: Path, audio: Any, **settings: Any) -> None:
    soundfile.write(path, np.asarray(audio), RATE_HZ, **settings)


def truncated_flac(path: Path) -> None:
    written(path, np.random.default_rng(0).uniform(-0.5, 0.5, 2 * RATE_HZ))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])


BROKEN: dict[str, tuple[str, Any, str]] = {
    "no bytes": ("a.wav", lambda path: path.touch(), r"^the file is empty: it has 0 bytes$"),
    "text in a wav": (
        "a.wav",
        lambda path: path.write_text("<html>not found</html>"),
        r"^cannot be decoded: Format not recognised\.$",
    ),
    "text in an mp3": ("a.mp3", lambda path: path.write_text("no" * 99), r"^cannot be decoded: "),
    "half a flac": ("a.flac", truncated_flac, r"^cannot be decoded: .*flac decoder lost sync"),
    "vanished": ("a.wav", lambda path: None, r"^the file is gone; it was there when"),
    "vanished mp3": ("a.mp3", lambda path: None, r"^the file is gone; it was there when"),
    "a folder": ("a.wav", lambda path: path.mkdir(), r"^cannot be read: Is a directory$"),
    "a header without samples": (
        "a.wav",
        lambda path: written(path, np.zeros(0)),
        r"^no samples between 0 s and 1 s$",
    ),
    "NaN": (
        "a.wav",
        lambda path: written(path, [0.0, np.nan, 0.0, np.nan], subtype="FLOAT"),
        r"^2 of 4 samples are NaN or infinite$",
    ),
    "infinite": (
        "a.wav",
        lambda path: written(path, [0.0, -np.inf], subtype="DOUBLE"),
        r"^1 of 2 samples are NaN or infinite$",
    ),
    "too large for float32": (
        "a.wav",
        lambda path: written(path, [0.0, 1e300], subtype="DOUBLE"),
        r"^1 of 2 samples are NaN or infinite$",
    ),
    "a rate without a small ratio": (
        "a.wav",
        lambda path: soundfile.write(path, np.zeros(100), 44_101),
        r"^found a sample rate of 44101 Hz, no small ratio to 16000 Hz; convert",
    ),
}


@pytest.mark.parametrize(("name", "make", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_clip_that_cannot_be_used_says_why_in_one_line_without_its_path(
    tmp_path: Path, name: str, make: Any, message: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(AudioError, match=message) as caught:
        decode(tmp_path / name)
    assert str(tmp_path) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clip_of_no_length_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE_HZ), RATE_HZ)
    with pytest.raises(AudioError, match=r"^the recording has no samples, or its length could"):
        decode(tmp_path / "a.wav", duration_s=0.0)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "ogg"])
def test_a_window_beyond_the_end_has_no_samples(tmp_path: Path, suffix: str) -> None:
    soundfile.write(tmp_path / f"a.{suffix}", np.zeros(RATE_HZ), RATE_HZ)
    with pytest.raises(AudioError, match=r"^no samples between 7 s and 8 s$"):
        decode(tmp_path / f"a.{suffix}", start_s=7.0)


def mp3_without_frame_count(path: Path) -> NDArray[np.float32]:
    """Silence, then noise at a variable bit rate; the tag that tells the length is cut off."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 10 * 44_100)
    noise[: 44_100 // 2] = 0
    soundfile.write(path, noise, 44_100, bitrate_mode="VARIABLE", compression_level=0.2)
    content = path.read_bytes()
    path.write_bytes(content[content.index(b"\xff\xfb", 4) :])
    return noise.astype(np.float32)


def test_an_mp3_that_hides_its_length_is_read_to_its_end(tmp_path: Path) -> None:
    mp3_without_frame_count(tmp_path / "a.mp3")
    guessed_s = soundfile.info(tmp_path / "a.mp3").duration
    assert abs(guessed_s - 10.0) > 1.0
    duration_s = probe_duration_s(tmp_path / "a.mp3")
    assert duration_s == pytest.approx(10.0, abs=0.1)
    last = decode(tmp_path / "a.mp3", start_s=9.0, sample_rate_hz=44_100)
    assert last.n_audio_samples == 44_100
    assert np.abs(last.waveform[-4000:]).max() > 0.1
    with pytest.raises(AudioError):
        decode(tmp_path / "a.mp3", start_s=12.0)


def test_an_mp3_that_claims_more_than_it_has_gives_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 10 * 44_100), 44_100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert soundfile.info(path).duration == pytest.approx(10.0, abs=0.1)
    clip = decode(path, window=WindowSpec(10.0, 10.0))
    assert 4.0 < clip.n_audio_samples / RATE_HZ < 6.0
    with pytest.raises(AudioError, match=r"^no samples between 8 s and 9 s$"):
        decode(path, start_s=8.0)


def test_the_duration_is_read_from_the_header(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(12_000), RATE_HZ)
    assert probe_duration_s(tmp_path / "a.flac") == 0.75


@pytest.mark.parametrize("name", ["gone.wav", "broken.wav", "broken.mp3", "empty.mp3"])
def test_an_unreadable_header_has_no_duration(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.wav").write_text("no audio")
    (tmp_path / "broken.mp3").write_text("no audio")
    (tmp_path / "empty.mp3").touch()
    assert probe_duration_s(tmp_path / name) is None


def test_real_ogg_recordings_decode(shared: Path) -> None:
    paths = sorted((shared / "sample/esc10/rooster").glob("*.ogg"))[:3]
    for path in paths:
        clip = decode(path, window=WindowSpec(5.0, 5.0))
        assert clip.n_audio_samples == 5 * RATE_HZ
        assert 0.001 < np.abs(clip.waveform).max() < 1.5
