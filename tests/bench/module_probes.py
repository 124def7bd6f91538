"""What stacking a user's module by torch.func saves over the loop: ms a training step.

    python tests/bench/module_probes.py [--trials 16] [--clips 64] [--device cpu]

Both ways train the same module on the same tokens; `native` is the shipped linear probe, beside a
linear layer written as a module.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from patchbank.probing.losses import asymmetric
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import Probe, ProbeShape
from patchbank.probing.probes.plugin_build import PluginBuild
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.trials import Trial, TrialStack

EXAMPLE = Path(__file__).parents[2] / "docs/examples/gated_probe.py"


class Linear(nn.Module):
    def __init__(self, shape: ProbeShape) -> None:
        super().__init__()
        self.head = nn.Linear(shape.dim, shape.n_classes)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.head(tokens.mean)


class Hidden(Linear):
    """Two layers on the mean."""

    def __init__(self, shape: ProbeShape) -> None:
        super().__init__(shape)
        self.body = nn.Sequential(nn.Linear(shape.dim, shape.dim), nn.GELU(), nn.Dropout(0.2))

    def forward(self, tokens: Tokens) -> Tensor:
        return self.head(self.body(tokens.mean))


def one_by_one(probe: Probe) -> Probe:
    probe.__dict__["_hindrance"] = "asked for"
    return probe


def step_ms(probes: Sequence[Probe], trials: list[Trial], tokens: Tokens, n_steps: int) -> list:
    """The fastest step of each, taken in turn so that a busy machine slows all of them."""
    stacks = [TrialStack("x", one, trials, device=tokens.device) for one in probes]
    targets = (torch.rand(len(tokens), probes[0].shape.n_classes) < 0.1).float().to(tokens.device)
    best = [float("inf")] * len(stacks)
    for _ in range(n_steps):
        for index, stack in enumerate(stacks):
            begin = time.perf_counter()
            stack.step(tokens, targets, asymmetric, factor=1.0)
            if tokens.device.type == "cuda":
                torch.cuda.synchronize()
            best[index] = min(best[index], 1e3 * (time.perf_counter() - begin))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--patches", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    shape = ProbeShape(asked.dim, asked.classes, grid=(asked.patches, 1))
    trials = [Trial(1e-3, 1e-4, seed) for seed in range(asked.trials)]
    tokens = Tokens(torch.randn(asked.clips, asked.patches, asked.dim, device=asked.device))

    def module(make: type[nn.Module]) -> Probe:
        return PluginBuild("x", "x", lambda shape, options: make(shape))(shape, {})

    rows = {
        "linear": [module(Linear), one_by_one(module(Linear)), build_probe("linear", shape)],
        "two layers": [module(Hidden), one_by_one(module(Hidden))],
        "gated": [build_probe(str(EXAMPLE), shape), one_by_one(build_probe(str(EXAMPLE), shape))],
    }
    notes = {name: probes[0].note for name, probes in rows.items()}
    print(f"{'':12}{'stacked':>10}{'loop':>10}{'ratio':>8}{'native':>10}   ms a step")
    for name, probes in rows.items():
        stacked, loop, *native = step_ms(probes, trials, tokens, asked.steps)
        told = f"{native[0]:10.2f}" if native else ""
        print(f"{name:12}{stacked:10.2f}{loop:10.2f}{loop / stacked:8.1f}{told}   {notes[name]}")


if __name__ == "__main__":
    main()
