"""ASiT: local and global self-supervision on spectrograms (arXiv:2211.13189).

Takes Sara-Ahmed/ASiT's `{student, teacher, ...}` files, of which the teacher is read. Positions
are learned for 37 time patches (6 s); those of other lengths are interpolated from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from patchbank.pipeline.encoders.checkpoint import (
    read_checkpoint,
    tensors_of,
    without,
    without_prefix,
)
from patchbank.pipeline.encoders.frontend import PUBLISHED, choose_settings
from patchbank.pipeline.encoders.kaldi import FRAMES, KaldiSettings
from patchbank.pipeline.encoders.patch_encoder import PatchEncoder
from patchbank.pipeline.encoders.vit import vit_encoder

EXPECTED = "a checkpoint of Sara-Ahmed/ASiT with the entry teacher, such as ASiT_16kHz.pth"
PRESETS = {
    PUBLISHED: KaldiSettings(
        "asit", mean=-4.2677393, divisor=2 * 4.5689974, lengths=(592, 1024), short_clips=FRAMES
    )
}
"""ASiT:data_transformations.py, main_ASiT.py; the released weights are of 16 kHz audio."""


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The teacher's backbone in a file. Raises `EncoderError`."""
    settings = choose_settings("asit", PRESETS, preset, frontend)
    checkpoint = read_checkpoint(weights, encoder="asit", expected=EXPECTED)
    teacher = checkpoint.content.get("teacher")
    if not isinstance(teacher, Mapping):
        raise checkpoint.error("there is no entry teacher")
    state = without_prefix(checkpoint, tensors_of(teacher), "module.", "backbone.")
    return vit_encoder(
        checkpoint,
        without(state, "head_cls.", "head_recons.", "head."),
        settings=settings,
        device=device,
        resizes=True,
    )
