"""`patchbank compare`: probes of several runs, tested on the same clips, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="What train-probe left, of one label set each."),
    ],
    metric: Annotated[
        str | None, typer.Option(help="Which scores. [default: that which selects]")
    ] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help="Only this probe; repeat it for several.")
    ] = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Test every pair, not the best against each.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare the probes of runs on the same test clips, the best first, with paired tests."""
    import json

    from patchbank.cli.train import print_table
    from patchbank.probing.comparison_runs import compare_runs
    from patchbank.probing.results import comparison_table

    found = compare_runs(runs, metric=metric, probes=probe or (), all_pairs=all_pairs)
    if json_output:
        print(json.dumps(found))
        return
    print_table(score_table(found))
    rows = found["comparisons"]
    if rows:
        title = f"{rows[0]['a']} against the others" if not all_pairs else "All pairs"
        title = f"{title}, {found['metric']}"
        print_table(comparison_table(rows, title, _tested(found), all_pairs=all_pairs))


def score_table(found: Mapping[str, Any]) -> Table:
    """All probes of all runs, at most 80 columns; columns that tell nothing apart are left out."""
    from patchbank.probing.plain_text import cell
    from patchbank.probing.results import titled_table

    rows = found["scores"]
    table = titled_table(f"Test scores, {found['metric']}", _counted(found))
    columns = {
        "run": [row["run"] for row in rows],
        "encoder": [row["encoder"] or row["encoder_id"][:8] for row in rows],
        "layers": ["+".join(map(str, row["layers"])) for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if len(set(cells)) > 1}
    table.add_column("probe", overflow="fold", max_width=18)
    for name in shown:
        table.add_column(name, overflow="fold", max_width=14)
    for header in ("mean ± std", "95 % interval"):
        table.add_column(header, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        low, high = map(_text, row["ci95"])
        table.add_row(
            cell(row["probe"]),
            *(cell(cells[index]) for cells in shown.values()),
            f"{_text(row['mean'])} ± {_text(row['std'])}",
            f"{low} - {high}",
        )
    return table


def _counted(found: Mapping[str, Any]) -> str:
    row = found["scores"][0]
    seeds = sorted({one["n_seeds"] for one in found["scores"]})
    return (
        f"{row['n_clips']} test clips, {' or '.join(map(str, seeds))} seeds, "
        f"± over {row['std_over']}"
    )


def _tested(found: Mapping[str, Any]) -> str:
    n_pairs, n_resamples = found["n_pairs"], found["n_resamples"]
    parts = [
        f"{found['n_groups']} groups of test clips resampled {n_resamples} times",
        f"p corrected for {n_pairs} pair{'s' * (n_pairs > 1)} (Holm)",
        "a win is more than one standard deviation",
    ]
    of_runs = found["n_resamples_of_runs"]
    if len(set(of_runs.values())) > 1:
        said = ", ".join(f"{name} {n}" for name, n in of_runs.items())
        parts.append(f"runs have unequally many resamples ({said}): the first {n_resamples} of all")
    return "; ".join(parts)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
