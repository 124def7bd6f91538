from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from listed_banks import write_listed
from share_processes import begin, kill, pull

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.commit import owning
from patchbank.pipeline.errors import BankIncomplete, BankNotFound, PatchbankError, StoreError
from patchbank.pipeline.sharing.catalogue import enter
from patchbank.pipeline.sharing.claim import take
from patchbank.pipeline.sharing.entry import entry_of
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.garbage import Garbage, Limits, find_garbage
from patchbank.pipeline.sharing.listing import read_catalogue
from patchbank.pipeline.sharing.pins import is_pinned, set_pin
from patchbank.pipeline.sharing.removal import (
    local_doomed,
    remove_local,
    remove_stored,
    stored_doomed,
)
from patchbank.pipeline.sharing.row_cache import bank_folder
from patchbank.pipeline.sharing.settings import ShareSettings
from patchbank.pipeline.sharing.store_garbage import find_cached_garbage, find_stored_garbage

WEEK_S = 8 * 86_400


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))


class Elsewhere:
    """The files of a folder as a store that is no folder of this disk, and knows their ages."""

    is_writable = True
    can_list = True

    def __init__(self, folder: Path) -> None:
        self._inner = FolderStore(folder)
        for verb in ("sizes", "folders", "size", "stream", "document", "put", "put_all", "proves"):
            setattr(self, verb, getattr(self._inner, verb))

    @property
    def url(self) -> str:
        return f"s3://team/{self._inner.folder.name}"

    def below(self, part: str) -> Elsewhere:
        return type(self)(self._inner.folder / part)

    def remove(self, names: list[str]) -> None:
        self._inner.remove(names)

    def newest_s(self) -> float | None:
        files = [p for p in self._inner.folder.rglob("*") if p.is_file()]
        return max((path.stat().st_mtime for path in files), default=None)


def said(capsys: pytest.CaptureFixture[str], *line: str, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["bank", *line]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, err


def collected(
    capsys: pytest.CaptureFixture[str], folder: Path, *options: str
) -> dict[str, tuple[str, bool]]:
    """Reasons, and whether it went, of what `gc` finds, by place below the folder."""
    rows = json.loads(said(capsys, "gc", str(folder), "--json", "--yes", *options)[0])
    return {os.path.relpath(row["place"], folder): (row["reason"], row["removed"]) for row in rows}


def make_old(folder: Path, seconds: float = WEEK_S) -> Path:
    """As if nobody had touched a folder for so long."""
    then = time.time() - seconds
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then), follow_symlinks=False)
    return folder


HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def held(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", HOLDER, str(lock)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.fixture
def half_pull(copy: Path) -> Path:
    """A pull that was killed a week ago."""
    half = copy.with_name("half.bank")
    shutil.copytree(copy, half, ignore=shutil.ignore_patterns("seal.json", "c.1.0.0"))
    (half / "zarr.json").unlink()
    (half / ".work/pull").mkdir(parents=True)
    (half / ".work/seal.lock").touch()
    shutil.copy(copy / "seal.json", half / ".work/pull.seal.json")
    return make_old(half)


def test_gc_finds_nothing_among_whole_banks(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_old(copy)
    (copy.parent / "thesis").mkdir()
    (copy.parent / "thesis/layers").mkdir()
    make_old(copy.parent / "thesis")
    (copy.parent / f".cache.{'0' * 32}").mkdir()
    (copy.parent / f".cache.{'0' * 32}/mine.txt").touch()
    make_old(copy.parent / f".cache.{'0' * 32}")
    assert said(capsys, "gc", str(copy.parent), "--yes", "--older-than", "0s")[0] == (
        "nothing to remove\n"
    )
    assert "no folder" in said(capsys, "gc", str(copy / "nowhere"), status=1)[1]


def test_gc_removes_a_pull_that_never_finished(
    half_pull: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, "gc", str(copy.parent), "--dry-run")
    assert f"{half_pull}: a pull that never finished, untouched for 8 days" in " ".join(out.split())
    assert out.splitlines()[-1].endswith("would be freed")
    assert half_pull.is_dir()
    out, _ = said(capsys, "gc", str(copy.parent), "--yes")
    assert out.splitlines()[-1].startswith("freed ")
    assert sorted(path.name for path in copy.parent.iterdir()) == ["copy.bank"]
    open_bank(copy)


def thesis(folder: Path) -> Path:
    """Somebody's folder whose folders have the names of a bank's."""
    for name in ("commits", "layers", "thesis"):
        (folder / name).mkdir(parents=True)
    (folder / "thesis/t.tex").write_text("x")
    (folder / "commits/0001.json").write_text('{"files": [{"path": "t.tex"}]}')
    return folder


@pytest.mark.parametrize("card", [None, "{broken", '{"attributes": {}}', "{" + " " * 2**24 + "}"])
def test_folders_that_are_no_bank_are_neither_removed_nor_collected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], card: str | None
) -> None:
    proj = thesis(tmp_path / "team/proj")
    if card is not None:
        (proj / "zarr.json").write_text(card)
    make_old(proj)
    assert f"no bank at {proj}: " in said(capsys, "rm", str(proj), "--yes", status=1)[1]
    assert collected(capsys, proj.parent, "--extractions") == {}
    assert find_stored_garbage(Elsewhere(proj.parent), Limits(), tmp_path) == []
    with pytest.raises(BankNotFound, match="no bank at s3://team/proj"):
        stored_doomed(Elsewhere(proj), tmp_path)
    assert (proj / "thesis/t.tex").is_file()


def test_a_bank_of_a_newer_format_is_left_alone(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads((copy / "zarr.json").read_text())
    card["attributes"]["patchbank_format"] = 2
    (copy / "zarr.json").write_text(json.dumps(card))
    (copy / f".work/{'a' * 32}").mkdir(parents=True)
    make_old(copy)
    assert collected(capsys, copy.parent, "--extractions") == {}
    (copy / "seal.json").unlink()
    make_old(copy)
    assert collected(capsys, copy.parent, "--extractions") == {}
    assert find_stored_garbage(Elsewhere(copy.parent), Limits(), tmp_path) == []
    err = said(capsys, "rm", str(copy), "--yes", status=1)[1]
    assert "bank format 2" in err
    assert "pip install --upgrade patchbank" in err


@pytest.mark.parametrize("card", [None, "{broken"])
def test_a_bank_whose_card_is_damaged_goes_by_its_commit_records(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], card: str | None
) -> None:
    (copy / "zarr.json").unlink()
    if card is not None:
        (copy / "zarr.json").write_text(card)
    assert stored_doomed(Elsewhere(copy), tmp_path).clips == "an unknown number of"
    assert f"`patchbank bank rm {copy}`" in said(capsys, "verify", str(copy), status=1)[1]
    assert "(an unknown number of clips)" in said(capsys, "rm", str(copy), "--dry-run")[0]
    said(capsys, "rm", str(copy), "--yes")
    assert not copy.exists()


def test_a_push_that_died_before_its_card_was_sent_is_removable(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one.bank", "two.bank"):
        take(FolderStore(tmp_path / name), sealed)
    assert stored_doomed(Elsewhere(tmp_path / "one.bank"), tmp_path).clips == "an unknown number of"
    said(capsys, "rm", str(tmp_path / "one.bank"), "--yes")
    make_old(tmp_path / "two.bank")
    ((reason, gone),) = collected(capsys, tmp_path).values()
    assert reason.startswith("a push that never finished")
    assert gone


def test_files_of_something_else_keep_a_bank_from_being_removed(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "my_results.csv").write_text("x")
    (copy / "run").mkdir()
    err = said(capsys, "rm", str(copy), "--yes", status=1)[1]
    assert f"{copy} holds my_results.csv and 1 more, which no bank has; move that elsewhere" in err
    (copy / "seal.json").unlink()
    make_old(copy)
    assert collected(capsys, copy.parent) == {}
    (copy / "run").rmdir()
    (copy / "my_results.csv").rename(copy.parent / "my_results.csv")
    local_doomed(copy, copy.parent)
    (copy / "late.csv").touch()
    with pytest.raises(PatchbankError, match=r"holds late\.csv, which no bank has"):
        remove_local(copy)
    (copy / "late.csv").unlink()
    remove_local(copy)
    assert [path.name for path in copy.parent.iterdir()] == ["my_results.csv"]


def test_a_file_of_something_else_that_came_after_the_listing_stays(half_pull: Path) -> None:
    (found,) = find_garbage(half_pull.parent, Limits())
    (half_pull / "mine.csv").touch()
    make_old(half_pull)
    assert found.remove is not None
    assert not found.remove()
    assert (half_pull / "mine.csv").exists()


def test_a_pull_of_a_part_that_was_killed_is_named_and_what_it_has_fetched_goes(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "seal.json").unlink()
    (copy / "parts").mkdir()
    staged = copy.with_name(f".copy.bank.pull-{'c' * 16}")
    (staged / ".work").mkdir(parents=True)
    (staged / "whole").mkdir()
    (staged / "whole/rows").write_bytes(b"x" * 1_000)
    with held(staged / ".work/seal.lock"):
        make_old(copy.parent)
        assert collected(capsys, copy.parent, "--extractions") == {}
        err = said(capsys, "rm", str(copy), "--yes", status=1)[1]
        assert f"a pull of a part works on {copy} now; stop it first" in err
    make_old(copy.parent)
    found = collected(capsys, copy.parent)
    assert found[staged.name] == (
        "fetched for a partial pull that never finished, untouched for 8 days", True
    )  # fmt: skip
    # The same pull goes on with it, and fetches what it lacks.
    reason, gone = found["copy.bank"]
    assert "the same command goes on with it; --extractions removes it" in reason
    assert not gone
    assert [path.name for path in copy.parent.iterdir()] == ["copy.bank"]


def test_gc_keeps_what_is_young_pinned_or_worked_on(
    half_pull: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = half_pull.parent
    with held(half_pull / ".work/seal.lock") as puller:
        assert collected(capsys, folder, "--older-than", "0s") == {}
        assert (
            "a pull or one that seals, works on"
            in said(capsys, "rm", str(half_pull), "--yes", status=1)[1]
        )
        puller.send_signal(signal.SIGKILL)
        puller.wait()
    os.utime(half_pull / ".work/pull")
    assert collected(capsys, folder) == {}
    make_old(half_pull)
    (half_pull / "notes").mkdir()
    (half_pull / "notes/pinned").touch()
    make_old(half_pull)
    assert collected(capsys, folder) == {}
    shutil.rmtree(half_pull / "notes")
    make_old(half_pull)
    assert list(collected(capsys, folder)) == ["half.bank"]
    assert not half_pull.exists()


def test_what_comes_to_life_after_it_was_listed_stays(half_pull: Path) -> None:
    (found,) = find_garbage(half_pull.parent, Limits())
    assert found.remove is not None
    with held(half_pull / ".work/seal.lock"):
        assert not found.remove()
    os.utime(half_pull / ".work")
    assert not found.remove()
    make_old(half_pull)
    assert found.remove()
    assert not half_pull.exists()


def test_an_interrupted_extraction_is_named_and_goes_only_when_asked(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "seal.json").unlink()
    (copy / "parts").mkdir()
    make_old(copy)
    ((reason, gone),) = collected(capsys, copy.parent).values()
    assert "was interrupted, untouched for 8 days: the same command goes on with it" in reason
    assert not gone
    attempt = copy / f".work/00001.{'a' * 32}"
    attempt.mkdir(parents=True)
    with held(attempt / "lock"):
        make_old(copy)
        assert collected(capsys, copy.parent, "--extractions") == {}
    make_old(copy)
    ((_, gone),) = collected(capsys, copy.parent, "--extractions").values()
    assert gone
    assert not copy.exists()


def test_removals_cut_short_and_beginnings_of_banks_go_after_an_hour(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doomed = copy.with_name(f".gone.bank.{'b' * 32}")
    shutil.copytree(copy / "layers", doomed / "layers")
    staged = copy.with_name(f".cut.bank.pull-{'c' * 16}")
    (staged / ".work").mkdir(parents=True)
    assert collected(capsys, copy.parent) == {}
    make_old(doomed, 7_200)
    make_old(staged, 7_200)
    assert [*collected(capsys, copy.parent)] == [doomed.name]
    make_old(staged)
    assert [*collected(capsys, copy.parent)] == [staged.name]
    assert [path.name for path in copy.parent.iterdir()] == ["copy.bank"]


def test_drafts_and_dead_attempts_go_and_the_bank_stays_whole(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drafts = [copy.parent / ".work", copy / ".work"]
    for folder in drafts:
        folder.mkdir()
        for letter in "def":
            (folder / f"put.{letter * 32}").write_bytes(b"x" * 1_000)
        os.utime(folder / f"put.{'d' * 32}", (0, 0))
        os.utime(folder / f"put.{'e' * 32}", (0, 0))
    attempt = copy / f".work/00001.{'a' * 32}"
    attempt.mkdir(parents=True)
    (attempt / "rows").write_bytes(b"x" * 2_000)
    with held(drafts[0] / f"put.{'e' * 32}"), held(attempt / "lock"):
        found = collected(capsys, copy.parent)
        assert sorted(found) == [".work", "copy.bank/.work"]
        assert all(gone for _, gone in found.values())
        # One is being written, the other was just now.
        assert sorted(path.name[4] for path in drafts[0].iterdir()) == ["e", "f"]
        assert attempt.is_dir()
    found = collected(capsys, copy.parent)
    assert found["copy.bank/.work"] == ("work of processes that died", True)
    assert [path.name[4] for path in drafts[1].glob("put.*")] == ["f"]
    assert said(capsys, "verify", str(copy))[0] == f"{copy}: whole\n"


def test_a_growth_that_was_broken_off_is_named_and_one_that_is_whole_is_let_be(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = copy / ".work/next"
    work.mkdir(parents=True)
    shutil.copy(copy / "zarr.json", work)
    make_old(copy)
    ((reason, gone),) = collected(capsys, copy.parent).values()
    assert "the bank itself is whole" in reason
    assert not gone
    shutil.copy(copy / "seal.json", work)
    make_old(copy)
    assert collected(capsys, copy.parent, "--extractions") == {}
    (copy / "seal.json").unlink()
    make_old(copy)
    # Killed while its files were moved in: the next who opens it for growing finishes that.
    assert collected(capsys, copy.parent, "--extractions") == {}
    shutil.copy(work / "seal.json", copy)
    (work / "seal.json").rename(work / ".work.seal")
    make_old(copy)
    assert all(gone for _, gone in collected(capsys, copy.parent, "--extractions").values())
    open_bank(copy)


def test_a_push_to_a_share_that_never_finished_goes(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = copy.with_name("pushed.bank")
    shutil.copytree(copy, half, ignore=shutil.ignore_patterns("seal.json"))
    (half / ".work").mkdir()
    draft = half / f".work/put.{'d' * 32}"
    with held(draft):
        make_old(half)
        assert collected(capsys, copy.parent) == {}
        assert "a push writes to" in said(capsys, "rm", str(half), "--yes", status=1)[1]
    found = collected(capsys, copy.parent)
    assert found["pushed.bank"][0].startswith("a push that never finished")
    assert not half.exists()


def test_gc_of_a_store_removes_old_half_pushes_only(
    sealed: Bank, copy: Path, tmp_path: Path
) -> None:
    team = tmp_path / "team"
    write_listed(sealed, team / "whole.bank")
    for name in ("old.bank", "young.bank"):
        shutil.copytree(copy, team / name, ignore=shutil.ignore_patterns("seal.json"))
    (team / "thesis").mkdir()
    (team / "thesis/zarr.json").write_text("{}")
    make_old(team)
    os.utime(team / "young.bank/zarr.json")
    store = Elsewhere(team)
    (found,) = find_stored_garbage(store, Limits(), tmp_path)
    assert found.place == "s3://team/old.bank"
    assert found.reason == "a push that never finished, untouched for 8 days"
    assert found.remove is not None
    (team / "old.bank/layers/1/extra").write_text("x")
    assert not found.remove()
    (team / "old.bank/layers/1/extra").unlink()
    assert found.remove()
    assert sorted(path.name for path in team.iterdir()) == ["thesis", "whole.bank", "young.bank"]


def test_where_a_store_tells_no_ages_half_pushes_are_only_named(copy: Path, tmp_path: Path) -> None:
    class Ageless(Elsewhere):
        newest_s = None  # type: ignore[assignment]

    (copy / "seal.json").unlink()
    (found,) = find_stored_garbage(Ageless(tmp_path), Limits(), tmp_path)
    assert found.remove is None
    assert "`patchbank bank rm s3://team/copy.bank` removes it" in found.reason


def test_rm_at_a_store_takes_the_seal_first_and_the_entry_last(copy: Path, tmp_path: Path) -> None:
    order: list[str] = []

    class Told(Elsewhere):
        def remove(self, names: list[str]) -> None:
            order.extend(names)
            super().remove(names)

    enter(FolderStore(tmp_path), "copy.bank", entry_of(open_bank(copy)))
    (copy / "mine.txt").write_text("no file of a bank")
    store = Told(tmp_path)
    bank = store.below("copy.bank")
    doomed = stored_doomed(bank, tmp_path)
    assert (doomed.clips, doomed.place) == ("40", "s3://team/copy.bank")
    remove_stored(bank, of=(store, "copy.bank"))
    assert order[0] == "seal.json"
    assert order[-2] == "zarr.json"
    assert order[-1].startswith("catalogue/copy.bank@")
    assert [path.name for path in copy.iterdir()] == ["mine.txt"]
    assert read_catalogue(FolderStore(tmp_path))[0].entry is None
    with pytest.raises(BankNotFound, match=r"no bank at s3://team/copy.bank"):
        stored_doomed(bank, tmp_path)


def test_rm_says_what_it_would_free_and_takes_the_entry_too(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(FolderStore(copy.parent), "copy.bank", entry_of(open_bank(copy)))
    out, _ = said(capsys, "rm", str(copy), "--dry-run")
    assert out.startswith(f"would remove {copy} (40 clips) and free ")
    assert copy.is_dir()
    said(capsys, "rm", str(copy), "--yes")
    assert list((copy.parent / "catalogue").glob("*")) == []
    assert json.loads((copy.parent / "catalogue.json").read_text())["entries"] == []


def test_rm_removes_the_pull_that_pull_says_to_remove(
    half_pull: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "rm", str(half_pull), "--yes")
    assert not half_pull.exists()


def test_a_pinned_bank_stays_until_the_pin_goes(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(capsys, "pin", str(copy))[0] == f"pinned {copy}\n"
    err = said(capsys, "rm", str(copy), "--yes", status=1)[1]
    assert f"is pinned; if it may go, `patchbank bank pin {copy} --remove` first" in err
    assert said(capsys, "verify", str(copy))[0] == f"{copy}: whole\n"
    assert said(capsys, "pin", str(copy), "--remove")[0] == f"unpinned {copy}\n"
    said(capsys, "rm", str(copy), "--yes")
    assert not copy.exists()
    assert "only a finished bank can be pinned" in said(capsys, "pin", str(copy), status=1)[1]


def test_a_bank_elsewhere_is_pinned_in_the_cache(copy: Path, tmp_path: Path) -> None:
    bank, cache = Elsewhere(copy), tmp_path / "cache"
    assert not is_pinned(bank, cache)
    set_pin(bank, cache, pinned=True)
    folder = bank_folder(cache, open_bank(copy).root_sha256)
    assert (folder / "pinned").is_file()
    assert (folder / "url").read_text() == "s3://team/copy.bank"
    assert is_pinned(bank, cache)
    with pytest.raises(PatchbankError, match="is pinned"):
        stored_doomed(bank, cache)
    set_pin(bank, cache, pinned=False)
    assert not is_pinned(bank, cache)
    (copy / "seal.json").unlink()
    with pytest.raises(BankIncomplete, match="only a finished bank"):
        set_pin(bank, cache, pinned=True)


def fill_cache(cache: Path, root: str, *, n_bytes: int, idle_s: float) -> Path:
    shard = bank_folder(cache, root * 64) / "layers/1/patches/c.0.0.0"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(os.urandom(n_bytes))
    make_old(shard.parents[3], idle_s)
    return shard


def test_the_cache_shrinks_to_its_limit_or_is_emptied_but_for_pins_and_what_is_in_use(
    tmp_path: Path,
) -> None:
    cache = tmp_path / "cache"
    settings = ShareSettings(cache=cache, cache_limit_bytes=2**20)
    old = fill_cache(cache, "a", n_bytes=2**20, idle_s=9_000)
    pinned = fill_cache(cache, "b", n_bytes=2**16, idle_s=9_000)
    (bank_folder(cache, "b" * 64) / "pinned").touch()
    used = fill_cache(cache, "c", n_bytes=2**19, idle_s=10)
    record = cache / "pushes/x.jsonl"
    record.parent.mkdir()
    record.touch()
    (over,) = find_cached_garbage(settings, Limits(), everything=False)
    assert "beyond its limit" in over.reason
    assert 2**19 <= over.n_bytes < 2**20
    assert over.remove is not None
    assert over.remove()
    assert [path.exists() for path in (old, pinned, used)] == [False, True, True]
    old = fill_cache(cache, "d", n_bytes=2**16, idle_s=9_000)
    os.utime(record, (0, 0))
    found = list(find_cached_garbage(settings, Limits(), everything=True))
    assert sum("rows in the cache" in each.reason for each in found) == 2
    assert all(each.remove is not None and each.remove() for each in found)
    assert [path.exists() for path in (old, pinned, used)] == [False, True, True]
    assert not record.exists()


def test_without_anybody_to_ask_nothing_goes(half_pull: Path, copy: Path) -> None:
    from typer.testing import CliRunner

    from patchbank.cli.main import app

    for line in (["gc", str(copy.parent)], ["rm", str(copy)]):
        done = CliRunner().invoke(app, ["bank", *line], input="")
        assert done.exit_code == 1
        assert "nothing removed; --yes removes without a question" in done.output
    done = CliRunner().invoke(app, ["bank", "gc", str(copy.parent)], input="n\n")
    assert done.exit_code == 1
    assert half_pull.exists()
    assert copy.exists()
    done = CliRunner().invoke(app, ["bank", "gc", str(copy.parent)], input="y\n")
    assert (done.exit_code, half_pull.exists()) == (0, False)


def test_gc_names_an_age_that_is_none(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        "is no age; write 30m, 12h or 7d"
        in said(capsys, "gc", str(copy), "--older-than", "week", status=2)[1]
    )


def test_a_store_that_can_only_be_read_is_not_cleaned(copy: Path) -> None:
    class ReadOnly(Elsewhere):
        is_writable = False

    with pytest.raises(StoreError, match="can only be read"):
        find_stored_garbage(ReadOnly(copy.parent), Limits(), copy)
    with pytest.raises(StoreError, match="can only be read"):
        stored_doomed(ReadOnly(copy), copy)


def test_gc_waits_for_nobody_who_owns_a_bank(half_pull: Path) -> None:
    (found,) = find_garbage(half_pull.parent, Limits())
    assert found.remove is not None
    with owning(half_pull):
        assert not found.remove()


@pytest.mark.slow
def test_a_pull_that_is_killed_is_kept_while_it_lives_and_goes_when_it_is_dead(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half.bank"
    process = begin(pull, str(sealed.path), half, sealed.seal.bank_bytes / 30)
    end_s = time.monotonic() + 60
    while not (half / ".work/pull.seal.json").is_file():
        assert process.is_alive()
        assert time.monotonic() < end_s
        time.sleep(0.01)
    assert collected(capsys, tmp_path, "--older-than", "0s") == {}
    assert process.is_alive()
    kill(process)
    assert collected(capsys, tmp_path) == {}
    ((reason, gone),) = collected(capsys, tmp_path, "--older-than", "0s").values()
    assert reason.startswith("a pull that never finished, untouched for less than a minute")
    assert gone
    assert not half.exists()


def test_a_bucket_is_listed_cleaned_and_emptied(
    s3_bucket: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from patchbank.pipeline.sharing.push import push_bank
    from patchbank.pipeline.sharing.stores import open_store

    place = f"{s3_bucket}/banks"
    banks = open_store(place)
    for name in ("whole.bank", "half.bank"):
        push_bank(copy, banks.below(name))
    enter(banks, "whole.bank", entry_of(open_bank(copy), data="esc50"))
    banks.below("half.bank").remove(["seal.json"])
    out, err = said(capsys, "ls", place, "--data", "esc50")
    assert out.startswith("whole.bank ")
    assert "1 not in the catalogue" in err
    said(capsys, "gc", place, "--yes")
    assert "half.bank" in banks.folders()
    out, _ = said(capsys, "gc", place, "--yes", "--older-than", "0s")
    assert "a push that never finished" in " ".join(out.split())
    assert list(banks.folders()) == ["catalogue", "whole.bank"]
    said(capsys, "pin", f"{place}/whole.bank")
    assert "is pinned" in said(capsys, "rm", f"{place}/whole.bank", "--yes", status=1)[1]
    said(capsys, "pin", f"{place}/whole.bank", "--remove")
    out, _ = said(capsys, "rm", f"{place}/whole.bank", "--dry-run")
    assert out.startswith(f"would remove {place}/whole.bank (40 clips) and free ")
    said(capsys, "rm", f"{place}/whole.bank", "--yes")
    assert list(banks.sizes()) == ["catalogue.json"]
    assert "no bank at" in said(capsys, "rm", f"{place}/whole.bank", "--yes", status=1)[1]


def test_only_uploads_in_parts_of_banks_are_abandoned(
    s3_bucket: str, copy: Path, tmp_path: Path
) -> None:
    from patchbank.pipeline.sharing.s3_client import connect
    from patchbank.pipeline.sharing.stores import open_store

    bucket = s3_bucket.removeprefix("s3://")
    client = connect()
    shard = "layers/1/patches/c.0.0.0"
    others = ["videos/holiday.mkv", f"videos/{shard}", f"gone.bank/{shard}", "x.bank/holiday.mkv"]
    for key in (f"x.bank/{shard}", *others):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    client.put_object(Bucket=bucket, Key="videos/layers/old.mkv", Body=b"x")
    client.put_object(Bucket=bucket, Key="x.bank/zarr.json", Body=(copy / "zarr.json").read_bytes())
    banks = open_store(s3_bucket)

    def uploads(limits: Limits) -> list[Garbage]:
        found = find_stored_garbage(banks, limits, tmp_path)
        return [each for each in found if "never completed" in each.reason]

    assert uploads(Limits()) == []
    (found,) = uploads(Limits(older_than_s=0))
    assert found.place == f"x.bank/{shard}"
    assert found.remove is not None
    assert found.remove()
    assert uploads(Limits(older_than_s=0)) == []
    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert sorted(each["Key"] for each in left) == sorted(others)
