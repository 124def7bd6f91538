from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from audio_sets import write_clip_set
from fake_bank import SETTINGS

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.places import RowPlaces
from patchbank.pipeline.bank.row_files import reads_directly, resident_share
from patchbank.pipeline.extraction import extract
from patchbank.probing import BatchLoader, tiers
from patchbank.probing.tiers import TierFacts, choose_tier, free_memory_bytes, look_at

LARGE = TierFacts(n_bytes=100 * 2**30, free_bytes=64 * 2**30, direct_keeps_up=True)
MEDIUM = replace(LARGE, n_bytes=2**30)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("tiers")
    table = write_clip_set(folder / "set", n_clips=40)
    return extract(table, encoder="fake", out=folder / "x.bank", settings=SETTINGS)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (LARGE, "direct: 100 GiB do not fit into half of 64 GiB of free memory"),
        (
            replace(LARGE, direct_keeps_up=False),
            "read: 100 GiB do not fit into half of 64 GiB of free memory, and O_DIRECT is "
            "slower here",
        ),
        (
            replace(LARGE, direct_keeps_up=None),
            "read: 100 GiB do not fit into half of 64 GiB of free memory, and O_DIRECT is not "
            "to be had here",
        ),
        (replace(LARGE, resident_share=0.2), "direct: 100 GiB do not fit into half of 64 GiB"),
        (MEDIUM, "ram: 1 GiB fit into half of 64 GiB of free memory"),
        (replace(MEDIUM, resident_share=0.95), "read: the page cache holds 95% of 1 GiB already"),
        (replace(MEDIUM, reads_once=True), "direct: 1 GiB are read once"),
        (
            replace(MEDIUM, reads_once=True, resident_share=1.0),
            "read: the page cache holds 100% of 1 GiB already",
        ),
        (replace(MEDIUM, n_bytes=2**20, resident_share=1.0), "ram: 1 MiB are little"),
        (replace(MEDIUM, n_bytes=2**20, reads_once=True), "read: 1 MiB are little"),
        (replace(LARGE, row_bytes=4_096), "read: rows of 4 KiB are small"),
        (replace(MEDIUM, free_bytes=0), "direct: 1 GiB do not fit into half of 0 B"),
        (
            replace(MEDIUM, free_device_bytes=2 * 2**30),
            "device: 1 GiB fit into half of 2 GiB on the GPU",
        ),
        (replace(MEDIUM, free_device_bytes=2**30), "ram: 1 GiB fit into half of 64 GiB"),
        (replace(MEDIUM, n_bytes=0, free_device_bytes=2**30), "ram: 0 B are little"),
    ],
)
def test_auto_chooses_by_size_memory_and_disk_and_says_why(facts: TierFacts, said: str) -> None:
    assert str(choose_tier(facts)).startswith(said)


def test_a_loader_says_what_it_chose(bank: Bank) -> None:
    assert str(BatchLoader(bank).choice) == "ram: 320 KiB are little"  # 40 rows and their CLS
    assert str(BatchLoader(bank, tier="map").choice) == "map: as asked"


def test_a_bank_larger_than_memory_is_looked_at_on_the_disk(
    bank: Bank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tiers, "free_memory_bytes", lambda: 2**10)
    monkeypatch.setattr(tiers, "SMALL_BYTES", 0)
    places = fresh_places(bank, tmp_path / "1.bank")
    facts = look_at([places], np.array([3, 20, 36]))
    assert facts.n_bytes == 3 * 4_096
    assert facts.resident_share == 0.0
    assert (facts.direct_keeps_up is not None) == reads_directly(places)
    assert str(choose_tier(facts)) == "read: rows of 4 KiB are small"
    monkeypatch.setattr(tiers, "SMALL_ROW_BYTES", 0)
    assert choose_tier(facts).tier == ("direct" if facts.direct_keeps_up else "read")
    loader = BatchLoader(bank, layer=1)
    assert loader.choice.tier in ("direct", "read")
    assert sum(len(batch.rows) for batch in loader) == 40


def fresh_places(bank: Bank, copy: Path) -> RowPlaces:
    """The rows of a copy that is not in the page cache."""
    shutil.copytree(bank.path, copy)
    places = open_bank(copy).places(1)
    evict(places.files)
    return places


def evict(files: tuple[Path, ...]) -> None:
    """Puts files out of the page cache; pages that the kernel has in hand take it some tries."""
    for path in files:
        path.read_bytes()
        for _ in range(200):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            if not cached_pages(path):
                break
            time.sleep(0.02)
        else:
            pytest.skip(f"the kernel keeps pages of {path} whatever it is told")


def cached_pages(path: Path) -> int:
    """Pages of a file that are in memory, as the kernel tells without fetching any."""
    mapped = np.memmap(path, np.uint8, "r")
    flags = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (mapped, flags))
    address, out = pointers
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapped)), out) == 0
    return int((flags & 1).sum())


def test_pages_that_are_in_memory_are_counted(bank: Bank, tmp_path: Path) -> None:
    places = fresh_places(bank, tmp_path / "x.bank")
    one_a_file = np.array([3, 20, 36])
    assert resident_share(places, one_a_file) == 0.0
    assert resident_share(places, np.arange(40)) == 0.0  # looking fetches nothing
    places.files[1].read_bytes()
    assert resident_share(places, one_a_file) == 1 / 3
    for path in places.files:
        path.read_bytes()
    assert resident_share(places, np.arange(40)) == 1.0
    assert resident_share(places, one_a_file[:0]) is None


def test_free_memory_is_known_here() -> None:
    assert 2**20 < free_memory_bytes() < 2**50
