from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from probe_weights import weights_of

from patchbank.pipeline.errors import TrialError
from patchbank.probing.batch import Batch
from patchbank.probing.probes import PROBES, best_match, build_probe
from patchbank.probing.probes.base import ProbeShape, Weights, n_parameters, stacked_weights
from patchbank.probing.probes.best_match import best_match as highest_similarity
from patchbank.probing.probes.mhca import MhcaProbe, default_heads
from patchbank.probing.probes.prototypes import PrototypeProbe, binarise
from patchbank.probing.probes.tokens import Buffers, Tokens, convert
from patchbank.probing.randomness import generator

SHAPE = ProbeShape(dim=24, n_classes=3, n_prefix=1)


def tokens(*, seed: int = 0, n_patches: list[int] | None = None) -> Tokens:
    random = torch.Generator().manual_seed(seed)
    return Tokens(
        torch.randn(4, 7, 24, generator=random, dtype=torch.float64),
        torch.randn(4, 1, 24, generator=random, dtype=torch.float64),
        None if n_patches is None else torch.tensor(n_patches),
    )


def weights(name: str, *, n_trials: int = 2) -> Weights:
    first = weights_of(build_probe(name, SHAPE), name, list(range(n_trials)))
    return {key: value.double().requires_grad_() for key, value in first.items()}


# reference/paper.md of the design: D = 768.
COUNTS = {
    "as20k": (527, 10, 405_263, 1_585_679, 6_825_177),
    "fsd50k": (200, 20, 153_800, 1_334_216, 3_872_200),
    "urban": (10, 20, 7_690, 1_188_106, 155_610),
    "esc50": (50, 20, 38_450, 1_218_866, 818_050),
}


@pytest.mark.parametrize(
    ("n_classes", "per_class", "linear", "mhca", "protobin"), COUNTS.values(), ids=COUNTS
)
def test_parameter_counts_are_the_papers(
    n_classes: int, per_class: int, linear: int, mhca: int, protobin: int
) -> None:
    shape = ProbeShape(768, n_classes)
    options = {"n_prototypes_per_class": per_class}
    assert n_parameters(build_probe("linear", shape)) == linear
    assert n_parameters(build_probe("mhca", shape)) == mhca
    assert n_parameters(build_probe("protobin", shape, options)) == protobin
    assert n_parameters(build_probe("protofloat", shape, options)) == protobin


def test_linear_is_a_linear_layer_on_the_mean_token() -> None:
    seen, stacked = tokens(), weights("linear")
    logits = build_probe("linear", SHAPE).logits(stacked, seen)
    for trial in range(2):
        vector = seen.patches.mean(dim=1)
        expected = F.linear(vector, stacked["weight"][trial], stacked["bias"][trial])
        torch.testing.assert_close(logits[trial], expected)


def test_linear_cls_is_a_linear_layer_on_the_first_prefix_token() -> None:
    seen, stacked = tokens(), weights("linear-cls")
    logits = build_probe("linear-cls", SHAPE).logits(stacked, seen)
    assert seen.prefix is not None
    expected = F.linear(seen.prefix[:, 0], stacked["weight"][1], stacked["bias"][1])
    torch.testing.assert_close(logits[1], expected)


def plain_mhca(stacked: Weights, trial: int, patches: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Attention pooling with every key and value written out."""
    n_clips, n_patches, dim = patches.shape
    keys = F.linear(patches, stacked["key"][trial])
    values = F.linear(patches, stacked["value"][trial])
    by_head = (n_clips, n_patches, n_heads, dim // n_heads)
    query = stacked["query"][trial].view(n_heads, dim // n_heads)
    scores = torch.einsum("bnhd,hd->bhn", keys.view(by_head), query) / math.sqrt(dim // n_heads)
    pooled = torch.einsum("bhn,bnhd->bhd", scores.softmax(dim=-1), values.view(by_head))
    return F.linear(pooled.flatten(1), stacked["weight"][trial], stacked["bias"][trial])


def test_folded_attention_equals_the_plain_form_with_its_gradients() -> None:
    probe, seen, stacked = build_probe("mhca", SHAPE), tokens(), weights("mhca")
    assert isinstance(probe, MhcaProbe)
    # A query of this size makes the attention far from uniform.
    stacked["query"] = torch.randn(
        2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    plain = torch.stack(
        [plain_mhca(stacked, trial, seen.patches, probe.n_heads) for trial in range(2)]
    )
    folded = probe.logits(stacked, seen)
    torch.testing.assert_close(folded, plain)
    direction = torch.randn(plain.shape, dtype=torch.float64)
    values = list(stacked.values())
    for one, other in zip(
        torch.autograd.grad(folded, values, direction),
        torch.autograd.grad(plain, values, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("dim", "n_heads"), [(768, 12), (24, 12), (384, 12), (1024, 8), (100, 10), (13, 1)]
)
def test_mhca_takes_twelve_heads_or_the_largest_number_that_divides(dim: int, n_heads: int) -> None:
    assert default_heads(dim) == n_heads
    assert build_probe("mhca", ProbeShape(dim, 2)).options == {"n_heads": n_heads}


def plain_prototypes(probe: PrototypeProbe, stacked: Weights, seen: Tokens) -> torch.Tensor:
    """Every similarity at once, differentiated by autograd."""
    latent = stacked["prototypes"]
    if probe.is_binary:
        sign = torch.where(latent >= 0, 1.0, -1.0).double()
        latent = latent + (sign - latent).detach()
    z = F.normalize(seen.patches, dim=-1)
    cosine = torch.einsum("tpd,bnd->tbnp", F.normalize(latent, dim=-1), z)
    if seen.counts is not None:
        cosine = cosine.masked_fill(~seen.counts[None, :, :, None], -math.inf)
    best = cosine.max(dim=2).values
    return best @ stacked["weight"].transpose(1, 2) + stacked["bias"][:, None]


@pytest.mark.parametrize("name", ["protobin", "protofloat"])
@pytest.mark.parametrize("n_patches", [None, [7, 1, 3, 5]], ids=["all count", "some count"])
@pytest.mark.parametrize("scratch", [2**22, 50], ids=["one block", "many blocks"])
def test_prototypes_equal_the_plain_form_with_their_gradients(
    name: str, n_patches: list[int] | None, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_match, "CPU_SCRATCH", scratch)
    monkeypatch.setattr(best_match, "PROTOTYPE_BLOCK", 1024 if scratch > 50 else 7)
    probe, seen, stacked = build_probe(name, SHAPE), tokens(n_patches=n_patches), weights(name)
    assert isinstance(probe, PrototypeProbe)
    found, plain = probe.logits(stacked, seen), plain_prototypes(probe, stacked, seen)
    torch.testing.assert_close(found, plain)
    direction = torch.randn(plain.shape, dtype=torch.float64)
    values = list(stacked.values())
    for one, other in zip(
        torch.autograd.grad(found, values, direction),
        torch.autograd.grad(plain, values, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_the_best_match_is_that_of_finite_differences() -> None:
    directions = tokens().directions
    prototypes = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: highest_similarity(directions, p), [prototypes])


def test_the_best_match_is_the_same_with_and_without_gradients() -> None:
    directions, prototypes = tokens().directions, torch.randn(5, 24, dtype=torch.float64)
    with_gradient = highest_similarity(directions, prototypes.clone().requires_grad_())
    assert torch.equal(with_gradient.detach(), highest_similarity(directions, prototypes))


def test_the_sign_of_zero_is_plus_one_and_gradients_pass_unclipped() -> None:
    latent = torch.tensor([0.0, -0.0, 5.0, -3.0], requires_grad=True)
    sign = binarise(latent)
    assert sign.tolist() == [1, 1, 1, -1]
    sign.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert latent.grad is not None
    assert latent.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("name", PROBES)
def test_patches_that_do_not_count_change_nothing(name: str) -> None:
    whole, stacked = tokens(), weights(name)
    counts = [7, 1, 3, 5]
    spoilt = whole.patches.clone()
    for clip, n_patches in enumerate(counts):
        spoilt[clip, n_patches:] = 100.0
    masked = Tokens(spoilt, whole.prefix, torch.tensor(counts))
    logits = build_probe(name, SHAPE).logits(stacked, masked)
    for clip, n_patches in enumerate(counts):
        assert whole.prefix is not None
        cut = Tokens(whole.patches[clip : clip + 1, :n_patches], whole.prefix[clip : clip + 1])
        alone = build_probe(name, SHAPE).logits(stacked, cut)
        torch.testing.assert_close(logits[:, clip], alone[:, 0])


@pytest.mark.parametrize("name", [name for name in PROBES if name != "knn"])
def test_first_weights_depend_on_family_and_seed_only(name: str) -> None:
    probe = build_probe(name, SHAPE)
    together, alone = stacked_weights(probe, name, [5, 3]), stacked_weights(probe, name, [3])
    for key in together:
        assert torch.equal(together[key][1], alone[key][0])
    assert any(not torch.equal(value[0], value[1]) for value in together.values())


USING_PREFIX = {
    **{name: {} for name in PROBES},
    "mlp on CLS": {"vector": "cls"},
    "knn on CLS": {"vector": "cls"},
    "proto as it is": {"focal": False},
    "linearc over time": {"variant": "time-mean"},
}


@pytest.mark.parametrize(("name", "options"), USING_PREFIX.items(), ids=USING_PREFIX)
def test_a_probe_says_whether_prefix_tokens_matter(name: str, options: dict[str, Any]) -> None:
    family, seen = name.split()[0], tokens()
    probe = build_probe(family, replace(SHAPE, grid=(7, 1)), options)
    stacked = {key: value.double() for key, value in weights_of(probe, family).items()}
    assert seen.prefix is not None
    other = Tokens(seen.patches, seen.prefix.flip(0))
    is_same = torch.equal(probe.logits(stacked, seen), probe.logits(stacked, other))
    assert is_same != probe.uses_prefix


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_built_with_its_own_options_is_the_same(name: str) -> None:
    probe = build_probe(name, SHAPE)
    assert build_probe(name, SHAPE, probe.options) == probe


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_states_its_formula_and_source(name: str) -> None:
    text = PROBES[name].__doc__ or ""
    assert "logits = " in text
    assert "arXiv" in text


@pytest.mark.parametrize("name", ["protobin", "protofloat"])
def test_dropout_is_active_only_with_generators_and_keeps_the_mean(name: str) -> None:
    probe, seen, stacked = build_probe(name, SHAPE, {"dropout": 0.5}), tokens(), weights(name)
    quiet = probe.logits(stacked, seen)
    assert torch.equal(quiet, probe.logits(stacked, seen))
    random = [generator("test", trial) for trial in range(2)]
    noisy = torch.stack([probe.logits(stacked, seen, dropout=random) for _ in range(600)])
    assert not torch.equal(noisy[0], noisy[1])
    torch.testing.assert_close(noisy.mean(dim=0), quiet, atol=0.05, rtol=0)


def test_prototypes_see_directions_only_and_no_cls() -> None:
    seen, stacked = tokens(), weights("protobin")
    assert seen.prefix is not None
    other = Tokens(seen.patches * 7, seen.prefix + 1)
    probe = build_probe("protobin", SHAPE)
    torch.testing.assert_close(probe.logits(stacked, seen), probe.logits(stacked, other))


def test_float16_tokens_are_converted_once_into_reused_memory() -> None:
    patches = torch.randn(4, 7, 24).half()
    buffers = Buffers()
    batch = Batch.of(np.arange(4), patches)
    device = torch.device("cpu")
    first = convert(batch, dtype=torch.float32, device=device, buffers=buffers)
    assert torch.equal(first.patches, patches.float())
    short = Batch.of(np.arange(2), patches[:2])
    second = convert(short, dtype=torch.float32, device=device, buffers=buffers)
    assert torch.equal(second.patches, patches[:2].float())
    assert second.patches.data_ptr() == first.patches.data_ptr()


def test_a_patch_of_zeros_has_no_direction_but_breaks_nothing() -> None:
    directions = Tokens(torch.zeros(1, 2, 3)).directions
    assert torch.equal(directions, torch.zeros(1, 2, 3))


@pytest.mark.parametrize("counts", [[0, 3], [1, 8]], ids=["none", "too many"])
def test_impossible_patch_counts_are_refused(counts: list[int]) -> None:
    batch = Batch.of(np.arange(2), torch.ones(2, 7, 3), None, torch.tensor(counts))
    message = f"found n_patches from {counts[0]} to {counts[1]}, expected 1 to 7 in every clip"
    with pytest.raises(TrialError, match=message):
        convert(batch, dtype=torch.float32, device=torch.device("cpu"), buffers=Buffers())


REFUSED = {
    "unknown": ("protobn", {}, "found probe 'protobn', expected one of .*; did you mean 'protobi"),
    "no CLS": ("linear-cls", {}, "'linear-cls' needs a CLS token, .*; use --probe linear"),
    "unknown option": ("mhca", {"heads": 3}, "found option heads for probe 'mhca'; it has n_heads"),
    "option of none": (
        "linear",
        {"bias": 0},
        "bias for probe 'linear'; it has layer_norm, dropout",
    ),
    "heads": ("mhca", {"n_heads": 5}, "found n_heads=5, expected a divisor of dim=24"),
    "dropout": ("protobin", {"dropout": 1}, "found dropout=1, expected at least 0 and below 1"),
    "prototypes": (
        "protobin",
        {"n_prototypes_per_class": 0},
        "found n_prototypes_per_class=0, expected at least 1",
    ),
}


@pytest.mark.parametrize(("name", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_probe_that_cannot_be_built_says_why(
    name: str, options: dict[str, float], message: str
) -> None:
    with pytest.raises(TrialError, match=message):
        build_probe(name, ProbeShape(24, 3), options)


def test_cls_that_a_batch_lacks_is_named() -> None:
    probe = build_probe("linear-cls", SHAPE)
    with pytest.raises(TrialError, match="found no prefix tokens in the batch"):
        probe.logits(weights("linear-cls"), Tokens(tokens().patches))
