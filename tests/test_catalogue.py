from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier

import pytest
from hostile_bank import HOSTILE, json_bytes, leaves
from listed_banks import Unlisted, Watched, write_listed

from patchbank.cli.catalogue import readable_layers
from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.errors import BankMismatch, BankNotFound, PatchbankError, StoreError
from patchbank.pipeline.sharing.catalogue import Found, enter, find, rebuild, whole_bytes, withdraw
from patchbank.pipeline.sharing.described import read_row
from patchbank.pipeline.sharing.entry import (
    Entry,
    document_of,
    entry_bytes,
    entry_of,
    parse_entry,
    parse_entry_file,
)
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.listing import read_catalogue
from patchbank.pipeline.sharing.remote_seal import read_remote_seal
from patchbank.pipeline.sharing.settings import ShareSettings
from patchbank.pipeline.sharing.store import Store

PUSHED = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.fixture
def team(sealed: Bank, tmp_path: Path) -> Path:
    """A folder of three banks, all of them in its catalogue."""
    folder = tmp_path / "team"
    for number, name in enumerate(("esc50-fake.bank", "fsd50k-fake.bank", "us8k.bank")):
        write_listed(sealed, folder / name, n_clips=100 + number)
        enter(FolderStore(folder), name, entry_at(folder, name))
    return folder


def entry_at(folder: Path, name: str) -> Entry:
    row = read_row(FolderStore(folder), name)
    assert row is not None
    assert row.entry is not None
    return replace(row.entry, pushed="2026-11-26T12:00:00Z")


def listed(store: Store | Path) -> dict[str, bool]:
    """Names of the banks that can be read, and whether the catalogue has them."""
    rows = read_catalogue(FolderStore(store) if isinstance(store, Path) else store)
    return {row.name: row.is_indexed for row in rows if row.entry is not None}


def said(capsys: pytest.CaptureFixture[str], *line: str, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["bank", "ls", *line]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, err


def test_an_entry_says_what_the_bank_says_and_survives_its_file(sealed: Bank) -> None:
    entry = entry_of(sealed, data="esc50", pushed=PUSHED, signed_by=["ana@lab"])
    assert parse_entry_file(entry_bytes(entry)) == entry
    assert entry.file_name == f"fake.bank@{sealed.root_sha256[:16]}.json"
    assert (entry.encoder, entry.layers, entry.dtype) == ("fake", (1, 2), "float16")
    assert (entry.clips, entry.bytes) == (sealed.n_clips, sealed.seal.bank_bytes)
    assert (entry.encoder_id, entry.recipe_id) == (sealed.encoder_id, sealed.recipe_id)
    assert (entry.pushed, entry.data) == ("2026-11-26T12:00:00Z", "esc50")
    assert (entry.archive, entry.pooled_only, entry.is_sealed) == (False, False, True)
    read = read_row(FolderStore(sealed.path.parent), sealed.path.name)
    assert read is not None
    assert read.entry == replace(entry, data=None, pushed=None, signed_by=())


def test_a_value_of_another_kind_or_size_is_no_entry(sealed: Bank) -> None:
    good = document_of(entry_of(sealed, data="esc50", pushed=PUSHED, signed_by=["ana"]))
    n_refused = 0
    for place in leaves(good):
        for value in HOSTILE:
            changed = json.loads(json.dumps(good))
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            try:
                entry = parse_entry_file(json_bytes(changed))
            except ValueError:
                n_refused += 1
                continue
            # What is let through is bounded, and its name stays in its folder and on its line.
            assert len(entry_bytes(entry)) < 64 * 2**10
            assert entry.name.isprintable()
            assert "/" not in entry.name
            assert parse_entry(document_of(entry)) == entry
    assert n_refused > 500


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "\x1b[2Jb", "x" * 201,
             "\u202eb", "é" * 120],
)  # fmt: skip
def test_a_name_that_leaves_its_folder_or_its_line_is_refused(name: str, sealed: Bank) -> None:
    document = document_of(entry_of(sealed)) | {"name": name}
    with pytest.raises(ValueError, match="no name of a bank"):
        parse_entry(document)


def test_a_listing_of_a_catalogue_reads_one_file(team: Path) -> None:
    store = Watched(team)
    assert listed(store) == {"esc50-fake.bank": True, "fsd50k-fake.bank": True, "us8k.bank": True}
    assert store.asked == ["team/catalogue.json"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"version": 1, "entries": [7]}'])
def test_a_lost_or_damaged_whole_costs_time_only(content: bytes | None, team: Path) -> None:
    before = read_catalogue(FolderStore(team))
    (team / "catalogue.json").unlink()
    if content is not None:
        (team / "catalogue.json").write_bytes(content)
    store = Watched(team)
    assert read_catalogue(store) == before
    assert len(store.asked) == 4


def test_the_whole_is_not_believed_against_the_folder_of_entries(team: Path) -> None:
    entries = [row.entry for row in read_catalogue(FolderStore(team)) if row.entry]
    lie = replace(entries[0], encoder="another")
    gone = replace(entries[1], name="gone.bank")
    (team / "catalogue.json").write_bytes(whole_bytes([lie, gone, *entries[2:]]))
    rows = read_catalogue(FolderStore(team))
    assert [row.entry for row in rows] == entries


def test_a_bank_that_was_copied_there_is_listed_and_entered_by_a_rebuild(
    sealed: Bank, team: Path
) -> None:
    write_listed(sealed, team / "copied.bank")
    write_listed(sealed, team / "without-suffix")
    assert listed(team) | {"copied.bank": False, "without-suffix": False} == listed(team)
    before = entry_at(team, "us8k.bank")
    rebuild(FolderStore(team))
    assert all(listed(team).values())
    assert len(listed(team)) == 5
    assert before in [row.entry for row in read_catalogue(FolderStore(team))]
    assert len(listed(Unlisted(team))) == 5


def test_entries_of_banks_that_are_gone_are_left_out_and_swept_by_a_rebuild(team: Path) -> None:
    shutil.rmtree(team / "us8k.bank")
    assert set(listed(team)) == {"esc50-fake.bank", "fsd50k-fake.bank"}
    assert len(list((team / "catalogue").iterdir())) == 3
    rebuild(FolderStore(team))
    assert len(list((team / "catalogue").iterdir())) == 2
    assert set(listed(Unlisted(team))) == {"esc50-fake.bank", "fsd50k-fake.bank"}


def test_a_bank_that_was_replaced_is_not_shown_as_its_old_entry(sealed: Bank, team: Path) -> None:
    shutil.rmtree(team / "us8k.bank")
    write_listed(sealed, team / "us8k.bank", n_clips=7)
    rows = {row.name: row for row in read_catalogue(FolderStore(team))}
    assert not rows["us8k.bank"].is_indexed
    entry = rows["us8k.bank"].entry
    assert entry is not None
    assert entry.clips == 7
    assert entry.pushed is None
    enter(FolderStore(team), "us8k.bank", entry)
    assert len(list((team / "catalogue").glob("us8k.bank@*"))) == 1
    assert listed(team)["us8k.bank"]


def test_a_damaged_entry_hides_no_bank(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next((team / "catalogue").glob("us8k*"))
    document = json.loads(file.read_text()) | {"encoder": "\x1b[2J\nfake"}
    file.write_text(json.dumps(document))
    out, _ = said(capsys, str(team))
    assert "\x1b" not in out
    assert "102 clips" in out
    assert "its entry in the catalogue is damaged: encoder is" in " ".join(out.split())


def test_where_nothing_can_be_listed_a_damaged_entry_is_shown_as_such(
    team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((team / "catalogue.json").read_text())
    whole["entries"][1]["name"] = "../\x1b]0;x\x07.bank"
    (team / "catalogue.json").write_text(json.dumps(whole))
    rows = read_catalogue(Unlisted(team))
    assert [row.entry is None for row in rows] == [True, False, False]
    assert rows[0].problem is not None
    assert "no name of a bank" in rows[0].problem
    assert rows[0].problem.isprintable()
    (team / "catalogue.json").unlink()
    with pytest.raises(StoreError, match=r"does not tell what it holds.*ls --rebuild"):
        read_catalogue(Unlisted(team))
    with pytest.raises(StoreError, match="cannot be listed or written to"):
        rebuild(Unlisted(team))


def test_twenty_writers_at_once_lose_no_entry(sealed: Bank, tmp_path: Path) -> None:
    names = [f"bank{number:02}.bank" for number in range(20)]
    for name in names:
        write_listed(sealed, tmp_path / name)
    together = Barrier(len(names))

    def write(name: str) -> None:
        entry = entry_at(tmp_path, name)
        together.wait()
        enter(FolderStore(tmp_path), name, entry)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(write, names))
    assert listed(tmp_path) == dict.fromkeys(names, True)
    # The last one to write the whole has listed all the others.
    assert set(listed(Unlisted(tmp_path))) == set(names)


WRITER = """
import os, sys
from pathlib import Path
from patchbank.pipeline.sharing.catalogue import enter
from patchbank.pipeline.sharing.described import read_row
from patchbank.pipeline.sharing.folder_store import FolderStore

children = []
for name in sys.argv[2:]:
    if not (child := os.fork()):
        store = FolderStore(Path(sys.argv[1]))
        enter(store, name, read_row(store, name).entry)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
def test_twenty_processes_at_once_lose_no_entry(sealed: Bank, tmp_path: Path) -> None:
    import sys

    names = [f"bank{number:02}.bank" for number in range(20)]
    for name in names:
        write_listed(sealed, tmp_path / name)
    done = subprocess.run([sys.executable, "-c", WRITER, str(tmp_path), *names], check=False)
    assert done.returncode == 0
    assert listed(tmp_path) == dict.fromkeys(names, True)
    assert set(listed(Unlisted(tmp_path))) == set(names)


def test_withdrawing_removes_the_entry_of_one_bank(team: Path) -> None:
    withdraw(FolderStore(team), "us8k.bank")
    assert set(listed(Unlisted(team))) == {"esc50-fake.bank", "fsd50k-fake.bank"}
    assert not listed(team)["us8k.bank"]
    withdraw(FolderStore(team), "never.bank")


def test_a_name_of_the_catalogue_is_found(team: Path, tmp_path: Path) -> None:
    settings = ShareSettings(cache=tmp_path / "cache", catalogue=str(team))
    fingerprint = entry_at(team, "us8k.bank").fingerprint
    for name in ("us8k.bank", "us8k", "us", fingerprint[:6], fingerprint):
        assert find(name, settings).place == f"{team}/us8k.bank"
    assert find("us8k", ShareSettings(cache=tmp_path), f"{team}/").place == f"{team}/us8k.bank"


def test_a_name_that_means_no_bank_or_several_is_refused(
    sealed: Bank, team: Path, tmp_path: Path
) -> None:
    settings = ShareSettings(cache=tmp_path / "cache", catalogue=str(team))
    with pytest.raises(BankNotFound, match=r"among the 3 of .*; there is esc50-fake.bank.*ls"):
        find("esc50-fake-bank", settings)
    with pytest.raises(PatchbankError, match=r"no catalogue is set.*PATCHBANK_CATALOGUE.*--from"):
        find("us8k", ShareSettings(cache=tmp_path))
    write_listed(sealed, team / "us8k-2.bank")
    assert find("us8k", settings).place.endswith("/us8k.bank")
    with pytest.raises(PatchbankError, match=r"means 2 banks of .*: us8k-2.bank, us8k.bank; write"):
        find("us", settings)
    with pytest.raises(BankNotFound) as caught:
        find("\x1b[2J", settings)
    assert str(caught.value).isprintable()


def test_a_bank_is_compared_with_what_its_catalogue_said(sealed: Bank, tmp_path: Path) -> None:
    there = read_remote_seal(FolderStore(sealed.path))
    found = Found(str(sealed.path), entry_of(sealed))
    assert found.check(there) is None
    assert replace(found, digits=sealed.fingerprint[:8]).check(there) is None
    with pytest.raises(BankMismatch, match=r"not the bank with that fingerprint.*ls --rebuild"):
        replace(found, digits="0000").check(there)
    fewer = replace(found.entry, root_sha256="0" * 64, clips=sealed.n_clips - 1)
    note = replace(found, entry=fewer).check(there)
    assert note is not None
    assert f"has grown since it was entered into the catalogue, from {fewer.clips} to" in note
    for other in (replace(fewer, recipe_id="0" * 64), replace(fewer, clips=sealed.n_clips)):
        with pytest.raises(BankMismatch, match=r"another bank than its catalogue says; pull it by"):
            replace(found, entry=other).check(there)


def test_a_pull_by_a_fingerprint_that_somebody_forged_is_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    team = tmp_path / "team"
    shutil.copytree(copy, team / "x.bank")
    enter(FolderStore(team), "x.bank", replace(entry_of(open_bank(copy)), fingerprint="ab" * 32))
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--pooled-only"]):
        assert main(["bank", "pull", "abab", "out.bank", "--from", str(team), *more]) == 1
        assert "is not the bank with that fingerprint" in capsys.readouterr().err
        assert not (tmp_path / "out.bank").exists()


def test_ls_narrows_by_what_banks_are(
    sealed: Bank, team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(FolderStore(team), "us8k.bank", replace(entry_at(team, "us8k.bank"), data="UrbanSound"))
    (team / "broken.bank").mkdir()

    def names(*options: str) -> list[str]:
        return [row["name"] for row in json.loads(said(capsys, str(team), *options, "--json")[0])]

    assert names() == ["broken.bank", "esc50-fake.bank", "fsd50k-fake.bank", "us8k.bank"]
    assert names("--data", "ESC50") == ["esc50-fake.bank"]
    assert names("--data", "urbansound") == ["us8k.bank"]
    # Its pusher has said what it is of.
    assert names("--data", "us8k") == []
    assert len(names("--encoder", "Fake", "--layer", "2", "--dtype", "float16")) == 3
    assert names("--encoder", "beats") == names("--layer", "3") == names("--dtype", "int8") == []
    out, err = said(capsys, str(team), "--encoder", "beats")
    assert out == f"no banks like that in {team}\n"
    assert err == (
        "1 that cannot be read is left out\n"
        "1 not in the catalogue; `patchbank bank ls --rebuild` enters them\n"
    )


def test_ls_of_a_folder_without_banks_says_where_it_looked(
    team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    above = team.parent / "above"
    above.mkdir()
    assert said(capsys, str(above))[0] == f"no banks in {above}; `patchbank extract` makes one\n"
    shutil.copytree(team, above / "banks")
    only = f"no banks in {above}; only folders directly inside were looked at:\n"
    assert said(capsys, str(above))[0] == f"{only}    banks\n"
    for number in range(6):
        (above / f"run{number}").mkdir()
    out, _ = said(capsys, str(above))
    assert out == f"{only}    banks, run0, run1, run2, run3, and 2 more\n"


def test_ls_goes_to_the_catalogue_of_the_settings(
    team: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATCHBANK_CATALOGUE", str(team))
    facts = json.loads(said(capsys, "--json")[0])
    assert [row["clips"] for row in facts] == [100, 101, 102]
    assert facts[0]["licence"] == "MIT"
    assert facts[0]["pushed"] == "2026-11-26T12:00:00Z"
    monkeypatch.delenv("PATCHBANK_CATALOGUE")
    monkeypatch.chdir(team)
    assert len(json.loads(said(capsys, "--json")[0])) == 3


def test_ls_fits_80_columns_however_long_names_are(
    sealed: Bank, team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, str(team))
    assert out.splitlines()[0].startswith("esc50-fake.bank  ")
    assert " fake 1,2 float16, 100 clips, " in out
    assert out.splitlines()[1].strip() == "MIT, 2026-11-26"
    long_name = f"{'audioset-balanced-' * 5}fake.bank"
    write_listed(sealed, team / long_name, licence="of its authors,\n\x1b[2J for research only" * 9)
    shutil.copytree(team / "us8k.bank", team / "half.bank", ignore=lambda *_: ["seal.json"])
    out, _ = said(capsys, str(team))
    assert out.isprintable() or set(out) - {"\n"} == {c for c in out if c.isprintable()}
    assert all(len(line) < 80 for line in out.splitlines() if line != long_name)
    assert "clips, not sealed" not in out
    assert out.count("not sealed") == 1
    for number in range(60):
        write_listed(sealed, team / f"more{number}.bank")
    lines = said(capsys, str(team))[0].splitlines()
    assert len(lines) == 65 + len([long_name, "not sealed"]) + 2
    assert lines[-2].startswith("65 banks, ")


def test_ls_shows_who_really_signed(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from patchbank.pipeline.sharing.trust import sign_bank

    if shutil.which("ssh-keygen") is None:
        pytest.skip("needs ssh-keygen (Debian: openssh-client)")
    key = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    team = tmp_path / "team"
    for name in ("signed.bank", "claimed.bank"):
        shutil.copytree(copy, team / name)
        lie = entry_of(open_bank(team / name), signed_by=["ana"])
        enter(FolderStore(team), name, replace(lie, licence="free of charge"))
    sign_bank(FolderStore(team / "signed.bank"), key)
    allowed = tmp_path / "allowed"
    allowed.write_text(f'ana namespaces="patchbank" {key.with_suffix(".pub").read_text()}')
    out, err = said(capsys, str(team), "--signed-by", "ana")
    assert out.count("signed by ana (unchecked)") == 2
    assert "only claimed here" in err
    out, _ = said(capsys, str(team), "--allowed-signers", str(allowed))
    assert out.count("signed by ana") == 1
    assert out.count("not signed") == 1
    assert "unchecked" not in out
    assert "free of charge" not in out
    out, _ = said(
        capsys, str(team), "--signed-by", "ana", "--allowed-signers", str(allowed), "--json"
    )
    (facts,) = json.loads(out)
    assert (facts["name"], facts["signed_by"]) == ("signed.bank", ["ana"])
    assert facts["signatures_checked"]
    assert facts["licence"] == "Apache-2.0"
    said(capsys, str(team), "--allowed-signers", str(tmp_path / "nowhere"), status=1)


def test_layers_in_a_row_are_ranges() -> None:
    assert readable_layers([12]) == "12"
    assert readable_layers([1, 2, 3, 5, 6, 9]) == "1-3,5,6,9"
    assert readable_layers(range(1, 13)) == "1-12"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_a_bank_that_may_not_be_read_is_named(team: Path) -> None:
    (team / "esc50-fake.bank").chmod(0)
    row = next(row for row in read_catalogue(FolderStore(team)) if row.name == "esc50-fake.bank")
    (team / "esc50-fake.bank").chmod(0o755)
    assert row.entry is None
