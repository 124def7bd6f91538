"""`patchbank demo`: the whole job on synthetic scenes with the bundled encoder, no download."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

ROWS = {
    "tiny": ("linear", "linear-cls", "mhca", "protobin"),
    "tiny-random": ("linear", "mhca", "protobin"),
    "logmel": ("linear",),
}
"""Encoder -> probes: the bundled one, and the two that it has to beat."""
TITLES = {
    "tiny": "tiny (bundled)",
    "tiny-random": "tiny, not trained",
    "logmel": "log-mel statistics",
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for audio, banks and results.")] = Path("demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A small set: shows that it works, not how well.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 0,
) -> None:
    """Synthesise scenes, extract, train linear, attentive and prototypical probes, report."""
    from patchbank.cli.bars import count_bar
    from patchbank.cli.train import print_table
    from patchbank.pipeline.scenes import write_scenes

    started = time.monotonic()
    n_train, n_valid, n_test = (48, 24, 24) if quick else (600, 200, 300)
    print(f"1. {n_train + n_valid + n_test} polyphonic scenes of 5 s -> {out / 'scenes'}")
    scenes = out / "scenes"
    with count_bar("   scenes", "scenes") as progress:
        write_scenes(
            scenes,
            n_train=n_train,
            n_valid=n_valid,
            n_test=n_test,
            seed=seed,
            progress=progress,
        )
    print("2. extract: a frozen encoder runs once, every patch token is kept")
    results = {name: _extract_and_train(out, name, quick=quick) for name in ROWS}
    print_table(score_table(results))
    print(f"{time.monotonic() - started:.0f} s. Now label a recording with the best probe:")
    print(f"  patchbank predict {out / 'run'} {scenes / 'audio/test_0000.wav'}")
    print("or do the same with your own audio: README.md, section Your own audio")


def _extract_and_train(out: Path, name: str, *, quick: bool) -> dict[str, Any]:
    from patchbank.cli.bars import clip_bar, progress_lines
    from patchbank.pipeline.extraction import ExtractionSettings, extract
    from patchbank.pipeline.specs import WindowSpec
    from patchbank.probing.run import run_training
    from patchbank.probing.settings import TrainSettings

    settings = ExtractionSettings(window=WindowSpec(5.0, 5.0))
    with clip_bar(f"   {TITLES[name]}") as progress:
        bank = extract(
            out / "scenes/clips.csv",
            encoder=name,
            out=out / f"{name}.bank",
            settings=settings,
            progress=progress,
        )
    training = TrainSettings(n_epochs=4 if quick else 30, n_seeds=2 if quick else 5)
    with progress_lines() as epochs:
        return run_training(
            bank,
            out / "scenes/labels.csv",
            out / ("run" if name == "tiny" else f"run-{name}"),
            probes=ROWS[name],
            settings=training,
            overwrite=True,
            progress=epochs,
        )


def score_table(results: dict[str, dict[str, Any]]) -> Table:
    """Macro mAP on the test scenes, one row an encoder and probe; at most 80 columns."""
    from rich.table import Table

    table = Table(title="3. train-probe: macro mAP on the test scenes, in percent")
    table.add_column("tokens of")
    table.add_column("probe")
    table.add_column("mean ± std over seeds", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, result in results.items():
        for score in result["scores"]:
            if (score["split"], score["metric"]) == ("test", "map_macro"):
                low, high = score["ci95"]
                table.add_row(
                    TITLES[name],
                    score["probe"],
                    f"{100 * score['mean']:.1f} ± {100 * score['std']:.1f}",
                    f"{100 * low:.1f} - {100 * high:.1f}",
                )
        table.add_section()
    return table
