"""Push and pull over a folder: the same code as for every store, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fake_bank import SETTINGS

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import (
    BankCorrupt,
    BankError,
    BankIncomplete,
    BankMismatch,
    BankNotFound,
    StoreError,
)
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.pull import PULLING, plan_pull, pull_bank
from patchbank.pipeline.sharing.push import plan_push, push_bank
from patchbank.pipeline.sharing.push_record import PushRecord
from patchbank.pipeline.sharing.transfer import Throttle


@pytest.fixture
def there(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "team" / "x.bank")


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_bank_that_was_pushed_and_pulled_is_the_same_to_the_byte(
    sealed: Bank, there: FolderStore, tmp_path: Path
) -> None:
    pushed = push_bank(sealed.path, there, notes={"notes/README.md": b"# about\n"})
    pulled = pull_bank(there, tmp_path / "here.bank")
    assert pushed.n_bytes == sealed.seal.bank_bytes
    own, found = files_of(sealed.path), files_of(pulled.path)
    assert found.pop("notes/README.md") == b"# about\n"
    assert found == own
    assert files_of(there.folder).keys() == {*own, "notes/README.md"}
    assert verify_bank(pulled.path) == ()


def test_what_is_there_is_neither_sent_nor_fetched_again(
    sealed: Bank, there: FolderStore, tmp_path: Path
) -> None:
    push_bank(sealed.path, there)
    pull_bank(there, tmp_path / "here.bank")
    moved: list[int] = []
    assert push_bank(sealed.path, there).n_files == 0
    pull_bank(there, tmp_path / "here.bank", progress=lambda done, total: moved.append(done))
    assert moved == []


def test_half_a_push_is_no_bank_and_goes_on(
    sealed: Bank, there: FolderStore, tmp_path: Path
) -> None:
    push_bank(sealed.path, there)
    (there.folder / "seal.json").unlink()
    shard = there.folder / sealed.array(sealed.layers[-1]).shard_path(0)
    wrong = there.folder / "clips.parquet"
    shard.unlink()
    wrong.write_bytes(bytes(wrong.stat().st_size))
    with pytest.raises(BankIncomplete, match="its push has not finished"):
        pull_bank(there, tmp_path / "here.bank")
    plan = plan_push(sealed, there, PushRecord(None))
    assert [file.path for file in plan.send] == [shard.relative_to(there.folder).as_posix()]
    assert [file.path for file in plan.replace] == ["clips.parquet"]
    push_bank(sealed.path, there)
    assert verify_bank(there.folder) == ()


def test_a_record_of_what_arrived_saves_reading_it_back(
    sealed: Bank, there: FolderStore, tmp_path: Path
) -> None:
    push_bank(sealed.path, there)
    (there.folder / "seal.json").unlink()
    record = PushRecord.of(tmp_path / "cache", there.url, sealed.root_sha256)
    plan_push(sealed, there, record)
    read: list[int] = []
    again = PushRecord.of(tmp_path / "cache", there.url, sealed.root_sha256)
    assert plan_push(sealed, there, again, progress=lambda n, _: read.append(n)).send == ()
    assert read == []
    push_bank(sealed.path, there, record=again)
    assert list((tmp_path / "cache" / "pushes").iterdir()) == []


def test_a_record_with_half_a_line_is_read(sealed: Bank, tmp_path: Path) -> None:
    record = PushRecord.of(tmp_path, "s3://a/b", sealed.root_sha256)
    file = next(iter(sealed.seal.files.values()))
    record.note(file)
    path = next((tmp_path / "pushes").iterdir())
    path.write_bytes(path.read_bytes() + b'{"path": "zarr.js')
    assert PushRecord.of(tmp_path, "s3://a/b", sealed.root_sha256).has(file)


def test_another_bank_is_never_overwritten(
    sealed: Bank, made: Bank, there: FolderStore, tmp_path: Path
) -> None:
    push_bank(sealed.path, there)
    before = files_of(there.folder)
    with pytest.raises(BankMismatch, match="holds another bank than"):
        push_bank(made.path, there)
    (there.folder / "seal.json").unlink()
    with pytest.raises(BankMismatch, match="a part of another bank"):
        push_bank(made.path, there)
    assert files_of(there.folder) == {k: v for k, v in before.items() if k != "seal.json"}
    push_bank(sealed.path, there)
    other = FolderStore(tmp_path / "other.bank")
    push_bank(made.path, other)
    pull_bank(there, tmp_path / "here.bank")
    with pytest.raises(BankMismatch, match="is another bank than"):
        pull_bank(other, tmp_path / "here.bank")
    assert open_bank(tmp_path / "here.bank").root_sha256 == sealed.root_sha256


def test_a_folder_of_something_else_is_left_alone(
    sealed: Bank, there: FolderStore, tmp_path: Path
) -> None:
    there.folder.mkdir(parents=True)
    (there.folder / "thesis.tex").write_text("x")
    with pytest.raises(BankError, match=r"is no bank, and holds files of something else \(thesis"):
        push_bank(sealed.path, there)
    good = FolderStore(tmp_path / "good.bank")
    push_bank(sealed.path, good)
    with pytest.raises(BankError, match="exists and is no bank"):
        pull_bank(good, there.folder)
    assert list(files_of(there.folder)) == ["thesis.tex"]


def test_a_place_without_a_bank_is_named(there: FolderStore, tmp_path: Path) -> None:
    with pytest.raises(BankNotFound, match=r"no bank at .*there is no seal\.json"):
        pull_bank(there, tmp_path / "here.bank")
    assert not (tmp_path / "here.bank").exists()


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bank, and the same one with more clips."""
    from audio_sets import write_clip_set

    from patchbank.pipeline.extraction import extract

    folder = tmp_path_factory.mktemp("grown")
    table = write_clip_set(folder / "set", n_clips=40)
    lines = table.read_text().splitlines(keepends=True)
    short = table.with_name("short.csv")
    short.write_text("".join(lines[:21]))
    extract(short, encoder="fake", out=folder / "x.bank", settings=SETTINGS)
    shutil.copytree(folder / "x.bank", folder / "old.bank")
    extract(table, encoder="fake", out=folder / "x.bank", settings=SETTINGS)
    return folder / "old.bank", folder / "x.bank"


def test_a_grown_bank_sends_and_fetches_its_new_shards_only(
    grown: tuple[Path, Path], there: FolderStore, tmp_path: Path
) -> None:
    old, new = map(open_bank, grown)
    push_bank(old.path, there)
    here = pull_bank(there, tmp_path / "here.bank")
    plan = plan_push(new, there, PushRecord(None))
    kept = {name for name in old.seal.files if old.seal.files[name] == new.seal.files.get(name)}
    tokens = {name for name in kept if "/patches/c." in name or "/prefix/c." in name}
    assert tokens
    assert not kept & {file.path for file in (*plan.send, *plan.replace)}
    push_bank(new.path, there)
    assert not kept & {file.path for file in plan_pull(there, here.path).fetch}
    assert pull_bank(there, here.path).root_sha256 == new.root_sha256
    assert files_of(here.path) == files_of(new.path)
    with pytest.raises(BankMismatch, match="which it has grown from; pull it"):
        push_bank(old.path, there)


def test_a_bank_that_grew_beyond_the_store_is_not_cut(
    grown: tuple[Path, Path], there: FolderStore, tmp_path: Path
) -> None:
    push_bank(grown[0], there)
    here = tmp_path / "here.bank"
    shutil.copytree(grown[1], here)
    with pytest.raises(BankMismatch, match=r"holds more than .* push it"):
        pull_bank(there, here)


def test_a_pull_that_was_begun_goes_on_with_the_grown_bank(
    grown: tuple[Path, Path], there: FolderStore, tmp_path: Path
) -> None:
    old, new = map(open_bank, grown)
    push_bank(old.path, there)
    here = pull_bank(there, tmp_path / "here.bank").path
    (here / "seal.json").rename(here / "held")
    (here / ".work").mkdir()
    (here / "held").rename(here / PULLING)
    (here / "zarr.json").unlink()
    push_bank(new.path, there)
    kept = {name for name, file in old.seal.files.items() if new.seal.files.get(name) == file}
    assert kept
    assert not kept & {file.path for file in plan_pull(there, here).fetch}
    pull_bank(there, here)
    assert files_of(here) == files_of(new.path)


def test_bytes_that_are_not_the_sealed_ones_are_not_kept(
    sealed: Bank, there: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchbank.pipeline.sharing.transfer.FIRST_WAIT_S", 0.01)
    push_bank(sealed.path, there)
    name = sealed.array(sealed.layers[-1]).shard_path(0)
    content = bytearray((there.folder / name).read_bytes())
    content[100] ^= 1
    (there.folder / name).write_bytes(content)
    here = tmp_path / "here.bank"
    with pytest.raises(BankCorrupt, match=rf"{name} has SHA-256 .*pushes it again"):
        pull_bank(there, here)
    assert not (here / name).exists()
    assert not (here / "seal.json").exists()
    (there.folder / name).write_bytes((sealed.path / name).read_bytes())
    assert verify_bank(pull_bank(there, here).path) == ()


def test_a_damaged_bank_is_not_pushed(copy: Path, there: FolderStore) -> None:
    bank = open_bank(copy)
    shard = copy / bank.array(bank.layers[-1]).shard_path(0)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match="what arrived has SHA-256"):
        push_bank(copy, there)
    assert not (there.folder / "seal.json").exists()


def test_a_throttle_keeps_to_its_speed() -> None:
    import time

    throttle = Throttle(1_000_000)
    start = time.monotonic()
    for _ in range(10):
        throttle(20_000)
    assert time.monotonic() - start >= 0.19


def test_notes_travel_only_if_they_are_small_and_known(
    copy: Path, there: FolderStore, tmp_path: Path
) -> None:
    notes = copy / "notes"
    (notes / "measured").mkdir(parents=True, exist_ok=True)
    (notes / "measured" / "labels-last.json").write_text("{}")
    (notes / "measured" / "large.json").write_bytes(b" " * (2**20 + 1))
    (notes / "measured" / "link.json").symlink_to("/etc/hostname")
    (notes / "measured" / "con.json").write_text("{}")
    (notes / "profile.json").write_text("{}")
    (notes / "clip.wav").write_bytes(b"RIFF")
    push_bank(copy, there)
    sent = sorted(there.below("notes").sizes())
    assert sent == ["measured/labels-last.json"]
    (there.folder / "notes" / "evil.py").write_text("raise SystemExit")
    (there.folder / "notes" / "measured" / "big.json").write_bytes(b" " * (2**20 + 1))
    said: list[str] = []
    here = pull_bank(there, tmp_path / "here.bank", say=said.append).path
    assert sorted(FolderStore(here / "notes").sizes()) == sent
    assert len(said) == 1
    assert "without notes/measured/big.json" in said[0]
