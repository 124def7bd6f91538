"""`patchbank predict`: labels for new audio, or for the clips of a bank, from a trained probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchbank.cli.choices import LabelFormat
from patchbank.cli.encoder_options import EncoderFile, ProbeFile, ProbeOfRun, Run, Weights
from patchbank.cli.label_output import choose_output


def predict(
    run: Run,
    audio: Annotated[
        list[Path] | None, typer.Argument(metavar="AUDIO", help="Audio files, or folders of them.")
    ] = None,
    bank: Annotated[
        str | None, typer.Option(metavar="BANK|URL", help="Label a bank's clips instead.")
    ] = None,
    probe: ProbeOfRun = None,
    weights: Weights = None,
    encoder: EncoderFile = None,
    plugin: ProbeFile = None,
    frames: Annotated[
        bool, typer.Option("--frames", help="Label each time step of the tokens by itself.")
    ] = False,
    top: Annotated[
        int | None, typer.Option(min=1, help="Most classes of a row. [default: 3, or all found]")
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            metavar="VALUE|chosen", help="Only classes from this probability, or from their own."
        ),
    ] = None,
    format_: Annotated[
        LabelFormat | None,
        typer.Option("--format", help="[default: text, or by the name of --out]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE|FOLDER", help="Write there; a folder gets a file a recording."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Label audio with a trained probe; long recordings are labelled window by window."""
    if bool(audio) == (bank is not None):
        raise typer.BadParameter("give audio files, or --bank X.bank")
    output = choose_output(
        out,
        None if format_ is None else format_.value,
        top=top,
        threshold=threshold,
        as_json=json_output,
        is_bank=bank is not None,
    )
    from patchbank.cli.label_job import LabelJob
    from patchbank.cli.predictor import Predictor

    predictor = Predictor(
        run, probe=probe, weights=weights, encoder=encoder, plugin=plugin, device=device
    )
    job = LabelJob(predictor, output, frames=frames)
    if bank is not None:
        job.bank(bank)
    elif output.is_folder and out is not None:
        job.folder(audio or [], out)
    else:
        job.audio(audio or [])
