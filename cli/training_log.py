"""`--log-to`: losses and scores of every trial, while they train, for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from patchbank.pipeline.errors import TrialError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from patchbank.probing.training import Event, TrialValue

TENSORBOARD = "tensorboard"


class TensorBoardLog:
    """Event files below a folder: a run for each trial of a stage, a chart for each probe.

    Run `search 1 of 6/trial 03` holds the third trial of every probe, as charts `protobin/loss` and
    `protobin/map_macro` over epochs; the trials of a final stage are named by their seeds. Open at
    one time are the runs of one stage, so that hundreds of trials need no hundreds of files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._new = folder, _writer_class()
        self._stage = ""
        self._writers: dict[str, SummaryWriter] = {}
        self._told: set[tuple[str, int]] = set()

    def note(self, event: Event) -> None:
        """Writes what an epoch or a validation gave."""
        from patchbank.probing.training import Progress, Step

        if isinstance(event, Step):
            return
        if event.stage != self._stage:
            self.close()
            self._stage = event.stage
        is_epoch = isinstance(event, Progress)
        name = "loss" if isinstance(event, Progress) else event.metric
        values = event.losses if isinstance(event, Progress) else event.values
        for probe, trials in values.items():
            for one in trials:
                # An epoch that is trained again after a crash takes the place of what was there.
                writer = self._writer(probe, one, purge_step=event.epoch if is_epoch else None)
                writer.add_scalar(f"{probe}/{name}", one.value, event.epoch)

    def conclude(self, results: Mapping[str, Any], name: str = "") -> None:
        """Writes the chosen settings and the scores of one label table's `results.json`."""
        self.close()
        root = self.folder / "scores" / name
        for probe, facts in results["probes"].items():
            with closing(self._new(str(root / probe))) as writer:
                scores = {
                    f"{row['split']}/{row['metric']}": math.nan
                    if row["mean"] is None
                    else row["mean"]
                    for row in results["scores"]
                    if row["probe"] == probe
                }
                writer.add_hparams(_setting(probe, facts), scores, run_name=".")
                writer.add_text("scores", _table(results, probe))

    def _writer(self, probe: str, one: TrialValue, *, purge_step: int | None) -> SummaryWriter:
        trial = one.trial
        is_final = self._stage.split(" ")[-1] == "final"
        run = f"seed {trial.seed}" if is_final else f"trial {one.number:02}"
        if run not in self._writers:
            place = self.folder / self._stage.replace("/", " of ") / run
            self._writers[run] = self._new(str(place), purge_step=purge_step)
        if (probe, one.number) not in self._told:
            self._told.add((probe, one.number))
            text = f"learning rate {trial.learning_rate:.3g}, weight decay {trial.weight_decay:.3g}"
            self._writers[run].add_text(f"{probe}/setting", f"{text}, seed {trial.seed}")
        return self._writers[run]

    def close(self) -> None:
        """Writes what is still in memory."""
        for writer in self._writers.values():
            writer.close()
        self._writers, self._told = {}, set()


@contextmanager
def open_log(target: str | None, out: Path) -> Iterator[TensorBoardLog | None]:
    """What `--log-to` names: `tensorboard`, below `out`, or `tensorboard:DIR`; None for none.

    Exits with 2 for another target; raises `TrialError` where the package is missing.
    """
    if target is None:
        yield None
        return
    kind, _, folder = target.partition(":")
    if kind != TENSORBOARD:
        raise typer.BadParameter(
            f"--log-to takes {TENSORBOARD}, or {TENSORBOARD}:DIR, found {target!r}"
        )
    with closing(TensorBoardLog(Path(folder) if folder else out / TENSORBOARD)) as log:
        yield log


def both(progress: Callable[[Event], None], log: TensorBoardLog | None) -> Callable[[Event], None]:
    """Tells a bar and a log of every event."""
    if log is None:
        return progress

    def tell(event: Event) -> None:
        progress(event)
        log.note(event)

    return tell


def _writer_class() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrialError(
            f"--log-to tensorboard needs the package tensorboard ({error}); install it: "
            "pip install 'patchbank[tensorboard]'"
        ) from error
    return SummaryWriter


def _setting(probe: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a probe's final models, of the first fold where there are several."""
    found = facts["search"][0]
    options = {key: value for key, value in facts["options"].items() if value is not None}
    return {
        "probe": probe,
        "layers": "+".join(map(str, facts["layers"])),
        "learning_rate": found["learning_rate"],
        "weight_decay": found["weight_decay"],
        **{
            key: one if isinstance(one, int | float | str) else str(one)
            for key, one in options.items()
        },
    }


def _table(results: Mapping[str, Any], probe: str) -> str:
    """A probe's scores in Markdown, which TensorBoard shows as a table."""
    lines = ["| split | metric | mean | std |", "|---|---|---|---|"]
    for row in results["scores"]:
        if row["probe"] == probe:
            numbers = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("mean", "std")]
            lines.append(f"| {row['split']} | {row['metric']} | {' | '.join(numbers)} |")
    return "\n".join(lines)
