from __future__ import annotations

import numpy as np
import pytest
import torch
from needle_sets import needle_tokens
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from patchbank.pipeline.errors import TrialError
from patchbank.probing import ProbeClassifier, train
from patchbank.probing.batch import ArraySource
from patchbank.probing.metrics import score
from patchbank.probing.probes import build_probe, knn
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.probes.knn import KnnProbe
from patchbank.probing.probes.tokens import Tokens
from patchbank.probing.settings import TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.training import Event, Progress, Step, Validated

ROWS = np.arange(120)
SPLIT = Split("split", ROWS[:70], ROWS[70:90], ROWS[90:])
SETTINGS = TrainSettings(n_epochs=4, n_seeds=2, batch_size=16, n_resamples=50, device="cpu")


def remembered(probe: KnnProbe, patches: torch.Tensor, targets: np.ndarray) -> dict[str, object]:
    return probe.remember(probe.vectors(Tokens(patches)), torch.from_numpy(targets))


def test_with_a_flat_vote_it_is_the_neighbours_classifier_of_scikit_learn() -> None:
    tokens, targets = needle_tokens(120, multi_label=False)
    probe = build_probe("knn", ProbeShape(24, 4), {"k": 7, "temperature": 1e6})
    assert isinstance(probe, KnnProbe)
    weights = remembered(probe, tokens[:90], targets[:90])
    found = probe.logits(weights, Tokens(tokens[90:]))[0].softmax(dim=1)
    peer = KNeighborsClassifier(7, metric="cosine").fit(tokens[:90].mean(1), targets[:90].argmax(1))
    expected = peer.predict_proba(tokens[90:].mean(1)).clip(1e-6, 1)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("multi_label", [True, False])
def test_probabilities_are_weighted_shares_of_votes(multi_label: bool) -> None:
    tokens, targets = needle_tokens(60, multi_label=multi_label)
    probe = build_probe("knn", ProbeShape(24, 4), {"k": 5})
    assert isinstance(probe, KnnProbe)
    logits = probe.logits(remembered(probe, tokens[:50], targets[:50]), Tokens(tokens[50:]))[0]
    found = torch.sigmoid(logits) if multi_label else logits.softmax(dim=1)
    seen = torch.nn.functional.normalize(tokens.mean(1), dim=1)
    for clip in range(10):
        cosine = seen[:50] @ seen[50 + clip]
        nearest = cosine.argsort(descending=True)[:5]
        share = torch.exp(cosine[nearest] / 0.07) / torch.exp(cosine[nearest] / 0.07).sum()
        votes = (share[:, None] * torch.from_numpy(targets)[nearest]).sum(0)
        torch.testing.assert_close(found[clip], votes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("multi_label", [True, False])
def test_the_task_decides_about_clips_with_one_label_each(multi_label: bool) -> None:
    """A multi-label task may have one label on every training clip, by chance or by design."""
    tokens, targets = needle_tokens(60, multi_label=False)
    probe = build_probe("knn", ProbeShape(24, 4), {"k": 5})
    assert isinstance(probe, KnnProbe)
    seen, labels = probe.vectors(Tokens(tokens[:50])), torch.from_numpy(targets[:50])
    weights = probe.remember(seen, labels, multi_label=multi_label)
    logits = probe.logits(weights, Tokens(tokens[50:]))[0]
    by_targets = probe.logits(probe.remember(seen, labels), Tokens(tokens[50:]))[0]
    assert torch.equal(logits, by_targets) != multi_label
    found = torch.sigmoid(logits) if multi_label else logits.softmax(dim=1)
    torch.testing.assert_close(found, by_targets.softmax(dim=1), atol=1e-5, rtol=0)


def test_blocks_of_clips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, targets = needle_tokens(60)
    probe = build_probe("knn", ProbeShape(24, 4), {"k": 5})
    assert isinstance(probe, KnnProbe)
    weights = remembered(probe, tokens[:50], targets[:50])
    whole = probe.logits(weights, Tokens(tokens[50:]))
    monkeypatch.setattr(knn, "BLOCK_CLIPS", 3)
    torch.testing.assert_close(probe.logits(weights, Tokens(tokens[50:])), whole)


def test_it_reads_the_training_clips_once_and_its_seeds_agree() -> None:
    tokens, targets = needle_tokens(120)
    events: list[Event] = []
    arguments = {"multi_label": True, "settings": SETTINGS}
    [alone] = train(
        ArraySource(tokens), targets, SPLIT, probes=["knn"], progress=events.append, **arguments
    )
    epoch, judged = (one for one in events if not isinstance(one, Step))
    assert epoch == Progress("final", 1, 1, {})
    assert isinstance(judged, Validated)
    beside = train(ArraySource(tokens), targets, SPLIT, probes=["linear", "knn"], **arguments)[1]
    assert np.array_equal(alone.test_scores, beside.test_scores)
    assert np.array_equal(alone.test_scores[0], alone.test_scores[1])
    assert alone.weights[0]["vectors"].shape == (70, 24)
    found = score("map_macro", targets[SPLIT.test], alone.test_scores[0])
    assert found == pytest.approx(
        average_precision_score(targets[SPLIT.test], alone.test_scores[0], average="macro")
    )


def test_a_classifier_takes_vectors() -> None:
    generator = np.random.default_rng(0)
    y = generator.integers(3, size=60)
    x = (np.eye(3)[y] + 0.1 * generator.normal(size=(60, 3))).astype(np.float32)
    assert (ProbeClassifier("knn").fit(x, y).predict(x) == y).mean() > 0.95


REFUSED = {
    "k": ({"k": 0}, "found k=0, expected at least 1"),
    "temperature": ({"temperature": 0}, "found temperature=0, expected more than 0"),
    "vector": ({"vector": "max"}, "found vector='max', expected mean or cls"),
    "no CLS": ({"vector": "cls"}, "'knn' with vector=cls needs a CLS token"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(TrialError, match=message):
        build_probe("knn", ProbeShape(24, 3), options)


def test_of_several_layers_it_takes_the_mean_vector() -> None:
    first, second = (needle_tokens(60, seed=seed)[0] for seed in range(2))
    one = build_probe("knn", ProbeShape(24, 4))
    mixing = build_probe("knn", ProbeShape(24, 4, n_layers=2))
    assert isinstance(one, KnnProbe)
    assert isinstance(mixing, KnnProbe)
    both = Tokens(second, others=[Tokens(first)])
    expected = one.vectors(Tokens((first + second) / 2))
    torch.testing.assert_close(mixing.vectors(both), expected)


def test_a_multi_label_task_of_single_labels_keeps_its_sigmoids() -> None:
    tokens, targets = needle_tokens(120, multi_label=False)
    seen = tokens.clone()
    seen[90:] = tokens[:30]  # test clips that are training clips
    same = np.concatenate([targets[:90], targets[:30]])
    [outcome] = train(
        ArraySource(seen), same, SPLIT, probes=["knn"], multi_label=True, settings=SETTINGS
    )
    share = 1 / (1 + np.exp(-outcome.test_scores[0]))
    assert (share[same[SPLIT.test] == 1] > 0.9).all()
