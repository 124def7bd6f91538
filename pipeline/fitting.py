"""An extraction held against the bank that is there: what is left to do, or a refusal.

A longer table over a sealed bank makes it grow: only the clips that are new are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from patchbank.pipeline.added_clips import added_clips
from patchbank.pipeline.bank.begin import shards_as_begun
from patchbank.pipeline.bank.card import (
    augment_of_card,
    read_attributes,
    recipe_differences,
    recipe_of_card,
    schema_of_card,
)
from patchbank.pipeline.bank.growth import next_folder, open_settled
from patchbank.pipeline.bank.identity import rows_digest, table_of
from patchbank.pipeline.bank.layout import MAX_FILES
from patchbank.pipeline.bank.reader import Bank
from patchbank.pipeline.bank.schema import BankSchema
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.errors import BankError, BankMismatch, PatchbankError
from patchbank.pipeline.job import ExtractionJob
from patchbank.pipeline.manifest import ClipTable
from patchbank.pipeline.plan import ExtractionPlan, plan_extraction
from patchbank.pipeline.specs import ComputeDType, Json
from patchbank.pipeline.views import TableRows
from patchbank.pipeline.workplace import Workplace


@dataclass(frozen=True)
class Extraction:
    """A prepared extraction: the plan, and what running it needs."""

    plan: ExtractionPlan
    table: ClipTable
    """As it was given."""
    clips: pa.Table
    """The rows of the bank in its order, views included: those that it holds already, then new
    ones."""
    job: ExtractionJob
    batch_size: int | None
    compute_dtype: ComputeDType | None
    """As asked for; None takes what a bank began with."""
    rows: TableRows
    """The clips of the table with all the views that are made of them."""
    schema: BankSchema
    """Of a bank that is made of these at once."""
    workplace: Workplace
    grows: Bank | None = None
    """The sealed bank that gets more clips; None where a bank is made."""

    @property
    def bank(self) -> Path:
        return self.job.bank

    @cached_property
    def clean_rows(self) -> dict[str, int]:
        """Where in `clips` each clip's view 0 stands."""
        rows = zip(self.clips["clip_id"].to_pylist(), self.clips["view"].to_pylist(), strict=True)
        return {clip_id: row for row, (clip_id, view) in enumerate(rows) if view == 0}


def fit_to_bank(extraction: Extraction) -> Extraction:
    """What is left to do at a bank that exists, or a refusal where it is another one."""
    bank = extraction.bank
    schema = shards_as_begun(bank, extraction.schema)
    extraction = replace(
        extraction,
        plan=plan_extraction(bank, extraction.job.recipe, schema),
        job=replace(extraction.job, folder=bank, schema=schema),
        grows=None,
    )
    if not (bank / "zarr.json").is_file():
        if bank.exists():
            raise PatchbankError(f"{bank} exists and is no bank; choose another --out or remove it")
        return replace(extraction, clips=extraction.rows.drawn())
    sealed = open_settled(bank)
    extraction = _with_recipe_of(read_attributes(bank)["card"], extraction, sealed)
    if sealed is not None:
        return _fit_to_sealed(extraction, sealed)
    extraction = replace(extraction, clips=extraction.rows.drawn())
    check_same_rows(bank, read_attributes(bank)["card"], extraction)
    return extraction


def _with_recipe_of(card: Json, extraction: Extraction, sealed: Bank | None) -> Extraction:
    """Takes over the constants that a bank was calibrated with; refuses another recipe."""
    bank, recipe = extraction.bank, extraction.job.recipe
    if "derived_from" in card and not (bank / SEAL).is_file():
        raise BankError(
            f"{bank} is an unfinished `patchbank bank merge` or `convert`: run that command again, "
            "or choose another --out"
        )
    found = recipe_of_card(card)
    if extraction.compute_dtype is None:
        recipe = replace(recipe, compute_dtype=found["compute_dtype"])
    expected = recipe.identity()
    constants = found["quantisation"].get("constants_sha256")
    if constants is not None and expected["quantisation"]:
        quantisation = recipe.quantisation | {"constants_sha256": constants}
        recipe = replace(recipe, quantisation=quantisation)
        expected = recipe.identity()
    if found != expected:
        advice = "choose another --out"
        if found.get("augment") != expected.get("augment"):
            advice = f"{_views_advice(card, sealed)}, or {advice}"
        raise BankMismatch(
            f"{bank} holds other tokens than this command makes; {advice}",
            recipe_differences(found, expected),
        )
    begun_with = int(card["extraction"]["batch_size"])
    if extraction.batch_size not in (None, begun_with):
        raise BankMismatch(
            f"{bank} was begun with another batch size, which tokens depend on in the last bits",
            {"extraction.batch_size": (begun_with, extraction.batch_size)},
        )
    return replace(
        extraction,
        batch_size=begun_with,
        job=replace(extraction.job, recipe=recipe),
        plan=replace(extraction.plan, recipe=recipe),
    )


def _views_advice(card: Json, sealed: Bank | None) -> str:
    """The options that make the views that a bank has."""
    augment = augment_of_card(card)
    if augment is None:
        return "it makes no views: leave --views and --augment out"
    n_views = "N" if sealed is None else max(table_of(sealed.clips)["view"].to_pylist())
    return f"its views are those of --views {n_views} {augment.options}"


def check_same_rows(bank: Path, card: Json, extraction: Extraction) -> None:
    """Refuses a bank that was begun over another table than this one."""
    clips = extraction.clips
    if card["rows_sha256"] != rows_digest(clips):
        n_clips = sum(card["generations"])
        raise BankMismatch(
            f"{bank} was begun over another clip table; finish it with that one, or choose "
            "another --out",
            {"n_clips": (n_clips, len(clips))}
            if n_clips != len(clips)
            else {"rows_sha256": (card["rows_sha256"][:12], rows_digest(clips)[:12])},
        )
    if schema_of_card(card) != extraction.plan.schema:
        raise BankMismatch(
            f"{bank} was begun by another version of patchbank; choose another --out",
            {"rows_per_shard": (card["rows_per_shard"], extraction.plan.schema.rows_per_shard)},
        )


def _fit_to_sealed(extraction: Extraction, bank: Bank) -> Extraction:
    """Nothing is left to do, or a growth by the clips that the bank lacks."""
    known = table_of(bank.clips)
    _check_no_view_less(known, extraction)
    # Rows that are there keep their draws, which a longer table would change.
    rows = extraction.rows.drawn(known, fingerprint=bank.fingerprint)
    added = added_clips(known, rows, bank=bank.path)
    schema = bank.schema
    if not len(added):
        job = replace(extraction.job, schema=schema)
        done = plan_extraction(bank.path, job.recipe, schema, first_shard=schema.n_shards)
        return replace(extraction, plan=done, clips=known, job=job)
    if not schema.holds_tokens:
        raise BankError(
            f"{bank.path} holds pooled vectors only, and does not grow; let the bank that it was "
            "made from grow, and make it again: patchbank bank convert --pooled-only"
        )
    if schema.is_archive:
        raise BankError(
            f"{bank.path} is an archive, which does not grow; make a bank of it first: patchbank "
            f"bank convert {bank.path}"
        )
    schema = replace(schema, generations=(*schema.generations, len(added)))
    if schema.n_files > MAX_FILES:
        raise BankError(
            f"{bank.path} began with shards of {schema.rows_per_shard} clips, and would grow to "
            f"{schema.n_files} files; extract the new clips into a bank of their own, then join "
            "both in larger shards: patchbank bank merge --compact"
        )
    folder = next_folder(bank.path)
    job = replace(extraction.job, schema=schema, folder=folder)
    plan = plan_extraction(folder, job.recipe, schema, first_shard=bank.schema.n_shards)
    growing = replace(
        extraction,
        plan=plan,
        # A column that was empty so far takes the type of its first values.
        clips=pa.concat_tables([known.cast(added.schema), added]),
        job=job,
        grows=bank,
    )
    if (folder / "zarr.json").is_file():
        check_same_growth(growing)
    return growing


def _check_no_view_less(known: pa.Table, extraction: Extraction) -> None:
    n_known = max(known["view"].to_pylist())
    if extraction.job.recipe.augment is not None and n_known > extraction.rows.n_views:
        raise BankMismatch(
            f"{extraction.bank} holds more views of a clip than this command makes; a bank only "
            f"grows: say --views {n_known}, or choose another --out",
            {"views": (n_known, extraction.rows.n_views)},
        )


def check_same_growth(growing: Extraction) -> None:
    """Refuses a growth that was begun with another table than this one."""
    assert growing.grows is not None
    folder = growing.plan.folder
    card = read_attributes(folder)["card"]
    if card["rows_sha256"] != rows_digest(growing.clips):
        n_clips = sum(card["generations"])
        raise BankMismatch(
            f"{growing.bank} is growing to {n_clips} clips by another table; finish that with the "
            f"same command, or drop it: rm -r {folder}",
            {"n_clips": (n_clips, len(growing.clips))},
        )
