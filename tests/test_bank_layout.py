from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from patchbank.pipeline.bank.layout import (
    ALIGNMENT_BYTES,
    MISSING,
    ShardLayout,
    crc32c,
    encode_index,
    parse_index,
    rows_per_shard,
)
from patchbank.pipeline.bank.schema import BankSchema, create_skeleton
from patchbank.pipeline.errors import BankCorrupt
from patchbank.pipeline.specs import Grid, LayerSpec


def sealed_index(entries: np.ndarray) -> bytes:
    body = entries.astype("<u8").tobytes()
    return body + crc32c(body).to_bytes(4, "little")


@given(n_slots=st.integers(1, 50), row_bytes=st.integers(1, 20_000), data=st.data())
def test_an_index_that_was_encoded_parses_to_aligned_offsets(
    n_slots: int, row_bytes: int, data: st.DataObject
) -> None:
    n_rows = data.draw(st.integers(0, n_slots))
    layout = ShardLayout(n_slots, row_bytes)
    offsets = parse_index(
        encode_index(layout, n_rows), layout, file_bytes=layout.file_bytes(n_rows), name="x"
    )
    assert (offsets[:n_rows] % ALIGNMENT_BYTES == 0).all()
    assert (np.diff(offsets[:n_rows]) >= row_bytes).all()
    assert (offsets[n_rows:] == -1).all()


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=3, max_size=3
    )
)
def test_a_hostile_index_never_points_outside_its_file(entries: list[tuple[int, int]]) -> None:
    layout = ShardLayout(3, 100)
    file_bytes = layout.file_bytes(3)
    try:
        offsets = parse_index(
            sealed_index(np.array(entries, dtype="u8")), layout, file_bytes=file_bytes, name="x"
        )
    except BankCorrupt:
        return
    used = offsets[offsets >= 0]
    assert (used + 100 <= file_bytes - layout.index_bytes).all()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        pytest.param([[0, 100], [50, 100]], "overlap", id="overlapping"),
        pytest.param([[0, 100], [0, 100]], "overlap", id="the same row twice"),
        pytest.param([[0, 100], [2**63, 100]], "row 1: the index points to 100", id="far outside"),
        pytest.param([[0, 100], [8_150, 100]], "row 1: the index points", id="into the index"),
        pytest.param([[0, 99], [4096, 100]], "row 0: the index points to 99", id="short row"),
        pytest.param([[0, 2**62], [4096, 100]], "row 0", id="huge row"),
    ],
)
def test_an_index_with_wrong_entries_is_corrupt(entries: list[list[int]], words: str) -> None:
    layout = ShardLayout(2, 100)
    tail = sealed_index(np.array(entries, dtype="u8"))
    with pytest.raises(BankCorrupt, match=words):
        parse_index(tail, layout, file_bytes=layout.file_bytes(2), name="layers/1/patches/c.0.0.0")


@given(
    n_slots=st.integers(1, 40),
    row_bytes=st.integers(1, 10_000),
    edits=st.lists(
        st.tuples(
            st.integers(0, 39),
            st.integers(0, 1),
            st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 50).map(lambda page: page * 4_096)),
        ),
        max_size=8,
    ),
    n_less=st.integers(-5_000, 50_000),
)
def test_rows_of_any_index_are_apart_aligned_and_inside_the_file(
    n_slots: int, row_bytes: int, edits: list[tuple[int, int, int]], n_less: int
) -> None:
    layout = ShardLayout(n_slots, row_bytes)
    entries = np.frombuffer(encode_index(layout, n_slots)[:-4], "<u8").reshape(n_slots, 2).copy()
    for slot, column, value in edits:
        entries[slot % n_slots, column] = value
    file_bytes = max(layout.index_bytes, layout.file_bytes(n_slots) - n_less)
    try:
        offsets = parse_index(sealed_index(entries), layout, file_bytes=file_bytes, name="x")
    except BankCorrupt:
        return
    used = np.sort(offsets[offsets >= 0])
    assert (used % ALIGNMENT_BYTES == 0).all()
    assert (np.diff(used) >= row_bytes).all()
    assert (used + row_bytes <= file_bytes - layout.index_bytes).all()
    assert (offsets[(entries != MISSING).any(axis=1)] >= 0).all()


@given(
    tail=st.binary(max_size=400),
    n_slots=st.one_of(st.integers(1, 30), st.just(2**47)),
    row_bytes=st.one_of(st.integers(1, 10_000), st.sampled_from([2**62, 2**64, 2**100])),
    file_bytes=st.integers(0, 2**40),
)
def test_any_bytes_in_place_of_an_index_are_refused_or_parsed(
    tail: bytes, n_slots: int, row_bytes: int, file_bytes: int
) -> None:
    layout = ShardLayout(n_slots, row_bytes)
    with pytest.raises(BankCorrupt):
        parse_index(tail, layout, file_bytes=file_bytes, name="x")
    if n_slots <= 30:
        # With a right checksum: no slot may point anywhere in a file too small for a row.
        entries = np.frombuffer(tail[:8].ljust(16 * n_slots, b"\0"), "<u8")
        index = sealed_index(entries.reshape(n_slots, 2))
        with pytest.raises(BankCorrupt):
            parse_index(index, layout, file_bytes=len(index), name="x")


@pytest.mark.parametrize("row_bytes", [2**62, 2**64, 2**100])
def test_rows_longer_than_any_file_are_refused(row_bytes: int) -> None:
    layout = ShardLayout(2, row_bytes)
    entries = np.array([[0, 2**62], [2**64 - 1, 2**64 - 1]], "u8")
    with pytest.raises(BankCorrupt, match="row 0: the index points to"):
        parse_index(sealed_index(entries), layout, file_bytes=2**40, name="x")
    empty = np.full((2, 2), MISSING)
    assert parse_index(sealed_index(empty), layout, file_bytes=36, name="x").tolist() == [-1, -1]


def test_a_row_that_begins_between_two_pages_is_corrupt() -> None:
    layout = ShardLayout(2, 100)
    tail = sealed_index(np.array([[0, 100], [4_097, 100]], "u8"))
    with pytest.raises(BankCorrupt, match="does not begin at a multiple of 4096"):
        parse_index(tail, layout, file_bytes=layout.file_bytes(2), name="x")


def test_a_flipped_bit_in_the_index_is_corrupt() -> None:
    layout = ShardLayout(2, 100)
    tail = bytearray(encode_index(layout, 2))
    tail[3] ^= 1
    with pytest.raises(BankCorrupt, match=r"c\.7\.0\.0: the index does not match its crc32c"):
        parse_index(bytes(tail), layout, file_bytes=layout.file_bytes(2), name="c.7.0.0")


def test_a_file_shorter_than_its_index_is_corrupt() -> None:
    with pytest.raises(BankCorrupt, match="too short"):
        parse_index(b"123", ShardLayout(2, 100), file_bytes=3, name="x")


@pytest.mark.parametrize(
    ("n_rows", "row_bytes", "files", "rows"),
    [
        pytest.param(1, 10, 2, 16, id="tiny tables have one shard"),
        pytest.param(3_200, 10, 2, 100, id="small tables have about 32 shards"),
        pytest.param(2_000_000, 786_432, 2, 512, id="large rows: 384 MiB"),
        pytest.param(2_040_000, 786_432, 2, 512, id="AudioSet: 3,985 shards"),
        pytest.param(2_000_000, 20 * 2**20, 2, 500, id="few files before few bytes"),
        pytest.param(2_000_000, 40 * 2**20, 2, 452, id="more files before 20 GB in one"),
        pytest.param(10_000_000, 786_432, 13, 7_226, id="huge tables stay under 20,000 files"),
    ],
)
def test_rows_per_shard(n_rows: int, row_bytes: int, files: int, rows: int) -> None:
    found = rows_per_shard(n_rows=n_rows, largest_row_bytes=row_bytes, files_per_shard=files)
    assert found == rows
    assert -(-n_rows // found) * files <= 20_000


@given(
    n_rows=st.integers(1, 10**8),
    row_bytes=st.integers(1, 2 * 10**9),
    files=st.integers(2, 30),
)
def test_folders_and_files_stay_small_enough_for_hubs(
    n_rows: int, row_bytes: int, files: int
) -> None:
    found = rows_per_shard(n_rows=n_rows, largest_row_bytes=row_bytes, files_per_shard=files)
    n_shards, layout = -(-n_rows // found), ShardLayout(found, row_bytes)
    assert n_shards * files <= 20_000
    if n_shards > 4_000:
        assert (found + 1) * layout.row_stride_bytes > 19e9
    if layout.file_bytes(found) >= 20e9:
        assert -(-n_rows // (found - 1)) * files > 17_900


def test_a_missing_row_reads_as_nan_through_zarr(tmp_path: Path) -> None:
    schema = BankSchema((4,), 16, (LayerSpec(1, "x", 2),), {1: Grid(2, 1)}, "float16")
    create_skeleton(tmp_path / "x.bank", schema, {})
    found = zarr.open_array(tmp_path / "x.bank" / "layers/1/patches", mode="r")[:]
    assert np.isnan(found).all()


def test_the_empty_entry_is_the_one_zarr_uses() -> None:
    assert np.iinfo(np.uint64).max == MISSING
