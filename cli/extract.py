"""`patchbank extract`: clips and an encoder in, a sealed bank out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli.bars import clip_bar, count_bar, phase
from patchbank.cli.choices import Compute, DecodeIn, Pad, StoredDType
from patchbank.cli.encoder_options import FrontEndConstants, Preset, Weights, parse_constants
from patchbank.cli.extract_report import print_bank, print_plan, write_labels
from patchbank.cli.worker_options import Devices, Threads, WorkerCount

if TYPE_CHECKING:
    from patchbank.pipeline.extraction import Progress
    from patchbank.pipeline.job import ShardReport


def extract(
    clips: Annotated[
        Path,
        typer.Argument(
            metavar="CLIPS",
            help="CSV or Parquet table, folder of audio, or data set (tar, Parquet, Arrow).",
        ),
    ],
    encoder: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE.py", help="See `patchbank encoders`, or a file of your own."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The bank to make or to finish.")],
    weights: Weights = None,
    preset: Preset = None,
    frontend: FrontEndConstants = None,
    audio_root: Annotated[
        Path | None, typer.Option(help="What paths are relative to. [default: the table's folder]")
    ] = None,
    window_s: Annotated[float, typer.Option(min=0.01, help="Length of a clip, seconds.")] = 10.0,
    hop_s: Annotated[
        float | None, typer.Option(min=0.01, help="Step between clips. [default: window-s]")
    ] = None,
    pad: Annotated[Pad, typer.Option(help="What fills a short clip, at its end.")] = Pad.zero,
    layers: Annotated[str, typer.Option(help="last, all, or 1-based layers: 3,6,12.")] = "last",
    dtype: Annotated[StoredDType, typer.Option(help="Stored type.")] = StoredDType.float16,
    mask_padding: Annotated[
        bool, typer.Option("--mask-padding", help="Count only patches that hold audio.")
    ] = False,
    views: Annotated[
        int, typer.Option(min=0, help="Views to make of each training clip, with --augment.")
    ] = 0,
    augment: Annotated[
        list[str] | None,
        typer.Option(
            metavar="mixup|shift|gain",
            help="How views are made; several times for several, with parameters as in "
            "mixup:p=0.9,min_snr_db=2,max_snr_db=30,max_sources=3 shift:max_s=2 "
            "gain:min_db=-6,max_db=6.",
        ),
    ] = None,
    augment_seed: Annotated[
        int | None, typer.Option(min=0, help="What views are drawn from. [default: 0]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Clips encoded together. [default: 4; on a GPU 64, if they fit]"),
    ] = None,
    compute: Annotated[
        Compute | None,
        typer.Option(help="What to compute in. [default: bfloat16 on a GPU that has it]"),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the encoder (torch.compile).")
    ] = False,
    decode_in: Annotated[
        DecodeIn, typer.Option(help="processes for codecs that hold Python's lock.")
    ] = DecodeIn.threads,
    devices: Devices = None,
    workers: WorkerCount = None,
    threads: Threads = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler: its workers encode.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --dry-run: encode some clips, tell the hours.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time went, and what to fix next.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a frozen encoder over audio once and keep its patch tokens.

    The same line again finishes what an earlier one began.
    """
    from patchbank.cli.augment import parse_augment
    from patchbank.pipeline.environment import keep_freed_memory
    from patchbank.pipeline.extraction import ExtractionSettings, prepare
    from patchbank.pipeline.extraction import run as run_extraction
    from patchbank.pipeline.specs import WindowSpec

    if measure and not dry_run:
        raise typer.BadParameter("--measure goes with --dry-run")
    settings = ExtractionSettings(
        window=WindowSpec(window_s, hop_s or window_s, pad.value),
        layers=parse_layers(layers),
        stored_dtype=dtype.value,
        mask_padding=mask_padding,
        n_views=views,
        augment=parse_augment(augment or [], n_views=views, seed=augment_seed),
        device=device,
        batch_size=batch_size,
        compute_dtype=compute.value if compute else None,
        compiles=compile_,
        decode_in=decode_in.value,
        scheduler=scheduler,
        devices=devices,
        n_workers=workers,
        n_threads=threads,
        preset=preset,
        frontend=parse_constants(frontend),
    )
    keep_freed_memory()
    with count_bar("prepare", "recordings", vanishes=True) as headers:
        extraction = prepare(
            clips,
            encoder=encoder,
            out=out,
            weights=weights,
            audio_root=audio_root,
            settings=settings,
            progress=headers,
        )
    if dry_run:
        forecast = None
        if measure:
            from patchbank.pipeline.measure import measure as measure_clips

            with clip_bar("measure") as progress:
                forecast = measure_clips(extraction, progress=progress)
        print_plan(extraction, forecast, as_json=json_output)
        return
    reports: list[ShardReport] = []
    with clip_bar("extract") as progress:

        def watch(state: Progress) -> None:
            progress(state)
            if state.report is not None:
                reports.append(state.report)

        bank = run_extraction(extraction, progress=watch)
    found = None
    if profile:
        from patchbank.pipeline.profile import profile_of, write_profile

        found = profile_of(reports)
        if found.n_clips:
            write_profile(bank.path, found)
    with phase("write labels"):
        labels = write_labels(extraction.table, out)
    print_bank(bank, labels=labels, profile=found, as_json=json_output)


def parse_layers(text: str) -> str | tuple[int, ...]:
    """ "last", "all", or the numbers of a comma-separated list; exits with 2 for anything else."""
    if text in ("last", "all"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--layers takes last, all, or 3,6,12; found {text!r}") from None
