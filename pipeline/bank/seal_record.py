"""seal.json as it is read: what a complete bank says of itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchbank.pipeline.bank.identity import root_hash
from patchbank.pipeline.bank.sealed_names import SEALED_FOLDERS, first_clash, is_bank_name
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankCorrupt, BankIncomplete

SEAL = "seal.json"
NO_JSON = (ValueError, RecursionError)
"""What `json.loads` raises for bytes that are no JSON, too deep, or not UTF-8."""
MOST_LEVELS = 64
MOST_DIGITS = 40
MOST_BYTES = 2**63
"""More than any file system holds."""
LARGEST_SEAL_BYTES = 32 * 2**20
"""200,000 files: 20,000, the most that a bank has at first, take 4 MB, and it may grow."""


@dataclass(frozen=True)
class Seal:
    """What seal.json says."""

    format: int
    recipe_id: str
    fingerprint: str
    root_sha256: str
    matches_root: bool
    files: Mapping[str, FileRecord]

    @property
    def bank_bytes(self) -> int:
        """Bytes of all sealed files."""
        return sum(file.size for file in self.files.values())


def require_seal(bank: Path) -> None:
    """Raises `BankIncomplete` where a bank has no seal."""
    if not (bank / SEAL).is_file():
        raise BankIncomplete(
            f"{bank} is not sealed: what makes it has not finished. "
            "Run the same `patchbank` command again"
        )


def seal_bytes(bank: Path) -> bytes | None:
    """The content of seal.json, unread; None where there is none. It changes when a bank grows."""
    try:
        return _read_seal_file(bank)
    except OSError:
        return None


def read_seal(bank: Path) -> Seal:
    """The seal of a bank, as it stands; `BankIncomplete` where there is none, or `BankCorrupt`."""
    require_seal(bank)
    try:
        content = _read_seal_file(bank)
    except OSError as error:
        raise BankCorrupt(f"{bank / SEAL} cannot be read: {error.strerror}") from error
    return parse_seal(content, where=str(bank))


def _read_seal_file(bank: Path) -> bytes:
    """At most one byte more than a seal may have."""
    with (bank / SEAL).open("rb") as file:
        return file.read(LARGEST_SEAL_BYTES + 1)


def parse_seal(content: bytes, *, where: str) -> Seal:
    """What the bytes of a seal.json say; `BankCorrupt` where they are none.

    `where` is the bank, for messages.
    """
    try:
        if len(content) > LARGEST_SEAL_BYTES:
            raise ValueError(f"more than {LARGEST_SEAL_BYTES} bytes")
        document = parse_json(content)
        files = [file_record(file) for file in document["files"]]
        if type(document["format"]) is not int:
            raise ValueError(f"format {brief(document['format'])}")
        seal = Seal(
            format=document["format"],
            recipe_id=as_digest(document["recipe_id"]),
            fingerprint=as_digest(document["fingerprint"]),
            root_sha256=as_digest(document["root_sha256"]),
            matches_root=root_hash(document) == document["root_sha256"],
            files={file.path: file for file in files},
        )
        if clash := first_clash([file.path for file in files]):
            raise ValueError(f"path {brief(clash)} is named twice, or is a folder of another")
    except (KeyError, TypeError, AttributeError, *NO_JSON) as error:
        reason = f"{type(error).__name__} {str(error)[:200]}"
        raise BankCorrupt(f"{where}/{SEAL} is damaged: {reason}; pull the bank again") from error
    return seal


def parse_json(content: bytes) -> Any:
    """A JSON document that a bank may hold; `ValueError` for every other sequence of bytes.

    What Python's parser passes over is refused, so that whoever gets the document can print it,
    hash it and compute with its numbers: NaN and infinities, nesting beyond 64 levels, whole
    numbers of more than 40 digits, and half surrogate pairs.
    """
    text = content.decode("utf-8")
    # A hook for every number costs more than the parser; texts of digits only cost the hook.
    whole_number = _whole_number if re.search(f"[0-9]{{{MOST_DIGITS}}}", text) else int
    try:
        document = json.loads(
            text, parse_constant=_finite, parse_float=_finite, parse_int=whole_number
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [document]
    for _ in range(MOST_LEVELS):
        objects = [value for value in level if isinstance(value, dict)]
        lists = [value for value in level if isinstance(value, list)]
        level = [child for value in objects for child in value.values()]
        level += [child for value in lists for child in value]
        if not level:
            break
    else:
        raise ValueError("it is nested too deeply")
    if "\\u" in text:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:MOST_DIGITS]} is no number")
    return value


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def file_record(entry: Any, *, folders: Collection[str] = SEALED_FOLDERS) -> FileRecord:
    """An entry of a seal or a commit record; `ValueError` or `TypeError` where it is none.

    `folders` are those of a bank that it may lie in.
    """
    if not isinstance(entry, Mapping) or set(entry) != {"path", "size", "sha256"}:
        raise TypeError(f"{brief(entry)} is no path, size and sha256")
    size = entry["size"]
    if type(size) is not int or not 0 <= size < MOST_BYTES:
        raise ValueError(f"size {brief(size)}")
    if not is_bank_name(entry["path"], folders=folders):
        raise ValueError(f"path {brief(entry['path'])} names no file of a bank")
    return FileRecord(entry["path"], size, as_digest(entry["sha256"]))


def as_digest(value: object) -> str:
    """`value`, which must be a SHA-256 in lower-case hexadecimal, else `ValueError`."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{brief(value)} is no SHA-256")
    return value


def brief(value: object) -> str:
    """`value` as a part of an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
