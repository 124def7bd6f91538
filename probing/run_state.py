"""What a run leaves in its folder while it is under way, so that the same command goes on.

`run.json` says what the folder is for, `search.journal` holds what the search has tried,
`.checkpoints` where training was stopped; `test-scored.jsonl` has a line for each time that the
test split was scored, and is never taken away.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from patchbank.pipeline.errors import BankMismatch, TrialError
from patchbank.pipeline.specs import differing_fields, digest
from patchbank.probing.atomic import write_json
from patchbank.probing.checkpoint import Checkpoint

FORMAT = 1
CHECKPOINTS = ".checkpoints"
JOURNAL = "search.journal"
TEST_LOG = "test-scored.jsonl"
LOG = "tensorboard"


class RunState:
    """The files of one run, or of none: then nothing is kept."""

    def __init__(
        self, folder: Path | None = None, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.run_id = folder, digest(identity or {})

    @property
    def journal(self) -> Path | None:
        """Of the search."""
        return None if self.folder is None else self.folder / JOURNAL

    def checkpoint(self, stage: str) -> Checkpoint | None:
        """Where the training of a stage is, or what became of it."""
        if self.folder is None:
            return None
        name = re.sub(r"[^\w=.-]+", "-", stage)
        tail = hashlib.sha256(stage.encode()).hexdigest()[:6]
        return Checkpoint(self.folder / CHECKPOINTS / f"{name}.{tail}.safetensors")

    def forget(self, stage: str) -> None:
        """A stage whose result is stored elsewhere needs its checkpoint no more."""
        checkpoint = self.checkpoint(stage)
        if checkpoint is not None:
            checkpoint.path.unlink(missing_ok=True)

    def forget_all(self) -> None:
        """The run is complete."""
        if self.folder is not None:
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def record_test(self, split: str, probes: Sequence[str]) -> None:
        """Notes, before it happens, that the test split is scored."""
        if self.folder is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"utc": now, "run": self.run_id, "split": split, "probes": list(probes)}
        with (self.folder / TEST_LOG).open("ab+") as file:
            file.seek(0)
            # Half a line, left by a kill or a full disk, does not take the next one with it.
            begin = b"" if file.read()[-1:] in (b"", b"\n") else b"\n"
            file.write(begin + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def times_tested(self) -> list[dict[str, Any]]:
        """Each time that the test split was scored into this folder, the first one first."""
        if self.folder is None or not (self.folder / TEST_LOG).is_file():
            return []
        lines = (self.folder / TEST_LOG).read_text(encoding="utf-8", errors="replace").splitlines()
        return [_test_record(line) for line in lines if line.strip()]


def _test_record(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {"unreadable": line}


@contextmanager
def open_run(
    folder: Path, identity: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[RunState]:
    """The state of a run of this `identity` (plain JSON), new or from where it was stopped.

    Raises `BankMismatch`, naming what differs, where the folder holds another run that is not to
    be overwritten, and `TrialError` where another process is at work in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        found = _read_identity(folder)
        identity = json.loads(json.dumps(identity))
        if found != identity:
            if not overwrite:
                _refuse(folder, found, identity)
            _begin(folder, found, identity)
        yield RunState(folder, identity)


def _read_identity(folder: Path) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found["identity"]) if found["format"] == FORMAT else {}
    except (ValueError, KeyError, TypeError):
        return {}


def _refuse(folder: Path, found: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> None:
    """Raises where a folder is taken."""
    if found is None and not any(
        (one / "results.json").is_file() for one in _sets(folder, identity)
    ):
        return
    advice = "choose another --out, or replace it: --overwrite"
    if not found:
        raise TrialError(
            f"{folder} holds results that cannot be told from these, expected an empty folder or "
            f"one of the same run; {advice}"
        )
    raise BankMismatch(f"{folder} holds another run; {advice}", differing_fields(identity, found))


def _sets(folder: Path, identity: Mapping[str, Any]) -> list[Path]:
    """Where a run has results: in its folder, or in one a label set below it."""
    names = [name for name in identity.get("labels", ()) if _is_file_name(name)]
    return [folder, *(folder / name for name in names if len(names) > 1)]


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and Path(name).name == name


def _begin(folder: Path, found: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> None:
    """Clears a folder for a new run: of what an earlier one left, and of nothing else."""
    sets = _sets(folder, identity)
    for one in sets:
        if one != folder and (one / "run.json").is_file():
            raise TrialError(f"{one} is the folder of another run; choose another --out")
    for one in {*sets, *_sets(folder, found or {})}:
        _clear(one, [*(found or {}).get("probes", ())])
    for name in (CHECKPOINTS, LOG):
        if found is not None:
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in (JOURNAL, "settings.toml"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "run.json", {"format": FORMAT, "identity": identity})


def _clear(folder: Path, probes: Sequence[str]) -> None:
    """Takes away the results of one label set, those of its probes too."""
    for name in ("results.json", "resamples.parquet", "test-clips.parquet"):
        (folder / name).unlink(missing_ok=True)
    for name in filter(_is_file_name, probes):
        if (folder / name / "probe.json").is_file():
            shutil.rmtree(folder / name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("a") as file:
        _lock(file, folder)
        yield


def _lock(file: IO[str], folder: Path) -> None:
    # It goes with the process, however that ends.
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrialError(
            f"another train-probe is at work in {folder}; wait for it, or choose another --out"
        ) from error
    except OSError:
        return  # a file system without locks
