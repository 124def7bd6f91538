"""AudioMAE: a masked autoencoder on AudioSet spectrograms (arXiv:2207.06405).

Takes facebookresearch/AudioMAE's `{model, args}` files, pre-trained and fine-tuned, and folders or
files with timm's names. The stored position table is built the other way round than the tokens
run; it was trained so, and is loaded as it is.
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

EXPECTED = (
    "pretrained.pth or finetuned.pth of facebookresearch/AudioMAE, or a folder with timm's names"
)
PRESETS = {
    PUBLISHED: KaldiSettings(
        "audiomae", mean=-4.2677393, divisor=2 * 4.5689974, lengths=(1024,), short_clips=FRAMES
    )
}
"""AudioMAE:dataset.py, main_pretrain.py."""


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The encoder in a file; decoder and head are left out. Raises `EncoderError`."""
    settings = choose_settings("audiomae", PRESETS, preset, frontend)
    checkpoint = read_checkpoint(weights, encoder="audiomae", expected=EXPECTED)
    every = without_prefix(
        checkpoint,
        tensors_of(checkpoint.section("model", "state_dict")),
        "model.",
        "module.",
        "encoder.",
    )
    state = without(every, "decoder", "mask_token", "fc_norm.", "head.")
    return vit_encoder(
        checkpoint,
        state,
        settings=settings,
        device=device,
        heads=_heads(checkpoint.config),
        fine_tuned="head.weight" in every,
    )


def _heads(config: Mapping[str, Any]) -> object:
    """As timm's config.json says, where it does."""
    arguments = config.get("model_args", config)
    return arguments.get("num_heads") if isinstance(arguments, Mapping) else None
