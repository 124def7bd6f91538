"""Checks of the GPU kernel against plain torch, in a process of its own.

    TRITON_INTERPRET=1 python tests/kernel_checks.py cpu        the kernel, interpreted
    python tests/kernel_checks.py cuda                          the kernel, compiled

Prints a line for each case and leaves 1 where one differs.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import numpy as np
import torch

from patchbank.pipeline.bank.dtypes import STORED_TYPES
from patchbank.pipeline.bank.quantised import ChannelConstants
from patchbank.probing.batch import LayerTokens
from patchbank.probing.decoding import Dequantiser, QuantisedTokens
from patchbank.probing.probes.best_match import best_match
from patchbank.probing.probes.tokens import Tokens

# (clip, patch, dim, prototype): blocks filled exactly, and no axis a multiple of its block.
SHAPES = {"whole blocks": (2, 32, 32, 32), "odd": (3, 37, 24, 45), "one of each": (1, 1, 8, 1)}
STORED = ("float16", "bfloat16", "float32", "int8")
TOLERANCE = 2e-3
"""Of a cosine: inputs of 11 bits, and sums of some hundred products."""


def stored_tokens(
    stored: str, shape: tuple[int, int, int], counts: list[int] | None, device: str
) -> Tokens:
    """Tokens of very different lengths; `counts` patches of each clip count."""
    random = torch.Generator().manual_seed(0)
    floats = torch.randn(shape, generator=random) * torch.logspace(-1, 1.5, shape[1])[:, None]
    floats[0, 0] = 0.0
    quantised = None
    if stored == "int8":
        rng = np.random.default_rng(0)
        constants = ChannelConstants(
            rng.standard_normal(shape[2]).astype(np.float32),
            rng.uniform(1e-3, 30, shape[2]).astype(np.float32),
        )
        raw = torch.randint(-127, 128, shape, generator=random, dtype=torch.int8)
        scale = torch.rand(shape[:2], generator=random).half() / 127
        dequantiser = Dequantiser(constants, STORED_TYPES[stored], torch.device(device))
        quantised = QuantisedTokens(dequantiser, scale.to(device))
    else:
        raw = floats.to(getattr(torch, stored))
    n_patches = None if counts is None else torch.tensor(counts).to(device)
    layer = LayerTokens(raw.to(device), quantised=quantised)
    return Tokens(layer, n_patches=n_patches, dtype=torch.float32, device=torch.device(device))


def check(name: str, stored: str, *, some_count: bool, device: str) -> list[str]:
    """What differs between the kernel and plain torch."""
    # Here, so that the cases can be listed where triton is missing.
    from patchbank.probing.probes.best_match_triton import match_stored

    *shape, n_prototypes = SHAPES[name]
    n_clips, n_patches, dim = shape
    counts = [1 + clip * 7 % n_patches for clip in range(n_clips)] if some_count else None
    tokens = stored_tokens(stored, (n_clips, n_patches, dim), counts, device)
    random = torch.Generator().manual_seed(1)
    drawn = torch.randn(n_prototypes, dim, generator=random)
    prototypes = torch.nn.functional.normalize(drawn, dim=-1).to(device).requires_grad_()
    weight = torch.randn(n_clips, n_prototypes, generator=random).to(device)
    expected = best_match(tokens.directions, prototypes, tokens.counts)
    found = match_stored(tokens._as_stored(), prototypes)
    wrong = []
    if not torch.allclose(found, expected, rtol=0, atol=TOLERANCE):
        wrong.append(f"values by {(found - expected).abs().max():.2g}")
    # A winner may be another where two tokens come within rounding; its similarity may not be.
    for_kernel, for_plain = (
        torch.autograd.grad(value, prototypes, weight)[0] for value in (found, expected)
    )
    winners = winners_of(tokens, prototypes)
    is_clear = winners.all(dim=0)
    if not is_clear.any():
        wrong.append("no prototype has clear winners, so that nothing was compared")
    difference = (for_kernel - for_plain)[is_clear].abs()
    if difference.numel() and difference.max() > TOLERANCE * weight.abs().sum(dim=0).max():
        wrong.append(f"gradients by {difference.max():.2g}")
    return wrong


def winners_of(tokens: Tokens, prototypes: torch.Tensor) -> torch.Tensor:
    """True (clip, prototype) where the best similarity leads by more than the tolerance."""
    similarity = tokens.directions @ prototypes.detach().T
    if tokens.counts is not None:
        similarity = similarity.masked_fill(~tokens.counts[:, :, None], -torch.inf)
    if similarity.shape[1] == 1:
        return torch.ones_like(similarity[:, 0], dtype=torch.bool)
    first, second = similarity.topk(2, dim=1).values.unbind(dim=1)
    return first - second > 2 * TOLERANCE


def check_special(device: str) -> list[str]:
    """Equal tokens: the first wins. A prototype of NaN breaks no other and reads no stray row."""
    from patchbank.probing.probes.best_match_triton import _search, match_stored

    wrong = []
    tokens = stored_tokens("float16", (2, 40, 16), None, device)
    stored = tokens._as_stored()
    same = replace(stored, raw=stored.raw[:, 1:2].expand(-1, 40, -1).contiguous())
    same = replace(same, factor=stored.factor[:, 1:2].expand(-1, 40).contiguous())
    prototypes = torch.randn(20, 16, generator=torch.Generator().manual_seed(2)).to(device)
    _, winner = _search(same, prototypes, None)
    if winner.any():
        wrong.append("of equal tokens another than the first wins")
    clean = match_stored(stored, prototypes)
    mad = prototypes.clone()
    mad[3] = torch.nan
    best, winner = _search(stored, mad, None)
    others = [index for index in range(20) if index != 3]
    if not torch.equal(best[:, others], clean[:, others]):
        wrong.append("a prototype of NaN changes others")
    if torch.isfinite(best[:, 3]).any() or winner.min() < 0 or winner.max() >= 40:
        wrong.append("a prototype of NaN has a finite match, or a winner beyond the patches")
    return wrong


def main(device: str) -> None:
    failed = False
    cases = itertools.product(SHAPES, STORED, (False, True))
    for name, stored, some_count in cases:
        wrong = check(name, stored, some_count=some_count, device=device)
        failed |= bool(wrong)
        print(f"{name}, {stored}, {'some' if some_count else 'all'} count:", *wrong or ["equal"])
    wrong = check_special(device)
    print("ties and NaN:", *wrong or ["equal"])
    if failed or wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1])
