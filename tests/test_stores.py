"""What every store promises, asked of real servers: a folder, S3, SFTP, HTTP."""

from __future__ import annotations

import hashlib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.store import PIECE_BYTES, Store, Upload
from patchbank.pipeline.sharing.stores import open_store
from patchbank.pipeline.sharing.transfer import Throttle

KINDS = ["folder", "s3", "sftp"]
ODD = ["a b.txt", "plus+sign", "hash#1", "what?", "100%25.bin", "ü/ß.bin", "semi;colon", "at@home"]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store that is empty, of a folder that is not there yet."""
    if request.param == "folder":
        return open_store(tmp_path / "share/x.bank")
    fixture = {"s3": "s3_bucket", "sftp": "sftp_folder"}[request.param]
    return open_store(f"{request.getfixturevalue(fixture)}/x.bank")


def upload(name: str, content: bytes) -> Upload:
    return Upload(content, FileRecord(name, len(content), hashlib.sha256(content).hexdigest()))


def put(store: Store, name: str, content: bytes) -> None:
    store.put(upload(name, content), nothing)


def nothing(n_bytes: int) -> None:
    pass


def read(store: Store, name: str, start: int, stop: int) -> bytes:
    pieces = list(store.stream(name, start, stop))
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


def test_a_folder_that_is_not_there_holds_nothing(store: Store) -> None:
    assert store.sizes() == {}
    assert store.folders() == []
    assert store.size("seal.json") is None
    assert store.document("seal.json", most_bytes=10) is None
    with pytest.raises(NotInStore):
        read(store, "seal.json", 0, 1)
    store.remove(["seal.json"])


def test_what_was_put_is_listed_and_read(store: Store) -> None:
    content = random.Random(0).randbytes(3_000_000)
    sent: list[int] = []
    store.put(upload("layers/12/c.0", content), sent.append)
    assert sum(sent) == len(content)
    put(store, "zarr.json", b"{}")
    assert store.sizes() == {"layers/12/c.0": len(content), "zarr.json": 2}
    assert store.folders() == ["layers"]
    assert store.below("layers").folders() == ["12"]
    assert store.below("layers/12").sizes() == {"c.0": len(content)}
    assert store.size("layers/12/c.0") == len(content)
    assert store.size("layers") is None
    for start, stop in [(0, len(content)), (7, 4099), (len(content) - 5, len(content)), (9, 9)]:
        assert read(store, "layers/12/c.0", start, stop) == content[start:stop]


def test_fewer_bytes_than_asked_for_are_an_error_that_may_pass(store: Store) -> None:
    put(store, "short", b"12345")
    for start in (0, 3, 5, 9):
        with pytest.raises(StoreError, match="short") as failure:
            read(store, "short", start, 10)
        assert failure.value.may_pass


def test_documents_have_a_limit(store: Store) -> None:
    put(store, "seal.json", b"x" * 100)
    assert store.document("seal.json", most_bytes=100) == b"x" * 100
    with pytest.raises(StoreError, match=r"seal\.json.*at most 99"):
        store.document("seal.json", most_bytes=99)


def test_a_file_put_again_is_replaced(store: Store) -> None:
    for content in (b"first", b"first", b"another one"):
        put(store, "zarr.json", content)
        assert store.sizes() == {"zarr.json": len(content)}
        assert store.document("zarr.json", most_bytes=100) == content


def test_an_empty_file_is_a_file(store: Store) -> None:
    put(store, "empty", b"")
    assert store.sizes() == {"empty": 0}
    assert store.size("empty") == 0
    assert store.document("empty", most_bytes=10) == b""


@pytest.mark.parametrize("changed", [b"other bytes of it", b"shorter", b"longer" * 9])
def test_a_file_that_is_not_its_record_is_never_put(
    store: Store, tmp_path: Path, changed: bytes
) -> None:
    file = tmp_path / "file"
    file.write_bytes(changed)
    content = b"what it was sealed"
    record = FileRecord("zarr.json", len(content), hashlib.sha256(content).hexdigest())
    put(store, "zarr.json", b"before")
    with pytest.raises(StoreError, match="patchbank bank verify") as failure:
        store.put(Upload(file, record), nothing)
    assert not failure.value.may_pass
    assert store.document("zarr.json", most_bytes=100) == b"before"
    assert store.sizes() == {"zarr.json": 6}


def test_a_store_proves_only_what_it_computed(store: Store) -> None:
    put(store, "zarr.json", b"{}")
    record = upload("zarr.json", b"{}").record
    assert store.proves(record, size=3) is False
    assert store.proves(record, size=2) in (True, None)
    other = upload("zarr.json", b"[]").record
    assert store.proves(other, size=2) in (False, None)


def test_what_is_removed_is_gone_with_its_folders(store: Store) -> None:
    put(store, "layers/12/c.0", b"0")
    put(store, "layers/3/c.0", b"0")
    put(store, "zarr.json", b"{}")
    store.remove(["layers/12/c.0", "no/such.file"])
    assert store.sizes() == {"layers/3/c.0": 1, "zarr.json": 2}
    assert store.below("layers").folders() == ["3"]
    store.remove(["layers/3/c.0", "zarr.json"])
    assert store.sizes() == {}
    assert store.folders() == []


def test_names_are_kept_as_they_are(store: Store) -> None:
    for name in ODD:
        put(store, name, name.encode())
    assert store.sizes() == {name: len(name.encode()) for name in ODD}
    for name in ODD:
        assert store.document(name, most_bytes=100) == name.encode()
        assert store.size(name) == len(name.encode())
    store.remove(ODD)
    assert store.sizes() == {}


def test_many_files_go_and_come_by_many_threads(store: Store) -> None:
    files = {f"commits/{i:05d}.json": b"%d" % i for i in range(300)}
    done: list[str] = []
    uploads = [upload(name, content) for name, content in files.items()]
    store.put_all(uploads, nothing, lambda one: done.append(one.record.path))
    assert sorted(done) == sorted(files)
    assert store.sizes() == {name: len(content) for name, content in files.items()}
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda name: store.document(name, most_bytes=9), files)
        assert list(found) == list(files.values())


def test_a_listing_is_never_an_old_one(store: Store) -> None:
    other = open_store(store.url)
    assert other.sizes() == {}
    put(store, "a/1", b"1")
    assert other.sizes() == {"a/1": 1}
    assert other.folders() == ["a"]
    store.remove(["a/1"])
    assert other.sizes() == {}


def test_a_limit_of_speed_holds(store: Store) -> None:
    import time

    begun = time.monotonic()
    store.put(upload("slow", bytes(600_000)), Throttle(1_000_000))
    assert 0.5 < time.monotonic() - begun < 3.0


def test_a_forked_process_has_connections_of_its_own(store: Store) -> None:
    put(store, "zarr.json", b"{}")
    child = os.fork()
    if child == 0:
        try:
            os._exit(int(store.document("zarr.json", most_bytes=9) != b"{}"))
        except BaseException:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert store.document("zarr.json", most_bytes=9) == b"{}"


def test_a_stream_that_is_left_early_leaves_nothing_open(store: Store) -> None:
    content = random.Random(1).randbytes(4_000_000)
    put(store, "large", content)
    for _ in range(3):
        pieces = store.stream("large", 0, len(content))
        assert content.startswith(next(pieces))
        pieces.close()  # type: ignore[attr-defined]
    assert read(store, "large", 5, 10) == content[5:10]
