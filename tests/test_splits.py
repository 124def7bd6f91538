from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from needle_sets import clip_table

from patchbank.pipeline.errors import ManifestError, TrialError
from patchbank.probing.splits import Split, read_splits


def all_usable(clips: pa.Table) -> np.ndarray:
    return np.ones(clips.num_rows, dtype=bool)


def parts(split: Split) -> dict[str, list[int]]:
    return {name: getattr(split, name).tolist() for name in ("train", "valid", "test")}


def write(folder: Path, text: str) -> Path:
    path = folder / "SPLITS.csv"
    path.write_text(text)
    return path


def test_the_banks_split_column_splits() -> None:
    clips = clip_table(5, split=["train", "test", None, "valid", "train"])
    [split] = read_splits(clips, usable=all_usable(clips))
    assert parts(split) == {"train": [0, 4], "valid": [3], "test": [1]}


def test_failed_and_unlabelled_rows_take_no_part() -> None:
    names = ["train", "train", "train", "valid", "test"]
    clips = clip_table(5, split=names, status=[1, 2, 1, 1, 1])
    usable = np.array([True, True, False, True, True])
    [split] = read_splits(clips, usable=usable)
    assert parts(split) == {"train": [0], "valid": [3], "test": [4]}


def test_augmented_views_only_train() -> None:
    names = ["train", "train", "valid", "valid", "test", "test"]
    clips = clip_table(6, split=names, view=[0, 1] * 3)
    [split] = read_splits(clips, usable=all_usable(clips))
    assert parts(split) == {"train": [0, 1], "valid": [2], "test": [4]}


@pytest.mark.parametrize("key", ["clip_id", "path"])
def test_a_table_overrides_the_banks_column(tmp_path: Path, key: str) -> None:
    clips = clip_table(6, split=["test"] * 6)
    keys = {"clip_id": ["r0/0", "r1/0", "r2/0"], "path": ["r0.wav", "r1.wav", "r2.wav"]}[key]
    rows = "".join(f"{k},{s}\n" for k, s in zip(keys, ["train", "valid", "test"], strict=True))
    path = write(tmp_path, f"{key},split\n" + rows)
    [split] = read_splits(clips, usable=all_usable(clips), splits_path=path)
    step = [0] if key == "clip_id" else [0, 1]
    assert parts(split) == {
        "train": step,
        "valid": [row + 2 for row in step],
        "test": [row + 4 for row in step],
    }


@pytest.mark.parametrize("names", [[1, 2, 10], ["f1", "f2", "f10"]], ids=["integers", "strings"])
def test_folds_test_in_natural_order_and_select_on_the_next(names: list[int] | list[str]) -> None:
    clips = clip_table(6, fold=[names[2], names[0], names[1]] * 2)
    splits = read_splits(clips, usable=all_usable(clips), folds="fold")
    assert [split.name for split in splits] == [f"fold={name}" for name in names]
    assert [parts(split) for split in splits] == [
        {"train": [0, 3], "valid": [2, 5], "test": [1, 4]},
        {"train": [1, 4], "valid": [0, 3], "test": [2, 5]},
        {"train": [2, 5], "valid": [1, 4], "test": [0, 3]},
    ]


def test_any_column_may_hold_the_folds() -> None:
    clips = clip_table(4, site=["a", "b", "c", None])
    splits = read_splits(clips, usable=all_usable(clips), folds="site")
    assert parts(splits[0]) == {"train": [2], "valid": [1], "test": [0]}


REFUSED = {
    "nothing": ({}, {}, r"found no split column in the bank.* pass --splits .* or --folds COLUMN"),
    "both": ({}, {"splits_path": Path("x"), "folds": "fold"}, "found both --splits and --folds"),
    "empty valid": (
        {"split": ["train", "train", "test"]},
        {},
        r"found no usable clips in valid \(train 2, valid 0, test 1\) by the bank's split column, "
        "expected .*; pass --splits SPLITS.csv or --folds COLUMN",
    ),
    "empty two": ({"split": ["train"] * 3}, {}, "found no usable clips in valid and test"),
    "unknown name": (
        {"split": ["train", "dev", "test"]},
        {},
        "found split 'dev' in the bank, expected train, valid or test; pass --splits",
    ),
    "no such column": ({}, {"folds": "fold"}, "found no column 'fold' in the bank for --folds"),
    "two folds": (
        {"fold": [1, 2, 2]},
        {"folds": "fold"},
        "found 2 folds in column 'fold', expected at least 3",
    ),
}


@pytest.mark.parametrize(("columns", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_splits_that_cannot_work_say_what_to_pass(
    columns: dict[str, list[object]], arguments: dict[str, object], message: str
) -> None:
    clips = clip_table(3, **columns)
    with pytest.raises(TrialError, match=message):
        read_splits(clips, usable=all_usable(clips), **arguments)


PROBLEMS = {
    "unknown split": (
        "clip_id,split\nr0/0,trian\n",
        "SPLITS.csv:2:split: found 'trian', expected train, valid or test; did you mean 'train'?",
    ),
    "unknown clip": (
        "clip_id,split\nr7/0,train\n",
        "SPLITS.csv:2:clip_id: no clip of the bank has clip_id 'r7/0', expected one like 'r0/0'",
    ),
    "conflict": (
        "path,split\nr0.wav,train\nr0.wav,test\n",
        "SPLITS.csv:3:split: 'r0.wav' is in another split on line 2",
    ),
    "no split column": (
        "clip_id,set\nr0/0,train\n",
        "SPLITS.csv:1:split: no such column (train, valid or test); found columns clip_id, set",
    ),
    "no key": (
        "file,split\nr0.wav,train\n",
        "SPLITS.csv:1:path: no such column (clip_id or path: which clip); "
        "found columns file, split",
    ),
}


@pytest.mark.parametrize(("text", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_wrong_split_table_says_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    clips = clip_table(3)
    path = write(tmp_path, text)
    with pytest.raises(ManifestError) as caught:
        read_splits(clips, usable=all_usable(clips), splits_path=path)
    assert message in str(caught.value).replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (
            "clip_id,split\na,train\nb,test\nc,valid\n",
            "a trains and holds the sound of b",
        ),
        ("path,split\nr0.wav,test\nr1.wav,train\nr2.wav,valid\n", "view 1 of a trains and holds"),
    ],
)
def test_a_view_never_carries_test_audio_into_training(
    splits: str, words: str, tmp_path: Path
) -> None:
    clips = clip_table(
        4,
        clip_id=["a", "b", "c", "a"],
        path=["r0.wav", "r0.wav", "r2.wav", "r1.wav"],
        view=[0, 0, 0, 1],
        mix_sources=[[], [], [], ["b"]],
    )
    (tmp_path / "s.csv").write_text(splits)
    with pytest.raises(TrialError, match=words):
        read_splits(clips, usable=np.ones(4, bool), splits_path=tmp_path / "s.csv")
