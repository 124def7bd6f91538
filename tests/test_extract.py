from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import xarray
import zarr
from audio_sets import write_clip_set, write_tone

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.commit import commit, open_attempt, read_record, record_path
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankIncomplete,
    BankMismatch,
    BankNotFound,
    EncoderError,
    PatchbankError,
)
from patchbank.pipeline.extraction import ExtractionSettings, Progress, extract, prepare, run
from patchbank.pipeline.plan import human_bytes
from patchbank.pipeline.specs import WindowSpec

SETTINGS = ExtractionSettings(window=WindowSpec(1.0, 1.0), layers="all")
N_CLIPS = 40


@pytest.fixture(scope="module")
def clip_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_set(tmp_path_factory.mktemp("set"), n_clips=N_CLIPS)


@pytest.fixture(scope="module")
def sealed(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    out = tmp_path_factory.mktemp("banks") / "fake.bank"
    return extract(clip_table, encoder="fake", out=out, settings=SETTINGS)


@pytest.fixture
def copy(sealed: Bank, tmp_path: Path) -> Path:
    """A sealed bank that a test may damage."""
    return Path(shutil.copytree(sealed.path, tmp_path / "copy.bank"))


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


def test_a_moved_bank_opens(sealed: Bank, tmp_path: Path) -> None:
    moved = shutil.copytree(sealed.path, tmp_path / "elsewhere" / "other name.bank")
    assert open_bank(moved).fingerprint == sealed.fingerprint


KILLED_RUN = """
import os, sys
from pathlib import Path
from patchbank.pipeline import shard
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import WindowSpec
import patchbank.pipeline.bank.commit as commit_module
import patchbank.pipeline.bank.seal as seal_module

table, out, moment = sys.argv[1:]
counter = [0]

def die_at(name, wanted, real):
    def wrapped(*args, **kwargs):
        if name == moment:
            counter[0] += 1
            if counter[0] == wanted:
                os._exit(9)
        return real(*args, **kwargs)
    return wrapped

shard.part_table = die_at("before a commit", 2, shard.part_table)
commit_module._publish = die_at("after the link", 2, commit_module._publish)
seal_module._assemble_clips = die_at("while assembling", 1, seal_module._assemble_clips)
seal_module._write_seal = die_at("before the seal", 1, seal_module._write_seal)
extract(table, encoder="fake", out=out,
        settings=ExtractionSettings(window=WindowSpec(1.0, 1.0), layers="all"))
"""


@pytest.mark.parametrize(
    "moment", ["before a commit", "after the link", "while assembling", "before the seal"]
)
def test_a_killed_run_ends_with_the_seal_of_an_undisturbed_one(
    moment: str, sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed.bank"
    died = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), moment], check=False
    )
    assert died.returncode == 9
    with pytest.raises(BankIncomplete, match="Run the same"):
        open_bank(out)
    extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
    assert (out / "seal.json").read_bytes() == (sealed.path / "seal.json").read_bytes()
    assert not (out / ".work").exists()
    assert not (out / "parts").exists()


def test_only_shards_that_are_not_committed_are_done_again(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before the seal"],
        check=False,
    )
    plan = prepare(clip_table, encoder="fake", out=out, settings=SETTINGS).plan
    assert plan.missing_shards == ()
    assert plan.missing_bytes == 0


def test_the_second_of_two_attempts_at_a_shard_loses(sealed: Bank, copy: Path) -> None:
    before = record_path(copy, "00000").read_bytes()
    with open_attempt(copy, "00000") as attempt:
        assert commit(copy, attempt, "00000", [], {}) is False
    assert record_path(copy, "00000").read_bytes() == before
    assert not attempt.exists()


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
    assert plan.schema.token_bytes() == sum(path.stat().st_size for path in shard_files)
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
        pytest.param({"batch_size": 3}, "extraction.batch_size: found 16", id="batch size"),
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
    with pytest.raises(BankMismatch, match="n_rows: found 40, expected 4"):
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


def test_places_that_hold_no_bank_are_told_apart(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(BankNotFound, match="no bank at"):
        open_bank(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankNotFound, match="no bank at"):
        open_bank(tmp_path / "file")
    zarr.create_group(tmp_path / "group")
    with pytest.raises(BankNotFound, match="is a Zarr group but no bank"):
        open_bank(tmp_path / "group")
    (copy / "seal.json").unlink()
    with pytest.raises(BankIncomplete, match="not sealed"):
        open_bank(copy)


def test_a_newer_format_is_refused_with_the_way_out(copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_bytes())
    document["attributes"]["patchbank_format"] = 99
    (copy / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(BankError, match="format 99; this patchbank reads format 1: pip install"):
        open_bank(copy)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(
            lambda bank: (bank / "layers/1/patches/c.1.0.0").unlink(),
            "layers/1/patches/c.1.0.0 is missing",
            id="a shard is gone",
        ),
        pytest.param(
            lambda bank: (bank / "clips.parquet").write_bytes(b"short"),
            "clips.parquet has 5 bytes",
            id="a truncated file",
        ),
        pytest.param(
            lambda bank: (bank / "seal.json").write_text("{}"), "is damaged", id="empty seal"
        ),
        pytest.param(
            lambda bank: (bank / "seal.json").write_text("{"), "is no JSON", id="broken seal"
        ),
        pytest.param(
            lambda bank: (bank / "seal.json").write_text(
                (bank / "seal.json").read_text().replace("c.0.0.0", "c.9.0.0", 1)
            ),
            "does not match its own root hash",
            id="edited seal",
        ),
    ],
)
def test_damage_shows_when_a_bank_is_opened(damage: object, words: str, copy: Path) -> None:
    damage(copy)  # type: ignore[operator]
    with pytest.raises(BankCorrupt, match=words):
        open_bank(copy)


def test_a_row_that_is_missing_in_its_shard_is_an_error_that_names_it(copy: Path) -> None:
    from patchbank.pipeline.bank.layout import crc32c

    bank = open_bank(copy)
    path = copy / "layers/1/patches/c.1.0.0"
    content = bytearray(path.read_bytes())
    body_start = len(content) - bank.array(1).layout(16).index_bytes
    content[body_start + 16 * 2 : body_start + 16 * 3] = b"\xff" * 16
    body = bytes(content[body_start:-4])
    content[-4:] = crc32c(body).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(BankCorrupt, match=r"c\.1\.0\.0: row 18 is missing"):
        bank.places(1)


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


def test_a_committed_shard_records_its_counts(sealed: Bank) -> None:
    record = read_record(sealed.path, "00002")
    assert record is not None
    assert (record["n_done"], record["n_failed"]) == (8, 0)
    assert next(file["path"] for file in record["files"]) == "layers/1/patches/c.2.0.0"


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


def test_two_extractions_on_one_scheduler_do_not_meet(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from distributed import LocalCluster

    tables = [write_clip_set(tmp_path / name, n_clips=20 + n) for n, name in enumerate("ab")]
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        ThreadPoolExecutor(2) as pool,
    ):
        settings = ExtractionSettings(**{**vars(SETTINGS), "scheduler": cluster.scheduler_address})
        futures = [
            pool.submit(extract, table, encoder="fake", out=table.with_suffix(".bank"),
                        settings=settings)
            for table in tables
        ]  # fmt: skip
        banks = [future.result() for future in futures]
    assert [bank.n_rows for bank in banks] == [20, 21]
    for table, bank in zip(tables, banks, strict=True):
        alone = extract(table, encoder="fake", out=table.with_suffix(".own"), settings=SETTINGS)
        assert bank.root_sha256 == alone.root_sha256


def test_a_bank_that_another_process_began_meanwhile_is_compared(
    clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    other = ExtractionSettings(**{**vars(SETTINGS), "stored_dtype": "float32"})
    late = prepare(clip_table, encoder="fake", out=out, settings=other)
    extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
    with pytest.raises(BankMismatch, match="stored_dtype: found 'float16', expected 'float32'"):
        run(late)


def test_a_committed_shard_of_other_clips_is_refused(clip_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before the seal"]
    subprocess.run(line, check=False)
    record = json.loads((out / "commits/00001.json").read_bytes())
    record["rows_sha256"] = "0" * 64
    (out / "commits/00001.json").write_text(json.dumps(record))
    with pytest.raises(BankCorrupt, match=r"shard 00001 .* holds other clips than the table"):
        extract(clip_table, encoder="fake", out=out, settings=SETTINGS)


def test_a_damaged_commit_record_names_the_way_out(clip_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before the seal"]
    subprocess.run(line, check=False)
    for content in ("{}", "[]", "{", '{"files": [1]}'):
        (out / "commits/00001.json").write_text(content)
        with pytest.raises(BankCorrupt, match=r"00001\.json is damaged .* redoes the shard"):
            extract(clip_table, encoder="fake", out=out, settings=SETTINGS)


def test_a_committed_file_that_is_gone_or_cut_is_made_again(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before a commit"]
    subprocess.run(line, check=False)
    (out / "layers/1/patches/c.0.0.0").write_bytes(b"cut")
    extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
    assert (out / "seal.json").read_bytes() == (sealed.path / "seal.json").read_bytes()


def test_what_dead_attempts_left_is_cleared_before_the_space_is_counted(
    clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before a commit"]
    subprocess.run(line, check=False)
    assert list((out / ".work").glob("0*"))
    with open_attempt(out, "00009") as alive:
        from patchbank.pipeline.bank.commit import recover

        recover(out)
        assert list((out / ".work").glob("0*")) == [alive]
    assert not alive.exists()


def test_a_failing_worker_leaves_no_attempt_behind(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbank.pipeline import shard

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard, "part_table", full)
    with pytest.raises(OSError, match="No space left"):
        extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    assert list((tmp_path / "x.bank/.work").glob("0*")) == []


def test_a_finished_bank_on_a_read_only_disk_is_finished(
    sealed: Bank, clip_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    again = extract(clip_table, encoder="fake", out=sealed.path, settings=SETTINGS)
    assert again.fingerprint == sealed.fingerprint


def test_an_edited_card_shows_when_a_bank_is_opened(copy: Path) -> None:
    text = (copy / "zarr.json").read_text()
    (copy / "zarr.json").write_text(text.replace('"mask_padding": false', '"mask_padding": true '))
    with pytest.raises(BankCorrupt, match=r"zarr\.json is not the one that was sealed"):
        open_bank(copy)


@pytest.mark.parametrize(
    ("window_s", "hop_s", "words"),
    [
        (float("nan"), 1.0, "window_s must be above 0"),
        (float("inf"), 1.0, "window_s must be above 0 and at most 3600 seconds, found inf"),
        (1e7, 1.0, "at most 3600"),
        (1.0, float("nan"), "hop_s must be above 0"),
        (1.0, 0.0, "hop_s must be above 0"),
    ],
)
def test_windows_that_are_no_windows_are_refused(window_s: float, hop_s: float, words: str) -> None:
    with pytest.raises(PatchbankError, match=words):
        WindowSpec(window_s, hop_s)
