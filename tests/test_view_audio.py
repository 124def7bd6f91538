"""The sound of a view: what is mixed at which level, turned how far and how loud."""

from __future__ import annotations

import numpy as np
import pytest

from patchbank.pipeline.audio import DecodedClip
from patchbank.pipeline.draws import Draw
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.view_audio import made_view, mix_gains

N = 4_000


def noise(seed: int, *, scale: float = 0.1, n_audio: int = N) -> DecodedClip:
    waveform = np.zeros(N, np.float32)
    values = np.random.default_rng(seed).standard_normal(n_audio)
    waveform[:n_audio] = (scale * values).astype(np.float32)
    return DecodedClip(waveform, f"{seed}", n_audio)


def rms_db(waveform: np.ndarray) -> float:
    return float(20 * np.log10(np.linalg.norm(waveform.astype(np.float64)) / np.sqrt(N)))


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 2.0, 30.0])
def test_a_source_lies_as_far_below_its_clip_as_drawn(snr_db: float) -> None:
    clip, source = noise(1, scale=0.02), noise(2, scale=0.7, n_audio=1_000)
    view = made_view(clip, [source], Draw(("s",), (snr_db,)))
    added = view.waveform.astype(np.float64) - clip.waveform
    assert rms_db(clip.waveform) - rms_db(added) == pytest.approx(snr_db, abs=1e-3)
    assert np.corrcoef(added, source.waveform)[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_each_source_is_measured_against_the_clip_alone() -> None:
    clip, sources = noise(1), [noise(seed, scale=seed / 10) for seed in (2, 3, 4)]
    waveforms = [source.waveform for source in sources]
    gains = mix_gains(clip.waveform, waveforms, (3.0, 10.0, 20.0))
    levels = [rms_db(gain * one) for gain, one in zip(gains, waveforms, strict=True)]
    expected = [rms_db(clip.waveform) - snr for snr in (3.0, 10.0, 20.0)]
    np.testing.assert_allclose(levels, expected, atol=1e-4)


def test_silence_has_no_level() -> None:
    clip, silent = noise(1), DecodedClip(np.zeros(N, np.float32), "0", N)
    draw = Draw(("a", "b"), (5.0, 5.0))
    view = made_view(clip, [silent, noise(2)], draw)
    assert view.mix_gains[0] == 0.0
    assert view.mix_gains[1] > 0
    view = made_view(silent, [noise(2), silent], draw)
    assert view.mix_gains == (1.0, 0.0)
    np.testing.assert_array_equal(view.waveform, noise(2).waveform)
    assert not made_view(silent, [silent], Draw(("a",), (5.0,))).waveform.any()


def test_nearly_silent_sources_do_not_overflow() -> None:
    faint = DecodedClip(np.full(N, 1e-42, np.float32), "faint", N)
    view = made_view(noise(1), [faint], Draw(("a",), (2.0,)))
    assert np.isfinite(view.waveform).all()
    assert view.mix_gains[0] > 1e38


def test_a_shift_turns_the_mix_and_a_gain_scales_it_without_clipping() -> None:
    clip, source = noise(1, scale=0.5), noise(2, scale=0.5)
    plain = made_view(clip, [source], Draw(("a",), (2.0,))).waveform
    for shift in (0, 1, -3, 1_000, N - 1):
        view = made_view(clip, [source], Draw(("a",), (2.0,), shift, 20.0)).waveform
        assert view.dtype == np.float32
        assert np.abs(view).max() > 1
        np.testing.assert_allclose(view[shift % N :], 10 * plain[: N - shift % N], rtol=1e-6)
        np.testing.assert_allclose(view[: shift % N], 10 * plain[N - shift % N :], rtol=1e-6)


def test_a_view_by_which_nothing_was_drawn_is_the_clip() -> None:
    np.testing.assert_array_equal(made_view(noise(1), [], Draw()).waveform, noise(1).waveform)


def test_samples_beyond_float32_fail_and_are_not_clipped() -> None:
    loud = DecodedClip(np.full(N, 3e38, np.float32), "loud", N)
    with pytest.raises(AudioError, match="beyond the range of float32"):
        made_view(loud, [], Draw(gain_db=6.0))


@pytest.mark.parametrize(
    ("clip", "sources", "shift", "expected"),
    [
        pytest.param(1_000, [], 0, 1_000, id="as it was"),
        pytest.param(1_000, [3_000, 500], 0, 3_000, id="the longest part"),
        pytest.param(1_000, [], 500, 1_500, id="moved"),
        pytest.param(1_000, [], N - 10, N, id="over the edge"),
        pytest.param(1_000, [], -10, N, id="to the other side"),
    ],
)
def test_the_audio_of_a_view_ends_where_its_longest_part_does(
    clip: int, sources: list[int], shift: int, expected: int
) -> None:
    parts = [noise(seed, n_audio=n) for seed, n in enumerate(sources, 2)]
    names, levels = tuple("ab"[: len(parts)]), (5.0,) * len(parts)
    view = made_view(noise(1, n_audio=clip), parts, Draw(names, levels, shift))
    assert view.n_audio_samples == expected
    assert not view.waveform[expected:].any()


def test_the_digest_tells_all_that_a_view_is_made_of() -> None:
    clip, one, two = noise(1), noise(2), noise(3)
    views = [
        made_view(clip, [], Draw()),
        made_view(clip, [one], Draw(("a",), (5.0,))),
        made_view(clip, [two], Draw(("a",), (5.0,))),
        made_view(clip, [one], Draw(("a",), (6.0,))),
        made_view(one, [clip], Draw(("a",), (5.0,))),
        made_view(clip, [one], Draw(("a",), (5.0,), 1)),
        made_view(clip, [one], Draw(("a",), (5.0,), 0, 1.0)),
    ]
    assert len({view.audio_sha256 for view in views}) == len(views)
