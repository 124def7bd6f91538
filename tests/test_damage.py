from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from bank_damage import INDEX_BYTES, ROW_BYTES, SHARD, STRIDE_BYTES, delete_inner_chunk, flip, swap

from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.bank.damage import shard_files, shard_problems, shown
from patchbank.pipeline.bank.verify import verify_bank


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(
            lambda bank: flip(bank / SHARD, 2 * STRIDE_BYTES + 7),
            [
                f"shard {SHARD}, row 18 (audio/0018.wav): the bytes do not match crc32c_1 and "
                "sha256_1 of clips.parquet"
            ],
            id="a row",
        ),
        pytest.param(
            lambda bank: [flip(bank / SHARD, slot * STRIDE_BYTES) for slot in (0, 3, 4, 5)],
            [
                f"shard {SHARD}, row 16 (audio/0016.wav): the bytes do not match crc32c_1 and "
                "sha256_1 of clips.parquet",
                f"shard {SHARD}, rows 19-21: the bytes do not match crc32c_1 and "
                "sha256_1 of clips.parquet",
            ],
            id="several rows",
        ),
        pytest.param(
            lambda bank: flip(bank / "layers/2/prefix/c.2.0.0", 0),
            [
                "shard layers/2/prefix/c.2.0.0, row 32 (audio/0032.wav): the bytes do not match "
                "crc32c_2_prefix and sha256_2_prefix of clips.parquet"
            ],
            id="a prefix row of the short last shard",
        ),
        pytest.param(
            lambda bank: flip(bank / SHARD, ROW_BYTES + 5),
            [f"shard {SHARD}: padding between rows is not zero; every row is whole"],
            id="padding",
        ),
        pytest.param(
            lambda bank: [flip(bank / SHARD, 0), flip(bank / SHARD, ROW_BYTES + 5)],
            [
                f"shard {SHARD}, row 16 (audio/0016.wav): the bytes do not match crc32c_1 and "
                "sha256_1 of clips.parquet",
                f"shard {SHARD}: padding between rows is not zero; the other rows are whole",
            ],
            id="a row and padding",
        ),
        pytest.param(
            lambda bank: flip(bank / SHARD, -INDEX_BYTES + 3),
            [
                f"shard {SHARD}: the index does not match its crc32c; every row is whole at the "
                "usual places"
            ],
            id="an index",
        ),
        pytest.param(
            lambda bank: flip(bank / SHARD, -1),
            [
                f"shard {SHARD}: the index does not match its crc32c; every row is whole at the "
                "usual places"
            ],
            id="an index's checksum",
        ),
        pytest.param(
            lambda bank: delete_inner_chunk(bank / SHARD, slot=2),
            [
                f"shard {SHARD}, row 18 (audio/0018.wav): is missing, though clips.parquet "
                "promises it"
            ],
            id="a deleted inner chunk",
        ),
        pytest.param(
            lambda bank: swap(bank / SHARD, bank / "layers/1/patches/c.0.0.0"),
            [
                "shard layers/1/patches/c.0.0.0, rows 0-15: holds the bytes of "
                f"{SHARD}: the two were swapped, or one was copied",
                f"shard {SHARD}, rows 16-31: holds the bytes of layers/1/patches/c.0.0.0: "
                "the two were swapped, or one was copied",
            ],
            id="two shards swapped",
        ),
    ],
)
def test_damage_in_a_shard_is_told_down_to_the_row(
    damage: Callable[[Path], object], words: list[str], copy: Path
) -> None:
    damage(copy)
    assert list(verify_bank(copy)) == words


def test_a_hole_is_no_missing_row_and_hides_no_other_damage(copy: Path) -> None:
    bank = open_bank(copy)
    status = bank.clips.column_names.index("status")
    values = pa.array([3 if row == 18 else 1 for row in range(bank.n_rows)], pa.int8())
    clips = bank.clips.set_column(status, "status", values)
    file = next(file for file in shard_files(copy, bank.schema) if file.name == SHARD)
    row = bytearray((copy / SHARD).read_bytes())
    assert list(shard_problems(file, clips, difference=None)) == [
        f"shard {SHARD}, row 18 (audio/0018.wav): is there, though clips.parquet calls it a hole"
    ]
    row[2 * STRIDE_BYTES : 3 * STRIDE_BYTES] = bytes(STRIDE_BYTES)
    (copy / SHARD).write_bytes(row)
    delete_inner_chunk(copy / SHARD, slot=2)
    assert list(shard_problems(file, clips, difference=None)) == []
    assert list(shard_problems(file, clips, difference="SHA-256 is another")) == [
        f"shard {SHARD}: the index is another one than sealed; every row is whole"
    ]
    flip(copy / SHARD, 2 * STRIDE_BYTES + 9)
    assert list(shard_problems(file, clips, difference="SHA-256 is another")) == [
        f"shard {SHARD}: padding between rows is not zero; every row is whole"
    ]


def test_without_an_index_rows_are_looked_for_at_their_usual_places(copy: Path) -> None:
    flip(copy / SHARD, -1)
    flip(copy / SHARD, 0)
    first, second = verify_bank(copy)
    assert first.startswith(f"shard {SHARD}, row 16 (audio/0016.wav): the bytes do not match")
    assert second.endswith("crc32c; the other rows are whole at the usual places")
    for slot in range(1, 16):
        flip(copy / SHARD, slot * STRIDE_BYTES)
    (problem,) = verify_bank(copy)
    assert problem.endswith("crc32c; no row is at its usual place")


def test_a_name_that_a_stranger_chose_stays_on_its_line() -> None:
    assert shown("audio/0001.wav") == "audio/0001.wav"
    assert shown("M\u00f6we") == "M\u00f6we"
    assert shown("a\nb\x1b[2J") == r"a\nb\x1b[2J"
    assert shown("\udcff").isprintable()
    assert len(shown("x" * 10_000)) < 300


def test_long_padding_is_read_in_pieces(copy: Path) -> None:
    bank = open_bank(copy)
    file = next(file for file in shard_files(copy, bank.schema) if file.name == SHARD)
    for slot in range(1, 16):
        delete_inner_chunk(copy / SHARD, slot=slot)
    content = (copy / SHARD).read_bytes()
    index = content[-INDEX_BYTES:]
    (copy / SHARD).write_bytes(content[:ROW_BYTES] + bytes(3 * 2**20) + index)
    clips = bank.clips
    status = pa.array([1 if row < 17 else 3 for row in range(bank.n_rows)], pa.int8())
    clips = clips.set_column(clips.column_names.index("status"), "status", status)
    assert list(shard_problems(file, clips, difference="SHA-256 is another")) == [
        f"shard {SHARD}: the index is another one than sealed; every row is whole"
    ]
    flip(copy / SHARD, 2 * 2**20)
    assert list(shard_problems(file, clips, difference="SHA-256 is another")) == [
        f"shard {SHARD}: padding between rows is not zero; every row is whole"
    ]
