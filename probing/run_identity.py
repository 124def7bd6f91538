"""What makes one run another: all that decides its numbers, as plain JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchbank.pipeline.errors import TrialError
from patchbank.probing.entries import Entry
from patchbank.probing.labels import TaskKind
from patchbank.probing.run_files import TokenBank
from patchbank.probing.settings import TrainSettings


@dataclass(frozen=True)
class DataChoice:
    """Which clips of a bank train, select and test, and what their labels mean."""

    splits_path: Path | None = None
    folds: str | None = None
    classes: tuple[str, ...] | None = None
    task: TaskKind = "auto"
    allow_unlabelled: bool = False
    use_views: bool = True
    group: str | None = None
    allow_leakage: bool = False


def run_identity(
    bank: TokenBank,
    tables: Mapping[str, Path],
    entries: Sequence[Entry],
    settings: TrainSettings,
    plugins: Mapping[str, str],
    data: DataChoice,
) -> dict[str, Any]:
    """Files by their content, so that a moved table is the same and a changed one is not.

    The device is no part of it: numbers agree within a seed's deviation.
    """
    chosen = asdict(settings)
    del chosen["device"]
    choice = asdict(data)
    path = choice.pop("splits_path")
    return {
        "bank": bank.fingerprint,
        "recipe_id": bank.recipe_id,
        "labels": {name or "labels": _sha256(table) for name, table in tables.items()},
        "splits": None if path is None else _sha256(path),
        "data": choice,
        "probes": {
            entry.name: {
                "family": entry.family_name,
                "options": dict(entry.options),
                "layers": list(entry.layers),
                "plugin_sha256": plugins.get(entry.file, ""),
            }
            for entry in entries
        },
        "settings": chosen,
    }


def _sha256(table: Path) -> str:
    try:
        return hashlib.sha256(table.read_bytes()).hexdigest()
    except OSError as error:
        raise TrialError(f"cannot read {table} ({error.strerror}), expected a table") from error
