"""A hub of weights on this machine that speaks what huggingface_hub asks."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """Repositories whose branches point at commits."""

    commits: dict[tuple[str, str], Path] = field(default_factory=dict)
    """(repository, commit) -> its files."""
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    """Files whose content was asked for, in order."""
    endpoint: str = ""

    def add(self, repo: str, folder: Path, *, commit: str, branch: str = "main") -> None:
        """A commit with the files of `folder`, to which a branch points from now on."""
        self.commits[repo, commit] = folder
        self.branches[repo, branch] = commit

    def commit_of(self, repo: str, revision: str) -> str | None:
        if (repo, revision) in self.commits:
            return revision
        return self.branches.get((repo, revision))


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            if api := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
                self._describe(*api.groups())
            elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(*file.groups(), with_body=with_body)
            else:
                self._send(404, b"{}", {})

        def _describe(self, repo: str, what: str, revision: str) -> None:
            commit = hub.commit_of(repo, revision)
            if commit is None:
                known = any(name == repo for name, _ in hub.commits)
                code = "RevisionNotFound" if known else "RepoNotFound"
                self._send(404, b"{}", {"X-Error-Code": code})
                return
            files = [
                path for path in sorted(hub.commits[repo, commit].rglob("*")) if path.is_file()
            ]
            names = {str(path.relative_to(hub.commits[repo, commit])): path for path in files}
            if what == "tree":
                answer: object = [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                    for name, path in names.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in names]
                answer = {"id": repo, "sha": commit, "siblings": siblings}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _file(self, repo: str, revision: str, name: str, *, with_body: bool) -> None:
            commit = hub.commit_of(repo, revision)
            path = None if commit is None else hub.commits[repo, commit] / name
            if path is None or commit is None or not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            if with_body:
                hub.fetched.append(f"{repo}@{commit}:{name}")
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(path)}"'}
            self._send(200, path.read_bytes(), headers, with_body=with_body)

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
