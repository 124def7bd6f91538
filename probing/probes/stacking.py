"""What a user's module is like, by trying: whether its trials stack, whether it sees the prefix."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchbank.pipeline.errors import PatchbankError, TrialError, place_in, told
from patchbank.probing.probes.base import Dropout, Logits, ProbeShape, Weights, stacked_weights
from patchbank.probing.probes.made_tokens import made_tokens
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator, seeded

if TYPE_CHECKING:
    from patchbank.probing.probes.module import ModuleProbe

Apply = Callable[[Weights, Tokens, Dropout | None], Logits]
N_TRIALS, N_CLIPS = 2, 16
BATCH = 64
TOLERANCE = 1e-3
"""Largest difference by largest value of an array, in float32."""
ROUNDING = 1e-4
"""And by the largest value of all arrays."""
SLOW = ".*performance drop.*batching rule"
KNOWN = {
    "calling .item()": "it takes a number out of a tensor",
    "data-dependent control flow": "it decides by a tensor's values",
    "random operation": "it draws random numbers other than by nn.Dropout",
    "dynamic shape": "a shape in it depends on values",
    "setup_context": "an autograd.Function of it has no setup_context and vmap",
}
"""What torch says, by its words: in ours."""


def why_one_by_one(probe: ModuleProbe) -> str | None:
    """None where stacked trials are what they are alone, with their gradients and buffers.

    Raises `TrialError` where a trial alone does not work either.
    """
    shape = _shape(probe)
    first = stacked_weights(probe, f"trying {probe.name}", range(N_TRIALS))
    whole = made_tokens(shape, n_clips=N_CLIPS)
    counts = [1 + index * whole.shape[1] // N_CLIPS for index in range(N_CLIPS)]
    cut = made_tokens(shape, n_clips=N_CLIPS, n_patches=counts)
    for tokens in (whole, cut):
        for is_training in (True, False):
            try:
                alone = _observed(probe, _looped(probe), first, tokens, is_training=is_training)
            except PatchbankError:
                raise
            except Exception as error:
                raise TrialError(
                    f"forward of probe {probe.name!r} failed: {told(error, probe.file)}; "
                    f"try it with: patchbank check"
                ) from error
            try:
                stack = _observed(probe, probe.stacked, first, tokens, is_training=is_training)
            except Exception as error:
                return _reason(error, probe.file)
            if not _are_close(stack, alone):
                return "stacked, it gives other values"
    return None


def values_kept(probe: ModuleProbe) -> int:
    """Numbers that one trial keeps for its gradient of a batch of `BATCH` clips.

    Tokens and weights do not count, which are there anyway.
    """
    weights = {
        key: value.requires_grad_(key not in probe.buffers)
        for key, value in stacked_weights(probe, f"trying {probe.name}", [0]).items()
    }
    tokens = made_tokens(_shape(probe), n_clips=N_CLIPS)
    shared = [getattr(one, name) for one in tokens.layers for name in ("patches", "directions")]
    known = {value.untyped_storage().data_ptr() for value in (*shared, *weights.values())}
    kept: dict[int, int] = {}

    def count(value: Tensor) -> Tensor:
        place = value.untyped_storage().data_ptr()
        if place not in known:
            kept[place] = max(value.numel(), kept.get(place, 0))
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
        # Held until all is counted, as memory that is free again is given out twice.
        logits = probe.looped(weights, tokens, [generator("trying", 0)])
        return logits.numel() + sum(kept.values()) * BATCH // N_CLIPS


def sees_prefix(probe: ModuleProbe) -> bool:
    """Whether other prefix tokens give other logits; False where there are none."""
    if not probe.shape.n_prefix:
        return False
    weights = stacked_weights(probe, f"trying {probe.name}", [0])
    made, other = made_tokens(_shape(probe)), made_tokens(_shape(probe), seed=1)
    layers: list[Tokens] = []
    for mine, its in zip(made.layers, other.layers, strict=True):
        layers.append(Tokens(mine.patches, its.prefix, others=tuple(layers)))
    with torch.no_grad():
        return not torch.equal(probe.logits(weights, made), probe.logits(weights, layers[-1]))


def _shape(probe: ModuleProbe) -> ProbeShape:
    return probe.shape if probe.mixes_layers else replace(probe.shape, n_layers=1)


def _looped(probe: ModuleProbe) -> Apply:
    # Stacked, nothing draws from global generators, so the loop must not take a seed for them.
    return lambda weights, tokens, dropout: probe.looped(weights, tokens, dropout, is_seeded=False)


def _observed(
    probe: ModuleProbe, apply: Apply, first: Weights, tokens: Tokens, *, is_training: bool
) -> list[Tensor]:
    """Logits; in training also the gradients of some sum of them, and the buffers."""
    weights = {key: value.clone() for key, value in first.items()}
    trained = [key for key in weights if key not in probe.buffers]
    with seeded(0), warnings.catch_warnings():
        # torch would loop inside and say so at every step.
        warnings.filterwarnings("error", message=SLOW)
        if not is_training:
            with torch.no_grad():
                return [apply(weights, tokens, None)]
        with torch.enable_grad():
            leaves = [weights[key].requires_grad_() for key in trained]
            randoms = [generator("trying", index) for index in range(N_TRIALS)]
            logits = apply(weights, tokens, randoms)
            some = torch.arange(logits.numel(), dtype=logits.dtype).cos().view(logits.shape)
            gradients = torch.autograd.grad(
                (logits * some).sum(), leaves, allow_unused=True, materialize_grads=True
            )
    return [logits.detach(), *gradients, *(weights[key] for key in probe.buffers)]


def _are_close(found: list[Tensor], expected: list[Tensor]) -> bool:
    largest = [float(one.abs().nan_to_num().max()) if one.numel() else 0.0 for one in expected]
    # Gradients that are zero but for rounding, as of a bias before batch-norm, have no size.
    floor = max(largest) * ROUNDING
    return all(
        torch.allclose(one, other, rtol=0, atol=TOLERANCE * size + floor, equal_nan=True)
        for one, other, size in zip(found, expected, largest, strict=True)
    )


def _reason(error: Exception, file: str) -> str:
    """Why torch cannot, and where in the module."""
    said = str(error)
    operation = re.search(r"aten::_?(\w+)", said)
    words = next((ours for theirs, ours in KNOWN.items() if theirs in said), None)
    if words is None and operation is not None:
        words = f"torch cannot stack {operation[1]}"
    if words is None:
        words = f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"
    place = place_in(file, error)
    return words if place is None else f"{words} ({Path(place).name})"
