"""`patchbank encoders`: what there is."""

from __future__ import annotations

from patchbank.cli.listing import print_entry


def encoders() -> None:
    """List the encoders that extract knows, with the licence of their weights."""
    from patchbank.pipeline.encoders.catalogue import ENCODERS

    for entry in ENCODERS.values():
        print_entry(entry.name, entry.licence, entry.summary)
