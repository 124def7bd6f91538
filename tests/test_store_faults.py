"""Broken connections and lying servers: the right bytes after a retry, or an error that helps;
never a wait without end, never more memory than a piece."""

from __future__ import annotations

import hashlib
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from faulty_proxy import Faults, Reply, Request, endless, faulty_proxy, lying_server, silent
from servers import Server, SshServer

from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing.store import Store, Upload
from patchbank.pipeline.sharing.stores import open_store
from patchbank.pipeline.sharing.transfer import with_retries

CONTENT = random.Random(7).randbytes(1_500_000)
RECORD = FileRecord("c.0", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
SILENT_S = 0.4
MOST_S = 8.0
KINDS = ["s3", "sftp", "http", "gs"]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds, and pauses of none."""
    monkeypatch.setattr("patchbank.pipeline.sharing.transfer.FIRST_WAIT_S", 0.01)
    for module in ("s3_client", "sftp_client", "http_client"):
        monkeypatch.setattr(f"patchbank.pipeline.sharing.{module}.SILENT_S", SILENT_S)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture(params=KINDS)
def broken(
    request: pytest.FixtureRequest, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """A store that holds c.0, behind a proxy that does not do anything wrong yet."""
    real, port, behind = behind_proxy(request, request.param, monkeypatch)
    real(CONTENT)
    with faulty_proxy(port, faults) as proxy:
        yield behind(proxy)


Behind = tuple[Callable[[bytes], None], int, Callable[[int], Store]]


def behind_proxy(
    request: pytest.FixtureRequest, kind: str, monkeypatch: pytest.MonkeyPatch
) -> Behind:
    """What lays c.0 there, the port of the server, and the store at another port."""
    if kind == "http":
        url, folder = request.getfixturevalue("http_folder")
        server: Server = request.getfixturevalue("nginx")
        put = (folder / "c.0").write_bytes
        return put, server.port, lambda port: open_store(url.replace(str(server.port), str(port)))
    if kind == "s3":
        url = request.getfixturevalue("s3_bucket")
        put = lambda content: open_store(url).put(Upload(content, RECORD), nothing)  # noqa: E731

        def s3_at(port: int) -> Store:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            return open_store(url)

        return put, request.getfixturevalue("s3_server").port, s3_at
    if kind == "gs":
        url = request.getfixturevalue("gs_bucket")
        put = lambda content: open_store(url).put(Upload(content, RECORD), nothing)  # noqa: E731

        def gs_at(port: int) -> Store:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
            return open_store(url)

        return put, request.getfixturevalue("gs_server").port, gs_at
    url = request.getfixturevalue("sftp_folder")
    ssh: SshServer = request.getfixturevalue("ssh_server")
    home: Path = request.getfixturevalue("ssh_home")

    def sftp_at(port: int) -> Store:
        for name in ("config", "known_hosts"):
            path = home / ".ssh" / name
            path.write_text(path.read_text().replace(str(ssh.port), str(port)))
        return open_store(url)

    put = lambda content: open_store(url).put(Upload(content, RECORD), nothing)  # noqa: E731
    return put, ssh.port, sftp_at


def nothing(n_bytes: int) -> None:
    pass


def whole(store: Store, stop: int = len(CONTENT)) -> bytes:
    return b"".join(store.stream("c.0", 0, stop))


def failure_of(work: Callable[[], object]) -> StoreError:
    begun = time.monotonic()
    with pytest.raises(StoreError) as failure:
        work()
    assert time.monotonic() - begun < MOST_S
    return failure.value


def test_a_connection_that_is_cut_in_the_middle_is_made_again(
    broken: Store, faults: Faults
) -> None:
    faults.cut_after, faults.left = 400_000, 2
    failure = failure_of(lambda: whole(broken))
    assert failure.may_pass
    assert "c.0" in str(failure)
    assert with_retries(lambda: whole(broken)) == CONTENT
    assert faults.hurt == 2


def test_a_server_that_falls_silent_is_left(broken: Store, faults: Faults) -> None:
    faults.stall_after, faults.left = 400_000, 1
    failure = failure_of(lambda: whole(broken))
    assert failure.may_pass
    assert "said nothing for too long" in str(failure)
    assert with_retries(lambda: whole(broken)) == CONTENT


@pytest.mark.parametrize("broken", ["s3", "http", "gs"], indirect=True)
@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_is_busy_is_asked_again(broken: Store, faults: Faults, status: int) -> None:
    faults.answer = b"HTTP/1.1 %d Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status
    faults.left = 3
    failure = failure_of(lambda: whole(broken))
    assert failure.may_pass
    assert str(status) in str(failure)
    assert with_retries(lambda: whole(broken)) == CONTENT
    assert faults.hurt == 3


@pytest.mark.parametrize("broken", ["s3", "sftp", "gs"], indirect=True)
def test_a_file_whose_sending_is_cut_is_sent_again(broken: Store, faults: Faults) -> None:
    other = CONTENT[::-1]
    upload = Upload(other, FileRecord("c.0", len(other), hashlib.sha256(other).hexdigest()))
    faults.cut_after, faults.upwards, faults.left = 400_000, True, 2
    assert failure_of(lambda: broken.put(upload, nothing)).may_pass
    assert whole(open_store(broken.url)) in (CONTENT,)
    broken.put_all([upload], nothing, lambda one: None)
    assert whole(broken) == other
    assert broken.sizes() == {"c.0": len(other)}


def test_bytes_that_are_altered_on_their_way_are_not_taken_for_stored(
    s3_bucket: str, s3_server: Server, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = Upload(b"a" * 300_000, record_of(b"a" * 300_000))
    faults.spoil = lambda block: block.replace(b"a" * 1000, b"b" * 1000)
    faults.upwards, faults.left = True, 1
    with faulty_proxy(s3_server.port, faults) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        store = open_store(s3_bucket)
        failure = failure_of(lambda: store.put(upload, nothing))
    assert failure.may_pass
    assert "what arrived has" in str(failure)


def record_of(content: bytes) -> FileRecord:
    return FileRecord("c.0", len(content), hashlib.sha256(content).hexdigest())


def piece(request: Request) -> bytes:
    assert request.start is not None
    assert request.last is not None
    return CONTENT[request.start : request.last + 1]


def told(request: Request, size: int = len(CONTENT)) -> dict[str, str]:
    return {"Content-Range": f"bytes {request.start}-{request.last}/{size}"}


def length(content: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(content))}


LIES: dict[str, tuple[Callable[[Request], Reply], str, bool]] = {
    "the whole file for a part of it": (
        lambda request: (200, length(CONTENT), iter([CONTENT])),
        "gives no parts of files",
        False,
    ),
    "another part": (
        lambda request: (
            206,
            {"Content-Range": "bytes 0-9/99", "Content-Length": "10"},
            iter([b"0" * 10]),
        ),
        "sent the range 'bytes 0-9/99', expected one from byte 1000",
        True,
    ),
    "a part without a range": (
        lambda request: (206, length(piece(request)), iter([piece(request)])),
        "sent the range 'none'",
        True,
    ),
    "a shorter part": (
        lambda request: (
            206,
            told(request) | {"Content-Length": "500"},
            iter([piece(request)[:500]]),
        ),
        "ends at byte 1500, expected 900000",
        True,
    ),
    "less than it promised": (
        lambda request: (206, told(request) | length(piece(request)), iter([piece(request)[:500]])),
        "c.0",
        True,
    ),
    "a range of strange digits": (
        lambda request: (206, {"Content-Range": f"bytes {'9' * 5000}-1/2"}, iter([b"0" * 10])),
        "expected one from byte 1000",
        True,
    ),
    "a page that says no": (
        lambda request: (403, length(b"no"), iter([b"no"])),
        "access refused",
        False,
    ),
    "silence": (
        lambda request: (206, told(request) | length(piece(request)), silent(3 * SILENT_S)),
        "said nothing for too long",
        True,
    ),
}


@pytest.fixture(params=["s3", "http", "gs"])
def lied_to(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Store]:
    """A store at a port that a liar answers at."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")

    def at(port: int) -> Store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        host = f"127.0.0.1:{port}/bucket" if request.param == "http" else "bucket"
        return open_store(f"{request.param}://{host}/x")

    return at


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_a_part_of_a_file_are_noticed(lied_to: Callable[[int], Store], lie: str) -> None:
    reply, message, may_pass = LIES[lie]
    with lying_server(reply) as port:
        store = lied_to(port)
        failure = failure_of(lambda: b"".join(store.stream("c.0", 1000, 900_000)))
    assert message in str(failure)
    assert failure.may_pass == may_pass
    assert "s3cret" not in str(failure)


def test_a_part_that_goes_on_without_end_is_left_where_it_should_end(
    lied_to: Callable[[int], Store],
) -> None:
    with lying_server(lambda request: (206, told(request), endless())) as port:
        found = b"".join(lied_to(port).stream("c.0", 1000, 900_000))
    assert len(found) == 899_000


@pytest.mark.parametrize("status", [200, 404, 500, 403])
def test_answers_without_end_fill_no_memory(
    lied_to: Callable[[int], Store], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    for module in ("s3_client", "http_client"):
        monkeypatch.setattr(f"patchbank.pipeline.sharing.{module}.MOST_ANSWER_BYTES", 2**20)
    with lying_server(lambda request: (status, {}, endless())) as port:
        store = lied_to(port)
        works: list[Callable[[], object]] = [
            lambda: store.size("seal.json"),
            lambda: store.document("seal.json", most_bytes=2**20),
        ]
        tell(works[0], status)  # a client that is made takes memory of its own
        tracemalloc.start()
        for work in works:
            tell(work, status)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * 2**20


def tell(work: Callable[[], object], status: int) -> None:
    if status == 404:
        begun = time.monotonic()
        with suppress(StoreError):
            assert work() is None
        assert time.monotonic() - begun < MOST_S
    else:
        assert "seal.json" in str(failure_of(work))


def test_a_listing_that_never_ends_is_left(
    lied_to: Callable[[int], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchbank.pipeline.sharing.s3_store.MOST_FILES", 20)
    pages = iter(range(10**6))

    def listing(request: Request) -> Reply:
        number = next(pages)
        page = (
            "<ListBucketResult><IsTruncated>true</IsTruncated><KeyCount>1</KeyCount>"
            f"<NextContinuationToken>t{number}</NextContinuationToken>"
            f"<Contents><Key>x/{number}</Key><Size>1</Size></Contents></ListBucketResult>"
        ).encode()
        return 200, length(page), iter([page])

    with lying_server(listing) as port:
        store = lied_to(port)
        if store.url.startswith("s3"):
            assert "more than 20 files" in str(failure_of(store.sizes))


def test_what_an_error_of_a_server_says_cannot_move_a_terminal(
    lied_to: Callable[[int], Store],
) -> None:
    page = b"<Error><Code>Odd</Code><Message>\x1b[2J&#x1b;[31mred</Message></Error>"
    with lying_server(lambda request: (400, length(page), iter([page]))) as port:
        store = lied_to(port)
        failure = failure_of(lambda: b"".join(store.stream("c.0", 0, 9)))
    assert "400" in str(failure)
    assert str(failure).isprintable()
