"""Lists that fit a terminal of 80 columns."""

from __future__ import annotations

import textwrap


def print_entry(name: str, note: str, summary: str) -> None:
    """A name, a short note, and a summary wrapped beside them."""
    print_beside(f"{name:<13} {note:<11} ", summary)


def print_beside(lead: str, text: str) -> None:
    """A text wrapped beside what leads to it; a word that is too long, an address, stays whole."""
    print(
        textwrap.fill(
            text,
            79,
            initial_indent=lead,
            subsequent_indent=" " * len(lead),
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
