from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import ProbeShape, n_parameters, stacked_weights
from patchbank.probing.probes.class_blocks import apply_class_blocks, first_class
from patchbank.probing.probes.tokens import Tokens

J = 2


def dense(
    weight: torch.Tensor, *, n_classes: int, size: int, n_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same layer as (trial, class, feature) with zeros outside of the blocks, and the mask."""
    full = torch.zeros(len(weight), n_classes, n_features, dtype=weight.dtype)
    mask = torch.zeros(n_classes, n_features, dtype=torch.bool)
    for index in range(n_classes):
        start = min(index // size * size, n_classes - size) * J
        full[:, index, start : start + size * J] = weight[:, index].detach()
        mask[index, start : start + size * J] = True
    return full.requires_grad_(), mask


@pytest.mark.parametrize("size", [1, 3, 4, 6, 7, 12], ids=lambda size: f"blocks of {size}")
def test_class_blocks_equal_a_masked_dense_layer_with_gradients(size: int) -> None:
    n_classes, random = 12, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_()

    features, bias = draw(3, 5, n_classes * J), draw(3, n_classes)
    weight = draw(3, n_classes, size * J)
    full, mask = dense(weight, n_classes=n_classes, size=size, n_features=n_classes * J)
    found = apply_class_blocks(features, weight, bias)
    expected = torch.baddbmm(bias[:, None], features, (full * mask).transpose(1, 2))
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    ours = torch.autograd.grad(found, [weight, features, bias], direction)
    theirs = torch.autograd.grad(expected, [full, features, bias], direction)
    of_blocks = torch.stack([one[mask].view(n_classes, -1) for one in theirs[0]])
    for one, other in zip(ours, (of_blocks, *theirs[1:]), strict=True):
        torch.testing.assert_close(one, other)


def test_the_last_block_reaches_back() -> None:
    starts = [first_class(index, n_classes=10, size=4) for index in range(10)]
    assert starts == [0, 0, 0, 0, 4, 4, 4, 4, 6, 6]


@pytest.mark.parametrize("name", ["protobin", "protofloat"])
@pytest.mark.parametrize(
    ("n_classes", "n_prototypes", "size", "expected"),
    [
        (527, 10, 64, 4_385_167),  # dense: 6,825,177
        (200, 20, 50, 3_272_200),
        (200, 20, 200, 3_872_200),
        (200, 20, 999, 3_872_200),
    ],
)
def test_parameters_are_those_of_the_blocks(
    name: str, n_classes: int, n_prototypes: int, size: int, expected: int
) -> None:
    options = {"n_prototypes_per_class": n_prototypes, "classes_per_block": size}
    probe = build_probe(name, ProbeShape(768, n_classes), options)
    n_rows, width = n_classes * n_prototypes, min(size, n_classes) * n_prototypes
    assert n_rows * 768 + n_classes * width + n_classes == expected
    assert n_parameters(probe) == expected


def test_blocks_of_all_classes_are_the_dense_probe() -> None:
    seen = Tokens(torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)))
    logits = []
    for options in ({}, {"classes_per_block": 3}, {"classes_per_block": 8}):
        probe = build_probe("protobin", ProbeShape(6, 3), options)
        logits.append(probe.logits(stacked_weights(probe, "test", [0, 1]), seen))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


class Largest(TorchDispatchMode):
    """Values of the largest tensor that any operation makes."""

    n_values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        several = made if isinstance(made, tuple | list) else (made,)
        sizes = [one.numel() for one in several if isinstance(one, torch.Tensor)]
        self.n_values = max([self.n_values, *sizes])
        return made


def test_ten_thousand_classes_never_meet_as_a_dense_matrix() -> None:
    n_classes, size = 10_000, 30
    options = {"n_prototypes_per_class": J, "classes_per_block": size}
    probe = build_probe("protobin", ProbeShape(4, n_classes), options)
    with Largest() as largest:
        weights = {
            key: value.requires_grad_()
            for key, value in stacked_weights(probe, "test", [0, 1]).items()
        }
        seen = Tokens(torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)))
        logits = probe.logits(weights, seen)
        torch.autograd.grad(logits.square().sum(), list(weights.values()))
    assert logits.shape == (2, 3, n_classes)
    assert largest.n_values == 2 * n_classes * size * J, "the two trials' weights are the largest"


def test_blocks_without_a_class_are_refused() -> None:
    with pytest.raises(TrialError, match="found classes_per_block=0, expected at least 1, or null"):
        build_probe("protobin", ProbeShape(6, 3), {"classes_per_block": 0})
