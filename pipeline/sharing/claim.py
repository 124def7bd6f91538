"""Who pushes to a place: one bank at a time, until it is sealed there.

A claim is a small note that names the bank by its seal and its shards. It stays after a kill, so
that the same push goes on and no other bank is mixed into its half; `bank rm` removes both.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.bank.seal_record import as_digest, parse_json
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankMismatch, StoreError
from patchbank.pipeline.sharing.store import Store, Upload
from patchbank.pipeline.sharing.transfer import pause, wait_unless_stopped, with_retries

CLAIM = "notes/pushing.json"
MOST_CLAIM_BYTES = 4_096
SETTLES_S = 1.0
"""So long may another push that saw no claim either take to write its own."""


@runtime_checkable
class CreatesOnce(Protocol):
    """A store that can make a file only where there is none, however many try at once."""

    def create(self, upload: Upload) -> bool:
        """Makes a small file; False, and nothing changed, where there is one of that name."""
        ...


@dataclass(frozen=True)
class Claim:
    """The bank that is being pushed to a place."""

    root_sha256: str
    n_shards: int
    shards_sha256: str
    """Over the digests of its first `n_shards` shards."""
    token: str
    """Of the push that began, to tell it from one that began after a removal."""


def claim_of(bank: Bank) -> Claim:
    """A new claim for a bank."""
    shards = shards_digest(bank.seal.files, bank.schema, bank.schema.n_shards)
    return Claim(bank.root_sha256, bank.schema.n_shards, shards, uuid.uuid4().hex)


def shards_digest(files: Mapping[str, FileRecord], schema: BankSchema, n_shards: int) -> str:
    """SHA-256 over the sealed digests of the first shards of a bank."""
    hasher = hashlib.sha256()
    for shard in range(min(n_shards, schema.n_shards)):
        for array in schema.arrays():
            hasher.update(files[array.shard_path(shard)].sha256.encode())
        hasher.update(files[f"commits/{shard:05d}.json"].sha256.encode())
    return hasher.hexdigest()


def read_claim(store: Store) -> Claim | None:
    """The claim on a place; `StoreError` for one that is damaged."""
    content = with_retries(lambda: store.document(CLAIM, most_bytes=MOST_CLAIM_BYTES))
    if not content:
        return None  # one that is just being made has no bytes yet
    try:
        found = parse_json(content)
        claim = Claim(**{name: found[name] for name in Claim.__dataclass_fields__})
        as_digest(claim.root_sha256)
        as_digest(claim.shards_sha256)
        if type(claim.n_shards) is not int or claim.n_shards < 1 or type(claim.token) is not str:
            raise ValueError("n_shards or token")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{store.url}/{CLAIM} is damaged; if nobody pushes there, remove what is there: "
            f"`patchbank bank rm {store.url}`"
        ) from error
    return claim


def check_open_to(store: Store, found: Claim | None, bank: Bank) -> None:
    """Raises `BankMismatch` where a claim is of another bank than this one, or this one before it
    grew."""
    if found is None or found.root_sha256 == bank.root_sha256:
        return
    is_longer = found.n_shards > bank.schema.n_shards
    own = shards_digest(bank.seal.files, bank.schema, found.n_shards)
    if is_longer or own != found.shards_sha256:
        raise BankMismatch(
            f"a push of another bank to {store.url} is under way, or was broken off; choose "
            "another place, or if nobody pushes there remove it: "
            f"`patchbank bank rm {store.url}`",
            {"root_sha256": (found.root_sha256[:16], bank.root_sha256[:16])},
        )


def take(store: Store, bank: Bank) -> Claim:
    """The claim on a place for a bank: an earlier one of the same bank, or a new one.

    Raises `BankMismatch` where another bank is being pushed there.
    """
    found = read_claim(store)
    check_open_to(store, found, bank)
    if found is not None and found.root_sha256 == bank.root_sha256:
        return found
    own = claim_of(bank)
    upload = _upload(own)
    if found is not None or not isinstance(store, CreatesOnce) or not _created(store, upload):
        store.put_all([upload], lambda _: None, lambda _: None)
        wait_unless_stopped(SETTLES_S)
    return require(store, bank)


def _created(store: CreatesOnce, upload: Upload) -> bool:
    """Whether there is a claim now, made by this push or by another that was faster."""
    if with_retries(lambda: store.create(upload)):
        if with_retries(lambda: store.create(upload)):
            # It overwrites, so another push may do so too: the last one has the place.
            wait_unless_stopped(SETTLES_S)
        return True
    assert isinstance(store, Store)
    for attempt in (1, 2):
        if read_claim(store) is not None:
            return True
        pause(attempt)
    return False  # whoever made it died before it wrote


def require(store: Store, bank: Bank) -> Claim:
    """The claim that a push of this bank has; `BankMismatch` where another one took the place."""
    found = read_claim(store)
    if found is None or found.root_sha256 != bank.root_sha256:
        raise BankMismatch(
            f"{store.url} was taken by another push, or removed, meanwhile; it is not sealed. "
            "Agree who pushes there, and run the same push again",
            {"root_sha256": (found and found.root_sha256[:16], bank.root_sha256[:16])},
        )
    return found


def release(store: Store) -> None:
    """Gives a place free, whose bank is sealed."""
    with_retries(lambda: store.remove([CLAIM]))


def _upload(claim: Claim) -> Upload:
    content = json.dumps(asdict(claim), sort_keys=True).encode()
    digest = hashlib.sha256(content).hexdigest()
    return Upload(content, FileRecord(CLAIM, len(content), digest))
