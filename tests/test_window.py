"""Who gets which shard, what a lost worker costs, and what is told of open shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gated_encoder
import pytest
from audio_sets import write_clip_set
from crash_banks import check_finished, shards_begun
from dask_cluster import Cluster
from fake_bank import N_CLIPS, SETTINGS
from gated_encoder import GATE, N_FREE
from killable import Forks, Moment

from patchbank.pipeline.bank.card import read_attributes
from patchbank.pipeline.cluster import SHARDS_PER_WORKER
from patchbank.pipeline.decoding import ShardClips
from patchbank.pipeline.extraction import Progress, extract, prepare
from patchbank.pipeline.progress import OpenShards
from patchbank.pipeline.shard import ShardReport
from patchbank.pipeline.workers import open_workers

N_SHARDS = 20
HELD = SHARDS_PER_WORKER + 1
"""Shards that a worker may have that does not get on: those it works on, and one that waits."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("runs")) as forks:
        yield forks


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_set(tmp_path_factory.mktemp("large"), n_clips=16 * N_SHARDS)


def shares(
    table: Path, bank: Path, scheduler: str, gate: Path, *, at_first: Callable[[], object]
) -> Counter[str]:
    """How many shards each worker does where the gate opens when one has done all that it can."""
    reports: list[ShardReport] = []

    def look(progress: Progress) -> None:
        if progress.report is not None:
            reports.append(progress.report)
        elif not reports:
            at_first()
        if len(reports) == N_SHARDS - HELD:
            # Both have a place in the window by now, whoever came when.
            assert progress.n_workers == 2
            gate.touch()

    settings = replace(SETTINGS, scheduler=scheduler)
    extract(table, encoder=gated_encoder.__file__, out=bank, settings=settings, progress=look)
    assert sorted(report.shard for report in reports) == list(range(N_SHARDS))
    return Counter(report.worker for report in reports)


def test_work_goes_from_a_slow_worker_to_a_fast_one(
    forks: Forks, table: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    with Cluster(tmp_path / "cluster", forks) as own:
        own.worker("slow", settings={GATE: str(gate)}).wait_for("Registered to:")
        own.workers("fast")
        done = shares(table, tmp_path / "x.bank", own.address, gate, at_first=lambda: None)
    assert done["fast"] >= N_SHARDS - HELD
    assert done.keys() == {"slow", "fast"}


def test_a_worker_that_comes_late_gets_work(forks: Forks, table: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Cluster(tmp_path / "cluster", forks) as own:
        own.worker("first", settings={GATE: str(gate)}).wait_for("Registered to:")
        late = []

        def join() -> None:
            if not late:
                late.append(own.worker("late"))

        done = shares(table, tmp_path / "x.bank", own.address, gate, at_first=join)
    assert done["late"] >= N_SHARDS - HELD


def test_a_killed_worker_costs_its_open_shards_only(
    forks: Forks, table: Path, tmp_path: Path
) -> None:
    forks.finish(table, tmp_path / "undisturbed.bank")
    bank = tmp_path / "x.bank"
    with Cluster(tmp_path / "cluster", forks) as own:
        victim = own.worker("victim", bank=bank, at=Moment(r"^os\.link .*commits/0", nth=2))
        other = own.worker("other", bank=bank)
        for worker in (victim, other):
            worker.wait_for("Registered to:")
        forks.finish(table, bank, scheduler=own.address)
        assert not victim.runs
        begun = Counter(shards_begun(victim.log.read_text()))
        assert len(begun) >= 2
        begun.update(shards_begun(other.log.read_text()))
    assert len(begun) == N_SHARDS
    assert 1 <= sum(begun.values()) - N_SHARDS <= SHARDS_PER_WORKER
    check_finished(bank, (tmp_path / "undisturbed.bank/seal.json").read_bytes())


def test_the_rows_of_a_shard_are_cut_out_when_its_turn_comes(table: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if not progress.doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS, progress=stop)
    extraction = prepare(table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    schema, missing = extraction.plan.schema, extraction.plan.missing_shards
    cut_out: list[int] = []

    def clips_of(shard: int) -> ShardClips:
        cut_out.append(shard)
        rows = schema.clips_of(shard)
        return ShardClips(extraction.clips.slice(rows.start, len(rows)))

    facts = read_attributes(tmp_path / "x.bank")["card"]["extraction"]
    ended: list[int] = []
    with open_workers(extraction.job, extraction.workplace) as workers:
        for state in workers.extract(missing, clips_of, facts, n_clips=16 * len(missing)):
            ended += [state.report.shard] if state.report else []
            assert len(cut_out) - len(ended) <= HELD
    assert sorted(ended) == sorted(cut_out) == sorted(missing)


def test_progress_moves_while_a_shard_is_open(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv(GATE, str(gate))
    monkeypatch.setenv(N_FREE, "3")
    states: list[Progress] = []

    def look(progress: Progress) -> None:
        states.append(progress)
        if progress.n_open:
            gate.touch()

    extract(
        clip_table,
        encoder=gated_encoder.__file__,
        out=tmp_path / "x.bank",
        settings=replace(SETTINGS, batch_size=4),
        progress=look,
    )
    before = [state for state in states if not state.n_done]
    assert max(state.n_open for state in before) in (4, 8, 12)
    assert max(state.n_encoded for state in states) == N_CLIPS
    assert states[-1] == Progress(N_CLIPS, N_CLIPS, doing="sealing")


def test_clips_of_a_lost_worker_and_of_an_ended_shard_do_not_count() -> None:
    shards = OpenShards()
    for shard, worker, n_clips in ((1, "a", 64), (2, "b", 32), (3, "a", 16)):
        shards.begin(shard)
        shards.note((0.0, {"shard": shard, "worker": worker, "n_clips": n_clips}))
    shards.note((0.0, {"shard": 4, "worker": "a", "n_clips": 1000}))
    assert shards.n_clips({"a", "b"}) == 112
    assert shards.n_clips({"a"}) == 80
    shards.note((0.0, {"shard": 2, "worker": "a", "n_clips": 8}))
    assert shards.n_clips({"a"}) == 88
    shards.end(1)
    assert shards.n_clips({"a", "b"}) == 24
