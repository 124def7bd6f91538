from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bank_damage import SHARD, delete_inner_chunk, flip
from fake_bank import SETTINGS

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.verify import read_seal, verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankIncomplete, BankNotFound
from patchbank.pipeline.extraction import extract


def test_a_whole_bank_has_no_problems(sealed: Bank) -> None:
    calls: list[tuple[int, int]] = []
    assert verify_bank(sealed.path, progress=lambda done, total: calls.append((done, total))) == ()
    assert verify_bank(sealed.path, quick=True) == ()
    total = read_seal(sealed.path).bank_bytes
    assert calls[-1] == (total, total)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers/1/mean/c.0.0", r"layers/1/mean/c\.0\.0: SHA-256 is \w{12}, sealed \w{12}"),
        ("layers/1/patches/zarr.json", r"layers/1/patches/zarr\.json: SHA-256 is"),
        ("commits/00001.json", r"commits/00001\.json: SHA-256 is"),
        ("golden/tokens_1/c.0.0", r"golden/tokens_1/c\.0\.0: SHA-256 is"),
        ("clips.parquet", r"clips\.parquet: SHA-256 is"),
    ],
)
@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_flipped_byte_in_another_file_names_the_file(
    name: str, words: str, position: int, copy: Path
) -> None:
    flip(copy / name, position)
    (problem,) = verify_bank(copy)
    assert problem.startswith(name)
    assert re.match(words, problem), problem


@pytest.mark.parametrize("quick", [False, True])
def test_every_flipped_byte_of_the_seal_and_the_card_is_seen(copy: Path, quick: bool) -> None:
    generator = np.random.default_rng(0)
    for name in ("seal.json", "zarr.json"):
        whole = (copy / name).read_bytes()
        for position in generator.choice(len(whole), 20, replace=False).tolist():
            flip(copy / name, position)
            problems = verify_bank(copy, quick=quick)
            assert any(problem.startswith(name) for problem in problems), (name, position)
            (copy / name).write_bytes(whole)


@pytest.mark.parametrize("field", ["fingerprint", "recipe_id"])
def test_an_edited_seal_that_agrees_with_itself_is_seen(field: str, copy: Path) -> None:
    from patchbank.pipeline.bank.seal import root_hash

    seal = json.loads((copy / "seal.json").read_bytes())
    seal[field] = "0" * 64
    seal["root_sha256"] = root_hash(seal)
    (copy / "seal.json").write_text(json.dumps(seal))
    words = {
        "fingerprint": "seal.json: the fingerprint is not that of the recipe and clips.parquet",
        "recipe_id": "seal.json: names another recipe than zarr.json",
    }
    assert words[field] in verify_bank(copy, quick=True)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(
            lambda bank: (bank / SHARD).unlink(),
            [f"{SHARD}: is missing; rows 16-31 are lost"],
            id="a missing file",
        ),
        pytest.param(
            lambda bank: os.truncate(bank / SHARD, 5_000),
            [f"{SHARD}: 5000 bytes, sealed 65796; rows 17-31 are lost"],
            id="a truncated file",
        ),
        pytest.param(
            lambda bank: (bank / "layers/1/patches/c.3.0.0").write_bytes(b"x"),
            ["layers/1/patches/c.3.0.0: is not sealed; only notes/ may hold files that are not"],
            id="an added file",
        ),
        pytest.param(
            lambda bank: (
                (bank / "golden/zarr.json").symlink_to("/dev/zero")
                if (bank / "golden/zarr.json").unlink() is None
                else None
            ),
            ["golden/zarr.json: is a link; a bank holds its own files only"],
            id="a link to a file",
        ),
        pytest.param(
            lambda bank: (
                (bank / "seal.json").rename(bank.parent / "seal.json")
                and (bank / "seal.json").symlink_to(bank.parent / "seal.json")
            ),
            ["seal.json: is a link; a bank holds its own files only"],
            id="a link for the seal",
        ),
        pytest.param(
            lambda bank: (
                (bank / "golden").rename(bank.parent / "golden")
                and (bank / "golden").symlink_to(bank.parent / "golden")
            ),
            ["golden: is a link; a bank holds its own files only"],
            id="a link for a folder",
        ),
        pytest.param(
            lambda bank: (
                (bank / "golden/zarr.json").unlink() or os.mkfifo(bank / "golden/zarr.json")
            ),
            ["golden/zarr.json: is no regular file"],
            id="a pipe",
        ),
    ],
)
def test_what_is_missing_added_or_strange_is_named(
    damage: Callable[[Path], object], words: list[str], quick: bool, copy: Path
) -> None:
    damage(copy)
    assert list(verify_bank(copy, quick=quick)) == words


def test_a_quick_check_sees_indices_but_reads_no_rows(copy: Path) -> None:
    flip(copy / SHARD, 0)
    assert verify_bank(copy, quick=True) == ()
    delete_inner_chunk(copy / SHARD, slot=2)
    flip(copy / "layers/2/patches/c.0.0.0", -1)
    assert verify_bank(copy, quick=True) == (
        f"shard {SHARD}, row 18 (audio/0018.wav): is missing, though clips.parquet promises it",
        "shard layers/2/patches/c.0.0.0: the index does not match its crc32c",
    )


def test_a_quick_check_compares_commit_records_with_seal_and_clips(copy: Path) -> None:
    record = copy / "commits/00001.json"
    text = record.read_text()
    record.write_text(text.replace('"n_done": 16', '"n_done": 15'))
    (problem,) = verify_bank(copy, quick=True)
    assert problem == ("commits/00001.json: 15 done and 0 failed, clips.parquet has 16 and 0")
    record.write_text(text.replace('"size": 65796', '"size": 65797', 1))
    (problem,) = verify_bank(copy, quick=True)
    assert problem == f"commits/00001.json: {SHARD} is recorded with other bytes than sealed"
    record.write_text("x" * len(text))
    (problem,) = verify_bank(copy, quick=True)
    assert problem.startswith("commits/00001.json: is damaged")


def test_all_problems_are_told_and_rows_only_where_the_clips_are_sound(copy: Path) -> None:
    flip(copy / SHARD, 0)
    flip(copy / "clips.parquet", 50)
    (copy / "layers/2/min/c.0.0").unlink()
    problems = "\n".join(verify_bank(copy))
    assert "layers/2/min/c.0.0: is missing" in problems
    assert "clips.parquet: SHA-256 is" in problems
    assert f"shard {SHARD}: SHA-256 is" in problems
    assert "without a sound clips.parquet no row can be named" in problems


def test_notes_may_change_freely(copy: Path) -> None:
    (copy / "notes").mkdir()
    (copy / "notes/log.txt").write_text("measured on a Tuesday")
    assert verify_bank(copy) == ()


def test_a_bank_with_failed_clips_is_whole(clip_table: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip_table.parent, tmp_path / "set")
    (folder / "audio/0003.wav").write_bytes(b"no audio")
    bank = extract(folder / "clips.csv", encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    assert verify_bank(bank.path) == ()


def test_places_without_a_sealed_bank_are_errors_not_problems(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BankNotFound, match="no bank at"):
        verify_bank(tmp_path / "nowhere")
    (copy / "seal.json").unlink()
    with pytest.raises(BankIncomplete, match="not sealed"):
        verify_bank(copy)


def test_a_damaged_seal_cannot_be_read(copy: Path) -> None:
    (copy / "seal.json").write_text("{}")
    with pytest.raises(BankCorrupt, match=r"seal\.json is damaged"):
        read_seal(copy)
    assert verify_bank(copy)[0].startswith("seal.json is damaged")
