"""`patchbank bank merge` and `bank convert`: banks made from other banks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli.bars import count_bar, phase, progress_lines
from patchbank.cli.choices import StoredDType
from patchbank.cli.extract import parse_layers
from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    import numpy as np

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
    """Make another bank of a bank: other type, fewer layers or clips, no holes."""
    from patchbank.pipeline.bank import open_bank

    with phase("open"):
        source = open_bank(bank)
        rows = chosen_rows(source, split or [], clips)
    if measure is not None and archive:
        raise typer.BadParameter("--measure trains on the new bank, which an archive is not for")
    if measure is not None and rows is not None:
        raise typer.BadParameter("--measure compares banks of the same clips: no --split, --clips")
    if measure is not None:
        with phase("read labels"):
            check_measurable(
                source, measure, splits=splits, folds=folds, allow_leakage=allow_leakage
            )
    with count_bar("convert", "shards") as progress:
        made = converted(
            source,
            out,
            dtype=dtype,
            layers=chosen_layers(source, layers),
            rows=rows,
            compact=compact,
            archive=archive,
            progress=progress,
        )
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


def converted(
    source: Bank,
    out: Path,
    *,
    dtype: StoredDType | None,
    layers: Sequence[int],
    rows: np.ndarray | None,
    compact: bool,
    archive: bool,
    progress: Callable[[int, int], None],
) -> Bank:
    """The bank that `convert` makes, by links where no token has to be written."""
    same_type = dtype is None or dtype.value == source.schema.stored_dtype
    same_storage = archive == source.schema.is_archive
    if same_type and same_storage and rows is None and not compact:
        if list(layers) == list(source.layers):
            raise typer.BadParameter(
                "nothing to convert; give --dtype, --layers, --split, --clips, --compact or "
                "--archive"
            )
        from patchbank.pipeline.bank.join import join_banks

        return join_banks([source], out, layers=layers, progress=progress)
    from patchbank.pipeline.rebuild import rebuild_bank

    return rebuild_bank(
        [source],
        out,
        dtype=None if dtype is None else dtype.value,
        layers=layers,
        rows=None if rows is None else [rows],
        storage="blosc" if archive else "aligned",
        progress=progress,
    )


def chosen_layers(bank: Bank, text: str) -> list[int]:
    """The layers that the option names; `BankError` where the bank lacks one."""
    layers = parse_layers(text)
    if layers == "all":
        return list(bank.layers)
    if layers == "last":
        return [bank.layers[-1]]
    return sorted({bank.resolve_layer(int(layer)) for layer in layers})


def chosen_rows(bank: Bank, splits: Sequence[str], clips: Path | None) -> np.ndarray | None:
    """The rows that the options leave, in order; None where they leave all."""
    import numpy as np

    if not splits and clips is None:
        return None
    keep = np.isin(bank.status, (1, 2))
    if splits:
        if "split" not in bank.clips.column_names:
            raise PatchbankError(f"{bank.path} has no split column; name clips with --clips")
        there = bank.clips["split"].to_pylist()
        if unknown := sorted(set(splits) - set(there)):
            found = ", ".join(sorted({str(name) for name in there if name is not None}))
            raise PatchbankError(f"no split {unknown[0]!r} in {bank.path}; it has {found}")
        keep &= np.array([name in splits for name in there])
    if clips is not None:
        keep &= _named(bank, clips)
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise PatchbankError(f"no clip of {bank.path} is left; correct --split or --clips")
    return rows


def _named(bank: Bank, clips: Path) -> np.ndarray:
    import numpy as np

    from patchbank.pipeline.errors import ManifestError
    from patchbank.probing.tables import read_table, require_columns

    table = read_table(clips)
    key = "clip_id" if "clip_id" in table.columns else "path"
    require_columns(table, [key], why="clip_id or path: which clip")
    names = bank.clips[key].to_pylist()
    known = set(names)
    problems = [
        table.problem(row, key, f"no clip of {bank.path} has {key} {cell!r}")
        for row, cell in enumerate(table.columns[key])
        if cell not in known
    ]
    if problems:
        raise ManifestError(problems)
    if "view" not in table.columns:
        wanted = set(table.columns[key])
        return np.fromiter((name in wanted for name in names), bool, len(names))
    keys = list(zip(names, map(str, bank.clips["view"].to_pylist()), strict=True))
    asked = list(zip(table.columns[key], table.columns["view"], strict=True))
    there, wanted_views = set(keys), set(asked)
    problems = [
        table.problem(row, "view", f"no view {view!r} of {name!r} in {bank.path}")
        for row, (name, view) in enumerate(asked)
        if (name, view) not in there
    ]
    if problems:
        raise ManifestError(problems)
    return np.fromiter((one in wanted_views for one in keys), bool, len(keys))


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
    from patchbank.probing.measure import measure_change, read_measurements, write_measurement
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
