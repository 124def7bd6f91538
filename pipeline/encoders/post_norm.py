"""Post-norm patch transformers with a CLS token without position: what EAT, SSLAM and BAT share."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchbank.pipeline.encoders.patch_encoder import N_BANDS, PATCH, TokenNetwork, whole_patches
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Grid

NORM_EPS = 1e-6


class PostNormNetwork(TokenNetwork):
    """16 x 16 patches plus the first rows of a position table, CLS in front, a norm, blocks.

    Clips of more time patches than `longest` are cut into chunks of so many; each has positions
    from the beginning and a CLS of its own, whose mean is the clip's.
    """

    n_prefix = 1

    def __init__(
        self,
        blocks: nn.ModuleList,
        *,
        name: str,
        dim: int,
        n_positions: int,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.depth = dim, len(blocks)
        self._name, self._longest = name, longest
        self.proj = nn.Conv2d(1, dim, PATCH, PATCH)
        self.cls = nn.Parameter(torch.empty(1, 1, dim))
        self.register_buffer("positions", torch.empty(1, n_positions, dim))
        self.pre_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.blocks = blocks

    positions: Tensor

    def grid(self, n_frames: int) -> Grid:
        grid = whole_patches(n_frames, self._name)
        most = self.positions.shape[1] // N_BANDS
        if min(grid.time, self._longest or grid.time) > most:
            raise EncoderError(
                f"{self._name}: the weights have positions for {most * PATCH} frames, found "
                f"{n_frames}; choose a window of at most {most * PATCH / 100:g} s"
            )
        return grid

    def hidden_states(
        self, features: Float[Tensor, "batch time freq"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        grid = self.grid(features.shape[1])
        length = PATCH * (self._longest or grid.time)
        chunks = features[:, : grid.time * PATCH].split(length, 1)
        parts = [self._states(chunk, n_layers) for chunk in chunks]
        if len(parts) == 1:
            return parts[0]
        return [
            torch.cat(
                [
                    torch.stack([part[layer][:, :1] for part in parts]).mean(0),
                    *(part[layer][:, 1:] for part in parts),
                ],
                1,
            )
            for layer in range(n_layers)
        ]

    def _states(
        self, features: Float[Tensor, "batch time freq"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        patches = self.proj(features[:, None]).flatten(2).transpose(1, 2)
        patches = patches + self.positions[:, : patches.shape[1]]
        x = self.pre_norm(torch.cat([self.cls.expand(patches.shape[0], -1, -1), patches], 1))
        states = []
        for block in self.blocks[:n_layers]:
            x = block(x)
            states.append(x)
        return states
