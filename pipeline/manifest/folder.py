"""A folder as a clip table: class folders, whose names say what the audio is, or a data set."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from patchbank.pipeline.containers import COMPRESSED_SUFFIXES, CONTAINER_SUFFIXES
from patchbank.pipeline.errors import ManifestError, Problem
from patchbank.pipeline.manifest.audio_files import FOLDER_SUFFIXES, is_audio_name
from patchbank.pipeline.manifest.columns import MEANT_SPLITS, SPLITS
from patchbank.pipeline.manifest.data_set import is_data_set_file, read_data_set
from patchbank.pipeline.manifest.found_audio import FoundAudio, found_error


def read_folder(folder: Path) -> FoundAudio:
    """All audio below `folder`, sorted by path; hidden files and other types are passed over.

    It lies in files, or in containers (see `data_set`), not in both. Of files, the class is the
    first-level folder; where every first-level folder is a split (`train`, `valid`, `test`), the
    class is the second level.
    """
    paths, containers = _found_below(folder)
    return read_data_set(folder, containers) if containers else _class_folders(folder, paths)


def audio_below(folder: Path) -> Sequence[str]:
    """The paths that `read_folder` finds, whatever their folders are called."""
    paths, containers = _found_below(folder)
    return read_data_set(folder, containers).paths if containers else paths


def _found_below(folder: Path) -> tuple[Sequence[str], Sequence[str]]:
    """Audio files, or containers of audio; one of the two is empty."""
    names = sorted(_audio_paths(folder))
    paths = [name for name in names if is_audio_name(name)]
    containers = _containers(folder, [name for name in names if not is_audio_name(name)])
    if paths:  # beside audio, a compressed tar is what it was unpacked from
        containers = [name for name in containers if not name.lower().endswith(COMPRESSED_SUFFIXES)]
    if paths and containers:
        raise found_error(
            folder,
            f"holds audio files ({paths[0]!r}) and containers of audio ({containers[0]!r}); "
            "name one of the two, move it elsewhere, or list what you mean in a table",
        )
    if not paths and not containers:
        looked_for = " ".join((*FOLDER_SUFFIXES, ".tar"))
        raise found_error(
            folder, f"no audio file below it; looked for {looked_for} and for tables of audio"
        )
    return paths, containers


def _containers(folder: Path, names: Sequence[str]) -> Sequence[str]:
    """Those of `names` that hold audio; where `save_to_disk` left a state, what it lists."""
    listed = {
        posixpath.normpath(posixpath.join(place, name))
        for place in {posixpath.dirname(name) for name in names}
        for name in _saved_files(folder / place)
    }
    stated = {posixpath.dirname(name) for name in listed}
    return [
        name
        for name in names
        if is_data_set_file(folder / name)
        and (name in listed or posixpath.dirname(name) not in stated)
    ]


def _saved_files(folder: Path) -> Sequence[str]:
    """The files of a data set that `datasets.save_to_disk` wrote; others are its cache."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return [file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _class_folders(folder: Path, paths: Sequence[str]) -> FoundAudio:
    levels = [path.split("/")[:-1] for path in paths]
    first_levels = {level[0] if level else "" for level in levels}
    splits = None
    if _are_splits(folder, first_levels):
        splits = [level[0] for level in levels]
        levels = [level[1:] for level in levels]
    columns = {} if splits is None else {"split": pa.array(splits, pa.string())}
    return FoundAudio(paths, columns, _labels(folder, paths, levels))


def _audio_paths(folder: Path) -> Iterator[str]:
    problems: list[Problem] = []
    for here, folders, names in os.walk(folder, onerror=_raise_unlistable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        problems += _linked_folders(Path(here), folders)
        for name in names:
            is_audio = is_audio_name(name) or name.lower().endswith(CONTAINER_SUFFIXES)
            if not name.startswith(".") and is_audio:
                path = Path(here, name)
                problems += _undecodable_name(path)
                yield path.relative_to(folder).as_posix()
    if problems:
        raise ManifestError(problems)


def _raise_unlistable(error: OSError) -> None:
    raise found_error(Path(error.filename), f"cannot be listed: {error.strerror}") from error


def _linked_folders(here: Path, names: Sequence[str]) -> list[Problem]:
    message = "is a link to a folder, which is not followed; copy the folder or list it in a table"
    links = [here / name for name in names if (here / name).is_symlink()]
    return [Problem(str(link), None, None, message) for link in links]


def _undecodable_name(path: Path) -> list[Problem]:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path).decode(errors="replace")
        return [Problem(shown, None, None, "its name is not UTF-8; rename it")]
    return []


def _are_splits(folder: Path, first_levels: set[str]) -> bool:
    if not first_levels <= set(SPLITS) | set(MEANT_SPLITS):
        return False
    for name in sorted(first_levels & set(MEANT_SPLITS)):
        meant = MEANT_SPLITS[name]
        raise found_error(
            folder / name, f"found a split folder {name!r}, expected {meant!r}; rename it"
        )
    return True


def _labels(
    folder: Path, paths: Sequence[str], levels: Sequence[Sequence[str]]
) -> Sequence[str] | None:
    classless = [path for path, level in zip(paths, levels, strict=True) if not level]
    if len(classless) == len(paths):
        return None
    if classless:
        classed = next(path for path, level in zip(paths, levels, strict=True) if level)
        raise found_error(
            folder,
            f"{classless[0]!r} is in no class folder while {classed!r} is in one; "
            "expected all audio in class folders or none",
        )
    labels = [level[0] for level in levels]
    for label in labels:
        if ";" in label:
            raise found_error(
                folder / label, "a class name holds ';', which separates labels; rename it"
            )
    return labels
