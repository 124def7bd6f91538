"""What a push has proven to have arrived, kept on this machine until the push is done.

For stores that tell no digest of what they hold: without it, a push that goes on would read back
everything that it has sent. Only sizes and digests are kept, under a digest of the address.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from patchbank.pipeline.bank.seal_record import NO_JSON, file_record
from patchbank.pipeline.bank.writer import FileRecord


class PushRecord:
    """Lines of a file, one a sealed file that arrived; None keeps it in memory alone."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._token = ""
        self._arrived = set() if path is None else _read(path)

    @classmethod
    def of(cls, cache: Path, url: str, root_sha256: str) -> PushRecord:
        """That of a push of the bank `root_sha256` to an address, or a folder."""
        place = url if "://" in url else str(Path(url).resolve())
        name = hashlib.sha256(f"{place}\n{root_sha256}".encode()).hexdigest()[:32]
        return cls(cache / "pushes" / f"{name}.jsonl")

    def of_claim(self, token: str) -> None:
        """From now on speaks of the push with that claim on the place: what arrived under another
        one was removed since."""
        self._token = token

    def has(self, file: FileRecord) -> bool:
        """Whether this very file arrived."""
        return bool(self._token) and (self._token, file) in self._arrived

    def note(self, file: FileRecord) -> None:
        """Notes that a file arrived; a record that cannot be written costs time at most."""
        with self._lock:
            if (self._token, file) in self._arrived:
                return
            self._arrived.add((self._token, file))
            if self._path is not None:
                with suppress(OSError):
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    _append(self._path, json.dumps([self._token, asdict(file)]) + "\n")

    def forget(self) -> None:
        """Removes the record of a push that is done."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


def _append(path: Path, line: str) -> None:
    # One write: two pushes of one bank may share the file.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _read(path: Path) -> set[tuple[str, FileRecord]]:
    found = set()
    with suppress(OSError):
        for line in path.read_bytes().splitlines():
            # The last line may be half of one.
            with suppress(KeyError, TypeError, *NO_JSON):
                token, file = json.loads(line)
                found.add((str(token), file_record(file)))
    return found
