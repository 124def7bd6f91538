"""`patchbank encoders`: what there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchbank.cli.listing import print_beside, print_entry

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.catalogue import EncoderEntry


def encoders(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the encoders that extract knows: licence, sizes, and where their weights are had.

    Those of installed packages are named without being imported.
    """
    import json

    from patchbank.pipeline.encoders.catalogue import ENCODERS
    from patchbank.pipeline.encoders.discovery import installed_encoders

    installed = installed_encoders()
    if json_output:
        facts = [encoder_facts(entry) for entry in ENCODERS.values()]
        facts += [{"name": one.name, "distribution": one.distribution} for one in installed]
        print(json.dumps(facts))
        return
    for entry in ENCODERS.values():
        print_encoder(entry)
    for one in installed:
        print_entry(one.name, "", f"from {one.distribution}; try it: patchbank check {one.name}")
    print("\nAny other encoder is a file of your own: patchbank check my_encoder.py")


def encoder_facts(entry: EncoderEntry) -> dict[str, Any]:
    """One shipped encoder of `encoders --json`."""
    from dataclasses import asdict

    facts = asdict(entry) | {"distribution": "patchbank"}
    del facts["module"]
    return facts


def print_encoder(entry: EncoderEntry) -> None:
    """One shipped encoder: licence and summary, then its sizes, weights and notes."""
    print_entry(entry.name, entry.licence, entry.summary)
    layers = f"{entry.n_layers} layers" if entry.n_layers > 1 else "1 layer"
    rate = f"{entry.sample_rate_hz / 1000:g} kHz"
    lines = [f"{rate}, {entry.grid}, dim {entry.dim}, {layers}"]
    if entry.weights:
        lines.append(f"weights: {entry.weights.replace('https://', '')}")
    if entry.has_fine_tuned:
        lines.append(f"fine-tuned files load too: their encoder is {entry.name}+")
    if entry.notes:
        lines.append(f"note: {entry.notes}")
    for line in lines:
        print_beside(" " * 14, line)
