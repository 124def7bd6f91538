"""The probe contract: the shipped probes keep it, and each broken promise is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_packages import write
from torch import Tensor, nn

from patchbank.cli.main import main
from patchbank.probing.probes import PROBES, find_build
from patchbank.probing.probes.base import (
    Build,
    Dropout,
    Logits,
    Options,
    Probe,
    ProbeShape,
    Weights,
    apply_dropout,
    apply_linear,
    uniform_linear,
)
from patchbank.probing.probes.checks import CHECKS
from patchbank.probing.probes.contract import CheckResult, check_probe
from patchbank.probing.probes.options import check_options
from patchbank.probing.probes.plugin_build import PluginBuild
from patchbank.probing.probes.tokens import Tokens

NAMES = [check.name for check in CHECKS]
GLOBAL_STATE = torch.Generator().manual_seed(0)


def outcomes(results: tuple[CheckResult, ...], outcome: str) -> list[str]:
    return [result.name for result in results if result.outcome == outcome]


@pytest.mark.parametrize("name", PROBES)
def test_the_shipped_probes_keep_the_contract(name: str) -> None:
    results = check_probe(PROBES[name], name=name)
    assert [result.name for result in results] == NAMES
    assert outcomes(results, "failed") == [], results


Change = Callable[..., Any]


@dataclass(frozen=True)
class Spoiled(Probe):
    """A linear probe on the mean with dropout, with some of its methods replaced."""

    rate: float = 0.2
    changes: dict[str, Change] = field(default_factory=dict, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        stated: dict[str, Any] = self.changes.get("options", lambda self: {"rate": self.rate})(self)
        return stated

    @property
    def buffers(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("seen", *self.changes.get("buffers", lambda self: ())(self))

    def first_weights(self, random: torch.Generator) -> Weights:
        weight, bias = uniform_linear(self.shape.n_classes, self.shape.dim, random)
        first: Weights = {"weight": weight, "bias": bias, "seen": torch.zeros(1)}
        return {**first, **self.changes.get("first", lambda random: {})(random)}

    def logits(self, weights: Weights, tokens: Tokens, *, dropout: Dropout | None = None) -> Logits:
        if dropout is not None:
            weights["seen"] += 1
        found: Logits = self.changes.get("logits", plain)(self, weights, tokens, dropout)
        return found


def plain(
    self: Spoiled,
    weights: Weights,
    tokens: Tokens,
    dropout: Dropout | None,
    vector: Tensor | None = None,
) -> Tensor:
    vector = tokens.mean if vector is None else vector
    features = apply_dropout(vector.expand(len(weights["bias"]), -1, -1), self.rate, dropout)
    return apply_linear(features, weights["weight"], weights["bias"])


def build_of(build: Callable[[ProbeShape, Options], object]) -> Build:
    return PluginBuild("mine", "mine.py", build)  # type: ignore[arg-type]


def spoiled(**changes: Change) -> Build:
    def build(shape: ProbeShape, options: Options) -> Probe:
        check_options("mine", options, ("rate",))
        return Spoiled(shape, **options, changes=changes)

    return build_of(build)


def on(vector: Callable[[Tokens], Tensor]) -> Build:
    """The logits of some vector of the tokens."""
    return spoiled(
        logits=lambda self, weights, tokens, dropout: plain(
            self, weights, tokens, dropout, vector(tokens)
        )
    )


def after(change: Callable[[Tensor, Dropout | None], Tensor]) -> Build:
    """The logits, changed."""
    return spoiled(
        logits=lambda self, weights, tokens, dropout: change(
            plain(self, weights, tokens, dropout), dropout
        )
    )


def module(make: Callable[[ProbeShape], nn.Module]) -> Build:
    def build(shape: ProbeShape, options: Options) -> nn.Module:
        check_options("mine", options, ())
        return make(shape)

    return build_of(build)


class Plain(nn.Module):
    def __init__(self, shape: ProbeShape) -> None:
        super().__init__()
        self.head = nn.Linear(shape.dim, shape.n_classes)

    def forward(self, tokens: Tokens) -> Tensor:
        return self.head(tokens.mean)


class Hasty(Plain):
    learning_rates = (0.1, 0.01)


class Idle(Plain):
    def __init__(self, shape: ProbeShape) -> None:
        super().__init__(shape)
        self.unused = nn.Linear(2, 2, bias=False)


class Single(Plain):
    def forward(self, tokens: Tokens) -> Tensor:
        return self.head(tokens.mean.float())


def any_options(shape: ProbeShape, options: Options) -> Probe:
    return Spoiled(shape, options.get("rate", 0.2))


def forgetful(shape: ProbeShape, options: Options) -> Probe:
    check_options("mine", options, ("rate",))
    return Spoiled(shape, 0.2 + options.get("rate", 0.0))


def crash(shape: ProbeShape, options: Options) -> Probe:
    raise KeyError("gain")


def drawn_anew(random: torch.Generator) -> Weights:
    return {"bias": torch.randn(3, generator=GLOBAL_STATE)}


def scaled_in_place(tokens: Tokens) -> Tensor:
    tokens.patches.mul_(2).div_(3)
    return tokens.patches.mean(dim=1)


def centred(tokens: Tokens) -> Tensor:
    return tokens.mean - tokens.mean.mean(dim=0)


def noisy_outside(logits: Tensor, dropout: Dropout | None) -> Tensor:
    noise = torch.randn(logits.shape, generator=GLOBAL_STATE, dtype=logits.dtype)
    return logits + (1e-12 * noise if dropout is None else 0)


def mates(logits: Tensor, dropout: Dropout | None) -> Tensor:
    return logits + 0.1 * logits.mean(dim=0, keepdim=True)


def with_numpy(logits: Tensor, dropout: Dropout | None) -> Tensor:
    np.random.rand()  # noqa: NPY002
    return logits


def with_torch(logits: Tensor, dropout: Dropout | None) -> Tensor:
    torch.rand(1)
    return logits


SPOILED: dict[str, tuple[str, Build, str]] = {
    "build raises": ("build", build_of(crash), "KeyError: 'gain'"),
    "build returns a number": ("build", build_of(lambda shape, options: 3), "returned int"),
    "rates that are turned round": ("build", module(Hasty), "learning_rates are (0.1, 0.01)"),
    "options that add up": ("options", build_of(forgetful), "it has options {'rate': 0.4}"),
    "options that are tuples": (
        "options",
        spoiled(options=lambda self: {"rate": (self.rate,)}),
        "options {'rate': (0.2,)} become {'rate': [0.2]}",
    ),
    "options that are no JSON": (
        "options",
        spoiled(options=lambda self: {"rate": self.shape}),
        "options are no JSON",
    ),
    "any option": ("options", build_of(any_options), "an option 'no_such_option' is taken"),
    "weights that are drawn anew": ("weights", spoiled(first=drawn_anew), "bias differs between"),
    "double precision": (
        "weights",
        spoiled(first=lambda random: {"bias": torch.zeros(3, dtype=torch.float64)}),
        "bias: torch.float64 on cpu",
    ),
    "a buffer that is missing": (
        "weights",
        spoiled(buffers=lambda self: ("mean",)),
        "no mean among the weights",
    ),
    "axes that are swapped": (
        "logits",
        after(lambda logits, dropout: logits.transpose(1, 2)),
        "in training: (2, 3, 4)",
    ),
    "NaN": ("logits", after(lambda logits, dropout: logits * torch.nan), "24 logits are NaN"),
    "a forward that raises": (
        "logits",
        on(lambda tokens: {}["x"]),  # type: ignore[index]
        "KeyError: 'x'",
    ),
    "one type": ("dtype", module(Single), "torch.float64: "),
    "another type": ("dtype", after(lambda logits, dropout: logits.double()), "torch.float64 lo"),
    "all patches": ("mask", on(lambda tokens: tokens.patches.mean(dim=1)), "do not count differ"),
    "a clip that is squeezed": (
        "one",
        after(lambda logits, dropout: logits.squeeze(1)),
        "in training: (2, 3), 6 finite",
    ),
    "a deviation of the batch": (
        "one",
        on(lambda tokens: tokens.mean + 0 * tokens.mean.std(dim=0)),
        "in training: (2, 1, 3), 0 finite",
    ),
    "statistics of the batch": ("clips", on(centred), "among other clips differ by"),
    "patches in place": ("input", on(scaled_in_place), "tokens.patches is another one afterwards"),
    "noise outside training": ("dropout", after(noisy_outside), "give other logits"),
    "numpy": ("randomness", after(with_numpy), "generator of numpy was used"),
    "torch": ("randomness", after(with_torch), "generator of torch was used"),
    "trials that mix": ("trials", after(mates), "after 5 steps weight of trial 0 differs by"),
    "a parameter that is idle": ("learning", module(Idle), "unused.weight has no gradient"),
}


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("what", SPOILED)
def test_a_broken_promise_fails_its_check_and_no_other(what: str) -> None:
    name, build, found = SPOILED[what]
    results = check_probe(build, name="mine")
    assert outcomes(results, "failed") == [name], results
    result = results[NAMES.index(name)]
    assert found in result.found
    assert result.expected


def test_every_check_has_a_broken_probe() -> None:
    assert {name for name, _, _ in SPOILED.values()} == set(NAMES)


@pytest.mark.parametrize("build", [spoiled(), module(Plain)], ids=["native", "module"])
def test_what_is_not_spoiled_keeps_the_contract(build: Build) -> None:
    assert outcomes(check_probe(build, name="mine"), "passed") == NAMES


def test_what_needs_a_failed_check_is_skipped() -> None:
    results = check_probe(build_of(crash), name="mine")
    assert outcomes(results, "skipped") == NAMES[1:]
    assert results[1].found == "needs build"


# The command.


@pytest.mark.parametrize("name", ["protobin", "linear-cls"])
def test_the_command_prints_a_line_a_check(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    # What does not fit the line goes on below, indented.
    checks = [line.split()[:2] for line in lines[:-1] if not line.startswith(" ")]
    assert checks == [["passed", one] for one in NAMES]
    assert lines[-1] == f"{name}: keeps the contract"
    assert max(map(len, lines)) <= 80


IDLE = """
from torch import nn

class Idle(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.head, self.unused = nn.Linear(shape.dim, shape.n_classes), nn.Linear(2, 2)

    def forward(self, tokens):
        return self.head(tokens.mean)

def build(shape, options):
    return Idle(shape, **options)
"""


def test_the_command_fails_with_what_was_found_and_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path / "mine.py", IDLE))
    assert main(["check", path]) == 1
    said = capsys.readouterr()
    assert "FAILED   learning     training moves every parameter" in said.out
    assert "         found        unused.weight, unused.bias has no gradient" in said.out
    assert "mine.py fails 1 of 13 checks: learning; repair it before you" in said.err
    assert main(["check", path, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["probe"], facts["passed"]) == (path, False)
    assert [check["name"] for check in facts["checks"]] == NAMES


def test_options_of_encoders_are_refused_for_a_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "linear", "--weights", "x.pt"]) == 2
    assert "are for encoders; linear is a probe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(shape, options): return 3", "returned int, expected a torch.nn.Module or a"),
        ("from os import getcwd as build", "failed: TypeError"),
        ("build = 3", "has no build(shape, options)"),
        ("def load(weights, device): ...\ndef build(shape, options): ...", "returned NoneType wit"),
        ("x = (", "mine.py:1: '(' was never closed"),
    ],
)
def test_a_file_is_checked_as_what_it_has(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write(tmp_path / "mine.py", text))]) == 1
    said = capsys.readouterr()
    assert message in " ".join((said.out + said.err).split())


def test_find_build_gives_the_shipped_function() -> None:
    assert find_build("linear") == ("linear", PROBES["linear"])
