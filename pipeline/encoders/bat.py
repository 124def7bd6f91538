"""BAT: EAT with gated attention, trained on AudioSet (houtan-ghaffari/BAT_ICML2026).

Takes model.safetensors, or the folder, of lrauch/BAT-vit-b16-pretrainedAS2M, and training files
with the keys student.encoder.*. The position table is built the other way round than the tokens
run; it was trained so, and is loaded as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from patchbank.pipeline.encoders.checkpoint import (
    depth_of,
    fit,
    heads_of,
    read_checkpoint,
    shape_of,
    tensors_of,
    without,
    without_prefix,
)
from patchbank.pipeline.encoders.decibel import PER_CLIP_RANGE, DecibelFrontEnd, DecibelSettings
from patchbank.pipeline.encoders.frontend import BAT, PUBLISHED, choose_settings
from patchbank.pipeline.encoders.patch_encoder import N_BANDS, PatchEncoder
from patchbank.pipeline.encoders.post_norm import NORM_EPS, PostNormNetwork

EXPECTED = "model.safetensors or the folder of lrauch/BAT-vit-b16-pretrainedAS2M"
LONGEST = 64
"""Time patches of a chunk."""
_SETTINGS = DecibelSettings(
    "bat",
    n_fft=1024,
    n_mels=128,
    top_db=80.0,
    normalises=PER_CLIP_RANGE,
    length=1024,
    patch_frames=16,
)
PRESETS = {PUBLISHED: _SETTINGS, BAT: _SETTINGS}
"""BAT_ICML2026:data/bat_audio_datasets.py."""


class GatedBlock(nn.Module):
    """Post-norm block; what attention gives is gated, channel by channel, by the block's input."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict(
            {
                "qkv": nn.Linear(dim, 3 * dim),
                "gate": nn.Linear(dim, dim),
                "proj": nn.Linear(dim, dim),
            }
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        q, k, v = self.attn["qkv"](x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.attn["proj"](attended * self.attn["gate"](x).sigmoid()))
        out: Tensor = self.norm2(x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))))
        return out


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The encoder in a file or folder; a head is left out. Raises `EncoderError`."""
    settings = choose_settings("bat", PRESETS, preset, frontend)
    checkpoint = read_checkpoint(weights, encoder="bat", expected=EXPECTED)
    published = tensors_of(checkpoint.section("state_dict", "model"))
    if any(key.startswith("student.encoder.") for key in published):
        published = {k: v for k, v in published.items() if k.startswith("student.encoder.")}
    every = without_prefix(checkpoint, published, "student.encoder.", "model.")
    names = {"cls_token": "cls", "pos_embed": "positions"}
    state = {
        names.get(key, key.removeprefix("patch_embed.")): value
        for key, value in without(every, "head.").items()
    }
    dim = shape_of(checkpoint, state, "proj.weight", 4)[0]
    hidden = shape_of(checkpoint, state, "blocks.0.mlp.fc1.weight", 2)[0]
    n_positions = min(shape_of(checkpoint, state, "positions", 3)[1], LONGEST * N_BANDS)
    state["positions"] = state["positions"][:, :n_positions]
    heads = heads_of(checkpoint, dim, checkpoint.config.get("num_heads"))

    def build() -> PostNormNetwork:
        blocks = nn.ModuleList(GatedBlock(dim, heads, hidden) for _ in range(depth_of(state)))
        return PostNormNetwork(
            blocks, name="bat", dim=dim, n_positions=n_positions, longest=LONGEST
        )

    return PatchEncoder(
        DecibelFrontEnd(settings),
        fit(checkpoint, state, build),
        checkpoint,
        name="bat",
        config={
            "heads": heads,
            "hidden": hidden,
            "stored_positions": n_positions,
            "chunk_time_patches": LONGEST,
            "norm_eps": NORM_EPS,
        },
        fine_tuned="head.weight" in every,
        device=device,
    )
