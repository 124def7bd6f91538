"""EAT: an efficient audio transformer trained on AudioSet (arXiv:2401.03497).

Takes cwx-worst-one/EAT's fairseq files (half precision is widened, the nested `_ema` never read),
the same fine-tuned, and the Hugging Face folders worstchan/EAT-*. SSLAM has the same architecture
and files. A block is torch's own `TransformerEncoderLayer`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchbank.pipeline.encoders.checkpoint import (
    Checkpoint,
    State,
    depth_of,
    fit,
    heads_of,
    read_checkpoint,
    shape_of,
    tensors_of,
    without,
    without_prefix,
)
from patchbank.pipeline.encoders.frontend import BAT, PUBLISHED, choose_settings
from patchbank.pipeline.encoders.kaldi import FRAMES, ZERO_AFTER, KaldiFrontEnd, KaldiSettings
from patchbank.pipeline.encoders.patch_encoder import PatchEncoder
from patchbank.pipeline.encoders.post_norm import NORM_EPS, PostNormNetwork

EXPECTED = (
    "a fairseq file of cwx-worst-one/EAT, pre-trained or fine-tuned, or the folder of a "
    "worstchan/EAT-* repository"
)
RENAMED = (
    (r"^extra_tokens$", "cls"),
    (r"^local_encoder\.proj\.", "proj."),
    (r"^fixed_positional_encoder\.positions$", "positions"),
    (r"^context_encoder\.norm\.", "pre_norm."),
    (r"\.attn\.qkv\.", ".self_attn.in_proj_"),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.fc([12])\.", r".linear\1."),
)
"""Published names, once their prefixes are off, and torch's."""


def presets(name: str) -> dict[str, KaldiSettings]:
    """The front ends of EAT and SSLAM.

    Published: EAT:feature_extract/feature_extract.py, data/raw_audio_dataset.py. bat:
    BAT_ICML2026:data/legacy_audio_datasets.py, which feeds 10.23 s of a 10 s clip.
    """
    return {
        PUBLISHED: KaldiSettings(
            name, mean=-4.268, divisor=2 * 4.569, lengths=(1024,), short_clips=FRAMES
        ),
        BAT: KaldiSettings(name, mean=-4.59864076, divisor=2 * 4.357353477, padding=ZERO_AFTER),
    }


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The encoder in a file or folder; decoder and head are left out. Raises `EncoderError`."""
    return load_as("eat", EXPECTED, weights, device, preset=preset, frontend=frontend)


def load_as(
    name: str,
    expected: str,
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None,
    frontend: Mapping[str, Any] | None,
) -> PatchEncoder:
    """`load` under the name of EAT or of SSLAM."""
    settings = choose_settings(name, presets(name), preset, frontend)
    checkpoint = read_checkpoint(weights, encoder=name, expected=expected)
    published = tensors_of(checkpoint.section("model"))
    every = without_prefix(checkpoint, published, "model.", "modality_encoders.IMAGE.")
    state = renamed(without(every, "decoder.", "fc_norm.", "head.", "_ema."))
    _check_settings(checkpoint)
    dim = shape_of(checkpoint, state, "proj.weight", 4)[0]
    hidden = shape_of(checkpoint, state, "blocks.0.linear1.weight", 2)[0]
    n_positions = shape_of(checkpoint, state, "positions", 3)[1]
    heads = heads_of(checkpoint, dim, _settings(checkpoint).get("num_heads"))

    def build() -> PostNormNetwork:
        blocks = nn.ModuleList(_block(dim, heads, hidden) for _ in range(depth_of(state)))
        return PostNormNetwork(blocks, name=name, dim=dim, n_positions=n_positions)

    return PatchEncoder(
        KaldiFrontEnd(settings),
        fit(checkpoint, state, build),
        checkpoint,
        name=name,
        config={
            "heads": heads,
            "hidden": hidden,
            "stored_positions": n_positions,
            "norm_eps": NORM_EPS,
        },
        fine_tuned="head.weight" in every,
        device=device,
    )


def _block(dim: int, heads: int, hidden: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        dim, heads, hidden, 0.0, "gelu", layer_norm_eps=NORM_EPS, batch_first=True
    )


def renamed(published: State) -> State:
    """Keys of one of the four layouts, without their prefixes, as those of `PostNormNetwork`."""
    state: State = {}
    for key, value in published.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        state[key] = value
    return state


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Those of the model in config.json or in a fairseq file; empty where there are none."""
    if checkpoint.config:
        return checkpoint.config
    settings = checkpoint.content.get("cfg")
    model = settings.get("model") if isinstance(settings, Mapping) else None
    return model if isinstance(model, Mapping) else {}


def _check_settings(checkpoint: Checkpoint) -> None:
    for name, expected in (("layer_norm_first", False), ("norm_eps", NORM_EPS)):
        found = _settings(checkpoint).get(name, expected)
        if found != expected:
            raise checkpoint.error(
                f"its settings say {name} = {found!r}, only {expected!r} is known"
            )
