"""What can be told of a bank at a store without reading its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

from patchbank.pipeline.bank.card import LARGEST_CARD_BYTES, parse_attributes
from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.reader import sealed_schema
from patchbank.pipeline.bank.seal_record import SEAL, Seal, parse_seal
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import in_parallel, with_retries
from patchbank.pipeline.sharing.trust import read_seal_at

CARD = "zarr.json"
UNSEALED = ("notes/", ".work/", SEAL)


def check_store(
    store: Store, *, progress: Callable[[int, int], None] | None = None
) -> tuple[str, ...]:
    """Every problem of a bank's seal, card and sizes, one sentence each.

    Raises `BankIncomplete` where there is no seal, `BankCorrupt` where it cannot be read, and
    `StoreError`. `progress` is called with files looked at and all files.
    """
    seal = parse_seal(read_seal_at(store), where=store.url)
    return (*_card_problems(store, seal), *_size_problems(store, seal, progress))


def _card_problems(store: Store, seal: Seal) -> Iterator[str]:
    content = with_retries(lambda: store.document(CARD, most_bytes=LARGEST_CARD_BYTES))
    record = seal.files.get(CARD)
    if content is None or record is None:
        yield f"{CARD}: is not there, or not sealed"
    elif hashlib.sha256(content).hexdigest() != record.sha256:
        yield f"{CARD}: is not the one that was sealed"
    else:
        try:
            sealed_schema(parse_attributes(content, where=store.url), seal, where=store.url)
        except BankError as error:
            yield str(error)


def _size_problems(
    store: Store, seal: Seal, progress: Callable[[int, int], None] | None
) -> Iterator[str]:
    sizes = store.sizes() if store.can_list else _asked_sizes(store, seal, progress)
    for name, record in sorted(seal.files.items()):
        found = sizes.get(name)
        if found is None:
            yield f"{name}: is missing"
        elif found != record.size:
            yield f"{name}: {found} bytes, sealed {record.size}"
        elif store.proves(record, size=found) is False:
            yield f"{name}: has other bytes than sealed, as the store itself tells"
    for name in sorted(set(sizes) - set(seal.files)):
        if not name.startswith(UNSEALED):
            yield f"{shown(name)}: is not sealed; only notes/ may hold files that are not"


def _asked_sizes(
    store: Store, seal: Seal, progress: Callable[[int, int], None] | None
) -> Mapping[str, int]:
    sizes: dict[str, int] = {}

    def ask(name: str) -> None:
        size = with_retries(lambda: store.size(name))
        if size is not None:
            sizes[name] = size
        if progress is not None:
            progress(len(sizes), len(seal.files))

    in_parallel([lambda name=name: ask(name) for name in seal.files])  # type: ignore[misc]
    return sizes
