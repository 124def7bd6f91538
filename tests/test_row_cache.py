"""What is kept of banks elsewhere: its limit, what goes first, and disks that take no more."""

from __future__ import annotations

import errno
import os
import subprocess
import warnings
from pathlib import Path

import pytest

from patchbank.pipeline.sharing.row_cache import (
    PINNED,
    URL,
    RowCache,
    bank_folder,
    cached_banks,
    remove_cached,
    shrink,
)

PAGE = 4_096
ONE, OTHER = "1" * 64, "2" * 64


def shard(cache: Path, root: str, number: int) -> Path:
    return bank_folder(cache, root) / f"layers/1/patches/c.{number}.0.0"


def put(path: Path, n_pages: int, *, used_s: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(n_pages * PAGE))
    os.utime(path, (used_s, used_s))
    return path


def disk_bytes(cache: Path) -> int:
    return sum(bank.bytes for bank in cached_banks(cache))


def test_what_was_kept_is_read_and_what_was_not_is_not(tmp_path: Path) -> None:
    cache, path, memory = RowCache(tmp_path, 2**20), shard(tmp_path, ONE, 0), bytearray(PAGE)
    assert not cache.read(path, 0, memoryview(memory))
    cache.keep(path, 3 * PAGE, b"a" * PAGE)
    assert cache.read(path, 3 * PAGE, memoryview(memory))
    assert memory == b"a" * PAGE
    assert not cache.read(path, 3 * PAGE + 1, memoryview(memory))
    assert path.stat().st_size == 4 * PAGE
    assert disk_bytes(tmp_path) == PAGE  # sparse


def test_the_least_recently_used_shards_go_first(tmp_path: Path) -> None:
    files = [put(shard(tmp_path, ONE, n), 2, used_s=1_000.0 - n) for n in range(4)]
    assert shrink(tmp_path, 4 * PAGE) == 4 * PAGE
    assert [path.exists() for path in files] == [True, True, False, False]
    assert shrink(tmp_path, 4 * PAGE) == 4 * PAGE
    assert shrink(tmp_path, 0) == 0


def test_reading_a_shard_keeps_it(tmp_path: Path) -> None:
    old, newer = (put(shard(tmp_path, ONE, n), 1, used_s=1_000.0 + n) for n in range(2))
    assert RowCache(tmp_path, 2**20).read(old, 0, memoryview(bytearray(PAGE)))
    shrink(tmp_path, PAGE)
    assert old.exists()
    assert not newer.exists()


def test_pinned_banks_and_small_files_in_use_stay(tmp_path: Path) -> None:
    pinned = put(shard(tmp_path, ONE, 0), 1, used_s=1.0)
    (bank_folder(tmp_path, ONE) / PINNED).touch()
    other = put(shard(tmp_path, OTHER, 0), 1, used_s=2.0)
    clips = bank_folder(tmp_path, OTHER) / "clips.parquet"
    clips.write_bytes(bytes(PAGE))
    assert shrink(tmp_path, 0) == 2 * PAGE
    assert pinned.exists()
    assert clips.exists()
    assert not other.exists()
    os.utime(clips, (2.0, 2.0))
    shrink(tmp_path, 0)
    assert not clips.exists()


def test_cached_banks_are_listed_and_removed(tmp_path: Path) -> None:
    assert cached_banks(tmp_path / "nothing") == []
    put(shard(tmp_path, ONE, 0), 3, used_s=2_000.0)
    put(shard(tmp_path, OTHER, 0), 1, used_s=1_000.0)
    (bank_folder(tmp_path, OTHER) / PINNED).touch()
    url = bank_folder(tmp_path, ONE) / URL
    url.write_text("s3://team/x.bank")
    os.utime(url, (1.0, 1.0))
    (tmp_path / "banks/notes").mkdir()
    found = cached_banks(tmp_path)
    assert [(bank.root_sha256, bank.url, bank.pinned) for bank in found] == [
        (ONE, "s3://team/x.bank", False),
        (OTHER, "", True),
    ]
    assert (found[0].bytes, found[0].last_used_s) == (4 * PAGE, 2_000.0)
    remove_cached(tmp_path, ONE)
    remove_cached(tmp_path, ONE)
    assert [bank.root_sha256 for bank in cached_banks(tmp_path)] == [OTHER]
    with pytest.raises(ValueError, match="is no SHA-256"):
        remove_cached(tmp_path, "../" + OTHER)


def test_a_link_in_the_cache_is_not_followed(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside/c.0.0.0", 9, used_s=1.0)
    folder = bank_folder(tmp_path / "cache", ONE)
    (folder / "layers/1").mkdir(parents=True)
    (folder / "layers/1/patches").symlink_to(outside.parent)
    assert shrink(tmp_path / "cache", 0) <= PAGE
    remove_cached(tmp_path / "cache", ONE)
    assert outside.exists()


def test_the_limit_is_kept_and_the_latest_rows_are_there(tmp_path: Path) -> None:
    limit = 64 * PAGE
    cache = RowCache(tmp_path, limit)
    for number in range(300):
        path = shard(tmp_path, ONE, number // 4)
        cache.keep(path, number % 4 * PAGE, bytes([number % 251 + 1]) * PAGE)
        os.utime(path, (number + 1.0, number + 1.0))
        assert disk_bytes(tmp_path) <= limit
    memory = bytearray(PAGE)
    assert cache.read(shard(tmp_path, ONE, 74), 3 * PAGE, memoryview(memory))
    assert memory == bytes([299 % 251 + 1]) * PAGE
    assert not shard(tmp_path, ONE, 0).exists()
    assert disk_bytes(tmp_path) > limit // 2


@pytest.mark.parametrize("limit", [0, PAGE // 2])
def test_what_is_larger_than_the_limit_is_not_kept(limit: int, tmp_path: Path) -> None:
    cache, path = RowCache(tmp_path, limit), shard(tmp_path, ONE, 0)
    cache.keep(path, 0, bytes(PAGE))
    assert not path.exists()


def test_a_cache_that_cannot_be_written_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache, path = RowCache(tmp_path / "file", 2**20), shard(tmp_path / "file", ONE, 0)
    with pytest.warns(UserWarning, match=r"rows are not kept in .*/file \(Not a directory\)"):
        cache.keep(path, 0, bytes(PAGE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.keep(path, 0, bytes(PAGE))


def test_a_full_disk_is_no_failure(tmp_path: Path) -> None:
    line = ["mount", "-t", "tmpfs", "-o", f"size={16 * PAGE}", "tmpfs", str(tmp_path)]
    if (made := subprocess.run(line, capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"needs the right to mount: {made.stderr.strip()}")
    try:
        cache, path = RowCache(tmp_path, 2**30), shard(tmp_path, ONE, 0)
        with pytest.warns(UserWarning, match=os.strerror(errno.ENOSPC)):
            cache.keep(path, 0, b"a" * 32 * PAGE)
        memory = bytearray(PAGE)
        assert cache.read(path, 0, memoryview(memory))
        assert memory == b"a" * PAGE
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
