"""Two runs on one bank at once, and runs that sleep while others work."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from crash_banks import (
    LONG,
    N_CLIPS,
    OTHER,
    SHORT,
    Undisturbed,
    check_after_a_kill,
    check_finished,
    committed_files,
    make_undisturbed,
    n_committed,
    shards_begun,
)
from killable import Moment, Run

from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.bank.commit import commit, open_attempt
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.cluster import SHARDS_PER_WORKER


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    yield from make_undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("table", [SHORT, LONG])
def test_two_runs_on_one_bank_share_the_work_and_end_with_one_seal(
    table: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = tmp_path / "x.bank"
    if table == LONG:
        shutil.copytree(undisturbed.short_bank, bank)
    n_shards = (N_CLIPS[LONG] - N_CLIPS[SHORT] if table == LONG else N_CLIPS[SHORT]) // 16

    def start(moment: str) -> Run:
        at = Moment(moment, stops=True)
        run = undisturbed.forks.start(undisturbed.table(table), bank, lists_changes=True, at=at)
        run.wait_until_stopped()
        return run

    # The first sleeps where it writes a shard, or two. The second does the others, and those last.
    first = start(r"^os\.mkdir \S*/\.work/0\w+\.\w+/layers")
    held = set(re.findall(r"/\.work/(0\w+)\.\w+/layers", first.text()))
    assert 1 <= len(held) <= SHARDS_PER_WORKER
    second = start(rf"^os\.mkdir \S*/\.work/({'|'.join(held)})\.\w+$")
    folder = bank / ".work/next" if table == LONG else bank
    assert n_committed(folder) >= n_shards - SHARDS_PER_WORKER
    for run in (first, second):
        run.go_on()
    assert [first.wait(), second.wait()] == [0, 0], [first.text(), second.text()]
    check_finished(bank, undisturbed.long if table == LONG else undisturbed.short)
    by_first, by_second = shards_begun(first.text()), shards_begun(second.text())
    assert len(by_first) <= SHARDS_PER_WORKER
    assert len(by_second) == len(set(by_second)) <= n_shards
    assert len({*by_first, *by_second}) == n_shards


SLEEPS = {
    "before the skeleton": r"^os\.rename \S* -> \S*x\.bank$",
    "before the golden clip": r"^os\.mkdir \S*/\.work/golden",
    "before its first shard": r"^os\.mkdir \S*/\.work/0",
    "before its attempt is locked": r"^open \S*/\.work/0\S*/lock",
    "before its files are made": r"^os\.mkdir \S*/\.work/0\w*\.\w*/layers",
    "before its part is written": r"^open \S*/\.work/0\S*/parts/",
    "before its commit is drafted": r"^open \S*/\.work/0\S*/commit\.json",
    "before its commit": r"^os\.link \S*/\.work/0",
    "after its commit": r"^os\.rename \S*/\.work/0",
    "in the middle of its moves": r"^os\.rename \S*/\.work/0\S*prefix",
    "before it owns the bank": r"^open \S*x\.bank/\.work/seal\.lock",
}


QUICK = ("before its first shard", "before its commit is drafted", "after its commit")


def quick(moments: Iterable[str]) -> list[object]:
    """Parameters, of which only some are tested every time."""
    return [
        pytest.param(moment, marks=() if moment in QUICK else pytest.mark.slow)
        for moment in moments
    ]


@pytest.mark.parametrize("moment", quick(SLEEPS))
def test_a_run_that_slept_while_another_finished_ends_well(
    moment: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank, table = tmp_path / "x.bank", undisturbed.table(SHORT)
    at = Moment(SLEEPS[moment], stops=True)
    sleeper = undisturbed.forks.start(table, bank, at=at)
    sleeper.wait_until_stopped()
    undisturbed.forks.finish(table, bank)
    assert (bank / "seal.json").read_bytes() == undisturbed.short
    assert verify_bank(bank) == ()
    sleeper.go_on()
    assert sleeper.wait() == 0, sleeper.text()
    check_finished(bank, undisturbed.short)


GROWTH_SLEEPS = {
    "before it owns the bank": r"^os\.mkdir \S*x\.bank/\.work$",
    "before its first shard": r"^os\.mkdir \S*/next/\.work/0",
    "before its part is written": r"^open \S*/\.work/0\S*/parts/",
    "before its commit is drafted": r"^open \S*/\.work/0\S*/commit\.json",
    "before its commit": r"^os\.link \S*/next/\.work/0",
    "after its commit": r"^os\.rename \S*/next/\.work/0",
}


@pytest.mark.parametrize("moment", quick(GROWTH_SLEEPS))
def test_a_growth_that_slept_while_another_finished_ends_well(
    moment: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    at = Moment(GROWTH_SLEEPS[moment], stops=True)
    sleeper = undisturbed.forks.start(undisturbed.table(LONG), bank, at=at)
    sleeper.wait_until_stopped()
    undisturbed.forks.finish(undisturbed.table(LONG), bank)
    assert (bank / "seal.json").read_bytes() == undisturbed.long
    assert verify_bank(bank) == ()
    sleeper.go_on()
    assert sleeper.wait() == 0, sleeper.text()
    check_finished(bank, undisturbed.long)


@pytest.mark.parametrize(
    "moment", quick(["before its first shard", "before its part is written", "before its commit"])
)
def test_a_worker_that_slept_through_two_growths_changes_nothing(
    moment: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    middle = undisturbed.table("middle.csv")
    middle.write_text("".join(undisturbed.table(LONG).read_text().splitlines(True)[:129]))
    sleeper = undisturbed.forks.start(middle, bank, at=Moment(GROWTH_SLEEPS[moment], stops=True))
    sleeper.wait_until_stopped()
    undisturbed.forks.finish(middle, bank)
    second = undisturbed.forks.start(
        undisturbed.table(LONG), bank, at=Moment(r"^open \S*next/\.work/seal\.json", stops=True)
    )
    second.wait_until_stopped()
    before = committed_files(bank)
    sleeper.go_on()
    # What it knows of the bank is two growths old: its clips are there.
    second.go_on()
    assert second.wait() == 0, second.text()
    assert sleeper.wait() in (0, 1), sleeper.text()
    assert sleeper.wait() == 0 or "holds clips that the table lacks: 32" in sleeper.text()
    after = committed_files(bank)
    assert {name: after.get(name) for name in before} == before
    assert open_bank(bank).schema.generations == (112, 16, 32)
    assert verify_bank(bank) == ()
    assert not (bank / ".work").exists()


def test_a_growth_waits_while_another_process_moves_it_in(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    at = Moment(r"^os\.rename \S*\.bank/\.work/next/layers/1/patches", stops=True)
    first = undisturbed.forks.start(undisturbed.table(LONG), bank, at=at)
    first.wait_until_stopped()
    second = undisturbed.forks.start(undisturbed.table(LONG), bank)
    time.sleep(1.0)
    assert second.status() is None
    first.go_on()
    assert [first.wait(), second.wait()] == [0, 0], first.text() + second.text()
    check_finished(bank, undisturbed.long)


def test_a_finished_command_does_not_disturb_a_growth(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    at = Moment(r"^os\.link \S*/next/\.work/0", nth=2, stops=True)
    growing = undisturbed.forks.start(undisturbed.table(LONG), bank, at=at)
    growing.wait_until_stopped()
    before = committed_files(bank)
    undisturbed.forks.finish(undisturbed.table(SHORT), bank)
    assert committed_files(bank) == before
    growing.go_on()
    assert growing.wait() == 0, growing.text()
    check_after_a_kill(bank, before, {undisturbed.long})
    check_finished(bank, undisturbed.long)


def test_of_two_growths_by_different_clips_one_is_refused(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    at = Moment(r"^os\.link \S*/next/\.work/0", nth=2, stops=True)
    growing = undisturbed.forks.start(undisturbed.table(LONG), bank, at=at)
    growing.wait_until_stopped()
    other = undisturbed.forks.start(undisturbed.table(OTHER), bank)
    assert other.wait() == 1
    assert "x.bank is growing to 160 clips by another table; finish that with the" in other.text()
    growing.go_on()
    assert growing.wait() == 0, growing.text()
    check_finished(bank, undisturbed.long)


def test_a_growth_that_slept_while_the_bank_grew_otherwise_is_refused_or_grows_it_further(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    at = Moment(GROWTH_SLEEPS["before it owns the bank"], stops=True)
    sleepers = [
        undisturbed.forks.start(undisturbed.table(name), bank, at=at) for name in (OTHER, LONG)
    ]
    for sleeper in sleepers:
        sleeper.wait_until_stopped()
    middle = undisturbed.table("middle.csv")
    middle.write_text("".join(undisturbed.table(LONG).read_text().splitlines(True)[:129]))
    undisturbed.forks.finish(middle, bank)
    other, long = sleepers
    other.go_on()
    assert other.wait() == 1
    assert "holds clips that the table lacks: 16" in other.text()
    long.go_on()
    assert long.wait() == 0, long.text()
    assert open_bank(bank).schema.generations == (112, 16, 32)
    assert verify_bank(bank) == ()
    assert not (bank / ".work").exists()


def test_two_first_runs_with_different_tables_leave_one_bank(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = tmp_path / "x.bank"
    at = Moment(SLEEPS["before the skeleton"], stops=True)
    late = undisturbed.forks.start(undisturbed.table(LONG), bank, at=at)
    late.wait_until_stopped()
    undisturbed.forks.finish(undisturbed.table(SHORT), bank)
    late.go_on()
    assert late.wait() == 0, late.text()
    check_finished(bank, undisturbed.long)


def test_an_attempt_that_was_cleared_away_is_never_committed(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    with contextlib.ExitStack() as stack:
        attempt = stack.enter_context(open_attempt(bank, "00077"))
        shutil.rmtree(attempt)
        with pytest.raises(FileNotFoundError):
            commit(bank, attempt, "00077", [], {})
    assert not (bank / "commits/00077.json").exists()
    assert not (bank / ".work").exists()
