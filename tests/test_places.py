from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import patchbank.pipeline.bank.places as places_module
from patchbank.pipeline.bank.layout import (
    MISSING,
    ShardLayout,
    encode_index,
    parse_index,
    parse_indices,
    sealed_index,
)
from patchbank.pipeline.bank.places import SHARDS_AT_ONCE, RowPlaces, read_places
from patchbank.pipeline.bank.schema import BankSchema, TokenArray, create_token_array
from patchbank.pipeline.errors import BankCorrupt
from patchbank.pipeline.specs import Grid, LayerSpec

N_SLOTS = 16
N_SHARDS = 3 * SHARDS_AT_ONCE + 5
"""More than are read at once, so that threads may read them."""
SHAPE = (3, 10)
ROW_BYTES, PAGE, INDEX_BYTES = 60, 4_096, 260


def schema_of(*generations: int, rows_per_shard: int = N_SLOTS) -> BankSchema:
    spec = LayerSpec(1, "block output", SHAPE[1])
    return BankSchema(generations, rows_per_shard, (spec,), {1: Grid(SHAPE[0], 1)})


def entries_of(pages: np.ndarray) -> np.ndarray:
    """The index of rows that begin at these pages of the file; -1 for a row that is not there."""
    entries = np.full((*pages.shape, 2), MISSING)
    entries[pages >= 0] = np.stack([pages * PAGE, np.full_like(pages, ROW_BYTES)], -1)[pages >= 0]
    return entries


def write_shards(bank: Path, schema: BankSchema) -> TokenArray:
    """Shard files with true indices, in which no row was written."""
    [array] = schema.arrays()
    (bank / array.path).mkdir(parents=True)
    layout = array.layout(schema.rows_per_shard)
    index = cache(partial(encode_index, layout))
    for shard in range(schema.n_shards):
        n_rows = len(schema.rows_of(shard))
        with (bank / array.shard_path(shard)).open("wb") as file:
            file.seek(n_rows * layout.row_stride_bytes)
            file.write(index(n_rows))
    return array


def bytes_at(places: RowPlaces, row: int) -> bytes:
    content = places.files[places.shard_of(row)].read_bytes()
    return content[places.offset[row] : places.offset[row] + places.length[row]]


def n_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@settings(max_examples=25, deadline=None)
@given(generations=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_rows_lie_where_zarr_finds_them_in_whatever_order(
    tmp_path_factory: pytest.TempPathFactory, generations: list[int], seed: int
) -> None:
    bank, schema = tmp_path_factory.mktemp("banks"), schema_of(*generations)
    [array], generator = schema.arrays(), np.random.default_rng(seed)
    create_token_array(bank, array, schema)
    for shard in range(schema.n_shards):
        rows = schema.rows_of(shard)
        pages = np.full(N_SLOTS, -1)
        pages[: len(rows)] = generator.permutation(N_SLOTS)[: len(rows)]
        content = np.zeros((N_SLOTS, PAGE), np.uint8)
        content[pages[: len(rows)], :ROW_BYTES] = (
            generator.standard_normal((len(rows), *SHAPE))
            .astype(np.float16)
            .reshape(len(rows), -1)
            .view(np.uint8)
        )
        index = sealed_index(entries_of(pages))
        (bank / array.shard_path(shard)).write_bytes(content.tobytes() + index)
    places = read_places(bank, schema, array)
    tokens = zarr.open_array(bank / array.path, mode="r")[:]
    is_clip = np.isin(np.arange(schema.n_rows), schema.clip_rows())
    np.testing.assert_array_equal(places.offset >= 0, is_clip)
    np.testing.assert_array_equal(places.length, ROW_BYTES * is_clip)
    for row in schema.clip_rows().tolist():
        assert bytes_at(places, row) == tokens[row].tobytes()


@settings(max_examples=50, deadline=None)
@given(n_shards=st.integers(1, 9), n_slots=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_many_indices_are_read_as_each_alone(n_shards: int, n_slots: int, seed: int) -> None:
    layout, generator = ShardLayout(n_slots, ROW_BYTES), np.random.default_rng(seed)
    pages = np.stack([generator.permutation(n_slots) for _ in range(n_shards)])
    pages[generator.random(pages.shape) < 0.3] = -1
    tails = [sealed_index(entries_of(of_shard)) for of_shard in pages]
    size = layout.file_bytes(n_slots)
    found = parse_indices(
        tails, layout, file_bytes=[size] * n_shards, names=[f"c.{n}.0.0" for n in range(n_shards)]
    )
    np.testing.assert_array_equal(found, np.where(pages < 0, -1, pages * PAGE))
    alone = [parse_index(tail, layout, file_bytes=size, name="x") for tail in tails]
    np.testing.assert_array_equal(found, np.stack(alone))


@pytest.fixture(params=[0.0, float("inf")], ids=["in threads", "alone"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the disk is so slow that threads are worth it."""
    monkeypatch.setattr(places_module, "WAITING_S", request.param)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("banks")


@pytest.fixture(scope="module")
def schema() -> BankSchema:
    return schema_of(N_SHARDS * N_SLOTS - 3)


@pytest.fixture(scope="module")
def array(bank: Path, schema: BankSchema) -> TokenArray:
    return write_shards(bank, schema)


def entry(offset: int, n_bytes: int) -> Callable[[bytes], bytes]:
    """Replaces the entry of slot 5."""

    def replaced(content: bytes) -> bytes:
        entries = np.frombuffer(content[-INDEX_BYTES:-4], "<u8").reshape(-1, 2).copy()
        entries[5] = offset, n_bytes
        return content[:-INDEX_BYTES] + sealed_index(entries)

    return replaced


DAMAGE = {
    "outside": (entry(16 * PAGE, 60), ", row 5: the index points to 60 bytes at 65536"),
    "far outside": (entry(2**63, 60), ", row 5: the index points to 60 bytes at 92233720368547"),
    "long": (entry(5 * PAGE, 61), ", row 5: the index points to 61 bytes at 20480"),
    "half": (entry(5 * PAGE, 2**64 - 1), ", row 5: the index points to 18446744073709551615 bytes"),
    "twice": (entry(3 * PAGE, 60), ": rows overlap in the index"),
    "overlap": (entry(4 * PAGE + 59, 60), ": rows overlap in the index"),
    "between": (entry(5 * PAGE + 64, 60), ": a row does not begin at a multiple of 4096"),
    "missing": (entry(2**64 - 1, 2**64 - 1), ": row {row} is missing; pull the bank again"),
    "flipped": (lambda content: content[:-9] + b"x" + content[-8:], ": the index does not match"),
    "short": (lambda content: content[:259], ": 259 bytes, too short for an index of 260"),
    "empty": (lambda content: b"", ": 0 bytes, too short for an index of 260"),
    "gone": (lambda content: None, ": No such file or directory; pull the bank again"),
}


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("shard", [0, SHARDS_AT_ONCE - 1, SHARDS_AT_ONCE, 150, N_SHARDS - 1])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_in_any_shard_is_named_with_file_and_row(
    damage: str, shard: int, bank: Path, schema: BankSchema, array: TokenArray
) -> None:
    change, words = DAMAGE[damage]
    path, n_open = bank / array.shard_path(shard), n_descriptors()
    whole = path.read_bytes()
    content = change(whole)
    path.unlink() if content is None else path.write_bytes(content)
    try:
        with pytest.raises(BankCorrupt) as caught:
            read_places(bank, schema, array)
    finally:
        path.write_bytes(whole)
    name = f"shard layers/1/patches/c.{shard}.0.0"
    assert name + words.format(row=shard * N_SLOTS + 5) in str(caught.value)
    assert n_descriptors() == n_open


@pytest.mark.usefixtures("waiting")
def test_of_several_damaged_shards_the_first_is_named(
    bank: Path, schema: BankSchema, array: TokenArray
) -> None:
    paths = [bank / array.shard_path(shard) for shard in (69, 71, 180)]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(entry(2**40, 60)(path.read_bytes()))
    with pytest.raises(BankCorrupt, match=r"c\.69\.0\.0, row 5"):
        read_places(bank, schema, array)
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    usual = np.arange(schema.n_rows) % N_SLOTS * PAGE
    np.testing.assert_array_equal(read_places(bank, schema, array).offset, usual)


@pytest.mark.usefixtures("waiting")
def test_a_shard_that_cannot_be_read_is_named_among_many(tmp_path: Path) -> None:
    schema = schema_of(20_000)
    array, n_open = write_shards(tmp_path, schema), n_descriptors()
    path = tmp_path / array.shard_path(777)
    path.unlink()
    path.mkdir()
    with pytest.raises(BankCorrupt, match=r"patches/c\.777\.0\.0: Is a directory; pull the bank"):
        read_places(tmp_path, schema, array)
    assert n_descriptors() == n_open


@pytest.mark.usefixtures("waiting")
def test_rows_of_an_archive_have_lengths_of_their_own(tmp_path: Path) -> None:
    schema = replace(schema_of(N_SHARDS * N_SLOTS - 3), storage="blosc")
    array, generator = write_shards(tmp_path, schema), np.random.default_rng(0)
    lengths = generator.integers(16, 77, (N_SHARDS, N_SLOTS)).astype(np.uint64)
    offsets = np.cumsum(lengths, axis=1, dtype=np.uint64) - lengths
    for shard in range(N_SHARDS):
        entries = np.stack([offsets[shard], lengths[shard]], -1)
        entries[len(schema.rows_of(shard)) :] = MISSING
        (tmp_path / array.shard_path(shard)).write_bytes(bytes(16 * 77) + sealed_index(entries))
    places = read_places(tmp_path, schema, array)
    np.testing.assert_array_equal(places.offset, offsets.reshape(-1)[: schema.n_rows])
    np.testing.assert_array_equal(places.length, lengths.reshape(-1)[: schema.n_rows])


@pytest.mark.usefixtures("waiting")
def test_the_places_of_two_million_rows_cost_no_more_than_their_indices(tmp_path: Path) -> None:
    schema = schema_of(2_000_000, rows_per_shard=2_048)
    array, before = write_shards(tmp_path, schema), n_bytes_read()
    places = read_places(tmp_path, schema, array)
    index_bytes = schema.n_shards * array.layout(2_048).index_bytes
    assert n_bytes_read() - before < index_bytes + 100_000
    np.testing.assert_array_equal(places.offset, np.arange(2_000_000) % 2_048 * PAGE)
    assert (places.length == ROW_BYTES).all()


def n_bytes_read() -> int:
    """All that this process has asked for, from the page cache too."""
    lines = Path("/proc/self/io").read_text("ascii").splitlines()
    return int(lines[0].removeprefix("rchar: "))
