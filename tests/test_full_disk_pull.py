"""A disk that fills up while a bank arrives, and a place that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_full_disk import Disk, disk  # noqa: F401

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankError, StoreError
from patchbank.pipeline.sharing import pull
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.pull import pull_bank
from patchbank.pipeline.sharing.push import push_bank


def test_a_pull_that_does_not_fit_is_refused_before_it_begins(
    disk: Disk,  # noqa: F811
    sealed: Bank,
) -> None:
    disk.fill()
    with pytest.raises(BankError, match=r"needs .* more, and 0 B are free .*--pooled-only"):
        pull_bank(FolderStore(sealed.path), disk.place / "x.bank")
    assert not (disk.place / "x.bank" / "seal.json").exists()


def test_a_disk_that_fills_up_during_a_pull_leaves_what_has_come(
    disk: Disk,  # noqa: F811
    sealed: Bank,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pull, "SPARE_BYTES", 0)
    monkeypatch.setattr(pull, "_check_space", lambda out, n_bytes: None)
    out = disk.place / "x.bank"
    whole = sealed.seal.bank_bytes
    disk.resize(f"{whole * 6 // 10 // 1024}k")
    with pytest.raises(BankError, match=r"No space left .*run the same command again"):
        pull_bank(FolderStore(sealed.path), out)
    assert not (out / "seal.json").exists()
    here = {path: path.stat().st_ino for path in out.glob("layers/*/*/c.*")}
    assert here
    disk.resize("64m")
    assert verify_bank(pull_bank(FolderStore(sealed.path), out).path) == ()
    assert {path: path.stat().st_ino for path in here} == here


def test_a_push_onto_a_full_disk_says_so_and_goes_on_later(
    disk: Disk,  # noqa: F811
    sealed: Bank,
) -> None:
    there = FolderStore(disk.place / "x.bank")
    disk.resize(f"{sealed.seal.bank_bytes * 6 // 10 // 1024}k")
    with pytest.raises(StoreError, match=r"cannot be written: No space left .*free some space"):
        push_bank(sealed.path, there)
    assert not (there.folder / "seal.json").exists()
    disk.resize("64m")
    push_bank(sealed.path, there)
    assert verify_bank(there.folder) == ()


def test_a_place_that_cannot_be_written_is_named(sealed: Bank, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        push_bank(sealed.path, FolderStore(tmp_path / "file" / "x.bank"))
