"""A folder with one file of labels a recording, which a run that was killed goes on with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from patchbank.pipeline.containers import locate
from patchbank.pipeline.errors import TrialError
from patchbank.probing.atomic import write_json

RECORD = "predict.json"
"""What the folder's files are labels of."""


def begin_folder(folder: Path, probe: Path, asked: dict[str, Any]) -> float:
    """Notes in `folder` which probe and options its labels are of; returns when that was noted.

    Raises `TrialError` where the folder holds labels of another probe, or of other options.
    """
    fact = {"format": 1, "probe_sha256": _digest(probe), **asked}
    path = folder / RECORD
    if not path.is_file():
        write_json(path, fact)
        return path.stat().st_mtime
    try:
        found = dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise TrialError(
            f"{path} is damaged ({error!r}); remove it, and the labels beside it are made again"
        ) from error
    others = [key for key in {**fact, **found} if found.get(key) != fact.get(key)]
    if others:
        raise TrialError(
            f"{folder} holds labels that differ in {', '.join(others)}, expected those of the same "
            f"probe and options; choose another --out, or remove {path}"
        )
    return path.stat().st_mtime


def is_labelled(recording: Path, file: Path, begun: float) -> bool:
    """Whether `file` was written since the folder was begun, and the recording was not.

    Files appear whole or not at all, so one that is there is complete.
    """
    place = locate(recording)
    audio = recording if place is None else place[0]
    if not file.is_file() or not audio.exists():
        return False
    return file.stat().st_mtime >= max(begun, audio.stat().st_mtime)


def _digest(probe: Path) -> str:
    found = hashlib.sha256()
    for name in ("probe.json", "probe.safetensors"):
        found.update((probe / name).read_bytes())
    return found.hexdigest()
