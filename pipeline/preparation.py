"""What an extraction will do: the clip table and the encoder, and the bank that they come to."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.pipeline.bank.quantised import quantisation_recipe
from patchbank.pipeline.encoders import load_encoder
from patchbank.pipeline.encoders.discovery import absolute_reference
from patchbank.pipeline.encoders.hub import locate_weights
from patchbank.pipeline.environment import choose_device, default_compute_dtype
from patchbank.pipeline.errors import EncoderError, PatchbankError
from patchbank.pipeline.fitting import Extraction, fit_to_bank
from patchbank.pipeline.job import ExtractionJob
from patchbank.pipeline.manifest import read_manifest
from patchbank.pipeline.plan import plan_extraction, schema_for
from patchbank.pipeline.settings import ExtractionSettings
from patchbank.pipeline.specs import ComputeDType, Recipe
from patchbank.pipeline.views import TableRows
from patchbank.pipeline.workplace import (
    LocalWorker,
    Machine,
    Workplace,
    decode_threads,
    local_workers,
)

if TYPE_CHECKING:
    from patchbank.pipeline.encoders.base import Encoder


def prepare(
    source: Path | str,
    *,
    encoder: str,
    out: Path | str,
    weights: Path | str | None = None,
    audio_root: Path | None = None,
    settings: ExtractionSettings = ExtractionSettings(),  # noqa: B008 - frozen
    progress: Callable[[int, int], None] | None = None,
) -> Extraction:
    """Reads the clip table and the encoder and compares them with what lies at `out`.

    Writes nothing, but for the end of a growth that was cut short. `progress` is told how many
    recordings' headers have been read, and of how many. Raises `ManifestError`,
    `EncoderError`, or `BankMismatch` where another bank lies at `out`.
    """
    table = read_manifest(source, audio_root=audio_root, window=settings.window, progress=progress)
    reference = None if weights is None else locate_weights(weights).reference
    model = load_encoder(
        encoder,
        weights=reference,
        device="cpu",
        preset=settings.preset,
        frontend=settings.frontend,
    )
    workplace = choose_workplace(settings, Machine.here())
    # The workers of a scheduler choose for themselves: they may have what this machine lacks.
    first = workplace.workers[0] if workplace.workers else None
    recipe = Recipe(
        encoder=model.spec,
        window=settings.window,
        layers=choose_layers(model, settings.layers),
        stored_dtype=settings.stored_dtype,
        compute_dtype=settings.compute_dtype or usual_compute_dtype(workplace, settings.device),
        mask_padding=settings.mask_padding,
        quantisation=quantisation_recipe(settings.stored_dtype),
        augment=settings.augment,
    )
    rows = TableRows(
        table,
        recipe.augment,
        n_views=settings.n_views,
        sample_rate_hz=model.spec.sample_rate_hz,
        window_samples=settings.window.n_samples(model.spec.sample_rate_hz),
    )
    grids = model.grids(settings.window.n_samples(model.spec.sample_rate_hz))
    schema = schema_for(
        tuple(recipe.encoder.layer(layer) for layer in recipe.layers),
        grids,
        stored_dtype=recipe.stored_dtype,
        n_clips=len(rows),
    )
    bank = Path(out).absolute()
    job = ExtractionJob(
        bank=bank,
        folder=bank,
        audio_root=table.audio_root.absolute(),
        encoder=absolute_reference(encoder),
        recipe=recipe,
        schema=schema,
        weights=reference,
        device=first.device if first else settings.device,
        n_decode_threads=first.n_decode_threads if first else settings.n_decode_threads,
        n_threads=first.n_threads if first else None,
        decode_in=settings.decode_in,
        compiles=settings.compiles,
    )
    plan = plan_extraction(bank, recipe, schema)
    with telling_of_a_full_disk(bank):
        # Which rows there are to do follows from the bank.
        return fit_to_bank(
            Extraction(
                plan=plan,
                table=table,
                clips=table.clips,
                job=job,
                batch_size=settings.batch_size,
                compute_dtype=settings.compute_dtype,
                rows=rows,
                schema=schema,
                workplace=workplace,
            )
        )


def usual_compute_dtype(workplace: Workplace, device: str) -> ComputeDType:
    """What the workers compute in where nobody says; asks one of a scheduler's."""
    if workplace.scheduler is not None:
        from patchbank.pipeline.cluster import ask_worker

        return ask_worker(workplace.scheduler, default_compute_dtype, device)
    return default_compute_dtype(workplace.workers[0].device)


def choose_workplace(settings: ExtractionSettings, machine: Machine) -> Workplace:
    """The scheduler or the workers that settings ask for; raises where a device is not there."""
    if settings.scheduler is not None:
        return Workplace(settings.scheduler)
    if settings.devices is None and settings.n_workers is None:
        device = choose_device(settings.device)
        return Workplace(workers=(_single_worker(settings, device, machine),))
    return Workplace(
        workers=local_workers(
            machine,
            devices=settings.devices,
            n_workers=settings.n_workers,
            n_threads=settings.n_threads,
            n_decode_threads=settings.n_decode_threads,
        )
    )


def _single_worker(settings: ExtractionSettings, device: str, machine: Machine) -> LocalWorker:
    n_decode_threads = settings.n_decode_threads or decode_threads(machine, device, 1)
    return LocalWorker(device, device, settings.n_threads or machine.n_cores, n_decode_threads)


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


@contextmanager
def telling_of_a_full_disk(bank: Path) -> Iterator[None]:
    """Turns a full disk into a `PatchbankError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PatchbankError(
            f"no space left for {bank}: free some and run the same command again; what is "
            "committed is not done again"
        ) from error
