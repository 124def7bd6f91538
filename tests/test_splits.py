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
    clips = clip_table(6, clip_id=[*"aabbcc"], split=names, view=[0, 1] * 3)
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


CROSSING = {
    "sources in other parts": ("a,train\nb,test\nc,valid\nd,train\n", [2, 4]),
    "an own clip in another part": ("a,test\nb,train\nc,valid\nd,train\n", [4]),
    "a source in no part": ("a,train\nc,valid\nd,train\n", []),
    "a source that tests": ("a,train\nb,valid\nc,test\nd,train\n", [2, 4]),
    "none": ("a,train\nb,train\nc,train\nd,train\n", []),
}
"""A table of splits, and which of the views of its training clips must not train."""


@pytest.mark.parametrize(("text", "left_out"), CROSSING.values(), ids=CROSSING)
def test_a_view_never_carries_a_validation_or_test_clip_into_training(
    text: str, left_out: list[int], tmp_path: Path
) -> None:
    views = [("a", []), ("a", ["d"]), ("a", ["d", "b"]), ("d", []), ("b", ["c"])]
    rows = [*views, *((name, []) for name in "abcdef")]
    clips = clip_table(
        len(rows),
        clip_id=[name for name, _ in rows],
        path=[f"{name}.wav" for name, _ in rows],
        view=[1, 2, 3, 1, 1, 0, 0, 0, 0, 0, 0],
        mix_sources=[mixed for _, mixed in rows],
    )
    path = write(tmp_path, "clip_id,split\n" + text + "e,valid\nf,test\n")
    [split] = read_splits(clips, usable=all_usable(clips), splits_path=path)
    part_of = dict(line.split(",") for line in path.read_text().split())
    trained = [row for row in range(len(views)) if row in split.train]
    assert trained == [
        row
        for row, (name, _) in enumerate(views)
        if row not in left_out and part_of.get(name) == "train"
    ]
    heard = {name for row in split.train for name in (rows[row][0], *rows[row][1])}
    tested = {rows[row][0] for row in (*split.valid, *split.test)}
    assert not heard & tested
    assert split.n_views == sum(part_of.get(name) == "train" for name, _ in views)
    assert split.n_views_left_out == split.n_views - len(trained)


def test_a_view_whose_table_row_trains_but_whose_clip_tests_is_left_out(tmp_path: Path) -> None:
    clips = clip_table(
        4,
        clip_id=["a", "b", "c", "a"],
        path=["r0.wav", "r3.wav", "r2.wav", "r1.wav"],
        view=[0, 0, 0, 1],
    )
    path = write(tmp_path, "path,split\nr0.wav,test\nr1.wav,train\nr2.wav,valid\nr3.wav,train\n")
    [split] = read_splits(clips, usable=all_usable(clips), splits_path=path)
    assert parts(split) == {"train": [1], "valid": [2], "test": [0]}
    assert (split.n_views, split.n_views_left_out) == (1, 1)


def test_by_folds_of_another_column_only_crossing_views_are_left_out() -> None:
    clips = clip_table(
        8,
        clip_id=[*"abcdef", "a", "a"],
        site=[*"xxyyzz", "x", "x"],
        view=[0] * 6 + [1, 2],
        mix_sources=[[]] * 6 + [["b"], ["c"]],
    )
    splits = read_splits(clips, usable=all_usable(clips), folds="site")
    trained = {split.name: sorted({6, 7} & set(split.train)) for split in splits}
    assert trained == {"site=x": [], "site=y": [6], "site=z": []}
    assert [split.n_views_left_out for split in splits] == [0, 1, 0]


def test_the_sound_of_a_clip_that_is_not_in_the_bank_is_trusted_in_no_split() -> None:
    clips = clip_table(
        4,
        clip_id=["a", "b", "c", "a"],
        split=["train", "valid", "test", "train"],
        view=[0, 0, 0, 1],
        mix_sources=[[], [], [], ["gone"]],
    )
    [split] = read_splits(clips, usable=all_usable(clips))
    assert parts(split)["train"] == [0]
