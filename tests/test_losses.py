from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from patchbank.probing.losses import LOSSES, Loss, asymmetric, bce, cross_entropy


def example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 5, 4, generator=random, dtype=dtype)
    targets = (torch.rand(5, 4, generator=random) < 0.4).to(dtype)
    return logits, targets


def test_the_asymmetric_loss_is_the_papers_formula() -> None:
    logits, targets = example()
    found = asymmetric(logits, targets, gamma_negative=4, gamma_positive=1, clip=0.05)
    for trial, loss in zip(logits.tolist(), found.tolist(), strict=True):
        terms = []
        for clip, wanted in zip(trial, targets.tolist(), strict=True):
            for logit, y in zip(clip, wanted, strict=True):
                p = 1 / (1 + math.exp(-logit))
                shifted = max(p - 0.05, 0)
                positive = (1 - p) ** 1 * math.log(p)
                negative = shifted**4 * math.log(1 - shifted)
                terms.append(-(y * positive + (1 - y) * negative))
        assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_the_asymmetric_loss_without_focus_and_clip_is_binary_cross_entropy() -> None:
    logits, targets = example()
    plain = asymmetric(logits, targets, gamma_negative=0, gamma_positive=0, clip=0)
    torch.testing.assert_close(plain, bce(logits, targets))


def test_a_negative_below_the_clip_costs_nothing_and_pulls_nothing() -> None:
    logits = torch.full((1, 1, 1), -4.0, requires_grad=True)
    loss = asymmetric(logits, torch.zeros(1, 1))
    loss.sum().backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert logits.grad.item() == 0


def test_binary_cross_entropy_is_torchs() -> None:
    logits, targets = example()
    expected = [F.binary_cross_entropy_with_logits(trial, targets) for trial in logits]
    torch.testing.assert_close(bce(logits, targets), torch.stack(expected))


def test_cross_entropy_is_torchs() -> None:
    logits, _ = example()
    classes = torch.tensor([0, 3, 1, 1, 2])
    expected = torch.stack([F.cross_entropy(trial, classes) for trial in logits])
    targets = F.one_hot(classes, 4).double()
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


def test_cross_entropy_takes_soft_targets_as_torch_does() -> None:
    logits, _ = example()
    targets = torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0, 1 / 3, 1 / 3, 1 / 3]]).double()
    expected = torch.stack([F.cross_entropy(trial, targets) for trial in logits[:, :3]])
    torch.testing.assert_close(cross_entropy(logits[:, :3], targets), expected)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_trials_gradient_does_not_depend_on_the_others(loss: Loss) -> None:
    logits, targets = example()
    together = logits.clone().requires_grad_()
    loss(together, targets).sum().backward()
    alone = logits[1:2].clone().requires_grad_()
    loss(alone, targets).sum().backward()
    assert together.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(together.grad[1:2], alone.grad, rtol=0, atol=0)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_extreme_float32_logits_stay_finite(loss: Loss) -> None:
    logits = torch.tensor([[[100.0, -100.0]]], requires_grad=True)
    value = loss(logits, torch.tensor([[0.0, 1.0]]))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
