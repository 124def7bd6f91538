"""`patchbank bank push` and `bank pull`, as typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from patchbank.cli.main import main
from patchbank.cli.share import destination, place_in
from patchbank.pipeline.bank import Bank, open_bank
from patchbank.pipeline.bank.verify import verify_bank


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHBANK_SETTINGS", str(tmp_path / "settings.toml"))
    monkeypatch.setenv("PATCHBANK_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://team/banks", "s3://team/banks/x.bank"),
        ("s3://team/banks/", "s3://team/banks/x.bank"),
        ("s3://team/banks/y.bank", "s3://team/banks/y.bank"),
        ("s3://team/banks/y.bank/", "s3://team/banks/y.bank"),
        ("/mnt/share", "/mnt/share/x.bank"),
    ],
)
def test_a_push_goes_to_the_address_of_a_bank_or_below_that_of_a_folder(
    url: str, place: str
) -> None:
    assert place_in(url, "x.bank") == place


@pytest.mark.parametrize(
    ("dest", "out"),
    [(None, "x.bank"), ("y.bank", "y.bank"), ("banks", "banks/x.bank"), ("b/", "b/x.bank")],
)
def test_a_pull_goes_to_the_bank_that_is_named_or_below_the_folder(
    dest: str | None, out: str
) -> None:
    assert destination(dest, "x.bank") == Path(out)


def test_push_ls_pull_by_hand(
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    team = str(tmp_path / "team")
    line = ["bank", "push", str(sealed.path), team, "--data", "tones"]
    assert main([*line, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == sealed.seal.bank_bytes
    assert not Path(team).exists()
    assert main(line) == 0
    out, err = capsys.readouterr()
    assert f"team/{sealed.path.name}: " in out
    assert "sent" in out
    assert "note: " in err  # the fake encoder's weights have no licence
    assert main(line) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["bank", "ls", team, "--data", "tones", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert "tones" in json.dumps(listed)
    name = sealed.path.stem
    assert main(["bank", "pull", name, "--from", team, "--json"]) == 0
    pulled = json.loads(capsys.readouterr().out)
    assert pulled["root_sha256"] == sealed.root_sha256
    assert verify_bank(tmp_path / sealed.path.name) == ()
    assert main(["bank", "pull", name, "--from", team]) == 0
    assert "is here already" in capsys.readouterr().out


def test_a_part_is_pulled_by_its_options(
    sealed: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "part.bank"
    line = ["bank", "pull", f"file://{sealed.path}", str(out), "--split", "train", "--json"]
    assert main([*line, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert 0 < planned["bytes"] < sealed.seal.bank_bytes
    assert not out.exists()
    assert main(line) == 0
    made = open_bank(out)
    assert set(made.clips["split"].to_pylist()) == {"train"}
    assert made.card["derived_from"][0]["root_sha256"] == sealed.root_sha256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["push", "{sealed}", "ftp://a/b"], "no store ftp://"),
        (["push", "{sealed}", "team", "--limit-rate", "fast"], "'fast' is no size"),
        (["push", "team", "elsewhere"], "no bank at"),
        (["pull", "nowhere"], "no catalogue is set"),
        (["pull", "file:///nowhere/x.bank"], "no bank at"),
        (["pull", "{sealed}", "x.bank", "--split", "dev"], "no split 'dev'"),
        (["pull", "{sealed}", "x.bank", "--layers", "77"], "no layer 77"),
        (["pull", "{sealed}", "x.bank", "--allowed-signers", "none"], "no file none"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [argument.format(sealed=sealed.path) for argument in arguments]
    assert main(["bank", *line]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "x.bank").exists()


def test_an_unsigned_bank_is_refused_where_signers_are_asked_for(
    sealed: Bank,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    signers = tmp_path / "signers"
    signers.write_text("")
    monkeypatch.setenv("PATCHBANK_ALLOWED_SIGNERS", "")
    monkeypatch.setenv("PATCHBANK_REQUIRE_SIGNATURE", "")
    out = tmp_path / "here.bank"
    line = ["bank", "pull", str(sealed.path), str(out), "--allowed-signers", str(signers)]
    for more in ([], ["--pooled-only"], ["--layers", "last"]):
        assert main([*line, *more]) == 1
        assert "is not signed" in capsys.readouterr().err
        assert not out.exists()


def test_a_moved_bank_is_pushed_from_where_it_lies(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere" / "moved.bank"
    moved.parent.mkdir()
    shutil.move(copy, moved)
    assert main(["bank", "push", str(moved), str(tmp_path / "team")]) == 0
    assert "moved.bank: " in capsys.readouterr().out
