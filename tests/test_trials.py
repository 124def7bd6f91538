from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchbank.pipeline.errors import TrialError
from patchbank.probing.losses import asymmetric, cross_entropy
from patchbank.probing.optimiser import StackedAdamW, cosine_factor
from patchbank.probing.probes import PROBES, build_probe
from patchbank.probing.probes.base import Dropout, Probe, ProbeShape, Weights
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.trials import Trial, TrialStack

SHAPE = ProbeShape(24, 3, 1)
LEARNING = [name for name in PROBES if name != "knn"]
# 10,000 prototypes on tokens this small move a logit by hundreds in one step.
OPTIONS = {"cgp": {"n_prototypes": 50}}
# A step of a probe with batch norm goes further than that of others at the same rate.
RATES = {"ep": 5e-3}
TRIALS = [Trial(1e-3, 1e-4, 0), Trial(3e-2, 0.1, 0), Trial(1e-3, 1e-4, 1)]


def trained(
    name: str, trials: list[Trial], *, n_steps: int, dtype: torch.dtype
) -> tuple[TrialStack, torch.Tensor]:
    """A stack after `n_steps` on seeded batches, and its losses (step, trial)."""
    probe = build_probe(name, SHAPE, OPTIONS.get(name))
    return train_on_noise(TrialStack(name, probe, trials, dtype=dtype), n_steps)


def train_on_noise(stack: TrialStack, n_steps: int) -> tuple[TrialStack, torch.Tensor]:
    """The stack after some steps on seeded batches, and its losses (step, trial)."""
    dtype = next(iter(stack.weights.values())).dtype
    random = torch.Generator().manual_seed(0)
    losses = []
    for step in range(n_steps):
        patches = torch.randn(6, 5, 24, generator=random, dtype=torch.float64).to(dtype)
        prefix = torch.randn(6, 1, 24, generator=random, dtype=torch.float64).to(dtype)
        targets = (torch.rand(6, 3, generator=random) < 0.4).to(dtype)
        factor = cosine_factor(step, n_steps=n_steps)
        losses.append(stack.step(Tokens(patches, prefix), targets, asymmetric, factor=factor))
    return stack, torch.stack(losses)


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize(
    ("dtype", "n_steps", "rtol"),
    [(torch.float64, 50, 1e-6), (torch.float32, 5, 1e-4)],
    ids=["float64", "float32"],
)
def test_a_trial_is_the_same_together_and_alone(
    name: str, dtype: torch.dtype, n_steps: int, rtol: float
) -> None:
    together, losses = trained(name, TRIALS, n_steps=n_steps, dtype=dtype)
    for index, trial in enumerate(TRIALS):
        alone, own_losses = trained(name, [trial], n_steps=n_steps, dtype=dtype)
        torch.testing.assert_close(losses[:, index], own_losses[:, 0], rtol=rtol, atol=0)
        for key, value in alone.weights_of(0).items():
            found = together.weights_of(index)[key]
            torch.testing.assert_close(found, value, rtol=rtol, atol=1e-9 if n_steps > 5 else 1e-6)


def test_trials_differ_by_learning_rate_and_by_seed() -> None:
    _, losses = trained("protobin", TRIALS, n_steps=3, dtype=torch.float64)
    assert losses[0, 0] == losses[0, 1], "the learning rate must not reach the first weights"
    assert losses[0, 0] != losses[0, 2]
    assert losses[1, 0] != losses[1, 1]


def test_a_trial_that_diverges_leaves_the_others_alone() -> None:
    mad = Trial(math.inf, 0.0, 0)
    together, losses = trained("protobin", [TRIALS[0], mad], n_steps=20, dtype=torch.float64)
    alone, own_losses = trained("protobin", [TRIALS[0]], n_steps=20, dtype=torch.float64)
    assert together.is_finite.tolist() == [True, False]
    torch.testing.assert_close(losses[:, 0], own_losses[:, 0], rtol=1e-6, atol=0)
    found, expected = together.weights_of(0)["weight"], alone.weights_of(0)["weight"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", LEARNING)
def test_every_family_learns_soft_targets(name: str) -> None:
    """At the optimum of cross-entropy the probabilities are the targets."""
    probe = build_probe(name, SHAPE, OPTIONS.get(name))
    stack = TrialStack(name, probe, [Trial(RATES.get(name, 3e-2), 0.0, 0)])
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 5, 24, generator=random)
    tokens = Tokens(patches, torch.randn(3, 1, 24, generator=random))
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    losses = [stack.step(tokens, targets, cross_entropy, factor=1.0).item() for _ in range(300)]
    assert losses[-1] < losses[0]
    found = stack.logits(tokens)[0].softmax(dim=-1)
    torch.testing.assert_close(found, targets, rtol=0, atol=0.12)


@pytest.mark.parametrize("name", LEARNING)
def test_every_parameter_learns(name: str) -> None:
    stack, _ = trained(name, [Trial(1e-2, 0.0, 0)], n_steps=2, dtype=torch.float32)
    first = TrialStack(name, stack.probe, [Trial(1e-2, 0.0, 0)])
    for key in stack.weights:
        assert not torch.equal(stack.weights[key], first.weights[key]), key


def test_stacked_adamw_is_torchs_for_every_trial() -> None:
    random = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    rates, decays = [1e-2, 3e-1], [0.5, 0.0]
    stacked = start.clone()
    ours = StackedAdamW(
        [stacked],
        learning_rates=torch.tensor(rates, dtype=torch.float64),
        weight_decays=torch.tensor(decays, dtype=torch.float64),
    )
    singles = [value.clone().requires_grad_() for value in start]
    theirs = [
        torch.optim.AdamW([value], lr=rate, weight_decay=decay)
        for value, rate, decay in zip(singles, rates, decays, strict=True)
    ]
    for step in range(20):
        factor = cosine_factor(step, n_steps=20, n_warmup_steps=3)
        gradient = torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
        ours.step([gradient], factor=factor)
        for value, optimiser, one, rate in zip(singles, theirs, gradient, rates, strict=True):
            value.grad = one.clone()
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.step()
    torch.testing.assert_close(stacked, torch.stack(singles), rtol=1e-10, atol=1e-12)


def test_the_schedule_warms_up_and_falls_by_half_a_cosine() -> None:
    factors = [cosine_factor(step, n_steps=12, n_warmup_steps=4) for step in range(12)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[8] == pytest.approx(0.5)
    assert all(one > other for one, other in itertools.pairwise(factors[4:]))
    assert cosine_factor(12, n_steps=12, n_warmup_steps=4) == pytest.approx(0)


@dataclass(frozen=True)
class Starved(Probe):
    """A probe whose memory does not suffice for more than one trial, once dropout is drawn."""

    probe: Probe
    error: Exception

    def first_weights(self, random: torch.Generator) -> Weights:
        return self.probe.first_weights(random)

    def logits(
        self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None
    ) -> torch.Tensor:
        found = self.probe.logits(weights, tokens, dropout=dropout)
        if len(found) > self.most:
            raise self.error
        return found

    most: int = 1


SHORTAGES = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory"),
    "CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
}


@pytest.mark.parametrize("error", SHORTAGES.values(), ids=SHORTAGES)
def test_a_stack_that_runs_out_of_memory_splits_and_ends_with_the_same_weights(
    error: Exception,
) -> None:
    probe = build_probe("protobin", SHAPE)
    whole, losses = train_on_noise(TrialStack("protobin", probe, TRIALS, dtype=torch.float64), 5)
    starved = TrialStack("protobin", Starved(SHAPE, probe, error), TRIALS, dtype=torch.float64)
    split, own_losses = train_on_noise(starved, 5)
    assert [(part.start, part.stop) for part in split.parts] == [(0, 1), (1, 2), (2, 3)]
    torch.testing.assert_close(own_losses, losses, rtol=1e-9, atol=0)
    for key, value in whole.weights.items():
        torch.testing.assert_close(split.weights[key], value, rtol=1e-9, atol=1e-12)


class Shortage(TorchDispatchMode):
    """Memory does not suffice for the nth large tensor, for none where that is 0."""

    def __init__(self, nth: int, *, size: int) -> None:
        super().__init__()
        self.left, self.size = nth or math.inf, size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
        known = {one.untyped_storage().data_ptr() for one in given}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.size:
            self.left -= result.untyped_storage().data_ptr() not in known
            if self.left == 0:
                self.left = -math.inf
                raise torch.OutOfMemoryError("CUDA out of memory")
        return result


def test_wherever_in_a_step_memory_runs_out_the_step_counts_once() -> None:
    probe, trials = build_probe("linear", SHAPE), TRIALS[:2]
    size = len(trials) * SHAPE.n_classes * SHAPE.dim
    patches = torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(0)).double()
    targets = torch.eye(4, 3).double()

    def stack_after(n_shortages: int) -> tuple[TrialStack, bool]:
        stack = TrialStack("linear", probe, trials, dtype=torch.float64)
        with Shortage(n_shortages, size=size) as shortage:
            for _ in range(3):
                stack.step(Tokens(patches), targets, asymmetric, factor=1.0)
        return stack, shortage.left < 0

    whole, _ = stack_after(0)
    for nth in itertools.count(1):
        stack, has_run_out = stack_after(nth)
        if not has_run_out:
            break
        assert len(stack.parts) == 2
        for key, value in whole.weights.items():
            torch.testing.assert_close(stack.weights[key], value, rtol=1e-9, atol=1e-12)
    assert nth > 6, "gradients and optimiser of three steps"


def test_a_single_trial_that_does_not_fit_says_so() -> None:
    probe = Starved(SHAPE, build_probe("protobin", SHAPE), SHORTAGES["GPU"], most=0)
    with pytest.raises(TrialError, match=r"a single trial of probe 'protobin' .*--batch-size"):
        train_on_noise(TrialStack("protobin", probe, TRIALS), 1)


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    probe = Starved(SHAPE, build_probe("protobin", SHAPE), RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train_on_noise(TrialStack("protobin", probe, TRIALS), 1)
