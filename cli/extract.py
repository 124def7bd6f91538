"""`patchbank extract`: clips and an encoder in, a sealed bank out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli.bars import clip_bar
from patchbank.cli.choices import Pad, StoredDType
from patchbank.cli.encoder_options import FrontEndConstants, Preset, Weights, parse_constants
from patchbank.cli.worker_options import Devices, Threads, WorkerCount
from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    import pyarrow as pa

    from patchbank.pipeline.bank import Bank
    from patchbank.pipeline.fitting import Extraction
    from patchbank.pipeline.manifest import ClipTable


MOST_FAILED_VIEWS = 5
"""That are told one by one where they failed for the same reason."""


def extract(
    clips: Annotated[
        Path, typer.Argument(metavar="CLIPS", help="CSV or Parquet table, or a folder of audio.")
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
    batch_size: Annotated[int | None, typer.Option(min=1, help="Clips encoded together.")] = None,
    devices: Devices = None,
    workers: WorkerCount = None,
    threads: Threads = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Address of a Dask scheduler: its workers encode.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a frozen encoder over audio once and keep its patch tokens.

    The same line again finishes what an earlier one began.
    """
    from patchbank.cli.augment import parse_augment
    from patchbank.pipeline.extraction import ExtractionSettings, prepare
    from patchbank.pipeline.extraction import run as run_extraction
    from patchbank.pipeline.specs import WindowSpec

    settings = ExtractionSettings(
        window=WindowSpec(window_s, hop_s or window_s, pad.value),
        layers=parse_layers(layers),
        stored_dtype=dtype.value,
        mask_padding=mask_padding,
        n_views=views,
        augment=parse_augment(augment or [], n_views=views, seed=augment_seed),
        device=device,
        batch_size=batch_size,
        scheduler=scheduler,
        devices=devices,
        n_workers=workers,
        n_threads=threads,
        preset=preset,
        frontend=parse_constants(frontend),
    )
    extraction = prepare(
        clips, encoder=encoder, out=out, weights=weights, audio_root=audio_root, settings=settings
    )
    if dry_run:
        print_plan(extraction, as_json=json_output)
        return
    with clip_bar("extract") as progress:
        bank = run_extraction(extraction, progress=progress)
    labels = write_labels(extraction.table, out)
    print_bank(bank, labels=labels, as_json=json_output)


def parse_layers(text: str) -> str | tuple[int, ...]:
    """ "last", "all", or the numbers of a comma-separated list; exits with 2 for anything else."""
    if text in ("last", "all"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--layers takes last, all, or 3,6,12; found {text!r}") from None


def print_plan(extraction: Extraction, *, as_json: bool) -> None:
    """What an extraction would do, on stdout."""
    import json

    from patchbank.pipeline.bank.view_columns import count_views
    from patchbank.pipeline.specs import human_bytes

    plan = extraction.plan
    facts = {
        "clips": plan.schema.n_clips,
        "views": count_views(extraction.clips),
        "clips_missing": sum(len(plan.schema.rows_of(shard)) for shard in plan.missing_shards),
        "shards": plan.schema.n_shards,
        "shards_missing": len(plan.missing_shards),
        "bytes": plan.total_bytes,
        "bytes_missing": plan.missing_bytes,
        "bytes_free": plan.free_bytes,
        "layers": {
            spec.layer: {
                "grid": [plan.schema.grids[spec.layer].time, plan.schema.grids[spec.layer].freq],
                "dim": spec.dim,
                "prefix": spec.n_prefix,
            }
            for spec in plan.schema.layers
        },
    }
    plan.check_space()
    if as_json:
        print(json.dumps(facts))
        return
    views = f", {facts['views']} of them views" if facts["views"] else ""
    print(f"clips    {facts['clips']}{views}, {facts['clips_missing']} to encode")
    print(f"shards   {facts['shards']}, {facts['shards_missing']} still to do")
    for spec in plan.schema.layers:
        grid = plan.schema.grids[spec.layer]
        print(f"layer {spec.layer:<2} {grid.time} x {grid.freq} patches of {spec.dim}")
    print(f"size     {human_bytes(plan.total_bytes)}, {human_bytes(plan.missing_bytes)} to write")
    print(f"free     {human_bytes(plan.free_bytes)} at {extraction.bank.parent}")


def write_labels(table: ClipTable, out: Path) -> Path | None:
    """The labels of a folder of class folders, as X.labels.csv beside X.bank.

    A file that is there already may have been corrected by hand: it is left alone.
    """
    if table.labels is None:
        return None
    from pyarrow import csv

    path = out.with_name(f"{out.stem}.labels.csv")
    if not path.exists():
        draft = path.with_name(f".{path.name}.draft")
        csv.write_csv(table.labels, draft)
        draft.replace(path)
    return path


def failures(clips: pa.Table) -> Iterator[str]:
    """A line for each clip that failed, by name, and for each view; of more than
    `MOST_FAILED_VIEWS` views that failed for one reason, a line for all."""
    rows = clips.select(["clip_id", "view", "status", "reason"]).to_pylist()
    failed = [row for row in rows if row["status"] == 2]
    alike = Counter(row["reason"] for row in failed if row["view"])
    told = set()
    for row in failed:
        reason, name = row["reason"], row["clip_id"]
        if not row["view"]:
            yield f"failed: {name}: {reason}"
        elif alike[reason] <= MOST_FAILED_VIEWS:
            yield f"failed: view {row['view']} of {name}: {reason}"
        elif reason not in told:
            told.add(reason)
            yield f"failed: {alike[reason]} views, first view {row['view']} of {name}: {reason}"


def print_bank(bank: Bank, *, labels: Path | None, as_json: bool) -> None:
    """What a bank holds, on stdout; failed clips on stderr."""
    import json

    n_failed = int((bank.status == 2).sum())
    if n_failed == bank.n_clips:
        reason = bank.clips["reason"][0].as_py()
        raise PatchbankError(
            f"all {n_failed} clips of {bank.path} failed (first: {reason}); check the audio and "
            "--audio-root, then extract to another --out"
        )
    if as_json:
        facts = {"bank": str(bank.path), "fingerprint": bank.fingerprint, "clips": bank.n_clips}
        print(json.dumps(facts | {"failed": n_failed, "labels": str(labels) if labels else None}))
        return
    for line in failures(bank.clips):
        print(line, file=sys.stderr)
    print(f"{bank.path}: {bank.n_clips} clips, {n_failed} failed, {bank.fingerprint[:12]}")
    if labels:
        print(f"{labels}: labels from the folder names")
