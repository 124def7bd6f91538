"""A Dask scheduler and workers in processes and folders of their own, which tests kill and stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from killable import ENVIRONMENT, PATIENCE_S, Forks, Moment

SOON = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "2s"}
"""A scheduler that soon gives up silent workers: after ten heartbeats, which are five seconds."""
MOMENT = "PATCHBANK_TEST_MOMENT"


@dataclass(frozen=True)
class Process:
    """A scheduler or a worker."""

    pid: int
    log: Path
    status: Callable[[], int | None]

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once; nothing where it has ended."""
        if self.runs:
            self.send(signal.SIGKILL)
        while self.runs:
            time.sleep(0.005)

    def wait_for_end(self) -> None:
        end = time.monotonic() + PATIENCE_S
        while self.runs:
            assert time.monotonic() < end, self.log.read_text(errors="replace")
            time.sleep(0.02)

    @property
    def runs(self) -> bool:
        return self.status() is None

    @property
    def is_stopped(self) -> bool:
        text = Path(f"/proc/{self.pid}/stat").read_text()
        return text.rpartition(")")[2].split()[0] == "T"

    def wait_for(self, words: str) -> None:
        """Until its log holds some words."""
        end = time.monotonic() + PATIENCE_S
        while words not in (text := self.log.read_text(errors="replace")):
            assert self.runs, text
            assert time.monotonic() < end, text
            time.sleep(0.02)


@dataclass
class Cluster:
    """A scheduler; `worker` adds workers. A context manager that leaves no process behind."""

    folder: Path
    forks: Forks | None = None
    """Starts the processes; None for commands as anyone types them."""
    settings: Mapping[str, str] = field(default_factory=dict)
    _processes: list[Process] = field(default_factory=list)

    def __enter__(self) -> Cluster:
        try:
            self._start_scheduler()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_scheduler(self) -> None:
        place = self.folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler",
            ["distributed.cli.dask_scheduler", "--scheduler-file", str(place), "--port", "0"],
            ["--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0"],
        )
        self.scheduler.wait_for("Scheduler at:")
        end = time.monotonic() + PATIENCE_S
        while not (place.is_file() and place.read_bytes()):
            assert time.monotonic() < end
            time.sleep(0.01)
        self.address = json.loads(place.read_bytes())["address"]

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.kill()

    def worker(
        self,
        name: str,
        *,
        at: Moment | None = None,
        bank: Path | None = None,
        prefix: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> Process:
        """Begins a worker; its log lists its changes of `bank`, and at a moment there it kills or
        stops itself. `settings` are variables of its own."""
        moment = json.dumps([str(bank), at and [at.pattern, at.nth, at.stops]]) if bank else ""
        return self._start(
            name,
            ["distributed.cli.dask_worker", self.address, "--name", name, "--nthreads", "2"],
            ["--host", "127.0.0.1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"],
            ["--preload", __file__],
            settings={MOMENT: moment, **(settings or {})},
            prefix=prefix,
        )

    def workers(self, *names: str) -> list[Process]:
        """Workers that the scheduler knows."""
        processes = [self.worker(name) for name in names]
        for process in processes:
            process.wait_for("Registered to:")
        return processes

    def _start(
        self,
        name: str,
        *arguments: list[str],
        settings: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Process:
        own = self.folder / name
        own.mkdir(parents=True)
        module, *words = (word for part in arguments for word in part)
        environment = {
            **ENVIRONMENT,
            "DASK_TEMPORARY_DIRECTORY": str(own),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *_python_path()]),
            **self.settings,
            **(settings or {}),
        }
        if self.forks is not None and not prefix:
            run = self.forks.module(module, words, folder=own, environment=environment)
            process = Process(run.pid, run.log, run.status)
        else:
            log = self.folder / f"{name}.log"
            with log.open("wb") as out:
                popen = subprocess.Popen(
                    [*prefix, sys.executable, "-m", module, *words],
                    cwd=own,
                    env=os.environ | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            process = Process(popen.pid, log, popen.poll)
        self._processes.append(process)
        return process


def _python_path() -> list[str]:
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


def dask_setup(worker: object) -> None:
    """Of a worker, which preloads this file: what an extraction imports, and its moment."""
    from killable import watch_changes

    import patchbank.pipeline.encoders.fake
    import patchbank.pipeline.shard  # noqa: F401

    if moment := os.environ[MOMENT]:
        bank, at = json.loads(moment)
        watch_changes(Path(bank), at=Moment(*at) if at else None, lists=True)
