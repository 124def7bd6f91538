"""The whole job on real recordings with a real trained encoder (EfficientAT mn04)."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank


def esc10_tables(shared: Path, folder: Path, *, every: int) -> Sequence[dict[str, str]]:
    """clips.csv and labels.csv over every `every`-th clip of each class of ESC-10."""
    with (shared / "sample/manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == "esc10"][::every]
    for name, columns in (("clips", ("path", "fold")), ("labels", ("path", "labels"))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([row[column] for column in columns] for row in rows)
    return rows


def extract_esc10(shared: Path, folder: Path) -> Bank:
    weights = shared / "weights/efficientat-mn04/mn04_as_mAP_432.pt"
    line = ["extract", str(folder / "clips.csv"), "--audio-root", str(shared / "sample")]
    line += ["--encoder", "efficientat", "--weights", str(weights), "--window-s", "5"]
    assert main([*line, "--out", str(folder / "esc10.bank")]) == 0
    return open_bank(folder / "esc10.bank")


def logistic_accuracy(bank: Bank, labels: Sequence[str]) -> float:
    """Mean accuracy over the folds, standardised mean tokens."""
    x, y = bank.pooled(17, "mean"), np.array(labels)
    folds = np.array(bank.clips["fold"].to_pylist())
    accuracies = []
    for fold in np.unique(folds):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1, max_iter=2000))
        model.fit(x[folds != fold], y[folds != fold])
        accuracies.append(model.score(x[folds == fold], y[folds == fold]))
    return float(np.mean(accuracies))


def linear_accuracy(folder: Path, *more: str) -> float:
    line = ["train-probe", str(folder / "esc10.bank"), "--labels", str(folder / "labels.csv")]
    line += ["--probe", "linear", "--folds", "fold", "--out", str(folder / "run"), *more]
    assert main(line) == 0
    results = json.loads((folder / "run/results.json").read_text())
    return next(
        float(score["mean"])
        for score in results["scores"]
        if (score["split"], score["metric"]) == ("test", "accuracy")
    )


def test_esc10_in_short(shared: Path, tmp_path: Path) -> None:
    rows = esc10_tables(shared, tmp_path, every=3)
    bank = extract_esc10(shared, tmp_path)
    assert (bank.status == 1).all()
    assert logistic_accuracy(bank, [row["labels"] for row in rows]) >= 0.95
    assert linear_accuracy(tmp_path, "--seeds", "1", "--lr", "0.007") >= 0.9


@pytest.mark.slow
def test_esc10_reaches_the_published_accuracy(shared: Path, tmp_path: Path) -> None:
    rows = esc10_tables(shared, tmp_path, every=1)
    bank = extract_esc10(shared, tmp_path)
    assert logistic_accuracy(bank, [row["labels"] for row in rows]) >= 0.98
    assert linear_accuracy(tmp_path) >= 0.97


@pytest.mark.slow
def test_prototypes_beat_a_linear_probe_on_polyphonic_audio(shared: Path, tmp_path: Path) -> None:
    mix = [sys.executable, str(shared / "sample/mix.py"), str(shared / "sample")]
    subprocess.run([*mix, str(tmp_path / "set"), "--train", "600"], check=True)
    weights = shared / "weights/efficientat-mn04/mn04_as_mAP_432.pt"
    line = ["extract", str(tmp_path / "set/clips.csv"), "--encoder", "efficientat"]
    bank = str(tmp_path / "poly.bank")
    assert main([*line, "--weights", str(weights), "--out", bank]) == 0
    line = ["train-probe", bank, "--labels", str(tmp_path / "set/labels.csv")]
    line += ["--probe", "linear", "--probe", "protobin", "--out", str(tmp_path / "run")]
    assert main(line) == 0
    scores = json.loads((tmp_path / "run/results.json").read_text())["scores"]
    mean = {
        s["probe"]: s["mean"] for s in scores if (s["split"], s["metric"]) == ("test", "map_macro")
    }
    assert mean["protobin"] - mean["linear"] >= 0.03
