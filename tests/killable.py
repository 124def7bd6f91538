"""Extractions with the fake encoder in processes that tests kill.

`python killable.py` imports everything once, then forks a child for each line that it reads, so
that a killed run costs what the run costs and no start. `Forks` speaks with it.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Seals are equal where threads are."""
CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
"""Audit events of Python that come before a change of the file system; so does `open` to write."""
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Moment:
    """Just before the n-th change of the file system below the bank that a pattern matches.

    The pattern is searched in "EVENT PATH", and "EVENT PATH -> TARGET" for a rename or a link.
    """

    pattern: str = ""
    nth: int = 1
    stops: bool = False
    """The process is stopped there until `Run.go_on`, instead of killed."""


@dataclass(frozen=True)
class Run:
    """One extraction in a process of its own."""

    forks: Forks
    pid: int
    log: Path

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait_until_stopped(self) -> None:
        """Until a moment with `stops` has come."""
        end = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert self.status() is None, f"ended too early: {self.text()}"
            assert time.monotonic() < end, self.text()
            time.sleep(0.002)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def status(self) -> int | None:
        """0 done, -9 killed, 1 an error that the log tells; None while it runs."""
        status: int | None = self.forks.ask({"status_of": self.pid})
        return status

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The status at the end; kills what takes too long."""
        end = time.monotonic() + timeout_s
        while (status := self.status()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{self.pid} ran for more than {timeout_s} s: {self.text()}")
            time.sleep(0.005)
        return status

    def text(self) -> str:
        """What it printed; its changes of the file system where it was asked to list them."""
        return self.log.read_text()


class Forks:
    """Starts runs; a context manager that leaves none behind."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._n_runs = folder, 0
        self._runs: list[Run] = []
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Forks:
        environment = {**os.environ, **ENVIRONMENT, "DASK_TEMPORARY_DIRECTORY": str(self._folder)}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for run in self._runs:
                if run.status() is None:
                    run.kill()
        finally:
            self._server.kill()
            self._server.communicate()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self,
        table: Path,
        out: Path,
        *,
        at: Moment | None = None,
        lists_changes: bool = False,
        **settings: object,
    ) -> Run:
        """Begins an extraction, which kills or stops itself at a moment; `settings` beside the
        usual ones, `augment` as its identity."""
        self._n_runs += 1
        log = self._folder / f"{self._n_runs:04d}.log"
        log.touch()
        pid = self.ask(
            {
                "table": str(table),
                "out": str(out),
                "at": None if at is None else [at.pattern, at.nth, at.stops],
                "lists_changes": lists_changes,
                "settings": settings,
                "log": str(log),
            }
        )
        run = Run(self, pid, log)
        self._runs.append(run)
        return run

    def module(
        self, name: str, arguments: list[str], *, folder: Path, environment: dict[str, str]
    ) -> Run:
        """`python -m name arguments` in a folder, without the time that imports take."""
        self._n_runs += 1
        log = self._folder / f"{self._n_runs:04d}.log"
        log.touch()
        pid = self.ask(
            {
                "module": name,
                "arguments": arguments,
                "folder": str(folder),
                "environment": environment,
                "log": str(log),
            }
        )
        run = Run(self, pid, log)
        self._runs.append(run)
        return run

    def finish(self, table: Path, out: Path, **settings: object) -> Run:
        """An extraction that nobody disturbs."""
        run = self.start(table, out, **settings)  # type: ignore[arg-type]
        assert run.wait() == 0, run.text()
        return run


def watch_changes(bank: Path, *, at: Moment | None, lists: bool) -> None:
    """Prints the changes of the file system below a bank, and dies or stops just before one."""
    wanted = None if at is None else re.compile(at.pattern)
    n_seen = 0
    inside = (f"{bank}/", f"{bank.parent}/.{bank.name}.")

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal n_seen
        if event == "open":
            is_change = isinstance(args[0], (str, os.PathLike)) and bool(
                args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            paths = args[:1]
        else:
            is_change = event in CHANGES
            paths = args[:2] if event in ("os.rename", "os.link") else args[:1]
        if not is_change:
            return
        names = [os.fspath(path) for path in paths if isinstance(path, (str, os.PathLike))]
        # The removal of a tree names its files relative to open folders.
        relative = [name for name in names if not name.startswith("/")]
        if not names or not (relative or f"{names[0]}/".startswith(inside)):
            return
        change = f"{event} {' -> '.join(names)}"
        if lists:
            print(change, flush=True)
        if at is not None and wanted is not None and wanted.search(change):
            n_seen += 1
            if n_seen == at.nth:
                os.kill(os.getpid(), signal.SIGSTOP if at.stops else signal.SIGKILL)

    sys.addaudithook(audit)


def _module(request: dict[str, Any]) -> None:
    import dask

    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    dask.config.refresh()
    sys.argv = [request["module"], *request["arguments"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _extraction(request: dict[str, Any]) -> None:
    from patchbank.pipeline.bank.card import augment_of_card
    from patchbank.pipeline.extraction import ExtractionSettings, extract
    from patchbank.pipeline.specs import WindowSpec

    out = Path(request["out"])
    if request["at"] or request["lists_changes"]:
        at = Moment(*request["at"]) if request["at"] else None
        watch_changes(out, at=at, lists=request["lists_changes"])
    usual = {"window": WindowSpec(1.0, 1.0), "layers": "all"}
    augment = {"augment": augment_of_card(request["settings"])}
    settings = ExtractionSettings(**{**usual, **request["settings"], **augment})
    extract(request["table"], encoder="fake", out=out, settings=settings)


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, source in enumerate((null, log, log)):
            os.dup2(source, target)
        (_module if "module" in request else _extraction)(request)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    # All that a run needs is imported before the first fork, and nothing that starts a thread.
    for module in (
        "patchbank.pipeline.extraction",
        "patchbank.pipeline.encoders.fake",
        "distributed.http.scheduler.info",
        "pandas",
    ):
        import_module(module)
    statuses: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None
        if "status_of" in request:
            pid = request["status_of"]
            if pid not in statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            answer = statuses.get(pid)
        else:
            answer = _fork(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
