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
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import extract_bare
import numpy as np
import usual_loop
from extract_bare import BareJob
from extract_cases import Case, cases
from extract_report import (
    NO_START,
    WHOLE,
    Figures,
    lines_of,
    notes_of,
    print_lines,
    profile_table,
)
from extract_runs import Extract, Ran, RunFailed, run_process, without_start_up
from extract_sizes import Size, size_of
from machine import describe, machine_facts
from usual_loop import LoopJob

HERE = Path(__file__).parent
KINDS = ("bare", "command", "usual", "workers")
N_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Measure:
    """Something that runs in every round, or in the first one."""

    name: str
    run: Callable[[str, int], None]
    once: bool = False


@dataclass(frozen=True)
class Bench:
    """What is measured of one case."""

    case: Case
    weights: Path | None
    size: Size
    extract: Extract
    figures: Figures
    options: argparse.Namespace

    def measures(self) -> Iterator[Measure]:
        """Those that were asked for."""
        case, chosen = self.case, partial(is_chosen, self.case, options=self.options)
        if case.is_encoder and chosen("bare"):
            for job in self._bare_jobs():
                yield Measure(f"{case.name} bare {job.name}", partial(self._bare, job))
        if chosen("command"):
            for dtype in case.dtypes:
                yield Measure(f"{case.name} command {dtype}", partial(self._command, dtype=dtype))
        if case.is_encoder and chosen("usual") and find_spec("h5py"):
            yield Measure(f"{case.name} usual loop", self._usual)
        if case.is_encoder and chosen("workers") and not missing_for_workers(self.extract):
            one, two = worker_options(1), worker_options(2)
            run = partial(self._command, n_clips=self.size.n_clips_of_workers)
            yield Measure(f"{case.name} 1 worker", partial(run, options=one))
            yield Measure(f"{case.name} 2 workers", partial(run, options=two))
            if shutil.which("taskset"):
                core = min(os.sched_getaffinity(0))
                run = partial(run, options=one, core=core)
                yield Measure(f"{case.name} 1 worker on one core", run, once=True)

    def _bare_jobs(self) -> list[BareJob]:
        job: dict[str, Any] = {
            "encoder": self.case.encoder,
            "weights": str(self.weights) if self.weights else None,
            "device": self.options.device,
            "seconds": self.options.bare_seconds,
            "paths": [str(path) for path in self.case.audio.paths],
        }
        if self.options.is_gpu:
            return extract_bare.gpu_ways(job)
        return extract_bare.cpu_ways(job, batch_size=self.size.batch_size)

    def _bare(self, job: BareJob, name: str, number: int) -> None:
        ran = run_process([sys.executable, HERE / "extract_bare.py", extract_bare.as_argument(job)])
        for what, rate in ran.facts["rates"].items():
            self.figures.add(f"{self.case.name} bare {what}: {job.name}", number, rate)
        self._note_memory(name, ran, ran.facts.get("peak_gpu_bytes"))

    def _command(
        self,
        name: str,
        number: int,
        *,
        dtype: str = "float16",
        n_clips: int | None = None,
        options: Sequence[str] = (),
        core: int | None = None,
    ) -> None:
        n_clips, audio = n_clips or self.size.n_clips, self.case.audio
        audio.into_cache(cold=self.options.cold)
        ran = self.extract.run(
            audio.table(n_clips),
            encoder=self.case.encoder,
            weights=self.weights,
            dtype=dtype,
            options=options,
            core=core,
        )
        self._add(name, number, n_clips, ran)
        if isinstance(profile := ran.facts.get("profile"), dict):
            self.figures.profiles[name] = profile

    def _usual(self, name: str, number: int) -> None:
        audio, out = self.case.audio, self.extract.folder / "usual.h5"
        audio.into_cache(cold=self.options.cold)
        job = LoopJob(
            encoder=self.case.encoder,
            weights=str(self.weights),
            device=self.options.device,
            batch_size=64 if self.options.is_gpu else 16,
            n_workers=N_CORES,
            table=str(audio.table(self.size.n_clips)),
            out=str(out),
        )
        os.sync()
        try:
            ran = run_process(
                [sys.executable, HERE / "usual_loop.py", usual_loop.as_argument(job)],
                watches_gpu=self.options.is_gpu,
            )
        finally:
            out.unlink(missing_ok=True)
        self._add(name, number, self.size.n_clips, ran)

    def _add(self, name: str, number: int, n_clips: int, ran: Ran) -> None:
        self.figures.add(f"{name}, {WHOLE}", number, n_clips / ran.seconds)
        self.figures.add(f"{name}, {NO_START}", number, without_start_up(ran.facts))
        self._note_memory(name, ran, ran.peak_gpu_bytes)

    def _note_memory(self, name: str, ran: Ran, gpu_bytes: int | None) -> None:
        memory, gpu = self.figures.memory, self.figures.gpu_memory
        memory[name] = max(memory.get(name, 0), ran.peak_rss_bytes)
        if gpu_bytes is not None:
            gpu[name] = max(gpu.get(name, 0), gpu_bytes)


def worker_options(n_workers: int) -> list[str]:
    return ["--workers", str(n_workers), "--threads", "1"]


def missing_for_workers(extract: Extract) -> list[str]:
    return [flag for flag in ("--workers", "--threads") if flag not in extract.flags]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with work_folder(options) as folder:
        facts = machine_facts(folder) | gpu_facts(options)
        print(describe(facts), *gpu_line(facts), sep="\n", flush=True)
        extract = Extract(options.device, folder)
        figures, notes = Figures(), [*missing_parts(extract, options)]
        chosen: list[Case] = []
        benches: list[Bench] = []
        for case in cases(
            folder,
            device=options.device,
            weights=options.weights,
            n_files=options.files,
            quick=options.quick,
        ):
            if isinstance(case, str):
                notes.append(case)
            elif any(is_chosen(case, kind, options=options) for kind in KINDS):
                weights = prepare(case, folder)
                size = size_of(case, weights, extract, options)
                notes += size.notes
                chosen.append(case)
                benches.append(Bench(case, weights, size, extract, figures, options))
        failed = run_rounds([m for bench in benches for m in bench.measures()], options.rounds)
    lines = [line for case in chosen for line in lines_of(figures, case)]
    print_lines(lines)
    print()
    for case in chosen:
        notes += notes_of(figures, case, n_cores=N_CORES, is_gpu=options.is_gpu)
    for name, profile in figures.profiles.items():
        notes += profile_table(name, profile)
    print(*notes, *failed, sep="\n")
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
    for name, usual, quick in (("rounds", 3, 1), ("seconds", 60.0, 2.0), ("files", 512, 24)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    options.bare_seconds = options.seconds / 6
    options.is_gpu = options.device.startswith("cuda")
    if options.weights is not None and not options.weights.is_file():
        parser.error(f"there are no weights at {options.weights}")
    known = {"mn04", "vit-s", "vit-b", "ceiling", *KINDS}
    if unknown := sorted(set(options.only) - known):
        parser.error(f"--only {' '.join(unknown)}: there are {words}")
    return options


def is_chosen(case: Case, kind: str, *, options: argparse.Namespace) -> bool:
    """Whether `--only` names the case, the kind, or where both are named, both."""
    kinds = set(options.only) & set(KINDS)
    names = set(options.only) - kinds
    return (not kinds or kind in kinds) and (not names or case.name in names)


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        yield options.keep.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="patchbank-bench-") as folder:
        yield Path(folder)


def prepare(case: Case, folder: Path) -> Path | None:
    say(f"{case.name}: audio and weights")
    case.audio.make()
    case.audio.into_cache(cold=False)
    return case.write_weights(folder) if case.write_weights else None


def run_rounds(measures: Sequence[Measure], n_rounds: int) -> list[str]:
    """Runs everything once a round; what failed, by name."""
    failed: list[str] = []
    for number in range(n_rounds):
        for index in np.random.default_rng([number, 5]).permutation(len(measures)):
            measure = measures[index]
            if measure.once and number:
                continue
            say(f"round {number + 1}/{n_rounds}  {measure.name}")
            try:
                measure.run(measure.name, number)
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
    if lacking := missing_for_workers(extract):
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
