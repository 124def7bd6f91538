"""`patchbank compare`: which runs it puts side by side, and which it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from needle_sets import NeedleBank, clip_table, needle_tokens

from patchbank.cli.main import main
from patchbank.pipeline.errors import TrialError
from patchbank.probing.comparison_runs import compare_runs
from patchbank.probing.run import run_training
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
TOKENS, TARGETS = needle_tokens(N_CLIPS, n_patches=6, dim=8, n_classes=3)
ONE_CLASS = np.eye(3, dtype=np.float32)[np.arange(N_CLIPS) % 3]


def run(
    folder: Path,
    *,
    targets: np.ndarray = TARGETS,
    parts: list[str] | None = None,
    order: np.ndarray | None = None,
    settings: TrainSettings = SETTINGS,
    probes: tuple[str, ...] = ("linear", "mhca", "knn"),
    group: str | None = None,
    folds: str | None = None,
    classes: str = "abc",
    **columns: list[Any],
) -> Path:
    order = np.arange(N_CLIPS) if order is None else order
    table = clip_table(N_CLIPS, split=parts or PARTS, **columns).take(pa.array(order))
    bank = NeedleBank(table, TOKENS[order])
    lines = [
        f"{clip_id},{';'.join(classes[index] for index in np.flatnonzero(row))}"
        for clip_id, row in zip(table["clip_id"].to_pylist(), targets[order], strict=True)
    ]
    folder.mkdir(parents=True)
    (folder / "labels.csv").write_text("\n".join(["clip_id,labels", *lines]))
    run_training(
        bank,
        folder / "labels.csv",
        folder / "run",
        probes=probes,
        settings=settings,
        source=bank.source,
        group=group,
        folds=folds,
        splits_path=None,
    )
    return folder / "run"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("first") / "first")


def results_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def test_a_run_alone_is_compared_as_it_compared_itself(first: Path) -> None:
    found = compare_runs([first], all_pairs=True)
    assert found["comparisons"] == results_of(first)["comparisons"]
    assert len(found["comparisons"]) == 3
    assert {row["p"] for row in found["comparisons"]} != {None}


def test_probes_of_two_runs_are_compared_as_in_one_whatever_the_order_of_rows(
    first: Path, tmp_path: Path
) -> None:
    order = np.random.default_rng(1).permutation(N_CLIPS)
    other = run(tmp_path / "other", order=order, probes=("knn",))
    [inside] = compare_runs([first], probes=["knn", "linear"])["comparisons"]
    split = tmp_path / "halves/first"
    shutil.copytree(first, split)
    results = results_of(first)
    results["probes"].pop("knn")
    (split / "results.json").write_text(json.dumps(results))
    found = compare_runs([split, other], probes=["knn", "linear"])
    [across] = found["comparisons"]
    for key in ("difference", "ci95", "p"):
        # knn is the same whatever the order; summed in another one, to the last digits.
        assert across[key] == pytest.approx(inside[key], rel=1e-6)
    assert [across["a"].split(": ")[1], across["b"].split(": ")[1]] == [inside["a"], inside["b"]]
    assert {row["run"] for row in found["scores"]} == {"first", "run"}


def test_the_best_is_first_and_tested_against_each_other_one(first: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "other", settings=replace(SETTINGS, n_epochs=4))
    found = compare_runs([first, other], metric="lwlrap")
    means = [row["mean"] for row in found["scores"]]
    assert means == sorted(means, reverse=True)
    assert len(found["comparisons"]) == 5
    assert {row["a"] for row in found["comparisons"]} == {found["scores"][0]["name"]}
    assert {row["metric"] for row in found["comparisons"]} == {"lwlrap"}


def test_fewer_resamples_are_compared_with_the_first_of_more(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = run(tmp_path / "few", probes=("linear",), settings=replace(SETTINGS, n_resamples=15))
    found = compare_runs([first, few], probes=["linear"])
    assert found["n_resamples"] == 15
    assert found["comparisons"][0]["difference"] == 0
    assert found["comparisons"][0]["ci95"] == [0, 0]
    assert main(["compare", str(first), str(few)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "unequally many resamples (first/run 40, few/run 15): the first 15 of all" in said


OTHER = [part if clip not in (40, 41) else "valid" for clip, part in enumerate(PARTS)]
RELABELLED = np.concatenate([TARGETS[:45], 1 - TARGETS[45:46], TARGETS[46:]])
UNLIKE = {
    "clips": (
        {"parts": OTHER},
        "test clips: 2 only in first/run: 'r20/0', 'r20/1'\n",
    ),
    "labels": ({"targets": RELABELLED}, "labels of 1 test clips: 'r22/1' is "),
    "classes": ({"classes": "abd"}, "classes: 1 only in first/run: 'c'\n  classes: 1 only in"),
    "groups": (
        {"group": "site", "site": [f"site{clip // 4}" for clip in range(N_CLIPS)]},
        "groups of clips: by path in first/run, by site in other/run; train with the same --group",
    ),
    "task": ({"targets": ONE_CLASS}, "task: multi-label in first/run, multi-class in other/run"),
    "folds": (
        {"folds": "fold", "fold": [clip // 2 % 3 for clip in range(N_CLIPS)]},
        "folds: 1 only in first/run: 'split'\n  folds: 3 only in other/run: 'fold=0', 'fold=1'",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNLIKE.values(), ids=UNLIKE)
def test_runs_that_were_not_tested_alike_are_refused_with_the_difference(
    change: dict[str, Any], message: str, first: Path, tmp_path: Path
) -> None:
    other = run(tmp_path / "other", probes=("knn",), **change)
    with pytest.raises(TrialError) as caught:
        compare_runs([first, other])
    said = str(caught.value)
    assert "not tested alike, expected the same test clips:\n  " in said
    assert message in said


FOREIGN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda results: [],
    "a list of scores alone": lambda results: results["scores"],
    "scores in words": lambda results: results | {"scores": ["linear"]},
    "probes in a row": lambda results: results | {"probes": list(results["probes"])},
    "numbered classes": lambda results: results | {"classes": [0, 1, 2]},
    "nobody's groups": lambda results: results | {"bootstrap_over": {}},
    "an interval of one": lambda results: (
        results | {"scores": [row | {"ci95": [0.5]} for row in results["scores"]]}
    ),
}


def damage(run: Path, how: str) -> None:
    if how == "not finished":
        (run / "results.json").unlink()
    elif how == "cut":
        (run / "results.json").write_text('{"format": 1,')
    elif how in FOREIGN:
        results = results_of(run)
        (run / "results.json").write_text(json.dumps(FOREIGN[how](results)))
    elif how == "older":
        (run / "resamples.parquet").unlink()
    elif how == "no Parquet":
        (run / "test-clips.parquet").write_text("clip_id")
    elif how == "another run's":
        table = pq.read_table(run / "resamples.parquet")
        pq.write_table(table.slice(1), run / "resamples.parquet")


BROKEN = {
    "not finished": "expected the --out of a finished train-probe; run its command again",
    "cut": "results.json is damaged",
    "older": "found no resamples.parquet in .*, which runs of an earlier version lack; train again",
    "no Parquet": "test-clips.parquet is damaged",
    "another run's": "are not of one run of this version; train again",
    **dict.fromkeys(FOREIGN, "are not of one run of this version; train again"),
}


@pytest.mark.parametrize(("how", "message"), BROKEN.items(), ids=BROKEN)
def test_a_run_that_is_no_whole_run_is_refused(
    how: str, message: str, first: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    damage(copy, how)
    with pytest.raises(TrialError, match=message):
        compare_runs([first, copy])


def test_what_is_not_there_is_refused_with_what_there_is(first: Path, tmp_path: Path) -> None:
    with pytest.raises(TrialError, match=r"no metric 'accuracy' in these multi-label .*lwlrap"):
        compare_runs([first], metric="accuracy")
    with pytest.raises(TrialError, match=r"no probe 'ep' in these runs, .* linear, mhca, knn"):
        compare_runs([first], probes=["ep"])
    with pytest.raises(TrialError, match="the same run twice"):
        compare_runs([first, first / "../run"])
    shutil.copytree(first, tmp_path / "sets/birds")
    with pytest.raises(TrialError, match=r"name one of its label sets: .*sets/birds"):
        compare_runs([tmp_path / "sets"])


def test_the_tables_fit_80_columns_and_json_holds_the_same(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run(tmp_path / "other", probes=("linear",), settings=replace(SETTINGS, n_seeds=1))
    assert main(["compare", str(first), str(other), "--all-pairs"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    words = " ".join(said.split())
    assert "10 groups of test clips resampled 40 times; p corrected for 6 pairs (Holm)" in words
    assert main(["compare", str(first), str(other), "--all-pairs", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == compare_runs([first, other], all_pairs=True)
    short = compare_runs([first, other])
    assert short["comparisons"] == found["comparisons"][: len(found["scores"]) - 1]
    assert short["n_pairs"] == found["n_pairs"] == 6
    best = found["scores"][0]
    assert f"{best['mean']:.4f} ± {best['std']:.4f}" in words
    assert f"{found['comparisons'][0]['difference']:+.4f}" in words
    assert main(["compare", str(first), "--metric", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: found no metric 'nothing'")


def test_names_in_brackets_are_shown_as_they_are(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("x[b]", "y[red]", ":dog:\x1b")
    copies = [str(shutil.copytree(first, tmp_path / name)) for name in names]
    assert main(["compare", *copies, "--probe", "linear", "--all-pairs"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    scores, pairs = said.split("All pairs")
    for name in ("x[b]", "y[red]", ":dog:\\x1b"):
        assert name in scores
        assert f"{name}:" in pairs


def test_folds_are_compared_over_all_of_them(tmp_path: Path) -> None:
    folds = {"folds": "fold", "fold": [clip // 2 % 3 for clip in range(N_CLIPS)]}
    found = run(tmp_path / "folds", targets=ONE_CLASS, probes=("linear", "knn"), **folds)
    compared = compare_runs([found], all_pairs=True)
    assert compared["comparisons"] == results_of(found)["comparisons"]
    assert compared["scores"][0]["std_over"] == "folds"
    assert compared["n_groups"] == 30
