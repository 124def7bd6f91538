"""What the options of `patchbank predict` mean together: where labels go, and which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

Format = Literal["text", "csv", "json", "audacity"]
Threshold = float | Literal["chosen"] | None
"""A probability, or what validation data chose for each class; None for any."""
SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "audacity",
}
"""What a file of that name holds."""
TOP = 3
"""Classes of a row that are written where nothing else is asked for."""


@dataclass(frozen=True)
class Output:
    """Where rows go, and which classes of them."""

    path: Path | None
    """None for stdout."""
    format: Format
    is_folder: bool
    top: int | None
    threshold: Threshold
    prints_json: bool
    """JSON lines on stdout, beside a file."""


def choose_output(
    out: Path | None,
    format_: Format | None,
    *,
    top: int | None,
    threshold: str | None,
    as_json: bool,
    is_bank: bool,
) -> Output:
    """What the options mean together; raises `typer.BadParameter` where they mean nothing."""
    is_folder = out is not None and not is_bank and (out.is_dir() or not out.suffix)
    if out is None:
        if as_json and format_ not in (None, "json"):
            raise typer.BadParameter("give --json or --format, or a file for one: --out FILE")
        chosen: Format = format_ or ("json" if as_json else "text")
    else:
        chosen = format_ or SUFFIXES.get(out.suffix.lower(), "csv")
    if is_folder and chosen == "text":
        raise typer.BadParameter("a folder takes --format csv, json or audacity; text is printed")
    if is_bank and chosen == "audacity":
        raise typer.BadParameter("a label track is of a recording; give audio in place of --bank")
    prints_json = as_json and out is not None
    if chosen == "csv" and not prints_json and (top is not None or threshold is not None):
        raise typer.BadParameter("a CSV holds every class; leave --top and --threshold out")
    found = _threshold(threshold, chosen)
    if top is None and found is None:
        top = TOP
    return Output(out, chosen, is_folder, top, found, prints_json)


def _threshold(text: str | None, format_: Format) -> Threshold:
    """A label track needs a decision."""
    if text == "chosen" or (text is None and format_ == "audacity"):
        return "chosen"
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(
            f"found --threshold {text}, expected a probability from 0 to 1, or chosen: what "
            "validation data chose for each class"
        )
    return value
