"""A probe on each time step of the token grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from needle_sets import ENCODER
from probe_weights import weights_of

from patchbank.pipeline.errors import TrialError
from patchbank.probing.artefact import ProbeArtefact
from patchbank.probing.batch import Batch, LayerTokens
from patchbank.probing.frames import FRAMES_AT_ONCE, TIMELESS, frame_probe, predict_frames
from patchbank.probing.probes import PROBES, build_probe
from patchbank.probing.probes.base import Options, ProbeShape

GRID = (5, 2)
EXAMPLES = sorted((Path(__file__).parents[1] / "docs/examples").glob("*_probe.py"))


def artefact(name: str, *, options: Options | None = None, n_layers: int = 1) -> ProbeArtefact:
    probe = build_probe(name, ProbeShape(24, 3, 1, GRID, n_layers), options)
    stem = Path(name).stem
    return ProbeArtefact(
        probe=stem,
        options=probe.options,
        classes=("cat", "dog", "owl"),
        multi_label=True,
        shape=probe.shape,
        weights={key: value[0] for key, value in weights_of(probe, stem, [0]).items()},
        layers=tuple(range(1, n_layers + 1)),
        encoder=ENCODER,
        plugin=name if name.endswith(".py") else "",
        temperature=1.5,
    )


def batch(n_clips: int = 3, *, n_layers: int = 1, n_patches: list[int] | None = None) -> Batch:
    random = torch.Generator().manual_seed(1)
    counts = None if n_patches is None else torch.tensor(n_patches)
    layers = {
        layer: LayerTokens(
            torch.randn(n_clips, GRID[0] * GRID[1], 24, generator=random).half(),
            torch.randn(n_clips, 1, 24, generator=random).half(),
            counts,
        )
        for layer in range(1, n_layers + 1)
    }
    return Batch(np.arange(n_clips), layers)


def one_by_one(probe: ProbeArtefact, tokens: Batch) -> list[tuple[int, int, np.ndarray]]:
    """Each clip and time step by itself, as a clip of so many patches."""
    found = []
    narrow = replace(probe, shape=replace(probe.shape, grid=(1, GRID[1])))
    counts = tokens[1].n_patches
    for clip in range(len(tokens.rows)):
        n_patches = 10 if counts is None else int(counts[clip])
        for time in range(GRID[0]):
            first, last = time * GRID[1], min((time + 1) * GRID[1], n_patches)
            if first >= last:
                continue
            layers = {
                layer: LayerTokens(one.patches[clip, first:last][None], one.prefix[clip][None])
                for layer, one in tokens.layers.items()
                if one.prefix is not None
            }
            scores = narrow.predict_batch(Batch(np.arange(1), layers))[0]
            found.append((clip, time, scores))
    return found


@pytest.mark.parametrize("name", TIMELESS)
@pytest.mark.parametrize("n_layers", [1, 2])
def test_frames_are_the_probe_on_the_patches_of_each_time_step(name: str, n_layers: int) -> None:
    probe, tokens = artefact(name, n_layers=n_layers), batch(n_layers=n_layers)
    found = predict_frames(frame_probe(probe, GRID), tokens, GRID)
    expected = one_by_one(probe, tokens)
    assert list(zip(found.clips, found.times, strict=True)) == [one[:2] for one in expected]
    np.testing.assert_allclose(
        found.probabilities, np.stack([one[2] for one in expected]), rtol=2e-4
    )
    assert found.probabilities.std(axis=0).max() > 0


def test_patches_that_do_not_count_are_in_no_frame() -> None:
    probe, tokens = artefact("protobin"), batch(n_patches=[10, 3, 1])
    found = predict_frames(frame_probe(probe, GRID), tokens, GRID)
    expected = one_by_one(probe, tokens)
    times = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0)]
    assert list(zip(found.clips, found.times, strict=True)) == times
    np.testing.assert_allclose(
        found.probabilities, np.stack([one[2] for one in expected]), rtol=1e-4
    )


def test_frames_without_audio_are_left_out() -> None:
    probe = frame_probe(artefact("linear"), GRID)
    found = predict_frames(probe, batch(), GRID, n_times=np.array([2, 0, 5]))
    assert found.clips.tolist() == [0, 0, 2, 2, 2, 2, 2]
    assert found.times.tolist() == [0, 1, 0, 1, 2, 3, 4]
    none = predict_frames(probe, batch(), GRID, n_times=np.zeros(3, dtype=np.int64))
    assert none.probabilities.shape == (0, 3)


def test_more_frames_than_go_together_are_the_same() -> None:
    n_clips = FRAMES_AT_ONCE // GRID[0] + 2
    probe, tokens = frame_probe(artefact("mhca"), GRID), batch(n_clips)
    found = predict_frames(probe, tokens, GRID)
    assert len(found.clips) == n_clips * GRID[0] > FRAMES_AT_ONCE
    last = Batch(np.arange(1), {1: LayerTokens(tokens[1].patches[-1:], None)})
    alone = predict_frames(probe, last, GRID)
    np.testing.assert_allclose(found.probabilities[-5:], alone.probabilities, rtol=1e-4)


def test_the_mean_of_a_linear_probe_over_frames_is_what_it_says_of_the_clip() -> None:
    probe, tokens = artefact("linearc", options={"variant": "time-mean"}), batch()
    frames = predict_frames(frame_probe(probe, GRID), tokens, GRID).probabilities
    logits = np.log(frames / (1 - frames)).reshape(3, 5, 3)
    clip = probe.predict_batch(tokens)
    np.testing.assert_allclose(logits.mean(axis=1), np.log(clip / (1 - clip)), rtol=1e-3)


def test_every_shipped_family_either_has_frames_or_says_why_not() -> None:
    refused = set()
    for name in PROBES:
        try:
            frame_probe(artefact(name), GRID)
        except TrialError:
            refused.add(name)
    assert refused == {"conv", "linear-cls"}
    assert set(TIMELESS) == set(PROBES) - refused
    assert frame_probe(artefact("conv", options={"kernel": 1}), GRID)
    for example in EXAMPLES:
        assert frame_probe(artefact(str(example)), GRID)


POSITIONS = """
import torch
from torch import nn

class Positions(nn.Module):
    def __init__(self, shape):
        super().__init__()
        time, freq = shape.grid
        self.share = nn.Parameter(torch.ones(time * freq) {value})
        self.linear = nn.Linear(shape.dim, shape.n_classes)

    def forward(self, tokens):
        return self.linear((tokens.patches * self.share[:, None]).mean(1))

def build(shape, options):
    return Positions(shape)
"""


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("* torch.arange(time * freq)", "minds the order of time steps"),
        ("", "has weights for all time steps together"),
    ],
)
def test_a_module_with_weights_for_positions_is_refused(
    value: str, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "positions.py"
    file.write_text(POSITIONS.format(value=value))
    with pytest.raises(TrialError, match=f"probe 'positions' {reason}.*, or predict without --fr"):
        frame_probe(artefact(str(file)), GRID)


def test_what_has_no_frames_says_why() -> None:
    message = "probe 'conv' minds the order of time steps.*suits linear, mlp, .*, knn on the patch"
    with pytest.raises(TrialError, match=message):
        frame_probe(artefact("conv"), GRID)
    with pytest.raises(TrialError, match="'linear-cls' says the same whatever the patches are"):
        frame_probe(artefact("linear-cls"), GRID)
    with pytest.raises(TrialError, match=r"needs the \(time, freq\) grid .*, found none stated"):
        frame_probe(artefact("linear"), None)
    with pytest.raises(TrialError, match="found a grid of 4 frequencies, expected the 2 that"):
        frame_probe(artefact("linear"), (5, 4))
    with pytest.raises(TrialError, match="found 10 patches in a clip, expected 8, those of the 4"):
        predict_frames(frame_probe(artefact("linear"), GRID), batch(), (4, 2))
