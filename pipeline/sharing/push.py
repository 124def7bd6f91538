"""Puts a sealed bank into a store; its seal goes last, so that half a push is no bank.

Every file is proven to have arrived before the next thing rests on it: by the digest of the store's
server, or read back. A push that was killed goes on: files that are proven to be there are not sent
again. A bank that has grown sends its new shards while the old seal stays; only then is that taken
away, what gathers the rows replaced, and the new seal put.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.seal_record import SEAL, seal_bytes
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankError, PatchbankError, StoreError
from patchbank.pipeline.sharing.claim import read_claim, release, require, take
from patchbank.pipeline.sharing.notes import notes_to_send
from patchbank.pipeline.sharing.push_plan import Progress, PushPlan, plan_push
from patchbank.pipeline.sharing.push_record import PushRecord
from patchbank.pipeline.sharing.remote_seal import CARD, seal_content
from patchbank.pipeline.sharing.store import Store, Upload
from patchbank.pipeline.sharing.transfer import Traffic, with_retries


@dataclass(frozen=True)
class Pushed:
    """What a push has done."""

    url: str
    n_files: int
    n_bytes: int
    """Bytes of these files, which were sent; others were there."""


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
    everything = notes_to_send(opened.path, store, notes or {}, is_same=plan.is_same)
    try:
        if not plan.is_done:
            _take(opened, store, plan, record)
            _send(opened, store, plan, traffic, record)
        _send_notes(store, everything)
        if not plan.is_same:
            assert seal is not None
            _seal(opened, store, seal)
        _release(store, opened)
    except PatchbankError as error:
        if seal_bytes(opened.path) != seal:
            raise BankError(
                f"{opened.path} has grown or was made anew during the push; push it again"
            ) from error
        raise
    record.forget()
    return Pushed(store.url, len(plan.send) + len(plan.replace), plan.n_bytes)


def _take(bank: Bank, store: Store, plan: PushPlan, record: PushRecord) -> None:
    """Claims the place, which must still be what was planned for."""
    record.of_claim(take(store, bank).token)
    try:
        _require_as_planned(store, plan.seal_content)
    except BankError:
        _release(store, bank)
        raise


def _require_as_planned(store: Store, seal: bytes | None) -> None:
    if seal_content(store) != seal:
        raise BankError(
            f"{store.url} was pushed to or removed since this push began; nothing was sent, run it "
            "again"
        )


def _release(store: Store, bank: Bank) -> None:
    claim = read_claim(store)
    if claim is not None and claim.root_sha256 == bank.root_sha256:
        release(store)


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
    if plan.there is not None and not plan.is_same:
        for file in plan.there.values():
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
    """Puts the seal, once every other file is there in its size and the place is still ours."""
    require(store, bank)
    _require_as_planned(store, None)
    if store.can_list:
        sizes = with_retries(store.sizes)
        for file in bank.seal.files.values():
            if sizes.get(file.path) != file.size:
                raise StoreError(
                    f"{store.url}: {file.path} was sent, and now has {sizes.get(file.path, 'no')} "
                    f"bytes of {file.size}; it is not sealed. Run the same push again"
                )
    store.put_all([document_upload(SEAL, seal)], lambda _: None, lambda _: None)
