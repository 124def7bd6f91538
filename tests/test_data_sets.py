"""Data sets in containers as clip tables: WebDataset tars, Hugging Face Parquet and Arrow."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from container_files import (
    RATE_HZ,
    audio_cells,
    hub_table,
    sound_bytes,
    write_arrow,
    write_parquet,
    write_tar,
)
from fake_bank import SETTINGS

from patchbank.cli.recordings import recordings
from patchbank.pipeline.errors import ManifestError
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.manifest import ClipTable, read_manifest
from patchbank.pipeline.manifest.split_names import splits_of_names
from patchbank.pipeline.specs import WindowSpec
from patchbank.pipeline.stream import windows_of

SECOND = WindowSpec(window_s=1.0, hop_s=1.0)
SOUND = sound_bytes(0)
AUDIO = {"_type": "Audio", "sampling_rate": RATE_HZ}
PETS = {"names": ["dog", "cat"], "_type": "ClassLabel"}


def read(source: Path, **settings: Any) -> ClipTable:
    return read_manifest(source, window=SECOND, **settings)


def column(table: ClipTable, name: str) -> list[Any]:
    cells: list[Any] = table.clips[name].to_pylist()
    return cells


def labels(table: ClipTable) -> dict[str, str] | None:
    if table.labels is None:
        return None
    rows = table.labels.to_pylist()
    return {row["clip_id"].rpartition("/")[2]: row["labels"] for row in rows}


def pets(n_rows: int = 3, **more: Any) -> pa.Table:
    classes = [row % 2 for row in range(n_rows)]
    columns = {"audio": audio_cells([SOUND] * n_rows), "label": classes, **more}
    return hub_table(columns, {"audio": AUDIO, "label": PETS})


# WebDataset


def test_a_tar_gives_a_clip_for_each_audio_member_in_its_order(tmp_path: Path) -> None:
    members = {"b/2.flac": SOUND, "b/2.cls": b"dog\n", "a/1.flac": SOUND, "a/1.txt": b"a caption"}
    table = read(write_tar(tmp_path / "x.tar", members))
    assert column(table, "path") == ["x.tar/b/2.flac", "x.tar/a/1.flac"]
    assert column(table, "duration_s") == [1.0, 1.0]
    assert labels(table) == {"2.flac": "dog"}
    assert (table.audio_root, table.source) == (tmp_path, str(tmp_path / "x.tar"))


def test_json_beside_a_member_gives_labels_and_columns(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = [
        {"labels": ["dog", "rain"], "fold": 2, "place": "Bern", "status": "ok", "deep": {"x": 1}},
        {"label": 7, "fold": 1, "place": 3},
        {"place": None, "gain_db": 1.5},
    ]
    members = {}
    for row, facts in enumerate(told):
        members |= {f"{row}.flac": SOUND, f"{row}.json": json.dumps(facts).encode()}
    table = read(write_tar(tmp_path / "x.tar", members))
    assert labels(table) == {"0.flac": "dog;rain", "1.flac": "7"}
    assert column(table, "fold") == ["2", "1", None]
    assert column(table, "place") == ["Bern", "3", None]
    assert column(table, "gain_db") == [None, None, 1.5]
    assert column(table, "data_set_status") == ["ok", None, None]
    assert "deep" not in table.clips.column_names


def test_two_audio_files_of_a_sample_are_two_clips_with_its_labels(tmp_path: Path) -> None:
    members = {"1.near.flac": SOUND, "1.far.flac": SOUND, "1.cls": b"dog"}
    table = read(write_tar(tmp_path / "x.tar", members))
    assert labels(table) == {"1.near.flac": "dog", "1.far.flac": "dog"}


def test_cls_is_taken_before_json(tmp_path: Path) -> None:
    members = {"1.flac": SOUND, "1.cls": b"dog", "1.json": b'{"label": "cat"}'}
    assert labels(read(write_tar(tmp_path / "x.tar", members))) == {"1.flac": "dog"}


def test_broken_json_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"1.flac": SOUND, "1.json": b"{"})
    with pytest.raises(ManifestError, match=r"x\.tar: 1\.json: cannot be read: "):
        read(tmp_path)


def test_tars_of_a_folder_say_their_split(tmp_path: Path) -> None:
    for name in ("train-0001.tar", "train-0000.tar", "val-0000.tar"):
        write_tar(tmp_path / "shards" / name, {"a.flac": SOUND})
    table = read(tmp_path)
    assert column(table, "path") == [
        "shards/train-0000.tar/a.flac",
        "shards/train-0001.tar/a.flac",
        "shards/val-0000.tar/a.flac",
    ]
    assert column(table, "split") == ["train", "train", "valid"]


def test_a_recording_in_a_tar_is_cut_into_windows(tmp_path: Path) -> None:
    table = read(write_tar(tmp_path / "x.tar", {"a.flac": sound_bytes(0, seconds=2.0)}))
    assert column(table, "clip_id") == ["x.tar/a.flac@0", "x.tar/a.flac@1000"]


def test_a_member_that_is_broken_stays_as_a_clip_that_fails(tmp_path: Path) -> None:
    table = read(write_tar(tmp_path / "x.tar", {"a.flac": b"no audio", "b.flac": SOUND}))
    assert column(table, "duration_s") == [0.0, 1.0]


# Hugging Face


def test_parquet_with_audio_gives_a_clip_a_row_with_class_names(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_parquet(tmp_path / f"data/{name}.parquet", pets(12), rows_in_group=5)
    (tmp_path / "README.md").touch()
    table = read(tmp_path)
    assert len(table) == 36
    assert column(table, "path")[10:13] == [
        "data/test-00000-of-00001.parquet/10",
        "data/test-00000-of-00001.parquet/11",
        "data/train-00000-of-00002.parquet/0",
    ]
    assert column(table, "split") == ["test"] * 12 + ["train"] * 24
    assert table.labels is not None
    assert table.labels["labels"].to_pylist()[:3] == ["dog", "cat", "dog"]
    assert column(table, "label")[:3] == ["dog", "cat", "dog"]


def test_columns_are_kept_and_reserved_names_renamed(tmp_path: Path) -> None:
    more = {
        "fold": [1, 2, None],
        "status": ["a", "b", "c"],
        "path": ["x", "y", "z"],
        "data_set_path": [1, 2, 3],
        "split": ["a", "b", "c"],
        "speech": [True, False, None],
        "gain": [0.5, 1.0, 2.0],
        "embedding": [[1.0], [2.0], [3.0]],
        "when": pa.array([0, 1, 2], pa.timestamp("s")),
    }
    table = read(write_parquet(tmp_path / "train.parquet", pets(**more)))
    assert table.clips.column_names == [
        *("clip_id", "view", "path", "start_s", "duration_s", "split", "fold", "label"),
        *("data_set_status", "data_set_path_", "data_set_path", "data_set_split"),
        *("speech", "gain"),
    ]
    assert column(table, "fold") == ["1", "2", None]
    assert column(table, "split") == ["train"] * 3
    assert column(table, "data_set_path_") == ["x", "y", "z"]
    assert table.clips.schema.field("speech").type == pa.bool_()


def test_a_column_of_splits_is_the_split(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", pets(split=["validation", "train", "Test"]))
    assert column(read(path), "split") == ["valid", "train", "test"]


LABEL_COLUMNS: dict[
    str, tuple[Mapping[str, Any], Mapping[str, Any], Sequence[str | None] | None]
] = {
    "classes": ({"label": [1, 0, -1]}, {"label": PETS}, ["cat", "dog", None]),
    "classes under another name": ({"pet": [1, 0, None]}, {"pet": PETS}, ["cat", "dog", None]),
    "a sequence": (
        {"labels": [[0, 1], [], None]},
        {"labels": {"feature": PETS, "_type": "Sequence"}},
        ["dog;cat", "", None],
    ),
    "a list": ({"x": [[0, 1], [1], [0]]}, {"x": [PETS]}, ["dog;cat", "cat", "dog"]),
    "two of classes": ({"a": [0, 0, 1], "b": [1, 1, 1]}, {"a": PETS, "b": PETS}, None),
    "label of two": ({"a": [0, 0, 1], "label": [1, 1, 1]}, {"a": PETS, "label": PETS}, ["cat"] * 3),
    "strings": ({"label": ["a", "b;c", None]}, {}, ["a", "b;c", None]),
    "lists of strings": ({"labels": [["a", "b"], [], ["c"]]}, {}, ["a;b", "", "c"]),
    "numbers": ({"label": [3, 4, 5]}, {}, ["3", "4", "5"]),
    "none": ({"category": ["a", "b", "c"]}, {}, None),
}


@pytest.mark.parametrize(
    ("columns", "features", "expected"), LABEL_COLUMNS.values(), ids=LABEL_COLUMNS.keys()
)
def test_labels_are_found(
    tmp_path: Path,
    columns: Mapping[str, Any],
    features: Mapping[str, Any],
    expected: Sequence[str | None] | None,
) -> None:
    table = hub_table({"audio": audio_cells([SOUND] * 3), **columns}, {"audio": AUDIO, **features})
    found = labels(read(write_parquet(tmp_path / "x.parquet", table)))
    told = None if expected is None else {str(row): name for row, name in enumerate(expected)}
    assert found == (told and {row: name for row, name in told.items() if name is not None})


def test_a_saved_data_set_gives_its_splits(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    for split in ("train", "validation"):
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", pets(3), rows_in_batch=2)
        write_arrow(tmp_path / split / "cache-0123.arrow", pets(5))
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
    table = read(tmp_path)
    assert column(table, "path")[2:4] == [
        "train/data-00000-of-00001.arrow/2",
        "validation/data-00000-of-00001.arrow/0",
    ]
    assert column(table, "split") == ["train"] * 3 + ["valid"] * 3
    assert labels(table) == {"0": "dog", "1": "cat", "2": "dog"}


def test_class_names_may_stand_beside_the_file(tmp_path: Path) -> None:
    info = {"features": {"audio": AUDIO, "label": PETS}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    write_arrow(tmp_path / "data-00000-of-00001.arrow", pets().replace_schema_metadata(None))
    assert labels(read(tmp_path)) == {"0": "dog", "1": "cat", "2": "dog"}


def test_files_that_disagree_on_a_type_are_joined_as_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pets(1, note=[1]))
    write_parquet(tmp_path / "b.parquet", pets(1, note=["x"]))
    write_parquet(tmp_path / "c.parquet", pets(1))
    assert column(read(tmp_path), "note") == ["1", "x", None]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "tar"])
def test_a_container_that_was_not_copied_whole_is_not_passed_over(
    tmp_path: Path, suffix: str
) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in ("a", "b")]
    for path in paths:
        if suffix == "tar":
            write_tar(path, {"a.flac": SOUND, "b.flac": SOUND})
        else:
            (write_parquet if suffix == "parquet" else write_arrow)(path, pets())
    os.truncate(paths[1], 5000)
    with pytest.raises(
        ManifestError, match=rf"b\.{suffix}: (cannot be read as|the tar is cut off)"
    ):
        read(tmp_path)


SPLIT_NAMES: dict[str, tuple[Sequence[str], Sequence[str] | None]] = {
    "hub": (
        ["data/train-00000-of-00002.parquet", "data/validation-00000-of-00001.parquet"],
        ["train", "valid"],
    ),
    "plain": (["dev.parquet", "eval.parquet", "test.tar"], ["valid", "test", "test"]),
    "numbered": (["train_01.tar", "valid-7.tar", "val.0.tar"], ["train", "valid", "valid"]),
    "folders": (["a/train/0.tar", "a/test/x.tar"], ["train", "test"]),
    "nearest": (["test/train-1.tar"], ["train"]),
    "not all": (["train.tar", "more.tar"], None),
    "longer words": (["training_day.tar", "tester.tar"], None),
}


@pytest.mark.parametrize(("paths", "expected"), SPLIT_NAMES.values(), ids=SPLIT_NAMES.keys())
def test_names_say_the_split_where_all_do(
    paths: Sequence[str], expected: Sequence[str] | None
) -> None:
    assert splits_of_names(paths) == expected


# Tables, folders, and what is mixed


def test_a_table_may_list_members(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/x.tar", {"a.flac": SOUND})
    write_parquet(tmp_path / "y.parquet", pets())
    (tmp_path / "plain.flac").write_bytes(SOUND)
    paths = ["s/x.tar/a.flac", "y.parquet/2", "plain.flac", str(tmp_path / "y.parquet/0")]
    (tmp_path / "clips.csv").write_text("path\n" + "\n".join(paths) + "\n")
    table = read(tmp_path / "clips.csv")
    assert column(table, "clip_id") == [*paths[:3], "y.parquet/0"]
    assert column(table, "duration_s") == [1.0] * 4


def test_members_that_are_missing_are_named_with_their_line(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.flac": SOUND})
    write_parquet(tmp_path / "y.parquet", pets())
    paths = ["x.tar/b.flac", "y.parquet/3", "y.parquet/a", "z.tar/a.flac", "x.tar/../a.flac"]
    (tmp_path / "clips.csv").write_text("path\n" + "\n".join(paths) + "\n")
    with pytest.raises(ManifestError) as caught:
        read(tmp_path / "clips.csv")
    lines = str(caught.value).replace(f"{tmp_path}/clips.csv:", "").splitlines()
    assert lines == [
        "2:path: 'x.tar/b.flac': there is no member 'b.flac' in it",
        "3:path: 'y.parquet/3': there is no row 3: it has 3 rows",
        "4:path: 'y.parquet/a': there is no row 'a'; rows are numbered from 0, as in x.parquet/17",
        "5:path: 'z.tar/a.flac': there is no such file under the audio root "
        f"{tmp_path}; correct it or --audio-root",
        "6:path: 'x.tar/../a.flac' holds '..'; write it from the audio root down",
    ]


def test_a_container_behind_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.flac": SOUND})
    (tmp_path / "root").mkdir()
    (tmp_path / "root/x.tar").symlink_to(tmp_path / "x.tar")
    (tmp_path / "root/clips.csv").write_text("path\nx.tar/a.flac\n")
    with pytest.raises(ManifestError, match=r"x\.tar/a\.flac': this link leaves the audio root"):
        read(tmp_path / "root/clips.csv")
    with pytest.raises(ManifestError, match=r"x\.tar/a\.flac: this link leaves the audio root"):
        read(tmp_path / "root/x.tar")


def test_a_parquet_table_of_clips_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(SOUND)
    cells = {"path": ["a.flac"], "embedding": [b"\0\1"], "audio": ["a.flac"]}
    pq.write_table(pa.table(cells), tmp_path / "clips.parquet")
    assert column(read(tmp_path / "clips.parquet"), "path") == ["a.flac"]
    assert column(read(tmp_path), "path") == ["a.flac"]


MIXED: dict[str, tuple[Callable[[Path], object], str]] = {
    "files and a tar": (
        lambda folder: soundfile.write(folder / "a.wav", [0.0] * 99, RATE_HZ),
        r"holds audio files \('a\.wav'\) and containers of audio \('x\.tar'\); name one of the two",
    ),
    "tars and tables": (
        lambda folder: write_parquet(folder / "y.parquet", pets()),
        r"holds tars and tables with audio; extract one kind at a time",
    ),
}


@pytest.mark.parametrize(("write", "message"), MIXED.values(), ids=MIXED.keys())
def test_a_folder_of_two_kinds_is_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str
) -> None:
    write_tar(tmp_path / "x.tar", {"a.flac": SOUND})
    write(tmp_path)
    with pytest.raises(ManifestError, match=message):
        read(tmp_path)


def test_a_compressed_tar_beside_unpacked_audio_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(SOUND)
    (tmp_path / "set.tar.gz").write_bytes(b"\x1f\x8b")
    assert column(read(tmp_path), "path") == ["a.flac"]


def test_a_container_below_the_audio_root_gives_paths_from_the_root(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "deep/x.tar", {"a.flac": SOUND})
    assert column(read(tar, audio_root=tmp_path), "path") == ["deep/x.tar/a.flac"]


def test_predict_takes_members_containers_and_folders_of_them(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a.flac": SOUND, "b.flac": SOUND})
    members = [tar / "a.flac", tar / "b.flac"]
    assert list(recordings([tar])) == list(recordings([tmp_path])) == members
    assert list(recordings(members)) == members
    assert [window.duration_s for window in windows_of(members[1], SECOND)] == [1.0]


def test_a_bank_of_a_data_set_has_the_audio_of_plain_files(tmp_path: Path) -> None:
    sounds = [sound_bytes(seed) for seed in range(4)]
    (tmp_path / "plain").mkdir()
    for row, sound in enumerate(sounds):
        (tmp_path / f"plain/{row}.flac").write_bytes(sound)
    tar = write_tar(tmp_path / "x.tar", {f"{row}.flac": sound for row, sound in enumerate(sounds)})
    table = hub_table({"audio": audio_cells(sounds)}, {"audio": AUDIO})
    parquet = write_parquet(tmp_path / "x.parquet", table)
    arrow = write_arrow(tmp_path / "x.arrow", table)
    digests = [
        extract(source, encoder="fake", out=tmp_path / f"{name}.bank", settings=SETTINGS)
        .clips["audio_sha256"]
        .to_pylist()
        for name, source in enumerate([tmp_path / "plain", tar, parquet, arrow])
    ]
    assert digests == [digests[0]] * 4
    assert None not in digests[0]
