"""A folder of audio as a clip table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from patchbank.pipeline.errors import ManifestError
from patchbank.pipeline.manifest import ClipTable, read_manifest
from patchbank.pipeline.specs import WindowSpec

SECOND = WindowSpec(window_s=1.0, hop_s=1.0)


def record(path: Path, seconds: float = 1.0, rate_hz: int = 8000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * rate_hz)), rate_hz)
    return path


def column(read: ClipTable, name: str) -> list[Any]:
    cells: list[Any] = read.clips[name].to_pylist()
    return cells


def folder(root: Path, names: Sequence[str]) -> ClipTable:
    for name in names:
        record(root / name)
    return read_manifest(root, window=SECOND)


def test_class_folders_give_labels_in_the_order_of_the_paths(tmp_path: Path) -> None:
    names = ["dog/b.WAV", "dog/deep/a.wav", "cat/z.flac", ".git/x.wav", "dog/.hidden.wav"]
    (tmp_path / "README.md").touch()
    read = folder(tmp_path, names)
    assert column(read, "path") == ["cat/z.flac", "dog/b.WAV", "dog/deep/a.wav"]
    assert read.labels is not None
    assert read.labels.to_pylist() == [
        {"clip_id": "cat/z.flac", "labels": "cat"},
        {"clip_id": "dog/b.WAV", "labels": "dog"},
        {"clip_id": "dog/deep/a.wav", "labels": "dog"},
    ]
    assert "split" not in read.clips.column_names


def test_every_window_of_a_recording_has_its_label(tmp_path: Path) -> None:
    record(tmp_path / "dog/long.wav", 2.0)
    labels = read_manifest(tmp_path, window=SECOND).labels
    assert labels is not None
    assert labels["clip_id"].to_pylist() == ["dog/long.wav@0", "dog/long.wav@1000"]
    assert labels["labels"].to_pylist() == ["dog", "dog"]


def test_split_folders_hold_class_folders(tmp_path: Path) -> None:
    read = folder(tmp_path, ["train/dog/a.wav", "valid/cat/a.wav", "test/dog/b.wav"])
    assert column(read, "split") == ["test", "train", "valid"]
    assert read.labels is not None
    assert read.labels["labels"].to_pylist() == ["dog", "dog", "cat"]


def test_split_folders_without_classes_give_splits_only(tmp_path: Path) -> None:
    read = folder(tmp_path, ["train/a.wav", "test/b.wav"])
    assert (column(read, "split"), read.labels) == (["test", "train"], None)


def test_a_class_may_be_called_like_a_split_beside_other_classes(tmp_path: Path) -> None:
    labels = folder(tmp_path, ["train/a.wav", "bus/b.wav"]).labels
    assert labels is not None
    assert labels["labels"].to_pylist() == ["bus", "train"]


def test_files_without_class_folders_are_clips_without_labels(tmp_path: Path) -> None:
    read = folder(tmp_path, ["b.wav", "a.aiff"])
    assert (column(read, "path"), read.labels) == (["a.aiff", "b.wav"], None)


def test_a_folder_below_the_audio_root_gives_paths_from_the_root(tmp_path: Path) -> None:
    record(tmp_path / "set/dog/a.wav")
    read = read_manifest(tmp_path / "set", audio_root=tmp_path)
    assert column(read, "path") == ["set/dog/a.wav"]


BAD_FOLDERS = {
    "no audio": (["a.txt"], r"no audio file below it; looked for \.wav \.flac \.ogg \.oga \.mp3 "),
    "mixed": (["a.wav", "dog/b.wav"], r"'a\.wav' is in no class folder while 'dog/b\.wav' is in"),
    "mixed in splits": (["train/a.wav", "test/dog/b.wav"], r"'train/a\.wav' is in no class fold"),
    "val": (["train/dog/a.wav", "val/dog/a.wav"], r"val: found a split folder 'val', expected 'v"),
    "semicolon": (["dog;cat/a.wav"], r"dog;cat: a class name holds ';', which separates labels"),
    "file link out": (["a.wav", "../c.wav", "link.wav"], r"link\.wav: this link leaves the audio"),
    "folder link": (["dog/a.wav", "link"], r"link: is a link to a folder, which is not followed"),
    "name": (["dog/\udcff.wav"], r"its name is not UTF-8; rename it"),
}


@pytest.mark.parametrize(("names", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_folder_that_means_nothing_is_refused(
    tmp_path: Path, names: Sequence[str], message: str
) -> None:
    for name in names:
        place = tmp_path / "root" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith("link"):
            place.symlink_to(tmp_path / "c.wav" if name == "link.wav" else tmp_path)
        elif name.endswith(".txt") or "\udcff" in name:
            place.touch()
        else:
            record(place)
    with pytest.raises(ManifestError, match=message):
        read_manifest(tmp_path / "root")


def test_a_folder_outside_the_audio_root_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "root/a.wav")
    (tmp_path / "other").mkdir()
    with pytest.raises(ManifestError, match=r"root: is outside the audio root .*other"):
        read_manifest(tmp_path / "root", audio_root=tmp_path / "other")


def test_real_recordings_of_five_seconds_give_one_clip_each(shared: Path) -> None:
    read = read_manifest(shared / "sample/esc10", window=WindowSpec(5.0, 5.0))
    assert (len(read), len(set(column(read, "path")))) == (398, 398)
