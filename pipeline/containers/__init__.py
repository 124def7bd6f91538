"""Files that hold many recordings: tars, and tables with audio in their rows.

A clip's path leads into them: `shards/a.tar/000123.flac` is a member of a tar, and
`data/train-00000-of-00002.parquet/17` the audio of row 17 (from 0) of a Parquet or Arrow file.
Every function may be called from any number of threads, and after a fork.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from patchbank.pipeline.containers.arrow import ARROWS, open_arrow_row
from patchbank.pipeline.containers.byte_stretch import ByteStretch
from patchbank.pipeline.containers.parquet import PARQUETS, open_parquet_row
from patchbank.pipeline.containers.tar import COMPRESSED_SUFFIXES, TARS, open_tar_member
from patchbank.pipeline.errors import AudioError

__all__ = [
    "COMPRESSED_SUFFIXES",
    "CONTAINER_SUFFIXES",
    "TABLE_SUFFIXES",
    "TAR_SUFFIXES",
    "ByteStretch",
    "locate",
    "member_troubles",
    "open_member",
    "split_path",
]

TAR_SUFFIXES = (".tar", *COMPRESSED_SUFFIXES)
TABLE_SUFFIXES = (".parquet", ".arrow")
CONTAINER_SUFFIXES = (*TAR_SUFFIXES, *TABLE_SUFFIXES)


_CONTAINER = re.compile(f"(?:{'|'.join(map(re.escape, CONTAINER_SUFFIXES))})/", re.IGNORECASE)


def split_path(path: str) -> tuple[str, str] | None:
    """A POSIX path as container and member by its names alone; None where no folder of it is
    called like a container."""
    found = _CONTAINER.search(path)
    return None if found is None else (path[: found.end() - 1], path[found.end() :])


def locate(path: Path) -> tuple[Path, str] | None:
    """The container that `path` leads into and the member; None where it leads to a file."""
    place = split_path(path.as_posix())
    # A folder may be called `a.tar`.
    if place is None or Path(place[0]).is_dir():
        return None
    return Path(place[0]), place[1]


def open_member(container: Path, member: str) -> ByteStretch:
    """The bytes of a member. `AudioError`, or `OSError` where the container cannot be opened."""
    suffix = container.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        return open_tar_member(container, member)
    if trouble := _row_trouble(member):
        raise AudioError(trouble)
    open_row = open_parquet_row if suffix == ".parquet" else open_arrow_row
    return open_row(container, int(member))


def _row_trouble(member: str) -> str | None:
    if member.isascii() and member.isdigit() and str(int(member)) == member:
        return None
    return f"there is no row {member!r}; rows are numbered from 0, as in x.parquet/17"


def member_troubles(container: Path, members: Iterable[str]) -> dict[str, str]:
    """Why some members are not there; reads one index and no audio."""
    try:
        trouble_of = _finder(container)
    except AudioError as error:
        return dict.fromkeys(members, str(error))
    except OSError as error:
        return dict.fromkeys(members, f"cannot be read: {error.strerror}")
    found = {member: trouble_of(member) for member in members}
    return {member: trouble for member, trouble in found.items() if trouble is not None}


def _finder(container: Path) -> Callable[[str], str | None]:
    suffix = container.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        return TARS.get(container).trouble
    is_parquet = suffix == ".parquet"
    n_rows = PARQUETS.get(container).first_rows[-1] if is_parquet else len(ARROWS.get(container))

    def trouble_of(member: str) -> str | None:
        if (trouble := _row_trouble(member)) or int(member) < n_rows:
            return trouble
        return f"there is no row {member}: it has {n_rows} rows"

    return trouble_of
