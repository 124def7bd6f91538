from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import xarray
import zarr
from audio_sets import write_clip_set, write_tone
from fake_bank import N_CLIPS, SETTINGS

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import (
    BankMismatch,
    EncoderError,
    PatchbankError,
)
from patchbank.pipeline.extraction import ExtractionSettings, Progress, extract, prepare, run
from patchbank.pipeline.specs import WindowSpec, human_bytes


def test_a_bank_holds_the_tokens_of_its_encoder(sealed: Bank, clip_table: Path) -> None:
    encoder = load_encoder("fake")
    rows = [0, 17, N_CLIPS - 1]
    waves = [
        soundfile.read(clip_table.parent / f"audio/{row:04d}.wav", dtype="float32")[0]
        for row in rows
    ]
    expected = encoder.encode(encoder.frontend(torch.from_numpy(np.stack(waves))))
    for layer in (1, 2):
        found = zarr.open_array(sealed.path / f"layers/{layer}/patches", mode="r")
        np.testing.assert_allclose(
            np.stack([found[row] for row in rows]), expected[layer].patches, atol=1e-3, rtol=1e-3
        )


def test_every_layer_opens_with_zarr_and_xarray(sealed: Bank) -> None:
    data = xarray.open_zarr(sealed.path, group="layers/2", consolidated=False)
    assert data["patches"].dims == ("clip", "patch", "dim")
    assert data["prefix"].dims == ("clip", "prefix", "dim")
    assert data["patches"].dtype == np.float16
    plain = zarr.open_group(sealed.path / "layers/2", mode="r")
    patches = np.asarray(plain["patches"], np.float32)
    np.testing.assert_array_equal(data["patches"].values, plain["patches"])
    np.testing.assert_allclose(data["mean"].values, patches.mean(1), atol=1e-6)
    np.testing.assert_array_equal(data["max"].values, patches.max(1))
    np.testing.assert_array_equal(data["min"].values, patches.min(1))
    assert set(np.asarray(data["n_patches"]).tolist()) == {data.sizes["patch"]}


def test_clips_keep_the_tables_order_and_columns(sealed: Bank) -> None:
    clips = sealed.clips
    assert clips["clip_id"].to_pylist() == [f"audio/{row:04d}.wav" for row in range(N_CLIPS)]
    assert clips["split"].to_pylist()[:4] == ["train", "train", "valid", "test"]
    assert set(clips["status"].to_pylist()) == {1}
    assert len(set(clips["audio_sha256"].to_pylist())) == N_CLIPS


def test_a_sealed_bank_names_every_file_and_nothing_of_the_machine(sealed: Bank) -> None:
    seal = json.loads((sealed.path / "seal.json").read_bytes())
    on_disk = {p.relative_to(sealed.path).as_posix() for p in sealed.path.rglob("*") if p.is_file()}
    assert {file["path"] for file in seal["files"]} == on_disk - {"seal.json"}
    every_text = b"".join(p.read_bytes() for p in sealed.path.rglob("*.json"))
    assert str(sealed.path.parent).encode() not in every_text


def test_the_same_command_again_changes_nothing(sealed: Bank, clip_table: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in sealed.path.rglob("*")}
    calls: list[Progress] = []
    again = extract(
        clip_table, encoder="fake", out=sealed.path, settings=SETTINGS, progress=calls.append
    )
    assert again.fingerprint == sealed.fingerprint
    assert calls == []
    assert {p: p.stat().st_mtime_ns for p in sealed.path.rglob("*")} == before


def test_failed_clips_are_recorded_and_do_not_disturb_their_batch(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_table.parent, tmp_path / "set")
    (folder / "audio/0003.wav").write_bytes(b"RIFF this is no audio")
    soundfile.write(folder / "audio/0005.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT")
    (folder / "audio/0007.wav").write_bytes(b"")
    bank = extract(folder / "clips.csv", encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    failed = [3, 5, 7]
    assert np.flatnonzero(bank.status == 2).tolist() == failed
    reasons = [bank.clips["reason"][row].as_py() for row in failed]
    assert "NaN" in reasons[1]
    assert all(reasons)
    found = zarr.open_array(bank.path / "layers/1/patches", mode="r")[:]
    good = np.setdiff1d(np.arange(N_CLIPS), failed)
    np.testing.assert_array_equal(
        found[good], zarr.open_array(sealed.path / "layers/1/patches", mode="r")[:][good]
    )
    assert np.isnan(found[failed]).all()
    assert np.isnan(bank.pooled(1, "mean")[failed]).all()
    assert bank.n_patches(1)[failed].tolist() == [0, 0, 0]


def test_mask_padding_counts_only_patches_with_audio(tmp_path: Path) -> None:
    write_tone(tmp_path / "set/long.wav", hertz=300, duration_s=1.0)
    write_tone(tmp_path / "set/short.wav", hertz=300, duration_s=0.25)
    settings = ExtractionSettings(window=WindowSpec(1.0, 1.0), layers=(1,), mask_padding=True)
    bank = extract(tmp_path / "set", encoder="fake", out=tmp_path / "x.bank", settings=settings)
    assert bank.n_patches(1).tolist() == [20, 6]
    tokens = np.asarray(zarr.open_array(bank.path / "layers/1/patches", mode="r")[:], np.float32)
    np.testing.assert_allclose(bank.pooled(1, "mean")[1], tokens[1, :6].mean(0), atol=1e-6)


def test_a_plan_is_right_about_the_bytes(sealed: Bank, clip_table: Path, tmp_path: Path) -> None:
    plan = prepare(clip_table, encoder="fake", out=tmp_path / "y.bank", settings=SETTINGS).plan
    shard_files = sealed.path.glob("layers/*/p*/c.*")
    token_bytes = sum(plan.schema.shard_bytes(shard) for shard in range(plan.schema.n_shards))
    assert token_bytes == sum(path.stat().st_size for path in shard_files)
    assert len(plan.missing_shards) == 3
    assert not (tmp_path / "y.bank").exists()


def test_a_disk_that_is_too_small_is_refused(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    extraction = prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    with pytest.raises(PatchbankError, match=r"needs .* more, 977 KiB are free .* fewer --layers"):
        run(extraction)
    assert not (tmp_path / "x.bank").exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param({"window": WindowSpec(0.5, 0.5)}, "window.window_s: found 1.0", id="window"),
        pytest.param({"layers": (1,)}, r"layers: found \[1, 2\], expected \[1\]", id="layers"),
        pytest.param({"stored_dtype": "float32"}, "stored_dtype: found 'float16'", id="dtype"),
        pytest.param({"mask_padding": True}, "mask_padding: found False", id="mask"),
        pytest.param({"batch_size": 3}, "extraction.batch_size: found 4", id="batch size"),
    ],
)
def test_another_recipe_does_not_go_on_with_a_bank(
    change: dict[str, object], field: str, sealed: Bank, clip_table: Path
) -> None:
    settings = ExtractionSettings(**{**vars(SETTINGS), **change})
    with pytest.raises(BankMismatch, match=field):
        extract(clip_table, encoder="fake", out=sealed.path, settings=settings)


def test_other_weights_do_not_go_on_with_a_bank(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(b"other weights")
    with pytest.raises(BankMismatch, match=r"encoder.weights_sha256: found ''"):
        extract(
            clip_table,
            encoder="fake",
            weights=tmp_path / "weights",
            out=sealed.path,
            settings=SETTINGS,
        )


def test_another_table_does_not_go_on_with_a_bank(sealed: Bank, tmp_path: Path) -> None:
    table = write_clip_set(tmp_path / "other", n_clips=4)
    with pytest.raises(BankMismatch, match="n_clips: found 40, expected 4"):
        extract(table, encoder="fake", out=sealed.path, settings=SETTINGS)


def test_a_folder_that_is_no_bank_is_never_written_into(clip_table: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    with pytest.raises(PatchbankError, match="exists and is no bank"):
        extract(clip_table, encoder="fake", out=tmp_path / "thesis", settings=SETTINGS)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_unknown_layers_and_devices_are_refused(clip_table: Path, tmp_path: Path) -> None:
    for settings, words in (
        (ExtractionSettings(layers=(3,)), "fake has no layer 3; it has 1 to 2"),
        (ExtractionSettings(layers="first"), "no layer first"),
        (ExtractionSettings(device="cuda:77"), "no device 'cuda:77' here"),
    ):
        with pytest.raises(EncoderError, match=words):
            prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings)


def test_overflowing_tokens_stop_a_run_that_cannot_succeed(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbank.pipeline.encoders.fake import FakeEncoder

    real = FakeEncoder.encode

    def loud(self: FakeEncoder, features: torch.Tensor, layers: object = None) -> object:
        out = real(self, features, layers)  # type: ignore[arg-type]
        for tokens in out.values():
            tokens.patches.mul_(1e6)
        return out

    monkeypatch.setattr(FakeEncoder, "encode", loud)
    with pytest.raises(EncoderError, match="beyond the range of float16"):
        extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    settings = ExtractionSettings(**{**vars(SETTINGS), "stored_dtype": "float32"})
    bank = extract(clip_table, encoder="fake", out=tmp_path / "y.bank", settings=settings)
    assert (bank.status == 1).all()


@pytest.mark.parametrize(
    ("n_bytes", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 * 2**40, "3 TiB"),
        (2**60, "1.05e+06 TiB"),
    ],
)
def test_bytes_are_written_for_people(n_bytes: int, words: str) -> None:
    assert human_bytes(n_bytes) == words
