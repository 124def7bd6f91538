"""Probes that are plain torch modules: stacked where torch can, one by one otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchbank.pipeline.errors import TrialError
from patchbank.probing.losses import asymmetric
from patchbank.probing.probes import module
from patchbank.probing.probes.base import Probe, ProbeShape, n_parameters, stacked_weights
from patchbank.probing.probes.layer_mix import LayerMixProbe
from patchbank.probing.probes.made_tokens import made_tokens
from patchbank.probing.probes.module import ModuleProbe
from patchbank.probing.probes.plugin_build import PluginBuild
from patchbank.probing.probes.stacking import values_kept
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator
from patchbank.probing.trials import Trial, TrialStack

SHAPE = ProbeShape(dim=8, n_classes=3, n_prefix=1)
TRIALS = [Trial(1e-3, 1e-4, 0), Trial(3e-2, 0.1, 0), Trial(1e-3, 1e-4, 1)]


class Pooled(nn.Module):
    """Some layers on the mean token, some function in between."""

    def __init__(
        self, *layers: nn.Module, between: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.layers, self.between = nn.Sequential(*layers), between
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tokens) -> Tensor:
        values = self.layers(tokens.mean)
        return self.head(values if self.between is None else self.between(values))


class Attentive(nn.Module):
    """Gated attention with dropout, by plain operations."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(8, 1), nn.Linear(16, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, tokens: Tokens) -> Tensor:
        scores = self.gate(self.dropout(tokens.directions))
        if tokens.counts is not None:
            scores = scores.masked_fill(~tokens.counts[..., None], -torch.inf)
        pooled = (scores.softmax(dim=1) * tokens.patches).sum(dim=1)
        return self.head(self.dropout(torch.cat([pooled, tokens.cls], dim=1)))


class SelfAttentive(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tokens) -> Tensor:
        masked = None if tokens.counts is None else ~tokens.counts
        seen = tokens.patches
        out, _ = self.attention(seen, seen, seen, key_padding_mask=masked)
        return self.head(out.mean(dim=1))


class Counting(nn.Module):
    """Buffers that are whole numbers, replaced, left alone, or not to be saved."""

    order: Tensor
    seen: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.register_buffer("order", torch.arange(8).flip(0), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.zeros(8))

    def forward(self, tokens: Tokens) -> Tensor:
        values = tokens.mean[:, self.order] * self.frozen
        if self.training:
            self.seen += len(tokens)
            self.average = 0.9 * self.average + 0.1 * self.head.weight.mean(dim=0)
        return self.head(values - self.average)


def by_its_sign(values: Tensor) -> Tensor:
    return values if values.sum() > 0 else -values


def by_its_size(values: Tensor) -> Tensor:
    return values / values.abs().max().item()


def half_dropped(values: Tensor) -> Tensor:
    return F.dropout(values, 0.5) if torch.is_grad_enabled() else values


def noisy(values: Tensor) -> Tensor:
    return values + torch.randn(values.shape)


def positive_mean(values: Tensor) -> Tensor:
    return values + values[values > 0].mean()


def by_numpy(values: Tensor) -> Tensor:
    return values * float(values.detach().numpy().std())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return 2 * values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def doubled(values: Tensor) -> Tensor:
    result: Tensor = Doubled.apply(values)
    return result


def layered(between: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Pooled(nn.Linear(8, 8), between=between)


STACKED: dict[str, Callable[[], nn.Module]] = {
    "linear layers": lambda: Pooled(nn.Linear(8, 8), nn.GELU()),
    "dropout": lambda: Pooled(nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2)),
    "batch-norm": lambda: Pooled(nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "layer-norm": lambda: Pooled(nn.LayerNorm(8), nn.Linear(8, 8)),
    "attention": Attentive,
    "buffers": Counting,
}
ONE_BY_ONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "control flow": (layered(by_its_sign), "it decides by a tensor's values (test_module_pr"),
    "item": (layered(by_its_size), "it takes a number out of a tensor (test_module_probes.py:"),
    "F.dropout": (layered(half_dropped), "it draws random numbers other than by nn.Dropout"),
    "noise": (layered(noisy), "it draws random numbers other than by nn.Dropout"),
    "boolean mask": (layered(positive_mean), "a shape in it depends on values"),
    "numpy": (layered(by_numpy), "RuntimeError: Cannot access data pointer"),
    "own function": (layered(doubled), "an autograd.Function of it has no setup_context"),
    "no batching rule": (
        lambda: SelfAttentive(0.0),
        "torch cannot stack native_multi_head_att",
    ),
    "attention with dropout": (lambda: SelfAttentive(0.2), "it draws random numbers other than"),
}
ALL = {**STACKED, **{what: make for what, (make, _) in ONE_BY_ONE.items()}}


def probe_of(make: Callable[[], nn.Module], shape: ProbeShape = SHAPE) -> ModuleProbe:
    probe = PluginBuild("mine", "mine.py", lambda shape, options: make())(shape, {})
    assert isinstance(probe, ModuleProbe)
    return probe


@pytest.mark.parametrize("what", STACKED)
def test_plain_torch_is_one_product(what: str) -> None:
    assert probe_of(STACKED[what]).note == "trials in one product"


@pytest.mark.parametrize("what", ONE_BY_ONE)
def test_what_torch_cannot_stack_is_trained_one_by_one_and_says_why(what: str) -> None:
    make, reason = ONE_BY_ONE[what]
    note = probe_of(make).note
    assert note.startswith("trials one by one: ")
    assert reason in note


def trained(
    probe: Probe, trials: list[Trial], *, dtype: torch.dtype = torch.float64, n_steps: int = 12
) -> tuple[TrialStack, Tensor]:
    """A stack after some steps on seeded batches, and its losses (step, trial)."""
    stack = TrialStack("mine", probe, trials, dtype=dtype)
    losses = []
    for step in range(n_steps):
        tokens = made_tokens(SHAPE, n_clips=5, seed=step, dtype=dtype)
        targets = (torch.rand(5, 3, generator=generator("targets", step)) < 0.4).to(dtype)
        losses.append(stack.step(tokens, targets, asymmetric, factor=1.0))
    return stack, torch.stack(losses)


@pytest.mark.parametrize("what", ALL)
def test_a_trial_is_the_same_together_and_alone(what: str) -> None:
    together, losses = trained(probe_of(ALL[what]), TRIALS)
    for index, trial in enumerate(TRIALS):
        alone, own_losses = trained(probe_of(ALL[what]), [trial])
        torch.testing.assert_close(losses[:, index], own_losses[:, 0], rtol=1e-6, atol=0)
        for key, value in alone.weights_of(0).items():
            found = together.weights_of(index)[key]
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("what", ["dropout", "attention", "batch-norm", "buffers"])
def test_a_product_is_what_the_loop_gives(what: str) -> None:
    """Against the module itself, with the masks of the same generators."""
    probe, tokens = probe_of(STACKED[what]), made_tokens(SHAPE, n_clips=5)
    first = stacked_weights(probe, "mine", [0, 1, 2])
    results = []
    for apply in (probe.stacked, probe.looped):
        weights = {key: value.clone() for key, value in first.items()}
        extra = {"is_seeded": False} if apply == probe.looped else {}
        randoms = [generator("masks", index) for index in range(3)]
        logits = apply(weights, tokens, randoms, **extra)  # type: ignore[operator]
        results.append([logits, *weights.values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_buffers_are_changed_in_training_only_and_keep_their_types() -> None:
    probe = probe_of(Counting)
    assert set(probe.buffers) == {"frozen", "order", "seen", "average"}
    assert n_parameters(probe) == 27
    stack, _ = trained(probe, TRIALS, n_steps=4)
    first = stacked_weights(probe, "mine", [0, 0, 1])
    assert stack.weights["seen"].tolist() == [20, 20, 20]
    assert torch.equal(stack.weights["frozen"], first["frozen"].double())
    assert torch.equal(stack.weights["order"], first["order"].double())
    before = stack.weights["average"].clone()
    assert not torch.equal(before[0], before[1])
    stack.logits(made_tokens(SHAPE, dtype=torch.float64))
    assert torch.equal(stack.weights["average"], before)


def test_a_batch_of_one_leaves_batch_norm_to_its_running_statistics() -> None:
    probe = probe_of(STACKED["batch-norm"])
    stack, _ = trained(probe, TRIALS, n_steps=3, dtype=torch.float32)
    before = stack.weights["layers.1.running_mean"].clone()
    stack.step(made_tokens(SHAPE, n_clips=1), torch.ones(1, 3), asymmetric, factor=1.0)
    assert bool(stack.is_finite.all())
    assert torch.equal(stack.weights["layers.1.running_mean"], before)


@pytest.mark.parametrize("what", ALL)
def test_global_generators_stay_as_they_are(what: str) -> None:
    before = torch.get_rng_state()
    stack, _ = trained(probe_of(ALL[what]), TRIALS, n_steps=2, dtype=torch.float32)
    stack.logits(made_tokens(SHAPE))
    assert torch.equal(torch.get_rng_state(), before)


def test_first_weights_are_those_of_torch_and_of_the_seed_alone() -> None:
    probe = probe_of(STACKED["linear layers"])
    one, same = (probe.first_weights(generator("w", 3)) for _ in range(2))
    other = probe.first_weights(generator("w", 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert float(one["head.weight"].abs().max()) <= 8**-0.5


def test_masks_differ_between_trials_and_between_steps() -> None:
    probe, tokens = probe_of(lambda: Pooled(nn.Dropout(0.5))), made_tokens(SHAPE)
    weights = stacked_weights(probe, "mine", [0, 0])
    randoms = [generator("masks", index) for index in range(2)]
    first, second = (probe.logits(weights, tokens, dropout=randoms) for _ in range(2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    quiet = probe.logits(weights, tokens)
    assert torch.equal(quiet[0], quiet[1])
    many = [probe.logits(weights, tokens, dropout=randoms) for _ in range(300)]
    torch.testing.assert_close(torch.stack(many).mean(dim=0), quiet, atol=0.1, rtol=0)


def test_random_numbers_of_a_loop_are_each_trials_own() -> None:
    probe, tokens = probe_of(layered(noisy)), made_tokens(SHAPE)
    weights = stacked_weights(probe, "mine", [0, 0])
    randoms = [generator("masks", index) for index in range(2)]
    first, second = (probe.logits(weights, tokens, dropout=randoms) for _ in range(2))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(probe.logits(weights, tokens), probe.logits(weights, tokens))


def test_what_tokens_keep_stays_usable_after_a_product() -> None:
    """Tokens are stored halves here: everything is made inside the product."""
    whole = made_tokens(SHAPE)
    kept = Tokens(whole.patches, whole.prefix, torch.tensor([12, 3, 1]))
    probe = probe_of(Attentive)
    weights = stacked_weights(probe, "mine", [0, 1])
    probe.logits(weights, kept)
    fresh = Tokens(whole.patches, whole.prefix, torch.tensor([12, 3, 1]))
    for name in ("directions", "mean", "counts"):
        found = getattr(kept, name)
        assert not torch._C._functorch.is_batchedtensor(found)
        assert torch.equal(found, getattr(fresh, name))


@pytest.mark.parametrize("what", ["attention", "F.dropout"])
def test_tokens_may_want_a_gradient(what: str) -> None:
    """As they do behind a trained mix of layers, where trials come one at a time."""
    probe, made = probe_of(ALL[what]), made_tokens(SHAPE, dtype=torch.float64)
    weights = {k: v.double() for k, v in stacked_weights(probe, "mine", [0]).items()}
    slopes = []
    for apply in (probe.stacked, probe.looped) if what in STACKED else (probe.logits, probe.looped):
        patches = made.patches.clone().requires_grad_()
        logits = apply(weights, Tokens(patches, made.prefix), dropout=None)
        slopes.append(torch.autograd.grad(logits.square().sum(), patches)[0])
    assert bool(slopes[0].abs().sum(dim=(1, 2)).all())
    torch.testing.assert_close(slopes[0], slopes[1])


def test_as_many_trials_go_together_as_memory_is_well_spent_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert probe_of(Attentive).trials_at_once is None
    assert probe_of(ONE_BY_ONE["item"][0]).trials_at_once == 1
    # Of every patch of 64 clips it keeps the 8 numbers that dropout leaves, and a few scores.
    kept = values_kept(probe_of(Attentive))
    assert 64 * 12 * 8 < kept < 2 * 64 * 12 * 8
    whole, losses = trained(probe_of(Attentive), TRIALS, n_steps=4)
    for n_trials, words in (
        (5, "trials 5 at a time, for the"),
        (3, "trials one at a time, for the"),
    ):
        monkeypatch.setattr(module, "KEPT_AT_ONCE", n_trials * kept)
        probe = probe_of(Attentive)
        assert words in probe.note
        parts, own_losses = trained(probe, TRIALS, n_steps=4)
        assert len(parts.parts) == (1 if n_trials > 3 else 3)
        torch.testing.assert_close(own_losses, losses, rtol=1e-6, atol=0)
        for key, value in whole.weights.items():
            torch.testing.assert_close(parts.weights[key], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("what", ["dropout", "buffers", "F.dropout"])
def test_a_module_trains_behind_a_mix_of_layers(what: str) -> None:
    shape = replace(SHAPE, n_layers=2)
    probe = LayerMixProbe(shape, probe_of(ALL[what]))
    assert probe.note == "trials one at a time: each mixes the layers its own way"
    stack = TrialStack("mine", probe, TRIALS, dtype=torch.float64)
    before = {key: value.clone() for key, value in stack.weights.items()}
    for step in range(3):
        tokens = made_tokens(shape, n_clips=5, seed=step, dtype=torch.float64)
        stack.step(tokens, torch.ones(5, 3, dtype=torch.float64), asymmetric, factor=1.0)
    for key in set(stack.weights) - {"frozen", "order"}:
        assert not torch.equal(stack.weights[key], before[key]), key


class Rated(Pooled):
    learning_rates = (1e-2, 3e-1)


class Mixed(nn.Module):
    mixes_layers = True

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Parameter(torch.zeros(2)), nn.Linear(8, 3)

    def forward(self, tokens: Tokens) -> Tensor:
        layers = torch.stack([layer.mean for layer in tokens.layers])
        return self.head(torch.einsum("l,lcd->cd", self.mix.softmax(dim=0), layers))


def test_a_module_says_its_learning_rates_and_whether_it_mixes_layers() -> None:
    assert probe_of(Rated).learning_rates == (1e-2, 3e-1)
    assert probe_of(Pooled).learning_rates == Probe.learning_rates
    assert not probe_of(Pooled).mixes_layers
    mixed = probe_of(Mixed, ProbeShape(8, 3, n_layers=2))
    assert mixed.mixes_layers
    assert mixed.note == "trials in one product"


def test_what_a_module_sees_of_the_prefix_is_found_out() -> None:
    assert probe_of(Attentive).uses_prefix
    assert not probe_of(Pooled).uses_prefix
    assert not probe_of(Pooled, ProbeShape(8, 3)).uses_prefix


def test_a_module_may_state_its_options() -> None:
    class Stated(Pooled):
        options: ClassVar[dict[str, float]] = {"rate": 0.5, "depth": 2}

    build = PluginBuild("mine", "mine.py", lambda shape, options: Stated())
    assert build(SHAPE, {"rate": 0.25}).options == {"rate": 0.25, "depth": 2}
    assert probe_of(Pooled).options == {}


def crash(values: Tensor) -> Tensor:
    raise KeyError("gain")


REFUSED: dict[str, tuple[object, str]] = {
    "nothing": (None, r"build\(\) of mine\.py returned NoneType, expected a torch.nn.Module or a"),
    "lazy": (nn.LazyLinear(3), r"build\(\) of mine\.py returned lazy layers, expected ones whose"),
    "empty": (nn.ReLU(), r"mine\.py returned a module without parameters to train, expected some"),
}


@pytest.mark.parametrize(("built", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_no_probe_is_refused(built: object, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        PluginBuild("mine", "mine.py", lambda shape, options: built)(SHAPE, {})  # type: ignore[arg-type, return-value]


def test_mistakes_of_a_module_are_told_with_their_line() -> None:
    with pytest.raises(TrialError, match=r"of probe 'mine' failed: \S+:\d+: KeyError: 'gain'"):
        _ = probe_of(layered(crash)).note
    with pytest.raises(TrialError, match=r"\(\) of mine\.py failed: \S+probes\.py:\d+: ZeroDiv"):
        PluginBuild("mine", "mine.py", lambda shape, options: nn.Linear(1 // 0, 3))(SHAPE, {})
    wide = probe_of(lambda: Pooled(between=lambda values: values[:2]))
    message = r"forward of probe 'mine' returns \(2, 3\), expected logits \(clip=16, class=3\)"
    with pytest.raises(TrialError, match=message):
        _ = wide.note
