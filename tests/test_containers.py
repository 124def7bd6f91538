"""Recordings inside tars, Parquet and Arrow files."""

from __future__ import annotations

import multiprocessing
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from container_files import (
    RATE_HZ,
    add_member,
    audio_cells,
    hub_table,
    sound_bytes,
    write_arrow,
    write_parquet,
    write_tar,
)
from test_audio import mp3_without_frame_count

from patchbank.pipeline.audio import decode_clip, probe_duration_s
from patchbank.pipeline.containers import member_troubles
from patchbank.pipeline.containers.tar import TARS
from patchbank.pipeline.errors import AudioError, ManifestError
from patchbank.pipeline.manifest import read_manifest
from patchbank.pipeline.sound_file import FILE_IS_GONE
from patchbank.pipeline.specs import WindowSpec

SECOND = WindowSpec(window_s=1.0, hop_s=1.0)
SOUNDS = [sound_bytes(seed) for seed in range(12)]


def digest(path: Path, start_s: float = 0.0) -> str:
    return decode_clip(path, start_s=start_s, window=SECOND, sample_rate_hz=RATE_HZ).audio_sha256


def complaint(path: Path) -> str:
    with pytest.raises(AudioError) as caught:
        digest(path)
    assert str(path) not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_file(folder: Path, content: bytes, name: str = "plain.flac") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def tar_of_sounds(folder: Path) -> list[Path]:
    members = {f"deep/{row}.flac": sound for row, sound in enumerate(SOUNDS)}
    return [write_tar(folder / "a.tar", members) / name for name in members]


def parquet_of_sounds(folder: Path) -> list[Path]:
    table = hub_table({"audio": audio_cells(SOUNDS)}, {"audio": {"_type": "Audio"}})
    path = write_parquet(folder / "a.parquet", table, rows_in_group=5)
    return [path / str(row) for row in range(len(SOUNDS))]


def binary_parquet_of_sounds(folder: Path) -> list[Path]:
    path = write_parquet(folder / "b.parquet", pa.table({"id": range(12), "audio": SOUNDS}))
    return [path / str(row) for row in range(len(SOUNDS))]


def arrow_of_sounds(folder: Path) -> list[Path]:
    table = hub_table({"audio": audio_cells(SOUNDS)}, {"audio": {"_type": "Audio"}})
    path = write_arrow(folder / "a.arrow", table, rows_in_batch=5)
    return [path / str(row) for row in range(len(SOUNDS))]


CONTAINERS = [tar_of_sounds, parquet_of_sounds, binary_parquet_of_sounds, arrow_of_sounds]
Write = Callable[[Path], list[Path]]
each_container = pytest.mark.parametrize("write", CONTAINERS, ids=lambda write: write.__name__)


@each_container
def test_a_recording_in_a_container_equals_the_plain_file(tmp_path: Path, write: Write) -> None:
    paths = write(tmp_path)
    for path, sound in zip(paths, SOUNDS, strict=True):
        assert digest(path) == digest(as_file(tmp_path, sound))
        assert probe_duration_s(path) == 1.0


@each_container
def test_threads_read_any_rows_at_once(tmp_path: Path, write: Write) -> None:
    paths = write(tmp_path)
    expected = [digest(path) for path in paths]
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(paths)), 4))
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(digest, [paths[row] for row in order]))
    assert found == [expected[row] for row in order]


@pytest.mark.parametrize(
    ("write", "method"), [*((write, "fork") for write in CONTAINERS), (tar_of_sounds, "spawn")]
)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_another_process_reads_on(tmp_path: Path, write: Write, method: Any) -> None:
    paths = write(tmp_path)
    expected = digest(paths[3])
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(digest, (paths[3],)) == expected


@pytest.mark.parametrize("seconds", [20.0, 300.0], ids=["copied", "read in place"])
def test_a_window_of_a_long_member_equals_that_stretch(tmp_path: Path, seconds: float) -> None:
    long = sound_bytes(0, seconds=seconds, format_="WAV")
    tar = write_tar(tmp_path / "a.tar", {"a.wav": long})
    assert digest(tar / "a.wav", 12.345) == digest(as_file(tmp_path, long, "a.wav"), 12.345)


@pytest.mark.parametrize("place", ["tar", "parquet", "arrow"])
def test_an_mp3_that_hides_its_length_is_read_to_its_end(tmp_path: Path, place: str) -> None:
    mp3_without_frame_count(tmp_path / "a.mp3")
    content = (tmp_path / "a.mp3").read_bytes()
    table = hub_table({"audio": audio_cells([content])}, {})
    path = {
        "tar": lambda: write_tar(tmp_path / "a.tar", {"a.mp3": content}) / "a.mp3",
        "parquet": lambda: write_parquet(tmp_path / "a.parquet", table) / "0",
        "arrow": lambda: write_arrow(tmp_path / "a.arrow", table) / "0",
    }[place]()
    assert probe_duration_s(path) == pytest.approx(10.0, abs=0.1)
    assert digest(path, 8.5) == digest(tmp_path / "a.mp3", 8.5)


@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_and_foreign_names_are_found(tmp_path: Path, format_: int) -> None:
    name = "/".join(["a" * 90, "ü" * 60, "x.flac"])
    tar = write_tar(tmp_path / "a.tar", {f"./{name}": SOUNDS[0]}, format_=format_)
    assert digest(tar / name) == digest(as_file(tmp_path, SOUNDS[0]))


def test_a_folder_called_like_a_tar_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    as_file(tmp_path / "a.tar", SOUNDS[0], "x.flac")
    assert probe_duration_s(tmp_path / "a.tar/x.flac") == 1.0
    assert read_manifest(tmp_path, window=SECOND).clips["path"].to_pylist() == ["a.tar/x.flac"]


def test_a_container_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.flac": SOUNDS[0], "b.flac": SOUNDS[1]})
    assert digest(tar / "b.flac") == digest(as_file(tmp_path, SOUNDS[1]))
    fresh = write_tar(tmp_path / "new", {"x.txt": b"?" * 5000, "b.flac": SOUNDS[2]})
    fresh.rename(tar)
    assert digest(tar / "b.flac") == digest(as_file(tmp_path, SOUNDS[2]))
    assert complaint(tar / "a.flac") == "there is no member 'a.flac' in it"
    tar.unlink()
    assert complaint(tar / "b.flac") == FILE_IS_GONE


def test_an_index_is_built_once_for_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = tar_of_sounds(tmp_path)
    built: list[Path] = []
    build = TARS._build
    monkeypatch.setattr(
        TARS, "_build", lambda path, part: (built.append(path), build(path, part))[1]
    )
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(digest, paths))
    assert built == [tmp_path / "a.tar"]


# Broken and hostile containers


def odd_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        add_member(tar, "a.flac", SOUNDS[0])
        add_member(tar, "../up.flac", SOUNDS[0])
        add_member(tar, "/etc/abs.flac", SOUNDS[0])
        add_member(tar, "twice.flac", SOUNDS[0])
        add_member(tar, "twice.flac", SOUNDS[1])
        add_member(tar, "text.flac", b"no audio at all")
        add_member(tar, "empty.flac", b"")
        for name, type_ in (("soft.flac", tarfile.SYMTYPE), ("hard.flac", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = type_, "a.flac"
            tar.addfile(link)
        pipe = tarfile.TarInfo("pipe.flac")
        pipe.type = tarfile.FIFOTYPE
        tar.addfile(pipe)
    return path


ODD_MEMBERS = {
    "gone.flac": "there is no member 'gone.flac' in it",
    "soft.flac": "is a link to 'a.flac'; pack the file itself (tar --dereference)",
    "hard.flac": "is a link to 'a.flac'; pack the file itself (tar --dereference)",
    "pipe.flac": "is no file",
    "twice.flac": "stands twice in the tar; give each member a name of its own",
    "text.flac": "cannot be decoded: Format not recognised.",
    "empty.flac": "the file is empty: it has 0 bytes",
}


@pytest.mark.parametrize(("name", "message"), ODD_MEMBERS.items(), ids=ODD_MEMBERS)
def test_a_member_that_is_no_recording_says_why(tmp_path: Path, name: str, message: str) -> None:
    assert complaint(odd_tar(tmp_path / "a.tar") / name) == message


def test_a_tar_with_members_that_cannot_be_clips_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        read_manifest(odd_tar(tmp_path / "a.tar"))
    lines = [line.removeprefix(f"{tmp_path}/a.tar: ") for line in str(caught.value).splitlines()]
    leads_out = "leads out of the tar; pack it under a name without '..' and leading '/'"
    assert f"../up.flac: {leads_out}" in lines
    assert f"/etc/abs.flac: {leads_out}" in lines
    assert f"soft.flac: {ODD_MEMBERS['soft.flac']}" in lines
    assert f"twice.flac: {ODD_MEMBERS['twice.flac']}" in lines
    assert not [line for line in lines if line.startswith(("text.flac", "a.flac"))]


def test_a_member_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"\udcff.flac": SOUNDS[0]}, format_=tarfile.GNU_FORMAT)
    with pytest.raises(ManifestError, match=r"flac: its name is not UTF-8; pack it under another"):
        read_manifest(tmp_path / "a.tar")


def test_the_mistakes_of_all_containers_are_told_at_once(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, {"x.txt": b""})
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path)
    assert [Path(problem.file).name for problem in caught.value.problems] == ["a.tar", "b.tar"]


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.wav").open("wb") as file:
        file.truncate(10 << 20)
    if os.system(f"tar -C {tmp_path} --sparse -cf {tmp_path}/a.tar a.wav"):
        pytest.skip("needs GNU tar")
    assert complaint(tmp_path / "a.tar/a.wav") == "is a sparse member; pack it without --sparse"


def cut(path: Path, n_bytes: int) -> Path:
    os.truncate(path, n_bytes)
    return path


def test_a_tar_that_is_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    members = {name: sound_bytes(0, seconds=3) for name in ("a.flac", "b.flac", "c.flac")}
    tar = write_tar(tmp_path / "a.tar", members)
    second = TARS.get(tar).stretches["b.flac"][0]
    cut(tar, second + 1000)
    assert digest(tar / "a.flac") == digest(as_file(tmp_path, members["a.flac"]))
    assert complaint(tar / "b.flac") == (
        "the tar is cut off in the middle of this member; copy it again"
    )
    assert "in it; the tar is cut off or damaged at byte" in complaint(tar / "c.flac")
    with pytest.raises(ManifestError, match=r"a\.tar: the tar is cut off or damaged at byte \d+; "):
        read_manifest(tar)


def test_a_damaged_header_is_no_end_of_the_tar(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.flac": SOUNDS[0], "b.flac": SOUNDS[1]})
    content = bytearray(tar.read_bytes())
    content[TARS.get(tar).stretches["b.flac"][0] - 512 + 148] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(ManifestError, match=r"the tar is cut off or damaged at byte \d+; copy it"):
        read_manifest(tar)


BAD_SOURCES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty file": ("a.tar", lambda path: path.touch(), r"a\.tar: is no tar that can be read: "),
    "no tar": ("a.tar", lambda path: path.write_text("x" * 600), r"a\.tar: is no tar that can be"),
    "empty tar": ("a.tar", lambda path: write_tar(path, {}), r"a\.tar: no audio in it; looked for"),
    "tar of text": (
        "a.tar",
        lambda path: write_tar(path, {"a.txt": b""}),
        r"a\.tar: no audio in it; looked for \.wav \.flac",
    ),
    "gzip": (
        "a.tar.gz",
        lambda path: tarfile.open(path, "w:gz").close(),
        r"a\.tar\.gz: a compressed tar cannot be read at random; unpack it: gunzip a\.tar\.gz",
    ),
    "gzip in disguise": (
        "a.tar",
        lambda path: tarfile.open(path, "w:xz").close(),
        r"a\.tar: a compressed tar cannot be read at random; unpack it: unxz a\.tar",
    ),
    "no Parquet": ("a.parquet", lambda path: path.write_text("PAR1"), r"cannot be read as Parq"),
    "no Arrow": ("a.arrow", lambda path: path.write_text("x" * 99), r"cannot be read as Arrow: "),
    "empty Arrow": ("a.arrow", lambda path: path.touch(), r"a\.arrow: cannot be read as Arrow: "),
    "Arrow without audio": (
        "a.arrow",
        lambda path: write_arrow(path, pa.table({"x": [1]})),
        r"a\.arrow: no column holds the bytes of audio; found x|no audio file below it",
    ),
    "no rows": (
        "a.parquet",
        lambda path: write_parquet(path, hub_table({"audio": []}, {})),
        r"a\.parquet: no audio in it",
    ),
}


@pytest.mark.parametrize(("name", "write", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
@pytest.mark.parametrize("is_named", [True, False], ids=["file", "folder"])
def test_a_container_without_audio_is_refused(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str, is_named: bool
) -> None:
    write(tmp_path / name)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / name if is_named else tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_row_without_audio_says_so(tmp_path: Path, suffix: str) -> None:
    cells = [*audio_cells([SOUNDS[0], None]), None, {"bytes": b"no audio", "path": None}]
    write = {"parquet": write_parquet, "arrow": write_arrow}[suffix]
    path = write(tmp_path / f"a.{suffix}", hub_table({"audio": cells}, {}))
    assert probe_duration_s(path / "0") == 1.0
    assert complaint(path / "1") == (
        "the row holds no audio, only the path '1.flac'; write the data set with audio embedded"
    )
    assert complaint(path / "2") == "the row holds no audio: its bytes are null"
    assert complaint(path / "3") == "cannot be decoded: Format not recognised."
    assert complaint(path / "4") == "there is no row 4: it has 4 rows"
    assert complaint(path / "01").startswith("there is no row '01'; rows are numbered from 0")


def test_a_parquet_file_that_is_cut_off_is_an_audio_error(tmp_path: Path) -> None:
    path = parquet_of_sounds(tmp_path)[0].parent
    cut(path, path.stat().st_size - 20)
    assert complaint(path / "0").startswith("cannot be read as Parquet: ")


def test_damaged_pages_are_an_audio_error(tmp_path: Path) -> None:
    path = parquet_of_sounds(tmp_path)[0].parent
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 64] = bytes(64)
    path.write_bytes(content)
    assert probe_duration_s(path / "0") == 1.0
    assert complaint(path / "6").startswith("cannot be read as Parquet: ")


def test_an_arrow_file_that_is_cut_off_does_not_kill_the_process(tmp_path: Path) -> None:
    path = arrow_of_sounds(tmp_path)[0].parent
    assert probe_duration_s(path / "11") == 1.0
    cut(path, path.stat().st_size // 2)
    assert complaint(path / "11").startswith("cannot be read as Arrow: ")


def test_compressed_arrow_buffers_are_refused(tmp_path: Path) -> None:
    table = hub_table({"audio": audio_cells(SOUNDS)}, {})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=options) as writer,
    ):
        writer.write_table(table)
    assert complaint(tmp_path / "a.arrow/0") == (
        "its buffers are compressed; write it again without compression"
    )


def test_troubles_of_members_are_told_without_reading_audio(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {"a.flac": b"no audio"})
    assert member_troubles(tar, ["a.flac", "b.flac"]) == {
        "b.flac": "there is no member 'b.flac' in it"
    }
