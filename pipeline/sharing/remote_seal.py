"""What a bank at a store says of itself, believed no further than its digests and bounds go."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from patchbank.pipeline.bank.card import LARGEST_CARD_BYTES, parse_attributes
from patchbank.pipeline.bank.reader import sealed_schema
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.bank.seal_record import LARGEST_SEAL_BYTES, SEAL, Seal, parse_seal
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankCorrupt, BankIncomplete, BankNotFound
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import with_retries
from patchbank.pipeline.specs import Json

CARD = "zarr.json"
MOST_SEAL_BYTES = LARGEST_SEAL_BYTES
MOST_CARD_BYTES = LARGEST_CARD_BYTES
SIGNATURES = "notes/seal.json.sig"
MOST_NOTE_BYTES = 2**20


@dataclass(frozen=True)
class RemoteSeal:
    """The seal of a bank at a store, its card, and the shapes that follow; they fit each other."""

    content: bytes
    """Of seal.json."""
    seal: Seal
    card_content: bytes
    """Of zarr.json."""
    attributes: Json
    schema: BankSchema


def seal_content(store: Store) -> bytes | None:
    """The bytes of a store's seal.json; None where it has none."""
    return with_retries(lambda: store.document(SEAL, most_bytes=MOST_SEAL_BYTES))


def read_remote_seal(store: Store) -> RemoteSeal:
    """Raises `BankNotFound`, `BankIncomplete` where a push has not finished, `BankCorrupt`."""
    content = seal_content(store)
    if content is None:
        if with_retries(lambda: store.size(CARD)) is None:
            raise BankNotFound(
                f"no bank at {store.url}: there is no {SEAL}; `patchbank bank ls` of the folder "
                "above lists what there is"
            )
        raise BankIncomplete(
            f"{store.url} has no {SEAL}: its push has not finished; who began it runs the same "
            "`patchbank bank push` again"
        )
    seal = parse_seal(content, where=store.url)
    card = sealed_document(store, seal, CARD, most_bytes=MOST_CARD_BYTES)
    attributes = parse_attributes(card, where=store.url)
    schema = sealed_schema(attributes, seal, where=store.url)
    return RemoteSeal(content, seal, card, attributes, schema)


def sealed_document(store: Store, seal: Seal, name: str, *, most_bytes: int) -> bytes:
    """A small sealed file; `BankCorrupt` where it is not the sealed one."""
    record = seal.files.get(name)
    if record is None or record.size > most_bytes:
        size = "is not sealed" if record is None else f"is sealed with {record.size} bytes"
        raise BankCorrupt(f"{store.url}: {name} {size}; it is no bank that patchbank wrote")
    content = with_retries(lambda: store.document(name, most_bytes=record.size))
    if content is None or hashlib.sha256(content).hexdigest() != record.sha256:
        found = "is missing" if content is None else "is not the one that was sealed"
        raise BankCorrupt(f"{store.url}: {name} {found}; {ask_pusher(store)}")
    return content


def ask_pusher(store: Store) -> str:
    """What to do about a bank that is damaged where it lies."""
    return f"who has the bank mends it: `patchbank bank push BANK {store.url} --repair`"


def holds_all_of(new: Seal, old: Seal, schema: BankSchema) -> bool:
    """Whether `new` is `old` or a growth of it; `schema` is that of `old`.

    Shards never change; what gathers their rows does.
    """
    kept = [
        array.shard_path(shard) for array in schema.arrays() for shard in range(schema.n_shards)
    ]
    kept += [f"commits/{shard:05d}.json" for shard in range(schema.n_shards)]
    return new.recipe_id == old.recipe_id and all(
        _record(new, name) == _record(old, name) for name in kept
    )


def _record(seal: Seal, name: str) -> FileRecord | None:
    return seal.files.get(name)
