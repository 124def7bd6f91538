"""What banks there are at a place: one or two listings, one file, and what that file lacks.

`catalogue.json` is believed where the store cannot list, elsewhere only where a listed file in
`catalogue/` is as large as the entry there. A bank without an entry is read itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from patchbank.pipeline.bank.seal_record import NO_JSON, SEAL, parse_json
from patchbank.pipeline.errors import BankCorrupt, NotInStore, PatchbankError, StoreError
from patchbank.pipeline.sharing.described import Row, read_row, with_claims
from patchbank.pipeline.sharing.entry import (
    MOST_ENTRY_BYTES,
    VERSION,
    Entry,
    entry_bytes,
    parse_entry,
    parse_entry_file,
)
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import with_retries

Item = TypeVar("Item")
Result = TypeVar("Result")
Step = Callable[[int, int], None]
"""Told how many banks are done, and of how many."""
FOLDER, WHOLE = "catalogue", "catalogue.json"
MOST_WHOLE_BYTES = 64 * 2**20
READS_AT_ONCE = 16
TAIL_BYTES = 256
"""The end of seal.json that holds the root hash."""


@dataclass(frozen=True)
class Listing:
    """What a store says that it holds."""

    banks: tuple[str, ...]
    """Folders that may be banks."""
    files: Mapping[str, Mapping[str, int]]
    """Sizes of the files of entries, by name of the bank and name of the file."""


def list_store(banks: Store) -> Listing:
    """Two listings, neither of them deep."""
    files: dict[str, dict[str, int]] = {}
    for file, size in with_retries(banks.below(FOLDER).sizes).items():
        name, at, _ = file.rpartition("@")
        if at and "/" not in file and file.endswith(".json"):
            files.setdefault(name, {})[file] = size
    return Listing(tuple(_folders(banks)), files)


def _folders(banks: Store) -> list[str]:
    if isinstance(banks, FolderStore) and banks.folder.is_dir():
        # Somebody's banks on another disk may be links here.
        with os.scandir(banks.folder) as entries:
            found = sorted(entry.name for entry in entries if entry.is_dir())
    else:
        found = list(with_retries(banks.folders))
    return [name for name in found if name != FOLDER and not name.startswith(".")]


def read_catalogue(banks: Store, *, progress: Step | None = None) -> list[Row]:
    """The banks at a place, sorted by name; those that cannot be read with their reason.

    Raises `StoreError` where the store can neither list nor has a catalogue.
    """
    if not banks.can_list:
        return _rows_of_whole(banks)
    listing = list_store(banks)
    known = known_entries(banks) if listing.files else {}

    def row(name: str) -> Row | None:
        return _row(banks, name, listing.files.get(name, {}), known)

    rows = in_parallel_order(row, listing.banks, progress)
    return [row for row in rows if row is not None]


def _row(
    banks: Store, name: str, files: Mapping[str, int], known: Mapping[str, Entry]
) -> Row | None:
    entries, reasons = entries_in(banks, files, known)
    if len(entries) == 1 and not reasons and _is_current(banks, entries[0]):
        return Row(name, entries[0], is_indexed=True)
    row = read_row(banks, name)
    if row is None or row.entry is None or not row.entry.is_sealed:
        return row
    is_indexed = any(entry.root_sha256 == row.entry.root_sha256 for entry in entries)
    problem = f"its entry in the catalogue is damaged: {reasons[0]}" if reasons else None
    return Row(name, with_claims(row.entry, entries), problem, is_indexed)


def _is_current(banks: Store, entry: Entry) -> bool:
    """Whether a bank on this disk has the seal that an entry tells of; elsewhere a look at each
    would take longer than all the rest, and who pushes another bank writes another entry."""
    if not isinstance(banks, FolderStore):
        return True
    try:
        with (banks.folder / entry.name / SEAL).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            return entry.root_sha256.encode() in file.read(TAIL_BYTES)
    except OSError:
        return False


def entries_in(
    banks: Store, files: Mapping[str, int], known: Mapping[str, Entry]
) -> tuple[list[Entry], list[str]]:
    """The entries in some files, and what is wrong with the others."""
    entries, reasons = [], []
    for file, size in files.items():
        # Of another size, it was written again since.
        if file in known and len(entry_bytes(known[file])) == size:
            entries.append(known[file])
            continue
        try:
            entries.append(_read_entry(banks, file))
        except NotInStore:
            continue  # replaced by a newer one since it was listed
        except (PatchbankError, OSError, *NO_JSON) as error:
            reasons.append(str(error)[:200])
    return entries, reasons


def _read_entry(banks: Store, file: str) -> Entry:
    content = with_retries(lambda: banks.document(f"{FOLDER}/{file}", most_bytes=MOST_ENTRY_BYTES))
    if content is None:
        raise NotInStore(f"{banks.url} has no file {FOLDER}/{file}")
    entry = parse_entry_file(content)
    if entry.file_name != file:
        raise ValueError("it is of another bank than its file's name says")
    return entry


def known_entries(banks: Store) -> dict[str, Entry]:
    """What catalogue.json holds, by names of files; nothing where it is damaged."""
    found: dict[str, Entry] = {}
    try:
        documents = _whole(banks) or []
    except (PatchbankError, OSError):
        return {}
    for document in documents:
        with suppress(*NO_JSON):
            entry = parse_entry(document)
            found[entry.file_name] = entry
    return found


def _whole(banks: Store) -> list[object] | None:
    """The list in catalogue.json, its members unchecked; None where there is no such file."""
    content = with_retries(lambda: banks.document(WHOLE, most_bytes=MOST_WHOLE_BYTES))
    if content is None:
        return None
    try:
        document = parse_json(content)
        if document["version"] != VERSION or not isinstance(document["entries"], list):
            raise ValueError("it is of another version")
        return list(document["entries"])
    except (KeyError, TypeError, *NO_JSON) as error:
        raise BankCorrupt(
            f"{banks.url}/{WHOLE} is damaged ({str(error)[:200]}); who may write there makes it "
            "anew: `patchbank bank ls --rebuild`"
        ) from error


def _rows_of_whole(banks: Store) -> list[Row]:
    documents = _whole(banks)
    if documents is None:
        raise StoreError(
            f"{banks.url} does not tell what it holds, and there is no {WHOLE}; who may write "
            "there makes it: `patchbank bank ls --rebuild`"
        )
    rows = []
    for document in documents:
        try:
            entry = parse_entry(document)
            rows.append(Row(entry.name, entry, is_indexed=True))
        except NO_JSON as error:
            rows.append(Row("(damaged)", None, f"an entry is damaged: {str(error)[:200]}"))
    return sorted(rows, key=lambda row: row.name)


def in_parallel_order(
    work: Callable[[Item], Result], items: Sequence[Item], progress: Step | None
) -> list[Result]:
    """The results of some reads, in the order of `items`."""
    results = []
    with ThreadPoolExecutor(READS_AT_ONCE, thread_name_prefix="catalogue") as pool:
        for result in pool.map(work, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    return results
