"""Lists that fit a terminal of 80 columns."""

from __future__ import annotations

import textwrap


def print_entry(name: str, note: str, summary: str) -> None:
    """A name, a short note, and a summary wrapped beside them."""
    lead = f"{name:<14}{note:<12}"
    print(textwrap.fill(summary, 79, initial_indent=lead, subsequent_indent=" " * len(lead)))
