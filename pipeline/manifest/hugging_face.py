"""Tables of Hugging Face data sets: audio in rows, class names beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from patchbank.pipeline.containers.arrow import open_arrow
from patchbank.pipeline.containers.audio_column import features_of, require_audio_column, unreadable
from patchbank.pipeline.errors import AudioError
from patchbank.pipeline.manifest.found_audio import ContainerAudio, found_error

_LABEL_COLUMNS = ("labels", "label")


def read_rows(path: Path) -> ContainerAudio:
    """The rows of a Parquet or Arrow file as members, columns and labels; reads no audio.

    Columns are those of strings, numbers and booleans; class numbers become class names.
    """
    try:
        cells = _cells(path)
    except AudioError as error:
        raise found_error(path, str(error)) from error
    except (pa.ArrowException, OSError) as error:
        raise found_error(path, str(unreadable("Parquet", error))) from error
    classes = _classes(path, cells.schema)
    label = _label_column(cells.schema, classes)
    named = {name: _named(cells[name], classes.get(name)) for name in cells.column_names}
    scalars = {name: column for name, column in named.items() if _is_scalar(column.type)}
    labels = None if label is None else [_label(cell) for cell in named[label].to_pylist()]
    return ContainerAudio([str(row) for row in range(cells.num_rows)], scalars, labels)


def _cells(path: Path) -> pa.Table:
    """All columns but the audio."""
    if path.suffix.lower() == ".parquet":
        with pq.ParquetFile(path) as file:
            return file.read(columns=_other_columns(file.schema_arrow))
    with open_arrow(path) as (_, schema, batches):
        names = _other_columns(schema)
        kept = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
        return pa.Table.from_batches([batch.select(names) for batch in batches], kept)


def _other_columns(schema: pa.Schema) -> list[str]:
    audio = require_audio_column(schema)
    return [field.name for field in schema if field.name != audio and _is_plain(field.type)]


def _is_plain(type_: pa.DataType) -> bool:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return _is_scalar(type_.value_type)
    return _is_scalar(type_)


def _is_scalar(type_: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    return any(check(type_) for check in (*checks, pa.types.is_floating, pa.types.is_boolean))


def _classes(path: Path, schema: pa.Schema) -> Mapping[str, Sequence[str]]:
    """The class names of each column of class numbers, alone or in lists."""
    features = features_of(schema) or _features_beside(path)
    names = {column: _class_names(feature) for column, feature in features.items()}
    return {column: classes for column, classes in names.items() if classes is not None}


def _features_beside(path: Path) -> Mapping[str, Any]:
    try:
        info = json.loads((path.parent / "dataset_info.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> Sequence[str] | None:
    # A list of classes is noted as [{...}], {"_type": "Sequence" or "List", "feature": {...}}.
    if isinstance(feature, list) and feature:
        return _class_names(feature[0])
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return [str(name).replace(";", ",") for name in feature.get("names") or []]
    return _class_names(feature.get("feature"))


def _label_column(schema: pa.Schema, classes: Mapping[str, Sequence[str]]) -> str | None:
    """The column of classes; of several, and of those without class names, `labels` or `label`."""
    classed = [str(name) for name in schema.names if name in classes]
    if len(classed) == 1:
        return classed[0]
    among = classed or schema.names
    return next((name for name in _LABEL_COLUMNS if name in among), None)


def _named(column: pa.ChunkedArray, names: Sequence[str] | None) -> pa.ChunkedArray:
    if not names:
        return column
    type_ = pa.list_(pa.string()) if pa.types.is_nested(column.type) else pa.string()
    return pa.chunked_array([pa.array([_name(cell, names) for cell in column.to_pylist()], type_)])


def _name(cell: Any, names: Sequence[str]) -> Any:
    if isinstance(cell, list):
        return [_name(number, names) for number in cell]
    # A class that is not told, as in test sets, is -1.
    return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else None


def _label(cell: Any) -> str | None:
    if isinstance(cell, list):
        return ";".join(str(name) for name in cell if name is not None)
    return None if cell is None else str(cell)
