"""A data set of the Hugging Face hub as one of its commits holds it, through huggingface_hub.

The first question resolves the branch or tag to a commit, and everything is read from that one; a
commit of our own moves on to itself.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.seal_record import MOST_BYTES
from patchbank.pipeline.errors import NotInStore, PatchbankError, StoreError
from patchbank.pipeline.sharing.hub_errors import store_error
from patchbank.pipeline.sharing.wire import (
    CONNECT_S,
    MOST_FILES,
    READ_BYTES,
    SILENT_S,
    check_range,
    ends_early,
)

COMMIT_ID = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")
COMMITTED_S = 600.0
"""How long the hub may take over a commit without a word."""


@dataclass(frozen=True)
class HubFile:
    """What the hub tells of a file."""

    size: int
    blob_id: str
    """Git's digest of the file, or of the pointer to it."""
    sha256: str | None
    """Of large files only."""


class HubRepository:
    """`org/name` at a branch, tag or commit; safe to ask from many threads."""

    def __init__(self, name: str, revision: str) -> None:
        self.name, self.revision = name, revision
        self._commit: str | None = None
        self._trees: dict[str, Mapping[str, HubFile]] = {}
        self._reading, self.writing = threading.RLock(), threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return HubRepository, (self.name, self._commit or self.revision)

    def __str__(self) -> str:
        return f"hf://datasets/{self.name}"

    @property
    def commit(self) -> str | None:
        """The commit that is read; None where there is no such data set for this user."""
        from huggingface_hub import get_token
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        with self._reading:
            if self._commit is None:
                try:
                    with self.told():
                        found = self.api().dataset_info(
                            self.name, revision=self.revision, timeout=SILENT_S, expand=["sha"]
                        )
                except StoreError as error:
                    cause = error.__cause__
                    is_absent = isinstance(cause, RepositoryNotFoundError)
                    # Without a token it may well be there, and nothing could be written.
                    if not is_absent or isinstance(cause, GatedRepoError) or get_token() is None:
                        raise
                    return None
                self._commit = _commit_id(found.sha)
            return self._commit

    def tree(self, folder: str) -> Mapping[str, HubFile]:
        """All files below a folder, at any depth, by their path in it."""
        with self._reading:
            if folder not in self._trees:
                self._trees[folder] = {} if self.commit is None else self._listed(folder)
            return self._trees[folder]

    def _listed(self, folder: str) -> Mapping[str, HubFile]:
        before = len(folder) + 1 if folder else 0
        entries = self._entries(folder, recursive=True)
        return {e.path[before:]: _hub_file(e) for e in entries if hasattr(e, "blob_id")}

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in a folder."""
        if self.commit is None:
            return []
        entries = self._entries(folder, recursive=False)
        return sorted(e.path.rpartition("/")[2] for e in entries if not hasattr(e, "blob_id"))

    def _entries(self, folder: str, *, recursive: bool) -> list[Any]:
        found: list[Any] = []
        try:
            with self.told():
                for entry in self.api().list_repo_tree(
                    self.name,
                    folder or None,
                    recursive=recursive,
                    revision=self.commit,
                    repo_type="dataset",
                ):
                    if len(found) >= MOST_FILES:
                        raise StoreError(f"{self} lists over {MOST_FILES} files; name a folder")
                    if not _is_below(entry.path, folder):
                        raise StoreError(f"{self} lists a file named {shown(str(entry.path))}")
                    found.append(entry)
        except NotInStore:
            return []
        return found

    def files(self, paths: Sequence[str]) -> dict[str, HubFile]:
        """What the hub tells of some files, at most 1,000; without those that are not there."""
        if self.commit is None:
            return {}
        with self.told():
            found = self.api().get_paths_info(
                self.name, list(paths), revision=self.commit, repo_type="dataset"
            )
            return {e.path: _hub_file(e) for e in found if hasattr(e, "blob_id")}

    def stream(self, path: str, start: int, stop: int | None) -> Iterator[bytes]:
        """Bytes from `start`, at most up to `stop`, the end of the file where None."""
        from huggingface_hub import get_session, hf_hub_url, utils

        client: Any = utils  # whose names are not declared

        where = f"{self}/{path}"
        if self.commit is None:
            raise NotInStore(f"{self} has no file {path}: there is no such data set")
        with self.told(path):
            url = hf_hub_url(
                self.name, path, repo_type="dataset", revision=self.commit,
                endpoint=self.api().endpoint,
            )  # fmt: skip
            headers = client.build_hf_headers() | {"Accept-Encoding": "identity"}
            if stop is not None:
                headers["Range"] = f"bytes={start}-{stop - 1}"
            asked = get_session().stream("GET", url, headers=headers, timeout=SILENT_S)
            with asked as answer:
                if answer.status_code == 416:
                    raise ends_early(where, start, stop or 0)
                client.hf_raise_for_status(answer)
                if stop is not None:
                    told = answer.headers.get("Content-Range")
                    check_range(where, told, start, whole=answer.status_code == 200)
                for piece in answer.iter_raw(READ_BYTES):
                    piece = piece if stop is None else piece[: stop - start]
                    start += len(piece)
                    if piece:
                        yield piece
                    if start == stop:
                        return
            if stop is not None:
                raise ends_early(where, start, stop)

    def begin_writing(self) -> None:
        """Looks at the branch as it is now; makes the data set, private, where it is not there."""
        with self._reading:
            self._commit = None
            self._trees.clear()
        if self.commit is None:
            with self.told():
                self.api().create_repo(self.name, private=True, repo_type="dataset", exist_ok=True)

    def upload(self, additions: Sequence[Any]) -> None:
        """Sends the content of large files, but for what the hub holds already."""
        with self.told(), _quietly():
            self.api().preupload_lfs_files(
                self.name,
                additions,
                repo_type="dataset",
                revision=self.revision,
                free_memory=False,
            )

    def change(self, operations: Sequence[Any], message: str) -> None:
        """A commit on the branch; what is read from now on is what it holds."""
        with self.told(), _quietly():
            done = self.api().create_commit(
                self.name,
                operations,
                commit_message=message,
                repo_type="dataset",
                revision=self.revision,
            )
            with self._reading:
                self._commit = _commit_id(done.oid)
                self._trees.clear()

    def api(self) -> Any:
        """The hub's client, for the endpoint of this moment, which is never waited for for ever."""
        from huggingface_hub import HfApi, get_session

        client = get_session()
        if client.timeout.read is None:
            client.timeout = type(client.timeout)(COMMITTED_S, connect=CONNECT_S)
        return HfApi()

    @contextmanager
    def told(self, path: str | None = None) -> Iterator[None]:
        """Errors of the hub and of its client as `StoreError`, without tokens and signed URLs."""
        try:
            yield
        except PatchbankError:
            raise
        # What a way through other people's machines raises is not bounded.
        except Exception as error:
            raise store_error(error, name=self.name, revision=self.revision, path=path) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the client's bars, and its warnings, which show signed addresses."""
    from huggingface_hub import utils

    client: Any = utils  # whose names are not declared
    had_bars, level = not client.are_progress_bars_disabled(), client.logging.get_verbosity()
    if had_bars:
        client.disable_progress_bars()
    client.logging.set_verbosity_error()
    try:
        yield
    finally:
        client.logging.set_verbosity(level)
        if had_bars:
            client.enable_progress_bars()


def _commit_id(value: object) -> str:
    if not isinstance(value, str) or not COMMIT_ID.fullmatch(value):
        raise StoreError(f"the hub names a commit {shown(str(value))}, expected 40 digits")
    return value


def is_inside(path: str) -> bool:
    """Whether a path stays in the folder that it begins in, and is spelt in its one way."""
    return not {"", ".", ".."} & set(path.split("/")) and "\\" not in path and "\0" not in path


def _is_below(path: object, folder: str) -> bool:
    is_here = isinstance(path, str) and (not folder or path.startswith(f"{folder}/"))
    return is_here and is_inside(str(path))


def _hub_file(entry: Any) -> HubFile:
    size = entry.size
    if type(size) is not int or not 0 <= size < MOST_BYTES:
        raise StoreError(f"the hub tells a size of {shown(str(size))} for a file")
    sha256 = str(entry.lfs.sha256) if entry.lfs else None
    is_digest = sha256 is not None and SHA256.fullmatch(sha256)
    return HubFile(size, str(entry.blob_id), sha256 if is_digest else None)
