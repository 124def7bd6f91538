"""Parts of banks that lie elsewhere: the bytes of `bank convert`, and no more that travels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchbank.pipeline.bank import Bank, open_bank
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
def banks(sealed: Bank, made: Bank, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    folder = tmp_path_factory.mktemp("sources")
    halves = [
        rebuild_bank([sealed], folder / f"{n}.bank", rows=[rows])
        for n, rows in enumerate((np.arange(20), np.arange(20, 40)))
    ]
    return {
        "float16 with a prefix": sealed,
        "views": made,
        "holes": join_banks(halves, folder / "holes.bank"),
        "int8": rebuild_bank([made], folder / "int8.bank", dtype="int8"),
        "int4": rebuild_bank([sealed], folder / "int4.bank", dtype="int4"),
        "archive": rebuild_bank([sealed], folder / "cold.bank", storage="blosc"),
        "pooled": join_banks([sealed], folder / "thin.bank", pooled_only=True),
    }


def converted(bank: Bank, out: Path, **options: Any) -> Bank:
    return make_selection(bank, out, select(bank, **options), progress=lambda done, total: None)


def url_of(bank: Bank) -> str:
    return f"file://{bank.path}"


def left_beside(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}")]


CASES: Sequence[tuple[str, Options]] = [
    ("float16 with a prefix", {"layers": "last"}),
    ("float16 with a prefix", {"splits": ["valid"]}),
    ("float16 with a prefix", {"dtype": "int8"}),
    ("float16 with a prefix", {"pooled_only": True}),
    ("views", {"layers": (1,), "splits": ["train", "test"]}),
    ("views", {"clips": "with views"}),
    ("views", {"pooled_only": True, "clips": "by path"}),
    ("holes", {"layers": (2,)}),
    ("holes", {"splits": ["train"]}),
    ("holes", {"pooled_only": True, "layers": (1,)}),
    ("int8", {"splits": ["test"]}),
    ("int8", {"layers": (1,), "dtype": "float16"}),
    ("int8", {"layers": (1,)}),
    ("int4", {"splits": ["test"]}),
    ("int4", {"pooled_only": True, "splits": ["test"]}),
    ("archive", {"layers": (1,)}),
    ("archive", {"splits": ["test"], "dtype": "int8"}),
    ("archive", {"pooled_only": True}),
    ("pooled", {"splits": ["test"]}),
]


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
    ("kind", "options"), [pytest.param(k, o, id=f"{k}, {' '.join(o)}") for k, o in CASES]
)
def test_a_part_from_afar_has_the_bytes_of_a_conversion(
    kind: str,
    options: Options,
    banks: dict[str, Bank],
    tmp_path: Path,
    travelled: Travelled,
) -> None:
    bank, out = banks[kind], tmp_path / "part.bank"
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
