"""Fetches a bank from a store; each file is checked against the seal before it is put in place.

Until the last one has come the folder has no seal, so that nobody takes it for a bank. A pull that
was killed goes on: what lies in its place was checked before it was put there. A bank that has
grown since it was pulled fetches what is new beside the old one, which stays whole until all is
there. The card comes last but one: without it nothing takes the folder for a bank to be extracted.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from patchbank.pipeline.bank.commit import WORK, is_held, owning
from patchbank.pipeline.bank.growth import finish_growth, next_folder
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.seal_record import SEAL, Seal, parse_seal
from patchbank.pipeline.bank.writer import FileRecord, fsync_folder
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankMismatch,
    NotInStore,
    StoreError,
)
from patchbank.pipeline.sharing.links import inside, refuse_links
from patchbank.pipeline.sharing.notes import fetch_notes, put_small
from patchbank.pipeline.sharing.remote_seal import (
    CARD,
    MOST_SEAL_BYTES,
    RemoteSeal,
    ask_pusher,
    holds_all_of,
    read_remote_seal,
    seal_content,
)
from patchbank.pipeline.sharing.store import Meter, Store
from patchbank.pipeline.sharing.transfer import (
    TRIES,
    Counted,
    Traffic,
    in_parallel,
    pause,
    with_retries,
)
from patchbank.pipeline.specs import human_bytes

PULLING = f"{WORK}/pull.seal.json"
"""The seal of the bank that is being pulled into a folder: whose files its files are."""
SPARE_BYTES = 64 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PullPlan:
    """What a pull has to do."""

    there: RemoteSeal
    fetch: tuple[FileRecord, ...]
    grows: Bank | None
    """The older bank at the destination, of which this one is a growth."""
    is_done: bool = False
    """The very bank is at the destination."""

    @property
    def n_bytes(self) -> int:
        """Bytes to fetch, but for notes."""
        return sum(file.size for file in self.fetch)


def plan_pull(store: Store, out: Path, there: RemoteSeal | None = None) -> PullPlan:
    """What is to be fetched to make `out` the bank of a store.

    Raises what `read_remote_seal` does, `BankMismatch` where another bank lies at `out`,
    `BankError` where something else does.
    """
    there = there or read_remote_seal(store)
    refuse_links(out)
    wanted = list(there.seal.files.values())
    if (out / SEAL).is_file() or (next_folder(out) / SEAL).is_file():
        finish_growth(out)
        return _plan_onto(store, open_bank(out), there)
    if (began := _began(out)) is None:
        if out.exists() and any(path.name != WORK for path in out.iterdir()):
            state = "is being made here" if (out / CARD).is_file() else "is no bank"
            raise BankError(f"{out} exists and {state}; choose another place for the pull")
        return PullPlan(there, tuple(wanted), None)
    kept = [file for file in wanted if began.files.get(file.path) == file]
    if began.root_sha256 != there.seal.root_sha256 and began.recipe_id != there.seal.recipe_id:
        raise BankMismatch(
            f"{out} holds a part of another bank than {store.url}; choose another place, or remove "
            f"it: `patchbank bank rm {out}`",
            {"recipe_id": (began.recipe_id[:16], there.seal.recipe_id[:16])},
        )
    here = {file.path for file in kept if _has_size(out / file.path, file.size)}
    return PullPlan(there, tuple(file for file in wanted if file.path not in here), None)


def _plan_onto(store: Store, here: Bank, there: RemoteSeal) -> PullPlan:
    """The plan where a sealed bank lies at the destination."""
    if here.root_sha256 == there.seal.root_sha256:
        return PullPlan(there, (), None, is_done=True)
    if holds_all_of(here.seal, there.seal, there.schema):
        raise BankMismatch(
            f"{here.path} holds more than {store.url}, which it has grown from; push it: "
            f"`patchbank bank push {here.path} {store.url}`",
            {"clips": (here.n_clips, there.schema.n_clips)},
        )
    if not holds_all_of(there.seal, here.seal, here.schema):
        raise BankMismatch(
            f"{here.path} is another bank than {store.url}; choose another place",
            {"fingerprint": (here.fingerprint[:16], there.seal.fingerprint[:16])},
        )
    fetch = [f for name, f in there.seal.files.items() if here.seal.files.get(name) != f]
    work = next_folder(here.path)
    began = _began(work)
    if began is None and (work / CARD).is_file():
        raise BankError(
            f"{here.path} is growing here, by an extraction; finish that first, or choose another "
            "place"
        )
    if began is not None and began.root_sha256 == there.seal.root_sha256:
        fetch = [file for file in fetch if not _has_size(work / file.path, file.size)]
    return PullPlan(there, tuple(fetch), here)


def _began(folder: Path) -> Seal | None:
    """The seal of the pull that was begun in a folder."""
    path = folder / PULLING
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return parse_seal(file.read(MOST_SEAL_BYTES + 1), where=str(path))


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == size


def pull_bank(
    store: Store,
    out: Path,
    *,
    there: RemoteSeal | None = None,
    limit_bytes_per_s: float | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Bank:
    """The bank of a store, as the folder `out`; the same call finishes what an earlier one began.

    `there` is what the store said before, where the caller has looked at it. Raises what
    `plan_pull` does, `BankCorrupt` where a file is not the sealed one, `BankError` for a full disk,
    `StoreError` where the store gives up.
    """
    say = say or (lambda line: None)
    there = there or read_remote_seal(store)
    # Before anything is made at a place where something else lies.
    plan_pull(store, out, there)
    try:
        with _alone(out, say):
            plan = plan_pull(store, out, there)
            if not plan.is_done:
                _fetch_all(store, out, plan, limit_bytes_per_s, progress)
            fetch_notes(store, out, say)
            (out / PULLING).unlink(missing_ok=True)
        finish_growth(out)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _full(out, error) from error
    return open_bank(out)


@contextmanager
def _alone(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """One pull at a time works in a folder; another waits."""
    (out / WORK).mkdir(parents=True, exist_ok=True)
    if is_held(out / WORK / "seal.lock"):
        say(f"another process works on {out}; waiting for it")
    with owning(out):
        yield


def _fetch_all(
    store: Store,
    out: Path,
    plan: PullPlan,
    limit_bytes_per_s: float | None,
    progress: Progress | None,
) -> None:
    _check_space(out, plan.n_bytes)
    folder = out if plan.grows is None else next_folder(out)
    _begin(folder, plan.there)
    drafts = out / WORK / "pull"
    shutil.rmtree(drafts, ignore_errors=True)
    drafts.mkdir()
    traffic = Traffic(plan.n_bytes, limit_bytes_per_s=limit_bytes_per_s, progress=progress)
    # Large files first: at the end all threads have something to do.
    ordered = sorted((f for f in plan.fetch if f.path != CARD), key=lambda file: -file.size)
    try:
        _check_sizes(store, ordered)
        in_parallel([partial(fetch_file, store, f, folder, drafts, traffic) for f in ordered])
    except (NotInStore, BankCorrupt) as error:
        if seal_content(store) != plan.there.content:
            raise BankError(
                f"{store.url} has grown or was replaced since the pull began; run it again"
            ) from error
        raise
    shutil.rmtree(drafts, ignore_errors=True)
    _seal(out, folder, plan)


def _check_sizes(store: Store, files: Sequence[FileRecord]) -> None:
    """Raises `BankCorrupt`, before anything travels, where a store lists a file of another size."""
    if not store.can_list:
        return
    sizes = with_retries(store.sizes)
    for file in files:
        if (found := sizes.get(file.path)) != file.size:
            what = "is missing" if found is None else f"has {found} bytes, sealed {file.size}"
            raise BankCorrupt(f"{store.url}: {file.path} {what}; {ask_pusher(store)}")


def _begin(folder: Path, there: RemoteSeal) -> None:
    """Says whose files a folder's are before the first one comes; those of another seal go."""
    began = _began(folder)
    if began is not None and began.root_sha256 == there.seal.root_sha256:
        return
    for name, file in ({} if began is None else began.files).items():
        if there.seal.files.get(name) != file:
            inside(folder, name).unlink(missing_ok=True)
    put_small(folder, PULLING, there.content)


def _seal(out: Path, folder: Path, plan: PullPlan) -> None:
    """Puts the card and, last, the seal, once every other file is in its place."""
    put_small(folder, CARD, plan.there.card_content)
    fetched = {file.path for file in plan.fetch}
    for file in plan.there.seal.files.values():
        place = folder if plan.grows is None or file.path in fetched else out
        if not _has_size(inside(folder, file.path), file.size) and not _has_size(
            inside(place, file.path), file.size
        ):
            raise BankError(f"{out}: {file.path} has gone during the pull; run it again")
    # Of a growth it lies beside the new files, so that `finish_growth` moves them in together.
    put_small(folder, SEAL, plan.there.content)


def _check_space(out: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(out).free
    if n_bytes + SPARE_BYTES > free:
        raise BankError(
            f"{out} needs {human_bytes(n_bytes)} more, and {human_bytes(free)} are free on its "
            "disk; free some, choose another disk, or pull less: --layers, --split, --pooled-only"
        )


def _full(out: Path, error: OSError) -> BankError:
    return BankError(
        f"{out}: {error.strerror}; free some space, and run the same command again: what has come "
        "stays"
    )


def fetch_file(store: Store, file: FileRecord, folder: Path, drafts: Path, meter: Meter) -> None:
    """Fetches one sealed file into `folder`, through `drafts`; only the sealed bytes get there.

    Raises `BankCorrupt` where the store has other bytes, twice.
    """
    for attempt in (1, 2):
        draft = drafts / uuid.uuid4().hex
        counted = Counted(meter)
        try:
            with draft.open("xb") as content:
                if file.size:
                    # A full disk shows before anything has travelled.
                    os.posix_fallocate(content.fileno(), 0, file.size)
                found = _receive(store, file, content, counted)
                os.fsync(content.fileno())
            if found == file.sha256:
                target = inside(folder, file.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                draft.replace(target)
                fsync_folder(target.parent)
                return
            counted.take_back()
        except BaseException:
            counted.take_back()
            raise
        finally:
            draft.unlink(missing_ok=True)
        if attempt == 1:
            pause(1)
    raise BankCorrupt(
        f"{store.url}: {file.path} has SHA-256 {found[:12]}, sealed {file.sha256[:12]}: it is "
        f"damaged there or on the way; {ask_pusher(store)}"
    )


def _receive(store: Store, file: FileRecord, content: BinaryIO, meter: Meter) -> str:
    """Writes what comes, goes on where it was cut off, and gives its SHA-256."""
    hasher, n_here, attempt = hashlib.sha256(), 0, 1
    while n_here < file.size:
        before = n_here
        try:
            for piece in store.stream(file.path, n_here, file.size):
                content.write(piece)
                hasher.update(piece)
                n_here += len(piece)
                meter(len(piece))
        except StoreError as error:
            attempt = 1 if n_here > before else attempt + 1
            if not error.may_pass or attempt > TRIES:
                raise
            pause(attempt)
    return hasher.hexdigest()
