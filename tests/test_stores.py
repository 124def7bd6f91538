"""What every store promises, asked of real servers: a folder, S3, SFTP, HTTP."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from faulty_proxy import Reply, Request, lying_server
from servers import Server, SshServer

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.store import PIECE_BYTES, Store, Upload
from patchbank.pipeline.sharing.stores import open_store
from patchbank.pipeline.sharing.transfer import Throttle

KINDS = ["folder", "s3", "sftp", "gs"]
ODD = ["a b.txt", "plus+sign", "hash#1", "what?", "100%25.bin", "ü/ß.bin", "semi;colon", "at@home"]


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return empty_store(request, tmp_path)


def empty_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of a folder that is not there yet."""
    if request.param == "folder":
        return open_store(tmp_path / "share/x.bank")
    fixture = {"s3": "s3_bucket", "sftp": "sftp_folder", "gs": "gs_bucket"}[request.param]
    return open_store(f"{request.getfixturevalue(fixture)}/x.bank")


@dataclass(frozen=True)
class Shelf:
    """A store, and what lays files there."""

    store: Store
    put: Callable[[str, bytes], None]


@pytest.fixture(params=[*KINDS, "http"])
def shelf(request: pytest.FixtureRequest, tmp_path: Path) -> Shelf:
    """A store to read from: one that can be written to, or a folder of a web server."""
    if request.param != "http":
        store = empty_store(request, tmp_path)
        return Shelf(store, partial(put, store))
    url, folder = request.getfixturevalue("http_folder")

    def lay(name: str, content: bytes) -> None:
        (folder / "x.bank" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "x.bank" / name).write_bytes(content)

    return Shelf(open_store(f"{url}/x.bank"), lay)


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
    store.remove(["seal.json"])


def test_a_file_that_is_not_there_is_told_apart_from_an_error(shelf: Shelf) -> None:
    assert shelf.store.size("seal.json") is None
    assert shelf.store.document("seal.json", most_bytes=10) is None
    with pytest.raises(NotInStore, match=r"seal\.json"):
        read(shelf.store, "seal.json", 0, 1)


def test_what_was_put_is_listed(store: Store) -> None:
    content = random.Random(0).randbytes(1_000_000)
    sent: list[int] = []
    store.put(upload("layers/12/c.0", content), sent.append)
    assert sum(sent) == len(content)
    put(store, "zarr.json", b"{}")
    assert store.sizes() == {"layers/12/c.0": len(content), "zarr.json": 2}
    assert store.folders() == ["layers"]
    assert store.below("layers").folders() == ["12"]
    assert store.below("layers/12").sizes() == {"c.0": len(content)}


def test_parts_of_files_are_read(shelf: Shelf) -> None:
    content = random.Random(0).randbytes(3_000_000)
    shelf.put("layers/12/c.0", content)
    assert shelf.store.size("layers/12/c.0") == len(content)
    for start, stop in [(0, len(content)), (7, 4099), (len(content) - 5, len(content)), (9, 9)]:
        assert read(shelf.store, "layers/12/c.0", start, stop) == content[start:stop]
    assert read(shelf.store.below("layers"), "12/c.0", 1, 5) == content[1:5]


def test_fewer_bytes_than_asked_for_are_an_error_that_may_pass(shelf: Shelf) -> None:
    shelf.put("short", b"12345")
    for start in (0, 3, 5, 9):
        with pytest.raises(StoreError, match="short") as failure:
            read(shelf.store, "short", start, 10)
        assert failure.value.may_pass


def test_documents_have_a_limit(shelf: Shelf) -> None:
    shelf.put("seal.json", b"x" * 100)
    assert shelf.store.document("seal.json", most_bytes=100) == b"x" * 100
    with pytest.raises(StoreError, match=r"seal\.json.*at most 99"):
        shelf.store.document("seal.json", most_bytes=99)


def test_an_empty_file_is_a_file(shelf: Shelf) -> None:
    shelf.put("empty", b"")
    assert shelf.store.size("empty") == 0
    assert shelf.store.document("empty", most_bytes=10) == b""
    assert read(shelf.store, "empty", 0, 0) == b""


def test_files_of_any_legal_name_are_read(shelf: Shelf) -> None:
    for name in ODD:
        shelf.put(name, name.encode())
    for name in ODD:
        assert shelf.store.document(name, most_bytes=100) == name.encode()
        assert shelf.store.size(name) == len(name.encode())


def test_a_forked_process_has_connections_of_its_own(shelf: Shelf) -> None:
    shelf.put("zarr.json", b"{}")
    assert shelf.store.document("zarr.json", most_bytes=9) == b"{}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks of processes with threads
        child = os.fork()
    if child == 0:
        same = shelf.store.document("zarr.json", most_bytes=9) == b"{}"
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shelf.store.document("zarr.json", most_bytes=9) == b"{}"


def test_a_stream_that_is_left_early_leaves_nothing_open(shelf: Shelf) -> None:
    content = random.Random(1).randbytes(4_000_000)
    shelf.put("large", content)
    for _ in range(3):
        pieces = shelf.store.stream("large", 0, len(content))
        assert content.startswith(next(pieces))
        pieces.close()  # type: ignore[attr-defined]
    assert read(shelf.store, "large", 5, 10) == content[5:10]


def test_a_file_put_again_is_replaced(store: Store) -> None:
    for content in (b"first", b"first", b"another one"):
        put(store, "zarr.json", content)
        assert store.sizes() == {"zarr.json": len(content)}
        assert store.document("zarr.json", most_bytes=100) == content


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


def test_files_of_any_legal_name_are_listed_and_removed(store: Store) -> None:
    for name in ODD:
        put(store, name, name.encode())
    assert store.sizes() == {name: len(name.encode()) for name in ODD}
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
    begun = time.monotonic()
    store.put(upload("slow", bytes(600_000)), Throttle(1_000_000))
    assert time.monotonic() - begun > 0.5


def test_drafts_that_were_just_written_to_are_swept_by_nobody_else(tmp_path: Path) -> None:
    drafts = tmp_path / "x.bank/.work"
    drafts.mkdir(parents=True)
    # Of other machines, whose locks are not seen here.
    young, old = (drafts / f"put.{letter * 32}" for letter in "ab")
    for draft, idle_s in ((young, 3_000), (old, 4_000)):
        draft.write_bytes(b"x")
        os.utime(draft, (time.time() - idle_s,) * 2)
    open_store(tmp_path / "x.bank").put_all([], nothing, lambda one: None)
    assert [path.name for path in drafts.iterdir()] == [young.name]


def test_a_put_whose_draft_was_removed_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchbank.pipeline.sharing.transfer.FIRST_WAIT_S", 0.01)
    store = open_store(tmp_path / "x.bank")
    sent: list[int] = []

    def sweep(n_bytes: int) -> None:
        if n_bytes > 0 and not sent:
            next((tmp_path / "x.bank/.work").iterdir()).unlink()
        sent.append(n_bytes)

    with pytest.raises(StoreError, match=r"c\.0: another process removed it while") as failure:
        store.put(upload("c.0", b"rows"), sweep)
    assert failure.value.may_pass
    sent.clear()
    store.put_all([upload("c.0", b"rows")], sweep, lambda one: None)
    assert sent == [4, -4, 4]
    assert store.document("c.0", most_bytes=4) == b"rows"
    with pytest.raises(StoreError, match="cannot be written") as failure:
        store.put(Upload(tmp_path / "gone", upload("c.0", b"rows").record), nothing)
    assert not failure.value.may_pass


def test_a_web_server_is_read_only_and_says_so(http_folder: tuple[str, Path]) -> None:
    store = open_store(http_folder[0])
    assert not store.is_writable
    assert not store.can_list
    for work in (
        store.sizes,
        store.folders,
        lambda: put(store, "a", b"a"),
        lambda: store.remove([]),
    ):
        with pytest.raises(StoreError, match=r"plain HTTP .* s3://"):
            work()


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:s3cret@bucket/x",
        "gs://key:s3cret@bucket/x",
        "sftp://me:s3cret@host/x",
        "http://me:s3cret@host/x",
        "https://host/x?X-Amz-Signature=s3cret",
        "s3:///x",
        "sftp://host",
        "http:///x",
    ],
)
def test_addresses_hold_no_secrets(url: str) -> None:
    with pytest.raises(StoreError, match=r"expected .*without|names no bucket or host") as failure:
        open_store(url)
    assert "s3cret" not in str(failure.value)


def test_a_bucket_that_is_not_there_is_said(s3_keys: Server) -> None:
    store = open_store("s3://no-such-bucket/x.bank")
    for work in (store.sizes, lambda: put(store, "a", b"a")):
        with pytest.raises(StoreError, match="no bucket no-such-bucket; make it"):
            work()


def test_a_bucket_of_google_that_is_not_there_is_said(gs_bucket: str) -> None:
    store = open_store("gs://no-such-bucket/x.bank")
    for work in (store.sizes, lambda: put(store, "a", b"a")):
        with pytest.raises(StoreError, match=r"no bucket no-such-bucket; make it"):
            work()


def test_a_key_of_google_that_is_none_is_said(
    gs_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key.json"
    key.write_text('{"type": "service_account", "private_key": "s3cret"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with pytest.raises(StoreError, match=r"GOOGLE_APPLICATION_CREDENTIALS") as failure:
        open_store(gs_bucket).sizes()
    assert "s3cret" not in str(failure.value)


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_keys_of_s3_are_told_with_where_they_come_from(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "WRONGKEY")
    store = open_store(f"{s3_bucket}/x.bank")
    for work in (store.sizes, lambda: store.size("a"), lambda: put(store, "a", b"a")):
        with pytest.raises(StoreError, match=r"access refused.*AWS_PROFILE") as failure:
            work()
        assert not failure.value.may_pass
        assert "WRONGKEY" not in str(failure.value)


def test_without_keys_s3_is_asked_as_anybody_may(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match=r"access refused.*AWS_ACCESS_KEY_ID"):
        open_store(s3_bucket).sizes()


def test_a_profile_that_is_not_there_is_said(
    s3_keys: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"nobody.*AWS_PROFILE"):
        open_store("s3://bucket/x").sizes()


def test_a_large_file_goes_in_parts(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchbank.pipeline.sharing.s3_store.SINGLE_BYTES", 2**20)
    monkeypatch.setattr("patchbank.pipeline.sharing.s3_store.PART_BYTES", 5 * 2**20)
    store = open_store(f"{s3_bucket}/x.bank")
    content = random.Random(3).randbytes(11_000_000)
    sent: list[int] = []
    store.put(upload("c.0", content), sent.append)
    assert sum(sent) == len(content)
    assert store.sizes() == {"c.0": len(content)}
    assert read(store, "c.0", 0, len(content)) == content
    record = upload("c.0", content).record
    with pytest.raises(StoreError, match="patchbank bank verify"):
        store.put(Upload(content[:-1] + b"?", record), nothing)
    assert read(store, "c.0", 0, len(content)) == content


def test_a_listing_of_several_pages_is_whole(s3_bucket: str, s3_server: Server) -> None:
    folder = s3_server.folder / s3_bucket.removeprefix("s3://") / "x.bank/commits"
    folder.mkdir(parents=True)
    for number in range(1_050):
        (folder / f"{number:05d}.json").write_bytes(b"1")
    store = open_store(f"{s3_bucket}/x.bank")
    assert store.sizes() == {f"commits/{number:05d}.json": 1 for number in range(1_050)}


def test_user_and_password_of_a_web_server_come_from_netrc(home: Path) -> None:
    (home / ".netrc").write_text("machine 127.0.0.1 login me password s3cret")
    (home / ".netrc").chmod(0o600)
    expected = f"Basic {base64.b64encode(b'me:s3cret').decode()}"

    def reply(request: Request) -> Reply:
        status = 200 if request.authorization == expected else 401
        return status, {"Content-Length": "2"}, iter([b"{}"])

    with lying_server(reply) as port:
        store = open_store(f"http://127.0.0.1:{port}/x.bank")
        assert store.document("zarr.json", most_bytes=9) == b"{}"
        (home / ".netrc").unlink()
        with pytest.raises(StoreError, match=r"access refused \(401\).*~/.netrc"):
            open_store(store.url).document("zarr.json", most_bytes=9)


def test_a_server_of_an_unknown_key_is_refused_with_what_to_type(
    sftp_folder: str, ssh_home: Path
) -> None:
    (ssh_home / ".ssh/known_hosts").write_text("")
    with pytest.raises(StoreError, match=r"not in ~/.ssh/known_hosts; type `ssh team-server` once"):
        open_store(sftp_folder).sizes()


def test_a_server_of_another_key_than_known_is_refused(
    sftp_folder: str, ssh_home: Path, ssh_server: SshServer
) -> None:
    kind, public = Path(f"{ssh_server.strange_key}.pub").read_text().split()[:2]
    (ssh_home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{ssh_server.port} {kind} {public}\n")
    with pytest.raises(StoreError, match=r"another key than ~/.ssh/known_hosts says"):
        open_store(sftp_folder).sizes()


def test_a_key_that_the_server_does_not_let_in_is_said(
    sftp_folder: str, ssh_home: Path, ssh_server: SshServer
) -> None:
    config = ssh_home / ".ssh/config"
    config.write_text(config.read_text().replace(str(ssh_server.key), str(ssh_server.strange_key)))
    with pytest.raises(StoreError, match="access refused; keys are looked for in ssh-agent"):
        open_store(sftp_folder).sizes()


def test_keys_and_ports_are_found_without_a_config(
    sftp_folder: str, ssh_home: Path, ssh_server: SshServer
) -> None:
    (ssh_home / ".ssh/config").unlink()
    (ssh_home / ".ssh/id_ed25519").write_bytes(ssh_server.key.read_bytes())
    folder = sftp_folder.removeprefix("sftp://team-server")
    store = open_store(f"sftp://127.0.0.1:{ssh_server.port}{folder}/x.bank")
    put(store, "zarr.json", b"{}")
    assert store.sizes() == {"zarr.json": 2}


def test_links_on_a_server_are_not_followed(sftp_folder: str, tmp_path: Path) -> None:
    folder = Path(sftp_folder.removeprefix("sftp://team-server"))
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "x.bank").mkdir()
    (folder / "x.bank/layers").symlink_to(tmp_path)
    (folder / "x.bank/seal.json").symlink_to(tmp_path / "secret")
    store = open_store(f"{sftp_folder}/x.bank")
    assert store.sizes() == {}
    works = [
        lambda: read(store, "layers/secret", 0, 3),
        lambda: store.document("seal.json", most_bytes=9),
        lambda: put(store, "layers/other", b"x"),
    ]
    for work in works:
        with pytest.raises(StoreError, match="is a link, which a bank does not have"):
            work()
    assert {path.name for path in tmp_path.iterdir()} == {"secret"}


@pytest.mark.parametrize("scheme", ["s3", "sftp", "http", "gs"])
def test_a_server_that_is_not_there_is_said(
    scheme: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchbank.pipeline.sharing.transfer.FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    url = f"{scheme}://127.0.0.1:9/x" if scheme in ("http", "sftp") else f"{scheme}://bucket/x"
    with pytest.raises(StoreError, match=r"x/zarr\.json: ") as failure:
        open_store(url).size("zarr.json")
    assert failure.value.may_pass
