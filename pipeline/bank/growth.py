"""A sealed bank takes more clips without a token being written again.

New shards are written below `.work/next/`, which is laid out like a bank; the old seal stays valid
meanwhile, and readers see nothing. When all are there, the seal of the grown bank is written beside
them. Only then is the old seal taken away, the new files renamed into place, and the new seal put
last: a kill in these milliseconds leaves a bank without a seal, and the next call goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from patchbank.pipeline.bank.assembly import PartRows, RowSource, with_holes
from patchbank.pipeline.bank.commit import NEXT, WORK, owning, recover_owned
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.rows import BankRows
from patchbank.pipeline.bank.schema import BankSchema, create_skeleton
from patchbank.pipeline.bank.seal import check_committed, file_records, gather, write_seal
from patchbank.pipeline.bank.seal_record import SEAL, seal_bytes
from patchbank.pipeline.bank.writer import fsync_folder
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.specs import Json


def next_folder(bank: Path) -> Path:
    """Where the shards of a growth lie until the bank is sealed again."""
    return bank / NEXT


def open_settled(bank: Path) -> Bank | None:
    """The bank at a folder as it is between growths; None where it was never sealed.

    Finishes a growth that was killed after its seal was written, and waits for one that another
    process just moves in. Raises what `open_bank` does.
    """
    while True:
        finish_growth(bank)
        seal = seal_bytes(bank)
        opened: Bank | None = None
        problem: BankError | None = None
        try:
            opened = None if seal is None else open_bank(bank)
        except BankError as error:
            problem = error
        if (next_folder(bank) / SEAL).is_file() or seal_bytes(bank) != seal:
            continue  # what was read meanwhile may be of two banks
        if problem is not None:
            raise problem
        return opened


def is_current(bank: Bank) -> bool:
    """Whether a bank still has the seal that it was opened with."""
    try:
        return open_bank(bank.path).root_sha256 == bank.root_sha256
    except BankError:
        return False


def begin_growth(old: Bank, schema: BankSchema, attributes: Json) -> None:
    """Makes the folder of a growth, which another process may have made; `schema` is the grown
    bank's. Does nothing where `old` has grown meanwhile."""
    work = next_folder(old.path)
    with owning(old.path):
        if is_current(old) and not (work / "zarr.json").is_file():
            # Empty folders of a growth that was killed after its last file was moved in.
            shutil.rmtree(work, ignore_errors=True)
            create_skeleton(work, schema, attributes)


def seal_growth(old: Bank, schema: BankSchema) -> None:
    """Completes a growth whose new shards are all committed; `schema` is the grown bank's.

    Does nothing where `old` has grown meanwhile. Raises `BankIncomplete` where a shard is not
    committed.
    """
    bank, work = old.path, next_folder(old.path)
    with owning(bank):
        if not (work / SEAL).is_file():
            if not is_current(old):
                return
            new_shards = range(old.schema.n_shards, schema.n_shards)
            with owning(work):
                recover_owned(work)
                check_committed(work, new_shards)
                if not (work / "clips.parquet").is_file():
                    gather(work, schema, lambda: _sources(old, work, schema, new_shards))
                shutil.rmtree(work / "parts", ignore_errors=True)
                files = dict(old.seal.files) | file_records(work)
                write_seal(work, files, recipe_id=old.recipe_id)
        _move_in(bank)


def _sources(old: Bank, work: Path, schema: BankSchema, new_shards: range) -> list[RowSource]:
    parts = PartRows(work, schema, new_shards)
    return with_holes([BankRows(old), parts], schema.rows_per_shard)


def finish_growth(bank: Path) -> None:
    """Finishes a growth that was killed after its seal was written; does nothing elsewhere."""
    if (next_folder(bank) / SEAL).is_file():
        with owning(bank):
            if (next_folder(bank) / SEAL).is_file():
                _move_in(bank)


def _move_in(bank: Path) -> None:
    work = next_folder(bank)
    (bank / SEAL).unlink(missing_ok=True)
    fsync_folder(bank)
    shutil.rmtree(work / WORK, ignore_errors=True)
    folders = {bank}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        target = bank / path.relative_to(work)
        if target != bank / SEAL:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
            folders.add(target.parent)
    for folder in folders:
        fsync_folder(folder)
    (work / SEAL).replace(bank / SEAL)
    fsync_folder(bank)
    shutil.rmtree(bank / WORK, ignore_errors=True)
