"""Banks in data sets of the Hugging Face hub, against a hub on this machine."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_dataset_hub import TOKEN, FakeDataSetHub, serving

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.bank.writer import FileRecord
from patchbank.pipeline.errors import BankNotFound, NotInStore, StoreError
from patchbank.pipeline.sharing import hub_store, transfer
from patchbank.pipeline.sharing.dataset_card import dataset_card
from patchbank.pipeline.sharing.hub_store import HubStore
from patchbank.pipeline.sharing.pull import pull_bank
from patchbank.pipeline.sharing.push import push_bank
from patchbank.pipeline.sharing.push_plan import plan_push
from patchbank.pipeline.sharing.push_record import PushRecord
from patchbank.pipeline.sharing.store import PIECE_BYTES, Upload
from patchbank.pipeline.sharing.stores import open_store

NAME = "team/banks"
URL = f"hf://datasets/{NAME}/x.bank"
# huggingface_hub sends large files in a way that its own client is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDataSetHub]:
    from huggingface_hub import close_session, constants

    for name in (*PROXIES, "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.01)
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
        close_session()


def upload(name: str, content: bytes) -> Upload:
    return Upload(content, FileRecord(name, len(content), hashlib.sha256(content).hexdigest()))


def put(store: HubStore, name: str, content: bytes) -> None:
    store.put(upload(name, content), lambda _: None)


def read(store: HubStore, name: str, start: int, stop: int) -> bytes:
    pieces = list(store.stream(name, start, stop))
    assert all(0 < len(piece) <= PIECE_BYTES for piece in pieces)
    return b"".join(pieces)


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_bank_comes_back_as_it_was_pushed(
    hub: FakeDataSetHub, sealed: Bank, tmp_path: Path
) -> None:
    store = open_store(URL)
    assert isinstance(store, HubStore)
    card = dataset_card(sealed, name="x.bank", url=store.url).encode()
    sent: list[int] = []
    push_bank(
        sealed.path,
        store,
        notes={"notes/README.md": card},
        progress=lambda done, _: sent.append(done),
    )
    assert sent[-1] == sealed.seal.bank_bytes
    assert hub.repositories[NAME].is_private
    there = hub.files(NAME)
    sealed_files = {f"x.bank/{name}" for name in (*sealed.seal.files, "seal.json")}
    assert set(there) == {*sealed_files, "x.bank/notes/README.md", "README.md", ".gitattributes"}
    assert there["README.md"] == card
    # The claim, the card, everything else, the notes, the page, the seal by itself, no claim more.
    assert len(hub.messages) == 7
    assert hub.messages[-2] == "Put seal.json into x.bank"
    pulled = pull_bank(open_store(URL), tmp_path / "here.bank")
    assert files_of(pulled.path) == files_of(sealed.path) | {"notes/README.md": card}
    assert verify_bank(pulled.path) == ()
    assert not hub.cdn_saw_token
    n_commits = len(hub.messages)
    assert push_bank(sealed.path, open_store(URL)).n_files == 0
    assert len(hub.messages) == n_commits


def test_a_push_that_was_killed_goes_on_and_sends_nothing_twice(
    hub: FakeDataSetHub, sealed: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "from patchbank.pipeline.sharing import hub_store\n"
        "from patchbank.pipeline.sharing.push import push_bank\n"
        "from patchbank.pipeline.sharing.stores import open_store\n"
        "from pathlib import Path\n"
        "hub_store.COMMIT_FILES = 12\n"
        f"push_bank(Path({str(sealed.path)!r}), open_store({URL!r}))\n"
    )
    n_commits = [0]

    def kill_third() -> None:
        n_commits[0] += 1
        if n_commits[0] == 3:
            process.send_signal(signal.SIGKILL)
            process.wait()

    hub.before_commit = kill_third
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"},
    )
    assert process.wait() == -signal.SIGKILL
    hub.before_commit = lambda: None
    before = hub.n_received
    assert 0 < before < sealed.seal.bank_bytes
    assert not any(name.endswith("seal.json") for name in hub.files(NAME))
    monkeypatch.setattr(hub_store, "COMMIT_FILES", 12)
    push_bank(sealed.path, open_store(URL))
    assert hub.files(NAME)["x.bank/seal.json"] == (sealed.path / "seal.json").read_bytes()
    # Equal files are sent once, whoever needs them.
    assert hub.n_received == sum(map(len, hub.large.values()))


def test_digests_of_the_hub_prove_large_files(hub: FakeDataSetHub, sealed: Bank) -> None:
    store = HubStore.open(URL)
    push_bank(sealed.path, store)
    hub.asked.clear()
    fresh = HubStore.open(URL)
    sizes = fresh.sizes()
    proofs = {name: fresh.proves(f, size=sizes[name]) for name, f in sealed.seal.files.items()}
    assert {proofs["clips.parquet"], proofs["zarr.json"]} == {True}
    assert proofs["layers/1/zarr.json"] is None
    assert not any("/resolve/" in one for one in hub.asked)
    other = FileRecord("clips.parquet", sizes["clips.parquet"], "0" * 64)
    assert fresh.proves(other, size=other.size) is False
    assert fresh.proves(sealed.seal.files["clips.parquet"], size=1) is False


def test_a_revision_is_read_as_it_was_at_first(hub: FakeDataSetHub) -> None:
    first, second = HubStore.open(URL), HubStore.open(URL)
    put(first, "zarr.json", b"one")
    assert second.document("zarr.json", most_bytes=9) == b"one"
    put(first, "zarr.json", b"two")
    assert first.document("zarr.json", most_bytes=9) == b"two"
    assert second.document("zarr.json", most_bytes=9) == b"one"
    assert second.sizes() == {"zarr.json": 3}
    commit = second.repository.commit
    pinned = HubStore.open(f"hf://datasets/{NAME}@{commit}/x.bank")
    assert pinned.document("zarr.json", most_bytes=9) == b"one"
    assert pinned.url == f"hf://datasets/{NAME}@{commit}/x.bank"
    assert not pinned.is_writable
    assert first.is_writable
    with pytest.raises(StoreError, match="has no revision v9; make the branch on the hub"):
        HubStore.open(f"hf://datasets/{NAME}@v9/x.bank").sizes()


def test_a_branch_is_written_to(hub: FakeDataSetHub) -> None:
    put(HubStore.open(URL), "zarr.json", b"one")
    repository = hub.repositories[NAME]
    repository.branches["refs/v2"] = repository.branches["main"]
    branch = HubStore.open(f"hf://datasets/{NAME}@refs%2Fv2/x.bank/")
    put(branch, "zarr.json", b"two")
    assert branch.url == f"hf://datasets/{NAME}@refs%2Fv2/x.bank"
    assert hub.files(NAME, "refs/v2")["x.bank/zarr.json"] == b"two"
    assert hub.files(NAME)["x.bank/zarr.json"] == b"one"


def test_it_does_what_every_store_does(hub: FakeDataSetHub) -> None:
    store = HubStore.open(URL)
    assert (store.sizes(), store.folders(), store.size("a")) == ({}, [], None)
    assert store.document("a", most_bytes=1) is None
    with pytest.raises(NotInStore):
        read(store, "a", 0, 1)
    store.remove(["a"])
    content = random.Random(0).randbytes(3_000_000)
    odd = ["a b.txt", "plus+sign", "hash#1", "what?", "100%25.bin", "ü/ß.bin", "semi;colon"]
    put(store, "layers/12/c.0", content)
    done: list[str] = []
    small = [upload(name, name.encode()) for name in [*odd, "empty"]]
    small[-1] = upload("empty", b"")
    store.put_all(small, lambda _: None, lambda one: done.append(one.record.path))
    assert sorted(done) == sorted([*odd, "empty"])
    expected = {name: len(name.encode()) for name in odd} | {"empty": 0, "layers/12/c.0": 3_000_000}
    assert HubStore.open(URL).sizes() == store.sizes() == expected
    assert store.folders() == ["layers", "ü"]
    assert store.below("layers").folders() == ["12"]
    assert store.size("layers/12/c.0") == 3_000_000
    assert store.size("layers") is None
    for name in odd:
        assert store.document(name, most_bytes=99) == name.encode()
    for start, stop in [(0, 3_000_000), (7, 4_099), (2_999_995, 3_000_000), (9, 9)]:
        assert read(store, "layers/12/c.0", start, stop) == content[start:stop]
    for start in (0, 3_000_000):
        with pytest.raises(StoreError, match="ends at byte 3000000") as failure:
            read(store, "layers/12/c.0", start, 3_000_009)
        assert failure.value.may_pass
    with pytest.raises(StoreError, match="at most 99 bytes"):
        store.document("layers/12/c.0", most_bytes=99)
    store.remove(["layers/12/c.0", "no/such.file"])
    assert store.folders() == ["ü"]


def test_ranges_that_come_short_are_fetched_again(hub: FakeDataSetHub) -> None:
    store = HubStore.open(URL)
    put(store, "c.0", bytes(5_000))
    hub.short_by = 10
    with pytest.raises(StoreError, match="ends at byte 990, expected 1000") as failure:
        read(store, "c.0", 0, 1_000)
    assert failure.value.may_pass
    hub.short_by = 0
    hub.faults.append(("/cdn/", 0, {}))
    with pytest.raises(StoreError, match="cannot be reached") as failure:
        read(store, "c.0", 0, 1_000)
    assert failure.value.may_pass


def test_a_damaged_file_is_never_committed(hub: FakeDataSetHub, tmp_path: Path) -> None:
    store = HubStore.open(URL)
    put(store, "zarr.json", b"before")
    file = tmp_path / "file"
    record = upload("zarr.json", b"\0what was sealed").record
    for content in (b"\0what was sealeD", b"small text now!!", b"short"):
        file.write_bytes(content)
        with pytest.raises(StoreError, match="patchbank bank verify") as failure:
            store.put(Upload(file, record), lambda _: None)
        assert not failure.value.may_pass
    assert store.document("zarr.json", most_bytes=99) == b"before"
    assert len(hub.messages) == 1


def test_a_file_that_the_data_set_ignores_is_named(hub: FakeDataSetHub) -> None:
    hub.ignored = "x.bank/c.0"
    with pytest.raises(StoreError, match=r"c\.0 is not in the commit .*a \.gitignore"):
        put(HubStore.open(URL), "c.0", b"x")


def test_a_page_that_somebody_wrote_stays(hub: FakeDataSetHub) -> None:
    store = HubStore.open(URL)
    put(store, "notes/README.md", b"# one\n")
    assert hub.files(NAME)["README.md"] == b"# one\n"
    put(store, "notes/README.md", b"# two\n")
    assert hub.files(NAME)["README.md"] == b"# two\n"
    put(HubStore.open(f"hf://datasets/{NAME}/y.bank"), "notes/README.md", b"# other bank\n")
    assert hub.files(NAME)["README.md"] == b"# two\n"
    root = HubStore.open(f"hf://datasets/{NAME}")
    put(root, "README.md", b"# of the team\n")
    put(store, "notes/README.md", b"# three\n")
    assert hub.files(NAME)["README.md"] == b"# of the team\n"
    assert "README.md" not in root.sizes()


@pytest.mark.parametrize(
    ("path", "status", "headers", "message", "may_pass"),
    [
        ("/commit/", 403, {}, "you may not do that.*a token that may write: hf auth login", False),
        ("/commit/", 429, {}, "answered 429.*wait, and run the same command again", True),
        ("/commit/", 500, {}, "answered 500", True),
        ("/commit/", 412, {}, "answered 412", True),
        ("/commit/", 413, {"X-Error-Message": f"no {TOKEN} at https://a/b?sig=1"},
         r"answered 413 \(no \.\.\. at \.\.\.\)$", False),
        ("/revision/", 403, {"X-Error-Code": "GatedRepo"}, "conditions to be accepted", False),
        ("/revision/", 401, {}, "no data set team/banks that you may read.*hf auth login", False),
        ("/revision/", 0, {}, "cannot be reached", True),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_said(
    hub: FakeDataSetHub,
    path: str,
    status: int,
    headers: dict[str, str],
    message: str,
    may_pass: bool,
) -> None:
    put(HubStore.open(URL), "a", b"1")
    hub.faults.append((path, status, headers))
    with pytest.raises(StoreError, match=message) as failure:
        put(HubStore.open(URL), "a", b"2")
    assert failure.value.may_pass is may_pass
    assert TOKEN not in str(failure.value)
    assert "sig" not in str(failure.value)


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub: FakeDataSetHub) -> None:
    store = HubStore.open(URL)
    hub.faults += [("/commit/", 503, {}), ("/commit/", 429, {})]
    sent: list[int] = []
    store.put_all([upload("c.0", bytes(5_000))], sent.append, lambda _: None)
    assert sum(sent) == 5_000
    assert hub.n_received == 5_000
    assert store.sizes() == {"c.0": 5_000}


def test_without_a_token_or_a_bank_it_is_said(
    hub: FakeDataSetHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(HubStore.open(URL), "zarr.json", b"{}")
    with pytest.raises(BankNotFound, match=r"no bank at hf://datasets/team/other/y\.bank"):
        pull_bank(open_store("hf://datasets/team/other/y.bank"), tmp_path / "y.bank")
    monkeypatch.setenv("HF_TOKEN", "hf_anotherOne")
    assert HubStore.open(URL).sizes() == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreError, match=r"no data set team/banks that.*hf auth login"):
        HubStore.open(URL).document("zarr.json", most_bytes=9)


def test_offline_mode_is_respected(hub: FakeDataSetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match="HF_HUB_OFFLINE is set; unset it") as failure:
        HubStore.open(URL).sizes()
    assert not failure.value.may_pass
    assert hub.asked == []


@pytest.mark.parametrize(
    "url",
    [
        "hf://team/banks", "hf://datasets/team", "hf://models/team/x", "hf://datasets/a/b/../c",
        "hf://datasets/a/b//c", "hf://datasets/a/b@/c", "hf://datasets/a/b@x@y/c",
    ],
)  # fmt: skip
def test_an_address_that_names_no_data_set_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="names no data set of the hub; expected hf://datasets/"):
        open_store(url)


def test_names_that_leave_the_folder_are_refused(hub: FakeDataSetHub) -> None:
    put(HubStore.open(URL), "zarr.json", b"{}")
    repository = hub.repositories[NAME]
    files = repository.commits[repository.branches["main"]]
    for name in ("x.bank/../../evil", "x.bank/./a", "x.bank//a"):
        repository.commit("main", {**files, name: files["x.bank/zarr.json"]})
        with pytest.raises(StoreError, match="lists a file named"):
            HubStore.open(URL).sizes()


def test_a_push_to_a_commit_is_refused(hub: FakeDataSetHub, sealed: Bank) -> None:
    with pytest.raises(StoreError, match="can only be read"):
        plan_push(sealed, HubStore.open(f"hf://datasets/{NAME}@{'1' * 40}/x"), PushRecord(None))


def test_batches_are_small_and_keep_the_order() -> None:
    sizes = [5, 1, 1, 9, 1, 1, 1, 1]
    uploads = [upload(str(n), bytes(size)) for n, size in enumerate(sizes)]
    batches = list(hub_store.in_batches(uploads, most_files=3, most_bytes=6))
    assert [[one.record.size for one in batch] for batch in batches] == [
        [5, 1], [1], [9], [1, 1, 1], [1],
    ]  # fmt: skip
    assert [one for batch in batches for one in batch] == uploads
    assert list(hub_store.in_batches([], most_files=3, most_bytes=6)) == []


def test_the_commands_of_the_page_run(
    hub: FakeDataSetHub,
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from patchbank.cli.main import main

    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHBANK_SETTINGS", str(tmp_path / "none.toml"))
    monkeypatch.chdir(tmp_path)
    place = "hf://datasets/team/banks"
    licence = ["--data-licence", "CC-BY-NC-3.0"]
    assert main(["bank", "push", str(sealed.path), place, "--data", "esc50", *licence]) == 0
    said = capsys.readouterr()
    assert "CC-BY-NC-3.0, allows no commercial use" in said.err
    assert TOKEN not in said.err + said.out
    repository = hub.repositories["team/banks"]
    repository.branches["v1.0"] = repository.branches["main"]
    assert main(["bank", "pull", f"{place}@v1.0/fake.bank"]) == 0
    assert open_bank(tmp_path / "fake.bank").root_sha256 == sealed.root_sha256
    assert main(["bank", "ls", place]) == 0
    assert "esc50" in capsys.readouterr().out


def test_a_remote_bank_is_read_from_the_hub(
    hub: FakeDataSetHub, sealed: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    push_bank(sealed.path, open_store(URL))
    found = open_bank(URL)
    np.testing.assert_array_equal(np.asarray(found.rows_view(2)), np.asarray(sealed.rows_view(2)))
