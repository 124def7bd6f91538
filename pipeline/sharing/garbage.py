"""What was left behind in a folder of banks, and may go.

Nothing goes that a process works on, that is pinned, that was touched of late, or that is no bank.
What is judged here is judged again at the moment when it is removed.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from patchbank.pipeline.bank.commit import (
    SEAL_LOCK,
    WORK,
    clear_dead_attempts,
    dead_attempts,
    is_held,
    live_attempts,
    owning,
)
from patchbank.pipeline.bank.growth import next_folder
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.errors import BankError, StoreError
from patchbank.pipeline.sharing.folder_store import DRAFTS, FolderStore
from patchbank.pipeline.sharing.listing import FOLDER
from patchbank.pipeline.sharing.pins import PIN
from patchbank.pipeline.sharing.pull import PULLING
from patchbank.pipeline.sharing.remote_seal import CARD
from patchbank.pipeline.sharing.removal import (
    PARTS,
    known_clips,
    remove_tree,
    strangers,
    tree_bytes,
    work_under_way,
)
from patchbank.pipeline.sharing.store import Store

SOON_S = 3_600.0
"""What nobody can go on with is kept so long: its process may be stopped, not dead."""
LEFT_BEHIND = re.compile(r"\..+\.[0-9a-f]{32}")
"""A removal that was cut short, or the beginning of a bank."""
DRAFT_NAMES = f"put.{'[0-9a-f]' * 32}"
STAGED = re.compile(r"\..+\.pull-[0-9a-f]{16}")
"""What a partial pull has fetched."""


@dataclass(frozen=True)
class Garbage:
    """Something that was left behind."""

    place: str
    reason: str
    n_bytes: int
    remove: Callable[[], bool] | None
    """Removes it unless it has come to life meanwhile; None for what is only named."""


@dataclass(frozen=True)
class Limits:
    """How careful to be."""

    older_than_s: float = 7 * 86_400.0
    """Unfinished banks that were touched since are kept."""
    extractions: bool = False
    """Whether extractions that were interrupted go, too; else they are only named."""


def find_garbage(folder: Path, limits: Limits) -> list[Garbage]:
    """What was left behind in a folder of banks, or in one bank."""
    found = list(_drafts(folder))
    is_bank = any((folder / name).exists() for name in (CARD, SEAL, PULLING))
    for place in [folder] if is_bank else sorted(_folders(folder)):
        found += _hidden(place, limits) if place.name.startswith(".") else _bank(place, limits)
        if not is_bank and not place.name.startswith("."):
            found += _drafts(place)
    return found


def _folders(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and entry.name not in (FOLDER, DRAFTS):
                yield Path(entry.path)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def idle_s(folder: Path) -> float:
    """Seconds since anything below a folder was written."""
    newest = folder.lstat().st_mtime
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                newest = max(newest, Path(path, name).lstat().st_mtime)
    return time.time() - newest


def _hidden(place: Path, limits: Limits) -> Iterator[Garbage]:
    """Folders beside banks that a process made, and died before it removed or renamed them."""
    names = _names(place)
    if LEFT_BEHIND.fullmatch(place.name) and names <= PARTS:
        reason, least_s = "a removal, or the beginning of a bank, that was cut short", SOON_S
    elif STAGED.fullmatch(place.name) and (WORK in names or not names):
        reason, least_s = "fetched for a partial pull that never finished", limits.older_than_s
    else:
        return

    def may_go() -> bool:
        with suppress(FileNotFoundError):
            return not is_held(place / WORK / SEAL_LOCK) and idle_s(place) >= least_s
        return False

    def remove() -> bool:
        if is_still_so := may_go():
            shutil.rmtree(place)
        return is_still_so

    if may_go():
        yield Garbage(str(place), f"{reason}, {age(place)}", tree_bytes(place), remove)


def age(folder: Path) -> str:
    """How long ago something was touched."""
    return readable_age(idle_s(folder))


def readable_age(seconds: float) -> str:
    """As a part of a sentence, in the largest unit that there is one of."""
    for unit_s, unit in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if (n := int(seconds // unit_s)) >= 1:
            return f"untouched for {n} {unit}{'s' * (n > 1)}"
    return "untouched for less than a minute"


def _drafts(folder: Path) -> Iterator[Garbage]:
    """Files on their way into a folder, whose push is dead."""
    drafts = folder / DRAFTS
    if drafts.is_symlink():
        return

    def old() -> list[Path]:
        now_s = time.time()
        found = []
        for path in drafts.glob(DRAFT_NAMES):
            with suppress(FileNotFoundError):
                if now_s - path.lstat().st_mtime >= SOON_S and not is_held(path):
                    found.append(path)
        return found

    def remove() -> bool:
        files = old()
        for path in files:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            drafts.rmdir()
        return bool(files)

    if files := old():
        n_bytes = sum(path.lstat().st_size for path in files)
        reason = f"half-written by pushes that were cut short: {len(files)}"
        yield Garbage(str(drafts), reason, n_bytes, remove)


def _bank(bank: Path, limits: Limits) -> Iterator[Garbage]:
    if (bank / PIN).exists() or work_under_way(bank) is not None:
        return
    if (bank / SEAL).is_file():
        if is_known_bank(FolderStore(bank)):
            yield from _leftovers(bank)
            yield from _growth(bank, limits)
        return
    state = _state(bank)
    if state is None:
        return
    reason, may_go = state
    if not may_go and not limits.extractions:
        advice = "the same command goes on with it; --extractions removes it"
        yield Garbage(str(bank), f"{reason}, {age(bank)}: {advice}", tree_bytes(bank), None)
    elif idle_s(bank) >= limits.older_than_s:
        remove = partial(_remove_unsealed, bank, limits)
        yield Garbage(str(bank), f"{reason}, {age(bank)}", tree_bytes(bank), remove)


def is_known_bank(bank: Store) -> bool:
    """Whether a folder is a bank, or half of one, of a format that this version knows."""
    with suppress(BankError, StoreError):
        return known_clips(bank) is not None
    return False


def _state(bank: Path) -> tuple[str, bool] | None:
    """What an unsealed folder is, and whether it is garbage; None where it is no bank, has files of
    something else in it, or will be whole again by itself."""
    if (next_folder(bank) / SEAL).is_file() or strangers(bank):
        return None
    names = _names(bank)
    if (bank / PULLING).is_file():
        return "a pull that never finished", True
    if names == {WORK} and _names(bank / WORK) <= {SEAL_LOCK, "pull"}:
        return "a pull that never began", True
    if not is_known_bank(FolderStore(bank)):
        return None
    work = [path for path in (bank / WORK).glob("*") if not path.match(DRAFT_NAMES)]
    if work or "parts" in names:
        return "an extraction, or another making of a bank, that was interrupted", False
    return "a push that never finished", True


def _remove_unsealed(bank: Path, limits: Limits) -> bool:
    with suppress(FileNotFoundError):
        if (bank / SEAL).is_file() or work_under_way(bank) is not None:
            return False
        # Measured before the lock, which touches the folder that it lies in.
        if idle_s(bank) < limits.older_than_s:
            return False
        with owning(bank):
            if (bank / SEAL).is_file() or _others_work_in(bank) or strangers(bank):
                return False
            remove_tree(bank)
        return True
    return False


def _others_work_in(bank: Path) -> bool:
    """Whether a process works in a bank that this one owns."""
    return bool(live_attempts(bank) | live_attempts(next_folder(bank)))


def _leftovers(bank: Path) -> Iterator[Garbage]:
    """What dead processes left in a sealed bank."""

    def stray() -> list[Path]:
        names = re.compile(r"pull|pull\.seal\.json|seal\.json|[0-9a-f]{32}")
        now_s = time.time()
        found = dead_attempts(bank)
        for path in (bank / WORK).glob("*"):
            if names.fullmatch(path.name) and now_s - path.lstat().st_mtime >= SOON_S:
                found.append(path)
        return found

    def remove() -> bool:
        if not (bank / SEAL).is_file() or work_under_way(bank) is not None:
            return False
        with owning(bank):
            for path in stray():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            clear_dead_attempts(bank)
        return True

    if paths := stray():
        n_bytes = sum(tree_bytes(p) if p.is_dir() else p.lstat().st_size for p in paths)
        yield Garbage(str(bank / WORK), "work of processes that died", n_bytes, remove)


def _growth(bank: Path, limits: Limits) -> Iterator[Garbage]:
    """The new shards of a sealed bank whose growth was broken off."""
    work = next_folder(bank)
    if not work.is_dir() or (work / SEAL).is_file():
        return
    is_pull = (work / PULLING).is_file()
    what = "pull of its growth" if is_pull else "growth"
    reason = f"a {what} that was broken off, {age(work)}; the bank itself is whole"
    if not is_pull and not limits.extractions:
        advice = "the same command goes on with it; --extractions removes it"
        yield Garbage(str(work), f"{reason}: {advice}", tree_bytes(work), None)
    elif idle_s(work) >= limits.older_than_s:
        yield Garbage(str(work), reason, tree_bytes(work), partial(_remove_growth, bank, limits))


def _remove_growth(bank: Path, limits: Limits) -> bool:
    work = next_folder(bank)
    with suppress(FileNotFoundError):
        if work_under_way(bank) is not None or idle_s(work) < limits.older_than_s:
            return False
        with owning(bank):
            if (work / SEAL).is_file() or _others_work_in(bank):
                return False
            shutil.rmtree(work)
        return True
    return False
