"""Extraction on a GPU: right tokens, equal seals, and a device that is never waited for."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audio_sets import write_clip_set, write_tone
from fake_bank import N_CLIPS, SETTINGS
from published_files import audiomae

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.encoders.fake import FakeEncoder
from patchbank.pipeline.encoding import Encoding
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.extraction import ExtractionSettings, Progress, extract, prepare
from patchbank.pipeline.job import ShardReport
from patchbank.pipeline.profile import profile_of
from patchbank.pipeline.shard import ShardExtractor
from patchbank.pipeline.slots import SlotRing
from patchbank.pipeline.stages import COPY, ENCODER, FRONT_END, QUANTISE
from patchbank.probing import BatchLoader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
GPU = replace(SETTINGS, device=DEVICE, batch_size=8)
CPU = replace(SETTINGS, device="cpu", batch_size=8)
FULL = {"compute_dtype": "float32", "stored_dtype": "float32"}


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """Convolutions of float32 are TF32 by default, with ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def tokens(bank: Bank, layer: int) -> np.ndarray:
    """In float32, in the order of the rows; NaN for those that failed."""
    found: np.ndarray | None = None
    for batch in BatchLoader(bank, layer=layer, batch_size=8, tier="read"):
        values = batch.patches.float().cpu().numpy()
        if found is None:
            found = np.full((bank.schema.n_clips, *values.shape[1:]), np.nan, np.float32)
        found[np.asarray(batch.rows)] = values
    assert found is not None
    return found


def seal(bank: Bank) -> bytes:
    return (bank.path / "seal.json").read_bytes()


def fake(table: Path, out: Path, settings: ExtractionSettings, **more: Any) -> Bank:
    return extract(table, encoder="fake", out=out, settings=replace(settings, **more))


def test_float32_tokens_are_those_of_the_cpu(clip_table: Path, tmp_path: Path) -> None:
    there = fake(clip_table, tmp_path / "gpu.bank", GPU, **FULL)
    here = fake(clip_table, tmp_path / "cpu.bank", CPU, **FULL)
    assert there.card["extraction"]["device"] == "cuda"
    assert there.recipe_id == here.recipe_id
    for layer in (1, 2):
        np.testing.assert_allclose(tokens(there, layer), tokens(here, layer), atol=1e-4, rtol=1e-4)
        for pool in ("mean", "max", "min"):
            np.testing.assert_allclose(
                there.pooled(layer, pool), here.pooled(layer, pool), atol=1e-4, rtol=1e-4
            )
    assert there.clips["audio_sha256"].equals(here.clips["audio_sha256"])


def test_bfloat16_is_the_default_and_in_the_card(clip_table: Path, tmp_path: Path) -> None:
    bank = fake(clip_table, tmp_path / "x.bank", GPU, stored_dtype="float32")
    has_it = torch.cuda.get_device_capability() >= (8, 0)
    assert bank.card["compute_dtype"] == ("bfloat16" if has_it else "float32")
    full = fake(clip_table, tmp_path / "y.bank", GPU, **FULL)
    error = np.abs(tokens(bank, 1) - tokens(full, 1)).max()
    assert error < 0.1
    assert (error > 1e-5) == has_it
    # The CPU finishes it in bfloat16 too.
    again = prepare(
        clip_table, encoder="fake", out=bank.path, settings=replace(CPU, stored_dtype="float32")
    )
    assert again.job.recipe.compute_dtype == bank.card["compute_dtype"]


@pytest.mark.parametrize(
    ("dtype", "mean_error"),
    [("float16", 1e-3), ("bfloat16", 5e-3), ("float32", 1e-5), ("int8", 5e-3), ("int4", 5e-2)],
)
@pytest.mark.parametrize("mask_padding", [False, True])
def test_every_stored_type_is_that_of_the_cpu(
    tmp_path: Path, dtype: Any, mean_error: float, mask_padding: bool
) -> None:
    table = mixed_lengths(tmp_path / "set")
    more = {"stored_dtype": dtype, "compute_dtype": "float32", "mask_padding": mask_padding}
    there = fake(table, tmp_path / "gpu.bank", GPU, **more)
    here = fake(table, tmp_path / "cpu.bank", CPU, **more)
    assert (there.status == 1).all()
    for layer in (1, 2):
        found, expected = tokens(there, layer), tokens(here, layer)
        assert np.isfinite(found).all()
        # Codes next to a half may round the other way.
        assert np.abs(found - expected).mean() < mean_error
        np.testing.assert_array_equal(there.n_patches(layer), here.n_patches(layer))
        np.testing.assert_allclose(
            there.pooled(layer, "mean"), here.pooled(layer, "mean"), atol=40 * mean_error
        )


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_seals_depend_on_nothing_but_the_batch_size(
    clip_table: Path, tmp_path: Path, dtype: Any
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "one": {"n_decode_threads": 1},
        "again": {"n_decode_threads": 5},
        "processes": {"n_decode_threads": 2, "decode_in": "processes"},
    }
    seals = [
        seal(fake(clip_table, tmp_path / f"{name}.bank", GPU, stored_dtype=dtype, **way))
        for name, way in ways.items()
    ]
    assert seals[0] == seals[1] == seals[2]


KILLED = """
import os, sys
from pathlib import Path
import patchbank.pipeline.bank.commit as commit_module
from patchbank.pipeline.extraction import ExtractionSettings, extract
from patchbank.pipeline.specs import WindowSpec
publish, n_calls = commit_module._publish, [0]
def dies(*args, **kwargs):
    n_calls[0] += 1
    if n_calls[0] == 3:
        os._exit(9)
    return publish(*args, **kwargs)
commit_module._publish = dies
table, out, device = sys.argv[1:]
settings = ExtractionSettings(
    window=WindowSpec(1.0, 1.0), layers="all", device=device, batch_size=8
)
extract(Path(table), encoder="fake", out=out, settings=settings)
"""


def test_a_killed_run_ends_with_the_same_seal(clip_table: Path, tmp_path: Path) -> None:
    whole = fake(clip_table, tmp_path / "whole.bank", GPU)
    out = tmp_path / "killed.bank"
    line = [sys.executable, "-c", KILLED, str(clip_table), str(out), DEVICE]
    assert subprocess.run(line, check=False).returncode == 9
    assert not (out / "seal.json").exists()
    assert seal(fake(clip_table, out, GPU)) == seal(whole)


def test_a_failed_clip_leaves_its_batch_alone(tmp_path: Path) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=N_CLIPS)
    whole = fake(table, tmp_path / "whole.bank", GPU)
    failed = [3, 5, 17]
    for row in failed:
        (table.parent / f"audio/{row:04d}.wav").write_bytes(b"RIFF this is no audio")
    bank = fake(table, tmp_path / "x.bank", GPU)
    assert np.flatnonzero(bank.status == 2).tolist() == failed
    good = np.setdiff1d(np.arange(N_CLIPS), failed)
    for layer in (1, 2):
        np.testing.assert_array_equal(bank.pooled(layer)[good], whole.pooled(layer)[good])
        assert np.isnan(bank.pooled(layer)[failed]).all()


def test_tokens_that_overflow_fail_alone(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = FakeEncoder.encode

    def loud(self: FakeEncoder, features: torch.Tensor, layers: Any = None) -> Any:
        maps = encode(self, features, layers)
        if len(features) > 1:
            maps[1].patches[1] = 1e6
        return maps

    monkeypatch.setattr(FakeEncoder, "encode", loud)
    bank = fake(clip_table, tmp_path / "x.bank", GPU, compute_dtype="float32")
    rows = bank.schema.rows_per_shard
    expected = [row for row in range(N_CLIPS) if row % rows % 8 == 1]
    assert np.flatnonzero(bank.status == 2).tolist() == expected
    assert "beyond the range of float16" in bank.clips["reason"][expected[0]].as_py()


def mixed_lengths(folder: Path) -> Path:
    """Clips of as many lengths as there are, in a window of one second."""
    rows = ["path,start_s,duration_s"]
    for index in range(20):
        duration_s = 1.0 if index % 4 == 0 else 0.3 + 0.03 * index
        name = f"{index:02d}.wav"
        write_tone(folder / name, hertz=300.0 + 40 * index, duration_s=duration_s, seed=index)
        rows.append(f"{name},0,{duration_s:.2f}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return folder / "clips.csv"


def test_short_clips_are_padded_as_on_the_cpu(tmp_path: Path) -> None:
    table, weights = mixed_lengths(tmp_path / "set"), audiomae(tmp_path)
    banks = [
        extract(
            table,
            encoder="audiomae",
            weights=weights,
            out=tmp_path / f"{settings.device}.bank",
            settings=replace(settings, **FULL, layers="last", mask_padding=True),
        )
        for settings in (GPU, CPU)
    ]
    [layer] = banks[0].layers
    np.testing.assert_allclose(
        tokens(banks[0], layer), tokens(banks[1], layer), atol=2e-3, rtol=2e-3
    )
    counted = [bank.n_patches(layer).tolist() for bank in banks]
    assert counted[0] == counted[1]
    assert len(set(counted[0])) > 1


@pytest.mark.parametrize(("share_of_64", "size"), [(0.1, 64), (0.8, 32), (1.2, 32), (2.4, 16)])
def test_a_batch_size_is_the_largest_that_fits(
    clip_table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share_of_64: float,
    size: int,
) -> None:
    """Beyond 1 the first tries end without memory; 0.8 fits, but not beside the next batch."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    if torch.cuda.mem_get_info()[0] < 0.9 * total:
        pytest.skip("others use this GPU")
    encode, n_bytes = FakeEncoder.encode, int(share_of_64 * total / 64)

    def large(self: FakeEncoder, features: torch.Tensor, layers: Any = None) -> Any:
        scratch = torch.empty(len(features), n_bytes, dtype=torch.uint8, device=features.device)
        maps = encode(self, features, layers)
        del scratch
        return maps

    monkeypatch.setattr(FakeEncoder, "encode", large)
    settings = replace(GPU, batch_size=None)
    job = prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings).job
    extractor = ShardExtractor(job)
    try:
        assert [extractor.batch_size() for _ in range(2)] == [size, size]
        # What the tries took is there for the batches, on another stream.
        assert torch.cuda.memory_reserved() < 0.05 * total
    finally:
        extractor.close()
        torch.cuda.empty_cache()


def test_a_profile_has_the_stages_of_the_device(clip_table: Path, tmp_path: Path) -> None:
    reports: list[ShardReport] = []

    def note(state: Progress) -> None:
        if state.report is not None:
            reports.append(state.report)

    settings = replace(GPU, stored_dtype="int8")
    extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings, progress=note)
    profile = profile_of(reports)
    found = {stage.stage: stage.busy_s for stage in profile.stages}
    assert all(0 < found[stage] < 60 for stage in (FRONT_END, ENCODER, QUANTISE, COPY))
    assert profile.n_clips == N_CLIPS


def test_waveforms_lie_in_pinned_memory_that_is_let_go(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, end, found = SlotRing.__init__, SlotRing.close, []

    def begun(self: SlotRing, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        found.append([slot.tensor(1) for slot in self._free])

    monkeypatch.setattr(SlotRing, "__init__", begun)
    closed = []

    def ended(self: SlotRing) -> None:
        closed.append([tensor.is_pinned() for tensor in found[0]])
        end(self)

    monkeypatch.setattr(SlotRing, "close", ended)
    fake(clip_table, tmp_path / "x.bank", GPU)
    assert all(closed[0])
    assert not any(tensor.is_pinned() for tensor in found[0])


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["fake", "audiomae", "tiny"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_asking_for_a_batch_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: Any
) -> None:
    """Clips of many lengths, whose padding is masked: the most that a lane has to say."""
    for method in ("maps", "pack"):
        real, n_calls = getattr(Encoding, method), [0]

        def watched(
            self: Encoding, *arguments: Any, real: Any = real, n_calls: Any = n_calls, **more: Any
        ) -> Any:
            n_calls[0] += 1
            # The first batches bring constants to the device.
            if n_calls[0] < 5:
                return real(self, *arguments, **more)
            with refusing_to_wait():
                return real(self, *arguments, **more)

        monkeypatch.setattr(Encoding, method, watched)
    weights = audiomae(tmp_path) if name == "audiomae" else None
    settings = replace(GPU, layers="last", mask_padding=True, stored_dtype=dtype, batch_size=2)
    table = mixed_lengths(tmp_path / "set")
    out = tmp_path / "x.bank"
    bank = extract(table, encoder=name, weights=weights, out=out, settings=settings)
    assert (bank.status == 1).all()


def test_an_encoder_that_breaks_ends_the_run_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=400)
    encode, calls = FakeEncoder.encode, []

    def break_late(self: FakeEncoder, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 6:
            raise EncoderError("the encoder broke")
        return encode(self, *arguments)

    monkeypatch.setattr(FakeEncoder, "encode", break_late)
    began_s = time.monotonic()
    with pytest.raises(EncoderError, match="the encoder broke"):
        fake(table, tmp_path / "x.bank", GPU, batch_size=2)
    # Dask gives tasks that hang half a minute.
    assert time.monotonic() - began_s < 20
    monkeypatch.setattr(FakeEncoder, "encode", encode)
    assert (fake(table, tmp_path / "x.bank", GPU, batch_size=2).status == 1).all()


def test_all_devices_give_the_seal_of_one(tmp_path: Path) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=200)
    one = fake(table, tmp_path / "one.bank", GPU)
    states: list[Progress] = []
    settings = replace(GPU, device="auto", devices="all")
    out = tmp_path / "all.bank"
    bank = extract(table, encoder="fake", out=out, settings=settings, progress=states.append)
    assert max(state.n_workers for state in states) == torch.cuda.device_count()
    assert seal(bank) == seal(one)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_leaves_the_first_alone(clip_table: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    bank = fake(clip_table, tmp_path / "x.bank", GPU, device="cuda:1")
    assert torch.cuda.memory_reserved(0) == before
    assert seal(bank) == seal(fake(clip_table, tmp_path / "y.bank", GPU))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_encoder_gives_its_tokens(tmp_path: Path) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=40)
    banks = [
        extract(
            table,
            encoder="tiny",
            out=tmp_path / f"{index}.bank",
            settings=replace(GPU, **FULL, compiles=compiles),
        )
        for index, compiles in enumerate((False, True, True))
    ]
    for layer in banks[0].layers:
        np.testing.assert_allclose(tokens(banks[1], layer), tokens(banks[0], layer), atol=1e-3)
    assert seal(banks[1]) == seal(banks[2])
    assert open_bank(banks[1].path).card["extraction"]["compiled"] is True
