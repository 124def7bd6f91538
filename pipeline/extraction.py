"""`extract`: a table of clips and an encoder become a sealed bank; the same call finishes it.

A longer table over a sealed bank makes it grow: only the clips that are new are encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from patchbank.pipeline.bank.card import (
    attributes_of_card,
    read_attributes,
)
from patchbank.pipeline.bank.commit import read_record, recover, shard_name
from patchbank.pipeline.bank.growth import (
    begin_growth,
    is_current,
    seal_growth,
)
from patchbank.pipeline.bank.identity import rows_digest
from patchbank.pipeline.bank.quantised import (
    CALIBRATION_CLIPS,
    CALIBRATION_SEED,
    quantisation_recipe,
)
from patchbank.pipeline.bank.reader import Bank, open_bank
from patchbank.pipeline.bank.schema import create_skeleton
from patchbank.pipeline.bank.seal import seal_bank
from patchbank.pipeline.bank.seal_record import SEAL
from patchbank.pipeline.decoding import STRETCH, ShardClips
from patchbank.pipeline.draws import draws_of
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankNotFound,
)
from patchbank.pipeline.fitting import Extraction, check_same_growth, fit_to_bank
from patchbank.pipeline.plan import (
    bank_attributes,
    plan_extraction,
)
from patchbank.pipeline.preparation import prepare as prepare
from patchbank.pipeline.preparation import telling_of_a_full_disk
from patchbank.pipeline.progress import Progress as Progress
from patchbank.pipeline.settings import ExtractionSettings as ExtractionSettings
from patchbank.pipeline.specs import Json
from patchbank.pipeline.workers import Workers, open_workers


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


def run(extraction: Extraction, *, progress: Callable[[Progress], None] | None = None) -> Bank:
    """Does what is left of an extraction and seals the bank."""
    bank = extraction.bank
    with telling_of_a_full_disk(bank):
        # Another process may begin, finish or grow a bank here at any time.
        while True:
            extraction = fit_to_bank(extraction)
            if extraction.grows is None and (bank / SEAL).is_file():
                seal_bank(bank, extraction.plan.schema, recipe_id=extraction.job.recipe.recipe_id)
                return open_bank(bank)
            try:
                _advance(extraction, progress)
            except (FileNotFoundError, FileExistsError, BankNotFound):
                # The folder of a growth goes when another process has finished it.
                if extraction.grows is None or is_current(extraction.grows):
                    raise


def _advance(extraction: Extraction, progress: Callable[[Progress], None] | None) -> None:
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
        check_same_growth(extraction)
    has_golden = extraction.grows is not None or (folder / "commits/golden.json").is_file()
    state, tell = Progress(_n_missing(extraction)), progress or (lambda state: None)
    if extraction.plan.missing_shards or not has_golden:
        tell(replace(state, doing="starting"))
        with open_workers(extraction.job, extraction.workplace) as workers:
            if extraction.grows is None:
                begun = _begin(extraction, workers)
                if begun.grows is not None or begun.job.schema != extraction.job.schema:
                    return
                extraction = begun
            for state in _extract_missing(extraction, workers):
                tell(state)
    tell(replace(state, doing="sealing", report=None))
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
    if not (extraction.bank / "zarr.json").is_file():
        order = np.random.default_rng(CALIBRATION_SEED).permutation(len(extraction.clips))
        chosen = extraction.clips.take(np.sort(order[:CALIBRATION_CLIPS]))
        begin_bank(extraction, workers, to_travel(extraction, chosen))
        # Another process may have been faster, with other settings.
        extraction = fit_to_bank(extraction)
    workers.golden()
    return extraction


def begin_bank(extraction: Extraction, workers: Workers, calibration: ShardClips) -> None:
    """Makes the skeleton of a bank, with the constants of a quantised one."""
    schema, recipe = extraction.plan.schema, extraction.job.recipe
    here = workers.environment()
    batch_size = extraction.batch_size or workers.batch_size()
    arrays = {}
    if schema.stored.is_quantised:
        constants = workers.calibrate(calibration, recipe.layers, batch_size)
        quantisation = quantisation_recipe(recipe.stored_dtype, constants)
        recipe = replace(recipe, quantisation=quantisation)
        arrays = {layer: value.arrays() for layer, value in constants.items()}
    begun_with = {"batch_size": batch_size, **here}
    attributes = bank_attributes(recipe, schema, extraction.clips, begun_with)
    create_skeleton(extraction.bank, schema, attributes, arrays)


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


def _n_missing(extraction: Extraction) -> int:
    plan = extraction.plan
    return sum(len(plan.schema.clips_of(shard)) for shard in plan.missing_shards)


def _extract_missing(extraction: Extraction, workers: Workers) -> Iterator[Progress]:
    plan = extraction.plan
    begun_with = read_attributes(plan.folder)["card"]["extraction"]

    def clips_of(shard: int) -> ShardClips:
        return to_travel(extraction, _shard_clips(extraction, shard))

    n_clips = _n_missing(extraction)
    return workers.extract(plan.missing_shards, clips_of, begun_with, n_clips=n_clips)


def _shard_clips(extraction: Extraction, shard: int) -> pa.Table:
    clips = extraction.plan.schema.clips_of(shard)
    # A slice shares its table's memory; building it anew keeps just these rows for the journey.
    return pa.Table.from_pylist(
        extraction.clips.slice(clips.start, len(clips)).to_pylist(),
        schema=extraction.clips.schema,
    )


def to_travel(extraction: Extraction, clips: pa.Table) -> ShardClips:
    """Rows of an extraction, with the clips that are mixed into them."""
    if extraction.job.recipe.augment is None:
        return ShardClips(clips)
    names = sorted({name for draw in draws_of(clips) for name in draw.mix_sources})
    rows = extraction.clean_rows
    sources = extraction.clips.take(pa.array([rows[name] for name in names], pa.int64()))
    return ShardClips(clips, sources.select(["clip_id", *STRETCH]))


def extract(
    source: Path | str,
    *,
    encoder: str,
    out: Path | str,
    weights: Path | str | None = None,
    audio_root: Path | None = None,
    settings: ExtractionSettings = ExtractionSettings(),  # noqa: B008 - frozen
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
    return run(extraction, progress=progress)
