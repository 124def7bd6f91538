"""What was left behind elsewhere, and on this machine by reading and pushing there."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.bank.sealed_names import is_bank_name
from patchbank.pipeline.errors import BankError, StoreError
from patchbank.pipeline.sharing.garbage import (
    SOON_S,
    Garbage,
    Limits,
    idle_s,
    is_known_bank,
    readable_age,
)
from patchbank.pipeline.sharing.listing import Step, in_parallel_order, list_store
from patchbank.pipeline.sharing.pins import is_pinned
from patchbank.pipeline.sharing.removal import (
    bank_files,
    remove_stored,
    tree_bytes,
)
from patchbank.pipeline.sharing.row_cache import BANKS, cached_banks, remove_cached, shrink
from patchbank.pipeline.sharing.settings import ShareSettings
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import with_retries
from patchbank.pipeline.sharing.upkeep import KeepsUploads, TellsAge, UnfinishedUpload

PUSHES = "pushes"


def find_stored_garbage(
    banks: Store, limits: Limits, cache: Path, *, progress: Step | None = None
) -> list[Garbage]:
    """Pushes to a folder of banks elsewhere that never finished."""
    if not (banks.can_list and banks.is_writable):
        raise StoreError(f"{banks.url} can only be read; clean up where it can be written to")

    def look(name: str) -> Garbage | None:
        return _half_push(banks, name, limits, cache)

    names = list_store(banks).banks
    looked = in_parallel_order(look, names, progress)
    found = [each for each in looked if each is not None]
    if isinstance(banks, KeepsUploads):
        found += _uploads(banks, banks, names, limits)
    return found


def _half_push(banks: Store, name: str, limits: Limits, cache: Path) -> Garbage | None:
    bank = banks.below(name)
    if with_retries(lambda: bank.size(SEAL)) is not None:
        return None
    sizes = bank_files(with_retries(bank.sizes))
    with suppress(BankError, StoreError):
        if not is_known_bank(bank) or is_pinned(bank, cache):
            return None
        reason, n_bytes = "a push that never finished", sum(sizes.values())
        newest_s = with_retries(bank.newest_s) if isinstance(bank, TellsAge) else None
        if newest_s is None:
            advice = f"how old, its store does not tell; `patchbank bank rm {bank.url}` removes it"
            return Garbage(bank.url, f"{reason}; {advice}", n_bytes, None)
        if (age_s := time.time() - newest_s) < limits.older_than_s:
            return None
        remove = partial(_remove_half_push, banks, name, sizes)
        return Garbage(bank.url, f"{reason}, {readable_age(age_s)}", n_bytes, remove)
    return None


def _remove_half_push(banks: Store, name: str, seen: Mapping[str, int]) -> bool:
    """Removes it, unless it has changed since it was listed."""
    bank = banks.below(name)
    if bank_files(with_retries(bank.sizes)) != seen:
        return False
    remove_stored(bank, of=(banks, name))
    return True


def _uploads(
    banks: Store, uploads: KeepsUploads, names: Collection[str], limits: Limits
) -> Iterator[Garbage]:
    """Of files of banks only: other programs send theirs to the same bucket."""
    are_banks: dict[str, bool] = {}
    for upload in uploads.unfinished_uploads():
        age_s = time.time() - upload.began_s
        name, _, file = upload.name.partition("/")
        if age_s < limits.older_than_s or name not in names or not is_bank_name(file):
            continue
        if name not in are_banks:
            are_banks[name] = is_known_bank(banks.below(name))
        if are_banks[name]:
            reason = f"an upload in parts that was never completed, {readable_age(age_s)}"
            remove = partial(_abandon, uploads, upload)
            yield Garbage(upload.name, f"{reason}; how large, its store does not tell", 0, remove)


def _abandon(banks: KeepsUploads, upload: UnfinishedUpload) -> bool:
    banks.abandon(upload)
    return True


def find_cached_garbage(
    settings: ShareSettings, limits: Limits, *, everything: bool
) -> Iterator[Garbage]:
    """What the cache holds beyond its limit, or all of it that is neither pinned nor in use, and
    records of pushes that nobody finished."""
    cache = settings.cache
    banks = cached_banks(cache)
    if everything:
        for bank in banks:
            age_s = time.time() - bank.last_used_s
            if not bank.pinned and age_s >= SOON_S:
                place = bank.url or f"{cache / BANKS / bank.root_sha256}"
                remove = partial(_uncache, cache, bank.root_sha256)
                reason = f"rows in the cache, {readable_age(age_s)}"
                yield Garbage(place, reason, bank.bytes, remove)
    elif (n_over := sum(bank.bytes for bank in banks) - settings.cache_limit_bytes) > 0:
        reason = "rows in the cache beyond its limit, the least recently used ones"
        remove = partial(_shrink, cache, settings.cache_limit_bytes)
        yield Garbage(str(cache / BANKS), reason, n_over, remove)
    for left in (cache / BANKS).glob(".*"):
        if re.fullmatch(r"\.[0-9a-f]{64}\.[0-9a-f]{32}", left.name) and idle_s(left) >= SOON_S:
            reason = "a removal from the cache that was cut short"
            yield Garbage(str(left), reason, tree_bytes(left), partial(_remove_left, left))
    for record in sorted((cache / PUSHES).glob("*.jsonl")):
        if (age_s := time.time() - record.lstat().st_mtime) >= limits.older_than_s:
            reason = f"what a push had sent that never finished, {readable_age(age_s)}"
            size = record.lstat().st_size
            yield Garbage(str(record), reason, size, partial(_forget, record))


def _uncache(cache: Path, root_sha256: str) -> bool:
    for bank in cached_banks(cache):
        if bank.root_sha256 == root_sha256:
            if bank.pinned or time.time() - bank.last_used_s < SOON_S:
                return False
            remove_cached(cache, root_sha256)
            return True
    return False


def _shrink(cache: Path, limit_bytes: int) -> bool:
    shrink(cache, limit_bytes)
    return True


def _remove_left(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _forget(record: Path) -> bool:
    record.unlink(missing_ok=True)
    return True
