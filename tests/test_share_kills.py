"""Pushes and pulls that are killed: nothing wrong is ever sealed, and nothing is moved twice."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from share_processes import begin, kill, pull, push

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank

N_KILLS = 20
LENGTH_S = 0.25


def inodes(folder: Path, bank: Bank) -> dict[str, int]:
    """Of the files that are in their place; each is made anew where it is written again."""
    return {
        name: (folder / name).stat().st_ino
        for name in bank.seal.files
        # A pull reads the card each time, to know what it pulls.
        if name != "zarr.json" and (folder / name).is_file()
    }


def torment(run: Callable[[], BaseProcess], folder: Path, bank: Bank, seed: int) -> int:
    """Kills runs at random moments until the bank at `folder` is whole; the number of kills."""
    moments, n_kills = random.Random(seed), 0
    done: dict[str, int] = {}
    while n_kills < N_KILLS or not (folder / "seal.json").is_file():
        process = run()
        process.join(moments.uniform(0.0, LENGTH_S) if n_kills < N_KILLS else 60.0)
        was_killed = process.is_alive()
        kill(process)
        assert was_killed or process.exitcode == 0
        n_kills += was_killed
        now = inodes(folder, bank)
        assert {name: now.get(name) for name in done} == done, "a file was moved twice"
        done = now
        if (folder / "seal.json").is_file():
            assert verify_bank(folder) == ()
            if n_kills < N_KILLS:
                shutil.rmtree(folder)
                done = {}
    return n_kills


def test_a_push_that_is_killed_twenty_times_ends_whole(sealed: Bank, tmp_path: Path) -> None:
    there = tmp_path / "there.bank"
    limit = sealed.seal.bank_bytes / LENGTH_S

    def run() -> BaseProcess:
        return begin(push, sealed.path, str(there), tmp_path / "cache", limit)

    assert torment(run, there, sealed, seed=1) >= N_KILLS
    assert open_bank(there).root_sha256 == sealed.root_sha256


def test_a_pull_that_is_killed_twenty_times_ends_whole(sealed: Bank, tmp_path: Path) -> None:
    here = tmp_path / "here.bank"
    limit = sealed.seal.bank_bytes / LENGTH_S

    def run() -> BaseProcess:
        return begin(pull, str(sealed.path), here, limit)

    assert torment(run, here, sealed, seed=2) >= N_KILLS
    assert open_bank(here).root_sha256 == sealed.root_sha256
    assert not (here / ".work").exists()


def test_two_pulls_into_one_place_share_it(sealed: Bank, tmp_path: Path) -> None:
    here = tmp_path / "here.bank"
    processes = [begin(pull, str(sealed.path), here, 4 * sealed.seal.bank_bytes) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert verify_bank(here) == ()
    assert not (here / ".work").exists()
