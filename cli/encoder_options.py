"""Options of every command that loads an encoder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Weights = Annotated[
    str | None,
    typer.Option(metavar="PATH|hf:ORG/REPO", help="Checkpoint: a file, a folder, or on the hub."),
]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="What train-probe left, or a probe's folder.")
]
ProbeOfRun = Annotated[
    str | None, typer.Option(help="Which probe of the run. [default: best on validation]")
]
EncoderFile = Annotated[
    str | None, typer.Option(metavar="FILE.py", help="The encoder, if it is your own.")
]
ProbeFile = Annotated[
    Path | None, typer.Option(metavar="FILE.py", help="The probe's file, if it is your own.")
]
Preset = Annotated[
    str | None,
    typer.Option(help="Convention of the front end: published, or bat. [default: published]"),
]
FrontEndConstants = Annotated[
    list[str] | None,
    typer.Option(
        "--frontend", metavar="NAME=VALUE", help="Change a constant of the front end. Repeatable."
    ),
]


def parse_constants(texts: Sequence[str] | None) -> dict[str, Any]:
    """`NAME=VALUE` texts as a mapping; a value is JSON (-6.6, [512], true) or else plain text.

    Exits with 2 for a text without a name, or a name that is there twice.
    """
    constants: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--frontend takes NAME=VALUE, found {text!r}")
        if name in constants:
            raise typer.BadParameter(f"--frontend {name} is there twice")
        try:
            constants[name] = json.loads(value)
        except ValueError:
            constants[name] = value
    return constants
