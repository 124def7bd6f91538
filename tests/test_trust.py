"""Signatures of seals, made and checked by the OpenSSH of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchbank.cli.main import main
from patchbank.cli.sign import allowed_line
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankIncomplete, PatchbankError
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.pull import pull_bank
from patchbank.pipeline.sharing.push import push_bank
from patchbank.pipeline.sharing.settings import ShareSettings
from patchbank.pipeline.sharing.signing import BEGIN, END, MOST_SIGNERS, blocks_of, judge, sign
from patchbank.pipeline.sharing.trust import (
    SIGNATURES,
    check_trust,
    read_signatures,
    sign_bank,
    verdicts,
)

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs OpenSSH")


@dataclass(frozen=True)
class Keys:
    """Keys of two people, and a file that names the first."""

    alice: Path
    mallory: Path
    allowed: Path


def keygen(*arguments: str | Path) -> None:
    subprocess.run(["ssh-keygen", "-q", *map(str, arguments)], check=True, capture_output=True)


def public(key: Path) -> str:
    """Kind and key, without the comment."""
    return " ".join(key.with_name(f"{key.name}.pub").read_text().split()[:2])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory"):
        keygen("-t", "ed25519", "-N", "", "-C", name, "-f", folder / name)
    allowed = folder / "allowed"
    allowed.write_text(f'alice@lab namespaces="patchbank" {public(folder / "alice")}\n')
    return Keys(folder / "alice", folder / "mallory", allowed)


@pytest.fixture
def signed(copy: Path, keys: Keys) -> Path:
    sign_bank(FolderStore(copy), keys.alice)
    return copy


def said(capsys: pytest.CaptureFixture[str], *line: str, status: int = 0) -> tuple[str, str]:
    """What `patchbank bank LINE` prints on stdout and stderr."""
    capsys.readouterr()
    assert main(["bank", *line]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert all(len(words) <= 80 or " " not in words.strip() for words in out.splitlines()
               if "namespaces" not in words and str(os.sep) not in words)  # fmt: skip
    return out, err


def settings(keys: Keys, required: str = "pull") -> ShareSettings:
    return ShareSettings(Path("cache"), allowed_signers=keys.allowed, require_signature=required)  # type: ignore[arg-type]


# Signing.


def test_what_sign_prints_is_the_line_by_which_others_trust(
    copy: Path, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, "sign", str(copy), "--key", str(keys.alice), "--as", "alice@lab")
    assert f"signing with {keys.alice}\n" in err
    fingerprint = re.search(r"seal [0-9a-f]{16} signed\n  ssh-ed25519 (SHA256:\S+)\n", out)
    assert fingerprint is not None
    line = out.splitlines()[-1]
    assert line == allowed_line("alice@lab", *public(keys.alice).split())
    (tmp_path / "-f").write_text(line + "\n")
    out, _ = said(capsys, "verify", str(copy), "--allowed-signers", str(tmp_path / "-f"))
    assert f"whole\nsigned by alice@lab\n  ED25519 {fingerprint[1]}\n" in out
    out, _ = said(capsys, "verify", str(copy), "--quick", "--json")
    (verdict,) = json.loads(out)["signatures"]
    assert (verdict["state"], verdict["signer"]) == ("unknown key", None)
    assert verdict["says"] == "signed by a key, none that you trust yet"


def test_two_may_sign_and_signing_again_replaces_the_own_signature(copy: Path, keys: Keys) -> None:
    store = FolderStore(copy)
    counts = [sign_bank(store, key).n_signers for key in (keys.alice, keys.mallory, keys.alice)]
    assert counts == [1, 2, 2]
    found = verdicts(
        (copy / "seal.json").read_bytes(), read_signatures(store), allowed=keys.allowed
    )
    assert [verdict.state for verdict in found] == ["unknown key", "trusted"]


def test_a_push_and_a_pull_again_keep_the_signatures_of_both_places(
    signed: Path, keys: Keys, tmp_path: Path
) -> None:
    def n_signatures(folder: Path) -> int:
        return len(blocks_of((folder / SIGNATURES).read_bytes()))

    there, here = FolderStore(tmp_path / "there.bank"), tmp_path / "here.bank"
    push_bank(signed, there)
    sign_bank(there, keys.mallory)
    push_bank(signed, there)
    assert (n_signatures(signed), n_signatures(there.folder)) == (1, 2)
    pull_bank(FolderStore(signed), here)
    sign_bank(FolderStore(here), keys.mallory)
    pull_bank(FolderStore(signed), here)
    assert n_signatures(here) == 2


def test_a_bank_with_signatures_is_whole_and_leaves_nothing_else(signed: Path) -> None:
    assert [path.name for path in (signed / "notes").iterdir()] == ["seal.json.sig"]
    assert not (signed / ".drafts").exists()
    assert main(["bank", "verify", str(signed), "--quick"]) == 0


def test_the_usual_key_is_the_one_that_ssh_tries_first(
    copy: Path,
    keys: Keys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = (
        f"no SSH key in {tmp_path}/.ssh (id_ed25519, id_ed25519_sk, id_ecdsa, id_ecdsa_sk, id_rsa)"
    )
    assert words in said(capsys, "sign", str(copy), status=1)[1]
    (tmp_path / ".ssh").mkdir()
    keygen("-t", "ecdsa", "-N", "", "-f", tmp_path / ".ssh/id_ecdsa")
    assert "ecdsa-sha2-nistp256 SHA256:" in said(capsys, "sign", str(copy))[0]
    for ending in ("", ".pub"):
        shutil.copy(f"{keys.alice}{ending}", tmp_path / f".ssh/id_ed25519{ending}")
    out, err = said(capsys, "sign", str(copy))
    assert f"signing with {tmp_path}/.ssh/id_ed25519\n" in err
    assert "2 signatures now" in out


@pytest.fixture
def agent(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ssh-agent that holds Alice's key."""
    socket = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    try:
        for _ in range(200):
            added = subprocess.run(["ssh-add", "-q", str(keys.alice)], capture_output=True)
            if added.returncode == 0:
                break
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(shutil.which("ssh-agent") is None, reason="needs ssh-agent")
def test_a_public_key_signs_where_its_private_half_is_in_the_agent(
    agent: None, copy: Path, keys: Keys, tmp_path: Path
) -> None:
    for name in ("alice", "mallory"):
        shutil.copy(keys.alice.with_name(f"{name}.pub"), tmp_path)
    sign_bank(FolderStore(copy), tmp_path / "alice.pub")
    with pytest.raises(PatchbankError, match=r"mallory\.pub did not sign: "):
        sign_bank(FolderStore(copy), tmp_path / "mallory.pub")


def test_a_passphrase_is_asked_for_by_ssh_keygen_itself(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, asked = tmp_path / "locked", tmp_path / "asked"
    keygen("-t", "ed25519", "-N", "opensesame", "-f", key)
    (tmp_path / "ask").write_text(f'#!/bin/sh\necho "$1" > {asked}\ncat {tmp_path}/passphrase\n')
    (tmp_path / "ask").chmod(0o700)
    monkeypatch.setenv("SSH_ASKPASS", str(tmp_path / "ask"))
    monkeypatch.setenv("SSH_ASKPASS_REQUIRE", "force")
    (tmp_path / "passphrase").write_text("wrong\n")
    with pytest.raises(PatchbankError, match=r"locked did not sign: .*incorrect passphrase"):
        sign_bank(FolderStore(copy), key)
    (tmp_path / "passphrase").write_text("opensesame\n")
    sign_bank(FolderStore(copy), key)
    assert "passphrase" in asked.read_text()


def test_only_a_sealed_bank_whose_seal_is_sound_is_signed(copy: Path, keys: Keys) -> None:
    store = FolderStore(copy)
    content = (copy / "seal.json").read_bytes()
    (copy / "seal.json").write_bytes(content.replace(b'"size": ', b'"size": 1', 1))
    with pytest.raises(BankCorrupt, match=r"seal\.json does not match its own root hash"):
        sign_bank(store, keys.alice)
    (copy / "seal.json").unlink()
    with pytest.raises(BankIncomplete, match=r"no finished bank: there is no seal\.json"):
        sign_bank(store, keys.alice)
    assert not (copy / "notes").exists()


def test_keys_and_places_that_cannot_sign_are_named(copy: Path, keys: Keys, tmp_path: Path) -> None:
    class ReadOnly(FolderStore):
        is_writable = False

    with pytest.raises(PatchbankError, match=r"no key .*nokey; name a private key"):
        sign_bank(FolderStore(copy), tmp_path / "nokey")
    (tmp_path / "text").write_text("no key")
    with pytest.raises(PatchbankError, match="text did not sign: "):
        sign_bank(FolderStore(copy), tmp_path / "text")
    with pytest.raises(
        PatchbankError, match="cannot be written to; sign the bank where it is made"
    ):
        sign_bank(ReadOnly(copy), keys.alice)


@pytest.mark.parametrize("name", ["a b", 'a"', "*", "a,b", "!a", "#a", "-a", "a\nb", "\x1b[2J", ""])
def test_a_name_that_is_not_one_name_to_ssh_is_refused(
    name: str, copy: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = said(capsys, "sign", str(copy), "--key", str(keys.alice), "--as", name, status=1)
    assert f"error: {name!a} cannot name a signer: write --as alice@lab" in err


def test_a_link_where_the_signature_belongs_is_not_followed(
    copy: Path, keys: Keys, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    (copy / "notes").mkdir()
    (copy / SIGNATURES).symlink_to(tmp_path / "mine")
    with pytest.raises(PatchbankError, match=r"seal\.json\.sig is a link"):
        sign_bank(FolderStore(copy), keys.alice)
    shutil.rmtree(copy / "notes")
    (copy / "notes").symlink_to(tmp_path)
    with pytest.raises(PatchbankError, match="notes is a link"):
        sign_bank(FolderStore(copy), keys.alice)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "seal.json.sig").exists()


# Judging.

SEAL = b"the bytes of a seal"


@pytest.fixture(scope="module")
def block(keys: Keys) -> str:
    return sign(SEAL, keys.alice)


@pytest.mark.parametrize(
    ("line", "state"),
    [
        pytest.param("alice@lab {key}", "trusted", id="any namespace"),
        pytest.param('# keys\n\nalice@lab namespaces="git,patchbank" {key} a comment', "trusted",
                     id="comments"),
        pytest.param('alice@lab namespaces="git" {key}', "unknown key", id="another namespace"),
        pytest.param('alice@lab valid-before="20200101" {key}', "unknown key", id="expired"),
        pytest.param('alice@lab valid-after="20200101" {key}', "trusted", id="valid by now"),
        pytest.param("{other}\nalice@lab,bob {key}", "trusted", id="several names"),
        pytest.param("alice@lab {mallory}", "unknown key", id="another key"),
        pytest.param("alice@lab cert-authority {key}", "unknown key", id="an authority"),
        pytest.param("", "unknown key", id="nobody"),
        pytest.param("\x1b[2J {key}", "trusted", id="a name that does not print"),
    ],
)  # fmt: skip
def test_allowed_signers_mean_what_they_mean_to_openssh(
    line: str, state: str, block: str, keys: Keys, tmp_path: Path
) -> None:
    allowed = tmp_path / "allowed"
    other = f"mallory {public(keys.mallory)}"
    allowed.write_text(
        line.format(key=public(keys.alice), mallory=public(keys.mallory), other=other) + "\n"
    )
    verdict = judge(SEAL, block, allowed=allowed)
    assert verdict.state == state
    assert (verdict.signer is not None) == (state == "trusted")
    assert re.fullmatch(r"ED25519 SHA256:\S{43}", verdict.key)
    assert str(verdict).isprintable()


def test_a_certificate_is_trusted_through_its_authority(
    block: str, keys: Keys, tmp_path: Path
) -> None:
    authority, key = tmp_path / "authority", tmp_path / "carol"
    for path in (authority, key):
        keygen("-t", "ed25519", "-N", "", "-f", path)
    keygen("-s", authority, "-I", "carol", "-n", "carol@lab", f"{key}.pub")
    allowed = tmp_path / "allowed"
    allowed.write_text(f"*@lab cert-authority {public(authority)}\n")
    certificate = tmp_path / "carol-cert.pub"
    shutil.copy(key, tmp_path / "carol-cert")
    made = sign(SEAL, certificate)
    verdict = judge(SEAL, made, allowed=allowed)
    assert (verdict.state, verdict.says) == ("trusted", "signed by carol@lab")
    assert judge(SEAL, made, allowed=keys.allowed).state == "unknown key"


def damaged(block: str, line: int, text: str) -> str:
    lines = block.splitlines()
    lines[line] = text
    return "\n".join(lines)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda b: b[:-40], id="cut"),
        pytest.param(lambda b: damaged(b, 1, "\x1b[2J"), id="no base64"),
        pytest.param(lambda b: damaged(b, 1, "AAAA" + b.splitlines()[1][4:]), id="no SSHSIG"),
        pytest.param(lambda b: f"{BEGIN}\n{END}", id="empty"),
        pytest.param(lambda b: f"{BEGIN}\n{'A' * 10**6}\n{END}", id="long"),
    ],
)
def test_a_damaged_signature_is_said_to_be_unusable(
    make: Callable[[str], str], block: str, keys: Keys
) -> None:
    verdict = judge(SEAL, make(block), allowed=keys.allowed)
    assert verdict.state == "damaged"
    assert str(verdict).startswith("unusable signature: ")
    assert str(verdict).isprintable()


def test_a_signature_for_another_purpose_is_none(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(SEAL)
    keygen("-Y", "sign", "-f", keys.alice, "-n", "git", tmp_path / "file")
    verdict = judge(SEAL, (tmp_path / "file.sig").read_text(), allowed=keys.allowed)
    assert verdict.state == "damaged"
    assert verdict.says.endswith("namespace does not match")


def test_a_bank_that_has_grown_is_to_be_signed_again(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    seal = json.loads((signed / "seal.json").read_bytes())
    (signed / "seal.json").write_text(json.dumps(seal))  # the same content, other bytes
    line = ("verify", str(signed), "--quick")
    words = "signature of an earlier or another seal; sign the bank again"
    assert words in said(capsys, *line)[0]
    out, err = said(capsys, *line, "--allowed-signers", str(keys.allowed), status=1)
    assert words in out
    assert f"error: {signed} is not signed by a key of {keys.allowed}: {words} (ssh-ed25519" in err


def test_more_signatures_than_a_team_has_are_not_looked_at(block: str) -> None:
    assert len(blocks_of((block + "\n").encode() * MOST_SIGNERS)) == MOST_SIGNERS
    with pytest.raises(BankError, match="33 signatures, expected at most 32"):
        blocks_of(block.encode() * 33)


# Asking for signatures.


def trusted(bank: Path, keys: Keys, required: str = "pull") -> tuple[str, ...]:
    content, signatures = (bank / "seal.json").read_bytes(), read_signatures(FolderStore(bank))
    return check_trust(content, signatures, where="s3://x", settings=settings(keys, required))


def strip(bank: Path, keys: Keys) -> None:
    (bank / SIGNATURES).unlink()


def sign_as_mallory(bank: Path, keys: Keys) -> None:
    (bank / SIGNATURES).unlink()
    sign_bank(FolderStore(bank), keys.mallory)


def swap_seal(bank: Path, keys: Keys) -> None:
    seal = json.loads((bank / "seal.json").read_bytes())
    (bank / "seal.json").write_text(json.dumps(seal))


def flood(bank: Path, keys: Keys) -> None:
    (bank / SIGNATURES).write_text(f"{BEGIN}\n{END}\n" * 1_000)


ATTACKS = [
    pytest.param(strip, "is not signed, and only banks that are signed by a key of", id="stripped"),
    pytest.param(sign_as_mallory, "is not signed by a key of .* not one of", id="another key"),
    pytest.param(swap_seal, "is not signed by a key of .* another seal", id="another seal"),
    pytest.param(flood, "1000 signatures, expected at most 32", id="a flood of signatures"),
]


@pytest.mark.parametrize(("attack", "words"), ATTACKS)
def test_a_bank_that_no_allowed_key_signed_is_refused_everywhere(
    attack: Callable[[Path, Keys], None],
    words: str,
    signed: Path,
    keys: Keys,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert trusted(signed, keys) == ("alice@lab",)
    monkeypatch.setenv("PATCHBANK_ALLOWED_SIGNERS", str(keys.allowed))
    monkeypatch.setenv("PATCHBANK_REQUIRE_SIGNATURE", "open")
    open_bank(signed)
    attack(signed, keys)
    for required in ("pull", "open"):
        with pytest.raises(BankError, match=f"s3://x.*{words}"):
            trusted(signed, keys, required)
    assert trusted(signed, keys, "nothing") == ()
    with pytest.raises(BankError, match=words):
        open_bank(signed)
    with pytest.raises(BankError, match=words):
        open_bank(f"file://{signed}")
    for place in (str(signed), f"file://{signed}"):
        line = ("verify", place, "--quick", "--allowed-signers", str(keys.allowed))
        assert re.search(words, said(capsys, *line, status=1)[1])


@pytest.mark.parametrize("attack", [strip, sign_as_mallory, swap_seal])
@pytest.mark.parametrize("part", [(), ("--layers", "1")], ids=["whole", "part"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_pull_with_allowed_signers_takes_signed_banks_only(
    attack: Callable[[Path, Keys], None],
    part: tuple[str, ...],
    scheme: str,
    signed: Path,
    keys: Keys,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The option settles this for the process and those it starts.
    for name in ("PATCHBANK_ALLOWED_SIGNERS", "PATCHBANK_REQUIRE_SIGNATURE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    attack(signed, keys)
    out = tmp_path / "here.bank"
    line = ("pull", f"{scheme}{signed}", str(out), *part, "--allowed-signers", str(keys.allowed))
    assert "is not signed" in said(capsys, *line, status=1)[1]
    assert not out.exists()
    sign_bank(FolderStore(signed), keys.alice)
    said(capsys, *line)
    assert (out / "seal.json").is_file()


def test_local_banks_are_asked_for_signatures_only_where_that_is_settled(
    sealed: Bank, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    open_bank(sealed.path)
    monkeypatch.setenv("PATCHBANK_ALLOWED_SIGNERS", str(keys.allowed))
    monkeypatch.setenv("PATCHBANK_REQUIRE_SIGNATURE", "pull")
    open_bank(sealed.path)
    monkeypatch.setenv("PATCHBANK_REQUIRE_SIGNATURE", "open")
    with pytest.raises(BankError, match="is not signed, and only banks"):
        open_bank(sealed.path)


def test_without_a_file_of_keys_nobody_is_trusted(sealed: Bank, keys: Keys, tmp_path: Path) -> None:
    content = (sealed.path / "seal.json").read_bytes()
    with pytest.raises(PatchbankError, match=r'no file .*/no of allowed signers; .* namespaces="p'):
        verdicts(content, None, allowed=tmp_path / "no")
    assert check_trust(content, b"x", where="x", settings=ShareSettings(tmp_path)) == ()


@pytest.mark.parametrize("answer", [None, "unknown option -- Y", "Unsupported operation for -Y"])
def test_a_missing_or_old_openssh_is_named(
    answer: str | None, block: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "need ssh-keygen of OpenSSH 8.2 or later, which is not installed: apt install"
    if answer is not None:
        program = tmp_path / "ssh-keygen"
        program.write_text(f"#!/bin/sh\necho 'ssh-keygen: {answer}' >&2\nexit 1\n")
        program.chmod(0o700)
        words = "ssh-keygen is too old for signatures: install OpenSSH 8.2 or later"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PatchbankError, match=words):
        judge(SEAL, block, allowed=keys.allowed)
    with pytest.raises(PatchbankError, match=words):
        sign(SEAL, keys.alice)


# At a store.


def test_verify_of_an_address_says_what_it_looked_at(
    signed: Path, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("verify", f"file://{signed}", "--allowed-signers", str(keys.allowed))
    out, _ = said(capsys, *line)
    words = "seal, card and sizes are right; tokens were not read: pull the bank\nsigned by alice@l"
    assert f"{signed}: {words}" in out
    assert json.loads(said(capsys, *line, "--json")[0])["signatures"][0]["signer"] == "alice@lab"
    (signed / "golden/zarr.json").unlink()
    (signed / "clips.parquet").write_bytes(b"")
    (signed / "\x1b[2J").write_bytes(b"")
    out, err = said(capsys, *line, status=1)
    assert "golden/zarr.json: is missing\n" in out
    assert "clips.parquet: 0 bytes, sealed " in out
    assert "\\x1b[2J: is not sealed" in out
    assert "3 problems found; push it again" in err
    (signed / "zarr.json").write_text("{}")
    assert "zarr.json is not the one that was sealed" in said(capsys, *line, status=1)[0]
    assert "pull it first" in said(capsys, *line, "--encoder", "fake", status=2)[1]


def test_sign_takes_an_address(copy: Path, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "sign", f"file://{copy}", "--key", str(keys.alice))
    assert trusted(copy, keys) == ("alice@lab",)
