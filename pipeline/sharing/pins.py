"""Banks that are to stay: neither `rm` nor `gc` takes them, nor does the cache make room of them.

A pin is an empty file: `notes/pinned` of a bank, which is neither sealed nor pushed nor pulled, so
that on a share it binds everybody; `pinned` of what the cache holds of a bank elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.errors import BankIncomplete
from patchbank.pipeline.sharing.described import claims_of
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.remote_seal import seal_content
from patchbank.pipeline.sharing.row_cache import PINNED, URL, bank_folder
from patchbank.pipeline.sharing.store import Store

PIN = f"notes/{PINNED}"


def is_pinned(bank: Store, cache: Path) -> bool:
    """Whether a bank, there or in the cache, is pinned."""
    if isinstance(bank, FolderStore):
        path = bank.folder / PIN
        return path.is_file() and not path.parent.is_symlink()
    if bank.size(PIN) is not None:
        return True
    folder = _cached(bank, cache)
    return folder is not None and (folder / PINNED).is_file()


def set_pin(bank: Store, cache: Path, *, pinned: bool) -> None:
    """Pins a bank of this disk, or what the cache holds and will hold of one elsewhere.

    Raises `BankIncomplete` for what has no seal.
    """
    is_local = isinstance(bank, FolderStore)
    bank.size(PIN)  # refuses notes/ that is a link to elsewhere
    folder = _cached(bank, cache)
    if folder is None:
        raise BankIncomplete(f"{bank.url} has no {SEAL}: only a finished bank can be pinned")
    path = bank.folder / PIN if isinstance(bank, FolderStore) else folder / PINNED
    if not pinned:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    if not (is_local or (folder / URL).exists()):
        (folder / URL).write_text(bank.url, encoding="utf-8")


def _cached(bank: Store, cache: Path) -> Path | None:
    """Where the cache keeps rows of a bank; None where that has no seal."""
    content = seal_content(bank)
    if content is None:
        return None
    return bank_folder(cache, claims_of(content, where=bank.url).root_sha256)
