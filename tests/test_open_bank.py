from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zarr

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankIncomplete,
    BankNotFound,
)


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
