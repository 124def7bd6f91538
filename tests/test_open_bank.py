from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from fake_bank import N_CLIPS, SETTINGS
from hostile_bank import reseal
from token_rows import read_rows

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.row_files import RowFiles
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankIncomplete,
    BankNotFound,
)
from patchbank.pipeline.extraction import extract
from patchbank.probing import BatchLoader
from patchbank.probing.row_readers import MappedRows, RamRows


def test_a_moved_bank_opens(sealed: Bank, tmp_path: Path) -> None:
    moved = shutil.copytree(sealed.path, tmp_path / "elsewhere" / "other name.bank")
    assert open_bank(moved).fingerprint == sealed.fingerprint


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
            lambda bank: (bank / "seal.json").write_text("{"), "is damaged", id="broken seal"
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


def test_an_edited_card_shows_when_a_bank_is_opened(copy: Path) -> None:
    text = (copy / "zarr.json").read_text()
    (copy / "zarr.json").write_text(text.replace('"mask_padding": false', '"mask_padding": true '))
    with pytest.raises(BankCorrupt, match=r"zarr\.json is not the one that was sealed"):
        open_bank(copy)


@pytest.mark.parametrize("version", [99, 2])
def test_a_newer_format_is_refused_by_every_command(
    version: int, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((copy / "zarr.json").read_bytes())
    document["attributes"]["patchbank_format"] = version
    (copy / "zarr.json").write_text(json.dumps(document))
    reseal(copy)
    words = (
        f"{copy} has bank format {version}; this patchbank reads format 1: "
        "pip install --upgrade patchbank"
    )
    for command in (["show"], ["verify"], ["verify", "--quick"]):
        assert main(["bank", *command, str(copy)]) == 1
        said = capsys.readouterr()
        assert (said.out, said.err.strip()) == ("", f"error: {words}")
    assert main(["bank", "ls", str(copy.parent)]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("version", [True, 1.0, "2", 0, -1, None, [2]])
def test_a_format_that_is_no_number_of_a_version_is_damage(version: object, copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_bytes())
    document["attributes"]["patchbank_format"] = version
    (copy / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(BankCorrupt, match="patchbank_format"):
        open_bank(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[NaN]", b"1e999"])
def test_a_card_that_is_no_json_is_damage(content: bytes, copy: Path) -> None:
    (copy / "zarr.json").write_bytes(content)
    with pytest.raises(BankCorrupt, match=r"zarr\.json is no JSON"):
        open_bank(copy)


def test_a_pipe_or_folder_in_place_of_the_card_is_no_bank(copy: Path) -> None:
    (copy / "zarr.json").unlink()
    os.mkfifo(copy / "zarr.json")
    with pytest.raises(BankNotFound, match="no bank at"):
        open_bank(copy)
    (copy / "zarr.json").unlink()
    (copy / "zarr.json").mkdir()
    with pytest.raises(BankNotFound, match="no bank at"):
        open_bank(copy)


@pytest.mark.parametrize("name", ["mean", "max", "min", "n_patches"])
@pytest.mark.parametrize("what", ["gone", "short", "empty"])
def test_a_chunk_that_is_lost_after_the_bank_was_opened_is_an_error(
    name: str, what: str, copy: Path
) -> None:
    bank = open_bank(copy)
    chunk = copy / f"layers/2/{name}/c.0{'.0' * (name != 'n_patches')}"
    lose(chunk, what)
    read = bank.n_patches if name == "n_patches" else lambda layer: bank.pooled(layer, name)
    with pytest.raises(BankCorrupt, match=rf"layers/2/{name}/c\.0"):
        read(2)
    assert bank.pooled(1).shape == (bank.n_rows, 8)
    with pytest.raises(BankCorrupt, match=name):
        open_bank(copy)


def lose(file: Path, what: str) -> None:
    if what == "gone":
        file.unlink()
    else:
        os.truncate(file, 0 if what == "empty" else file.stat().st_size - 1)


@pytest.mark.parametrize("tier", ["ram", "map"])
@pytest.mark.parametrize("what", ["gone", "short", "empty"])
@pytest.mark.parametrize("name", ["patches", "prefix"])
def test_a_shard_that_is_lost_after_the_bank_was_opened_is_an_error(
    name: str, what: str, tier: Literal["ram", "map"], copy: Path
) -> None:
    bank = open_bank(copy)
    lose(copy / f"layers/2/{name}/c.1.0.0", what)
    with pytest.raises(BankCorrupt, match=rf"layers/2/{name}/c\.1\.0\.0"):
        BatchLoader(bank, layer=2, tier=tier)


@pytest.mark.parametrize("what", ["gone", "short", "empty"])
@pytest.mark.parametrize("rows", [[16, 17, 18], [31, 0], [31]], ids=str)
def test_a_shard_that_is_lost_before_it_is_mapped_is_an_error(
    what: str, rows: list[int], copy: Path
) -> None:
    bank = open_bank(copy)
    reader = MappedRows(bank.places(1))
    shard = copy / "layers/1/patches/c.1.0.0"
    if what == "short":
        os.truncate(shard, 16 * 4_096 - 4_000)  # within the last row
    else:
        lose(shard, what)
    with pytest.raises(BankCorrupt, match=r"layers/1/patches/c\.1\.0\.0"):
        read_rows(reader, rows)
    assert read_rows(reader, [0, 1]).any()


def test_memory_holds_no_tokens_of_holes_and_a_hole_is_an_error(copy: Path) -> None:
    places = open_bank(copy).places(1)
    offset = np.where(np.arange(40) % 5 == 0, -1, places.offset)
    holed = replace(places, offset=offset)
    present = np.flatnonzero(offset >= 0)
    kept = RamRows(RowFiles(holed, direct=False), present, n_rows=40)
    for reader in (kept, MappedRows(holed), RowFiles(holed, direct=False)):
        rows = [1, 39, 17]
        np.testing.assert_array_equal(read_rows(reader, rows), read_rows(MappedRows(places), rows))
        with pytest.raises(BankError, match="row 5 has no tokens: it is a hole"):
            read_rows(reader, [4, 5])


def test_scales_and_constants_that_are_lost_after_opening_are_errors(
    clip_table: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, stored_dtype="int8")
    bank = extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    for name in ("scale/c.0.0", "channel_scale/c.0", "channel_shift/c.0"):
        file = bank.path / "layers/1" / name
        whole = file.read_bytes()
        for what in ("short", "empty", "gone"):
            lose(file, what)
            with pytest.raises(BankCorrupt):
                bank.scale(1) if name.startswith("scale") else bank.constants(1)
            for tier in ("ram", "map"):
                with pytest.raises(BankCorrupt):
                    BatchLoader(bank, layer=1, tier=tier)
            file.write_bytes(whole)


def test_counts_of_patches_that_a_row_cannot_have_are_an_error(copy: Path) -> None:
    chunk = copy / "layers/1/n_patches/c.0"
    counts = np.frombuffer(chunk.read_bytes(), "<i4").copy()
    counts[7] = 2_000_000
    chunk.write_bytes(counts.tobytes())
    reseal(copy)
    bank = open_bank(copy)
    with pytest.raises(BankCorrupt, match="row 7 counts 2000000 patches of 20"):
        bank.n_patches(1)
    with pytest.raises(BankCorrupt, match="row 7 counts"):
        BatchLoader(bank, layer=1)


def clips_with(copy: Path, **columns: pa.Array) -> Bank:
    """The bank with other columns, or more, in its table of clips."""
    clips = pq.read_table(copy / "clips.parquet")
    for name, values in columns.items():
        place = clips.schema.get_field_index(name)
        clips = (
            clips.append_column(name, values)
            if place < 0
            else clips.set_column(place, name, values)
        )
    pq.write_table(clips, copy / "clips.parquet", compression="zstd")
    reseal(copy)
    return open_bank(copy)


def test_the_status_of_rows_is_read_without_the_other_columns(copy: Path) -> None:
    bank = clips_with(copy, start_s=pa.array([np.nan] * N_CLIPS))
    assert bank.status.tolist() == [1] * N_CLIPS
    assert bank.status is bank.status
    with pytest.raises(ValueError, match="read-only"):
        bank.status[0] = 2
    with pytest.raises(BankCorrupt, match="start_s is not finite"):
        _ = bank.clips


@pytest.mark.parametrize(
    ("status", "words"),
    [
        pytest.param(
            pa.array([1] * 39 + [4], pa.int8()), "status 4, expected 1 done", id="unknown"
        ),
        pytest.param(pa.array([1] * 39 + [None], pa.int8()), "status None, expected", id="null"),
        pytest.param(pa.array([1] * 39 + [3], pa.int8()), "row 39 is no clip", id="a hole"),
        pytest.param(pa.array([1] * 40, pa.int32()), "status is int32, expected int8", id="type"),
    ],
)
def test_a_status_that_cannot_be_is_an_error(status: pa.Array, words: str, copy: Path) -> None:
    bank = clips_with(copy, status=status)
    for read in (lambda: bank.status, lambda: bank.clips):
        with pytest.raises(BankCorrupt, match=words):
            read()


def test_what_is_read_along_with_the_status_is_counted_before(copy: Path) -> None:
    texts = pa.array(["x" * 2_000_000] * N_CLIPS)
    # To Arrow a dot leads to a field of a column, whatever the columns are called.
    bank = clips_with(copy, **{"status.more": texts})
    with pytest.raises(BankCorrupt, match="more memory than its size justifies"):
        _ = bank.status
    assert clips_with(copy, **{"status.more": pa.nulls(N_CLIPS), "more": texts}).status.all()


def test_rows_of_a_bank_that_grew_meanwhile_are_told_from_damage(copy: Path) -> None:
    bank = open_bank(copy)
    clips_with(copy, status=pa.array([3] * N_CLIPS, pa.int8()))
    with pytest.raises(BankError, match="has grown or was made anew since it was opened"):
        _ = bank.status
