"""Dasheng: a masked autoencoder on 272,000 hours of audio (arXiv:2406.06992).

Takes XiaoMi/dasheng's `{model, config}` files and the folders mispeech/dasheng-*. A patch is 64 mel
bands by 4 frames, so the grid is T x 1: 25 tokens a second. No CLS.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

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
from patchbank.pipeline.encoders.decibel import DecibelFrontEnd, DecibelSettings
from patchbank.pipeline.encoders.frontend import PUBLISHED, choose_settings
from patchbank.pipeline.encoders.patch_encoder import AFTER_NORM, PatchEncoder, TokenNetwork
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Grid

EXPECTED = (
    "dasheng_base.pt, dasheng_06b.pt or dasheng_12b.pt (Zenodo 11511780), or the folder of a "
    "mispeech/dasheng-* repository"
)
PRESETS = {PUBLISHED: DecibelSettings("dasheng")}
"""dasheng:train/models.py."""
NORM_EPS = 1e-6
PATCH_FRAMES = 4
WINDOW, BANK = "front_end.0.spectrogram.window", "front_end.0.mel_scale.fb"


class DashengNetwork(TokenNetwork):
    """A norm of each mel band, patches, blocks, a norm.

    Clips of more frames than the positions have are cut into chunks; the last is padded with zeros
    (after the norm of the bands), and the tokens of the padding are dropped.
    """

    n_prefix = 0
    patch_frames = PATCH_FRAMES
    last_meaning = AFTER_NORM

    def __init__(
        self, *, dim: int, depth: int, heads: int, hidden: int, n_mels: int, n_times: int
    ) -> None:
        super().__init__()
        self.dim, self.depth = dim, depth
        self._chunk = n_times * PATCH_FRAMES
        norm: Any = partial(nn.LayerNorm, eps=NORM_EPS)
        self.init_bn = nn.BatchNorm1d(n_mels)
        self.patch_embed = nn.Conv2d(1, dim, (n_mels, PATCH_FRAMES), (n_mels, PATCH_FRAMES))
        self.time_pos_embed = nn.Parameter(torch.empty(1, dim, 1, n_times))
        self.freq_pos_embed = nn.Parameter(torch.empty(1, dim, 1, 1))
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden / dim, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(dim)

    def grid(self, n_frames: int) -> Grid:
        if n_frames < PATCH_FRAMES:
            raise EncoderError(
                f"dasheng needs at least {PATCH_FRAMES} frames, found {n_frames}; choose a longer "
                "window"
            )
        return Grid(n_frames // PATCH_FRAMES, 1)

    def hidden_states(
        self, features: Float[Tensor, "batch time freq"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        n_times = self.grid(features.shape[1]).time
        x = self.init_bn(features.transpose(1, 2))
        if x.shape[2] <= self._chunk:
            return self._states(x, n_layers)
        chunks = [
            F.pad(chunk, (0, self._chunk - chunk.shape[2])) for chunk in x.split(self._chunk, 2)
        ]
        parts = [self._states(chunk, n_layers) for chunk in chunks]
        return [torch.cat(layer, 1)[:, :n_times] for layer in zip(*parts, strict=True)]

    def _states(
        self, x: Float[Tensor, "batch freq time"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        x = self.patch_embed(x[:, None])
        x = x + self.time_pos_embed[..., : x.shape[3]] + self.freq_pos_embed
        x = x.flatten(2).transpose(1, 2)
        states = []
        for block in self.blocks[:n_layers]:
            x = block(x)
            states.append(x)
        if n_layers == self.depth:
            states[-1] = self.norm(x)
        return states


def load(
    weights: Path | None,
    device: torch.device | str,
    *,
    preset: str | None = None,
    frontend: Mapping[str, Any] | None = None,
) -> PatchEncoder:
    """The encoder in a file or folder. Raises `EncoderError`."""
    settings = choose_settings("dasheng", PRESETS, preset, frontend)
    checkpoint = read_checkpoint(weights, encoder="dasheng", expected=EXPECTED)
    published = without_prefix(
        checkpoint, tensors_of(checkpoint.section("model")), "model.", "encoder."
    )
    state = _renamed(without(published, "front_end.", "outputlayer."))
    # Counts batches of the training, where the file has it; no token depends on it.
    state.setdefault("init_bn.num_batches_tracked", torch.tensor(0))
    dim = shape_of(checkpoint, state, "patch_embed.weight", 4)[0]
    n_mels = shape_of(checkpoint, state, "init_bn.weight", 1)[0]
    sizes = {
        "heads": heads_of(checkpoint, dim, _heads(checkpoint)),
        "hidden": shape_of(checkpoint, state, "blocks.0.mlp.fc1.weight", 2)[0],
        "n_mels": n_mels,
        "n_times": shape_of(checkpoint, state, "time_pos_embed", 4)[-1],
    }
    network = fit(
        checkpoint, state, lambda: DashengNetwork(dim=dim, depth=depth_of(state), **sizes)
    )
    return PatchEncoder(
        _frontend(checkpoint, settings, published, n_mels),
        network,
        checkpoint,
        name="dasheng",
        config={**sizes, "norm_eps": NORM_EPS, "last_chunk": "padded with zeros"},
        fine_tuned=False,
        device=device,
    )


def _renamed(published: State) -> State:
    """Without the indices of containers that hold one module with weights."""
    return {
        key.replace("init_bn.1.", "init_bn.").replace("patch_embed.proj.", "patch_embed."): value
        for key, value in published.items()
    }


def _frontend(
    checkpoint: Checkpoint, settings: DecibelSettings, published: State, n_mels: int
) -> DecibelFrontEnd:
    """With the window and the mel filters of the file, where it has them."""
    computed = DecibelFrontEnd(settings)
    if n_mels != settings.n_mels:
        raise checkpoint.error(
            f"init_bn is of {n_mels} mel bands, the front end has {settings.n_mels}"
        )
    own = {}
    for key, name in ((WINDOW, "window"), (BANK, "bank")):
        if key not in published:
            continue
        like = getattr(computed, name)
        if published[key].shape != like.shape or not torch.allclose(
            published[key].float(), like, atol=1e-4
        ):
            raise checkpoint.error(f"{key} is not what the front end's constants make")
        own[name] = published[key].float().clone()
    return DecibelFrontEnd(settings, **own)


def _heads(checkpoint: Checkpoint) -> object:
    """As the entry config, or config.json of a folder, says; the name there stands for sizes."""
    entry = checkpoint.content.get("config")
    for config in (entry, checkpoint.config.get("encoder_kwargs"), checkpoint.config):
        if isinstance(config, Mapping) and "num_heads" in config:
            return config["num_heads"]
    return None
