"""What can be told of a bank at a store without reading its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.seal_record import SEAL, Seal
from patchbank.pipeline.errors import BankCorrupt
from patchbank.pipeline.sharing.remote_seal import read_remote_seal
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import in_parallel, with_retries

UNSEALED = ("notes/", ".", SEAL)
"""What beginnings of names may stand beside the sealed ones: notes, and drafts of a push."""
Progress = Callable[[int, int], None]


def check_store(store: Store, *, progress: Progress | None = None) -> tuple[str, ...]:
    """Every problem of a bank's seal, card and sizes, one sentence each.

    Where the store itself tells digests, these too. Raises `BankNotFound`, `BankIncomplete` and
    `StoreError`. `progress` is called with files that were asked for and all files.
    """
    try:
        there = read_remote_seal(store)
    except BankCorrupt as error:
        return (str(error).removeprefix(f"{store.url}: ").removeprefix(f"{store.url}/"),)
    return tuple(_size_problems(store, there.seal, progress))


def _size_problems(store: Store, seal: Seal, progress: Progress | None) -> Iterator[str]:
    sizes = with_retries(store.sizes) if store.can_list else _asked(store, seal, progress)
    for name, file in sorted(seal.files.items()):
        found = sizes.get(name)
        if found is None:
            yield f"{name}: is missing"
        elif found != file.size:
            yield f"{name}: {found} bytes, sealed {file.size}"
    for name in sorted(set(sizes) - set(seal.files)):
        if not name.startswith(UNSEALED):
            yield f"{shown(name)}: is not sealed; only notes/ may hold files that are not"


def _asked(store: Store, seal: Seal, progress: Progress | None) -> Mapping[str, int]:
    """Sizes by name, of a store that lists nothing."""
    sizes: dict[str, int] = {}

    def ask(name: str) -> None:
        size = with_retries(lambda: store.size(name))
        if size is not None:
            sizes[name] = size
        if progress is not None:
            progress(len(sizes), len(seal.files))

    in_parallel([lambda name=name: ask(name) for name in seal.files])  # type: ignore[misc]
    return sizes
