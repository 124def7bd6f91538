from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from needle_sets import ENCODER
from probe_weights import weights_of

from patchbank.pipeline.errors import BankMismatch, TrialError
from patchbank.probing.artefact import ProbeArtefact, load_probe, save_probe
from patchbank.probing.atomic import write_atomically
from patchbank.probing.probes import PROBES, build_probe
from patchbank.probing.probes.base import ProbeShape
from patchbank.probing.probes.tokens import Tokens


def artefact(name: str = "protobin", *, multi_label: bool = True) -> ProbeArtefact:
    probe = build_probe(name, ProbeShape(24, 3, 1))
    return ProbeArtefact(
        probe=name,
        options=probe.options,
        classes=("cat", "dog", "owl"),
        multi_label=multi_label,
        shape=probe.shape,
        weights={key: value[0] for key, value in weights_of(probe, name, [0]).items()},
        layers=(12,),
        encoder_id="e" * 64,
        encoder=ENCODER,
        window={"window_s": 10.0},
        training={"seed": 0},
    )


def tokens(n_clips: int = 70) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    patches = torch.randn(n_clips, 5, 24, generator=random)
    return patches, torch.randn(n_clips, 1, 24, generator=random)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_that_was_saved_and_loaded_predicts_the_same(name: str, tmp_path: Path) -> None:
    before = artefact(name)
    save_probe(tmp_path / name, before)
    after = load_probe(tmp_path / name)
    assert after == before
    patches, prefix = tokens()
    first, second = (one.predict_proba(patches, prefix) for one in (before, after))
    assert {k: v.tolist() for k, v in after.weights.items()} == {
        k: v.tolist() for k, v in before.weights.items()
    }
    # Products of arrays that lie elsewhere in memory may differ in the last bit.
    np.testing.assert_allclose(second, first, rtol=1e-6)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
        "probe.json",
        "probe.safetensors",
    ]


def test_probabilities_are_sigmoids_or_softmaxes_of_the_logits() -> None:
    patches, prefix = tokens()
    probe = artefact("mhca")
    stacked = {key: value[None] for key, value in probe.weights.items()}
    logits = build_probe("mhca", ProbeShape(24, 3, 1)).logits(stacked, Tokens(patches))[0]
    found = probe.predict_proba(patches, prefix)
    np.testing.assert_allclose(found, torch.sigmoid(logits).numpy(), rtol=1e-5)
    found = replace(probe, multi_label=False).predict_proba(patches, prefix)
    np.testing.assert_allclose(found, logits.softmax(dim=-1).numpy(), rtol=1e-5)
    assert found.dtype == np.float32


def test_arrays_of_any_kind_predict_the_same() -> None:
    patches, _ = tokens()
    half = patches.half()
    frozen = half.numpy().copy()
    frozen.flags.writeable = False
    probe = artefact()
    expected = probe.predict_proba(half.float())
    assert np.array_equal(probe.predict_proba(half), expected)
    assert np.array_equal(probe.predict_proba(frozen), expected)


def test_patches_that_do_not_count_are_ignored() -> None:
    patches, _ = tokens(3)
    counts = np.array([5, 2, 1])
    cut = artefact().predict_proba(patches[1:2, :2])
    masked = artefact().predict_proba(patches, n_patches=counts)
    np.testing.assert_allclose(masked[1:2], cut, rtol=1e-5)


def test_no_clips_give_no_rows() -> None:
    assert artefact().predict_proba(np.zeros((0, 5, 24), dtype=np.float32)).shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "found"),
    [((2, 5, 30), r"\(2, 5, 30\)"), ((2, 24), r"\(2, 24\)")],
    ids=["dim", "axes"],
)
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...], found: str) -> None:
    message = rf"expected patches \(clip, patch, dim=24\), found {found}: this probe is trained on "
    with pytest.raises(TrialError, match=message + "needle, layer 12"):
        artefact().predict_proba(np.zeros(shape, dtype=np.float32))


def test_a_cls_probe_asks_for_prefix_tokens() -> None:
    message = "expected prefix tokens beside the patches, found none"
    with pytest.raises(TrialError, match=message):
        artefact("linear-cls").predict_proba(tokens()[0])


def test_the_same_encoder_passes() -> None:
    assert artefact().check_encoder(ENCODER, "e" * 64) is None


def test_another_encoder_is_refused_field_by_field() -> None:
    other = ENCODER | {"weights_sha256": "1" * 64, "config": {"depth": 3}}
    with pytest.raises(BankMismatch) as caught:
        artefact().check_encoder(other, "a" * 64)
    assert caught.value.differences == {
        "config.depth": (3, 2),
        "weights_sha256": ("1" * 64, "0" * 64),
    }
    message = "probe 'protobin' was trained on tokens of another encoder (needle, layer 12)"
    assert str(caught.value).startswith(message)


def test_encoders_that_differ_only_in_their_id_are_refused_by_it() -> None:
    with pytest.raises(BankMismatch) as caught:
        artefact().check_encoder(ENCODER, "a" * 64)
    assert caught.value.differences == {"encoder_id": ("a" * 64, "e" * 64)}


def test_a_folder_without_a_probe_names_the_probes_inside_it(tmp_path: Path) -> None:
    with pytest.raises(TrialError, match=r"found no probe\.json in .*, expected a probe's folder$"):
        load_probe(tmp_path)
    save_probe(tmp_path / "mhca", artefact("mhca"))
    with pytest.raises(TrialError, match="it has probes mhca: name one of these folders"):
        load_probe(tmp_path)


def test_arrays_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    save_probe(tmp_path, artefact())
    (tmp_path / "probe.safetensors").write_bytes(b"nonsense")
    with pytest.raises(TrialError, match=r"cannot read .*probe\.safetensors \(.*; train again"):
        load_probe(tmp_path)
    (tmp_path / "probe.safetensors").unlink()
    with pytest.raises(TrialError, match=r"cannot read .*probe\.safetensors"):
        load_probe(tmp_path)


def test_arrays_of_another_run_are_refused(tmp_path: Path) -> None:
    save_probe(tmp_path, artefact())
    description = json.loads((tmp_path / "probe.json").read_text())
    description["classes"] = ["cat", "dog"]
    (tmp_path / "probe.json").write_text(json.dumps(description))
    with pytest.raises(TrialError, match=r"found arrays .*60.* expected .*40.* not of one run"):
        load_probe(tmp_path)


@pytest.mark.parametrize("key", ["plugin", "probe"])
def test_a_file_that_a_folder_names_is_not_run(key: str, tmp_path: Path) -> None:
    save_probe(tmp_path, artefact())
    mine = tmp_path / "mine.py"
    mine.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: str(mine)}))
    with pytest.raises(TrialError, match=r"names a file to run, .* --plugin FILE\.py"):
        load_probe(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    save_probe(tmp_path, artefact())
    (tmp_path / "probe.json").write_text('{"format": 3}')
    with pytest.raises(TrialError, match=r"found format 3 in .*, expected 2; update patchbank"):
        load_probe(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
