"""A small convolution over the token grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import (
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
    apply_linear,
    uniform_linear,
)
from patchbank.probing.probes.options import check_options, choice, whole
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.probes.vectors import n_frequencies

CPU_ACTIVATIONS = 2**24
"""Outputs of the convolution that a block may hold: 64 MiB, and a few copies of that."""
DEVICE_ACTIVATIONS = 2**28
CHANNELS = 256
Pooling = Literal["mean", "max"]


@dataclass(frozen=True)
class ConvProbe(Probe):
    """Convolution over (time, freq), GELU, pooling over the patches that count, linear layer.

    The kernels of all trials meet the shared tokens in one convolution. Its outputs, (trial, clip,
    channel, patch), are made in blocks of clips, and of trials where one clip is too much already.
    Where one block is enough, autograd keeps it; where it takes several, only the pooled (trial,
    clip, channel) is kept, and the backward pass makes each block again, at a third more work.
    On a GPU PyTorch computes convolutions in TF32, unless torch.backends.cudnn.allow_tf32 is off.
    """

    channels: int
    kernel: int
    pooling: Pooling

    @property
    def trials_at_once(self) -> int | None:
        """As many as have `CHANNELS` together: more in one product are slower, and take memory."""
        return max(1, CHANNELS // self.channels)

    @property
    def window(self) -> tuple[int, int]:
        """(time, freq) of the kernel: a grid of one row has no neighbours in frequency."""
        return self.kernel, self.kernel if n_frequencies(self.shape) > 1 else 1

    def first_weights(self, random: torch.Generator) -> Weights:
        n_inputs = self.shape.dim * math.prod(self.window)
        kernel, kernel_bias = uniform_linear(self.channels, n_inputs, random)
        weight, bias = uniform_linear(self.shape.n_classes, self.channels, random)
        kernel = kernel.view(self.channels, self.shape.dim, *self.window)
        return {"kernel": kernel, "kernel_bias": kernel_bias, "weight": weight, "bias": bias}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        features = self.features(weights["kernel"], weights["kernel_bias"], tokens)
        return apply_linear(features, weights["weight"], weights["bias"])

    def features(
        self,
        kernel: Float[Tensor, "trial channel dim time freq"],
        bias: Float[Tensor, "trial channel"],
        tokens: Tokens,
    ) -> Float[Tensor, "trial clip channel"]:
        """What is pooled for each channel."""
        z, counts = tokens.patches, tokens.counts
        if z.shape[1] % n_frequencies(self.shape):
            raise TrialError(
                f"found {z.shape[1]} patches in a clip, expected a multiple of the "
                f"{self.shape.grid} grid's freq={n_frequencies(self.shape)} that probe 'conv' is "
                "built for; take tokens of the same encoder and layer"
            )
        blocks = self._blocks(len(kernel), z)
        is_whole = len(blocks) == 1 and len(blocks[0][1]) == 1
        columns = []
        for trials, parts in blocks:
            rows = []
            for clips in parts:
                part = None if counts is None else counts[clips]
                arguments = (z[clips], part, kernel[trials], bias[trials])
                rows.append(
                    self._pooled(*arguments)
                    if is_whole or not torch.is_grad_enabled()
                    else checkpoint(
                        self._pooled, *arguments, use_reentrant=False, preserve_rng_state=False
                    )
                )
            columns.append(torch.cat(rows, dim=1))
        return torch.cat(columns)

    def _pooled(
        self,
        patches: Float[Tensor, "clip patch dim"],
        counts: Bool[Tensor, "clip patch"] | None,
        kernel: Float[Tensor, "trial channel dim time freq"],
        bias: Float[Tensor, "trial channel"],
    ) -> Float[Tensor, "trial clip channel"]:
        if counts is not None:
            patches = patches.masked_fill(~counts[:, :, None], 0)
        grid = patches.unflatten(1, (-1, n_frequencies(self.shape)))
        # Channels come last in memory already, which is how convolutions like them best.
        seen = F.conv2d(
            grid.permute(0, 3, 1, 2),
            kernel.flatten(0, 1),
            bias.flatten(),
            padding=(self.window[0] // 2, self.window[1] // 2),
        )
        heard = F.gelu(seen).permute(0, 2, 3, 1).flatten(1, 2)
        if self.pooling == "max":
            if counts is not None:
                heard = heard.masked_fill(~counts[:, :, None], -math.inf)
            pooled = heard.max(dim=1).values
        elif counts is None:
            pooled = heard.mean(dim=1)
        else:
            share = 1 / counts.sum(dim=1, keepdim=True).to(heard.dtype)
            pooled = torch.bmm((counts * share)[:, None], heard)[:, 0]
        return pooled.view(patches.shape[0], *bias.shape).transpose(0, 1)

    def _blocks(
        self, n_trials: int, z: Float[Tensor, "clip patch dim"]
    ) -> list[tuple[slice, list[slice]]]:
        """Trials, with the clips that are computed together for them."""
        if torch.compiler.is_exporting():
            return [(slice(None), [slice(None)])]  # a program takes any number of clips
        budget = CPU_ACTIVATIONS if z.device.type == "cpu" else DEVICE_ACTIVATIONS
        each = self.channels * z.shape[1]
        width = min(n_trials, max(1, budget // each))
        height = max(1, budget // (each * width))
        clips = list(_slices(len(z), height))
        return [(trials, clips) for trials in _slices(n_trials, width)]


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def build_conv(shape: ProbeShape, options: Options) -> ConvProbe:
    """A small convolution over the token grid, then pooling, then a linear layer.

    logits = W pool_n(gelu((K * z)_n + a)) + b: K (channels, D, kernel, kernel) over (time, freq),
    zeros beyond the grid and in place of patches that do not count. Where the grid is unknown or
    has one row, K runs along time only. "Unmute the Patch Tokens" (arXiv 2509.24901) names conv
    and does not define it. Options: channels (default 256: 1.8 million parameters
    at D = 768), kernel (default 3, odd) and pooling ("mean" or "max" over patches, default
    mean: the global average pooling that ends a convolutional network, which gives every patch a
    gradient; the GELU before it keeps a short event from being averaged away by its opposite).
    """
    check_options("conv", options, ("channels", "kernel", "pooling"))
    probe = ConvProbe(
        shape,
        whole(options, "channels", CHANNELS),
        whole(options, "kernel", 3),
        choice(options, "pooling", get_args(Pooling), "mean"),
    )
    if probe.kernel % 2 == 0:
        raise TrialError(f"found kernel={probe.kernel}, expected an odd number of patches")
    return probe
