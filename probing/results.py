"""`results.json`, the predictions beside it, and the table that a person reads."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float

from patchbank.probing.atomic import write_atomically
from patchbank.probing.evaluation import Fold
from patchbank.probing.plain_text import cell

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = (
    "patchbank",
    "torch",
    "numpy",
    "scikit-learn",
    "pyarrow",
    "safetensors",
    "optuna",
    "scipy",
)


def environment(device: torch.device) -> dict[str, Any]:
    """What computed a result: versions, device and threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": name or platform.machine(),
        "n_threads": torch.get_num_threads(),
    }


def mean_probabilities(
    scores: Float[np.ndarray, "seed clip class"], *, multi_label: bool
) -> Float[np.ndarray, "clip class"]:
    """Probabilities averaged over seeds, from logits (multi-label) or log-probabilities."""
    tensor = torch.from_numpy(scores)
    probabilities = torch.sigmoid(tensor) if multi_label else tensor.softmax(dim=-1)
    return np.asarray(probabilities.mean(dim=0).numpy())


def write_predictions(
    path: Path,
    folds: Sequence[Fold],
    index: int,
    *,
    clip_ids: Sequence[str],
    classes: Sequence[str],
    multi_label: bool,
) -> None:
    """Probabilities of one probe (position `index`) for every test clip, in bank order.

    One row a clip: `clip_id` and a float32 column a class, the mean over seeds. With folds every
    clip is predicted by the probes that never saw it.
    """
    rows = np.concatenate([fold.split.test for fold in folds])
    scores = [fold.outcomes[index].test_scores for fold in folds]
    values = np.concatenate([mean_probabilities(one, multi_label=multi_label) for one in scores])
    order = np.argsort(rows, kind="stable")
    columns = {"clip_id": pa.array([clip_ids[row] for row in rows[order]])}
    columns |= {name: pa.array(values[order, column]) for column, name in enumerate(classes)}
    table = pa.table(columns)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def format_scores(results: Mapping[str, Any], title: str = "Test scores") -> Table:
    """The test scores as a table of at most 80 columns, validation means beside them."""
    table = titled_table(title, _caption(results))
    table.add_column("probe", overflow="fold", max_width=18)
    table.add_column("metric")
    for header in ("mean ± std", "95 % interval", "valid"):
        table.add_column(header, justify="right", no_wrap=True)
    valid = {
        (row["probe"], row["metric"]): row["mean"]
        for row in results["scores"]
        if row["split"] == "valid"
    }
    before = None
    for row in (row for row in results["scores"] if row["split"] == "test"):
        if before not in (None, row["probe"]):
            table.add_section()
        table.add_row(
            cell(row["probe"] if row["probe"] != before else ""),
            row["metric"],
            f"{_text(row['mean'])} ± {_text(row['std'])}",
            f"{_text(row['ci95'][0])} - {_text(row['ci95'][1])}",
            _text(valid[row["probe"], row["metric"]]),
        )
        before = row["probe"]
    return table


def format_comparisons(results: Mapping[str, Any]) -> Table:
    """The best probe against each other one, at most 80 columns; `p` for all pairs of the run."""
    rows = results["comparisons"]
    best, metric = rows[0]["a"], rows[0]["metric"]
    caption = (
        f"{results['bootstrap_over']['n_groups']} groups of test clips by "
        f"{results['bootstrap_over']['column']} resampled {results['n_resamples']} times; "
        f"p corrected for {len(rows)} pair{'s' * (len(rows) > 1)} (Holm); a win is more than one "
        "standard deviation"
    )
    against = [row for row in rows if row["a"] == best]
    return comparison_table(against, f"{best} against the others, {metric}", caption)


def comparison_table(
    rows: Sequence[Mapping[str, Any]], title: str, caption: str, *, all_pairs: bool = False
) -> Table:
    """Differences with intervals, corrected p-values and winners; the better one if `all_pairs`."""
    table = titled_table(title, caption)
    if all_pairs:
        table.add_column("probe", overflow="fold", max_width=18)
    table.add_column("against", overflow="fold", max_width=18)
    for header in ("difference", "95 % interval", "p (Holm)"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("wins", justify="center")
    for row in rows:
        low, high = (_signed(bound) for bound in row["ci95"])
        table.add_row(
            *([cell(row["a"])] if all_pairs else []),
            cell(row["b"]),
            _signed(row["difference"]),
            f"{low} .. {high}",
            "-" if row["p_holm"] is None else f"{row['p_holm']:.3f}",
            "yes" if row["winner"] == row["a"] else "no",
        )
    return table


def titled_table(title: str, caption: str) -> Table:
    """A table without rows under a title, whatever names stand in it."""
    from rich.table import Table

    return Table(title=cell(title, "table.title"), caption=cell(caption, "table.caption"))


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _caption(results: Mapping[str, Any]) -> str:
    test = next(row for row in results["scores"] if row["split"] == "test")
    parts = [f"{test['n_clips']} test clips, {test['n_seeds']} seeds, ± over {results['std_over']}"]
    if results["n_failed_clips"]:
        parts.append(f"{results['n_failed_clips']} failed clips left out")
    if results["n_failed_views"]:
        parts.append(f"{results['n_failed_views']} failed views left out")
    if results["n_unlabelled_clips"]:
        parts.append(f"{results['n_unlabelled_clips']} unlabelled clips left out")
    n_unused = max(fold["unused"] for fold in results["folds"])
    if n_unused:
        parts.append(f"{n_unused} labelled clips in no split")
    most = max(results["folds"], key=lambda fold: int(fold["views_left_out"]))
    if most["views_left_out"]:
        parts.append(f"{most['views_left_out']} of {most['views']} views left out of training")
    parts += _left_out_notes(results)
    return "; ".join(parts)


def _left_out_notes(results: Mapping[str, Any]) -> list[str]:
    """How many classes each metric leaves out of its mean on the test split, at most."""
    n_classes: dict[str, int] = {}
    for row in results["left_out"]:
        if row["split"] == "test":
            metric = row["metric"]
            n_classes[metric] = max(n_classes.get(metric, 0), row["n_classes"])
    total = len(results["classes"])
    return [
        f"{', '.join(name for name in n_classes if n_classes[name] == n)} "
        f"without {n} of {total} classes"
        for n in dict.fromkeys(n_classes.values())
    ]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
