"""From the publisher's weight file to the mn network that it fits, strictly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbank.pipeline.encoders.checkpoint import fit, read_checkpoint
from patchbank.pipeline.encoders.efficientat_network import (
    HEAD_DIM,
    LAST_BLOCK_DIM,
    Head,
    Network,
    Stage,
    scaled_channels,
    stage_table,
)

RELEASE_URL = "https://github.com/fschmid56/EfficientAT/releases/tag/v0.0.1"
EXPECTED_FILE = (
    "an mn release file of fschmid56/EfficientAT, such as mn04_as_mAP_432.pt, "
    f"mn10_as_mAP_471.pt or mn40_as_ext_mAP_487.pt, from {RELEASE_URL}"
)
N_AUDIOSET_CLASSES = 527
_LAST_CONVOLUTION = "features.16.0.weight"
_OTHER_FRONT_END = re.compile(r"_(mels|hop)_\d+|_fc_s\d{4}")


@dataclass(frozen=True)
class LoadedNetwork:
    """A network that carries a file's weights, in evaluation mode and without gradients."""

    network: Network
    width: float
    stages: tuple[Stage, ...]
    weights_sha256: str


def load_network(path: Path | None) -> LoadedNetwork:
    """The network in the file, its width and head read off the shapes.

    Raises `EncoderError` where the file is missing, cannot be read, or differs in any key or
    shape. Warns where the file's name says that the publisher trained it with another number of
    mel bands, hop or strides: these leave no trace in the shapes, and 128 bands, a hop of 320
    samples and the usual strides are used for every file.
    """
    checkpoint = read_checkpoint(path, encoder="efficientat", expected=EXPECTED_FILE)
    state = checkpoint.content
    width, head = _width(state), _head(state)
    stages = stage_table(width)
    network = fit(
        checkpoint,
        state,
        lambda: Network(
            stages, head=head, head_dim=_head_dim(state, width), n_classes=_n_classes(state, head)
        ),
        what=f"an mn model of width {width:g}",
    )
    _warn_of_other_training(checkpoint.path)
    # Kernels with channels last: a third less time on a CPU.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return LoadedNetwork(network, width, stages, checkpoint.sha256)


def _shape(state: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = state.get(key)
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _width(state: Mapping[str, Any]) -> float:
    """Width multiplier; 1 where the file does not say, so that the comparison names what lacks."""
    shape = _shape(state, _LAST_CONVOLUTION)
    return shape[1] / LAST_BLOCK_DIM if len(shape) == 4 and shape[1] > 0 else 1.0


def _head(state: Mapping[str, Any]) -> Head:
    return "convolutional" if "classifier.0.weight" in state else "mlp"


def _head_dim(state: Mapping[str, Any], width: float) -> int:
    shape = _shape(state, "classifier.2.bias")
    return shape[0] if len(shape) == 1 else scaled_channels(HEAD_DIM, width)


def _n_classes(state: Mapping[str, Any], head: Head) -> int:
    shape = _shape(state, "classifier.5.bias" if head == "mlp" else "classifier.1.bias")
    return shape[0] if len(shape) == 1 else N_AUDIOSET_CLASSES


def _warn_of_other_training(path: Path) -> None:
    found = _OTHER_FRONT_END.search(path.name)
    if found is not None:
        warnings.warn(
            f"{path.name}: the name says {found[0].lstrip('_')!r}, which the weights do not show; "
            "128 mel bands, hop 320 and the usual strides are used where none other are chosen",
            stacklevel=4,
        )
