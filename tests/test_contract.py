"""The encoder contract: the shipped encoders keep it, and each broken promise is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patchbank.cli.main import main
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.encoders.base import Encoder, TokenMap
from patchbank.pipeline.encoders.checks import CHECKS
from patchbank.pipeline.encoders.contract import CheckResult, check_encoder
from patchbank.pipeline.encoders.fake import FakeEncoder
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import EncoderSpec, Grid, LayerSpec

NAMES = [check.name for check in CHECKS]


def outcomes(results: tuple[CheckResult, ...], outcome: str) -> list[str]:
    return [result.name for result in results if result.outcome == outcome]


@pytest.mark.parametrize("name", ["fake", "logmel", "tiny", "tiny-random"])
def test_the_shipped_encoders_keep_the_contract(name: str) -> None:
    results = check_encoder(lambda: load_encoder(name), reference=name)
    assert [result.name for result in results] == NAMES
    assert outcomes(results, "failed") == outcomes(results, "warning") == []
    # One token a clip has no order.
    assert outcomes(results, "skipped") == (["order"] if name == "logmel" else [])


def test_efficientat_keeps_the_contract(shared: Path) -> None:
    weights = shared / "weights/efficientat-mn04/mn04_as_mAP_432.pt"
    if not weights.is_file():
        pytest.skip(f"needs {weights}")
    results = check_encoder(
        lambda: load_encoder("efficientat", weights=weights), reference="efficientat"
    )
    assert outcomes(results, "passed") == NAMES


class Spoiled(FakeEncoder):
    """The fake encoder with one thing replaced: a method, or what becomes of the token maps."""

    def __init__(
        self,
        *,
        token_map: Callable[[TokenMap], TokenMap] | None = None,
        spec: Callable[[EncoderSpec], object] | None = None,
        **methods: Callable[..., Any],
    ) -> None:
        super().__init__(None, "cpu")
        self._spoil = token_map
        for name, method in methods.items():
            setattr(self, name, method.__get__(self))
        if spec is not None:
            self.spec = spec(self.spec)  # type: ignore[assignment]

    def encode(
        self, features: torch.Tensor, layers: Collection[int] | None = None
    ) -> dict[int, TokenMap]:
        out = super().encode(features, layers)
        return out if self._spoil is None else {k: self._spoil(m) for k, m in out.items()}


def patches(change: Callable[[torch.Tensor, Grid], torch.Tensor]) -> Callable[[TokenMap], TokenMap]:
    return lambda m: TokenMap(change(m.patches, m.grid), m.prefix, m.grid)


def by_frequency(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    return values.unflatten(1, (grid.time, grid.freq)).transpose(1, 2).flatten(1, 2)


def shuffled(values: torch.Tensor, grid: Grid) -> torch.Tensor:
    order = torch.randperm(grid.n_patches, generator=torch.Generator().manual_seed(0))
    return values[:, order]


def turned(grid: Grid) -> Grid:
    return Grid(grid.freq, grid.time)


def refuse_all(self: FakeEncoder, n_samples: int) -> dict[int, Grid]:
    raise EncoderError("fake takes 3 s")


def one_less(self: FakeEncoder, n_samples: int) -> dict[int, Grid]:
    grids = FakeEncoder.grids(self, n_samples)
    return {layer: Grid(grid.time - 1, grid.freq) for layer, grid in grids.items()}


def turned_grids(self: FakeEncoder, n_samples: int) -> dict[int, Grid]:
    return {k: turned(grid) for k, grid in FakeEncoder.grids(self, n_samples).items()}


def ordinary_error(self: FakeEncoder, n_samples: int) -> dict[int, Grid]:
    if n_samples < 3_200:
        raise ValueError("too short")
    return FakeEncoder.grids(self, n_samples)


def no_refusal(self: FakeEncoder, n_samples: int) -> dict[int, Grid]:
    time = n_samples // 1_600
    return {1: Grid(time, 2), 2: Grid(time // 2, 2)}


def nothing_of_little(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    return FakeEncoder.frontend(self, waveform) if waveform.shape[1] > 1 else waveform.new(1, 0, 4)


def needs_a_second(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    if waveform.shape[1] < 16_000:
        raise RuntimeError("too short for torch")
    return FakeEncoder.frontend(self, waveform)


def grids_of_any_length(self: FakeEncoder, n_samples: int) -> dict[int, Grid]:
    return FakeEncoder.grids(self, max(n_samples, 3_200))


def late_refusal(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    if waveform.shape[1] != 32_000:
        raise EncoderError("fake takes 2 s")
    return FakeEncoder.frontend(self, waveform)


def crash(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    raise KeyError("mel")


def by_its_peak(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    return FakeEncoder.frontend(self, waveform / waveform.abs().amax(1, keepdim=True))


def by_the_peak_of_the_batch(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    return FakeEncoder.frontend(self, waveform / waveform.abs().max().clamp(min=1e-9))


def in_place(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    waveform -= waveform.mean(1, keepdim=True)
    return FakeEncoder.frontend(self, waveform)


def with_dropout(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(FakeEncoder.frontend(self, waveform), 0.1, training=True)


def with_memory(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    before = getattr(self, "before", 0.0)
    self.before = float(waveform.std())  # type: ignore[attr-defined]
    return FakeEncoder.frontend(self, waveform) + 0.01 * before


def with_a_gradient(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = waveform.clone().requires_grad_()
        (slope,) = torch.autograd.grad(x.square().sum(), x)
    return FakeEncoder.frontend(self, slope)


def all_layers(
    self: FakeEncoder, features: torch.Tensor, layers: Collection[int] | None = None
) -> dict[int, TokenMap]:
    return FakeEncoder.encode(self, features, None)


def scaled_when_asked(
    self: FakeEncoder, features: torch.Tensor, layers: Collection[int] | None = None
) -> dict[int, TokenMap]:
    return FakeEncoder.encode(self, features if layers is None else 2 * features, layers)


def first_layer_only(
    self: FakeEncoder, features: torch.Tensor, layers: Collection[int] | None = None
) -> dict[int, TokenMap]:
    return FakeEncoder.encode(self, features, [1])


def moves_only(self: FakeEncoder, device: object) -> None:
    return None


SPOILED = {
    "tokens are no map of the clip": ("encode", {"frontend": crash}, "KeyError: 'mel'"),
    "a layer is missing": ("encode", {"encode": first_layer_only}, "layers [1]"),
    "a length that is refused": ("encode", {"grids": refuse_all}, "fake takes 3 s"),
    "a token is missing": (
        "shapes",
        {"token_map": patches(lambda values, grid: values[:, :-1])},
        "layer 1: patches (2, 39, 8)",
    ),
    "another width": (
        "shapes",
        {
            "token_map": lambda m: (
                TokenMap(m.patches[:, :, 1:], None, m.grid) if m.prefix is None else m
            )
        },
        "layer 1: patches (2, 40, 7)",
    ),
    "double precision": (
        "dtype",
        {"token_map": patches(lambda values, grid: values.double())},
        "layer 1: torch.float64",
    ),
    "no prefix": (
        "prefix",
        {"token_map": lambda m: TokenMap(m.patches, None, m.grid)},
        "layer 2: prefix None",
    ),
    "one prefix too many": (
        "prefix",
        {"token_map": lambda m: TokenMap(m.patches, m.patches[:, :2], m.grid)},
        "layer 1: prefix (1, 2, 8)",
    ),
    "another grid beforehand": ("grids", {"grids": one_less}, "gives Grid(time=19, freq=2)"),
    "NaN for silence": ("finite", {"frontend": by_its_peak}, "of silence: 320 values are NaN"),
    "dropout that is on": ("determinism", {"frontend": with_dropout}, "gives other tokens"),
    "a memory of earlier clips": ("determinism", {"frontend": with_memory}, "gives other tokens"),
    "statistics of the batch": (
        "batch",
        {"frontend": by_the_peak_of_the_batch},
        "between a quiet and a loud clip",
    ),
    "frequency before time": (
        "order",
        {"token_map": patches(by_frequency)},
        "read as f * T + t, by 1.00 and ",
    ),
    "time backwards": (
        "order",
        {"token_map": patches(lambda values, grid: values.flip(1))},
        "time runs backwards",
    ),
    "tokens in any order": ("order", {"token_map": patches(shuffled)}, "layer 1, 20 x 2"),
    "a grid that is turned": (
        "order",
        {
            "grids": turned_grids,
            "token_map": lambda m: TokenMap(m.patches, m.prefix, turned(m.grid)),
        },
        "read as t * F + f of a grid stated as (F, T)",
    ),
    "more layers than asked": ("layers", {"encode": all_layers}, "asked for layers [1], got"),
    "other tokens when asked": ("layers", {"encode": scaled_when_asked}, "layers [1] only"),
    "an error that is no EncoderError": ("lengths", {"grids": ordinary_error}, "ValueError: too"),
    "no tokens at all": (
        "lengths",
        {"grids": no_refusal, "frontend": nothing_of_little},
        "1 samples: layer 1 has 0",
    ),
    "refused after grids": (
        "lengths",
        {"frontend": late_refusal},
        "encode() does not: EncoderError: fake takes",
    ),
    "an error of torch for a short clip": (
        "lengths",
        {"frontend": needs_a_second, "grids": grids_of_any_length},
        "1 samples: grids() takes them, encode() does not: RuntimeError: too short for",
    ),
    "a waveform that changes": ("input", {"frontend": in_place}, "the waveform is another one"),
    "gradients": ("inference", {"frontend": with_a_gradient}, "RuntimeError"),
    "to that returns nothing": ("device", {"to": moves_only}, "to() returns NoneType"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_broken_promise_fails_its_check_and_no_other(what: str) -> None:
    name, spoiled, found = SPOILED[what]
    results = check_encoder(lambda: Spoiled(**spoiled), window_s=2.0)  # type: ignore[arg-type]
    assert outcomes(results, "failed") == [name]
    assert outcomes(results, "warning") == []
    result = results[NAMES.index(name)]
    assert found in result.found
    assert result.expected


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (torch.zeros(1, 4, 8), "returns a Tensor"),
        ({1: torch.zeros(1, 4, 8)}, "returns a mapping to a Tensor"),
    ],
)
def test_what_is_no_token_map_is_named(returned: object, found: str) -> None:
    results = check_encoder(lambda: Spoiled(encode=lambda *_: returned))
    assert outcomes(results, "failed") == ["encode"]
    assert found in results[NAMES.index("encode")].found


def test_a_turned_grid_is_told_how_to_turn_back() -> None:
    _, spoiled, _ = SPOILED["a grid that is turned"]
    results = check_encoder(lambda: Spoiled(**spoiled), window_s=2.0)  # type: ignore[arg-type]
    hint = results[NAMES.index("order")].hint
    assert hint == "the tokens are in order, their grid is turned: Grid(time=20, freq=2)"


def test_every_check_has_a_broken_encoder() -> None:
    elsewhere = {"spec", "licence", "range", "reload"}
    assert {name for name, _, _ in SPOILED.values()} | elsewhere == set(NAMES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": " "}, "name is ' '"),
        ({"sample_rate_hz": 0}, "sample_rate_hz is 0"),
        ({"weights_sha256": "mn04"}, "weights_sha256 is neither"),
        ({"resampler": {"name": "sox"}}, "resampler is not RESAMPLER"),
        ({"layers": ()}, "layers are numbered []"),
        ({"layers": (LayerSpec(0, "x", 8), LayerSpec(1, "x", 8))}, "numbered [0, 1]"),
        ({"layers": (LayerSpec(1, "x", 8), LayerSpec(1, "x", 8))}, "numbered [1, 1]"),
        ({"layers": (LayerSpec(1, "", 8),)}, "layer 1 does not say what it means"),
        ({"layers": (LayerSpec(1, "x", 0),)}, "layer 1 has dim 0"),
        ({"config": {"kernel": (3, 3)}}, "config.kernel become another value in JSON"),
        ({"config": {"eps": float("nan")}}, "config or frontend is no JSON"),
        ({"frontend": {"path": Path("x")}}, "config or frontend is no JSON"),
    ],
)
def test_a_spec_that_no_card_can_hold_fails_first(change: dict[str, Any], words: str) -> None:
    results = check_encoder(lambda: Spoiled(spec=lambda spec: replace(spec, **change)))
    assert outcomes(results, "failed") == ["spec"]
    assert words in results[0].found
    assert {result.found for result in results[2:]} <= {"needs spec", "needs encode"} | {
        f"needs {name}" for name in NAMES
    }
    assert outcomes(results, "skipped") == NAMES[1:]


def test_what_is_no_spec_is_named() -> None:
    results = check_encoder(lambda: Spoiled(spec=lambda spec: {"name": "fake"}))
    assert (results[0].found, results[0].expected) == ("dict", "an EncoderSpec")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("mine.py", "name is 'fake', which is a shipped encoder"),
        ("mine", "it is loaded as 'mine'"),
        ("fake", ""),
        ("", ""),
    ],
)
def test_a_name_leads_back_to_its_encoder(reference: str, words: str) -> None:
    (result, *_) = check_encoder(lambda: Spoiled(), reference=reference, window_s=1.0)
    assert (result.outcome, words in result.found) == ("failed" if words else "passed", True)


def test_weights_without_a_licence_are_a_warning() -> None:
    results = check_encoder(lambda: Spoiled(spec=lambda spec: replace(spec, licence="")))
    assert outcomes(results, "warning") == ["licence"]
    assert outcomes(results, "failed") == []


@pytest.mark.parametrize(
    ("factor", "found"), [(1e5, "layer 1 of a clip reaches"), (0.0, "is zero everywhere")]
)
def test_tokens_that_a_bank_cannot_store_are_a_warning(factor: float, found: str) -> None:
    large = patches(lambda values, grid: values * factor)
    results = check_encoder(lambda: Spoiled(token_map=large), window_s=2.0)
    assert "range" in outcomes(results, "warning")
    assert found in results[NAMES.index("range")].found


def test_weights_that_are_drawn_anew_fail_the_reload(tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / f"{index}").write_bytes(bytes([index]))
    files = iter([tmp_path / "0", tmp_path / "1"])
    results = check_encoder(lambda: load_encoder("fake", weights=next(files)), window_s=1.0)
    assert outcomes(results, "failed") == ["reload"]
    assert "differs in weights_sha256" in results[NAMES.index("reload")].found


def test_weights_that_no_spec_tells_apart_fail_the_reload(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"others")
    plain, other = load_encoder("fake"), load_encoder("fake", weights=tmp_path / "w")
    other.spec = plain.spec
    both = iter([plain, other])
    results = check_encoder(lambda: next(both), window_s=1.0)
    assert outcomes(results, "failed") == ["reload"]
    assert "after a second load()" in results[NAMES.index("reload")].found


def test_a_transposed_trained_transformer_is_found() -> None:
    encoder = load_encoder("tiny")
    encode = encoder.encode

    def transposed(features: torch.Tensor, layers: Collection[int] | None = None) -> object:
        return {k: patches(by_frequency)(m) for k, m in encode(features, layers).items()}

    def load() -> Encoder:
        encoder.encode = transposed  # type: ignore[assignment, method-assign]
        return encoder

    results = check_encoder(load)
    assert outcomes(results, "failed") == ["order"]


# The command.


def test_the_command_prints_a_line_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "fake", "--window-s", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [["passed", name] for name in NAMES]
    assert lines[-1] == "fake: keeps the contract"
    assert max(map(len, lines)) <= 80


def test_the_command_fails_with_what_was_found_and_expected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from patchbank.pipeline.encoders import fake\n"
        "def load(weights, device):\n"
        "    encoder = fake.load(weights, device)\n"
        "    encoder.spec = replace(encoder.spec, name='mine', licence='')\n"
        "    encoder.to = lambda device: None\n"
        "    return encoder\n"
    )
    line = ["check", str(tmp_path / "mine.py"), "--window-s", "1"]
    assert main(line) == 1
    said = capsys.readouterr()
    assert "FAILED   device       to() moves and returns it" in said.out
    assert "         found        to() returns NoneType" in said.out
    assert "         hint         return self" in said.out
    assert "warning  licence" in said.out
    assert "mine.py fails 1 of 18 checks: device; repair it" in said.err
    assert main([*line, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["passed"]
    assert [check["name"] for check in facts["checks"]] == NAMES
    assert facts["checks"][-1]["expected"] == "the encoder"
