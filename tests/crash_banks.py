"""What tests of killed and concurrent runs share: tables, undisturbed banks, and what must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from audio_sets import write_clip_set
from killable import Forks

SHORT, LONG, OTHER = "short.csv", "long.csv", "other.csv"
N_CLIPS = {SHORT: 112, LONG: 160}
"""16 rows a shard: seven shards, then three more."""


@dataclass(frozen=True)
class Undisturbed:
    """Tables, and the banks that nobody disturbed."""

    folder: Path
    forks: Forks

    def table(self, name: str) -> Path:
        return self.folder / "set" / name

    @property
    def short_bank(self) -> Path:
        return self.folder / "short.bank"

    @property
    def short(self) -> bytes:
        """seal.json of the bank of SHORT."""
        return (self.short_bank / "seal.json").read_bytes()

    @property
    def long(self) -> bytes:
        """seal.json of that bank after it has grown to LONG."""
        return (self.folder / "long.bank/seal.json").read_bytes()


def make_undisturbed(folder: Path) -> Iterator[Undisturbed]:
    """The value of a module's fixture."""
    everything = write_clip_set(folder / "set", n_clips=N_CLIPS[LONG])
    head, *rows = everything.read_text().splitlines(keepends=True)
    (folder / "set" / SHORT).write_text("".join([head, *rows[: N_CLIPS[SHORT]]]))
    (folder / "set" / LONG).write_text("".join([head, *rows]))
    # The clips of SHORT and the last ones of LONG: neither holds the other.
    (folder / "set" / OTHER).write_text("".join([head, *rows[: N_CLIPS[SHORT]], *rows[-20:]]))
    with Forks(folder / "runs") as forks:
        base = Undisturbed(folder, forks)
        forks.finish(base.table(SHORT), base.short_bank)
        forks.finish(base.table(SHORT), folder / "long.bank")
        forks.finish(base.table(LONG), folder / "long.bank")
        yield base


def n_committed(folder: Path) -> int:
    """Shards with a record."""
    return len(list((folder / "commits").glob("0*.json")))


def shards_begun(changes: str) -> list[str]:
    """The shards that a process has begun whose changes are listed, each as often as it did."""
    attempts = set(re.findall(r"(?m)^os\.mkdir .*/\.work/(0\w+\.\w+)$", changes))
    return [attempt.partition(".")[0] for attempt in attempts]


def phase_of(bank: Path) -> str:
    """How far a bank and its growth are."""
    growth = bank / ".work/next"
    sealed = (bank / "seal.json").exists()
    if not (bank / "zarr.json").exists():
        return "nothing there"
    if not sealed and (growth / "seal.json").exists():
        return "growth: moving in"
    if not sealed:
        return _of_commits(bank, n_shards=N_CLIPS[SHORT] // 16)
    if not (growth / "zarr.json").exists():
        return "sealed"
    if (growth / "seal.json").exists():
        return "growth: moving in"
    return "growth: " + _of_commits(growth, n_shards=(N_CLIPS[LONG] - N_CLIPS[SHORT]) // 16)


def _of_commits(folder: Path, *, n_shards: int) -> str:
    n = n_committed(folder)
    if n == n_shards:
        return "sealing"
    return "between commits" if n else "before a commit"


Identity = tuple[int, int]


def committed_files(bank: Path) -> dict[str, Identity]:
    """Inode and time of every commit record and of what it names, in a bank and its growth."""
    found: dict[str, Identity] = {}
    folders = [bank, bank / ".work/next"]
    for folder in folders:
        for record in (folder / "commits").glob("*.json"):
            found[f"commits/{record.name}"] = _identity(record)
            names = [file["path"] for file in json.loads(record.read_bytes())["files"]]
            for place in (place / name for place in folders for name in names):
                if place.is_file() and "/parts/" not in str(place):
                    found[place.relative_to(bank).as_posix().removeprefix(".work/next/")] = (
                        _identity(place)
                    )
    return found


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def check_after_a_kill(bank: Path, before: dict[str, Identity], seals: set[bytes]) -> None:
    """A bank is not sealed, or sealed right; what was committed is still the same."""
    from patchbank.pipeline.bank import open_bank
    from patchbank.pipeline.bank.verify import verify_bank
    from patchbank.pipeline.errors import BankIncomplete, BankNotFound

    after = committed_files(bank)
    redone = [name for name, identity in before.items() if after.get(name) != identity]
    assert redone == []
    if not (bank / "seal.json").exists():
        with pytest.raises((BankIncomplete, BankNotFound)):
            open_bank(bank)
    else:
        assert (bank / "seal.json").read_bytes() in seals
        open_bank(bank)
        assert verify_bank(bank) == ()


def check_finished(bank: Path, seal: bytes) -> None:
    """The bank is what an undisturbed run makes, and nothing else is left."""
    from patchbank.pipeline.bank.verify import verify_bank

    assert (bank / "seal.json").read_bytes() == seal
    assert verify_bank(bank) == ()
    assert not (bank / ".work").exists()
    assert not (bank / "parts").exists()
