"""Finds everything that is wrong with a sealed bank, down to the shard and the row.

Nothing that the seal does not name is opened, and no link is followed. The seal proves that a bank
is whole, not who made it: whoever can rewrite every file can also rewrite the seal.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from patchbank.pipeline.bank.assembly import CLIPS
from patchbank.pipeline.bank.card import attributes_of_card, checked_schema, read_attributes
from patchbank.pipeline.bank.clip_table import read_clips
from patchbank.pipeline.bank.commit import WORK, read_record, shard_name
from patchbank.pipeline.bank.damage import (
    lost_rows,
    shard_files,
    shard_problems,
    shown,
)
from patchbank.pipeline.bank.identity import fingerprint
from patchbank.pipeline.bank.schema import DONE, FAILED, FORMAT_VERSION, BankSchema
from patchbank.pipeline.bank.seal_record import SEAL, Seal, brief, read_seal
from patchbank.pipeline.bank.sealed_sizes import shape_problems
from patchbank.pipeline.bank.writer import FileRecord, hash_file
from patchbank.pipeline.errors import BankCorrupt, BankError, BankNotFound

CARD = "zarr.json"
HASH_THREADS = 8
UNCHECKED = ("notes", WORK)
"""What may hold files that are not sealed: measurements, and the new shards of a growth."""


def verify_bank(
    path: Path | str,
    *,
    quick: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[str, ...]:
    """Every problem of a sealed bank, one sentence each; none where it is what its seal says.

    `quick` compares sizes, records, indices and counts; otherwise every sealed byte is read too.
    `progress` is called with the bytes read and the bytes to read. Raises `BankNotFound` or
    `BankIncomplete` where there is no sealed bank, `BankError` for one of a newer format.
    """
    bank = Path(path)
    sizes, strange = _walk(bank)
    if SEAL in strange:
        return (f"{SEAL}: {strange[SEAL]}",)
    if not (bank / SEAL).is_file():
        # What is no bank at all is told first.
        read_attributes(bank)
    try:
        seal = read_seal(bank)
    except BankCorrupt as error:
        _refuse_newer(bank, None, sizes)
        return (str(error).removeprefix(f"{bank}/"),)
    _refuse_newer(bank, seal, sizes)
    there = [file for file in seal.files.values() if sizes.get(file.path) == file.size]
    to_hash = [file for file in there if not quick or file.path == CARD]
    wrong = _wrong_digests(bank, to_hash, progress)
    whole = {file.path for file in there} - set(wrong)
    return (
        *_seal_problems(seal),
        *_listing_problems(bank, seal, sizes, strange),
        *_content_problems(bank, seal, whole, wrong),
    )


def _refuse_newer(bank: Path, seal: Seal | None, sizes: Mapping[str, int]) -> None:
    """Raises `BankError` for a bank of a newer format; a damaged card may only look like one."""
    if CARD not in sizes:
        return
    try:
        read_attributes(bank)
    except (BankNotFound, BankCorrupt):
        return
    except BankError:
        if seal is None or _sha256(bank, CARD) == _sealed_sha256(seal, CARD):
            raise


def _sealed_sha256(seal: Seal, name: str) -> str | None:
    return seal.files[name].sha256 if name in seal.files else None


def _walk(bank: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes of the files below `bank` outside notes/, and what is neither file nor folder."""
    sizes: dict[str, int] = {}
    strange: dict[str, str] = {}
    folders = [bank] if bank.is_dir() else []
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            strange[folder.relative_to(bank).as_posix()] = f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            name = Path(entry.path).relative_to(bank).as_posix()
            if entry.is_symlink():
                strange[name] = "is a link; a bank holds its own files only"
            elif entry.is_dir():
                if name not in UNCHECKED:
                    folders.append(bank / name)
            elif entry.is_file():
                sizes[name] = entry.stat().st_size
            else:
                strange[name] = "is no regular file"
    return sizes, strange


def _wrong_digests(
    bank: Path, files: list[FileRecord], progress: Callable[[int, int], None] | None
) -> dict[str, str]:
    """What was found instead, by path, for files whose SHA-256 is not the sealed one."""
    wrong: dict[str, str] = {}
    n_read, n_bytes = 0, sum(file.size for file in files)
    pool = ThreadPoolExecutor(min(HASH_THREADS, os.cpu_count() or 1))
    try:
        futures = {pool.submit(_sha256, bank, file.path): file for file in files}
        for future in as_completed(futures):
            file, found = futures[future], future.result()
            if found != file.sha256:
                wrong[file.path] = found
            n_read += file.size
            if progress is not None:
                progress(n_read, n_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    return wrong


def _sha256(bank: Path, name: str) -> str:
    try:
        return hash_file(bank / name, relative_to=bank).sha256
    except OSError as error:
        return f"nothing ({error.strerror})"


def _seal_problems(seal: Seal) -> Iterator[str]:
    if not seal.matches_root:
        yield f"{SEAL}: does not match its own root hash"
    if seal.format != FORMAT_VERSION:
        yield f"{SEAL}: format {seal.format!r}, expected {FORMAT_VERSION}"


def _listing_problems(
    bank: Path, seal: Seal, sizes: Mapping[str, int], strange: Mapping[str, str]
) -> Iterator[str]:
    schema, _ = _schema(bank, seal, {CARD} if sizes.get(CARD) else set())
    shards = {file.name: file for file in shard_files(bank, schema)} if schema else {}
    for name, what in sorted(strange.items()):
        yield f"{shown(name)}: {what}"
    for name, file in sorted(seal.files.items()):
        if any(str(path) in strange for path in (name, *PurePosixPath(name).parents)):
            continue
        rows = lost_rows(shards[name], sizes.get(name, 0)) if name in shards else ""
        if name not in sizes:
            yield f"{name}: is missing{rows}"
        elif sizes[name] != file.size:
            yield f"{name}: {sizes[name]} bytes, sealed {file.size}{rows}"
    for name in sorted(set(sizes) - set(seal.files) - {SEAL}):
        yield f"{shown(name)}: is not sealed; only notes/ may hold files that are not"


def _content_problems(
    bank: Path, seal: Seal, whole: set[str], wrong: Mapping[str, str]
) -> Iterator[str]:
    """What the files that are there in their size say about each other, and wrong digests."""
    schema, problem = _schema(bank, seal, whole)
    clips, clip_problems = _clips(bank, seal, schema) if schema and CLIPS in whole else (None, [])
    shards = {file.name: file for file in shard_files(bank, schema)} if schema else {}
    differences = _differences(seal, wrong)
    for name in sorted(set(wrong) - set(shards)):
        yield f"{name}: {differences[name]}"
    yield from problem
    yield from clip_problems
    if schema is not None:
        yield from _record_problems(bank, seal, schema, clips, whole)
    for name, file in shards.items():
        if name in wrong or name in whole:
            yield from shard_problems(file, clips, difference=differences.get(name))


def _differences(seal: Seal, wrong: Mapping[str, str]) -> dict[str, str]:
    """How the bytes of files differ from the sealed ones, by path."""
    owners = {file.sha256: file.path for file in seal.files.values()}
    return {
        name: f"holds the bytes of {owners[found]}: the two were swapped, or one was copied"
        if found in owners
        else f"SHA-256 is {found[:12]}, sealed {seal.files[name].sha256[:12]}"
        for name, found in wrong.items()
    }


def _schema(bank: Path, seal: Seal, whole: set[str]) -> tuple[BankSchema | None, list[str]]:
    """The shapes, None where the card cannot be trusted."""
    if CARD not in whole:
        return None, []
    try:
        attributes = read_attributes(bank)
        if attributes["recipe_id"] != seal.recipe_id:
            return None, [f"{SEAL}: names another recipe than {CARD}"]
        schema = checked_schema(attributes)
        identities = attributes_of_card(attributes["card"])
    except (BankError, KeyError, TypeError, ValueError, AttributeError) as error:
        return None, [f"{CARD}: the card cannot be read: {_reason(error)}"]
    problems = [f"{CARD}: {problem}" for problem in shape_problems(schema, seal)]
    wrong = [name for name in ("encoder_id", "recipe_id") if attributes[name] != identities[name]]
    names = [f"{CARD}: the {name} is not that of its card" for name in wrong]
    return (None if problems else schema), [*problems, *names]


def _clips(bank: Path, seal: Seal, schema: BankSchema) -> tuple[pa.Table | None, list[str]]:
    """clips.parquet, None where it cannot be trusted."""
    try:
        clips = read_clips(bank / CLIPS, schema)
    except BankCorrupt as error:
        return None, [str(error).removeprefix(f"{bank}/")]
    if fingerprint(seal.recipe_id, clips) != seal.fingerprint:
        return clips, [f"{SEAL}: the fingerprint is not that of the recipe and {CLIPS}"]
    return clips, []


def _record_problems(
    bank: Path, seal: Seal, schema: BankSchema, clips: pa.Table | None, whole: set[str]
) -> Iterator[str]:
    """Where commit records, the seal and the clips' status disagree."""
    names = {shard_name(shard): schema.rows_of(shard) for shard in range(schema.n_shards)}
    for name, rows in {**names, "golden": range(0)}.items():
        place = f"commits/{name}.json"
        if place not in seal.files:
            yield f"{place}: is not sealed, though the card promises it"
        if place not in whole:
            continue
        try:
            record = read_record(bank, name) or {}
            files = [FileRecord(**file) for file in record["files"]]
            counts = [_count(record[key]) for key in ("n_done", "n_failed")] if rows else [0, 0]
        except (BankCorrupt, KeyError, TypeError, ValueError) as error:
            yield f"{place}: is damaged: {_reason(error)}"
            continue
        for file in files:
            if not file.path.startswith("parts/") and seal.files.get(file.path) != file:
                yield f"{place}: {file.path} is recorded with other bytes than sealed"
        if clips is not None:
            status = clips["status"].slice(rows.start, len(rows)).to_pylist()
            if counts != [status.count(DONE), status.count(FAILED)]:
                yield (
                    f"{place}: {counts[0]} done and {counts[1]} failed, "
                    f"{CLIPS} has {status.count(DONE)} and {status.count(FAILED)}"
                )


def _reason(error: Exception) -> str:
    return str(error)[:300]


def _count(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{brief(value)} is no count")
    return value
