"""The bank: tokens of one encoder over one table of clips, as a Zarr v3 group."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchbank.pipeline.bank.reader import Bank as Bank
    from patchbank.pipeline.bank.reader import open_bank as open_bank

__all__ = ["Bank", "open_bank"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("patchbank.pipeline.bank.reader"), name)
