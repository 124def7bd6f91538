"""Bird-MAE: a masked autoencoder on bird recordings (arXiv:2504.12880).

Takes the Hugging Face folders DBD-research-group/Bird-MAE-{Base,Large,Huge} and the Lightning
files of DBD-research-group/Bird-MAE. 32 kHz, 5 s clips; a clip is padded with its own minimum (the
published code pads with the minimum of the batch, which a clip alone has in common).
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
from patchbank.pipeline.encoders.kaldi import MINIMUM_BEFORE, KaldiSettings
from patchbank.pipeline.encoders.patch_encoder import PatchEncoder
from patchbank.pipeline.encoders.vit import vit_encoder

EXPECTED = (
    "model.safetensors or the folder of a DBD-research-group/Bird-MAE-* repository, or a Lightning "
    "checkpoint with keys encoder.*"
)
PRESETS = {
    PUBLISHED: KaldiSettings(
        "bird-mae",
        sample_rate_hz=32_000,
        mean=-7.2,
        divisor=2 * 4.43,
        lengths=(512,),
        padding=MINIMUM_BEFORE,
    )
}
"""Bird-MAE:transforms.py, configs/data/dataset."""


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The encoder in a file; decoder and head are left out. Raises `EncoderError`."""
    settings = choose_settings("bird-mae", PRESETS, preset, frontend)
    checkpoint = read_checkpoint(weights, encoder="bird-mae", expected=EXPECTED)
    every = without_prefix(
        checkpoint, tensors_of(checkpoint.section("state_dict", "model")), "model.", "encoder."
    )
    state = without(every, "decoder", "mask_token", "fc_norm.", "head.")
    return vit_encoder(
        checkpoint,
        state,
        settings=settings,
        device=device,
        heads=checkpoint.config.get("num_heads"),
        fine_tuned="head.weight" in every,
    )
