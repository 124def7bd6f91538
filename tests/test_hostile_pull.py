"""A hostile bank at a store, and a destination in which somebody laid links.

Each is refused with a message that names what is wrong; nothing is written outside the destination,
nothing is executed, and memory stays within what a seal may have.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import pickle
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_bank import little_memory, reseal, rooted

from patchbank.cli.main import main
from patchbank.pipeline.bank import open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankMismatch, PatchbankError
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.partial import pull_part
from patchbank.pipeline.sharing.pull import PULLING, pull_bank
from patchbank.pipeline.sharing.push import push_bank
from patchbank.pipeline.sharing.stores import open_store, safe_url, split_place

LEAST_BYTES = 48 * 2**20
"""What a pull may take, whatever the bank."""


class Sentinel:
    """Unpickled anywhere, it leaves a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.place), os.O_CREAT)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing appears beside what a test made, and no more than those bytes are asked for."""
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/mine.json").write_text("mine")
    monkeypatch.chdir(tmp_path)
    yield
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["mine.json"]
    assert (tmp_path / "outside/mine.json").read_text() == "mine"
    made = {path.name for path in tmp_path.iterdir()}
    assert made <= {"outside", "cache", "copy.bank", "here.bank", "team", "aside"}


def refusal(store: FolderStore, out: Path, *, most_bytes: int = LEAST_BYTES) -> str:
    """What a pull says when it refuses; no bank is left."""
    tracemalloc.start()
    try:
        with pytest.raises(PatchbankError) as caught:
            pull_bank(store, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most_bytes, f"{peak} bytes"
    assert not (out / "seal.json").exists()
    said = str(caught.value)
    assert all(line.isprintable() for line in said.split("\n"))
    assert len(said) < 2_000
    return said


def change_seal(bank: Path, change: Callable[[dict[str, Any]], object]) -> None:
    seal = json.loads((bank / "seal.json").read_bytes())
    change(seal)
    (bank / "seal.json").write_bytes(rooted(seal))


def entry(path: str, size: int = 0) -> dict[str, Any]:
    return {"path": path, "size": size, "sha256": hashlib.sha256(b"").hexdigest()}


# What the seal says.


@pytest.mark.parametrize(
    "path",
    ["../outside/x.json", "/etc/cron.d/x", "layers/../../outside/x.json", "layers\\..\\x.json",
     "C:x.json", "layers/nul", "layers/\u202egnp.json", "seal.json", "notes/x.json", ".work/x",
     "layers/run.py", "layers/x.pkl", "layers/\x1b]0;owned\x07.json"],
)  # fmt: skip
def test_a_seal_with_a_name_of_no_bank_is_refused_before_anything_comes(
    path: str, copy: Path, tmp_path: Path
) -> None:
    change_seal(copy, lambda seal: seal["files"].append(entry(path)))
    said = refusal(FolderStore(copy), tmp_path / "here.bank")
    assert f"copy.bank/seal.json is damaged: ValueError path {path!r} names no file" in said
    assert not (tmp_path / "here.bank").exists()


def test_a_seal_of_a_million_files_is_not_read(copy: Path, tmp_path: Path) -> None:
    line = json.dumps(entry("layers/1/patches/c.0.0.0")).encode() + b","
    (copy / "seal.json").write_bytes(b'{"files":[' + line * 1_000_000 + b"0]}")
    assert "expected at most 33554432" in refusal(FolderStore(copy), tmp_path / "here.bank")


@pytest.mark.parametrize("name", ["seal.json", "zarr.json"])
def test_a_document_of_ten_gigabytes_is_not_read(name: str, copy: Path, tmp_path: Path) -> None:
    os.truncate(copy / name, 10 * 2**30)
    said = refusal(FolderStore(copy), tmp_path / "here.bank")
    assert f"{name} has 10737418240 bytes, expected at most " in said


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"[" * 10**6, id="deep lists"),
        pytest.param(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, id="deep objects"),
        pytest.param(b'{"files":' + b"9" * 10**6 + b"}", id="a long number"),
        pytest.param(b'{"files":[' + b"{}," * 10**5 + b"{}]}", id="empty entries"),
        pytest.param(b"\xff\xfe\x00", id="no UTF-8"),
        pytest.param(b"\x80\x04\x95" + b"x" * 99, id="a pickle"),
        pytest.param(b"", id="empty"),
        pytest.param(b"null", id="null"),
    ],
)
def test_a_seal_that_is_no_seal_is_refused(content: bytes, copy: Path, tmp_path: Path) -> None:
    (copy / "seal.json").write_bytes(content)
    said = refusal(FolderStore(copy), tmp_path / "here.bank")
    assert "copy.bank/seal.json is damaged: " in said


@pytest.mark.parametrize("size", [2**62, 10**15])
def test_a_size_that_no_disk_has_is_refused_before_anything_comes(
    size: int, copy: Path, tmp_path: Path
) -> None:
    change_seal(copy, lambda seal: seal["files"].append(entry("golden/x.json", size)))
    said = refusal(FolderStore(copy), tmp_path / "here.bank")
    assert "here.bank needs " in said
    assert "are free on its disk" in said


@pytest.mark.parametrize("change", [-1, 1, 10**6])
def test_a_size_that_is_not_the_stores_is_refused_before_anything_comes(
    change: int, copy: Path, tmp_path: Path
) -> None:
    def lie(seal: dict[str, Any]) -> None:
        for file in seal["files"]:
            file["size"] += change * (file["path"] == "golden/zarr.json")

    size = (copy / "golden/zarr.json").stat().st_size
    change_seal(copy, lie)
    said = refusal(FolderStore(copy), tmp_path / "here.bank")
    assert f"golden/zarr.json has {size} bytes, sealed {size + change}" in said
    assert not (tmp_path / "here.bank/golden/zarr.json").exists()


# What the card says.


@pytest.mark.parametrize(
    ("place", "value"),
    [
        pytest.param(("n_rows",), 2**62, id="rows"),
        pytest.param(("generations",), [2**47] * 50, id="generations"),
        pytest.param(("rows_per_shard",), 2**47, id="rows of a shard"),
        pytest.param(("layers", "1", "dim"), 2**40, id="dim"),
        pytest.param(("layers", "1", "grid", "time"), 2**40, id="grid"),
    ],
)
def test_a_card_of_huge_shapes_is_refused_before_anything_comes(
    place: tuple[str, ...], value: object, copy: Path, tmp_path: Path
) -> None:
    document = json.loads((copy / "zarr.json").read_bytes())
    at = document["attributes"]["card"]
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (copy / "zarr.json").write_text(json.dumps(document))
    reseal(copy)
    if place == ("n_rows",):  # what nothing believes: it follows from the generations
        assert pull_bank(FolderStore(copy), tmp_path / "here.bank").n_rows == 40
    else:
        refusal(FolderStore(copy), tmp_path / "here.bank")
        assert not (tmp_path / "here.bank").exists()


def test_words_of_a_card_reach_a_terminal_escaped_only(
    copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\u202e\r\n"
    document = json.loads((copy / "zarr.json").read_bytes())
    card = document["attributes"]["card"]
    card |= {"licence": evil, "source": evil, evil: {evil: evil}}
    card["encoder"] |= {"name": f"beats{evil}", "config": {evil: evil}}
    (copy / "zarr.json").write_text(json.dumps(document))
    reseal(copy)
    (copy / "notes").mkdir()
    (copy / "notes/README.md").write_text(evil)
    (copy / "notes/seal.json.sig").write_text(f"-----BEGIN SSH SIGNATURE-----\n{evil}\n")
    for line in (["pull", str(copy), "here.bank"], ["show", "here.bank"], ["ls", "."],
                 ["verify", f"file://{copy}"], ["pull", str(copy), "here.bank"]):  # fmt: skip
        main(["bank", *line])
    out, err = capfd.readouterr()
    assert r"beats\x1b[2J\x1b]0;owned\x07\u202e" in out
    assert "Traceback" not in err
    for words in (out, err):
        assert not set(words) & {"\x1b", "\x07", "\u202e", "\r"}


def test_the_difference_between_two_cards_is_told_escaped_and_in_few_lines() -> None:
    names = {f"\x1b[2J{number}": ("\x1b[2J" * 999, 1) for number in range(1_000)}
    said = str(BankMismatch("two banks", names))
    assert "\x1b" not in said
    assert said.endswith("  and 980 more")
    assert len(said) < 20 * 600


# What lies in the store.


def replace_by_link(path: Path, target: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name", ["seal.json", "zarr.json", "clips.parquet", "golden", "layers/1", "layers/1/mean/c.0.0"]
)
def test_a_link_in_the_store_is_not_followed(name: str, copy: Path, tmp_path: Path) -> None:
    """Not even to the very bytes that are sealed."""
    (tmp_path / "aside").mkdir()
    shutil.move(copy / name, tmp_path / "aside/target")
    (copy / name).symlink_to(tmp_path / "aside/target")
    said = refusal(FolderStore(copy), tmp_path / "here.bank")
    assert name in said
    assert "is a link" in said or "is missing" in said


def test_a_part_of_a_folder_follows_no_link_either(copy: Path, tmp_path: Path) -> None:
    name = "layers/1/patches/c.0.0.0"
    (tmp_path / "aside").mkdir()
    shutil.move(copy / name, tmp_path / "aside/target")
    (copy / name).symlink_to(tmp_path / "aside/target")
    with pytest.raises(BankError, match=f"{name} is a link, which a bank does not have"):
        pull_part(str(copy), tmp_path / "here.bank", layers="1")
    (tmp_path / "aside/target").replace(copy / name)
    place = f".here.bank.pull-{open_bank(copy).root_sha256[:16]}"
    (tmp_path / place).symlink_to(tmp_path / "outside")
    with pytest.raises(BankError, match=f"{place} is a link"):
        pull_part(f"file://{copy}", tmp_path / "here.bank", layers="1")
    (tmp_path / place).unlink()
    assert pull_part(f"file://{copy}", tmp_path / "here.bank", layers="1").layers == (1,)


def test_a_link_to_a_file_of_the_system_brings_nothing(copy: Path, tmp_path: Path) -> None:
    content = Path("/etc/passwd").read_bytes()
    replace_by_link(copy / "golden/zarr.json", Path("/etc/passwd"))

    def seal_it(seal: dict[str, Any]) -> None:
        for file in seal["files"]:
            if file["path"] == "golden/zarr.json":
                file |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    change_seal(copy, seal_it)
    refusal(FolderStore(copy), tmp_path / "here.bank")
    assert not (tmp_path / "here.bank/golden/zarr.json").exists()


@pytest.mark.parametrize("name", ["seal.json", "zarr.json", "golden/zarr.json"])
def test_a_pipe_in_the_store_is_not_waited_for(name: str, copy: Path, tmp_path: Path) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    refusal(FolderStore(copy), tmp_path / "here.bank")
    with pytest.raises(PatchbankError, match="is no regular file"):
        list(FolderStore(copy).stream(name, 0, 1))


def test_notes_that_are_large_links_or_strange_stay_where_they_are(
    copy: Path, tmp_path: Path
) -> None:
    notes = copy / "notes/measured"
    notes.mkdir(parents=True)
    with (copy / "notes/README.md").open("wb") as file:
        file.truncate(10 * 2**30)
    (copy / "notes/seal.json.sig").symlink_to("/etc/passwd")
    (copy / "notes/other.json").write_bytes(b"{}")
    (notes / "good.json").write_bytes(b"\xff\xfe no JSON")
    (notes / "link.json").symlink_to(tmp_path / "outside/mine.json")
    for name in ("run.py", ".bashrc", "x.pkl", "..json", "a b.json", "\x1b[2J.json", "\u202e.json"):
        (notes / name).write_bytes(b"")
    (notes / "deep.json").mkdir()
    (notes / "deep.json/x.json").write_bytes(b"")
    lines: list[str] = []
    bank = pull_bank(FolderStore(copy), tmp_path / "here.bank", say=lines.append)
    assert list(FolderStore(bank.path / "notes").sizes()) == ["measured/good.json"]
    assert any("README.md has 10737418240 bytes, expected at most 1048576" in x for x in lines)
    assert all(line.isprintable() for line in lines)
    assert verify_bank(bank.path) == ()


def test_notes_that_are_a_link_bring_nothing_and_send_nothing(copy: Path, tmp_path: Path) -> None:
    (copy / "notes").symlink_to(tmp_path / "outside")
    bank = pull_bank(FolderStore(copy), tmp_path / "here.bank")
    assert not (bank.path / "notes").exists()
    there = FolderStore(tmp_path / "team/x.bank")
    push_bank(copy, there)
    assert not (there.folder / "notes").exists()


def test_a_clip_table_that_unpacks_to_gigabytes_is_refused_when_it_is_read(
    copy: Path, tmp_path: Path
) -> None:
    clips = pq.read_table(copy / "clips.parquet")
    column = pa.array(["x" * 10**7] * len(clips))
    pq.write_table(clips.append_column("bomb", column), copy / "clips.parquet", compression="zstd")
    reseal(copy)
    with little_memory(copy):
        bank = pull_bank(FolderStore(copy), tmp_path / "here.bank")
        with pytest.raises(BankCorrupt, match=r"clips\.parquet"):
            _ = bank.clips


# Nothing is executed.


def test_nothing_that_a_bank_brings_is_unpickled_or_imported(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = pickle.dumps(Sentinel(tmp_path / "outside/owned"))
    os.close(pickle.loads(pickle.dumps(Sentinel(tmp_path / "aside"))))
    assert (tmp_path / "aside").exists()
    for path in [*copy.glob("golden/*/c.*"), *copy.glob("layers/*/mean/c.*")]:
        path.write_bytes(sentinel + bytes(max(0, path.stat().st_size - len(sentinel))))
    (copy / "golden/extra.json").write_bytes(sentinel)
    reseal(copy)
    (copy / "notes").mkdir()
    (copy / "notes/measured").mkdir()
    for name in ("measured/a.json", "README.md", "seal.json.sig", "x.py", "conftest.py"):
        (copy / "notes" / name).write_bytes(sentinel)
    bank = pull_bank(FolderStore(copy), tmp_path / "here.bank")
    monkeypatch.chdir(bank.path)
    for line in (["show"], ["show", "--json"], ["verify"], ["verify", "--json"]):
        assert main(["bank", line[0], str(bank.path), *line[1:]]) in (0, 1)
    assert bank.pooled(1).shape == (40, bank.schema.layers[0].dim)
    assert set(FolderStore(bank.path / "notes").sizes()) == {
        "measured/a.json",
        "README.md",
        "seal.json.sig",
    }


# What lies in the destination.


@pytest.mark.parametrize("name", [".work", ".work/pull", f"{PULLING}", ".work/seal.lock"])
def test_a_link_in_the_destination_is_not_written_through(
    name: str, copy: Path, tmp_path: Path
) -> None:
    out = tmp_path / "here.bank"
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(tmp_path / "outside/new")
    assert f"{name} is a link, which a bank does not have" in refusal(FolderStore(copy), out)
    (out / name).unlink()
    (out / name).symlink_to(tmp_path / "outside")
    assert f"{name} is a link" in refusal(FolderStore(copy), out)


@pytest.mark.parametrize("name", ["layers", "layers/1", "golden/zarr.json", "notes", "seal.json"])
def test_a_link_in_half_a_pull_is_not_written_through(
    name: str, copy: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(copy, tmp_path / "here.bank"))
    (out / ".work").mkdir()
    (out / "notes").mkdir()
    shutil.move(out / "seal.json", out / PULLING)
    if name != "seal.json":
        replace_by_link(out / name, tmp_path / "outside")
    else:
        (out / name).symlink_to(tmp_path / "outside/mine.json")
    with pytest.raises(BankError, match=f"{name} is a link, which a bank does not have"):
        pull_bank(FolderStore(copy), out)


def test_a_destination_of_somebody_else_is_left_as_it_is(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="exists and is no bank; choose another place"):
        pull_bank(FolderStore(copy), tmp_path / "outside")


# Credentials.


SECRET = "hunter2secret"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://me:{}@host/x.bank", "https://host/x.bank"),
        ("https://{}@host:8080/x.bank", "https://host:8080/x.bank"),
        ("https://host/x.bank?X-Amz-Signature={}&x=/y", "https://host/x.bank"),
        ("https://host/x.bank#{}", "https://host/x.bank"),
        ("https://me:{0}@host/x.bank/?sig={0}#{0}", "https://host/x.bank"),
        ("s3://AKIA:{}/+with=slashes@bucket/x@1.bank", None),
        ("s3://AKIA:{}/slash@bucket/x.bank", "s3://bucket/x.bank"),
        ("sftp://me:{}@host:22/x.bank", "sftp://host:22/x.bank"),
        ("s3://bucket/x@1.bank", "s3://bucket/x@1.bank"),
    ],
)
def test_an_address_is_shown_and_named_without_its_secrets(address: str, shown: str | None) -> None:
    full = address.format(SECRET)
    assert SECRET not in safe_url(full)
    if shown is not None:
        assert safe_url(full) == shown
        assert split_place(full)[1] == shown.rpartition("/")[2]


def test_a_password_in_an_address_that_nothing_opens_is_not_told(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for address in (
        f"ftp://me:{SECRET}@127.0.0.1/x.bank",
        f"file://me:{SECRET}@elsewhere/x.bank",
    ):
        for line in (["pull", address], ["verify", address], ["sign", address], ["ls", address],
                     ["push", str(copy), address]):  # fmt: skip
            assert main(["bank", *line]) == 1
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert err.count("error: ") == 10


class Guarded(SimpleHTTPRequestHandler):
    """Files of a folder, also by range, for whoever knows the password."""

    def send_head(self) -> Any:
        given = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic "))
        path = Path(self.translate_path(self.path))
        if given != f"me:{SECRET}".encode() or not path.is_file():
            self.send_error(404 if given else 401)
            return None
        content, status = path.read_bytes(), 200
        self.send_response(status := 206 if (asked := self.headers.get("Range")) else status)
        size = len(content)
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = int(last or size - 1) + 1
            content = content[int(first) : stop]
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        return io.BytesIO(content)

    def log_message(self, *_: object) -> None:
        """Nothing: what is printed here is patchbank's."""


@pytest.fixture
def guarded(
    copy: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of a bank, whose server asks for the password in ~/.netrc."""
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text(f"machine 127.0.0.1 login me password {SECRET}\n")
    (home / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(home))
    handler = partial(Guarded, directory=str(copy.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/{copy.name}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(
    find_spec("patchbank.pipeline.sharing.http_store") is None, reason="needs the store of http://"
)
def test_a_password_is_neither_told_nor_stored_by_a_whole_run(
    guarded: str, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for line in (["pull", guarded, "here.bank"], ["verify", guarded], ["show", guarded],
                 ["show", "here.bank", "--json"], ["ls", "."]):  # fmt: skip
        assert main(["bank", *line]) == 0, line
    (copy / "golden/zarr.json").unlink()
    host = guarded.removeprefix("http://")
    for address in (f"http://me:{SECRET}@{host}", f"{guarded}?token={SECRET}", guarded):
        for line in (["pull", address, "team"], ["verify", address], ["sign", address]):
            assert main(["bank", *line]) == 1, line
    out, err = capfd.readouterr()
    assert f"{guarded}: seal, card and sizes are right" in out
    assert err.count("error: ") == 9
    assert SECRET not in out + err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.is_relative_to(tmp_path / "cache") for path in files)
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    assert not any(SECRET in str(path) for path in tmp_path.rglob("*"))


def test_a_bank_of_an_address_is_the_bank_of_its_folder(copy: Path, tmp_path: Path) -> None:
    store = open_store(f"file://{copy}")
    assert pull_bank(store, tmp_path / "here.bank").root_sha256 == open_bank(copy).root_sha256
