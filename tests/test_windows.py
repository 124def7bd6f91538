"""Cutting segments into clips and naming them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.manifest.windows import Segments, cut
from patchbank.pipeline.specs import WindowSpec

SECONDS = st.floats(0.0, 100.0)


@given(
    lengths_s=st.lists(SECONDS, min_size=1, max_size=5),
    start_s=SECONDS,
    window_s=st.floats(0.1, 20.0),
    hop_s=st.floats(0.1, 20.0),
    named=st.booleans(),
)
def test_windows_of_recordings_have_unique_names_and_cover_no_more_than_they_hold(
    lengths_s: list[float], start_s: float, window_s: float, hop_s: float, named: bool
) -> None:
    paths = [f"{index}.wav" for index in range(len(lengths_s))]
    names = [path.upper() if named else None for path in paths]
    segments = Segments(paths, names, [start_s] * len(paths), lengths_s)
    cuts = cut(segments, WindowSpec(window_s, hop_s))
    assert len(set(cuts.clip_ids)) == len(cuts.clip_ids)
    assert sorted(cuts.segments) == list(cuts.segments)
    assert set(cuts.segments) == set(range(len(paths)))
    for segment, clip_start_s, covered_s in zip(
        cuts.segments, cuts.starts_s, cuts.durations_s, strict=True
    ):
        assert 0.0 <= covered_s <= window_s + 1e-9
        assert clip_start_s + covered_s <= start_s + lengths_s[segment] + 1e-6


def test_no_window_starts_where_its_segment_has_ended() -> None:
    cuts = cut(Segments(["a.wav"], [None], [0.0], [1.75]), WindowSpec(window_s=0.25, hop_s=1.0))
    assert cuts.clip_ids == ["a.wav@0", "a.wav@1000"]


def test_a_segment_of_no_length_keeps_one_window() -> None:
    cuts = cut(Segments(["a.wav"], [None], [3.0], [0.0]), WindowSpec())
    assert (cuts.clip_ids, cuts.starts_s, cuts.durations_s) == (["a.wav"], [3.0], [0.0])


def test_starts_lose_the_noise_of_binary_sums() -> None:
    cuts = cut(Segments(["a.wav"], [None], [0.1], [0.6]), WindowSpec(window_s=0.2, hop_s=0.2))
    assert cuts.starts_s == [0.1, 0.3, 0.5]


@pytest.mark.parametrize(
    ("window_s", "hop_s", "words"),
    [
        (float("nan"), 1.0, "window_s must be above 0"),
        (float("inf"), 1.0, "window_s must be above 0 and at most 3600 seconds, found inf"),
        (1e7, 1.0, "at most 3600"),
        (1.0, float("nan"), "hop_s must be above 0"),
        (1.0, 0.0, "hop_s must be above 0"),
    ],
)
def test_windows_that_are_no_windows_are_refused(window_s: float, hop_s: float, words: str) -> None:
    with pytest.raises(PatchbankError, match=words):
        WindowSpec(window_s, hop_s)
