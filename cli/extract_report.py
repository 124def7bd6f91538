"""What `patchbank extract` tells: the plan before, the bank and the profile after."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from patchbank.pipeline.errors import PatchbankError

if TYPE_CHECKING:
    import pyarrow as pa

    from patchbank.pipeline.bank import Bank
    from patchbank.pipeline.fitting import Extraction
    from patchbank.pipeline.manifest import ClipTable
    from patchbank.pipeline.measure import Forecast
    from patchbank.pipeline.profile import Profile

MOST_FAILED_VIEWS = 5
"""That are told one by one where they failed for the same reason."""


def print_plan(extraction: Extraction, forecast: Forecast | None, *, as_json: bool) -> None:
    """What an extraction would do, on stdout."""
    from patchbank.pipeline.bank.view_columns import count_views
    from patchbank.pipeline.specs import human_bytes

    plan = extraction.plan
    facts = {
        "clips": plan.schema.n_clips,
        "views": count_views(extraction.clips),
        "clips_missing": sum(len(plan.schema.rows_of(shard)) for shard in plan.missing_shards),
        "shards": plan.schema.n_shards,
        "shards_missing": len(plan.missing_shards),
        "bytes": plan.total_bytes,
        "bytes_missing": plan.missing_bytes,
        "bytes_free": plan.free_bytes,
        "memory_bytes": memory_bytes(extraction),
        "layers": {
            spec.layer: {
                "grid": [plan.schema.grids[spec.layer].time, plan.schema.grids[spec.layer].freq],
                "dim": spec.dim,
                "prefix": spec.n_prefix,
            }
            for spec in plan.schema.layers
        },
    }
    plan.check_space()
    if as_json:
        measured = {"forecast": _forecast(forecast)} if forecast else {}
        print(json.dumps(facts | measured))
        return
    views = f", {facts['views']} of them views" if facts["views"] else ""
    print(f"clips    {facts['clips']}{views}, {facts['clips_missing']} to encode")
    print(f"shards   {facts['shards']}, {facts['shards_missing']} still to do")
    for spec in plan.schema.layers:
        grid = plan.schema.grids[spec.layer]
        print(f"layer {spec.layer:<2} {grid.time} x {grid.freq} patches of {spec.dim}")
    print(f"size     {human_bytes(plan.total_bytes)}, {human_bytes(plan.missing_bytes)} to write")
    print(f"free     {human_bytes(plan.free_bytes)} at {extraction.bank.parent}")
    print(f"memory   {human_bytes(memory_bytes(extraction))} a worker, beside the encoder")
    if forecast:
        print(
            f"time     {human_time(forecast.seconds)} at {forecast.clips_per_s:.3g} clips/s "
            f"({forecast.n_measured} clips in {forecast.measured_s:.0f} s, "
            f"{forecast.n_workers} worker(s))"
        )


def memory_bytes(extraction: Extraction) -> int:
    """Of a worker's pipeline, with its first worker's share of this machine."""
    from patchbank.pipeline.cluster import SHARDS_PER_WORKER
    from patchbank.pipeline.environment import is_cpu
    from patchbank.pipeline.lanes import CPU_BATCH, GPU_BATCH
    from patchbank.pipeline.memory import pipeline_memory
    from patchbank.pipeline.workplace import Machine

    job = extraction.job
    # The workers of a scheduler may have a GPU; this machine says nothing about them.
    device = "cpu" if job.device == "auto" else job.device
    memory = pipeline_memory(
        job.recipe,
        job.schema,
        device=device,
        n_threads=job.n_threads or Machine.here().n_cores,
        batch_size=extraction.batch_size or (CPU_BATCH if is_cpu(device) else GPU_BATCH),
        n_shards=SHARDS_PER_WORKER,
    )
    return memory.n_bytes


def _forecast(forecast: Forecast) -> dict[str, float]:
    return {
        "hours": forecast.seconds / 3600,
        "clips_per_s": forecast.clips_per_s,
        "start_s": forecast.start_s,
        "measured_clips": forecast.n_measured,
        "measured_s": forecast.measured_s,
        "workers": forecast.n_workers,
    }


def human_time(seconds: float) -> str:
    """A time of work in the unit that people would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def write_labels(table: ClipTable, out: Path) -> Path | None:
    """The labels of class folders or of a data set, as X.labels.csv beside X.bank.

    A file that is there already may have been corrected by hand: it is left alone.
    """
    if table.labels is None:
        return None
    from pyarrow import csv

    path = out.with_name(f"{out.stem}.labels.csv")
    if not path.exists():
        draft = path.with_name(f".{path.name}.draft")
        csv.write_csv(table.labels, draft)
        draft.replace(path)
    return path


def failures(clips: pa.Table) -> Iterator[str]:
    """A line for each clip that failed, by name, and for each view; of more than
    `MOST_FAILED_VIEWS` views that failed for one reason, a line for all."""
    rows = clips.select(["clip_id", "view", "status", "reason"]).to_pylist()
    failed = [row for row in rows if row["status"] == 2]
    alike = Counter(row["reason"] for row in failed if row["view"])
    told = set()
    for row in failed:
        reason, name = row["reason"], row["clip_id"]
        if not row["view"]:
            yield f"failed: {name}: {reason}"
        elif alike[reason] <= MOST_FAILED_VIEWS:
            yield f"failed: view {row['view']} of {name}: {reason}"
        elif reason not in told:
            told.add(reason)
            yield f"failed: {alike[reason]} views, first view {row['view']} of {name}: {reason}"


def print_bank(
    bank: Bank, *, labels: Path | None, profile: Profile | None = None, as_json: bool
) -> None:
    """What a bank holds and where the time went, on stdout; failed clips on stderr."""
    n_failed = int((bank.status == 2).sum())
    if n_failed == bank.n_clips:
        reason = bank.clips["reason"][0].as_py()
        raise PatchbankError(
            f"all {n_failed} clips of {bank.path} failed (first: {reason}); check the audio and "
            "--audio-root, then extract to another --out"
        )
    if as_json:
        facts = {"bank": str(bank.path), "fingerprint": bank.fingerprint, "clips": bank.n_clips}
        facts |= {"failed": n_failed, "labels": str(labels) if labels else None}
        print(json.dumps(facts | ({"profile": profile.to_json()} if profile else {})))
        return
    for line in failures(bank.clips):
        print(line, file=sys.stderr)
    print(f"{bank.path}: {bank.n_clips} clips, {n_failed} failed, {bank.fingerprint[:12]}")
    if labels:
        print(f"{labels}: labels that the folders or the data set give")
    if profile:
        print("\n".join(["", *profile.lines()]))
