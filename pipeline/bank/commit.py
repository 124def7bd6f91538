"""All or nothing: how a shard's files come into a bank.

An attempt writes into a folder of its own under `.work/`. Then its commit record is hard-linked
into `commits/`, which fails where a record exists, so that exactly one attempt wins; only the
winner's files are renamed into place. A process killed between the link and the last rename leaves
a record whose files still lie in its attempt: `recover` finishes those renames. An attempt holds a
lock that dies with its process, so that `recover` can tell a dead one and clear it away.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from patchbank.pipeline.bank.seal_record import NO_JSON, SEAL, file_record, parse_json
from patchbank.pipeline.bank.sealed_names import RECORDED_FOLDERS
from patchbank.pipeline.bank.writer import FileRecord, fsync_folder, fsync_tree, write_durably
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.pipeline.specs import Json

WORK = ".work"
NEXT = f"{WORK}/next"
"""Where the shards of a growth lie until the bank is sealed again."""
LOCK = "lock"
SEAL_LOCK = "seal.lock"
DRAFT = "commit.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""
STALE_S = 3_600
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK)


@contextmanager
def open_attempt(bank: Path, name: str) -> Iterator[Path]:
    """A fresh folder under `.work/`, removed at the end unless a kill comes first.

    Raises `FileNotFoundError` where `bank` is not there, or another process seals it meanwhile.
    """
    attempt, descriptor = _locked_attempt(bank, name)
    try:
        yield attempt
    except BaseException:
        # What is committed but not yet in place is left to `recover`.
        if not _is_linked(attempt):
            shutil.rmtree(attempt, ignore_errors=True)
        raise
    else:
        shutil.rmtree(attempt, ignore_errors=True)
    finally:
        os.close(descriptor)
        if (bank / SEAL).is_file():
            # Of a worker that was given up and woke after the seal; nobody else clears it.
            with contextlib.suppress(OSError):
                (bank / WORK).rmdir()


def _locked_attempt(bank: Path, name: str) -> tuple[Path, int]:
    while True:
        # Never the bank itself: where it is not, this machine does not see the shared disk.
        (bank / WORK).mkdir(exist_ok=True)
        attempt = bank / WORK / f"{name}.{uuid.uuid4().hex}"
        attempt.mkdir()
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, attempt, ignore_errors=True)
            descriptor = os.open(attempt / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            undo.callback(os.close, descriptor)
            _lock(descriptor)
            os.write(descriptor, socket.gethostname().encode())
            # Before the lock, `recover` may have taken the attempt for a dead one.
            if (attempt / LOCK).is_file():
                undo.pop_all()
                return attempt, descriptor


def _is_linked(attempt: Path) -> bool:
    try:
        return (attempt / DRAFT).stat().st_nlink > 1
    except OSError:
        return False


def _lock(descriptor: int) -> None:
    """Waits for a lock that dies with its process.

    Where the file system has none, attempts of dead processes stay until the seal, and two
    processes must not seal at once.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


@contextmanager
def owning(bank: Path) -> Iterator[None]:
    """Holds a bank's lock: one process at a time recovers or seals it."""
    descriptor = _owned(bank)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _leave_nothing(bank, descriptor)
        os.close(descriptor)


def _leave_nothing(bank: Path, descriptor: int) -> None:
    """Removes the own lock of a sealed bank, on which there is no other work."""
    lock = bank / WORK / SEAL_LOCK
    if (
        (bank / SEAL).is_file()
        and [path.name for path in (bank / WORK).iterdir()] == [SEAL_LOCK]
        and lock.stat().st_ino == os.fstat(descriptor).st_ino
    ):
        lock.unlink()
        (bank / WORK).rmdir()


def _owned(bank: Path) -> int:
    path = bank / WORK / SEAL_LOCK
    while True:
        # Who holds it may seal the bank meanwhile and remove the lock with `.work/`.
        path.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(descriptor)
                if path.stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


@contextmanager
def unless_committed(bank: Path, name: str) -> Iterator[None]:
    """Passes over an attempt that was cleared away because another process was faster."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, BankError):
        if read_record(bank, name) is None:
            raise


def record_path(bank: Path, name: str) -> Path:
    """Where the commit record of `name` lies."""
    return bank / "commits" / f"{name}.json"


def shard_name(shard: int) -> str:
    """Name of a shard in records and errors."""
    return f"{shard:05d}"


def commit(bank: Path, attempt: Path, name: str, files: Iterable[FileRecord], facts: Json) -> bool:
    """Publishes an attempt; False, and nothing changed, where another attempt was faster.

    `files` have paths relative to the attempt, which are also their paths in the bank.
    """
    record = {"name": name, **facts, "files": [asdict(file) for file in files]}
    draft = attempt / DRAFT
    write_durably(draft, json.dumps(record, indent=1, sort_keys=True).encode())
    fsync_tree(attempt)
    if not (attempt / LOCK).is_file():
        # Cleared away while its process was stopped; what was written since is not all of it.
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(attempt / LOCK))
    try:
        os.link(draft, record_path(bank, name))
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        raise BankError(
            f"the file system of {bank} has no hard links ({error.strerror}), by which exactly one "
            "of several attempts wins; choose another disk for --out"
        ) from error
    fsync_folder(bank / "commits")
    _publish(bank, attempt, record)
    return True


def read_record(bank: Path, name: str) -> Json | None:
    """The commit record of `name`, None where it is not committed."""
    try:
        record = parse_json(record_path(bank, name).read_bytes())
        for file in record["files"]:
            file_record(file, folders=RECORDED_FOLDERS)
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, *NO_JSON) as error:
        raise BankCorrupt(
            f"commits/{name}.json is damaged ({error}); remove that file and run the same extract "
            "command again, which redoes the shard"
        ) from error
    return dict(record)


def committed_names(bank: Path) -> set[str]:
    """Names that have a commit record."""
    return {path.stem for path in (bank / "commits").glob("*.json")}


def recover(bank: Path) -> None:
    """Puts an unsealed bank in order after a kill.

    Finishes the renames of every record whose attempt was cut short, withdraws records whose files
    are nowhere to be found, so that their shards are done again, and clears away dead attempts.
    """
    with owning(bank):
        recover_owned(bank)


def recover_owned(bank: Path) -> None:
    """`recover` for who owns the bank already."""
    for name in sorted(committed_names(bank)):
        record = read_record(bank, name)
        if record is None or not _missing_files(bank, record):
            continue
        own = record_path(bank, name).read_bytes()
        for draft in (bank / WORK).glob(f"{name}.*/{DRAFT}"):
            with contextlib.suppress(FileNotFoundError):
                if draft.read_bytes() == own:
                    _publish(bank, draft.parent, record)
        if _missing_files(bank, record):
            record_path(bank, name).unlink(missing_ok=True)
    clear_dead_attempts(bank)


def clear_dead_attempts(bank: Path) -> None:
    """Removes what attempts of dead processes have left; for who owns the bank."""
    for attempt in (bank / WORK).glob("*.*/"):
        with _dead(attempt) as is_dead:
            if is_dead:
                shutil.rmtree(attempt, ignore_errors=True)


def dead_attempts(bank: Path) -> list[Path]:
    """Attempts whose processes are dead."""
    found = []
    for attempt in sorted((bank / WORK).glob("*.*/")):
        with _dead(attempt) as is_dead:
            found += [attempt] * is_dead
    return found


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock; False where there is none, or the disk has no locks."""
    with contextlib.suppress(OSError):
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
    return False


def live_attempts(bank: Path) -> set[str]:
    """Names of the shards and other work that some process works on now."""
    alive = set()
    # Names with a dot in front are skeletons of a growth, which no process holds.
    for attempt in (bank / WORK).glob("[!.]*.*/"):
        with _dead(attempt) as is_dead:
            if not is_dead:
                alive.add(attempt.name.rpartition(".")[0])
    return alive


@contextmanager
def _dead(attempt: Path) -> Iterator[bool]:
    """Whether the attempt's process is dead; meanwhile no process begins to work in it."""
    try:
        descriptor = os.open(attempt / LOCK, os.O_RDWR)
    except OSError:
        yield False  # just being made, or just being removed
        return
    try:
        yield _locks_at_once(descriptor) and _may_be_judged(attempt, descriptor)
    finally:
        os.close(descriptor)


def _may_be_judged(attempt: Path, descriptor: int) -> bool:
    """Whether the lock of an attempt tells: on a network disk it may hold on its own host only.

    What another host has not touched for an hour is dead, too.
    """
    if os.read(descriptor, 1_024) in (b"", socket.gethostname().encode()):
        return True
    touched = [attempt.stat().st_mtime]
    for path in attempt.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            touched.append(path.stat().st_mtime)
    return time.time() - max(touched) > STALE_S


def _locks_at_once(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _missing_files(bank: Path, record: Json) -> list[str]:
    """Recorded files that are not there in their recorded size."""
    parts_are_gathered = (bank / "clips.parquet").is_file()
    return [
        file["path"]
        for file in record["files"]
        if not (parts_are_gathered and file["path"].startswith("parts/"))
        and not _has_size(bank / file["path"], file["size"])
    ]


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _publish(bank: Path, attempt: Path, record: Json) -> None:
    folders = set()
    for file in record["files"]:
        source, target = attempt / file["path"], bank / file["path"]
        # Another process that recovers may have been faster with the same file; it may even have
        # sealed the bank, so that no folder is made for nothing. (A folder that goes while `mkdir`
        # looks at it is said to exist.)
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            source.stat()
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            folders.add(target.parent)
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            fsync_folder(folder)
