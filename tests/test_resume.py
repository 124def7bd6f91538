"""A run that is stopped at any moment goes on, to the same results."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needle_sets import NeedleBank, clip_table, needle_tokens

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.errors import BankMismatch, TrialError
from patchbank.probing import checkpoint
from patchbank.probing.batch import ArraySource, Batch, LayerTokens
from patchbank.probing.checkpoint import Checkpoint, State
from patchbank.probing.entries import parse_probe
from patchbank.probing.run import run_training
from patchbank.probing.settings import SearchSettings, TrainSettings

SEARCH = SearchSettings(n_candidates=4, first="sobol", n_rounds=1, n_a_round=3, halving_epochs=(1,))
SETTINGS = TrainSettings(
    n_epochs=2, n_seeds=2, batch_size=16, search=SEARCH, n_resamples=20, device="cpu"
)
PROBES = ["mlp:dropout=0.2", "ep", "knn"]


class Stopped(Exception):
    """As sudden as a kill: nothing is written on its account."""


class Stopping(ArraySource):
    """Tokens that end the world after some batches."""

    n_left = 10**9
    n_read = 0

    def read(self, batches: Any) -> Iterator[Batch]:
        for batch in super().read(batches):
            if self.n_left == 0:
                raise Stopped
            self.n_left -= 1
            self.n_read += 1
            yield batch


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run_training` takes for 60 clips; checkpoints after every batch."""
    monkeypatch.setattr(checkpoint, "LEAST_BETWEEN_S", 0.0)
    monkeypatch.setattr(checkpoint, "MOST_SHARE", 1e9)
    tokens, targets = needle_tokens(60)
    recordings = [row // 2 for row in range(60)]
    columns = {
        "fold": [("a", "b", "c")[one % 3] for one in recordings],
        "split": [("train", "train", "valid", "test")[one % 4] for one in recordings],
    }
    bank = NeedleBank(clip_table(60, **columns), tokens)
    rows = zip(bank.clips["clip_id"].to_pylist(), targets, strict=True)
    lines = [f"{name},{';'.join(f'c{n}' for n in np.flatnonzero(row))}" for name, row in rows]
    (tmp_path / "labels.csv").write_text("\n".join(["clip_id,labels", *lines]))
    return {
        "bank": bank,
        "labels": tmp_path / "labels.csv",
        "probes": ["linear"],
        "settings": SETTINGS,
    }


@pytest.fixture
def job_in_folds(job: dict[str, Any]) -> dict[str, Any]:
    """Three folds, and probes with dropout, running statistics and a memory."""
    return {**job, "folds": "fold", "probes": list(map(parse_probe, PROBES))}


def source_of(job: dict[str, Any], n_left: int = 10**9) -> Stopping:
    found = Stopping({2: LayerTokens(job["bank"].tokens)})
    found.n_left = n_left
    return found


def run(job: dict[str, Any], out: Path, source: Stopping, **more: Any) -> dict[str, Any]:
    return run_training(out=out, source=lambda layers: source, **job, **more)


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in results.items() if name != "test_scored"}


def files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.suffix in (".parquet", ".safetensors")
    }


def test_stopped_again_and_again_it_ends_with_the_same_results(
    job_in_folds: dict[str, Any], tmp_path: Path
) -> None:
    job = job_in_folds
    whole = source_of(job)
    expected = run(job, tmp_path / "whole", whole)
    out, n_stops, said, n_read = tmp_path / "stopped", 0, list[str](), 0
    while True:
        # A prime, so that it stops at other places of an epoch each time.
        source = source_of(job, 7)
        try:
            found = run(job, out, source, say=said.append)
        except Stopped:
            n_stops += 1
            n_read += source.n_read
            continue
        n_read += source.n_read
        break
    assert n_stops > 10
    assert without_times(found) == without_times(expected)
    assert files(out) == files(tmp_path / "whole")
    assert not (out / ".checkpoints").exists()
    # What judges a stage is read anew where it was cut short; what trains is not.
    assert n_read < whole.n_read + 7 * n_stops
    assert any(line.startswith("fold=b search 2/2: goes on after") for line in said)
    assert "fold=a search: left are 1 of 2 rounds and the final runs" in said


def test_the_test_split_is_scored_once_unless_that_was_cut_short(
    job: dict[str, Any], tmp_path: Path
) -> None:
    results = run(job, tmp_path / "whole", source_of(job))
    assert [(one["split"], one["probes"]) for one in results["test_scored"]] == [
        ("split", ["linear"])
    ]
    source = source_of(job)
    said: list[str] = []
    again = run(job, tmp_path / "whole", source, say=said.append)
    assert again == results
    assert source.n_read == 0
    assert said == [f"nothing is left to do: {tmp_path / 'whole'} has the results of this very run"]


def test_another_run_is_refused_and_can_replace_the_first_but_not_its_test_record(
    job: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(job, out, source_of(job))
    other = {**job, "settings": replace(SETTINGS, n_epochs=1)}
    with pytest.raises(BankMismatch, match=r"settings\.n_epochs: found 1, expected 2"):
        run(other, out, source_of(job))
    assert (out / "results.json").is_file()
    results = run(other, out, source_of(job), overwrite=True)
    assert len(results["test_scored"]) == 2
    assert len({one["run"] for one in results["test_scored"]}) == 2


def test_a_changed_label_table_is_another_run(job: dict[str, Any], tmp_path: Path) -> None:
    run(job, tmp_path / "run", source_of(job))
    table = job["labels"]
    table.write_text(table.read_text().replace("c0", "d0"))
    with pytest.raises(BankMismatch, match=r"labels\.labels: found"):
        run(job, tmp_path / "run", source_of(job))


def test_two_processes_do_not_work_in_one_folder(job: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"

    def meddle(line: str) -> None:
        with pytest.raises(TrialError, match="another train-probe is at work in"):
            run(job, out, source_of(job))
        told.append(line)

    told: list[str] = []
    with pytest.raises(Stopped):
        run(job, out, source_of(job, 5))
    run(job, out, source_of(job), say=meddle)
    assert told


def test_a_damaged_checkpoint_says_what_to_do(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(job, tmp_path / "run", source_of(job, 3))
    [path] = (tmp_path / "run/.checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrialError, match="remove that file to begin this stage again"):
        run(job, tmp_path / "run", source_of(job))
    path.unlink()
    run(job, tmp_path / "run", source_of(job))


def test_a_damaged_description_is_not_taken_for_the_same_run(
    job: dict[str, Any], tmp_path: Path
) -> None:
    run(job, tmp_path / "run", source_of(job))
    (tmp_path / "run/run.json").write_text("{")
    with pytest.raises(TrialError, match="holds results that cannot be told from these"):
        run(job, tmp_path / "run", source_of(job))


def test_a_checkpoint_is_written_when_it_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, n_asked = tmp_path / "a/stage.safetensors", 0

    def state() -> State:
        nonlocal n_asked
        n_asked += 1
        return State({"x": torch.arange(3.0)}, {"step": n_asked, "values": [[[1, -np.inf]]]})

    kept = Checkpoint(path)
    kept.save(state)
    assert (n_asked, kept.load()) == (0, None)
    kept.save(state, always=True)
    monkeypatch.setattr(checkpoint, "LEAST_BETWEEN_S", 0.0)
    monkeypatch.setattr(checkpoint, "MOST_SHARE", 1e9)
    kept = Checkpoint(path)
    kept.save(state)
    found = kept.load()
    assert found is not None
    assert found.facts == {"step": 2, "values": [[[1, -np.inf]]]}
    assert found.arrays["x"].tolist() == [0, 1, 2]


def test_overwriting_takes_away_what_the_run_left_and_nothing_else(
    job: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    run({**job, "probes": ["linear"]}, out / "inner", source_of(job))
    (out / "notes").mkdir()
    (out / "notes/results.json").write_text("mine")
    first = run({**job, "probes": ["linear"]}, out, source_of(job))
    (out / "tensorboard/search").mkdir(parents=True)
    with pytest.raises(BankMismatch, match=r"probes\.linear: found None"):
        run({**job, "probes": ["mhca"]}, out, source_of(job))
    run({**job, "probes": ["mhca"]}, out, source_of(job), overwrite=True)
    assert not (out / "linear").exists()
    assert not (out / "tensorboard").exists()
    assert (out / "mhca/probe.json").is_file()
    assert (out / "notes/results.json").read_text() == "mine"
    assert json.loads((out / "inner/results.json").read_text())["scores"] == first["scores"]
    assert (out / "inner/linear/probe.json").is_file()


def test_the_folder_of_a_label_table_is_not_taken_from_another_run(
    job: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text(job["labels"].read_text())
    run(job, tmp_path / "runs/other", source_of(job))
    both = {**job, "labels": [job["labels"], other]}
    with pytest.raises(TrialError, match="other is the folder of another run"):
        run(both, tmp_path / "runs", source_of(job), overwrite=True)
    assert (tmp_path / "runs/other/results.json").is_file()


def test_half_a_line_in_the_test_record_stops_nothing(job: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "test-scored.jsonl").write_bytes(b'{"utc": "2026-01-01", "sp')
    first, second = run(job, out, source_of(job))["test_scored"]
    assert first == {"unreadable": '{"utc": "2026-01-01", "sp'}
    assert second["split"] == "split"


def test_a_stage_goes_on_only_on_the_device_that_began_it(
    job: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        run(job, tmp_path / "run", source_of(job, 3))
    [path] = (tmp_path / "run/.checkpoints").iterdir()
    kept = Checkpoint(path)
    state = kept.load()
    assert state is not None
    kept.save(lambda: State(state.arrays, {**state.facts, "device": "cuda"}), always=True)
    with pytest.raises(TrialError, match="begun on cuda, found cpu; go on with --device cuda"):
        run(job, tmp_path / "run", source_of(job))


def test_a_full_disk_leaves_the_checkpoint_before_and_is_one_clear_error(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "stage.safetensors")
    kept.save(lambda: State({"x": torch.zeros(10)}, {"step": 1}), always=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write it"):
            kept.save(lambda: State({"x": torch.zeros(10_000)}, {"step": 2}), always=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = kept.load()
    assert state is not None
    assert state.facts["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["stage.safetensors"]


def test_checkpoints_that_a_kill_left_at_the_very_end_are_removed(
    job: dict[str, Any], tmp_path: Path
) -> None:
    run(job, tmp_path / "run", source_of(job))
    (tmp_path / "run/.checkpoints").mkdir()
    run(job, tmp_path / "run", source_of(job))
    assert not (tmp_path / "run/.checkpoints").exists()


# Processes, as a person starts and stops them.


def line_of(sealed: Bank, labels: Path, out: Path) -> list[str]:
    settings = ["--epochs", "40", "--batch-size", "1", "--seeds", "1", "--sweep", "2"]
    line = ["train-probe", str(sealed.path)]
    return [*line, "--labels", str(labels), "--out", str(out), "--probe", "linear", *settings]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(line: list[str], log: Path) -> subprocess.Popen[bytes]:
    code = "from patchbank.cli.main import run; run()"
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, *line], stdout=file, stderr=file, env=ENVIRONMENT
        )


def wait_for(process: subprocess.Popen[bytes], path: Path, patience_s: float = 60.0) -> None:
    end = time.monotonic() + patience_s
    while not path.exists():
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ctrl_c_keeps_what_was_trained_and_kill_9_what_a_checkpoint_holds(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log.txt"
    labels = clip_table.parent / "labels.csv"
    line = line_of(sealed, labels, out)
    # It has asked what to try, so it trains by now or will in a moment.
    process = start(line, log)
    wait_for(process, out / "search.journal")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = log.read_text()
    assert "search: stopped after" in said
    assert "interrupted; the same command goes on from here" in said
    assert len(list((out / ".checkpoints").iterdir())) == 1
    process = start(line, log)
    end = time.monotonic() + 60
    while "search: goes on after" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    process.wait(60)
    both = [start(line, log), start(line_of(sealed, labels, tmp_path / "whole"), log)]
    assert [process.wait(240) for process in both] == [0, 0]
    results = json.loads((out / "results.json").read_text())
    expected = json.loads((tmp_path / "whole/results.json").read_text())
    assert without_times(results) == without_times(expected)
    assert files(out) == files(tmp_path / "whole")
