"""Splits whose parts share recordings, groups or sounds are refused, and counted on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from needle_sets import clip_table

from patchbank.pipeline.errors import TrialError
from patchbank.probing.groups import read_groups
from patchbank.probing.leakage import check_leakage
from patchbank.probing.splits import Split


def split_of(parts: Sequence[str], *, name: str = "split") -> Split:
    rows = {part: np.flatnonzero(np.array(parts) == part) for part in ("train", "valid", "test")}
    return Split(name, **rows)


def check(parts: Sequence[str], *, by: str | None = None, **columns: Any) -> dict[str, Any]:
    clips = clip_table(len(parts), **columns)
    return check_leakage(clips, [split_of(parts)], read_groups(clips, by), allow=True)


def refusal(clips: pa.Table, *splits: Split, group: str | None = None) -> str:
    with pytest.raises(TrialError) as caught:
        check_leakage(clips, splits, read_groups(clips, group))
    return str(caught.value)


HONEST = ["train", "train", "valid", "valid", "test", "test"]


def test_whole_recordings_in_each_part_leak_nothing() -> None:
    assert check(HONEST) == {"path": 0, "audio_sha256": None}
    digests = [f"{row}" for row in range(6)]
    found = check(HONEST, by="site", site=list("aabbcc"), audio_sha256=digests)
    assert found == {"site": 0, "path": 0, "audio_sha256": 0}


def test_a_cut_recording_is_named_with_its_parts_and_the_way_to_insist() -> None:
    said = refusal(clip_table(6), split_of(["train", "test", "valid", "train", "test", "test"]))
    assert "  2 by path: 'r0.wav' in train and test, 'r1.wav' in train and valid\n" in said
    assert "expected each in one of them" in said
    assert "--allow-leakage, which results.json records" in said


def test_three_examples_stand_for_many() -> None:
    said = refusal(clip_table(12), split_of(["train", "test"] * 5 + ["valid", "valid"]))
    assert "5 by path: 'r0.wav' in" in said
    assert "'r2.wav' in train and test, and 2 more" in said


def test_a_group_in_three_parts_leaks_though_recordings_do_not() -> None:
    sites = ["north", "north", "north", None, "north", "south"]
    clips = clip_table(6, recording=sites)
    said = refusal(clips, split_of(HONEST))
    assert "  1 by recording: 'north' in train, valid and test" in said
    assert "by path" not in said


@pytest.mark.parametrize("group", [None, "site", "path", "group"])
def test_a_cut_recording_leaks_whichever_column_is_drawn_by(group: str | None) -> None:
    columns = {
        "group": list("aabbcc"),
        "site": list("112233"),
        "recording": ["x", "", "", "x", "y", "y"],
    }
    said = refusal(clip_table(6, **columns), split_of(HONEST), group=group)
    assert "  1 by recording: 'x' in train and valid\n" in said
    assert said.count(" by ") == 1
    found = check(HONEST, by=group, **columns)
    chosen = {"site": 0} if group == "site" else {}
    assert found == {"group": 0, "recording": 1, "path": 0, "audio_sha256": None} | chosen


def test_the_same_sound_under_two_names_leaks_but_not_as_a_view() -> None:
    digests = ["x", "y", "z", "x", "v", "w"]
    said = refusal(clip_table(6, audio_sha256=digests), split_of(HONEST))
    assert "  1 by audio_sha256: 'r0/0' = 'r1/1' in train and valid" in said
    found = check(HONEST, audio_sha256=digests, view=[1, 0, 0, 0, 0, 0])
    assert found["audio_sha256"] == 0


def test_a_clip_of_no_part_takes_part_where_it_is_mixed_into_a_view_that_trains() -> None:
    parts, view = ["train", "train", "valid", "valid", "test", ""], [0, 1, 0, 0, 0, 0]
    assert check(parts, view=view)["path"] == 0
    mixes = [None, ["r2/1"], None, None, None, None]
    said = refusal(clip_table(6, view=view, mix_sources=mixes), split_of(parts))
    assert "  1 by path: 'r2.wav' in train and test" in said


def test_rows_that_take_no_part_leak_nothing() -> None:
    assert check(["train", "", "valid", "valid", "", "test"])["path"] == 0


def test_a_clip_without_digest_is_like_no_other() -> None:
    found = check(HONEST, audio_sha256=[None] * 6)
    assert found["audio_sha256"] == 0


def test_folds_that_cut_a_recording_count_it_once_and_name_a_fold() -> None:
    clips = clip_table(6)
    parts = ["train", "valid", "test"]
    splits = [
        split_of([parts[(row + fold) % 3] for row in range(6)], name=f"fold={fold}")
        for fold in range(3)
    ]
    said = refusal(clips, *splits)
    assert "3 by path: 'r0.wav' in train and valid of fold=0" in said


def test_groups_are_by_the_most_telling_column_and_a_row_without_one_by_its_recording() -> None:
    names = {"group": list("aabb"), "recording": ["x", "", None, "y"]}
    assert read_groups(clip_table(4, **names)).column == "group"
    by_recording = read_groups(clip_table(4, recording=names["recording"]))
    assert by_recording.names == ("x", "path=r0.wav", "path=r1.wav", "y")
    assert read_groups(clip_table(4)).names == ("r0.wav", "r0.wav", "r1.wav", "r1.wav")
    assert read_groups(clip_table(4, **names), "start_s").names == ("0.0", "10.0", "0.0", "10.0")


def test_an_unknown_column_is_refused_with_those_there_are() -> None:
    with pytest.raises(TrialError, match=r"no column .site. .* --group; it has clip_id"):
        read_groups(clip_table(2), "site")
