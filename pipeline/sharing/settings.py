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
from patchbank.pipeline.sharing.stores import expanded

Requirement = Literal["nothing", "pull", "open"]
"""Which banks must be signed: none, those that come from elsewhere, or also those on this disk."""
REQUIREMENTS = ", ".join(get_args(Requirement))
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
    typed = {name: os.environ[key] for name, key in VARIABLES.items() if os.environ.get(key)}
    where = {name: f"${VARIABLES[name]}" if name in typed else str(path) for name in VARIABLES}
    return _checked(found | typed, where)


def require_signers(allowed_signers: Path) -> None:
    """From now on this process, and those it starts, take only banks from elsewhere that a key of
    the file has signed."""
    os.environ[VARIABLES["allowed_signers"]] = str(allowed_signers)
    if os.environ.get(VARIABLES["require_signature"]) != "open":
        os.environ[VARIABLES["require_signature"]] = "pull"


def _checked(found: Mapping[str, Any], where: Mapping[str, str]) -> ShareSettings:
    """The settings; `where` says of each which file or variable it would be from."""

    def text(name: str, expected: str) -> str | None:
        value = found.get(name)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise PatchbankError(f"{where[name]}: {name} is {value!r}, expected {expected}")
        return value

    required = text("require_signature", f"one of {REQUIREMENTS}") or "nothing"
    if required not in get_args(Requirement):
        raise PatchbankError(
            f"{where['require_signature']}: require_signature is {required!r}, expected one of "
            f"{REQUIREMENTS}"
        )
    signers = text("allowed_signers", "the path of a file of keys, in quotes")
    if required != "nothing" and signers is None:
        raise PatchbankError(
            "require_signature is set, but not allowed_signers: name the file of keys you trust, "
            f"in {settings_path()} or ${VARIABLES['allowed_signers']}"
        )
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchbank"
    cache = text("cache", "the path of a folder, in quotes")
    catalogue = text("catalogue", "an address or folder of banks, in quotes")
    return ShareSettings(
        cache=default if cache is None else Path(expanded(cache)),
        cache_limit_bytes=_cache_limit(found.get("cache_limit", "50G"), where["cache_limit"]),
        catalogue=None if catalogue is None else expanded(catalogue),
        allowed_signers=None if signers is None else Path(expanded(signers)),
        require_signature=required,  # type: ignore[arg-type]
    )


def _cache_limit(value: object, where: str) -> int:
    try:
        if isinstance(value, bool | float):
            raise PatchbankError("no size")
        return parse_bytes(str(value))
    except PatchbankError as error:
        raise PatchbankError(
            f'{where}: cache_limit is {value!r}, expected a size such as "50GB", or whole bytes'
        ) from error


def parse_bytes(text: str) -> int:
    """500M, 20 GB, 1.5GiB or a plain number, as bytes; `PatchbankError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in SIZE_UNITS:
        raise PatchbankError(f"{text!r} is no size; write 500MB, 20GB or 1.5GiB")
    return int(float(match[1]) * SIZE_UNITS[match[2]])
