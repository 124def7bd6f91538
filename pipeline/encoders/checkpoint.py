"""Reads publishers' weight files, safely, and fits them to a network, strictly.

Safetensors files, and torch files with `weights_only=True`: tensors, plain containers and exactly
two classes that the published files hold, `argparse.Namespace` and `pathlib.PosixPath`. Nothing of
a file is ever executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from patchbank.pipeline.encoders.hub import CONFIG, WEIGHTS
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Json

ALLOWED_CLASSES: list[Any] = [argparse.Namespace, pathlib.PosixPath]
SHOWN_KEYS = 3
FORBIDDEN = re.compile(r"(?:GLOBAL|global:?|class) ([\w.]+\.[\w.]+)")
"""How torch names a class or a function that a file asks for."""
Network = TypeVar("Network", bound=nn.Module)
State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds."""

    path: Path
    """The weight file, inside its folder where a folder was given."""
    content: Mapping[str, Any]
    """Its top level."""
    config: Json
    """config.json of a folder; empty where there is none."""
    sha256: str
    """Of the weight file's bytes."""
    expected: str
    """What the encoder takes, for error messages."""

    def section(self, *names: str) -> Mapping[str, Any]:
        """The first of these entries that is a mapping, or the top level itself."""
        for name in names:
            value = self.content.get(name)
            if isinstance(value, Mapping):
                return value
        return self.content

    def error(self, found: str) -> EncoderError:
        """An error about this file."""
        return EncoderError(f"{self.path}: {found}; expected {self.expected}")


def read_checkpoint(path: Path | None, *, encoder: str, expected: str) -> Checkpoint:
    """The file at `path`, or the weights of the folder there.

    Raises `EncoderError` where there is none, it cannot be read, or it holds more than tensors,
    plain containers and `ALLOWED_CLASSES`.
    """
    if path is None:
        raise EncoderError(
            f"{encoder} has no bundled weights; it takes {expected}; pass it with --weights"
        )
    file = _in_folder(path, expected) if path.is_dir() else path
    # Beside the file also where it is named itself: the same bytes are the same encoder.
    config = _config(file.with_name(CONFIG)) if file.name in WEIGHTS else {}
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise EncoderError(f"cannot read weights {file}: {reason}; expected {expected}") from error
    return Checkpoint(file, _content(file, expected), config, sha256, expected)


def _in_folder(folder: Path, expected: str) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise EncoderError(
        f"{folder} holds neither {' nor '.join(WEIGHTS)}; expected {expected}; give the "
        "weight file itself"
    )


def _config(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise EncoderError(f"cannot read {path}: {error}; download the folder again") from error
    if not isinstance(config, dict):
        raise EncoderError(f"{path} holds a {type(config).__name__}, expected an object")
    return config


def _content(path: Path, expected: str) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(ALLOWED_CLASSES):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # what unpickling garbage raises is not bounded
        raise EncoderError(f"{path}: {_reason(error, path)}; expected {expected}") from error
    if not isinstance(content, Mapping):
        raise EncoderError(f"{path} holds a {type(content).__name__}; expected {expected}")
    return content


def _reason(error: Exception, path: Path) -> str:
    """Why a file was not loaded, and what to do; torch's own words advise to load it unsafely."""
    if found := FORBIDDEN.search(str(error)):
        return (
            f"holds {found[1]}, which is more than tensors and plain settings and is never loaded; "
            "where you trust the file, save its state dict as safetensors"
        )
    return (
        f"{path.stat().st_size} bytes, damaged or no file of torch or safetensors "
        f"({type(error).__name__}); download it again"
    )


def _is_zip(path: Path) -> bool:
    """Whether it is torch's own archive, whose tensors need not be read to be looked at."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def tensors_of(section: Mapping[str, Any]) -> State:
    """The tensors among some entries; nested ones such as an `_ema` are left out."""
    return {str(key): value for key, value in section.items() if isinstance(value, Tensor)}


def without_prefix(checkpoint: Checkpoint, state: Mapping[str, Tensor], *prefixes: str) -> State:
    """The state with each prefix, in this order, cut off the keys that begin with it.

    Keys without it stay as they are: a file may hold a head beside its encoder. Raises
    `EncoderError` where a key is there both ways.
    """
    for prefix in prefixes:
        shorter = {key.removeprefix(prefix): value for key, value in state.items()}
        if len(shorter) < len(state):
            raise checkpoint.error(f"keys are there with and without the prefix {prefix!r}")
        state = shorter
    return dict(state)


def without(state: Mapping[str, Tensor], *parts: str) -> State:
    """The state without the keys that begin with one of `parts`: decoders, heads."""
    return {key: value for key, value in state.items() if not key.startswith(parts)}


def depth_of(state: Mapping[str, Any], blocks: str = "blocks") -> int:
    """How many blocks there are keys for."""
    numbers = {key.split(".")[1] for key in state if key.startswith(f"{blocks}.")}
    return sum(number.isdecimal() for number in numbers)


def shape_of(
    checkpoint: Checkpoint, state: Mapping[str, Tensor], key: str, n_axes: int
) -> tuple[int, ...]:
    """The shape of a tensor that says how large the network is; `EncoderError` for another rank."""
    if key not in state:
        listed = ", ".join(list(state)[:SHOWN_KEYS]) or "no tensors"
        raise checkpoint.error(f"there is no {key} (it holds {listed} ...)")
    shape = tuple(state[key].shape)
    if len(shape) != n_axes or 0 in shape:
        raise checkpoint.error(f"1 mis-shaped ({key} {shape}, expected {n_axes} axes)")
    return shape


def heads_of(checkpoint: Checkpoint, dim: int, given: object = None) -> int:
    """Attention heads, which no tensor shows: as given, or 64 channels each (80 in ViT-H).

    Raises `EncoderError` where the channels cannot be shared among them.
    """
    if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
        raise checkpoint.error(f"its settings say num_heads = {given!r}, expected a whole number")
    heads = given if isinstance(given, int) else 16 if dim == 1280 else max(1, dim // 64)
    if heads < 1 or dim % heads:
        raise checkpoint.error(f"{dim} channels do not make {heads} attention heads")
    return heads


def fit(
    checkpoint: Checkpoint,
    state: Mapping[str, Any],
    build: Callable[[], Network],
    *,
    what: str = "the architecture",
) -> Network:
    """The network that `build` makes with the weights of `state`, which fit it exactly.

    It comes in float32 and evaluation mode, without gradients. Raises `EncoderError` with the
    missing, unexpected and mis-shaped keys; `what` names the network there.
    """
    with torch.device("meta"):
        network = build()
    expected = network.state_dict()
    _check_fit(checkpoint, state, expected, what)
    # A copy: tensors of a file that is mapped would change with it.
    prepared = {key: _prepared(value) for key, value in state.items()}
    network.load_state_dict(prepared, strict=True, assign=True)
    network.eval().requires_grad_(False)
    return network


def _check_fit(
    checkpoint: Checkpoint, state: Mapping[str, Any], expected: Mapping[str, Tensor], what: str
) -> None:
    missing = [key for key in expected if key not in state]
    unexpected = [str(key) for key in state if key not in expected]
    misshaped = [
        f"{key} {_describe(state[key])} for {_describe(value)}"
        for key, value in expected.items()
        if key in state and _describe(state[key]) != _describe(value)
    ]
    if missing or unexpected or misshaped:
        raise checkpoint.error(
            f"does not fit {what}: {_listed('missing', missing)}; "
            f"{_listed('unexpected', unexpected)}; {_listed('mis-shaped', misshaped)}"
        )


def _prepared(value: Tensor) -> Tensor:
    if value.is_floating_point():
        return value.to(torch.float32, copy=True).contiguous()
    return value.clone()


def _describe(value: object) -> str:
    """A tensor's shape, and whether it holds whole numbers; floats of any width are widened."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "" if value.is_floating_point() else " of whole numbers"
    return f"{tuple(value.shape)}{kind}"


def _listed(kind: str, keys: Sequence[str]) -> str:
    if not keys:
        return f"0 {kind}"
    more = ", ..." if len(keys) > SHOWN_KEYS else ""
    return f"{len(keys)} {kind} ({', '.join(keys[:SHOWN_KEYS])}{more})"
