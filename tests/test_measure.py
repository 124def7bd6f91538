"""What another stored type costs, measured and kept in a bank's notes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fake_bank import SETTINGS

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankMismatch
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.probing.measure import measure_change
from patchbank.probing.measurements import read_measurements, write_measurement
from patchbank.probing.settings import SearchSettings, TrainSettings

FAST = TrainSettings(n_epochs=3, n_seeds=2, search=SearchSettings(n_candidates=1))


def test_convert_measures_and_show_prints(
    sealed: Bank, clip_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "8.bank"
    labels = clip_table.parent / "labels.csv"
    line = ["convert", str(sealed.path), "--out", str(out), "--dtype", "int8", "--seeds", "1"]
    assert main(["bank", *line, "--measure", str(labels)]) == 0
    (note,) = (out / "notes/measured").glob("labels-*-2.json")
    facts = json.loads(note.read_text())
    assert facts["reference"]["stored_dtype"] == "float16"
    assert set(facts["probes"]) == {"linear", "linpre", "mhca", "protobin"}
    for change in facts["probes"].values():
        assert change["change"] == change["bank"]["mean"] - change["reference"]["mean"]
    assert verify_bank(out) == ()
    capsys.readouterr()
    assert main(["bank", "show", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    linear = 100 * facts["probes"]["linear"]["change"]
    assert f"against float16: linear {linear:+.2f}, linpre" in printed
    assert f"points of {facts['metric']} (layer 2, labels.csv, 1 seeds)" in printed
    assert main(["bank", "show", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["measured"]
    assert shown[0]["changes"]["linear"] == facts["probes"]["linear"]["change"]


def test_equal_tokens_change_nothing(sealed: Bank, clip_table: Path, tmp_path: Path) -> None:
    wide = rebuild_bank([sealed], tmp_path / "w.bank", dtype="float32")
    labels = clip_table.parent / "labels.csv"
    facts = measure_change(sealed, wide, labels, probes=["linear"], settings=FAST)
    assert facts["probes"]["linear"]["change"] == 0.0


def test_a_probe_that_is_not_trained_is_measured_too(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    wide = rebuild_bank([sealed], tmp_path / "w.bank", dtype="float32")
    labels = clip_table.parent / "labels.csv"
    facts = measure_change(sealed, wide, labels, probes=["knn"], settings=FAST)
    assert facts["probes"]["knn"]["change"] == 0.0


def test_banks_of_other_clips_are_not_compared(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    subset = rebuild_bank([sealed], tmp_path / "s.bank", rows=[sealed.schema.clip_rows()[:39]])
    with pytest.raises(BankMismatch, match="clip_id: found '39 clips', expected '40 clips'"):
        measure_change(sealed, subset, clip_table.parent / "labels.csv")
    assert not (subset.path / "notes").exists()


def test_a_note_of_another_bank_or_a_broken_one_is_passed_over(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    labels = clip_table.parent / "labels.csv"
    first = rebuild_bank([sealed], tmp_path / "8.bank", dtype="int8")
    facts = measure_change(sealed, first, labels, probes=["linear"], settings=FAST)
    write_measurement(first, facts)
    assert len(read_measurements(first)) == 1
    other = extract(
        clip_table,
        encoder="fake",
        out=tmp_path / "o.bank",
        settings=replace(SETTINGS, stored_dtype="int8"),
    )
    shutil.copytree(first.path / "notes", other.path / "notes")
    assert read_measurements(open_bank(other.path)) == []
    for text in ("{", "[]", '{"probes": 1}', "[" * 100_000):
        (first.path / "notes/measured/broken.json").write_text(text)
        assert len(read_measurements(first)) == 1


def test_both_banks_train_on_the_same_layer(sealed: Bank, clip_table: Path, tmp_path: Path) -> None:
    first = rebuild_bank([sealed], tmp_path / "1.bank", dtype="float32", layers=[1])
    labels = clip_table.parent / "labels.csv"
    facts = measure_change(sealed, first, labels, probes=["linear"], settings=FAST)
    assert facts["layer"] == 1
    assert facts["probes"]["linear"]["change"] == 0.0


def test_wrong_labels_stop_a_conversion_before_it_begins(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.bank"
    line = ["bank", "convert", str(sealed.path), "--dtype", "int8", "--out", str(out)]
    assert main([*line, "--measure", str(tmp_path / "none.csv")]) == 1
    assert "there is no such file" in capsys.readouterr().err
    assert not out.exists()
