"""Which store an address means."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from patchbank.pipeline.errors import StoreError
from patchbank.pipeline.sharing.store import Store

KINDS = {
    "file": ("folder_store", "FolderStore"),
    "s3": ("s3_store", "S3Store"),
    "gs": ("gs_store", "GsStore"),
    "sftp": ("sftp_store", "SftpStore"),
    "http": ("http_store", "HttpStore"),
    "https": ("http_store", "HttpStore"),
    "hf": ("hub_store", "HubStore"),
}
"""Scheme of an address, and the module and class of its store: `Class.open(url)`."""


def is_url(place: str | Path) -> bool:
    """Whether a place is an address of a store, and no folder of this disk."""
    return "://" in str(place) and not isinstance(place, Path)


def open_store(place: str | Path) -> Store:
    """The store at an address, or a folder; nothing is asked of it yet.

    Raises `StoreError` for an unknown scheme, or where the packages for it are not installed.
    """
    scheme = urlsplit(str(place)).scheme if is_url(place) else "file"
    if scheme not in KINDS:
        raise StoreError(
            f"{safe_url(str(place))}: no store {scheme}://; there are "
            f"{', '.join(f'{kind}://' for kind in KINDS)}, and folders"
        )
    module, name = KINDS[scheme]
    store: Store = getattr(import_module(f"patchbank.pipeline.sharing.{module}"), name).open(
        str(place)
    )
    return store


def safe_url(url: str) -> str:
    """An address without user name, password, query and fragment: fit for messages and records."""
    if "://" not in url:
        return url
    scheme, rest = url.split("://", 1)
    place = rest.split("?", 1)[0].split("#", 1)[0].rstrip("/")
    host, slash, path = place.partition("/")
    if "@" in path and ":" in host and not host.rpartition(":")[2].isdigit():
        # A secret key with a slash in it, as those of S3 may have.
        host, slash, path = place.rpartition("@")[2].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def split_place(place: str) -> tuple[str, str]:
    """The folder that a bank lies in, and the bank's name there; a query, which may be a secret, is
    no part of the name."""
    if not is_url(place):
        path = Path(place).absolute()
        return str(path.parent), path.name
    address, query = re.fullmatch(r"([^?#]*)(.*)", place, re.DOTALL).groups()  # type: ignore[union-attr]
    parent, _, name = address.rstrip("/").rpartition("/")
    return parent + query, name
