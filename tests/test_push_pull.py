"""Push and pull over a folder: the same code as for every store, without a network."""

from __future__ import annotations

import _thread
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_bank import SETTINGS

from patchbank.cli.main import is_resumed
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
from patchbank.pipeline.sharing.claim import CLAIM, take
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.pull import PULLING, plan_pull, pull_bank
from patchbank.pipeline.sharing.push import push_bank
from patchbank.pipeline.sharing.push_plan import PushPlan, plan_push
from patchbank.pipeline.sharing.push_record import PushRecord
from patchbank.pipeline.sharing.transfer import Throttle, Traffic, in_parallel


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
    take(there, sealed)
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
    record.of_claim("one")
    record.note(file)
    path = next((tmp_path / "pushes").iterdir())
    path.write_bytes(path.read_bytes() + b'{"path": "zarr.js')
    again = PushRecord.of(tmp_path, "s3://a/b", sealed.root_sha256)
    again.of_claim("one")
    assert again.has(file)
    # Of a push that began after a removal.
    again.of_claim("two")
    assert not again.has(file)


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


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bank, Bank]:
    """Banks of one table and one recipe, whose audio differs: their cards are equal to the byte."""
    from audio_sets import write_clip_set

    from patchbank.pipeline.extraction import extract

    folder = tmp_path_factory.mktemp("twins")
    table = write_clip_set(folder / "set", n_clips=20)
    one = extract(table, encoder="fake", out=folder / "one.bank", settings=SETTINGS)
    recordings = sorted((folder / "set").rglob("*.wav"))
    shutil.copy(recordings[0], recordings[-1])
    other = extract(table, encoder="fake", out=folder / "other.bank", settings=SETTINGS)
    assert (one.path / "zarr.json").read_bytes() == (other.path / "zarr.json").read_bytes()
    assert one.root_sha256 != other.root_sha256
    return one, other


def test_of_two_banks_that_are_pushed_to_one_place_at_once_one_is_sealed(
    twins: tuple[Bank, Bank], tmp_path: Path
) -> None:
    for number in range(6):
        there = FolderStore(tmp_path / f"{number}.bank")
        plans = [plan_push(bank, there, PushRecord(None)) for bank in twins]
        together = threading.Barrier(2)

        def push(which: int, there: FolderStore = there, plans: list[PushPlan] = plans,
                 together: threading.Barrier = together) -> str:  # fmt: skip
            together.wait()
            try:
                push_bank(twins[which], there, plan=plans[which])
            except BankError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(2) as pool:
            said = list(pool.map(push, range(2)))
        assert sorted(map(bool, said)) == [False, True]
        assert "push" in max(said)
        assert verify_bank(there.folder) == ()
        assert open_bank(there.folder).root_sha256 == twins[said.index("")].root_sha256


def test_a_plan_that_is_out_of_date_overwrites_nothing(
    twins: tuple[Bank, Bank], there: FolderStore
) -> None:
    one, other = twins
    late = plan_push(other, there, PushRecord(None))
    push_bank(one, there)
    with pytest.raises(BankError, match="was pushed to or removed since this push began"):
        push_bank(other, there, plan=late)
    assert not (there.folder / CLAIM).exists()
    assert verify_bank(there.folder) == ()
    assert open_bank(there.folder).root_sha256 == one.root_sha256


def test_half_a_push_takes_no_file_of_another_bank(
    twins: tuple[Bank, Bank], there: FolderStore
) -> None:
    one, other = twins
    push_bank(one, there)
    (there.folder / "seal.json").unlink()
    take(there, one)
    with pytest.raises(BankMismatch, match=r"a push of another bank .* was broken off"):
        push_bank(other, there)
    push_bank(one, there)
    assert verify_bank(there.folder) == ()
    assert not (there.folder / CLAIM).exists()


def test_a_claim_that_is_damaged_or_empty_keeps_nobody_out_for_ever(
    sealed: Bank, there: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patchbank.pipeline.sharing.transfer.FIRST_WAIT_S", 0.01)
    (there.folder / CLAIM).parent.mkdir(parents=True)
    (there.folder / CLAIM).write_text("{}")
    with pytest.raises(StoreError, match="is damaged; if nobody pushes there, remove"):
        push_bank(sealed.path, there)
    (there.folder / CLAIM).write_text("")
    push_bank(sealed.path, there)
    assert verify_bank(there.folder) == ()


def test_a_bank_that_is_damaged_in_a_store_is_mended_by_a_push(
    sealed: Bank, there: FolderStore
) -> None:
    push_bank(sealed.path, there)
    lost, cut, flipped = (sealed.array(layer).shard_path(0) for layer in (1, 2, 1))
    flipped = sealed.array(1).shard_path(1)
    (there.folder / lost).unlink()
    (there.folder / cut).write_bytes(b"")
    content = bytearray((there.folder / flipped).read_bytes())
    content[50] ^= 1
    (there.folder / flipped).write_bytes(content)
    assert push_bank(sealed.path, there).n_files == 2
    assert len(verify_bank(there.folder)) > 0
    plan = plan_push(sealed, there, PushRecord(None), repair=True)
    assert [file.path for file in plan.replace] == [flipped]
    push_bank(sealed.path, there, plan=plan)
    assert verify_bank(there.folder) == ()


def test_a_push_again_keeps_what_others_noted(sealed: Bank, there: FolderStore) -> None:
    push_bank(sealed.path, there, notes={"notes/README.md": b"first"})
    push_bank(sealed.path, there, notes={"notes/README.md": b"second"})
    assert (there.folder / "notes/README.md").read_bytes() == b"first"


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
    with pytest.raises(BankCorrupt, match=rf"{name} has SHA-256 .*bank push BANK .* --repair"):
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


def test_an_error_and_ctrl_c_end_transfers_that_are_under_way() -> None:
    begun = threading.Event()

    def endless() -> None:
        traffic = Traffic(1, limit_bytes_per_s=1.0)
        while True:
            begun.set()
            traffic(1_000)

    def fails() -> None:
        begun.wait(30)
        raise StoreError("no")

    def interrupts() -> None:
        begun.wait(30)
        _thread.interrupt_main()

    for ends, error in ((fails, StoreError), (interrupts, KeyboardInterrupt)):
        begun.clear()
        with pytest.raises(error):
            in_parallel([endless, ends])


def test_the_line_that_goes_on_is_told_for_pushes_and_pulls() -> None:
    assert is_resumed(["bank", "push", "x.bank", "s3://team"])
    assert is_resumed(["bank", "pull", "x"])
    assert not is_resumed(["bank", "ls"])


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
