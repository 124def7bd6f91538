"""`patchbank bank merge` and `bank convert`: banks made from other banks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli.bars import count_bar, phase, progress_lines
from patchbank.cli.choices import StoredDType
from patchbank.cli.extract import parse_layers

if TYPE_CHECKING:
    from patchbank.pipeline.bank import Bank

OutPath = Annotated[Path, typer.Option("--out", help="The bank to make or to finish.")]


def merge(
    banks: Annotated[list[Path], typer.Argument(metavar="BANK...", help="Two banks or more.")],
    out: OutPath,
    compact: Annotated[
        bool, typer.Option("--compact", help="Copy rows into new shards, without holes.")
    ] = False,
) -> None:
    """Join banks of one recipe. Tokens are linked, not written again, where shards allow it."""
    from patchbank.pipeline.bank import open_bank

    if len(banks) < 2:
        raise typer.BadParameter("name at least two banks")
    with phase("open"):
        opened = [open_bank(path) for path in banks]
    with count_bar("merge", "shards") as progress:
        if compact or len({bank.schema.rows_per_shard for bank in opened}) > 1:
            from patchbank.pipeline.rebuild import rebuild_bank

            made = rebuild_bank(opened, out, progress=progress)
        else:
            from patchbank.pipeline.bank.join import join_banks

            made = join_banks(opened, out, progress=progress)
    print_made(made)


def convert(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="A sealed bank.")],
    out: OutPath,
    dtype: Annotated[StoredDType | None, typer.Option(help="Another stored type.")] = None,
    layers: Annotated[str, typer.Option(help="all, last, or 1-based layers: 3,6,12.")] = "all",
    split: Annotated[
        list[str] | None, typer.Option(help="Only clips of this split; repeat it for several.")
    ] = None,
    clips: Annotated[
        Path | None,
        typer.Option(help="Only these: a table with clip_id or path, and view if not all views."),
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Leave out the holes of a bank that has grown.")
    ] = False,
    archive: Annotated[
        bool,
        typer.Option("--archive", help="Compress for cold storage; convert again to train."),
    ] = False,
    pooled_only: Annotated[
        bool,
        typer.Option("--pooled-only", help="Leave tokens out; keep their mean, max and min."),
    ] = False,
    measure: Annotated[
        Path | None,
        typer.Option(help="Labels: train probes on both banks, note what the type changes."),
    ] = None,
    splits: Annotated[Path | None, typer.Option(help="For --measure: table of splits.")] = None,
    folds: Annotated[str | None, typer.Option(help="For --measure: column of folds.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="For --measure: runs of each probe.")] = 5,
    allow_leakage: Annotated[
        bool,
        typer.Option("--allow-leakage", help="For --measure: although splits share recordings."),
    ] = False,
) -> None:
    """Make another bank of a bank: other type, fewer layers or clips, no holes, no tokens."""
    from patchbank.pipeline.bank import open_bank
    from patchbank.pipeline.selection import make_selection, select

    chosen_layers = parse_layers(layers)
    with phase("open"):
        source = open_bank(bank)
        chosen = select(
            source,
            layers=chosen_layers,
            splits=split or [],
            clips=clips,
            dtype=None if dtype is None else dtype.value,
            pooled_only=pooled_only,
            compact=compact,
            archive=archive,
        )
    if measure is not None and chosen.storage != "aligned":
        raise typer.BadParameter("--measure trains on the new bank, which an archive is not for")
    if chosen.is_all_of(source):
        raise typer.BadParameter(
            "nothing to convert; give --dtype, --layers, --split, --clips, --pooled-only, "
            "--compact or --archive"
        )
    if measure is not None and chosen.rows is not None:
        raise typer.BadParameter("--measure compares banks of the same clips: no --split, --clips")
    if measure is not None:
        with phase("read labels"):
            check_measurable(
                source, measure, splits=splits, folds=folds, allow_leakage=allow_leakage
            )
    with count_bar("convert", "shards") as progress:
        made = make_selection(source, out, chosen, progress=progress)
    print_made(made)
    if measure is not None:
        note_change(
            source,
            made,
            measure,
            splits=splits,
            folds=folds,
            seeds=seeds,
            allow_leakage=allow_leakage,
        )


def check_measurable(
    source: Bank,
    labels: Path,
    *,
    splits: Path | None,
    folds: str | None,
    allow_leakage: bool = False,
) -> None:
    """Reads labels and splits, so that a mistake in them shows before hours of conversion."""
    from patchbank.probing.groups import read_groups
    from patchbank.probing.labels import read_labels
    from patchbank.probing.leakage import check_leakage
    from patchbank.probing.splits import read_splits

    known = read_labels(labels, source.clips).known
    found = read_splits(source.clips, usable=known, splits_path=splits, folds=folds)
    check_leakage(source.clips, found, read_groups(source.clips), allow=allow_leakage)


def note_change(
    source: Bank,
    made: Bank,
    labels: Path,
    *,
    splits: Path | None,
    folds: str | None,
    seeds: int,
    allow_leakage: bool = False,
) -> None:
    """Trains probes on both banks, prints what changes and keeps it in the new bank's notes."""
    from patchbank.cli.bank_facts import readable_measurements
    from patchbank.probing.measure import measure_change
    from patchbank.probing.measurements import read_measurements, write_measurement
    from patchbank.probing.settings import TrainSettings

    with progress_lines() as progress:
        facts = measure_change(
            source,
            made,
            labels,
            settings=TrainSettings(n_seeds=seeds),
            splits_path=splits,
            folds=folds,
            allow_leakage=allow_leakage,
            progress=progress,
        )
    write_measurement(made, facts)
    for line in readable_measurements(read_measurements(made)):
        print(line)


def print_made(bank: Bank) -> None:
    """The new bank, on stdout."""
    from patchbank.pipeline.specs import human_bytes

    n_bytes = human_bytes(bank.seal.bank_bytes)
    print(f"{bank.path}: {bank.n_clips} clips, {n_bytes}, {bank.fingerprint[:12]}")
