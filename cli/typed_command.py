"""What was typed, for results that say how they came about."""

from __future__ import annotations

from contextvars import ContextVar

TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
"""The command line word by word; none where Python called a command's function."""
