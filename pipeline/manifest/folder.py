"""A folder of class folders as a clip table: where the audio lies says what it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchbank.pipeline.errors import ManifestError, Problem
from patchbank.pipeline.manifest.audio_files import FOLDER_SUFFIXES, is_audio_name
from patchbank.pipeline.manifest.columns import MEANT_SPLITS, SPLITS


@dataclass(frozen=True)
class AudioFolder:
    """The audio files of a folder, as columns of one length, sorted by path."""

    paths: Sequence[str]
    """Relative to the folder, POSIX."""
    splits: Sequence[str] | None
    labels: Sequence[str] | None


def read_folder(folder: Path) -> AudioFolder:
    """All audio below `folder`; hidden files and other types are passed over.

    The class is the first-level folder. Where every first-level folder is a split (`train`,
    `valid`, `test`), the class is the second level.
    """
    paths = sorted(_audio_paths(folder))
    if not paths:
        raise _error(folder, f"no audio file below it; looked for {' '.join(FOLDER_SUFFIXES)}")
    levels = [path.split("/")[:-1] for path in paths]
    first_levels = {level[0] if level else "" for level in levels}
    splits = None
    if _are_splits(folder, first_levels):
        splits = [level[0] for level in levels]
        levels = [level[1:] for level in levels]
    return AudioFolder(paths, splits, _labels(folder, paths, levels))


def _error(folder: Path, message: str) -> ManifestError:
    return ManifestError([Problem(str(folder), None, None, message)])


def _audio_paths(folder: Path) -> Iterator[str]:
    problems: list[Problem] = []
    for here, folders, names in os.walk(folder, onerror=_raise_unlistable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        problems += _linked_folders(Path(here), folders)
        for name in names:
            if not name.startswith(".") and is_audio_name(name):
                path = Path(here, name)
                problems += _undecodable_name(path)
                yield path.relative_to(folder).as_posix()
    if problems:
        raise ManifestError(problems)


def _raise_unlistable(error: OSError) -> None:
    raise _error(Path(error.filename), f"cannot be listed: {error.strerror}") from error


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
        raise _error(folder / name, f"found a split folder {name!r}, expected {meant!r}; rename it")
    return True


def _labels(
    folder: Path, paths: Sequence[str], levels: Sequence[Sequence[str]]
) -> Sequence[str] | None:
    classless = [path for path, level in zip(paths, levels, strict=True) if not level]
    if len(classless) == len(paths):
        return None
    if classless:
        classed = next(path for path, level in zip(paths, levels, strict=True) if level)
        raise _error(
            folder,
            f"{classless[0]!r} is in no class folder while {classed!r} is in one; "
            "expected all audio in class folders or none",
        )
    labels = [level[0] for level in levels]
    for label in labels:
        if ";" in label:
            raise _error(
                folder / label, "a class name holds ';', which separates labels; rename it"
            )
    return labels
