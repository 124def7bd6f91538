"""A class layer in blocks: each class has weights on the features of its own block of classes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from patchbank.probing.probes.base import Logits, apply_linear


def first_class(index: int, *, n_classes: int, size: int) -> int:
    """Where the block of class `index` begins; the last reaches back to have `size` classes too."""
    return min(index // size * size, n_classes - size)


def apply_class_blocks(
    features: Float[Tensor, "trial clip feature"],
    weight: Float[Tensor, "trial class part"],
    bias: Float[Tensor, "trial class"],
) -> Logits:
    """Each trial's own layer; row c of `weight` meets the features of the block of class c.

    The features are those of one class after another, equally many of each, and `part` is as many
    as a block of classes has: with all of them this is `apply_linear`.
    """
    n_trials, n_clips, n_features = features.shape
    n_classes, width = weight.shape[1:]
    if width == n_features:
        return apply_linear(features, weight, bias)
    size = width * n_classes // n_features
    n_blocks = n_classes // size
    n_whole = n_blocks * size
    blocks = features[:, :, : n_blocks * width].unflatten(2, (n_blocks, width)).transpose(1, 2)
    rows = weight[:, :n_whole].unflatten(1, (n_blocks, size))
    logits = torch.matmul(blocks, rows.transpose(2, 3)).transpose(1, 2)
    logits = logits.reshape(n_trials, n_clips, n_whole)
    if n_whole < n_classes:
        start = first_class(n_whole, n_classes=n_classes, size=size) * width // size
        last = torch.bmm(features[:, :, start:], weight[:, n_whole:].transpose(1, 2))
        logits = torch.cat([logits, last], dim=2)
    return logits + bias[:, None]
