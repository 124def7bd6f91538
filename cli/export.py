"""`patchbank export`: a trained probe and its encoder as one program that needs torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchbank.cli.bars import phase
from patchbank.cli.choices import ExportBatch
from patchbank.cli.encoder_options import EncoderFile, ProbeFile, ProbeOfRun, Run, Weights
from patchbank.cli.out_file import check_parent


def export(
    run: Run,
    out: Annotated[Path, typer.Option(metavar="FILE.pt2", help="The program to write.")],
    probe: ProbeOfRun = None,
    weights: Weights = None,
    encoder: EncoderFile = None,
    plugin: ProbeFile = None,
    batch: Annotated[
        ExportBatch, typer.Option(help="Clips that the program takes at once: any number, or 1.")
    ] = ExportBatch.dynamic,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write front end, encoder and probe as one torch.export program.

    In: float32 waveforms of the window's length. Out: the probabilities that predict gives. The
    file is loaded again and compared with predict before it is kept.
    """
    import json
    from dataclasses import asdict

    from patchbank.cli.exported_model import write_program
    from patchbank.cli.predictor import Predictor

    if out.suffix != ".pt2":
        raise typer.BadParameter(f"--out takes a name that ends in .pt2, found {out}")
    check_parent(out)
    predictor = Predictor(
        run, probe=probe, weights=weights, encoder=encoder, plugin=plugin, device="cpu"
    )
    artefact = predictor.artefact
    with phase("load the encoder"):
        stream = predictor.stream
    check = write_program(artefact, stream, out, any_batch=batch is ExportBatch.dynamic)
    rate = stream.encoder.spec.sample_rate_hz
    n_samples, n_classes = stream.window.n_samples(rate), len(artefact.classes)
    if json_output:
        print(json.dumps({"program": str(out), "n_bytes": out.stat().st_size, **asdict(check)}))
        return
    clips = "batch" if batch is ExportBatch.dynamic else "1"
    print(f"{out}: waveforms ({clips}, {n_samples}) at {rate} Hz to ({clips}, {n_classes})")
    sizes = " and ".join(map(str, check.batch_sizes))
    print(
        f"largest difference from predict: {check.largest_difference:.1e}, at most {check.bound:g} "
        f"is rounding\n  ({', '.join(check.waveforms)}; batches of {sizes})"
    )
