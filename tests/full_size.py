"""Checkpoints of the published sizes with random weights, from lists of the published keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from published_files import (
    BEATS_CFG,
    Shapes,
    State,
    bat_shapes,
    eat_shapes,
    folder,
    head,
    prefixed,
    random_state,
    torch_file,
    vit_shapes,
)
from safetensors.torch import save_file

BASE: dict[str, Any] = {"dim": 768, "depth": 12, "hidden": 3_072}
LARGE: dict[str, Any] = {"dim": 1_024, "depth": 24, "hidden": 4_096}
HUGE: dict[str, Any] = {"dim": 1_280, "depth": 32, "hidden": 5_120}


def listed(keys: Path, name: str) -> Shapes:
    """Shapes of a list of keys; nested entries are left out."""
    found = json.loads((keys / name).read_text())
    return {key: tuple(value[0]) for key, value in found.items() if isinstance(value, list)}


def state_of(shapes: Shapes) -> State:
    """Variances are positive, and the counter of a batch norm is an integer."""
    state = random_state(shapes)
    for key in state:
        if key.endswith("running_var"):
            state[key] = state[key].abs() + 1.0
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(1)
    return state


def beats(keys: Path, place: Path) -> Path:
    cfg = BEATS_CFG | {
        "embed_dim": 512,
        "encoder_layers": 12,
        "encoder_embed_dim": 768,
        "encoder_ffn_embed_dim": 3_072,
        "encoder_attention_heads": 12,
    }
    state = state_of(listed(keys, "beats/fullsize_keys.json"))
    table = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    state |= {table.format(index): state[table.format(0)] for index in range(12)}
    return torch_file(place / "beats.pt", {"cfg": cfg, "model": state})


def eat(keys: Path, place: Path) -> Path:
    state = state_of(listed(keys, "eat/fullsize_keys_fairseq_pretrain.json"))
    model: dict[str, Any] = {key: value.half() for key, value in state.items()}
    model["_ema"] = {"x": torch.zeros(1)}
    return torch_file(place / "eat.pt", {"cfg": {"model": {"num_heads": 12}}, "model": model})


def eat_large(keys: Path, place: Path) -> Path:
    state = prefixed(random_state(eat_shapes(6_144, **LARGE)), "model.")
    return folder(place / "eat_large", state, {"num_heads": 16})


def sslam_fine_tuned(keys: Path, place: Path) -> Path:
    state = prefixed(random_state(eat_shapes(6_144, **BASE)), "model.") | head("model.", dim=768)
    return folder(place / "sslam", state, {"num_heads": 12})


def audiomae(keys: Path, place: Path) -> Path:
    state = state_of(listed(keys, "audiomae/fullsize_keys_pretrained.json"))
    return torch_file(place / "audiomae.pth", {"model": state})


def asit(keys: Path, place: Path) -> Path:
    state = state_of(listed(keys, "asit/fullsize_keys_backbone.json"))
    return torch_file(place / "asit.pth", {"teacher": prefixed(state, "backbone.")})


def dasheng(keys: Path, place: Path) -> Path:
    from torchaudio.functional import melscale_fbanks

    state = state_of(listed(keys, "dasheng/fullsize_keys.json"))
    state["front_end.0.spectrogram.window"] = torch.hann_window(512)
    state["front_end.0.mel_scale.fb"] = melscale_fbanks(257, 0.0, 8_000.0, 64, 16_000)
    config = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return torch_file(place / "dasheng.pt", {"model": state, "config": config})


def bird_mae(sizes: dict[str, Any], heads: int) -> Callable[[Path, Path], Path]:
    def make(keys: Path, place: Path) -> Path:
        return folder(place / "bird", random_state(vit_shapes(32, **sizes)), {"num_heads": heads})

    return make


def bat(keys: Path, place: Path) -> Path:
    save_file(random_state(bat_shapes(**BASE)), place / "model.safetensors")
    return place / "model.safetensors"


FULL_SIZE: dict[str, tuple[str, float, Callable[[Path, Path], Path]]] = {
    "BEATs": ("beats", 10.0, beats),
    "EAT base": ("eat", 10.0, eat),
    "EAT large": ("eat", 10.0, eat_large),
    "SSLAM+": ("sslam", 10.0, sslam_fine_tuned),
    "AudioMAE": ("audiomae", 10.0, audiomae),
    "ASiT": ("asit", 10.0, asit),
    "Dasheng base": ("dasheng", 10.0, dasheng),
    "Bird-MAE base": ("bird-mae", 5.0, bird_mae(BASE, 12)),
    "Bird-MAE huge": ("bird-mae", 5.0, bird_mae(HUGE, 16)),
    "BAT": ("bat", 10.0, bat),
}
"""Model -> encoder name, seconds of a clip, and what writes its file."""
