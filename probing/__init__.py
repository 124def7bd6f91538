"""From a bank to trained probes, offline. Names load on first use; importing this is free."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbank.probing.classifier import ProbeClassifier as ProbeClassifier
    from patchbank.probing.loader import BatchLoader as BatchLoader
    from patchbank.probing.protocol import train as train

# No file may be called like one of these names: once imported, the file would hide the function.
_HOME = {
    "BatchLoader": "patchbank.probing.loader",
    "ProbeClassifier": "patchbank.probing.classifier",
    "train": "patchbank.probing.protocol",
}

__all__ = ["BatchLoader", "ProbeClassifier", "train"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
