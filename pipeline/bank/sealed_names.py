"""Names that the files of a bank can have: the same file on every system, and inside the bank."""

from __future__ import annotations

import re
from collections.abc import Collection

TOP_FILES = ("zarr.json", "clips.parquet")
SEALED_FOLDERS = ("layers", "golden", "commits")
RECORDED_FOLDERS = ("layers", "golden", "parts")
"""Where the files lie that a commit record names; parts/ is gone once a bank is sealed."""
LONGEST_PART, MOST_PARTS = 100, 8
PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
FILE = re.compile(r"c(?:\.[0-9]+)*|.+\.(?:json|parquet)")
"""A chunk of an array, or a document: nothing that a program would run or load."""
DEVICES = {"con", "prn", "aux", "nul"}
DEVICES |= {f"{port}{number}" for port in ("com", "lpt") for number in range(10)}
"""Windows opens these whatever folder or ending they are written with."""


def is_bank_name(name: object, *, folders: Collection[str] = SEALED_FOLDERS) -> bool:
    """Whether `name` is one that a bank's file can have: zarr.json, clips.parquet, or a chunk or a
    document below one of `folders`.

    Such a name is ASCII, relative, in its one spelling, and stays below the folder it is joined to
    by the rules of POSIX and of Windows.
    """
    if not isinstance(name, str):
        return False
    if name in TOP_FILES:
        return True
    parts = name.split("/")
    return (
        2 <= len(parts) <= MOST_PARTS
        and parts[0] in folders
        and all(map(is_part, parts))
        and FILE.fullmatch(parts[-1]) is not None
    )


def is_part(part: str) -> bool:
    """Whether `part` is the name of one file or folder on every system."""
    return (
        len(part) <= LONGEST_PART
        and PART.fullmatch(part) is not None
        and part.split(".")[0].lower() not in DEVICES
    )


def first_clash(names: Collection[str]) -> str | None:
    """A name that some disk could not hold beside another one of `names`; None where there is none.

    Such are a name given twice, also in another case, and the name of a file that is also the
    folder of another.
    """
    files: set[str] = set()
    folders: set[str] = set()
    spelt: dict[str, str] = {}
    for name in names:
        folded = name.lower()
        if folded in files:
            return name
        files.add(folded)
        end = len(name)
        while (end := name.rfind("/", 0, end)) > 0 and name[:end] not in folders:
            folders.add(name[:end])
            if spelt.setdefault(folded[:end], name[:end]) != name[:end]:
                return name
    return next((name for name in names if name.lower() in spelt), None)
