"""Views that `extract` makes: what is in a bank, whoever stops or shares the work."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import format_reader
import numpy as np
import pytest
import soundfile
import torch
import zarr
from audio_sets import write_tone
from crash_banks import n_committed
from dask_cluster import Cluster
from fake_bank import SETTINGS
from format_reader import FormatReader
from killable import Forks, Moment
from made_views import EVERYTHING, MADE, N_ROWS, by_key, waveform_of

from patchbank.pipeline.audio import decode_clip
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.extraction import extract, prepare
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.specs import AugmentSpec, MixupSpec, WindowSpec
from patchbank.probing.labels import read_labels
from patchbank.probing.run import run_training
from patchbank.probing.settings import SearchSettings, TrainSettings


def test_a_bank_says_all_that_its_tokens_are_made_of(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbank.pipeline.encoders.fake import FakeEncoder

    seen: list[np.ndarray] = []
    real = FakeEncoder.frontend

    def watched(self: FakeEncoder, waveform: torch.Tensor) -> torch.Tensor:
        seen.extend(waveform.numpy().copy())
        return real(self, waveform)

    monkeypatch.setattr(FakeEncoder, "frontend", watched)
    bank = extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=MADE)
    heard = {hashlib.sha256(one.tobytes()).hexdigest() for one in seen}
    monkeypatch.undo()
    rows = by_key(bank.clips)
    assert len(rows) == bank.n_clips == N_ROWS
    waveforms = np.stack([waveform_of(row, rows, clip_table.parent) for row in rows.values()])
    for waveform in waveforms:
        assert hashlib.sha256(waveform.tobytes()).hexdigest() in heard
    encoder = load_encoder("fake")
    expected = encoder.encode(encoder.frontend(torch.from_numpy(waveforms)))
    for layer in (1, 2):
        found = zarr.open_array(bank.path / f"layers/{layer}/patches", mode="r")[:]
        np.testing.assert_allclose(found, expected[layer].patches.numpy(), atol=2e-6)
    mixed = [row for row in rows.values() if row["mix_sources"]]
    assert len(mixed) > 25
    assert all(row["mix_gains"] for row in mixed)


def test_gains_and_digests_of_views_follow_from_other_rows(made: Bank, clip_table: Path) -> None:
    rows = by_key(made.clips)
    for row in rows.values():
        power = {
            name: np.mean(np.square(soundfile.read(clip_table.parent / rows[name, 0]["path"])[0]))
            for name in (row["clip_id"], *row["mix_sources"])
        }
        gains = [
            np.sqrt(power[row["clip_id"]] / power[name]) * 10 ** (-snr / 20)
            for name, snr in zip(row["mix_sources"], row["mix_snr_db"], strict=True)
        ]
        np.testing.assert_allclose(row["mix_gains"], gains, rtol=1e-12)
        if not row["view"]:
            continue
        made_of = [
            rows[row["clip_id"], 0]["audio_sha256"],
            [rows[name, 0]["audio_sha256"] for name in row["mix_sources"]],
            row["mix_snr_db"],
            row["shift_samples"],
            row["gain_db"],
        ]
        expected = hashlib.sha256(format_reader.to_json(made_of).encode()).hexdigest()
        assert row["audio_sha256"] == expected


def test_clean_rows_are_those_of_a_bank_without_views(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, stored_dtype="float32")
    plain = extract(clip_table, encoder="fake", out=tmp_path / "p.bank", settings=settings)
    clean = np.flatnonzero(made.clips["view"].to_numpy() == 0)
    found = zarr.open_array(made.path / "layers/1/patches", mode="r")[:][clean]
    expected = zarr.open_array(plain.path / "layers/1/patches", mode="r")[:]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    kept = ["clip_id", "path", "start_s", "duration_s", "audio_sha256", "split"]
    assert made.clips.take(clean).select(kept).equals(plain.clips.select(kept))
    assert made.recipe_id != plain.recipe_id
    assert made.encoder_id == plain.encoder_id


def test_the_card_records_the_augmentations(made: Bank) -> None:
    assert made.card["augment"] == {
        "seed": 0,
        "mixup": {"p": 0.9, "min_snr_db": 2.0, "max_snr_db": 30.0, "max_sources": 3},
        "shift": {"max_s": None},
        "gain": {"min_db": -6.0, "max_db": 6.0},
    }
    assert verify_bank(made.path) == ()
    assert FormatReader(made.path).clips.to_pylist() == made.clips.to_pylist()


def test_a_plan_counts_views_and_the_same_command_has_nothing_left(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    plan = prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=MADE).plan
    assert plan.schema.n_clips == N_ROWS
    assert plan.missing_shards == tuple(range(5))
    again = prepare(clip_table, encoder="fake", out=made.path, settings=MADE).plan
    assert again.missing_shards == ()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("runs")) as forks:
        yield forks


KILLABLE: dict[str, Any] = {"n_views": 2, "augment": EVERYTHING.identity()}


@pytest.fixture(scope="module")
def undisturbed(forks: Forks, clip_table: Path) -> bytes:
    out = forks._folder / "undisturbed.bank"
    forks.finish(clip_table, out, **KILLABLE)
    return (out / "seal.json").read_bytes()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Moment(r"^os\.link .*commits/0", nth=3), id="before a commit"),
        pytest.param(Moment(r"^open .*clips\.parquet"), id="while sealing"),
    ],
)
def test_a_killed_run_goes_on_with_the_same_views(
    moment: Moment, forks: Forks, undisturbed: bytes, clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    assert forks.start(clip_table, out, at=moment, **KILLABLE).wait() == -9
    assert n_committed(out)
    assert not (out / "seal.json").exists()
    forks.finish(clip_table, out, **KILLABLE)
    assert (out / "seal.json").read_bytes() == undisturbed


def test_workers_make_the_same_views(
    forks: Forks, undisturbed: bytes, clip_table: Path, tmp_path: Path
) -> None:
    with Cluster(tmp_path / "cluster", forks) as cluster:
        cluster.workers("one", "two")
        forks.finish(clip_table, tmp_path / "x.bank", scheduler=cluster.address, **KILLABLE)
    assert (tmp_path / "x.bank/seal.json").read_bytes() == undisturbed


def test_a_source_that_cannot_be_decoded_fails_its_views_and_is_named(
    clip_table: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clip_table.parent, tmp_path / "set"))
    bad = np.full(16_000, np.nan, np.float32)
    soundfile.write(folder / "audio/0005.wav", bad, 16_000, subtype="FLOAT")
    bank = extract(folder / "clips.csv", encoder="fake", out=tmp_path / "x.bank", settings=MADE)
    reason = "16000 of 16000 samples are NaN or infinite"
    n_mixed = 0
    for row in by_key(bank.clips).values():
        has_it = "audio/0005.wav" in row["mix_sources"]
        is_it = row["clip_id"] == "audio/0005.wav"
        n_mixed += has_it
        assert row["status"] == (2 if has_it or is_it else 1)
        words = f"'audio/0005.wav', which is mixed in: {reason}" if has_it else reason
        assert row["reason"] == (words if has_it or is_it else None)
        if has_it or is_it:
            assert row["audio_sha256"] is None
            assert row["mix_gains"] == []
    assert n_mixed > 1
    assert verify_bank(bank.path) == ()


def test_masked_padding_counts_the_audio_of_a_view(tmp_path: Path) -> None:
    for index, duration_s in enumerate((0.2, 1.0)):
        write_tone(tmp_path / f"{index}.wav", hertz=300.0 + index, duration_s=duration_s)
    (tmp_path / "clips.csv").write_text("path,split\n0.wav,train\n1.wav,train\n")
    settings = replace(
        SETTINGS,
        mask_padding=True,
        n_views=1,
        augment=AugmentSpec(MixupSpec(p=1.0, max_sources=1)),
    )
    bank = extract(
        tmp_path / "clips.csv", encoder="fake", out=tmp_path / "x.bank", settings=settings
    )
    assert [row["view"] for row in bank.clips.to_pylist()] == [0, 1, 0, 1]
    assert bank.n_patches(1).tolist() == [4, 20, 20, 20]


def test_windows_of_a_recording_are_mixed_where_they_lie(tmp_path: Path) -> None:
    for index in range(2):
        write_tone(tmp_path / f"long{index}.wav", hertz=300.0 + index, duration_s=4.0, seed=index)
    (tmp_path / "clips.csv").write_text("path,split\nlong0.wav,train\nlong1.wav,train\n")
    settings = replace(SETTINGS, n_views=1, augment=AugmentSpec(MixupSpec(p=1.0, max_sources=1)))
    bank = extract(
        tmp_path / "clips.csv", encoder="fake", out=tmp_path / "x.bank", settings=settings
    )
    rows = by_key(bank.clips)
    assert len(rows) == 16
    for (clip_id, view), row in rows.items():
        if view:
            parts = [rows[name, 0] for name in (clip_id, *row["mix_sources"])]
            assert len({part["path"] for part in parts}) == 2
            powers = [float(np.mean(np.square(decode(tmp_path, p), dtype="f8"))) for p in parts]
            snr_db = row["mix_snr_db"][0]
            gain = np.sqrt(powers[0] / powers[1]) * 10 ** (-snr_db / 20)
            assert row["mix_gains"][0] == pytest.approx(gain, rel=1e-12)


def decode(folder: Path, row: dict[str, Any]) -> np.ndarray:
    return decode_clip(
        folder / row["path"],
        start_s=row["start_s"],
        window=WindowSpec(1.0, 1.0),
        sample_rate_hz=16_000,
    ).waveform


def test_a_quantised_bank_is_calibrated_on_views_too(clip_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.bank"
    bank = extract(clip_table, encoder="fake", out=out, settings=replace(MADE, stored_dtype="int8"))
    found = rebuild_bank(
        [extract(clip_table, encoder="fake", out=tmp_path / "f.bank", settings=MADE)],
        tmp_path / "c.bank",
        dtype="int8",
    )
    np.testing.assert_allclose(
        bank.constants(1).arrays()["channel_shift"],
        found.constants(1).arrays()["channel_shift"],
        rtol=1e-5,
    )


def distinct_labels(table: Path, path: Path) -> Path:
    """A class of its own for every clip of a table."""
    with table.open(newline="") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    lines = [f"{name},class {index:04d}" for index, name in enumerate(names)]
    path.write_text("\n".join(["clip_id,labels", *lines]) + "\n")
    return path


def test_a_view_has_the_labels_of_all_its_parts(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    path = distinct_labels(clip_table, tmp_path / "labels.csv")
    labels, one_each = (read_labels(path, made.clips, task=t) for t in ("multilabel", "auto"))
    assert labels.known.all()
    assert not one_each.multi_label
    for row, targets, soft in zip(
        made.clips.to_pylist(), labels.targets, one_each.targets, strict=True
    ):
        parts = {row["clip_id"], *row["mix_sources"]}
        expected = {f"class {int(Path(name).stem):04d}" for name in parts}
        assert {labels.classes[index] for index in np.flatnonzero(targets)} == expected
        np.testing.assert_array_equal(soft, targets / np.float32(len(parts)))


def test_training_uses_views_and_tests_on_clean_clips(
    made: Bank, clip_table: Path, tmp_path: Path
) -> None:
    results = run_training(
        made,
        clip_table.parent / "labels.csv",
        tmp_path / "run",
        probes=["linear"],
        settings=TrainSettings(n_epochs=2, n_seeds=1, search=SearchSettings(n_candidates=1)),
        task="multilabel",
    )
    (fold,) = results["folds"]
    assert (fold["train"], fold["valid"], fold["test"]) == (60, 10, 10)
