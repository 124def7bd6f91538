"""Names in seals: whatever a stranger writes there, a file of a bank stays in the bank."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from fake_bank import SETTINGS
from hostile_bank import rooted
from hypothesis import given, settings
from hypothesis import strategies as st

from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.commit import read_record
from patchbank.pipeline.bank.sealed_names import first_clash, is_bank_name
from patchbank.pipeline.bank.verify import verify_bank
from patchbank.pipeline.errors import BankCorrupt, BankError
from patchbank.pipeline.extraction import extract

WRONG = [
    "", ".", "..", "/", "/etc/passwd", "//host/share/zarr.json", "../zarr.json", "./zarr.json",
    "layers/../zarr.json", "layers/./zarr.json", "layers//zarr.json", "layers/zarr.json/",
    "layers\\zarr.json", "layers/..\\..\\zarr.json", "C:zarr.json", "C:/zarr.json",
    "layers/zarr.json:hidden.json", "layers/zarr.json::$DATA", "layers/1/zarr.json\0",
    "layers/1/zarr.json\n", "layers/\x1b[2J/zarr.json", "layers/\u202enosj.json",
    "layers/\u200bzarr.json", "layers/zarr\uff0ejson", "layers/\uff0e\uff0e/zarr.json",
    "layers/caf\xe9.json", "layers/\ud800.json", "layers/ /zarr.json", "layers/1 /zarr.json",
    "layers/1./zarr.json", "layers/zarr.json.", "layers/zarr.json ", "layers/~/zarr.json",
    "layers/-rf.json", "layers/.hidden/zarr.json", "layers/.json", "layers/c.", "layers/c.0.",
    "layers/c.x", "layers/con.json", "layers/CON/zarr.json", "layers/nul.zarr.json",
    "layers/Com1.json", "layers/lpt9/c.0", "golden/AUX.json", "layers/PRN.parquet",
    "seal.json", "SEAL.JSON", "ZARR.json", "notes/x.json", ".work/x.json", "parts/00000.parquet",
    ".drafts/x.json", "Layers/zarr.json", "layers", "golden", "commits", "other/zarr.json",
    "README.md", "setup.py", "layers/conftest.py", "layers/x.pkl", "layers/x.pth", "layers/x",
    "layers/x.so", "layers/x.sh", f"layers/{'x' * 96}.json", "layers/" + "a/" * 7 + "c.0",
    "x" * 10**6, "layers/" * 10**5 + "zarr.json", None, 1, ["zarr.json"], b"zarr.json",
]  # fmt: skip
RIGHT = [
    "zarr.json", "clips.parquet", "layers/zarr.json", "layers/12/zarr.json",
    "layers/1/patches/c.0.0.0", "layers/1/n_patches/c.17", "layers/1/scale/c", "golden/zarr.json",
    "golden/tokens_1_prefix/c.0.0", "commits/00000.json", "commits/golden.json",
    "layers/1/new/zarr.json", f"layers/{'x' * 95}.json",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG, ids=lambda name: ascii(name)[:30])
def test_a_name_that_some_disk_takes_for_another_place_is_no_name(name: object) -> None:
    assert not is_bank_name(name)


@pytest.mark.parametrize("name", RIGHT)
def test_names_that_banks_have_are_names(name: str) -> None:
    assert is_bank_name(name)


PIECES = st.sampled_from(
    [*"/\\.:~- \0\n", "..", "layers", "golden", "commits", "zarr", ".json", ".parquet", "c", "c.0",
     "C:", "nul", "com1", "\u202e", "\uff0f", "\u2215", "\xe9", "1"]
)  # fmt: skip
TEXTS = st.text() | st.lists(PIECES, max_size=8).map("".join)
MAYBE_NAMES = TEXTS | TEXTS.map("layers/{}.json".format) | TEXTS.map("golden/{}/c.0".format)


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(name=MAYBE_NAMES)
def test_whatever_the_text_an_accepted_name_stays_in_its_folder(name: str) -> None:
    if not is_bank_name(name):
        return
    assert name.isascii()
    assert name.isprintable()
    folder = "/banks/x.bank"
    assert os.path.normpath(f"{folder}/{name}") == f"{folder}/{name}"
    assert PurePosixPath(folder, name).is_relative_to(folder)
    windows = PureWindowsPath("C:/banks/x.bank") / name
    assert windows.is_relative_to("C:/banks/x.bank")
    assert windows.parts[3:] == tuple(name.split("/"))
    assert not windows.is_reserved()
    assert not any(PureWindowsPath(part).is_reserved() for part in windows.parts[1:])


@pytest.mark.parametrize(
    ("names", "clash"),
    [
        pytest.param(["layers/a.json", "layers/A.json"], "layers/A.json", id="case of a file"),
        pytest.param(["layers/a/c", "layers/A/c.0"], "layers/A/c.0", id="case of a folder"),
        pytest.param(["layers/c", "layers/c/c.0"], "layers/c", id="a file that is a folder"),
        pytest.param(["layers/C.json/c", "layers/c.json"], "layers/c.json", id="in another case"),
        pytest.param(["layers/c.0", "layers/c.0"], "layers/c.0", id="twice"),
        pytest.param(RIGHT, None, id="names of a bank"),
    ],
)
def test_names_that_would_be_one_file_are_told(names: list[str], clash: str | None) -> None:
    assert first_clash(names) == clash


def sealed_with(bank: Path, path: str) -> None:
    """Adds an empty file to a seal."""
    seal = json.loads((bank / "seal.json").read_bytes())
    seal["files"].append({"path": path, "size": 0, "sha256": "0" * 64})
    (bank / "seal.json").write_bytes(rooted(seal))


@pytest.mark.parametrize("path", ["../x.json", "layers/nul.json", "notes/x.json", "a\x1b[2J.json"])
def test_a_seal_with_such_a_name_is_refused_and_the_name_is_shown_escaped(
    path: str, copy: Path
) -> None:
    sealed_with(copy, path)
    with pytest.raises(
        BankCorrupt, match=r"seal\.json is damaged.*names no file of a bank"
    ) as said:
        open_bank(copy)
    assert repr(path) in str(said.value)
    assert str(said.value).isprintable()
    assert len(verify_bank(copy)) == 1


def test_a_seal_that_differs_in_case_only_is_refused(copy: Path) -> None:
    sealed_with(copy, "golden/ZARR.json")
    with pytest.raises(BankCorrupt, match="is named twice, or is a folder of another"):
        open_bank(copy)


@pytest.mark.parametrize("name", ["zarr.json", "seal.json"])
def test_a_document_of_ten_gigabytes_is_not_read(name: str, copy: Path) -> None:
    os.truncate(copy / name, 10 * 2**30)
    tracemalloc.start()
    with pytest.raises(BankCorrupt, match=rf"{name}.* more than (16777216|33554432) bytes"):
        open_bank(copy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20


def test_a_commit_record_may_name_parts_and_no_other_place(copy: Path) -> None:
    record = json.loads((copy / "commits/00000.json").read_bytes())
    assert any(file["path"] == "parts/00000.parquet" for file in record["files"])
    record["files"][0]["path"] = "commits/../../x.json"
    (copy / "commits/00000.json").write_text(json.dumps(record))
    with pytest.raises(BankCorrupt, match=r"commits/00000\.json is damaged"):
        read_record(copy, "00000")


def test_a_file_that_is_none_of_a_bank_is_not_sealed(
    sealed: Bank, clip_table: Path, copy: Path
) -> None:
    """Such a seal could not be read again."""
    (copy / "seal.json").unlink()
    (copy / "layers/.DS_Store").write_bytes(b"")
    words = r"holds layers/\.DS_Store, which is no file of a bank; move it to .*notes or remove it"
    with pytest.raises(BankError, match=words):
        extract(clip_table, encoder="fake", out=copy, settings=SETTINGS)
    (copy / "layers/.DS_Store").unlink()
    again = extract(clip_table, encoder="fake", out=copy, settings=SETTINGS)
    assert again.root_sha256 == sealed.root_sha256
