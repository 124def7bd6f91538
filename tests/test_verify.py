from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from audio_sets import write_clip_set, write_tone
from bank_damage import SHARD, delete_inner_chunk, flip, swap
from fake_bank import SETTINGS
from hostile_bank import reseal

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.verify import read_seal, verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankIncomplete, BankNotFound
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


@pytest.fixture(scope="module")
def int8_bank(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "x.bank"
    return extract(
        clip_table, encoder="fake", out=out, settings=replace(SETTINGS, stored_dtype="int8")
    ).path


@pytest.fixture
def copy_of_int8(int8_bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int8_bank, tmp_path / "int8.bank"))


KINDS = [
    "clips.parquet", "commits/00002.json", "commits/golden.json",
    "golden/frames/c.0.0", "golden/frames/zarr.json", "golden/tokens_1/c.0.0",
    "golden/tokens_1/zarr.json", "golden/tokens_2_prefix/c.0.0",
    "golden/tokens_2_prefix/zarr.json", "golden/waveform/c.0", "golden/waveform/zarr.json",
    "golden/zarr.json", "layers/1/channel_scale/c.0", "layers/1/channel_scale/zarr.json",
    "layers/1/channel_shift/c.0", "layers/1/channel_shift/zarr.json", "layers/1/max/c.0.0",
    "layers/1/max/zarr.json", "layers/1/mean/c.0.0", "layers/1/mean/zarr.json",
    "layers/1/min/c.0.0", "layers/1/min/zarr.json", "layers/1/n_patches/c.0",
    "layers/1/n_patches/zarr.json", "layers/1/patches/c.2.0.0", "layers/1/patches/zarr.json",
    "layers/1/scale/c.0.0", "layers/1/scale/zarr.json", "layers/1/zarr.json",
    "layers/2/prefix/c.2.0.0", "layers/2/prefix/zarr.json", "layers/zarr.json", "seal.json",
    "zarr.json",
]  # fmt: skip
"""One file of every kind."""
QUANTISED = [name for name in KINDS if re.search("/(scale|channel_)", name)]


def kind(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def test_every_kind_of_file_is_among_those_that_are_damaged(sealed: Bank, int8_bank: Path) -> None:
    for bank, extra in ((sealed.path, set(QUANTISED)), (int8_bank, set())):
        names = {p.relative_to(bank).as_posix() for p in bank.rglob("*") if p.is_file()}
        assert {kind(name) for name in names} == {kind(name) for name in set(KINDS) - extra}


def problems_after(bank: Path, name: str, damage: Callable[[Path], object]) -> list[str]:
    """What verify says of one damaged file, which is whole again afterwards."""
    whole = (bank / name).read_bytes()
    damage(bank / name)
    try:
        return list(verify_bank(bank))
    finally:
        (bank / name).write_bytes(whole)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_byte_in_every_kind_of_file_is_named(
    name: str, dtype: str, copy: Path, copy_of_int8: Path
) -> None:
    bank = {"float16": copy, "int8": copy_of_int8}[dtype]
    if dtype == "float16" and name in QUANTISED:
        pytest.skip("only in quantised banks")
    n_bytes = (bank / name).stat().st_size
    for position in {0, 1, n_bytes // 3, n_bytes // 2, n_bytes - 1}:
        problems = problems_after(bank, name, lambda file, at=position: flip(file, at))
        assert problems, position
        assert any(name in problem.split(": ")[0] for problem in problems), problems
        if name != "seal.json":  # which may name other files wrongly then
            assert all(name in problem for problem in problems), problems


@pytest.mark.parametrize("name", KINDS)
def test_a_truncated_and_a_missing_file_of_every_kind_is_named(
    name: str, copy_of_int8: Path
) -> None:
    bank = copy_of_int8
    half = (bank / name).stat().st_size // 2
    for damage in (lambda file: os.truncate(file, half), Path.unlink):
        if name in ("zarr.json", "seal.json") and damage is Path.unlink:
            continue  # no bank, or none that is finished: see below
        problems = problems_after(bank, name, damage)
        assert any(problem.startswith(name) for problem in problems), problems
    assert verify_bank(bank) == ()


def test_a_bank_without_its_card_is_named(copy: Path) -> None:
    (copy / "zarr.json").unlink()
    assert "zarr.json: is missing" in verify_bank(copy)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("layers/1/patches/c.0.0.0", "layers/1/patches/c.1.0.0"),
        ("layers/1/mean/c.0.0", "layers/1/max/c.0.0"),
        ("layers/1/channel_scale/c.0", "layers/1/channel_shift/c.0"),
        ("commits/00000.json", "commits/00001.json"),
        ("golden/tokens_1/c.0.0", "golden/tokens_2/c.0.0"),
        ("layers/1/zarr.json", "layers/zarr.json"),
        ("layers/1/mean/zarr.json", "layers/1/max/zarr.json"),
    ],
)
def test_two_files_that_were_swapped_are_both_named(
    first: str, second: str, copy_of_int8: Path
) -> None:
    same = (copy_of_int8 / first).read_bytes() == (copy_of_int8 / second).read_bytes()
    swap(copy_of_int8 / first, copy_of_int8 / second)
    problems = verify_bank(copy_of_int8)
    if same:
        assert problems == ()
        return
    for name in (first, second):
        assert any(name in problem.split(": ")[0] for problem in problems), problems


def test_what_was_added_anywhere_is_named_but_for_notes_and_empty_folders(copy: Path) -> None:
    added = ["x", "layers/x", "layers/1/x", "layers/1/patches/c.9.0.0", "commits/00009.json",
             "golden/x", "layers/3/patches/c.0.0.0", "\n\x1b[2J", "caf\xe9"]  # fmt: skip
    for name in [*added, "notes/x"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"")
    (copy / "empty").mkdir()
    (copy / "notes/link").symlink_to("/dev/zero")
    raw = os.fsencode(copy) + b"/\xff"
    os.close(os.open(raw, os.O_CREAT))
    problems = verify_bank(copy)
    assert len(problems) == len(added) + 1
    shown = {"\n\x1b[2J": r"\n\x1b[2J"}
    for name in added:
        words = f"{shown.get(name, name)}: is not sealed; only notes/ may hold files that are not"
        assert words in problems
    assert all(problem.isprintable() for problem in problems)


def test_a_damaged_row_of_a_bank_that_has_grown_is_named(
    clip_table: Path, copy: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(clip_table.parent, tmp_path / "longer")
    write_tone(folder / "new/a.wav", hertz=500.0)
    with (folder / "clips.csv").open("a") as table:
        table.write("new/a.wav,train\n")
    bank = extract(folder / "clips.csv", encoder="fake", out=copy, settings=SETTINGS)
    assert (bank.n_rows, bank.status.tolist().count(3)) == (49, 8)
    assert verify_bank(copy) == ()
    for shard, row in ((3, "row 48 (new/a.wav)"), (2, "row 32 (audio/0032.wav)")):
        name = f"layers/2/patches/c.{shard}.0.0"
        (problem,) = problems_after(copy, name, lambda file: flip(file, 0))
        assert problem.startswith(f"shard {name}, {row}: the bytes do not match")
        (problem,) = problems_after(copy, name, lambda file: os.truncate(file, 100))
        assert problem.startswith(f"{name}: 100 bytes")
        assert "lost" in problem
    assert verify_bank(copy) == ()


def test_a_bank_with_views_is_whole_and_a_damaged_view_is_named(tmp_path: Path) -> None:
    write_clip_set(tmp_path / "set", n_clips=4)
    table = tmp_path / "set/views.csv"
    table.write_text(
        "clip_id,path,view,mix_sources\n"
        "a,audio/0000.wav,0,\nb,audio/0001.wav,0,\na,audio/0002.wav,1,b\n"
    )
    bank = extract(table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    assert verify_bank(bank.path) == ()
    row = bank.clips["view"].to_pylist().index(1)
    flip(bank.path / "layers/1/patches/c.0.0.0", 4_096 * row)
    (problem,) = verify_bank(bank.path)
    assert problem.startswith(f"shard layers/1/patches/c.0.0.0, row {row} (a): the bytes")


def newer(bank: Path, *, sealed: bool = True) -> None:
    document = json.loads((bank / "zarr.json").read_bytes())
    document["attributes"]["patchbank_format"] = 2
    (bank / "zarr.json").write_text(json.dumps(document))
    if sealed:
        reseal(bank)


@pytest.mark.parametrize("quick", [False, True])
def test_a_bank_of_a_newer_format_is_refused_not_taken_apart(copy: Path, quick: bool) -> None:
    words = "bank format 2; this patchbank reads format 1: pip install --upgrade patchbank"
    newer(copy)
    with pytest.raises(BankError, match=words):
        verify_bank(copy, quick=quick)
    # Its seal may have another shape.
    (copy / "seal.json").write_text('{"format": 2}')
    with pytest.raises(BankError, match=words):
        verify_bank(copy, quick=quick)


def test_a_damaged_card_that_looks_newer_is_told_as_damage(copy: Path) -> None:
    newer(copy, sealed=False)
    assert any(problem.startswith("zarr.json: ") for problem in verify_bank(copy))


def test_identities_that_do_not_follow_from_the_card_are_named(copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_bytes())
    document["attributes"]["encoder_id"] = "0" * 64
    (copy / "zarr.json").write_text(json.dumps(document))
    reseal(copy)
    assert verify_bank(copy, quick=True) == ("zarr.json: the encoder_id is not that of its card",)


def test_thousands_of_links_and_wrong_files_are_told_in_seconds(copy: Path) -> None:
    for index in range(3_000):
        (copy / f"layers/1/{index}").symlink_to("/dev/zero")
        (copy / f"golden/{index}.json").write_text(f"{index}")
    reseal(copy)
    for index in range(3_000):
        (copy / f"golden/{index}.json").write_text("x" * len(f"{index}"))
    assert len(verify_bank(copy)) == 6_000
