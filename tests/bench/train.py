"""How fast probes are trained: a step against plain autograd, many trials in one pass over a bank
against as many passes, a pass against the loader alone, and the paper's whole study in hours.

    python tests/bench/train.py [--rounds 3] [--only WORD...] [--folder DIR] [--json FILE]

Every measure runs once a round, section by section in an order that changes; a ratio is taken
within a round, and the tables hold medians over rounds with their range. Cold: the bank was dropped
from the page cache before each pass, and the tier is the one that `auto` takes for a bank that
memory does not hold. Needs 800 KiB of disk a clip.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_gpu
import train_hours
import train_steps
from cache import touch_memory
from machine import describe, machine_facts
from reading import BATCH_SIZE
from synthetic_bank import make_bank
from train_passes import COLD, LOADER, N_LOADS, PassBench
from train_report import (
    Figures,
    Measure,
    Target,
    ratio_table,
    ratios_as_json,
    seconds_table,
)
from train_steps import StepBench

SECTIONS = ("step", "linpre", "mhca", "loader", "gpu", "hours")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    figures = Figures()
    with work_folder(options) as folder:
        facts = machine_facts(folder) | gpu_facts(device)
        print(describe(facts), flush=True)
        if options.pretouch:
            touch_memory(0.3)
        passes = pass_bench(folder, device, options)
        step = StepBench(device, shape=tuple(options.shape), n_classes=options.step_classes)
        measures, targets, notes = chosen(step, passes, device, options)
        run_rounds(measures, figures, options.rounds)
        compared = step.comparison() if "step" in options.only else {}
        notes += passes.byte_notes() if passes else []
    times, left_out = step_times(device, options)
    read = clips_per_s(figures, options)
    hours = train_hours.projection(times, read)
    print(*seconds_table(measures, figures), "", sep="\n")
    print(*ratio_table(targets, figures), "", sep="\n")
    print(*memory_lines(compared), *notes, *left_out, "", sep="\n")
    print(*train_hours.lines(times, read, hours), sep="\n")
    if options.json:
        content: dict[str, Any] = {
            "machine": facts,
            "options": {key: str(value) for key, value in vars(options).items()},
            "ratios": ratios_as_json(targets, figures),
            "figures": asdict(figures),
            "step": compared,
            "bytes": passes.read if passes else {},
            "steps": {
                name: {f"{c} classes, {t} trials": s for (c, t), s in time.seconds.items()}
                for name, time in times.items()
            },
            "hours": hours,
            "notes": [*notes, *left_out],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, or cuda")
    add("--rounds", type=int, default=3)
    add("--clips", type=int, default=1024, help="of the bank [default: 1024, 800 MB]")
    add("--trial-clips", type=int, default=512, help="that many trials see [default: 512]")
    add("--classes", type=int, nargs="+", default=[10], help="of linpre and mhca [default: 10]")
    words = ", ".join(SECTIONS)
    add("--only", nargs="+", default=list(SECTIONS), metavar="WORD", choices=SECTIONS, help=words)
    add("--folder", type=Path, help="where the bank is made; a temporary folder unless given")
    add("--no-pretouch", dest="pretouch", action="store_false", help="use memory as it is")
    add("--json", type=Path, metavar="FILE")
    for name, values in (("--shape", [512, 768]), ("--hours-classes", [10, 100])):
        add(name, type=int, nargs=2, default=values, help=argparse.SUPPRESS)
    add("--step-classes", type=int, default=200, help=argparse.SUPPRESS)
    add("--hours-clips", type=int, default=train_hours.BATCH_SIZE, help=argparse.SUPPRESS)
    add("--hours-s", type=float, default=240.0, help="most seconds to measure every probe's steps")
    options = parser.parse_args(arguments)
    if options.clips % BATCH_SIZE or options.trial_clips % BATCH_SIZE:
        parser.error(f"clips come in batches of {BATCH_SIZE}")
    return options


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where the bank is made; nothing stays there."""
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="patchbank-bench-", dir=options.folder) as folder:
        yield Path(folder)


def pass_bench(folder: Path, device: torch.device, options: argparse.Namespace) -> PassBench | None:
    families = tuple(name for name in ("linpre", "mhca") if name in options.only)
    if not families and "loader" not in options.only:
        return None
    n_patches, dim = options.shape
    say(f"writing a bank of {options.clips} clips of {n_patches} x {dim} float16")
    bank = make_bank(folder / "train.bank", n_clips=options.clips, n_patches=n_patches, dim=dim)
    return PassBench(
        bank, device, tuple(options.classes), families, n_trial_clips=options.trial_clips
    )


def chosen(
    step: StepBench, passes: PassBench | None, device: torch.device, options: argparse.Namespace
) -> tuple[list[Measure], list[Target], list[str]]:
    """What is measured, the ratios that are asked for, and what is missing."""
    measures: list[Measure] = []
    targets: list[Target] = []
    notes: list[str] = []
    if "step" in options.only:
        measures += step.measures()
        targets.append(train_steps.TARGET)
    if passes:
        wanted = [m for m in passes.measures() if m.section.split(",")[0] in options.only]
        measures += wanted
        targets += passes.targets_of()
        notes += passes.missing()
    if "gpu" in options.only:
        reason = train_gpu.missing()
        if reason is None:
            measures += train_gpu.KernelBench(torch.device("cuda")).measures()
            targets.append(train_gpu.TARGET)
        else:
            notes.append(reason)
    return measures, targets, notes


def run_rounds(measures: Sequence[Measure], figures: Figures, n_rounds: int) -> None:
    """Section by section, so that what is compared runs side by side, each in another order."""
    for number in range(n_rounds):
        rng = np.random.default_rng([number, 7])
        for section in rng.permutation(sorted({measure.section for measure in measures})):
            block = [measure for measure in measures if measure.section == section]
            for index in rng.permutation(len(block)):
                seconds = block[index].run()
                figures.add(block[index].key, number, seconds)
                say(f"round {number + 1}/{n_rounds}  {block[index].key}  {seconds:.3g} s")


def step_times(
    device: torch.device, options: argparse.Namespace
) -> tuple[dict[str, train_hours.StepTimes], list[str]]:
    if "hours" not in options.only:
        return {}, []
    say("steps of every probe")
    bench = StepBench(device, n_clips=options.hours_clips, shape=tuple(options.shape))
    return train_hours.measure_steps(bench, options.hours_classes, most_s=options.hours_s)


def clips_per_s(figures: Figures, options: argparse.Namespace) -> float | None:
    """What the loader alone reads from a cold bank."""
    spread = figures.spread(f"loader, {COLD}: {LOADER}")
    return N_LOADS * options.clips / spread.median if spread else None


def memory_lines(compared: dict[str, float]) -> Iterator[str]:
    if compared:
        yield (
            f"after one step from the same weights protobin and plain autograd differ by at most "
            f"{compared['loss difference']:.2g} in the loss and "
            f"{compared['weight difference']:.2g} in a weight"
        )
        yield (
            f"protobin's search has {compared['scratch bytes'] / 2**20:.1f} MiB of scratch; memory "
            f"above what was there grew by {compared['protobin peak bytes'] / 2**20:,.0f} MiB in a "
            f"step, by {compared['plain peak bytes'] / 2**20:,.0f} MiB in one of plain autograd"
        )


def gpu_facts(device: torch.device) -> dict[str, Any]:
    return {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
