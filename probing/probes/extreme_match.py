"""The lowest and the highest similarity of each prototype with any token, from one product."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchbank.probing.probes.best_match import similarities
from patchbank.probing.probes.winners import prototype_gradient, token_gradient

Matches = Float[Tensor, "clip prototype"]


def extreme_match(
    directions: Float[Tensor, "clip patch dim"],
    prototypes: Float[Tensor, "prototype dim"],
    counts: Bool[Tensor, "clip patch"] | None = None,
) -> tuple[Matches, Matches]:
    """min and max over the patches that count of prototype . direction.

    Similarities are made block by block and forgotten, as in `best_match`; the gradient goes to
    the prototypes and, where they ask for one, to the tokens, at the winning tokens alone.
    """
    found: tuple[Tensor, Tensor] = _ExtremeMatch.apply(  # type: ignore[no-untyped-call]
        directions, prototypes, counts
    )
    return found


class _ExtremeMatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        directions: Float[Tensor, "clip patch dim"],
        prototypes: Float[Tensor, "prototype dim"],
        counts: Bool[Tensor, "clip patch"] | None,
    ) -> tuple[Matches, Matches]:
        value, winner = _search(directions, prototypes, counts)
        ctx.save_for_backward(directions, prototypes, winner.flatten(1))
        return value[:, 0], value[:, 1]

    @staticmethod
    def backward(
        ctx: Any, for_lowest: Matches, for_highest: Matches
    ) -> tuple[Tensor | None, Tensor | None, None]:
        directions, prototypes, winner = ctx.saved_tensors
        gradient = torch.cat([for_lowest, for_highest], dim=1)
        tokens = of_prototypes = None
        if ctx.needs_input_grad[0]:
            tokens = token_gradient(directions.shape[1], prototypes, winner, gradient)
        if ctx.needs_input_grad[1]:
            both = prototype_gradient(directions, winner, gradient)
            of_prototypes = both.view(2, *prototypes.shape).sum(dim=0)
        return tokens, of_prototypes, None


def _search(
    directions: Float[Tensor, "clip patch dim"],
    prototypes: Float[Tensor, "prototype dim"],
    counts: Bool[Tensor, "clip patch"] | None,
) -> tuple[Float[Tensor, "clip 2 prototype"], Int[Tensor, "clip 2 prototype"]]:
    """Lowest and highest similarity, and the patches that have them."""
    value = directions.new_empty(directions.shape[0], 2, len(prototypes))
    winner = torch.empty(value.shape, dtype=torch.int64, device=directions.device)
    for clips, block, similarity in similarities(directions, prototypes):
        for side, never in enumerate((math.inf, -math.inf)):
            if counts is not None:
                similarity.masked_fill_(~counts[clips], never)
            found, patch = similarity.max(dim=2) if side else similarity.min(dim=2)
            value[clips, side, block], winner[clips, side, block] = found.T, patch.T
    return value, winner
