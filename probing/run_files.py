"""What a run leaves in its folder: results.json, and of each probe weights and predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from patchbank.probing.artefact import ProbeArtefact, save_probe
from patchbank.probing.atomic import write_json, write_text
from patchbank.probing.evaluation import Evaluation, Fold, evaluate, left_out_rows, resamples_of
from patchbank.probing.groups import Groups
from patchbank.probing.labels import LabelSet
from patchbank.probing.metrics import primary_metric
from patchbank.probing.model_card import model_card
from patchbank.probing.paired_files import write_resamples, write_test_clips
from patchbank.probing.per_class import write_per_class
from patchbank.probing.plan import Rows
from patchbank.probing.probes.base import n_parameters
from patchbank.probing.protocol import Outcome
from patchbank.probing.results import environment, write_predictions
from patchbank.probing.run_state import RunState
from patchbank.probing.settings import TrainSettings
from patchbank.probing.splits import Split, is_clean
from patchbank.probing.validation_fit import fit_on_validation

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
class FinishedRun:
    """All that was trained and measured for one label set."""

    bank: TokenBank
    labels: LabelSet
    folds: tuple[Fold, ...]
    settings: TrainSettings
    groups: Groups
    leakage: Mapping[str, int | None]
    """What `check_leakage` counted."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Probes' files with their digests when the run began."""
    state: RunState = field(default_factory=RunState)
    command: tuple[str, ...] = ()
    """What was typed, word by word; nothing where Python called."""


def rows_of(splits: Sequence[Split]) -> Rows:
    """All rows that training or judging will read."""
    parts = [part for split in splits for part in (split.train, split.valid, split.test)]
    return np.unique(np.concatenate(parts))


def write_run(run: FinishedRun, out: Path) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)
    clip_ids = run.bank.clips.column("clip_id").to_pylist()
    evaluation = evaluate(
        run.folds,
        run.labels.targets,
        clip_ids=clip_ids,
        groups=run.groups.names,
        multi_label=run.labels.multi_label,
        n_resamples=run.settings.n_resamples,
    )
    write_test_clips(out, run.folds, run.labels, clip_ids=clip_ids, groups=run.groups.names)
    write_resamples(out, evaluation.samples)
    # As it will be read.
    results: dict[str, Any] = json.loads(json.dumps(_results(run, evaluation), allow_nan=False))
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
        write_per_class(
            folder / "per-class.csv",
            run.folds,
            index,
            targets=run.labels.targets,
            classes=run.labels.classes,
            multi_label=run.labels.multi_label,
        )
        artefact = _artefact(run, index)
        licence = str(run.bank.card.get("licence", ""))
        card = model_card(artefact, name=outcome.name, results=results, licence=licence)
        write_text(folder / "README.md", card)
        save_probe(folder, artefact)
    write_json(out / "results.json", results)
    return results


def _best_fold(run: FinishedRun, index: int) -> int:
    """The fold whose best seed validation data prefer."""
    return int(np.argmax([max(fold.outcomes[index].valid_values) for fold in run.folds]))


def _artefact(run: FinishedRun, index: int) -> ProbeArtefact:
    """The probe of the seed (and fold) with the best validation score."""
    fold = run.folds[_best_fold(run, index)]
    outcome = fold.outcomes[index]
    card = run.bank.card
    return ProbeArtefact(
        probe=outcome.entry.family_name,
        plugin=outcome.entry.file,
        plugin_sha256=run.plugins.get(outcome.entry.file, ""),
        options=outcome.probe.options,
        classes=run.labels.classes,
        multi_label=run.labels.multi_label,
        shape=outcome.probe.shape,
        weights=outcome.weights[outcome.best_seed],
        layers=outcome.entry.layers,
        encoder_id=run.bank.encoder_id,
        encoder=dict(card.get("encoder", {})),
        window=dict(card.get("window", {})),
        tokens={key: card[key] for key in ("stored_dtype", "mask_padding") if key in card},
        **fit_on_validation(
            outcome.valid_scores[outcome.best_seed],
            run.labels.targets[fold.split.valid],
            classes=run.labels.classes,
            multi_label=run.labels.multi_label,
        ),
        training={
            "bank": run.bank.fingerprint,
            "recipe_id": run.bank.recipe_id,
            "fold": fold.split.name,
            **asdict(outcome.trials[outcome.best_seed]),
            "valid_score": outcome.valid_values[outcome.best_seed],
            "settings": asdict(run.settings),
            "environment": environment(run.settings.torch_device),
            "command": list(run.command),
        },
    )


def _results(run: FinishedRun, evaluation: Evaluation) -> dict[str, Any]:
    labels, folds, settings = run.labels, run.folds, run.settings
    status = run.bank.clips.column("status").to_numpy()
    clean = is_clean(run.bank.clips)
    return {
        "format": FORMAT,
        "bank": run.bank.fingerprint,
        "encoder": str(run.bank.card.get("encoder", {}).get("name", "")),
        "encoder_id": run.bank.encoder_id,
        "recipe_id": run.bank.recipe_id,
        "layers": sorted({one for outcome in folds[0].outcomes for one in outcome.entry.layers}),
        "task": "multi-label" if labels.multi_label else "multi-class",
        "primary_metric": primary_metric(multi_label=labels.multi_label),
        "std_over": "seeds" if len(folds) == 1 else "folds",
        "scores": evaluation.scores,
        "comparisons": evaluation.comparisons,
        "bootstrap_over": {"column": run.groups.column, "n_groups": evaluation.n_groups},
        "leakage": dict(run.leakage),
        "left_out": left_out_rows(
            folds, labels.targets, labels.classes, multi_label=labels.multi_label
        ),
        "test_scored": run.state.times_tested(),
        "n_resamples": resamples_of(folds, settings.n_resamples),
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
        "unused": len(np.setdiff1d(usable, rows_of([split]))),
        "views": split.n_views,
        "views_left_out": split.n_views_left_out,
    }


def _probe_facts(run: FinishedRun, index: int) -> tuple[str, dict[str, Any]]:
    """Name and hyper-parameters of one probe, and what the search saw in each fold."""
    outcome = run.folds[0].outcomes[index]
    return outcome.name, {
        "family": outcome.entry.family_name,
        "layers": list(outcome.entry.layers),
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
        "weight_decay": outcome.trials[0].weight_decay,
        "best_seed": outcome.trials[outcome.best_seed].seed,
        "candidates": [
            {
                "learning_rate": candidate.learning_rate,
                "weight_decay": candidate.weight_decay,
                "score": None if candidate.score == float("-inf") else candidate.score,
                "diverged": candidate.score == float("-inf"),
                "round": candidate.round,
                "epochs": candidate.epochs,
            }
            for candidate in outcome.candidates
        ],
    }
