"""What a bank that is made of other banks will be: its clips, its shapes, its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, Shaped

from patchbank.pipeline.bank.begin import derivation, shards_as_begun
from patchbank.pipeline.bank.card import attributes_of_card, layers_of_schema
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.join import card_of_storage, joined_table, quantisation_of_layers
from patchbank.pipeline.bank.quantised import (
    CALIBRATION_CLIPS,
    CALIBRATION_SEED,
    ChannelConstants,
    ChannelStatistics,
    quantisation_recipe,
)
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.rows import RowBytes, TokenFloats
from patchbank.pipeline.bank.schema import DONE, BankSchema, Storage
from patchbank.pipeline.errors import BankError
from patchbank.pipeline.plan import schema_for
from patchbank.pipeline.specs import Json, StoredDType

Rows = Int64[np.ndarray, " row"]
Readers = Mapping[tuple[int, str], RowBytes | TokenFloats]
"""By bank and by array, named by `TokenArray.column_suffix`."""
ROWS_AT_ONCE = 32
"""Rows of floats in memory, which come together where they come from afar."""


@dataclass(frozen=True)
class RebuildPlan:
    """A bank to be made, and where each of its clips comes from."""

    banks: Sequence[Bank]
    out: Path
    schema: BankSchema
    attributes: Json
    constants: dict[int, ChannelConstants]
    """Of a quantised target."""
    clips: pa.Table
    """The clip table, in the order of the new bank."""
    owner: Int64[np.ndarray, " clip"]
    """Which bank each clip comes from."""
    row: Int64[np.ndarray, " clip"]
    """And which of its rows it is."""

    @cached_property
    def sources(self) -> dict[tuple[int, str], RowBytes]:
        """By bank and by array, named by `TokenArray.column_suffix`."""
        return {
            (number, array.column_suffix): RowBytes(bank, bank.array(array.layer, array.kind))
            for number, bank in enumerate(self.banks)
            for array in self.schema.arrays()
        }

    @cached_property
    def floats(self) -> dict[tuple[int, str], TokenFloats]:
        """The same, decoded."""
        return {
            (number, array.column_suffix): TokenFloats(bank, bank.array(array.layer, array.kind))
            for number, bank in enumerate(self.banks)
            for array in self.schema.arrays()
        }

    @property
    def is_copy(self) -> bool:
        """Whether stored tokens stay what they are."""
        return self.schema.stored_dtype == self.banks[0].schema.stored_dtype


def plan_rebuild(
    banks: Sequence[Bank],
    out: Path,
    *,
    dtype: StoredDType | None,
    layers: Sequence[int] | None,
    rows: Sequence[Rows] | None,
    storage: Storage,
    splits: Sequence[str],
) -> RebuildPlan:
    """What `rebuild_bank` has to do; reads clip tables, and tokens where a type is calibrated."""
    first = banks[0]
    chosen = rows or [bank.schema.clip_rows() for bank in banks]
    everything = joined_table(banks)
    places, n_before = [], 0
    for bank, some in zip(banks, chosen, strict=True):
        # The table has no holes; rows are counted with them.
        place_of = np.full(bank.n_rows, -1)
        place_of[bank.schema.clip_rows()] = np.arange(bank.n_clips) + n_before
        places.append(place_of[some])
        n_before += bank.n_clips
    clips = everything.take(np.concatenate(places))
    schema = schema_for(
        tuple(spec for spec in first.schema.layers if layers is None or spec.layer in layers),
        first.schema.grids,
        stored_dtype=dtype or first.schema.stored_dtype,
        n_clips=len(clips),
        storage=storage,
    )
    schema = shards_as_begun(out, schema)
    owner = np.concatenate([np.full(len(some), n) for n, some in enumerate(chosen)])
    constants = _constants(banks, schema, owner, np.concatenate(chosen))
    return RebuildPlan(
        banks,
        out,
        schema,
        _attributes(banks, schema, clips, constants, splits),
        constants,
        clips,
        owner,
        np.concatenate(chosen),
    )


def _attributes(
    banks: Sequence[Bank],
    schema: BankSchema,
    clips: pa.Table,
    constants: dict[int, ChannelConstants],
    splits: Sequence[str],
) -> Json:
    card = card_of_storage(banks[0].card, schema) | {
        "layers": layers_of_schema(schema),
        "n_rows": schema.n_rows,
        "generations": list(schema.generations),
        "rows_per_shard": schema.rows_per_shard,
        "rows_sha256": rows_digest(clips),
        "derived_from": [derivation(bank, splits=splits) for bank in banks],
        "stored_dtype": schema.stored_dtype,
    }
    was = banks[0].schema.stored_dtype
    if schema.stored_dtype == was:
        return attributes_of_card(card | quantisation_of_layers(banks[0], schema))
    quantisation = quantisation_recipe(schema.stored_dtype, constants)
    if was != "float32":
        # Tokens that were rounded before are not those that an extraction would give.
        history = banks[0].card["quantisation"].get("rounded_before", [])
        quantisation["rounded_before"] = [*history, was]
    return attributes_of_card(card | {"quantisation": quantisation})


def _constants(
    banks: Sequence[Bank], schema: BankSchema, owner: Rows, row: Rows
) -> dict[int, ChannelConstants]:
    """The constants of a quantised target: those of the source, or measured on its tokens."""
    if not (schema.stored.is_quantised and schema.holds_tokens):
        return {}
    layers = [spec.layer for spec in schema.layers]
    if banks[0].schema.stored_dtype == schema.stored_dtype:
        return {layer: banks[0].constants(layer) for layer in layers}
    status = [bank.status for bank in banks]
    done = np.array([status[o][r] == DONE for o, r in zip(owner, row, strict=True)])
    candidates = np.flatnonzero(done)
    if not len(candidates):
        raise BankError(f"no clip of {banks[0].where} with tokens is left to measure channels on")
    order = np.random.default_rng(CALIBRATION_SEED).permutation(len(candidates))
    drawn = candidates[np.sort(order[:CALIBRATION_CLIPS])]
    constants = {}
    for layer in layers:
        array = banks[0].array(layer)
        readers = {number: TokenFloats(bank, array) for number, bank in enumerate(banks)}
        statistics = ChannelStatistics(array.dim)
        for start in range(0, len(drawn), ROWS_AT_ONCE):
            some = drawn[start : start + ROWS_AT_ONCE]
            for tokens in read_together(readers, owner[some], row[some]):
                statistics.add(tokens)
        constants[layer] = statistics.constants().for_type(schema.stored)
    return constants


def read_together(
    readers: Mapping[int, RowBytes | TokenFloats], owner: Rows, row: Rows
) -> list[Shaped[np.ndarray, "token dim"]]:
    """The tokens of some clips, in order; those of one bank are read in one call."""
    found: dict[int, Shaped[np.ndarray, "token dim"]] = {}
    for number in np.unique(owner).tolist():
        places = np.flatnonzero(owner == number)
        read = readers[number].read_all(row[places].tolist())
        found |= dict(zip(places.tolist(), read, strict=True))
    return [found[place] for place in range(len(row))]
