"""Removes banks: of this disk at once, elsewhere seal first, so that no half of one is opened."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from patchbank.pipeline.bank.card import parse_attributes
from patchbank.pipeline.bank.commit import SEAL_LOCK, WORK, is_held, live_attempts
from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.growth import next_folder
from patchbank.pipeline.bank.seal_record import NO_JSON, SEAL, file_record, parse_json
from patchbank.pipeline.bank.sealed_names import RECORDED_FOLDERS
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankNotFound,
    PatchbankError,
    StoreError,
)
from patchbank.pipeline.sharing.catalogue import withdraw
from patchbank.pipeline.sharing.claim import read_claim
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
UNKNOWN = "an unknown number of"
MOST_RECORDS, MOST_RECORD_BYTES = 16, 4 * 2**20
"""So many commit records are read of a bank whose card is damaged, and so much of each."""


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
    a process works on, one with files of something else in it.
    """
    if bank.is_symlink():
        raise PatchbankError(f"{bank} is a link to {bank.readlink()}; remove the link with rm")
    clips = known_clips(FolderStore(bank))
    if clips is None and not (bank / PULLING).is_file():
        raise BankNotFound(
            f"no bank at {bank}: neither its {CARD} nor a record in commits/ tells of one"
        )
    _refuse_strangers(bank)
    _refuse_pinned(FolderStore(bank), cache)
    if (work := work_under_way(bank)) is not None:
        raise PatchbankError(f"{work} {bank} now; stop it first")
    return Doomed(str(bank), clips or UNKNOWN, tree_bytes(bank))


def _refuse_pinned(bank: Store, cache: Path) -> None:
    if is_pinned(bank, cache):
        raise PatchbankError(
            f"{bank.url} is pinned; if it may go, `patchbank bank pin {bank.url} --remove` first"
        )


def strangers(bank: Path) -> list[str]:
    """What lies directly in a bank's folder and is nothing that a bank has there."""
    return sorted({path.name for path in bank.iterdir()} - PARTS)


def _refuse_strangers(bank: Path) -> None:
    if names := strangers(bank):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise PatchbankError(
            f"{bank} holds {shown(names[0])}{more}, which no bank has; move that elsewhere first"
        )


def work_under_way(bank: Path) -> str | None:
    """What a live process does in a bank's folder, as the beginning of a sentence."""
    if working := live_attempts(bank) | live_attempts(next_folder(bank)):
        return f"an extraction ({len(working)} shards under way) works on"
    for folder in (bank, next_folder(bank)):
        if is_held(folder / WORK / SEAL_LOCK):
            return "another process, a pull or one that seals, works on"
    if any(is_held(draft) for draft in (bank / DRAFTS).glob("put.*")):
        return "a push writes to"
    staged = bank.absolute().parent.glob(f".{escape(bank.absolute().name)}.pull-*")
    if any(is_held(folder / WORK / SEAL_LOCK) for folder in staged):
        return "a pull of a part works on"
    return None


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
    """Removes a bank of this disk, and its entry where its folder has a catalogue.

    Raises `PatchbankError` where files of something else have come into it.
    """
    place = bank.absolute()
    _refuse_strangers(place)
    remove_tree(place)
    if (place.parent / FOLDER).is_dir():
        withdraw(FolderStore(place.parent), place.name)


def stored_doomed(bank: Store, cache: Path) -> Doomed:
    """What would be lost with a bank elsewhere; raises like `local_doomed`, and `StoreError` where
    nothing can be removed."""
    if not (bank.is_writable and bank.can_list):
        raise StoreError(f"{bank.url} can only be read; remove it where it can be written to")
    sizes = bank_files(with_retries(bank.sizes))
    clips = known_clips(bank) if sizes else None
    if clips is None:
        raise BankNotFound(f"no bank at {bank.url}; `patchbank bank ls` lists what there is")
    _refuse_pinned(bank, cache)
    return Doomed(bank.url, clips, sum(sizes.values()))


def bank_files(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of the files of a folder, those that a bank may have."""
    return {name: size for name, size in sizes.items() if name.split("/")[0] in PARTS}


def known_clips(bank: Store) -> str | None:
    """How many clips a bank, or half of one, has, for the question; None where it is none.

    Where the card is damaged or missing, a commit record or the claim of a push has to tell that it
    is a bank. Raises `BankError` for a newer format.
    """
    size = with_retries(lambda: bank.size(CARD))
    if size is not None and size > MOST_CARD_BYTES:
        return None
    try:
        content = with_retries(lambda: bank.document(CARD, most_bytes=MOST_CARD_BYTES))
        return str(sum(parse_attributes(content or b"", where=bank.url)["card"]["generations"]))
    except BankNotFound:
        return None  # a Zarr group of something else
    except (BankCorrupt, KeyError, TypeError):
        return UNKNOWN if _has_record(bank.below("commits")) or _is_claimed(bank) else None


def _has_record(commits: Store) -> bool:
    sizes = with_retries(commits.sizes)
    names = sorted(name for name, size in sizes.items() if size <= MOST_RECORD_BYTES)
    documents = (
        with_retries(lambda name=name: commits.document(name, most_bytes=MOST_RECORD_BYTES))  # type: ignore[misc]
        for name in names[:MOST_RECORDS]
    )
    return any(_is_record(content or b"") for content in documents)


def _is_claimed(bank: Store) -> bool:
    """Whether a push has begun, which may not have sent a card yet."""
    try:
        return read_claim(bank) is not None
    except StoreError as error:
        if error.may_pass:
            raise
        return False


def _is_record(content: bytes) -> bool:
    try:
        files = parse_json(content)["files"]
        return bool([file_record(file, folders=RECORDED_FOLDERS) for file in files])
    except (KeyError, TypeError, *NO_JSON):
        return False


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
