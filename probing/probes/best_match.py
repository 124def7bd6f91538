"""The highest similarity of each prototype with any token of a clip, in bounded scratch.

Similarities of all prototypes with all tokens would be (clip, patch, prototype): 5 GB for
AudioSet. They are made block by block, reduced at once and forgotten; the backward pass only needs
the winning token of each prototype: a gather, not a second product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchbank.probing.probes.winners import prototype_gradient, token_gradient

PROTOTYPE_BLOCK = 1024
CPU_SCRATCH = 2**22
"""Similarities a block may hold, 16 MiB: smaller ones pay for waking threads, larger for paging."""
DEVICE_SCRATCH = 2**26


def best_match(
    directions: Float[Tensor, "clip patch dim"],
    prototypes: Float[Tensor, "prototype dim"],
    counts: Bool[Tensor, "clip patch"] | None = None,
) -> Float[Tensor, "clip prototype"]:
    """max over the patches that count of prototype . direction.

    The gradient goes to the prototypes, and to the tokens where they ask for one.
    """
    if torch.is_grad_enabled() and (prototypes.requires_grad or directions.requires_grad):
        value: Tensor = _BestMatch.apply(directions, prototypes, counts)  # type: ignore[no-untyped-call]
        return value
    return _search(directions, prototypes, counts)


class _BestMatch(torch.autograd.Function):
    """Forward: the maximum. Backward: gradients at the winning tokens alone."""

    @staticmethod
    def forward(
        ctx: Any,
        directions: Float[Tensor, "clip patch dim"],
        prototypes: Float[Tensor, "prototype dim"],
        counts: Bool[Tensor, "clip patch"] | None,
    ) -> Float[Tensor, "clip prototype"]:
        shape = (len(directions), len(prototypes))
        winner = torch.empty(shape, dtype=torch.int64, device=directions.device)
        best = _search(directions, prototypes, counts, winner=winner)
        ctx.save_for_backward(directions, prototypes, winner)
        return best

    @staticmethod
    def backward(
        ctx: Any, gradient: Float[Tensor, "clip prototype"]
    ) -> tuple[Tensor | None, Tensor | None, None]:
        directions, prototypes, winner = ctx.saved_tensors
        for_tokens, for_prototypes, _ = ctx.needs_input_grad
        return (
            token_gradient(directions.shape[1], prototypes, winner, gradient)
            if for_tokens
            else None,
            prototype_gradient(directions, winner, gradient) if for_prototypes else None,
            None,
        )


def _search(
    directions: Float[Tensor, "clip patch dim"],
    prototypes: Float[Tensor, "prototype dim"],
    counts: Bool[Tensor, "clip patch"] | None,
    *,
    winner: Int[Tensor, "clip prototype"] | None = None,
) -> Float[Tensor, "clip prototype"]:
    """The best similarity; writes the patch that has it into `winner`, where that is given."""
    n_clips, n_patches, _ = directions.shape
    best = directions.new_empty(n_clips, len(prototypes))
    for clips, block in _blocks(n_clips, n_patches, len(prototypes), directions.device):
        similarity = torch.matmul(directions[clips], prototypes[block].T)
        if counts is not None:
            similarity.masked_fill_(~counts[clips, :, None], -math.inf)
        if winner is None:
            best[clips, block] = similarity.amax(dim=1)
        else:
            best[clips, block], winner[clips, block] = similarity.max(dim=1)
    return best


def _blocks(
    n_clips: int, n_patches: int, n_prototypes: int, device: torch.device
) -> list[tuple[slice, slice]]:
    """(clips, prototypes) blocks whose similarities fit the scratch."""
    scratch = CPU_SCRATCH if device.type == "cpu" else DEVICE_SCRATCH
    width = min(n_prototypes, PROTOTYPE_BLOCK)
    height = max(1, scratch // (n_patches * width))
    return [
        (slice(clip, clip + height), slice(prototype, prototype + width))
        for prototype in range(0, n_prototypes, width)
        for clip in range(0, n_clips, height)
    ]
