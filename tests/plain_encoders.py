"""The encoders again, written out naively from published names, as something to compare with.

One clip at a time, softmax attention by hand, in the dtype of the weights (float64 in tests).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def norm(x: Tensor, state: State, name: str, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Of (token, dim) tensors; `bias` (head, token, token) is added to the scores."""
    width = q.shape[1] // heads
    out = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        if bias is not None:
            scores = scores + bias[head]
        out.append(torch.softmax(scores, -1) @ v[:, part])
    return torch.cat(out, 1)


def qkv_attention(
    x: Tensor, state: State, block: str, heads: int, *, gated: bool = False
) -> Tensor:
    q, k, v = linear(x, state, f"{block}.attn.qkv").chunk(3, -1)
    out = attention(q, k, v, heads)
    if gated:
        out = out * torch.sigmoid(linear(x, state, f"{block}.attn.gate"))
    return linear(out, state, f"{block}.attn.proj")


def perceptron(x: Tensor, state: State, block: str) -> Tensor:
    return linear(gelu(linear(x, state, f"{block}.mlp.fc1")), state, f"{block}.mlp.fc2")


def patches_of(frames: Tensor, state: State, name: str) -> Tensor:
    """Time-major (patch, dim) of (time, freq) frames, patch by patch."""
    weight = state[f"{name}.weight"]
    rows, bands = weight.shape[2:]
    bias = state.get(f"{name}.bias", torch.zeros(len(weight), dtype=weight.dtype))
    out = []
    for t in range(frames.shape[0] // rows):
        for f in range(frames.shape[1] // bands):
            patch = frames[t * rows : (t + 1) * rows, f * bands : (f + 1) * bands]
            out.append((weight[:, 0] * patch).sum((1, 2)) + bias)
    return torch.stack(out)


def vit(frames: Tensor, state: State, *, heads: int, depth: int, positions: Tensor) -> list[Tensor]:
    """AudioMAE, ASiT, Bird-MAE; every layer, CLS first."""
    patches = patches_of(frames, state, "patch_embed.proj")
    x = torch.cat([state["cls_token"][0], patches]) + positions
    layers = []
    for index in range(depth):
        block = f"blocks.{index}"
        x = x + qkv_attention(norm(x, state, f"{block}.norm1"), state, block, heads)
        x = x + perceptron(norm(x, state, f"{block}.norm2"), state, block)
        layers.append(x)
    if "norm.weight" in state:
        layers[-1] = norm(x, state, "norm")
    return layers


def post_norm(
    frames: Tensor, state: State, *, heads: int, depth: int, names: tuple[str, str, str]
) -> list[Tensor]:
    """EAT and SSLAM, and BAT where its gates are there; `names` of patches, CLS and positions."""
    proj, cls, positions = names
    patches = patches_of(frames, state, proj)
    x = torch.cat([state[cls][0], patches + state[positions][0, : len(patches)]])
    x = norm(x, state, "pre_norm")
    layers = []
    for index in range(depth):
        block = f"blocks.{index}"
        gated = f"{block}.attn.gate.weight" in state
        x = norm(x + qkv_attention(x, state, block, heads, gated=gated), state, f"{block}.norm1")
        x = norm(x + perceptron(x, state, block), state, f"{block}.norm2")
        layers.append(x)
    return layers


def dasheng(frames: Tensor, state: State, *, heads: int, depth: int, longest: int) -> list[Tensor]:
    """Of (time, 64) decibels; chunks of `longest` frames, the last one padded with zeros."""
    spread = (state["init_bn.1.running_var"] + 1e-5).sqrt()
    x = (frames - state["init_bn.1.running_mean"]) / spread
    x = x * state["init_bn.1.weight"] + state["init_bn.1.bias"]
    chunks = list(x.split(longest))
    if len(chunks) > 1:
        chunks[-1] = torch.cat([chunks[-1], x.new_zeros(longest - len(chunks[-1]), 64)])
    parts = []
    for chunk in chunks:
        # Its kernel has the bands first.
        y = patches_of(chunk.T, state, "patch_embed.proj")
        y = y + state["time_pos_embed"][0, :, 0, : len(y)].T + state["freq_pos_embed"][0, :, 0, 0]
        layers = []
        for index in range(depth):
            block = f"blocks.{index}"
            y = y + qkv_attention(norm(y, state, f"{block}.norm1"), state, block, heads)
            y = y + perceptron(norm(y, state, f"{block}.norm2"), state, block)
            layers.append(y)
        layers[-1] = norm(y, state, "norm")
        parts.append(layers)
    return [torch.cat(layer)[: len(frames) // 4] for layer in zip(*parts, strict=True)]


def beats(frames: Tensor, state: State, cfg: Mapping[str, Any]) -> list[Tensor]:
    heads, depth = cfg["encoder_attention_heads"], cfg["encoder_layers"]
    x = patches_of(frames, state, "patch_embedding")
    x = linear(norm(x, state, "layer_norm", 1e-5), state, "post_extract_proj")
    v = state["encoder.pos_conv.0.weight_v"]
    kernel = v * state["encoder.pos_conv.0.weight_g"] / v.square().sum((0, 1), keepdim=True).sqrt()
    padded = F.pad(x.T[None], (cfg["conv_pos"] // 2, cfg["conv_pos"] // 2 - 1))
    bias = state["encoder.pos_conv.0.bias"]
    places = F.conv1d(padded, kernel, bias, groups=cfg["conv_pos_groups"])[0].T
    x = norm(x + gelu(places), state, "encoder.layer_norm", 1e-5)
    table = state["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    distances = [[beats_bucket(k - q, cfg) for k in range(len(x))] for q in range(len(x))]
    position = table[torch.tensor(distances)].permute(2, 0, 1)
    alpha = (2 * depth) ** 0.25 if cfg["deep_norm"] else 1.0
    layers = []
    for index in range(depth):
        layer = f"encoder.layers.{index}"
        q, k, v = (linear(x, state, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        by_head = q.unflatten(1, (heads, -1)).transpose(0, 1)
        gates = linear(by_head, state, f"{layer}.self_attn.grep_linear")
        update, reset = gates[..., :4].sum(-1).sigmoid(), gates[..., 4:].sum(-1).sigmoid()
        grep_a = state[f"{layer}.self_attn.grep_a"][0, :, :, 0]
        gate = update * (reset * grep_a - 1.0) + 2.0
        out = attention(q, k, v, heads, bias=gate[:, :, None] * position)
        out = linear(out, state, f"{layer}.self_attn.out_proj")
        x = norm(alpha * x + out, state, f"{layer}.self_attn_layer_norm", 1e-5)
        out = linear(gelu(linear(x, state, f"{layer}.fc1")), state, f"{layer}.fc2")
        x = norm(alpha * x + out, state, f"{layer}.final_layer_norm", 1e-5)
        layers.append(x)
    return layers


def beats_bucket(distance: int, cfg: Mapping[str, Any]) -> int:
    """One distance, key minus query, in float32 as the published code has it."""
    half = cfg["num_buckets"] // 2
    exact = half // 2
    size = abs(distance)
    bucket = size
    if size >= exact:
        log = torch.log(torch.tensor(float(size)) / exact) / math.log(cfg["max_distance"] / exact)
        bucket = min(half - 1, exact + int(log * (half - exact)))
    return bucket + half * (distance > 0)
