"""The recordings that a command line names, and where each one's labels go."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from patchbank.pipeline.errors import TrialError

UNSAFE = re.compile(r"[^\w\-. ]")
"""What a name may not have on every system; letters of any script may stay."""


def recordings(audio: Sequence[Path]) -> Iterator[Path]:
    """The files named, and all audio below the folders and in the containers named."""
    from patchbank.pipeline.manifest.data_set import is_data_set_file, read_data_set
    from patchbank.pipeline.manifest.folder import audio_below

    for path in audio:
        if path.is_dir():
            yield from (path / name for name in audio_below(path))
        elif is_data_set_file(path):
            folder = path.parent
            yield from (folder / name for name in read_data_set(folder, [path.name]).paths)
        else:
            yield path


def label_files(
    audio: Sequence[Path], found: Sequence[Path], folder: Path, suffix: str
) -> dict[Path, Path]:
    """A file below `folder` for each recording, in the places that they have below `audio`.

    A name keeps its own suffix, as a.wav and a.flac may lie side by side. What no file may be
    called is replaced, and such a name ends in a digest of the path, so that no two meet.
    """
    places = [_place(path) for path in audio]
    root = Path(os.path.commonpath([one if one.is_dir() else one.parent for one in places]))
    files = {path: folder / _safe(_place(path), root, suffix) for path in dict.fromkeys(found)}
    if len({str(file).casefold() for file in files.values()}) < len(files):
        raise TrialError(
            "found recordings whose names differ in upper and lower case only, expected names that "
            "stay apart on every system; rename one, or label them in two runs"
        )
    return files


def _place(path: Path) -> Path:
    # Not resolved: a link is where its user sees it.
    return Path(os.path.normpath(path.absolute()))


def _safe(place: Path, root: Path, suffix: str) -> Path:
    # A member of a container may be called ../../x.wav, which must lead nowhere else.
    below = place.relative_to(root) if place.is_relative_to(root) else Path(*place.parts[1:])
    parts = [UNSAFE.sub("_", part) for part in below.parts]
    if parts == list(below.parts):
        return below.with_name(below.name + suffix)
    digest = hashlib.sha256(os.fsencode(below)).hexdigest()[:8]
    return Path(*parts[:-1], f"{parts[-1]}-{digest}{suffix}")
