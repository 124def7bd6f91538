"""All or nothing: how a shard's files come into a bank.

An attempt writes into a folder of its own under `.work/`. Then its commit record is hard-linked
into `commits/`, which fails where a record exists, so that exactly one attempt wins; only the
winner's files are renamed into place. A process killed between the link and the last rename leaves
a record whose files still lie in its attempt: `recover` finishes those renames.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import cast

from patchbank.pipeline.bank.writer import FileRecord, fsync_folder, write_durably
from patchbank.pipeline.errors import BankCorrupt
from patchbank.pipeline.specs import Json

WORK = ".work"


def new_attempt(bank: Path, name: str) -> Path:
    """A fresh folder under `.work/`, owned by the caller."""
    attempt = bank / WORK / f"{name}.{uuid.uuid4().hex}"
    attempt.mkdir(parents=True)
    return attempt


def record_path(bank: Path, name: str) -> Path:
    """Where the commit record of `name` lies."""
    return bank / "commits" / f"{name}.json"


def shard_name(shard: int) -> str:
    """Name of a shard in records and errors."""
    return f"{shard:05d}"


def commit(bank: Path, attempt: Path, name: str, files: Iterable[FileRecord], facts: Json) -> bool:
    """Publishes an attempt; False, and nothing changed, where another attempt was faster.

    `files` have paths relative to the attempt, which are also their paths in the bank.
    """
    record = {"name": name, **facts, "files": [asdict(file) for file in files]}
    draft = attempt / "commit.json"
    write_durably(draft, json.dumps(record, indent=1, sort_keys=True).encode())
    for folder in [attempt, *(path for path in attempt.rglob("*") if path.is_dir())]:
        fsync_folder(folder)
    try:
        os.link(draft, record_path(bank, name))
    except FileExistsError:
        shutil.rmtree(attempt, ignore_errors=True)
        return False
    fsync_folder(bank / "commits")
    _publish(bank, attempt, record)
    return True


def read_record(bank: Path, name: str) -> Json | None:
    """The commit record of `name`, None where it is not committed."""
    try:
        return cast(Json, json.loads(record_path(bank, name).read_bytes()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise BankCorrupt(f"commits/{name}.json is no JSON: {error}") from error


def committed_names(bank: Path) -> set[str]:
    """Names that have a commit record."""
    return {path.stem for path in (bank / "commits").glob("*.json")}


def recover(bank: Path) -> None:
    """Finishes the renames of every record whose attempt was cut short.

    Raises `BankCorrupt` where a recorded file is nowhere to be found.
    """
    attempts = list((bank / WORK).glob("*.*/commit.json"))
    for name in sorted(committed_names(bank)):
        record = read_record(bank, name)
        if record is None or not _missing_files(bank, record):
            continue
        own = record_path(bank, name).read_bytes()
        for draft in attempts:
            if draft.is_file() and draft.read_bytes() == own:
                _publish(bank, draft.parent, record)
        missing = _missing_files(bank, record)
        if missing:
            raise BankCorrupt(f"shard {name}: {missing[0]} is recorded but not there")


def _missing_files(bank: Path, record: Json) -> list[str]:
    sealed_parts = (bank / "clips.parquet").is_file()
    return [
        file["path"]
        for file in record["files"]
        if not (bank / file["path"]).is_file()
        and not (sealed_parts and file["path"].startswith("parts/"))
    ]


def _publish(bank: Path, attempt: Path, record: Json) -> None:
    folders = set()
    for file in record["files"]:
        source, target = attempt / file["path"], bank / file["path"]
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            folders.add(target.parent)
    for folder in folders:
        fsync_folder(folder)
    shutil.rmtree(attempt, ignore_errors=True)
