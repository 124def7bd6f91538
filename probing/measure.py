"""What another stored type costs: the same probes on two banks of the same clips."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.errors import BankMismatch
from patchbank.probing.measurements import Facts
from patchbank.probing.run import run_training
from patchbank.probing.settings import TrainSettings
from patchbank.probing.training import OnProgress

MEASURED_PROBES = ("linear", "linpre", "mhca", "protobin")


def measure_change(
    reference: Bank,
    bank: Bank,
    labels: Path,
    *,
    probes: Sequence[str] = MEASURED_PROBES,
    settings: TrainSettings | None = None,
    layer: int | None = None,
    splits_path: Path | None = None,
    folds: str | None = None,
    allow_leakage: bool = False,
    progress: OnProgress | None = None,
) -> Facts:
    """Test scores of `probes` on `reference` and on `bank`, and their change.

    Both are trained alike: the same clips, splits, order and seeds, and without `folds` the
    learning rates that `reference` chose. Raises `BankMismatch` where the clips are not the same.
    """
    _check_same_clips(reference, bank)
    settings = settings or TrainSettings()
    # A bank with fewer layers has another last one.
    layer = reference.resolve_layer(bank.resolve_layer(layer))

    def train(chosen: Bank, with_settings: TrainSettings) -> Facts:
        with tempfile.TemporaryDirectory(prefix="patchbank-measure-") as out:
            return run_training(
                chosen,
                labels,
                Path(out),
                probes=probes,
                settings=with_settings,
                layer=layer,
                splits_path=splits_path,
                folds=folds,
                allow_leakage=allow_leakage,
                progress=progress,
            )

    before = train(reference, settings)
    after = train(bank, settings if folds else _as_chosen(settings, before))
    metric = before["primary_metric"]
    changes = {
        name: _change(_score(before, name, metric), _score(after, name, metric)) for name in probes
    }
    return {
        "root_sha256": bank.root_sha256,
        "stored_dtype": bank.schema.stored_dtype,
        "reference": {
            "fingerprint": reference.fingerprint,
            "stored_dtype": reference.schema.stored_dtype,
        },
        "labels": labels.name,
        "labels_sha256": hashlib.sha256(labels.read_bytes()).hexdigest(),
        "metric": metric,
        "layer": layer,
        "n_seeds": settings.n_seeds,
        "std_over": before["std_over"],
        "probes": changes,
        "settings": after["settings"],
        "environment": after["environment"],
    }


def _check_same_clips(reference: Bank, bank: Bank) -> None:
    for name in ("clip_id", "view", "audio_sha256"):
        pairs = [_column(one, name) for one in (reference, bank)]
        if pairs[0] != pairs[1]:
            raise BankMismatch(
                f"{bank.where} holds other clips than {reference.where}; only banks of the same "
                "clips can be compared",
                {name: (f"{len(pairs[1])} clips", f"{len(pairs[0])} clips")},
            )


def _column(bank: Bank, name: str) -> list[Any]:
    return [value for value in bank.clips[name].to_pylist() if value is not None]


def _as_chosen(settings: TrainSettings, results: Facts) -> TrainSettings:
    """`settings` with what the search chose for each probe as the only one to try."""
    found = {name: probe["search"][0] for name, probe in results["probes"].items()}
    return replace(
        settings,
        learning_rates={
            name: (search["learning_rate"],)
            for name, search in found.items()
            if search["learning_rate"] > 0  # else nothing of it is trained
        },
        weight_decays={name: (search["weight_decay"],) for name, search in found.items()},
    )


def _score(results: Facts, probe: str, metric: str) -> Facts:
    for score in results["scores"]:
        if (score["probe"], score["split"], score["metric"]) == (probe, "test", metric):
            return {"mean": score["mean"], "std": score["std"]}
    raise KeyError((probe, metric))


def _change(before: Facts, after: Facts) -> Facts:
    return {"reference": before, "bank": after, "change": after["mean"] - before["mean"]}
