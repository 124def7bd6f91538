from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from patchbank.cli import bars, progress_text
from patchbank.cli.bars import Bar, phase
from patchbank.cli.main import main
from patchbank.cli.progress_text import BYTES, CLIPS, Pace, State, Unit, clock

DRAWN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]|━")
"""Control characters but the end of a line, and what bars are drawn with."""


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come at once, as of work that takes long."""
    monkeypatch.setattr(progress_text, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(bars, "TICK_S", 0.005)


def test_lines_come_after_two_seconds_then_by_time_or_by_tenths() -> None:
    def lines_at(seconds: float, share_per_s: float, tick_s: float = 0.5) -> list[float]:
        pace, ticks = Pace(), int(seconds / tick_s)
        return [
            tick * tick_s
            for tick in range(ticks + 1)
            if pace.is_due(tick * tick_s, tick * tick_s * share_per_s)
        ]

    assert lines_at(1.5, 0.5) == []
    assert lines_at(16, 1 / 16) == [2, 4, 6, 8, 10, 12, 14, 16]  # a tenth takes 1.6 s
    assert lines_at(100, 1 / 200) == [2 + 10 * n for n in range(10)]
    assert lines_at(90, 1 / 2_048) == [2, 22.5, 43, 63.5, 84]  # a hundredth takes 20.48 s
    assert lines_at(190, 0.0) == [2, 62, 122, 182]  # nothing moves, or nobody knows how much


def state(unit: Unit, steps: list[tuple[float, float]], total: float) -> State:
    found = State("work", unit, 0.0)
    for now_s, completed in steps:
        found.completed, found.total = completed, total
        found.sample(now_s)
    return found


@pytest.mark.parametrize(
    ("unit", "steps", "text"),
    [
        (CLIPS, [(5, 100)], "100/5,000 clips"),
        (CLIPS, [(5, 100), (15, 940)], "940/5,000 clips, 84 clips/s, 0:48 left"),
        (CLIPS, [(5, 100), (15, 105)], "105/5,000 clips, 0.5 clips/s, 2:43:10 left"),
        (CLIPS, [(5, 0), (50, 5_000)], "5,000/5,000 clips, 111 clips/s"),
        (BYTES, [(1, 0), (3, 2_048)], "2 KiB of 4.88 KiB, 1 KiB/s, 0:03 left"),
        (Unit("shards"), [(10, 1_000)], "1,000/5,000 shards, 0:40 left"),
    ],
)
def test_a_line_tells_amount_speed_and_time_left(
    unit: Unit, steps: list[tuple[float, float]], text: str
) -> None:
    assert state(unit, steps, 5_000).text(99.0) == text


def test_the_speed_is_that_of_the_last_five_minutes() -> None:
    slow_then_fast = [(0, 0), (300, 30), (400, 1_030), (500, 2_030)]
    assert state(CLIPS, slow_then_fast, 5_000).per_s == pytest.approx(10.0)


def test_clocks_read_like_clocks() -> None:
    assert [clock(one) for one in (0.4, 45, 723, 3_723)] == ["0:00", "0:45", "12:03", "1:02:03"]


@pytest.mark.usefixtures("eager")
def test_work_that_is_broken_off_says_how_far_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with Bar("extract") as bar:
            bar.step(30, 90, "2 failed")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert capsys.readouterr().err.splitlines()[-1] == "extract: 30/90 clips, stopped after 0:00"


def test_quick_work_of_unknown_length_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("open"):
        pass
    assert capsys.readouterr().err == ""
    assert not [one for one in threading.enumerate() if one.name == "progress"]


@pytest.mark.usefixtures("eager")
def test_slow_work_of_unknown_length_is_heard_of(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("open"):
        time.sleep(0.1)
    first, last = capsys.readouterr().err.splitlines()
    assert (first, last) == ("open: 0:00 so far", "open: done in 0:00")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from audio_sets import write_clip_set

    folder = tmp_path_factory.mktemp("job")
    write_clip_set(folder / "set", n_clips=24)
    assert main(extract_line(folder, "fake")) == 0
    return folder


def extract_line(folder: Path, name: str) -> list[str]:
    line = ["extract", str(folder / "set/clips.csv"), "--encoder", "fake", "--window-s", "1"]
    return [*line, "--out", str(folder / f"{name}.bank")]


def lines_of(job: Path, out: Path) -> dict[str, list[str]]:
    """A command line for everything that may take long."""
    bank, labels = str(job / "fake.bank"), str(job / "set/labels.csv")
    quick = ["--probe", "linear", "--epochs", "3", "--seeds", "1", "--sweep", "2"]
    return {
        "extract": [*extract_line(job, "fake")[:-1], str(out / "again.bank")],
        "measure": [*extract_line(job, "measured"), "--dry-run", "--measure"],
        "verify": ["bank", "verify", bank],
        "convert": ["bank", "convert", bank, "--dtype", "int8", "--out", str(out / "small.bank")],
        "archive": ["bank", "convert", bank, "--archive", "--out", str(out / "cold.bank")],
        "train": ["train-probe", bank, "--labels", labels, "--out", str(out / "run"), *quick],
        "check": ["check", "fake"],
        "check-probe": ["check", "linear"],
        "show": ["bank", "show", bank],
    }


LAST = {
    "extract": "extract: 24/24 clips in 0:0",
    "measure": "measure: ",
    "verify": "verify: ",
    "convert": "convert: ",
    "archive": "convert: ",
    "train": "final: 3/3 epochs in 0:0",
    "check": "check: 18/18 checks in 0:0",
    "check-probe": "check: ",
    "show": "read: done in 0:0",
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", LAST)
def test_piped_progress_is_plain_lines_and_the_last_one_says_the_end(
    name: str, job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    status = main(lines_of(job, tmp_path)[name])
    said = capsys.readouterr().err
    assert status == 0 or "too few to measure with" in said, said
    assert not DRAWN.search(said)
    assert max(map(len, said.splitlines())) <= 80
    title = LAST[name].split(":")[0]
    told = [line for line in said.splitlines() if line.startswith(f"{title}: ")]
    assert told[-1].startswith(LAST[name])
    assert re.search(r"(in|after) \d+:\d\d$", told[-1])


def test_a_terminal_sees_a_bar(job: Path, tmp_path: Path) -> None:
    line = [*extract_line(job, "fake")[:-1], str(tmp_path / "drawn.bank")]
    ours, theirs = pty.openpty()
    code = "import sys; from patchbank.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.Popen(
        [sys.executable, "-c", code, *line],
        stderr=theirs,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            part = os.read(ours, 4_096)
        except OSError:  # Linux ends a terminal whose other side is closed so
            break
        if not part:
            break
        drawn += part
    os.close(ours)
    said = done.communicate()[0].decode()
    assert done.returncode == 0
    assert said.startswith(f"{tmp_path / 'drawn.bank'}: 24 clips")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.decode())
    assert "━" in text
    assert re.search(r"extract ━+ 24/24 clips in 0:\d\d", text)


def test_a_terminal_that_cannot_draw_gets_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setenv("TERM", "xterm")
        assert bars.is_terminal(stream)
        monkeypatch.setenv("TERM", "dumb")
        assert not bars.is_terminal(stream)
    os.close(ours)
    with (tmp_path / "log").open("w") as file:
        assert not bars.is_terminal(file)
