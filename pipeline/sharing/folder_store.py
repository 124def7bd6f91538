"""A folder of this disk, or of a network share that is mounted, as a store."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

from patchbank.pipeline.bank.commit import NO_LINKS, STALE_S
from patchbank.pipeline.bank.writer import FileRecord, fsync_folder
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.store import PIECE_BYTES, Meter, Upload
from patchbank.pipeline.sharing.stores import safe_url
from patchbank.pipeline.sharing.transfer import put_in_parallel

Made = TypeVar("Made")
MOST_TURNS = 100
DRAFTS = ".work"
"""Where files lie until they are whole, in the folder that the store was opened at; a bank has
nothing that is sealed there."""
MAY_PASS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY, errno.EAGAIN)
"""What a network share answers while its server is away."""


class FolderStore:
    """See `Store`. No link below its folder is followed, in reading or in writing."""

    is_writable = True
    can_list = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, place: str) -> FolderStore:
        """The store of a path, or of a file:// address of this machine."""
        if "://" not in place:
            return cls(Path(place))
        parts = urlsplit(place)
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"{safe_url(place)} is of another machine; mount its share first")
        return cls(Path(unquote(parts.path)))

    @property
    def url(self) -> str:
        return str(self.folder)

    def below(self, part: str) -> FolderStore:
        return FolderStore(self.folder / part)

    def sizes(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        left = [self.folder]
        while left:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(left.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name != DRAFTS:
                            left.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        name = Path(entry.path).relative_to(self.folder).as_posix()
                        with suppress(FileNotFoundError):
                            found[name] = entry.stat(follow_symlinks=False).st_size
        return found

    def folders(self) -> Sequence[str]:
        try:
            with os.scandir(self.folder) as entries:
                return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int | None:
        path = self._path(name)
        try:
            return path.stat().st_size if path.is_file() else None
        except OSError:
            return None

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        try:
            with _open_regular(self._path(name)) as file:
                file.seek(start)
                while start < stop:
                    piece = file.read(min(PIECE_BYTES, stop - start))
                    if not piece:
                        raise StoreError(
                            f"{self.url}/{name} ends at byte {start}, expected {stop}",
                            may_pass=True,
                        )
                    start += len(piece)
                    yield piece
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotInStore(f"{self.url} has no file {name}") from None

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        size = self.size(name)
        if size is None:
            return None
        if size > most_bytes:
            raise StoreError(f"{self.url}/{name} has {size} bytes, expected at most {most_bytes}")
        return b"".join(self.stream(name, 0, size))

    def put(self, upload: Upload, meter: Meter) -> None:
        record = upload.record
        target = self._path(record.path)
        try:
            self._put(upload, target, meter)
        except OSError as error:
            raise StoreError(
                f"{self.url}/{record.path} cannot be written: {error.strerror}; free some space or "
                "ask for the right to write, and run the same command again",
                may_pass=error.errno in MAY_PASS,
            ) from error

    def create(self, upload: Upload) -> bool:
        """See `claim.CreatesOnce`."""
        assert isinstance(upload.source, bytes)
        target = self._path(upload.record.path)
        try:
            return self._create(upload.source, target)
        except OSError as error:
            raise StoreError(
                f"{self.url}/{upload.record.path} cannot be written: {error.strerror}; free some "
                "space or ask for the right to write, and run the same command again"
            ) from error

    def _create(self, content: bytes, target: Path) -> bool:
        draft, file = self._open_draft()
        try:
            with file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _in_folder_of(target, lambda: target.parent.stat())
            os.link(draft, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self._create_without_links(content, target)
        finally:
            draft.unlink(missing_ok=True)
            with suppress(OSError):
                draft.parent.rmdir()
        return True

    def _create_without_links(self, content: bytes, target: Path) -> bool:
        try:
            with target.open("xb") as file:
                file.write(content)
        except FileExistsError:
            return False
        return True

    def _put(self, upload: Upload, target: Path, meter: Meter) -> None:
        record = upload.record
        draft, file = self._open_draft()
        # Open, and so locked, until it has its name.
        with file:
            try:
                for piece in pieces_of(upload.source):
                    file.write(piece)
                    meter(len(piece))
                file.flush()
                os.fsync(file.fileno())
                self._publish(draft, target, record)
            finally:
                draft.unlink(missing_ok=True)
                with suppress(OSError):
                    draft.parent.rmdir()

    def _publish(self, draft: Path, target: Path, record: FileRecord) -> None:
        try:
            self._check(draft, record)
            _in_folder_of(target, lambda: draft.replace(target))
            fsync_folder(target.parent)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.url}/{record.path}: another process removed it while it was written; run "
                "the same command again",
                may_pass=True,
            ) from error

    def _check(self, draft: Path, record: FileRecord) -> None:
        with draft.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != record.sha256:
            raise StoreError(
                f"{self.url}/{record.path}: what arrived has SHA-256 {found[:12]}, expected "
                f"{record.sha256[:12]}: the file here or the disk there is damaged; run "
                "`patchbank bank verify` on the bank"
            )

    def _open_draft(self) -> tuple[Path, BinaryIO]:
        draft = self._path(DRAFTS) / f"put.{uuid.uuid4().hex}"
        file = _in_folder_of(draft, lambda: draft.open("xb"))
        with suppress(OSError):  # no locks on this disk: drafts of the killed stay
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return draft, file

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        self._sweep()
        put_in_parallel(self, uploads, meter, done)

    def _sweep(self) -> None:
        """Removes the drafts of processes that were killed: nobody holds their locks.

        On a network share a lock may hold on its own machine only, so that age counts, too.
        """
        drafts: list[Path] = []
        with suppress(
            FileNotFoundError
        ):  # another push has just removed the folder, as it was empty
            drafts = list((self.folder / DRAFTS).glob(f"put.{'[0-9a-f]' * 32}"))
        for draft in drafts:
            with suppress(OSError), draft.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - draft.stat().st_mtime > STALE_S:
                    draft.unlink()
        with suppress(OSError):
            (self.folder / DRAFTS).rmdir()

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        return False if size != record.size else None

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            path = self._path(name)
            path.unlink(missing_ok=True)
            with suppress(OSError):
                while path.parent != self.folder.parent:
                    path = path.parent
                    path.rmdir()

    def _path(self, name: str) -> Path:
        """Where a file lies; `StoreError` where a folder on the way, or the file, is a link."""
        path = self.folder
        for part in name.split("/"):
            path = path / part
            if path.is_symlink():
                raise StoreError(f"{path} is a link, which a bank does not have; remove it")
        return path


def _open_regular(path: Path) -> BinaryIO:
    """A file to read; `StoreError` for a pipe or a device, which might never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(path)
        raise StoreError(f"{path} is no regular file, which a bank does not have; remove it")
    return os.fdopen(descriptor, "rb")


def _in_folder_of(path: Path, work: Callable[[], Made]) -> Made:
    """Does what needs the folder that `path` lies in, which others remove whenever it is empty."""
    for _ in range(MOST_TURNS):
        with suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return work()
    path.parent.mkdir(parents=True, exist_ok=True)
    return work()


def pieces_of(source: Path | bytes) -> Iterator[bytes]:
    """The bytes of an upload."""
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece
