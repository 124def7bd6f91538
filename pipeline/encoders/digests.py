"""SHA-256 of weights: what names them in an encoder's spec."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn


def file_sha256(path: Path) -> str:
    """SHA-256 of a weight file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(model: nn.Module) -> str:
    """SHA-256 of a model's tensors, each as its name and its bytes, in order of name.

    For weights that lie in no file: they are drawn from a seed, or a library fetches them.
    """
    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().cpu().contiguous().flatten()
        state.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()
