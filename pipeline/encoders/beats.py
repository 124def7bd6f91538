"""BEATs: audio pre-training with acoustic tokenizers (arXiv:2212.09058).

Takes microsoft/unilm:beats' `{cfg, model}` files, pre-trained and fine-tuned; the architecture is
what `cfg` says. No CLS token, and no padding: what is left of the last patch is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchbank.pipeline.encoders.beats_network import BeatsConfig, BeatsNetwork
from patchbank.pipeline.encoders.checkpoint import (
    Checkpoint,
    State,
    fit,
    read_checkpoint,
    tensors_of,
    without,
)
from patchbank.pipeline.encoders.frontend import BAT, PUBLISHED, choose_settings
from patchbank.pipeline.encoders.kaldi import ZERO_AFTER, KaldiFrontEnd, KaldiSettings
from patchbank.pipeline.encoders.patch_encoder import PATCH, PatchEncoder

EXPECTED = "a file {cfg, model} of microsoft/unilm:beats, such as BEATs_iter3_plus_AS2M.pt"
_WAVE = {"scale": 2.0**15, "removes_mean": False, "window": "povey"}
_STATISTICS = {"mean": 15.41663, "divisor": 2 * 6.55582}
PRESETS = {
    PUBLISHED: KaldiSettings("beats", pads_longer=False, **_WAVE, **_STATISTICS),  # type: ignore[arg-type]
    BAT: KaldiSettings("beats", padding=ZERO_AFTER, **_WAVE, **_STATISTICS),  # type: ignore[arg-type]
}
"""unilm:beats/BEATs.py; BAT_ICML2026:data/legacy_audio_datasets.py, which pads to whole patches."""
REQUIRED = {
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
"""What every published file says and this network is built for."""


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The encoder in a file; a fine-tuned one's predictor is left out. Raises `EncoderError`."""
    settings = choose_settings("beats", PRESETS, preset, frontend)
    checkpoint = read_checkpoint(weights, encoder="beats", expected=EXPECTED)
    config = read_config(checkpoint)
    published = tensors_of(checkpoint.section("model"))
    state = renamed(checkpoint, without(published, "predictor."), config)
    return PatchEncoder(
        KaldiFrontEnd(settings),
        fit(checkpoint, state, lambda: BeatsNetwork(config)),
        checkpoint,
        name="beats",
        config=asdict(config),
        fine_tuned="predictor.weight" in published,
        device=device,
    )


def read_config(checkpoint: Checkpoint) -> BeatsConfig:
    """The architecture in `cfg`: the classes' own defaults differ from the published files.

    Raises `EncoderError` where it is not there, lacks a size, or names another architecture.
    """
    cfg = checkpoint.content.get("cfg")
    if not isinstance(cfg, Mapping):
        raise checkpoint.error("there is no entry cfg")
    values: dict[str, Any] = {}
    for field in fields(BeatsConfig):
        value = cfg.get(field.name, field.default)
        if value is MISSING:
            raise checkpoint.error(f"cfg has no {field.name}")
        is_flag = field.name in ("deep_norm", "conv_bias")
        if isinstance(value, bool) != is_flag or not isinstance(value, int):
            raise checkpoint.error(f"cfg says {field.name} = {value!r}")
        if not is_flag and value < 1:
            raise checkpoint.error(f"cfg says {field.name} = {value!r}")
        values[field.name] = value
    for name, expected in {**REQUIRED, "input_patch_size": PATCH}.items():
        if cfg.get(name, expected) != expected:
            raise checkpoint.error(f"cfg says {name} = {cfg[name]!r}, only {expected!r} is known")
    config = BeatsConfig(**values)
    for name in ("encoder_attention_heads", "conv_pos_groups"):
        if config.encoder_embed_dim % values[name]:
            raise checkpoint.error(
                f"cfg says {name} = {values[name]}, which does not divide "
                f"{config.encoder_embed_dim} channels"
            )
    return config


def renamed(checkpoint: Checkpoint, published: State, config: BeatsConfig) -> State:
    """Published keys as those of `BeatsNetwork`.

    The weight-normed convolution becomes a plain one, and the bias table that the file repeats in
    every layer is kept once. Raises `EncoderError` where the layers' tables differ.
    """
    state: State = {}
    table = "self_attn.relative_attention_bias.weight"
    for key, value in published.items():
        if key.endswith(table):
            kept = state.setdefault("encoder.relative_attention_bias", value)
            if not torch.equal(kept, value):
                raise checkpoint.error(f"{key} differs from that of another layer")
        else:
            state[key.replace("encoder.pos_conv.0.", "encoder.pos_conv.")] = value
    g = state.pop("encoder.pos_conv.weight_g", None)
    v = state.pop("encoder.pos_conv.weight_v", None)
    if g is not None and v is not None:
        state["encoder.pos_conv.weight"] = plain_weight(checkpoint, g, v)
    return state


def plain_weight(checkpoint: Checkpoint, g: Tensor, v: Tensor) -> Tensor:
    """`g * v / |v|`, the norm over all but the kernel's places (weight norm with `dim=2`)."""
    if v.ndim != 3 or tuple(g.shape) != (1, 1, v.shape[2]):
        raise checkpoint.error(
            f"encoder.pos_conv.0 has weight_g {tuple(g.shape)} and weight_v {tuple(v.shape)}"
        )
    g, v = g.float(), v.float()
    norm: Tensor = torch.linalg.vector_norm(v, dim=(0, 1), keepdim=True)
    return g * v / norm
