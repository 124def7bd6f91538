"""Which column of a data set's table holds the audio, and its bytes in a batch of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from patchbank.pipeline.errors import AudioError

_BYTES_NAMES = ("audio", "audio_bytes", "wav", "flac", "mp3", "sound")
"""What a plain binary column is called that holds audio files."""


def features_of(schema: pa.Schema) -> Mapping[str, Any]:
    """What Hugging Face's `datasets` notes of each column; empty where nothing was noted."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def find_audio_column(schema: pa.Schema) -> str | None:
    """The column of audio files: one that is noted as such, `struct<bytes, path>`, or binary.

    Of several, the one that is called `audio`, else the first.
    """
    features = features_of(schema)
    names = [field.name for field in schema if _may_hold_audio(field, features.get(field.name))]
    return "audio" if "audio" in names else next(iter(names), None)


def require_audio_column(schema: pa.Schema) -> str:
    """The column of audio files; `AudioError` where there is none."""
    column = find_audio_column(schema)
    if column is None:
        raise AudioError(f"no column holds the bytes of audio; found {', '.join(schema.names)}")
    return column


def _may_hold_audio(field: pa.Field, feature: Any) -> bool:
    noted = feature.get("_type") if isinstance(feature, dict) else None
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        return index >= 0 and _is_binary(field.type.field(index).type) and noted in ("Audio", None)
    return _is_binary(field.type) and (noted == "Audio" or field.name.lower() in _BYTES_NAMES)


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def audio_bytes(column: pa.Array) -> pa.Array:
    """The binary cells of an audio column; null where a row has none."""
    if not pa.types.is_struct(column.type):
        return column
    # `field` would ignore that the struct itself may be null.
    return pc.struct_field(column, "bytes")


def unreadable(kind: str, error: Exception) -> AudioError:
    """What pyarrow found wrong with a file, in one line without the file's path."""
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return AudioError(f"cannot be read as {kind}: {reason}")
