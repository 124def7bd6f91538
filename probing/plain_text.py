"""Names that somebody else chose, shown so that they are text and nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


def printable(text: str) -> str:
    """In one line and without what moves a terminal: `\\n`, `\\x1b` ... stand for it."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def cell(text: str, style: str = "") -> Text:
    """For tables of rich, which would take `[red]` and `:dog:` in a string for more than text."""
    from rich.text import Text

    return Text(printable(text), style=style)
