"""Ways to damage a copy of the fake encoder's bank."""

from __future__ import annotations

from pathlib import Path

from patchbank.pipeline.bank.layout import crc32c

SHARD = "layers/1/patches/c.1.0.0"
ROW_BYTES, STRIDE_BYTES, INDEX_BYTES = 320, 4_096, 16 * 16 + 4


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def swap(first: Path, second: Path) -> None:
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


def delete_inner_chunk(path: Path, *, slot: int) -> None:
    """Empties an index entry and makes the index's checksum right again."""
    content = bytearray(path.read_bytes())
    start = len(content) - INDEX_BYTES
    content[start + 16 * slot : start + 16 * (slot + 1)] = b"\xff" * 16
    content[-4:] = crc32c(bytes(content[start:-4])).to_bytes(4, "little")
    path.write_bytes(content)
