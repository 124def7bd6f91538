"""`extract`: a table of clips and an encoder become a sealed bank; the same call finishes it.

A longer table over a sealed bank makes it grow: only the clips that are new are encoded.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from patchbank.pipeline.added_clips import added_clips
from patchbank.pipeline.bank.card import (
    attributes_of_card,
    read_attributes,
    recipe_of_card,
    schema_of_card,
)
from patchbank.pipeline.bank.commit import read_record, recover, shard_name
from patchbank.pipeline.bank.growth import (
    begin_growth,
    is_current,
    next_folder,
    open_settled,
    seal_growth,
)
from patchbank.pipeline.bank.identity import rows_digest, table_of
from patchbank.pipeline.bank.quantised import (
    CALIBRATION_CLIPS,
    CALIBRATION_SEED,
    ChannelConstants,
    quantisation_recipe,
)
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.schema import BankSchema, create_skeleton
from patchbank.pipeline.bank.seal import seal_bank
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.environment import choose_device, default_batch_size
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankMismatch,
    BankNotFound,
    EncoderError,
    PatchbankError,
)
from patchbank.pipeline.manifest import ClipTable, read_manifest
from patchbank.pipeline.plan import (
    ExtractionPlan,
    bank_attributes,
    plan_extraction,
    schema_for,
)
from patchbank.pipeline.shard import ExtractionJob
from patchbank.pipeline.specs import Json, Recipe, StoredDType, WindowSpec, differing_fields
from patchbank.pipeline.workers import Workers, open_workers

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.base import Encoder


@dataclass(frozen=True)
class ExtractionSettings:
    """How to extract; the defaults of the command line."""

    window: WindowSpec = field(default_factory=WindowSpec)
    layers: str | tuple[int, ...] = "last"
    """"last", "all", or 1-based layers."""
    stored_dtype: StoredDType = "float16"
    mask_padding: bool = False
    device: str = "auto"
    batch_size: int | None = None
    """Clips encoded together; None means 16 on a CPU, 64 on a GPU, or what the bank began with."""
    n_decode_threads: int | None = None
    scheduler: str | None = None
    """Address of a Dask scheduler; None starts one worker in this process."""


@dataclass(frozen=True)
class Progress:
    """How far an extraction is."""

    n_clips: int
    """Clips that this run has to encode."""
    n_done: int = 0
    n_failed: int = 0


@dataclass(frozen=True)
class Extraction:
    """A prepared extraction: the plan, and what running it needs."""

    plan: ExtractionPlan
    table: ClipTable
    """As it was given."""
    clips: pa.Table
    """The clips of the bank in its order: those that it holds already, then new ones."""
    job: ExtractionJob
    batch_size: int | None
    schema: BankSchema
    """Of a bank that is made of the table at once."""
    grows: Bank | None = None
    """The sealed bank that gets more clips; None where a bank is made."""

    @property
    def bank(self) -> Path:
        return self.job.bank


def prepare(
    source: Path | str,
    *,
    encoder: str,
    out: Path | str,
    weights: Path | str | None = None,
    audio_root: Path | None = None,
    settings: ExtractionSettings = ExtractionSettings(),
) -> Extraction:
    """Reads the clip table and the encoder and compares them with what lies at `out`.

    Writes nothing, but for the end of a growth that was cut short. Raises `ManifestError`,
    `EncoderError`, or `BankMismatch` where another bank lies at `out`.
    """
    table = read_manifest(source, audio_root=audio_root, window=settings.window)
    model = load_encoder(encoder, weights=weights, device="cpu")
    recipe = Recipe(
        encoder=model.spec,
        window=settings.window,
        layers=choose_layers(model, settings.layers),
        stored_dtype=settings.stored_dtype,
        mask_padding=settings.mask_padding,
        quantisation=quantisation_recipe(settings.stored_dtype),
    )
    grids = model.grids(settings.window.n_samples(model.spec.sample_rate_hz))
    schema = schema_for(
        tuple(recipe.encoder.layer(layer) for layer in recipe.layers),
        grids,
        stored_dtype=recipe.stored_dtype,
        n_clips=len(table),
    )
    bank = Path(out).absolute()
    job = ExtractionJob(
        bank=bank,
        folder=bank,
        audio_root=table.audio_root.absolute(),
        recipe=recipe,
        schema=schema,
        weights=None if weights is None else Path(weights).absolute(),
        # The workers of a scheduler choose for themselves: they may have what this machine lacks.
        device=settings.device if settings.scheduler else choose_device(settings.device),
        n_decode_threads=settings.n_decode_threads or min(8, os.cpu_count() or 1),
    )
    plan = plan_extraction(bank, recipe, schema)
    with _telling_of_a_full_disk(bank):
        return fit_to_bank(Extraction(plan, table, table.clips, job, settings.batch_size, schema))


def fit_to_bank(extraction: Extraction) -> Extraction:
    """What is left to do at a bank that exists, or a refusal where it is another one."""
    bank, schema = extraction.bank, extraction.schema
    extraction = replace(
        extraction,
        plan=plan_extraction(bank, extraction.job.recipe, schema),
        clips=extraction.table.clips,
        job=replace(extraction.job, folder=bank, schema=schema),
        grows=None,
    )
    if not (bank / "zarr.json").is_file():
        if bank.exists():
            raise PatchbankError(f"{bank} exists and is no bank; choose another --out or remove it")
        return extraction
    sealed = open_settled(bank)
    extraction = _with_recipe_of(read_attributes(bank)["card"], extraction)
    if sealed is not None:
        return _fit_to_sealed(extraction, sealed)
    _check_same_rows(bank, read_attributes(bank)["card"], extraction)
    return extraction


def _with_recipe_of(card: Json, extraction: Extraction) -> Extraction:
    """Takes over the constants that a bank was calibrated with; refuses another recipe."""
    bank, recipe = extraction.bank, extraction.job.recipe
    expected, found = recipe.identity(), recipe_of_card(card)
    constants = found["quantisation"].get("constants_sha256")
    if constants is not None and expected["quantisation"]:
        quantisation = recipe.quantisation | {"constants_sha256": constants}
        recipe = replace(recipe, quantisation=quantisation)
        expected = recipe.identity()
    if found != expected:
        raise BankMismatch(
            f"{bank} holds other tokens than this command makes; choose another --out",
            differing_fields(found, expected),
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


def _check_same_rows(bank: Path, card: Json, extraction: Extraction) -> None:
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
    added = added_clips(known, extraction.clips, bank=bank.path)
    schema = bank.schema
    if not len(added):
        job = replace(extraction.job, schema=schema)
        done = plan_extraction(bank.path, job.recipe, schema, first_shard=schema.n_shards)
        return replace(extraction, plan=done, clips=known, job=job)
    if schema.is_archive:
        raise BankError(
            f"{bank.path} is an archive, which does not grow; make a bank of it first: patchbank "
            f"bank convert {bank.path}"
        )
    schema = replace(schema, generations=(*schema.generations, len(added)))
    folder = next_folder(bank.path)
    job = replace(extraction.job, schema=schema, folder=folder)
    plan = plan_extraction(folder, job.recipe, schema, first_shard=bank.schema.n_shards)
    growing = replace(
        extraction,
        plan=plan,
        clips=pa.concat_tables([known, added.cast(known.schema)]),
        job=job,
        grows=bank,
    )
    if (folder / "zarr.json").is_file():
        _check_same_rows(bank.path, read_attributes(folder)["card"], growing)
    return growing


def _check_committed_rows(extraction: Extraction) -> None:
    """Refuses a bank in which a committed shard holds other clips than this table names there."""
    plan = extraction.plan
    done = set(range(plan.first_shard, plan.schema.n_shards)) - set(plan.missing_shards)
    for shard in sorted(done):
        record = read_record(plan.folder, shard_name(shard))
        expected = rows_digest(_shard_clips(extraction, shard))
        if record is not None and record["rows_sha256"] != expected:
            raise BankCorrupt(
                f"shard {shard_name(shard)} of {plan.folder} holds other clips than the table; "
                f"remove commits/{shard_name(shard)}.json and run the same command again"
            )


def choose_layers(encoder: Encoder, layers: str | tuple[int, ...]) -> tuple[int, ...]:
    """The layers that "last", "all" or a tuple name, ascending; `EncoderError` for unknown ones."""
    known = sorted(spec.layer for spec in encoder.spec.layers)
    if layers == "last":
        return (known[-1],)
    if layers == "all":
        return tuple(known)
    unknown = sorted(set(layers) - set(known)) if not isinstance(layers, str) else [layers]
    if unknown or not layers:
        raise EncoderError(
            f"{encoder.spec.name} has no layer {', '.join(map(str, unknown)) or '(none given)'}; "
            f"it has {known[0]} to {known[-1]}, or say last or all"
        )
    return tuple(sorted({int(layer) for layer in layers}))


def run(
    extraction: Extraction,
    *,
    scheduler: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Bank:
    """Does what is left of an extraction and seals the bank."""
    bank = extraction.bank
    with _telling_of_a_full_disk(bank):
        # Another process may begin, finish or grow a bank here at any time.
        while True:
            extraction = fit_to_bank(extraction)
            if extraction.grows is None and (bank / SEAL).is_file():
                seal_bank(bank, extraction.plan.schema, recipe_id=extraction.job.recipe.recipe_id)
                return open_bank(bank)
            try:
                _advance(extraction, scheduler=scheduler, progress=progress)
            except (FileNotFoundError, BankNotFound):
                # The folder of a growth goes when another process has finished it.
                if extraction.grows is None or is_current(extraction.grows):
                    raise


@contextmanager
def _telling_of_a_full_disk(bank: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PatchbankError(
            f"no space left for {bank}: free some and run the same command again; what is "
            "committed is not done again"
        ) from error


def _advance(
    extraction: Extraction, *, scheduler: str | None, progress: Callable[[Progress], None] | None
) -> None:
    """Does what is left and seals; less where another process was faster with something else."""
    bank, folder = extraction.bank, extraction.plan.folder
    if (folder / "zarr.json").is_file():
        recover(folder)
    bank.parent.mkdir(parents=True, exist_ok=True)
    # What recovery freed, and the shards that it gave back, count.
    extraction = _replanned(extraction)
    extraction.plan.check_space()
    _check_committed_rows(extraction)
    if extraction.grows is not None:
        begin_growth(extraction.grows, extraction.plan.schema, _grown_attributes(extraction))
        _check_same_rows(bank, read_attributes(folder)["card"], extraction)
    has_golden = extraction.grows is not None or (folder / "commits/golden.json").is_file()
    if extraction.plan.missing_shards or not has_golden:
        with open_workers(extraction.job, scheduler) as workers:
            if extraction.grows is None:
                begun = _begin(extraction, workers)
                if begun.grows is not None or begun.job.schema != extraction.job.schema:
                    return
                extraction = begun
            _extract_missing(extraction, workers, progress)
    if extraction.grows is not None:
        seal_growth(extraction.grows, extraction.plan.schema)
    else:
        seal_bank(bank, extraction.plan.schema, recipe_id=extraction.job.recipe.recipe_id)


def _replanned(extraction: Extraction) -> Extraction:
    plan = extraction.plan
    fresh = plan_extraction(plan.folder, plan.recipe, plan.schema, first_shard=plan.first_shard)
    return replace(extraction, plan=fresh)


def _begin(extraction: Extraction, workers: Workers) -> Extraction:
    """The skeleton of a bank and the golden clip, where they are not there yet."""
    bank = extraction.bank
    if not (bank / "zarr.json").is_file():
        here = workers.environment()
        batch_size = extraction.batch_size or default_batch_size(here["device"])
        constants = _calibrate(extraction, workers, batch_size)
        recipe = extraction.job.recipe
        if constants:
            recipe = replace(
                recipe, quantisation=quantisation_recipe(recipe.stored_dtype, constants)
            )
        attributes = bank_attributes(
            recipe, extraction.plan.schema, extraction.clips, {"batch_size": batch_size, **here}
        )
        arrays = {layer: value.arrays() for layer, value in constants.items()}
        create_skeleton(bank, extraction.plan.schema, attributes, arrays)
        # Another process may have been faster, with other settings.
        extraction = fit_to_bank(extraction)
    workers.golden()
    return extraction


def _grown_attributes(extraction: Extraction) -> Json:
    assert extraction.grows is not None
    schema = extraction.plan.schema
    return attributes_of_card(
        extraction.grows.card
        | {
            "n_rows": schema.n_rows,
            "generations": list(schema.generations),
            "rows_sha256": rows_digest(extraction.clips),
        }
    )


def _calibrate(
    extraction: Extraction, workers: Workers, batch_size: int
) -> dict[int, ChannelConstants]:
    """Channel constants of a quantised bank, from clips that a seed draws."""
    if not extraction.plan.schema.stored.is_quantised:
        return {}
    order = np.random.default_rng(CALIBRATION_SEED).permutation(len(extraction.clips))
    chosen = np.sort(order[:CALIBRATION_CLIPS])
    return workers.calibrate(
        extraction.clips.take(chosen), extraction.job.recipe.layers, batch_size
    )


def _extract_missing(
    extraction: Extraction, workers: Workers, progress: Callable[[Progress], None] | None
) -> None:
    plan = extraction.plan
    extraction_facts = read_attributes(plan.folder)["card"]["extraction"]
    shards = {shard: _shard_clips(extraction, shard) for shard in plan.missing_shards}
    state = Progress(sum(len(clips) for clips in shards.values()))
    for report in workers.extract(shards, extraction_facts):
        n_failed = state.n_failed + report.n_failed
        state = replace(state, n_done=state.n_done + report.n_done, n_failed=n_failed)
        if progress is not None:
            progress(state)


def _shard_clips(extraction: Extraction, shard: int) -> pa.Table:
    clips = extraction.plan.schema.clips_of(shard)
    # A slice shares its table's memory; building it anew keeps just these rows for the journey.
    return pa.Table.from_pylist(
        extraction.clips.slice(clips.start, len(clips)).to_pylist(),
        schema=extraction.clips.schema,
    )


def extract(
    source: Path | str,
    *,
    encoder: str,
    out: Path | str,
    weights: Path | str | None = None,
    audio_root: Path | None = None,
    settings: ExtractionSettings = ExtractionSettings(),
    progress: Callable[[Progress], None] | None = None,
) -> Bank:
    """Encodes every clip of `source` into the bank `out`, or finishes what an earlier call began.

    Where a sealed bank holds some of the clips, only the others are encoded and added. A clip that
    cannot be decoded is recorded as failed and never stops the run. Equal settings, device and
    versions end with the same seal, however often the run was killed.
    """
    extraction = prepare(
        source,
        encoder=encoder,
        out=out,
        weights=weights,
        audio_root=audio_root,
        settings=settings,
    )
    return run(extraction, scheduler=settings.scheduler, progress=progress)
