"""Passes over a bank on the disk: many trials in one read, and a pass beside the loader alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from cache import make_cold, make_warm
from reading import BATCH_SIZE
from train_report import Measure, Target
from train_steps import wait_for

from patchbank.pipeline.bank.reader import Bank
from patchbank.probing.bank_source import BankSource
from patchbank.probing.losses import asymmetric
from patchbank.probing.passes import Course
from patchbank.probing.plan import batches
from patchbank.probing.probes import PROBES, build_probe
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.ring import N_SLOTS
from patchbank.probing.settings import TrainSettings
from patchbank.probing.tiers import Tier
from patchbank.probing.training import fit
from patchbank.probing.trials import Trial, TrialStack

N_TRIALS = 16
N_LOADS = 3
"""Passes that are timed together where a pass is short."""
MOST = {"linpre": 0.15, "mhca": 0.6}
"""Sixteen trials in one pass, by sixteen passes of one."""
LOADER, LINEAR = "the loader alone", "linear"
COLD, WARM = "cold", "warm"
TIER_OF: dict[str, Tier] = {COLD: "direct", WARM: "read"}
"""`auto` takes `direct` for a bank that memory does not hold, `read` for one in the page cache."""


def bytes_read() -> int:
    """Bytes that this process has fetched from storage so far."""
    return _counter("read_bytes")


def bytes_asked() -> int:
    """Bytes that this process's read calls have returned so far, cached or not."""
    return _counter("rchar")


def _counter(name: str) -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return 0


@dataclass
class PassBench:
    """Passes over one bank, each in batches of 64 and the same order."""

    bank: Bank
    device: torch.device
    class_counts: tuple[int, ...] = (10, 50)
    families: tuple[str, ...] = ("linpre", "mhca")
    read: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    """Bytes of each cold pass, by measure."""

    n_trial_clips: int | None = None
    """Clips of the passes of many trials, the first of the bank; all where None."""
    sources: dict[str, BankSource] = field(default_factory=dict)
    """By state, one for all passes: a ring that has been used costs no page faults."""

    @property
    def rows(self) -> np.ndarray:
        return np.arange(self.bank.n_rows)

    def targets(self, n_classes: int) -> np.ndarray:
        random = np.random.default_rng(0)
        return (random.random((self.bank.n_rows, n_classes)) < 2 / n_classes).astype(np.float32)

    def missing(self) -> list[str]:
        return [f"{name} is not there: left out" for name in self.families if name not in PROBES]

    def measures(self) -> Iterator[Measure]:
        for name in self.families:
            if name in PROBES:
                for n_classes in self.class_counts:
                    yield from self._family(name, n_classes)
        for state in (COLD, WARM):
            section = f"loader, {state}"
            note = f"tier {TIER_OF[state]}"
            yield Measure(section, LOADER, lambda state=state: self._load(state), note)
            yield Measure(section, LINEAR, lambda state=state: self._linear(state), note)

    def _family(self, name: str, n_classes: int) -> Iterator[Measure]:
        section, note = f"{name}, {n_classes} classes", "cold, tier direct"
        seeds = list(range(N_TRIALS))

        def together() -> float:
            return self._counted(f"{section}: together", name, n_classes, [seeds])

        def apart() -> float:
            return self._counted(f"{section}: apart", name, n_classes, [[seed] for seed in seeds])

        yield Measure(section, f"{N_TRIALS} trials in one pass", together, note)
        yield Measure(section, f"{N_TRIALS} passes of one trial", apart, note)

    def targets_of(self) -> Iterator[Target]:
        for name in self.families:
            for n_classes in self.class_counts:
                yield Target(
                    f"{name}, {n_classes} classes",
                    f"{N_TRIALS} {name} trials in one pass / in {N_TRIALS}, {n_classes} classes",
                    f"{N_TRIALS} trials in one pass",
                    f"{N_TRIALS} passes of one trial",
                    limit=MOST.get(name),
                    is_most=True,
                )
        for state in (COLD, WARM):
            name = f"clips/s of a linear pass / of the loader alone, {state}"
            yield Target(f"loader, {state}", name, LOADER, LINEAR, limit=0.9)

    def _counted(self, key: str, name: str, n_classes: int, runs: list[list[int]]) -> float:
        """Seconds of some passes, and the bytes that each of them fetched."""
        total = 0.0
        for seeds in runs:
            self._prepare(COLD)
            fetched, asked = bytes_read(), bytes_asked()
            total += self._pass(name, n_classes, seeds, COLD, self.rows[: self.n_trial_clips])
            found = {"fetched": bytes_read() - fetched, "asked": bytes_asked() - asked}
            self.read.setdefault(key, []).append(found)
        return total

    def _prepare(self, state: str) -> None:
        self._source(state)  # opened before the clock and the counters run
        (make_cold if state == COLD else make_warm)(self.bank.path)

    def _source(self, state: str) -> BankSource:
        if state not in self.sources:
            source = BankSource(
                self.bank, arrays=("patches",), tier=TIER_OF[state], device=self.device
            )
            for _ in source.read([self.rows[:BATCH_SIZE]] * 2 * N_SLOTS):
                pass
            self.sources[state] = source
        return self.sources[state]

    def _pass(
        self, name: str, n_classes: int, seeds: list[int], state: str, rows: np.ndarray
    ) -> float:
        """Seconds of one epoch, to the last update."""
        probe = build_probe(name, ProbeShape(self._dim, n_classes))
        trials = [Trial(1e-3, 1e-4, seed) for seed in seeds]
        stack = TrialStack(name, probe, trials, device=self.device)
        settings = TrainSettings(n_epochs=1, batch_size=BATCH_SIZE, device=str(self.device))
        course = Course(stack, self.targets(n_classes), rows, asymmetric)
        return self._timed(lambda: fit([course], self._source(state), settings=settings))

    def _linear(self, state: str) -> float:
        """Seconds of some passes of one linear probe on the mean token."""
        total = 0.0
        for _ in range(N_LOADS):
            self._prepare(state)
            total += self._pass(LINEAR, 10, [0], state, self.rows)
        return total

    def _load(self, state: str) -> float:
        """Seconds of the same passes without a probe; no token is touched."""

        def run() -> None:
            for _ in self._source(state).read(plan):
                pass

        plan = batches(self.rows, batch_size=BATCH_SIZE, seed=0, epoch=0)
        total = 0.0
        for _ in range(N_LOADS):
            self._prepare(state)
            total += self._timed(run)
        return total

    def _timed(self, run: Callable[[], None]) -> float:
        start = time.perf_counter()
        run()
        wait_for(self.device)
        return time.perf_counter() - start

    @property
    def _dim(self) -> int:
        return self.bank.array(self.bank.resolve_layer(None)).dim

    def byte_notes(self) -> Iterator[str]:
        """Bytes of sixteen trials by bytes of one, as the kernel counted them."""
        for key, found in self.read.items():
            section, _, kind = key.partition(": ")
            if kind != "together":
                continue
            alone = self.read.get(f"{section}: apart", [])
            for what in ("fetched", "asked"):
                many = np.median([one[what] for one in found])
                one = np.median([one[what] for one in alone]) if alone else 0
                if one:
                    yield (
                        f"bytes {what} ({section}): {many / 2**20:,.1f} MiB in a pass of "
                        f"{N_TRIALS} trials / {one / 2**20:,.1f} MiB in a pass of one = "
                        f"{many / one:.4f}"
                    )
                else:
                    yield f"bytes {what} ({section}): the kernel counts none here"
