"""Recordings that torchcodec decodes: M4A, WebM, WMA ... The tests make theirs with ffmpeg."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from container_files import audio_cells, hub_table, write_arrow, write_parquet, write_tar
from jaxtyping import Float32

from patchbank.pipeline import codec_sound
from patchbank.pipeline.audio import decode_clip, probe_duration_s
from patchbank.pipeline.codec_sound import CODEC_SUFFIXES, MissingDecoder, codec_trouble
from patchbank.pipeline.errors import AudioError, ManifestError
from patchbank.pipeline.manifest import read_manifest
from patchbank.pipeline.manifest.audio_files import AUDIO_SUFFIXES
from patchbank.pipeline.specs import WindowSpec

RATE_HZ = 48_000
LENGTH_S = 21.0
SECOND = WindowSpec(window_s=1.0, hop_s=1.0)
ENCODED = {
    "m4a": ("a.m4a", ["-c:a", "aac"]),
    "alac": ("alac.m4a", ["-c:a", "alac"]),
    "opus in webm": ("o.webm", ["-c:a", "libopus", "-b:a", "64k"]),
    "vorbis in webm": ("v.webm", ["-c:a", "libvorbis"]),
    "flac in mka": ("a.mka", ["-c:a", "flac"]),
    "aac": ("a.aac", ["-c:a", "aac"]),
    "wma": ("a.wma", ["-c:a", "wmav2"]),
    "mp4": ("a.mp4", ["-c:a", "aac"]),
}
needs_torchcodec = pytest.mark.skipif(
    codec_trouble() is not None, reason=f"needs torchcodec: {codec_trouble()}"
)
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="makes its files with ffmpeg: apt-get install ffmpeg"
)
each_type = pytest.mark.parametrize("type_", ENCODED)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One recording of two channels in each type."""
    folder = tmp_path_factory.mktemp("recordings")
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (round(LENGTH_S * RATE_HZ), 2))
    soundfile.write(folder / "source.wav", noise, RATE_HZ)
    outputs = [part for name, options in ENCODED.values() for part in (*options, folder / name)]
    command = ["ffmpeg", "-v", "error", "-i", folder / "source.wav", *outputs]
    subprocess.run(command, check=True)
    return folder


def whole(path: Path) -> Float32[np.ndarray, "sample channel"]:
    from torchcodec.decoders import AudioDecoder

    return np.asarray(AudioDecoder(path).get_all_samples().data.numpy().T)


def clip_at(path: Path, start_s: float) -> Float32[np.ndarray, " sample"]:
    return decode_clip(path, start_s=start_s, window=SECOND, sample_rate_hz=RATE_HZ).waveform


@needs_torchcodec
@needs_ffmpeg
@each_type
def test_windows_are_stretches_of_the_whole_decode(recordings: Path, type_: str) -> None:
    path = recordings / ENCODED[type_][0]
    mono = whole(path).mean(axis=1, dtype=np.float32)
    for start_s in (0.0, 12.345, 3.0, 17.77):
        first = round(start_s * RATE_HZ)
        np.testing.assert_array_equal(clip_at(path, start_s), mono[first : first + RATE_HZ])


@needs_torchcodec
@needs_ffmpeg
@each_type
def test_the_length_is_known_to_a_frame(recordings: Path, type_: str) -> None:
    duration_s = probe_duration_s(recordings / ENCODED[type_][0])
    assert duration_s == pytest.approx(LENGTH_S, abs=0.06)


@needs_torchcodec
@needs_ffmpeg
@each_type
@pytest.mark.parametrize("place", ["tar", "parquet", "arrow"])
def test_a_recording_in_a_container_equals_the_file(
    recordings: Path, tmp_path: Path, type_: str, place: str
) -> None:
    file = recordings / ENCODED[type_][0]
    table = hub_table({"audio": audio_cells([file.read_bytes()])}, {})
    if place == "tar":
        path = write_tar(tmp_path / "a.tar", {file.name: file.read_bytes()}) / file.name
    else:
        write = write_parquet if place == "parquet" else write_arrow
        path = write(tmp_path / f"a.{place}", table) / "0"
    np.testing.assert_array_equal(clip_at(path, 9.87), clip_at(file, 9.87))
    assert probe_duration_s(path) == probe_duration_s(file)


@needs_torchcodec
@needs_ffmpeg
def test_a_recording_is_decoded_once_for_all_its_windows(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(recordings / "o.webm", tmp_path))
    expected = [clip_at(recordings / "o.webm", float(start_s)) for start_s in range(20)]
    decoded: list[Path] = []
    decode = codec_sound._SHORT._build

    def watched(path: Path, part: int) -> codec_sound._Decoded:
        decoded.append(path)
        return decode(path, part)

    monkeypatch.setattr(codec_sound._SHORT, "_build", watched)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda start_s: clip_at(path, float(start_s)), range(20)))
    np.testing.assert_array_equal(found, expected)
    assert decoded == [path]


@needs_torchcodec
@needs_ffmpeg
def test_a_recording_that_does_not_fit_into_memory_says_how_to_convert_it(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(recordings / "a.m4a", tmp_path))
    monkeypatch.setattr(codec_sound, "MOST_DECODED_BYTES", 5_000_000)
    with pytest.raises(
        AudioError, match=r"^is longer than 0 minutes, .* ffmpeg -i FILE FILE\.flac$"
    ):
        clip_at(path, 0.0)


@needs_torchcodec
@needs_ffmpeg
def test_a_folder_of_such_recordings_is_a_clip_table(recordings: Path, tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    shutil.copy(recordings / "a.m4a", tmp_path / "dog")
    shutil.copy(recordings / "o.webm", tmp_path / "dog")
    shutil.copy(recordings / "a.mp4", tmp_path / "dog")
    paths = read_manifest(tmp_path, window=WindowSpec(30.0, 30.0)).clips["path"].to_pylist()
    assert paths == ["dog/a.m4a", "dog/o.webm"]


def silent_video(path: Path) -> None:
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "color=size=32x32:duration=1"]
    subprocess.run([*command, "-c:v", "mpeg4", path], check=True)


BROKEN = {
    "text": (lambda path: path.write_bytes(b"no audio at all" * 99), r"^cannot be decoded: .*Inva"),
    "empty": (lambda path: path.touch(), r"^the file is empty: it has 0 bytes$"),
    "a video": (silent_video, r"^cannot be decoded: it holds no sound$"),
    "gone": (lambda path: None, r"^the file is gone; it was there when"),
}


@needs_torchcodec
@needs_ffmpeg
@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_decoded_says_why_in_one_line(tmp_path: Path, kind: str) -> None:
    write, message = BROKEN[kind]
    path = tmp_path / "a.mp4"
    write(path)
    with pytest.raises(AudioError, match=message) as caught:
        clip_at(path, 0.0)
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert probe_duration_s(path) is None


# Without torchcodec

NOT_INSTALLED = (
    r"torchcodec is not installed: pip install 'patchbank\[torchcodec\]', and FFmpeg: apt-get"
)


@pytest.fixture
def no_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    codec_trouble.cache_clear()
    monkeypatch.setattr(codec_sound, "codec_trouble", codec_trouble.__wrapped__)


def test_a_table_is_refused_once_before_anything_is_decoded(
    tmp_path: Path, no_torchcodec: None
) -> None:
    rows = [f"{number}.m4a,1" for number in range(40)]
    for number in range(40):
        (tmp_path / f"{number}.m4a").touch()
    (tmp_path / "clips.csv").write_text("\n".join(["path,duration_s", *rows]))
    with pytest.raises(ManifestError, match=rf"40 recordings like '0\.m4a' .*{NOT_INSTALLED}") as e:
        read_manifest(tmp_path / "clips.csv")
    assert len(e.value.problems) == 1
    with pytest.raises(ManifestError, match=NOT_INSTALLED):
        read_manifest(tmp_path)


def test_rows_whose_content_needs_it_stop_the_run_too(tmp_path: Path, no_torchcodec: None) -> None:
    content = b"\0\0\0\x1cftypM4A " + bytes(99)
    write_parquet(tmp_path / "a.parquet", hub_table({"audio": audio_cells([content])}, {}))
    with pytest.raises(MissingDecoder, match=NOT_INSTALLED):
        read_manifest(tmp_path)


def test_what_libsndfile_reads_is_never_torchcodecs() -> None:
    assert not set(CODEC_SUFFIXES) & {f".{name.lower()}" for name in soundfile.available_formats()}
    assert {".wav", ".flac", ".ogg", ".opus", ".mp3"} < set(AUDIO_SUFFIXES) - set(CODEC_SUFFIXES)
