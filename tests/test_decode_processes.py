"""Decoding in processes: with several workers, and when one of all these processes is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fake_bank import SETTINGS

from patchbank.pipeline.decoding import ClipDecoder, DecodedBatch, Decoders, ShardClips
from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.extraction import extract, prepare
from patchbank.pipeline.manifest import read_manifest
from patchbank.pipeline.slots import SlotRing
from patchbank.pipeline.stages import StageClock

PROCESSES = replace(SETTINGS, decode_in="processes", n_decode_threads=1, n_threads=1)


def children(pid: int) -> list[int]:
    """Processes that another has begun, and theirs."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(place.parent.name)] = int(words[1])
    found = [child for child, parent in parents.items() if parent == pid]
    return found + [grandchild for child in found for grandchild in children(child)]


def wait_for(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_worker_processes_may_have_decoding_processes(clip_table: Path, tmp_path: Path) -> None:
    one = extract(clip_table, encoder="fake", out=tmp_path / "one.bank", settings=SETTINGS)
    settings = replace(PROCESSES, n_workers=2)
    two = extract(clip_table, encoder="fake", out=tmp_path / "two.bank", settings=settings)
    assert (two.path / "seal.json").read_bytes() == (one.path / "seal.json").read_bytes()


def test_a_decoder_that_dies_is_told_in_a_sentence_and_no_memory_is_lost(
    clip_table: Path, tmp_path: Path
) -> None:
    job = prepare(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS).job
    decoder = ClipDecoder(job.audio_root, job.recipe, StageClock())
    ring = SlotRing(3, batch_size=2, n_samples=16_000, device="cpu", shares=True)
    before = set(children(os.getpid()))
    decoders = Decoders(decoder, ring, n_threads=1, decode_in="processes")
    clips = ShardClips(read_manifest(clip_table, window=SETTINGS.window).clips)
    try:
        batches = decoders.batches(clips)
        next(batches).slot.release()
        decoding = [pid for pid in set(children(os.getpid())) - before if _is_spawned(pid)]
        assert len(decoding) == 1
        os.kill(decoding[0], signal.SIGKILL)
        with pytest.raises(PatchbankError, match="with --decode-in threads"):
            _use_up(batches)
        # Also what comes later, to a pool that is known to be broken.
        with pytest.raises(PatchbankError, match="with --decode-in threads"):
            next(decoders.batches(clips))
        assert ring.n_free == 3
    finally:
        decoders.close()


def _is_spawned(pid: int) -> bool:
    """Whether it is a process of a pool, and not Python's tracker of shared things."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _use_up(batches: Iterator[DecodedBatch]) -> None:
    for batch in batches:
        batch.slot.release()


HELD = """
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fake_bank import SETTINGS
from patchbank.pipeline.encoders.fake import FakeEncoder
from patchbank.pipeline.extraction import extract
if __name__ == "__main__":
    encode = FakeEncoder.encode
    def slow(self, features, layers=None):
        if len(features) > 1:
            print("begun", flush=True)
            time.sleep(600)
        return encode(self, features, layers)
    FakeEncoder.encode = slow
    settings = replace(SETTINGS, decode_in="processes", n_decode_threads=1, n_threads=1)
    extract(sys.argv[2], encoder="fake", out=sys.argv[3], settings=settings)
"""


def test_no_decoder_outlives_a_run_that_is_killed(clip_table: Path, tmp_path: Path) -> None:
    script = tmp_path / "held.py"
    script.write_text(HELD)
    out = tmp_path / "x.bank"
    line = [sys.executable, str(script), str(Path(__file__).parent), str(clip_table), str(out)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "begun\n"
        begun = children(run.pid)
        assert begun
        run.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in begun), seconds=20)
