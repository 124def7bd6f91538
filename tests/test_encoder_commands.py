"""Published encoders by the command line, and the contract that they keep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_sets import write_clip_set
from fake_hub import FakeHub
from published_files import LAYOUTS, NATURAL_S, eat_fine_tuned, eat_folder
from test_hub import FIRST, REPO, hub

from patchbank.cli.main import main
from patchbank.pipeline import load_encoder, open_bank
from patchbank.pipeline.encoders.contract import check_encoder
from patchbank.probing import BatchLoader

__all__ = ["hub"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_encoders_keep_the_contract(name: str, tmp_path: Path) -> None:
    path = next(iter(LAYOUTS[name].values()))(tmp_path)
    results = check_encoder(
        lambda: load_encoder(name, weights=path), reference=name, window_s=NATURAL_S.get(name, 10.0)
    )
    broken = [result.name for result in results if result.outcome != "passed"]
    # The publishers of these two state no licence.
    assert broken == (["licence"] if name in ("asit", "bird-mae") else []), results


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_set(tmp_path_factory.mktemp("clips"), n_clips=12)


def test_constants_of_the_front_end_come_through_every_command(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(eat_folder(tmp_path))
    extract = ["extract", str(clips), "--encoder", "eat", "--weights", weights, "--window-s", "1"]
    bank = str(tmp_path / "eat.bank")
    chosen = ["--preset", "bat", "--frontend", "mean=-6.6", "--frontend", "lengths=[112]"]
    assert main([*extract, *chosen, "--layers", "all", "--out", bank]) == 0
    card = open_bank(bank).card
    frontend = card["encoder"]["frontend"]
    assert (frontend["mean"], frontend["lengths"]) == (-6.6, [112])
    assert frontend["padding"] == "zeros after normalising"
    assert open_bank(bank).schema.grids[2].time == 7
    # Resumed and verified with the same constants, refused with others.
    assert main([*extract, *chosen, "--layers", "all", "--out", bank]) == 0
    assert main(["bank", "verify", bank, "--encoder", "eat", "--weights", weights]) == 0
    capsys.readouterr()
    assert main([*extract, "--layers", "all", "--out", bank]) == 1
    assert "encoder.frontend.mean" in capsys.readouterr().err
    # A probe is applied through the front end of its bank.
    labels = str(clips.parent / "labels.csv")
    run = str(tmp_path / "run")
    train = ["train-probe", bank, "--labels", labels, "--probe", "linear", "--out", run]
    assert main([*train, "--epochs", "1", "--seeds", "1"]) == 0
    audio = str(next((clips.parent / "audio").iterdir()))
    assert main(["predict", run, audio, "--weights", weights]) == 0


def test_weights_of_the_hub_are_recorded_in_the_bank(
    clips: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = tmp_path / "hub.bank"
    line = ["extract", str(clips), "--encoder", "eat", "--weights", f"hf:{REPO}", "--window-s", "1"]
    assert main([*line, "--frontend", "lengths=[]", "--out", str(bank)]) == 0
    assert open_bank(bank).card["source"] == f"hf:{REPO}@{FIRST}"
    capsys.readouterr()
    assert main(["bank", "show", str(bank), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"] == f"hf:{REPO}@{FIRST}"


@pytest.mark.parametrize(
    ("name", "n_times"),
    [("beats", 6), ("eat", 7), ("audiomae", 7), ("asit", 7), ("dasheng", 25), ("bat", 7)],
)
def test_masked_padding_counts_patches_of_audio_not_of_the_encoders_own_padding(
    name: str, n_times: int, clips: Path, tmp_path: Path
) -> None:
    weights, bank = next(iter(LAYOUTS[name].values()))(tmp_path), tmp_path / "m.bank"
    line = ["extract", str(clips), "--encoder", name, "--weights", str(weights)]
    assert main([*line, "--window-s", "1", "--mask-padding", "--out", str(bank)]) == 0
    opened = open_bank(bank)
    (layer,) = opened.schema.grids
    freq = opened.schema.grids[layer].freq
    # 16,000 samples: 98 frames of Kaldi, 101 centred ones; BEATs has whole patches only.
    assert set(opened.n_patches(layer).tolist()) == {n_times * freq}


@pytest.mark.parametrize("pad", ["zero", "repeat"])
def test_a_bank_holds_what_the_published_code_makes_of_a_short_clip(
    pad: str, clips: Path, tmp_path: Path
) -> None:
    weights, bank = eat_folder(tmp_path), tmp_path / "short.bank"
    line = ["extract", str(clips), "--encoder", "eat", "--weights", str(weights), "--pad", pad]
    assert main([*line, "--window-s", "3", "--dtype", "float32", "--out", str(bank)]) == 0
    encoder = load_encoder("eat", weights=weights)
    opened = open_bank(bank)
    path = opened.clips["path"][0].as_py()
    audio, rate = soundfile.read(clips.parent / path, dtype="float32")
    assert (rate, len(audio)) == (16_000, 16_000)
    # Repeated audio is audio; zeros are not.
    seen = audio if pad == "zero" else np.tile(audio, 3)
    features = encoder.frontend(torch.from_numpy(seen)[None])
    expected = encoder.encode(features, [2])[2].patches[0].numpy()
    for batch in BatchLoader(opened, layer=2, batch_size=1, shuffle=False):
        np.testing.assert_allclose(np.asarray(batch.patches[0]), expected, atol=1e-5)
        break


def test_a_fine_tuned_file_names_the_encoder_of_its_bank(clips: Path, tmp_path: Path) -> None:
    weights, bank = eat_fine_tuned(tmp_path), tmp_path / "plus.bank"
    line = ["extract", str(clips), "--encoder", "eat", "--weights", str(weights)]
    assert main([*line, "--window-s", "1", "--frontend", "lengths=[]", "--out", str(bank)]) == 0
    assert open_bank(bank).card["encoder"]["name"] == "eat+"
    assert open_bank(bank).card["licence"] == "MIT"
    for name in ("eat", "eat+"):
        line = ["bank", "verify", str(bank), "--encoder", name, "--weights", str(weights)]
        assert main(line) == 0
        assert main(["check", name, "--weights", str(weights), "--window-s", "1"]) == 0


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--frontend", "mean"], 2, "--frontend takes NAME=VALUE, found 'mean'"),
        (["--frontend", "mean=1", "--frontend", "mean=2"], 2, "--frontend mean is there twice"),
        (["--frontend", "mode=1"], 1, "has no constant 'mode'; there are:"),
        (["--preset", "paper"], 1, "no front-end preset 'paper'; there are: published, bat"),
        (["--window-s", "0.02"], 1, "needs at least 400 samples"),
    ],
)
def test_misuse_is_said_in_a_line(
    options: list[str],
    status: int,
    message: str,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["extract", str(clips), "--encoder", "eat", "--weights", str(eat_folder(tmp_path))]
    assert main([*line, *options, "--out", str(tmp_path / "x.bank")]) == status
    error = " ".join(capsys.readouterr().err.split())
    assert message in error.replace("│ ", "").replace(" │", "")
    assert not (tmp_path / "x.bank").exists()
