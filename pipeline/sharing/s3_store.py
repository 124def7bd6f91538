"""A bucket of Amazon S3, or of any server that speaks its protocol, as a store."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.s3_client import Exists, asking, connect
from patchbank.pipeline.sharing.store import Meter, Upload
from patchbank.pipeline.sharing.transfer import in_parallel, put_in_parallel, with_retries
from patchbank.pipeline.sharing.upkeep import UnfinishedUpload
from patchbank.pipeline.sharing.wire import (
    ASK_TRIES,
    MOST_FILES,
    READ_BYTES,
    Outgoing,
    PerProcess,
    check_range,
    ends_early,
    span_sha256,
    too_large,
)

SINGLE_BYTES = 512 * 2**20
"""Larger files go in parts. A bank's shards are smaller: of a file that went whole a server keeps
the SHA-256, of one that went in parts only a digest of digests."""
PART_BYTES = 128 * 2**20
MOST_PARTS = 10_000


class S3Store:
    """See `Store`. A file is one object; the server is told its SHA-256 and refuses other bytes."""

    is_writable = True
    can_list = True

    def __init__(self, bucket: str, prefix: str, client: PerProcess[Any]) -> None:
        self.bucket, self.prefix = bucket, prefix
        self._client = client

    @classmethod
    def open(cls, url: str) -> S3Store:
        """The store of s3://bucket/folder; nothing is asked of the server yet."""
        parts = urlsplit(url)
        if "@" in parts.netloc or not parts.netloc:
            raise StoreError("expected s3://bucket/folder, without user and password")
        rest = url.split("://", 1)[1]
        return cls(parts.netloc, rest.partition("/")[2].strip("/"), PerProcess(connect))

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def below(self, part: str) -> S3Store:
        return S3Store(self.bucket, self._key(part), self._client)

    def sizes(self) -> Mapping[str, int]:
        return {
            entry["Key"].removeprefix(self._folder): entry["Size"]
            for page in self._pages()
            for entry in page.get("Contents", ())
            if entry["Key"].startswith(self._folder) and not entry["Key"].endswith("/")
        }

    def folders(self) -> Sequence[str]:
        found = [
            entry["Prefix"].removeprefix(self._folder).rstrip("/")
            for page in self._pages(Delimiter="/")
            for entry in page.get("CommonPrefixes", ())
        ]
        return sorted(name for name in found if name)

    def size(self, name: str) -> int | None:
        answer = self._head(name)
        if answer is not None and "ContentLength" not in answer:
            raise StoreError(f"{self.url}/{name}: the server does not tell how large it is")
        return None if answer is None else int(answer["ContentLength"])

    def stream(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        if start >= stop:
            return
        where = f"{self.url}/{name}"
        with asking(self.url, name, self.bucket):
            answer = self._call("get_object", name, Range=f"bytes={start}-{stop - 1}")
            body = answer["Body"]
            try:
                whole = answer["ResponseMetadata"]["HTTPStatusCode"] == 200
                check_range(where, answer.get("ContentRange"), start, whole=whole)
                while start < stop:
                    piece = body.read(min(READ_BYTES, stop - start))
                    if not piece:
                        raise ends_early(where, start, stop)
                    start += len(piece)
                    yield piece
            finally:
                body.close()

    def document(self, name: str, *, most_bytes: int) -> bytes | None:
        return with_retries(partial(self._document, name, most_bytes), tries=ASK_TRIES)

    def _document(self, name: str, most_bytes: int) -> bytes | None:
        with asking(self.url, name, self.bucket):
            try:
                body = self._call("get_object", name)["Body"]
            except NotInStore:
                return None
            try:
                content: bytes = body.read(most_bytes + 1)
            finally:
                body.close()
        if len(content) > most_bytes:
            raise too_large(f"{self.url}/{name}", most_bytes)
        return content

    def put(self, upload: Upload, meter: Meter) -> None:
        if upload.record.size <= SINGLE_BYTES:
            self._put_whole(upload, meter)
        else:
            self._put_parts(upload, meter)

    def create(self, upload: Upload) -> bool:
        """See `claim.CreatesOnce`; servers that do not know the condition overwrite."""
        try:
            self._call("put_object", upload.record.path, Body=upload.source, IfNoneMatch="*")
        except Exists:
            return False
        return True

    def _put_whole(self, upload: Upload, meter: Meter) -> None:
        record = upload.record
        checksum = base64.b64encode(bytes.fromhex(record.sha256)).decode()
        with Outgoing(upload, meter) as body:
            answer = self._call(
                "put_object",
                record.path,
                Body=body,
                ContentLength=record.size,
                ChecksumSHA256=checksum,
            )
            body.check()
        self._prove(record, answer, etag=body.md5.hexdigest(), checksum=checksum)

    def _put_parts(self, upload: Upload, meter: Meter) -> None:
        record = upload.record
        begun = self._call("create_multipart_upload", record.path, ChecksumAlgorithm="SHA256")
        ask = partial(self._call, name=record.path, UploadId=begun["UploadId"])
        try:
            parts = list(self._send_parts(upload, meter, ask))
            told = [{k: v for k, v in part.items() if k != "md5"} for part in parts]
            answer = ask("complete_multipart_upload", MultipartUpload={"Parts": told})
        except BaseException:
            with suppress(StoreError):
                ask("abort_multipart_upload")
            raise
        md5s = b"".join(part["md5"] for part in parts)
        sha256s = b"".join(base64.b64decode(part["ChecksumSHA256"]) for part in parts)
        etag = hashlib.md5(md5s, usedforsecurity=False).hexdigest()
        checksum = base64.b64encode(hashlib.sha256(sha256s).digest()).decode()
        self._prove(
            record, answer, etag=f"{etag}-{len(parts)}", checksum=f"{checksum}-{len(parts)}"
        )

    def _send_parts(
        self, upload: Upload, meter: Meter, ask: Callable[..., dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Sends one part after another, each again where it fails; yields what tells of it."""
        size = upload.record.size
        step = max(PART_BYTES, -(-size // MOST_PARTS))
        before = hashlib.sha256()
        for number, start in enumerate(range(0, size, step), start=1):
            span = (start, min(size, start + step))
            part, before = with_retries(
                partial(self._send_part, upload, meter, ask, number, span, before)
            )
            yield part

    def _send_part(
        self,
        upload: Upload,
        meter: Meter,
        ask: Callable[..., dict[str, Any]],
        number: int,
        span: tuple[int, int],
        before: hashlib._Hash,
    ) -> tuple[dict[str, Any], hashlib._Hash]:
        start, stop = span
        checksum = base64.b64encode(span_sha256(upload.source, start, stop)).decode()
        with Outgoing(upload, meter, start=start, stop=stop, before=before) as body:
            answer = ask(
                "upload_part",
                PartNumber=number,
                Body=body,
                ContentLength=len(body),
                ChecksumSHA256=checksum,
            )
            told = {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}
            return told | {"md5": body.md5.digest()}, body.sha256

    def _prove(
        self, record: FileRecord, answer: Mapping[str, Any], *, etag: str, checksum: str
    ) -> None:
        """Returns once the server's object is proven to be what was sent."""
        # The MD5 first: it was not sent along, so that a server cannot just repeat it.
        if answer.get("ETag", "").strip('"') == etag or answer.get("ChecksumSHA256") == checksum:
            return
        found, size = hashlib.sha256(), self.size(record.path)
        if size == record.size:
            for piece in self.stream(record.path, 0, record.size):
                found.update(piece)
        if size != record.size or found.hexdigest() != record.sha256:
            raise StoreError(
                f"{self.url}/{record.path}: what arrived has {size} bytes of SHA-256 "
                f"{found.hexdigest()[:12]}, expected {record.size} of {record.sha256[:12]}",
                may_pass=True,
            )

    def put_all(
        self, uploads: Sequence[Upload], meter: Meter, done: Callable[[Upload], None]
    ) -> None:
        put_in_parallel(self, uploads, meter, done)

    def proves(self, record: FileRecord, *, size: int) -> bool | None:
        if size != record.size:
            return False
        answer = self._head(record.path, ChecksumMode="ENABLED")
        if answer is None:
            return False
        # Servers that do not know checksums give back those that they were sent; the type is never
        # sent, so that who tells it has computed the digest.
        if answer.get("ChecksumType") != "FULL_OBJECT" or "ChecksumSHA256" not in answer:
            return None
        return bool(base64.b64decode(answer["ChecksumSHA256"]).hex() == record.sha256)

    def remove(self, names: Sequence[str]) -> None:
        in_parallel([partial(self._remove, name) for name in names])

    def _remove(self, name: str) -> None:
        with suppress(NotInStore):
            with_retries(partial(self._call, "delete_object", name), tries=ASK_TRIES)

    def newest_s(self) -> float | None:
        """See `TellsAge`."""
        times = [
            entry["LastModified"].timestamp()
            for page in self._pages()
            for entry in page.get("Contents", ())
        ]
        return max(times, default=None)

    def unfinished_uploads(self) -> list[UnfinishedUpload]:
        """See `KeepsUploads`; none where the server does not list them, or beyond a thousand."""
        with suppress(StoreError), asking(self.url, "", self.bucket):
            answer = self._client().list_multipart_uploads(Bucket=self.bucket, Prefix=self._folder)
            return [
                UnfinishedUpload(
                    each["Key"].removeprefix(self._folder),
                    each["UploadId"],
                    each["Initiated"].timestamp(),
                )
                for each in answer.get("Uploads", ())
            ]
        return []

    def abandon(self, upload: UnfinishedUpload) -> None:
        """See `KeepsUploads`."""
        with suppress(NotInStore):
            self._call("abort_multipart_upload", upload.name, UploadId=upload.upload_id)

    def _head(self, name: str, **options: Any) -> dict[str, Any] | None:
        try:
            return with_retries(
                partial(self._call, "head_object", name, **options), tries=ASK_TRIES
            )
        except NotInStore:
            return None

    def _pages(self, **options: Any) -> Iterator[dict[str, Any]]:
        """Answers to one listing; `StoreError` where it does not end."""
        ask, n_files = partial(self._list, Prefix=self._folder, **options), 0
        page = with_retries(ask, tries=ASK_TRIES)
        while n_files <= MOST_FILES:
            yield page
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return
            n_files += max(1, int(page.get("KeyCount", 0)))
            token = page["NextContinuationToken"]
            page = with_retries(partial(ask, ContinuationToken=token), tries=ASK_TRIES)
        raise StoreError(f"{self.url} holds more than {MOST_FILES} files, which no bank does")

    def _list(self, **options: Any) -> dict[str, Any]:
        with asking(self.url, "", self.bucket):
            found: dict[str, Any] = self._client().list_objects_v2(Bucket=self.bucket, **options)
            return found

    def _call(self, verb: str, name: str, **options: Any) -> dict[str, Any]:
        with asking(self.url, name, self.bucket):
            answer: dict[str, Any] = getattr(self._client(), verb)(
                Bucket=self.bucket, Key=self._key(name), **options
            )
            return answer

    @property
    def _folder(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _key(self, name: str) -> str:
        return self._folder + name
