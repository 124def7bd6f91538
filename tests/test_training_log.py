from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from patchbank.cli.main import main


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from audio_sets import write_clip_set

    folder = tmp_path_factory.mktemp("job")
    write_clip_set(folder / "set", n_clips=24)
    line = ["extract", str(folder / "set/clips.csv"), "--encoder", "fake", "--window-s", "1"]
    assert main([*line, "--out", str(folder / "fake.bank")]) == 0
    return folder


def train_line(job: Path, out: Path, *more: str) -> list[str]:
    line = ["train-probe", str(job / "fake.bank"), "--labels", str(job / "set/labels.csv")]
    line += ["--out", str(out), "--probe", "linear", "--probe", "protobin", "--epochs", "3"]
    return [*line, "--seeds", "2", "--sweep", "3", "--device", "cpu", *more]


def read_runs(folder: Path) -> dict[str, Any]:
    """What TensorBoard itself reads, by run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = {}
    for path in sorted({file.parent for file in folder.rglob("events.out.tfevents*")}):
        runs[path.relative_to(folder).as_posix()] = EventAccumulator(str(path)).Reload()
    return runs


def test_every_trial_is_a_run_and_every_probe_a_chart(job: Path, tmp_path: Path) -> None:
    assert main(train_line(job, tmp_path / "run", "--log-to", "tensorboard")) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    runs = read_runs(tmp_path / "run/tensorboard")
    trials = [f"search/trial {number:02}" for number in range(3)]
    assert sorted(runs) == [
        *("final/seed 0", "final/seed 1", "scores/linear", "scores/protobin"),
        *trials,
    ]
    for probe in ("linear", "protobin"):
        tried = results["probes"][probe]["search"][0]["candidates"]
        for trial, candidate in zip(trials, tried, strict=True):
            losses = runs[trial].Scalars(f"{probe}/loss")
            assert [one.step for one in losses] == [1, 2, 3]
            assert all(0 < one.value < 10 for one in losses)
            [score] = runs[trial].Scalars(f"{probe}/accuracy")
            assert (score.step, score.value) == (3, pytest.approx(candidate["score"]))
            [text] = runs[trial].Tensors(f"{probe}/setting/text_summary")
            said = text.tensor_proto.string_val[0].decode()
            assert f"learning rate {candidate['learning_rate']:.3g}, " in said
        test = {
            row["metric"]: row["mean"]
            for row in results["scores"]
            if (row["probe"], row["split"]) == (probe, "test")
        }
        [value] = runs[f"scores/{probe}"].Scalars("test/accuracy")
        assert value.value == pytest.approx(test["accuracy"])
        assert "_hparams_/session_start_info" in runs[f"scores/{probe}"].summary_metadata


def test_logs_go_where_they_are_sent_and_say_the_fold_and_the_labels(
    job: Path, tmp_path: Path
) -> None:
    (tmp_path / "again.csv").write_text((job / "set/labels.csv").read_text())
    line = train_line(job, tmp_path / "run", "--log-to", f"tensorboard:{tmp_path / 'logs'}")
    line += ["--labels", str(tmp_path / "again.csv")]
    assert main(line) == 0
    assert not (tmp_path / "run/tensorboard").exists()
    runs = read_runs(tmp_path / "logs")
    assert {"scores/again/linear", "scores/labels/protobin", "final/seed 1"} <= set(runs)
    tags = runs["final/seed 1"].Tags()["scalars"]
    assert {"again/linear/loss", "labels/protobin/accuracy"} <= set(tags)


def test_another_target_is_refused_by_name(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_line(job, tmp_path / "run", "--log-to", "wandb:mine")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "--log-to takes tensorboard, or tensorboard:DIR, found 'wandb:mine'" in said


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    job: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [one for one in sys.modules if one.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(train_line(job, tmp_path / "run", "--log-to", "tensorboard")) == 1
    said = capsys.readouterr().err
    assert "pip install 'patchbank[tensorboard]'" in said
    assert not (tmp_path / "run/results.json").exists()
