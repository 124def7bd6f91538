"""The few notes that travel with a bank: its dataset card, its signatures, what was measured on it.

They are not sealed: nothing vouches for them but the signatures for the seal. What else lies in
notes/, such as logs of the machine that made the bank, stays where it is.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from patchbank.pipeline.bank.commit import WORK
from patchbank.pipeline.bank.sealed_names import is_part
from patchbank.pipeline.bank.writer import fsync_folder, write_durably
from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing.links import inside
from patchbank.pipeline.sharing.remote_seal import MOST_NOTE_BYTES, SIGNATURES
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.transfer import with_retries

NOTES = "notes"
CARD = f"{NOTES}/README.md"
MEASURED = f"{NOTES}/measured"
MOST_NOTES = 64


def own_notes(bank: Path) -> dict[str, bytes]:
    """The notes of a bank here that travel with it, by name; no link is followed."""
    found: dict[str, bytes] = {}
    if (bank / NOTES).is_symlink() or (bank / MEASURED).is_symlink():
        return found  # a stranger's bank must not send what lies elsewhere on this disk
    paths = [bank / SIGNATURES, *sorted((bank / MEASURED).glob("*.json"))]
    for path in paths:
        name = path.relative_to(bank).as_posix()
        if _travels(name) and _is_small_file(path):
            found[name] = path.read_bytes()
    return found


def notes_to_send(
    bank: Path, store: Store, given: Mapping[str, bytes], *, is_same: bool
) -> dict[str, bytes]:
    """The notes of a push: those of the bank here, and `given` ones, which lie nowhere.

    Where the store `is_same`, that is holds the very bank, what it has stays, and signatures of
    both places are kept.
    """
    notes = dict(given) | own_notes(bank)
    if not is_same:
        return notes
    sizes = with_retries(lambda: store.below(NOTES).sizes())
    there = {f"{NOTES}/{name}" for name in sizes}
    new = {name: content for name, content in notes.items() if name not in there}
    if SIGNATURES in notes and SIGNATURES in there:
        new[SIGNATURES] = both_signatures(notes[SIGNATURES], _note(store, SIGNATURES) or b"")
    return new


def both_signatures(some: bytes, others: bytes) -> bytes:
    """The signatures of two files over one seal, each once; of one key that of `some`."""
    from patchbank.pipeline.sharing.signing import blocks_of, key_of

    by_key: dict[bytes, str] = {}
    for block in (*blocks_of(some), *blocks_of(others)):
        try:
            by_key.setdefault(key_of(block), block)
        except ValueError:
            continue
    return "".join(f"{block}\n" for block in by_key.values()).encode("ascii", "replace")


def _is_small_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= MOST_NOTE_BYTES


def _travels(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    is_measurement = folder == MEASURED and last.endswith(".json") and is_part(last)
    return name in (CARD, SIGNATURES) or is_measurement


def fetch_notes(store: Store, out: Path, say: Callable[[str], None]) -> None:
    """Fetches the notes that travel with a bank; one that cannot be had is said, no more."""
    try:
        names = _names(store)
    except StoreError as error:
        say(f"no notes: {error}")
        return
    for name in names:
        try:
            content = _note(store, name)
        except StoreError as error:
            say(f"without {name}: {error}")
            continue
        if content is not None:
            put_small(out, name, _with_own(out, name, content))


def _with_own(out: Path, name: str, content: bytes) -> bytes:
    """What came, with the signatures that were put here: of another seal they say nothing wrong."""
    if name != SIGNATURES or not _is_small_file(inside(out, name)):
        return content
    return both_signatures((out / name).read_bytes(), content)


def _note(store: Store, name: str) -> bytes | None:
    return with_retries(lambda: store.document(name, most_bytes=MOST_NOTE_BYTES))


def _names(store: Store) -> Sequence[str]:
    if not store.can_list:
        return [CARD, SIGNATURES]
    sizes: Mapping[str, int] = with_retries(lambda: store.below(NOTES).sizes())
    found = [f"{NOTES}/{name}" for name in sorted(sizes)]
    return [name for name in found if _travels(name)][:MOST_NOTES]


def put_small(folder: Path, name: str, content: bytes) -> None:
    """Writes a small file whole or not at all; `BankError` where a link stands in the way."""
    target, draft = inside(folder, name), inside(folder, f"{WORK}/{uuid.uuid4().hex}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_durably(draft, content)
    draft.replace(target)
    fsync_folder(target.parent)
