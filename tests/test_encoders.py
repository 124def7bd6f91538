"""Tokens of the published encoders: equal to the publishers' code, and to a naive one, everywhere.

`python tests/test_encoders.py` writes the regression golden anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plain_encoders as plain
import pytest
import soundfile
import torch
import torch.nn.functional as F
from published_files import (
    BEATS_CFG,
    DEPTH,
    HEADS,
    LAYOUTS,
    NATURAL_S,
    audiomae_fine_tuned,
    bat_shapes,
    beats_state,
    dasheng_state,
    eat_shapes,
    random_state,
    torch_file,
    vit_shapes,
)
from torch import Tensor

from patchbank.pipeline import load_encoder
from patchbank.pipeline.encoders.base import Encoder
from patchbank.pipeline.encoders.catalogue import ENCODERS
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.specs import Grid

GOLDEN = Path(__file__).parent / "goldens" / "encoders.npz"
ATOL = 2e-5
"""Published code's tokens, from their spectrogram and the whole way from the waveform."""
PLAIN_ATOL = 5e-5
"""float32 against the naive code in float64."""


def encoder_of(name: str, folder: Path, **options: Any) -> Encoder:
    """With the small random weights."""
    return load_encoder(name, weights=next(iter(LAYOUTS[name].values()))(folder), **options)


def noise(encoder: Encoder, seconds: float, *, seed: int = 0) -> Tensor:
    """A mixture of noise and tones whose level changes, (1, sample)."""
    rate = encoder.spec.sample_rate_hz
    n_samples = round(seconds * rate)
    rng = np.random.default_rng(seed)
    time = np.arange(n_samples) / rate
    tones = sum(np.sin(2 * np.pi * hertz * time) for hertz in (220.0, 1_300.0, 5_100.0))
    wave = 0.05 * tones * (1 + np.sin(2 * np.pi * time)) + 0.02 * rng.standard_normal(n_samples)
    return torch.from_numpy(wave.astype(np.float32))[None]


# Against the publishers' code.

GOLDENS = {
    "beats": ("beats", "beats_tiny_pretrained.pt", "fbank_10s", "tokens_10s"),
    "eat": ("eat", "eat_tiny_fairseq_pretrain.pt", "fbank_10s", "tokens_10s"),
    "eat, folder": ("eat", "hf_pretrain", "fbank_10s", "tokens_10s"),
    "audiomae": ("audiomae", "audiomae_tiny_pretrained.pth", "fbank_10s", "tokens_10s"),
    "asit": ("asit", "asit_tiny_checkpoint.pth", "fbank_6s_592", "tokens_6s_592"),
    "dasheng": ("dasheng", "dasheng_tiny.pt", "meldb_10s", "tokens_10s"),
}


@pytest.mark.parametrize("case", GOLDENS)
def test_tokens_are_those_of_the_published_code(case: str, shared: Path) -> None:
    name, file, spectrogram, tokens = GOLDENS[case]
    golden = np.load(shared / "goldens" / name / "golden.npz")
    encoder = load_encoder(name, weights=shared / "goldens" / name / file)
    wave, rate = soundfile.read(shared / "goldens/wave_16k_10s.wav", dtype="float32")
    assert rate == encoder.spec.sample_rate_hz
    waveform = torch.from_numpy(wave)[None, : 96_000 if name == "asit" else None]
    frames = torch.from_numpy(golden[spectrogram])[None]
    frames = frames.transpose(1, 2) if name == "dasheng" else frames
    features = encoder.frontend(waveform)
    assert torch.equal(features, frames)
    expected = torch.from_numpy(golden[tokens])
    out = encoder.encode(frames)[DEPTH]
    assert out.patches.shape == (1, *expected.shape)
    assert (out.patches[0] - expected).abs().max() < ATOL
    if "cls_10s" in golden:
        assert out.prefix is not None
        assert np.abs(out.prefix[0, 0].numpy() - golden["cls_10s"]).max() < ATOL


def test_tokens_of_audiomae_before_the_norm_are_those_of_the_published_code(shared: Path) -> None:
    folder = shared / "goldens/audiomae"
    golden = np.load(folder / "golden.npz")
    encoder: Any = load_encoder("audiomae", weights=folder / "audiomae_tiny_pretrained.pth")
    encoder.network.vit.norm = torch.nn.Identity()
    out = encoder.encode(torch.from_numpy(golden["fbank_10s"])[None])[DEPTH].patches[0]
    assert np.abs(out.numpy() - golden["tokens_prenorm_10s"]).max() < ATOL


# Against the naive code: every layer, CLS, short and long clips.

State = Mapping[str, Tensor]


def plain_vit(state: State, frames: Tensor, n_times: int) -> list[Tensor]:
    table = state["pos_embed"][0]
    if len(frames) // 16 != n_times:
        grid = table[1:].T.unflatten(1, (n_times, 8))[None].float()
        size = (len(frames) // 16, 8)
        resized = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
        table = torch.cat([table[:1], resized[0].flatten(1).T.double()])
    return plain.vit(frames, state, heads=HEADS, depth=DEPTH, positions=table)


def plain_eat(state: State, frames: Tensor) -> list[Tensor]:
    names = ("local_encoder.proj", "extra_tokens", "fixed_positional_encoder.positions")
    return plain.post_norm(frames, state, heads=HEADS, depth=DEPTH, names=names)


def plain_bat(state: State, frames: Tensor) -> list[Tensor]:
    """64 time patches at a time; the CLS of a longer clip is the mean of its chunks'."""
    names = ("patch_embed.proj", "cls_token", "pos_embed")
    parts = [
        plain.post_norm(chunk, state, heads=HEADS, depth=DEPTH, names=names)
        for chunk in frames.split(1_024)
    ]
    return [
        torch.cat(
            [
                torch.stack([part[layer][:1] for part in parts]).mean(0),
                *(part[layer][1:] for part in parts),
            ]
        )
        for layer in range(DEPTH)
    ]


PLAIN: dict[str, tuple[State, Callable[[State, Tensor], list[Tensor]]]] = {
    "beats": (beats_state(), lambda state, frames: plain.beats(frames, state, BEATS_CFG)),
    "eat": (random_state(eat_shapes()), plain_eat),
    "audiomae": (random_state(vit_shapes(64)), lambda s, f: plain_vit(s, f, 64)),
    "asit": (random_state(vit_shapes(37)), lambda s, f: plain_vit(s, f, 37)),
    "bird-mae": (random_state(vit_shapes(32)), lambda s, f: plain_vit(s, f, 32)),
    "bat": (random_state(bat_shapes()), plain_bat),
    "dasheng": (
        dasheng_state(),
        lambda s, f: plain.dasheng(f, s, heads=HEADS, depth=DEPTH, longest=1_008),
    ),
}
LENGTHS: list[tuple[str, float, dict[str, Any], Grid]] = [
    ("beats", 10.0, {}, Grid(62, 8)),
    ("beats", 1.0, {}, Grid(6, 8)),
    ("beats", 0.2, {}, Grid(1, 8)),
    ("eat", 10.0, {}, Grid(64, 8)),
    ("eat", 3.0, {}, Grid(64, 8)),
    ("eat", 5.0, {"lengths": [512]}, Grid(32, 8)),
    ("eat", 10.5, {}, Grid(66, 8)),
    ("eat", 1.0, {"lengths": []}, Grid(7, 8)),
    ("audiomae", 10.0, {}, Grid(64, 8)),
    ("audiomae", 2.0, {}, Grid(64, 8)),
    ("asit", 6.0, {}, Grid(37, 8)),
    ("asit", 2.0, {}, Grid(37, 8)),
    ("asit", 10.0, {}, Grid(64, 8)),
    ("asit", 12.0, {}, Grid(75, 8)),
    ("asit", 3.0, {"lengths": [], "pads_longer": False}, Grid(18, 8)),
    ("bird-mae", 5.0, {}, Grid(32, 8)),
    ("bird-mae", 3.0, {}, Grid(32, 8)),
    ("bat", 10.0, {}, Grid(64, 8)),
    ("bat", 5.0, {"length": 512}, Grid(32, 8)),
    ("bat", 10.24, {}, Grid(64, 8)),
    ("bat", 10.3, {}, Grid(64, 8)),
    ("bat", 13.0, {}, Grid(82, 8)),
    ("dasheng", 10.0, {}, Grid(250, 1)),
    ("dasheng", 1.0, {}, Grid(25, 1)),
    ("dasheng", 10.08, {}, Grid(252, 1)),
    ("dasheng", 23.4, {}, Grid(585, 1)),
    ("dasheng", 20.16, {}, Grid(504, 1)),
]


@pytest.mark.parametrize(("name", "seconds", "frontend", "grid"), LENGTHS)
def test_every_layer_at_every_length_is_what_naive_code_makes(
    name: str, seconds: float, frontend: dict[str, Any], grid: Grid, tmp_path: Path
) -> None:
    encoder = encoder_of(name, tmp_path, frontend=frontend)
    wave = noise(encoder, seconds)
    frames = encoder.frontend(wave)
    out = encoder.encode(frames)
    state, naive = PLAIN[name]
    expected = naive({key: value.double() for key, value in state.items()}, frames[0].double())
    assert encoder.grids(wave.shape[1]) == dict.fromkeys((1, 2), grid)
    for layer in (1, 2):
        tokens = out[layer]
        assert tokens.grid == grid
        n_prefix = encoder.spec.layer(layer).n_prefix
        assert n_prefix == (0 if name in ("beats", "dasheng") else 1)
        values = (
            tokens.patches
            if tokens.prefix is None
            else torch.cat([tokens.prefix, tokens.patches], 1)
        )
        assert values.shape == (1, n_prefix + grid.n_patches, 128)
        assert (values[0] - expected[layer - 1]).abs().max() < PLAIN_ATOL


def test_a_fine_tuned_audiomae_is_what_naive_code_makes(tmp_path: Path) -> None:
    encoder = load_encoder("audiomae", weights=audiomae_fine_tuned(tmp_path))
    frames = encoder.frontend(noise(encoder, 10.0))
    state = {k: v for k, v in random_state(vit_shapes(64)).items() if not k.startswith("norm.")}
    doubles = {key: value.double() for key, value in state.items()}
    expected = plain_vit(doubles, frames[0].double(), 64)
    for layer, tokens in encoder.encode(frames).items():
        assert tokens.prefix is not None
        values = torch.cat([tokens.prefix, tokens.patches], 1)[0]
        assert (values - expected[layer - 1]).abs().max() < PLAIN_ATOL


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_is_the_same_alone_and_among_all(name: str, tmp_path: Path) -> None:
    encoder = encoder_of(name, tmp_path)
    frames = encoder.frontend(noise(encoder, NATURAL_S.get(name, 10.0)))
    every = encoder.encode(frames)
    assert list(every) == [1, 2]
    for layer in (1, 2):
        alone = encoder.encode(frames, [layer])
        assert list(alone) == [layer]
        assert torch.equal(alone[layer].patches, every[layer].patches)
    with pytest.raises(EncoderError, match=r"layers 1 to 2, found \[3\]"):
        encoder.encode(frames, [2, 3])


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_do_not_depend_on_batch_mates(name: str, tmp_path: Path) -> None:
    encoder = encoder_of(name, tmp_path)
    seconds = 0.6 * NATURAL_S.get(name, 10.0)
    quiet, loud = 1e-3 * noise(encoder, seconds), 20 * noise(encoder, seconds, seed=1)
    silent = torch.zeros_like(quiet)
    alone = encoder.frontend(quiet)
    together = encoder.frontend(torch.cat([loud, quiet, silent]))
    assert torch.equal(together[1:2], alone)
    tokens = encoder.encode(together)[DEPTH].patches[1:2]
    expected = encoder.encode(alone)[DEPTH].patches
    assert (tokens - expected).abs().max() < ATOL
    assert torch.isfinite(encoder.encode(together)[DEPTH].patches).all()


def local_encoder(name: str, folder: Path) -> Encoder:
    """Blocks and positions that add nothing: a token depends on its own patch alone."""
    encoder: Any = encoder_of(name, folder)
    for key, value in encoder.network.named_parameters():
        if key.endswith(
            ("proj.weight", "proj.bias", "fc2.weight", "linear2.weight", "pos_conv.weight")
        ) and ("attn" in key or "pos_conv" in key or "fc2" in key or "linear2" in key):
            value.data.zero_()
    loaded: Encoder = encoder
    return loaded


@pytest.mark.parametrize("name", LAYOUTS)
def test_patches_are_in_time_major_order(name: str, tmp_path: Path) -> None:
    encoder = local_encoder(name, tmp_path)
    seconds = NATURAL_S.get(name, 10.0)
    background = noise(encoder, seconds)
    n_samples = background.shape[1]
    frames = encoder.frontend(background)
    grid = encoder.grids(n_samples)[DEPTH]
    before = encoder.encode(frames)[DEPTH].patches[0]
    patch_frames = 4 if name == "dasheng" else 16
    changed = frames.clone()
    # One cell of the spectrogram, in time patch 3 and, of eight, frequency patch 5.
    band = 5 * 16 + 2 if grid.freq == 8 else 40
    changed[0, 3 * patch_frames + 1, band] += 3.0
    after = encoder.encode(changed)[DEPTH].patches[0]
    moved = torch.nonzero((after - before).abs().amax(1) > 1e-4)[:, 0].tolist()
    assert moved == [3 * grid.freq + (5 if grid.freq == 8 else 0)]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "dasheng"])
def test_a_click_moves_along_time_and_a_tone_along_frequency(name: str, tmp_path: Path) -> None:
    encoder = local_encoder(name, tmp_path)
    rate, seconds = encoder.spec.sample_rate_hz, NATURAL_S.get(name, 10.0)
    quiet = 1e-3 * torch.randn(1, round(seconds * rate), generator=torch.Generator().manual_seed(0))
    grid = encoder.grids(quiet.shape[1])[DEPTH]

    def strength(waveform: Tensor) -> Tensor:
        """How much each patch changes, (time, freq)."""
        pair = encoder.frontend(torch.cat([quiet, waveform]))
        tokens = encoder.encode(pair)[DEPTH].patches
        return (tokens[1] - tokens[0]).abs().mean(1).unflatten(0, (grid.time, grid.freq))

    hop_s = 0.01 * 16
    for place in (4, 20):
        click = quiet.clone()
        start = round((place + 0.5) * hop_s * rate)
        click[0, start : start + 20] += 0.5
        assert int(strength(click).sum(1).argmax()) == place
    time = torch.arange(quiet.shape[1]) / rate
    bands = [
        int(strength(quiet + 0.1 * torch.sin(2 * torch.pi * hertz * time)).sum(0).argmax())
        for hertz in (100.0, 1_000.0, 6_000.0)
    ]
    assert bands == sorted(bands)
    assert len(set(bands)) == 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_catalogue_says_what_the_encoder_does(name: str, tmp_path: Path) -> None:
    encoder, entry = encoder_of(name, tmp_path), ENCODERS[name]
    rate = encoder.spec.sample_rate_hz
    assert (entry.sample_rate_hz, entry.licence) == (rate, encoder.spec.licence)
    stated = re.findall(r"(\d+) x (\d+) of (\d+) s", entry.grid)
    assert stated
    for time, freq, seconds in stated:
        assert encoder.grids(int(seconds) * rate)[DEPTH] == Grid(int(time), int(freq))


@pytest.mark.parametrize(
    ("name", "seconds", "message"),
    [
        ("beats", 0.1, "needs at least 16 frames, found 8"),
        ("beats", 0.02, "needs at least 400 samples"),
        ("audiomae", 11.0, "has positions for 1024 frames.*at most 10.24 s"),
        ("bird-mae", 10.0, "has positions for 512 frames.*at most 5.12 s"),
        ("eat", 21.0, "positions for 2048 frames.*at most 20.48 s"),
        ("dasheng", 0.01, "needs at least 257 samples"),
        ("dasheng", 0.02, "needs at least 4 frames, found 3"),
        ("bat", 0.03, "needs at least 513 samples"),
    ],
)
def test_lengths_that_an_encoder_cannot_take_are_refused(
    name: str, seconds: float, message: str, tmp_path: Path
) -> None:
    # EAT's small file has 1,024 positions: 128 time patches.
    encoder = encoder_of(name, tmp_path)
    with pytest.raises(EncoderError, match=message):
        encoder.grids(round(seconds * encoder.spec.sample_rate_hz))
    with pytest.raises(EncoderError, match=message):
        encoder.encode(encoder.frontend(noise(encoder, seconds)))


def test_dasheng_refuses_a_file_with_another_front_end(tmp_path: Path) -> None:
    path = LAYOUTS["dasheng"]["file"](tmp_path)
    content = torch.load(path, weights_only=True)
    content["model"]["front_end.0.mel_scale.fb"] *= 1.5
    with pytest.raises(EncoderError, match=r"mel_scale\.fb is not what the front end's constants"):
        load_encoder("dasheng", weights=torch_file(path, content))


# Regression.


def golden_tokens(name: str, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Some of a small encoder's tokens, per layer."""
    encoder = encoder_of(name, folder)
    out = encoder.encode(encoder.frontend(noise(encoder, 0.7 * NATURAL_S.get(name, 10.0))))
    return {
        f"{name}_{layer}": tokens.patches[0, ::37, ::16].numpy() for layer, tokens in out.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_tokens_are_what_they_were(name: str, tmp_path: Path) -> None:
    golden = np.load(GOLDEN)
    for key, values in golden_tokens(name, tmp_path).items():
        np.testing.assert_allclose(values, golden[key], atol=ATOL)


if __name__ == "__main__":
    import tempfile

    values: dict[str, np.ndarray[Any, Any]] = {}
    for name in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            values |= golden_tokens(name, Path(folder))
    np.savez_compressed(GOLDEN, **values)  # type: ignore[arg-type]
