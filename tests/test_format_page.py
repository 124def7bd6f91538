"""pipeline/bank/FORMAT.md, held against patchbank, zarr-python and a reader written from it."""

from __future__ import annotations

import ast
import datetime
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import format_reader
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import zarr
from audio_sets import write_tone
from fake_bank import SETTINGS
from format_reader import FormatReader

from patchbank.pipeline.bank import Bank, layout, open_bank, reader
from patchbank.pipeline.bank.join import join_banks
from patchbank.pipeline.bank.schema import SmallArray, create_small_array
from patchbank.pipeline.errors import BankCorrupt
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.specs import (
    AugmentSpec,
    GainSpec,
    MixupSpec,
    ShiftSpec,
    WindowSpec,
    canonical_json,
)
from patchbank.probing import BatchLoader

PAGE = Path(reader.__file__).with_name("FORMAT.md")
ONE_LONG_LAYER = ExtractionSettings(
    window=WindowSpec(20.0, 20.0, pad="repeat"), layers=(2,), stored_dtype="float32"
)


def reseal(bank: Path, **more: object) -> None:
    """Writes a seal that fits the bank's files as they are now, with the values of `more`."""
    seal = json.loads((bank / "seal.json").read_bytes())
    for file in seal["files"]:
        content = (bank / file["path"]).read_bytes()
        file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    seal |= more
    rest = {key: value for key, value in seal.items() if key != "root_sha256"}
    seal["root_sha256"] = hashlib.sha256(format_reader.to_json(rest).encode()).hexdigest()
    (bank / "seal.json").write_text(json.dumps(seal | more))


@pytest.fixture(scope="module")
def two_layers(clip_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float16, two layers, a prefix, three shards, the last one short; two clips failed."""
    folder = shutil.copytree(clip_table.parent, tmp_path_factory.mktemp("two") / "set")
    (folder / "audio/0003.wav").write_bytes(b"RIFF this is no audio")
    (folder / "audio/0038.wav").write_bytes(b"")
    out = folder.parent / "two layers.bank"
    return extract(folder / "clips.csv", encoder="fake", out=out, settings=SETTINGS).path


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32, rows longer than a page of memory, user columns, names beyond ASCII."""
    folder = tmp_path_factory.mktemp("long")
    for index in range(3):
        write_tone(folder / f"tone-{index}.wav", hertz=300.0 + index, duration_s=0.7)
    (folder / "no audio.wav").write_bytes(b"no audio")
    names = ["M\u00f6we\U0001f426", 'quo"te\\', "tab\tand\x7f", "plain"]
    table = pa.table(
        {
            "path": ["tone-0.wav", "tone-1.wav", "no audio.wav", "tone-2.wav"],
            "clip_id": names,
            "fold": [1, 2, 1, 2],
            "day": pa.array([datetime.date(2024, 5, day) for day in (1, 2, 3, 4)]),
            "snr_db": [1.0, float("nan"), 1e-5, 1e16],
        }
    )
    pq.write_table(table, folder / "clips.parquet")
    out = folder / "long.bank"
    return extract(folder / "clips.parquet", encoder="fake", out=out, settings=ONE_LONG_LAYER).path


@pytest.fixture(scope="module")
def grown_int8(two_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 and float16 prefix, holes between two generations, views; two clips failed."""
    folder = Path(shutil.copytree(two_layers.parent / "set", tmp_path_factory.mktemp("g") / "set"))
    chosen = replace(SETTINGS, stored_dtype="int8")
    out = folder.parent / "grown.bank"
    first = (folder / "clips.csv").read_text().splitlines()
    rows = [f"{line.split(',')[0]},{line},0," for line in first[1:]]
    header = "clip_id,path,split,view,mix_sources"
    (folder / "clips.csv").write_text("\n".join([header, *rows]))
    extract(folder / "clips.csv", encoder="fake", out=out, settings=chosen)
    write_tone(folder / "view.wav", hertz=440.0)
    more = "audio/0000.wav,view.wav,train,1,audio/0001.wav"
    (folder / "clips.csv").write_text("\n".join([header, *rows, more]))
    return extract(folder / "clips.csv", encoder="fake", out=out, settings=chosen).path


@pytest.fixture(scope="module")
def brief(two_layers: Path) -> Path:
    """bfloat16."""
    return extract(
        two_layers.parent / "set/clips.csv",
        encoder="fake",
        out=two_layers.with_name("brief.bank"),
        settings=replace(SETTINGS, stored_dtype="bfloat16"),
    ).path


@pytest.fixture(scope="module")
def packed(two_layers: Path) -> Path:
    """int4."""
    return extract(
        two_layers.parent / "set/clips.csv",
        encoder="fake",
        out=two_layers.with_name("packed.bank"),
        settings=replace(SETTINGS, stored_dtype="int4"),
    ).path


@pytest.fixture(scope="module")
def derived(grown_int8: Path) -> Path:
    """float32 made from int8, one layer, no holes."""
    out = grown_int8.with_name("derived.bank")
    return rebuild_bank([open_bank(grown_int8)], out, dtype="float32", layers=[2]).path


@pytest.fixture(scope="module")
def augmented(two_layers: Path) -> Path:
    """Views that the bank made, with every augmentation; two clips failed."""
    return extract(
        two_layers.parent / "set/clips.csv",
        encoder="fake",
        out=two_layers.with_name("augmented.bank"),
        settings=replace(
            SETTINGS, n_views=1, augment=AugmentSpec(MixupSpec(), ShiftSpec(), GainSpec())
        ),
    ).path


BANKS = ["two_layers", "long_rows", "grown_int8", "brief", "packed", "derived", "augmented"]


@pytest.fixture(params=BANKS)
def bank(request: pytest.FixtureRequest) -> Bank:
    return open_bank(request.getfixturevalue(request.param))


def test_the_reader_agrees_on_every_identity(bank: Bank) -> None:
    found = FormatReader(bank.path)
    assert found.card == bank.card
    assert found.attributes["encoder_id"] == bank.encoder_id
    assert found.attributes["recipe_id"] == bank.recipe_id
    assert found.seal["fingerprint"] == bank.fingerprint
    assert found.seal["root_sha256"] == bank.root_sha256
    # As text, because a user's NaN equals nothing.
    assert str(found.clips.to_pylist()) == str(bank.clips.to_pylist())


def test_the_reader_agrees_on_every_token_of_every_row(bank: Bank) -> None:
    found = FormatReader(bank.path)
    for array in bank.schema.arrays():
        stored = np.asarray(zarr.open_array(bank.path / array.path, mode="r")[:])
        places = bank.places(array.layer, array.kind)
        for row in bank.schema.clip_rows().tolist():
            tokens = found.row(array.layer, row, array.kind)
            assert tokens.dtype == array.dtype
            np.testing.assert_array_equal(tokens, stored[row])
            with places.files[places.shard_of(row)].open("rb") as file:
                file.seek(int(places.offset[row]))
                assert file.read(array.row_bytes) == tokens.tobytes()
            recorded = bank.clips[f"crc32c_{array.column_suffix}"][row].as_py()
            assert format_reader.crc32c(tokens.tobytes()) == recorded


def test_the_reader_agrees_on_every_float(bank: Bank) -> None:
    found = FormatReader(bank.path)
    for layer in bank.layers:
        for batch in BatchLoader(bank, layer=layer, shuffle=False):
            for kind in ("patches", "prefix") if batch.prefix is not None else ("patches",):
                floats = np.stack([found.floats(layer, row, kind) for row in batch.rows.tolist()])
                expected = getattr(batch, kind).float().numpy()
                np.testing.assert_allclose(floats, expected, rtol=1e-6, atol=1e-6)


def test_the_reader_agrees_on_every_unsharded_array(bank: Bank) -> None:
    found = FormatReader(bank.path)
    for layer in bank.layers:
        for pool in ("mean", "max", "min"):
            pooled = found.array(f"layers/{layer}/{pool}")
            np.testing.assert_array_equal(pooled, bank.pooled(layer, pool))
        n_patches = found.array(f"layers/{layer}/n_patches")
        np.testing.assert_array_equal(n_patches, bank.n_patches(layer))
        if bank.schema.stored.is_quantised:
            np.testing.assert_array_equal(found.array(f"layers/{layer}/scale"), bank.scale(layer))
            constants = bank.constants(layer)
            for name, value in constants.arrays().items():
                np.testing.assert_array_equal(found.array(f"layers/{layer}/{name}"), value)
            names = ["channel_shift", "channel_scale"]
            if bank.card["stored_dtype"] == "int4":
                names.append("rotation")
            content = b"".join(found.array(f"layers/{layer}/{name}").tobytes() for name in names)
            recorded = found.card["quantisation"]["constants_sha256"][str(layer)]
            assert hashlib.sha256(content).hexdigest() == recorded
    golden = zarr.open_group(bank.path / "golden", mode="r")
    for name, array in golden.arrays():
        np.testing.assert_array_equal(found.array(f"golden/{name}"), array[:])


def test_failed_rows_are_what_the_page_says(bank: Bank) -> None:
    found, failed = FormatReader(bank.path), np.flatnonzero(bank.status == 2).tolist()
    assert failed
    bits = {
        "float16": (np.uint16, 0x7E00),
        "float32": (np.uint32, 0x7FC00000),
        "uint16": (np.uint16, 0x7FC0),
        "int8": (np.int8, -128),
        "uint8": (np.uint8, 0),
    }
    for row in failed:
        assert bank.clips["reason"][row].as_py()
        assert bank.clips["audio_sha256"][row].as_py() is None
        for array in bank.schema.arrays():
            integer, missing = bits[array.dtype.name]
            assert (found.row(array.layer, row, array.kind).view(integer) == missing).all()
        for layer in bank.layers:
            assert found.array(f"layers/{layer}/n_patches")[row] == 0
            assert np.isnan(found.array(f"layers/{layer}/mean")[row]).all()


def test_a_shard_file_is_byte_for_byte_as_the_page_says(bank: Bank) -> None:
    found = FormatReader(bank.path)
    slots = bank.card["rows_per_shard"]
    for array in bank.schema.arrays():
        stride = -(-array.row_bytes // 4096) * 4096
        files = sorted((bank.path / array.path).glob("c.*"))
        assert len(files) == -(-bank.n_rows // slots)
        for shard, file in enumerate(files):
            rows = bank.schema.rows_of(shard)
            expected = b""
            for row in rows:
                values = found.row(array.layer, row, array.kind).tobytes()
                expected += values + bytes(stride - len(values))
            entries = [(k * stride, array.row_bytes) for k in range(len(rows))]
            entries += [(2**64 - 1, 2**64 - 1)] * (slots - len(rows))
            index = np.array(entries, "<u8").tobytes()
            expected += index + format_reader.crc32c(index).to_bytes(4, "little")
            assert file.read_bytes() == expected


def test_generations_begin_where_the_page_says(bank: Bank) -> None:
    slots, start = bank.card["rows_per_shard"], 0
    clip_rows: list[int] = []
    for n_clips in bank.card["generations"]:
        clip_rows += range(start, start + n_clips)
        end, start = start + n_clips, start + slots * -(-n_clips // slots)
    assert bank.card["n_rows"] == end
    status = FormatReader(bank.path).clips["status"].to_pylist()
    assert [row for row, value in enumerate(status) if value != 3] == clip_rows
    holes = [row for row, value in enumerate(status) if value == 3]
    assert len(holes) == (8 if len(bank.card["generations"]) > 1 else 0)
    for row in holes:
        values = bank.clips.slice(row, 1).to_pylist()[0]
        assert {key for key, value in values.items() if value is not None} == {"status"}


def rows_sha256(clips: pa.Table) -> str:
    clips = clips.filter(pc.not_equal(clips["status"], 3))
    names = clips.column_names
    last_digest = max(i for i, name in enumerate(names) if name.startswith("crc32c_"))
    hasher = hashlib.sha256()
    for name in ["clip_id", "view", "path", "start_s", "duration_s", *names[last_digest + 1 :]]:
        column = [name, clips[name].to_pylist()]
        hasher.update(json.dumps(column, separators=(",", ":"), default=str).encode())
    return hasher.hexdigest()


def test_the_clip_table_has_the_digest_that_the_page_describes(bank: Bank) -> None:
    assert rows_sha256(bank.clips) == bank.card["rows_sha256"]
    for shard in range(bank.schema.n_shards):
        rows = bank.schema.rows_of(shard)
        record = json.loads((bank.path / f"commits/{shard:05d}.json").read_bytes())
        assert rows_sha256(bank.clips.slice(rows.start, len(rows))) == record["rows_sha256"]
        assert record["name"] == f"{shard:05d}"
        assert record["n_done"] + record["n_failed"] == len(rows)


def names_in(document: Any, *, stop: tuple[str, ...] = ()) -> Iterator[str]:
    """Every key of a JSON document, but none below a key of `stop`."""
    for key, value in document.items() if isinstance(document, dict) else ():
        yield key
        if key not in stop:
            yield from names_in(value, stop=stop)
    if isinstance(document, list):
        for value in document:
            yield from names_in(value, stop=stop)


def test_the_page_names_every_key_and_column_of_a_bank(bank: Bank) -> None:
    page = PAGE.read_text("utf-8")
    document = json.loads((bank.path / "zarr.json").read_bytes())
    stop = ("config", "frontend", "resampler", "constants_sha256")
    names = set(names_in(document["attributes"], stop=stop))
    for file in [bank.path / "seal.json", *(bank.path / "commits").iterdir()]:
        names |= set(names_in(json.loads(file.read_bytes())))
    user = {"day", "snr_db"}
    digests = {f"{what}_{array.column_suffix}" for what in ("sha256", "crc32c")
               for array in bank.schema.arrays()}  # fmt: skip
    assert digests < set(bank.clips.column_names)
    names |= set(bank.clips.column_names) - user - digests
    assert [name for name in names if not name.isdigit() and f"`{name}`" not in page] == []


def test_array_metadata_is_what_the_page_says(bank: Bank) -> None:
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    for array in bank.schema.arrays():
        meta = json.loads((bank.path / array.path / "zarr.json").read_bytes())
        is_packed = bank.card["stored_dtype"] == "int4" and array.kind == "patches"
        width = array.dim // 2 if is_packed else array.dim
        shards = [bank.card["rows_per_shard"], array.n_tokens, width]
        assert meta["shape"] == [bank.n_rows, *shards[1:]]
        stored = bank.card["stored_dtype"]
        in_page = {"bfloat16": ("uint16", 32704), "int8": ("int8", -128), "int4": ("uint8", 0)}
        if stored in ("int8", "int4") and array.kind == "prefix":
            stored = "float16"
        data_type, fill = in_page.get(stored, (stored, "NaN"))
        assert meta["data_type"] == data_type
        assert meta["fill_value"] == fill
        has_note = stored in in_page
        assert set(meta["attributes"]) == ({"stored_dtype", "decoding"} if has_note else set())
        grid = {"name": "regular", "configuration": {"chunk_shape": shards}}
        assert meta["chunk_grid"] == grid
        separator = {"name": "default", "configuration": {"separator": "."}}
        assert meta["chunk_key_encoding"] == separator
        sharding = {
            "chunk_shape": [1, *shards[1:]],
            # A byte has no order.
            "codecs": [{"name": "bytes"} if data_type in ("int8", "uint8") else little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        assert meta["codecs"] == [{"name": "sharding_indexed", "configuration": sharding}]
        axis = {"patches": "patch", "prefix": "prefix"}[array.kind]
        assert meta["dimension_names"] == ["clip", axis, "packed" if is_packed else "dim"]
    n_patches = json.loads((bank.path / f"layers/{array.layer}/n_patches/zarr.json").read_bytes())
    assert (n_patches["fill_value"], n_patches["codecs"]) == (-1, [little])


@pytest.mark.parametrize("source", ["two_layers", "grown_int8", "packed"])
def test_a_bank_of_pooled_vectors_is_what_the_page_says(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole = open_bank(request.getfixturevalue(source))
    found = FormatReader(join_banks([whole], tmp_path / "p.bank", pooled_only=True).path)
    assert found.card["storage"] == "pooled"
    assert found.seal["fingerprint"] == whole.fingerprint
    assert found.clips.equals(whole.clips)
    small = {"mean", "max", "min", "n_patches"}
    for layer in whole.layers:
        folder = found.bank / f"layers/{layer}"
        assert {path.name for path in folder.iterdir()} == {"zarr.json", *small}
        for name in small:
            path = f"layers/{layer}/{name}"
            np.testing.assert_array_equal(found.array(path), FormatReader(whole.path).array(path))
    assert {path.name for path in (found.bank / "golden").iterdir() if path.is_dir()} == {
        "frames",
        "waveform",
    }
    for shard in range(whole.schema.n_shards):
        assert json.loads((found.bank / f"commits/{shard:05d}.json").read_bytes())["files"] == []
    [origin] = found.card["derived_from"]
    assert set(origin) == {"fingerprint", "root_sha256", "stored_dtype", "n_clips", "layers"}
    names = {*origin, "splits"}
    assert all(f"`{name}`" in PAGE.read_text("utf-8") for name in names)


def flipped(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda b: reseal(b, root_sha256="0"), "root_sha256", id="root hash"),
        pytest.param(lambda b: reseal(b, fingerprint="0"), "fingerprint", id="fingerprint"),
        pytest.param(lambda b: flipped(b / "clips.parquet", 99), "clips.parquet", id="a file"),
    ],
)
def test_the_reader_refuses_a_damaged_bank(
    damage: Callable[[Path], None], words: str, two_layers: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(two_layers, tmp_path / "damaged.bank"))
    damage(damaged)
    with pytest.raises(ValueError, match=words):
        FormatReader(damaged)


@pytest.mark.parametrize(
    ("position", "words"),
    [
        pytest.param(-1, "index", id="crc32c of the index"),
        pytest.param(-9, "index", id="an entry of the index"),
        pytest.param(319, "sha256 of row 0", id="the last byte of a row"),
    ],
)
def test_the_reader_refuses_a_damaged_row(
    position: int, words: str, two_layers: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(two_layers, tmp_path / "damaged.bank"))
    flipped(damaged / "layers/1/patches/c.0.0.0", position)
    reseal(damaged)
    found = FormatReader(damaged)
    with pytest.raises(ValueError, match=words):
        found.row(1, 0)


def rewrite_first_shard(bank: Path, order: list[int], *, missing: int | None = None) -> None:
    """Puts the rows of layer 1's first shard in another order, or empties a slot; reseals."""
    file, slots = bank / "layers/1/patches/c.0.0.0", 16
    content = file.read_bytes()
    rows = np.frombuffer(content[: slots * 4096], np.uint8).reshape(slots, 4096)
    entries = np.full((slots, 2), 320, "<u8")
    entries[order, 0] = np.arange(slots) * 4096
    if missing is not None:
        entries[missing] = 2**64 - 1
    index = entries.tobytes()
    checksum = format_reader.crc32c(index).to_bytes(4, "little")
    file.write_bytes(rows[order].tobytes() + index + checksum)
    reseal(bank)


def test_rows_may_stand_in_another_order(two_layers: Path, tmp_path: Path) -> None:
    shuffled = Path(shutil.copytree(two_layers, tmp_path / "shuffled.bank"))
    rewrite_first_shard(shuffled, [5, 0, 15, *range(1, 5), *range(6, 15)])
    expected = zarr.open_array(two_layers / "layers/1/patches", mode="r")[:16]
    found, offset = FormatReader(shuffled), open_bank(shuffled).places(1).offset
    assert offset[5] == 0
    stored = zarr.open_array(shuffled / "layers/1/patches", mode="r")[:16]
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal([found.row(1, row) for row in range(16)], expected)


def test_a_missing_row_is_refused_where_zarr_reads_nan(two_layers: Path, tmp_path: Path) -> None:
    holed = Path(shutil.copytree(two_layers, tmp_path / "holed.bank"))
    rewrite_first_shard(holed, list(range(16)), missing=4)
    assert np.isnan(zarr.open_array(holed / "layers/1/patches", mode="r")[4]).all()
    with pytest.raises(BankCorrupt, match="row 4 is missing"):
        open_bank(holed).places(1)
    with pytest.raises(ValueError, match="row 4 is missing"):
        FormatReader(holed).row(1, 4)


def test_small_arrays_of_several_chunks_are_stored_whole(two_layers: Path, tmp_path: Path) -> None:
    larger = Path(shutil.copytree(two_layers, tmp_path / "larger.bank"))
    values = np.arange(140_000, dtype=np.float32).reshape(70_000, 2)
    pooled = SmallArray(9, "pooled", (2,), "float32", ("clip", "dim"))
    counts = SmallArray(9, "counts", (), "int32", ("clip",))
    create_small_array(larger, pooled, 70_000)[:] = values
    create_small_array(larger, counts, 70_000)[:] = values[:, 0]
    found = FormatReader(larger)
    np.testing.assert_array_equal(found.array("layers/9/pooled"), values)
    np.testing.assert_array_equal(found.array("layers/9/counts"), values[:, 0])
    beyond = np.frombuffer((larger / "layers/9/pooled/c.1.0").read_bytes(), "<f4").reshape(
        65_536, 2
    )[4_464:]
    assert np.isnan(beyond).all()
    assert (np.frombuffer((larger / "layers/9/counts/c.1").read_bytes(), "<i4")[4_464:] == -1).all()


def test_what_a_newer_version_may_add_stays_readable(two_layers: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(two_layers, tmp_path / "newer.bank"))
    document = json.loads((newer / "zarr.json").read_bytes())
    document["attributes"]["new"] = document["attributes"]["card"]["new"] = {"any": 1}
    document["attributes"]["card"]["layers"]["1"]["new"] = 1
    (newer / "zarr.json").write_text(json.dumps(document))
    clips = pq.read_table(newer / "clips.parquet")
    clips = clips.add_column(0, "new", pa.array(range(len(clips))))
    pq.write_table(clips, newer / "clips.parquet")
    (newer / "layers/1/new").mkdir()
    (newer / "layers/1/new/zarr.json").write_text("{}")
    reseal(newer, new=1)
    found, bank = FormatReader(newer), open_bank(newer)
    assert bank.fingerprint == found.seal["fingerprint"] == open_bank(two_layers).fingerprint
    stored = zarr.open_array(newer / "layers/1/patches", mode="r")[39]
    np.testing.assert_array_equal(found.row(1, 39), stored)
    assert bank.places(1).offset[39] >= 0


@pytest.mark.parametrize("place", ["grid", "files"])
def test_what_a_newer_version_may_not_add_is_refused(
    place: str, two_layers: Path, tmp_path: Path
) -> None:
    newer = Path(shutil.copytree(two_layers, tmp_path / "newer.bank"))
    document = json.loads((newer / "zarr.json").read_bytes())
    seal = json.loads((newer / "seal.json").read_bytes())
    if place == "grid":
        document["attributes"]["card"]["layers"]["1"]["grid"]["new"] = 1
    else:
        for file in seal["files"]:
            file["new"] = 1
    (newer / "zarr.json").write_text(json.dumps(document))
    (newer / "seal.json").write_text(json.dumps(seal))
    reseal(newer)
    with pytest.raises(BankCorrupt):
        open_bank(newer)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param({"b": [None, True], "a": 1}, '{"a":1,"b":[null,true]}', id="keys sorted"),
        pytest.param({"2": 0, "10": 0}, '{"10":0,"2":0}', id="layers sort as text"),
        pytest.param([1, 1.0, 1e-4, 1e-5], "[1,1.0,0.0001,1e-05]", id="small floats"),
        pytest.param([1e15, 1e16], "[1000000000000000.0,1e+16]", id="large floats"),
        pytest.param('"\\/\n\x01\x7f', r'"\"\\/\n\u0001\u007f"', id="escapes"),
        pytest.param("\u00f6\U0001f426", r'"\u00f6\ud83d\udc26"', id="beyond ASCII"),
    ],
)
def test_canonical_json_is_what_the_page_says(value: object, text: str) -> None:
    assert canonical_json(value) == format_reader.to_json(value).encode() == text.encode("ascii")


def test_crc32c_is_the_one_of_the_page_and_of_patchbank() -> None:
    assert format_reader.crc32c(b"123456789") == 0xE3069283 == layout.crc32c(b"123456789")


def test_the_reader_is_short_and_knows_nothing_of_patchbank() -> None:
    text = Path(format_reader.__file__).read_text("utf-8")
    assert len(text.splitlines()) < 80
    tree = list(ast.walk(ast.parse(text)))
    modules = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in tree if isinstance(node, ast.ImportFrom)}
    allowed = sys.stdlib_module_names | {"numpy", "pyarrow"}
    assert {module.split(".")[0] for module in modules} <= allowed
