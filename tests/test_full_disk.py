"""A disk that is full, at any moment, and a disk that cannot be written: small real ones."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_banks import check_finished, committed_files, n_committed
from fake_bank import SETTINGS

from patchbank.pipeline import plan, shard, shard_rows
from patchbank.pipeline.bank import Bank, commit, growth, open_bank, seal
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import PatchbankError
from patchbank.pipeline.extraction import extract

NO_SPACE = "no space left for {}: free some and run the same command again; what is committed is "
ENOUGH = "64m"


class Disk:
    """A tmpfs of its own size."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def resize(self, size: str) -> None:
        subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(self.place)], check=True, timeout=30
        )

    def fill(self) -> None:
        """Takes every free byte."""
        with (self.place / "filler").open("ab", buffering=0) as file:
            for n_bytes in (2**20, 2**12, 1):
                try:
                    while file.write(bytes(n_bytes)) == n_bytes:
                        pass
                except OSError:
                    pass

    def clear(self) -> None:
        (self.place / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={ENOUGH}", "tmpfs", str(place)]
    _mount(line)
    try:
        yield Disk(place)
    finally:
        _unmount(place)


def _mount(line: list[str]) -> None:
    made = subprocess.run(line, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs the right to mount: {made.stderr.strip()}")


def _unmount(place: Path) -> None:
    # A lazy one: what a failing test still holds open does not keep the mount.
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets an extraction begin on a disk that it knows to be too small."""
    monkeypatch.setattr(plan, "SPARE_BYTES", -(2**40))


def attempt(table: Path, out: Path) -> str | None:
    """Extracts; the error where it is one that was raised on purpose."""
    try:
        extract(table, encoder="fake", out=out, settings=SETTINGS, audio_root=table.parent)
    except PatchbankError as error:
        return str(error)
    return None


def assert_refused(error: str | None, out: Path) -> None:
    assert error is not None
    assert error.startswith(NO_SPACE.format(out))
    assert "\n" not in error
    assert not (out / "seal.json").exists()


def test_a_disk_that_grows_by_a_few_pages_at_a_time_ends_with_the_same_bank(
    disk: Disk, unplanned: None, clip_table: Path, sealed: Bank
) -> None:
    out, before, n_commits = disk.place / "x.bank", {}, []
    for n_kib in range(16, 4_096, 64):
        disk.resize(f"{n_kib}k")
        if (error := attempt(clip_table, out)) is None:
            break
        assert_refused(error, out)
        n_commits.append(n_committed(out))
        after = committed_files(out)
        assert {name: after.get(name) for name in before} == before
        before = after
    assert len(n_commits) >= 8
    assert len(set(n_commits)) >= 3
    after = committed_files(out)
    assert {name: after.get(name) for name in before} == before
    check_finished(out, (sealed.path / "seal.json").read_bytes())


@pytest.mark.parametrize(
    ("module", "function", "n_left"),
    [
        pytest.param(shard_rows, "part_table", 2, id="in the middle of a shard"),
        pytest.param(shard, "commit", 2, id="at a commit record"),
        pytest.param(commit, "fsync_folder", 2, id="after a commit record"),
        pytest.param(seal, "assemble", 0, id="while the rows are gathered"),
        pytest.param(seal, "write_seal", 0, id="at the seal"),
    ],
)
def test_a_disk_that_somebody_else_fills_stops_an_extraction_in_order(
    module: object,
    function: str,
    n_left: int,
    disk: Disk,
    clip_table: Path,
    sealed: Bank,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, real, n_calls = disk.place / "x.bank", getattr(module, function), [0]

    def filling(*args: object, **kwargs: object) -> object:
        n_calls[0] += 1
        if n_calls[0] == (2 if n_left else 1):
            disk.resize("16m")
            disk.fill()
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "SPARE_BYTES", 0)
        patch.setattr(module, function, filling)
        assert_refused(attempt(clip_table, out), out)
    before = committed_files(out)
    # Still full, though the attempts that failed gave their space back: the same sentence, and
    # nothing is lost.
    disk.fill()
    with monkeypatch.context() as patch:
        patch.setattr(plan, "SPARE_BYTES", -(2**40))
        assert_refused(attempt(clip_table, out), out)
    assert committed_files(out) == before
    disk.resize("128m")
    extract(clip_table, encoder="fake", out=out, settings=SETTINGS)
    after = committed_files(out)
    assert {name: after.get(name) for name in before} == before
    check_finished(out, (sealed.path / "seal.json").read_bytes())


def test_a_disk_without_inodes_is_full(
    unplanned: None, clip_table: Path, sealed: Bank, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    _mount(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=20", "tmpfs", str(place)])
    try:
        out = place / "x.bank"
        for n_inodes in range(20, 400, 13):
            options = f"remount,size=64m,nr_inodes={n_inodes}"
            subprocess.run(["mount", "-o", options, str(place)], check=True, timeout=30)
            if (error := attempt(clip_table, out)) is None:
                break
            assert_refused(error, out)
        assert n_inodes > 60
        check_finished(out, (sealed.path / "seal.json").read_bytes())
    finally:
        _unmount(place)


def test_a_growth_on_a_full_disk_leaves_the_old_bank_and_ends_later(
    disk: Disk, clip_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, *rows = clip_table.read_text().splitlines(keepends=True)
    shutil.copytree(clip_table.parent, tmp_path / "set")
    short, long = tmp_path / "set/short.csv", tmp_path / "set/clips.csv"
    short.write_text("".join([head, *rows[:20]]))
    undisturbed, out = tmp_path / "y.bank", disk.place / "x.bank"
    monkeypatch.setattr(plan, "SPARE_BYTES", 0)
    for bank in (undisturbed, out):
        assert attempt(short, bank) is None
    old = (out / "seal.json").read_bytes()
    assert attempt(long, undisturbed) is None
    for module, function in ((shard, "commit"), (growth, "gather"), (growth, "write_seal")):
        real = getattr(module, function)

        def filling(*args: object, real: Callable[..., object] = real, **kwargs: object) -> object:
            disk.resize("16m")
            disk.fill()
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, function, filling)
            error = attempt(long, out)
        assert error is not None
        assert error.startswith(NO_SPACE.format(out))
        assert (out / "seal.json").read_bytes() == old
        assert verify_bank(out) == ()
        disk.resize(ENOUGH)
        disk.clear()
    assert attempt(long, out) is None
    check_finished(out, (undisturbed / "seal.json").read_bytes())


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    disk: Disk, clip_table: Path
) -> None:
    disk.resize("512k")
    error = attempt(clip_table, disk.place / "x.bank")
    assert error is not None
    assert re.search(r"x\.bank needs 64\.\d MiB more, 512 KiB are free there; choose fewer", error)
    assert list(disk.place.iterdir()) == []


@pytest.fixture
def read_only(sealed: Bank, tmp_path: Path) -> Iterator[Path]:
    """A sealed bank at another path, on a disk that cannot be written."""
    writable, place = tmp_path / "writable", tmp_path / "read only"
    writable.mkdir()
    place.mkdir()
    shutil.copytree(sealed.path, writable / "fake.bank")
    _mount(["mount", "--bind", str(writable), str(place)])
    try:
        options = ["-o", "remount,ro,bind"]
        subprocess.run(["mount", *options, str(place)], check=True, timeout=30)
        yield place / "fake.bank"
    finally:
        _unmount(place)


def test_a_bank_on_a_read_only_disk_is_opened_verified_read_and_finished(
    read_only: Path, sealed: Bank, clip_table: Path
) -> None:
    from patchbank.probing import BatchLoader

    with pytest.raises(OSError, match="Read-only"):
        (read_only / "x").touch()
    before = {path: path.stat().st_mtime_ns for path in read_only.rglob("*")}
    bank = open_bank(read_only)
    assert bank.root_sha256 == sealed.root_sha256
    assert verify_bank(read_only) == ()
    rows = [row for batch in BatchLoader(bank, batch_size=16) for row in batch.rows.tolist()]
    assert sorted(rows) == list(range(40))
    again = extract(clip_table, encoder="fake", out=read_only, settings=SETTINGS)
    assert again.root_sha256 == sealed.root_sha256
    assert {path: path.stat().st_mtime_ns for path in read_only.rglob("*")} == before
    assert list(read_only.parent.iterdir()) == [read_only]
