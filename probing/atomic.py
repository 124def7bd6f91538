"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path in the folder of `path`, then renames what it left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file; `OSError` where it cannot be written, the disk is full say."""
    import safetensors.torch

    def write(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(
                dict(tensors), temporary, metadata=None if metadata is None else dict(metadata)
            )
        except safetensors.SafetensorError as error:
            raise OSError(errno.EIO, f"cannot write it ({error})", str(path)) from error

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON without NaN; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
