"""In which order an encoder's tokens lie, found by changing a clip in one place after another.

A transformer mixes all tokens, so that a change anywhere moves every token a little. What survives
is which of several equal changes moves a token most: the one at its own time, in its own band.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchbank.pipeline.encoders.bench import Bench, Broken, NotAsked
from patchbank.pipeline.specs import Grid

N_EVENTS = 4
TIME_MAJOR = "t * F + f"
TURNED_GRID = "t * F + f of a grid stated as (F, T)"
LEAST_GAIN, LEAST_MEAN_GAIN = 0.2, 0.1
"""By how much another order has to explain the tokens of one layer, or all, better (0 to 2).

Right orders of 10 s: -0.02 and less. Wrong ones: up to 1.5, but 0.1 where F is 2 or a deep layer
answers to most bands alike; hence the mean over layers.
"""
LEAST_ORDER = 0.7
"""Of the layer that follows time best; two time steps reach 0.83, tokens in any order 0.5."""
MOST_REVERSED = 0.3


@dataclass(frozen=True)
class Reading:
    """A way to read the index of a patch, and how well the tokens fit it."""

    patch: str
    """The formula; T and F are the true ones where the grid is stated the wrong way round."""
    time: float
    """1: tokens lie in the order of events; 0.5: chance; 0: reversed."""
    freq: float
    """1: tokens at one frequency answer to one band; about 0.25: chance."""


def check_order(bench: Bench) -> str:
    """Whether `patch = t * F + f`, by what events move; a wrong grid and reversed time show too."""
    plain, event = bench.noise(0.05, seed=4)[0], bench.noise(0.2, seed=5)[0]
    at_moments = moments(plain, event)
    in_bands = bands(plain, event, bench.encoder.spec.sample_rate_hz)
    tokens = bench.encode(torch.cat([plain[None], at_moments, in_bands]))
    found: dict[int, list[Reading]] = {}
    for layer, token_map in tokens.items():
        if token_map.grid.n_patches > 1:
            still, changed = token_map.patches[0], token_map.patches[1:]
            found[layer] = readings(still, changed[:N_EVENTS], changed[N_EVENTS:], token_map.grid)
    gains = {layer: _gains(values) for layer, values in found.items()}
    for layer, gain in gains.items():
        if max(gain) > LEAST_GAIN:
            _order_is_broken(layer, tokens[layer].grid, found[layer], gain)
    mean_gains = [sum(column) / len(gains) for column in zip(*gains.values(), strict=True)]
    if mean_gains and max(mean_gains) > LEAST_MEAN_GAIN:
        first = min(found)
        _order_is_broken(first, tokens[first].grid, found[first], mean_gains)
    in_time = {k: values[0].time for k, values in found.items() if tokens[k].grid.time > 1}
    if not in_time:
        raise NotAsked("one time step a clip")
    best = max(in_time, key=lambda layer: in_time[layer])
    if in_time[best] < LEAST_ORDER:
        _order_is_broken(best, tokens[best].grid, found[best], [])
    return f"tokens follow time by {in_time[best]:.2f} of 1"


def _gains(values: list[Reading]) -> list[float]:
    """By how much each other way to read the tokens explains them better than the stated one."""
    stated, *others = values
    return [other.time + other.freq - stated.time - stated.freq for other in others]


def _order_is_broken(layer: int, grid: Grid, values: list[Reading], gains: list[float]) -> NoReturn:
    stated, *others = values
    found = (
        f"layer {layer}, {grid.time} x {grid.freq}: tokens follow time by {stated.time:.2f} of 1, "
        f"frequency by {stated.freq:.2f}"
    )
    hint = "of a map (batch, dim, freq, time): map.permute(0, 3, 2, 1).flatten(1, 2)"
    if stated.time < MOST_REVERSED:
        found += "; time runs backwards"
    elif gains:
        best = others[gains.index(max(gains))]
        found += f"; read as {best.patch}, by {best.time:.2f} and {best.freq:.2f}"
        if best.patch == TURNED_GRID:
            hint = (
                f"the tokens are in order, their grid is turned: Grid(time={grid.freq}, "
                f"freq={grid.time})"
            )
    raise Broken(found, expected="patch = t * F + f, Grid(time=T, freq=F)", hint=hint)


def moments(
    clip: Float[Tensor, " sample"], event: Float[Tensor, " sample"]
) -> Float[Tensor, "event sample"]:
    """`clip` with the same part of `event` in its first quarter, in its second, and so on."""
    length = len(clip) // N_EVENTS
    clips = clip.repeat(N_EVENTS, 1)
    for index in range(N_EVENTS):
        clips[index, index * length : (index + 1) * length] = event[:length]
    return clips


def bands(
    clip: Float[Tensor, " sample"], event: Float[Tensor, " sample"], sample_rate_hz: int
) -> Float[Tensor, "event sample"]:
    """`clip` with the lowest quarter of the mel scale of `event`, its second, and so on."""
    spectrum = torch.fft.rfft(event)
    hertz = torch.linspace(0, sample_rate_hz / 2, len(spectrum))
    # The mel scale of HTK, up to a factor.
    mel = torch.log1p(hertz / 700)
    quarter = (mel / mel[-1] * N_EVENTS).long().clamp(max=N_EVENTS - 1)
    parts = torch.stack([spectrum * (quarter == index) for index in range(N_EVENTS)])
    clips: Tensor = clip + torch.fft.irfft(parts, n=len(clip))
    return clips


def readings(
    plain: Float[Tensor, "patch dim"],
    at_moments: Float[Tensor, "event patch dim"],
    in_bands: Float[Tensor, "event patch dim"],
    grid: Grid,
) -> list[Reading]:
    """How well each way to read a patch's index explains which tokens moved; `TIME_MAJOR` first."""
    patch = torch.arange(grid.n_patches)
    ways = {
        TIME_MAJOR: (patch // grid.freq, patch % grid.freq),
        "f * T + t": (patch % grid.time, patch // grid.time),
        TURNED_GRID: (patch // grid.time, patch % grid.time),
        "f * T + t of a grid stated as (F, T)": (patch % grid.freq, patch // grid.freq),
    }
    by_moment, by_band = (
        (tokens - plain).double().norm(dim=-1).cpu() for tokens in (at_moments, in_bands)
    )
    return [
        Reading(name, _concordance(by_moment, time), _agreement(by_band, freq))
        for name, (time, freq) in ways.items()
    ]


def _masses(
    change: Float[Tensor, "event patch"], place: Int[Tensor, " patch"]
) -> tuple[Int[Tensor, " patch"], Float[Tensor, " patch"], Float[Tensor, "event place"]]:
    """Which event moves a token most, how much more than the others do, and the sums by place.

    Tokens that no event reaches, those of padding, hardly count.
    """
    n_places = int(place.max()) + 1
    moved_by = change.argmax(0)
    weight = change.amax(0) - change.mean(0)
    mass = torch.zeros(len(change) * n_places, dtype=torch.float64)
    mass.index_add_(0, moved_by * n_places + place, weight)
    return moved_by, weight, mass.view(-1, n_places)


def _concordance(change: Float[Tensor, "event patch"], time: Int[Tensor, " patch"]) -> float:
    """Of pairs of tokens that different events move most, the share in the events' order.

    A pair at one time counts half.
    """
    _, _, mass = _masses(change, time)
    in_order = pairs = 0.0
    for first in range(len(mass)):
        later = mass[first + 1 :].sum(0)
        after = later.sum() - later.cumsum(0) + later / 2
        in_order += float((mass[first] * after).sum())
        pairs += float(mass[first].sum() * later.sum())
    return max(0.0, in_order / pairs) if pairs else 0.5


def _agreement(change: Float[Tensor, "event patch"], freq: Int[Tensor, " patch"]) -> float:
    """The share of tokens that move most with the band that the others at their frequency do."""
    moved_by, weight, mass = _masses(change, freq)
    others = mass[:, freq].scatter_add(0, moved_by[None], -weight[None])
    agrees = (others.argmax(0) == moved_by) & (others.amax(0) > 1e-9 * weight.sum())
    total = float(weight.sum())
    return float(weight[agrees].sum()) / total if total else 0.0
