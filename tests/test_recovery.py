from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from audio_sets import write_clip_set
from fake_bank import KILLED_RUN, SETTINGS

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.commit import commit, open_attempt, read_record, record_path
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankIncomplete,
    BankMismatch,
    PatchbankError,
)
from patchbank.pipeline.extraction import ExtractionSettings, extract, prepare, run
from patchbank.pipeline.specs import WindowSpec


@pytest.mark.parametrize(
    "moment", ["before a commit", "after the link", "while assembling", "before the seal"]
)
def test_a_killed_run_ends_with_the_seal_of_an_undisturbed_one(
    moment: str, sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed.bank"
    died = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), moment], check=False
    )
    assert died.returncode == 9
    with pytest.raises(BankIncomplete, match="Run the same"):
        open_bank(out)
    extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
    assert (out / "seal.json").read_bytes() == (sealed.path / "seal.json").read_bytes()
    assert not (out / ".work").exists()
    assert not (out / "parts").exists()


def test_only_shards_that_are_not_committed_are_done_again(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before the seal"],
        check=False,
    )
    plan = prepare(clip_table, encoder="fake", out=out, settings=SETTINGS).plan
    assert plan.missing_shards == ()
    assert plan.missing_bytes == 0


def test_the_second_of_two_attempts_at_a_shard_loses(sealed: Bank, copy: Path) -> None:
    before = record_path(copy, "00000").read_bytes()
    with open_attempt(copy, "00000") as attempt:
        assert commit(copy, attempt, "00000", [], {}) is False
    assert record_path(copy, "00000").read_bytes() == before
    assert not attempt.exists()


def test_two_extractions_on_one_scheduler_do_not_meet(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from distributed import LocalCluster

    tables = [write_clip_set(tmp_path / name, n_clips=20 + n) for n, name in enumerate("ab")]
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            silence_logs=50,
        ) as cluster,
        ThreadPoolExecutor(2) as pool,
    ):
        settings = ExtractionSettings(**{**vars(SETTINGS), "scheduler": cluster.scheduler_address})
        futures = [
            pool.submit(extract, table, encoder="fake", out=table.with_suffix(".bank"),
                        settings=settings)
            for table in tables
        ]  # fmt: skip
        banks = [future.result() for future in futures]
    assert [bank.n_rows for bank in banks] == [20, 21]
    for table, bank in zip(tables, banks, strict=True):
        alone = extract(table, encoder="fake", out=table.with_suffix(".own"), settings=SETTINGS)
        assert bank.root_sha256 == alone.root_sha256


def test_a_bank_that_another_process_began_meanwhile_is_compared(
    clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    other = ExtractionSettings(**{**vars(SETTINGS), "stored_dtype": "float32"})
    late = prepare(clip_table, encoder="fake", out=out, settings=other)
    extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
    with pytest.raises(BankMismatch, match="stored_dtype: found 'float16', expected 'float32'"):
        run(late)


def test_a_committed_shard_of_other_clips_is_refused(clip_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before the seal"]
    subprocess.run(line, check=False)
    record = json.loads((out / "commits/00001.json").read_bytes())
    record["rows_sha256"] = "0" * 64
    (out / "commits/00001.json").write_text(json.dumps(record))
    with pytest.raises(BankCorrupt, match=r"shard 00001 .* holds other clips than the table"):
        extract(clip_table, encoder="fake", out=out, settings=SETTINGS)


def test_a_damaged_commit_record_names_the_way_out(clip_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before the seal"]
    subprocess.run(line, check=False)
    for content in ("{}", "[]", "{", '{"files": [1]}'):
        (out / "commits/00001.json").write_text(content)
        with pytest.raises(BankCorrupt, match=r"00001\.json is damaged .* redoes the shard"):
            extract(clip_table, encoder="fake", out=out, settings=SETTINGS)


def test_a_committed_file_that_is_gone_or_cut_is_made_again(
    sealed: Bank, clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before a commit"]
    subprocess.run(line, check=False)
    (out / "layers/1/patches/c.0.0.0").write_bytes(b"cut")
    extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
    assert (out / "seal.json").read_bytes() == (sealed.path / "seal.json").read_bytes()


def test_what_dead_attempts_left_is_cleared_before_the_space_is_counted(
    clip_table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before a commit"]
    subprocess.run(line, check=False)
    assert list((out / ".work").glob("0*"))
    with open_attempt(out, "00009") as alive:
        from patchbank.pipeline.bank.commit import recover

        recover(out)
        assert list((out / ".work").glob("0*")) == [alive]
    assert not alive.exists()


def test_a_failing_worker_leaves_no_attempt_behind(
    clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchbank.pipeline import shard_rows

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_rows, "part_table", full)
    with pytest.raises(PatchbankError, match=r"no space left .* run the same command again"):
        extract(clip_table, encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    assert list((tmp_path / "x.bank/.work").glob("0*")) == []


def test_a_finished_bank_on_a_read_only_disk_is_finished(
    sealed: Bank, clip_table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    again = extract(clip_table, encoder="fake", out=sealed.path, settings=SETTINGS)
    assert again.fingerprint == sealed.fingerprint


def test_a_committed_shard_records_its_counts(sealed: Bank) -> None:
    record = read_record(sealed.path, "00002")
    assert record is not None
    assert (record["n_done"], record["n_failed"]) == (8, 0)
    assert next(file["path"] for file in record["files"]) == "layers/1/patches/c.2.0.0"


def test_whole_numbers_of_seconds_are_the_same_recipe(clip_table: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before the seal"]
    subprocess.run(line, check=False)
    whole = ExtractionSettings(**{**vars(SETTINGS), "window": WindowSpec(1, 1)})
    bank = extract(clip_table, encoder="fake", out=out, settings=whole)
    assert open_bank(out).recipe_id == bank.recipe_id


def test_an_attempt_of_another_host_is_dead_only_when_it_has_been_still_for_long(
    clip_table: Path, tmp_path: Path
) -> None:
    from patchbank.pipeline.bank.commit import live_attempts, recover

    out = tmp_path / "x.bank"
    line = [sys.executable, "-c", KILLED_RUN, str(clip_table), str(out), "before a commit"]
    subprocess.run(line, check=False)
    attempts = list((out / ".work").glob("0*"))
    # On a disk whose locks do not reach other machines, a live attempt over there looks unlocked.
    (attempts[0] / "lock").write_text("another-host")
    recover(out)
    assert list((out / ".work").glob("0*")) == attempts[:1]
    assert live_attempts(out) == {attempts[0].name.split(".")[0]}
    for path in [attempts[0], *attempts[0].rglob("*")]:
        os.utime(path, (1, 1))
    recover(out)
    assert list((out / ".work").glob("0*")) == []


def test_a_skeleton_that_a_killed_growth_left_is_no_work_under_way(copy: Path) -> None:
    from patchbank.pipeline.bank.commit import live_attempts

    (copy / ".work/.next.0123").mkdir(parents=True)
    assert live_attempts(copy) == set()
