"""A hub of data sets on this machine that speaks what huggingface_hub asks: commits, LFS, trees."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretOfTheTests"
PAGE_FILES = 20
REGULAR_BYTES = 2_000
"""Texts up to this size are regular files; all else goes to LFS."""


@dataclass(frozen=True)
class Stored:
    """A file of a commit: a regular one, or a pointer to a large one."""

    content: bytes = b""
    lfs: str | None = None

    def blob(self, size: int) -> str:
        text = self.content
        if self.lfs is not None:
            text = f"version https://git-lfs\noid sha256:{self.lfs}\nsize {size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


@dataclass
class Repository:
    is_private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Stored]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid


@dataclass
class FakeDataSetHub:
    """What it holds, and what was asked of it."""

    endpoint: str = ""
    elsewhere: str = ""
    """Where large files come from: another origin, as theirs is."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    n_received: int = 0
    """Bytes of large files that were sent here."""
    messages: list[str] = field(default_factory=list)
    """Of commits."""
    asked: list[str] = field(default_factory=list)
    cdn_saw_token: bool = False
    faults: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    """Next answers to paths that hold a text: status and headers; status 0 cuts the connection."""
    before_commit: Callable[[], None] = lambda: None
    ignored: str = ""
    """A path that the .gitignore of every data set names."""
    short_by: int = 0
    """Bytes of a range that are not sent."""

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        stored = repository.commits[repository.branches[branch]]
        return {path: self.content(one) for path, one in stored.items()}

    def content(self, stored: Stored) -> bytes:
        return stored.content if stored.lfs is None else self.large[stored.lfs]


@contextmanager
def serving() -> Iterator[FakeDataSetHub]:
    hub = FakeDataSetHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            path, self.query = unquote(parts.path), parse_qs(parts.query)
            hub.asked.append(f"{self.command} {path}")
            for fault in hub.faults:
                if fault[0] in path:
                    hub.faults.remove(fault)
                    if fault[1] == 0:
                        self.close_connection = True
                        self.connection.close()
                        return
                    self._send(fault[1], b"{}", fault[2])
                    return
            for pattern, answer in ROUTES:
                if found := re.fullmatch(pattern, parts.path):
                    groups = found.groupdict()
                    answer(self, **{k: v and unquote(v) for k, v in groups.items()})
                    return
            self._send(404, b"{}", {})

        def _files(self, repo: str, revision: str) -> tuple[str, dict[str, Stored]] | None:
            """The commit that a revision means, and its files; answers where there is none."""
            repository = hub.repositories.get(repo)
            is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repository is None or (repository.is_private and not is_known):
                self._send(404 if is_known else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return None
            return commit, repository.commits[commit]

        def info(self, repo: str, revision: str) -> None:
            if found := self._files(repo, revision):
                self._json({"_id": "1", "id": repo, "sha": found[0]})

        def tree(self, repo: str, revision: str, folder: str | None) -> None:
            found = self._files(repo, revision)
            if found is None:
                return
            start = f"{folder}/" if folder else ""
            inside = {path: one for path, one in found[1].items() if path.startswith(start)}
            if folder and not inside:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                return
            entries: dict[str, Any] = {}
            for path, one in sorted(inside.items()):
                names = path.removeprefix(start).split("/")
                for depth in range(1, len(names)):
                    name = start + "/".join(names[:depth])
                    entries[name] = {"type": "directory", "oid": "0" * 40, "path": name}
                entries[path] = entry(path, one)
            if self.query.get("recursive") != ["true"]:
                entries = {k: v for k, v in entries.items() if "/" not in k.removeprefix(start)}
            first = int(self.query.get("cursor", ["0"])[0])
            page = list(entries.values())[first : first + PAGE_FILES]
            headers = {}
            if first + PAGE_FILES < len(entries):
                recursive = self.query["recursive"][0]
                address = f"{hub.endpoint}{urlsplit(self.path).path}"
                more = f"{address}?recursive={recursive}&cursor={first + PAGE_FILES}"
                headers["Link"] = f'<{more}>; rel="next"'
            self._json(page, headers)

        def paths_info(self, repo: str, revision: str) -> None:
            if found := self._files(repo, revision):
                asked = parse_qs(self.body.decode())["paths"]
                self._json([entry(path, found[1][path]) for path in asked if path in found[1]])

        def create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            assert asked["type"] == "dataset"
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._send(401, b"{}", {})
            elif name in hub.repositories:
                self._send(409, b"{}", {})
            else:
                private = asked.get("visibility") == "private" or asked.get("private") is True
                repository = hub.repositories[name] = Repository(private)
                repository.commit("main", {".gitattributes": Stored(b"*.bin filter=lfs\n")})
                self._json({"url": f"{hub.endpoint}/datasets/{name}"})

        def preupload(self, repo: str, revision: str) -> None:
            found = self._files(repo, revision)
            if found is None:
                return
            modes = []
            for one in json.loads(self.body)["files"]:
                sample = base64.b64decode(one["sample"])
                is_text = b"\0" not in sample and one["size"] <= REGULAR_BYTES
                old = found[1].get(one["path"])
                oid = None if old is None else old.lfs or old.blob(len(old.content))
                modes.append(
                    {
                        "path": one["path"],
                        "uploadMode": "regular" if is_text else "lfs",
                        "shouldIgnore": one["path"] == hub.ignored,
                        "oid": oid,
                    }
                )
            self._json({"files": modes})

        def lfs_batch(self, repo: str) -> None:
            assert repo in hub.repositories
            objects = []
            for one in json.loads(self.body)["objects"]:
                actions = {
                    "upload": {"href": f"{hub.endpoint}/lfs/{one['oid']}?X-Amz-Signature=secret"},
                    "verify": {"href": f"{hub.endpoint}/verify"},
                }
                objects.append(one if one["oid"] in hub.large else one | {"actions": actions})
            self._json({"objects": objects, "transfer": "basic"})

        def lfs_put(self, oid: str) -> None:
            hub.n_received += len(self.body)
            if hashlib.sha256(self.body).hexdigest() != oid:
                self._send(400, b"{}", {})
                return
            hub.large[oid] = self.body
            self._send(200, b"", {})

        def verify(self) -> None:
            asked = json.loads(self.body)
            is_there = len(hub.large.get(asked["oid"], b"")) == asked["size"]
            self._send(200 if is_there else 404, b"{}", {})

        def commit(self, repo: str, revision: str) -> None:
            found = self._files(repo, revision)
            if found is None:
                return
            hub.before_commit()
            lines = [json.loads(line) for line in self.body.splitlines()]
            files = dict(found[1])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = Stored(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    assert value["oid"] in hub.large
                    files[value["path"]] = Stored(lfs=value["oid"])
                else:
                    assert line["key"] == "deletedFile"
                    del files[value["path"]]
            hub.messages.append(lines[0]["value"]["summary"])
            oid = hub.repositories[repo].commit(revision, files)
            self._json({"commitUrl": f"{hub.endpoint}/c/{oid}", "commitOid": oid})

        def validate(self) -> None:
            self._json({"errors": [], "warnings": []})

        def resolve(self, repo: str, revision: str, path: str) -> None:
            found = self._files(repo, revision)
            if found is None:
                return
            if path not in found[1]:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif found[1][path].lfs is None:
                self._ranged(found[1][path].content)
            else:
                place = f"{hub.elsewhere}/cdn/{found[1][path].lfs}?sig=secret"
                self._send(302, b"", {"Location": place})

        def cdn(self, oid: str) -> None:
            hub.cdn_saw_token |= "Authorization" in self.headers
            self._ranged(hub.large[oid])

        def _ranged(self, content: bytes) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if asked is None:
                self._send(200, content, {})
                return
            start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
            if start >= len(content):
                self._send(416, b"", {})
                return
            told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            self._send(206, content[start : stop - hub.short_by], told)

        def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
            content = {"Content-Type": "application/json"} | (headers or {})
            self._send(200, json.dumps(value).encode(), content)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def entry(path: str, stored: Stored) -> dict[str, Any]:
        size = len(hub.content(stored))
        told = {"type": "file", "path": path, "size": size, "oid": stored.blob(size)}
        if stored.lfs is not None:
            told["lfs"] = {"oid": stored.lfs, "size": size, "pointerSize": 134}
        return told

    api = r"/api/datasets/(?P<repo>[^/]+/[^/]+)"
    ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
        (rf"{api}/revision/(?P<revision>[^/]+)", Handler.info),
        (rf"{api}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
        (rf"{api}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
        (rf"{api}/preupload/(?P<revision>[^/]+)", Handler.preupload),
        (rf"{api}/commit/(?P<revision>[^/]+)", Handler.commit),
        (r"/api/repos/create", Handler.create),
        (r"/api/validate-yaml", Handler.validate),
        (r"/datasets/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
        (r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
        (r"/verify", Handler.verify),
        (r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
         Handler.resolve),
        (r"/cdn/(?P<oid>\w+)", Handler.cdn),
    )  # fmt: skip

    with ExitStack() as stack:
        hub.endpoint, hub.elsewhere = (stack.enter_context(_running(Handler)) for _ in range(2))
        yield hub


@contextmanager
def _running(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
