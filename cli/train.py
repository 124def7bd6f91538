"""`patchbank train-probe`: a bank and labels in, probes and honest numbers out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from patchbank.cli.bars import phase, progress_lines
from patchbank.cli.choices import Loss, TaskKind, Tier
from patchbank.cli.typed_command import TYPED


def train_probe(
    bank: Annotated[
        str, typer.Argument(metavar="BANK|URL", help="A sealed bank, here or at s3://, ...")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results and probes.")],
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            help="Table: labels by clip_id, by path, or by path,start_s,end_s. Several share every "
            "batch, and each has its own folder of results."
        ),
    ] = None,
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
    preset: Annotated[
        str | None, typer.Option(metavar="unmute|bat", help="A published protocol.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Any of these options, and more; flags go above."),
    ] = None,
    splits: Annotated[
        Path | None, typer.Option(help="Table of splits, in place of the bank's own.")
    ] = None,
    folds: Annotated[
        str | None, typer.Option(help="Column of folds: each is the test split once.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Vocabulary: one class a line.")] = None,
    task: Annotated[
        TaskKind | None, typer.Option(help="What the labels are. [default: auto]")
    ] = None,
    allow_unlabelled: Annotated[
        bool, typer.Option("--allow-unlabelled", help="Leave clips without labels out.")
    ] = False,
    no_views: Annotated[
        bool, typer.Option("--no-views", help="Train on clean clips alone, on no view of them.")
    ] = False,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Clips that belong together. [default: group, recording or path]",
        ),
    ] = None,
    allow_leakage: Annotated[
        bool, typer.Option("--allow-leakage", help="Train although splits share recordings.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="[default: 30]")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Batches to train, in place of --epochs.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="[default: 64]")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Final runs of the chosen setting. [default: 5]")
    ] = None,
    sweep: Annotated[
        int | None,
        typer.Option(
            min=1, help="Settings to choose from: learning rate, weight decay. [default: 5]"
        ),
    ] = None,
    lr: Annotated[
        list[float] | None, typer.Option(help="Learning rate to try; repeat it for several.")
    ] = None,
    weight_decay: Annotated[
        list[float] | None,
        typer.Option(min=0.0, help="Weight decay to try; repeat it for several."),
    ] = None,
    loss: Annotated[
        Loss | None, typer.Option(help="auto: asymmetric or cross-entropy. [default: auto]")
    ] = None,
    tier: Annotated[
        Tier | None, typer.Option(help="Where batches are read from. [default: auto]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda, cuda:1 ... [default: auto]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another run that is in --out.")
    ] = False,
    log_to: Annotated[
        str | None,
        typer.Option(
            metavar="tensorboard[:DIR]",
            help="Write losses and scores of every trial. [default DIR: OUT/tensorboard]",
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Train probes from a bank alone: no encoder, no audio.

    All trials of all probes, layers and label tables learn from the same batches. Settings are
    chosen on validation clips; the test split is scored once. Stopped at any moment, the same
    command goes on.
    """
    import json

    from patchbank.cli.training_log import both, open_log
    from patchbank.pipeline.bank import open_bank
    from patchbank.pipeline.sharing.stores import safe_url
    from patchbank.probing.atomic import write_text
    from patchbank.probing.results import format_comparisons, format_scores
    from patchbank.probing.run import run_training
    from patchbank.probing.train_options import TrainOptions
    from patchbank.probing.vocabulary import read_vocabulary

    flags = {
        "labels": labels,
        "probe": probe,
        "layer": layer,
        "splits": splits,
        "folds": folds,
        "classes": classes,
        "task": task and task.value,
        "allow_unlabelled": allow_unlabelled or None,
        "no_views": no_views or None,
        "group": group,
        "allow_leakage": allow_leakage or None,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "seeds": seeds,
        "sweep": sweep,
        "lr": lr,
        "weight_decay": weight_decay,
        "loss": loss and loss.value,
        "tier": tier and tier.value,
        "device": device,
    }
    options = TrainOptions.resolve(flags, file=config, preset=preset)
    if not options.labels:
        raise typer.BadParameter("give a table of labels: --labels LABELS.csv")
    with phase("open"):
        opened = open_bank(bank)
    tables = list(dict.fromkeys(options.labels))
    entries, chosen = options.entries(opened.layers)
    with open_log(log_to, out) as log, progress_lines() as progress, goes_on():
        results = run_training(
            opened,
            tables,
            out,
            probes=entries,
            settings=options.settings(opened.layers),
            layer=chosen,
            splits_path=options.splits,
            folds=options.folds,
            classes=None if options.classes is None else read_vocabulary(options.classes),
            task=options.task,
            allow_unlabelled=options.allow_unlabelled,
            use_views=not options.no_views,
            group=options.group,
            allow_leakage=options.allow_leakage,
            tier=options.tier,
            overwrite=overwrite,
            command=[safe_url(word) for word in TYPED.get()],
            progress=both(progress, log),
            say=lambda line: print(line, file=sys.stderr),
        )
        if log is not None:
            for name, found in (results if len(tables) > 1 else {"": results}).items():
                log.conclude(found, name)
    write_text(out / "settings.toml", options.to_toml(out))
    if json_output:
        print(json.dumps(results))
        return
    for name, found in (results if len(tables) > 1 else {"": results}).items():
        print_table(format_scores(found, f"Test scores: {name}" if name else "Test scores"))
        if found["comparisons"]:
            print_table(format_comparisons(found))
        print(f"{out / name}: results.json, one folder a probe")


@contextmanager
def goes_on() -> Iterator[None]:
    """Says that nothing is lost where a store is."""
    from patchbank.pipeline.errors import StoreError

    try:
        yield
    except StoreError as error:
        raise StoreError(f"{error}; the same command goes on from here") from error


def print_table(table: object) -> None:
    """A rich table on stdout, 80 columns wide where stdout is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 80
    Console(width=width).print(table)
