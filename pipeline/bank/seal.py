"""Gathers the rows of a finished bank and writes the seal.

The steps can be interrupted anywhere and run again: small arrays and clips.parquet are written
beside the bank's files and renamed in, clips.parquet last, so that its presence means that the
parts are no longer needed; seal.json is the very last file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq

from patchbank.pipeline.bank.assembly import CLIPS, PartRows, RowSource, assemble
from patchbank.pipeline.bank.commit import (
    NEXT,
    WORK,
    committed_names,
    open_attempt,
    owning,
    read_record,
    recover_owned,
    shard_name,
)
from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.bank.identity import fingerprint, root_hash
from patchbank.pipeline.bank.schema import FORMAT_VERSION, BankSchema
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.bank.sealed_names import is_bank_name
from patchbank.pipeline.bank.writer import (
    FileRecord,
    fsync_folder,
    fsync_tree,
    hash_file,
    write_durably,
)
from patchbank.pipeline.errors import BankCorrupt, BankError, BankIncomplete

UNSEALED = {SEAL, "notes", "parts", WORK}


def seal_bank(
    bank: Path,
    schema: BankSchema,
    *,
    recipe_id: str,
    sources: Callable[[], Sequence[RowSource]] | None = None,
) -> None:
    """Completes a bank whose shards are all committed.

    `sources` gives its rows where they do not lie in its parts. Raises `BankIncomplete` where a
    shard is not committed. Sealing a sealed bank only clears what an interrupted run left behind.
    """
    if (bank / SEAL).is_file() and not _leftovers(bank):
        return
    with owning(bank):
        if not (bank / SEAL).is_file():
            if (bank / NEXT / SEAL).is_file():
                raise BankIncomplete(f"{bank}: a growth was cut short; run the same command again")
            recover_owned(bank)
            check_committed(bank, range(schema.n_shards), others=["golden"])
            if not (bank / CLIPS).is_file():
                gather(bank, schema, sources or (lambda: [part_rows(bank, schema)]))
            _check_arrays(bank, schema)
            shutil.rmtree(bank / "parts", ignore_errors=True)
            write_seal(bank, file_records(bank), recipe_id=recipe_id)
        for path in _leftovers(bank):
            shutil.rmtree(path, ignore_errors=True)


def _leftovers(bank: Path) -> list[Path]:
    """What a sealed bank needs no more; the new shards of a growth are no leftovers."""
    growing = (bank / NEXT / "zarr.json").is_file()
    paths = [bank / "parts"] if growing else [bank / "parts", bank / WORK]
    return [path for path in paths if path.exists()]


def part_rows(bank: Path, schema: BankSchema) -> PartRows:
    """The rows of a bank of one generation, from its parts."""
    return PartRows(bank, schema, range(schema.n_shards))


def _check_arrays(bank: Path, schema: BankSchema) -> None:
    paths = [array.path for array in schema.arrays()]
    for path in [*paths, *(array.path for array in schema.small_arrays())]:
        if not (bank / path / "zarr.json").is_file():
            raise BankCorrupt(f"{bank}: {path} is not there; remove the bank and begin again")


def check_committed(bank: Path, shards: range, *, others: Sequence[str] = ()) -> None:
    """Raises `BankIncomplete` where a shard, or another piece of work, has no commit record."""
    wanted = {shard_name(shard) for shard in shards} | set(others)
    missing = sorted(wanted - committed_names(bank))
    if missing:
        raise BankIncomplete(
            f"{bank}: {len(missing)} of {len(wanted)} parts of the work are not committed "
            f"(first: {missing[0]}); run the same command again"
        )


def gather(bank: Path, schema: BankSchema, sources: Callable[[], Sequence[RowSource]]) -> None:
    """Writes the small arrays and, last, clips.parquet of a bank."""
    with open_attempt(bank, "assembly") as draft:
        assemble(draft, schema, sources())
        fsync_tree(draft)
        for array in sorted(path.parent for path in draft.glob("layers/*/*/zarr.json")):
            target = bank / array.relative_to(draft)
            if not target.exists():
                array.rename(target)
        for spec in schema.layers:
            fsync_folder(bank / f"layers/{spec.layer}")
        # From here on the parts are not needed: everything they hold is durable elsewhere.
        (draft / CLIPS).rename(bank / CLIPS)
        fsync_folder(bank)


def write_seal(bank: Path, files: Mapping[str, FileRecord], *, recipe_id: str) -> None:
    """Writes seal.json over `files`, by path; its clips.parquet lies in `bank`."""
    content = {
        "format": FORMAT_VERSION,
        "recipe_id": recipe_id,
        "fingerprint": fingerprint(recipe_id, pq.read_table(bank / CLIPS)),
        "files": [asdict(files[path]) for path in sorted(files)],
    }
    content["root_sha256"] = root_hash(content)
    draft = bank / WORK / SEAL
    write_durably(draft, json.dumps(content, indent=1, sort_keys=True).encode())
    draft.replace(bank / SEAL)
    fsync_folder(bank)


def file_records(bank: Path) -> dict[str, FileRecord]:
    """Size and digest of every file of a bank that a seal names, by path."""
    return {file.path: file for file in _file_records(bank)}


def _file_records(bank: Path) -> Iterator[FileRecord]:
    recorded = _recorded_files(bank)
    for path in sorted(bank.rglob("*")):
        name = path.relative_to(bank).as_posix()
        if name.split("/")[0] in UNSEALED or path.is_dir():
            continue
        if not is_bank_name(name):
            raise BankError(
                f"{bank} holds {shown(name)}, which is no file of a bank; move it to {bank}/notes "
                "or remove it, then run the same command again"
            )
        record = recorded.pop(name, None)
        if record is None:
            yield hash_file(path, relative_to=bank)
        elif path.stat().st_size != record.size:
            raise BankCorrupt(f"{name}: {path.stat().st_size} bytes, recorded {record.size}")
        else:
            # Hashed while it was written; terabytes are not read again.
            yield record
    left = [name for name in recorded if not name.startswith("parts/")]
    if left:
        raise BankCorrupt(f"{left[0]} is recorded but not there; run the same command again")


def _recorded_files(bank: Path) -> dict[str, FileRecord]:
    files = {}
    for name in committed_names(bank):
        record = read_record(bank, name)
        for file in record["files"] if record else []:
            files[file["path"]] = FileRecord(**file)
    return files
