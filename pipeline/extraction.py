"""`extract`: a table of clips and an encoder become a sealed bank; the same call finishes it."""

from __future__ import annotations

import os
import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from distributed import Client, LocalCluster, WorkerPlugin, as_completed, get_worker

from patchbank.pipeline.bank.commit import read_record, recover, shard_name
from patchbank.pipeline.bank.reader import Bank, open_bank, read_attributes, schema_of_card
from patchbank.pipeline.bank.schema import create_skeleton
from patchbank.pipeline.bank.seal import SEAL, seal_bank
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.errors import BankCorrupt, BankMismatch, EncoderError, PatchbankError
from patchbank.pipeline.manifest import ClipTable, read_manifest
from patchbank.pipeline.plan import (
    ExtractionPlan,
    bank_attributes,
    plan_extraction,
    recipe_of_card,
    rows_digest,
    schema_for,
)
from patchbank.pipeline.shard import ExtractionJob, ShardExtractor, ShardReport
from patchbank.pipeline.specs import Json, Recipe, StoredDType, WindowSpec, differing_fields

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.base import Encoder

SHARDS_PER_WORKER = 2
"""Shard tasks that run at once in a worker, so that its pipeline never drains between shards."""


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
    job: ExtractionJob
    attributes: Json


def prepare(
    source: Path | str,
    *,
    encoder: str,
    out: Path | str,
    weights: Path | str | None = None,
    audio_root: Path | None = None,
    settings: ExtractionSettings = ExtractionSettings(),
) -> Extraction:
    """Reads the clip table and the encoder, compares them with what lies at `out`; writes nothing.

    Raises `ManifestError`, `EncoderError`, or `BankMismatch` where another bank lies at `out`.
    """
    table = read_manifest(source, audio_root=audio_root, window=settings.window)
    model = load_encoder(encoder, weights=weights, device="cpu")
    recipe = Recipe(
        encoder=model.spec,
        window=settings.window,
        layers=choose_layers(model, settings.layers),
        stored_dtype=settings.stored_dtype,
        mask_padding=settings.mask_padding,
    )
    grids = model.grids(settings.window.n_samples(model.spec.sample_rate_hz))
    schema = schema_for(recipe, grids, n_rows=len(table))
    bank = Path(out)
    plan = plan_extraction(bank, recipe, schema)
    device = choose_device(settings.device)
    job = ExtractionJob(
        bank=bank.absolute(),
        audio_root=table.audio_root.absolute(),
        recipe=recipe,
        schema=schema,
        weights=None if weights is None else Path(weights).absolute(),
        device=device,
        batch_size=settings.batch_size or (16 if device == "cpu" else 64),
        n_decode_threads=settings.n_decode_threads or min(8, os.cpu_count() or 1),
    )
    return _fit_to_bank(Extraction(plan, table, job, _attributes(table, job)), settings.batch_size)


def _attributes(table: ClipTable, job: ExtractionJob) -> Json:
    packages = ("patchbank", "torch", "torchaudio", "zarr", "numpy")
    extraction = {
        "batch_size": job.batch_size,
        "device": job.device.split(":")[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }
    return bank_attributes(job.recipe, job.schema, table.clips, extraction)


def _fit_to_bank(extraction: Extraction, batch_size: int | None) -> Extraction:
    """Takes over the batch size of a bank that exists, or refuses a bank that is another one."""
    bank = extraction.job.bank
    if not (bank / "zarr.json").is_file():
        if bank.exists():
            raise PatchbankError(f"{bank} exists and is no bank; choose another --out or remove it")
        return extraction
    card = read_attributes(bank)["card"]
    expected, found = extraction.job.recipe.identity(), recipe_of_card(card)
    if found != expected:
        raise BankMismatch(
            f"{bank} holds other tokens than this command makes; choose another --out",
            differing_fields(found, expected),
        )
    _check_same_rows(bank, card, extraction)
    begun_with = int(card["extraction"]["batch_size"])
    if batch_size not in (None, begun_with):
        raise BankMismatch(
            f"{bank} was begun with another batch size, which tokens depend on in the last bits",
            {"extraction.batch_size": (begun_with, batch_size)},
        )
    return replace(extraction, job=replace(extraction.job, batch_size=begun_with))


def _check_same_rows(bank: Path, card: Json, extraction: Extraction) -> None:
    clips = extraction.table.clips
    if card["rows_sha256"] != rows_digest(clips):
        raise BankMismatch(
            f"{bank} was begun over another clip table; choose another --out",
            {"n_rows": (card["n_rows"], len(clips))}
            if card["n_rows"] != len(clips)
            else {"rows_sha256": (card["rows_sha256"][:12], rows_digest(clips)[:12])},
        )
    if schema_of_card(card) != extraction.plan.schema:
        raise BankMismatch(
            f"{bank} was begun by another version of patchbank; choose another --out",
            {"rows_per_shard": (card["rows_per_shard"], extraction.plan.schema.rows_per_shard)},
        )


def _check_committed_rows(extraction: Extraction) -> None:
    """Refuses a bank in which a committed shard holds other clips than this table names there."""
    bank, missing = extraction.job.bank, set(extraction.plan.missing_shards)
    for shard in set(range(extraction.plan.schema.n_shards)) - missing:
        record = read_record(bank, shard_name(shard))
        expected = rows_digest(_shard_rows(extraction, shard))
        if record is not None and record["rows_sha256"] != expected:
            raise BankCorrupt(
                f"shard {shard_name(shard)} of {bank} holds other clips than the table; remove "
                f"commits/{shard_name(shard)}.json and run the same command again"
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


def choose_device(device: str) -> str:
    """`device`, with "auto" resolved; `EncoderError` where it is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise EncoderError(f"no device {device!r} here ({reason}); use --device cpu") from error
    return device


def run(
    extraction: Extraction,
    *,
    scheduler: str | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Bank:
    """Does what is left of an extraction and seals the bank."""
    bank, plan = extraction.job.bank, extraction.plan
    if not (bank / SEAL).is_file():
        bank.parent.mkdir(parents=True, exist_ok=True)
        if (bank / "zarr.json").is_file():
            recover(bank)
        # What recovery freed, and the shards that it gave back, count.
        plan = plan_extraction(bank, plan.recipe, plan.schema)
        plan.check_space()
        create_skeleton(bank, plan.schema, extraction.attributes)
        # Another process may have begun a bank here since this one was prepared.
        extraction = _fit_to_bank(replace(extraction, plan=plan), None)
        _check_committed_rows(extraction)
        n_clips = sum(len(plan.schema.rows_of(shard)) for shard in plan.missing_shards)
        state = Progress(n_clips)
        for report in _run_shards(extraction, scheduler):
            n_failed = state.n_failed + report.n_failed
            state = Progress(n_clips, state.n_done + report.n_done, n_failed)
            if progress is not None:
                progress(state)
    else:
        _fit_to_bank(extraction, None)
    seal_bank(bank, plan.schema, recipe_id=read_attributes(bank)["recipe_id"])
    return open_bank(bank)


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

    A clip that cannot be decoded is recorded as failed and never stops the run. Equal settings,
    device and versions end with the same seal, however often the run was killed.
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


class _ExtractionPlugin(WorkerPlugin):
    """Keeps one encoder alive in a worker, for all its shard tasks."""

    def __init__(self, job: ExtractionJob) -> None:
        self._job = job
        self.extractor: ShardExtractor | None = None

    def setup(self, worker: Any) -> None:
        self.extractor = ShardExtractor(self._job)

    def teardown(self, worker: Any) -> None:
        if self.extractor is not None:
            self.extractor.close()


def _extractor(plugin_name: str) -> ShardExtractor:
    plugin = get_worker().plugins[plugin_name]
    assert isinstance(plugin, _ExtractionPlugin)
    assert plugin.extractor is not None
    return plugin.extractor


def _extract_shard(plugin_name: str, shard: int, clips: pa.Table) -> ShardReport:
    return _extractor(plugin_name).extract(shard, clips)


def _extract_golden(plugin_name: str) -> None:
    _extractor(plugin_name).golden()


def _run_shards(extraction: Extraction, scheduler: str | None) -> Iterator[ShardReport]:
    # A scheduler may serve several extractions: each has a plugin of its own.
    plugin = f"patchbank-{uuid.uuid4().hex}"
    with _client(scheduler) as client:
        client.register_plugin(_ExtractionPlugin(extraction.job), name=plugin)
        try:
            client.submit(_extract_golden, plugin, pure=False).result()
            futures = [
                client.submit(
                    _extract_shard, plugin, shard, _shard_rows(extraction, shard), pure=False
                )
                for shard in extraction.plan.missing_shards
            ]
            for future in as_completed(futures, loop=client.loop):
                yield future.result()
                future.release()
        finally:
            client.unregister_worker_plugin(plugin)


def _shard_rows(extraction: Extraction, shard: int) -> pa.Table:
    rows = extraction.plan.schema.rows_of(shard)
    # A slice shares its table's memory; combining copies just these rows for the journey.
    return pa.Table.from_pylist(
        extraction.table.clips.slice(rows.start, len(rows)).to_pylist(),
        schema=extraction.table.clips.schema,
    )


@contextmanager
def _client(scheduler: str | None) -> Iterator[Client]:
    if scheduler is not None:
        with Client(scheduler, set_as_default=False) as client:
            yield client
        return
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=SHARDS_PER_WORKER,
            processes=False,
            # The default would listen on every interface of the machine.
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client
