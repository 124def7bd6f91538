"""The columns of clips.parquet that say how a bank made its views."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from patchbank.pipeline.bank.card import augment_of_card
from patchbank.pipeline.specs import AugmentSpec, Json

MIX_SOURCES, MIX_SNR_DB, MIX_GAINS = "mix_sources", "mix_snr_db", "mix_gains"
SHIFT_SAMPLES, GAIN_DB = "shift_samples", "gain_db"
DRAWN = {
    MIX_SOURCES: ("mixup", pa.list_(pa.string())),
    MIX_SNR_DB: ("mixup", pa.list_(pa.float64())),
    SHIFT_SAMPLES: ("shift", pa.int32()),
    GAIN_DB: ("gain", pa.float64()),
}
"""Columns of the clip table: by which augmentation they are there, and their types."""
FOUND = {MIX_GAINS: ("mixup", pa.list_(pa.float64()))}
"""What the bank found out when it mixed; no part of the clip table."""


def has_gains(card: Json) -> bool:
    """Whether a bank of that card has `mix_gains`."""
    augment = augment_of_card(card)
    return augment is not None and augment.mixup is not None


def count_views(clips: pa.Table) -> int:
    """Rows of a clip table, or of clips.parquet, that are no clean clip; holes are none either."""
    return int(pc.sum(pc.greater(clips["view"], 0)).as_py() or 0)


def drawn_columns(augment: AugmentSpec) -> dict[str, pa.DataType]:
    """The columns that the clip table of a bank with these augmentations has, and their types."""
    return {
        name: type_ for name, (kind, type_) in DRAWN.items() if getattr(augment, kind) is not None
    }


def view_column_problems(clips: pa.Table, card: Json, *, n_clips: int) -> Iterator[str]:
    """What is wrong with these columns in clips.parquet of a bank with `n_clips` clips."""
    augment = augment_of_card(card)
    if augment is None:
        return
    expected = drawn_columns(augment)
    expected |= {MIX_GAINS: FOUND[MIX_GAINS][1]} if augment.mixup is not None else {}
    for name, type_ in expected.items():
        if name not in clips.column_names:
            yield f"no column {name}"
        elif not _is(clips[name].type, type_):
            yield f"{name} is {clips[name].type}, expected {type_}"
        elif clips[name].null_count != len(clips) - n_clips or _has_null_values(clips[name]):
            yield f"{name} is null in clips or given in holes"


def _is(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether types agree; Parquet has another name for the items of a list."""
    if pa.types.is_list(expected):
        return pa.types.is_list(found) and bool(found.value_type == expected.value_type)
    return bool(found == expected)


def _has_null_values(column: pa.ChunkedArray) -> bool:
    return pa.types.is_list(column.type) and bool(pc.list_flatten(column).null_count)
