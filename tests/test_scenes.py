"""Synthetic scenes: reproducible, honest about what they hold, different in every split."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile

from patchbank.pipeline.scenes import (
    CLASSES,
    SAMPLE_RATE_HZ,
    Scene,
    SceneSettings,
    Split,
    make_clip,
    make_scene,
    scene_generator,
    write_scenes,
)

SPLITS: tuple[Split, ...] = ("train", "valid", "test", "pretrain")


@cache
def train_scenes() -> list[Scene]:
    return [make_clip(3, "train", index) for index in range(120)]


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_equal_seeds_write_equal_bytes_and_other_seeds_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_scenes(tmp_path / name, n_train=2, n_valid=1, n_test=1, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    first, other = (tmp_path / name / "audio/train_0000.wav" for name in "ac")
    assert first.read_bytes() != other.read_bytes()


def test_the_tables_name_every_clip_with_its_split_and_labels(tmp_path: Path) -> None:
    write_scenes(tmp_path, n_train=3, n_valid=2, n_test=1, seed=0)
    clips, labels = table(tmp_path / "clips.csv"), table(tmp_path / "labels.csv")
    assert [row["split"] for row in clips] == ["train"] * 3 + ["valid"] * 2 + ["test"]
    assert [row["clip_id"] for row in clips] == [row["clip_id"] for row in labels]
    for clip, label in zip(clips, labels, strict=True):
        split, index = clip["clip_id"].split("_")
        assert (tmp_path / clip["path"]).is_file()
        scene = make_clip(0, next(s for s in SPLITS if s == split), int(index))
        assert tuple(label["labels"].split(";")) == scene.labels


def test_the_audio_on_disk_is_mono_pcm16_and_is_the_scene(tmp_path: Path) -> None:
    write_scenes(tmp_path, n_train=1, n_valid=0, n_test=0, seed=5)
    path = tmp_path / "audio/train_0000.wav"
    info = soundfile.info(path)
    assert (info.subtype, info.channels, info.samplerate) == ("PCM_16", 1, SAMPLE_RATE_HZ)
    audio, _ = soundfile.read(path, dtype="float32")
    np.testing.assert_allclose(audio, make_clip(5, "train", 0).waveform, atol=1.01 / 2**15)


def test_a_clip_is_the_same_made_alone_or_after_others() -> None:
    alone = make_clip(0, "valid", 2).waveform
    after = [make_clip(0, "valid", index).waveform for index in range(3)][2]
    np.testing.assert_array_equal(alone, after)


def test_splits_and_indices_have_streams_of_their_own() -> None:
    waveforms = [make_clip(0, split, index).waveform for split in SPLITS for index in range(2)]
    assert len({waveform.tobytes() for waveform in waveforms}) == len(waveforms)


def test_a_scene_holds_one_to_four_distinct_classes_inside_the_clip() -> None:
    for scene in train_scenes():
        assert scene.labels == tuple(sorted(event.label for event in scene.events))
        assert 1 <= len(scene.labels) <= 4
        assert set(scene.labels) <= set(CLASSES)
        for event in scene.events:
            assert event.start_s >= 0
            assert event.start_s + event.duration_s <= 5.0
            assert 0.2 - 1e-4 <= event.duration_s <= 1.0


def test_waveforms_are_finite_float32_with_peaks_below_one() -> None:
    for waveform in (scene.waveform for scene in train_scenes()):
        assert waveform.dtype == np.float32
        assert waveform.shape == (5 * SAMPLE_RATE_HZ,)
        assert np.isfinite(waveform).all()
        assert np.abs(waveform).max() <= 1.0


def test_every_class_occurs_about_equally_often() -> None:
    labels = [label for scene in train_scenes() for label in scene.labels]
    counts = [labels.count(name) for name in CLASSES]
    assert min(counts) > 10
    assert max(counts) < 45


@pytest.mark.parametrize("index", range(12))
def test_an_event_stands_out_of_the_floor_by_its_gain(index: int) -> None:
    quiet = SceneSettings(min_events=1, max_events=1, floor_rms=1e-6)
    scene = make_scene(scene_generator(0, "train", index), quiet)
    event = scene.events[0]
    start, n = (round(s * SAMPLE_RATE_HZ) for s in (event.start_s, event.duration_s))
    assert -18.0 <= event.gain_db <= 0.0
    sound = scene.waveform[start : start + n].astype(np.float64)
    rest = np.delete(scene.waveform, slice(start, start + n))
    expected_rms = 0.15 * 10 ** (event.gain_db / 20)
    peak = np.abs(sound).max() / np.sqrt(np.mean(sound**2)) * expected_rms
    assert np.sqrt(np.mean(sound**2)) == pytest.approx(
        expected_rms * min(1.0, quiet.peak / peak), rel=1e-3
    )
    assert np.abs(rest).max() < 1e-4


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_sounds_different_every_time(name: str) -> None:
    events = [event for scene in train_scenes() for event in scene.events if event.label == name]
    assert len({event.duration_s for event in events}) == len(events) > 1


def test_more_events_than_classes_repeat_classes() -> None:
    crowded = SceneSettings(min_events=14, max_events=14)
    scene = make_scene(scene_generator(0, "pretrain", 0), crowded)
    assert len(scene.events) == 14
    assert len(scene.labels) < 14
