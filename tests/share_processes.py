"""Pushes and pulls in processes of their own, which tests kill; imports are done once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOADED = [
    "patchbank.pipeline.sharing.push",
    "patchbank.pipeline.sharing.pull",
    "patchbank.pipeline.sharing.remote_bank",
    "patchbank.probing.loader",
]


def context() -> ForkServerContext:
    """Processes that are forked from one that has imported what they need."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOADED)
    return forks


def begin(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = context().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """As `kill -9` does; waits for the end."""
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join(30)


def push(bank: Path, place: str, cache: Path, limit_bytes_per_s: float | None) -> None:
    from patchbank.pipeline.bank import open_bank
    from patchbank.pipeline.sharing.push import push_bank
    from patchbank.pipeline.sharing.push_record import PushRecord
    from patchbank.pipeline.sharing.stores import open_store

    opened = open_bank(bank)
    record = PushRecord.of(cache, place, opened.root_sha256)
    push_bank(opened, open_store(place), record=record, limit_bytes_per_s=limit_bytes_per_s)


def pull(place: str, out: Path, limit_bytes_per_s: float | None) -> None:
    from patchbank.pipeline.sharing.pull import pull_bank
    from patchbank.pipeline.sharing.stores import open_store

    pull_bank(open_store(place), out, limit_bytes_per_s=limit_bytes_per_s)


def read_for_ever(place: str, cache: Path, limit: str) -> None:
    """Epoch after epoch of a bank at an address, by two tiers, until it is killed."""
    from patchbank.pipeline.bank import open_bank
    from patchbank.probing import BatchLoader

    os.environ |= {"PATCHBANK_CACHE": str(cache), "PATCHBANK_CACHE_LIMIT": limit}
    while True:
        bank = open_bank(place)
        for tier in ("read", "ram"):
            for _batch in BatchLoader(bank, batch_size=4, tier=tier):  # type: ignore[arg-type]
                pass
