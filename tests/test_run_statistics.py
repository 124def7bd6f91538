"""What a run says of groups, leakage, classes and pairs of probes."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from needle_sets import NeedleBank, clip_table, needle_tokens
from rich.console import Console
from sklearn.metrics import average_precision_score, roc_auc_score

from patchbank.pipeline.errors import TrialError
from patchbank.probing import run
from patchbank.probing.artefact import load_probe
from patchbank.probing.batch import TokenSource
from patchbank.probing.comparison import p_value
from patchbank.probing.results import format_comparisons
from patchbank.probing.settings import SearchSettings, TrainSettings

N_CLIPS = 60
SETTINGS = TrainSettings(
    n_epochs=2,
    n_seeds=2,
    search=SearchSettings(n_candidates=1),
    batch_size=20,
    n_resamples=40,
    device="cpu",
)
PARTS = ["train"] * 28 + ["valid"] * 12 + ["test"] * 20
TEST = slice(40, 60)
TOKENS, TARGETS = needle_tokens(N_CLIPS, n_patches=6, dim=8, n_classes=3)


def train(
    out: Path,
    *,
    tokens: torch.Tensor = TOKENS,
    targets: np.ndarray = TARGETS,
    parts: list[str] | None = None,
    columns: dict[str, list[Any]] | None = None,
    unreadable: bool = False,
    **more: Any,
) -> dict[str, Any]:
    bank = NeedleBank(clip_table(len(tokens), split=parts or PARTS, **(columns or {})), tokens)
    ids = bank.clips["clip_id"].to_pylist()
    lines = [
        f"{clip_id},{';'.join('abc'[index] for index in np.flatnonzero(row))}"
        for clip_id, row in zip(ids, targets, strict=True)
    ]
    out.mkdir(exist_ok=True)
    (out / "labels.csv").write_text("\n".join(["clip_id,labels", *lines]))

    def refuse(layers: Any) -> TokenSource:
        raise AssertionError("tokens were read")

    arguments = {"probes": ["linear", "knn"], "settings": SETTINGS} | more
    source = refuse if unreadable else bank.source
    return run.run_training(bank, out / "labels.csv", out, source=source, **arguments)


def test_a_split_that_cuts_recordings_is_refused_before_a_token_is_read(tmp_path: Path) -> None:
    with pytest.raises(TrialError, match=r"1 by path: 'r14.wav' in train and valid\n"):
        train(tmp_path, parts=["train"] * 29 + PARTS[29:], unreadable=True)
    assert not (tmp_path / "results.json").exists()


def test_a_group_across_splits_is_refused_and_counted_on_request(tmp_path: Path) -> None:
    columns = {"site": ["hill"] * 30 + [f"site{row // 2}" for row in range(30)]}
    with pytest.raises(TrialError, match="1 by site: 'hill' in train and valid"):
        train(tmp_path, columns=columns, group="site", unreadable=True)
    results = train(tmp_path, columns=columns, group="site", allow_leakage=True)
    assert results["leakage"] == {"site": 1, "path": 0, "audio_sha256": None}
    assert results["bootstrap_over"] == {"column": "site", "n_groups": 10}
    assert train(tmp_path / "plain")["leakage"] == {"path": 0, "audio_sha256": None}


def test_clips_of_one_recording_are_drawn_together(tmp_path: Path) -> None:
    """Twice the same clip in each recording: as wide an interval as of one clip each."""
    tokens, targets = TOKENS.clone(), TARGETS.copy()
    tokens[1::2], targets[1::2] = tokens[::2], targets[::2]
    columns = {"group": [f"clip{row}" for row in range(N_CLIPS)]}
    paired = train(tmp_path / "paired", tokens=tokens, targets=targets)
    alone = train(tmp_path / "alone", tokens=tokens, targets=targets, columns=columns)
    assert paired["bootstrap_over"] == {"column": "path", "n_groups": 10}
    assert alone["bootstrap_over"] == {"column": "group", "n_groups": 20}

    def width(results: dict[str, Any]) -> float:
        row = next(row for row in results["scores"] if row["split"] == "test")
        return float(row["ci95"][1] - row["ci95"][0])

    assert width(paired) > 1.1 * width(alone)


def test_comparisons_are_of_the_stored_samples(tmp_path: Path) -> None:
    results = train(tmp_path, probes=["linear", "knn", "mhca"])
    table = pq.read_table(tmp_path / "resamples.parquet").to_pylist()
    samples = {(row["probe"], row["metric"]): np.array(row["samples"]) for row in table}
    assert len(samples) == 3 * 5
    means = {
        row["probe"]: row["mean"]
        for row in results["scores"]
        if (row["split"], row["metric"]) == ("test", "map_macro")
    }
    assert len(results["comparisons"]) == 3
    for row in results["comparisons"]:
        assert row["difference"] == means[row["a"]] - means[row["b"]] >= 0
        differences = samples[row["a"], "map_macro"] - samples[row["b"], "map_macro"]
        assert row["ci95"] == pytest.approx(np.quantile(differences, [0.025, 0.975]))
        assert row["p"] == p_value(row["difference"], differences)
    clips = pq.read_table(tmp_path / "test-clips.parquet").to_pylist()
    assert clips[0] == {
        "fold": "split",
        "clip_id": "r20/0",
        "group": "r20.wav",
        "labels": ["abc"[index] for index in np.flatnonzero(TARGETS[40])],
    }
    assert len(clips) == 20


def read_classes(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_class_has_its_clips_and_scores(tmp_path: Path) -> None:
    targets = TARGETS.copy()
    targets[TEST, 2] = 0
    train(tmp_path, targets=targets, settings=replace(SETTINGS, n_seeds=1))
    rows = read_classes(tmp_path / "linear/per-class.csv")
    scores = load_probe(tmp_path / "linear").predict_proba(TOKENS[TEST])
    assert [row["class"] for row in rows] == ["a", "b", "c"]
    for index, row in enumerate(rows):
        for part, rows_of_part in (("train", slice(28)), ("valid", slice(28, 40)), ("test", TEST)):
            assert float(row[f"n_{part}"]) == targets[rows_of_part, index].sum()
        assert row["average_precision_std"] == row["auroc_std"] == ""
        if index == 2:
            assert row["average_precision"] == row["auroc"] == ""
            continue
        truth = targets[TEST, index]
        expected = average_precision_score(truth, scores[:, index])
        assert float(row["average_precision"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["auroc"]) == pytest.approx(
            roc_auc_score(truth, scores[:, index]), rel=1e-4
        )


def test_classes_of_folds_are_means_over_folds_and_have_recalls(tmp_path: Path) -> None:
    targets = np.eye(3, dtype=np.float32)[np.arange(N_CLIPS) % 3]
    columns = {"fold": [row // 2 % 3 for row in range(N_CLIPS)]}
    results = train(tmp_path, targets=targets, columns=columns, folds="fold")
    rows = read_classes(tmp_path / "linear/per-class.csv")
    assert [row["n_test"] for row in rows] == ["20", "20", "20"]
    assert [row["n_train"] for row in rows] == ["6.66667"] * 3
    means = {
        row["metric"]: row["mean"]
        for row in results["scores"]
        if (row["probe"], row["split"]) == ("linear", "test")
    }
    # Every fold has every class, so the mean over classes and folds may be taken in any order.
    for metric, column in (
        ("map_macro", "average_precision"),
        ("auroc_macro", "auroc"),
        ("balanced_accuracy", "recall"),
    ):
        values = [float(row[column]) for row in rows]
        assert np.mean(values) == pytest.approx(means[metric], rel=1e-4)
        assert any(float(row[f"{column}_std"]) > 0 for row in rows)


def test_one_test_clip_gives_results_without_a_test(tmp_path: Path) -> None:
    parts = ["train"] * 28 + ["valid"] * 12 + ["test"] + [""] * 19
    targets = TARGETS.copy()
    targets[40] = [1, 0, 0]
    results = train(tmp_path, parts=parts, targets=targets)
    [row] = results["comparisons"]
    assert (row["difference"], row["p"], row["p_holm"]) == (0, None, None)
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    missing = {
        row["metric"]
        for row in results["scores"]
        if (row["probe"], row["split"], row["mean"]) == ("knn", "test", None)
    }
    assert missing == {"auroc_macro", "d_prime"}


def test_perfect_scores_have_no_d_prime_in_json(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(N_CLIPS, n_patches=1, dim=8, n_classes=2, multi_label=False)
    bank = NeedleBank(clip_table(N_CLIPS, split=PARTS), tokens)
    (tmp_path / "labels.csv").write_text(
        "clip_id,labels\n"
        + "".join(
            f"{clip_id},{'ab'[row.argmax()]}\n"
            for clip_id, row in zip(bank.clips["clip_id"].to_pylist(), targets, strict=True)
        )
    )
    results = run.run_training(
        bank, tmp_path / "labels.csv", tmp_path, probes=["knn"], settings=SETTINGS,
        source=bank.source,
    )  # fmt: skip
    found = {row["metric"]: row for row in results["scores"] if row["split"] == "test"}
    assert found["auroc_macro"]["mean"] == 1
    d_prime = found["d_prime"]
    assert (d_prime["mean"], d_prime["std"], d_prime["ci95"]) == (None, None, [None, None])
    assert results["comparisons"] == []
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_table_of_pairs_names_the_best_and_fits_80_columns(tmp_path: Path) -> None:
    results = train(tmp_path, probes=["linear", "knn", "protobin"])
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(format_comparisons(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    best = results["comparisons"][0]["a"]
    assert f"{best} against the others, map_macro" in words
    assert "10 groups of test clips by path resampled 40 times" in words
    assert "p corrected for 3 pairs (Holm)" in words
    assert f"{results['comparisons'][0]['p_holm']:.3f}" in words
