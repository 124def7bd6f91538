"""SSH signatures over the bytes of a seal, which OpenSSH's ssh-keygen makes and checks.

Nothing that a bank holds becomes an option or a path of its command line: what is signed, and the
signature, lie in files of a folder of their own.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from patchbank.pipeline.bank.damage import shown
from patchbank.pipeline.errors import BankError, PatchbankError

NAMESPACE = "patchbank"
BEGIN, END = "-----BEGIN SSH SIGNATURE-----", "-----END SSH SIGNATURE-----"
MAGIC = b"SSHSIG\0\0\0\1"
MOST_SIGNERS = 32
MOST_PRINCIPALS = 16
CHECK_S = 30
PERSON_S = 600
"""How long a passphrase or a touch may take."""
USUAL_KEYS = ("id_ed25519", "id_ed25519_sk", "id_ecdsa", "id_ecdsa_sk", "id_rsa")
TOO_OLD = ("unknown option", "illegal option", "invalid option", "Unsupported operation for -Y")
State = Literal["trusted", "unknown key", "other seal", "damaged"]


@dataclass(frozen=True)
class Verdict:
    """What is known of one signature."""

    state: State
    """"trusted": valid, of an allowed signer; "unknown key": valid, of nobody we know."""
    key: str
    """Kind and fingerprint: "ED25519 SHA256:..."."""
    signer: str | None
    says: str

    def __str__(self) -> str:
        return f"{self.says} ({self.key})" if self.key else self.says


def blocks_of(signatures: bytes) -> tuple[str, ...]:
    """The armoured signatures in a file of them; `BankError` where there are more than 32."""
    text = signatures.decode("ascii", "replace")
    blocks = re.findall(f"{BEGIN}.*?(?:{END}|\\Z)", text, re.DOTALL)
    if len(blocks) > MOST_SIGNERS:
        raise BankError(f"{len(blocks)} signatures, expected at most {MOST_SIGNERS}")
    return tuple(blocks)


def key_of(block: str) -> bytes:
    """The public key that a signature names, as OpenSSH writes it; `ValueError` for a damaged one.

    Source: PROTOCOL.sshsig of OpenSSH.
    """
    armoured = block.strip().removeprefix(BEGIN).removesuffix(END)
    content = base64.b64decode("".join(armoured.split()), validate=True)
    start = len(MAGIC) + 4
    stop = start + int.from_bytes(content[len(MAGIC) : start], "big")
    if not content.startswith(MAGIC) or not start < stop <= len(content):
        raise ValueError("no SSH signature of version 1")
    return content[start:stop]


def kind_of(key: bytes) -> str:
    """The type of a public key: "ssh-ed25519"."""
    return shown(key[4 : 4 + int.from_bytes(key[:4], "big")].decode("ascii", "replace"))


def fingerprint_of(key: bytes) -> str:
    """A public key as one line can show it."""
    sha256 = base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
    return f"{kind_of(key)} SHA256:{sha256}"


def default_key() -> Path:
    """The key that ssh would try first; `PatchbankError` where there is none."""
    folder = Path.home() / ".ssh"
    for name in USUAL_KEYS:
        for path in (folder / name, folder / f"{name}.pub"):
            if path.is_file():
                return path
    raise PatchbankError(
        f"no SSH key in {folder} ({', '.join(USUAL_KEYS)}); name one with --key, or make one: "
        "ssh-keygen -t ed25519"
    )


def sign(content: bytes, key: Path) -> str:
    """An armoured signature over `content`.

    `key` is a private key, or a public one whose private half is in ssh-agent. A passphrase is
    asked for on the terminal, by ssh-keygen itself.
    """
    if not key.is_file():
        raise PatchbankError(f"no key {key}; name a private key, or the .pub of one in ssh-agent")
    with TemporaryDirectory(prefix="patchbank-") as folder:
        document = Path(folder) / "document"
        document.write_bytes(content)
        line = ["-Y", "sign", "-f", str(key.absolute()), "-n", NAMESPACE, str(document)]
        # From a pipe it would not ask on the terminal, but in a window.
        done = _ssh_keygen(line, None, timeout_s=PERSON_S)
        made = document.with_name("document.sig")
        if done.returncode != 0 or not made.is_file():
            raise PatchbankError(f"{key} did not sign: {_reason(done)}")
        return made.read_text("ascii").strip()


def judge(content: bytes, block: str, *, allowed: Path | None) -> Verdict:
    """Whether `block` signs `content`, and who in `allowed`, an allowed_signers file, did so."""
    try:
        named = fingerprint_of(key_of(block))
    except ValueError as error:
        return Verdict("damaged", "", None, f"unusable signature: {error}")
    with TemporaryDirectory(prefix="patchbank-") as folder:
        file = Path(folder) / "signature"
        file.write_text(block + "\n", "ascii", "replace")
        signer, key = _signer(content, file, allowed) if allowed else (None, "")
        if signer is not None:
            return Verdict("trusted", key, shown(signer), f"signed by {shown(signer)}")
        line = ["-Y", "check-novalidate", "-n", NAMESPACE, "-s", str(file)]
        done = _ssh_keygen(line, content)
    if done.returncode == 0:
        whose = "none that you trust yet" if allowed is None else f"not one of {allowed}"
        return Verdict("unknown key", _key(done), None, f"signed by a key, {whose}")
    if b"incorrect signature" in done.stderr:
        says = "signature of an earlier or another seal; sign the bank again"
        return Verdict("other seal", named, None, says)
    return Verdict("damaged", named, None, f"unusable signature: {_reason(done)}")


def _signer(content: bytes, file: Path, allowed: Path) -> tuple[str | None, str]:
    """Who signed, and the key; both empty where nobody did whom `allowed` names."""
    lists = ["-f", str(allowed.absolute()), "-s", str(file)]
    found = _ssh_keygen(["-Y", "find-principals", *lists], content)
    names = found.stdout.decode("utf-8", "replace").splitlines()
    # It finds by key alone; the namespace, and whether the bytes were signed, is asked of each.
    for name in names[:MOST_PRINCIPALS] if found.returncode == 0 else []:
        done = _ssh_keygen(["-Y", "verify", *lists, "-n", NAMESPACE, "-I", name], content)
        if done.returncode == 0:
            return name, _key(done)
    return None, ""


def _key(done: subprocess.CompletedProcess[bytes]) -> str:
    """Kind and fingerprint of the key, from what ssh-keygen says of a good signature."""
    said = done.stdout.decode("utf-8", "replace")
    match = re.search(r" with (\S+) key (SHA256:\S+)\s*$", said)
    return shown(f"{match[1]} {match[2]}" if match else said.strip())


def _ssh_keygen(
    arguments: Sequence[str], content: bytes | None, *, timeout_s: float = CHECK_S
) -> subprocess.CompletedProcess[bytes]:
    """Runs ssh-keygen; `content` goes to its stdin, which is ours where that is None."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise PatchbankError(
            "signatures need ssh-keygen of OpenSSH 8.2 or later, which is not installed: "
            "apt install openssh-client, or dnf install openssh"
        )
    try:
        done = subprocess.run(
            [program, *arguments],
            input=content,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired:
        raise PatchbankError(f"ssh-keygen gave no answer in {timeout_s} s; try again") from None
    if any(words in done.stderr.decode("utf-8", "replace") for words in TOO_OLD):
        raise PatchbankError(
            f"{program} is too old for signatures: install OpenSSH 8.2 or later (`ssh -V` tells)"
        )
    return done


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last that ssh-keygen said, as a part of one line."""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return shown(lines[-1]) if lines else f"ssh-keygen ended with status {done.returncode}"
