"""Banks made from banks: joined by links, or rebuilt row by row."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from audio_sets import write_clip_set, write_tone
from bank_damage import flip
from fake_bank import N_CLIPS, SETTINGS

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.join import join_banks
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankMismatch
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.specs import WindowSpec
from patchbank.probing import BatchLoader


def part_of_table(table: Path, name: str, rows: slice, *, column: str | None = None) -> Path:
    """Some rows of a clip table, beside it, with one more column where asked."""
    with table.open(newline="") as file:
        header, *all_rows = list(csv.reader(file))
    path = table.with_name(f"{name}.csv")
    with path.open("w", newline="") as file:
        more = [] if column is None else [column]
        writer = csv.writer(file)
        writer.writerow([*header, *more])
        writer.writerows([[*row, *(str(len(row[0])) for _ in more)] for row in all_rows[rows]])
    return path


@pytest.fixture(scope="module")
def parts(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Bank]:
    """The first 25 clips and the other 15 of the clip set; clip 3 of the first has failed."""
    folder = tmp_path_factory.mktemp("parts")
    table = Path(shutil.copytree(clip_table.parent, folder / "set")) / "clips.csv"
    (table.parent / "audio/0003.wav").write_bytes(b"no audio")
    banks = [
        extract(
            part_of_table(table, name, rows, column=column),
            encoder="fake",
            out=folder / f"{name}.bank",
            settings=SETTINGS,
        )
        for name, rows, column in (("a", slice(25), None), ("b", slice(25, None), "note"))
    ]
    return banks[0], banks[1]


@pytest.fixture(scope="module")
def whole(parts: tuple[Bank, Bank], tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """What one extraction gives of all 40 clips, without the second part's own column."""
    table = parts[0].path.parent / "set/clips.csv"
    out = tmp_path_factory.mktemp("whole") / "whole.bank"
    return extract(table, encoder="fake", out=out, settings=SETTINGS)


def assert_same_tokens(found: Bank, expected: Bank) -> None:
    """Row for row, holes left out."""
    rows, others = found.schema.clip_rows(), expected.schema.clip_rows()
    for layer in (1, 2):
        for name in ("patches", "mean", "max", "min", "n_patches", *(["prefix"] * (layer == 2))):
            one = zarr.open_array(found.path / f"layers/{layer}/{name}", mode="r")[:]
            other = zarr.open_array(expected.path / f"layers/{layer}/{name}", mode="r")[:]
            np.testing.assert_array_equal(one[rows], other[others])


def test_merging_links_the_shards_and_gives_the_bank_of_one_extraction(
    parts: tuple[Bank, Bank], whole: Bank, tmp_path: Path
) -> None:
    merged = join_banks(parts, tmp_path / "m.bank")
    assert merged.schema.generations == (25, 15)
    assert merged.fingerprint == whole.fingerprint
    assert merged.recipe_id == whole.recipe_id
    assert_same_tokens(merged, whole)
    assert verify_bank(merged.path) == ()
    for number, (bank, shard) in enumerate([(parts[0], 0), (parts[0], 1), (parts[1], 0)]):
        for array in merged.schema.arrays():
            source = (bank.path / array.shard_path(shard)).stat()
            assert (merged.path / array.shard_path(number)).stat().st_ino == source.st_ino
    assert merged.clips["note"].to_pylist() == [None] * 32 + ["14"] * 15
    assert [p["fingerprint"] for p in merged.card["derived_from"]] == [
        part.fingerprint for part in parts
    ]


def test_a_merge_on_another_disk_copies_and_compares(
    parts: tuple[Bank, Bank], whole: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    real = os.link

    def refuse(source: Path, target: Path) -> None:
        if str(source).startswith(str(tmp_path)):
            real(source, target)  # commit records
        else:
            raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merged = join_banks(parts, tmp_path / "m.bank")
    assert merged.fingerprint == whole.fingerprint
    assert verify_bank(merged.path) == ()
    damaged = Path(shutil.copytree(parts[0].path, tmp_path.parent / f"damaged-{tmp_path.name}"))
    flip(damaged / "layers/1/patches/c.0.0.0", 5)
    with pytest.raises(BankCorrupt, match=r"c\.0\.0\.0 does not match its SHA-256; patchbank bank"):
        join_banks([open_bank(damaged), parts[1]], tmp_path / "n.bank")


def test_a_merge_of_rows_has_no_holes(
    parts: tuple[Bank, Bank], whole: Bank, tmp_path: Path
) -> None:
    merged = rebuild_bank(parts, tmp_path / "m.bank")
    assert merged.schema.generations == (N_CLIPS,)
    assert merged.n_rows == N_CLIPS
    assert merged.fingerprint == whole.fingerprint
    assert_same_tokens(merged, whole)
    assert verify_bank(merged.path) == ()


def test_a_merged_bank_grows(parts: tuple[Bank, Bank], clip_table: Path, tmp_path: Path) -> None:
    merged = join_banks([parts[0]], tmp_path / "a.bank", layers=[1, 2])
    table = parts[0].path.parent / "set/clips.csv"
    grown = extract(table, encoder="fake", out=merged.path, settings=SETTINGS)
    assert grown.schema.generations == (25, 15)
    assert verify_bank(grown.path) == ()


def test_the_same_merge_again_changes_nothing(parts: tuple[Bank, Bank], tmp_path: Path) -> None:
    merged = join_banks(parts, tmp_path / "m.bank")
    before = {p: p.stat().st_mtime_ns for p in merged.path.rglob("*")}
    assert join_banks(parts, tmp_path / "m.bank").root_sha256 == merged.root_sha256
    assert {p: p.stat().st_mtime_ns for p in merged.path.rglob("*")} == before
    with pytest.raises(BankMismatch, match=r"another bank(?s:.*)generations: found \[25, 15\]"):
        join_banks(parts[:1], tmp_path / "m.bank")


def stopping(after: int) -> Callable[[int, int], None]:
    def stop(n_done: int, n_shards: int) -> None:
        if n_done == after:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("make", [join_banks, rebuild_bank])
def test_a_merge_that_was_stopped_goes_on(
    make: Callable[..., Bank], parts: tuple[Bank, Bank], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(parts, tmp_path / "m.bank", progress=stopping(1))
    undisturbed = make(parts, tmp_path / "n.bank")
    assert make(parts, tmp_path / "m.bank").root_sha256 == undisturbed.root_sha256


def test_banks_that_cannot_be_one_are_told_apart(parts: tuple[Bank, Bank], tmp_path: Path) -> None:
    table = parts[0].path.parent / "set/b.csv"
    other = extract(
        table,
        encoder="fake",
        out=tmp_path / "other.bank",
        settings=replace(SETTINGS, stored_dtype="float32"),
    )
    with pytest.raises(BankMismatch, match="stored_dtype: found 'float32', expected 'float16'"):
        join_banks([parts[0], other], tmp_path / "m.bank")
    with pytest.raises(BankError, match="is named twice"):
        join_banks([parts[0], parts[0]], tmp_path / "m.bank")
    again = Path(shutil.copytree(parts[0].path, tmp_path / "again.bank"))
    with pytest.raises(BankError, match=r"clip audio/0000.wav, view 0, is in .*a.bank and in"):
        join_banks([parts[0], open_bank(again)], tmp_path / "m.bank")
    assert not (tmp_path / "m.bank").exists()


def test_columns_that_do_not_agree_are_named(parts: tuple[Bank, Bank], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    banks = []
    for name, values in (("x", [1, 2]), ("y", ["one", "two"])):
        table = write_clip_set(tmp_path / name, n_clips=2)
        paths = [f"audio/{i:04d}.wav" for i in range(2)]
        ids = [f"{name}{i}" for i in range(2)]
        columns = pa.table({"clip_id": ids, "path": paths, "n": values})
        pq.write_table(columns, table.with_suffix(".parquet"))
        banks.append(
            extract(
                table.with_suffix(".parquet"),
                encoder="fake",
                out=tmp_path / f"{name}.bank",
                settings=SETTINGS,
            )
        )
    with pytest.raises(BankError, match="column of the clip tables has values of different types"):
        join_banks(banks, tmp_path / "m.bank")


def test_layers_are_taken_out_by_links(parts: tuple[Bank, Bank], tmp_path: Path) -> None:
    taken = join_banks([parts[0]], tmp_path / "l.bank", layers=[2])
    assert taken.layers == (2,)
    assert not any(name.endswith("_1") for name in taken.clips.column_names)
    assert verify_bank(taken.path) == ()
    for batch in BatchLoader(taken, layer=2, batch_size=8, shuffle=False):
        expected = zarr.open_array(parts[0].path / "layers/2/patches", mode="r")[:]
        np.testing.assert_array_equal(batch.patches.numpy(), expected[batch.rows])
    source = parts[0].path / "layers/2/prefix/c.0.0.0"
    assert (taken.path / "layers/2/prefix/c.0.0.0").stat().st_ino == source.stat().st_ino


def test_a_subset_keeps_every_row_as_it_was(parts: tuple[Bank, Bank], tmp_path: Path) -> None:
    rows = np.array([0, 2, 3, 17, 24])
    subset = rebuild_bank(parts[:1], tmp_path / "s.bank", rows=[rows])
    assert subset.clips["clip_id"].to_pylist() == [f"audio/{row:04d}.wav" for row in rows]
    assert subset.status.tolist() == [1, 1, 2, 1, 1]
    assert subset.clips["sha256_1"].to_pylist() == (
        parts[0].clips["sha256_1"].take(rows).to_pylist()
    )
    found = zarr.open_array(subset.path / "layers/1/patches", mode="r")[:]
    expected = zarr.open_array(parts[0].path / "layers/1/patches", mode="r")[:][rows]
    np.testing.assert_array_equal(found, expected)
    assert verify_bank(subset.path) == ()


def test_a_row_that_does_not_match_its_checksum_is_not_copied(
    parts: tuple[Bank, Bank], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(parts[0].path, tmp_path / "d.bank"))
    flip(damaged / "layers/1/patches/c.1.0.0", 4096 + 7)
    with pytest.raises(BankCorrupt, match=r"patches/c\.1\.0\.0, row 17: the bytes do not match"):
        rebuild_bank([open_bank(damaged)], tmp_path / "s.bank", rows=[np.arange(25)])
    assert not (tmp_path / "s.bank/seal.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "int4"])
def test_another_type_is_what_extraction_gives_up_to_the_first_rounding(
    dtype: str, parts: tuple[Bank, Bank], tmp_path: Path
) -> None:
    made = rebuild_bank(parts[:1], tmp_path / "c.bank", dtype=dtype)  # type: ignore[arg-type]
    assert made.card["stored_dtype"] == dtype
    assert made.card["quantisation"]["rounded_before"] == ["float16"]
    assert made.encoder_id == parts[0].encoder_id
    assert made.recipe_id != parts[0].recipe_id
    assert verify_bank(made.path) == ()
    assert made.status.tolist() == parts[0].status.tolist()
    tokens = {}
    for bank in (made, parts[0]):
        batches = list(BatchLoader(bank, layer=2, batch_size=64, shuffle=False))
        tokens[bank.path] = batches[0].patches.float().numpy().copy()
    difference = np.abs(tokens[made.path] - tokens[parts[0].path]).max()
    assert difference <= {"bfloat16": 8e-3, "float32": 0.0, "int8": 2e-2, "int4": 0.4}[dtype]
    assert (difference == 0) == (dtype == "float32")


def test_float32_cast_down_is_exactly_what_extraction_stores(
    parts: tuple[Bank, Bank], tmp_path: Path
) -> None:
    table = parts[0].path.parent / "set/a.csv"
    wide = extract(
        table,
        encoder="fake",
        out=tmp_path / "w.bank",
        settings=replace(SETTINGS, stored_dtype="float32"),
    )
    made = rebuild_bank([wide], tmp_path / "c.bank", dtype="float16")
    assert made.recipe_id == parts[0].recipe_id
    assert made.fingerprint == parts[0].fingerprint
    assert_same_tokens(made, parts[0])
    merged = join_banks([made, parts[1]], tmp_path / "m.bank")
    assert merged.n_clips == N_CLIPS


def test_a_value_that_the_new_type_cannot_hold_is_a_failed_clip(
    parts: tuple[Bank, Bank], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbank.pipeline.encoders.fake import FakeEncoder

    real = FakeEncoder.encode

    def loud(self: FakeEncoder, features: object, layers: object = None) -> object:
        out = real(self, features, layers)  # type: ignore[arg-type]
        out[1].patches[:1] *= 1e6
        return out

    monkeypatch.setattr(FakeEncoder, "encode", loud)
    table = parts[0].path.parent / "set/a.csv"
    chosen = replace(SETTINGS, stored_dtype="float32")
    wide = extract(table, encoder="fake", out=tmp_path / "w.bank", settings=chosen)
    made = rebuild_bank([wide], tmp_path / "c.bank", dtype="float16")
    assert made.clips["reason"][0].as_py() == (
        "layer 1: 130 token values are beyond the range of float16"
    )
    assert made.n_patches(2)[0] == 0
    assert made.clips["reason"][3].as_py() == wide.clips["reason"][3].as_py()
    assert verify_bank(made.path) == ()


@pytest.mark.parametrize("make", [join_banks, rebuild_bank])
def test_a_merge_that_another_one_overtakes_ends_well(
    make: Callable[..., Bank],
    parts: tuple[Bank, Bank],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from patchbank.pipeline import rebuild
    from patchbank.pipeline.bank import join

    out, overtaken = tmp_path / "m.bank", []
    for module in (join, rebuild):

        def commit(
            *args: object, real: Callable[..., bool] = module.commit, **kwargs: object
        ) -> bool:
            if not overtaken:
                overtaken.append(True)
                make(parts, out)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "commit", commit)
    merged = make(parts, out)
    assert overtaken
    assert merged.n_clips == N_CLIPS
    assert verify_bank(out) == ()
    assert not (out / ".work").exists()


def test_no_clip_with_tokens_gives_no_channels(parts: tuple[Bank, Bank], tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"no clip of .* with tokens is left to measure"):
        rebuild_bank(parts[:1], tmp_path / "x.bank", dtype="int8", rows=[np.array([3])])


def test_masks_and_pooled_vectors_of_short_clips_survive(tmp_path: Path) -> None:
    for name, duration_s in (("long", 1.0), ("short", 0.25)):
        write_tone(tmp_path / f"set/{name}.wav", hertz=300, duration_s=duration_s)
    chosen = ExtractionSettings(window=WindowSpec(1.0, 1.0), layers=(1,), mask_padding=True)
    bank = extract(tmp_path / "set", encoder="fake", out=tmp_path / "x.bank", settings=chosen)
    write_tone(tmp_path / "set/shorter.wav", hertz=300, duration_s=0.15)
    grown = extract(tmp_path / "set", encoder="fake", out=bank.path, settings=chosen)
    assert grown.n_patches(1)[grown.schema.clip_rows()].tolist() == [20, 6, 4]
    for dtype in ("int8", "float32"):
        made = rebuild_bank([grown], tmp_path / f"{dtype}.bank", dtype=dtype)  # type: ignore[arg-type]
        assert made.n_patches(1).tolist() == [20, 6, 4]
        (batch,) = BatchLoader(made, shuffle=False)
        assert batch.n_patches is not None
        assert batch.n_patches.tolist() == [20, 6, 4]
        tokens = batch.patches.float().numpy()
        for row, count in enumerate((20, 6, 4)):
            mean = tokens[row, :count].mean(0)
            np.testing.assert_allclose(made.pooled(1, "mean")[row], mean, atol=1e-5)
            np.testing.assert_allclose(
                made.pooled(1, "max")[row], tokens[row, :count].max(0), atol=1e-5
            )


def said(capsys: pytest.CaptureFixture[str], *line: object, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["bank", *map(str, line)]) == status
    return capsys.readouterr()


def test_the_commands_make_banks_and_say_so(
    parts: tuple[Bank, Bank], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (bank.path for bank in parts)
    out, _ = said(capsys, "merge", a, b, "--out", tmp_path / "m.bank")
    assert out.startswith(f"{tmp_path / 'm.bank'}: 40 clips, ")
    said(capsys, "merge", a, b, "--compact", "--out", tmp_path / "n.bank")
    assert open_bank(tmp_path / "n.bank").schema.generations == (40,)
    said(capsys, "convert", tmp_path / "m.bank", "--compact", "--out", tmp_path / "c.bank")
    assert open_bank(tmp_path / "c.bank").n_rows == 40
    said(capsys, "convert", a, "--split", "valid", "--layers", "last", "--out", tmp_path / "v.bank")
    valid = open_bank(tmp_path / "v.bank")
    assert (valid.layers, set(valid.clips["split"].to_pylist())) == ((2,), {"valid"})
    (tmp_path / "some.csv").write_text("path\naudio/0007.wav\naudio/0001.wav\n")
    said(capsys, "convert", a, "--clips", tmp_path / "some.csv", "--out", tmp_path / "k.bank")
    assert open_bank(tmp_path / "k.bank").clips["clip_id"].to_pylist() == [
        "audio/0001.wav",
        "audio/0007.wav",
    ]
    said(capsys, "convert", a, "--dtype", "int8", "--out", tmp_path / "8.bank")
    out, _ = said(capsys, "show", tmp_path / "8.bank")
    assert f"made from    {parts[0].fingerprint[:12]}, float16" in out
    out, _ = said(capsys, "show", tmp_path / "m.bank")
    assert "came as 25 + 15; 7 empty slots between" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        (["merge", "A", "--out", "X"], 2, "name at least two banks"),
        (["convert", "A", "--out", "X"], 2, "nothing to convert; give --dtype"),
        (["convert", "A", "--out", "X", "--layers", "9"], 1, "has no layer 9; it has [1, 2]"),
        (["convert", "A", "--out", "X", "--split", "dev"], 1, "it has test, train, valid"),
        (["convert", "A", "--out", "X", "--clips", "T"], 1, "T:2:clip_id: no clip of"),
        (["convert", "A", "--out", "X", "--split", "test", "--measure", "T"], 2, "same clips"),
        (["convert", "A", "--out", "A", "--dtype", "int8"], 1, "holds another bank"),
    ],
)
def test_wrong_lines_say_what_to_do(
    line: list[str],
    status: int,
    words: str,
    parts: tuple[Bank, Bank],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "T").write_text("clip_id\nnobody\n")
    places = {"A": parts[0].path, "X": tmp_path / "x.bank", "T": tmp_path / "T"}
    _, err = said(capsys, *(places.get(word, word) for word in line), status=status)
    assert words in " ".join(err.split())
    assert not (tmp_path / "x.bank").exists()
