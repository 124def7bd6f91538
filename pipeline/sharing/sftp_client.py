"""Connections to an SSH server, made as OpenSSH's own client would make them.

Paramiko itself: fsspec's sftp takes any host key that it has not seen before.
"""

from __future__ import annotations

import logging
import shlex
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import getpid
from pathlib import Path
from typing import Any

from patchbank.pipeline.errors import NotInStore, StoreError
from patchbank.pipeline.sharing.wire import CONNECT_S, SILENT_S

MISSING = "sftp:// needs paramiko: pip install 'patchbank[sftp]'"
KEYS = "keys are looked for in ssh-agent, IdentityFile of ~/.ssh/config, and ~/.ssh/id_*"


@dataclass(frozen=True)
class SshPlace:
    """A machine as a person names it; ~/.ssh/config says the rest."""

    host: str
    user: str | None
    port: int | None

    @property
    def command(self) -> str:
        """What opens a shell there."""
        words = ["ssh", *(["-p", str(self.port)] if self.port else [])]
        return shlex.join([*words, f"{self.user}@{self.host}" if self.user else self.host])


class SftpPool:
    """Connections to one server, each used by one thread at a time; closed with the pool."""

    def __init__(self, place: SshPlace) -> None:
        self.place = place
        self._idle: list[Any] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._idle, getpid())

    @contextmanager
    def client(self, where: str) -> Iterator[Any]:
        """An SFTP client of paramiko; what it raises comes as `StoreError` or `NotInStore`."""
        with _asking(where, self.place):
            client = self._taken()
            try:
                yield client
            except (FileNotFoundError, PermissionError):
                self._idle.append(client)
                raise
            except BaseException:
                _close(client)
                raise
            self._idle.append(client)

    def _taken(self) -> Any:
        while self._idle:
            with suppress(IndexError):
                client = self._idle.pop()
                if client.get_channel().get_transport().is_active():
                    return client
                _close(client)
        # One at a time: servers refuse many that are not logged in yet.
        with self._lock:
            return _connect(self.place)


def _connect(place: SshPlace) -> Any:
    import paramiko

    logging.getLogger("paramiko").addHandler(logging.NullHandler())
    config_path = Path.home() / ".ssh/config"
    config = paramiko.SSHConfig.from_path(config_path) if config_path.is_file() else None
    told: dict[str, Any] = dict(config.lookup(place.host)) if config else {}
    ssh = paramiko.SSHClient()
    known = told.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")
    for path in ("/etc/ssh/ssh_known_hosts", *shlex.split(known)):
        with suppress(OSError):
            ssh.load_system_host_keys(str(Path(path).expanduser()))
    keys = [name for name in told.get("identityfile", ()) if Path(name).expanduser().is_file()]
    try:
        ssh.connect(
            told.get("hostname", place.host),
            port=place.port or int(told.get("port", 22)),
            username=place.user or told.get("user"),
            key_filename=keys,
            look_for_keys=not keys,
            allow_agent=told.get("identitiesonly", "no") != "yes",
            timeout=CONNECT_S,
            banner_timeout=CONNECT_S,
            auth_timeout=CONNECT_S,
            channel_timeout=CONNECT_S,
            sock=_proxy(place, told),
        )
        client = ssh.open_sftp()
    except BaseException:
        ssh.close()
        raise
    client.get_channel().settimeout(SILENT_S)
    client.connection = ssh  # paramiko closes connections whose SSHClient nobody holds
    return client


def _proxy(place: SshPlace, told: dict[str, Any]) -> Any:
    """The way to a server behind another, as ~/.ssh/config names it."""
    import paramiko

    command = told.get("proxycommand")
    if jump := told.get("proxyjump"):
        host, port = told.get("hostname", place.host), place.port or told.get("port", 22)
        command = shlex.join(["ssh", "-W", f"{host}:{port}", jump])
    return paramiko.ProxyCommand(command) if command and command != "none" else None


def _close(client: Any) -> None:
    with suppress(Exception):
        client.close()
    with suppress(Exception):
        client.connection.close()


def _close_all(idle: list[Any], process: int) -> None:
    # A process that was forked has copies, whose closing is not its business.
    while idle and process == getpid():
        _close(idle.pop())


@contextmanager
def _asking(where: str, place: SshPlace) -> Iterator[None]:
    try:
        import paramiko
    except ImportError as error:
        raise StoreError(MISSING) from error
    try:
        yield
    except FileNotFoundError as error:
        raise NotInStore(f"there is no {where}") from error
    except PermissionError as error:
        raise StoreError(f"{where}: the server does not permit that to this user") from error
    except paramiko.BadHostKeyException as error:
        raise StoreError(
            f"{where}: the server has another key than ~/.ssh/known_hosts says: it was set up "
            "anew, or is not the one you mean; ask who runs it"
        ) from error
    except paramiko.AuthenticationException as error:
        raise StoreError(
            f"{where}: access refused; {KEYS} (one with a passphrase: `ssh-add` it); `"
            f"{place.command}` shows more"
        ) from error
    except paramiko.ConfigParseError as error:
        raise StoreError(f"~/.ssh/config cannot be read: {error}") from error
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise _failure(error, where, place) from error


def _failure(error: Exception, where: str, place: SshPlace) -> StoreError:
    from paramiko.ssh_exception import NoValidConnectionsError

    from patchbank.pipeline.bank.damage import shown

    said = shown(str(error)) or type(error).__name__
    if "not found in known_hosts" in said:
        return StoreError(
            f"{where}: the key of {place.host} is not in ~/.ssh/known_hosts; type "
            f"`{place.command}` once, and compare the fingerprint that it shows"
        )
    on_the_way = TimeoutError | NoValidConnectionsError
    if isinstance(error, OSError) and error.errno is None and not isinstance(error, on_the_way):
        return StoreError(f"{where}: the server said: {said}; is its disk full?")
    if isinstance(error, TimeoutError):
        said = "the server said nothing for too long"
    return StoreError(f"{where}: {said}", may_pass=True)
