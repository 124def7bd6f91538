"""Rows of shard files as `preadv` and mapped pages give them, against plain slices of the files."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_rows import read_rows

from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.pipeline.bank.dtypes import STORED_TYPES
from patchbank.pipeline.bank.places import RowPlaces
from patchbank.pipeline.bank.row_files import RowFiles, reads_directly
from patchbank.pipeline.bank.schema import TokenArray
from patchbank.pipeline.errors import BankError
from patchbank.probing.row_readers import MappedRows, RamRows, RowReader

ROWS_PER_SHARD = 8


def write_places(
    folder: Path, *, n_rows: int, n_tokens: int, dim: int, seed: int, holes: frozenset[int]
) -> tuple[RowPlaces, np.ndarray]:
    """Shard files of random bytes whose rows lie in random order, and every row's padded bytes."""
    generator = np.random.default_rng(seed)
    array = TokenArray(1, "patches", n_tokens, dim, STORED_TYPES["int8"])
    stride = array.layout(ROWS_PER_SHARD).row_stride_bytes
    rows = generator.integers(0, 256, (n_rows, stride), np.uint8)
    rows[:, array.row_bytes :] = 0
    offset, files = np.full(n_rows, -1, np.int64), []
    for first in range(0, n_rows, ROWS_PER_SHARD):
        own = [row for row in range(first, min(first + ROWS_PER_SHARD, n_rows)) if row not in holes]
        order = np.array(own, np.int64)
        order = generator.permutation(order) if seed % 2 else order
        offset[order] = np.arange(len(order)) * stride
        path = folder / f"{seed}-{n_rows}-{first}"
        path.write_bytes(rows[order].tobytes() + b"index")
        files.append(path)
    length = np.where(offset < 0, 0, array.row_bytes)
    return RowPlaces(array, tuple(files), ROWS_PER_SHARD, offset, length), rows


def readers(places: RowPlaces) -> dict[str, RowReader]:
    present = np.flatnonzero(places.offset >= 0)
    n_rows = len(places.offset)
    found: dict[str, RowReader] = {
        "buffered": RowFiles(places, direct=False),
        "mapped": MappedRows(places),
        "ram": RamRows(RowFiles(places, direct=False), present, n_rows=n_rows),
    }
    if reads_directly(places):
        direct = RowFiles(places, direct=True)
        found |= {"direct": direct, "ram, direct": RamRows(direct, present, n_rows=n_rows)}
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_reader_gives_the_bytes_of_the_rows_that_it_is_asked_for(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n_rows = data.draw(st.integers(1, 30))
    holes = data.draw(st.frozensets(st.integers(0, n_rows - 1), max_size=n_rows - 1))
    places, content = write_places(
        tmp_path_factory.mktemp("rows"),
        n_rows=n_rows,
        n_tokens=data.draw(st.integers(1, 3)),
        dim=data.draw(st.sampled_from([1, 700, 2_048, 4_096, 4_097, 5_000])),
        seed=data.draw(st.integers(0, 1_000)),
        holes=holes,
    )
    present = [row for row in range(n_rows) if row not in holes]
    for name, reader in readers(places).items():
        for _ in range(2):
            rows = data.draw(st.lists(st.sampled_from(present), max_size=40))
            n_bytes = places.array.row_bytes
            np.testing.assert_array_equal(
                read_rows(reader, rows)[:, :n_bytes], content[rows][:, :n_bytes], name
            )
        for row in sorted(holes)[:2]:
            with pytest.raises(BankError, match=f"row {row} has no tokens"):
                read_rows(reader, [present[0], row])


def test_rows_that_follow_each_other_come_with_one_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, content = write_places(
        tmp_path, n_rows=20, n_tokens=1, dim=4_096, seed=0, holes=frozenset()
    )
    lengths, real = [], os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        lengths.append(sum(map(len, buffers)) // 4_096)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    files = RowFiles(places, direct=False)
    np.testing.assert_array_equal(read_rows(files, list(range(2, 20))), content[2:20])
    assert lengths == [6, 8, 4]  # to the end of a shard
    lengths.clear()
    np.testing.assert_array_equal(read_rows(files, [4, 5, 7, 6]), content[[4, 5, 7, 6]])
    assert lengths == [2, 1, 1]


def test_a_read_that_comes_in_pieces_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, content = write_places(
        tmp_path, n_rows=8, n_tokens=2, dim=4_096, seed=0, holes=frozenset()
    )
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:5_000]], at))
    np.testing.assert_array_equal(read_rows(RowFiles(places, direct=False), [3, 4]), content[3:5])


def test_rows_go_to_the_places_that_are_named(tmp_path: Path) -> None:
    places, content = write_places(
        tmp_path, n_rows=20, n_tokens=1, dim=5_000, seed=1, holes=frozenset()
    )
    for name, reader in readers(places).items():
        into = aligned_memory(10 * reader.stride).reshape(10, reader.stride)
        reader.read(np.array([3, 4, 19]), into, np.array([7, 0, 2]))
        np.testing.assert_array_equal(into[[7, 0, 2], :5_000], content[[3, 4, 19], :5_000], name)
        assert not into[[1, 3, 4, 5, 6, 8, 9]].any()


def test_few_files_are_open_at_once_and_none_in_the_end(tmp_path: Path) -> None:
    places, content = write_places(
        tmp_path, n_rows=800, n_tokens=1, dim=64, seed=0, holes=frozenset()
    )
    files = RowFiles(places, direct=False, most_open=10)
    n_before = len(list(Path("/proc/self/fd").iterdir()))
    most, errors = [0], []

    def read(files: RowFiles, seed: int) -> None:
        for row in np.random.default_rng(seed).permutation(800)[:300].tolist():
            if not (read_rows(files, [row]) == content[row]).all():
                errors.append(row)
            most[0] = max(most[0], len(list(Path("/proc/self/fd").iterdir())) - n_before)

    threads = [threading.Thread(target=read, args=(files, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert 10 <= most[0] <= 10 + 2 * 4  # and those that the threads themselves look with
    files.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == n_before
    np.testing.assert_array_equal(read_rows(files, [5]), content[5:6])  # opened again
    del files
    assert len(list(Path("/proc/self/fd").iterdir())) == n_before
