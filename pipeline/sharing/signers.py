"""Who signed the banks of a listing, proven and not claimed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from patchbank.pipeline.errors import BankError, StoreError
from patchbank.pipeline.sharing.described import Row, proven_entry
from patchbank.pipeline.sharing.store import Store
from patchbank.pipeline.sharing.trust import read_signatures, signers, verdicts


def checked_row(banks: Store, row: Row, allowed: Path) -> Row:
    """A row as the seal of its bank proves it, signed by whom the list of keys `allowed` names.

    Raises `PatchbankError` where there is no such list. What only the pusher knew stays a claim.
    """
    claimed = row.entry
    if claimed is None or not claimed.is_sealed:
        return row
    try:
        entry, seal = proven_entry(banks, row.name)
        found = verdicts(seal, read_signatures(banks.below(row.name)), allowed=allowed)
    except (BankError, StoreError, OSError) as error:
        return Row(row.name, None, str(error), row.is_indexed)
    proven = replace(entry, data=claimed.data, pushed=claimed.pushed, signed_by=signers(found))
    return replace(row, entry=proven, is_checked=True)
