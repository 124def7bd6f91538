"""Finds a probe in what train-probe left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchbank.pipeline.errors import TrialError


def probe_folder(run: Path, probe: str | None = None) -> Path:
    """The folder of `probe` in a RUN folder, or of the probe that validation data prefer.

    A probe's own folder stands for itself. Raises `TrialError` where there is none.
    """
    if (run / "probe.json").is_file() and probe is None:
        return run
    if not (run / "results.json").is_file():
        sets = sorted(path.parent.name for path in run.glob("*/results.json"))
        hint = f"name one of its label sets: {', '.join(sets)}" if sets else ""
        raise TrialError(
            f"found no results.json in {run}, expected what train-probe leaves in its --out; "
            + (hint or "train first: patchbank train-probe")
        )
    try:
        results: dict[str, Any] = json.loads((run / "results.json").read_text("utf-8"))
        # Not the folders that lie there: some may be left from an earlier run.
        names = sorted(results["probes"])
        best = _best_on_validation(results)
    except (ValueError, KeyError, TypeError) as error:
        raise TrialError(
            f"{run / 'results.json'} is damaged ({error!r}); train again: patchbank train-probe"
        ) from error
    if probe is not None and probe not in names:
        raise TrialError(f"found no probe {probe!r} in {run}, expected one of {', '.join(names)}")
    return run / (probe or best)


def _best_on_validation(results: dict[str, Any]) -> str:
    scores: dict[str, float] = {
        row["probe"]: row["mean"]
        for row in results["scores"]
        if (row["split"], row["metric"]) == ("valid", results["primary_metric"])
    }
    return max(scores, key=lambda name: scores[name])
