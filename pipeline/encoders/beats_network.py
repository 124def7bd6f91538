"""The BEATs transformer: post-norm with gated relative position bias (arXiv:2212.09058).

Written from what microsoft/unilm:beats computes. Dropout and layer-drop are off in evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from patchbank.pipeline.encoders.patch_encoder import PATCH, TokenNetwork, whole_patches
from patchbank.pipeline.specs import Grid


@dataclass(frozen=True)
class BeatsConfig:
    """What a file's `cfg` says of the architecture, under its names."""

    embed_dim: int
    encoder_layers: int
    encoder_embed_dim: int
    encoder_ffn_embed_dim: int
    encoder_attention_heads: int
    conv_pos: int
    conv_pos_groups: int
    num_buckets: int
    max_distance: int
    deep_norm: bool
    input_patch_size: int = PATCH
    conv_bias: bool = False


class GatedAttention(nn.Module):
    """Self-attention whose position bias is scaled, query by query, by a gate of the query."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        dim, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.out_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.grep_linear = nn.Linear(dim // self.heads, 8)
        self.grep_a = nn.Parameter(torch.empty(1, self.heads, 1, 1))

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        bias: Float[Tensor, "head token token"],
    ) -> Float[Tensor, "batch token dim"]:
        q, k, v = (
            projection(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.grep_linear(q).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = gates[..., :1], gates[..., 1:]
        scale = update * (reset * self.grep_a - 1.0) + 2.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=scale * bias)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class BeatsBlock(nn.Module):
    """Attention and GELU perceptron; residuals are weighted by `alpha` (DeepNorm), then normed."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0
        self.self_attn = GatedAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, config.encoder_ffn_embed_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_embed_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Float[Tensor, "batch token dim"],
        bias: Float[Tensor, "head token token"],
    ) -> Float[Tensor, "batch token dim"]:
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x, bias))
        out: Tensor = self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x))))
        return out


class BeatsEncoder(nn.Module):
    """From embedded patches to the layers: positions, a norm, blocks that share a bias table."""

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.config = config
        self.pos_conv = nn.Conv1d(
            dim,
            dim,
            config.conv_pos,
            padding=config.conv_pos // 2,
            groups=config.conv_pos_groups,
        )
        self.layer_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(BeatsBlock(config) for _ in range(config.encoder_layers))
        # No `nn.Embedding`: its first values, drawn where nothing is stored, import sympy (5 s).
        self.relative_attention_bias = nn.Parameter(
            torch.empty(config.num_buckets, config.encoder_attention_heads)
        )

    def hidden_states(
        self, x: Float[Tensor, "batch token dim"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        """The output of the first `n_layers` blocks."""
        # An even kernel gives one place too many.
        positions = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]]
        x = self.layer_norm(x + F.gelu(positions).transpose(1, 2))
        bias = self._bias(x.shape[1], x.device)
        states = []
        for block in self.layers[:n_layers]:
            x = block(x, bias)
            states.append(x)
        return states

    def _bias(self, n_tokens: int, device: torch.device) -> Float[Tensor, "head token token"]:
        places = torch.arange(n_tokens, device=device)
        buckets = relative_buckets(
            places[None] - places[:, None], self.config.num_buckets, self.config.max_distance
        )
        return self.relative_attention_bias[buckets].permute(2, 0, 1)


class BeatsNetwork(TokenNetwork):
    """Patches, a grouped convolution as position, blocks. No CLS; the last norm is in the block."""

    n_prefix = 0

    def __init__(self, config: BeatsConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.depth = config.encoder_embed_dim, config.encoder_layers
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, PATCH, PATCH, bias=config.conv_bias)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        if config.embed_dim != self.dim:
            self.post_extract_proj = nn.Linear(config.embed_dim, self.dim)
        self.encoder = BeatsEncoder(config)

    def grid(self, n_frames: int) -> Grid:
        return whole_patches(n_frames, "beats")

    def hidden_states(
        self, features: Float[Tensor, "batch time freq"], n_layers: int
    ) -> list[Float[Tensor, "batch token dim"]]:
        x = self.patch_embedding(features[:, None]).flatten(2).transpose(1, 2)
        x = self.layer_norm(x)
        if self.config.embed_dim != self.dim:
            x = self.post_extract_proj(x)
        return self.encoder.hidden_states(x, n_layers)


def relative_buckets(
    distance: Int64[Tensor, "query key"], n_buckets: int, max_distance: int
) -> Int64[Tensor, "query key"]:
    """The bucket of each distance key - query, as in T5: near ones apart, far ones logarithmic.

    Half the buckets are for keys after the query. Raffel et al. 2020, arXiv:1910.10683.
    """
    half = n_buckets // 2
    exact = half // 2
    size = distance.abs()
    far = (size.float() / exact).log() / math.log(max_distance / exact) * (half - exact)
    # The logarithm of a distance of 0 is not used, and no integer.
    far = exact + far.clamp_min(0.0).long()
    near_or_far = torch.where(size < exact, size, far.clamp_max(half - 1))
    return near_or_far + half * (distance > 0)
