from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from needle_sets import needle_tokens
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from patchbank.cli.main import main
from patchbank.pipeline.errors import TrialError
from patchbank.probing import ProbeClassifier
from patchbank.probing.artefact import load_probe

NAMES = np.array(["ant", "bee", "cat", "dog"])


def single() -> tuple[np.ndarray, np.ndarray]:
    tokens, targets = needle_tokens(160, multi_label=False)
    return tokens.numpy(), NAMES[targets.argmax(axis=1)]


def quick(probe: str = "protobin", **parameters: object) -> ProbeClassifier:
    settings = {"n_epochs": 12, "batch_size": 16, "random_state": 0, "device": "cpu"}
    return ProbeClassifier(probe, **(settings | parameters))


def test_it_learns_needles_and_answers_in_the_labels_it_was_given() -> None:
    x, y = single()
    classifier = quick().fit(x[:120], y[:120])
    assert classifier.classes_.tolist() == NAMES.tolist()
    assert classifier.score(x[120:], y[120:]) > 0.9
    probabilities = classifier.predict_proba(x[120:])
    assert probabilities.shape == (40, 4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert classifier.predict(x[120:])[0] == NAMES[probabilities[0].argmax()]


def test_an_indicator_makes_the_task_multi_label() -> None:
    tokens, targets = needle_tokens(160)
    classifier = quick().fit(tokens, targets.astype(int))
    predicted = classifier.predict(tokens)
    assert predicted.shape == targets.shape
    assert (predicted == targets).mean() > 0.8
    assert np.array_equal(predicted, classifier.predict_proba(tokens) > 0.5)


def test_integer_labels_come_back_as_they_were() -> None:
    x, y = single()
    numbers = np.searchsorted(NAMES, y) * 10
    classifier = quick(learning_rate=1e-2).fit(x, numbers)
    assert classifier.classes_.tolist() == [0, 10, 20, 30]
    assert set(classifier.predict(x)) <= {0, 10, 20, 30}


def test_the_same_random_state_gives_the_same_probe() -> None:
    x, y = single()
    first, second, other = (
        quick(n_epochs=1, random_state=seed).fit(x, y).predict_proba(x) for seed in (3, 3, 4)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_linear_probe_takes_vectors() -> None:
    x, y = single()
    vectors = x.mean(axis=1)
    classifier = quick("linear", learning_rate=1e-2).fit(vectors, y)
    np.testing.assert_allclose(
        classifier.predict_proba(vectors), classifier.predict_proba(vectors[:, None]), rtol=1e-5
    )


def test_a_memory_map_is_read_in_batches_and_equals_the_array(tmp_path: Path) -> None:
    x, y = single()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    first, second = (quick(n_epochs=1).fit(one, y).predict_proba(one) for one in (x, mapped))
    assert np.array_equal(first, second)


def test_it_clones_and_lists_its_parameters() -> None:
    classifier = quick("mhca", options={"n_heads": 4})
    copy = clone(classifier)
    assert copy.get_params() == classifier.get_params()
    assert copy.set_params(probe="linear", options=None).probe == "linear"


def test_the_learning_rate_is_searched_unless_it_is_given() -> None:
    x, y = single()
    assert quick(n_epochs=1, learning_rate=0.5).fit(x, y).learning_rate_ == 0.5
    assert 2e-3 <= quick(n_epochs=1).fit(x, y).learning_rate_ <= 8e-2


def test_without_held_out_clips_the_middle_rate_is_taken() -> None:
    x, y = single()
    rate = quick(n_epochs=1, valid_fraction=0.0).fit(x, y).learning_rate_
    assert rate == pytest.approx((2e-3 * 8e-2) ** 0.5, rel=1e-5)


def test_the_global_generators_are_left_alone() -> None:
    x, y = single()
    before = torch.random.get_rng_state()
    quick(n_epochs=1).fit(x, y)
    assert torch.equal(before, torch.random.get_rng_state())


def test_predicting_before_fitting_is_refused() -> None:
    with pytest.raises(NotFittedError):
        quick().predict(single()[0])


@pytest.mark.parametrize("probe", ["protobin", "mhca", "conv", "knn"])
def test_every_family_takes_vectors_as_one_patch_a_clip(probe: str) -> None:
    x, y = single()
    vectors = x.mean(axis=1)
    first, second = (
        quick(probe, n_epochs=1, learning_rate=1e-2).fit(one, y).predict_proba(one)
        for one in (vectors, vectors[:, None])
    )
    assert np.array_equal(first, second)


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "tensor": torch.from_numpy,
    "float16 tensor": lambda x: torch.from_numpy(x).half(),
    "bfloat16 tensor": lambda x: torch.from_numpy(x).bfloat16(),
    "tensor with a gradient": lambda x: torch.from_numpy(x).requires_grad_(),
    "float16": lambda x: x.astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "other byte order": lambda x: x.astype(">f4"),
    "other memory order": np.asfortranarray,
    "lists": lambda x: x.tolist(),
    "objects": lambda x: x.astype(object),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tokens_may_come_in_any_form(form: Callable[[np.ndarray], Any]) -> None:
    x, y = single()
    x = x[:40].astype(np.float16).astype(np.float32) // 0.25 * 0.25  # the same in bfloat16
    found, expected = (
        quick(n_epochs=1, learning_rate=1e-2).fit(one, y[:40]).predict_proba(one)
        for one in (form(x), x)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_whole_numbers_are_tokens_too() -> None:
    x, y = single()
    counts = (8 * x.mean(axis=1)).astype(np.int32)
    found, expected = (
        quick("linear", n_epochs=1).fit(one, y).predict_proba(one)
        for one in (counts, counts.astype(np.float32))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_decisions_rank_what_probabilities_round_to_one() -> None:
    x, y = single()
    classifier = quick("linear", learning_rate=1e-2).fit(x, y)
    decisions, probabilities = classifier.decision_function(x), classifier.predict_proba(x)
    assert decisions.shape == (160, 4)
    np.testing.assert_allclose(
        np.exp(decisions) / np.exp(decisions).sum(axis=1, keepdims=True), probabilities
    )
    of_two = classifier.fit(x, y < "c").decision_function(x)
    assert of_two.shape == (160,)
    assert np.array_equal(of_two > 0, classifier.predict(x))
    np.testing.assert_allclose(1 / (1 + np.exp(-of_two)), classifier.predict_proba(x)[:, 1])


@pytest.mark.parametrize("n_classes", [2, 4])
def test_scorers_take_multi_label_tasks(n_classes: int) -> None:
    tokens, y = needle_tokens(90, n_classes=n_classes)
    x, names = tokens.numpy(), ["average_precision", "roc_auc", "f1_macro", "accuracy"]
    found = cross_validate(
        quick("linear", n_epochs=2, learning_rate=5e-2),
        *(x, y.astype(int)),
        cv=3,
        scoring=names,
        error_score="raise",
        return_estimator=True,
        return_indices=True,
    )
    for fold, test in enumerate(found["indices"]["test"]):
        truth, trained = y[test], found["estimator"][fold]
        by_hand = [
            average_precision_score(truth, trained.predict_proba(x[test])),
            roc_auc_score(truth, trained.predict_proba(x[test])),
            f1_score(truth, trained.predict(x[test]), average="macro"),
            (truth == trained.predict(x[test])).all(axis=1).mean(),
        ]
        np.testing.assert_allclose([found[f"test_{name}"][fold] for name in names], by_hand)


def test_a_grid_ranges_over_probes_options_and_rates() -> None:
    x, y = single()
    grid = [
        {"probe": ["mhca"], "options": [{"n_heads": 2}, {"n_heads": 4}], "learning_rate": [1e-4]},
        {"probe": ["protobin"], "learning_rate": [3e-2]},
    ]
    search = GridSearchCV(quick(n_epochs=5), grid, cv=2, error_score="raise").fit(x, y)
    assert search.best_params_ == {"probe": "protobin", "learning_rate": 3e-2}
    assert search.best_estimator_.artefact_.probe == "protobin"
    assert [found["probe"] for found in search.cv_results_["params"]] == ["mhca"] * 2 + ["protobin"]


def test_it_may_end_a_pipeline_and_be_cut_into_folds() -> None:
    x, y = single()
    vectors = x.mean(axis=1)
    probe = quick("linear", learning_rate=1e-2, n_epochs=2)
    pipeline = make_pipeline(StandardScaler(), probe)
    found = cross_val_predict(pipeline, vectors, y, cv=3, method="predict_proba")
    assert found.shape == (160, 4)
    assert pipeline.fit(vectors, y).n_features_in_ == 24


def test_names_of_features_are_kept_and_compared() -> None:
    pandas = pytest.importorskip("pandas")
    x, y = single()
    frame = pandas.DataFrame(x[:, 0, :2], columns=["left", "right"])
    classifier = quick("linear", n_epochs=1).fit(frame, y)
    assert classifier.feature_names_in_.tolist() == ["left", "right"]
    with pytest.raises(ValueError, match="feature names should match"):
        classifier.predict(frame[["right", "left"]])


def test_a_pickle_predicts_the_same() -> None:
    x, y = single()
    classifier = quick(n_epochs=1).fit(x, y)
    copy = pickle.loads(pickle.dumps(classifier))
    assert np.array_equal(copy.predict_proba(x), classifier.predict_proba(x))


def test_what_is_saved_is_a_probe_as_training_leaves_it(tmp_path: Path) -> None:
    x, y = single()
    classifier = quick("mhca", n_epochs=1, options={"n_heads": 4}, learning_rate=1e-2).fit(x, y)
    classifier.save(tmp_path / "mhca")
    probe = load_probe(tmp_path / "mhca")
    assert (probe.classes, probe.options) == (tuple(NAMES), {"n_heads": 4})
    assert {"learning_rate": 1e-2, "n_epochs": 1}.items() <= probe.training.items()
    np.testing.assert_allclose(probe.predict_proba(x), classifier.predict_proba(x), rtol=1e-5)
    with pytest.raises(NotFittedError):
        quick().save(tmp_path)


def test_a_probe_of_an_array_labels_no_audio_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = single()
    quick("linear", n_epochs=1, learning_rate=1e-2).fit(x, y).save(tmp_path / "saved")
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    words = str(tmp_path / "saved")
    for line in (["predict", words, str(tmp_path / "a.wav")], ["export", words, "--out", "x.pt2"]):
        assert main(line) == 1
        said = capsys.readouterr().err
        assert "trained on an array, no encoder is known; fit it on a bank's tokens" in said
        assert "or use predict_proba()" in said
    with pytest.raises(TrialError, match="no encoder is known"):
        load_probe(tmp_path / "saved").check_encoder({"name": "tiny"}, "e" * 64)


def test_a_probe_file_is_trained_and_saved_without_its_path(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "docs/examples/gated_probe.py"
    x, y = single()
    classifier = quick(str(file), n_epochs=1, learning_rate=1e-2).fit(x, y)
    classifier.save(tmp_path)
    assert str(file) not in (tmp_path / "probe.json").read_text()
    found = load_probe(tmp_path, plugin=file).predict_proba(x)
    np.testing.assert_allclose(found, classifier.predict_proba(x), rtol=1e-5)


REFUSED: dict[str, tuple[str, Any, Any, str]] = {
    "one axis": ("linear", np.zeros(6), [0, 1] * 3, "Expected 2D array, got 1D array"),
    "four axes": (
        "linear",
        np.zeros((6, 1, 2, 2)),
        [0, 1] * 3,
        r"expected \(clip, patch, dim\) or",
    ),
    "no patch": ("linear", np.zeros((6, 0, 2)), [0, 1] * 3, r"\(6, 0, 2\).*none of them 0"),
    "lengths": ("linear", np.zeros((6, 4)), [0, 1], "found 6 clips in x, 2 in y"),
    "one class": ("linear", np.zeros((6, 4)), [1] * 6, "found 1 class in y, expected at least 2"),
    "indicator": ("linear", np.zeros((2, 4)), [[0, 2], [1, 0]], "found y with other values than 0"),
    "cube": (
        "linear",
        np.zeros((2, 4)),
        [[[0]]],
        r"found y of shape \(1, 1, 1\), expected \(clip\)",
    ),
    "no y": ("linear", np.zeros((2, 4)), None, "requires y to be passed, but the target y is None"),
    "numbers": ("linear", np.zeros((2, 4)), [0.5, 1.5], "Unknown label type: continuous"),
    "nan": ("linear", np.full((2, 3, 4), np.nan), [0, 1], "Input X contains NaN"),
    "inf": ("linear", torch.full((2, 4), torch.inf), [0, 1], "Input X contains NaN or infinity"),
    "complex": ("linear", np.zeros((2, 3, 4), complex), [0, 1], "Complex data not supported"),
    "names": (
        "linear",
        np.full((2, 4), "a"),
        [0, 1],
        "dtype='numeric' is not compatible|could not",
    ),
}


@pytest.mark.parametrize(("probe", "x", "y", "message"), REFUSED.values(), ids=REFUSED)
def test_data_of_the_wrong_shape_are_refused(probe: str, x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(probe).fit(x, y)


def test_wrong_data_are_errors_of_this_package_too() -> None:
    with pytest.raises(TrialError, match="found 6 clips in x, 2 in y"):
        quick("linear").fit(np.zeros((6, 4)), [0, 1])


def test_sparse_data_are_refused() -> None:
    with pytest.raises(TypeError, match="Sparse data was passed for X"):
        quick("linear").fit(csr_array(np.eye(4)), [0, 1, 0, 1])


def test_nan_in_a_memory_map_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = single()
    x[150, 3, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr("patchbank.probing.classifier_data.CHECKED_VALUES", 10_000)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        quick().fit(np.load(tmp_path / "x.npy", mmap_mode="r"), y)


@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy])
def test_another_width_than_that_of_training_is_refused(as_given: Callable[..., Any]) -> None:
    x, y = single()
    classifier = quick(n_epochs=1).fit(x, y)
    with pytest.raises(ValueError, match="X has 23 features, but ProbeClassifier is expecting 24"):
        classifier.predict(as_given(np.ascontiguousarray(x[:, :, :23])))


def test_a_probe_that_needs_cls_refuses_arrays() -> None:
    x, y = single()
    with pytest.raises(TrialError, match="needs a CLS token, found no prefix tokens"):
        quick("linear-cls").fit(x, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"learning_rate": 0.0},
            r"found learning rates \(0.0,\) for protobin, expected some above",
        ),
        ({"valid_fraction": 1.0}, "found valid_fraction=1.0, expected 0 to below 1"),
        ({"n_candidates": 0}, "found n_candidates=0, expected at least 1"),
        ({"probe": "protobim"}, "did you mean 'protobin'"),
    ],
)
def test_parameters_are_checked_when_it_is_fitted(parameters: dict[str, Any], message: str) -> None:
    x, y = single()
    with pytest.raises(TrialError, match=message):
        quick().set_params(**parameters).fit(x, y)
