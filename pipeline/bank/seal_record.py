"""seal.json as it is read: what a complete bank says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from patchbank.pipeline.bank.identity import root_hash
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankCorrupt, BankIncomplete

SEAL = "seal.json"
NO_JSON = (ValueError, RecursionError)
"""What `json.loads` raises for bytes that are no JSON, too deep, or not UTF-8."""


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
            f"{bank} is not sealed: its extraction has not finished. "
            "Run the same `patchbank extract` command again"
        )


def read_seal(bank: Path) -> Seal:
    """The seal of a bank, as it stands; `BankIncomplete` where there is none, or `BankCorrupt`."""
    require_seal(bank)
    try:
        content = json.loads((bank / SEAL).read_bytes())
        files = [file_record(file) for file in content["files"]]
        seal = Seal(
            format=content["format"],
            recipe_id=content["recipe_id"],
            fingerprint=content["fingerprint"],
            root_sha256=content["root_sha256"],
            matches_root=root_hash(content) == content["root_sha256"],
            files={file.path: file for file in files},
        )
    except (KeyError, TypeError, AttributeError, *NO_JSON) as error:
        raise BankCorrupt(f"{bank / SEAL} is damaged: {_brief(error)}; pull the bank again") from (
            error
        )
    return seal


def file_record(entry: Any) -> FileRecord:
    """An entry of a seal or a commit record; `ValueError` or `TypeError` where it is none."""
    record = FileRecord(**entry)
    if not isinstance(record.size, int) or isinstance(record.size, bool) or record.size < 0:
        raise ValueError(f"size {record.size!r}")
    if not isinstance(record.sha256, str) or not is_inside(record.path):
        raise ValueError(f"path {record.path!r}")
    return record


def is_inside(path: object) -> bool:
    """Whether `path` is a relative POSIX path that stays below the bank's folder."""
    if not isinstance(path, str) or "\\" in path or "\0" in path:
        return False
    pure = PurePosixPath(path)
    return bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__} {str(error)[:200]}"
