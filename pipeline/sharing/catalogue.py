"""The catalogue of a place: any writer can rebuild it, and nobody has to lock it.

`catalogue/<name>@<first 16 of root_sha256>.json` is written by who pushed the bank: two writers
write two files. `catalogue.json` holds all of them; any writer writes it anew, and the last one
wins. Where one of them is lost, a listing takes longer and says the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankMismatch, BankNotFound, PatchbankError, StoreError
from patchbank.pipeline.sharing.described import Row, read_row, with_claims
from patchbank.pipeline.sharing.entry import VERSION, Entry, entry_bytes, parse_entry_file
from patchbank.pipeline.sharing.listing import (
    FOLDER,
    WHOLE,
    Listing,
    Step,
    entries_in,
    in_parallel_order,
    known_entries,
    list_store,
    read_catalogue,
)
from patchbank.pipeline.sharing.remote_seal import RemoteSeal
from patchbank.pipeline.sharing.settings import VARIABLES, ShareSettings, settings_path
from patchbank.pipeline.sharing.store import Store, Upload
from patchbank.pipeline.sharing.stores import bank_place, checked_place, open_store, safe_url
from patchbank.pipeline.sharing.transfer import with_retries

MOST_TURNS = 20
"""How often the whole is written anew because others wrote entries meanwhile."""
LEAST_DIGITS = 4
"""Of a fingerprint that means a bank."""
MOST_NAMED = 10


def enter(store: Store, name: str, facts: Entry) -> None:
    """Writes the entry of a bank that lies in `store` as `name`, in place of an earlier one.

    Raises `ValueError` for a name that no catalogue takes.
    """
    entry = parse_entry_file(entry_bytes(replace(facts, name=name)))
    _put(store, f"{FOLDER}/{entry.file_name}", entry_bytes(entry))
    earlier = set(list_store(store).files.get(name, ())) - {entry.file_name}
    store.remove([f"{FOLDER}/{file}" for file in sorted(earlier)])
    _write_whole(store, {entry.file_name: entry})


def withdraw(store: Store, name: str) -> None:
    """Removes the entries of a bank that is gone, or is about to be replaced."""
    if files := list_store(store).files.get(name):
        store.remove([f"{FOLDER}/{file}" for file in files])
        _write_whole(store, {})


def entries_of(store: Store, name: str) -> list[Entry]:
    """What the catalogue says of a bank; a damaged entry says nothing."""
    return entries_in(store, list_store(store).files.get(name, {}), {})[0]


def rebuild(store: Store, *, progress: Step | None = None) -> None:
    """Makes the catalogue of a place anew, from the banks themselves.

    What only the pusher knew is kept of entries that are of the same bank. Raises `StoreError`
    where the place cannot be listed or written to.
    """
    if not (store.can_list and store.is_writable):
        raise StoreError(f"{store.url} cannot be listed or written to; rebuild it where it can")
    listing = list_store(store)
    made: dict[str, Entry] = {}

    def renew(name: str) -> None:
        row = read_row(store, name)
        if row is None or row.entry is None or not row.entry.is_sealed:
            return
        old, _ = entries_in(store, listing.files.get(name, {}), {})
        entry = with_claims(row.entry, old)
        if entry not in old:
            _put(store, f"{FOLDER}/{entry.file_name}", entry_bytes(entry))
        made[entry.file_name] = entry

    in_parallel_order(renew, listing.banks, progress)
    listed = {file for files in listing.files.values() for file in files}
    store.remove([f"{FOLDER}/{file}" for file in sorted(listed - set(made))])
    _write_whole(store, made)


def _write_whole(store: Store, known: Mapping[str, Entry]) -> None:
    """Writes catalogue.json anew, until it holds what is listed after it was written.

    Every writer writes its entry before it lists. So an entry that the last of several writers did
    not list came later, and that writer was not the last.
    """
    known = known_entries(store) | dict(known)
    for _ in range(MOST_TURNS):
        listing = list_store(store)
        known = {entry.file_name: entry for entry in _listed(store, listing, known)}
        _put(store, WHOLE, whole_bytes(known.values()))
        if list_store(store) == listing:
            return


def _listed(store: Store, listing: Listing, known: Mapping[str, Entry]) -> list[Entry]:
    """The entries of all banks that are there."""
    names = [name for name in listing.banks if name in listing.files]
    groups = in_parallel_order(
        lambda name: entries_in(store, listing.files[name], known)[0], names, None
    )
    return [entry for group in groups for entry in group]


def whole_bytes(entries: Iterable[Entry]) -> bytes:
    """The content of catalogue.json, a line an entry."""
    lines = [entry_bytes(entry).rstrip() for entry in entries]
    return b'{"entries": [\n' + b",\n".join(lines) + b'\n], "version": %d}\n' % VERSION


def _put(store: Store, name: str, content: bytes) -> None:
    record = FileRecord(name, len(content), hashlib.sha256(content).hexdigest())
    with_retries(lambda: store.put(Upload(content, record), lambda n_bytes: None))


@dataclass(frozen=True)
class Found:
    """A bank that a catalogue has; what it says is a claim until the seal was read."""

    place: str
    """Its address or folder."""
    entry: Entry
    digits: str | None = None
    """Of its fingerprint, where it was asked for by these."""

    def check(self, there: RemoteSeal) -> str | None:
        """Compares what was asked for with the bank that lies there; a note where it has grown
        since it was entered. Raises `BankMismatch` where it is another one."""
        seal, where = there.seal, safe_url(self.place)
        if self.digits is not None and not seal.fingerprint.startswith(self.digits):
            raise BankMismatch(
                f"{where} is not the bank with that fingerprint, as its catalogue says; who may "
                "write there corrects that: `patchbank bank ls --rebuild`",
                {"fingerprint": (self.digits, seal.fingerprint[:16])},
            )
        if seal.root_sha256 == self.entry.root_sha256:
            return None
        is_same = seal.recipe_id == self.entry.recipe_id
        if self.digits is None and is_same and there.schema.n_clips > self.entry.clips:
            return (
                f"{where} has grown since it was entered into the catalogue, from "
                f"{self.entry.clips} to {there.schema.n_clips} clips"
            )
        raise BankMismatch(
            f"{where} is another bank than its catalogue says; pull it by its address if you want "
            "it, or have the catalogue made anew: `patchbank bank ls --rebuild`",
            {"root_sha256": (self.entry.root_sha256[:16], seal.root_sha256[:16])},
        )


def find(name: str, settings: ShareSettings, from_: str | None = None) -> Found:
    """The bank that a name means: its own, the beginning of it, or that of its fingerprint, in the
    catalogue `from_`, else of the settings.

    Raises `BankNotFound` where there is none, `PatchbankError` where there are several.
    """
    place = settings.catalogue if from_ is None else from_
    if place is None:
        raise PatchbankError(
            f"{shown(name)} is no folder and no address, and no catalogue is set that may have it; "
            f'set one, `catalogue = "s3://..."` in {settings_path()} or '
            f"${VARIABLES['catalogue']}, or name it with --from"
        )
    place = checked_place(place)
    rows = read_catalogue(open_store(place))
    found = _matches(name, rows)
    if len(found) == 1 and (entry := found[0].entry) is not None:
        by_name = entry.name.startswith(name)
        return Found(bank_place(place, entry.name), entry, None if by_name else name)
    if found:
        names = ", ".join(row.name for row in found[:MOST_NAMED])
        more = f" and {len(found) - MOST_NAMED} more" * (len(found) > MOST_NAMED)
        raise PatchbankError(
            f"{shown(name)} means {len(found)} banks of {safe_url(place)}: {names}{more}; "
            "write more of it"
        )
    near = get_close_matches(name, [row.name for row in rows], MOST_NAMED, 0.5)
    hint = f"; there is {', '.join(near)}" if near else ""
    raise BankNotFound(
        f"no bank {shown(name)} among the {len(rows)} of {safe_url(place)}{hint}; "
        f"`patchbank bank ls {safe_url(place)}` lists them"
    )


def _matches(name: str, rows: list[Row]) -> list[Row]:
    there = [row for row in rows if row.entry is not None and row.entry.is_sealed]
    for exact in (name, f"{name}.bank"):
        if same := [row for row in there if row.name == exact]:
            # Two entries of one bank, where two pushed it at once.
            return same[:1]
    is_long = len(name) >= LEAST_DIGITS
    return [
        row
        for row in there
        if row.entry is not None
        and (row.name.startswith(name) or (is_long and row.entry.fingerprint.startswith(name)))
    ]
