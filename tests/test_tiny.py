"""The bundled encoder, its untrained twin, the log-mel baseline and the training command."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.encoders.base import Encoder
from patchbank.pipeline.encoders.logmel import LogMelSettings
from patchbank.pipeline.encoders.tiny import TinyConfig, sine_positions
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.pretrain import PretrainSettings, contrast, learning_rate, main, make_view
from patchbank.pipeline.scenes import make_clip
from patchbank.pipeline.specs import Grid

GOLDEN = Path(__file__).parent / "goldens" / "tiny.npz"
SHORTEST = 512 + 15 * 160
"""Samples in the 16 frames of one patch."""


def waveforms(n_clips: int, n_samples: int = 80_000) -> torch.Tensor:
    clips = [make_clip(9, "test", index).waveform[:n_samples] for index in range(n_clips)]
    return torch.from_numpy(np.stack(clips))


def last_patches(encoder: Encoder, waveform: torch.Tensor) -> torch.Tensor:
    tokens = encoder.encode(encoder.frontend(waveform))
    return tokens[max(tokens)].patches


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return load_encoder("tiny")


@pytest.fixture(scope="module")
def encoders(tiny: Encoder) -> dict[str, Encoder]:
    return {
        "tiny": tiny,
        "tiny-random": load_encoder("tiny-random"),
        "logmel": load_encoder("logmel"),
    }


@pytest.fixture(params=["tiny", "tiny-random", "logmel"])
def encoder(request: pytest.FixtureRequest, encoders: dict[str, Encoder]) -> Encoder:
    return encoders[request.param]


# What every encoder promises.


@pytest.mark.parametrize("n_samples", [SHORTEST, SHORTEST + 2559, SHORTEST + 2560, 16_000, 80_001])
def test_tokens_have_the_shapes_that_the_spec_and_the_grids_announce(
    encoder: Encoder, n_samples: int
) -> None:
    tokens = encoder.encode(encoder.frontend(torch.zeros(2, n_samples)))
    grids = encoder.grids(n_samples)
    assert set(tokens) == set(grids) == {spec.layer for spec in encoder.spec.layers}
    for layer, found in tokens.items():
        spec = encoder.spec.layer(layer)
        assert found.grid == grids[layer]
        assert found.patches.shape == (2, found.grid.n_patches, spec.dim)
        assert (0 if found.prefix is None else found.prefix.shape[1]) == spec.n_prefix


def test_a_clip_does_not_depend_on_its_batch(encoder: Encoder) -> None:
    batch = waveforms(3)
    together = last_patches(encoder, batch)
    for index in range(3):
        alone = last_patches(encoder, batch[index : index + 1])
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-4)


def test_only_the_asked_layers_come_back(tiny: Encoder) -> None:
    features = tiny.frontend(waveforms(1, 16_000))
    assert set(tiny.encode(features, [2])) == {2}


def test_loading_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    load_encoder("tiny")
    load_encoder("tiny-random")
    assert torch.equal(before, torch.get_rng_state())


# tiny


def test_five_seconds_make_31_by_4_tokens_and_one_cls(tiny: Encoder) -> None:
    assert set(tiny.grids(80_000).values()) == {Grid(31, 4)}
    assert tiny.spec.layers[-1].meaning == "after the final norm"
    assert {spec.n_prefix for spec in tiny.spec.layers} == {1}


def test_a_clip_shorter_than_a_patch_is_refused_with_the_length_it_needs(tiny: Encoder) -> None:
    expected = f"needs at least {SHORTEST} samples, found {SHORTEST - 1}"
    with pytest.raises(EncoderError, match=expected):
        tiny.grids(SHORTEST - 1)
    with pytest.raises(EncoderError, match=expected):
        tiny.frontend(torch.zeros(1, SHORTEST - 1))


@pytest.mark.parametrize(("hz", "band"), [(500.0, 0), (6_000.0, 3)])
def test_tokens_are_time_major(tiny: Encoder, hz: float, band: int) -> None:
    time_s = torch.arange(80_000) / 16_000
    tone = 0.3 * torch.sin(2 * torch.pi * hz * time_s) * ((time_s > 2.78) & (time_s < 2.82))
    features = tiny.frontend(torch.stack([torch.zeros(80_000), tone]))
    first = tiny.encode(features, [1])[1]
    change = (first.patches[1] - first.patches[0]).norm(dim=-1)
    step = 280 // 16
    assert int(change.argmax()) == step * first.grid.freq + band


def test_the_bundled_weights_are_the_ones_that_the_recipe_names(tiny: Encoder) -> None:
    folder = resources.files("patchbank.data").joinpath("tiny")
    content = folder.joinpath("encoder.safetensors").read_bytes()
    card = json.loads(folder.joinpath("encoder.json").read_text(encoding="utf-8"))
    sha256 = hashlib.sha256(content).hexdigest()
    assert card["sha256"] == sha256 == tiny.spec.weights_sha256
    assert sha256 in folder.joinpath("README.md").read_text(encoding="utf-8")
    assert card["config"] == asdict(TinyConfig())
    assert card["frontend"] == asdict(LogMelSettings())
    assert card["recipe"] == asdict(PretrainSettings())
    assert card["licence"] == tiny.spec.licence == "Apache-2.0"
    assert len(content) <= 4_000_000


def test_tiny_loads_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert load_encoder("tiny").spec.name == "tiny"


def test_bundled_tokens_are_what_they_were(tiny: Encoder) -> None:
    golden = np.load(GOLDEN)
    tokens = tiny.encode(tiny.frontend(torch.from_numpy(golden["waveform"])[None]))
    for layer, found in tokens.items():
        for name, value in (("patches", found.patches), ("prefix", found.prefix)):
            assert value is not None
            expected = golden[f"{name}_{layer}"]
            np.testing.assert_allclose(value[0].numpy(), expected, rtol=2e-3, atol=5e-3)


def test_a_file_of_weights_replaces_the_bundled_ones(tiny: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    bundled = resources.files("patchbank.data").joinpath("tiny/encoder.safetensors")
    path.write_bytes(bundled.read_bytes())
    assert load_encoder("tiny", weights=path).spec == tiny.spec


def test_a_file_that_holds_no_weights_is_refused_with_the_command_that_makes_them(
    tmp_path: Path,
) -> None:
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(EncoderError, match=r"wrong\.safetensors .*patchbank\.pipeline\.pretrain"):
        load_encoder("tiny", weights=path)


def test_positions_tell_all_patches_apart() -> None:
    positions = sine_positions(Grid(40, 4), 128)
    apart = torch.cdist(positions, positions) + 10 * torch.eye(160)
    assert apart.min() > 0.1


# tiny-random


def test_the_random_twin_is_the_same_every_time_and_named_by_its_weights() -> None:
    first, second = load_encoder("tiny-random"), load_encoder("tiny-random")
    assert first.spec == second.spec
    assert len(first.spec.weights_sha256) == 64
    batch = waveforms(1)
    assert torch.equal(last_patches(first, batch), last_patches(second, batch))


def test_the_random_twin_shares_all_but_its_weights_with_tiny(encoders: dict[str, Encoder]) -> None:
    trained, random = encoders["tiny"].spec, encoders["tiny-random"].spec
    assert trained.weights_sha256 != random.weights_sha256
    assert (trained.config, trained.frontend) == (random.config, random.frontend)
    assert trained.layers == random.layers


@pytest.mark.parametrize("name", ["tiny-random", "logmel"])
def test_encoders_without_weights_refuse_a_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    path.write_bytes(b"")
    with pytest.raises(EncoderError, match="leave --weights out"):
        load_encoder(name, weights=path)


# logmel


def test_logmel_is_mean_and_deviation_of_the_log_mel_bands(encoders: dict[str, Encoder]) -> None:
    from torchaudio.functional import melscale_fbanks

    waveform = waveforms(1, 16_000)[0].double().numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)
    frames = [waveform[start : start + 512] * window for start in range(0, 16_000 - 511, 160)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    bands = melscale_fbanks(257, 50.0, 8_000.0, 64, 16_000, mel_scale="slaney").double().numpy()
    log_mel = (np.log(power @ bands + 1e-2) + 3.2) / 1.5
    expected = np.concatenate([log_mel.mean(0), log_mel.std(0)])
    found = last_patches(encoders["logmel"], waveforms(1, 16_000))[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_logmel_refuses_less_than_one_frame(encoders: dict[str, Encoder]) -> None:
    with pytest.raises(EncoderError, match="needs at least 512 samples, found 511"):
        encoders["logmel"].grids(511)


# Training


def test_training_is_repeatable_and_its_weights_load(tmp_path: Path) -> None:
    short = ["--steps", "2", "--scenes", "4", "--batch-size", "2"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        main(["--out", str(tmp_path / name), "--seed", seed, *short])
    a, b, c = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    card = json.loads((tmp_path / "a" / "encoder.json").read_text(encoding="utf-8"))
    assert card["sha256"] == hashlib.sha256(a).hexdigest()
    assert (card["recipe"]["n_steps"], card["recipe"]["seed"]) == (2, 1)
    loaded = load_encoder("tiny", weights=tmp_path / "a" / "encoder.safetensors")
    assert loaded.spec.weights_sha256 == card["sha256"]


def test_the_contrast_is_low_where_counterparts_agree_and_skips_what_is_not_asked() -> None:
    first = torch.eye(4)
    asked = torch.tensor([True, True, True, False])
    swapped = first[[0, 1, 3, 2]]
    low = contrast(first, first, is_asked=asked, temperature=0.1)
    high = contrast(first, swapped, is_asked=asked, temperature=0.1)
    assert low < 0.01 < 1.0 < high
    only_first = torch.tensor([True, False, False, False])
    assert contrast(first, swapped, is_asked=only_first, temperature=0.1) < 0.01
    assert contrast(first, swapped, is_asked=~asked & asked, temperature=0.1) == 0.0


def test_a_view_keeps_the_shape_and_differs_from_the_next(tiny: Encoder) -> None:
    settings = PretrainSettings()
    power = torch.rand(3, 50, 64, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(1)
    first, second = (make_view(power, settings, rng) for _ in range(2))
    assert first.shape == power.shape
    assert not torch.equal(first, second)


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth() -> None:
    settings = PretrainSettings(n_steps=1_000, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(step, settings) for step in range(1_000)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
