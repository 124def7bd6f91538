"""What a user or a team has settled about sharing: ~/.config/patchbank/settings.toml, and
environment variables above it."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from patchbank.pipeline.errors import PatchbankError

Requirement = Literal["nothing", "pull", "open"]
"""Which banks must be signed: none, those that come from elsewhere, or also those on this disk."""
VARIABLES = {
    "cache": "PATCHBANK_CACHE",
    "cache_limit": "PATCHBANK_CACHE_LIMIT",
    "catalogue": "PATCHBANK_CATALOGUE",
    "allowed_signers": "PATCHBANK_ALLOWED_SIGNERS",
    "require_signature": "PATCHBANK_REQUIRE_SIGNATURE",
}
SIZE_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
SIZE_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class ShareSettings:
    """The settings; `require_signature` without `allowed_signers` is refused."""

    cache: Path
    """Rows of banks that are read from afar, and notes of pushes that were begun."""
    cache_limit_bytes: int = 50 * 10**9
    catalogue: str | None = None
    """URL or folder whose names `pull` takes."""
    allowed_signers: Path | None = None
    require_signature: Requirement = "nothing"


def settings_path() -> Path:
    """Where the file would lie; $PATCHBANK_SETTINGS names another."""
    if named := os.environ.get("PATCHBANK_SETTINGS"):
        return Path(named)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "patchbank" / "settings.toml"


def load_settings() -> ShareSettings:
    """What is settled now; `PatchbankError` for an unknown name or value."""
    path = settings_path()
    found: dict[str, Any] = {}
    if path.is_file():
        try:
            found = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise PatchbankError(f"{path} cannot be read: {error}; correct it") from error
        if unknown := sorted(set(found) - set(VARIABLES)):
            raise PatchbankError(
                f"{path}: unknown setting {unknown[0]!r}; there are {', '.join(VARIABLES)}"
            )
    found |= {name: os.environ[key] for name, key in VARIABLES.items() if os.environ.get(key)}
    return _checked(found)


def require_signers(allowed_signers: Path) -> None:
    """From now on this process, and those it starts, take only banks from elsewhere that a key of
    the file has signed."""
    os.environ[VARIABLES["allowed_signers"]] = str(allowed_signers)
    if os.environ.get(VARIABLES["require_signature"]) != "open":
        os.environ[VARIABLES["require_signature"]] = "pull"


def _checked(found: Mapping[str, Any]) -> ShareSettings:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchbank"
    required = str(found.get("require_signature", "nothing"))
    if required not in get_args(Requirement):
        raise PatchbankError(
            f"require_signature is {required!r}, expected {', '.join(get_args(Requirement))}"
        )
    signers = found.get("allowed_signers")
    if required != "nothing" and signers is None:
        raise PatchbankError(
            "require_signature is set, but not allowed_signers: name the file of keys you trust, "
            f"in {settings_path()} or ${VARIABLES['allowed_signers']}"
        )
    return ShareSettings(
        cache=Path(found.get("cache", default)).expanduser(),
        cache_limit_bytes=parse_bytes(str(found.get("cache_limit", "50G"))),
        catalogue=None if found.get("catalogue") is None else str(found["catalogue"]),
        allowed_signers=None if signers is None else Path(signers).expanduser(),
        require_signature=required,  # type: ignore[arg-type]
    )


def parse_bytes(text: str) -> int:
    """500M, 20 GB, 1.5GiB or a plain number, as bytes; `PatchbankError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in SIZE_UNITS:
        raise PatchbankError(f"{text!r} is no size; write 500MB, 20GB or 1.5GiB")
    return int(float(match[1]) * SIZE_UNITS[match[2]])
