"""`patchbank bank sign`: vouches for a bank with an SSH key."""

from __future__ import annotations

import base64
import getpass
import re
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from patchbank.pipeline.errors import PatchbankError


def sign(
    bank: Annotated[str, typer.Argument(metavar="BANK", help="A bank's folder, or its URL.")],
    key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Private key, or the .pub of one in ssh-agent; else ~/.ssh/id_*."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Your name in the line for allowed signers."),
    ] = None,
) -> None:
    """Sign a bank's seal with an SSH key, and print the line by which others know the key."""
    from patchbank.pipeline.sharing.signing import default_key
    from patchbank.pipeline.sharing.stores import open_store
    from patchbank.pipeline.sharing.trust import sign_bank

    signer = checked_name(usual_name() if name is None else name)
    store = open_store(bank)
    chosen = key or default_key()
    touch = "; touch it when it blinks" if is_hardware(chosen) else ""
    print(f"signing with {chosen}{touch}", file=sys.stderr)
    signed = sign_bank(store, chosen)
    print(f"{store.url}: seal {signed.root_sha256[:16]} signed\n  {signed.fingerprint}")
    if signed.n_signers > 1:
        print(f"{signed.n_signers} signatures now")
    if not signed.is_certificate:
        public = base64.b64encode(signed.key).decode()
        print(f"for the allowed signers of others:\n{allowed_line(signer, signed.kind, public)}")


def usual_name() -> str:
    """user@host, as ssh-keygen names keys."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError, ImportError):
        return "me"


def allowed_line(name: str, kind: str, public: str) -> str:
    """A line of an allowed_signers file, see ssh-keygen(1)."""
    return f'{name} namespaces="patchbank" {kind} {public}'


def checked_name(name: str) -> str:
    """`name`, if an allowed_signers file can hold it as one name, no pattern and no list."""
    if not re.fullmatch(r"[^\s\"#,*?!-][^\s\",*?!]*", name) or not name.isprintable():
        raise PatchbankError(
            f"{name!a} cannot name a signer: write --as alice@lab, without spaces, "
            'quotes, "," "*" "?" and "!"'
        )
    return name


def is_hardware(key: Path) -> bool:
    """Whether a key lies in a token that wants to be touched; as its public half says."""
    public = key if key.suffix == ".pub" else key.with_name(f"{key.name}.pub")
    try:
        return public.read_bytes()[:3] == b"sk-"
    except OSError:
        return False
