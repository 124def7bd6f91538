"""`train-probe` without its command line: a bank, labels and probe names in, a RUN folder out."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.errors import TrialError
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import TokenSource
from patchbank.probing.entries import Entry, on_layers
from patchbank.probing.evaluation import Fold
from patchbank.probing.groups import read_groups
from patchbank.probing.job import Job
from patchbank.probing.labels import LabelSet, TaskKind, read_labels
from patchbank.probing.leakage import check_leakage
from patchbank.probing.mean_source import MeanSource
from patchbank.probing.probes.probe_files import file_sha256
from patchbank.probing.protocol import train_job
from patchbank.probing.run_files import FinishedRun, TokenBank, rows_of, write_run
from patchbank.probing.run_identity import DataChoice, run_identity
from patchbank.probing.run_state import open_run
from patchbank.probing.settings import TrainSettings
from patchbank.probing.splits import Split, read_splits
from patchbank.probing.study import Task
from patchbank.probing.tiers import Tier
from patchbank.probing.training import OnProgress


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
    group: str | None = None,
    allow_leakage: bool = False,
    tier: Tier = "auto",
    overwrite: bool = False,
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

    Called again after it was stopped, at any moment, it goes on from there, to the same results;
    where all is done it only reads them. A folder with another run raises `BankMismatch`, unless
    it is to `overwrite` it.

    `source` gives the tokens of layers; None reads the bank itself, from `tier`, and tells `say`
    which one that is. `use_views=False` trains on clean clips alone; views that would carry a
    validation or test clip into training are left out anyway, and `say` is told how many. `group`
    is the column whose clips are drawn together by the bootstrap; none of them, no recording and no
    sound may lie in two parts of a split unless `allow_leakage`. `command` is what was typed, which
    each probe's description keeps. Raises `ManifestError` for wrong tables, `TrialError`.
    """
    settings, say = settings or TrainSettings(), say or (lambda line: None)
    device = settings.torch_device
    chosen = [(layer,)] if isinstance(layer, int) else layer or [(max(bank.layers),)]
    entries = on_layers([Entry.of(probe) for probe in probes], chosen)
    layers = sorted({one for entry in entries for one in _checked_layers(bank, entry.layers)})
    plugins = {entry.file: file_sha256(entry.file) for entry in entries if entry.file}
    tables = _named([labels] if isinstance(labels, Path) else list(labels))
    data = DataChoice(
        splits_path,
        folds,
        None if classes is None else tuple(classes),
        task,
        allow_unlabelled,
        use_views,
        group,
        allow_leakage,
    )
    folders = {name: out / name for name in tables}
    for folder in folders.values():
        _check_writable(folder)
    sets = {name: _read_labels(table, bank, data) for name, table in tables.items()}
    splits = {name: _splits(name, bank, one, data) for name, one in sets.items()}
    groups = read_groups(bank.clips, group)
    leakage = {
        name: check_leakage(bank.clips, found, groups, allow=allow_leakage)
        for name, found in splits.items()
    }
    identity = run_identity(bank, tables, entries, settings, plugins, data)
    with open_run(out, identity, overwrite=overwrite) as state:
        if all((folder / "results.json").is_file() for folder in folders.values()):
            state.forget_all()
            say(f"nothing is left to do: {out} has the results of this very run")
            return _returned({name: _read_results(one) for name, one in folders.items()})
        for name, found in splits.items():
            for line in filter(None, map(views_left_out, found)):
                say(f"{name}: {line}" if name else line)
        tokens = _open_source(bank, layers, source, splits.values(), device, tier, say)
        # Every fold says the same of its probes.
        job = Job(tokens, settings, progress, functools.cache(say), state)
        folds_of = _train_folds(job, sets, splits, entries)
        runs = {
            name: FinishedRun(
                bank,
                one,
                tuple(folds_of[name]),
                settings,
                groups,
                leakage[name],
                plugins,
                state,
                tuple(command),
            )
            for name, one in sets.items()
        }
        results = {name: write_run(run, folders[name]) for name, run in runs.items()}
        state.forget_all()
    return _returned(results)


def _returned(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Those of one label table themselves, those of several by name."""
    return dict(results.get("", results))


def _read_results(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TrialError(
            f"{folder / 'results.json'} is damaged ({error!r}); remove it and train again"
        ) from error


def _train_folds(
    job: Job,
    sets: Mapping[str, LabelSet],
    splits: Mapping[str, Sequence[Split]],
    entries: Sequence[Entry],
) -> dict[str, list[Fold]]:
    """All folds of each label set, one after the other."""
    folds_of: dict[str, list[Fold]] = {name: [] for name in sets}
    for fold in _together(splits):
        tasks = [
            Task(one.targets, split, one.multi_label, name)
            for (name, one), split in zip(sets.items(), fold, strict=True)
        ]
        for task, outcomes in zip(tasks, train_job(job, tasks, entries), strict=True):
            folds_of[task.name].append(Fold(task.split, outcomes))
    return folds_of


def _read_labels(table: Path, bank: TokenBank, data: DataChoice) -> LabelSet:
    return read_labels(
        table,
        bank.clips,
        classes=data.classes,
        task=data.task,
        allow_unlabelled=data.allow_unlabelled,
        only_clean=not data.use_views,
    )


def _splits(name: str, bank: TokenBank, labels: LabelSet, data: DataChoice) -> tuple[Split, ...]:
    try:
        return read_splits(
            bank.clips, usable=labels.known, splits_path=data.splits_path, folds=data.folds
        )
    except TrialError as error:
        raise TrialError(f"labels of {name}: {error}" if name else str(error)) from error


def _named(tables: Sequence[Path]) -> dict[str, Path]:
    """Each label table by the name of its folder: none for one alone."""
    if len(tables) == 1:
        return {"": tables[0]}
    names = [table.stem for table in tables]
    if len(set(names)) < len(names):
        raise TrialError(
            f"found label tables {', '.join(map(str, tables))}, expected different file names: "
            "each names a folder of results"
        )
    return dict(zip(names, tables, strict=True))


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
    device: torch.device,
    tier: Tier,
    say: Callable[[str], None],
) -> TokenSource:
    if source is not None:
        return source(layers)
    rows = rows_of([split for found in splits for split in found])
    opened = cast(Bank, bank)
    if not opened.schema.holds_tokens:
        say("tokens are not in the bank: probes read the stored means")
        return MeanSource(opened, layers, device=device, rows=rows)
    tokens = BankSource(opened, list(layers), tier=tier, device=device, rows=rows)
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
