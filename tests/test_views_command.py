"""`patchbank extract --views`: the command, what follows it, and its misuse."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from fake_bank import N_CLIPS
from made_views import MADE

from patchbank.cli.main import main
from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.errors import ManifestError
from patchbank.pipeline.extraction import extract


def test_the_command_line_makes_views_trains_predicts_and_shows(
    clip_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, run, out = tmp_path / "x.bank", tmp_path / "run", tmp_path / "scores.csv"
    line = ["extract", str(clip_table), "--encoder", "fake", "--out", str(bank), "--window-s", "1"]
    line += ["--views", "3", "--augment", "mixup:p=1,max_sources=2", "--augment", "gain"]
    line += ["--augment-seed", "11"]
    assert main([*line, "--dry-run"]) == 0
    assert "clips    100, 60 of them views, 100 to encode" in capsys.readouterr().out
    assert main([*line, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["views"] == 60
    assert main(line) == 0
    assert open_bank(bank).card["augment"] == {
        "seed": 11,
        "mixup": {"p": 1.0, "min_snr_db": 2.0, "max_snr_db": 30.0, "max_sources": 2},
        "gain": {"min_db": -6.0, "max_db": 6.0},
    }
    capsys.readouterr()
    assert main(["bank", "show", str(bank)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "clips 100, 60 of them views, 0 failed" in said
    assert "views mixup (p 1.0, min_snr_db 2.0, max_snr_db 30.0, max_sources 2), gain" in said
    labels = str(clip_table.parent / "labels.csv")
    train = ["train-probe", str(bank), "--labels", labels, "--out", str(run), "--probe", "linear"]
    assert main([*train, "--epochs", "2", "--seeds", "1", "--lr", "0.05"]) == 0
    assert main(["predict", str(run), "--bank", str(bank), "--out", str(out)]) == 0
    found = [row["clip"] for row in csv.DictReader(out.read_text().splitlines())]
    assert found == [f"audio/{index:04d}.wav" for index in range(N_CLIPS)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--views", "5"], "found --views 5 without --augment"),
        (["--augment", "mixup"], "found --augment without --views"),
        (["--augment-seed", "1"], "found --augment-seed without --augment"),
        (["--views", "5", "--augment", "noise"], "found --augment 'noise', expected mixup, shift"),
        (["--views", "5", "--augment", "gain", "--augment", "gain"], "found --augment gain twice"),
        (
            ["--views", "5", "--augment", "mixup:q=1"],
            "found 'q' in --augment mixup:q=1, expected p",
        ),
        (["--views", "5", "--augment", "shift:max_s=far"], "found 'max_s=far' in"),
        (["--views", "5", "--augment", "mixup:max_sources=1.5"], "found 'max_sources=1.5' in"),
        (["--views", "5", "--augment", "mixup:p=2"], "mixup: p must be between 0 and 1, found 2"),
    ],
)
def test_misuse_leaves_with_2_and_says_what_to_type(
    more: list[str], words: str, clip_table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["extract", str(clip_table), "--encoder", "fake", "--out", "x.bank", *more]
    assert main(line) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_table_that_has_views_is_refused(clip_table: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_table.parent, tmp_path / "set"))
    (folder / "clips.csv").write_text(
        "clip_id,path,split,view\na,audio/0000.wav,train,0\na,audio/0001.wav,train,1\n"
    )
    with pytest.raises(
        ManifestError, match=r"clips\.csv:view: found view 1 of 'a', expected clean"
    ):
        extract(folder / "clips.csv", encoder="fake", out=tmp_path / "x.bank", settings=MADE)
    assert not (tmp_path / "x.bank").exists()
