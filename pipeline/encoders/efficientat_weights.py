"""From the publisher's weight file to the mn network that it fits, strictly."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbank.pipeline.encoders.efficientat_network import (
    HEAD_DIM,
    LAST_BLOCK_DIM,
    Head,
    Network,
    Stage,
    scaled_channels,
    stage_table,
)
from patchbank.pipeline.errors import EncoderError

RELEASE_URL = "https://github.com/fschmid56/EfficientAT/releases/tag/v0.0.1"
EXPECTED_FILE = (
    "expected an mn release file of fschmid56/EfficientAT, such as mn04_as_mAP_432.pt, "
    f"mn10_as_mAP_471.pt or mn40_as_ext_mAP_487.pt, from {RELEASE_URL}"
)
N_AUDIOSET_CLASSES = 527
_SHOWN_KEYS = 3
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
    if path is None:
        raise EncoderError(
            f"efficientat has no bundled weights; {EXPECTED_FILE}; pass it with --weights FILE"
        )
    content = _read(path)
    state = _parse(content, path)
    width, head = _width(state), _head(state)
    stages = stage_table(width)
    with torch.device("meta"):
        network = Network(
            stages, head=head, head_dim=_head_dim(state, width), n_classes=_n_classes(state, head)
        )
    _check_fit(state, network.state_dict(), path, width)
    _warn_of_other_training(path)
    tensors = {key: _prepared(value) for key, value in state.items()}
    network.load_state_dict(tensors, strict=True, assign=True)
    network.eval().requires_grad_(False)
    return LoadedNetwork(network, width, stages, hashlib.sha256(content).hexdigest())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise EncoderError(f"cannot read weights {path}: {reason}; {EXPECTED_FILE}") from error


def _parse(content: bytes, path: Path) -> Mapping[str, Any]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling garbage raises is not bounded
        raise EncoderError(
            f"{path} ({len(content)} bytes) is damaged or holds more than tensors "
            f"({type(error).__name__} from torch.load); {EXPECTED_FILE}; download it again"
        ) from error
    if not isinstance(state, Mapping):
        raise EncoderError(f"{path} holds a {type(state).__name__}; {EXPECTED_FILE}")
    return state


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


def _check_fit(
    state: Mapping[str, Any], expected: Mapping[str, Tensor], path: Path, width: float
) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [str(key) for key in state if key not in expected]
    misshaped = [
        f"{key} {_describe(state[key])} for {tuple(expected[key].shape)}"
        for key in expected
        if key in state and _describe(state[key]) != str(tuple(expected[key].shape))
    ]
    if missing or unexpected or misshaped:
        raise EncoderError(
            f"{path} does not fit an mn model of width {width:g}: "
            f"{_listed('missing', missing)}; {_listed('unexpected', unexpected)}; "
            f"{_listed('mis-shaped', misshaped)}; {EXPECTED_FILE}"
        )


def _describe(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _prepared(value: Tensor) -> Tensor:
    """Float32, and kernels with channels last: a third less time on a CPU."""
    value = value.float() if value.is_floating_point() else value
    # Not `contiguous`: it leaves the strides of 1x1 kernels, by which torch picks the layout.
    return value.to(memory_format=torch.channels_last) if value.ndim == 4 else value


def _listed(kind: str, keys: Sequence[str]) -> str:
    if not keys:
        return f"0 {kind}"
    more = ", ..." if len(keys) > _SHOWN_KEYS else ""
    return f"{len(keys)} {kind} ({', '.join(keys[:_SHOWN_KEYS])}{more})"


def _warn_of_other_training(path: Path) -> None:
    found = _OTHER_FRONT_END.search(path.name)
    if found is not None:
        warnings.warn(
            f"{path.name}: the name says {found[0].lstrip('_')!r}, which the weights do not show; "
            "128 mel bands, hop 320 and the usual strides are used, as for every mn file",
            stacklevel=4,
        )
