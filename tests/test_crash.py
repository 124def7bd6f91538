"""Kills at any moment: nothing wrong is sealed, and what is committed is not done again."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from crash_banks import (
    LONG,
    SHORT,
    Undisturbed,
    check_after_a_kill,
    check_finished,
    committed_files,
    make_undisturbed,
    phase_of,
)
from killable import Forks, Moment, Run

from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankIncomplete

KILLED = -9
PHASES = {
    SHORT: ("nothing there", "before a commit", "between commits", "sealing"),
    LONG: (
        "sealed",
        "growth: before a commit",
        "growth: between commits",
        "growth: sealing",
        "growth: moving in",
    ),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    yield from make_undisturbed(tmp_path_factory.mktemp("undisturbed"))


class Tormentor:
    """Kills runs on one bank after another until enough have died."""

    def __init__(self, undisturbed: Undisturbed, folder: Path, seed: int) -> None:
        self._undisturbed, self._folder = undisturbed, folder
        self._random = np.random.default_rng(seed)
        self._forks: Forks = undisturbed.forks
        self.kills: Counter[str] = Counter()
        self._lengths_s = self._measure()

    def _measure(self) -> dict[str, float]:
        """How long each phase of an undisturbed extraction and growth takes."""
        seen: dict[str, float] = {}
        bank = self._folder / "measured.bank"
        for table in (SHORT, LONG):
            run = self._forks.start(self._undisturbed.table(table), bank)
            last = time.monotonic()
            while run.status() is None:
                now, phase = time.monotonic(), phase_of(bank)
                seen[phase] = seen.get(phase, 0.0) + now - last
                last = now
            assert run.wait() == 0, run.text()
        return seen

    def torment(self, bank: Path, table: str, *, n_kills: int, seals: set[bytes]) -> None:
        """Kills runs of `table` on `bank`, sometimes of two at once; then one may finish."""
        for _ in range(n_kills):
            before = committed_files(bank)
            n_runs = 2 if self._random.random() < 0.3 else 1
            runs = [self._forks.start(self._undisturbed.table(table), bank) for _ in range(n_runs)]
            for run in runs:
                self._kill(run, bank, PHASES[table])
            for run in runs:
                assert run.wait() in (0, KILLED), run.text()
            check_after_a_kill(bank, before, seals)

    def _kill(self, run: Run, bank: Path, phases: tuple[str, ...]) -> None:
        """Waits for a phase that is drawn, and for a part of its length."""
        phase = str(self._random.choice(phases))
        delay_s = self._random.uniform(0, self._lengths_s.get(phase, 0.01))
        while run.status() is None and phase_of(bank) not in phases[phases.index(phase) :]:
            time.sleep(0.0005)
        time.sleep(delay_s)
        if run.status() is None:
            run.kill()
            if run.wait() == KILLED:
                self.kills[phase_of(bank)] += 1

    def round(self, name: str, n_kills: int) -> None:
        """One bank from nothing to a growth."""
        bank = self._folder / f"{name}.bank"
        short, long = self._undisturbed.short, self._undisturbed.long
        for table, seals, seal in ((SHORT, {short}, short), (LONG, {short, long}, long)):
            self.torment(bank, table, n_kills=n_kills, seals=seals)
            before = committed_files(bank)
            self._forks.finish(self._undisturbed.table(table), bank)
            check_after_a_kill(bank, before, seals)
            check_finished(bank, seal)
        shutil.rmtree(bank)


def test_runs_that_are_killed_at_random_end_with_the_seals_of_undisturbed_ones(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    tormentor = Tormentor(undisturbed, tmp_path, seed=20_251)
    for number in range(10):
        tormentor.round(f"{number}", n_kills=5)
        if sum(tormentor.kills.values()) >= 8:
            break
    print(f"kills by phase: {dict(tormentor.kills)}")
    assert sum(tormentor.kills.values()) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_more_than_a_hundred_kills_leave_nothing_wrong(
    seed: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    tormentor = Tormentor(undisturbed, tmp_path, seed)
    kills, number = tormentor.kills, 0
    wanted = (*PHASES[SHORT][1:], *PHASES[LONG][1:])
    while number < 100 and (sum(kills.values()) < 120 or min(kills[p] for p in wanted) < 4):
        tormentor.round(f"{number}", n_kills=1 + number % 6)
        number += 1
    print(f"seed {seed}, {number} banks, kills by phase: {dict(kills)}")
    assert sum(kills.values()) >= 120
    assert min(kills[phase] for phase in wanted) >= 4


BEFORE_THE_OLD_SEAL_GOES = {
    "before the first new shard is linked": Moment(r"^os\.link .*commits/0"),
    "before a new shard is in place": Moment(r"^os\.rename \S*next/\.work/0\S* -> .*layers", nth=2),
    "before the grown seal is written": Moment(r"^open .*next/\.work/seal\.json"),
    "before the old seal is taken away": Moment(r"^os\.remove .*\.bank/seal\.json"),
}
WHILE_THERE_IS_NO_SEAL = {
    "after the old seal is taken away": Moment(r"^os\.rename \S*\.bank/\.work/next/(?!\.work)"),
    "in the middle of the moves": Moment(r"^os\.rename \S*\.bank/\.work/next/layers/1/patches"),
    "before the card is moved": Moment(r"^os\.rename .* -> .*\.bank/zarr\.json"),
    "before the new seal is put": Moment(r"^os\.rename .* -> .*\.bank/seal\.json"),
}
AFTER_THE_NEW_SEAL = {
    "before the rest is cleared": Moment(r"^shutil\.rmtree .*\.bank/\.work$"),
    "while the rest is cleared": Moment(r"^os\.rmdir commits$"),
}
GROWTH = BEFORE_THE_OLD_SEAL_GOES | WHILE_THERE_IS_NO_SEAL | AFTER_THE_NEW_SEAL


@pytest.mark.parametrize("moment", GROWTH)
def test_a_growth_that_is_killed_is_finished_by_the_same_command(
    moment: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    table = undisturbed.table(LONG)
    # shutil.rmtree of .work/ comes in the extraction of the old bank, too; this is only a growth.
    run = undisturbed.forks.start(table, bank, at=GROWTH[moment])
    assert run.wait() == KILLED, run.text()
    if moment in WHILE_THERE_IS_NO_SEAL:
        with pytest.raises(BankIncomplete, match="Run the same `patchbank` command again"):
            open_bank(bank)
    else:
        is_old = moment in BEFORE_THE_OLD_SEAL_GOES
        seal = undisturbed.short if is_old else undisturbed.long
        assert (bank / "seal.json").read_bytes() == seal
        assert open_bank(bank).n_rows == (112 if is_old else 160)
        assert verify_bank(bank) == ()
    before = committed_files(bank)
    undisturbed.forks.finish(table, bank)
    check_after_a_kill(bank, before, {undisturbed.long})
    check_finished(bank, undisturbed.long)


@pytest.mark.parametrize("moment", ["in the middle of the moves", "before the rest is cleared"])
def test_the_table_that_a_bank_was_begun_with_finishes_a_growth_that_was_sealed(
    moment: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    run = undisturbed.forks.start(undisturbed.table(LONG), bank, at=GROWTH[moment])
    assert run.wait() == KILLED, run.text()
    ended = undisturbed.forks.start(undisturbed.table(SHORT), bank)
    assert ended.wait() == 1
    assert "holds clips that the table lacks: 48" in ended.text()
    assert open_bank(bank).n_rows == 160
    assert verify_bank(bank) == ()


def test_a_finished_command_leaves_the_growth_that_another_one_was_killed_in(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    at = Moment(r"^open .*next/\.work/seal\.json")
    assert undisturbed.forks.start(undisturbed.table(LONG), bank, at=at).wait() == KILLED
    before = committed_files(bank)
    undisturbed.forks.finish(undisturbed.table(SHORT), bank)
    assert committed_files(bank) == before
    undisturbed.forks.finish(undisturbed.table(LONG), bank)
    check_after_a_kill(bank, before, {undisturbed.long})
    check_finished(bank, undisturbed.long)


def test_a_bank_grows_again_after_a_growth_that_was_killed_at_its_very_end(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    bank = shutil.copytree(undisturbed.short_bank, tmp_path / "x.bank")
    middle = undisturbed.table("middle.csv")
    middle.write_text("".join(undisturbed.table(LONG).read_text().splitlines(True)[:129]))
    at = GROWTH["while the rest is cleared"]
    assert undisturbed.forks.start(middle, bank, at=at).wait() == KILLED
    undisturbed.forks.finish(undisturbed.table(LONG), bank)
    assert open_bank(bank).schema.generations == (112, 16, 32)
    assert verify_bank(bank) == ()
    assert not (bank / ".work").exists()


STEPS = r"^os\.(rename|link|remove) (?!.*(assembly|\.partial))/"
"""Every move into place, without those inside a draft."""


@pytest.mark.slow
@pytest.mark.parametrize("table", [SHORT, LONG])
def test_a_run_may_die_before_each_of_its_moves(
    table: str, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    n_steps = 0
    while True:
        bank = tmp_path / f"{n_steps}.bank"
        if table == LONG:
            shutil.copytree(undisturbed.short_bank, bank)
        run = undisturbed.forks.start(
            undisturbed.table(table), bank, at=Moment(STEPS, nth=n_steps + 1)
        )
        if run.wait() != KILLED:
            break
        n_steps += 1
        before = committed_files(bank)
        check_after_a_kill(bank, {}, {undisturbed.short, undisturbed.long})
        undisturbed.forks.finish(undisturbed.table(table), bank)
        check_after_a_kill(bank, before, {undisturbed.short, undisturbed.long})
        check_finished(bank, undisturbed.long if table == LONG else undisturbed.short)
        shutil.rmtree(bank)
    print(f"{table}: {n_steps} steps")
    assert n_steps > 40
