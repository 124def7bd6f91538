"""How near `patchbank extract` comes to its encoder, and how it compares with the usual loop.

    python tests/bench/extract.py [--device cuda] [--rounds 3] [--seconds 60] [--only WORD...]

Every measure runs once a round in a process of its own, in an order that changes; a ratio is taken
within a round, and the table holds medians over rounds. "Whole" is from a process's start to its
end; "without start-up" is what the command, or the loop, says of itself: from its first clip to its
last. "Bare" is the encoder on batches that are ready, in the fastest of some ways.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from extract_cases import Case, cases
from extract_measures import KINDS, N_CORES, Bench, Measure, is_chosen, missing_for_workers
from extract_report import (
    Figures,
    lines_of,
    memory_notes,
    print_lines,
    profile_table,
    rate_notes,
)
from extract_runs import Extract, RunFailed
from extract_sizes import size_of
from machine import describe, machine_facts


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    figures = Figures()
    with work_folder(options) as folder:
        facts = machine_facts(folder) | gpu_facts(options)
        print(describe(facts), *gpu_line(facts), sep="\n", flush=True)
        extract = Extract(options.device, folder)
        notes, failed = [*missing_parts(extract, options)], []
        benches = []
        for case in chosen_cases(folder, options, notes):
            try:
                benches.append(prepare(case, extract, figures, options))
            except RunFailed as error:
                failed.append(f"failed before the rounds: {case.name}: {error}")
                say(failed[-1])
        failed += run_rounds([m for bench in benches for m in bench.measures()], options.rounds)
    lines = [line for bench in benches for line in lines_of(figures, bench.case)]
    print_lines(lines)
    for bench in benches:
        notes += bench.size.notes
        notes += memory_notes(figures, bench.case)
        if not options.quick:
            notes += rate_notes(figures, bench.case, n_cores=N_CORES, is_gpu=options.is_gpu)
    for name, profile in figures.profiles.items():
        notes += profile_table(name, profile)
    print("", *notes, *failed, sep="\n")
    if options.json:
        content = {
            "machine": facts,
            "options": {key: str(value) for key, value in vars(options).items()},
            "sizes": {bench.case.name: asdict(bench.size) for bench in benches},
            "table": [asdict(line) for line in lines],
            "figures": asdict(figures),
            "notes": notes,
            "failed": failed,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if failed:
        raise SystemExit(1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, or cuda")
    add("--rounds", type=int, help="[default: 3]")
    add("--seconds", type=float, help="that a run of the command takes, about [default: 60]")
    add("--files", type=int, help="distinct audio files [default: 512]")
    add("--weights", type=Path, help="an efficientat file [default: mn04 under PATCHBANK_SHARED]")
    words = f"cases (mn04, vit-s, vit-b, ceiling) and kinds ({', '.join(KINDS)})"
    add("--only", nargs="+", default=[], metavar="WORD", help=words)
    add("--cold", action="store_true", help="drop the audio from the page cache before each run")
    add("--quick", action="store_true", help="a try with tiny encoders; its figures mean nothing")
    add("--json", type=Path, metavar="FILE")
    add("--keep", type=Path, metavar="FOLDER", help="work there and leave audio and weights")
    options = parser.parse_args(arguments)
    for name, usual, quick in (("rounds", 3, 1), ("seconds", 60.0, 1.0), ("files", 512, 16)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    options.whole_case = None
    options.bare_seconds = options.seconds / 6
    options.is_gpu = options.device.startswith("cuda")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"there are no weights at {options.weights}")
    known = {"mn04", "vit-s", "vit-b", "ceiling", *KINDS}
    if unknown := sorted(set(options.only) - known):
        parser.error(f"--only {' '.join(unknown)}: there are {words}")
    return options


def chosen_cases(folder: Path, options: argparse.Namespace, notes: list[str]) -> list[Case]:
    """The cases of which something was asked for; what else is left out comes to the notes."""
    found: list[Case] = []
    for case in cases(
        folder,
        device=options.device,
        weights=options.weights,
        n_files=options.files,
        quick=options.quick,
    ):
        if isinstance(case, str):
            notes.append(case)
        else:
            found.append(case)
    if options.quick and not options.only:
        options.whole_case = found[0].name
        others = ", ".join(case.name for case in found[1:] if case.is_encoder)
        if others:
            notes.append(f"--quick leaves out {others}; name it with --only")
    return [case for case in found if any(is_chosen(case, kind, options) for kind in KINDS)]


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        yield options.keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="patchbank-bench-") as folder:
        yield Path(folder)


def prepare(case: Case, extract: Extract, figures: Figures, options: argparse.Namespace) -> Bench:
    say(f"{case.name}: audio, weights, and how many clips a run has")
    case.audio.make()
    case.audio.into_cache(cold=False)
    weights = case.write_weights(extract.folder) if case.write_weights else None
    size = size_of(case, weights, extract, options)
    return Bench(case, weights, size, extract, figures, options)


def run_rounds(measures: Sequence[Measure], n_rounds: int) -> list[str]:
    """Runs everything once a round; what failed, by name. Ctrl-C and SIGTERM end it early, and what
    was measured until then is printed."""
    failed: list[str] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for number in range(n_rounds):
        for index in np.random.default_rng([number, 5]).permutation(len(measures)):
            measure = measures[index]
            if measure.once and number:
                continue
            say(f"round {number + 1}/{n_rounds}  {measure.name}")
            try:
                measure.run(measure.name, number)
            except KeyboardInterrupt:
                return [*failed, f"ended early, in round {number + 1}: {measure.name}"]
            except RunFailed as error:
                failed.append(f"failed in round {number + 1}: {measure.name}: {error}")
                say(failed[-1])
    return failed


def missing_parts(extract: Extract, options: argparse.Namespace) -> Iterator[str]:
    """What is left out, and where the audio is."""
    where = "dropped from the page cache before each run" if options.cold else "in the page cache"
    yield f"audio is {where}; {options.files} distinct files, listed as often as needed"
    if options.quick:
        yield "--quick: tiny encoders and short runs; the figures mean nothing"
    if "--profile" not in extract.flags:
        yield "this version has no --profile: the command's rates without start-up are left out"
    if options.is_gpu:
        yield "one and two CPU workers are left out: they are compared on a CPU"
    elif lacking := missing_for_workers(extract):
        yield f"this version has no {' and no '.join(lacking)}: one and two workers are left out"
    elif not shutil.which("taskset"):
        yield "there is no taskset: one worker on one core is left out"
    if not find_spec("h5py"):
        yield "h5py is not installed (pip install -e '.[bench]'): the usual loop is left out"
    if options.is_gpu and not shutil.which("nvidia-smi"):
        yield "there is no nvidia-smi: GPU memory of the command and of the loop is left out"


def gpu_facts(options: argparse.Namespace) -> dict[str, Any]:
    if not options.is_gpu:
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(options.device)}


def gpu_line(facts: dict[str, Any]) -> list[str]:
    return [f"GPU: {facts['gpu']}"] if "gpu" in facts else []


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
