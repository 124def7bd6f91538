"""Archives: banks compressed for cold storage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from bank_damage import flip

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.archive import archive_spans, compress, decompress
from patchbank.pipeline.bank.layout import MISSING, ShardLayout, sealed_index
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankMismatch
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.probing import BatchLoader

SHARD = "layers/1/patches/c.1.0.0"


@pytest.fixture(scope="module")
def failed_clip(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    from fake_bank import SETTINGS

    folder = Path(shutil.copytree(clip_table.parent, tmp_path_factory.mktemp("a") / "set"))
    (folder / "audio/0003.wav").write_bytes(b"no audio")
    out = folder.parent / "plain.bank"
    return extract(folder / "clips.csv", encoder="fake", out=out, settings=SETTINGS)


@pytest.fixture(scope="module")
def archive(failed_clip: Bank) -> Bank:
    return rebuild_bank([failed_clip], failed_clip.path.with_name("cold.bank"), storage="blosc")


@pytest.fixture
def damaged(archive: Bank, tmp_path: Path) -> Path:
    return Path(shutil.copytree(archive.path, tmp_path / "damaged.bank"))


def test_an_archive_holds_the_same_clips_and_tokens(archive: Bank, failed_clip: Bank) -> None:
    assert archive.fingerprint == failed_clip.fingerprint
    assert archive.recipe_id == failed_clip.recipe_id
    assert archive.card["storage"] == "blosc"
    assert archive.clips.equals(failed_clip.clips)
    for name in ("layers/1/patches", "layers/2/patches", "layers/2/prefix", "layers/1/mean"):
        found = zarr.open_array(archive.path / name, mode="r")[:]
        expected = zarr.open_array(failed_clip.path / name, mode="r")[:]
        np.testing.assert_array_equal(found, expected)
    assert verify_bank(archive.path) == verify_bank(archive.path, quick=True) == ()


def test_an_archive_becomes_the_bank_that_it_was(
    archive: Bank, failed_clip: Bank, tmp_path: Path
) -> None:
    restored = rebuild_bank([archive], tmp_path / "r.bank")
    for array in restored.schema.arrays():
        for shard in range(restored.schema.n_shards):
            name = array.shard_path(shard)
            assert (restored.path / name).read_bytes() == (failed_clip.path / name).read_bytes()


def test_nobody_trains_from_an_archive(archive: Bank) -> None:
    with pytest.raises(BankError, match=r"is an archive: .* `patchbank bank convert"):
        BatchLoader(archive)


def test_an_archive_neither_grows_nor_joins_other_banks(
    archive: Bank, failed_clip: Bank, tmp_path: Path
) -> None:
    from fake_bank import SETTINGS

    from patchbank.pipeline.bank.join import join_banks

    folder = Path(shutil.copytree(failed_clip.path.parent / "set", tmp_path / "set"))
    shutil.copy(folder / "audio/0000.wav", folder / "more.wav")
    with (folder / "clips.csv").open("a") as file:
        file.write("more.wav,train\n")
    with pytest.raises(BankError, match="is an archive, which does not grow"):
        extract(folder / "clips.csv", encoder="fake", out=archive.path, settings=SETTINGS)
    some = rebuild_bank([failed_clip], tmp_path / "s.bank", rows=[np.arange(5)])
    rest = rebuild_bank([archive], tmp_path / "t.bank", rows=[np.arange(5, 40)], storage="blosc")
    with pytest.raises(BankMismatch, match="an archive cannot be joined"):
        join_banks([some, rest], tmp_path / "j.bank")


def test_the_command_archives_and_restores(
    failed_clip: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cold, warm = tmp_path / "cold.bank", tmp_path / "warm.bank"
    assert main(["bank", "convert", str(failed_clip.path), "--archive", "--out", str(cold)]) == 0
    assert main(["bank", "convert", str(cold), "--out", str(warm)]) == 0
    assert not open_bank(warm).schema.is_archive
    capsys.readouterr()
    assert main(["bank", "show", str(cold)]) == 0
    assert "archive, compressed" in capsys.readouterr().out
    line = ["bank", "convert", str(cold), "--archive", "--out", str(tmp_path / "x.bank")]
    assert main(line) == 2


@pytest.mark.parametrize(
    ("position", "words"),
    [
        pytest.param(60, r"row 16 \(audio/0016.wav\): the bytes do not match", id="a row"),
        pytest.param(2, "the bytes do not match", id="a header"),
        pytest.param(-9, "without it no row of an archive can be found", id="the index"),
    ],
)
def test_damage_in_an_archive_is_told(position: int, words: str, damaged: Path) -> None:
    import re

    flip(damaged / SHARD, position)
    (problem,) = verify_bank(damaged)
    assert problem.startswith(f"shard {SHARD}")
    assert re.search(words, problem)
    with pytest.raises(BankCorrupt, match=r"c\.1\.0\.0"):
        rebuild_bank([open_bank(damaged)], damaged.parent / "r.bank")


def test_a_short_file_of_an_archive_is_told(damaged: Path) -> None:
    os.truncate(damaged / SHARD, 900)
    (problem,) = verify_bank(damaged)
    assert "900 bytes, sealed" in problem
    assert "rows 16-31 may be lost" in problem


def test_a_row_survives_compression_and_nothing_else_does() -> None:
    row = np.random.default_rng(0).standard_normal(500).astype(np.float16).tobytes()
    stored = compress(row, typesize=2)
    assert decompress(stored, row_bytes=1_000) == row
    for wrong, size in [
        (stored, 999),
        (stored[:-1], 1_000),
        (b"", 1_000),
        (stored[:10], 1_000),
        (stored[:4] + b"\xff" * 8 + stored[12:], 2**32 - 1),
    ]:
        with pytest.raises(ValueError, match=r"size|hold|header"):
            decompress(wrong, row_bytes=size)


def test_a_header_that_promises_gigabytes_allocates_none() -> None:
    stored = bytearray(compress(bytes(2**20), typesize=2))
    stored[4:8] = (2**31).to_bytes(4, "little")
    with pytest.raises(ValueError, match="more than it can hold"):
        decompress(bytes(stored), row_bytes=2**31)


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([[0, 50], [40, 50]], id="overlapping"),
        pytest.param([[0, 50], [80, 50]], id="into the index"),
        pytest.param([[0, 50], [2**63, 50]], id="far outside"),
        pytest.param([[0, 50], [50, 2**63]], id="huge"),
        pytest.param([[0, 50], [50, 3]], id="shorter than a header"),
    ],
)
def test_hostile_spans_are_refused(entries: list[list[int]]) -> None:
    layout = ShardLayout(2, 100)
    tail = sealed_index(np.array(entries, "<u8"))
    with pytest.raises(BankCorrupt, match="shard x: "):
        archive_spans(tail, layout, file_bytes=100 + layout.index_bytes, name="x")


def test_empty_slots_of_an_archive_are_told_apart() -> None:
    layout = ShardLayout(3, 100)
    tail = sealed_index(np.array([[50, 20], [MISSING, MISSING], [0, 50]], "<u8"))
    spans = archive_spans(tail, layout, file_bytes=70 + layout.index_bytes, name="x")
    assert spans.tolist() == [[50, 20], [-1, 0], [0, 50]]
