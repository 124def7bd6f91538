"""Synthetic tokens whose classes hide in single patches, and the smallest bank over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from patchbank.probing.batch import ArraySource, LayerTokens, TokenSource

ENCODER = {"name": "needle", "weights_sha256": "0" * 64, "config": {"depth": 2}}


def clip_table(n_clips: int, **columns: list[Any]) -> pa.Table:
    """A bank's clip table: clip `r0/0` is the first 10 s of recording `r0.wav`, and so on."""
    facts: dict[str, list[Any]] = {
        "clip_id": [f"r{clip // 2}/{clip % 2}" for clip in range(n_clips)],
        "view": [0] * n_clips,
        "path": [f"r{clip // 2}.wav" for clip in range(n_clips)],
        "start_s": [10.0 * (clip % 2) for clip in range(n_clips)],
        "duration_s": [10.0] * n_clips,
        "status": [1] * n_clips,
    }
    return pa.table(facts | columns)


def needle_tokens(
    n_clips: int,
    *,
    n_patches: int = 24,
    dim: int = 24,
    n_classes: int = 4,
    seed: int = 0,
    multi_label: bool = True,
) -> tuple[torch.Tensor, np.ndarray]:
    """Noise tokens and float32 targets; each class of a clip replaces one token by its own."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(n_classes, dim)).astype(np.float32)
    tokens = random.normal(size=(n_clips, n_patches, dim)).astype(np.float32)
    if multi_label:
        targets = (random.random((n_clips, n_classes)) < 0.4).astype(np.float32)
    else:
        targets = np.eye(n_classes, dtype=np.float32)[random.integers(n_classes, size=n_clips)]
    for clip, number in zip(*np.nonzero(targets), strict=True):
        tokens[clip, random.integers(n_patches)] = directions[number]
    return torch.from_numpy(tokens), targets


@dataclass(frozen=True)
class NeedleBank:
    """What training needs of a bank, over tokens in memory."""

    clips: pa.Table
    tokens: torch.Tensor
    prefix: torch.Tensor | None = None
    card: Mapping[str, Any] = field(
        default_factory=lambda: {"encoder": ENCODER, "window": {"window_s": 10.0}}
    )
    fingerprint: str = "f" * 64
    encoder_id: str = "e" * 64
    recipe_id: str = "d" * 64
    layers: tuple[int, ...] = (1, 2)

    def source(self, layers: Sequence[int]) -> TokenSource:
        return ArraySource({layer: LayerTokens(self.tokens, self.prefix) for layer in layers})
