from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from patchbank.pipeline.errors import TrialError
from patchbank.probing.losses import asymmetric
from patchbank.probing.probes import best_match as best_match_file
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import (
    Options,
    Probe,
    ProbeShape,
    Weights,
    n_parameters,
    stacked_weights,
)
from patchbank.probing.probes.best_match import best_match, block_size, similarities
from patchbank.probing.probes.extreme_match import extreme_match
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.trials import Trial, TrialStack

DIM = 12
COUNTS = [7, 1, 3, 5]

# reference/paper.md of the design: D = 768.
PARAMETERS = {
    "as20k": (527, 10, 4_053_157),
    "fsd50k": (200, 20, 3_076_200),
    "urban": (10, 20, 153_810),
    "esc50": (50, 20, 769_050),
}


def layers(*, n_layers: int, n_prefix: int = 1, masked: bool = False, seed: int = 0) -> Tokens:
    """Tokens of one batch, the layers before the last among them."""
    random = torch.Generator().manual_seed(seed)
    counts = torch.tensor(COUNTS) if masked else None
    made: list[Tokens] = []
    for _ in range(n_layers):
        patches = torch.randn(4, 7, DIM, generator=random, dtype=torch.float64)
        prefix = torch.randn(4, 1, DIM, generator=random, dtype=torch.float64)
        made.append(Tokens(patches, prefix if n_prefix else None, counts, others=made))
    return made[-1]


def weights(probe: Probe, name: str, *, n_trials: int = 2) -> Weights:
    """First weights, moved by random numbers: away from ones, zeros and a uniform mix."""
    random = torch.Generator().manual_seed(7)
    moved = {}
    for key, value in stacked_weights(probe, name, list(range(n_trials))).items():
        noise = torch.randn(value.shape, generator=random, dtype=torch.float64)
        moved[key] = (value.double() + noise).requires_grad_()
    return moved


def assert_same_gradients(found: torch.Tensor, expected: torch.Tensor, stacked: Weights) -> None:
    torch.testing.assert_close(found, expected)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad(found, list(stacked.values()), direction)
    theirs = torch.autograd.grad(expected, list(stacked.values()), direction)
    for key, one, other in zip(stacked, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, key=key: f"{key}: {text}")


def plain_proto(one: Weights, z: torch.Tensor) -> torch.Tensor:
    """One clip (patch, dim), every similarity at once: logits."""
    n_classes, n_each, _ = one["prototypes"].shape
    tokens = torch.cat([z, torch.full((len(z), 2), 1e-4, dtype=z.dtype)], dim=1)
    tokens = tokens / torch.sqrt((tokens**2).sum(dim=1, keepdim=True) + 1e-4)
    extra = torch.full((n_classes, n_each, 2), 1e-4, dtype=z.dtype)
    prototypes = torch.cat([one["prototypes"], extra], dim=2)
    length = torch.sqrt((prototypes**2).sum(dim=2, keepdim=True) + 1e-4) + 1e-4
    cosine = torch.einsum("cjd,nd->cjn", prototypes / length, tokens) / 1.01
    found = torch.relu(cosine).amax(dim=2)
    return (found * torch.relu(one["weight"])).sum(dim=1) + one["bias"]


def plain_cgp(one: Weights, found: Tokens, clip: int, count: int) -> torch.Tensor:
    """One clip, every similarity at once: the features."""
    shares = one["layers"].softmax(dim=0) if "layers" in one else torch.ones(1).double()
    prototypes = F.normalize(one["prototypes"], dim=1)
    patches = torch.stack([layer.patches[clip, :count] for layer in found.layers])
    mixed = torch.einsum("l,lnd->nd", shares, F.normalize(patches, dim=2))
    similarity = mixed @ prototypes.T
    if found.prefix is None:
        middle = similarity.mean(dim=0)
    else:
        cls = torch.stack([layer.cls[clip] for layer in found.layers])
        middle = torch.einsum("l,ld->d", shares, F.normalize(cls, dim=1)) @ prototypes.T
    return torch.cat([similarity.amin(dim=0), middle, similarity.amax(dim=0)])


BLOCKS = pytest.mark.parametrize("scratch", [2**22, 50], ids=["one block", "many blocks"])
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all count", "some count"])


def in_blocks(monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    monkeypatch.setattr(best_match_file, "CPU_SCRATCH", scratch)
    monkeypatch.setattr(best_match_file, "PROTOTYPE_BLOCK", 1024 if scratch > 50 else 7)


@pytest.mark.parametrize("n_patches", [1, 1024, 1025, 4096])
def test_similarities_of_long_clips_fit_the_scratch_too(n_patches: int) -> None:
    directions, prototypes = torch.randn(3, n_patches, 2), torch.randn(1100, 2)
    seen = torch.full((3, 1100), -math.inf)
    for clips, block, similarity in similarities(directions, prototypes):
        assert similarity.untyped_storage().nbytes() <= 4 * 2**20
        seen[clips, block] = similarity.amax(dim=2).T
    torch.testing.assert_close(seen, (directions @ prototypes.T).amax(dim=1))


def test_a_block_has_a_prototype_and_a_clip_at_least() -> None:
    assert block_size(3, 2**21, 1100, torch.device("cpu")) == (1, 1)


@BLOCKS
@MASKED
@pytest.mark.parametrize("focal", [True, False], ids=["minus CLS", "as they are"])
def test_proto_equals_the_plain_form_with_its_gradients(
    focal: bool, masked: bool, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, scratch)
    options = {"n_prototypes_per_class": 4, "focal": focal}
    probe = build_probe("proto", ProbeShape(DIM, 3, 1), options)
    seen, stacked = layers(n_layers=1, masked=masked), weights(probe, "proto")
    rows = []
    for trial in range(2):
        one = {key: value[trial] for key, value in stacked.items()}
        clips = []
        for clip, count in enumerate(COUNTS if masked else [7] * 4):
            z = seen.patches[clip, :count]
            clips.append(plain_proto(one, z - seen.cls[clip] if focal else z))
        rows.append(torch.stack(clips))
    assert_same_gradients(probe.logits(stacked, seen), torch.stack(rows), stacked)


@BLOCKS
@MASKED
@pytest.mark.parametrize("n_prefix", [1, 0], ids=["CLS", "no CLS"])
@pytest.mark.parametrize("n_layers", [1, 3])
def test_cgp_equals_the_plain_form_with_its_gradients(
    n_layers: int, n_prefix: int, masked: bool, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, scratch)
    shape = ProbeShape(DIM, 3, n_prefix, n_layers=n_layers)
    probe = build_probe("cgp", shape, {"n_prototypes": 20})
    seen = layers(n_layers=n_layers, n_prefix=n_prefix, masked=masked)
    stacked = weights(probe, "cgp")
    rows = []
    for trial in range(2):
        one = {key: value[trial] for key, value in stacked.items()}
        counts = COUNTS if masked else [7] * 4
        features = [plain_cgp(one, seen, clip, count) for clip, count in enumerate(counts)]
        rows.append(F.linear(torch.stack(features), one["weight"], one["bias"]))
    assert_same_gradients(probe.logits(stacked, seen), torch.stack(rows), stacked)


@pytest.mark.parametrize(
    ("n_classes", "per_class", "expected"), PARAMETERS.values(), ids=PARAMETERS
)
def test_parameter_counts_of_proto_are_the_papers(
    n_classes: int, per_class: int, expected: int
) -> None:
    options = {"n_prototypes_per_class": per_class}
    assert n_parameters(build_probe("proto", ProbeShape(768, n_classes), options)) == expected


def test_the_parameter_count_of_cgp_is_the_papers() -> None:
    shape = ProbeShape(768, 527, 1, n_layers=12)
    assert n_parameters(build_probe("cgp", shape)) == 23_490_539


def test_cgp_starts_from_a_uniform_mix() -> None:
    shape = ProbeShape(DIM, 3, 1, n_layers=4)
    first = stacked_weights(build_probe("cgp", shape, {"n_prototypes": 5}), "cgp", [0])
    assert torch.equal(first["layers"].softmax(dim=-1), torch.full((1, 4), 0.25))


def test_the_penalty_of_proto_is_the_mean_squared_deviation_from_orthogonality() -> None:
    shape = ProbeShape(DIM, 3)
    probe = build_probe("proto", shape, {"n_prototypes_per_class": 4, "orthogonality": 0.5})
    stacked = weights(probe, "proto")
    found = probe.penalty(stacked)
    assert found is not None
    for trial in range(2):
        deviations = []
        for one in stacked["prototypes"][trial]:
            unit = one / (torch.sqrt((one**2).sum(dim=1, keepdim=True) + 1e-4) + 1e-4)
            deviations.append((unit @ unit.T - torch.eye(4, dtype=torch.float64)) ** 2)
        torch.testing.assert_close(found[trial], 0.5 * torch.stack(deviations).mean())
    assert build_probe("proto", shape, {"orthogonality": 0}).penalty(stacked) is None


def test_training_pulls_prototypes_apart_and_reports_the_loss_without_the_penalty() -> None:
    shape, seen = ProbeShape(DIM, 3, 1), layers(n_layers=1)
    targets = torch.eye(4, 3, dtype=torch.float64)
    penalties = {}
    for orthogonality in (0.0, 1.0):
        probe = build_probe(
            "proto", shape, {"n_prototypes_per_class": 4, "orthogonality": orthogonality}
        )
        stack = TrialStack("proto", probe, [Trial(2e-2, 0.0, 0)], dtype=torch.float64)
        expected = asymmetric(stack.logits(seen), targets)
        losses = stack.step(seen, targets, asymmetric, factor=1.0)
        torch.testing.assert_close(losses, expected)
        for _ in range(60):
            stack.step(seen, targets, asymmetric, factor=1.0)
        judge = build_probe("proto", shape, {"n_prototypes_per_class": 4}).penalty(stack.weights)
        assert judge is not None
        penalties[orthogonality] = float(judge)
    assert penalties[1.0] < penalties[0.0] / 10


def test_negative_weights_of_proto_count_as_zero() -> None:
    probe = build_probe("proto", ProbeShape(DIM, 3, 1))
    seen, stacked = layers(n_layers=1), weights(probe, "proto")
    clamped = {**stacked, "weight": stacked["weight"].detach().clamp(min=0)}
    assert (stacked["weight"] < 0).any()
    torch.testing.assert_close(probe.logits(stacked, seen), probe.logits(clamped, seen))


def test_proto_subtracts_cls_where_there_is_one() -> None:
    assert build_probe("proto", ProbeShape(DIM, 3, 1)).options["focal"] is True
    assert build_probe("proto", ProbeShape(DIM, 3, 0)).options["focal"] is False


@MASKED
@BLOCKS
def test_matches_give_tokens_a_gradient_at_the_winners(
    masked: bool, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, scratch)
    seen = layers(n_layers=1, masked=masked)
    directions = seen.patches.clone().requires_grad_()
    prototypes = torch.randn(20, DIM, dtype=torch.float64, requires_grad=True)
    similarity = torch.matmul(directions, prototypes.T)
    never = torch.zeros(4, 7, 1).bool() if seen.counts is None else ~seen.counts[..., None]
    highest = similarity.masked_fill(never, -math.inf).max(dim=1).values
    lowest = similarity.masked_fill(never, math.inf).min(dim=1).values
    both = {"directions": directions, "prototypes": prototypes}
    best = best_match(directions, prototypes, seen.counts)
    found = torch.cat([best, *extreme_match(directions, prototypes, seen.counts)], dim=1)
    assert_same_gradients(found, torch.cat([highest, lowest, highest], dim=1), both)


@pytest.mark.parametrize("wanted", ["directions", "prototypes"])
def test_matches_compute_no_gradient_that_nobody_asked_for(wanted: str) -> None:
    arrays = {
        "directions": layers(n_layers=1).patches.clone(),
        "prototypes": torch.randn(20, DIM, dtype=torch.float64),
    }
    arrays[wanted].requires_grad_()
    for match in (best_match, lambda z, p: torch.cat(extreme_match(z, p))):
        match(arrays["directions"], arrays["prototypes"]).sum().backward()
    other = arrays["prototypes" if wanted == "directions" else "directions"]
    assert arrays[wanted].grad is not None
    assert other.grad is None


@pytest.mark.parametrize("name", ["proto", "cgp"])
def test_a_batch_of_one_trains_as_in_a_larger_one(name: str) -> None:
    options: Options = {"cgp": {"n_prototypes": 20}, "proto": {}}[name]
    probe = build_probe(name, ProbeShape(DIM, 3, 1), options)
    stacked, seen = weights(probe, name), layers(n_layers=1)
    assert seen.prefix is not None
    alone = probe.logits(stacked, Tokens(seen.patches[:1], seen.prefix[:1]))
    torch.testing.assert_close(probe.logits(stacked, seen)[:, :1], alone)
    stack = TrialStack(name, probe, [Trial(1e-2, 0.0, 0)], dtype=torch.float64)
    one = Tokens(seen.patches[:1], seen.prefix[:1])
    losses = [stack.step(one, torch.ones(1, 3).double(), asymmetric, factor=1.0) for _ in range(9)]
    assert losses[-1] < losses[0]


def test_cgp_refuses_layers_that_differ_or_are_missing() -> None:
    shape = ProbeShape(DIM, 3, 1, n_layers=2)
    probe = build_probe("cgp", shape, {"n_prototypes": 5})
    stacked = weights(probe, "cgp")
    with pytest.raises(TrialError, match="found 3 layers in the batch, expected the 2 that"):
        probe.logits(stacked, layers(n_layers=3))
    short = Tokens(layers(n_layers=1).patches[:, :5], torch.zeros(4, 1, DIM).double())
    last = layers(n_layers=1)
    seen = Tokens(last.patches, last.prefix, others=[short])
    with pytest.raises(TrialError, match=r"patches \(5, 12\) in layer 1 of 2 and \(7, 12\) in the"):
        probe.logits(stacked, seen)


REFUSED: dict[str, tuple[str, Options, str]] = {
    "focal": ("proto", {"focal": True}, "found focal=True, but no prefix tokens"),
    "per class": (
        "proto",
        {"n_prototypes_per_class": 0},
        "found n_prototypes_per_class=0, expected at least 1",
    ),
    "penalty": ("proto", {"orthogonality": -1}, "found orthogonality=-1, expected at least 0"),
    "option": ("proto", {"dropout": 0.2}, "found option dropout for probe 'proto'; it has n_pro"),
    "prototypes": ("cgp", {"n_prototypes": 0}, "found n_prototypes=0, expected at least 1"),
    "dropout": ("cgp", {"dropout": 1}, "found dropout=1, expected at least 0 and below 1"),
}


@pytest.mark.parametrize(("name", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_probe_that_cannot_be_built_says_why(name: str, options: Options, message: str) -> None:
    with pytest.raises(TrialError, match=message):
        build_probe(name, ProbeShape(DIM, 3), options)
