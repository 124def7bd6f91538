"""What a push has to do: what of a bank a store has already, and whose the place is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from patchbank.pipeline.bank.card import parse_attributes, recipe_differences, recipe_of_card
from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.seal_record import parse_seal
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankError, BankMismatch, StoreError
from patchbank.pipeline.sharing.claim import check_open_to, read_claim
from patchbank.pipeline.sharing.notes import NOTES
from patchbank.pipeline.sharing.push_record import PushRecord
from patchbank.pipeline.sharing.remote_seal import (
    CARD,
    MOST_CARD_BYTES,
    RemoteSeal,
    holds_all_of,
    read_remote_seal,
    seal_content,
)
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import Traffic, in_parallel, with_retries
from patchbank.pipeline.specs import Json, differing_fields

CHECKS_AT_ONCE = 16
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PushPlan:
    """What a push has to do."""

    send: tuple[FileRecord, ...]
    """New in the store."""
    replace: tuple[FileRecord, ...]
    """There with other bytes: of a bank that has grown since, of a push that was broken off, or
    damaged."""
    there: Mapping[str, FileRecord] | None = None
    """Files of the bank that the store holds sealed."""
    seal_content: bytes | None = None
    """Of the seal that the store holds."""
    is_same: bool = False
    """Whether that is the very bank."""

    @property
    def is_done(self) -> bool:
        """The very bank is there, and nothing of it is missing."""
        return self.is_same and not self.send and not self.replace

    @property
    def n_bytes(self) -> int:
        """Bytes to send, but for the seal and notes."""
        return sum(record.size for record in (*self.send, *self.replace))


def plan_push(
    bank: Bank,
    store: Store,
    record: PushRecord,
    *,
    repair: bool = False,
    progress: Progress | None = None,
) -> PushPlan:
    """What is to be sent; reads back what the store holds without a digest of its own.

    Of the very bank, sealed there, files that are missing or cut are sent again; `repair` proves
    all others too. `progress` is called with the bytes that were checked and that are to be. Raises
    `BankMismatch` where another bank lies there, or is being pushed there, `StoreError` for a store
    that cannot be written to.
    """
    if not store.is_writable:
        raise StoreError(f"{store.url} can only be read; push to a folder, s3://, gs://, sftp:// "
                         "or hf://")  # fmt: skip
    claim, content = read_claim(store), seal_content(store)
    if content is not None:
        seal = parse_seal(content, where=store.url)
        if seal.root_sha256 == bank.root_sha256:
            return _plan_again(bank, store, content, repair=repair, progress=progress)
    check_open_to(store, claim, bank)
    if content is not None:
        return _plan_onto(bank, store, read_remote_seal(store))
    record.of_claim("" if claim is None else claim.token)
    sizes = with_retries(store.sizes)
    _check_foreign(bank, store, sizes)
    here = [file for file in bank.seal.files.values() if file.path in sizes]
    good = _proven(store, here, sizes, record, progress)
    return PushPlan(
        send=tuple(f for name, f in bank.seal.files.items() if name not in sizes),
        replace=tuple(file for file in here if file.path not in good),
    )


def _plan_again(
    bank: Bank, store: Store, content: bytes, *, repair: bool, progress: Progress | None
) -> PushPlan:
    """The plan where the very bank lies in the store."""
    files = bank.seal.files
    sizes = with_retries(store.sizes)
    whole = [file for file in files.values() if sizes.get(file.path) == file.size]
    good = {file.path for file in whole}
    if repair:
        good = _proven(store, whole, sizes, PushRecord(None), progress)
    return PushPlan(
        send=tuple(file for name, file in files.items() if name not in sizes),
        replace=tuple(f for name, f in files.items() if name in sizes and name not in good),
        there=files,
        seal_content=content,
        is_same=True,
    )


def _plan_onto(bank: Bank, store: Store, there: RemoteSeal) -> PushPlan:
    """The plan where a sealed bank lies in the store."""
    old, new = there.seal, bank.seal
    if holds_all_of(old, new, bank.schema):
        raise BankMismatch(
            f"{store.url} holds more than {bank.path}, which it has grown from; pull it: "
            f"`patchbank bank pull {store.url} {bank.path}`",
            {"clips": (there.schema.n_clips, bank.n_clips)},
        )
    if not holds_all_of(new, old, there.schema):
        card = there.attributes["card"]
        differences = recipe_differences(recipe_of_card(card), recipe_of_card(bank.card))
        raise BankMismatch(
            f"{store.url} holds another bank than {bank.path}; choose another place, or "
            f"remove that one: `patchbank bank rm {store.url}`",
            differences or {"fingerprint": (old.fingerprint[:16], new.fingerprint[:16])},
        )
    return PushPlan(
        send=tuple(file for name, file in new.files.items() if name not in old.files),
        replace=tuple(
            file for name, file in new.files.items() if old.files.get(name, file) != file
        ),
        there=old.files,
        seal_content=there.content,
    )


def _check_foreign(bank: Bank, store: Store, sizes: Mapping[str, int]) -> None:
    """Refuses to push where something else lies: another bank's half, or no bank at all."""
    content = None
    if CARD in sizes:
        content = with_retries(lambda: store.document(CARD, most_bytes=MOST_CARD_BYTES))
    if content is not None and hashlib.sha256(content).hexdigest() != bank.seal.files[CARD].sha256:
        found = parse_attributes(content, where=store.url)
        if not _has_grown_into(found, bank):
            raise BankMismatch(
                f"{store.url} holds a part of another bank, whose push has not finished; choose "
                f"another place, or remove it: `patchbank bank rm {store.url}`",
                differing_fields(found, _attributes(bank)),
            )
    strange = [name for name in sizes if name not in bank.seal.files and not _is_note(name)]
    if strange and content is None:
        raise BankError(
            f"{store.url} is no bank, and holds files of something else ({shown(strange[0])}); "
            "choose another place"
        )


def _attributes(bank: Bank) -> Json:
    return {"encoder_id": bank.encoder_id, "recipe_id": bank.recipe_id, "card": bank.card}


def _has_grown_into(found: Json, bank: Bank) -> bool:
    """Whether a card is that of `bank` before it grew."""
    old, new = found["card"].get("generations"), bank.card["generations"]
    same_recipe = found.get("recipe_id") == bank.recipe_id
    return same_recipe and isinstance(old, list) and len(old) < len(new) and old == new[: len(old)]


def _is_note(name: str) -> bool:
    return name.split("/")[0].startswith((NOTES, "."))


def _proven(
    store: Store,
    files: Sequence[FileRecord],
    sizes: Mapping[str, int],
    record: PushRecord,
    progress: Progress | None,
) -> set[str]:
    """Names of files that lie in the store as they are sealed."""
    good: set[str] = set()
    traffic = Traffic(sum(file.size for file in files), progress=progress)

    def check(file: FileRecord) -> None:
        is_same = with_retries(lambda: store.proves(file, size=sizes[file.path]))
        if is_same is None:
            is_same = record.has(file) or _read_back(store, file, traffic)
        if is_same:
            good.add(file.path)
            record.note(file)

    in_parallel([partial(check, file) for file in files], at_once=CHECKS_AT_ONCE)
    return good


def _read_back(store: Store, file: FileRecord, traffic: Traffic) -> bool:
    def digest() -> str:
        hasher = hashlib.sha256()
        for piece in store.stream(file.path, 0, file.size):
            hasher.update(piece)
            traffic(len(piece))
        return hasher.hexdigest()

    return with_retries(digest) == file.sha256
