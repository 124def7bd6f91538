"""Who sealed a bank: signatures in notes/seal.json.sig, and whether we ask for them.

A signature is over the bytes of seal.json, which name every other byte. It proves who vouches for
them, not that they are the newest, nor that they lie under the right name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.bank.seal_record import SEAL, parse_seal
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankIncomplete,
    PatchbankError,
    StoreError,
)
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.remote_seal import MOST_NOTE_BYTES, SIGNATURES, seal_content
from patchbank.pipeline.sharing.settings import ShareSettings, load_settings
from patchbank.pipeline.sharing.signing import (
    Verdict,
    blocks_of,
    fingerprint_of,
    judge,
    key_of,
    kind_of,
    sign,
)
from patchbank.pipeline.sharing.store import Store, Upload
from patchbank.pipeline.sharing.transfer import with_retries


@dataclass(frozen=True)
class Signed:
    """A bank that has just been signed."""

    root_sha256: str
    key: bytes
    n_signers: int

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.key)

    @property
    def kind(self) -> str:
        return kind_of(self.key)

    @property
    def is_certificate(self) -> bool:
        return "-cert-v" in self.kind


def sign_bank(store: Store, key: Path) -> Signed:
    """Adds a signature with `key` to a bank's; one of the same key that was there is replaced.

    What is signed is the seal: that the files are those it names is for `verify` to prove.
    """
    if not store.is_writable:
        raise StoreError(f"{store.url} cannot be written to; sign the bank where it is made")
    content = read_seal_at(store)
    block = sign(content, key)
    if read_seal_at(store) != content:
        raise BankError(f"{store.url} has grown or was made anew meanwhile; sign it again")
    own = key_of(block)
    others = [other for other in blocks_of(read_signatures(store) or b"") if _key(other) != own]
    document = "".join(f"{each}\n" for each in [*others, block]).encode("ascii", "replace")
    record = FileRecord(SIGNATURES, len(document), hashlib.sha256(document).hexdigest())
    with_retries(lambda: store.put(Upload(document, record), lambda _: None))
    seal = parse_seal(content, where=store.url)
    return Signed(seal.root_sha256, own, len(others) + 1)


def _key(block: str) -> bytes | None:
    try:
        return key_of(block)
    except ValueError:
        return None


def read_seal_at(store: Store) -> bytes:
    """The bytes of a bank's seal.json, which agree with their own root hash."""
    content = seal_content(store)
    if content is None:
        raise BankIncomplete(f"{store.url} is no finished bank: there is no {SEAL}")
    if not parse_seal(content, where=store.url).matches_root:
        raise BankCorrupt(f"{store.url}: {SEAL} does not match its own root hash; pull it again")
    return content


def read_signatures(store: Store) -> bytes | None:
    """The signatures of a bank, unread; None where there are none."""
    return with_retries(lambda: store.document(SIGNATURES, most_bytes=MOST_NOTE_BYTES))


def verdicts(
    seal_bytes: bytes, signatures: bytes | None, *, allowed: Path | None
) -> tuple[Verdict, ...]:
    """What is known of each signature; `PatchbankError` where there is no file `allowed`."""
    if allowed is not None and not allowed.is_file():
        raise PatchbankError(
            f"no file {allowed} of allowed signers; it has a line a key: "
            'NAME namespaces="patchbank" ssh-ed25519 AAAA...'
        )
    return tuple(
        judge(seal_bytes, block, allowed=allowed) for block in blocks_of(signatures or b"")
    )


def signers(found: Sequence[Verdict]) -> tuple[str, ...]:
    """Names of the trusted ones, each once, in order."""
    names = [verdict.signer for verdict in found if verdict.signer is not None]
    return tuple(dict.fromkeys(names))


def check_trust(
    seal_bytes: bytes, signatures: bytes | None, *, where: str, settings: ShareSettings
) -> tuple[str, ...]:
    """Who signed a bank that comes from elsewhere, by the names of the allowed signers.

    Raises `BankError` where the settings want a signature, and there is none that is valid and of
    an allowed signer. Where they want none, nothing is raised for what a bank holds.
    """
    is_required = settings.require_signature != "nothing"
    if settings.allowed_signers is None or (signatures is None and not is_required):
        return ()
    try:
        found = verdicts(seal_bytes, signatures, allowed=settings.allowed_signers)
    except BankError as error:
        if is_required:
            raise BankError(f"{where}: {error}") from error
        return ()
    if is_required:
        require_trusted(found, where=where, allowed=settings.allowed_signers)
    return signers(found)


def require_trusted(found: Sequence[Verdict], *, where: str, allowed: Path) -> None:
    """Raises `BankError` where no signature is valid and of an allowed signer."""
    if signers(found):
        return
    if not found:
        raise BankError(
            f"{where} is not signed, and only banks that are signed by a key of {allowed} are "
            f"wanted; who made it signs it: `patchbank bank sign {where}`"
        )
    raise BankError(
        f"{where} is not signed by a key of {allowed}: {'; '.join(map(str, found[:4]))}"
    )


def check_opened(bank: Path, seal_bytes: bytes) -> None:
    """`check_trust` of a bank of this disk; `seal_bytes` is what its seal.json holds."""
    settings = load_settings()
    signatures = read_signatures(FolderStore(bank))
    check_trust(seal_bytes, signatures, where=str(bank), settings=settings)
