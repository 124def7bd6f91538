"""`ProbeClassifier` on views of a bank: the same as on their tokens as an array."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_sets import write_clip_set
from fake_bank import SETTINGS
from loader_banks import HERE, make_bank
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.rows_view import RowsView
from patchbank.pipeline.errors import BankError, BankMismatch, TrialError
from patchbank.pipeline.extraction import extract
from patchbank.probing import BatchLoader, ProbeClassifier
from patchbank.probing.artefact import load_probe
from patchbank.probing.classifier_data import ViewRows
from patchbank.probing.tiers import Tier

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("classified"))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("quantised"), "int8")


def labels_of(view: RowsView) -> np.ndarray:
    """Names of the tones that the clips hold."""
    numbers = [int(Path(path).stem) for path in view.clips["path"].to_pylist()]
    return np.array(["low" if number // 4 % 2 == 0 else "high" for number in numbers])


def groups_of(view: RowsView) -> np.ndarray:
    """Four clips of one tone belong together."""
    return np.array([int(Path(path).stem) // 4 for path in view.clips["path"].to_pylist()])


def quick(probe: str = "linear", **parameters: object) -> ProbeClassifier:
    settings = {"n_epochs": 3, "batch_size": 8, "learning_rate": 5e-2, "device": "cpu"}
    return ProbeClassifier(probe, **({"random_state": 0} | settings | parameters))


def mixed(n_clips: int, seed: int) -> np.ndarray:
    """Positions in any order, some several times and some never."""
    return np.random.default_rng(seed).integers(44, size=n_clips)


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("probe", ["linear", "protobin", "mhca"])
def test_a_view_gives_what_its_tokens_give_as_an_array(bank: Bank, probe: str, tier: Tier) -> None:
    view = bank.rows_view(layer=1)
    train, test = view[mixed(30, 1)], view[mixed(20, 2)]
    y = labels_of(train)
    on_view = quick(probe, tier=tier).fit(train, y)
    on_array = quick(probe).fit(np.asarray(train), y)
    expected = on_array.predict_proba(np.asarray(test))
    np.testing.assert_allclose(on_view.predict_proba(test), expected, rtol=1e-5)
    np.testing.assert_allclose(on_view.predict_proba(np.asarray(test)), expected, rtol=1e-5)


def test_positions_of_a_view_are_those_of_y(bank: Bank) -> None:
    view = bank.rows_view()[::-1][[5, 5, 0, 40]]
    rows = ViewRows(view, tier="read", device=CPU, reads_once=False)
    [first, second] = rows.read([np.array([3, 0]), np.array([2])])
    assert (first.rows.tolist(), second.rows.tolist()) == ([3, 0], [2])
    [first] = rows.read([np.array([3, 1, 0])])
    np.testing.assert_array_equal(first.patches.numpy(), np.asarray(view)[[3, 1, 0]])
    assert rows.n_rows == 4


def test_quantised_tokens_stay_so_until_they_are_used(quantised: Bank) -> None:
    view = quantised.rows_view()
    rows = ViewRows(view, tier="ram", device=CPU, reads_once=False)
    [batch] = rows.read([np.arange(5)])
    assert batch.raw is not None
    assert batch.raw.dtype == torch.int8
    y = labels_of(view)
    first, second = (
        quick("protofloat").fit(one, y).predict_proba(one) for one in (view, np.asarray(view))
    )
    np.testing.assert_allclose(first, second, atol=2e-3)


def test_a_view_has_cls_and_grid_for_the_probes_that_need_them(bank: Bank) -> None:
    view = bank.rows_view(layer=2)
    y = labels_of(view)
    classifier = quick("linear-cls", n_epochs=60).fit(view, y)
    shape = classifier.artefact_.shape
    assert (shape.n_prefix, shape.grid, shape.dim) == (1, (5, 2), 12)
    assert classifier.score(view, y) > 0.9
    by_grid = quick("linearc", options={"variant": "time-mean"}).fit(view, y)
    assert by_grid.artefact_.weights["weight"].shape == (2, 2 * 12)
    with pytest.raises(TrialError, match="found 0 prefix tokens in x, expected 1, which this prob"):
        classifier.predict(np.asarray(view))


def test_folds_by_group_equal_training_by_hand(bank: Bank) -> None:
    view = bank.rows_view()
    y, groups = labels_of(view), groups_of(view)
    found = cross_val_score(quick(), view, y, groups=groups, cv=GroupKFold(3))
    by_hand = [
        accuracy_score(y[test], quick().fit(view[train], y[train]).predict(view[test]))
        for train, test in GroupKFold(3).split(view, y, groups)
    ]
    assert found.tolist() == by_hand
    predicted = cross_val_predict(quick(), view, y, groups=groups, cv=GroupKFold(3))
    assert (predicted == y).mean() == pytest.approx(
        np.average(found, weights=[len(test) for _, test in GroupKFold(3).split(view, y, groups)])
    )


def test_a_grid_is_searched_by_two_processes(bank: Bank) -> None:
    view = bank.rows_view()
    y = labels_of(view)
    grid = {"probe": ["linear", "linear-cls"]}
    both, alone = (
        GridSearchCV(quick(), grid, cv=2, n_jobs=n_jobs, error_score="raise").fit(view, y)
        for n_jobs in (2, 1)
    )
    np.testing.assert_allclose(
        both.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"]
    )
    assert both.predict(view[:3]).tolist() == alone.predict(view[:3]).tolist()


def test_multi_label_tasks_are_scored_on_views(bank: Bank) -> None:
    view = bank.rows_view()
    is_low = labels_of(view) == "low"
    y = np.stack([is_low, ~is_low, np.arange(len(view)) % 2 == 0], axis=1).astype(int)
    scores = cross_validate(
        quick(), view, y, cv=2, scoring=["average_precision", "roc_auc"], error_score="raise"
    )
    assert scores["test_average_precision"].min() > 0.6


def test_a_fitted_classifier_holds_no_bank(bank: Bank) -> None:
    view = bank.rows_view()
    classifier = quick().fit(view, labels_of(view))
    content = pickle.dumps(classifier)
    assert str(bank.path).encode() not in content
    copy = pickle.loads(content)
    assert np.array_equal(copy.predict_proba(view), classifier.predict_proba(view))
    assert not hasattr(clone(classifier), "classes_")


def test_what_is_saved_labels_the_clips_of_a_bank(
    bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view = bank.rows_view()
    classifier = quick().fit(view, labels_of(view))
    classifier.save(tmp_path)
    probe = load_probe(tmp_path)
    assert (probe.layers, probe.encoder_id) == ((2,), bank.encoder_id)
    [batch] = BatchLoader(bank, rows=view.rows, batch_size=64, shuffle=False)
    expected = classifier.predict_proba(view)
    np.testing.assert_allclose(probe.predict_batch(batch), expected, rtol=1e-5)
    assert main(["predict", str(tmp_path), "--bank", str(bank.path), "--top", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(view)


def test_tokens_of_another_encoder_or_layer_are_refused(bank: Bank, tmp_path: Path) -> None:
    view = bank.rows_view(layer=2)
    classifier = quick().fit(view, labels_of(view))
    with pytest.raises(ValueError, match="X has 8 features, but ProbeClassifier is expecting 12"):
        classifier.predict(bank.rows_view(layer=1))
    classifier.n_features_in_ = 8  # as if both layers were equally wide
    with pytest.raises(TrialError, match=r"found a view of layer 1, expected layer 2.*layer=2\)"):
        classifier.predict(bank.rows_view(layer=1))
    (tmp_path / "w").write_bytes(b"weights")
    table = write_clip_set(tmp_path / "set", n_clips=4)
    other = extract(
        table, encoder="fake", out=tmp_path / "o.bank", weights=tmp_path / "w", settings=SETTINGS
    )
    classifier.n_features_in_ = 12
    with pytest.raises(BankMismatch, match="weights_sha256"):
        classifier.predict(other.rows_view())


def test_no_clip_and_a_tier_without_its_device_are_refused(bank: Bank) -> None:
    view = bank.rows_view()
    with pytest.raises(
        TrialError, match=r"found x of shape \(0, 10, 12\), expected .*none of them"
    ):
        quick().fit(view[:0], ["low", "high"])
    with pytest.raises(BankError, match='the tier "device" keeps tokens on a GPU'):
        quick(tier="device").fit(view, labels_of(view))
