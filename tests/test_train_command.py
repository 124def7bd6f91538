"""`patchbank train-probe` and `predict` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank

FILE = """
from torch import nn

class Mine(nn.Module):
    def __init__(self, dim, n_classes):
        super().__init__()
        self.linear = nn.Linear(dim, n_classes)

    def forward(self, tokens):
        return self.linear(tokens.mean)

def build(shape, options):
    return Mine(shape.dim, shape.n_classes)
"""
QUICK = ["--epochs", "2", "--seeds", "2", "--sweep", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty noises and tones of a second, their labels by kind and by pitch, and a tiny bank."""
    folder = tmp_path_factory.mktemp("tiny_set")
    random = np.random.default_rng(0)
    time_s = np.arange(16_000) / 16_000
    clips, kinds, pitches = ["path,split"], ["path,labels"], ["path,labels"]
    for index in range(20):
        pitch = (300, 1_200)[index % 2]
        tone = np.sin(2 * np.pi * pitch * time_s + index)
        noise = random.normal(size=len(time_s))
        waveform = 0.1 * (tone if index % 4 < 2 else noise + tone)
        soundfile.write(folder / f"{index}.wav", waveform, 16_000)
        clips.append(f"{index}.wav,{('train', 'train', 'train', 'valid', 'test')[index // 4]}")
        kinds.append(f"{index}.wav,{'clean' if index % 4 < 2 else 'noisy'}")
        pitches.append(f"{index}.wav,{'low' if index % 2 == 0 else 'high'}")
    for name, lines in (("clips", clips), ("kinds", kinds), ("pitches", pitches)):
        (folder / f"{name}.csv").write_text("\n".join(lines))
    line = ["extract", str(folder / "clips.csv"), "--encoder", "tiny", "--window-s", "1"]
    assert main([*line, "--layers", "all", "--out", str(folder / "tiny.bank")]) == 0
    return folder


def test_one_line_trains_layers_label_tables_and_options(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bank = tmp_path / "run", str(tiny_set / "tiny.bank")
    labels = [f"--labels={tiny_set / name}.csv" for name in ("kinds", "pitches")]
    probes = ["--probe", "linear", "--probe", "protobin:n_prototypes_per_class=3"]
    line = ["train-probe", bank, *labels, *probes, "--layer", "4,mix", "--out", str(run)]
    assert main([*line, *QUICK]) == 0
    said = capsys.readouterr().out
    assert max(len(row) for row in said.splitlines() if "results.json" not in row) <= 80
    assert "Test scores: pitches" in said
    names = {
        f"{name}@{layers}"
        for name in ("linear", "protobin-n_prototypes_per_class=3")
        for layers in ("4", "1+2+3+4")
    }
    for table in ("kinds", "pitches"):
        results = json.loads((run / table / "results.json").read_text())
        assert set(results["probes"]) == names
        files = {"results.json", "test-clips.parquet", "resamples.parquet"}
        assert {path.name for path in (run / table).iterdir()} == names | files
        mixed = results["probes"]["linear@1+2+3+4"]
        assert mixed["n_parameters"] == results["probes"]["linear@4"]["n_parameters"] + 4
        assert mixed["search"][0]["weight_decay"] > 0
    assert main(["predict", str(run), "--bank", bank]) == 1
    assert "name one of its label sets: kinds, pitches" in capsys.readouterr().err


def test_a_mixed_probe_predicts_the_same_from_bank_and_audio(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bank = tmp_path / "run", tiny_set / "tiny.bank"
    line = ["train-probe", str(bank), "--labels", str(tiny_set / "kinds.csv"), "--layer", "2+4"]
    assert main([*line, "--probe", "cgp:n_prototypes=20", "--out", str(run), *QUICK]) == 0
    capsys.readouterr()
    assert main(["predict", str(run), "--bank", str(bank), "--json"]) == 0
    of_bank = [json.loads(row)["labels"] for row in capsys.readouterr().out.splitlines()]
    audio = [str(tiny_set / f"{index}.wav") for index in range(20)]
    assert main(["predict", str(run), *audio, "--json", "--device", "cpu"]) == 0
    of_audio = [json.loads(row)["labels"] for row in capsys.readouterr().out.splitlines()]
    for one, other in zip(of_bank, of_audio, strict=True):
        assert one == pytest.approx(other, abs=2e-3)


def test_a_probe_of_a_file_trains_says_how_and_predicts_with_that_file_only(
    sealed: Bank, clip_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, bank, file = tmp_path / "run", str(sealed.path), tmp_path / "mine.py"
    file.write_text(FILE)
    labels = str(clip_table.parent / "labels.csv")
    line = ["train-probe", bank, "--labels", labels, "--out", str(run), *QUICK]
    assert main([*line, "--probe", str(file)]) == 0
    assert "mine: trials in one product" in capsys.readouterr().err
    stored = json.loads((run / "mine/probe.json").read_text())
    assert stored["training"].pop("command") == ["patchbank", *line, "--probe", str(file)]
    assert str(tmp_path) not in json.dumps(stored)
    assert main(["predict", str(run), "--bank", bank]) == 1
    assert "a file of your own, mine.py; name it: --plugin FILE.py" in capsys.readouterr().err
    assert main(["predict", str(run), "--bank", bank, "--plugin", str(file)]) == 0
    file.write_text(FILE + "\n# changed\n")
    capsys.readouterr()
    assert main(["predict", str(run), "--bank", bank, "--plugin", str(file)]) == 1
    assert "mine.py is not what built the probe in" in capsys.readouterr().err
    assert main([*line, "--probe", "linear", "--overwrite"]) == 0
    assert main(["predict", str(run), "--bank", bank, "--plugin", str(file)]) == 1
    assert "is built by no file; leave --plugin out" in capsys.readouterr().err


WRONG = {
    "layer": (["--layer", "7"], "found no layer 7 in the bank, expected one of 1, 2"),
    "layers of other sizes": (["--layer", "1+2"], "that are mixed; name layers of one size"),
    "option": (["--probe", "mhca:heads=3"], "found option heads for probe 'mhca'; it has n_heads"),
    "option without value": (["--probe", "mhca:3"], "found option '3' in 'mhca:3', expected NAME"),
    "twice": (["--probe", "./linear.py", "--probe", "linear"], "found probe linear twice"),
    "file": (["--probe", "nowhere.py"], "found no probe file at"),
    "rate": (["--probe", "linear", "--lr", "0"], "found learning rates (0.0,) for linear"),
    "CLS": (["--probe", "linear-cls", "--layer", "1"], "needs a CLS token"),
}


@pytest.mark.parametrize(("more", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_trained_says_why(
    more: list[str],
    message: str,
    sealed: Bank,
    clip_table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    labels = str(clip_table.parent / "labels.csv")
    line = ["train-probe", str(sealed.path), "--labels", labels, "--out", str(tmp_path / "run")]
    quick = ["--epochs", "2", "--seeds", "2"] if "--lr" in more else QUICK
    assert main([*line, *quick, *more]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run/results.json").exists()
