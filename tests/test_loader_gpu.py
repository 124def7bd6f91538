"""The loader's way to a GPU; what can be tested without one is tested on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from audio_sets import write_clip_set
from fake_bank import SETTINGS

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.specs import StoredDType
from patchbank.probing import BatchLoader
from patchbank.probing.bank_source import BankSource
from patchbank.probing.device_ring import DeviceRows
from patchbank.probing.ring import Slot, read_ahead
from patchbank.probing.tiers import Tier

N_CLIPS = 40
TIERS: list[Tier] = ["auto", "device", "ram", "map", "read", "direct"]


def make_bank(folder: Path, dtype: StoredDType) -> Bank:
    from dataclasses import replace

    table = write_clip_set(folder / "set", n_clips=N_CLIPS)
    settings = replace(SETTINGS, stored_dtype=dtype)
    return extract(table, encoder="fake", out=folder / f"{dtype}.bank", settings=settings)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("gpu"), "float16")


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32", "int8", "int4"])
def any_bank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return make_bank(tmp_path_factory.mktemp("gpu"), request.param)


def on_cpu(bank: Bank, layer: int) -> BankSource:
    return BankSource(bank, layer, arrays=("patches", "prefix", "mean"), tier="read")


def test_rows_that_a_device_keeps_are_those_of_the_bank(any_bank: Bank) -> None:
    """With the CPU in the place of the GPU: the same code fills and gathers."""
    source = on_cpu(any_bank, 2)
    wanted = np.arange(3, 37)
    kept = DeviceRows(source._columns, wanted, n_rows=N_CLIPS, device=torch.device("cpu"))
    plan = [np.array([36, 3, 20]), np.arange(3, 37)]
    for _ in range(2):
        filled = kept.batches(iter(plan), n_threads=2)
        for one, expected in zip(filled, source.read(plan), strict=True):
            for column, part in zip(source._columns, one.parts, strict=True):
                found = column.tensor(part, len(one.rows))
                if column.name == "patches":
                    assert expected.raw is not None
                    assert torch.equal(found, expected.raw)
                if column.name == "mean":
                    assert torch.equal(found, expected.pooled["mean"])
    with pytest.raises(BankError, match="row 2 has no tokens: it is a hole, or none of the rows"):
        list(kept.batches(iter([np.array([3, 2])]), n_threads=2))


def test_one_copy_moves_all_columns_whatever_slots_have_held_before(bank: Bank) -> None:
    """Slots grow to their own largest batch; the copy of one may have held a larger one."""
    source = on_cpu(bank, 2)
    target = Slot(source._columns)
    for n_rows in (9, 3, 20, 5):
        slot = Slot(source._columns)
        plan = [np.arange(n_rows)]
        for filled in read_ahead(iter(plan), source._columns, [slot], n_threads=2):
            target.take_form_of(filled.slot)
            n_bytes = filled.slot.used_bytes(n_rows)
            target.memory[:n_bytes].copy_(filled.slot.memory[:n_bytes])
            for found, expected in zip(target.parts(n_rows), filled.parts, strict=True):
                assert torch.equal(found, expected)


def cuda_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("tier", TIERS)
def test_batches_on_a_gpu_equal_those_on_the_cpu(any_bank: Bank, tier: Tier) -> None:
    arrays = ("patches", "prefix", "mean", "max")
    loader = BatchLoader(
        any_bank, layer=[1, 2], arrays=arrays, batch_size=7, tier=tier, device="cuda"
    )
    reference = BatchLoader(any_bank, layer=[1, 2], arrays=arrays, batch_size=7, tier="read")
    for _ in range(2):
        for batch, expected in zip(loader, reference, strict=True):
            assert batch.rows.tolist() == expected.rows.tolist()
            for layer in (1, 2):
                found, wanted = batch[layer], expected[layer]
                assert found.raw is not None
                assert wanted.raw is not None
                assert found.raw.device.type == "cuda"
                assert torch.equal(found.raw.cpu(), wanted.raw)
                # Fused multiply-add may round the last bit another way.
                torch.testing.assert_close(
                    found.patches.cpu(), wanted.patches, rtol=2e-6, atol=2e-6
                )
                for name in ("mean", "max"):
                    assert torch.equal(found.pooled[name].cpu(), wanted.pooled[name])
                if layer == 2:
                    assert found.prefix is not None
                    assert wanted.prefix is not None
                    assert torch.equal(found.prefix.cpu(), wanted.prefix)


@pytest.mark.gpu
def test_small_banks_live_on_the_gpu(bank: Bank) -> None:
    loader = BatchLoader(bank, device="cuda")
    assert loader.choice.tier == "device"
    assert "on the GPU" in loader.choice.reason


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["ram", "read", "direct"])
def test_the_copy_waits_for_kernels_that_still_use_a_slot(bank: Bank, tier: Tier) -> None:
    """A slow consumer: its kernels are queued long before they run."""
    loader = BatchLoader(bank, layer=1, batch_size=2, tier=tier, device="cuda")
    expected = BatchLoader(bank, layer=1, batch_size=2, tier="read")
    sums = []
    for batch in loader:
        torch.cuda._sleep(20_000_000)
        sums.append(batch.patches.float().sum(dim=(1, 2)))
    wanted = [batch.patches.float().sum(dim=(1, 2)) for batch in expected]
    for found, one in zip(sums, wanted, strict=True):
        torch.testing.assert_close(found.cpu(), one)


@pytest.mark.gpu
def test_the_ring_is_pinned_and_stays(bank: Bank) -> None:
    loader = BatchLoader(bank, layer=1, batch_size=8, tier="direct", device="cuda")
    for _ in loader:
        pass
    [ring] = loader.source._rings
    assert all(slot.memory.is_pinned() for slot in ring.slots)
    before, n_bytes = cuda_bytes(), loader.ring_bytes
    for _ in range(5):
        for _batch in loader:
            break
        for _batch in loader:
            pass
    assert (cuda_bytes(), loader.ring_bytes) == (before, n_bytes)


@pytest.mark.gpu
def test_training_reads_on_the_gpu(bank: Bank) -> None:
    source = BankSource(bank, 1, tier="direct", device="cuda")
    [batch] = source.read([np.arange(8)])
    assert batch.patches.device.type == "cuda"
