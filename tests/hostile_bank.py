"""What an attacker does to a bank, and what everybody then does with it.

Whoever can write a bank's files can also recompute every digest, so each damage is sealed again
before the bank is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import resource
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankError
from patchbank.probing import BatchLoader

SPARE_BYTES = 80 * 2**20
"""What using a bank may take beside what its files justify; clips.parquet is granted 64 MiB."""
MOST_EXPANSION = 256
THREADS_BYTES = 256 * 2**20
"""Address space for threads: stacks, and what an allocator reserves for each."""

POOLS: list[pa.MemoryPool] = []
"""Kept, because memory that lives on in a traceback is given back to the pool that it is from."""

DEEP = "DEEP"
"""Stands for a list in a list in a list ... where JSON is written."""
HOSTILE = [
    None, True, False, -1, 0, 1, 2, 3, 17, 2**16, 2**31, 2**40, 2**48, 2**62, 2**64, 10**30,
    10**400, 1.5, float("nan"), float("inf"), -0.0, "", "7", "-1", "x", "\ud800", "\n\x1b[2J",
    "y" * 100_000, [], {}, [0], [1, 2], {"a": 1}, [[1]], DEEP, "float32", "int8", [1] * 10_000,
]  # fmt: skip
HOSTILE_PATHS = [
    "/etc/passwd", "../x", "layers/../../x", "layers\\1", "", ".", "./zarr.json",
    "layers//zarr.json", "zarr.json/", "a\0b", "a\nb", "x" * 300, "y/" * 3_000 + "z",
    "seal.json", "zarr.json", "layers", "commits/00000.json", "notes/x", "\ud800",
]  # fmt: skip


def json_bytes(document: Any) -> bytes:
    """JSON text of `document`, in which `DEEP` becomes 3,000 nested lists."""
    return json.dumps(document).replace(f'"{DEEP}"', "[" * 3_000 + "]" * 3_000).encode()


def leaves(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON document, objects and lists included."""
    if at:
        yield at
    if isinstance(document, list):
        document = dict(enumerate(document))
    for key, value in document.items() if isinstance(document, dict) else ():
        yield from leaves(value, (*at, key))


def changed(document: Any, at: tuple[Any, ...], value: object) -> Any:
    """A copy of a JSON document with another value at a place."""
    copy = json.loads(json.dumps(document))
    parent = copy
    for key in at[:-1]:
        parent = parent[key]
    parent[at[-1]] = value
    return copy


def without(document: Any, at: tuple[Any, ...]) -> Any:
    """A copy of a JSON document without the value at a place."""
    copy = json.loads(json.dumps(document))
    parent = copy
    for key in at[:-1]:
        parent = parent[key]
    del parent[at[-1]]
    return copy


def rooted(seal: dict[str, Any]) -> bytes:
    """seal.json with the root hash that its content has, where it can have one."""
    rest = {key: value for key, value in seal.items() if key != "root_sha256"}
    with contextlib.suppress(ValueError):
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
        seal = rest | {"root_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json_bytes(seal)


def reseal(bank: Path) -> None:
    """Writes sizes, digests and root hash of a bank's files, as they are now, into its seal.

    A file that is gone leaves the seal, a new one enters it.
    """
    seal = json.loads((bank / "seal.json").read_bytes())
    files = []
    for path in sorted(bank.rglob("*")):
        name = path.relative_to(bank).as_posix()
        if path.is_file() and name != "seal.json":
            content = path.read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            files.append({"path": name, "size": len(content), "sha256": sha256})
    seal["files"] = sorted(files, key=lambda file: str(file["path"]))
    (bank / "seal.json").write_bytes(rooted(seal))


class Victim:
    """A bank that is damaged and mended over and over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = {
            file.relative_to(path).as_posix(): file.read_bytes()
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }

    def document(self, name: str) -> Any:
        return json.loads(self.whole[name])

    @contextmanager
    def holding(self, changes: Mapping[str, bytes | None], *, seal: bool = True) -> Iterator[Path]:
        """The bank with other bytes in some files, None for a file that is gone, sealed again."""
        try:
            for name, content in changes.items():
                if content is None:
                    (self.path / name).unlink()
                else:
                    (self.path / name).write_bytes(content)
            if seal:
                self._reseal(changes)
            yield self.path
        finally:
            for name in {*changes, "seal.json"}:
                if name in self.whole:
                    (self.path / name).write_bytes(self.whole[name])
                else:
                    (self.path / name).unlink(missing_ok=True)

    def _reseal(self, changes: Mapping[str, bytes | None]) -> None:
        """`reseal`, without a look at the files that did not change."""
        seal = self.document("seal.json")
        files = {file["path"]: file for file in seal["files"]}
        for name, content in changes.items():
            if content is None:
                files.pop(name, None)
            else:
                sha256 = hashlib.sha256(content).hexdigest()
                files[name] = {"path": name, "size": len(content), "sha256": sha256}
        seal["files"] = [files[name] for name in sorted(files)]
        (self.path / "seal.json").write_bytes(rooted(seal))


def use(path: Path, *, command_line: bool = False) -> str:
    """Does everything that is done with a bank, within the memory that its files justify.

    Returns what reading it said, "" where all was read. Raises what is no `BankError`, and
    `AssertionError` where the command line, or the memory, is not as it should be.
    """
    with little_memory(path):
        said = _refusal(lambda: _read_everything(path))
        for quick in (True, False):
            _refusal(lambda quick=quick: verify_bank(path, quick=quick))  # type: ignore[misc]
        if command_line:
            for line in (["show"], ["show", "--json"], ["verify"], ["verify", "--quick"]):
                run_command_line([*line, str(path)])
            run_command_line(["ls", str(path.parent)])
    return said


@contextmanager
def little_memory(path: Path) -> Iterator[None]:
    """Leaves the process, and Arrow, the memory that a bank's files justify, and some spare.

    NumPy raises `MemoryError` where it asks for more, even if it would never touch it.
    """
    bank_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    most = MOST_EXPANSION * bank_bytes + SPARE_BYTES
    usual, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    POOLS.append(pool)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    pa.set_memory_pool(pool)
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + most + THREADS_BYTES, limits[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        pa.set_memory_pool(usual)
    assert pool.max_memory() < most, f"{pool.max_memory()} bytes of Arrow"


@contextmanager
def counted_memory(path: Path) -> Iterator[None]:
    """Counts every allocation of Python and NumPy; several times slower than `little_memory`."""
    bank_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * bank_bytes + 8 * 2**20, f"{peak} bytes of Python and NumPy"


def _refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except BankError as error:
        said = str(error)
    else:
        said = ""
    assert len(said) < 2_000, "an error is one sentence"
    return said


def _read_everything(path: Path) -> None:
    bank = open_bank(path)
    problems = [_refusal(act) for act in readers(bank)]
    for problem in problems:
        if problem:
            raise BankError(problem)


def readers(bank: Bank) -> Iterator[Callable[[], object]]:
    """Every way to read something from an open bank."""
    yield lambda: (bank.clips, bank.status)
    for layer in (*bank.layers[:3], None):
        yield lambda layer=layer: bank.places(bank.resolve_layer(layer))  # type: ignore[misc]
        yield lambda layer=layer: bank.places(bank.resolve_layer(layer), "prefix")  # type: ignore[misc]
        yield lambda layer=layer: bank.n_patches(bank.resolve_layer(layer))  # type: ignore[misc]
        for pool in ("mean", "max", "min"):
            yield lambda layer=layer, pool=pool: bank.pooled(bank.resolve_layer(layer), pool)  # type: ignore[misc]
        yield lambda layer=layer: bank.scale(bank.resolve_layer(layer))  # type: ignore[misc]
        yield lambda layer=layer: bank.constants(bank.resolve_layer(layer))  # type: ignore[misc]
        for tier in ("ram", "map"):
            yield lambda layer=layer, tier=tier: read_batches(bank, layer, tier)  # type: ignore[misc]


def read_batches(bank: Bank, layer: int | None, tier: str) -> int:
    """The number of rows in an epoch, in shuffled and in consecutive batches."""
    n_rows = 0
    for shuffle in (True, False):
        loader = BatchLoader(bank, layer=layer, batch_size=8, tier=tier, shuffle=shuffle)  # type: ignore[arg-type]
        n_rows = sum(len(batch.patches.sum((1, 2))) for batch in loader)
    return n_rows


def run_command_line(line: list[str]) -> tuple[int, str]:
    """Status and words of `patchbank bank LINE`, which never shows a traceback."""
    # As strict as a terminal: what UTF-8 cannot hold does not print.
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", "strict") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["bank", *line])
        out.flush(), err.flush()
    words = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "Traceback" not in words
    assert status in (0, 1)
    if status == 1:
        errors = [text for text in words.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1, words
    return status, words


def random_flips(content: bytes, generator: np.random.Generator) -> bytes:
    """Some bytes of a file replaced, a piece cut out, or a piece doubled."""
    data = bytearray(content)
    action = int(generator.integers(8))
    start, n_bytes = int(generator.integers(len(data))), int(generator.integers(1, 64))
    if action == 0:
        del data[start : start + n_bytes]
    elif action == 1:
        data[start:start] = data[start : start + n_bytes]
    elif action == 2:
        data[start : start + n_bytes] = bytes([int(generator.choice([0, 127, 255]))]) * n_bytes
    else:
        for place in generator.integers(len(data), size=int(generator.integers(1, 4))).tolist():
            data[place] = int(generator.integers(256))
    return bytes(data)
