"""`patchbank predict`: labels for new audio, or for the clips of a bank, from a trained probe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from patchbank.cli.encoder_options import Weights
from patchbank.pipeline.errors import AudioError, EncoderError, PatchbankError, TrialError

if TYPE_CHECKING:
    import numpy as np

    from patchbank.pipeline.stream import EncodedWindows, TokenStream
    from patchbank.probing.artefact import ProbeArtefact
    from patchbank.probing.batch import Batch

Row = tuple[str, float, float, "np.ndarray[Any, Any]"]
"""Clip or path, start and end in seconds, one probability a class."""


def predict(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="What train-probe left, or a probe's folder."),
    ],
    audio: Annotated[
        list[Path] | None, typer.Argument(metavar="AUDIO", help="Audio files, or folders of them.")
    ] = None,
    bank: Annotated[Path | None, typer.Option(help="Label a bank's clips instead.")] = None,
    probe: Annotated[
        str | None, typer.Option(help="Which probe of the run. [default: best on validation]")
    ] = None,
    weights: Weights = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="FILE.py", help="The encoder, if it is your own."),
    ] = None,
    plugin: Annotated[
        Path | None, typer.Option(metavar="FILE.py", help="The probe's file, if it is your own.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to print for each window.")] = 3,
    out: Annotated[
        Path | None, typer.Option(help="Write every class's probability to this CSV.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Label audio with a trained probe; long recordings are labelled window by window."""
    from patchbank.probing.artefact import load_probe
    from patchbank.probing.run_folder import probe_folder

    if bool(audio) == (bank is not None):
        raise typer.BadParameter("give audio files, or --bank X.bank")
    folder = probe_folder(run, probe)
    artefact = load_probe(folder, plugin)
    if plugin is not None and not artefact.plugin:
        raise TrialError(f"the probe in {folder} is built by no file; leave --plugin out")
    if bank is not None:
        rows = rows_of_bank(artefact, bank)
    else:
        stream = open_stream(artefact, weights=weights, encoder=encoder, device=device)
        rows = rows_of_audio(artefact, stream, audio or [])
    if out is None:
        write_rows(rows, artefact.classes, None, top=top, as_json=json_output)
        return
    # Renamed at the end: whatever goes wrong before leaves an older file as it was.
    draft = out.with_name(f".{out.name}.draft")
    try:
        with draft.open("w", newline="", encoding="utf-8") as file:
            write_rows(rows, artefact.classes, file, top=top, as_json=json_output)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def rows_of_bank(artefact: ProbeArtefact, path: Path) -> Iterator[Row]:
    """One row for each clip of a bank that has tokens; its views are left out."""
    import numpy as np

    from patchbank.pipeline.bank import open_bank
    from patchbank.probing.loader import BatchLoader

    bank = open_bank(path)
    artefact.check_encoder(bank.card["encoder"], bank.encoder_id)
    clips = bank.clips.select(["clip_id", "view", "start_s", "duration_s"]).to_pylist()
    is_clean = np.array([clip["view"] == 0 for clip in clips])
    chosen = np.flatnonzero((bank.status == 1) & is_clean)
    loader = BatchLoader(bank, layer=artefact.layers, rows=chosen, shuffle=False, reads_once=True)
    for batch in loader:
        scores = artefact.predict_batch(batch)
        for row, probabilities in zip(np.asarray(batch.rows).tolist(), scores, strict=True):
            clip = clips[row]
            end_s = clip["start_s"] + clip["duration_s"]
            yield clip["clip_id"], clip["start_s"], end_s, probabilities


def open_stream(
    artefact: ProbeArtefact, *, weights: str | None, encoder: str | None, device: str
) -> TokenStream:
    """The probe's encoder and its bank's settings; `BankMismatch` for other weights."""
    from patchbank.pipeline.encoders import reload_encoder
    from patchbank.pipeline.encoders.discovery import is_known
    from patchbank.pipeline.environment import choose_device
    from patchbank.pipeline.specs import WindowSpec
    from patchbank.pipeline.stream import TokenStream

    chosen = choose_device(device)
    name = artefact.encoder["name"]
    if encoder is None and not is_known(name):
        raise EncoderError(
            f"this probe was trained on tokens of {name!r}, which is neither shipped nor installed "
            "here; give the file that made its bank: --encoder FILE.py"
        )
    model = reload_encoder(artefact.encoder, weights=weights, device=chosen, encoder=encoder)
    artefact.check_encoder(model.spec.identity(), model.spec.encoder_id)
    return TokenStream(
        encoder=model,
        layers=artefact.layers,
        window=WindowSpec(**artefact.window),
        stored_dtype=artefact.tokens["stored_dtype"],
        mask_padding=artefact.tokens["mask_padding"],
        device=chosen,
    )


def rows_of_audio(
    artefact: ProbeArtefact, stream: TokenStream, audio: Sequence[Path]
) -> Iterator[Row]:
    """One row for each window of each recording; raises at the end if some could not be read."""
    failed = 0
    for path in recordings(audio):
        try:
            for encoded in stream.encode(path):
                scores = artefact.predict_batch(batch_of(encoded))
                for window, probabilities in zip(encoded.windows, scores, strict=True):
                    end_s = window.start_s + window.duration_s
                    yield str(path), window.start_s, end_s, probabilities
        except AudioError as error:
            failed += 1
            print(f"failed: {path}: {error}", file=sys.stderr)
    if failed:
        raise PatchbankError(f"{failed} recording{'s' * (failed > 1)} could not be read")


def batch_of(encoded: EncodedWindows) -> Batch:
    """The tokens of some windows as a loader hands out those of a bank."""
    import numpy as np
    import torch

    from patchbank.probing.batch import Batch, LayerTokens

    layers = {
        layer: LayerTokens(
            torch.from_numpy(found.patches),
            None if found.prefix is None else torch.from_numpy(found.prefix),
            torch.from_numpy(found.n_patches),
        )
        for layer, found in encoded.layers.items()
    }
    return Batch(np.arange(len(encoded.windows)), layers)


def recordings(audio: Sequence[Path]) -> Iterator[Path]:
    """The files named, and all audio below the folders and in the containers named."""
    from patchbank.pipeline.manifest.data_set import is_data_set_file, read_data_set
    from patchbank.pipeline.manifest.folder import read_folder

    for path in audio:
        if path.is_dir():
            yield from (path / name for name in read_folder(path).paths)
        elif is_data_set_file(path):
            folder = path.parent
            yield from (folder / name for name in read_data_set(folder, [path.name]).paths)
        else:
            yield path


def write_rows(
    rows: Iterator[Row],
    classes: Sequence[str],
    file: TextIO | None,
    *,
    top: int,
    as_json: bool,
) -> None:
    """Prints each row's best classes, and writes all probabilities to `file` as CSV."""
    import csv
    import json

    table = None if file is None else csv.writer(file)
    if table is not None:
        table.writerow(["clip", "start_s", "end_s", *classes])
    for name, start_s, end_s, probabilities in rows:
        best = [int(index) for index in probabilities.argsort()[::-1][:top]]
        if table is not None:
            table.writerow([name, start_s, end_s, *(f"{p:.6f}" for p in probabilities)])
        if as_json:
            labels = {classes[index]: round(float(probabilities[index]), 6) for index in best}
            fact = {"clip": name, "start_s": start_s, "end_s": end_s, "labels": labels}
            print(json.dumps(fact))
        else:
            words = "  ".join(f"{classes[index]} {probabilities[index]:.2f}" for index in best)
            print(f"{name}  {start_s:.1f}-{end_s:.1f} s  {words}")
