"""The soft maximum of each prototype's scores over the tokens of a clip, in bounded scratch.

Scores of all prototypes with all tokens would be (clip, patch, prototype), and autograd would keep
several of them. They are made block by block and forgotten, forward and backward: a third product
in place of the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PROTOTYPE_BLOCK = 1024
CPU_SCRATCH = 2**21
"""Scores that a block may hold; the backward pass holds two such blocks."""
DEVICE_SCRATCH = 2**26


def log_mean_exp(
    tokens: Float[Tensor, "clip patch dim"],
    prototypes: Float[Tensor, "prototype dim"],
    counts: Bool[Tensor, "clip patch"] | None = None,
) -> Float[Tensor, "clip prototype"]:
    """log of the mean over the patches that count of exp(prototype . token).

    Between the mean and the maximum of the scores. Has gradients for both arguments.
    """
    total: Tensor
    if torch.compiler.is_exporting():
        # Blocks of clips cannot be counted where a program takes any number of them.
        total = _scores(tokens, prototypes, counts, slice(None), slice(None)).logsumexp(dim=1)
    else:
        total = _LogSumExp.apply(tokens, prototypes, counts)  # type: ignore[no-untyped-call]
    if counts is None:
        return total - math.log(tokens.shape[1])
    return total - counts.sum(dim=1, keepdim=True).to(total.dtype).log()


class _LogSumExp(torch.autograd.Function):
    """Backward: the softmax over patches, made again from the scores and the result."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Float[Tensor, "clip patch dim"],
        prototypes: Float[Tensor, "prototype dim"],
        counts: Bool[Tensor, "clip patch"] | None,
    ) -> Float[Tensor, "clip prototype"]:
        total = tokens.new_empty(len(tokens), len(prototypes))
        for clips, block in _blocks(tokens, prototypes):
            scores = _scores(tokens, prototypes, counts, clips, block)
            highest = scores.amax(dim=1, keepdim=True)
            shares = scores.sub_(highest).exp_()
            total[clips, block] = shares.sum(dim=1).log_().add_(highest[:, 0])
        ctx.save_for_backward(tokens, prototypes, total)
        ctx.counts = counts
        return total

    @staticmethod
    def backward(
        ctx: Any, gradient: Float[Tensor, "clip prototype"]
    ) -> tuple[Tensor | None, Tensor | None, None]:
        tokens, prototypes, total = ctx.saved_tensors
        for_tokens, for_prototypes = (
            torch.zeros_like(value) if is_needed else None
            for value, is_needed in zip((tokens, prototypes), ctx.needs_input_grad, strict=False)
        )
        for clips, block in _blocks(tokens, prototypes):
            scores = _scores(tokens, prototypes, ctx.counts, clips, block)
            softmax = scores.sub_(total[clips, None, block]).exp_()
            share = softmax.mul_(gradient[clips, None, block]).flatten(0, 1)
            if for_prototypes is not None:
                for_prototypes[block].addmm_(share.T, tokens[clips].flatten(0, 1))
            if for_tokens is not None:
                for_tokens[clips].view(-1, tokens.shape[2]).addmm_(share, prototypes[block])
        return for_tokens, for_prototypes, None


def _scores(
    tokens: Float[Tensor, "clip patch dim"],
    prototypes: Float[Tensor, "prototype dim"],
    counts: Bool[Tensor, "clip patch"] | None,
    clips: slice,
    block: slice,
) -> Float[Tensor, "part patch block"]:
    scores = torch.matmul(tokens[clips], prototypes[block].T)
    if counts is not None:
        scores.masked_fill_(~counts[clips, :, None], -math.inf)
    return scores


def _blocks(
    tokens: Float[Tensor, "clip patch dim"], prototypes: Float[Tensor, "prototype dim"]
) -> Iterator[tuple[slice, slice]]:
    """(clips, prototypes) blocks whose scores fit the scratch."""
    n_clips, n_patches, _ = tokens.shape
    scratch = CPU_SCRATCH if tokens.device.type == "cpu" else DEVICE_SCRATCH
    width = min(len(prototypes), PROTOTYPE_BLOCK)
    height = max(1, scratch // (n_patches * width))
    for prototype in range(0, len(prototypes), width):
        for clip in range(0, n_clips, height):
            yield slice(clip, clip + height), slice(prototype, prototype + width)
