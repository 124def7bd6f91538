"""Parts of banks that lie elsewhere: the bytes of `bank convert`, and no more that travels."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank_damage import flip

from patchbank.pipeline.bank import Bank
from patchbank.pipeline.bank.join import join_banks
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError, BankMismatch, PatchbankError
from patchbank.pipeline.rebuild import rebuild_bank
from patchbank.pipeline.selection import make_selection, select
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.partial import part_bytes, pull_part

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHBANK_SETTINGS", str(tmp_path / "none.toml"))


@dataclass
class Travelled:
    """Bytes that came out of a store, by file."""

    files: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(n for name, n in self.files.items() if "/patches/" in name or "/prefix/" in name)

    @property
    def total(self) -> int:
        return sum(self.files.values())


@pytest.fixture
def travelled(monkeypatch: pytest.MonkeyPatch) -> Travelled:
    """Counts what the real store hands out."""
    found, stream = Travelled(), FolderStore.stream

    def counted(self: FolderStore, name: str, start: int, stop: int) -> Iterator[bytes]:
        for piece in stream(self, name, start, stop):
            found.files[name] = found.files.get(name, 0) + len(piece)
            yield piece

    monkeypatch.setattr(FolderStore, "stream", counted)
    return found


@pytest.fixture(scope="module")
def source(
    sealed: Bank, made: Bank, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bank]:
    """Banks by name, each made when it is first asked for."""
    folder = tmp_path_factory.mktemp("sources")

    def holes() -> Bank:
        rows = (np.arange(20), np.arange(20, 40))
        halves = [
            rebuild_bank([sealed], folder / f"{n}.bank", rows=[some]) for n, some in enumerate(rows)
        ]
        return join_banks(halves, folder / "holes.bank")

    make: dict[str, Callable[[], Bank]] = {
        "float16 with a prefix": lambda: sealed,
        "views": lambda: made,
        "holes": holes,
        "int8": lambda: rebuild_bank([made], folder / "int8.bank", dtype="int8"),
        "int4": lambda: rebuild_bank([sealed], folder / "int4.bank", dtype="int4"),
        "archive": lambda: rebuild_bank([sealed], folder / "cold.bank", storage="blosc"),
        "pooled": lambda: join_banks([sealed], folder / "thin.bank", pooled_only=True),
    }
    return functools.cache(lambda kind: make[kind]())


def converted(bank: Bank, out: Path, **options: Any) -> Bank:
    return make_selection(bank, out, select(bank, **options), progress=lambda done, total: None)


def url_of(bank: Bank) -> str:
    return f"file://{bank.path}"


def left_beside(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]


CASES: Sequence[tuple[str, Options]] = [
    ("float16 with a prefix", {"layers": "last"}),
    ("float16 with a prefix", {"dtype": "int8"}),
    ("views", {"clips": "with views"}),
    ("holes", {"pooled_only": True, "layers": (1,)}),
    ("int8", {"splits": ["test"], "layers": (1,)}),
    ("archive", {"splits": ["test"]}),
]
MORE_CASES: Sequence[tuple[str, Options]] = [
    ("float16 with a prefix", {"splits": ["valid"]}),
    ("float16 with a prefix", {"pooled_only": True}),
    ("views", {"layers": (1,), "splits": ["train", "test"]}),
    ("views", {"pooled_only": True, "clips": "by path"}),
    ("holes", {"layers": (2,)}),
    ("holes", {"splits": ["train"]}),
    ("int8", {"layers": (1,), "dtype": "float16"}),
    ("int8", {"layers": (1,)}),
    ("int4", {"splits": ["test"]}),
    ("int4", {"pooled_only": True, "splits": ["test"]}),
    ("archive", {"layers": (1,)}),
    ("archive", {"splits": ["test"], "dtype": "int8"}),
    ("archive", {"pooled_only": True}),
    ("pooled", {"splits": ["test"]}),
]


def _named(cases: Sequence[tuple[str, Options]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(k, o, id=f"{k}, {' '.join(o)}", marks=marks) for k, o in cases]


def with_table(options: Options, bank: Bank, folder: Path) -> Options:
    """`options` with a table of clips where they name one."""
    if "clips" not in options:
        return options
    rows = bank.clips.slice(3, 3).to_pylist()
    if options["clips"] == "by path":
        text = "\n".join(["path", *(row["path"] for row in rows)])
    else:
        text = "\n".join(["clip_id,view", *(f"{row['clip_id']},{row['view']}" for row in rows)])
    (folder / "list.csv").write_text(text)
    return options | {"clips": folder / "list.csv"}


@pytest.mark.parametrize(
    ("kind", "options"), [*_named(CASES), *_named(MORE_CASES, pytest.mark.slow)]
)
def test_a_part_from_afar_has_the_bytes_of_a_conversion(
    kind: str,
    options: Options,
    source: Callable[[str], Bank],
    tmp_path: Path,
    travelled: Travelled,
) -> None:
    bank, out = source(kind), tmp_path / "part.bank"
    options = with_table(options, bank, tmp_path)
    expected = converted(bank, tmp_path / "expected.bank", **options)
    found = pull_part(url_of(bank), out, **options)
    assert found.root_sha256 == expected.root_sha256
    assert verify_bank(out) == ()
    assert left_beside(out) == []
    n_bytes, n_tokens = travelled.total, travelled.tokens
    promised = part_bytes(url_of(bank), **options)
    assert (n_tokens == 0) == (not found.schema.holds_tokens)
    assert 0.97 * promised.travel_bytes < n_bytes < 1.03 * promised.travel_bytes
    assert 0.8 * found.seal.bank_bytes < promised.disk_bytes < 1.2 * found.seal.bank_bytes


def test_a_part_of_a_folder_is_a_conversion_too(sealed: Bank, tmp_path: Path) -> None:
    expected = converted(sealed, tmp_path / "expected.bank", layers=(2,))
    told: list[tuple[int, int]] = []
    found = pull_part(
        str(sealed.path),
        tmp_path / "part.bank",
        layers=(2,),
        progress=lambda done, total: told.append((done, total)),
    )
    assert found.root_sha256 == expected.root_sha256
    assert told[-1][0] == told[-1][1] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            {"splits": ["dev"]}, "no split 'dev' in .*; it has test, train, valid", id="s"
        ),
        pytest.param({"layers": (3,)}, r"has no layer 3; it has \[1, 2\]", id="layer"),
        pytest.param({"clips": "x.wav"}, "list.csv:2:path: no clip .* 'x.wav'", id="clip"),
        pytest.param({"layers": (1, 2)}, "leave nothing of .* out; .* without them", id="nothing"),
        pytest.param({"pooled_only": True, "dtype": "int8"}, "--dtype int8 is for", id="type"),
    ],
)
def test_what_there_is_not_is_said_before_tokens_travel(
    options: Options, words: str, sealed: Bank, tmp_path: Path, travelled: Travelled
) -> None:
    if "clips" in options:
        (tmp_path / "list.csv").write_text(f"path\n{options['clips']}\n")
        options = {"clips": tmp_path / "list.csv"}
    out = tmp_path / "part.bank"
    for ask in (part_bytes, functools.partial(pull_part, out=out)):
        with pytest.raises(PatchbankError, match=words):
            ask(url_of(sealed), **options)  # type: ignore[operator]
    assert set(travelled.files) <= {"seal.json", "zarr.json", "clips.parquet"}
    assert not out.exists()
    assert left_beside(out) == []


def test_a_place_that_is_taken_is_left_alone(sealed: Bank, tmp_path: Path) -> None:
    out = tmp_path / "part.bank"
    part = pull_part(url_of(sealed), out, layers=(1,))
    again = pull_part(url_of(sealed), out, layers=(1,))
    assert again.root_sha256 == part.root_sha256
    with pytest.raises(BankMismatch, match="holds another bank than this command makes"):
        pull_part(url_of(sealed), out, layers=(2,))
    with pytest.raises(BankMismatch, match=r"holds another bank than a part of .* as it is now"):
        pull_part(
            url_of(sealed), Path(shutil.copytree(sealed.path, tmp_path / "whole.bank")), layers=(1,)
        )
    (tmp_path / "folder").mkdir()
    with pytest.raises(BankError, match="exists and is no bank; choose another place"):
        pull_part(url_of(sealed), tmp_path / "folder", layers=(1,))
    assert verify_bank(out) == ()
    assert left_beside(out) == left_beside(tmp_path / "whole.bank") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param({"layers": (1,)}, r"c\.1\.0\.0 has SHA-256", id="a whole file"),
        pytest.param({"splits": ["test"]}, r"row 19 .*do not match the row's SHA-256", id="a row"),
    ],
)
def test_wrong_bytes_are_never_sealed(
    options: Options, words: str, copy: Path, tmp_path: Path
) -> None:
    file, out = copy / "layers/1/patches/c.1.0.0", tmp_path / "part.bank"
    whole = file.read_bytes()
    flip(file, 3 * 4096 + 5)
    with pytest.raises(BankCorrupt, match=words):
        pull_part(f"file://{copy}", out, **options)
    assert not (out / "seal.json").exists()
    file.write_bytes(whole)
    assert verify_bank(pull_part(f"file://{copy}", out, **options).path) == ()


KILLED = """
import os, sys, time
from pathlib import Path
from patchbank.pipeline.sharing.folder_store import FolderStore
from patchbank.pipeline.sharing.partial import pull_part

url, out = sys.argv[1], Path(sys.argv[2])
stream, asked = FolderStore.stream, []

def dying(self, name, start, stop):
    if "/patches/" in name:
        asked.append(name)
    if sys.argv[3] == "layers" and name.endswith("c.2.0.0"):
        while len(list(out.parent.glob(f".{out.name}.pull-*/whole/layers/1/patches/c.*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    if sys.argv[3] == "splits" and len(asked) > 7:
        os.kill(os.getpid(), 9)
    yield from stream(self, name, start, stop)

FolderStore.stream = dying
pull_part(url, out, **({"layers": [1]} if sys.argv[3] == "layers" else {"splits": ["train"]}))
"""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"layers": [1]}, id="files", marks=pytest.mark.slow),
        pytest.param({"splits": ["train"]}, id="rows", marks=pytest.mark.slow),
    ],
)
def test_a_pull_that_was_killed_fetches_nothing_again(
    options: Options, sealed: Bank, tmp_path: Path, travelled: Travelled
) -> None:
    out = tmp_path / "part.bank"
    line = [sys.executable, "-c", KILLED, url_of(sealed), str(out), next(iter(options))]
    assert subprocess.run(line, timeout=120, check=False).returncode == -9
    assert len(left_beside(out)) == 1
    expected = converted(sealed, tmp_path / "expected.bank", **options)
    found = pull_part(url_of(sealed), out, **options)
    assert found.root_sha256 == expected.root_sha256
    assert left_beside(out) == []
    again = {name for name in travelled.files if "/c." not in name or name.endswith(".0.0")}
    first_look = {"seal.json", "zarr.json"}
    if "layers" in options:
        assert again == set(travelled.files) == {*first_look, "layers/1/patches/c.2.0.0"}
    else:
        assert all("/patches/" in name or "/prefix/" in name for name in again - first_look)
        # Nothing of the indices at the ends of the shards, which had come before any row.
        rows = part_bytes(url_of(sealed), **options).row_bytes
        indices = sum(
            sealed.schema.n_shards * array.layout(sealed.schema.rows_per_shard).index_bytes
            for array in sealed.schema.arrays()
        )
        assert 0 < travelled.tokens <= rows - indices


def test_two_pulls_into_one_place_make_one_bank(sealed: Bank, tmp_path: Path) -> None:
    out, said = tmp_path / "part.bank", list[str]()

    def pull(_: int) -> Bank:
        return pull_part(url_of(sealed), out, splits=["train"], say=said.append)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(pull, range(2))
    assert first.root_sha256 == second.root_sha256
    assert all("another process pulls into" in line for line in said)
    assert verify_bank(out) == ()
    assert left_beside(out) == []
