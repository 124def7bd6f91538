"""Which files under an audio root may be read, and why others may not."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

from patchbank.pipeline.codec_sound import CODEC_SUFFIXES, codec_trouble, is_codec_name
from patchbank.pipeline.containers import TABLE_SUFFIXES, member_troubles, split_path

_SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".mp3", ".aif", ".aiff", ".opus")
FOLDER_SUFFIXES = (*_SOUND_SUFFIXES, ".m4a", ".aac", ".wma", ".mka", ".webm")
"""What a folder is searched for; videos have to be listed in a table."""
_LIBSNDFILE_SUFFIXES = (*_SOUND_SUFFIXES, ".aifc", ".au", ".caf", ".rf64", ".snd", ".w64")
AUDIO_SUFFIXES = (*_LIBSNDFILE_SUFFIXES, *CODEC_SUFFIXES)
"""What a table may list: all that libsndfile recognises by content, and what torchcodec reads."""


class UnusablePathError(ValueError):
    """A path cannot name a clip's file; the message says why."""


def is_audio_name(name: str, suffixes: Collection[str] = FOLDER_SUFFIXES) -> bool:
    """Whether `name` ends in one of `suffixes`, in any case."""
    return posixpath.splitext(name)[1].lower() in suffixes


def relative_path(path: str, *, roots: Iterable[str]) -> str:
    """`path` as a tidy POSIX path below the audio root, without looking at the disk.

    `roots` are the absolute names of the audio root, without a slash at the end. Raises
    `UnusablePathError` for what is no path below it.
    """
    if not path:
        raise UnusablePathError("found an empty cell, expected the path of an audio file")
    if "\\" in path or "\0" in path:
        raise UnusablePathError(f"found {path!r}, expected a path with '/' between its folders")
    if ".." in path.split("/"):
        raise UnusablePathError(f"{path!r} holds '..'; write it from the audio root down")
    tidy = posixpath.normpath(path) if path.startswith("/") else posixpath.normpath("/" + path)[1:]
    if path.startswith("/"):
        tidy = _below(tidy, roots)
    place = split_path(tidy)
    is_row = place is not None and place[0].lower().endswith(TABLE_SUFFIXES)
    if not is_row and not is_audio_name(tidy, AUDIO_SUFFIXES):
        found, known = posixpath.splitext(tidy)[1], " ".join(AUDIO_SUFFIXES)
        raise UnusablePathError(f"{path!r} has the unknown type {found!r}; known types: {known}")
    return tidy


def _below(path: str, roots: Iterable[str]) -> str:
    for root in roots:
        if path.startswith(root + "/"):
            return path[len(root) + 1 :]
    raise UnusablePathError(
        f"{path!r} is outside the audio root; give its folder with --audio-root"
    )


def root_names(audio_root: Path) -> tuple[str, str]:
    """The absolute names that the audio root goes by: as written, and with links resolved."""
    return os.path.abspath(audio_root).rstrip("/"), os.path.realpath(audio_root).rstrip("/")  # noqa: PTH100


def decoder_trouble(paths: Iterable[str]) -> str | None:
    """What is missing here to decode some of `paths`; None where nothing is."""
    names = [path for path in paths if is_codec_name(path)]
    trouble = codec_trouble() if names else None
    if trouble is None:
        return None
    return f"{len(names)} recordings like {names[0]!r} need torchcodec; {trouble}"


def file_troubles(paths: Iterable[str], *, audio_root: Path) -> dict[str, str]:
    """Why some of the relative `paths` cannot be read.

    One listing a folder, no look at a file; of containers the index is read, no member.
    """
    members: defaultdict[str, list[str]] = defaultdict(list)
    files = []
    for path in paths:
        if (place := split_path(path)) is None:
            files.append(path)
        else:
            members[place[0]].append(place[1])
    # A folder may be called `a.tar`.
    folders = {name for name in members if (audio_root / name).is_dir()}
    files += [f"{name}/{member}" for name in folders for member in members.pop(name)]
    troubles = _file_troubles([*files, *members], audio_root=audio_root)
    for container, names in members.items():
        if trouble := troubles.pop(container, None):
            found = dict.fromkeys(names, trouble)
        else:
            found = member_troubles(audio_root / container, names)
        troubles |= {f"{container}/{name}": why for name, why in found.items()}
    return troubles


def _file_troubles(paths: Iterable[str], *, audio_root: Path) -> dict[str, str]:
    root = os.path.realpath(audio_root)
    names_by_folder: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, name = posixpath.split(path)
        names_by_folder[folder].add(name)
    troubles = {}
    for folder, names in names_by_folder.items():
        real_folder = os.path.realpath(os.path.join(root, folder))  # noqa: PTH118
        for name, trouble in _folder_troubles(real_folder, names, root=root).items():
            troubles[posixpath.join(folder, name)] = trouble
    return troubles


def _folder_troubles(real_folder: str, names: Collection[str], *, root: str) -> dict[str, str]:
    if not _is_inside(real_folder, root):
        return dict.fromkeys(names, "a link on this path leaves the audio root")
    try:
        with os.scandir(real_folder) as listing:
            entries = {entry.name: entry for entry in listing if entry.name in names}
    except (FileNotFoundError, NotADirectoryError):
        entries = {}
    except OSError as error:
        return dict.fromkeys(names, f"its folder cannot be listed: {error.strerror}")
    troubles = {name: _entry_trouble(entries.get(name), root=root) for name in names}
    return {name: trouble for name, trouble in troubles.items() if trouble is not None}


def _entry_trouble(entry: os.DirEntry[str] | None, *, root: str) -> str | None:
    if entry is None:
        return f"there is no such file under the audio root {root}; correct it or --audio-root"
    if entry.is_symlink() and not _is_inside(os.path.realpath(entry.path), root):
        return "this link leaves the audio root; copy the file into it"
    return None if entry.is_file() else "found something else, expected a file"


def _is_inside(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
