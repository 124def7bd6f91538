"""The way of a batch through decoders, lanes and writers: equal tokens, bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from audio_sets import write_clip_set
from fake_bank import SETTINGS

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.blocks import BlockRing
from patchbank.pipeline.decoding import ClipDecoder, Decoders, ShardClips
from patchbank.pipeline.encoders.fake import FakeEncoder
from patchbank.pipeline.encoding import Encoding
from patchbank.pipeline.errors import EncoderError
from patchbank.pipeline.extraction import ExtractionSettings, extract, prepare
from patchbank.pipeline.lanes import Lanes, PlainBatch
from patchbank.pipeline.manifest import read_manifest
from patchbank.pipeline.memory import pipeline_memory
from patchbank.pipeline.shard_rows import ShardRows
from patchbank.pipeline.slots import SlotRing
from patchbank.pipeline.stages import StageClock

ONE_LANE = replace(SETTINGS, n_threads=1)


def seal(bank: Bank) -> bytes:
    return (bank.path / "seal.json").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_tokens_depend_neither_on_lanes_nor_on_where_audio_is_decoded(
    clip_table: Path, tmp_path: Path, dtype: Any
) -> None:
    ways = {
        "one": {"n_threads": 1, "n_decode_threads": 1},
        "three": {"n_threads": 3, "n_decode_threads": 5},
        "processes": {"n_threads": 2, "n_decode_threads": 2, "decode_in": "processes"},
    }
    seals = {
        name: seal(
            extract(
                clip_table,
                encoder="fake",
                out=tmp_path / f"{name}.bank",
                settings=replace(SETTINGS, stored_dtype=dtype, **way),
            )
        )
        for name, way in ways.items()
    }
    assert seals["one"] == seals["three"] == seals["processes"]


def test_an_extraction_leaves_torch_as_it_was(clip_table: Path, tmp_path: Path) -> None:
    found: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
        fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert (torch.get_num_threads(), found) == (2, [2])
    finally:
        torch.set_num_threads(before)


class Held:
    """An encoder that stands still, and what goes on in front of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.n_encoded = 0
        self.rings: list[SlotRing] = []
        encode, begin = FakeEncoder.encode, SlotRing.__init__
        held = self

        def stand_still(self: FakeEncoder, *arguments: Any) -> object:
            # The golden clip goes first, before there is a ring.
            if held.rings:
                held.go_on.wait(60)
            held.n_encoded += 1
            return encode(self, *arguments)

        def noted(self: SlotRing, *arguments: Any, **more: Any) -> None:
            begin(self, *arguments, **more)
            held.rings.append(self)

        monkeypatch.setattr(FakeEncoder, "encode", stand_still)
        monkeypatch.setattr(SlotRing, "__init__", noted)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_decoders_stop_when_the_encoder_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=120)
    bank = extract(table, encoder="fake", out=tmp_path / "once.bank", settings=ONE_LANE)
    held = Held(monkeypatch)
    decoded = _count_decoded(monkeypatch)
    out = tmp_path / "x.bank"
    run = threading.Thread(
        target=extract, args=(table,), kwargs={"encoder": "fake", "out": out, "settings": ONE_LANE}
    )
    run.start()
    wait_for(lambda: bool(held.rings) and held.rings[-1].n_free == 0)
    ring = held.rings[-1]
    n_slots, batch_size, _ = ring.shape
    # Nothing is decoded beyond the memory that there is, however long the encoder stands still.
    assert _settled(decoded) == n_slots * batch_size < 120
    assert held.n_encoded <= 1
    held.go_on.set()
    run.join(60)
    assert (out / "seal.json").read_bytes() == seal(bank)


def _count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from patchbank.pipeline import decoding

    decode, counts, lock = decoding.decode_clip, [0], threading.Lock()

    def counted(*arguments: Any, **more: Any) -> Any:
        with lock:
            counts[0] += 1
        return decode(*arguments, **more)

    monkeypatch.setattr(decoding, "decode_clip", counted)
    return counts


def _settled(counts: list[int]) -> int:
    """The count when it has not changed for a second."""
    seen, since_s = counts[0], time.monotonic()
    while time.monotonic() - since_s < 1.0:
        if counts[0] != seen:
            seen, since_s = counts[0], time.monotonic()
        time.sleep(0.02)
    return seen


PEAK = """
import json, resource, sys
from dataclasses import replace
from patchbank.pipeline.encoding import Encoding
from patchbank.pipeline.extraction import ExtractionSettings, extract, prepare
from patchbank.pipeline.specs import WindowSpec
settings = ExtractionSettings(window=WindowSpec(5.0, 5.0), layers="all", n_threads=2, batch_size=8)
peaks = []
for table in sys.argv[1:]:
    extract(table, encoder="fake", out=f"{table}.bank", settings=settings)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_number_of_clips(tmp_path: Path) -> None:
    write_clip_set(tmp_path / "set", n_clips=8, duration_s=5.0)
    names = [f"audio/{index:04d}.wav" for index in range(8)]
    tables = []
    for n_clips in (64, 640):
        tables.append(tmp_path / f"set/{n_clips}.csv")
        rows = [f"c{i},{names[i % len(names)]},0,5" for i in range(n_clips)]
        tables[-1].write_text("clip_id,path,start_s,duration_s\n" + "\n".join(rows) + "\n")
    line = [sys.executable, "-c", PEAK, *map(str, tables)]
    found = subprocess.run(line, check=True, capture_output=True, text=True)
    peaks = json.loads(found.stdout)
    # The waveforms alone of the clips that the second has more are 184 MB.
    assert peaks[1] - peaks[0] < 60e6, peaks


def test_memory_is_what_is_said(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[type, list[int]] = {SlotRing: [], BlockRing: []}
    for ring in sizes:
        monkeypatch.setattr(ring, "__init__", _noting_size(ring, sizes[ring]))
    settings = replace(SETTINGS, n_threads=3, batch_size=5)
    out = tmp_path / "x.bank"
    job = prepare(clip_table, encoder="fake", out=out, settings=settings).job
    said = pipeline_memory(
        job.recipe, job.schema, device="cpu", n_threads=3, batch_size=5, n_shards=2
    )
    bank = extract(clip_table, encoder="fake", out=out, settings=settings)
    assert sizes[SlotRing] == [said.waveforms] == [4 * (2 * 3 + 2) * 5 * 16_000]
    n_arrays = len(bank.schema.arrays())
    of_a_shard = sizes[BlockRing][:n_arrays]
    assert 0 < 2 * sum(of_a_shard) <= said.rows
    assert said.views == 0
    assert said.n_bytes == said.waveforms + said.tokens + said.rows


def test_tokens_that_wait_for_the_writer_are_as_few_as_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, most, lock = [0], [0], threading.Lock()
    begin, release, write = PlainBatch.__init__, PlainBatch.release, ShardRows.write

    def begun(self: PlainBatch, *arguments: Any) -> None:
        begin(self, *arguments)
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])

    def released(self: PlainBatch) -> None:
        release(self)
        with lock:
            held[0] -= 1

    def slow(self: ShardRows, *arguments: Any) -> None:
        time.sleep(0.03)
        write(self, *arguments)

    monkeypatch.setattr(PlainBatch, "__init__", begun)
    monkeypatch.setattr(PlainBatch, "release", released)
    monkeypatch.setattr(ShardRows, "write", slow)
    table = write_clip_set(tmp_path / "set", n_clips=160)
    settings = replace(SETTINGS, n_threads=2)
    bank = extract(table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    row_bytes = sum(array.row_bytes for array in bank.schema.arrays())
    job = prepare(table, encoder="fake", out=bank.path, settings=settings).job
    said = pipeline_memory(
        job.recipe, job.schema, device="cpu", n_threads=2, batch_size=4, n_shards=2
    )
    assert held == [0]
    # A slow writer: all places are taken, and no more.
    assert 2 < most[0] <= said.tokens / (4 * row_bytes)


def _noting_size(ring: Any, sizes: list[int]) -> Any:
    begin = ring.__init__

    def noted(self: Any, *arguments: Any, **more: Any) -> None:
        begin(self, *arguments, **more)
        sizes.append(self.n_bytes)

    return noted


def test_an_encoder_that_breaks_ends_the_run_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_clip_set(tmp_path / "set", n_clips=400)
    encode, calls = FakeEncoder.encode, []

    def break_late(self: FakeEncoder, *arguments: Any) -> object:
        calls.append(1)
        if len(calls) > 6:
            raise EncoderError("the encoder broke")
        return encode(self, *arguments)

    monkeypatch.setattr(FakeEncoder, "encode", break_late)
    out = tmp_path / "x.bank"
    with pytest.raises(EncoderError, match="the encoder broke"):
        extract(table, encoder="fake", out=out, settings=ONE_LANE)
    # A shard that hangs is left behind by Dask, with its threads and its folder.
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith(("decode", "encode", "write"))]
    assert list((out / ".work").glob("0*")) == []
    monkeypatch.setattr(FakeEncoder, "encode", encode)
    bank = extract(table, encoder="fake", out=out, settings=ONE_LANE)
    assert (bank.status == 1).sum() == 400


def test_a_shard_that_waits_for_memory_ends_when_the_worker_closes(
    clip_table: Path, tmp_path: Path
) -> None:
    job = prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS).job
    decoder = ClipDecoder(job.audio_root, job.recipe, StageClock())
    ring = SlotRing(2, batch_size=4, n_samples=16_000, device="cpu", shares=False)
    decoders = Decoders(decoder, ring, n_threads=2)
    clips = ShardClips(read_manifest(clip_table, window=SETTINGS.window).clips)
    held = [ring.take(waits=False) for _ in range(2)]
    assert None not in held
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            next(decoders.batches(clips))
        except CancelledError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    decoders.close()
    waiting.join(10)
    assert len(ended) == 1


def test_a_batch_size_on_a_cpu_is_one_that_every_run_chooses(
    clip_table: Path, tmp_path: Path
) -> None:
    settings = ExtractionSettings(window=SETTINGS.window)
    bank = extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    assert bank.card["extraction"]["batch_size"] == 4
    assert bank.card["extraction"]["threads"] == 1


def test_lanes_of_a_cpu_are_its_cores(clip_table: Path, tmp_path: Path) -> None:
    job = prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS).job
    encoder = job.load_encoder("cpu")
    encoding = Encoding(encoder, job.recipe, job.schema, device="cpu", constants=dict)
    for n_threads in (1, 3):
        lanes = Lanes(encoding, StageClock(), n_threads=n_threads)
        assert (lanes.n_lanes, lanes.depth) == (n_threads, n_threads + 1)
        threads = [lanes.run(torch.get_num_threads).result() for _ in range(6)]
        assert threads == [1] * 6
        lanes.close()
