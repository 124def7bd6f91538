"""Several label sets and several layers, trained from the same batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from needle_sets import NeedleBank, clip_table, needle_tokens

from patchbank.pipeline.errors import TrialError
from patchbank.probing import train
from patchbank.probing.artefact import load_probe
from patchbank.probing.batch import ArraySource, Batch, LayerTokens
from patchbank.probing.entries import Entry
from patchbank.probing.losses import asymmetric
from patchbank.probing.optimiser import cosine_factor
from patchbank.probing.passes import BatchTokens, Course
from patchbank.probing.plan import batches
from patchbank.probing.probes import build_probe
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.probes.probe_files import file_sha256
from patchbank.probing.probes.tokens import Buffers
from patchbank.probing.protocol import train_tasks
from patchbank.probing.run import run_training
from patchbank.probing.settings import SearchSettings, TrainSettings
from patchbank.probing.splits import Split
from patchbank.probing.study import Task
from patchbank.probing.training import fit
from patchbank.probing.trials import Trial, TrialStack

ROWS = np.arange(120)
SPLIT = Split("split", ROWS[:70], ROWS[70:96], ROWS[96:])
SETTINGS = TrainSettings(
    n_epochs=3,
    search=SearchSettings(n_candidates=2),
    n_seeds=2,
    batch_size=16,
    n_resamples=50,
    device="cpu",
)


class CountingSource(ArraySource):
    """Remembers every row that was read."""

    seen: list[int]

    def read(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        for batch in super().read(batches):
            self.seen.extend(batch.rows.tolist())
            yield batch


def needles(seed: int = 0) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Tokens, their labels, and other labels of the same clips: the first two classes."""
    tokens, targets = needle_tokens(120, seed=seed)
    return tokens, targets, targets[:, :2]


def test_label_sets_over_the_same_clips_give_what_each_gives_alone_from_one_read() -> None:
    tokens, first, second = needles()
    source = CountingSource(tokens)
    source.seen = []
    tasks = [Task(first, SPLIT, True, "first"), Task(second, SPLIT, True, "second")]
    together = train_tasks(source, tasks, probes=["linear", "protobin"], settings=SETTINGS)
    n_reads = np.bincount(source.seen, minlength=120)
    assert set(n_reads[SPLIT.train]) == {2 * SETTINGS.n_epochs}
    assert set(n_reads[SPLIT.test]) == {1}
    for task, outcomes in zip(tasks, together, strict=True):
        alone = train(
            ArraySource(tokens),
            task.targets,
            SPLIT,
            probes=["linear", "protobin"],
            multi_label=True,
            settings=SETTINGS,
        )
        for one, other in zip(outcomes, alone, strict=True):
            assert one.candidates == other.candidates
            assert np.array_equal(one.test_scores, other.test_scores)


def test_a_label_set_over_fewer_clips_learns_from_its_part_of_every_batch() -> None:
    tokens, first, second = needles()
    part = Split("split", SPLIT.train[::2], SPLIT.valid[::2], SPLIT.test[::2])
    spoilt = second.copy()
    # Targets of clips that are not in its split must not matter.
    spoilt[np.setdiff1d(ROWS, np.concatenate([part.train, part.valid, part.test]))] = 1
    found = [
        train_tasks(
            ArraySource(tokens),
            [Task(first, SPLIT, True, "first"), Task(targets, part, True, "part")],
            probes=["linear"],
            settings=SETTINGS,
        )
        for targets in (second, spoilt)
    ]
    assert found[0][1][0].test_scores.shape == (2, 12, 2)
    assert np.array_equal(found[0][1][0].test_scores, found[1][1][0].test_scores)
    [alone] = train(
        ArraySource(tokens), first, SPLIT, probes=["linear"], multi_label=True, settings=SETTINGS
    )
    assert np.array_equal(found[0][0][0].test_scores, alone.test_scores)


def test_the_part_of_a_batch_holds_the_tokens_of_its_rows() -> None:
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 7, (60,), generator=random)
    layers = {
        layer: LayerTokens(
            torch.randn(60, 6, 24, generator=random),
            torch.randn(60, 1, 24, generator=random),
            counts,
        )
        for layer in (1, 2)
    }
    targets = (torch.rand(60, 3, generator=random) < 0.4).float()
    part, probe = (
        ROWS[:60:3],
        build_probe("cgp", ProbeShape(24, 3, 1, None, 2), {"n_prototypes": 9}),
    )

    def course(rows: np.ndarray) -> Course:
        stack = TrialStack("cgp", probe, [Trial(1e-2, 1e-4, 0)])
        return Course(stack, targets.numpy(), rows, asymmetric, (1, 2))

    seen = course(part)
    fit([course(ROWS[:60]), seen], ArraySource(layers), settings=SETTINGS)
    own, step, n_steps = course(part).stack, 0, 4 * SETTINGS.n_epochs
    for epoch in range(SETTINGS.n_epochs):
        for rows in batches(ROWS[:60], batch_size=16, seed=SETTINGS.order_seed, epoch=epoch):
            of_part = rows[np.isin(rows, part)]
            if len(of_part):
                [batch] = ArraySource(layers).read([of_part])
                tokens = BatchTokens(batch, SETTINGS, Buffers()).of((1, 2))
                factor = cosine_factor(step, n_steps=n_steps)
                own.step(tokens, targets[of_part], asymmetric, factor=factor)
            step += 1
    for key, value in own.weights_of(0).items():
        torch.testing.assert_close(seen.stack.weights_of(0)[key], value)


def layered() -> tuple[ArraySource, np.ndarray]:
    """Noise in layer 1, needles in layer 2."""
    tokens, targets = needle_tokens(120)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(7))
    return ArraySource({1: LayerTokens(noise), 2: LayerTokens(tokens)}), targets


def test_layers_are_trained_from_the_same_batches_as_each_is_alone() -> None:
    source, targets = layered()
    entries = [Entry(f"protobin@{layer}", "protobin", {}, (layer,)) for layer in (1, 2)]
    arguments = {"multi_label": True, "settings": replace(SETTINGS, n_epochs=12)}
    together = train(source, targets, SPLIT, probes=entries, **arguments)
    for entry, outcome in zip(entries, together, strict=True):
        [alone] = train(source, targets, SPLIT, probes=[entry], **arguments)
        assert np.array_equal(outcome.test_scores, alone.test_scores)
    assert together[1].valid_values[0] > together[0].valid_values[0] + 0.1


def test_a_mix_leaves_the_tokens_of_its_last_layer_to_other_probes() -> None:
    # More than one block of floats, so that the last one differs from the first.
    random = torch.Generator().manual_seed(0)
    stored = {n: LayerTokens(torch.randn(40, 256, 64, generator=random).half()) for n in (1, 2)}
    tokens = BatchTokens(Batch(np.arange(40), stored), SETTINGS, Buffers())
    patches = tokens.of((2,)).patches
    mean = tokens.of((1, 2)).mean
    assert torch.equal(patches, stored[2].patches.float())
    torch.testing.assert_close(mean, patches.mean(dim=1))


def bank_of(tokens: torch.Tensor) -> NeedleBank:
    names = np.full(len(tokens), "train", dtype=object)
    names[SPLIT.valid], names[SPLIT.test] = "valid", "test"
    return NeedleBank(clip_table(len(tokens), split=names.tolist()), tokens)


def write_labels(path: Path, bank: NeedleBank, targets: np.ndarray) -> Path:
    rows = zip(bank.clips["clip_id"].to_pylist(), targets, strict=True)
    lines = [f"{name},{';'.join(f'c{n}' for n in np.flatnonzero(row))}" for name, row in rows]
    path.write_text("\n".join(["clip_id,labels", *lines]))
    return path


def test_each_label_table_has_a_folder_of_results(tmp_path: Path) -> None:
    tokens, first, second = needles()
    bank = bank_of(tokens)
    tables = [
        write_labels(tmp_path / f"{name}.csv", bank, targets)
        for name, targets in (("kinds", first), ("pairs", second))
    ]
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN/results.json").write_text("{}")
    arguments = {"probes": ["linear"], "settings": SETTINGS, "source": bank.source}
    with pytest.raises(TrialError, match="holds results that cannot be told from these"):
        run_training(bank, tables, tmp_path / "RUN", **arguments)
    results = run_training(bank, tables, tmp_path / "RUN", overwrite=True, **arguments)
    assert not (tmp_path / "RUN/results.json").exists(), "an older run would stand for this one"
    assert list(results) == ["kinds", "pairs"]
    for name, found in results.items():
        folder = tmp_path / "RUN" / name
        assert json.loads((folder / "results.json").read_text()) == found
        assert load_probe(folder / "linear").classes == tuple(found["classes"])
    assert [len(found["classes"]) for found in results.values()] == [4, 2]


def test_a_table_without_clips_in_a_part_is_named(tmp_path: Path) -> None:
    tokens, first, _ = needles()
    bank = bank_of(tokens)
    whole = write_labels(tmp_path / "whole.csv", bank, first)
    part = tmp_path / "part.csv"
    part.write_text("\n".join(whole.read_text().splitlines()[:40]))
    with pytest.raises(TrialError, match="labels of part: found no usable clips in valid and test"):
        run_training(
            bank,
            [whole, part],
            tmp_path / "RUN",
            probes=["linear"],
            source=bank.source,
            allow_unlabelled=True,
        )


def test_tables_of_one_name_are_refused(tmp_path: Path) -> None:
    bank = bank_of(needles()[0])
    tables = [tmp_path / "a/labels.csv", tmp_path / "b/labels.csv"]
    with pytest.raises(TrialError, match="expected different file names: each names a folder"):
        run_training(bank, tables, tmp_path / "RUN", probes=["linear"], source=bank.source)


def test_the_digest_of_a_probes_file_is_that_of_what_was_run(tmp_path: Path) -> None:
    tokens, targets, _ = needles()
    bank, file = bank_of(tokens), tmp_path / "mine.py"
    labels = write_labels(tmp_path / "labels.csv", bank, targets)
    file.write_text("from patchbank.probing.probes.linear import build_linear as build")
    digest = file_sha256(file)
    run_training(
        bank,
        labels,
        tmp_path / "RUN",
        probes=[Entry("mine", str(file))],
        settings=SETTINGS,
        source=bank.source,
        progress=lambda state: (file.write_text("changed"), None)[1],
    )
    assert file.read_text() == "changed"
    saved = json.loads((tmp_path / "RUN/mine/probe.json").read_text())
    assert saved["plugin_sha256"] == digest


def test_several_layers_are_several_probes_and_a_mix_is_one(tmp_path: Path) -> None:
    tokens, targets, _ = needles()
    bank = bank_of(tokens)
    labels = write_labels(tmp_path / "labels.csv", bank, targets)
    out = tmp_path / "RUN"
    results = run_training(
        bank,
        labels,
        out,
        probes=["linear"],
        settings=replace(SETTINGS, search=SearchSettings(n_candidates=1)),
        layer=[(1,), (1, 2)],
        source=bank.source,
    )
    assert results["layers"] == [1, 2]
    assert {name: one["layers"] for name, one in results["probes"].items()} == {
        "linear@1": [1],
        "linear@1+2": [1, 2],
    }
    mixed = load_probe(out / "linear@1+2")
    assert (mixed.layers, mixed.shape.n_layers) == ((1, 2), 2)
    batch = next(bank.source([1, 2]).read([SPLIT.test]))
    assert mixed.predict_batch(batch).shape == (24, 4)
    with pytest.raises(TrialError, match=r"found no layer 1, 2 in the batch, expected layer 1\+2"):
        mixed.predict_proba(tokens)
    # A probe of one layer takes it from a batch of several.
    first = load_probe(out / "linear@1")
    only = next(bank.source([1]).read([SPLIT.test]))
    spoilt = replace(batch, layers={1: batch[1], 2: LayerTokens(7 * batch[2].patches)})
    assert np.array_equal(first.predict_batch(spoilt), first.predict_batch(only))


def test_layers_of_other_sizes_cannot_be_mixed() -> None:
    tokens, targets = needle_tokens(120)
    source = ArraySource({1: LayerTokens(tokens[:, :12]), 2: LayerTokens(tokens)})
    with pytest.raises(TrialError, match=r"found layers 1 and 2 with 12 x 24 and 24 x 24 \(patch"):
        train(
            source,
            targets,
            SPLIT,
            probes=[Entry("linear", "linear", {}, (1, 2))],
            multi_label=True,
            settings=SETTINGS,
        )
