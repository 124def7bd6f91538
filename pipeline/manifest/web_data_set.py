"""WebDataset tars: files of one name up to the first dot are one sample."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from patchbank.pipeline.containers.tar import TARS, TarIndex, open_tar_member
from patchbank.pipeline.errors import AudioError, ManifestError, Problem
from patchbank.pipeline.manifest.audio_files import AUDIO_SUFFIXES, is_audio_name
from patchbank.pipeline.manifest.found_audio import ContainerAudio, found_error

_TOLD_SUFFIXES = (".cls", ".json")
_CLS = ""
"""What the text of a `.cls` is called among the keys of a `.json`."""


def read_members(path: Path) -> ContainerAudio:
    """The audio members of a tar, in its order, with columns and labels of their samples.

    Labels are the text of `.cls`, or `label` or `labels` of `.json`; its other strings, numbers
    and booleans are columns. A sample with two audio files is two clips with the same labels.
    """
    try:
        index = TARS.get(path)
    except (AudioError, OSError) as error:
        raise found_error(path, str(error)) from error
    _refuse_trouble(path, index)
    audio = [name for name in index.stretches if is_audio_name(name, AUDIO_SUFFIXES)]
    if not audio:
        raise found_error(path, "no audio in it; looked for " + " ".join(AUDIO_SUFFIXES))
    told = _told_of_samples(path, index)
    facts = [told.get(_sample(name), {}) for name in audio]
    return ContainerAudio(audio, _columns(facts), [_label_of(fact) for fact in facts])


def _refuse_trouble(path: Path, index: TarIndex) -> None:
    problems = [
        Problem(str(path), None, None, f"{_printable(name)}: {trouble}")
        for name, trouble in index.troubles.items()
        if is_audio_name(name, AUDIO_SUFFIXES)
    ]
    if index.damage:
        problems.append(Problem(str(path), None, None, index.damage))
    if problems:
        raise ManifestError(problems)


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _sample(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _told_of_samples(path: Path, index: TarIndex) -> Mapping[str, Mapping[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for name in index.stretches:
        if name.lower().endswith(_TOLD_SUFFIXES):
            told.setdefault(_sample(name), {}).update(_told(path, name))
    return told


def _told(path: Path, name: str) -> Mapping[str, Any]:
    try:
        with open_tar_member(path, name) as member:
            text = member.read().decode()
        told = {_CLS: text.strip()} if name.lower().endswith(".cls") else json.loads(text)
    except (AudioError, ValueError) as error:
        raise found_error(path, f"{name}: cannot be read: {error}") from error
    return told if isinstance(told, dict) else {}


def _label_of(fact: Mapping[str, Any]) -> str | None:
    told = next((fact[key] for key in (_CLS, "labels", "label") if key in fact), None)
    if isinstance(told, list):
        return ";".join(str(name) for name in told)
    return str(told) if isinstance(told, str | int) else None


def _columns(facts: Sequence[Mapping[str, Any]]) -> dict[str, pa.ChunkedArray]:
    names = dict.fromkeys(name for fact in facts for name in fact)
    cells = {
        name: _column([fact.get(name) for fact in facts])
        for name in names
        if name not in (_CLS, "labels", "label")
    }
    return {name: column for name, column in cells.items() if column is not None}


def _column(cells: Sequence[Any]) -> pa.ChunkedArray | None:
    """The cells in one type, as text where they are of several; None for lists and objects."""
    if not all(isinstance(cell, str | int | float | None) for cell in cells):
        return None
    try:
        return pa.chunked_array([pa.array(cells)])
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        texts = [None if cell is None else str(cell) for cell in cells]
        return pa.chunked_array([pa.array(texts, pa.string())])
