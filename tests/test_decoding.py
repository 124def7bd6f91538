"""What the rows of a shard share of the clips that are decoded for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Lock
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from audio_sets import write_tone
from made_views import EVERYTHING

from patchbank.pipeline import decoding
from patchbank.pipeline.audio import DecodedClip, decode_clip
from patchbank.pipeline.decoding import (
    ClipDecoder,
    ClipFacts,
    DecodeIn,
    Decoders,
    ShardClips,
    SharedClips,
)
from patchbank.pipeline.draws import draws_of
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.manifest import read_manifest
from patchbank.pipeline.slots import SlotRing
from patchbank.pipeline.specs import Recipe, WindowSpec
from patchbank.pipeline.stages import StageClock
from patchbank.pipeline.view_audio import made_view
from patchbank.pipeline.views import with_views

WINDOW = WindowSpec(0.25, 0.25)
N_CLIPS, N_VIEWS, BATCH, N_SLOTS = 24, 5, 8, 3


def place(name: str) -> dict[str, Any]:
    return {"path": name, "start_s": 0.0, "duration_s": 1.0}


def clip(name: str) -> DecodedClip:
    return DecodedClip(np.zeros(1, np.float32), name, 1)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    names = [f"{index:02d}.wav" for index in range(N_CLIPS)]
    for index, name in enumerate(names):
        write_tone(folder / name, hertz=300.0 + 20 * index, duration_s=0.25, seed=index)
    (folder / names[5]).write_bytes(b"no sound")
    rows = "".join(f"{name},train,0,0.25\n" for name in names)
    (folder / "clips.csv").write_text("path,split,start_s,duration_s\n" + rows)
    return folder / "clips.csv"


@pytest.fixture
def rows(table: Path) -> pa.Table:
    manifest = read_manifest(table, audio_root=None, window=WINDOW)
    # What cannot be read has no length, and is no source; here it is one.
    column = manifest.clips.column_names.index("duration_s")
    clips = manifest.clips.set_column(column, "duration_s", pa.array([0.25] * N_CLIPS))
    return with_views(
        replace(manifest, clips=clips),
        EVERYTHING,
        n_views=N_VIEWS,
        sample_rate_hz=16_000,
        window_samples=4_000,
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is decoded."""
    counts: Counter[str] = Counter()
    lock = Lock()

    def counted(path: Path, **arguments: Any) -> DecodedClip:
        with lock:
            counts[path.name] += 1
        return decode_clip(path, **arguments)

    monkeypatch.setattr(decoding, "decode_clip", counted)
    return counts


@pytest.fixture(scope="module", params=["threads", "processes"])
def decode_in(request: pytest.FixtureRequest) -> DecodeIn:
    return cast("DecodeIn", request.param)


@pytest.fixture(scope="module")
def ring(decode_in: DecodeIn) -> SlotRing:
    is_shared = decode_in == "processes"
    return SlotRing(N_SLOTS, batch_size=BATCH, n_samples=4_000, device="cpu", shares=is_shared)


@pytest.fixture(scope="module")
def decoders(table: Path, ring: SlotRing, decode_in: DecodeIn) -> Iterator[Decoders]:
    recipe = Recipe(load_encoder("fake").spec, WINDOW, (1,), augment=EVERYTHING)
    decoder = ClipDecoder(table.parent, recipe, StageClock())
    decoders = Decoders(decoder, ring, n_threads=2, decode_in=decode_in)
    yield decoders
    decoders.close()


def test_a_clip_is_decoded_once_for_itself_and_its_views(
    table: Path, rows: pa.Table, decoders: Decoders, decode_in: DecodeIn, decoded: Counter[str]
) -> None:
    draws = draws_of(rows)
    sources = rows.filter(pa.compute.equal(rows["view"], 0))
    found = []
    for batch in decoders.batches(ShardClips(rows, sources)):
        found += zip(batch.clips, batch.slot.waveforms.copy(), strict=False)
        batch.slot.release()
    n_mixed = sum(len(draw.mix_sources) for draw in draws)
    assert n_mixed > 150
    if decode_in == "threads":
        # Alone, 24 clips x 6 rows and every source would be decoded.
        assert sum(decoded.values()) <= N_CLIPS + n_mixed
    alone = {
        row["clip_id"]: _alone(table.parent / row["path"])
        for row in rows.to_pylist()
        if not row["view"]
    }
    for row, draw, (one, waveform) in zip(rows.to_pylist(), draws, found, strict=True):
        parts = [alone[name] for name in (row["clip_id"], *draw.mix_sources)]
        if any(isinstance(part, AudioError) for part in parts):
            assert isinstance(one, AudioError)
            assert not waveform.any()
            continue
        expected = made_view(parts[0], parts[1:], draw) if row["view"] else parts[0]
        assert isinstance(one, ClipFacts)
        np.testing.assert_array_equal(waveform, expected.waveform)
        assert (one.audio_sha256, one.mix_gains) == (expected.audio_sha256, expected.mix_gains)


def _alone(path: Path) -> Any:
    try:
        return decode_clip(path, start_s=0.0, duration_s=0.25, window=WINDOW, sample_rate_hz=16_000)
    except AudioError as error:
        return error


def test_a_loop_that_ends_early_gives_all_memory_back(
    rows: pa.Table, ring: SlotRing, decoders: Decoders
) -> None:
    sources = rows.filter(pa.compute.equal(rows["view"], 0))
    batches = decoders.batches(ShardClips(rows, sources))
    first = next(batches)
    batches.close()
    assert ring.n_free == N_SLOTS - 1
    first.slot.release()
    assert ring.n_free == N_SLOTS


def test_shards_that_share_little_memory_all_come_to_their_end(
    rows: pa.Table, decoders: Decoders
) -> None:
    sources = rows.filter(pa.compute.equal(rows["view"], 0))

    def count(_: int) -> int:
        n_rows = 0
        for batch in decoders.batches(ShardClips(rows, sources)):
            n_rows += len(batch.clips)
            batch.slot.release()
        return n_rows

    with ThreadPoolExecutor(4) as shards:
        assert list(shards.map(count, range(4))) == [len(rows)] * 4


def test_threads_that_want_one_clip_wait_for_one_decoding() -> None:
    n_threads, asked, counts = 8, Barrier(8), Counter[str]()

    def decode(stretch: Any) -> DecodedClip:
        counts[stretch["path"]] += 1
        return clip(stretch["path"])

    shared = SharedClips(decode, n_clips=2)

    def want(_: int) -> DecodedClip | AudioError:
        asked.wait(10)
        return shared.get(place("a"))

    with ThreadPoolExecutor(n_threads) as threads:
        found = list(threads.map(want, range(n_threads)))
    assert counts == {"a": 1}
    assert all(one is found[0] for one in found)


def test_the_clip_that_was_wanted_longest_ago_makes_room() -> None:
    asked: list[str] = []

    def decode(stretch: Any) -> DecodedClip:
        asked.append(stretch["path"])
        return clip(stretch["path"])

    shared = SharedClips(decode, n_clips=2)
    for name in "abacab":
        assert shared.get(place(name)).audio_sha256 == name  # type: ignore[union-attr]
        assert len(shared) <= 2
    assert asked == ["a", "b", "c", "b"]


def test_whoever_waits_for_a_decoding_that_breaks_learns_it() -> None:
    def decode(stretch: Any) -> DecodedClip:
        raise OSError("disk on fire")

    shared = SharedClips(decode, n_clips=2)
    for _ in range(2):
        with pytest.raises(OSError, match="on fire"):
            shared.get(place("a"))
