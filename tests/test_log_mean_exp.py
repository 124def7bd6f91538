from __future__ import annotations

import math

import pytest
import torch

from patchbank.probing.probes import log_mean_exp as blocks
from patchbank.probing.probes.log_mean_exp import log_mean_exp
from patchbank.probing.probes.tokens import Tokens


def test_the_soft_maximum_stays_finite_for_scores_that_overflow() -> None:
    seen, row = torch.tensor([[[200.0], [199.0], [-300.0]]]), torch.tensor([[1.0], [-1.0]])
    assert not seen.exp().isfinite().all()
    exact = row.double().requires_grad_()
    expected = (seen.double() @ exact.T).logsumexp(dim=1) - math.log(3)
    found = log_mean_exp(seen, row.requires_grad_())
    torch.testing.assert_close(found, expected.float())
    [gradient] = torch.autograd.grad(found.sum(), row)
    [reference] = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient, reference.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_patches", [None, [8, 1, 5, 2]], ids=["all count", "some count"])
def test_the_gradients_of_the_soft_maximum_are_those_of_finite_differences(
    n_patches: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "PROTOTYPE_BLOCK", 3)
    monkeypatch.setattr(blocks, "CPU_SCRATCH", 50)
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 8, 6, generator=random, dtype=torch.float64).requires_grad_()
    rows = torch.randn(5, 6, generator=random, dtype=torch.float64).requires_grad_()
    counts = Tokens(patches, None, None if n_patches is None else torch.tensor(n_patches)).counts
    assert torch.autograd.gradcheck(lambda z, p: log_mean_exp(z, p, counts), [patches, rows])
