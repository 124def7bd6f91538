"""The place of a file that a command is to write."""

from __future__ import annotations

from pathlib import Path

from patchbank.pipeline.errors import TrialError


def check_parent(out: Path) -> None:
    """Raises `TrialError` where the folder of `out` is missing, before any work is done for it."""
    if not out.parent.is_dir():
        raise TrialError(
            f"found no folder {out.parent} for {out.name}, expected one to write in; make it: "
            f"mkdir -p {out.parent}"
        )
