from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import zarr
from audio_sets import write_clip_set

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import StoredDType, WindowSpec
from patchbank.probing import BatchLoader
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import Batch
from patchbank.probing.tiers import Tier

N_CLIPS = 45
FAILED = 7
N_DONE = N_CLIPS - 1
HERE: list[Tier] = ["auto", "ram", "map", "read", "direct"]
"""Tiers that need no GPU."""


def make_bank(folder: Path, dtype: StoredDType = "float16") -> Bank:
    table = write_clip_set(folder / "set", n_clips=N_CLIPS)
    (folder / f"set/audio/{FAILED:04d}.wav").write_bytes(b"no audio")
    window = WindowSpec(1.0, 1.0)
    settings = ExtractionSettings(window=window, layers="all", stored_dtype=dtype)
    return extract(table, encoder="fake", out=folder / "x.bank", settings=settings)


ASK_FOR_DISK = """
from patchbank.probing import BatchLoader
BatchLoader(open_bank("{path}"), tier="disk")
"""


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("loader"))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("quantised"), "int8")


def reference(bank: Bank, layer: int, kind: str) -> np.ndarray:
    """The whole array as zarr-python reads it."""
    return np.asarray(zarr.open_array(bank.path / f"layers/{layer}/{kind}", mode="r")[:])


def is_slow_to_end() -> list[str]:
    """Reader threads that are still there."""
    return [one.name for one in threading.enumerate() if one.name.startswith("patchbank-read")]


def n_descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("tier", HERE)
@pytest.mark.parametrize("layer", [1, 2])
def test_an_epoch_holds_every_row_with_tokens_once(bank: Bank, layer: int, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=layer, batch_size=16, tier=tier)
    patches = reference(bank, layer, "patches")
    for epoch in range(2):
        seen = []
        for index, batch in enumerate(loader):
            assert (batch.epoch, batch.index) == (epoch, index)
            np.testing.assert_array_equal(batch.patches.numpy(), patches[batch.rows])
            assert (batch.prefix is not None) == (layer == 2)
            if batch.prefix is not None:
                np.testing.assert_array_equal(
                    batch.prefix.numpy(), reference(bank, 2, "prefix")[batch.rows]
                )
            seen += batch.rows.tolist()
        assert sorted(seen) == [row for row in range(N_CLIPS) if row != FAILED]
        assert seen != sorted(seen)
    assert len(loader) == 3
    assert not is_slow_to_end()


def test_the_order_depends_on_seed_and_epoch_alone(bank: Bank) -> None:
    def orders(**more: int) -> list[list[int]]:
        loader = BatchLoader(bank, layer=1, batch_size=8, tier="map", **more)  # type: ignore[arg-type]
        return [[row for batch in loader for row in batch.rows.tolist()] for _ in range(2)]

    first, second = orders(seed=3)
    assert first != second
    assert orders(seed=3) == [first, second]
    assert orders(seed=4)[0] != first
    loader = BatchLoader(bank, layer=1, batch_size=8, seed=3)
    loader.epoch = 1
    assert [row for batch in loader for row in batch.rows.tolist()] == second


def test_an_epoch_goes_on_where_it_was_left(bank: Bank) -> None:
    whole = [batch.rows.tolist() for batch in BatchLoader(bank, batch_size=8, seed=3)]
    later = BatchLoader(bank, batch_size=8, seed=3)
    later.epoch = 1
    next_epoch = [batch.rows.tolist() for batch in later]
    for done in range(len(whole) + 1):
        loader = BatchLoader(bank, batch_size=8, seed=3)
        loader.resume(0, done)
        batches = [(batch.epoch, batch.index, batch.rows.tolist()) for batch in loader]
        assert batches == [(0, index, whole[index]) for index in range(done, len(whole))]
        assert [batch.rows.tolist() for batch in loader] == next_epoch


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 7)])
def test_a_place_that_no_epoch_has_is_refused(bank: Bank, epoch: int, batch: int) -> None:
    with pytest.raises(ValueError, match=f"found epoch {epoch}, batch {batch}; expected .* to 6"):
        BatchLoader(bank, batch_size=8).resume(epoch, batch)


def test_consecutive_rows_of_a_shard_are_a_view_of_the_mapped_file(bank: Bank) -> None:
    [batch] = BankSource(bank, 1, tier="map").read([np.arange(17, 27)])
    np.testing.assert_array_equal(batch.patches.numpy(), reference(bank, 1, "patches")[17:27])
    assert batch.patches.stride(0) * 2 == bank.array(1).layout(16).row_stride_bytes
    assert in_mapped_file(batch, bank.path / "layers/1/patches/c.1.0.0")
    [across] = BankSource(bank, 1, tier="map").read([np.arange(10, 20)])
    np.testing.assert_array_equal(across.patches.numpy(), reference(bank, 1, "patches")[10:20])
    assert not in_mapped_file(across, bank.path / "layers/1/patches/c.0.0.0")


def in_mapped_file(batch: Batch, file: Path) -> bool:
    """Whether the patches lie in pages of `file`."""
    address = batch.patches.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < stop:
            return line.endswith(str(file))
    raise AssertionError("the tokens lie nowhere")


def test_mapped_files_keep_no_descriptor_open(bank: Bank) -> None:
    before = n_descriptors()
    loader = BatchLoader(bank, layer=1, tier="map")
    assert sum(len(batch.rows) for batch in loader) == N_DONE
    assert n_descriptors() == before


@pytest.mark.parametrize("tier", HERE)
def test_writing_into_a_batch_never_reaches_the_bank(bank: Bank, tier: Tier) -> None:
    before = (bank.path / "layers/1/patches/c.0.0.0").read_bytes()
    loader = BatchLoader(bank, layer=1, tier=tier, rows=np.arange(4), shuffle=False)
    for batch in loader:
        batch.patches.zero_()
    assert (bank.path / "layers/1/patches/c.0.0.0").read_bytes() == before


@pytest.mark.parametrize("tier", HERE)
def test_a_failed_clip_never_enters_a_batch(bank: Bank, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=1, rows=np.array([1, FAILED]), tier=tier)
    with pytest.raises(BankError, match=f"row {FAILED} has no tokens: its clip failed"):
        list(loader)


def test_a_layer_that_is_not_there_is_named(bank: Bank) -> None:
    with pytest.raises(BankError, match=r"has no layer 9; it has \[1, 2\]"):
        BankSource(bank, 9)
    with pytest.raises(BankError, match=r"has no layer 9; it has \[1, 2\]"):
        BankSource(bank, [1, 9])


def test_the_last_layer_is_the_default(bank: Bank) -> None:
    source = BankSource(bank)
    assert (source.layer, source.dim, source.n_prefix) == (2, 12, 1)


@pytest.mark.parametrize("tier", HERE)
def test_a_batch_may_hold_several_layers_and_pooled_vectors(bank: Bank, tier: Tier) -> None:
    arrays = ("patches", "prefix", "mean", "max", "min")
    loader = BatchLoader(bank, layer=[1, 2], arrays=arrays, batch_size=10, tier=tier)
    seen = []
    for batch in loader:
        for layer in (1, 2):
            tokens = batch[layer]
            np.testing.assert_array_equal(
                tokens.patches.numpy(), reference(bank, layer, "patches")[batch.rows]
            )
            for name in ("mean", "max", "min"):
                np.testing.assert_array_equal(
                    tokens.pooled[name].numpy(), reference(bank, layer, name)[batch.rows]
                )
        assert batch[1].prefix is None
        prefix = batch[2].prefix
        assert prefix is not None
        np.testing.assert_array_equal(prefix.numpy(), reference(bank, 2, "prefix")[batch.rows])
        with pytest.raises(BankError, match=r"holds layers \[1, 2\]; say which, as in batch\[2\]"):
            _ = batch.patches
        with pytest.raises(BankError, match=r"has no layer 3; it has \[1, 2\]"):
            batch[3]
        seen += batch.rows.tolist()
    assert sorted(seen) == [row for row in range(N_CLIPS) if row != FAILED]


def test_a_batch_may_hold_pooled_vectors_alone(bank: Bank) -> None:
    for batch in BatchLoader(bank, layer=1, arrays=["mean"]):
        mean = reference(bank, 1, "mean")[batch.rows]
        np.testing.assert_array_equal(batch.pooled["mean"].numpy(), mean)
        assert batch.raw is None
        with pytest.raises(BankError, match="the batch holds no patches"):
            _ = batch.patches


@pytest.mark.parametrize("arrays", [[], ["patches", "median"]])
def test_arrays_that_no_bank_has_are_refused(bank: Bank, arrays: list[str]) -> None:
    with pytest.raises(BankError, match=r"expected some of \['patches', 'prefix', 'mean'"):
        BatchLoader(bank, arrays=arrays)


def test_a_tier_that_there_is_not_is_refused(bank: Bank) -> None:
    # Without the type checks of a test run, which refuse it earlier.
    code = f"from patchbank.pipeline.bank import open_bank\n{ASK_FOR_DISK.format(path=bank.path)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BankError: found tier='disk', expected one of ['auto', 'device'" in done.stderr
    with pytest.raises(BankError, match="the device is the CPU"):
        BatchLoader(bank, tier="device")


@pytest.mark.parametrize("tier", HERE)
def test_quantised_tokens_come_raw_and_as_floats(quantised: Bank, tier: Tier) -> None:
    constants = quantised.constants(1)
    codes, scale = reference(quantised, 1, "patches"), reference(quantised, 1, "scale")
    for batch in BatchLoader(quantised, layer=1, batch_size=16, tier=tier):
        assert batch.raw is not None
        assert batch.raw.dtype == torch.int8
        np.testing.assert_array_equal(batch.raw.numpy(), codes[batch.rows])
        floats = constants.dequantise(codes[batch.rows], scale[batch.rows])
        np.testing.assert_allclose(batch.patches.numpy(), floats, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tier", HERE)
def test_a_pass_without_gradients_leaves_the_loader_as_it_was(quantised: Bank, tier: Tier) -> None:
    loader = BatchLoader(quantised, layer=1, tier=tier)
    with torch.inference_mode():
        first = [batch.patches.sum().item() for batch in loader]
    loader.epoch = 0
    assert [batch.patches.sum().item() for batch in loader] == first


def test_no_layer_at_all_is_refused(bank: Bank) -> None:
    with pytest.raises(BankError, match=r"found no layer to read, expected some of \[1, 2\]"):
        BatchLoader(bank, layer=[])


def test_too_few_descriptors_are_not_taken_for_damage(bank: Bank) -> None:
    loader = BatchLoader(bank, layer=1, tier="read")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(BankError, match="Too many open files; allow more with `ulimit -n`"):
            list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(len(batch.rows) for batch in loader) == N_DONE


def test_floats_are_their_own_stored_form(bank: Bank) -> None:
    batch = next(iter(BatchLoader(bank)))
    assert batch.raw is batch.patches


def test_nothing_is_dequantised_before_it_is_asked_for(
    quantised: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = torch.addcmul
    monkeypatch.setattr(torch, "addcmul", lambda *a, **k: calls.append(1) or real(*a, **k))
    for batch in BatchLoader(quantised, batch_size=16):
        assert batch.raw is not None
    assert not calls
    for batch in BatchLoader(quantised, batch_size=16):
        assert batch.patches is batch.patches
    assert len(calls) == 3


def test_masked_patches_are_counted_in_batches(tmp_path: Path) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=4, duration_s=0.5)
    settings = ExtractionSettings(window=WindowSpec(1.0, 1.0), layers=(1,), mask_padding=True)
    masked = extract(table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    for tier in HERE:
        [batch] = BatchLoader(masked, tier=tier)
        assert batch.n_patches is not None
        assert torch.equal(batch.n_patches, torch.full((4,), 10))


def test_a_batch_size_below_one_is_refused(bank: Bank) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        BatchLoader(bank, batch_size=0)


@pytest.mark.parametrize("row", [-1, N_CLIPS])
def test_rows_outside_the_bank_are_refused(bank: Bank, row: int) -> None:
    with pytest.raises(BankError, match=f"rows are whole numbers from 0 to {N_CLIPS - 1}"):
        BatchLoader(bank, rows=np.array([0, row]))


@pytest.mark.parametrize("tier", HERE)
def test_leaving_a_loop_early_leaves_nothing_behind(bank: Bank, tier: Tier) -> None:
    before = n_descriptors()
    loader = BatchLoader(bank, batch_size=4, tier=tier)
    ring_bytes = set()
    for _ in range(50):
        for _batch in loader:
            break
        ring_bytes.add(loader.ring_bytes)
        assert not is_slow_to_end()
    [n_bytes] = ring_bytes
    assert n_bytes == 3 * 4 * 2 * 4_096  # three slots of four rows, of patches and of prefix
    del loader, _batch
    assert n_descriptors() == before


def test_an_error_in_the_loop_ends_the_readers(bank: Bank) -> None:
    loader = BatchLoader(bank, batch_size=4, tier="read")

    def fail() -> None:
        for _batch in loader:
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not is_slow_to_end()
    assert sum(len(batch.rows) for batch in loader) == N_DONE


@pytest.mark.parametrize("tier", ["ram", "read", "direct"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(tier: Tier, tmp_path: Path) -> None:
    bank = make_bank(tmp_path)
    loader = BatchLoader(bank, layer=1, batch_size=4, tier=tier, shuffle=False)
    seen: list[int] = []

    def read() -> None:
        for batch in loader:
            seen.extend(batch.rows.tolist())
            os.truncate(bank.path / "layers/1/patches/c.2.0.0", 4_096)

    with pytest.raises(BankCorrupt, match=r"layers/1/patches/c\.2\.0\.0 ends at byte .* was cut"):
        read()
    assert 0 < len(seen) < N_DONE
    assert not is_slow_to_end()


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    bank = make_bank(tmp_path)
    loader = BatchLoader(bank, layer=1, batch_size=4, tier="read", shuffle=False)
    (bank.path / "layers/1/patches/c.2.0.0").unlink()
    with pytest.raises(BankCorrupt, match=r"c\.2\.0\.0: No such file or directory; pull the bank"):
        list(loader)


@pytest.mark.parametrize("tier", HERE)
def test_threads_may_read_from_one_loader_at_once(bank: Bank, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=1, batch_size=4, tier=tier)
    patches = reference(bank, 1, "patches")
    epochs: list[int] = []
    errors: list[str] = []

    def read() -> None:
        try:
            for _ in range(5):
                seen = []
                for batch in loader:
                    np.testing.assert_array_equal(batch.patches.numpy(), patches[batch.rows])
                    seen += batch.rows.tolist()
                assert len(set(seen)) == len(seen) == N_DONE
                epochs.append(batch.epoch)
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors, errors[0]
    assert sorted(epochs) == list(range(20))
    assert loader.ring_bytes <= 4 * 3 * 4 * 4_096


def in_child(work: Callable[[], None]) -> None:
    """Runs `work` in a fork of this process; fails where it fails or hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return
        threading.Event().wait(0.05)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the forked process hangs")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("tier", HERE)
def test_a_forked_process_reads_after_its_parent_has(bank: Bank, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=1, batch_size=4, tier=tier)
    patches = reference(bank, 1, "patches")

    def check() -> None:
        seen = []
        for batch in loader:
            np.testing.assert_array_equal(batch.patches.numpy(), patches[batch.rows])
            seen += batch.rows.tolist()
        assert len(set(seen)) == len(seen) == N_DONE

    check()
    in_child(check)
    iteration = iter(loader)
    next(iteration)  # readers are at work while it forks
    in_child(check)

    def go_on() -> None:
        with pytest.raises(BankError, match="this epoch was begun before the process forked"):
            list(iteration)

    in_child(go_on)
    assert sum(len(batch.rows) for batch in iteration) == N_DONE - 4
    check()


@pytest.mark.parametrize("tier", HERE)
def test_a_loader_travels_to_a_spawned_process(bank: Bank, tier: Tier) -> None:
    loader = BatchLoader(bank, layer=[1, 2], batch_size=8, seed=5, tier=tier)
    next(iter(loader))
    again = pickle.loads(pickle.dumps(loader))
    assert (again.epoch, again.ring_bytes) == (1, 0)
    rows = [batch.rows.tolist() for batch in again]
    assert rows == [batch.rows.tolist() for batch in loader]


def test_a_loader_works_in_a_spawned_process(quantised: Bank) -> None:
    loader = BatchLoader(quantised, layer=1, batch_size=8, tier="direct")
    expected = [batch.patches.sum().item() for batch in loader]
    loader.epoch = 0
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sums_of, (loader,)) == expected


def sums_of(loader: BatchLoader) -> list[float]:
    return [batch.patches.sum().item() for batch in loader]


def test_an_opened_bank_travels_too(bank: Bank) -> None:
    again = pickle.loads(pickle.dumps(bank))
    assert again.fingerprint == bank.fingerprint
    assert sum(len(batch.rows) for batch in BatchLoader(again)) == N_DONE


def test_direct_reads_are_replaced_where_the_file_system_has_none(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, direct = os.open, os.O_DIRECT

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & direct:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    loader = BatchLoader(bank, layer=1, tier="direct")
    assert str(loader.choice) == "read: the file system has no O_DIRECT"
    assert sum(len(batch.rows) for batch in loader) == N_DONE
    assert sum(len(batch.rows) for batch in BatchLoader(bank, layer=1, tier="ram")) == N_DONE


def random_configuration(generator: np.random.Generator, banks: list[Bank]) -> None:
    """One loader with everything drawn at random: each row once, with its own tokens."""
    bank = banks[generator.integers(len(banks))]
    done = np.flatnonzero(bank.status == 1)
    rows = generator.permutation(done)[: generator.integers(1, len(done) + 1)]
    layers = [[1], [2], [1, 2], [2, 1]][generator.integers(4)]
    loader = BatchLoader(
        bank,
        layer=layers,
        arrays=[("patches",), ("patches", "prefix"), ("patches", "mean")][generator.integers(3)],
        batch_size=int(generator.integers(1, 50)),
        seed=int(generator.integers(1000)),
        tier=HERE[generator.integers(len(HERE))],
        rows=rows,
        shuffle=bool(generator.integers(2)),
    )
    epoch, left = int(generator.integers(5)), int(generator.integers(len(loader) + 1))
    loader.epoch = epoch
    seen = []
    for batch in loader if left else ():
        seen.append(batch.rows.tolist())
        check_marks(bank, batch, layers)
        if len(seen) == left:
            break
    loader.resume(epoch, left)
    for batch in loader:
        assert (batch.epoch, batch.index) == (epoch, len(seen))
        seen.append(batch.rows.tolist())
        check_marks(bank, batch, layers)
    assert len(seen) == len(loader)
    assert sorted(row for some in seen for row in some) == sorted(rows.tolist())


_FIRST_TOKENS: dict[tuple[Path, int], np.ndarray] = {}


def check_marks(bank: Bank, batch: Batch, layers: list[int]) -> None:
    for layer in layers:
        key = (bank.path, layer)
        if key not in _FIRST_TOKENS:
            _FIRST_TOKENS[key] = reference(bank, layer, "patches")
        raw = batch[layer].raw
        assert raw is not None
        np.testing.assert_array_equal(raw.numpy(), _FIRST_TOKENS[key][batch.rows])


def test_random_configurations_cover_every_row_once(bank: Bank, quantised: Bank) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        random_configuration(generator, [bank, quantised])


@pytest.mark.slow
def test_ten_thousand_random_configurations_cover_every_row_once(
    bank: Bank, quantised: Bank
) -> None:
    generator = np.random.default_rng(1)
    before = n_descriptors()
    for _ in range(10_000):
        random_configuration(generator, [bank, quantised])
    assert n_descriptors() == before
    assert not is_slow_to_end()


def test_all_tiers_are_tested_or_need_a_gpu() -> None:
    assert set(HERE) | {"device"} == set(get_args(Tier))


def test_a_bank_that_was_opened_again_gives_the_same_order(bank: Bank) -> None:
    first, second = (BatchLoader(open_bank(bank.path), seed=1) for _ in range(2))
    assert [b.rows.tolist() for b in first] == [b.rows.tolist() for b in second]
