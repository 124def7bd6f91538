"""Joins whole banks, or takes whole layers out of one: shard files are linked, not written again.

A row stays in its slot and a shard keeps its bytes; only their numbers change. What is written is
the small arrays, clips.parquet, the records and the seal.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from patchbank.pipeline.bank.assembly import clips_schema, fit_columns, with_holes
from patchbank.pipeline.bank.begin import begin_bank, derivation, environment_of
from patchbank.pipeline.bank.card import (
    attributes_of_card,
    layers_of_schema,
    recipe_differences,
    recipe_of_card,
)
from patchbank.pipeline.bank.commit import (
    commit,
    open_attempt,
    read_record,
    shard_name,
    unless_committed,
)
from patchbank.pipeline.bank.identity import rows_digest, table_of
from patchbank.pipeline.bank.layout import MAX_FILES
from patchbank.pipeline.bank.places import ADVICE
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.rows import BankRows
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.bank.seal import seal_bank
from patchbank.pipeline.bank.writer import FileRecord, hash_file
from patchbank.pipeline.errors import BankCorrupt, BankError, BankMismatch
from patchbank.pipeline.specs import Json

OnShard = Callable[[int, int], None]
"""Called with the shards that are done and that there are."""


def join_banks(
    banks: Sequence[Bank],
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    pooled_only: bool = False,
    progress: OnShard | None = None,
) -> Bank:
    """The clips of `banks`, one bank after another, with all layers or some, as the bank `out`.

    `pooled_only` leaves all tokens out, and keeps what was pooled of them. Shard files are hard
    links where `out` is on the same disk, else copies whose digests are checked. The same call
    finishes what an earlier one began. Raises `BankMismatch` where recipes or shard sizes differ,
    `BankError` where a clip is in two banks.
    """
    check_joinable(banks)
    first = banks[0]
    if len({bank.schema.rows_per_shard for bank in banks}) > 1:
        found = [bank.schema.rows_per_shard for bank in banks]
        raise BankMismatch(
            "these banks have shards of different sizes, whose files cannot be joined as they are",
            {"rows_per_shard": (found, [found[0]] * len(found))},
        )
    chosen = [spec for spec in first.schema.layers if layers is None or spec.layer in layers]
    schema = replace(
        first.schema,
        generations=tuple(n for bank in banks for n in bank.schema.generations),
        layers=tuple(chosen),
        grids={spec.layer: first.schema.grids[spec.layer] for spec in chosen},
        storage="pooled" if pooled_only else first.schema.storage,
    )
    if schema.n_files > MAX_FILES:
        raise BankError(
            f"joined as they are, these banks have {schema.n_files} files; join them in larger "
            "shards: patchbank bank merge --compact"
        )
    table = joined_table(banks)
    attributes = _attributes(banks, schema, table)
    constants = {
        spec.layer: first.constants(spec.layer).arrays()
        for spec in chosen
        if schema.stored.is_quantised and schema.holds_tokens
    }
    if begin_bank(out, schema, attributes, constants):
        copy_golden(first, out, schema)
        number = 0
        for bank in banks:
            for shard in range(bank.schema.n_shards):
                place = schema.clips_of(number)
                facts = _facts(banks, bank, shard, table.slice(place.start, len(place)))
                _take_shard(bank, shard, out, number, schema, facts)
                number += 1
                if progress is not None:
                    progress(number, schema.n_shards)
    rows = [BankRows(bank, schema) for bank in banks]
    seal_bank(
        out,
        schema,
        recipe_id=attributes["recipe_id"],
        sources=lambda: with_holes(rows, schema.rows_per_shard),
    )
    return open_bank(out)


def check_joinable(banks: Sequence[Bank]) -> None:
    """Raises where banks cannot become one: another recipe, or a clip that two of them hold."""
    first = banks[0]
    if len({bank.schema.storage for bank in banks}) > 1:
        found = [bank.schema.storage for bank in banks]
        raise BankMismatch(
            "pooled vectors cannot be joined with tokens; leave the tokens of the others out "
            "first: patchbank bank convert --pooled-only"
            if "pooled" in found
            else "an archive cannot be joined with banks to train from; make one of the other "
            "first: patchbank bank convert",
            {"storage": (found, [first.schema.storage] * len(banks))},
        )
    for bank in banks[1:]:
        if bank.recipe_id != first.recipe_id:
            raise BankMismatch(
                f"{bank.where} holds other tokens than {first.where}; only banks of one recipe can "
                "be merged",
                recipe_differences(recipe_of_card(bank.card), recipe_of_card(first.card)),
            )
    owners: dict[tuple[str, int], str] = {}
    for bank in banks:
        table = table_of(bank.clips)
        for key in zip(table["clip_id"].to_pylist(), table["view"].to_pylist(), strict=True):
            owner = owners.setdefault(key, bank.where)
            if owner != bank.where:
                raise BankError(
                    f"clip {key[0]}, view {key[1]}, is in {owner} and in {bank.where}; take it out "
                    "of one: patchbank bank convert --clips"
                )
    if len({Path(bank.where).resolve() for bank in banks}) < len(banks):
        twice = Counter(bank.where for bank in banks).most_common(1)[0][0]
        raise BankError(f"{twice} is named twice; name each bank once")


def joined_table(banks: Sequence[Bank]) -> pa.Table:
    """The clip tables of banks one after another; columns that one lacks are null there."""
    rows = [BankRows(bank) for bank in banks]
    schema = clips_schema(rows)
    try:
        return table_of(pa.concat_tables([fit_columns(bank.clips, schema) for bank in banks]))
    except pa.ArrowException as error:
        raise BankError(
            f"a column of the clip tables has values of different types ({error}); make the banks "
            "from tables whose columns agree"
        ) from error


def _attributes(banks: Sequence[Bank], schema: BankSchema, table: pa.Table) -> Json:
    return attributes_of_card(
        card_of_storage(banks[0].card, schema)
        | {
            "layers": layers_of_schema(schema),
            "n_rows": schema.n_rows,
            "generations": list(schema.generations),
            "rows_sha256": rows_digest(table),
            "derived_from": [derivation(bank) for bank in banks],
        }
        | quantisation_of_layers(banks[0], schema)
    )


def card_of_storage(card: Json, schema: BankSchema) -> Json:
    """A card that says how the rows of `schema` are stored."""
    kept = {key: value for key, value in card.items() if key != "storage"}
    return kept if schema.storage == "aligned" else kept | {"storage": schema.storage}


def quantisation_of_layers(bank: Bank, schema: BankSchema) -> Json:
    """The card's `quantisation` with the constants of the layers of `schema` only."""
    quantisation = dict(bank.card["quantisation"])
    if "constants_sha256" in quantisation:
        quantisation["constants_sha256"] = {
            str(spec.layer): quantisation["constants_sha256"][str(spec.layer)]
            for spec in schema.layers
        }
    return {"quantisation": quantisation}


def copy_golden(bank: Bank, out: Path, schema: BankSchema) -> None:
    """Commits the golden clip of `bank` to `out`, with the layers of `schema`."""
    if read_record(out, "golden") is not None:
        return
    with unless_committed(out, "golden"), open_attempt(out, "golden") as attempt:
        files = [_take_file(bank, name, attempt, name) for name in golden_files(bank, schema)]
        commit(out, attempt, "golden", files, {})


def golden_files(bank: Bank, schema: BankSchema) -> list[str]:
    """The files of a bank's golden clip that one of `schema` needs."""
    arrays = {f"tokens_{array.column_suffix}" for array in schema.arrays()}
    kept = {"zarr.json", "frames", "waveform", *arrays}
    parts = {name: name.split("/") for name in sorted(bank.seal.files)}
    return [name for name, part in parts.items() if part[0] == "golden" and part[1] in kept]


def _take_shard(
    bank: Bank, shard: int, out: Path, number: int, schema: BankSchema, facts: Json
) -> None:
    name = shard_name(number)
    if read_record(out, name) is not None:
        return
    record = source_record(bank, shard)
    with unless_committed(out, name), open_attempt(out, name) as attempt:
        files = [
            _take_file(bank, array.shard_path(shard), attempt, array.shard_path(number))
            for array in schema.arrays()
        ]
        counts = {key: record[key] for key in ("n_done", "n_failed")}
        commit(out, attempt, name, files, counts | facts)


def source_record(bank: Bank, shard: int) -> Json:
    """The commit record of a shard of a sealed bank; `BankCorrupt` where it is missing."""
    record = None
    if (name := f"commits/{shard_name(shard)}.json") in bank.seal.files:
        record = read_record(bank.files([name])[0].parents[1], shard_name(shard))
    if record is None:
        raise BankCorrupt(f"{bank.where}: {name} is missing; {ADVICE}")
    return record


def _facts(banks: Sequence[Bank], bank: Bank, shard: int, clips: pa.Table) -> Json:
    """What a shard's new record says beside its files and counts."""
    facts: Json = {"rows_sha256": rows_digest(clips)}
    here = environment_of(banks[0].card)
    if others := [found for found in environments_of(bank, shard) if found != here]:
        facts["extraction"] = others
    return facts


def environments_of(bank: Bank, shard: int) -> list[Json]:
    """What the tokens of a shard of a sealed bank were computed with."""
    recorded: list[Json] = source_record(bank, shard).get("extraction", [])
    return recorded or [environment_of(bank.card)]


def _take_file(bank: Bank, name: str, folder: Path, target: str) -> FileRecord:
    """Links a sealed file into `folder`, or copies it; a copy is compared with its digest."""
    [source], copy = bank.files([name]), folder / target
    copy.parent.mkdir(parents=True, exist_ok=True)
    sealed = bank.seal.files[name]
    try:
        os.link(source, copy)
    except OSError:
        # Another disk, or one without links.
        shutil.copyfile(source, copy)
        if hash_file(copy, relative_to=folder).sha256 != sealed.sha256:
            raise BankCorrupt(
                f"{bank.where}: {name} does not match its SHA-256; patchbank bank verify "
                f"{bank.where}"
            ) from None
    return FileRecord(target, sealed.size, sealed.sha256)
