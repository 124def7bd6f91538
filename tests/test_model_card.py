"""README.md of a probe's folder, and what a run stores beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import yaml
from needle_sets import NeedleBank, clip_table, needle_tokens
from sklearn.metrics import f1_score, log_loss

from patchbank.probing.artefact import ProbeArtefact, load_probe
from patchbank.probing.calibration import HIGHEST_TEMPERATURE
from patchbank.probing.evaluation import Fold
from patchbank.probing.labels import read_labels
from patchbank.probing.model_card import MOST_CLASSES, model_card
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.protocol import train
from patchbank.probing.run import run_training
from patchbank.probing.run_files import FinishedRun, write_run
from patchbank.probing.settings import SearchSettings, TrainSettings
from patchbank.probing.splits import read_splits

SETTINGS = TrainSettings(
    n_epochs=3, n_seeds=2, search=SearchSettings(n_candidates=1), n_resamples=100, device="cpu"
)
SPLITS = [("train", "train", "valid", "test")[clip % 4] for clip in range(120)]


def table_of(folder: Path, bank: NeedleBank, targets: np.ndarray) -> Path:
    rows = ["clip_id,labels"]
    for name, row in zip(bank.clips["clip_id"].to_pylist(), targets, strict=True):
        rows.append(f"{name},{';'.join(f'class{one}' for one in np.flatnonzero(row))}")
    path = folder / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A run on needles, and tokens and targets of its validation clips."""
    folder = tmp_path_factory.mktemp("run")
    tokens, targets = needle_tokens(120)
    targets[:, 0] = 1
    targets[2::4, 3] = 0
    card = {"encoder": {"name": "needle"}, "window": {"window_s": 10.0}, "licence": "CC BY-NC 4.0"}
    bank = NeedleBank(clip_table(120, split=SPLITS), tokens, card=card)
    labels = table_of(folder, bank, targets)
    command = ["patchbank", "train-probe", "my bank", "--out", "run"]
    run_training(
        bank,
        labels,
        folder / "run",
        probes=["mhca"],
        settings=SETTINGS,
        source=bank.source,
        command=command,
    )
    return folder / "run/mhca", tokens[2::4].numpy(), targets[2::4]


def test_a_run_stores_what_validation_clips_chose(
    run: tuple[Path, np.ndarray, np.ndarray],
) -> None:
    folder, tokens, targets = run
    probe = load_probe(folder)
    found = probe.predict_proba(tokens)
    facts = probe.validation
    assert facts["n_clips"] == 30
    assert facts["nll_after"] == pytest.approx(log_loss(targets.ravel(), found.ravel()), rel=1e-4)
    plain = replace(probe, temperature=1.0).predict_proba(tokens)
    assert facts["nll_before"] == pytest.approx(log_loss(targets.ravel(), plain.ravel()), rel=1e-4)
    assert facts["nll_after"] <= facts["nll_before"]
    assert probe.temperature != 1
    assert (probe.default_thresholds, probe.thresholds[3]) == (("class3",), 0.5)
    reached = f1_score(targets, probe.decide(found), average=None, zero_division=0)
    assert facts["f1"][:3] == pytest.approx(reached[:3].tolist())
    assert facts["f1"][3] is None


def test_a_run_stores_how_it_was_trained(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    training = load_probe(run[0]).training
    assert training["bank"] == "f" * 64
    assert training["recipe_id"] == "d" * 64
    assert training["settings"] == json.loads(json.dumps(asdict(SETTINGS)))
    assert training["environment"]["device"] == "cpu"
    for package in ("scipy", "optuna", "torch"):
        assert training["environment"][package] == version(package)
    assert training["command"] == ["patchbank", "train-probe", "my bank", "--out", "run"]
    assert set(training) == {
        "bank", "recipe_id", "fold", "learning_rate", "weight_decay", "seed", "valid_score",
        "settings", "environment", "command",
    }  # fmt: skip


def test_the_card_has_a_header_that_hubs_read(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    text = (run[0] / "README.md").read_text(encoding="utf-8")
    _, header, _ = text.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "patchbank",
        "pipeline_tag": "audio-classification",
        "tags": ["audio-classification", "patchbank", "probe"],
        "license": "cc-by-nc-4.0",
        "metrics": ["map_macro", "map_micro", "auroc_macro"],
    }


def test_the_card_says_what_the_run_found(run: tuple[Path, np.ndarray, np.ndarray]) -> None:
    folder = run[0]
    probe, text = load_probe(folder), (folder / "README.md").read_text(encoding="utf-8")
    results = json.loads((folder.parent / "results.json").read_text())
    [row] = [
        row for row in results["scores"] if (row["split"], row["metric"]) == ("test", "map_macro")
    ]
    for stated in (
        "# mhca",
        "any number of 4 classes",
        "`needle`, layer 2",
        f"| test | map_macro | {row['mean']:.4f} | {row['std']:.4f} |",
        "| 30 | 2 |",
        f"T = {probe.temperature:.4g}",
        f"{probe.validation['nll_before']:.4f} at T = 1",
        f"| class1 | {probe.thresholds[1]:.4f} | {probe.validation['f1'][1]:.3f} |",
        "| class3 | 0.5000 | not chosen: no validation clip has it |",
        "1 classes have the default threshold 0.5",
        "patchbank train-probe 'my bank' --out run",
        '"n_epochs": 3',
        "The asymmetric loss trained it",
    ):
        assert stated in text
    assert str(folder.parent) not in text


def test_folds_choose_on_the_saved_folds_validation_clips(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(90, multi_label=False)
    bank = NeedleBank(clip_table(90, fold=[clip % 3 for clip in range(90)]), tokens)
    labels = read_labels(table_of(tmp_path, bank, targets), bank.clips)
    folds = []
    for split in read_splits(bank.clips, usable=labels.known, folds="fold"):
        outcomes = train(
            bank.source([2]),
            labels.targets,
            split,
            probes=["linear"],
            multi_label=False,
            settings=SETTINGS,
        )
        folds.append(Fold(split, outcomes))
    write_run(FinishedRun(bank, labels, tuple(folds), SETTINGS), tmp_path / "run")
    probe = load_probe(tmp_path / "run/linear")
    [split] = [fold.split for fold in folds if fold.split.name == probe.training["fold"]]
    found = probe.predict_proba(tokens[split.valid])
    expected = log_loss(labels.targets[split.valid].argmax(axis=1), found)
    assert probe.validation["nll_after"] == pytest.approx(expected, rel=1e-4)
    assert (probe.thresholds, probe.training["command"]) == ((), [])
    text = (tmp_path / "run/linear/README.md").read_text()
    assert "The decision is the likeliest class." in text
    assert "Trained from Python." in text
    assert f"among the folds, `{probe.training['fold']}`" in text
    assert "The asymmetric loss" not in text


def test_names_that_would_break_a_table_or_a_header_do_not() -> None:
    classes = ("cat|dog\nowl", *(f"c{index}" for index in range(MOST_CLASSES)))
    n = len(classes)
    probe = ProbeArtefact(
        probe="mine",
        options={},
        classes=classes,
        multi_label=True,
        shape=ProbeShape(4, n),
        weights={},
        temperature=HIGHEST_TEMPERATURE,
        thresholds=(0.5,) * n,
        validation={"n_clips": 3, "nll_before": 1.0, "nll_after": 0.5, "f1": [1.0] * n},
        plugin_sha256="a" * 64,
    )
    licence = 'Free: for "research", and nothing else at all'
    card = model_card(probe, name="mine", results={"scores": [], "left_out": []}, licence=licence)
    assert "| cat\\|dog owl | 0.5000 | 1.000 |" in card
    assert "1 more classes are in `probe.json`" in card
    assert "This T is a bound of the search" in card
    assert "--plugin FILE.py" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert (header["license"], header["license_name"]) == ("other", licence)
