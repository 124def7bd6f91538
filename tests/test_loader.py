from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from audio_sets import write_clip_set

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import WindowSpec
from patchbank.probing import BatchLoader
from patchbank.probing.loader import BankSource, TokenReader, choose_tier

N_CLIPS = 45
FAILED = 7


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = tmp_path_factory.mktemp("loader")
    table = write_clip_set(folder / "set", n_clips=N_CLIPS)
    (folder / f"set/audio/{FAILED:04d}.wav").write_bytes(b"no audio")
    settings = ExtractionSettings(window=WindowSpec(1.0, 1.0), layers="all")
    return extract(table, encoder="fake", out=folder / "x.bank", settings=settings)


def reference(bank: Bank, layer: int, kind: str) -> np.ndarray:
    """The whole array as zarr-python reads it."""
    return np.asarray(zarr.open_array(bank.path / f"layers/{layer}/{kind}", mode="r")[:])


@pytest.mark.parametrize("tier", ["ram", "map", "auto"])
@pytest.mark.parametrize("layer", [1, 2])
def test_an_epoch_holds_every_row_with_tokens_once(bank: Bank, layer: int, tier: str) -> None:
    loader = BatchLoader(bank, layer=layer, batch_size=16, tier=tier)  # type: ignore[arg-type]
    patches = reference(bank, layer, "patches")
    seen = []
    for batch in loader:
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


def test_consecutive_rows_of_a_shard_are_a_view_of_the_mapped_file(bank: Bank) -> None:
    reader = TokenReader(bank.places(1), tier="map")
    tokens = reader.read(np.arange(17, 27))
    np.testing.assert_array_equal(tokens, reference(bank, 1, "patches")[17:27])
    assert not tokens.flags.owndata
    assert tokens.strides[0] == bank.array(1).layout(16).row_stride_bytes
    across = reader.read(np.arange(10, 20))
    np.testing.assert_array_equal(across, reference(bank, 1, "patches")[10:20])


def test_writing_into_a_batch_never_reaches_the_bank(bank: Bank) -> None:
    before = (bank.path / "layers/1/patches/c.0.0.0").read_bytes()
    loader = BatchLoader(bank, layer=1, tier="map", rows=np.arange(4), shuffle=False)
    for batch in loader:
        batch.patches.zero_()
    assert (bank.path / "layers/1/patches/c.0.0.0").read_bytes() == before


def test_a_failed_clip_never_enters_a_batch(bank: Bank) -> None:
    loader = BatchLoader(bank, layer=1, rows=np.array([1, FAILED]))
    with pytest.raises(BankError, match=f"row {FAILED} has no tokens: its clip failed"):
        list(loader)


def test_a_layer_that_is_not_there_is_named(bank: Bank) -> None:
    with pytest.raises(BankError, match=r"has no layer 9; it has \[1, 2\]"):
        BankSource(bank, 9)


def test_the_last_layer_is_the_default(bank: Bank) -> None:
    source = BankSource(bank)
    assert (source.layer, source.dim, source.n_prefix) == (2, 12, 1)


def test_auto_keeps_small_sets_in_memory_and_maps_large_ones() -> None:
    assert choose_tier(2**20) == "ram"
    assert choose_tier(2**50) == "map"
    assert choose_tier(2**50, "ram") == "ram"


def test_masked_patches_are_counted_in_batches(tmp_path: Path) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=4, duration_s=0.5)
    settings = ExtractionSettings(window=WindowSpec(1.0, 1.0), layers=(1,), mask_padding=True)
    masked = extract(table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    [batch] = BatchLoader(masked)
    assert batch.n_patches is not None
    assert torch.equal(batch.n_patches, torch.full((4,), 10))


def test_a_batch_size_below_one_is_refused(bank: Bank) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        BatchLoader(bank, batch_size=0)


@pytest.mark.parametrize("row", [-1, N_CLIPS])
def test_rows_outside_the_bank_are_refused(bank: Bank, row: int) -> None:
    with pytest.raises(BankError, match=f"rows are whole numbers from 0 to {N_CLIPS - 1}"):
        BatchLoader(bank, rows=np.array([0, row]))
