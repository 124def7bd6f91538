"""From audio to a bank of patch tokens. Names load on first use; importing this is free."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbank.pipeline.bank import open_bank as open_bank
    from patchbank.pipeline.encoders import load_encoder as load_encoder
    from patchbank.pipeline.extraction import extract as extract
    from patchbank.pipeline.manifest import read_manifest as read_manifest

# No file may be called like one of these names: once imported, it would hide the function.
_HOME = {
    "extract": "patchbank.pipeline.extraction",
    "load_encoder": "patchbank.pipeline.encoders",
    "open_bank": "patchbank.pipeline.bank",
    "read_manifest": "patchbank.pipeline.manifest",
}

__all__ = ["extract", "load_encoder", "open_bank", "read_manifest"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
