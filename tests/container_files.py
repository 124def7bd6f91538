"""Tars, Parquet and Arrow files of audio that tests write for themselves."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

RATE_HZ = 8_000
AUDIO_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def sound_bytes(seed: int, *, seconds: float = 1.0, format_: str = "FLAC") -> bytes:
    """A short file of seeded noise."""
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * RATE_HZ))
    file = io.BytesIO()
    soundfile.write(file, noise, RATE_HZ, format=format_)
    return file.getvalue()


def write_tar(
    path: Path, members: Mapping[str, bytes], *, format_: int = tarfile.PAX_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as tar:
        for name, content in members.items():
            add_member(tar, name, content)
    return path


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def audio_cells(contents: Sequence[bytes | None]) -> list[dict[str, Any]]:
    return [{"bytes": content, "path": f"{row}.flac"} for row, content in enumerate(contents)]


def hub_table(columns: Mapping[str, Any], features: Mapping[str, Any]) -> pa.Table:
    """A table with the note that Hugging Face's `datasets` leaves in its schema."""
    noted = {"huggingface": json.dumps({"info": {"features": features}})}
    arrays = {
        name: pa.array(cells, AUDIO_TYPE) if name == "audio" else pa.array(cells)
        for name, cells in columns.items()
    }
    return pa.table(arrays).replace_schema_metadata(noted)


def write_parquet(path: Path, table: pa.Table, *, rows_in_group: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_in_group)
    return path


def write_arrow(path: Path, table: pa.Table, *, rows_in_batch: int = 100) -> Path:
    """A file as `save_to_disk` writes it: Arrow's stream format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_in_batch)
    return path
