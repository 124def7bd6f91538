"""What training is worth: the architecture of `tiny` with its first weights, drawn from a seed."""

from __future__ import annotations

from pathlib import Path

import torch

from patchbank.pipeline.encoders.digests import state_sha256
from patchbank.pipeline.encoders.tiny import (
    TinyConfig,
    TinyEncoder,
    empty_tiny,
    initialise,
    tiny_spec,
)
from patchbank.pipeline.errors import EncoderError

LICENCE = "Apache-2.0"
SEED = 0


def load(weights: Path | None, device: torch.device | str) -> TinyEncoder:
    """A `TinyEncoder` that has learned nothing; it takes no weights."""
    if weights is not None:
        raise EncoderError(f"tiny-random has no weights, found {weights}; leave --weights out")
    config = TinyConfig()
    model = empty_tiny(config)
    initialise(model, seed=SEED)
    spec = tiny_spec(
        "tiny-random",
        config,
        weights_sha256=state_sha256(model),
        source=f"drawn from seed {SEED}",
    )
    return TinyEncoder(model, spec).to(device)
