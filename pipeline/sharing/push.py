"""Puts a sealed bank into a store; its seal goes last, so that half a push is no bank.

Every file is proven to have arrived before the next thing rests on it: by the digest of the store's
server, or read back. A push that was killed goes on: files that are proven to be there are not sent
again. A bank that has grown sends its new shards while the old seal stays; only then is that taken
away, what gathers the rows replaced, and the new seal put.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from patchbank.pipeline.bank.card import parse_attributes, recipe_differences, recipe_of_card
from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.seal_record import SEAL, seal_bytes
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankError, BankMismatch, PatchbankError, StoreError
from patchbank.pipeline.sharing.notes import NOTES, own_notes
from patchbank.pipeline.sharing.push_record import PushRecord
from patchbank.pipeline.sharing.remote_seal import (
    CARD,
    MOST_CARD_BYTES,
    RemoteSeal,
    holds_all_of,
    read_remote_seal,
    seal_content,
)
from patchbank.pipeline.sharing.store import Store, Upload
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
    """There with other bytes, of a bank that has grown since or of a push that was broken off."""
    there: RemoteSeal | None
    """What the store holds already, sealed."""
    is_done: bool = False
    """The very bank is there, sealed."""

    @property
    def n_bytes(self) -> int:
        """Bytes to send, but for the seal and notes."""
        return sum(record.size for record in (*self.send, *self.replace))


@dataclass(frozen=True)
class Pushed:
    """What a push has done."""

    url: str
    n_files: int
    n_bytes: int
    """Bytes of these files, which were sent; others were there."""


def plan_push(
    bank: Bank, store: Store, record: PushRecord, *, progress: Progress | None = None
) -> PushPlan:
    """What is to be sent; reads back what the store holds without a digest of its own.

    `progress` is called with the bytes that were checked and that are to be. Raises `BankMismatch`
    where another bank lies there, `StoreError` for a store that cannot be written to.
    """
    if not store.is_writable:
        raise StoreError(f"{store.url} can only be read; push to a folder, s3://, gs://, sftp:// "
                         "or hf://")  # fmt: skip
    there = read_remote_seal(store) if seal_content(store) is not None else None
    if there is not None:
        return _plan_onto(bank, store, there)
    sizes = with_retries(store.sizes)
    _check_foreign(bank, store, sizes)
    here = [file for file in bank.seal.files.values() if file.path in sizes]
    good = _proven(store, here, sizes, record, progress)
    return PushPlan(
        send=tuple(f for name, f in bank.seal.files.items() if name not in sizes),
        replace=tuple(file for file in here if file.path not in good),
        there=None,
    )


def _plan_onto(bank: Bank, store: Store, there: RemoteSeal) -> PushPlan:
    """The plan where a sealed bank lies in the store."""
    old, new = there.seal, bank.seal
    if old.root_sha256 == new.root_sha256:
        return PushPlan((), (), there, is_done=True)
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
        there=there,
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


def push_bank(
    bank: Path | Bank,
    store: Store,
    *,
    record: PushRecord | None = None,
    notes: Mapping[str, bytes] | None = None,
    plan: PushPlan | None = None,
    limit_bytes_per_s: float | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Puts a sealed bank into a store, with `notes` by name, beside those that lie in the bank.

    The same call finishes what an earlier one began. `record` remembers, on this machine, what has
    arrived, for stores that tell no digests. Raises what `plan_push` does, `BankError` where the
    bank has grown meanwhile, `StoreError` where the store gives up.
    """
    opened = bank if isinstance(bank, Bank) else open_bank(bank)
    seal = seal_bytes(opened.path)
    record = record or PushRecord(None)
    plan = plan or plan_push(opened, store, record)
    traffic = Traffic(plan.n_bytes, limit_bytes_per_s=limit_bytes_per_s, progress=progress)
    everything = own_notes(opened.path) | dict(notes or {})
    try:
        if not plan.is_done:
            _send(opened, store, plan, traffic, record)
        _send_notes(store, everything)
        if not plan.is_done:
            assert seal is not None
            _seal(opened, store, seal)
    except PatchbankError as error:
        if seal_bytes(opened.path) != seal:
            raise BankError(
                f"{opened.path} has grown or was made anew during the push; push it again"
            ) from error
        raise
    record.forget()
    return Pushed(store.url, len(plan.send) + len(plan.replace), plan.n_bytes)


def _send(bank: Bank, store: Store, plan: PushPlan, traffic: Traffic, record: PushRecord) -> None:
    def done(upload: Upload) -> None:
        record.note(upload.record)

    def put(files: Sequence[FileRecord]) -> None:
        # Large files first: at the end all threads have something to do.
        ordered = sorted(files, key=lambda file: -file.size)
        uploads = [Upload(bank.path / file.path, file) for file in ordered]
        store.put_all(uploads, traffic, done)

    # Who looks at a half push finds out whose it is.
    cards = [file for file in (*plan.send, *plan.replace) if file.path == CARD]
    if plan.there is None:
        put(cards)
    put([file for file in plan.send if file.path != CARD])
    if plan.there is not None:
        for file in plan.there.seal.files.values():
            if bank.seal.files.get(file.path) == file:
                record.note(file)  # without a seal there, nothing else says so
        with_retries(lambda: store.remove([SEAL]))
    put([file for file in plan.replace if file.path != CARD or plan.there is not None])


def _send_notes(store: Store, notes: Mapping[str, bytes]) -> None:
    uploads = [document_upload(name, notes[name]) for name in sorted(notes)]
    store.put_all(uploads, lambda _: None, lambda _: None)


def document_upload(name: str, content: bytes) -> Upload:
    """A small document on its way into a store."""
    return Upload(content, FileRecord(name, len(content), hashlib.sha256(content).hexdigest()))


def _seal(bank: Bank, store: Store, seal: bytes) -> None:
    """Puts the seal, once every other file is there in its size and the card is still ours."""
    card = with_retries(lambda: store.document(CARD, most_bytes=MOST_CARD_BYTES))
    if card is None or hashlib.sha256(card).hexdigest() != bank.seal.files[CARD].sha256:
        raise BankError(
            f"{store.url}: another push writes there, of another bank; it is not sealed. Agree who "
            f"pushes, remove it with `patchbank bank rm {store.url}`, and push again"
        )
    if store.can_list:
        sizes = with_retries(store.sizes)
        for file in bank.seal.files.values():
            if sizes.get(file.path) != file.size:
                raise StoreError(
                    f"{store.url}: {file.path} was sent, and now has {sizes.get(file.path, 'no')} "
                    f"bytes of {file.size}; it is not sealed. Run the same push again"
                )
    store.put_all([document_upload(SEAL, seal)], lambda _: None, lambda _: None)
