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
    description["classes"] = {"cat": 0, "dog": 1}
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


def test_another_format_asks_for_an_update(tmp_path: Path) -> None:
    save_probe(tmp_path, artefact())
    for found in (2, 4):
        (tmp_path / "probe.json").write_text(f'{{"format": {found}}}')
        with pytest.raises(
            TrialError, match=rf"found format {found} in .*, expected 3; update pat"
        ):
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


def test_the_label_map_gives_each_class_its_index_and_keeps_their_order(tmp_path: Path) -> None:
    before = replace(artefact(), classes=("owl", "cat", "dog"))
    save_probe(tmp_path, before)
    stored = json.loads((tmp_path / "probe.json").read_text())
    assert list(stored["classes"].items()) == [("owl", 0), ("cat", 1), ("dog", 2)]
    assert load_probe(tmp_path).classes == ("owl", "cat", "dog")


def test_the_temperature_divides_logits_and_keeps_rankings() -> None:
    patches, _ = tokens()
    for multi_label in (True, False):
        plain = artefact("mhca", multi_label=multi_label)
        first = plain.predict_proba(patches)
        found = replace(plain, temperature=2.0).predict_proba(patches)
        if multi_label:
            expected = 1 / (1 + np.sqrt((1 - first) / first))
        else:
            expected = np.sqrt(first) / np.sqrt(first).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.array_equal(found.argmax(axis=1), first.argmax(axis=1))


def test_decisions_are_cut_at_each_class_threshold_or_take_the_likeliest() -> None:
    found = np.array([[0.6, 0.2, 0.2], [0.4, 0.3, 0.3]], dtype=np.float32)
    chosen = replace(artefact(), thresholds=(0.5, 0.3, 0.1))
    assert chosen.decide(found).tolist() == [[True, False, True], [False, True, True]]
    assert artefact().decide(found).tolist() == [[True, False, False], [False] * 3]
    likeliest = replace(artefact(), multi_label=False).decide(found)
    assert likeliest.tolist() == [[True, False, False]] * 2


HOSTILE = {
    "thresholds of another number": ({"thresholds": [0.5]}, "found 1 thresholds for 3 classes"),
    "a threshold above one": ({"thresholds": [0.5, 2, 0.5]}, "a threshold is 2, no number from"),
    "a threshold that is no number": ({"thresholds": [0.5, True, 0]}, "a threshold is True"),
    "thresholds that are no list": ({"thresholds": 0.5}, "found 0.5 thresholds for 3 classes"),
    "a temperature of zero": ({"temperature": 0}, "temperature is 0, no number above 0"),
    "a negative temperature": ({"temperature": -1.5}, "temperature is -1.5, no number above 0"),
    "a temperature of NaN": ({"temperature": float("nan")}, "temperature is nan"),
    "an endless temperature": ({"temperature": float("inf")}, "temperature is inf"),
    "a temperature beyond floats": ({"temperature": 10**400}, "int too large to convert"),
    "no width": ({"shape": {"dim": 0, "n_classes": 3}}, "no sizes of tokens"),
    "half a token": ({"shape": {"dim": 1.5, "n_classes": 3}}, "no sizes of tokens"),
    "a grid of one": ({"shape": {"dim": 24, "n_classes": 3, "grid": [4]}}, "no (time, freq)"),
    "more than memory": ({"shape": {"dim": 10**15, "n_classes": 3}}, "RuntimeError("),
    "a temperature in words": ({"temperature": "1"}, "temperature is '1'"),
    "an unknown field": ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    "weights in the description": ({"weights": {}}, "multiple values for keyword argument"),
    "a list of classes": ({"classes": ["cat", "dog", "owl"]}, "no object of names and indices"),
    "indices that skip": ({"classes": {"cat": 0, "dog": 2, "owl": 3}}, "other than 0, 1, 2"),
    "an index twice": ({"classes": {"cat": 0, "dog": 0, "owl": 1}}, "other than 0, 1, 2"),
    "indices that are true": ({"classes": {"cat": 0, "dog": True, "owl": 2}}, "other than 0, 1"),
    "a default of no class": ({"default_thresholds": ["bat"]}, "['bat'], no list of classes"),
    "a probe without a name": ({"probe": 5}, "probe is 5, no text"),
    "options in a row": ({"options": [1]}, "options is [1], no object"),
    "a shape in a row": ({"shape": [24, 3]}, "shape is [24, 3], no object"),
    "one layer": ({"layers": 12}, "layers is 12, no list"),
    "layers in words": ({"layers": ["x"]}, "layers is ['x'], no different numbers from 1 on"),
    "a layer twice": ({"layers": [3, 3]}, "layers is [3, 3], no different numbers"),
    "a layer before the first": ({"layers": [0]}, "layers is [0], no different numbers"),
    "a numbered encoder": ({"encoder_id": 7}, "encoder_id is 7, no text"),
    "an encoder in a row": ({"encoder": []}, "encoder is [], no object"),
    "an encoder named by a list": ({"encoder": {"name": []}}, "encoder.name is [], no text"),
    "a front end of one": ({"encoder": {"frontend": 1}}, "encoder.frontend is 1, no object"),
    "a window of ten": ({"window": 10}, "window is 10, no object"),
    "a window in words": ({"window": {"window_s": "1"}}, "window.window_s is '1', no number"),
    "an endless window": ({"window": {"window_s": 1e9}}, "window_s must be above 0 and at most"),
    "an unknown rule": ({"window": {"pad": []}}, "window.pad is [], none of ('zero', 'repeat')"),
    "a window of its own": ({"window": {"wide": 1}}, "unexpected keyword argument 'wide'"),
    "tokens of text": ({"tokens": {"stored_dtype": "str"}}, "tokens.stored_dtype is 'str'"),
    "a list of types": ({"tokens": {"stored_dtype": []}}, "tokens.stored_dtype is [], none"),
    "half a mask": ({"tokens": {"mask_padding": 0.5}}, "tokens.mask_padding is 0.5, no true"),
    "no digest": ({"plugin_sha256": None}, "plugin_sha256 is None, no text"),
    "facts in a row": ({"validation": []}, "validation is [], no object"),
    "a training of text": ({"training": "x"}, "training is 'x', no object"),
    "a task of neither kind": ({"multi_label": "yes"}, "multi_label is 'yes', no true or false"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_description_that_states_something_impossible_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_probe(tmp_path, artefact())
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TrialError, match=r"probe\.json is damaged \(.*; train again") as caught:
        load_probe(tmp_path)
    assert message in str(caught.value)


def test_a_class_that_stands_twice_is_refused(tmp_path: Path) -> None:
    save_probe(tmp_path, artefact())
    path = tmp_path / "probe.json"
    path.write_text(path.read_text().replace('"dog": 1', '"cat": 1'))
    with pytest.raises(TrialError, match=r"damaged \(.*'cat' stands twice in one object"):
        load_probe(tmp_path)


def test_a_description_without_what_audio_needs_names_it() -> None:
    with pytest.raises(
        TrialError, match=r"no encoder\.frontend, tokens\.stored_dtype, tokens\.mask"
    ):
        artefact().check_origin()


@pytest.mark.parametrize(
    "key",
    ["temperature", "thresholds", "classes", "shape", "multi_label", "probe", "layers", "window"],
)
def test_a_description_that_lacks_a_field_is_refused(key: str, tmp_path: Path) -> None:
    save_probe(tmp_path, artefact())
    path = tmp_path / "probe.json"
    fields = json.loads(path.read_text())
    del fields[key]
    path.write_text(json.dumps(fields))
    with pytest.raises(TrialError, match=rf"is damaged \(KeyError\('{key}'\)\)"):
        load_probe(tmp_path)
