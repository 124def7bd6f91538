from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from needle_sets import NeedleBank, clip_table, needle_tokens
from rich.console import Console

from patchbank.pipeline.errors import ManifestError, TrialError
from patchbank.probing import run, train
from patchbank.probing.artefact import load_probe
from patchbank.probing.batch import NO_LAYER, ArraySource, LayerTokens
from patchbank.probing.metrics import score
from patchbank.probing.results import format_scores
from patchbank.probing.search import Candidate, choose
from patchbank.probing.settings import SearchSettings, TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.training import Event, Progress, Step, Validated

N_CLIPS = 240
ROWS = np.arange(N_CLIPS)
SPLIT = Split("split", ROWS[:140], ROWS[140:190], ROWS[190:])
QUICK = TrainSettings(
    n_epochs=12,
    n_seeds=2,
    search=SearchSettings(n_candidates=3),
    batch_size=32,
    n_resamples=50,
    device="cpu",
)


def run_training(bank: NeedleBank, labels: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Over tokens in memory."""
    return run.run_training(bank, labels, out, source=bank.source, **more)


TINY = replace(QUICK, n_epochs=2, search=SearchSettings(n_candidates=2))


def test_prototypes_find_needles_that_a_linear_probe_misses() -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    linear, protobin = train(
        ArraySource(tokens.half()),
        targets,
        SPLIT,
        probes=["linear", "protobin"],
        multi_label=True,
        settings=QUICK,
    )
    truth = targets[SPLIT.test]
    found = [score("map_macro", truth, one.test_scores[0]) for one in (linear, protobin)]
    assert found[1] > 0.95
    assert found[1] > found[0] + 0.1


def test_a_run_repeats_bit_for_bit_and_other_probes_change_nothing() -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    source = ArraySource(tokens)
    arguments = {"multi_label": True, "settings": TINY}
    [first] = train(source, targets, SPLIT, probes=["protobin"], **arguments)
    again = train(source, targets, SPLIT, probes=["linear", "protobin", "mhca"], **arguments)
    assert np.array_equal(first.test_scores, again[1].test_scores)
    assert first.candidates == again[1].candidates


class CountingSource(ArraySource):
    """Remembers every row that was read."""

    def __init__(self, tokens: torch.Tensor, layer: int = NO_LAYER) -> None:
        super().__init__({layer: LayerTokens(tokens)})
        self.seen: list[int] = []

    def read(self, batches):  # type: ignore[no-untyped-def]
        for batch in super().read(batches):
            self.seen.extend(batch.rows.tolist())
            yield batch


def test_one_read_an_epoch_serves_all_probes_and_the_test_split_is_read_once_at_the_end() -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    source = CountingSource(tokens)
    train(source, targets, SPLIT, probes=["linear", "mhca"], multi_label=True, settings=TINY)
    n_reads = np.bincount(source.seen, minlength=N_CLIPS)
    assert set(n_reads[SPLIT.train]) == {2 * TINY.n_epochs}
    assert set(n_reads[SPLIT.valid]) == {2}
    assert source.seen[-len(SPLIT.test) :] == SPLIT.test.tolist()
    assert set(n_reads[SPLIT.test]) == {1}


def test_one_learning_rate_needs_no_search() -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    events: list[Event] = []
    [outcome] = train(
        ArraySource(tokens),
        targets,
        SPLIT,
        probes=["linear"],
        multi_label=True,
        settings=replace(TINY, learning_rates={"linear": (1e-3,)}),
        progress=events.append,
    )
    first, second, judged = (one for one in events if not isinstance(one, Step))
    assert isinstance(first, Progress)
    assert isinstance(second, Progress)
    assert [(one.stage, one.epoch, one.n_epochs) for one in (first, second)] == [
        ("final", 1, 2),
        ("final", 2, 2),
    ]
    assert second.losses["linear"][0].value < first.losses["linear"][0].value
    assert isinstance(judged, Validated)
    assert (judged.stage, judged.epoch, judged.metric) == ("final", 2, "map_macro")
    found = [(one.trial.seed, one.value) for one in judged.values["linear"]]
    assert found == list(enumerate(outcome.valid_values))
    assert outcome.candidates == (Candidate(1e-3, 1e-4, None),)


def test_a_learning_rate_that_diverges_loses_the_search() -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    [outcome] = train(
        ArraySource(tokens),
        targets,
        SPLIT,
        probes=["linear"],
        multi_label=True,
        settings=replace(TINY, learning_rates={"linear": (1e38, 1e-3)}),
    )
    assert outcome.candidates[0].score == -np.inf
    assert outcome.trials[0].learning_rate == 1e-3


def test_equal_scores_choose_the_lowest_rate() -> None:
    candidates = [Candidate(0.1, 0, 0.5), Candidate(0.2, 0.1, 0.7), Candidate(0.3, 0, 0.7)]
    assert choose("linear", candidates) == (0.2, 0.1)


REFUSED = {
    "all rates diverge": (
        {"settings": replace(TINY, learning_rates={"linear": (1e38, 2e38)})},
        r"that was trained to the end diverged \(tried 1e\+38, 2e\+38\)",
    ),
    "the only rate diverges": (
        {"settings": replace(TINY, learning_rates={"linear": (1e38,)})},
        "probe 'linear' diverged at learning rate 1e\\+38 with seed 0, 1, expected finite",
    ),
    "no probe": ({"probes": []}, "found no probe to train, .* pass --probe protobin"),
    "settings of another probe": (
        {"settings": replace(TINY, learning_rates={"mhca": (1e-3,)})},
        "found settings for mhca, expected only probes that are trained: linear",
    ),
    "no labels in test": (
        {"split": replace(SPLIT, test=np.array([240]))},
        "found no label on any of the 1 test clips of split, expected positives",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_training_that_cannot_work_says_why(change: dict[str, object], message: str) -> None:
    tokens, targets = needle_tokens(N_CLIPS + 1)
    targets[-1] = 0
    arguments = {
        "source": ArraySource(tokens),
        "targets": targets,
        "split": SPLIT,
        "probes": ["linear"],
        "multi_label": True,
        "settings": TINY,
    }
    with pytest.raises(TrialError, match=message):
        train(**(arguments | change))


WRONG_SETTINGS = {
    "epochs": ({"n_epochs": 0}, "found n_epochs=0, expected at least 1"),
    "rates": ({"learning_rates": {"linear": (0.0,)}}, "found learning rates .* for linear"),
    "decays": ({"weight_decays": {"linear": (-0.1,)}}, "found weight decays .* for linear"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS)
def test_settings_out_of_range_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrialError, match=message):
        TrainSettings(**change)


def test_the_search_covers_learning_rates_evenly_and_weight_decays_by_halves() -> None:
    rates, decays = zip(*TrainSettings().candidates("linear", (1e-4, 1e-2)), strict=True)
    assert rates == pytest.approx((1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2), rel=1e-5)
    places = np.log(np.array(decays) / 1e-5) / np.log(50)
    np.testing.assert_allclose(places, [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8], rtol=1e-5)
    [middle] = TrainSettings(search=SearchSettings(n_candidates=1)).candidates(
        "linear", (1e-4, 1e-2)
    )
    assert middle == pytest.approx((1e-3, 1e-5 * 50**0.5), rel=1e-5)


GIVEN = {
    "rates": ({"learning_rates": (0.1, 0.2)}, [(0.1, 1e-4), (0.2, 1e-4)]),
    "decays": ({"weight_decays": (0.0, 0.5)}, [(1, 0), (1, 0.5), (100, 0), (100, 0.5)]),
    "both": (
        {"learning_rates": (0.1, 0.2), "weight_decays": (0.0, 0.5)},
        [(0.1, 0.0), (0.1, 0.5), (0.2, 0.0), (0.2, 0.5)],
    ),
}


@pytest.mark.parametrize(("given", "expected"), GIVEN.values(), ids=GIVEN)
def test_what_is_given_is_tried_with_each_of_the_other(
    given: dict[str, tuple[float, ...]], expected: list[tuple[float, float]]
) -> None:
    settings = TrainSettings(
        search=SearchSettings(n_candidates=2), **{key: {"x": one} for key, one in given.items()}
    )
    assert list(settings.candidates("x", (1, 100))) == expected


def write_labels(folder: Path, bank: NeedleBank, targets: np.ndarray) -> Path:
    lines = [
        f"{clip_id},{';'.join(f'class{number}' for number in np.flatnonzero(row))}"
        for clip_id, row in zip(bank.clips["clip_id"].to_pylist(), targets, strict=True)
    ]
    path = folder / "LABELS.csv"
    path.write_text("\n".join(["clip_id,labels", *lines]))
    return path


def split_bank(tokens: torch.Tensor) -> NeedleBank:
    names = np.full(len(tokens), "train", dtype=object)
    names[SPLIT.valid], names[SPLIT.test] = "valid", "test"
    names[SPLIT.valid[0]] = None
    status = [1] * len(tokens)
    status[0] = 2
    return NeedleBank(clip_table(len(tokens), split=names.tolist(), status=status), tokens)


def test_a_run_leaves_results_probes_and_predictions_that_agree(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    bank = split_bank(tokens)
    labels = write_labels(tmp_path, bank, targets)
    out = tmp_path / "RUN"
    probes = ["linear", "protobin"]
    results = run_training(bank, labels, out, probes=probes, settings=TINY)
    assert json.loads((out / "results.json").read_text()) == results
    assert results["bank"] == bank.fingerprint
    assert results["n_failed_clips"] == 1
    assert results["folds"] == [
        {
            "name": "split",
            "train": 139,
            "valid": 49,
            "test": 50,
            "unused": 1,
            "views": 0,
            "views_left_out": 0,
        }
    ]
    assert [(row["probe"], row["split"], row["metric"]) for row in results["scores"]] == [
        (probe, part, metric)
        for probe in probes
        for part in ("valid", "test")
        for metric in ("map_macro", "map_micro", "auroc_macro", "d_prime", "lwlrap")
    ]
    for row in results["scores"]:
        assert set(row) == {
            "probe", "split", "metric", "mean", "std", "n_seeds", "n_clips", "ci95"
        }  # fmt: skip
        assert row["ci95"][0] < row["mean"] < row["ci95"][1]
        assert row["std"] > 0
        assert (row["n_seeds"], row["n_clips"]) == (2, 49 if row["split"] == "valid" else 50)
    own = [".lock", "run.json", "search.journal", "test-scored.jsonl"]
    files = ["resamples.parquet", "results.json", "test-clips.parquet"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*own, *files, *probes])


def test_the_saved_probe_gives_the_predictions_and_they_the_scores(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    bank = split_bank(tokens)
    labels = write_labels(tmp_path, bank, targets)
    settings = replace(TINY, n_seeds=1)
    results = run_training(bank, labels, tmp_path, probes=["mhca"], settings=settings)
    table = pq.read_table(tmp_path / "mhca" / "predictions-test.parquet")
    assert table.column_names == ["clip_id", "class0", "class1", "class2", "class3"]
    assert table["clip_id"].to_pylist() == bank.clips["clip_id"].take(SPLIT.test).to_pylist()
    predicted = np.stack([table[name].to_numpy() for name in table.column_names[1:]], axis=1)
    probe = replace(load_probe(tmp_path / "mhca"), temperature=1.0)
    np.testing.assert_allclose(probe.predict_proba(tokens[SPLIT.test]), predicted, rtol=1e-4)
    means = {row["metric"]: row["mean"] for row in results["scores"] if row["split"] == "test"}
    for metric, mean in means.items():
        assert score(metric, targets[SPLIT.test], predicted) == pytest.approx(mean)
    assert {row["std"] for row in results["scores"]} == {None}


def test_the_saved_probe_is_the_best_seed_on_validation_data(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    bank = split_bank(tokens)
    labels = write_labels(tmp_path, bank, targets)
    settings = replace(TINY, n_seeds=4)
    results = run_training(bank, labels, tmp_path, probes=["linear"], settings=settings)
    probe = load_probe(tmp_path / "linear")
    assert (probe.layers, probe.encoder_id) == ((2,), bank.encoder_id)
    assert (probe.encoder, probe.window) == (bank.card["encoder"], bank.card["window"])
    [found] = results["probes"]["linear"]["search"]
    assert found["best_seed"] == probe.training["seed"]
    assert found["learning_rate"] == probe.training["learning_rate"]
    valid = SPLIT.valid[1:]
    own = score("map_macro", targets[valid], probe.predict_proba(tokens[valid]))
    assert own == pytest.approx(probe.training["valid_score"], abs=1e-3)
    [mean] = [
        row["mean"]
        for row in results["scores"]
        if (row["split"], row["metric"]) == ("valid", "map_macro")
    ]
    assert own > mean, "four seeds do not tie, so the best lies above their mean"


def test_folds_predict_every_clip_out_of_fold_and_deviate_over_folds(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(90, multi_label=False)
    bank = NeedleBank(clip_table(90, fold=[clip // 2 % 3 for clip in range(90)]), tokens)
    labels = write_labels(tmp_path, bank, targets)
    stages: list[str] = []
    results = run_training(
        bank,
        labels,
        tmp_path,
        probes=["protobin"],
        settings=TINY,
        folds="fold",
        layer=1,
        progress=lambda progress: stages.append(progress.stage),
    )
    assert results["std_over"] == "folds"
    assert results["task"] == "multi-class"
    assert results["primary_metric"] == "accuracy"
    assert results["layers"] == [1]
    test = [row for row in results["scores"] if row["split"] == "test"]
    assert [row["metric"] for row in test] == [
        "accuracy", "balanced_accuracy", "map_macro", "map_micro", "auroc_macro", "d_prime"
    ]  # fmt: skip
    assert {row["n_clips"] for row in test} == {90}
    assert list(dict.fromkeys(stages)) == [
        f"fold={fold} {stage}" for fold in range(3) for stage in ("search", "final")
    ]
    table = pq.read_table(tmp_path / "protobin" / "predictions-test.parquet")
    assert table["clip_id"].to_pylist() == bank.clips["clip_id"].to_pylist()
    sums = sum(table[name].to_numpy() for name in table.column_names[1:])
    np.testing.assert_allclose(sums, 1, rtol=1e-5)


def test_the_table_fits_80_columns_and_prints_what_is_left_out(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    targets[SPLIT.test, 3] = 0
    bank = split_bank(tokens)
    labels = write_labels(tmp_path, bank, targets)
    results = run_training(bank, labels, tmp_path, probes=["linear", "protobin"], settings=TINY)
    assert results["left_out"] == [
        {"fold": "split", "split": "test", "metric": metric, "n_classes": 1, "classes": ["class3"]}
        for metric in ("map_macro", "auroc_macro", "d_prime")
    ]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(format_scores(results))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    words = re.sub(r"\s+", " ", text)
    assert "50 test clips, 2 seeds, ± over seeds; 1 failed clips left out" in words
    assert "1 labelled clips in no split" in words
    assert "map_macro, auroc_macro, d_prime without 1 of 4 classes" in words
    [row] = [
        row
        for row in results["scores"]
        if (row["probe"], row["split"], row["metric"]) == ("protobin", "test", "map_macro")
    ]
    assert f"{row['mean']:.4f} ± {row['std']:.4f}" in text


def test_a_layer_that_the_bank_lacks_is_named(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    bank = split_bank(tokens)
    labels = write_labels(tmp_path, bank, targets)
    with pytest.raises(TrialError, match="found no layer 12 in the bank, expected one of 1, 2"):
        run_training(bank, labels, tmp_path, probes=["linear"], layer=12)


def test_a_failed_run_leaves_an_earlier_result_alone(tmp_path: Path) -> None:
    tokens, targets = needle_tokens(N_CLIPS)
    bank = split_bank(tokens)
    labels = write_labels(tmp_path, bank, targets)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ManifestError):
        run_training(bank, labels, tmp_path, probes=["linear"], classes=["other"])
    assert (tmp_path / "results.json").read_text() == "{}"


def test_rows_that_train_hold_no_sound_of_a_clip_that_selects_or_tests(tmp_path: Path) -> None:
    """Ten clips a part, two views of each, of which the second is mixed with any other clip."""
    n_clips, parts = 40, ["train", "valid", "test", ""]
    names = [f"c{number:02d}" for number in range(n_clips)]
    part_of = {name: parts[number % 4] for number, name in enumerate(names)}
    others = np.random.default_rng(0).permutation(n_clips)
    views = [(name, view) for view in (1, 2) for name in names]
    rows = [(name, 0, []) for name in names]
    rows += [(n, v, [names[others[names.index(n)]]] if v == 2 else []) for n, v in views]
    status = [1] * (len(rows) - 1) + [2]
    clips = clip_table(
        len(rows),
        clip_id=[name for name, _, _ in rows],
        path=[f"{name}.wav" for name, _, _ in rows],
        view=[view for _, view, _ in rows],
        mix_sources=[mixed for _, _, mixed in rows],
        status=status,
    )
    tokens, _ = needle_tokens(len(rows), n_patches=4)
    (tmp_path / "labels.csv").write_text(
        "clip_id,labels\n" + "".join(f"{name},k{n // 4 % 2}\n" for n, name in enumerate(names))
    )
    (tmp_path / "splits.csv").write_text(
        "clip_id,split\n" + "".join(f"{name},{part}\n" for name, part in part_of.items() if part)
    )
    source = CountingSource(tokens, layer=2)
    said: list[str] = []
    results = run.run_training(
        NeedleBank(clips, tokens),
        tmp_path / "labels.csv",
        tmp_path / "run",
        probes=["linear"],
        settings=TINY,
        splits_path=tmp_path / "splits.csv",
        source=lambda _: source,
        say=said.append,
    )
    n_reads = np.bincount(source.seen, minlength=len(rows))
    trained = [row for row in range(len(rows)) if n_reads[row] == 2 * TINY.n_epochs]
    heard = {part_of[one] for row in trained for one in (rows[row][0], *rows[row][2])}
    assert heard == {"train", ""}
    assert sum(rows[row][1] == 1 for row in trained) == 10
    n_mixed = sum(rows[row][1] == 2 for row in trained)
    assert 0 < n_mixed < 10
    assert said == [
        f"{10 - n_mixed} of 20 views are left out: what is mixed into them lies in another split"
    ]
    [fold] = results["folds"]
    assert (fold["train"], fold["unused"]) == (len(trained), 10)
    assert (results["n_failed_clips"], results["n_failed_views"]) == (0, 1)
    assert results["primary_metric"] == "accuracy"
    caption = str(format_scores(results).caption)
    assert "1 failed views left out; 10 labelled clips in no split; " in caption
    assert f"{10 - n_mixed} of 20 views left out of training" in caption
