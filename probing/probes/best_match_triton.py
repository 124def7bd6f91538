"""The highest similarity of each prototype with any token of a clip, from tokens as stored.

One program of the kernel takes one clip and a block of prototypes, walks over the clip's patches
block by block, and keeps the best similarity and its patch: neither a float copy of the tokens nor
a (clip, patch, prototype) array is ever written. Imported only where tokens are on a GPU, by
`why_no_kernel` first; `best_match` is what it has to agree with.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from patchbank.probing.probes.stored_directions import StoredDirections

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: the kernels run on a CPU, to be tested."""
GRADIENT_BLOCK = {"PROTOTYPES": 16, "DIMS": 128}
# Prototypes x patches x channels; the first two are an accumulator of half a multiprocessor's
# registers. The last has the least shared memory: float32 needs twice that of float16.
SIZES = ((128, 256, 64, 3, 8), (256, 128, 64, 3, 8), (128, 128, 64, 4, 8), (128, 128, 32, 4, 4))
SMALL_SIZE = {"PROTOTYPES": 16, "PATCHES": 16, "DIMS": 16}


def match_stored(
    stored: StoredDirections, prototypes: Float[Tensor, "prototype dim"]
) -> Float[Tensor, "clip prototype"]:
    """max over the patches that count of prototype . direction; gradient for prototypes only.

    Products are exact to about 2^-11 (float16 inputs for float16 tokens and int8 codes, TF32 for
    bfloat16 and float32 ones) and added in float32.
    """
    folded, offset = prototypes, None
    if stored.channel_scale is not None:
        folded = prototypes * stored.channel_scale
    if stored.channel_shift is not None:
        offset = prototypes @ stored.channel_shift
    best: Tensor = _MatchStored.apply(folded, offset, stored)  # type: ignore[no-untyped-call]
    return best


class _MatchStored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        folded: Float[Tensor, "prototype dim"],
        offset: Float[Tensor, " prototype"] | None,
        stored: StoredDirections,
    ) -> Float[Tensor, "clip prototype"]:
        best, winner = _search(stored, folded, offset)
        ctx.save_for_backward(winner)
        ctx.stored = stored
        return best

    @staticmethod
    def backward(
        ctx: Any, gradient: Float[Tensor, "clip prototype"]
    ) -> tuple[Float[Tensor, "prototype dim"], Float[Tensor, " prototype"] | None, None]:
        stored: StoredDirections = ctx.stored
        [winner] = ctx.saved_tensors
        for_offset = None
        if stored.offset_factor is not None:
            for_offset = (gradient * stored.offset_factor.gather(1, winner.long())).sum(dim=0)
        return _gradient(stored, winner, gradient.contiguous()), for_offset, None


def _search(
    stored: StoredDirections,
    folded: Float[Tensor, "prototype dim"],
    offset: Float[Tensor, " prototype"] | None,
) -> tuple[Float[Tensor, "clip prototype"], Int[Tensor, "clip prototype"]]:
    raw = stored.raw
    n_clips, n_patches, dim = raw.shape
    n_prototypes = len(folded)
    is_half = raw.dtype in (torch.float16, torch.int8)
    # bfloat16 has too few bits for prototypes: its tokens meet them in TF32, which holds both.
    compared = folded.to(torch.float16 if is_half else torch.float32).contiguous()
    best = torch.empty(n_clips, n_prototypes, device=raw.device)
    winner = torch.empty(n_clips, n_prototypes, dtype=torch.int32, device=raw.device)

    def grid(size: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n_prototypes, size["PROTOTYPES"]), n_clips

    with torch.cuda.device_of(raw):  # triton launches on the current one
        _kernel[grid](
            raw,
            compared,
            stored.factor,
            stored.factor if stored.offset_factor is None else stored.offset_factor,
            stored.factor if offset is None else offset.contiguous(),
            stored.counts,
            best,
            winner,
            n_prototypes,
            n_patches,
            dim,
            HAS_OFFSET=offset is not None,
            **(SMALL_SIZE if IS_INTERPRETED else {}),
        )
    return best, winner


def _gradient(
    stored: StoredDirections,
    winner: Int[Tensor, "clip prototype"],
    gradient: Float[Tensor, "clip prototype"],
) -> Float[Tensor, "prototype dim"]:
    """sum over clips of gradient x factor x winning token, as stored."""
    n_clips, n_patches, dim = stored.raw.shape
    n_prototypes = winner.shape[1]
    out = torch.empty(n_prototypes, dim, device=winner.device)
    grid = (
        triton.cdiv(n_prototypes, GRADIENT_BLOCK["PROTOTYPES"]),
        triton.cdiv(dim, GRADIENT_BLOCK["DIMS"]),
    )
    with torch.cuda.device_of(stored.raw):
        _gradient_kernel[grid](
            stored.raw,
            stored.factor,
            winner,
            gradient,
            out,
            n_prototypes,
            n_clips,
            n_patches,
            dim,
            **GRADIENT_BLOCK,
        )
    return out


def try_kernel() -> None:
    """Compiles and launches the smaller kernel on one number; raises whatever goes wrong."""
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    one, zero = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device).int()
    found = _gradient(StoredDirections(2 * one[None], one, zero[0] + 1), zero, 3 * one)
    if found.item() != 6:
        raise ArithmeticError(f"a triton kernel gives {found.item()}, expected 6")


@triton.jit
@no_type_check
def _match_kernel(
    tokens,
    prototypes,
    factors,
    offset_factors,
    offsets,
    counts,
    best_out,
    winner_out,
    n_prototypes,
    n_patches: tl.constexpr,
    dim: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    PATCHES: tl.constexpr,
    DIMS: tl.constexpr,
):
    # Programs of one clip are neighbours, so that its tokens come from the cache after the first.
    # Places in arrays are 64 bits wide: prototypes x dim may have more than 2^31 numbers.
    clip = tl.program_id(1).to(tl.int64)
    prototype = (tl.program_id(0) * PROTOTYPES + tl.arange(0, PROTOTYPES)).to(tl.int64)
    is_prototype = prototype < n_prototypes
    count = tl.load(counts + clip)
    best = tl.full((PROTOTYPES,), float("-inf"), tl.float32)
    winner = tl.zeros((PROTOTYPES,), tl.int32)
    # Loops have constant bounds: the interpreter takes no others with numpy 2.4.
    for first in range(0, n_patches, PATCHES):
        patch = first + tl.arange(0, PATCHES)
        row = clip * n_patches + patch
        similarity = tl.zeros((PROTOTYPES, PATCHES), tl.float32)
        for channel in range(0, dim, DIMS):
            d = channel + tl.arange(0, DIMS)
            w = tl.load(
                prototypes + prototype[:, None] * dim + d[None, :],
                mask=is_prototype[:, None] & (d < dim)[None, :],
                other=0.0,
            )
            z = tl.load(
                tokens + row[None, :] * dim + d[:, None],
                mask=(patch < count)[None, :] & (d < dim)[:, None],
                other=0,
            )
            similarity = tl.dot(w, z.to(w.dtype), similarity, input_precision="tf32")
        factor = tl.load(factors + row, mask=patch < count, other=0.0)
        similarity = similarity * factor[None, :]
        if HAS_OFFSET:
            share = tl.load(offset_factors + row, mask=patch < count, other=0.0)
            offset = tl.load(offsets + prototype, mask=is_prototype, other=0.0)
            similarity += share[None, :] * offset[:, None]
        similarity = tl.where((patch < count)[None, :], similarity, float("-inf"))
        highest, place = tl.max(similarity, axis=1, return_indices=True)
        # Only a higher one replaces: the first of equals wins, and NaN never gives a place.
        winner = tl.where(highest > best, first + place, winner)
        best = tl.where(highest > best, highest, best)
    out = clip * n_prototypes + prototype
    tl.store(best_out + out, best, mask=is_prototype)
    tl.store(winner_out + out, winner, mask=is_prototype)


@triton.jit(do_not_specialize=["n_clips"])
@no_type_check
def _gradient_kernel(
    tokens,
    factors,
    winners,
    gradients,
    out,
    n_prototypes,
    n_clips,
    n_patches: tl.constexpr,
    dim: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    DIMS: tl.constexpr,
):
    prototype = (tl.program_id(0) * PROTOTYPES + tl.arange(0, PROTOTYPES)).to(tl.int64)
    d = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    is_prototype = prototype < n_prototypes
    is_asked = is_prototype[:, None] & (d < dim)[None, :]
    total = tl.zeros((PROTOTYPES, DIMS), tl.float32)
    clip = tl.zeros((), tl.int64)
    # Not a `for`: its bound would be constant, and every size of a batch compiled anew.
    while clip < n_clips:
        place = clip * n_prototypes + prototype
        row = tl.load(winners + place, mask=is_prototype, other=0).to(tl.int64) + clip * n_patches
        gradient = tl.load(gradients + place, mask=is_prototype, other=0.0)
        factor = tl.load(factors + row)
        z = tl.load(tokens + row[:, None] * dim + d[None, :], mask=is_asked, other=0)
        total += (gradient * factor)[:, None] * z.to(tl.float32)
        clip += 1
    tl.store(out + prototype[:, None] * dim + d[None, :], total, mask=is_asked)


def _tuned() -> Any:
    """The kernel with the fastest of some block sizes, tried once for each shape and type."""
    if IS_INTERPRETED:
        return _match_kernel
    configs = [
        triton.Config(
            {"PROTOTYPES": prototypes, "PATCHES": patches, "DIMS": dims},
            num_stages=n_stages,
            num_warps=n_warps,
        )
        for prototypes, patches, dims, n_stages, n_warps in SIZES
    ]
    return triton.autotune(configs, key=["n_patches", "n_prototypes", "dim"])(_match_kernel)


_kernel = _tuned()
