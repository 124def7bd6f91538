from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from patchbank.pipeline.errors import TrialError
from patchbank.probing.losses import asymmetric
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.abmilp import AbmilpProbe
from patchbank.probing.probes.base import (
    Options,
    Probe,
    ProbeShape,
    Weights,
    n_parameters,
    stacked_weights,
)
from patchbank.probing.probes.ep import default_queries
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.trials import Trial, TrialStack

SHAPE = ProbeShape(dim=24, n_classes=3, n_prefix=1)
COUNTS = [7, 1, 3, 5]

# reference/paper.md of the design: D = 768.
PARAMETERS = {
    "as20k": (527, 1_019_663, 1_586_447),
    "fsd50k": (200, 768_200, 1_334_984),
    "urban": (10, 622_090, 1_188_874),
    "esc50": (50, 652_850, 1_219_634),
}


def tokens(*, masked: bool = False, seed: int = 0, n_clips: int = 4) -> Tokens:
    random = torch.Generator().manual_seed(seed)
    return Tokens(
        torch.randn(n_clips, 7, 24, generator=random, dtype=torch.float64) + 0.5,
        torch.randn(n_clips, 1, 24, generator=random, dtype=torch.float64),
        torch.tensor(COUNTS[:n_clips]) if masked else None,
    )


def weights(probe: Probe, name: str, *, n_trials: int = 2) -> Weights:
    """First weights, moved by random numbers: away from ones, zeros and uniform attention."""
    random = torch.Generator().manual_seed(7)
    moved = {}
    for key, value in stacked_weights(probe, name, list(range(n_trials))).items():
        noise = torch.rand(value.shape, generator=random, dtype=torch.float64)
        moved[key] = (value.double() + noise).requires_grad_(key not in probe.buffers)
    return moved


def plain_ep(one: Weights, z: torch.Tensor, n_queries: int) -> torch.Tensor:
    """Every value projected, one clip (patch, dim) at a time: features before the norm."""
    attention = (one["queries"] @ z.T / math.sqrt(z.shape[1])).softmax(dim=-1)
    slices = F.linear(z, one["value"]).view(len(z), n_queries, -1)
    return torch.einsum("mn,nmw->mw", attention, slices).flatten()


def plain_simpool(one: Weights, z: torch.Tensor, gamma: float | None) -> torch.Tensor:
    y = F.layer_norm(z, z.shape[1:], one["norm_weight"], one["norm_bias"], 1e-6)
    query, keys = F.linear(z.mean(dim=0), one["query"]), F.linear(y, one["key"])
    attention = (keys @ query / math.sqrt(z.shape[1])).softmax(dim=0)
    if gamma is None:
        return attention @ y
    return (attention @ (y - y.min() + 1e-6) ** gamma) ** (1 / gamma)


def plain_abmilp(one: Weights, z: torch.Tensor, self_attention: str) -> torch.Tensor:
    seen = z
    if self_attention != "none":
        query, key, value = (F.linear(z, one[name]) for name in ("query", "key", "value"))
        inner = (query @ key.T / math.sqrt(z.shape[1])).softmax(dim=-1) @ value
        seen = F.linear(inner, one["output"], one["output_bias"])
    hidden = torch.tanh(F.linear(seen, one["hidden"], one["hidden_bias"]))
    attention = F.linear(hidden, one["score"], one["score_bias"]).softmax(dim=0)
    return attention[:, 0] @ (seen if self_attention == "both" else z)


def plain(name: str, options: Options, stacked: Weights, seen: Tokens) -> torch.Tensor:
    """The formula of the docstring for each trial and clip alone, on the patches that count."""
    counts = [seen.shape[1]] * len(seen) if seen.n_patches is None else seen.n_patches.tolist()
    trials = []
    for trial in range(len(stacked["weight"])):
        one = {key: value[trial] for key, value in stacked.items()}
        features = []
        for clip, count in enumerate(counts):
            z = seen.patches[clip, :count]
            if name == "ep":
                found = plain_ep(one, z, options.get("n_queries", 24))
                centred = found - one["running_mean"]
                features.append(centred / torch.sqrt(one["running_variance"] + 1e-6))
            elif name == "simpool":
                features.append(plain_simpool(one, z, options.get("gamma")))
            else:
                features.append(plain_abmilp(one, z, options["self_attention"]))
        trials.append(F.linear(torch.stack(features), one["weight"], one["bias"]))
    return torch.stack(trials)


CASES: dict[str, tuple[str, Options]] = {
    "ep": ("ep", {}),
    "ep with 4 queries on a third": ("ep", {"n_queries": 4, "d_out": 3}),
    "simpool": ("simpool", {}),
    "simpool with a power mean": ("simpool", {"gamma": 1.25}),
    "abmilp": ("abmilp", {"self_attention": "none"}),
    "abmilp, attention for the map": ("abmilp", {"self_attention": "map"}),
    "abmilp, attention for both": ("abmilp", {"self_attention": "both"}),
}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["all count", "some count"])
def test_the_folded_form_equals_the_plain_one_with_its_gradients(
    name: str, options: Options, masked: bool
) -> None:
    probe, seen = build_probe(name, SHAPE, options), tokens(masked=masked)
    stacked = weights(probe, name)
    found, expected = probe.logits(stacked, seen), plain(name, options, stacked, seen)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    trained = {key: value for key, value in stacked.items() if key not in probe.buffers}
    ours = torch.autograd.grad(found, list(trained.values()), direction)
    theirs = torch.autograd.grad(expected, list(trained.values()), direction)
    for key, one, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_a_probe_built_with_these_options_has_them(name: str, options: Options) -> None:
    probe = build_probe(name, SHAPE, options)
    assert probe.options.items() >= options.items()
    assert build_probe(name, SHAPE, probe.options) == probe


@pytest.mark.parametrize(("n_classes", "ep", "simpool"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameter_counts_are_the_papers(n_classes: int, ep: int, simpool: int) -> None:
    shape = ProbeShape(768, n_classes)
    assert n_parameters(build_probe("ep", shape)) == ep
    assert n_parameters(build_probe("simpool", shape)) == simpool


@pytest.mark.parametrize(("width", "n_queries"), [(768, 32), (24, 24), (100, 25), (37, 1)])
def test_ep_takes_32_queries_or_the_largest_number_that_divides(width: int, n_queries: int) -> None:
    assert default_queries(width) == n_queries


def trained(probe: Probe, name: str, seeds: list[int], *, n_clips: int) -> TrialStack:
    trials = [Trial(1e-2, 0.0, seed) for seed in seeds]
    stack = TrialStack(name, probe, trials, dtype=torch.float64)
    targets = torch.zeros(n_clips, 3, dtype=torch.float64)
    targets[:, 0] = 1
    for step in range(5):
        stack.step(tokens(seed=step, n_clips=n_clips), targets, asymmetric, factor=1.0)
    return stack


def test_running_statistics_of_ep_are_torchs_and_serve_evaluation() -> None:
    probe = build_probe("ep", SHAPE)
    stack = TrialStack("ep", probe, [Trial(0.0, 0.0, seed) for seed in (0, 1)], dtype=torch.float64)
    norms = [torch.nn.BatchNorm1d(24, 1e-6, 0.1, affine=False).double() for _ in range(2)]
    # Identities in place of norm and linear layer: its logits are the features before the norm.
    raw = {
        **stack.weights,
        "running_mean": torch.zeros(2, 24, dtype=torch.float64),
        "running_variance": torch.full((2, 24), 1 - 1e-6, dtype=torch.float64),
        "weight": torch.eye(24, dtype=torch.float64).expand(2, 24, 24),
        "bias": torch.zeros(2, 24, dtype=torch.float64),
    }
    for step in range(3):
        seen = tokens(seed=step)
        features = probe.logits(raw, seen)
        expected = torch.stack(
            [
                F.linear(norm(one), weight, bias)
                for norm, one, weight, bias in zip(
                    norms, features, stack.weights["weight"], stack.weights["bias"], strict=True
                )
            ]
        )
        losses = stack.step(seen, torch.ones(4, 3).double(), asymmetric, factor=1.0)
        torch.testing.assert_close(losses, asymmetric(expected, torch.ones(4, 3).double()))
    for trial, norm in enumerate(norms):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        torch.testing.assert_close(stack.weights["running_mean"][trial], norm.running_mean)
        torch.testing.assert_close(stack.weights["running_variance"][trial], norm.running_var)
    seen = tokens(seed=9)
    for trial, norm in enumerate(norms):
        norm.eval()
        one = {key: value[trial] for key, value in stack.weights.items()}
        expected = F.linear(norm(probe.logits(raw, seen)[trial]), one["weight"], one["bias"])
        torch.testing.assert_close(stack.logits(seen)[trial], expected)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_trials_evaluate_together_as_alone_after_training(name: str, options: Options) -> None:
    probe, seen = build_probe(name, SHAPE, options), tokens(seed=9)
    together = trained(probe, name, [0, 1], n_clips=4).logits(seen)
    for seed in (0, 1):
        alone = trained(probe, name, [seed], n_clips=4).logits(seen)
        torch.testing.assert_close(together[seed], alone[0])


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_a_batch_of_one_trains(name: str, options: Options) -> None:
    probe = build_probe(name, SHAPE, options)
    stack = trained(probe, name, [0, 1], n_clips=1)
    first = stacked_weights(probe, name, [0, 1])
    assert stack.is_finite.all()
    for key, value in first.items():
        moved = not torch.equal(stack.weights[key], value.double())
        # One clip has no deviation: running statistics are used and stay.
        assert moved == (key not in probe.buffers), key


def test_a_clip_of_simpool_does_not_see_the_others_of_its_batch() -> None:
    probe, seen = build_probe("simpool", SHAPE, {"gamma": 1.25}), tokens()
    stacked = weights(probe, "simpool")
    whole = probe.logits(stacked, seen)
    torch.testing.assert_close(whole[:, :1], probe.logits(stacked, Tokens(seen.patches[:1])))


def test_abmilp_takes_the_published_code_s_self_attention_by_default() -> None:
    probe = build_probe("abmilp", ProbeShape(768, 10))
    assert isinstance(probe, AbmilpProbe)
    assert probe.self_attention == "both"
    bare = build_probe("abmilp", ProbeShape(768, 10), {"self_attention": "none"})
    assert n_parameters(probe) - n_parameters(bare) == 4 * 768**2 + 768


REFUSED: dict[str, tuple[str, Options, str]] = {
    "ep queries": ("ep", {"n_queries": 5}, "found n_queries=5, expected a divisor of dim/d_out=24"),
    "ep d_out": ("ep", {"d_out": 7}, "found d_out=7, expected a divisor of dim=24"),
    "ep option": ("ep", {"heads": 1}, "found option heads for probe 'ep'; it has n_queries, d_out"),
    "gamma": ("simpool", {"gamma": 0}, "found gamma=0, expected more than 0, or null"),
    "self-attention": (
        "abmilp",
        {"self_attention": "all"},
        "found self_attention='all', expected one of none, map, both",
    ),
}


@pytest.mark.parametrize(("name", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_probe_that_cannot_be_built_says_why(name: str, options: Options, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        build_probe(name, SHAPE, options)
