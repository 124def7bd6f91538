"""The fused similarity and maximum on a GPU, against a cuBLAS product of the same shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from train_report import Measure, Target

from patchbank.probing.probes.stored_directions import (
    StoredDirections,
    directions_of_floats,
    why_no_kernel,
)

SECTION = "GPU"
FUSED, PRODUCT = "fused similarity and maximum", "cuBLAS product alone"
N_CLIPS, N_PATCHES, DIM, N_PROTOTYPES = 64, 512, 768, 5_270
N_RUNS = 20
TARGET = Target(
    SECTION,
    f"cuBLAS product / fused kernel, {N_CLIPS} x {N_PATCHES} x {DIM}, {N_PROTOTYPES:,} prototypes",
    above=PRODUCT,
    below=FUSED,
    limit=0.6,
)


def missing() -> str | None:
    """Why there is nothing to measure."""
    if not torch.cuda.is_available():
        return "fused similarity-max against cuBLAS: no GPU: missing"
    if reason := why_no_kernel():
        return f"fused similarity-max against cuBLAS: {reason}: missing"
    return None


@dataclass
class KernelBench:
    """Float16 tokens and prototypes; the product is written as float16, as cuBLAS does it best."""

    device: torch.device

    @cached_property
    def _tokens(self) -> StoredDirections:
        random = torch.Generator().manual_seed(0)
        patches = torch.randn(N_CLIPS, N_PATCHES, DIM, generator=random).half()
        return directions_of_floats(patches.to(self.device), None)

    @cached_property
    def _prototypes(self) -> Tensor:
        random = torch.Generator().manual_seed(1)
        drawn = torch.randn(N_PROTOTYPES, DIM, generator=random)
        return torch.nn.functional.normalize(drawn, dim=-1).to(self.device)

    def measures(self) -> Iterator[Measure]:
        flat, half = self._tokens.raw.flatten(0, 1), self._prototypes.half().T
        out = flat.new_empty(len(flat), N_PROTOTYPES)
        yield Measure(SECTION, PRODUCT, lambda: timed(lambda: torch.mm(flat, half, out=out)))
        yield Measure(SECTION, FUSED, lambda: timed(self._fused))

    def _fused(self) -> object:
        from patchbank.probing.probes.best_match_triton import match_stored

        return match_stored(self._tokens, self._prototypes)


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run, the mean of several that follow each other."""
    run()  # compiled and tuned
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(N_RUNS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / N_RUNS
