from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import zarr
from fake_bank import SETTINGS

from patchbank.cli.main import main
from patchbank.pipeline.bank import Bank
from patchbank.pipeline.extraction import extract
from patchbank.pipeline.specs import human_bytes

SHARD = "layers/1/patches/c.1.0.0"


def said(capsys: pytest.CaptureFixture[str], *line: str, status: int = 0) -> tuple[str, str]:
    """What `patchbank bank LINE` prints on stdout and stderr."""
    capsys.readouterr()
    assert main(["bank", *line]) == status
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out, err


def test_verify_says_that_a_bank_is_whole(sealed: Bank, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "verify", str(sealed.path))[0] == f"{sealed.path}: whole\n"
    out, _ = said(capsys, "verify", str(sealed.path), "--quick")
    assert out == f"{sealed.path}: whole, as far as a quick check sees\n"
    out, _ = said(capsys, "verify", str(sealed.path), "--json")
    assert json.loads(out) == {"bank": str(sealed.path), "quick": False, "problems": []}


def test_verify_prints_every_problem_and_leaves_with_1(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / SHARD).unlink()
    (copy / "extra").write_text("x")
    out, err = said(capsys, "verify", str(copy), status=1)
    assert out.splitlines() == [
        f"{SHARD}: is missing; rows 16-31 are lost",
        "extra: is not sealed; only notes/ may hold files that are not",
    ]
    assert f"2 problems found; pull the bank again, or `patchbank bank rm {copy}`" in err
    out, _ = said(capsys, "verify", str(copy), "--json", status=1)
    assert len(json.loads(out)["problems"]) == 2
    assert "no bank at" in said(capsys, "verify", str(copy / "no"), status=1)[1]


def test_show_fits_80_columns_and_counts_reasons(
    clip_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(clip_table.parent, tmp_path / "set")
    (folder / "audio/0003.wav").write_bytes(b"")
    bank = extract(folder / "clips.csv", encoder="fake", out=tmp_path / "x.bank", settings=SETTINGS)
    out, _ = said(capsys, "show", str(bank.path))
    for words in (
        f"fingerprint  {bank.fingerprint[:12]}",
        "encoder      fake, ",
        "layer 1      10 x 2 patches of 8",
        "layer 2      5 x 2 patches of 12 and 1 prefix",
        "dtype        float16",
        "window       1 s every 1 s at 16000 Hz, pad zero",
        "clips        40, 1 failed",
        "             1 x ",
        "licence      Apache-2.0",
    ):
        assert words in out
    assert all(len(line) <= 80 or " " not in line[13:] for line in out.splitlines())
    facts = json.loads(said(capsys, "show", str(bank.path), "--json")[0])
    assert (facts["clips"], facts["failed"]) == (40, 1)
    assert list(facts["reasons"].values()) == [1]
    sealed_files = [p for p in bank.path.rglob("*") if p.is_file() and p.name != "seal.json"]
    assert facts["bytes"] == sum(path.stat().st_size for path in sealed_files)


def test_ls_names_banks_and_reasons_and_passes_over_the_rest(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(copy, tmp_path / "unsealed.bank")
    (tmp_path / "unsealed.bank/seal.json").unlink()
    shutil.copytree(copy, tmp_path / "broken.bank")
    (tmp_path / "broken.bank/zarr.json").write_text("{")
    (tmp_path / "empty.bank").mkdir()
    shutil.copytree(copy, tmp_path / "old.bank")
    (tmp_path / "old.bank/seal.json").write_text("[]")
    zarr.create_group(tmp_path / "somebody's group")
    (tmp_path / "notes.txt").write_text("x")
    shutil.copytree(copy, tmp_path / f".copy.bank.{'0' * 32}")
    rows = json.loads(said(capsys, "ls", str(tmp_path), "--json")[0])
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == [
        "broken.bank",
        "copy.bank",
        "empty.bank",
        "old.bank",
        "unsealed.bank",
    ]
    assert by_name["copy.bank"]["layers"] == [1, 2]
    assert by_name["copy.bank"]["sealed"] is True
    assert by_name["unsealed.bank"]["sealed"] is False
    assert by_name["unsealed.bank"]["bytes"] == by_name["copy.bank"]["bytes"]
    assert "is no JSON" in by_name["broken.bank"]["error"]
    assert "no bank at" in by_name["empty.bank"]["error"]
    assert "is damaged" in by_name["old.bank"]["error"]
    out, _ = said(capsys, "ls", str(tmp_path))
    size = human_bytes(by_name["copy.bank"]["bytes"])
    assert f"fake 1,2 float16, 40 clips, {size}" in out
    assert len([line for line in out.splitlines() if " not sealed " in line]) == 1


def test_ls_of_no_folder_or_no_banks_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no banks in" in said(capsys, "ls", str(tmp_path))[0]
    assert "no folder" in said(capsys, "ls", str(tmp_path / "nowhere"), status=1)[1]


@pytest.mark.parametrize("content", ["{", None])
def test_rm_removes_what_verify_says_to_remove(
    content: str | None, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "zarr.json").unlink()
    if content is not None:
        (copy / "zarr.json").write_text(content)
    said(capsys, "rm", str(copy), "--yes")
    assert not copy.exists()


def test_rm_removes_a_bank_and_nothing_else(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    assert "no bank at" in said(capsys, "rm", str(tmp_path / "thesis"), "--yes", status=1)[1]
    zarr.create_group(tmp_path / "group")
    assert "no bank at" in said(capsys, "rm", str(tmp_path / "group"), "--yes", status=1)[1]
    (tmp_path / "link.bank").symlink_to(copy)
    words = said(capsys, "rm", f"{tmp_path / 'link.bank'}/", "--yes", status=1)[1]
    assert "is a link to" in words
    assert copy.is_dir()
    (copy / "notes").symlink_to(tmp_path / "thesis")
    assert said(capsys, "rm", str(copy), "--yes")[0] == f"removed {copy}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["group", "link.bank", "thesis"]


@pytest.mark.parametrize(("answer", "stays"), [("n\n", True), ("", True), ("y\n", False)])
def test_rm_asks_first(answer: str, stays: bool, copy: Path) -> None:
    from typer.testing import CliRunner

    from patchbank.cli.main import app

    done = CliRunner().invoke(app, ["bank", "rm", str(copy)], input=answer)
    assert "(40 clips)?" in done.output
    assert done.exit_code == int(stays)
    assert copy.exists() is stays
