from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from needle_sets import needle_tokens
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from patchbank.pipeline.errors import TrialError
from patchbank.probing import ProbeClassifier

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


REFUSED = {
    "vectors": ("protobin", (6, 4), [0, 1] * 3, r"found x of shape \(6, 4\), expected \(clip, p"),
    "one axis": ("linear", (6,), [0, 1] * 3, r"expected \(clip, patch, dim\) or \(clip, dim\)"),
    "lengths": ("linear", (6, 4), [0, 1], "found 6 clips in x, 2 in y"),
    "one class": ("linear", (6, 4), [1] * 6, "found 1 class in y, expected at least 2"),
    "indicator": ("linear", (2, 4), [[0, 2], [1, 0]], "found y with other values than 0 and 1"),
    "cube": ("linear", (2, 4), [[[0]]], r"found y of shape \(1, 1, 1\), expected \(clip\) labels"),
}


@pytest.mark.parametrize(("probe", "shape", "y", "message"), REFUSED.values(), ids=REFUSED)
def test_data_of_the_wrong_shape_are_refused(
    probe: str, shape: tuple[int, ...], y: list[object], message: str
) -> None:
    with pytest.raises(TrialError, match=message):
        quick(probe).fit(np.zeros(shape, dtype=np.float32), y)
