"""Where the time of an extraction went, and what is to fix next."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_bank import N_CLIPS, SETTINGS
from typer.testing import CliRunner

from patchbank.cli.main import app
from patchbank.pipeline.encoders.fake import FakeEncoder
from patchbank.pipeline.extraction import Progress, extract
from patchbank.pipeline.job import ShardReport
from patchbank.pipeline.profile import profile_of
from patchbank.pipeline.stages import (
    COPIES,
    DECODE,
    DECODERS,
    ENCODER,
    FRONT_END,
    HASH,
    LANES,
    STAGES,
    WRITE,
    WRITERS,
    StageClock,
    StageTimes,
)

THREADS = {DECODERS: 2, LANES: 1, COPIES: 2, WRITERS: 4}


def report(busy_s: dict[str, float], *, began_s: float, ended_s: float) -> ShardReport:
    return ShardReport(0, 10, 2, times=StageTimes(busy_s, began_s, ended_s, THREADS, 1000))


def test_shares_are_of_the_time_that_threads_had() -> None:
    busy_s = {DECODE: 4.0, FRONT_END: 2.0, ENCODER: 7.0, HASH: 1.0, WRITE: 3.0}
    profile = profile_of(
        [
            report(busy_s, began_s=100.0, ended_s=104.0),
            report({ENCODER: 2.5}, began_s=104.0, ended_s=110.0),
        ]
    )
    shares = {stage.stage: stage.share for stage in profile.stages}
    # 10 s: 20 of two decoders, 10 of a lane, 40 of four writers.
    assert shares == {DECODE: 0.2, FRONT_END: 0.2, ENCODER: 0.95, HASH: 0.025, WRITE: 0.075}
    assert (profile.n_clips, profile.elapsed_s) == (24, 10.0)
    assert profile.idle == pytest.approx({DECODERS: 0.8, LANES: 0.0, WRITERS: 0.9})
    assert profile.fix_next is not None
    assert profile.fix_next.stage == ENCODER
    alone = {stage.stage: stage.clips_per_s for stage in profile.stages}
    assert alone[DECODE] == pytest.approx(24 * 2 / 4.0)
    assert alone[ENCODER] == pytest.approx(24 / 9.5)


def test_several_workers_have_their_threads_together() -> None:
    profile = profile_of(
        [
            report({DECODE: 18.0, ENCODER: 2.0}, began_s=0.0, ended_s=10.0),
            report({DECODE: 20.0, ENCODER: 1.0}, began_s=0.0, ended_s=10.0),
        ]
    )
    decode = profile.stages[0]
    assert (decode.n_threads, decode.share) == (4.0, 0.95)
    assert profile.fix_next == decode
    assert "--decode-in processes" in profile.advice


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (DECODE, "more cores"),
        ("resample", "at the encoder's rate"),
        (FRONT_END, "--devices all"),
        ("quantise", "--dtype float16"),
        ("copy", "fewer --layers"),
        (HASH, "more cores, or a smaller --dtype"),
        (WRITE, "a faster disk"),
    ],
)
def test_the_advice_fits_the_stage(stage: str, words: str) -> None:
    busy_s = {stage: 9.0 * THREADS[STAGES[stage]], ENCODER: 1.0 if STAGES[stage] != LANES else 0.5}
    profile = profile_of([report(busy_s, began_s=0.0, ended_s=10.0)])
    assert profile.advice.startswith(f"{stage} ")
    assert words in profile.advice


def test_a_run_that_mostly_waited_has_nothing_to_fix() -> None:
    profile = profile_of([report({DECODE: 0.2, ENCODER: 1.0}, began_s=0.0, ended_s=10.0)])
    assert profile.fix_next is None
    assert profile.advice.startswith("nothing")
    assert profile_of([]).lines() == ["no profile: nothing was encoded by this run"]


def test_the_table_fits_a_terminal() -> None:
    busy_s = dict.fromkeys(STAGES, 12_345.0)
    lines = profile_of([report(busy_s, began_s=0.0, ended_s=100_000.0)]).lines()
    assert max(len(line) for line in lines[:-1]) <= 80
    assert len(lines) == len(STAGES) + 4


def test_a_clock_is_read_once() -> None:
    clock = StageClock()
    with clock.measure(DECODE):
        time.sleep(0.02)
    clock.add(ENCODER, 1.0)
    first = clock.taken()
    assert first[ENCODER] == 1.0
    assert 0.02 <= first[DECODE] < 10
    assert clock.taken() == {}


def test_a_slow_encoder_is_what_to_fix(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = FakeEncoder.encode

    def slow(self: FakeEncoder, *arguments: Any) -> object:
        time.sleep(0.1)
        return encode(self, *arguments)

    monkeypatch.setattr(FakeEncoder, "encode", slow)
    reports: list[ShardReport] = []

    def note(state: Progress) -> None:
        if state.report is not None:
            reports.append(state.report)

    settings = replace(SETTINGS, n_threads=1)
    extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings, progress=note)
    profile = profile_of(reports)
    assert profile.n_clips == N_CLIPS
    assert profile.fix_next is not None
    assert profile.fix_next.stage == ENCODER
    found = {stage.stage: stage.busy_s for stage in profile.stages}
    assert found[ENCODER] >= 0.1 * N_CLIPS / 4
    assert all(found[stage] > 0 for stage in (DECODE, FRONT_END, HASH, WRITE))
    assert profile.peak_bytes > 50e6


def test_the_command_prints_and_leaves_the_profile(clip_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.bank"
    line = ["extract", str(clip_table), "--encoder", "fake", "--window-s", "1", "--out", str(out)]
    result = CliRunner().invoke(app, [*line, "--profile", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["profile"]
    assert told == json.loads((out / "notes/profile.json").read_text())
    assert told["n_clips"] == N_CLIPS
    assert set(told["stages"]) <= set(STAGES)
    again = CliRunner().invoke(app, [*line, "--profile"])
    assert again.exit_code == 0, again.output
    assert "nothing was encoded by this run" in again.stdout
    assert told == json.loads((out / "notes/profile.json").read_text())
