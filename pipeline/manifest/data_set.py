"""Data sets whose audio lies in containers: WebDataset tars and Hugging Face tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.containers import TABLE_SUFFIXES, TAR_SUFFIXES
from patchbank.pipeline.containers.arrow import open_arrow
from patchbank.pipeline.containers.audio_column import find_audio_column
from patchbank.pipeline.errors import AudioError, ManifestError, Problem
from patchbank.pipeline.manifest.columns import CLIP_COLUMNS, is_reserved
from patchbank.pipeline.manifest.found_audio import ContainerAudio, FoundAudio, found_error
from patchbank.pipeline.manifest.hugging_face import read_rows
from patchbank.pipeline.manifest.split_names import meant_split, splits_of_names
from patchbank.pipeline.manifest.web_data_set import read_members

_Columns = dict[str, pa.Array | pa.ChunkedArray]


def is_data_set_file(path: Path) -> bool:
    """Whether a file is read as audio: a tar, or a table with audio in it.

    A table that cannot be read is taken for one, so that it is refused and not passed over.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        return path.name.lower().endswith(TAR_SUFFIXES)
    try:
        if suffix == ".parquet":
            return find_audio_column(pq.read_schema(path)) is not None
        with open_arrow(path) as (_, schema, _):
            return find_audio_column(schema) is not None
    except (pa.ArrowException, OSError, AudioError):
        return True


def read_data_set(folder: Path, containers: Sequence[str]) -> FoundAudio:
    """The recordings in `containers`, which lie below `folder`, in order.

    A column that a bank needs for itself is renamed to `data_set_<name>`.
    """
    are_tables = {name.lower().endswith(TABLE_SUFFIXES) for name in containers}
    if len(are_tables) > 1:
        raise found_error(folder, "holds tars and tables with audio; extract one kind at a time")
    read = read_rows if True in are_tables else read_members
    found = _read_all(read, [folder / name for name in containers])
    counts = [len(audio.members) for audio in found]
    paths = [
        f"{name}/{member}"
        for name, audio in zip(containers, found, strict=True)
        for member in audio.members
    ]
    if not paths:
        raise found_error(folder / containers[0], "no audio in it")
    return FoundAudio(paths, _columns(found, containers, counts), _labels(found))


def _read_all(
    read: Callable[[Path], ContainerAudio], containers: Sequence[Path]
) -> Sequence[ContainerAudio]:
    """What all containers hold, in order, read by several threads; the mistakes of all at once."""
    problems: list[Problem] = []

    def attempt(container: Path) -> ContainerAudio | None:
        try:
            return read(container)
        except ManifestError as error:
            problems.extend(error.problems)
            return None

    with ThreadPoolExecutor(max_workers=8) as threads:
        found = list(threads.map(attempt, containers))
    if problems:
        raise ManifestError(sorted(problems, key=str))
    return [audio for audio in found if audio is not None]


def _columns(
    found: Sequence[ContainerAudio], containers: Sequence[str], counts: Sequence[int]
) -> _Columns:
    cells = _joined(found)
    columns: _Columns = {}
    if own := _own_splits(cells):
        columns["split"] = pa.array(own, pa.string())
    elif splits := splits_of_names(containers):
        told = [split for split, n in zip(splits, counts, strict=True) for _ in range(n)]
        columns["split"] = pa.array(told, pa.string())
    if "fold" in cells:
        texts = [None if fold is None else str(fold) for fold in cells["fold"].to_pylist()]
        columns["fold"] = pa.array(texts, pa.string())
    for name, column in cells.items():
        if name == "fold" or (name == "split" and own):
            continue
        columns[_free_name(name, {*cells, *columns})] = column
    return columns


_MEMBER = "\0"
"""A column beside theirs, because a table without columns has no rows."""


def _joined(found: Sequence[ContainerAudio]) -> Mapping[str, pa.ChunkedArray]:
    """Columns of all containers; as text where containers disagree on a type."""
    tables = [pa.table({_MEMBER: audio.members, **audio.columns}) for audio in found]
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        joined = pa.concat_tables([_as_text(table) for table in tables], promote_options="default")
    return {name: joined[name] for name in joined.column_names if name != _MEMBER}


def _as_text(table: pa.Table) -> pa.Table:
    cells = {name: table[name].to_pylist() for name in table.column_names}
    return pa.table(
        {
            name: pa.array([None if cell is None else str(cell) for cell in column], pa.string())
            for name, column in cells.items()
        }
    )


def _own_splits(cells: Mapping[str, pa.ChunkedArray]) -> list[str] | None:
    """The data set's column `split`, where all its cells say a split."""
    if "split" not in cells:
        return None
    splits = [meant_split(str(cell)) for cell in cells["split"].to_pylist()]
    known = [split for split in splits if split is not None]
    return known if len(known) == len(splits) else None


def _free_name(name: str, taken: set[str]) -> str:
    if name not in CLIP_COLUMNS and not is_reserved(name):
        return name
    renamed = f"data_set_{name.replace('/', '_')}"
    while renamed in taken:
        renamed += "_"
    return renamed


def _labels(found: Sequence[ContainerAudio]) -> Sequence[str | None] | None:
    labels: list[str | None] = []
    for audio in found:
        labels += audio.labels or [None] * len(audio.members)
    return labels if any(label is not None for label in labels) else None
