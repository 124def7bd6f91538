"""Links in banks and in the places they come to: none is followed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.errors import BankError


def inside(folder: Path, name: str) -> Path:
    """Where a file of a bank lies below a folder; `BankError` where a link stands in the way."""
    path = folder
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise BankError(f"{path} is a link, which a bank does not have; remove it")
    return path


def refuse_links(folder: Path) -> None:
    """Raises `BankError` for a link anywhere below a folder, whatever it leads to."""
    left = [folder]
    while left:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    name = shown(os.path.relpath(entry.path, folder))
                    raise BankError(
                        f"{folder}: {name} is a link, which a bank does not have; remove it, or "
                        "choose another place"
                    )
                if entry.is_dir(follow_symlinks=False):
                    left.append(Path(entry.path))
