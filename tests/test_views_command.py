"""`patchbank extract --views`: the command, what follows it, and its misuse."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from fake_bank import N_CLIPS
from made_views import MADE

from patchbank.cli.extract_report import failures
from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
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


FAST = ["--probe", "linear", "--epochs", "2", "--seeds", "1", "--lr", "0.05"]


def sheets(made: Bank, folder: Path) -> tuple[Path, Path]:
    """Labels of one class a clip, and a split that has nothing to do with the bank's."""
    labels, splits = folder / "labels.csv", folder / "splits.csv"
    names = [row["clip_id"] for row in made.clips.to_pylist() if not row["view"]]
    labels.write_text(
        "\n".join(["clip_id,labels", *(f"{name},c{n % 3}" for n, name in enumerate(names))])
    )
    parts = ["train", "train", "train", "valid", "test"]
    splits.write_text(
        "\n".join(["clip_id,split", *(f"{name},{parts[n % 5]}" for n, name in enumerate(names))])
    )
    return labels, splits


def test_another_split_leaves_out_the_views_that_cross_it(
    made: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, splits = sheets(made, tmp_path)
    line = ["train-probe", str(made.path), "--labels", str(labels), "--splits", str(splits)]
    assert main([*line, "--out", str(tmp_path / "run"), *FAST]) == 0
    said = capsys.readouterr()
    facts = json.loads((tmp_path / "run/results.json").read_text())
    [fold] = facts["folds"]
    part_of = dict(row.split(",") for row in splits.read_text().splitlines()[1:])
    views = [row for row in made.clips.to_pylist() if row["view"]]
    wanted = [row for row in views if part_of[row["clip_id"]] == "train"]
    kept = [
        row
        for row in wanted
        if all(part_of[name] == "train" for name in (row["clip_id"], *row["mix_sources"]))
    ]
    assert 0 < len(kept) < len(wanted)
    n_left_out = len(wanted) - len(kept)
    assert (fold["views"], fold["views_left_out"]) == (len(wanted), n_left_out)
    assert (fold["train"], fold["unused"]) == (24 + len(kept), 0)
    words = f"{n_left_out} of {len(wanted)} views are left out: what is mixed into them lies in"
    assert words in said.err
    out = " ".join(said.out.split())
    assert f"{n_left_out} of {len(wanted)} views left out of training" in out
    assert "in no split" not in out
    assert facts["task"] == "multi-class"
    assert "accuracy" in {row["metric"] for row in facts["scores"]}


def test_clean_clips_alone_train_on_request(made: Bank, tmp_path: Path) -> None:
    labels, splits = sheets(made, tmp_path)
    line = ["train-probe", str(made.path), "--labels", str(labels), "--splits", str(splits)]
    line += ["--task", "multiclass", "--no-views", "--out", str(tmp_path / "run"), *FAST]
    assert main(line) == 0
    [fold] = json.loads((tmp_path / "run/results.json").read_text())["folds"]
    assert (fold["train"], fold["valid"], fold["test"], fold["views"]) == (24, 8, 8, 0)


def test_a_table_with_views_says_which_rows_are_converted(
    made: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "clean.csv"
    names = [row["clip_id"] for row in made.clips.to_pylist() if not row["view"]]
    table.write_text("\n".join(["clip_id,view", *(f"{name},0" for name in names)]))
    line = ["bank", "convert", str(made.path), "--clips", str(table), "--out"]
    assert main([*line, str(tmp_path / "clean.bank")]) == 0
    clips = open_bank(tmp_path / "clean.bank").clips
    assert clips["clip_id"].to_pylist() == names
    assert set(clips["view"].to_pylist()) == {0}
    table.write_text(f"clip_id,view\n{names[0]},0\n{names[0]},7\n")
    assert main([*line, str(tmp_path / "other.bank")]) == 1
    found = " ".join(capsys.readouterr().err.split())
    assert f"clean.csv:3:view: no view '7' of '{names[0]}' in" in found


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--views", "5"], "found --views 5 without --augment"),
        (["--views", "32768", "--augment", "gain"], "found --views 32768, expected at most 32,767"),
        (["--views", "-1", "--augment", "gain"], "Invalid value for '--views'"),
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


def failing(n_views: int, *, of: str, reason: str) -> list[dict[str, object]]:
    """A clip and its views, all of which failed."""
    return [
        {"clip_id": of, "view": view, "status": 2, "reason": reason} for view in range(n_views + 1)
    ]


def test_failures_name_the_view_and_many_of_one_reason_take_a_line() -> None:
    rows = [
        {"clip_id": "good", "view": 0, "status": 1, "reason": None},
        *failing(2, of="a", reason="no such file"),
        *failing(3, of="b", reason="no such file"),
        *failing(4, of="c", reason="is empty"),
        *failing(2, of="d", reason="no such file"),
        {"clip_id": None, "view": None, "status": 3, "reason": None},
    ]
    assert list(failures(pa.Table.from_pylist(rows))) == [
        "failed: a: no such file",
        "failed: 7 views, first view 1 of a: no such file",
        "failed: b: no such file",
        "failed: c: is empty",
        "failed: view 1 of c: is empty",
        "failed: view 2 of c: is empty",
        "failed: view 3 of c: is empty",
        "failed: view 4 of c: is empty",
        "failed: d: no such file",
    ]


def test_a_source_that_fails_many_views_is_told_once(
    clip_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(clip_table.parent, tmp_path / "set"))
    nan = np.full(16_000, np.nan, np.float32)
    soundfile.write(folder / "audio/0001.wav", nan, 16_000, subtype="FLOAT")
    line = ["extract", str(folder / "clips.csv"), "--encoder", "fake", "--window-s", "1"]
    line += ["--views", "9", "--augment", "mixup:p=1", "--out", str(tmp_path / "x.bank")]
    assert main(line) == 0
    said = [row for row in capsys.readouterr().err.splitlines() if row.startswith("failed: ")]
    clips = open_bank(tmp_path / "x.bank").clips.to_pylist()
    n_mixed = sum("audio/0001.wav" in row["mix_sources"] for row in clips)
    first = next(row for row in clips if "audio/0001.wav" in row["mix_sources"])
    reason = "16000 of 16000 samples are NaN or infinite"
    assert sorted(said) == sorted(
        [
            f"failed: audio/0001.wav: {reason}",
            f"failed: 9 views, first view 1 of audio/0001.wav: {reason}",
            f"failed: {n_mixed} views, first view {first['view']} of {first['clip_id']}: "
            f"'audio/0001.wav', which is mixed in: {reason}",
        ]
    )


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
