"""Class evidence over time: a probe applied to the tokens of one time step of the grid alone.

Patches are time-major, patch = t * F + f, so step t holds the patches t F .. t F + F - 1. A probe
that pools over patches, in whatever way, is as well defined on F of them as on all. The prefix
(CLS) stays what it was, that of the whole window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchbank.pipeline.errors import PatchbankError, TrialError
from patchbank.probing.artefact import ProbeArtefact, array_shapes
from patchbank.probing.batch import Batch, Grid, LayerTokens
from patchbank.probing.probes.made_tokens import made_tokens
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator

FRAMES_AT_ONCE = 512
"""Tokens and features of that many lie in memory, however long the batch's clips are."""
N_TRIED = 4
"""Made clips that show what a probe looks at."""
ROUNDING = 1e-6
"""Of the largest spread of a class's logits over clips, in float64: more is no rounding."""
TIMELESS = (
    "linear", "mlp", "linearc", "linpre", "mhca", "ep", "simpool", "abmilp", "proto", "protobin",
    "protofloat", "cgp", "knn",
)  # fmt: skip
"""Shipped families that the check lets pass as they are by default."""


@dataclass(frozen=True, eq=False)
class FrameScores:
    """Probabilities of time steps, clip by clip and in the order of time."""

    clips: Int[np.ndarray, " frame"]
    """Places in the batch."""
    times: Int[np.ndarray, " frame"]
    """Step t of T spans t / T to (t + 1) / T of the clip's window."""
    probabilities: Float[np.ndarray, "frame class"]


def frame_probe(artefact: ProbeArtefact, grid: Grid | None) -> ProbeArtefact:
    """The same probe for one time step of `grid`.

    Raises `TrialError` where nothing states the grid, and for a probe that minds the order of time
    steps (conv), looks at no patch (linear-cls), or has weights for another number of patches.
    """
    trained = artefact.shape.grid
    if grid is None or trained is None:
        raise TrialError(
            "--frames needs the (time, freq) grid of the patches, found none stated; predict "
            "without --frames"
        )
    if grid[1] != trained[1]:
        raise TrialError(
            f"found a grid of {grid[1]} frequencies, expected the {trained[1]} that probe "
            f"{artefact.probe!r} was trained on; predict without --frames"
        )
    narrow = replace(artefact, shape=replace(artefact.shape, grid=(1, trained[1])))
    _check_looks(artefact, narrow)
    return narrow


def predict_frames(
    probe: ProbeArtefact,
    batch: Batch,
    grid: Grid,
    *,
    n_times: Int[np.ndarray, " clip"] | None = None,
) -> FrameScores:
    """Probabilities of every time step of every clip, from what `frame_probe` gave.

    `n_times` are the steps of each clip that hold audio, all where None; steps without a patch that
    counts are left out too.
    """
    layers = {layer: batch[layer] for layer in probe.layers_of(batch)}
    clips, times = _steps(list(layers.values()), grid, n_times)
    parts = []
    for start in range(0, len(clips), FRAMES_AT_ONCE):
        part = slice(start, start + FRAMES_AT_ONCE)
        frames = {
            layer: _frames_of(tokens, grid, clips[part], times[part])
            for layer, tokens in layers.items()
        }
        parts.append(probe.predict_batch(Batch(np.arange(len(clips[part])), frames)))
    empty = np.zeros((0, len(probe.classes)), dtype=np.float32)
    return FrameScores(clips.numpy(), times.numpy(), np.concatenate([empty, *parts]))


def _steps(
    layers: Sequence[LayerTokens],
    grid: Grid,
    n_times: Int[np.ndarray, " clip"] | None,
) -> tuple[Int[Tensor, " frame"], Int[Tensor, " frame"]]:
    """Clip and time of every step that holds audio and a patch that counts, in every layer."""
    times = torch.arange(grid[0])
    is_used = torch.ones(layers[0].shape[0], grid[0], dtype=torch.bool)
    for tokens in layers:
        if tokens.shape[1] != grid[0] * grid[1]:
            raise TrialError(
                f"found {tokens.shape[1]} patches in a clip, expected {grid[0] * grid[1]}, those "
                f"of the {grid[0]} x {grid[1]} grid"
            )
        if tokens.n_patches is not None:
            is_used &= times * grid[1] < tokens.n_patches.cpu()[:, None]
    if n_times is not None:
        is_used &= times < torch.from_numpy(n_times)[:, None]
    clips, kept = is_used.nonzero(as_tuple=True)
    return clips, kept


def _frames_of(
    tokens: LayerTokens, grid: Grid, clips: Int[Tensor, " frame"], times: Int[Tensor, " frame"]
) -> LayerTokens:
    """The tokens of some time steps, each as a clip of its own."""
    counts = tokens.n_patches
    return LayerTokens(
        tokens.patches.unflatten(1, grid)[clips, times],
        None if tokens.prefix is None else tokens.prefix[clips],
        None if counts is None else (counts.cpu()[clips] - times * grid[1]).clamp(max=grid[1]),
    )


def _check_looks(probe: ProbeArtefact, narrow: ProbeArtefact) -> None:
    """Refuses a probe for which a time step alone means nothing; tried on made tokens."""
    n_times, _ = probe.shape.grid or (1, 1)
    tokens = _made(probe)
    plain = _logits(probe, tokens)
    turned = _logits(probe, [_turned(one, n_times) for one in tokens])
    spread = plain.amax(dim=0) - plain.amin(dim=0)
    # Products of equal rows may differ in the last bit.
    if float(spread.max()) <= ROUNDING * float(plain.abs().max()):
        raise _refusal(probe, "says the same whatever the patches are")
    if bool(((turned - plain).abs() > ROUNDING * spread.max()).any()):
        raise _refusal(probe, "minds the order of time steps: it looks at several together")
    try:
        found, expected = array_shapes(narrow)
    except (PatchbankError, RuntimeError, ValueError) as error:
        raise _refusal(probe, f"cannot be built for one time step ({error})") from error
    if found != expected:
        raise _refusal(probe, "has weights for all time steps together")


def _refusal(probe: ProbeArtefact, reason: str) -> TrialError:
    return TrialError(
        f"probe {probe.probe!r} {reason}; --frames takes each time step alone, which suits "
        f"{', '.join(TIMELESS)} on the patches' tokens: choose such a --probe, or predict without "
        "--frames"
    )


def _made(probe: ProbeArtefact) -> list[Tokens]:
    """Made tokens of each layer, in float64, with one prefix for all clips."""
    return [
        Tokens(one.patches, None if one.prefix is None else one.prefix[:1].expand_as(one.prefix))
        for one in made_tokens(probe.shape, n_clips=N_TRIED, dtype=torch.float64).layers
    ]


def _turned(tokens: Tokens, n_times: int) -> Tokens:
    """The same with time steps in another order."""
    order = torch.randperm(n_times, generator=generator("order of frames", 0))
    steps = tokens.patches.unflatten(1, (n_times, -1))
    return Tokens(steps[:, order].flatten(1, 2), tokens.prefix)


@torch.no_grad()
def _logits(probe: ProbeArtefact, layers: Sequence[Tokens]) -> Float[Tensor, "clip class"]:
    *others, last = layers
    weights = {key: value[None].double() for key, value in probe.weights.items()}
    return probe.family.logits(weights, last.after(others))[0]
