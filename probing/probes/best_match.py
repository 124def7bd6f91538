"""The highest similarity of each prototype with any token of a clip, in bounded scratch.

Similarities of all prototypes with all tokens would be (clip, patch, prototype): 5 GB for
AudioSet. They are made block by block, reduced at once and forgotten; the backward pass only needs
the winning token of each prototype: a gather, not a second product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.probes.winners import prototype_gradient, token_gradient

PROTOTYPE_BLOCK = 1024
CPU_SCRATCH = 2**20
"""Similarities a block may hold, 4 MiB in float32: they are still cached when they are reduced."""
DEVICE_SCRATCH = 2**26


def match_tokens(
    tokens: Tokens, prototypes: Float[Tensor, "prototype dim"]
) -> Float[Tensor, "clip prototype"]:
    """`best_match` of a batch's directions; on a GPU in one kernel, from tokens as stored."""
    stored = tokens.stored_directions
    if stored is None:
        return best_match(tokens.directions, prototypes, tokens.counts)
    from patchbank.probing.probes.best_match_triton import match_stored

    return match_stored(stored, prototypes)


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
    best = directions.new_empty(directions.shape[0], len(prototypes))
    for clips, block, similarity in similarities(directions, prototypes):
        if counts is not None:
            similarity.masked_fill_(~counts[clips], -math.inf)
        if winner is None:
            best[clips, block] = similarity.amax(dim=2).T
        else:
            value, patch = similarity.max(dim=2)
            best[clips, block], winner[clips, block] = value.T, patch.T
    return best


def similarities(
    directions: Float[Tensor, "clip patch dim"], prototypes: Float[Tensor, "prototype dim"]
) -> Iterator[tuple[slice, slice, Float[Tensor, "_prototype _clip patch"]]]:
    """(clips, prototypes, their similarities) block by block; the next overwrites the last.

    One clip's patches lie side by side, so that looking for the highest is a walk through memory:
    with prototypes side by side it took 0.2 of the product's time, this way 0.06.
    """
    n_clips, n_patches, dim = directions.shape
    if torch.compiler.is_exporting():
        # A program takes any number of clips: blocks of them could not be counted.
        whole = prototypes @ directions.reshape(-1, dim).T
        yield slice(None), slice(None), whole.view(len(prototypes), -1, n_patches)
        return
    height, width = block_size(n_clips, n_patches, len(prototypes), directions.device)
    # One piece of memory for all blocks: a fresh one each takes longer than the maximum.
    scratch = directions.new_empty(height * width * n_patches)
    for first in range(0, len(prototypes), width):
        for start in range(0, n_clips, height):
            clips, block = slice(start, start + height), slice(first, first + width)
            some, flat = prototypes[block], directions[clips].reshape(-1, dim)
            out = scratch[: len(some) * len(flat)].view(len(some), len(flat))
            torch.mm(some, flat.T, out=out)
            yield clips, block, out.view(len(some), -1, n_patches)


def block_size(
    n_clips: int, n_patches: int, n_prototypes: int, device: torch.device
) -> tuple[int, int]:
    """(clips, prototypes) whose similarities fit the scratch, at least one of each."""
    scratch = CPU_SCRATCH if device.type == "cpu" else DEVICE_SCRATCH
    width = max(1, min(n_prototypes, PROTOTYPE_BLOCK, scratch // n_patches))
    return max(1, min(n_clips, scratch // (n_patches * width))), width
