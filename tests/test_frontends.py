"""Front ends of the patch encoders: torchaudio's bits, published padding, chosen constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from published_files import LAYOUTS, NATURAL_S
from torch import Tensor
from torchaudio.compliance.kaldi import fbank
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from patchbank.pipeline import load_encoder
from patchbank.pipeline.encoders import bat, beats, bird_mae, dasheng, eat
from patchbank.pipeline.encoders.base import Encoder
from patchbank.pipeline.encoders.decibel import DecibelFrontEnd, DecibelSettings
from patchbank.pipeline.encoders.frontend import full_precision
from patchbank.pipeline.encoders.kaldi import KaldiFrontEnd, KaldiSettings, clip_means
from patchbank.pipeline.errors import EncoderError

KALDI = {
    "povey, 16 kHz": beats.PRESETS["published"],
    "hanning, 16 kHz": eat.presets("eat")["published"],
    "hanning, 32 kHz": bird_mae.PRESETS["published"],
}
EMPTY_FILTER = 3
"""No bin falls into it at 16 kHz, 512 points and 128 bands."""
LOG_FLOOR = -15.942385


def noise(n_samples: int, *, n_clips: int = 1, level: float = 0.1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return level * torch.randn(n_clips, n_samples, generator=generator)


def torchaudio_fbank(waveform: Tensor, settings: KaldiSettings) -> Tensor:
    """One clip, as every publisher calls it."""
    return fbank(
        waveform,
        htk_compat=True,
        sample_frequency=settings.sample_rate_hz,
        use_energy=False,
        window_type=settings.window,
        num_mel_bins=128,
        dither=0.0,
        frame_shift=10,
    )


@pytest.mark.parametrize("case", KALDI)
@pytest.mark.parametrize("n_samples", [400 * 2, 15_999, 16_000, 80_123])
def test_the_filter_bank_is_torchaudios_to_the_bit(case: str, n_samples: int) -> None:
    settings = KALDI[case]
    front_end = KaldiFrontEnd(settings)
    waves = noise(n_samples, n_clips=3) * torch.tensor([[1.0], [1e-3], [0.0]]) * settings.scale
    # One by one, as `forward` does on a CPU: products of few and of many rows differ in last bits.
    for wave in waves.split(1):
        assert torch.equal(front_end.log_mel(wave)[0], torchaudio_fbank(wave, settings))


def test_a_filter_without_a_bin_is_at_the_floor() -> None:
    front_end = KaldiFrontEnd(KALDI["hanning, 16 kHz"])
    column = front_end.log_mel(noise(16_000))[0, :, EMPTY_FILTER]
    assert torch.allclose(column, torch.full_like(column, LOG_FLOOR))
    features = front_end(noise(16_000))[0, :98, EMPTY_FILTER]
    assert torch.allclose(features, torch.full_like(features, -1.277), atol=1e-3)


PUBLISHED_EXAMPLES = ("eat", "sslam", "audiomae", "asit")


def front_end_of(name: str, folder: Path, **options: Any) -> Encoder:
    return load_encoder(name, weights=next(iter(LAYOUTS[name].values()))(folder), **options)


@pytest.mark.parametrize("name", PUBLISHED_EXAMPLES)
def test_published_code_pads_with_zeros_before_it_normalises(name: str, tmp_path: Path) -> None:
    encoder = front_end_of(name, tmp_path)
    wave = noise(2 * 16_000) + 0.3
    constants = encoder.spec.frontend
    log_mel = torchaudio_fbank(wave - wave.mean(), KALDI["hanning, 16 kHz"])
    length = 592 if name == "asit" else 1_024
    padded = torch.nn.functional.pad(log_mel, (0, 0, 0, length - len(log_mel)))
    expected = (padded - constants["mean"]) / constants["divisor"]
    found = encoder.frontend(wave)[0]
    assert torch.allclose(found, expected, atol=2e-4)
    # Padding is what a log-mel of 0 becomes.
    assert torch.allclose(found[-1], torch.full((128,), 0.467), atol=1e-3)


def test_eat_of_bat_normalises_first_and_pads_to_whole_patches(tmp_path: Path) -> None:
    encoder = front_end_of("eat", tmp_path, preset="bat")
    wave = noise(round(10.23 * 16_000))
    found = encoder.frontend(wave)[0]
    assert found.shape == (1_024, 128)
    log_mel = torchaudio_fbank(wave - wave.mean(), KALDI["hanning, 16 kHz"])
    expected = (log_mel + 4.59864076) / (2 * 4.357353477)
    assert len(log_mel) == 1_021
    assert torch.allclose(found[:1_021], expected, atol=2e-4)
    assert torch.equal(found[1_021:], torch.zeros(3, 128))
    # Their sets of one and of five seconds.
    assert encoder.frontend(wave[:, :16_000]).shape[1] == 112
    assert encoder.frontend(wave[:, :80_000]).shape[1] == 512


def test_beats_keeps_the_mean_and_cuts_the_rest_but_bat_pads_it(tmp_path: Path) -> None:
    wave = noise(10 * 16_000) + 0.3
    published = front_end_of("beats", tmp_path)
    log_mel = torchaudio_fbank(wave * 2**15, KALDI["povey, 16 kHz"])
    expected = (log_mel - 15.41663) / (2 * 6.55582)
    assert torch.equal(published.frontend(wave)[0], expected)
    assert published.grids(160_000)[1].time == 62
    bat_like = front_end_of("beats", tmp_path, preset="bat")
    assert bat_like.grids(round(10.23 * 16_000))[1].time == 64
    assert bat_like.spec.encoder_id != published.spec.encoder_id


def test_bird_mae_pads_with_the_clips_own_minimum(tmp_path: Path) -> None:
    encoder = front_end_of("bird-mae", tmp_path)
    waves = noise(3 * 32_000, n_clips=2) * torch.tensor([[1.0], [1e-4]])
    for wave, found in zip(waves, encoder.frontend(waves), strict=True):
        log_mel = torchaudio_fbank(wave[None] - wave.mean(), KALDI["hanning, 32 kHz"])
        expected = (log_mel.min() + 7.2) / (2 * 4.43)
        assert torch.allclose(found[-1], expected.expand(128), atol=1e-4)


def decibels(wave: Tensor, settings: DecibelSettings) -> Tensor:
    """torchaudio's, of one clip with a channel, so that the clamp is its own."""
    spectrogram = MelSpectrogram(
        settings.sample_rate_hz,
        n_fft=settings.n_fft,
        hop_length=160,
        n_mels=settings.n_mels,
        f_max=8_000.0,
    )
    result: Tensor = AmplitudeToDB("power", top_db=settings.top_db)(spectrogram(wave[None, None]))
    return result[0, 0]


@pytest.mark.parametrize("case", ["dasheng", "bat"])
def test_decibels_are_torchaudios_to_the_bit_clip_by_clip(case: str) -> None:
    settings = {"dasheng": dasheng.PRESETS, "bat": bat.PRESETS}[case]["published"]
    front_end = DecibelFrontEnd(settings)
    waves = noise(20_000, n_clips=3) * torch.tensor([[5.0], [1e-4], [0.0]])
    waves[0, 3_000:] *= 1e-8
    for wave, found in zip(waves, front_end.decibels(waves), strict=True):
        assert torch.equal(found, decibels(wave, settings))


def test_bat_is_scaled_to_its_range_and_padded_with_zeros(tmp_path: Path) -> None:
    encoder = front_end_of("bat", tmp_path)
    wave = noise(10 * 16_000)
    values = decibels(wave[0], bat.PRESETS["published"]).T
    expected = (values - values.min()) / (values.max() - values.min() + 1e-8)
    found = encoder.frontend(wave)[0]
    assert found.shape == (1_024, 128)
    assert torch.equal(found[:1_001], expected)
    assert torch.equal(found[1_001:], torch.zeros(23, 128))
    assert torch.isfinite(encoder.frontend(torch.zeros_like(wave))).all()


def test_the_mean_of_a_clip_does_not_depend_on_threads_or_batch() -> None:
    waves = noise(160_000, n_clips=3) + 0.01
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        # What published code computes, in loader processes of one thread.
        expected = torch.stack([wave.mean() for wave in waves])[:, None]
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            assert torch.equal(clip_means(waves), expected)
            assert torch.equal(torch.cat([clip_means(w) for w in waves.split(1)]), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"means": 1.0}, "no constant 'means'; there are: sample_rate_hz, scale"),
        ({"encoder": "x"}, "no constant 'encoder'"),
        ({"mean": "loud"}, "mean of eat is -4.268 by default, found 'loud'"),
        ({"removes_mean": 1}, "removes_mean of eat is True by default, found 1"),
        ({"lengths": 512}, "lengths of eat is .1024,. by default, found 512"),
        ({"lengths": [0]}, "lengths must be positive, found 0"),
        ({"divisor": 0.0}, "divisor must be positive, found 0"),
        ({"mean": float("nan")}, "mean of eat is -4.268 by default, found nan"),
        ({"divisor": float("inf")}, "found inf"),
        ({"hop_ms": 0.0}, "hop_ms must be positive"),
        ({"frame_ms": -1.0}, "frame_ms must be positive"),
        ({"sample_rate_hz": 0}, "sample_rate_hz must be positive"),
        ({"low_hz": 9_000.0}, "mel bands from 9000 to 8000 Hz, expected them within 0 to 8000"),
        ({"high_hz": 20_000.0}, "mel bands from 20 to 20000 Hz"),
        ({"n_mels": 64}, "n_mels and patch_frames are 128 and 16, the network's; found 64"),
        ({"short_clips": "noise"}, "short_clips 'noise'; there are: samples of zero"),
        ({"window": "hamming"}, "window 'hamming'; there are: hanning, povey"),
        ({"padding": "noise"}, "padding 'noise'; there are: zeros before"),
    ],
)
def test_constants_that_make_no_sense_are_refused(
    constants: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=message):
        front_end_of("eat", tmp_path, frontend=constants)


@pytest.mark.parametrize(
    ("name", "constants", "message"),
    [
        ("bat", {"top_db": -5.0}, "top_db must be positive"),
        ("bat", {"length": -4}, "length must be positive"),
        ("bat", {"high_hz": 9_000.0}, "mel bands from 0 to 9000 Hz"),
        ("bat", {"normalises": "no"}, "normalises 'no'; there are: decibels"),
        ("dasheng", {"n_mels": 80}, "init_bn is of 64 mel bands, the front end has 80"),
        ("dasheng", {"hop_samples": 0}, "hop_samples must be positive"),
        ("audiomae", {"lengths": [512]}, "positions for 1024 frames, audiomae is fed 512"),
        ("bird-mae", {"lengths": []}, "positions for 512 frames, bird-mae is fed any number"),
    ],
)
def test_constants_that_an_encoder_cannot_take_are_refused(
    name: str, constants: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=message):
        front_end_of(name, tmp_path, frontend=constants)


def test_lengths_in_another_order_are_the_same_encoder(tmp_path: Path) -> None:
    ids = {
        front_end_of("asit", tmp_path, frontend={"lengths": lengths}).spec.encoder_id
        for lengths in ([592, 1_024], [1_024, 592], [592, 592, 1_024])
    }
    assert len(ids) == 1


@pytest.mark.parametrize("name", PUBLISHED_EXAMPLES)
@pytest.mark.parametrize("seconds", [0.01, 1.0, 3.0])
def test_a_short_clip_in_a_longer_window_is_padded_as_published(
    name: str, seconds: float, tmp_path: Path
) -> None:
    encoder: Any = front_end_of(name, tmp_path)
    n_audio, n_samples = round(seconds * 16_000), 80_000
    window = torch.zeros(2, n_samples)
    window[:, :n_audio] = noise(n_audio, n_clips=2) + 0.3
    found = encoder.frontend(window, [n_audio, n_samples])
    # The publishers' code is given the clip alone; one shorter than a frame it does not take.
    alone = encoder.frontend(window[:1, : max(400, n_audio)])
    assert torch.equal(found[:1], alone)
    assert torch.allclose(found[0, -1], torch.full((128,), 0.467), atol=1e-3)
    assert torch.equal(found[1:], encoder.frontend(window[1:]))
    # Silence that is audio is another thing.
    assert (found[1, 400] - 0.467).abs().max() > 1.0


@pytest.mark.parametrize("name", ["beats", "dasheng", "bird-mae", "bat"])
def test_others_pad_the_samples_of_a_short_clip(name: str, tmp_path: Path) -> None:
    encoder: Any = front_end_of(name, tmp_path)
    n_samples = 3 * encoder.spec.sample_rate_hz
    window = torch.zeros(1, n_samples)
    window[:, : n_samples // 3] = noise(n_samples // 3)
    assert torch.equal(encoder.frontend(window, [n_samples // 3]), encoder.frontend(window))


def test_constants_land_in_the_spec_and_change_the_encoder_id(tmp_path: Path) -> None:
    # Dataset statistics of ESC-50 that EAT is fine-tuned with.
    own = {"mean": -6.627, "divisor": 2 * 5.359, "lengths": [512]}
    usual, changed = front_end_of("eat", tmp_path), front_end_of("eat", tmp_path, frontend=own)
    assert changed.spec.frontend == usual.spec.frontend | own
    assert changed.spec.encoder_id != usual.spec.encoder_id
    same = front_end_of("eat", tmp_path, frontend={"mean": -4.268}, preset="published")
    assert same.spec == usual.spec


def test_constants_of_efficientat_are_chosen_too(shared: Path) -> None:
    weights = shared / "weights/efficientat-mn04/mn04_as_mAP_432.pt"
    usual = load_encoder("efficientat", weights=weights)
    changed = load_encoder("efficientat", weights=weights, frontend={"shift": 5.5, "n_mels": 64})
    wave = noise(32_000)
    found, expected = changed.frontend(wave), usual.frontend(wave)
    assert found.shape == (1, 64, 100)
    assert expected.shape == (1, 128, 100)
    same_bands = load_encoder("efficientat", weights=weights, frontend={"shift": 5.5})
    assert torch.allclose(same_bands.frontend(wave), expected + 1.0 / 5.0, atol=1e-6)
    assert len({e.spec.encoder_id for e in (usual, changed, same_bands)}) == 3
    with pytest.raises(EncoderError, match=r"window of efficientat is .* and cannot be chosen"):
        load_encoder("efficientat", weights=weights, frontend={"window": "hamming"})


def test_presets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="audiomae has no front-end preset 'bat'; there are"):
        front_end_of("audiomae", tmp_path, preset="bat")
    for options in ({"preset": "published"}, {"frontend": {"mean": 0.0}}):
        with pytest.raises(EncoderError, match="front end of tiny has no presets or constants"):
            load_encoder("tiny", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYOUTS)
def test_front_ends_are_float32_under_autocast(name: str, tmp_path: Path) -> None:
    encoder = front_end_of(name, tmp_path)
    seconds = NATURAL_S.get(name, 10.0)
    wave = noise(round(seconds * encoder.spec.sample_rate_hz))
    before = encoder.frontend(wave)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.frontend(wave), before)


def fail_in_full_precision() -> None:
    with full_precision(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
        raise ZeroDivisionError


def test_full_precision_gives_settings_back_after_an_error() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            fail_in_full_precision()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_whole_batch_at_once_is_close_to_clip_by_clip(name: str, tmp_path: Path) -> None:
    # What a GPU computes; on a CPU clips go one by one.
    encoder: Any = front_end_of(name, tmp_path)
    n_samples = round(0.7 * NATURAL_S.get(name, 10.0) * encoder.spec.sample_rate_hz)
    waves = noise(n_samples, n_clips=4) * torch.tensor([[1.0], [1e-2], [3.0], [0.0]]) + 0.01
    batched = encoder._frontend.features(waves, n_samples)
    error = (batched - encoder.frontend(waves)).abs()
    assert error.mean() < 2e-6
    assert error.flatten().quantile(0.999) < 1e-4
    assert torch.isfinite(batched).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", KALDI)
def test_the_filter_bank_on_a_gpu_is_close(case: str) -> None:
    settings = replace(KALDI[case], lengths=())
    front_end = KaldiFrontEnd(settings)
    waves = noise(10 * settings.sample_rate_hz, n_clips=4)
    expected = front_end(waves)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        with torch.autocast("cuda", torch.float16):
            found = front_end.to("cuda")(waves.cuda()).cpu()
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    error = (found - expected).abs()
    assert error.mean() < 2e-6
    assert error.flatten().quantile(0.999) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_on_a_gpu_are_close(name: str, tmp_path: Path) -> None:
    encoder = front_end_of(name, tmp_path)
    seconds = NATURAL_S.get(name, 10.0)
    waves = noise(round(seconds * encoder.spec.sample_rate_hz), n_clips=2)
    expected = encoder.encode(encoder.frontend(waves))[2].patches
    encoder.to("cuda")
    found = encoder.encode(encoder.frontend(waves.cuda()))[2].patches.cpu()
    assert (found - expected).abs().max() < 2e-3
    assert (found - expected).abs().mean() < 2e-5
