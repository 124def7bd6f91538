"""Probe families of one's own, in a file of Python."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from patchbank.pipeline.errors import TrialError, told


def is_file(reference: str) -> bool:
    """Whether a probe is named by a file of Python rather than by a name."""
    return reference.endswith(".py")


def file_sha256(path: Path | str) -> str:
    """What tells one state of a probe's file from another."""
    return hashlib.sha256(_bytes(Path(path))).hexdigest()


def run_file(reference: str) -> ModuleType:
    """The module in a file, run once for what it holds; raises `TrialError`.

    Nothing but a person's own words leads here: never a path that a saved probe names.
    """
    path = Path(reference).expanduser().absolute()
    content = _bytes(path)
    # Named by place and content: equal names in two folders do not meet, a change is seen.
    digest = hashlib.sha256(bytes(path) + b"\0" + content).hexdigest()[:16]
    name = f"patchbank_probe_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Last, so that what lies beside the file can be imported but hides nothing.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # Dataclasses look their module up while the file runs.
    sys.modules[name] = module
    try:
        # Not exec_module: a file that changes within a second would be taken from its bytecode.
        exec(compile(content, str(path), "exec"), module.__dict__)
    except Exception as error:
        del sys.modules[name]
        raise TrialError(f"cannot import {reference}: {told(error, str(path))}") from error
    return module


def _bytes(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise TrialError(
            f"found no probe file at {path.expanduser().absolute()} ({error.strerror}); give the "
            "path of the .py file"
        ) from error
