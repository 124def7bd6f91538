"""What the shard writers write, how they fail, and what they leave behind: nothing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from patchbank.pipeline.bank.archive import ArchiveFileWriter
from patchbank.pipeline.bank.direct import aligned_memory
from patchbank.pipeline.bank.layout import ALIGNMENT_BYTES, ShardLayout, crc32c
from patchbank.pipeline.bank.schema import BankSchema, create_skeleton
from patchbank.pipeline.bank.writer import (
    BLOCK_BYTES,
    BLOCKS_PER_FILE,
    FinishedFile,
    ShardFileWriter,
    hash_file,
)
from patchbank.pipeline.specs import Grid, LayerSpec

MIB = 2**20


class Pool(ThreadPoolExecutor):
    """Remembers its jobs."""

    def __init__(self, n_threads: int) -> None:
        super().__init__(n_threads)
        self.jobs: list[Future[Any]] = []

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs.append(super().submit(*args, **kwargs))
        return self.jobs[-1]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


@pytest.fixture
def leaves_nothing(pool: Pool) -> Iterator[None]:
    """No descriptor is open afterwards that was not before, and no job is left."""
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert all(job.done() for job in pool.jobs)


def random_rows(n_rows: int, shape: tuple[int, int], dtype: str = "int8") -> np.ndarray:
    n_bytes = n_rows * shape[0] * shape[1] * np.dtype(dtype).itemsize
    data = np.random.default_rng(n_bytes).bytes(n_bytes)
    return np.frombuffer(data, dtype).reshape(n_rows, *shape)


def layout_of(rows: np.ndarray, *, n_slots: int = 0) -> ShardLayout:
    return ShardLayout(n_slots or len(rows), rows[0].nbytes)


def write(
    path: Path, rows: np.ndarray, threads: ThreadPoolExecutor, *, n_slots: int = 0
) -> tuple[FinishedFile, bool]:
    """The finished file, and whether it was written past the page cache."""
    layout = layout_of(rows, n_slots=n_slots)
    with ShardFileWriter(path, layout, n_rows=len(rows), name=path.name, threads=threads) as writer:
        for row in rows:
            writer.write_row(row)
        return writer.finish(), writer.is_direct


def without_direct(patch: pytest.MonkeyPatch) -> None:
    """A file system that refuses to open a file with O_DIRECT."""
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return real(path, flags, *args, **kwargs)

    patch.setattr(os, "open", refusing)


def needs_direct(folder: Path) -> None:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"needs a file system with O_DIRECT: {error}")


def expected_digests(rows: np.ndarray) -> list[tuple[str, int]]:
    contents = [row.tobytes() for row in rows]
    return [(hashlib.sha256(content).hexdigest(), crc32c(content)) for content in contents]


STORED = ["float16", "bfloat16", "float32", "int8", "int4"]
ODD_BYTES = [1, 4_095, 4_096, 4_097, 8_192, MIB - 4_096, MIB, MIB + 1, 2 * MIB]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 700)),
    st.tuples(st.just(1), st.sampled_from(ODD_BYTES)),
)


@settings(max_examples=40, deadline=None)
@given(
    shape=SHAPES,
    dtype=st.sampled_from(STORED),
    rows_per_shard=st.integers(1, 16),
    n_rows=st.integers(1, 20),
)
@example(shape=(1, 1), dtype="int8", rows_per_shard=600, n_rows=1_301)
@example(shape=(1, 2), dtype="int4", rows_per_shard=600, n_rows=601)
@example(shape=(2, 100), dtype="float32", rows_per_shard=512, n_rows=700)
@example(shape=(1, MIB + 1), dtype="int8", rows_per_shard=7, n_rows=9)
def test_zarr_reads_back_what_the_writer_wrote(
    threads: ThreadPoolExecutor,
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    dtype: str,
    rows_per_shard: int,
    n_rows: int,
) -> None:
    n_patches, dim = shape
    dim += dim % 2 if dtype == "int4" else 0
    spec = LayerSpec(3, "block output", dim)
    schema = BankSchema((n_rows,), rows_per_shard, (spec,), {3: Grid(n_patches, 1)}, dtype)  # type: ignore[arg-type]
    bank = tmp_path_factory.mktemp("banks") / "x.bank"
    create_skeleton(bank, schema, {})
    array = schema.arrays()[0]
    rows = random_rows(n_rows, (n_patches, array.width), str(array.dtype))
    for shard in range(schema.n_shards):
        path, own = bank / array.shard_path(shard), schema.rows_of(shard)
        some = rows[own.start : own.stop]
        finished, _ = write(path, some, threads, n_slots=rows_per_shard)
        assert finished.record == hash_file(path, relative_to=path.parent)
        assert [(d.sha256, d.crc32c) for d in finished.digests] == expected_digests(some)
        with pytest.MonkeyPatch.context() as patch:
            without_direct(patch)
            other = path.with_name("buffered")
            buffered, is_direct = write(other, some, threads, n_slots=rows_per_shard)
        assert not is_direct
        assert other.read_bytes() == path.read_bytes()
        assert buffered.digests == finished.digests
        assert buffered.record.sha256 == finished.record.sha256
        other.unlink()
    found = zarr.open_array(bank / "layers/3/patches", mode="r")[:]
    assert np.ascontiguousarray(found).tobytes() == rows.tobytes()


def test_a_file_is_written_past_the_page_cache_where_that_is_possible(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    needs_direct(tmp_path)
    _, is_direct = write(tmp_path / "c", random_rows(5, (3, 1_000)), threads)
    assert is_direct


def test_rows_need_not_lie_in_one_piece(threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    rows = random_rows(6, (30, 20), "float16").transpose(0, 2, 1)[:, ::-1]
    assert not rows[0].flags.c_contiguous
    finished, _ = write(tmp_path / "c", rows, threads)
    assert [(d.sha256, d.crc32c) for d in finished.digests] == expected_digests(rows)


def test_a_row_may_change_as_soon_as_it_is_written(
    threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    rows = random_rows(40, (1, 200_000))
    row, layout = rows[0].copy(), layout_of(rows)
    with ShardFileWriter(tmp_path / "c", layout, n_rows=40, name="c", threads=threads) as writer:
        for values in rows:
            row[:] = values
            writer.write_row(row)
        found = writer.finish()
    assert [(d.sha256, d.crc32c) for d in found.digests] == expected_digests(rows)
    assert found.record == hash_file(tmp_path / "c", relative_to=tmp_path)


def test_many_writers_share_one_thread(tmp_path: Path) -> None:
    rows = random_rows(60, (1, 300_000))
    layout, files = layout_of(rows), []

    def write_all() -> None:
        with ThreadPoolExecutor(1) as one, ExitStack() as stack:
            writers = [
                stack.enter_context(
                    ShardFileWriter(tmp_path / name, layout, n_rows=60, name=name, threads=one)
                )
                for name in "abcde"
            ]
            for row in rows:
                for writer in writers:
                    writer.write_row(row)
            files.extend(writer.finish() for writer in writers)

    thread = threading.Thread(target=write_all, daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive(), "the writers wait for each other"
    assert [file.record for file in files] == [
        hash_file(tmp_path / name, relative_to=tmp_path) for name in "abcde"
    ]


SMALL_FILES = """
import os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from patchbank.pipeline.bank.layout import ShardLayout
from patchbank.pipeline.bank.writer import ShardFileWriter

class Pool(ThreadPoolExecutor):
    jobs = []
    def submit(self, *args):
        self.jobs.append(super().submit(*args))
        return self.jobs[-1]

row, layout, threads = np.ones((1, 300_000), np.int8), ShardLayout(40, 300_000), Pool(2)

def error_of(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return error

def first_errors(writer):
    for _ in range(40):
        if error := error_of(writer.write_row, row):
            return "row", error, error_of(writer.write_row, row)
    return "finish", error_of(writer.finish), error_of(writer.finish)

before = sorted(os.listdir("/proc/self/fd"))
path = Path(sys.argv[1])
with ShardFileWriter(path, layout, n_rows=40, name="x", threads=threads) as writer:
    # Like a disk that breaks after the space was reserved: nothing is written beyond here.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    where, *errors = first_errors(writer)
assert sorted(os.listdir("/proc/self/fd")) == before
assert all(job.done() for job in threads.jobs)
print(where, *(error.errno for error in errors))
"""
"""A script: `python -c SMALL_FILES path most_bytes`."""


@pytest.mark.parametrize(
    ("most_bytes", "earliest"),
    [
        pytest.param(2 * MIB, "row", id="in the middle of a file"),
        pytest.param(2 * MIB + 1_000, "row", id="in the middle of a page"),
        pytest.param(40 * 303_104 - 4_096, "finish", id="at its last row"),
        pytest.param(40 * 303_104 + 100, "finish", id="at its index"),
    ],
)
def test_a_failing_write_is_told_by_the_next_call_and_leaks_nothing(
    most_bytes: int, earliest: str, tmp_path: Path
) -> None:
    line = [sys.executable, "-c", SMALL_FILES, str(tmp_path / "c"), str(most_bytes)]
    ran = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    where, *errors = ran.stdout.split()
    assert where in (earliest, "finish")
    assert errors == [str(errno.EFBIG)] * 2


def test_a_full_disk_shows_before_the_first_row(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]):
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(OSError, match="No space left") as raised:
            write(place / "c", random_rows(4, (1, MIB)), threads)
        assert raised.value.errno == errno.ENOSPC
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


class mounted(ExitStack):  # noqa: N801 - a context manager
    """A file system for the length of a test; the last word of the line is its place."""

    def __init__(self, line: list[str]) -> None:
        super().__init__()
        made = subprocess.run(["mount", *line], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"needs the right to mount: {made.stderr.strip()}")
        self.callback(subprocess.run, ["umount", "-l", line[-1]], check=True, timeout=30)


def test_a_file_system_that_has_no_direct_writes_gets_the_same_bytes(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    place, rows = tmp_path / "disk", random_rows(30, (1, 100_000))
    place.mkdir()
    expected, _ = write(tmp_path / "c", rows, threads)
    with mounted(["-t", "ramfs", "ramfs", str(place)]):
        with pytest.raises(OSError, match="Invalid argument"):
            os.open(place / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        found, is_direct = write(place / "c", rows, threads)
        assert (place / "c").read_bytes() == (tmp_path / "c").read_bytes()
    assert not is_direct
    assert found == expected


def is_open_for_direct_writes(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def test_a_file_system_that_refuses_the_first_direct_write_gets_the_same_bytes(
    tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(30, (1, 100_000))
    expected, _ = write(tmp_path / "c", rows, threads)
    real = os.pwrite

    def refusing(descriptor: int, data: memoryview, offset: int) -> int:
        if is_open_for_direct_writes(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    (tmp_path / "other").mkdir()
    found, is_direct = write(tmp_path / "other/c", rows, threads)
    assert not is_direct
    assert (tmp_path / "other/c").read_bytes() == (tmp_path / "c").read_bytes()
    assert found == expected


@pytest.mark.parametrize(
    "most_bytes", [pytest.param(8_192, id="whole pages"), pytest.param(5_000, id="any bytes")]
)
def test_short_writes_are_continued(
    most_bytes: int, tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, real = random_rows(30, (1, 100_000)), os.pwrite

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        n_bytes = min(len(data), most_bytes)
        if is_open_for_direct_writes(descriptor):
            # What a disk stops at, and a kernel that then refuses the rest.
            n_bytes = n_bytes // 512 * 512
        return real(descriptor, data[:n_bytes], offset)

    monkeypatch.setattr(os, "pwrite", short)
    found, _ = write(tmp_path / "c", rows, threads)
    assert found.record == hash_file(tmp_path / "c", relative_to=tmp_path)
    assert [(d.sha256, d.crc32c) for d in found.digests] == expected_digests(rows)


def test_an_error_of_one_file_leaves_the_others_alone(
    tmp_path: Path, pool: Pool, leaves_nothing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, real = random_rows(30, (1, 300_000)), os.pwrite

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("bad"):  # noqa: PTH115
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", failing)
    layout = layout_of(rows)
    with ExitStack() as stack:
        good, bad = (
            stack.enter_context(
                ShardFileWriter(tmp_path / name, layout, n_rows=30, name=name, threads=pool)
            )
            for name in ("good", "bad")
        )
        for row in rows:
            good.write_row(row)
        with pytest.raises(OSError, match="Input/output error"):
            write_all(bad, rows)
        with pytest.raises(OSError, match="Input/output error"):
            bad.write_row(rows[0])
        record = good.finish().record
    assert record == hash_file(tmp_path / "good", relative_to=tmp_path)


def write_all(writer: ShardFileWriter, rows: np.ndarray) -> None:
    for row in rows:
        writer.write_row(row)
    writer.finish()


@pytest.mark.parametrize("n_rows", [0, 1, 5, 29, 30])
def test_a_file_that_is_given_up_leaves_nothing(
    n_rows: int, tmp_path: Path, pool: Pool, leaves_nothing: None
) -> None:
    rows = random_rows(30, (1, 300_000))
    layout = layout_of(rows)

    class GivenUpError(Exception):
        pass

    for name, error in (("a", None), ("b", GivenUpError)):
        with ExitStack() as stack:
            writer = stack.enter_context(
                ShardFileWriter(tmp_path / name, layout, n_rows=30, name=name, threads=pool)
            )
            for row in rows[:n_rows]:
                writer.write_row(row)
            if error is not None:
                with pytest.raises(GivenUpError), stack.pop_all():
                    raise error
        with pytest.raises(ValueError, match="closed"):
            writer.write_row(rows[0]) if n_rows < 30 else writer.finish()


class EndingPool(Pool):
    """One thread that does nothing, and a shutdown by somebody else just before the n-th job."""

    def __init__(self, n_jobs: int) -> None:
        super().__init__(1)
        self._n_jobs, self._wakes = n_jobs, threading.Event()
        self._ending = threading.Thread(target=self._end, daemon=True)
        super().submit(self._wakes.wait, 60)

    def _end(self) -> None:
        self.shutdown(wait=False, cancel_futures=True)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        if len(self.jobs) == self._n_jobs:
            self._ending.start()
            self._ending.join(60)
            assert not self._ending.is_alive(), "who submits a job holds what its end needs"
            self._wakes.set()
        return super().submit(*args, **kwargs)


@pytest.mark.parametrize("n_jobs", [1, 2, 3, 4, 5, 6])
def test_a_pool_that_is_shut_down_ends_its_writers(n_jobs: int, tmp_path: Path) -> None:
    rows, pool = random_rows(3, (1, MIB)), EndingPool(n_jobs)
    layout = layout_of(rows)
    with ShardFileWriter(tmp_path / "c", layout, n_rows=3, name="c", threads=pool) as writer:
        with pytest.raises((CancelledError, RuntimeError)):
            write_all(writer, rows)
        with pytest.raises((CancelledError, RuntimeError)):
            writer.finish() if n_jobs > 5 else writer.write_row(rows[0])
    assert all(job.cancelled() for job in pool.jobs[1:])
    pool.shutdown()


def test_a_file_is_not_finished_without_its_jobs(tmp_path: Path) -> None:
    pool = Pool(1)
    pool.shutdown()
    with ShardFileWriter(
        tmp_path / "c", ShardLayout(1, 8), n_rows=1, name="c", threads=pool
    ) as writer:
        with pytest.raises(RuntimeError, match="after shutdown"):
            writer.write_row(np.zeros((1, 8), np.int8))
        with pytest.raises(RuntimeError, match="after shutdown"):
            writer.finish()


def test_nothing_more_is_done_for_a_file_that_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, wakes, calls = random_rows(4, (1, MIB)), threading.Event(), []

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", failing)
    layout = layout_of(rows)
    with (
        Pool(1) as one,
        ShardFileWriter(tmp_path / "c", layout, n_rows=4, name="c", threads=one) as writer,
    ):
        one.submit(wakes.wait, 60)
        for row in rows:
            writer.write_row(row)
        wakes.set()
        with pytest.raises(OSError, match="Input/output error"):
            writer.finish()
    assert calls == [0]


def test_a_file_may_be_finished_again(
    tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    rows = random_rows(4, (1, 5_000))
    layout = layout_of(rows)
    with ShardFileWriter(tmp_path / "c", layout, n_rows=4, name="c", threads=threads) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            with pytest.raises(OSError, match="Input/output error"):
                write_all(writer, rows)
        finished = writer.finish()
        assert finished.record == hash_file(tmp_path / "c", relative_to=tmp_path)
        assert writer.finish() == finished


Writer = ShardFileWriter | ArchiveFileWriter
Opened = Callable[[int], Writer]


@pytest.fixture(params=["aligned", "blosc"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, threads: ThreadPoolExecutor
) -> Iterator[Opened]:
    """Opens a writer for so many rows of 8 bytes, of a bank and of an archive."""
    with ExitStack() as stack:

        def open_writer(n_rows: int) -> Writer:
            path, layout = tmp_path / f"{n_rows}", ShardLayout(4, 8)
            if request.param == "blosc":
                archive = ArchiveFileWriter(path, layout, n_rows=n_rows, name="x")
                return stack.enter_context(archive)
            plain = ShardFileWriter(path, layout, n_rows=n_rows, name="x", threads=threads)
            return stack.enter_context(plain)

        yield open_writer


def test_a_row_of_another_size_is_refused(opened: Opened) -> None:
    writer = opened(2)
    for n_values in (2, 3, 5, 8):
        found = 2 * n_values
        with pytest.raises(ValueError, match=f"a row has 8 bytes, found {found}$"):
            writer.write_row(np.zeros((1, n_values), np.float16))
    for _ in range(2):
        writer.write_row(np.zeros((1, 4), np.float16))
    assert len(writer.finish().digests) == 2


def test_a_file_with_too_few_rows_is_not_finished(opened: Opened) -> None:
    writer = opened(2)
    with pytest.raises(ValueError, match="0 of 2 rows were written"):
        writer.finish()
    writer.write_row(np.zeros((1, 4), np.float16))
    with pytest.raises(ValueError, match="1 of 2 rows were written"):
        writer.finish()


def test_a_row_too_many_is_refused(opened: Opened) -> None:
    writer = opened(1)
    writer.write_row(np.zeros((1, 4), np.float16))
    for _ in range(2):
        with pytest.raises(ValueError, match="all 1 rows were written, found one more"):
            writer.write_row(np.ones((1, 4), np.float16))
    (digest,) = writer.finish().digests
    assert digest.sha256 == hashlib.sha256(bytes(8)).hexdigest()


def test_a_file_that_is_there_is_not_written_over(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    (tmp_path / "c").write_bytes(b"before")
    with pytest.raises(FileExistsError):
        write(tmp_path / "c", random_rows(2, (1, 10)), threads)
    assert (tmp_path / "c").read_bytes() == b"before"


MANY_ROWS = """
import os, sys, tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from patchbank.pipeline.bank.layout import ShardLayout
from patchbank.pipeline.bank.writer import ShardFileWriter

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

row, layout, path = np.ones((1, 2**20), np.uint8), ShardLayout(200, 2**20), Path(sys.argv[1])
with (
    ThreadPoolExecutor(3) as threads,
    ShardFileWriter(path, layout, n_rows=200, name="c", threads=threads) as writer,
):
    before, most_resident = resident_bytes(), 0
    tracemalloc.start()
    for _ in range(200):
        writer.write_row(row)
        most_resident = max(most_resident, resident_bytes() - before)
    writer.finish()
    print(writer.ring_bytes, tracemalloc.get_traced_memory()[1], most_resident)
"""
"""A script of its own, where nothing else takes memory: `python -c MANY_ROWS path`."""


def test_memory_is_the_ring_however_many_rows_there_are(tmp_path: Path) -> None:
    line = [sys.executable, "-c", MANY_ROWS, str(tmp_path / "c")]
    ran = subprocess.run(line, capture_output=True, text=True, check=True, timeout=120)
    ring_bytes, most_allocated, most_resident = map(int, ran.stdout.split())
    assert ring_bytes == 4 * MIB
    assert most_allocated < MIB
    assert most_resident < 16 * MIB


@pytest.mark.parametrize(
    ("row_bytes", "n_rows", "ring_bytes"),
    [
        pytest.param(1, 3, 3 * 4_096, id="fewer rows than a block"),
        pytest.param(4_097, 500, 4 * 128 * 8_192, id="whole rows a block"),
        pytest.param(786_432, 512, 4 * 786_432, id="one row a block"),
        pytest.param(786_432, 3, 3 * 786_432, id="fewer blocks than usual"),
        pytest.param(3 * MIB, 512, 12 * MIB, id="rows larger than a block"),
    ],
)
def test_the_ring_has_a_few_blocks_of_whole_rows(
    row_bytes: int, n_rows: int, ring_bytes: int, tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    layout = ShardLayout(512, row_bytes)
    with ShardFileWriter(
        tmp_path / "c", layout, n_rows=n_rows, name="c", threads=threads
    ) as writer:
        assert writer.ring_bytes == ring_bytes
    assert ring_bytes <= BLOCKS_PER_FILE * max(BLOCK_BYTES, layout.row_stride_bytes)


@pytest.mark.parametrize("n_bytes", [1, 4_096, 4_097, 5 * MIB])
def test_memory_for_a_disk_begins_on_a_page(n_bytes: int) -> None:
    memory = aligned_memory(n_bytes)
    assert memory.shape == (n_bytes,)
    assert memory.ctypes.data % ALIGNMENT_BYTES == 0
    assert not memory.any()
    memory[:] = 255
    assert memory.all()
