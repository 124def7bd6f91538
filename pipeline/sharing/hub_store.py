"""Data sets of the Hugging Face hub as stores: hf://datasets/org/name[@revision][/folder].

A folder is written by commits of many files each, whose content goes ahead of them; what the hub
holds already is not sent again. The token comes from where huggingface_hub takes it: HF_TOKEN, or
`hf auth login`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.hub_repository import COMMIT_ID, HubFile, HubRepository, is_inside
from patchbank.pipeline.sharing.notes import CARD
from patchbank.pipeline.sharing.store import Meter, Upload
from patchbank.pipeline.sharing.stores import safe_url
from patchbank.pipeline.sharing.transfer import Counted, with_retries
from patchbank.pipeline.sharing.wire import too_large

ADDRESS = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<folder>.*?))?/*"
)
MAIN = "main"
COMMIT_FILES, COMMIT_BYTES = 250, 10 * 10**9
"""Of one commit, at most, but for a single larger file: the hub takes few commits an hour."""
SENT_FILES, SENT_BYTES = 50, 10**9
"""What is sent between two looks at the progress, likewise."""
REPOSITORYS_OWN = (".gitattributes", "README.md")
"""Files that a data set has at its top, whatever lies there."""
PAGE = "README.md"


class HubStore:
    """See `Store`. A folder of a data set; a revision that is a commit can only be read."""

    can_list = True

    def __init__(self, repository: HubRepository, folder: str, revision: str | None) -> None:
        self.repository, self.folder, self.revision = repository, folder, revision

    @classmethod
    def open(cls, place: str) -> HubStore:
        """The store of an address; `StoreError` for one that names no data set."""
        found = ADDRESS.fullmatch(place.split("?", 1)[0])
        folder = (found and found["folder"]) or ""
        if found is None or (folder and not is_inside(folder)):
            raise StoreError(
                f"{safe_url(place)} names no data set of the hub; expected "
                "hf://datasets/org/name, with @revision and a folder where needed"
            )
        revision = unquote(found["revision"]) if found["revision"] else None
        return cls(HubRepository(found["name"], revision or MAIN), folder, revision)

    @property
    def url(self) -> str:
        at = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.repository}{at}/{self.folder}".rstrip("/")

    @property
    def is_writable(self) -> bool:
        return COMMIT_ID.fullmatch(self.revision or "") is None

    def below(self, part: str) -> HubStore:
        return HubStore(self.repository, self._path(part), self.revision)

    def sizes(self) -> Mapping[str, int]:
        own = () if self.folder else REPOSITORYS_OWN
        tree = self.repository.tree(self.folder)
        return {name: file.size for name, file in tree.items() if name not in own}

    def folders(self) -> Sequence[str]:
        return self.repository.folders(self.folder)

    def size(self, name: str) -> int | None:
        path = self._path(name)
        found = self.repository.files([path]).get(path)
        return None if found is None else found.size

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        if start < stop:
            yield from self.repository.stream(self._path(name), start, stop)

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        content = bytearray()
        try:
            for piece in self.repository.stream(self._path(name), 0, None):
                content += piece
                if len(content) > most_bytes:
                    raise too_large(f"{self.url}/{name}", most_bytes)
        except NotInStore:
            return None
        return bytes(content)

    def put(self, upload: Upload, meter: Meter) -> None:
        self._commit([upload], Counted(meter))

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        for batch in in_batches(uploads, most_files=COMMIT_FILES, most_bytes=COMMIT_BYTES):
            counted = Counted(meter)
            with_retries(partial(self._commit, batch, counted))
            for upload in batch:
                done(upload)

    def _commit(self, uploads: Sequence[Upload], counted: Counted) -> None:
        """One commit of these files, proven to hold what was meant."""
        with self.repository.writing:
            try:
                self.repository.begin_writing()
                before = self._pages(uploads)
                additions = []
                for group in in_batches(uploads, most_files=SENT_FILES, most_bytes=SENT_BYTES):
                    additions += self._send(group)
                    counted(sum(upload.record.size for upload in group))
                self.repository.change(additions, self._message(uploads))
                self._check_arrived(uploads, additions)
            except BaseException:
                counted.take_back()
                raise
            self._show_card(uploads, before)

    def _send(self, uploads: Sequence[Upload]) -> list[Any]:
        """What a commit of these files takes; their content, where large, is there then."""
        from huggingface_hub import CommitOperationAdd

        additions = []
        for upload in uploads:
            with self.repository.told():
                addition = CommitOperationAdd(self._path(upload.record.path), upload.source)
            additions.append(addition)
            if upload.record.size != addition.upload_info.size:
                raise self._damaged(upload, f"has {addition.upload_info.size} bytes")
        self.repository.upload(additions)
        for upload, addition in zip(uploads, additions, strict=True):
            # Digests of what was read, whoever read it.
            if (found := addition.upload_info.sha256.hex()) != upload.record.sha256:
                raise self._damaged(upload, f"has SHA-256 {found[:12]}")
        return additions

    def _check_arrived(self, uploads: Sequence[Upload], additions: Sequence[Any]) -> None:
        there = self.repository.files([addition.path_in_repo for addition in additions])
        for upload, addition in zip(uploads, additions, strict=True):
            found, record = there.get(addition.path_in_repo), upload.record
            if found is None:
                raise StoreError(
                    f"{self.url}: {record.path} is not in the commit that was made of it; if a "
                    ".gitignore of the data set names it, remove that"
                )
            expected = record.sha256 if found.sha256 else _blob_id(upload)
            if (found.sha256 or found.blob_id) != expected or found.size != record.size:
                raise StoreError(
                    f"{self.url}: {record.path} arrived as {found.size} bytes with another digest; "
                    "run the same push again",
                    may_pass=True,
                )

    def _pages(self, uploads: Sequence[Upload]) -> Mapping[str, HubFile]:
        """The page of the data set and the card of the bank, where a card is put."""
        if not any(upload.record.path == CARD for upload in uploads):
            return {}
        return self.repository.files([PAGE, self._path(CARD)])

    def _show_card(self, uploads: Sequence[Upload], before: Mapping[str, HubFile]) -> None:
        """Makes the card of a bank the page of a data set that has none, or has the card's last
        version; a page that somebody wrote stays."""
        from huggingface_hub import CommitOperationAdd

        page, card = before.get(PAGE), before.get(self._path(CARD))
        if page is not None and (card is None or card.blob_id != page.blob_id):
            return
        for upload in uploads:
            # The bank is whole without it.
            if upload.record.path == CARD and isinstance(upload.source, bytes):
                with suppress(StoreError):
                    addition = CommitOperationAdd(PAGE, upload.source)
                    self.repository.change([addition], f"Show the card of {self.url}")

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        if size != record.size:
            return False
        found = self.repository.tree(self.folder).get(record.path)
        return None if found is None or found.sha256 is None else found.sha256 == record.sha256

    def remove(self, names: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete

        there = self.repository.tree(self.folder)
        gone = [CommitOperationDelete(self._path(name)) for name in names if name in there]
        if gone:
            with self.repository.writing:
                self.repository.change(gone, f"Remove {len(gone)} files")

    def _message(self, uploads: Sequence[Upload]) -> str:
        what = uploads[0].record.path if len(uploads) == 1 else f"{len(uploads)} files"
        return f"Put {what} into {self.folder or 'the data set'}"

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name

    def _damaged(self, upload: Upload, found: str) -> StoreError:
        return StoreError(
            f"{self.url}/{upload.record.path}: the file here {found}, expected "
            f"{upload.record.size} bytes of SHA-256 {upload.record.sha256[:12]}: it is damaged or "
            "was changed, and was not put; run `patchbank bank verify` on the bank"
        )


def in_batches(
    uploads: Sequence[Upload], *, most_files: int, most_bytes: int
) -> Iterator[list[Upload]]:
    """The same in order, few enough at a time; a larger file goes alone."""
    batch: list[Upload] = []
    n_bytes = 0
    for upload in uploads:
        if batch and (len(batch) == most_files or n_bytes + upload.record.size > most_bytes):
            yield batch
            batch, n_bytes = [], 0
        batch.append(upload)
        n_bytes += upload.record.size
    if batch:
        yield batch


def _blob_id(upload: Upload) -> str:
    """What git names a file of this content."""
    source = upload.source
    content = source if isinstance(source, bytes) else source.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
