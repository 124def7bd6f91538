"""What was measured on a bank, in its notes; reading it loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchbank.pipeline.bank.reader import Bank
from patchbank.probing.atomic import write_json

NOTES = "notes/measured"
LONGEST_NOTE = 2**20
Facts = dict[str, Any]


def write_measurement(bank: Bank, facts: Facts) -> Path:
    """Puts a measurement into the bank's notes, one file a label table and layer."""
    name = f"{Path(facts['labels']).stem}-{facts['labels_sha256'][:8]}-{facts['layer']}.json"
    path = bank.path / NOTES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)
    return path


def read_measurements(bank: Bank) -> list[Facts]:
    """The measurements in a bank's notes that were made on it as it is now."""
    found = []
    for path in sorted((bank.path / NOTES).glob("*.json")):
        try:
            if path.stat().st_size > LONGEST_NOTE:
                continue
            facts = json.loads(path.read_bytes())
            changes = {name: float(value["change"]) for name, value in facts["probes"].items()}
            is_own = facts["root_sha256"] == bank.root_sha256
            note = {key: str(facts[key]) for key in ("labels", "metric", "n_seeds", "layer")}
            reference = str(facts["reference"]["stored_dtype"])
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            continue  # notes are anybody's
        if is_own:
            found.append({**note, "reference": reference, "changes": changes})
    return found
