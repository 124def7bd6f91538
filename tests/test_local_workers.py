"""Workers in processes of their own: those of `extract`, and those of `patchbank worker`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from audio_sets import write_clip_set
from crash_banks import check_finished
from dask_cluster import Cluster, Process
from fake_bank import SETTINGS
from killable import PATIENCE_S, Forks

from patchbank.cli.main import main
from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.extraction import Progress, extract

N_SHARDS = 12
PATCHBANK = Path(sys.executable).parent / "patchbank"


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("runs")) as forks:
        yield forks


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_set(tmp_path_factory.mktemp("set"), n_clips=16 * N_SHARDS)


@pytest.fixture(scope="module")
def seal(forks: Forks, table: Path) -> bytes:
    """Of an undisturbed run in one process with one thread."""
    forks.finish(table, table.parent / "undisturbed.bank")
    return (table.parent / "undisturbed.bank/seal.json").read_bytes()


def test_a_killed_process_of_two_is_replaced_and_the_bank_is_the_same(
    table: Path, seal: bytes, tmp_path: Path
) -> None:
    variables = dict(os.environ)
    states: list[Progress] = []
    victims: list[int] = []

    def look(progress: Progress) -> None:
        if not progress.doing:
            states.append(progress)
        if not victims and progress.report is not None:
            victims.extend(child.pid or 0 for child in multiprocessing.active_children())
            os.kill(victims[0], signal.SIGKILL)

    bank = extract(
        table,
        encoder="fake",
        out=tmp_path / "x.bank",
        settings=replace(SETTINGS, n_workers=2, n_threads=1),
        progress=look,
    )
    check_finished(bank.path, seal)
    reports = [state.report for state in states if state.report is not None]
    assert sorted(report.shard for report in reports) == list(range(N_SHARDS))
    assert {report.worker for report in reports} <= {"cpu-0", "cpu-1"}
    assert states[0].n_workers == len(victims) == 2
    assert open_bank(bank.path).card["extraction"]["threads"] == 1
    assert not multiprocessing.active_children()
    assert dict(os.environ) == variables


@contextmanager
def serving(scheduler: str, log: Path) -> Iterator[Process]:
    """`patchbank worker` in its own words; nothing of it is left when it has ended by itself."""
    with log.open("wb") as out:
        popen = subprocess.Popen(
            [PATCHBANK, "worker", scheduler, "--workers", "1"], stdout=out, stderr=out
        )
    process = Process(popen.pid, log, popen.poll)
    try:
        process.wait_for(f"1 worker(s) at {scheduler}: cpu-0; Ctrl-C ends them\n")
        family = psutil.Process(process.pid).children(recursive=True)
        assert family
        yield process
        process.wait_for_end()
        assert process.status() == 0
        assert not psutil.wait_procs(family, PATIENCE_S)[1]
    finally:
        process.kill()


def test_patchbank_worker_works_for_a_scheduler_until_ctrl_c(
    forks: Forks, table: Path, tmp_path: Path
) -> None:
    states: list[Progress] = []
    with (
        Cluster(tmp_path / "cluster", forks) as own,
        serving(own.address, tmp_path / "log") as worker,
    ):
        settings = replace(SETTINGS, scheduler=own.address)
        out = tmp_path / "x.bank"
        extract(table, encoder="fake", out=out, settings=settings, progress=states.append)
        worker.send(signal.SIGINT)
    names = {state.report.worker for state in states if state.report is not None}
    assert names == {f"{socket.gethostname()}-{worker.pid}-cpu-0"}
    assert worker.log.read_text().splitlines()[1:] == ["stopped"]


@pytest.mark.slow
def test_patchbank_worker_ends_when_the_scheduler_goes_away(forks: Forks, tmp_path: Path) -> None:
    with (
        Cluster(tmp_path / "cluster", forks) as own,
        serving(own.address, tmp_path / "log") as worker,
    ):
        own.scheduler.kill()
    gone = f"the scheduler at {own.address} has gone"
    assert worker.log.read_text().splitlines()[1:] == [gone]


def test_an_address_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "nonsense"]) == 1
    words = "error: 'nonsense' is no address, expected what `dask scheduler` prints, such as tcp://"
    assert words in capsys.readouterr().err
