"""Loaders in threads and other processes, and loops that end before their time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from loader_banks import (
    HERE,
    N_DONE,
    make_bank,
    n_descriptors,
    reader_threads,
    reference,
)

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.probing import BatchLoader
from patchbank.probing.tiers import Tier


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("quantised"), "int8")


@pytest.mark.parametrize("tier", HERE)
def test_leaving_a_loop_early_leaves_nothing_behind(bank: Bank, tier: Tier) -> None:
    before = n_descriptors()
    loader = BatchLoader(bank, batch_size=4, tier=tier)
    ring_bytes = set()
    for _ in range(50):
        for _batch in loader:
            break
        ring_bytes.add(loader.ring_bytes)
        assert not reader_threads()
    [n_bytes] = ring_bytes
    assert n_bytes == 3 * 4 * 2 * 4_096  # three slots of four rows, of patches and of prefix
    del loader, _batch
    assert n_descriptors() == before


def test_an_error_in_the_loop_ends_the_readers(bank: Bank) -> None:
    loader = BatchLoader(bank, batch_size=4, tier="read")

    def fail() -> None:
        for _batch in loader:
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not reader_threads()
    assert sum(len(batch.rows) for batch in loader) == N_DONE


@pytest.mark.parametrize("tier", ["ram", "read", "direct"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tier: Tier, tmp_path: Path) -> None:
    bank = make_bank(tmp_path)
    loader = BatchLoader(bank, layer=1, batch_size=4, tier=tier, shuffle=False)
    seen: list[int] = []

    def read() -> None:
        for batch in loader:
            seen.extend(batch.rows.tolist())
            os.truncate(bank.path / "layers/1/patches/c.2.0.0", 4_096)

    with pytest.raises(BankCorrupt, match=r"layers/1/patches/c\.2\.0\.0 ends at byte .* was cut"):
        read()
    assert 0 < len(seen) < N_DONE
    assert not reader_threads()


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    bank = make_bank(tmp_path)
    loader = BatchLoader(bank, layer=1, batch_size=4, tier="read", shuffle=False)
    (bank.path / "layers/1/patches/c.2.0.0").unlink()
    with pytest.raises(BankCorrupt, match=r"c\.2\.0\.0: No such file or directory; pull the bank"):
        list(loader)


@pytest.mark.parametrize("tier", HERE)
def test_threads_may_read_from_one_loader_at_once(bank: Bank, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=1, batch_size=4, tier=tier)
    patches = reference(bank, 1, "patches")
    epochs: list[int] = []
    errors: list[str] = []

    def read() -> None:
        try:
            for _ in range(5):
                seen = []
                for batch in loader:
                    np.testing.assert_array_equal(batch.patches.numpy(), patches[batch.rows])
                    seen += batch.rows.tolist()
                assert len(set(seen)) == len(seen) == N_DONE
                epochs.append(batch.epoch)
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    assert sorted(epochs) == list(range(20))
    assert loader.ring_bytes <= 4 * 3 * 4 * 4_096


def in_child(work: Callable[[], None]) -> None:
    """Runs `work` in a fork of this process; fails where it fails or hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return
        threading.Event().wait(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the forked process hangs")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("tier", HERE)
def test_a_forked_process_reads_after_its_parent_has(bank: Bank, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=1, batch_size=4, tier=tier)
    patches = reference(bank, 1, "patches")

    def check() -> None:
        seen = []
        for batch in loader:
            np.testing.assert_array_equal(batch.patches.numpy(), patches[batch.rows])
            seen += batch.rows.tolist()
        assert len(set(seen)) == len(seen) == N_DONE

    check()
    in_child(check)
    iteration = iter(loader)
    next(iteration)  # its readers are there while it forks
    in_child(check)

    def go_on() -> None:
        with pytest.raises(BankError, match="this epoch was begun before the process forked"):
            list(iteration)

    in_child(go_on)
    assert sum(len(batch.rows) for batch in iteration) == N_DONE - 4
    check()


@pytest.mark.parametrize("tier", HERE)
def test_a_loader_travels_to_a_spawned_process(bank: Bank, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=[1, 2], batch_size=8, seed=5, tier=tier)
    next(iter(loader))
    again = pickle.loads(pickle.dumps(loader))
    assert (again.epoch, again.ring_bytes) == (1, 0)
    rows = [batch.rows.tolist() for batch in again]
    assert rows == [batch.rows.tolist() for batch in loader]


def test_a_loader_works_in_a_spawned_process(quantised: Bank) -> None:
    loader = BatchLoader(quantised, layer=1, batch_size=8, tier="direct")
    expected = [batch.patches.sum().item() for batch in loader]
    loader.epoch = 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sums_of, (loader,)) == expected


def sums_of(loader: BatchLoader) -> list[float]:
    return [batch.patches.sum().item() for batch in loader]


def test_an_opened_bank_travels_too(bank: Bank) -> None:
    again = pickle.loads(pickle.dumps(bank))
    assert again.fingerprint == bank.fingerprint
    assert sum(len(batch.rows) for batch in BatchLoader(again)) == N_DONE
