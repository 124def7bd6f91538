"""Processes seen from outside: how long they took, what they printed, the memory they came to."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

EVERY_S = 0.25
GPU_EVERY_S = 1.0


class RunFailed(Exception):
    """A process ended with an error; its last lines."""


@dataclass(frozen=True)
class Ran:
    """A process that has ended."""

    seconds: float
    """From its start to its end."""
    facts: dict[str, Any]
    """What it printed, JSON."""
    peak_rss_bytes: int
    """Largest sum over the process and its children; pages that they share count for each."""
    peak_gpu_bytes: int | None
    """Of the whole GPU, less what was taken before."""


def run_process(command: Sequence[str | Path], *, watches_gpu: bool = False) -> Ran:
    """Runs a process that prints JSON in its last line; `RunFailed` where it fails."""
    before = gpu_bytes() if watches_gpu else None
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    watch = Watch(process.pid, watches_gpu=before is not None)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    seconds = time.perf_counter() - start
    watch.stop()
    if process.returncode:
        last = "\n".join(err.strip().splitlines()[-12:])
        raise RunFailed(f"exit {process.returncode} of {' '.join(map(str, command))}\n{last}")
    gpu = None if before is None else watch.peak_gpu_bytes - before
    return Ran(seconds, last_json(out), watch.peak_rss_bytes, gpu)


def last_json(text: str) -> dict[str, Any]:
    """The last line, or all of it where it is spread over lines."""
    for part in (text.strip().rpartition("\n")[2], text):
        with suppress(json.JSONDecodeError):
            found = json.loads(part)
            if isinstance(found, dict):
                return found
    raise RunFailed(f"expected JSON, found {text[-200:]!r}")


class Watch:
    """Samples the memory of a process and its children until it is stopped."""

    def __init__(self, pid: int, *, watches_gpu: bool) -> None:
        self.peak_rss_bytes = self.peak_gpu_bytes = 0
        self._pid, self._stop = pid, threading.Event()
        works = [self._watch_memory] + [self._watch_gpu] * watches_gpu
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _watch_memory(self) -> None:
        while not self._stop.wait(EVERY_S):
            found = [_memory(pid) for pid in process_tree(self._pid)]
            # A process knows its own peak between two looks.
            highest = max((peak for _, peak in found), default=0)
            self.peak_rss_bytes = max(self.peak_rss_bytes, highest, sum(now for now, _ in found))

    def _watch_gpu(self) -> None:
        while not self._stop.wait(GPU_EVERY_S):
            self.peak_gpu_bytes = max(self.peak_gpu_bytes, gpu_bytes() or 0)


def process_tree(pid: int) -> list[int]:
    """A process and all below it that are there now."""
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        for children in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            with suppress(OSError):
                waiting += map(int, children.read_text().split())
    return found


def _memory(pid: int) -> tuple[int, int]:
    """Resident bytes now and at most."""
    with suppress(OSError):
        found = dict(
            re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        )
        return 1024 * int(found.get("VmRSS", 0)), 1024 * int(found.get("VmHWM", 0))
    return 0, 0


def gpu_bytes() -> int | None:
    """Taken memory of the first GPU; None where nvidia-smi does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    text = done.stdout.strip()
    return int(text) * 2**20 if text.isdigit() else None


@dataclass(frozen=True)
class Extract:
    """`patchbank extract` of this Python's installation."""

    device: str
    folder: Path
    """For its banks, which are removed after each run."""

    @cached_property
    def _program(self) -> list[str]:
        beside = Path(sys.executable).with_name("patchbank")
        if beside.is_file():
            return [str(beside)]
        return [sys.executable, "-c", "from patchbank.cli.main import run; run()"]

    @cached_property
    def flags(self) -> frozenset[str]:
        """The options that this version has."""
        wide = os.environ | {"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
        command = [*self._program, "extract", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=wide, check=True)
        return frozenset(re.findall(r"--[a-z][a-z-]*", done.stdout))

    def run(
        self,
        table: Path,
        *,
        encoder: str,
        weights: Path | None,
        dtype: str,
        options: Sequence[str] = (),
        core: int | None = None,
        dry: bool = False,
    ) -> Ran:
        """Extracts a table into a new bank; `facts` has the bank's batch size beside the rest.

        `core` is the one that taskset gives it. Raises `RunFailed` where a clip fails.
        """
        bank = self.folder / "extract.bank"
        command = ["taskset", "-c", str(core)] if core is not None else []
        command += [*self._program, "extract", str(table), "--encoder", encoder, "--dtype", dtype]
        command += ["--weights", str(weights)] if weights else []
        # Workers that are counted are those of the CPU, and the command wants to hear it once.
        command += [] if "--workers" in options else ["--device", self.device]
        command += ["--out", str(bank), "--json", *options]
        if dry:
            return run_process([*command, "--dry-run"])
        command += ["--profile"] if "--profile" in self.flags else []
        # The removal of the last bank is written to the disk before the next one's time begins.
        os.sync()
        try:
            ran = run_process(command, watches_gpu=self.device.startswith("cuda"))
            if ran.facts.get("failed"):
                raise RunFailed(f"{ran.facts['failed']} clips failed: {' '.join(command)}")
            card = json.loads((bank / "zarr.json").read_text())["attributes"]["card"]
            ran.facts["batch_size"] = card["extraction"].get("batch_size")
        finally:
            shutil.rmtree(bank, ignore_errors=True)
        return ran


def without_start_up(facts: dict[str, Any]) -> float | None:
    """Clips a second that a run says of itself; None where it does not."""
    profile = facts.get("profile", facts)
    if not isinstance(profile, dict):
        return None
    n_clips, elapsed_s = profile.get("n_clips"), profile.get("elapsed_s")
    return n_clips / elapsed_s if n_clips and elapsed_s else None
