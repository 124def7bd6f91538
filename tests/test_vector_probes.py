from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes import build_probe, conv, log_mean_exp
from patchbank.probing.probes.base import Probe, ProbeShape, Weights, n_parameters, stacked_weights
from patchbank.probing.probes.conv import ConvProbe
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.randomness import generator
from patchbank.probing.trials import Trial, TrialStack

SHAPE = ProbeShape(dim=6, n_classes=3, n_prefix=1, grid=(4, 2))
COUNTS = [8, 1, 5, 2]


def tokens(n_patches: list[int] | None = None) -> Tokens:
    random = torch.Generator().manual_seed(0)
    patches = torch.randn(4, 8, 6, generator=random, dtype=torch.float64)
    for clip, n_counted in enumerate(n_patches or []):
        patches[clip, n_counted:] = 100.0
    prefix = torch.randn(4, 1, 6, generator=random, dtype=torch.float64)
    return Tokens(patches, prefix, None if n_patches is None else torch.tensor(n_patches))


def weights(probe: Probe, n_trials: int = 3) -> Weights:
    first = stacked_weights(probe, "test", list(range(n_trials)))
    return {key: value.double().requires_grad_() for key, value in first.items()}


def counted(seen: Tokens, clip: int) -> torch.Tensor:
    n_counted = seen.shape[1] if seen.n_patches is None else int(seen.n_patches[clip])
    return seen.patches[clip, :n_counted]


def mean(seen: Tokens) -> torch.Tensor:
    return torch.stack([counted(seen, clip).mean(dim=0) for clip in range(len(seen))])


def plain_mlp(probe: Probe, one: Weights, seen: Tokens) -> torch.Tensor:
    vector = mean(seen) if probe.options["vector"] == "mean" else seen.cls
    inner = F.gelu(vector @ one["hidden"].T + one["hidden_bias"])
    return inner @ one["weight"].T + one["bias"]


def plain_concatenation(probe: Probe, one: Weights, seen: Tokens) -> torch.Tensor:
    if probe.options["variant"] == "cls-mean":
        vectors = torch.cat([seen.cls, mean(seen)], dim=1)
    else:
        rows = [[counted(seen, clip)[freq::2] for freq in range(2)] for clip in range(len(seen))]
        vectors = torch.stack(
            [
                torch.cat([row.mean(dim=0) if len(row) else torch.zeros(6).double() for row in own])
                for own in rows
            ]
        )
    return vectors @ one["weight"].T + one["bias"]


def plain_linpre(probe: Probe, one: Weights, seen: Tokens) -> torch.Tensor:
    pool: Callable[[torch.Tensor], torch.Tensor] = {
        "max": lambda logits: logits.max(dim=0).values,
        "mean": lambda logits: logits.mean(dim=0),
        "lse": lambda logits: logits.exp().mean(dim=0).log(),
    }[probe.options["pooling"]]
    return torch.stack(
        [pool(counted(seen, clip) @ one["weight"].T + one["bias"]) for clip in range(len(seen))]
    )


def plain_conv(probe: Probe, one: Weights, seen: Tokens) -> torch.Tensor:
    """The convolution as a sum over offsets, patch by patch."""
    kernel = one["kernel"]
    n_freq = 1 if probe.shape.grid is None else probe.shape.grid[1]
    middle = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    features = []
    for clip in range(len(seen)):
        own, outputs = counted(seen, clip), []
        for place in range(len(own)):
            total = one["kernel_bias"]
            for step in range(kernel.shape[2]):
                for row in range(kernel.shape[3]):
                    t = place // n_freq + step - middle[0]
                    f = place % n_freq + row - middle[1]
                    if t >= 0 and 0 <= f < n_freq and t * n_freq + f < len(own):
                        total = total + kernel[:, :, step, row] @ own[t * n_freq + f]
            outputs.append(F.gelu(total))
        stacked = torch.stack(outputs)
        is_mean = probe.options["pooling"] == "mean"
        features.append(stacked.mean(dim=0) if is_mean else stacked.max(dim=0).values)
    return torch.stack(features) @ one["weight"].T + one["bias"]


PLAIN: dict[str, Callable[[Probe, Weights, Tokens], torch.Tensor]] = {
    "mlp": plain_mlp,
    "linearc": plain_concatenation,
    "linpre": plain_linpre,
    "conv": plain_conv,
}
NO_GRID = ProbeShape(dim=6, n_classes=3)
CASES: dict[str, tuple[str, ProbeShape, dict[str, Any]]] = {
    "mlp": ("mlp", SHAPE, {}),
    "mlp on CLS": ("mlp", SHAPE, {"vector": "cls", "hidden": 5}),
    "linearc on CLS and mean": ("linearc", SHAPE, {}),
    "linearc on time means": ("linearc", SHAPE, {"variant": "time-mean"}),
    "linpre max": ("linpre", SHAPE, {}),
    "linpre mean": ("linpre", SHAPE, {"pooling": "mean"}),
    "linpre lse": ("linpre", SHAPE, {"pooling": "lse"}),
    "conv mean": ("conv", SHAPE, {"channels": 4}),
    "conv max": ("conv", SHAPE, {"channels": 4, "pooling": "max"}),
    "conv of five": ("conv", SHAPE, {"channels": 2, "kernel": 5}),
    "conv without a grid": ("conv", NO_GRID, {"channels": 4}),
}


@pytest.mark.parametrize(("name", "shape", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("n_patches", [None, COUNTS], ids=["all count", "some count"])
@pytest.mark.parametrize("is_cut", [False, True], ids=["one block", "many blocks"])
def test_a_probe_equals_its_formula_with_gradients_of_every_trial(
    name: str,
    shape: ProbeShape,
    options: dict[str, Any],
    n_patches: list[int] | None,
    is_cut: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_cut:
        monkeypatch.setattr(log_mean_exp, "PROTOTYPE_BLOCK", 4)
        monkeypatch.setattr(log_mean_exp, "CPU_SCRATCH", 70)
        monkeypatch.setattr(conv, "CPU_ACTIVATIONS", 70)
    probe, seen = build_probe(name, shape, options), tokens(n_patches)
    stacked = weights(probe)
    found = probe.logits(stacked, seen)
    trials = [{key: value[trial] for key, value in stacked.items()} for trial in range(3)]
    plain = torch.stack([PLAIN[name](probe, one, seen) for one in trials])
    torch.testing.assert_close(found, plain)
    direction = torch.randn(plain.shape, dtype=torch.float64)
    values = list(stacked.values())
    for one, other in zip(
        torch.autograd.grad(found, values, direction),
        torch.autograd.grad(plain, values, direction),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(probe.logits(stacked, seen), plain)


AS20K, FSD50K, URBAN = 527, 200, 10
PARAMETERS: dict[str, tuple[str, int, dict[str, Any], int]] = {
    # H D + H + C H + C
    "mlp as20k": ("mlp", AS20K, {}, 995_855),
    "mlp of 256 fsd50k": ("mlp", FSD50K, {"hidden": 256}, 248_264),
    # C (2 D) + C and C (F D) + C with F = 8
    "linearc as20k": ("linearc", AS20K, {}, 809_999),
    "linearc time urban": ("linearc", URBAN, {"variant": "time-mean"}, 61_450),
    # C D + C, as linear
    "linpre as20k": ("linpre", AS20K, {}, 405_263),
    "linpre lse urban": ("linpre", URBAN, {"pooling": "lse"}, 7_690),
    # K D 9 + K + C K + C with K = 256
    "conv as20k": ("conv", AS20K, {}, 1_905_167),
    "conv of 64 urban": ("conv", URBAN, {"channels": 64, "kernel": 1}, 49_866),
}


@pytest.mark.parametrize(
    ("name", "n_classes", "options", "expected"), PARAMETERS.values(), ids=PARAMETERS
)
def test_parameters_are_as_many_as_the_formula_says(
    name: str, n_classes: int, options: dict[str, Any], expected: int
) -> None:
    shape = ProbeShape(768, n_classes, n_prefix=1, grid=(64, 8))
    assert n_parameters(build_probe(name, shape, options)) == expected


def test_a_convolution_without_frequency_rows_runs_along_time_only() -> None:
    for grid in (None, (50, 1)):
        probe = build_probe("conv", ProbeShape(6, 3, grid=grid), {"channels": 2})
        assert weights(probe)["kernel"].shape == (3, 2, 6, 3, 1)


def test_linearc_takes_time_means_where_there_is_no_cls() -> None:
    without = ProbeShape(6, 3, grid=(4, 2))
    assert build_probe("linearc", without).options == {"variant": "time-mean"}
    assert build_probe("linearc", SHAPE).options == {"variant": "cls-mean"}


def test_linpre_by_mean_is_linear() -> None:
    probe, seen = build_probe("linpre", SHAPE, {"pooling": "mean"}), tokens(COUNTS)
    stacked = weights(probe)
    assert torch.equal(
        probe.logits(stacked, seen), build_probe("linear", SHAPE).logits(stacked, seen)
    )


def kept_for_backward(probe: Probe, seen: Tokens, stacked: Weights) -> int:
    """Values of the largest tensor that autograd keeps."""
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        probe.logits(stacked, seen)
    return max(sizes)


@pytest.mark.parametrize(
    ("name", "n_classes", "options"),
    [
        ("conv", 3, {"channels": 64, "pooling": "mean"}),
        ("conv", 3, {"channels": 64, "pooling": "max"}),
        ("linpre", 64, {"pooling": "max"}),
        ("linpre", 64, {"pooling": "lse"}),
    ],
)
def test_nothing_of_trials_by_clips_by_patches_by_features_is_kept(
    name: str, n_classes: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "CPU_ACTIVATIONS", 2000)
    shape = ProbeShape(dim=2, n_classes=n_classes)
    probe, seen = build_probe(name, shape, options), Tokens(torch.randn(8, 20, 2))
    stacked = {key: value.float().detach() for key, value in weights(probe).items()}
    leaves = {key: value.requires_grad_() for key, value in stacked.items()}
    n_trials, n_clips, n_features = 3, 8, 64
    assert kept_for_backward(probe, seen, leaves) <= n_trials * n_clips * n_features


def test_a_convolution_that_fits_is_not_computed_twice() -> None:
    probe, seen = build_probe("conv", SHAPE, {"channels": 4}), tokens()
    assert kept_for_backward(probe, seen, weights(probe)) >= 3 * 4 * 8 * 4


def test_dropout_of_the_hidden_layer_is_active_only_with_generators() -> None:
    probe, seen = build_probe("mlp", SHAPE, {"dropout": 0.5, "hidden": 40}), tokens()
    stacked = weights(probe)
    quiet = probe.logits(stacked, seen)
    random = [generator("test", trial) for trial in range(3)]
    noisy = torch.stack([probe.logits(stacked, seen, dropout=random) for _ in range(600)])
    assert not torch.equal(noisy[0], noisy[1])
    torch.testing.assert_close(noisy.mean(dim=0), quiet, atol=0.05, rtol=0)


BARE = ProbeShape(6, 3)
REFUSED: dict[str, tuple[str, ProbeShape, dict[str, Any], str]] = {
    "hidden": ("mlp", BARE, {"hidden": 0}, "found hidden=0, expected at least 1"),
    "vector": ("mlp", BARE, {"vector": "max"}, "found vector='max', expected mean or cls"),
    "dropout": ("mlp", BARE, {"dropout": 1.0}, "found dropout=1.0, expected at least 0 and below"),
    "mlp without CLS": ("mlp", BARE, {"vector": "cls"}, "'mlp' with vector=cls needs a CLS token"),
    "variant": ("linearc", SHAPE, {"variant": "x"}, "found variant='x', expected cls-mean or time"),
    "linearc without CLS": (
        "linearc",
        BARE,
        {"variant": "cls-mean"},
        "'linearc' with variant=cls-mean needs a CLS token, .* use variant=time-mean",
    ),
    "neither": (
        "linearc",
        BARE,
        {},
        r"variant=time-mean needs the \(time, freq\) grid .* use --probe linear",
    ),
    "no grid": (
        "linearc",
        ProbeShape(6, 3, 1),
        {"variant": "time-mean"},
        "needs the .* grid of the patches, found none; use variant=cls-mean",
    ),
    "linpre pooling": (
        "linpre",
        BARE,
        {"pooling": "sum"},
        "found pooling='sum', expected max or mean or lse",
    ),
    "conv pooling": ("conv", BARE, {"pooling": "lse"}, "found pooling='lse', expected mean or max"),
    "channels": ("conv", BARE, {"channels": 0}, "found channels=0, expected at least 1"),
    "kernel": ("conv", BARE, {"kernel": 4}, "found kernel=4, expected an odd number of patches"),
}


@pytest.mark.parametrize(("name", "shape", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_probe_that_cannot_be_built_says_why(
    name: str, shape: ProbeShape, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrialError, match=message):
        build_probe(name, shape, options)


def test_tokens_of_another_grid_are_refused() -> None:
    probe = build_probe("conv", ProbeShape(6, 3, grid=(4, 3)))
    assert isinstance(probe, ConvProbe)
    with pytest.raises(TrialError, match="found 8 patches in a clip, expected a multiple"):
        probe.logits(weights(probe), tokens())


@pytest.mark.parametrize(("channels", "size"), [(256, 1), (100, 2), (8, 32)])
def test_so_many_trials_of_conv_go_together_as_make_one_wide_product(
    channels: int, size: int
) -> None:
    probe = build_probe("conv", SHAPE, {"channels": channels})
    stack = TrialStack("conv", probe, [Trial(1e-3, 0.0, seed) for seed in range(3)])
    assert stack.parts[0] == slice(0, min(3, size))
