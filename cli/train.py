"""`patchbank train-probe`: a bank and labels in, probes and honest numbers out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchbank.cli.choices import Loss, TaskKind, Tier
from patchbank.cli.typed_command import TYPED

if TYPE_CHECKING:
    from rich.progress import TaskID

    from patchbank.probing.passes import Progress as TrainingProgress


def train_probe(
    bank: Annotated[Path, typer.Argument(metavar="BANK", help="A sealed bank.")],
    labels: Annotated[
        list[Path],
        typer.Option(
            help="Table: labels by clip_id, by path, or by path,start_s,end_s. Several share every "
            "batch, and each has its own folder of results."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results and probes.")],
    probe: Annotated[
        list[str] | None,
        typer.Option(
            help="Family, or with options linpre:pooling=lse; or a FILE.py; repeat it for several. "
            "[default: linear protobin]"
        ),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="last|all|3,6|3+6|mix",
            help="Each layer by itself, those with + between mixed. [default: last]",
        ),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="Table of splits, in place of the bank's own.")
    ] = None,
    folds: Annotated[
        str | None, typer.Option(help="Column of folds: each is the test split once.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Vocabulary: one class a line.")] = None,
    task: Annotated[TaskKind, typer.Option(help="What the labels are.")] = TaskKind.auto,
    allow_unlabelled: Annotated[
        bool, typer.Option("--allow-unlabelled", help="Leave clips without labels out.")
    ] = False,
    no_views: Annotated[
        bool, typer.Option("--no-views", help="Train on clean clips alone, on no view of them.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs of the chosen setting.")] = 5,
    sweep: Annotated[
        int, typer.Option(min=1, help="Settings to choose from: learning rate, weight decay.")
    ] = 5,
    lr: Annotated[
        list[float] | None, typer.Option(help="Learning rate to try; repeat it for several.")
    ] = None,
    weight_decay: Annotated[
        list[float] | None,
        typer.Option(min=0.0, help="Weight decay to try; repeat it for several."),
    ] = None,
    loss: Annotated[Loss, typer.Option(help="auto: asymmetric or cross-entropy.")] = Loss.auto,
    tier: Annotated[Tier, typer.Option(help="Where batches are read from.")] = Tier.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Train probes from a bank alone: no encoder, no audio.

    All trials of all probes, layers and label tables learn from the same batches. Settings are
    chosen on validation clips; the test split is read once.
    """
    import json

    from patchbank.pipeline.bank import open_bank
    from patchbank.probing.entries import on_layers, parse_layers, parse_probe
    from patchbank.probing.results import format_scores
    from patchbank.probing.run import run_training
    from patchbank.probing.settings import TrainSettings
    from patchbank.probing.vocabulary import read_vocabulary

    opened, labels = open_bank(bank), list(dict.fromkeys(labels))
    entries = [parse_probe(text) for text in dict.fromkeys(probe or ("linear", "protobin"))]
    chosen = parse_layers(layer or (), opened.layers)
    names = [entry.name for entry in on_layers(entries, chosen)]
    settings = TrainSettings(
        n_epochs=epochs,
        batch_size=batch_size,
        n_seeds=seeds,
        n_candidates=sweep,
        learning_rates={name: tuple(lr) for name in names} if lr else {},
        weight_decays={name: tuple(weight_decay) for name in names} if weight_decay else {},
        loss=loss.value,
        device=device,
    )
    with progress_lines() as progress:
        results = run_training(
            opened,
            labels,
            out,
            probes=entries,
            settings=settings,
            layer=chosen,
            splits_path=splits,
            folds=folds,
            classes=None if classes is None else read_vocabulary(classes),
            task=task.value,
            allow_unlabelled=allow_unlabelled,
            use_views=not no_views,
            tier=tier.value,
            command=TYPED.get(),
            progress=progress,
            say=lambda line: print(line, file=sys.stderr),
        )
    if json_output:
        print(json.dumps(results))
        return
    for name, found in (results if len(labels) > 1 else {"": results}).items():
        print_table(format_scores(found, f"Test scores: {name}" if name else "Test scores"))
        print(f"{out / name}: results.json, one folder a probe")


@contextmanager
def progress_lines() -> Iterator[Callable[[TrainingProgress], None]]:
    """Bars on stderr, one a stage: epochs, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("epoch {task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(state: TrainingProgress) -> None:
            if state.stage not in tasks:
                tasks[state.stage] = bar.add_task(state.stage, total=state.n_epochs)
            bar.update(tasks[state.stage], completed=state.epoch)

        yield show


def print_table(table: object) -> None:
    """A rich table on stdout, 80 columns wide where stdout is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 80
    Console(width=width).print(table)
