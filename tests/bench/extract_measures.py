"""What the benchmark of extraction runs once a round, each in a process of its own."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import extract_bare
import usual_loop
from extract_bare import BareJob
from extract_cases import Case
from extract_report import NO_START, WHOLE, Figures
from extract_runs import Extract, Ran, run_process, without_start_up
from extract_sizes import Size
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
        is_cpu = not self.options.is_gpu
        if (
            case.is_encoder
            and is_cpu
            and chosen("workers")
            and not missing_for_workers(self.extract)
        ):
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
    """Options that one and two CPU workers need and this version lacks."""
    return [flag for flag in ("--workers", "--threads") if flag not in extract.flags]


def is_chosen(case: Case, kind: str, options: argparse.Namespace) -> bool:
    """Whether `--only` names the case, the kind, or where both are named, both."""
    if options.whole_case not in (None, case.name):
        return kind == "command" and not case.is_encoder
    kinds = set(options.only) & set(KINDS)
    names = set(options.only) - kinds
    return (not kinds or kind in kinds) and (not names or case.name in names)
