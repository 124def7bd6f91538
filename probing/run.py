"""`train-probe` without its command line: a bank, labels and probe names in, a RUN folder out."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.errors import TrialError
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import TokenSource
from patchbank.probing.entries import Entry, on_layers
from patchbank.probing.evaluation import Fold
from patchbank.probing.labels import LabelSet, TaskKind, read_labels
from patchbank.probing.passes import OnProgress
from patchbank.probing.probes.probe_files import file_sha256
from patchbank.probing.protocol import train_tasks
from patchbank.probing.run_files import FinishedRun, TokenBank, rows_of, write_run
from patchbank.probing.settings import TrainSettings
from patchbank.probing.splits import Split, read_splits
from patchbank.probing.study import Task
from patchbank.probing.tiers import Tier


def run_training(
    bank: TokenBank,
    labels: Path | Sequence[Path],
    out: Path,
    *,
    probes: Sequence[str | Entry],
    settings: TrainSettings | None = None,
    layer: int | Sequence[tuple[int, ...]] | None = None,
    splits_path: Path | None = None,
    folds: str | None = None,
    classes: Sequence[str] | None = None,
    task: TaskKind = "auto",
    allow_unlabelled: bool = False,
    use_views: bool = True,
    tier: Tier = "auto",
    source: Callable[[Sequence[int]], TokenSource] | None = None,
    progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains `probes` and returns what results.json holds.

    `layer` is one (the last by default), or several choices, each of one layer or of some that are
    mixed; every probe is trained on every choice. Leaves in `out` one folder a probe and
    results.json, which is written last: where it exists, the run is complete. Several label tables
    are trained from the same batches, and each has such a folder, named after the table, below
    `out`; the results are then returned by these names.

    `source` gives the tokens of layers; None reads the bank itself, from `tier`, and tells `say`
    which one that is. `use_views=False` trains on clean clips alone; views that would carry a
    validation or test clip into training are left out anyway, and `say` is told how many.
    `command` is what was typed, which each probe's description keeps. Raises `ManifestError` for
    wrong tables, `TrialError`.
    """
    settings, say = settings or TrainSettings(), say or (lambda line: None)
    say_once = functools.cache(say)  # every fold says the same of its probes
    chosen = [(layer,)] if isinstance(layer, int) else layer or [(max(bank.layers),)]
    entries = on_layers([Entry.of(probe) for probe in probes], chosen)
    plugins = {entry.file: file_sha256(entry.file) for entry in entries if entry.file}
    layers = sorted({one for entry in entries for one in _checked_layers(bank, entry.layers)})
    tables = [labels] if isinstance(labels, Path) else list(labels)
    names = _names(tables)
    folders = {name: out / name for name in names}
    for folder in folders.values():
        _check_writable(folder)
    sets = {
        name: read_labels(
            table,
            bank.clips,
            classes=classes,
            task=task,
            allow_unlabelled=allow_unlabelled,
            only_clean=not use_views,
        )
        for name, table in zip(names, tables, strict=True)
    }
    splits = {name: _splits(name, bank, one, splits_path, folds) for name, one in sets.items()}
    for name, found in splits.items():
        for line in filter(None, map(views_left_out, found)):
            say(f"{name}: {line}" if name else line)
    tokens = _open_source(bank, layers, source, splits.values(), settings, tier, say)
    folds_of: dict[str, list[Fold]] = {name: [] for name in names}
    for fold in _together(splits):
        tasks = [
            Task(one.targets, split, one.multi_label, name)
            for (name, one), split in zip(sets.items(), fold, strict=True)
        ]
        trained = train_tasks(
            tokens, tasks, probes=entries, settings=settings, progress=progress, say=say_once
        )
        for task_, outcomes in zip(tasks, trained, strict=True):
            folds_of[task_.name].append(Fold(task_.split, outcomes))
    results = {
        name: write_run(
            FinishedRun(bank, one, tuple(folds_of[name]), settings, plugins, tuple(command)),
            folders[name],
        )
        for name, one in sets.items()
    }
    if len(tables) == 1:
        return results[""]
    # What an earlier run of one table left there would stand for this one.
    (out / "results.json").unlink(missing_ok=True)
    return results


def _splits(
    name: str, bank: TokenBank, labels: LabelSet, splits_path: Path | None, folds: str | None
) -> tuple[Split, ...]:
    try:
        return read_splits(bank.clips, usable=labels.known, splits_path=splits_path, folds=folds)
    except TrialError as error:
        raise TrialError(f"labels of {name}: {error}" if name else str(error)) from error


def _names(tables: Sequence[Path]) -> list[str]:
    """The folder of each label table: none for one alone."""
    if len(tables) == 1:
        return [""]
    names = [table.stem for table in tables]
    if len(set(names)) < len(names):
        raise TrialError(
            f"found label tables {', '.join(map(str, tables))}, expected different file names: "
            "each names a folder of results"
        )
    return names


def _together(splits: Mapping[str, Sequence[Split]]) -> list[tuple[Split, ...]]:
    """The splits of all label sets, fold by fold; `TrialError` where they have other folds."""
    first, *others = splits.items()
    for name, found in others:
        if [split.name for split in found] != [split.name for split in first[1]]:
            raise TrialError(
                f"found other folds for the labels of {name} than for those of {first[0]}, "
                "expected each fold to have clips of all label tables; train them one by one"
            )
    return list(zip(*splits.values(), strict=True))


def _open_source(
    bank: TokenBank,
    layers: Sequence[int],
    source: Callable[[Sequence[int]], TokenSource] | None,
    splits: Iterable[Sequence[Split]],
    settings: TrainSettings,
    tier: Tier,
    say: Callable[[str], None],
) -> TokenSource:
    if source is not None:
        return source(layers)
    rows = rows_of([split for found in splits for split in found])
    tokens = BankSource(
        cast(Bank, bank), list(layers), tier=tier, device=settings.torch_device, rows=rows
    )
    say(f"tokens from {tokens.choice}")
    return tokens


def views_left_out(split: Split) -> str | None:
    """How many views a split leaves out of training, and why; None where it takes all."""
    if not split.n_views_left_out:
        return None
    where = "" if split.name == "split" else f"{split.name}: "
    return (
        f"{where}{split.n_views_left_out} of {split.n_views} views are left out: what is mixed "
        "into them lies in another split"
    )


def _check_writable(out: Path) -> None:
    """Hours of training must not end at a folder that cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise TrialError(
            f"cannot write results to {out} ({error.strerror}); choose another --out"
        ) from error


def _checked_layers(bank: TokenBank, layers: tuple[int, ...]) -> tuple[int, ...]:
    for layer in layers:
        if layer not in bank.layers:
            found = ", ".join(map(str, bank.layers))
            raise TrialError(f"found no layer {layer} in the bank, expected one of {found}")
    return layers
