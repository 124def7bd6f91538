"""A connection that breaks, and a server that lies: what happens between a bank and its reader.

`FaultyProxy` stands before a real server and passes bytes on until a fault is due; `LyingServer` is
a small web server that answers as a test tells it to.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLOCK_BYTES = 2**16
Spoil = Callable[[bytes], bytes]


@dataclass
class Faults:
    """What goes wrong with the connections to come, once for each that is left."""

    cut_after: int | None = None
    """Bytes after which a connection is cut, counted in the direction that is hurt."""
    stall_after: int | None = None
    """Bytes after which nothing more comes, while the connection stays."""
    answer: bytes | None = None
    """Sent instead of the server's answer to a request; the connection is closed."""
    spoil: Spoil | None = None
    """Changes the bytes that pass."""
    upwards: bool = False
    """Whether bytes towards the server are hurt; else those from it."""
    left: int = 0
    """Connections that are still to be hurt."""
    hurt: int = 0
    """Connections that were hurt."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        """Whether a connection that begins now is hurt."""
        with self.lock:
            is_hurt = self.left > 0
            self.left -= is_hurt
            self.hurt += is_hurt
            return is_hurt


@contextmanager
def faulty_proxy(port: int, faults: Faults) -> Iterator[int]:
    """The port of a proxy to a server of this machine, which ends with all its connections."""
    open_sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def begin(work: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        threads[-1].start()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", port))
                open_sockets.extend((client, server))
                is_hurt = faults.take()
                begin(passed_on, client, server, faults if is_hurt and faults.upwards else None)
                begin(passed_on, server, client, faults if is_hurt and not faults.upwards else None)

    begin(accept)
    try:
        yield listener.getsockname()[1]
    finally:
        # A thread that waits in accept() notices only this.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        threads[0].join()
        for one in open_sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in threads[1:]:
            thread.join()
        for one in open_sockets:
            one.close()


def passed_on(source: socket.socket, target: socket.socket, faults: Faults | None) -> None:
    """Hands bytes on in one direction until it ends or breaks."""
    passed = 0
    with suppress(OSError):
        while block := source.recv(BLOCK_BYTES):
            if faults is not None:
                if faults.answer is not None:
                    target.sendall(faults.answer)
                    break
                if faults.spoil is not None:
                    block = faults.spoil(block)
                if faults.stall_after is not None and passed + len(block) > faults.stall_after:
                    target.sendall(block[: faults.stall_after - passed])
                    while source.recv(BLOCK_BYTES):
                        pass
                    break
                if faults.cut_after is not None and passed + len(block) > faults.cut_after:
                    target.sendall(block[: faults.cut_after - passed])
                    break
            target.sendall(block)
            passed += len(block)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Request:
    """What a client asked of a `LyingServer`."""

    verb: str
    path: str
    start: int | None
    """First and last byte of its range, where it asked for one."""
    last: int | None
    authorization: str | None = None


Reply = tuple[int, dict[str, str], Iterator[bytes]]


@contextmanager
def lying_server(reply: Callable[[Request], Reply]) -> Iterator[int]:
    """The port of a server whose every answer `reply` makes: status, headers and body."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            span = (int(found[1]), int(found[2])) if found else (None, None)
            status, headers, body = reply(
                Request(self.command, self.path, *span, self.headers.get("Authorization"))
            )
            self.close_connection = True
            with suppress(OSError):
                self.send_response(status)
                for name, value in {"Connection": "close", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in body:
                    self.wfile.write(piece)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def endless(piece: bytes = bytes(2**16)) -> Iterator[bytes]:
    """A body that ends when nobody reads it any more."""
    while True:
        yield piece


def silent(seconds: float) -> Iterator[bytes]:
    """A body that begins and then says nothing."""
    yield b"x"
    time.sleep(seconds)
