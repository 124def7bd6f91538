"""EfficientAT: equal to the published code, and strict about its files.

`python tests/test_efficientat.py` writes the regression golden anew.
"""

from __future__ import annotations

import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from torch import Tensor

from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.encoders.efficientat import EfficientAT, load
from patchbank.pipeline.encoders.efficientat_network import Head, Network, stage_table
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import canonical_json

GOLDEN = Path(__file__).parent / "goldens" / "efficientat.npz"
RATE_HZ = 32_000
LAST = 17
STEP_SAMPLES = 10_240
"""One time step of the last stage: 32 frames, 320 ms."""


def uniform(key: str, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform values that depend on `key` alone, whatever torch and machine."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    return torch.from_numpy((low + (high - low) * generator.random(shape)).astype(np.float32))


def random_value(key: str, shape: tuple[int, ...]) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if len(shape) > 1:
        bound = (2 / int(np.prod(shape[1:]))) ** 0.5
        return uniform(key, shape, -bound, bound)
    scales = key.endswith(("weight", "running_var"))
    return uniform(key, shape, 0.5, 1.5) if scales else uniform(key, shape, -0.3, 0.3)


def random_state(width: float, head: Head = "mlp") -> dict[str, Tensor]:
    """A state dict in the publisher's layout with seeded weights."""
    with torch.device("meta"):
        network = Network(stage_table(width), head=head, head_dim=128, n_classes=527)
    return {key: random_value(key, tuple(v.shape)) for key, v in network.state_dict().items()}


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def noise(n_samples: int, key: str = "noise", level: float = 0.3) -> Tensor:
    return level * uniform(key, (1, n_samples), -1.0, 1.0)


def tone(frequency_hz: float, n_samples: int = RATE_HZ) -> Tensor:
    phase = 2 * np.pi * frequency_hz / RATE_HZ * np.arange(n_samples)
    return torch.from_numpy(0.5 * np.sin(phase)).float()[None]


def golden_waveform() -> Tensor:
    """One second: noise that fades over a rising tone and leaves silence at the end."""
    waveform = noise(RATE_HZ) * torch.linspace(1, 0, RATE_HZ) + 0.4 * tone(440.0)
    waveform[:, -RATE_HZ // 5 :] = 0
    return waveform


def golden_outputs(encoder: EfficientAT) -> dict[str, npt.NDArray[np.float32]]:
    features = encoder.frontend(golden_waveform())
    tokens = encoder.encode(features)
    outputs = {"log_mel": features[0], "logits": encoder.classify(features)[0]}
    outputs |= {f"patches_{k}": tokens[k].patches[0] for k in (7, 13, LAST)}
    outputs |= {f"mean_{k}": tokens[k].patches[0].mean(0) for k in tokens}
    return {name: value.numpy() for name, value in outputs.items()}


def relative_error(found: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Largest error over largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_state(0.1), tmp_path_factory.mktemp("mn") / "mn01.pt")


@pytest.fixture(scope="module")
def encoder(weights: Path) -> EfficientAT:
    return load(weights, "cpu")


class TestEquality:
    def test_published_weights_give_the_published_numbers(self, shared: Path) -> None:
        real = load(shared / "weights" / "efficientat-mn04" / "mn04_as_mAP_432.pt", "cpu")
        samples, rate_hz = soundfile.read(shared / "goldens" / "wave_32k_5s.wav", dtype="float32")
        assert rate_hz == real.spec.sample_rate_hz
        features = real.frontend(torch.from_numpy(samples)[None])
        tokens = real.encode(features, [7, 13, 17])
        with np.load(shared / "goldens" / "efficientat" / "golden.npz") as golden:
            assert relative_error(features[0], golden["mel_5s"]) <= 1e-4
            for layer, token in tokens.items():
                expected = golden[f"tokens_stage_{layer}_of_17"]
                assert relative_error(token.patches[0], expected) <= 1e-4
            assert relative_error(real.classify(features)[0], golden["logits_5s"]) <= 1e-4

    def test_seeded_weights_give_the_stored_numbers(self, encoder: EfficientAT) -> None:
        found = golden_outputs(encoder)
        with np.load(GOLDEN) as golden:
            assert set(found) == set(golden)
            for name in golden:
                assert relative_error(found[name], golden[name]) <= 1e-4, name

    @pytest.mark.parametrize(
        ("width", "n_million"),
        [(0.4, 0.983), (0.5, 1.43), (1.0, 4.88), (2.0, 17.91), (3.0, 39.09), (4.0, 68.43)],
    )
    def test_widths_have_the_published_numbers_of_parameters(
        self, width: float, n_million: float
    ) -> None:
        head_dim = round(1280 * width)
        with torch.device("meta"):
            network = Network(stage_table(width), head="mlp", head_dim=head_dim, n_classes=527)
        found = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        assert found == pytest.approx(n_million, abs=0.006)


class TestTokens:
    @pytest.mark.parametrize(("width", "dim"), [(0.1, 96), (0.4, 384), (1.0, 960)])
    def test_the_width_is_read_off_the_file(self, tmp_path: Path, width: float, dim: int) -> None:
        wide = load(save(random_state(width), tmp_path / "unnamed.bin"), "cpu")
        assert wide.spec.config["width"] == width
        tokens = wide.encode(wide.frontend(noise(RATE_HZ)))
        assert tokens[LAST].patches.shape == (1, 16, dim)
        assert [tokens[k].patches.shape[2] for k in tokens] == [s.dim for s in wide.spec.layers]

    def test_grids_are_what_encode_yields_for_any_length(self, encoder: EfficientAT) -> None:
        edges = (514, 515, 640, 641, 960, 961, 10_240, 10_241, 31_999, 32_000, 32_001, 160_000)
        for n_samples in (*edges, *range(600, 45_000, 1_777)):
            tokens = encoder.encode(encoder.frontend(noise(n_samples)))
            grids = encoder.grids(n_samples)
            assert {k: token.grid for k, token in tokens.items()} == grids
            assert all(tokens[k].patches.shape[1] == grids[k].n_patches for k in grids)
            assert list(grids) == list(range(1, LAST + 1))

    def test_a_clip_does_not_depend_on_its_batch(self, encoder: EfficientAT) -> None:
        waves = torch.cat([noise(RATE_HZ, "a", 1.0), noise(RATE_HZ, "b", 1e-3), tone(900.0)])
        together = encoder.encode(encoder.frontend(waves))
        for row in range(len(waves)):
            alone = encoder.encode(encoder.frontend(waves[row : row + 1]))
            for k in together:
                assert relative_error(together[k].patches[row], alone[k].patches[0]) <= 1e-4

    def test_a_click_moves_along_time_only(self, encoder: EfficientAT) -> None:
        def trace(click: int) -> dict[int, Tensor]:
            waveform = torch.zeros(1, 20 * STEP_SAMPLES)
            waveform[0, click : click + 320] = noise(320, "click", 1.0)[0]
            silent = encoder.encode(encoder.frontend(torch.zeros_like(waveform)))
            tokens = encoder.encode(encoder.frontend(waveform))
            return {
                k: (token.patches - silent[k].patches).abs().sum(2).view(-1, token.grid.freq)
                for k, token in tokens.items()
            }

        before, after = trace(6 * STEP_SAMPLES), trace(10 * STEP_SAMPLES)
        for layer, n_steps in {1: 64, 7: 16, 13: 8, 17: 4}.items():
            # (time, freq) energy against silence: the peak moves by whole steps of time.
            assert after[layer].sum(1).argmax() == before[layer].sum(1).argmax() + n_steps
            peak_before = before[layer][before[layer].sum(1).argmax()]
            peak_after = after[layer][after[layer].sum(1).argmax()]
            assert relative_error(peak_after, peak_before) < 0.05

    def test_the_first_patch_of_a_step_is_the_lowest_band(self, encoder: EfficientAT) -> None:
        for frequency_hz, band in ((60.0, 0), (14_500.0, 63)):
            tokens = encoder.encode(encoder.frontend(tone(frequency_hz)), [1])[1]
            silent = encoder.encode(encoder.frontend(torch.zeros(1, RATE_HZ)), [1])[1]
            energy = (tokens.patches - silent.patches).abs().sum(2)
            per_band = energy.view(-1, tokens.grid.freq).sum(0)
            assert abs(int(per_band.argmax()) - band) <= 1

    def test_stages_below_the_deepest_asked_one_are_not_computed(self, weights: Path) -> None:
        shallow = load(weights, "cpu")
        for stage in list(shallow.network.features)[7:]:
            stage.register_forward_pre_hook(lambda *_: pytest.fail("computed too deep"))
        features = shallow.frontend(noise(RATE_HZ))
        assert set(shallow.encode(features, [7, 2])) == {2, 7}
        assert shallow.encode(features, []) == {}

    def test_tokens_carry_no_gradient_and_still_train_a_probe(self, encoder: EfficientAT) -> None:
        patches = encoder.encode(encoder.frontend(noise(RATE_HZ)), [LAST])[LAST].patches
        assert not patches.requires_grad
        assert not patches.is_inference()
        probe = torch.zeros(patches.shape[2], 3, requires_grad=True)
        (gradient,) = torch.autograd.grad((patches @ probe).sum(), probe)
        assert gradient.abs().sum() > 0

    def test_the_front_end_is_float32_under_autocast(self, encoder: EfficientAT) -> None:
        waveform = noise(RATE_HZ)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = encoder.frontend(waveform)
        assert torch.equal(features, encoder.frontend(waveform))

    def test_too_short_audio_and_unknown_layers_are_refused(self, encoder: EfficientAT) -> None:
        for refuses in (encoder.grids, lambda n: encoder.frontend(noise(n))):
            with pytest.raises(EncoderError, match=r"at least 514 samples .* found 513; choose"):
                refuses(513)
        with pytest.raises(EncoderError, match=r"layers 1 to 17, found \[0, 18\]"):
            encoder.encode(encoder.frontend(noise(RATE_HZ)), [0, 3, 18])


class TestFiles:
    def test_the_spec_tells_all_that_decides_the_tokens(self, encoder: EfficientAT) -> None:
        spec = encoder.spec
        assert (spec.licence, spec.source) == ("MIT", "fschmid56/EfficientAT")
        assert (len(spec.config["stages"]), len(spec.layers)) == (LAST, LAST)
        assert spec.frontend["mel_max_hz"] == 15_000.0
        assert canonical_json(spec.identity())

    def test_one_changed_weight_changes_the_encoder_id(self, weights: Path, tmp_path: Path) -> None:
        state = random_state(0.1)
        same = load_encoder("efficientat", weights=save(state, tmp_path / "mn01.pt")).spec
        assert same.encoder_id == load(weights, "cpu").spec.encoder_id
        state["classifier.5.bias"][3] += 1e-3
        other = load(save(state, tmp_path / "mn01.pt"), "cpu").spec
        assert other.weights_sha256 != same.weights_sha256
        assert other.encoder_id != same.encoder_id

    def test_a_convolutional_head_loads_too(self, encoder: EfficientAT, tmp_path: Path) -> None:
        path = save(random_state(0.1, "convolutional"), tmp_path / "mn01_as_fc.pt")
        other = load(path, "cpu")
        features = other.frontend(noise(RATE_HZ))
        assert other.classify(features).shape == (1, 527)
        tokens, expected = (e.encode(features, [LAST])[LAST].patches for e in (other, encoder))
        assert torch.equal(tokens, expected)

    def test_half_precision_weights_compute_in_float32(self, tmp_path: Path) -> None:
        half = {
            key: v.half() if v.is_floating_point() else v for key, v in random_state(0.1).items()
        }
        encoder = load(save(half, tmp_path / "half.pt"), "cpu")
        tokens = encoder.encode(encoder.frontend(noise(RATE_HZ)), [3])
        assert tokens[3].patches.dtype == torch.float32

    @pytest.mark.parametrize("name", ["mn10_as_mels_40_mAP_453.pt", "mn10_as_hop_15_mAP_463.pt"])
    def test_a_name_that_tells_of_another_front_end_warns(self, tmp_path: Path, name: str) -> None:
        path = save(random_state(0.1), tmp_path / name)
        with pytest.warns(UserWarning, match=r"(mels_40|hop_15).*128 mel bands, hop 320"):
            load(path, "cpu")

    def test_missing_weights_are_named_with_their_publisher(self, tmp_path: Path) -> None:
        with pytest.raises(EncoderError, match=r"mn04_as_mAP_432.pt.*EfficientAT/releases.*--wei"):
            load(None, "cpu")
        with pytest.raises(EncoderError, match=r"cannot read weights .*none.pt: No such file"):
            load(tmp_path / "none.pt", "cpu")

    def test_a_file_that_does_not_fit_names_its_keys(self, tmp_path: Path) -> None:
        state = random_state(0.1)
        for key in ("0.0.weight", "0.1.weight", "0.1.bias", "0.1.running_mean"):
            del state[f"features.{key}"]
        state["fc_norm.weight"] = torch.zeros(3)
        state["classifier.2.weight"] = torch.zeros(128, 95)
        with pytest.raises(EncoderError) as caught:
            load(save(state, tmp_path / "odd.pt"), "cpu")
        message = str(caught.value)
        assert "odd.pt: does not fit an mn model of width 0.1" in message
        assert "4 missing (features.0.0.weight, features.0.1.weight, features.0.1.bias" in message
        assert "1 unexpected (fc_norm.weight)" in message
        assert "1 mis-shaped (classifier.2.weight (128, 95) for (128, 96))" in message

    @pytest.mark.parametrize(
        ("content", "found"),
        [({"model": {}, "cfg": {}}, "2 unexpected (model, cfg)"), ([1, 2], "holds a list")],
    )
    def test_another_model_s_file_is_refused(
        self, tmp_path: Path, content: object, found: str
    ) -> None:
        with pytest.raises(EncoderError) as caught:
            load(save(content, tmp_path / "other.pt"), "cpu")
        assert found in str(caught.value)

    def test_damaged_and_unsafe_files_are_refused_in_one_line(
        self, weights: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "bad.pt"
        unsafe = save({"features": Fraction(1, 2)}, tmp_path / "unsafe.pt").read_bytes()
        content = weights.read_bytes()
        for bad in (b"", b"not a checkpoint", content[: len(content) // 2], content[:20], unsafe):
            path.write_bytes(bad)
            with pytest.raises(
                EncoderError, match=r"damaged or no file of torch|holds fractions\.Fraction"
            ) as caught:
                load(path, "cpu")
            assert "\n" not in str(caught.value)


if __name__ == "__main__":
    path = save(random_state(0.1), GOLDEN.with_suffix(".pt"))
    np.savez_compressed(GOLDEN, allow_pickle=False, **golden_outputs(load(path, "cpu")))
    path.unlink()
