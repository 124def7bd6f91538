"""What a bank in a folder of banks says of itself, without being opened: two small reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from patchbank.pipeline.bank.card import parse_attributes
from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.seal_record import NO_JSON, SEAL, as_digest, brief
from patchbank.pipeline.errors import BankCorrupt, BankNotFound, PatchbankError
from patchbank.pipeline.sharing.entry import Entry, describe, is_name
from patchbank.pipeline.sharing.remote_seal import (
    CARD,
    MOST_CARD_BYTES,
    read_remote_seal,
    seal_content,
)
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import with_retries

DAMAGED = (KeyError, TypeError, AttributeError, *NO_JSON)
"""What a card or a seal of another shape makes its readers raise."""


@dataclass(frozen=True)
class Row:
    """One bank of a listing."""

    name: str
    """Of its folder; what is no name of a bank, escaped."""
    entry: Entry | None
    problem: str | None = None
    """Why there is no entry."""
    is_indexed: bool = False
    """Whether the catalogue has the bank; else its own files were read."""
    is_checked: bool = False
    """Whether `signed_by` was verified, and the entry is what the signed seal covers."""


@dataclass(frozen=True)
class SealClaims:
    """What seal.json says, compared with nothing."""

    fingerprint: str
    root_sha256: str
    n_bytes: int


def read_row(banks: Store, name: str) -> Row | None:
    """A bank as its own files describe it; None for a folder that does not look like a bank."""
    looks_like_one = name.endswith(".bank")
    if not is_name(name):
        problem = "its name is not one that a bank has; rename the folder"
        return Row(shown(name), None, problem) if looks_like_one else None
    try:
        return Row(name, _own_entry(banks, name))
    except BankNotFound as error:
        # A Zarr group of somebody else's, unless its name says that it should be a bank.
        return Row(name, None, str(error)) if looks_like_one else None
    except (PatchbankError, OSError) as error:
        return Row(name, None, str(error))
    except DAMAGED as error:
        return Row(name, None, f"the card is damaged: {brief(error)}")


def _own_entry(banks: Store, name: str) -> Entry:
    bank = banks.below(name)
    card = with_retries(lambda: bank.document(CARD, most_bytes=MOST_CARD_BYTES))
    if card is None:
        raise BankNotFound(f"no bank at {bank.url}: there is no {CARD}")
    attributes = parse_attributes(card, where=bank.url)
    content = seal_content(bank)
    if content is None:
        n_bytes = sum(bank.sizes().values()) if bank.can_list else 0
        return describe(name, attributes, fingerprint="", root_sha256="", n_bytes=n_bytes)
    seal = claims_of(content, where=bank.url)
    return describe(
        name,
        attributes,
        fingerprint=seal.fingerprint,
        root_sha256=seal.root_sha256,
        n_bytes=seal.n_bytes,
    )


def claims_of(content: bytes, *, where: str) -> SealClaims:
    """What a listing needs of a seal, for a tenth of what `parse_seal` costs; `BankCorrupt`."""
    try:
        document = json.loads(content)
        sizes = [file["size"] for file in document["files"]]
        if any(type(size) is not int or not 0 <= size < 2**63 for size in sizes):
            raise ValueError("a size is none")
        return SealClaims(
            as_digest(document["fingerprint"]), as_digest(document["root_sha256"]), sum(sizes)
        )
    except DAMAGED as error:
        raise BankCorrupt(
            f"{where}/{SEAL} is damaged: {type(error).__name__} {str(error)[:200]}; "
            "pull the bank again"
        ) from error


def proven_entry(banks: Store, name: str) -> tuple[Entry, bytes]:
    """A bank's entry as the bytes of its seal prove it, and these bytes.

    Raises what `read_remote_seal` does.
    """
    there = read_remote_seal(banks.below(name))
    try:
        entry = describe(
            name,
            there.attributes,
            fingerprint=there.seal.fingerprint,
            root_sha256=there.seal.root_sha256,
            n_bytes=there.seal.bank_bytes,
        )
    except DAMAGED as error:
        raise BankCorrupt(f"{banks.url}/{name}: the card is damaged: {brief(error)}") from error
    return entry, there.content


def with_claims(entry: Entry, others: Sequence[Entry]) -> Entry:
    """An entry, with what one of the same bank says that only its pusher knows."""
    for other in others:
        if other.root_sha256 == entry.root_sha256:
            return replace(
                entry,
                data=other.data,
                data_licence=other.data_licence,
                pushed=other.pushed,
                signed_by=other.signed_by,
            )
    return entry
