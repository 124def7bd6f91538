"""Which store an address means."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
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
CLIENTS = {
    "s3": ("botocore", "s3"),
    "gs": ("gcsfs", "gs"),
    "sftp": ("paramiko", "sftp"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
"""The package that a scheme needs, and the extra that brings it."""
WITH_HOST = frozenset(KINDS) - {"file"}


def is_url(place: str | Path) -> bool:
    """Whether a place is an address of a store, and no folder of this disk."""
    return "://" in str(place) and not isinstance(place, Path)


def checked_place(place: str) -> str:
    """A place as it was typed, with its ~ as the home of a user.

    Raises `StoreError` for what is surely no folder that somebody meant: nothing at all, an address
    without a host or bucket, or with one slash.
    """
    if not place.strip():
        raise StoreError(
            "an empty place, expected a folder or an address such as s3://team/banks; "
            "is a variable not set?"
        )
    if is_url(place):
        parts = urlsplit(place)
        if parts.scheme in WITH_HOST and not parts.netloc:
            raise StoreError(
                f"{safe_url(place)} names no bucket or host, expected {parts.scheme}://team/banks; "
                "is a variable not set?"
            )
        return place
    typed = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(/?)", place)
    if typed and (typed[2] or typed[1] in KINDS):
        meant = safe_url(f"{typed[1]}://{place[typed.end() :]}")
        raise StoreError(
            f"{place} is no address: write {meant}, or ./{place} if it is a folder here"
        )
    return expanded(place)


def expanded(path: str) -> str:
    """A path with its ~ as the home of a user; `StoreError` where there is no such user."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise StoreError(
            f"{path}: there is no such user; write ./{path} if it is a folder here"
        ) from error


def open_store(place: str | Path) -> Store:
    """The store at an address, or a folder; nothing is asked of it yet.

    Raises `StoreError` for an unknown scheme, what `checked_place` does, or where the packages for
    it are not installed.
    """
    place = place if isinstance(place, Path) else checked_place(place)
    scheme = urlsplit(str(place)).scheme if is_url(place) else "file"
    if scheme not in KINDS:
        raise StoreError(
            f"{safe_url(str(place))}: no store {scheme}://; there are "
            f"{', '.join(f'{kind}://' for kind in KINDS)}, and folders"
        )
    package, extra = CLIENTS.get(scheme, ("", ""))
    if package and find_spec(package) is None:
        raise StoreError(f"{scheme}:// needs {package}: pip install 'patchbank[{extra}]'")
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
    no part of the name. Raises `StoreError` for the root of a bucket or host."""
    place = checked_place(place)
    if not is_url(place):
        path = Path(place).absolute()
        return str(path.parent), path.name
    address, query = re.fullmatch(r"([^?#]*)(.*)", place, re.DOTALL).groups()  # type: ignore[union-attr]
    scheme, _, path_there = address.partition("://")
    parent, slash, name = path_there.rstrip("/").rpartition("/")
    if not slash:
        at = safe_url(address)
        raise StoreError(f"{at} is the root of its place, and no bank's: write {at}/NAME.bank")
    return f"{scheme}://{parent or '/'}{query}", name


def bank_place(place: str, name: str) -> str:
    """The address of a bank in a folder of banks."""
    if not is_url(place):
        return f"{place.rstrip('/')}/{name}"
    path, mark, query = place.partition("?")
    scheme, _, path_there = path.partition("://")
    return f"{scheme}://{path_there.rstrip('/')}/{name}{mark}{query}"
