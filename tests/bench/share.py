"""How fast a bank is pushed and pulled, against the usual clients on the same server.

    python tests/bench/share.py [--gb 2] [--rounds 3] [--sftp] [--json FILE] [--folder DIR]

The server is `rclone serve s3` on this machine, so that it takes its share of the same cores. Each
round pushes the bank's files by patchbank, by boto3's transfer manager and by `rclone copy`, then
pulls them, in an order that changes; every push goes to a place that is empty, what was moved is
removed before the next, and the disk has written everything before the clock runs. Patchbank's
times include what it proves: MD5 and SHA-256 of what is sent, SHA-256 of what comes, the seal's
files. The others check what they check by default. A ratio is taken within a round. Needs thrice
the bank's bytes on the disk and `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe, machine_facts
from servers import ACCESS_KEY, RCLONE, SECRET_KEY, s3_command, serve_ssh, started
from synthetic_bank import make_bank

from patchbank.pipeline.sharing.pull import pull_bank
from patchbank.pipeline.sharing.push import push_bank
from patchbank.pipeline.sharing.stores import open_store

ROW_BYTES = 512 * 768 * 2
BUCKET = "team"


@dataclass(frozen=True)
class Client:
    """One way to move a folder up and down; places are names of folders on the server."""

    name: str
    push: Callable[[Path, str], None]
    pull: Callable[[str, Path], None]


def patchbank_at(address: str, name: str = "patchbank") -> Client:
    def push(bank: Path, place: str) -> None:
        push_bank(bank, open_store(f"{address}/{place}"))

    def pull(place: str, out: Path) -> None:
        pull_bank(open_store(f"{address}/{place}"), out)

    return Client(name, push, pull)


def boto3_manager() -> Client:
    """boto3's transfer manager with its own settings, all files handed to it at once."""
    import boto3
    from s3transfer.manager import TransferManager

    def push(bank: Path, place: str) -> None:
        files = [path for path in bank.rglob("*") if path.is_file()]
        with TransferManager(boto3.client("s3", region_name="us-east-1")) as manager:
            sent = [
                manager.upload(str(path), BUCKET, f"{place}/{path.relative_to(bank)}")
                for path in files
            ]
            for one in sent:
                one.result()

    def pull(place: str, out: Path) -> None:
        client = boto3.client("s3", region_name="us-east-1")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{place}/")
        keys = [entry["Key"] for page in pages for entry in page["Contents"]]
        with TransferManager(client) as manager:
            asked = []
            for key in keys:
                path = out / key.removeprefix(f"{place}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                asked.append(manager.download(BUCKET, key, str(path)))
            for one in asked:
                one.result()

    return Client("boto3", push, pull)


def rclone_copy(port: int) -> Client:
    remote = f':s3,provider=Rclone,env_auth=true,endpoint="http://127.0.0.1:{port}":{BUCKET}'

    def copy(source: str, target: str) -> None:
        command = [str(RCLONE), "--config", os.devnull, "copy", source, target]
        subprocess.run(command, check=True)

    return Client(
        "rclone copy",
        lambda bank, place: copy(str(bank), f"{remote}/{place}"),
        lambda place, out: copy(f"{remote}/{place}", str(out)),
    )


@dataclass(frozen=True)
class Site:
    """Where a bench runs: the bank that is moved, the server's folder, the place to pull into."""

    bank: Path
    served: Path
    pulled: Path

    def timed(self, work: Callable[[], None]) -> float:
        """Seconds of a transfer that begins with nothing left to be written."""
        os.sync()
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    def push(self, client: Client) -> float:
        place = f"push-{time.monotonic_ns()}"
        seconds = self.timed(lambda: client.push(self.bank, place))
        self._check(self.served / place)
        shutil.rmtree(self.served / place)
        return seconds

    def pull(self, client: Client, place: str) -> float:
        seconds = self.timed(lambda: client.pull(place, self.pulled))
        self._check(self.pulled)
        shutil.rmtree(self.pulled)
        return seconds

    def _check(self, folder: Path) -> None:
        """All files came, at their sizes."""
        for path in sizes(self.bank).items():
            if sizes(folder).get(path[0]) != path[1]:
                raise SystemExit(f"{folder} lacks {path[0]}")


def sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    with ExitStack() as stack:
        folder = stack.enter_context(work_folder(options))
        facts = machine_facts(folder)
        say(describe(facts))
        bank = folder / "x.bank"
        make_bank(bank, n_clips=max(1, round(options.gb * 1e9 / ROW_BYTES)))
        n_bytes = sum(sizes(bank).values())
        found = run_s3(stack, folder, bank, options.rounds)
        if options.sftp:
            found |= run_sftp(stack, folder, bank, options.rounds)
    table(found, n_bytes)
    if options.json:
        content = {"machine": facts, "bytes": n_bytes, "seconds": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


def run_s3(stack: ExitStack, folder: Path, bank: Path, rounds: int) -> dict[str, list[float]]:
    served = folder / "served"
    (served / BUCKET).mkdir(parents=True)
    port = stack.enter_context(started(lambda port: s3_command(served, port)))
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    }
    site = Site(bank, served / BUCKET, folder / "pulled")
    rclone = rclone_copy(port)
    # The server repeats a checksum that an object was sent with beside parts of it too, which boto3
    # then takes for damaged: what is pulled was sent without.
    rclone.push(bank, "kept")
    clients = [patchbank_at(f"s3://{BUCKET}"), rclone]
    try:
        clients.append(boto3_manager())
    except ImportError:
        say("left out: boto3 is not installed: pip install -e '.[bench]'")
    return run_rounds(site, clients, rounds, "s3")


def run_sftp(stack: ExitStack, folder: Path, bank: Path, rounds: int) -> dict[str, list[float]]:
    server = stack.enter_context(serve_ssh(folder / "ssh"))
    home = folder / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/known_hosts").write_text(server.known_hosts)
    shutil.copy(server.key, home / ".ssh/id_ed25519")
    os.environ["HOME"] = str(home)
    site = Site(bank, server.folder, folder / "pulled")
    address = f"sftp://127.0.0.1:{server.port}{server.folder}"
    client = patchbank_at(address)
    client.push(bank, "kept")
    return run_rounds(site, [client], rounds, "sftp")


def run_rounds(
    site: Site, clients: Sequence[Client], rounds: int, kind: str
) -> dict[str, list[float]]:
    """Seconds by "s3 push: client"."""
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        order = [*clients[number % len(clients) :], *clients[: number % len(clients)]]
        for verb in ("push", "pull"):
            for client in order:
                seconds = site.push(client) if verb == "push" else site.pull(client, "kept")
                found.setdefault(f"{kind} {verb}: {client.name}", []).append(seconds)
                say(f"round {number + 1}/{rounds}  {kind} {verb}  {client.name}  {seconds:.2f} s")
    shutil.rmtree(site.served / "kept")
    return found


def table(found: dict[str, list[float]], n_bytes: int) -> None:
    """Medians, and patchbank's speed over that of each other client, within a round."""
    print(f"{n_bytes / 1e9:.2f} GB, medians of {len(next(iter(found.values())))} rounds")
    for key, seconds in sorted(found.items()):
        own = found[f"{key.split(':')[0]}: patchbank"]
        ratios = [theirs / ours for theirs, ours in zip(seconds, own, strict=True)]
        beside = "" if seconds is own else f"   patchbank / it: {median(ratios):.2f}"
        print(f"{key:24s} {n_bytes / median(seconds) / 1e6:7.0f} MB/s{beside}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--gb", type=float, default=2.0, help="size of the bank")
    add("--rounds", type=int, default=3)
    add("--sftp", action="store_true", help="patchbank over SFTP too (needs openssh-server)")
    add("--folder", type=Path, help="where everything is made; a temporary folder unless given")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


@contextmanager
def work_folder(options: argparse.Namespace) -> Iterator[Path]:
    """A folder of its own, removed in the end."""
    with tempfile.TemporaryDirectory(prefix="patchbank-share-", dir=options.folder) as name:
        if shutil.disk_usage(name).free < 4e9 * options.gb:
            raise SystemExit(f"{name} needs {4 * options.gb:.0f} GB; choose another --folder")
        yield Path(name)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
