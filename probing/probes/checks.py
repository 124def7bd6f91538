"""The checks of the probe contract, in the order in which they make sense."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchbank.pipeline.errors import TrialError
from patchbank.probing.probes.base import Probe, Weights, n_parameters
from patchbank.probing.probes.bench import (
    N_CLIPS,
    N_TRIALS,
    Bench,
    Broken,
    largest_error,
    within,
)
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.probes.training_checks import check_learning, check_trials
from patchbank.probing.randomness import generator


@dataclass(frozen=True)
class Check:
    """One promise, and how it is tried."""

    name: str
    promise: str
    run: Callable[[Bench], str]
    """Says what it found; raises `Broken` or `NotAsked`."""
    needs: tuple[str, ...] = ()
    """Checks without which this one says nothing."""


def check_build(bench: Bench) -> str:
    """Whether a probe can be made, and says between which learning rates to look."""
    probe: object = bench.probe
    if not isinstance(probe, Probe):
        raise Broken(type(probe).__name__, expected="a torch.nn.Module or a Probe")
    low, high = probe.learning_rates
    if not 0 < low <= high < float("inf"):
        raise Broken(
            f"learning_rates are {(low, high)}", expected="the lowest and the highest worth trying"
        )
    note = f"; {probe.note}" if probe.note else ""
    return f"{n_parameters(probe):,} parameters{note}"


def check_options(bench: Bench) -> str:
    """Whether a probe can be made again from its own options, and refuses what it does not know."""
    stated = bench.probe.options
    try:
        kept = json.loads(json.dumps(stated))
    except (TypeError, ValueError) as error:
        raise Broken(f"options are no JSON: {error}", expected="numbers, text, lists") from error
    if kept != stated:
        raise Broken(
            f"options {stated} become {kept}", expected="equal after JSON", hint="no tuples"
        )
    again = bench.built(kept)
    if again.options != stated or _sizes(again) != _sizes(bench.probe):
        raise Broken(
            f"built with {stated}, it has options {again.options} and arrays {_sizes(again)}",
            expected=f"the same probe: arrays {_sizes(bench.probe)}",
        )
    try:
        bench.built({"no_such_option": 1})
    except TrialError:
        return ", ".join(f"{key} = {value}" for key, value in stated.items()) or "none"
    raise Broken(
        "an option 'no_such_option' is taken",
        expected="TrialError",
        hint="check_options(name, options, (its options)): a slip would train something else",
    )


def _sizes(probe: Probe) -> dict[str, list[int]]:
    first = probe.first_weights(torch.Generator())
    return {key: list(value.shape) for key, value in first.items()}


def check_weights(bench: Bench) -> str:
    """Whether first weights are those of the generator, float32, on the CPU."""
    one, same, other = (bench.probe.first_weights(generator("check", seed)) for seed in (0, 0, 1))
    if missing := sorted(set(bench.probe.buffers) - set(one)):
        raise Broken(f"no {', '.join(missing)} among the weights", expected="all of buffers")
    for key, value in one.items():
        if (value.dtype, value.device.type) != (torch.float32, "cpu"):
            raise Broken(
                f"{key}: {value.dtype} on {value.device.type}", expected="torch.float32 on cpu"
            )
        if not torch.equal(value, same[key]):
            raise Broken(
                f"{key} differs between equal generators",
                expected="equal first weights for equal seeds",
                hint="draw with generator=random, and nothing else",
            )
    if all(torch.equal(value, other[key]) for key, value in one.items()):
        return "the same for every seed"
    return f"{len(one)} arrays, of the seed alone"


def check_logits(bench: Bench) -> str:
    """Whether logits are (trial, clip, class) and finite."""
    expected = (N_TRIALS, N_CLIPS, bench.shape.n_classes)
    for when, found in _both(bench, bench.tokens(dtype=torch.float32)).items():
        if tuple(found.shape) != expected:
            raise Broken(
                f"{when}: {tuple(found.shape)}", expected=f"(trial, clip, class) = {expected}"
            )
        if n_bad := int((~torch.isfinite(found)).sum()):
            raise Broken(f"{when}: {n_bad} logits are NaN or infinite", expected="finite values")
    return f"{expected}"


def _both(bench: Bench, tokens: Tokens) -> dict[str, Tensor]:
    """Logits in training and outside."""
    training = bench.probe.logits(_leaves(bench, tokens), tokens, dropout=bench.randoms)
    quiet = bench.logits(tokens, weights=bench.weights(dtype=tokens.dtype))
    return {"in training": training.detach(), "outside training": quiet}


def _leaves(bench: Bench, tokens: Tokens) -> Weights:
    weights = bench.weights(dtype=tokens.dtype)
    for key, value in weights.items():
        value.requires_grad_(key not in bench.probe.buffers)
    return weights


def check_dtype(bench: Bench) -> str:
    """Whether logits are of the type that weights and tokens are of."""
    for dtype in (torch.float32, torch.float64):
        tokens, weights = bench.tokens(dtype=dtype), bench.weights(dtype=dtype)
        try:
            found = bench.logits(tokens, weights=weights).dtype
        except RuntimeError as error:
            raise Broken(
                f"{dtype}: {error}",
                expected=f"{dtype} logits",
                hint="tensors made in forward take the type of the tokens: torch.zeros_like",
            ) from error
        if found != dtype:
            raise Broken(f"{found} logits of {dtype}", expected=f"{dtype}")
    return "float32 and float64"


def check_input(bench: Bench) -> str:
    """Whether tokens, which all probes share, are left as they were."""
    tokens = bench.tokens(n_patches=[2, 3, 4, 5])
    _both(bench, tokens)
    fresh = bench.tokens(n_patches=[2, 3, 4, 5])
    for found, expected in zip(tokens.layers, fresh.layers, strict=True):
        for name in ("patches", "prefix", "n_patches", "counts", "mean", "directions"):
            one, other = getattr(found, name), getattr(expected, name)
            if other is not None and not torch.equal(one, other):
                raise Broken(
                    f"tokens.{name} is another one afterwards",
                    expected="as it was: other probes see the same tokens",
                    hint="x -= x.mean() changes it, x = x - x.mean() does not",
                )
    return "the tokens are as they were"


def check_mask(bench: Bench) -> str:
    """Whether patches that do not count change nothing."""
    slots = bench.tokens().shape[1]
    counts = [slots, 1, slots // 2, slots - 1]
    tokens = bench.tokens(n_patches=counts)
    noise = 100 * bench.tokens(seed=1).patches
    spoilt = _changed(
        tokens, lambda z: z if tokens.counts is None else z.where(tokens.counts[..., None], noise)
    )
    return within(
        largest_error(bench.logits(spoilt), bench.logits(tokens)),
        "after a change of patches that do not count",
        hint="tokens.counts is False for them; tokens.mean leaves them out",
    )


def _changed(tokens: Tokens, change: Callable[[Tensor], Tensor]) -> Tokens:
    """The same tokens with other patches, in every layer."""
    layers: list[Tokens] = []
    for one in tokens.layers:
        patches = change(one.patches)
        layers.append(Tokens(patches, one.prefix, one.n_patches, others=tuple(layers)))
    return layers[-1]


def check_one(bench: Bench) -> str:
    """Whether a batch of one clip works, in training too."""
    expected = (N_TRIALS, 1, bench.shape.n_classes)
    for when, found in _both(bench, bench.tokens(n_clips=1)).items():
        if tuple(found.shape) != expected or not bool(torch.isfinite(found).all()):
            raise Broken(
                f"{when}: {tuple(found.shape)}, {int(torch.isfinite(found).sum())} finite",
                expected=f"{expected}, finite",
                hint="squeeze() takes the axis of clips away; a deviation needs two clips",
            )
    return "as any other"


def check_clips(bench: Bench) -> str:
    """Whether a clip's logits are the same alone and among others, outside training."""
    tokens = bench.tokens()
    together = bench.logits(tokens)
    alone = [bench.logits(_clip(tokens, index)) for index in range(N_CLIPS)]
    return within(
        largest_error(together, torch.cat(alone, dim=1)),
        "among other clips",
        hint="statistics over the batch? patches are (clip, patch, dim)",
    )


def _clip(tokens: Tokens, index: int) -> Tokens:
    part, layers = slice(index, index + 1), list[Tokens]()
    for one in tokens.layers:
        prefix = None if one.prefix is None else one.prefix[part]
        layers.append(Tokens(one.patches[part], prefix, others=tuple(layers)))
    return layers[-1]


def check_dropout(bench: Bench) -> str:
    """Whether nothing is dropped outside training."""
    tokens, weights = bench.tokens(), bench.weights()
    first = bench.logits(tokens, weights=weights)
    training = bench.probe.logits(_leaves(bench, tokens), tokens, dropout=bench.randoms).detach()
    if not torch.equal(bench.logits(tokens, weights=weights), first):
        raise Broken(
            "equal weights and tokens give other logits",
            expected="equal to the last bit outside training",
            hint="drop only where dropout is not None, or self.training is true",
        )
    return "off outside training" + ("; none in training" * torch.equal(training, first))


def check_randomness(bench: Bench) -> str:
    """Whether the global generators of torch and numpy are left alone."""
    before = _states()
    bench.built().first_weights(generator("check", 0))
    _both(bench, bench.tokens())
    changed = [name for name, state in _states().items() if state != before[name]]
    if changed:
        raise Broken(
            f"the global generator of {', '.join(changed)} was used",
            expected="only the generators that are passed",
            hint="apply_dropout, torch.randn(..., generator=random); nn.Dropout in a module",
        )
    return "no global generator is used"


def _states() -> dict[str, str]:
    arrays = np.random.get_state()  # noqa: NPY002
    return {
        "torch": str(torch.get_rng_state().tolist()),
        "numpy": str([np.asarray(part).tolist() for part in arrays]),
    }


CHECKS = (
    Check("build", "build() makes a probe", check_build),
    Check("options", "its options make it again, others are refused", check_options, ("build",)),
    Check("weights", "first weights depend on the generator only", check_weights, ("build",)),
    Check("logits", "logits are (trial, clip, class), finite", check_logits, ("weights",)),
    Check("dtype", "logits have the type of the tokens", check_dtype, ("logits",)),
    Check("input", "tokens are left alone", check_input, ("dtype",)),
    Check("mask", "patches that do not count change nothing", check_mask, ("input",)),
    Check("one", "a batch of one clip works", check_one, ("dtype",)),
    Check("clips", "a clip does not depend on its batch", check_clips, ("input", "one")),
    Check("dropout", "nothing is dropped outside training", check_dropout, ("input",)),
    Check("randomness", "global generators are left alone", check_randomness, ("dtype",)),
    Check("trials", "trials are the same together and alone", check_trials, ("input",)),
    Check("learning", "training moves every parameter", check_learning, ("input",)),
)
"""All checks; each needs only earlier ones."""
