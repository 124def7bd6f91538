"""Pre-norm vision transformers on spectrograms: what AudioMAE, ASiT and Bird-MAE share.

The blocks are timm's; the publishers' state dicts fit timm's `VisionTransformer` key by key.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchbank.pipeline.encoders.checkpoint import (
    Checkpoint,
    State,
    depth_of,
    fit,
    heads_of,
    shape_of,
)
from patchbank.pipeline.encoders.kaldi import KaldiFrontEnd, KaldiSettings
from patchbank.pipeline.encoders.patch_encoder import (
    AFTER_NORM,
    BLOCK_OUTPUT,
    N_BANDS,
    PATCH,
    PatchEncoder,
    TokenNetwork,
    whole_patches,
)
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Grid

NORM_EPS = 1e-6
FRAMES_PER_S = 100


class SpectrogramViT(TokenNetwork):
    """16 x 16 patches of 128 mel bands and a CLS token, with stored positions for both.

    The stored table has `n_times` time patches; others are interpolated from it where `resizes`.
    """

    n_prefix = 1

    vit: Any

    def __init__(self, vit: VisionTransformer, *, name: str, n_times: int, resizes: bool) -> None:
        super().__init__()
        self.vit = vit
        self.dim, self.depth = vit.embed_dim, len(vit.blocks)
        self.last_meaning = BLOCK_OUTPUT if isinstance(vit.norm, nn.Identity) else AFTER_NORM
        self._name, self._n_times, self._resizes = name, n_times, resizes

    def grid(self, n_frames: int) -> Grid:
        grid = whole_patches(n_frames, self._name)
        if grid.time != self._n_times and not self._resizes:
            n_stored = self._n_times * PATCH
            raise EncoderError(
                f"{self._name} has positions for {n_stored} frames, found {n_frames}; choose a "
                f"window of at most {n_stored / FRAMES_PER_S:g} s"
            )
        return grid

    def hidden_states(
        self, features: Float[Tensor, "batch time freq"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        grid = self.grid(features.shape[1])
        whole = features[:, None, : grid.time * PATCH]
        patches = self.vit.patch_embed.proj(whole).flatten(2).transpose(1, 2)
        x = torch.cat([self.vit.cls_token.expand(patches.shape[0], -1, -1), patches], 1)
        x = x + self._positions(grid)
        states = []
        for block in self.vit.blocks[:n_layers]:
            x = block(x)
            states.append(x)
        if n_layers == self.depth:
            states[-1] = self.vit.norm(x)
        return states

    def _positions(self, grid: Grid) -> Float[Tensor, "1 token dim"]:
        table: Tensor = self.vit.pos_embed
        if grid.time == self._n_times:
            return table
        # Not timm's resampling, which is anti-aliased: the publishers' is not.
        stored = table[:, 1:].transpose(1, 2).unflatten(2, (self._n_times, N_BANDS))
        size = (grid.time, grid.freq)
        resized = F.interpolate(stored, size=size, mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], 1)


def vit_encoder(
    checkpoint: Checkpoint,
    state: State,
    *,
    settings: KaldiSettings,
    device: torch.device | str,
    heads: object = None,
    resizes: bool = False,
    fine_tuned: bool = False,
) -> PatchEncoder:
    """The encoder in a state dict with timm's names; sizes are read off the shapes.

    Where there is no `norm`, as in files that were fine-tuned with pooled tokens, the last layer
    is the last block's output. Raises `EncoderError` where the state does not fit.
    """
    dim = shape_of(checkpoint, state, "patch_embed.proj.weight", 4)[0]
    hidden = shape_of(checkpoint, state, "blocks.0.mlp.fc1.weight", 2)[0]
    n_positions = shape_of(checkpoint, state, "pos_embed", 3)[1]
    n_heads = heads_of(checkpoint, dim, heads)
    n_times = max(1, (n_positions - 1) // N_BANDS)
    if not resizes and n_times * PATCH not in settings.lengths:
        raise checkpoint.error(
            f"it has positions for {n_times * PATCH} frames, {settings.encoder} is fed "
            f"{' or '.join(map(str, settings.lengths)) or 'any number'}"
        )
    has_norm = "norm.weight" in state

    def build() -> VisionTransformer:
        vit = VisionTransformer(
            img_size=(n_times * PATCH, N_BANDS * PATCH),
            patch_size=PATCH,
            in_chans=1,
            num_classes=0,
            global_pool="token",
            embed_dim=dim,
            depth=depth_of(state),
            num_heads=n_heads,
            mlp_ratio=hidden / dim,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            weight_init="skip",
        )
        if not has_norm:
            vit.norm = nn.Identity()
        return vit

    name = settings.encoder
    network = SpectrogramViT(
        fit(checkpoint, state, build), name=name, n_times=n_times, resizes=resizes
    )
    return PatchEncoder(
        KaldiFrontEnd(settings),
        network,
        checkpoint,
        name=name,
        config={
            "heads": n_heads,
            "hidden": hidden,
            "stored_time_patches": n_times,
            "resizes_positions": resizes,
            "norm_eps": NORM_EPS,
        },
        fine_tuned=fine_tuned,
        device=device,
    )
