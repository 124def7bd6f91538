"""Gradients of a best or worst match: what reaches prototypes and tokens through the winners."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def prototype_gradient(
    tokens: Float[Tensor, "clip patch dim"],
    winner: Int[Tensor, "clip prototype"],
    gradient: Float[Tensor, "clip prototype"],
) -> Float[Tensor, "prototype dim"]:
    """sum over clips of gradient x winning token, in one gather."""
    # embedding_bag is a gather and a weighted sum in one, with no (prototype, clip, dim) copy.
    return F.embedding_bag(
        _rows(winner, tokens.shape[1]).T.contiguous(),
        tokens.reshape(-1, tokens.shape[2]),
        per_sample_weights=gradient.T.contiguous(),
        mode="sum",
    )


def token_gradient(
    n_patches: int,
    prototypes: Float[Tensor, "prototype dim"],
    winner: Int[Tensor, "clip win"],
    gradient: Float[Tensor, "clip win"],
) -> Float[Tensor, "clip patch dim"]:
    """sum over the prototypes that a token wins of gradient x prototype; zero for losers.

    `win` may hold the prototypes several times over, for several kinds of winning.
    """
    n_clips, n_wins = winner.shape
    row = _rows(winner, n_patches).flatten()
    # Sorted by token, a token's prototypes are one bag: no atomic adds, and always the same sum.
    order = row.argsort(stable=True)
    sizes = torch.bincount(row, minlength=n_clips * n_patches)
    total = F.embedding_bag(
        order % n_wins % len(prototypes),
        prototypes,
        sizes.cumsum(0) - sizes,
        per_sample_weights=gradient.flatten()[order],
        mode="sum",
    )
    return total.view(n_clips, n_patches, -1)


def _rows(winner: Int[Tensor, "clip win"], n_patches: int) -> Int[Tensor, "clip win"]:
    """Positions among the patches of all clips."""
    return winner + torch.arange(len(winner), device=winner.device)[:, None] * n_patches
