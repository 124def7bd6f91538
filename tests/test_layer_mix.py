from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import Batch
from patchbank.probing.losses import asymmetric
from patchbank.probing.probes import PROBES, build_probe
from patchbank.probing.probes.base import (
    Options,
    Probe,
    ProbeShape,
    Weights,
    n_parameters,
    stacked_weights,
)
from patchbank.probing.probes.layer_mix import LayerMixProbe
from patchbank.probing.probes.mixing import MixedTokens, mix
from patchbank.probing.probes.tokens import Buffers, Tokens, convert
from patchbank.probing.trials import Trial, TrialStack

DIM, N_LAYERS = 24, 3
SHAPE = ProbeShape(DIM, 3, 1, n_layers=N_LAYERS)
OPTIONS: dict[str, Options] = {"cgp": {"n_prototypes": 20}}
COUNTS = [7, 1, 3, 5]
WRAPPED = [name for name in PROBES if isinstance(build_probe(name, SHAPE), LayerMixProbe)]
LEARNING = [name for name in PROBES if name != "knn"]


def built(name: str, shape: ProbeShape = SHAPE) -> Probe:
    return build_probe(name, shape, OPTIONS.get(name))


def layers(*, masked: bool = False, seed: int = 0, spoilt: bool = False) -> Tokens:
    """The last layer of a batch, with the layers before it."""
    random = torch.Generator().manual_seed(seed)
    made: list[Tokens] = []
    for _ in range(N_LAYERS):
        patches = torch.randn(4, 7, DIM, generator=random, dtype=torch.float64)
        prefix = torch.randn(4, 1, DIM, generator=random, dtype=torch.float64)
        if spoilt:
            for clip, count in enumerate(COUNTS):
                patches[clip, count:] = 100.0
        counts = torch.tensor(COUNTS) if masked else None
        made.append(Tokens(patches, prefix, counts, others=made))
    return made[-1]


def weights(probe: Probe, name: str, *, n_trials: int = 2) -> Weights:
    """First weights, moved by random numbers: no mix is uniform."""
    random = torch.Generator().manual_seed(7)
    moved = {}
    for key, value in stacked_weights(probe, name, list(range(n_trials))).items():
        noise = torch.rand(value.shape, generator=random, dtype=torch.float64)
        moved[key] = (value.double() + noise).requires_grad_(key not in probe.buffers)
    return moved


def by_hand(stacked: Weights, trial: int, seen: Tokens) -> Tokens:
    """Layers weighted and added by autograd's own sums."""
    shares = stacked["layers"][trial].softmax(dim=0)
    patches = torch.stack([layer.patches for layer in seen.layers])
    prefix = torch.stack([layer.prefix for layer in seen.layers if layer.prefix is not None])
    return Tokens(
        torch.einsum("l,lbnd->bnd", shares, patches),
        torch.einsum("l,lbnd->bnd", shares, prefix),
        seen.n_patches,
    )


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("masked", [False, True], ids=["all count", "some count"])
def test_a_mix_is_the_probe_on_mixed_tokens_with_its_gradients(name: str, masked: bool) -> None:
    probe, seen = built(name), layers(masked=masked)
    stacked = weights(probe, name)
    assert isinstance(probe, LayerMixProbe)
    expected = torch.cat(
        [
            probe.inner.logits(
                {key: stacked[key][trial : trial + 1] for key in stacked if key != "layers"},
                by_hand(stacked, trial, seen),
            )
            for trial in range(2)
        ]
    )
    found = probe.logits(stacked, seen)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    trained = {key: value for key, value in stacked.items() if key not in probe.buffers}
    ours = torch.autograd.grad(found, list(trained.values()), direction)
    theirs = torch.autograd.grad(expected, list(trained.values()), direction)
    for key, one, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", LEARNING)
def test_the_gradient_of_layer_weights_is_that_of_finite_differences(name: str) -> None:
    probe, seen = built(name), layers(masked=True)
    stacked = weights(probe, name)
    direction = torch.randn(2, 4, 3, dtype=torch.float64)

    def value(layer_weights: torch.Tensor) -> torch.Tensor:
        return (probe.logits({**stacked, "layers": layer_weights}, seen) * direction).sum()

    [found] = torch.autograd.grad(value(stacked["layers"]), [stacked["layers"]])
    step = 1e-6
    with torch.no_grad():
        for trial in range(2):
            for layer in range(N_LAYERS):
                moved = torch.zeros_like(stacked["layers"])
                moved[trial, layer] = step
                up, down = value(stacked["layers"] + moved), value(stacked["layers"] - moved)
                difference = (up - down) / (2 * step)
                torch.testing.assert_close(found[trial, layer], difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LEARNING)
def test_patches_that_do_not_count_change_nothing(name: str) -> None:
    probe = built(name)
    stacked = weights(probe, name)
    clean = probe.logits(stacked, layers(masked=True))
    torch.testing.assert_close(clean, probe.logits(stacked, layers(masked=True, spoilt=True)))


def trained(name: str, trials: list[Trial]) -> TrialStack:
    stack = TrialStack(name, built(name), trials, dtype=torch.float64)
    targets = torch.eye(4, 3, dtype=torch.float64)
    for step in range(10):
        stack.step(layers(seed=step), targets, asymmetric, factor=1.0)
    return stack


@pytest.mark.parametrize("name", LEARNING)
def test_a_trial_is_the_same_together_and_alone_and_learns_its_mix(name: str) -> None:
    trials = [Trial(1e-2, 1e-4, 0), Trial(3e-2, 0.0, 1)]
    together, seen = trained(name, trials), layers(seed=99)
    assert together.is_finite.all()
    assert not torch.equal(together.weights["layers"], torch.zeros(2, N_LAYERS).double())
    for index, trial in enumerate(trials):
        alone = trained(name, [trial])
        torch.testing.assert_close(together.logits(seen)[index], alone.logits(seen)[0])
        for key, value in alone.weights_of(0).items():
            torch.testing.assert_close(together.weights_of(index)[key], value)


@pytest.mark.parametrize("name", LEARNING)
def test_trials_with_tokens_of_their_own_go_one_at_a_time(name: str) -> None:
    stack = TrialStack(name, built(name), [Trial(1e-3, 0.0, seed) for seed in range(3)])
    assert stack.parts == [slice(0, 1), slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize("name", WRAPPED)
def test_a_mix_starts_uniform_from_the_weights_of_one_layer(name: str) -> None:
    probe, alone = built(name), built(name, ProbeShape(DIM, 3, 1))
    mixed, single = stacked_weights(probe, name, [4]), stacked_weights(alone, name, [4])
    assert torch.equal(mixed.pop("layers"), torch.zeros(1, N_LAYERS))
    assert mixed.keys() == single.keys()
    for key, value in single.items():
        assert torch.equal(mixed[key], value)
    assert n_parameters(probe) == n_parameters(alone) + N_LAYERS


@pytest.mark.parametrize("name", WRAPPED)
def test_a_mix_has_options_rates_buffers_and_penalty_of_the_probe_behind(name: str) -> None:
    probe, alone = built(name), built(name, ProbeShape(DIM, 3, 1))
    assert (probe.options, probe.learning_rates, probe.buffers) == (
        alone.options,
        alone.learning_rates,
        alone.buffers,
    )
    assert build_probe(name, SHAPE, probe.options) == probe
    stacked = weights(probe, name)
    torch.testing.assert_close(probe.penalty(stacked), alone.penalty(stacked))


def test_a_linear_probe_mixes_means_and_makes_no_mixed_patch() -> None:
    patches = [torch.randn(4, 7, DIM).half() for _ in range(N_LAYERS)]
    made: list[Tokens] = []
    for one in patches:
        batch = Batch.of(np.arange(4), one)
        tokens = convert(batch, dtype=torch.float32, device=torch.device("cpu"), buffers=Buffers())
        made.append(tokens)
    mixed = MixedTokens(made, torch.tensor([0.5, 0.3, 0.2]))
    expected = 0.5 * patches[0].float() + 0.3 * patches[1].float() + 0.2 * patches[2].float()
    torch.testing.assert_close(mixed.mean, expected.mean(dim=1))
    assert "patches" not in mixed.__dict__
    assert not any("patches" in one.__dict__ for one in made)
    torch.testing.assert_close(mixed.patches, expected)
    assert mixed.stored_directions is None, "the last layer as stored is not the mix"


@pytest.mark.parametrize("unit", [False, True], ids=["as it is", "of unit length"])
def test_a_mix_has_the_gradient_of_finite_differences(unit: bool) -> None:
    arrays = [torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3)]
    shares = torch.rand(3, dtype=torch.float64, requires_grad=True)
    mixed = mix(shares, arrays, to_unit_length=unit)
    lengths = torch.linalg.vector_norm(mixed, dim=-1)
    assert torch.allclose(lengths, torch.ones(2, 3).double()) == unit
    assert torch.autograd.gradcheck(lambda s: mix(s, arrays, to_unit_length=unit), [shares])


def test_mixed_tokens_are_free_as_soon_as_nobody_holds_them() -> None:
    seen = layers()
    gc.disable()
    try:
        mixed = MixedTokens(seen.layers, torch.tensor([0.5, 0.3, 0.2]).double())
        held = weakref.ref(mixed.directions)
        del mixed
        assert held() is None
    finally:
        gc.enable()


def last_of(n_patches: int, n_prefix: int | None, others: list[Tokens]) -> Tokens:
    prefix = None if n_prefix is None else torch.zeros(4, n_prefix, DIM).double()
    random = torch.Generator().manual_seed(len(others))
    patches = torch.randn(4, n_patches, DIM, generator=random, dtype=torch.float64)
    return Tokens(patches, prefix, others=others)


REFUSED: dict[str, tuple[Callable[[], Tokens], str]] = {
    "one layer": (
        lambda: last_of(7, 1, []),
        "found 1 layers in the batch, expected the 3 that the probe mixes",
    ),
    "other grids": (
        lambda: last_of(7, 1, [last_of(7, 1, []), last_of(5, 1, [])]),
        r"found patches \(5, 24\) in layer 2 of 3 and \(7, 24\) in the last, expected",
    ),
}
OTHER_PREFIXES = {
    "some have none": [last_of(7, None, []), last_of(7, 1, [])],
    "the last has fewer": [last_of(7, 2, []), last_of(7, 2, [])],
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_layers_that_cannot_be_mixed_are_named(make: Callable[[], Tokens], message: str) -> None:
    probe = built("linear")
    with pytest.raises(TrialError, match=message):
        probe.logits(weights(probe, "linear"), make())


@pytest.mark.parametrize("others", OTHER_PREFIXES.values(), ids=OTHER_PREFIXES)
@pytest.mark.parametrize("name", ["linear", "protobin", "linear-cls", "cgp"])
def test_other_prefixes_are_refused_where_the_probe_uses_them(
    name: str, others: list[Tokens]
) -> None:
    probe, seen = built(name), last_of(7, 1, others)
    stacked = weights(probe, name)
    if probe.uses_prefix:
        with pytest.raises(TrialError, match=r"found prefix .* in layer 1 of 3 and \(1, 24\) in"):
            probe.logits(stacked, seen)
        return
    bare = last_of(7, None, [last_of(7, None, []) for _ in others])
    assert torch.equal(probe.logits(stacked, seen), probe.logits(stacked, bare))


def test_a_probe_behind_a_mix_says_that_its_trials_go_one_at_a_time() -> None:
    said = "trials one at a time: each mixes the layers its own way"
    assert [built(name).note for name in LEARNING] == [said] * len(LEARNING)
    assert built("cgp", ProbeShape(DIM, 3, 1)).note is None


NAMED = """
from torch import nn
from patchbank.probing.probes.plugin import check_options

class Named(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.PARAMETER = nn.Parameter(nn.Linear(shape.dim, shape.n_classes).weight.detach())

    def forward(self, tokens):
        return tokens.mean @ self.PARAMETER.T

def build(shape, options):
    check_options("named", options, ())
    return Named(shape)
"""


def test_a_module_whose_parameter_is_named_like_the_layer_weights_is_refused(
    tmp_path: Path,
) -> None:
    files = {}
    for parameter in ("layers", "heads"):
        files[parameter] = tmp_path / f"{parameter}_probe.py"
        files[parameter].write_text(NAMED.replace("PARAMETER", parameter))
    probe = build_probe(str(files["layers"]), SHAPE)
    with pytest.raises(TrialError, match="found an array 'layers' in the probe, expected another"):
        stacked_weights(probe, "layers_probe", [0])
    other = build_probe(str(files["heads"]), SHAPE)
    assert stacked_weights(other, "heads_probe", [0]).keys() == {"heads", "layers"}
    assert other.note == "trials one at a time: each mixes the layers its own way"
