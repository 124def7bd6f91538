"""The golden clip: what proves that a reader's encoder is the writer's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from patchbank.cli.main import main
from patchbank.pipeline import audio
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.encoders.fake import FakeEncoder
from patchbank.pipeline.golden import check_golden, golden_frames


def test_the_encoder_that_wrote_a_bank_agrees_with_it(sealed: Bank) -> None:
    check = check_golden(sealed, load_encoder("fake"))
    assert check.problems == ()
    names = ["recording", "waveform", "layer 1", "layer 2", "layer 2 prefix"]
    assert list(check.errors) == names
    assert max(check.errors.values()) < 1e-6


def test_the_golden_clip_is_stereo_resampled_and_padded(sealed: Bank) -> None:
    group = zarr.open_group(sealed.path / "golden", mode="r")
    assert group["frames"].shape == (39_690, 2)
    assert group["waveform"].shape == (16_000,)
    waveform = np.asarray(group["waveform"][:])
    assert np.abs(waveform[:14_000]).min() < np.abs(waveform[:14_000]).max()
    assert (waveform[14_400:] == 0).all()
    assert group["tokens_1"].dtype == np.float32


@pytest.mark.parametrize(("window_s", "n_samples"), [(1.0, 39_690), (600.0, 1_323_000), (1e-6, 1)])
def test_the_golden_recording_is_never_long(window_s: float, n_samples: int) -> None:
    assert golden_frames(window_s).shape == (n_samples, 2)


def test_other_weights_are_named_and_differ(sealed: Bank, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"other weights")
    problems = check_golden(sealed, load_encoder("fake", weights=tmp_path / "w")).problems
    assert problems[0].startswith("weights_sha256: the bank has '', this encoder '")
    assert any(problem.startswith("golden clip, layer 1: differs by") for problem in problems)


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        pytest.param("frontend", ["layer 1", "layer 2", "layer 2 prefix"], id="another front end"),
        pytest.param("resampler", ["waveform", "layer 1"], id="another resampler"),
        pytest.param("mix", ["waveform", "layer 1"], id="another channel mix"),
        pytest.param("order", ["layer 1"], id="frequency before time"),
    ],
)
def test_a_mistake_in_preprocessing_shows_where_it_is(
    broken: str, names: list[str], sealed: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    frontend, encode = FakeEncoder.frontend, FakeEncoder.encode
    if broken == "frontend":
        monkeypatch.setattr(
            FakeEncoder, "frontend", lambda self, waveform: frontend(self, waveform) + 0.01
        )
    elif broken == "resampler":
        from torchaudio.functional import resample

        monkeypatch.setattr(
            audio,
            "_resampled",
            lambda waveform, from_hz, to_hz: resample(
                torch.from_numpy(waveform), from_hz, to_hz, lowpass_filter_width=2
            ).numpy(),
        )
    elif broken == "mix":
        real = audio.fit_to_encoder
        monkeypatch.setattr(
            audio,
            "fit_to_encoder",
            lambda frames, rate, **more: real(frames[:, :1].copy(), rate, **more),
        )
    else:

        def flipped(self: FakeEncoder, features: torch.Tensor, layers: object = None) -> object:
            out = encode(self, features, layers)  # type: ignore[arg-type]
            patches = out[1].patches
            patches.copy_(patches.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2))
            return out

        monkeypatch.setattr(FakeEncoder, "encode", flipped)
    problems = check_golden(sealed, load_encoder("fake")).problems
    for name in names:
        assert any(problem.startswith(f"golden clip, {name}: differs") for problem in problems)
    assert not any(problem.startswith("golden clip, recording") for problem in problems)


def said(capsys: pytest.CaptureFixture[str], *line: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["bank", "verify", *map(str, line)]) == status
    return capsys.readouterr()


def test_verify_proves_an_encoder(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, sealed.path, "--encoder", "fake")
    assert "golden clip, layer 2 prefix: agrees, largest error" in out
    out, _ = said(capsys, sealed.path, "--encoder", "fake", "--json")
    assert set(json.loads(out)["golden"]) >= {"waveform", "layer 1"}
    (tmp_path / "w").write_bytes(b"other weights")
    line = (sealed.path, "--encoder", "fake", "--weights", tmp_path / "w")
    out, err = said(capsys, *line, status=1)
    assert "weights_sha256: the bank has" in out
    assert "was not made by this encoder as it is here" in err
    out, err = said(capsys, sealed.path, "--encoder", "logmel", status=1)
    assert "name: the bank has 'fake', this encoder 'logmel'" in out
    assert "no weights at" in said(capsys, *line[:3], "--weights", tmp_path / "v", status=1)[1]
    _, err = said(capsys, sealed.path, "--weights", tmp_path / "w", status=2)
    assert "name it with --encoder" in " ".join(err.split())
