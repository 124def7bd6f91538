"""Removes banks: of this disk at once, elsewhere seal first, so that no half of one is opened."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.bank.card import parse_attributes, read_attributes
from patchbank.pipeline.bank.commit import SEAL_LOCK, WORK, live_attempts
from patchbank.pipeline.bank.growth import next_folder
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.errors import BankError, BankNotFound, PatchbankError, StoreError
from patchbank.pipeline.sharing.catalogue import withdraw
from patchbank.pipeline.sharing.folder_store import DRAFTS, FolderStore
from patchbank.pipeline.sharing.listing import FOLDER
from patchbank.pipeline.sharing.pins import is_pinned
from patchbank.pipeline.sharing.pull import PULLING
from patchbank.pipeline.sharing.remote_seal import CARD, MOST_CARD_BYTES
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import with_retries

PARTS = frozenset(
    {CARD, SEAL, "layers", "commits", "golden", "clips.parquet", "notes", "parts", WORK}
)
"""What lies directly in a bank's folder."""
REMOVED_AT_ONCE = 500


@dataclass(frozen=True)
class Doomed:
    """A bank that is to be removed, for the question."""

    place: str
    clips: str
    """Their number, or that it is unknown."""
    n_bytes: int


def local_doomed(bank: Path, cache: Path) -> Doomed:
    """What would be lost with a bank of this disk.

    Raises `PatchbankError` for what may not be removed: no bank, a link, a pinned bank, one that
    a process works on.
    """
    if bank.is_symlink():
        raise PatchbankError(f"{bank} is a link to {bank.readlink()}; remove the link with rm")
    n_clips = _local_clips(bank)
    _refuse_pinned(FolderStore(bank), cache)
    if (work := work_under_way(bank)) is not None:
        raise PatchbankError(f"{work} {bank} now; stop it first")
    return Doomed(str(bank), n_clips, tree_bytes(bank))


def _refuse_pinned(bank: Store, cache: Path) -> None:
    if is_pinned(bank, cache):
        raise PatchbankError(
            f"{bank.url} is pinned; if it may go, `patchbank bank pin {bank.url} --remove` first"
        )


def _local_clips(bank: Path) -> str:
    try:
        return str(sum(read_attributes(bank)["card"]["generations"]))
    except (BankError, KeyError, TypeError) as error:
        # What `verify` and `pull` say to remove must be removable.
        is_half = (bank / "commits").is_dir() and (bank / "layers").is_dir()
        if not (is_half or (bank / PULLING).is_file()):
            if isinstance(error, BankError):
                raise
            raise BankNotFound(f"{bank} is no bank") from error
        return "an unknown number of"


def work_under_way(bank: Path) -> str | None:
    """What a live process does in a bank's folder, as the beginning of a sentence."""
    if working := live_attempts(bank) | live_attempts(next_folder(bank)):
        return f"an extraction ({len(working)} shards under way) works on"
    for folder in (bank, next_folder(bank)):
        if is_held(folder / WORK / SEAL_LOCK):
            return "another process, a pull or one that seals, works on"
    if any(is_held(draft) for draft in (bank / DRAFTS).glob("put.*")):
        return "a push writes to"
    return None


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock; False where there is none, or the disk has no locks."""
    with suppress(OSError):
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; no link is followed."""
    n_bytes = 0
    for path, _, files in os.walk(folder):
        for name in files:
            # A process may rename and remove files meanwhile.
            with suppress(FileNotFoundError):
                n_bytes += Path(path, name).lstat().st_size
    return n_bytes


def remove_tree(folder: Path) -> None:
    """Removes a folder that looks like a bank; cut short, it leaves a hidden one that does not."""
    place = folder.absolute()
    doomed = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    place.rename(doomed)
    shutil.rmtree(doomed)


def remove_local(bank: Path) -> None:
    """Removes a bank of this disk, and its entry where its folder has a catalogue."""
    place = bank.absolute()
    remove_tree(place)
    if (place.parent / FOLDER).is_dir():
        withdraw(FolderStore(place.parent), place.name)


def stored_doomed(bank: Store, cache: Path) -> Doomed:
    """What would be lost with a bank elsewhere; raises like `local_doomed`, and `StoreError` where
    nothing can be removed."""
    if not (bank.is_writable and bank.can_list):
        raise StoreError(f"{bank.url} can only be read; remove it where it can be written to")
    sizes = bank_files(with_retries(bank.sizes))
    n_clips = stored_clips(bank, sizes)
    if n_clips is None:
        raise BankNotFound(f"no bank at {bank.url}; `patchbank bank ls` lists what there is")
    _refuse_pinned(bank, cache)
    return Doomed(bank.url, n_clips, sum(sizes.values()))


def bank_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of the files of a folder, those that a bank may have."""
    return {name: size for name, size in sizes.items() if name.split("/")[0] in PARTS}


def stored_clips(bank: Store, sizes: Mapping[str, int]) -> str | None:
    """How many clips a bank, or half of one, has, for the question; None where it is none."""
    card = None
    if CARD in sizes:
        card = with_retries(lambda: bank.document(CARD, most_bytes=MOST_CARD_BYTES))
    try:
        return str(sum(parse_attributes(card or b"", where=bank.url)["card"]["generations"]))
    except (BankError, KeyError, TypeError) as error:
        tops = {name.split("/")[0] for name in sizes}
        is_foreign = isinstance(error, BankNotFound)
        return "an unknown number of" if {"layers", "commits"} <= tops and not is_foreign else None


def remove_stored(
    bank: Store, *, of: tuple[Store, str], progress: Callable[[int, int], None] | None = None
) -> None:
    """Removes a bank elsewhere; `of` is the folder that it lies in, and its name there."""
    with_retries(lambda: bank.remove([SEAL]))
    # The card last: as long as there is anything, it says what that is.
    names = sorted(bank_files(with_retries(bank.sizes)), key=lambda name: (name == CARD, name))
    for first in range(0, len(names), REMOVED_AT_ONCE):
        some = names[first : first + REMOVED_AT_ONCE]
        with_retries(lambda some=some: bank.remove(some))  # type: ignore[misc]
        if progress is not None:
            progress(min(len(names), first + REMOVED_AT_ONCE), len(names))
    withdraw(*of)
