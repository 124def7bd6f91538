"""Extractions on a Dask cluster: workers that die, that are given up, and that lack something."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dask
import pytest
from audio_sets import write_clip_set
from crash_banks import check_after_a_kill, check_finished, committed_files, n_committed
from dask_cluster import SOON, Cluster
from distributed import LocalCluster
from fake_bank import SETTINGS
from killable import PATIENCE_S, Forks, Moment, Run

from patchbank.pipeline import cluster as cluster_module
from patchbank.pipeline import window
from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.decoding import ShardClips
from patchbank.pipeline.errors import BankError, EncoderError, ManifestError, PatchbankError
from patchbank.pipeline.extraction import Progress, extract, prepare
from patchbank.pipeline.shard import ShardExtractor

N_SHARDS = 20


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with Forks(tmp_path_factory.mktemp("runs")) as forks:
        yield forks


@pytest.fixture(scope="module")
def cluster(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), forks, SOON) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip_set(tmp_path_factory.mktemp("large"), n_clips=16 * N_SHARDS)


@pytest.fixture(scope="module")
def seal(forks: Forks, table: Path) -> bytes:
    """Of an undisturbed run in one process with as many threads."""
    bank = table.parent / "undisturbed.bank"
    forks.finish(table, bank)
    return (bank / "seal.json").read_bytes()


def wait_for_commits(bank: Path, run: Run, n: int = 1) -> None:
    end = time.monotonic() + PATIENCE_S
    while n_committed(bank) < n:
        assert run.status() is None, run.text()
        assert time.monotonic() < end, run.text()
        time.sleep(0.001)


def test_an_extraction_survives_the_death_of_a_worker(
    forks: Forks, table: Path, seal: bytes, tmp_path: Path
) -> None:
    with Cluster(tmp_path / "cluster") as own:
        _, victim = own.workers("survivor", "victim")
        bank = tmp_path / "x.bank"
        run = forks.start(table, bank, scheduler=own.address)
        wait_for_commits(bank, run)
        victim.kill()
        before, n_before = committed_files(bank), n_committed(bank)
        assert run.wait() == 0, run.text()
    assert 1 <= n_before < N_SHARDS
    check_after_a_kill(bank, before, {seal})
    check_finished(bank, seal)
    assert open_bank(bank).card["extraction"]["threads"] == 1


STOPPED = {
    "before it makes a folder": Moment(r"^os\.mkdir \S*/\.work/0", stops=True),
    "before it opens its files": Moment(r"^open \S*/\.work/0\S*c\.", stops=True),
    "before its commit": Moment(r"^os\.link .*commits/0", stops=True),
    "between its commit and its moves": Moment(r"^os\.rename \S*/\.work/0", stops=True),
}


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(name, marks=[] if name == "before its commit" else pytest.mark.slow)
        for name in STOPPED
    ],
)
def test_a_worker_that_is_given_up_and_wakes_after_the_seal_changes_nothing(
    moment: str, cluster: Cluster, forks: Forks, table: Path, seal: bytes, tmp_path: Path
) -> None:
    bank = tmp_path / "x.bank"
    name = moment.replace(" ", "-")
    sleeper = cluster.worker(f"{name}-sleeper", at=STOPPED[moment], bank=bank)
    (one,) = cluster.workers(f"{name}-other")
    sleeper.wait_for("Registered to:")
    run = forks.start(table, bank, scheduler=cluster.address)
    assert run.wait() == 0, run.text()
    assert sleeper.is_stopped
    check_finished(bank, seal)
    sleeper.send(signal.SIGCONT)
    # It either finds its way back to the scheduler or ends; its shard has ended by then.
    time.sleep(2.0)
    check_finished(bank, seal)
    for process in (sleeper, one):
        process.kill()


def test_an_extraction_without_workers_ends_and_is_finished_later(
    cluster: Cluster,
    forks: Forks,
    table: Path,
    seal: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(window, "WITHOUT_WORKERS_S", 1.0)
    (lonely,) = cluster.workers("lonely")
    settings = replace(SETTINGS, scheduler=cluster.address)

    def kill_it(progress: Progress) -> None:
        if progress.n_done and lonely.runs:
            lonely.kill()

    bank = tmp_path / "x.bank"
    words = r"^no Dask worker for 1 s; start some and run the same command again: [a-z ]*$"
    with pytest.raises(PatchbankError, match=words):
        extract(table, encoder="fake", out=bank, settings=settings, progress=kill_it)
    before = committed_files(bank)
    assert before
    forks.finish(table, bank)
    check_after_a_kill(bank, before, {seal})
    check_finished(bank, seal)


def test_a_scheduler_that_dies_ends_the_extraction_with_one_sentence(
    forks: Forks, table: Path, seal: bytes, tmp_path: Path
) -> None:
    with Cluster(tmp_path / "cluster", forks) as own:
        own.workers("w")
        bank = tmp_path / "x.bank"
        run = forks.start(table, bank, scheduler=own.address)
        wait_for_commits(bank, run)
        own.scheduler.kill()
        assert run.wait() == 1
    assert f"PatchbankError: the Dask scheduler at {own.address} is gone;" in run.text()
    before = committed_files(bank)
    forks.finish(table, bank)
    check_after_a_kill(bank, before, {seal})
    check_finished(bank, seal)


def test_a_shard_whose_workers_all_die_ends_the_extraction(
    forks: Forks, table: Path, seal: bytes, tmp_path: Path
) -> None:
    settings = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with Cluster(tmp_path / "cluster", forks, settings) as own:
        bank = tmp_path / "x.bank"
        at = Moment(r"^os\.link .*commits/0")
        own.worker("w", at=at, bank=bank).wait_for("Registered to:")
        run = forks.start(table, bank, scheduler=own.address)
        assert run.wait() == 1
    words = "PatchbankError: 1 Dask workers died over one piece of the work, the last at tcp"
    assert words in run.text()
    forks.finish(table, bank)
    check_finished(bank, seal)


def test_a_scheduler_that_does_not_answer_is_named(table: Path, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        settings = replace(SETTINGS, scheduler=address)
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "500ms"}),
            pytest.raises(PatchbankError, match=rf"^no Dask scheduler answers at {address}; start"),
        ):
            extract(table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    assert not (tmp_path / "x.bank").exists()


def test_a_scheduler_without_workers_is_named(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "FIRST_WORKER_S", 0.2)
    with LocalCluster(
        n_workers=0, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50
    ) as empty:
        address = empty.scheduler_address
        settings = replace(SETTINGS, scheduler=address)
        words = rf"at {address} has no worker; start some with `patchbank worker {address}`"
        with pytest.raises(PatchbankError, match=words):
            extract(table, encoder="fake", out=tmp_path / "x.bank", settings=settings)
    assert not (tmp_path / "x.bank").exists()


def test_a_worker_names_itself_and_the_path_that_it_does_not_see(
    table: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    bank = tmp_path / "x.bank"
    prepared = prepare(
        table, encoder="fake", weights=tmp_path / "weights", out=bank, settings=SETTINGS
    )
    here, job = socket.gethostname(), prepared.job
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ManifestError, match=rf"{elsewhere}: --audio-root: {here} finds no audio"):
        ShardExtractor(replace(job, audio_root=elsewhere))
    with pytest.raises(EncoderError, match=rf"^{here} finds no weights at {elsewhere}; every"):
        ShardExtractor(replace(job, weights=str(elsewhere)))
    extractor = ShardExtractor(job)
    clips = ShardClips(prepared.clips.slice(0, 16))
    for work in (extractor.golden, lambda: extractor.extract(0, clips, {"batch_size": 16})):
        with pytest.raises(BankError, match=rf"^{here} sees no bank at {bank}: --out must lie on"):
            work()
    extractor.close()
    assert not bank.exists()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["bank", "audio", "weights"])
def test_a_worker_that_sees_another_disk_stops_the_extraction(
    hidden: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "WITHOUT_WORKERS_S", 30.0)
    places = {name: tmp_path / name for name in ("bank", "audio", "weights")}
    for place in places.values():
        place.mkdir()
    shutil.copytree(table.parent / "audio", places["audio"] / "audio")
    shutil.copy(table, places["audio"] / "clips.csv")
    (places["weights"] / "w").write_bytes(b"weights")
    # In a mount namespace of its own, another disk lies over one of the folders.
    script = f'mount -t tmpfs -o size=1m tmpfs "{places[hidden]}" && exec "$@"'
    prefix = ["unshare", "-m", "sh", "-c", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mount namespaces here")
    with Cluster(tmp_path / "cluster") as own:
        worker = own.worker("w", prefix=prefix)
        worker.wait_for("Registered to:")
        with pytest.raises(PatchbankError) as error:
            extract(
                places["audio"] / "clips.csv",
                encoder="fake",
                weights=places["weights"] / "w",
                out=places["bank"] / "x.bank",
                settings=replace(SETTINGS, scheduler=own.address),
            )
        inside = Path(f"/proc/{worker.pid}/root{places['bank']}")
        assert hidden != "bank" or list(inside.iterdir()) == []
    assert socket.gethostname() in str(error.value)
    assert str(places[hidden]) in str(error.value)
    assert "\n" not in str(error.value)
