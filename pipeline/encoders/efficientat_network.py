"""The convolutional network of the EfficientAT "mn" models: MobileNetV3-Large on a log-mel.

The table of blocks is Table 1 of Howard et al., "Searching for MobileNetV3" (arXiv:1905.02244),
with the excitation and widths of fschmid56/EfficientAT:models/mn. Modules are nested so that
their state dict has the publisher's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["relu", "hardswish"]
Head = Literal["mlp", "convolutional"]
Map = Float[Tensor, "batch dim freq time"]

CHANNEL_MULTIPLE = 8
SQUEEZE_DIVISOR = 4
NORM_EPS = 1e-3
FIRST_DIM = 16
LAST_BLOCK_DIM = 160
LAST_EXPANSION = 6
HEAD_DIM = 1280

_BLOCKS: tuple[tuple[int, int, int, bool, Activation, int], ...] = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2),
    (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1),
    (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2),
    (5, 960, 160, True, "hardswish", 1),
    (5, 960, LAST_BLOCK_DIM, True, "hardswish", 1),
)
"""Kernel, hidden channels, channels out, excitation, activation, stride; at width 1."""


@dataclass(frozen=True)
class Stage:
    """One stage: an inverted residual block, or a plain convolution where `hidden` is None."""

    dim: int
    kernel: int
    stride: int
    activation: Activation
    hidden: int | None = None
    """Channels between the 1x1 convolutions of a block."""
    squeeze: int | None = None
    """Channels of the excitation's bottleneck; None where a block has none."""

    def out_size(self, size: int) -> int:
        """Steps that leave the stage along time or frequency, for `size` that enter it."""
        return (size - 1) // self.stride + 1


def scaled_channels(channels: int, width: float) -> int:
    """`channels * width` to the nearest multiple of 8, never 10 % below it."""
    exact = channels * width
    half = CHANNEL_MULTIPLE // 2
    rounded = max(int(exact + half) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE, CHANNEL_MULTIPLE)
    return rounded + CHANNEL_MULTIPLE if rounded < 0.9 * exact else rounded


def stage_table(width: float) -> tuple[Stage, ...]:
    """The 17 stages of an mn model: first convolution, 15 blocks, last 1x1 convolution."""
    first = Stage(scaled_channels(FIRST_DIM, width), kernel=3, stride=2, activation="hardswish")
    blocks = []
    for kernel, full_hidden, dim, has_excitation, activation, stride in _BLOCKS:
        hidden = scaled_channels(full_hidden, width)
        squeeze = scaled_channels(hidden // SQUEEZE_DIVISOR, 1.0) if has_excitation else None
        out = scaled_channels(dim, width)
        blocks.append(Stage(out, kernel, stride, activation, hidden, squeeze))
    last_dim = LAST_EXPANSION * blocks[-1].dim
    return first, *blocks, Stage(last_dim, kernel=1, stride=1, activation="hardswish")


def convolution(
    n_in: int, n_out: int, activation: Activation | None, *, kernel: int, stride: int, groups: int
) -> nn.Sequential:
    """Convolution, batch norm and, where asked for, an activation; odd kernels, "same" padding."""
    layers: list[nn.Module] = [
        nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(n_out, eps=NORM_EPS),
    ]
    if activation is not None:
        layers.append(nn.ReLU(True) if activation == "relu" else nn.Hardswish(True))
    return nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the mean of all channels over the map."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, squeeze)
        self.fc2 = nn.Linear(squeeze, channels)

    def forward(self, x: Map) -> Map:
        gate = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class Excitation(nn.Module):
    """The publisher's container for excitations; the released models have one, over channels."""

    def __init__(self, channels: int, squeeze: int) -> None:
        super().__init__()
        self.conc_se_layers = nn.ModuleList([SqueezeExcitation(channels, squeeze)])

    def forward(self, x: Map) -> Map:
        scaled: Tensor = self.conc_se_layers[0](x)
        return scaled


class InvertedResidual(nn.Module):
    """Widen (1x1), filter each channel, excite, narrow (1x1); a shortcut where shapes allow it."""

    def __init__(self, n_in: int, stage: Stage) -> None:
        super().__init__()
        hidden = stage.hidden or n_in
        layers: list[nn.Module] = []
        if hidden != n_in:
            layers.append(convolution(n_in, hidden, stage.activation, kernel=1, stride=1, groups=1))
        layers.append(_depthwise(hidden, stage))
        if stage.squeeze is not None:
            layers.append(Excitation(hidden, stage.squeeze))
        layers.append(convolution(hidden, stage.dim, None, kernel=1, stride=1, groups=1))
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stage.stride == 1 and n_in == stage.dim

    def forward(self, x: Map) -> Float[Tensor, "batch dim_out freq_out time_out"]:
        out: Tensor = self.block(x)
        return out + x if self.has_shortcut else out


def _depthwise(channels: int, stage: Stage) -> nn.Sequential:
    return convolution(
        channels,
        channels,
        stage.activation,
        kernel=stage.kernel,
        stride=stage.stride,
        groups=channels,
    )


class Network(nn.Module):
    """The stages and the classifier of one mn model."""

    def __init__(self, stages: tuple[Stage, ...], *, head: Head, head_dim: int, n_classes: int):
        super().__init__()
        modules: list[nn.Module] = []
        n_in = 1
        for stage in stages:
            modules.append(_stage_module(n_in, stage))
            n_in = stage.dim
        self.features = nn.Sequential(*modules)
        self.classifier = _classifier(head, n_in, head_dim, n_classes)

    def maps(self, features: Float[Tensor, "batch freq time"]) -> Iterator[Map]:
        """The stages' outputs in order, each computed when it is asked for."""
        x = features.unsqueeze(1)
        for stage in self.features:
            x = stage(x)
            yield x

    def forward(self, features: Float[Tensor, "batch freq time"]) -> Float[Tensor, "batch class"]:
        logits: Tensor = self.classifier(self.features(features.unsqueeze(1)))
        return logits


def _stage_module(n_in: int, stage: Stage) -> nn.Module:
    if stage.hidden is not None:
        return InvertedResidual(n_in, stage)
    return convolution(
        n_in, stage.dim, stage.activation, kernel=stage.kernel, stride=stage.stride, groups=1
    )


def _classifier(head: Head, dim: int, hidden: int, n_classes: int) -> nn.Sequential:
    if head == "convolutional":
        score = nn.Conv2d(dim, n_classes, 1, bias=False)
        norm = nn.BatchNorm2d(n_classes)
        return nn.Sequential(score, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(dim, hidden),
        nn.Hardswish(),
        nn.Dropout(),
        nn.Linear(hidden, n_classes),
    )
