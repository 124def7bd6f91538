"""Workers in processes of their own: those of `extract`, and those of `patchbank worker`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
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


def start_worker(scheduler: str, log: Path) -> Process:
    with log.open("wb") as out:
        popen = subprocess.Popen(
            [PATCHBANK, "worker", scheduler, "--workers", "1"], stdout=out, stderr=out
        )
    return Process(popen.pid, log, popen.poll)


def test_patchbank_worker_serves_a_scheduler_until_ctrl_c_or_until_it_goes_away(
    forks: Forks, table: Path, tmp_path: Path
) -> None:
    with Cluster(tmp_path / "cluster", forks) as own, ExitStack() as stack:
        workers = [start_worker(own.address, tmp_path / f"{name}.log") for name in "ab"]
        for worker in workers:
            stack.callback(worker.kill)
        for worker in workers:
            worker.wait_for(f"1 worker(s) at {own.address}: cpu-0; Ctrl-C ends them")
        families = [psutil.Process(worker.pid).children(recursive=True) for worker in workers]
        states: list[Progress] = []
        settings = replace(SETTINGS, scheduler=own.address)
        extract(
            table,
            encoder="fake",
            out=tmp_path / "x.bank",
            settings=settings,
            progress=states.append,
        )
        names = {state.report.worker for state in states if state.report is not None}
        here = socket.gethostname()
        assert names <= {f"{here}-{worker.pid}-cpu-0" for worker in workers}
        assert states[-1].n_workers == 2
        interrupted, left_alone = workers
        interrupted.send(signal.SIGINT)
        interrupted.wait_for_end()
        own.scheduler.kill()
        left_alone.wait_for_end()
    assert interrupted.log.read_text().splitlines()[1:] == ["stopped"]
    gone = f"the scheduler at {own.address} has gone"
    assert left_alone.log.read_text().splitlines()[1:] == [gone]
    assert [worker.status() for worker in workers] == [0, 0]
    assert all(families)
    _, alive = psutil.wait_procs([child for family in families for child in family], PATIENCE_S)
    assert not alive


def test_an_address_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "nonsense"]) == 1
    words = "error: 'nonsense' is no address, expected what `dask scheduler` prints, such as tcp://"
    assert words in capsys.readouterr().err
