"""Banks whose every digest is right and whose content is hostile.

Whatever is done with one works or raises a `BankError`, and takes no more memory than its files
justify; see `hostile_bank.use`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile_bank
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_sets import write_clip_set
from fake_bank import SETTINGS
from hostile_bank import (
    DEEP,
    HOSTILE,
    HOSTILE_PATHS,
    Victim,
    changed,
    counted_memory,
    json_bytes,
    leaves,
    little_memory,
    random_flips,
    readers,
    reseal,
    rooted,
    run_command_line,
    use,
    without,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.bank.layout import MISSING, crc32c
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.pipeline.extraction import extract
from patchbank.probing import BatchLoader

N_CLIPS = 20
SHARD = "layers/1/patches/c.0.0.0"
EVERY = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Victim]:
    """A bank of float16 and one of int8, each alone in a folder."""
    root = tmp_path_factory.mktemp("hostile")
    table = write_clip_set(root / "set", n_clips=N_CLIPS)
    made = {}
    for dtype in ("float16", "int8"):
        stored = replace(SETTINGS, stored_dtype=dtype)
        bank = extract(table, encoder="fake", out=root / dtype / "x.bank", settings=stored)
        use(bank.path, command_line=True)  # imports what it needs, outside of any measurement
        made[dtype] = Victim(bank.path)
    return made


@pytest.fixture(scope="module")
def victim(banks: dict[str, Victim]) -> Victim:
    return banks["float16"]


@pytest.fixture(params=["float16", "int8"])
def either(request: pytest.FixtureRequest, banks: dict[str, Victim]) -> Victim:
    return banks[request.param]


def test_an_honest_bank_is_read_within_the_same_bounds(either: Victim) -> None:
    with counted_memory(either.path):
        use(either.path, command_line=True)
    assert verify_bank(either.path) == ()
    bank = open_bank(either.path)
    assert hostile_bank.read_batches(bank, 2, "map") == N_CLIPS
    with either.holding({}):
        assert (either.path / "seal.json").read_bytes() != b""
        assert open_bank(either.path).fingerprint == bank.fingerprint


def test_more_memory_than_the_files_justify_would_show(victim: Victim) -> None:
    with little_memory(victim.path), pytest.raises(MemoryError):
        np.empty(2**31, np.uint8)
    with pytest.raises(AssertionError, match="of Python and NumPy"), counted_memory(victim.path):
        bytearray(2**27)
    with pytest.raises(AssertionError, match="of Arrow"), little_memory(victim.path):
        pa.nulls(2**25, pa.float64())


# The card, the seal and the records.


def read_all_places(bank: Path) -> None:
    """Where all rows lie; a row that is only a little longer has the same place in its page."""
    opened = open_bank(bank)
    for array in opened.schema.arrays():
        opened.places(array.layer, array.kind)


SHAPES = [
    ("attributes", "card", *place)
    for place in [
        ("generations",), ("generations", 0), ("rows_per_shard",), ("stored_dtype",), ("layers",),
        *[("layers", layer, *key) for layer in ("1", "2")
          for key in [("dim",), ("n_prefix",), ("grid",), ("grid", "time"), ("grid", "freq")]],
    ]
]  # fmt: skip


@pytest.mark.parametrize("place", SHAPES, ids=lambda place: ".".join(map(str, place[2:])))
def test_no_shape_in_the_card_is_believed_before_the_files_hold_it(
    place: tuple[Any, ...], victim: Victim
) -> None:
    document = victim.document("zarr.json")
    before = document
    for key in place:
        before = before[key]
    for number, value in enumerate(HOSTILE):
        if value == before:
            continue
        with victim.holding({"zarr.json": json_bytes(changed(document, place, value))}) as bank:
            with little_memory(bank), pytest.raises(BankCorrupt):
                read_all_places(bank)
            if number % 7 == len(place) % 7:
                assert use(bank)


@EVERY
@given(data=st.data())
def test_any_value_of_the_card_may_be_anything(victim: Victim, data: st.DataObject) -> None:
    document = victim.document("zarr.json")
    at = data.draw(st.sampled_from(list(leaves(document))))
    if data.draw(st.integers(0, 5)) == 0:
        content = json_bytes(without(document, at))
    else:
        content = json_bytes(changed(document, at, data.draw(st.sampled_from(HOSTILE))))
    with victim.holding({"zarr.json": content}) as bank:
        use(bank, command_line=data.draw(st.integers(0, 5)) == 0)


@pytest.mark.parametrize(
    "card",
    [
        pytest.param({"generations": [1] * 10_000}, id="many generations"),
        pytest.param({"generations": [2**47] * 50}, id="many large generations"),
        pytest.param({"rows_per_shard": 2**47}, id="a huge shard"),
        pytest.param({"rows_per_shard": 1}, id="many shards"),
        pytest.param(
            {"layers": {str(n): {"meaning": "", "dim": 1, "n_prefix": 0,
                                 "grid": {"time": 1, "freq": 1}} for n in range(1, 5_000)}},
            id="many layers",
        ),
        pytest.param({"layers": {"1": DEEP}}, id="a deep layer"),
        pytest.param({"encoder": {"name": "x" * 10_000_000}}, id="a long name"),
    ],
)  # fmt: skip
def test_a_card_with_huge_claims_costs_no_more_than_its_text(
    card: dict[str, Any], victim: Victim
) -> None:
    document = victim.document("zarr.json")
    document["attributes"]["card"] |= card
    with (
        victim.holding({"zarr.json": json_bytes(document)}) as bank,
        counted_memory(bank),
        pytest.raises(BankCorrupt),
    ):
        open_bank(bank)
    with victim.holding({"zarr.json": json_bytes(document)}) as bank:
        use(bank)
        assert run_command_line(["show", str(bank)])[0] == 1
        run_command_line(["ls", str(bank.parent)])


def test_fake_entries_of_a_seal_carry_no_claims(victim: Victim) -> None:
    """Enough sealed names for any number of shards, which are not there or are empty."""
    document = victim.document("zarr.json")
    document["attributes"]["card"] |= {"generations": [1] * 2_000, "rows_per_shard": 2**40}
    seal = victim.document("seal.json")
    seal["files"] += [
        {"path": f"layers/1/patches/c.{shard}.0.0", "size": 16 * 2**40 + 4_100, "sha256": "0" * 64}
        for shard in range(2, 10_000)
    ]
    with victim.holding({"zarr.json": json_bytes(document)}) as bank:
        now = json.loads((bank / "seal.json").read_bytes())["files"]
        files = {file["path"]: file for file in seal["files"]} | {
            file["path"]: file for file in now
        }
        seal["files"] = list(files.values())
        (bank / "seal.json").write_bytes(rooted(seal))
        assert "the card states" in use(bank)


@EVERY
@given(data=st.data())
def test_any_value_of_the_seal_may_be_anything(victim: Victim, data: st.DataObject) -> None:
    document = victim.document("seal.json")
    places = [at for at in leaves(document) if len(at) < 2 or at[1] < 3]
    at = data.draw(st.sampled_from(places))
    if data.draw(st.integers(0, 5)) == 0:
        seal = without(document, at)
    else:
        seal = changed(document, at, data.draw(st.sampled_from(HOSTILE + HOSTILE_PATHS)))
    with victim.holding({"seal.json": rooted(seal)}, seal=False) as bank:
        use(bank, command_line=data.draw(st.integers(0, 5)) == 0)


@pytest.mark.parametrize("path", HOSTILE_PATHS, ids=lambda path: ascii(path[:30]))
def test_a_path_that_is_not_in_the_bank_in_its_one_spelling_is_refused(
    path: str, victim: Victim
) -> None:
    seal = victim.document("seal.json")
    seal["files"].append({"path": path, "size": 0, "sha256": "0" * 64})
    with victim.holding({"seal.json": rooted(seal)}, seal=False) as bank:
        assert use(bank, command_line=not path.isprintable())


def test_a_path_that_is_named_twice_is_refused(victim: Victim) -> None:
    seal = victim.document("seal.json")
    seal["files"].append(seal["files"][0])
    with (
        victim.holding({"seal.json": rooted(seal)}, seal=False) as bank,
        pytest.raises(BankCorrupt, match="is named twice"),
    ):
        open_bank(bank)


@EVERY
@given(data=st.data())
def test_any_value_of_a_commit_record_may_be_anything(victim: Victim, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["commits/00000.json", "commits/golden.json"]))
    document = victim.document(name)
    at = data.draw(st.sampled_from(list(leaves(document))))
    value = data.draw(st.sampled_from(HOSTILE + HOSTILE_PATHS))
    with victim.holding({name: json_bytes(changed(document, at, value))}) as bank:
        use(bank, command_line=data.draw(st.integers(0, 5)) == 0)


# Any byte of any file.


@EVERY
@given(seed=st.integers(0, 2**32))
def test_random_bytes_in_any_file_are_read_or_refused(either: Victim, seed: int) -> None:
    generator = np.random.default_rng(seed)
    name = str(generator.choice(sorted(set(either.whole) - {"clips.parquet"})))
    content = random_flips(either.whole[name], generator)
    with either.holding({name: content}, seal=name != "seal.json") as bank:
        use(bank)


@pytest.mark.parametrize("change", ["short", "long", "empty", "gone"])
@pytest.mark.parametrize(
    "name",
    [
        SHARD,
        "layers/2/prefix/c.1.0.0",
        "layers/1/mean/c.0.0",
        "layers/2/n_patches/c.0",
        "layers/1/scale/c.0.0",
        "layers/1/channel_scale/c.0",
        "layers/2/channel_shift/c.0",
        "clips.parquet",
    ],
)
def test_a_file_of_another_size_is_refused_though_it_is_sealed(
    name: str, change: str, banks: dict[str, Victim]
) -> None:
    victim = banks["int8"]
    whole = victim.whole[name]
    content = {"short": whole[:-1], "long": whole + b"x", "empty": b"", "gone": None}[change]
    with victim.holding({name: content}) as bank:
        with pytest.raises(BankCorrupt):
            [act() for act in readers_that_may_fail(bank)]
        use(bank)


def readers_that_may_fail(bank: Path) -> list[Callable[[], object]]:
    """All that can be read of the int8 bank; layer 1 has no prefix."""
    opened = open_bank(bank)
    return [
        lambda: opened.clips,
        *(lambda layer=layer: opened.places(layer) for layer in (1, 2)),  # type: ignore[misc]
        lambda: opened.places(2, "prefix"),
        *(lambda layer=layer: opened.constants(layer) for layer in (1, 2)),  # type: ignore[misc]
    ]


# Shards.

OFFSETS = st.one_of(
    st.sampled_from([0, 1, 2, 319, 320, 4_095, 4_096, 8_192, 15 * 4_096, 16 * 4_096, 2**31, 2**62,
                     2**63, 2**64 - 320, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)  # fmt: skip
LENGTHS = st.sampled_from([320, 320, 320, 320, 0, 1, 319, 321, 2**32, 2**63, 2**64 - 1])


@EVERY
@given(entries=st.lists(st.tuples(OFFSETS, LENGTHS), min_size=1, max_size=16), data=st.data())
def test_an_index_with_a_right_checksum_may_say_anything(
    victim: Victim, entries: list[tuple[int, int]], data: st.DataObject
) -> None:
    content = bytearray(victim.whole[SHARD])
    index = np.frombuffer(content[-260:-4], "<u8").reshape(16, 2).copy()
    slots = data.draw(st.permutations(range(16)))[: len(entries)]
    index[slots] = np.array(entries, np.uint64)
    content[-260:] = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    with victim.holding({SHARD: bytes(content)}) as path:
        use(path)
        try:
            offset = open_bank(path).places(1).offset
        except BankCorrupt:
            return
        assert (offset[:16] % 4_096 == 0).all()
        assert sorted(set(offset[:16].tolist())) == [slot * 4_096 for slot in range(16)]


def test_rows_that_begin_between_pages_are_refused(victim: Victim) -> None:
    content = bytearray(victim.whole[SHARD])
    index = np.frombuffer(content[-260:-4], "<u8").reshape(16, 2).copy()
    index[:, 0] = np.arange(16) * 321
    content[-260:] = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    with victim.holding({SHARD: bytes(content)}) as bank:
        with pytest.raises(BankCorrupt, match="a row does not begin at a multiple of 4096"):
            open_bank(bank).places(1)
        use(bank)


def test_a_missing_row_is_an_error_on_every_path_that_reads_tokens(victim: Victim) -> None:
    content = bytearray(victim.whole[SHARD])
    index = np.frombuffer(content[-260:-4], "<u8").reshape(16, 2).copy()
    index[7] = MISSING
    content[-260:] = index.tobytes() + crc32c(index.tobytes()).to_bytes(4, "little")
    with victim.holding({SHARD: bytes(content)}) as path:
        bank = open_bank(path)
        for read in (
            lambda: bank.places(1),
            lambda: BatchLoader(bank, layer=1, tier="ram"),
            lambda: BatchLoader(bank, layer=1, tier="map"),
            lambda: BatchLoader(bank, layer=1, tier="auto"),
        ):
            with pytest.raises(BankCorrupt, match="row 7 is missing"):
                read()
        for quick in (True, False):
            problems = "\n".join(verify_bank(path, quick=quick))
            assert f"shard {SHARD}, row 7 (audio/0007.wav): is missing" in problems


# The table of clips.


def parquet(table: pa.Table, **more: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **more)
    return bytes(sink.getvalue())


@pytest.fixture(scope="module")
def clips(victim: Victim) -> pa.Table:
    return open_bank(victim.path).clips


def with_column(clips: pa.Table, name: str, values: Any) -> pa.Table:
    if name not in clips.column_names:
        return clips.append_column(name, values)
    return clips.set_column(clips.column_names.index(name), name, values)


@settings(EVERY, max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_random_bytes_in_the_clips_are_read_or_refused(victim: Victim, seed: int) -> None:
    content = random_flips(victim.whole["clips.parquet"], np.random.default_rng(seed))
    with victim.holding({"clips.parquet": content}) as bank:
        use(bank)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 4_000, 1_000))
def test_many_random_bytes_in_the_clips_are_read_or_refused(victim: Victim, first: int) -> None:
    for seed in range(first, first + 1_000):
        content = random_flips(victim.whole["clips.parquet"], np.random.default_rng(seed))
        with victim.holding({"clips.parquet": content}) as bank:
            use(bank)


UUIDS = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16] * N_CLIPS, pa.binary(16)))
DAMAGED_TABLES: dict[str, tuple[Callable[[pa.Table], bytes], str]] = {
    "a row less": (lambda clips: parquet(clips.slice(1)), "19 rows, the card names 20"),
    "no rows": (lambda clips: parquet(clips.slice(0, 0)), "0 rows, the card names 20"),
    "no status": (lambda clips: parquet(clips.drop_columns("status")), "no column status"),
    "no digests": (lambda clips: parquet(clips.drop_columns("sha256_1")), "no column sha256_1"),
    "status as text": (
        lambda clips: parquet(with_column(clips, "status", pa.array(["1"] * N_CLIPS))),
        "status is string, expected int8",
    ),
    "identities in dictionaries": (
        lambda clips: parquet(
            with_column(clips, "clip_id", pa.array(["x"] * N_CLIPS).dictionary_encode())
        ),
        "clip_id is dictionary",
    ),
    "status in lists": (
        lambda clips: parquet(with_column(clips, "status", pa.array([[1]] * N_CLIPS))),
        "status is list",
    ),
    "identities that are UUIDs": (
        lambda clips: parquet(
            with_column(
                clips,
                "clip_id",
                UUIDS,
            )
        ),
        "clip_id is ",
    ),
    "an unknown status": (
        lambda clips: parquet(with_column(clips, "status", pa.array([4] * N_CLIPS, pa.int8()))),
        "status 4, expected 1 done",
    ),
    "no status in a row": (
        lambda clips: parquet(with_column(clips, "status", pa.nulls(N_CLIPS, pa.int8()))),
        "status None, expected 1 done",
    ),
    "a hole where the card has a clip": (
        lambda clips: parquet(
            with_column(clips, "status", pa.array([1] * (N_CLIPS - 1) + [3], pa.int8()))
        ),
        "row 19 is no clip, the card says otherwise",
    ),
    "no identity": (
        lambda clips: parquet(with_column(clips, "clip_id", pa.nulls(N_CLIPS, pa.string()))),
        "clip_id is null in clips",
    ),
    "no number": (
        lambda clips: parquet(with_column(clips, "start_s", pa.array([float("nan")] * N_CLIPS))),
        "start_s is not finite",
    ),
    "an endless reason": (
        lambda clips: parquet(with_column(clips, "reason", pa.array(["x" * 70_000] * N_CLIPS))),
        "a reason is longer than",
    ),
    "text that is no UTF-8": (
        lambda clips: parquet(
            with_column(clips, "path", pa.array([b"\xff"] * N_CLIPS, pa.binary()).view(pa.string()))
        ),
        "Invalid UTF8",
    ),
    "a column twice": (
        lambda clips: parquet(clips.append_column("status", clips["status"])),
        "a column is there twice",
    ),
    "a long text in every row": (
        lambda clips: parquet(with_column(clips, "path", pa.array(["x" * 10_000_000] * N_CLIPS))),
        "more memory than its size justifies",
    ),
    "a long text in every list": (
        lambda clips: parquet(
            with_column(clips, "mix_sources", pa.array([["x" * 1_000_000] * 20] * N_CLIPS))
        ),
        "more memory than its size justifies",
    ),
    "a long text that repeats the one before": (
        lambda clips: parquet(
            with_column(clips, "path", pa.array(["x" * 10_000_000] * N_CLIPS)),
            use_dictionary=False,
            column_encoding={"path": "DELTA_BYTE_ARRAY"},
        ),
        "an encoding that no bank has",
    ),
    "a long list": (
        lambda clips: parquet(
            with_column(clips, "mine", pa.array([[7] * 20_000_000] + [None] * (N_CLIPS - 1)))
        ),
        "more memory than its size justifies",
    ),
    "wide nulls": (
        lambda clips: parquet(with_column(clips, "mine", pa.nulls(N_CLIPS, pa.binary(2**24)))),
        "more memory than its size justifies",
    ),
    "a page that decompresses to gigabytes": (
        lambda clips: parquet(
            with_column(
                clips, "mine", pa.array([b"\0" * 200_000_000] + [None] * (N_CLIPS - 1), pa.binary())
            ),
            compression="zstd",
            use_dictionary=False,
        ),
        "more memory than its size justifies",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_TABLES)
def test_a_table_that_is_no_table_of_this_bank_is_refused(
    name: str, clips: pa.Table, victim: Victim
) -> None:
    make, words = DAMAGED_TABLES[name]
    with victim.holding({"clips.parquet": make(clips)}) as path:
        bank = open_bank(path)
        with little_memory(path), pytest.raises(BankCorrupt, match=words):
            _ = bank.clips
        assert words in use(path)


def test_a_damaged_footer_does_not_end_the_process(clips: pa.Table, victim: Victim) -> None:
    """pyarrow's own view of a column chunk aborts where its histograms have another length."""
    whole = victim.whole["clips.parquet"]
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    step = max(1, (len(whole) - footer) // 12)
    for at in range(footer, len(whole) - 8, step):
        content = whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]
        with victim.holding({"clips.parquet": content}) as bank:
            use(bank)


def test_user_columns_of_every_type_are_read(clips: pa.Table, victim: Victim) -> None:
    columns = {
        "lists": pa.array([["a", None], None] * 10),
        "structs": pa.array([{"x": "q", "y": 1}] * N_CLIPS),
        "maps": pa.array([[("k", "v")]] * N_CLIPS, pa.map_(pa.string(), pa.string())),
        "categories": pa.array(["a", "b"] * 10).dictionary_encode(),
        "codes": pa.array([b"abcd"] * N_CLIPS, pa.binary(4)),
        "vectors": pa.array([[1.0] * 64] * N_CLIPS, pa.list_(pa.float32(), 64)),
        "uuids": UUIDS,
        "decimals": pa.array([1] * N_CLIPS, pa.decimal128(10, 2)),
        "flags": pa.array([True] * N_CLIPS),
        "nothing": pa.nulls(N_CLIPS),
    }
    for name, values in columns.items():
        clips = with_column(clips, name, values)
    for more in ({}, {"compression": "none"}, {"data_page_version": "2.0"}, {"row_group_size": 7}):
        with victim.holding({"clips.parquet": parquet(clips, **more)}) as path:
            assert open_bank(path).clips.equals(clips)


# The golden recording.


@pytest.mark.parametrize("value", [2**40, -1, "x", 10**30])
def test_golden_arrays_that_claim_anything_leave_the_bank_readable(
    value: object, victim: Victim
) -> None:
    name = "golden/frames/zarr.json"
    content = json_bytes(changed(victim.document(name), ("shape", 0), value))
    with victim.holding({name: content, "golden/waveform/c.0": b""}) as bank:
        use(bank, command_line=True)
        assert hostile_bank.read_batches(open_bank(bank), 1, "map") == N_CLIPS


# What no test in this process can show.


def test_a_hostile_bank_ends_the_command_line_with_one_line(victim: Victim) -> None:
    document = victim.document("zarr.json")
    place = ("attributes", "card", "encoder", "name")
    for value in ("\ud800", DEEP, 10**400):
        with victim.holding({"zarr.json": json_bytes(changed(document, place, value))}) as bank:
            done = subprocess.run(
                [sys.executable, "-c", "from patchbank.cli.main import run; run()",
                 "bank", "show", str(bank)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
            )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1


def test_reseal_makes_the_digests_right(tmp_path: Path, victim: Victim) -> None:
    bank = Path(shutil.copytree(victim.path, tmp_path / "x.bank"))
    content = bytearray((bank / SHARD).read_bytes())
    content[0] ^= 1
    (bank / SHARD).write_bytes(content)
    (bank / "golden/extra.json").write_text("x")
    assert len(verify_bank(bank)) == 2
    reseal(bank)
    problems = verify_bank(bank)
    # The record of the shard's commit still has its first digest.
    assert [problem.split(":")[0] for problem in problems] == ["commits/00000.json"]
    with pytest.raises(BankError, match="no layer 9"):
        open_bank(bank).places(9)
    assert list(readers(open_bank(bank)))
