"""Training steps on tokens in memory: protobin against plain autograd, and every probe's step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from cache import resident_bytes
from torch import Tensor
from train_report import Measure, Target

from patchbank.probing.batch import Batch
from patchbank.probing.losses import asymmetric
from patchbank.probing.probes import PROBES, best_match, build_probe
from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Probe,
    ProbeShape,
    Weights,
    apply_dropout,
    apply_linear,
)
from patchbank.probing.probes.prototypes import PrototypeProbe, binarise
from patchbank.probing.probes.tokens import Buffers, Tokens, convert
from patchbank.probing.trials import Trial, TrialStack

SECTION = "step"
OWN, PLAIN = "protobin", "protobin, plain autograd"
TARGET = Target(
    SECTION, "plain autograd / protobin step (times as fast)", above=PLAIN, below=OWN, limit=1.6
)
EVERY_S = 0.002


@dataclass(frozen=True)
class PlainPrototypes(PrototypeProbe):
    """protobin as one writes it: all similarities in one product, their maximum, autograd."""

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        latent = weights["prototypes"]
        prototypes = F.normalize(binarise(latent), dim=-1).flatten(0, 1)
        best = torch.matmul(tokens.directions, prototypes.T).max(dim=1).values
        features = best.view(len(best), len(latent), -1).transpose(0, 1)
        kept = apply_dropout(features, self.dropout, dropout)
        return apply_linear(kept, weights["weight"], weights["bias"])


@dataclass
class StepBench:
    """Batches of float16 tokens that are ready, as a loader hands them out."""

    device: torch.device
    n_clips: int = 64
    shape: tuple[int, int] = (512, 768)
    n_classes: int = 200
    stacks: dict[str, TrialStack] = field(default_factory=dict)

    @cached_property
    def batch(self) -> Batch:
        random = torch.Generator().manual_seed(0)
        patches = torch.randn(self.n_clips, *self.shape, generator=random).half()
        cls = torch.randn(self.n_clips, 1, self.shape[1], generator=random).half()
        return Batch.of(np.arange(self.n_clips), patches.to(self.device), cls.to(self.device))

    @cached_property
    def buffers(self) -> Buffers:
        return Buffers()

    def targets(self, n_classes: int) -> Tensor:
        random = torch.Generator().manual_seed(1)
        drawn = torch.rand(self.n_clips, n_classes, generator=random) < 2 / n_classes
        return drawn.float().to(self.device)

    def step(self, stack: TrialStack, targets: Tensor) -> Tensor:
        """One step from stored tokens to updated weights; the losses before it."""
        tokens = convert(self.batch, dtype=torch.float32, device=self.device, buffers=self.buffers)
        return stack.step(tokens, targets, asymmetric, factor=1.0)

    def timed(self, stack: TrialStack, targets: Tensor) -> float:
        wait_for(self.device)
        start = time.perf_counter()
        self.step(stack, targets)
        wait_for(self.device)
        return time.perf_counter() - start

    def prototypes(self, name: str) -> TrialStack:
        """The stack of one trial, own or plain, from the same first weights."""
        shape = ProbeShape(self.shape[1], self.n_classes)
        own = build_probe("protobin", shape)
        assert isinstance(own, PrototypeProbe)
        probe = own if name == OWN else PlainPrototypes(shape, is_binary=True, **own.options)
        return TrialStack("protobin", probe, [Trial(5e-3, 1e-4, 0)], device=self.device)

    def measures(self) -> Iterator[Measure]:
        n_prototypes = 20 * self.n_classes
        note = f"{self.n_clips} clips of {self.shape[0]} x {self.shape[1]}, {n_prototypes:,} each"
        targets = self.targets(self.n_classes)
        for name in (OWN, PLAIN):

            def run(name: str = name) -> float:
                if name not in self.stacks:
                    self.stacks[name] = self.prototypes(name)
                return self.timed(self.stacks[name], targets)

            yield Measure(SECTION, name, run, note)

    def comparison(self) -> dict[str, float]:
        """Largest differences after one step from the same weights, and memory: bytes at most."""
        targets = self.targets(self.n_classes)
        stacks = {name: self.prototypes(name) for name in (OWN, PLAIN)}
        losses, peaks = {}, {}
        self.step(self.prototypes(OWN), targets)  # what all steps share is there before
        for name, stack in stacks.items():
            with MemoryPeak(self.device) as peak:
                losses[name] = self.step(stack, targets)
            peaks[name] = peak.n_bytes
        own, plain = stacks[OWN], stacks[PLAIN]
        return {
            "loss difference": float((losses[OWN] - losses[PLAIN]).abs().max()),
            "weight difference": max(
                float((own.weights[key] - plain.weights[key]).abs().max()) for key in own.weights
            ),
            "scratch bytes": float(self.scratch_bytes),
            "protobin peak bytes": float(peaks[OWN]),
            "plain peak bytes": float(peaks[PLAIN]),
        }

    @property
    def scratch_bytes(self) -> int:
        """What protobin's search takes beside its result: stated, not measured."""
        if self.device.type == "cuda":
            return 0  # the kernel keeps a block in registers
        n_patches, n_prototypes = self.shape[0], 20 * self.n_classes
        height, width = best_match.block_size(self.n_clips, n_patches, n_prototypes, self.device)
        return 4 * height * width * n_patches

    def family_stack(self, name: str, n_classes: int, n_trials: int) -> TrialStack:
        """A stack of one family on these tokens; AudioSet's prototypes as the paper has them."""
        shape = ProbeShape(self.shape[1], n_classes, 1, grid=(self.shape[0] // 8, 8))
        trials = [Trial(1e-3, 1e-4, seed) for seed in range(n_trials)]
        return TrialStack(name, self.family(name, shape), trials, device=self.device)

    def family(self, name: str, shape: ProbeShape) -> Probe:
        return build_probe(name, shape)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MemoryPeak:
    """Memory that a block of code takes at most, above what was taken before it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.n_bytes = device, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.n_bytes = max(self.n_bytes, resident_bytes() - self._before)

    def __enter__(self) -> MemoryPeak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._before = resident_bytes()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            wait_for(self._device)
            self.n_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._stop.set()
        self._thread.join()


def paper_probes() -> list[str]:
    """The paper's eleven, as far as they are there; those that take longest on a CPU last."""
    names = ("linear", "mlp", "linearc", "linpre", "mhca", "ep", "simpool", "protobin", "proto")
    return [name for name in (*names, "abmilp", "conv") if name in PROBES]
