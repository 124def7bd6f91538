"""Options of every command that starts workers on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

Devices = Annotated[
    str | None,
    typer.Option(metavar="all|cuda:0,cuda:2|cpu", help="A worker process for each of these."),
]
WorkerCount = Annotated[
    int | None, typer.Option("--workers", min=1, help="So many CPU worker processes.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Cores that a worker computes with. [default: an even share]"),
]
