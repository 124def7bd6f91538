"""`train-probe` without its command line: a bank, labels and probe names in, a RUN folder out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import pyarrow as pa

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.errors import TrialError
from patchbank.probing.artefact import ProbeArtefact, save_probe
from patchbank.probing.atomic import write_json
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import TokenSource
from patchbank.probing.evaluation import Fold, left_out_rows, resamples_of, score_rows
from patchbank.probing.labels import LabelSet, Task, read_labels
from patchbank.probing.metrics import primary_metric
from patchbank.probing.passes import OnProgress
from patchbank.probing.plan import Rows
from patchbank.probing.probes.base import n_parameters
from patchbank.probing.protocol import Outcome, train
from patchbank.probing.results import environment, write_predictions
from patchbank.probing.settings import TrainSettings
from patchbank.probing.splits import Split, is_clean, read_splits
from patchbank.probing.tiers import Tier

FORMAT = 1


@runtime_checkable
class TokenBank(Protocol):
    """What training needs of a bank."""

    @property
    def clips(self) -> pa.Table: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def encoder_id(self) -> str: ...
    @property
    def recipe_id(self) -> str: ...
    @property
    def card(self) -> Mapping[str, Any]: ...
    @property
    def layers(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class _Run:
    """Everything that the files of a RUN folder are written from."""

    bank: TokenBank
    layer: int
    source: TokenSource
    labels: LabelSet
    folds: tuple[Fold, ...]
    settings: TrainSettings


def run_training(
    bank: TokenBank,
    labels_path: Path,
    out: Path,
    *,
    probes: Sequence[str],
    settings: TrainSettings | None = None,
    layer: int | None = None,
    splits_path: Path | None = None,
    folds: str | None = None,
    classes: Sequence[str] | None = None,
    task: Task = "auto",
    allow_unlabelled: bool = False,
    use_views: bool = True,
    tier: Tier = "auto",
    source: Callable[[int], TokenSource] | None = None,
    progress: OnProgress | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Trains `probes` on one layer (the last by default) and returns what results.json holds.

    Leaves in `out` one folder a probe and results.json, which is written last: where it exists,
    the run is complete. `source` gives the tokens of a layer; None reads the bank itself, from
    `tier`, and tells `say` which one that is. `use_views=False` trains on clean clips alone; views
    that would carry a validation or test clip into training are left out anyway, and `say` is told
    how many. Raises `ManifestError` for wrong tables, `TrialError`.
    """
    settings = settings or TrainSettings()
    layer = _checked_layer(bank, layer)
    _check_writable(out)
    labels = read_labels(
        labels_path,
        bank.clips,
        classes=classes,
        task=task,
        allow_unlabelled=allow_unlabelled,
        only_clean=not use_views,
    )
    splits = read_splits(bank.clips, usable=labels.known, splits_path=splits_path, folds=folds)
    if say is not None:
        for line in filter(None, map(views_left_out, splits)):
            say(line)
    if source is not None:
        tokens = source(layer)
    else:
        tokens = BankSource(
            cast(Bank, bank),
            layer,
            tier=tier,
            device=settings.torch_device,
            rows=_rows_of(splits),
        )
        if say is not None:
            say(f"tokens from {tokens.choice}")
    trained = []
    for split in splits:
        outcomes = train(
            tokens,
            labels.targets,
            split,
            probes=probes,
            multi_label=labels.multi_label,
            settings=settings,
            progress=progress,
        )
        trained.append(Fold(split, outcomes))
    return _write(_Run(bank, layer, tokens, labels, tuple(trained), settings), out)


def views_left_out(split: Split) -> str | None:
    """How many views a split leaves out of training, and why; None where it takes all."""
    if not split.n_views_left_out:
        return None
    where = "" if split.name == "split" else f"{split.name}: "
    return (
        f"{where}{split.n_views_left_out} of {split.n_views} views are left out: what is mixed "
        "into them lies in another split"
    )


def _rows_of(splits: Sequence[Split]) -> Rows:
    """All rows that training or judging will read."""
    parts = [part for split in splits for part in (split.train, split.valid, split.test)]
    return np.unique(np.concatenate(parts))


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


def _checked_layer(bank: TokenBank, layer: int | None) -> int:
    if layer is None:
        return max(bank.layers)
    if layer not in bank.layers:
        found = ", ".join(map(str, bank.layers))
        raise TrialError(f"found no layer {layer} in the bank, expected one of {found}")
    return layer


def _write(run: _Run, out: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    clip_ids = run.bank.clips.column("clip_id").to_pylist()
    for index, outcome in enumerate(run.folds[0].outcomes):
        folder = out / outcome.name
        write_predictions(
            folder / "predictions-test.parquet",
            run.folds,
            index,
            clip_ids=clip_ids,
            classes=run.labels.classes,
            multi_label=run.labels.multi_label,
        )
        save_probe(folder, _artefact(run, index))
    results = _results(run)
    write_json(out / "results.json", results)
    return results


def _best_fold(run: _Run, index: int) -> int:
    """The fold whose best seed validation data prefer."""
    return int(np.argmax([max(fold.outcomes[index].valid_values) for fold in run.folds]))


def _artefact(run: _Run, index: int) -> ProbeArtefact:
    """The probe of the seed (and fold) with the best validation score."""
    fold = run.folds[_best_fold(run, index)]
    outcome = fold.outcomes[index]
    card = run.bank.card
    return ProbeArtefact(
        probe=outcome.name,
        options=outcome.probe.options,
        classes=run.labels.classes,
        multi_label=run.labels.multi_label,
        dim=outcome.probe.shape.dim,
        n_prefix=outcome.probe.shape.n_prefix,
        weights=outcome.weights[outcome.best_seed],
        layer=run.layer,
        encoder_id=run.bank.encoder_id,
        encoder=dict(card.get("encoder", {})),
        window=dict(card.get("window", {})),
        tokens={key: card[key] for key in ("stored_dtype", "mask_padding") if key in card},
        training={
            "bank": run.bank.fingerprint,
            "recipe_id": run.bank.recipe_id,
            "fold": fold.split.name,
            **asdict(outcome.trials[outcome.best_seed]),
            "n_epochs": run.settings.n_epochs,
            "valid_score": outcome.valid_values[outcome.best_seed],
        },
    )


def _results(run: _Run) -> dict[str, Any]:
    labels, folds, settings = run.labels, run.folds, run.settings
    status = run.bank.clips.column("status").to_numpy()
    clean = is_clean(run.bank.clips)
    return {
        "format": FORMAT,
        "bank": run.bank.fingerprint,
        "encoder_id": run.bank.encoder_id,
        "recipe_id": run.bank.recipe_id,
        "layer": run.layer,
        "task": "multi-label" if labels.multi_label else "multi-class",
        "primary_metric": primary_metric(multi_label=labels.multi_label),
        "std_over": "seeds" if len(folds) == 1 else "folds",
        "scores": score_rows(
            folds,
            labels.targets,
            multi_label=labels.multi_label,
            n_resamples=settings.n_resamples,
        ),
        "left_out": left_out_rows(
            folds, labels.targets, labels.classes, multi_label=labels.multi_label
        ),
        "n_resamples": resamples_of(folds[0].outcomes[0].test_scores, settings.n_resamples),
        "n_failed_clips": int(((status == 2) & clean).sum()),
        "n_failed_views": int(((status == 2) & ~clean).sum()),
        "n_unlabelled_clips": labels.n_unlabelled,
        "folds": [
            _fold_sizes(fold.split, np.flatnonzero(labels.known & (status == 1) & clean))
            for fold in folds
        ],
        "classes": list(labels.classes),
        "probes": dict(_probe_facts(run, index) for index in range(len(folds[0].outcomes))),
        "settings": asdict(settings),
        "environment": environment(settings.torch_device),
    }


def _fold_sizes(split: Split, usable: Rows) -> dict[str, Any]:
    """Rows in each part, usable clean clips that are in none, and what became of the views."""
    return {
        "name": split.name,
        "train": len(split.train),
        "valid": len(split.valid),
        "test": len(split.test),
        "unused": len(np.setdiff1d(usable, _rows_of([split]))),
        "views": split.n_views,
        "views_left_out": split.n_views_left_out,
    }


def _probe_facts(run: _Run, index: int) -> tuple[str, dict[str, Any]]:
    """Name and hyper-parameters of one probe, and what the search saw in each fold."""
    outcome = run.folds[0].outcomes[index]
    return outcome.name, {
        "options": outcome.probe.options,
        "n_parameters": n_parameters(outcome.probe),
        "saved_fold": run.folds[_best_fold(run, index)].split.name,
        "search": [_search_facts(fold, index) for fold in run.folds],
    }


def _search_facts(fold: Fold, index: int) -> dict[str, Any]:
    outcome: Outcome = fold.outcomes[index]
    return {
        "fold": fold.split.name,
        "learning_rate": outcome.trials[0].learning_rate,
        "best_seed": outcome.trials[outcome.best_seed].seed,
        "candidates": [
            {
                "learning_rate": candidate.learning_rate,
                "score": None if candidate.score == float("-inf") else candidate.score,
                "diverged": candidate.score == float("-inf"),
            }
            for candidate in outcome.candidates
        ],
    }
