from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from audio_sets import write_clip_set
from loader_banks import (
    FAILED,
    HERE,
    N_CLIPS,
    N_DONE,
    make_bank,
    n_descriptors,
    reader_threads,
    reference,
)

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import WindowSpec
from patchbank.probing import BatchLoader
from patchbank.probing.bank_source import BankSource
from patchbank.probing.batch import Batch
from patchbank.probing.tiers import Tier

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
    assert not reader_threads()


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
    shape = source.shapes[2]
    assert (source.layer, shape.dim, shape.n_prefix) == (2, 12, 1)


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
        check_tokens(bank, batch, layers)
        if len(seen) == left:
            break
    loader.resume(epoch, left)
    for batch in loader:
        assert (batch.epoch, batch.index) == (epoch, len(seen))
        seen.append(batch.rows.tolist())
        check_tokens(bank, batch, layers)
    assert len(seen) == len(loader)
    assert sorted(row for some in seen for row in some) == sorted(rows.tolist())


_STORED: dict[tuple[Path, int, str], np.ndarray] = {}


def stored(bank: Bank, layer: int, name: str) -> np.ndarray:
    key = (bank.path, layer, name)
    if key not in _STORED:
        _STORED[key] = reference(bank, layer, name)
    return _STORED[key]


def check_tokens(bank: Bank, batch: Batch, layers: list[int]) -> None:
    for layer in layers:
        tokens = batch[layer]
        found = {"patches": tokens.raw, "prefix": tokens.prefix, **tokens.pooled}
        assert found["patches"] is not None
        for name, value in found.items():
            if value is not None:
                expected = stored(bank, layer, name)[batch.rows]
                np.testing.assert_array_equal(value.numpy(), expected, name)


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
    assert not reader_threads()


def test_all_tiers_are_tested_or_need_a_gpu() -> None:
    assert set(HERE) | {"device"} == set(get_args(Tier))


def test_a_bank_that_was_opened_again_gives_the_same_order(bank: Bank) -> None:
    first, second = (BatchLoader(open_bank(bank.path), seed=1) for _ in range(2))
    assert [b.rows.tolist() for b in first] == [b.rows.tolist() for b in second]
